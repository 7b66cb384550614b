"""The story of `loratune train`: a config and its rows become an adapter directory."""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from loratune import config, data, escaping, kernels, memory
from loratune.commands import card
from loratune.config import RunConfig
from loratune.data import DatasetSplit, ProgressFactory
from loratune.data.formats import Conversation, Example, Plain
from loratune.data.packing import BatchLayout
from loratune.errors import ModelError, NumericError, Problem, ResourceError
from loratune.lora import adapter_files, attach, counts, optimizers, sharded, targets
from loratune.lora.attach import PeftModel
from loratune.lora.counts import Count
from loratune.lora.initialize import AdapterInit
from loratune.lora.sharded import Weights
from loratune.lora.targets import Targets
from loratune.model import base_files, checks, device, fingerprints, load
from loratune.system import signals
from loratune.system.files import check_free_space, explain_full_disk, write_json
from loratune.system.launcher import SINGLE_PROCESS, Group, host
from loratune.system.signals import Stop
from loratune.training import batching, callbacks, conditions, gain, resume, run_dir, trainer
from loratune.training.callbacks import Progress
from loratune.training.checkpoints import KEPT, Checkpoints
from loratune.training.gain import Gain
from loratune.training.preflight import ValidatedRun
from loratune.training.run_dir import RunDirectory
from loratune.training.tokenization import TokenizedDatasets, tokenised
from loratune.training.trainer import Outcome

_BESIDE = 40_000
"""Bytes of a checkpoint beside weights and optimizer: random states, the trainer's own, a card."""


_PLENTY = 2
"""So many times what a run is thought to need must be free for it to start without trying its largest batch."""


