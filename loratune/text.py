"""Formats numbers, blocks and tables for people."""

from collections.abc import Iterable, Iterator, Sequence

from loratune import escaping


def plural(number: int, what: str) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def format_size(count: int) -> str:
    """A number of bytes in the unit that reads best: `1,843,200 bytes (1.8 MB)`, `3.2 GiB`."""
    if count >= 1 << 28:
        return f"{count / (1 << 30):.1f} GiB"
    return f"{count:,} bytes ({f'{count / 1e6:.1f} MB' if count >= 1e6 else f'{count / 1e3:.1f} kB'})"


def short_size(count: int) -> str:
    """`3.2 GiB`, or `220.1 MB`: without the exact number of bytes."""
    return format_size(count).partition("(")[2].rstrip(")") or format_size(count)


def format_duration(seconds: float) -> str:
    """`42 s`, `1:05 min`, `2:03:04 h`."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if minutes >= 60:
        return f"{minutes // 60}:{minutes % 60:02}:{rest:02} h"
    return f"{minutes}:{rest:02} min" if minutes else f"{whole} s"


def align(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table whose first column is aligned to the left and all others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        cells = [
            f"{cell:<{width}}" if not column else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  " + "  ".join(cells).rstrip()


def block(title: str, lines: Iterable[tuple[str, str]]) -> Iterator[str]:
    """A title, and `name  value` lines with the values aligned, each safe to print."""
    rows = list(lines)
    width = max(len(name) for name, _ in rows)
    yield title
    yield from (escaping.line(f"  {name:<{width}}  {value}") for name, value in rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of an aligned table, each safe to print."""
    return map(escaping.line, align(header, rows))
