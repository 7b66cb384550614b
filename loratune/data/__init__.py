"""Rows in, `input_ids` and `labels` out: read → recognise → render → truncate → cache → report.

`read_datasets` reads and checks the rows of a run; `prepare` tokenizes the rows of one dataset split.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, islice
from pathlib import Path

from loratune.codes import Code
from loratune.config import DataSection, Source
from loratune.config.sections import WEIGHT
from loratune.data import formats, token_cache
from loratune.data.formats import Conversation, Example, Ids, Preference, Single, sides
from loratune.data.formats.reasoning import kind_of, reasoning_of
from loratune.data.holding_out import replay_numbers
from loratune.data.remarks import (
    first_examples,
    remark_on_arguments,
    remark_on_lost_characters,
    size_of,
)
from loratune.data.rendering import Renderer, spans
from loratune.data.rendering.spans import TokenizedRow
from loratune.data.report import Report, total
from loratune.data.sources.rows import reported
from loratune.data.splits import DatasetSplit, RawDatasets, find_duplicates, find_leaks, read_datasets, read_source
from loratune.data.token_cache import TokenCache, TokenCacheWriter, remove_old_entries
from loratune.errors import DataError, Problem
from loratune.events import reading

__all__ = [
    "DatasetSplit", "RawDatasets", "TokenizedDataset", "find_leaks",
    "first_examples", "mix_in", "open_tokenized", "prepare", "prepare_unrelated_text", "read_datasets",
    "read_source", "remark_on_arguments", "remark_on_lost_characters", "remove_old_entries", "replay_numbers",
    "unrelated_kinds",
]  # fmt: skip

UNRELATED_TEXT = Path(__file__).parent / "general.jsonl"
"""Passages written for loratune, under its licence: prose, dialogue, code, French and German; `kind` says which."""

_BATCH_ROWS, _BATCH_CHARACTERS = 1024, 4_000_000
"""The most examples, and characters, that are tokenized in one batch."""


@dataclass(frozen=True)
class TokenizedDataset:
    """A tokenized dataset split for the trainer: rows of `input_ids` and `labels`, memory-mapped from disk."""

    rows: TokenCache

    @property
    def rows_per_example(self) -> int:
        """How many rows make an item: the two answers of a pair, otherwise one."""
        return 2 if self.rows.side(0) == spans.CHOSEN else 1

    @property
    def is_unpaired(self) -> bool:
        """Whether rows are unpaired preferences."""
        return self.rows.side(0) in (spans.DESIRABLE, spans.UNDESIRABLE)

    @property
    def items(self) -> int:
        """How many items there are."""
        return len(self.rows) // self.rows_per_example

    def item(self, number: int) -> tuple[TokenizedRow, ...]:
        """The rows of an item."""
        start = number * self.rows_per_example
        return tuple(map(self.rows.row, range(start, start + self.rows_per_example)))

    @property
    def report(self) -> Report:
        """Counts of all rows that were read: used, truncated, dropped."""
        return self.rows.report

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every id and supervised span in order."""
        return self.rows.fingerprint

    def weighted(self, copies: Mapping[int, int]) -> dict[int, float]:
        """Number of an item → how often it counts in a mean: its copies, or with weights of rows their weight, so that
        all items together count as often. Items of weight 0 are left out, unless all have it.

        copies: number of an item → how often it occurs.
        """
        if (weights := self.rows.weights) is None:
            return {number: float(count) for number, count in copies.items()}
        found = {number: count * float(weights[number]) for number, count in copies.items()}
        total = sum(found.values())
        if not total:
            return {number: float(count) for number, count in copies.items()}
        return {number: weight * sum(copies.values()) / total for number, weight in found.items() if weight}

    def copies(self) -> dict[int, list[int]]:
        """Groups of identical items: number of the first one → numbers of all of them, in order. Items are identical if
        their ids, supervised spans, weights and preferences are equal."""
        firsts: dict[bytes, int] = {}
        copies: dict[int, list[int]] = {}
        for number in range(self.items):
            content = [(row.ids, row.spans, row.side, row.weight) for row in self.item(number)]
            digest = hashlib.blake2b(repr(content).encode(), digest_size=16).digest()
            first = firsts.setdefault(digest, number)
            copies.setdefault(first, []).append(number)
        return copies


