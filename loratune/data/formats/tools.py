"""Parsers of what a row gives to the chat template besides its messages: tools, and arguments. They raise RowError."""

from collections.abc import Mapping
from typing import Any

from loratune.config import template_arguments
from loratune.data import formats
from loratune.data.formats import Fields, RowError

_NULLABLE_SCHEMA_FIELDS = {"default", "const"}
"""Fields of a JSON schema in which null has a meaning."""


def parse_tools(fields: Fields) -> tuple[Any, ...]:
    """The `tools` of a row: a list of JSON schemas, JSON of one, or null.

    A bare function is wrapped as `{type: function, function: ...}`, as clients send it. Nulls are removed: tables add
    them for fields that only the schemas of other rows have.

    Raises:
        RowError: `tools` is something else, or the row has `functions`.
    """
    if fields.get("functions"):
        what = "the row has `functions`, which would be left out of training"
        raise RowError(what, "set data.columns to {tools: functions}")
    value = formats.parse_json(fields.get("tools") or None, "`tools`")
    if value is None:
        return ()
    if not isinstance(value, list):
        raise formats.type_error("`tools`", "a list of JSON schemas", value)
    tools = []
    for number, item in enumerate(value, start=1):
        place = f"entry {number} of `tools`"
        tool = formats.parse_json(item, place) if isinstance(item, str) else item
        if not isinstance(tool, Mapping):
            raise formats.type_error(place, "a JSON schema", tool)
        try:
            tool = _without_nulls(tool)
        except RecursionError:
            raise RowError(f"{place} is nested too deeply") from None
        tools.append(_wrapped(tool, set(tool) - {"type"}) if "name" in tool and "function" not in tool else tool)
    return tuple(tools)


def parse_arguments(fields: Fields) -> dict[str, Any]:
    """The row's arguments of the chat template: an object, JSON of one, or null.

    Nulls are removed: tables add them for arguments that only other rows have.

    Raises:
        RowError: They are something else, or arguments that a chat template cannot get.
    """
    name = template_arguments.FIELD
    value = {} if fields.get(name) in (None, "") else fields[name]
    value = formats.parse_json(value, f"`{name}`") if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise formats.type_error(f"`{name}`", "an object, e.g. {enable_thinking: false}", value)
    arguments = {argument: one for argument, one in value.items() if one is not None}
    if reason := template_arguments.problem(arguments):
        raise RowError(f"`{name}`: {reason}")
    return arguments


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {name: inner for name, inner in value.items() if inner is not None or name in _NULLABLE_SCHEMA_FIELDS}
        return {name: _without_nulls(inner) for name, inner in kept.items()}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _wrapped(value: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """The value with the named fields moved into a field `function`."""
    function = {name: value[name] for name in value if name in names}
    rest = {name: value[name] for name in value if name not in names}
    return {**rest, "type": "function", "function": function}


def tool_call(item: Any, place: str) -> dict[str, Any]:
    """A tool call in OpenAI's format. Arguments given as JSON text become an object, as servers pass them on."""
    if not isinstance(item, Mapping):
        raise formats.type_error(place, "an object with a function", item)
    call = {name: value for name, value in item.items() if value is not None}
    if "function" not in call:
        call = _wrapped(call, {"name", "arguments"} & call.keys())
    function = call["function"]
    if not isinstance(function, Mapping):
        raise formats.type_error(f"`function` of {place}", "an object with name and arguments", function)
    check_unused(call, {"id", "type", "index", "function"}, place)
    check_unused(function, {"name", "arguments"}, place)
    if not formats.text(function, "name", place):
        raise RowError(f"{place} names no function")
    arguments = function.get("arguments")
    arguments = {} if arguments in (None, "") else formats.parse_json(arguments, f"`arguments` of {place}")
    if not isinstance(arguments, dict):
        raise formats.type_error(f"`arguments` of {place}", "an object, or JSON of one", arguments)
    ids = {"id": formats.text(call, "id", place)} if "id" in call else {}
    return {**ids, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def check_unused(item: Fields, known: set[str], place: str) -> None:
    """Raises RowError: an object has a field that would be ignored."""
    if extra := {field for field, value in item.items() if value is not None} - known:
        raise RowError(f"{place} has {formats.quote(extra)}, which would be left out of training")
