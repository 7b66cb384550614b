"""The passes in C, as functions of tensors."""

import ctypes
import os
import platform
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from loratune.kernels import library, reference
from loratune.kernels.library import Library

DEFINES = {torch.bfloat16: "-DBFLOAT16", torch.float32: "-DFLOAT32"}

FEW = 64
"""Tokens up to which LoRA is one pass over them: what it takes to begin a product would take longer."""


def fused_ops(like: Tensor) -> reference.FusedOps:
    """The functions of `plain` for tensors like this one: built from C where that can be done, else plain.

    The plain ones are taken on a GPU, for float16, without a C compiler, outside Linux, and where LORATUNE_NATIVE=0 is
    set.
    """
    functions = _loaded(like.dtype).functions if _wanted(like) else None
    return Native(functions, like.dtype) if functions is not None else reference


def notes(like: Tensor) -> list[str]:
    """A line for the user where the functions in C are wanted for such tensors and something is amiss with them."""
    note = _loaded(like.dtype).note if _wanted(like) else None
    return [note] if note is not None else []


def variant(like: Tensor) -> str:
    """Whether functions in C are used for such tensors, in words: which build of them, or why none and what to do."""
    if reason := _refusal(like):
        return f"not in use ({reason})"
    found = _loaded(like.dtype)
    if found.functions is None:
        return "not in use (it could not be built: install gcc)"
    return f"in use (build {found.name.removeprefix('native-')})"


def _wanted(like: Tensor) -> bool:
    return not _refusal(like)


