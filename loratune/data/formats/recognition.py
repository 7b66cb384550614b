"""The formats of rows, and detection of the format of a file from its first row.

A new format is one entry in `FORMATS`: its name, the fields that identify it, the function that turns the fields of a
row into an Example, and the further fields that it reads.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from loratune.codes import Code
from loratune.config import DataSection
from loratune.config.sections import MOST_WEIGHT, UNLABELLED, WEIGHT
from loratune.config.template_arguments import FIELD
from loratune.data import formats
from loratune.data.formats import (
    PAIRS,
    UNPAIRED,
    Conversation,
    Example,
    Fields,
    Plain,
    Preference,
    RowError,
    parsers,
    reasoning,
)
from loratune.data.sources.rows import Row
from loratune.errors import DataError, Problem


@dataclass(frozen=True)
class Format:
    """A format of rows.

    Attributes:
        name: As `data.format` names it.
        keys: Required fields, which identify the format.
        parse: Function of the place and the fields of a row that returns an example. Raises RowError.
        optional: Optional fields.
    """

    name: str
    keys: tuple[str, ...]
    parse: Callable[[str, Fields], Example]
    optional: tuple[str, ...] = ()


_CHAT, _ALPACA = ("tools", "system", FIELD), ("input", "system", "history", "tools", FIELD)
_LABELS = ("label", "kto_tag")
"""Fields that may hold whether an answer is desirable; LLaMA-Factory's `kto_tag` has no other meaning."""
_UNPAIRED_ANSWERS = {
    "prompt": "completion", "instruction": "output", "messages": "messages", "conversations": "conversations",
}  # fmt: skip
"""Field with the prompt of an unpaired preference → the field of its answer."""
_QUESTION_NAMES = ("question", "query", "instruction", "input", "problem", "user_prompt")
"""Names of fields, in lower case, that usually hold a prompt."""


def _pair_of_messages(prompt: str, optional: tuple[str, ...] = _CHAT) -> Format:
    keys = ("chosen", "rejected") if prompt == "prompt" else ("chosen", "rejected", prompt)
    return Format("preference_messages", keys, partial(parsers.parse_pair_of_messages, prompt), optional)


def _unpaired_messages(prompt: str, label: str = "label") -> Format:
    answer, name = _UNPAIRED_ANSWERS[prompt], "unpaired_preference_messages"
    parse = partial(parsers.parse_unpaired_messages, prompt, answer, label)
    more = ("input", "history") if prompt == "instruction" else ()
    return Format(name, tuple(dict.fromkeys((prompt, answer, label))), parse, (*_CHAT, *more))


def _unpaired_texts(label: str = "label") -> Format:
    return Format("unpaired_preference", ("prompt", "completion", label), partial(parsers.parse_unpaired, label))


FORMATS = (
    Format("input_ids", ("input_ids",), formats.parse_ids, ("labels",)),
    Format("prompt_completion", ("prompt", "completion"), parsers.parse_prompt_completion),
    Format("messages", ("messages",), partial(parsers.parse_conversation, "messages"), _CHAT),
    Format("conversations", ("conversations",), partial(parsers.parse_conversation, "conversations"), _CHAT),
    Format("alpaca", ("instruction", "output"), parsers.parse_alpaca, _ALPACA),
    Format("text", ("text",), parsers.parse_text),
    Format("preference", ("chosen", "rejected"), parsers.parse_pair, ("prompt",)),
    _unpaired_texts(),
)
_BY_NAME = {format.name: format for format in FORMATS}

OPTIONAL_FIELDS = frozenset(name for format in FORMATS for name in format.optional) - {
    name for format in FORMATS for name in format.keys
}
"""Fields that are optional in some format and required in none."""

_TWO_LISTS = Format("messages", ("prompt", "completion"), parsers.parse_two_lists, ("tools", FIELD))
"""Conversations in two lists of messages; the second is supervised."""

CHAT_FORMATS = frozenset({"messages", "conversations", "alpaca", "preference_messages", "unpaired_preference_messages"})
"""The formats whose rows go through the chat template."""

PREFERENCE_FORMATS = {
    f"{name}{suffix}": kind
    for name, kind in (("preference", PAIRS), ("unpaired_preference", UNPAIRED))
    for suffix in ("", "_messages")
}
"""Format of preference data → the kind of its rows."""


