"""The reference implementation of the fused operations in torch, used if the C code cannot be compiled.

Arithmetic is in float32; results have the dtype of the inputs.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from loratune.kernels.layout import Layout, Scoring

SILU = 1.0, 0.0
GELU = math.sqrt(8 / math.pi), math.sqrt(8 / math.pi) * 0.044715
"""Activations x * sigmoid(linear * x + cubic * x^3), as (linear, cubic). GELU is the tanh approximation (Gemma)."""
_ROWS = 16
"""Rows of a weight that are dequantized at once, so that they stay in the processor's cache."""


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, added: float = 0.0) -> tuple[Tensor, Tensor]:
    """x: (..., size); weight: (size,). Returns `weight * x / rms(x)`, and 1 / rms(x) in float32: (...,).

    added: added to the weight. If it is 0, as in Llama, normalized values are rounded before they are multiplied by the
    weight; otherwise, as in Gemma, they are not. Zhang and Sennrich 2019.
    """
    inverse = (x.float().square().mean(-1) + epsilon).rsqrt()
    normalized = x.float() * inverse[..., None]
    if added:
        return ((added + weight.float()) * normalized).to(x.dtype), inverse
    return weight * normalized.to(x.dtype), inverse


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, added: float = 0.0) -> Tensor:
    """The gradient of x, for a frozen weight. dy: the gradient of y; inverse: the second result of `rms_norm`."""
    weighted, scale = dy.float() * (added + weight.float()), inverse[..., None]
    share = (weighted * x.float()).mean(-1, keepdim=True) * scale.square()
    return (scale * (weighted - share * x.float())).to(x.dtype)


def swiglu(both: Tensor, linear: float = 1.0, cubic: float = 0.0) -> Tensor:
    """both: (..., 2 * size), gates followed by values. Returns silu(gates) * values: (..., size). Shazeer 2020.

    linear, cubic: the coefficients of another activation, such as `GELU`.
    """
    gate, up = both.float().chunk(2, -1)
    return (gate * (gate * (linear + cubic * gate * gate)).sigmoid() * up).to(both.dtype)


def swiglu_backward(dy: Tensor, both: Tensor, linear: float = 1.0, cubic: float = 0.0) -> Tensor:
    """The gradient of `both`. dy: (..., size), the gradient of the result."""
    gate, up = both.float().chunk(2, -1)
    curve, dy = cubic * gate * gate, dy.float()
    share = (gate * (linear + curve)).sigmoid()
    dgate = dy * up * share * (1 + gate * (1 - share) * (linear + 3 * curve))
    return torch.cat([dgate, dy * gate * share], -1).to(both.dtype)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embeddings on halves, as in Llama. Su et al. 2021.

    x: (tokens, heads, size), any float dtype; cosine, sine: (tokens, size). Returns float32.
    """
    first, second = x.float().chunk(2, -1)
    return x.float() * cosine.float()[:, None] + torch.cat([-second, first], -1) * sine.float()[:, None]


def _rotate_back(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The transpose of `_rotate`."""
    first, second = (x.float() * sine.float()[:, None]).chunk(2, -1)
    return x.float() * cosine.float()[:, None] + torch.cat([second, -first], -1)


