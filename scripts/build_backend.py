"""The build backend of pyproject.toml: setuptools', with the fused operations compiled into a wheel.

On Linux on x86-64 with a gcc, `pip wheel .` makes a wheel with one library for each kind of processor and each dtype
(see `loratune/kernels/compiled/build.py`); elsewhere, and with LORATUNE_WHEEL=pure, it makes one without, and the
operations are compiled where they are used. An editable installation has no libraries either. Wheels and sdists record
the commit. With SOURCE_DATE_EPOCH, the same files and tools give the same bytes (reproducible-builds.org).
"""

import gzip
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import util
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403  the hooks of PEP 517
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info
from setuptools.command.sdist import sdist
from setuptools.errors import OptionError

ROOT = Path(__file__).parents[1]
RECORD = Path("loratune/system/release.json")
"""What `loratune/system/release.py` reads."""
OLDEST_GLIBC = 28
"""The oldest glibc of a wheel is 2.28, which torch's wheels need too."""
SOURCES = ("loratune", "scripts/build_backend.py", "pyproject.toml", "README.md", "LICENSE")
"""What a distribution is made from."""
SPEC = util.spec_from_file_location("loratune_build", ROOT / "loratune" / "kernels" / "compiled" / "build.py")
assert SPEC is not None and SPEC.loader is not None
build = util.module_from_spec(SPEC)
sys.modules[SPEC.name] = build  # for its dataclass
SPEC.loader.exec_module(build)


def without(reason: str) -> dict[str, bytes]:
    """No libraries, for a reason that is printed."""
    print(f"loratune: a wheel without compiled code, as {reason}", file=sys.stderr, flush=True)
    return {}


@cache
def libraries() -> dict[str, bytes]:
    """The content of each library by its file name; empty if this is the wrong machine, or has no gcc for it."""
    if os.environ.get("LORATUNE_WHEEL") == "pure":
        return without("LORATUNE_WHEEL is pure")
    if (sys.platform, platform.machine(), sys.maxsize > 1 << 32) != ("linux", "x86_64", True):
        return without("it is made for Linux on x86-64 only")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "cc"))), None)
    if compiler is None:
        return without("there is no gcc: install one, or set CC to its path")
    try:
        return {
            variant.file_name(define): compiled(compiler, variant, define)
            for variant in build.VARIANTS
            for define in build.DEFINES
        }
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return without(
            f"compiling it failed: {build.reason(error)}; it needs gcc 11 or newer, and the C library's headers"
        )


def compiled(compiler: str, variant: object, define: str) -> bytes:
    """One library, with the digest that `loratune` checks before it loads it."""
    with tempfile.TemporaryDirectory() as scratch:
        build.compile_library(compiler, variant, define, scratch)
        content = Path(scratch, "library.so").read_bytes()
    check_shippable(content)
    sealed: bytes = build.sealed(variant.key(define), content)  # type: ignore[attr-defined]
    return sealed


def check_shippable(library: bytes) -> None:
    """Raises ValueError: a library lacks OpenMP, or wants a runtime of it that torch does not have, as clang's do."""
    if b"GOMP_parallel" not in library or b"__kmpc_" in library:
        raise ValueError("this compiler does not use GNU's OpenMP, which torch has; set CC to a gcc")


def platform_tag(libraries: Mapping[str, bytes], default: str) -> str:
    """The tag of a wheel with these libraries: `manylinux` with the oldest glibc that has all that they need (PEP 600),
    and that is no older than `OLDEST_GLIBC`.

    default: the tag if they need anything else.
    """
    names = {name for library in libraries.values() for name in re.findall(rb"\0(lib[^\0]*\.so[^\0]*)(?=\0)", library)}
    versions = {name for library in libraries.values() for name in re.findall(rb"\0GLIBC_([^\0]*)(?=\0)", library)}
    numbers = [re.fullmatch(rb"2\.(\d+)(?:\.\d+)?", version) for version in versions]
    if not names <= {b"libc.so.6", b"libm.so.6"} or not numbers or None in numbers:
        return default
    newest = max(int(number[1]) for number in numbers if number is not None)
    return f"manylinux_2_{max(newest, OLDEST_GLIBC)}_{platform.machine()}"


def checked_out() -> str:
    """The commit of the checkout, with `-dirty` if it has other files than that; empty if git does not tell."""
    variables = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}
    variables["GIT_CEILING_DIRECTORIES"] = str(ROOT.parent)
    answers = []
    for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--", *SOURCES]):
        command = ["git", "-C", str(ROOT), *words]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, errors="replace", check=False)
        answers.append("" if done.returncode else done.stdout.strip())
    commit, changes = answers
    return commit + "-dirty" * bool(changes) if re.fullmatch("[0-9a-f]{12,40}", commit) else ""


def own_files(names: Iterable[str]) -> list[str]:
    """The names, relative to the checkout. Raises OptionError: one is a link, which may lead out of the checkout."""
    found = [*names]
    for name in found:
        if os.path.realpath(ROOT / name) != os.path.join(os.path.realpath(ROOT), os.path.normpath(name)):
            raise OptionError(f"{name} is a link, or in a linked directory; replace it by what it leads to")
    return found


