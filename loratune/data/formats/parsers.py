"""Parsers: the fields of a row → an example, one function per family of formats. All of them raise RowError.

Conversations come in all common shapes: turns of OpenAI or ShareGPT, fields of Alpaca, tools. `name`, `tool_call_id`,
`reasoning_content`, `reasoning` and `thinking` are passed to the chat template with role, content and tool calls; any
other field of a turn is an error, because it would be ignored.

Preference data: a prompt may be text or messages. If it is missing, it is the common prefix of both answers.
An answer may be text, a message, or a list of messages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loratune.data import formats
from loratune.data.formats import Conversation, Fields, Message, Plain, PreferencePair, RowError, UnpairedPreference
from loratune.data.formats.reasoning import FIELDS as REASONING_FIELDS
from loratune.data.formats.reasoning import has_several
from loratune.data.formats.tools import check_unused, parse_arguments, parse_tools, tool_call

SIDES = ("chosen", "rejected")
_LABELS = {"true": True, "1": True, "false": False, "0": False}
_ASSISTANT = "\n\nAssistant:"
"""The header of an answer in Anthropic's HH-RLHF, whose pairs are whole dialogues as text."""
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")} | {
    "human": "user",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "observation": "tool",
}  # fmt: skip
"""The role of a turn, as OpenAI or ShareGPT name it → the role for the template."""

_TEXT_FIELDS = ("name", "tool_call_id", *REASONING_FIELDS)
_MESSAGE_FIELDS = {"role", "content", "tool_calls", "weight", *_TEXT_FIELDS}


@dataclass(frozen=True)
class Turn:
    """A message for the template, and whether it is an assistant turn of weight 0."""

    message: Message
    zero_weight: bool = False


def parse_text(where: str, fields: Fields) -> Plain:
    """`text`, all of it supervised."""
    return Plain(where, "", formats.text(fields, "text"), whole=True)


def parse_prompt_completion(where: str, fields: Fields) -> Plain:
    """`prompt` and `completion` as text."""
    return Plain(where, formats.text(fields, "prompt"), formats.text(fields, "completion"))


def parse_two_lists(where: str, fields: Fields) -> Conversation:
    """`prompt` and `completion` as lists of messages, the latter supervised; `tools`."""
    return _conversation(where, fields, parse_turns(fields, "prompt"), parse_turns(fields, "completion"))


def parse_conversation(name: str, where: str, fields: Fields) -> Conversation:
    """The turns of a field; `tools`, and `system` as a first turn."""
    return _conversation(where, fields, [], prompt_turns(fields, name))


def parse_alpaca(where: str, fields: Fields) -> Conversation:
    """`instruction` with `input` below it, and `output`; `system`, `history`, `tools`."""
    answer = Turn({"role": "assistant", "content": formats.text(fields, "output")})
    return _conversation(where, fields, prompt_turns(fields, "instruction"), [answer])


def _conversation(where: str, fields: Fields, prompt: Sequence[Turn], answer: Sequence[Turn]) -> Conversation:
    tools, turns = parse_tools(fields), [*prompt, *answer]
    if not any(turn.message["role"] == "assistant" for turn in answer):
        raise RowError("no assistant message, so that no token is supervised")
    zero_weight = frozenset(number for number, turn in enumerate(turns) if turn.zero_weight)
    messages, arguments = tuple(turn.message for turn in turns), parse_arguments(fields)
    return Conversation(where, messages, len(prompt), tools, zero_weight, arguments=arguments)


# Preference data


def parse_pair(where: str, fields: Fields) -> PreferencePair:
    """`chosen` and `rejected` as text, with their `prompt` before them, or as whole texts."""
    chosen, rejected = (formats.text(fields, name) for name in SIDES)
    if fields.get("prompt") is not None:
        prompt = formats.text(fields, "prompt")
        return PreferencePair(where, Plain(where, prompt, chosen), Plain(where, prompt, rejected))
    border = _border(chosen, rejected)
    return PreferencePair(where, *(Plain(where, side[:border], side[border:]) for side in (chosen, rejected)))


def _border(chosen: str, rejected: str) -> int:
    """The end of the shared prompt of two texts: after the last answer header, otherwise between two words."""
    common = formats.common_prefix(chosen, rejected)
    if (place := chosen.rfind(_ASSISTANT, 0, common)) >= 0:
        return place + len(_ASSISTANT)
    while common and not chosen[common - 1 : common].isspace():
        common -= 1
    return max(common - 1, 0)  # white space belongs to the beginning of a word, as in most vocabularies


