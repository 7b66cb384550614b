"""The splits of a run: training, validation and test rows. Finds duplicates, rows that splits share, and rows that an
adapter was trained on.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from loratune.codes import Code
from loratune.config import DataSection, Source
from loratune.data.formats import PAIRS, UNPAIRED, Example, quote, sides, system_message
from loratune.data.formats.recognition import CHAT_FORMATS, PREFERENCE_FORMATS
from loratune.data.holding_out import hold_out, mix_counts, random_mask
from loratune.data.report import MAX_PLACES, Leaks, Report, RowTally, Separators
from loratune.data.row_index import CONTENT_HASH, EXACT, FOLDED, LINE, SYSTEM, RowIndex, RowMask, index_rows
from loratune.data.sources import GivenRows, left_out
from loratune.data.sources.files import FileSlice
from loratune.data.sources.rows import Row, place_in_cache, to_json_line
from loratune.errors import DataError, Problem
from loratune.events import Advance, no_advance
from loratune.system.directories import ROW_HASHES
from loratune.text import listed, plural

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetSplit:
    """The training, validation or test rows of a run.

    Attributes:
        name: `train`, `validation` or `test`.
        index: All rows of the sources.
        mask: Which of these rows belong to the split.
        section: How the rows are read.
        notes: Lines for the user: files that are not read, how sources were mixed by weight, how rows were held out.
        invalid: Report on the invalid rows that were dropped.
    """

    name: str
    index: RowIndex
    mask: RowMask
    section: DataSection
    notes: tuple[str, ...] = ()
    invalid: Report | None = None

    def __len__(self) -> int:
        return int(np.count_nonzero(self.mask))

    @property
    def numbers(self) -> NDArray[np.int64]:
        """(rows,) the numbers of its rows in the index."""
        return np.flatnonzero(self.mask)

    def hashes(self, column: int) -> NDArray[np.int64]:
        """(rows,) a column of the index, for the rows of the split."""
        hashes: NDArray[np.int64] = self.index.columns[self.mask, column]
        return hashes

    @property
    def formats(self) -> list[str]:
        """The formats of the files."""
        return sorted({file.parser.format_name for file in self.index.files})

    @property
    def kind(self) -> str | None:
        """`PAIRS` or `UNPAIRED`, if the first file holds preference data."""
        return PREFERENCE_FORMATS.get(self.index.files[0].parser.format_name)

    def check_kind(self, kind: str | None, objective: str | None = None) -> None:
        """Check that all rows are of the kind that an objective needs.

        Args:
            kind: `PAIRS` or `UNPAIRED`; None for other rows.
            objective: The objective; None without training.

        Raises:
            DataError: A file holds another kind of rows.
        """
        for file in self.index.files:
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
            raise DataError(Problem(Code.DATA_FORMAT, what, self.index.where(file.start), key, fix))

    @property
    def chat(self) -> bool:
        """Whether rows go through the chat template."""
        return not CHAT_FORMATS.isdisjoint(self.formats)

    @cached_property
    def system(self) -> str:
        """The system message that all rows have, which is read again; empty if there is none. Raises as `examples`."""
        hashes = self.hashes(SYSTEM)
        return system_message(next(self.examples())) if hashes[0] and (hashes == hashes[0]).all() else ""

    @property
    def rows_without_system(self) -> int:
        """How many rows have no system message."""
        return int(np.count_nonzero(self.hashes(SYSTEM) == 0))

    def remarks(self) -> list[str]:
        """Lines on the files if there are several, the notes, and the fields that are not read."""
        files = [f"{one.source.name} ({one.parser.format_name}, {plural(one.rows, 'row')})" for one in self.index.files]
        several = [f"{len(files):,} files: {listed(files)}"] if files[1:] else []
        files_by_fields: dict[frozenset[str], list[str]] = {}
        for file in self.index.files:
            if file.parser.unused_fields:
                files_by_fields.setdefault(frozenset(file.parser.unused_fields), []).append(file.source.name)
        unused = [
            f"fields not read: {quote(fields)} ({names[0]}{', ...' if names[1:] else ''})"
            for fields, names in files_by_fields.items()
        ]
        unseen = set.intersection(*(file.parser.unseen_labels for file in self.index.files))
        if unseen and self.name == "train":
            unused.append(f"data.labels: no row has the answer {quote(sorted(unseen))}")
        if label := next(filter(None, (file.parser.unread_label for file in self.index.files)), ""):
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
        return sum(file.source.size for file in self.index.files)

    @property
    def source(self) -> str:
        """The names of the first sources, for messages about all rows."""
        return ", ".join(dict.fromkeys(file.source.name for file in self.index.files[:3]))

    def examples(self, advance: Advance = no_advance) -> Iterator[Example]:
        """Read the rows again, in order; see `RowIndex.examples`."""
        return self.index.examples(self.mask, advance)

    def own_fields(self) -> dict[str, dict[str, Any]]:
        """Place → the fields of its row, as JSON values. The files are read again."""
        rows = (row for file in self.index.files for row in file.source.rows() if isinstance(row, Row))
        return {place_in_cache(row.where): json.loads(to_json_line(row.values)) for row in rows}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what determines the examples and their places: the files, how they are read, and the mask."""
        files = [(file.source.name, file.source.digest, file.parser.identity, file.rows) for file in self.index.files]
        digest = hashlib.sha256(json.dumps([files, self.section.columns], sort_keys=True).encode())
        digest.update(np.packbits(self.mask).tobytes())
        if self.index.invalid is not None:
            digest.update(b"".join(b"%d " % line for line in self.index.columns[:, LINE].tolist()))
        return digest.hexdigest()


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
        DataError: As `index_rows`; or the validation fraction leaves no row to train on.
    """

    def read(name: str, sources: Sequence[Source], group_by: str | None = None) -> DatasetSplit | None:
        found = [given[name]] if given and name in given else sources
        return _read_split(name, found, section, seed, group_by) if found else None

    held_out = section.validation_sources or (given and "validation" in given)
    fraction = section.validation if isinstance(section.validation, float) and not held_out else None
    train = read("train", section.train_sources, section.group_by)
    assert train is not None  # a config names its source
    validation = read("validation", section.validation_sources)
    tested = read("test", section.test_sources) if test else None
    if fraction is None:
        return RawDatasets(train, validation, tested)
    held_out_mask, remarks = hold_out(train.index, train.mask, fraction, section.group_by, seed)
    train_mask = train.mask & ~held_out_mask
    if not train_mask.any():
        what = f"a fraction of {fraction} of {len(train)} rows leaves none to train on"
        if remarks:
            what = f"{what} ({'; '.join(remarks)})"
        fix = "name a validation file, or leave it out" if remarks else "lower it, or name a validation file"
        raise DataError(Problem(Code.DATA_EMPTY, what, key="data.validation", fix=fix))
    validation = DatasetSplit("validation", train.index, held_out_mask, section, remarks)
    return RawDatasets(replace(train, mask=train_mask), validation, tested)


def read_source(source: Source | GivenRows, section: DataSection) -> DatasetSplit:
    """All rows of one source, read as `section` says. Raises DataError as `index_rows`."""
    return _read_split("validation", [source], section, 0)


def _read_split(
    name: str,
    sources: Sequence[Source | GivenRows],
    section: DataSection,
    seed: int,
    group_by: str | None = None,
) -> DatasetSplit:
    index = index_rows(sources, section, group_by)
    notes = [*filter(None, (left_out(source, section.sample_by) for source in sources))]
    notes += filter(None, (one.source.header_remark() for one in index.files if isinstance(one.source, FileSlice)))
    mask = np.ones(len(index), dtype=np.bool_)
    if index.empty:
        notes.append(f"{plural(len(index.empty), 'file')} without rows: {listed(index.empty)}")
    if weights := [source.weight for source in sources if source.weight is not None]:
        shares = mix_counts(index.counts, weights)
        mixed = [*zip(sources, index.counts, shares, strict=True)]
        notes += [f"mixed: {source.path}: {share:,} of {count:,} rows" for source, count, share in mixed]
        random = np.random.default_rng(seed)
        mask = np.concatenate([random_mask(count, share, random) for _, count, share in mixed])
    return DatasetSplit(name, index, mask, section, tuple(notes), index.invalid)


# Duplicate rows, by the hashes of the index


def find_duplicates(split: DatasetSplit) -> RowTally:
    """Rows of a split that are identical to an earlier row of the split."""
    _, first = np.unique(split.hashes(EXACT), return_index=True)
    return tally(split, np.delete(split.numbers, first))


def find_leaks(datasets: RawDatasets) -> list[Leaks]:
    """Validation rows that are also in train, and test rows that are also in train or validation."""
    train, validation, test = datasets.train, datasets.validation, datasets.test
    pairs = [(train, validation), (train, test), (validation, test)]
    return [_leaks(earlier, held_out) for earlier, held_out in pairs if earlier and held_out]


def _leaks(earlier: DatasetSplit, held_out: DatasetSplit) -> Leaks:
    """Rows of a held-out split that are also in another one."""
    exact, folded = (np.isin(held_out.hashes(column), earlier.hashes(column)) for column in (EXACT, FOLDED))
    in_exact, in_folded = (tally(held_out, held_out.numbers[rows]) for rows in (exact, folded & ~exact))
    return Leaks(in_exact, in_folded, held_out.name, earlier.name)


def tally(split: DatasetSplit, numbers: NDArray[np.int64]) -> RowTally:
    """The count of some row numbers, and the places of the first few."""
    return RowTally(len(numbers), [split.index.where(int(number)) for number in np.sort(numbers)[:MAX_PLACES]])


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
    """

    exact: NDArray[np.int64]
    folded: NDArray[np.int64]
    complete: bool


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