def epoch() -> int:
    """The time of all files, in seconds. Raises OptionError: SOURCE_DATE_EPOCH is not one that archives can hold."""
    text = os.environ.get("SOURCE_DATE_EPOCH", str(int(time.time())))
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) >= 1 << 32:
        raise OptionError(f"SOURCE_DATE_EPOCH is {text!r}; set it to seconds since 1970, below 2^32, or unset it")
    return int(text)


def write_record(folder: Path, variants: Sequence[object] = ()) -> None:
    """Write the record of the release into a copy of the package. An sdist has it already, with the commit."""
    commit = ""
    if (ROOT / RECORD).is_file():
        commit = json.loads((ROOT / RECORD).read_text(encoding="utf-8"))["commit"]
    elif (ROOT / ".git").exists() and shutil.which("git"):
        commit = checked_out()
    named = {one.name: sorted(one.features) for one in variants}  # type: ignore[attr-defined]
    text = json.dumps({"commit": commit, "variants": named}, indent=1) + "\n"
    (folder / RECORD).write_text(text, encoding="utf-8")


def absolute_links(text: str, repository: str = "") -> str:
    """A page of Markdown in which the links to files of the checkout have the repository's address before them.

    repository: the address of the root of the files, such as `https://github.com/me/loratune/blob/v1.0.0`; without one,
        the texts of these links remain, as links that lead nowhere do not belong on a page.
    """

    def replaced(found: re.Match[str]) -> str:
        if not repository:
            return found[1]
        return f"[{found[1]}]({repository}/{'README.md' if found[2].startswith('#') else ''}{found[2]})"

    return re.sub(r"\[([^]\[]+)\]\((?!\w+:)([^)\s]+)\)", replaced, text)


def address_of_files(urls: Mapping[str, str], version: str) -> str:
    """The address of a release's files, from `project.urls`; empty if it names no repository."""
    named = {re.sub(r"\W|_", "", name).lower(): url for name, url in urls.items()}
    found = next((named[name] for name in ("repository", "source", "sourcecode", "github") if name in named), "")
    return f"{found.removesuffix('/').removesuffix('.git')}/blob/v{version}" if found else ""


class EggInfo(egg_info):
    """Writes the metadata of wheels and sdists, whose description is README.md with links that work elsewhere."""

    def run(self) -> None:
        """Change the description, then write the metadata."""
        about = self.distribution.metadata
        address = address_of_files(about.project_urls or {}, about.get_version())
        about.long_description = absolute_links(about.get_long_description(), address)
        super().run()


class BuildPy(build_py):
    """Adds the libraries and the record of the release to the modules of a wheel, and this file to those of an
    sdist."""

    def run(self) -> None:
        """Copy modules; for a wheel, compile and write the libraries too."""
        epoch()
        if not self.editable_mode:
            data = [os.path.join(folder, name) for _, folder, _, names in self.data_files for name in names]
            own_files([*super().get_source_files(), *data])
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib, build.SHIPPED.relative_to(ROOT))
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier build in the same place
        made = libraries() if "bdist_wheel" in self.distribution.commands else {}
        for name, content in made.items():
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        write_record(Path(self.build_lib), build.VARIANTS if made else ())

    def get_source_files(self) -> list[str]:
        """The files of an sdist."""
        return [*super().get_source_files(), str(Path(__file__).relative_to(ROOT))]


class Wheel(bdist_wheel):
    """A wheel for any Python; with libraries, for one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tag of the wheel: Python, ABI and platform."""
        if not Path(self.bdist_dir, build.SHIPPED.relative_to(ROOT)).is_dir():
            tag: tuple[str, str, str] = super().get_tag()
            return tag
        default = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        return "py3", "none", self.plat_name if self.plat_name_supplied else platform_tag(libraries(), default)


class Sdist(sdist):
    """An sdist with the record of the release, without tests, and with the same bytes for the same files."""

    def make_distribution(self) -> None:
        """Write the sdist. Nothing else is left behind, also if that fails."""
        epoch()
        try:
            super().make_distribution()
        finally:
            shutil.rmtree(self.distribution.get_fullname(), ignore_errors=True)

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copy the files into a directory; setuptools adds the tests, but none of the files that they need."""
        super().make_release_tree(base_dir, own_files(name for name in files if not name.startswith("tests")))
        write_record(Path(base_dir))

    def make_archive(self, base_name: str, *arguments: object, **keywords: object) -> str:
        """Pack the directory of this name, sorted, without owners, and with the time of SOURCE_DATE_EPOCH."""
        seconds = epoch()

        def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = seconds
            return entry

        path = Path(f"{base_name}.tar.gz")
        with (
            path.open("wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=seconds) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.add(path.name.removesuffix(".tar.gz"), filter=plain)
        return str(path)
