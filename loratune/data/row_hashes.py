"""Hashes of the rows that an adapter was trained on, kept in its directory, so that the rows of an evaluation can be
looked up among them later, without the rows themselves.

The file is of safetensors, with two sorted vectors of int64: `exact`, hashes of the content of rows, and `folded`,
those of the content with white space folded, if that differs. Both are hashes of the row index. A repeated row has one
hash, and most rows take 8 bytes. The metadata name the hash function: hashes of one function are never looked up among
those of another.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from loratune.data.report import Leaks
from loratune.data.row_index import CONTENT_HASH, EXACT, FOLDED
from loratune.data.splits import DatasetSplit, tally
from loratune.system.directories import ROW_HASHES

_log = logging.getLogger(__name__)

MOST_HASHES = 1 << 23
"""How many hashes are kept at most, in 64 MiB; where there are more, none are kept."""
_MOST_BYTES = 8 * MOST_HASHES + 4096
_METADATA = "loratune"


@dataclass(frozen=True, eq=False)
class RowHashes:
    """Hashes of rows, each once and sorted.

    Attributes:
        exact: (n,) int64: of the content of rows.
        folded: (m,) int64: of the content with white space folded, where it is not in `exact`.
        complete: Whether these are all rows that an adapter was trained on.
    """

    exact: NDArray[np.int64]
    folded: NDArray[np.int64]
    complete: bool


@dataclass(frozen=True)
class Overlap:
    """What the rows of an evaluation have in common with those that an adapter was trained on.

    Attributes:
        rows: How many rows the evaluation has.
        leaks: Those of them that are also in train; None where that is not known.
        unknown: What is not known, and why; empty if all is.
    """

    rows: int
    leaks: Leaks | None
    unknown: str

    @property
    def found(self) -> bool:
        """Whether rows are known to be in train."""
        return self.leaks is not None and self.leaks.exact.count + self.leaks.folded.count > 0

    def remarks(self) -> list[str]:
        """A line for each kind of rows in common."""
        return self.leaks.remarks() if self.leaks else []

    def as_json(self) -> dict[str, int] | None:
        """Plain values; None where it is not known."""
        if self.leaks is None:
            return None
        return {"exact": self.leaks.exact.count, "folded": self.leaks.folded.count, "rows": self.rows}


# Kept by training


def write(directory: Path, split: DatasetSplit, earlier: RowHashes | None, *, continued: bool) -> None:
    """Write the hashes of all rows that an adapter was trained on, unless they are more than `MOST_HASHES`.

    Args:
        directory: The adapter directory.
        split: The training rows.
        earlier: Those of the adapter that training started from; None where they are not known.
        continued: Whether training started from an adapter.

    Raises:
        OSError, SafetensorError: There is no room on the disk.
    """
    before = [(earlier.exact, earlier.folded)] if earlier else []
    exact, folded = (
        np.unique(np.concatenate([split.hashes(column), *(known[place] for known in before)]))
        for place, column in enumerate((EXACT, FOLDED))
    )
    folded = np.setdiff1d(folded, exact, assume_unique=True)
    if len(exact) + len(folded) > MOST_HASHES:
        return
    metadata = {"hash": CONTENT_HASH, "complete": earlier.complete if earlier else not continued}
    # One key of metadata alone: safetensors writes several in an order that differs between processes.
    save_file({"exact": exact, "folded": folded}, directory / ROW_HASHES, {_METADATA: json.dumps(metadata)})


# Looked up by an evaluation


def read(directory: Path) -> RowHashes | str:
    """The hashes that an adapter keeps; or why they are not known. At most 64 MiB are read."""
    path = directory / ROW_HASHES
    if not path.is_file():
        return "it keeps no hashes of them"
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("larger than any that is written")
        with safe_open(path, framework="np") as file:
            metadata: Any = json.loads((file.metadata() or {})[_METADATA])
            kept, complete = metadata["hash"], metadata["complete"] is True
            exact, folded = (file.get_tensor(name) for name in ("exact", "folded"))
        for hashes in (exact, folded):
            if hashes.dtype != np.int64 or hashes.ndim != 1 or not (hashes[1:] > hashes[:-1]).all():
                raise ValueError("no sorted vectors of int64")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        _log.debug("%s cannot be read", path, exc_info=True)
        return f"{ROW_HASHES} is damaged"
    return (
        RowHashes(exact, folded, complete)
        if kept == CONTENT_HASH
        else f"{ROW_HASHES} is of another release of loratune"
    )


def find_overlap(split: DatasetSplit, directory: Path) -> Overlap:
    """Look up the rows of an evaluation among those that an adapter was trained on.

    Args:
        split: The rows of the evaluation.
        directory: The adapter directory.
    """
    hashes = read(directory)
    if isinstance(hashes, str):
        return Overlap(len(split), None, f"whether evaluation rows are also in train is not known: {hashes}")
    columns = split.index.columns
    is_exact = np.isin(columns[:, EXACT], hashes.exact)
    is_folded = np.isin(columns[:, FOLDED], np.concatenate([hashes.exact, hashes.folded]))
    in_exact, in_folded = (tally(split, np.flatnonzero(rows)) for rows in (is_exact, is_folded & ~is_exact))
    leaks = Leaks(in_exact, in_folded, "evaluation")
    unknown = "" if hashes.complete else "rows of the adapter that training started from are not known"
    return Overlap(len(split), leaks, unknown)
