"""Recognising rows: the fields of a file's first row → one of the usual formats → every row an Example.

A new format is one entry in `FORMATS`: its name, the fields it is known by, the function that turns the fields of a row
into an Example, and the further fields that it reads.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from loratune.codes import Code
from loratune.config import DataSection
from loratune.data.formats import chats, examples, preferences
from loratune.data.formats.examples import (
    AnswerPair,
    Conversation,
    Example,
    Fields,
    Ids,
    Judged,
    Message,
    Plain,
    RowError,
    Single,
    check_ids,
    messages_or_text,
    quote,
    sides,
    text,
)
from loratune.data.formats.keys import completion_key, content_key, group_key, prompt_key
from loratune.data.sources import Row
from loratune.errors import DataError, Problem

__all__ = [
    "CHAT_FORMATS",
    "FORMATS",
    "AnswerPair",
    "Conversation",
    "Example",
    "Ids",
    "Judged",
    "Message",
    "Parser",
    "Plain",
    "Question",
    "RowError",
    "Single",
    "check_ids",
    "completion_key",
    "content_key",
    "group_key",
    "parse_question",
    "prompt_key",
    "sides",
]  # fmt: skip


@dataclass(frozen=True)
class Format:
    """A format of rows.

    Attributes:
        name: As `data.format` names it.
        keys: Fields that a row must have, and by which the format is recognised.
        parse: Takes the place and the fields of a row. Raises RowError.
        optional: Further fields that are read.
    """

    name: str
    keys: tuple[str, ...]
    parse: Callable[[str, Fields], Example]
    optional: tuple[str, ...] = ()


FORMATS = (
    Format("input_ids", ("input_ids",), examples.parse_ids, ("labels",)),
    Format("prompt_completion", ("prompt", "completion"), examples.parse_prompt_completion),
    Format("messages", ("messages",), chats.parse_messages, ("tools", "system")),
    Format("conversations", ("conversations",), chats.parse_sharegpt, ("tools", "system")),
    Format("alpaca", ("instruction", "output"), chats.parse_alpaca, ("input", "system", "history", "tools")),
    Format("text", ("text",), examples.parse_text),
    Format("preference", ("chosen", "rejected"), preferences.parse_pair, ("prompt",)),
    Format("unpaired_preference", ("prompt", "completion", "label"), partial(preferences.parse_judged, "label")),
)

OPTIONAL_FIELDS = frozenset(name for format in FORMATS for name in format.optional) - {
    name for format in FORMATS for name in format.keys
}
"""Fields that some format reads and none needs."""

TWO_LISTS = Format("messages", ("prompt", "completion"), chats.parse_two_lists, ("tools",))
"""Conversations in two lists of messages, of which the second is supervised."""

OF_MESSAGES = {
    "preference": Format(
        "preference_messages", ("chosen", "rejected"), preferences.parse_pair_of_messages, ("prompt", "tools", "system")
    ),
    "unpaired_preference": Format(
        "unpaired_preference_messages", ("prompt", "completion", "label"),
        partial(preferences.parse_judged_messages, "label"), ("tools", "system"),
    ),
}  # fmt: skip
"""Format of answers that are compared → the same where they, or the prompt, are messages."""

_TO_TURNS = {
    name: Format(
        OF_MESSAGES["preference"].name, ("chosen", "rejected", name), partial(preferences.parse_pair_to_turns, name),
        ("tools", "system"),
    )
    for name in ("messages", "conversations")
}  # fmt: skip
QUESTIONED_PAIRS = {
    "instruction": Format(
        OF_MESSAGES["preference"].name, ("chosen", "rejected", "instruction"), preferences.parse_pair_to_instruction,
        ("input", "system", "history", "tools"),
    ),
    **_TO_TURNS,
}  # fmt: skip
"""Field that holds the prompt of a pair without `prompt`, as in LLaMA-Factory's rows → the format of the pair."""

_LABEL_FIELDS = ("label", preferences.KTO_TAG)
"""Fields that say whether an answer is a good one."""
_JUDGED: Mapping[str, tuple[str, Callable[[str, str, Fields], Judged], tuple[str, ...]]] = {
    "prompt": ("completion", preferences.parse_judged_messages, ()),
    "instruction": ("output", preferences.parse_judged_output, ("input", "history")),
    **{name: (name, partial(preferences.parse_judged_turns, name), ()) for name in ("messages", "conversations")},
}
"""Field with the prompt of an answer that is good or bad → the field of the answer, how both are read, and what beside
them."""

CHAT_FORMATS = frozenset({"messages", "conversations", "alpaca", *(format.name for format in OF_MESSAGES.values())})
"""The formats whose rows go through the chat template."""

PAIRS, JUDGED = "pairs of answers", "answers that are good or bad"
COMPARED_FORMATS = {
    format: kind
    for name, kind in (("preference", PAIRS), ("unpaired_preference", JUDGED))
    for format in (name, OF_MESSAGES[name].name)
}
"""Format of rows that hold answers to be compared → what they are."""


