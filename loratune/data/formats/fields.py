"""Reading the fields of one row; whatever a field may not hold is a `RowError`."""

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
        code: What kind of problem it is.
        what: What is wrong.
        fix: What to do about it.
    """

    def __init__(self, code: Code, what: str, fix: str = "correct the row, or remove it"):
        super().__init__(what)
        self.code, self.fix = code, fix

    def at(self, where: str) -> Problem:
        """As a problem of the row at this place."""
        return Problem(self.code, str(self), where, fix=self.fix)


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
        raise RowError(Code.DATA_FIELD_TYPE, f"{field} must be text, got {describe(value)}")
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
        value: Text is parsed, everything else is returned as it is.
        place: Where the value stands, for messages.

    Raises:
        RowError: Text that is not valid JSON, or a value that cannot be written as JSON in UTF-8.
    """
    try:
        value = json.loads(value) if isinstance(value, str) else value
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _surrogate_error(place) from None
    except (ValueError, RecursionError):
        raise RowError(Code.DATA_FIELD_JSON, f"{place} must be valid JSON") from None
    except TypeError as error:
        raise RowError(Code.DATA_FIELD_JSON, f"{place} cannot be written as JSON: {error}") from None
    return value


def _surrogate_error(place: str) -> RowError:
    return RowError(Code.DATA_SURROGATE, f"{place} holds a lone surrogate, which is not a character")


def parse_list(fields: Fields, name: str) -> Any:
    """The value of a field; text that begins as a JSON list, as in a cell of CSV, is parsed. Raises RowError."""
    value = fields.get(name)
    return parse_json(value, f"`{name}`") if isinstance(value, str) and value.lstrip()[:1] == "[" else value


def integers(fields: Fields, name: str) -> tuple[int, ...]:
    """The whole numbers of a field, in order.

    Raises:
        RowError: The field is not a list, is empty, or holds something else.
    """
    value = parse_list(fields, name)
    if not isinstance(value, list) or not value:
        raise RowError(Code.DATA_FIELD_TYPE, f"`{name}` must be a list of whole numbers, got {describe(value)}")
    if set(map(type, value)) != {int}:
        number, item = next((number, item) for number, item in enumerate(value, start=1) if type(item) is not int)
        item_kind = f"the number {item}" if isinstance(item, float) else describe(item)
        what = f"entry {number} of `{name}` must be a whole number, got {item_kind}"
        raise RowError(Code.DATA_FIELD_TYPE, what)
    return tuple(value)


def describe(value: Any) -> str:
    """What a value is, in the words of JSON."""
    if value == [] and isinstance(value, list):
        return "an empty list"
    if isinstance(value, Unreadable):
        return f"a value that cannot be read ({value.reason})"
    kinds = {type(None): "null", bool: "true or false", list: "a list", dict: "an object", str: "text"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def quote(names: Iterable[str]) -> str:
    """Names of fields for a message, in alphabetical order."""
    return ", ".join(f"`{name}`" for name in sorted(names)) or "(none)"
