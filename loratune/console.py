"""Prints messages and progress to stderr, and results in small aligned blocks to stdout."""

import io
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

from loratune import escaping


class EscapedStream(io.TextIOBase):
    """A stream that escapes everything that a terminal would interpret, whichever code writes it.

    raw: the stream behind it, to which `err` and `out` write their own bars and colours.
    """

    def __init__(self, stream: Any):
        self.raw = stream

    def write(self, text: str) -> int:
        """Write the text escaped; only a carriage return at its start stays, for progress bars of libraries."""
        restarts_line = text.startswith("\r") and self.isatty()
        safe = f"\r{escaping.text(text[1:])}" if restarts_line else escaping.text(text)
        self.raw.write(safe)
        return len(text)

    def flush(self) -> None:
        """As the stream behind it."""
        self.raw.flush()

    def close(self) -> None:
        """Nothing: Python closes an unreferenced stream, which would hide that the one behind it cannot be written."""

    def isatty(self) -> bool:
        """As the stream behind it."""
        return bool(self.raw.isatty())

    def fileno(self) -> int:
        """As the stream behind it."""
        return int(self.raw.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """As the stream behind it."""
        return str(self.raw.encoding)

    @property
    def errors(self) -> str:  # type: ignore[override]
        """As the stream behind it; `input` edits lines only where it knows them."""
        return str(self.raw.errors)


@contextmanager
def escape_output() -> Iterator[None]:
    """Inside, all that is printed goes through an `EscapedStream`."""
    originals = {name: stream for name in ("stdout", "stderr") if (stream := getattr(sys, name)) is not None}
    streams = {name: EscapedStream(stream) for name, stream in originals.items()}
    try:
        for name, stream in streams.items():
            setattr(sys, name, stream)
        yield
    finally:
        for name, stream in streams.items():
            if getattr(sys, name) is stream:  # else it was replaced because nobody reads it
                setattr(sys, name, originals[name])


def raw_output() -> Any:
    """Standard output as another program reads it, without escapes; on a terminal with them."""
    stream = sys.stdout
    return stream.raw if isinstance(stream, EscapedStream) and not stream.isatty() else stream


class _Console(Console):
    """A console that writes to the stream behind an `EscapedStream`, so that its own colours and bars come through.

    Its callers escape what they print with it.
    """

    @property
    def file(self) -> Any:
        """The stream behind the `EscapedStream`."""
        stream = super().file
        return stream.raw if isinstance(stream, EscapedStream) else stream

    @file.setter
    def file(self, new: Any) -> None:
        Console.file.fset(self, new)  # type: ignore[attr-defined]


err = _Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
out = _Console(highlight=False, soft_wrap=True, emoji=False)


def log(*lines: str) -> None:
    """Print lines on stderr about what is going on."""
    for line in lines:
        err.print(escaping.line(line), markup=False)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines on stdout."""
    for line in lines:
        print(line)


def print_json(values: Any) -> None:
    """Print indented JSON on stdout, with everything escaped that a terminal would obey: `json` does not escape DEL."""
    print(json.dumps(values, indent=2).replace("\x7f", "\\u007f"))


def print_marked(pieces: Iterable[tuple[str, bool]], console: Console = out) -> None:
    """Print text whose supervised pieces are green in a terminal, and are between ⟦ ⟧ elsewhere.

    pieces: each with whether it is supervised.
    """
    if console.is_terminal:
        safe = [(escaping.text(piece), supervised) for piece, supervised in pieces]
        console.print(Text.assemble(*[(piece, "bold green" if supervised else "dim") for piece, supervised in safe]))
    else:
        text = "".join(f"⟦{piece}⟧" if supervised else piece for piece, supervised in pieces)
        console.print(escaping.text(text), markup=False)
