"""The reasoning of answers: in a field of the message, or in `<think>` at the beginning of its content."""

import re
from dataclasses import replace
from typing import TypeVar

from loratune.data.formats import (
    Conversation,
    Example,
    Message,
    PreferencePair,
    RowError,
    Single,
    UnpairedPreference,
    sides,
)
from loratune.errors import Problem

FIELDS = ("reasoning_content", "thinking", "reasoning")
"""The fields of a message that may hold the reasoning, in the order in which transformers looks for it."""
CLOSING_TAG = re.compile(r"</\w+>|<\w+\|>|\[/\w+\]")
_NAMES = "think|thinking|thought|thoughts|reason|reasoning"
REASONING_OPENED = re.compile(rf"<({_NAMES})>\s*\Z")
"""A prompt that ends in an opened reasoning."""
_CLOSED = rf"\s*+(?:</(?:{_NAMES})>|<channel\|>|\[/THINK\])\s*"
_AFTER = re.compile(_CLOSED)
EMPTY_REASONING = re.compile(rf"\s*+(?:<(?:{_NAMES})>|<\|channel>\w*|\[THINK\])?{_CLOSED}")
"""The beginning of an answer: a reasoning without text, or the end of one that the prompt opens."""
_IN_CONTENT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_CUT = re.compile(r"\s*<think>(?!.*</think>)", re.DOTALL)
_END = re.compile(r"(?<!\s)(?=\s*\Z)")
_Some = TypeVar("_Some", bound=Example)


def reasoning_of(message: Message) -> str:
    """The reasoning of an answer, stripped; empty if there is none."""
    text = next((message[name] for name in FIELDS if message.get(name)), "")
    if not text and (found := _IN_CONTENT.match(message["content"])):
        text = found[1]
    return str(text).strip()


def has_several(message: Message) -> bool:
    """Whether a message has reasoning in more than one place; a template would take one."""
    texts = {message[name].strip() for name in FIELDS if message.get(name)}
    return len(texts) + bool(texts and _IN_CONTENT.match(message["content"])) > 1


def cut_problem(example: Single, loss_on: str) -> Problem | None:
    """The problem if a supervised answer opens a reasoning that it never closes, as a generation that was cut off."""
    if not isinstance(example, Conversation):
        return None
    for number in example.supervised_turns(loss_on):
        if _CUT.match(example.messages[number]["content"]):
            what = f"message {number + 1} (assistant) opens <think> and never closes it, so it has no answer"
            return RowError(what, "close it, or remove the row").at(example.where)
    return None


def with_mark(message: Message, mark: str) -> Message:
    """The message with a mark at the end of its reasoning, before white space."""
    fields = {name: _END.sub(mark, message[name], 1) for name in FIELDS if message.get(name)}
    content = message["content"]
    if not fields and (found := _IN_CONTENT.match(content)):
        content = _END.sub(mark, content[: found.end(1)], 1) + content[found.end(1) :]
    return {**message, **fields, "content": content}


def end_of_reasoning(text: str, start: int, place: int | None) -> int:
    """Where the reasoning of a rendered answer ends, with the tag that closes it; the start of the answer without one.

    Args:
        text: The text up to the end of the answer.
        start: Where the answer begins.
        place: Where the text of its reasoning ends; None without text, where an empty block may be rendered.
    """
    if place is None or place < start:
        empty = EMPTY_REASONING.match(text, start)
        return empty.end() if empty else start
    closed = _AFTER.match(text, place)
    return closed.end() if closed else place


def dropped(example: _Some) -> _Some:
    """The example without the reasoning of its messages."""
    if isinstance(example, PreferencePair):
        return replace(example, chosen=dropped(example.chosen), rejected=dropped(example.rejected))
    if isinstance(example, UnpairedPreference):
        return replace(example, answer=dropped(example.answer))
    if not isinstance(example, Conversation):
        return example
    return replace(example, messages=tuple(map(without, example.messages)))


def without(message: Message) -> Message:
    """The message without its reasoning, if it is an answer."""
    if message["role"] != "assistant":
        return message
    left = {name: value for name, value in message.items() if name not in FIELDS}
    found = _IN_CONTENT.match(message["content"])
    return {**left, "content": message["content"][found.end() :]} if found else left


def reasons(example: Example) -> bool:
    """Whether an answer of the example has reasoning."""
    return any("reasoning" in kind_of(one) for one in sides(example) if isinstance(one, Conversation))


def kind_of(chat: Conversation) -> str:
    """What a conversation has of reasoning, tools and a system message, such as `reasoning, tools`; may be empty."""
    answers = [message for message in chat.messages if message["role"] == "assistant"]
    has = {
        "reasoning": any(map(reasoning_of, answers)),
        "tools": bool(chat.tools) or any("tool_calls" in message for message in answers),
        "a system message": any(message["role"] in ("system", "developer") for message in chat.messages),
    }
    return ", ".join(name for name, found in has.items() if found)
