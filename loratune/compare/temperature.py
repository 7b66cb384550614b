"""One temperature for the probabilities of labels, where it makes them significantly more accurate.

C. Guo et al., "On Calibration of Modern Neural Networks" (arXiv 1706.04599): the log-probabilities of all labels are
divided by one number, fitted to the log loss of rows that the model was not trained on. The most probable label stays
what it is.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from loratune import statistics
from loratune.codes import Code
from loratune.compare.classification import Classification
from loratune.compare.labels import probabilities
from loratune.compare.metrics import Values
from loratune.errors import AdapterError, Problem
from loratune.lora.adapter_files import RECORD_FILE, AdapterFiles

KEY = "label_temperature"
"""The entry of the record of an adapter; there is none where 1 is as good."""
LEAST_ROWS = 40
_FOLDS = 10
_LARGEST = 20.0
"""The temperature is between 1 / `_LARGEST` and this."""


def temperature_of(adapter: AdapterFiles) -> float:
    """The temperature that an adapter has recorded, or 1. Raises AdapterError: it is not one."""
    value = adapter.record.get(KEY, 1.0)
    if not isinstance(value, int | float) or not 1 / _LARGEST <= value <= _LARGEST:
        what, fix = f"`{KEY}` of {RECORD_FILE} is no temperature", "train the adapter again"
        raise AdapterError(Problem(Code.ADAPTER_INVALID, what, str(adapter.path), fix=fix))
    return float(value)


def temperature(scores: Values, expected: NDArray[np.int64], copies: Values) -> float | None:
    """The temperature with the lowest log loss, if it lowers the log loss of rows that it is not fitted to.

    In a cross-validation of `_FOLDS` parts, each part is scored with the temperature of the others. The interval of
    the paired differences from the log loss at 1 must be below 0.

    Args:
        scores: Log-probabilities of labels, (rows, labels), of distinct rows.
        expected: (rows,), the number of the expected label.
        copies: (rows,), how often each row counts.

    Returns:
        The temperature; None if 1 is as good, or there are fewer than `LEAST_ROWS` rows.
    """
    if len(expected) < LEAST_ROWS:
        return None
    parts = np.random.default_rng(0).permutation(len(expected)) % _FOLDS
    unfitted, cross_validated = _log_losses(scores, expected, 1.0), np.empty(len(expected))
    for number in range(_FOLDS):
        part = parts == number
        fitted = _fitted(scores[~part], expected[~part], copies[~part])
        cross_validated[part] = _log_losses(scores[part], expected[part], fitted)
    interval = statistics.mean_ratio_interval(copies * (cross_validated - unfitted), copies)
    return _fitted(scores, expected, copies) if interval is not None and interval.high < 0 else None


def _fitted(scores: Values, expected: NDArray[np.int64], copies: Values) -> float:
    def log_loss(logarithm: float) -> float:
        return statistics.mean_ratio(copies * _log_losses(scores, expected, math.exp(logarithm)), copies)

    limit = math.log(_LARGEST)
    return math.exp(minimize_scalar(log_loss, bounds=(-limit, limit), method="bounded").x)


def _log_losses(scores: Values, expected: NDArray[np.int64], value: float) -> Values:
    found = probabilities(scores, value)
    return Classification((), expected, found, np.ones(len(found)), ()).log_losses
