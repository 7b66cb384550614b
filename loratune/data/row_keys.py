"""The keys by which rows are compared (content, prompt, completion, group and system message), and their hashes."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from loratune.data import formats
from loratune.data.formats import Conversation, Example, Ids, Message, Plain, Preference, UnpairedPreference, sides
from loratune.data.sources.rows import Row, Unreadable, line_of, to_json_line

HASHED_ROW = np.dtype([(name, np.int64) for name in (
    "content", "folded", "line", "prompt", "completion", "group", "system",
)])  # fmt: skip
"""What is kept of a row in memory, 56 bytes: a hash of the content, a hash of the content with white space folded, the
line or row, and hashes of the prompt, the completion, the value of `group_by` and the system message. For a row without
a prompt, or without a value to group by, that hash is replaced by the folded hash of the content; without a system
message, by 0."""

CONTENT_HASH = "blake2b-64 of content_key, 1"
"""Name and version of the content hash, stored with the hashes. Raise the number whenever the hashes change."""


def hash_row(example: Example, row: Row, loss_on: str, group_by: str | None) -> tuple[int, ...]:
    """The values of `HASHED_ROW`.

    Args:
        example: The row as an example.
        row: The row.
        loss_on: As in the configuration.
        group_by: The field that rows are grouped by.

    Raises:
        RowError: The value of `group_by` cannot be read.
    """
    content, folded = _hash(content_key(example)), _hash(content_key(example, folded=True))
    prompt = prompt_key(example, loss_on)
    group = group_key(row.values, group_by) if group_by is not None else None
    prompt_hash, group_hash = (folded if key is None else _hash(key) for key in (prompt, group))
    completion = _hash(completion_key(example, loss_on))
    system = _hash(text.encode()) if (text := formats.system_message(example)) else 0
    return content, folded, int(line_of(row.where)), prompt_hash, completion, group_hash, system


def _hash(content: bytes) -> int:
    """64 bits of BLAKE2b as a signed integer, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def group_key(fields: Mapping[str, Any], name: str) -> bytes | None:
    """The value of a field, as JSON: objects are equal in any order of their fields, and 1 equals 1.0.

    Args:
        fields: A row, under the names of the data.
        name: The name of the field.

    Returns:
        The key; None if the field is missing, null or NaN.

    Raises:
        RowError: The value cannot be read.
    """
    value = fields.get(name)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, Unreadable):
        raise formats.type_error(f"`{name}`", "a value to group by", value)
    try:
        if not isinstance(value, str | int):
            line = to_json_line({name: value})
            value = json.loads(line, parse_float=lambda text: int(x) if (x := float(text)).is_integer() else x)[name]
        return json.dumps(value, sort_keys=True).encode()
    except RecursionError:
        raise formats.RowError(f"`{name}` is nested too deeply") from None


# Keys: bytes that are equal for two rows if and only if their contents, prompts or completions are equal

_SEPARATOR = "\ud800"
"""Separates the texts of a key; no text of a row contains it."""
_WHITE_SPACE, _PIECE = re.compile(r"\s"), 1 << 20
"""Where a long text can be divided, and into pieces of about how many characters."""
_OTHER_SIDE = "\ud801".encode(errors="surrogatepass")
"""Separates the keys of preferred answers and others."""


def content_key(example: Example, folded: bool = False) -> bytes:
    """The content of an example.

    It depends on which answer is preferred, but not on which parts are supervised.

    Args:
        example: Any example.
        folded: Whether white space is folded: runs become one space, and texts are stripped.
    """
    if isinstance(example, Preference):
        kind = f"{example.desirable}".encode() if isinstance(example, UnpairedPreference) else b"pair"
        return _OTHER_SIDE.join([*(content_key(side, folded) for side in sides(example)), kind])
    if isinstance(example, Ids):
        return _join_ids(example.ids)
    if isinstance(example, Plain):
        return _join([example.prompt, example.completion], folded)
    return _join(_text_parts(example.messages, _settings(example)), folded)


def prompt_key(example: Example, loss_on: str) -> bytes | None:
    """The prompt of an example: everything before the first supervised part, with white space folded.

    Args:
        example: Any example.
        loss_on: As in the configuration; `all` is treated as `completion`.

    Returns:
        The key; None if the prompt is empty or white space.
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
    return _join(_text_parts(example.messages[:first], _settings(example)), folded=True)


def completion_key(example: Example, loss_on: str) -> bytes:
    """The part of an example that is not in `prompt_key`, with white space folded."""
    if isinstance(example, Preference):
        return _OTHER_SIDE.join(completion_key(side, "completion") for side in sides(example))
    if isinstance(example, Plain):
        return _join([example.completion, ""], folded=True)
    first = _first_supervised(example, loss_on)
    if isinstance(example, Ids):
        return _join_ids(example.ids[first:])
    return _join(_text_parts(example.messages[first:], ()), folded=True)


def _first_supervised(example: Conversation | Ids, loss_on: str) -> int:
    """The number of the first supervised message or token."""
    if isinstance(example, Conversation):
        turns = example.selected_turns("completion" if loss_on == "all" else loss_on)
        return min(turns, default=len(example.messages))
    if example.labels is None:
        return 0
    return next(number for number, label in enumerate(example.labels) if label != formats.IGNORED)


def _join_ids(ids: Sequence[int]) -> bytes:
    return repr(tuple(ids)).encode()


def _join(texts: Iterable[str], folded: bool) -> bytes:
    if folded:
        texts = (" ".join(filter(None, _folded_pieces(text))) for text in texts)
    return _SEPARATOR.join(texts).encode(errors="surrogatepass")


def _settings(chat: Conversation) -> tuple[Any, ...]:
    """What a row gives to the template besides its messages."""
    return (*chat.tools, dict(chat.arguments)) if chat.arguments else chat.tools


def _folded_pieces(text: str) -> Iterator[str]:
    """The text with single spaces between words, in pieces: a list of all words takes ten times its memory."""
    start = 0
    while start < len(text):
        border = _WHITE_SPACE.search(text, start + _PIECE)
        end = border.start() if border else len(text)
        yield " ".join(text[start:end].split())
        start = end


def _text_parts(messages: Sequence[Message], settings: Sequence[Any]) -> Iterator[str]:
    yield ""  # at least three texts, where a Plain has two
    for message in messages:
        yield message["role"]
        yield message["content"]
        if len(message) > 2:
            yield json.dumps({name: message[name] for name in message if name != "content"}, sort_keys=True)
    if settings:
        yield json.dumps(settings, sort_keys=True)
