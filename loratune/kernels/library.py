"""The compiled library of fused operations: built with the machine's compiler, and cached where only its owner writes.

A library becomes part of the process that loads it. So the owner and the mode of the directory and of the file are
checked, and a digest shows whether the file is damaged. The checked bytes are copied into memory and loaded from there:
nobody can change or truncate them while they are used.
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
from dataclasses import dataclass
from pathlib import Path

from loratune.system.files import make_private_directory, open_private_directory, ownership_problem

_log = logging.getLogger(__name__)

SOURCES = [Path(__file__).parent / "csrc" / name for name in ("numbers.h", "fused_ops.c", "attention.c")]
FLAGS = "-std=gnu11 -O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -shared -fPIC"

_DIGEST_BYTES = hashlib.sha256().digest_size
_MAX_BYTES = 64 << 20  # Of a file that is read; a library has 100 kB.
_MAX_SECONDS = 120  # For the compiler, which needs about three.


@dataclass(frozen=True)
class Library:
    """A loaded library.

    Attributes:
        functions: The library; None if there is none, and the reference in torch is used.
        note: A line for the user, or None.
        name: A name that stands for sources, compiler and processor, see `_key`.
    """

    functions: ctypes.CDLL | None
    note: str | None = None
    name: str = "none"


def load(define: str) -> Library:
    """The library for one dtype, from the cache or built now. It does not fail: the note says what the machine lacks.

    define: the option of the compiler that chooses the dtype.
    """
    executable = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if executable is None:
        return Library(None, "there is no C compiler (gcc, cc or clang), and training is slower without one")
    compiler = os.path.abspath(executable)
    try:
        return _load_cached(compiler, define)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # No home directory, space or permission.
        reason = _reason(error)
    except subprocess.TimeoutExpired as error:
        return Library(None, f"the fast CPU code is not used: {_reason(error)}")
    try:
        with tempfile.TemporaryDirectory(prefix="loratune-") as scratch, _open_directory(Path(scratch)) as directory:
            functions = _link(_compile(compiler, define, directory))
        note = f"the fast CPU code is built again for this run: {reason}"
        return Library(functions, note, _name(_key(compiler, define)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return Library(None, f"the fast CPU code is not used: {_reason(error)}")


def _reason(error: Exception) -> str:
    """What went wrong, in one line; of a compiler, its first error."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.decode(errors="replace").splitlines() if line.strip()]
        message = next((line for line in lines if "error" in line), lines[0] if lines else "")
        return f"{error.cmd[0]} ended with {error.returncode}" + (f": {message.strip()[:200]}" if message else "")
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{error.cmd[0]} took more than {_MAX_SECONDS} s"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return (str(error).splitlines() or [type(error).__name__])[0]


def cache_directory() -> Path:
    """The directory of the cache. Raises RuntimeError: there is no home directory."""
    value = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(value) if os.path.isabs(value) else Path.home() / ".cache"  # The XDG specification ignores others.
    return cache / "loratune"


def _load_cached(compiler: str, define: str) -> Library:
    """From the cache; built into it if it is missing, damaged, or cannot be loaded."""
    key, path = _key(compiler, define), cache_directory()
    make_private_directory(path)
    with _open_directory(path, repair=True) as directory:
        repaired, name = directory.repaired, f"{_name(key)}.so"
        if not repaired and (content := directory.read(name, key)) is not None:
            try:
                return Library(_link(content), name=_name(key))
            except OSError:
                _log.debug("%s from the cache cannot be loaded, and is built again", name, exc_info=True)
        content = _compile(compiler, define, directory)
        functions = _link(content)
        try:
            directory.write(name, key, content)
        except OSError as error:
            return Library(functions, f"the fast CPU code could not be kept in {path}: {_reason(error)}", _name(key))
    note = f"others could write to {path}: now only you can, and what lay there was not used"
    return Library(functions, note if repaired else None, _name(key))


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
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or ownership_problem(status):
                return None
            whole = file.read(_MAX_BYTES)
        content, digest = whole[:-_DIGEST_BYTES], whole[-_DIGEST_BYTES:]
        return content if digest == _digest(key, content) else None

    def write(self, name: str, key: str, content: bytes) -> None:
        """Write a file with its digest at its end, whole or not at all."""
        unfinished = f"{name}.{uuid.uuid4().hex}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(unfinished, flags, 0o600, dir_fd=self.descriptor), "wb") as file:
                file.write(content + _digest(key, content))
                file.flush()
                os.fsync(file.fileno())
            os.rename(unfinished, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        except OSError:
            with suppress(OSError):
                os.unlink(unfinished, dir_fd=self.descriptor)
            raise
        os.fsync(self.descriptor)


def _digest(key: str, content: bytes) -> bytes:
    """The digest of a library and its key, so that no library passes for one with another key."""
    return hashlib.sha256(key.encode() + content).digest()


@contextmanager
def _open_directory(path: Path, *, repair: bool = False) -> Iterator[_Directory]:
    """A directory that only this user can write to, see `open_private_directory`."""
    with open_private_directory(path, repair=repair) as directory:
        yield _Directory(directory.descriptor, directory.repaired)


def _compile(compiler: str, define: str, directory: _Directory) -> bytes:
    """Build the library in a scratch directory, and return its bytes."""
    sources = [str(source) for source in SOURCES if source.suffix == ".c"]
    wide = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
    scratch = f"build-{uuid.uuid4().hex}"
    os.mkdir(scratch, 0o700, dir_fd=directory.descriptor)
    try:
        inside = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory.descriptor)
        try:
            subprocess.run(
                [compiler, *FLAGS.split(), *wide, define, *sources, "-o", "made.so", "-lm"],
                cwd=f"/proc/self/fd/{inside}",  # The compiler's process inherits the descriptor.
                env={**os.environ, "TMPDIR": ".", "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=True,
                timeout=_MAX_SECONDS,
            )
            with os.fdopen(os.open("made.so", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=inside), "rb") as file:
                return file.read(_MAX_BYTES)
        finally:
            os.close(inside)
    finally:
        shutil.rmtree(scratch, ignore_errors=True, dir_fd=directory.descriptor)


def _link(content: bytes) -> ctypes.CDLL:
    """Load a library from memory. Raises OSError: the linker refuses it, for example without OpenMP's runtime.

    The descriptor stays open: the linker knows libraries by their path, and another one could get the same number.
    """
    descriptor = os.memfd_create("loratune", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(content)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except OSError:
        os.close(descriptor)
        raise


def _name(key: str) -> str:
    return f"native-{key}"


def _key(compiler: str, define: str) -> str:
    """A hash of everything that a library depends on: source, compiler, processor, and C library."""
    processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    features = [line for line in processor.splitlines() if line.startswith(("flags", "Features", "model name"))]
    status = Path(compiler).resolve().stat()
    text = "".join(source.read_text(encoding="utf-8") for source in SOURCES)
    machine = [features, platform.machine(), platform.libc_ver()]
    parts = [text, FLAGS, define, compiler, status.st_mtime_ns, status.st_size, machine]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
