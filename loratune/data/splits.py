"""The splits of a run: training, validation and test rows. Every row is read, checked and hashed; rows are mixed by
weight and held out. Finds duplicates, rows that splits share, and rows that an adapter was trained on.
"""

import difflib
import hashlib
import json
import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from loratune.codes import Code
from loratune.config import DataSection, Source
from loratune.data.formats import PAIRS, UNPAIRED, Example, RowError, quote, sides, system_message
from loratune.data.formats.recognition import CHAT_FORMATS, PREFERENCE_FORMATS, Parser
from loratune.data.holding_out import hold_out, nested_order, random_mask
from loratune.data.report import MAX_PLACES, Leaks, Report, RowTally, Separators
from loratune.data.row_keys import CONTENT_HASH, HASHED_ROW, hash_row
from loratune.data.sources import GivenRows, RowSource, format_error, left_out, no_rows_error, open_source
from loratune.data.sources.files import FileSlice
from loratune.data.sources.rows import MAX_PROBLEMS, Row, line_of, place_in_cache, place_parts, reported, to_json_line
from loratune.errors import DataError, Problem
from loratune.events import Advance, no_advance, reading
from loratune.system.directories import ROW_HASHES
from loratune.text import Information, listed, plural

_log = logging.getLogger(__name__)

_COLUMNS = HASHED_ROW.itemsize // 8


_FILE_KINDS = {".csv": "CSV", ".tsv": "TSV", ".json": "JSON", ".jsonl": "JSON lines", ".parquet": "Parquet"}
_FORMAT_WORDS = {
    "alpaca": "question and answer", "prompt_completion": "prompt and completion", "messages": "conversations",
    "text": "texts", "input_ids": "token ids", "preference": "pairs of answers",
    "preference_messages": "pairs of answers", "unpaired_preference": "judged answers",
    "unpaired_preference_messages": "judged answers",
}  # fmt: skip
"""Format → what its rows are, in words."""


@dataclass(frozen=True)
class IndexedFile:
    """One file of rows, or one split of a hub dataset.

    Attributes:
        source: The source of its rows.
        parser: Converts its rows to examples.
        start: The number of its first row among the rows of all files.
        rows: The number of its rows.
        first: The place of its first row.
    """

    source: RowSource
    parser: Parser
    start: int
    rows: int
    first: str


