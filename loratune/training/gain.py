"""Whether an adapter does better than its base: the losses of both on the same rows, compared in pairs.

The measure is that of training, of the held-out loss and of `evaluate`: nats per supervised token, over all supervised
tokens; where answers are compared, the objective's loss per pair, which is then a row, or per answer. The sample,
however, is one of rows, as the tokens of one row depend on each other. So the difference is a ratio of two sums over
rows, of nats saved and of supervised tokens, and its 95 % interval is that of the delete-one jackknife with Student's t
(R. G. Miller, "The jackknife: a review", Biometrika 61, 1974). Where all rows have as many tokens, this is the interval
of a paired t test.

Copies of a row add no information: they are computed once, have the weight of all of them, and count as one row.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal, NoReturn

import numpy as np

from loratune import kernels
from loratune.codes import Code
from loratune.console import plural
from loratune.data import TokenizedDataset
from loratune.errors import NumericError, Problem
from loratune.lora.attach import PeftModel
from loratune.statistics import LEAST_ROWS, Interval, finite, jackknife_interval, mean_ratio_interval
from loratune.system.launcher import Group
from loratune.training.checkpoints.contents import PUBLISH_WORSE, RejectedAdapter
from loratune.training.checkpoints.resume import ResumePoint
from loratune.training.checkpoints.run_dir import RunDirectory
from loratune.training.losses import Loss, NextToken, Objective, ScoringLayout

_MOST_ROWS, _MOST_DRAWN = 64, 4096
"""At most so many distinct rows are compared, and so many rows are looked at to find them."""
_WANTED_ROWS = 8
"""Distinct rows that are compared even beyond `_SHARE`, as long as training read more tokens than they have."""
_SHARE = 32
"""The sample holds at most this part of the tokens that were trained on, within the bounds below. A forward pass of
base and adapter costs as much as training on the same tokens, so comparing takes some 3 % of the time of a long run."""
_LEAST_TOKENS, _MOST_TOKENS = 2048, 32_768
"""Bounds of that part. Below the lower one comparing takes little time by itself."""
_VISIBLE = 5e-4
"""Nats below which a difference counts as none: it would not show in the decimals of the report."""

_OTHERS = {"base": "the base", "start": "the adapter that it started from"}


@dataclass(frozen=True)
class Gain:
    """Losses of base and adapter on the same rows, in nats per supervised token.

    Attributes:
        split: Which rows, `validation` or `training`.
        rows: How many distinct rows were compared.
        drawn: How many rows these stand for, with their copies.
        total: Rows of the split.
        base: Loss of the base.
        adapter: Loss of the adapter.
        better_by: Loss of the base less loss of the adapter: above 0 where the adapter is better.
        low: Lower end of the 95 % interval of `better_by`. None where there are too few rows for one.
        high: Its upper end.
        validation_rows: Distinct validation rows, where these were too few, so that training rows were compared.
        adapter_low: Lower end of the 95 % interval of `adapter`. None where there are too few rows for one.
        adapter_high: Its upper end.
        unit: What the losses are a mean over: `token`, or what an objective that compares answers takes.
        other: What the adapter is compared with: its `base`, or its `start`, the adapter that it started from, where
            that is the reference of the objective. `base` is then the loss of that.
    """

    split: str
    rows: int
    drawn: int
    total: int
    base: float
    adapter: float
    better_by: float
    low: float | None
    high: float | None
    validation_rows: int | None = None
    adapter_low: float | None = None
    adapter_high: float | None = None
    unit: str = "token"
    other: Literal["base", "start"] = "base"

    @property
    def verdict(self) -> Literal["gain", "no gain", "worse", "not judged"]:
        """`gain` or `worse` where the whole interval is on one side of 0, and the difference is visible."""
        if not math.isfinite(self.adapter):
            return "worse"
        if self.low is None or self.high is None:
            return "not judged"
        visible = abs(self.better_by) >= _VISIBLE
        return "gain" if visible and self.low > 0 else "worse" if visible and self.high < 0 else "no gain"

    def held_out_interval(self, loss: float) -> Interval | None:
        """The 95 % interval of the adapter's loss on all validation rows.

        How much losses vary from row to row is that of the rows that were compared. A mean over more rows varies less,
        by the square root of how many times as many they are.

        Args:
            loss: That loss.

        Returns:
            The interval; None where too few validation rows were compared for one.
        """
        if self.split != "validation" or self.adapter_low is None or self.adapter_high is None:
            return None
        share = math.sqrt(self.drawn / self.total)
        low, high = loss - share * (self.adapter - self.adapter_low), loss + share * (self.adapter_high - self.adapter)
        return Interval(max(low, 0.0), high)

    def __str__(self) -> str:
        """A line with the verdict and its figures."""
        losses = f"{self.other} {_nats(self.base)}, adapter {_nats(self.adapter)}"
        if not math.isfinite(self.better_by):
            return f"not judged: not all losses on {self.sampled_rows()} are finite ({losses})"
        if self.validation_rows is not None:
            losses += f"; validation gave {plural(self.validation_rows, f'distinct {item(self.unit)}')}, too few"
        if self.low is None or self.high is None:
            what = f"{self.sampled_rows()} {'is' if self.rows == 1 else 'are'} too few"
            if self.drawn < self.total:
                what = f"a run this short compares only {self.sampled_rows()}"
            return f"not judged: {what}, {LEAST_ROWS} are needed ({losses})"
        nats = f"{_nats(self.better_by)} {per(self.unit)}"
        figures = f"(95 % interval {_nats(self.low)} to {_nats(self.high)}; {losses})"
        match self.verdict:
            case "gain":
                return f"{nats} on {self.sampled_rows()} {figures}"
            case "worse":
                return f"worse than {_OTHERS[self.other]} on {self.sampled_rows()}: {nats} {figures}"
        return f"none over {_OTHERS[self.other]} on {self.sampled_rows()}: {nats} {figures}"

    def sampled_rows(self) -> str:
        """`12 validation rows`, `64 of 500 validation pairs`, `3 distinct of 9 validation rows`."""
        what = f"{self.split} {item(self.unit)}"
        if self.rows == self.total:
            return plural(self.rows, what)
        distinct = " distinct" if self.drawn > self.rows else ""
        return f"{self.rows:,}{distinct} of {plural(self.total, what)}"

    def as_json(self) -> dict[str, Any]:
        """Plain values, the verdict among them. The sign of `better_by`, `low` and `high`: above 0 is better.

        A figure that is not finite is null.
        """
        figures = {name: finite(value) if isinstance(value, float) else value for name, value in asdict(self).items()}
        return figures | {"verdict": self.verdict}


def reject(gain: Gain, step: int, directory: RunDirectory, group: Group) -> NoReturn:
    """End a run whose adapter does worse than its base, and record that beside its checkpoints.

    Args:
        gain: The comparison.
        step: The last optimizer step.
        directory: Where the run works.
        group: The processes of the run.

    Raises:
        NumericError: Always.
    """
    if group.main:
        RejectedAdapter(step, str(gain)).write(directory.rejection)
    group.all_gather(None)  # the others end only once the record is written
    fix = f"lower training.learning_rate and start with --overwrite, or {PUBLISH_WORSE}"
    raise NumericError(Problem(Code.TRAINING_WORSE_THAN_BASE, f"the adapter is {gain}", fix=fix))


def check_not_rejected(directory: RunDirectory, point: ResumePoint) -> None:
    """Check that a resumed run would not end as it did before, without taking a step.

    Raises:
        NumericError: The run that is resumed ended worse than its base.
    """
    rejected, changed = directory.rejected_adapter(), {change["key"] for change in point.new_changes}
    if rejected is None or rejected.step != point.step or changed - {"training.learning_rate"}:
        return
    what = f"the run has taken all its {rejected.step:,} steps, and its adapter is {rejected.comparison}"
    if changed:
        what += "; no step is left for the new training.learning_rate"
    fix = f"{PUBLISH_WORSE}, or start afresh with --overwrite and a lower training.learning_rate"
    raise NumericError(Problem(Code.TRAINING_WORSE_THAN_BASE, what, directory.display_name, fix=fix))


def per(unit: str) -> str:
    """What a loss is measured in: `nats per token`, and `per pair` or `per answer` where answers are compared."""
    return "nats per token" if unit == "token" else f"per {unit}"


def item(unit: str) -> str:
    """What rows are called by what losses are a mean over: `row`, and `pair` or `answer` where answers are compared."""
    return "row" if unit == "token" else unit


def _nats(value: float) -> str:
    """Three decimals, and never a negative zero."""
    return f"{value:.3f}" if not abs(value) < _VISIBLE else "0.000"


def measure(
    model: PeftModel,
    other: AbstractContextManager[None],
    splits: Mapping[str, TokenizedDataset],
    scoring: ScoringLayout,
    budget: int,
    acceleration: kernels.Acceleration,
    group: Group,
    log: Callable[[str], None],
    name: str = "its base",
    compared_with: Literal["base", "start"] = "base",
    objective: Objective = NextToken(),  # noqa: B008  it has no state
) -> Gain:
    """Compare a trained adapter with its base, or another model, on a sample of rows. All processes take a share.

    Args:
        model: The base with the adapter, as it was trained.
        other: Inside, the model computes what it is compared with, see `tensors.as_initialized`.
        splits: Rows by the name of their split. The sample is drawn from the first split with enough distinct rows, and
            from the last if there is none; it is the same sample for the same rows and budget.
        scoring: How rows stand in batches; base and adapter read the same ones.
        budget: Tokens that the run was trained on.
        acceleration: Which layers the kernels compute, both with the adapter and without.
        group: The processes of the run.
        log: Takes a line on what is being done.
        name: What the adapter is compared with.
        compared_with: See `Gain.other`.
        objective: What the loss is.
    """
    split, drawn, too_few = sample(splits, budget)
    log(f"comparing the adapter with {name} on {plural(len(drawn), f'{split} {item(objective.unit)}')}")

    def losses() -> list[Loss]:
        with acceleration.applied(model):
            return objective.item_losses(model, splits[split], [*drawn], scoring, group)

    adapter_losses = losses()
    with other:
        base_losses = losses()
    counts = [*drawn.values()], splits[split].items, too_few
    return compare(base_losses, adapter_losses, split, *counts, objective.unit, compared_with)


def compare(
    base: Sequence[Loss],
    adapter: Sequence[Loss],
    split: str,
    copies: Sequence[int] | None = None,
    total: int | None = None,
    validation_rows: int | None = None,
    unit: str = "token",
    other: Literal["base", "start"] = "base",
) -> Gain:
    """The gain that follows from the losses of base and adapter on distinct rows.

    Args:
        base: Loss of each row on the base.
        adapter: The same with the adapter.
        split: What to call these rows.
        copies: How often each row occurs; once, if not given.
        total: Rows of the split; those that are given and their copies, if not given.
        validation_rows: See `Gain`.
        unit: See `Gain`.
        other: See `Gain`.
    """
    weights = np.asarray(copies if copies is not None else [1] * len(base), dtype=np.float64)
    tokens = weights * [loss.tokens for loss in base]
    base_nats, adapter_nats = (weights * [loss.total for loss in losses] for losses in (base, adapter))
    saved = base_nats - adapter_nats
    base_mean, adapter_mean, better_by = (float(nats.sum() / tokens.sum()) for nats in (base_nats, adapter_nats, saved))
    rows, drawn = len(base), int(weights.sum())
    interval = jackknife_interval(saved, tokens)
    low, high = (interval.low, interval.high) if interval else (None, None)
    own = mean_ratio_interval(adapter_nats, tokens)
    own_low, own_high = (own.low, own.high) if own else (None, None)
    means = base_mean, adapter_mean, better_by
    return Gain(split, rows, drawn, total or drawn, *means, low, high, validation_rows, own_low, own_high, unit, other)


def sample(splits: Mapping[str, TokenizedDataset], budget: int) -> tuple[str, dict[int, int], int | None]:
    """Choose the rows that are compared. Arguments as of `measure`.

    Returns:
        The name of their split; the numbers of distinct rows, and how many of those that were drawn are copies of each,
        itself included; and how many distinct validation rows there are, where these are too few.
    """
    samples = {name: _sample(rows, budget) for name, rows in splits.items()}
    split = next((name for name, rows in samples.items() if len(rows) >= LEAST_ROWS), [*splits][-1])
    too_few = len(samples["validation"]) if "validation" in splits and split != "validation" else None
    return split, samples[split], too_few


def _sample(split: TokenizedDataset, budget: int) -> dict[int, int]:
    """Draw the rows that are compared.

    They are few enough to take little time beside the training: always fewer tokens than it read, or than
    `_LEAST_TOKENS`, so that a short run is not followed by a long comparison.

    Returns:
        The numbers of distinct rows, and how many of the rows that were drawn are copies of each, itself included.
    """
    count = split.items
    share = min(max(budget // _SHARE, _LEAST_TOKENS), _MOST_TOKENS)
    copies: dict[int, int] = {}
    first_numbers: dict[Any, int] = {}
    tokens = 0
    for number in np.random.default_rng(0).choice(count, min(count, _MOST_DRAWN), replace=False).tolist():
        rows = split.item(number)
        if not all(row.supervised for row in rows):
            continue
        first = first_numbers.setdefault(tuple((row.ids, tuple(row.labels), row.side) for row in rows), number)
        if first == number:
            tokens += sum(len(row.ids) for row in rows)
            limit = max(share, budget) if len(copies) < _WANTED_ROWS else share
            if len(copies) == _MOST_ROWS or tokens > limit:
                break
        copies[first] = copies.get(first, 0) + 1
    return dict(sorted(copies.items()))
