"""Everything around the code: dependencies, documentation, developer commands, and the installed package."""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import build_backend
import build_release
import pytest
import typer
import write_reference
import yaml
from conftest import ROOT, problem_text
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import Field
from setuptools.errors import OptionError
from typer.core import TyperGroup

from loratune import __version__, errors
from loratune.cli import app
from loratune.config import RunConfig
from loratune.kernels.compiled import library
from loratune.kernels.compiled.build import DEFINES, DIGEST_BYTES, VARIANTS

RECORD = "loratune/system/release.json"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GUIDES = (
    "CHANGELOG.md", "CONTRIBUTING.md", "README.md", "configs/README.md", "configs/agent/SKILL.md",
    "configs/guide/data.md", "configs/guide/machines.md", "configs/guide/programs.md", "configs/guide/results.md",
    "configs/guide/serving.md", "configs/guide/settings.md", "configs/guide/training.md",
    "configs/guide/troubleshooting.md", "configs/keys.md",
    "configs/preferences/README.md", "configs/quickstart/README.md", "configs/recipes/README.md", "loratune/README.md",
    "loratune/codes.md", "loratune/results.md", "scripts/README.md", "scripts/first_hour/README.md",
    "scripts/learning/README.md", "scripts/learning/length.md", "scripts/measurements.md",
    "scripts/memory_and_exports.md", "tests/README.md",
)  # fmt: skip
NOTEBOOKS = ("configs/quickstart/quickstart.ipynb",)


# Dependencies


def test_the_lock_has_a_version_for_each_requirement() -> None:
    """And no addresses, hashes or builds, which other machines would not find."""
    lines = (ROOT / "scripts" / "lock.txt").read_text(encoding="utf-8").splitlines()
    locked = [Requirement(line) for line in lines if not line.startswith("#")]
    assert not [one for one in locked if one.url or not re.fullmatch(r"==[0-9a-z.]+", str(one.specifier))]
    versions = {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in locked}
    extras = PROJECT["project"]["optional-dependencies"]
    needed = [*PROJECT["build-system"]["requires"], *PROJECT["project"]["dependencies"]]
    for extra in ("dev", *extras["dev"][0].removeprefix("loratune[").removesuffix("]").split(",")):
        needed += [line for line in extras[extra] if not line.startswith("loratune[")]
    for one in map(Requirement, needed):
        assert one.specifier.contains(versions[canonicalize_name(one.name)]), one


def deptry(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deptry", "loratune", "scripts", "--no-ansi", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_declared_dependencies_match_the_imports() -> None:
    done = deptry()
    assert done.returncode == 0, done.stderr


def test_deptry_detects_undeclared_and_unused_packages(tmp_path: Path) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith('    "safetensors>=')]
    (tmp_path / "pyproject.toml").write_text(text.replace(f"{line}\n", '    "mypy>=1",\n'), encoding="utf-8")
    done = deptry("--config", tmp_path / "pyproject.toml")
    assert done.returncode == 1
    assert "DEP003 'safetensors'" in done.stderr and "DEP002 'mypy'" in done.stderr


# Documentation


@pytest.mark.parametrize("path", write_reference.PAGES, ids=lambda path: path.name)
def test_generated_reference_is_up_to_date(path: Path) -> None:
    written = path.read_text(encoding="utf-8")
    assert written == write_reference.PAGES[path](), "run `python scripts/write_reference.py`"


def test_table_of_keys_follows_the_schema() -> None:
    class Longer(RunConfig):
        priority: int | None = Field(3, ge=1, description="how urgent | important it is")

    pages = [write_reference.keys_page(config).splitlines() for config in (Longer, RunConfig)]
    (line,) = set(pages[0]) - set(pages[1])
    assert line == "| `priority` | integer ≥ 1 or null | `3` | how urgent \\| important it is |"


def test_table_of_the_slowest_tests_comes_from_a_log() -> None:
    page = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    log = "2.50s setup    tests/test_a.py::test_b\n0.70s call     tests/test_a.py::test_c[x | y]\n"
    written = write_reference.with_slowest_tests(page, log + "== 2 passed, 1 skipped in 3.21s ==\n")
    assert "\n| 2.50 | `test_a.py::test_b` | setup |\n| 0.70 | `test_a.py::test_c[x \\| y]` |  |\n" in written
    assert "\n2 passed, 1 skipped in 3.21s\n" in written
    assert write_reference.with_slowest_tests(written, log).count("| seconds |") == 1


