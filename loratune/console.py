"""What the user sees: progress and messages on stderr, results in small aligned blocks on stdout."""

import io
import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar
from rich.text import Text

from loratune import escaping
from loratune.system import signals


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
            if getattr(sys, name) is stream:  # else it was replaced because its reader has gone
                setattr(sys, name, originals[name])


def print_raw(text: str) -> None:
    """Print a line on stdout unchanged, for another program; on a terminal it is escaped like everything else."""
    stream = sys.stdout
    print(text, file=stream.raw if isinstance(stream, EscapedStream) and not stream.isatty() else stream, flush=True)


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


class LossyStream(io.TextIOBase):
    """A stream for messages, which may get lost: a run does not end because their reader has gone or the disk is full,
    and a run that should end does not wait for a reader that does not read.

    Whole lines go to the file descriptor, past Python's buffers: a signal may raise an exception or run its handler in
    the middle of a write, without a lock being held or anything being written twice.
    """

    def __init__(self, stream: Any):
        self._stream, self._pending = stream, ""
        self._handle: int | None = None
        with suppress(OSError, ValueError):
            stream.flush()
            self._handle = stream.fileno()

    def write(self, text: str) -> int:
        """Write, or pretend to."""
        self._pending += text
        if "\n" in text or "\r" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Write what is pending, or drop it."""
        text, self._pending = self._pending, ""
        with suppress(OSError, ValueError):
            if self._handle is None:
                self._stream.write(text)
                self._stream.flush()
            else:
                _send(self._handle, text.encode(self.encoding, self._stream.errors))

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


_PATIENCE = 10
"""Tenths of a second that a process which should end waits for room in a full pipe, or for a stopped terminal."""


def _send(handle: int, data: bytes) -> None:
    """Write to a file descriptor; once a signal has come and nothing is read, drop the rest.

    A pipe that has room takes PIPE_BUF bytes without waiting, and no other process's line comes between them.
    """
    poll = select.poll()
    poll.register(handle, select.POLLOUT)
    while data:
        waited = 0
        while not poll.poll(100):
            waited += signals.stop_requested()
            if waited > _PATIENCE:
                return
        data = data[os.write(handle, data[: select.PIPE_BUF]) :]


_NO_REDIRECT: dict[str, Any] = {"redirect_stdout": False, "redirect_stderr": False}
"""For progress bars: by default rich prints what others write without escaping it."""


def log(text: str) -> None:
    """Print one line on stderr about what is going on."""
    err.print(escaping.line(text), markup=False)


def print_block(title: str, lines: Iterable[tuple[str, str]]) -> None:
    """Print a title and `name  value` lines on stdout, values aligned."""
    rows = list(lines)
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, value in rows:
        print(escaping.line(f"  {name:<{width}}  {value}"))


def align(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table whose first column is aligned to the left and all others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        cells = [
            f"{cell:<{width}}" if not column else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  " + "  ".join(cells).rstrip()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print an aligned table on stdout."""
    for line in align(header, rows):
        print(escaping.line(line))


def print_json(values: Any) -> None:
    """Print indented JSON on stdout, with everything escaped that a terminal would obey: `json` does not escape DEL."""
    print(json.dumps(values, indent=2).replace("\x7f", "\\u007f"))


def print_marked(pieces: Iterable[tuple[str, bool]], console: Console = out) -> None:
    """Print text whose supervised pieces are green in a terminal, and stand between ⟦ ⟧ elsewhere.

    pieces: each with whether it is supervised.
    """
    if console.is_terminal:
        safe = [(escaping.text(piece), supervised) for piece, supervised in pieces]
        console.print(Text.assemble(*[(piece, "bold green" if supervised else "dim") for piece, supervised in safe]))
    else:
        text = "".join(f"⟦{piece}⟧" if supervised else piece for piece, supervised in pieces)
        console.print(escaping.text(text), markup=False)


