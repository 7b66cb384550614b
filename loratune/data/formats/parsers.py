"""The fields of a row → an example, one function for each family of formats. All of them raise RowError.

Preference data: a prompt may be text or messages, or may be missing: then it is the common beginning of both answers.
An answer may be text, a message, or a list of messages.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from loratune.data.formats import IGNORED, Conversation, Ids, Plain, PreferencePair, UnpairedPreference, chats
from loratune.data.formats.chats import Fields, RowError, Turn
from loratune.errors import Problem

SIDES = ("chosen", "rejected")
_LABELS = {"true": True, "1": True, "false": False, "0": False}
_ASSISTANT, _HUMAN = "\n\nAssistant:", "\n\nHuman:"
"""What turns begin with in the texts of Anthropic's HH-RLHF, whose pairs are whole dialogues."""


def parse_ids(where: str, fields: Fields) -> Ids:
    """A row with `input_ids`, and perhaps `labels`: for each token its own id or -100, not shifted."""
    ids = chats.integers(fields, "input_ids")
    if min(ids) < 0:
        number = next(number for number, id in enumerate(ids, start=1) if id < 0)
        raise RowError(f"entry {number} of `input_ids` is {ids[number - 1]}, and token ids are not negative")
    mask = chats.parse_list(fields, "attention_mask")
    if mask not in (None, "") and mask != [1] * len(ids):
        raise RowError("`attention_mask` is not a list with 1 for every token", "give `input_ids` without padding")
    if fields.get("labels") is None:
        return Ids(where, ids)
    labels = chats.integers(fields, "labels")
    if len(labels) != len(ids):
        raise RowError(f"`labels` has {len(labels)} entries, but `input_ids` has {len(ids)}")
    if set(labels) == {IGNORED}:
        raise RowError("no token is supervised: all `labels` are -100")
    for number, (label, id) in enumerate(zip(labels, ids, strict=True), start=1):
        if label not in (id, IGNORED):
            what = f"entry {number} of `labels` is {label}, but that of `input_ids` is {id}"
            raise RowError(what, "set each label to the id at its own place, or to -100")
    return Ids(where, ids, labels)


def check_ids(example: Ids, vocabulary_size: int) -> Problem | None:
    """What is wrong if an id is not in the vocabulary."""
    number = next((number for number, id in enumerate(example.ids, start=1) if id >= vocabulary_size), 0)
    if not number:
        return None
    what = f"entry {number} of `input_ids` is {example.ids[number - 1]}"
    what = f"{what}, but the vocabulary has {vocabulary_size} tokens, from 0 to {vocabulary_size - 1}"
    return RowError(what, "use the tokenizer of this model for `input_ids`").at(example.where)


def parse_text(where: str, fields: Fields) -> Plain:
    """`text`, all of it supervised."""
    return Plain(where, "", chats.text(fields, "text"), whole=True)


def parse_prompt_completion(where: str, fields: Fields) -> Plain:
    """`prompt` and `completion` as text."""
    return Plain(where, chats.text(fields, "prompt"), chats.text(fields, "completion"))


def parse_two_lists(where: str, fields: Fields) -> Conversation:
    """`prompt` and `completion` as lists of messages, of which the second is supervised; `tools`."""
    return _conversation(where, fields, chats.parse_turns(fields, "prompt"), chats.parse_turns(fields, "completion"))


def parse_conversation(name: str, where: str, fields: Fields) -> Conversation:
    """The turns of a field; `tools`, and `system` as a first turn."""
    return _conversation(where, fields, [], chats.prompt_turns(fields, name))


def parse_alpaca(where: str, fields: Fields) -> Conversation:
    """`instruction` with `input` below it, and `output`; `system`, `history`, `tools`."""
    answer = Turn({"role": "assistant", "content": chats.text(fields, "output")})
    return _conversation(where, fields, chats.prompt_turns(fields, "instruction"), [answer])


def _conversation(where: str, fields: Fields, prompt: Sequence[Turn], answer: Sequence[Turn]) -> Conversation:
    tools, turns = chats.parse_tools(fields), [*prompt, *answer]
    if not any(turn.message["role"] == "assistant" for turn in answer):
        raise RowError("no assistant message, so that no token is supervised")
    zero_weight = frozenset(number for number, turn in enumerate(turns) if turn.zero_weight)
    return Conversation(where, tuple(turn.message for turn in turns), len(prompt), tools, zero_weight)


