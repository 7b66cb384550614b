"""What the compiled operations compute, beside what their reference in torch computes.

A library that this machine's compiler, or its processor, makes compute something else is not used, see `fused_ops`.
The check takes 0.1 s on one thread, for a second dtype 0.02 s, and is made in each process.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loratune.kernels.compiled import reference
from loratune.kernels.layout import Layout, Scoring
from loratune.kernels.upstream import unset_fake_temporarily

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
"""The largest relative difference of an operation from its reference, by dtype."""
BRANCHES = torch.cat([torch.arange(*span) for span in ((0, 70), (40, 60), (3, 8))])
"""Positions of rows that share prefixes."""
PLAIN, SPECIAL = Scoring(0.25), Scoring(1.0, 3.0, torch.linspace(-2, 2, 6))
"""How scores of attention are computed; the second with caps and sinks."""
TOKENS = 1, 2, 3, 4, 5, 37
"""Tokens of products with quantized weights, which are computed in another way for few tokens."""


def differences(ops: Any, dtype: torch.dtype) -> dict[str, float]:
    """The largest relative difference of each operation from its reference, forward and backward; infinite where a
    value is not finite. ops: a `CompiledOps` of this dtype."""
    with unset_fake_temporarily(), torch.device("cpu"), torch.no_grad():
        return {name: largest(compute(reference, dtype), compute(ops, dtype)) for name, compute in OPERATIONS.items()}


def largest(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest relative difference of pairs of tensors; infinite where one is not finite."""
    values = [relative_rms(*pair) for pair in zip(expected, found, strict=True)]
    return max(math.inf if math.isnan(one) else one for one in values)


def relative_rms(old: Tensor, new: Tensor) -> float:
    """The root mean square of the difference relative to that of `old`; NaN if a tensor is not finite."""
    size = float(old.float().square().mean().sqrt())
    difference = float((old.float() - new.float()).square().mean().sqrt())
    return difference / size if size else difference


def drawn(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Normal values of a shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _norm(ops: Any, dtype: torch.dtype, added: float = 0.0) -> list[Tensor]:
    x, weight, gradient = drawn(dtype, 37, 96), drawn(dtype, 96, seed=1), drawn(dtype, 37, 96, seed=2)
    y, inverse = ops.rms_norm(x, weight, 1e-5, added)
    return [y, inverse, ops.rms_norm_backward(gradient, x, weight, inverse, added)]


def _gate(ops: Any, dtype: torch.dtype, activation: tuple[float, float] = reference.SILU) -> list[Tensor]:
    both, gradient = drawn(dtype, 37, 192), drawn(dtype, 37, 96, seed=1)
    return [ops.swiglu(both, *activation), ops.swiglu_backward(gradient, both, *activation)]


def _heads(ops: Any, dtype: torch.dtype) -> list[Tensor]:
    joined, angle = drawn(dtype, 37, (2 * 3 + 2 * 2) * 16), drawn(torch.float32, 37, 8, seed=1)
    cosine, sine = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    split = ops.split_heads(joined, cosine, sine, 2, 3)
    return [*split, ops.join_heads(*split, cosine, sine)]


def attention_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, see `reference.attend`."""
    return drawn(dtype, 2, 95, 3, 16), drawn(dtype, 2, 95, 16, seed=1), drawn(dtype, 2, 95, 16, seed=2)


def attention(ops: Any, dtype: torch.dtype, window: int | None = None, scoring: Scoring = PLAIN) -> list[Tensor]:
    """Result, totals and gradients of attention in rows that share prefixes. window: see `Layout.of`."""
    inputs, layout = attention_inputs(dtype), Layout.of(BRANCHES, window, 48)
    outputs = ops.attend(*inputs, layout, scoring)
    gradient = drawn(dtype, 95, 2 * 3 * 16, seed=3)
    return [*outputs, *ops.attend_backward(gradient, outputs, inputs, layout, scoring)]


def _update(ops: Any, dtype: torch.dtype) -> list[Tensor]:
    y, x = drawn(dtype, 37, 48), drawn(dtype, 37, 32, seed=1)
    ops.add_lora(y, x, drawn(dtype, 8, 32, seed=2), drawn(dtype, 8, 48, seed=3))
    return [y]


def _weight(ops: Any, dtype: torch.dtype) -> list[Tensor]:
    y, weight = torch.zeros(37, 96, dtype=dtype), torch.arange(37 * 96).view(37, 96).to(torch.int8)
    scales = drawn(torch.float32, 37).abs()
    ops.dequantize(y, weight, scales)
    numbers, most = ops.quantize_8bit(drawn(dtype, 37, 96))
    products = (ops.linear_8bit(drawn(dtype, tokens, 96), weight, scales) for tokens in TOKENS)
    return [y, numbers.to(dtype), most, *products]


def _weight_4bit(ops: Any, dtype: torch.dtype) -> list[Tensor]:
    """Of 37 outputs, with three blocks of 64 weights each."""
    code, blocks = torch.linspace(-1, 1, 16), drawn(dtype, 111, 64)
    numbers, most = ops.quantize_4bit(blocks, (code[1:] + code[:-1]) / 2, torch.arange(16).to(torch.uint8))
    y, numbers = torch.zeros(111, 64, dtype=dtype), numbers.view(111, 32)
    ops.dequantize_4bit(y, numbers, most, code)
    rows = numbers.view(37, 96)
    products = (ops.linear_4bit(drawn(dtype, tokens, 192), rows, most, code) for tokens in TOKENS)
    return [y, numbers.to(dtype), most, *products]


def _loss(ops: Any, dtype: torch.dtype, weights: Tensor | None = None) -> list[Tensor]:
    logits, targets = drawn(dtype, 37, 264), torch.arange(37)
    return [ops.cross_entropy(logits, targets, weights), logits]


OPERATIONS: dict[str, Callable[[Any, torch.dtype], list[Tensor]]] = {
    "norm": _norm, "norm that adds 1": partial(_norm, added=1.0),
    "gate": _gate, "gate by GELU": partial(_gate, activation=reference.GELU),
    "heads": _heads, "LoRA": _update, "8-bit weight": _weight, "4-bit weight": _weight_4bit,
    "attention": attention,
    "attention with a window, caps and sinks": partial(attention, window=9, scoring=SPECIAL),
    "loss": _loss, "loss with weights": partial(_loss, weights=drawn(torch.float32, 37, seed=4).abs()),
}  # fmt: skip
"""Name → function of the operations, or the reference, and a dtype that returns what is compared."""
