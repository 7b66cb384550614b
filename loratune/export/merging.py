"""A base and an adapter merged into one model: W' = round(W + ΔW), computed in float32, rounded once.

The weights of the base are read, changed and written block by block, so that the size of the base does not matter. A
base whose tensors are only known once it is loaded, such as a quantized one, is held in memory meanwhile.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loratune import memory
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.errors import AdapterError, Problem
from loratune.events import reading
from loratune.lora import merging, tensors
from loratune.lora.merging import Change
from loratune.model import fingerprints, load, quantization, stored
from loratune.model.stored import DTYPES, NAMES, NotStreamableError, StoredBase, StoredGroup
from loratune.model.upstream import CheckpointLayout
from loratune.system import tensor_files
from loratune.system.tensor_files import Shards
from loratune.text import format_size

MOST_BYTES = 5_000_000_000
"""Bytes of the tensors of one file, as transformers' `save_pretrained` splits them."""
_BLOCK_VALUES = 4 << 20
"""Values that are changed at once: 16 MiB in float32, of which a few copies are held."""


@dataclass
class Kept:
    """How much of the change of one parameter is left after rounding.

    Attributes:
        name: The parameter.
        dtype: In which it is stored.
        update: ‖ΔW‖².
        overlap: ⟨W' - W, ΔW⟩.
        error: ‖W' - W - ΔW‖².
        moved: ‖W' - W‖².
    """

    name: str
    dtype: str = ""
    update: float = 0.0
    overlap: float = 0.0
    error: float = 0.0
    moved: float = 0.0

    @property
    def share(self) -> float:
        """⟨W' - W, ΔW⟩ / ‖ΔW‖²; 1 without a change."""
        return self.overlap / self.update if self.update else 1.0

    def add(self, base: Tensor, target: Tensor, rounded: Tensor) -> None:
        """Count values: those of the base, those of base and adapter, and the latter as they are stored."""
        self.dtype = name_of(rounded.dtype)
        wanted, got = target - base, rounded.float() - base
        self.update += float((wanted * wanted).sum(dtype=torch.float64))
        self.overlap += float((got * wanted).sum(dtype=torch.float64))
        self.error += float((got - wanted).square().sum(dtype=torch.float64))
        self.moved += float((got * got).sum(dtype=torch.float64))


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        kept: Of each parameter that the adapter changes.
        tensors: How many tensors.
        size: Bytes of the tensors.
        files: How many files they are in.
        untied: Whether embeddings that the base ties had to be stored apart.
        dtypes: The dtypes of all floating-point tensors.
    """

    kept: tuple[Kept, ...]
    tensors: int
    size: int
    files: int
    untied: bool
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class LoadedBase(StoredBase):
    """A base in memory, with the layout in which transformers would save it.

    Attributes:
        loaded: The model. `model` is the same on the meta device, and dense.
    """

    loaded: PreTrainedModel

    def blocks(self, name: str, rows: int) -> Iterator[Tensor]:
        """See `StoredBase`. The tensor is one that is saved as the model has it."""
        member = next(group.first for group in self.groups.values() if name in group.parts)
        values = merging.dense(self.loaded, member)
        yield from torch.split(values, rows) if values.dim() else (values,)

    def members(self, group: StoredGroup) -> dict[str, Tensor]:
        """See `StoredBase`."""
        return {name: merging.dense(self.loaded, name) for name in group.members}

    def is_reversible(self, group: StoredGroup, members: Mapping[str, Tensor]) -> bool:
        """See `StoredBase`. There are no files that could differ."""
        return True

    def reader(self) -> Callable[[str], Tensor] | None:
        """See `StoredBase`. None is needed for a model in memory."""
        return None


class Merge:
    """A merge of one adapter into its base.

    Attributes:
        config: The configuration of the base, without a record of quantization.
        note: Why and how the base was loaded; empty if it is read from its files.
        layout: All tensors that will be written, with dtype and shape.
    """

    def __init__(self, source: AdapterDirectory, dtype: torch.dtype | None = None):
        """Find out what the adapter changes. The base is only loaded if its tensors cannot be read from its files.

        Args:
            source: The adapter.
            dtype: The dtype of the merged model; None keeps that of each tensor of the base. A base that is loaded has
                the dtype that it records, or else that in which it was loaded.

        Raises:
            ModelError: The base is damaged, cannot be downloaded or loaded.
            AdapterError: See `lora.merging.changes` and `tensors.check_copies`; the base has to be loaded and does not
                fit in memory.
        """
        self._source, self._dtype, self.note = source, dtype, ""
        config = load.load_config(source.base)
        self.config = _dense(config)
        model = load.build_meta(self.config)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self._changes = merging.changes(load.build_meta(self.config), source.files)
        try:
            self.base: StoredBase = stored.open_stored(source.base, config, model)
        except NotStreamableError as reason:
            self.base = self._load(config, model, str(reason))
        tensors.check_copies(source.files, self._whole, self.base.reader())
        self._apart = dict(self._untied())
        self.layout = {name: self._stored_as(tensor) for name, tensor in self.base.tensors.items()}
        self.layout |= {
            renamed: self._stored_as(self.base.tensors[self._origin(name)]) for name, renamed in self._apart.items()
        }

    @property
    def is_loaded(self) -> bool:
        """Whether the base is in memory."""
        return isinstance(self.base, LoadedBase)

    @property
    def dtype(self) -> str | None:
        """The dtype of all floating-point tensors of the merged model; None if they keep those of the base."""
        return None if self._dtype is None else name_of(self._dtype)

    @property
    def untied(self) -> bool:
        """Whether embeddings that the base ties are stored apart."""
        return bool(self._apart)

    @property
    def size(self) -> int:
        """Bytes of the tensors that will be written."""
        return sum(tensor_files.size_of(dtype, shape) for dtype, shape in self.layout.values())

    def fingerprint(self) -> str:
        """The fingerprint of the base. All of its files are read."""
        if (read := self.base.reader()) is None:
            return fingerprints.fingerprint(self._whole)
        dtype = load.compute_dtype(self._source.base)

        def loaded(name: str) -> Tensor:
            tensor = read(name)
            return tensor.to(dtype) if tensor.is_floating_point() else tensor  # as loading rounds it

        return fingerprints.fingerprint(self._whole, loaded)

    @property
    def _whole(self) -> PreTrainedModel:
        """The base in memory, or on the meta device if it is read from its files."""
        return self.base.loaded if isinstance(self.base, LoadedBase) else self.base.model

    def write(self, staging: Path, most: int = MOST_BYTES) -> Written:
        """Write the tensors, and read them back.

        Args:
            staging: The directory of the new model.
            most: Bytes of the tensors of one file.

        Raises:
            AdapterError: A value is not finite as it would be stored; a file does not hold what was written.
            OSError: The disk is full.
        """
        kept: list[Kept] = []
        with Shards(staging, self.layout, most) as shards, reading("merging", self.size) as advance:
            for names, work in self._work(shards):
                kept += work
                advance(sum(shards.tensors[name].size for name in names))
        shards.write_index()
        with reading("verifying", self.size) as advance:
            for name, tensor in shards.tensors.items():
                if not shards.is_intact(name):
                    what = f"{name} in the file is not what base and adapter give"
                    raise AdapterError(Problem(Code.SYSTEM_CALL_FAILED, what, str(staging)))
                advance(tensor.size)
        floating = {DTYPES[dtype] for dtype, _ in self.layout.values() if DTYPES[dtype].is_floating_point}
        dtypes = tuple(sorted(map(name_of, floating)))
        return Written(tuple(kept), len(self.layout), self.size, len(shards.paths), self.untied, dtypes)

    def _load(self, config: Any, model: PreTrainedModel, reason: str) -> LoadedBase:
        """Load the base, if there is memory for it."""
        section, where = self._source.base, str(self._source.files.path)
        computed = load.compute_dtype(section)
        needed, free = self.parameters * computed.itemsize, memory.available(torch.device("cpu"))
        if needed > free:
            what = f"cannot be merged here: the base has to be loaded ({reason}), which takes about "
            what += f"{format_size(needed)} of memory, and {format_size(free)} are free"
            raise AdapterError(Problem(Code.SYSTEM_OUT_OF_MEMORY, what, where, fix="use a larger machine"))
        if self._dtype is None:
            is_recorded = isinstance(config.dtype, torch.dtype) and not section.gguf_file
            self._dtype = config.dtype if is_recorded else computed
        is_quantized = section.gguf_file or section.quantization != "none" or quantization.record_of(config.to_dict())
        self.note = f"the base was loaded: {reason}"
        if is_quantized:
            name = name_of(self._dtype)
            self.note = f"the base is merged in its dequantized form, as {name}, and not quantized again: {reason}"
        self.config.architectures = [type(model).__name__]
        saved = _saved_layout(model)
        try:
            groups, unused = stored.group_tensors(saved, model)
        except NotStreamableError as error:
            unused, reason = ["unknown"], str(error)
        if unused:
            what, fix = f"cannot be merged: {reason}", "use the adapter with PEFT"
            raise AdapterError(Problem(Code.ADAPTER_UNSUPPORTED, what, where, fix=fix))
        return LoadedBase(model, saved, groups, tuple(stored.find_ties(model, groups)), load.load_base(section))

    def _untied(self) -> Iterator[tuple[str, str]]:
        """Names of the model that need a tensor of their own, with the names that these are stored under."""
        for stored_name, *others in self.base.ties:
            first = self._changes.get(stored_name, ())
            if any(not merging.are_same(self._changes.get(name, ()), first) for name in others):
                layout = self.base.groups[stored_name].layout
                for name in others:
                    if name not in self.base.groups:
                        (renamed,) = layout.revert({name: torch.empty(0, device="meta")})
                        yield name, renamed

    def _origin(self, name: str) -> str:
        """The stored tensor of a tied one."""
        (part,) = self.base.groups[self.base.owner(name)].parts
        return part

    def _stored_as(self, tensor: tensor_files.Tensor) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of a tensor of the base in the merged model."""
        is_cast = self._dtype is not None and DTYPES[tensor.dtype].is_floating_point
        return NAMES[self._dtype] if is_cast else tensor.dtype, tensor.shape  # type: ignore[index]

    def _work(self, shards: Shards) -> Iterator[tuple[Sequence[str], Iterator[Kept]]]:
        """Names of stored tensors, with what writes them."""
        plain = dict.fromkeys(self.base.tensors, "")
        for group in {id(group): group for group in self.base.groups.values()}.values():
            is_changed = self.is_loaded or any(name in self._changes for name in group.members)
            if group.is_converted and is_changed:
                yield [*group.parts], self._write_converted(group, shards)
                plain = {name: member for name, member in plain.items() if name not in group.parts}
            else:
                plain |= dict.fromkeys(group.parts, group.first)
        for name, member in plain.items():
            yield [name], self._write_tensor(name, name, member, shards)
        for name, renamed in self._apart.items():
            yield [renamed], self._write_tensor(renamed, self._origin(name), name, shards)

    def _write_tensor(self, name: str, origin: str, member: str, shards: Shards) -> Iterator[Kept]:
        """Write a tensor that is stored as it is in the model.

        Args:
            name: Under which it is stored.
            origin: The stored tensor of the base.
            member: Its name in the model.
            shards: The files.
        """
        rounding = _Rounding(self._changes.get(member, ()), DTYPES[self.layout[name][0]], Kept(member))
        start = 0
        for weight in self.base.blocks(origin, rounding.rows_at_once(self.layout[name][1])):
            shards.write(name, _bytes(self._rounded(name, rounding, weight, start)))
            start += len(weight) if weight.dim() else 1
        if rounding.changes:
            yield rounding.kept

    def _write_converted(self, group: StoredGroup, shards: Shards) -> Iterator[Kept]:
        """Write tensors that are stored in another form than the model has them in."""
        members = self.base.members(group)
        if not self.base.is_reversible(group, members):
            what = f"cannot be merged: transformers stores {group.first} in another way than it loads it"
            raise AdapterError(Problem(Code.ADAPTER_UNSUPPORTED, what, str(self._source.files.path)))
        dtype = DTYPES[self.layout[next(iter(group.parts))][0]]
        for name in group.members:
            rounding, before = _Rounding(self._changes.get(name, ()), dtype, Kept(name)), members.pop(name)
            after = before if before.dtype == dtype else torch.empty(before.shape, dtype=dtype)
            step = rounding.rows_at_once(before.shape)
            for start in range(0, len(before), step):
                rows = slice(start, start + step)
                after[rows] = self._rounded(name, rounding, before[rows], start)
            members[name] = after
            if rounding.changes:
                yield rounding.kept
        for name, tensor in group.layout.revert(members).items():
            shards.write(name, _bytes(tensor))

    def _rounded(self, name: str, rounding: "_Rounding", weight: Tensor, start: int) -> Tensor:
        """Rows as they are stored. Raises AdapterError: they are not finite."""
        rounded = rounding.apply(weight, start)
        if rounded is not weight and not rounded.isfinite().all():
            what, fix = f"{name} is not finite as {name_of(rounded.dtype)}", "use --dtype float32"
            raise AdapterError(Problem(Code.EXPORT_DIFFERS, what, str(self._source.files.path), fix=fix))
        return rounded


