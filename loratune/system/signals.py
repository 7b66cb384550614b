"""Signals that ask the command to end: they raise an exception, or, during training, are deferred to the next step.

SIGINT is Ctrl-C and ends with exit code 130. SIGTERM, SIGHUP (the terminal was closed), SIGUSR1 and SIGUSR2 (what batch
systems send before a job's time is over, as `sbatch --signal`), and SIGXCPU (`ulimit -t`) end with 143 after a
checkpoint.

Not handled: SIGQUIT, which is sent for its core dump; SIGPIPE and SIGXFSZ, which Python ignores, so that the write
fails with an error of its own; SIGCONT, which SLURM sends along with SIGTERM; SIGTSTP.

A handler writes with `write_line` only. Python runs it between any two instructions, also in the middle of a write to
stderr, and Python's buffered streams and rich raise RuntimeError where a handler writes to the stream it interrupted.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from loratune.system.platforms import is_writable


class StopSignal(KeyboardInterrupt):
    """A signal that requests termination.

    Attributes:
        is_resumable: Whether a run has left a checkpoint to resume from.
        published: The result, which was finished and in its place before the process reacted to the signal; None if it
            was not.
    """

    is_resumable = False
    published: Path | None = None


class Interruption(StopSignal):
    """SIGINT. A class of its own: once a plain KeyboardInterrupt has passed through the `exec` of a string, as
    dataclasses and namedtuples run it, Python kills the process by SIGINT as it exits, whatever its exit code."""


class Termination(StopSignal):
    """Any other signal that requests termination."""


_EXCEPTIONS: dict[signal.Signals, type[StopSignal]] = {
    signal.SIGINT: Interruption,
    signal.SIGTERM: Termination,
}
for _name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):  # Windows lacks them
    if hasattr(signal, _name):
        _EXCEPTIONS[getattr(signal, _name)] = Termination
_REPEATABLE = (signal.SIGINT, signal.SIGTERM)
"""A second one of these stops at once. The others come more than once although nobody asks twice: shell and kernel both
send SIGHUP as a terminal closes, and SIGXCPU comes every second."""

RELAY_SECONDS = 2.0
"""Seconds within which a launcher passes a signal on to its processes."""


def _silent(line: str) -> None:
    pass


class Stop:
    """Whether a signal has asked the run to stop. requested: the exception of the first signal; None without one."""

    requested: type[StopSignal] | None = None


class _Handler(Stop):
    """A handler that remembers the first signal, and does nothing else.

    report: Takes a line about a signal that is deferred.
    """

    def __init__(self, report: Callable[[str], None] = _silent):
        self.report = report

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Called with each signal."""
        is_first = self.requested is None
        self.requested = self.requested or _EXCEPTIONS[signal.Signals(number)]
        self.react(number, is_first=is_first)

    def react(self, number: int, *, is_first: bool) -> None:
        """Do nothing else."""


class _RaisingHandler(_Handler):
    """A handler that raises, and remembers what: Python drops what is raised in a destructor or a weak reference, and
    some libraries turn what is raised during their imports into an error of their own."""

    def react(self, number: int, *, is_first: bool) -> None:
        """Raise the exception of the signal."""
        if is_first or number in _REPEATABLE:
            raise _EXCEPTIONS[signal.Signals(number)]


class _DeferringHandler(_Handler):
    """A handler that remembers the first signal and reports it, see `defer_signals`."""

    def __init__(self, *, repeated: bool):
        outer = [handler for handler in map(signal.getsignal, _EXCEPTIONS) if isinstance(handler, _Handler)]
        super().__init__(outer[0].report if outer else _silent)
        self.requested = next((handler.requested for handler in outer if handler.requested), None)
        self._repeated = repeated
        self._first = time.monotonic() if self.requested else None  # of the repeatable signals

    def react(self, number: int, *, is_first: bool) -> None:
        """Report the first signal, and raise at a second one."""
        if number not in _REPEATABLE:
            if is_first:
                self.report("stopping after this step")
        elif self._first is None:
            self._first = time.monotonic()
            self.report("stopping after this step; once more stops at once")
        elif not self._repeated or time.monotonic() > self._first + RELAY_SECONDS:
            raise _EXCEPTIONS[signal.Signals(number)]


