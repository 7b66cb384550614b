"""The story of `loratune train`: a config and its rows become an adapter directory."""

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from loratune import adapter, card, config, data, memory, model, places, targets, trainer, workspace
from loratune.adapter import Count, PeftModel, Start
from loratune.config import RunConfig, Source
from loratune.data import Part, Prepared, Watch
from loratune.data.formats import Conversation, Example, Plain
from loratune.data.packing import Batches, Packing, why_not
from loratune.data.render import Renderer
from loratune.errors import NumericError, Problem, ResumeError
from loratune.preflight import Ready
from loratune.targets import Targets
from loratune.trainer import Outcome, Progress
from loratune.trainer.checkpoints import newest_whole
from loratune.workspace import Workspace


@dataclass(frozen=True)
class Teller:
    """Whoever is told how a run goes.

    note: takes a line; plan: what is about to be trained; watch: passes over the data; progress: the steps.
    """

    note: Callable[[str], None]
    plan: Callable[["Plan"], None]
    watch: Watch
    progress: Progress


@dataclass(frozen=True)
class Rows:
    """The rows of a run, tokenised.

    remarks: of each part by its name, on how it was read; leaks: on what of the validation set also stands in train;
    a line each. max_length: what rows were cut to.
    """

    train: Prepared
    validation: Prepared | None
    remarks: dict[str, list[str]]
    leaks: list[str]
    max_length: int


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first step. config: with absolute paths and the recognised format."""

    config: RunConfig
    tokenizer: Any
    model: PeftModel
    targets: Targets
    start: Start
    count: Count
    rows: Rows
    train: Batches
    validation: Batches | None
    memory: memory.Estimate
    notes: list[str]
    base_fingerprint: str
    try_it: str

    def rendered(self, number: int = 0) -> Iterator[tuple[str, bool]]:
        """A training row as text, piece by piece, and whether the piece is learnt."""
        row, start = self.rows.train.rows.row(number), 0
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


def plan(ready: Ready, watch: Watch) -> Plan:
    """Load the tokenizer, tokenize the rows; then load the model, and attach LoRA.

    Raises ModelError, DataError.
    """
    run = _pinned(ready.config, ready.rows.train.form)
    model.check_machine(run.model)
    tokenizer = model.load_tokenizer(run.model, run.data.chat_template)
    rows = _tokenised(ready, run, Renderer(tokenizer), watch)
    base = model.load_base(run.model)
    identity = model.fingerprint(base)
    found = targets.find(model.unpacked(base, run.model), run.lora)
    apart, mixing = _packing(base, run, rows.train)
    adapted = adapter.attach(
        base,
        run.lora,
        found.peft(),
        seed=run.training.seed,
        base_name=run.model.name_or_path,
        revision=run.model.revision,
    )
    batched = partial(_batched, run, apart, model.pad_id(tokenizer))
    train = batched(rows.train)
    start = adapter.begin(
        adapted,
        run.lora,
        batches=_first_batches(train),
        originals=partial(model.original_weights, run.model, base),
    )
    return Plan(
        config=run,
        tokenizer=tokenizer,
        model=adapted,
        targets=found,
        count=adapter.count(adapted, start),
        start=start,
        rows=rows,
        train=train,
        validation=batched(rows.validation) if rows.validation else None,
        memory=memory.estimate(adapted, *_largest(train, rows.train), run.training),
        notes=[*model.notes(run.model), *mixing, *found.notes, *adapter.notes(adapted)],
        base_fingerprint=identity,
        try_it=_prompt_of(ready.rows.train),
    )


def train(ready: Ready, teller: Teller, *, resume: bool) -> Result:
    """Train, check and publish.

    Raises ModelError, DataError; NumericError: a number that is not finite, or nothing learnt; ResumeError.
    """
    with workspace.claimed(ready.space, resume=resume) as space:
        run = plan(ready, teller.watch)
        start_from = _begin(run, space, teller.note, resume=resume)
        teller.plan(run)
        outcome = trainer.fit(
            run.config.training,
            run.model,
            run.train,
            run.validation,
            space.checkpoints,
            teller.progress,
            start_from,
            partial(adapter.split, run.model, run.config.lora, weight_decay=run.config.training.weight_decay),
        )
        try:
            trainer.check_sound(run.model, run.train)
            size = _stage(run, outcome, space)
        except NumericError:
            space.forget_checkpoints()  # the run is over, and going on from its end would end the same
            raise
        space.publish()
    return Result(space.output, shlex.quote(ready.config.output_dir), size, outcome, run.try_it)


def _tokenised(ready: Ready, run: RunConfig, renderer: Renderer, watch: Watch) -> Rows:
    size, given = model.vocabulary_size(run.model), ready.rows
    train = data.prepare(given.train, renderer, run.data, size, watch)
    validation = data.prepare(given.validation, renderer, run.data, size, watch) if given.validation else None
    leaks = data.find_leaks(given)
    remarks = {part.name: part.remarks() for part in (given.train, given.validation) if part}
    return Rows(train, validation, remarks, leaks.remarks() if leaks else [], run.data.max_length)


def _batched(run: RunConfig, packing: Packing, pad_id: int, rows: Prepared) -> Batches:
    size = run.training.per_device_train_batch_size
    return Batches(rows.rows, rows.rows.lengths, packing, size, run.data.max_length, pad_id)


def _packing(base: Any, run: RunConfig, rows: Prepared) -> tuple[Packing, list[str]]:
    """How rows are batched: as the config says, or padded, with a line of why, where the model would mix them."""
    if run.data.packing == "none":
        return "none", []
    lengths, size = np.sort(rows.rows.lengths), run.training.per_device_train_batch_size
    largest = lengths[-size:].sum() if run.data.packing == "batch" else min(lengths.sum(), size * run.data.max_length)
    if (reason := why_not(base, int(lengths[-1]), int(largest))) is None:
        return run.data.packing, []
    return "none", [f"data.{reason}; rows are padded instead"]


def _largest(batches: Batches, rows: Prepared) -> tuple[list[tuple[int, int]], int]:
    """(length, learnt tokens) of the rows of the largest batch, and how many rows there are; flat ones count as one."""
    heaviest = batches.heaviest()
    if not batches.flat:
        supervised = rows.rows.supervised
        return [(batches.tokens(number), int(supervised[number])) for number in heaviest], batches.size
    labels = batches.collate([batches.items[number] for number in heaviest])["labels"]
    return [(labels.numel(), int((labels >= 0).sum()))], 1


def _begin(run: Plan, space: Workspace, note: Callable[[str], None], *, resume: bool) -> Path | None:
    """Record what is being run; on resume, insist that it is the same, and find the checkpoint to go on from."""
    record = space.partial / "run.json"
    identity: dict[str, Any] = {"config": run.config.resolved(), "data": run.rows.train.fingerprint}
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


def _stage(run: Plan, outcome: Outcome, space: Workspace) -> int:
    """Put the whole adapter directory together beside its place. Returns the size of the adapter's weights in bytes."""
    space.staging.mkdir()
    size = adapter.save(run.model, space.staging, run.start)
    run.tokenizer.save_pretrained(space.staging)
    settings = run.config.resolved()
    fingerprints = {"base": run.base_fingerprint, "data": run.rows.train.fingerprint}
    if run.rows.validation:
        fingerprints["validation"] = run.rows.validation.fingerprint
    counts = run.rows.train.report.counts()
    workspace.write_json(
        space.staging / "loratune.json", card.provenance(settings, outcome.metrics, outcome.curve, fingerprints, counts)
    )
    (space.staging / "run.yaml").write_text(config.dump(run.config), encoding="utf-8")
    text = card.model_card(settings, outcome.metrics, space.output.name, run.try_it)
    (space.staging / "README.md").write_text(text, encoding="utf-8")
    return size