@dataclass(frozen=True)
class _Rounding:
    """What happens to the values of one parameter: its changes, the dtype of the result, how much is kept of them."""

    changes: Sequence[Change]
    dtype: torch.dtype
    kept: Kept

    def rows_at_once(self, shape: Sequence[int]) -> int:
        """How many rows make a block."""
        rows = shape[0] if shape else 1
        if any(change.is_whole for change in self.changes):
            return max(1, rows)
        return max(1, _BLOCK_VALUES * rows // max(1, torch.Size(shape).numel()))

    def apply(self, weight: Tensor, start: int) -> Tensor:
        """The values of rows of base and adapter as they are stored. start: the number of the first row."""
        if not self.changes:
            return weight.to(self.dtype)
        base = weight.float()
        target = merging.apply(self.changes, base, start)
        rounded = target.to(self.dtype)
        self.kept.add(base, target, rounded)
        return rounded


def _dense(config: Any) -> Any:
    """The configuration without a record of quantization."""
    plain = copy.deepcopy(config)
    for part in (plain, plain.get_text_config()):
        vars(part).pop("quantization_config", None)
    return plain


def _saved_layout(model: PreTrainedModel) -> dict[str, tensor_files.Tensor]:
    """Names, dtypes and shapes of the tensors as which transformers would save a model."""
    distinct = {id(tensor): (name, tensor) for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    saved = CheckpointLayout(model).as_saved({name: tensor.detach() for name, tensor in reversed(distinct.values())})
    return {
        name: tensor_files.Tensor(Path(), NAMES[tensor.dtype], tuple(tensor.shape), 0) for name, tensor in saved.items()
    }


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype, such as bfloat16."""
    return str(dtype).removeprefix("torch.")
