"""The formats of rows that go through the chat template: conversations in every shape that the field uses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loratune.codes import Code
from loratune.data.formats.examples import (
    Conversation,
    Fields,
    Message,
    RowError,
    describe,
    optional_text,
    parse_json,
    parse_list,
    quote,
    text,
)

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
SHAREGPT_ROLES = ROLES | {
    "human": "user",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "observation": "tool",
}  # fmt: skip
"""`from` of a ShareGPT turn → the role for the template."""

TEXT_FIELDS = ("name", "tool_call_id", "reasoning_content", "thinking")
"""Fields of a message, other than its content, that reach the chat template as text."""

MESSAGE_FIELDS = {"role", "content", "tool_calls", "weight", *TEXT_FIELDS}

NULLABLE_SCHEMA_FIELDS = {"default", "const"}
"""Fields of a JSON schema in which null has a meaning."""


@dataclass(frozen=True)
class Turn:
    """A message for the template, and whether it is an assistant turn of weight 0."""

    message: Message
    zero_weight: bool = False


# Rows to be trained on


def parse_two_lists(where: str, fields: Fields) -> Conversation:
    """`prompt` and `completion` as lists of messages; the completion is supervised; `tools`. Raises RowError."""
    prompt = parse_turns(fields, "prompt")
    return _conversation(where, fields, prompt + parse_turns(fields, "completion"), len(prompt))


def parse_messages(where: str, fields: Fields) -> Conversation:
    """`messages`, `tools`, and `system` as a first turn. Raises RowError."""
    return _conversation(where, fields, with_system(fields, parse_turns(fields, "messages")))


def parse_sharegpt(where: str, fields: Fields) -> Conversation:
    """`conversations` of from and value, or of role and content; `system`, `tools`. Raises RowError."""
    return _conversation(where, fields, with_system(fields, _sharegpt_turns(fields)))


def parse_alpaca(where: str, fields: Fields) -> Conversation:
    """`instruction` with `input` below it, and `output`; `system`, `history`, `tools`. Raises RowError."""
    question = _alpaca_question(fields)
    answer: Message = {"role": "assistant", "content": text(fields, "output")}
    return _conversation(where, fields, [*question, Turn(answer)], len(question))


def _conversation(where: str, fields: Fields, turns: list[Turn], first_supervised: int = 0) -> Conversation:
    tools = parse_tools(fields)
    if not any(turn.message["role"] == "assistant" for turn in turns[first_supervised:]):
        raise RowError(Code.DATA_NO_ANSWER, "no assistant message, so that no token is supervised")
    zero_weight = frozenset(number for number, turn in enumerate(turns) if turn.zero_weight)
    return Conversation(where, tuple(turn.message for turn in turns), first_supervised, tools, zero_weight)


# Rows to be answered


def two_lists_question(fields: Fields) -> list[Message]:
    """`prompt`, where it is a list of messages. Raises RowError."""
    return [turn.message for turn in parse_turns(fields, "prompt")]


def messages_question(fields: Fields) -> list[Message]:
    """`messages` up to the last answer. Raises RowError."""
    return _before_answer(with_system(fields, parse_turns(fields, "messages")))


def sharegpt_question(fields: Fields) -> list[Message]:
    """`conversations` up to the last answer. Raises RowError."""
    return _before_answer(with_system(fields, _sharegpt_turns(fields)))


def alpaca_question(fields: Fields) -> list[Message]:
    """`instruction` with `input`, after `system` and `history`. Raises RowError."""
    return [turn.message for turn in _alpaca_question(fields)]


def _before_answer(turns: list[Turn]) -> list[Message]:
    if turns[-1].message["role"] == "assistant":
        turns = turns[:-1]
    if not turns:
        raise RowError(Code.DATA_NO_QUESTION, "no message comes before the answer")
    return [turn.message for turn in turns]


# Lists of turns


def with_system(fields: Fields, turns: list[Turn]) -> list[Turn]:
    """The turns with the row's `system` as the first one. Raises RowError: they begin with another system message."""
    system = optional_text(fields, "system")
    if not system:
        return turns
    if turns[0].message["role"] != "system":
        return [Turn({"role": "system", "content": system}), *turns]
    if turns[0].message["content"] != system:
        what = "`system` and the system message differ, and only one of them can be trained on"
        raise RowError(Code.DATA_FIELD_CONFLICT, what)
    return turns