def split_heads(joined: Tensor, cosine: Tensor, sine: Tensor, groups: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split the joined projection into queries, keys and values, and apply rotary embeddings to queries and keys.

    Args:
        joined: (tokens, (groups * heads + 2 * groups) * size).
        cosine: (tokens, size), float32.
        sine: The same shape and dtype.
        groups: The number of key heads.
        heads: How many query heads share each key head.

    Returns:
        Queries (groups, tokens, heads, size); keys and values (groups, tokens, size).
    """
    tokens, size = cosine.shape
    query, key, value = torch.split(joined.reshape(tokens, -1, size), [groups * heads, groups, groups], 1)
    queries = _rotate(query, cosine, sine).to(joined.dtype).view(tokens, groups, heads, size)
    keys = _rotate(key, cosine, sine).to(joined.dtype)
    return (
        queries.transpose(0, 1).contiguous(), keys.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()
    )  # fmt: skip


def join_heads(query: Tensor, key: Tensor, value: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The gradient of `joined`, from the gradients of the results of `split_heads`."""
    groups, tokens, heads, size = query.shape
    queries = _rotate_back(query.transpose(0, 1).reshape(tokens, groups * heads, size), cosine, sine)
    keys = _rotate_back(key.transpose(0, 1), cosine, sine)
    return torch.cat([queries.to(query.dtype), keys.to(query.dtype), value.transpose(0, 1)], 1).view(tokens, -1)


def _tile(layout: Layout, bounds: list[int], heads: int) -> tuple[slice, Tensor, Tensor]:
    """The queries of a tile; the tokens of its keys (0 in place of -1); and which keys the heads of the queries attend
    to: (queries * heads, keys), bool. bounds: the row of `Layout.tiles`."""
    first, end, place, count, shared, _ = bounds
    tokens = layout.keys[place : place + count].long()
    numbers = torch.arange(count, device=tokens.device)
    low, begin, past = (column[:, None] for column in layout.spans[first:end].unbind(1))
    visible = ((numbers >= low) & (numbers < shared)) | ((numbers >= begin) & (numbers < past))
    return slice(first, end), tokens.clamp(min=0), visible.repeat_interleave(heads, 0)


def _masked_product(weights: Tensor, x: Tensor, visible: Tensor) -> Tensor:
    """`weights @ x` without contributions of invisible rows: a weight of 0 is not sufficient, as 0 * NaN is NaN.

    weights: (groups, m, n), 0 where `visible`, (m, n), is False; x: (groups, n, size).
    """
    finite = x.isfinite()
    if bool(finite.all()):
        return weights @ x
    product, rest = weights @ x.where(finite, 0), x.where(~finite, 0)
    for row in torch.nonzero(~finite.all(-1).all(0))[:, 0].tolist():
        contribution = weights[:, :, row, None] * rest[:, row, None]
        product += contribution.where(visible[:, row, None], 0)
    return product


def _scores(query: Tensor, key: Tensor, scoring: Scoring) -> Tensor:
    """The input of the softmax, (groups, queries, keys), in float32: large scores lose too much in bfloat16."""
    scores = query.float() @ key.float().transpose(1, 2) * scoring.scale
    return scoring.cap * (scores / scoring.cap).tanh() if scoring.cap else scores


def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Causal self-attention, tile by tile.

    Args:
        query: (groups, tokens, heads, size).
        key: (groups, tokens, size).
        value: The same shape.
        layout: Which tokens attend to which others; only its tiles are computed.
        scoring: How scores are computed.

    Returns:
        (tokens, groups * heads * size); and, for `attend_backward`, the logarithms of the sums of exponentials:
        (groups, tokens, heads), float32.
    """
    groups, tokens, heads, size = query.shape
    result = query.new_empty(tokens, groups, heads, size)
    total = torch.empty(groups, tokens, heads, device=query.device)
    for bounds in layout.tiles.tolist():
        queries, tokens_of, visible = _tile(layout, bounds, heads)
        scores = _scores(query[:, queries].flatten(1, 2), key[:, tokens_of], scoring)
        scores = scores.masked_fill(~visible, float("-inf"))
        sums = scores.logsumexp(-1)
        if scoring.sinks is not None:
            sums = sums.logaddexp(scoring.sinks.view(groups, heads).repeat(1, queries.stop - queries.start))
        total[:, queries] = sums.view(groups, -1, heads)
        weights = (scores - sums[..., None]).exp().masked_fill(~visible, 0)
        product = _masked_product(weights.to(value.dtype), value[:, tokens_of], visible)
        result[queries] = product.view(groups, -1, heads, size).transpose(0, 1)
    return result.view(tokens, -1), total


def attend_backward(
    gradient: Tensor,
    outputs: tuple[Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    layout: Layout,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value. Weights are recomputed, as in FlashAttention (Dao et al. 2022).

    Args:
        gradient: The gradient of the result.
        outputs: The results of `attend`; its sums include sinks.
        inputs: Query, key and value.
        layout, scoring: As in `attend`.
    """
    (result, total), (query, key, value) = outputs, inputs
    groups, tokens, heads, size = query.shape
    shape = (tokens, groups, heads, size)
    inner = (gradient.float() * result.float()).reshape(shape).sum(-1).transpose(0, 1)
    outer = gradient.reshape(shape).transpose(0, 1)
    dquery = query.new_empty(query.shape)
    dkey, dvalue = (torch.zeros(groups, tokens, size, device=query.device) for _ in range(2))
    for bounds in layout.tiles.tolist():
        tile, tokens_of, visible = _tile(layout, bounds, heads)
        queries, out, sums, shares = (part[:, tile].flatten(1, 2) for part in (query, outer, total, inner))
        tile_keys, tile_values = key[:, tokens_of], value[:, tokens_of]
        scores = _scores(queries, tile_keys, scoring)
        weights = (scores - sums[..., None]).exp().masked_fill(~visible, 0)
        dscores = weights * (out.float() @ tile_values.float().transpose(1, 2) - shares[..., None]) * scoring.scale
        if scoring.cap:
            dscores *= 1 - (scores / scoring.cap).square()
        weights, dscores = weights.to(query.dtype), dscores.masked_fill(~visible, 0).to(query.dtype)
        dquery[:, tile] = _masked_product(dscores, tile_keys, visible).view(groups, -1, heads, size)
        dvalue.index_add_(1, tokens_of, _masked_product(weights.transpose(1, 2), out, visible.t()).float())
        dkey.index_add_(1, tokens_of, _masked_product(dscores.transpose(1, 2), queries, visible.t()).float())
    return dquery, dkey.to(key.dtype), dvalue.to(value.dtype)


def add_lora(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> None:
    """Add LoRA to y in place: y += x down^T up.

    y: (tokens, out); x: (tokens, in); down: (r, in); up: (r, out), multiplied by the scaling.
    """
    y.addmm_(x @ down.t(), up)


def dequantize(y: Tensor, weight: Tensor, scales: Tensor) -> None:
    """Write a weight in 8 bit, (out, in), with the scale of each output, (out,), float32, to y: (out, in)."""
    for part, rows, factors in zip(*(torch.split(tensor, _ROWS) for tensor in (y, weight, scales)), strict=True):
        part.copy_(rows.float().mul_(factors[:, None]))


def dequantize_4bit(y: Tensor, weight: Tensor, scales: Tensor, code: Tensor) -> None:
    """Write the blocks of a weight in 4 bit to y: (blocks, size).

    weight: (blocks, size / 2), uint8, the first of two numbers in the upper half of a byte; scales: (blocks,), float32;
    code: the values of the numbers, (16,), float32.
    """
    numbers = torch.stack((weight >> 4, weight & 15), -1).view(len(scales), -1)
    y.copy_(code[numbers.int()] * scales[:, None])


def quantize_8bit(x: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in 8 bit, see `dequantize`, and the largest magnitude of each output, (out,), float32. x: (out, in)."""
    most = x.abs().amax(1).float()
    return (x.float() * torch.where(most > 0, 127 / most, 0)[:, None]).round_().to(torch.int8), most


def quantize_4bit(x: Tensor, bounds: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in 4 bit, see `dequantize_4bit`, and the largest magnitude of each block, (blocks,), float32.

    x: (blocks, size); bounds: between the values of the numbers, ascending, (15,), float32; order: the numbers between
    these bounds, (16,), uint8.
    """
    most = x.abs().amax(1).float()
    numbers = order[torch.bucketize(x.float() * (1 / most.clamp(min=1e-38))[:, None], bounds, out_int32=True)].view(-1)
    return numbers[::2] << 4 | numbers[1::2], most


def linear_8bit(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """The product with a weight in 8 bit, see `dequantize`. x: (tokens, in). Returns (tokens, out)."""
    dense = x.new_empty(weight.shape)
    dequantize(dense, weight, scales)
    return functional.linear(x, dense)


def linear_4bit(x: Tensor, weight: Tensor, scales: Tensor, code: Tensor) -> Tensor:
    """The product with a weight in 4 bit whose rows begin with a block, see `dequantize_4bit`.

    x: (tokens, in); weight: (out, in / 2). Returns (tokens, out).
    """
    blocks = weight.reshape(len(scales), -1)
    dense = x.new_empty(len(blocks), 2 * blocks.shape[1])
    dequantize_4bit(dense, blocks, scales, code)
    return functional.linear(x.contiguous(), dense.view(-1, x.shape[1]))


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """The loss of each row in nats: (rows,), float32. The logits are overwritten with its gradient.

    logits: (rows, vocabulary); targets: (rows,) int64; weights: factors of the gradients, (rows,) float32.
    """
    scores = logits.float()
    loss = functional.cross_entropy(scores, targets, reduction="none")
    gradient = scores.softmax(-1)
    gradient.scatter_add_(1, targets[:, None], gradient.new_full((len(targets), 1), -1))
    logits.copy_(gradient if weights is None else gradient * weights[:, None])
    return loss


FusedOps = Any
"""This module, or an object with functions of the same names (`CompiledOps`)."""
