"""Many processes at one cache of tokenized rows: `python rows_at_once.py CACHE SECONDS`. Torch is not imported.

A round is twelve forked processes: nine want the same new rows, three times each, while three say that these are old
and have old ones removed. Prints how many rounds there were, and how many processes found other rows or failed.
"""

import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from datasets import config

from loratune.data import token_cache
from loratune.data.rendering.spans import TokenizedRow
from loratune.data.report import Report
from loratune.data.token_cache import TokenCache, TokenCacheWriter

COUNT = 12
OLD = time.time() - (token_cache.ROWS.days + 1) * 86400


def key(number: int) -> str:
    """A key of the form that the program makes."""
    return f"{number:064x}"


def fill(writer: TokenCacheWriter) -> None:
    """Twelve rows; the first token of each is its number."""
    for number in range(writer.read, COUNT):
        writer.add(Report(rows=1, tokens=3), [TokenizedRow(f"row {number}", (number, 1, 2), ((1, 3),))])


def whole(rows: TokenCache) -> bool:
    """Whether these are all of them, and the report says so."""
    return [row.ids[0] for row in rows.rows()] == list(range(COUNT)) and rows.report.rows == COUNT


def take_part(cache: Path, number: int, role: int) -> int:
    """What one process does. Returns its exit code."""
    for _ in range(3):
        if role % 4 == 3:
            with suppress(FileNotFoundError):
                os.utime(cache / "loratune" / key(number), (OLD, OLD))
            token_cache.ROWS.remove_old()
        elif not whole(token_cache.load_or_write(key(number), fill)):
            print("other rows than there are", file=sys.stderr)
            return 1
    return 0


def started(cache: Path, number: int, role: int, gate: int) -> int:
    """Fork a process that begins at a byte from the gate. Returns its process id."""
    if child := os.fork():
        return child
    code = 1
    try:
        os.read(gate, 1)
        code = take_part(cache, number, role)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(cache: Path, rounds: int) -> None:
    """So many rounds."""
    config.HF_DATASETS_CACHE, token_cache._SHARD_ROWS = str(cache), 4
    failed = 0
    for number in range(1, rounds + 1):
        there, gate = os.pipe()
        children = [started(cache, number, role, there) for role in range(12)]
        os.close(there)
        os.write(gate, bytes(12))
        os.close(gate)
        failed += sum(os.waitpid(child, 0)[1] != 0 for child in children)
    print(rounds, failed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
