"""The formats of preference data: pairs of a chosen and a rejected answer, and unpaired answers with a label.

A prompt may be text or messages, or may be left out: then it is what both answers of a pair begin with. Messages are as
in OpenAI's or in ShareGPT's form; an answer may be a list of them, a single one, or text. As in LLaMA-Factory, an
`instruction`, `messages` or `conversations` in a row with two answers are their prompt; a label belongs to the last
turn, or to the `output` of an instruction.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from loratune.codes import Code
from loratune.data.formats import chats
from loratune.data.formats.chats import Turn
from loratune.data.formats.examples import (
    Conversation,
    Fields,
    Message,
    Plain,
    Preference,
    PreferencePair,
    RowError,
    UnpairedPreference,
    describe,
    messages_or_text,
    text,
)

CHOSEN, REJECTED = "chosen", "rejected"
KTO_TAG = "kto_tag"
"""LLaMA-Factory's field for whether an answer is desirable, which nobody has for anything else."""
_WORDS = ("true", "false")
_LABELS = {"true": True, "1": True, "false": False, "0": False}
_ASSISTANT, _HUMAN = "\n\nAssistant:", "\n\nHuman:"
"""What turns begin with in the texts of Anthropic's HH-RLHF, whose pairs are whole dialogues."""
QUESTION_NAMES = ("question", "query", "instruction", "input", "problem", "user_prompt")
"""Names of fields, in lower case, that say that they hold what is answered."""


def holds_messages(fields: Fields) -> bool:
    """Whether the prompt or an answer of a row is messages."""
    values = (messages_or_text(fields, name) for name in ("prompt", CHOSEN, REJECTED, "completion"))
    return any(isinstance(value, list | Mapping) for value in values)


def are_answers_alone(fields: Fields) -> bool:
    """Whether the two answers of a row can be what an assistant says, rather than whole conversations with a prompt."""
    return all(_is_answer_alone(messages_or_text(fields, name)) for name in (CHOSEN, REJECTED))


def _is_answer_alone(value: Any) -> bool:
    if isinstance(value, str):
        return not value.startswith(_HUMAN)
    first = value[0] if isinstance(value, list) and value else value
    role = first.get("from", first.get("role")) if isinstance(first, Mapping) else None
    return isinstance(role, str) and chats.SHAREGPT_ROLES.get(role) == "assistant"


def unread_question(fields: Fields) -> str | None:
    """The field of a pair without `prompt` whose name says that it is the prompt, and whose text no answer holds."""
    if fields.get("prompt") is not None or not are_answers_alone(fields):
        return None
    for name, value in fields.items():
        is_question = name.lower() in QUESTION_NAMES and isinstance(value, str) and value.strip()
        if is_question and not (isinstance(chosen := fields[CHOSEN], str) and value.strip() in chosen):
            return name
    return None


def parse_pair(where: str, fields: Fields) -> PreferencePair:
    """`chosen` and `rejected` as text, with their `prompt` before them, or as whole texts. Raises RowError."""
    chosen, rejected = text(fields, CHOSEN), text(fields, REJECTED)
    if fields.get("prompt") is not None:
        prompt = text(fields, "prompt")
        return PreferencePair(where, Plain(where, prompt, chosen), Plain(where, prompt, rejected))
    border = _border(chosen, rejected)
    sides = (Plain(where, side[:border], side[border:]) for side in (chosen, rejected))
    return PreferencePair(where, *sides)


def parse_pair_of_messages(where: str, fields: Fields) -> PreferencePair:
    """`chosen` and `rejected` as answers to `prompt`, or as whole conversations; `tools`, `system`. Raises RowError."""
    prompt = _prompt(fields)
    answers = [_answer(fields, name, prompt) for name in (CHOSEN, REJECTED)]
    if prompt is None:
        prompt, answers = _common_turns(*answers)
    if not prompt:
        raise RowError(Code.DATA_NO_QUESTION, "no message comes before the answers, so there is no prompt")
    return _pair(where, fields, prompt, answers)


def parse_pair_to_instruction(where: str, fields: Fields) -> PreferencePair:
    """`chosen` and `rejected` as answers to `instruction` with `input`; `system`, `history`, `tools`.

    Raises:
        RowError: As `parse_pair_of_messages`.
    """
    prompt = [Turn(message) for message in chats.alpaca_question(fields)]
    return _pair(where, fields, prompt, [_answer(fields, name, prompt) for name in (CHOSEN, REJECTED)])


