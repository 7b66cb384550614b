"""Encodes texts as token ids, many at once, and holds the result as tokenized rows.

Fast tokenizers encode in batches of their own; slow ones encode text by text.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeAlias

from loratune.data.formats import IGNORED as IGNORED
from loratune.errors import is_rust_panic

Span: TypeAlias = tuple[int, int]
"""Half-open range of supervised positions: of tokens in a row, or of characters in a text."""

_BATCH = 2**18
"""Characters of the texts that are encoded in one call: the tokenizer needs some hundred bytes for each."""
LONG = 2**20
"""Characters from which on a text, such as a file of one document, is encoded in pieces of at most `_BATCH`."""

_TAIL = 160
"""Characters at the end of a prompt that are encoded once more together with what follows it."""

CHOSEN, REJECTED, DESIRABLE, UNDESIRABLE = 2, -2, 1, -1
"""What a row is in preference data: an answer of a pair, of which the chosen one comes first, or an unpaired answer.
Above 0 is what is to become more likely."""

_PROBE = " Ünder 12 345\n\n\tx()  🙂 don't"
_WORD_BORDER = re.compile(r"(?<=\w)(?= \w)")
_LINE_BORDER = re.compile(r"(?<=\S)\n(?=\S)")


@dataclass(frozen=True)
class TokenizedRow:
    """A row of token ids, and which of them are supervised.

    Attributes:
        where: The place of the row in its file, for messages.
        ids: Token ids.
        spans: The supervised ranges of positions, in order, none of them empty.
        answer: The position at which the last answer to a prompt begins; None in a row that answers no prompt.
        side: What the row is in preference data, see `CHOSEN`; 0 for other data.
    """

    where: str
    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    answer: int | None = field(default=None, compare=False)
    side: int = 0

    @classmethod
    def from_ids(cls, where: str, ids: Sequence[int], labels: Sequence[int] | None) -> "TokenizedRow":
        """Returns the row of given ids. labels: the id itself or -100 at each position; None supervises all."""
        if labels is None:
            return cls(where, tuple(ids), ((0, len(ids)),) if ids else ())
        supervised = [False, *(label != IGNORED for label in labels), False]
        borders = [place for place in range(len(labels) + 1) if supervised[place] != supervised[place + 1]]
        spans = tuple(zip(borders[::2], borders[1::2], strict=True))
        return cls(where, tuple(ids), spans, spans[-1][0] if spans and spans[0][0] else None)

    @property
    def labels(self) -> list[int]:
        """One label per token: its own id where it is supervised, else -100.

        The first token is never supervised: there is no token before it to predict it from.
        """
        labels = [IGNORED] * len(self.ids)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        if labels:
            labels[0] = IGNORED
        return labels

    @property
    def supervised(self) -> int:
        """The number of supervised tokens."""
        return sum(end - max(start, 1) for start, end in self.spans)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids before the last span: what `generate` would be given."""
        return self.ids[: self.spans[-1][0]]

    @property
    def completion(self) -> tuple[int, ...]:
        """The ids of the last span, its end included: what `generate` should return."""
        return self.ids[self.spans[-1][0] : self.spans[-1][1]]


def truncate(row: TokenizedRow, max_length: int, bos: int | None) -> TokenizedRow | None:
    """Cut a row to at most `max_length` tokens.

    The prompt of a row is cut at its left, after the BOS. The last answer is kept whole; each earlier answer is kept
    whole, or is no longer supervised. A row that answers no prompt is cut at its end.

    Returns:
        The row, or None if nothing supervised is left.
    """
    excess, ids = len(row.ids) - max_length, row.ids
    if excess <= 0:
        return row
    if row.answer is None:
        spans = tuple((start, min(end, max_length)) for start, end in row.spans if start < max_length)
        return replace(row, ids=ids[:max_length], spans=spans) if spans else None
    keep = 1 if ids[0] == bos and ids.count(bos) == 1 else 0  # some templates begin every turn with the BOS
    if row.answer < keep + excess:
        return None
    ids = ids[:keep] + ids[keep + excess :]
    if row.spans == ((0, len(row.ids)),):  # the prompt is supervised too
        return replace(row, ids=ids, spans=((0, max_length),), answer=row.answer - excess)
    spans = tuple((start - excess, end - excess) for start, end in row.spans if start >= keep + excess)
    return replace(row, ids=ids, spans=spans, answer=row.answer - excess) if spans else None


def truncate_sides(rows: Sequence[TokenizedRow], max_length: int, bos: int | None) -> list[TokenizedRow] | None:
    """Cut the prompt that answers share by so much that the longest row fits, and no answer.

    Returns:
        The rows; None if an answer does not fit.
    """
    excess = max(len(row.ids) for row in rows) - max_length
    cut = [truncate(row, len(row.ids) - excess, bos) if excess > 0 else row for row in rows]
    kept = [row for row, whole in zip(cut, rows, strict=True) if row and len(row.spans) == len(whole.spans)]
    return kept if len(kept) == len(rows) else None


class TokenizerFailure(Exception):
    """The tokenizer fails on a text."""

    def __init__(self, text: str, reason: str):
        super().__init__(f"fails: {reason}")
        self.text = text


