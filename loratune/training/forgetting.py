"""What training has cost elsewhere: on the rows of the run before, and on text that no rows are about."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loratune import kernels
from loratune.console import plural
from loratune.data import TokenizedDataset
from loratune.lora import tensors
from loratune.lora.attach import PeftModel
from loratune.lora.initialize import AdapterInit
from loratune.lora.tensors import Weights
from loratune.statistics import finite
from loratune.system.launcher import Group
from loratune.training import gain
from loratune.training.batching import UnrelatedText
from loratune.training.continuing import EarlierRun
from loratune.training.final_score import row_losses
from loratune.training.gain import Gain
from loratune.training.losses import ScoringLayout

_PASSAGES = 12
"""Rows of unrelated text that are read."""
_WORTH_TELLING = 0.1
"""Nats per token from which on a loss on unrelated text is remarked on; its perplexity is a tenth higher then."""


@dataclass(frozen=True)
class Forgetting:
    """What training has changed on rows that it did not read.

    Attributes:
        comparison: The model before its first step, as `base`, and the trained one, on the same rows; None if the rows
            are not known.
        rows: What rows these are.
        unknown: Why they are not known.
        before: What the model before its first step is called.
    """

    comparison: Gain | None
    rows: str = ""
    unknown: str = ""
    before: str = "loss"

    def __str__(self) -> str:
        """A line with the loss before and after."""
        if (measured := self.comparison) is None:
            return f"not measured: {self.unknown}"
        change = -measured.better_by
        interval = ""
        if measured.low is not None and measured.high is not None:
            interval = f", 95 % interval {-measured.high:+.4f} to {-measured.low:+.4f}"
        return f"{self.before} {measured.base:.4f} → {measured.adapter:.4f} on {self.rows} ({change:+.4f}{interval})"

    def as_json(self) -> dict[str, Any]:
        """Plain values: losses in nats per supervised token, and their `change`, above 0 where something was forgotten.

        A loss that is not finite is null.
        """
        if (measured := self.comparison) is None:
            return {"not_measured": self.unknown}
        low, high = measured.low, measured.high
        return {
            "split": measured.split,
            "rows": measured.rows,
            "drawn": measured.drawn,
            "total": measured.total,
            "before": finite(measured.base),
            "after": finite(measured.adapter),
            "change": finite(-measured.better_by),
            "low": None if high is None else -high,
            "high": None if low is None else -low,
        }

    @property
    def remark(self) -> str:
        """A line on what unrelated text has lost, where that is much and certain; else empty."""
        measured = self.comparison
        if measured is None:
            return ""
        if math.isfinite(measured.better_by) and (measured.high is None or -measured.high < _WORTH_TELLING):
            return ""
        change = f"by {-measured.better_by:.2f} nats per token" if math.isfinite(measured.adapter) else "beyond measure"
        return (
            f"what the base could do elsewhere has suffered, {change} on unrelated text; where that matters, lower "
            "training.learning_rate, or add rows of other kinds to data.train"
        )


def of_earlier_run(
    run: EarlierRun,
    model: PeftModel,
    start: AdapterInit,
    trained: Weights,
    scoring: ScoringLayout,
    budget: int,
    acceleration: kernels.Acceleration,
    group: Group,
    log: Callable[[str], None],
) -> Forgetting:
    """Compare a trained adapter with the one that it started from, on rows of the earlier run; see `gain.measure`.

    Args:
        run: The earlier run.
        model: The base with the adapter, as it was trained.
        start: The adapter before its first step.
        trained: Its tensors now, whole.
        scoring: How rows stand in batches.
        budget: Tokens that the run was trained on.
        acceleration: What of the model the kernels compute.
        group: The processes of the run.
        log: Takes a line on what is being done.
    """
    if run.held_out is None:
        return Forgetting(None, unknown=run.unknown)
    before = tensors.as_started(model, start, trained)
    rows, name = {run.split: run.held_out}, f"the one it started from, {run.start.info.files.path},"
    comparison = gain.measure(model, before, rows, scoring, budget, acceleration, group, log, name)
    return Forgetting(comparison, f"{comparison.sampled_rows()} of the earlier run")


def of_unrelated_text(
    text: UnrelatedText,
    model: PeftModel,
    start: AdapterInit,
    trained: Weights,
    scoring: ScoringLayout,
    acceleration: kernels.Acceleration,
    group: Group,
) -> Forgetting:
    """Compare a trained adapter with its base on passages of a text. Other arguments as of `of_earlier_run`."""
    if (rows := text.rows) is None:
        return Forgetting(None, unknown=text.unknown)
    numbers = passages(rows)
    how = rows, numbers, scoring, acceleration, group
    after = row_losses(model, *how)
    with tensors.as_initialized(model, start, trained):
        before = row_losses(model, *how)
    comparison = gain.compare(before, after, "unrelated", total=rows.items)
    longest = max(rows.rows.lengths[number] for number in numbers)
    what = f"{plural(len(numbers), 'passage')} of general English, {longest} tokens at most"
    return Forgetting(comparison, what, before="base")


def passages(rows: TokenizedDataset) -> range:
    """The numbers of the rows that are read of unrelated text."""
    return range(min(_PASSAGES, rows.items))
