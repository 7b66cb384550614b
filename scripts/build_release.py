"""Builds the files of a release from the last commit: an sdist, and from it a wheel with compiled code and a pure one.

    python scripts/build_release.py dist      # what `make release` runs, with the setuptools of scripts/release.txt

The same commit, compiler and setuptools give the same bytes: the commit is checked out into a temporary directory, with
fixed permissions, and its time is the time of all files (SOURCE_DATE_EPOCH). The sizes and SHA-256 are printed.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
COMPILED, PURE, SDIST = "-py3-none-manylinux_2_28_x86_64.whl", "-py3-none-any.whl", ".tar.gz"


NEUTRAL = ("core.autocrlf=false", "core.eol=lf", "core.attributesFile=/dev/null", "core.hooksPath=/dev/null")
"""Settings of git with which the files of a checkout have the bytes of the commit, whatever the user has set."""


def git(*arguments: object) -> str:
    """The output of a git command."""
    settings = [word for setting in NEUTRAL for word in ("-c", setting)]
    command = ["git", "-C", str(ROOT), *settings, *map(str, arguments)]
    variables = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        sys.exit(f"git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def build(hook: str, source: Path, output: Path, **environment: str) -> None:
    """Run a hook of the build backend (PEP 517) in a process of its own."""
    code = f"import build_backend; build_backend.{hook}({str(output)!r})"
    variables = os.environ | {"PYTHONPATH": str(source / "scripts"), "PYTHONHASHSEED": "0"} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{hook} failed:\n{done.stdout}{done.stderr}")


def release(output: Path) -> list[Path]:
    """Build a release. Returns the files. output: a directory with nothing but, perhaps, the files of a release."""
    output.mkdir(parents=True, exist_ok=True)
    former = sorted(output.iterdir())
    for path in former:
        if not (path.is_file() and re.fullmatch(r"loratune-.+(\.whl|\.tar\.gz)", path.name)):
            sys.exit(f"{path} is no file of a release; name another directory")
    for path in former:
        path.unlink()
    os.umask(0o022)
    with TemporaryDirectory() as scratch:
        checkout = Path(scratch, "checkout")
        git("clone", "--quiet", "--template=", "--depth", 1, ROOT.as_uri(), checkout)
        environment = {"SOURCE_DATE_EPOCH": git("log", "-1", "--format=%ct")}
        build("build_sdist", checkout, output, **environment)
        (packed,) = output.glob("*.tar.gz")
        with tarfile.open(packed) as archive:
            archive.extractall(scratch, filter="data")
        source = Path(scratch, packed.name.removesuffix(SDIST))
        build("build_wheel", source, output, **environment)
        build("build_wheel", source, output, LORATUNE_WHEEL="pure", **environment)
    files = sorted(output.iterdir())
    stem = packed.name.removesuffix(SDIST)
    if [path.name for path in files] != sorted(f"{stem}{end}" for end in (COMPILED, PURE, SDIST)):
        names = ", ".join(path.name for path in files)
        sys.exit(f"a release has an sdist and two wheels, but this one has {names}; is there a gcc 11 or newer?")
    return files


def main() -> None:
    """Build a release, and print what was built."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a directory; files of an earlier release in it are replaced")
    output = parser.parse_args().output.absolute()
    if git("status", "--porcelain", "--untracked-files=no"):
        print("note: what is not committed is not part of the release", file=sys.stderr)
    for path in release(output):
        content = path.read_bytes()
        print(f"{hashlib.sha256(content).hexdigest()}  {len(content):>9,}  {path.name}")


if __name__ == "__main__":
    main()
