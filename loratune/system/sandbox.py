"""Limits of time and memory for code that came with a model: chat templates, and the regular expressions of tokenizers.

Either may run for ever, by intent or not.

- A template is Python. One multiplication of large numbers, or one comparison of nested lists, holds the interpreter,
  so that no other thread and no signal handler gets a turn. Templates are rendered in a process of their own
  (`Sandbox`), which the operating system ends.
- tokenizers releases the interpreter while it works, so a thread does the work (`run_with_time_limit`) while this one
  waits. A thread cannot be ended; it goes with the process, which ends on the error that is raised here.
"""

import gc
import mmap
import os
import resource
import signal
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from jinja2 import TemplateSyntaxError

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

SECONDS = 20
"""How long one text may take. The usual time is about a thousandth of a second."""

MEMORY = 2 << 30
"""Bytes of address space beside what the process has already, and beside what its input accounts for."""

TEMPLATE_ERRORS = (TemplateSyntaxError, SyntaxError, RecursionError)
"""What Jinja and Python raise for a text that is no template, or whose blocks or parentheses are nested too deeply."""

_IDLE = 10.0
"""Seconds without work after which the process of a `Sandbox` ends; the next work starts another one."""

_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
"""Signals that a terminal or a launcher sends to all processes of a group: the process that waits acts on them."""


class LimitExceededError(Exception):
    """The work takes longer, or needs more memory, than it may; the message says which.

    Attributes:
        at: The number of the piece that was worked on, as reported to `PieceTimer`; -1 if none was.
    """

    def __init__(self, what: str, at: int = -1):
        super().__init__(what)
        self.at = at


def template_error_reason(error: BaseException) -> str:
    """Why a template cannot be compiled. error: one of `TEMPLATE_ERRORS`."""
    if isinstance(error, TemplateSyntaxError):
        return str(error.message)
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return f"it is nested too deeply: {error.msg}" if isinstance(error, SyntaxError) else str(error)


def is_rust_panic(error: BaseException) -> bool:
    """Whether a library in Rust gave up; the class of such an error is no `Exception`, and cannot be imported."""
    return type(error).__name__ == "PanicException"


def run_with_time_limit(work: Callable[[], T], *, extra_seconds: int = 0) -> T:
    """Do some work that releases the interpreter, and return what it returns.

    Args:
        work: Is done by a thread.
        extra_seconds: How much longer than `SECONDS` it may take.

    Raises:
        LimitExceededError: It takes longer.
        Exception: Whatever the work raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, daemon=True).start()
    waited = 0
    # seconds are counted, not read from a clock: a process that is stopped for a while loses only one of them
    while not done.wait(1):
        waited += 1
        if waited >= SECONDS + extra_seconds:
            raise LimitExceededError(f"takes longer than {SECONDS + extra_seconds} s")
    if errors:
        raise errors[0]
    return results[0]


class PieceTimer:
    """Limits the time of each piece of the work in a `Sandbox`, and not that of all: the work calls it before each
    piece, with the number of the piece."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 8)

    def __call__(self, at: int) -> None:
        """Begin a piece of work, which may take `SECONDS` of the processor."""
        self._shared[:] = at.to_bytes(8, "little", signed=True)
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + SECONDS + 1)

    @property
    def at(self) -> int:
        """The number of the piece that is worked on."""
        return int.from_bytes(self._shared[:], "little", signed=True)


