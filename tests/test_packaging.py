"""What surrounds the code: dependencies, documentation, the commands of developers, and the installed package."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import document_codes
import document_config
import pytest
import yaml
from conftest import ROOT
from pydantic import Field

from loratune import errors
from loratune.config import RunConfig

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GUIDES = ("CHANGELOG.md", "CONTRIBUTING.md", "README.md", "configs/README.md", "configs/preferences/README.md",
          "configs/quickstart/README.md",
          "loratune/README.md", "scripts/README.md", "tests/README.md")  # fmt: skip


# Dependencies


def deptry(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deptry", "loratune", "scripts", "--no-ansi", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_imported_package_is_declared_and_every_declared_one_imported() -> None:
    done = deptry()
    assert done.returncode == 0, done.stderr


def test_deptry_sees_a_package_that_is_not_declared(tmp_path: Path) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith('    "safetensors>=')]
    (tmp_path / "pyproject.toml").write_text(text.replace(f"{line}\n", '    "pytest>=9",\n'), encoding="utf-8")
    done = deptry("--config", tmp_path / "pyproject.toml")
    assert done.returncode == 1
    assert "DEP003 'safetensors'" in done.stderr and "DEP002 'pytest'" in done.stderr


# Documentation


def test_the_table_of_keys_is_current() -> None:
    text = document_config.README.read_text(encoding="utf-8")
    assert document_config.document(text) == text, "run `python scripts/document_config.py`"


def test_the_table_of_codes_is_current() -> None:
    text = document_codes.README.read_text(encoding="utf-8")
    assert document_codes.document(text) == text, "run `python scripts/document_codes.py`"


def test_the_table_of_keys_follows_the_schema() -> None:
    class Longer(RunConfig):
        priority: int | None = Field(3, ge=1, description="how urgent | important it is")

    text = document_config.README.read_text(encoding="utf-8")
    (line,) = set(document_config.document(text, Longer).splitlines()) - set(text.splitlines())
    assert line == "| `priority` | integer ≥ 1 or null | `3` | how urgent \\| important it is |"


@pytest.mark.parametrize("text", ["no markers", f"{document_config.BEGIN}{document_config.END}" * 2])
def test_a_text_without_the_two_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="once"):
        document_config.document(text)


def anchors(text: str) -> set[str]:
    """The names of the headings of a Markdown file, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> Iterator[str]:
    """Links of a Markdown file to files or headings of the checkout that are not there."""
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            yield link


@pytest.mark.parametrize("name", GUIDES)
def test_links_lead_somewhere(name: str) -> None:
    assert list(broken_links(ROOT / name)) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    text = "# A b, `c`\n[1](#a-b-c) [2](#a) [3](gone.md) [4](guide.md#a-b-c) [5](guide.md#gone) [6](https://x.y)\n"
    (tmp_path / "guide.md").write_text(text, encoding="utf-8")
    assert list(broken_links(tmp_path / "guide.md")) == ["#a", "gone.md", "guide.md#gone"]


def test_all_guides_are_looked_at() -> None:
    done = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert sorted(done.stdout.split()) == sorted(GUIDES)


def test_the_readme_is_short_and_has_every_exit_code() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    rows = text.split("| exit code | |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    codes = [int(code) for row in rows for code in row.split("|")[1].split(",")]
    family = [errors.LoratuneError, *errors.LoratuneError.__subclasses__()]
    assert codes == [0, *sorted(member.exit_code for member in family)]


# The commands of developers


def recipe(*targets: str) -> list[str]:
    """The command lines that `make` would run for targets in an environment that is up to date."""
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
    assert recipe("test-all") == [*checks, tests.removesuffix(' -m "not slow"')]


# The package, installed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a clean copy of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "loratune", folder / "source" / "loratune", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), "./source"]
    subprocess.run(command, cwd=folder, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The binaries of an environment that holds the wheel and what it declares, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    options = ("--quiet", "--disable-pip-version-check", "--no-compile")  # most modules are never imported
    install = [folder / "venv" / "bin" / "pip", "install", *options, wheel]
    subprocess.run(install, cwd=folder, check=True)
    yield folder / "venv" / "bin"
    shutil.rmtree(folder)


def source_files() -> set[str]:
    """The files of the package that belong into a wheel: all but its guides."""
    files = (path for path in (ROOT / "loratune").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in files if path.suffix != ".md"}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_licence(wheel: Path) -> None:
    listing = subprocess.run(
        [sys.executable, "-m", "zipfile", "--list", wheel], capture_output=True, text=True, check=True
    )
    names = {line.split()[0] for line in listing.stdout.splitlines()[1:]}
    records = {name for name in names if ".dist-info/" in name}
    assert names - records == source_files()
    assert any(name.endswith("/licenses/LICENSE") for name in records)


@pytest.mark.slow
def test_an_installed_wheel_trains_away_from_the_checkout(
    installed: Path, run_config: Callable[..., Path], tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XDG_", "HF_"))}
    environment["HOME"] = str(tmp_path)

    def run(*command: object) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(installed / "python", "-c", "import loratune; print(loratune.__file__)").startswith(
        str(installed.parent / "lib")
    )
    run(installed / "loratune", "train", run_config(training={"max_steps": 4}))
    record = json.loads((tmp_path / "out" / "loratune.json").read_text(encoding="utf-8"))
    assert len(record["curve"]) >= 4 and (tmp_path / "out" / "adapter_model.safetensors").is_file()
    # The C sources came along: they were compiled here, as this home directory had no library of theirs.
    compiled = list((tmp_path / ".cache" / "loratune").glob("**/*.so"))
    assert bool(compiled) == (shutil.which("cc") is not None)
    assert run(installed / "loratune", "generate", "--adapter", tmp_path / "out", "--max-new-tokens", 2, "1 and 1 make")


def test_the_project_says_its_licence_and_its_markers() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").split()[:4] == ["Apache", "License", "Version", "2.0,"]
    markers = {line.split(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    assert markers == {"slow", "real_model", "distributed"}