def prepare(split: DatasetSplit, renderer: Renderer, section: DataSection, vocabulary_size: int) -> TokenizedDataset:
    """Tokenize every row of a dataset split and truncate it to `max_length`, or take the rows from the cache.

    Args:
        split: The rows.
        renderer: Tokenizes them.
        section: The data section of the configuration.
        vocabulary_size: Vocabulary size of the model; rows of ids are checked against it.

    Raises:
        DataError: The chat template refuses a row, or an id is not in the vocabulary, unless `invalid_rows` drops such
            rows; a row is longer than `max_length` where `truncation` is error; no row has a supervised token; more
            rows are dropped than `max_dropped` allows.
        ModelError: As `Renderer.rows`.
        ResourceError: There is no room on the disk.
    """
    settings = section.model_dump(include={"loss_on", "max_length", "truncation", "invalid_rows", "reasoning"})
    settings |= {"counts_prompts": True} if section.prompt_loss_weight else {}  # which refuses turns of weight 0
    parts = json.dumps([_code_digest(), split.digest, renderer.digest, vocabulary_size, settings], sort_keys=True)
    key = hashlib.sha256(parts.encode()).hexdigest()
    tokenizer = _ExampleTokenizer(renderer, section, vocabulary_size)

    def write(writer: TokenCacheWriter) -> None:
        with reading(f"tokenizing {split.name}", split.size) as advance:
            for batch in _batches(islice(split.examples(advance), writer.read, None)):
                writer.add(*tokenizer.tokenize(batch))

    rows = token_cache.load_or_write(key, write)
    rows.report = total([split.invalid or Report(), rows.report])
    rows.report.duplicates = find_duplicates(split)
    _check_report(rows.report, split, section)
    if rows.weights is not None and not rows.weights.any():
        what, fix = "all rows have the weight 0", f"remove {WEIGHT} from data.columns"
        raise DataError(Problem(Code.DATA_EMPTY, what, split.source, "data.columns", fix))
    return TokenizedDataset(rows)


def prepare_unrelated_text(renderer: Renderer, vocabulary_size: int, longest: int) -> tuple[TokenizedDataset, str]:
    """Tokenize `UNRELATED_TEXT`, one passage per row, each truncated to `longest` tokens.

    Returns:
        The rows, and why a loss on them is meaningless, or an empty text. Raises as `prepare`.
    """
    section = DataSection(train=Source(path=str(UNRELATED_TEXT)), max_length=longest, max_dropped=1.0)
    rows = prepare(read_source(section.train_sources[0], section), renderer, section, vocabulary_size)
    unknown = {renderer.tokenizer.unk_token_id} - {None, renderer.eos}
    count = sum(id in unknown for row in rows.rows.rows() for id in row.ids) if unknown else 0
    return (
        rows,
        "the tokenizer does not know all characters of the passages" if count > 0.01 * rows.report.tokens else "",
    )


def unrelated_kinds() -> dict[str, list[int]]:
    """Kind of passages → the numbers of their rows in `UNRELATED_TEXT`."""
    found: dict[str, list[int]] = {}
    for number, line in enumerate(UNRELATED_TEXT.read_text(encoding="utf-8").splitlines()):
        found.setdefault(json.loads(line)["kind"], []).append(number)
    return found


def mix_in(own: TokenizedDataset, earlier: TokenizedDataset, numbers: Sequence[int]) -> TokenizedDataset:
    """Append some rows of another dataset to a dataset, in a new cache entry.

    Args:
        own: The dataset, all of whose rows are used.
        earlier: The other dataset.
        numbers: Row numbers of the other dataset; a number may occur more than once.

    Raises:
        ResourceError: There is no room on the disk.
    """
    places = [own.rows.directory.name, own.fingerprint, earlier.fingerprint]
    parts = json.dumps([_code_digest(), places, list(numbers)])

    def write(writer: TokenCacheWriter) -> None:
        rows = islice(chain(own.rows.rows(), map(earlier.rows.row, numbers)), writer.read, None)
        while batch := list(islice(rows, _BATCH_ROWS)):
            writer.add(_report(batch), batch)

    rows = token_cache.load_or_write(hashlib.sha256(parts.encode()).hexdigest(), write)
    rows.report = total([own.report, _report([earlier.rows.row(number) for number in numbers])])
    return TokenizedDataset(rows)


