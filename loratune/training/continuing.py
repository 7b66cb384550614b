"""Continuing from an adapter (`lora.start_from`): checks its base, and replays rows of the run that made it.

The rows are those of the earlier run's own config, read, rendered and cut as it did; that they are the same is known by
the fingerprints that the adapter records. They are mixed in as tokens, so the two runs may read, render and supervise
their rows in different ways.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loratune import data
from loratune.codes import Code
from loratune.config import ModelSection, RunConfig
from loratune.data import TokenizedDataset
from loratune.data.rendering import Renderer
from loratune.errors import AdapterError, ConfigError, DataError, ModelError, Problem
from loratune.lora import tensors
from loratune.lora.initialize import START_KEY as KEY
from loratune.model import fingerprints, load
from loratune.model.load import Base
from loratune.system.launcher import Group
from loratune.training.batching import TokenizedDatasets, shared_rows
from loratune.training.preflight import StartAdapter, ValidatedRun

REPLAY = "data.replay"


@dataclass(frozen=True)
class EarlierRun:
    """The run that made the adapter which another run starts from.

    Attributes:
        start: The adapter.
        held_out: The rows on which forgetting is measured: its validation rows, or its training rows if it had none;
            None if they are not known.
        split: `validation` or `training`.
        unknown: Why they are not known, or empty.
        replay: What loratune.json records of the rows that are replayed: their share and number, and the fingerprint
            of the run's own training rows; None if none are.
        template: A line if its rows were rendered in another way than those of the run; else empty.
    """

    start: StartAdapter
    held_out: TokenizedDataset | None
    split: str
    unknown: str = ""
    replay: dict[str, Any] | None = None
    template: str = ""

    def notes(self) -> list[str]:
        """Lines for the user on what the run starts from."""
        path = self.start.info.files.path
        line = f"{KEY}: starts as {path}, which becomes part of the new adapter; that is used alone, on the base"
        unknown = [f"what is forgotten will not be measured: {self.unknown}"] if self.unknown else []
        return [line, *filter(None, [self.template]), *unknown]

    def record(self) -> dict[str, Any]:
        """What loratune.json says of it."""
        return {"adapter": str(self.start.info.files.path), "digest": self.start.digest, "replay": self.replay}


def earlier_run(
    ready: ValidatedRun, tokenizer: Any, datasets: TokenizedDatasets, group: Group
) -> tuple[TokenizedDatasets, EarlierRun | None]:
    """Tokenize the rows of the run that made the adapter of `lora.start_from`, and mix in those that are replayed.

    Args:
        ready: The run that starts from the adapter.
        tokenizer: Its tokenizer.
        datasets: Its own rows.
        group: The processes of the run.

    Returns:
        The rows with those that are replayed; and the earlier run, None where the run starts from no adapter.

    Raises:
        DataError, ModelError: The rows to be replayed have changed, or cannot be tokenized any more.
        ConfigError: They are longer than `data.max_length`.
    """
    start, share = ready.start, ready.config.data.replay
    if start is None:
        return datasets, None
    earlier = start.info.run
    has_validation = earlier is not None and earlier.data.validation is not None
    split = "validation" if has_validation else "training"
    wanted = dict.fromkeys([split, *(["training"] if share is not None else [])])
    prepare = _preparing(ready, start)
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
    template = _template_note(ready, start, tokenizer)
    if unknown := group.broadcast(unknown):
        return datasets, EarlierRun(start, None, split, unknown, template=template)
    rows = {name: shared_rows(lambda name=name: own.get(name) or prepare(name), group) for name in wanted}  # type: ignore[misc]
    run = EarlierRun(start, rows[split], split, template=template)
    return _with_replay(datasets, run, rows["training"], ready.config, group) if share is not None else (datasets, run)


def _template_note(ready: ValidatedRun, start: StartAdapter, tokenizer: Any) -> str:
    """See `EarlierRun.template`; empty too where it is not known how the adapter's rows were rendered, and in a process
    that has not read the rows."""
    info, path = start.info, start.info.files.path
    if ready.rows is None:
        return ""
    if info.run is not None and info.chat != ready.rows.train.chat:
        ways = "conversations, through a chat template", "plain text, without a chat template"
        before, now = ways if info.chat else reversed(ways)
        return f"{KEY}: {path} was trained on {before}; these rows are {now}"
    if not ready.rows.train.chat or not (path / "tokenizer_config.json").is_file():
        return ""
    try:
        trained_with = load.load_tokenizer(ModelSection(name_or_path=str(path))).chat_template
    except ModelError:  # of another program, whose tokenizer is not used
        return ""
    if not trained_with or trained_with == tokenizer.chat_template:
        return ""
    own = path / "chat_template.jinja"
    how = f"; data.chat_template: {own} keeps that one" if own.is_file() else ""
    return f"{KEY}: {path} was trained with another chat template than these rows are rendered by{how}"


def _preparing(ready: ValidatedRun, start: StartAdapter) -> Callable[[str], TokenizedDataset]:
    """A function that tokenizes a split of the earlier run, `training` or `validation`, as that run did."""

    def prepare(name: str) -> TokenizedDataset:
        run, path = start.info.run, start.info.files.path
        assert run is not None
        raw = start.rows or data.read_datasets(run.data, run.training.seed, test=False)
        split = raw.train if name == "training" else raw.validation
        assert split is not None
        if (path / "tokenizer_config.json").is_file():
            tokenizer = load.load_tokenizer(ModelSection(name_or_path=str(path)))
        else:
            tokenizer = load.load_tokenizer(ready.config.model, run.data.chat_template)
        vocabulary = load.load_config(ready.config.model).get_text_config().vocab_size
        rows = data.prepare(split, Renderer(tokenizer, vocabulary), run.data, vocabulary)
        if rows.fingerprint != _recorded(start, name):
            what = f"the {name} rows of the earlier run are not those that it recorded"
            fix = "put the rows back as they were, or leave data.replay out"
            raise DataError(Problem(Code.DATA_REPLAY, what, str(path), REPLAY, fix))
        return rows

    return prepare


def _recorded(start: StartAdapter, name: str) -> Any:
    """The fingerprint that an adapter records of the rows of its own run, without those that it replayed."""
    record = start.info.files.record
    if name == "validation":
        return record["fingerprints"].get("validation")
    started = record.get("start_from")
    replay = started.get("replay") if isinstance(started, dict) else None
    return replay.get("own") if isinstance(replay, dict) else record["fingerprints"].get("data")


def _with_replay(
    datasets: TokenizedDatasets, run: EarlierRun, earlier: TokenizedDataset, config: RunConfig, group: Group
) -> tuple[TokenizedDatasets, EarlierRun]:
    """Mix rows of the earlier run into those of this one. Raises ConfigError: they are longer than `max_length`."""
    own, share = datasets.train, config.data.replay
    assert share is not None
    numbers = data.replay_numbers(len(own.rows), len(earlier.rows), share, config.training.seed)
    longest = int(earlier.rows.lengths[numbers].max())
    if longest > config.data.max_length:
        what = f"is {config.data.max_length}, and a row of the earlier run that is replayed has {longest} tokens"
        raise ConfigError(Problem(Code.DATA_TOO_LONG, what, key="data.max_length", fix=f"raise it to {longest}"))
    mixed = shared_rows(lambda: data.mix_in(own, earlier, numbers), group)
    remark = f"{len(numbers):,} of the {len(mixed.rows):,} rows are replayed from {run.start.info.files.path}"
    if len(numbers) > len(earlier.rows):
        remark += f", whose {len(earlier.rows):,} rows are taken more than once"
    remarks = datasets.remarks | {"train": [*datasets.remarks["train"], remark]}
    held_out = {"validation": datasets.validation, "test": datasets.test}
    replayed = [line for name, split in held_out.items() for line in _leaks(name, split, earlier, numbers)]
    leaks = [*datasets.leaks, *replayed]
    record = {"share": share, "rows": len(numbers), "own": own.fingerprint}
    return replace(datasets, train=mixed, remarks=remarks, leaks=leaks), replace(run, replay=record)


def _leaks(
    name: str, split: TokenizedDataset | None, earlier: TokenizedDataset, numbers: Sequence[int]
) -> Iterator[str]:
    """A line on rows of a held-out split that are replayed, if there are any."""
    if split is None:
        return
    replayed = {earlier.rows.row(number).ids for number in numbers}
    likely = np.flatnonzero(np.isin(split.rows.lengths, [*{len(ids) for ids in replayed}]))
    if count := sum(split.rows.row(number).ids in replayed for number in likely.tolist()):
        yield f"{count:,} of the {name} rows {'is' if count == 1 else 'are'} also replayed"


def check_base(start: StartAdapter | None, base: Base) -> None:
    """Check that an adapter that a run starts from was trained on its base, before that is adapted.

    Raises:
        AdapterError: The adapter records another fingerprint, or one that this release cannot compute; as
            `tensors.check_copies`.
    """
    if start is None:
        return
    tensors.check_copies(start.info.files, base.model)
    if (recorded := start.info.files.base_fingerprint) is None:
        return
    where = str(start.info.files.path)
    if not fingerprints.is_comparable(recorded):
        what = "records the fingerprint of its base in a version that this release of loratune does not know"
        raise AdapterError(Problem(Code.ADAPTER_MISMATCH, what, where, KEY, "upgrade loratune"))
    if recorded != base.fingerprint:
        before = start.info.base
        held = f" in {before.quantization}, dtype {before.dtype}" if before.quantization != "none" else ""
        what = f"was trained on another base, by its settings and weights: {start.info.files.base}{held}"
        raise AdapterError(Problem(Code.LORA_START, what, where, KEY, "set model to that base"))