def _refusal(like: Tensor) -> str:
    """Why functions in C are not even looked for; empty if they are."""
    reasons = {
        f"the model is on {like.device.type}": like.device.type != "cpu",
        f"there is none for {str(like.dtype).removeprefix('torch.')}": like.dtype not in DEFINES,
        f"there is none for {platform.system()}": platform.system() != "Linux",
        "LORATUNE_NATIVE is 0: unset it": os.environ.get("LORATUNE_NATIVE") == "0",
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


@cache
def _loaded(dtype: torch.dtype) -> Library:
    return library.load(DEFINES[dtype])


class Native:
    """The functions of `plain` for tensors of one dtype on the CPU, dense or not. Shapes are not checked again.

    Each raises TypeError for a tensor of a dtype that C would take for another.
    """

    def __init__(self, functions: ctypes.CDLL, dtype: torch.dtype):
        self._functions, self._dtype = functions, dtype

    def _call(self, name: str, made: Sequence[Tensor], *given: Tensor | float) -> Any:
        """made: what is written, the first arguments; given: what is read."""
        tensors = [one for one in (*made, *given) if isinstance(one, Tensor)]
        if not all(one.is_contiguous() and one.device.type == "cpu" for one in tensors):
            raise ValueError(f"{name} wants dense tensors on the CPU")
        return getattr(self._functions, name)(*map(_passed, (*made, *given)))

    def _call_with_scratch(self, name: str, made: Sequence[Tensor], *given: Tensor | float) -> None:
        """Raises MemoryError: there is none for what lies between the products."""
        if self._call(name, made, *given):
            raise MemoryError(f"out of memory in {name}")

    def _reals(self, *tensors: Tensor) -> list[Tensor]:
        return [_dense(one, self._dtype) for one in tensors]

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """See `plain.rms_norm`."""
        x, weight = self._reals(x, weight)
        y, inverse = x.new_empty(x.shape), torch.empty(x.shape[:-1])
        self._call("rms_norm", [y, inverse], x, weight, float(epsilon), inverse.numel(), x.shape[-1])
        return y, inverse

    def rms_norm_backward(self, dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
        """See `plain.rms_norm_backward`."""
        (dy, x, weight), inverse = self._reals(dy, x, weight), _dense(inverse, torch.float32)
        dx = x.new_empty(x.shape)
        self._call("rms_norm_backward", [dx], dy, x, weight, inverse, inverse.numel(), x.shape[-1])
        return dx

    def swiglu(self, both: Tensor) -> Tensor:
        """See `plain.swiglu`."""
        (both,), size = self._reals(both), both.shape[-1] // 2
        y = both.new_empty(*both.shape[:-1], size)
        self._call("swiglu", [y], both, y.numel() // size, size)
        return y

    def swiglu_backward(self, dy: Tensor, both: Tensor) -> Tensor:
        """See `plain.swiglu_backward`."""
        dy, both = self._reals(dy, both)
        dboth, size = both.new_empty(both.shape), both.shape[-1] // 2
        self._call("swiglu_backward", [dboth], dy, both, both.numel() // (2 * size), size)
        return dboth

    def split_heads(
        self, joined: Tensor, cosine: Tensor, sine: Tensor, groups: int, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `plain.split_heads`."""
        (joined,), angles = self._reals(joined), _angles(cosine, sine)
        tokens, size = cosine.shape
        query = joined.new_empty(groups, tokens, heads, size)
        key, value = joined.new_empty(2, groups, tokens, size)
        self._call("split_heads", [query, key, value], joined, *angles, tokens, groups, heads, size)
        return query, key, value

    def join_heads(self, query: Tensor, key: Tensor, value: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """See `plain.join_heads`."""
        (query, key, value), angles = self._reals(query, key, value), _angles(cosine, sine)
        groups, tokens, heads, size = query.shape
        joined = query.new_empty(tokens, (groups * heads + 2 * groups) * size)
        self._call("join_heads", [joined], query, key, value, *angles, tokens, groups, heads, size)
        return joined

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, tiles: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `plain.attend`."""
        query, key, value = self._reals(query, key, value)
        layout = _dense(starts, torch.int32), _dense(tiles, torch.int64)
        groups, tokens, heads, size = query.shape
        made = [query.new_empty(tokens, groups * heads * size), torch.empty(groups, tokens, heads)]
        sizes = (tokens, groups, heads, size)
        self._call_with_scratch("attend", made, query, key, value, *layout, len(tiles), float(scale), *sizes)
        return made[0], made[1]

    def attend_backward(
        self, gradient: Tensor, result: Tensor, total: Tensor, query: Tensor, key: Tensor, value: Tensor,
        starts: Tensor, tiles: Tensor, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See `plain.attend_backward`."""
        gradient, result, query, key, value = self._reals(gradient, result, query, key, value)
        total, layout = _dense(total, torch.float32), (_dense(starts, torch.int32), _dense(tiles, torch.int64))
        groups, tokens, heads, size = query.shape
        made = [query.new_empty(query.shape), *(torch.zeros(groups, tokens, size) for _ in range(2))]
        given = (gradient, result, total, query, key, value, *layout, len(tiles), float(scale))
        self._call_with_scratch("attend_backward", made, *given, tokens, groups, heads, size)
        dquery, dkey, dvalue = made
        return dquery, dkey.to(key.dtype), dvalue.to(value.dtype)

    def add_lora(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> None:
        """See `plain.add_lora`; many tokens are left to its products."""
        if len(x) > FEW:
            return reference.add_lora(y, x, down, up)
        dense, x, down, up = self._reals(y, x, down, up)
        self._call("add_lora", [dense], x, down, up, len(x), x.shape[1], len(down), up.shape[1])
        if dense is not y:
            y.copy_(dense)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See `plain.cross_entropy`."""
        (dense,), targets = self._reals(logits), _dense(targets, torch.int64)
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
            raise IndexError(f"targets from {int(targets.min())} to {int(targets.max())} of {logits.shape[1]} tokens")
        loss = torch.empty(len(targets))
        self._call("cross_entropy", [dense, loss], targets, len(targets), logits.shape[1])
        if dense is not logits:
            logits.copy_(dense)
        return loss


def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype != dtype:
        raise TypeError(f"a tensor of {tensor.dtype} where {dtype} is wanted")
    return tensor.contiguous()


def _angles(cosine: Tensor, sine: Tensor) -> list[Tensor]:
    """In float32, as some families hand them on beside states in bfloat16."""
    return [one.float().contiguous() for one in (cosine, sine)]


def _passed(argument: Tensor | float) -> Any:
    """As C takes it."""
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)
