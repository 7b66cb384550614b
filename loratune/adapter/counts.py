"""How many numbers an adapter has, and how many bytes its file, before or after it is made."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from loratune.adapter.starts import WRAPPER_PREFIX


@dataclass(frozen=True)
class Count:
    """Parameters: trained, all of them with the adapter, and bytes of the adapter file."""

    trainable: int
    total: int
    adapter_bytes: int

    @property
    def percent(self) -> float:
        """Trained share of all parameters, in percent."""
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        """The line of `PeftModel.print_trainable_parameters`."""
        return f"trainable params: {self.trainable:,d} || all params: {self.total:,d} || trainable%: {self.percent:.4f}"


def count_of(model: PeftModel, module: str) -> int:
    """Trained parameters of one adapted module, named as in the base."""
    return sum(
        parameter.numel()
        for name, parameter in model.get_submodule(WRAPPER_PREFIX + module).named_parameters()
        if parameter.requires_grad
    )


def trained(model: PeftModel) -> dict[str, int]:
    """Name of each trained parameter, as in the base → how many numbers it has."""
    return {
        name.removeprefix(WRAPPER_PREFIX): parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def rank_of(model: PeftModel, module: str) -> int:
    """The rank of one adapted module, named as in the base."""
    return int(model.get_submodule(WRAPPER_PREFIX + module).r["default"])


def notes(model: PeftModel) -> list[str]:
    """What is lawful and of little use: a rank that a layer cannot have, and whole modules in numbers of 16 bit."""
    return [*_ranks_to_spare(model), *_coarse_modules(model)]


def _ranks_to_spare(model: PeftModel) -> Iterator[str]:
    """A rank above the smaller side of a layer, which bounds the rank of any update."""
    highest: dict[int, int] = {}
    layers: dict[int, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            limit = min(layer.in_features, layer.out_features)
            if (rank := max(layer.r.values())) > limit:
                highest[limit] = max(rank, highest.get(limit, 0))
                layers.setdefault(limit, []).append(name.removeprefix(WRAPPER_PREFIX))
    for limit, names in sorted(layers.items()):
        yield (
            f"lora.r: {highest[limit]} is more than the {limit} inputs or outputs of {len(names)} modules, among them "
            f"{', '.join(names[:3])}; {limit} can express every update of theirs"
        )


def _coarse_modules(model: PeftModel) -> Iterator[str]:
    """PEFT trains a whole module in the dtype of the base; of its own weights it keeps float32 copies."""
    coarse = {
        name.partition(".modules_to_save.")[0].removeprefix(WRAPPER_PREFIX): parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".modules_to_save." in name and parameter.dtype.itemsize < 4
    }
    for name, dtype in coarse.items():
        number = str(dtype).removeprefix("torch.")
        yield f"lora.modules_to_save: {name} is trained in {number}, which rounds small steps away; float32 does not"


def shape_of(model: PeftModel, module: str) -> tuple[int, int]:
    """Inputs and outputs of one adapted module, named as in the base."""
    layer = model.get_submodule(WRAPPER_PREFIX + module)
    return layer.in_features, layer.out_features


def file_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Size of the safetensors file that holds `tensors`, to the byte.

    8 bytes of length, a JSON header padded to a multiple of 8, then the data in order of dtype and name:
    https://github.com/huggingface/safetensors#format
    """
    dtypes = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    order = list(dtypes)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        end = offset + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": dtypes[tensor.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset
