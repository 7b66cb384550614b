"""How long a sweep may take, and about how long its trials will."""

import re
import time
from dataclasses import dataclass, field

from loratune.codes import Code
from loratune.config.yaml_reader import number
from loratune.console import format_duration
from loratune.errors import ConfigError, Problem

OPTION = "--budget"
_PARTS = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s)?", re.ASCII)
_DOUBT = 2.0
"""By this factor an estimate may be off that rests on no trial, see `training.duration`."""


def parse(text: str) -> float:
    """Seconds of `30m`, `1h`, `1h30m`, `45s`, or of a number of minutes. Raises ConfigError: it is none of these."""
    compact = text.replace(" ", "").lower()
    seconds = 0.0
    if (minutes := number(compact)) is not None:
        seconds = 60 * minutes
    elif (match := _PARTS.fullmatch(compact)) is not None:
        seconds = sum(unit * float(part or 0) for unit, part in zip((3600, 60, 1), match.groups(), strict=True))
    if not 0 < seconds < 1e9:
        what, fix = f"{text!r} is no time above 0", "write 30m, 1h, 1h30m, or minutes as a number"
        raise ConfigError(Problem(Code.USAGE_OUT_OF_RANGE, what, key=OPTION, fix=fix))
    return seconds


@dataclass
class Budget:
    """The time that is left, and how long trials take.

    Attributes:
        seconds: The budget; None without one.
        started: When it began to run, by `time.monotonic`.
        ratios: Of each trial that ended here, its seconds over its estimated work.
        begun: Trials that were begun here, whatever became of them.
    """

    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)
    ratios: list[float] = field(default_factory=list)
    begun: int = 0

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return float("inf") if self.seconds is None else self.seconds - (time.monotonic() - self.started)

    def begin(self) -> None:
        """A trial begins."""
        self.begun += 1

    def add(self, estimate: float, seconds: float) -> None:
        """A trial has ended. estimate: its seconds as they were estimated; seconds: those that it took."""
        if estimate > 0:
            self.ratios.append(seconds / estimate)

    def expected(self, estimate: float) -> float:
        """Seconds of a trial, by the slowest of those that ended here, measured against their estimates."""
        return estimate * max(self.ratios, default=1.0)

    def fits(self, estimate: float) -> bool:
        """Whether a trial of this estimate may begin.

        Raises:
            ConfigError: Not even one trial fits, by more than the estimate may be off.
        """
        if self.seconds is None:
            return True
        if not self.begun and not self.ratios:
            if estimate > _DOUBT * max(self.left, 0.0):
                gone = format_duration(self.seconds - self.left)
                what = f"{format_duration(self.seconds)} is shorter than one trial: {gone} have passed before it, and "
                what += f"it takes about {format_duration(estimate)} on this machine"
                fix = "raise it, or shorten the trials: training.max_steps, training.num_train_epochs"
                raise ConfigError(Problem(Code.SWEEP_BUDGET, what, key=OPTION, fix=fix))
            return True
        return self.expected(estimate) <= self.left