def parse_turns(
    fields: Fields,
    name: str,
    translate: Callable[[Fields, str], Fields] = lambda item, place: item,
    roles: Mapping[str, str] = ROLES,
) -> list[Turn]:
    """The turns of a field.

    Args:
        fields: The row.
        name: Of the field.
        translate: Takes an item of the list and its place, and returns it under the names of OpenAI.
        roles: What an item may have as its role → the role for the template.

    Raises:
        RowError: The field is not a list, or a turn is wrong or holds more than reaches the template.
    """
    value = parse_list(fields, name)
    if not isinstance(value, list) or not value:
        raise RowError(Code.DATA_FIELD_TYPE, f"`{name}` must be a list of messages, got {describe(value)}")
    turns = []
    for number, item in enumerate(value, start=1):
        place = f"message {number} of `{name}`"
        if not isinstance(item, Mapping):
            what = f"{place} must be an object with role and content, got {describe(item)}"
            raise RowError(Code.DATA_FIELD_TYPE, what)
        turns.append(_turn(translate(item, place), place, roles))
    return turns


def _turn(item: Fields, place: str, roles: Mapping[str, str]) -> Turn:
    name = item.get("role")
    role = roles.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowError(Code.DATA_ROLE, f"{place} has the role {name!r}, not one of {', '.join(roles)}")
    if extra := {field for field, value in item.items() if value is not None} - MESSAGE_FIELDS:
        raise _unused_error(place, extra)
    message: Message = {"role": role, "content": ""}
    if item.get("tool_calls"):
        if role != "assistant":
            raise RowError(Code.DATA_ROLE, f"{place} has `tool_calls`, but only the assistant calls tools")
        message["tool_calls"] = _tool_calls(item["tool_calls"], place)
    if item.get("content") or not item.get("tool_calls"):
        message["content"] = _content(item, place)
    message |= {field: text(item, field, place) for field in TEXT_FIELDS if item.get(field) is not None}
    return Turn(message, _is_zero_weight(item.get("weight"), role, place))


def _unused_error(place: str, fields: set[str]) -> RowError:
    return RowError(Code.DATA_FIELD_UNUSED, f"{place} has {quote(fields)}, which would be left out of training")


def _content(item: Fields, place: str) -> str:
    """The text of a turn; parts of text are joined unchanged."""
    parts = item.get("content")
    if not isinstance(parts, list) or not parts:
        return text(item, "content", place)
    texts = []
    for part in parts:
        part_type = part.get("type") if isinstance(part, Mapping) else None
        if part_type != "text":
            what = f"a part of the type {part_type!r}" if isinstance(part, Mapping) else f"{describe(part)} as a part"
            what = f"{place} has {what}, and only parts of the type 'text' can be trained on"
            raise RowError(Code.DATA_FIELD_UNUSED, what)
        texts.append(text(part, "text", f"a part of {place}"))
    return "".join(texts)


def _is_zero_weight(weight: Any, role: str, place: str) -> bool:
    if weight is None:
        return False
    if weight not in (0, 1):
        raise RowError(Code.DATA_WEIGHT, f"{place} has the weight {weight!r}, not 0 or 1")
    if weight == 1 and role != "assistant":
        what = f"{place} has the weight 1, but only assistant turns are supervised"
        raise RowError(Code.DATA_WEIGHT, what)
    return role == "assistant" and weight == 0


def _sharegpt_turns(fields: Fields) -> list[Turn]:
    return parse_turns(fields, "conversations", sharegpt_to_openai, SHAREGPT_ROLES)


def sharegpt_to_openai(item: Fields, place: str) -> Fields:
    """A turn of ShareGPT under the names of OpenAI; a function call becomes a tool call. Raises RowError."""
    if "from" in item:
        if clash := {"role", "content"} & {field for field, value in item.items() if value is not None}:
            raise RowError(Code.DATA_FIELD_CONFLICT, f"{place} has both `from` and `{min(clash)}`")
        rest = {field: value for field, value in item.items() if field not in ("from", "value")}
        item = {**rest, "role": item["from"], "content": text(item, "value", place)}
    if item.get("role") != "function_call" or not isinstance(item.get("content"), str):
        return item
    place = f"the function call of {place}"
    calls = parse_json(item["content"], place)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, Mapping) and {"name", "arguments"} <= call.keys() for call in calls) or not calls:
        raise RowError(Code.DATA_TOOL_CALL, f"{place} must be JSON with name and arguments")
    return {**item, "role": "assistant", "content": None, "tool_calls": calls}


