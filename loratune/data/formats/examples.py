"""Examples: what a row is once it was read, and the formats of rows that go through no chat template.

Whatever a field of a row may not hold is a `RowError`.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from loratune.codes import Code
from loratune.data.sources.rows import Unreadable
from loratune.errors import Problem

Fields = Mapping[str, Any]
"""The fields of a row, under the names that loratune gives to them."""


class RowError(ValueError):
    """What is wrong with one row, without its place.

    Args:
        code: What kind of problem it is.
        what: What is wrong.
        fix: What to do about it.
    """

    def __init__(self, code: Code, what: str, fix: str = "correct the row, or remove it"):
        super().__init__(what)
        self.code, self.fix = code, fix

    def at(self, where: str) -> Problem:
        """As a problem of the row at this place."""
        return Problem(self.code, str(self), where, fix=self.fix)


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
        raise RowError(Code.DATA_FIELD_TYPE, f"{field} must be text, got {describe(value)}")
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
        value: Text is parsed, everything else is returned as it is.
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
        raise RowError(Code.DATA_FIELD_JSON, f"{place} must be valid JSON") from None
    except TypeError as error:
        raise RowError(Code.DATA_FIELD_JSON, f"{place} cannot be written as JSON: {error}") from None
    return value


def _surrogate_error(place: str) -> RowError:
    return RowError(Code.DATA_SURROGATE, f"{place} holds a lone surrogate, which is not a character")


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
    """The whole numbers of a field, in order.

    Raises:
        RowError: The field is not a list, is empty, or holds something else.
    """
    value = parse_list(fields, name)
    if not isinstance(value, list) or not value:
        raise RowError(Code.DATA_FIELD_TYPE, f"`{name}` must be a list of whole numbers, got {describe(value)}")
    if set(map(type, value)) != {int}:
        number, item = next((number, item) for number, item in enumerate(value, start=1) if type(item) is not int)
        item_kind = f"the number {item}" if isinstance(item, float) else describe(item)
        what = f"entry {number} of `{name}` must be a whole number, got {item_kind}"
        raise RowError(Code.DATA_FIELD_TYPE, what)
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


Message: TypeAlias = dict[str, Any]
"""A message as chat templates take it. `role` and `content` are always there, and always text."""

IGNORED = -100
"""The label of a token that is not supervised."""


@dataclass(frozen=True)
class Plain:
    """Text without a chat template: the prompt and the completion, joined unchanged.

    Attributes:
        where: The place of the row.
        prompt: Not supervised, unless `loss_on` is `all`.
        completion: Supervised, with the end of sequence behind it.
        whole: Whether the row is one text without any prompt; such a text may be truncated.
    """

    where: str
    prompt: str
    completion: str
    whole: bool = False


@dataclass(frozen=True)
class Conversation:
    """Messages for the chat template.

    Attributes:
        where: The place of the row.
        messages: In order.
        first_supervised: The first message that belongs to the completion: with `loss_on` `completion`, only assistant
            turns from it on are supervised.
        tools: Schemas for the template, usually `{type: function, function: {name, ...}}`.
        zero_weight: Numbers, from 0, of the assistant turns whose weight is 0.
    """

    where: str
    messages: tuple[Message, ...]
    first_supervised: int = 0
    tools: tuple[Any, ...] = ()
    zero_weight: frozenset[int] = frozenset()

    def supervised_turns(self, loss_on: str) -> tuple[int, ...]:
        """The numbers, from 0, of the assistant turns that the loss is taken over. loss_on: as in the configuration."""
        return tuple(number for number in self.selected_turns(loss_on) if _has_content(self.messages[number]))

    def selected_turns(self, loss_on: str) -> tuple[int, ...]:
        """The assistant turns that `loss_on` and the weights select, the empty ones among them."""
        first = self.first_supervised if loss_on == "completion" else 0
        return tuple(
            number
            for number, message in enumerate(self.messages)
            if number >= first and message["role"] == "assistant" and number not in self.zero_weight
        )


@dataclass(frozen=True)
class Ids:
    """Token ids as the data has them.

    Attributes:
        where: The place of the row.
        ids: Token ids, without padding.
        labels: For each token its own id where it is supervised, else -100; None: all are supervised.
    """

    where: str
    ids: tuple[int, ...]
    labels: tuple[int, ...] | None = None


Single: TypeAlias = Plain | Conversation | Ids
"""What becomes one row of tokens."""


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt.

    Attributes:
        where: The place of the row.
        chosen: The prompt with the better one.
        rejected: The prompt with the other one.
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
        desirable: Whether it is desirable.
    """

    where: str
    answer: Plain | Conversation
    desirable: bool


