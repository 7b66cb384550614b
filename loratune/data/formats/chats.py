"""Rows that go through the chat template: conversations in every shape that is found in the wild."""

from typing import Any

from loratune.data.formats.checks import RowError, Values, kind, optional_text, text, unpacked
from loratune.data.formats.examples import Conversation, Message
from loratune.data.formats.tools import called, schemas
from loratune.data.formats.turns import SPEAKERS, Turn, messages, turns


def two_lists(where: str, values: Values) -> Conversation:
    """`prompt` and `completion` as lists of messages, of which the completion is learnt; `tools`. Raises RowError."""
    given = turns(values, "prompt")
    return _conversation(where, values, given + turns(values, "completion"), len(given))


def one_list(where: str, values: Values) -> Conversation:
    """`messages`, `tools`, and `system` as a first turn. Raises RowError."""
    return _conversation(where, values, _after_system(values, turns(values, "messages")))


def sharegpt(where: str, values: Values) -> Conversation:
    """`conversations` of from and value, or of role and content; `system`, `tools`. Raises RowError."""
    return _conversation(where, values, _after_system(values, _conversations(values)))


def alpaca(where: str, values: Values) -> Conversation:
    """`instruction` with `input` below it, `output`, which is learnt; `system`, `history`, `tools`. Raises RowError."""
    asked = _alpaca_question(values)
    answer: Message = {"role": "assistant", "content": text(values, "output")}
    return _conversation(where, values, [*asked, Turn(answer)], len(asked))


def asked_two_lists(values: Values) -> list[Message]:
    """What a row with a list of messages as its `prompt` asks. Raises RowError."""
    return messages(turns(values, "prompt"))


def asked_one_list(values: Values) -> list[Message]:
    """`messages` up to the last answer. Raises RowError."""
    return _before_answer(_after_system(values, turns(values, "messages")))


def asked_sharegpt(values: Values) -> list[Message]:
    """`conversations` up to the last answer. Raises RowError."""
    return _before_answer(_after_system(values, _conversations(values)))


def asked_alpaca(values: Values) -> list[Message]:
    """What an `instruction` asks. Raises RowError."""
    return messages(_alpaca_question(values))


def _conversation(where: str, values: Values, said: list[Turn], first_supervised: int = 0) -> Conversation:
    tools = schemas(values)
    if not any(turn.message["role"] == "assistant" for turn in said[first_supervised:]):
        raise RowError("no assistant message, so there is nothing to learn")
    zero_weight = frozenset(number for number, turn in enumerate(said) if turn.zero_weight)
    return Conversation(where, tuple(messages(said)), first_supervised, tools, zero_weight)


def _after_system(values: Values, said: list[Turn]) -> list[Turn]:
    """The turns with the row's `system` before them."""
    system = optional_text(values, "system")
    if not system:
        return said
    if said[0].message["role"] != "system":
        return [Turn({"role": "system", "content": system}), *said]
    if said[0].message["content"] != system:
        raise RowError("`system` and the system message differ, so one of them would be left out of training")
    return said


def _before_answer(said: list[Turn]) -> list[Message]:
    if said[-1].message["role"] == "assistant":
        said = said[:-1]
    if not said:
        raise RowError("no message comes before the answer")
    return messages(said)


def _conversations(values: Values) -> list[Turn]:
    return turns(values, "conversations", _as_openai, SPEAKERS)


def _as_openai(item: Values, place: str) -> Values:
    """A turn of ShareGPT under the names of OpenAI; a function call becomes a tool call."""
    if "from" in item:
        if clash := {"role", "content"} & {field for field, value in item.items() if value is not None}:
            raise RowError(f"{place} has both `from` and `{min(clash)}`")
        rest = {field: value for field, value in item.items() if field not in ("from", "value")}
        item = {**rest, "role": item["from"], "content": text(item, "value", place)}
    if item.get("role") == "function_call" and isinstance(item.get("content"), str):
        return {**item, "role": "assistant", "content": None, "tool_calls": called(item["content"], place)}
    return item


def _alpaca_question(values: Values) -> list[Turn]:
    """The system, the turns before, and the instruction with its input on the next line, as in LLaMA-Factory."""
    said: list[Message] = []
    if system := optional_text(values, "system"):
        said.append({"role": "system", "content": system})
    for question, answer in _history(unpacked(values, "history")):
        said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    parts = [text(values, "instruction"), optional_text(values, "input")]
    said.append({"role": "user", "content": "\n".join(part for part in parts if part)})
    return [Turn(message) for message in said]


def _history(value: Any) -> list[tuple[str, str]]:
    if value in (None, ""):
        return []
    if not isinstance(value, list):
        raise RowError(f"`history` must be a list of pairs of question and answer, got {kind(value)}")
    pairs = []
    for number, pair in enumerate(value, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"entry {number} of `history` must be a pair of question and answer")
        named = dict(zip(("question", "answer"), pair, strict=True))
        pairs.append((text(named, "question"), text(named, "answer")))
    return pairs
