"""From validated rows to tokenized ones: which rows are used, what is counted, and what is cached on disk."""

import copy
import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import CHAT_TEMPLATE, ROWS, check_refused, is_problem, meanings, problem_text, tiny_llama, write_rows
from fork_server import ForkServer
from running import Cli, MakeConfig, until
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from loratune import data
from loratune.codes import Code
from loratune.config import DataSection
from loratune.data import TokenizedDataset, example_tokenizer, token_cache
from loratune.data.formats import Plain
from loratune.data.rendering import Renderer
from loratune.data.report import Report, RowTally
from loratune.errors import DataError, Problem

VOCABULARY = 264


def checked(path: Path | str | list[Any], seed: int = 0, **section: Any) -> data.RawDatasets:
    return data.read_datasets(DataSection.model_validate({"train": path, "max_dropped": 1.0} | section), seed)


def prepared(renderer: Renderer, path: Path | str | list[Any], **section: Any) -> TokenizedDataset:
    rows = checked(str(path) if isinstance(path, Path) else path, **section)
    return data.prepare(rows.train, renderer, rows.train.section, VOCABULARY)


def prompts(part: data.DatasetSplit | None) -> list[str]:
    assert part is not None
    return [example.prompt for example in part.examples() if isinstance(example, Plain)]


@pytest.fixture
def renderer(tokenizer: PreTrainedTokenizerFast) -> Renderer:
    return Renderer(tokenizer)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    path = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path)
    return path / "loratune"


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


# Which rows are used


def numbered(path: Path, count: int, letter: str = "p") -> Path:
    return write_rows(path, ({"prompt": f"{letter}{number}", "completion": "c"} for number in range(count)))


def test_several_sources_are_read_in_order_with_their_formats(tmp_path: Path) -> None:
    numbered(tmp_path / "a.jsonl", 2)
    (tmp_path / "b.csv").write_text("completion,prompt\nc,q0\n")
    (tmp_path / "c.txt").write_text("one\ntwo\n")
    rows = checked([str(tmp_path / "a.jsonl"), str(tmp_path / "[bc].*")])
    assert prompts(rows.train) == ["p0", "p1", "q0", "", ""]
    assert (rows.train.formats, len(rows.train), rows.validation) == (["prompt_completion", "text"], 5, None)
    assert checked(str(tmp_path / "a.jsonl")).train.formats == ["prompt_completion"]


def test_source_weights_set_the_proportions(tmp_path: Path) -> None:
    paths = [numbered(tmp_path / f"{letter}.jsonl", count, letter) for letter, count in (("a", 30), ("b", 100))]
    sources = [{"path": str(path), "weight": weight} for path, weight in zip(paths, (3, 1), strict=True)]
    rows = checked(sources)
    letters = [prompt[0] for prompt in prompts(rows.train)]
    assert (letters.count("a"), letters.count("b")) == (30, 10)
    assert rows.train.notes == (f"mixed: {paths[0]}: 30 of 30 rows", f"mixed: {paths[1]}: 10 of 100 rows")
    assert prompts(checked(sources).train) == prompts(rows.train) != prompts(checked(sources, seed=1).train)
    assert checked(sources).train.digest == rows.train.digest != checked(sources, seed=1).train.digest
    assert len(set(prompts(rows.train))) == 40


@pytest.mark.parametrize(
    ("counts", "weights", "expected"),
    [
        ((10, 10), (1.0, 1.0), [10, 10]),
        ((10, 1000), (1.0, 3.0), [10, 30]),
        ((1000, 10), (0.5, 0.25), [20, 10]),
        ((7, 1000), (0.7, 0.3), [7, 3]),
        ((5, 100), (1e6, 1e-6), [5, 1]),
    ],
)
def test_how_many_rows_weights_use(
    counts: tuple[int, ...], weights: tuple[float, ...], expected: list[int], tmp_path: Path
) -> None:
    paths = [numbered(tmp_path / f"{letter}.jsonl", count, letter) for letter, count in zip("ab", counts, strict=True)]
    sources = [{"path": str(path), "weight": weight} for path, weight in zip(paths, weights, strict=True)]
    letters = [prompt[0] for prompt in prompts(checked(sources).train)]
    assert [letters.count(letter) for letter in "ab"] == expected


