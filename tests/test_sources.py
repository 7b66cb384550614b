"""Files, directories, globs and hub ids → rows: what is accepted, and which line of invalid input is reported."""

import gzip
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, check_refused, meanings, run_command, tree, write_rows
from datasets.arrow_writer import ArrowWriter
from running import Cli, MakeConfig

from loratune import data
from loratune.codes import Code
from loratune.config import DataSection, Source
from loratune.data import sources
from loratune.data.formats.questions import read_questions
from loratune.data.sources.files import looks_like_hub_id
from loratune.data.sources.rows import Row, Unreadable, line_of
from loratune.errors import DataError, Problem

MORE = "", Code.MORE_PROBLEMS, "there may be more"
"""The last entry if problems after the tenth are not listed."""
PAIR = b'{"prompt": "a", "completion": "b"}'
VALUES = {"prompt": "a", "completion": "b"}
USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def read(path: Path | str, split: str | None = None) -> list[Row]:
    return sources.read_rows(Source(path=str(path), split=split))


def problems(path: Path | str, split: str | None = None) -> list[Problem]:
    with pytest.raises(DataError) as caught:
        read(path, split)
    return list(caught.value.problems)


def problem(path: Path | str, split: str | None = None) -> Problem:
    """The only problem of a source."""
    (only,) = problems(path, split)
    return only


def values(rows: list[Row]) -> list[dict[str, Any]]:
    return [row.values for row in rows]


def lines(rows: list[Row]) -> list[str]:
    return [Path(row.where).name for row in rows]


def numbered(path: Path, numbers: range) -> Path:
    return write_rows(path, [{"text": str(number)} for number in numbers])


def texts(rows: list[Row]) -> list[int]:
    return [int(row.values["text"]) for row in rows]


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
    "sep=, and commas": ("rows.csv", b"sep=,\nprompt,completion\na,b\n", [3]),
    "sep=; after a BOM": ("rows.csv", b"\xef\xbb\xbfsep=;\r\n\r\nprompt;completion\r\na;b\r\n", [4]),
    "quoted sep=": ("rows.csv", b'"sep=,"\nprompt,completion\na,b\n', [3]),
    "sep= with empty cells": ("rows.csv", b"sep=,,\nprompt,completion\na,b\n", [3]),
    "empty columns at the end": ("rows.csv", b"prompt,completion,,\na,b,,\na,b\na,b,,,\n", [2, 3, 4]),
    "SEP= and tabs": ("rows.csv", b"SEP=\t\nprompt\tcompletion\na\tb\na\tb\n", [3, 4]),
}


@pytest.mark.parametrize(("name", "content", "places"), ACCEPTED.values(), ids=ACCEPTED)
def test_valid_files_are_read(tmp_path: Path, name: str, content: bytes, places: list[int | str]) -> None:
    (tmp_path / name).write_bytes(content)
    rows = read(tmp_path / name)
    assert values(rows) == [VALUES] * len(places)
    assert lines(rows) == [f"{name}:{place}" for place in places]
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(content))
    assert values(read(packed)) == values(rows)
    assert lines(read(packed)) == [f"{name}.gz:{place}" for place in places]


