"""Limits of time and memory for code that came with a model: chat templates, and the regular expressions of tokenizers.

Either may run for ever, by intent or not. A template is Python: one multiplication of large numbers, or one comparison
of nested lists, keeps the interpreter to itself, so that no other thread and no signal handler has a turn. Templates
are rendered in a process of their own (`Apart`), which the system ends. tokenizers lets go of the interpreter while it
works: a thread does it (`limited`) while this one waits. A thread that is given up cannot be ended; it goes with the
process, which ends on the error that is raised here.
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

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

SECONDS = 20
"""How long one text may take. The usual time is about a thousandth of a second."""

MEMORY = 2 << 30
"""Bytes of address space beside what the process has already, and beside what its input accounts for."""

_IDLE = 10.0
"""Seconds without work after which a process of `Apart` ends; the next work starts another one."""

_UNHEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
"""Signals that a terminal or a launcher sends to all processes of a group: the process that waits acts on them."""


class BeyondLimit(Exception):
    """The work takes longer, or needs more memory, than it may; the message says which. at: the number of the piece
    that was worked on, as `Beat` was told."""

    def __init__(self, what: str, at: int = -1):
        super().__init__(what)
        self.at = at


def limited(work: Callable[[], T], *, more: int = 0) -> T:
    """What some work returns that lets go of the interpreter. more: seconds that it may take beside `SECONDS`.

    Raises BeyondLimit: it takes longer. Raises whatever the work does.
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
    # seconds are counted, not read from a clock: a process that is stopped for a while loses one
    while not done.wait(1):
        waited += 1
        if waited >= SECONDS + more:
            raise BeyondLimit(f"takes longer than {SECONDS + more} s")
    if errors:
        raise errors[0]
    return results[0]


class Beat:
    """Called by work in a process of `Apart` whenever it goes on to the next piece, with the number of that: the time
    of each piece is limited, and not that of all."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 8)

    def __call__(self, at: int) -> None:
        """Go on to a piece of work, which may take `SECONDS` of the processor."""
        self._shared[:] = at.to_bytes(8, "little", signed=True)
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + SECONDS + 1)

    @property
    def at(self) -> int:
        """The number of the piece that is worked on."""
        return int.from_bytes(self._shared[:], "little", signed=True)


class Apart(Generic[T]):
    """An object that lives in a process of its own, forked from this one, and works there within limits."""

    def __init__(self, make: Callable[[Beat], T]):
        """make: makes the object, in that process."""
        self._make, self._beat = make, Beat()
        self._child: _Child | None = None

    def __call__(
        self, function: Callable[Concatenate[T, P], R], memory: int, *arguments: P.args, **named: P.kwargs
    ) -> R:
        """What a function returns for the object and the arguments, each of which can be pickled.

        memory: bytes that it may map beside what the process has. Raises BeyondLimit: the work, or a piece of it, takes
        longer than `SECONDS`; no more memory is to be had; the process ends. Raises whatever the function does, or the
        making of the object.
        """
        for last in (False, True):
            child = self._child
            if child is None or not child.asked(function, memory, arguments, named):
                child = self._child = _Child(self._make, self._beat)
                child.asked(function, memory, arguments, named)
            try:
                done, result = child.answer()
                break
            except BaseException as error:
                self._child = None
                ended = child.end() or 0
                if not isinstance(error, EOFError | ConnectionError):
                    raise
                if last or ended:  # else its idle time was over just as it was asked
                    raise BeyondLimit(_why(ended), self._beat.at) from None
        if done:
            return result  # type: ignore[no-any-return]
        if isinstance(result, MemoryError):
            raise BeyondLimit(f"needs more than {memory / (1 << 30):.1f} GiB of memory", self._beat.at)
        raise result


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust gave up; the class of such an error is no `Exception`, and cannot be imported."""
    return type(error).__name__ == "PanicException"


class _Child:
    """A forked process that answers one question after another, until this end of the pipe is closed."""

    def __init__(self, make: Callable[[Beat], Any], beat: Beat):
        self._pipe, other = Pipe()
        pid = os.fork()
        if pid == 0:
            try:
                _serve(make, beat, other)
            finally:
                os._exit(0)
        other.close()
        self.end = weakref.finalize(self, _end, pid, os.getpid(), self._pipe)

    def asked(self, *question: Any) -> bool:
        """Whether the process is there to be asked."""
        try:
            if self._pipe.poll():
                return False  # before a question, nothing comes but the end
            self._pipe.send(question)
        except (EOFError, ConnectionError):
            return False
        return True

    def answer(self) -> tuple[bool, Any]:
        """Whether the work was done, and what came of it. Raises EOFError or ConnectionError: the process has ended."""
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


def _why(ended: int) -> str:
    """What a process did that a signal ended."""
    if ended == signal.SIGXCPU:
        return f"takes longer than {SECONDS} s"
    if ended == signal.SIGKILL:
        return "needs more memory than there is"
    return f"ends the process that works on it ({signal.Signals(ended).name if ended else 'without a signal'})"


def _serve(make: Callable[[Beat], Any], beat: Beat, pipe: Connection) -> None:
    """The life of a process of `Apart`: nothing of its parent's is held, heard or cleared away."""
    gc.freeze()
    signal.set_wakeup_fd(-1)
    for number in _UNHEARD:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    _limit(resource.RLIMIT_CORE, 0)
    for stream in range(3):
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    os.closerange(3, pipe.fileno())
    os.closerange(pipe.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    made: list[Any] = []
    with suppress(EOFError, ConnectionError):
        while pipe.poll(_IDLE):
            function, memory, arguments, named = pipe.recv()
            _limit(resource.RLIMIT_AS, _mapped() + memory)
            beat(-1)
            try:
                made = made or [make(beat)]
                answer = True, function(made[0], *arguments, **named)
            except Exception as error:
                answer = False, error
            _answered(pipe, answer)


def _answered(pipe: Connection, answer: tuple[bool, Any]) -> None:
    try:
        pipe.send(answer)
    except MemoryError as error:
        pipe.send((False, error))
    except (EOFError, ConnectionError):
        raise
    except Exception:  # an error of some library that cannot be pickled
        pipe.send((False, RuntimeError(f"{type(answer[1]).__name__}: {answer[1]}")))


def _mapped() -> int:
    """Bytes of address space that this process has; very many where the system does not say so."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return 1 << 60


def _limit(what: int, wanted: int) -> None:
    """Set a limit of this process, unless it may have less anyway."""
    _, hard = resource.getrlimit(what)
    with suppress(ValueError, OSError):
        resource.setrlimit(what, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
