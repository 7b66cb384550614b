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
        kind = "null" if value is None else type(value).__name__
        raise BadRow(f"`{key}` must be text, got {kind}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"`{key}` holds a lone surrogate, which is not a character") from None
    return value


def _messages(row: Row, key: str) -> tuple[Message, ...]:
    value = row.values.get(key)
    if not isinstance(value, list) or not value:
        raise BadRow(f"`{key}` must be a list of messages, got {type(value).__name__}")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise BadRow(f"message {number} of `{key}` must be an object with role and content")
        if message.get("role") not in ROLES:
            raise BadRow(
                f"message {number} of `{key}` has the role {message.get('role')!r}, not one of {', '.join(ROLES)}"
            )
        if extra := set(message) - {"role", "content", "name"}:
            raise BadRow(f"message {number} of `{key}` has {_listed(extra)}, which would be left out of training")
        _text(Row(row.where, dict(message)), "content")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _prompt_completion(row: Row) -> Example:
    if isinstance(row.values.get("prompt"), list) or isinstance(row.values.get("completion"), list):
        prompt, completion = _messages(row, "prompt"), _messages(row, "completion")
        return Conversation(row.where, prompt + completion, first_learnt=len(prompt))
    return Plain(row.where, _text(row, "prompt"), _text(row, "completion"))


def _conversation(row: Row) -> Example:
    messages = _messages(row, "messages")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("no assistant message, so there is nothing to learn")
    return Conversation(row.where, messages)


def _plain_text(row: Row) -> Example:
    return Plain(row.where, "", _text(row, "text"))


FORMATS = (
    Format("prompt_completion", ("prompt", "completion"), _prompt_completion),
    Format("messages", ("messages",), _conversation),
    Format("text", ("text",), _plain_text),
)


def recognise(rows: Sequence[Row], section: DataSection) -> Format:
    """The format that the section names, or the one whose keys the first row has.

    Raises DataError: no format fits, or more than one does.
    """
    if section.format != "auto":
        return next(form for form in FORMATS if form.name == section.format)
    keys = set(_renamed(rows[0], section.columns).values)
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
    values = _renamed(row, columns).values
    try:
        if isinstance(values.get("prompt"), list):
            return list(_messages(_renamed(row, columns), "prompt"))
        if "messages" in values:
            messages = list(_messages(_renamed(row, columns), "messages"))
            return messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return _text(_renamed(row, columns), "prompt" if "prompt" in values else "text")
    except BadRow as error:
        raise DataError(Problem(str(error), row.where, fix="give a prompt, or messages")) from None


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under our names: `columns` maps ours to the data's."""
    if not columns:
        return row
    taken = {theirs: ours for ours, theirs in columns.items()}
    return Row(row.where, {taken.get(key, key): value for key, value in row.values.items()})


def _listed(keys: Sequence[str] | set[str] | Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}`" for key in sorted(keys)) or "(none)"
