"""Which rows a run learns from, and which it is evaluated on: read and checked one by one, before torch is imported."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from loratune.config import DataSection, Source
from loratune.data import mixing, row_index
from loratune.data.formats import CHATS, Example
from loratune.data.mixing import Mask
from loratune.data.row_index import RowIndex
from loratune.data.sources.rows import Advance
from loratune.data.watching import ProgressFactory, no_progress
from loratune.errors import DataError, Problem


@dataclass(frozen=True)
class DatasetSplit:
    """Some rows of a census. name: `train` or `validation`; kept: which of them, None for all; mixed: what became of
    sources that were mixed by weight, a line each."""

    name: str
    census: RowIndex
    kept: Mask | None
    section: DataSection
    mixed: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.census) if self.kept is None else int(np.count_nonzero(self.kept))

    @property
    def formats(self) -> list[str]:
        """The formats of the files."""
        return sorted({file.parser.form for file in self.census.files})

    @property
    def chat(self) -> bool:
        """Whether rows go through the chat template."""
        return not CHATS.isdisjoint(self.formats)

    def remarks(self) -> list[str]:
        """A line each: the files if there are several, how sources were mixed, the fields that are not read."""
        fields: dict[frozenset[str], list[str]] = {}
        for file in self.census.files:
            if file.parser.unread:
                fields.setdefault(frozenset(file.parser.unread), []).append(file.opened.name)
        unread = [
            f"not read: {', '.join(f'`{name}`' for name in sorted(names))} ({files[0]}{', ...' if files[1:] else ''})"
            for names, files in fields.items()
        ]
        files = [f"{file.opened.name} ({file.parser.form}, {file.rows:,} rows)" for file in self.census.files]
        more = f", and {len(files) - 5:,} more" if files[5:] else ""
        several = [f"{len(files):,} files: {', '.join(files[:5])}{more}"] if files[1:] else []
        return [*several, *(f"mixed: {line}" for line in self.mixed), *unread]

    @property
    def size(self) -> int:
        """Bytes of the files on disk."""
        return sum(file.opened.size for file in self.census.files)

    @property
    def source(self) -> str:
        """Where the rows come from, for a message about all of them."""
        return ", ".join(dict.fromkeys(file.opened.name for file in self.census.files[:3]))

    def examples(self, skip: int = 0, advance: Advance = lambda _: None) -> Iterator[Example]:
        """The rows in order, read once more. Raises DataError: a file has changed since it was checked."""
        return row_index.examples(self.census, self.kept, skip, advance)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what decides the examples and their places: the files, how they are read, which rows are kept."""
        files = [(file.opened.name, file.opened.digest, file.parser.reads, file.rows) for file in self.census.files]
        digest = hashlib.sha256(json.dumps([files, self.section.columns], sort_keys=True).encode())
        if self.kept is not None:
            digest.update(np.packbits(self.kept).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class RawDatasets:
    """The rows of a run. validation: None where nothing is evaluated."""

    train: DatasetSplit
    validation: DatasetSplit | None


def read_datasets(section: DataSection, seed: int, watch: ProgressFactory = no_progress) -> RawDatasets:
    """Read and check all rows. No tokenizer is needed, and torch is not imported.

    Raises DataError: see `census.take`; a fraction that leaves no row to train on.
    """
    train = _part("train", section.train_sources, section, seed, watch)
    if section.validation_sources:
        return RawDatasets(train, _part("validation", section.validation_sources, section, seed, watch))
    if not isinstance(section.validation, float):
        return RawDatasets(train, None)
    kept = train.kept if train.kept is not None else np.ones(len(train), dtype=np.bool_)
    learnt, evaluated = mixing.held_out(kept, section.validation, seed)
    if not learnt.any():
        what = f"a fraction of {section.validation} of {len(train)} rows leaves none to train on"
        raise DataError(Problem(what, key="data.validation"))
    return RawDatasets(
        DatasetSplit("train", train.census, learnt, section, train.mixed),
        DatasetSplit("validation", train.census, evaluated, section),
    )


def read_source(source: Source, section: DataSection, watch: ProgressFactory = no_progress) -> DatasetSplit:
    """All rows of one source, read as `section` says. Raises DataError: see `census.take`."""
    return DatasetSplit("validation", row_index.take([source], section, watch), None, section)


def _part(name: str, given: Sequence[Source], section: DataSection, seed: int, watch: ProgressFactory) -> DatasetSplit:
    counted = row_index.take(given, section, watch)
    weights = [source.weight for source in given if source.weight is not None]
    if not weights:
        return DatasetSplit(name, counted, None, section)
    taken = mixing.shares(counted.counts, weights)
    lines = (
        f"{source.path}: {some:,} of {count:,} rows"
        for source, some, count in zip(given, taken, counted.counts, strict=True)
    )
    return DatasetSplit(name, counted, mixing.chosen(counted.counts, taken, seed), section, tuple(lines))
