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

from loratune.cli.options import as_options
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

    def __init__(self, verbose: bool = False) -> None:
        """verbose: whether plans are shown with all reasons and counts."""
        self._verbose, self._pieces = verbose, dict[int, _Piece]()
        self._training: _Training | None = None
        self._is_training = False

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case NoteEvent():
                log(as_options(event.text))
            case PlanEvent():
                _show_plan(event, verbose=self._verbose)
            case ProgressEvent():
                if err.is_interactive or event.what != LIBRARIES:
                    self._progress(event)
            case TrainingEvent(finished=False):
                self._training, self._is_training = _Training(event, self._verbose), True
            case TrainingEvent():
                self._is_training = False
                if self._training is not None:
                    self._training.stop()
            case StepEvent() | EvaluationEvent():
                if self._training is None:  # a resumed run without remaining steps, which is only evaluated
                    self._training = _Training(TrainingEvent(event.steps, event.step), self._verbose)
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
            # Lines on the steps say how far training is; those on its evaluations would only come between them.
            patience = _PAUSE if self._is_training and not err.is_interactive else PATIENCE
            self._pieces[event.task] = _Piece(event.what, event.total, event.unit, patience)


def _show_plan(event: PlanEvent, *, verbose: bool) -> None:
    if event.plan is not None and not verbose:
        from loratune.cli import display  # what it imports is loaded by now

        log(*display.brief(event.plan, event.examples[0][1], event.seconds))
        return
    for line in event.rows:
        log(line)
    for title, pieces in event.examples:
        log(title)
        print_marked(pieces, err)
    for line in (*event.notes, f"device: {event.device}", event.summary):
        log(line)


class _Piece:
    """A task that is shown once it takes longer than its patience in seconds: in a terminal as a transient bar,
    elsewhere as a line every half minute, but not while a task within it is shown. A separate thread draws both."""

    def __init__(self, what: str, total: int, unit: Unit, patience: float) -> None:
        self.what, self.total, self.unit, self.done, self.has_inner = what, total, unit, 0, False
        self._patience, self._is_named = patience, False
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
        if self._ended.wait(self._patience):
            return
        if not err.is_interactive:
            while True:
                if not self.has_inner:
                    log(f"{self.what}{self._reached()}")
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
                return BarColumn(finished_style="bar.complete"), DownloadColumn(), TransferSpeedColumn(), *left
            case "items":
                return BarColumn(finished_style="bar.complete"), MofNCompleteColumn(), *left
        return (TimeElapsedColumn(),)

    def _reached(self) -> str:
        """How far it is; at first only where there is something to tell."""
        is_first, self._is_named = not self._is_named, True
        if is_first and not (self.unit and self.done):
            return ""
        seconds = time.monotonic() - self._start
        match self.unit:
            case "bytes":
                speed = f"{self.done / 1e6 / seconds:,.1f} MB/s"
                return f": {self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, {speed}"
            case "items":
                line = f": {self.done:,} of {self.total:,}"
                left = seconds / max(1, self.done) * (self.total - self.done)
                return f"{line}, left {format_duration(left)}" if self.done else line
        return f": {format_duration(seconds)} so far"


class _Training:
    """The steps of a run: a bar in a terminal, elsewhere a line every half minute and at the end, or with `verbose` for
    each report."""

    def __init__(self, event: TrainingEvent, verbose: bool) -> None:
        self.steps, self.first_step, self.done, self.tokens = event.steps, event.done, event.done, 0
        self.verbose, self.learning_rate = verbose, 0.0
        self.loss: float | None = None
        self.reported, self.mean_of = event.done, 1
        self.held_out: float | None = None
        self.start_time = self.last_line = time.monotonic()
        self.bar: Progress | None = None
        self.first: _Piece | None = None
        if err.is_interactive:
            self.bar = Progress(
                TextColumn("training"), BarColumn(finished_style="bar.complete"), MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"), TimeRemainingColumn(), TextColumn("left"), console=err,
                **_NO_REDIRECT,
            )  # fmt: skip
            self.task = self.bar.add_task("", total=self.steps, completed=self.done, state="")
            self.bar.start()
        else:
            self.first = _Piece("taking the first step", 0, "", PATIENCE)

    def show(self, event: StepEvent | EvaluationEvent) -> None:
        """Show a step or an evaluation."""
        self._end_first()
        if isinstance(event, EvaluationEvent):
            self.held_out = event.loss
            if event.step and self.verbose:
                log(f"step {event.step:>5}/{self.steps}  held-out loss {event.loss:.4f}{_metrics(event.metrics)}")
        else:
            self.done, self.tokens = event.step, event.tokens
            if event.loss is not None:
                self.loss, self.learning_rate = event.loss, event.learning_rate or 0.0
                self.reported, self.mean_of = event.step, event.step - self.reported
        if self.bar:
            self.bar.update(self.task, completed=self.done, state=self._state())
        elif isinstance(event, StepEvent) and self.verbose:
            self._report(event)
        elif time.monotonic() > self.last_line + _PAUSE or self.done == self.steps:
            self.last_line = time.monotonic()
            log(f"training: step {self.done:,} of {self.steps:,}  {self._state()}  {self._remaining()} left")

    def _report(self, event: StepEvent) -> None:
        """Log each report, and between reports a line every half minute. Such a line has no loss: the last one is that
        of an earlier step."""
        if event.loss is not None or time.monotonic() > self.last_line + _PAUSE:
            self.last_line = time.monotonic()
            speed = f"{self.tokens / max(time.monotonic() - self.start_time, 1e-9):,.0f} tokens/s"
            loss = f"loss {event.loss:.4f}  lr {self.learning_rate:.2e}  " if event.loss is not None else ""
            metrics = _metrics(event.metrics) if event.loss is not None else ""
            log(f"step {event.step:>5}/{self.steps}  {loss}{speed}{metrics}  left {self._remaining()}")

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
        """The loss of the last report, which is a mean over the steps before it, and the last one on held-out rows."""
        mean = f" (mean of {self.mean_of})" if self.mean_of > 1 else ""
        loss = [f"loss {self.loss:.3g}{mean}"] if self.loss is not None else []
        return "  ".join(loss + ([f"held out {self.held_out:.3g}"] if self.held_out is not None else []))

    def _remaining(self) -> str:
        elapsed = time.monotonic() - self.start_time
        return format_duration(elapsed / max(self.done - self.first_step, 1) * (self.steps - self.done))


def _metrics(values: Mapping[str, float]) -> str:
    return "".join(f"  {name.replace('_', ' ')} {value:.3f}" for name, value in values.items())
