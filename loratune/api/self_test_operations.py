"""Operations of `loratune env --self-test` that are compared with references, and the speed of a step."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from loratune import kernels
from loratune.kernels.compiled import fused_ops, reference
from loratune.kernels.layout import Layout, Scoring
from loratune.kernels.parity_check import relative_rms
from loratune.system import accelerator

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""The largest relative difference of an operation from its reference, by dtype."""
SPEED_ROWS, TIMED_STEPS = (16, 32, 48, 64, 96, 128, 192, 256), 3
"""Tokens of the rows; steps that are timed, after as many that are not."""


class NotAvailableError(Exception):
    """What is checked does not exist here."""


class DifferenceError(Exception):
    """A result differs from the one that is expected."""


def operations(dtype: torch.dtype) -> str:
    """Each compiled operation against its reference, forward and backward."""
    like = torch.zeros(1, dtype=dtype)
    if refusal := fused_ops.refusal(like):
        raise NotAvailableError(refusal)
    ops, worst = fused_ops.fused_ops(like), dict[str, float]()
    for name, compute in _OPERATIONS.items():
        pairs = zip(compute(ops, dtype), compute(reference, dtype), strict=True)
        worst[name] = max(relative_rms(old, now) for now, old in pairs)
    name = max(worst, key=lambda one: worst[one])
    told = f"{len(worst)} operations, largest relative difference {worst[name]:.1e} ({name})"
    if not worst[name] <= TOLERANCE[dtype]:
        raise DifferenceError(f"{told}, {TOLERANCE[dtype]:g} is allowed")
    return told


def _drawn(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _norm(ops: Any, dtype: torch.dtype) -> list[Tensor]:
    x, weight, gradient = _drawn(dtype, 37, 96), _drawn(dtype, 96, seed=1), _drawn(dtype, 37, 96, seed=2)
    y, inverse = ops.rms_norm(x, weight, 1e-5)
    return [y, ops.rms_norm_backward(gradient, x, weight, inverse)]


def _gate(ops: Any, dtype: torch.dtype) -> list[Tensor]:
    both, gradient = _drawn(dtype, 37, 192), _drawn(dtype, 37, 96, seed=1)
    return [ops.swiglu(both), ops.swiglu_backward(gradient, both)]


def _heads(ops: Any, dtype: torch.dtype) -> list[Tensor]:
    joined, angle = _drawn(dtype, 37, (2 * 3 + 2 * 2) * 16), _drawn(torch.float32, 37, 8, seed=1)
    cosine, sine = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    split = ops.split_heads(joined, cosine, sine, 2, 3)
    return [*split, ops.join_heads(*split, cosine, sine)]


def _attention(ops: Any, dtype: torch.dtype) -> list[Tensor]:
    positions = torch.cat([torch.arange(length) for length in (20, 5, 70)])
    shapes = [(2, 95, 3, 16), (2, 95, 16), (2, 95, 16)]
    inputs = tuple(_drawn(dtype, *shape, seed=seed) for seed, shape in enumerate(shapes))
    layout, scoring = Layout.of(positions, None, 48), Scoring(0.25)
    outputs = ops.attend(*inputs, layout, scoring)
    gradient = _drawn(dtype, 95, 2 * 3 * 16, seed=3)
    return [outputs[0], *ops.attend_backward(gradient, outputs, inputs, layout, scoring)]


def _update(ops: Any, dtype: torch.dtype) -> list[Tensor]:
    y, x = _drawn(dtype, 37, 48), _drawn(dtype, 37, 32, seed=1)
    ops.add_lora(y, x, _drawn(dtype, 8, 32, seed=2), _drawn(dtype, 8, 48, seed=3))
    return [y]


def _weight(ops: Any, dtype: torch.dtype) -> list[Tensor]:
    y, weight = torch.zeros(37, 96, dtype=dtype), torch.arange(37 * 96).view(37, 96).to(torch.int8)
    scales = _drawn(torch.float32, 37).abs()
    ops.dequantize(y, weight, scales)
    return [y, *(ops.linear_8bit(_drawn(dtype, tokens, 96), weight, scales) for tokens in (1, 4, 37))]


def _loss(ops: Any, dtype: torch.dtype) -> list[Tensor]:
    logits, targets = _drawn(dtype, 37, 264), torch.arange(37)
    return [ops.cross_entropy(logits, targets), logits]


_OPERATIONS: dict[str, Callable[[Any, torch.dtype], list[Tensor]]] = {
    "norm": _norm, "gate": _gate, "heads": _heads, "attention": _attention, "LoRA": _update, "loss": _loss,
    "8-bit weight": _weight,
}  # fmt: skip


def step_seconds(model: Any, put: Callable[[Any], dict[str, Tensor]]) -> float:
    """The median time of forward and backward passes over rows of unequal length. put: collates rows."""
    rows = [{"input_ids": [*range(length)], "labels": [*range(length)]} for length in SPEED_ROWS]
    batch = kernels.to_device(put(rows), model.device)
    labels, seconds = batch.pop("labels"), list[float]()
    for _ in range(2 * TIMED_STEPS):
        start = time.monotonic()
        kernels.set_loss_targets(model, labels)
        loss, _ = kernels.next_token_loss(model, model(**batch, use_cache=False).logits, labels)
        torch.autograd.backward(loss)
        model.zero_grad()
        accelerator.synchronize(model.device)
        seconds.append(time.monotonic() - start)
    return median(seconds[TIMED_STEPS:])
