"""Finds the fields that hold questions, texts, answers and classes, by name and value, for `loratune init`."""

import difflib
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
from loratune.data.sources import format_error, open_source
from loratune.data.sources.rows import Row
from loratune.data.splits import DatasetSplit, RawDatasets, read_datasets
from loratune.errors import DataError, Problem
from loratune.events import reading
from loratune.text import listed

LABEL_TOKENS = 16
"""The largest median of supervised tokens for completions to count as labels."""
_MOST, _LONGEST, _LEAST_ROWS = 1_000, 80, 3
"""Limits of a field of classes: the most values, the most characters of a value, and the fewest rows per value for up
to 100 values; beyond 100, `UNITS_PER_LABEL` rows per value are needed."""
_SHOWN = 20
"""The most classes that a line lists."""
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
_CHOSEN = ("chosen", "preferred", "chosen_response", "response_chosen")
_REJECTED = ("rejected", "dispreferred", "rejected_response", "response_rejected")
_CHATS = ("conversation", "dialogue", "dialog", "chat", "turns")


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
    try:
        raw = read_datasets(section, 0)
    except DataError as error:
        choice = _columns_for(error, section, chat=chat)
        return read_datasets(section.model_copy(update={"columns": choice.columns}), 0), choice
    choice = _better_columns(raw.train, section, chat=chat)
    if choice.columns == section.columns:
        return raw, choice
    try:
        return read_datasets(section.model_copy(update={"columns": choice.columns}), 0), choice
    except DataError as error:  # such as rows that lack the field
        line = f"read as they are, as not all fit data.columns {yaml_flow(choice.columns)}: {error.problems[0]}"
        return raw, ColumnChoice(remarks=(line,))


def _columns_for(error: DataError, section: DataSection, *, chat: bool) -> ColumnChoice:
    """Columns for rows whose fields fit no format. error: the error about them, raised again if no columns fit."""
    problem, source = error.problems[0], section.train_sources[0]
    if section.columns or problem.code != Code.DATA_FORMAT or problem.key not in ("", "data.columns"):
        raise error
    rows = (row for part in open_source(source, section.sample_by) for row in part.rows())
    columns = propose_columns(next(row.values for row in rows if isinstance(row, Row)), chat=chat)
    choice = ColumnChoice(columns, "the fields fit no format as they are, and their names say what they hold")
    if not problem.key and columns.keys() <= {"text"}:
        by_value = _survey(section, columns.get("text", ""), chat=chat)
        choice = by_value if by_value.columns else replace(choice, remarks=by_value.remarks)
    if choice.columns:
        return choice
    if problem.key:
        raise error
    known = ", or ".join(" + ".join(format.keys) for format in FORMATS)
    fix = f"rows have {known}; say which is which: {assignment('data.columns', dict.fromkeys(_keys(chat), 'YOURS'))}"
    fix += ", or with chosen and rejected for preferences"
    raise format_error([replace(problem, fix=fix) for problem in error.problems], source, section.sample_by) from None


def _better_columns(split: DatasetSplit, section: DataSection, *, chat: bool) -> ColumnChoice:
    """Better columns for rows that have a format already; empty if there are none."""
    fields = set.intersection(*(set(file.parser.fields) for file in split.files))
    if section.columns or section.format != "auto":
        return ColumnChoice(section.columns)
    if split.formats == ["text"] and any(len(file.parser.fields) > 1 for file in split.files):
        return _survey(section, "text", chat=chat)
    is_plain = split.formats in (["prompt_completion"], ["preference"]) and "prompt" in fields
    if chat and is_plain and split.separators.missing >= _MOST_GLUED * split.separators.rows:
        columns = {"instruction": "prompt"} | ({} if split.kind else {"output": "completion"})
        why = "joined as text, prompt and answer would run together: so they go through the chat template"
        return ColumnChoice(columns, why)
    return ColumnChoice()


def _keys(chat: bool) -> tuple[str, str]:
    """The keys of rows whose texts go through a chat template, or that are joined as text."""
    return ("instruction", "output") if chat else ("prompt", "completion")


