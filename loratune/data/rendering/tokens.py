"""A rendered row: ids, which of them are learnt, and how it is shortened."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from loratune.data.formats.examples import IGNORED as IGNORED

Span: TypeAlias = tuple[int, int]
"""Half-open range of positions that are learnt."""


@dataclass(frozen=True)
class Tokens:
    """A rendered row. ids: token ids; spans: the ranges that are learnt, in order, none of them empty.

    answer: where the last answer to a prompt begins; None in a row that is no answer to anything.
    """

    where: str
    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    answer: int | None = field(default=None, compare=False)

    @property
    def labels(self) -> list[int]:
        """One label per token: its own id where it is learnt, else -100. The first token follows nothing, so never."""
        labels = [IGNORED] * len(self.ids)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        if labels:
            labels[0] = IGNORED
        return labels

    @property
    def supervised(self) -> int:
        """How many tokens are learnt."""
        return sum(end - max(start, 1) for start, end in self.spans)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids before the last span: what `generate` would be given."""
        return self.ids[: self.spans[-1][0]]

    @property
    def completion(self) -> tuple[int, ...]:
        """The ids of the last span, its end included: what should be generated."""
        return self.ids[self.spans[-1][0] : self.spans[-1][1]]


def given(where: str, ids: Sequence[int], labels: Sequence[int] | None) -> Tokens:
    """A row that came as ids, with its labels (the id itself, or -100: not learnt) or, without any, learnt whole."""
    if labels is None:
        return Tokens(where, tuple(ids), ((0, len(ids)),) if ids else ())
    learnt = [False, *(label != IGNORED for label in labels), False]
    borders = [place for place in range(len(labels) + 1) if learnt[place] != learnt[place + 1]]
    spans = tuple(zip(borders[::2], borders[1::2], strict=True))
    return Tokens(where, tuple(ids), spans, spans[-1][0] if spans and spans[0][0] else None)


def shorten(tokens: Tokens, max_length: int, bos: int | None) -> Tokens | None:
    """Bring a row down to `max_length` tokens, or None if nothing learnable is left.

    A prompt is cut at its left, after the BOS; the last answer is kept whole, those before it whole or not at all. A
    row that is no answer is cut at its end.
    """
    excess, ids = len(tokens.ids) - max_length, tokens.ids
    if excess <= 0:
        return tokens
    if tokens.answer is None:
        spans = tuple((start, min(end, max_length)) for start, end in tokens.spans if start < max_length)
        return replace(tokens, ids=ids[:max_length], spans=spans) if spans else None
    keep = 1 if ids[0] == bos and ids.count(bos) == 1 else 0  # some templates begin every turn with it
    if tokens.answer < keep + excess:
        return None
    ids = ids[:keep] + ids[keep + excess :]
    if tokens.spans == ((0, len(tokens.ids)),):  # all is learnt, the prompt too
        return replace(tokens, ids=ids, spans=((0, max_length),), answer=tokens.answer - excess)
    spans = tuple((start - excess, end - excess) for start, end in tokens.spans if start >= keep + excess)
    return replace(tokens, ids=ids, spans=spans, answer=tokens.answer - excess) if spans else None
