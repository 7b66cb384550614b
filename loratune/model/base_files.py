"""The files that a base was loaded from, and the memory that it lies in.

transformers maps weights into memory instead of reading them: while such a mapping is in use, a file that is
overwritten in place changes the weights, and one that is truncated ends the process with SIGBUS. So what is mapped is
copied, and whoever needs to know whether the files are still what was loaded asks `Files`.
"""

import hashlib
import logging
import os
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

_log = logging.getLogger(__name__)

_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", "config.json")
_BLOCK = 64  # bytes that are read at each place of a sample
_STEP = 64 << 10  # bytes between two places, at least
_THREADS = 8  # files that are read at the same time
_PLACES, _LEAST_PLACES = 8192, 256  # in all files together, and in each: fresh from a network drive, a few seconds


@dataclass(frozen=True)
class _Mark:
    """What a file is known by.

    stat: size, times, and place on the disk; digest: of its whole content, None if any other stat counts as a change or
    if the file changed while it was read; sample: of a part of its content, likewise.
    """

    stat: tuple[int, ...]
    digest: bytes | None
    sample: str | None


class Files:
    """The weights and the configuration in a model directory, or a single GGUF file, as they are now.

    Files are read in whole, so that one that was only touched can be told from one in which a single number is another:
    on one core some 1.5 GB a second where the processor has instructions for SHA-256, as long as they are in the cache
    of the system, which is so after they were loaded. Several files are read at the same time.
    """

    def __init__(self, directory: Path | None, gguf: Path | None = None, *, read: bool = True):
        """Remember the files. directory: None if there are none yet; read: know them by their content, too."""
        found = sorted(path for pattern in _WEIGHTS for path in directory.glob(pattern)) if directory else []
        listed = [gguf] if gguf else found
        self._places = max(_LEAST_PLACES, _PLACES // max(1, len(listed))) if read else 0
        with ThreadPoolExecutor(max(1, min(_THREADS, len(listed)))) as threads:
            marks = threads.map(partial(_mark, places=self._places), listed)
            self._marks = {path: mark for path, mark in zip(listed, marks, strict=True) if mark is not None}

    def changed(self, *, thoroughly: bool = False) -> list[str]:
        """Paths of files whose content is another by now, or that have gone.

        A file that was only touched, or replaced by a copy of itself, is not among them.

        thoroughly: compare contents also where size, time, and place on the disk are the same.
        """
        return [str(path) for path, mark in self._marks.items() if self._differs(path, mark, thoroughly)]

    def _differs(self, path: Path, mark: _Mark, thoroughly: bool) -> bool:
        stat = _stat(path)
        try:
            if stat == mark.stat:
                return thoroughly and mark.sample is not None and _sample(path, self._places) != mark.sample
            if stat is None or mark.digest is None or stat[0] != mark.stat[0] or _digest(path) != mark.digest:
                return True
        except OSError:
            _log.debug("%s counts as changed", path, exc_info=True)
            return True
        self._marks[path] = replace(mark, stat=stat)  # or it would be read again at each checkpoint
        return False


def _stat(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev


def _mark(path: Path, places: int) -> _Mark | None:
    """places: of the sample; 0: the content is not read. None: the file is not there, or cannot be read."""
    stat = _stat(path)
    try:
        if stat is None or not places:
            return _Mark(stat, None, None) if stat else None
        digest, sample = _digest(path), _sample(path, places)
    except OSError:
        _log.debug("%s counts as absent", path, exc_info=True)
        return None
    return _Mark(stat, digest if _stat(path) == stat else None, sample)


def _digest(path: Path) -> bytes:
    """SHA-256 of the whole content. The lock of the interpreter is free meanwhile."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _sample(path: Path, places: int) -> str:
    """SHA-256 of the size of a file, its first 64 KiB, and short blocks spread evenly up to its end."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(f"{size} ".encode() + os.pread(file.fileno(), 1 << 16, 0))
        for place in (*range(0, size, max(_STEP, size // places)), max(0, size - _BLOCK)):
            digest.update(os.pread(file.fileno(), _BLOCK, place))
    return digest.hexdigest()


def copy_mapped(model: nn.Module) -> None:
    """Give a model memory of its own for all weights that are mapped from files; others stay where they are.

    Takes as much memory as what is mapped, which the kernel may have counted as cache so far, and a second for some
    2 GB.
    """
    mapped, copied = _mappings(), set()
    for tensor in _tensors(model):
        if tensor.device.type == "cpu" and id(tensor) not in copied and _lies_in(tensor.data_ptr(), mapped):
            tensor.data = tensor.data.clone()
            copied.add(id(tensor))


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers, and what bitsandbytes keeps beside its packed weights: scales, and the scales of these."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        for held in vars(tensor).values() if isinstance(tensor, nn.Parameter) else ():
            yield from _held(held)


def _held(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif type(value).__name__ == "QuantState":
        for one in vars(value).values():
            yield from _held(one)


def _mappings() -> tuple[list[int], list[int]] | None:
    """Where the mappings of files begin and end in this process, in order; None where the system does not say."""
    table = Path("/proc/self/maps")
    if not table.is_file():
        return None
    spans = []
    for line in table.read_text(encoding="utf-8", errors="replace").splitlines():
        span, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            start, _, end = span.partition("-")
            spans.append((int(start, 16), int(end, 16)))
    return [start for start, _ in spans], [end for _, end in spans]


def _lies_in(address: int, mapped: tuple[list[int], list[int]] | None) -> bool:
    """Whether an address is one of a file; taken to be so where that cannot be known."""
    if mapped is None:
        return True
    place = bisect_right(mapped[0], address) - 1
    return place >= 0 and address < mapped[1][place]
