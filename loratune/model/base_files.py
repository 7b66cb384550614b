"""The files that a base is loaded from: whether they have changed since, and single weights as they were saved.

transformers maps weights into memory instead of reading them. While such a mapping is in use, a file that is
overwritten in place changes the weights, and one that is truncated ends the process with SIGBUS. `copy_mapped` copies
what is mapped; `Files` reports whether the files are still those that were loaded.
"""

import hashlib
import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from loratune.codes import Code
from loratune.config import ModelSection
from loratune.errors import ModelError, Problem
from loratune.model import upstream
from loratune.model.source import local_or_hub

_log = logging.getLogger(__name__)

_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", "config.json")
_BLOCK = 64  # bytes of a block that a sample of a file reads
_STEP = 64 << 10  # bytes between two blocks, at least
_THREADS = 8  # files that are read at the same time
_BLOCKS, _LEAST_BLOCKS = 8192, 256  # of all files together, and of each: a few seconds on a cold network drive


@dataclass(frozen=True)
class _State:
    """A file as it was at one time.

    Attributes:
        stat: Size, times, and place on the disk.
        digest: Of the whole content; None if a different stat counts as a change, or the file changed while it was
            read.
        sample: Digest of a part of the content; None as above.
    """

    stat: tuple[int, ...]
    digest: bytes | None
    sample: str | None


class Files:
    """The weights and the configuration in a model directory, or a single GGUF file, in their present state.

    Whole files are read, so that a file that was only touched differs from one in which a single number has changed: on
    one core some 1.5 GB a second where the processor has instructions for SHA-256, while the files are in the cache of
    the system, which they are after loading. Several files are read at the same time.
    """

    def __init__(self, directory: Path | None, gguf: Path | None = None, *, read: bool = True):
        """Record the state of the files.

        Args:
            directory: The model directory; None if there are no files yet.
            gguf: The GGUF file, if that is the only one.
            read: Record the content of the files as well, not only size and times.
        """
        weights = sorted(path for pattern in _WEIGHTS for path in directory.glob(pattern)) if directory else []
        paths = [gguf] if gguf else weights
        self._blocks = max(_LEAST_BLOCKS, _BLOCKS // max(1, len(paths))) if read else 0
        with ThreadPoolExecutor(max(1, min(_THREADS, len(paths)))) as threads:
            states = threads.map(partial(_state, blocks=self._blocks), paths)
            self._states = {path: state for path, state in zip(paths, states, strict=True) if state is not None}

    def changed(self, *, thoroughly: bool = False) -> list[str]:
        """Paths of the files whose content has changed, or that are gone.

        A file that was only touched, or replaced by a copy of itself, is not among them.

        Args:
            thoroughly: Compare contents also where size, times, and place on the disk are the same.
        """
        return [str(path) for path, state in self._states.items() if self._differs(path, state, thoroughly)]

    def _differs(self, path: Path, state: _State, thoroughly: bool) -> bool:
        stat = _stat(path)
        try:
            if stat == state.stat:
                return thoroughly and state.sample is not None and _sample(path, self._blocks) != state.sample
            if stat is None or state.digest is None or stat[0] != state.stat[0] or _digest(path) != state.digest:
                return True
        except OSError:
            _log.debug("%s counts as changed", path, exc_info=True)
            return True
        self._states[path] = replace(state, stat=stat)  # or it would be read again at each checkpoint
        return False


def _stat(path: Path) -> tuple[int, ...] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev


def _state(path: Path, blocks: int) -> _State | None:
    """The state of a file; None if it does not exist or cannot be read. Without blocks, the content is not read."""
    stat = _stat(path)
    try:
        if stat is None or not blocks:
            return _State(stat, None, None) if stat else None
        digest, sample = _digest(path), _sample(path, blocks)
    except OSError:
        _log.debug("%s counts as absent", path, exc_info=True)
        return None
    return _State(stat, digest if _stat(path) == stat else None, sample)


def _digest(path: Path) -> bytes:
    """SHA-256 of the whole content, computed without the lock of the interpreter."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _sample(path: Path, blocks: int) -> str:
    """SHA-256 of the size of a file, its first 64 KiB, and short blocks spread evenly up to its end."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(f"{size} ".encode() + os.pread(file.fileno(), 1 << 16, 0))
        for offset in (*range(0, size, max(_STEP, size // blocks)), max(0, size - _BLOCK)):
            digest.update(os.pread(file.fileno(), _BLOCK, offset))
    return digest.hexdigest()


def original_weights(section: ModelSection, base: PreTrainedModel) -> Callable[[str], torch.Tensor]:
    """A reader of single weights as they were saved, before quantization.

    Returns:
        A function from the path of a linear layer to its weight, (out, in). It raises ModelError where no safetensors
        file has this weight.
    """
    directory = Path(local_or_hub(section.name_or_path))
    if not directory.is_dir():
        directory = Path(snapshot_download(section.name_or_path, revision=section.revision, local_files_only=True))
    owners: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            owners |= dict.fromkeys(file.keys(), path)
    prefix = f"{base.base_model_prefix}."

    def read(layer: str) -> torch.Tensor:
        for name in (f"{layer}.weight", f"{layer}.weight".removeprefix(prefix)):
            if name in owners:
                with safe_open(owners[name], framework="pt") as file:
                    tensor: torch.Tensor = file.get_tensor(name)
                    return tensor
        what = f"loftq needs {layer}.weight as it was before quantization, and no safetensors file has it"
        key, fix = "lora.init_lora_weights", "use another initialization"
        raise ModelError(Problem(Code.MODEL_ORIGINAL_MISSING, what, section.name_or_path, key, fix))

    return read


def copy_mapped(model: nn.Module) -> None:
    """Copy all weights that are mapped from files into memory of their own; others stay where they are.

    This takes as much memory as the mappings, which the kernel may have counted as cache so far, and a second for some
    2 GB.
    """
    mappings, copied = _mappings(), set()
    for tensor in _tensors(model):
        if tensor.device.type == "cpu" and id(tensor) not in copied and _is_mapped(tensor.data_ptr(), mappings):
            tensor.data = tensor.data.clone()
            copied.add(id(tensor))


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers, and the scales that bitsandbytes keeps beside its packed weights, and their scales."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        for value in vars(tensor).values() if isinstance(tensor, nn.Parameter) else ():
            yield from _scales(value)


def _scales(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif upstream.is_quant_state(value):
        for inner in vars(value).values():
            yield from _scales(inner)


def _mappings() -> tuple[list[int], list[int]] | None:
    """Starts and ends of this process's file mappings, in order; None where the system does not tell."""
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


def _is_mapped(address: int, mappings: tuple[list[int], list[int]] | None) -> bool:
    """Whether an address lies in a file mapping; assumed where that cannot be known."""
    if mappings is None:
        return True
    index = bisect_right(mappings[0], address) - 1
    return index >= 0 and address < mappings[1][index]
