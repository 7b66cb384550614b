"""Operations of `loratune env --self-test` that are compared with references, and the speed of a step."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from loratune import kernels
from loratune.data.batches import flatten, pad
from loratune.kernels import gpu
from loratune.kernels.compiled import fused_ops, reference
from loratune.kernels.layout import Layout, Scoring
from loratune.kernels.parity_check import relative_rms
from loratune.system import accelerator

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""The largest relative difference of an operation from its reference, by dtype."""
SPEED_ROWS, TIMED_STEPS = (16, 32, 48, 64, 96, 128, 192, 256), 3
"""Tokens of the rows; steps that are timed, after as many that are not."""
PACK, TREE = ((0, 20), (0, 5), (0, 70)), ((0, 40), (20, 70), (60, 65), (20, 21), (0, 130))
"""Positions of packed rows, and of the branches of a tree."""


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


def _loss(ops: Any, dtype: torch.dtype) -> list[Tensor]:
    logits, targets = _drawn(dtype, 37, 264), torch.arange(37)
    return [ops.cross_entropy(logits, targets), logits]


_OPERATIONS: dict[str, Callable[[Any, torch.dtype], list[Tensor]]] = {
    "norm": _norm, "gate": _gate, "heads": _heads, "attention": _attention, "LoRA": _update, "loss": _loss,
}  # fmt: skip


def step_seconds(model: Any, *, fast: bool = True) -> float:
    """The median time of forward and backward passes over rows of unequal length.

    fast: packed, through our loss; otherwise padded, through the loss of the model.
    """
    rows = [{"input_ids": [*range(length)], "labels": [*range(length)]} for length in SPEED_ROWS]
    batch = kernels.to_device(flatten(rows) if fast else pad(rows, 0), model.device)
    seconds = list[float]()
    for _ in range(2 * TIMED_STEPS):
        start, labels = time.monotonic(), batch["labels"]
        if fast:
            kernels.set_loss_targets(model, labels)
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            loss = kernels.next_token_loss(model, model(**inputs, use_cache=False).logits, labels)[0]
        else:
            loss = model(**batch, use_cache=False).loss
        torch.autograd.backward(loss)
        model.zero_grad()
        accelerator.synchronize(model.device)
        seconds.append(time.monotonic() - start)
    return median(seconds[TIMED_STEPS:])


def attention(function: gpu.RowAttention, device: torch.device, dtype: torch.dtype) -> str:
    """An attention function for a GPU against a mask of all pairs of tokens: forward, and on a GPU backward."""
    positions = torch.cat([torch.arange(*span) for span in (TREE if isinstance(function, gpu.TreeAttention) else PACK)])
    visible = torch.zeros(len(positions), len(positions), dtype=torch.bool)
    for token, place in enumerate(positions.tolist()):
        earlier = torch.nonzero(positions[:token] < place)[:, 0]
        visible[token] = visible[earlier[-1]] if len(earlier) else False
        visible[token, token] = True
    given = [_drawn(dtype, 1, heads, len(positions), 64, seed=heads).to(device) for heads in (6, 2, 2)]

    def by_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = functional.scaled_dot_product_attention(query, key, value, visible.to(device), enable_gqa=True)
        return mixed.transpose(1, 2)

    def by_kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return function.attend(query, key, value, positions[None].to(device), None, None)

    results = []
    for attend in (by_mask, by_kernel):
        query, key, value = (x.detach().requires_grad_(device.type != "cpu") for x in given)
        found = attend(query, key, value)
        heads = query, key, value
        gradients = torch.autograd.grad(found.float().square().sum(), heads) if found.requires_grad else ()
        results.append([found.detach(), *gradients])
    worst = max(relative_rms(old, new) for old, new in zip(results[0], results[1], strict=True))
    told = f"largest relative difference from a mask of all pairs {worst:.1e}"
    if not worst <= TOLERANCE[dtype]:
        raise DifferenceError(f"{told}, {TOLERANCE[dtype]:g} is allowed")
    return told
