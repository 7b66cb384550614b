"""Recognising rows: the keys of a file's first row → one of the formats of the field → every row an Example.

A new format is one entry in `FORMATS`: its name, the keys it is known by, how its row becomes an Example, and the
further keys that it reads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loratune.config import DataSection
from loratune.data.formats import chats, plain
from loratune.data.formats.checks import RowError, Values, listed, text
from loratune.data.formats.examples import Conversation, Example, Ids, Message, Plain, check_ids, key
from loratune.data.formats.tools import schemas
from loratune.data.sources import Row
from loratune.errors import DataError, Problem

__all__ = [
    "CHATS",
    "FORMATS",
    "Conversation",
    "Example",
    "Ids",
    "Message",
    "Parser",
    "Plain",
    "Question",
    "RowError",
    "check_ids",
    "key",
    "parse_question",
]  # fmt: skip


@dataclass(frozen=True)
class Format:
    """One format: the keys a row must have, how it is read from its place and values, and the keys it may have."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[str, Values], Example]
    optional: tuple[str, ...] = ()


FORMATS = (
    Format("input_ids", ("input_ids",), plain.token_ids, ("labels",)),
    Format("prompt_completion", ("prompt", "completion"), plain.prompt_completion),
    Format("messages", ("messages",), chats.one_list, ("tools", "system")),
    Format("conversations", ("conversations",), chats.sharegpt, ("tools", "system")),
    Format("alpaca", ("instruction", "output"), chats.alpaca, ("input", "system", "history", "tools")),
    Format("text", ("text",), plain.whole_text),
)

OPTIONAL = frozenset(key for form in FORMATS for key in form.optional)
"""Fields that no format asks for."""

TWO_LISTS = Format("messages", ("prompt", "completion"), chats.two_lists, ("tools",))
"""Conversations too, but in two lists: what is given and what is learnt."""

CHATS = frozenset({"messages", "conversations", "alpaca"})
"""The formats whose rows go through the chat template."""


_COMPARED = "`chosen` and `rejected` are preference data, and training here compares no answers"


class Parser:
    """Makes examples of the rows of one file. form: the name of their format; reads: what tells it from all others.

    unread: the fields of the rows so far that the format does not read.
    """

    def __init__(self, first: Row, section: DataSection):
        """Recognise the format of a file by its first row, or take the one that the section names.

        Raises DataError: no format fits, or more than one; preferences; `columns` maps a field that the row lacks or
        the format does not read; a template, or a loss on assistant turns, for rows that are no conversations.
        """
        self._columns, self._recognised = dict(section.columns), section.format == "auto"
        self._chosen_by = "of its first row" if self._recognised else "that data.format names"
        self._learn_all = section.loss_on == "all"
        if absent := {ours: theirs for ours, theirs in self._columns.items() if theirs not in first.values}:
            what = f"no field {listed(absent.values())}; the fields are {listed(first.values)}"
            fix = "it holds for all files of train and validation"
            if OPTIONAL.issuperset(absent):
                fix = "where only some rows have it, put it into the first one too, as null"
            raise DataError(Problem(what, first.where, "data.columns", fix))
        values = _renamed(first.values, self._columns)
        self._format = _recognised(first.where, values, section)
        self.form = self._format.name
        self.reads = (self.form, *self._format.keys)
        self._known = {*self._format.keys, *self._format.optional}
        self.unread: set[str] = set()
        if problems := list(_contradictions(self._format, section, first.where)):
            raise DataError(problems)

    def __call__(self, row: Row) -> Example:
        """The row as an example.

        Raises RowError: it lacks a key, or holds something else than the format asks for.
        """
        values = _renamed(row.values, self._columns) if self._columns else row.values
        if self._recognised and "chosen" in values and "rejected" in values:
            raise RowError(_COMPARED, _chosen_alone(values))
        for name in self._format.keys:
            if name not in values:
                absent = listed(self._columns.get(name, name) for name in self._format.keys if name not in values)
                what = f"no field {absent} for the format {self.form}; its fields are {listed(row.values)}"
                raise RowError(what, f"all rows of a file have the format {self._chosen_by}")
        if not values.keys() <= self._known:
            self.unread |= values.keys() - self._known
        example = self._format.read(row.where, values)
        if self._learn_all and isinstance(example, Conversation) and example.zero_weight:
            raise RowError("a turn has weight 0, and data.loss_on: all learns every token", "set loss_on to assistant")
        return example


