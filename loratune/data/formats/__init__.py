"""Reading rows: the fields of a file's first row → one of the usual formats (`recognition`) → every row an Example."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loratune.codes import Code
from loratune.config import DataSection
from loratune.data.formats import chats, preferences
from loratune.data.formats.examples import (
    Conversation,
    Example,
    Fields,
    Ids,
    Message,
    Plain,
    Preference,
    PreferencePair,
    RowError,
    Single,
    UnpairedPreference,
    check_ids,
    messages_or_text,
    quote,
    sides,
    text,
)
from loratune.data.formats.keys import completion_key, content_key, group_key, prompt_key
from loratune.data.formats.recognition import (
    CHAT_FORMATS,
    COMPARED_FORMATS,
    FORMATS,
    JUDGED,
    OPTIONAL_FIELDS,
    PAIRS,
    UNPAIRED_PROMPTS,
    Format,
    chosen_columns,
    recognise,
    unpaired_format,
    verdict,
)
from loratune.data.sources import Row
from loratune.errors import DataError, Problem

__all__ = [
    "CHAT_FORMATS", "COMPARED_FORMATS", "FORMATS", "JUDGED", "PAIRS", "Conversation", "Example", "Ids", "Message",
    "Parser", "Plain", "Preference", "PreferencePair", "Question", "RowError", "Single", "UnpairedPreference",
    "check_ids", "completion_key", "content_key", "group_key", "parse_question", "prompt_key", "sides",
]  # fmt: skip


class Parser:
    """Makes examples of the rows of one file.

    Attributes:
        format_name: The format of the rows.
        identity: An id of this way of reading rows, which differs from all others.
        without_label: The format of the first row without the label beside its answer, whatever that means; empty
            where there is none.
        unread_label: A field of the first row that may say whether its answer is desirable, and is not read.
        fields: The fields of the first row, under the names of the data.
        chosen_alone: What `data.columns` has to be so that the chosen answers of pairs are trained on alone; empty
            where no columns do that.
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
        self.identity = (self.format_name, *self._format.keys)
        self._known = {*self._format.keys, *self._format.optional}
        self._is_compared = self.format_name in COMPARED_FORMATS
        self.chosen_alone = chosen_columns(fields) if fields.keys() >= {"chosen", "rejected"} else ""
        judged = unpaired_format(fields)
        self.without_label = next(one.name for one in FORMATS if one.keys == judged.keys[:-1]) if judged else ""
        self.unread_label = ""
        if judged and self._is_recognised and not self._is_compared:
            label = judged.keys[-1]
            means_something_else = preferences.read_label(fields[label]) is None and fields[label] is not None
            self.unread_label = "" if means_something_else else label
        self._may_be_unpaired = (
            self._is_recognised and self._format.keys[0] in UNPAIRED_PROMPTS and not self._is_compared
        )
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
            raise DataError(Problem(Code.DATA_COLUMN_MISSING, what, first.where, "data.columns", fix))

    def __call__(self, row: Row) -> Example:
        """The row as an example.

        Raises:
            RowError: It lacks a field, or holds something that the format does not allow.
        """
        fields = _rename(row.values, self._columns) if self._columns else row.values
        if self._is_recognised and not self._is_compared and "chosen" in fields and "rejected" in fields:
            what = f"`chosen` and `rejected` are a pair of answers, in a file of the format {self.format_name}"
            raise RowError(
                Code.DATA_PREFERENCES, what, "give all rows of a file one format, which its first row decides"
            )
        if self._may_be_unpaired and (label := verdict(fields)):
            what = f"`{label}` says whether the answer is desirable, in a file of the format {self.format_name}"
            fix = "give the first row that field too, or, if it means something else, set data.format to "
            raise RowError(Code.DATA_PREFERENCES, what, f"{fix}{self.format_name}")
        for name in self._format.keys:
            if name not in fields:
                absent = quote(self._columns.get(name, name) for name in self._format.keys if name not in fields)
                what = f"no field {absent} for the format {self.format_name}; its fields are {quote(row.values)}"
                chosen_by = "its first row" if self._is_recognised else "data.format"
                fix = f"give all rows of a file one format, which {chosen_by} decides"
                raise RowError(Code.DATA_FIELD_MISSING, what, fix)
        if not fields.keys() <= self._known:
            self.unused_fields |= fields.keys() - self._known - self._grouped_by
        example = self._format.parse(row.where, fields)
        if self._supervise_all and isinstance(example, Conversation) and example.zero_weight:
            what = "a turn has the weight 0, but with data.loss_on: all every token is supervised"
            raise RowError(Code.DATA_WEIGHT, what, "set data.loss_on to assistant")
        return example


def _contradictions(format: Format, section: DataSection, where: str) -> Iterator[Problem]:
    """Settings that do not apply to rows of this format."""
    fields = (*format.keys, *format.optional)
    if unused := sorted(set(section.columns) - set(fields)):
        what = f"`{unused[0]}` is not read from rows of the format {format.name}, which has {', '.join(fields)}"
        yield Problem(Code.DATA_COLUMN_UNUSED, what, where, "data.columns", f"remove `{unused[0]}`")
    if format.name in CHAT_FORMATS:
        return
    if section.chat_template:
        what = f"the rows are {format.name}, which use no chat template"
        yield Problem(Code.DATA_NOT_CHAT, what, where, "data.chat_template", "remove the setting")
    if section.loss_on == "assistant":
        what = f"the rows are {format.name}, which have no assistant turns"
        yield Problem(Code.DATA_NOT_CHAT, what, where, "data.loss_on", "set it to completion or all")


@dataclass(frozen=True)
class Question:
    """What a row asks.

    Attributes:
        prompt: Plain text, or messages for the chat template.
        tools: Schemas for the chat template.
    """

    prompt: str | list[Message]
    tools: tuple[Any, ...] = ()


_QUESTIONS: dict[str, Callable[[Fields], list[Message]]] = {
    "prompt": chats.two_lists_question,
    "messages": chats.messages_question,
    "conversations": chats.sharegpt_question,
    "instruction": chats.alpaca_question,
}
"""The field that holds a question → how its messages are read."""


def parse_question(row: Row, section: DataSection) -> Question:
    """What a row asks: its `prompt`, its `messages` or `conversations` up to the last answer, its `instruction` with
    input, system and history, or its `text`.

    Where a row has several of these, the format that training would recognise decides; without one, the first of them.

    Raises:
        DataError: The row has none of them, or they hold something else.
    """
    columns = {ours: theirs for ours, theirs in section.columns.items() if theirs in row.values}
    fields = _rename(row.values, columns)
    candidates = [
        format
        for format in FORMATS
        if fields.keys() >= set(format.keys)
        and section.format in ("auto", format.name)
        and format.name not in COMPARED_FORMATS
    ]
    is_recognised = len(candidates) == 1 and (section.format != "auto" or candidates[0].name != "text")
    first = (candidates[0].keys[0],) if is_recognised and candidates[0].name != "input_ids" else ()
    name = next((name for name in (*first, *_QUESTIONS, "text") if name in fields), None)
    try:
        if name is None:
            raise RowError(Code.DATA_NO_QUESTION, f"the row has no prompt; its fields are {quote(row.values)}")
        if name == "text" or (name == "prompt" and not isinstance(messages_or_text(fields, name), list)):
            return Question(text(fields, name), chats.parse_tools(fields))
        return Question(_QUESTIONS[name](fields), chats.parse_tools(fields))
    except RowError as error:
        fix = "give a prompt, messages, conversations, an instruction or text"
        raise DataError(Problem(error.code, str(error), row.where, fix=fix)) from None


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
