"""Merges an adapter into its base: W' = round(W + ΔW), computed in float32 and rounded once.

The weights of the base are read, changed and written tensor by tensor, so the base need not fit in memory. A base whose
tensors are only known after loading, such as one that bitsandbytes has quantized, is loaded into memory.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from loratune import memory
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.errors import AdapterError, Problem
from loratune.events import reading
from loratune.lora import merging, tensors
from loratune.model import fingerprints, load, stored, tensor_files
from loratune.model.quantization import dense_config, held_as, method, record_of
from loratune.model.stored import StoredBase
from loratune.model.tensor_files import DTYPES, NotStreamableError, dense_dtype
from loratune.model.upstream import CheckpointLayout, quiet_transformers
from loratune.text import format_size

_DEQUANTIZED = "the base is merged in its dequantized form, as {}, and not quantized again: {}"
MOST_BYTES = 2_000_000_000
"""The maximum size of one file in bytes. Its tensors are in memory until it is written."""
_BLOCK_VALUES = 4 << 20
"""Values that are changed at once: 16 MiB in float32, and a few copies of them."""


@dataclass
class Kept:
    """How much of the change of one parameter remains after rounding.

    Attributes:
        name: The name of the parameter.
        dtype: The dtype in which it is stored.
        update: ‖ΔW‖².
        overlap: ⟨W' - W, ΔW⟩.
        error: ‖W' - W - ΔW‖².
        moved: ‖W' - W‖².
    """

    name: str
    dtype: str
    update: float = 0.0
    overlap: float = 0.0
    error: float = 0.0
    moved: float = 0.0

    @property
    def share(self) -> float:
        """⟨W' - W, ΔW⟩ / ‖ΔW‖²; 1 without a change."""
        return self.overlap / self.update if self.update else 1.0

    def add(self, base: Tensor, target: Tensor, rounded: Tensor) -> None:
        """Add values: of the base, of base plus adapter in float32, and of the latter after rounding."""
        wanted, got = target - base, rounded.float() - base
        self.update += float((wanted * wanted).sum(dtype=torch.float64))
        self.overlap += float((got * wanted).sum(dtype=torch.float64))
        self.error += float((got - wanted).square().sum(dtype=torch.float64))
        self.moved += float((got * got).sum(dtype=torch.float64))


@dataclass(frozen=True)
class Written:
    """The result of writing a merged model.

    Attributes:
        kept: The rounding statistics of each parameter that the adapter changes.
        tensors: The number of tensors.
        size: The size of the tensors in bytes.
        files: The number of files.
        untied: Whether embeddings that are tied in the base had to be stored separately.
        dtypes: The dtypes of all floating-point tensors.
    """

    kept: tuple[Kept, ...]
    tensors: int
    size: int
    files: int
    untied: bool
    dtypes: tuple[str, ...]


