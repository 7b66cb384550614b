"""Examples, the common representation of rows of all formats, and helpers that read the fields of a row.

Reading: the fields of a file's first row → one of the usual formats (`recognition`) → every row an Example (`parsers`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loratune.codes import Code
from loratune.data.sources.rows import Unreadable
from loratune.errors import Problem

Message: TypeAlias = dict[str, Any]
"""A message for a chat template. `role` and `content` are always present, and always text."""

Span: TypeAlias = tuple[int, int]
"""Half-open range of supervised positions: of tokens in a row, or of characters in a text."""

IGNORED = -100
"""The label of a token that is not supervised."""

PAIRS, UNPAIRED = "preference pairs", "unpaired preferences"
KINDS = {"sft": None, "dpo": PAIRS, "orpo": PAIRS, "simpo": PAIRS, "kto": UNPAIRED}
"""Objective → the kind of rows that it trains on; None for rows with one answer."""


@dataclass(frozen=True)
class Plain:
    """Text without a chat template: the prompt and the completion, joined unchanged.

    Attributes:
        where: The place of the row.
        prompt: Not supervised, unless `loss_on` is `all`.
        completion: Supervised, followed by the end of sequence.
        whole: Whether the row is one text without a prompt; such a text may be truncated.
        weight: The factor of the row in the loss.
    """

    where: str
    prompt: str
    completion: str
    whole: bool = False
    weight: float = 1.0


@dataclass(frozen=True)
class Conversation:
    """Messages for the chat template.

    Attributes:
        where: The place of the row.
        messages: In order.
        first_supervised: The first message that belongs to the completion: with `loss_on` `completion`, only assistant
            turns from it on are supervised.
        tools: Schemas for the template, usually `{type: function, function: {name, ...}}`.
        zero_weight: Indices, from 0, of the assistant turns whose weight is 0.
        weight: The factor of the row in the loss.
        arguments: Further arguments of the template, which take precedence over those of the config.
    """

    where: str
    messages: tuple[Message, ...]
    first_supervised: int = 0
    tools: tuple[Any, ...] = ()
    zero_weight: frozenset[int] = frozenset()
    weight: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def supervised_turns(self, loss_on: str) -> tuple[int, ...]:
        """The indices, from 0, of the assistant turns that contribute to the loss. loss_on: as in the configuration."""
        return tuple(number for number in self.selected_turns(loss_on) if _has_content(self.messages[number]))

    def selected_turns(self, loss_on: str) -> tuple[int, ...]:
        """The indices of the assistant turns that `loss_on` and the weights select, including empty ones."""
        first = self.first_supervised if loss_on == "completion" else 0
        return tuple(
            number
            for number, message in enumerate(self.messages)
            if number >= first and message["role"] == "assistant" and number not in self.zero_weight
        )


@dataclass(frozen=True)
class Ids:
    """A row that is already tokenized.

    Attributes:
        where: The place of the row.
        ids: Token ids, without padding.
        labels: For each token its own id if it is supervised, otherwise -100; None: all are supervised.
        weight: The factor of the row in the loss.
    """

    where: str
    ids: tuple[int, ...]
    labels: tuple[int, ...] | None = None
    weight: float = 1.0


Single: TypeAlias = Plain | Conversation | Ids
"""An example that becomes one row of tokens."""


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt.

    Attributes:
        where: The place of the row.
        chosen: The prompt with the preferred answer.
        rejected: The prompt with the other answer.
    """

    where: str
    chosen: Plain | Conversation
    rejected: Plain | Conversation


@dataclass(frozen=True)
class UnpairedPreference:
    """An answer with a label: desirable, or undesirable.

    Attributes:
        where: The place of the row.
        answer: The prompt with the answer.
        desirable: Whether the answer is desirable.
    """

    where: str
    answer: Plain | Conversation
    desirable: bool


Preference: TypeAlias = PreferencePair | UnpairedPreference
"""Preference data."""

Example: TypeAlias = Single | Preference


def sides(example: Example) -> tuple[Single, ...]:
    """The parts of an example that become rows of tokens: both answers of a pair, the chosen one first."""
    if isinstance(example, PreferencePair):
        return example.chosen, example.rejected
    return (example.answer,) if isinstance(example, UnpairedPreference) else (example,)


def system_message(example: Example) -> str:
    """The system message with which all parts of an example begin; empty if there is none, or it has other fields."""
    first = [side.messages[0] if isinstance(side, Conversation) else {} for side in sides(example)]
    text: str = first[0].get("content", "")
    return text if all(one == {"role": "system", "content": text} for one in first) else ""


def no_loss_reason(example: Single, loss_on: str) -> str | None:
    """Why no token of an example is supervised, as far as is known without a tokenizer; None if one is."""
    if isinstance(example, Plain):
        supervised = example.completion.strip() or (loss_on == "all" and example.prompt.strip())
        return None if supervised else f"the {'text' if example.whole else 'completion'} is empty"
    if isinstance(example, Ids):
        ids = example.ids[1:] if example.labels is None else [id for id in example.labels[1:] if id != IGNORED]
        return None if ids else "only the first token is supervised, and nothing predicts it"
    if loss_on == "all":
        return None if any(map(_has_content, example.messages)) else "the completion is empty"
    if not example.selected_turns(loss_on):
        return "no assistant turn has weight"
    return None if example.supervised_turns(loss_on) else "the completion is empty"


def _has_content(message: Message) -> bool:
    return bool(
        message["content"].strip() or message.keys() & {"tool_calls", "reasoning_content", "reasoning", "thinking"}
    )


