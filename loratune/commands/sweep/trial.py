"""What becomes of a trial: how it does while it is trained, what is recorded of it, and why it has no adapter."""

from typing import Any

from loratune.codes import Code
from loratune.commands.sweep.bench import TrialOutcome
from loratune.commands.sweep.study import Claim, Study
from loratune.config import RunConfig, keys
from loratune.errors import (
    ConfigError,
    DataError,
    LoratuneError,
    ModelError,
    NumericError,
    is_out_of_memory,
)
from loratune.evaluation.study_results import MAX_STEPS
from loratune.lora.adapter_files import RECORD_FILE
from loratune.system.files import sha256
from loratune.training.callbacks import Progress

DIGEST = "record"
"""The SHA-256 of the record of an adapter, which names the digests of its other files."""
_OUT_OF_MEMORY = (Code.MEMORY_TRAINING, Code.MEMORY_EVALUATION, Code.SYSTEM_OUT_OF_MEMORY)
_FINITE = {Code.TRAINING_WORSE_THAN_BASE: "worse than base", Code.LORA_UNCHANGED: "learned nothing"}
"""Errors of an adapter whose numbers are finite, and what they make of a trial."""
_OF_ALL = (Code.TRAIN_BASE_CHANGED,)
"""Errors that every further trial would have too."""
_OF_DIRECTORIES = "run."
"""How the codes of those begin that are about what stands in the way of a trial's files."""


class Hopeless(Exception):
    """Successive halving stops a trial. percent: of its steps that were taken."""

    def __init__(self, percent: int, loss: float):
        super().__init__(f"after {percent} % of its steps, at a held-out loss of {loss:.4f}")


def recorded(outcome: TrialOutcome, run: RunConfig, varied: list[str]) -> dict[str, Any]:
    """What the study keeps of a trial with an adapter.

    Args:
        outcome: What it came to.
        run: Its config as it was asked for.
        varied: The keys that trials differ in.
    """
    told = {*varied, MAX_STEPS} if run.training.max_minutes is not None else {*varied}  # which were fixed from it
    values = keys.flat(outcome.result.config.resolved())
    return {
        "values": {key: value for key, value in values.items() if key in told},
        "seconds": outcome.seconds,
        "steps": outcome.result.findings.outcome.steps,
        "adapter_bytes": outcome.result.adapter_bytes,
        "unrelated": outcome.result.findings.unrelated.as_json().get("change"),
        "rows": outcome.losses.packed(),
        DIGEST: sha256(outcome.result.directory / RECORD_FILE),
    }


def failure(error: Exception) -> tuple[str, str] | None:
    """What an error makes of a trial, and why; None where it ends the sweep.

    What the settings of a trial bring about is a result. What is wrong with the disk, the storage or the base would be
    so for the next trial too, and an error that nobody foresaw must not look like one of the settings.
    """
    why = next(iter(str(error).splitlines()), "")
    if isinstance(error, LoratuneError):
        why, code = error.problems[0].what, error.problems[0].code
        if code in _OUT_OF_MEMORY:
            return "out of memory", why
        if isinstance(error, NumericError):
            return _FINITE.get(code, "diverged"), why
        is_of_all = code in _OF_ALL or code.startswith(_OF_DIRECTORIES)
        return ("failed", why) if isinstance(error, ConfigError | ModelError | DataError) and not is_of_all else None
    if isinstance(error, Hopeless):
        return "stopped early", str(error)
    return ("out of memory", why) if is_out_of_memory(error) else None


class Watched:
    """The progress of a trial, which also tells the study how it does. Implements `trainer.Progress`."""

    def __init__(self, progress: Progress, study: Study, claim: Claim, halving: bool):
        self._progress, self._study, self._claim, self._halving = progress, study, claim, halving
        self._steps = 1

    def start(self, steps: int, done: int) -> None:
        """Training starts."""
        self._steps = max(1, steps)
        self._progress.start(steps, done)

    def step(self, done: int, tokens: int) -> None:
        """A step is done."""
        self._progress.step(done, tokens)
        self._study.show_life(self._claim)

    def log(self, step: int, values: dict[str, float]) -> None:
        """A report of the trainer. Raises Hopeless: the trial is among the worse ones."""
        self._progress.log(step, values)
        percent = 100 * step // self._steps
        is_early = self._halving and "eval_loss" in values and 0 < percent < 100
        if is_early and self._study.is_hopeless(self._claim, percent, values["eval_loss"]):
            raise Hopeless(percent, values["eval_loss"])

    def stop(self) -> None:
        """Training has ended."""
        self._progress.stop()
