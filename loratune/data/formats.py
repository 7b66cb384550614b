"""Recognising rows: the keys of a row → one of the formats of the field → an Example.

A new format is one entry in `FORMATS`: its name, the keys it is known by, and how its row becomes an Example.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from loratune.config import DataSection
from loratune.data.sources import MAX_PROBLEMS, Row
from loratune.errors import DataError, Problem

Message: TypeAlias = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SPOKEN = ("role", "content", "name")
"""The fields of a message that reach the chat template."""


@dataclass(frozen=True)
class Plain:
    """Text that is joined raw; `completion` and the end of sequence after it are learnt."""

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Messages for the chat template; assistant turns from number `first_learnt` on are learnt."""

    where: str
    messages: tuple[Message, ...]
    first_learnt: int = 0


Example: TypeAlias = Plain | Conversation


class BadRow(ValueError):
    """What is wrong with one row, without its place."""


@dataclass(frozen=True)
class Format:
    """One format: the keys a row must have, and how the row is read."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[Row], Example]


def _text(row: Row, key: str) -> str:
    value = row.values.get(key)
    if not isinstance(value, str):
        raise BadRow(f"`{key}` must be text, got {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"`{key}` holds a lone surrogate, which is not a character") from None
    return value


def _messages(row: Row, key: str) -> tuple[Message, ...]:
    value = row.values.get(key)
    if not isinstance(value, list) or not value:
        raise BadRow(f"`{key}` must be a list of messages, got {'an empty list' if value == [] else _kind(value)}")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise BadRow(f"message {number} of `{key}` must be an object with role and content")
        if message.get("role") not in ROLES:
            raise BadRow(
                f"message {number} of `{key}` has the role {message.get('role')!r}, not one of {', '.join(ROLES)}"
            )
        if extra := {field for field, value in message.items() if value is not None} - set(SPOKEN):
            raise BadRow(f"message {number} of `{key}` has {_listed(extra)}, which would be left out of training")
        _text(Row(row.where, dict(message)), "content")
    return tuple({field: message[field] for field in SPOKEN if message.get(field) is not None} for message in value)


def _prompt_completion(row: Row) -> Example:
    return Plain(row.where, _text(row, "prompt"), _text(row, "completion"))


def _turns(row: Row) -> Example:
    prompt = _messages(row, "prompt")
    return _learnable(row, prompt + _messages(row, "completion"), len(prompt))


def _conversation(row: Row) -> Example:
    return _learnable(row, _messages(row, "messages"), 0)


def _learnable(row: Row, messages: tuple[Message, ...], first_learnt: int) -> Conversation:
    if row.values.get("tools"):
        raise BadRow("the row has `tools`, which would be left out of training")
    if not any(message["role"] == "assistant" for message in messages[first_learnt:]):
        raise BadRow("no assistant message, so there is nothing to learn")
    return Conversation(row.where, messages, first_learnt)


def _plain_text(row: Row) -> Example:
    return Plain(row.where, "", _text(row, "text"))


TURNS = Format("messages", ("prompt", "completion"), _turns)
"""Conversations too, but in two lists: what is given and what is learnt."""

FORMATS = (
    Format("prompt_completion", ("prompt", "completion"), _prompt_completion),
    Format("messages", ("messages",), _conversation),
    Format("text", ("text",), _plain_text),
)


def recognise(rows: Sequence[Row], section: DataSection) -> Format:
    """The format that the section names, or the one whose keys the first row has.

    Raises DataError: no format fits, or more than one does; `columns` maps a field that the row lacks.
    """
    if absent := set(section.columns.values()) - set(rows[0].values):
        what = f"no field {_listed(absent)}; the fields are {_listed(rows[0].values)}"
        raise DataError(Problem(what, rows[0].where, "data.columns"))
    values = _renamed(rows[0], section.columns).values
    keys = set(values)
    pair = keys.issuperset(TURNS.keys)
    if section.format == "messages" and pair and "messages" not in keys:
        return TURNS
    if section.format in ("auto", "prompt_completion") and pair and isinstance(values["prompt"], list):
        return TURNS
    if section.format != "auto":
        return next(form for form in FORMATS if form.name == section.format)
    fitting = [form for form in FORMATS if keys.issuperset(form.keys)]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(form.name for form in fitting or FORMATS)
    what = f"the keys {_listed(keys)} fit {'more than one format' if fitting else 'no format'}"
    fix = f"set data.format to one of {names}" + ("" if fitting else ", and data.columns to map its keys to yours")
    raise DataError(Problem(what, rows[0].where, fix=fix))


def parse(rows: Sequence[Row], form: Format, section: DataSection) -> list[Example]:
    """Every row as an Example.

    Raises DataError with the first 10 rows that lack a key or hold something else than the format asks for.
    """
    examples: list[Example] = []
    problems: list[Problem] = []
    for row in rows:
        renamed = _renamed(row, section.columns)
        try:
            if missing := [key for key in form.keys if key not in renamed.values]:
                raise BadRow(
                    f"no field {_listed(missing)} for the format {form.name}; its fields are {_listed(row.values)}"
                )
            examples.append(form.read(renamed))
        except BadRow as error:
            problems.append(Problem(str(error), row.where))
            if len(problems) == MAX_PROBLEMS:
                break
    if problems:
        raise DataError(problems)
    return examples


def question(row: Row, columns: Mapping[str, str]) -> str | list[Message]:
    """What a row asks: its `prompt`, its `messages` up to the last answer, or its `text`.

    Raises DataError: the row has none of them, or they hold something else.
    """
    ours = _renamed(row, columns)
    key = next((key for key in ("prompt", "messages", "text") if key in ours.values), None)
    try:
        if key is None:
            raise BadRow(f"nothing is asked; the fields are {_listed(row.values)}")
        if key == "text" or (key == "prompt" and not isinstance(ours.values["prompt"], list)):
            return _text(ours, key)
        messages = list(_messages(ours, key))
        if key == "messages" and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise BadRow("no message comes before the answer")
        return messages
    except BadRow as error:
        raise DataError(Problem(str(error), row.where, fix="give a prompt, messages or text")) from None


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under our names: `columns` maps ours to the data's, over a field that has our name by chance."""
    if not columns:
        return row
    taken = {theirs: ours for ours, theirs in columns.items()}
    named = {ours: row.values[theirs] for theirs, ours in taken.items() if theirs in row.values}
    return Row(row.where, {key: value for key, value in row.values.items() if key not in taken} | named)


def _kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "true or false", list: "a list", dict: "an object", str: "text"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _listed(keys: Sequence[str] | set[str] | Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}`" for key in sorted(keys)) or "(none)"
