"""Long texts become blocks (`truncation: split`, `stride`), and text files become rows (`sample_by`)."""

import gzip
import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROWS, config_in, mainly, meanings, write_rows
from fork_server import ForkServer
from running import WEIGHTS, Cli, MakeConfig, interrupt
from test_preparing import checked, prepared
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from loratune import config, data
from loratune.codes import Code
from loratune.compare.engine import WeightedObjective, WeightedRows
from loratune.compare.metrics import RowLosses
from loratune.config import Source
from loratune.data import TokenizedDataset, sources
from loratune.data.rendering import Renderer
from loratune.data.rendering.spans import TokenizedRow
from loratune.data.rendering.truncation import split
from loratune.data.sources.rows import Row
from loratune.errors import DataError
from loratune.statistics import mean_ratio_interval
from loratune.training import auto

EOS = 256


@pytest.fixture
def renderer(tokenizer: PreTrainedTokenizerFast) -> Renderer:
    return Renderer(tokenizer)


def words(count: int, seed: int = 0) -> str:
    """Text of this many bytes, and so many tokens, with lines and paragraphs."""
    random = np.random.default_rng(seed)
    text = "".join(random.choice(list("abcdefgh   \n"), count))
    return text.replace("  ", " ,").strip().ljust(count, ".")


def blocks(dataset: TokenizedDataset) -> list[list[TokenizedRow]]:
    """The blocks of each row."""
    found: list[list[TokenizedRow]] = []
    for row in dataset.rows.rows():
        found += [] if row.block else [[]]
        found[-1].append(row)
    return found


# Blocks


@pytest.mark.parametrize("stride", [0, 1, 15, 39])
@pytest.mark.parametrize("tokens", [41, 42, 79, 80, 81, 120, 1001])
def test_blocks_cover_a_row_and_supervise_each_token_once(tokens: int, stride: int) -> None:
    row = TokenizedRow("a:1", tuple(range(tokens)), ((0, tokens),), weight=2.0)
    found = [*split(row, 40, stride)]
    assert all(len(block.ids) <= 40 and block.weight == 2 and block.where == "a:1" for block in found)
    assert all(len(block.ids) == 40 for block in found[:-1]) and len(found[-1].ids) >= 32
    labels = [[label for label in block.labels if label >= 0] for block in found]
    supervised = [label for block in labels for label in block]
    assert all(labels) and supervised == sorted(set(supervised))
    alone = {block.ids[0] for block in found if block.spans[0][0] == 0}  # nothing is before them
    assert {*range(tokens)} - {*supervised} == alone
    assert len(alone) <= (1 if stride else len(found))
    for block, after in pairwise(found[:-1]):
        assert len({*block.ids} & {*after.ids}) == stride


def test_repeated_tokens_do_not_weigh_as_prompts(renderer: Renderer, tmp_path: Path) -> None:
    """A last block that is extended has them without a stride too; the tokens of a prompt weigh."""
    path = write_rows(tmp_path / "rows.jsonl", [{"text": words(90)}, {"text": words(50, 1)}, {"text": "ab"}])
    section = config.DataSection(train=Source(path=str(path)), max_length=40, prompt_loss_weight=0.1)
    dataset = data.prepare(data.read_datasets(section, 0).train, renderer, section, 264)
    items = WeightedObjective(0.1).training_items(dataset)
    found = [items[number] for number in range(len(items))]
    weighing = [
        [weight for weight, label in zip(row["weights"], row["labels"], strict=True) if label >= 0] for row in found
    ]
    assert [len(row["labels"]) for row in found] == [40, 40, 32, 40, 32, 3]
    assert [*map(len, weighing)] == [39, 39, 11, 39, 11, 2] and {weight for row in weighing for weight in row} == {1.0}
    rows = dataset.rows
    asked = WeightedRows([{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}], None, 0.1, rows.owners)[0]
    assert asked["labels"] == [-100, 2, 3] and asked["weights"][1:] == [0.1, 1.0]


def test_spans_of_given_ids_are_divided() -> None:
    spans = ((0, 3), (5, 90), (95, 96), (120, 121))
    found = [*split(TokenizedRow("a:1", tuple(range(125)), spans), 40, 2)]
    labels = [label for block in found for label in block.labels if label >= 0]
    assert labels == [*range(1, 3), *range(5, 90), 95, 120]