def parse_pair_of_messages(name: str, where: str, fields: Fields) -> PreferencePair:
    """`chosen` and `rejected` as answers to the field of this name, or as whole conversations; `tools`, `system`."""
    prompt = prompt_turns(fields, name) if fields.get(name) is not None else None
    if prompt and name != "prompt" and prompt[-1].message["role"] == "assistant":
        what = f"`{name}` ends with an answer, so it is not what `chosen` and `rejected` answer"
        raise RowError(what, "leave its last message out, or give a `prompt`")
    chosen, rejected = (_answer(fields, side, prompt) for side in SIDES)
    if prompt is None:
        common = formats.common_prefix(chosen[:-1], rejected[:-1])
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    return PreferencePair(where, *(_preference(where, fields, prompt, answer) for answer in (chosen, rejected)))


def parse_unpaired(label: str, where: str, fields: Fields) -> UnpairedPreference:
    """`prompt` and `completion` as text, and whether it is desirable in the field that `label` names."""
    return UnpairedPreference(where, parse_prompt_completion(where, fields), _label(fields, label))


def parse_unpaired_messages(name: str, answer: str, label: str, where: str, fields: Fields) -> UnpairedPreference:
    """A prompt with an answer, and whether that is desirable; `tools`, `system`.

    Args:
        name: The field of the prompt.
        answer: The field of the answer; if it equals `name`, the answer is the last turn of that field.
        label: The field of the label.
        where: The place of the row.
        fields: The row.
    """
    prompt = prompt_turns(fields, name) if fields.get(name) is not None or name != "prompt" else []
    if answer != name:
        turns = _answer(fields, answer, prompt) if prompt else []
    elif prompt[-1].message["role"] != "assistant":
        raise RowError(
            f"`{name}` ends with a message of the {prompt[-1].message['role']}, so `{label}` is about no answer"
        )
    else:
        prompt, turns = prompt[:-1], prompt[-1:]
    return UnpairedPreference(where, _preference(where, fields, prompt, turns), _label(fields, label))


def _answer(fields: Fields, name: str, prompt: Sequence[Turn] | None) -> list[Turn]:
    """The turns of an answer, without the prompt if it begins with it."""
    value = formats.messages_or_text(fields, name)
    if isinstance(value, str):
        if prompt is None:
            raise RowError(f"`{name}` must be a list of messages, as there is no `prompt`, got text")
        return [Turn({"role": "assistant", "content": formats.text(fields, name)})]
    if prompt is None:
        return prompt_turns(fields, name)
    turns = parse_turns(fields, name)
    if turns[0].message["role"] == "assistant":
        return turns
    asked = [turn.message for turn in prompt]
    for start in range(len(turns)):  # UltraFeedback's conversations repeat the prompt, after a system message
        own = [turn.message for turn in turns[: start + 1]]
        if own == asked or own[-len(asked) :] == asked:
            return turns[start + 1 :]
    what = f"`{name}` begins with a message of the {turns[0].message['role']} that is not `prompt`"
    raise RowError(what, "leave `prompt` out, or correct it")


def _preference(where: str, fields: Fields, prompt: Sequence[Turn], answer: Sequence[Turn]) -> Conversation:
    if not prompt:
        raise RowError("no message comes before the answer, so there is no prompt")
    chat = _conversation(where, fields, prompt, answer)
    if any(turn.zero_weight for turn in answer):
        raise RowError("a turn of an answer has the weight 0, and answers are compared whole")
    return replace(chat, zero_weight=frozenset())


def read_label(value: Any) -> bool | None:
    """The value of a label: true, false, 1 or 0, also as text as in a CSV cell; None for anything else."""
    value = _LABELS.get(value.strip().lower(), value) if isinstance(value, str) else value
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def _label(fields: Fields, name: str) -> bool:
    if (label := read_label(fields.get(name))) is not None:
        return label
    raise formats.type_error(f"`{name}`", "true or false, which say whether the answer is desirable", fields.get(name))


# Turns


def prompt_turns(fields: Fields, name: str) -> list[Turn]:
    """The turns of a field, after the row's `system`.

    Args:
        fields: The row.
        name: `messages`, `conversations`, `prompt`, which may also be text, or `instruction`, with `input` on the next
            line and `history` before it, as in LLaMA-Factory.

    Raises:
        RowError: A field holds something else; the first system message differs from `system`.
    """
    if name == "instruction":
        parts = [formats.text(fields, "instruction"), formats.optional_text(fields, "input")]
        question = Turn({"role": "user", "content": "\n".join(part for part in parts if part)})
        return _with_system(fields, [*_history(formats.parse_list(fields, "history")), question])
    if name == "prompt" and isinstance(formats.messages_or_text(fields, name), str):
        return _with_system(fields, [Turn({"role": "user", "content": formats.text(fields, name)})])
    return _with_system(fields, parse_turns(fields, name))


