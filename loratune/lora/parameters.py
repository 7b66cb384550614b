"""The trained parameters: their number, notes on them, and their optimizer."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from loratune.config import LoraSection
from loratune.lora.module_names import WRAPPER_PREFIX, join_counts, join_first, parent, short, without_wrappers

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
"""The attributes of PEFT's layers that hold A and B."""


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


def lora_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """Path of each A and B in an adapter file, and its PEFT layer."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer))
    return ((name.removeprefix(WRAPPER_PREFIX), layer) for name, layer in layers)


def layers_of(model: PeftModel) -> dict[str, Any]:
    """Target, a module or a parameter named as in the base → its PEFT layer."""
    names = wrapped_parameters(model)
    return {names.get(path, without_wrappers(path)): layer for path, layer in lora_layers(model)}


def count_of(layer: Any) -> int:
    """The number of trained parameters of one layer, without those of another wrapped parameter inside it."""
    inner = {id(parameter) for parameter in layer.base_layer.parameters()} if isinstance(layer, ParamWrapper) else ()
    return sum(p.numel() for p in layer.parameters() if p.requires_grad and id(p) not in inner)


def experts_of(layer: Any) -> int:
    """The number of experts in the parameter of a layer, each with its own A and B; 1 for a module."""
    return int(layer.num_experts) if isinstance(layer, ParamWrapper) else 1


def wrapped_parameters(model: PeftModel) -> dict[str, str]:
    """Path of the A and B of a parameter → its name in the base. The files of an adapter do not record it."""
    layers = ((path, layer) for path, layer in lora_layers(model) if isinstance(layer, ParamWrapper))
    return {path: f"{without_wrappers(path)}.{layer.parameter_name}" for path, layer in layers}


def remade_sizes(model: PeftModel) -> dict[str, list[int]]:
    """Path of each module with adapted parameters → their sizes in bytes, in the order of the backward pass.

    In each forward pass, PEFT materializes them as the sum of the parameter and its update.
    """
    sizes: dict[str, list[int]] = {}
    for name, layer in layers_of(model).items():
        if isinstance(layer, ParamWrapper):
            parameter = layer.get_param()
            sizes.setdefault(parent(name), []).append(parameter.numel() * parameter.element_size())
    return sizes


def trained_sizes(model: PeftModel) -> dict[str, int]:
    """Trained parameters, named as in the base (`lm_head, whole`, `model.embed_tokens, tokens`) → their sizes.

    A whole module counts as one, with its bias.
    """
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = without_wrappers(name.removeprefix(WRAPPER_PREFIX))
            name = re.sub(r"\.modules_to_save\..*", ", whole", name)
            name = re.sub(r"(\.token_adapter)?\.trainable_tokens_delta\..*", ", tokens", name)
            sizes[name] = sizes.get(name, 0) + parameter.numel()
    return sizes


def per_rank(model: PeftModel) -> int:
    """The number of parameters per unit of `r`: trained values of A and B, divided by their rank.

    Modules with their own rank, which must differ from `r`, are not counted.
    """
    rank = model.peft_config["default"].r
    layers = [layer for _, layer in lora_layers(model) if layer.r["default"] == rank]
    factors = (factor for layer in layers for name in _FACTORS for factor in getattr(layer, name).parameters())
    sizes: list[int] = [factor.numel() for factor in factors if factor.requires_grad]
    return sum(sizes) // int(rank)


def notes(model: PeftModel) -> list[str]:
    """Notes for the user: excessive ranks, modules trained in 16 bit, programs that cannot load the adapter."""
    unreadable = "lora.target_modules: llama.cpp and Ollama do not read an adapter of "
    unknown = [f"{unreadable}{layers}" for layers in layers_unknown_to_llama_cpp(model)]
    return [*_excessive_ranks(model), *_modules_in_16_bit(model), *unknown]


def _excessive_ranks(model: PeftModel) -> Iterator[str]:
    """Ranks above the smaller side of a layer, which bounds the rank of any update."""
    highest: dict[int, int] = {}
    layers: dict[int, list[str]] = {}
    for name, layer in layers_of(model).items():
        limit = min(layer.in_features, layer.out_features)
        if (rank := max(layer.r.values())) > limit:
            highest[limit] = max(rank, highest.get(limit, 0))
            layers.setdefault(limit, []).append(name)
    common = model.peft_config["default"].r
    for limit, names in sorted(layers.items()):
        key = "lora.r" if highest[limit] == common else "lora.rank_pattern"
        yield (
            f"{key}: {highest[limit]} is more than the {limit} inputs or outputs of {join_counts(names, 4)}; "
            f"{limit} is enough for every update of them"
        )


def layers_unknown_to_llama_cpp(model: PeftModel) -> Iterator[str]:
    """Layers whose adapters llama.cpp's convert_lora_to_gguf.py refuses or converts incorrectly: `attn.c_attn, a
    Conv1D`."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    kinds: dict[str, str] = {}
    for name, layer in layers_of(model).items():
        base, layer_name = layer.get_base_layer(), short(name)
        if isinstance(layer, ParamWrapper):
            continue  # `export.experts` decides it
        if isinstance(base, Conv1D):
            kinds[layer_name] = "a Conv1D"
        elif isinstance(base, nn.Embedding):
            kinds[layer_name] = "an Embedding"
        elif id(base.weight) in embeddings:
            kinds[layer_name] = "a Linear with the weight of the embeddings"
    for kind in dict.fromkeys(kinds.values()):
        names = [layer_name for layer_name, of_layer in kinds.items() if of_layer == kind]
        yield f"{join_first(names, 4)}, {kind}"


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


OptimizerChoice = tuple[type[Optimizer], dict[str, Any]]
"""A class of optimizers and its keywords, for `Trainer(optimizer_cls_and_kwargs=...)`."""


def choose_optimizer(
    model: PeftModel, section: LoraSection, default: OptimizerChoice, weight_decay: float
) -> OptimizerChoice:
    """The optimizer of the run's LoRA variant.

    Args:
        model: The model with the adapter.
        section: The settings of LoRA.
        default: Class and keywords, `lr` among them, of the optimizer without a variant.
        weight_decay: Weight decay of the run.

    Returns:
        Class and keywords. PEFT groups the parameters; as the keyword `params` they replace Trainer's own groups.
    """
    kind, keywords = default
    if section.use_lorafa:
        optimizer = create_lorafa_optimizer(
            model, section.r, section.lora_alpha, lr=keywords["lr"], weight_decay=weight_decay
        )
        (group,) = optimizer.param_groups  # without the frozen base, which PEFT's step skips
        numbers = [
            number
            for number, (name, parameter) in enumerate(zip(group["names"], group["params"], strict=True))
            if parameter.requires_grad or "lora_A" in name
        ]
        columns = {key: [group[key][number] for number in numbers] for key in ("params", "names", "scaling_factors")}
        return type(optimizer), {"params": [group | columns], "lr": keywords["lr"]}
    if section.loraplus_lr_ratio is not None:
        optimizer = create_loraplus_optimizer(
            model,
            kind,
            loraplus_lr_ratio=section.loraplus_lr_ratio,
            loraplus_lr_embedding=keywords["lr"],  # PEFT's own default, 1e-6, would hardly train embeddings
            loraplus_weight_decay=weight_decay,
            **keywords,
        )
        return kind, keywords | {"params": [group for group in optimizer.param_groups if group["params"]]}
    return default