def write_row_hashes(directory: Path, split: DatasetSplit, earlier: RowHashes | None, *, continued: bool) -> None:
    """Write the hashes of all rows that an adapter was trained on, unless there are more than `MOST_HASHES`.

    Hashes are unique. The metadata name the hash function, so hashes of different functions are never compared.

    Args:
        directory: The adapter directory.
        split: The training rows.
        earlier: The hashes of the adapter that training started from; None if unknown.
        continued: Whether training started from an adapter.

    Raises:
        OSError, SafetensorError: There is no room on the disk.
    """
    none = np.empty(0, np.int64)
    known = earlier or RowHashes(none, none, complete=not continued)
    exact = np.union1d(split.hashes(EXACT), known.exact)
    folded = np.setdiff1d(np.union1d(split.hashes(FOLDED), known.folded), exact, assume_unique=True)
    if len(exact) + len(folded) > MOST_HASHES:
        return
    # A single metadata key: safetensors writes several keys in an order that differs between processes.
    metadata = {_METADATA: json.dumps({"hash": CONTENT_HASH, "complete": known.complete})}
    save_file({"exact": exact, "folded": folded}, directory / ROW_HASHES, metadata)


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
        for hashes in (exact, folded):
            if hashes.dtype != np.int64 or hashes.ndim != 1 or not (hashes[1:] > hashes[:-1]).all():
                raise ValueError("no sorted vectors of int64")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        _log.debug("%s cannot be read", path, exc_info=True)
        return f"{ROW_HASHES} is damaged"
    return (
        RowHashes(exact, folded, complete)
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
    columns = split.index.columns
    is_exact = np.isin(columns[:, EXACT], hashes.exact)
    is_folded = np.isin(columns[:, FOLDED], np.concatenate([hashes.exact, hashes.folded]))
    in_exact, in_folded = (tally(split, np.flatnonzero(rows)) for rows in (is_exact, is_folded & ~is_exact))
    leaks = Leaks(in_exact, in_folded, "evaluation")
    unknown = "" if hashes.complete else "rows of the adapter that training started from are not known"
    return Overlap(len(split), leaks, unknown)
