"""How good and how sure a classifier is: accuracy, each class, confusions, calibration, and accuracy by coverage.

Every distinct row counts as often as it has copies; intervals count it as one row, see `metrics`. F1 of a class is
2·TP / (2·TP + FP + FN), and macro-F1 its mean over the classes that are expected or given, as in scikit-learn. Log loss
is the mean of -ln p of the expected label, the Brier score that of Σ (p - y)² over the labels (from 0 to 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratune import statistics
from loratune.compare.metrics import Values
from loratune.statistics import Interval, finite

COVERAGES = (1.0, 0.9, 0.8, 0.5)
_CONFUSIONS = 3
_SMALLEST = 1e-300
"""Probabilities below are counted as this, so that a log loss is finite."""


@dataclass(frozen=True)
class Prediction:
    """The label that a classifier gives to a text.

    Attributes:
        label: The most probable label.
        probability: Its probability among the labels.
        probabilities: Label → probability; they sum to 1.
    """

    label: str
    probability: float
    probabilities: dict[str, float]


@dataclass(frozen=True)
class ClassScore:
    """A class: its precision and recall, None if it is never given or never expected, F1, and its expected rows."""

    label: str
    precision: float | None
    recall: float | None
    f1: float
    rows: int


@dataclass(frozen=True)
class Confusion:
    """Rows of one class that were given another label. example: the prompt of the surest of them."""

    expected: str
    given: str
    rows: int
    example: str


@dataclass(frozen=True)
class Coverage:
    """The accuracy of the surest rows.

    Attributes:
        share: The share of rows that is answered.
        threshold: The least probability of their labels.
        accuracy: The share of them that is right.
        interval: Its 95 % interval, of this coverage alone.
    """

    share: float
    threshold: float
    accuracy: float
    interval: Interval


@dataclass(frozen=True, eq=False)
class Classification:
    """The labels that a classifier gives to rows with known labels.

    Attributes:
        labels: The labels.
        expected: (rows,) the number of the expected label; -1 for one that is not among them.
        probabilities: (rows, labels).
        copies: (rows,) how often each row counts.
        prompts: The prompt of each row as text.
    """

    labels: Sequence[str]
    expected: NDArray[np.int64]
    probabilities: Values
    copies: Values
    prompts: Sequence[str]

    @property
    def given(self) -> NDArray[np.int64]:
        """(rows,) the number of the most probable label."""
        found: NDArray[np.int64] = self.probabilities.argmax(axis=1)
        return found

    @property
    def right(self) -> Values:
        """(rows,) 1 where it is the expected one, else 0."""
        found: Values = (self.given == self.expected).astype(np.float64)
        return found

    @property
    def of_expected(self) -> Values:
        """(rows,) the probability of the expected label; 0 for one that is not among them."""
        own = np.take_along_axis(self.probabilities, np.maximum(self.expected, 0)[:, None], axis=1)[:, 0]
        return np.where(self.expected >= 0, own, 0.0)

    @property
    def log_losses(self) -> Values:
        """(rows,) minus the logarithm of the probability of the expected label, in nats."""
        found: Values = -np.log(np.maximum(self.of_expected, _SMALLEST))
        return found

    @property
    def briers(self) -> Values:
        """(rows,) the squared distance of the probabilities from certainty of the expected label, from 0 to 2."""
        found: Values = (self.probabilities**2).sum(axis=1) - 2 * self.of_expected + 1
        return found

    @property
    def accuracy(self) -> float:
        """The share of rows with the expected label."""
        return statistics.mean_ratio(self.copies * self.right, self.copies)

    @property
    def classes(self) -> list[ClassScore]:
        """Each class that is expected or given, in the order of the labels."""
        found = []
        for number, label in enumerate(self.labels):
            given, expected = self.given == number, self.expected == number
            hits, gives, has = (float(self.copies[mask].sum()) for mask in (given & expected, given, expected))
            if gives or has:
                precision, recall = hits / gives if gives else None, hits / has if has else None
                found.append(ClassScore(label, precision, recall, 2 * hits / (gives + has), round(has)))
        return found

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the classes."""
        return float(np.mean([one.f1 for one in self.classes]))

    @property
    def confusions(self) -> list[Confusion]:
        """The most frequent confusions of two labels, each with the prompt of the surest wrong answer."""
        sure, found = self.probabilities.max(axis=1), []
        wrong = (self.given != self.expected) & (self.expected >= 0)
        for expected, given in {*zip(self.expected[wrong].tolist(), self.given[wrong].tolist(), strict=True)}:
            own = wrong & (self.expected == expected) & (self.given == given)
            surest = int(np.argmax(np.where(own, sure, -1.0)))
            count = round(float(self.copies[own].sum()))
            found.append(Confusion(self.labels[expected], self.labels[given], count, self.prompts[surest]))
        return sorted(found, key=lambda one: (-one.rows, one.expected, one.given))[:_CONFUSIONS]

    def table(self, labels: Sequence[int]) -> Values:
        """How many rows of some labels, by their numbers, are given which of them: (expected, given)."""
        shape = len(self.labels), len(self.labels)
        known = self.expected >= 0
        found = np.zeros(shape)
        np.add.at(found, (self.expected[known], self.given[known]), self.copies[known])
        return found[np.ix_(labels, labels)]

    @property
    def overconfidence(self) -> tuple[float, Interval | None]:
        """The mean probability of the given labels minus the accuracy, with its 95 % interval: above 0, they are
        surer than they are right."""
        differences = self.probabilities.max(axis=1) - self.right
        value = statistics.mean_ratio(self.copies * differences, self.copies)
        return value, statistics.bounded_difference_interval(differences, self.copies)

    def coverage(self, share: float) -> Coverage:
        """The accuracy of the share of rows with the surest labels, at least one row."""
        sure = self.probabilities.max(axis=1)
        order = np.argsort(-sure, kind="stable")
        reached = np.cumsum(self.copies[order]) - self.copies[order] < share * self.copies.sum() - 1e-9
        answered = order[reached] if reached.any() else order[:1]
        copies, right = self.copies[answered], self.right[answered]
        count, value = statistics.effective_rows(copies), statistics.mean_ratio(copies * right, copies)
        interval = statistics.wilson(min(count, value * count), count)
        return Coverage(float(copies.sum() / self.copies.sum()), float(sure[answered].min()), value, interval)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        value, interval = self.overconfidence
        low, high = finite(interval) or (None, None)
        return {
            "labels": [*self.labels],
            "macro_f1": self.macro_f1,
            "log_loss": statistics.mean_ratio(self.copies * self.log_losses, self.copies),
            "brier": statistics.mean_ratio(self.copies * self.briers, self.copies),
            "overconfidence": {"value": value, "low": low, "high": high},
            "classes": [vars(one) for one in self.classes],
            "confusions": [vars(one) for one in self.confusions],
            "coverage": [{**vars(one), "interval": finite(one.interval)} for one in map(self.coverage, COVERAGES)],
        }