def anchors(text: str) -> set[str]:
    """The heading anchors of a Markdown file, as GitHub generates them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def page(path: Path) -> str:
    """The text of a guide; of a notebook, that of its cells of text."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def broken_links(path: Path) -> Iterator[str]:
    """The links of a guide to files or headings of the checkout that do not exist."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page(path)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            yield link


@pytest.mark.parametrize("name", (*GUIDES, *NOTEBOOKS))
def test_links_are_not_broken(name: str) -> None:
    assert list(broken_links(ROOT / name)) == []


def test_broken_links_are_detected(tmp_path: Path) -> None:
    text = "# A b, `c`\n[1](#a-b-c) [2](#a) [3](gone.md) [4](guide.md#a-b-c) [5](guide.md#gone) [6](https://x.y)\n"
    (tmp_path / "guide.md").write_text(text, encoding="utf-8")
    assert list(broken_links(tmp_path / "guide.md")) == ["#a", "gone.md", "guide.md#gone"]
    cells = [{"cell_type": "markdown", "source": [text]}, {"cell_type": "code", "source": ["[1](gone.py)"]}]
    (tmp_path / "notebook.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    assert list(broken_links(tmp_path / "notebook.ipynb")) == ["#a-b-c", "#a", "gone.md", "guide.md#gone"]


def commands_in(text: str) -> Iterator[list[str]]:
    """The words of each loratune command of a guide, in code blocks and in running text."""
    lines = re.sub(r" \\\n\s*", " ", text)
    for line in re.findall(r"(?:^(?: {4}|\$ )+.*?|`|-m |^)loratune ([a-z]+(?: [^`\n]*)?)", lines, flags=re.MULTILINE):
        line = re.split(r" +#| \| | >| &&? ?|$", line.replace("...", "X"))[0].replace("|", "-or-")
        with suppress(ValueError):  # a quotation that the text ends
            yield shlex.split(line.replace("[", "").replace("]", ""))


@pytest.mark.parametrize("name", GUIDES)
def test_commands_of_guides_have_these_options(name: str) -> None:
    group, wrong = typer.main.get_command(app), list[str]()
    assert isinstance(group, TyperGroup)
    for command, *words in commands_in((ROOT / name).read_text(encoding="utf-8")):
        if command in group.commands:
            try:
                group.commands[command].make_context(command, words)
            except (typer.BadParameter, typer.Exit):
                pass  # a placeholder, and --help
            except typer.BadParameter.__mro__[1] as error:  # any other error of usage
                wrong.append(f"{command} {shlex.join(words)}: {error}")
    assert not wrong


def test_commands_of_guides_are_found() -> None:
    text = """
    $ loratune train a.yaml \\
        --set a.b=1   # why
`loratune chat --adapter DIR` and x &&
    python -m loratune env --json | jq
"""
    found = ["train a.yaml --set a.b=1", "chat --adapter DIR", "env --json"]
    assert [*commands_in(text)] == [one.split() for one in found]


def test_all_guides_are_checked() -> None:
    done = subprocess.run(["git", "ls-files", "*.md", "*.ipynb"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert sorted(done.stdout.split()) == sorted((*GUIDES, *NOTEBOOKS))


def test_pages_are_short_and_the_guide_lists_every_exit_code() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110
    pages = [ROOT / "configs" / "README.md", *(ROOT / "configs" / "guide").iterdir()]
    texts = {path.name: path.read_text(encoding="utf-8") for path in pages}
    assert [name for name, text in texts.items() if len(text.splitlines()) > 250] == []
    text = texts["troubleshooting.md"]
    rows = text.split("| exit code | |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    codes = [int(code) for row in rows for code in row.split("|")[1].split(",")]
    family = [errors.LoratuneError, *errors.LoratuneError.__subclasses__()]
    assert codes == [0, *sorted(member.exit_code for member in family)]


# Developer commands


def recipe(*targets: str) -> list[str]:
    """The commands that `make` would run for targets in an up-to-date environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", "--no-print-directory", "--old-file", ".venv/dev.stamp", *targets]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_pre_commit_runs_what_make_lint_and_make_types_run() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == recipe("lint", "types")
    assert all(hook["language"] == "system" and hook["always_run"] for hook in hooks)
    assert not any(hook["pass_filenames"] for hook in hooks)