def write_line(line: str) -> None:
    """Write a line to stderr from a signal handler: at once, past all buffers, or not at all where that would wait.

    In a terminal it begins on a line of its own, below a progress bar.
    """
    with suppress(Exception):  # there is no other place to report to
        handle = sys.stderr.fileno()
        if is_writable(handle):
            start = "\n" if os.isatty(handle) else ""
            os.write(handle, f"{start}{line}\n".encode())


def asks_for_json(words: list[str]) -> bool:
    """Whether a command line has the option `--json`, before it is parsed."""
    return any(word.split("=")[0] == "--json" for word in words[: words.index("--") if "--" in words else None])


@contextmanager
def raise_on_signals(report: Callable[[str], None] = _silent) -> Iterator[Stop]:
    """Inside, a signal raises `Interruption` or `Termination`, so that unfinished work is cleaned up.

    report: Takes a line about each signal that `defer_signals` defers inside, see there.

    Yields the `Stop`, which remembers the signal even if the exception was lost.
    """
    hook = sys.unraisablehook
    sys.unraisablehook = lambda dropped: None if isinstance(dropped.exc_value, KeyboardInterrupt) else hook(dropped)
    handler = _RaisingHandler(report)
    try:
        with _handled(handler):
            yield handler
    finally:
        sys.unraisablehook = hook


@contextmanager
def defer_signals(report: Callable[[str], None] | None = None, *, repeated: bool = False) -> Iterator[Stop]:
    """Inside, the first signal is only remembered and reported; a second SIGINT or SIGTERM raises.

    A signal that came before, and whose exception Python dropped, counts as the first. Look at the `Stop` once more
    when all is done, or a signal after the last look is lost.

    Args:
        report: Is called by the signal handler, and may do nothing that such a handler may not. By default, what the
            handlers outside report to: `write_line` of the command line, nothing in other programs.
        repeated: A launcher passes on a signal that the terminal has sent already, so one that follows within
            `RELAY_SECONDS` is the same.
    """
    handler = _DeferringHandler(repeated=repeated)
    handler.report = report or handler.report
    with _handled(handler):
        yield handler


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Inside, a signal is reported on stderr and ends the process, which has nothing to clean up yet.

    An exception would not do: typer turns a KeyboardInterrupt into an exit without a message.
    """

    def _exit(number: int, frame: FrameType | None) -> None:
        what, code = ("interrupted", 130) if number == signal.SIGINT else ("terminated", 143)
        problem = f'{{"code": "{what}", "place": "", "key": "", "what": "{what}", "fix": ""}}'
        is_json = asks_for_json(sys.argv[1:])
        write_line(f'{{"exit_code": {code}, "errors": [{problem}]}}' if is_json else f"error: {what}")
        os._exit(code)

    with _handled(_exit):
        yield


@contextmanager
def default_actions() -> Iterator[None]:
    """Inside, a signal ends the process at once.

    Python runs handlers between two instructions, so they have no effect while a library waits for a connection.
    """
    with _handled(signal.SIG_DFL):
        yield


@contextmanager
def hold_signals(*, requested: bool = False) -> Iterator[Stop]:
    """Inside, signals are only remembered: the process is ending already, and reports why; or it does what must not be
    done by half, and looks at the `Stop` afterwards.

    requested: It ends because of a signal.
    """
    handler = _Handler()
    handler.requested = Termination if requested else None
    with _handled(handler):
        yield handler


def ignore_signals() -> None:
    """Ignore signals from here on, as the process is ending."""
    for number in _EXCEPTIONS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _handled(handle: Any) -> Iterator[None]:
    """Signals that the parent process had ignored, as `nohup` and `&` do, stay ignored, and in other threads than the
    main one, where Python sets no handlers, all stay as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous: dict[signal.Signals, Any] = {}
    try:
        for number in _EXCEPTIONS:
            if (handler := signal.getsignal(number)) is not signal.SIG_IGN:
                previous[number] = handler
                signal.signal(number, handle)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