def _with_system(fields: Fields, turns: list[Turn]) -> list[Turn]:
    system = formats.optional_text(fields, "system")
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
        raise formats.type_error("`history`", "a list of pairs of question and answer", value)
    turns = []
    for number, pair in enumerate(value, start=1):
        place = f"entry {number} of `history`"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"{place} must be a pair of question and answer")
        named = {"question": pair[0], "answer": pair[1]}
        turns += [
            Turn({"role": role, "content": formats.text(named, name, place)})
            for role, name in (("user", "question"), ("assistant", "answer"))
        ]
    return turns


def parse_turns(fields: Fields, name: str) -> list[Turn]:
    """The turns of a field: a list of messages, or a single one.

    Raises:
        RowError: The field holds something else, or a turn is invalid or has fields that would be ignored.
    """
    value = formats.messages_or_text(fields, name)
    value = formats.parse_list({name: [value] if isinstance(value, Mapping) else value}, name)
    if not isinstance(value, list) or not value:
        raise formats.type_error(f"`{name}`", "a list of messages", value)
    turns = []
    for number, item in enumerate(value, start=1):
        place = f"message {number} of `{name}`"
        if not isinstance(item, Mapping):
            raise formats.type_error(place, "an object with role and content", item)
        turns.append(_turn(_sharegpt_to_openai(item, place), place))
    return turns


def _turn(item: Fields, place: str) -> Turn:
    name = item.get("role")
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowError(f"{place} has the role {name!r}, not one of {', '.join(ROLES)}")
    check_unused(item, _MESSAGE_FIELDS, place)
    message: Message = {"role": role, "content": ""}
    if item.get("tool_calls"):
        if role != "assistant":
            raise RowError(f"{place} has `tool_calls`, but only the assistant calls tools")
        if not isinstance(calls := item["tool_calls"], list):
            raise formats.type_error(f"`tool_calls` of {place}", "a list", calls)
        message["tool_calls"] = [
            tool_call(call, f"tool call {number} of {place}") for number, call in enumerate(calls, start=1)
        ]
    if item.get("content") or not item.get("tool_calls"):
        message["content"] = _content(item, place)
    message |= {field: formats.text(item, field, place) for field in _TEXT_FIELDS if item.get(field) is not None}
    if role == "assistant" and has_several(message):
        raise RowError(f"{place} has reasoning in more than one place", "give it in one field, or in the content")
    weight = item.get("weight")
    if weight not in (0, 1, None):
        raise RowError(f"{place} has the weight {weight!r}, not 0 or 1")
    if weight == 1 and role != "assistant":
        raise RowError(f"{place} has the weight 1, but only assistant turns are supervised")
    return Turn(message, role == "assistant" and weight == 0)


def _content(item: Fields, place: str) -> str:
    """The text of a turn; text parts are joined unchanged."""
    parts = item.get("content")
    if not isinstance(parts, list) or not parts:
        return formats.text(item, "content", place)
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = (
                f"of the type {part.get('type')!r}"
                if isinstance(part, Mapping)
                else f"that is {formats.describe(part)}"
            )
            raise RowError(f"{place} has a part {kind}, and only parts of the type 'text' can be trained on")
    return "".join(formats.text(part, "text", f"a part of {place}") for part in parts)


def _sharegpt_to_openai(item: Fields, place: str) -> Fields:
    """A turn of ShareGPT under the names of OpenAI; a function call becomes a tool call."""
    if "from" in item:
        if clash := {"role", "content"} & {field for field, value in item.items() if value is not None}:
            raise RowError(f"{place} has both `from` and `{min(clash)}`")
        rest = {field: value for field, value in item.items() if field not in ("from", "value")}
        item = {**rest, "role": item["from"], "content": formats.text(item, "value", place)}
    if item.get("role") != "function_call" or not isinstance(item.get("content"), str):
        return item
    place = f"the function call of {place}"
    calls = formats.parse_json(item["content"], place)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, Mapping) and {"name", "arguments"} <= call.keys() for call in calls) or not calls:
        raise RowError(f"{place} must be JSON with name and arguments")
    return {**item, "role": "assistant", "content": None, "tool_calls": calls}
