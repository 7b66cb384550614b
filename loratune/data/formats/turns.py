"""One list of turns: each checked, and brought into the shape that chat templates take."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loratune.data.formats.checks import RowError, Values, kind, listed, text, unpacked
from loratune.data.formats.examples import Message
from loratune.data.formats.tools import calls

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
SPEAKERS = ROLES | {
    "human": "user",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "observation": "tool",
}  # fmt: skip
"""Who speaks in a ShareGPT conversation → the role for the template."""

TEXTS = ("name", "tool_call_id", "reasoning_content", "thinking")
"""Fields of a turn beside its content that reach the chat template as text."""

READ = {"role", "content", "tool_calls", "weight", *TEXTS}


@dataclass(frozen=True)
class Turn:
    """A message for the template, and whether it is an answer of weight 0."""

    message: Message
    zero_weight: bool = False


def messages(said: list[Turn]) -> list[Message]:
    """The messages of some turns."""
    return [turn.message for turn in said]


def turns(
    values: Values,
    key: str,
    translate: Callable[[Values, str], Values] = lambda item, place: item,
    roles: Mapping[str, str] = ROLES,
) -> list[Turn]:
    """The turns of a field. translate: brings an item, named by its place, under the names of OpenAI.

    Raises RowError: not a list, or one with a turn that is wrong or holds more than reaches the template.
    """
    value = unpacked(values, key)
    if not isinstance(value, list) or not value:
        raise RowError(f"`{key}` must be a list of messages, got {kind(value)}")
    said = []
    for number, item in enumerate(value, start=1):
        place = f"message {number} of `{key}`"
        if not isinstance(item, Mapping):
            raise RowError(f"{place} must be an object with role and content")
        said.append(_turn(translate(item, place), place, roles))
    return said


def _turn(item: Values, place: str, roles: Mapping[str, str]) -> Turn:
    said = item.get("role")
    role = roles.get(said) if isinstance(said, str) else None
    if role is None:
        raise RowError(f"{place} has the role {said!r}, not one of {', '.join(roles)}")
    if extra := {field for field, value in item.items() if value is not None} - READ:
        raise RowError(f"{place} has {listed(extra)}, which would be left out of training")
    message: Message = {"role": role, "content": ""}
    if item.get("tool_calls"):
        if role != "assistant":
            raise RowError(f"{place} has `tool_calls`, but only the assistant calls tools")
        message["tool_calls"] = calls(item["tool_calls"], place)
    if item.get("content") or not item.get("tool_calls"):
        message["content"] = _content(item, place)
    message |= {field: text(item, field, place) for field in TEXTS if item.get(field) is not None}
    return Turn(message, _zero_weight(item.get("weight"), role, place))


def _content(item: Values, place: str) -> str:
    """The text of a turn; parts of text are joined as they stand."""
    parts = item.get("content")
    if not isinstance(parts, list) or not parts:
        return text(item, "content", place)
    joined = []
    for part in parts:
        form = part.get("type") if isinstance(part, Mapping) else None
        if form != "text":
            what = f"a part of the type {form!r}" if isinstance(part, Mapping) else f"{kind(part)} as a part"
            raise RowError(f"{place} has {what}, and only parts of the type 'text' are learnt")
        joined.append(text(part, "text", f"a part of {place}"))
    return "".join(joined)


def _zero_weight(weight: Any, role: str, place: str) -> bool:
    if weight is None:
        return False
    if weight not in (0, 1):
        raise RowError(f"{place} has the weight {weight!r}, not 0 or 1")
    if weight == 1 and role != "assistant":
        raise RowError(f"{place} has the weight 1, but only assistant turns are learnt")
    return role == "assistant" and weight == 0