ROW = b'{"text": "abc"}\n'
MANY = 1 << 20
BLANK = {
    "newlines": ("rows.jsonl", ROW + b"\n" * MANY + ROW, [1, MANY + 2]),
    "carriage returns": ("rows.jsonl", ROW + b"\r\n" * (MANY // 2) + ROW, [1, MANY // 2 + 2]),
    "lines of spaces": ("rows.jsonl", ROW + b" \t\n" * (MANY // 3) + ROW, [1, MANY // 3 + 2]),
    "a long line of spaces": ("rows.jsonl", ROW + b" " * 8 * MANY + b"\n" + ROW, [1, 3]),
    "spaces in a row": ("rows.jsonl", b'{"text":' + b" " * MANY + b'"abc"}' + b" " * MANY + b"\n", [1]),
    "newlines around a bad line": ("rows.jsonl", ROW + b"\n" * MANY + b"\xff", [MANY + 2]),
    "texts": ("rows.txt", b"abc\n" + b"\n" * MANY + b"abc", [1, MANY + 2]),
    "csv": ("rows.csv", b"\n" * MANY + b"text\n" + b"\r\n" * MANY + b"abc\n" + b"\n" * MANY, [2 * MANY + 2]),
    "in a cell": ("rows.csv", b'text\n"' + b"\n" * MANY + b'"\nabc\n', [2, MANY + 3]),
    "list": (
        "rows.json",
        b" " * MANY + b"[" + b"\n" * MANY + ROW + b"\t" * MANY + b"," + b"\r\n" * MANY + ROW + b"]" + b"\n" * MANY,
        ["row 1", "row 2"],
    ),
    "JSON lines called json": ("rows.json", b"\n" * MANY + ROW + b"\n" * MANY + ROW, [MANY + 1, 2 * MANY + 2]),
}


@pytest.mark.parametrize(("name", "content", "places"), BLANK.values(), ids=BLANK)
def test_blank_text_is_skipped_quickly(tmp_path: Path, name: str, content: bytes, places: list[int | str]) -> None:
    """At tens of MB/s, even in a gzip file, with correct line numbers afterwards. Regression: it was 0.2 MB/s."""
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(content, 1))
    start = time.process_time()
    try:
        found = [row.where for row in read(path)]
    except DataError as error:
        found = [problem.where for problem in error.problems]
    assert time.process_time() - start < len(content) / 5e6
    assert found == [f"{path}:{place}" for place in places]


def test_csv_line_numbers_count_newlines_in_quotes(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,completion\n"a\nb, ""c""\n",d\ne,f\n')
    assert values(read(path)) == [{"prompt": 'a\nb, "c"\n', "completion": "d"}, {"prompt": "e", "completion": "f"}]
    assert lines(read(path)) == ["rows.csv:2", "rows.csv:5"]


CLASSES = "".join(f"text {number},{('card', 'refund', 'pin')[number % 3]}\n" for number in range(30))
ROWS_AS_HEADERS = {
    "a class": f"i want it back,refund\n{CLASSES}",
    "a rare class": f"i want it back,other\n{CLASSES}a,other\n",
    "a number": "17,hello there\n18,good bye\n",
    "a sentence": "What is the capital of France?,Paris\nAnd of Spain?,Madrid\n",
    "a long text": f"prompt,{'word ' * 30}\na,b\n",
}
HEADERS = {
    "names": f"text,label\n{CLASSES}",
    "words": "Prompt,Expected Answer\nWhat is the capital of France?,Paris\n",
    "a name that is a value": f"text,label\n{CLASSES}" * 2 + "text,b\n" + CLASSES * 20,
    "pandas' numbers": "0,1\n3,text\n4,text\n",
    "counted from 1": "1,2\n3,4\n3,4\n",
    "pandas' index": ",text,label\n0,a,b\n1,c,d\n",
    "years": "country,1960,1961\nAruba,54211,55438\n",
    "ticked": "Email,Phone\nEmail,\n,Phone\nEmail,Phone\n",
    "questions": "Timestamp,What did you like most about this product?\n2020,all\n",
    "other scripts": "问题,答案\n你好吗,好\n",
    "Kaggle": "Id,ProductId,UserId,ProfileName,Score,Time,Summary,Text\n1,B001,A3S,d,5,1303862400,Good,I like it\n",
}


@pytest.mark.parametrize("name", [*ROWS_AS_HEADERS, *HEADERS])
def test_csv_header_that_looks_like_a_row_is_reported(tmp_path: Path, name: str) -> None:
    """As a remark on the rows, since some headers are questions."""
    path = tmp_path / "rows.csv"
    path.write_text((ROWS_AS_HEADERS | HEADERS)[name])
    fields = [*read(path)[0].values]
    section = DataSection(train=Source(path=str(path)), columns={"text": fields[-1]})
    found = [line for line in data.read_datasets(section, 0).train.remarks() if "looks like a row" in line]
    assert len(found) == (name in ROWS_AS_HEADERS)
    assert all(str(path) in line and fields[0] in line and "prompt,completion" in line for line in found)


def test_error_about_fields_of_csv_says_where_their_names_are_from(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("hello,hi\ngood day,hi\n")
    for columns in ({}, {"prompt": "question"}):
        with pytest.raises(DataError) as caught:
            data.read_datasets(DataSection(train=Source(path=str(path)), columns=columns), 0)
        assert "first line" in caught.value.problems[0].fix
    with pytest.raises(DataError, match="first line"):
        read_questions(str(path), DataSection(train=Source(path="-")))
    with pytest.raises(DataError) as caught:
        data.read_datasets(DataSection(train=Source(path=str(write_rows(tmp_path / "rows.jsonl", [{"a": 1}])))), 0)
    assert "first line" not in caught.value.problems[0].fix


def test_txt_has_one_text_per_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("  one\n\ntwo\x00\n")
    assert values(read(path)) == [{"text": "  one"}, {"text": "two\x00"}]
    assert lines(read(path)) == ["rows.txt:1", "rows.txt:3"]


def test_parquet_is_read(tmp_path: Path) -> None:
    """With several row groups, one of them empty. Nested values become lists and objects."""
    path = tmp_path / "rows.parquet"
    rows = [{"n": number, "messages": [USER, BOT], "none": None} for number in range(5_000)]
    table = pa.Table.from_pylist(rows)
    with pq.ParquetWriter(path, table.schema) as writer:
        for part in (table.slice(0, 3), table.slice(0, 0), table.slice(3)):
            writer.write_table(part)
    assert values(read(path)) == rows
    assert lines(read(path)) == [f"rows.parquet:row {number}" for number in range(1, 5_001)]
    assert lines(read(path, "train[-2:]")) == ["rows.parquet:row 4999", "rows.parquet:row 5000"]


BAD = Code.DATA_SYNTAX
REFUSED: dict[str, tuple[str, bytes, list[tuple[str, Code, str]]]] = {
    "empty": ("rows.jsonl", b"", [("", Code.DATA_EMPTY, "0 rows")]),
    "blank": ("rows.jsonl", b"\n  \n", [("", Code.DATA_EMPTY, "0 rows")]),
    "empty list": ("rows.json", b"[]", [("", Code.DATA_EMPTY, "0 rows")]),
    "header only": ("rows.csv", b"prompt,completion\n", [("", Code.DATA_EMPTY, "0 rows")]),
    "bad JSON": ("rows.jsonl", PAIR + b"\n{'a': 1}\n" + PAIR + b"\n{]\n", [(":2", BAD, ""), (":4", BAD, "")]),
    "trailing comma": ("rows.jsonl", b'{"a": "b",}', [(":1", BAD, "Expecting property name")]),
    "at most ten": (
        "rows.jsonl",
        b"{]\n" * 12,
        [(":1", BAD, "(and at least 9 more rows: 2, 3, 4, 5, 6, 7, 8, 9, 10)")],
    ),
    "three alike": ("rows.jsonl", b"{]\n" * 3, [(f":{line}", BAD, "") for line in (1, 2, 3)]),
    "four alike": (
        "rows.jsonl",
        b"{]\n" * 2 + b"[]\n" + b"{]\n" * 2,
        [(":1", BAD, " (and 3 more rows: 2, 4, 5)"), (":3", BAD, "a list")],
    ),
    "ten of two kinds": (
        "rows.jsonl",
        b"{]\n[]\n" * 6,
        [
            (":1", BAD, " (and at least 4 more rows: 3, 5, 7, 9)"),
            (":2", BAD, " (and at least 4 more rows: 4, 6, 8, 10)"),
            MORE,
        ],
    ),
    "ten of many kinds": (
        "rows.jsonl",
        b"".join(b"%s{]\n" % (b"[" * n) for n in range(12)),
        [*((f":{line}", BAD, "") for line in range(1, 11)), MORE],
    ),
    "too deep": ("rows.jsonl", b"[" * 100_000, [(":1", BAD, "")]),
    "cut off in text": ("rows.jsonl", PAIR + b"\n" + PAIR[:-4], [(":2", BAD, "")]),
    "cut off after text": ("rows.jsonl", PAIR + b"\n" + PAIR[:-1], [(":2", BAD, "")]),
    "cut off after a key": ("rows.jsonl", PAIR + b"\n" + PAIR[:-5] + b"\n", [(":2", BAD, "")]),
    "bad JSON over lines": ("rows.json", b"[\n" + PAIR + b",\n{]", [(":3", BAD, "")]),
    "bad JSON, second row": ("rows.json", PAIR + b"\n{]\n", [(":2", BAD, "")]),
    "not an object": ("rows.jsonl", PAIR + b"\n[1]\n", [(":2", BAD, "got a list")]),
    "a number": ("rows.json", b"3", [("", BAD, "list of objects")]),
    "Latin-1": ("rows.jsonl", PAIR + b'\n{"prompt": "\xe9"}\n' + PAIR, [(":2", BAD, "byte 13 of the line (0xe9)")]),
    "Latin-1 after a BOM": ("rows.txt", b"\xef\xbb\xbfab\xe9\n", [(":1", BAD, "byte 6 of the line (0xe9)")]),
    "Latin-1 in a list": ("rows.json", b'[\n{"prompt":\n"\xe9"}\n]', [(":3", BAD, "byte 2 of the line (0xe9)")]),
    "Latin-1 in CSV": (
        "rows.csv",
        b"prompt,completion\n\xe9,b\nc\n",
        [(":2", BAD, "the byte 0xe9, which is not UTF-8"), (":3", BAD, "1 cells")],
    ),
    "ragged": (
        "rows.csv",
        b"prompt,completion\na,b\nc\nd,e,f\n",
        [(":3", BAD, "1 cells, but the header has 2"), (":4", BAD, "3 cells")],
    ),
    "open quote": ("rows.csv", b'prompt,completion\na,b\n"c,d\ne,f\n', [(":3", BAD, "")]),
    "a name twice": (
        "rows.jsonl",
        b'{"prompt": "a", "completion": "b", "completion": "c"}\n',
        [(":1", BAD, "`completion`")],
    ),
    "a name twice in a document": ("rows.json", b'[{"a": 1, "a": 2}]', [(":row 1", BAD, "`a`")]),
    "semicolons": ("rows.csv", b"prompt;completion\na;b\n", [(":1", BAD, "';'")]),
    "tabs": ("rows.csv", b"prompt\tcompletion\na\tb\n", [(":1", BAD, "'\\t'")]),
    "column twice": ("rows.csv", b"prompt,prompt\na,b\n", [(":1", BAD, "`prompt`")]),
    "unknown ending": ("rows.xml", b"<a/>", [("", Code.DATA_UNREADABLE, "`.xml`")]),
    "blank, then bad": ("rows.jsonl", b"\n\n{]\n", [(":3", BAD, "Expecting property name")]),
    "list cut off": ("rows.json", b"[" + PAIR + b",\n", [(":2", BAD, "at column 1")]),
    "list cut off in a row": ("rows.json", b"[" + PAIR + b',\n {"prom', [(":2", BAD, "at column 3")]),
    "list without a comma": ("rows.json", b"[" + PAIR + b"\n" + PAIR + b"]", [(":2", BAD, "Expecting ','")]),
    "more after a list": ("rows.json", b"[" + PAIR + b"]\n\n x", [(":3", BAD, "Extra data at column 2")]),
    "list of lists": ("rows.json", b"[[], 1]", [(f":row {n}", BAD, "") for n in (1, 2)]),
    "two objects on a line": ("rows.json", PAIR + b" " + PAIR, [(":1", BAD, "Extra data at column 36")]),
    "deep list": ("rows.json", b"[" * 100_000, [("", BAD, "")]),
    "digits in a list": ("rows.json", b"[\n\n" + b"1" * 5000 + b"]", [("", BAD, "a number of too many digits")]),
    "cut in a letter": ("rows.json", b'[{"a": "\xc3', [(":1", BAD, "byte 9 of the line (0xc3)")]),
    "ten of many": ("rows.txt", b"\xff\n" * 12, [(":1", BAD, "(0xff) is not UTF-8 (and at least 9 more rows: 2, ")]),
    "both at once": ("rows.jsonl", b"{]\n\xff\n[]\n", [(":1", BAD, ""), (":2", BAD, "byte 1"), (":3", BAD, "")]),
    "no Parquet": ("rows.parquet", b"PAR1, it says", [("", Code.DATA_UNREADABLE, "Parquet")]),
    "empty Parquet": ("rows.parquet", b"", [("", Code.DATA_UNREADABLE, "Parquet")]),
    "no gzip": ("rows.jsonl.gz", PAIR, [("", Code.DATA_UNREADABLE, "gzip file: Not a gzipped file")]),
    "gzip cut off": (
        "rows.jsonl.gz",
        gzip.compress(PAIR)[:-9],
        [("", Code.DATA_UNREADABLE, "gzip file: Compressed file ended")],
    ),
}


@pytest.mark.parametrize(("name", "content", "expected"), REFUSED.values(), ids=REFUSED)
def test_invalid_files_are_refused(
    tmp_path: Path, name: str, content: bytes, expected: list[tuple[str, Code, str]]
) -> None:
    """expected: the place after the path, the code, and a part of the message."""
    path = tmp_path / name
    path.write_bytes(content)
    refused = problems(path)
    assert [(problem.where, problem.code, problem.key) for problem in refused] == [
        (f"{path}{place}", code, "") for place, code, _ in expected
    ]
    for refusal, (_, _, detail) in zip(refused, expected, strict=True):
        assert detail in refusal.what and refusal.fix


def test_damaged_parquet_page_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.Table.from_pylist([{"text": f"{number:06} {'x' * 100}"} for number in range(2_000)])
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    whole = bytearray(path.read_bytes())
    assert len(read(path)) == 2_000
    whole[100_000] ^= 1
    path.write_bytes(whole)
    damage = problem(path)
    assert (damage.code, damage.where) == (Code.DATA_UNREADABLE, str(path)) and "Parquet" in damage.what


def test_invalid_utf8_in_parquet_is_an_unreadable_value(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    raw = pa.array([b"a", b"\xff", b"c"], pa.binary())
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 3, raw.buffers())}), path)
    first, second, third = (row.values["text"] for row in read(path))
    assert (first, third) == ("a", "c") and isinstance(second, Unreadable) and "0xff" in second.reason


def test_problems_are_yielded_in_place_of_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(PAIR + b"\n{]\n\xff\n" + PAIR + b"\n")
    (file,) = sources.open_source(Source(path=str(path)))
    first, bad, worse, last = file.rows()
    assert isinstance(first, Row) and isinstance(last, Row) and lines([first, last]) == ["rows.jsonl:1", "rows.jsonl:4"]
    assert isinstance(bad, Problem) and (bad.code, bad.where) == (Code.DATA_SYNTAX, f"{path}:2")
    assert isinstance(worse, Problem) and (worse.code, worse.where) == (Code.DATA_SYNTAX, f"{path}:3")


LETTERS = 'aé€😀\u2028\\ "'


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_rows_longer_than_the_read_buffer_are_assembled(tmp_path: Path, name: str, indent: int | None) -> None:
    """Multi-byte characters may cross the border of a buffer."""
    rows = [{"text": LETTERS * size, "n": size} for size in (1, 150_000, 3, 70_001, 300_000, 0)]
    path = tmp_path / name
    if name == "rows.json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=indent))
    else:
        path.write_text("\r\n".join(json.dumps(row, ensure_ascii=indent is None) for row in rows))
    assert values(read(path)) == rows


def test_positions_of_problems_after_long_rows_are_correct(tmp_path: Path) -> None:
    row = json.dumps({"text": LETTERS * 100_000}, ensure_ascii=False)
    path = tmp_path / "rows.json"
    path.write_text(f"[{row},\n{row}, {row}, {{]")
    column = 2 * len(row) + 6
    first = problems(path)[0]
    assert (first.code, first.where) == (Code.DATA_SYNTAX, f"{path}:2")
    assert "Expecting property name" in first.what and first.what.endswith(f" at column {column}")
    path.write_bytes(f"[{row},\n{row}, ".encode() + b'"\xff"]')
    first = problems(path)[0]
    assert (first.code, first.where) == (Code.DATA_SYNTAX, f"{path}:2")
    assert f"byte {len(row.encode()) + 4} of the line (0xff)" in first.what


def test_directory_is_read_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv", "c.md", "B.txt.gz"):
        content = b"prompt,completion\na,b\n" if name == "a.csv" else PAIR
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert lines(read(tmp_path)) == ["B.txt.gz:1", "a.csv:2", "b.jsonl:1"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", ["a.jsonl:1", "b.jsonl:1"]),
        ("[b-z]*", ["b.jsonl:1"]),
        ("?.*", ["a.jsonl:1", "b.jsonl:1"]),
        ("**/*.jsonl", ["a.jsonl:1", "b.jsonl:1", "c.jsonl:1"]),
        ("*/*", ["c.jsonl:1"]),
        ("odd[1].jsonl", ["odd[1].jsonl:1"]),
    ],
)
def test_globs_match_data_files(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl", "a.md", "odd[1].jsonl", "deep/c.jsonl"):
        (tmp_path / name).write_bytes(PAIR)
    if "odd" not in pattern:
        (tmp_path / "odd[1].jsonl").unlink()
    assert lines(read(f"{tmp_path}/{pattern}")) == expected


@pytest.mark.parametrize("pattern", ["*.jsonl", "none/*.jsonl", "*", "data?"])
def test_glob_without_data_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.xml").write_bytes(PAIR)
    (tmp_path / "data1").mkdir()
    refusal = problem(pattern)
    assert (refusal.code, refusal.where) == (Code.DATA_NOT_FOUND, pattern)
    assert "glob" in refusal.what and ("notes.xml" in refusal.what) == (pattern == "*") and ".jsonl, " in refusal.fix


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (".", ["a.md, b.md", "bad.txt/, more/", "c.xml, notes", "none.csv"]),
        ("*", ["a.md, b.md", "bad.txt/, more/", "c.xml, notes", "none.csv"]),
        ("**", ["a.md, b.md, d.md", "bad.txt/", "c.xml, notes", "none.csv"]),
        ("*.[jm]*", ["a.md, b.md"]),
        ("rows.jsonl", []),
    ],
)
def test_skipped_files_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, expected: list[str]
) -> None:
    """By reason: files of other types, and directories without readable files, but not hidden files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more").mkdir()
    for name in ("rows.jsonl", "a.md", "b.md", "c.xml", "notes", ".hidden", "more/rows.jsonl", "more/d.md"):
        (tmp_path / name).write_bytes(PAIR)
    (tmp_path / "bad.txt").mkdir()
    (tmp_path / "none.csv").symlink_to("nowhere")
    line = sources.left_out(Source(path=pattern))
    reasons = re.findall(r"(?:^|\); )([^()]+) \(", line.removeprefix(f"{pattern}: not read: "))
    assert reasons == expected and bool(line) == bool(expected), line


def test_tilde_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_bytes(PAIR)
    assert len(read("~/rows.jsonl")) == len(read("~/*.jsonl")) == 1


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(40)),
        ("train[:20]", range(20)),
        ("train[17:19]", range(17, 19)),
        ("train[12:]", range(12, 40)),
        ("train[35:90]", range(35, 40)),
        ("train[10%:20%]", range(4, 8)),
        ("train[-3:]", range(37, 40)),
        ("train[:-30]", range(10)),
        ("train[:2]+train[-2:]", [0, 1, 38, 39]),
        ("train[-2:] + train[:12]", [38, 39, *range(12)]),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_slices_select_rows(tmp_path: Path, ending: str, split: str, expected: Any) -> None:
    """Of one file, and of several files as if they were one."""
    files = {"one/a": range(40), "many/a": range(10), "many/b": range(10, 18), "many/c": range(18, 40)}
    for name, numbers in files.items():
        path = tmp_path / f"{name}.{ending}"
        path.parent.mkdir(exist_ok=True)
        rows = [{"text": str(number)} for number in numbers]
        write_rows(path, rows) if ending == "jsonl" else pq.write_table(pa.Table.from_pylist(rows), path)
    assert texts(read(tmp_path / "one", split)) == list(expected)
    assert texts(read(tmp_path / "many", split)) == list(expected)


def test_slice_reads_no_further_than_needed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(PAIR + b"\n\n" + PAIR + b"\n{]\n")
    assert lines(read(path, "train[:2]")) == ["rows.jsonl:1", "rows.jsonl:3"]
    for split in ("train[2:]", "train[:100%]"):
        first = problems(path, split)[0]
        assert (first.code, first.where) == (Code.DATA_SYNTAX, f"{path}:4")


@pytest.mark.parametrize(
    ("split", "code", "expected"),
    [
        ("test", Code.DATA_FORMAT, 'split `test`: Unknown split "test"'),
        ("train[", Code.DATA_FORMAT, "split `train[`"),
        ("train[:\u0663]", Code.DATA_FORMAT, "split `train[:\u0663]`: not ASCII"),
        ("train[:200%]", Code.DATA_FORMAT, "split `train[:200%]`: Percent slice"),
        ("train[:50%](pct1_dropremainder)", Code.DATA_FORMAT, "split `train[:50%](pct1_dropremainder)`: Using"),
        ("train[5:2]", Code.DATA_EMPTY, "0 rows in train[5:2]"),
        ("train[9:]", Code.DATA_EMPTY, "0 rows in train[9:]"),
    ],
)
def test_invalid_slices_are_refused(tmp_path: Path, split: str, code: Code, expected: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}] * 9)
    refusal = problem(path, split)
    assert (refusal.code, refusal.where) == (code, str(path))
    assert refusal.what.startswith(expected)


def digests(path: Path | str, split: str | None = None) -> list[str]:
    return [part.digest for part in sources.open_source(Source(path=str(path), split=split))]


def test_digest_depends_on_content_type_and_slice_but_not_on_the_name(tmp_path: Path) -> None:
    for name, content in {"a.jsonl": PAIR, "b.jsonl": PAIR, "c.jsonl": PAIR + b"\n", "a.txt": PAIR}.items():
        (tmp_path / name).write_bytes(content)
    (whole,), (same,), (longer,), (text,) = (digests(tmp_path / n) for n in ("a.jsonl", "b.jsonl", "c.jsonl", "a.txt"))
    assert whole == same
    (part,) = digests(tmp_path / "a.jsonl", "train[:1]")
    assert [part] == digests(tmp_path / "b.jsonl", "train[:1]")
    assert len({whole, longer, text, part, *digests(tmp_path / "a.jsonl", "train[:2]")}) == 5


def test_digest_of_a_slice_depends_on_the_preceding_files(tmp_path: Path) -> None:
    numbered(tmp_path / "a.jsonl", range(3)), numbered(tmp_path / "b.jsonl", range(3, 9))
    whole, part = digests(tmp_path), digests(tmp_path, "train[:5]+train[:5]")
    assert len(set(part)) == 4
    numbered(tmp_path / "a.jsonl", range(2))
    assert [old == new for old, new in zip(whole, digests(tmp_path), strict=True)] == [False, True]
    assert set(part).isdisjoint(digests(tmp_path, "train[:5]+train[:5]"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv.gz", "rows.parquet"])
def test_progress_adds_up_to_the_file_size(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    rows = [{"text": f"{number} {os.urandom(40).hex()}"} for number in range(40_000)]
    if name == "rows.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name == "rows.csv.gz":
        path.write_bytes(gzip.compress("\n".join(["text", *(row["text"] for row in rows)]).encode(), 1))
    else:
        path.write_text(json.dumps(rows) if name == "rows.json" else "\n".join(map(json.dumps, rows)))
    for split in (None, "train[:5]", "train[-5:]"):
        (file,) = sources.open_source(Source(path=str(path), split=split))
        advances: list[int] = []
        count = sum(1 for _ in file.rows(advances.append))
        assert (count, sum(advances), min(advances) >= 0) == (5 if split else 40_000, path.stat().st_size, True)
        assert file.size == path.stat().st_size
        assert len(advances) > (0 if split == "train[:5]" else 1)


AROUND = {"jsonl": ('{"text": "', '"}'), "csv": ("text\n", ""), "txt": ("", "")}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """In a fresh process. 40 MB of rows take little more than 2 MB of them, and one row of 50 MB takes a few times its
    size (csv uses four bytes per character of a cell)."""
    rows = [{"text": os.urandom(100).hex()} for _ in range(1_000)]
    for size, thousands in (("small", 10), ("many", 200)):
        with (tmp_path / f"{size}.jsonl").open("w") as file:
            file.writelines("".join(f"{json.dumps(row)}\n" for row in rows) for _ in range(thousands))
        table = pa.concat_tables([pa.Table.from_pylist(rows)] * thousands)
        pq.write_table(table, tmp_path / f"{size}.parquet", compression="none", use_dictionary=False)
    for kind, (head, tail) in AROUND.items():
        (tmp_path / f"long.{kind}").write_text(f"{head}{'word ' * 10_000_000}{tail}\n")
    names = ["small.jsonl", "small.parquet", "many.jsonl", "many.parquet", "long.txt", "long.jsonl", "long.csv"]
    code = (
        "import re, sys; from pathlib import Path\n"
        "from loratune.config import Source; from loratune.data import sources\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1]) // 1024\n"
        "count = lambda path: sum(1 for part in sources.open_source(Source(path=path)) for _ in part.rows())\n"
        "for path in sys.argv[1:]: print(count(path), peak())"
    )
    done = run_command(
        [sys.executable, "-c", code, *(str(tmp_path / name) for name in names)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    counts, peaks = zip(*(map(int, line.split()) for line in done.stdout.splitlines()), strict=True)
    assert counts == (10_000, 10_000, 200_000, 200_000, 1, 1, 1)
    rises = [after - before for before, after in pairwise(peaks)]
    assert max(rises[1:3]) < 25 and max(rises[3:5]) < 200 and rises[5] < 500


@pytest.mark.parametrize("hub_id", ["nobody/nothing-of-this-name", "nothing-of-this-name", "not a name"])
def test_hub_id_that_cannot_be_loaded_is_reported(hub_id: str) -> None:
    """With or without a connection. It may also be a missing file, which the message mentions first."""
    start = time.monotonic()
    refusal = problem(hub_id)
    assert (refusal.code, refusal.where) == (Code.DATA_HUB, hub_id)
    assert refusal.what.startswith("no such file")
    assert time.monotonic() - start < 15


HUB_IDS = ("owner/name", "name-1.0", "owner/name.with.dots")
PATHS = (
    "owner/rows.jsonl", "rows.parquet", "rows.csv.gz", "data/", "data/*", "./name", "../name", "/name", "~/name",
    "~me/name", "a/b/c",
)  # fmt: skip


@pytest.mark.parametrize("path", [*HUB_IDS, *PATHS])
def test_hub_ids_are_recognized(path: str) -> None:
    assert looks_like_hub_id(path) is (path in HUB_IDS)


def test_paths_are_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    for path in (f"{tmp_path}/none", "none.jsonl"):
        refusal = problem(path)
        assert (refusal.code, refusal.where) == (Code.DATA_NOT_FOUND, path)


def test_named_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    refusal = problem(tmp_path / "rows.jsonl")
    assert (refusal.code, refusal.where) == (Code.DATA_UNREADABLE, f"{tmp_path}/rows.jsonl")


def test_cached_hub_dataset_is_read_offline(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"prompt": ["a", "c", "e"], "completion": ["b", "d", "f"]})
    place = tmp_path / "some___rows" / "default" / "0.0.0" / "hash"
    place.mkdir(parents=True)
    with ArrowWriter(path=str(place / "rows-train.arrow"), features=table.features) as writer:
        writer.write_table(table.data.table)
        writer.finalize()
    split = {"name": "train", "num_bytes": 1, "num_examples": 3, "dataset_name": "rows"}
    info = {"builder_name": "parquet", "dataset_name": "rows", "config_name": "default", "version": "0.0.0"}
    datasets.DatasetInfo(features=table.features, splits={"train": split}, **info).write_to_directory(str(place))
    code = (
        "from loratune.data import sources; from loratune.config import Source\n"
        "def load(split): return sources.open_source(Source(path='some/rows', split=split))[0]\n"
        "rows, advances = load('train[1:]'), []\n"
        "print(rows.name, list(rows.rows(advances.append)), sum(advances) == rows.size > 0)\n"
        "print(len({load(split).digest for split in (None, 'train', 'train[1:]', 'train[2:]')}), len(rows.digest))\n"
        "print(rows.digest == load('train[1:]').digest)\n"
        "load('other')"
    )
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = run_command([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    name = "some/rows[train[1:]]"
    rows = [Row(f"{name}:1", {"prompt": "c", "completion": "d"}), Row(f"{name}:2", {"prompt": "e", "completion": "f"})]
    assert done.stdout == f"{name} {rows} True\n3 64\nTrue\n", done.stderr
    (error,) = [line for line in done.stderr.splitlines() if "DataError: " in line]
    assert "some/rows: " in error and "(ValueError: " in error and f"[{Code.DATA_HUB}]" in error


def test_long_csv_cells_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"text\n{'a' * 1_000_000}\n")
    assert values(read(path)) == [{"text": "a" * 1_000_000}]


@pytest.mark.parametrize(
    ("name", "content", "place", "code"),
    [
        ("absent.jsonl", None, "", Code.DATA_NOT_FOUND),
        ("absent*", None, "", Code.DATA_NOT_FOUND),
        ("directory", None, "", Code.DATA_NOT_FOUND),
        ("rows.jsonl", b"\n\n", "", Code.DATA_EMPTY),
        ("rows.jsonl", PAIR + b"\n{", ":2", Code.DATA_SYNTAX),
        ("rows.jsonl", PAIR + b"\n\xff", ":2", Code.DATA_SYNTAX),
        ("rows.parquet", b"PAR1", "", Code.DATA_UNREADABLE),
    ],
)
def test_invalid_data_exits_with_4_and_leaves_no_files(
    cli: Cli, run_config: MakeConfig, tmp_path: Path, name: str, content: bytes | None, place: str, code: Code
) -> None:
    path = tmp_path / "data" / name
    (path if name == "directory" else path.parent).mkdir(parents=True)
    if content is not None:
        path.write_bytes(content)
    config = run_config(data={"train": str(path)})
    before = tree(tmp_path)
    ran = cli("train", config)
    check_refused(ran, 4, (code, f"{path}{place}", ""))
    assert ran.out == ""
    assert tree(tmp_path) == before


@pytest.fixture
def public_dir() -> Iterator[Path]:
    """A directory that every user may enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)
        Path(name).chmod(0o755)


