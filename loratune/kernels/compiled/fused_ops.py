"""Fused operations: everything between the matrix products of a step, each in one pass over memory.

`reference` defines each operation in torch. This module calls the compiled library if there is one.
"""

import ctypes
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from loratune.kernels.compiled import build, library, operations, reference
from loratune.kernels.compiled.library import Library
from loratune.kernels.layout import Layout, Scoring
from loratune.kernels.upstream import is_fake

DEFINES = dict(zip((torch.bfloat16, torch.float32), build.DEFINES, strict=True))

FEW_TOKENS = 64
"""LoRA on at most this many tokens is one fused operation: launching two matrix products would take longer."""
FEW_TOKENS_QUANTIZED = 4
"""The product of at most this many tokens with a quantized weight does not dequantize it: 10 ms instead of 21 for
11,008 x 4,096 weights in 8 bit. For more tokens, that would take longer."""


def fused_ops(like: Tensor) -> reference.FusedOps:
    """The fused operations for tensors like this one.

    The reference is used on a GPU, for float16, outside Linux, with LORATUNE_NATIVE=0, if no library is included in the
    installation and none can be compiled, and if one computes something else than the reference on this machine;
    otherwise the compiled operations are used.
    """
    functions = _library(like.dtype).functions if not _untried(like) else None
    return CompiledOps(functions, like.dtype) if functions is not None else reference


def notes(like: Tensor) -> list[str]:
    """Lines for the user on a problem of the compiled operations that are used for such tensors."""
    return [*filter(None, [library_note(like)])]


def library_note(like: Tensor) -> str:
    """A problem of the compiled operations that are used for such tensors; empty if there is none."""
    return "" if refusal(like) else _library(like.dtype).note or ""


def variant(like: Tensor) -> str:
    """The build of the compiled operations that is used for such tensors; or why none is, and how to fix it."""
    if reason := refusal(like):
        return f"not in use ({reason})"
    name, _, number = _library(like.dtype).name.rpartition("-")
    return f"in use (build {number})" if name == build.NATIVE.name else f"in use (for {name}, build {number})"


def refusal(like: Tensor) -> str:
    """Why compiled operations are not used for such tensors, and how to fix it; empty if they are."""
    if untried := _untried(like):
        return untried
    loaded = _library(like.dtype)
    return loaded.note or "" if loaded.functions is None else ""


