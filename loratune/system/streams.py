"""Makes the standard streams of the process safe before anything is opened or printed.

A stream may be closed: its number would go to the next file that is opened, which would then receive what is printed.
Its encoding may lack a character that is printed, or its file may be on a full disk. A finished run must survive all of
these.
"""

import io
import os
import select
import sys
from contextlib import suppress
from typing import Any

from loratune.codes import Code
from loratune.errors import Problem, ResourceError, is_disk_full


def secure() -> None:
    """Open closed streams on /dev/null, escape what the encodings lack, and give failures of stdout their own error."""
    closed = [number for number in (0, 1, 2) if not _is_open(number)]  # in this order each gets its own number
    for _ in closed:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is not None:
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # reported with its prompt
    else:
        sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    _escape(sys.stderr)
    sys.stdout = _output(sys.stdout)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _escape(stream: Any) -> None:
    """Print `\\u2192` where the encoding has no arrow, unless the user chose otherwise by PYTHONIOENCODING."""
    if stream.errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="backslashreplace")


def _output(original: Any) -> io.TextIOWrapper:
    """Standard output over `_StandardOutput`, otherwise like the original, which is None if it was closed."""
    if original is not None:
        original.flush()
    raw = _StandardOutput(1, "w", closefd=False)
    unbuffered = original is not None and isinstance(original.buffer, io.RawIOBase)  # by python -u
    stream = io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=original.encoding if original is not None else "utf-8",
        errors=original.errors if original is not None else "backslashreplace",
        line_buffering=raw.isatty(),
        write_through=unbuffered,
    )
    _escape(stream)
    return stream


class _StandardOutput(io.FileIO):
    """The bytes of standard output. The first that cannot be written raise an error, and the rest is dropped.

    Raises:
        BrokenPipeError: Nobody reads it any more.
        ResourceError: Anything else, such as a full disk.
    """

    _failed = False

    def write(self, data: Any) -> int:
        """Write as a file does."""
        size = memoryview(data).nbytes
        if self._failed or not size:  # typer writes no bytes, to find out what kind of stream it is
            return size
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except BrokenPipeError:
            self._failed = True
            # without an error number, by which typer would end the process
            raise BrokenPipeError("nobody reads standard output any more") from None
        except OSError as error:
            self._failed = True
            reason, fix = f"it cannot be written: {error.strerror}", ""
            if is_disk_full(error):
                reason, fix = "the disk is full", "make room"
            what = f"not everything was printed, because {reason}; all other work is done"
            raise ResourceError(Problem(Code.OUTPUT_FAILED, what, "standard output", fix=fix)) from None


class LossyStream(io.TextIOBase):
    """A stream for messages, which may get lost: a run does not end because nobody reads them or the disk is full.

    Whole lines go to the file descriptor, past Python's buffers: a signal may raise an exception or run its handler in
    the middle of a write, without a lock being held or anything being written twice.
    """

    def __init__(self, stream: Any):
        self._stream, self._pending = stream, ""

    def write(self, text: str) -> int:
        """Write, or pretend to."""
        self._pending += text
        if "\n" in text or "\r" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Write what is pending, or drop it."""
        data, self._pending = self._pending.encode(self.encoding, self._stream.errors), ""
        with suppress(OSError, ValueError):
            while data:
                data = data[os.write(self.fileno(), data[: select.PIPE_BUF]) :]

    def isatty(self) -> bool:
        """As the stream behind it."""
        return bool(self._stream.isatty())

    def fileno(self) -> int:
        """As the stream behind it."""
        return int(self._stream.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """As the stream behind it."""
        return str(self._stream.encoding)
