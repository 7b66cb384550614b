"""Fused operations: the rows, layouts and dtypes that they support."""

import math
import platform
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from test_kernels import FUSED_OPS, named, normal
from torch import Tensor

from loratune.kernels.compiled import fused_ops, library, reference
from loratune.kernels.compiled.build import VARIANTS
from loratune.kernels.layout import Layout, Scoring


@cache
def for_avx2(dtype: torch.dtype) -> fused_ops.CompiledOps:
    """The compiled operations as built into a wheel, for processors without AVX-512."""
    (variant,) = (one for one in VARIANTS if one.name == "x86-64-v3")
    functions = library.compiled(fused_ops.DEFINES[dtype], variant).functions
    assert functions is not None
    return fused_ops.CompiledOps(functions, dtype)


OVER = {
    "reference": (lambda like: reference, torch.float32),
    "reference in bfloat16": (lambda like: reference, torch.bfloat16),
    "C": (fused_ops.fused_ops, torch.float32),
    "C in bfloat16": (fused_ops.fused_ops, torch.bfloat16),
}  # fmt: skip
if platform.machine() == "x86_64":
    OVER["AVX2"] = lambda like: for_avx2(like.dtype), torch.float32
    OVER["AVX2 in bfloat16"] = lambda like: for_avx2(like.dtype), torch.bfloat16


def attended(ops: Any, positions: Tensor, arguments: list[Tensor], window: int | None, tile: int = 48) -> list[Tensor]:
    """The result and the gradients of queries, keys and values, for each token."""
    query, key, value, gradient = arguments
    layout = Layout.of(positions, window, tile)
    scoring = Scoring(query.shape[-1] ** -0.5)
    outputs = ops.attend(query, key, value, layout, scoring)
    dquery, dkey, dvalue = ops.attend_backward(gradient, outputs, (query, key, value), layout, scoring)
    return [outputs[0], dquery.transpose(0, 1), dkey.transpose(0, 1), dvalue.transpose(0, 1)]


