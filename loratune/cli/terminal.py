"""Shows events while a command runs: as progress bars in a terminal, as lines elsewhere."""

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from loratune.console import err, log, print_marked
from loratune.events import (
    LIBRARIES,
    EvaluationEvent,
    Event,
    NoteEvent,
    PlanEvent,
    ProgressEvent,
    StepEvent,
    TrainingEvent,
    Unit,
)
from loratune.text import format_duration, one_line

PATIENCE, _PAUSE = 2.0, 30.0
"""Seconds before a task is shown, and between its lines outside a terminal."""
_NO_REDIRECT: dict[str, Any] = {"redirect_stdout": False, "redirect_stderr": False}
"""For progress bars: by default, rich redirects other output and prints it unescaped."""


class Terminal:
    """The listener of the command line."""

    def __init__(self) -> None:
        self._pieces: dict[int, _Piece] = {}
        self._training: _Training | None = None

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case NoteEvent():
                log(event.text)
            case PlanEvent():
                _show_plan(event)
            case ProgressEvent():
                if err.is_interactive or event.what != LIBRARIES:
                    self._progress(event)
            case TrainingEvent(finished=False):
                self._training = _Training(event)
            case TrainingEvent():
                if self._training is not None:
                    self._training.stop()
            case StepEvent() | EvaluationEvent():
                if self._training is None:  # a resumed run without remaining steps, which is only evaluated
                    self._training = _Training(TrainingEvent(event.steps, event.step))
                self._training.show(event)

    def _progress(self, event: ProgressEvent) -> None:
        if event.finished:
            if (piece := self._pieces.pop(event.task, None)) is not None:
                piece.end()
            for task, outer in self._pieces.items():
                outer.has_inner = task != max(self._pieces)
        elif event.task in self._pieces:
            self._pieces[event.task].done = event.done
        else:
            for outer in self._pieces.values():
                outer.has_inner = True
            self._pieces[event.task] = _Piece(event.what, event.total, event.unit)


def _show_plan(event: PlanEvent) -> None:
    for line in event.rows:
        log(line)
    for title, pieces in event.examples:
        log(title)
        print_marked(pieces, err)
    for line in (*event.notes, f"device: {event.device}", event.summary):
        log(line)


class _Piece:
    """A task that is shown once it takes longer than `PATIENCE`: in a terminal as a transient bar, elsewhere as a line
    every half minute, but not while a task within it is shown. A separate thread draws both."""

    def __init__(self, what: str, total: int, unit: Unit) -> None:
        self.what, self.total, self.unit, self.done, self.has_inner = what, total, unit, 0, False
        self._start, self._ended = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)
        with suppress(RuntimeError):  # the thread limit is reached
            self._thread.start()

    def end(self) -> None:
        """Stop showing the task."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _show(self) -> None:
        if self._ended.wait(PATIENCE):
            return
        if not err.is_interactive:
            while True:
                if not self.has_inner:
                    log(f"{self.what}: {self._line()}")
                if self._ended.wait(_PAUSE):
                    return
        label = TextColumn(one_line(self.what), markup=False)
        with Progress(
            label, *self._columns(), console=err, transient=True, refresh_per_second=2, **_NO_REDIRECT
        ) as bar:
            task = bar.add_task("", total=self.total or None, completed=self.done)
            while not self._ended.wait(0.5):
                bar.update(task, completed=self.done)

    def _columns(self) -> tuple[ProgressColumn, ...]:
        left = (TextColumn("left"), TimeRemainingColumn())
        match self.unit:
            case "bytes":
                return BarColumn(), DownloadColumn(), TransferSpeedColumn(), *left
            case "items":
                return BarColumn(), MofNCompleteColumn(), *left
        return (TimeElapsedColumn(),)

    def _line(self) -> str:
        seconds = time.monotonic() - self._start
        match self.unit:
            case "bytes":
                speed = f"{self.done / 1e6 / seconds:,.1f} MB/s"
                return f"{self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, {speed}"
            case "items":
                line = f"{self.done:,} of {self.total:,}"
                left = seconds / max(1, self.done) * (self.total - self.done)
                return f"{line}, left {format_duration(left)}" if self.done else line
        return format_duration(seconds)


class _Training:
    """The steps of a run: a bar in a terminal, elsewhere a line for each report."""

    def __init__(self, event: TrainingEvent) -> None:
        self.steps, self.first_step, self.done, self.tokens = event.steps, event.done, event.done, 0
        self.loss: float | None = None
        self.learning_rate = 0.0
        self.start_time = self.last_line = time.monotonic()
        self.bar: Progress | None = None
        self.first: _Piece | None = None
        if err.is_interactive:
            self.bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
                TextColumn("left"), TimeRemainingColumn(), console=err, **_NO_REDIRECT,
            )  # fmt: skip
            self.task = self.bar.add_task("", total=self.steps, completed=self.done, state="")
            self.bar.start()
        else:
            self.first = _Piece("taking the first step", 0, "")

    def show(self, event: StepEvent | EvaluationEvent) -> None:
        """Show a step or an evaluation."""
        self._end_first()
        if isinstance(event, EvaluationEvent):
            metrics = _metrics(event.metrics)
            if event.step:
                log(f"step {event.step:>5}/{self.steps}  held-out loss {event.loss:.4f}{metrics}")
            return
        self.done, self.tokens = event.step, event.tokens
        if event.loss is not None:
            self.loss, self.learning_rate = event.loss, event.learning_rate or 0.0
        if self.bar:
            self.bar.update(self.task, completed=self.done, state=self._state())
        elif event.loss is not None or time.monotonic() > self.last_line + _PAUSE:
            self.last_line = time.monotonic()
            # Between reports, a line has no loss: the last one is that of an earlier step.
            state = self._speed() if event.loss is None else self._state() + _metrics(event.metrics)
            log(f"step {event.step:>5}/{self.steps}  {state}  left {self._remaining()}")

    def stop(self) -> None:
        """End the bar, if there is one."""
        self._end_first()
        if self.bar:
            self.bar.stop()
            self.bar = None

    def _end_first(self) -> None:
        if self.first is not None:
            self.first.end()
            self.first = None

    def _state(self) -> str:
        loss = "" if self.loss is None else f"loss {self.loss:.4f}  lr {self.learning_rate:.2e}  "
        return loss + self._speed()

    def _speed(self) -> str:
        return f"{self.tokens / max(time.monotonic() - self.start_time, 1e-9):,.0f} tokens/s"

    def _remaining(self) -> str:
        elapsed = time.monotonic() - self.start_time
        return format_duration(elapsed / max(self.done - self.first_step, 1) * (self.steps - self.done))


def _metrics(values: Mapping[str, float]) -> str:
    return "".join(f"  {name.replace('_', ' ')} {value:.3f}" for name, value in values.items())
