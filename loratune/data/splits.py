"""The splits of a run: its training, validation and test rows, and the rows that they have in common.

Rows are read and checked here one by one, before torch is imported.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratune.codes import Code
from loratune.config import DataSection, Source
from loratune.data.formats import PAIRS, UNPAIRED, Example, sides
from loratune.data.formats.chats import quote
from loratune.data.formats.recognition import CHAT_FORMATS, PREFERENCE_FORMATS
from loratune.data.holding_out import hold_out, random_mask
from loratune.data.report import MAX_PLACES, Leaks, Report, RowTally, Separators
from loratune.data.row_index import EXACT, FOLDED, LINE, RowIndex, RowMask, index_rows
from loratune.data.sources import GivenRows, left_out
from loratune.data.sources.rows import Row, place_in_cache, to_json_line
from loratune.errors import DataError, Problem
from loratune.events import Advance, no_advance


@dataclass(frozen=True)
class DatasetSplit:
    """The rows that a run trains on, or those that it is evaluated on.

    Attributes:
        name: `train`, `validation` or `test`.
        index: All rows of the sources.
        mask: Which of them belong to the split.
        section: How they are read.
        notes: Lines for the user: files that are not read, how sources were mixed by weight, how rows were held out.
        invalid: The rows that were dropped before, as they cannot be used.
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
        """(rows,) the numbers of its rows among those of the index."""
        return np.flatnonzero(self.mask)

    def hashes(self, column: int) -> NDArray[np.int64]:
        """(rows,) a column of the index."""
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
        """Check that the rows hold what an objective needs, or that all hold the same.

        Args:
            kind: `PAIRS` or `UNPAIRED`; None for other rows.
            objective: Its name; None where nothing is trained.

        Raises:
            DataError: A file holds something else.
        """
        for file in self.index.files:
            found = PREFERENCE_FORMATS.get(file.parser.format_name)
            if found == kind:
                continue
            where = self.index.where(file.start)
            what = f"the rows are {found or f'of the format {file.parser.format_name}'}"
            if objective is None:
                what += f", where {kind or 'rows without preferences'} are needed"
                raise DataError(Problem(Code.DATA_FORMAT, what, where, fix="give only files of that kind"))
            what += f", and {objective} trains on {kind or 'rows without preferences'}"
            by_kind = {PAIRS: "dpo, orpo or simpo", UNPAIRED: "kto", None: "sft"}
            fix = f"set training.objective to {by_kind[found]}"
            if found is None:
                fix = f"give rows that are {kind}, or {fix}"
                if kind == UNPAIRED:
                    fix += "; where a label says which answers are desirable, set data.format to unpaired_preference"
            raise DataError(Problem(Code.DATA_FORMAT, what, where, "training.objective", fix))

    @property
    def chat(self) -> bool:
        """Whether rows go through the chat template."""
        return not CHAT_FORMATS.isdisjoint(self.formats)

    def remarks(self) -> list[str]:
        """A line each: the files if there are several, the notes, the fields that are not read."""
        files = [f"{file.source.name} ({file.parser.format_name}, {file.rows:,} rows)" for file in self.index.files]
        more = f", and {len(files) - 5:,} more" if files[5:] else ""
        several = [f"{len(files):,} files: {', '.join(files[:5])}{more}"] if files[1:] else []
        files_by_fields: dict[frozenset[str], list[str]] = {}
        for file in self.index.files:
            if file.parser.unused_fields:
                files_by_fields.setdefault(frozenset(file.parser.unused_fields), []).append(file.source.name)
        unused = [
            f"fields not read: {quote(fields)} ({names[0]}{', ...' if names[1:] else ''})"
            for fields, names in files_by_fields.items()
        ]
        if label := next(filter(None, (file.parser.unread_label for file in self.index.files)), ""):
            how = "set data.format to unpaired_preference and training.objective to kto"
            unused.append(f"if `{label}` says which answers are desirable, {how}, or undesirable ones are learned too")
        joined = filter(None, [self.separators.remark]) if self.name == "train" else ()
        return [*several, *self.notes, *unused, *joined]

    @cached_property
    def separators(self) -> Separators:
        """Whether prompt and answer are separated in the first rows, or in their chosen answers."""
        return Separators.of(sides(example)[0] for example in self.examples())

    @property
    def size(self) -> int:
        """Bytes of the files on disk."""
        return sum(file.source.size for file in self.index.files)

    @property
    def source(self) -> str:
        """Where the rows come from, for a message about all of them."""
        return ", ".join(dict.fromkeys(file.source.name for file in self.index.files[:3]))

    def examples(self, skip: int = 0, advance: Advance = no_advance) -> Iterator[Example]:
        """Read the rows once more, in order; see `RowIndex.examples`."""
        return self.index.examples(self.mask, skip, advance)

    def own_fields(self) -> dict[str, dict[str, Any]]:
        """Place → the fields of the row there, as plain values. The files are read once more."""
        rows = (row for file in self.index.files for row in file.source.rows() if isinstance(row, Row))
        return {place_in_cache(row.where): json.loads(to_json_line(row.values)) for row in rows}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what decides the examples and their places: the files, how they are read, which rows belong."""
        files = [(file.source.name, file.source.digest, file.parser.identity, file.rows) for file in self.index.files]
        digest = hashlib.sha256(json.dumps([files, self.section.columns], sort_keys=True).encode())
        digest.update(np.packbits(self.mask).tobytes())
        if self.index.invalid is not None:
            digest.update(b"".join(b"%d " % line for line in self.index.columns[:, LINE].tolist()))
        return digest.hexdigest()


@dataclass(frozen=True)
class RawDatasets:
    """The rows of a run before they are tokenized.

    Attributes:
        train: The rows to train on.
        validation: The rows to evaluate on; None where nothing is evaluated.
        test: The rows to score once, at the end; None where nothing is tested.
    """

    train: DatasetSplit
    validation: DatasetSplit | None
    test: DatasetSplit | None = None

    @property
    def splits(self) -> dict[str, DatasetSplit]:
        """Those that there are, by their names."""
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
        section: Names the sources.
        seed: Decides which rows are drawn where sources are mixed, and which are held out.
        given: The rows of a Python program for `train`, `validation` or `test`, instead of the sources of that name.
        test: Whether the rows of `test` are read.

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
    train_mask, validation_mask, remarks = divide(train, fraction, section.group_by, seed)
    if not train_mask.any():
        what = f"a fraction of {fraction} of {len(train)} rows leaves none to train on"
        if remarks:
            what = f"{what} ({'; '.join(remarks)})"
        fix = "name a validation file, or leave it out" if remarks else "lower it, or name a validation file"
        raise DataError(Problem(Code.DATA_EMPTY, what, key="data.validation", fix=fix))
    validation = DatasetSplit("validation", train.index, validation_mask, section, remarks)
    return RawDatasets(replace(train, mask=train_mask), validation, tested)


def divide(
    train: DatasetSplit, fraction: float, group_by: str | None, seed: int
) -> tuple[RowMask, RowMask, tuple[str, ...]]:
    """Masks of the rows that are trained on, which may be none, and of those that are held out, and remarks on these.

    Args:
        train: The rows.
        fraction: How many to hold out.
        group_by: The field whose values keep rows together.
        seed: Decides which.
    """
    held_out, remarks = hold_out(train.index, train.mask, fraction, group_by, seed)
    return train.mask & ~held_out, held_out, remarks


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
    notes, mask = [*filter(None, map(left_out, sources))], np.ones(len(index), dtype=np.bool_)
    if weights := [source.weight for source in sources if source.weight is not None]:
        shares = mix_counts(index.counts, weights)
        counts = [*zip(index.counts, shares, strict=True)]
        notes += (
            f"mixed: {source.path}: {share:,} of {count:,} rows"
            for source, (count, share) in zip(sources, counts, strict=True)
        )
        random = np.random.default_rng(seed)
        mask = np.concatenate([random_mask(count, share, random) for count, share in counts])
    return DatasetSplit(name, index, mask, section, tuple(notes), index.invalid)


# Mixing by weight, and replay


def mix_counts(counts: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many rows to take of each source, so that they are in the proportion of the weights.

    No row is taken twice, so the source that is scarcest for its weight gives all its rows and sets the size of the
    mix; every source gives at least one row. As `datasets.interleave_datasets` with probabilities and
    stopping_strategy="first_exhausted", but exact instead of drawn.
    """
    size = min(count / weight for count, weight in zip(counts, weights, strict=True))
    exact = (round(size * weight) for weight in weights)
    return [min(count, max(1, share)) for count, share in zip(counts, exact, strict=True)]


