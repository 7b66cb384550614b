"""Text of strangers, made harmless: for a terminal, for one line of a log, and for a shell into which it is pasted.

Escape sequences in data, file names or a model's answer could otherwise set a terminal's title, write to its clipboard
(OSC 52) or clear the screen, and marks of direction show text in another order than it has.
"""

import re
import shlex

_SPECIAL = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, C0 and C1, but for tabs and line breaks
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f"  # line separators and marks of direction, as of Unicode's TR 36
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # halves of characters, and what shows as nothing
)
_OF_A_LINE = re.compile(f"[\t\n{_SPECIAL}]")
_OF_A_TEXT = re.compile(f"[{_SPECIAL}]")
_NAMED = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


def text(of: str) -> str:
    """The text with `\\x1b` and the like in place of what a terminal would obey; tabs and line breaks stay."""
    return of if of.isascii() and of.isprintable() else _OF_A_TEXT.sub(_escaped, of)


def line(of: str) -> str:
    """The text as one line: as `text`, and tabs and line breaks are escaped too."""
    return of if of.isascii() and of.isprintable() else _OF_A_LINE.sub(_escaped, of)


def is_plain(of: str) -> bool:
    """Whether nothing of it would be escaped in one line."""
    return line(of) == of


def shell(of: str) -> str:
    """The text as one word of a shell, safe to be pasted: `$'...'` where there is something to escape.

    bash, zsh and ksh read that (POSIX.1-2024, 2.2.4).
    """
    if is_plain(of):
        return shlex.quote(of)
    quoted = "".join(f"\\{letter}" if letter in "\\'" else _OF_A_LINE.sub(_octal, letter) for letter in of)
    return f"$'{quoted}'"


def _escaped(found: re.Match[str]) -> str:
    letter = found[0]
    number = ord(letter)
    if letter in _NAMED:
        return _NAMED[letter]
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _octal(found: re.Match[str]) -> str:
    """The bytes of a letter, which every such shell reads in whatever locale."""
    return "".join(f"\\{byte:03o}" for byte in found[0].encode("utf-8", "surrogateescape"))
