"""Parameter counts and file size of an adapter, and notes on its layers; none of it needs values."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from loratune.lora.initialize import WRAPPER_PREFIX
from loratune.lora.module_names import counted, few, short


@dataclass(frozen=True)
class Count:
    """Size of an adapter.

    Attributes:
        trainable: Trained parameters.
        total: All parameters, those of the adapter included.
        adapter_bytes: Size of the adapter file.
    """

    trainable: int
    total: int
    adapter_bytes: int

    @property
    def percent(self) -> float:
        """Share of trained parameters in percent."""
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
    """Trained parameters, named as in the base → their sizes."""
    return {
        _base_name(name): parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def _base_name(parameter: str) -> str:
    """The name of a parameter without PEFT's wrappers: `lm_head, whole`, `model.embed_tokens, tokens`."""
    name = parameter.removeprefix(WRAPPER_PREFIX).replace(".base_layer.", ".")
    if ".modules_to_save." in name:
        return f"{name.partition('.modules_to_save.')[0]}, whole"
    return re.sub(r"(\.token_adapter)?\.trainable_tokens_delta\..*", ", tokens", name)


def rank_of(model: PeftModel, module: str) -> int:
    """The rank of one adapted module, named as in the base."""
    return int(model.get_submodule(WRAPPER_PREFIX + module).r["default"])


def notes(model: PeftModel) -> list[str]:
    """Notes for the user: ranks above what a layer can use, modules trained in 16 bit, clients that cannot load it."""
    return [*_excessive_ranks(model), *_modules_in_16_bit(model), *_unportable(model)]


def _excessive_ranks(model: PeftModel) -> Iterator[str]:
    """Ranks above the smaller side of a layer, which bounds the rank of any update."""
    highest: dict[int, int] = {}
    layers: dict[int, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            limit = min(layer.in_features, layer.out_features)
            if (rank := max(layer.r.values())) > limit:
                highest[limit] = max(rank, highest.get(limit, 0))
                layers.setdefault(limit, []).append(name.removeprefix(WRAPPER_PREFIX))
    common = model.peft_config["default"].r
    for limit, names in sorted(layers.items()):
        key = "lora.r" if highest[limit] == common else "lora.rank_pattern"
        yield (
            f"{key}: {highest[limit]} is more than the {limit} inputs or outputs of {counted(names, 4)}; {limit} is "
            "enough for every update of them"
        )


def _unportable(model: PeftModel) -> Iterator[str]:
    """Layers whose adapters llama.cpp's convert_lora_to_gguf.py refuses, or converts to a file that does not load."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    kinds: dict[str, str] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        layer_name = short(name.removeprefix(WRAPPER_PREFIX))
        if isinstance(base, Conv1D):
            kinds[layer_name] = "a Conv1D"
        elif isinstance(base, nn.Embedding):
            kinds[layer_name] = "an Embedding"
        elif id(base.weight) in embeddings:
            kinds[layer_name] = "a Linear with the weight of the embeddings"
    for kind in dict.fromkeys(kinds.values()):
        names = [layer_name for layer_name, of_layer in kinds.items() if of_layer == kind]
        yield f"lora.target_modules: llama.cpp and Ollama do not read an adapter of {few(names, 4)}, {kind}"


def _modules_in_16_bit(model: PeftModel) -> Iterator[str]:
    """Modules to save in 16 bit: PEFT trains them in the dtype of the base, and only its own weights in float32."""
    modules = {
        name.partition(".modules_to_save.")[0].removeprefix(WRAPPER_PREFIX): parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".modules_to_save." in name and parameter.dtype.itemsize < 4
    }
    for name, dtype in modules.items():
        bits = str(dtype).removeprefix("torch.")
        yield f"lora.modules_to_save: {name} is trained in {bits}, which rounds small steps away; float32 does not"


def shape_of(model: PeftModel, module: str) -> tuple[int, int]:
    """Inputs and outputs of one adapted module, named as in the base."""
    layer = model.get_submodule(WRAPPER_PREFIX + module)
    return layer.in_features, layer.out_features


def file_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Size of the safetensors file that holds `tensors`, to the byte.

    The file has 8 bytes of length, a JSON header padded to a multiple of 8, then the data in order of dtype and name:
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