def replay_numbers(own: int, earlier: int, share: float, seed: int) -> list[int]:
    """Which rows of an earlier run are mixed into those of a run, so that they are a share of the whole.

    Where there are too few of them, each is taken once, or as often as all can be, before some are drawn once more.

    Args:
        own: Rows of the run.
        earlier: Rows of the earlier run.
        share: Their share of all rows, between 0 and 1; at least one row is taken.
        seed: Decides which are drawn.

    Returns:
        Numbers of rows of the earlier run.
    """
    whole, rest = divmod(max(1, round(own * share / (1 - share))), earlier)
    drawn = np.flatnonzero(random_mask(earlier, rest, np.random.default_rng([seed, 2])))
    return [*range(earlier)] * whole + drawn.tolist()


# Rows that are in the data twice, by the hashes of the index


def find_duplicates(split: DatasetSplit) -> RowTally:
    """Rows of a split whose content an earlier row of it has, letter for letter."""
    _, first = np.unique(split.hashes(EXACT), return_index=True)
    return tally(split, np.delete(split.numbers, first))


def find_leaks(datasets: RawDatasets) -> list[Leaks]:
    """Validation rows that are also in train, and test rows that are also in train, or in validation."""
    train, validation, test = datasets.train, datasets.validation, datasets.test
    pairs = [(train, validation), (train, test), (validation, test)]
    return [_leaks(earlier, held_out) for earlier, held_out in pairs if earlier and held_out]


def _leaks(earlier: DatasetSplit, held_out: DatasetSplit) -> Leaks:
    """Rows of a split, which is to be new to the model, that are also in another one."""
    exact, folded = (np.isin(held_out.hashes(column), earlier.hashes(column)) for column in (EXACT, FOLDED))
    in_exact, in_folded = (tally(held_out, held_out.numbers[rows]) for rows in (exact, folded & ~exact))
    return Leaks(in_exact, in_folded, held_out.name, earlier.name)


def tally(split: DatasetSplit, numbers: NDArray[np.int64]) -> RowTally:
    """How many row numbers there are, and the places of the first."""
    return RowTally(len(numbers), [split.index.where(int(number)) for number in np.sort(numbers)[:MAX_PLACES]])
