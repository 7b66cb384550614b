"""What `loratune env --self-test` compares with references: operations, accelerated layers; and the speed of a step."""

import time
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from loratune import kernels
from loratune.config import LoraSection
from loratune.data.batches import Put, flatten, pad
from loratune.data.packing import share_prefixes
from loratune.kernels import gpu
from loratune.kernels.compiled import fused_ops, reference
from loratune.kernels.compiled.operations import (
    BRANCHES,
    PLAIN,
    TOLERANCE,
    attention,
    attention_inputs,
    differences,
    drawn,
    largest,
)
from loratune.lora import attach, creation
from loratune.system import accelerator

LAYERS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""The largest relative difference of losses, gradients and logits of models with kernels, by dtype."""
MISCOMPUTED = "not compute the same", "computes something else"
"""Texts of notes on layers that are not accelerated and prefixes that are not shared, where kernels are wrong."""
SHAPE: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": 256,
}  # fmt: skip
_WINDOWS = {"head_dim": 16, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.0}
_EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LONG = 2048
"""Tokens of a row that torch's own kernel computes in float32."""
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], Sequence[int]]] = {
    "Llama": ("llama", {}, {}, (40, LONG)),
    "Llama with dropout": ("llama", {"attention_bias": True}, {"lora_dropout": 0.25}, (40, 9, 1, 70)),
    "Gemma 2": ("gemma2", _WINDOWS | _CAPS, {}, (40, 9, 1, 70)),
    "Qwen3 with experts": ("qwen3_moe", {"head_dim": 16, **_EXPERTS}, {}, (40, 9, 1, 70)),
    "GPT-OSS": ("gpt_oss", _WINDOWS | _EXPERTS, {"target_modules": ["q", "k", "v", "o"]}, (40, 9, 1, 70)),
}
"""Models that have all kinds of layers that kernels replace → type, configuration, settings of LoRA, tokens of rows.
Each token uses all experts, as rounding could change which."""
SPEED_ROWS, TIMED_STEPS = (16, 32, 48, 64, 96, 128, 192, 256), 3
"""Tokens of the rows; steps that are timed, after as many that are not."""


class NotAvailableError(Exception):
    """What is checked does not exist here."""


class DifferenceError(Exception):
    """A result differs from the one that is expected."""


def operations(dtype: torch.dtype) -> str:
    """Each compiled operation against its reference, forward and backward; and what else is computed in its place."""
    ops = fused_ops.loaded(dtype)
    if ops is None:
        raise NotAvailableError(fused_ops.refusal(torch.zeros(1, dtype=dtype)))
    worst = differences(ops, dtype)
    for name, compute in _OTHERS.items():
        worst[name] = largest(*compute(dtype))
    return _told("operations", worst, TOLERANCE[dtype])


def layers(dtype: torch.dtype, device: torch.device) -> str:
    """Losses, gradients and logits of `MODELS`, with random A and B, against those of stock PEFT."""
    worst = dict[str, float]()
    for name, (kind, changes, lora, lengths) in MODELS.items():
        if (LONG in lengths and dtype != torch.float32) or ("lora_dropout" in lora and device.type != "cpu"):
            continue  # The same as others then; or masks that depend on the dtype.
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SHAPE | changes | {"pad_token_id": None})).to(
            device, dtype
        )
        values: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
        model = creation.adapt(base, LoraSection(**values | lora), seed=0)[0].train()
        for path, weight in model.named_parameters():
            if "lora_B" in path:
                nn.init.normal_(weight, std=0.1)
        worst[name] = largest(*_with_and_without(model, lengths))
    return _told("models", worst, LAYERS_TOLERANCE[dtype])


