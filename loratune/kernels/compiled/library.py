"""The compiled library of fused operations: one that came with loratune, or one that this machine's compiler makes.

What is compiled here is kept in a cache. A library becomes part of the process that loads it. So the owner and the mode
of the cache's directory and of the file are checked, and a digest shows whether the file is damaged. The checked bytes
are copied into memory and loaded from there: nobody can change or truncate them while they are used.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from loratune.events import progress
from loratune.kernels.compiled import build
from loratune.kernels.compiled.build import NATIVE, Variant, reason
from loratune.system.files import make_private_directory, open_private_directory, ownership_problem

_log = logging.getLogger(__name__)

_MAX_BYTES = 64 << 20  # Of a file that is read; a library has 100 kB.
_REINSTALL = "install loratune again (pip install --force-reinstall --no-deps)"
_INSTALL_COMPILER = "install gcc (Debian, Ubuntu: apt install gcc libc6-dev)"


@dataclass(frozen=True)
class Library:
    """A loaded library.

    Attributes:
        functions: The library; None if there is none, and the reference in torch is used.
        note: A line for the user: what is wrong, and what to do about it; None if all is as it should be.
        name: Its variant, and a hash that stands for what it computes; empty if there is none.
    """

    functions: ctypes.CDLL | None
    note: str | None = None
    name: str = ""


def load(define: str) -> Library:
    """The library for one dtype: the one that came with loratune, or else one that is compiled here. It does not fail.

    Those that came with loratune need the OpenMP runtime that torch loads, so torch must have been imported.

    define: the option of the compiler that chooses the dtype.
    """
    if not build.SHIPPED.is_dir():  # A checkout, or a wheel that was built without a compiler.
        return compiled(define)
    variant = build.choose(platform.machine(), features())
    if variant is None:
        library = compiled(define)
        why = f"loratune came with compiled code for other processors than this one, and {library.note}"
        return replace(library, note=why) if library.functions is None else library
    try:
        return _load_shipped(variant, define)
    except OSError as error:
        why = f"the compiled code that loratune came with cannot be used: {reason(error)}"
    library = compiled(define)
    if library.functions is None:
        return replace(library, note=f"{why}; and {library.note}")
    parts = [why, "it is compiled on this machine instead", *([library.note] if library.note else [])]
    return replace(library, note="; ".join(parts))


def _load_shipped(variant: Variant, define: str) -> Library:
    """The library that a wheel has for a processor. Raises OSError: it is missing, damaged, or cannot be loaded."""
    path = build.SHIPPED / variant.file_name(define)
    content = build.unsealed(variant.key(define), path.read_bytes() if path.is_file() else b"")
    if content is None:
        raise OSError(f"{path} is missing, damaged, or of another release: {_REINSTALL}")
    return Library(_link(content), name=f"{variant.name}-{hashlib.sha256(content).hexdigest()[:16]}")


def features() -> frozenset[str]:
    """What the processor has and the operating system lets programs use, by the names in `/proc/cpuinfo`.

    Nothing is known of it where that file cannot be read, as in some sandboxes.
    """
    try:
        lines = [line.partition(":") for line in _processor().splitlines()]
    except OSError:
        _log.debug("the processor is not known", exc_info=True)
        return frozenset()
    return frozenset(
        word for name, _, words in lines if name.startswith(("flags", "Features")) for word in words.split()
    )


def _processor() -> str:
    """What Linux says of the first processor."""
    return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]


@progress("compiling the fast CPU code")
def compiled(define: str, variant: Variant = NATIVE) -> Library:
    """The library that this machine's compiler makes for one dtype, from the cache or now. It does not fail."""
    executable = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if executable is None:
        return Library(None, f"there is no C compiler (gcc, cc or clang); {_INSTALL_COMPILER}")
    compiler = os.path.abspath(executable)
    try:
        return _load_cached(compiler, variant, define)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # No home directory, space or permission.
        why = reason(error)
    except subprocess.TimeoutExpired as error:
        return Library(None, f"compiling the fast CPU code failed: {reason(error)}; {_INSTALL_COMPILER}")
    try:
        with tempfile.TemporaryDirectory(prefix="loratune-") as scratch, _open_directory(Path(scratch)) as directory:
            functions = _link(_compile(compiler, variant, define, directory))
        note = f"the fast CPU code is compiled again for each run, as it cannot be kept: {why}"
        return Library(functions, note, _name(variant, _key(compiler, variant, define)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return Library(None, f"compiling the fast CPU code failed: {reason(error)}; {_INSTALL_COMPILER}")


def cache_directory() -> Path:
    """The directory of the cache. Raises RuntimeError: there is no home directory."""
    value = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(value) if os.path.isabs(value) else Path.home() / ".cache"  # The XDG specification ignores others.
    return cache / "loratune"


def _load_cached(compiler: str, variant: Variant, define: str) -> Library:
    """From the cache; compiled into it if it is missing, damaged, or cannot be loaded."""
    key, path = _key(compiler, variant, define), cache_directory()
    library_name = _name(variant, key)
    make_private_directory(path)
    with _open_directory(path, repair=True) as directory:
        repaired, name = directory.repaired, f"{library_name}.so"
        if not repaired and (content := directory.read(name, key)) is not None:
            try:
                return Library(_link(content), name=library_name)
            except OSError:
                _log.debug("%s from the cache cannot be loaded, and is compiled again", name, exc_info=True)
        content = _compile(compiler, variant, define, directory)
        functions = _link(content)
        try:
            directory.write(name, key, content)
        except OSError as error:
            note = f"the fast CPU code is compiled again for each run, as {path} cannot keep it: {reason(error)}"
            return Library(functions, note, library_name)
    note = f"others could write to {path}: now only you can, and what was there was not used"
    return Library(functions, note if repaired else None, library_name)


@dataclass(frozen=True)
class _Directory:
    """An open directory that only this user can write to.

    Attributes:
        descriptor: Its file descriptor, by which its files are opened: the directory's path could change meanwhile.
        repaired: Others could write to it until now.
    """

    descriptor: int
    repaired: bool

    def read(self, name: str, key: str) -> bytes | None:
        """What `write` has written; None if it is missing, damaged, or others can write to it."""
        try:
            descriptor = os.open(
                name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.descriptor
            )
        except FileNotFoundError:
            return None
        except OSError:
            _log.debug("%s is not read from the cache", name, exc_info=True)
            return None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or ownership_problem(status):
                return None
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return build.unsealed(key, file.read(_MAX_BYTES))
        finally:
            os.close(descriptor)

    def write(self, name: str, key: str, content: bytes) -> None:
        """Write a file, sealed with its key, whole or not at all."""
        unfinished = f"{name}.{uuid.uuid4().hex}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(unfinished, flags, 0o600, dir_fd=self.descriptor), "wb") as file:
                file.write(build.sealed(key, content))
                file.flush()
                os.fsync(file.fileno())
            os.rename(unfinished, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        except OSError:
            with suppress(OSError):
                os.unlink(unfinished, dir_fd=self.descriptor)
            raise
        os.fsync(self.descriptor)


@contextmanager
def _open_directory(path: Path, *, repair: bool = False) -> Iterator[_Directory]:
    """A directory that only this user can write to, see `open_private_directory`."""
    with open_private_directory(path, repair=repair) as directory:
        yield _Directory(directory.descriptor, directory.repaired)


def _compile(compiler: str, variant: Variant, define: str, directory: _Directory) -> bytes:
    """Compile the library in a scratch directory, and return its bytes."""
    scratch = f"build-{uuid.uuid4().hex}"
    os.mkdir(scratch, 0o700, dir_fd=directory.descriptor)
    try:
        descriptor = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory.descriptor)
        try:
            # The compiler's process inherits the descriptor.
            build.compile_library(compiler, variant, define, f"/proc/self/fd/{descriptor}")
            with os.fdopen(os.open("library.so", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=descriptor), "rb") as file:
                return file.read(_MAX_BYTES)
        finally:
            os.close(descriptor)
    finally:
        shutil.rmtree(scratch, ignore_errors=True, dir_fd=directory.descriptor)


def _link(content: bytes) -> ctypes.CDLL:
    """Load a library from memory. Raises OSError: the linker refuses it, for example without OpenMP's runtime, or it
    is another one than that of the sources.

    The descriptor stays open: the linker knows libraries by their path, and another one could get the same number.
    """
    descriptor = os.memfd_create("loratune", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(content)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        library = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except OSError:
        os.close(descriptor)
        raise
    if absent := [name for name in build.functions() if not hasattr(library, name)]:
        raise OSError(f"the library has no function {absent[0]}")
    return library


def _name(variant: Variant, key: str) -> str:
    return f"{variant.name}-{key}"


def _key(compiler: str, variant: Variant, define: str) -> str:
    """A hash of everything that a library depends on: source, compiler, processor, and C library."""
    lines = [line for line in _processor().splitlines() if line.startswith(("flags", "Features", "model name"))]
    status = Path(compiler).resolve().stat()
    machine = [lines, platform.machine(), platform.libc_ver()]
    parts = [variant.key(define), compiler, status.st_mtime_ns, status.st_size, machine]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
