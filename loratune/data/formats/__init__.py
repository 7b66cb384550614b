"""Reading rows: the fields of a file's first row → one of the usual formats (`recognition`) → every row an Example."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loratune.codes import Code
from loratune.config import DataSection
from loratune.data.formats.chats import parse_tools, parse_turns, prompt_turns
from loratune.data.formats.examples import (
    Conversation,
    Example,
    Ids,
    Message,
    Plain,
    Preference,
    PreferencePair,
    Single,
    UnpairedPreference,
    completion_key,
    content_key,
    drop_reason,
    group_key,
    prompt_key,
    sides,
)
from loratune.data.formats.parsers import SIDES, check_ids
from loratune.data.formats.recognition import (
    CHAT_FORMATS,
    FORMATS,
    KINDS,
    OPTIONAL_FIELDS,
    PAIRS,
    PREFERENCE_FORMATS,
    UNPAIRED,
    Format,
    label_field,
    recognise,
    unread_label,
)
from loratune.data.formats.values import Fields, RowError, messages_or_text, quote, text
from loratune.data.sources.rows import Row
from loratune.errors import DataError, Problem

__all__ = [
    "CHAT_FORMATS", "FORMATS", "KINDS", "PAIRS", "PREFERENCE_FORMATS", "UNPAIRED", "Conversation", "Example", "Ids",
    "Message", "Parser", "Plain", "Preference", "PreferencePair", "Question", "RowError", "Single",
    "UnpairedPreference",
    "check_ids", "completion_key", "content_key", "drop_reason", "group_key", "parse_question", "prompt_key", "quote",
    "sides",
]  # fmt: skip


class Parser:
    """Makes examples of the rows of one file.

    Attributes:
        format_name: The format of the rows.
        identity: An id of this way of reading rows, which differs from all others.
        unread_label: A field of the first row that may say whether its answer is desirable, and is not read.
        fields: The fields of the first row, under the names of the data.
        unused_fields: The fields of the rows parsed so far that the format does not read, and rows are not grouped by.
    """

    def __init__(self, first: Row, section: DataSection):
        """Recognise the format of a file by its first row, or take the one that the section names.

        Raises:
            DataError: No format fits, or more than one; `columns` maps a field that the row lacks or the format does
                not read; a chat template, or a loss on assistant turns, is set for rows that are not conversations.
        """
        self._columns, self._is_recognised = dict(section.columns), section.format == "auto"
        self._supervise_all = section.loss_on == "all"
        self._check_columns(first)
        fields = _rename(first.values, self._columns)
        self._format = recognise(first.where, fields, section)
        self.format_name = self._format.name
        self._may_be_preference = self._is_recognised and self.format_name not in PREFERENCE_FORMATS
        self.unread_label = unread_label(fields) if self._may_be_preference else ""
        self.identity = (self.format_name, *self._format.keys)
        self._known = {*self._format.keys, *self._format.optional}
        self.fields = tuple(first.values)
        self._grouped_by = {section.group_by}
        self.unused_fields: set[str] = set()
        if problems := list(_contradictions(self._format, section, first.where)):
            raise DataError(problems)

    def _check_columns(self, first: Row) -> None:
        absent = {ours: theirs for ours, theirs in self._columns.items() if theirs not in first.values}
        if absent:
            what = f"no field {quote(absent.values())}; the fields are {quote(first.values)}"
            fix = "set columns that all files of train and validation have"
            if OPTIONAL_FIELDS.issuperset(absent):
                fix = "where only some rows have it, put it into the first row too, as null"
            raise DataError(Problem(Code.DATA_FORMAT, what, first.where, "data.columns", fix))

    def __call__(self, row: Row) -> Example:
        """The row as an example.

        Raises:
            RowError: It lacks a field, or holds something that the format does not allow.
        """
        fields = _rename(row.values, self._columns)
        if self._may_be_preference:
            self._check_no_preference(fields)
        if absent := [name for name in self._format.keys if name not in fields]:
            names = quote(self._columns.get(name, name) for name in absent)
            what = f"no field {names} for the format {self.format_name}; its fields are {quote(row.values)}"
            chosen_by = "its first row" if self._is_recognised else "data.format"
            raise RowError(what, f"give all rows of a file one format, which {chosen_by} decides")
        if not fields.keys() <= self._known:
            self.unused_fields |= fields.keys() - self._known - self._grouped_by
        example = self._format.parse(row.where, fields)
        if self._supervise_all and isinstance(example, Conversation) and example.zero_weight:
            what = "a turn has the weight 0, but with data.loss_on: all every token is supervised"
            raise RowError(what, "set data.loss_on to assistant")
        return example

    def _check_no_preference(self, fields: Mapping[str, Any]) -> None:
        in_file = f"in a file of the format {self.format_name}"
        if fields.keys() >= set(SIDES):
            what = f"`chosen` and `rejected` are a pair of answers, {in_file}"
            raise RowError(what, "give all rows of a file one format, which its first row decides")
        if label := label_field(fields):
            what = f"`{label}` says whether the answer is desirable, {in_file}"
            fix = "give the first row that field too, or, if it means something else, set data.format to "
            raise RowError(what, f"{fix}{self.format_name}")


def _contradictions(format: Format, section: DataSection, where: str) -> Iterator[Problem]:
    """Settings that do not apply to rows of this format."""
    fields = (*format.keys, *format.optional)
    if unused := sorted(set(section.columns) - set(fields)):
        what = f"`{unused[0]}` is not read from rows of the format {format.name}, which has {', '.join(fields)}"
        yield Problem(Code.DATA_FORMAT, what, where, "data.columns", f"remove `{unused[0]}`")
    if format.name in CHAT_FORMATS:
        return
    if section.chat_template:
        what = f"the rows are {format.name}, which use no chat template"
        yield Problem(Code.DATA_FORMAT, what, where, "data.chat_template", "remove the setting")
    if section.loss_on == "assistant":
        what = f"the rows are {format.name}, which have no assistant turns"
        yield Problem(Code.DATA_FORMAT, what, where, "data.loss_on", "set it to completion or all")


@dataclass(frozen=True)
class Question:
    """What a row asks.

    Attributes:
        prompt: Plain text, or messages for the chat template.
        tools: Schemas for the chat template.
    """

    prompt: str | list[Message]
    tools: tuple[Any, ...] = ()


_QUESTIONS = ("prompt", "messages", "conversations", "instruction", "text")
"""Fields that may hold what a row asks."""


def parse_question(row: Row, section: DataSection) -> Question:
    """What a row asks: its `prompt`, its `messages` or `conversations` up to the last answer, its `instruction` with
    input, system and history, or its `text`.

    Where a row has several of these, the format that training would recognise decides; without one, the first of them.

    Raises:
        DataError: The row has none of them, or they hold something else.
    """
    fields = _rename(row.values, {ours: theirs for ours, theirs in section.columns.items() if theirs in row.values})
    names = [
        format.keys[0]
        for format in FORMATS
        if fields.keys() >= set(format.keys)
        and section.format in ("auto", format.name)
        and format.name not in PREFERENCE_FORMATS
    ]
    is_recognised = len(names) == 1 and names[0] in _QUESTIONS and (section.format != "auto" or names[0] != "text")
    name = names[0] if is_recognised else next((name for name in _QUESTIONS if name in fields), "")
    try:
        return _question(fields, name, row)
    except RowError as error:
        fix = "give a prompt, messages, conversations, an instruction or text"
        raise DataError(Problem(Code.DATA_FIELD, str(error), row.where, fix=fix)) from None


def _question(fields: Mapping[str, Any], name: str, row: Row) -> Question:
    if not name:
        raise RowError(f"the row has no prompt; its fields are {quote(row.values)}")
    tools = parse_tools(fields)
    if name == "text" or (name == "prompt" and not isinstance(messages_or_text(fields, name), list)):
        return Question(text(fields, name), tools)
    turns = parse_turns(fields, name) if name == "prompt" else prompt_turns(fields, name)
    if name in ("messages", "conversations") and turns[-1].message["role"] == "assistant":
        turns = turns[:-1]
    if not turns:
        raise RowError("no message comes before the answer")
    return Question([turn.message for turn in turns], tools)


def _rename(fields: Fields, columns: Mapping[str, str]) -> Fields:
    """The fields under loratune's names.

    Args:
        fields: Under the names of the data.
        columns: loratune's name → the data's name. It wins over a field that has loratune's name by chance.
    """
    if not columns:
        return fields
    replaced = {*columns.values(), *columns}
    others = {name: value for name, value in fields.items() if name not in replaced}
    return others | {ours: fields[theirs] for ours, theirs in columns.items() if theirs in fields}
