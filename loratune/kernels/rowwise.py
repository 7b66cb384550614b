"""Attention of torch row by row, on a CPU, for layers of attention that are not replaced.

For packed rows transformers gives torch's attention a mask over the whole batch, so that the cost is quadratic in the
tokens of the batch. Here the rows are determined from the function that would make the mask, and attention is computed
for each row by itself.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from loratune.kernels import upstream

NAME = "loratune-rows"
"""The name that the attention function and its masks are registered under."""
PREFIX = "loratune"
"""What the names of all attention implementations begin with that go row by row, also those of other modules."""
TILE = 256
"""Queries of a row with a window that are computed at once."""
FULL_CHECK = 256
"""Up to so many tokens of a batch the whole mask is checked, and not only its edges."""


@dataclass(frozen=True)
class RowMask:
    """Stands for a mask by which a token attends to those of its row up to itself, within a window.

    Attributes:
        lengths: Of the packed rows, the same in all sequences of a batch.
        window: How many tokens a token attends to at most, itself included.
    """

    lengths: list[int]
    window: int
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def mask(self, queries: int, keys: int, like: Tensor) -> Tensor:
        """What is added to the scores of the last tokens of a row: (queries, keys), in the dtype of `like`."""
        if (queries, keys) not in self._masks:
            positions = torch.arange(keys, device=like.device)
            own = positions[keys - queries :, None]
            hidden = (positions > own) | (positions <= own - self.window)
            self._masks[queries, keys] = torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, float("-inf"))
        return self._masks[queries, keys]


def attend_by_rows(base: Any, is_same: Callable[[], bool]) -> bool:
    """Have a model attend row by row, if it uses torch's attention and then computes the same.

    Args:
        base: A causal language model of transformers.
        is_same: Whether the model computes the same as before, forward and backward.

    Returns:
        Whether the model now attends row by row. The caller sets its attention implementation back in the end.
    """
    own = upstream.attn_implementation(base)
    if own != "sdpa":
        return False
    register(base)
    if is_same():
        return True
    base.set_attn_implementation(own)
    return False


def register(base: Any) -> None:
    """Have a model attend row by row."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    base.set_attn_implementation(NAME)


def attends_by_rows(model: Any) -> bool:
    """Whether attention is computed within the rows of a batch, and not over all of its tokens together."""
    return upstream.attn_implementation(model).startswith(PREFIX)


def mask(**arguments: Any) -> Any:
    """A mask function of transformers: a `RowMask` if that describes the mask, else the mask of `sdpa`."""
    rows = _row_mask(**arguments)
    return rows if rows is not None else upstream.sdpa_mask(**arguments)


def _row_mask(
    *, batch_size: int, q_length: int, kv_length: int, mask_function: Callable[..., Tensor], q_offset: Any = 0,
    kv_offset: Any = 0, attention_mask: Tensor | None = None, local_size: int | None = None, use_vmap: bool = False,
    device: Any = "cpu", **_: Any,
) -> RowMask | None:  # fmt: skip
    """The rows that a mask separates; None if it is another kind of mask.

    Only padding attends to padding at the end of a sequence, so that it may count as a part of the last row.

    Args:
        batch_size, q_length, kv_length, ...: As transformers calls a mask function.
        mask_function: Takes the numbers of sequence, head, query and key to whether the query attends to the key.
    """
    if use_vmap or q_length != kv_length or not (isinstance(q_offset, int) and q_offset == kv_offset == 0):
        return None
    if attention_mask is not None and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        return None
    sequences, positions = torch.arange(batch_size, device=device)[:, None], torch.arange(q_length, device=device)

    def attends(queries: Tensor, keys: Tensor) -> Tensor:
        shape = (queries - keys).shape
        first = (sequences.view(-1, *[1] * len(shape)), torch.zeros((), dtype=torch.long, device=device))
        return torch.as_tensor(mask_function(*first, queries, keys)).expand(batch_size, *shape)

    continues = attends(positions[1:], positions[:-1])
    if not bool((continues == continues[:1]).all()):
        return None
    bounds = [0, *(torch.nonzero(~continues[0])[:, 0] + 1).tolist(), q_length]
    begins = torch.tensor(bounds[:-1], device=device).repeat_interleave(torch.tensor(bounds, device=device).diff())
    window = local_size or q_length
    starts = torch.maximum(begins, positions - window + 1)
    before, after = starts > 0, positions + 1 < q_length
    edges = [attends(positions, positions), attends(positions, starts)]
    edges.append(~attends(positions[before], starts[before] - 1))
    edges.append(~attends(positions[after], positions[after] + 1))
    if q_length <= FULL_CHECK:
        visible = (positions >= starts[:, None]) & (positions <= positions[:, None])
        edges.append(attends(positions[:, None], positions[None]) == visible)
    if not all(bool(edge.all()) for edge in edges):
        return None
    return RowMask([end - begin for begin, end in pairwise(bounds)], window)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, scaling: float | None = None,
    dropout: float = 0.0, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """An attention function of transformers: row by row where there is a `RowMask`, else the stock one.

    Args:
        module: The layer of attention.
        query: (sequences, heads, length, size).
        key: The same, with as many heads or fewer.
        value: The same as `key`.
        attention_mask: What `mask` returned.

    Returns:
        (sequences, length, heads, size), and no weights.

    Raises:
        ValueError: The layer needs something that is not computed here.
    """
    if not isinstance(attention_mask, RowMask):
        stock: tuple[Tensor, None] = upstream.sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return stock
    causal = others.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if others.get("softcap") is not None or others.get("position_bias") is not None or not causal:
        raise ValueError("attention by rows has no caps and no biases, and is causal")
    options = {"scale": scaling, "dropout_p": dropout, "enable_gqa": query.shape[1] != key.shape[1]}
    parts = (torch.split(x, attention_mask.lengths, 2) for x in (query, key, value))
    rows = [tile for q, k, v in zip(*parts, strict=True) for tile in _row(q, k, v, attention_mask, options)]
    return torch.cat(rows, 2).transpose(1, 2).contiguous(), None


def _row(query: Tensor, key: Tensor, value: Tensor, mask: RowMask, options: dict[str, Any]) -> Iterator[Tensor]:
    """The attention of one row, in tiles of queries if it is longer than the window."""
    length = query.shape[2]
    if length <= mask.window:
        yield functional.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
        return
    for first in range(0, length, TILE):
        end, begin = min(first + TILE, length), max(first - mask.window + 1, 0)
        queries, keys, values = query[:, :, first:end], key[:, :, begin:end], value[:, :, begin:end]
        hidden = mask.mask(end - first, end - begin, query)
        yield functional.scaled_dot_product_attention(queries, keys, values, hidden, **options)
