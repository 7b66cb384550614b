"""The tokenized rows of a run: its own rows, tokenized once for all processes, and replayed rows of an earlier run, if
it starts from an adapter (`lora.start_from`).

The rows of the earlier run are read, rendered and truncated by its own config, and verified with the fingerprints that
the adapter records. They are mixed in as tokens, so the two runs may read, render and supervise rows differently.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from loratune import data
from loratune.codes import Code
from loratune.config import AUTO, ModelSection
from loratune.data import TokenizedDataset
from loratune.data.fields import LABEL_TOKENS, Classes
from loratune.data.formats.reasoning import reasons
from loratune.data.rendering import Renderer
from loratune.data.rendering.spans import DESIRABLE
from loratune.data.report import remarks_on_weights
from loratune.errors import ConfigError, DataError, ModelError, Problem, ResourceError
from loratune.lora.initialize import START_KEY as KEY
from loratune.model import load
from loratune.system.launcher import SINGLE_PROCESS, Group, host
from loratune.text import Information, beginning
from loratune.training.preflight import Run, StartAdapter

_FEWEST_UNRELATED_TOKENS = 16
"""Passages of unrelated text that `max_length` or the context cut to fewer tokens are not measured."""


@dataclass(frozen=True)
class MeasuredText:
    """Further rows on which forgetting is measured.

    Attributes:
        rows: The rows; None if they are unavailable.
        unknown: Why they are unavailable, or empty.
        split: Their origin: `unrelated`, or the split of the earlier run.
    """

    rows: TokenizedDataset | None
    unknown: str = ""
    split: str = "unrelated"


@dataclass(frozen=True)
class TokenizedDatasets:
    """The rows of a run as tokens.

    Attributes:
        renderer: Renders the rows and prompts of the run, with the tokenizer of the base.
        train: The training rows, with those that are replayed.
        validation: The validation rows, if there are any.
        test: The test rows, if there are any.
        max_length: The number of tokens to which rows were cut.
        remarks: For each split by its name, lines on how it was read. Known to the main process only.
        leaks: Split → lines on its rows that are also in another split, or replayed; only splits that have such rows.
            Known to the main process only.
        unrelated: Text that no rows are about. It is no split of the rows.
        earlier: Rows of the earlier run: its validation rows, or its training rows if it had none; None where the run
            starts from no adapter.
        replay: What loratune.json records of the rows that are replayed: their share and number, and the fingerprint
            of the run's own training rows; None if none are.
        notes: Lines on what the run starts from.
        classes: The number of labels of the training rows; 0 if their answers are no labels. Known to the main process
            only.
        alike: Label of the training rows → the more frequent one that looks like it. Known to the main process only.
        empty_reasoning: `data.empty_reasoning` as it was decided; `auto` if the chat template has no such block.
    """

    renderer: Renderer
    train: TokenizedDataset
    validation: TokenizedDataset | None
    test: TokenizedDataset | None
    max_length: int
    remarks: dict[str, list[str]]
    leaks: Mapping[str, list[str]]
    unrelated: MeasuredText
    earlier: MeasuredText | None = None
    replay: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    classes: int = 0
    alike: Mapping[str, str] = field(default_factory=dict)
    empty_reasoning: str = AUTO

    def notes_on_sides(self) -> Iterator[str]:
        """How many answers are desirable, for unpaired preferences."""
        if (sides := self.train.rows.sides) is not None and self.train.is_unpaired:
            good = int((sides == DESIRABLE).sum())
            bad = len(sides) - good
            absent = "" if good and bad else f": {'undesirable' if good else 'desirable'} answers are missing"
            yield f"{good:,} of the answers are desirable, {bad:,} undesirable{absent}"

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the base."""
        return self.renderer.tokenizer

    @property
    def can_reason(self) -> bool:
        """Whether the chat template has an empty block of reasoning, and so a mode with reasoning."""
        return self.empty_reasoning != AUTO

    @property
    def splits(self) -> dict[str, TokenizedDataset]:
        """Name → split, for the splits that exist."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in named.items() if split}

    @property
    def compared(self) -> dict[str, TokenizedDataset]:
        """The splits on which an adapter may be compared with its base, by name, in order of preference."""
        named = {"validation": self.validation, "training": self.train}
        return {name: split for name, split in named.items() if split}


def tokenize(run: Run, tokenizer: Any, group: Group = SINGLE_PROCESS) -> TokenizedDatasets:
    """Tokenize the rows, or read them from the cache, and mix in replayed rows of an earlier run.

    The main process does this for all processes that see its cache; on a machine that does not see it, one process does
    it for the others.

    Args:
        run: The run.
        tokenizer: The tokenizer of its base.
        group: The processes of the run.

    Raises:
        DataError: See `data.prepare`; or the files of another machine hold other rows; or the rows to be replayed have
            changed.
        ConfigError: Rows are longer than the context of the model, or replayed ones than `data.max_length`.
    """
    section, model_config = run.config.data, load.load_config(run.config.model)
    vocabulary, context = model_config.get_text_config().vocab_size, load.context_length(model_config)
    renderer = Renderer(tokenizer, vocabulary, section.chat_template_kwargs)
    renderer, empty_reasoning, remark = _decide_empty_reasoning(run, renderer, group)

    def prepare(name: str) -> TokenizedDataset:
        raw = run.rows or data.read_datasets(section, run.config.training.seed)
        return data.prepare(raw.splits[name], renderer, section, vocabulary)

    values = {"train": section.train, "validation": section.validation, "test": section.test}
    splits = {name: shared_rows(partial(prepare, name), group) for name, value in values.items() if value is not None}
    for rows in splits.values():
        data.check_positions(rows, section, context)
    remarks: dict[str, list[str]] = {name: [] for name in splits}
    leaks = dict[str, list[str]]()
    count, alike = 0, dict[str, str]()
    if run.rows is not None:
        for name, split in run.rows.splits.items():
            lines = [*split.remarks(), *filter(None, [splits[name].rows.remark])]
            remarks[name] += [line for line in lines if name == "train" or line not in remarks["train"]]
            remarks[name] += remarks_on_weights(splits[name].rows.weights)
        train = run.rows.train
        if run.system:
            what = f"all rows have the system message {beginning(run.system)}"
            remarks["train"].append(Information(f"{what}; generate and chat will use it"))
        if section.stride and not any(split.report.split_rows for split in splits.values()):
            remarks["train"].append("data.stride has no effect, as no row is split into blocks")
        if section.prompt_loss_weight and train.formats == ["text"]:
            remarks["train"].append("data.prompt_loss_weight has no effect, as the rows are texts without a prompt")
        if train.kind is None and float(np.median(splits["train"].rows.supervised)) <= LABEL_TOKENS:
            classes = Classes.of(train.examples())
            remarks["train"] += filter(None, [classes.remark_on_similar()])
            count, alike = classes.labels, classes.joined()
        rendering = (
            remark,
            renderer.remark_on_header() if train.chat else None,
            renderer.remark_on_bos(splits["train"].rows.row(0).ids),
            data.remark_on_arguments(train, splits["train"].rows, renderer),
            data.remark_on_lost_characters(train, splits["train"].rows, renderer, section),
        )
        remarks["train"] += filter(None, rendering)
        found = [(one.split, line) for one in data.find_leaks(run.rows) for line in one.remarks()]
        leaks = {split: [line for other, line in found if other == split] for split, _ in found}
    longest = min(data.UNRELATED_TOKENS, section.max_length, context or data.UNRELATED_TOKENS)
    datasets = TokenizedDatasets(
        renderer,
        splits["train"],
        splits.get("validation"),
        splits.get("test"),
        section.max_length,
        remarks,
        leaks,
        _unrelated(renderer, vocabulary, longest, group),
        classes=count,
        alike=alike,
        empty_reasoning=empty_reasoning,
    )
    return _with_earlier_run(datasets, run, group)


def _decide_empty_reasoning(run: Run, renderer: Renderer, group: Group) -> tuple[Renderer, str, str]:
    """The renderer of the run, `data.empty_reasoning` as it is decided, and a line on it for the user, or an empty one.

    Raises:
        DataError: The rows, which are read for this, have changed.
    """
    section = run.config.data
    setting, closing = section.empty_reasoning, renderer.closing_reasoning()
    if setting == "supervised" or closing is None:
        unused = setting == "context" and "data.empty_reasoning has no effect: the chat template writes no such block"
        return renderer, setting, unused or ""
    if setting == AUTO:
        is_free = section.loss_on != "all" and not section.prompt_loss_weight
        setting = group.broadcast("context" if group.main and is_free and not _reasons(run) else "supervised")
    if setting == "supervised":
        return renderer, setting, ""
    what = "the empty block of reasoning before answers is context, not learned, and prompts have it by default"
    how = "so that the adapter can still reason where a caller sets enable_thinking: true"
    return closing, setting, Information(f"{what}, {how}")


def _reasons(run: Run) -> bool:
    """Whether a row of the run has reasoning, or none goes through a chat template."""
    rows = run.rows or data.read_datasets(run.config.data, run.config.training.seed)
    splits = [split for split in rows.splits.values() if split.chat]
    return not splits or any(reasons(example) for split in splits for example in split.examples())


def _unrelated(renderer: Renderer, vocabulary: int, longest: int, group: Group) -> MeasuredText:
    """See `TokenizedDatasets.unrelated`. Errors do not fail the run. longest: the most tokens of a passage."""
    prepare = partial(data.prepare_unrelated_text, renderer, vocabulary, longest)
    own, unknown = None, ""
    if longest < _FEWEST_UNRELATED_TOKENS:
        unknown = f"rows of {longest} tokens are too short for it"
    elif group.main:
        try:
            own, unknown = prepare()
        except (DataError, ModelError, ResourceError) as error:
            unknown = error.problems[0].what
    if unknown := group.broadcast(unknown):
        return MeasuredText(None, unknown)
    return MeasuredText(shared_rows(lambda: own or prepare()[0], group))


def shared_rows(prepare: Callable[[], TokenizedDataset], group: Group) -> TokenizedDataset:
    """The rows that the main process prepares, in all processes.

    Raises:
        DataError: See `tokenize`.
    """
    own = prepare() if group.main else None
    directory, fingerprint = group.broadcast([str(own.rows.directory), own.fingerprint] if own else ["", ""])
    main_directory = Path(directory)
    rows = own or data.open_tokenized(main_directory)
    hosts_without = {name for name, has_rows in group.all_gather([host(), rows is not None]) if not has_rows}
    if host() in hosts_without and group.leads_machine:
        rows = own or prepare()
    directories = group.all_gather([host(), str(rows.rows.directory if rows else main_directory)])
    if rows is None:
        other = (Path(path) for name, path in directories if name == host() and path != directory)
        rows = data.open_tokenized(next(other, main_directory))
    if rows is None or rows.fingerprint != fingerprint:
        what = f"the rows on {host()} are not those of the main process"
        fix = "give all machines the same files"
        raise DataError(Problem(Code.DISTRIBUTED_SETTING, what, key="data.train", fix=fix))
    return rows


# Rows of an earlier run


def _with_earlier_run(datasets: TokenizedDatasets, run: Run, group: Group) -> TokenizedDatasets:
    """The rows with those of the run that made the adapter of `lora.start_from`, if the run starts from one."""
    start, share = run.start, run.config.data.replay
    if start is None:
        return datasets
    earlier = start.info.run
    split = "validation" if earlier is not None and earlier.data.validation is not None else "training"
    wanted = dict.fromkeys([split, *(["training"] if share is not None else [])])
    prepare = partial(_prepare_earlier, run, start)
    own: dict[str, TokenizedDataset] = {}
    unknown = start.unknown
    if earlier is not None and earlier.training.objective != "sft":
        unknown = unknown or f"the earlier run compared answers ({earlier.training.objective})"
    if group.main and not unknown:
        try:
            own = {name: prepare(name) for name in wanted}
        except (DataError, ModelError) as error:
            if share is not None:
                raise
            unknown = error.problems[0].what
    unknown, path = group.broadcast(unknown), start.info.files.path
    notes = [f"{KEY}: starts as {path}, which becomes part of the new adapter; that is used alone, on the base"]
    notes += [*_template_note(run, start, datasets.tokenizer)]
    if unknown:
        notes.append(f"what is forgotten will not be measured: {unknown}")
        return replace(datasets, earlier=MeasuredText(None, unknown, split), notes=notes)
    rows = {name: shared_rows(lambda name=name: own.get(name) or prepare(name), group) for name in wanted}  # type: ignore[misc]
    datasets = replace(datasets, earlier=MeasuredText(rows[split], split=split), notes=notes)
    return datasets if share is None else _with_replay(datasets, rows["training"], run, group)


def _template_note(run: Run, start: StartAdapter, tokenizer: Any) -> Iterator[str]:
    """A line if the rows of the earlier run were rendered in another way, as far as that is known."""
    info, path = start.info, start.info.files.path
    if run.rows is None:
        return
    chat = run.rows.train.chat
    if info.run is not None and info.chat != chat:
        ways = "conversations, through a chat template", "plain text, without a chat template"
        before, now = ways if info.chat else reversed(ways)
        yield f"{KEY}: {path} was trained on {before}; these rows are {now}"
        return
    if chat and info.run is not None and info.run.data.chat_template_kwargs != run.config.data.chat_template_kwargs:
        yield f"{KEY}: {path} was trained with other data.chat_template_kwargs than these rows are rendered with"
    if chat and info.has_tokenizer:
        try:
            with info.files.reading():
                trained_with = load.load_tokenizer(ModelSection(name_or_path=str(path))).chat_template
        except ModelError:  # of another program, whose tokenizer is not used
            return
        if trained_with and trained_with != tokenizer.chat_template:
            own = path / "chat_template.jinja"
            how = f"; data.chat_template: {own} keeps that one" if own.is_file() else ""
            yield f"{KEY}: {path} was trained with another chat template than these rows are rendered by{how}"


def _prepare_earlier(run: Run, start: StartAdapter, name: str) -> TokenizedDataset:
    """Tokenize a split of the earlier run, `training` or `validation`, as that run did. Raises DataError: its rows are
    not those that the adapter records."""
    earlier, path, record = start.info.run, start.info.files.path, start.info.files.record
    assert earlier is not None
    raw = start.rows or data.read_datasets(earlier.data, earlier.training.seed, test=False)
    split = raw.train if name == "training" else raw.validation
    assert split is not None
    if start.info.has_tokenizer:
        with start.info.files.reading():
            tokenizer = load.load_tokenizer(ModelSection(name_or_path=str(path)))
    else:
        tokenizer = load.load_tokenizer(run.config.model, earlier.data.chat_template)
    vocabulary = load.load_config(run.config.model).get_text_config().vocab_size
    renderer = Renderer(tokenizer, vocabulary, earlier.data.chat_template_kwargs)
    rows = data.prepare(split, renderer, earlier.data, vocabulary)
    recorded = record["fingerprints"].get("validation" if name == "validation" else "data")
    started = record.get("start_from")
    if name == "training" and isinstance(started, dict) and isinstance(started.get("replay"), dict):
        recorded = started["replay"].get("own")  # without those that it replayed itself
    if rows.fingerprint != recorded:
        what = f"the {name} rows of the earlier run are not those that it recorded"
        fix = "put the rows back as they were, or leave data.replay out"
        raise DataError(Problem(Code.DATA_REPLAY, what, str(path), "data.replay", fix))
    return rows


def _with_replay(datasets: TokenizedDatasets, earlier: TokenizedDataset, run: Run, group: Group) -> TokenizedDatasets:
    """Mix rows of the earlier run into those of this one. Raises ConfigError: they are longer than `max_length`."""
    own, share = datasets.train, run.config.data.replay
    assert share is not None and run.start is not None
    numbers = data.replay_numbers(len(own.rows), len(earlier.rows), share, run.config.training.seed)
    longest = int(earlier.rows.lengths[numbers].max())
    if longest > datasets.max_length:
        what = f"is {datasets.max_length}, and a row of the earlier run that is replayed has {longest} tokens"
        raise ConfigError(Problem(Code.DATA_TOO_LONG, what, key="data.max_length", fix=f"raise it to {longest}"))
    mixed = shared_rows(lambda: data.mix_in(own, earlier, numbers), group)
    remark = f"{len(numbers):,} of the {len(mixed.rows):,} rows are replayed from {run.start.info.files.path}"
    if len(numbers) > len(earlier.rows):
        remark += f", whose {len(earlier.rows):,} rows are taken more than once"
    remarks = datasets.remarks | {"train": [*datasets.remarks["train"], remark]}
    leaks = dict(datasets.leaks)
    for name, line in _replayed_leaks(datasets, earlier, numbers):
        leaks[name] = [*leaks.get(name, ()), line]
    record = {"share": share, "rows": len(numbers), "own": own.fingerprint}
    return replace(datasets, train=mixed, remarks=remarks, leaks=leaks, replay=record)


def _replayed_leaks(
    datasets: TokenizedDatasets, earlier: TokenizedDataset, numbers: Sequence[int]
) -> Iterator[tuple[str, str]]:
    """Held-out splits with rows that are replayed, each with a line on them."""
    replayed = {earlier.rows.row(number).ids for number in numbers}
    lengths = [*{len(ids) for ids in replayed}]
    for name, split in datasets.splits.items():
        likely = np.flatnonzero(np.isin(split.rows.lengths, lengths)) if name != "train" else np.empty(0, np.int64)
        if count := sum(split.rows.row(number).ids in replayed for number in likely.tolist()):
            yield name, f"{count:,} of the {name} rows {'is' if count == 1 else 'are'} also replayed"