def test_only_make_test_all_runs_the_slow_tests() -> None:
    *checks, tests = recipe("test")
    assert checks == recipe("lint", "types")
    assert tests.endswith(' -m "not slow"')
    *again, whole = recipe("test-all")
    assert again == checks and whole.startswith(tests.removesuffix(' -m "not slow"')) and "-m " not in whole


# The package, installed


HAS_LIBRARIES = platform.machine() == "x86_64" and shutil.which("gcc") is not None


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, with files that belong to no distribution."""
    folder = tmp_path_factory.mktemp("checkout") / "source"
    shutil.copytree(ROOT / "loratune", folder / "loratune", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "scripts").mkdir()
    for name in ("pyproject.toml", "scripts/build_backend.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("loratune_private/x.py", "loratune/cli/private.json", "loratune/data/private.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not ours")
    return folder


def build_wheel(source: Path, folder: Path, **environment: str) -> tuple[Path, str]:
    """A wheel of a checkout or an sdist, and what the build printed."""
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", folder, source]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a clean copy of the checkout."""
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))[0]


GIT = ("git", "-c", "user.name=x", "-c", "user.email=x", "-C")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a file of two lines, which both build scripts take for the checkout."""
    root = tmp_path / "repository"
    (root / "loratune" / "system").mkdir(parents=True)
    (root / "loratune" / "a.py").write_text("1\n2\n")
    for words in (("init", "--quiet"), ("add", "."), ("commit", "--quiet", "--message=x")):
        subprocess.run([*GIT, root, *words], check=True)
    for script in (build_backend, build_release):
        monkeypatch.setattr(script, "ROOT", root)
    return root


@pytest.mark.parametrize(
    ("name", "is_dirty"), [("loratune/a.py", True), ("loratune/b.txt", True), ("notes.txt", False)]
)
def test_a_build_from_changed_files_says_so(name: str, is_dirty: bool, repository: Path, tmp_path: Path) -> None:
    commit = build_backend.checked_out()
    assert re.fullmatch("[0-9a-f]{12}", commit)
    (repository / name).write_text("3\n")
    (tmp_path / RECORD).parent.mkdir(parents=True)
    build_backend.write_record(tmp_path)
    assert json.loads((tmp_path / RECORD).read_text()) == {"commit": commit + "-dirty" * is_dirty, "variants": {}}
    (repository / ".git" / "HEAD").unlink()
    assert build_backend.checked_out() == ""


@pytest.mark.parametrize("name", ["loratune/link.txt", "loratune/folder/passwd", "../passwd"])
def test_no_file_outside_the_checkout_is_packed(name: str, repository: Path) -> None:
    (repository / "loratune" / "link.txt").symlink_to("/etc/passwd")
    (repository / "loratune" / "folder").symlink_to("/etc")
    assert build_backend.own_files(["loratune/a.py"]) == ["loratune/a.py"]
    with pytest.raises(OptionError, match=re.escape(name)):
        build_backend.own_files(["loratune/a.py", name])


@pytest.mark.parametrize("value", ["abc", "", "1.5", "-5", "99999999999", "4294967296", "٣"])
def test_a_time_that_archives_cannot_hold_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "4294967295")
    assert build_backend.epoch() == 4294967295
    monkeypatch.setenv("SOURCE_DATE_EPOCH", value)
    with pytest.raises(OptionError, match=re.escape(repr(value))):
        build_backend.epoch()


def test_a_release_has_the_bytes_of_the_commit(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever git is set to. git's own words are shown if it fails."""
    (tmp_path / "attributes").write_text("* text eol=crlf\n")
    (tmp_path / "set").write_text(f"[core]\nautocrlf = true\neol = crlf\nattributesFile = {tmp_path}/attributes\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "set"))
    build_release.git("clone", "--quiet", repository.as_uri(), tmp_path / "clone")
    assert (tmp_path / "clone" / "loratune" / "a.py").read_bytes() == b"1\n2\n"
    with pytest.raises(SystemExit, match=r"git log failed: .*nowhere"):
        build_release.git("log", "nowhere")


def test_a_release_replaces_nothing_but_a_release(tmp_path: Path) -> None:
    for name in ("loratune-1.0.0.tar.gz", "thesis.txt"):
        (tmp_path / name).touch()
    with pytest.raises(SystemExit, match=r"thesis\.txt is no file of a release"):
        build_release.release(tmp_path)
    assert len([*tmp_path.iterdir()]) == 2
    assert recipe("release", "DIST=a b; c")[-1].endswith('scripts/build_release.py "a b; c"')
    assert not any("rm " in line for line in recipe("release"))


ENDS = {"compiled": "-manylinux_2_28_x86_64.whl", "pure": "-any.whl", "sdist": ".tar.gz"}


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What `make release` builds from the last commit, twice."""
    if not HAS_LIBRARIES or not (ROOT / ".git").exists():
        pytest.skip("a release is built in a git checkout on x86-64")
    folder = tmp_path_factory.mktemp("releases")
    subprocess.run(["git", "clone", "--quiet", "--depth=1", ROOT.as_uri(), folder / "checkout"], check=True)
    made = []
    for name, umask in (("one", 0o022), ("two", 0o077)):
        command = ["make", "--silent", "release", f"DIST={folder / name}", f"PYTHON={sys.executable}"]
        subprocess.run(command, cwd=folder / "checkout", umask=umask, check=True)
        made.append(folder / name)
    return made


@pytest.mark.slow
def test_releases_built_twice_are_identical(releases: list[Path]) -> None:
    """With another umask and at another time; all files have the time and the commit of the last commit."""
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in releases)
    assert {name for name in one} == {
        f"loratune-{__version__}{end if end == '.tar.gz' else f'-py3-none{end}'}" for end in ENDS.values()
    }
    assert one == two
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in one:
        if name.endswith(".whl"):
            record = json.loads(ZipFile(releases[0] / name).read(RECORD))
            assert record["commit"] == commit[:12]
            assert bool(record["variants"]) is name.endswith(ENDS["compiled"])


@pytest.fixture(scope="module", params=ENDS)
def installed(request: pytest.FixtureRequest, releases: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kind of a distribution, and the binaries of a new environment with it.

    Its dependencies are those of the tests' environment, as a path after its own. With LORATUNE_INSTALL=all they are
    installed, which downloads gigabytes.
    """
    kind, folder = request.param, tmp_path_factory.mktemp("installed")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    (path,) = releases[0].glob(f"*{ENDS[kind]}")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], env=environment, check=True)
    whole = os.environ.get("LORATUNE_INSTALL") == "all"
    options = ["--quiet", "--disable-pip-version-check", "--no-compile", *([] if whole else ["--no-deps"])]
    environment["LORATUNE_WHEEL"] = "pure"  # for the sdist, as if there were no compiler
    install = [folder / "venv" / "bin" / "pip", "install", *options, path]
    subprocess.run(install, cwd=folder, env=environment, check=True)
    if not whole:
        (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        site.joinpath("tests.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    yield kind, folder / "venv" / "bin"
    shutil.rmtree(folder)


def names_in(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


def source_files() -> set[str]:
    """The package files that belong in a wheel: all but the guides."""
    files = (path for path in (ROOT / "loratune").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in files if path.suffix != ".md"}


@pytest.mark.slow
def test_wheel_contains_the_package_and_its_license(wheel: Path) -> None:
    names = names_in(wheel)
    records = {name for name in names if ".dist-info/" in name}
    files = [variant.file_name(define) for variant in VARIANTS for define in DEFINES]
    libraries = {f"loratune/kernels/compiled/shipped/{name}" for name in files}
    assert names - records == source_files() | {RECORD} | (libraries if HAS_LIBRARIES else set())
    assert any(name.endswith("/licenses/LICENSE") for name in records)
    tag = "manylinux_2_28_x86_64" if HAS_LIBRARIES else "any"
    assert wheel.name == f"loratune-{__version__}-py3-none-{tag}.whl"
    assert wheel.stat().st_size < 2 << 20


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBRARIES, reason="wheels have libraries on x86-64 only")
def test_wheel_libraries_match_the_tag_and_use_the_loaders_openmp(wheel: Path, tmp_path: Path) -> None:
    """According to binutils: the C library of the tag, the OpenMP of the loading process, no debug symbols."""
    (minor,) = re.findall(r"manylinux_2_(\d+)_", wheel.name)
    with ZipFile(wheel) as archive:
        paths = [archive.extract(name, tmp_path) for name in archive.namelist() if name.endswith(".so")]
    versions = set()
    for path in paths:
        text = subprocess.run(
            ["readelf", "--wide", "--dynamic", "--dyn-syms", "--sections", path],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert set(re.findall(r"\(NEEDED\).*\[(.*)\]", text)) <= {"libc.so.6", "libm.so.6"} and "PATH)" not in text
        assert re.search(r"UND GOMP_parallel\n", text) and ".symtab" not in text and ".debug" not in text
        versions |= {int(number) for number in re.findall(r"@GLIBC_2\.(\d+)", text)}
    assert max(versions) <= int(minor) == 28 and len(paths) == 6


WITHOUT = {  # What the fake gcc does, and what is reported.
    "no compiler": ("", "there is no gcc: install one, or set CC to its path"),
    "an old compiler": (
        "echo 'cc1: error: bad value (x86-64-v4)' >&2; exit 1",
        "compiling it failed: {gcc} ended with 1: cc1: error: bad value (x86-64-v4); it needs gcc 11 or newer",
    ),
    "another OpenMP": ("echo GOMP_parallel __kmpc_fork_call > library.so", "torch has; set CC to a gcc"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBRARIES, reason="wheels have libraries on x86-64 only")
@pytest.mark.parametrize("name", WITHOUT)
def test_wheel_is_pure_and_says_so_without_a_suitable_compiler(
    name: str, source: Path, wheel: Path, tmp_path: Path
) -> None:
    """Even if libraries were built in this checkout before."""
    does, line = WITHOUT[name]
    (tmp_path / "bin").mkdir()
    gcc = tmp_path / "bin" / "gcc"
    if does:
        gcc.write_text(f"#!/bin/sh\n{does}\n")
        gcc.chmod(0o755)
    path, said = build_wheel(source, tmp_path, PATH=str(tmp_path / "bin"))
    assert path.name.endswith("-py3-none-any.whl") and said.count("a wheel without compiled code, as ") == 1
    assert line.format(gcc=gcc) in said
    assert {name for name in names_in(path) if ".dist-info/" not in name} == source_files() | {RECORD}
    assert json.loads(ZipFile(path).read(RECORD))["variants"] == {}


PAGE = "[A](b.md#c) **[B](loratune/)** [C](https://d.e/f) [D](#g) `[x]` [E](mailto:a@b.c)"
TEXTS = "A **B** [C](https://d.e/f) D `[x]` [E](mailto:a@b.c)"
LINKS = PAGE.replace("(b", "({}/b").replace("(lora", "({}/lora").replace("(#", "({}/README.md#")


@pytest.mark.parametrize(("urls", "expected"), [
    ({}, TEXTS),
    ({"Documentation": "https://x.y"}, TEXTS),
    ({"Repository": "https://x.y/z"}, LINKS),
    ({"source-code": "https://x.y/z/"}, LINKS),
    ({"Documentation": "https://d.y", "GitHub": "https://x.y/z.git"}, LINKS),
])  # fmt: skip
def test_links_of_a_page_elsewhere_are_absolute_or_their_texts(urls: dict[str, str], expected: str) -> None:
    assert build_backend.absolute_links(PAGE, build_backend.address_of_files(urls, "1.0")) == expected.format(
        *["https://x.y/z/blob/v1.0"] * 3
    )


@pytest.mark.parametrize("url", ["", "https://x.y/me/loratune"])
def test_the_metadata_describes_the_package_with_links_that_work(url: str, source: Path, tmp_path: Path) -> None:
    """That of wheels; an sdist's is written by the same command."""
    copy = tmp_path / "source"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.egg-info", "kernels"))
    if url:
        text = (copy / "pyproject.toml").read_text(encoding="utf-8")
        named = text.replace("[project.scripts]", f'[project.urls]\nRepository = "{url}"\n\n[project.scripts]')
        (copy / "pyproject.toml").write_text(named, encoding="utf-8")
    shutil.copytree(ROOT / "loratune" / "kernels" / "compiled", copy / "loratune" / "kernels" / "compiled")
    code = f"import build_backend; print(build_backend.prepare_metadata_for_build_wheel({str(tmp_path)!r}))"
    environment = os.environ | {"PYTHONPATH": str(copy / "scripts")}
    subprocess.run([sys.executable, "-c", code], cwd=copy, env=environment, capture_output=True, check=True)
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    written = metadata.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", written)
    assert "# loratune\n" in written and links and all(link.startswith("https://") for link in links)
    files = [link.removeprefix(f"{url}/blob/v{__version__}/") for link in links if url and link.startswith(url)]
    assert bool(files) == bool(url) and all((ROOT / name.partition("#")[0]).exists() for name in files)


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["build_sdist", "build_wheel"])
@pytest.mark.parametrize(("link", "epoch", "error"), [
    ("data/instructions.txt", "1", "loratune/data/instructions.txt is a link"),
    ("study/grid.py", "1", "loratune/study/grid.py is a link"),
    ("", "abc", "SOURCE_DATE_EPOCH is 'abc'"),
])  # fmt: skip
def test_a_refused_build_is_one_line_and_leaves_nothing(
    hook: str, link: str, epoch: str, error: str, source: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(source, tmp_path / "source")
    if link:
        (copy / "loratune" / link).unlink()
        (copy / "loratune" / link).symlink_to("/etc/passwd")
    code = f"import build_backend; build_backend.{hook}({str(tmp_path)!r})"
    settings = {"PYTHONPATH": str(copy / "scripts"), "SOURCE_DATE_EPOCH": epoch, "LORATUNE_WHEEL": "pure"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and problem_text(done.stderr.splitlines()[-1]).startswith(f"{error}")
    assert not [*tmp_path.glob("*.whl"), *tmp_path.glob("*.gz"), *copy.glob("loratune-*")]


@pytest.mark.slow
def test_an_sdist_gives_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    code = f"import build_backend; build_backend.build_sdist({str(tmp_path)!r})"
    environment = os.environ | {"PYTHONPATH": str(source / "scripts")}
    subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, check=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert source_files() <= names and not [name for name in names if "private" in name or "tests" in name]
    path, _ = build_wheel(sdist, tmp_path)
    assert (path.name, names_in(path)) == (wheel.name, names_in(wheel))
    for name in names_in(wheel):
        if name.endswith(".so"):
            assert ZipFile(path).read(name) == ZipFile(wheel).read(name)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBRARIES, reason="wheels have libraries on x86-64 only")
def test_wheel_library_equals_one_compiled_on_this_machine(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for define in DEFINES:
        assert library.compiled(define, VARIANTS[0]).name.startswith(VARIANTS[0].name)
        (path,) = tmp_path.glob("loratune/*.so")
        shipped = ZipFile(wheel).read(f"loratune/kernels/compiled/shipped/{VARIANTS[0].file_name(define)}")
        assert path.read_bytes()[:-DIGEST_BYTES] == shipped[:-DIGEST_BYTES]
        path.unlink()


@pytest.mark.slow
def test_editable_installation_contains_no_libraries(source: Path, tmp_path: Path) -> None:
    code = f"import build_backend; build_backend.build_editable({str(tmp_path)!r})"
    environment = os.environ | {"PYTHONPATH": str(source / "scripts")}
    subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, check=True)
    (path,) = tmp_path.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl") and not any(name.endswith(".so") for name in names_in(path))
    assert not [*(source / "loratune").rglob("*.so")]


@pytest.mark.slow
def test_each_distribution_trains_without_a_compiler_outside_the_checkout(
    installed: tuple[str, Path], run_config: Callable[..., Path], tmp_path: Path
) -> None:
    (kind, binaries), compiled = installed, installed[0] == "compiled"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XDG_", "HF_"))}
    environment["HOME"] = str(tmp_path)
    environment["PATH"] = str(tmp_path / "none")

    def run(*command: object) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert run(binaries / "python", "-c", "import loratune; print(loratune.__file__)").startswith(
        str(binaries.parent / "lib")
    )
    shown = "compiled code for x86-64-v" if compiled else "no compiled code, as there is no C compiler"
    assert shown in run(binaries / "loratune", "--version"), kind
    said = run(binaries / "loratune", "train", run_config(training={"max_steps": 4}))
    record = json.loads((tmp_path / "out" / "loratune.json").read_text(encoding="utf-8"))
    assert len(record["curve"]) >= 4 and (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert record["versions"]["loratune"] == __version__ and not [*(tmp_path / ".cache").glob("**/*.so")]
    expected = "in use (for x86-64-v" if compiled else "not in use (there is no C compiler"
    assert record["machine"]["compiled_code"].startswith(expected), record["machine"]
    assert bool(record["not_accelerated"]) != compiled and said.count("no C compiler") == (not compiled)
    assert run(binaries / "loratune", "generate", "--adapter", tmp_path / "out", "--max-new-tokens", 2, "1 and 1 make")


def test_project_declares_its_license_and_pytest_markers() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").split()[:4] == ["Apache", "License", "Version", "2.0,"]
    markers = {line.split(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    assert markers == {"slow", "real_model", "distributed"}
