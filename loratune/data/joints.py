"""How prompt and answer are joined in rows of text, which go to the model as they stand."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Self

from loratune.data.formats.examples import Plain, Single, quote

_ROWS, _LETTERS, _WORD = 200, 1 << 24, 30
"""Rows that are looked at, their letters at most, and the letters of a word."""
_WITHOUT_SPACES = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE", "BALINESE"}
"""Scripts without spaces between words, as the names of their characters begin."""


@dataclass(frozen=True)
class Joints:
    """How prompt and answer are joined in the first rows.

    Attributes:
        rows: How many rows were looked at, of whatever kind.
        together: In how many of them an answer begins with a letter or digit right behind its prompt.
        words: In how many of them two words become one.
        example: The first such word and its place.
    """

    rows: int
    together: int
    words: int
    example: str

    @classmethod
    def of(cls, rows: Iterable[Single]) -> Self:
        """Those of the first of some rows, which are read no further than needed."""
        count, together, words, example, letters = 0, 0, 0, "", 0
        for one in islice(rows, _ROWS):
            count += 1
            if isinstance(one, Plain) and one.prompt and one.completion and not one.whole:
                before, after = one.prompt[-_WORD:], one.completion[:_WORD]
                together += after[0].isalnum() and not before[-1].isspace()
                if _is_of_word(before[-1]) and _is_of_word(after[0]):
                    words += 1
                    example = example or f"{quote([before.split()[-1] + after.split()[0]])} at {one.where}"
                letters += len(one.prompt) + len(one.completion)
            if letters > _LETTERS:
                break
        return cls(count, together, words, example)

    @property
    def remark(self) -> str:
        """A line where the last word of most prompts and the first one of their answers become one word; else empty."""
        if 2 * self.words <= self.rows:
            return ""
        return (
            f"in {self.words:,} of the first {self.rows:,} rows no space stands between prompt and answer "
            f"({self.example}): put white space at the end of prompts or before answers"
        )


def _is_of_word(character: str) -> bool:
    """Whether a character belongs to a word of a script that puts spaces between words."""
    is_letter = character.isalnum() or unicodedata.category(character).startswith("M")
    return is_letter and unicodedata.name(character, "").split(" ")[0] not in _WITHOUT_SPACES
