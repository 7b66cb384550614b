"""Ctrl-C and SIGTERM: an exception at once, or, while steps are taken, a wish that the next pause grants."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Termination(KeyboardInterrupt):
    """SIGTERM, where Ctrl-C is a KeyboardInterrupt."""


_RAISED: dict[signal.Signals, type[KeyboardInterrupt]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Termination,
}


PASSED_ON = 2.0
"""Seconds within which a launcher passes a signal on."""


class Stop:
    """Whether the user wants a run to stop. asked: what the first signal would have raised; None without one."""

    asked: type[KeyboardInterrupt] | None = None


class _Raiser:
    """A handler that raises. asked: what it raised; Python drops what is raised in a destructor or a weak reference."""

    asked: type[KeyboardInterrupt] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.asked = _RAISED[signal.Signals(number)]
        raise self.asked


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises `Termination`, so that what was begun is cleared away as after Ctrl-C."""
    show = sys.unraisablehook
    sys.unraisablehook = lambda dropped: None if isinstance(dropped.exc_value, KeyboardInterrupt) else show(dropped)
    try:
        with _handled(_Raiser(), list(_RAISED)):
            yield
    finally:
        sys.unraisablehook = show


@contextmanager
def deferred(tell: Callable[[str], None], *, repeated: bool = False) -> Iterator[Stop]:
    """Inside, the first signal is kept in `Stop`, and told; the second one raises as it would outside.

    One that came before, and whose exception Python dropped, counts as the first. repeated: a launcher passes a signal
    on that the terminal has sent already, so one that follows at once is the same.
    """
    stop, before = Stop(), signal.getsignal(signal.SIGTERM)
    stop.asked = before.asked if isinstance(before, _Raiser) else None
    first = time.monotonic()

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if stop.asked is None:
            first, stop.asked = time.monotonic(), _RAISED[signal.Signals(number)]
            tell("stopping after this step; once more stops at once")
        elif not repeated or time.monotonic() > first + PASSED_ON:
            raise _RAISED[signal.Signals(number)]

    with _handled(handle, list(_RAISED)):
        yield stop


@contextmanager
def _handled(handle: Callable[[int, FrameType | None], None], numbers: list[signal.Signals]) -> Iterator[None]:
    """Signals that the parent process had ignored, as `nohup` and `&` do, stay ignored."""
    before: dict[signal.Signals, Any] = {}
    try:
        for number in numbers:
            if (known := signal.getsignal(number)) is not signal.SIG_IGN:
                before[number] = known
                signal.signal(number, handle)
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)
