"""`loratune train`: a config and its rows become an adapter directory.

`train` is the whole run from top to bottom. `make_plan` is the part before the first step, which is all that
`--dry-run` does.
"""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from loratune import config, data, escaping, kernels, memory
from loratune.codes import Code
from loratune.commands import card
from loratune.config import RunConfig
from loratune.data import DatasetSplit, ProgressFactory
from loratune.data.packing import BatchLayout
from loratune.errors import ModelError, NumericError, Problem, ResourceError
from loratune.lora import adapter_files, attach, parameters, targets, tensors
from loratune.lora.attach import PeftModel
from loratune.lora.initialize import AdapterInit
from loratune.lora.parameters import Count
from loratune.lora.targets import Targets
from loratune.lora.tensors import Weights
from loratune.model import base_files, checks, device, fingerprints, load
from loratune.system import signals
from loratune.system.files import check_free_space, explain_full_disk, write_json
from loratune.system.launcher import SINGLE_PROCESS, Group, host
from loratune.system.signals import Stop
from loratune.training import batching, callbacks, gain, resume, run_dir, trainer
from loratune.training.batching import TokenizedDatasets
from loratune.training.callbacks import Progress
from loratune.training.checkpoints import MOST_CHECKPOINTS, Checkpoints
from loratune.training.gain import Gain
from loratune.training.preflight import ValidatedRun
from loratune.training.resume import ResumePoint
from loratune.training.run_dir import RunDirectory
from loratune.training.trainer import Outcome, RunContext

_CHECKPOINT_OVERHEAD = 40_000
"""Bytes of a checkpoint besides weights and optimizer: random states, the trainer's own state, and a model card."""
_SPARE_MEMORY = 2
"""A run whose estimate, times this factor, exceeds the free memory tries its largest batch before it starts."""


