"""When a run is evaluated, and what its evaluations give.

The steps are those of the configuration, or chosen before the first one from counts alone: the same rows and settings
give the same steps, in every process, on every machine, and in a run that is resumed.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

from loratune.config import TrainingSection, decided

BEST = "best"
"""The key of a checkpoint's record that holds a `BestRecord`."""
WANTED = 10
"""About how many evaluations a run has where their number is left to it."""
_FORWARD = 3
"""A token that is trained on costs as much as so many that are only read: the backward pass takes twice the forward's
arithmetic."""
_PARTS = 10
"""All evaluations together cost at most this part of the training, beyond the one that ends the run."""


@dataclass(frozen=True)
class EvaluationSteps:
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
        """What they cost, as a part of the training."""
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


def evaluation_steps(
    training: TrainingSection, items: int, size: int, processes: int, trained: int, held_out: int
) -> EvaluationSteps:
    """When a run is evaluated.

    Args:
        training: The section, whose `eval_steps` is kept if it is set.
        items: Training items, which are rows or packs of them.
        size: Items of a micro-step for each process.
        processes: How many processes there are.
        trained: Tokens of one pass over the training rows.
        held_out: Tokens of the validation rows.
    """
    steps, per_epoch = optimizer_steps(training, items, size, processes)
    tokens = max(1, trained * steps // per_epoch)
    return EvaluationSteps(training.eval_steps or interval(steps, tokens, held_out), steps, tokens, held_out)


def interval(steps: int, trained: int, held_out: int) -> int:
    """Steps between two evaluations such that there are about ten, which together cost at most a tenth of the training.

    Args:
        steps: Optimizer steps of the run.
        trained: Tokens that these train on.
        held_out: Tokens that one evaluation reads.
    """
    affordable = _FORWARD * trained // (_PARTS * max(1, held_out))
    return -(-steps // max(1, min(WANTED, affordable)))


def optimizer_steps(training: TrainingSection, items: int, size: int, processes: int) -> tuple[int, int]:
    """The optimizer steps of a run and those of one pass over the rows, as Trainer counts them.

    Arguments as of `evaluation_steps`.
    """
    micro_steps = -(-items // (size * processes))
    per_epoch = -(-micro_steps // training.gradient_accumulation_steps)
    if training.max_steps > 0:
        return training.max_steps, per_epoch
    return math.ceil(decided(training.num_train_epochs) * per_epoch), per_epoch


@dataclass(frozen=True)
class BestRecord:
    """What is known of the evaluations of a run.

    Attributes:
        step: The step with the lowest held-out loss, the first of them if several have it.
        loss: That loss, in nats per supervised token.
        evaluations: How many evaluations there were.
        since: How many of them came after that step.
    """

    step: int
    loss: float
    evaluations: int = 1
    since: int = 0

    def after(self, step: int, loss: float) -> "BestRecord":
        """The record after one more evaluation."""
        if loss < self.loss:
            return BestRecord(step, loss, self.evaluations + 1)
        return BestRecord(self.step, self.loss, self.evaluations + 1, self.since + 1)

    @classmethod
    def from_json(cls, values: Any) -> "BestRecord":
        """The record of which `asdict` made these values.

        Raises:
            ValueError: They are something else.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or [*values] != names:
            raise ValueError(f"the record is not one of {', '.join(names)}")
        record = cls(**values)
        counts = (record.step, record.evaluations, record.since)
        if not all(type(count) is int for count in counts) or type(record.loss) is not float:
            raise ValueError("the record has a value of another type")
        if record.step < 1 or not 0 <= record.since < record.evaluations or not math.isfinite(record.loss):
            raise ValueError("the record has a value that no evaluation gives")
        return record
