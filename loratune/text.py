"""Text for display: escapes untrusted text, and formats numbers, blocks and tables.

Escape sequences in data, file names or a model's answer could otherwise set a terminal's title, write to the clipboard
(OSC 52) or clear the screen, and bidirectional control characters change the displayed order of text.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence

_SPECIAL = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, C0 and C1, except tabs and line breaks
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f"  # line separators and directional marks, see Unicode's TR 36
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # lone surrogates and invisible characters
)
_IN_A_LINE = re.compile(f"[\t\n{_SPECIAL}]")
_IN_A_TEXT = re.compile(f"[{_SPECIAL}]")
_IN_DOUBLE_QUOTES = re.compile(r'["$`\\!]')
"""Characters that a shell interprets inside double quotes."""
_IN_MARKDOWN = re.compile(r"[\\`*\[\]<>&#~|$]|:(?=//)|(?<=www)\.|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""Characters that Markdown interprets in a line; `_` inside a word is literal."""
_USERINFO = re.compile(r"(?<=://)[^\s/?#\"'<>]*@")
"""User name and password of a URL, see RFC 3986, 3.2.1."""
_NAMED = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


def printable(value: str) -> str:
    """The text with control characters escaped, such as `\\x1b`; tabs and line breaks are kept."""
    return value if value.isascii() and value.isprintable() else _IN_A_TEXT.sub(_escaped, value)


def one_line(value: str) -> str:
    """The text as one line: like `printable`, and tabs and line breaks are escaped too."""
    return value if value.isascii() and value.isprintable() else _IN_A_LINE.sub(_escaped, value)


def beginning(value: str, most: int = 60) -> str:
    """The beginning of a text in quotation marks, as one line with single spaces."""
    words = one_line(" ".join(value[: 10 * most].split()))
    return f'"{words}"' if len(words) <= most else f'"{words[:most].rstrip()}…"'


def without_userinfo(value: str) -> str:
    """The text without the user names and passwords in its URLs."""
    return _USERINFO.sub("", value)


def is_printable_line(value: str) -> bool:
    """Whether `one_line` would leave the text unchanged."""
    return one_line(value) == value


def shell_word(value: str) -> str:
    """The text as one shell word, safe to paste; as `$'...'` if there is something to escape.

    bash, zsh and ksh support this form (POSIX.1-2024, 2.2.4).
    """
    if is_printable_line(value):
        return f'"{value}"' if "'" in value and not _IN_DOUBLE_QUOTES.search(value) else shlex.quote(value)
    quoted = "".join(
        f"\\{character}" if character in "\\'" else _IN_A_LINE.sub(_octal, character) for character in value
    )
    return f"$'{quoted}'"


def markdown(value: str) -> str:
    """The text escaped for a line of Markdown (https://spec.commonmark.org/0.31.2/#backslash-escapes)."""
    return _IN_MARKDOWN.sub(r"\\\g<0>", one_line(value))


def code_span(value: str) -> str:
    """The text as a code span of Markdown (https://spec.commonmark.org/0.31.2/#code-spans)."""
    code = one_line(value)
    fence, space = "`" * (_longest_backticks(code) + 1), " " if {code[:1], code[-1:]} & {"`", " "} else ""
    return f"{fence}{space}{code}{space}{fence}"


def code_block(value: str, language: str) -> str:
    """The text as a code block of Markdown, without a trailing line break."""
    fence = "`" * max(3, _longest_backticks(value) + 1)
    return f"{fence}{language}\n{value.rstrip()}\n{fence}"


def _longest_backticks(value: str) -> int:
    return max(map(len, re.findall("`+", value)), default=0)


def _escaped(match: re.Match[str]) -> str:
    number = ord(match[0])
    if match[0] in _NAMED:
        return _NAMED[match[0]]
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _octal(match: re.Match[str]) -> str:
    """The bytes of a character as octal escapes, which these shells read in any locale."""
    return "".join(f"\\{byte:03o}" for byte in match[0].encode("utf-8", "surrogateescape"))


def plural(number: int, what: str) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def listed(items: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """The first items, and the number of the others: `a, b, c, d, e, and 3 more`."""
    return separator.join([*items[:most], *([f"and {len(items) - most:,} more"] if items[most:] else [])])


def format_size(count: int) -> str:
    """A number of bytes in the unit that reads best: `3.2 GiB`, `1.8 MB`, `495.6 kB`."""
    if count >= 1 << 28:
        return f"{count / (1 << 30):.1f} GiB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def format_duration(seconds: float) -> str:
    """`42 s`, `1:05 min`, `2:03:04 h`."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if minutes >= 60:
        return f"{minutes // 60}:{minutes % 60:02}:{rest:02} h"
    return f"{minutes}:{rest:02} min" if minutes else f"{whole} s"


def align(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table with its first column left-aligned and all others right-aligned."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        cells = [
            f"{cell:<{width}}" if not column else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  " + "  ".join(cells).rstrip()


class Information(str):
    """A remark that asks nothing of the user; other remarks are warnings."""


class Detail(Information):
    """A remark that is shown only with all counts and reasons."""


def block(title: str, lines: Iterable[tuple[str, str]]) -> Iterator[str]:
    """A title, and `name  value` lines with aligned values, each safe to print."""
    rows = list(lines)
    width = max(len(name) for name, _ in rows)
    yield title
    yield from (one_line(f"  {name:<{width}}  {value}") for name, value in rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of an aligned table, each safe to print."""
    return map(one_line, align(header, rows))
