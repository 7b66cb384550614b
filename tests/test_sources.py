"""Files, directories and hub ids → rows: what is accepted, and what is refused with the line it stands in."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import Ran, tree, write_rows
from datasets.arrow_writer import ArrowWriter

from loratune import data
from loratune.config import DataSection
from loratune.data import Examples
from loratune.data.formats import Conversation, Plain
from loratune.errors import DataError

PAIR = b'{"prompt": "a", "completion": "b"}'
USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def read(path: Path | str, split: str | None = None, seed: int = 0, **section: Any) -> Examples:
    source = {"path": str(path), "split": split}
    return data.read(DataSection.model_validate({"train": source} | section), seed)


def problems(path: Path | str, **section: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        read(path, **section)
    return [str(problem) for problem in caught.value.problems]


def texts(examples: Examples) -> list[tuple[str, str]]:
    assert all(isinstance(example, Plain) for example in examples.train)
    return [(example.prompt, example.completion) for example in examples.train]  # type: ignore[union-attr]


def lines(examples: Examples) -> list[str]:
    return [Path(example.where).name for example in examples.train]


ACCEPTED = {
    "plain": ("rows.jsonl", PAIR + b"\n" + PAIR + b"\n", [1, 2]),
    "no newline at the end": ("rows.jsonl", PAIR + b"\n" + PAIR, [1, 2]),
    "BOM, CRLF, blank lines": ("rows.jsonl", b"\xef\xbb\xbf" + PAIR + b"\r\n\r\n  \n" + PAIR + b"\r\n", [1, 4]),
    "upper-case ending": ("ROWS.JSONL", PAIR, [1]),
    "JSON lines called json": ("rows.json", PAIR + b"\n\n" + PAIR, [1, 3]),
    "list": ("rows.json", b"[" + PAIR + b",\n" + PAIR + b"]", ["row 1", "row 2"]),
    "list under data": ("rows.json", b'{"data": [' + PAIR + b"]}", ["row 1"]),
    "one object": ("rows.json", b'{\n"prompt": "a",\n"completion": "b"}', ["row 1"]),
    "csv": ("rows.csv", b"\xef\xbb\xbfcompletion,prompt\r\nb,a\r\n\r\nb,a\r\n", [2, 4]),
}


@pytest.mark.parametrize(("name", "content", "places"), ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(tmp_path: Path, name: str, content: bytes, places: list[int | str]) -> None:
    (tmp_path / name).write_bytes(content)
    examples = read(tmp_path / name)
    assert texts(examples) == [("a", "b")] * len(places)
    assert lines(examples) == [f"{name}:{place}" for place in places]


def test_csv_lines_count_the_newlines_in_quotes(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,completion\n"a\nb, ""c""\n",d\ne,f\n')
    examples = read(path)
    assert texts(examples) == [('a\nb, "c"\n', "d"), ("e", "f")]
    assert lines(examples) == ["rows.csv:2", "rows.csv:5"]


def test_txt_is_one_text_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("  one\n\ntwo\x00\n")
    examples = read(path)
    assert texts(examples) == [("", "  one"), ("", "two\x00")]
    assert (lines(examples), examples.format) == (["rows.txt:1", "rows.txt:3"], "text")


REFUSED = {
    "empty": ("rows.jsonl", b"", [": 0 rows"]),
    "blank": ("rows.jsonl", b"\n  \n", [": 0 rows"]),
    "empty list": ("rows.json", b"[]", [": 0 rows"]),
    "header only": ("rows.csv", b"prompt,completion\n", [": 0 rows"]),
    "bad JSON": ("rows.jsonl", PAIR + b"\n{'a': 1}\n" + PAIR + b"\n{]\n", [":2: not valid JSON", ":4: not valid JSON"]),
    "trailing comma": ("rows.jsonl", b'{"a": "b",}', [":1: not valid JSON: Expecting property name"]),
    "at most ten": ("rows.jsonl", b"{]\n" * 12, [f":{line}: not valid JSON" for line in range(1, 11)]),
    "too many digits": ("rows.jsonl", b'{"prompt": ' + b"1" * 5000 + b"}", [":1: not valid JSON"]),
    "too deep": ("rows.jsonl", b"[" * 100_000, [":1: not valid JSON: nested too deeply"]),
    "cut off in text": ("rows.jsonl", PAIR + b"\n" + PAIR[:-4], [":2: not valid JSON: cut off"]),
    "cut off after text": ("rows.jsonl", PAIR + b"\n" + PAIR[:-1], [":2: not valid JSON: cut off"]),
    "cut off after a key": ("rows.jsonl", PAIR + b"\n" + PAIR[:-5] + b"\n", [":2: not valid JSON: cut off"]),
    "bad JSON over lines": ("rows.json", b"[\n" + PAIR + b",\n{]", [":3: not valid JSON"]),
    "bad JSON, second row": ("rows.json", PAIR + b"\n{]\n", [":2: not valid JSON"]),
    "not an object": ("rows.jsonl", PAIR + b"\n[1]\n", [":2: a row must be an object with named fields, got list"]),
    "a number": ("rows.json", b"3", [": expected a list of objects"]),
    "Latin-1": ("rows.jsonl", PAIR + b'\n{"prompt": "\xe9"}\n' + PAIR, [":2: byte 13 of the line (0xe9) is not UTF-8"]),
    "Latin-1 after a BOM": ("rows.txt", b"\xef\xbb\xbfab\xe9\n", [":1: byte 6 of the line (0xe9) is not UTF-8"]),
    "Latin-1 in a list": ("rows.json", b'[\n{"prompt":\n"\xe9"}\n]', [":3: byte 2 of the line (0xe9) is not UTF-8"]),
    "Latin-1 in CSV": ("rows.csv", b"prompt,completion\n\xe9,b\nc\n", [":2: byte 1 of the line (0xe9)", ":3: 1 cells"]),
    "ragged": (
        "rows.csv",
        b"prompt,completion\na,b\nc\nd,e,f\n",
        [":3: 1 cells, but the header names 2", ":4: 3 cells"],
    ),
    "open quote": ("rows.csv", b'prompt,completion\na,b\n"c,d\ne,f\n', [":3: not valid CSV"]),
    "column twice": ("rows.csv", b"prompt,prompt\na,b\n", [":1: the header names prompt more than once"]),
    "unknown ending": ("rows.xml", b"<a/>", [": unknown kind of file `.xml`; use .jsonl, "]),
}


@pytest.mark.parametrize(("name", "content", "expected"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path: Path, name: str, content: bytes, expected: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    found = problems(path)
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(f"{path}{start}")


BAD_ROWS = {
    "missing": (
        {"prompt": "a", "n": 1},
        "no field `completion` for the format prompt_completion; its fields are `n`, ",
    ),
    "null": ({"prompt": None, "completion": "b"}, "`prompt` must be text, got null"),
    "number": ({"prompt": "a", "completion": 3}, "`completion` must be text, got a number"),
    "list": ({"prompt": "a", "completion": ["b"]}, "`completion` must be text, got a list"),
    "object": ({"prompt": {}, "completion": "b"}, "`prompt` must be text, got an object"),
    "surrogate": ({"prompt": "a\ud800", "completion": "b"}, "`prompt` holds a lone surrogate"),
}
BAD_CHATS = {
    "role": (
        [USER, {"role": "bot", "content": "b"}],
        "message 2 of `messages` has the role 'bot', not one of system, ",
    ),
    "no content": ([USER, {"role": "assistant"}], "`content` must be text, got null"),
    "parts": ([{"role": "user", "content": [{"type": "text"}]}], "`content` must be text, got a list"),
    "text": ("hello", "`messages` must be a list of messages, got text"),
    "null": (None, "`messages` must be a list of messages, got null"),
    "empty": ([], "`messages` must be a list of messages, got an empty list"),
    "strings": (["a"], "message 1 of `messages` must be an object"),
    "call": ([USER, BOT | {"tool_calls": [{}]}], "message 2 of `messages` has `tool_calls`, which would be left out"),
    "unanswered": ([USER], "no assistant message"),
}


@pytest.mark.parametrize(("bad", "expected"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row(tmp_path: Path, bad: dict[str, Any], expected: str) -> None:
    good = json.loads(PAIR)
    path = write_rows(tmp_path / "rows.jsonl", [good, good, bad, good, bad])
    assert [line.partition(": ")[0] for line in problems(path)] == [f"{path}:3", f"{path}:5"]
    assert problems(path)[0].startswith(f"{path}:3: {expected}")


@pytest.mark.parametrize(("bad", "expected"), BAD_CHATS.values(), ids=BAD_CHATS)
def test_bad_chat(tmp_path: Path, bad: Any, expected: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [USER, BOT]}, {"messages": bad}])
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:2: {expected}")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, BOT], "tools": [{}]}, "the row has `tools`, which would be left out of training"),
        ({"prompt": [USER], "completion": [USER]}, "no assistant message"),
        ({"prompt": [USER], "completion": "b"}, "`completion` must be a list of messages, got text"),
    ],
)
def test_bad_conversation(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row])
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:1: {expected}")


def test_message_lists_are_a_conversation_in_either_shape(tmp_path: Path) -> None:
    named = USER | {"name": "Ann", "tool_calls": None}
    whole = read(write_rows(tmp_path / "one.jsonl", [{"messages": [named, BOT], "tools": None}]))
    parts = read(write_rows(tmp_path / "two.jsonl", [{"prompt": [USER], "completion": [BOT]}]))
    assert whole.format == parts.format == "messages"
    assert whole.train == [Conversation(f"{tmp_path}/one.jsonl:1", (USER | {"name": "Ann"}, BOT), 0)]
    assert parts.train == [Conversation(f"{tmp_path}/two.jsonl:1", (USER, BOT), 1)]
    for form in ("messages", "prompt_completion"):
        assert read(tmp_path / "two.jsonl", format=form) == parts


def test_keys_that_fit_no_format(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}])
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:1: the keys `answer`, `question` fit no format; set data.format to one of ")
    assert problem.endswith("and data.columns to map its keys to yours")


def test_ambiguous_keys_and_the_setting_that_decides(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b", "text": "c"}])
    (problem,) = problems(path)
    expected = "the keys `completion`, `prompt`, `text` fit more than one format; set data.format to one of "
    assert problem == f"{path}:1: {expected}prompt_completion, text"
    assert texts(read(path, format="text")) == [("", "c")]
    assert texts(read(path, format="prompt_completion")) == [("a", "b")]


@pytest.mark.parametrize("others", [{}, {"prompt": "x"}, {"completion": "y"}])
def test_columns(tmp_path: Path, others: dict[str, str]) -> None:
    """A mapped field wins over one that has our name by chance, whichever comes first."""
    row = {"question": "a", "answer": "b"}
    path = write_rows(tmp_path / "rows.jsonl", [row | others, others | row])
    columns = {"prompt": "question", "completion": "answer"}
    assert texts(read(path, columns=columns)) == [("a", "b")] * 2
    assert texts(read(path, columns={"completion": "question", "prompt": "answer"})) == [("b", "a")] * 2


def test_a_mapped_field_no_longer_counts_under_its_own_name(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "completion": "b"}])
    assert texts(read(path, columns={"prompt": "text"})) == [("a", "b")]


def test_columns_of_a_field_that_is_not_there(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [json.loads(PAIR)])
    (problem,) = problems(path, columns={"prompt": "question"})
    assert problem == f"{path}:1: data.columns: no field `question`; the fields are `completion`, `prompt`"


def test_directory_is_read_by_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv", "c.md"):
        (tmp_path / name).write_bytes(b"prompt,completion\na,b\n" if name == "a.csv" else PAIR)
    assert lines(read(tmp_path)) == ["a.csv:2", "b.jsonl:1"]


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_bytes(PAIR)
    assert len(read("~/rows.jsonl").train) == 1


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(40)),
        ("train[:20]", range(20)),
        ("train[10%:20%]", range(4, 8)),
        ("train[-3:]", range(37, 40)),
        ("train[:2]+train[-2:]", [0, 1, 38, 39]),
    ],
)
def test_slices(tmp_path: Path, split: str, expected: Any) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": str(number)} for number in range(40)])
    assert texts(read(path, split)) == [("", str(number)) for number in expected]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("test", 'split `test`: Unknown split "test"'),
        ("train[", "split `train[`"),
        ("train[5:2]", "0 rows in train[5:2]"),
    ],
)
def test_bad_slices(tmp_path: Path, split: str, expected: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}] * 9)
    (problem,) = problems(path, split=split)
    assert problem.startswith(f"{path}: {expected}")


@pytest.mark.parametrize("hub_id", ["nobody/nothing-of-this-name", "nothing-of-this-name", "not a name"])
def test_hub_id_that_cannot_be_had(hub_id: str) -> None:
    start = time.monotonic()
    (problem,) = problems(hub_id)
    assert problem.startswith(f"{hub_id}: no such file")
    assert time.monotonic() - start < 15


def test_hub_id_in_the_cache(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"prompt": ["a", "c", "e"], "completion": ["b", "d", "f"]})
    place = tmp_path / "some___rows" / "default" / "0.0.0" / "hash"
    place.mkdir(parents=True)
    with ArrowWriter(path=str(place / "rows-train.arrow"), features=rows.features) as writer:
        writer.write_table(rows.data.table)
        writer.finalize()
    split = {"name": "train", "num_bytes": 1, "num_examples": 3, "dataset_name": "rows"}
    info = {"builder_name": "parquet", "dataset_name": "rows", "config_name": "default", "version": "0.0.0"}
    datasets.DatasetInfo(features=rows.features, splits={"train": split}, **info).write_to_directory(str(place))
    code = (
        "from loratune import data; from loratune.config import DataSection as Section\n"
        "print(data.read(Section(train={'path': 'some/rows', 'split': 'train[1:]'}), 0).train)\n"
        "data.read(Section(train={'path': 'some/rows', 'split': 'other'}), 0)"
    )
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    expected = [Plain("some/rows[train[1:]]:1", "c", "d"), Plain("some/rows[train[1:]]:2", "e", "f")]
    assert done.stdout == f"{expected}\n", done.stderr
    assert "DataError: some/rows: no such file, and it cannot be loaded as a hub dataset (ValueError: " in done.stderr


def test_validation_file(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", [{"text": "a"}])
    held_out = write_rows(tmp_path / "held.jsonl", [{"text": "b"}, {"text": "c"}])
    examples = read(train, validation={"path": str(held_out), "split": "train[1:]"})
    assert examples.validation == [Plain(f"{held_out}:2", "", "c")]
    assert examples.train == [Plain(f"{train}:1", "", "a")]


def test_validation_fraction_is_disjoint_and_repeats(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": str(number)} for number in range(40)])
    first, again, other = (read(path, validation=0.25, seed=seed) for seed in (3, 3, 2))
    assert len(first.validation) == 10
    assert sorted(map(hash, first.train + first.validation)) == sorted(map(hash, read(path).train))
    assert first == again
    assert first.validation != other.validation


def test_validation_fraction_of_too_few_rows(tmp_path: Path) -> None:
    (problem,) = problems(write_rows(tmp_path / "rows.jsonl", [{"text": "a"}]), validation=0.5)
    assert problem == "data.validation: a fraction of 0.5 of 1 rows leaves none to train on"


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"text\n{'a' * 1_000_000}\n")
    assert texts(read(path)) == [("", "a" * 1_000_000)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("absent.jsonl", None, ": no such file"),
        ("directory", None, ": no data files in this directory"),
        ("rows.jsonl", PAIR + b"\n{", ":2: not valid JSON: cut off"),
        ("rows.jsonl", PAIR + b"\n\xff", ":2: byte 1 of the line (0xff) is not UTF-8"),
        ("rows.jsonl", PAIR + b'\n{"prompt": "a"}', ":2: no field `completion`"),
        ("rows.jsonl", b'{"messages": [{"role": "x"}]}', ":1: message 1 of `messages` has the role 'x'"),
    ],
)
def test_exit_code(
    cli: Callable[..., Ran], run_config: Callable[..., Path], tmp_path: Path, name: str, content: Any, expected: str
) -> None:
    path = tmp_path / "data" / name
    (path if name == "directory" else path.parent).mkdir(parents=True)
    if content is not None:
        path.write_bytes(content)
    config = run_config(data={"train": str(path)})
    before = tree(tmp_path)
    ran = cli("train", config)
    assert (ran.code, ran.out) == (4, "")
    assert ran.err.startswith(f"error: {path}{expected}")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("locked", ["rows.jsonl", "."])
def test_no_permission(tmp_path: Path, locked: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(PAIR)
    (tmp_path / locked).chmod(0)
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)  # root may read everything, so be nobody for a moment
        assert problems(path) == [f"{path}: cannot be read: Permission denied"]
    finally:
        os.seteuid(user)
        (tmp_path / locked).chmod(0o700)


def test_rows_longer_than_max_length(cli: Callable[..., Ran], run_config: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b" * length} for length in (30, 50)]
    path = write_rows(tmp_path / "long.jsonl", rows)
    ran = cli("train", run_config(data={"train": str(path), "max_length": 20}))
    assert ran.code == 4
    assert "2 rows: the answer does not fit in max_length 20" in ran.err
    assert "data.max_length: 52 would keep all" in ran.err
    assert not (tmp_path / "out").exists()
    assert cli("train", run_config(data={"train": str(path), "max_length": 52})).code == 0


def test_empty_sides_and_nul(cli: Callable[..., Ran], run_config: Callable[..., Path], tmp_path: Path) -> None:
    """An empty prompt and a NUL are trained on; an empty completion is dropped and counted."""
    rows = [
        {"prompt": "", "completion": "b\0"},
        {"prompt": "a", "completion": ""},
        {"prompt": [USER], "completion": [BOT]},
        {"prompt": [USER], "completion": [BOT | {"content": " "}]},
    ]
    for kept in (rows[:2], rows[2:]):
        config = run_config(data={"train": str(write_rows(tmp_path / "data.jsonl", kept))})
        ran = cli("train", config, "--dry-run")
        assert ran.code == 0, ran.err
        shown = " ".join(ran.out.split())
        assert "rows 2 " in shown
        assert f"dropped 1 rows 1: nothing to learn: the completion is empty ({tmp_path}/data.jsonl:2)" in shown


def test_one_row_trains(cli: Callable[..., Ran], run_config: Callable[..., Path], tmp_path: Path) -> None:
    ran = cli("train", run_config(data={"train": str(write_rows(tmp_path / "one.jsonl", [json.loads(PAIR)]))}))
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]["steps"] == 1