def _first_batches(batches: Batches, most: int = 64) -> list[Any]:
    """The first batches of the rows, in their order."""
    count, size = len(batches.items), batches.size
    starts = range(0, min(count, most * size), size)
    return [batches.collate([batches.items[n] for n in range(at, min(at + size, count))]) for at in starts]


def _pinned(run: RunConfig, form: str) -> RunConfig:
    """The config as it would repeat this run from anywhere: absolute paths, and the format that was recognised."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().absolute()) if Path(path).expanduser().exists() else path

    def pinned(value: Any) -> Any:
        if isinstance(value, list):
            return [pinned(one) for one in value]
        return value.model_copy(update={"path": absolute(value.path)}) if isinstance(value, Source) else value

    rows = run.data
    changes: dict[str, Any] = {"train": pinned(rows.train), "validation": pinned(rows.validation), "format": form}
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


def _prompt_of(rows: Part) -> str:
    """The shortest prompt of the first rows, as one would type it after `loratune generate`."""
    return shlex.quote(min(map(_asked, islice(rows.examples(), 100)), key=len))


def _asked(example: Example) -> str:
    if isinstance(example, Plain):
        return example.prompt or " ".join(example.completion.split()[:8])
    if isinstance(example, Conversation):
        return next((message["content"] for message in example.messages if message["role"] == "user"), "")
    return ""
