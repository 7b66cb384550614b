"""What a row is once it was read: the three kinds of examples, and what can be told of them without a tokenizer."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from loratune.data.formats.checks import RowError

Message: TypeAlias = dict[str, Any]
"""A turn as chat templates take it. `role` and `content` are always there, and always text."""

IGNORED = -100
"""The label of a token that is not learnt."""

_BORDER = "\ud800"  # stands between two texts of a key; no text holds it


@dataclass(frozen=True)
class Plain:
    """Text that is joined raw; `completion` and the end of sequence after it are learnt.

    whole: there is no prompt to the completion, not even an empty one, and a part of it is worth learning.
    """

    where: str
    prompt: str
    completion: str
    whole: bool = False


@dataclass(frozen=True)
class Conversation:
    """Messages for the chat template; assistant turns from number `first_supervised` on are learnt.

    tools: schemas for the template, each `{type: function, function: {name, ...}}` where the data did not say
    otherwise; zero_weight: numbers of the assistant turns whose weight is 0.
    """

    where: str
    messages: tuple[Message, ...]
    first_supervised: int = 0
    tools: tuple[Any, ...] = ()
    zero_weight: frozenset[int] = frozenset()

    def supervised_turns(self, loss_on: str) -> tuple[int, ...]:
        """The numbers of the assistant turns that are learnt, counted from 0; `loss_on` as in the configuration."""
        return tuple(number for number in self.selected_turns(loss_on) if _says_something(self.messages[number]))

    def selected_turns(self, loss_on: str) -> tuple[int, ...]:
        """The numbers of the assistant turns that are asked for, those included that say nothing."""
        first = self.first_supervised if loss_on == "completion" else 0
        return tuple(
            number
            for number, message in enumerate(self.messages)
            if number >= first and message["role"] == "assistant" and number not in self.zero_weight
        )


@dataclass(frozen=True)
class Ids:
    """Token ids as they are given. labels: the id itself where it is learnt, else -100; None: all are learnt."""

    where: str
    ids: tuple[int, ...]
    labels: tuple[int, ...] | None = None


Example: TypeAlias = Plain | Conversation | Ids


def no_loss_reason(example: Example, loss_on: str) -> str | None:
    """Why nothing is learnt in an example, or None."""
    if isinstance(example, Plain):
        heard = example.completion.strip() or (loss_on == "all" and example.prompt.strip())
        return None if heard else f"the {'text' if example.whole else 'completion'} is empty"
    if isinstance(example, Ids):
        learnt = example.ids[1:] if example.labels is None else [id for id in example.labels[1:] if id != IGNORED]
        return None if learnt else "no token comes before the one that is learnt"
    if loss_on == "all":
        return None if any(map(_says_something, example.messages)) else "the completion is empty"
    if not example.selected_turns(loss_on):
        return "no assistant turn has weight"
    return None if example.supervised_turns(loss_on) else "the completion is empty"


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip() or message.keys() & {"tool_calls", "reasoning_content", "thinking"})


def check_ids(example: Ids, vocabulary_size: int) -> None:
    """Hold the ids of an example against the vocabulary.

    Raises RowError: an id that the vocabulary does not have.
    """
    if max(example.ids) >= vocabulary_size:
        number = next(number for number, id in enumerate(example.ids, start=1) if id >= vocabulary_size)
        what = f"entry {number} of `input_ids` is {example.ids[number - 1]}"
        raise RowError(f"{what}, but the vocabulary has {vocabulary_size} tokens, from 0 to {vocabulary_size - 1}")


def key(example: Example, folded: bool = False) -> bytes:
    """All that an example says, as bytes: equal for two examples if and only if they say the same.

    folded: white space counts as one space, and at the ends of a text as nothing. What is learnt does not count.
    The bytes are about as many as the example's own: hash them to keep them.
    """
    if isinstance(example, Ids):
        return repr(example.ids).encode()
    texts = [example.prompt, example.completion] if isinstance(example, Plain) else _text_parts(example)
    if folded:
        texts = (" ".join(text.split()) for text in texts)
    return _BORDER.join(texts).encode(errors="surrogatepass")


def _text_parts(example: Conversation) -> Iterator[str]:
    yield ""  # three texts at least, where plain text has two
    for message in example.messages:
        yield message["role"]
        yield message["content"]
        if len(message) > 2:
            yield json.dumps({field: message[field] for field in message if field != "content"}, sort_keys=True)
    if example.tools:
        yield json.dumps(example.tools, sort_keys=True)
