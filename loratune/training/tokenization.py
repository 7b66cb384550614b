"""The rows of a run, tokenised once and shared by its processes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune import data
from loratune.config import DataSection
from loratune.data import DatasetSplit, ProgressFactory, TokenizedDataset
from loratune.data.rendering import Renderer
from loratune.errors import ConfigError, DataError, Problem
from loratune.model import load
from loratune.system.launcher import Group, host
from loratune.training.preflight import ValidatedRun


@dataclass(frozen=True)
class TokenizedDatasets:
    """The rows of a run, tokenised.

    remarks: of each part by its name, on how it was read; leaks: on what of the validation set also stands in train;
    a line each. max_length: what rows were cut to. Remarks and leaks are known to the main process only.
    """

    train: TokenizedDataset
    validation: TokenizedDataset | None
    remarks: dict[str, list[str]]
    leaks: list[str]
    max_length: int


def tokenised(ready: ValidatedRun, tokenizer: Any, watch: ProgressFactory, group: Group) -> TokenizedDatasets:
    """Tokenise the rows, or take what is kept of doing so before. The main process does it for all that see its cache;
    on a machine that does not, one process does it for the others there.

    Raises DataError: see `data.prepare`; the files of another machine hold other rows. Raises ConfigError: rows are
    longer than the model's context.
    """
    run, known = ready.config, load.load_config(ready.config.model)
    size, limit = known.get_text_config().vocab_size, load.context_length(known)
    renderer = Renderer(tokenizer, size)

    def made(name: str) -> TokenizedDataset:
        given = ready.rows or data.read_datasets(run.data, run.training.seed, watch)
        part: DatasetSplit | None = given.train if name == "train" else given.validation
        assert part is not None
        return data.prepare(part, renderer, run.data, size, watch)

    train = _shared(lambda: made("train"), group)
    validation = _shared(lambda: made("validation"), group) if run.data.validation is not None else None
    for one in (train, validation) if validation else (train,):
        check_positions(one, run.data, limit)
    if ready.rows is None:
        return TokenizedDatasets(train, validation, {"train": [], "validation": []}, [], run.data.max_length)
    leaks = data.find_leaks(ready.rows)
    remarks = {part.name: part.remarks() for part in (ready.rows.train, ready.rows.validation) if part}
    for name, prepared in (("train", train), ("validation", validation)):
        if prepared is not None and prepared.rows.remark:
            remarks[name].append(prepared.rows.remark)
    if odd := renderer.remark_on_bos(train.rows.row(0).ids):
        remarks["train"].append(odd)
    if ready.rows.train.chat and (odd := renderer.remark_on_ends()):
        remarks["train"].append(odd)
    if lost := data.remark_on_lost_characters(ready.rows.train, renderer, run.data):
        remarks["train"].append(lost)
    return TokenizedDatasets(train, validation, remarks, leaks.remarks() if leaks else [], run.data.max_length)


def _shared(make: Callable[[], TokenizedDataset], group: Group) -> TokenizedDataset:
    """Rows that the main process makes, in all of them. Raises DataError: see `tokenised`."""
    own = make() if group.main else None
    place, fingerprint = group.broadcast([str(own.rows.directory), own.fingerprint] if own else ["", ""])
    where = Path(place)
    made = own or data.open_tokenized(where)
    lacking = {name for name, found in group.all_gather([host(), made is not None]) if not found}
    if host() in lacking and group.leads_machine:
        made = own or make()
    places = group.all_gather([host(), str(made.rows.directory if made else where)])
    made = made or data.open_tokenized(
        next((Path(other) for name, other in places if name == host() and other != place), where)
    )
    if made is None or made.fingerprint != fingerprint:
        what = f"the rows on {host()} are others than those of the main process"
        raise DataError(Problem(what, key="data.train", fix="give all machines the same files"))
    return made


def check_positions(made: TokenizedDataset, section: DataSection, limit: int | None) -> None:
    """Raises ConfigError: rows are longer than the model's context. limit: see `model.context_length`."""
    longest = int(made.rows.lengths.max())
    if limit is not None and longest > limit:
        what = f"is {section.max_length}, and the longest row has {longest} tokens, but the model has {limit} positions"
        raise ConfigError(Problem(what, key="data.max_length", fix=f"set it to {limit}"))