def test_a_million_tokens_are_split_in_linear_time() -> None:
    def seconds(tokens: int) -> float:
        spans = tuple((place, place + 1) for place in range(0, tokens, 2))
        start = time.process_time()
        count = sum(len(block.spans) for block in split(TokenizedRow("a:1", tuple(range(tokens)), spans), 100, 10))
        assert count == tokens // 2
        return time.process_time() - start

    seconds(10_000)
    assert seconds(400_000) < 10 * 4 * max(seconds(100_000), 0.02) / 4


FORMATS: dict[str, tuple[list[dict[str, Any]], int, int]] = {
    "text": ([{"text": words(100)}, {"text": "ab"}], 4, 0),
    "text of max_length": ([{"text": words(39)}], 1, 0),
    "text of one token more": ([{"text": words(40)}], 2, 0),
    "prompt": ([{"prompt": words(100), "completion": "b"}], 1, 1),
    "chat": ([{"messages": [{"role": "user", "content": words(100)}, {"role": "assistant", "content": "b"}]}], 1, 1),
    "input_ids": ([{"input_ids": [*range(100)]}], 1, 1),
}
"""Rows → rows of tokens, and truncated ones, with `max_length` 40."""


@pytest.mark.parametrize(("rows", "count", "truncated"), FORMATS.values(), ids=FORMATS)
def test_by_default_texts_are_split_and_other_rows_are_cut(
    rows: list[dict[str, Any]], count: int, truncated: int, renderer: Renderer, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    dataset = prepared(renderer, path, max_length=40)
    report = dataset.report
    assert (len(dataset.rows), report.truncated, report.rows) == (count, truncated, len(rows))
    assert bool(report.cut_tokens) == bool(truncated)
    assert bool(report.splits()) == bool(report.blocks) == (count > len(rows))
    assert dataset.count_rows(range(dataset.items)) == len(rows)
    cut = prepared(renderer, path, max_length=40, truncation="keep_completion")
    assert len(cut.rows) == len(rows) and all(len(row.ids) <= 40 for row in cut.rows.rows())
    assert (cut.fingerprint == dataset.fingerprint) == (count == len(rows))


def test_blocks_are_the_tokens_of_the_text(renderer: Renderer, tmp_path: Path) -> None:
    texts = [words(200), "", "short", words(95, 1)]
    path = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    dataset = prepared(renderer, path, max_length=32)
    whole = prepared(renderer, path, max_length=1000)
    new = [[id for row in one for id in row.ids[row.spans[0][0] :]] for one in blocks(dataset)]
    assert new == [[*row.ids] for row in whole.rows.rows()]
    assert [one[-1].ids[-1] for one in blocks(dataset)] == [renderer.eos] * 3
    assert sum(row.ids.count(renderer.eos) for row in dataset.rows.rows()) == 3
    report = dataset.report
    assert (report.rows, report.split_rows, report.blocks, report.dropped_rows) == (4, 2, 10, 1)
    assert report.tokens - report.repeated == whole.report.tokens and report.repeated == 23
    assert report.supervised == whole.report.tokens - 10  # each block begins with a token that nothing is before
    (line,) = report.splits()
    assert line.startswith("2 rows split into 10 blocks, as they exceed data.max_length; 23 ")
    overlapping = prepared(renderer, path, max_length=32, stride=8)
    assert overlapping.report.supervised == whole.report.supervised
    assert overlapping.report.repeated == overlapping.report.tokens - whole.report.tokens > 23
    assert "repeated, without loss" in overlapping.report.splits()[0]
    assert len({dataset.fingerprint, whole.fingerprint, overlapping.fingerprint}) == 3
    again = prepared(renderer, path, max_length=32)
    assert again.fingerprint == dataset.fingerprint and [*again.rows.owners] == [0] * 7 + [1] + [2] * 3  # type: ignore[misc]


def test_only_a_text_begins_with_bos(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    inner = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    bos = tokenizer.convert_ids_to_tokens(257)
    inner.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 257)])
    renderer = Renderer(PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token="<|endoftext|>"))
    path = write_rows(tmp_path / "rows.jsonl", [{"text": words(100)}])
    rows = [*prepared(renderer, path, max_length=40, stride=4).rows.rows()]
    assert [row.ids[0] == 257 for row in rows] == [True] + [False] * (len(rows) - 1)
    assert sum(row.ids.count(257) for row in rows) == 1


