"""Rows that share prefixes as a tree, which holds each shared prefix once.

In a causal model, what is computed for a token depends on the tokens before it in its row alone. So it is the same for
all rows that begin with these tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_SHARED = 8
"""Tokens that a branch of the tree must save: it is computed a little less efficiently than the end of a row."""

Numbers = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class PrefixTree:
    """Rows of token ids as a tree.

    The tokens of the tree are in depth-first order. So a token follows the last one before it with a lower position,
    and positions alone tell which tokens each one attends to.

    Attributes:
        ids: (tokens of the tree,), their ids.
        positions: (tokens of the tree,), the position of each in the rows that it is part of.
        places: For each row, (tokens of the row,): where in the tree its tokens are.
    """

    ids: Numbers
    positions: Numbers
    places: list[Numbers]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> "PrefixTree":
        """The tree of some rows, of one token at least each. The same rows in another order give the same tree."""
        order = sorted(range(len(rows)), key=lambda number: list(rows[number]))
        places: list[Numbers] = [np.empty(0, np.int64)] * len(rows)
        ids, positions = [], []
        previous, path, branches, total = np.empty(0, np.int64), np.empty(0, np.int64), [0], 0
        for number in order:
            row = np.asarray(rows[number], np.int64)
            depth = _branch(row, previous, branches)
            path = np.concatenate([path[:depth], np.arange(total, total + len(row) - depth)])
            ids.append(row[depth:])
            positions.append(np.arange(depth, len(row)))
            places[number], previous, total = path, row, total + len(row) - depth
        return cls(np.concatenate(ids), np.concatenate(positions), places)


def common_prefix(one: Sequence[int] | Numbers, other: Sequence[int] | Numbers) -> int:
    """The number of equal tokens at the beginning of two rows."""
    least = min(len(one), len(other))
    different = np.flatnonzero(np.asarray(one[:least]) != np.asarray(other[:least]))
    return int(different[0]) if len(different) else least


def _branch(row: Numbers, previous: Numbers, branches: list[int]) -> int:
    """How many tokens a row takes from the one before it.

    branches: the depths at which that one left the rows before it, and others left it, ascending from 0; brought up to
    date.
    """
    least, common = min(len(row), len(previous)), common_prefix(row, previous)
    while branches[-1] > common:
        branches.pop()
    if common < least and common - branches[-1] < LEAST_SHARED:
        return branches[-1]
    if common > branches[-1]:
        branches.append(common)
    return common
