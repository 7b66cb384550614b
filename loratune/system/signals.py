"""Signals that ask for the end: an exception at once, or, while steps are taken, a wish that the next pause grants.

SIGINT is Ctrl-C and ends with 130. SIGTERM, SIGHUP (the terminal has gone), SIGUSR1 and SIGUSR2 (what batch systems
send before the time of a job is over, as `sbatch --signal`), and SIGXCPU (`ulimit -t`) end with 143 after a checkpoint.

Left as they are: SIGQUIT, whose core dump is what somebody asks for who sends it; SIGPIPE and SIGXFSZ, which Python
ignores, so that the write fails with an error of its own; SIGCONT, which SLURM sends along with SIGTERM; SIGTSTP.

A handler writes by `say` alone. Python runs it between any two instructions, also in the middle of a write to stderr,
and Python's buffered streams and rich raise RuntimeError where a handler writes to the stream that it interrupted.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any


class Interruption(KeyboardInterrupt):
    """SIGINT. A class of its own, for Python kills the process by SIGINT as it exits, whatever its exit code, once a
    plain KeyboardInterrupt has passed through the `exec` of a string, as dataclasses and namedtuples run it."""


class Termination(KeyboardInterrupt):
    """Any other signal that asks for the end."""


_RAISED: dict[signal.Signals, type[KeyboardInterrupt]] = {
    signal.SIGINT: Interruption,
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


class _Handler(Stop):
    """A handler of signals that remembers what it was asked for."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Called with each signal; here it is kept, and nothing else is done."""
        self.asked = self.asked or _RAISED[signal.Signals(number)]


def asked() -> bool:
    """Whether a signal has asked for the end, so that nothing is waited for any longer."""
    return _pending() is not None


def _pending() -> type[KeyboardInterrupt] | None:
    """What the handlers that stand have been asked for. Some signals may have no handler, see `_handled`."""
    handlers = (signal.getsignal(number) for number in _RAISED)
    return next((one.asked for one in handlers if isinstance(one, _Handler) and one.asked is not None), None)


def say(line: str) -> None:
    """Write a line to stderr from a signal handler: at once, past all buffers, or not at all where that would wait.

    In a terminal it begins on a line of its own, below a bar of progress.
    """
    with suppress(Exception):  # nobody to tell
        handle = sys.stderr.fileno()
        room = select.poll()
        room.register(handle, select.POLLOUT)
        if room.poll(0):
            start = "\n" if os.isatty(handle) else ""
            os.write(handle, f"{start}{line}\n".encode())


class _Raiser(_Handler):
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


class _Keeper(_Handler):
    """A handler that keeps the first signal and tells of it, see `deferred`."""

    def __init__(self, tell: Callable[[str], None], *, repeated: bool):
        self.asked = _pending()
        self._tell, self._repeated = tell, repeated
        self._first = time.monotonic() if self.asked else None  # of the signals that a second one may follow

    def __call__(self, number: int, frame: FrameType | None) -> None:
        new = self.asked is None
        self.asked = self.asked or _RAISED[signal.Signals(number)]
        if number not in _INSISTENT:
            if new:
                self._tell("stopping after this step")
        elif self._first is None:
            self._first = time.monotonic()
            self._tell("stopping after this step; once more stops at once")
        elif not self._repeated or time.monotonic() > self._first + PASSED_ON:
            raise _RAISED[signal.Signals(number)]


@contextmanager
def deferred(tell: Callable[[str], None] = say, *, repeated: bool = False) -> Iterator[Stop]:
    """Inside, the first signal is kept in `Stop`, and told; a second SIGINT or SIGTERM raises as it would outside.

    One that came before, and whose exception Python dropped, counts as the first. Whoever uses this looks at `Stop`
    once more when all is done, or a signal after the last look is lost.

    Args:
        tell: Is called by the signal handler, and may do nothing that such a handler may not.
        repeated: A launcher passes a signal on that the terminal has sent already, so one that follows within
            `PASSED_ON` is the same.
    """
    keeper = _Keeper(tell, repeated=repeated)
    with _handled(keeper):
        yield keeper


@contextmanager
def immediate() -> Iterator[None]:
    """Inside, a signal is told on stderr and ends the process, in which there is nothing yet to clear away.

    An exception would not do: the command line's library turns a KeyboardInterrupt into an exit without a word.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        interrupted = number == signal.SIGINT
        say("error: interrupted" if interrupted else "error: terminated")
        os._exit(130 if interrupted else 143)

    with _handled(handle):
        yield


@contextmanager
def ending(*, hurried: bool) -> Iterator[None]:
    """Inside, signals hurry the process, see `asked`, and do not end it: it is ending already, about to say why.

    hurried: because of a signal.
    """
    ender = _Handler()
    ender.asked = Termination if hurried else None
    with _handled(ender):
        yield


def ignore() -> None:
    """Ignore signals from here on, in a process that ends, or that a launcher sends what has been obeyed already."""
    for number in _RAISED:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _handled(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
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
