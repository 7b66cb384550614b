"""Signals that ask for the end: an exception at once, or, while steps are taken, a wish that the next pause grants.

SIGINT is Ctrl-C and ends with 130. SIGTERM, SIGHUP (the terminal has gone), SIGUSR1 and SIGUSR2 (what batch systems
send before the time of a job is over, as `sbatch --signal`), and SIGXCPU (`ulimit -t`) end with 143 after a checkpoint.

Left as they are: SIGQUIT, whose core dump is what somebody asks for who sends it; SIGPIPE and SIGXFSZ, which Python
ignores, so that the write fails with an error of its own; SIGCONT, which SLURM sends along with SIGTERM; SIGTSTP.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any


class Termination(KeyboardInterrupt):
    """Any signal but SIGINT that asks for the end, where Ctrl-C is a KeyboardInterrupt."""


_RAISED: dict[signal.Signals, type[KeyboardInterrupt]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Termination,
    signal.SIGHUP: Termination,
    signal.SIGUSR1: Termination,
    signal.SIGUSR2: Termination,
    signal.SIGXCPU: Termination,
}
_INSISTENT = (signal.SIGINT, signal.SIGTERM)
"""A second one of these stops at once. The others come more than once without anybody's insisting: shell and kernel
both send SIGHUP as a terminal closes, and SIGXCPU comes every second."""

PASSED_ON = 2.0
"""Seconds within which a launcher passes a signal on."""


class Stop:
    """Whether the user wants a run to stop. asked: what the first signal would have raised; None without one."""

    asked: type[KeyboardInterrupt] | None = None


class _Raiser(Stop):
    """A handler that raises. asked: what it raised; Python drops what is raised in a destructor or a weak reference,
    and some libraries turn what is raised during their imports into an error of their own."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        again = self.asked is not None
        self.asked = self.asked or _RAISED[signal.Signals(number)]
        if not again or number in _INSISTENT:
            raise _RAISED[signal.Signals(number)]


@contextmanager
def terminable() -> Iterator[Stop]:
    """Inside, a signal raises KeyboardInterrupt or `Termination`, so that what was begun is cleared away.

    Gives what has been asked for, which holds even where the exception has been lost on its way.
    """
    show = sys.unraisablehook
    sys.unraisablehook = lambda dropped: None if isinstance(dropped.exc_value, KeyboardInterrupt) else show(dropped)
    raiser = _Raiser()
    try:
        with _handled(raiser):
            yield raiser
    finally:
        sys.unraisablehook = show


@contextmanager
def deferred(tell: Callable[[str], None], *, repeated: bool = False) -> Iterator[Stop]:
    """Inside, the first signal is kept in `Stop`, and told; a second SIGINT or SIGTERM raises as it would outside.

    One that came before, and whose exception Python dropped, counts as the first. repeated: a launcher passes a signal
    on that the terminal has sent already, so one that follows at once is the same.
    """
    stop, before = Stop(), signal.getsignal(signal.SIGTERM)
    stop.asked = before.asked if isinstance(before, _Raiser) else None
    first: float | None = time.monotonic() if stop.asked else None  # of the signals that a second one may follow

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        new = stop.asked is None
        stop.asked = stop.asked or _RAISED[signal.Signals(number)]
        if number not in _INSISTENT:
            if new:
                tell("stopping after this step")
        elif first is None:
            first = time.monotonic()
            tell("stopping after this step; once more stops at once")
        elif not repeated or time.monotonic() > first + PASSED_ON:
            raise _RAISED[signal.Signals(number)]

    with _handled(handle):
        yield stop


@contextmanager
def immediate() -> Iterator[None]:
    """Inside, a signal is told on stderr and ends the process, in which there is nothing yet to clear away.

    An exception would not do: the command line's library turns a KeyboardInterrupt into an exit without a word.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        interrupted = _RAISED[signal.Signals(number)] is KeyboardInterrupt
        with suppress(Exception):  # nobody to tell, or in the middle of another line
            print("error: interrupted" if interrupted else "error: terminated", file=sys.stderr, flush=True)
        os._exit(130 if interrupted else 143)

    with _handled(handle):
        yield


@contextmanager
def unheard() -> Iterator[None]:
    """Inside, signals are ignored: the process is ending already, and is about to say why."""
    with _handled(signal.SIG_IGN):
        yield


def ignore() -> None:
    """Ignore signals from here on, in a process that ends, or that a launcher sends what has been obeyed already."""
    for number in _RAISED:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _handled(handle: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Signals that the parent process had ignored, as `nohup` and `&` do, stay ignored."""
    before: dict[signal.Signals, Any] = {}
    try:
        for number in _RAISED:
            if (known := signal.getsignal(number)) is not signal.SIG_IGN:
                before[number] = known
                signal.signal(number, handle)
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)
