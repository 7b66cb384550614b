"""`data.invalid_rows: drop`: unusable rows are left out, counted and listed. With the default they stop the run."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CHAT_TEMPLATE, ROWS, Ran, byte_tokenizer, check_refused, meanings, write_rows
from running import stopped

from loratune import data
from loratune.codes import Code
from loratune.config import DataSection
from loratune.data import TokenizedDataset
from loratune.data.rendering import Renderer
from loratune.errors import DataError

Cli = Callable[..., Ran]
PAIR = b'{"prompt": "a", "completion": "b"}\n'
UNREADABLE = b'{"a": 1, "a": 2}'
"""A value by which rows cannot be grouped."""
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT_TEMPLATE


def section(path: Path, **changes: Any) -> DataSection:
    values = {"train": str(path), "max_dropped": 0.8, "invalid_rows": "drop"}
    return DataSection.model_validate(values | changes)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    """A renderer whose template refuses system messages."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = REFUSING
    return Renderer(tokenizer)


def prepared(renderer: Renderer, of: DataSection, split: str = "train") -> TokenizedDataset:
    return data.prepare(data.read_datasets(of, 0).splits[split], renderer, of, 264)


def chat(*roles: str) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": "x"} for role in roles]}).encode() + b"\n"


INVALID: dict[str, tuple[str, bytes, list[tuple[str, Code]]]] = {
    "JSON": (
        "rows.jsonl",
        b"{]\n" + PAIR + b'\n{"prompt": "a\n' + PAIR + b'{"a": 1, "a": 2}\n' + b"[" * 10_000,
        [(":1", Code.DATA_SYNTAX), (":4", Code.DATA_SYNTAX), (":6", Code.DATA_SYNTAX),
         (":7", Code.DATA_SYNTAX)],
    ),
    "fields": (
        "rows.jsonl",
        PAIR + b'[]\n{"a": 1}\n{"prompt": 3, "completion": "b"}\n{"prompt": "\\ud800", "completion": "b"}\n' + PAIR * 3,
        [(":2", Code.DATA_SYNTAX), (":3", Code.DATA_FIELD), (":4", Code.DATA_FIELD),
         (":5", Code.DATA_FIELD)],
    ),
    "bytes": ("rows.jsonl.gz", gzip.compress(PAIR + PAIR.replace(b"a", b"\xe9") + PAIR), [(":2", Code.DATA_SYNTAX)]),
    "messages": (
        "rows.jsonl",
        chat("system", "user", "assistant") + chat("user", "assistant") + chat("boss", "assistant") + chat("user"),
        [(":3", Code.DATA_FIELD), (":4", Code.DATA_FIELD), (":1", Code.TEMPLATE_INVALID)],
    ),
    "ids": (
        "rows.jsonl",
        b'{"input_ids": [1, 999]}\n{"input_ids": [1, 2]}\n{"input_ids": "x"}\n',
        [(":3", Code.DATA_FIELD), (":1", Code.DATA_FIELD)],
    ),
    "cells": ("rows.csv", b"prompt,completion\na,b\nc\n\na,b\n", [(":3", Code.DATA_SYNTAX)]),
    "quotes": ("rows.csv", b'prompt,completion\n"a"b,c\n"a\n\n",b\n', [(":2", Code.DATA_SYNTAX)]),
    "bytes of a record": ("rows.csv", b'prompt,completion\n"a\n\xe9\n",c\na,b\n', [(":3", Code.DATA_SYNTAX)]),
    "list": (
        "rows.json",
        b'[{"text": "a"}, 3, {"text": "b"}, {}]',
        [(":row 2", Code.DATA_SYNTAX), (":row 4", Code.DATA_FIELD)],
    ),
    "text": ("rows.txt", b"a\n\xff\nb\n", [(":2", Code.DATA_SYNTAX)]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "expected"), INVALID.values(), ids=INVALID)
