"""`loratune train`: a config and its rows become an adapter directory.

`train` is the whole run from top to bottom; `plan.make_plan` is the part of it before the first step.
"""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratune import config, data, kernels, memory
from loratune.adapter import card
from loratune.commands import measuring
from loratune.commands.measuring import Findings
from loratune.commands.plan import Plan, Planner, make_plan
from loratune.compare import objectives
from loratune.config import RunConfig
from loratune.data import DatasetSplit, row_hashes
from loratune.errors import NumericError, ResourceError
from loratune.events import emit, note
from loratune.export import clients
from loratune.lora import adapter_files, attach, parameters
from loratune.lora.tensors import Weights
from loratune.model import load
from loratune.system import signals
from loratune.system.files import check_free_space, explain_full_disk, write_json
from loratune.system.launcher import SINGLE_PROCESS, Group
from loratune.system.signals import Stop
from loratune.training import best_step, conditions, time_budget, trainer
from loratune.training.checkpoints import resume
from loratune.training.checkpoints.run_dir import RunDirectory
from loratune.training.checkpoints.store import MOST_CHECKPOINTS, Checkpoints
from loratune.training.outcome import check_not_rejected, reject
from loratune.training.preflight import ValidatedRun
from loratune.training.run_context import RunContext
from loratune.training.trackers import Tracker, trackers

_CHECKPOINT_OVERHEAD = 40_000
"""Bytes of a checkpoint besides weights and optimizer: random states, the trainer's own state, and a model card."""
_SPARE_MEMORY = 2
"""A run whose estimate, times this factor, exceeds the free memory tries its largest batch before it starts."""


@dataclass(frozen=True)
class Result:
    """A published adapter.

    Attributes:
        config: The config that the run worked with.
        directory: The adapter directory.
        display_name: The adapter directory as the user wrote it.
        adapter_bytes: The size of the file of weights.
        findings: What was found out about it.
        fallbacks: Kinds of layers that were not accelerated, and why not.
        example_prompt: A prompt to try the adapter with, quoted for a shell.
        peak_memory: The most bytes in use at once, see `memory.peak`.
    """

    config: RunConfig
    directory: Path
    display_name: str
    adapter_bytes: int
    findings: Findings
    fallbacks: Mapping[str, str]
    example_prompt: str
    peak_memory: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "adapter": str(self.directory),
            "adapter_bytes": self.adapter_bytes,
            **self.findings.metrics,
            "peak_memory": self.peak_memory,
            "not_accelerated": dict(self.fallbacks),
        }


@dataclass(frozen=True)
class _FinishedRun:
    """A run that has taken all its steps. identity: what its checkpoints record of it."""

    plan: Plan
    weights: Weights
    findings: Findings
    identity: Mapping[str, Any]
    peak_memory: dict[str, int]


def train(
    validated_run: ValidatedRun,
    group: Group = SINGLE_PROCESS,
    *,
    allow_worse: bool = False,
    planner: Planner = make_plan,
    began: float | None = None,
) -> Result | None:
    """Train an adapter, check it, and publish its directory.

    Args:
        validated_run: The run, with its config, rows and output directory checked.
        group: The processes of the run.
        allow_worse: Also publish an adapter that does worse than its base.
        planner: Makes the plan, for a caller that has loaded the base and the rows.
        began: When the time of `training.max_minutes` began, by `time.monotonic`; now, if not given.

    Returns:
        The published adapter; None in every process but the main one, which alone writes.

    Raises:
        ConfigError: The time has no room for a few steps.
        ModelError, DataError: The base, the tokenizer or the rows cannot be used.
        NumericError: A number is not finite, nothing was learned, or the adapter is worse than its base.
        ResumeError: The checkpoint does not belong to this run.
        LockedError: Another run uses the output directory.
        ResourceError: Memory or disk ran out.
        LostError: Another process of the run is gone.
        KeyboardInterrupt: The user stopped the run.
    """
    began = time.monotonic() if began is None else began
    group.set_timeout(validated_run.config.training.ddp_timeout)
    lock = validated_run.directory.locked() if group.main else nullcontext(validated_run.directory)
    with group.connected(), lock as directory:
        if group.main and validated_run.resume_point is not None and not allow_worse:
            check_not_rejected(directory, validated_run.resume_point)
        plan = planner(validated_run, group)
        identity = _identity(plan, validated_run)
        if group.main:
            directory.prepare(resume=validated_run.resume_point is not None)
        if group.leads_machine:
            data.remove_old_entries()
        group.all_gather(None)  # A signal now finds either all processes before the next line, or all behind it.
        with signals.defer_signals(repeated=group.count > 1) as stop:
            context = _run_context(plan, validated_run, identity, stop, group)
            context.check_not_stopping()  # Python drops what a handler raises in a destructor.
            measuring.compute_reference(plan, plan.batches.objective, context)
            with _ready_to_train(plan):
                scarce = _is_memory_scarce(plan, group)
                asked = validated_run.config.training
                if (minutes := asked.max_minutes) is not None:
                    plan = time_budget.fix_length(plan, asked, context, began, scarce=scarce)
                    identity = {**identity, "config": plan.config.resolved(), resume.MAX_MINUTES: minutes}
                    context = replace(context, checkpoints=replace(context.checkpoints, identity=identity))
                emit(plan.event())
                outcome = trainer.fit(plan.job, context, oom_dry_run=scarce and minutes is None)
        context.check_not_stopping()  # A signal can come after the trainer's last check.
        weights, comparison = measuring.compare_with_base(plan, outcome, context)
        if comparison.verdict == "worse" and not allow_worse:
            reject(comparison, outcome.steps, validated_run.directory, group)
        findings = measuring.measure(plan, outcome, comparison, weights, context)
        if group.main:
            plan.base.files.check_unchanged_in_run()
        group.close()
        if not group.main:
            return None
        finished_run = _FinishedRun(plan, weights, findings, identity, memory.peak())
        return _publish(finished_run, directory)


