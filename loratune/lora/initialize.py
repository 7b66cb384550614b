"""How an adapter starts: from directions of the base (PiSSA, OLoRA) or the data (EVA), or what 4 bits lose (LoftQ).

PiSSA (Meng et al. 2024, arXiv:2404.02948) and OLoRA (Büyükakyüz 2024, arXiv:2406.01775) move a part of the base into
the adapter. It is trained there, and given back on saving: with W = R + s·B0·A0 at the start, the result R + s·B·A is
W + s·[B, -B0]·[A; A0], so the file holds a plain LoRA of rank 2r that fits the base as it was.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, get_eva_state_dict
from peft.tuners.lora.bnb import Linear4bit
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from loratune.config import LoraSection
from loratune.errors import DataError, ModelError, Problem

KEY = "lora.init_lora_weights"
WRAPPER_PREFIX = "base_model.model."

# EVA's own loop (peft.tuners.lora.eva) goes round its batches until the directions stand still, for ever if need be.
_MOST_PASSES = 1000


@dataclass(frozen=True)
class AdapterInit:
    """An adapter before its first step. tensors: name → value; given_back: they were taken out of the base."""

    tensors: dict[str, torch.Tensor]
    to_plain_lora: bool

    def published(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a file that fits the base as it was; `state` holds those that were trained."""
        if not self.to_plain_lora:
            return state
        made = dict(state)
        for name, tensor in state.items():
            if "lora_A" in name:
                made[name] = torch.cat([tensor, self.tensors[name].to(tensor)], dim=0)
            elif "lora_B" in name:
                made[name] = torch.cat([tensor, -self.tensors[name].to(tensor)], dim=1)
        return made

    def publish_config(self, config: dict[str, Any]) -> None:
        """Say in an adapter_config.json, read as a dict, that the ranks are twice those that were trained."""
        if not self.to_plain_lora:
            return
        factor = 2**0.5 if config["use_rslora"] else 2  # so that lora_alpha / r, or / sqrt(r), stays what it was
        config["r"], config["lora_alpha"] = 2 * config["r"], factor * config["lora_alpha"]
        for pattern, by in (("rank_pattern", 2), ("alpha_pattern", factor)):
            config[pattern] = {name: by * value for name, value in (config[pattern] or {}).items()}

    def moved(self, state: Mapping[str, torch.Tensor]) -> bool:
        """Whether training changed any B, by more than nothing at all: an update begins where B does."""
        least = 1e-10  # the first step of Adam is as long as its learning rate
        steps = (tensor - self.tensors[name].to(tensor) for name, tensor in state.items() if _is_b(name))
        return any(step.abs().max() > least for step in steps)


def peft_start(section: LoraSection) -> Any:
    """What PEFT itself does while it attaches: EVA and LoftQ begin as plain LoRA, and are set afterwards."""
    return True if section.init_lora_weights in ("eva", "loftq") else section.init_lora_weights


def becomes_plain_lora(section: LoraSection) -> bool:
    """Whether this start takes a part out of the base."""
    return str(section.init_lora_weights).startswith(("pissa", "olora"))


def reads_base(section: LoraSection) -> bool:
    """Whether PEFT reads or writes the base's own weights for this start."""
    return becomes_plain_lora(section) or section.init_lora_weights == "orthogonal"


def check_layers(base: nn.Module, section: LoraSection, endings: tuple[str, ...]) -> None:
    """Refuse a start that does not fit the kind or the numbers of a layer whose path has one of these endings.

    Raises ModelError.
    """
    start, problems = section.init_lora_weights, {}
    owners = Counter(id(weight) for _, module in base.named_modules() for weight in module.parameters(recurse=False))
    for path, layer in base.named_modules():
        if not f".{path}".endswith(endings):
            continue
        kind = type(layer).__name__
        if reads_base(section) and not (isinstance(layer, nn.Linear | Conv1D) and layer.weight.is_floating_point()):
            problems[KEY] = f"{start} starts from the weights of linear layers in full; {path} is a {kind}"
        elif becomes_plain_lora(section) and owners[id(layer.weight)] > 1:
            problems[KEY] = f"{start} changes the weight it starts from, and that of {path} belongs to further modules"
        elif start == "olora" and isinstance(layer, Conv1D):
            problems[KEY] = f"PEFT's olora does not know the transposed weights of a Conv1D, which {path} is"
        elif section.use_lorafa and isinstance(layer, nn.Embedding):
            problems["lora.use_lorafa"] = f"LoRA-FA adapts linear layers; {path} is an {kind}"
    if problems:
        fix = "take another start, or other targets"
        raise ModelError([Problem(what, key=key, fix=fix) for key, what in problems.items()])


