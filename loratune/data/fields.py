"""Finds the fields that hold questions, texts, answers and classes, by value and name, for `loratune init`."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loratune.codes import Code
from loratune.config import DataSection
from loratune.config.keys import assignment, yaml_flow
from loratune.data.formats import Conversation, Example, Plain, quote
from loratune.data.formats.recognition import FORMATS
from loratune.data.holding_out import MAX_LABELS, UNITS_PER_LABEL
from loratune.data.report import RowTally
from loratune.data.row_index import completion_key
from loratune.data.sources import format_error, open_source
from loratune.data.sources.rows import Row
from loratune.data.splits import DatasetSplit, RawDatasets, read_datasets
from loratune.errors import DataError, Problem
from loratune.events import reading
from loratune.text import listed

_MOST, _LONGEST, _LEAST_ROWS = 1_000, 80, 3
"""Limits of a field of classes: the most values, the most characters of a value, and the fewest rows per value for up
to 100 values; beyond 100, `UNITS_PER_LABEL` rows per value are needed."""
LABEL_TOKENS = 16
"""The largest median of supervised tokens for completions to count as labels."""
_SHOWN = 20
"""The most classes that a line lists."""
_LEAST_LETTERS = 5
"""The fewest letters of a word in which one differing letter counts as a typo."""
_MOST_GLUED = 0.9
"""If prompt and answer lack a separator in at least this share of rows, the chat template is proposed."""

# Names of fields, in lower case, by what they hold; origins say where a row comes from.
_ANSWERS = (
    "output", "completion", "response", "answer", "reply", "target", "solution", "summary", "label", "translation",
)  # fmt: skip
_CLASSES = ("class", "category", "topic", "intent", "department", "sentiment", "label_text", "label_name")
_TEXTS = ("text", "content", "document", "body", "sentence", "review", "message", "description", "comment", "utterance")
_DOCUMENTS = ("content", "document", "body")
_ORIGINS = (
    "lang", "language", "locale", "source", "split", "subset", "dataset", "dump", "license", "version", "author",
    "user", "date", "format", "encoding",
)  # fmt: skip
_QUESTIONS = ("instruction", "question", "query", "prompt", "problem", "source")
_CONTEXTS = ("input", "context", "passage")
_CHOSEN = ("chosen", "preferred", "winner", "better", "chosen_response", "response_chosen", "response_j")
_REJECTED = ("rejected", "dispreferred", "loser", "worse", "rejected_response", "response_rejected", "response_k")
_CHATS = ("conversation", "dialogue", "dialog", "chat", "turns")
_AS_CHAT: dict[tuple[str, ...], dict[str, str]] = {
    ("prompt_completion",): {"instruction": "prompt", "output": "completion"},
    ("preference",): {"instruction": "prompt"},
}
"""Formats of the files → the columns with which their texts go through the chat template."""


@dataclass(frozen=True)
class ColumnChoice:
    """The proposed columns.

    Attributes:
        columns: `data.columns`; empty to read the rows unchanged.
        why: The reason.
        remarks: Lines for the user, on other ways to read the rows.
    """

    columns: dict[str, str] = field(default_factory=dict)
    why: str = ""
    remarks: tuple[str, ...] = ()


def read(section: DataSection, *, chat: bool) -> tuple[RawDatasets, ColumnChoice]:
    """All rows, with the columns that fit them best. chat: whether the tokenizer has a chat template.

    Raises:
        DataError: As `read_datasets`; or the fields fit no format, and their names do not identify them either.
    """

    def of(columns: Mapping[str, str]) -> RawDatasets:
        return read_datasets(section.model_copy(update={"columns": columns}), 0)

    try:
        raw = of(section.columns)
    except DataError as error:
        choice = _columns_for(error, section, chat=chat)
        return of(choice.columns), choice
    choice = _better_columns(raw.train, section, chat=chat)
    if not choice.columns:
        return raw, replace(choice, columns=section.columns, why="")
    try:
        return of(choice.columns), choice
    except DataError as error:  # such as rows that lack the field
        line = f"read as they are, as not all fit data.columns {yaml_flow(choice.columns)}: {error.problems[0]}"
        return raw, ColumnChoice(section.columns, remarks=(line,))


def _columns_for(error: DataError, section: DataSection, *, chat: bool) -> ColumnChoice:
    """Columns for rows whose fields fit no format. error: the error about them, raised again if no columns fit."""
    problem = error.problems[0]
    unread = problem.key == "data.columns"
    if section.columns or problem.code != Code.DATA_FORMAT or problem.key not in ("", "data.columns"):
        raise error
    rows = (row for part in open_source(section.train_sources[0], section.sample_by) for row in part.rows())
    columns = propose_columns(next(row.values for row in rows if isinstance(row, Row)), chat=chat)
    if not unread and columns.keys() <= {"text"}:
        choice = _survey_and_choose(section, columns.get("text", ""), chat=chat)
        if choice.columns or columns:
            return replace(choice, columns=choice.columns or columns, why=choice.why or _BY_NAMES)
    if columns:
        return ColumnChoice(columns, _BY_NAMES)
    if unread:
        raise error
    known = ", or ".join(" + ".join(format.keys) for format in FORMATS)
    fix = f"rows have {known}; say which is which: {assignment('data.columns', dict.fromkeys(_keys(chat), 'YOURS'))}"
    fix += ", or with chosen and rejected for preferences"
    problems = [replace(problem, fix=fix) for problem in error.problems]
    raise format_error(problems, section.train_sources[0], section.sample_by) from None


_BY_NAMES = "the fields fit no format as they are, and their names say what they hold"


def _better_columns(split: DatasetSplit, section: DataSection, *, chat: bool) -> ColumnChoice:
    """Better columns for rows that have a format already; empty if there are none."""
    if section.columns or section.format != "auto":
        return ColumnChoice()
    fields = {name for file in split.index.files for name in file.parser.fields}
    if tuple(split.formats) == ("text",) and len(fields) > 1:
        return _survey_and_choose(section, "text", chat=chat)
    columns = _AS_CHAT.get(tuple(split.formats), {}) if chat else {}
    if columns and all("prompt" in file.parser.fields for file in split.index.files):
        separators = split.separators
        if separators.missing >= _MOST_GLUED * separators.rows:
            why = "joined as text, prompt and answer would run together: so they go through the chat template"
            return ColumnChoice(columns, why)
    return ColumnChoice()


def propose_columns(fields: Mapping[str, Any], *, chat: bool) -> dict[str, str]:
    """`data.columns` for a row, inferred from the names of its fields; empty if they are ambiguous.

    Args:
        fields: The row.
        chat: Whether questions and answers may become conversations; otherwise they are joined as text.
    """

    def named(known: Sequence[str]) -> list[str]:
        return [name for word in known for name in fields if name.lower() == word]

    def texts(known: Sequence[str]) -> list[str]:
        return [name for name in named(known) if isinstance(fields[name], str)]

    questions, contexts, answers = texts(_QUESTIONS), texts(_CONTEXTS), texts(_ANSWERS)
    if not questions:
        questions, contexts = contexts, []
    columns: dict[str, str] = {}
    chats, chosen, rejected = named(_CHATS), named(_CHOSEN), named(_REJECTED)
    if len(chosen) == len(rejected) == 1:
        is_instruction = chat and isinstance(fields[chosen[0]], str)
        if len(questions) == 1:
            columns = {"instruction" if is_instruction else "prompt": questions[0]}
            columns |= {"input": contexts[0]} if is_instruction and len(contexts) == 1 else {}
        columns |= {"chosen": chosen[0], "rejected": rejected[0]}
    elif len(chats) == 1 and isinstance(turns := fields[chats[0]], list) and turns and isinstance(turns[0], dict):
        columns = {"messages" if "role" in turns[0] else "conversations": chats[0]}
    elif len(questions) == len(answers) == 1 and len(contexts) <= chat:
        columns = dict(zip((*_keys(chat), "input"), (questions[0], answers[0], *contexts), strict=False))
    elif not questions and not answers and len(found := texts(_DOCUMENTS)) == 1:
        columns = {"text": found[0]}
    return {ours: theirs for ours, theirs in columns.items() if ours != theirs}


def _keys(chat: bool) -> tuple[str, str]:
    """The keys of rows whose texts go through a chat template, or that are joined as text."""
    return ("instruction", "output") if chat else ("prompt", "completion")


@dataclass
class _Column:
    """Statistics of a field.

    Attributes:
        texts: Rows in which it is text.
        spaced: Rows in which it is text with inner spaces.
        others: Rows in which it is something else.
        values: Its values with their counts; None once they cannot be classes.
    """

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
        """Whether all values are whole numbers, which may be ids of classes that another field names."""
        return all(value.strip().isdigit() for value in self.values or [""])

    def classes(self, rows: int) -> int:
        """The number of different values, if they are few enough to be classes; otherwise 0."""
        count = len([value for value in self.values or () if value.strip()])
        is_few = 2 <= count <= max(min(MAX_LABELS, rows // _LEAST_ROWS), min(_MOST, rows // UNITS_PER_LABEL))
        return count if is_few else 0


def _survey_and_choose(section: DataSection, text: str, *, chat: bool) -> ColumnChoice:
    """`choose_answer` for the training rows."""
    parts = [part for source in section.train_sources for part in open_source(source, section.sample_by)]
    with reading("looking for classes", sum(part.size for part in parts)) as advance:
        rows = (row for part in parts for row in part.rows(advance) if isinstance(row, Row))
        return choose_answer(rows, text, chat=chat)


def choose_answer(rows: Iterable[Row], text: str, *, chat: bool) -> ColumnChoice:
    """Find the text field and the class field by their values, and by their names if there are several candidates.

    Args:
        rows: All rows, whose fields fit no format or the format `text`.
        text: The text field, if it is known; otherwise empty.
        chat: Whether text and answer may become a conversation.

    Raises:
        DataError: Several fields may be the answer.
    """
    columns, count, first = _survey(rows)
    usual = {name: one for name, one in columns.items() if one.texts >= count / 2 and not one.others}
    text = text or _text(usual, count)
    usual.pop(text, None)
    if not text:
        return ColumnChoice()

    def as_columns(answer: str) -> dict[str, str]:
        return {ours: theirs for ours, theirs in zip(_keys(chat), (text, answer), strict=True) if ours != theirs}

    def described(name: str) -> str:
        return f"`{name}` has {columns[name].classes(count):,} different values in {count:,} rows"

    def option(name: str) -> str:
        return assignment("data.columns", as_columns(name))

    named = [name for name in usual if name.lower() in (*_ANSWERS, *_CLASSES)]
    few = [name for name in usual if usual[name].classes(count)]
    found = named or [name for name in few if name.lower() not in _ORIGINS]
    found = [name for name in found if not usual[name].is_numbers] or found
    remarks = {name: f"{described(name)} and is not learned; if it is the answer: {option(name)}" for name in few}
    if not found:
        numbers = [name for name, one in columns.items() if one.others and not one.texts and one.classes(count)]
        lines = [f"{described(name)}, which are not text; written as text it can be the answer" for name in numbers]
        return ColumnChoice(remarks=(*remarks.values(), *lines))
    text_only = "--set data.format=text" + ("" if text == "text" else f" {assignment('data.columns', {'text': text})}")
    if len(found) > 1:
        fix = f"say which: {', or '.join(map(option, found))}; or the text alone: {text_only}"
        what = f"each of {quote(found)} may be the answer to `{text}`"
        raise DataError(Problem(Code.DATA_FORMAT, what, first, "data.columns", fix))
    (answer,) = found
    why = f"{described(answer)}: the classes of `{text}`"
    why = f"`{answer}` has the answers by its name" if answer in named else why
    why = f"{why}; without it the texts alone are learned: {text_only}"
    return ColumnChoice(as_columns(answer), why, tuple(line for name, line in remarks.items() if name != answer))


def _survey(rows: Iterable[Row]) -> tuple[dict[str, _Column], int, str]:
    """The statistics of each field, the number of rows, and the place of the first row."""
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
    """The text field: the only one with many values, with a known name, or with several words; otherwise empty."""
    many = [name for name, one in columns.items() if not one.classes(rows)]
    known = [name for word in _TEXTS for name in many if name.lower() == word]
    words = [name for name in many if columns[name].spaced > columns[name].texts / 2]
    return next((names[0] for names in (many, known[:1], words) if len(names) == 1), "")


@dataclass(frozen=True)
class Classes:
    """The answers of rows, if they are classes.

    Attributes:
        labels: The number of labels that validation rows are stratified by; 0 if they are not stratified.
        counts: Answer → number of rows; empty if answers are not classes.
        empty: Rows whose text is empty.
    """

    labels: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    empty: RowTally = field(default_factory=RowTally)

    @classmethod
    def of(cls, examples: Iterable[Example], rows: int, loss_on: str) -> "Classes":
        """The classes of examples. rows: their number. loss_on: as in the configuration."""
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
        """Lines for the user: the classes, possible duplicates among them, rare classes, and empty texts."""
        if not self.counts:
            return
        yield f"{len(self.counts):,} classes: {self._listed(self.counts)}"
        yield from filter(None, [self.remark_on_similar()])
        if rare := [name for name, count in self.counts.items() if count < UNITS_PER_LABEL]:
            yield f"classes of fewer than {UNITS_PER_LABEL} rows: {self._listed(rare)}"
        if self.empty.count:
            yield f"rows with a class whose text is empty: {self.empty.count:,} ({self.empty.places})"

    def remark_on_similar(self) -> str:
        """A line on classes that look alike, and what would join them; empty if there are none."""
        if not (groups := alike(self.counts)):
            return ""
        similar = listed([*map(self._listed, groups)], _SHOWN, "; ")
        fix = f"; if they are the same, set data.labels: {yaml_flow(labels)}" if (labels := self.joined()) else ""
        return f"classes that look alike, and are learned as different ones: {similar}{fix}"

    def joined(self) -> dict[str, str]:
        """Proposed `data.labels`: each class → the most frequent one that looks like it."""
        found: dict[str, str] = {}
        for group in alike(self.counts):
            most, *others = sorted(group, key=lambda name: (-self.counts[name], name))
            found |= {name.strip(): most.strip() for name in others if name.strip() != most.strip()}
        return found

    def _listed(self, names: Iterable[str]) -> str:
        ordered = sorted(names, key=lambda name: (-self.counts[name], name))
        return listed([f"`{name}` {self.counts[name]:,}" for name in ordered], _SHOWN)


def _question_and_answer(example: Example) -> tuple[str | None, str]:
    """The question and the answer of an example; (None, "") if it is not one question with one answer."""
    if isinstance(example, Plain) and not example.whole:
        return example.prompt, example.completion
    if isinstance(example, Conversation) and example.messages[-1]["role"] == "assistant":
        return "".join(message["content"] for message in example.messages[:-1]), example.messages[-1]["content"]
    return None, ""


def alike(names: Iterable[str]) -> list[Sequence[str]]:
    """Groups of names that differ only in case, white space, hyphens and the like, or in one letter of a long word:
    added, removed, replaced, or swapped with the next. Runs in time linear in the number of letters."""
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        while (parent := parents.setdefault(key, key)) != key:
            parents[key] = key = parents[parent]
        return key

    keys_of = {name: [*_spellings(name)] for name in names}
    for first, *others in keys_of.values():
        for other in others:
            parents[root(other)] = root(first)
    groups: dict[str, list[str]] = {}
    for name, keys in keys_of.items():
        groups.setdefault(root(keys[0]), []).append(name)
    return [group for group in groups.values() if group[1:]]


def _spellings(name: str) -> set[str]:
    """The folded name, and variants of it with one letter deleted. Names that look alike share one of these."""
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
