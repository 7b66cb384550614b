"""What may stand in one field of a row; whatever else is found there is a `RowError`."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from loratune.data.sources.rows import Unreadable
from loratune.errors import Problem

Values = Mapping[str, Any]
"""A row under our names of its fields."""


class RowError(ValueError):
    """What is wrong with one row, without its place, and what to do about it."""

    def __init__(self, what: str, fix: str = "mend the row, or take it out"):
        super().__init__(what)
        self.fix = fix

    def at(self, where: str) -> Problem:
        """As a problem of the row at a place."""
        return Problem(str(self), where, fix=self.fix)


def text(values: Values, key: str, place: str = "") -> str:
    """The text of a field. place: what in the row has the field, where it is not the row itself.

    Raises RowError: it holds something else, or a character that UTF-8 cannot write.
    """
    value = values.get(key)
    if not isinstance(value, str):
        raise RowError(f"`{key}`{_of(place)} must be text, got {kind(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RowError(f"`{key}`{_of(place)} holds a lone surrogate, which is not a character") from None
    return value


def _of(place: str) -> str:
    return f" of {place}" if place else ""


def optional_text(values: Values, key: str) -> str:
    """The text of a field that a row may lack or leave null: then it is empty."""
    return "" if values.get(key) is None else text(values, key)


def decoded(value: Any, what: str) -> Any:
    """A value that may be written as JSON inside of text; `what` names it in the message.

    Raises RowError: text that is not valid JSON, or a value that JSON and UTF-8 cannot write.
    """
    try:
        value = json.loads(value) if isinstance(value, str) else value
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RowError(f"{what} holds a lone surrogate, which is not a character") from None
    except (ValueError, RecursionError):
        raise RowError(f"{what} must be valid JSON") from None
    except TypeError as error:
        raise RowError(f"{what} cannot be written as JSON: {error}") from None
    return value


def unpacked(values: Values, key: str) -> Any:
    """A field that holds a list, perhaps as JSON in text, as in a cell of CSV. Raises RowError: not JSON."""
    value = values.get(key)
    return decoded(value, f"`{key}`") if isinstance(value, str) and value.lstrip()[:1] == "[" else value


def whole_numbers(values: Values, key: str) -> tuple[int, ...]:
    """The whole numbers of a field, in order.

    Raises RowError: not a list, an empty one, or one with something else in it.
    """
    value = unpacked(values, key)
    if not isinstance(value, list) or not value:
        raise RowError(f"`{key}` must be a list of whole numbers, got {kind(value)}")
    if set(map(type, value)) != {int}:
        number, odd = next((number, item) for number, item in enumerate(value, start=1) if type(item) is not int)
        shown = f"the number {odd}" if isinstance(odd, float) else kind(odd)
        raise RowError(f"entry {number} of `{key}` must be a whole number, got {shown}")
    return tuple(value)


def kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    if value == [] and isinstance(value, list):
        return "an empty list"
    if isinstance(value, Unreadable):
        return f"a value that cannot be read ({value.reason})"
    kinds = {type(None): "null", bool: "true or false", list: "a list", dict: "an object", str: "text"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def listed(keys: Iterable[str]) -> str:
    """Names of fields for a message."""
    return ", ".join(f"`{key}`" for key in sorted(keys)) or "(none)"