def propose_columns(fields: Mapping[str, Any], *, chat: bool) -> dict[str, str]:
    """`data.columns` for a row, inferred from the names of its fields; empty if they are ambiguous.

    Args:
        fields: The row.
        chat: Whether questions and answers may become conversations; otherwise they are joined as text.
    """

    def named(words: Sequence[str], kind: type = str) -> list[str]:
        return [name for word in words for name in fields if name.lower() == word and isinstance(fields[name], kind)]

    questions, contexts, answers = named(_QUESTIONS), named(_CONTEXTS), named(_ANSWERS)
    if not questions:
        questions, contexts = contexts, []
    chats, chosen, rejected = named(_CHATS, list), named(_CHOSEN, object), named(_REJECTED, object)
    columns: dict[str, str] = {}
    if len(chosen) == len(rejected) == 1:
        is_instruction = chat and isinstance(fields[chosen[0]], str)
        if len(questions) == 1:
            columns = {"instruction" if is_instruction else "prompt": questions[0]}
            columns |= {"input": contexts[0]} if is_instruction and len(contexts) == 1 else {}
        columns |= {"chosen": chosen[0], "rejected": rejected[0]}
    elif len(chats) == 1 and (turns := fields[chats[0]]):
        columns = {"messages" if "role" in turns[0] else "conversations": chats[0]}
    elif len(questions) == len(answers) == 1 and len(contexts) <= chat:
        columns = dict(zip((*_keys(chat), "input"), (questions[0], answers[0], *contexts), strict=False))
    elif not questions and not answers and len(found := named(_DOCUMENTS)) == 1:
        columns = {"text": found[0]}
    return {ours: theirs for ours, theirs in columns.items() if ours != theirs}


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
        if value is None:
            return
        shown = str(value) if isinstance(value, str | int) else ""
        self.texts += isinstance(value, str)
        self.spaced += isinstance(value, str) and " " in shown.strip()
        self.others += not isinstance(value, str)
        if self.values is not None:
            self.values[shown] += 1
            can_be_classes = isinstance(value, str | int) and len(shown) <= _LONGEST and "\n" not in shown
            self.values = self.values if can_be_classes and len(self.values) <= _MOST else None

    def classes(self, rows: int) -> int:
        """The number of different values, if they are few enough to be classes; otherwise 0."""
        count = len([value for value in self.values or () if value.strip()])
        is_few = 2 <= count <= max(min(MAX_LABELS, rows // _LEAST_ROWS), min(_MOST, rows // UNITS_PER_LABEL))
        return count if is_few else 0


def _survey(section: DataSection, text: str, *, chat: bool) -> ColumnChoice:
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
    columns: dict[str, _Column] = {}
    count, first = 0, ""
    for row in rows:
        count, first = count + 1, first or row.where
        for name, value in row.values.items():
            columns.setdefault(name, _Column()).add(value)
    usual = {name: one for name, one in columns.items() if one.texts >= count / 2 and not one.others}
    if not text:  # the only field with many values, with a known name, or with several words
        many = [name for name, one in usual.items() if not one.classes(count)]
        known = [name for word in _TEXTS for name in many if name.lower() == word]
        words = [name for name in many if usual[name].spaced > usual[name].texts / 2]
        text = next((names[0] for names in (many, known[:1], words) if len(names) == 1), "")
    if not text:
        return ColumnChoice()
    usual.pop(text, None)

    def as_columns(answer: str) -> dict[str, str]:
        return {ours: theirs for ours, theirs in zip(_keys(chat), (text, answer), strict=True) if ours != theirs}

    def described(name: str) -> str:
        return f"`{name}` has {columns[name].classes(count):,} different values in {count:,} rows"

    named = [name for name in usual if name.lower() in (*_ANSWERS, *_CLASSES)]
    few = [name for name in usual if usual[name].classes(count)]
    found = named or [name for name in few if name.lower() not in _ORIGINS]
    # Whole numbers may be the ids of classes that another field names.
    found = [name for name in found if not all(map(str.isdigit, usual[name].values or [""]))] or found
    text_only = "--set data.format=text" + ("" if text == "text" else f" {assignment('data.columns', {'text': text})}")
    if len(found) > 1:
        options = ", or ".join(assignment("data.columns", as_columns(name)) for name in found)
        fix = f"say which: {options}; or the text alone: {text_only}"
        what = f"each of {quote(found)} may be the answer to `{text}`"
        raise DataError(Problem(Code.DATA_FORMAT, what, first, "data.columns", fix))
    others = [name for name, one in columns.items() if name not in (text, *found) and one.classes(count)]
    how = "if it is the answer, write it as text, and map it in data.columns"
    remarks = tuple(f"{described(name)} and is not learned; {how}" for name in others)
    if not found:
        return ColumnChoice(remarks=remarks)
    (answer,) = found
    why = f"`{answer}` has the answers by its name" if named else f"{described(answer)}: the classes of `{text}`"
    why = f"{why}; without it the texts alone are learned: {text_only}"
    return ColumnChoice(as_columns(answer), why, remarks)


_TYPO_SHARE = 10
"""A class is taken for a misspelt one if the other has this many times its rows."""


def _is_typo(word: str, of: str) -> bool:
    """Whether one letter more, less or other, or two exchanged ones, make a word another of at least five letters."""
    matcher = difflib.SequenceMatcher(None, word, of)
    changes = [(word[i:j], of[k:m]) for tag, i, j, k, m in matcher.get_opcodes() if tag != "equal"]
    removed, added = map("".join, zip(*changes, strict=True))
    is_at_one_place = len(changes) == 1 or removed == added
    return (
        min(len(word), len(of)) >= 5
        and is_at_one_place
        and max(map(len, (removed, added))) == 1
        and (removed + added).isalpha()
    )


@dataclass(frozen=True)
class Classes:
    """The answers of rows, if they are classes.

    Attributes:
        counts: Answer → number of rows; empty if answers are not classes.
        empty: Rows whose text is empty.
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    empty: RowTally = field(default_factory=RowTally)

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Classes":
        """The classes of examples, if each is one question with one answer."""
        column, empty, rows = _Column(), RowTally(), 0
        for example in examples:
            rows += 1
            if isinstance(example, Plain) and not example.whole:
                question, answer = example.prompt, example.completion
            elif isinstance(example, Conversation) and example.messages[-1]["role"] == "assistant":
                question = "".join(message["content"] for message in example.messages[:-1])
                answer = example.messages[-1]["content"]
            else:
                return cls()
            if answer.strip():  # otherwise the row is dropped
                column.add(answer)
                if not question.strip():
                    empty.add(example.where)
            if column.values is None:
                return cls()
        return cls(column.values or {}, empty) if column.classes(rows) else cls()

    @property
    def labels(self) -> int:
        """The number of classes, if they are few enough for validation rows to be stratified by them; otherwise 0."""
        count = len(self.counts)
        return count if count <= min(MAX_LABELS, sum(self.counts.values()) // UNITS_PER_LABEL) else 0

    def remarks(self) -> Iterator[str]:
        """Lines for the user: possible duplicates among the classes, other rare classes, and empty texts."""
        yield from filter(None, [self.remark_on_similar()])
        alike = self.joined()
        if rare := [one for one, count in self.counts.items() if count < UNITS_PER_LABEL and one not in alike]:
            yield f"classes of fewer than {UNITS_PER_LABEL} rows: {self.listed(rare)}"
        if self.empty.count:
            yield f"rows with a class whose text is empty: {self.empty.count:,} ({self.empty.places})"

    def remark_on_similar(self) -> str:
        """A line on classes that look alike; empty if there are none."""
        if not (labels := self.joined()):
            return ""
        what = "classes that look alike, and are learned as different ones"
        return f"{what}; if they are the same, set data.labels: {yaml_flow(labels)}"

    def joined(self) -> dict[str, str]:
        """Proposed `data.labels`: each class → the most frequent one that looks like it.

        Classes look alike if they differ only in case, white space, hyphens and the like; a rare one also if a single
        letter makes it a common one.
        """
        groups: dict[str, list[str]] = {}
        for name in sorted(self.counts, key=lambda name: (-self.counts[name], name)):
            folded = unicodedata.normalize("NFKC", name).casefold()
            is_word = any(map(str.isalpha, folded))  # in numbers, a point or minus counts
            key = re.sub(r"[\s_.-]+", "", folded) if is_word else folded.strip()
            if key not in groups:
                common = [one for one, (of, *_) in groups.items() if self.counts[of] >= _TYPO_SHARE * self.counts[name]]
                key = next((one for one in common if _is_typo(key, one)), key)
            groups.setdefault(key, []).append(name)
        spaced = sum(count for name, count in self.counts.items() if name.startswith(" "))
        start = " " if 2 * spaced > sum(self.counts.values()) else ""  # answers may begin so by convention
        joined = [(name, start + names[0].strip()) for names in groups.values() if len(names) > 1 for name in names]
        return {name: label for name, label in joined if name != label}

    def listed(self, names: Iterable[str]) -> str:
        """Classes with their numbers of rows, the most frequent first."""
        ordered = sorted(names, key=lambda name: (-self.counts[name], name))
        return listed([f"`{name}` {self.counts[name]:,}" for name in ordered], _SHOWN)
