"""The files that a base is loaded from: whether they change meanwhile, and single weights as they were saved.

transformers maps weights into memory instead of reading them. While such a mapping is in use, a file that is
overwritten in place changes the weights, and one that is truncated ends the process with SIGBUS. `copy_mapped` copies
what is mapped, after which changes of the files do not change the model.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
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
from loratune.model.source import cached_directory, local_or_hub

_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", "config.json")


class FileStates:
    """Size, times and place on the disk of the files that a base is loaded from."""

    def __init__(self, section: ModelSection):
        """Record the present state. A base on the hub that is not in the cache has no files yet."""
        directory, gguf = cached_directory(section), section.gguf_file
        if directory is None:
            paths = []
        elif gguf is not None:
            paths = [directory / gguf]
        else:
            paths = sorted(path for pattern in _WEIGHTS for path in directory.glob(pattern))
        self._states = {path: _state(path) for path in paths}

    def check_unchanged(self) -> None:
        """While the files are read. Raises ModelError: a file has changed, or is gone."""
        what, fix = "was changed while it was being read", "start again"
        if changed := self._changed():
            raise ModelError([Problem(Code.MODEL_CHANGED, what, str(path), fix=fix) for path in changed])

    def check_unchanged_in_run(self) -> None:
        """During a run, which computes with a copy of its own. Raises ModelError: a file has changed, or is gone, so
        that the adapter would not fit what is there now."""
        what, fix = "has changed since the run began", "restore it, then continue with --resume, which compares weights"
        if changed := self._changed():
            problem = partial(Problem, Code.MODEL_CHANGED, what, key="model.name_or_path", fix=fix)
            raise ModelError([problem(where=str(path)) for path in changed])

    def _changed(self) -> list[Path]:
        return [path for path, state in self._states.items() if _state(path) != state]


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev


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
        raise ModelError(Problem(Code.MODEL_DAMAGED, what, section.name_or_path, key, fix))

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
