"""Rows that stand twice: within train, and in both train and validation."""

from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows

from loratune import data
from loratune.config import DataSection
from loratune.data import repeats

SPACED = {"prompt": "a  3", "completion": "b"}
ROWS = [{"prompt": f"a {number}", "completion": "b"} for number in range(9)]


def checked(train: Path, validation: Path | float | None = None, **section: Any) -> data.RawDatasets:
    held = str(validation) if isinstance(validation, Path) else validation
    return data.read_datasets(DataSection.model_validate({"train": str(train), "validation": held} | section), 0)


def test_duplicates(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, ROWS[3], ROWS[3], SPACED, ROWS[0]])
    found = repeats.duplicates(checked(path).train)
    assert (found.count, found.first) == (3, [f"{path}:{line}" for line in (10, 11, 13)])
    assert repeats.duplicates(checked(write_rows(path, ROWS)).train).count == 0


def test_which_text_is_where_counts(tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "completion": "a b c".removeprefix(prompt).strip()} for prompt in ("a", "a b", "a b c")]
    assert repeats.duplicates(checked(write_rows(tmp_path / "rows.jsonl", rows)).train).count == 0


def test_conversations_differ_by_their_tools(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    rows = [{"messages": turns}, {"messages": turns, "tools": [tool]}, {"messages": turns}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert repeats.duplicates(checked(path).train).first == [f"{path}:3"]


def test_shared(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", ROWS)
    others = [{"prompt": f"a {number}", "completion": "other"} for number in range(2)]
    folded = [{"prompt": " a\n\t5 ", "completion": "b "}]
    held = write_rows(tmp_path / "held.jsonl", [*others, *ROWS[:5], *folded])
    leaks = data.find_leaks(checked(train, held))
    assert leaks is not None
    assert (leaks.exact.count, leaks.exact.first) == (5, [f"{held}:{line}" for line in (3, 4, 5)])
    assert (leaks.folded.count, leaks.folded.first) == (1, [f"{held}:8"])
    assert leaks.remarks() == [
        f"5 of the validation rows also stand in train ({held}:3, {held}:4, {held}:5, ...)",
        f"1 of the validation rows also stands in train but for white space ({held}:8)",
    ]
    assert data.find_leaks(checked(train)) is None


def test_a_fraction_of_repeated_rows_leaks(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS[:2] * 50)
    leaks = data.find_leaks(checked(path, 0.2))
    assert leaks is not None and (leaks.exact.count, leaks.folded.count) == (20, 0)
    leaks = data.find_leaks(checked(write_rows(path, ROWS), 0.2))
    assert leaks is not None and leaks.remarks() == []


def test_in_groups_as_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few hashes are sorted at a time."""
    rows = [{"prompt": f"{number % 37}", "completion": "b"} for number in range(100)]
    train = write_rows(tmp_path / "train.jsonl", rows)
    held = write_rows(tmp_path / "held.jsonl", [{"prompt": f"{number}", "completion": "b"} for number in range(30, 50)])
    found = checked(train, held)
    at_once = repeats.duplicates(found.train), data.find_leaks(found)
    assert at_once[0].count == 63
    assert at_once[1] is not None and at_once[1].exact.count == 7
    monkeypatch.setattr(repeats, "_AT_ONCE", 7)
    assert (repeats.duplicates(found.train), data.find_leaks(found)) == at_once
