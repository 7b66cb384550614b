"""Counts of rows that were used, truncated or dropped during tokenization, and the lines that report them."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from loratune.data.formats import Plain, Single, quote
from loratune.data.rendering.spans import TokenizedRow
from loratune.errors import Problem
from loratune.text import plural

MAX_PLACES = 3
"""The most row places that a message lists."""
_LISTED = 10
"""The most invalid rows that are listed with their problems."""
_DROPPED = 100
"""The most places of dropped rows that are kept for each reason."""
_MOST = 0.5
"""If more than this share of the tokens is cut, a remark gives advice."""


@dataclass
class RowTally:
    """The number of rows of one kind, and the places of the first few."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, most: int = MAX_PLACES) -> None:
        """Count one more row. most: how many places are kept."""
        self.extend(RowTally(1, [where]), most)

    def extend(self, other: "RowTally", most: int = MAX_PLACES) -> None:
        """Add the rows of another tally, which come later."""
        self.count += other.count
        self.first += other.first[: max(0, most - len(self.first))]

    @property
    def places(self) -> str:
        """`rows.jsonl:3, rows.jsonl:9, ...`"""
        shown = self.first[:MAX_PLACES]
        return ", ".join(shown) + (", ..." if self.count > len(shown) else "")


def remarks_on_weights(weights: NDArray[np.float64] | None) -> list[str]:
    """A line about the weights of rows; none without weights. weights: (rows,)."""
    if weights is None:
        return []
    unused = f"; {count:,} rows have the weight 0" if (count := np.count_nonzero(weights == 0)) else ""
    return [f"rows have weights from {weights.min():g} to {weights.max():g}, {weights.mean():.3g} on average{unused}"]


@dataclass(frozen=True)
class Leaks:
    """Rows of a held-out split that also occur in another split, such as train.

    Attributes:
        exact: Identical rows.
        folded: Rows that differ only in white space.
        split: The name of the held-out split.
        earlier: The name of the other split.
    """

    exact: RowTally
    folded: RowTally
    split: str = "validation"
    earlier: str = "train"

    def remarks(self) -> list[str]:
        """A line for each kind of leak there is."""
        kinds = ((self.exact, ""), (self.folded, ", apart from white space"))
        return [
            f"{tally.count:,} of the {self.split} rows {'is' if tally.count == 1 else 'are'} also in {self.earlier}"
            f"{difference} ({tally.places})"
            for tally, difference in kinds
            if tally.count
        ]