def recognise(where: str, fields: Fields, section: DataSection) -> Format:
    """The format of a row, by its fields or as set in the section. Raises DataError: no format fits, or several do."""
    name, keys = section.format, fields.keys()
    if name == "preference" or (name == "auto" and keys >= set(parsers.SIDES)):
        return _pair_format(where, fields, section)
    if name == "unpaired_preference" or (name == "auto" and label_field(fields)):
        if found := _unpaired_format(fields):
            return found
        if name != "auto":
            return _unpaired_messages("prompt") if _holds_messages(fields) else _BY_NAME[name]
    if keys >= set(_TWO_LISTS.keys) and (
        (name == "messages" and "messages" not in keys)
        or (name == "prompt_completion" and isinstance(fields["prompt"], list))
    ):
        return _TWO_LISTS
    if name != "auto":
        return _BY_NAME[name]
    candidates = [format for format in FORMATS if keys >= set(format.keys) and format.name not in PREFERENCE_FORMATS]
    if len(candidates) == 1:
        lists = candidates[0].keys == _TWO_LISTS.keys and isinstance(formats.messages_or_text(fields, "prompt"), list)
        return _TWO_LISTS if lists else candidates[0]
    names = ", ".join(format.name for format in candidates or FORMATS)
    if candidates:
        what, fix = f"the fields {formats.quote(keys)} fit more than one format", f"set data.format to one of {names}"
        raise DataError(Problem(Code.DATA_FORMAT, what, where, "data.format", fix))
    what = f"the fields {formats.quote(keys)} fit no format"
    fix = f"set data.format to one of {names}, and data.columns to map its fields to yours"
    raise DataError(Problem(Code.DATA_FORMAT, what, where, fix=fix))


def label_field(fields: Fields) -> str:
    """The field that must be a desirability label; empty if there is no answer with such a field.

    0 and 1 in `label`, and words other than true and false, are ambiguous, as they may be classes.
    """

    def is_verdict(name: str, value: Any) -> bool:
        is_word = isinstance(value, bool) or str(value).strip().lower() in ("true", "false")
        return parsers.read_label(value) is not None and (is_word or name == "kto_tag")

    return next((name for name in _LABELS if is_verdict(name, fields.get(name))), "") if _prompt_of(fields) else ""


def unread_label(fields: Fields) -> str:
    """The field of a row with an answer that may be a desirability label or a class; empty if there is none."""
    found = (name for name in _LABELS if name in fields)
    may_be = (name for name in found if fields[name] is None or parsers.read_label(fields[name]) is not None)
    return next(may_be, "") if _prompt_of(fields) else ""


def _prompt_of(fields: Fields) -> str:
    """The field with the prompt of an answer that may have a label; empty if there is none."""
    return next((name for name, answer in _UNPAIRED_ANSWERS.items() if {name, answer} <= fields.keys()), "")


def _unpaired_format(fields: Fields) -> Format | None:
    """The format of an unpaired preference; None if the row is not one."""
    label = label_field(fields) or next((name for name in _LABELS if name in fields), "")
    prompt = _prompt_of(fields)
    if not (label and prompt):
        return None
    is_text = prompt == "prompt" and not _holds_messages(fields)
    return _unpaired_texts(label) if is_text else _unpaired_messages(prompt, label)


def _pair_format(where: str, fields: Fields, section: DataSection) -> Format:
    """The format of a preference pair, whose prompt may be in another field than `prompt`, as in LLaMA-Factory's rows.

    Further fields next to two whole conversations are copies: UltraFeedback's `messages` equal `chosen`.

    Raises:
        DataError: The prompt is missing, but a field that is not read seems to hold it, by its name.
    """
    answers = [formats.messages_or_text(fields, name) for name in parsers.SIDES]
    if fields.get("prompt") is None and all(map(_is_answer_alone, answers)):
        for name, optional in (("instruction", _ALPACA), ("messages", _CHAT), ("conversations", _CHAT)):
            if fields.get(name):
                return _pair_of_messages(name, optional)
        unread = (name for name, value in fields.items() if _is_question(name, value, answers[0]))
        if section.format == "auto" and (name := next(unread, "")):
            what = f"`chosen` and `rejected` have no `prompt` beside them, and {formats.quote([name])} is not read"
            fix = f"set data.columns to {{instruction: {name}}} for the chat template, or {{prompt: {name}}}"
            fix += " to join texts; or data.format to preference, if the answers begin with what they answer"
            raise DataError(Problem(Code.DATA_FORMAT, what, where, "data.columns", fix))
    return _pair_of_messages("prompt", ("prompt", *_CHAT)) if _holds_messages(fields) else _BY_NAME["preference"]