Preference: TypeAlias = PreferencePair | UnpairedPreference
"""Preference data."""

Example: TypeAlias = Single | Preference


def sides(example: Example) -> tuple[Single, ...]:
    """What of an example becomes rows of tokens: of a pair both answers, the chosen one first."""
    if isinstance(example, PreferencePair):
        return example.chosen, example.rejected
    return (example.answer,) if isinstance(example, UnpairedPreference) else (example,)


def no_loss_reason(example: Single, loss_on: str) -> str | None:
    """Why no token of an example is supervised, as far as that is known without a tokenizer; None if one is."""
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
    return bool(message["content"].strip() or message.keys() & {"tool_calls", "reasoning_content", "thinking"})


def check_ids(example: Ids, vocabulary_size: int) -> None:
    """Raises RowError: an id that the vocabulary does not have."""
    if max(example.ids) >= vocabulary_size:
        number = next(number for number, id in enumerate(example.ids, start=1) if id >= vocabulary_size)
        what = f"entry {number} of `input_ids` is {example.ids[number - 1]}"
        what = f"{what}, but the vocabulary has {vocabulary_size} tokens, from 0 to {vocabulary_size - 1}"
        raise RowError(Code.DATA_TOKEN_ID, what, "use the tokenizer of this model for `input_ids`")


def parse_prompt_completion(where: str, fields: Fields) -> Plain:
    """A row with `prompt` and `completion` as text. Raises RowError."""
    return Plain(where, text(fields, "prompt"), text(fields, "completion"))


def parse_text(where: str, fields: Fields) -> Plain:
    """A row with `text`, all of it supervised. Raises RowError."""
    return Plain(where, "", text(fields, "text"), whole=True)


def parse_ids(where: str, fields: Fields) -> Ids:
    """A row with `input_ids`, and perhaps `labels`: for each token its own id or -100, not shifted.

    Raises:
        RowError: They are something else, or no token is supervised.
    """
    ids = integers(fields, "input_ids")
    if min(ids) < 0:
        number = next(number for number, id in enumerate(ids, start=1) if id < 0)
        what = f"entry {number} of `input_ids` is {ids[number - 1]}, and token ids are not negative"
        raise RowError(Code.DATA_TOKEN_ID, what)
    mask = parse_list(fields, "attention_mask")
    if mask not in (None, "") and (not isinstance(mask, list) or len(mask) != len(ids)):
        mask_kind = f"{len(mask)} entries" if isinstance(mask, list) else describe(mask)
        what = f"`attention_mask` must have {len(ids)} entries, as `input_ids` has, and is {mask_kind}"
        raise RowError(Code.DATA_LENGTHS, what)
    if isinstance(mask, list) and mask.count(1) != len(mask):
        what = "`attention_mask` is not 1 for every token"
        raise RowError(Code.DATA_PADDING, what, "give `input_ids` without padding")
    if fields.get("labels") is None:
        return Ids(where, ids)
    labels = integers(fields, "labels")
    if len(labels) != len(ids):
        raise RowError(Code.DATA_LENGTHS, f"`labels` has {len(labels)} entries, but `input_ids` has {len(ids)}")
    if set(labels) == {IGNORED}:
        raise RowError(Code.DATA_NO_ANSWER, "no token is supervised: all `labels` are -100")
    for number, (label, id) in enumerate(zip(labels, ids, strict=True), start=1):
        if label not in (id, IGNORED):
            what = f"entry {number} of `labels` is {label}, but that of `input_ids` is {id}"
            raise RowError(Code.DATA_LABELS, what, "set each label to the id at its own place, or to -100")
    return Ids(where, ids, labels)
