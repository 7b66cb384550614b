"""Compiles the fused operations: for the processor of this machine, or for each processor variant of a wheel.

`scripts/build_backend.py` runs this file by its path before any dependency is installed, so it imports only the
standard library.
"""

import hashlib
import os
import platform
import re
import signal
import subprocess
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SOURCES = [Path(__file__).parent / "csrc" / name for name in ("numbers.h", "fused_ops.c", "attention.c")]
SHIPPED = Path(__file__).parent / "shipped"
"""The directory of prebuilt libraries in a wheel. A checkout has none."""
FLAGS = ["-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
DEFINES = ("-DBFLOAT16", "-DFLOAT32")
"""Compiler options that select the dtype of a library."""

DIGEST_BYTES = hashlib.sha256().digest_size
_MAX_SECONDS = 120  # For the compiler, which needs about three.
_hanging = set[str]()  # Compilers that took longer; they are not waited for again, for another dtype or variant.


@dataclass(frozen=True)
class Variant:
    """A processor variant that a library is compiled for.

    Attributes:
        name: The name of the variant.
        options: Compiler options.
        features: Required processor features, by Linux's names in `/proc/cpuinfo`.
    """

    name: str
    options: tuple[str, ...]
    features: frozenset[str] = frozenset()

    def file_name(self, define: str) -> str:
        """The name of the library for a dtype."""
        return f"{self.name}-{define.removeprefix('-D').lower()}.so"

    def key(self, define: str) -> str:
        """A hash of the sources and options of the library for a dtype."""
        parts = [source_text(), FLAGS, self.options, define]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


_WIDE = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()
NATIVE = Variant("native", ("-march=native", *_WIDE, "-fopenmp"))
"""The processor of the compiling machine."""

_V3 = frozenset({
    "abm", "avx", "avx2", "bmi1", "bmi2", "cx16", "f16c", "fma", "lahf_lm", "movbe", "pni", "popcnt", "sse4_1",
    "sse4_2", "ssse3", "xsave",
})  # fmt: skip
_V4 = _V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}
_SHIPPED = ("-mprefer-vector-width=512", "-Wp,-fopenmp", "-s")
"""`-fopenmp` is passed to the compiler but not to the linker: the library then links no OpenMP runtime and uses the one
that torch has loaded. A second runtime would create a second thread pool."""
VARIANTS = (
    Variant("x86-64-v4-bf16", ("-march=x86-64-v4", "-mavx512bf16", *_SHIPPED), _V4 | {"avx512_bf16"}),
    Variant("x86-64-v4", ("-march=x86-64-v4", *_SHIPPED), _V4),
    Variant("x86-64-v3", ("-march=x86-64-v3", *_SHIPPED), _V3),
)
"""The variants in a wheel, the best one first: for Zen 4, Sapphire Rapids and Cooper Lake; for Skylake-X and Ice Lake;
for Haswell, Zen 1 to 3 and laptop processors. The results of variants may differ in the last digits. The wheel needs
glibc 2.28 or newer."""


def choose(machine: str, features: Collection[str]) -> Variant | None:
    """The best variant for a processor; None if no variant of a wheel supports it.

    Args:
        machine: The architecture, as printed by `uname -m`.
        features: The processor features, see `Variant.features`.
    """
    variants = VARIANTS if machine == "x86_64" else ()
    return next((variant for variant in variants if variant.features <= set(features)), None)


def source_text() -> str:
    """All sources, concatenated."""
    return "".join(source.read_text(encoding="utf-8") for source in SOURCES)


def functions() -> list[str]:
    """The names of the exported functions of a library: the non-static functions of the sources."""
    return re.findall(r"^(?:void|int) (\w+)\(", source_text(), re.MULTILINE)


def compile_library(compiler: str, variant: Variant, define: str, cwd: str) -> None:
    """Compile `library.so` in a directory. Raises CalledProcessError, TimeoutExpired, OSError.

    A compiler starts child processes such as `cc1`. On timeout or interruption, all of them are killed.
    """
    sources = [str(source) for source in SOURCES if source.suffix == ".c"]
    command = [compiler, *FLAGS, *variant.options, define, *sources, "-o", "library.so", "-lm"]
    if compiler in _hanging:
        raise subprocess.TimeoutExpired(command, _MAX_SECONDS)
    with subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, "TMPDIR": ".", "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    ) as process:
        try:
            output, errors = process.communicate(timeout=_MAX_SECONDS)
        except BaseException as error:
            if isinstance(error, subprocess.TimeoutExpired):
                _hanging.add(compiler)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output, errors)


def reason(error: Exception) -> str:
    """The reason of an error in one line; for a compiler, its first error message."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.decode(errors="replace").splitlines() if line.strip()]
        message = next((line for line in lines if "error" in line), lines[0] if lines else "")
        return f"{error.cmd[0]} ended with {error.returncode}" + (f": {message.strip()[:200]}" if message else "")
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{error.cmd[0]} took more than {_MAX_SECONDS} s"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if isinstance(error.filename, str) else "")
    return (str(error).splitlines() or [type(error).__name__])[0]


def sealed(key: str, content: bytes) -> bytes:
    """A library followed by a digest of its key and content, so that it is only accepted with the same key."""
    return content + hashlib.sha256(key.encode() + content).digest()


def unsealed(key: str, whole: bytes) -> bytes | None:
    """The content of a library sealed with this key; None if the key differs or the library is damaged."""
    content = whole[:-DIGEST_BYTES]
    return content if whole == sealed(key, content) else None
