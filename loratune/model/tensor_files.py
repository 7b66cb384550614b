"""The tensors in the safetensors files of a base, as a dense release names them, and read one by one.

Quantized weights are computed by their format when they are read.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors, hf_hub_download
from safetensors import safe_open
from torch import Tensor, nn

from loratune.codes import Code
from loratune.config import ModelSection
from loratune.errors import ModelError, Problem
from loratune.model import checks, upstream
from loratune.model.dequantization import PackedFormat, packed_format
from loratune.model.quantization import check_trainable, method, record_of
from loratune.model.source import local_or_hub, shards, summary

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The dtypes that stored tensors may have."""
_FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}
"""Those that only tensors of quantized weights may have."""
_ACTIVATIONS = re.compile(r"\.((input|activation|output)_((global_)?scale|zero_point)|[qkv]_scale)$")
"""Names of tensors by which servers quantize activations and caches, which training does not."""
_FIX = "get all files of the release, with the config.json that belongs to them"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class NotStreamableError(Exception):
    """The base has to be loaded; the message says why."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: The open file, which is mapped into memory.
        name: Its name there.
        dtype: The name of its dtype in the format.
        shape: Its shape.
    """

    file: Any
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """Its values, which are not to be changed in place."""
        values: Tensor = self.file.get_tensor(self.name)
        return values

    def __getitem__(self, index: Any) -> Tensor:
        """A part of its values; transformers asks for all of them, `[...]`, when it needs them."""
        return self.read()[index]


@dataclass(frozen=True)
class DequantizedTensor(StoredTensor):
    """A weight that the files hold quantized, in several tensors.

    Attributes:
        parts: These tensors by the ends of their names.
        release: How the weight is computed from them.
    """

    parts: Mapping[str, StoredTensor]
    release: PackedFormat

    def read(self) -> Tensor:
        """Its values, computed in float32, one expert after another, and rounded. Raises ModelError: it is damaged."""
        parts = {end: part.read() for end, part in self.parts.items()}
        values = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        try:
            for index, one in enumerate(values) if len(self.shape) > 2 else [(..., values)]:
                one.copy_(self.release.dequantize({end: part[index] for end, part in parts.items()}))
        except (ValueError, RuntimeError, IndexError) as error:
            what = f"{self.name} cannot be dequantized: {summary(error)}"
            raise ModelError(Problem(Code.MODEL_DAMAGED, what, fix=_FIX)) from None
        return values


