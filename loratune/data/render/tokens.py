"""A rendered row: ids, which of them are learnt, and how it is shortened."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

IGNORED = -100

Span: TypeAlias = tuple[int, int]
"""Half-open range of positions that are learnt."""


@dataclass(frozen=True)
class Tokens:
    """A rendered row. ids: token ids; spans: the ranges that are learnt, in order, none of them empty."""

    where: str
    ids: tuple[int, ...]
    spans: tuple[Span, ...]

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
    return Tokens(where, tuple(ids), tuple(zip(borders[::2], borders[1::2], strict=True)))


def shorten(tokens: Tokens, max_length: int, bos: int | None) -> Tokens | None:
    """Bring a row down to `max_length` tokens, or None if nothing learnable is left.

    A prompt is cut at its left, after the BOS; answers are kept whole or, the earliest first, not at all.
    A row that is learnt from its first token on has no prompt, and is cut at its end.
    """
    excess = len(tokens.ids) - max_length
    if excess <= 0:
        return tokens
    if not tokens.spans:
        return None
    keep = 1 if tokens.ids[0] == bos else 0
    if tokens.spans[0][0] <= keep:
        spans = tuple((start, min(end, max_length)) for start, end in tokens.spans if start < max_length)
        return replace(tokens, ids=tokens.ids[:max_length], spans=spans)
    spans = tuple((start - excess, end - excess) for start, end in tokens.spans if start >= keep + excess)
    ids = tokens.ids[:keep] + tokens.ids[keep + excess :]
    return replace(tokens, ids=ids, spans=spans) if spans else None