def test_fraction_of_rows_is_held_out(tmp_path: Path) -> None:
    path = str(numbered(tmp_path / "rows.jsonl", 40))
    rows = checked(path, validation=0.25)
    train, held_out = prompts(rows.train), prompts(rows.validation)
    assert (len(train), len(held_out)) == (30, 10)
    assert sorted([*train, *held_out]) == sorted(prompts(checked(path).train))
    assert [train, held_out] == [sorted(part, key=lambda prompt: int(prompt[1:])) for part in (train, held_out)]
    assert prompts(checked(path, validation=0.25).validation) == held_out
    assert prompts(checked(path, seed=1, validation=0.25).validation) != held_out
    assert len(prompts(checked(path, validation=0.001).validation)) == 1


def test_fraction_that_leaves_no_rows_is_refused(tmp_path: Path) -> None:
    path = numbered(tmp_path / "rows.jsonl", 1)
    with pytest.raises(DataError) as caught:
        checked(str(path), validation=0.5)
    assert meanings(caught.value) == [(Code.DATA_EMPTY, "", "data.validation")]
    assert "0.5 of 1 rows" in str(caught.value)


def test_problems_of_many_rows_are_grouped(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": number} for number in range(12)]
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, *rows])
    with pytest.raises(DataError) as caught:
        checked(str(path))
    assert meanings(caught.value) == [(Code.DATA_FIELD, f"{path}:2", "")]
    assert "(and at least 9 more rows: 3, 4, 5, 6, 7, 8, 9, 10, 11)" in str(caught.value)  # there may be more


