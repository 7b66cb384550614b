"""Log-probabilities of the reference of preferences: the model before its first step.

That is the base with the adapter switched off, or with the adapter that is trained further. So no second model is
needed: they are computed once, before the first step, and kept in the cache of the rows, under everything that decides
them.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratune import kernels
from loratune.codes import Code
from loratune.compare.engine import BeforeBatch, ScoringLayout, nothing
from loratune.compare.objectives import ComparedRows
from loratune.data import token_cache
from loratune.data.packing import BatchLayout
from loratune.errors import NumericError, Problem
from loratune.events import note
from loratune.lora import tensors
from loratune.lora.attach import PeftModel
from loratune.lora.tensors import AdapterInit
from loratune.system.launcher import Group
from loratune.text import plural
from loratune.training.preferences import PreferenceObjective, ScoredBatch

_PASS_TOKENS = 2048
"""Tokens of a batch: they do not depend on the batches of the run, so that the numbers do not either."""
_PART_BATCHES = 256
"""Batches after which the numbers so far are kept, so that a run that ends early need not compute them once more."""
_ORDERED = 0.5
"""The share of pairs in order from which on that is pointed out."""


@dataclass(frozen=True)
class Reference:
    """The reference model of a preference objective.

    Attributes:
        model: The base with the adapter before its first step.
        start: That adapter.
        frozen: Whether the reference is the model with that adapter, as it is one to train further, or makes up for
            what quantization loses; otherwise it is the base without it.
        acceleration: What of the model the kernels compute.
        identity: What its log-probabilities depend on beside the rows: the base, the adapter, and what computes them.
    """

    model: PeftModel
    start: AdapterInit
    frozen: bool
    acceleration: kernels.Acceleration
    identity: Mapping[str, Any]

    def inside(self) -> AbstractContextManager[Any]:
        """Inside, the model is the reference."""
        return (
            nullcontext()
            if self.frozen
            else tensors.as_initialized(self.model, self.start, tensors.full_weights(self.model))
        )


def compute(
    objective: PreferenceObjective,
    reference: Reference,
    layouts: Mapping[str, BatchLayout],
    pad_id: int,
    group: Group,
    before_batch: BeforeBatch = nothing,
) -> None:
    """Give all rows that need it their log-probabilities in the reference, from the cache where they are known.

    Objectives without a reference need those of held-out rows alone, to say what has changed.

    Args:
        objective: What compares the answers, with their rows.
        reference: What they are compared with.
        layouts: The batches of the run by their split, which say how rows can be laid out.
        pad_id: The token for padding.
        group: The processes of the run.
        before_batch: See `losses.BeforeBatch`.
    """
    train = layouts["train"]
    for name, rows in objective.splits.items():
        if name == "train" and not objective.formula.has_reference and "validation" in layouts:
            continue
        scoring = ScoringLayout(
            train.flat, train.saved, pad_id, _PASS_TOKENS if train.flat or train.size > 1 else 0
        )  # single rows, where they cannot be packed, as the model may compute something else for padded ones
        key = _key(reference, rows, scoring)
        found = _known(key, group)
        if found is None:
            note(f"computing the reference of {plural(rows.dataset.items, f'{name} {objective.unit}')}")
            with reference.inside(), reference.acceleration.applied(reference.model):
                found = _computed(objective, reference.model, rows, scoring, key, group, before_batch)
        elif group.main:
            _discard_parts(key)
        _check_finite(rows, found)
        rows.reference = found[: len(rows)]
        rows.mismatched = found[len(rows) :] if len(found) > len(rows) else None
        if name == "train" and rows.dataset.rows_per_example == 2:
            note(_order(rows))


def _check_finite(rows: ComparedRows, values: NDArray[np.float64]) -> None:
    """Raises NumericError: the reference gives an answer no log-probability that could be compared with."""
    if np.isfinite(values).all():
        return
    first = int(np.flatnonzero(~np.isfinite(values))[0])
    what = f"the reference, which is the model before training, gives an answer the log-probability {values[first]}"
    fix = "check that the base model works by itself"
    where = rows.dataset.rows.row(first % len(rows)).where
    raise NumericError(Problem(Code.LORA_START, what, where, "training.objective", fix))


def _order(rows: ComparedRows) -> str:
    """A line on how many pairs the reference has in order."""
    assert rows.reference is not None
    share = float((rows.reference[::2] > rows.reference[1::2]).mean())
    line = f"the chosen answer is the more likely one in {share:.0%} of the training pairs before training"
    return f"{line}: more than half are in order already" if share > _ORDERED else line


def _known(key: str, group: Group) -> NDArray[np.float64] | None:
    """The numbers that are kept under a key, for all processes; None if there are none."""
    known = token_cache.load_values(key) if group.main else None
    values = group.broadcast(known.tolist() if known is not None else None)
    return None if values is None else np.array(values, np.float64)


def _computed(
    objective: PreferenceObjective, model: Any, rows: ComparedRows, scoring: ScoringLayout, key: str, group: Group,
    before_batch: BeforeBatch,
) -> NDArray[np.float64]:  # fmt: skip
    """The log-probabilities of all rows in the order of the dataset, and behind them those of the mismatched ones.

    They are kept, if they are finite, and until all are there, so is each part of them. Arguments as of `compute`; key:
    what they are kept under.
    """
    items, each = objective.items(rows.dataset)
    layout = scoring.layout(items, rows.dataset.rows.lengths, each)
    batches, rows_per_example = scoring.batches(layout, range(rows.dataset.items)), rows.dataset.rows_per_example
    parts = [batches[start : start + _PART_BATCHES] for start in range(0, len(batches), _PART_BATCHES)]
    count, is_divided = len(parts), len(parts) > 1
    known = [_known(_part_key(key, number), group) if is_divided else None for number in range(count)]
    if done := sum(values is not None for values in known):
        note(f"of the reference {done / count:.0%} is known from a run that ended early")
    found = []
    for number, (part, values) in enumerate(zip(parts, known, strict=True)):
        if values is None:
            read = ScoredBatch.of(objective.read(model, layout, part, before_batch, group))
            values = np.concatenate([one.log_probabilities.numpy() for one in (read.answers, read.mismatched)])
            if is_divided and group.main and np.isfinite(values).all():
                token_cache.store_values(_part_key(key, number), values)
            if is_divided and (number + 1) * 10 // count > number * 10 // count:
                note(f"{(number + 1) / count:.0%} of the reference is computed")
        found.append(values.reshape(-1, sum(map(len, part)) * rows_per_example))
    items = np.concatenate(batches)
    order = np.argsort((items[:, None] * rows_per_example + np.arange(rows_per_example)).reshape(-1))
    computed = np.concatenate(found, axis=1)[:, order].reshape(-1)
    if group.main:
        if np.isfinite(computed).all():
            token_cache.store_values(key, computed)
        _discard_parts(key, count)
    return computed


def _part_key(key: str, number: int) -> str:
    """What a part is kept under. key: of the whole."""
    return hashlib.sha256(f"{key} {_PART_BATCHES} {number}".encode()).hexdigest()


def _discard_parts(key: str, count: int = 0) -> None:
    """Remove the parts, as the whole is known, or is not finite. The last goes first, so that a process that is killed
    leaves the first ones, by which the next one finds them. count: how many there are; those that are found, if 0."""
    while token_cache.has_values(_part_key(key, count)):
        count += 1
    for number in reversed(range(count)):
        token_cache.discard_values(_part_key(key, number))


def _key(reference: Reference, rows: ComparedRows, scoring: ScoringLayout) -> str:
    """What the log-probabilities of rows are kept under: it differs where anything that decides their bits does."""
    partners = rows.partners_digest()
    batches = [scoring.flat, scoring.saved is not None, scoring.tokens]
    parts = [dict(reference.identity), rows.dataset.fingerprint, partners, *batches]
    return hashlib.sha256(json.dumps(["reference", parts], sort_keys=True).encode()).hexdigest()
