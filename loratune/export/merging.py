"""A base and an adapter merged into one model: W' = round(W + ΔW), computed in float32, rounded once.

The weights of the base are read, changed and written block by block, see `StreamedMerge`, so that the size of the base
does not matter. Where its tensors are only known once it is loaded, as those of a quantized base, see `LoadedMerge`.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.data import ProgressFactory
from loratune.errors import AdapterError, Problem
from loratune.lora import merging, tensors
from loratune.lora.merging import Change
from loratune.model import fingerprints, load, stored
from loratune.model.stored import DTYPES, NAMES, StoredBase, values
from loratune.system import tensor_files
from loratune.system.tensor_files import Shards

MOST_BYTES = 5_000_000_000
"""Bytes of the tensors of one file, as transformers' `save_pretrained` splits them."""
_BLOCK_VALUES = 4 << 20
"""Values that are changed at once: 16 MiB in float32, of which a few copies are held."""
Changes = Mapping[str, Sequence[Change]]
Write = Callable[[str, int, Any], None]
"""Takes the name of a tensor, an offset in it, and bytes."""


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
        """⟨W' - W, ΔW⟩ / ‖ΔW‖²; 1 where there is no change to be kept."""
        return self.overlap / self.update if self.update else 1.0

    def add(self, base: Tensor, target: Tensor, rounded: Tensor) -> None:
        """Count values: the base's, those of base and adapter, and the same as they are stored."""
        self.dtype = str(rounded.dtype).removeprefix("torch.")
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
        size: Bytes of the tensors.
        files: How many files they are in.
        untied: Whether embeddings that the base ties had to be stored apart.
        dtypes: The dtypes of all floating-point tensors.
    """

    kept: tuple[Kept, ...]
    size: int
    files: int
    untied: bool
    dtypes: tuple[str, ...]


class StreamedMerge:
    """A merge that reads the base's files."""

    note = ""

    def __init__(self, source: AdapterDirectory, config: Any, model: Any, base: StoredBase, dtype: torch.dtype | None):
        """Find out what the adapter changes. No weights of the base are read.

        Args:
            source: The adapter.
            config: The configuration of the base.
            model: The base on the meta device.
            base: The same in its files.
            dtype: The dtype of the merged model; None keeps that of each tensor.

        Raises:
            AdapterError: See `lora.merging.changes` and `tensors.check_copies`.
        """
        self.config, self.base, self._dtype = config, base, dtype
        self._source, self._model = source, model
        tensors.check_copies(source.files, model, base.reader())
        self._changes: Changes = merging.changes(load.build_meta(config), source.files)
        self._apart = dict(self._untied())
        self.layout = dict(self._layout())

    @property
    def size(self) -> int:
        """Bytes of the tensors that will be written."""
        return sum(map(self._bytes, self.layout))

    def _bytes(self, name: str) -> int:
        """Bytes of a tensor as it will be stored."""
        dtype, shape = self.layout[name]
        return torch.Size(shape).numel() * tensor_files.WIDTHS[dtype]

    @property
    def parameters(self) -> int:
        """How many values the model has."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    @property
    def untied(self) -> bool:
        """Whether embeddings that the base ties are stored apart."""
        return bool(self._apart)

    def fingerprint(self) -> str:
        """The fingerprint of the base. All of its files are read."""
        read, dtype = self.base.reader(), load.compute_dtype(self._source.base)

        def loaded(name: str) -> Tensor:
            tensor: Tensor = read(name)
            return tensor.to(dtype) if tensor.is_floating_point() else tensor  # as loading rounds it

        return fingerprints.fingerprint(self._model, self._source.files.base_fingerprint, loaded)

    def write(self, staging: Path, watch: ProgressFactory, most: int = MOST_BYTES) -> Written:
        """Write the tensors, and read them back.

        Args:
            staging: The directory of the new model.
            watch: Shows the progress.
            most: Bytes of the tensors of one file.

        Raises:
            AdapterError: A value is not finite as it would be stored; a file does not hold what was written.
            OSError: The disk is full.
        """
        shards = Shards(staging, self.layout, most)
        digests = {name: hashlib.sha256() for name in shards.tensors}

        def write(name: str, offset: int, data: Any) -> None:
            shards.write(name, offset, data)
            digests[name].update(data)

        with shards:
            kept = self._run(write, watch, "merging")
        shards.write_index()
        with watch("verifying", self.size) as advance:
            for name, digest in digests.items():
                if shards.tensors[name].digest() != digest.hexdigest():
                    raise _differs(staging, name)
                advance(shards.tensors[name].size)
        floating = {name for name, _ in self.layout.values() if DTYPES[name].is_floating_point}
        dtypes = tuple(sorted(str(DTYPES[name]).removeprefix("torch.") for name in floating))
        return Written(kept, self.size, len(shards.paths), self.untied, dtypes)

    def compare(self, staging: Path, watch: ProgressFactory) -> tuple[Kept, ...]:
        """Compute all tensors once more, and compare them with the files.

        Raises:
            AdapterError: A tensor is missing, left over, or another.
        """
        files = sorted(staging.glob("*.safetensors"))
        there = {name: tensor for path in files for name, tensor in tensor_files.tensors(path).items()}
        described = {name: (tensor.dtype, tensor.shape) for name, tensor in there.items()}
        if described != self.layout:
            raise _differs(staging, min(described.items() ^ self.layout.items())[0])

        def compare(name: str, offset: int, data: Any) -> None:
            if there[name].read(offset, len(data)) != memoryview(data).cast("B"):
                raise _differs(staging, name)

        return self._run(compare, watch, "comparing")

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

    def _layout(self) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
        """All tensors that will be written, with dtype and shape."""
        for name, tensor in self.base.tensors.items():
            yield name, (self._stored_dtype(tensor), tensor.shape)
        for name, renamed in self._apart.items():
            tensor = self._owned(name)
            yield renamed, (self._stored_dtype(tensor), tensor.shape)

    def _owned(self, name: str) -> tensor_files.Tensor:
        ((_, tensor),) = self.base.groups[self.base.owner(name)].parts.values()
        return tensor

    def _stored_dtype(self, tensor: tensor_files.Tensor) -> str:
        is_changed = self._dtype is not None and DTYPES[tensor.dtype].is_floating_point
        return NAMES[self._dtype] if is_changed else tensor.dtype  # type: ignore[index]

    def _run(self, write: Write, watch: ProgressFactory, what: str) -> tuple[Kept, ...]:
        """Compute all tensors, each from its first byte to its last."""
        kept: list[Kept] = []
        seen: set[str] = set()
        with watch(what, self.size) as advance:
            for group in {id(group): group for group in self.base.groups.values()}.values():
                if group.is_converted and any(self._changes.get(name) for name in group.members):
                    kept += self._convert(group, write)
                else:
                    for name, (_, tensor) in group.parts.items():
                        kept += self._change(name, tensor, group.first, write)
                seen |= group.parts.keys()
                advance(sum(map(self._bytes, group.parts)))
            for name in self.base.tensors.keys() - seen:
                kept += self._change(name, self.base.tensors[name], "", write)
            for name, renamed in self._apart.items():
                kept += self._change(renamed, self._owned(name), name, write)
        return tuple(kept)

    def _change(self, name: str, tensor: tensor_files.Tensor, member: str, write: Write) -> Iterator[Kept]:
        """Compute a tensor that is stored as it is in the model. member: its name there."""
        made, dtype, offset = self._changes.get(member, ()), self.layout[name][0], 0
        if not made and dtype == tensor.dtype:
            for data in tensor.blocks():
                write(name, offset, data)
                offset += len(data)
            return
        kept = Kept(member)
        rows = tensor.shape[0] if tensor.shape else 1
        step = max(1, _BLOCK_VALUES * rows // max(1, torch.Size(tensor.shape).numel()))
        step = max(1, rows) if merging.needs_whole(made) or not tensor.shape else step
        for start in range(0, rows, step):
            weight = values(tensor, start, min(step, rows - start))
            rounded = self._rounded(name, weight, made, start, DTYPES[dtype], kept)
            data = _bytes(rounded)
            write(name, offset, data)
            offset += len(data)
        if made:
            yield kept

    def _rounded(
        self, name: str, weight: Tensor, made: Sequence[Change], start: int, dtype: torch.dtype, kept: Kept
    ) -> Tensor:
        """Values as they are stored. Raises AdapterError: they are not finite."""
        base = weight.float()
        target = merging.apply(made, base, start)
        rounded = target.to(dtype)
        if not rounded.isfinite().all():
            what, fix = f"{name} is not finite as {str(dtype).removeprefix('torch.')}", "use --dtype float32"
            raise AdapterError(Problem(Code.MERGE_NOT_FINITE, what, str(self._source.files.path), fix=fix))
        if made:
            kept.add(base, target, rounded)
        return rounded

    def _convert(self, group: stored.StoredGroup, write: Write) -> Iterator[Kept]:
        """Compute tensors that are stored in another form than the model has them in."""
        members = group.convert()
        for name, tensor in group.revert(dict(members)).items():
            same = torch.equal(tensor, values(group.parts[name][1]))
            if not same:
                what = f"cannot be merged: transformers stores {group.first} in another way than it loads it"
                raise AdapterError(Problem(Code.MERGE_UNSUPPORTED, what, str(self._source.files.path)))
            del tensor
        dtype = DTYPES[self.layout[next(iter(group.parts))][0]]
        for name in list(members):
            made, kept = self._changes.get(name, ()), Kept(name)
            before = members.pop(name)
            after = before if before.dtype == dtype else torch.empty(before.shape, dtype=dtype)
            step = max(1, _BLOCK_VALUES * len(before) // max(1, before.numel()))
            step = len(before) if merging.needs_whole(made) else step
            for start in range(0, len(before), step):
                rows = slice(start, start + step)
                after[rows] = self._rounded(name, before[rows], made, start, dtype, kept)
            members[name] = after
            if made:
                yield kept
        for name, tensor in group.revert(members).items():
            write(name, 0, _bytes(tensor))


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _differs(staging: Path, name: str) -> AdapterError:
    what = f"{name} in the file is not what base and adapter give"
    return AdapterError(Problem(Code.ADAPTER_WRITE_FAILED, what, str(staging)))