def _identity(plan: Plan, validated_run: ValidatedRun) -> dict[str, Any]:
    """What checkpoints record of the run. Raises ResumeError: it differs from the run that was interrupted."""
    resume_point = validated_run.resume_point
    environment = conditions.environment(plan.model, plan.batches.acceleration.fallbacks)
    identity = resume.identity(plan.config, plan.fingerprints, plan.datasets.train, environment)
    if resume_point is None:
        return identity
    resume.check_same(resume_point, identity, validated_run.allowed_changes, base=plan.base.fingerprint)
    changes = [*resume_point.changes, *resume.environment_changes(resume_point, identity)]
    return identity | {"changes": changes, resume.MAX_MINUTES: resume_point.identity.get(resume.MAX_MINUTES)}


def _run_context(
    plan: Plan, validated_run: ValidatedRun, identity: Mapping[str, Any], stop: Stop, group: Group
) -> RunContext:
    """Checkpoints, progress and the point to continue from. Raises ResourceError: the disk is too small."""
    resume_point = validated_run.resume_point
    keeps_best = plan.config.keeps_best
    size = (2 + keeps_best) * plan.memory.adapter + plan.memory.optimizer + _CHECKPOINT_OVERHEAD
    checkpoints = Checkpoints(validated_run.directory.checkpoints, identity, size, is_writer=group.main)
    context = RunContext(
        checkpoints,
        stop,
        group,
        trackers=_trackers(validated_run) if group.main else (),
        after_checkpoint=plan.base.files.check_unchanged_in_run if group.main else lambda: None,
    )
    if resume_point is None:
        if group.main:
            check_free_space(
                validated_run.directory.partial, (MOST_CHECKPOINTS + 1) * size + load.tokenizer_bytes(plan.tokenizer)
            )
        return context
    for line in resume.notes(resume_point, identity, dropout=plan.config.lora.lora_dropout > 0):
        note(line)
    evaluations, remark = best_step.continued(resume_point, identity, keep=keeps_best)
    if remark:
        note(remark)
    return replace(
        context,
        resume_from=resume_point.checkpoint,
        learning_rate_factor=resume_point.learning_rate_factor,
        evaluations=evaluations,
        has_other_validation=best_step.has_other_validation(resume_point, identity),
        unreported=resume_point.unreported,
        seconds_before=resume_point.seconds,
    )


def _trackers(validated_run: ValidatedRun) -> Sequence[Tracker]:
    output, is_resumed = validated_run.directory.output, validated_run.resume_point is not None
    return trackers(validated_run.config.training.report_to, output, is_resumed=is_resumed)


def _is_memory_scarce(plan: Plan, group: Group) -> bool:
    """Whether the largest batch is tried before the first step."""
    return any(group.all_gather(_SPARE_MEMORY * plan.memory.total > memory.available(plan.model.device)))


