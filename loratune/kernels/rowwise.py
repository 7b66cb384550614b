"""Attention within the rows of a batch, on a CPU, for attention layers that are not replaced.

For packed rows, transformers masks attention over the whole batch, so the cost is quadratic in the tokens of the batch.
Here, the rows are determined from the mask function, and attention is computed within each row: tile by tile in C if
the kernel supports the inputs, otherwise row by row in torch. Batches are padded instead in families whose masks ignore
positions (GPT-OSS, AFMoE), as packed rows would attend to each other. Attention with biases on the scores (BLOOM, MPT)
or without transformers' attention interface (Falcon) remains the model's own.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from loratune.kernels import upstream
from loratune.kernels.compiled import reference
from loratune.kernels.compiled.fused_ops import fused_ops
from loratune.kernels.layout import Layout, PerBatch, Scoring
from loratune.kernels.masks import HELD, check_known

PREFIX = "loratune"
"""The prefix of the names of all row-wise attention implementations, including those of other modules."""
UNMASKED = PREFIX
"""The attention implementation of a model whose attention layers all derive what they attend to from positions."""
STOCK = {"sdpa": upstream.sdpa_mask, "eager": upstream.eager_mask}
"""The attention implementations that can be replaced, and their masks."""
MASK_ARGUMENTS = {
    "batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask", "local_size",
    "allow_is_causal_skip", "allow_is_bidirectional_skip", "use_vmap", "device", "dtype", "config",
}  # fmt: skip
"""Supported arguments of transformers' mask functions."""
TILE = 256
"""Queries per tile of a row with a window, in torch."""
FULL_CHECK = 256
"""Up to this many tokens of a batch, the whole mask is checked, beyond that only its edges."""


@dataclass(frozen=True)
class RowMask:
    """A causal mask within rows and a window, in compact form.

    Attributes:
        positions: (tokens of all sequences,), the position of each token in its row, or in a tree of rows, see
            `Layout.of`.
        window: The most tokens that a token attends to, including itself; None: no limit.
        sequences: The number of sequences, all of the same length.
    """

    positions: Tensor
    window: int | None = None
    sequences: int = 1
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, positions: Tensor, key: tuple[int | None, int]) -> "RowMask":
        """From the positions of a batch. key: window and sequences."""
        return cls(positions, *key)

    @cached_property
    def layout(self) -> Layout:
        """The `Layout` of the mask. It is computed once for all layers with this mask."""
        return Layout.of(self.positions, self.window)

    @cached_property
    def lengths(self) -> list[int]:
        """The lengths of the packed rows, equal in all sequences. Raises ValueError: rows share prefixes."""
        positions = self.positions.view(self.sequences, -1)[0]
        begins = torch.cat([torch.ones_like(positions[:1], dtype=torch.bool), positions.diff() != 1])
        if bool((positions[begins] != 0).any()):
            raise ValueError("rows share prefixes")
        bounds = [*torch.nonzero(begins)[:, 0].tolist(), len(positions)]
        return [end - begin for begin, end in pairwise(bounds)]

    def mask(self, queries: int, keys: int, like: Tensor) -> Tensor:
        """The additive mask of the last tokens of a row: (queries, keys), in the dtype of `like`."""
        if (queries, keys) not in self._masks:
            positions = torch.arange(keys, device=like.device)
            own = positions[keys - queries :, None]
            hidden = (positions > own) | (positions <= own - (self.window or keys))
            self._masks[queries, keys] = torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, float("-inf"))
        return self._masks[queries, keys]


def attend_by_rows(base: Any, is_same: Callable[[], bool]) -> bool:
    """Make a model attend row by row, if it uses one of the `STOCK` implementations and still computes the same.

    Args:
        base: A causal language model of transformers.
        is_same: Whether the model computes the same as before, forward and backward.

    Returns:
        Whether the model now attends row by row. The caller has to restore its attention implementation later.
    """
    own = upstream.attn_implementation(base)
    if own not in STOCK:
        return False
    register(base, own)
    if is_same():
        return True
    base.set_attn_implementation(own)
    return False


def register(base: Any, own: str) -> None:
    """Make a model attend row by row. own: its attention implementation, one of `STOCK`."""
    name = f"{PREFIX}-rows-{own}"
    AttentionInterface.register(name, partial(attention, own=own))
    AttentionMaskInterface.register(name, partial(mask, own=own))
    base.set_attn_implementation(name)


