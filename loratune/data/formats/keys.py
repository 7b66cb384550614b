"""Keys of rows: bytes that are equal for two rows exactly if their contents are, or their prompts, or something else.

A key may be as long as its row: hash it to keep it.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from loratune.codes import Code
from loratune.data.formats.examples import (
    IGNORED,
    Conversation,
    Example,
    Ids,
    Message,
    Plain,
    Preference,
    RowError,
    UnpairedPreference,
    describe,
    sides,
)
from loratune.data.sources.rows import Unreadable, to_json_line

_SEPARATOR = "\ud800"
"""Stands between the texts of a key; no text of a row holds it."""
_OTHER_SIDE = "\ud801".encode(errors="surrogatepass")
"""Stands between the keys of answers that are compared."""


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


def group_key(fields: Mapping[str, Any], name: str) -> bytes | None:
    """The value of a field, as JSON: objects are equal in any order of their fields, and 1 equals 1.0.

    Args:
        fields: A row, under the names of the data.
        name: Of the field.

    Returns:
        None where the row lacks the field, or has null or NaN.

    Raises:
        RowError: The value cannot be read.
    """
    value = fields.get(name)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, Unreadable):
        raise RowError(Code.DATA_FIELD_TYPE, f"`{name}` must have a value to group by, got {describe(value)}")
    try:
        if not isinstance(value, str | int):
            value = json.loads(to_json_line({name: value}), parse_float=_number)[name]
        return json.dumps(value, sort_keys=True).encode()
    except RecursionError:
        raise RowError(Code.DATA_FIELD_JSON, f"`{name}` is nested too deeply") from None


def _number(written: str) -> float | int:
    number = float(written)
    return int(number) if number.is_integer() else number


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