@dataclass
class Report:
    """Counts over the rows of one dataset split.

    Attributes:
        rows: Rows that were read.
        tokens: Tokens of the rows that are trained on, after truncation, with those that blocks repeat.
        supervised: Those of these tokens that contribute to the loss.
        truncated: Rows that are trained on, but were truncated.
        split_rows: Rows that were split into blocks.
        blocks: Their blocks.
        repeated: Tokens of blocks that repeat those of the block before.
        cut_answers: Answers that truncation removed from rows whose last answer is trained on.
        empty_answers: Answers without content, in rows whose other answers are trained on.
        empty_reasoning: Answers without reasoning that begin with an empty block of it, which is supervised.
        masked: Rows whose answers have reasoning that is not supervised.
        own_rows: Earlier answers that are trained in rows of their own, as they are served.
        written: Rows of tokens that are trained on.
        kinds: What conversations have, such as `reasoning, tools` → how many rows, and the number of the first among
            the rows of tokens.
        dropped: Reason → dropped rows.
        invalid: Dropped rows that are invalid, also counted in `dropped`; each place comes with the problem.
        duplicates: Rows with the content of an earlier row; they are still trained on.
        lengths: Length in tokens before truncation → number of rows, of blocks for rows that were split.
    """

    COLUMNS: ClassVar = (
        "rows", "duplicates", "dropped", "truncated", "tokens", "supervised", "p50", "p95", "max",
    )  # fmt: skip
    """The columns of the table; p50, p95 and max are lengths in tokens before truncation."""
    _COUNTS: ClassVar = (
        "rows", "tokens", "supervised", "truncated", "split_rows", "blocks", "repeated", "cut_answers",
        "empty_answers", "empty_reasoning", "own_rows", "masked", "written",
    )  # fmt: skip

    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    split_rows: int = 0
    blocks: int = 0
    repeated: int = 0
    cut_answers: int = 0
    empty_answers: int = 0
    empty_reasoning: int = 0
    masked: int = 0
    own_rows: int = 0
    written: int = 0
    kinds: dict[str, tuple[int, int]] = field(default_factory=dict)
    dropped: dict[str, RowTally] = field(default_factory=dict)
    invalid: RowTally = field(default_factory=RowTally)
    duplicates: RowTally = field(default_factory=RowTally)
    lengths: Counter[int] = field(default_factory=Counter)

    def add_blocks(self, length: int, blocks: Sequence[TokenizedRow]) -> None:
        """Count a row that was split. length: its tokens. blocks: its blocks."""
        lengths = [len(block.ids) for block in blocks]
        self.split_rows, self.blocks = self.split_rows + 1, self.blocks + len(blocks)
        self.lengths.update(lengths)
        self.tokens += sum(lengths)
        self.repeated += max(0, sum(lengths) - length)
        self.supervised += sum(block.supervised for block in blocks)

    def drop(self, reason: str, where: str) -> None:
        """Count a dropped row."""
        self.dropped.setdefault(reason, RowTally()).add(where, _DROPPED)

    def drop_invalid(self, problem: Problem) -> None:
        """Count a row that is dropped because it is invalid."""
        meaning = problem.code.meaning.rstrip(".")
        self.drop(f"{meaning[:1].lower()}{meaning[1:]} [{problem.code}]", problem.where)
        self.invalid.add(f"{problem.where}: {problem.what}", _LISTED)

    def add_kind(self, kind: str, first: int, count: int = 1) -> None:
        """Count conversations of a kind. first: the number of the first one among the rows of tokens."""
        earlier, number = self.kinds.get(kind, (0, first))
        self.kinds[kind] = earlier + count, number

    def extend(self, other: Self) -> None:
        """Add the rows of another report, which come later."""
        for kind, (count, first) in other.kinds.items():
            self.add_kind(kind, self.written + first, count)
        for name in self._COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.lengths.update(other.lengths)
        self.duplicates.extend(other.duplicates)
        self.invalid.extend(other.invalid, _LISTED)
        for reason, tally in other.dropped.items():
            self.dropped.setdefault(reason, RowTally()).extend(tally, _DROPPED)

    @property
    def dropped_rows(self) -> int:
        """The number of dropped rows."""
        return sum(tally.count for tally in self.dropped.values())

    @property
    def longest(self) -> int:
        """Tokens of the longest row before truncation; 0 without rows."""
        return max(self.lengths, default=0)

    @property
    def cut_tokens(self) -> int:
        """The number of tokens lost to `max_length`: truncated tokens, and tokens of rows dropped because of it."""
        return sum(length * count for length, count in self.lengths.items()) - self.tokens

    def percentile(self, share: float) -> int:
        """The smallest length that at least this share of the rows does not exceed (nearest rank); 0 without rows."""
        rank, rows = share * self.lengths.total(), 0
        for length, count in sorted(self.lengths.items()):
            rows += count
            if rows >= rank:
                return length
        return 0

    def cells(self) -> list[str]:
        """The row of the table, one cell for each of `COLUMNS`."""
        numbers = self.counts() | {"p50": self.percentile(0.5), "p95": self.percentile(0.95), "max": self.longest}
        return [f"{numbers[name]:,}" for name in self.COLUMNS]

    def reasons(self) -> list[str]:
        """Lines on why rows were dropped: `2 rows dropped: the completion is empty (rows.jsonl:3, rows.jsonl:9)`."""
        return [
            f"{plural(tally.count, 'row')} dropped: {reason} ({tally.places})"
            for reason, tally in sorted(self.dropped.items(), key=lambda item: -item[1].count)
        ]

    def splits(self) -> list[str]:
        """A line on rows that were split into blocks, if any."""
        if not self.split_rows:
            return []
        repeated = f"; {self.repeated:,} of their tokens are repeated, without loss" if self.repeated else ""
        rows = plural(self.split_rows, "row")
        return [f"{rows} split into {self.blocks:,} blocks, as they exceed data.max_length{repeated}"]

    def losses(self) -> list[str]:
        """Lines on what was truncated or dropped."""
        truncated = [f"{plural(self.truncated, 'row')} cut to max_length"] if self.truncated else []
        return truncated + self._cut() + self._unsupervised()

    def remarks(self, max_length: int, context: int | None = None) -> list[str]:
        """Lines on the rows that complement the table. context: context length of the model in tokens."""
        lines = self.splits() + self._unsupervised()
        if self.duplicates.count:
            lines.append(f"{plural(self.duplicates.count, 'row')} repeated: {self.duplicates.places}")
        more = "raise it, or " if context is None or max_length < context else ""
        lines += self._cut(f": {more}split long rows into several")
        if self.longest > max_length:
            would = "would keep everything"
            if context is not None and self.longest > context:
                would = f"would be needed to keep everything, and the model has {context:,} positions"
            lines.append(f"max_length {self.longest:,} {would}")
        return lines

    def _cut(self, advice: str = "") -> list[str]:
        """A line on how many tokens are lost, if any. advice: added if most tokens are lost."""
        if not self.cut_tokens:
            return []
        share = self.cut_tokens / (self.tokens + self.cut_tokens)
        tokens = f"{self.cut_tokens:,} of {self.tokens + self.cut_tokens:,} tokens ({share:.1%})"
        if share <= _MOST:
            return [f"{tokens} are lost to max_length"]
        return [f"{tokens}, most of them, are lost to max_length{advice}"]

    def _unsupervised(self) -> list[str]:
        """Lines on answers and rows that are not trained on."""
        lines = []
        if self.cut_answers:
            lines.append(f"{self.cut_answers:,} earlier answers are not supervised: max_length cuts them off")
        if self.empty_answers:
            lines.append(f"{self.empty_answers:,} answers are not supervised: they are empty")
        if self.own_rows:
            why = "the chat template renders them otherwise once other messages follow"
            lines.append(f"{self.own_rows:,} earlier answers are trained in rows of their own: {why}")
        if self.masked:
            how = "not supervised, and `evaluate` generates what follows it"
            lines.append(f"{self.masked:,} rows have reasoning, which is context: {how}")
        if self.empty_reasoning:
            what = "answers without reasoning begin with an empty block of it, which teaches when not to reason"
            lines.append(f"{self.empty_reasoning:,} {what}; data.reasoning: mask takes it out of the loss")
        more = self.invalid.count - len(self.invalid.first)
        listed = [f"dropped: {line}" for line in self.invalid.first]
        return [*lines, *self.reasons(), *listed, *([f"dropped: {more:,} more invalid rows"] if more else [])]

    def counts(self) -> dict[str, int]:
        """The totals, for the run record."""
        return {
            "rows": self.rows, "duplicates": self.duplicates.count, "dropped": self.dropped_rows,
            "truncated": self.truncated, "tokens": self.tokens, "supervised": self.supervised, "longest": self.longest,
        } | ({"split": self.split_rows, "blocks": self.blocks} if self.split_rows else {})  # fmt: skip

    def record(self) -> dict[str, Any]:
        """The totals, the number of lost tokens, the reasons of drops, and the distribution of lengths.

        Lengths before truncation are rounded down to their leading six bits, so there are at most 32 of them per
        doubling: exact up to 63 tokens, and within 3 % beyond.
        """
        lengths: dict[int, int] = {}
        for length, count in sorted(self.lengths.items()):
            shift = max(length.bit_length() - 6, 0)
            lengths[length >> shift << shift] = lengths.get(length >> shift << shift, 0) + count
        reasons = {reason: tally.count for reason, tally in self.dropped.items()}
        by_length = {str(length): count for length, count in lengths.items()}
        return self.counts() | {"cut_tokens": self.cut_tokens, "reasons": reasons, "lengths": by_length}

    def dropped_places(self) -> dict[str, list[str]]:
        """Reason → the places of the rows that were dropped for it, at most a hundred."""
        return {reason: list(tally.first) for reason, tally in self.dropped.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON values without the duplicates, which `from_json` reads back."""
        return dict(_PLAIN.dump_python(self, mode="json", exclude={"duplicates"}))

    @classmethod
    def from_json(cls, values: Any) -> "Report":
        """The report from the result of `to_dict`, without duplicates. Raises ValueError: the values are not valid."""
        return _PLAIN.validate_python(values)


_PLAIN = TypeAdapter(Report)


def total(reports: Iterable[Report]) -> Report:
    """The sum of some reports, in order."""
    merged = Report()
    for report in reports:
        merged.extend(report)
    return merged


# Prompts and answers that run into one word

_ROWS, _LETTERS, _WORD = 200, 1 << 24, 30
"""The most rows that are examined, the most characters of them, and the most characters of a word."""
_RARE = 10
"""Words that run together in fewer than one in ten rows are no reason for a remark."""
_WITHOUT_SPACES = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE", "BALINESE"}
"""Scripts without spaces between words, by the first word of the Unicode names of their characters."""


@dataclass(frozen=True)
class Separators:
    """Whether prompt and answer, which are joined unchanged, are separated in the first rows of text.

    Attributes:
        rows: The number of rows examined, of any kind.
        missing: The number of rows in which the answer begins with a letter or digit directly after the prompt.
        words: The number of rows in which two words run together.
        example: The first such word and its place.
    """

    rows: int
    missing: int
    words: int
    example: str

    @classmethod
    def of(cls, rows: Iterable[Single]) -> Self:
        """The separators of the first rows; no more rows are read than needed."""
        count, missing, words, example, letters = 0, 0, 0, "", 0
        for one in islice(rows, _ROWS):
            count += 1
            if isinstance(one, Plain) and one.prompt and one.completion and not one.whole:
                before, after = one.prompt[-_WORD:], one.completion[:_WORD]
                missing += after[0].isalnum() and not before[-1].isspace()
                if _is_of_word(before[-1]) and _is_of_word(after[0]):
                    words += 1
                    example = example or f"{quote([before.split()[-1] + after.split()[0]])} at {one.where}"
                letters += len(one.prompt) + len(one.completion)
            if letters > _LETTERS:
                break
        return cls(count, missing, words, example)

    @property
    def remark(self) -> str:
        """A line if most answers follow the prompt without a space, and words run together in a tenth of the rows."""
        if 2 * self.missing <= self.rows or _RARE * self.words <= self.rows:
            return ""
        return (
            f"in {self.missing:,} of the first {self.rows:,} rows there is no space between prompt and answer "
            f"({self.example}): put white space at the end of prompts or before answers"
        )


def _is_of_word(character: str) -> bool:
    """Whether a character belongs to a word of a script that puts spaces between words."""
    is_letter = character.isalnum() or unicodedata.category(character).startswith("M")
    return is_letter and unicodedata.name(character, "").split(" ")[0] not in _WITHOUT_SPACES
