"""Limits of time and memory for code that came with a model: chat templates, and the regular expressions of tokenizers.

Either may run for ever, by intent or not. The work is done in a thread of its own while this one waits: a template is
Python, which lets the waiting thread have its turns, and tokenizers lets go of the interpreter while it works. A thread
that is given up cannot be ended; it goes with the process, which ends on the error that is raised here.
"""

import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import jinja2

T = TypeVar("T")

SECONDS = 20
"""How long one text may take. The usual time is about a thousandth of a second."""

MEMORY = 2 << 30
"""Bytes of address space beside what the process has already, and beside what its input accounts for."""


class BeyondLimit(Exception):
    """The work takes longer, or needs more memory, than it may; the message says which."""


class Beat:
    """Counts what is done, so that the time of each piece of work is limited and not that of all. at: what is worked on
    now, for a message."""

    def __init__(self) -> None:
        self.count, self.at = 0, ""

    def __call__(self, at: str) -> None:
        """Go on to the next piece of work."""
        self.count, self.at = self.count + 1, at


def limited(work: Callable[[], T], *, memory: int | None = None, beat: Beat | None = None, more: int = 0) -> T:
    """What some work returns.

    memory: bytes that it may use beside what is in use; None for no limit. beat: called by the work whenever a piece of
    it is done. more: seconds that a piece may take beside `SECONDS`.
    Raises BeyondLimit: a piece takes longer; no more memory is to be had. Raises whatever the work does.
    """
    beat = beat or Beat()
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

    with _address_space(memory):
        threading.Thread(target=run, daemon=True).start()
        waited, seen = 0, beat.count
        # seconds are counted, not read from a clock: a process that is stopped for a while loses one
        while not done.wait(1):
            waited, seen = (waited + 1, seen) if beat.count == seen else (0, beat.count)
            if waited >= SECONDS + more:
                raise BeyondLimit(f"takes longer than {SECONDS + more} s")
    if not errors:
        return results[0]
    if isinstance(errors[0], MemoryError) and memory is not None:
        raise BeyondLimit(f"needs more than {memory / (1 << 30):.1f} GiB of memory") from None
    raise errors[0]


def powers(template: str) -> bool:
    """Whether a chat template raises numbers to a power: Python does so without giving other threads a turn, however
    long it takes, and jinja2 already when it compiles."""
    try:
        return any(kind == "operator" and value == "**" for _, kind, value in jinja2.Environment().lex(template))
    except jinja2.TemplateSyntaxError:
        return False


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust gave up; the class of such an error is no `Exception`, and cannot be imported."""
    return type(error).__name__ == "PanicException"


@contextmanager
def _address_space(memory: int | None) -> Iterator[None]:
    """Inside, the process may map so many bytes more than it has; without a limit where the system has none."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):
        memory = pages = None
    if memory is None or pages is None:
        yield
        return
    before = soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + memory
    lower = min(wanted, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY), wanted)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (lower, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
