"""The compiled library of fused operations: shipped with loratune, or compiled on this machine.

A library that is compiled here is an entry of the cache, which only trusts files that nobody else could have written.
The bytes are copied into memory and loaded from there, so nobody can change or truncate them while they are in use.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from loratune.events import progress
from loratune.kernels.compiled import build
from loratune.kernels.compiled.build import NATIVE, Variant, reason
from loratune.system import environment
from loratune.system.cache import EntryKind, cache_directory
from loratune.system.platforms import sealed_file

LIBRARIES = EntryKind(cache_directory, ".so", days=90, most=100)
_REINSTALL = "install loratune again (pip install --force-reinstall --no-deps)"
_NOT_KEPT = "the fast CPU code is compiled again for each run, as it cannot be kept: {}"
_INSTALL_COMPILER = "install gcc (Debian, Ubuntu: apt install gcc libc6-dev)"


@dataclass(frozen=True)
class Library:
    """A loaded library.

    Attributes:
        functions: The library; None if it is missing, so that the reference in torch is used.
        note: A line for the user: a problem and its fix; None if there is none.
        name: Its variant and a hash of its content or sources; empty without a library.
    """

    functions: ctypes.CDLL | None
    note: str | None = None
    name: str = ""


def load(define: str) -> Library:
    """The library for one dtype: shipped with loratune, otherwise compiled here. It never raises.

    Shipped libraries need the OpenMP runtime that torch loads, so torch must have been imported.

    define: the compiler option that selects the dtype.
    """
    if not build.SHIPPED.is_dir():  # A checkout, or a wheel that was built without a compiler.
        return compiled(define)
    variant = build.choose(platform.machine(), environment.features())
    if variant is None:
        library, why = compiled(define), "loratune came with compiled code for other processors than this one"
        return replace(library, note=f"{why}, and {library.note}") if library.functions is None else library
    try:
        return _load_shipped(variant, define)
    except OSError as error:
        why = f"the compiled code that loratune came with cannot be used: {reason(error)}"
    library = compiled(define)
    if library.functions is None:
        return replace(library, note=f"{why}; and {library.note}")
    return replace(library, note="; ".join(filter(None, (why, "it is compiled on this machine instead", library.note))))


def _load_shipped(variant: Variant, define: str) -> Library:
    """The library of a wheel for a variant. Raises OSError: it is missing, damaged, or cannot be loaded."""
    path = build.SHIPPED / variant.file_name(define)
    content = build.unsealed(variant.key(define), path.read_bytes() if path.is_file() else b"")
    if content is None:
        raise OSError(f"{path} is missing, damaged, or of another release: {_REINSTALL}")
    return Library(_link(content), name=f"{variant.name}-{hashlib.sha256(content).hexdigest()[:16]}")


@progress("compiling the fast CPU code")
def compiled(define: str, variant: Variant = NATIVE) -> Library:
    """The library for one dtype, from the cache or compiled now by this machine's compiler. It never raises."""
    executable = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if executable is None:
        return Library(None, f"there is no C compiler (gcc, cc or clang); {_INSTALL_COMPILER}")
    compiler = os.path.abspath(executable)
    try:
        key = _key(compiler, variant, define)
        name = f"{variant.name}-{key[:16]}"
        if (content := LIBRARIES.read(key)) is not None:
            with suppress(OSError):  # for example, the OpenMP runtime was removed
                return Library(_link(content), name=name)
        content = _compile(compiler, variant, define)
        functions = _link(content)
        why = LIBRARIES.write(key, content)
        return Library(functions, _NOT_KEPT.format(why) if why else None, name)
    except (OSError, subprocess.SubprocessError) as error:
        return Library(None, f"compiling the fast CPU code failed: {reason(error)}; {_INSTALL_COMPILER}")


def _compile(compiler: str, variant: Variant, define: str) -> bytes:
    """Compile the library in a scratch directory, and return its bytes."""
    with tempfile.TemporaryDirectory(prefix="loratune-") as scratch:
        build.compile_library(compiler, variant, define, scratch)
        return Path(scratch, "library.so").read_bytes()


def _link(content: bytes) -> ctypes.CDLL:
    """Load a library from memory. Raises OSError: the linker refuses it, for example without an OpenMP runtime, or it
    does not match the sources.

    The descriptor stays open: the linker identifies libraries by path, and another one could get the same number.
    """
    descriptor = sealed_file(content)
    try:
        library = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except OSError:
        os.close(descriptor)
        raise
    if absent := [name for name in build.functions() if not hasattr(library, name)]:
        raise OSError(f"the library has no function {absent[0]}")
    return library


def _key(compiler: str, variant: Variant, define: str) -> str:
    """A hash of everything that a library depends on: source, compiler, processor, and C library."""
    lines = [
        line
        for line in environment.processor_entry().splitlines()
        if line.startswith(("flags", "Features", "model name"))
    ]
    status = Path(compiler).resolve().stat()
    machine = [lines, platform.machine(), platform.libc_ver()]
    parts = [variant.key(define), compiler, status.st_mtime_ns, status.st_size, machine]
    return hashlib.sha256(repr(parts).encode()).hexdigest()