def check_ranks(model: PeftModel, section: LoraSection) -> None:
    """Refuse a rank of which a layer has no so many directions to start from.

    Raises ModelError.
    """
    if section.init_lora_weights in (True, "gaussian"):
        return
    for name, layer in _lora_layers(model):
        rank, most = layer.r["default"], min(layer.in_features, layer.out_features)
        if rank > most:
            what = f"{section.init_lora_weights} takes {rank} directions of a layer, and {name} has only {most}"
            raise ModelError(Problem(what.replace(WRAPPER_PREFIX, ""), key=KEY, fix=f"lower lora.r to {most}"))


def eva(model: PeftModel, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Set every A to the main directions of its layer's inputs at the learnt tokens, in place.

    batches: what the collator makes of the training rows; those with more than r learnt tokens are used. Ranks stay
    as they are (rho = 1). Paischer et al. 2024, arXiv:2410.07170. Raises DataError: too few learnt tokens. Raises
    ModelError: directions that do not settle.
    """
    config: LoraConfig = copy(model.peft_config["default"])
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0)
    most = max(layer.r["default"] for _, layer in _lora_layers(model))
    learnt = [int((batch["labels"] != -100).sum()) for batch in batches]
    enough = [batch for batch, tokens in zip(batches, learnt, strict=True) if tokens > most]
    if not enough:
        what = (
            f"eva needs more learnt tokens in a batch than r = {most}, and the first batches have {max(learnt)} at most"
        )
        raise DataError(Problem(what, key=KEY, fix="raise training.per_device_train_batch_size, or lower lora.r"))
    passes, inner = 0, model.get_base_model()
    was_training = inner.training

    def forward(wrapped: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        nonlocal passes
        passes += 1
        if passes > _MOST_PASSES:
            what = f"eva's directions did not settle in {_MOST_PASSES} batches"
            raise ModelError(Problem(what, key=KEY, fix="lower lora.r, or take another start"))
        wrapped(**{name: tensor for name, tensor in inputs.items() if name != "labels"}, use_cache=False)

    with torch.no_grad():
        quiet = {"show_progress_bar": False, "gather_distributed_inputs": False}  # each process has all batches
        found = get_eva_state_dict(model, enough, peft_config=config, forward_fn=forward, **quiet)
        for name, directions in found.items():
            model.get_submodule(name).lora_A["default"].weight.copy_(directions)
    inner.train(was_training)  # which PEFT has set to what the wrapper says


def loftq(model: PeftModel, original: Callable[[str], torch.Tensor]) -> None:
    """Set A and B to the best rank-r approximation of what 4 bits lost of each weight, in place.

    original: path of a linear layer in the base → its weight before quantization, (out, in). One step of Li et al.
    2023, arXiv:2310.08659, as in `peft.replace_lora_weights_loftq`, which needs a GPU and leaves out the scaling.
    Raises ModelError: a target that is not a 4-bit layer.
    """
    for name, layer in _lora_layers(model):
        path = name.removeprefix(WRAPPER_PREFIX)
        if not isinstance(layer, Linear4bit):
            kind = type(layer.get_base_layer()).__name__
            raise ModelError(Problem(f"loftq starts from 4-bit layers; {path} is a {kind}", key=KEY))
        held = dequantize_module_weight(layer.get_base_layer()).float()
        lost = original(path).to(held) - held
        rank, scale = layer.r["default"], layer.scaling["default"]
        left, singular, right = torch.svd_lowrank(lost, q=min(rank + 8, *lost.shape), niter=8)
        root = (singular[:rank] / scale).sqrt()
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(root[:, None] * right.T[:rank])
            layer.lora_B["default"].weight.copy_(left[:, :rank] * root)


def _lora_layers(model: PeftModel) -> Iterable[tuple[str, LoraLayer]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer))


def _is_b(name: str) -> bool:
    return "lora_B" in name or "lora_embedding_B" in name