class Merge:
    """A merge of one adapter into its base.

    Attributes:
        config: The configuration of the base, without a record of quantization.
        parameters: The number of parameters of the base.
        dtype: The dtype of all floating-point tensors of the merged model; None: each keeps its dtype in the base.
        note: Why and how the base was loaded; empty if it is read from its files.
        is_whole: Whether base and merged model are in memory at once as it is written.
        untied: Whether embeddings that are tied in the base are stored separately, as the adapter changes them
            differently.
    """

    def __init__(self, source: AdapterDirectory, dtype: torch.dtype | None = None):
        """Determine what the adapter changes. The base is loaded only if its tensors cannot be read from its files.

        Args:
            source: The adapter.
            dtype: The dtype of the merged model; None keeps the dtype of each tensor of the base. If the base is
                loaded, None means the dtype in its configuration, otherwise the dtype in which it was loaded.

        Raises:
            ModelError: The base is damaged, cannot be downloaded or loaded.
            AdapterError: See `lora.merging.changes` and `tensors.check_copies`; the base has to be loaded and does not
                fit in memory.
        """
        self._source, self.dtype, self.note, self.is_whole = source, dtype, "", False
        config = load.load_config(source.base)
        self.config = dense_config(config)
        self._base = load.build_meta(self.config)
        ties = stored.tied_names(self._base)
        self.parameters = sum(parameter.numel() for parameter in self._base.parameters())
        self._changes = merging.changes(load.build_meta(self.config), source.files)
        self._stored: StoredBase | None = None
        try:
            self._stored = stored.open_stored(source.base, config, self._base)
        except NotStreamableError as reason:
            self._base = self._load(config, str(reason))
        if self._stored and (record := record_of(config.to_dict())):
            self.note = _DEQUANTIZED.format(name_of(self.dtype or dense_dtype(config)), method(record))
        self._read = self._stored.reader() if self._stored else None
        tensors.check_copies(source.files, self._base, self._read)
        self.untied = any(map(self._differ, ties))

    @property
    def is_loaded(self) -> bool:
        """Whether the base is in memory."""
        return self._stored is None

    @property
    def size(self) -> int:
        """The approximate number of bytes that will be written."""
        if self._stored is None:
            return int(self.parameters * (self.dtype or torch.float32).itemsize)
        shapes = ((tensor.shape, self._dtype_of(DTYPES[tensor.dtype])) for tensor in self._stored.tensors.values())
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes)

    def fingerprint(self) -> str:
        """The fingerprint of the base. All of its files are read."""
        if (read := self._read) is None:
            return fingerprints.fingerprint(self._base)
        dtype = load.compute_dtype(self._source.base)

        def loaded(name: str) -> Tensor:
            tensor = read(name)
            return tensor.to(dtype) if tensor.is_floating_point() else tensor  # as loading rounds it

        return fingerprints.fingerprint(self._base, loaded)

    def write(self, staging: Path, most: int = MOST_BYTES) -> Written:
        """Write the tensors, and read them back.

        Args:
            staging: The directory of the new model.
            most: The maximum size of the tensors of one file in bytes.

        Raises:
            AdapterError: A value is not finite in its stored dtype; a file differs from what was written.
            OSError, SafetensorError: The disk is full.
        """
        kept: list[Kept] = []
        if self._stored is not None:
            with reading("merging", self.size) as advance:
                _write_files(staging, self._merged(self._stored, kept), most, advance)
        else:
            self._save_loaded(staging, kept, most)
        paths, count, size, dtypes = sorted(staging.glob("*.safetensors")), 0, 0, set[str]()
        for tensor in tensor_files.tensors(paths).values():
            dtype = DTYPES[tensor.dtype]
            count, size = count + 1, size + torch.Size(tensor.shape).numel() * dtype.itemsize
            dtypes |= {name_of(dtype)} if dtype.is_floating_point else set()
        return Written(tuple(kept), count, size, len(paths), self.untied, tuple(sorted(dtypes)))

    def _load(self, config: Any, reason: str) -> PreTrainedModel:
        """Load the base, if base and merged model fit in memory."""
        section, computed = self._source.base, load.compute_dtype(self._source.base)
        held = {"8bit": 1.0, "4bit": 0.6}.get(held_as(section, config), computed.itemsize)
        self.is_whole = not CheckpointLayout(self._base).only_renames
        merged = self.parameters * computed.itemsize
        merged = merged if self.is_whole else min(merged, 2 * MOST_BYTES)
        needed, free = int(self.parameters * held) + merged, memory.available(torch.device("cpu"))
        if needed > free:
            what = f"cannot be merged here: the base has to be loaded ({reason}), which takes about "
            what += f"{format_size(needed)} of memory, and {format_size(free)} are free"
            raise AdapterError(
                Problem(Code.SYSTEM_OUT_OF_MEMORY, what, str(self._source.path), fix="use a larger machine")
            )
        if self.dtype is None:
            is_recorded = isinstance(config.dtype, torch.dtype) and not section.gguf_file
            self.dtype = config.dtype if is_recorded else computed
        is_quantized = section.gguf_file or section.quantization != "none" or record_of(config.to_dict())
        self.note = f"the base was loaded: {reason}"
        if is_quantized:
            name = name_of(self._dtype_of(computed))
            self.note = _DEQUANTIZED.format(name, reason)
        self.config.architectures = [type(self._base).__name__]
        return load.load_base(section)

    def _differ(self, names: Iterable[str]) -> bool:
        """Whether the adapter changes tied parameters differently."""
        first, *others = [[change.key for change in self._changes.get(name, ())] for name in names]
        return any(other != first for other in others)

    def _dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which values of the base are stored in the merged model."""
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype

    def _merged(self, base: StoredBase, kept: list[Kept]) -> Iterator[tuple[str, Tensor]]:
        """The names and values of all tensors of the merged model, read from the files of the base."""
        names = {name for group in base.groups.values() for name in group.parts}
        for group in {id(group): group for group in base.groups.values()}.values():
            if not group.is_converted or not any(name in self._changes for name in group.members):
                for name, (_, tensor) in group.parts.items():
                    yield name, self._rounded("" if group.is_converted else group.first, tensor.read(), kept)
                continue
            members = base.members(group)
            if not base.is_reversible(group, members):
                what = f"cannot be merged: transformers stores {group.first} in another way than it loads it"
                raise AdapterError(Problem(Code.ADAPTER_UNSUPPORTED, what, str(self._source.path)))
            for name in group.members:
                members[name] = self._rounded(name, members[name], kept)
            yield from base.layout.revert(members).items()
        for name in (name for name in base.tensors if name not in names):
            yield name, self._rounded("", base.tensors[name].read(), kept)
        for first, *others in filter(self._differ, base.ties):
            for name in (name for name in others if name not in base.groups):
                (renamed,) = base.layout.revert({name: torch.empty(0, device="meta")})
                yield renamed, self._rounded(name, base.members(base.groups[first])[first], kept)

    @quiet_transformers()
    def _save_loaded(self, staging: Path, kept: list[Kept], most: int) -> None:
        """Merge a base that is in memory, and save the result, tensor by tensor if transformers only renames them."""
        if self.untied:
            self.config.tie_word_embeddings = False
        model = load.build_meta(self.config)
        if (layout := CheckpointLayout(model)).only_renames:
            tied = {name for names in stored.tied_names(model) for name in names[1:]}
            names = [name for name in model.state_dict() if name not in tied]
            values = (layout.saved({one: self._rounded(one, merging.dense(self._base, one), kept)}) for one in names)
            with reading("merging", self.size) as advance:
                _write_files(staging, (pair for made in values for pair in made.items()), most, advance)
            return
        whole = {name: self._rounded(name, merging.dense(self._base, name), kept) for name in dict(model.state_dict())}
        model.load_state_dict(whole, assign=True)
        model.tie_weights()
        model.save_pretrained(staging, max_shard_size=most)

    def _rounded(self, name: str, weight: Tensor, kept: list[Kept]) -> Tensor:
        """A copy of the values of a parameter, as they are stored.

        Args:
            name: The name of the parameter; empty if nothing changes it.
            weight: The values of the base.
            kept: Receives the rounding statistics of changed parameters.

        Raises:
            AdapterError: The values are not finite.
        """
        dtype, changes = self._dtype_of(weight.dtype), self._changes.get(name, ())
        if not changes:
            return weight.to(dtype, copy=True).contiguous()
        one, blocks, start = Kept(name, name_of(dtype)), [], 0
        count = len(weight) if weight.dim() else 1
        rows = max(1, _BLOCK_VALUES * count // max(1, weight.numel()))
        rows = max(1, count) if any(change.is_whole for change in changes) else rows
        for block in torch.split(weight, rows) if weight.dim() else (weight,):
            base = target = block.float()
            for change in changes:
                target = change.apply(target, start)
            blocks.append(target.to(dtype))
            one.add(base, target, blocks[-1])
            start += rows
        rounded = torch.cat(blocks) if weight.dim() else blocks[0]
        if not rounded.isfinite().all():
            what, fix = f"{name} is not finite as {name_of(dtype)}", "use `dtype='float32'`"
            raise AdapterError(Problem(Code.EXPORT_DIFFERS, what, str(self._source.path), fix=fix))
        kept.append(one)
        return rounded.contiguous()


def _write_files(staging: Path, merged: Iterable[tuple[str, Tensor]], most: int, advance: Any) -> None:
    """Write tensors to files of at most `most` bytes, and an index if there are several.

    Raises:
        AdapterError: A file differs from what was written.
    """
    files: list[list[str]] = []
    part: dict[str, Tensor] = {}

    def flush() -> None:
        path = staging / f"model-{len(files) + 1:05}.safetensors"
        save_file(part, path, {"format": "pt"})
        with safe_open(path, framework="pt") as file:
            for name, tensor in part.items():
                if not torch.equal(file.get_tensor(name).view(-1), tensor.view(-1)):
                    what = f"{name} in the file is not what base and adapter give"
                    raise AdapterError(Problem(Code.SYSTEM_CALL_FAILED, what, str(staging)))
        files.append([*part])
        part.clear()

    for name, tensor in merged:
        if part and sum(other.nbytes for other in part.values()) + tensor.nbytes > most:
            flush()
        part[name] = tensor
        advance(tensor.nbytes)
    flush()
    names: dict[str, str] = {}
    for number, held in enumerate(files, start=1):
        suffix = f"-{number:05}-of-{len(files):05}" if len(files) > 1 else ""
        (staging / f"model-{number:05}.safetensors").rename(staging / f"model{suffix}.safetensors")
        names |= dict.fromkeys(held, f"model{suffix}.safetensors")
    if len(files) > 1:
        total = sum(path.stat().st_size for path in staging.glob("model-*.safetensors"))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        (staging / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype, such as bfloat16."""
    return str(dtype).removeprefix("torch.")
