"""The loss curve of a run, and the losses of steps since the last report. Without torch: checkpoints are read early."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

MOST_LOSSES, MOST_HELD_OUT = 600, 300
"""So many reports of either kind are kept, spread evenly over the run: a report takes about 230 and 110 bytes of
loratune.json, which then stays below 200 kB."""


UNREPORTED, SECONDS = "unreported", "seconds"
"""The key of a checkpoint's record that holds a `StepLosses`."""


@dataclass
class StepLosses:
    """The losses of the steps since the last report, which gives their mean.

    Trainer's own mean is only of those since the run was started or resumed. A checkpoint keeps these, so that a
    resumed run reports what an uninterrupted one does.

    Attributes:
        total: Their sum, in nats per supervised token.
        steps: How many steps there were.
    """

    total: float = 0.0
    steps: int = 0

    def add(self, loss: float) -> None:
        """Take note of the loss of a step."""
        self.total, self.steps = self.total + loss, self.steps + 1

    def take_mean(self) -> float:
        """Their mean, after which there are none. Raises ZeroDivisionError: there are none."""
        mean = self.total / self.steps
        self.total, self.steps = 0.0, 0
        return mean

    def as_json(self) -> dict[str, Any]:
        """What a checkpoint records."""
        return {UNREPORTED: asdict(self)}

    @classmethod
    def from_json(cls, values: Any) -> "StepLosses":
        """The losses of which `asdict` made these values; none for None, as in a checkpoint of an earlier release.

        Raises:
            ValueError: They are something else.
        """
        if values is None:
            return cls()
        if not isinstance(values, dict) or [*values] != ["total", "steps"]:
            raise ValueError("the losses are not total and steps")
        losses = cls(**values)
        if type(losses.steps) is not int or type(losses.total) is not float or losses.steps < 0:
            raise ValueError("the losses have a value of another type")
        if not math.isfinite(losses.total):
            raise ValueError("the losses are not finite")
        return losses


def without_held_out(history: Sequence[dict[str, float]], step: int | None = None) -> list[dict[str, float]]:
    """The reports of a trainer without the held-out loss of a step, or without any if no step is given."""
    return [entry for entry in history if "eval_loss" not in entry or step not in (None, entry["step"])]


def thinned(history: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The reports of a trainer that hold a loss or a held-out loss, evenly thinned where there are very many.

    The first and the last of either kind are always kept, and so is the lowest held-out loss.
    """
    losses = [number for number, entry in enumerate(history) if "loss" in entry]
    held_out = [number for number, entry in enumerate(history) if "eval_loss" in entry]
    lowest = sorted(held_out, key=lambda number: history[number]["eval_loss"])[:1]
    kept = {*_spread(losses, MOST_LOSSES), *_spread(held_out, MOST_HELD_OUT - 1), *lowest}
    return [history[number] for number in sorted(kept)]


def _spread(numbers: Sequence[int], most: int) -> list[int]:
    if len(numbers) <= most:
        return [*numbers]
    return [numbers[place] for place in np.linspace(0, len(numbers) - 1, most).round().astype(int).tolist()]