def test_problems_of_rows_and_of_the_file_are_reported_together(tmp_path: Path) -> None:
    """Invalid JSON is found at the end of a file, rows in a wrong format at their line."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n{]\n{"prompt": 3, "completion": "b"}\n')
    with pytest.raises(DataError) as caught:
        checked(str(path))
    assert [problem.where for problem in caught.value.problems] == [f"{path}:{line}" for line in (2, 3, 4)]


def test_source_without_rows_is_refused(tmp_path: Path) -> None:
    numbered(tmp_path / "a.jsonl", 2)
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(DataError) as caught:
        checked([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert meanings(caught.value) == [(Code.DATA_EMPTY, str(tmp_path / "b.jsonl"), "")]
    assert len(checked(str(tmp_path)).train) == 2  # a directory needs only one file with rows


@pytest.mark.parametrize("change", ["more", "fewer", "other"])
def test_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, renderer: Renderer, change: str) -> None:
    path = numbered(tmp_path / "rows.jsonl", 4)
    rows = checked(str(path))
    if change == "other":
        write_rows(path, [{"prompt": "p", "completion": 3}] * 4)
    else:
        numbered(path, {"more": 5, "fewer": 3}[change])
    with pytest.raises(DataError, match="changed while it was being read"):
        data.prepare(rows.train, renderer, rows.train.section, VOCABULARY)


# What is counted


@pytest.mark.parametrize("truncation", ["keep_completion", "drop"])
@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_report_counts_match_a_count_by_hand(tmp_path: Path, renderer: Renderer, truncation: str, loss_on: str) -> None:
    """One token per byte, and one for the end."""
    sizes = [(number % 13, number % 7) for number in range(91)]
    path = write_rows(tmp_path / "rows.jsonl", ({"prompt": "p" * a, "completion": "c" * s} for a, s in sizes))
    report = prepared(renderer, path, max_length=9, truncation=truncation, loss_on=loss_on).report
    tokens = supervised = truncated = empty = dropped = cut = 0
    for prompt, completion in sizes:
        length = prompt + completion + 1
        if not completion and (loss_on == "completion" or not prompt):
            empty += 1
        elif length > 9 and truncation == "drop":
            dropped += 1
            cut += length
        else:
            length_left = min(length, 9)
            tokens += length_left
            supervised += length_left - 1 if loss_on == "all" else min(completion + 1, length_left - 1)
            truncated += length > 9
            cut += length - length_left
    assert (report.rows, report.tokens, report.supervised, report.truncated) == (91, tokens, supervised, truncated)
    assert report.cut_tokens == cut and any(f"{cut:,} of {tokens + cut:,} tokens" in line for line in report.losses())
    assert sorted(found.count for found in report.dropped.values()) == sorted(n for n in (empty, dropped) if n)
    assert report.longest == max(a + s + 1 for a, s in sizes if s or loss_on == "all")


def test_raising_max_length_is_not_advised_at_the_context_limit() -> None:
    report = Report(rows=1, tokens=8, truncated=1)
    report.lengths[80] = 1
    for context, raised in ((None, True), (9, True), (8, False)):
        (line, _) = report.remarks(8, context)
        assert "72 of 80 tokens (90.0%)" in line and "split long rows" in line and ("raise it" in line) == raised


def test_percentiles_use_the_nearest_rank() -> None:
    report = Report()
    for length in [*range(1, 100), 1000]:
        report.lengths[length] += 1
    assert [report.percentile(share) for share in (0.5, 0.95, 1.0)] == [50, 95, 1000]
    assert Report().cells() == ["0"] * len(Report.COLUMNS)


def test_report_round_trips_through_json() -> None:
    report = Report(rows=7, tokens=5, supervised=3, truncated=1)
    report.lengths[4] = 2
    for line in range(5):
        report.drop("why", f"rows:{line}")
        report.drop_invalid(Problem(Code.DATA_SYNTAX, "bad", f"rows:{line}"))
    again = Report.from_json(json.loads(json.dumps(report.to_dict())))
    assert again == report
    assert again.dropped["why"] == RowTally(5, [f"rows:{line}" for line in range(5)])
    assert again.dropped["why"].places == "rows:0, rows:1, rows:2, ..."
    assert again.dropped_places()["why"][-1] == "rows:4"


SOME = [
    {"prompt": "p" * prompt, "completion": "c" * completion}
    for prompt, completion in ((9, 2), (3, 2), (3, 0), (3, 20), (3, 2))
]


@pytest.mark.parametrize("dry", [True, False])
def test_data_report_lists_drops_truncation_repeats_and_leaks(
    cli: Cli, run_config: MakeConfig, tmp_path: Path, dry: bool
) -> None:
    path = write_rows(tmp_path / "data.jsonl", SOME)
    held = write_rows(tmp_path / "held.jsonl", [{"prompt": "p " * 3, "completion": "x"}, SOME[1]])
    config = run_config(data={"train": str(path), "validation": str(held), "max_length": 8, "max_dropped": 0.5})
    ran = cli("train", config, *(["--dry-run"] if dry else []))
    assert ran.code == 0, ran.err
    shown = [line.split() for line in (ran.out if dry else ran.err).splitlines()]
    assert ["rows", "duplicates", "dropped", "truncated", "tokens", "supervised", "p50", "p95", "max"] in shown
    assert ["train", "5", "1", "2", "1", "20", "9", "6", "24", "24"] in shown
    assert ["validation", "2", "0", "0", "0", "14", "5", "6", "8", "8"] in shown
    text = " ".join((ran.out if dry else ran.err).split())
    assert f"train: 1 row dropped: nothing to learn: the completion is empty ({path}:3)" in text
    assert f"train: 1 row dropped: the answer does not fit in max_length 8 ({path}:4)" in text
    assert f"train: 1 row repeated: {path}:5" in text
    assert "train: 28 of 48 tokens (58.3%), most of them, are lost to max_length: raise it, or split long rows" in text
    assert "train: max_length 24 would keep everything" in text
    assert dry or json.loads((tmp_path / "out" / "loratune.json").read_text())["splits"]["train"]["cut_tokens"] == 28
    assert f"1 of the validation rows is also in train ({held}:2)" in text
    assert "pppp⟦cc<|endoftext|>⟧" in text.replace(" ", "")


def test_dry_run_shows_the_requested_number_of_rows(cli: Cli, run_config: MakeConfig) -> None:
    ran = cli("train", run_config(), "--dry-run", "--rows", 3)
    assert ran.code == 0, ran.err
    shown = [f"{row['prompt']}⟦{row['completion']}<|endoftext|>⟧" for row in ROWS]
    assert [text in ran.out for text in shown[:4]] == [True, True, True, False]


def test_truncation_error_refuses_overlong_rows(tmp_path: Path, renderer: Renderer) -> None:
    path = write_rows(tmp_path / "r.jsonl", [{"prompt": n * "a", "completion": n * "b"} for n in (1, 4)])
    assert len(prepared(renderer, path, max_length=9, truncation="error").rows) == 2
    with pytest.raises(DataError, match=r"the row has 9 tokens, more than data.max_length 8 ") as caught:
        prepared(renderer, path, max_length=8, truncation="error")
    assert meanings(caught.value) == [(Code.DATA_TOO_LONG, f"{path}:2", "")]


def test_error_without_any_rows_left_suggests_a_max_length(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b" * 9}, {"prompt": "", "completion": ""}]
    path = write_rows(tmp_path / "r.jsonl", rows)
    config = run_config(data={"train": str(path), "max_length": 8})
    ran = cli("train", config, "--set", "model.name_or_path=" + str(without_weights(config)))
    check_refused(ran, 4, (Code.DATA_EMPTY, str(path), ""))
    assert "(1 row dropped: " in ran.err and f"the answer does not fit in max_length 8 ({path}:1)" in ran.err
    assert ran.err.strip().endswith("raise data.max_length to 11")
    assert cli("train", config, "--set", "data.max_length=11", "--set", "data.max_dropped=1", "--dry-run").code == 0


def without_weights(config: Path) -> Path:
    """The model of a config without its weights, so any other error is raised before loading them."""
    model = Path(next(line.split()[1] for line in config.read_text().splitlines() if "name_or_path" in line))
    copy = config.parent / "without-weights"
    copy.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    (copy / "model.safetensors").write_bytes(b"")
    return copy


def test_empty_prompts_and_nul_are_kept_and_empty_completions_dropped(
    cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [
        {"prompt": "", "completion": "b\0"},
        {"prompt": "a", "completion": ""},
        {"prompt": [question], "completion": [answer]},
        {"prompt": [question], "completion": [answer | {"content": " "}]},
    ]
    for pair in (rows[:2], rows[2:]):
        path = write_rows(tmp_path / "data.jsonl", pair)
        ran = cli("train", run_config(data={"train": str(path), "max_dropped": 0.5}), "--dry-run")
        assert ran.code == 0, ran.err
        assert ["train", "2", "0", "1"] in [line.split()[:4] for line in ran.out.splitlines()]
        assert f"train: 1 row dropped: nothing to learn: the completion is empty ({path}:2)" in ran.out


def test_single_row_can_be_trained_on(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    ran = cli("train", run_config(data={"train": str(write_rows(tmp_path / "one.jsonl", ROWS[:1]))}))
    assert ran.code == 0, ran.err
    assert "rows: 1, fewer than a batch of 8" in ran.err
    assert json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]["steps"] == 1


def test_too_many_dropped_rows_are_refused(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b" * (number % 4)} for number in range(20)]
    config = run_config(data={"train": str(write_rows(tmp_path / "r.jsonl", rows))})
    ran = cli("train", config, "--set", f"model.name_or_path={without_weights(config)}")
    check_refused(ran, 4, (Code.DATA_TOO_MANY_DROPPED, str(tmp_path / "r.jsonl"), "data.max_dropped"))
    assert "25% of the train rows would be dropped (5 rows dropped: nothing to learn" in ran.err
    assert ":1, " in ran.err and ":5, " in ran.err and ":9, ...)" in ran.err
    assert cli("train", config, "--dry-run", "--set", "data.max_dropped=0.25").code == 0


def test_token_ids_beyond_the_vocabulary_are_refused(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [1, VOCABULARY]}, {"input_ids": [VOCABULARY - 1, 1]}]
    path = write_rows(tmp_path / "ids.jsonl", rows)
    ran = cli("train", run_config(data={"train": str(path)}), "--dry-run")
    assert ran.code == 4
    assert f"{path}:2: " in ran.err and f"is {VOCABULARY}" in ran.err and f"has {VOCABULARY} tokens" in ran.err
    write_rows(path, [rows[0], rows[2]])
    assert cli("train", run_config(data={"train": str(path)}), "--dry-run").code == 0


LONG = "word " * 40


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_answers_are_never_truncated(tmp_path: Path, renderer: Renderer, loss_on: str) -> None:
    """Neither if the prompt is supervised nor if it is empty. Lost earlier answers are counted."""
    turns = [("user", LONG), ("assistant", "one"), ("user", "more"), ("assistant", "two")]
    chat = [{"role": role, "content": content} for role, content in turns]
    sets: dict[str, list[dict[str, Any]]] = {
        "pairs": [{"prompt": LONG, "completion": "the end"}, {"prompt": "", "completion": LONG}],
        "chats": [{"messages": chat}],
        "texts": [{"text": LONG}],
    }
    prepared_sets = {
        name: prepared(renderer, write_rows(tmp_path / f"{name}.jsonl", rows), max_length=32, loss_on=loss_on)
        for name, rows in sets.items()
    }
    texts = {
        name: [renderer.tokenizer.decode(row.ids) for row in dataset.rows.rows()]
        for name, dataset in prepared_sets.items()
    }
    assert texts["pairs"] == [f"{LONG}the end<|endoftext|>"[-len("<|endoftext|>") - 31 :]]
    assert [tally.first[0].rpartition(":")[2] for tally in prepared_sets["pairs"].report.dropped.values()] == ["2"]
    assert texts["chats"][0].endswith("<|assistant|>two<|end|>")
    assert prepared_sets["chats"].report.cut_answers == (loss_on == "completion") * (
        "one<|end|>" not in texts["chats"][0]
    )
    assert texts["texts"][0] == LONG[:32] and texts["texts"][-1].endswith("<|endoftext|>")


def test_fingerprint_depends_on_the_format(tmp_path: Path, renderer: Renderer) -> None:
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    row = {"messages": [question, answer], "prompt": [question], "completion": [answer | {"content": "other"}]}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    first, second = (prepared(renderer, path, format=form) for form in ("messages", "prompt_completion"))
    assert first.fingerprint != second.fingerprint


def test_given_labels_determine_what_is_supervised(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}] * 8
    ran = cli("train", run_config(data={"train": str(write_rows(tmp_path / "ids.jsonl", rows))}), "--dry-run")
    assert ran.code == 0, ran.err
    assert ["train", "8", "7", "0", "0", "32", "16", "4", "4", "4"] in [line.split() for line in ran.out.splitlines()]


# What is cached


def test_prepared_rows_are_read_from_the_cache(tmp_path: Path, renderer: Renderer, cache: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    first = prepared(renderer, path)
    (entry,) = entries(cache)
    stamps = {file: file.stat().st_mtime_ns for file in (cache / entry).iterdir()}
    again = prepared(renderer, path)
    assert entries(cache) == [entry]
    assert {file: file.stat().st_mtime_ns for file in (cache / entry).iterdir()} == stamps
    assert [*first.rows] == [*again.rows]
    assert (first.fingerprint, first.report) == (again.fingerprint, again.report)


CHANGES: dict[str, dict[str, Any]] = {
    "length": {"max_length": 12},
    "truncation": {"truncation": "drop"},
    "invalid": {"invalid_rows": "drop"},
    "loss": {"loss_on": "all"},
    "format": {"format": "text", "columns": {"text": "prompt"}},
    "columns": {"columns": {"prompt": "completion", "completion": "prompt"}},
    "slice": {"train": {"path": "ROWS", "split": "train[:39]"}},
    "fraction": {"validation": 0.1},
}


@pytest.mark.parametrize("change", [*CHANGES, "content", "tokenizer", "template", "place"])
def test_changed_settings_create_a_new_cache_entry(
    tmp_path: Path, renderer: Renderer, cache: Path, change: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    first = prepared(renderer, path)
    changes = CHANGES.get(change, {})
    if "train" in changes:
        changes = {"train": changes["train"] | {"path": str(path)}}
    if change == "content":
        write_rows(path, [*ROWS[1:], ROWS[0]])
    if change in ("tokenizer", "template"):
        end = "<|endoftext|>" if change == "template" else "<|end|>"
        other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=end)
        other.chat_template = CHAT_TEMPLATE.replace("assistant", "bot") if change == "template" else CHAT_TEMPLATE
        renderer = Renderer(other)
    if change == "place":
        path = path.rename(tmp_path / "moved.jsonl")
    second = prepared(renderer, path, **changes)
    assert Path(second.rows.row(0).where.split(":")[0]) == path
    assert len(entries(cache)) == 2
    assert (second.fingerprint != first.fingerprint) == (change not in ("template", "truncation", "invalid", "place"))


@pytest.mark.parametrize("damage", ["cut", "gone", "whole", "unfinished", "a bit"])
def test_damaged_cache_entry_is_rebuilt(tmp_path: Path, renderer: Renderer, cache: Path, damage: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    first = [*prepared(renderer, path).rows]
    (entry,) = (cache / name for name in entries(cache))
    shard, whole = entry / "00000.arrow", entry / "whole"
    content = shard.read_bytes()
    middle = len(content) // 2
    if damage == "cut":
        shard.write_bytes(content[:middle])
    elif damage == "a bit":
        shard.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "whole":
        whole.write_text("{")
    else:
        {"gone": shard, "unfinished": whole}[damage].unlink()
    assert [*prepared(renderer, path).rows] == first
    assert whole.is_file() and entries(cache) == [entry.name]


class Stopped(Renderer):
    """A renderer that is interrupted by Ctrl-C in batch number `at`. batches: the number of rows of each batch."""

    at = 99
    batches: list[int]

    def rows(self, examples: Any, loss_on: str = "completion", **settings: Any) -> Any:
        self.batches.append(len(examples))
        if len(self.batches) > self.at:
            raise KeyboardInterrupt
        return super().rows(examples, loss_on, **settings)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "_SHARD_ROWS", 20)
    monkeypatch.setattr(example_tokenizer, "BATCH_ROWS", 10)


@pytest.mark.parametrize("at", [1, 2, 5, 6, 9])
@pytest.mark.usefixtures("small_shards")
def test_interrupted_tokenization_is_resumed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, cache: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"p{number}", "completion": "c" * (number % 11)} for number in range(95)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    renderer = Stopped(tokenizer)
    renderer.at, renderer.batches = at, []
    with pytest.raises(KeyboardInterrupt):
        prepared(renderer, path)
    renderer.at, renderer.batches = 99, []
    resumed = prepared(renderer, path)
    assert len(renderer.batches) == 10 - at  # the finished part of a shard is kept
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    straight = prepared(Renderer(tokenizer), path)
    assert [*resumed.rows.rows()] == [*straight.rows.rows()]
    assert (resumed.fingerprint, resumed.report) == (straight.fingerprint, straight.report)
    assert len(entries(cache)) == 1


@pytest.mark.usefixtures("small_shards")
def test_shards_form_one_sequence(tmp_path: Path, renderer: Renderer, cache: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    rows = prepared(renderer, path).rows
    assert len([*(cache / entries(cache)[0]).glob("*.arrow")]) == 2
    expected = [renderer.row(Plain(f"{path}:{n}", **row)) for n, row in enumerate(ROWS, start=1)]
    assert [*rows.rows()] == expected
    assert [*rows] == [{"input_ids": list(row.ids), "labels": row.labels} for row in expected]
    assert rows.lengths.tolist() == [len(row.ids) for row in expected]
    assert rows.supervised.tolist() == [row.supervised for row in expected]
    with pytest.raises(IndexError):
        rows[40]


def test_failed_preparation_leaves_no_cache_entry(tmp_path: Path, renderer: Renderer, cache: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError) as caught:
        prepared(renderer, path, max_length=8, truncation="error")
    assert {code for code, _, _ in meanings(caught.value)} == {Code.DATA_TOO_LONG}
    assert entries(cache) == []


# Real processes


MEASURED = """
import re, sys
from loratune.__main__ import main
try:
    main()