@pytest.mark.parametrize(
    ("pattern", "locked", "named"),
    [
        ("rows.jsonl", "rows.jsonl", "rows.jsonl"),
        ("rows.jsonl", ".", "rows.jsonl"),
        ("rows.parquet", "rows.parquet", "rows.parquet"),
        (".", "rows.parquet", "rows.parquet"),
        (".", ".", "."),
    ],
)
def test_missing_read_permission_is_reported(public_dir: Path, pattern: str, locked: str, named: str) -> None:
    (public_dir / "rows.jsonl").write_bytes(PAIR)
    pq.write_table(pa.table({"text": ["a"]}), public_dir / "rows.parquet")
    source = Source(path=str(public_dir / pattern))
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)  # root can read everything, so switch to another user
        if user == 0:
            assert len(sources.open_source(source)) == (2 if pattern == "." else 1)
        os.seteuid(user)
        (public_dir / locked).chmod(0)
        os.seteuid(user or 65534)
        with pytest.raises(DataError) as caught:
            sources.open_source(source)
    finally:
        os.seteuid(user)
    assert meanings(caught.value) == [(Code.DATA_UNREADABLE, str(public_dir / named), "")]
    assert "Permission denied" in str(caught.value)


def test_wide_csv_header_is_read_and_duplicates_are_reported(tmp_path: Path) -> None:
    """Column names are checked in linear time."""
    names = [f"c{number}" for number in range(100_000)]
    path = tmp_path / "rows.csv"
    path.write_text(f"{','.join(names)}\n{','.join('1' * len(names))}\n")
    assert len(read(path)[0].values) == len(names)
    path.write_text(f"{','.join([*names, names[7]])}\n")
    refused = problem(path)
    assert refused.code == Code.DATA_SYNTAX and "`c7`" in refused.what