def register_by_positions(base: Any, name: str, windows: Mapping[nn.Module, int | None]) -> None:
    """Make a model attend within rows derived from `position_ids`, so that rows may share prefixes.

    Args:
        base: A causal language model of transformers.
        name: The name under which the attention implementation is registered.
        windows: Layer that is not replaced and passes positions on → the most tokens that a token attends to.
    """
    batch = PerBatch(RowMask.of)

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
    ) -> tuple[Tensor, None]:
        sequences, _, length, _ = query.shape
        rows = batch.get(options["position_ids"], torch.Size((sequences, length)), (windows[module], sequences))
        result: tuple[Tensor, None] = attention(module, query, key, value, rows, **options)
        return result

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, no_mask)
    base.set_attn_implementation(name)


def no_mask(*_: Any, **__: Any) -> None:
    """A mask function of transformers that returns no mask: every layer derives the rows from the positions."""


def attends_by_rows(model: Any) -> bool:
    """Whether attention is computed within the rows of a batch rather than over all of its tokens."""
    return upstream.attn_implementation(model).startswith(PREFIX)


def mask(*, own: str = "sdpa", **arguments: Any) -> Any:
    """A mask function of transformers: returns a `RowMask` if that describes the mask, otherwise the stock mask.

    own: the attention implementation of the model.
    """
    rows = _row_mask(arguments)
    return rows if rows is not None else STOCK[own](**arguments)


