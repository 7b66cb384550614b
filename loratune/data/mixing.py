"""Which rows of which source take part: shares by weight, and the fraction that is held out."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
"""One truth value per row."""


def shares(counts: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many rows each source gives, so that they stand to each other as the weights.

    No row is taken twice, so the source that is scarcest for its weight gives all its rows and sets the size of the
    mix; every source gives at least one row. As `datasets.interleave_datasets` with probabilities and
    stopping_strategy="first_exhausted", but exact instead of drawn.
    """
    size = min(count / weight for count, weight in zip(counts, weights, strict=True))
    given = (round(size * weight) for weight in weights)
    return [min(count, max(1, wanted)) for count, wanted in zip(counts, given, strict=True)]


def chosen(counts: Sequence[int], given: Sequence[int], seed: int) -> Mask:
    """A mask over the rows of all sources in turn, with `given` rows of each drawn by the seed."""
    random = np.random.default_rng(seed)
    masks = [_drawn(count, wanted, random) for count, wanted in zip(counts, given, strict=True)]
    return np.concatenate(masks)


def held_out(kept: Mask, fraction: float, seed: int) -> tuple[Mask, Mask]:
    """Divide the kept rows into those to learn from and the fraction to evaluate on, at least one row."""
    random = np.random.default_rng([seed, 1])
    places = np.flatnonzero(kept)
    drawn = _drawn(len(places), max(1, round(len(places) * fraction)), random)
    evaluated = np.zeros_like(kept)
    evaluated[places[drawn]] = True
    return kept & ~evaluated, evaluated


def _drawn(count: int, wanted: int, random: np.random.Generator) -> Mask:
    mask = np.zeros(count, dtype=np.bool_)
    if wanted >= count:
        mask[:] = True
    else:
        mask[random.choice(count, wanted, replace=False, shuffle=False)] = True
    return mask