finally:
    print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
"""


def peak(processes: ForkServer, config: Path) -> int:
    """The peak resident memory in bytes of a dry run, which must succeed."""
    child = processes.start("train", config, "--dry-run", first=MEASURED)
    assert child.wait() == 0, child.said()
    return int(child.said().split()[-1]) * 1024


def caching(path: Path) -> str:
    """Code to run before a command to use another cache with small shards."""
    shards = "from loratune.data import token_cache; token_cache._SHARD_TOKENS = 900_000"
    return f"import datasets; datasets.config.HF_DATASETS_CACHE = {str(path)!r}; {shards}"


def test_full_disk_while_caching_rows_is_reported(
    cli: Cli, run_config: MakeConfig, tmp_path: Path, cache: Path
) -> None:
    """Files are limited to 64 kB; the rows need more."""
    rows = ({"prompt": f"{number}" * 500, "completion": "c"} for number in range(100, 200))
    config = run_config(data={"train": str(write_rows(tmp_path / "many.jsonl", rows))})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        ran = cli("train", config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ran.code == 8, ran.err
    (line,) = ran.errors
    assert is_problem(line, (Code.DATA_UNREADABLE, "", "")) and line.startswith(f"{cache}{os.sep}")
    assert "HF_DATASETS_CACHE" in line
    assert entries(cache) == []
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_tokenization_resumes_after_ctrl_c(
    run_config: MakeConfig, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, processes: ForkServer
) -> None:
    tiny_llama(max_position_embeddings=4096).save_pretrained(tmp_path / "long")
    tokenizer.save_pretrained(tmp_path / "long")
    model = {"name_or_path": str(tmp_path / "long")}
    rows = ({"prompt": f"{number} " * 80, "completion": "c"} for number in range(10_000, 13_000))
    config = run_config(data={"train": str(write_rows(tmp_path / "many.jsonl", rows)), "max_length": 4096}, model=model)
    cache = tmp_path / "cache"
    running = processes.start("train", config, first=caching(cache))
    until(lambda: [*cache.rglob("00000.arrow")], running)
    running.send(signal.SIGINT)
    assert running.wait() == 130
    said = running.said()
    assert said.strip().endswith("the tokenized rows are kept, so that the same command continues from there")
    (first,) = cache.rglob("00000.arrow")
    written = first.stat().st_mtime_ns
    assert first.parent.name.endswith(".partial")
    again = processes.start("train", config, "--dry-run", first=caching(cache))
    assert again.wait() == 0, again.said()
    shard = first.parent.with_suffix("") / first.name
    assert shard.stat().st_mtime_ns == written
    assert {path.name for path in shard.parent.glob("*.arrow")} == {"00000.arrow", "00001.arrow"}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_rows(
    run_config: MakeConfig, tmp_path: Path, processes: ForkServer
) -> None:
    """The first run checks the model for rows of this length, which takes memory; the other two find its results."""

    def of(count: int, start: int = 0) -> int:
        rows = (
            {"prompt": f"{n:05} and {n:05} make", "completion": f" {2 * n:06}"} for n in range(start, start + count)
        )
        data = {"train": str(write_rows(tmp_path / "some.jsonl", rows)), "max_length": 512}
        return peak(processes, run_config(f"{count}.yaml", data=data))

    of(10_000, start=80_000)
    assert of(60_000) - of(10_000) < 32 << 20


@pytest.mark.parametrize(("before", "said"), [
    ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}", True),
    ("{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}"
     "{{ eos_token }}{% endif %}{% endfor %}", False),
    (CHAT_TEMPLATE, False),
])  # fmt: skip
def test_a_template_without_a_generation_prompt_is_said(
    before: str, said: bool, cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    """If answers have a header, which the model then has to write itself."""
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi!"}]
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": turns}] * 12)
    (tmp_path / "chat.jinja").write_text(before)
    ran = cli(
        "train", run_config(data={"train": str(path), "chat_template": str(tmp_path / "chat.jinja")}), "--dry-run"
    )
    assert ran.code == 0, ran.err
    assert ("ignores add_generation_prompt, so that answers begin with '<|assistant|>'" in ran.out) == said, ran.out


def test_custom_chat_template_is_used(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    path = write_rows(tmp_path / "data.jsonl", [{"messages": turns}])
    ran = cli("train", run_config(data={"train": str(path), "chat_template": str(template)}), "--dry-run")
    assert ran.code == 0, ran.err
    assert "[user]What?<|end|>[assistant]⟦That.<|end|>⟧" in ran.out


BAD_TEMPLATES: dict[str, tuple[Any, ...]] = {
    "absent": (None, "no such file", Code.TEMPLATE_INVALID),
    "not Jinja": ("{% for m in messages %}\n{{ m.content }\n", ":2: data.chat_template: ", Code.TEMPLATE_INVALID),
    "not UTF-8": (b"\xff", "it is not UTF-8", Code.TEMPLATE_INVALID),
    "empty": ("\n", "", Code.TEMPLATE_INVALID),
    "nested ifs": (
        "{% if a %}" * 150 + "{% endif %}" * 150,
        "nested too deeply: too many levels of indentation",
        Code.TEMPLATE_INVALID,
    ),
    "nested loops": (
        "{% for a in b %}" * 40 + "{% endfor %}" * 40,
        "nested too deeply: too many statically nested",
        Code.TEMPLATE_INVALID,
    ),
    "nested parentheses": (
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "it is nested too deeply",
        Code.TEMPLATE_INVALID,
    ),
}


@pytest.mark.parametrize("kind", BAD_TEMPLATES)
def test_invalid_chat_template_files_are_refused(kind: str, cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """The error names the file, not the rows."""
    content, message, *codes = BAD_TEMPLATES[kind]
    template = tmp_path / "chat.jinja"
    if content is not None:
        template.write_bytes(content.encode() if isinstance(content, str) else content)
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    path = write_rows(tmp_path / "data.jsonl", [{"messages": turns}])
    ran = cli("train", run_config(data={"train": str(path), "chat_template": str(template)}), "--dry-run")
    assert ran.code == 2
    assert (
        problem_text(ran.err).startswith(f"{template}") and ": data.chat_template: " in ran.err and message in ran.err
    )
    assert all(f"[{code}]" in ran.err for code in codes)


def test_rows_longer_than_the_context_are_refused(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": "a" * 600, "completion": "b"}])
    ran = cli("train", run_config(data={"train": str(path)}), "--dry-run")
    check_refused(ran, 2, (Code.DATA_TOO_LONG, "", "data.max_length"))
    assert "is 1024, and the longest row has 602 tokens, but the model has 512 positions;" in ran.err
    assert ran.err.endswith("; set it to 512\n") and ran.err.count("\n") == 1
    assert cli("train", run_config(data={"train": str(path), "max_length": 512}), "--dry-run").code == 0


def test_empty_answers_in_a_conversation_are_not_supervised(renderer: Renderer, tmp_path: Path) -> None:
    turns = [("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    dataset = prepared(renderer, write_rows(tmp_path / "rows.jsonl", [row]))
    assert [dataset.rows.row(0).completion] == [tuple(renderer.tokenizer("c<|end|>").input_ids)]
    assert dataset.report.supervised == 2
    assert "1 answers are not supervised: they are empty" in dataset.report.remarks(1024)


def test_missing_or_duplicate_bos_is_remarked_on(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The template omits the BOS token that the tokenizer adds to every text, or writes it twice."""
    bos = copy.deepcopy(tokenizer)
    bos.add_special_tokens({"bos_token": "<|bos|>"})
    bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos.bos_token_id)]
    )
    assert bos("a").input_ids[0] == bos.bos_token_id
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])
    for count, remark in (
        (0, "rows begin without <|bos|>, which the tokenizer writes"),
        (1, None),
        (2, "rows begin with 2 x <|bos|>"),
    ):
        bos.chat_template = "{{ bos_token }}" * count + CHAT_TEMPLATE
        renderer = Renderer(bos)
        assert renderer.remark_on_bos(prepared(renderer, path).rows.row(0).ids) == remark
    assert (
        renderer.remark_on_bos(prepared(renderer, write_rows(tmp_path / "plain.jsonl", ROWS)).rows.row(0).ids) is None
    )


