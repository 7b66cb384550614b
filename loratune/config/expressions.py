"""Regular expressions of users and of downloaded adapters, matched within a time limit.

An expression may need exponential time to match. `re` has no limit; the package regex has a timeout.
"""

import math
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import regex

from loratune.codes import Code
from loratune.errors import ConfigError, Problem

SECONDS = 2.0
"""Of processor time, so that a busy machine does not count: matching a thousand paths takes milliseconds."""
MAX_CHARACTERS, MAX_REPEATS = 10_000, 1_000_000
"""Of an expression: its length, and the product of its counts of repetitions. regex has no limit as it compiles."""
_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
_OTHER_DIALECT = re.compile(r"\{[\d<=\s]*[ides]\b|\[\[:")
"""Approximate matches and classes of POSIX, which regex knows, and `re` takes literally."""

Pattern: TypeAlias = regex.Pattern


class BadPatternError(ValueError):
    """A text that is not a regular expression, or one that takes too long to match."""


def compile_pattern(text: str) -> Pattern:
    """Compile an expression of the syntax of `re`. Raises BadPatternError: it is not one, or is too large."""
    if len(text) > MAX_CHARACTERS:
        raise BadPatternError("is too large for a regular expression")
    try:
        re.compile(text)
    except re.error as error:
        raise BadPatternError(f"is not a regular expression: {error}") from None
    except (OverflowError, RecursionError, MemoryError):
        raise BadPatternError("is too large for a regular expression") from None
    repeats = math.prod(max(1, *(int(count or 0) for count in counts)) for counts in _COUNT.findall(text))
    if repeats > MAX_REPEATS:
        raise BadPatternError("is too large for a regular expression")
    if found := _OTHER_DIALECT.search(text):
        raise BadPatternError(f"has `{found[0]}`, which needs a backslash if it is meant literally")
    try:
        return regex.compile(text)
    except (regex.error, RecursionError) as error:
        raise BadPatternError(f"is not a regular expression: {error}") from None


class TimeLimit:
    """A limit of processor time that several matches share: `limit(pattern.fullmatch, text)`.

    Matching raises BadPatternError where it takes longer.
    """

    def __init__(self, seconds: float = SECONDS):
        self._seconds = self._left = seconds

    def __call__(self, match: Callable[..., Any], text: str) -> Any:
        """The result of a method of a pattern."""
        start = time.process_time()
        try:
            return match(text, timeout=self._left)
        except TimeoutError:
            raise BadPatternError(f"takes more than {self._seconds:g} s to match") from None
        finally:
            self._left = max(1e-3, self._left - (time.process_time() - start))


def full_matches(text: str, names: Iterable[str]) -> list[str]:
    """The names that an expression matches as a whole. Raises BadPatternError."""
    expression, limit = compile_pattern(text), TimeLimit()
    return [name for name in names if limit(expression.fullmatch, name)]


def matching(text: str, names: Iterable[str], key: str, example: str) -> list[str]:
    """The names that a regular expression matches as a whole.

    Args:
        text: The expression.
        names: Of modules or parameters.
        key: Where the expression is in the config.
        example: What a list of names would hold.

    Raises:
        ConfigError: The expression does not compile, or takes too long.
    """
    try:
        return full_matches(text, names)
    except BadPatternError as error:
        fix = f"correct it, or write names as a list: [{example}]"
        raise ConfigError(Problem(Code.LORA_UNSUPPORTED, f"`{text}` {error}", key=key, fix=fix)) from None
