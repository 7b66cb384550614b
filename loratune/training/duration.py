"""About how long training will take: its arithmetic, and how fast this machine computes a layer's at the moment.

The measurement is forward and backward through a stand-in for a decoder layer with random weights, so that neither the
base nor its weights are needed. Loading, the checks before the first step, and publishing are not counted.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

_FORWARD_AND_BACKWARD = 2 * 2
"""Operations for each weight of the frozen base and each token: a multiplication and an addition, forward and for the
gradient of the input. There is none of the weight."""
_RECOMPUTED = 2
"""The same for what is computed once more."""
_ATTENTION = 2 * 3
"""Operations for each layer, hidden unit and pair of tokens of a row: two products, as much twice over backward, and
half of the pairs are masked."""
_EFFICIENCY = 0.5
"""The part of the stand-in's speed that training reaches, for all that it lacks: so much did SmolLM2-135M on rows of 37
tokens (663 tokens a second, one thread of a Xeon with AMX). On rows of 512 tokens it reached 0.8. It was not compared
on other processors, nor on a GPU."""
_WIDTH, _TOKENS = 4096, 2048
"""The largest hidden size and batch of the stand-in."""
_SECONDS, _SHARE, _REPEATS = 3.0, 0.01, 5
"""How long it is repeated at most, also as a part of the estimate, and how often at least. On a busy machine a process
is fast in its first second, before its share of the processors is used up."""


@dataclass(frozen=True)
class Work:
    """What is computed in a run.

    Attributes:
        tokens: Tokens that are trained on.
        supervised: Those at which there are logits.
        pairs: Pairs of tokens of one row, which attention compares.
    """

    tokens: int
    supervised: int
    pairs: int

    @classmethod
    def of_rows(cls, lengths: NDArray[np.int64], supervised: NDArray[np.int64], passes: float) -> "Work":
        """The work of so many passes over rows of these lengths; both arrays (rows,)."""
        return cls(*(round(passes * int(np.sum(counts))) for counts in (lengths, supervised, lengths * lengths)))


def operations(model: Any, work: Work, *, checkpointed: bool) -> int:
    """Floating-point operations of training a `PeftModel`, which may be on the meta device.

    checkpointed: whether activations are recomputed.
    """
    base = model.get_base_model()
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    experts = base.config.get_text_config().to_dict()
    layers = max((len(module) for module in model.modules() if isinstance(module, nn.ModuleList)), default=1)
    weights = sum(
        _used(parameter, experts)
        for name, parameter in base.named_parameters()
        if parameter.dim() > 1 and parameter.shape[0] != vocabulary and "lora_" not in name
    )
    per_weight = _FORWARD_AND_BACKWARD + (_RECOMPUTED if checkpointed else 0)
    logits = _FORWARD_AND_BACKWARD * vocabulary * hidden * work.supervised
    return int(per_weight * weights * work.tokens + logits + _ATTENTION * layers * hidden * work.pairs)


def _used(parameter: nn.Parameter, experts: Mapping[str, Any]) -> int:
    """Weights that a token is multiplied with: of experts, which are stacked, those that it is sent to."""
    chosen = experts.get("num_experts_per_tok")
    if parameter.dim() == 3 and isinstance(chosen, int):
        return parameter.numel() * min(chosen, parameter.shape[0]) // parameter.shape[0]
    return parameter.numel()


def seconds(operations: int, width: int, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """About how long so many operations take here, after a measurement of at most three seconds.

    Args:
        operations: See `operations`.
        width: The hidden size of the model.
        tokens: Of a batch.
        dtype: What the model computes in.
        device: Where.
    """
    side, count = min(width, _WIDTH), min(max(tokens, 1), _TOKENS)
    layer = _StandIn(side).to(device=device, dtype=dtype).requires_grad_(False)
    states = torch.randn(count, side, dtype=dtype, device=device).requires_grad_()
    weights = sum(parameter.numel() for parameter in layer.parameters())
    repeats = operations / (_EFFICIENCY * _FORWARD_AND_BACKWARD * weights * count)
    _step(layer, states)  # the first also compiles
    estimate, done, start = 0.0, 0, time.perf_counter()
    while done < _REPEATS or estimate * done / repeats < min(_SECONDS, _SHARE * estimate):
        _step(layer, states)
        done += 1
        estimate = (time.perf_counter() - start) / done * repeats
    return estimate


def _step(layer: nn.Module, states: torch.Tensor) -> None:
    layer(states).sum().backward()
    if states.is_cuda:
        torch.cuda.synchronize(states.device)


class _StandIn(nn.Module):
    """A gated MLP with norm and residual, of as many weights as a decoder layer: 12 times the hidden size squared."""

    def __init__(self, side: int):
        super().__init__()
        self.norm = nn.RMSNorm(side)
        self.gate, self.up = (nn.Linear(side, 4 * side, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * side, side, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        normed = self.norm(states)
        updated: torch.Tensor = self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))
        return states + updated