def test_file_deleted_after_opening_is_reported(tmp_path: Path) -> None:
    path = numbered(tmp_path / "rows.jsonl", range(3))
    (file,) = sources.open_source(Source(path=str(path)))
    path.unlink()
    for use in (lambda: file.digest, lambda: list(file.rows())):
        with pytest.raises(DataError) as caught:
            use()
        assert meanings(caught.value) == [(Code.DATA_UNREADABLE, str(path), "")]
        assert "No such file" in str(caught.value)


# Rows that a program holds in memory

PAIRS: list[dict[str, Any]] = [{"prompt": f"p{number}", "completion": "c", "n": number} for number in range(5)]
FILE = {"bytes": b"not an image", "path": None}
WIDE = [row | {"image": FILE, "more": [FILE]} for row in PAIRS]
MEDIA = datasets.Features(
    {"prompt": datasets.Value("string"), "completion": datasets.Value("string"), "n": datasets.Value("int64")}
    | {"image": datasets.Image(), "more": datasets.List(datasets.Image())}
)
GIVEN: dict[str, Callable[[], Any]] = {
    "dicts": lambda: PAIRS,
    "a generator": lambda: iter(PAIRS),
    "a dataset": lambda: datasets.Dataset.from_list(PAIRS),
    "a dataset of tensors": lambda: datasets.Dataset.from_list(PAIRS).with_format("numpy"),
    "columns of a dataset": lambda: datasets.Dataset.from_list(WIDE).with_format("torch", columns=["n", *VALUES]),
    "all columns of a dataset": lambda: datasets.Dataset.from_list(PAIRS).with_format(
        "numpy", columns=["n"], output_all_columns=True
    ),
    "selected rows of a dataset": lambda: datasets.Dataset.from_list([*PAIRS[2:], *PAIRS[:2]]).select([3, 4, 0, 1, 2]),
    "a dataset with media": lambda: datasets.Dataset.from_list(WIDE).cast(MEDIA),
    "a frame": lambda: pandas.DataFrame(PAIRS),
    "a frame of Arrow's types": lambda: pandas.DataFrame(PAIRS).convert_dtypes(dtype_backend="pyarrow"),
    "a frame with an index": lambda: pandas.DataFrame(PAIRS).set_index("prompt"),
    "numpy's numbers": lambda: [row | {"n": np.int64(row["n"])} for row in PAIRS],
}


