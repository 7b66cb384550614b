"""The standard streams of the process, made safe before anything is opened or printed.

A stream may be closed, and its number would go to the next file that is opened, which then gets what is printed. It may
have an encoding without a sign that is printed, or lie on a disk that is full. None of these may cost a finished run.
"""

import io
import os
import sys
from typing import Any

from loratune.errors import Problem, ResourceError, is_disk_full


def secure() -> None:
    """Open closed streams on /dev/null, escape what the encodings lack, and tell the failures of stdout from others."""
    closed = [number for number in (0, 1, 2) if not _is_open(number)]  # in this order each takes its own number
    for _ in closed:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is not None:
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # told with the prompt that holds it
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
    """Print `\\u2192` where the encoding has no arrow; a choice of the user's, by PYTHONIOENCODING, holds."""
    if stream.errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="backslashreplace")


def _output(before: Any) -> io.TextIOWrapper:
    """Standard output over `_Output`, otherwise as it was before, which is None where it was closed."""
    if before is not None:
        before.flush()
    raw = _Output(1, "w", closefd=False)
    unbuffered = before is not None and isinstance(before.buffer, io.RawIOBase)  # by python -u
    made = io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=before.encoding if before is not None else "utf-8",
        errors=before.errors if before is not None else "backslashreplace",
        line_buffering=raw.isatty(),
        write_through=unbuffered,
    )
    _escape(made)
    return made


class _Output(io.FileIO):
    """The bytes of standard output. Once they cannot be written, that is said once, and the rest is dropped.

    Raises BrokenPipeError: the reader has gone. Raises ResourceError: anything else, as a full disk.
    """

    _lost = False

    def write(self, data: Any) -> int:
        """As a file does."""
        size = memoryview(data).nbytes
        if self._lost or not size:  # the command line's library writes nothing, to see what kind of stream it is
            return size
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except BrokenPipeError:
            self._lost = True
            raise BrokenPipeError(
                "the reader of standard output has gone"
            ) from None  # without the number that typer ends by
        except OSError as error:
            self._lost = True
            full = is_disk_full(error)
            what = "no room for what was to be printed" if full else f"cannot be written: {error.strerror}"
            fix = "make room" if full else ""
            raise ResourceError(Problem(f"{what}; all that was done stands", "standard output", fix=fix)) from None
