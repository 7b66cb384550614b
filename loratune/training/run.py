"""A training run from top to bottom: check, prepare, fit, compare, publish.

    check     preflight.check     → Run: the config, its rows as they were read, the output directory, the checkpoint
    prepare   plan.make_plan      → Plan: the rows as tokens and batches, the base with its adapter, the steps
    fit       trainer.fit         → TrainedAdapter: the weights of the kept step, and the loss curve
    compare   results             → TrainedAdapter: with its verdict, and what it cost
    publish   publishing.publish  → the adapter directory

`api.train` checks a run before torch is imported; what follows is here.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from loratune import data, kernels, memory
from loratune.compare import verdict
from loratune.errors import ResourceError
from loratune.events import emit, note
from loratune.model import load
from loratune.model.upstream import quiet_transformers
from loratune.system import environment, signals
from loratune.system.files import check_free_space
from loratune.system.launcher import SINGLE_PROCESS, Group
from loratune.training import publishing, reference, results, time_budget, trainer
from loratune.training.checkpoints.store import MOST_CHECKPOINTS
from loratune.training.plan import Plan, make_plan
from loratune.training.preflight import Run
from loratune.training.processes import SharedStop
from loratune.training.results import TrainedAdapter

_SPARE_MEMORY = 2
"""If the memory estimate times this factor exceeds the free memory, the largest batch is tried before training."""


def train(
    run: Run, group: Group = SINGLE_PROCESS, *, allow_worse: bool = False, began: float | None = None
) -> TrainedAdapter | None:
    """Train an adapter, check it, and publish its directory.

    Args:
        run: The run, with its config, rows and output directory checked.
        group: The processes of the run.
        allow_worse: Publish the adapter even if it is worse than its base, or learned nothing.
        began: The start of `training.max_minutes`, by `time.monotonic`; by default now.

    Returns:
        The published adapter in the main process, which does all writing; None in the other processes.

    Raises:
        ConfigError: The time budget is too short for a few steps.
        ModelError, DataError: The base, the tokenizer or the rows cannot be used.
        NumericError: A value is not finite, the adapter is worse than its base, or learned nothing.
        ResumeError: The checkpoint does not belong to this run.
        LockedError: Another run uses the output directory.
        ResourceError: Memory or disk ran out.
        LostError: Another process of the run has ended.
        KeyboardInterrupt: The user stopped the run.
    """
    began = time.monotonic() if began is None else began
    group.set_timeout(run.config.training.ddp_timeout)
    with group.connected(), run.directory.locked() if group.main else nullcontext():
        plan = make_plan(run, group)
        gc.collect()
        gc.freeze()  # Rows and model are kept until the end, so the collector can ignore them.
        return carry_out(plan, allow_worse=allow_worse, began=began)


@quiet_transformers()
def carry_out(plan: Plan, *, began: float, allow_worse: bool = False) -> TrainedAdapter | None:
    """Train the adapter of a plan, and publish it. The caller holds the lock of the run's directory.

    Args, result and errors as for `train`.
    """
    group, is_timed = plan.group, plan.config.training.max_minutes is not None
    if group.main:
        plan.run.directory.prepare(resume=plan.resume_point is not None)
    if group.leads_machine:
        data.ROWS.remove_old()
    group.all_gather(None)  # A barrier: a signal now arrives in all processes before the next line, or in all after it.
    with signals.defer_signals(repeated=group.count > 1) as own:
        _check_start(plan)
        stop = SharedStop(own, group)
        stop.check()  # Python ignores exceptions that a handler raises in a destructor.
        if not is_timed:
            # before what a large base takes minutes for; only the main process has a listener
            emit(plan.event(time_budget.expected(plan) if group.main else None))
        reference.set_preference_references(plan, plan.batches.objective, stop)
        plan = reference.write_texts(plan)
        if is_timed:
            reference.precompute_base_results(plan)
        with _ready_to_train(plan):
            further = _SPARE_MEMORY * plan.memory.total - plan.memory.weights  # the weights are in memory already
            scarce = any(group.all_gather(further > memory.available(plan.model.device)))
            if is_timed:
                plan = time_budget.fix_length(plan, stop, began, scarce=scarce)
                emit(plan.event())
            trained = trainer.fit(plan, stop, oom_dry_run=scarce and not is_timed)
    stop.check()  # A signal can arrive after the trainer's last check.

    trained = results.compare_with_base(plan, trained)
    if trained.verdict in verdict.REFUSED and not allow_worse:
        publishing.reject(plan, trained)
    trained = results.measure_remaining(plan, trained)

    if group.main:
        plan.base.files.check_unchanged_in_run()
    group.close()
    return publishing.publish(plan, trained) if group.main else None


def _check_start(plan: Plan) -> None:
    """Report the step from which a resumed run continues. Raises ResourceError: too little disk space for a new run."""
    if (point := plan.resume_point) is not None:
        keep, dropout = plan.config.keeps_best, plan.config.lora.lora_dropout > 0
        for line in point.notes(plan.checkpoints.record, keep=keep, dropout=dropout):
            note(line)
    elif plan.group.main:
        size = (MOST_CHECKPOINTS + 1) * plan.checkpoints.size + load.tokenizer_bytes(plan.datasets.tokenizer)
        check_free_space(plan.run.directory.partial, size)


@contextmanager
def _ready_to_train(plan: Plan) -> Iterator[None]:
    """Apply the training kernels to the model inside. Raises ResourceError: out of memory, with settings that would
    reduce it."""
    try:
        if plan.config.model.use_liger_kernel is True:
            kernels.use_liger(plan.model)
        with plan.batches.engine.acceleration.applied(plan.model):
            if plan.config.model.torch_compile:
                kernels.compile_layers(plan.model)
            environment.give_back_pages()
            yield
            return
    except results.OutOfMemory as error:
        problem, evaluating = error.problems[0], error.evaluating
    fix = "lower data.max_length, or leave out data.validation"
    if not evaluating:
        packed = plan.batches.train.flat
        savings = memory.savings(plan.model, *plan.batches.largest(), plan.training, packed=packed)
        fix = "set " + ", or ".join(f"{change} (saves about {size / (1 << 20):,.0f} MiB)" for change, size in savings)
    if plan.model.device.type == "cuda":  # docs.pytorch.org/docs/stable/notes/cuda.html
        fix += "; against fragmentation, set the environment variable PYTORCH_ALLOC_CONF=expandable_segments:True"
    raise ResourceError(replace(problem, fix=fix))