@dataclass(frozen=True)
class Reporter:
    """Whoever is told how a run goes.

    log: takes a line; plan: what is about to be trained; watch: passes over the data; progress: the steps.
    """

    log: Callable[[str], None]
    plan: Callable[["Plan"], None]
    watch: ProgressFactory
    progress: Progress


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first step.

    config: with absolute paths; processes: of the run; given: the rows as read, None in processes that did not read
    them; base_as_recorded: the base's fingerprint in the version that the checkpoint holds which is resumed; files:
    those of the base; acceleration: what of the model the kernels compute.
    """

    config: RunConfig
    processes: int
    given: DatasetSplit | None
    tokenizer: Any
    model: PeftModel
    targets: Targets
    start: AdapterInit
    count: Count
    rows: TokenizedDatasets
    train: BatchLayout
    validation: BatchLayout | None
    memory: memory.Estimate
    notes: list[str]
    base_fingerprint: str
    base_as_recorded: str
    files: base_files.Files
    acceleration: kernels.Acceleration
    try_it: str

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """Of the base and the rows; see `model.fingerprint` and `TokenizedDataset.fingerprint`."""
        rows = self.rows
        validation = rows.validation.fingerprint if rows.validation else None
        return {"base": self.base_fingerprint, "data": rows.train.fingerprint, "validation": validation}

    def rendered(self, number: int = 0) -> Iterator[tuple[str, bool]]:
        """A training row as text, piece by piece, and whether the piece is learnt."""
        row, start = self.rows.train.rows.row(number), 0
        spans = [(max(first, 1), end) for first, end in row.spans]  # the first token follows nothing
        for span in [*spans, (len(row.ids), len(row.ids))]:
            for ids, learnt in ((row.ids[start : span[0]], False), (row.ids[slice(*span)], True)):
                if ids:
                    yield self.tokenizer.decode(ids), learnt
            start = span[1]


@dataclass(frozen=True)
class Result:
    """A published adapter. shown: its directory as the user named it; try_it: a prompt. Both are quoted for a shell.

    gain: over the base; left: what of the model was not computed the fast way.
    """

    directory: Path
    shown: str
    adapter_bytes: int
    outcome: Outcome
    gain: Gain
    left: list[str]
    try_it: str


def plan(ready: ValidatedRun, watch: ProgressFactory, group: Group = SINGLE_PROCESS) -> Plan:
    """Load the tokenizer, tokenize the rows; then load the model, and attach LoRA.

    Raises ModelError, DataError.
    """
    run = ready.config
    device.check_machine(run.model)
    device.check_kernels(run.model, gpu=device.device().type != "cpu")
    kernels.keep_pages()
    tokenizer = load.load_tokenizer(run.model, run.data.chat_template)
    rows = tokenised(ready, tokenizer, watch, group)
    base, files, identity = _base(run, group)
    recorded = ready.resumed.base_fingerprint if ready.resumed else identity
    as_recorded = identity if fingerprints.is_present(recorded) else fingerprints.fingerprint(base, like=recorded)
    found = targets.find(load.unpacked(base, run.model), run.lora)
    origin = {"base_name": run.model.name_or_path, "revision": run.model.revision}
    adapted = attach.attach(base, run.lora, found.peft(), seed=run.training.seed, **origin)
    batches = batching.batch(adapted, load.pad_id(tokenizer), rows.train, rows.validation, run.data, run.training)
    start = attach.initialize_adapter(
        adapted,
        run.lora,
        batches=batching.first(batches.train),
        originals=partial(base_files.original_weights, run.model, base),
    )
    return Plan(
        config=run,
        processes=group.count,
        given=ready.rows.train if ready.rows else None,
        tokenizer=tokenizer,
        model=adapted,
        targets=found,
        count=attach.count(adapted, start),
        start=start,
        rows=rows,
        train=batches.train,
        validation=batches.validation,
        memory=memory.estimate(adapted, *batching.largest(batches.train, rows.train), run.training),
        notes=[*device.notes(run.model), *batches.notes, *found.notes, *counts.notes(adapted)],
        base_fingerprint=identity,
        base_as_recorded=as_recorded,
        files=files,
        acceleration=batches.acceleration,
        try_it=_prompt_of(ready.rows.train) if ready.rows else "",
    )


def train(
    ready: ValidatedRun, reporter: Reporter, group: Group = SINGLE_PROCESS, *, allow_worse: bool = False
) -> Result | None:
    """Train, check and publish. Returns None in all processes but the main one, which alone writes.

    allow_worse: publish an adapter that does worse than its base as well.
    Raises ModelError, DataError; NumericError: a number that is not finite, nothing learnt, or worse than the base;
    ResumeError; LockedError; ResourceError: out of memory, or no room on the disk; LostError: another process has gone.
    Raises KeyboardInterrupt: stopped by the user.
    """
    with run_dir.claimed(ready.space) if group.main else nullcontext(ready.space) as space:
        if group.main:
            group.on_end(space.leave)
            if ready.resumed is not None and not allow_worse:
                gain.check_undecided(space, ready.resumed)
        run = plan(ready, reporter.watch, group)
        identity = _identity(run, ready)
        if group.main:
            space.begin(resume=ready.resumed is not None)
        if group.leads_machine:
            data.remove_old_entries()
        group.all_gather(None)  # so that a signal finds all of them on this side of the next line, or none
        with signals.defer_signals(repeated=group.count > 1) as stop:
            kept = _kept(run, ready, identity, reporter, stop, group)
            reporter.plan(run)
            outcome = _fit(run, kept)
        if kept.stopping() and stop.requested is not None:  # since the trainer looked for the last time
            raise stop.requested
        trainer.check_sound(run.model, run.train, kept.checkpoints, outcome.steps)
        trained = sharded.whole(run.model)
        gained = _compared(run, trained, outcome, kept, reporter)
        if gained.verdict == "worse" and not allow_worse:
            gain.refuse(gained, outcome.steps, ready.space, group)
        _check_files(run, group, thoroughly=True)
        group.close()
        if not group.main:
            return None
        return _publish(run, trained, outcome, gained, identity["changes"], space, reporter.log)


def _compared(run: Plan, trained: Weights, outcome: Outcome, kept: trainer.Run, reporter: Reporter) -> Gain:
    """How the adapter compares with its base. Raises NumericError: it gives a loss that is not finite."""
    validation = {"validation": run.rows.validation} if run.rows.validation else {}
    parts, pad_id = validation | {"training": run.rows.train}, load.pad_id(run.tokenizer)
    sample = run.model, run.start, trained, parts, pad_id, outcome.tokens
    gained = gain.measure(*sample, run.acceleration, kept.group, reporter.log)
    if not math.isfinite(gained.adapter):
        what, key = f"after the last step the loss of some {gained.split} rows is NaN or inf", "training.learning_rate"
        raise callbacks.diverged_error(Problem(what, key=key, fix="lower it"), kept.checkpoints, outcome.steps)
    return gained


def _publish(
    run: Plan,
    trained: Weights,
    outcome: Outcome,
    gained: Gain,
    changes: Sequence[Mapping[str, Any]],
    space: RunDirectory,
    log: Callable[[str], None],
) -> Result:
    size = run.count.adapter_bytes + load.tokenizer_bytes(run.tokenizer)
    try:
        with explain_full_disk("the adapter directory", size, space.partial, "make room, then --resume"):
            size = _stage(run, trained, outcome, gained, changes, space)
            for path in space.publish():
                log(f"{path} is not of the run's making, and stays there")
    except NumericError:
        space.forget_checkpoints()  # nothing was learnt, and going on from there would end the same
        raise
    return Result(space.output, escaping.shell(space.named), size, outcome, gained, run.acceleration.left, run.try_it)


def _fit(run: Plan, kept: trainer.Run) -> Outcome:
    training = run.config.training
    scarce = any(kept.group.all_gather(_PLENTY * run.memory.total > memory.available(run.model.device)))
    optimizer = partial(optimizers.split, run.model, run.config.lora, weight_decay=training.weight_decay)
    try:
        if run.config.model.use_liger_kernel:
            kernels.use_liger(run.model)
        gc.collect()
        gc.freeze()  # rows and model stay: the collector need not walk them at every few steps
        with run.acceleration.applied(run.model):
            if run.config.model.torch_compile:
                kernels.compile_layers(run.model)
            return trainer.fit(training, run.model, run.train, run.validation, kept, optimizer, rehearsed=scarce)
    except trainer.OutOfMemory as error:
        problem, evaluating = error.problems[0], error.evaluating
    if evaluating:
        fix = "lower training.per_device_train_batch_size, which evaluations use too, or data.max_length"
        raise ResourceError(replace(problem, fix=fix))
    found = memory.savings(run.model, *batching.largest(run.train, run.rows.train), training)
    fixes = [f"{change} (saves about {saved / (1 << 20):,.0f} MiB)" for change, saved in found]
    raise ResourceError(replace(problem, fix="set " + ", or ".join(fixes)))


def _base(run: RunConfig, group: Group) -> tuple[Any, base_files.Files, str]:
    """The base, whose numbers were looked at; its files, which one process of each machine keeps an eye on; and its
    fingerprint. Raises ModelError: processes have different ones."""
    base = load.load_base(run.model)
    files = load.files(run.model) if group.leads_machine else base_files.Files(None)
    checks.check_finite(base, run.model.name_or_path)
    own = fingerprints.fingerprint(base)
    if group.broadcast(own) != own:
        what, fix = f"the base on {host()} is another than that of the main process", "give all machines the same files"
        raise ModelError(Problem(what, run.model.name_or_path, "model.name_or_path", fix))
    return base, files, own


def _check_files(run: Plan, group: Group, *, thoroughly: bool = False) -> None:
    """Raises ModelError: files of the base have changed since it was loaded, on any machine."""
    changed = group.all_gather(run.files.changed(thoroughly=thoroughly))
    if problems := [
        Problem(
            "has changed since the run began, which goes on from its last checkpoint",
            path,
            "model.name_or_path",
            "put it back, then --resume; or start afresh with --overwrite",
        )
        for path in dict.fromkeys(chain.from_iterable(changed))
    ]:
        raise ModelError(problems)


def _identity(run: Plan, ready: ValidatedRun) -> dict[str, Any]:
    """What is kept of the run in its checkpoints. Raises ResumeError: it is not the one that was interrupted."""
    found, counts = ready.resumed, run.rows.train.report.counts()
    computed = conditions.conditions(run.model, run.acceleration.left)
    identity = resume.identity(run.config.resolved(), run.fingerprints, counts, computed)
    if found is None:
        return identity
    resume.check_same(found, identity, ready.allowed, base=run.base_as_recorded)
    return identity | {"changes": [*found.changes, *resume.differences(found, identity)]}


def _kept(
    run: Plan, ready: ValidatedRun, identity: Mapping[str, Any], reporter: Reporter, stop: Stop, group: Group
) -> trainer.Run:
    """What the run is kept in and led by, and where it goes on. Raises ResourceError: the disk is too small."""
    size, found = 2 * run.memory.adapter + run.memory.optimizer + _BESIDE, ready.resumed
    checkpoints = Checkpoints(ready.space.checkpoints, identity, size, written=group.main)
    unchanged = partial(_check_files, run, group)
    if found is None:
        if group.main:
            check_free_space(ready.space.partial, (KEPT + 1) * size + load.tokenizer_bytes(run.tokenizer))
        return trainer.Run(checkpoints, reporter.progress, stop, group, after_checkpoint=unchanged)
    for problem in found.skipped:
        reporter.log(str(problem))
    for key in found.forgotten:
        reporter.log(f"{key}: was empty in the release of loratune that began the run; this release has no such key")
    for change in identity["changes"]:
        was, now = f"was {change['was']} up to step {change['step']}", f"is {change['is']} from there"
        reporter.log(f"{change['key']} {was}, and {now}")
    if resume.differences(found, identity):
        reporter.log("so the last bits of its numbers may be others than without the interruption")
    elif "conditions" not in found.before:
        reporter.log("the checkpoint does not say what it was computed with: the last bits of numbers may be others")
    reporter.log(f"resuming from step {found.step}")
    before = found.before.get("processes", 1)
    if before != group.count and run.config.lora.lora_dropout:
        reporter.log(f"dropout draws otherwise from there, with {group.count} processes in place of {before}")
    return trainer.Run(checkpoints, reporter.progress, stop, group, found.checkpoint, found.rescaled, unchanged)


def _stage(
    run: Plan,
    trained: Weights,
    outcome: Outcome,
    gained: Gain,
    changes: Sequence[Mapping[str, Any]],
    space: RunDirectory,
) -> int:
    """Put the whole adapter directory together beside its place. Returns the size of the adapter's weights in bytes."""
    assert run.given is not None
    space.stage()
    size = attach.save(run.model, space.staging, run.start, trained)
    run.tokenizer.save_pretrained(space.staging)
    settings = run.config.resolved()
    (space.staging / "run.yaml").write_text(config.dump(run.config), encoding="utf-8")
    text = card.model_card(
        settings,
        outcome.metrics,
        space.output.name,
        run.try_it,
        gain=str(gained),
        formats=run.given.formats,
        changes=changes,
        processes=run.processes,
    )
    (space.staging / "README.md").write_text(text, encoding="utf-8")
    metrics = outcome.metrics | {"gain": gained.as_json()}
    made = card.provenance(settings, metrics, outcome.curve, run.fingerprints)
    made |= {"formats": run.given.formats, "chat": run.given.chat, "processes": run.processes}
    made |= {"rows": run.rows.train.report.counts(), "changes": changes, "files": adapter_files.manifest(space.staging)}
    write_json(space.staging / "loratune.json", made)
    return size


def _prompt_of(rows: DatasetSplit, most: int = 200) -> str:
    """The shortest prompt of the first rows, as one would type it after `loratune generate`; dots if none will do."""
    asked = (text for text in map(_asked, islice(rows.examples(), 100)) if 0 < len(text) <= most)
    prompt = min(asked, key=lambda text: (not escaping.is_plain(text), len(text)), default="...")
    return ("-- " if prompt.startswith("-") else "") + escaping.shell(prompt)  # or it would be taken for an option


def _asked(example: Example) -> str:
    """What can be asked on a command line: raw text, or a single user's turn. Empty for anything else."""
    if isinstance(example, Plain):
        return " ".join(example.completion.split()[:8]) if example.whole else example.prompt
    if isinstance(example, Conversation) and not example.tools and example.supervised_turns("assistant")[:1] == (1,):
        return str(example.messages[0]["content"]) if example.messages[0]["role"] == "user" else ""
    return ""
