"""Rows in, `input_ids` and `labels` out: read → recognise → render → fit to length → keep → report."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

from loratune.config import DataSection
from loratune.data import cache_dir, formats
from loratune.data.cache_dir import forget_old as forget_old
from loratune.data.formats import Conversation, Example, Ids, Plain
from loratune.data.formats.examples import no_loss_reason
from loratune.data.rendering import Renderer, Tokens, shorten
from loratune.data.report import Report
from loratune.data.row_index import ProgressFactory as ProgressFactory
from loratune.data.row_index import no_progress as no_progress
from loratune.data.sources import MAX_PROBLEMS
from loratune.data.splits import DatasetSplit as DatasetSplit
from loratune.data.splits import RawDatasets as RawDatasets
from loratune.data.splits import find_duplicates
from loratune.data.splits import find_leaks as find_leaks
from loratune.data.splits import read_datasets as read_datasets
from loratune.data.splits import read_source as read_source
from loratune.data.token_cache import TokenCache, Writer
from loratune.errors import DataError, Problem

_SAMPLE = 100
"""How many rows are decoded again."""

_ROWS_AT_ONCE, _CHARACTERS_AT_ONCE = 1024, 4_000_000


@dataclass(frozen=True)
class TokenizedDataset:
    """What the trainer learns from. rows: `input_ids` and `labels`, mapped from disk."""

    rows: TokenCache

    @property
    def report(self) -> Report:
        """What became of all rows that were read."""
        return self.rows.report

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every id and learnt span in order."""
        return self.rows.fingerprint


def prepare(
    part: DatasetSplit,
    renderer: Renderer,
    section: DataSection,
    vocabulary_size: int,
    watch: ProgressFactory = no_progress,
) -> TokenizedDataset:
    """Render every row and fit it to `max_length`, or take what is kept of doing so before; and count.

    Raises DataError: a row that the chat template refuses, or over `max_length` where `truncation` is error; an id
    that the vocabulary does not have; no row with anything to learn; more rows dropped than `max_dropped` allows.
    """
    deciding = {"loss_on": section.loss_on, "max_length": section.max_length, "truncation": section.truncation}
    named = json.dumps([_code(), part.digest, renderer.digest, vocabulary_size, deciding], sort_keys=True)
    key = hashlib.sha256(named.encode()).hexdigest()
    worker = _Worker(renderer, section, vocabulary_size)

    def fill(writer: Writer) -> None:
        with watch(f"tokenizing {part.name}", part.size) as advance:
            for some in _at_once(part.examples(writer.read, advance)):
                report, rows = worker.prepare(some)
                writer.add(report, rows)

    rows = cache_dir.kept(key, fill)
    rows.report.duplicates = find_duplicates(part)
    _check(rows.report, part, section)
    return TokenizedDataset(rows)


def opened(directory: Path) -> TokenizedDataset | None:
    """Rows that another process has prepared; None where this one does not find them."""
    found = cache_dir.opened(directory)
    return TokenizedDataset(found) if found is not None else None


def dropped(part: DatasetSplit, renderer: Renderer, section: DataSection) -> str | None:
    """A line about what the tokenizer drops of the answers in the first rows, where it drops anything."""
    spoken: list[Example] = []
    characters = 0
    for example in islice(part.examples(), _SAMPLE):
        characters += _characters(example)
        if characters > _ROWS_AT_ONCE * _SAMPLE:
            break
        if not no_loss_reason(example, section.loss_on):
            spoken.append(example)
    return renderer.dropped(spoken, section.loss_on) if spoken else None


@cache
def _code() -> str:
    """SHA-256 of what makes rows of files: this package's source. Another release never finds rows that it would make
    otherwise."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Worker:
    """From examples to rows that fit."""

    renderer: Renderer
    section: DataSection
    vocabulary_size: int

    def prepare(self, some: Sequence[Example]) -> tuple[Report, list[Tokens]]:
        report, spoken = Report(rows=len(some)), []
        for example in some:
            if reason := no_loss_reason(example, self.section.loss_on):
                report.drop(f"nothing to learn: {reason}", example.where)
            else:
                spoken.append(example)
                if isinstance(example, Conversation) and self.section.loss_on != "all":
                    selected = example.selected_turns(self.section.loss_on)
                    report.empty_answers += len(selected) - len(example.supervised_turns(self.section.loss_on))
        self._check_ids(spoken)
        rows = []
        for whole in self.renderer.rows(spoken, self.section.loss_on):
            report.lengths[len(whole.ids)] += 1
            row = self._fit(whole)
            if row is None or not row.supervised:
                how = "longer than" if self.section.truncation == "drop" else "the answer does not fit in"
                report.drop(f"{how} max_length {self.section.max_length}", whole.where)
                continue
            report.truncated += len(row.ids) < len(whole.ids)
            report.cut_answers += len(whole.spans) - len(row.spans)
            report.tokens += len(row.ids)
            report.supervised += row.supervised
            rows.append(row)
        return report, rows

    def _check_ids(self, some: Sequence[Example]) -> None:
        problems = []
        for example in some:
            if isinstance(example, Ids):
                try:
                    formats.check_ids(example, self.vocabulary_size)
                except formats.RowError as error:
                    problems.append(error.at(example.where))
        if problems:
            raise DataError(problems[:MAX_PROBLEMS])

    def _fit(self, row: Tokens) -> Tokens | None:
        section = self.section
        if len(row.ids) <= section.max_length:
            return row
        if section.truncation == "error":
            what = f"the row has {len(row.ids)} tokens, more than data.max_length {section.max_length}"
            raise DataError(Problem(what, row.where, fix="raise it, or set data.truncation to keep_completion or drop"))
        if section.truncation == "drop":
            return None
        return shorten(row, section.max_length, self.renderer.tokenizer.bos_token_id)


def _check(report: Report, part: DatasetSplit, section: DataSection) -> None:
    """Raises DataError: nothing is left to learn from, or too little of what was read."""
    reasons = "; ".join(report.reasons())
    longer = report.longest > section.max_length
    if not report.supervised:
        fix = f"data.max_length: {report.longest} would keep all" if longer else ""
        raise DataError(Problem(f"no row has anything to learn ({reasons})", part.source, fix=fix))
    share = report.dropped_rows / report.rows
    if share > section.max_dropped:
        what = f"{share:.0%} of the {part.name} rows would be dropped ({reasons})"
        fix = f"mend them, or raise data.max_dropped above {section.max_dropped}"
        raise DataError(Problem(what, part.source, "data.max_dropped", fix))


def _at_once(examples: Iterator[Example]) -> Iterator[list[Example]]:
    """Examples in lots that are small in rows and in characters."""
    lot: list[Example] = []
    characters = 0
    for example in examples:
        lot.append(example)
        characters += _characters(example)
        if len(lot) >= _ROWS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield lot
            lot, characters = [], 0
    if lot:
        yield lot


def _characters(example: Example) -> int:
    if isinstance(example, Plain):
        return len(example.prompt) + len(example.completion)
    if isinstance(example, Conversation):
        return sum(len(str(message.get("content"))) for message in example.messages)
    return 4 * len(example.ids)