def drop_reason(example: Example, loss_on: str) -> str | None:
    """Why an example is not trained on, as far as is known without a tokenizer; None if it is."""
    if isinstance(example, UnpairedPreference):
        return None if _answer_text(example.answer).strip() else "the completion is empty"
    if not isinstance(example, PreferencePair):
        reason = no_loss_reason(example, loss_on)
        return f"nothing to learn: {reason}" if reason else None
    chosen, rejected = _answer_text(example.chosen), _answer_text(example.rejected)
    for name, content in (("chosen", chosen), ("rejected", rejected)):
        if not content.strip():
            return f"the {name} answer is empty"
    if chosen == rejected:
        return "the chosen and the rejected answer are the same"
    return "the rejected answer begins with the chosen one" if rejected.startswith(chosen) else None


def _answer_text(answer: Plain | Conversation) -> str:
    """The text of an answer, with its tool calls."""
    if isinstance(answer, Plain):
        return answer.completion
    return "\n".join(
        message["content"] + "".join(repr(message[name]) for name in message if name not in ("role", "content"))
        for message in answer.messages[answer.first_supervised :]
    )


def common_prefix(one: Sequence[Any] | NDArray[Any], other: Sequence[Any] | NDArray[Any]) -> int:
    """The length of the common prefix of two texts or lists, or of two arrays of token ids."""
    least = min(len(one), len(other))
    if isinstance(one, np.ndarray):
        return next(iter(np.flatnonzero(one[:least] != other[:least]).tolist()), least)
    return next((number for number in range(least) if one[number] != other[number]), least)


# Fields

Fields = Mapping[str, Any]
"""The fields of a row, under loratune's names."""


class RowError(ValueError):
    """An invalid row, without its place.

    Args:
        what: What is wrong.
        fix: What to do about it.
    """

    def __init__(self, what: str, fix: str = "correct the row, or remove it"):
        super().__init__(what)
        self.fix = fix

    def at(self, where: str) -> Problem:
        """The error as a `Problem` of the row at this place."""
        return Problem(Code.DATA_FIELD, str(self), where, fix=self.fix)


def type_error(place: str, needed: str, value: Any) -> RowError:
    """The error for a value of the wrong type."""
    return RowError(f"{place} must be {needed}, got {describe(value)}")


def text(fields: Fields, name: str, place: str = "") -> str:
    """The text of a field.

    Args:
        fields: The row, or an object within it.
        name: The name of the field.
        place: The object within the row that has the field, for messages; empty for the row itself.

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
    """The text of a field; empty if it is missing or null."""
    return "" if fields.get(name) is None else text(fields, name)


def parse_json(value: Any, place: str) -> Any:
    """Parse a value that may be JSON in a string.

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
    """The value of a field; text that begins like a JSON list, as in a CSV cell, is parsed. Raises RowError."""
    value = fields.get(name)
    return parse_json(value, f"`{name}`") if isinstance(value, str) and value.lstrip()[:1] == "[" else value


def messages_or_text(fields: Fields, name: str) -> Any:
    """The value of a field; text that is a JSON list of messages, as in a CSV cell, is parsed.

    Any other text is returned unchanged, even if it begins like a list: `[1] says so`.
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
    """The whole numbers of a field. Raises RowError: it is not a list, is empty, or holds something else."""
    value = parse_list(fields, name)
    if not isinstance(value, list) or not value:
        raise type_error(f"`{name}`", "a list of whole numbers", value)
    if set(map(type, value)) != {int}:
        number, item = next((number, item) for number, item in enumerate(value, start=1) if type(item) is not int)
        kind = f"the number {item}" if isinstance(item, float) else describe(item)
        raise RowError(f"entry {number} of `{name}` must be a whole number, got {kind}")
    return tuple(value)


def describe(value: Any) -> str:
    """The kind of a value, in JSON terms, for messages."""
    if value == [] and isinstance(value, list):
        return "an empty list"
    if isinstance(value, Unreadable):
        return f"a value that cannot be read ({value.reason})"
    kinds = {type(None): "null", bool: "true or false", list: "a list", dict: "an object", str: "text"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


_SHOWN_NAMES, _SHOWN_LETTERS = 20, 60


def quote(names: Iterable[str]) -> str:
    """Names of fields for a message, in alphabetical order; long names and long lists are shortened."""
    listed = sorted(names)
    cut = [name if len(name) <= _SHOWN_LETTERS else f"{name[:_SHOWN_LETTERS]}…" for name in listed[:_SHOWN_NAMES]]
    more = f", and {len(listed) - _SHOWN_NAMES:,} more" if len(listed) > _SHOWN_NAMES else ""
    return (", ".join(f"`{name}`" for name in cut) or "(none)") + more


def parse_ids(where: str, fields: Fields) -> Ids:
    """A row with `input_ids` and optionally `labels`: for each token its own id or -100, not shifted."""
    ids = integers(fields, "input_ids")
    if min(ids) < 0:
        number = next(number for number, id in enumerate(ids, start=1) if id < 0)
        raise RowError(f"entry {number} of `input_ids` is {ids[number - 1]}, and token ids are not negative")
    mask = parse_list(fields, "attention_mask")
    if mask not in (None, "") and mask != [1] * len(ids):
        raise RowError("`attention_mask` is not a list with 1 for every token", "give `input_ids` without padding")
    if fields.get("labels") is None:
        return Ids(where, ids)
    labels = integers(fields, "labels")
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
    """The problem if an id is not in the vocabulary; otherwise None."""
    number = next((number for number, id in enumerate(example.ids, start=1) if id >= vocabulary_size), 0)
    if not number:
        return None
    what = f"entry {number} of `input_ids` is {example.ids[number - 1]}"
    what = f"{what}, but the vocabulary has {vocabulary_size} tokens, from 0 to {vocabulary_size - 1}"
    return RowError(what, "use the tokenizer of this model for `input_ids`").at(example.where)
