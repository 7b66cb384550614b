"""The steps of a run: how many there are, how often its rows are read, when it is evaluated, and how long that takes.

Steps and evaluations are counted from rows and settings alone, so they are the same in every process, on every machine,
and in a run that is resumed.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loratune.config import TrainingSection, decided

_EVALUATIONS = 10
"""The approximate number of evaluations if it is not configured."""
_FORWARD = 3
"""A token that is trained on costs as much as three that are only read: the backward pass takes twice the forward's
arithmetic."""
_PARTS = 10
"""All evaluations together cost at most this part of the training, beyond the one that ends the run."""


@dataclass(frozen=True)
class Schedule:
    """The optimizer steps of a run, as Trainer counts them.

    Attributes:
        steps: Optimizer steps of the run.
        steps_of_pass: Those of one pass over the rows.
        items_of_step: Items of a whole step, in all its micro-steps and processes.
    """

    steps: int
    steps_of_pass: int
    items_of_step: int

    @classmethod
    def of(cls, training: TrainingSection, items: int, size: int, processes: int = 1) -> "Schedule":
        """The schedule of a section without `auto`.

        Args:
            training: The section.
            items: Training items, which are rows, pairs, or packs of them.
            size: Items of a micro-step in each process.
            processes: The number of processes.
        """
        accumulation = training.gradient_accumulation_steps
        steps_of_pass = -(-items // (size * processes * accumulation))
        steps = training.max_steps
        if steps <= 0:
            steps = math.ceil(decided(training.num_train_epochs) * steps_of_pass)
        return cls(steps, steps_of_pass, min(items, size * processes * accumulation))

    @property
    def passes(self) -> float:
        """How often the rows are read."""
        return self.steps / self.steps_of_pass

    def evaluations(self, every: int | None, trained: int, held_out: int) -> "Evaluations":
        """When the run is evaluated: about ten times, at a cost of at most a tenth of the training.

        Args:
            every: Steps between two evaluations, if they are set.
            trained: Tokens of one pass over the training rows.
            held_out: Tokens that one evaluation reads.
        """
        tokens = max(1, trained * self.steps // self.steps_of_pass)
        affordable = _FORWARD * tokens // (_PARTS * max(1, held_out))
        return Evaluations(
            every or -(-self.steps // max(1, min(_EVALUATIONS, affordable))), self.steps, tokens, held_out
        )


@dataclass(frozen=True)
class Evaluations:
    """When a run is evaluated.

    Attributes:
        interval: Optimizer steps between two evaluations. One more ends the run unless its last step has one anyway.
        steps: Optimizer steps of the run.
        trained: Tokens that these steps train on.
        held_out: Tokens that one evaluation reads.
    """

    interval: int
    steps: int
    trained: int
    held_out: int

    @property
    def count(self) -> int:
        """How many evaluations there are."""
        return -(-self.steps // self.interval)

    @property
    def share(self) -> float:
        """The cost of all evaluations, as a fraction of the training."""
        return self.count * self.held_out / (_FORWARD * self.trained)

    def __str__(self) -> str:
        """`evaluating every 40 of 200 steps: 5 times, 7,642 tokens each, which costs 2.1 % of the training`."""
        cost = (
            f"{self.held_out:,} tokens{' each' if self.count > 1 else ''}, which costs {self.share:.1%} of the training"
        )
        if self.count == 1:
            when = f"after the last of {self.steps:,} steps" if self.steps > 1 else "after the only step"
            return f"evaluating once, {when}: {cost}"
        return f"evaluating every {self.interval:,} of {self.steps:,} steps: {self.count:,} times, {cost}"


@dataclass(frozen=True)
class Seconds:
    """How long the parts of a run take.

    Attributes:
        steps: (steps of a pass,), those of the first pass over the rows; further passes take as long.
        evaluation: One evaluation.
        checkpoint: One checkpoint.
        end: Everything after the last step but the last evaluation.
    """

    steps: NDArray[np.float64]
    evaluation: float
    checkpoint: float
    end: float

    def of_steps(self, steps: int) -> float:
        """The seconds of the first optimizer steps."""
        passes, rest = divmod(steps, len(self.steps))
        return passes * float(self.steps.sum()) + float(self.steps[:rest].sum())

    def besides(self, steps: int, evaluations: int, save_steps: int) -> float:
        """The seconds of everything but the steps of a run, which saves a checkpoint every `save_steps` steps."""
        return self.end + evaluations * self.evaluation + -(-steps // save_steps) * self.checkpoint
