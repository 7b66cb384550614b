"""Estimates how long a run takes.

The time of a batch is proportional to its floating-point operations, which are counted from the lengths of its rows,
padding included: so the rows of each step decide, in the order in which the run reads them. Before a run,
`seconds_per_operation` measures the time of an operation by layers with random weights, so that neither the base nor
its weights are needed; a run with a time budget measures it by some of its batches, see `time_budget`.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from loratune.compare.objectives import WITH_REFERENCE
from loratune.config import ModelSection, RunConfig, TrainingSection
from loratune.data.packing import BatchLayout, Numbers, PackedRows
from loratune.lora import parameters
from loratune.lora.module_names import without_wrappers
from loratune.model import load
from loratune.system import accelerator
from loratune.training.batching import DistributedBatchSampler, would_share
from loratune.training.retention import SHARE
from loratune.training.schedule import Schedule

_FORWARD_AND_BACKWARD = 2 * 2
"""Operations for each weight of the frozen base and each token: a multiplication and an addition, forward and for the
gradient of the input. There is none of the weight."""
_OF_WEIGHT = 2
"""The same for the gradient of a weight that has an adapter in its place, as fused experts do (`target_parameters`)."""
_RECOMPUTED = 2
"""The same for what is computed once more."""
_ATTENTION = 2 * 3
"""Operations for each layer, hidden unit and pair of tokens of a row: two products, as much twice over backward, and
half of the pairs are masked."""
READ = 0.5
"""Operations of a token in a forward pass alone, as a fraction of those in training."""
WITH_MISMATCHED = 1.5
"""The factor of operations if each answer also has a mismatched row (forward only), from which KTO estimates the
divergence."""
_EFFICIENCY = 0.5
"""The part of the measured layers' speed that training reaches: so much did SmolLM2-135M on rows of 37 tokens (663
tokens a second, one thread of a Xeon with AMX). On rows of 512 tokens it reached 0.8. It was not compared on other
processors, nor on a GPU."""
_WIDTH, _TOKENS = 4096, 2048
"""The largest hidden size and batch that are measured."""
_SECONDS, _SHARE, _REPEATS = 3.0, 0.01, 5
"""How long it is repeated at most, also as a part of the estimate, and how often at least. On a busy machine a process
is fast in its first second, before its share of the processors is used up."""


@dataclass(frozen=True)
class Costs:
    """Floating-point operations of the batches of one layout.

    Attributes:
        layout: The batches.
        lengths: (rows,), tokens of each row.
        supervised: (rows,), supervised tokens of each row.
        weights: Operations for each token, each supervised one, and each pair of tokens of a row.
    """

    layout: BatchLayout
    lengths: NDArray[np.int64]
    supervised: NDArray[np.int64]
    weights: tuple[float, float, float]

    @classmethod
    def of_layout(
        cls, model: Any, layout: BatchLayout, lengths: Numbers, supervised: Numbers, *, checkpointed: bool
    ) -> Self:
        """The costs of training a `PeftModel`, which may be on the meta device; for the arrays see the attributes.

        checkpointed: whether activations are recomputed.
        """
        per_token, per_label, per_pair = _operations(model, checkpointed=checkpointed)
        computed = 1 - (layout.saved or 0.0)  # of the rows' own tokens, where these share prefixes
        weights = per_token * computed, per_label, per_pair * computed
        return cls(layout, np.asarray(lengths, np.int64), np.asarray(supervised, np.int64), weights)

    @classmethod
    def of_run(
        cls,
        model: Any,
        config: RunConfig,
        lengths: Numbers,
        supervised: Numbers,
        saved: float,
        rows_per_example: int = 1,
    ) -> Self:
        """The costs of a run without `auto`, with the batches of its config.

        Args:
            model: As in `of_layout`.
            config: The run.
            lengths: (rows,), or (pairs,) for the two answers of each pair together.
            supervised: Like `lengths`.
            saved: The approximate share of tokens saved by shared prefixes.
            rows_per_example: The number of answers per length.
        """
        size, checkpointed = config.training.per_device_train_batch_size, config.training.activation_checkpointing
        layout = BatchLayout(
            lengths, lengths, config.data.packing, size, rows_per_example * config.data.max_length, pad_id=0
        )
        if would_share(config, saved):
            layout = layout.sharing(saved)
        found = cls.of_layout(model, layout, lengths, supervised, checkpointed=checkpointed)
        if not config.has_retention:
            return found
        token, label, pair = found.weights
        return replace(found, weights=((1 + SHARE) * token, (1 + SHARE) * label, pair))

    def work(self, training: TrainingSection, held_out: int, share: float = 1.0) -> tuple[int, float]:
        """The steps of training in one process, and their operations, including evaluations and the reference pass.

        Args:
            training: The section, without `auto`.
            held_out: Tokens of the validation rows.
            share: The fraction of the rows that is trained on.
        """
        items, tokens = max(1, round(share * len(self.layout.items))), int(self.lengths.sum())
        schedule = Schedule.of(training, items, self.layout.size)
        evaluations = schedule.evaluations(training.eval_steps, round(share * tokens), held_out)
        one_pass = float(next(self.micro_steps(training.seed, 1)).sum())
        steps = one_pass * evaluations.trained / tokens * (1 + evaluations.share)
        if training.objective not in WITH_REFERENCE:
            return schedule.steps, steps
        twice = WITH_MISMATCHED if training.objective == "kto" else 1.0
        return schedule.steps, twice * (steps + READ * one_pass * (share + held_out / tokens))

    @property
    def of_rows(self) -> NDArray[np.float64]:
        """(rows,), the operations of each row without padding."""
        (token, label, pair), lengths = self.weights, self.lengths.astype(np.float64)
        return np.asarray(token * lengths + label * self.supervised + pair * lengths * lengths)

    def of_batches(self, items: NDArray[np.int64]) -> NDArray[np.float64]:
        """The operations of batches. items: (..., items of a batch), the numbers of the items. Returns (...)."""
        if self.layout.flat:
            costs = self.of_rows
            if isinstance(self.layout.items, PackedRows):
                packs = self.layout.items.packs
                costs = np.add.reduceat(costs[packs.order], packs.starts[:-1])
            return np.asarray(costs[items].sum(-1))
        each = len(self.lengths) // len(self.layout.items)  # rows of an item: two of a pair
        rows = (each * items[..., None] + np.arange(each)).reshape(*items.shape[:-1], -1)
        longest = self.lengths[rows].max(-1).astype(np.float64)
        token, label, pair = self.weights
        padded = rows.shape[-1] * (token * longest + pair * longest * longest)
        return np.asarray(padded + label * self.supervised[rows].sum(-1))

    def of_pass(self) -> tuple[int, float]:
        """The number of batches of one pass in order, and their operations."""
        numbers, size = np.arange(len(self.layout.items)), self.layout.size
        whole = len(numbers) // size * size
        total = float(self.of_batches(numbers[:whole].reshape(-1, size)).sum()) if whole else 0.0
        rest = numbers[whole:]
        return -(-len(numbers) // size), total + (float(self.of_batches(rest)) if len(rest) else 0.0)

    def micro_steps(self, seed: int, processes: int) -> Iterator[NDArray[np.float64]]:
        """Yields for each epoch, endlessly: (micro-steps,), the operations of the slowest process."""
        size = self.layout.size
        sampler = DistributedBatchSampler(len(self.layout.items), size * processes, seed)
        for epoch in count():
            sampler.set_epoch(epoch)
            order = np.asarray(sampler.order(), np.int64)
            whole = len(order) // (size * processes)
            shared = order[: whole * size * processes].reshape(whole, processes, size)
            costs = self.of_batches(shared).max(1) if whole else np.zeros(0)
            rest = order[whole * size * processes :]
            shares = [self.of_batches(share) for share in np.array_split(rest, processes) if len(share)]
            yield np.append(costs, max(shares)) if shares else costs


def _operations(model: Any, *, checkpointed: bool) -> tuple[float, float, float]:
    """Operations for each token, each supervised one, and each pair of tokens of a row, see `Costs`."""
    base = model.get_base_model()
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    experts = base.config.get_text_config().to_dict()
    layers = max((len(module) for module in model.modules() if isinstance(module, nn.ModuleList)), default=1)
    used = {
        without_wrappers(name): _used(parameter, experts)
        for name, parameter in base.named_parameters()
        if parameter.dim() > 1 and parameter.shape[0] != vocabulary and "lora_" not in name
    }
    per_weight = _FORWARD_AND_BACKWARD + (_RECOMPUTED if checkpointed else 0)
    adapted = sum(used.get(name, 0) for name in parameters.wrapped_parameters(model).values())
    per_token = per_weight * sum(used.values()) + _OF_WEIGHT * adapted
    logits = _FORWARD_AND_BACKWARD * vocabulary * hidden
    return float(per_token), float(logits), float(_ATTENTION * layers * hidden)


def _used(parameter: nn.Parameter, experts: Mapping[str, Any]) -> int:
    """The number of weights that a token is multiplied with: for stacked experts, only those it is routed to."""
    chosen = experts.get("num_experts_per_tok")
    if parameter.dim() == 3 and isinstance(chosen, int):
        return parameter.numel() * min(chosen, parameter.shape[0]) // parameter.shape[0]
    return parameter.numel()


def seconds_per_operation(model: Any, section: ModelSection, costs: Costs, operations: float) -> float:
    """The seconds per operation on this machine, measured in at most three seconds.

    Args:
        model: The `PeftModel`, which may be on the meta device; only its width is used.
        section: The model section, which determines the dtype.
        costs: The costs of its batches; a batch of average size is measured.
        operations: The operations to estimate; the measurement takes a small fraction of their time.
    """
    dtype, device = load.compute_dtype(section), load.device()
    side = min(int(model.get_input_embeddings().weight.shape[1]), _WIDTH)
    tokens = min(max(int(costs.lengths.sum()) // costs.of_pass()[0], 1), _TOKENS)
    layers = nn.Linear(side, 6 * side, bias=False), nn.SiLU(), nn.Linear(6 * side, side, bias=False)
    layer = nn.Sequential(*layers).to(device=device, dtype=dtype).requires_grad_(False)
    states = torch.randn(tokens, side, dtype=dtype, device=device).requires_grad_()
    weights = sum(parameter.numel() for parameter in layer.parameters())
    of_step = _EFFICIENCY * _FORWARD_AND_BACKWARD * weights * tokens
    _step(layer, states)  # the first also compiles
    found, done, start = 0.0, 0, time.perf_counter()
    while done < _REPEATS or found * of_step * done < min(_SECONDS, _SHARE * found * operations):
        _step(layer, states)
        done += 1
        found = (time.perf_counter() - start) / (done * of_step)
    return found


def _step(layer: nn.Module, states: torch.Tensor) -> None:
    layer(states).sum().backward()
    accelerator.synchronize(states.device)
