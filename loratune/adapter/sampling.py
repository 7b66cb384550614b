"""Sampling: how the tokens of a completion are chosen, and where the completion ends."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from loratune.codes import Code
from loratune.errors import ConfigError, Problem

_RANGES = {"temperature": (1e-3, 1000), "top_p": (1e-6, 1), "top_k": (1, 1 << 31), "seed": (0, (1 << 63) - 1)}
"""Setting → least and most; logits divided by a lower temperature would be inf."""


class SamplingOptions(TypedDict, total=False):
    """The settings of `Sampling` as keyword arguments."""

    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: Sequence[str]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and where a completion ends besides at its end token.

    Attributes:
        temperature: 0 takes the likeliest token; above it, tokens are sampled.
        top_p: Only the likeliest tokens whose probabilities add up to this are sampled; None as the base's
            generation_config.json says.
        top_k: Only this many of the likeliest tokens are sampled; None as for `top_p`.
        seed: Of the samples: the same prompts get the same completions. None continues torch's random numbers.
        stop: Texts at which a completion ends; they do not belong to it.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Sequence[str] = ()

    def check(self) -> None:
        """Raises ConfigError: a setting is out of range, or has no effect."""
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most and not (name == "temperature" and value == 0):
                raise self._error(name, f"{value:g} is not between {least:g} and {most:,}")
        for name in ("top_p", "top_k"):
            if not self.temperature and getattr(self, name) is not None:
                raise self._error(name, "only works with a temperature above 0")
        if "" in self.stop:
            raise self._error("stop", "is empty")

    @staticmethod
    def _error(name: str, what: str) -> ConfigError:
        key = f"--{name.replace('_', '-')}"
        fix = "0 takes the likeliest token" if name == "temperature" else ""
        return ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key=key, fix=fix))

    def cut(self, text: str) -> str:
        """The completion up to the first text that ends it."""
        ends = [text.index(stop) for stop in self.stop if stop in text]
        return text[: min(ends)] if ends else text

    def for_batch(self, number: int) -> "Sampling":
        """The same, with random numbers of its own for each batch."""
        return self if self.seed is None else replace(self, seed=(self.seed + number) % (1 << 63))


GREEDY = Sampling()
"""Takes the likeliest token."""
