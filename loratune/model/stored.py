"""A base in safetensors files that is read tensor by tensor instead of loaded.

transformers may name, stack, split or permute tensors differently in memory than in the files. `open_stored` finds for
each tensor of the model the stored ones that it comes from, and checks on shapes that the conversion is reversed by
saving; `StoredBase.is_reversible` checks the same on values.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loratune.codes import Code
from loratune.config import ModelSection
from loratune.errors import ModelError, Problem
from loratune.events import progress
from loratune.model import checks
from loratune.model.source import summary
from loratune.model.tensor_files import DTYPES, NotStreamableError, StoredTensor, release_tensors
from loratune.model.upstream import CheckpointLayout


@dataclass(frozen=True)
class StoredGroup:
    """Stored tensors that together become tensors of the model.

    Attributes:
        first: The first of these.
        parts: Name → the pattern of its conversion, and the stored tensor, in the order of the conversion.
        members: The tensors of the model that they become. Without a conversion there is one part and one member.
    """

    first: str
    parts: Mapping[str, tuple[str | None, StoredTensor]]
    members: tuple[str, ...]

    @property
    def is_converted(self) -> bool:
        """Whether the parts are more than renamed."""
        return next(iter(self.parts.values()))[0] is not None


@dataclass(frozen=True)
class StoredBase:
    """The tensors in the files of a base, and what they are in the model.

    Attributes:
        tensors: All stored tensors.
        groups: Name of a tensor of the model → the stored ones it comes from.
        ties: Names of each tensor that the model holds under several names, those that are stored first.
        layout: How tensors of the files become those of the model, and back.
    """

    tensors: Mapping[str, StoredTensor]
    groups: Mapping[str, StoredGroup]
    ties: tuple[tuple[str, ...], ...]
    layout: CheckpointLayout

    def members(self, group: StoredGroup) -> dict[str, Tensor]:
        """The tensors of the model that a group becomes."""
        read = {name: (str(pattern), tensor.read()) for name, (pattern, tensor) in group.parts.items()}
        if not group.is_converted:
            return {group.first: next(iter(read.values()))[1]}
        return self.layout.convert(group.first, read)

    def is_reversible(self, group: StoredGroup, members: Mapping[str, Tensor]) -> bool:
        """Whether transformers would store these members as the files hold them."""
        reverted = self.layout.revert(dict(members))
        return all(torch.equal(tensor, group.parts[name][1].read()) for name, tensor in reverted.items())

    def reader(self) -> Callable[[str], Tensor]:
        """A function from the name of a tensor of the model to its values. It keeps the group that was read last, whose
        other tensors are likely to be next."""
        last: dict[str, Tensor] = {}

        def read(name: str) -> Tensor:
            owner = name if name in self.groups else next(tied[0] for tied in self.ties if name in tied)
            if owner not in last:
                last.clear()
                last.update(self.members(self.groups[owner]))
            return last.pop(owner)

        return read


@progress("reading the files of the base")
def open_stored(section: ModelSection, config: Any, model: PreTrainedModel) -> StoredBase:
    """Find the files of a base, downloaded if they are on the hub.

    Args:
        section: The settings of the base.
        config: Its configuration.
        model: The model on the meta device, dense.

    Raises:
        NotStreamableError: The base has to be loaded.
        ModelError: A file of weights is damaged, or cannot be downloaded.
    """
    if section.gguf_file is not None:
        raise NotStreamableError("it is a GGUF file")
    if section.quantization != "none":
        raise NotStreamableError(f"it is quantized ({section.quantization})")
    stored = release_tensors(section, config)
    if other := {tensor.dtype for tensor in stored.values()} - DTYPES.keys():
        raise NotStreamableError(f"its files hold {', '.join(sorted(other))}")
    layout = CheckpointLayout(model)
    groups, unused = _groups(stored, model, layout)
    ties = tuple(_ties(model, groups))
    known = {*groups, *(name for tied in ties for name in tied)}
    missing = [name for name in model.state_dict() if name not in known]
    info = {"missing_keys": missing, "mismatched_keys": [], "unexpected_keys": unused}
    try:
        checks.check_complete(model, info, section.name_or_path)
    except ModelError as error:  # loading reports it, unless transformers knows better
        raise NotStreamableError(error.problems[0].what) from None
    return StoredBase(stored, groups, ties, layout)


def _groups(
    stored: Mapping[str, StoredTensor], model: PreTrainedModel, layout: CheckpointLayout
) -> tuple[dict[str, StoredGroup], list[str]]:
    """The groups by the tensors of the model, and the names of the stored tensors that it does not use.

    Raises:
        NotStreamableError: The stored tensors cannot be converted to those of the model and back.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, dict[str, tuple[str | None, StoredTensor]]] = {}
    unused = []
    for name in layout.in_order(stored):
        target, pattern = layout.target(name)
        if target in shapes:
            found.setdefault(target, {})[name] = pattern, stored[name]
        else:
            unused.append(name)
    groups: dict[str, StoredGroup] = {}
    for first, parts in found.items():
        members = _members(first, parts, layout)
        for member, shape in members.items():
            if shapes.get(member) != shape or member in groups:
                raise NotStreamableError(f"its files hold {member} as {shape}")
        groups |= dict.fromkeys(members, StoredGroup(first, parts, tuple(members)))
    return groups, unused


