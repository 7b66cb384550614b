"""Fields and conversations in all common shapes: turns of OpenAI or ShareGPT, fields of Alpaca, tools.

A turn is a message under OpenAI's names. `name`, `tool_call_id`, `reasoning_content` and `thinking` reach the chat
template with role, content and tool calls; any other field of a turn is refused, because it would not reach it. An
invalid value of a field is a `RowError`.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loratune.codes import Code
from loratune.data.formats import Message
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


# Turns

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")} | {
    "human": "user",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "observation": "tool",
}  # fmt: skip
"""The role of a turn, in OpenAI's or ShareGPT's words → the role for the template."""

_TEXT_FIELDS = ("name", "tool_call_id", "reasoning_content", "thinking")
_MESSAGE_FIELDS = {"role", "content", "tool_calls", "weight", *_TEXT_FIELDS}
_NULLABLE_SCHEMA_FIELDS = {"default", "const"}
"""Fields of a JSON schema in which null has a meaning."""


@dataclass(frozen=True)
class Turn:
    """A message for the template, and whether it is an assistant turn of weight 0."""

    message: Message
    zero_weight: bool = False


def prompt_turns(fields: Fields, name: str) -> list[Turn]:
    """The turns of a field, after the row's `system`.

    Args:
        fields: The row.
        name: `messages`, `conversations`, `prompt`, which may also be text, or `instruction`, with `input` on the next
            line and `history` before it, as in LLaMA-Factory.

    Raises:
        RowError: A field holds something else; the turns begin with another system message than `system`.
    """
    if name == "instruction":
        parts = [text(fields, "instruction"), optional_text(fields, "input")]
        question = Turn({"role": "user", "content": "\n".join(part for part in parts if part)})
        return _with_system(fields, [*_history(parse_list(fields, "history")), question])
    if name == "prompt" and isinstance(messages_or_text(fields, name), str):
        return _with_system(fields, [Turn({"role": "user", "content": text(fields, name)})])
    return _with_system(fields, parse_turns(fields, name))


def _with_system(fields: Fields, turns: list[Turn]) -> list[Turn]:
    system = optional_text(fields, "system")
    if not system:
        return turns
    if turns[0].message["role"] != "system":
        return [Turn({"role": "system", "content": system}), *turns]
    if turns[0].message["content"] != system:
        raise RowError("`system` and the system message differ, and only one of them can be trained on")
    return turns


def _history(value: Any) -> list[Turn]:
    if value in (None, ""):
        return []
    if not isinstance(value, list):
        raise type_error("`history`", "a list of pairs of question and answer", value)
    turns = []
    for number, pair in enumerate(value, start=1):
        place = f"entry {number} of `history`"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"{place} must be a pair of question and answer")
        named = {"question": pair[0], "answer": pair[1]}
        turns += [
            Turn({"role": role, "content": text(named, name, place)})
            for role, name in (("user", "question"), ("assistant", "answer"))
        ]
    return turns


def parse_turns(fields: Fields, name: str) -> list[Turn]:
    """The turns of a field: a list of messages, or a single one.

    Raises:
        RowError: The field holds something else, or a turn is wrong or holds more than reaches the template.
    """
    value = messages_or_text(fields, name)
    value = parse_list({name: [value] if isinstance(value, Mapping) else value}, name)
    if not isinstance(value, list) or not value:
        raise type_error(f"`{name}`", "a list of messages", value)
    turns = []
    for number, item in enumerate(value, start=1):
        place = f"message {number} of `{name}`"
        if not isinstance(item, Mapping):
            raise type_error(place, "an object with role and content", item)
        turns.append(_turn(_sharegpt_to_openai(item, place), place))
    return turns


def _turn(item: Fields, place: str) -> Turn:
    name = item.get("role")
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowError(f"{place} has the role {name!r}, not one of {', '.join(ROLES)}")
    _check_unused(item, _MESSAGE_FIELDS, place)
    message: Message = {"role": role, "content": ""}
    if item.get("tool_calls"):
        if role != "assistant":
            raise RowError(f"{place} has `tool_calls`, but only the assistant calls tools")
        message["tool_calls"] = _tool_calls(item["tool_calls"], place)
    if item.get("content") or not item.get("tool_calls"):
        message["content"] = _content(item, place)
    message |= {field: text(item, field, place) for field in _TEXT_FIELDS if item.get(field) is not None}
    weight = item.get("weight")
    if weight not in (0, 1, None):
        raise RowError(f"{place} has the weight {weight!r}, not 0 or 1")
    if weight == 1 and role != "assistant":
        raise RowError(f"{place} has the weight 1, but only assistant turns are supervised")
    return Turn(message, role == "assistant" and weight == 0)


def _check_unused(item: Fields, known: set[str], place: str) -> None:
    if extra := {field for field, value in item.items() if value is not None} - known:
        raise RowError(f"{place} has {quote(extra)}, which would be left out of training")


def _content(item: Fields, place: str) -> str:
    """The text of a turn; parts of text are joined unchanged."""
    parts = item.get("content")
    if not isinstance(parts, list) or not parts:
        return text(item, "content", place)
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = (
                f"a part of the type {part.get('type')!r}"
                if isinstance(part, Mapping)
                else f"{describe(part)} as a part"
            )
            raise RowError(f"{place} has {kind}, and only parts of the type 'text' can be trained on")
    return "".join(text(part, "text", f"a part of {place}") for part in parts)


def _sharegpt_to_openai(item: Fields, place: str) -> Fields:
    """A turn of ShareGPT under the names of OpenAI; a function call becomes a tool call."""
    if "from" in item:
        if clash := {"role", "content"} & {field for field, value in item.items() if value is not None}:
            raise RowError(f"{place} has both `from` and `{min(clash)}`")
        rest = {field: value for field, value in item.items() if field not in ("from", "value")}
        item = {**rest, "role": item["from"], "content": text(item, "value", place)}
    if item.get("role") != "function_call" or not isinstance(item.get("content"), str):
        return item
    place = f"the function call of {place}"
    calls = parse_json(item["content"], place)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, Mapping) and {"name", "arguments"} <= call.keys() for call in calls) or not calls:
        raise RowError(f"{place} must be JSON with name and arguments")
    return {**item, "role": "assistant", "content": None, "tool_calls": calls}


# Tools


def parse_tools(fields: Fields) -> tuple[Any, ...]:
    """The `tools` of a row: a list of JSON schemas, JSON of one, or null.

    A function alone is wrapped as `{type: function, function: ...}`, as clients send it. Nulls are removed that a table
    holds where the schema of another row has a field.

    Raises:
        RowError: `tools` is something else, or the row has `functions`.
    """
    if fields.get("functions"):
        what = "the row has `functions`, which would be left out of training"
        raise RowError(what, "set data.columns to {tools: functions}")
    value = parse_json(fields.get("tools") or None, "`tools`")
    if value is None:
        return ()
    if not isinstance(value, list):
        raise type_error("`tools`", "a list of JSON schemas", value)
    tools = []
    for number, item in enumerate(value, start=1):
        place = f"entry {number} of `tools`"
        tool = parse_json(item, place) if isinstance(item, str) else item
        if not isinstance(tool, Mapping):
            raise type_error(place, "a JSON schema", tool)
        try:
            tool = _without_nulls(tool)
        except RecursionError:
            raise RowError(f"{place} is nested too deeply") from None
        tools.append(_wrapped(tool, set(tool) - {"type"}) if "name" in tool and "function" not in tool else tool)
    return tuple(tools)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {name: inner for name, inner in value.items() if inner is not None or name in _NULLABLE_SCHEMA_FIELDS}
        return {name: _without_nulls(inner) for name, inner in kept.items()}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _wrapped(value: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """The value with these of its fields moved into a field `function`."""
    function = {name: value[name] for name in value if name in names}
    rest = {name: value[name] for name in value if name not in names}
    return {**rest, "type": "function", "function": function}


def _tool_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """The `tool_calls` of a turn, each `{type: function, function: {name, arguments}}`, with `id` where it has one."""
    if not isinstance(value, list):
        raise type_error(f"`tool_calls` of {place}", "a list", value)
    return [_tool_call(item, f"tool call {number} of {place}") for number, item in enumerate(value, start=1)]


def _tool_call(item: Any, place: str) -> dict[str, Any]:
    """Arguments that are JSON in text become an object, as servers pass them to templates."""
    if not isinstance(item, Mapping):
        raise type_error(place, "an object with a function", item)
    call = {name: value for name, value in item.items() if value is not None}
    if "function" not in call:
        call = _wrapped(call, {"name", "arguments"} & call.keys())
    function = call["function"]
    if not isinstance(function, Mapping):
        raise type_error(f"`function` of {place}", "an object with name and arguments", function)
    _check_unused(call, {"id", "type", "index", "function"}, place)
    _check_unused(function, {"name", "arguments"}, place)
    if not text(function, "name", place):
        raise RowError(f"{place} names no function")
    arguments = function.get("arguments")
    arguments = {} if arguments in (None, "") else parse_json(arguments, f"`arguments` of {place}")
    if not isinstance(arguments, dict):
        raise type_error(f"`arguments` of {place}", "an object, or JSON of one", arguments)
    ids = {"id": text(call, "id", place)} if "id" in call else {}
    return {**ids, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