def parse_pair_to_turns(name: str, where: str, fields: Fields) -> PreferencePair:
    """`chosen` and `rejected` as answers to the turns of the field of this name; `system`, `tools`. Raises RowError."""
    prompt = chats.with_system(fields, _turns(fields, name))
    if prompt[-1].message["role"] == "assistant":
        what = f"`{name}` ends with an answer, so it is not what `chosen` and `rejected` answer"
        raise RowError(Code.DATA_FIELD_CONFLICT, what, "leave its last message out, or give a `prompt`")
    return _pair(where, fields, prompt, [_answer(fields, answer, prompt) for answer in (CHOSEN, REJECTED)])


def parse_unpaired(label: str, where: str, fields: Fields) -> UnpairedPreference:
    """`prompt` and `completion` as text, and whether it is desirable in the field `label` names. Raises RowError."""
    return UnpairedPreference(
        where, Plain(where, text(fields, "prompt"), text(fields, "completion")), _label(fields, label)
    )


def parse_unpaired_messages(label: str, where: str, fields: Fields) -> UnpairedPreference:
    """`prompt` and `completion` as messages, and whether it is desirable in the field `label` names; `tools`, `system`.

    Raises:
        RowError: A field is missing or wrong, or there is no prompt.
    """
    prompt = _prompt(fields)
    answer = _answer(fields, "completion", prompt) if prompt else []
    return _unpaired(where, fields, prompt or [], answer, label)


def parse_unpaired_output(label: str, where: str, fields: Fields) -> UnpairedPreference:
    """`output` as the answer to `instruction` with `input`, and whether it is desirable; `system`, `history`, `tools`.

    Raises:
        RowError: As `parse_unpaired_messages`.
    """
    prompt = [Turn(message) for message in chats.alpaca_question(fields)]
    return _unpaired(where, fields, prompt, [Turn({"role": "assistant", "content": text(fields, "output")})], label)


def parse_unpaired_turns(name: str, label: str, where: str, fields: Fields) -> UnpairedPreference:
    """The last of the turns of the field of this name as the answer to those before it, and whether it is desirable;
    `system`, `tools`. Raises RowError: as `parse_unpaired_messages`."""
    turns = chats.with_system(fields, _turns(fields, name))
    if turns[-1].message["role"] != "assistant":
        what = f"`{name}` ends with a message of the {turns[-1].message['role']}, so `{label}` judges no answer"
        raise RowError(Code.DATA_NO_ANSWER, what)
    return _unpaired(where, fields, turns[:-1], turns[-1:], label)


def _unpaired(
    where: str, fields: Fields, prompt: Sequence[Turn], answer: Sequence[Turn], label: str
) -> UnpairedPreference:
    if not prompt:
        raise RowError(Code.DATA_NO_QUESTION, "no message comes before the answer, so there is no prompt")
    return UnpairedPreference(where, _conversation(where, fields, prompt, answer), _label(fields, label))


def is_verdict(name: str, value: Any) -> bool:
    """Whether a value can only mean whether an answer is desirable. 0 and 1 may be classes, but not in `kto_tag`."""
    read = read_label(value)
    return read is not None and (isinstance(value, bool) or name == KTO_TAG or str(value).strip().lower() in _WORDS)


def read_label(value: Any) -> bool | None:
    """What a label says, None if it says nothing."""
    value = _LABELS.get(value.strip().lower(), value) if isinstance(value, str) else value
    return bool(value) if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)) else None


def _label(fields: Fields, name: str) -> bool:
    """The label of an answer: true, false, 1 or 0, as text too, as in a cell of CSV. Raises RowError."""
    value = fields.get(name)
    if (label := read_label(value)) is not None:
        return label
    what = f"`{name}` must be true or false, which say whether the answer is desirable, got {describe(value)}"
    raise RowError(Code.DATA_FIELD_TYPE, what)


def _border(chosen: str, rejected: str) -> int:
    """Where the prompt ends that two texts begin with: behind the last name of a turn, or else between two words."""
    least = min(len(chosen), len(rejected))
    common = next((place for place in range(least) if chosen[place] != rejected[place]), least)
    if (place := chosen.rfind(_ASSISTANT, 0, common)) >= 0:
        return place + len(_ASSISTANT)
    while common and not chosen[common - 1 : common].isspace():
        common -= 1
    return max(common - 1, 0)  # white space belongs to the beginning of a word, as in most vocabularies.


