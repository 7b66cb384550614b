"""`loratune train`: trains an adapter from a config and its rows, and publishes its directory.

`train` is the whole run; `training.plan.make_plan` prepares it up to the first step.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from loratune import config, data, kernels, memory
from loratune.adapter import card, clients
from loratune.codes import Code
from loratune.compare import preferences, verdict
from loratune.data import splits
from loratune.errors import NumericError, Problem, ResourceError
from loratune.events import emit, note
from loratune.lora import adapter_files, attach, parameters
from loratune.model import checks, load
from loratune.model.upstream import quiet_transformers
from loratune.system import environment, signals
from loratune.system.files import check_free_space, explain_full_disk, versioned, write_json
from loratune.system.launcher import SINGLE_PROCESS, Group
from loratune.training import reference, results, time_budget, trainer
from loratune.training.checkpoints.run_dir import PUBLISH_WORSE
from loratune.training.checkpoints.store import MOST_CHECKPOINTS
from loratune.training.plan import Plan, make_plan
from loratune.training.preflight import Run
from loratune.training.processes import SharedStop
from loratune.training.results import TrainedAdapter

_SPARE_MEMORY = 2
"""If the memory estimate times this factor exceeds the free memory, the largest batch is tried before training."""
_CONDITIONS = {
    "processor": "the processor", "device": "the device", "threads": "the number of threads",
    "compiled_code": "the compiled CPU code",
}  # fmt: skip
"""Key of loratune.json → its name in `conditions`."""


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
    group, directory, point = plan.group, plan.run.directory, plan.resume_point
    if group.main:
        directory.prepare(resume=point is not None)
    if group.leads_machine:
        data.remove_old_entries()
    group.all_gather(None)  # A barrier: a signal now arrives in all processes before the next line, or in all after it.
    with signals.defer_signals(repeated=group.count > 1) as own:
        _check_start(plan)
        stop = SharedStop(own, group)
        stop.check()  # Python ignores exceptions that a handler raises in a destructor.
        if not (is_timed := plan.run.config.training.max_minutes is not None):
            emit(plan.event())  # before what a large base takes minutes for
        reference.compute(plan, plan.batches.objective, stop)
        plan = reference.write_texts(plan)
        if is_timed:
            reference.compute_base(plan)
        with _ready_to_train(plan):
            scarce = _is_memory_scarce(plan)
            if is_timed:
                plan = time_budget.fix_length(plan, stop, began, scarce=scarce)
                emit(plan.event())
            trained = trainer.fit(plan, stop, oom_dry_run=scarce and not is_timed)
    stop.check()  # A signal can arrive after the trainer's last check.
    trained = results.compare_with_base(plan, trained)
    if trained.verdict in verdict.REFUSED and not allow_worse:
        _reject(plan, trained)
    trained = results.measure(plan, trained)
    if group.main:
        plan.base.files.check_unchanged_in_run()
    group.close()
    return _publish(plan, replace(trained, peak_memory=memory.peak())) if group.main else None


def _check_start(plan: Plan) -> None:
    """Report the step from which a resumed run continues. Raises ResourceError: too little disk space for a new run."""
    if (point := plan.resume_point) is not None:
        keep, dropout = plan.config.keeps_best, plan.config.lora.lora_dropout > 0
        for line in point.notes(plan.checkpoints.record, keep=keep, dropout=dropout):
            note(line)
    elif plan.group.main:
        size = (MOST_CHECKPOINTS + 1) * plan.checkpoints.size + load.tokenizer_bytes(plan.datasets.tokenizer)
        check_free_space(plan.run.directory.partial, size)


def _is_memory_scarce(plan: Plan) -> bool:
    """Whether memory may be too small, so that the largest batch is tried before the first step. Weights are in it
    already."""
    further = _SPARE_MEMORY * plan.memory.total - plan.memory.weights
    return any(plan.group.all_gather(further > memory.available(plan.model.device)))


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


def _reject(plan: Plan, trained: TrainedAdapter) -> NoReturn:
    """End a run whose adapter is worse than its base or learned nothing, and record that next to its checkpoints."""
    assert trained.gain is not None and trained.verdict is not None
    is_worse, what = trained.verdict == "worse", trained.headline
    if plan.group.main:
        record = versioned({"step": trained.steps, "verdict": trained.verdict, "headline": what})
        with suppress(OSError):  # the record only makes later messages more exact
            write_json(plan.run.directory.rejection, record)
    plan.group.all_gather(None)  # a barrier: the other processes end only after the record is written
    code = Code.TRAINING_WORSE_THAN_BASE if is_worse else Code.TRAINING_LEARNED_NOTHING
    change = "lower training.learning_rate" if is_worse else "raise training.learning_rate or training.num_train_epochs"
    fix = f"{change} and start with --overwrite, or {PUBLISH_WORSE}"
    message = f"the adapter {'is ' if is_worse else ''}{what}{'' if is_worse else f' (gain: {trained.gain})'}"
    if not is_worse and not plan.adapter_init.has_changed(trained.weights):
        code, message = Code.LORA_UNCHANGED, "training changed nothing: every lora_B still has its initial values"
    raise NumericError(Problem(code, message, fix=fix))


def _publish(plan: Plan, trained: TrainedAdapter) -> TrainedAdapter:
    """Write the adapter directory, and move it atomically to the output directory."""
    directory = plan.run.directory
    size = plan.count.adapter_bytes + load.tokenizer_bytes(plan.datasets.tokenizer)
    try:
        with explain_full_disk("the adapter directory", size, directory.partial, "make room, then --resume"):
            directory.create_staging()
            unchanged, init = trained.verdict == "learned nothing", plan.adapter_init
            size = attach.save(plan.model, directory.staging, init, trained.weights, unchanged=unchanged)
            _write_descriptions(plan, trained)
            for path in directory.publish():
                note(f"{path} is kept: this run did not write it")
    except NumericError:
        directory.remove_checkpoints()  # The weights did not change; resuming would fail in the same way.
        raise
    return replace(trained, adapter_bytes=size)


def _write_descriptions(plan: Plan, trained: TrainedAdapter) -> None:
    """Write all files of the staged adapter except its weights: tokenizer, config, card, row hashes, record."""
    staging, name, rows = plan.run.directory.staging, plan.run.directory.output.name, plan.run.rows
    assert rows is not None
    plan.datasets.tokenizer.save_pretrained(staging)
    (staging / "run.yaml").write_text(config.dump(plan.config), encoding="utf-8")
    system, known = plan.run.system, not [*parameters.layers_unknown_to_llama_cpp(plan.model)]
    loader, quantized = checks.auto_class(plan.base.config).__name__, plan.base.quantized
    use = partial(clients.sections, loader=loader, quantized=quantized, in_vllm=plan.servers["vllm"])
    lines = card.CardLines(
        use=use(plan.config, name, card.example_command(name, rows.train, system), are_layers_known=known),
        verdict=trained.headline,
        gain=str(trained.gain),
        forgetting=str(trained.forgetting or ""),
        unrelated=str(trained.unrelated),
        behavior=str(trained.behavior or ""),
        held_out=trained.held_out,
        formats=rows.train.formats,
        example=card.example(rows.train, system),
        changes=plan.checkpoints.record.changes,
        objective=preferences.described(plan.config),
        processes=plan.group.count,
        has_system=bool(system),
    )
    text = card.model_card(plan.config.resolved(), trained.metrics, name, lines)
    (staging / "README.md").write_text(text, encoding="utf-8")
    start = plan.run.start
    splits.write_row_hashes(staging, rows.train, start.trained_on if start else None, continued=start is not None)
    record = _record(plan, trained) | {"files": adapter_files.manifest(staging)}
    write_json(staging / adapter_files.RECORD_FILE, record)


def _record(plan: Plan, trained: TrainedAdapter) -> dict[str, Any]:
    """The content of loratune.json, except the list of files."""
    kept, datasets, start, rows = plan.checkpoints.record, plan.datasets, plan.run.start, plan.run.rows
    assert rows is not None
    quantized = plan.base.quantized
    record = card.provenance(plan.config.resolved(), trained.metrics, trained.curve, kept.fingerprints, quantized)
    record["machine"] |= {key: (kept.conditions or {})[name] for key, name in _CONDITIONS.items()}
    record["machine"]["peak_memory"] = trained.peak_memory
    prompts = card.recorded_prompts(data.first_examples(rows.train, datasets.train.rows))
    record |= {
        "not_accelerated": dict(trained.not_accelerated),
        "formats": rows.train.formats,
        "chat": rows.train.chat,
        "processes": plan.group.count,
        "rows": datasets.train.report.counts(),
        "splits": {name: split.report.record() for name, split in datasets.splits.items()},
        "changes": kept.changes,
        "prompts": prompts,
    }
    if plan.targets.parameters:
        record["target_parameters"] = parameters.wrapped_parameters(plan.model)
    if system := plan.run.system:
        record["system"] = system
    if start is not None:
        adapter = {"adapter": str(start.info.files.path), "digest": start.digest, "replay": datasets.replay}
        record["start_from"] = adapter
    return record