def test_given_ids_are_split_if_asked(renderer: Renderer, tmp_path: Path) -> None:
    ids = [*range(100)]
    labels = [-100 if 20 <= id < 70 else id for id in ids]
    path = write_rows(tmp_path / "rows.jsonl", [{"input_ids": ids}, {"input_ids": ids, "labels": labels}])
    first, second = blocks(prepared(renderer, path, max_length=20, truncation="split"))
    assert [len(row.ids) for row in first] == [20] * 5
    assert [row.ids[0] for row in second] == [0, 60, 80] and [row.block for row in second] == [0, 1, 2]


def test_rows_with_a_prompt_are_not_split(renderer: Renderer, tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a" * 99, "completion": "b"}]
    )
    for invalid_rows in ("error", "drop"):
        with pytest.raises(DataError) as caught:
            prepared(renderer, path, max_length=40, truncation="split", invalid_rows=invalid_rows)
        assert meanings(caught.value) == [(Code.DATA_TOO_LONG, f"{path}:2", "data.truncation")]


CONFLICTS: dict[str, tuple[dict[str, Any], str]] = {
    "stride of max_length": ({"stride": 16, "max_length": 16}, "data.stride and data.max_length"),
    "stride without blocks": ({"stride": 1, "truncation": "drop"}, "data.stride and data.truncation"),
    "stride of rows that are not split": ({"stride": 1, "format": "prompt_completion"}, "data.stride and data.format"),
    "prompts of texts": ({"prompt_loss_weight": 0.5, "format": "text"}, "data.prompt_loss_weight and data.format"),
    "split of chats": ({"truncation": "split", "format": "messages"}, "data.truncation and data.format"),
    "negative stride": ({"stride": -1}, "data.stride"),
}


@pytest.mark.parametrize(("values", "key"), CONFLICTS.values(), ids=CONFLICTS)
def test_conflicts_are_config_errors(values: dict[str, Any], key: str, run_config: MakeConfig, cli: Cli) -> None:
    ran = cli("train", run_config(data=values))
    assert ran.code == 2 and f": {key}: " in ran.errors[0], ran.err


@pytest.mark.parametrize("size", [None, 1, 99])
def test_settings_without_effect_on_the_rows_are_reported(
    size: int | None, run_config: MakeConfig, cli: Cli, tmp_path: Path, untraced: None
) -> None:
    """A stride without blocks; a weight of prompts, for texts. size: words of each text; None: rows with a prompt."""
    rows = ROWS if size is None else [{"text": words(size, number)} for number in range(8)]
    given = {"train": str(write_rows(tmp_path / "given.jsonl", rows)), "max_length": 48}
    ran = cli("train", run_config(data=given | {"stride": 4}), "--dry-run")
    assert ran.code == 0 and ("data.stride has no effect" in ran.out) == (size != 99), ran.err
    ran = cli("train", run_config(data=given | {"prompt_loss_weight": 0.5}), "--dry-run")
    assert ran.code == 0 and ("data.prompt_loss_weight has no effect" in ran.out) == (size is not None), ran.err


# Splits, scores and training