def _recognised(where: str, values: Values, section: DataSection) -> Format:
    keys = set(values)
    pair = keys.issuperset(TWO_LISTS.keys)
    if section.format == "messages" and pair and "messages" not in keys:
        return TWO_LISTS
    if section.format == "prompt_completion" and pair and isinstance(values["prompt"], list):
        return TWO_LISTS
    if section.format != "auto":
        return next(form for form in FORMATS if form.name == section.format)
    if {"chosen", "rejected"} <= keys:
        raise DataError(Problem(_COMPARED, where, fix=_chosen_alone(values)))
    if pair and isinstance(values.get("label"), bool):
        what = "`label` is true or false beside a completion: preference data, of which the false ones would be learnt"
        raise DataError(Problem(what, where, fix="keep the rows that are true, and set data.format"))
    fitting = [form for form in FORMATS if keys.issuperset(form.keys)]
    if len(fitting) == 1:
        lists = fitting[0].keys == TWO_LISTS.keys and isinstance(values["prompt"], list)
        return TWO_LISTS if lists else fitting[0]
    names = ", ".join(form.name for form in fitting or FORMATS)
    what = f"the keys {listed(keys)} fit {'more than one format' if fitting else 'no format'}"
    fix = f"set data.format to one of {names}" + ("" if fitting else ", and data.columns to map its keys to yours")
    raise DataError(Problem(what, where, fix=fix))


def _chosen_alone(values: Values) -> str:
    """What to do about pairs of answers, which are learnt by comparing them: another kind of training."""
    lists = isinstance(values["chosen"], list)
    prompt = values.get("prompt")
    apart = isinstance(prompt, list) if lists else "prompt" in values
    ours = "completion" if apart else "messages" if lists else "text"
    return f"to learn the chosen ones alone, set data.columns to {{{ours}: chosen}}"


def _contradictions(form: Format, section: DataSection, where: str) -> list[Problem]:
    """Settings that do not go with rows of this format."""
    problems = []
    read = (*form.keys, *form.optional)
    if unused := sorted(set(section.columns) - set(read)):
        what = f"`{unused[0]}` is not read from rows of the format {form.name}, which has {', '.join(read)}"
        problems.append(Problem(what, where, "data.columns", "leave it out"))
    if section.chat_template and form.name not in CHATS:
        what = f"the rows are {form.name}, which go through no chat template"
        problems.append(Problem(what, where, "data.chat_template", "leave it out"))
    if section.loss_on == "assistant" and form.name not in CHATS:
        what = f"the rows are {form.name}, which have no assistant turns"
        problems.append(Problem(what, where, "data.loss_on", "set it to completion or all"))
    return problems


@dataclass(frozen=True)
class Question:
    """What a row asks. prompt: raw text, or messages for the chat template, which is given the tools."""

    prompt: str | list[Message]
    tools: tuple[Any, ...] = ()


QUESTIONS: dict[str, Callable[[Values], list[Message]]] = {
    "prompt": chats.asked_two_lists,
    "messages": chats.asked_one_list,
    "conversations": chats.asked_sharegpt,
    "instruction": chats.asked_alpaca,
}
"""The field that asks → how its messages are read."""


def parse_question(row: Row, section: DataSection) -> Question:
    """What a row asks: its `prompt`, its `messages` or `conversations` up to the last answer, its `instruction` with
    input, system and history, or its `text`.

    Where it has several of these, the format that training would find counts, and without one the first of them.
    Raises DataError: the row has none of them, or they hold something else.
    """
    columns = {ours: theirs for ours, theirs in section.columns.items() if theirs in row.values}
    values = _renamed(row.values, columns)
    fitting = [form for form in FORMATS if values.keys() >= set(form.keys) and section.format in ("auto", form.name)]
    sure = len(fitting) == 1 and (section.format != "auto" or fitting[0].name != "text")
    known = (fitting[0].keys[0],) if sure and fitting[0].name != "input_ids" else ()
    name = next((name for name in (*known, *QUESTIONS, "text") if name in values), None)
    try:
        if name is None:
            raise RowError(f"nothing is asked; the fields are {listed(row.values)}")
        if name == "text" or (name == "prompt" and not isinstance(values["prompt"], list)):
            return Question(text(values, name), schemas(values))
        return Question(QUESTIONS[name](values), schemas(values))
    except RowError as error:
        fix = "give a prompt, messages, conversations, an instruction or text"
        raise DataError(Problem(str(error), row.where, fix=fix)) from None


def _renamed(values: Values, columns: Mapping[str, str]) -> Values:
    """The values under our names: `columns` maps ours to the data's, over a field that has our name by chance."""
    if not columns:
        return values
    taken = {*columns.values(), *columns}
    kept = {name: value for name, value in values.items() if name not in taken}
    return kept | {ours: values[theirs] for ours, theirs in columns.items() if theirs in values}