REPLACED = {"type": "Replace", "content": ""}
DROPPING: dict[str, tuple[dict[str, Any], str | None]] = {
    "digits": ({"normalizer": REPLACED | {"pattern": {"Regex": "[0-9]"}}}, "drops 33% of the letters and digits"),
    "a letter": ({"normalizer": REPLACED | {"pattern": {"String": "x"}}}, "drops 33% of the letters and digits"),
    "lower case": ({"normalizer": {"type": "Lowercase"}}, None),
    "decomposed": ({"normalizer": {"type": "NFKD"}}, None),
    "nothing": ({}, None),
}


@pytest.mark.parametrize(("parts", "remark"), DROPPING.values(), ids=DROPPING)
def test_text_dropped_by_the_tokenizer_is_remarked_on(
    parts: dict[str, Any], remark: str | None, tiny_dir: Path, cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    """One line with the share and the first row. Normalization is not counted as a loss."""
    path = tmp_path / "dropping"
    shutil.copytree(tiny_dir, path)
    known = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(known | parts))
    rows = write_rows(tmp_path / "data.jsonl", [{"prompt": "1x", "completion": text} for text in ("Éa", "1x", "2x")])
    ran = cli("train", run_config(model={"name_or_path": str(path)}, data={"train": str(rows)}), "--dry-run")
    assert ran.code == 0, ran.err
    if remark is None:
        assert "the tokenizer drops" not in ran.out + ran.err
        return
    line = next(line for line in (ran.out + ran.err).splitlines() if "the tokenizer drops" in line)
    assert f"{remark} of answers, e.g. " in line and f"{rows}:2: '1x' -> '" in line
