"""The values of fields: text, JSON, lists of whole numbers. Whatever a field may not hold is a `RowError`."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from loratune.codes import Code
from loratune.data.sources.rows import Unreadable
from loratune.errors import Problem

Fields = Mapping[str, Any]
"""The fields of a row, under the names that loratune gives to them."""


class RowError(ValueError):
    """What is wrong with one row, without its place.

    Args:
        what: What is wrong.
        fix: What to do about it.
    """

    def __init__(self, what: str, fix: str = "correct the row, or remove it"):
        super().__init__(what)
        self.fix = fix

    def at(self, where: str) -> Problem:
        """As a problem of the row at this place."""
        return Problem(Code.DATA_FIELD, str(self), where, fix=self.fix)


def type_error(place: str, needed: str, value: Any) -> RowError:
    """The error for a value of the wrong type."""
    return RowError(f"{place} must be {needed}, got {describe(value)}")


def text(fields: Fields, name: str, place: str = "") -> str:
    """The text of a field.

    Args:
        fields: The row, or an object within it.
        name: Of the field.
        place: Which object within the row has the field, for messages; empty for the row itself.

    Raises:
        RowError: The field holds something else, or a character that UTF-8 cannot encode.
    """
    value = fields.get(name)
    field = f"`{name}` of {place}" if place else f"`{name}`"
    if not isinstance(value, str):
        raise type_error(field, "text", value)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _surrogate_error(field) from None
    return value


def optional_text(fields: Fields, name: str) -> str:
    """The text of a field; empty where the row lacks it or has null."""
    return "" if fields.get(name) is None else text(fields, name)


def parse_json(value: Any, place: str) -> Any:
    """A value that may be written as JSON in text.

    Args:
        value: Text is parsed, everything else is returned unchanged.
        place: Where the value is, for messages.

    Raises:
        RowError: Text that is not valid JSON, or a value that cannot be written as JSON in UTF-8.
    """
    try:
        value = json.loads(value) if isinstance(value, str) else value
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _surrogate_error(place) from None
    except (ValueError, RecursionError):
        raise RowError(f"{place} must be valid JSON") from None
    except TypeError as error:
        raise RowError(f"{place} cannot be written as JSON: {error}") from None
    return value


def _surrogate_error(place: str) -> RowError:
    return RowError(f"{place} holds a lone surrogate, which is not a character")


def parse_list(fields: Fields, name: str) -> Any:
    """The value of a field; text that begins as a JSON list, as in a cell of CSV, is parsed. Raises RowError."""
    value = fields.get(name)
    return parse_json(value, f"`{name}`") if isinstance(value, str) and value.lstrip()[:1] == "[" else value


def messages_or_text(fields: Fields, name: str) -> Any:
    """The value of a field; text that is a JSON list of messages, as in a cell of CSV, is parsed.

    Any other text is one, also where it begins as such a list: `[1] says so`.
    """
    value = fields.get(name)
    if not isinstance(value, str) or value.lstrip()[:1] != "[":
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if found and all(isinstance(one, dict) and one.keys() & {"role", "from"} for one in found) else value


def integers(fields: Fields, name: str) -> tuple[int, ...]:
    """The whole numbers of a field, in order. Raises RowError: it is no list, is empty, or holds something else."""
    value = parse_list(fields, name)
    if not isinstance(value, list) or not value:
        raise type_error(f"`{name}`", "a list of whole numbers", value)
    if set(map(type, value)) != {int}:
        number, item = next((number, item) for number, item in enumerate(value, start=1) if type(item) is not int)
        kind = f"the number {item}" if isinstance(item, float) else describe(item)
        raise RowError(f"entry {number} of `{name}` must be a whole number, got {kind}")
    return tuple(value)


def describe(value: Any) -> str:
    """What a value is, in the words of JSON."""
    if value == [] and isinstance(value, list):
        return "an empty list"
    if isinstance(value, Unreadable):
        return f"a value that cannot be read ({value.reason})"
    kinds = {type(None): "null", bool: "true or false", list: "a list", dict: "an object", str: "text"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


_SHOWN_NAMES, _SHOWN_LETTERS = 20, 60


def quote(names: Iterable[str]) -> str:
    """Names of fields for a message, in alphabetical order; of many the first, of long ones the beginning."""
    listed = sorted(names)
    cut = [name if len(name) <= _SHOWN_LETTERS else f"{name[:_SHOWN_LETTERS]}…" for name in listed[:_SHOWN_NAMES]]
    more = f", and {len(listed) - _SHOWN_NAMES:,} more" if len(listed) > _SHOWN_NAMES else ""
    return (", ".join(f"`{name}`" for name in cut) or "(none)") + more
