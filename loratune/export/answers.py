"""Answers of an adapter, and how near the log-probabilities of a program are to them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SHARE = (0.9, 1.1)
"""The allowed share of the adapter's effect on log-probabilities: all of it, up to rounding. A lost scale shows as a
factor of 2 or more."""


@dataclass(frozen=True)
class ScoredAnswer:
    """A prompt, and the adapter's answer to it.

    Attributes:
        request: A text under `prompt`, or `messages` with `tools`, in llama.cpp's format; empty if there are only ids.
        prompt: The ids of the rendered prompt.
        answer: The ids of the adapter's greedy answer.
        adapted: The log-probability of each token of the answer, with the adapter.
        base: The same, by the base alone.
    """

    request: Mapping[str, Any]
    prompt: Sequence[int]
    answer: Sequence[int]
    adapted: Sequence[float]
    base: Sequence[float]


@dataclass(frozen=True)
class Effect:
    """How near the log-probabilities of a program are to those of the adapter.

    Attributes:
        mean: The mean absolute difference.
        largest: The largest absolute difference.
        share: The share of the adapter's effect, i.e. of its difference from the base, that the program reproduces.
    """

    mean: float
    largest: float
    share: float

    def __str__(self) -> str:
        distance = f"within {self.mean:.3f} on average and {self.largest:.3f} at most"
        return f"log-probabilities {distance}, {self.share:.1%} of the adapter's effect"

    def deviation(self, program: str) -> str:
        """What is wrong, in an error."""
        share, mean = f"{self.share:.1%} of its effect", f"{self.mean:.3f} on average"
        return f"in {program} it has {share}: log-probabilities differ by {mean}"


def effect(logprobs: Sequence[float] | np.ndarray[Any, Any], questions: Sequence[ScoredAnswer]) -> Effect:
    """Compare the log-probabilities of all tokens of answers, in one sequence, with those of the adapter."""
    found = np.asarray(logprobs, float)
    adapted, base = (np.concatenate([getattr(q, name) for q in questions]) for name in ("adapted", "base"))
    differences, change = np.abs(found - adapted), adapted - base
    share = float((found - base) @ change / (change @ change)) if change.any() else math.nan
    return Effect(float(differences.mean()), float(differences.max()), share)