@pytest.mark.parametrize("name", OVER)
def test_nonfinite_values_affect_only_their_own_row(name: str) -> None:
    """At each position of a block of four, in every argument, in rows that share a block, a pair, a tile."""
    choose, dtype = OVER[name]
    lengths = (5, 3, 1, 70, 2, 6)
    positions = torch.cat([torch.arange(length) for length in lengths])
    spans = [(sum(lengths[:n]), sum(lengths[: n + 1])) for n in range(len(lengths))]
    for size, heads, window in ((16, 1, None), (8, 3, None), (72, 2, 4)):
        shapes = [(2, 87, heads, size), (2, 87, size), (2, 87, size), (87, 2 * heads * size)]
        arguments = [normal(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]
        ops = choose(arguments[0])
        whole = attended(ops, positions, arguments, window)
        for number, (first, end) in enumerate(spans):
            others = torch.ones(87, dtype=torch.bool)
            others[first:end] = False
            for which, lost in ((0, math.nan), (1, math.inf), (2, math.nan), (2, -math.inf), (3, math.nan)):
                broken = [one.clone() for one in arguments]
                tokens = broken[which] if which == 3 else broken[which].transpose(0, 1)
                place = first + (end - first) * number // len(spans)
                tokens[(place, *[-(number % 2)] * (tokens.dim() - 1))] = lost
                results = attended(ops, positions, broken, window)
                assert not all(bool(one[first:end].isfinite().all()) for one in results), (which, number)
                for old, new in zip(whole, results, strict=True):
                    assert torch.equal(old[others], new[others]), (which, number, size)


@pytest.mark.skipif("AVX2" not in OVER, reason="only x86-64 has AVX2")
@pytest.mark.parametrize("size", [2, 8, 24, 72, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_for_avx2_equals_the_reference(size: int, dtype: torch.dtype) -> None:
    """Its vectors hold half as many numbers, so its sums are split differently."""
    positions = torch.cat([torch.arange(length) for length in (130, 5, 64)])
    for window, heads in ((None, 3), (7, 1)):
        shapes = [(2, 199, heads, size), (2, 199, size), (2, 199, size), (199, 2 * heads * size)]
        arguments = [normal(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]
        pairs = zip(*(attended(ops, positions, arguments, window) for ops in (reference, for_avx2(dtype))), strict=True)
        for old, new in pairs:
            loose = 1e-5 if dtype == torch.float32 else 0.02
            assert float((old.float() - new.float()).norm()) <= loose * float(old.float().norm()) + 1e-4


@pytest.mark.parametrize("name", OVER)
def test_nonfinite_values_propagate_only_along_the_causal_mask(name: str) -> None:
    """As in a model: a value affects its own and later tokens, a gradient its own and earlier keys."""
    choose, dtype = OVER[name]
    arguments = [
        normal(*shape, seed=n).to(dtype) for n, shape in enumerate([(1, 9, 2, 8), (1, 9, 8), (1, 9, 8), (9, 16)])
    ]
    arguments[2][0, 4, 3] = math.nan
    result, dquery, dkey, dvalue = attended(choose(arguments[0]), torch.arange(9), arguments, None)
    assert result.view(9, 2, 8)[:, :, 3].isnan().all(1).tolist() == [False] * 4 + [True] * 5
    assert result.view(9, 2, 8)[:, :, [0, 1, 2, 4, 5, 6, 7]].isfinite().all()
    assert dquery.isfinite().flatten(1).all(1).tolist() == [True] * 4 + [False] * 5
    arguments = [
        normal(*shape, seed=n).to(dtype) for n, shape in enumerate([(1, 9, 2, 8), (1, 9, 8), (1, 9, 8), (9, 16)])
    ]
    arguments[3][4, 3] = math.inf
    result, dquery, dkey, dvalue = attended(choose(arguments[0]), torch.arange(9), arguments, None)
    assert result.isfinite().all() and dquery.isfinite().flatten(1).all(1).tolist() == [n != 4 for n in range(9)]
    assert dvalue.isfinite().flatten(1).all(1).tolist() == [False] * 5 + [True] * 4
    assert dkey.isfinite().flatten(1).all(1).tolist() == [False] * 5 + [True] * 4


ROWS_OF = {
    "rms_norm": [0], "rms_norm_backward": [0, 1], "rms_norm, adding 1": [0], "rms_norm_backward, adding 1": [0, 1],
    "swiglu": [0], "swiglu_backward": [0, 1], "swiglu, of GELU": [0], "swiglu_backward, of GELU": [0, 1],
    "split_heads": [0], "add_lora": [0, 1], "cross_entropy": [0],
}  # fmt: skip


def rows_mix(dtype: torch.dtype) -> bool:
    """Whether torch's own product lets a NaN affect the previous row, which has none: on processors with AMX, oneDNN
    reads beyond the end of short rows, and multiplies what it finds by 0."""
    narrow = torch.ones(37, 5, dtype=dtype)
    narrow[6] = math.nan
    return bool((narrow @ torch.ones(5, 80, dtype=dtype))[5].isnan().any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROWS_OF)
def test_other_operations_keep_rows_independent(name: str, dtype: torch.dtype) -> None:
    """For inputs that are stored row by row. The reference of `add_lora` is torch's own product, which may not do
    so."""

    def results_of(ops: Any, broken: int | None = None, lost: float = 0) -> list[Tensor]:
        arguments = FUSED_OPS[name](dtype)
        if broken is not None:
            arguments[broken][6, 1] = lost
        result = named(ops, name)(*arguments)
        parts = [*(result if isinstance(result, tuple) else (result,)), arguments[0]]
        tensors = [one for one in parts if isinstance(one, Tensor)]
        return [one if len(one) == 37 else one.transpose(0, 1) for one in tensors]

    own = fused_ops.fused_ops(torch.empty(0, dtype=dtype))
    for ops in (own,) if name == "add_lora" and rows_mix(dtype) else (reference, own):
        others, whole = torch.arange(37) != 6, results_of(ops)
        for broken in ROWS_OF[name]:
            for lost in (math.nan, math.inf):
                for old, new in zip(whole, results_of(ops, broken, lost), strict=True):
                    assert torch.equal(old[others], new[others])


def loosened(tensor: Tensor) -> Tensor:
    """The same numbers with others stored between them."""
    wide = torch.full((*tensor.shape, 2), 7, dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


LOOSE: dict[str, Callable[[Tensor], Tensor]] = {
    "every other number": loosened,
    "its last two axes turned": lambda tensor: tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
}


@pytest.mark.parametrize("how", LOOSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUSED_OPS)
def test_operations_accept_non_contiguous_tensors(name: str, dtype: torch.dtype, how: str) -> None:
    """The numbers equal those for contiguous tensors, also where they are written into the arguments."""

    def loose(one: Any) -> Any:
        if type(one) in (tuple, list):
            return [loose(part) for part in one]
        return LOOSE[how](one) if isinstance(one, Tensor) and (one.dim() > 1 or how == "every other number") else one

    for ops in (reference, fused_ops.fused_ops(torch.empty(0, dtype=dtype))):
        arguments, copies = FUSED_OPS[name](dtype), [loose(one) for one in FUSED_OPS[name](dtype)]
        assert any(isinstance(one, Tensor) and not one.is_contiguous() for one in copies)
        expected, results = named(ops, name)(*arguments), named(ops, name)(*copies)
        pairs = [*zip(*(one if isinstance(one, tuple) else (one,) for one in (expected, results)), strict=True)]
        for old, new in [*pairs, *zip(arguments, copies, strict=True)]:
            if isinstance(old, Tensor):
                assert torch.allclose(old.float(), new.float(), rtol=1e-5, atol=1e-6)


def test_another_dtype_is_an_error() -> None:
    """C would interpret the bytes of one dtype as another."""
    ops = fused_ops.fused_ops(torch.empty(0))
    with pytest.raises(TypeError, match="bfloat16 where"):
        ops.rms_norm(normal(3, 8).bfloat16(), normal(8), 1e-5)
    with pytest.raises(TypeError, match="int32 where"):
        ops.cross_entropy(normal(3, 8), torch.arange(3, dtype=torch.int32))
    for target in (-1, 8):
        with pytest.raises(IndexError, match="of 8 tokens"):
            ops.cross_entropy(normal(3, 8), torch.tensor([1, target, 2]))


def test_rotary_angles_may_be_float32() -> None:
    """As in olmo, where the states are bfloat16. The angles are not rounded then."""
    joined, cosine, _, *counts = FUSED_OPS["split_heads"](torch.bfloat16)
    angles = normal(*cosine.shape, seed=3)
    turned = angles.cos(), angles.sin()
    results = [ops.split_heads(joined, *turned, *counts) for ops in (reference, fused_ops.fused_ops(joined))]
    back = [
        ops.join_heads(*heads, *turned)
        for ops, heads in zip((reference, fused_ops.fused_ops(joined)), results, strict=True)
    ]
    for old, new in [*zip(*results, strict=True), back]:
        assert torch.allclose(old.float(), new.float(), rtol=2**-7, atol=1e-6)
        assert float((old != new).float().mean()) < 0.01