class Encoder:
    """Encodes texts with one tokenizer.

    No special token is added; a special token that a text spells out becomes its id.
    """

    def __init__(self, tokenizer: Any):
        """Try the tokenizer on a few texts.

        Raises:
            TokenizerFailure: The tokenizer fails on one of them.
        """
        self._tokenizer = tokenizer
        self._backend: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        probe, self._newline, newline_letter, letter = (
            self._encode_one(text, self._encode_slowly) for text in (_PROBE, "\n", "\na", "a")
        )
        if self._backend is not None and self._encode_one(_PROBE, self._encode_fast) != probe:
            self._backend = None
        count = len(self._newline)
        self._adds_space = newline_letter[:count] == self._newline and newline_letter[count:] != letter

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts. A text that occurs twice is encoded once; the empty text has no ids.

        A text of more than a million characters is encoded in pieces that end at words or lines.

        Raises:
            TokenizerFailure: The tokenizer fails on one of the texts.
        """
        ids_of: dict[str, list[int]] = {"": []}
        for batch in _batches([text for text in dict.fromkeys(texts) if 0 < len(text) <= LONG]):
            ids_of.update(zip(batch, self._encode_batch(batch), strict=True))
        for text in texts:
            if text not in ids_of:
                pieces = _pieces(text, without_space=self._adds_space)
                ids_of[text] = [*chain.from_iterable(self._encode_batch([piece])[0] for piece in pieces)]
        return [ids_of[text] for text in texts]

    def one(self, text: str) -> list[int]:
        """Encode one text."""
        return self([text])[0]

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[int, list[int]]]:
        """Encode prompts, each together with the text after it.

        A prompt and its continuation are encoded as one text where the ids of that text begin with those of the prompt,
        and separately where they do not. Of a long prompt only the last words are encoded a second time, because words
        do not change the ids of the words before them.

        Returns:
            For each pair the number of ids of the prompt, and the ids of both, which begin with those of the prompt.
        """
        tails = [(prompt, self._last_words(prompt), rest) for prompt, rest in pairs]
        encoded = iter(self([text for prompt, tail, rest in tails for text in (prompt, tail, tail + rest)]))
        results: list[tuple[int, list[int]]] = []
        for prompt, rest in pairs:
            ids, tail_ids, joint_ids = next(encoded), next(encoded), next(encoded)
            if ids[len(ids) - len(tail_ids) :] != tail_ids:
                tail_ids, joint_ids = ids, self.one(prompt + rest)
            joint = joint_ids[: len(tail_ids)] == tail_ids
            results.append((len(ids), ids + (joint_ids[len(tail_ids) :] if joint else self._continuation(rest))))
        return results

    def _continuation(self, text: str) -> list[int]:
        """Encode a text that follows another, without the space that some tokenizers put before every text."""
        if self._adds_space:
            ids = self.one(f"\n{text}")
            if ids[: len(self._newline)] == self._newline:
                return ids[len(self._newline) :]
        return self.one(text)

    def _last_words(self, prompt: str) -> str:
        """Returns the end of a prompt, from a border between words on; all of it if there are no words near its end."""
        borders = [
            border.end() for border in _WORD_BORDER.finditer(prompt, max(0, len(prompt) - _TAIL), len(prompt) - 8)
        ]
        return prompt[borders[-1] + self._adds_space :] if borders else prompt

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        encode = self._encode_slowly if self._backend is None else self._encode_fast
        try:
            return encode(texts)
        except BaseException as error:
            _check_is_failure(error)
            return [self._encode_one(text, encode) for text in texts]

    def _encode_fast(self, texts: list[str]) -> list[list[int]]:
        self._backend.no_truncation()
        self._backend.no_padding()
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_slowly(self, texts: list[str]) -> list[list[int]]:
        return [self._tokenizer(text, add_special_tokens=False).input_ids for text in texts]

    def _encode_one(self, text: str, encode: Callable[[list[str]], list[list[int]]]) -> list[int]:
        """Encode one text. Raises TokenizerFailure."""
        try:
            return encode([text])[0]
        except BaseException as error:
            _check_is_failure(error)
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise TokenizerFailure(text, reason) from None


def _check_is_failure(error: BaseException) -> None:
    """Raises what is not an error of the tokenizer, such as KeyboardInterrupt."""
    if not isinstance(error, Exception) and not is_rust_panic(error):
        raise error


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """Yields batches of texts of at most `_BATCH` characters together, or of a single longer text."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _pieces(text: str, *, without_space: bool) -> Iterator[str]:
    """Yields the pieces of a text; each ends at the last word or line that fits.

    without_space: the tokenizer puts a space before every text, so that of a later piece is left out.
    """
    start = 0
    while len(text) - start > _BATCH:
        window = start + _BATCH // 2, start + _BATCH
        words = [border.end() for border in _WORD_BORDER.finditer(text, *window)]
        lines = [] if words else [border.end() for border in _LINE_BORDER.finditer(text, *window)]
        end = [window[1], *lines, *words][-1]
        yield text[start:end].removeprefix(" " if start and without_space else "")
        start = end
    yield text[start:].removeprefix(" " if start and without_space else "")
