"""The safetensors format, byte by byte: tensors are read and written in blocks, whatever their size.

A file is the length of its header in 8 bytes, the header in JSON, and the tensors one after another
(https://github.com/huggingface/safetensors#format). The library of that name maps a file into memory as it reads it,
and writes a file only from tensors that are all in memory.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WIDTHS = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
"""Bytes of a value, by the name of its dtype."""
BLOCK = 16 << 20
"""Bytes that are read at once."""
Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensors by name, with dtype and shape."""


def size_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * WIDTHS[dtype]


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
        path: The file.
        dtype: The name of its dtype in the format.
        shape: Its shape.
        start: Where it begins in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return size_of(self.dtype, self.shape)

    def read(self, offset: int, count: int) -> bytearray:
        """Some of its bytes. Raises OSError: the file cannot be read, or has become shorter."""
        data = bytearray(count)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start + offset)
            view, done = memoryview(data), 0
            while done < count and (got := file.readinto(view[done:])):
                done += got
        if done < count:
            raise OSError(f"{self.path} was cut off while it was read")
        return data

    def digest(self) -> str:
        """SHA-256 of its bytes."""
        digest = hashlib.sha256()
        for offset in range(0, self.size, BLOCK):
            digest.update(self.read(offset, min(BLOCK, self.size - offset)))
        return digest.hexdigest()


def tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that the library has found to be whole. Raises KeyError: a dtype is unknown."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for entry in header.values():
        WIDTHS[entry["dtype"]]
    return {
        name: Tensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


class Shards:
    """The weight files of a new model. A context manager: inside, the files are open.

    The tensors are known beforehand. They are written in any order, each from its first byte to its last.

    Attributes:
        tensors: Where each tensor goes.
        paths: The files.
    """

    def __init__(self, directory: Path, layout: Layout, most: int):
        """Decide which tensor goes where. Nothing is written.

        Args:
            directory: Where the files go.
            layout: The tensors with their dtypes and shapes.
            most: Bytes of the tensors of one file; a larger tensor has a file of its own.
        """
        files: list[list[str]] = [[]]
        used = 0
        for name, (dtype, shape) in layout.items():
            size = size_of(dtype, shape)
            if files[-1] and used + size > most:
                files.append([])
                used = 0
            files[-1].append(name)
            used += size
        self.tensors: dict[str, Tensor] = {}
        self._headers: dict[Path, bytes] = {}
        self._handles: dict[Path, int] = {}
        for number, names in enumerate(files, start=1):
            suffix = f"-{number:05}-of-{len(files):05}" if len(files) > 1 else ""
            self._place(directory / f"model{suffix}.safetensors", names, layout)
        self.paths = list(self._headers)
        self._written = dict.fromkeys(self.tensors, 0)
        self._digests = {name: hashlib.sha256() for name in self.tensors}

    def _place(self, path: Path, names: Sequence[str], layout: Layout) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(names, key=lambda name: -WIDTHS[layout[name][0]]):  # so that each begins at its alignment
            dtype, shape = layout[name]
            begin, end = end, end + size_of(dtype, shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._headers[path] = struct.pack("<Q", len(text)) + text
        for name in names:
            self.tensors[name] = Tensor(path, *layout[name], 8 + len(text) + header[name]["data_offsets"][0])

    def __enter__(self) -> "Shards":
        """Create the files, with their headers. Raises OSError."""
        for path, header in self._headers.items():
            self._handles[path] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            _write(self._handles[path], header, 0)
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        for handle in self._handles.values():
            os.close(handle)

    def write(self, name: str, data: Any) -> None:
        """Append bytes to a tensor. Raises OSError."""
        tensor, view = self.tensors[name], memoryview(data).cast("B")
        _write(self._handles[tensor.path], view, tensor.start + self._written[name])
        self._written[name] += len(view)
        self._digests[name].update(view)

    def is_intact(self, name: str) -> bool:
        """Whether the file holds the bytes that were written for a tensor."""
        return self.tensors[name].digest() == self._digests[name].hexdigest()

    def write_index(self) -> None:
        """Write the index that tells in which file each tensor is, if there are several files."""
        if len(self.paths) == 1:
            return
        names = {name: tensor.path.name for name, tensor in sorted(self.tensors.items())}
        size = sum(tensor.size for tensor in self.tensors.values())
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": names}, indent=2) + "\n"
        (self.paths[0].parent / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _write(handle: int, data: Any, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view, offset)
        view, offset = view[done:], offset + done
