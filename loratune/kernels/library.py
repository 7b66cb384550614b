"""The passes in C as a library: built with the machine's own compiler, and kept in a cache that only its owner writes.

Whatever is loaded becomes part of the process, so the owner and the mode of the directory and the file are checked,
and a digest tells a damaged file. What was checked is copied into memory and loaded from there: nobody can change or
shorten it while it is used.
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

SOURCES = [Path(__file__).parent / "csrc" / name for name in ("numbers.h", "passes.c", "attention.c")]
FLAGS = "-std=gnu11 -O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -shared -fPIC"

_DIGEST = hashlib.sha256().digest_size
_MOST = 64 << 20  # bytes of a file that is read: a library has 100 kB
_SECONDS = 120  # that a compiler may take; it needs about three


@dataclass(frozen=True)
class Library:
    """functions: the library, or None: the reference in plain torch is used. note: a line for the user, or None.

    name: by which sources, compiler and processor are known, see `_key`.
    """

    functions: ctypes.CDLL | None
    note: str | None = None
    name: str = "none"


def load(define: str) -> Library:
    """The library for one dtype, from the cache or built now. define: of the compiler, what the dtype is.

    Never raises for what a machine lacks: the note says what is missing.
    """
    found = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if found is None:
        return Library(None, "there is no C compiler (gcc, cc or clang), and training is slower without one")
    compiler = os.path.abspath(found)
    try:
        return _kept(compiler, define)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # such as no home, no room, no rights
        reason = _reason(error)
    except subprocess.TimeoutExpired as error:
        return Library(None, f"the fast CPU code is not used: {_reason(error)}")
    try:
        with tempfile.TemporaryDirectory(prefix="loratune-") as scratch, _opened(Path(scratch)) as directory:
            functions = _linked(_compiled(compiler, define, directory))
        told = f"the fast CPU code is built anew for this run: {reason}"
        return Library(functions, told, _name(_key(compiler, define)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return Library(None, f"the fast CPU code is not used: {_reason(error)}")


def _reason(error: Exception) -> str:
    """One line of what went wrong. Of a compiler, its first complaint."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.decode(errors="replace").splitlines() if line.strip()]
        told = next((line for line in lines if "error" in line), lines[0] if lines else "")
        return f"{error.cmd[0]} ended with {error.returncode}" + (f": {told.strip()[:200]}" if told else "")
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{error.cmd[0]} took more than {_SECONDS} s"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return (str(error).splitlines() or [type(error).__name__])[0]


def place() -> Path:
    """The directory of the cache. Raises RuntimeError: there is no home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(given) if os.path.isabs(given) else Path.home() / ".cache"  # as the XDG specification has it
    return cache / "loratune"


def _kept(compiler: str, define: str) -> Library:
    """From the cache; built into it where it is not there, or is not what was put there, or cannot be loaded."""
    key, path = _key(compiler, define), place()
    make_private_directory(path)
    with _opened(path, mend=True) as directory:
        mended, name = directory.mended, f"{_name(key)}.so"
        if not mended and (content := directory.read(name, key)) is not None:
            try:
                return Library(_linked(content), name=_name(key))
            except OSError:
                _log.debug("%s from the cache cannot be loaded, and is built again", name, exc_info=True)
        content = _compiled(compiler, define, directory)
        functions = _linked(content)
        try:
            directory.write(name, key, content)
        except OSError as error:
            return Library(functions, f"the fast CPU code could not be kept in {path}: {_reason(error)}", _name(key))
    told = f"others could write to {path}: now only you can, and what lay there was not used"
    return Library(functions, told if mended else None, _name(key))


@dataclass(frozen=True)
class _Directory:
    """An open directory that is ours alone. Its files are reached through the descriptor: a path could be changed under
    us. mended: others could write to it until now."""

    descriptor: int
    mended: bool

    def read(self, name: str, key: str) -> bytes | None:
        """What `write` has put there, or None: it is not there, not ours alone, or not whole."""
        try:
            opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.descriptor)
        except FileNotFoundError:
            return None
        except OSError:
            _log.debug("%s is not read from the cache", name, exc_info=True)
            return None
        with os.fdopen(opened, "rb") as file:
            found = os.fstat(opened)
            if not stat.S_ISREG(found.st_mode) or ownership_problem(found):
                return None
            whole = file.read(_MOST)
        content, digest = whole[:-_DIGEST], whole[-_DIGEST:]
        return content if digest == _digest(key, content) else None

    def write(self, name: str, key: str, content: bytes) -> None:
        """Put a file there, whole or not at all; its digest stands at its end."""
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
    """Of a library and what it was built for, so that one does not pass for another."""
    return hashlib.sha256(key.encode() + content).digest()


@contextmanager
def _opened(path: Path, *, mend: bool = False) -> Iterator[_Directory]:
    """A directory that is ours alone, see `open_private_directory`."""
    with open_private_directory(path, repair=mend) as directory:
        yield _Directory(directory.descriptor, directory.repaired)


def _compiled(compiler: str, define: str, directory: _Directory) -> bytes:
    """The library, made in a directory of its own that is gone afterwards."""
    sources = [str(source) for source in SOURCES if source.suffix == ".c"]
    wide = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
    scratch = f"build-{uuid.uuid4().hex}"
    os.mkdir(scratch, 0o700, dir_fd=directory.descriptor)
    try:
        inside = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory.descriptor)
        try:
            subprocess.run(
                [compiler, *FLAGS.split(), *wide, define, *sources, "-o", "made.so", "-lm"],
                cwd=f"/proc/self/fd/{inside}",  # which the compiler's process still has when it goes there
                env={**os.environ, "TMPDIR": ".", "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=True,
                timeout=_SECONDS,
            )
            with os.fdopen(os.open("made.so", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=inside), "rb") as file:
                return file.read(_MOST)
        finally:
            os.close(inside)
    finally:
        shutil.rmtree(scratch, ignore_errors=True, dir_fd=directory.descriptor)


def _linked(content: bytes) -> ctypes.CDLL:
    """Load a library from memory. Raises OSError: the linker does not take it, as without OpenMP's own library.

    The descriptor stays open: the linker knows libraries by name, and would take another one in its place for this.
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
    """Of everything that a library depends on: the source, the compiler, the processor, the C library."""
    processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    features = [line for line in processor.splitlines() if line.startswith(("flags", "Features", "model name"))]
    found = Path(compiler).resolve().stat()
    text = "".join(source.read_text(encoding="utf-8") for source in SOURCES)
    machine = [features, platform.machine(), platform.libc_ver()]
    parts = [text, FLAGS, define, compiler, found.st_mtime_ns, found.st_size, machine]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
