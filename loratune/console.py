"""What the user sees: progress and messages on stderr, results in small aligned blocks on stdout."""

import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar
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


PATIENCE, _PAUSE = 2.0, 30.0
"""Seconds for which work is done without a word, and between the lines on it where there is no terminal."""


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show what is done inside, and for how long, where it takes longer than `PATIENCE`: in a terminal by a line that
    goes away at its end, elsewhere by a line every half minute. It also decorates functions."""
    with _shown(what, 0, (TimeElapsedColumn(),), lambda _, seconds: format_duration(seconds)):
        yield


def show_progress(what: str, size: int) -> AbstractContextManager[Callable[[int], None]]:
    """As `progress`, for a pass over data. Gives a function that takes the bytes done since its last call.

    size: Bytes of the data; 0 if unknown.
    """

    def line(done: int, seconds: float) -> str:
        return f"{done / 1e6:,.0f} of {size / 1e6:,.0f} MB, {done / 1e6 / seconds:,.1f} MB/s"

    left = (TextColumn("left"), TimeRemainingColumn())
    return _shown(what, size, (BarColumn(), DownloadColumn(), TransferSpeedColumn(), *left), line)


def show_count(what: str, size: int) -> AbstractContextManager[Callable[[int], None]]:
    """As `show_progress`, with a number of things instead of bytes."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    return _shown(what, size, columns, lambda done, _: f"{done:,} of {size:,}")


@contextmanager
def _shown(
    what: str, size: int, columns: Sequence[ProgressColumn], line: Callable[[int, float], str]
) -> Iterator[Callable[[int], None]]:
    """These columns, or lines with a text for what is done in how many seconds, by a thread of their own."""
    start, done, ended = time.monotonic(), 0, threading.Event()

    def advance(count: int) -> None:
        nonlocal done
        done += count

    def show() -> None:
        if ended.wait(PATIENCE):
            return
        if not err.is_interactive:
            log(f"{what}: {line(done, time.monotonic() - start)}")
            while not ended.wait(_PAUSE):
                log(f"{what}: {line(done, time.monotonic() - start)}")
            return
        label = TextColumn(escaping.line(what), markup=False)
        with Bar(label, *columns, console=err, transient=True, refresh_per_second=2, **_NO_REDIRECT) as bar:
            task = bar.add_task("", total=size or None, completed=done)
            while not ended.wait(0.5):
                bar.update(task, completed=done)

    thread = threading.Thread(target=show, daemon=True)
    try:
        with suppress(RuntimeError):  # where no more threads may be started
            thread.start()
        yield advance
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()


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
        self.first = ExitStack()
        self.steps = self.done = self.first_step = self.tokens = 0
        self.last_values: dict[str, float] = {}

    def start(self, steps: int, done: int) -> None:
        """Start the clock. steps: of the whole run; done: those before an interruption."""
        self.steps, self.first_step, self.done = steps, done, done
        self.start_time = self.last_line = time.monotonic()
        if err.is_interactive:
            self.bar = Bar(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
                TextColumn("left"), TimeRemainingColumn(), console=err, **_NO_REDIRECT,
            )  # fmt: skip
            self.task = self.bar.add_task("", total=steps, completed=done, state="")
            self.bar.start()
        else:
            self.first.enter_context(progress("taking the first step"))

    def step(self, done: int, tokens: int) -> None:
        """Show that `done` steps are done, with `tokens` tokens since the start."""
        self.done, self.tokens = done, tokens
        self.first.close()
        if self.bar:
            self.bar.update(self.task, completed=done, state=self._state())
        elif time.monotonic() > self.last_line + _PAUSE:
            self._log(done)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Show a report of the trainer."""
        self.last_values |= {name: value for name, value in values.items() if name in ("loss", "learning_rate")}
        if self.bar:
            self.bar.update(self.task, state=self._state())
        if "eval_loss" in values and step:
            log(f"step {step:>5}/{self.steps}  held-out loss {values['eval_loss']:.4f}{_rewards(values, 'eval_')}")
        elif "loss" in values and not self.bar:
            self._log(step, _rewards(values))

    def _log(self, step: int, figures: str = "") -> None:
        self.last_line = time.monotonic()
        log(f"step {step:>5}/{self.steps}  {self._state()}{figures}  left {self._remaining()}")

    def stop(self) -> None:
        """End the bar, if there is one."""
        self.first.close()
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
