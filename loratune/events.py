"""Events: notes, progress and results as plain values, which a listener receives while loratune works.

The library emits events and prints nothing. Every function of the public API takes `on_event`, a function that is
called with each event in the thread that works; the command line passes one that draws progress bars and lines.

    loratune.train(config, on_event=print)

NoteEvent          a line that the user should read
PlanEvent          what will be trained, before the first step
ProgressEvent      how far a longer piece of work is: loading, reading, scoring
TrainingEvent      training begins, and how many steps it has
StepEvent          an optimizer step is done
EvaluationEvent    the model was evaluated on the validation rows
FinishedEvent      a function is done, with its result
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Unit = Literal["", "bytes", "items"]
"""What the progress of a piece of work is counted in; empty where it is not known how much there is."""


@dataclass(frozen=True)
class NoteEvent:
    """A line that the user should read, such as a choice that was made or a warning.

    Attributes:
        text: One line, without a trailing newline.
    """

    text: str


@dataclass(frozen=True)
class PlanEvent:
    """What will be trained, before the first step.

    Attributes:
        rows: A table of how many rows of each split are used, truncated or dropped, and remarks on them, line by line.
        examples: Titles, and training rows as pieces of text, each with whether it is supervised.
        notes: Choices and warnings, line by line.
        summary: How many parameters are trained, in one line.
        trainable: The same as a number.
        memory: The estimate of the memory that training needs, in bytes.
    """

    rows: tuple[str, ...]
    examples: tuple[tuple[str, tuple[tuple[str, bool], ...]], ...]
    notes: tuple[str, ...]
    summary: str
    trainable: int
    memory: int


@dataclass(frozen=True)
class ProgressEvent:
    """How far a longer piece of work is. The first event of a piece has `done` 0; the last one `finished`.

    Attributes:
        task: The number of the piece of work, the same in all of its events.
        what: What is done, such as `loading the base`.
        done: How much of it is done.
        total: How much there is; 0 if unknown.
        unit: What these are counted in.
        finished: Whether the work has ended, successfully or not.
    """

    task: int
    what: str
    done: int = 0
    total: int = 0
    unit: Unit = ""
    finished: bool = False


@dataclass(frozen=True)
class TrainingEvent:
    """Training begins, or has ended.

    Attributes:
        steps: Optimizer steps of the whole run.
        done: Those that were done before an interruption.
        finished: Whether training has ended, successfully or not.
    """

    steps: int
    done: int = 0
    finished: bool = False


@dataclass(frozen=True)
class StepEvent:
    """An optimizer step is done.

    Attributes:
        step: Its number, from 1.
        steps: Optimizer steps of the whole run.
        tokens: Tokens that this process has read in training so far, without padding.
        loss: The mean loss since the last report; None between the reports that `training.logging_steps` asks for.
        learning_rate: That of the step; None as `loss`.
        metrics: Further metrics of a report, such as the reward accuracy of preferences.
    """

    step: int
    steps: int
    tokens: int
    loss: float | None = None
    learning_rate: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationEvent:
    """The model was evaluated on the validation rows.

    Attributes:
        step: Optimizer steps that were done.
        steps: Optimizer steps of the whole run.
        loss: The held-out loss.
        metrics: Further metrics, as in `StepEvent`.
    """

    step: int
    steps: int
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FinishedEvent:
    """A function is done.

    Attributes:
        result: What it found or made: of `train` the adapter's metrics, of `init` the config and what to expect of its
            run, of `evaluate` the comparison.
    """

    result: Any = field(repr=False)


Event: TypeAlias = NoteEvent | PlanEvent | ProgressEvent | TrainingEvent | StepEvent | EvaluationEvent | FinishedEvent
Listener: TypeAlias = Callable[[Event], Any]
Advance: TypeAlias = Callable[[int], None]
"""Called with how much was done since the last call."""


def no_advance(count: int) -> None:
    """An `Advance` that emits nothing."""


LIBRARIES = "loading libraries"
"""The piece of work that every function begins with; it is shown in a terminal only."""
_INTERVAL = 0.1
"""Seconds between two events of one piece of work, at least."""

_listener: ContextVar[Listener] = ContextVar("listener", default=lambda event: None)
_tasks = itertools.count(1)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Inside, events go to this listener; to the one outside if it is None."""
    if listener is None:
        yield
        return
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def listener() -> Listener:
    """The listener that events go to now."""
    return _listener.get()


def emit(event: Event) -> None:
    """Hand an event to the listener."""
    _listener.get()(event)


def note(text: str) -> None:
    """Emit a line that the user should read."""
    emit(NoteEvent(text))


@contextmanager
def noted() -> Iterator[list[str]]:
    """Gives a list that receives the lines that are noted inside; they also go to the listener."""
    outer, lines = listener(), list[str]()

    def listen(event: Event) -> None:
        if isinstance(event, NoteEvent):
            lines.append(event.text)
        outer(event)

    with listening(listen):
        yield lines


@contextmanager
def progress(what: str, total: int = 0, unit: Unit = "") -> Iterator[Advance]:
    """Emit the progress of what is done inside. It also decorates functions.

    Args:
        what: What is done.
        total: How much there is to do; 0 if unknown.
        unit: What it is counted in.

    Returns:
        A function that takes how much was done since its last call.
    """
    task, done, last = next(_tasks), 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        if (now := time.monotonic()) >= last + _INTERVAL:
            last = now
            emit(ProgressEvent(task, what, done, total, unit))

    emit(ProgressEvent(task, what, 0, total, unit))
    try:
        yield advance
    finally:
        emit(ProgressEvent(task, what, done, total, unit, finished=True))


def reading(what: str, size: int) -> AbstractContextManager[Advance]:
    """As `progress`, for a pass over data of a size in bytes; 0 if it is unknown."""
    return progress(what, size, "bytes")


def counting(what: str, number: int) -> AbstractContextManager[Advance]:
    """As `progress`, for a number of things."""
    return progress(what, number, "items")