def _alpaca_question(fields: Fields) -> list[Turn]:
    """The system, the turns before, and the instruction with its input on the next line, as in LLaMA-Factory."""
    messages: list[Message] = []
    if system := optional_text(fields, "system"):
        messages.append({"role": "system", "content": system})
    for question, answer in _history(parse_list(fields, "history")):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    parts = [text(fields, "instruction"), optional_text(fields, "input")]
    messages.append({"role": "user", "content": "\n".join(part for part in parts if part)})
    return [Turn(message) for message in messages]


def _history(value: Any) -> list[tuple[str, str]]:
    if value in (None, ""):
        return []
    if not isinstance(value, list):
        what = f"`history` must be a list of pairs of question and answer, got {describe(value)}"
        raise RowError(Code.DATA_FIELD_TYPE, what)
    pairs = []
    for number, pair in enumerate(value, start=1):
        place = f"entry {number} of `history`"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(Code.DATA_FIELD_TYPE, f"{place} must be a pair of question and answer")
        named = dict(zip(("question", "answer"), pair, strict=True))
        pairs.append((text(named, "question", place), text(named, "answer", place)))
    return pairs


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
        raise RowError(Code.DATA_FIELD_UNUSED, what, "set data.columns to {tools: functions}")
    value = fields.get("tools")
    if not value:
        return ()
    value = parse_json(value, "`tools`")
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RowError(Code.DATA_FIELD_TYPE, f"`tools` must be a list of JSON schemas, got {describe(value)}")
    tools = []
    for number, item in enumerate(value, start=1):
        place = f"entry {number} of `tools`"
        tool = parse_json(item, place) if isinstance(item, str) else item
        if not isinstance(tool, Mapping):
            raise RowError(Code.DATA_FIELD_TYPE, f"{place} must be a JSON schema, got {describe(tool)}")
        try:
            tool = _without_nulls(tool)
        except RecursionError:
            raise RowError(Code.DATA_FIELD_JSON, f"{place} is nested too deeply") from None
        tools.append(_wrapped(tool, set(tool) - {"type"}) if "name" in tool and "function" not in tool else tool)
    return tuple(tools)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            name: _without_nulls(inner)
            for name, inner in value.items()
            if inner is not None or name in NULLABLE_SCHEMA_FIELDS
        }
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _wrapped(value: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """The value with these of its fields moved into a field `function`."""
    function = {name: value[name] for name in value if name in names}
    rest = {name: value[name] for name in value if name not in names}
    return {**rest, "type": "function", "function": function}


def _tool_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """The `tool_calls` of a turn, each `{type: function, function: {name, arguments}}`, with `id` where it has one.

    Arguments that are JSON in text become an object, as servers pass them to templates.
    """
    if not isinstance(value, list):
        raise RowError(Code.DATA_FIELD_TYPE, f"`tool_calls` of {place} must be a list, got {describe(value)}")
    return [_tool_call(item, f"tool call {number} of {place}") for number, item in enumerate(value, start=1)]


def _tool_call(item: Any, place: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise RowError(Code.DATA_FIELD_TYPE, f"{place} must be an object with a function, got {describe(item)}")
    call = {name: value for name, value in item.items() if value is not None}
    if "function" not in call:
        call = _wrapped(call, {"name", "arguments"} & call.keys())
    function = call["function"]
    if not isinstance(function, Mapping):
        what = f"`function` of {place} must be an object with name and arguments, got {describe(function)}"
        raise RowError(Code.DATA_FIELD_TYPE, what)
    extra = (call.keys() - {"id", "type", "index", "function"}) | (
        {name for name, value in function.items() if value is not None} - {"name", "arguments"}
    )
    if extra:
        raise _unused_error(place, extra)
    if not text(function, "name", place):
        raise RowError(Code.DATA_TOOL_CALL, f"{place} names no function")
    arguments = function.get("arguments")
    arguments = {} if arguments in (None, "") else parse_json(arguments, f"`arguments` of {place}")
    if not isinstance(arguments, dict):
        what = f"`arguments` of {place} must be an object, or JSON of one, got {describe(arguments)}"
        raise RowError(Code.DATA_FIELD_TYPE, what)
    ids = {"id": text(call, "id", place)} if "id" in call else {}
    return {**ids, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
