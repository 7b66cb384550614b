"""Events: notes, progress and results as plain values, which a listener receives while loratune works.

The library emits events and prints nothing. Every function of the public API takes `on_event`, a function that is
called with each event, in the thread that emits it; the command line passes one that draws progress bars and lines.

    loratune.train(config, on_event=print)

NoteEvent          a line that the user should read
PlanEvent          what will be trained, before the first step
ProgressEvent      the progress of a longer task: loading, reading, scoring
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
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from loratune.api.quickstart import Quickstart
    from loratune.api.train import PublishedAdapter
    from loratune.compare.comparison import Comparison
    from loratune.compare.evaluation import ScaleComparison
    from loratune.compare.tasks import TaskResults
    from loratune.training.init import InitialConfig
    from loratune.training.plan import Plan

Unit = Literal["", "bytes", "items"]
"""The unit of a task's progress; empty if the total is unknown."""


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
        rows: The lines of a table of used, truncated and dropped rows per split, and of remarks on them.
        examples: Training rows, each as a title and pieces of text, each piece with whether it is supervised.
        notes: Lines of choices and warnings.
        summary: The number of trainable parameters, as a line of text.
        trainable: The number of trainable parameters.
        memory: The estimated memory for training, in bytes.
        device: What the process computes on, and in which dtype: `CPU, 2 threads, bfloat16`.
        plan: All that is decided; None in an event that a program has made.
        seconds: About how long the steps take, and everything else from here on; None where the run has a time budget.
    """

    rows: tuple[str, ...]
    examples: tuple[tuple[str, tuple[tuple[str, bool], ...]], ...]
    notes: tuple[str, ...]
    summary: str
    trainable: int
    memory: int
    device: str = ""
    plan: "Plan | None" = None
    seconds: tuple[float, float] | None = None


@dataclass(frozen=True)
class ProgressEvent:
    """The progress of a longer task. The first event of a task has `done` 0; the last one has `finished` True.

    Attributes:
        task: The number of the task, the same in all of its events.
        what: What is done, such as `loading the base`.
        done: The amount done so far, in `unit`.
        total: The total amount, in `unit`; 0 if unknown.
        unit: The unit of `done` and `total`.
        finished: Whether the task has ended, successfully or not.
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
        done: Optimizer steps done before an interruption.
        finished: Whether training has ended, successfully or not.
    """

    steps: int
    done: int = 0
    finished: bool = False


@dataclass(frozen=True)
class StepEvent:
    """An optimizer step is done.

    Attributes:
        step: The number of the step, from 1.
        steps: Optimizer steps of the whole run.
        tokens: Tokens that this process has trained on so far, without padding.
        loss: The mean loss since the last report, every `training.logging_steps` steps; None between reports.
        learning_rate: The learning rate of the step; None between reports.
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
        step: Optimizer steps done so far.
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
        result: The published adapter with its metrics for `train`, the config and estimates of its run for `init`, the
            comparison for `evaluate`, one for each scale for `evaluate_scales`, those of tasks for `run_tasks`, and all
            that it made for `quickstart`, after the results of its parts.
    """

    result: "Result" = field(repr=False)


Result: TypeAlias = "PublishedAdapter | InitialConfig | Comparison | ScaleComparison | TaskResults | Quickstart"
Event: TypeAlias = NoteEvent | PlanEvent | ProgressEvent | TrainingEvent | StepEvent | EvaluationEvent | FinishedEvent
Listener: TypeAlias = Callable[[Event], Any]
Advance: TypeAlias = Callable[[int], None]
"""Called with the amount done since the last call."""


def no_advance(count: int) -> None:
    """An `Advance` that emits nothing."""


LIBRARIES = "loading libraries"
"""The first task of every function; it is shown in a terminal only."""
_INTERVAL = 0.1
"""Minimum seconds between two events of one task."""


def _ignore(event: Event) -> None:
    """The listener of a program that has none."""


_listener: ContextVar[Listener] = ContextVar("listener", default=_ignore)
_emitting: ContextVar[bool] = ContextVar("emitting", default=False)
"""Whether a listener is being called."""
_tasks = itertools.count(1)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Send events inside to this listener.

    If it is None, the current listener stays, but does not receive the events of what it calls itself.
    """
    if listener is None and not _emitting.get():
        yield
        return
    token, emitting = _listener.set(listener or _ignore), _emitting.set(False)
    try:
        yield
    finally:
        _listener.reset(token)
        _emitting.reset(emitting)


def listener() -> Listener:
    """The current listener."""
    return _listener.get()


def emit(event: Event) -> None:
    """Send an event to the current listener."""
    token = _emitting.set(True)
    try:
        _listener.get()(event)
    finally:
        _emitting.reset(token)


def note(text: str) -> None:
    """Emit a line that the user should read."""
    emit(NoteEvent(text))


@contextmanager
def noted() -> Iterator[list[str]]:
    """Collect the lines noted inside in the list that it yields; they also go to the listener."""
    outer, lines = listener(), list[str]()

    def listen(event: Event) -> None:
        if isinstance(event, NoteEvent):
            lines.append(event.text)
        outer(event)

    with listening(listen):
        yield lines


@contextmanager
def progress(what: str, total: int = 0, unit: Unit = "") -> Iterator[Advance]:
    """Emit the progress of the work done inside. Also works as a decorator.

    Args:
        what: What is done.
        total: The total amount of work, in `unit`; 0 if unknown.
        unit: The unit of progress.

    Returns:
        A function to call with the amount done since its last call.
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
    """As `progress`, for a pass over data. size: bytes; 0 if unknown."""
    return progress(what, size, "bytes")


def counting(what: str, number: int) -> AbstractContextManager[Advance]:
    """As `progress`, for a number of items."""
    return progress(what, number, "items")
