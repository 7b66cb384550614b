"""Holds out a fraction of the rows at random, and keeps related rows in one split.

Rows are linked by equal content, equal prompts and equal values of `group_by`; rows that are linked directly or through
other rows form a unit. Units are numbered by their first rows, so the draw depends only on the rows and the seed.

Memory: arrays of 8 bytes per row, below 100 bytes per row in total, which are freed once the mask is computed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from loratune.data.row_index import COMPLETION, FOLDED, GROUP, PROMPT, RowIndex, RowMask

TEMPLATE_SHARE, TEMPLATE_ROWS = 0.05, 10
"""A prompt of more than this share of the rows is boilerplate and links no rows; in small data only if it also occurs
in more than `TEMPLATE_ROWS` rows, or in more rows than are held out."""

MAX_LABELS, UNITS_PER_LABEL = 100, 10
"""Completions are labels if there are at most this many distinct ones, with on average this many units or more each."""


@dataclass
class _Units:
    """Groups of rows that stay in one split.

    Attributes:
        of_rows: (rows,) the number of the unit of each row of the mask, from 0.
        sizes: (units,) the number of rows of each unit.
        reasons: What links rows.
        templates: (number of rows, first row) of each prompt that is treated as boilerplate.
    """

    of_rows: NDArray[np.int64]
    sizes: NDArray[np.int64]
    reasons: list[str] = field(default_factory=list)
    templates: list[tuple[int, int]] = field(default_factory=list)


def hold_out(
    index: RowIndex, mask: RowMask, fraction: float, group_by: str | None, seed: int
) -> tuple[RowMask, tuple[str, ...]]:
    """Draw the validation rows.

    Units are drawn in random order, skipping those that exceed the remaining number of rows; if none fits, a smallest
    one is drawn. If completions are labels, each label first gets its share of the rows (largest remainder).

    Args:
        index: The rows, with all columns.
        mask: The rows to draw from.
        fraction: The fraction of these rows to hold out; at least one row is held out.
        group_by: The field whose values keep rows together.
        seed: Random seed.

    Returns:
        A mask of the rows held out, and lines on how the draw differs from a plain random one (groups, strata).
    """
    rows = np.flatnonzero(mask)
    count = max(1, round(len(rows) * fraction))
    units = _find_units(index, mask, count, group_by)
    labels, stratified = _find_labels(index, mask, units)
    random = np.random.default_rng([seed, 1])
    if len(units.sizes) == len(rows) and labels is None:
        drawn, drawn_units = random_mask(len(rows), count, random), count
    else:
        unit_mask = _draw(units.sizes, labels, count, random)
        drawn, drawn_units = unit_mask[units.of_rows], int(np.count_nonzero(unit_mask))
    held_out = np.zeros_like(mask)
    held_out[rows[drawn]] = True
    remarks = []
    if len(units.sizes) < len(rows):
        got = int(np.count_nonzero(drawn))
        asked = "" if got == count else f" (the fraction asks for {count:,})"
        groups = "1 group" if drawn_units == 1 else f"{drawn_units:,} groups"
        remarks.append(f"held out {got:,} rows{asked} in {groups}: {', '.join(units.reasons)} stay together")
    if labels is not None:
        remarks.append(stratified)
    remarks += _remarks(index, mask, rows, units, group_by)
    return held_out, tuple(remarks)


def random_mask(count: int, share: int, random: np.random.Generator) -> RowMask:
    """A mask over `count` rows with `share` of them drawn at random."""
    mask = np.zeros(count, dtype=np.bool_)
    if share >= count:
        mask[:] = True
    else:
        mask[random.choice(count, share, replace=False, shuffle=False)] = True
    return mask


def mix_counts(counts: Sequence[int], weights: Sequence[float]) -> list[int]:
    """The number of rows to use from each source, in proportion to the weights.

    No row is used twice: the source with the fewest rows relative to its weight is used completely and determines the
    size of the mix; every source contributes at least one row. Like `datasets.interleave_datasets` with probabilities
    and stopping_strategy="first_exhausted", but exact instead of drawn.
    """
    size = min(count / weight for count, weight in zip(counts, weights, strict=True))
    exact = (round(size * weight) for weight in weights)
    return [min(count, max(1, share)) for count, share in zip(counts, exact, strict=True)]


def replay_numbers(own: int, earlier: int, share: float, seed: int) -> list[int]:
    """Draw the rows of an earlier run that are mixed into a run at a given fraction.

    If there are too few, all are repeated equally often before the rest is drawn.

    Args:
        own: Rows of the run.
        earlier: Rows of the earlier run.
        share: The fraction of earlier rows in the mix, between 0 and 1; at least one row is used.
        seed: Random seed.

    Returns:
        Numbers of rows of the earlier run.
    """
    whole, rest = divmod(max(1, round(own * share / (1 - share))), earlier)
    drawn = np.flatnonzero(random_mask(earlier, rest, np.random.default_rng([seed, 2])))
    return [*range(earlier)] * whole + drawn.tolist()


def _remarks(
    index: RowIndex, mask: RowMask, rows: NDArray[np.int64], units: _Units, group_by: str | None
) -> Iterator[str]:
    """Lines on values that do not keep rows together, although a user might expect it."""
    alone = int(np.count_nonzero(index.columns[mask, GROUP] == index.columns[mask, FOLDED])) if group_by else 0
    if alone:
        yield f"rows without `{group_by}`: {alone:,}, which belong to no group"
    if units.templates:
        places = ", ".join(index.where(int(rows[first])) for _, first in units.templates[:3])
        count = sum(size for size, _ in units.templates)
        prompts = "a prompt" if len(units.templates) == 1 else f"{len(units.templates)} prompts"
        yield f"{prompts} of {count:,} rows ({places}) may be on both sides: too common to keep its rows together"


# Units


def _find_units(index: RowIndex, mask: RowMask, count: int, group_by: str | None) -> _Units:
    """The units of the rows of a mask. count: how many rows are to be held out."""
    total = int(np.count_nonzero(mask))
    limit = max(TEMPLATE_SHARE * total, min(TEMPLATE_ROWS, count))
    units = _Units(np.arange(total), np.ones(total, dtype=np.int64))
    columns = [(FOLDED, "copies of a row", None), (PROMPT, "rows with the same prompt", limit)]
    if group_by is not None:
        columns.append((GROUP, f"rows with the same `{group_by}`", None))
    for column, reason, most in columns:
        before = len(units.sizes)
        units.templates += _link(units, index.columns[mask, column], most)
        if len(units.sizes) < before:
            units.reasons.append(reason)
    if units.reasons:  # number the units by their first rows
        _, first, units.of_rows = np.unique(units.of_rows, return_index=True, return_inverse=True)
        units.of_rows = np.argsort(np.argsort(first))[units.of_rows]
        units.sizes = np.bincount(units.of_rows)
    return units


def _link(units: _Units, hashes: NDArray[np.int64], most: float | None) -> list[tuple[int, int]]:
    """Unite the units of rows with equal hashes.

    Args:
        units: Changed in place.
        hashes: (rows,).
        most: A hash of more rows than this links nothing; None: no limit.

    Returns:
        (number of rows, first row) of each hash that links nothing because of the limit.
    """
    order = np.argsort(hashes)
    hashes = hashes[order]
    linked = hashes[1:] == hashes[:-1]
    passed_over = []
    for start, stop in _long_runs(linked, most) if most is not None else ():
        members = order[start:stop]
        linked[start : stop - 1] = False
        if np.ptp(units.of_rows[members]):
            passed_over.append((len(members), int(members.min())))
    del hashes
    pairs = units.of_rows[order[:-1][linked]], units.of_rows[order[1:][linked]]
    del order, linked
    if np.any(pairs[0] != pairs[1]):
        size = len(units.sizes)
        graph = coo_array((np.ones(len(pairs[0]), dtype=np.bool_), pairs), shape=(size, size))
        del pairs
        _, united = connected_components(graph, directed=False)
        units.of_rows = united[units.of_rows].astype(np.int64)
        units.sizes = np.bincount(units.of_rows)
    return sorted(passed_over, key=lambda prompt: (-prompt[0], prompt[1]))


def _long_runs(linked: NDArray[np.bool_], most: float) -> list[tuple[int, int]]:
    """(start, stop) of each run of more than `most` items. linked: (items - 1,) whether an item and the next are in one
    run."""
    ends = np.flatnonzero(~linked)
    starts = np.append(0, ends + 1)
    lengths = np.diff(starts, append=len(linked) + 1)
    return [(int(starts[run]), int(starts[run] + lengths[run])) for run in np.flatnonzero(lengths > most)]


# Labels


def _find_labels(index: RowIndex, mask: RowMask, units: _Units) -> tuple[NDArray[np.int64] | None, str]:
    """(units,) the number of the most frequent completion of each unit, and a line about it.

    (None, "") if the completions are not labels.
    """
    values, first, labels = np.unique(index.columns[mask, COMPLETION], return_index=True, return_inverse=True)
    count = len(values)
    if not 2 <= count <= MAX_LABELS or len(units.sizes) < UNITS_PER_LABEL * count:
        return None, ""
    ranks = np.argsort(np.argsort(first))
    pairs, rows = np.unique(units.of_rows * count + ranks[labels], return_counts=True)
    order = np.lexsort((-(pairs % count), rows, pairs // count))
    owners = pairs[order] // count
    most = np.append(owners[1:] != owners[:-1], True)
    mixed = ", each group by that of most of its rows" if len(pairs) > len(units.sizes) else ""
    return pairs[order][most] % count, f"stratified by {count} completions{mixed}"


# Drawing


def _draw(
    sizes: NDArray[np.int64], labels: NDArray[np.int64] | None, count: int, random: np.random.Generator
) -> NDArray[np.bool_]:
    """A mask of the units that are held out.

    Args:
        sizes: (units,) the number of rows of each unit.
        labels: (units,) the label of each unit; None: the draw is not stratified.
        count: How many rows to hold out.
        random: Random generator.
    """
    order = random.permutation(len(sizes))
    taken = np.zeros(len(sizes), dtype=np.bool_)
    if labels is not None:
        by_label = order[np.argsort(labels[order], kind="stable")]
        ends = np.cumsum(np.bincount(labels))
        rows = np.bincount(labels, weights=sizes).astype(np.int64)
        for units, share in zip(np.split(by_label, ends[:-1]), _shares(rows, count, random), strict=True):
            taken[_fitting(units, sizes, share)] = True
    rest = count - int(sizes[taken].sum())
    taken[_fitting(order[~taken[order]], sizes, rest)] = True
    if not taken.any():
        taken[order[np.argmin(sizes[order])]] = True
    return taken


def _shares(rows: NDArray[np.int64], count: int, random: np.random.Generator) -> Sequence[int]:
    """Divide `count` in proportion to `rows` by largest remainder; ties are broken at random."""
    shares, remainders = np.divmod(rows * count, rows.sum())
    order = np.lexsort((random.permutation(len(rows)), -remainders))
    shares[order[: count - shares.sum()]] += 1
    return [int(share) for share in shares]


def _fitting(units: NDArray[np.int64], sizes: NDArray[np.int64], room: int) -> NDArray[np.int64]:
    """The units that fit, taken greedily in order; a unit that exceeds the rest is skipped. room: number of rows."""
    taken = [units[:0]]
    while len(units := units[sizes[units] <= room]):
        ends = np.cumsum(sizes[units])
        number = int(np.searchsorted(ends, room, side="right"))
        taken.append(units[:number])
        room -= int(ends[number - 1])
        units = units[number:]
    return np.concatenate(taken)
