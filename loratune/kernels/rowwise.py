"""On the CPU: attention of torch, row by row, for layers that this room does not compute itself.

With rows end to end, transformers gives torch's attention a mask over the whole batch, whose cost is quadratic in the
tokens of the batch. Here the rows are read off the function that would make the mask, and each is attended to by
itself.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "loratune-rows"
"""What the attention function and its masks are registered as."""
PREFIX = "loratune"
"""How all names begin under which attention takes rows by themselves, those of `fitting` and `varlen` too."""
TILE = 256
"""Queries of a row with a window that are attended to at once."""
WHOLE = 256
"""Tokens of a batch up to which all of a mask is looked at, not its edges only."""


@dataclass(frozen=True)
class Rows:
    """In place of a mask: a token sees those of its row up to itself, `window` of them at most.

    lengths: of the rows, which stand end to end, the same in all sequences of a batch.
    """

    lengths: list[int]
    window: int
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def mask(self, queries: int, keys: int, like: Tensor) -> Tensor:
        """What is added to the scores of the last tokens of a row: (queries, keys), in the dtype of `like`."""
        if (queries, keys) not in self._masks:
            places = torch.arange(keys, device=like.device)
            own = places[keys - queries :, None]
            hidden = (places > own) | (places <= own - self.window)
            self._masks[queries, keys] = torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, float("-inf"))
        return self._masks[queries, keys]


def attend(base: Any, agrees: Callable[[], bool]) -> bool:
    """Have a model attend row by row, if it uses torch's attention and still agrees with what it was.

    base: a causal language model of transformers; agrees: whether it does, forward and backward. Returns whether it
    attends so now. It is for the caller to set its attention back in the end.
    """
    own = base.config._attn_implementation
    if own != "sdpa":
        return False
    register(base)
    if agrees():
        return True
    base.set_attn_implementation(own)
    return False


def register(base: Any) -> None:
    """Have a model attend row by row."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    base.set_attn_implementation(NAME)


def attends_by_rows(model: Any) -> bool:
    """Whether the cost of attention is that of the rows of a batch, not that of all of its tokens together."""
    return str(model.config._attn_implementation).startswith(PREFIX)


def mask(**given: Any) -> Any:
    """A mask function of transformers: `Rows`, where the mask is no more than that, else the mask of `sdpa`."""
    rows = _rows(**given)
    return rows if rows is not None else sdpa_mask(**given)


def _rows(
    *, batch_size: int, q_length: int, kv_length: int, mask_function: Callable[..., Tensor], q_offset: Any = 0,
    kv_offset: Any = 0, attention_mask: Tensor | None = None, local_size: int | None = None, use_vmap: bool = False,
    device: Any = "cpu", **_: Any,
) -> Rows | None:  # fmt: skip
    """What a mask shows, as rows. mask_function: from numbers of sequence, head, query and key to what is seen.

    Padding at the end of a sequence is seen by padding only, and may be taken for a part of it.
    """
    if use_vmap or q_length != kv_length or not (isinstance(q_offset, int) and q_offset == kv_offset == 0):
        return None
    if attention_mask is not None and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        return None
    sequences, places = torch.arange(batch_size, device=device)[:, None], torch.arange(q_length, device=device)

    def sees(queries: Tensor, keys: Tensor) -> Tensor:
        shape = (queries - keys).shape
        given = (sequences.view(-1, *[1] * len(shape)), torch.zeros((), dtype=torch.long, device=device))
        return torch.as_tensor(mask_function(*given, queries, keys)).expand(batch_size, *shape)

    follows = sees(places[1:], places[:-1])
    if not bool((follows == follows[:1]).all()):
        return None
    bounds = [0, *(torch.nonzero(~follows[0])[:, 0] + 1).tolist(), q_length]
    begins = torch.tensor(bounds[:-1], device=device).repeat_interleave(torch.tensor(bounds, device=device).diff())
    window = local_size or q_length
    starts = torch.maximum(begins, places - window + 1)
    before, after = starts > 0, places + 1 < q_length
    edges = [sees(places, places), sees(places, starts), ~sees(places[before], starts[before] - 1)]
    edges.append(~sees(places[after], places[after] + 1))
    if q_length <= WHOLE:
        shown = (places >= starts[:, None]) & (places <= places[:, None])
        edges.append(sees(places[:, None], places[None]) == shown)
    if not all(bool(edge.all()) for edge in edges):
        return None
    return Rows([end - begin for begin, end in pairwise(bounds)], window)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, scaling: float | None = None,
    dropout: float = 0.0, **given: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """An attention function of transformers: `sdpa`, but row by row where the mask is `Rows`.

    query: (sequences, heads, length, size); key, value: with as many heads or fewer. Returns (sequences, length, heads,
    size), and no weights. Raises ValueError: what is asked for is not known here.
    """
    if not isinstance(attention_mask, Rows):
        stock: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **given
        )
        return stock
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if given.get("softcap") is not None or given.get("position_bias") is not None or not causal:
        raise ValueError("caps, biases and sight of what follows are not known here")
    options = {"scale": scaling, "dropout_p": dropout, "enable_gqa": query.shape[1] != key.shape[1]}
    parts = (torch.split(one, attention_mask.lengths, 2) for one in (query, key, value))
    mixed = [part for q, k, v in zip(*parts, strict=True) for part in _row(q, k, v, attention_mask, options)]
    return torch.cat(mixed, 2).transpose(1, 2).contiguous(), None


def _row(query: Tensor, key: Tensor, value: Tensor, rows: Rows, options: dict[str, Any]) -> Iterator[Tensor]:
    """The attention of one row, in tiles of queries where it is longer than the window."""
    length = query.shape[2]
    if length <= rows.window:
        yield functional.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
        return
    for first in range(0, length, TILE):
        end, begin = min(first + TILE, length), max(first - rows.window + 1, 0)
        queries, keys, values = query[:, :, first:end], key[:, :, begin:end], value[:, :, begin:end]
        hidden = rows.mask(end - first, end - begin, query)
        yield functional.scaled_dot_product_attention(queries, keys, values, hidden, **options)
