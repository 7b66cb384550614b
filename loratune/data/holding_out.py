"""Holds out a fraction of the rows at random, and keeps related rows in one split.

Rows are linked by equal content, equal prompts and equal values of `group_by`; rows that are linked directly or through
other rows form a unit. Units are numbered by their first rows, so the draw depends only on the rows and the seed.

`nested_order` orders the rows that remain, of which `data.max_train_samples` takes the first.

Memory: arrays of 8 bytes per row, below 100 bytes per row in total, which are freed once the mask is computed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from loratune.text import Detail, plural

TEMPLATE_SHARE, TEMPLATE_ROWS = 0.05, 10
"""A prompt of more than this share of the rows is boilerplate and links no rows; in small data only if it also occurs
in more than `TEMPLATE_ROWS` rows, or in more rows than are held out."""

MAX_LABELS, UNITS_PER_LABEL = 100, 10
"""Completions are labels if there are at most this many distinct ones, with on average this many units or more each."""


def hold_out(
    rows: NDArray[Any], fraction: float, group_by: str | None, seed: int, where: Callable[[int], str]
) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """Draw the validation rows.

    Units are drawn in random order, skipping those that exceed the remaining number of rows; if none fits, a smallest
    one is drawn. If completions are labels, each label first gets its share of the rows (largest remainder).

    Args:
        rows: (rows,) of `HASHED_ROW`, the rows to draw from.
        fraction: The fraction of these rows to hold out; at least one row is held out.
        group_by: The field whose values keep rows together.
        seed: Random seed.
        where: The place of a row, by its number.

    Returns:
        (rows,) a mask of the rows held out, and lines on how the draw differs from a plain random one (groups, strata).
    """
    count = max(1, round(len(rows) * fraction))
    most = max(TEMPLATE_SHARE * len(rows), min(TEMPLATE_ROWS, count))
    links = [("folded", "copies of a row", None), ("prompt", "rows with the same prompt", most)]
    if group_by is not None:
        links.append(("group", f"rows with the same `{group_by}`", None))
    units, sizes, reasons = np.arange(len(rows)), np.ones(len(rows), dtype=np.int64), list[str]()
    templates: list[tuple[int, int]] = []
    for column, reason, limit in links:
        before = len(sizes)
        units, sizes, passed_over = _link(units, sizes, rows[column], limit)
        templates += passed_over
        reasons += [reason] if len(sizes) < before else []
    if reasons:  # number the units by their first rows
        _, first, units = np.unique(units, return_index=True, return_inverse=True)
        units = np.argsort(np.argsort(first))[units]
        sizes = np.bincount(units)
    labels, stratified = _find_labels(rows["completion"], units, len(sizes))
    random = np.random.default_rng([seed, 1])
    remarks = list[str]()
    if not reasons and labels is None:
        held_out = random_mask(len(rows), count, random)
    else:
        drawn = _draw(sizes, labels, count, random)
        held_out = drawn[units]
        if reasons:
            got, groups = int(np.count_nonzero(held_out)), plural(int(np.count_nonzero(drawn)), "group")
            asked = "" if got == count else f" (the fraction asks for {count:,})"
            together = f"held out {got:,} rows{asked} in {groups}: {', '.join(reasons)} stay together"
            remarks.append(Detail(together))
    remarks += [Detail(stratified)] if stratified else []
    if group_by and (alone := int(np.count_nonzero(rows["group"] == rows["folded"]))):
        remarks.append(f"rows without `{group_by}`: {alone:,}, which belong to no group")
    if templates:
        places = ", ".join(where(first) for _, first in templates[:3])
        prompts = "a prompt" if len(templates) == 1 else f"{len(templates)} prompts"
        number = f"{sum(size for size, _ in templates):,} rows"
        remarks.append(f"{prompts} of {number} ({places}) may be on both sides: too common to keep its rows together")
    return held_out, tuple(remarks)


def nested_order(completions: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], str]:
    """An order of rows whose first rows, however many, are drawn at random; if completions are labels, they have each
    label in the share that it has among all rows, to within a row.

    Args:
        completions: (rows,) the hash of the completion of each row.
        seed: Random seed.

    Returns:
        (rows,) their numbers, and a line about the labels; empty if completions are not labels.
    """
    order = np.random.default_rng([seed, 4]).permutation(len(completions))
    labels, stratified = _find_labels(completions, np.arange(len(completions)), len(completions))
    if labels is None:
        return order, ""
    order = order[np.argsort(labels[order], kind="stable")]
    sizes = np.bincount(labels)
    places = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return order[np.argsort((places + 0.5) / np.repeat(sizes, sizes), kind="stable")], stratified


def _link(
    units: NDArray[np.int64], sizes: NDArray[np.int64], hashes: NDArray[np.int64], most: float | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[tuple[int, int]]]:
    """Unite the units of rows with equal hashes.

    Args:
        units: (rows,) the number of the unit of each row, from 0.
        sizes: (units,) the number of rows of each unit.
        hashes: (rows,).
        most: A hash of more rows than this links nothing; None: no limit.

    Returns:
        The units, their sizes, and (number of rows, first row) of each hash that links nothing because of the limit.
    """
    order = np.argsort(hashes)
    hashes = hashes[order]
    linked = hashes[1:] == hashes[:-1]
    passed_over = []
    if most is not None:
        ends = np.flatnonzero(~linked)
        starts = np.append(0, ends + 1)
        lengths = np.diff(starts, append=len(hashes))
        for start, length in zip(starts[lengths > most], lengths[lengths > most], strict=True):
            members = order[start : start + length]
            linked[start : start + length - 1] = False
            if np.ptp(units[members]):
                passed_over.append((len(members), int(members.min())))
        del ends, starts, lengths
    del hashes
    pairs = units[order[:-1][linked]], units[order[1:][linked]]
    del order, linked
    if np.any(pairs[0] != pairs[1]):
        graph = coo_array((np.ones(len(pairs[0]), dtype=np.bool_), pairs), shape=(len(sizes), len(sizes)))
        del pairs
        _, united = connected_components(graph, directed=False)
        units = united[units].astype(np.int64)
        sizes = np.bincount(units)
    return units, sizes, sorted(passed_over, key=lambda prompt: (-prompt[0], prompt[1]))


def _find_labels(
    completions: NDArray[np.int64], units: NDArray[np.int64], count_units: int
) -> tuple[NDArray[np.int64] | None, str]:
    """(units,) the number of the most frequent completion of each unit, and a line about it.

    (None, "") if the completions are not labels.
    """
    values, first, labels = np.unique(completions, return_index=True, return_inverse=True)
    count = len(values)
    if not 2 <= count <= MAX_LABELS or count_units < UNITS_PER_LABEL * count:
        return None, ""
    ranks = np.argsort(np.argsort(first))
    pairs, rows = np.unique(units * count + ranks[labels], return_counts=True)
    order = np.lexsort((-(pairs % count), rows, pairs // count))
    owners = pairs[order] // count
    most = np.append(owners[1:] != owners[:-1], True)
    mixed = ", each group by that of most of its rows" if len(pairs) > count_units else ""
    return pairs[order][most] % count, f"stratified by {count} labels{mixed}"


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
        shares, remainders = np.divmod(rows * count, rows.sum())
        largest = np.lexsort((random.permutation(len(rows)), -remainders))[: count - shares.sum()]
        shares[largest] += 1  # ties are broken at random
        for units, share in zip(np.split(by_label, ends[:-1]), shares.tolist(), strict=True):
            taken[_fitting(units, sizes, share)] = True
    rest = count - int(sizes[taken].sum())
    taken[_fitting(order[~taken[order]], sizes, rest)] = True
    if not taken.any():
        taken[order[np.argmin(sizes[order])]] = True
    return taken


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


def random_mask(count: int, share: int, random: np.random.Generator) -> NDArray[np.bool_]:
    """A mask over `count` rows with `share` of them drawn at random."""
    mask = np.zeros(count, dtype=np.bool_)
    if share >= count:
        mask[:] = True
    else:
        mask[random.choice(count, share, replace=False, shuffle=False)] = True
    return mask
