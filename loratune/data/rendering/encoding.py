"""Texts → ids, many at once: by the fast tokenizer's own batches, or one by one by a slow tokenizer."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from loratune.system.sandbox import BeyondLimit, limited

_log = logging.getLogger(__name__)

LONG = 2**20
"""Characters from which on a text is encoded in pieces: the tokenizer needs some hundred bytes for each."""

PIECE = 2**18
"""Characters of a piece, and of all the texts that are encoded in one call where a text is not longer by itself."""

TAIL = 160
"""Characters at the end of a prompt that are encoded once more together with what follows it."""

_PROBE = " Ünder 12 345\n\n\tx()  🙂 don't"
_LINE = re.compile(r"(?<=\S)\n(?=\S)")
_WORD = re.compile(r"(?<=\w)(?= \w)")


class Unencodable(Exception):
    """The tokenizer fails on a text. broken: whatever the text, or because it takes too long."""

    def __init__(self, text: str, reason: str, broken: bool):
        super().__init__(reason)
        self.text, self.broken = text, broken


class Encoder:
    """Encodes texts with one tokenizer; no special token is added, those that a text spells out are ids of theirs."""

    def __init__(self, tokenizer: Any):
        """Raises Unencodable: the tokenizer fails on any text."""
        self._tokenizer = tokenizer
        # each id once: long rows share these numbers, where each would else be an object of its own
        self._numbers: dict[int, int] = {}
        self._backend: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        slow = [self._tried([text], self._slowly)[0] for text in (_PROBE, "\n", "\na", "a")]
        probe, self._line, word, letter = slow
        if self._backend is not None and self._tried([_PROBE], self._quick) != [probe]:
            self._backend = None
        line = self._line
        self._adds_space = word[: len(line)] == line and word[len(line) :] != letter

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text. A text that comes twice is encoded once; the empty text has no ids.

        A text over a million characters is encoded in pieces that end at words or lines.
        Raises Unencodable: the tokenizer fails on one of the texts, or takes too long for it.
        """
        found: dict[str, list[int]] = {"": []}
        for batch in _batches([text for text in dict.fromkeys(texts) if 0 < len(text) <= LONG]):
            found.update(zip(batch, self._batch(batch), strict=True))
        for text in texts:
            if text not in found:
                found[text] = [*chain.from_iterable(self._batch([piece])[0] for piece in self._pieces(text))]
        return [found[text] for text in texts]

    def continued(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[int, list[int]]]:
        """For each prompt and the text after it: how many ids the prompt has, and the ids of both, the prompt's first.

        The two are encoded as one text where the prompt's ids are the beginning of that text's, and apart where they
        are not. Of a longer prompt only the last words are encoded again: words do not change those before them.
        """
        tails = [(prompt, self._last_words(prompt), rest) for prompt, rest in pairs]
        found = iter(self([text for prompt, tail, rest in tails for text in (prompt, tail, tail + rest)]))
        results: list[tuple[int, list[int]]] = []
        for prompt, rest in pairs:
            ids, end, both = next(found), next(found), next(found)
            if ids[len(ids) - len(end) :] != end:
                end, both = ids, self.one(prompt + rest)
            results.append((len(ids), ids + (both[len(end) :] if both[: len(end)] == end else self._apart(rest))))
        return results

    def one(self, text: str) -> list[int]:
        """The ids of one text."""
        return self([text])[0]

    def _apart(self, rest: str) -> list[int]:
        """The ids of a text that goes on from another: without the space that some tokenizers put before any text."""
        if self._adds_space:
            ids = self.one(f"\n{rest}")
            if ids[: len(self._line)] == self._line:
                return ids[len(self._line) :]
        return self.one(rest)

    def _pieces(self, text: str) -> Iterator[str]:
        pieces = _pieces(text)
        yield next(pieces)
        yield from (piece.removeprefix(" ") if self._adds_space else piece for piece in pieces)

    def _last_words(self, prompt: str) -> str:
        """The end of a prompt from a border of words on; all of it if it has no words near its end."""
        borders = [border.end() for border in _WORD.finditer(prompt, max(0, len(prompt) - TAIL), len(prompt) - 8)]
        return prompt[borders[-1] + self._adds_space :] if borders else prompt

    def _batch(self, texts: list[str]) -> list[list[int]]:
        encode = self._slowly if self._backend is None else self._quick
        try:
            ids = limited(lambda: encode(texts), more=_more(texts))
        except KeyboardInterrupt:
            raise
        except BaseException:  # a panic of tokenizers is no Exception
            _log.debug("texts are encoded one by one, as they fail together", exc_info=True)
            ids = [self._tried([text], encode, broken=False)[0] for text in texts]
        if len(texts[0]) < PIECE // 2:
            return ids
        known = self._numbers
        return [[known.setdefault(number, number) for number in row] for row in ids]

    def _quick(self, texts: list[str]) -> list[list[int]]:
        # only where it changes something: both wait, with the interpreter, for a thread that was given up to be done
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.padding is not None:
            self._backend.no_padding()
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _slowly(self, texts: list[str]) -> list[list[int]]:
        return [self._tokenizer(text, add_special_tokens=False).input_ids for text in texts]

    def _tried(
        self, texts: list[str], encode: Callable[[list[str]], list[list[int]]], *, broken: bool = True
    ) -> list[list[int]]:
        """The ids of one text. Raises Unencodable."""
        try:
            return limited(lambda: encode(texts), more=_more(texts))
        except KeyboardInterrupt:
            raise
        except BeyondLimit as error:
            raise Unencodable(texts[0], str(error), broken=True) from None
        except BaseException as error:  # as above
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise Unencodable(texts[0], f"fails: {reason}", broken) from None


def _more(texts: list[str]) -> int:
    """Seconds for the length of texts: a slow tokenizer takes one for some hundred thousand characters."""
    return sum(map(len, texts)) // 20_000


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """Runs of texts of at most `PIECE` characters, or of a single text."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > PIECE:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[str]:
    """The text itself, or its pieces where it is long; each piece ends at the last word or line that fits."""
    start = 0
    while len(text) - start > (PIECE if start else LONG):
        window = start + PIECE // 2, start + PIECE
        words = [border.end() for border in _WORD.finditer(text, *window)]
        lines = [] if words else [border.end() for border in _LINE.finditer(text, *window)]
        end = [window[1], *lines, *words][-1]
        yield text[start:end]
        start = end
    yield text[start:]