def _members(
    first: str, parts: Mapping[str, tuple[str | None, StoredTensor]], layout: CheckpointLayout
) -> dict[str, tuple[int, ...]]:
    """The names and shapes of what stored tensors become, tried on tensors without values, there and back."""
    if all(pattern is None for pattern, _ in parts.values()):
        if len(parts) > 1:
            raise NotStreamableError(f"its files hold {first} more than once")
        return {first: next(iter(parts.values()))[1].shape}
    empty = {
        name: (str(pattern), torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta"))
        for name, (pattern, tensor) in parts.items()
    }
    try:
        members = layout.convert(first, empty)
        back = {name: tuple(tensor.shape) for name, tensor in layout.revert(dict(members)).items()}
    except Exception as error:  # an operation of transformers that needs values, or cannot be reversed
        raise NotStreamableError(f"the conversion of {first} cannot be reversed ({summary(error)})") from None
    if back != {name: tensor.shape for name, (_, tensor) in parts.items()}:
        raise NotStreamableError(f"the conversion of {first} is not reversed by saving")
    return {name: tuple(tensor.shape) for name, tensor in members.items()}


def tied_names(model: PreTrainedModel) -> list[list[str]]:
    """The names of each tensor that the model holds under several names."""
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_tensor.setdefault(id(tensor), []).append(name)
    return [names for names in by_tensor.values() if len(names) > 1]


def _ties(model: PreTrainedModel, groups: Mapping[str, StoredGroup]) -> Iterator[tuple[str, ...]]:
    """Names of each tensor that the model holds under several names, those that are stored first.

    Raises:
        NotStreamableError: The files hold different values for tied tensors.
    """
    for names in tied_names(model):
        stored = [name for name in names if name in groups]
        values = [tensor.read() for name in stored for _, tensor in groups[name].parts.values()]
        if any(not torch.equal(values[0], other) for other in values[1:]):
            raise NotStreamableError(f"its files hold different values for {' and '.join(stored)}, which are tied")
        if stored:
            yield (*stored, *(name for name in names if name not in groups))


def original_weights(section: ModelSection, base: PreTrainedModel, config: Any) -> Callable[[str], Tensor]:
    """A reader of single weights as they were saved, before quantization.

    Args:
        section: The settings of the base.
        base: The base in memory.
        config: The configuration in its files.

    Returns:
        A function from the path of a linear layer to its weight, (out, in). It raises ModelError where no safetensors
        file has this weight.
    """
    try:
        stored = release_tensors(section, config)
    except NotStreamableError:
        stored = {}
    prefix = f"{base.base_model_prefix}."

    def read(layer: str) -> Tensor:
        for name in (f"{layer}.weight", f"{layer}.weight".removeprefix(prefix)):
            if name in stored:
                return stored[name].read()
        what = f"loftq needs {layer}.weight as it was before quantization, and no safetensors file has it"
        key, fix = "lora.init_lora_weights", "use another initialization"
        raise ModelError(Problem(Code.MODEL_DAMAGED, what, section.name_or_path, key, fix))

    return read
