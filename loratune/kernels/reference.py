"""The passes between the matrix products of a step, in plain torch: the reference of those in C, and what is used where
that cannot be built. Arithmetic is in float32; results have the dtype of what they are made of.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x: (..., size); weight: (size,). Returns `weight * x / rms(x)`, and 1 / rms(x) in float32: (...,).

    As in Llama, the normed values are rounded before they are weighted. Zhang and Sennrich 2019.
    """
    inverse = (x.float().square().mean(-1) + epsilon).rsqrt()
    return weight * (x.float() * inverse[..., None]).to(x.dtype), inverse


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """The gradient with respect to x, for a weight that is frozen. dy: that of the result; inverse: its second part."""
    weighted, scale = dy.float() * weight.float(), inverse[..., None]
    share = (weighted * x.float()).mean(-1, keepdim=True) * scale.square()
    return (scale * (weighted - share * x.float())).to(x.dtype)


def swiglu(both: Tensor) -> Tensor:
    """both: (..., 2 * size), gates and then values. Returns silu(gates) * values: (..., size). Shazeer 2020."""
    gate, up = both.float().chunk(2, -1)
    return (functional.silu(gate) * up).to(both.dtype)


def swiglu_backward(dy: Tensor, both: Tensor) -> Tensor:
    """The gradient with respect to `both`. dy: (..., size), that of the result."""
    gate, up = both.float().chunk(2, -1)
    share, dy = gate.sigmoid(), dy.float()
    dgate = dy * up * share * (1 + gate * (1 - share))
    return torch.cat([dgate, dy * gate * share], -1).to(both.dtype)


def _turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x: (tokens, heads, size), any float dtype; cosine, sine: (tokens, size). Su et al. 2021, halves as in Llama."""
    first, second = x.float().chunk(2, -1)
    return x.float() * cosine.float()[:, None] + torch.cat([-second, first], -1) * sine.float()[:, None]


def _turn_back(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The transpose of `_turn`."""
    first, second = (x.float() * sine.float()[:, None]).chunk(2, -1)
    return x.float() * cosine.float()[:, None] + torch.cat([second, -first], -1)


