"""Repeated rows: within train, and in both train and validation."""

from pathlib import Path
from typing import Any

from conftest import write_rows

from loratune import data
from loratune.config import DataSection
from loratune.data import splits

SPACED = {"prompt": "a  3", "completion": "b"}
ROWS = [{"prompt": f"a {number}", "completion": "b"} for number in range(9)]


def read(train: Path, validation: Path | float | None = None) -> data.RawDatasets:
    value = str(validation) if isinstance(validation, Path) else validation
    return data.read_datasets(DataSection.model_validate({"train": str(train), "validation": value}), 0)


def test_duplicates_are_counted_and_located(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, ROWS[3], ROWS[3], SPACED, ROWS[0]])
    duplicates = splits.find_duplicates(read(path).train)
    assert (duplicates.count, duplicates.first) == (3, [f"{path}:{line}" for line in (10, 11, 13)])
    assert splits.find_duplicates(read(write_rows(path, ROWS)).train).count == 0


def test_same_text_split_differently_is_not_a_duplicate(tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "completion": "a b c".removeprefix(prompt).strip()} for prompt in ("a", "a b", "a b c")]
    assert splits.find_duplicates(read(write_rows(tmp_path / "rows.jsonl", rows)).train).count == 0


def test_conversations_with_different_tools_are_not_duplicates(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    rows: list[dict[str, Any]] = [{"messages": messages}, {"messages": messages, "tools": [tool]}]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, rows[0]])
    assert splits.find_duplicates(read(path).train).first == [f"{path}:3"]


def test_leaks_are_counted_exactly_and_with_folded_white_space(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", ROWS)
    others = [{"prompt": f"a {number}", "completion": "other"} for number in range(2)]
    folded = [{"prompt": " a\n\t5 ", "completion": "b "}]
    validation = write_rows(tmp_path / "validation.jsonl", [*others, *ROWS[:5], *folded])
    (leaks,) = data.find_leaks(read(train, validation))
    assert (leaks.exact.count, leaks.exact.first) == (5, [f"{validation}:{line}" for line in (3, 4, 5)])
    assert (leaks.folded.count, leaks.folded.first) == (1, [f"{validation}:8"])
    assert leaks.remarks() == [
        f"5 of the validation rows are also in train ({validation}:3, {validation}:4, {validation}:5, ...)",
        f"1 of the validation rows is also in train, apart from white space ({validation}:8)",
    ]
    assert data.find_leaks(read(train)) == []


def test_held_out_fraction_of_repeated_rows_has_no_leaks(tmp_path: Path) -> None:
    """`test_splits` has more of these tests."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS[:2] * 50)
    (leaks,) = data.find_leaks(read(path, 0.2))
    assert (leaks.exact.count, leaks.folded.count) == (0, 0)
    (leaks,) = data.find_leaks(read(write_rows(path, ROWS), 0.2))
    assert leaks.remarks() == []
