"""Attention of whole rows by torch's own kernel, for rows that are so long that it is faster than ours.

It takes products from oneDNN and MKL, and with them instructions that ours has not, such as AMX.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from loratune.kernels import upstream

Rows = Sequence[tuple[int, int]]
"""The first token of each row, and the one after its last."""

FEWEST_TOKENS = {torch.float32: 2048}
"""From so many tokens on torch's kernel is faster, by dtype; of other dtypes ours is, whatever the length. So it is for
AVX2 and AVX-512 and for heads of 64, 128 and 256, of which one to four share a head of keys:
`python scripts/measure_fallbacks.py --attention` of revision 096b964."""


def fewest_tokens(like: Tensor) -> int | None:
    """The fewest tokens of a row that torch's kernel computes for states like this tensor; None: it computes none.

    It is no measurement of the moment, so that the same seed gives the same bytes.
    """
    return FEWEST_TOKENS.get(like.dtype)


def attend(rows: Rows, results: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    """Compute attention within rows.

    Args:
        rows: Which.
        results: Receives what `reference.attend` returns, of the tokens of these rows.
        query, key, value, scale: See `reference.attend`.
    """
    groups, tokens, heads, size = query.shape
    result, total = results[0].view(tokens, groups, heads, size), results[1]
    for first, end in rows:
        output, totals = upstream.attend_to_rows(*_row(query, key, value, first, end), scale)
        result[first:end] = output.permute(2, 0, 1, 3)
        total[:, first:end] = totals.transpose(1, 2)


def attend_backward(
    rows: Rows, gradients: tuple[Tensor, Tensor, Tensor], gradient: Tensor, result: Tensor, total: Tensor,
    query: Tensor, key: Tensor, value: Tensor, scale: float,
) -> None:  # fmt: skip
    """Compute the gradients of attention within rows.

    Args:
        rows: Which.
        gradients: Those of query, key and value. That of a query is overwritten; to the others is added, as other
            tokens may attend to the rows too.
        gradient, result, total, query, key, value, scale: See `reference.attend_backward`.
    """
    groups, tokens, heads, size = query.shape
    dquery, dkey, dvalue = gradients
    for first, end in rows:
        by_head = (x.reshape(tokens, groups, heads, size)[first:end].permute(1, 2, 0, 3) for x in (gradient, result))
        outer, output = by_head
        attended = (*_row(query, key, value, first, end), output, total[:, first:end].transpose(1, 2))
        queries, keys, values = upstream.attend_to_rows_backward(outer, *attended, scale=scale)
        dquery[:, first:end] = queries.transpose(1, 2)
        for sums, parts in ((dkey, keys), (dvalue, values)):
            sums[:, first:end] += parts.sum(1, dtype=torch.float32)


def _row(query: Tensor, key: Tensor, value: Tensor, first: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a row, (groups, heads, length, size) each; the heads of a group share its keys."""
    heads = query.shape[2]
    keys, values = (x[:, None, first:end].expand(-1, heads, -1, -1) for x in (key, value))
    return query[:, first:end].transpose(1, 2), keys, values
