"""The outcome of a training loop, in numbers and in words."""

from dataclasses import dataclass, field
from typing import Any, NoReturn

from loratune.codes import Code
from loratune.compare.gain import Gain, per
from loratune.errors import NumericError, Problem
from loratune.system.launcher import Group
from loratune.training.checkpoints.contents import PUBLISH_WORSE, RejectedAdapter
from loratune.training.checkpoints.resume import ResumePoint
from loratune.training.checkpoints.run_dir import RunDirectory
from loratune.training.evaluations import BestRecord

CURVE_KEYS = ("loss", "eval_loss")
"""Under which the trainer logs the loss of steps and the held-out loss."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a training loop.

    Attributes:
        steps: Optimizer steps that were taken.
        planned_steps: Optimizer steps that the run was to take.
        kept_step: The step whose weights become the adapter.
        keeps_best: Whether that is the step with the lowest held-out loss; otherwise it is the last one.
        first_loss: The loss of the first step, in nats per supervised token.
        last_loss: The loss of the last step.
        last_held_out_loss: The last loss on the validation rows, None without any.
        evaluations: What the evaluations gave, None without validation rows.
        tokens: How many tokens were read in training, without padding.
        seconds: How long it took.
        tokens_per_second: How fast steps read tokens, without evaluations and checkpoints; None if there was no step.
        curve: What the trainer logged with a loss or a held-out loss, see `curve.thinned`.
    """

    steps: int
    planned_steps: int
    kept_step: int
    keeps_best: bool
    first_loss: float
    last_loss: float
    last_held_out_loss: float | None
    evaluations: BestRecord | None
    tokens: int
    seconds: float
    tokens_per_second: float | None = None
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def held_out_loss(self) -> float | None:
        """The loss of the weights that become the adapter on the validation rows, None without any."""
        return self.evaluations.loss if self.evaluations and self.keeps_best else self.last_held_out_loss

    @property
    def stopped_early(self) -> bool:
        """Whether patience ended the run."""
        return self.steps < self.planned_steps

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics, for a record."""
        best = self.evaluations
        return {
            "steps": self.steps,
            "kept_step": self.kept_step,
            "stopped_early": self.stopped_early,
            "first_loss": self.first_loss,
            "last_loss": self.last_loss,
            "held_out_loss": self.held_out_loss,
            "best_held_out_loss": best.loss if best else None,
            "last_held_out_loss": self.last_held_out_loss,
            "evaluations": best.evaluations if best else 0,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }

    def lines(self, comparison: Gain, *, tested: bool) -> list[tuple[str, str]]:
        """What the evaluations gave, as labels and texts; none without validation rows.

        Args:
            comparison: Of the adapter with its base, which tells how much losses vary from row to row.
            tested: Whether the adapter was scored on test rows as well, by which nothing was chosen.
        """
        best, loss = self.evaluations, self.held_out_loss
        if best is None or loss is None:
            return []
        text = f"{loss:.4f}" if comparison.unit == "token" else f"{loss:.4f} {per(comparison.unit)}"
        if interval := comparison.held_out_interval(loss):
            text += f" (95 % interval {interval.low:.4f} to {interval.high:.4f})"
        if best.evaluations > 1 and self.keeps_best:
            text += f" at step {self.kept_step:,}, kept: the lowest of {best.evaluations:,} evaluations"
            text += "" if tested else ", so optimistic"
            if self.kept_step != self.steps:
                text += f"; {self.last_held_out_loss:.4f} at step {self.steps:,}, the last"
        elif best.step != self.steps:
            text += f"; the lowest of {best.evaluations:,} evaluations was {best.loss:.4f}, at step {best.step:,}"
        lines = [("held-out", text)]
        if self.stopped_early:
            count = f"{best.since:,} evaluation{'s in a row' if best.since > 1 else ''} without a lower held-out loss"
            lines.append(("stopped early", f"at step {self.steps:,} of {self.planned_steps:,}: {count}"))
        return lines


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
