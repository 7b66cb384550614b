"""The standard streams, made robust before anything is printed, and escaped. Messages go to stderr, results to stdout.

A stream may be closed: the next file that is opened would get its descriptor, and then receive the output. Its encoding
may lack a character that is printed, or its file may be on a full disk. A finished run must survive all of these.
"""

import io
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from rich.console import Console
from rich.text import Text

from loratune.codes import Code
from loratune.errors import Problem, ResourceError, is_disk_full
from loratune.outputs import Failure
from loratune.text import one_line, printable, without_userinfo


def secure() -> None:
    """Open closed streams on /dev/null, escape unencodable characters, and make failures of stdout a specific error."""
    closed = [number for number in (0, 1, 2) if not _is_open(number)]  # in this order each gets its own descriptor
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


def discard_stderr() -> None:
    """Discard what is written to stderr from here on, by native code too."""
    with suppress(OSError, ValueError):
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _escape(stream: Any) -> None:
    """Print `\\u2192` if the encoding has no arrow, unless PYTHONIOENCODING sets another error handler."""
    if stream.errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="backslashreplace")


def _output(original: Any) -> io.TextIOWrapper:
    """Standard output that writes through `_StandardOutput`, otherwise like the original, which is None if closed."""
    if original is not None:
        original.flush()
    raw = _StandardOutput(1, "w", closefd=False)
    unbuffered = original is not None and isinstance(original.buffer, io.RawIOBase)  # python -u
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
    """The byte stream of standard output. The first failed write raises an error; later writes are dropped.

    Raises:
        BrokenPipeError: The reader has closed the pipe.
        ResourceError: Anything else, such as a full disk.
    """

    _failed = False

    def write(self, data: Any) -> int:
        """Write bytes; returns their number."""
        size = memoryview(data).nbytes
        if self._failed or not size:  # typer writes zero bytes to detect the kind of stream
            return size
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except BrokenPipeError:
            self._failed = True
            # without an errno, because typer would exit on EPIPE
            raise BrokenPipeError("nobody reads standard output any more") from None
        except OSError as error:
            self._failed = True
            reason, fix = f"it cannot be written: {error.strerror}", ""
            if is_disk_full(error):
                reason, fix = "the disk is full", "make room"
            what = f"not everything was printed, because {reason}; all other work is done"
            raise ResourceError(Problem(Code.OUTPUT_FAILED, what, "standard output", fix=fix)) from None