def _holds_messages(fields: Fields) -> bool:
    """Whether the prompt or an answer of a row consists of messages."""
    values = (formats.messages_or_text(fields, name) for name in ("prompt", *parsers.SIDES, "completion"))
    return any(isinstance(value, list | Mapping) for value in values)


def _is_answer_alone(value: Any) -> bool:
    """Whether a value can be a bare answer, rather than a whole conversation with a prompt."""
    if isinstance(value, str):
        return not value.startswith("\n\nHuman:")  # as whole dialogues of HH-RLHF do
    first = value[0] if isinstance(value, list) and value else value
    role = first.get("from", first.get("role")) if isinstance(first, Mapping) else None
    return isinstance(role, str) and parsers.ROLES.get(role) == "assistant"


def _is_question(name: str, value: Any, chosen: Any) -> bool:
    """Whether a field holds the prompt, by its name, and the chosen answer does not contain it."""
    if name.lower() not in _QUESTION_NAMES or not isinstance(value, str) or not value.strip():
        return False
    return not (isinstance(chosen, str) and value.strip() in chosen)


# Rows


class Parser:
    """Converts the rows of one file to examples.

    Attributes:
        format_name: The format of the rows.
        identity: Identifies this way of parsing rows, for cache keys.
        unread_label: A field of the first row that may be a desirability label, and is not read.
        fields: The fields of the first row, under the names of the data.
        unused_fields: Fields seen so far that neither the format nor `group_by` reads.
        unseen_labels: Answers in `data.labels` that no row has had so far.
    """

    def __init__(self, first: Row, section: DataSection):
        """Detect the format of a file from its first row, or use the one set in the section.

        Raises:
            DataError: No format fits, or more than one; `columns` maps a field that the row lacks or the format does
                not read; a chat template, or a loss on assistant turns, is set for rows that are not conversations.
        """
        self._columns, self._is_recognised = dict(section.columns), section.format == "auto"
        self._drops_reasoning = section.reasoning == "drop"
        self._counts_all = "data.loss_on: all" if section.loss_on == "all" else ""
        if section.prompt_loss_weight:
            self._counts_all = f"data.prompt_loss_weight: {section.prompt_loss_weight:g}"
        self._check_columns(first)
        fields = rename(first.values, self._columns)
        self._format = recognise(first.where, fields, section)
        self.format_name = self._format.name
        self._may_be_preference = self._is_recognised and self.format_name not in PREFERENCE_FORMATS
        self.unread_label = unread_label(fields) if self._may_be_preference else ""
        self._labels, self.unseen_labels = section.labels, {*section.labels}
        self.identity = (self.format_name, *self._format.keys, *map(json.dumps, sorted(self._labels.items())))
        self._known = {*self._format.keys, *self._format.optional, *({WEIGHT} & self._columns.keys())}
        self.fields = tuple(first.values)
        self._grouped_by = {section.group_by}
        self.unused_fields: set[str] = set()
        if problems := list(_contradictions(self._format, section, first.where)):
            raise DataError(problems)

    def _check_columns(self, first: Row) -> None:
        absent = {ours: theirs for ours, theirs in self._columns.items() if theirs not in first.values}
        if absent:
            what = f"no field {formats.quote(absent.values())}; the fields are {formats.quote(first.values)}"
            fix = "set columns that all files of train and validation have"
            if OPTIONAL_FIELDS.issuperset(absent):
                fix = "where only some rows have it, put it into the first row too, as null"
            raise DataError(Problem(Code.DATA_FORMAT, what, first.where, "data.columns", fix))

    def __call__(self, row: Row) -> Example:
        """The row as an example.

        Raises:
            RowError: The row lacks a field, or holds something that the format does not allow.
        """
        fields = rename(row.values, self._columns)
        if self._may_be_preference:
            self._check_no_preference(fields)
        if absent := [name for name in self._format.keys if name not in fields]:
            names = formats.quote(self._columns.get(name, name) for name in absent)
            what = f"no field {names} for the format {self.format_name}; its fields are {formats.quote(row.values)}"
            chosen_by = "its first row" if self._is_recognised else "data.format"
            raise RowError(what, f"give all rows of a file one format, which {chosen_by} decides")
        if not fields.keys() <= self._known:
            self.unused_fields |= fields.keys() - self._known - self._grouped_by
        example = self._format.parse(row.where, fields)
        if self._drops_reasoning:
            example = reasoning.dropped(example)
        if self._labels:
            example = self._labelled(example)
        if self._counts_all and isinstance(example, Conversation) and example.zero_weight:
            what = f"a turn has the weight 0, but with {self._counts_all} every token counts"
            raise RowError(what, f"leave out {self._counts_all.partition(':')[0]}")
        if WEIGHT in self._columns:
            return self._weighted(example, fields)
        return example

    def _labelled(self, example: Example) -> Example:
        """The example with the answer that `data.labels` gives it. White space around the answer stays, unless it is
        a part of the entry."""
        if isinstance(example, Plain):
            return replace(example, completion=self._label(example.completion))
        if not isinstance(example, Conversation):
            return example
        messages = [*example.messages]
        for number in reversed(range(len(messages))):
            if (last := messages[number])["role"] == "assistant":
                messages[number] = last | {"content": self._label(last["content"])}
                break
        return replace(example, messages=tuple(messages))

    def _label(self, answer: str) -> str:
        name = answer if answer in self._labels else answer.strip()
        self.unseen_labels.discard(name)
        return answer.replace(name, self._labels[name]) if name in self._labels else answer

    def _weighted(self, example: Example, fields: Mapping[str, Any]) -> Example:
        """The example with the weight of its row. Raises RowError: it has none, or none that can be used."""
        name, weight = self._columns[WEIGHT], fields.get(WEIGHT)
        if isinstance(example, Preference):
            raise RowError(f"`{name}` is a weight, which preferences do not have", f"remove {WEIGHT} from data.columns")
        value = math.nan
        if isinstance(weight, int | float | str) and not isinstance(weight, bool):  # a cell of CSV is text
            with suppress(ValueError, OverflowError):
                value = float(weight)
        if not 0 <= value <= MOST_WEIGHT:
            raise RowError(f"`{name}` is {weight!r:.40}, not a weight from 0 to {MOST_WEIGHT:,}")
        return replace(example, weight=value)

    def _check_no_preference(self, fields: Mapping[str, Any]) -> None:
        in_file = f"in a file of the format {self.format_name}"
        if fields.keys() >= set(parsers.SIDES):
            what = f"`chosen` and `rejected` are a pair of answers, {in_file}"
            raise RowError(what, "give all rows of a file one format, which its first row decides")
        if label := label_field(fields):
            what = f"`{label}` says whether the answer is desirable, {in_file}"
            fix = "give the first row that field too, or, if it means something else, set data.format to "
            raise RowError(what, f"{fix}{self.format_name}")


