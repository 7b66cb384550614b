"""Text of data, files and models as a page and its charts show it: escaped, and no longer than one can look at."""

from loratune import escaping

LONGEST_TEXT = 2_000
"""Characters of a text that are shown; of a longer one, its beginning and its end."""
LONGEST_LABEL = 60
"""The same of a label."""


def block(value: str) -> str:
    """A text of several lines."""
    if len(value) > LONGEST_TEXT:
        half = LONGEST_TEXT // 2
        left_out = f"\n[... {len(value) - 2 * half:,} characters left out ...]\n"
        value = f"{value[:half]}{left_out}{value[-half:]}"
    return escaping.text(value)


def label(value: str, longest: int = LONGEST_LABEL) -> str:
    """A text in one line, as the label of an axis, a tick, a row or a column."""
    return _cut(escaping.line(_cut(value, longest)), longest)


def _cut(value: str, longest: int) -> str:
    """A text without the middle of a long one."""
    end = longest // 3
    return value if len(value) <= longest else f"{value[: longest - end - 1]}…{value[-end:]}"
