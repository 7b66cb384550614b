"""The inputs of a training loop: what it trains, where it reports and writes, and where it continues."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from loratune.compare.engine import NextToken, Objective, ScoringPass
from loratune.config import LoraSection, TrainingSection
from loratune.data.packing import BatchLayout
from loratune.system.launcher import SINGLE_PROCESS, Group
from loratune.system.signals import Interruption, Stop, Termination
from loratune.training.checkpoints.store import Checkpoints
from loratune.training.curve import StepLosses
from loratune.training.evaluations import BestRecord
from loratune.training.trackers import Tracker


@dataclass(frozen=True)
class TrainingJob:
    """What is trained, on what, and how.

    Attributes:
        training: The section, with `eval_steps` chosen. The best step is kept if `keep` says so; null means the last.
        lora: The section; some variants of LoRA have an optimizer of their own.
        model: The base with the adapter, whose trainable weights are trained in place.
        train: The training batches.
        validation: The pass over the validation rows, if there are any.
        objective: What is lowered.
    """

    training: TrainingSection
    lora: LoraSection
    model: PreTrainedModel
    train: BatchLayout
    validation: ScoringPass | None
    objective: Objective = field(default_factory=NextToken)


@dataclass(frozen=True)
class RunContext:
    """Where a training loop reports to and writes to, and what it continues from.

    Attributes:
        checkpoints: Where its checkpoints go.
        stop: The signal that asked this process to stop, if any.
        group: The processes that share the run.
        resume_from: A whole checkpoint from which the run is resumed.
        learning_rate_factor: By what the learning rates of that checkpoint are multiplied.
        evaluations: What the evaluations up to that checkpoint gave; None if there were none, or they do not count.
        has_other_validation: Whether the validation rows up to that checkpoint were others, or are none any more.
        unreported: The losses of the steps before that checkpoint that no report has.
        seconds_before: How long training took up to that checkpoint.
        trackers: What else follows its steps, in the main process.
        after_checkpoint: Called after each checkpoint; an error that it raises ends the run.
    """

    checkpoints: Checkpoints
    stop: Stop = field(default_factory=Stop)
    group: Group = SINGLE_PROCESS
    resume_from: Path | None = None
    learning_rate_factor: float = 1.0
    evaluations: BestRecord | None = None
    has_other_validation: bool = False
    unreported: StepLosses = field(default_factory=StepLosses)
    seconds_before: float = 0.0
    trackers: Sequence[Tracker] = ()
    after_checkpoint: Callable[[], None] = lambda: None

    def stopping(self) -> bool:
        """Whether any process was asked to stop. All processes call it together, and from then on all know.

        A signal that comes while they agree is not forgotten: the next call finds it.
        """
        requests = self.group.total([self.stop.requested is kind for kind in (Interruption, Termination)])
        if any(requests):
            self.stop.requested = Termination if requests[1] else Interruption
        return any(requests)

    def check_not_stopping(self) -> None:
        """Raise KeyboardInterrupt if any process was asked to stop. All processes call it together."""
        if self.stopping() and self.stop.requested is not None:
            raise self.stop.requested
