"""Encoding: texts → token ids, in batches, without special tokens, so that a prompt's ids begin those of its row."""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from loratune.errors import is_rust_panic

_BATCH = 2**18
"""Characters that are encoded in one call: the tokenizer needs a few hundred bytes of memory per character."""
LONG = 2**20
"""A text of more characters, such as a file of one document, is encoded in pieces of at most `_BATCH`."""

_TAIL = 160  # characters at the end of a prompt that are encoded once more together with what follows it
_PROBE = " Ünder 12 345\n\n\tx()  🙂 don't"
_WORD_BORDER = re.compile(r"(?<=\w)(?= \w)")
_LINE_BORDER = re.compile(r"(?<=\S)\n(?=\S)")


class TokenizerFailure(Exception):
    """The tokenizer fails on a text."""

    def __init__(self, text: str, reason: str):
        super().__init__(f"fails: {reason}")
        self.text = text


class Encoder:
    """Encodes texts with one tokenizer. No special tokens are added; those written in a text become their ids."""

    def __init__(self, tokenizer: Any):
        """Test the tokenizer on a few texts. Raises TokenizerFailure."""
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
        """Encode texts, very long ones in pieces that end at words or lines. Raises TokenizerFailure."""
        ids_of: dict[str, list[int]] = {"": []}
        for batch in _batches([text for text in dict.fromkeys(texts) if 0 < len(text) <= LONG]):
            ids_of.update(zip(batch, self._encode_batch(batch), strict=True))
        for text in texts:
            if text not in ids_of:
                pieces, same = _pieces(text, without_space=self._adds_space), dict[int, int]()
                ids = chain.from_iterable(self._encode_batch([piece])[0] for piece in pieces)
                ids_of[text] = [same.setdefault(id, id) for id in ids]  # a number in Python takes 32 bytes
        return [ids_of[text] for text in texts]

    def one(self, text: str) -> list[int]:
        """Encode one text."""
        return self([text])[0]

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[int, list[int]]]:
        """Encode prompts with the text after each: jointly if the joint ids begin with the ids of the prompt, otherwise
        separately. Only the last words of a long prompt are encoded a second time, because words do not change the ids
        of the words before them.

        Returns:
            For each pair the number of ids of the prompt, and the ids of both.
        """
        tails = [(prompt, self._last_words(prompt), rest) for prompt, rest in pairs]
        encoded = iter(self([text for prompt, tail, rest in tails for text in (prompt, tail, tail + rest)]))
        results: list[tuple[int, list[int]]] = []
        for prompt, rest in pairs:
            ids, tail_ids, joint_ids = next(encoded), next(encoded), next(encoded)
            if ids[len(ids) - len(tail_ids) :] != tail_ids:
                tail_ids, joint_ids = ids, self.one(prompt + rest)
            joint = joint_ids[: len(tail_ids)] == tail_ids
            both = ids + (joint_ids[len(tail_ids) :] if joint else self._continuation(rest)) if prompt else joint_ids
            results.append((len(ids), both))
        return results

    def _continuation(self, text: str) -> list[int]:
        """Encode a text that follows another, without the space that some tokenizers put before every text."""
        if self._adds_space:
            ids = self.one(f"\n{text}")
            if ids[: len(self._newline)] == self._newline:
                return ids[len(self._newline) :]
        return self.one(text)

    def _last_words(self, prompt: str) -> str:
        """Returns the end of a prompt, starting at a word boundary; all of it if there are no words near its end."""
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
        """Raises TokenizerFailure."""
        try:
            return encode([text])[0]
        except BaseException as error:
            _check_is_failure(error)
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise TokenizerFailure(text, reason) from None


def _check_is_failure(error: BaseException) -> None:
    """Re-raises anything that is not an error of the tokenizer, such as KeyboardInterrupt."""
    if not isinstance(error, Exception) and not is_rust_panic(error):
        raise error


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """Yields batches of texts of at most `_BATCH` characters in total, or of a single longer text."""
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

    without_space: drop the leading space of later pieces, as the tokenizer adds a space before every text.
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
