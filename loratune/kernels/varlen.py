"""On a GPU: rows that stand end to end, by torch's own kernel for rows of unequal length."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from loratune.kernels.replacing import PerBatch

NAME = "loratune-varlen"
"""What the attention function is registered as."""


@dataclass(frozen=True)
class Ends:
    """Where the rows of a batch end. cumulative: (rows + 1,) int32, from 0 to all tokens; longest: of a row."""

    cumulative: Tensor
    longest: int

    @classmethod
    def of(cls, positions: Tensor, _: None = None) -> "Ends":
        """positions: (tokens,), 0 where a row begins."""
        begins = torch.nonzero(positions[1:] == 0)[:, 0] + 1
        bounds = torch.cat([begins.new_zeros(1), begins, begins.new_full((1,), len(positions))])
        return cls(bounds.to(torch.int32), int(bounds.diff().max()))


class RowAttention:
    """An attention function of transformers. Batches come without a cache, and padded at the end of rows, if at all."""

    def __init__(self) -> None:
        self.windowed = False
        """Whether a layer has asked for a window."""
        self._ends = PerBatch(Ends.of)

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *,
        scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
        position_ids: Tensor, softcap: float | None = None, s_aux: Tensor | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """query: (rows, heads, length, size); key, value: with as many heads or fewer. Returns (rows, length, heads,
        size), and no weights. Raises ValueError: what the kernel cannot do is asked for."""
        if softcap is not None or s_aux is not None or dropout or attention_mask is not None:
            raise ValueError("caps, sinks, dropout and masks are not known here")
        self.windowed |= sliding_window is not None
        rows, heads, length, size = query.shape
        ends = self._ends.of(position_ids, torch.Size((rows, length)))
        queries, keys, values = (one.transpose(1, 2).reshape(rows * length, -1, size) for one in (query, key, value))
        window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
        mixed: Any = varlen_attn(
            queries, keys, values, ends.cumulative, ends.cumulative, ends.longest, ends.longest, scale=scaling,
            window_size=window, enable_gqa=True,
        )  # fmt: skip
        return mixed.view(rows, length, heads, size), None
