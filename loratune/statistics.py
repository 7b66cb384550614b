"""Intervals of figures over rows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float

    def as_json(self) -> list[float]:
        """Its two ends."""
        return [self.low, self.high]
