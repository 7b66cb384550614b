"""Tools: the schemas that a row offers, and the calls of a turn."""

from collections.abc import Mapping
from typing import Any

from loratune.data.formats.checks import RowError, Values, decoded, kind, listed, text

VALUES = {"default", "const"}
"""Fields of a JSON schema in which null says something."""


def schemas(values: Values) -> tuple[Any, ...]:
    """The `tools` of a row: a list of JSON schemas, or JSON of one, or null.

    A function alone is wrapped as `{type: function, function: ...}`, as clients send it. A null that a table's column
    holds where other schemas have a field is taken out.
    Raises RowError: something else; the row offers `functions`.
    """
    if values.get("functions"):
        raise RowError("the row has `functions`, which would not be learnt", "map `tools` to it by data.columns")
    value = values.get("tools")
    if not value:
        return ()
    value = decoded(value, "`tools`")
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RowError(f"`tools` must be a list of JSON schemas, got {kind(value)}")
    tools = []
    for number, item in enumerate(value, start=1):
        place = f"entry {number} of `tools`"
        tool = decoded(item, place) if isinstance(item, str) else item
        if not isinstance(tool, Mapping):
            raise RowError(f"{place} must be a JSON schema, got {kind(tool)}")
        try:
            tool = _without_nulls(tool)
        except RecursionError:
            raise RowError(f"{place} is nested too deeply") from None
        tools.append(_wrapped(tool, set(tool) - {"type"}) if "name" in tool and "function" not in tool else tool)
    return tuple(tools)


def calls(value: Any, place: str) -> list[dict[str, Any]]:
    """The `tool_calls` of a turn, each `{type: function, function: {name, arguments}}`, and `id` where it has one.

    Arguments that are JSON in text become an object, as servers hand them to templates.
    Raises RowError: something else.
    """
    if not isinstance(value, list):
        raise RowError(f"`tool_calls` of {place} must be a list, got {kind(value)}")
    return [_call(item, f"tool call {number} of {place}") for number, item in enumerate(value, start=1)]


def called(value: str, place: str) -> list[Any]:
    """The calls that the text of a function call of ShareGPT holds: JSON of name and arguments, or a list of these.

    Raises RowError: something else.
    """
    found = decoded(value, f"the function call of {place}")
    found = found if isinstance(found, list) else [found]
    if not all(isinstance(call, Mapping) and {"name", "arguments"} <= call.keys() for call in found) or not found:
        raise RowError(f"the function call of {place} must be JSON with name and arguments")
    return found


def _call(item: Any, place: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise RowError(f"{place} must be an object with a function, got {kind(item)}")
    call = {field: value for field, value in item.items() if value is not None}
    if "function" not in call:
        call = _wrapped(call, {"name", "arguments"} & call.keys())
    function = call["function"]
    if not isinstance(function, Mapping):
        raise RowError(f"`function` of {place} must be an object with name and arguments, got {kind(function)}")
    extra = (call.keys() - {"id", "type", "index", "function"}) | (
        {field for field, value in function.items() if value is not None} - {"name", "arguments"}
    )
    if extra:
        raise RowError(f"{place} has {listed(extra)}, which would be left out of training")
    if not text(function, "name", place):
        raise RowError(f"{place} names no function")
    given = function.get("arguments")
    arguments = {} if given in (None, "") else decoded(given, f"`arguments` of {place}")
    if not isinstance(arguments, dict):
        raise RowError(f"`arguments` of {place} must be an object, or JSON of one, got {kind(arguments)}")
    named = {"name": function["name"], "arguments": arguments}
    kept = {field: text(call, field, place) for field in ("id",) if field in call}
    return {**kept, "type": "function", "function": named}


def _wrapped(value: Mapping[str, Any], fields: set[str]) -> dict[str, Any]:
    """The fields of a function moved into one of their own."""
    function = {field: value[field] for field in value if field in fields}
    rest = {field: value[field] for field in value if field not in fields}
    return {**rest, "type": "function", "function": function}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None or key in VALUES}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