@pytest.mark.parametrize("kind", GIVEN)
def test_rows_in_memory_are_read(kind: str, tmp_path: Path) -> None:
    """Positions count from 0 as in Python. The digest depends only on the content, and progress adds up."""
    rows, advances = sources.given_rows(GIVEN[kind](), "train"), list[int]()
    assert list(rows.rows(advances.append)) == [Row(f"train[{n}]", row) for n, row in enumerate(PAIRS)]
    assert sum(advances) == rows.size == 5 and sources.open_source(rows) == [rows]
    assert rows.digest == sources.given_rows(PAIRS, "other").digest != sources.given_rows(PAIRS[1:], "train").digest
    section = DataSection(train=Source(path=sources.GIVEN), validation=0.4)
    read = data.read_datasets(section, 0, given={"train": rows})
    written = data.read_datasets(
        section.model_copy(update={"train": Source(path=str(write_rows(tmp_path / "r.jsonl", PAIRS)))}), 0
    )
    assert read.validation is not None and written.validation is not None
    places = [example.where for example in read.validation.examples()]
    lines_of_file = [int(line_of(example.where)) - 1 for example in written.validation.examples()]
    assert places == [f"train[{number}]" for number in lines_of_file] and len(places) == 2
    assert list(read.train.own_fields()) == [f"train[{number}]" for number in range(5)]