# Preference data


def holds_messages(fields: Fields) -> bool:
    """Whether the prompt or an answer of a row is messages."""
    values = (chats.messages_or_text(fields, name) for name in ("prompt", *SIDES, "completion"))
    return any(isinstance(value, list | Mapping) for value in values)


def is_answer_alone(value: Any) -> bool:
    """Whether an answer can be what an assistant says, rather than a whole conversation with a prompt."""
    if isinstance(value, str):
        return not value.startswith(_HUMAN)
    first = value[0] if isinstance(value, list) and value else value
    role = first.get("from", first.get("role")) if isinstance(first, Mapping) else None
    return isinstance(role, str) and chats.ROLES.get(role) == "assistant"


def parse_pair(where: str, fields: Fields) -> PreferencePair:
    """`chosen` and `rejected` as text, with their `prompt` before them, or as whole texts."""
    chosen, rejected = (chats.text(fields, name) for name in SIDES)
    if fields.get("prompt") is not None:
        prompt = chats.text(fields, "prompt")
        return PreferencePair(where, Plain(where, prompt, chosen), Plain(where, prompt, rejected))
    border = _border(chosen, rejected)
    return PreferencePair(where, *(Plain(where, side[:border], side[border:]) for side in (chosen, rejected)))


def _border(chosen: str, rejected: str) -> int:
    """Where the prompt ends that two texts begin with: behind the last name of a turn, or else between two words."""
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if (place := chosen.rfind(_ASSISTANT, 0, common)) >= 0:
        return place + len(_ASSISTANT)
    while common and not chosen[common - 1 : common].isspace():
        common -= 1
    return max(common - 1, 0)  # white space belongs to the beginning of a word, as in most vocabularies


def parse_pair_of_messages(name: str, where: str, fields: Fields) -> PreferencePair:
    """`chosen` and `rejected` as answers to the field of this name, or as whole conversations; `tools`, `system`."""
    prompt = chats.prompt_turns(fields, name) if fields.get(name) is not None else None
    if prompt and name != "prompt" and prompt[-1].message["role"] == "assistant":
        what = f"`{name}` ends with an answer, so it is not what `chosen` and `rejected` answer"
        raise RowError(what, "leave its last message out, or give a `prompt`")
    chosen, rejected = (_answer(fields, side, prompt) for side in SIDES)
    if prompt is None:
        pairs = zip(chosen[:-1], rejected[:-1], strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    return PreferencePair(where, *(_preference(where, fields, prompt, answer) for answer in (chosen, rejected)))


def parse_unpaired(label: str, where: str, fields: Fields) -> UnpairedPreference:
    """`prompt` and `completion` as text, and whether it is desirable in the field that `label` names."""
    return UnpairedPreference(where, parse_prompt_completion(where, fields), _label(fields, label))


def parse_unpaired_messages(name: str, answer: str, label: str, where: str, fields: Fields) -> UnpairedPreference:
    """A prompt with an answer, and whether that is desirable; `tools`, `system`.

    Args:
        name: The field of the prompt.
        answer: That of the answer; if it is the same, the answer is the last of its turns.
        label: That of the label.
        where: The place of the row.
        fields: The row.
    """
    prompt = chats.prompt_turns(fields, name) if fields.get(name) is not None or name != "prompt" else []
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
    """The turns of an answer, without those of the prompt, if it begins with them."""
    value = chats.messages_or_text(fields, name)
    if isinstance(value, str):
        if prompt is None:
            raise RowError(f"`{name}` must be a list of messages, as there is no `prompt`, got text")
        return [Turn({"role": "assistant", "content": chats.text(fields, name)})]
    if prompt is None:
        return chats.prompt_turns(fields, name)
    turns = chats.parse_turns(fields, name)
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
    return Conversation(where, chat.messages, chat.first_supervised, chat.tools)


def read_label(value: Any) -> bool | None:
    """What a label says: true, false, 1 or 0, as text too, as in a cell of CSV; None if it says nothing."""
    value = _LABELS.get(value.strip().lower(), value) if isinstance(value, str) else value
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def _label(fields: Fields, name: str) -> bool:
    if (label := read_label(fields.get(name))) is not None:
        return label
    raise chats.type_error(f"`{name}`", "true or false, which say whether the answer is desirable", fields.get(name))
