"""The passes in C, built with the machine's own C compiler on first use and kept in the user's cache."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratune.kernels import plain

SOURCES = [Path(__file__).with_name(name) for name in ("numbers.h", "passes.c", "attention.c")]
FLAGS = "-std=gnu11 -O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -shared -fPIC"
DEFINES = {torch.bfloat16: "-DBFLOAT16", torch.float32: "-DFLOAT32"}

FEW = 64
"""Tokens up to which LoRA is one pass over them: what it takes to begin a product would take longer."""


def passes(like: Tensor) -> plain.Passes:
    """The functions of `plain` for tensors like this one: built from C where that can be done, else plain.

    The plain ones are taken on a GPU, for float16, without a C compiler, outside Linux, and where LORATUNE_NATIVE=0 is
    set.
    """
    refused = os.environ.get("LORATUNE_NATIVE") == "0" or platform.system() != "Linux"
    if refused or like.device.type != "cpu" or like.dtype not in DEFINES:
        return plain
    return _loaded(DEFINES[like.dtype]) or plain


@cache
def _loaded(define: str) -> "Native | None":
    try:
        built = _built(define)
        return Native(ctypes.CDLL(str(built))) if built else None
    except (OSError, RuntimeError):  # no home, no right to run what lies there, or no OpenMP
        return None


def _built(define: str) -> Path | None:
    """The library, from the cache or made now. None: there is no compiler, it fails, or no place to keep it."""
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        return None
    path = _place() / f"native-{_key(compiler, define)}.so"
    if path.is_file() and path.stat().st_size > 0:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            sources = [str(source) for source in SOURCES if source.suffix == ".c"]
            wide = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
            command = [compiler, *FLAGS.split(), *wide, define, *sources, "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            made.replace(path)
    except (OSError, subprocess.SubprocessError):
        return None
    return path


def _place() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loratune"


def _key(compiler: str, define: str) -> str:
    """Of everything that the library depends on: the source, the compiler, the processor."""
    processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    features = [line for line in processor.splitlines() if line.startswith(("flags", "Features", "model name"))]
    stat = Path(compiler).resolve().stat()
    text = "".join(source.read_text(encoding="utf-8") for source in SOURCES)
    parts = [text, FLAGS, define, compiler, stat.st_mtime_ns, stat.st_size, features]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class Native:
    """The functions of `plain`, for contiguous tensors of one dtype on the CPU. Shapes are not checked again."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library

    def _call(self, name: str, *arguments: Tensor | float) -> Any:
        return getattr(self._library, name)(*map(_passed, arguments))

    def _call_with_scratch(self, name: str, *arguments: Tensor | float) -> None:
        """Raises MemoryError: there is none for what lies between the products."""
        if self._call(name, *arguments):
            raise MemoryError(f"out of memory in {name}")

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """See `plain.rms_norm`."""
        x, y, inverse = x.contiguous(), torch.empty_like(x), torch.empty(x.shape[:-1])
        self._call("rms_norm", y, inverse, x, weight, float(epsilon), inverse.numel(), x.shape[-1])
        return y, inverse

    def rms_norm_backward(self, dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
        """See `plain.rms_norm_backward`."""
        x = x.contiguous()  # a norm may stand on a slice
        dx = torch.empty_like(x)
        self._call("rms_norm_backward", dx, dy.contiguous(), x, weight, inverse, inverse.numel(), x.shape[-1])
        return dx

    def swiglu(self, both: Tensor) -> Tensor:
        """See `plain.swiglu`."""
        size = both.shape[-1] // 2
        y = both.new_empty(*both.shape[:-1], size)
        self._call("swiglu", y, both, y.numel() // size, size)
        return y

    def swiglu_backward(self, dy: Tensor, both: Tensor) -> Tensor:
        """See `plain.swiglu_backward`."""
        dboth, size = torch.empty_like(both), both.shape[-1] // 2
        self._call("swiglu_backward", dboth, dy.contiguous(), both, both.numel() // (2 * size), size)
        return dboth

    def split_heads(
        self, joined: Tensor, cosine: Tensor, sine: Tensor, groups: int, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `plain.split_heads`."""
        tokens, size = cosine.shape
        query = joined.new_empty(groups, tokens, heads, size)
        key, value = joined.new_empty(2, groups, tokens, size)
        self._call("split_heads", query, key, value, joined, cosine, sine, tokens, groups, heads, size)
        return query, key, value

    def join_heads(self, query: Tensor, key: Tensor, value: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """See `plain.join_heads`."""
        groups, tokens, heads, size = query.shape
        joined = query.new_empty(tokens, (groups * heads + 2 * groups) * size)
        self._call("join_heads", joined, query, key, value, cosine, sine, tokens, groups, heads, size)
        return joined

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, tiles: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `plain.attend`."""
        groups, tokens, heads, size = query.shape
        result, total = query.new_empty(tokens, groups * heads * size), torch.empty(groups, tokens, heads)
        arrays, sizes = (result, total, query, key, value, starts, tiles), (tokens, groups, heads, size)
        self._call_with_scratch("attend", *arrays, len(tiles), float(scale), *sizes)
        return result, total

    def attend_backward(
        self, gradient: Tensor, result: Tensor, total: Tensor, query: Tensor, key: Tensor, value: Tensor,
        starts: Tensor, tiles: Tensor, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See `plain.attend_backward`."""
        groups, tokens, heads, size = query.shape
        dquery = torch.empty_like(query)
        dkey, dvalue = (torch.zeros(groups, tokens, size) for _ in range(2))
        arrays = (dquery, dkey, dvalue, gradient.contiguous(), result, total, query, key, value, starts, tiles)
        self._call_with_scratch("attend_backward", *arrays, len(tiles), float(scale), tokens, groups, heads, size)
        return dquery, dkey.to(key.dtype), dvalue.to(value.dtype)

    def add_lora(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> None:
        """See `plain.add_lora`; many tokens are left to its products."""
        if len(x) > FEW:
            return plain.add_lora(y, x, down, up)
        self._call("add_lora", y, x.contiguous(), down, up, len(x), x.shape[1], len(down), up.shape[1])

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See `plain.cross_entropy`."""
        if len(targets) and int(targets.max()) >= logits.shape[1]:
            raise IndexError(f"target {int(targets.max())} is out of {logits.shape[1]} tokens")
        loss = torch.empty(len(targets))
        self._call("cross_entropy", logits, loss, targets, len(targets), logits.shape[1])
        return loss


def _passed(argument: Tensor | float) -> Any:
    """As C takes it."""
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)