def test_values_in_memory_are_converted() -> None:
    """Missing values of a data frame become null; tuples and arrays become lists at any depth."""
    frame = pandas.DataFrame({"a": [1, None], "b": ["x", None], "c": [np.array([{"d": (1, 2)}], dtype=object), None]})
    first, second = (row.values for row in sources.given_rows(frame, "rows").rows() if isinstance(row, Row))
    assert first == {"a": 1, "b": "x", "c": [{"d": [1, 2]}]} and second == {"a": None, "b": None, "c": None}


def test_a_number_of_too_many_digits_in_an_unread_field_is_as_a_value_that_cannot_be_read() -> None:
    rows = [row | {"n": [{"more": 10**5000}]} for row in PAIRS]
    read = data.read_datasets(
        DataSection(train=Source(path=sources.GIVEN)), 0, given={"train": sources.given_rows(rows, "train")}
    )
    assert len([*read.train.examples()]) == len(PAIRS)
    assert sources.given_rows(rows, "train").digest != sources.given_rows(PAIRS, "train").digest


def test_invalid_rows_in_memory_are_refused() -> None:
    wrongs: list[Any] = ["rows.jsonl", {"prompt": []}, 3, None]
    for wrong in wrongs:
        with pytest.raises(DataError, match=r"a list of dicts, a datasets\.Dataset or a pandas frame"):
            sources.given_rows(wrong, "train")
    dataset, names = datasets.Dataset.from_list(PAIRS), ["prompt", "completion", "completion"]
    unread = {
        "from_list": dataset.to_iterable_dataset(),
        "['train']": datasets.DatasetDict({"train": dataset}),
        "map": dataset.with_transform(lambda rows: {name: values[::-1] for name, values in rows.items()}),
        "`completion`": pandas.DataFrame([["a", "b", "c"]], columns=names),
        "`0`": pandas.DataFrame([["a", "b"]], columns=[0, "0"]),
        "`prompt`": pandas.DataFrame(PAIRS, index=pandas.Index([*"abcde"], name="prompt")),
    }
    for part, wrong in unread.items():
        with pytest.raises(DataError, match=re.escape(part)):
            sources.given_rows(wrong, "train")
    section = DataSection(train=Source(path=sources.GIVEN))
    refused = {
        "train[0]": ([{0: "a", "0": "b"}], Code.DATA_SYNTAX),
        "train[1]": ([PAIRS[0], "text"], Code.DATA_SYNTAX),
        "train[2]": ([*PAIRS[:2], {"prompt": "a"}], Code.DATA_FIELD),
        "train[3]": ([*PAIRS[:3], {"prompt": "a", "completion": 10**5000}], Code.DATA_FIELD),
        "train": ([], Code.DATA_EMPTY),
    }
    for where, (rows, code) in refused.items():
        with pytest.raises(DataError) as caught:
            data.read_datasets(section, 0, given={"train": sources.given_rows(rows, "train")})
        assert meanings(caught.value) == [(code, where, "")]
    with pytest.raises(DataError, match="a program gave these rows") as caught:
        data.read_datasets(section, 0)
    many = [*PAIRS[:1], *[{"prompt": "a"}] * 5]
    with pytest.raises(DataError, match=r"\(and 4 more rows: 2, 3, 4, 5\)"):
        data.read_datasets(section, 0, given={"train": sources.given_rows(many, "train")})
