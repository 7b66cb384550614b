"""What a run keeps of the model as it was before its first step: the texts of `retention` with their predictions, and
the reference log-probabilities of preferences. Both are read from the cache if possible."""

import hashlib
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial

from loratune.compare import behavior
from loratune.compare.base_results import BaseResults, Numbers
from loratune.compare.engine import Objective, nothing
from loratune.compare.preferences import PreferenceObjective, order_note, set_reference
from loratune.errors import DataError, ModelError
from loratune.events import note, progress
from loratune.lora import tensors
from loratune.lora.tensors import Weights
from loratune.model import fingerprints
from loratune.model.load import context_length
from loratune.system import launcher
from loratune.system.launcher import SINGLE_PROCESS
from loratune.text import plural
from loratune.training.plan import Plan
from loratune.training.processes import SharedStop


def base_results(plan: Plan, weights: Weights) -> BaseResults:
    """The results of the base of a run. weights: those of the adapter, see `tensors.full_weights`."""
    alone = partial(tensors.as_initialized, plan.model, plan.adapter_init, weights)
    group = plan.group if launcher.sharding() else SINGLE_PROCESS
    found, digest = BaseResults.of(plan.batches.engine, alone, plan.base.fingerprint, group), hashlib.sha256()
    if not plan.adapter_init.to_plain_lora:
        return found
    for name, tensor in plan.adapter_init.tensors.items():  # with it the model is the base up to rounding only
        digest.update(name.encode() + fingerprints.block_sums(tensor, rounded=False))
    return replace(found, identity={**(found.identity or {}), "rounded by": digest.hexdigest()})


def _before_training(plan: Plan) -> BaseResults:
    """The results of the model before its first step: its base, or the base with the adapter that it starts from."""
    found, config = base_results(plan, tensors.full_weights(plan.model)), plan.config
    identity = {**(found.identity or {}), "shares": config.data.share_prefixes}
    if plan.run.start is None and config.lora.init_lora_weights != "loftq":
        return replace(found, identity=identity)
    start = {"start": plan.run.start and plan.run.start.digest, "lora": config.lora.model_dump()}
    return replace(found, identity=identity | start | {"seed": config.training.seed}, alone=nullcontext)


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
    before, group, failed = _before_training(plan), plan.group, False
    if group.main or launcher.sharding():  # whose forward passes all processes take part in
        try:
            retention.write(before, plan.datasets.renderer, plan.config.training.seed)
        except ModelError as error:
            if not plan.decides("retention.kl_weight"):
                raise
            note(f"retention has no effect: {error.problems[0].what}")
            failed = True
    if group.broadcast(failed):
        return plan.with_values({"retention.kl_weight": 0.0})
    if not launcher.sharding():
        retention.set_numbers(group.broadcast(retention.as_numbers() if group.main else []))
    return plan


def set_preference_references(plan: Plan, objective: Objective, stop: SharedStop | None = None) -> None:
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
    before = replace(_before_training(plan), group=plan.group)
    for name, rows in objective.splits.items():
        dataset = rows.dataset
        if name == "train" and not objective.formula.has_reference and "validation" in plan.batches.layouts:
            continue
        log_probabilities = partial(_log_probabilities, plan, objective, name, stop)
        set_reference(rows, before.once(["reference", dataset.fingerprint, rows.partners_digest()], log_probabilities))
        if name == "train" and dataset.rows_per_example == 2:
            note(order_note(rows))


def _log_probabilities(plan: Plan, objective: PreferenceObjective, name: str, stop: SharedStop | None) -> Numbers:
    """Those of the answers of a split under the model as it is."""
    dataset = objective.splits[name].dataset
    note(f"computing the reference of {plural(dataset.items, f'{name} {objective.unit}')}")
    check = (lambda _: stop.check()) if stop else nothing
    plan.batches.engine.losses(dataset, objective.copies(dataset), objective, check)
    assert objective.last is not None
    return objective.last.log_probabilities


def precompute_base_results(plan: Plan) -> None:
    """Compute what the end of a run needs of its base, and keep it in the cache: the losses on unrelated text, and the
    answers to instructions. A run with a time budget cannot foresee how long these take."""
    base, text = base_results(plan, tensors.full_weights(plan.model)), plan.datasets.unrelated.rows
    left_out = plan.comparisons.left_out
    if text is not None and "unrelated" not in left_out:
        base.losses(text, dict.fromkeys(range(text.items), 1))
    if "behavior" in left_out or not (plan.group.main or launcher.sharding()):
        return
    renderer = plan.datasets.renderer
    with suppress(DataError, ModelError):  # then it is not measured at the end either
        given = behavior.prompts(renderer, context_length(plan.model.config))[1]
        with progress("answering everyday instructions as the base"):
            behavior.base_answers(base, given, renderer.end_ids)