def _contradictions(format: Format, section: DataSection, where: str) -> Iterator[Problem]:
    """Settings that do not apply to rows of this format."""
    fields = (*format.keys, *format.optional)
    if unused := sorted(set(section.columns) - {*fields, WEIGHT}):
        what = f"`{unused[0]}` is not read from rows of the format {format.name}, which has {', '.join(fields)}"
        yield Problem(Code.DATA_FORMAT, what, where, "data.columns", f"remove `{unused[0]}`")
    if section.labels and (format.name in UNLABELLED or format.name in PREFERENCE_FORMATS):
        what = f"the rows are {format.name}, which have no answers that are labels"
        yield Problem(Code.DATA_FORMAT, what, where, "data.labels", "remove the setting")
    if format.name in CHAT_FORMATS:
        return
    settings = {"chat_template": section.chat_template, FIELD: section.chat_template_kwargs}
    keys = [key for key, value in settings.items() if value] + ["reasoning"] * (section.reasoning != "train")
    for key in keys:
        what = f"the rows are {format.name}, which use no chat template"
        yield Problem(Code.DATA_FORMAT, what, where, f"data.{key}", "remove the setting")
    if section.loss_on == "assistant":
        what = f"the rows are {format.name}, which have no assistant turns"
        yield Problem(Code.DATA_FORMAT, what, where, "data.loss_on", "set it to completion or all")


def rename(fields: Fields, columns: Mapping[str, str]) -> Fields:
    """The fields under loratune's names.

    Args:
        fields: Under the names of the data.
        columns: loratune's name → the data's name. It takes precedence over a field that has loratune's name by chance.
    """
    if not columns:
        return fields
    replaced = {*columns.values(), *columns}
    others = {name: value for name, value in fields.items() if name not in replaced}
    return others | {ours: fields[theirs] for ours, theirs in columns.items() if theirs in fields}