def _row_mask(arguments: Mapping[str, Any]) -> RowMask | None:
    """The rows that a mask separates; None if it is another kind of mask.

    Padding on the right is only attended to by padding, so it may be treated as a part of the last row.

    Args:
        arguments: The arguments of a mask function of transformers; `mask_function` returns for the indices of
            sequence, head, query and key whether the query attends to the key.
    """
    q_length, batch_size, local_size = arguments["q_length"], arguments["batch_size"], arguments.get("local_size")
    offsets = arguments.get("q_offset", 0), arguments.get("kv_offset", 0)
    if arguments.get("use_vmap") or arguments["kv_length"] != q_length or offsets != (0, 0):
        return None
    padding, device = arguments.get("attention_mask"), arguments.get("device", "cpu")
    if not arguments.keys() <= MASK_ARGUMENTS:
        return None
    if padding is not None and bool((padding[:, 1:] > padding[:, :-1]).any()):
        return None
    sequences, positions = torch.arange(batch_size, device=device)[:, None], torch.arange(q_length, device=device)

    def attends(queries: Tensor, keys: Tensor) -> Tensor:
        shape = (queries - keys).shape
        first = (sequences.view(-1, *[1] * len(shape)), torch.zeros((), dtype=torch.long, device=device))
        return torch.as_tensor(arguments["mask_function"](*first, queries, keys)).expand(batch_size, *shape)

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
    return RowMask((positions - begins).repeat(batch_size), local_size, batch_size)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, own: str = "sdpa", **options: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers: within rows if the mask is a `RowMask`, otherwise the stock function.

    Args:
        module: The attention layer.
        query: (sequences, heads, length, size).
        key: The same, with as many heads or fewer.
        value: The same as `key`; of another size in some families.
        attention_mask: The result of `mask`.
        own: The attention implementation of the model.
        options: Keyword arguments of an attention function of transformers.

    Returns:
        (sequences, length, heads, size), and no weights.

    Raises:
        TypeError, ValueError: The layer needs something that is not supported here.
    """
    if not isinstance(attention_mask, RowMask):
        result, *_ = _stock(module, own)(module, query, key, value, attention_mask, **options)
        return result, None
    check_known(options, *HELD)
    cap, sinks, dropout, scaling = (options.get(name) for name in ("softcap", "s_aux", "dropout", "scaling"))
    causal = getattr(module, "is_causal", True) or options.get("is_causal") is not None
    if not causal or (sinks is not None and sinks.requires_grad):
        raise ValueError("attention within rows has no trained sinks, and is causal")
    scale, dropout = query.shape[-1] ** -0.5 if scaling is None else scaling, dropout or 0.0
    if not dropout and _fits(query, key, value, special=cap is not None or sinks is not None):
        return attend_in_tiles(query, key, value, attention_mask.layout, Scoring(scale, cap or 0.0, sinks)), None
    attend = partial(_sdpa, dropout_p=dropout, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    if cap is not None or sinks is not None:
        attend = partial(_as_module, module, attention_mask, dropout=dropout, scaling=scale, softcap=cap, s_aux=sinks)
    parts = (torch.split(x, attention_mask.lengths, 2) for x in (query, key, value))
    rows = [tile for q, k, v in zip(*parts, strict=True) for tile in _row(q, k, v, attention_mask, attend)]
    return torch.cat(rows, 2).transpose(1, 2).contiguous(), None


def _stock(module: Any, own: str) -> Callable[..., tuple[Tensor, Any]]:
    """The stock attention function of a layer; the function for "eager" is in the file of its class."""
    function: Callable[..., tuple[Tensor, Any]] = upstream.sdpa_attention_forward
    if own == "eager":
        function = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return function


def _fits(query: Tensor, key: Tensor, value: Tensor, *, special: bool) -> bool:
    """Whether attention is computed tile by tile: if the kernel is compiled, or torch has none (caps and sinks)."""
    size = query.shape[-1]
    alike = query.dtype == key.dtype == value.dtype and query.device.type == "cpu"
    shapes = size % 2 == 0 and key.shape[-1] == size >= value.shape[-1] and query.shape[1] % key.shape[1] == 0
    return alike and shapes and (special or fused_ops(query) is not reference)


def attend_in_tiles(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scoring: Scoring) -> Tensor:
    """Attention with the kernel of the replaced layers.

    Args:
        query: (sequences, heads, length, size).
        key: The same, with as many heads or fewer.
        value: The same as `key`, of the same size or a smaller one.
        layout: The layout of all tokens, one sequence after the other.
        scoring: How scores are computed; sinks may have any shape.

    Returns:
        (sequences, length, heads, size of a value).
    """
    sequences, heads, length, size = query.shape
    groups, rest = key.shape[1], size - value.shape[-1]
    queries = query.reshape(sequences, groups, -1, length, size).permute(1, 0, 3, 2, 4).flatten(1, 2)
    keys, values = (x.transpose(0, 1).flatten(1, 2) for x in (key, functional.pad(value, (0, rest)) if rest else value))
    sinks = None if scoring.sinks is None else scoring.sinks.detach().float().reshape(-1)
    apply: Any = _TiledAttention.apply
    result: Tensor = apply(queries, keys, values, layout, scoring._replace(sinks=sinks))
    return result.view(sequences, length, heads, size)[..., : value.shape[-1]]


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scoring: Scoring) -> Tensor:
        ctx.layout, ctx.scoring = layout, scoring
        result, total = fused_ops(query).attend(query, key, value, layout, scoring)
        ctx.save_for_backward(result, total, query, key, value)
        output: Tensor = result
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        result, total, *inputs = ctx.saved_tensors
        ops = fused_ops(gradient)
        return *ops.attend_backward(gradient, (result, total), inputs, ctx.layout, ctx.scoring), None, None


def _sdpa(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None, **options: Any) -> Tensor:
    """Torch's attention. hidden: see `RowMask.mask`; None: causal over a whole row."""
    return functional.scaled_dot_product_attention(query, key, value, hidden, is_causal=hidden is None, **options)


def _as_module(
    module: Any, mask: RowMask, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None, **options: Any
) -> Tensor:
    """Attention by the eager function in the file that defines a layer."""
    hidden = mask.mask(query.shape[2], key.shape[2], query) if hidden is None else hidden
    result: Tensor = _stock(module, "eager")(module, query, key, value, hidden[None, None], **options)[0]
    return result.transpose(1, 2)


def _row(query: Tensor, key: Tensor, value: Tensor, mask: RowMask, attend: Callable[..., Tensor]) -> Iterator[Tensor]:
    """The attention of one row, in tiles of queries if it is longer than the window."""
    length, window = query.shape[2], mask.window
    if window is None or length <= window:
        yield attend(query, key, value)
        return
    for first in range(0, length, TILE):
        end, begin = min(first + TILE, length), max(first - window + 1, 0)
        queries, keys, values = query[:, :, first:end], key[:, :, begin:end], value[:, :, begin:end]
        yield attend(queries, keys, values, mask.mask(end - first, end - begin, query))
