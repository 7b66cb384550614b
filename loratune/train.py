"""The story of `loratune train`: a config and its rows become an adapter directory."""

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loratune import adapter, card, config, data, memory, model, places, targets, trainer, workspace
from loratune.adapter import Count, PeftModel, Start
from loratune.config import RunConfig, Source
from loratune.data import Prepared
from loratune.data.formats import Example, Plain
from loratune.data.packing import pad
from loratune.data.render import Renderer
from loratune.errors import NumericError, Problem, ResumeError
from loratune.preflight import Ready
from loratune.targets import Targets
from loratune.trainer import Collator, Outcome, Progress
from loratune.trainer.checkpoints import newest_whole
from loratune.workspace import Workspace


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first step. config: with absolute paths and the recognised format."""

    config: RunConfig
    tokenizer: Any
    model: PeftModel
    targets: Targets
    start: Start
    count: Count
    collator: Collator
    train: Prepared
    validation: Prepared | None
    memory: memory.Estimate
    notes: list[str]
    base_fingerprint: str
    try_it: str

    def rendered(self) -> Iterator[tuple[str, bool]]:
        """The first training row as text, piece by piece, and whether the piece is learnt."""
        row, start = self.train.rows[0], 0
        for span in [*row.spans, (len(row.ids), len(row.ids))]:
            for ids, learnt in ((row.ids[start : span[0]], False), (row.ids[slice(*span)], True)):
                if ids:
                    yield self.tokenizer.decode(ids), learnt
            start = span[1]


@dataclass(frozen=True)
class Result:
    """A published adapter. shown: its directory as the user named it; try_it: a prompt. Both are quoted for a shell."""

    directory: Path
    shown: str
    adapter_bytes: int
    outcome: Outcome
    try_it: str


def plan(ready: Ready) -> Plan:
    """Load model and tokenizer, tokenize the rows, attach LoRA.

    Raises ModelError, DataError.
    """
    run = _pinned(ready.config, ready.examples.format)
    model.check_machine(run.model)
    tokenizer = model.load_tokenizer(run.model, run.data.chat_template)
    renderer = Renderer(tokenizer)
    train = data.prepare(ready.examples.train, renderer, run.data)
    validation = data.prepare(ready.examples.validation, renderer, run.data) if ready.examples.validation else None
    base = model.load_base(run.model)
    identity = model.fingerprint(base)
    found = targets.find(model.unpacked(base, run.model), run.lora)
    adapted = adapter.attach(
        base,
        run.lora,
        found.peft(),
        seed=run.training.seed,
        base_name=run.model.name_or_path,
        revision=run.model.revision,
    )
    collator = partial(pad, pad_id=model.pad_id(tokenizer))
    start = adapter.begin(
        adapted,
        run.lora,
        batches=_first_batches(train, collator, run.training.per_device_train_batch_size),
        originals=partial(model.original_weights, run.model, base),
    )
    lengths = [(len(row.ids), row.supervised) for row in train.rows]
    return Plan(
        config=run,
        tokenizer=tokenizer,
        model=adapted,
        targets=found,
        count=adapter.count(adapted, start),
        start=start,
        collator=collator,
        train=train,
        validation=validation,
        memory=memory.estimate(adapted, lengths, run.training.per_device_train_batch_size, run.training),
        notes=[*model.notes(run.model), *found.notes, *adapter.notes(adapted)],
        base_fingerprint=identity,
        try_it=_prompt_of(ready.examples.train[:100]),
    )


def train(ready: Ready, *, resume: bool, progress: Progress, note: Callable[[str], None]) -> Result:
    """Train, check and publish. note: takes one line about what is going on.

    Raises ModelError, DataError; NumericError: a number that is not finite, or nothing learnt; ResumeError.
    """
    with workspace.claimed(ready.space, resume=resume) as space:
        run = plan(ready)
        start_from = _begin(run, space, note, resume=resume)
        _announce(run, note)
        outcome = trainer.fit(
            run.config.training,
            run.model,
            run.train.dataset,
            run.validation.dataset if run.validation else None,
            run.collator,
            space.checkpoints,
            progress,
            start_from,
            partial(adapter.split, run.model, run.config.lora, weight_decay=run.config.training.weight_decay),
        )
        try:
            trainer.check_sound(
                run.model, run.train.dataset, run.collator, run.config.training.per_device_train_batch_size
            )
            size = _stage(run, outcome, space)
        except NumericError:
            space.forget_checkpoints()  # the run is over, and going on from its end would end the same
            raise
        space.publish()
    return Result(space.output, shlex.quote(ready.config.output_dir), size, outcome, run.try_it)


def _begin(run: Plan, space: Workspace, note: Callable[[str], None], *, resume: bool) -> Path | None:
    """Record what is being run; on resume, insist that it is the same, and find the checkpoint to go on from."""
    record = space.partial / "run.json"
    identity: dict[str, Any] = {"config": run.config.resolved(), "data": run.train.fingerprint}
    if not resume:
        workspace.write_json(record, identity)
        return None
    try:
        before = json.loads(record.read_text())
    except (OSError, ValueError):
        raise ResumeError(Problem("does not say which run was interrupted", str(record))) from None
    if changes := list(_changes(before["config"], identity["config"])):
        raise ResumeError([Problem(change, "the interrupted run", fix="change it back") for change in changes])
    if before["data"] != identity["data"]:
        raise ResumeError(Problem("the training rows have changed since the run was interrupted", "data.train"))
    checkpoint, skipped = newest_whole(space.checkpoints)
    for problem in skipped:
        note(str(problem))
    note(f"resuming from step {checkpoint.name.rpartition('-')[2]}")
    return checkpoint


def _announce(run: Plan, note: Callable[[str], None]) -> None:
    """What is about to be trained; above all what was cut or left out."""
    for name, part in (("train", run.train), ("validation", run.validation)):
        if part is None:
            continue
        report = part.report
        note(f"{name}: {report.rows:,} rows, {report.tokens:,} tokens, {report.supervised:,} of them learnt")
        for line in report.losses():
            note(f"  {line}")
    for place, along in run.targets.along().items():
        if along:
            verb = "comes" if len(along) == 1 else "come"
            note(f"{place} is one module for {', '.join(run.targets.fused[place])}: {' and '.join(along)} {verb} along")
    training = run.config.training
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    if len(run.train.rows) < batch:
        note(f"rows: {len(run.train.rows)}, fewer than a batch of {batch}: each epoch is one step on all of them")
    for line in run.notes:
        note(line)
    note(str(run.count))


def _stage(run: Plan, outcome: Outcome, space: Workspace) -> int:
    """Put the whole adapter directory together beside its place. Returns the size of the adapter's weights in bytes."""
    space.staging.mkdir()
    size = adapter.save(run.model, space.staging, run.start)
    run.tokenizer.save_pretrained(space.staging)
    settings = run.config.resolved()
    fingerprints = {"base": run.base_fingerprint, "data": run.train.fingerprint}
    if run.validation:
        fingerprints["validation"] = run.validation.fingerprint
    counts = {name: value for name, value in vars(run.train.report).items() if isinstance(value, int)}
    workspace.write_json(
        space.staging / "loratune.json", card.provenance(settings, outcome.metrics, outcome.curve, fingerprints, counts)
    )
    (space.staging / "run.yaml").write_text(config.dump(run.config), encoding="utf-8")
    text = card.model_card(settings, outcome.metrics, space.output.name, run.try_it)
    (space.staging / "README.md").write_text(text, encoding="utf-8")
    return size