def _prompt(fields: Fields) -> list[Turn] | None:
    """The turns of the prompt, with the row's `system` before them; None where the row has no prompt."""
    value = messages_or_text(fields, "prompt")
    if value is None:
        return None
    if isinstance(value, str):
        return chats.with_system(fields, [Turn({"role": "user", "content": text(fields, "prompt")})])
    return chats.with_system(fields, _turns(fields, "prompt"))


def _turns(fields: Fields, name: str) -> list[Turn]:
    value = messages_or_text(fields, name)
    listed = {name: [value]} if isinstance(value, Mapping) else {name: value}
    return chats.parse_turns(listed, name, chats.sharegpt_to_openai, chats.SHAREGPT_ROLES)


def _answer(fields: Fields, name: str, prompt: Sequence[Turn] | None) -> list[Turn]:
    """The turns of an answer, without those of the prompt, if it begins with them."""
    value = messages_or_text(fields, name)
    if isinstance(value, str):
        if prompt is None:
            what = f"`{name}` must be a list of messages, as there is no `prompt`, got {describe(value)}"
            raise RowError(Code.DATA_FIELD_TYPE, what)
        return [Turn({"role": "assistant", "content": text(fields, name)})]
    turns = _turns(fields, name)
    if prompt is None:
        return chats.with_system(fields, turns)
    if turns[0].message["role"] == "assistant":
        return turns
    asked = [turn.message for turn in prompt]
    for start in range(len(turns)):  # UltraFeedback's conversations repeat the prompt, after a system message
        own = [turn.message for turn in turns[: start + 1]]
        if own == asked or own[-len(asked) :] == asked:
            return turns[start + 1 :]
    what = f"`{name}` begins with a message of the {turns[0].message['role']} that is not `prompt`"
    raise RowError(Code.DATA_FIELD_CONFLICT, what, "leave `prompt` out, or correct it")


def _common_turns(chosen: list[Turn], rejected: list[Turn]) -> tuple[list[Turn], list[list[Turn]]]:
    """The turns that two conversations begin with, and what of each comes after them: one turn at least."""
    least = min(len(chosen), len(rejected)) - 1
    pairs = zip(chosen[:least], rejected[:least], strict=True)
    common = next((place for place, (one, other) in enumerate(pairs) if one != other), least)
    return chosen[:common], [chosen[common:], rejected[common:]]


def _pair(where: str, fields: Fields, prompt: Sequence[Turn], answers: Sequence[Sequence[Turn]]) -> PreferencePair:
    return PreferencePair(where, *(_conversation(where, fields, prompt, answer) for answer in answers))


def _conversation(where: str, fields: Fields, prompt: Sequence[Turn], answer: Sequence[Turn]) -> Conversation:
    messages: list[Message] = [turn.message for turn in (*prompt, *answer)]
    if not answer or not any(turn.message["role"] == "assistant" for turn in answer):
        raise RowError(Code.DATA_NO_ANSWER, "an answer has no assistant message")
    if any(turn.zero_weight for turn in answer):
        raise RowError(Code.DATA_WEIGHT, "a turn of an answer has the weight 0, and answers are compared whole")
    return Conversation(where, tuple(messages), len(prompt), chats.parse_tools(fields))


def drop_reason(example: Preference) -> str | None:
    """Why nothing can be learnt from a preference; None if something can."""
    if isinstance(example, UnpairedPreference):
        return "the completion is empty" if not _content(example.answer).strip() else None
    chosen, rejected = _content(example.chosen), _content(example.rejected)
    for name, content in ((CHOSEN, chosen), (REJECTED, rejected)):
        if not content.strip():
            return f"the {name} answer is empty"
    if _key(example.chosen) == _key(example.rejected):
        return "the chosen and the rejected answer are the same"
    if rejected.startswith(chosen):
        return "the rejected answer begins with the chosen one"
    return None


def _content(answer: Plain | Conversation) -> str:
    """The text of an answer, calls of tools among it."""
    if isinstance(answer, Plain):
        return answer.completion
    return "\n".join(_text(message) for message in answer.messages[answer.first_supervised :])


def _text(message: Message) -> str:
    more: list[Any] = [message[name] for name in message if name not in ("role", "content")]
    return f"{message['content']}{''.join(map(repr, more))}"


def _key(answer: Plain | Conversation) -> Any:
    return answer.completion if isinstance(answer, Plain) else answer.messages[answer.first_supervised :]
