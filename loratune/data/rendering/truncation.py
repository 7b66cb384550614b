"""Makes tokenized rows fit into `max_length`: truncates prompts or texts, or splits texts into blocks."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from loratune.data.rendering.spans import TokenizedRow


def truncate(row: TokenizedRow, max_length: int, bos: int | None) -> TokenizedRow | None:
    """Truncate a row to at most `max_length` tokens.

    The prompt is truncated from the left, after the BOS. The last answer is kept whole; an earlier answer is kept whole
    or is no longer supervised. A row without a prompt is truncated from the right.

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


_LEAST_BLOCK = 32
"""A shorter last block repeats as many tokens as it lacks, or it would have nothing to predict its tokens from."""


def split(row: TokenizedRow, max_length: int, stride: int) -> Iterator[TokenizedRow]:
    """Split a row without a prompt into blocks of `max_length` tokens, the last of which may be shorter.

    Together the supervised spans of the blocks are those of the row: tokens that a block repeats are not supervised.

    Args:
        row: A row of more than `max_length` tokens.
        max_length: The most tokens of a block.
        stride: Tokens that each block repeats from the one before; less than `max_length`.
    """
    new, total, spans = 0, len(row.ids), deque(row.spans)
    while new < total:
        start = max(0, new - stride)
        end = min(start + max_length, total)
        if end == total:
            start = min(start, total - min(_LEAST_BLOCK, max_length))
        own = []
        while spans and spans[0][0] < end:
            first, last = spans.popleft()
            own.append((first - start, min(last, end) - start))
            if last > end:
                spans.appendleft((end, last))
        yield replace(row, ids=row.ids[start:end], spans=tuple(own))
        new = end


def truncate_sides(rows: Sequence[TokenizedRow], max_length: int, bos: int | None) -> list[TokenizedRow] | None:
    """Truncate the shared prompt of answers equally, so that the longest row fits. Answers are never truncated.

    Returns:
        The rows; None if an answer does not fit.
    """
    excess = max(len(row.ids) for row in rows) - max_length
    cut = [truncate(row, len(row.ids) - excess, bos) if excess > 0 else row for row in rows]
    kept = [row for row, whole in zip(cut, rows, strict=True) if row and len(row.spans) == len(whole.spans)]
    return kept if len(kept) == len(rows) else None