class Sandbox(Generic[T]):
    """An object that lives in a process of its own, forked from this one, and works there within limits."""

    def __init__(self, make: Callable[[PieceTimer], T]):
        """make: makes the object, in that process."""
        self._make, self._timer = make, PieceTimer()
        self._child: _Child | None = None

    def __call__(
        self, function: Callable[Concatenate[T, P], R], memory: int, *arguments: P.args, **named: P.kwargs
    ) -> R:
        """What a function returns for the object and the arguments, all of which can be pickled.

        Args:
            function: Is called in the process of the sandbox.
            memory: Bytes that it may map beside what the process has.
            arguments: Come after the object.
            named: Keyword arguments.

        Raises:
            LimitExceededError: The work, or a piece of it, takes longer than `SECONDS`, needs more memory, or ends its
                process.
            Exception: Whatever the function, or the making of the object, raises.
        """
        for last in (False, True):
            child = self._child
            if child is None or not child.send(function, memory, arguments, named):
                child = self._child = _Child(self._make, self._timer)
                child.send(function, memory, arguments, named)
            try:
                done, result = child.receive()
                break
            except BaseException as error:
                self._child = None
                signal_number = child.end() or 0
                if not isinstance(error, EOFError | ConnectionError):
                    raise
                if last or signal_number:  # else its idle time was over just as the work was sent
                    raise LimitExceededError(_cause(signal_number), self._timer.at) from None
        if done:
            return result  # type: ignore[no-any-return]
        if isinstance(result, MemoryError):
            raise LimitExceededError(f"needs more than {memory / (1 << 30):.1f} GiB of memory", self._timer.at)
        raise result


class _Child:
    """A forked process that does one piece of work after another, until this end of the pipe is closed."""

    def __init__(self, make: Callable[[PieceTimer], Any], timer: PieceTimer):
        self._pipe, other = Pipe()
        pid = os.fork()
        if pid == 0:
            try:
                _serve(make, timer, other)
            finally:
                os._exit(0)
        other.close()
        self.end = weakref.finalize(self, _end, pid, os.getpid(), self._pipe)

    def send(self, *work: Any) -> bool:
        """Give it work; False if the process has ended."""
        try:
            if self._pipe.poll():
                return False  # without work, nothing comes from it but its end
            self._pipe.send(work)
        except (EOFError, ConnectionError):
            return False
        return True

    def receive(self) -> tuple[bool, Any]:
        """Whether the work was done, and its result or error. Raises EOFError or ConnectionError: the process has
        ended."""
        done, result = self._pipe.recv()
        return done, result


def _end(pid: int, owner: int, pipe: Connection) -> int:
    """End a process, and return the number of the signal that ended it. owner: the process that started it."""
    if os.getpid() != owner:
        return 0
    pipe.close()
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)  # without effect where it has ended by itself
        return os.WTERMSIG(os.waitpid(pid, 0)[1])
    return 0


def _cause(signal_number: int) -> str:
    """What the work did, by the signal that ended its process; 0 without a signal."""
    if signal_number == signal.SIGXCPU:
        return f"takes longer than {SECONDS} s"
    if signal_number == signal.SIGKILL:
        return "needs more memory than there is"
    return f"ends its process ({signal.Signals(signal_number).name if signal_number else 'without a signal'})"


def _serve(make: Callable[[PieceTimer], Any], timer: PieceTimer, pipe: Connection) -> None:
    """Do the work that comes through the pipe. The process keeps no file of its parent's, and leaves signals to it."""
    gc.freeze()
    signal.set_wakeup_fd(-1)
    for number in _GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    _limit(resource.RLIMIT_CORE, 0)
    for stream in range(3):
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    os.closerange(3, pipe.fileno())
    os.closerange(pipe.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    objects: list[Any] = []  # the object, once it is made
    with suppress(EOFError, ConnectionError):
        while pipe.poll(_IDLE):
            function, memory, arguments, named = pipe.recv()
            _limit(resource.RLIMIT_AS, _mapped() + memory)
            timer(-1)
            try:
                objects = objects or [make(timer)]
                reply = True, function(objects[0], *arguments, **named)
            except Exception as error:
                reply = False, error
            _reply(pipe, reply)


def _reply(pipe: Connection, reply: tuple[bool, Any]) -> None:
    try:
        pipe.send(reply)
    except MemoryError as error:
        pipe.send((False, error))
    except (EOFError, ConnectionError):
        raise
    except Exception:  # an error of some library that cannot be pickled
        pipe.send((False, RuntimeError(f"{type(reply[1]).__name__}: {reply[1]}")))


def _mapped() -> int:
    """Bytes of address space that this process has; very many where the system does not say so."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return 1 << 60


def _limit(what: int, wanted: int) -> None:
    """Set a limit of this process, or the hard limit if that is lower."""
    _, hard = resource.getrlimit(what)
    with suppress(ValueError, OSError):
        resource.setrlimit(what, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
