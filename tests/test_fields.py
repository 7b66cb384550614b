"""Field values that are not text: dates, decimals, bytes, lone surrogates, in fields that are used or unused."""

import datetime
import decimal
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Ran, meanings, write_rows
from running import MakeConfig

from loratune import data
from loratune.codes import Code
from loratune.config import DataSection
from loratune.errors import DataError

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5)
FAR = pa.array([0, 2**60], pa.timestamp("ms"))  # Python has no such year
BYTES = [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
COLUMNS = {
    "timestamp": pa.array([NOW, NOW]),
    "date": pa.array([NOW.date()] * 2),
    "time": pa.array([NOW.time()] * 2),
    "duration": pa.array([datetime.timedelta(days=1)] * 2),
    "decimal": pa.array([decimal.Decimal("1.20")] * 2),
    "bytes": pa.array([b"a", b"\xff"]),
    "far": FAR,
    "not UTF-8": pa.Array.from_buffers(pa.string(), 2, BYTES),
    "nested": pa.array([{"at": [NOW], "raw": b"x"}] * 2),
}
JSON = {
    "a lone surrogate": r'"\ud800"',
    "a key with one": r'{"\ud800": 1}',
    "NaN": "[NaN, Infinity, -Infinity]",
    "deep": "[" * 900 + "]" * 900,
}


def count(path: Path) -> int:
    """The number of accepted rows. Raises DataError."""
    part = data.read_datasets(DataSection.model_validate({"train": str(path)}), 0).train
    assert part.remarks() and part.digest
    return len(list(part.examples()))


@pytest.mark.parametrize("name", COLUMNS)
def test_non_text_columns_of_tables(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": ["c", "d"], "x": COLUMNS[name]}), path)
    assert count(path) == 2
    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": COLUMNS[name]}), path)
    with pytest.raises(DataError) as caught:
        count(path)
    assert (Code.DATA_FIELD, f"{path}:row 2", "") in meanings(caught.value)


@pytest.mark.parametrize("ending", ["jsonl", "json"])
@pytest.mark.parametrize("name", JSON)
def test_non_text_fields_of_json(name: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{ending}"
    where = f"{path}:2" if ending == "jsonl" else f"{path}:row 2"

    def write(second: str) -> None:
        lines = ['{"prompt": "a", "completion": "b"}', second]
        path.write_text("\n".join(lines) if ending == "jsonl" else f"[{', '.join(lines)}]")

    write(f'{{"prompt": "a", "completion": "b", "x": {JSON[name]}}}')
    assert count(path) == 2
    write(f'{{"prompt": "a", "completion": {JSON[name]}}}')
    with pytest.raises(DataError) as caught:
        count(path)
    ((code, place, _),) = meanings(caught.value)
    assert code == Code.DATA_FIELD and place == where
    assert caught.value.problems[0].what.startswith("`completion` ")


@pytest.mark.parametrize("tools", ['[{"name": "f", "parameters": %s}]', r'[{"name": "\ud800"}]'])
def test_tools_that_cannot_be_rendered_are_refused(tools: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    messages = '{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}'
    deep = "[" * 900 + "]" * 900
    path.write_text(f'{{"messages": [{messages}], "tools": {tools.replace("%s", deep)}}}')
    with pytest.raises(DataError) as caught:
        count(path)
    ((code, place, _),) = meanings(caught.value)
    assert code == Code.DATA_FIELD and place == f"{path}:1"


def test_rows_with_unused_non_text_fields_are_trained_on_and_answered(
    run_config: MakeConfig, tmp_path: Path, cli: Callable[..., Ran]
) -> None:
    """The cache of rows and the output file keep the values that they can represent."""
    path = tmp_path / "odd.parquet"
    columns: dict[str, Any] = {"prompt": ["a", "b"], "completion": ["c", "d"], **COLUMNS}
    pq.write_table(pa.table(columns), path)
    done = cli("train", run_config(data={"train": str(path)}, training={"max_steps": 1}))
    assert done.code == 0, done.err
    answers = tmp_path / "answers.jsonl"
    command = ("generate", "--adapter", tmp_path / "out", "--max-new-tokens", 2, "--output", answers, "--input")
    done = cli(*command, path)
    assert done.code == 0, done.err
    first, second = map(json.loads, answers.read_text(encoding="utf-8").splitlines())
    assert (first["timestamp"], first["date"], first["decimal"]) == ("2026-01-02T03:04:05", "2026-01-02", "1.20")
    assert (second["bytes"], second["far"], second["nested"]) == ("/w==", None, {"at": [NOW.isoformat()], "raw": "x"})
    surrogate = tmp_path / "surrogate.jsonl"
    surrogate.write_text(r'{"prompt": "a", "x": "\ud800"}')
    answers.unlink()
    done = cli(*command, surrogate)
    assert done.code == 0, done.err
    assert json.loads(answers.read_text())["x"] == "\ud800"


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_number_with_too_many_digits_is_reported(ending: str, tmp_path: Path) -> None:
    """Without advice about the Python interpreter."""
    rows = ['{"prompt": "a", "completion": "b"}', '{"prompt": "a", "completion": ' + "1" * 5000 + "}"]
    path = tmp_path / f"rows.{ending}"
    path.write_text("\n".join(rows) if ending == "jsonl" else f"[{','.join(rows)}]")
    with pytest.raises(DataError) as caught:
        count(path)
    assert "the JSON has a number of too many digits" in str(caught.value) and "set_int_max" not in str(caught.value)


@pytest.mark.parametrize(
    ("pairs", "remarked"),
    [
        ([("Is it late?", "yes")] * 8 + [("The bill of July", "billing")], True),
        ([("Is it late?", "yes")] * 10, False),
        ([("Is it late? ", "yes")] * 10, False),
        ([("The bill of July", "billing"), *[("Is it late?", " yes")] * 2], False),
        ([("七月の請求書", "請求")] * 10, False),
    ],
)
def test_prompts_and_answers_that_run_together(pairs: list[tuple[str, str]], remarked: bool, tmp_path: Path) -> None:
    """Most prompts end with a full stop or question mark, and one in nine with a word that runs into the answer."""
    write_rows(tmp_path / "rows.jsonl", [{"prompt": one, "completion": other} for one, other in pairs])
    part = data.read_datasets(DataSection.model_validate({"train": str(tmp_path / "rows.jsonl")}), 0).train
    assert any("no space between prompt and answer" in line for line in part.remarks()) == remarked