def _untried(like: Tensor) -> str:
    """Why compiled operations are not even loaded; empty if they are."""
    reasons = {
        f"the model is on {like.device.type}": like.device.type != "cpu",
        f"no compiled code is for {str(like.dtype).removeprefix('torch.')}: set model.dtype to bfloat16 or float32": (
            like.dtype not in DEFINES
        ),
        f"no compiled code is for {platform.system()}": platform.system() != "Linux",
        "LORATUNE_NATIVE is 0: unset it": os.environ.get("LORATUNE_NATIVE") == "0",
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def loaded(dtype: torch.dtype) -> "CompiledOps | None":
    """The compiled operations for a dtype, whatever they compute; None if they are not used for other reasons."""
    functions = _loaded(dtype).functions if not _untried(torch.zeros(1, dtype=dtype)) else None
    return CompiledOps(functions, dtype) if functions is not None else None


@cache
def _loaded(dtype: torch.dtype) -> Library:
    return library.load(DEFINES[dtype])


@cache
def _library(dtype: torch.dtype) -> Library:
    """The library for a dtype; without its functions if one of them computes something else than its reference."""
    found = _loaded(dtype)
    if found.functions is None:
        return found
    differing = operations.differences(CompiledOps(found.functions, dtype), dtype)
    name = max(differing, key=lambda one: differing[one])
    if differing[name] <= operations.TOLERANCE[dtype]:
        return found
    why = f"they compute something else than torch on this machine: {name}, by {differing[name]:.1e}"
    return replace(found, functions=None, note=f"{why}; report it with the page of loratune env")


class CompiledOps:
    """The functions of `reference` for tensors of one dtype on the CPU, contiguous or not. Shapes are not checked.

    Each raises TypeError for a tensor of another dtype.
    """

    def __init__(self, functions: ctypes.CDLL, dtype: torch.dtype):
        self._functions, self._dtype = functions, dtype

    def _call(self, name: str, outputs: Sequence[Tensor], *inputs: Tensor | float | None) -> Any:
        """Call a function of the library. Outputs are its first arguments, which it writes to.

        Nothing is computed for fake tensors, which have only shapes.
        """
        tensors = [argument for argument in (*outputs, *inputs) if isinstance(argument, Tensor)]
        if any(map(is_fake, tensors)):
            return None
        if not all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors):
            raise ValueError(f"{name} needs contiguous tensors on the CPU")
        return getattr(self._functions, name)(*map(_c_argument, (*outputs, *inputs)))

    def _call_with_scratch(self, name: str, outputs: Sequence[Tensor], *inputs: Tensor | float | None) -> None:
        """Call a function that allocates memory of its own. Raises MemoryError: there is not enough."""
        if self._call(name, outputs, *inputs):
            raise MemoryError(f"out of memory in {name}")

    def _contiguous(self, *tensors: Tensor) -> list[Tensor]:
        return [_checked(tensor, self._dtype) for tensor in tensors]

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, added: float = 0.0) -> tuple[Tensor, Tensor]:
        """See `reference.rms_norm`."""
        x, weight = self._contiguous(x, weight)
        y, inverse = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
        sizes = inverse.numel(), x.shape[-1]
        self._call("rms_norm", [y, inverse], x, weight, float(epsilon), float(added), *sizes)
        return y, inverse

    def rms_norm_backward(self, dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, added: float = 0.0) -> Tensor:
        """See `reference.rms_norm_backward`."""
        (dy, x, weight), inverse = self._contiguous(dy, x, weight), _checked(inverse, torch.float32)
        dx = x.new_empty(x.shape)
        self._call("rms_norm_backward", [dx], dy, x, weight, inverse, float(added), inverse.numel(), x.shape[-1])
        return dx

    def swiglu(self, both: Tensor, linear: float = 1.0, cubic: float = 0.0) -> Tensor:
        """See `reference.swiglu`."""
        (both,), size = self._contiguous(both), both.shape[-1] // 2
        y = both.new_empty(*both.shape[:-1], size)
        self._call("swiglu", [y], both, float(linear), float(cubic), y.numel() // size, size)
        return y

    def swiglu_backward(self, dy: Tensor, both: Tensor, linear: float = 1.0, cubic: float = 0.0) -> Tensor:
        """See `reference.swiglu_backward`."""
        dy, both = self._contiguous(dy, both)
        dboth, size = both.new_empty(both.shape), both.shape[-1] // 2
        sizes = both.numel() // (2 * size), size
        self._call("swiglu_backward", [dboth], dy, both, float(linear), float(cubic), *sizes)
        return dboth

    def split_heads(
        self, joined: Tensor, cosine: Tensor, sine: Tensor, groups: int, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `reference.split_heads`."""
        (joined,), angles = self._contiguous(joined), _angles(cosine, sine)
        tokens, size = cosine.shape
        query = joined.new_empty(groups, tokens, heads, size)
        key, value = joined.new_empty(2, groups, tokens, size)
        self._call("split_heads", [query, key, value], joined, *angles, tokens, groups, heads, size)
        return query, key, value

    def join_heads(self, query: Tensor, key: Tensor, value: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """See `reference.join_heads`."""
        (query, key, value), angles = self._contiguous(query, key, value), _angles(cosine, sine)
        groups, tokens, heads, size = query.shape
        joined = query.new_empty(tokens, (groups * heads + 2 * groups) * size)
        self._call("join_heads", [joined], query, key, value, *angles, tokens, groups, heads, size)
        return joined

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scoring: Scoring
    ) -> tuple[Tensor, Tensor]:
        """See `reference.attend`."""
        query, key, value = self._contiguous(query, key, value)
        groups, tokens, heads, size = query.shape
        totals = query.new_empty(groups, tokens, heads, dtype=torch.float32)
        outputs = [query.new_empty(tokens, groups * heads * size), totals]
        sinks = None if scoring.sinks is None else _checked(scoring.sinks, torch.float32)
        inputs = query, key, value, *_tiles(layout), float(scoring.scale), float(scoring.cap), sinks
        self._call_with_scratch("attend", outputs, *inputs, tokens, groups, heads, size)
        return outputs[0], outputs[1]

    def attend_backward(
        self,
        gradient: Tensor,
        outputs: tuple[Tensor, Tensor],
        inputs: tuple[Tensor, Tensor, Tensor],
        layout: Layout,
        scoring: Scoring,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `reference.attend_backward`."""
        gradient, result, query, key, value = self._contiguous(gradient, outputs[0], *inputs)
        attended = gradient, result, _checked(outputs[1], torch.float32), query, key, value
        groups, tokens, heads, size = query.shape
        sums = (query.new_zeros(groups, tokens, size, dtype=torch.float32) for _ in range(2))
        gradients = [query.new_empty(query.shape), *sums]
        options = *_tiles(layout), float(scoring.scale), float(scoring.cap)
        self._call_with_scratch("attend_backward", gradients, *attended, *options, tokens, groups, heads, size)
        dquery, dkey, dvalue = gradients
        return dquery, dkey.to(key.dtype), dvalue.to(value.dtype)

    def add_lora(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> None:
        """See `reference.add_lora`; for many tokens, two matrix products are used."""
        if len(x) > FEW_TOKENS:
            return reference.add_lora(y, x, down, up)
        dense, x, down, up = self._contiguous(y, x, down, up)
        self._call("add_lora", [dense], x, down, up, len(x), x.shape[1], len(down), up.shape[1])
        if dense is not y:
            y.copy_(dense)

    def dequantize(self, y: Tensor, weight: Tensor, scales: Tensor) -> None:
        """See `reference.dequantize`."""
        (dense,), weight, scales = self._contiguous(y), _checked(weight, torch.int8), _checked(scales, torch.float32)
        self._call("dequantize", [dense], weight, scales, *weight.shape)
        if dense is not y:
            y.copy_(dense)

    def dequantize_4bit(self, y: Tensor, weight: Tensor, scales: Tensor, code: Tensor) -> None:
        """See `reference.dequantize_4bit`."""
        weight, (scales, code) = _checked(weight, torch.uint8), (_checked(one, torch.float32) for one in (scales, code))
        if not len(scales):
            return
        (dense,) = self._contiguous(y)
        self._call("dequantize_4bit", [dense], weight, scales, code, *y.shape)
        if dense is not y:
            y.copy_(dense)

    def quantize_8bit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `reference.quantize_8bit`."""
        (x,) = self._contiguous(x)
        y, most = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(len(x), dtype=torch.float32)
        self._call("quantize_8bit", [y, most], x, *x.shape)
        return y, most

    def quantize_4bit(self, x: Tensor, bounds: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """See `reference.quantize_4bit`."""
        (x,), bounds, order = self._contiguous(x), _checked(bounds, torch.float32), _checked(order, torch.uint8)
        y, most = x.new_empty(x.numel() // 2, dtype=torch.uint8), x.new_empty(len(x), dtype=torch.float32)
        self._call("quantize_4bit", [y, most], x, bounds, order, *x.shape)
        return y, most

    def linear_8bit(self, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        """See `reference.linear_8bit`; many tokens are multiplied as there."""
        if not 0 < len(x) <= FEW_TOKENS_QUANTIZED:
            return reference.linear_8bit(x, weight, scales)
        (x,), weight, scales = self._contiguous(x), _checked(weight, torch.int8), _checked(scales, torch.float32)
        y = x.new_empty(len(x), len(weight))
        self._call("linear_8bit", [y], x.float(), weight, scales, *x.shape, len(weight))
        return y

    def linear_4bit(self, x: Tensor, weight: Tensor, scales: Tensor, code: Tensor) -> Tensor:
        """See `reference.linear_4bit`; many tokens are multiplied as there."""
        if not 0 < len(x) <= FEW_TOKENS_QUANTIZED:
            return reference.linear_4bit(x, weight, scales, code)
        (x,), weight = self._contiguous(x), _checked(weight, torch.uint8)
        scales, code = _checked(scales, torch.float32), _checked(code, torch.float32)
        y = x.new_empty(len(x), len(weight))
        sizes = *x.shape, len(weight), 2 * weight.numel() // len(scales)
        self._call("linear_4bit", [y], x.float(), weight, scales, code, *sizes)
        return y

    def cross_entropy(self, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """See `reference.cross_entropy`."""
        (dense,), targets = self._contiguous(logits), _checked(targets, torch.int64)
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
            raise IndexError(f"targets from {int(targets.min())} to {int(targets.max())} of {logits.shape[1]} tokens")
        loss = dense.new_empty(len(targets), dtype=torch.float32)
        weights = None if weights is None else _checked(weights, torch.float32)
        self._call("cross_entropy", [dense, loss], targets, weights, len(targets), logits.shape[1])
        if dense is not logits:
            logits.copy_(dense)
        return loss


def _checked(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype != dtype:
        raise TypeError(f"a tensor of {tensor.dtype} where {dtype} is needed")
    return tensor.contiguous()


def _tiles(layout: Layout) -> tuple[Tensor, Tensor, Tensor, int]:
    """The C arguments of a layout."""
    spans, keys = (_checked(tensor, torch.int32) for tensor in (layout.spans, layout.keys))
    return spans, keys, _checked(layout.tiles, torch.int64), len(layout.tiles)


def _angles(cosine: Tensor, sine: Tensor) -> list[Tensor]:
    """Contiguous float32 tensors; some families have angles in the dtype of the states."""
    return [tensor.float().contiguous() for tensor in (cosine, sine)]


def _c_argument(argument: Tensor | float | None) -> Any:
    """A pointer, a float or a 64-bit integer."""
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)