@contextmanager
def _ready_to_train(plan: Plan) -> Iterator[None]:
    """Inside, the model computes as in training. Raises ResourceError: out of memory; it names settings that would save
    some."""
    try:
        if plan.config.model.use_liger_kernel:
            kernels.use_liger(plan.model)
        gc.collect()
        gc.freeze()  # Rows and model stay until the end, so the collector does not have to visit them again.
        with plan.batches.acceleration.applied(plan.model):
            if plan.config.model.torch_compile:
                kernels.compile_layers(plan.model)
            kernels.give_back_pages()
            yield
            return
    except trainer.OutOfMemory as error:
        problem, evaluating = error.problems[0], error.evaluating
    if evaluating:
        fix = "lower data.max_length, or leave out data.validation"
        raise ResourceError(replace(problem, fix=fix))
    savings = plan.batches.savings(plan.model, plan.training)
    fixes = [f"{change} (saves about {size / (1 << 20):,.0f} MiB)" for change, size in savings]
    raise ResourceError(replace(problem, fix="set " + ", or ".join(fixes)))


def _publish(finished_run: _FinishedRun, directory: RunDirectory) -> Result:
    """Put the adapter directory in its place, whole or not at all."""
    plan = finished_run.plan
    size = plan.count.adapter_bytes + load.tokenizer_bytes(plan.tokenizer)
    try:
        with explain_full_disk("the adapter directory", size, directory.partial, "make room, then --resume"):
            size = _stage(finished_run, directory)
            for path in directory.publish():
                note(f"{path} is kept: this run did not write it")
    except NumericError:
        directory.remove_checkpoints()  # Nothing was learned, and resuming from them would end in the same way.
        raise
    name, fallbacks = directory.display_name, plan.batches.acceleration.fallbacks
    published = plan.config, directory.output, name, size, finished_run.findings
    return Result(*published, fallbacks, plan.example_prompt, finished_run.peak_memory)


def _stage(finished_run: _FinishedRun, directory: RunDirectory) -> int:
    """Write the whole adapter directory beside its place. Returns the size of the adapter's weights in bytes."""
    plan = finished_run.plan
    assert plan.train_split is not None
    directory.create_staging()
    size = attach.save(plan.model, directory.staging, plan.adapter_init, finished_run.weights)
    plan.tokenizer.save_pretrained(directory.staging)
    (directory.staging / "run.yaml").write_text(config.dump(plan.config), encoding="utf-8")
    findings, name = finished_run.findings, directory.output.name
    are_layers_known = not [*parameters.layers_unknown_to_llama_cpp(plan.model)]
    lines = card.CardLines(
        use=clients.sections(plan.config, name, plan.example_prompt, are_layers_known=are_layers_known),
        gain=str(findings.gain),
        forgetting=str(findings.forgetting or ""),
        unrelated=str(findings.unrelated),
        held_out=findings.held_out,
        formats=plan.train_split.formats,
        changes=finished_run.identity["changes"],
        objective=objectives.described(plan.config),
        processes=plan.processes,
    )
    text = card.model_card(plan.config.resolved(), findings.metrics, name, lines)
    (directory.staging / "README.md").write_text(text, encoding="utf-8")
    trained_before = plan.earlier.start.trained_on if plan.earlier else None
    row_hashes.write(directory.staging, plan.train_split, trained_before, continued=plan.earlier is not None)
    record = _record(finished_run, plan.train_split) | {"files": adapter_files.manifest(directory.staging)}
    write_json(directory.staging / "loratune.json", record)
    return size


def _record(finished_run: _FinishedRun, train_split: DatasetSplit) -> dict[str, Any]:
    """What loratune.json says, but for the files."""
    plan, findings, conditions = finished_run.plan, finished_run.findings, finished_run.identity["conditions"]
    record = card.provenance(plan.config.resolved(), findings.metrics, findings.outcome.curve, plan.fingerprints)
    names = {
        "processor": "the processor", "device": "the device", "threads": "the number of threads",
        "compiled_code": "the compiled CPU code",
    }  # fmt: skip
    record["machine"] |= {name: conditions[condition] for name, condition in names.items()}
    record["machine"]["peak_memory"] = finished_run.peak_memory
    record["not_accelerated"] = dict(plan.batches.acceleration.fallbacks)
    record |= {"formats": train_split.formats, "chat": train_split.chat, "processes": plan.processes}
    record["rows"] = plan.datasets.train.report.counts()
    record["splits"] = {name: split.report.record() for name, split in plan.datasets.splits.items()}
    prompts = card.recorded_prompts(data.first_examples(train_split, plan.datasets.train))
    record |= {"changes": finished_run.identity["changes"], "prompts": prompts}
    if plan.targets.parameters:
        record["target_parameters"] = parameters.wrapped_parameters(plan.model)
    return record | ({"start_from": plan.earlier.record()} if plan.earlier else {})