class _Stream(io.TextIOBase):
    """A wrapper around another stream. raw: the wrapped stream."""

    def __init__(self, stream: Any):
        self.raw = stream

    def isatty(self) -> bool:
        """As the wrapped stream."""
        return bool(self.raw.isatty())

    def fileno(self) -> int:
        """As the wrapped stream."""
        return int(self.raw.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """As the wrapped stream."""
        return str(self.raw.encoding)

    @property
    def errors(self) -> str:  # type: ignore[override]
        """As the wrapped stream; `input` supports line editing only for streams that have it."""
        return str(self.raw.errors)


class LossyStream(_Stream):
    """A stream for messages that may be lost: a run continues if their reader has gone or the disk is full.

    Whole lines are written to the file descriptor, bypassing Python's buffers: a signal may raise an exception or run
    its handler in the middle of a write, without a lock being held or anything being written twice.
    """

    _pending = ""

    def write(self, text: str) -> int:
        """Write text; failures are ignored."""
        self._pending += text
        if "\n" in text or "\r" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Write the pending text, or drop it."""
        data, self._pending = self._pending.encode(self.encoding, self.errors), ""
        with suppress(OSError, ValueError):
            while data:  # Linux does not mix up to 4,096 bytes with those of other processes
                data = data[os.write(self.fileno(), data[:4096]) :]


class EscapedStream(_Stream):
    """A stream that escapes everything that a terminal would interpret, whichever code writes it.

    `err` and `out` write their own bars and colours to the wrapped stream.
    """

    def write(self, text: str) -> int:
        """Write the text escaped, except for a leading carriage return, which progress bars of libraries need."""
        restarts_line = text.startswith("\r") and self.isatty()
        self.raw.write(f"\r{printable(text[1:])}" if restarts_line else printable(text))
        return len(text)

    def flush(self) -> None:
        """As the wrapped stream."""
        self.raw.flush()

    def close(self) -> None:
        """Do nothing: Python closes unreferenced streams, which would hide write errors of the wrapped stream."""


@contextmanager
def escape_output() -> Iterator[None]:
    """Route all output inside through an `EscapedStream`."""
    originals = {name: stream for name in ("stdout", "stderr") if (stream := getattr(sys, name)) is not None}
    streams = {name: EscapedStream(stream) for name, stream in originals.items()}
    try:
        for name, stream in streams.items():
            setattr(sys, name, stream)
        yield
    finally:
        for name, stream in streams.items():
            if getattr(sys, name) is stream:  # else it was replaced because its reader has gone
                setattr(sys, name, originals[name])


def raw_output() -> Any:
    """Standard output, unescaped for files and other programs, escaped for a terminal."""
    stream = sys.stdout
    return stream.raw if isinstance(stream, EscapedStream) and not stream.isatty() else stream


class _Console(Console):
    """A console that writes to the stream wrapped by an `EscapedStream`, so that its own colours and bars are kept.

    Its callers escape the text that they print.
    """

    @property
    def file(self) -> Any:
        """The stream wrapped by the `EscapedStream`."""
        stream = super().file
        return stream.raw if isinstance(stream, EscapedStream) else stream

    @file.setter
    def file(self, new: Any) -> None:
        Console.file.fset(self, new)  # type: ignore[attr-defined]


err = _Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
out = _Console(highlight=False, soft_wrap=True, emoji=False)


def log(*lines: str) -> None:
    """Print status lines on stderr."""
    for line in lines:
        _print_to(err, one_line(without_userinfo(line)))


def print_lines(lines: Iterable[str]) -> None:
    """Print lines on stdout. In a terminal, long ones are wrapped between words, under the beginning of their text;
    but tables and commands are not."""
    for line in lines:
        if out.is_terminal:
            _print_to(out, line)
        else:
            print(line)


def _print_to(console: Console, line: str) -> None:
    """Print a line on a console; in a terminal, coloured, and wrapped between words."""
    for part in wrapped(line, console.width) if console.is_terminal else [line]:
        console.print(coloured(printable(part)))


def columns() -> int:
    """The width of the terminal that stdout goes to; unlimited if it goes elsewhere."""
    return out.width if out.is_terminal else sys.maxsize


_COLOURS = {"✓": "bold green", "✗": "bold red", "?": "bold yellow", "!": "bold yellow", "error": "bold red"}
"""The beginning of a line → its colour: good, bad or an error, unknown or a warning."""
_MARK = re.compile(r" *(✓|✗|\?|!|error)(?=[ \[:])")


def coloured(line: str) -> Text:
    """A line whose mark, if it begins with one, is coloured in a terminal. It is to be safe to print."""
    text = Text(line)
    if found := _MARK.match(line):
        text.stylize(_COLOURS[found[1]], *found.span(1))
    return text


_LABEL = re.compile(r" *(?:\S+(?: \S+)* {2,})?")
"""The beginning of a line up to its text: its indentation, and a name that is set apart from the text."""
_COMMAND = re.compile(r"(?:python -m )?loratune (?!\d)|pip install |vllm serve ")


def wrapped(line: str, width: int) -> list[str]:
    """A line as lines of a width, wrapped between words."""
    label = _LABEL.match(line)
    start = label.end() if label and label.end() < min(width // 2, 24) else 0
    text = line[start:]
    if len(line) <= width or "  " in text or _COMMAND.match(text):
        return [line]
    return textwrap.wrap(
        text, width, initial_indent=line[:start], subsequent_indent=" " * start, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def print_json(values: Any, file: Any = None, indent: int | None = 2) -> None:
    """Print JSON, on stdout by default, with all control characters escaped: `json` does not escape DEL. NaN and
    infinity, which JSON lacks, become null."""
    values = json.loads(json.dumps(values), parse_constant=lambda _: None)
    print(json.dumps(values, indent=indent).replace("\x7f", "\\u007f"), file=file, flush=True)


def print_problems(problems: Sequence[Problem], exit_code: int, file: Any = None) -> None:
    """Print errors, on stderr by default: a line for each, or one line of JSON if the command prints JSON."""
    if as_json.get():
        failure: Failure = {"exit_code": exit_code, "errors": [one.to_dict() for one in problems]}
        print_json(failure, file or sys.stderr, None)
        return
    for problem in problems:
        code = f"[{problem.code}]" if "." in problem.code else ""
        line = f"error{code}: {problem.text}"
        if file is None and err.is_terminal:
            _print_to(err, line)
        else:
            print(line, file=file or sys.stderr, flush=True)


as_json: ContextVar[bool] = ContextVar("as_json", default=False)
"""Whether the command prints JSON."""


def marked(pieces: Iterable[tuple[str, bool]]) -> str:
    """Pieces of text in one, with supervised ones in ⟦ ⟧."""
    return "".join(f"⟦{piece}⟧" if supervised else piece for piece, supervised in pieces)


def print_marked(pieces: Iterable[tuple[str, bool]], console: Console = out) -> None:
    """Print text with supervised pieces in green in a terminal, and in ⟦ ⟧ elsewhere.

    pieces: pieces of text, each with whether it is supervised.
    """
    if console.is_terminal:
        safe = [(printable(piece), supervised) for piece, supervised in pieces]
        console.print(Text.assemble(*[(piece, "bold green" if supervised else "dim") for piece, supervised in safe]))
    else:
        console.print(printable(marked(pieces)), markup=False)