def test_the_blocks_of_a_text_stay_in_one_split(renderer: Renderer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": words(100 + number, number)} for number in range(50)])
    datasets = checked(str(path), validation=0.2)
    parts = [
        data.prepare(part, renderer, part.section.model_copy(update={"max_length": 32}), 264)
        for part in datasets.splits.values()
    ]
    places = [{row.where for row in part.rows.rows()} for part in parts]
    assert not places[0] & places[1] and [len(one) for one in places] == [40, 10]
    assert [part.count_rows(range(part.items)) for part in parts] == [40, 10]


def test_losses_of_blocks_are_added_up() -> None:
    losses = RowLosses.of([1, 2, 4, 8], [1, 1, 2, 3], [2, 2, 1, 1]).of_rows(np.array([3, 3, 5, 7]))
    assert (losses.nats.tolist(), losses.tokens.tolist(), losses.copies.tolist()) == ([3, 4, 8], [2, 2, 3], [2, 1, 1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, processes: ForkServer, tiny_dir: Path) -> Path:
    """The directory of a run on text files, with `docs`, `run.yaml` and `out`."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "docs").mkdir()
    for number in range(12):
        (folder / "docs" / f"{number}.md").write_text(words(150 + 20 * number, number))
    make = config_in(folder, tiny_dir)
    section = {"train": str(folder / "docs"), "validation": 0.5, "max_length": 64, "stride": 8}
    child = processes.start("train", make(data=section, training={"max_steps": 3, "per_device_train_batch_size": 4}))
    assert child.wait() == 0, child.said()
    (folder / "err").write_text(child.said())
    return folder


def test_training_counts_documents_and_blocks(trained: Path) -> None:
    record = json.loads((trained / "out" / "loratune.json").read_text())
    rows = record["splits"]["train"]
    assert rows["rows"] == 6 == rows["split"] and rows["blocks"] > 20
    assert record["metrics"]["gain"]["rows"] == record["metrics"]["gain"]["total"] == 6


def test_evaluate_gives_the_loss_of_documents(trained: Path, cli: Cli, tmp_path: Path, renderer: Renderer) -> None:
    """A document has the loss of all its blocks; a copy counts twice; intervals are over documents."""
    folder = tmp_path / "docs"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.md").write_text(words(30 + 40 * (number % 7), number % 7))
    ran = cli("evaluate", "--adapter", trained / "out", "--data", folder, "--output", tmp_path / "rows.jsonl", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["base"]["rows"] == 8
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all(row["prompt"] is None and row["expected"] is None for row in rows)
    section = {"max_length": 64, "stride": 8}
    parts = [row for row in prepared(renderer, folder, **section).rows.rows()]
    given = write_rows(tmp_path / "ids.jsonl", [{"input_ids": row.ids, "labels": row.labels} for row in parts])
    alone = json.loads(cli("evaluate", "--adapter", trained / "out", "--data", given, "--json").out)
    for model in ("base", "adapter"):
        assert found[model]["loss"] == pytest.approx(alone[model]["loss"], rel=1e-5)
        tokens = sum(row["tokens"] * row[model]["loss"] for row in rows)
        assert tokens / sum(row["tokens"] for row in rows) == pytest.approx(found[model]["loss"], rel=1e-5)
    assert found["base"]["tokens"] == alone["base"]["tokens"] == sum(row.supervised for row in parts)


COPIES = {
    "split": (40, [1.0]),
    "split, four times": (40, [1.0] * 4),
    "whole, with weights": (512, [3.0]),
    "split, with weights": (40, [0.2]),
    "whole, twice with different weights": (512, [0.01, 9.01]),
    "split, twice with different weights": (40, [9.01, 0.01]),
    "split, twice without weight": (40, [2.0, 0.0, 0.0]),
}
"""`max_length`, and the weights of the copies of each of twelve texts, each times the number of the text."""


@pytest.mark.parametrize("copies", mainly(("split", "whole, twice with different weights"), COPIES))
def test_copies_of_weighted_texts_are_counted(
    copies: str, run_config: MakeConfig, cli: Cli, tmp_path: Path, trained: Path
) -> None:
    """Gain, held-out loss, test rows and `evaluate` agree on losses, and count rows and supervised tokens."""
    length, weights = COPIES[copies]
    is_weighted = weights != [1.0] * len(weights)
    held_out = [
        {"text": words(15 + 10 * number, number), "importance": weight * (number + 1 if is_weighted else 1)}
        for weight in weights
        for number in range(12)
    ]
    path = str(write_rows(tmp_path / "held.jsonl", held_out))
    data = {"validation": path, "test": path, "train": str(trained / "docs"), "max_length": length}
    if is_weighted:
        train = [{"text": words(100, number), "importance": 1} for number in range(8)]
        data |= {"columns": {"weight": "importance"}, "train": str(write_rows(tmp_path / "train.jsonl", train))}
    ran = cli("train", run_config(data=data, training={"max_steps": 2}), "--allow-worse")
    assert ran.code == 0, ran.err
    out = tmp_path / "scored.jsonl"
    scored = cli("evaluate", "--adapter", tmp_path / "out", "--data", path, "--json", "--output", out)
    assert scored.code == 0, scored.err
    found = json.loads(scored.out)["adapter"]
    metrics = json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]
    gain, test = metrics["gain"], metrics["test"]
    weighing = [weight for weight in weights if weight]
    count = 12 * len(weighing)
    distinct = 12 * len(set(weighing))
    assert (gain["rows"], gain["drawn"], gain["total"]) == (distinct, count, count)
    assert (test["rows"], test["distinct"], found["rows"]) == (count, distinct, count)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    numbers = [number for number, row in enumerate(held_out) if row["importance"]][:distinct]
    assert [row["number"] for row in rows] == [number for number in numbers for _ in range(count // distinct)]
    assert found["tokens"] == test["tokens"] == sum(row["tokens"] for row in rows)
    counts = np.array([held_out[row["number"]]["importance"] * row["tokens"] for row in rows])
    nats = counts * [row["adapter"]["loss"] for row in rows]
    for loss in (found["loss"], test["loss"], gain["adapter"], metrics["held_out_loss"]):
        assert loss == pytest.approx(nats.sum() / counts.sum(), rel=1e-5)
    nats, counts = (one.reshape(distinct, -1).sum(1) for one in (nats, counts))
    interval = mean_ratio_interval(nats, counts)
    assert interval is not None
    assert gain["adapter_high"] - gain["adapter_low"] == pytest.approx(interval.high - interval.low, rel=0.1)


def test_overlapping_and_given_documents_may_weigh(renderer: Renderer, tmp_path: Path) -> None:
    rows = [{"text": words(100), "importance": 3}, {"text": words(20)}]
    path = write_rows(tmp_path / "rows.jsonl", [row | {"importance": row.get("importance", 1)} for row in rows])
    dataset = prepared(renderer, path, max_length=40, columns={"weight": "importance"})
    assert dataset.rows.weights is not None and dataset.rows.weights.tolist() == [3, 3, 3, 1]


@pytest.mark.parametrize("packing", mainly(["batch"], ["batch", "full", "none"]))
def test_a_run_on_blocks_is_resumed_exactly(
    packing: str, trained: Path, run_config: MakeConfig, processes: ForkServer, cli: Cli, tmp_path: Path
) -> None:
    section = {"train": str(trained / "docs"), "max_length": 48, "stride": 4, "packing": packing}
    training = {"max_steps": 4, "save_steps": 1, "per_device_train_batch_size": 2}
    whole = run_config("whole.yaml", data=section, training=training, output_dir=str(tmp_path / "whole"))
    assert cli("train", whole).code == 0
    path = run_config(data=section, training=training)
    interrupt(processes, path, tmp_path / "out.partial")
    ran = cli("train", path, "--resume")
    assert ran.code == 0, ran.err
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    ran = cli(
        "train", run_config("other.yaml", data=section | {"stride": 0}, output_dir=str(tmp_path / "out")), "--dry-run"
    )
    assert ran.code == 0 and " split into " in ran.out, ran.err


def test_the_default_of_earlier_releases_is_kept_on_resume(run_config: MakeConfig) -> None:
    run = config.load(run_config(), [])
    recorded = run.model_dump(mode="json")
    recorded["data"]["truncation"] = "keep_completion"
    for values, expected in ((recorded, "keep_completion"), (run.model_dump(mode="json"), config.AUTO)):
        assert auto.with_decided(run, auto.recorded_values(values))[0].data.truncation == expected


# Text files


TEXT = "\ufeffone\r\ntwo \r\n\r\n \t\n  three\n\n\nfour\nfive"
SAMPLED: dict[str, list[tuple[int, str]]] = {
    "line": [(1, "one"), (2, "two "), (5, "  three"), (8, "four"), (9, "five")],
    "paragraph": [(1, "one\ntwo "), (5, "  three"), (8, "four\nfive")],
    "document": [(1, TEXT[1:].replace("\r\n", "\n"))],
}


@pytest.mark.parametrize("sample_by", [*SAMPLED, "auto"])
@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.RST", "a.py.gz"])
def test_rows_of_text_files(name: str, sample_by: str, tmp_path: Path) -> None:
    path = tmp_path / name
    content = TEXT.encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    expected = SAMPLED[sample_by if sample_by != "auto" else "line" if name == "a.txt" else "document"]
    (part,) = sources.open_source(Source(path=str(path)), sample_by)
    assert [*part.rows()] == [Row(f"{path}:{line}", {"text": text}) for line, text in expected]
    digests = [sources.open_source(Source(path=str(path)), one)[0].digest for one in SAMPLED]
    assert len({*digests}) == 3 and part.digest in digests


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_blank_documents_have_no_row(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(content)
    with pytest.raises(DataError) as caught:
        sources.read_rows(Source(path=str(tmp_path)))
    assert meanings(caught.value) == [(Code.DATA_EMPTY, str(tmp_path), "")]


def test_invalid_bytes_are_refused_or_dropped(renderer: Renderer, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(b"one\ntw\xffo\n\nthree")
    (tmp_path / "b.md").write_text("four")
    for sample_by, rows in (("document", 1), ("paragraph", 2), ("line", 3)):
        with pytest.raises(DataError) as caught:
            checked(str(tmp_path), sample_by=sample_by)
        assert meanings(caught.value) == [(Code.DATA_SYNTAX, f"{tmp_path}/a.md:2", "")]
        assert "byte 3 of the line (0xff)" in str(caught.value)
        dropped = checked(str(tmp_path), sample_by=sample_by, invalid_rows="drop").train
        assert len(dropped) == rows and dropped.invalid is not None and dropped.invalid.dropped_rows == 1
        assert len(prepared(renderer, tmp_path, sample_by=sample_by, invalid_rows="drop").rows) == rows


DIRECTORIES: dict[str, tuple[list[str], str, list[str], str]] = {
    "documents": (["a.md", "b.py", "c.bin"], "auto", ["a.md", "b.py"], "c.bin"),
    "rows with a README": (["README.md", "a.jsonl", "b.txt"], "auto", ["a.jsonl", "b.txt"], "README.md"),
    "rows with a README, documents": (["README.md", "a.jsonl"], "document", ["README.md"], "reads only text files"),
    "rows with a README, lines": (["README.md", "a.jsonl"], "line", ["a.jsonl"], "documents are not rows"),
    "lines with a README": (["README.md", "a.txt"], "auto", ["a.txt"], "data.sample_by: document reads them"),
    "all texts": (["README.md", "a.txt"], "document", ["README.md", "a.txt"], ""),
}


@pytest.mark.parametrize("glob", [False, True])
@pytest.mark.parametrize(("names", "sample_by", "read", "note"), DIRECTORIES.values(), ids=DIRECTORIES)
def test_files_of_directories(
    names: list[str], sample_by: str, read: list[str], note: str, glob: bool, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).write_text('{"text": "a"}')
    source = Source(path=str(tmp_path / "*") if glob else str(tmp_path))
    assert [Path(part.name).name for part in sources.open_source(source, sample_by)] == read
    assert note in sources.left_out(source, sample_by) and bool(note) == bool(sources.left_out(source, sample_by))


def test_each_file_is_read_once_and_the_others_are_explained(tmp_path: Path) -> None:
    """Regression: two links to their own directory took hours in a glob, and one gave 41 copies of each file."""
    docs = tmp_path / "docs"
    (docs / "src" / "deep").mkdir(parents=True)
    (docs / "images").mkdir()
    for name in ("b.md", "src/c.md", "src/deep/d.md", "logo.png"):
        (docs / name).write_text(name)
    for name, target in (
        ("loop", "."),
        ("loop2", "../docs"),
        ("a.md", "b.md"),
        ("broken.md", "no"),
        ("self.md", "self.md"),
    ):
        (docs / name).symlink_to(target)
    os.mkfifo(docs / "pipe.md")
    found = {
        str(docs): ["b.md"],
        f"{docs}/*": ["b.md"],
        f"{docs}/**/*.md": ["b.md", "src/c.md", "src/deep/d.md"],
        f"{docs}/**/deep/**": ["src/deep/d.md"],
        f"{docs}/*/b.md": ["loop/b.md"],
        f"{tmp_path}/**/src/**/*": ["src/c.md", "src/deep/d.md"],
    }
    for path, names in found.items():
        read = sources.open_source(Source(path=path))
        assert [str(Path(part.name).relative_to(docs)) for part in read] == names, path
    special = "broken.md, pipe.md, self.md (broken links and special files are not read)"
    line = sources.left_out(Source(path=str(docs)), "document")
    assert (
        special in line
        and "a.md (other names of files that are read)" in line
        and "logo.png (files that end in" in line
    )
    assert f"images/, loop/, loop2/, src/ (subfolders are not read, except by a glob such as {docs}/**/*.md)" in line
    line = sources.left_out(Source(path=f"{docs}/**/*"))
    assert "images/, loop/, loop2/ (links to folders, and folders without data files)" in line
    (only,) = sources.open_source(Source(path=f"{tmp_path}/**/b.md"))
    assert only.name == str(docs / "b.md")
    (docs / "b.md").unlink()
    with pytest.raises(DataError, match=r"or a glob such as .*docs/\*\*/\*\.md"):
        sources.open_source(Source(path=str(docs)))


def test_documents_next_to_a_file_that_holds_no_rows(
    tiny_dir: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    for name in ("a.md", "b.md", "c.py"):
        (tmp_path / "docs" / name).write_text(words(100))
    (tmp_path / "docs" / "empty.md").write_text("\n")
    (tmp_path / "docs" / "package.json").write_text('{"name": "a", "version": "1.0"}')
    ran = cli("init", "docs", "--model", tiny_dir)
    assert ran.code == 4 and "fit no format" in ran.err
    assert "docs/*.md, or data.sample_by: document, reads them alone" in ran.err
    ran = cli("init", "docs", "--model", tiny_dir, "--set", "data.sample_by=document")
    assert ran.code == 0, ran.err
    assert "rows     3: texts" in ran.out
    assert "1 file without rows: docs/empty.md" in ran.out and "not read: package.json" in ran.out
    ran = cli("train", "config.yaml", "--set", "data.sample_by=auto", "--dry-run")
    assert ran.code == 4 and "docs/*.md, or data.sample_by: document, reads them alone" in ran.err


def test_a_setting_for_text_files_without_any_is_reported(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    (line,) = checked(str(path), sample_by="document").train.notes
    assert "data.sample_by has no effect" in line and checked(str(path)).train.notes == ()
    (tmp_path / "README.md").write_text("a")
    (line,) = checked(str(tmp_path), sample_by="line").train.notes
    assert "data.sample_by has no effect" in line and "not read: README.md" in line


def test_files_of_a_recursive_glob(tmp_path: Path) -> None:
    for name in ("a.rst", "b/c.rst", "b/d/e.rst", "b/f.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    rows = sources.read_rows(Source(path=f"{tmp_path}/**/*.rst", split="train[1:]"))
    assert [row.values["text"] for row in rows] == ["b/c.rst", "b/d/e.rst"]


# init


def test_init_proposes_documents_and_blocks(
    tiny_dir: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, ending in (("docs", "md"), ("texts", "txt")):
        (tmp_path / folder).mkdir()
        for number in range(60):
            (tmp_path / folder / f"{'train' if number == 1 and ending == 'md' else number}.{ending}").write_text(
                words(30 * number + 20, number)
            )
    for folder, count in (("docs", 60), ("texts", 60)):
        ran = cli("init", folder, "--model", tiny_dir, "--output", f"{folder}.yaml")
        assert ran.code == 0, ran.err
        values = yaml.safe_load(Path(f"{folder}.yaml").read_text())["data"]
        assert values["sample_by"] == "document" and values["max_length"] == 512  # the context
        assert f"{count}: texts, in " in ran.out
    ran = cli("train", "docs.yaml", "--set", "training.max_steps=1")
    assert ran.code == 0, ran.err
    one = tmp_path / "one.txt"
    one.write_text("a b c\n" * 3)
    assert cli("init", one, "--model", tiny_dir, "--output", "one.yaml").code == 0
    assert "sample_by" not in yaml.safe_load(Path("one.yaml").read_text())["data"]
    assert (
        cli("init", "docs", "--model", tiny_dir, "--output", "set.yaml", "--set", "data.sample_by=paragraph").code == 0
    )
    assert yaml.safe_load(Path("set.yaml").read_text())["data"]["sample_by"] == "paragraph"


def test_blocks_are_replayed_and_mixed_with_chats(
    trained: Path, run_config: MakeConfig, cli: Cli, tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": words(100)}, {"role": "assistant", "content": "b"}]
    rows = write_rows(tmp_path / "chats.jsonl", [{"messages": chat}] * 3)
    section = {"train": [{"path": str(rows)}, {"path": str(trained / "docs")}], "max_length": 64, "replay": 0.3}
    ran = cli(
        "train",
        run_config(data=section, lora={"start_from": str(trained / "out")}, training={"max_steps": 1}),
    )
    assert ran.code == 0, ran.err
    assert " rows split into " in ran.err and "are replayed from" in ran.err
    counts = json.loads((tmp_path / "out" / "loratune.json").read_text())["splits"]["train"]
    assert counts["truncated"] == 3 and counts["split"] == 12