@dataclass(frozen=True)
class DatasetSplit:
    """The training, validation or test rows of a run.

    Attributes:
        name: `train`, `validation` or `test`.
        files: The files that have rows.
        rows: (rows of the files,) of `HASHED_ROW`, for all rows of the files.
        mask: (rows of the files,) bool, which of these rows belong to the split.
        section: How the rows are read.
        notes: Lines for the user: files that are not read, how sources were mixed by weight, how rows were held out.
        invalid: Report on the invalid rows that were dropped.
    """

    name: str
    files: tuple[IndexedFile, ...]
    rows: NDArray[Any]
    mask: NDArray[np.bool_]
    section: DataSection
    notes: tuple[str, ...] = ()
    invalid: Report | None = None

    def __len__(self) -> int:
        return int(np.count_nonzero(self.mask))

    def hashes(self, name: str) -> NDArray[np.int64]:
        """(rows,) a field of `HASHED_ROW`, for the rows of the split."""
        hashes: NDArray[np.int64] = self.rows[name][self.mask]
        return hashes

    def where(self, number: int) -> str:
        """The place of a row, by its number among the rows of all files."""
        file = next(file for file in self.files if number < file.start + file.rows)
        before, _, behind = place_parts(file.first)
        return f"{before}{self.rows['line'][number]}{behind}"

    def tally(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> RowTally:
        """The count of some rows, and the places of the first few. rows: a mask or numbers of rows of the split."""
        numbers = np.flatnonzero(self.mask)[rows]
        return RowTally(len(numbers), [self.where(number) for number in np.sort(numbers)[:MAX_PLACES].tolist()])

    @property
    def described(self) -> str:
        """The kinds of the files and of their rows in words: `CSV, question and answer`."""
        kinds = [_FILE_KINDS.get(Path(file.source.name).suffix.lower(), "") for file in self.files]
        words = [*kinds, *(_FORMAT_WORDS.get(name, name) for name in self.formats)]
        return ", ".join(dict.fromkeys(filter(None, words)))

    @property
    def formats(self) -> list[str]:
        """The formats of the files."""
        return sorted({file.parser.format_name for file in self.files})

    @property
    def kind(self) -> str | None:
        """`PAIRS` or `UNPAIRED`, if the first file holds preference data."""
        return PREFERENCE_FORMATS.get(self.files[0].parser.format_name)

    def check_kind(self, kind: str | None, objective: str | None = None) -> None:
        """Check that all rows are of the kind that an objective needs.

        Args:
            kind: `PAIRS` or `UNPAIRED`; None for other rows.
            objective: The objective; None without training.

        Raises:
            DataError: A file holds another kind of rows.
        """
        for file in self.files:
            name = file.parser.format_name
            if (found := PREFERENCE_FORMATS.get(name)) == kind:
                continue
            needed = kind or "rows without preferences"
            what = f"the rows are {found or f'of the format {name}'}"
            if objective is None:
                what, key, fix = f"{what}, where {needed} are needed", "", "give only files of that kind"
            else:
                by_kind = {PAIRS: "dpo, orpo or simpo", UNPAIRED: "kto", None: "sft"}
                what, key = f"{what}, and {objective} trains on {needed}", "training.objective"
                fix = f"set training.objective to {by_kind[found]}"
                fix = fix if found else f"give rows that are {kind}, or {fix}"
                if found is None and kind == UNPAIRED:
                    fix += "; where a label says which answers are desirable, set data.format to unpaired_preference"
            raise DataError(Problem(Code.DATA_FORMAT, what, self.where(file.start), key, fix))

    @property
    def chat(self) -> bool:
        """Whether rows go through the chat template."""
        return not CHAT_FORMATS.isdisjoint(self.formats)

    @cached_property
    def system(self) -> str:
        """The system message that all rows have, which is read again; empty if there is none. Raises as `examples`."""
        hashes = self.hashes("system")
        return system_message(next(self.examples())) if hashes[0] and (hashes == hashes[0]).all() else ""

    @property
    def rows_without_system(self) -> int:
        """How many rows have no system message."""
        return int(np.count_nonzero(self.hashes("system") == 0))

    def remarks(self) -> list[str]:
        """Lines on the files if there are several, the notes, and the fields that are not read."""
        files = [f"{one.source.name} ({one.parser.format_name}, {plural(one.rows, 'row')})" for one in self.files]
        several = [f"{len(files):,} files: {listed(files)}"] if files[1:] else []
        files_by_fields: dict[frozenset[str], list[str]] = {}
        for file in self.files:
            if file.parser.unused_fields:
                files_by_fields.setdefault(frozenset(file.parser.unused_fields), []).append(file.source.name)
        unused = [
            f"fields not read: {quote(fields)} ({names[0]}{', ...' if names[1:] else ''})"
            for fields, names in files_by_fields.items()
        ]
        unseen = set.intersection(*(file.parser.unseen_labels for file in self.files))
        if unseen and self.name == "train":
            unused.append(f"data.labels: no row has the answer {quote(sorted(unseen))}")
        if label := next(filter(None, (file.parser.unread_label for file in self.files)), ""):
            how = "set data.format to unpaired_preference and training.objective to kto"
            unused.append(f"if `{label}` says which answers are desirable, {how}, or undesirable ones are learned too")
        joined = filter(None, [self.separators.remark]) if self.name == "train" else ()
        return [*several, *self.notes, *unused, *joined]

    @cached_property
    def separators(self) -> Separators:
        """Whether prompt and answer (of pairs, the chosen one) are separated in the first rows."""
        return Separators.of(sides(example)[0] for example in self.examples())

    @property
    def size(self) -> int:
        """Bytes of the files on disk."""
        return sum(file.source.size for file in self.files)

    @property
    def source(self) -> str:
        """The names of the first sources, for messages about all rows."""
        return ", ".join(dict.fromkeys(file.source.name for file in self.files[:3]))

    def examples(self, advance: Advance = no_advance) -> Iterator[Example]:
        """Read the rows again, in order, as examples. advance: see `FileSlice.rows`.

        Raises:
            DataError: A file has changed since it was read first.
        """
        for file in self.files:
            own = slice(file.start, file.start + file.rows)
            lines, wanted, found = self.rows["line"][own], self.mask[own], 0
            if not wanted.any():
                advance(file.source.size)
                continue
            what = "the file has changed while it was being read"
            changed = DataError(Problem(Code.DATA_UNREADABLE, what, file.source.name, fix="start again"))
            for row in file.source.rows(advance):
                if found == file.rows or isinstance(row, Problem) or int(line_of(row.where)) != lines[found]:
                    if self.section.invalid_rows == "drop":
                        continue
                    raise changed
                found += 1
                if wanted[found - 1]:
                    try:
                        yield file.parser(row)
                    except RowError:
                        raise changed from None
            if found < file.rows:
                raise changed

    def own_fields(self) -> dict[str, dict[str, Any]]:
        """Place → the fields of its row, as JSON values. The files are read again."""
        rows = (row for file in self.files for row in file.source.rows() if isinstance(row, Row))
        return {place_in_cache(row.where): json.loads(to_json_line(row.values)) for row in rows}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what determines the examples and their places: the files, how they are read, and the mask."""
        files = [(file.source.name, file.source.digest, file.parser.identity, file.rows) for file in self.files]
        digest = hashlib.sha256(json.dumps([files, self.section.columns], sort_keys=True).encode())
        digest.update(np.packbits(self.mask).tobytes())
        if self.section.invalid_rows == "drop":
            digest.update(b"".join(b"%d " % line for line in self.rows["line"].tolist()))
        return digest.hexdigest()

    def hold_out(self, fraction: float, seed: int) -> tuple["DatasetSplit", "DatasetSplit"]:
        """Draw validation rows at random.

        Args:
            fraction: The fraction of the rows; at least one row is drawn.
            seed: Random seed.

        Returns:
            The rows that remain, perhaps none, and the validation rows, with notes on how they were drawn.
        """
        numbers = np.flatnonzero(self.mask)
        rows = self.rows if len(numbers) == len(self.rows) else self.rows[numbers]
        drawn, notes = hold_out(rows, fraction, self.section.group_by, seed, lambda row: self.where(int(numbers[row])))
        held_out = np.zeros_like(self.mask)
        held_out[numbers[drawn]] = True
        validation = DatasetSplit("validation", self.files, self.rows, held_out, self.section, notes)
        return replace(self, mask=self.mask & ~held_out), validation

    def sample(self, count: int, seed: int) -> "DatasetSplit":
        """Some of the rows, at most `count`: those of a smaller number are among those of a larger one, see
        `nested_order`. A note says how many there are, unless that is all of them. seed: random seed."""
        numbers = np.flatnonzero(self.mask)
        order, stratified = nested_order(self.rows["completion"][numbers], seed)
        mask = np.zeros_like(self.mask)
        mask[numbers[order[:count]]] = True
        note = f"data.max_train_samples is {count:,}, and there are only {plural(len(numbers), 'training row')}"
        if count < len(numbers):
            used = f"{count:,} of {plural(len(numbers), 'row')} are used (data.max_train_samples)"
            note = Information(f"{used}, {stratified}" if stratified else used)
        notes = self.notes if count == len(numbers) else (*self.notes, note)
        return replace(self, mask=mask, notes=notes)


@dataclass(frozen=True)
class RawDatasets:
    """The splits of a run before tokenization: training, validation, and test (scored once at the end)."""

    train: DatasetSplit
    validation: DatasetSplit | None
    test: DatasetSplit | None = None

    @property
    def splits(self) -> dict[str, DatasetSplit]:
        """Name → split, for the splits that exist."""
        return {split.name: split for split in (self.train, self.validation, self.test) if split}


def read_datasets(
    section: DataSection,
    seed: int,
    *,
    given: Mapping[str, GivenRows] | None = None,
    test: bool = True,
) -> RawDatasets:
    """Read and check all rows. No tokenizer is needed, and torch is not imported.

    Args:
        section: The data section of the config, with the sources.
        seed: Random seed for mixing sources and holding out rows.
        given: Rows of a Python program for `train`, `validation` or `test`, used instead of the configured sources.
        test: Whether the test rows are read.

    Raises:
        DataError: As `open_source` and `Parser`; up to 10 rows do not fit their format (with a note that there may be
            more), unless such rows are dropped; a source has no rows; no row has a value of `group_by`; or the
            validation fraction leaves no row to train on.
    """

    def read(name: str, sources: Sequence[Source], group_by: str | None = None) -> DatasetSplit | None:
        found = [given[name]] if given and name in given else sources
        return _read_split(name, found, section, seed, group_by) if found else None

    train = read("train", section.train_sources, section.group_by)
    assert train is not None  # a config names its source
    validation = read("validation", section.validation_sources)
    tested = read("test", section.test_sources) if test else None
    if validation is None and isinstance(section.validation, float):
        train, validation = _held_out(train, section.validation, seed)
    if section.max_train_samples is not None:
        train = train.sample(section.max_train_samples, seed)
    return RawDatasets(train, validation, tested)


def _held_out(train: DatasetSplit, fraction: float, seed: int) -> tuple[DatasetSplit, DatasetSplit]:
    """See `DatasetSplit.hold_out`. Raises DataError: it leaves no row to train on."""
    rest, validation = train.hold_out(fraction, seed)
    if not len(rest):
        what, notes = f"a fraction of {fraction} of {len(train)} rows leaves none to train on", validation.notes
        what = f"{what} ({'; '.join(notes)})" if notes else what
        fix = "name a validation file, or leave it out" if notes else "lower it, or name a validation file"
        raise DataError(Problem(Code.DATA_EMPTY, what, key="data.validation", fix=fix))
    return rest, validation


def read_source(source: Source | GivenRows, section: DataSection) -> DatasetSplit:
    """All rows of one source, read as `section` says. Raises DataError as `read_datasets`."""
    return _read_split("validation", [source], section, 0)


def _read_split(
    name: str,
    sources: Sequence[Source | GivenRows],
    section: DataSection,
    seed: int,
    group_by: str | None = None,
) -> DatasetSplit:
    """Read, check and hash every row of some sources, and mix the sources by their weights."""
    parts_by_source = [(source, open_source(source, section.sample_by)) for source in sources]
    reader, counts, empty = _Reader(section, group_by), list[int](), list[str]()
    with reading("reading", sum(part.size for _, parts in parts_by_source for part in parts)) as advance:
        for source, parts in parts_by_source:
            try:
                rows = [reader.add_file(part, advance) for part in parts]
            except DataError as error:
                raise format_error(error.problems, source, section.sample_by) from None
            counts.append(sum(rows))
            if not counts[-1]:
                raise no_rows_error(source, "; ".join(reader.invalid.reasons()))
            empty += [part.name for part, count in zip(parts, rows, strict=True) if not (count or source.split)]
    hashed = np.frombuffer(reader.numbers, dtype=HASHED_ROW)
    if group_by is not None and bool((hashed["group"] == hashed["folded"]).all()):
        raise _no_groups_error(reader.files, group_by)
    notes = [*filter(None, (left_out(source, section.sample_by) for source in sources))]
    notes += filter(None, (one.source.header_remark() for one in reader.files if isinstance(one.source, FileSlice)))
    notes += [f"{plural(len(empty), 'file')} without rows: {listed(empty)}"] if empty else []
    mask = np.ones(len(hashed), dtype=np.bool_)
    if weights := [source.weight for source in sources if source.weight is not None]:
        # No row is used twice: the source with the fewest rows relative to its weight is used completely. Like
        # `datasets.interleave_datasets` with probabilities and "first_exhausted", but exact instead of drawn.
        size = min(count / weight for count, weight in zip(counts, weights, strict=True))
        shares = [min(count, max(1, round(size * weight))) for count, weight in zip(counts, weights, strict=True)]
        mixed = [*zip(sources, counts, shares, strict=True)]
        notes += [f"mixed: {source.path}: {share:,} of {count:,} rows" for source, count, share in mixed]
        random = np.random.default_rng(seed)
        mask = np.concatenate([random_mask(count, share, random) for _, count, share in mixed])
    invalid = reader.invalid if section.invalid_rows == "drop" else None
    return DatasetSplit(name, tuple(reader.files), hashed, mask, section, tuple(notes), invalid)


def _no_groups_error(files: Sequence[IndexedFile], name: str) -> DataError:
    names = {field for file in files for field in file.parser.fields}
    what, fix = f"`{name}` is null in every row", "name another field, or leave the setting out"
    if name not in names:
        what = f"no row has a field `{name}`; the fields are {quote(names)}"
        near = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.5)
        fix = f"did you mean `{near[0]}`?" if near else fix
    return DataError(Problem(Code.DATA_FORMAT, what, files[0].source.name, "data.group_by", fix))


@dataclass(frozen=True)
class _Reader:
    """Reads files: `numbers` has the values of `HASHED_ROW` of all rows, `invalid` the invalid rows to be dropped."""

    section: DataSection
    group_by: str | None
    invalid: Report = field(default_factory=Report)
    files: list[IndexedFile] = field(default_factory=list)
    numbers: "array[int]" = field(default_factory=lambda: array("q"))

    def add_file(self, source: RowSource, advance: Advance) -> int:
        """Read one file, and return the number of its rows. Raises DataError: see `read_datasets`."""
        parser, first, problems = None, "", list[Problem]()
        start = len(self.numbers) // _COLUMNS
        try:
            for row in source.rows(advance):
                problem = row if isinstance(row, Problem) else None
                if isinstance(row, Row):
                    parser, first = parser or Parser(row, self.section), first or row.where
                    try:
                        self.numbers.extend(hash_row(parser(row), row, self.section.loss_on, self.group_by))
                    except RowError as error:
                        problem = error.at(row.where)
                if problem and self.section.invalid_rows == "drop":
                    self.invalid.rows += 1
                    self.invalid.drop_invalid(problem)
                elif problem:
                    problems.append(problem)
                    if len(problems) == MAX_PROBLEMS:
                        break
        except DataError as error:
            problems += error.problems
        if problems:
            raise DataError(reported(problems, source.name))
        count = len(self.numbers) // _COLUMNS - start
        if parser is not None:
            self.files.append(IndexedFile(source, parser, start, count, first))
        return count


# Duplicate rows, by their hashes


def find_duplicates(split: DatasetSplit) -> RowTally:
    """Rows of a split that are identical to an earlier row of the split."""
    _, first = np.unique(split.hashes("content"), return_index=True)
    return split.tally(np.delete(np.arange(len(split)), first))


def find_leaks(datasets: RawDatasets) -> list[Leaks]:
    """Validation rows that are also in train, and test rows that are also in train or validation."""
    train, validation, test = datasets.train, datasets.validation, datasets.test
    pairs = [(train, validation), (train, test), (validation, test)]
    return [
        _leaks(held_out, earlier.hashes("content"), earlier.hashes("folded"), held_out.name, earlier.name)
        for earlier, held_out in pairs
        if earlier and held_out
    ]


def _leaks(
    held_out: DatasetSplit, content: NDArray[np.int64], folded: NDArray[np.int64], name: str, earlier: str
) -> Leaks:
    """Rows of a split whose hashes are among those of other rows."""
    is_exact = np.isin(held_out.hashes("content"), content)
    is_folded = np.isin(held_out.hashes("folded"), folded) & ~is_exact
    return Leaks(held_out.tally(is_exact), held_out.tally(is_folded), name, earlier)


# Hashes of the rows that an adapter was trained on, in its directory

MOST_HASHES = 1 << 23
"""The most hashes that are stored (64 MiB); if there are more, none are stored."""
_MOST_BYTES = 8 * MOST_HASHES + 4096
_METADATA = "loratune"


@dataclass(frozen=True, eq=False)
class RowHashes:
    """Hashes of rows, sorted and unique.

    Attributes:
        exact: (n,) int64: hashes of the content of rows.
        folded: (m,) int64: hashes of the content with white space folded, unless they are in `exact`.
        complete: Whether these are all rows that an adapter was trained on.
        validation: (k,) int64: hashes of the content of the validation rows; None for adapters of earlier releases.
    """

    exact: NDArray[np.int64]
    folded: NDArray[np.int64]
    complete: bool
    validation: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Overlap:
    """The overlap of evaluation rows with the rows that an adapter was trained on.

    Attributes:
        rows: The number of evaluation rows.
        leaks: The evaluation rows that are also in train; None if unknown.
        unknown: What is unknown, and why; empty if nothing is.
    """

    rows: int
    leaks: Leaks | None
    unknown: str

    @property
    def found(self) -> bool:
        """Whether rows are known to be in train."""
        return self.leaks is not None and self.leaks.exact.count + self.leaks.folded.count > 0

    def remarks(self) -> list[str]:
        """A line for each kind of overlap."""
        return self.leaks.remarks() if self.leaks else []

    def to_dict(self) -> dict[str, int] | None:
        """JSON values; None if the overlap is unknown."""
        if self.leaks is None:
            return None
        return {"exact": self.leaks.exact.count, "folded": self.leaks.folded.count, "rows": self.rows}


def write_row_hashes(directory: Path, rows: RawDatasets, earlier: RowHashes | None, *, continued: bool) -> None:
    """Write the hashes of all rows that an adapter was trained on and of its validation rows, unless there are more
    than `MOST_HASHES`.

    Hashes are unique. The metadata name the hash function, so hashes of different functions are never compared.

    Args:
        directory: The adapter directory.
        rows: The rows of the run.
        earlier: The hashes of the adapter that training started from; None if unknown.
        continued: Whether training started from an adapter.

    Raises:
        OSError, SafetensorError: There is no room on the disk.
    """
    none = np.empty(0, np.int64)
    known = earlier or RowHashes(none, none, complete=not continued)
    exact = np.union1d(rows.train.hashes("content"), known.exact)
    folded = np.setdiff1d(np.union1d(rows.train.hashes("folded"), known.folded), exact, assume_unique=True)
    validation = np.unique(rows.validation.hashes("content")) if rows.validation else none
    if len(exact) + len(folded) + len(validation) > MOST_HASHES:
        return
    # A single metadata key: safetensors writes several keys in an order that differs between processes.
    metadata = {_METADATA: json.dumps({"hash": CONTENT_HASH, "complete": known.complete})}
    save_file({"exact": exact, "folded": folded, "validation": validation}, directory / ROW_HASHES, metadata)


def read_row_hashes(directory: Path) -> RowHashes | str:
    """The row hashes stored with an adapter; or a text on why they are unknown. At most 64 MiB are read."""
    path = directory / ROW_HASHES
    if not path.is_file():
        return "it keeps no hashes of them"
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("larger than any that is written")
        with safe_open(path, framework="np") as file:
            metadata: Any = json.loads((file.metadata() or {})[_METADATA])
            kept, complete = metadata["hash"], metadata["complete"] is True
            exact, folded = (file.get_tensor(name) for name in ("exact", "folded"))
            validation = file.get_tensor("validation") if "validation" in file.keys() else None  # noqa: SIM118
        for hashes in (exact, folded, *([] if validation is None else [validation])):
            if hashes.dtype != np.int64 or hashes.ndim != 1 or not (hashes[1:] > hashes[:-1]).all():
                raise ValueError("no sorted vectors of int64")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        _log.debug("%s cannot be read", path, exc_info=True)
        return f"{ROW_HASHES} is damaged"
    return (
        RowHashes(exact, folded, complete, validation)
        if kept == CONTENT_HASH
        else f"{ROW_HASHES} is of another release of loratune"
    )


def find_overlap(split: DatasetSplit, directory: Path) -> Overlap:
    """Find the evaluation rows that an adapter was trained on.

    Args:
        split: The evaluation rows.
        directory: The adapter directory.
    """
    hashes = read_row_hashes(directory)
    if isinstance(hashes, str):
        return Overlap(len(split), None, f"whether evaluation rows are also in train is not known: {hashes}")
    folded = np.concatenate([hashes.exact, hashes.folded])
    leaks = _leaks(split, hashes.exact, folded, "evaluation", "train")
    unknown = "" if hashes.complete else "rows of the adapter that training started from are not known"
    return Overlap(len(split), leaks, unknown)


def check_unseen(split: DatasetSplit, directory: Path) -> None:
    """Check that an adapter was not trained on rows, and that they have not chosen its step either.

    Raises DataError: they were, or have; or it is not known.
    """
    hashes = read_row_hashes(directory)
    fix = "name rows that the run has not read"
    if isinstance(hashes, str) or hashes.validation is None:
        why = hashes if isinstance(hashes, str) else "an earlier release of loratune has not recorded them"
        what, fix = f"whether the run has read these rows is not known: {why}", "train the adapter again"
        raise DataError(Problem(Code.EVALUATE_OVERLAP, what, split.source, "abstain_for", fix))
    used = np.concatenate([hashes.exact, hashes.folded, hashes.validation])
    is_used = np.isin(split.hashes("content"), used) | np.isin(split.hashes("folded"), used)
    if count := int(is_used.sum()):
        what = f"{count:,} of {len(split):,} rows are training or validation rows of the run"
        raise DataError(Problem(Code.EVALUATE_OVERLAP, what, split.source, "abstain_for", fix))
