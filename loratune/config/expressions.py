"""Regular expressions that users and strangers write: compiled and matched within seconds, or refused.

`re` tries every way in which an expression may match, and `(a+)+b` has exponentially many; but it looks for signals as
it goes. A timer of the process ends it, and what PEFT matches later, by the same module, is what was tried here.
"""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SECONDS = 2.0
"""Of the processor, so that a busy machine does not count: matching a thousand paths takes milliseconds."""


def brief(text: str) -> str:
    """An expression as an error shows it."""
    return text if len(text) <= 80 else f"{text[:77]}..."


class BadExpressionError(ValueError):
    """An expression that is none, or that takes too long."""


class _TooLong(BaseException):
    """The time is over."""


def compiled(text: str) -> re.Pattern[str]:
    """A compiled expression. Raises BadExpressionError: it is none, or is too large to be compiled."""
    try:
        with limited():
            return re.compile(text)
    except re.error as error:
        raise BadExpressionError(f"is not a regular expression: {error}") from None
    except (OverflowError, RecursionError, MemoryError):
        raise BadExpressionError("is too large for a regular expression") from None


@contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """Inside, expressions are matched. Raises BadExpressionError: they take more than so many seconds of the processor.

    Signals reach the main thread only; in another one there is no limit. Within another limit, that one holds.
    """
    within = signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 0
    if within or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGVTALRM, end)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    except _TooLong:
        raise BadExpressionError(f"takes more than {seconds:g} s to match") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