def test_invalid_rows_are_dropped_counted_and_listed(
    tmp_path: Path, renderer: Renderer, name: str, content: bytes, expected: list[tuple[str, Code]]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    dataset = prepared(renderer, section(path))
    report, places = dataset.report, [f"{path}{place}" for place, _ in expected]
    assert [line.split(": ")[0] for line in report.invalid.first] == places
    assert {reason.rpartition(" ")[2] for reason in report.dropped} == {f"[{code}]" for _, code in expected}
    assert report.invalid.count == report.dropped_rows == len(expected)
    assert report.rows == len(dataset.rows) + len(expected)
    assert not {row.where for row in dataset.rows.rows()}.intersection(places)
    assert prepared(renderer, section(path)).report == report, "the rows come out of the cache"
    with pytest.raises(DataError) as caught:
        prepared(renderer, section(path, invalid_rows="error"))
    assert {(code, f"{path}{place}", key) for place, code in expected for key in ("", "data.chat_template")}.issuperset(
        meanings(caught.value)
    )


def test_invalid_rows_of_a_table_are_listed(tmp_path: Path, renderer: Renderer) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a", None, "b"]}), path)
    assert prepared(renderer, section(path)).report.invalid.first == [f"{path}:row 2: `text` must be text, got null"]


STAYS: dict[str, tuple[str, bytes, dict[str, Any], Code]] = {
    "a document that is cut off": ("rows.json", b"[" + PAIR + b"," + PAIR, {}, Code.DATA_SYNTAX),
    "a document in Latin-1": ("rows.json", b'[{"text": "a"}, {"text": "\xe9"}]', {}, Code.DATA_SYNTAX),
    "no gzip": ("rows.jsonl.gz", PAIR, {}, Code.DATA_UNREADABLE),
    "quotes over lines": ("rows.csv", b'text\na\nb\n"c\nd\n', {}, Code.DATA_SYNTAX),
    "a header": ("rows.csv", b"\xe9,b\na,b\n", {}, Code.DATA_SYNTAX),
    "nothing left": ("rows.jsonl", b"{]\n[]\n", {"max_dropped": 1.0}, Code.DATA_EMPTY),
    "no format": ("rows.jsonl", b'{"a": 1}\n' + PAIR, {}, Code.DATA_FORMAT),
    "too long": ("rows.txt", b"a\nbcdefg\n\xff", {"truncation": "error", "max_length": 4}, Code.DATA_TOO_LONG),
    "too many": ("rows.jsonl", PAIR * 7 + b"{]\n" * 3, {"max_dropped": 0.29}, Code.DATA_TOO_MANY_DROPPED),
}


@pytest.mark.parametrize(("name", "content", "changes", "code"), STAYS.values(), ids=STAYS)
def test_errors_that_are_not_dropped(
    tmp_path: Path, renderer: Renderer, name: str, content: bytes, changes: dict[str, Any], code: Code
) -> None:
    """Errors that do not belong to a single row, and more invalid rows than may be dropped."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        prepared(renderer, section(tmp_path / name, **changes))
    assert [problem.code for problem in caught.value.problems] == [code]
    assert code != Code.DATA_EMPTY or "2 rows dropped: " in str(caught.value)


def test_ten_rows_are_listed_and_the_others_counted(tmp_path: Path, renderer: Renderer) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(b"a\n" * 20 + b"\xff\n" * 12)
    lines = prepared(renderer, section(path)).report.remarks(1024)
    assert sum(line.startswith(f"dropped: {path}:") for line in lines) == 10
    assert "dropped: 2 more invalid rows" in lines
    assert any(line.startswith("12 rows dropped: ") and f" [data.syntax] ({path}:21, " in line for line in lines)


# The remaining rows equal those of files without the invalid ones


def mixed(tmp_path: Path, more: bytes = b"") -> tuple[Path, Path]:
    """Two files with the same rows; the second has invalid rows between them. more: another line of it."""
    good = write_rows(tmp_path / "good.jsonl", [row | {"topic": number // 2} for number, row in enumerate(ROWS)])
    lines = good.read_bytes().splitlines(keepends=True)
    lines[30:30] = [more, b"{]\n"]
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b"{]\n" + b"".join(lines) + b'{"prompt": 3}\n')
    return good, bad


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"validation": 0.25, "group_by": "topic"},
        {"train": [("good", 1.0), ("bad", 0.5)]},
        {"truncation": "drop", "max_length": 16},
    ],
)
def test_the_remaining_rows_equal_those_of_a_clean_file(
    tmp_path: Path, renderer: Renderer, changes: dict[str, Any]
) -> None:
    good, bad = mixed(
        tmp_path, b'{"prompt": "a", "completion": "b", "topic": %s}\n' % UNREADABLE if "group_by" in changes else b""
    )

    def fingerprints(path: Path) -> list[str]:
        named = {"good": good, "bad": path}
        sources = {"train": [{"path": str(named[name]), "weight": w} for name, w in changes.get("train", ())]}
        of = section(path, **changes | (sources if sources["train"] else {}))
        splits = data.read_datasets(of, 0).splits
        tokenized = [data.prepare(split, renderer, of, 264) for split in splits.values()]
        dropped = 0 if path is good else 3 + ("group_by" in changes)
        assert [dataset.report.invalid.count for dataset in tokenized] == [dropped, 0][: len(tokenized)]
        return [dataset.fingerprint for dataset in tokenized]

    assert fingerprints(good) == fingerprints(bad)


def test_the_cache_distinguishes_which_rows_were_dropped(tmp_path: Path, renderer: Renderer) -> None:
    """The number of dropped rows is the same in both."""
    path = write_rows(tmp_path / "rows.jsonl", [row | {"one": n, "two": n} for n, row in enumerate(ROWS)])
    path.write_bytes(
        path.read_bytes()
        .replace(b'"one": 0,', b'"one": %s,' % UNREADABLE)
        .replace(b'"two": 1}', b'"two": %s}' % UNREADABLE)
    )
    first, second = (prepared(renderer, section(path, validation=0.3, group_by=field)) for field in ("one", "two"))
    assert {row.where for row in first.rows.rows()} != {row.where for row in second.rows.rows()}


def test_dropped_rows_in_training_resuming_and_evaluation(
    cli: Cli, run_config: Callable[..., Path], tmp_path: Path
) -> None:
    """A resumed run has the same rows as before; the record and the evaluation report the dropped ones."""
    _, bad = mixed(tmp_path)
    config = run_config(data={"train": str(bad), "invalid_rows": "drop"}, training={"save_steps": 1})
    problems = {1: Code.DATA_SYNTAX, 32: Code.DATA_SYNTAX, 43: Code.DATA_FIELD}
    ran = cli("train", config, "--dry-run", "--set", "data.invalid_rows=error")
    check_refused(ran, 4, *[(code, f"{bad}:{line}", "") for line, code in problems.items()])
    assert stopped(cli, tmp_path / "out.partial", "train", config, number=1).code == 130
    ran = cli("train", config, "--resume")
    assert ran.code == 0 and "resuming from step" in ran.err
    split = json.loads((tmp_path / "out" / "loratune.json").read_text())["splits"]["train"]
    assert (split["rows"], split["dropped"], sorted(split["reasons"].values())) == (43, 3, [1, 2])
    evaluate = ("evaluate", "--adapter", tmp_path / "out", "--data", bad)
    ran = cli(*evaluate)
    assert ran.code == 0 and f"dropped: {bad}:32: " in ran.out + ran.err
    ran = cli(*evaluate, "--set", "data.max_dropped=0.01")
    check_refused(ran, 4, (Code.DATA_TOO_MANY_DROPPED, str(bad), "data.max_dropped"))
