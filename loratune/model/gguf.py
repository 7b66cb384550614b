"""Checks of a GGUF file on the disk: whether it is one, and whether it is complete. Needs no torch, reads no weights.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path, PurePath
from typing import Any

from loratune.codes import Code
from loratune.errors import ModelError, Problem, missing_package

KEY = "model.gguf_file"
LFS_START = b"version https://git-lfs"
"""How a file begins that Git LFS left as a pointer to the real one."""

# Value types of metadata → their code in struct. 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_checked: set[tuple[int, ...]] = set()
"""Device, inode, size and time of change of the files that this process has found to be whole."""


def check_name(gguf_file: str) -> None:
    """Check that the file is within its directory.

    Raises:
        ModelError: An absolute path, or one that leads out of the directory.
    """
    if PurePath(gguf_file).is_absolute() or ".." in PurePath(gguf_file).parts:
        fix = "name the directory in model.name_or_path, and only the file here"
        raise ModelError(Problem(Code.MODEL_NOT_FOUND, "leads out of the model directory", gguf_file, KEY, fix))


def check(path: Path) -> None:
    """Check that transformers will be able to read this file, which is read once as long as it does not change.

    Raises:
        ModelError: The file does not exist, is a Git LFS pointer, is not GGUF or of a version that transformers does
            not read, is one part of several, or is cut off; the package gguf is missing.
    """
    where = str(path)
    if not path.is_file():
        files = sorted(file.name for file in path.parent.glob("*.gguf"))
        fix = f"there is {', '.join(files[:3])}" if files else "no GGUF file is in that directory"
        raise ModelError(Problem(Code.MODEL_NOT_FOUND, "no such file", where, KEY, fix))
    if find_spec("gguf") is None:
        code = Code.SYSTEM_MISSING_PACKAGE
        raise ModelError(missing_package(code, "gguf", "reads GGUF files", "gguf", where, KEY))
    now = path.stat()
    version = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns)
    if version not in _checked:
        _check_content(path)
        _checked.add(version)


def _check_content(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(len(LFS_START))
        if start == LFS_START:
            raise ModelError(lfs_pointer(path))
        if start[:4] != b"GGUF":
            raise _damaged(path, "not a GGUF file", "")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check_complete(_Reader(data), path)


def lfs_pointer(path: Path) -> Problem:
    """The problem of a file of weights that is only a pointer of Git LFS."""
    what, fix = "a Git LFS pointer, not the weights", "fetch them with `git lfs pull`"
    return Problem(Code.MODEL_DAMAGED, what, str(path), fix=fix)


class _Reader:
    """Reads values one after another. Raises struct.error at the end of the file."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 4

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self.data, self.at)
        self.skip(struct.calcsize(f"<{form}"))
        return values

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise struct.error("past the end")

    def text(self) -> bytes:
        (length,) = self.take("Q")
        start = self.at
        self.skip(length)
        return self.data[start : self.at]

    def value(self, kind: int) -> Any:
        """A value of metadata; None for an array, which is skipped."""
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"metadata of the unknown type {kind}")
        inner, length = self.take("IQ")
        if inner in _SCALARS:
            self.skip(length * struct.calcsize(f"<{_SCALARS[inner]}"))
        else:
            for _ in range(length):
                self.value(inner)
        return None


def _check_complete(reader: _Reader, path: Path) -> None:
    """Read the metadata and the table of tensors, and check that the last tensor ends within the file."""
    try:
        version, tensors, entries = reader.take("IQQ")
        if version not in (2, 3):
            raise _damaged(path, f"GGUF version {version}; only versions 2 and 3 can be read", "")
        metadata = {}
        for _ in range(entries):
            key = reader.text()
            metadata[key] = reader.value(*reader.take("I"))
        end = _end_of_tensors(reader, tensors, int(metadata.get(b"general.alignment") or 32))
    except struct.error:
        raise _damaged(path, "cut off within its header") from None
    except (ValueError, OverflowError) as error:
        raise _damaged(path, f"damaged: {error}") from None
    if (parts := metadata.get(b"split.count") or 1) > 1:
        what = f"one of {parts} parts, which transformers does not join"
        raise _damaged(path, what, "join them: llama-gguf-split --merge")
    if end > (size := path.stat().st_size):
        raise _damaged(path, f"cut off: it has {size:,} bytes of at least {end:,}")


def _damaged(path: Path, what: str, fix: str = "download it again") -> ModelError:
    return ModelError(Problem(Code.MODEL_DAMAGED, what, str(path), KEY, fix))


def _end_of_tensors(reader: _Reader, tensors: int, alignment: int) -> int:
    """How many bytes the file needs for all of its tensors; a tensor of an unknown type counts as empty. The package
    gguf says how many numbers and how many bytes a block of each type has."""
    end, sizes = 0, import_module("gguf").GGML_QUANT_SIZES
    for _ in range(tensors):
        reader.text()
        (rank,) = reader.take("I")
        shape = reader.take(f"{rank}Q")
        kind, offset = reader.take("IQ")
        numbers, width = sizes.get(kind, (1, 0))
        end = max(end, offset + prod(shape) // numbers * width)
    return -(-reader.at // alignment) * alignment + end
