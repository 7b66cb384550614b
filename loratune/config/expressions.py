"""Regular expressions from users and downloaded adapters, matched with a time limit.

An expression may need exponential time to match. `re` has no timeout; the package regex has one.
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
"""The default limit in seconds of CPU time, which is independent of the load. A thousand paths take milliseconds."""
MAX_CHARACTERS, MAX_REPEATS = 10_000, 1_000_000
"""Maximum length of an expression, and maximum product of its repetition counts. regex compiles without a limit."""
_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
_OTHER_DIALECT = re.compile(r"\{[\d<=\s]*[ides]\b|\[\[:")
"""Fuzzy matching and POSIX classes, which regex supports and `re` treats as literal text."""

Pattern: TypeAlias = regex.Pattern


class BadPatternError(ValueError):
    """A text that is not a valid regular expression, or that takes too long to match."""


def compile_pattern(text: str) -> Pattern:
    """Compile an expression in the syntax of `re`. Raises BadPatternError: it is invalid, or too large."""
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
    """A limit on CPU time that several matches share: `limit(pattern.fullmatch, text)`.

    Matching raises BadPatternError if the limit is exceeded.
    """

    def __init__(self, seconds: float = SECONDS):
        self._seconds = self._left = seconds

    def __call__(self, match: Callable[..., Any], text: str) -> Any:
        """Call a method of a pattern within the limit."""
        start = time.process_time()
        try:
            return match(text, timeout=self._left)
        except TimeoutError:
            raise BadPatternError(f"takes more than {self._seconds:g} s to match") from None
        finally:
            self._left = max(1e-3, self._left - (time.process_time() - start))


def full_matches(text: str, names: Iterable[str]) -> list[str]:
    """The names that fully match an expression. Raises BadPatternError."""
    expression, limit = compile_pattern(text), TimeLimit()
    return [name for name in names if limit(expression.fullmatch, name)]


def matching(text: str, names: Iterable[str], key: str, example: str) -> list[str]:
    """The names that fully match a regular expression.

    Args:
        text: The expression.
        names: Names of modules or parameters.
        key: The config key of the expression.
        example: Example names, for the message.

    Raises:
        ConfigError: The expression does not compile, or takes too long.
    """
    try:
        return full_matches(text, names)
    except BadPatternError as error:
        fix = f"correct it, or write names as a list: [{example}]"
        raise ConfigError(Problem(Code.LORA_UNSUPPORTED, f"`{text}` {error}", key=key, fix=fix)) from None
