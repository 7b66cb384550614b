"""How an adapter is initialized: from the base (PiSSA, OLoRA), from the data (EVA), or from what 4 bits lose (LoftQ).

PiSSA (Meng et al. 2024, arXiv:2404.02948) and OLoRA (Büyükakyüz 2024, arXiv:2406.01775) move a part of the base into
the adapter, which is moved back on saving. With W = R + s·B0·A0 at the start, the result of training, R + s·B·A, is
W + s·[B, -B0]·[A; A0], so the file holds a plain LoRA of rank 2r that fits the unchanged base.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, get_eva_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from loratune.codes import Code
from loratune.config import LoraSection
from loratune.errors import DataError, ModelError, Problem
from loratune.lora import upstream

KEY = "lora.init_lora_weights"
WRAPPER_PREFIX = "base_model.model."

_MOST_FORWARDS = 1000
"""PEFT's loop for EVA (peft.tuners.lora.eva) repeats its batches until the directions settle, without a limit."""


@dataclass(frozen=True)
class AdapterInit:
    """An adapter before its first step.

    Attributes:
        tensors: Name → initial value.
        to_plain_lora: The values were taken out of the base, so that the adapter is saved as a plain LoRA of twice the
            rank.
        base: The values, its biases among them, with which the model computes what its base computes, where those of
            `tensors` are of another adapter.
    """

    tensors: dict[str, torch.Tensor]
    to_plain_lora: bool
    base: dict[str, torch.Tensor] | None = None

    def published(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a file that fits the unchanged base; `state` holds those that were trained."""
        if not self.to_plain_lora:
            return state
        tensors = dict(state)
        for name, tensor in state.items():
            if "lora_A" in name:
                tensors[name] = torch.cat([tensor, self.tensors[name].to(tensor)], dim=0)
            elif "lora_B" in name:
                tensors[name] = torch.cat([tensor, -self.tensors[name].to(tensor)], dim=1)
        return tensors

    def publish_config(self, config: dict[str, Any]) -> None:
        """Change the content of an adapter_config.json to the ranks of `published`, which may be twice the trained."""
        if not self.to_plain_lora:
            return
        factor = 2**0.5 if config["use_rslora"] else 2  # so that lora_alpha / r, or / sqrt(r), does not change
        config["r"], config["lora_alpha"] = 2 * config["r"], factor * config["lora_alpha"]
        for pattern, by in (("rank_pattern", 2), ("alpha_pattern", factor)):
            config[pattern] = {name: by * value for name, value in (config[pattern] or {}).items()}

    def has_changed(self, state: Mapping[str, torch.Tensor]) -> bool:
        """Whether training changed any B, by more than rounding: every update of the base goes through B."""
        least = 1e-10  # the first step of Adam is as long as its learning rate
        steps = (tensor - self.tensors[name].to(tensor) for name, tensor in state.items() if _is_b(name))
        return any(step.abs().max() > least for step in steps)


def peft_init(section: LoraSection) -> Any:
    """`init_lora_weights` as PEFT gets it: EVA and LoftQ start as plain LoRA, and are initialized later."""
    return True if section.init_lora_weights in ("eva", "loftq") else section.init_lora_weights


def becomes_plain_lora(section: LoraSection) -> bool:
    """Whether this initialization takes a part out of the base."""
    return str(section.init_lora_weights).startswith(("pissa", "olora"))


def reads_base(section: LoraSection) -> bool:
    """Whether PEFT reads or writes the base's weights for this initialization."""
    return becomes_plain_lora(section) or section.init_lora_weights == "orthogonal"


def check_layers(base: nn.Module, section: LoraSection, endings: tuple[str, ...]) -> None:
    """Check that the initialization, and LoRA-FA, fit the kind and the weights of the targets.

    Args:
        base: The base model.
        section: The settings of LoRA.
        endings: Endings of the targets' paths.

    Raises:
        ModelError: They do not.
    """
    init, problems = section.init_lora_weights, {}
    owners = Counter(id(weight) for _, module in base.named_modules() for weight in module.parameters(recurse=False))
    for path, layer in base.named_modules():
        if not f".{path}".endswith(endings):
            continue
        kind = type(layer).__name__
        if reads_base(section) and not (isinstance(layer, nn.Linear | Conv1D) and layer.weight.is_floating_point()):
            what = f"{init} starts from the weights of linear layers that are not quantized; {path} is a {kind}"
            problems[KEY] = what
        elif becomes_plain_lora(section) and owners[id(layer.weight)] > 1:
            what = f"{init} changes the weights it starts from, and {path} shares its weight with other modules"
            problems[KEY] = what
        elif init == "olora" and isinstance(layer, Conv1D):
            what = f"PEFT's olora does not support the transposed weights of a Conv1D such as {path}"
            problems[KEY] = what
        elif section.use_lorafa and isinstance(layer, nn.Embedding):
            what = f"LoRA-FA adapts linear layers; {path} is an {kind}"
            problems["lora.use_lorafa"] = what
    if problems:
        fix = "use another initialization, or other targets"
        raise ModelError([Problem(Code.LORA_UNSUPPORTED, what, key=key, fix=fix) for key, what in problems.items()])


def check_ranks(model: PeftModel, section: LoraSection) -> None:
    """Check that each layer has as many directions to start from as its rank.

    Raises:
        ModelError: A layer has fewer.
    """
    if section.init_lora_weights in (True, "gaussian"):
        return
    for name, layer in _lora_layers(model):
        rank, most = layer.r["default"], min(layer.in_features, layer.out_features)
        if rank > most:
            path = name.removeprefix(WRAPPER_PREFIX)
            what = f"{section.init_lora_weights} needs {rank} directions of each layer, and {path} has only {most}"
            raise ModelError(Problem(Code.LORA_UNSUPPORTED, what, key=KEY, fix=f"lower lora.r to {most}"))


def eva(model: PeftModel, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Set every A to the main directions of its layer's inputs at the supervised tokens, in place.

    Ranks do not change (rho = 1). Paischer et al. 2024, arXiv:2410.07170.

    Args:
        model: The model with the fresh adapter.
        batches: Collated training rows. Those with more than r supervised tokens are used.

    Raises:
        DataError: No batch has enough supervised tokens.
        ModelError: The directions do not settle.
    """
    config: LoraConfig = copy(model.peft_config["default"])
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0)
    most = max(layer.r["default"] for _, layer in _lora_layers(model))
    supervised = [int((batch["labels"] != -100).sum()) for batch in batches]
    large = [batch for batch, tokens in zip(batches, supervised, strict=True) if tokens > most]
    if not large:
        what = f"eva needs a batch with more supervised tokens than r = {most}; the first batches have at most "
        what += f"{max(supervised)}"
        fix = "raise training.per_device_train_batch_size, or lower lora.r"
        raise DataError(Problem(Code.LORA_UNSUPPORTED, what, key=KEY, fix=fix))
    forwards, inner = 0, model.get_base_model()
    was_training = inner.training

    def forward(wrapped: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        nonlocal forwards
        forwards += 1
        if forwards > _MOST_FORWARDS:
            what = f"eva's directions did not settle in {_MOST_FORWARDS} batches"
            fix = "lower lora.r, or use another initialization"
            raise ModelError(Problem(Code.LORA_UNSUPPORTED, what, key=KEY, fix=fix))
        wrapped(**{name: tensor for name, tensor in inputs.items() if name != "labels"}, use_cache=False)

    with torch.no_grad():
        options = {"show_progress_bar": False, "gather_distributed_inputs": False}  # each process has all batches
        directions = get_eva_state_dict(model, large, peft_config=config, forward_fn=forward, **options)
        for name, values in directions.items():
            model.get_submodule(name).lora_A["default"].weight.copy_(values)
    inner.train(was_training)  # PEFT has set it to the mode of the wrapper


def loftq(model: PeftModel, original: Callable[[str], torch.Tensor]) -> None:
    """Set A and B to the best rank-r approximation of what 4 bits lost of each weight, in place.

    One step of Li et al. 2023, arXiv:2310.08659, as in `peft.replace_lora_weights_loftq`, which needs a GPU and ignores
    the scaling.

    Args:
        model: The model with the fresh adapter.
        original: Path of a linear layer in the base → its weight before quantization, (out, in).

    Raises:
        ModelError: A target is not a 4-bit layer.
    """
    for name, layer in _lora_layers(model):
        path = name.removeprefix(WRAPPER_PREFIX)
        if not isinstance(layer, upstream.Linear4bit):
            kind = type(layer.get_base_layer()).__name__
            what = f"loftq starts from 4-bit layers; {path} is a {kind}"
            raise ModelError(Problem(Code.LORA_UNSUPPORTED, what, key=KEY))
        quantized = upstream.dequantize_module_weight(layer.get_base_layer()).float()
        error = original(path).to(quantized) - quantized
        rank, scale = layer.r["default"], layer.scaling["default"]
        u, singular, v = torch.svd_lowrank(error, q=min(rank + 8, *error.shape), niter=8)
        root = (singular[:rank] / scale).sqrt()
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(root[:, None] * v.T[:rank])
            layer.lora_B["default"].weight.copy_(u[:, :rank] * root)


def _lora_layers(model: PeftModel) -> Iterable[tuple[str, LoraLayer]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer))


def _is_b(name: str) -> bool:
    return "lora_B" in name or "lora_embedding_B" in name
