"""Holds out a fraction of the rows at random, and keeps related rows in one split.

Rows are linked by equal content, equal prompts and equal values of `group_by`; rows that are linked directly or through
other rows form a unit. Units are numbered by their first rows, so that what is drawn follows from the rows and the seed
alone.

Memory: arrays of 8 bytes a row each, below 100 bytes a row in total, which are freed once the mask is computed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from loratune.data.row_index import COMPLETION, FOLDED, GROUP, PROMPT, RowIndex, RowMask

TEMPLATE_SHARE, TEMPLATE_ROWS = 0.05, 10
"""A prompt that more than this share of the rows has is a template, which links nothing; in small data only if more
than so many rows have it, or more than are to be held out."""

MAX_LABELS, UNITS_PER_LABEL = 100, 10
"""Completions are labels where there are at most so many of them, and on average at least so many units for each."""


@dataclass
class _Units:
    """Which rows stay together.

    Attributes:
        of_rows: (rows,) the number of the unit of each row that takes part, from 0.
        sizes: (units,) rows of each.
        reasons: What links rows.
        templates: (rows, first row) of each prompt that is a template.
    """

    of_rows: NDArray[np.int64]
    sizes: NDArray[np.int64]
    reasons: list[str] = field(default_factory=list)
    templates: list[tuple[int, int]] = field(default_factory=list)


def hold_out(
    index: RowIndex, mask: RowMask, fraction: float, group_by: str | None, seed: int
) -> tuple[RowMask, tuple[str, ...]]:
    """Draw the rows to evaluate on.

    Units are taken in random order where they still fit into the number of rows that the fraction asks for; if none
    does, a smallest one is taken. Where completions are labels, each label first gets its share of the rows (largest
    remainder).

    Args:
        index: The rows, with all columns.
        mask: Those that take part.
        fraction: How many of these to hold out, at least one.
        group_by: The field whose values keep rows together.
        seed: Decides which.

    Returns:
        A mask of the rows held out, and a line for each way in which it is not one of rows drawn one by one.
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
    """How many rows to take of each source, so that they are in the proportion of the weights.

    No row is taken twice, so the source that is scarcest for its weight gives all its rows and sets the size of the
    mix; every source gives at least one row. As `datasets.interleave_datasets` with probabilities and
    stopping_strategy="first_exhausted", but exact instead of drawn.
    """
    size = min(count / weight for count, weight in zip(counts, weights, strict=True))
    exact = (round(size * weight) for weight in weights)
    return [min(count, max(1, share)) for count, share in zip(counts, exact, strict=True)]


def replay_numbers(own: int, earlier: int, share: float, seed: int) -> list[int]:
    """Which rows of an earlier run are mixed into those of a run, so that they are a share of the whole.

    Where there are too few of them, each is taken once, or as often as all can be, before some are drawn once more.

    Args:
        own: Rows of the run.
        earlier: Rows of the earlier run.
        share: Their share of all rows, between 0 and 1; at least one row is taken.
        seed: Decides which are drawn.

    Returns:
        Numbers of rows of the earlier run.
    """
    whole, rest = divmod(max(1, round(own * share / (1 - share))), earlier)
    drawn = np.flatnonzero(random_mask(earlier, rest, np.random.default_rng([seed, 2])))
    return [*range(earlier)] * whole + drawn.tolist()


def _remarks(
    index: RowIndex, mask: RowMask, rows: NDArray[np.int64], units: _Units, group_by: str | None
) -> Iterator[str]:
    """What does not keep rows together, though one might expect it to."""
    alone = int(np.count_nonzero(index.columns[mask, GROUP] == index.columns[mask, FOLDED])) if group_by else 0
    if alone:
        yield f"rows without `{group_by}`: {alone:,}, which belong to no group"
    if units.templates:
        places = ", ".join(index.where(int(rows[first])) for _, first in units.templates[:3])
        count = sum(size for size, _ in units.templates)
        prompts = "a prompt" if len(units.templates) == 1 else f"{len(units.templates)} prompts"
        yield f"{prompts} of {count:,} rows ({places}) may be on both sides: too common to keep its rows together"


# What belongs together


def _find_units(index: RowIndex, mask: RowMask, count: int, group_by: str | None) -> _Units:
    """count: how many rows are to be held out."""
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
        units: They are changed.
        hashes: (rows,).
        most: A hash that more rows have links nothing; None: every hash links.

    Returns:
        (rows, first row) of each hash that would have linked units, and does not.
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
    """The runs of more than so many items, as start and stop. linked: (items - 1,) whether the next is in one run."""
    ends = np.flatnonzero(~linked)
    starts = np.append(0, ends + 1)
    lengths = np.diff(starts, append=len(linked) + 1)
    return [(int(starts[run]), int(starts[run] + lengths[run])) for run in np.flatnonzero(lengths > most)]


# Labels


def _find_labels(index: RowIndex, mask: RowMask, units: _Units) -> tuple[NDArray[np.int64] | None, str]:
    """(units,) the number of the completion that most rows of a unit have, and a line about it.

    None where the completions are not labels.
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
        sizes: (units,) rows of each.
        labels: (units,) the label of each; None: they are not stratified.
        count: How many rows to hold out.
        random: Decides which.
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
    """Divide `count` in proportion to `rows` by largest remainder; lots are drawn between equal remainders."""
    shares, remainders = np.divmod(rows * count, rows.sum())
    order = np.lexsort((random.permutation(len(rows)), -remainders))
    shares[order[: count - shares.sum()]] += 1
    return [int(share) for share in shares]


def _fitting(units: NDArray[np.int64], sizes: NDArray[np.int64], room: int) -> NDArray[np.int64]:
    """The units that are taken, in order, if each is left out that does not fit any more. room: how many rows fit."""
    taken = [units[:0]]
    while len(units := units[sizes[units] <= room]):
        ends = np.cumsum(sizes[units])
        number = int(np.searchsorted(ends, room, side="right"))
        taken.append(units[:number])
        room -= int(ends[number - 1])
        units = units[number:]
    return np.concatenate(taken)
