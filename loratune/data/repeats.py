"""Rows that stand in the data twice, by the hashes of the census, in memory that does not grow with the data."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from loratune.data.report import FIRST, Leaks, RowTally
from loratune.data.row_index import EXACT, FOLDED
from loratune.data.splits import DatasetSplit

_AT_ONCE = 1 << 18
"""Hashes that are sorted at once; of more, some are taken at a time, by their last bits."""


def duplicates(part: DatasetSplit) -> RowTally:
    """Rows of a part that are an earlier row of it, letter for letter."""
    numbers = [_repeated(hashes, rows) for hashes, rows in _groups(part, EXACT, len(part))]
    return _found(part, numbers)


def shared(train: DatasetSplit, validation: DatasetSplit) -> Leaks:
    """Rows of the validation set that also stand in train, letter for letter, and but for white space."""
    exact = _in_both(train, validation, EXACT)
    folded = np.setdiff1d(_in_both(train, validation, FOLDED), exact, assume_unique=True)
    return Leaks(_found(validation, [exact]), _found(validation, [folded]))


def _in_both(train: DatasetSplit, validation: DatasetSplit, column: int) -> NDArray[np.int64]:
    size = max(len(train), len(validation))
    pairs = zip(_groups(train, column, size), _groups(validation, column, size), strict=True)
    return np.concatenate([there[np.isin(wanted, known)] for (known, _), (wanted, there) in pairs])


def _groups(part: DatasetSplit, column: int, size: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Hashes and row numbers of a part, a group at a time; the number of groups follows from `size` alone."""
    groups = max(1, -(-size // _AT_ONCE))
    for group in range(groups):
        hashes, rows = [], []
        for start in range(0, len(part.census), _AT_ONCE):
            some = part.census.column(column, start, start + _AT_ONCE)
            mask = (some.view(np.uint64) % np.uint64(groups)) == group
            if part.kept is not None:
                mask &= part.kept[start : start + _AT_ONCE]
            hashes.append(some[mask])
            rows.append(np.flatnonzero(mask) + start)
        yield np.concatenate(hashes or [np.zeros(0, np.int64)]), np.concatenate(rows or [np.zeros(0, np.int64)])


def _repeated(hashes: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows whose hash an earlier row has."""
    _, first = np.unique(hashes, return_index=True)
    return np.delete(rows, first)


def _found(part: DatasetSplit, groups: list[NDArray[np.int64]]) -> RowTally:
    count = sum(len(group) for group in groups)
    first = np.sort(np.concatenate([np.sort(group)[:FIRST] for group in groups]))[:FIRST]
    return RowTally(count, [part.census.where(int(number)) for number in first])
