"""How the adapter does on the test rows, by which nothing was chosen: they are read once, after the last step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratune import kernels
from loratune.codes import Code
from loratune.console import plural
from loratune.data import TokenizedDataset
from loratune.errors import NumericError, Problem
from loratune.lora.attach import PeftModel
from loratune.statistics import LEAST_ROWS, Interval, loss_interval, mean_ratio
from loratune.system.launcher import Group
from loratune.training.gain import item, per
from loratune.training.losses import Loss, NextToken, Objective, ScoringLayout


@dataclass(frozen=True)
class FinalScore:
    """The loss on the test rows.

    Attributes:
        loss: Nats per supervised token, over all rows; or per pair or answer, see `unit`.
        tokens: Supervised tokens, over which the loss is the mean; or pairs or answers.
        rows: How many rows there are.
        distinct: How many of them are not copies of an earlier one.
        interval: The interval of the loss; None where there are too few distinct rows for one.
        unit: What the loss is a mean over, see `Objective`.
    """

    loss: float
    tokens: int
    rows: int
    distinct: int
    interval: Interval | None
    unit: str = "token"

    def __str__(self) -> str:
        """`0.1043 on 200 test rows (95 % interval 0.0911 to 0.1202)`."""
        copies = f", {self.distinct:,} distinct" if self.distinct < self.rows else ""
        loss = f"{self.loss:.4f}" if self.unit == "token" else f"{self.loss:.4f} {per(self.unit)}"
        what = f"{loss} on {plural(self.rows, f'test {item(self.unit)}')}{copies}"
        if self.interval is None:
            return f"{what} (no interval: {LEAST_ROWS} distinct {item(self.unit)}s are needed)"
        return f"{what} (95 % interval {self.interval.low:.4f} to {self.interval.high:.4f})"

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        interval = self.interval.as_json() if self.interval else None
        return {
            "loss": self.loss,
            "tokens": self.tokens,
            "rows": self.rows,
            "distinct": self.distinct,
            "interval": interval,
        }


def score(
    model: PeftModel,
    test: TokenizedDataset,
    scoring: ScoringLayout,
    acceleration: kernels.Acceleration,
    group: Group,
    objective: Objective,
) -> FinalScore:
    """Compute the loss of each distinct test row; all processes take a share.

    Args:
        model: The base with the adapter, as it is published.
        test: The rows.
        scoring: How rows stand in batches.
        acceleration: What of the model the kernels compute.
        group: The processes of the run.
        objective: What the loss is.

    Raises:
        NumericError: The loss is NaN or inf.
    """
    copies = test.copies()
    losses = row_losses(model, test, [*copies], scoring, acceleration, group, objective)
    return from_losses(losses, [*map(len, copies.values())], objective.unit)


def row_losses(
    model: PeftModel,
    split: TokenizedDataset,
    numbers: Sequence[int],
    scoring: ScoringLayout,
    acceleration: kernels.Acceleration,
    group: Group,
    objective: Objective = NextToken(),  # noqa: B008  it has no state
) -> list[Loss]:
    """The loss of each of some rows. Arguments as in `score`.

    numbers: which rows of the split, or pairs of them.
    """
    with acceleration.applied(model):
        return objective.item_losses(model, split, numbers, scoring, group)


def from_losses(losses: Sequence[Loss], copies: Sequence[int], unit: str = "token") -> FinalScore:
    """The score that follows from the losses of distinct rows. unit: of these. Raises NumericError: see `score`."""
    weights = np.asarray(copies, dtype=np.float64)
    nats, tokens = weights * [loss.total for loss in losses], weights * [loss.tokens for loss in losses]
    mean = mean_ratio(nats, tokens)
    if not math.isfinite(mean):
        what, fix = f"the loss on the test rows is {mean}", "lower training.learning_rate"
        raise NumericError(Problem(Code.TRAINING_HELD_OUT_NOT_FINITE, what, key="data.test", fix=fix))
    interval = loss_interval(nats, tokens)
    return FinalScore(mean, int(tokens.sum()), int(weights.sum()), len(losses), interval, unit)
