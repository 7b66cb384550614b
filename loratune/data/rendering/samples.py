"""Messages with which a chat template is tested."""

from typing import Any

from loratune.data.formats import Message

QUESTION: Message = {"role": "user", "content": "loratune?"}
ANSWER: Message = {"role": "assistant", "content": "loratune!"}
TOOL = {
    "type": "function",
    "function": {
        "name": "loratune_tool",
        "description": "loratune",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}},
    },
}
_ID = "abc123XYZ"
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": _ID, "function": {"name": "loratune_tool", "arguments": {"x": "1"}}}],
}
_RESULT: Message = {"role": "tool", "name": "loratune_tool", "tool_call_id": _ID, "content": "1"}
_SYSTEM: Message = {"role": "system", "content": "loratune."}
_REASONING = "loratune reasons."


def conversation(kind: str, *, in_fields: bool) -> tuple[tuple[Message, ...], tuple[Any, ...]]:
    """The messages and the tools of a conversation with several answers.

    Args:
        kind: What it has, as `kind_of` returns it; with reasoning, some answers have it and some do not.
        in_fields: Whether reasoning is in a field of a message, not in its content.
    """
    content = f"<think>\n{_REASONING}\n</think>\n\nloratune!"
    given: Message = {"reasoning_content": _REASONING} if in_fields else {"content": content}
    messages: list[Message] = [_SYSTEM] if "system" in kind else []
    for more in ({}, given, {}) if "reasoning" in kind else ({}, {}):
        messages += [QUESTION, *([CALL | more, _RESULT] if "tools" in kind else []), ANSWER | more]
    return tuple(messages), (TOOL,) if "tools" in kind else ()