def _report(rows: Sequence[TokenizedRow]) -> Report:
    """The report on rows that are used unchanged."""
    lengths = Counter(len(row.ids) for row in rows)
    supervised = sum(row.supervised for row in rows)
    tokens, count = sum(len(row.ids) for row in rows), len(rows)
    return Report(rows=count, written=count, tokens=tokens, supervised=supervised, lengths=lengths)


def open_tokenized(directory: Path) -> TokenizedDataset | None:
    """Open rows that another process has tokenized; None if this process cannot open them."""
    rows = token_cache.open_trusted(directory)
    return TokenizedDataset(rows) if rows is not None else None


@cache
def _code_digest() -> str:
    """SHA-256 of the source of this package. It is part of the cache key, so a release never uses cached rows that it
    would tokenize differently."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _ExampleTokenizer:
    """Turns examples into tokenized rows of at most `max_length` tokens."""

    renderer: Renderer
    section: DataSection
    vocabulary_size: int

    def tokenize(self, examples: Sequence[Example]) -> tuple[Report, list[TokenizedRow]]:
        """Returns the report on all examples, and the rows that are trained on. Raises as `prepare` does.

        If invalid rows are dropped, a batch with an invalid example is bisected until the example is alone.
        """
        try:
            return self._tokenize(examples)
        except DataError as error:
            problem = error.problems[0]
            if self.section.invalid_rows == "error" or problem.code == Code.DATA_TOO_LONG:
                raise
        if len(examples) == 1:
            report = Report(rows=1)
            report.drop_invalid(problem)
            return report, []
        middle = len(examples) // 2
        (report, rows), (more, others) = self.tokenize(examples[:middle]), self.tokenize(examples[middle:])
        report.extend(more)
        return report, rows + others

    def _tokenize(self, examples: Sequence[Example]) -> tuple[Report, list[TokenizedRow]]:
        report, kept = Report(rows=len(examples)), list[Example]()
        is_preference = any(isinstance(example, Preference) for example in examples)
        loss_on = "completion" if is_preference else self.section.loss_on
        for example in examples:
            if reason := formats.drop_reason(example, loss_on):
                report.drop(reason, example.where)
                continue
            kept.append(example)
            if isinstance(example, Conversation) and loss_on != "all":
                report.empty_answers += len(example.selected_turns(loss_on)) - len(example.supervised_turns(loss_on))
        checked = (formats.check_ids(example, self.vocabulary_size) for example in kept if isinstance(example, Ids))
        if problems := [problem for problem in checked if problem]:
            raise DataError(reported(problems))
        parts = [self._parts(example, loss_on) for example in kept]
        masked, singles = self.section.reasoning == "mask", [one for some in parts for one in some]
        whole = iter(self.renderer.rows(singles, loss_on, masks_reasoning=masked) if singles else [])
        rows = list[TokenizedRow]()
        for example, some in zip(kept, parts, strict=True):
            weight = 1.0 if isinstance(example, Preference) else example.weight
            last = len(some) - len(signs := _sides_of(example))
            made = [
                replace(next(whole), where=example.where, side=side, weight=weight) for side in (*[0] * last, *signs)
            ]
            if own := self._cut(made[last:], report):
                before = [row for one in made[:last] for row in self._cut([one], report, is_earlier=True)]
                rows += [*before, *own]
                self._count(example, before, own, report)
        return report, rows

    def _parts(self, example: Example, loss_on: str) -> Sequence[Single]:
        """Returns what is rendered for an example: both answers of a pair, or the parts of a conversation."""
        return self.renderer.parts(example, loss_on) if isinstance(example, Conversation) else sides(example)

    def _count(
        self, example: Example, earlier: Sequence[TokenizedRow], own: Sequence[TokenizedRow], report: Report
    ) -> None:
        """Count what the user should see of an example that is trained on."""
        report.written += len(earlier) + len(own)
        report.own_rows += len(earlier)
        if isinstance(example, Conversation):
            report.add_kind(kind_of(example), report.written - 1)
            answers = example.supervised_turns(self.section.loss_on)
            *earlier_bare, is_bare = [not reasoning_of(example.messages[at]) for at in answers] or [False]
            template = self.renderer.template(example.arguments)
            is_masked = self.section.reasoning == "mask"
            report.masked += is_masked and not all((is_bare, *earlier_bare))
            report.empty_reasoning += is_bare and not is_masked and template.empties_reasoning
            report.rewritten += sum(earlier_bare) * template.rewrites_answers

    def _cut(self, whole: list[TokenizedRow], report: Report, *, is_earlier: bool = False) -> list[TokenizedRow]:
        """Returns the truncated row, or the two rows of a pair; an empty list if they are dropped.

        is_earlier: whether the row is that of an earlier answer of an example whose last answer is trained on.
        """
        where, max_length = whole[0].where, self.section.max_length
        if len(whole) > 1 and whole[0].ids == whole[1].ids:
            report.drop("the chosen and the rejected answer have the same tokens", where)
            return []
        report.lengths.update(len(row.ids) for row in whole)
        rows = self._truncate(whole)
        if rows is None or not all(row.supervised for row in rows):
            if is_earlier:
                report.cut_answers += 1
                return []
            what = "an answer" if whole[0].side else "the answer"
            how = "longer than" if self.section.truncation == "drop" else f"{what} does not fit in"
            report.drop(f"{how} max_length {max_length}", where)
            return []
        report.truncated += any(len(row.ids) > max_length for row in whole)
        report.cut_answers += sum(len(row.spans) for row in whole) - sum(len(row.spans) for row in rows)
        report.tokens += sum(len(row.ids) for row in rows)
        report.supervised += sum(row.supervised for row in rows)
        return rows

    def _truncate(self, whole: list[TokenizedRow]) -> list[TokenizedRow] | None:
        """Returns the rows, truncated as `truncation` sets, or None if they are dropped."""
        section, bos = self.section, self.renderer.tokenizer.bos_token_id
        longest = max(len(row.ids) for row in whole)
        if longest <= section.max_length:
            return whole
        if section.truncation == "error":
            what = f"the row has {longest} tokens, more than data.max_length {section.max_length}"
            fix = "raise data.max_length, or set data.truncation to keep_completion or drop"
            raise DataError(Problem(Code.DATA_TOO_LONG, what, whole[0].where, fix=fix))
        if section.truncation == "drop":
            return None
        if whole[0].side:
            return spans.truncate_sides(whole, section.max_length, bos)
        row = spans.truncate(whole[0], section.max_length, bos)
        return [row] if row else None


def _sides_of(example: Example) -> tuple[int, ...]:
    """Returns the `TokenizedRow.side` of each row of an example."""
    if isinstance(example, formats.PreferencePair):
        return spans.CHOSEN, spans.REJECTED
    if isinstance(example, formats.UnpairedPreference):
        return (spans.DESIRABLE if example.desirable else spans.UNDESIRABLE,)
    return (0,)


def _check_report(report: Report, split: DatasetSplit, section: DataSection) -> None:
    """Raises DataError: there is no supervised token, or more rows are dropped than `max_dropped` allows."""
    reasons = "; ".join(report.reasons())
    if not report.supervised:
        what = f"no row has anything to learn ({reasons})"
        fix = f"raise data.max_length to {report.longest}" if report.longest > section.max_length else ""
        raise DataError(Problem(Code.DATA_EMPTY, what, split.source, fix=fix))
    share = report.dropped_rows / report.rows
    if share > section.max_dropped:
        what = f"{share:.0%} of the {split.name} rows would be dropped ({reasons})"
        fix = f"correct the rows, or raise data.max_dropped above {section.max_dropped}"
        raise DataError(Problem(Code.DATA_TOO_MANY_DROPPED, what, split.source, "data.max_dropped", fix))


def _batches(examples: Iterator[Example]) -> Iterator[list[Example]]:
    """Yields examples in batches limited by rows and by characters; fingerprints depend on the batch borders."""
    batch: list[Example] = []
    characters = 0
    for example in examples:
        batch.append(example)
        characters += size_of(example)
        if len(batch) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