def show_progress(what: str, size: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show the progress of a pass over data: a bar in a terminal, elsewhere a line every half minute.

    A bar appears only once the pass has taken a second. Gives a function that takes the bytes done since its last call.

    Args:
        what: What is done.
        size: Bytes of the data; 0 if unknown.
    """

    def line(done: int, seconds: float) -> str:
        return f"{done / 1e6:,.0f} of {size / 1e6:,.0f} MB, {done / 1e6 / seconds:,.1f} MB/s"

    return _shown(what, size, (DownloadColumn(), TransferSpeedColumn()), line)


def show_count(what: str, size: int) -> AbstractContextManager[Callable[[int], None]]:
    """As `show_progress`, with a number of things instead of bytes."""
    return _shown(what, size, (MofNCompleteColumn(),), lambda done, _: f"{done:,} of {size:,}")


@contextmanager
def _shown(
    what: str, size: int, columns: Sequence[ProgressColumn], line: Callable[[int, float], str]
) -> Iterator[Callable[[int], None]]:
    """A bar with these columns, or lines with a text for what is done in how many seconds."""
    start = last_report = time.monotonic()
    done = 0
    bar: Bar | None = None

    def advance(count: int) -> None:
        nonlocal done, last_report, bar
        done += count
        now = time.monotonic()
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done)
        elif err.is_terminal and now > start + 1:
            label = TextColumn(escaping.line(what), markup=False)
            left = (TextColumn("left"), TimeRemainingColumn())
            bar = Bar(label, BarColumn(), *columns, *left, console=err, transient=True, **_NO_REDIRECT)
            bar.add_task("", total=size or None, completed=done)
            bar.start()
        elif now > last_report + 30:
            last_report = now
            log(f"{what}: {line(done, now - start)}")

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def plural(number: int, what: str) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def format_size(count: int) -> str:
    """A number of bytes in the unit that reads best: `1,843,200 bytes (1.8 MB)`, `3.2 GiB`."""
    if count >= 1 << 28:
        return f"{count / (1 << 30):.1f} GiB"
    return f"{count:,} bytes ({f'{count / 1e6:.1f} MB' if count >= 1e6 else f'{count / 1e3:.1f} kB'})"


def format_duration(seconds: float) -> str:
    """`42 s`, `1:05 min`, `2:03:04 h`."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if minutes >= 60:
        return f"{minutes // 60}:{minutes % 60:02}:{rest:02} h"
    return f"{minutes}:{rest:02} min" if minutes else f"{whole} s"


class TrainingProgress:
    """Shows the progress of training: a bar in a terminal, else a line per report. Implements `trainer.Progress`."""

    def __init__(self) -> None:
        self.bar: Bar | None = None
        self.steps = self.done = self.first_step = self.tokens = 0
        self.last_values: dict[str, float] = {}

    def start(self, steps: int, done: int) -> None:
        """Start the clock. steps: of the whole run; done: those before an interruption."""
        self.steps, self.first_step, self.done, self.start_time = steps, done, done, time.monotonic()
        if err.is_terminal:
            self.bar = Bar(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
                TextColumn("left"), TimeRemainingColumn(), console=err, **_NO_REDIRECT,
            )  # fmt: skip
            self.task = self.bar.add_task("", total=steps, completed=done, state="")
            self.bar.start()

    def step(self, done: int, tokens: int) -> None:
        """Show that `done` steps are done, with `tokens` tokens since the start."""
        self.done, self.tokens = done, tokens
        if self.bar:
            self.bar.update(self.task, completed=done, state=self._state())

    def log(self, step: int, values: dict[str, float]) -> None:
        """Show a report of the trainer."""
        self.last_values |= {name: value for name, value in values.items() if name in ("loss", "learning_rate")}
        if self.bar:
            self.bar.update(self.task, state=self._state())
        if "eval_loss" in values and step:
            log(f"step {step:>5}/{self.steps}  held-out loss {values['eval_loss']:.4f}{_rewards(values, 'eval_')}")
        elif "loss" in values and not self.bar:
            log(f"step {step:>5}/{self.steps}  {self._state()}{_rewards(values)}  left {self._remaining()}")

    def stop(self) -> None:
        """End the bar, if there is one."""
        if self.bar:
            self.bar.stop()
            self.bar = None

    def _state(self) -> str:
        speed = f"{self.tokens / max(time.monotonic() - self.start_time, 1e-9):,.0f} tokens/s"
        if "loss" not in self.last_values:
            return speed
        return f"loss {self.last_values['loss']:.4f}  lr {self.last_values.get('learning_rate', 0):.2e}  {speed}"

    def _remaining(self) -> str:
        elapsed = time.monotonic() - self.start_time
        return format_duration(elapsed / max(self.done - self.first_step, 1) * (self.steps - self.done))


def _rewards(values: Mapping[str, float], prefix: str = "") -> str:
    """The figures of compared answers in a report; empty where none are compared. prefix: of their names."""
    names = [name for name in ("reward_accuracy", "reward_margin") if prefix + name in values]
    return "".join(f"  {name.replace('_', ' ')} {values[prefix + name]:.3f}" for name in names)