def split_heads(joined: Tensor, cosine: Tensor, sine: Tensor, groups: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as they come from one product, turned and laid out head by head.

    joined: (tokens, (groups * heads + 2 * groups) * size): `heads` query heads share each of `groups` key heads.
    cosine, sine: (tokens, size) float32. Returns queries (groups, tokens, heads, size), keys and values (groups,
    tokens, size).
    """
    tokens, size = cosine.shape
    query, key, value = torch.split(joined.reshape(tokens, -1, size), [groups * heads, groups, groups], 1)
    turned = _turn(query, cosine, sine).to(joined.dtype).view(tokens, groups, heads, size)
    keys = _turn(key, cosine, sine).to(joined.dtype)
    return (
        turned.transpose(0, 1).contiguous(), keys.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()
    )  # fmt: skip


def join_heads(query: Tensor, key: Tensor, value: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The gradient with respect to `joined`, from those of what `split_heads` returned."""
    groups, tokens, heads, size = query.shape
    queries = _turn_back(query.transpose(0, 1).reshape(tokens, groups * heads, size), cosine, sine)
    keys = _turn_back(key.transpose(0, 1), cosine, sine)
    return torch.cat([queries.to(query.dtype), keys.to(query.dtype), value.transpose(0, 1)], 1).view(tokens, -1)


def _seen(starts: Tensor, first: int, end: int, begin: int, heads: int) -> Tensor:
    """Which keys from `begin` on the heads of the tokens from `first` to `end` see: (tokens * heads, keys)."""
    places = torch.arange(begin, end, device=starts.device)
    seen = (places >= starts[first:end, None]) & (places <= places[first - begin :, None])
    return seen.repeat_interleave(heads, 0)


def _sums(weights: Tensor, x: Tensor, seen: Tensor) -> Tensor:
    """`weights @ x`, to which what is not seen adds nothing: a weight of 0 is not enough, as 0 times NaN is NaN.

    weights: (groups, m, n), 0 where `seen`, (m, n), is False; x: (groups, n, size).
    """
    finite = x.isfinite()
    if bool(finite.all()):
        return weights @ x
    sums, lost = weights @ x.where(finite, 0), x.where(~finite, 0)
    for place in torch.nonzero(~finite.all(-1).all(0))[:, 0].tolist():
        added = weights[:, :, place, None] * lost[:, place, None]
        sums += added.where(seen[:, place, None], 0)
    return sums


def attend(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, tiles: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal self-attention, tile by tile. Scores are in float32: large ones would lose too much in bfloat16.

    query: (groups, tokens, heads, size); key, value: (groups, tokens, size). starts: (tokens,) int32, the first token
    that each one sees; it sees itself last. tiles: (count, 3) int64, see `Layout`.
    Returns (tokens, groups * heads * size), and for `attend_backward` the logarithms of the sums of exponentials:
    (groups, tokens, heads) float32.
    """
    groups, tokens, heads, size = query.shape
    result = query.new_empty(tokens, groups, heads, size)
    total = torch.empty(groups, tokens, heads, device=query.device)
    for first, end, begin in tiles.tolist():
        scores = query[:, first:end].flatten(1, 2).float() @ key[:, begin:end].float().transpose(1, 2)
        seen = _seen(starts, first, end, begin, heads)
        scaled = (scores * scale).masked_fill(~seen, float("-inf"))
        total[:, first:end] = scaled.logsumexp(-1).view(groups, -1, heads)
        weights = scaled.softmax(-1).masked_fill(~seen, 0)  # all would be NaN where a token sees one
        mixed = _sums(weights.to(value.dtype), value[:, begin:end], seen)
        result[first:end] = mixed.view(groups, -1, heads, size).transpose(0, 1)
    return result.view(tokens, -1), total


def attend_backward(
    gradient: Tensor, result: Tensor, total: Tensor, query: Tensor, key: Tensor, value: Tensor,
    starts: Tensor, tiles: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value. Weights are computed again, as in FlashAttention (Dao et al. 2022).

    gradient: of the result; the others as `attend` took and gave them.
    """
    groups, tokens, heads, size = query.shape
    shape = (tokens, groups, heads, size)
    inner = (gradient.float() * result.float()).reshape(shape).sum(-1).transpose(0, 1)
    passed = gradient.reshape(shape).transpose(0, 1)
    dquery = query.new_empty(query.shape)
    dkey, dvalue = (torch.zeros(groups, tokens, size, device=query.device) for _ in range(2))
    for first, end, begin in tiles.tolist():
        queries, out, sums, shares = (one[:, first:end].flatten(1, 2) for one in (query, passed, total, inner))
        keys, values = key[:, begin:end], value[:, begin:end]
        seen = _seen(starts, first, end, begin, heads)
        scores = queries.float() @ keys.float().transpose(1, 2) * scale - sums[..., None]
        weights = scores.exp().masked_fill(~seen, 0)
        dscores = weights * (out.float() @ values.float().transpose(1, 2) - shares[..., None]) * scale
        weights, dscores = weights.to(query.dtype), dscores.masked_fill(~seen, 0).to(query.dtype)
        dquery[:, first:end] = _sums(dscores, keys, seen).view(groups, -1, heads, size)
        dvalue[:, begin:end] += _sums(weights.transpose(1, 2), out, seen.t())
        dkey[:, begin:end] += _sums(dscores.transpose(1, 2), queries, seen.t())
    return dquery, dkey.to(key.dtype), dvalue.to(value.dtype)


def add_lora(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> None:
    """y += x down^T up, in place. y: (tokens, out); x: (tokens, in); down: (r, in); up: (r, out), scaling in it."""
    y.addmm_(x @ down.t(), up)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each row in nats, float32: (rows,). The logits become its gradient with respect to them, in place.

    logits: (rows, vocabulary); targets: (rows,) int64.
    """
    scores = logits.float()
    loss = functional.cross_entropy(scores, targets, reduction="none")
    gradient = scores.softmax(-1)
    gradient.scatter_add_(1, targets[:, None], gradient.new_full((len(targets), 1), -1))
    logits.copy_(gradient)
    return loss


FusedOps = Any
"""This module, or an object with functions of the same names."""