class Parser:
    """Makes examples of the rows of one file.

    Attributes:
        format_name: The format of the rows.
        identity: An id of this way of reading rows, which differs from all others.
        without_label: The format of the first row without the label beside its answer, whatever that means; empty
            where there is none.
        unread_label: A field of the first row that may say whether its answer is a good one, and is not read.
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
        self._format = _recognise(first.where, fields, section)
        self.format_name = self._format.name
        self.identity = (self.format_name, *self._format.keys)
        self._known = {*self._format.keys, *self._format.optional}
        self._is_compared = self.format_name in COMPARED_FORMATS
        self.chosen_alone = _chosen_columns(fields) if fields.keys() >= {"chosen", "rejected"} else ""
        judged = _judged_format(fields)
        self.without_label = next(one.name for one in FORMATS if one.keys == judged.keys[:-1]) if judged else ""
        self.unread_label = ""
        if judged and self._is_recognised and not self._is_compared:
            label = judged.keys[-1]
            means_something_else = preferences.read_label(fields[label]) is None and fields[label] is not None
            self.unread_label = "" if means_something_else else label
        self._may_be_judged = self._is_recognised and self._format.keys[0] in _JUDGED and not self._is_compared
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
        if self._may_be_judged and (label := _verdict(fields)):
            what = f"`{label}` says whether the answer is a good one, in a file of the format {self.format_name}"
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


def _recognise(where: str, fields: Fields, section: DataSection) -> Format:
    keys = set(fields)
    pair = keys.issuperset(TWO_LISTS.keys)
    if section.format == "messages" and pair and "messages" not in keys:
        return TWO_LISTS
    if section.format == "prompt_completion" and pair and isinstance(fields["prompt"], list):
        return TWO_LISTS
    if (name := _compared_format(fields, section)) is not None:
        if (
            name == "preference"
            and keys >= {"chosen", "rejected"}
            and (pair_format := _pair_format(where, fields, section))
        ):
            return pair_format
        if name == "unpaired_preference" and (judged := _judged_format(fields)) is not None:
            return judged
        plain = next(format for format in FORMATS if format.name == name)
        return OF_MESSAGES[name] if preferences.holds_messages(fields) else plain
    if section.format != "auto":
        return next(format for format in FORMATS if format.name == section.format)
    candidates = [format for format in FORMATS if keys.issuperset(format.keys) and format.name not in COMPARED_FORMATS]
    if len(candidates) == 1:
        lists = candidates[0].keys == TWO_LISTS.keys and isinstance(messages_or_text(fields, "prompt"), list)
        return TWO_LISTS if lists else candidates[0]
    names = ", ".join(format.name for format in candidates or FORMATS)
    if candidates:
        what, fix = f"the fields {quote(keys)} fit more than one format", f"set data.format to one of {names}"
        raise DataError(Problem(Code.DATA_FORMAT_AMBIGUOUS, what, where, fix=fix))
    what = f"the fields {quote(keys)} fit no format"
    fix = f"set data.format to one of {names}, and data.columns to map its fields to yours"
    raise DataError(Problem(Code.DATA_FORMAT_UNKNOWN, what, where, fix=fix))


def _compared_format(fields: Fields, section: DataSection) -> str | None:
    """The format of a row that holds answers to be compared; None of others.

    Fields of other formats beside `chosen` and `rejected` are copies: UltraFeedback's `messages` are those of `chosen`.
    A label that is neither true nor false may be a class.
    """
    if section.format != "auto":
        return section.format if section.format in OF_MESSAGES else None
    if fields.keys() >= {"chosen", "rejected"}:
        return "preference"
    return "unpaired_preference" if _verdict(fields) and _judged_format(fields) is not None else None


def _verdict(fields: Fields) -> str:
    """The field that can only mean whether an answer is a good one; empty where there is none."""
    return next((name for name in _LABEL_FIELDS if preferences.is_verdict(name, fields.get(name))), "")


def _judged_format(fields: Fields) -> Format | None:
    """The format of an answer with a label, whose field is the last of its keys; None where there is no such answer."""
    label = _verdict(fields) or next((name for name in _LABEL_FIELDS if name in fields), None)
    prompt = next((name for name, (answer, *_) in _JUDGED.items() if {name, answer} <= fields.keys()), None)
    if label is None or prompt is None:
        return None
    answer, parse, optional = _JUDGED[prompt]
    keys = tuple(dict.fromkeys((prompt, answer, label)))
    if prompt == "prompt" and not preferences.holds_messages(fields):
        return Format("unpaired_preference", keys, partial(preferences.parse_judged, label))
    return Format(OF_MESSAGES["unpaired_preference"].name, keys, partial(parse, label), ("tools", "system", *optional))


def _pair_format(where: str, fields: Fields, section: DataSection) -> Format | None:
    """The format of a pair whose prompt stands in another field than `prompt`; None where it stands there, or in the
    answers.

    Raises:
        DataError: The name of a field that is not read says that the prompt is there.
    """
    if fields.get("prompt") is not None or not preferences.are_answers_alone(fields):
        return None
    if (name := next((name for name in QUESTIONED_PAIRS if fields.get(name)), None)) is not None:
        return QUESTIONED_PAIRS[name]
    if section.format == "auto" and (name := preferences.unread_question(fields)) is not None:
        what = f"`chosen` and `rejected` have no `prompt` beside them, and {quote([name])} is not read"
        fix = f"set data.columns to {{instruction: {name}}} for the chat template, or {{prompt: {name}}} to join texts"
        fix += "; or data.format to preference, if the answers begin with what they answer"
        raise DataError(Problem(Code.DATA_NO_QUESTION, what, where, "data.columns", fix))
    return None


def _chosen_columns(fields: Fields) -> str:
    """What `data.columns` has to be so that the chosen answers of pairs are trained on alone; empty if nothing does."""
    chosen = messages_or_text(fields, "chosen")
    lists, is_text = isinstance(chosen, list), isinstance(chosen, str)
    if (
        fields.get("prompt") is None
        and preferences.are_answers_alone(fields)
        and not fields.keys().isdisjoint(_TO_TURNS)
    ):
        return ""
    if fields.get("prompt") is None and is_text and "instruction" in fields:
        return "{output: chosen}"
    has_prompt = isinstance(messages_or_text(fields, "prompt"), list) if lists else "prompt" in fields
    name = "completion" if has_prompt else "messages" if lists else "text"
    return f"{{{name}: chosen}}"


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