def _first_batches(rows: Prepared, collator: Collator, size: int, most: int = 64) -> list[Any]:
    """The first batches of the rows, in their order."""
    starts = range(0, min(len(rows.rows), most * size), size)
    return [collator([rows.dataset[n] for n in range(at, min(at + size, len(rows.rows)))]) for at in starts]


def _pinned(run: RunConfig, form: str) -> RunConfig:
    """The config as it would repeat this run from anywhere: absolute paths, and the format that was recognised."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().absolute()) if Path(path).expanduser().exists() else path

    def source(value: Source) -> Source:
        return value.model_copy(update={"path": absolute(value.path)})

    rows = run.data
    changes: dict[str, Any] = {"train": source(rows.train), "format": form}
    if isinstance(rows.validation, Source):
        changes["validation"] = source(rows.validation)
    if rows.chat_template:
        changes["chat_template"] = absolute(rows.chat_template)
    named = run.model.model_copy(update={"name_or_path": places.local_or_hub(run.model.name_or_path)})
    output = str(Path(run.output_dir).expanduser().absolute())
    return run.model_copy(update={"data": rows.model_copy(update=changes), "model": named, "output_dir": output})


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} was {old!r} and is now {new!r}"


def _prompt_of(examples: Sequence[Example]) -> str:
    """The shortest prompt of some rows, as one would type it after `loratune generate`."""
    return shlex.quote(min(map(_asked, examples), key=len))


def _asked(example: Example) -> str:
    if isinstance(example, Plain):
        return example.prompt or " ".join(example.completion.split()[:8])
    return next((message["content"] for message in example.messages if message["role"] == "user"), "")