def _with_and_without(model: Any, lengths: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """What a PEFT model computes without kernels, and with them. lengths: of rows. Raises DifferenceError: kernels are
    not used, because they compute something else."""
    padded, ids = partial(pad, pad_id=0), torch.arange(8, device=model.device)[None]
    stock = _step(model, lengths, flatten) + _step(model, lengths, padded)
    found = kernels.accelerate(model, attach.adapted_linear)
    with found.applied(model):
        refusal = found.tree_refusal(model) or ""
        own = _step(model, lengths, flatten) + _step(model, lengths, padded if refusal else share_prefixes)
    reasons = [*found.fallbacks.values(), refusal] if model.device.type == "cpu" else []  # a GPU's have no caps
    reasons += [f"{name} computes something else than its kernel" for name in found.unequal]
    if wrong := [reason for reason in reasons if any(text in reason for text in MISCOMPUTED)]:
        raise DifferenceError(f"{model.config.model_type}: {wrong[0]}")
    with torch.inference_mode():
        stock.append(model.eval()(ids, use_cache=False).logits)
        with kernels.inference_lora(model, attach.adapted_linear):
            return stock, [*own, model(ids, use_cache=False).logits]


def _step(model: Any, lengths: Sequence[int], put: Put) -> list[Tensor]:
    """The loss of rows that begin alike, with weights of labels if they are flattened, else of rows; and the gradients
    of all A and of all B."""
    rows = list[dict[str, list[int]]]()
    for factor, length in enumerate(lengths, 3):
        ids = [place * (factor if place >= 8 else 1) % SHAPE["vocab_size"] for place in range(length)]
        rows.append({"input_ids": ids, "labels": ids})
    batch = kernels.to_device(put(rows), model.device)
    labels, places, sizes = batch.pop("labels"), batch.pop("places", None), torch.tensor(lengths)
    torch.manual_seed(0)
    kernels.set_loss_targets(model, labels, places, None if put is flatten else sizes)
    if put is flatten:
        weights = 0.5 + labels % 3
        kernels.set_loss_weights(model, weights)
        loss, _ = kernels.next_token_loss(model, model(**batch, use_cache=False).logits, labels, weights)
    else:
        sums = kernels.row_sums(model, model(**batch, use_cache=False).logits, labels, sizes)
        loss = sums @ torch.arange(1, len(rows) + 1).to(sums)
    gradients = torch.autograd.grad(loss, [weight for weight in model.parameters() if weight.requires_grad])
    return [loss.detach(), *(torch.cat([one.flatten() for one in gradients[side::2]]) for side in (0, 1))]


def _told(what: str, differences: dict[str, float], allowed: float) -> str:
    """A line on the largest difference. Raises DifferenceError: it is not allowed."""
    name, worst = max(differences.items(), key=lambda item: item[1])
    detail = f"{len(differences)} {what}, largest relative difference {worst:.1e} ({name})"
    if not worst <= allowed:
        raise DifferenceError(f"{detail}, {allowed:g} is allowed")
    return detail


def _attention_of_gpu(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Attention of a GPU beside the reference, forward only: it has no backward pass on a CPU."""
    query, key, value = attention_inputs(dtype)
    heads = query.transpose(1, 2).flatten(0, 1)[None], key[None], value[None]
    found = gpu.TreeAttention().attend(*heads, BRANCHES[None], 9, PLAIN.scale).flatten(2)[0]
    return attention(reference, dtype, 9)[:1], [found]


def _retention(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The divergence from the most probable tokens of a teacher, where all others are one outcome, and its gradient;
    beside those by plain torch."""
    scores, teacher = drawn(dtype, 37, 264).float().requires_grad_(), drawn(torch.float32, 37, 264, seed=1)
    ids, top = kernels.most_probable(teacher, 20)

    def merged(logits: Tensor) -> Tensor:
        shares = logits.double().softmax(-1)
        return torch.cat([shares.gather(1, ids), 1 - shares.gather(1, ids).sum(1, keepdim=True)], 1)

    plain = (merged(teacher) * (merged(teacher).log() - merged(scores).log())).sum(1)
    both = (plain, kernels.divergence(scores, ids, top))
    expected, found = ([one.detach(), *torch.autograd.grad(one.sum(), scores)] for one in both)
    return expected, found


_OTHERS = {"attention of a GPU": _attention_of_gpu, "divergence from a teacher": _retention}
"""Name → function of a dtype that returns what is expected, and what is computed."""


def dequantized(model: Any) -> dict[str, Tensor]:
    """The weights of the quantized layers of a model, computed by plain torch: name → (out, in), float32."""
    from bitsandbytes.functional import dequantize_blockwise
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    found = dict[str, Tensor]()
    for name, layer in model.named_modules():
        if isinstance(layer, Linear8bitLt):
            held = layer.weight if layer.weight.CB is not None else layer.state
            found[name] = held.CB.float() * (held.SCB / 127)[:, None]
        elif isinstance(layer, Linear4bit):
            state = layer.weight.quant_state
            scales = state.absmax.float()
            if state.nested:
                scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
            blocks = scales.new_empty(len(scales), state.blocksize)
            packed = layer.weight.data.view(torch.uint8).view(len(scales), -1)
            reference.dequantize_4bit(blocks, packed, scales, state.code)
            found[name] = blocks.view(state.shape)
    return found


def step_seconds(model: Any, put: Put) -> float:
    """The median time of forward and backward passes over rows of unequal length. put: collates rows."""
    seconds = list[float]()
    for _ in range(2 * TIMED_STEPS):
        start = time.monotonic()
        _step(model, SPEED_ROWS, put)
        accelerator.synchronize(model.device)
        seconds.append(time.monotonic() - start)
    return median(seconds[TIMED_STEPS:])
