"""What a run keeps of the model as it was before its first step: the texts of `retention` with their predictions, and
the reference log-probabilities of preferences. Both are read from the cache if possible."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from loratune.compare import behavior
from loratune.compare.engine import Objective, nothing
from loratune.compare.preferences import PreferenceObjective, order_note, set_reference
from loratune.data import token_cache
from loratune.errors import DataError, ModelError
from loratune.events import note, progress
from loratune.lora import tensors
from loratune.model.load import context_length
from loratune.system import launcher
from loratune.text import plural
from loratune.training.plan import Plan
from loratune.training.processes import SharedStop


def _before_training(plan: Plan) -> tuple[dict[str, Any], Callable[[], AbstractContextManager[None]]]:
    """What decides what the model computes before its first step, as plain values; and a context in which it does."""
    start = plan.run.start.digest if plan.run.start else ""
    starts_elsewhere = bool(start) or plan.config.lora.init_lora_weights == "loftq"
    identity: dict[str, Any] = {"base": plan.base.fingerprint, "conditions": plan.checkpoints.record.conditions}
    identity |= {"start": start, "lora": plan.config.lora.model_dump() if starts_elsewhere else {}}
    identity |= {"seed": plan.config.training.seed, "shares": plan.config.data.share_prefixes}
    identity |= {"flat": plan.batches.engine.flat, "padded": plan.batches.engine.writes_padded}
    if starts_elsewhere:  # it is the model with the adapter that it starts from
        return identity, nullcontext
    weights = tensors.full_weights(plan.model)
    return identity, partial(tensors.as_initialized, plan.model, plan.adapter_init, weights)


def write_texts(plan: Plan) -> Plan:
    """Give a run its texts of `retention`, and what the model predicts in them before its first step.

    Returns:
        The plan; without retention if the model writes nothing, and the weight of retention was left to `auto`.

    Raises:
        ModelError: The model writes nothing, and the weight was given.
    """
    retention = plan.retention
    if retention is None:
        return plan
    identity, before = _before_training(plan)
    renderer, engine, group, failed = plan.datasets.renderer, plan.batches.engine, plan.group, False
    if group.main or launcher.sharding():  # whose forward passes all processes take part in
        try:
            retention.write(plan.model, engine, renderer, identity, before)
        except ModelError as error:
            if not plan.decides("retention.kl_weight"):
                raise
            note(f"retention has no effect: {error.problems[0].what}")
            failed = True
    if group.broadcast(failed):
        section = plan.config.retention.model_copy(update={"kl_weight": 0.0})
        plan = plan.with_config(plan.config.model_copy(update={"retention": section}))
        return replace(plan, batches=replace(plan.batches, retention=None))
    if not launcher.sharding():
        retention.set_numbers(group.broadcast(retention.as_numbers() if group.main else []))
    return plan


def compute(plan: Plan, objective: Objective, stop: SharedStop | None = None) -> None:
    """Set the reference log-probabilities of preference rows: those of the current model, before its first step. They
    are read from the cache if possible.

    Objectives without a reference need them for held-out rows only, to report changes.

    Args:
        plan: The run.
        objective: The objective of the run, or another one to measure the adapter by.
        stop: Whether the run was asked to stop; None in one process that a signal just ends.

    Raises:
        NumericError: The log-probability of an answer is not finite.
        KeyboardInterrupt: The run was stopped.
    """
    if not isinstance(objective, PreferenceObjective):
        return
    batches, group, engine = plan.batches, plan.group, plan.batches.engine
    identity, inside = _before_training(plan)
    for name, rows in objective.splits.items():
        dataset = rows.dataset
        if name == "train" and not objective.formula.has_reference and "validation" in batches.layouts:
            continue
        parts = [identity, dataset.fingerprint, rows.partners_digest()]
        key = hashlib.sha256(json.dumps(["reference", parts], sort_keys=True).encode()).hexdigest()
        known = token_cache.load_values(key) if group.main else None
        known = group.broadcast(known.tolist() if known is not None else None)
        if known is not None:
            values = np.array(known, np.float64)
        else:
            note(f"computing the reference of {plural(dataset.items, f'{name} {objective.unit}')}")
            with inside():
                engine.losses(
                    dataset, objective.copies(dataset), objective, (lambda _: stop.check()) if stop else nothing
                )
            assert objective.last is not None
            values = objective.last.log_probabilities
            if group.main and np.isfinite(values).all():
                token_cache.store_values(key, values)
        set_reference(rows, values)
        if name == "train" and dataset.rows_per_example == 2:
            note(order_note(rows))


def answering(plan: Plan) -> tuple[behavior.Answer, dict[str, Any]]:
    """How the model answers instructions, and what identifies its base, as `behavior.measure` takes them."""
    model, engine, ends = plan.model, plan.batches.engine, plan.datasets.renderer.end_ids

    def answer(given: Sequence[behavior.Ids]) -> list[list[int]]:
        return [*behavior.write(model, engine, given, behavior.ANSWER_TOKENS, end_ids=ends)]

    identity = {"base": plan.base.fingerprint, "conditions": plan.checkpoints.record.conditions}
    return answer, identity if engine.writes_padded else {**identity, "padded": False}


def answer_as_base(plan: Plan) -> None:
    """Have the base answer the instructions by which `behavior.measure` compares an adapter with it, and keep the
    answers in the cache: a run with a time budget cannot foresee how long that takes."""
    if not plan.group.main or launcher.sharding():
        return
    answer, identity = answering(plan)
    before = partial(tensors.as_initialized, plan.model, plan.adapter_init, tensors.full_weights(plan.model))
    with suppress(DataError, ModelError):  # then it is not measured at the end either
        given = behavior.prompts(plan.datasets.renderer, context_length(plan.model.config))[1]
        with progress("answering everyday instructions as the base"):
            behavior.base_answers(given, before, answer, identity)