def tensors(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of safetensors files by their names."""
    found = {}
    for path in paths:
        file: Any = safe_open(path, framework="pt")
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            found[name] = StoredTensor(file, name, part.get_dtype(), tuple(part.get_shape()))
    return found


def dense_dtype(config: Any) -> torch.dtype:
    """The dtype in which a release is dequantized: that of its configuration, else bfloat16."""
    recorded = (config.dtype, config.get_text_config().dtype)
    return next((one for one in recorded if one in (torch.float16, torch.float32)), torch.bfloat16)


def notes(section: ModelSection, config: Any) -> list[str]:
    """A line on a quantized release whose weights are dequantized, by its configuration, and by its files if the base
    is a directory that has them; none for other bases.

    Raises ModelError: as `release_tensors` and `check_trainable`.
    """
    if (record := record_of(config.to_dict())) is None:
        return []
    if packed_format(record, section.name_or_path) is None:
        check_trainable(record, section.name_or_path)
        return []
    if Path(local_or_hub(section.name_or_path)).is_dir():
        with suppress(NotStreamableError):
            release_tensors(section, config)
    again = f", and quantized again to {section.quantization}" if section.quantization != "none" else ""
    dtype = str(dense_dtype(config)).removeprefix("torch.")
    return [f"model: the base is a quantized release ({method(record)}); it is dequantized to {dtype}{again}"]


def release_tensors(section: ModelSection, config: Any) -> dict[str, StoredTensor]:
    """The tensors of a base as a dense release names them. Quantized weights are computed when they are read.

    Args:
        section: The settings of the base.
        config: Its configuration.

    Raises:
        NotStreamableError: The weights are not in safetensors files, or only transformers reads their quantization.
        ModelError: A file is damaged, or cannot be downloaded; as `packed_format`; tensors of quantized weights are
            missing, unknown, of another dtype, or do not fit together; none is quantized.
    """
    record = record_of(config.to_dict())
    release = packed_format(record, section.name_or_path)
    if record is not None and release is None:
        raise NotStreamableError(f"it is quantized ({method(record)})")
    paths = _paths(section, config)
    if problems := list(checks.damaged_weights(section)):
        raise ModelError(problems)
    stored = tensors(paths)
    if release is None:
        return stored
    dense = _dense(stored, release, dense_dtype(config), section.name_or_path)
    if not any(isinstance(tensor, DequantizedTensor) for tensor in dense.values()):
        what = "config.json says that the base is quantized, but all weights in its files are dense"
        fix = "if they are meant to be, remove quantization_config from config.json; else get the files of the release"
        raise ModelError(Problem(Code.MODEL_DAMAGED, what, section.name_or_path, "quantization_config", fix))
    return dense


def _dense(
    stored: Mapping[str, StoredTensor], release: PackedFormat, dtype: torch.dtype, where: str
) -> dict[str, StoredTensor]:
    """The tensors of a dense release. Raises ModelError: see `release_tensors`."""
    kind = next(name for name, known in DTYPES.items() if known is dtype)
    ends = sorted({*release.dtypes, release.weight}, key=len, reverse=True)
    found: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        if not _ACTIVATIONS.search(name):
            end = next((end for end in ends if name.endswith(end)), "")
            found.setdefault(name.removesuffix(end), {})[end] = tensor
    dense: dict[str, StoredTensor] = {}
    wrong, modules = [], set()
    for start, parts in found.items():
        if [*parts] in ([""], [release.weight]):  # it is not quantized
            dense |= {start + end: tensor for end, tensor in parts.items()}
            continue
        modules.add(start.removesuffix(".weight"))
        name = start + release.weight
        try:
            shape = _shape(release, tuple((end, part.dtype, part.shape) for end, part in parts.items()))
            dense[name] = DequantizedTensor(None, name, kind, shape, parts, release)
        except (ValueError, RuntimeError, IndexError) as error:
            wrong.append(f"{name} ({summary(error)})")
    for name, tensor in dense.items():
        module, _, last = name.rpartition(".")
        if tensor.dtype not in DTYPES or tensor.dtype in ("I8", "U8"):
            wrong.append(f"{name} ({tensor.dtype} without scales)")
        elif module in modules and last not in ("weight", "bias"):
            wrong.append(f"{name} (not known)")
    if wrong:
        what = f"{len(wrong)} tensors of quantized weights are damaged or do not fit config.json, among them "
        raise ModelError(Problem(Code.MODEL_DAMAGED, what + ", ".join(wrong[:3]), where, fix=_FIX))
    return dense


@lru_cache(maxsize=256)
def _shape(release: PackedFormat, parts: tuple[tuple[str, str, tuple[int, ...]], ...]) -> tuple[int, ...]:
    """The shape of a weight, computed from parts without values: end of the name, dtype, shape.

    Raises:
        ValueError, RuntimeError, IndexError: A part is missing, or of another dtype, or they do not fit together.
    """
    all_dtypes, ends = DTYPES | _FLOAT8, [end for end, _, _ in parts]
    if lacking := [end for end in release.dtypes if end not in (*ends, *release.optional)]:
        raise ValueError(f"without {' and '.join(end or 'values' for end in lacking)}")
    for end, dtype, _ in parts:
        if dtype not in (known := release.dtypes.get(end, ())):
            raise ValueError(f"{end or 'values'} in {dtype} instead of {' or '.join(known) or 'none'}")
    empty = {end: torch.empty(shape, dtype=all_dtypes[dtype], device="meta") for end, dtype, shape in parts}
    return tuple(release.dequantize(empty).shape)


def _paths(section: ModelSection, config: Any) -> list[Path]:
    """The files that transformers would read: one with all weights, else those of an index."""
    chosen = config.to_dict().get("transformers_weights")
    known = (file(section, name) for name in ([str(chosen)] if chosen else [_SINGLE, _INDEX]))
    if (index := next(filter(None, known), None)) is None:
        raise NotStreamableError("its weights are not in safetensors files")
    if index.suffix == ".safetensors":
        return [index]
    paths = [file(section, name) for name in shards(index)]
    if None in paths or not paths:
        raise NotStreamableError(f"{index} is damaged, or names files that do not exist")
    return [path for path in paths if path is not None]


def file(section: ModelSection, name: str) -> Path | None:
    """A file of a base, downloaded if need be; None if it does not exist. Raises ModelError: see `open_stored`."""
    directory = Path(local_or_hub(section.name_or_path))
    if directory.is_dir():
        return directory / name if (directory / name).is_file() else None
    try:
        return Path(hf_hub_download(section.name_or_path, name, revision=section.revision))
    except Exception as error:  # whatever the network stack raises
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            return None
        what = f"{name} cannot be downloaded: {summary(error)}"
        raise ModelError(Problem(Code.MODEL_HUB_UNREACHABLE, what, section.name_or_path)) from None


# --- Mapped memory


def copy_mapped(model: nn.Module) -> None:
    """Copy weights that are mapped into memory, one after another, unless they are on a file system that is read-only.

    transformers maps weights into memory instead of reading them. While such a mapping is in use, a file that is
    overwritten in place changes the weights, and one that is truncated ends the process with SIGBUS. Files that cannot
    change remain mapped, and processes that map them share their memory. A copy takes a second for some 2 GB.
    """
    ranges = [*_changeable_ranges()]
    for tensor in {id(tensor): tensor for tensor in _weights(model) if tensor.device.type == "cpu"}.values():
        if any(begin <= tensor.data_ptr() < end for begin, end in ranges):
            tensor.data = tensor.data.clone()


def _changeable_ranges() -> Iterator[tuple[int, int]]:
    """The addresses of this process at which there are files that can be changed; all where that is not known."""
    try:
        lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text(errors="replace").splitlines()]
    except OSError:
        yield 0, 1 << 64
        return
    for place, _, _, _, inode, *path in lines:
        if inode != "0" and not _is_read_only(*path):
            begin, end = place.split("-")
            yield int(begin, 16), int(end, 16)


def _is_read_only(path: str) -> bool:
    """Whether a file is on a file system that is mounted read-only."""
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:  # it was removed
        return False


def _weights(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers, and the (nested) scales of weights packed by bitsandbytes."""
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
