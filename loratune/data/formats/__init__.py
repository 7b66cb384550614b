"""Examples: what a row of any format is once it was read; why it may have nothing to train on; and keys that compare
rows.

Reading: the fields of a file's first row → one of the usual formats (`recognition`) → every row an Example (`parsers`).

A key is bytes that are equal for two rows exactly if their contents are, or their prompts, or their completions. It may
be as long as its row: hash it to keep it.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]
"""A message as chat templates take it. `role` and `content` are always there, and always text."""

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


def drop_reason(example: Example, loss_on: str) -> str | None:
    """Why an example is not trained on, as far as that is known without a tokenizer; None if it is."""
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


# Keys

_SEPARATOR = "\ud800"
"""Separates the texts of a key; no text of a row holds it."""
_OTHER_SIDE = "\ud801".encode(errors="surrogatepass")
"""Separates the keys of preferred answers and others."""


def content_key(example: Example, folded: bool = False) -> bytes:
    """The content of an example.

    What is supervised does not count; which answer is preferred does.

    Args:
        example: Any example.
        folded: Whether any run of white space counts as one space, and as nothing at both ends of a text.
    """
    if isinstance(example, Preference):
        kind = f"{example.desirable}".encode() if isinstance(example, UnpairedPreference) else b"pair"
        return _OTHER_SIDE.join([*(content_key(side, folded) for side in sides(example)), kind])
    if isinstance(example, Ids):
        return _join_ids(example.ids)
    if isinstance(example, Plain):
        return _join([example.prompt, example.completion], folded)
    return _join(_text_parts(example.messages, example.tools), folded)


def prompt_key(example: Example, loss_on: str) -> bytes | None:
    """What an example asks: everything before what is supervised first, with white space folded.

    Args:
        example: Any example.
        loss_on: As in the configuration; with `all`, the prompt is that of `completion`.

    Returns:
        None where nothing comes before it, or nothing but white space.
    """
    if isinstance(example, Preference):
        return prompt_key(sides(example)[0], "completion")
    if isinstance(example, Plain):
        return _join([example.prompt, ""], folded=True) if example.prompt.strip() else None
    first = _first_supervised(example, loss_on)
    if first == 0:
        return None
    if isinstance(example, Ids):
        return _join_ids(example.ids[:first])
    return _join(_text_parts(example.messages[:first], example.tools), folded=True)


def completion_key(example: Example, loss_on: str) -> bytes:
    """The part of an example that `prompt_key` leaves out, with white space folded."""
    if isinstance(example, Preference):
        return _OTHER_SIDE.join(completion_key(side, "completion") for side in sides(example))
    if isinstance(example, Plain):
        return _join([example.completion, ""], folded=True)
    first = _first_supervised(example, loss_on)
    if isinstance(example, Ids):
        return _join_ids(example.ids[first:])
    return _join(_text_parts(example.messages[first:], ()), folded=True)


def _first_supervised(example: Conversation | Ids, loss_on: str) -> int:
    """The number of the first message, or token, that the loss is taken over."""
    if isinstance(example, Conversation):
        turns = example.selected_turns("completion" if loss_on == "all" else loss_on)
        return min(turns, default=len(example.messages))
    if example.labels is None:
        return 0
    return next(number for number, label in enumerate(example.labels) if label != IGNORED)


def _join_ids(ids: Sequence[int]) -> bytes:
    return repr(tuple(ids)).encode()


def _join(texts: Iterable[str], folded: bool) -> bytes:
    if folded:
        texts = (" ".join(text.split()) for text in texts)
    return _SEPARATOR.join(texts).encode(errors="surrogatepass")


def _text_parts(messages: Sequence[Message], tools: Sequence[Any]) -> Iterator[str]:
    yield ""  # at least three texts, where a Plain has two
    for message in messages:
        yield message["role"]
        yield message["content"]
        if len(message) > 2:
            yield json.dumps({name: message[name] for name in message if name != "content"}, sort_keys=True)
    if tools:
        yield json.dumps(tools, sort_keys=True)