@dataclass(frozen=True)
class Reporter:
    """Receives what a run reports: lines, the plan before the first step, and the progress over data and steps."""

    log: Callable[[str], None]
    plan: Callable[["Plan"], None]
    watch: ProgressFactory
    progress: Progress


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first step.

    Attributes:
        config: The configuration, with absolute paths.
        processes: How many processes the run has.
        train_split: The training rows as read; None in a process that did not read them.
        model: The base with the adapter attached.
        memory: The estimate of the memory that training needs.
        notes: Lines that the user should see.
        recorded_fingerprint: That of the base, in the version that the checkpoint to resume from uses.
        base_files: The files of the base, to see whether they change.
        acceleration: Which layers the kernels compute.
        example_prompt: A prompt to try the adapter with, quoted for a shell.
    """

    config: RunConfig
    processes: int
    train_split: DatasetSplit | None
    tokenizer: Any
    model: PeftModel
    targets: Targets
    adapter_init: AdapterInit
    count: Count
    datasets: TokenizedDatasets
    train_batches: BatchLayout
    validation_batches: BatchLayout | None
    memory: memory.Estimate
    notes: list[str]
    base_fingerprint: str
    recorded_fingerprint: str
    base_files: base_files.Files
    acceleration: kernels.Acceleration
    example_prompt: str

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """Of the base, the training rows and the validation rows."""
        datasets = self.datasets
        validation = datasets.validation.fingerprint if datasets.validation else None
        return {"base": self.base_fingerprint, "data": datasets.train.fingerprint, "validation": validation}

    def row_text(self, number: int = 0) -> Iterator[tuple[str, bool]]:
        """A training row as pieces of text, each with whether it is supervised."""
        row, start = self.datasets.train.rows.row(number), 0
        spans = [(max(first, 1), end) for first, end in row.spans]  # The first token has no token before it.
        for span in [*spans, (len(row.ids), len(row.ids))]:
            for ids, supervised in ((row.ids[start : span[0]], False), (row.ids[slice(*span)], True)):
                if ids:
                    yield self.tokenizer.decode(ids), supervised
            start = span[1]


@dataclass(frozen=True)
class Result:
    """A published adapter.

    Attributes:
        quoted_directory: The adapter directory as the user wrote it, quoted for a shell.
        adapter_bytes: The size of the file of weights.
        fallbacks: Kinds of layers that were not accelerated.
        example_prompt: A prompt to try the adapter with, quoted for a shell.
    """

    directory: Path
    quoted_directory: str
    adapter_bytes: int
    outcome: Outcome
    gain: Gain
    fallbacks: list[str]
    example_prompt: str


@dataclass(frozen=True)
class _Trained:
    """A finished run that is to be published. changes: settings that were changed when it was resumed."""

    plan: Plan
    weights: Weights
    outcome: Outcome
    gain: Gain
    changes: Sequence[Mapping[str, Any]]


def train(
    validated: ValidatedRun, reporter: Reporter, group: Group = SINGLE_PROCESS, *, allow_worse: bool = False
) -> Result | None:
    """Train an adapter, check it, and publish its directory.

    Args:
        validated: The run, with its config, rows and output directory checked.
        reporter: Receives lines, the plan, and the progress.
        group: The processes of the run.
        allow_worse: Also publish an adapter that does worse than its base.

    Returns:
        The published adapter; None in every process but the main one, which alone writes.

    Raises:
        ModelError, DataError: The base, the tokenizer or the rows cannot be used.
        NumericError: A number is not finite, nothing was learned, or the adapter is worse than its base.
        ResumeError: The checkpoint does not belong to this run.
        LockedError: Another run uses the output directory.
        ResourceError: Memory or disk ran out.
        LostError: Another process of the run is gone.
        KeyboardInterrupt: The user stopped the run.
    """
    with run_dir.locked(validated.directory) if group.main else nullcontext(validated.directory) as directory:
        if group.main:
            group.on_end(directory.clean_up)
            if validated.resume_point is not None and not allow_worse:
                gain.check_not_rejected(directory, validated.resume_point)
        plan = make_plan(validated, reporter.watch, group)
        identity = _identity(plan, validated)
        if group.main:
            directory.prepare(resume=validated.resume_point is not None)
        if group.leads_machine:
            data.remove_old_entries()
        group.all_gather(None)  # A signal now finds either all processes before the next line, or all behind it.
        with signals.defer_signals(repeated=group.count > 1) as stop:
            context = _control(plan, validated, identity, reporter, stop, group)
            reporter.plan(plan)
            outcome = _fit(plan, context)
        if context.stopping() and stop.requested is not None:  # A signal can come after the trainer's last check.
            raise stop.requested
        weights = tensors.whole(plan.model)
        comparison = _compare_with_base(plan, weights, outcome, context, reporter)
        if comparison.verdict == "worse" and not allow_worse:
            gain.reject(comparison, outcome.steps, validated.directory, group)
        _check_base_files(plan, group, thoroughly=True)
        group.close()
        if not group.main:
            return None
        return _publish(_Trained(plan, weights, outcome, comparison, identity["changes"]), directory, reporter.log)


def make_plan(validated: ValidatedRun, watch: ProgressFactory, group: Group = SINGLE_PROCESS) -> Plan:
    """Load the tokenizer and tokenize the rows; then load the base and attach the adapter.

    Raises ModelError, DataError.
    """
    run = validated.config
    device.check_machine(run.model)
    device.check_kernels(run.model, gpu=device.device().type != "cpu")
    kernels.keep_pages()
    tokenizer = load.load_tokenizer(run.model, run.data.chat_template)
    datasets = batching.tokenize(validated, tokenizer, watch, group)
    base, files, fingerprint, recorded_fingerprint = _load_base(validated, group)
    matched = targets.find(load.unpacked(base, run.model), run.lora)
    origin = {"base_name": run.model.name_or_path, "revision": run.model.revision}
    model = attach.attach(base, run.lora, matched.peft(), seed=run.training.seed, **origin)
    pad_id = load.pad_id(tokenizer)
    batches = batching.batch(model, pad_id, datasets.train, datasets.validation, run.data, run.training)
    first, originals = batching.first(batches.train), partial(base_files.original_weights, run.model, base)
    adapter_init = attach.initialize_adapter(model, run.lora, batches=first, originals=originals)
    largest = batching.largest(batches.train, datasets.train)
    batch_tokens = batches.train.total_tokens(run.training.max_steps).tolist()
    return Plan(
        config=run,
        processes=group.count,
        train_split=validated.rows.train if validated.rows else None,
        tokenizer=tokenizer,
        model=model,
        targets=matched,
        adapter_init=adapter_init,
        count=attach.count(model, adapter_init),
        datasets=datasets,
        train_batches=batches.train,
        validation_batches=batches.validation,
        memory=memory.estimate(model, *largest, run.training, packed=batches.train.flat, batch_tokens=batch_tokens),
        notes=[*device.notes(run.model), *batches.notes, *matched.notes, *parameters.notes(model)],
        base_fingerprint=fingerprint,
        recorded_fingerprint=recorded_fingerprint,
        base_files=files,
        acceleration=batches.acceleration,
        example_prompt=card.example_prompt(validated.rows.train) if validated.rows else "",
    )


def _load_base(validated: ValidatedRun, group: Group) -> tuple[Any, base_files.Files, str, str]:
    """The base, its files (which one process of each machine watches), its fingerprint, and the recorded fingerprint.

    Raises ModelError: the base has weights that are not finite, or processes have loaded different bases.
    """
    model = validated.config.model
    base = load.load_base(model)
    files = load.files(model) if group.leads_machine else base_files.Files(None)
    checks.check_finite(base, model.name_or_path)
    fingerprint = fingerprints.fingerprint(base)
    if group.broadcast(fingerprint) != fingerprint:
        what, fix = f"the base on {host()} differs from that of the main process", "give all machines the same files"
        raise ModelError(Problem(Code.TRAIN_BASES_DIFFER, what, model.name_or_path, "model.name_or_path", fix))
    recorded = validated.resume_point.base_fingerprint if validated.resume_point else fingerprint
    present = fingerprints.is_present(recorded)
    return base, files, fingerprint, fingerprint if present else fingerprints.fingerprint(base, like=recorded)


def _identity(plan: Plan, validated: ValidatedRun) -> dict[str, Any]:
    """What checkpoints record of the run. Raises ResumeError: it differs from the run that was interrupted."""
    resumed, row_counts = validated.resume_point, plan.datasets.train.report.counts()
    computation = trainer.environment(plan.model, plan.acceleration.fallbacks)
    identity = resume.identity(plan.config.resolved(), plan.fingerprints, row_counts, computation)
    if resumed is None:
        return identity
    resume.check_same(resumed, identity, validated.allowed_changes, base=plan.recorded_fingerprint)
    return identity | {"changes": [*resumed.changes, *resume.environment_changes(resumed, identity)]}


def _control(
    plan: Plan, validated: ValidatedRun, identity: Mapping[str, Any], reporter: Reporter, stop: Stop, group: Group
) -> RunContext:
    """Checkpoints, progress and the point to continue from. Raises ResourceError: the disk is too small."""
    size, resumed = 2 * plan.memory.adapter + plan.memory.optimizer + _CHECKPOINT_OVERHEAD, validated.resume_point
    checkpoints = Checkpoints(validated.directory.checkpoints, identity, size, is_writer=group.main)
    after_checkpoint = partial(_check_base_files, plan, group)
    if resumed is None:
        if group.main:
            check_free_space(
                validated.directory.partial, (MOST_CHECKPOINTS + 1) * size + load.tokenizer_bytes(plan.tokenizer)
            )
        return RunContext(checkpoints, reporter.progress, stop, group, after_checkpoint=after_checkpoint)
    for line in _resume_notes(plan, resumed, identity):
        reporter.log(line)
    place, factor = resumed.checkpoint, resumed.learning_rate_factor
    return RunContext(checkpoints, reporter.progress, stop, group, place, factor, after_checkpoint)


def _resume_notes(plan: Plan, resumed: ResumePoint, identity: Mapping[str, Any]) -> Iterator[str]:
    """Lines about the checkpoint that the run continues from, and what has changed since."""
    yield from map(str, resumed.skipped)
    for key in resumed.dropped_keys:
        yield f"{key}: was empty in the release of loratune that began the run; this release has no such key"
    for change in identity["changes"]:
        yield f"{change['key']} was {change['was']} up to step {change['step']}, and is {change['is']} from there"
    if resume.environment_changes(resumed, identity):
        yield "so the result may differ in its last digits from that of an uninterrupted run"
    elif "conditions" not in resumed.identity:
        yield "the checkpoint does not record what it was computed with: the result may differ in its last digits"
    yield f"resuming from step {resumed.step}"
    before = resumed.identity.get("processes", 1)
    if before != plan.processes and plan.config.lora.lora_dropout:
        yield f"dropout is drawn differently from here on: {plan.processes} processes instead of {before}"


def _fit(plan: Plan, context: RunContext) -> Outcome:
    """Train the adapter. Raises ResourceError: out of memory; it names settings that would save some."""
    training = plan.config.training
    scarce = any(context.group.all_gather(_SPARE_MEMORY * plan.memory.total > memory.available(plan.model.device)))
    optimizer = partial(parameters.split, plan.model, plan.config.lora, weight_decay=training.weight_decay)
    batches = plan.train_batches, plan.validation_batches
    try:
        if plan.config.model.use_liger_kernel:
            kernels.use_liger(plan.model)
        gc.collect()
        gc.freeze()  # Rows and model stay until the end, so the collector does not have to visit them again.
        with plan.acceleration.applied(plan.model):
            if plan.config.model.torch_compile:
                kernels.compile_layers(plan.model)
            kernels.give_back_pages()
            outcome = trainer.fit(training, plan.model, *batches, context, optimizer, oom_dry_run=scarce)
            if not context.stopping():  # Still accelerated: the model's own logits can need more memory than training.
                callbacks.check_final_loss(plan.model, plan.train_batches, context.checkpoints, outcome.steps)
            return outcome
    except trainer.OutOfMemory as error:
        problem, evaluating = error.problems[0], error.evaluating
    if evaluating:
        fix = "lower training.per_device_train_batch_size, which evaluations use too, or data.max_length"
        raise ResourceError(replace(problem, fix=fix))
    rows, batch = batching.largest(plan.train_batches, plan.datasets.train)
    savings = memory.savings(plan.model, rows, batch, training, packed=plan.train_batches.flat)
    fixes = [f"{change} (saves about {size / (1 << 20):,.0f} MiB)" for change, size in savings]
    raise ResourceError(replace(problem, fix="set " + ", or ".join(fixes)))


def _compare_with_base(plan: Plan, weights: Weights, outcome: Outcome, context: RunContext, reporter: Reporter) -> Gain:
    """Measure how much better than its base the adapter is. Raises NumericError: it gives a loss that is NaN or inf."""
    validation = {"validation": plan.datasets.validation} if plan.datasets.validation else {}
    splits, pad_id = validation | {"training": plan.datasets.train}, load.pad_id(plan.tokenizer)
    sample = plan.model, plan.adapter_init, weights, splits, pad_id, outcome.tokens
    comparison = gain.measure(*sample, plan.acceleration, context.group, reporter.log)
    if not math.isfinite(comparison.adapter):
        what = f"after the last step the loss of some {comparison.split} rows is NaN or inf"
        problem = Problem(Code.TRAIN_LOSS_NOT_FINITE, what, key="training.learning_rate", fix="lower it")
        raise callbacks.diverged_error(problem, context.checkpoints, outcome.steps)
    return comparison


def _check_base_files(plan: Plan, group: Group, *, thoroughly: bool = False) -> None:
    """Raises ModelError: files of the base have changed since it was loaded, on any machine."""
    what = "has changed since the run began"
    fix = "restore it and continue from the last checkpoint with --resume, or start again with --overwrite"
    paths = dict.fromkeys(chain.from_iterable(group.all_gather(plan.base_files.changed(thoroughly=thoroughly))))
    if paths:
        raise ModelError([Problem(Code.TRAIN_BASE_CHANGED, what, path, "model.name_or_path", fix) for path in paths])


def _publish(trained: _Trained, directory: RunDirectory, log: Callable[[str], None]) -> Result:
    """Put the adapter directory in its place, whole or not at all."""
    plan = trained.plan
    size = plan.count.adapter_bytes + load.tokenizer_bytes(plan.tokenizer)
    try:
        with explain_full_disk("the adapter directory", size, directory.partial, "make room, then --resume"):
            size = _stage(trained, directory)
            for path in directory.publish():
                log(f"{path} is kept: this run did not write it")
    except NumericError:
        directory.remove_checkpoints()  # Nothing was learned, and resuming from them would end in the same way.
        raise
    named, fallbacks = escaping.shell(directory.display_name), plan.acceleration.fallbacks
    return Result(directory.output, named, size, trained.outcome, trained.gain, fallbacks, plan.example_prompt)


def _stage(trained: _Trained, directory: RunDirectory) -> int:
    """Write the whole adapter directory beside its place. Returns the size of the adapter's weights in bytes."""
    plan, outcome, changes = trained.plan, trained.outcome, trained.changes
    assert plan.train_split is not None
    directory.create_staging()
    size = attach.save(plan.model, directory.staging, plan.adapter_init, trained.weights)
    plan.tokenizer.save_pretrained(directory.staging)
    settings = plan.config.resolved()
    (directory.staging / "run.yaml").write_text(config.dump(plan.config), encoding="utf-8")
    text = card.model_card(
        settings,
        outcome.metrics,
        directory.output.name,
        plan.example_prompt,
        gain=str(trained.gain),
        formats=plan.train_split.formats,
        changes=changes,
        processes=plan.processes,
    )
    (directory.staging / "README.md").write_text(text, encoding="utf-8")
    metrics = outcome.metrics | {"gain": trained.gain.as_json()}
    record = card.provenance(settings, metrics, outcome.curve, plan.fingerprints)
    record |= {"formats": plan.train_split.formats, "chat": plan.train_split.chat, "processes": plan.processes}
    record |= {"rows": plan.datasets.train.report.counts(), "changes": changes}
    record["files"] = adapter_files.manifest(directory.staging)
    write_json(directory.staging / "loratune.json", record)
    return size
