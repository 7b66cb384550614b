"""Classes in the rows of `loratune init`: a field of few different values beside a text, and what is said of them."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from loratune.codes import Code
from loratune.config.keys import assignment
from loratune.data.formats import Conversation, Example, Plain, completion_key
from loratune.data.formats.examples import quote
from loratune.data.holding_out import MAX_LABELS, UNITS_PER_LABEL
from loratune.data.report import RowTally
from loratune.data.sources import Row
from loratune.errors import DataError, Problem

_MOST, _LONGEST, _LEAST_ROWS = 1_000, 80, 3
"""Values that a field of classes has at most, characters of one, and rows that have each on average, of up to 100
classes; beyond, the rows of each must be as many as where validation rows are stratified."""
_SHOWN = 20
"""Classes that a line lists."""
_LEAST_LETTERS = 5
"""Letters of a word that may differ in one of them and still be the same word, misspelt."""

ANSWERS = (
    "output", "completion", "response", "answer", "reply", "target", "solution", "summary", "label", "translation",
)  # fmt: skip
CLASSES = ("class", "category", "topic", "intent", "department", "sentiment", "label_text", "label_name")
_TEXTS = ("text", "content", "document", "body", "sentence", "review", "message", "description", "comment", "utterance")
_ORIGINS = (
    "lang", "language", "locale", "source", "split", "subset", "dataset", "dump", "license", "version", "author",
    "user", "date", "format", "encoding",
)  # fmt: skip
"""Names of fields, in lower case: of answers, of classes, of texts, and of what tells where a row comes from."""


@dataclass
class _Column:
    """What a field holds: in how many rows text, with white space in it, and something else; and its values as long as
    they are few and short."""

    texts: int = 0
    spaced: int = 0
    others: int = 0
    values: Counter[str] | None = field(default_factory=Counter)

    def add(self, value: object) -> None:
        if not isinstance(value, str):
            self.others += value is not None
            self.values = None if isinstance(value, float | list | dict) else self.values
        else:
            self.texts += 1
            self.spaced += " " in value.strip()
        if self.values is not None and value is not None:
            shown = str(value)
            self.values[shown] += 1
            if len(shown) > _LONGEST or "\n" in shown or len(self.values) > _MOST:
                self.values = None

    @property
    def is_numbers(self) -> bool:
        """Whether all values are whole numbers, which may be those of classes that another field names."""
        return all(value.strip().isdigit() for value in self.values or [""])

    def classes(self, rows: int) -> int:
        """How many different values the field has, if they are as few as those of classes; else 0."""
        count = len([value for value in self.values or () if value.strip()])
        is_few = 2 <= count <= max(min(MAX_LABELS, rows // _LEAST_ROWS), min(_MOST, rows // UNITS_PER_LABEL))
        return count if is_few else 0


@dataclass(frozen=True)
class Choice:
    """What to learn from rows of a text and its class, or another answer.

    Attributes:
        columns: `data.columns`; empty where no field is taken for the answer.
        why: The reason.
        remarks: Lines for the user.
    """

    columns: dict[str, str] = field(default_factory=dict)
    why: str = ""
    remarks: tuple[str, ...] = ()


def question_and_answer(chat: bool) -> tuple[str, str]:
    """The keys of rows whose texts go through a chat template, or of those that are joined as they stand."""
    return ("instruction", "output") if chat else ("prompt", "completion")


def choose(rows: Iterable[Row], text: str, *, chat: bool) -> Choice:
    """Find the field of a text and that of its class, by what they hold, and by their names where several could be.

    Args:
        rows: All of them, with fields that fit no format, or those of texts.
        text: The field that is the text, if that is known.
        chat: Whether text and answer may become a conversation.

    Raises:
        DataError: Several fields may be the answer.
    """
    columns, count, first = _survey(rows)
    usual = {name: one for name, one in columns.items() if one.texts >= count / 2 and not one.others}
    text = text or _text(usual, count)
    usual.pop(text, None)
    if not text:
        return Choice()

    def as_columns(answer: str) -> dict[str, str]:
        columns = zip(question_and_answer(chat), (text, answer), strict=True)
        return {ours: theirs for ours, theirs in columns if ours != theirs}

    def described(name: str) -> str:
        return f"`{name}` has {columns[name].classes(count):,} different values in {count:,} rows"

    def option(name: str) -> str:
        return assignment("data.columns", as_columns(name))

    named = [name for name in usual if name.lower() in (*ANSWERS, *CLASSES)]
    few = [name for name in usual if usual[name].classes(count)]
    found = named or [name for name in few if name.lower() not in _ORIGINS]
    found = [name for name in found if not usual[name].is_numbers] or found
    remarks = [f"{described(name)} and is not learned; if it is the answer: {option(name)}" for name in few]
    if not found:
        numbers = [name for name, one in columns.items() if one.others and not one.texts and one.classes(count)]
        remarks += [f"{described(name)}, which are no text; written as text it can be the answer" for name in numbers]
        return Choice(remarks=tuple(remarks))
    alone = "" if text == "text" else f" {assignment('data.columns', {'text': text})}"
    if len(found) > 1:
        fix = f"say which: {', or '.join(map(option, found))}; or the text alone: --set data.format=text{alone}"
        what = f"each of {quote(found)} may be the answer to `{text}`"
        raise DataError(Problem(Code.DATA_FORMAT_AMBIGUOUS, what, first, "data.columns", fix))
    (answer,) = found
    why = (
        f"`{answer}` has the answers by its name"
        if answer in named
        else f"{described(answer)}: the classes of `{text}`"
    )
    why = f"{why}; without it the texts alone are learned: --set data.format=text{alone}"
    others = [line for name, line in zip(few, remarks, strict=True) if name != answer]
    return Choice(as_columns(answer), why, tuple(others))


def _survey(rows: Iterable[Row]) -> tuple[dict[str, _Column], int, str]:
    """What the fields hold, in how many rows, and where the first is."""
    columns: dict[str, _Column] = {}
    count, first = 0, ""
    for count, row in enumerate(rows, start=1):
        first = first or row.where
        for name, value in row.values.items():
            columns.setdefault(name, _Column()).add(value)
        if count == _MOST * UNITS_PER_LABEL and not any(one.values for one in columns.values()):
            break  # no field has few values, however many rows follow
    return columns, count, first


def _text(columns: Mapping[str, _Column], rows: int) -> str:
    """The field of the text: the only one with many values, or with words, or that is called so; empty if none is."""
    many = [name for name, one in columns.items() if not one.classes(rows)]
    known = [name for word in _TEXTS for name in many if name.lower() == word]
    words = [name for name in many if columns[name].spaced > columns[name].texts / 2]
    return next((names[0] for names in (many, known[:1], words) if len(names) == 1), "")


@dataclass(frozen=True)
class Classes:
    """The answers of rows, where they are classes.

    Attributes:
        labels: By how many of them validation rows are stratified; 0 where they are not.
        counts: Answer → how many rows have it; empty where answers are no classes.
        empty: Rows whose text is empty.
    """

    labels: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    empty: RowTally = field(default_factory=RowTally)

    @classmethod
    def of(cls, examples: Iterable[Example], rows: int, loss_on: str) -> "Classes":
        """The classes of so many rows. loss_on: as in the configuration."""
        column, empty, labels = _Column(), RowTally(), set[bytes]()
        for example in examples:
            question, answer = _question_and_answer(example)
            if question is not None and not answer.strip():
                continue  # the row is dropped
            if len(labels) <= MAX_LABELS:
                labels.add(completion_key(example, loss_on))
            column.add(answer if question is not None else [])
            if question is not None and not question.strip():
                empty.add(example.where)
            if column.values is None and len(labels) > MAX_LABELS:
                return cls()
        count = len(labels) if 2 <= len(labels) <= min(MAX_LABELS, rows // UNITS_PER_LABEL) else 0
        return cls(count, column.values or {}, empty) if column.classes(rows) else cls(count)

    def remarks(self) -> Iterator[str]:
        """Lines for the user: the classes, those that may be one, those of few rows, and empty texts."""
        if not self.counts:
            return
        yield f"{len(self.counts):,} classes: {self._listed(self.counts)}"
        if groups := alike(self.counts):
            more = f"; and {len(groups) - _SHOWN:,} more" if groups[_SHOWN:] else ""
            listed = "; ".join(map(self._listed, groups[:_SHOWN]))
            yield f"classes that look alike, and are learned as different ones: {listed}{more}"
        if rare := [name for name, count in self.counts.items() if count < UNITS_PER_LABEL]:
            yield f"classes of fewer than {UNITS_PER_LABEL} rows: {self._listed(rare)}"
        if self.empty.count:
            yield f"rows with a class whose text is empty: {self.empty.count:,} ({self.empty.places})"

    def _listed(self, names: Iterable[str]) -> str:
        ordered = sorted(names, key=lambda name: (-self.counts[name], name))
        more = f", and {len(ordered) - _SHOWN:,} more" if ordered[_SHOWN:] else ""
        return ", ".join(f"`{name}` {self.counts[name]:,}" for name in ordered[:_SHOWN]) + more


def _question_and_answer(example: Example) -> tuple[str | None, str]:
    """The texts of an example; None for a question where it has no one answer."""
    if isinstance(example, Plain) and not example.whole:
        return example.prompt, example.completion
    if isinstance(example, Conversation) and example.messages[-1]["role"] == "assistant":
        return "".join(message["content"] for message in example.messages[:-1]), example.messages[-1]["content"]
    return None, ""


def alike(names: Iterable[str]) -> list[Sequence[str]]:
    """Groups of names that differ only in case, white space, hyphens and the like, or in one letter of a long word: one
    too many or too few, another one, or two that are swapped. Takes time in proportion to the letters of all."""
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        while (parent := parents.setdefault(key, key)) != key:
            parents[key] = key = parents[parent]
        return key

    keys_of = {name: [*_keys(name)] for name in names}
    for first, *others in keys_of.values():
        for other in others:
            parents[root(other)] = root(first)
    groups: dict[str, list[str]] = {}
    for name, keys in keys_of.items():
        groups.setdefault(root(keys[0]), []).append(name)
    return [group for group in groups.values() if group[1:]]


def _keys(name: str) -> set[str]:
    """Names that look alike have one of these in common: the name itself, folded, and without each of its letters."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    words = folded.split()
    keys = {" ".join(words)}
    if any(map(str.isalpha, folded)):
        keys.add(re.sub(r"[\s_.-]+", "", folded))
    for place, word in enumerate(words):
        if len(word) >= _LEAST_LETTERS and word.isalpha():
            shorter = (word[:letter] + word[letter + 1 :] for letter in range(len(word)))
            keys |= {" ".join([*words[:place], one, *words[place + 1 :]]) for one in shorter}
    return keys
