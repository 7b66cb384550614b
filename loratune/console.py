"""What the user sees: progress and notes on stderr, results in small aligned blocks on stdout."""

import io
import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar
from rich.text import Text

from loratune import escaping
from loratune.system import signals


class Screen(io.TextIOBase):
    """The door to the screen: a stream on which nothing that a terminal would obey is written, whoever writes.

    raw: the stream behind it, for sequences of our own (`err` and `out` write their bars and colours there).
    """

    def __init__(self, stream: Any):
        self.raw = stream

    def write(self, text: str) -> int:
        """Write it escaped; a bar of a library may begin its line again."""
        again = text.startswith("\r") and self.isatty()
        safe = f"\r{escaping.text(text[1:])}" if again else escaping.text(text)
        self.raw.write(safe)
        return len(text)

    def flush(self) -> None:
        """Of the stream."""
        self.raw.flush()

    def close(self) -> None:
        """Nothing: Python closes what nobody holds, and would hide that the stream behind it cannot be written."""

    def isatty(self) -> bool:
        """Of the stream."""
        return bool(self.raw.isatty())

    def fileno(self) -> int:
        """Of the stream."""
        return int(self.raw.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream."""
        return str(self.raw.encoding)


@contextmanager
def screened() -> Iterator[None]:
    """Inside, all that is printed goes through a `Screen`."""
    screens = {name: Screen(getattr(sys, name)) for name in ("stdout", "stderr") if getattr(sys, name) is not None}
    before = {name: getattr(sys, name) for name in screens}
    try:
        for name, screen in screens.items():
            setattr(sys, name, screen)
        yield
    finally:
        for name, screen in screens.items():
            if getattr(sys, name) is screen:  # another one was put there because its reader has gone
                setattr(sys, name, before[name])


def verbatim(text: str) -> None:
    """A line of text on stdout as it is, for another program; on a terminal it is escaped as all else."""
    stream = sys.stdout
    print(text, file=stream.raw if isinstance(stream, Screen) and not stream.isatty() else stream, flush=True)


class _Console(Console):
    """Writes behind the door, so that its own colours and bars come through; what it is given is escaped before."""

    @property
    def file(self) -> Any:
        """The stream behind the door."""
        stream = super().file
        return stream.raw if isinstance(stream, Screen) else stream

    @file.setter
    def file(self, new: Any) -> None:
        Console.file.fset(self, new)  # type: ignore[attr-defined]


err = _Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
out = _Console(highlight=False, soft_wrap=True, emoji=False)


class Patient(io.TextIOBase):
    """A stream for what is told on the way: a run does not end because its reader has gone, or the disk of its log is
    full; and one that was asked to end does not wait for a reader that does not read.

    Whole lines go to the file descriptor, past Python's buffers: a signal may raise an exception or run its handler in
    the middle of a write, and finds no lock held, and nothing that is written twice.
    """

    def __init__(self, stream: Any):
        self._stream, self._held = stream, ""
        self._handle: int | None = None
        with suppress(OSError, ValueError):
            stream.flush()
            self._handle = stream.fileno()

    def write(self, text: str) -> int:
        """As the stream does, or as if it did."""
        self._held += text
        if "\n" in text or "\r" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        """As the stream does, or not at all."""
        text, self._held = self._held, ""
        with suppress(OSError, ValueError):
            if self._handle is None:
                self._stream.write(text)
                self._stream.flush()
            else:
                _send(self._handle, text.encode(self.encoding, self._stream.errors))

    def isatty(self) -> bool:
        """Of the stream."""
        return bool(self._stream.isatty())

    def fileno(self) -> int:
        """Of the stream."""
        return int(self._stream.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream."""
        return str(self._stream.encoding)


_PATIENCE = 10
"""Tenths of a second for which a process that is to end waits for room in a full pipe, or in a stopped terminal."""


def _send(handle: int, data: bytes) -> None:
    """Write all of it to a file descriptor, and drop the rest once a signal has come and nothing is read.

    A pipe that has room takes PIPE_BUF bytes without waiting, and no other process's line comes between them.
    """
    room = select.poll()
    room.register(handle, select.POLLOUT)
    while data:
        waited = 0
        while not room.poll(100):
            waited += signals.asked()
            if waited > _PATIENCE:
                return
        data = data[os.write(handle, data[: select.PIPE_BUF]) :]


_APART: dict[str, Any] = {"redirect_stdout": False, "redirect_stderr": False}
"""For bars: rich would take what is printed beside them around the door."""


def log(text: str) -> None:
    """One line on stderr about what is going on."""
    err.print(escaping.line(text), markup=False)


def block(title: str, lines: Iterable[tuple[str, str]]) -> None:
    """A titled block of `name  value` lines on stdout, values aligned."""
    rows = list(lines)
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, value in rows:
        print(escaping.line(f"  {name:<{width}}  {value}"))


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of an aligned table: the first column to the left, all others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        cells = [
            f"{cell:<{width}}" if not column else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  " + "  ".join(cells).rstrip()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """An aligned table on stdout."""
    for line in aligned(header, rows):
        print(escaping.line(line))


def as_json(values: Any) -> None:
    """Indented JSON on stdout, of which nothing is left to be escaped: `json` passes DEL on."""
    print(json.dumps(values, indent=2).replace("\x7f", "\\u007f"))


def marked(pieces: Iterable[tuple[str, bool]], console: Console = out) -> None:
    """Text whose learnt pieces are green in a terminal, and stand between ⟦ ⟧ elsewhere."""
    if console.is_terminal:
        safe = [(escaping.text(piece), learnt) for piece, learnt in pieces]
        console.print(Text.assemble(*[(piece, "bold green" if learnt else "dim") for piece, learnt in safe]))
    else:
        text = "".join(f"⟦{piece}⟧" if learnt else piece for piece, learnt in pieces)
        console.print(escaping.text(text), markup=False)


@contextmanager
def watched(what: str, size: int) -> Iterator[Callable[[int], None]]:
    """Shows how far a pass over `size` bytes is (0: unknown): a bar in a terminal, in a log a line every half minute.

    Gives what takes the bytes done since its last call. A bar appears only once the pass has taken a second.
    """
    begun = shown = time.monotonic()
    done = 0
    bar: Bar | None = None

    def advance(count: int) -> None:
        nonlocal done, shown, bar
        done += count
        now = time.monotonic()
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done)
        elif err.is_terminal and now > begun + 1:
            columns = (
                TextColumn(escaping.line(what), markup=False),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
            )
            bar = Bar(*columns, TextColumn("left"), TimeRemainingColumn(), console=err, transient=True, **_APART)
            bar.add_task("", total=size or None, completed=done)
            bar.start()
        elif now > shown + 30:
            shown = now
            log(f"{what}: {done / 1e6:,.0f} of {size / 1e6:,.0f} MB, {done / 1e6 / (now - begun):,.1f} MB/s")

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def size(count: int) -> str:
    """Bytes in the unit that reads best: `1,843,200 bytes (1.8 MB)`, `3.2 GiB`."""
    if count >= 1 << 28:
        return f"{count / (1 << 30):.1f} GiB"
    return f"{count:,} bytes ({f'{count / 1e6:.1f} MB' if count >= 1e6 else f'{count / 1e3:.1f} kB'})"


def duration(seconds: float) -> str:
    """`42 s`, `1:05 min`, `2:03:04 h`."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if minutes >= 60:
        return f"{minutes // 60}:{minutes % 60:02}:{rest:02} h"
    return f"{minutes}:{rest:02} min" if minutes else f"{whole} s"


class TrainingProgress:
    """Shows a training run: a bar in a terminal, a line per report in a log. Implements `trainer.Progress`."""

    def __init__(self) -> None:
        self.bar: Bar | None = None
        self.steps = self.done = self.begun = self.tokens = 0
        self.shown: dict[str, float] = {}

    def start(self, steps: int, done: int) -> None:
        """Begin the clock."""
        self.steps, self.begun, self.done, self.started = steps, done, done, time.monotonic()
        if err.is_terminal:
            self.bar = Bar(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
                TextColumn("left"), TimeRemainingColumn(), console=err, **_APART,
            )  # fmt: skip
            self.task = self.bar.add_task("", total=steps, completed=done, state="")
            self.bar.start()

    def step(self, done: int, tokens: int) -> None:
        """Advance to `done` steps and `tokens` tokens read."""
        self.done, self.tokens = done, tokens
        if self.bar:
            self.bar.update(self.task, completed=done, state=self._state())

    def log(self, step: int, values: dict[str, float]) -> None:
        """Show a report of the trainer."""
        self.shown |= {name: value for name, value in values.items() if name in ("loss", "learning_rate")}
        if self.bar:
            self.bar.update(self.task, state=self._state())
        if "eval_loss" in values and step:
            log(f"step {step:>5}/{self.steps}  held-out loss {values['eval_loss']:.4f}")
        elif "loss" in values and not self.bar:
            log(f"step {step:>5}/{self.steps}  {self._state()}  left {self._left()}")

    def stop(self) -> None:
        """End the bar, if there is one."""
        if self.bar:
            self.bar.stop()
            self.bar = None

    def _state(self) -> str:
        speed = f"{self.tokens / max(time.monotonic() - self.started, 1e-9):,.0f} tokens/s"
        if "loss" not in self.shown:
            return speed
        return f"loss {self.shown['loss']:.4f}  lr {self.shown.get('learning_rate', 0):.2e}  {speed}"

    def _left(self) -> str:
        passed = time.monotonic() - self.started
        return duration(passed / max(self.done - self.begun, 1) * (self.steps - self.done))
