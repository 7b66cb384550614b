"""Turns: one thread of a process computes at a time, and one at a time changes where stdout goes.

Random states, torch's default dtype and the modes of a loaded model belong to the process, so threads that computed at
the same time would change each other's results. A second training run is refused; everything else waits for its turn.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

from loratune.codes import Code
from loratune.errors import LockedError, Problem


class _State:
    """The turns of a process.

    Attributes:
        threads: The threads that compute or wait, in the order they came; the first one computes.
        changed: Notified when they have changed.
        training: Held by a training run.
        stdout: Held by the thread that has redirected stdout.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all threads: those of a forked process are its parent's."""
        self.threads, self.changed, self.training = deque[int](), threading.Condition(), threading.Lock()
        self.stdout = threading.RLock()


_state = _State()
os.register_at_fork(after_in_child=_state.reset)


@contextmanager
def turn() -> Iterator[None]:
    """Compute inside: no other thread does, and those that came earlier have finished.

    Raises LockedError: the thread computes already, and a function of the program that it calls meanwhile, such as
    `on_event`, begins something else, which would change the model and the random numbers that are in use.
    """
    own = threading.get_ident()
    if _has_turn(own):
        what = "was called by on_event or another function that is called while something else is computed"
        raise LockedError(Problem(Code.SYSTEM_LOCKED, what, "loratune", fix="call it when that is done"))
    try:
        _wait(own)
        yield
    finally:
        _leave(own)


@contextmanager
def training() -> Iterator[None]:
    """As `turn`, for a training run. Raises LockedError: the process trains already."""
    lock, is_first = _state.training, False  # a forked process gets another one
    try:
        if not (is_first := lock.acquire(blocking=False)):
            what = "a training run is in progress in this process, whose random states both would use"
            fix = "wait until it ends, or train in another process"
            raise LockedError(Problem(Code.SYSTEM_LOCKED, what, "train", fix=fix))
        with turn():
            yield
    finally:
        if is_first:
            lock.release()


@contextmanager
def passed_on() -> Iterator[None]:
    """Inside, other threads have their turn, and this one may begin something else."""
    own = threading.get_ident()
    if not _has_turn(own):
        yield
        return
    _leave(own)
    try:
        yield
    finally:
        _wait(own)


@contextmanager
def stdout_to(stream: TextIO) -> Iterator[None]:
    """Inside, what is printed on stdout goes to a stream, and other threads that want to redirect it wait: each of two
    would restore what it has found, and the last one the stream of the other. Inside, wait for no turn."""
    with _state.stdout, redirect_stdout(stream):
        yield


def _has_turn(thread: int) -> bool:
    with _state.changed:
        return bool(_state.threads) and _state.threads[0] == thread


def _wait(thread: int) -> None:
    """Enter the queue, where an interrupted thread stays until it leaves."""
    with _state.changed:
        _state.threads.append(thread)
        _state.changed.wait_for(lambda: _state.threads[0] == thread)


def _leave(thread: int) -> None:
    with _state.changed:
        if thread in _state.threads:  # else it was interrupted before it entered
            _state.threads.remove(thread)
        _state.changed.notify_all()
