"""The hashes of training rows in an adapter, and how `evaluate` uses them to detect leakage."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_rows
from safetensors.numpy import load_file, save_file

from loratune import data
from loratune.config import DataSection, Source
from loratune.data import splits
from loratune.data.row_keys import CONTENT_HASH
from loratune.data.splits import Overlap, RowHashes
from loratune.errors import DataError
from loratune.system.directories import ROW_HASHES

SPACED = {"prompt": "a  3", "completion": "b"}
ROWS = [{"prompt": f"a {number}", "completion": "b"} for number in range(9)]


def by_hand(*texts: str) -> int:
    """A reference hash. If tests of these values fail, increase the version in `CONTENT_HASH`."""
    content = "\ud800".join(texts).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


EXACT = sorted(by_hand(row["prompt"], row["completion"]) for row in [*ROWS, SPACED])


def keep(directory: Path, rows: list[dict[str, Any]], **section: Any) -> Path:
    """Write the row hashes into a directory."""
    values = {"train": str(write_rows(directory / "rows.jsonl", rows)), **section}
    read = data.read_datasets(DataSection.model_validate(values), 0)
    splits.write_row_hashes(directory, read, None, continued=False)
    return directory


def look_up(path: Path, directory: Path, **section: Any) -> Overlap:
    read = DataSection.model_validate({"train": "unknown", **section})
    return splits.find_overlap(data.read_source(Source(path=str(path)), read), directory)


def test_stored_hashes_match_a_reference(tmp_path: Path) -> None:
    keep(tmp_path, [*ROWS, SPACED, ROWS[2]])
    kept = load_file(tmp_path / ROW_HASHES)
    assert kept["exact"].tolist() == EXACT
    assert kept["folded"].tolist() == []  # SPACED, folded, equals another row
    keep(tmp_path, [SPACED, ROWS[0]])
    assert load_file(tmp_path / ROW_HASHES)["folded"].tolist() == [by_hand("a 3", "b")]
    assert by_hand("a 3", "b") == -6689142993834507418


def test_validation_rows_are_apart(tmp_path: Path) -> None:
    """They are no overlap, but rows that the run has read."""
    keep(tmp_path, ROWS, validation=0.3)
    kept = load_file(tmp_path / ROW_HASHES)
    assert len(kept["exact"]) == 6 and sorted([*kept["exact"], *kept["validation"]]) == [n for n in EXACT if n in {
        by_hand(row["prompt"], row["completion"]) for row in ROWS}]  # fmt: skip
    overlap = look_up(tmp_path / "rows.jsonl", tmp_path)
    assert overlap.to_dict() == {"exact": 6, "folded": 0, "rows": 9}
    read = DataSection.model_validate({"train": "unknown"})

    def check(rows: list[dict[str, str]]) -> None:
        path = write_rows(tmp_path / "others.jsonl", rows)
        splits.check_unseen(data.read_source(Source(path=str(path)), read), tmp_path)

    check([{"prompt": "other", "completion": "b"}])
    for row in (*ROWS, {"prompt": "a   4", "completion": "b"}):
        with pytest.raises(DataError, match="1 of 1 rows are"):
            check([row])
    save_file(INT64, tmp_path / ROW_HASHES, metadata())  # of an earlier release
    with pytest.raises(DataError, match="not known"):
        check([{"prompt": "other", "completion": "b"}])


def test_hashes_do_not_depend_on_the_file_format(tmp_path: Path) -> None:
    """Only the content of a row matters."""
    keep(tmp_path, [*ROWS[:5], SPACED])
    path = tmp_path / "held-out.csv"
    path.write_text('answer,question\nb,a 1\n"b ",a 2\nb,a 3\nb,a 8\nc,a 1\n')
    overlap = look_up(path, tmp_path, columns={"prompt": "question", "completion": "answer"})
    assert overlap.found and overlap.to_dict() == {"exact": 2, "folded": 1, "rows": 5}
    assert overlap.remarks() == [
        f"2 of the evaluation rows are also in train ({path}:2, {path}:4)",
        f"1 of the evaluation rows is also in train, apart from white space ({path}:3)",
    ]
    chats = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]
    keep(tmp_path, chats)
    expected = [by_hand("", "user", one["instruction"], "assistant", one["output"]) for one in chats]
    assert load_file(tmp_path / ROW_HASHES)["exact"].tolist() == sorted(expected)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_rows(tmp_path / "held-out.jsonl", [{"messages": turns}])
    assert look_up(path, tmp_path).to_dict() == {"exact": 1, "folded": 0, "rows": 1}


def metadata(**changes: Any) -> dict[str, str]:
    return {"loratune": json.dumps({"hash": CONTENT_HASH, "complete": True} | changes)}


INT64 = {name: np.arange(3) for name in ("exact", "folded")}
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "absent": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "a pickle": lambda path: path.write_bytes(pickle.dumps([1, 2])),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "huge": lambda path: path.open("r+b").truncate(1 << 40),
    "a huge header": lambda path: path.write_bytes(b"\xff" * 7 + b"\0" + b"{}" * 50),
    "no metadata": lambda path: save_file(INT64, path),
    "other metadata": lambda path: save_file(INT64, path, {"loratune": "[" * 100_000}),
    "validation of floats": lambda path: save_file(INT64 | {"validation": np.arange(2.0)}, path, metadata()),
    "a tensor less": lambda path: save_file({"exact": np.arange(3)}, path, metadata()),
    "floats": lambda path: save_file(INT64 | {"exact": np.arange(3.0)}, path, metadata()),
    "a matrix": lambda path: save_file(INT64 | {"folded": np.zeros((2, 2), int)}, path, metadata()),
    "not sorted": lambda path: save_file(INT64 | {"exact": np.arange(3)[::-1].copy()}, path, metadata()),
    "another hash": lambda path: save_file(INT64, path, metadata(hash="sha3")),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_unreadable_hashes_make_the_overlap_unknown(name: str, tmp_path: Path) -> None:
    """They are never treated as no overlap."""
    keep(tmp_path, ROWS)
    DAMAGES[name](tmp_path / ROW_HASHES)
    overlap = look_up(tmp_path / "rows.jsonl", tmp_path)
    assert (overlap.leaks, overlap.found, overlap.to_dict(), overlap.remarks()) == (None, False, None, [])
    assert overlap.unknown


def test_no_hashes_are_stored_for_too_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "MOST_HASHES", 8)
    assert not (keep(tmp_path, ROWS) / ROW_HASHES).exists()
    assert (keep(tmp_path, ROWS[1:]) / ROW_HASHES).exists()
    spaced = [{"prompt": f"a  {number}", "completion": "b"} for number in range(5)]
    (tmp_path / ROW_HASHES).unlink()
    assert not (keep(tmp_path, spaced) / ROW_HASHES).exists()  # two hashes per row


def test_hashes_include_rows_of_the_earlier_adapter(tmp_path: Path) -> None:
    for name, rows in (("first", [SPACED, ROWS[0]]), ("second", ROWS[:4])):
        (tmp_path / name).mkdir()
        keep(tmp_path / name, rows)
    first = splits.read_row_hashes(tmp_path / "first")
    assert isinstance(first, RowHashes)
    values = {"train": str(tmp_path / "second" / "rows.jsonl")}
    train = data.read_datasets(DataSection.model_validate(values), 0)
    for earlier, is_complete in ((first, True), (None, False)):
        splits.write_row_hashes(tmp_path, train, earlier, continued=True)
        overlap = look_up(tmp_path / "first" / "rows.jsonl", tmp_path)
        assert (overlap.unknown == "") is is_complete
        # only the first has the row with spaces; folded, it is a row of the second
        assert overlap.to_dict() == {"exact": 1 + is_complete, "folded": 1 - is_complete, "rows": 2}
