"""`loratune init`: from rows and the name of a model it writes a config that can be trained, with its reasons."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ATTENTION, ROWS, check_refused, meanings, tiny_llama, write_rows
from running import Cli, MakeConfig
from transformers import PreTrainedTokenizerFast

from loratune import config
from loratune.codes import Code
from loratune.config import DataSection, LoraSection, RunConfig, Source, keys
from loratune.data import DatasetSplit, RawDatasets, fields, read_source
from loratune.data.fields import ColumnChoice, propose_columns
from loratune.data.measured_rows import MeasuredRows
from loratune.data.sources.rows import Row
from loratune.errors import DataError
from loratune.lora import creation
from loratune.training import auto, init
from loratune.training.duration import Costs
from loratune.training.init import fit

LABELS = [{"prompt": f"{number} is", "completion": f" {'odd' if number % 2 else 'even'}"} for number in range(60)]
CHAT = [
    {"messages": [{"role": "user", "content": "word " * number}, {"role": "assistant", "content": f"{number}"}]}
    for number in range(1, 13)
]
TEXTS = [{"text": f"{number} " * 400} for number in range(100, 112)]


@pytest.fixture
def traced_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def here(traced_here: Path, untraced: None) -> Path:
    """A working directory, for tests that are not about memory."""
    return traced_here


def written(cli: Cli, model: Path, rows: object, *options: object) -> RunConfig:
    """The config that `init` writes, checked with `train --dry-run`."""
    ran = cli("init", rows, "--model", model, *options)
    assert ran.code == 0, ran.err
    dry = cli("train", "config.yaml", "--dry-run")
    assert dry.code == 0, dry.err
    return config.load(Path("config.yaml"))


def test_rows_with_few_distinct_labels(cli: Cli, tiny_dir: Path, traced_here: Path) -> None:
    here = traced_here
    write_rows(here / "parity.jsonl", LABELS)
    ran = cli("init", "parity.jsonl", "--model", tiny_dir)
    assert ran.code == 0, ran.err
    run = config.load(here / "config.yaml")
    assert (run.data.train_sources[0].path, run.output_dir) == ("parity.jsonl", "parity-adapter")
    assert (run.data.max_length, run.data.validation, run.data.columns) == (64, 0.2, {})
    assert run.model.quantization == "none" and not run.training.activation_checkpointing
    assert (run.training.per_device_train_batch_size, run.training.gradient_accumulation_steps) == (8, 1)
    assert "classes  2: ` even` 30, ` odd` 30" in ran.out and "12 rows" in (here / "config.yaml").read_text()
    assert cli("train", "config.yaml", "--dry-run").code == 0
    trained = cli("train", "config.yaml")
    assert trained.code == 0, trained.err
    adapter = json.loads((here / "parity-adapter" / "loratune.json").read_text())
    size = (here / "parity-adapter" / "adapter_model.safetensors").stat().st_size
    assert f" {adapter['metrics']['steps']} steps" in ran.out and f"{size / 1e3:.1f} kB" in ran.out


def test_conversations(cli: Cli, tiny_dir: Path, here: Path) -> None:
    run = written(cli, tiny_dir, write_rows(here / "chat.jsonl", CHAT))
    assert run.data.validation is None, "too few rows to hold any out"
    assert (run.data.max_length, run.training.num_train_epochs) == (128, "auto")
    assert run.lora.target_modules == ["q", "k", "v", "o"]
    assert "# here 4: " in (here / "config.yaml").read_text(), "as there are few rows"
    assert "chat template" in (here / "config.yaml").read_text()


def test_a_run_that_continues_an_adapter_has_its_rank_and_targets(
    cli: Cli, run_config: MakeConfig, tiny_dir: Path, here: Path
) -> None:
    ran = cli("train", run_config(lora={"r": 12, "target_modules": "all-linear"}, training={"max_steps": 1}))
    assert ran.code == 0, ran.err
    rows = write_rows(here / "more.jsonl", ROWS)
    ran = cli("init", rows, "--model", tiny_dir, "--set", f"lora.start_from={here / 'out'}")
    assert ran.code == 0, ran.err
    dry = cli("train", "config.yaml", "--dry-run")
    assert dry.code == 0 and "auto: lora.r is 12 (that of the adapter it starts from)" in dry.err
    left_out = cli("train", "config.yaml", "--dry-run", "--set", "lora.target_modules=[q, k, v, o]")
    assert left_out.code != 0 and "set lora.target_modules to auto" in left_out.err


def test_texts_longer_than_the_context_of_the_model(cli: Cli, tiny_dir: Path, here: Path) -> None:
    run = written(cli, tiny_dir, write_rows(here / "texts.jsonl", TEXTS))
    assert run.data.max_length == 512
    assert "12 of 12 rows are longer" in (here / "config.yaml").read_text()
    assert "12 rows split into " in cli("train", "config.yaml", "--dry-run").out
    dry = cli("train", "config.yaml", "--dry-run", "--set", "data.truncation=keep_completion").out
    assert "would be needed to keep everything, and the model has 512 positions" in dry, "not an advice that is refused"


def test_question_and_answer_fields_are_mapped(cli: Cli, tiny_dir: Path, here: Path) -> None:
    rows = [{"Question": f"{number}?", "answer": f"{number}.", "id": number} for number in range(12)]
    run = written(cli, tiny_dir, write_rows(here / "faq.jsonl", rows))
    assert run.data.columns == {"instruction": "Question", "output": "answer"}


def test_splits_in_a_directory_are_recognized(cli: Cli, tiny_dir: Path, here: Path) -> None:
    folder = here / "parity"
    (folder / "test").mkdir(parents=True)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "dev", "test/rows", "training_notes"):
        write_rows(folder / f"{name}.jsonl", ROWS[:10])
    write_rows(folder / "dev.jsonl", [{"prompt": "long", "completion": "answer" * 20}] * 5)
    run = written(cli, tiny_dir, "parity")
    assert run.data.max_length == 128, "the validation rows too are whole"
    assert [source.path for source in run.data.train_sources] == [
        f"parity/train-0000{number}-of-00002.jsonl" for number in (0, 1)
    ]
    assert [source.path for source in run.data.validation_sources] == ["parity/dev.jsonl"]
    assert [source.path for source in run.data.test_sources] == ["parity/test"]
    assert run.output_dir == "parity-adapter"


def test_unusual_file_names(cli: Cli, tiny_dir: Path, here: Path) -> None:
    name = 'no: "it\'s" #1\n\u202e日本 {a}.jsonl'
    (here / "no-it-s-1-日本-a-adapter").mkdir()
    run = written(cli, tiny_dir, write_rows(here / name, ROWS[:10]))
    assert run.data.train_sources[0].path == str(here / name)
    assert run.output_dir == "no-it-s-1-日本-a-adapter-2"


def test_set_values_are_kept(cli: Cli, tiny_dir: Path, here: Path) -> None:
    rows = [{"a": f"{number}?", "b": f"{number}."} for number in range(12)]
    keys = {"data.columns": "{prompt: a, completion: b}", "training.max_steps": "3", "data.packing": "full"}
    keys |= {"training.per_device_train_batch_size": "2", "data.max_length": "100", "model.dtype": "float32"}
    options = [option for key, value in keys.items() for option in ("--set", f"{key}={value}")]
    run = written(cli, tiny_dir, write_rows(here / "rows.jsonl", rows), *options)
    assert (run.data.columns, run.data.packing, run.data.max_length) == (
        {"prompt": "a", "completion": "b"},
        "full",
        100,
    )
    training = run.training
    assert (training.max_steps, training.per_device_train_batch_size, training.gradient_accumulation_steps) == (3, 2, 4)


def test_keys_that_require_held_out_rows(cli: Cli, tiny_dir: Path, here: Path) -> None:
    """They are checked once it is known whether any rows are held out."""
    keys = {
        "training.patience": "3",
        "training.eval_steps": "2",
        "training.keep": "best",
        "data.group_by": "completion",
    }
    options = [option for key, value in keys.items() for option in ("--set", f"{key}={value}")]
    run = written(cli, tiny_dir, write_rows(here / "rows.jsonl", LABELS), *options)
    assert run.data.validation == 0.2 and run.data.group_by == "completion"
    assert (run.training.patience, run.training.eval_steps, run.training.keep) == (3, 2, "best")


def test_the_config_can_be_written_to_stdout(cli: Cli, tiny_dir: Path, here: Path) -> None:
    write_rows(here / "rows.jsonl", ROWS)
    ran = cli("init", "rows.jsonl", "--model", tiny_dir, "--output", "-")
    assert ran.code == 0 and [*here.iterdir()] == [here / "rows.jsonl"]
    assert config.parse(ran.out, "stdout").data.train_sources[0].path == "rows.jsonl"
    assert "adapter: " in ran.err


def test_a_time_budget_determines_the_length(cli: Cli, tiny_dir: Path, here: Path) -> None:
    run = written(cli, tiny_dir, write_rows(here / "rows.jsonl", LABELS), "--set", "training.max_minutes=2")
    assert run.training.max_minutes == 2
    assert "num_train_epochs" not in run.training.model_fields_set, "they would be an upper bound"


def test_files_beside_the_splits_are_reported_as_left_out(cli: Cli, tiny_dir: Path, here: Path) -> None:
    (here / "rows").mkdir()
    for name in ("train", "more"):
        write_rows(here / "rows" / f"{name}.jsonl", ROWS[:4])
    ran = cli("init", "rows", "--model", tiny_dir)
    assert ran.code == 0 and "left out" in ran.err and "rows/more.jsonl" in ran.err


def test_the_config_is_not_written_among_the_rows(cli: Cli, tiny_dir: Path, here: Path) -> None:
    (here / "rows").mkdir()
    write_rows(here / "rows" / "some.jsonl", ROWS)
    ran = cli("init", "rows", "--model", tiny_dir, "--output", "rows/config.jsonl")
    check_refused(ran, 2, (Code.OUTPUT_UNUSABLE, "rows/config.jsonl", "--output"))
    assert [*(here / "rows").iterdir()] == [here / "rows" / "some.jsonl"]


BASES: dict[str, tuple[dict[str, Any], bytes | None, Code | None]] = {
    "no weights": ({}, None, Code.MODEL_DAMAGED),
    "damaged weights": ({}, b"\xff" * 50, Code.MODEL_DAMAGED),
    "no positions": ({"max_position_embeddings": -1}, b"", None),
}


@pytest.mark.parametrize(("changes", "weights", "code"), BASES.values(), ids=BASES)
def test_bases_that_train_would_refuse_are_refused(
    changes: dict[str, Any], weights: bytes | None, code: Code | None, cli: Cli, tiny_dir: Path, here: Path
) -> None:
    """weights: the content of the file; None for no file, and empty for the original content."""
    shutil.copytree(tiny_dir, here / "model")
    file, values = here / "model" / "config.json", json.loads((tiny_dir / "config.json").read_text())
    file.write_text(json.dumps(values | changes))
    if weights is None:
        (here / "model" / "model.safetensors").unlink()
    elif weights:
        (here / "model" / "model.safetensors").write_bytes(weights)
    ran = cli("init", write_rows(here / "rows.jsonl", ROWS), "--model", here / "model")
    assert (ran.code, f"[{code}]" in ran.err) == ((3, True) if code else (0, False)), ran.err


def test_a_message_lists_a_limited_number_of_fields(cli: Cli, tiny_dir: Path, here: Path) -> None:
    write_rows(here / "rows.jsonl", [{f"k{number}" * 1000: "a" for number in range(1000)}])
    ran = cli("init", "rows.jsonl", "--model", tiny_dir)
    check_refused(ran, 4, (Code.DATA_FORMAT, "rows.jsonl:1", ""))
    assert len(ran.err) < 3000 and "and 980 more" in ran.err


@pytest.mark.slow
def test_only_a_sample_of_many_rows_is_measured(cli: Cli, tiny_dir: Path, here: Path) -> None:
    write_rows(here / "rows.jsonl", ({"text": f"{number:08}"} for number in range(20_040)))
    ran = cli("init", "rows.jsonl", "--model", tiny_dir)
    assert ran.code == 0 and "9 tokens in the median" in ran.out and " 20,000 " in ran.out
    run = config.load(here / "config.yaml")
    assert (run.data.max_length, run.data.validation, run.training.num_train_epochs) == (64, 0.025, "auto")
    assert (run.training.per_device_train_batch_size, run.training.gradient_accumulation_steps) == (32, 1)
    assert "the longest row has 9 tokens, among 20,000 that were drawn" in (here / "config.yaml").read_text()


WAITS = "training.patience and data.validation"
ODD = [{"one": "1", "two": "2"}]
LONG = [{"prompt": "a", "completion": "b" * 600}]
REFUSED: dict[str, tuple[Any, list[str], int, Code, str, str]] = {
    "no format": (ODD, [], 4, Code.DATA_FORMAT, "rows.jsonl:1", ""),
    "no rows": ([], [], 4, Code.DATA_EMPTY, "rows.jsonl", ""),
    "no data": (None, [], 4, Code.DATA_NOT_FOUND, "rows.jsonl", ""),
    "answers beyond the model": (LONG, [], 4, Code.DATA_EMPTY, "rows.jsonl", ""),
    "no model": (ROWS, ["--model", "./nowhere"], 3, Code.MODEL_NOT_FOUND, "./nowhere", "model.name_or_path"),
    "output exists": (ROWS, ["--output", "taken"], 2, Code.OUTPUT_EXISTS, "taken", "--output"),
    "nowhere to write": (ROWS, ["--output", "no/c.yaml"], 2, Code.OUTPUT_UNUSABLE, "no/c.yaml", "--output"),
    "no rows to wait on": (ROWS, ["--set", "training.patience=3"], 2, Code.CONFIG_CONFLICT, "--set", WAITS),
    "a section that is none": (ROWS, ["--set", "data=3"], 2, Code.CONFIG_BAD_VALUE, "--set", "data"),
    "a file for the adapter": (ROWS, ["--set", "output_dir=taken"], 2, Code.OUTPUT_UNUSABLE, "taken", "output_dir"),
    "rows named twice": (ROWS, ["--set", "data.train=x.jsonl"], 2, Code.USAGE_CONFLICT, "--set", "data.train"),
    "unknown key": (ROWS, ["--set", "data.x=1"], 2, Code.CONFIG_UNKNOWN_KEY, "--set", "data.x"),
}


@pytest.mark.parametrize(("rows", "options", "exit_code", "code", "where", "key"), REFUSED.values(), ids=REFUSED)
def test_invalid_input_is_refused(
    rows: Any,
    options: list[str],
    exit_code: int,
    code: Code,
    where: str,
    key: str,
    cli: Cli,
    tiny_dir: Path,
    here: Path,
) -> None:
    (here / "taken").write_text("mine")
    if rows is not None:
        write_rows(here / "rows.jsonl", rows)
    check_refused(cli("init", "rows.jsonl", "--model", tiny_dir, *options), exit_code, (code, where, key))
    assert (here / "taken").read_text() == "mine" and not (here / "config.yaml").exists()


def test_conversations_require_a_template(
    cli: Cli, tiny_dir: Path, tokenizer: PreTrainedTokenizerFast, here: Path
) -> None:
    model = here / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (model / name).write_bytes((tiny_dir / name).read_bytes())
    write_rows(here / "chat.jsonl", CHAT)
    ran = cli("init", "chat.jsonl", "--model", model)
    check_refused(ran, 3, (Code.TEMPLATE_MISSING, str(model), ""))


@pytest.mark.parametrize(
    ("fields", "chat", "columns"),
    [
        ({"instruction": "a", "input": "b", "response": "c"}, True, {"output": "response"}),
        (
            {"question": "a", "passage": "b", "answer": "c"},
            True,
            {"instruction": "question", "input": "passage", "output": "answer"},
        ),
        ({"question": "a", "context": "b", "answer": "c"}, False, {}),
        ({"question": "a", "answer": "b"}, False, {"prompt": "question", "completion": "answer"}),
        ({"input": "a", "output": "b"}, True, {"instruction": "input"}),
        ({"question": "a", "answer": "b", "solution": "c"}, True, {}),
        ({"question": "a", "label": 3}, True, {}),
        ({"Question": "a", "question": "b", "answer": "c"}, True, {}),
        ({"content": "a", "url": "b"}, True, {"text": "content"}),
        ({"system": "s", "question": "a", "chosen": "b", "rejected": "c"}, True, {"instruction": "question"}),
        ({"question": "a", "chosen": "b", "rejected": "c"}, False, {"prompt": "question"}),
        (
            {"question": "a", "preferred": "b", "dispreferred": "c"},
            True,
            {"instruction": "question", "chosen": "preferred", "rejected": "dispreferred"},
        ),
        ({"question": "a", "chosen": [CHAT[0]["messages"][1]], "rejected": [CHAT[0]["messages"][1]]}, True, {
            "prompt": "question",
        }),
        ({"dialog": [{"role": "user", "content": "a"}]}, True, {"messages": "dialog"}),
        ({"dialog": [{"from": "human", "value": "a"}]}, True, {"conversations": "dialog"}),
    ],
)  # fmt: skip
def test_columns_are_proposed_by_field_names(fields: dict[str, Any], chat: bool, columns: dict[str, str]) -> None:
    assert propose_columns(fields, chat=chat) == columns


ASKED = [{"prompt": f"What is {number}?", "completion": "It is one."} for number in range(30)]
COMPARED = [{"question": f"What is {number}?", "chosen": "It is one.", "rejected": "No."} for number in range(30)]


@pytest.mark.parametrize(
    ("rows", "columns", "reason"),
    [
        (ASKED, {"instruction": "prompt", "output": "completion"}, "would run together"),
        ([row | {"prompt": f"{row['prompt']} "} for row in ASKED], None, ""),
        ([row | {"completion": " one"} for row in ASKED], None, ""),
        ([*ASKED[:20], *({"prompt": "a", "completion": " b"} for _ in range(10))], None, ""),
        ([*ASKED[:2], *({"prompt": "", "completion": f"Once {n}"} for n in range(28))], None, ""),
        (COMPARED, {"instruction": "question"}, "their names say what they hold"),
        ([{"prompt": row["question"]} | row for row in COMPARED], {"instruction": "prompt"}, "would run together"),
        ([{"chosen": f"{n} is one.", "rejected": f"{n} is two."} for n in range(30)], None, ""),
        ([{"instruction": row.pop("question"), **row} for row in map(dict, COMPARED)], None, ""),
    ],
)
def test_texts_that_are_questions_and_answers_are_mapped(
    rows: list[dict[str, Any]], columns: dict[str, str] | None, reason: str, cli: Cli, tiny_dir: Path, here: Path
) -> None:
    """The written config reads the rows as intended, and explains why it maps their fields."""
    write_rows(here / "rows.jsonl", rows)
    assert cli("init", "rows.jsonl", "--model", tiny_dir).code == 0
    text = (here / "config.yaml").read_text()
    written = yaml.safe_load(text)
    assert ("the longest answer has" in text) == ("chosen" in rows[0]) == (" with its prompt" in text)
    assert written["data"].get("columns") == columns and reason in text
    assert written["training"].get("objective", "sft") == ("dpo" if "chosen" in rows[0] else "sft")
    shown = cli("train", "config.yaml", "--dry-run")
    assert shown.code == 0, shown.err


def test_choices_that_depend_on_the_number_of_rows() -> None:
    lengths = np.array([10] * 990 + [500] * 10)
    assert [init.max_length(lengths, context)[0] for context in (None, 32)] == [64, 32]
    assert init.max_length(np.array([70, 100]), None)[0] == 128
    assert [init.validation(rows) for rows in (49, 50, 500, 700, 4_000, 100_000)] == [
        None, 0.2, 0.2, 0.14, 0.1, 0.005,
    ]  # fmt: skip
    assert [init.validation(rows, blocks=454) for rows in (4, 5, 30)] == [None, 0.2, 0.2]  # few long texts
    assert [auto.rows_per_step(rows) for rows in (10, 1_600, 5_000, 10**6)] == [8, 8, 16, 32]


@pytest.mark.parametrize(
    ("free", "quantizable", "chosen"),
    [(1 << 40, True, (8, "none", False)), (0, True, (1, "4bit", True)), (0, False, (1, "none", True))],
)
def test_settings_are_chosen_to_fit_in_memory(
    free: int, quantizable: bool, chosen: tuple[int, str, bool], tmp_path: Path
) -> None:
    values: dict[str, Any] = {"model": {"name_or_path": "x"}, "data": {"train": "rows.jsonl"}, "output_dir": "out"}
    draft = config.draft(values, "test")
    run = config.from_draft(draft)
    with torch.device("meta"):
        model, _ = creation.adapt(tiny_llama(), LoraSection(**ATTENTION), seed=0)
    split = read_source(Source(path=str(write_rows(tmp_path / "rows.jsonl", ROWS))), run.data)
    found = fit(model, run, draft, measured(split, 40, 0.0), 8, free, quantizable=quantizable)
    assert (found.batch, found.quantization, found.checkpointed) == chosen
    assert found.is_roomy == (free > 0)


class Tokenized(list[dict[str, Any]]):
    """Rows of 16 tokens."""

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        return np.full(len(self), 16)

    @property
    def supervised(self) -> np.ndarray[Any, Any]:
        return np.full(len(self), 4)


def measured(split: DatasetSplit, count: int, saved: float) -> MeasuredRows:
    """Rows that share their first 12 tokens and have their last 4 supervised."""
    tokenized = Tokenized(
        {
            "input_ids": [*range(12), *(12 + (number + place) % 250 for place in range(4))],
            "labels": [-100] * 12 + [1] * 4,
        }
        for number in range(count)
    )
    return MeasuredRows(RawDatasets(split, None), ColumnChoice(), tokenized.lengths, tokenized, saved)


@pytest.mark.parametrize("packing", ["batch", "full"])
def test_the_memory_estimate_accounts_for_shared_prefixes(packing: str, tmp_path: Path) -> None:
    """If they will be shared: 8 rows take 12 + 8 * 4 tokens. Truncation comes later."""
    seen = []
    split = read_source(Source(path=str(write_rows(tmp_path / "rows.jsonl", ROWS))), DataSection(train="rows.jsonl"))
    for share, saved, dropout in (("auto", 0.6, 0.0), (False, 0.6, 0.0), ("auto", 0.01, 0.0), ("auto", 0.6, 0.1)):
        values: dict[str, Any] = {
            "model": {"name_or_path": "x"},
            "output_dir": "out",
            "lora": ATTENTION | {"lora_dropout": dropout},
        }
        values["data"] = {"train": "rows.jsonl", "max_length": 16, "packing": packing, "share_prefixes": share}
        draft = config.draft(values, "test")
        run = config.from_draft(draft)
        with torch.device("meta"):
            model, _ = creation.adapt(tiny_llama(), run.lora, seed=0)
        found = fit(model, run, draft, measured(split, 40, saved), 8, 1 << 40, quantizable=False)
        seen.append(found.estimate.activations)
    shared, *alone = seen
    assert 0.25 * min(alone) < shared < 0.45 * min(alone)


def test_the_number_of_operations_of_training() -> None:
    model, _ = creation.adapt(tiny_llama(), LoraSection(**ATTENTION), seed=0)
    lengths, supervised = np.array([3, 5]), np.array([1, 2])
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    logits, attention = 4 * 264 * 32, 6 * 2 * 32
    for checkpointed, factor in ((False, 4), (True, 6)):
        texts = 1.2  # of retention, in the time of a fifth of the rows
        for packing, tokens, pairs in (("full", 16, 68), ("batch", 16, 68), ("none", 20, 100)):
            values = {"model": {"name_or_path": "x"}, "data": {"train": "rows.jsonl", "packing": packing}}
            training = {
                "num_train_epochs": 2,
                "per_device_train_batch_size": 2,
                "activation_checkpointing": checkpointed,
            }
            run = config.from_values({**values, "training": training, "output_dir": "out"}, "test")
            costs = Costs.of_run(model, run, lengths, supervised, 0.0)
            expected = texts * (factor * weights * tokens + logits * 6) + attention * pairs
            assert costs.work(run.training, held_out=0) == (2, pytest.approx(expected))
            alone = run.model_copy(update={"retention": config.RetentionSection(kl_weight=0)})
            expected_alone = factor * weights * tokens + logits * 6 + attention * pairs
            costs_alone = Costs.of_run(model, alone, lengths, supervised, 0.0)
            assert costs_alone.work(run.training, held_out=0) == (2, expected_alone)
            evaluations = 4 / (3 * 16)  # one more would be more than a tenth of the training
            assert costs.work(run.training, held_out=4) == (2, pytest.approx(expected * (1 + evaluations)))
            assert costs.work(run.training, held_out=0, share=0.5)[1] == pytest.approx(expected / 2)


@pytest.mark.parametrize(
    ("data", "dropout", "saved", "part"),
    [
        pytest.param({}, 0.0, 0.5, 0.5, id="shared"),
        pytest.param({}, 0.0, 0.04, 1.0, id="not worth it"),
        pytest.param({"share_prefixes": True}, 0.0, 0.04, 0.96, id="forced"),
        pytest.param({"share_prefixes": False}, 0.0, 0.5, 1.0, id="off"),
        pytest.param({"packing": "none"}, 0.0, 0.5, 1.0, id="padded"),
        pytest.param({}, 0.1, 0.5, 1.0, id="dropout"),
    ],
)
def test_shared_prefixes_are_computed_once(data: dict[str, Any], dropout: float, saved: float, part: float) -> None:
    values = {"model": {"name_or_path": "x"}, "lora": {"lora_dropout": dropout}, "output_dir": "out"}
    run = config.from_values({**values, "data": {"train": "rows.jsonl", **data}}, "test")
    model, _ = creation.adapt(tiny_llama(), LoraSection(**ATTENTION), seed=0)
    lengths = np.array([5, 5])
    alone, shared = (Costs.of_run(model, run, lengths, np.array([0, 0]), value).weights[0] for value in (0.0, saved))
    assert shared == pytest.approx(part * alone)


def test_packs_are_counted_as_in_training(cli: Cli, tiny_dir: Path, here: Path) -> None:
    """The reported number of steps equals that of `train`, whose items are packs of rows."""
    write_rows(here / "rows.jsonl", LABELS)
    options = [f"data.validation={write_rows(here / 'dev.jsonl', ROWS)}", "data.packing=full"]
    options += ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=1"]
    ran = cli("init", "rows.jsonl", "--model", tiny_dir, *(part for one in options for part in ("--set", one)))
    assert ran.code == 0, ran.err
    dry = cli("train", "config.yaml", "--dry-run")
    steps = re.search(r"of ([\d,]+) steps", dry.err + dry.out)
    assert steps is not None and f" for {steps[1]} steps" in ran.out, ran.out + dry.err + dry.out


def test_reasons_with_special_characters_keep_the_config_valid() -> None:
    text = "a: b # c\r\n\x85\u2028\ufffe\x1b[1m"
    values: dict[str, Any] = {
        "model": {"name_or_path": text},
        "data": {"train": [text, "x " * 100]},
        "output_dir": "1e3",
    }
    draft = config.draft(values, "test")
    for key in ("model.name_or_path", "data.train", "output_dir"):
        draft.reasons[key] = text * 20
    assert config.parse(draft.text(text), "test") == config.from_values(values, "test")
    assert yaml.safe_load(draft.text(text))["data"] == values["data"], "other readers agree"


def test_texts_with_labels_become_questions_and_answers(cli: Cli, tiny_dir: Path, here: Path) -> None:
    """Trained as text alone, rows would lose their labels."""
    file = here / "reviews.csv"
    file.write_text(
        "text,label\n" + "".join(f"{number} is,{'odd' if number % 2 else 'even'}\n" for number in range(60))
    )
    run = written(cli, tiny_dir, file.name)
    assert run.data.columns == {"instruction": "text", "output": "label"}
    assert "`label` has the answers by its name" in (here / "config.yaml").read_text()
    assert "stratified by label" in (here / "config.yaml").read_text()
    rows = [{"text": f"{number} is", **({"label": "odd"} if number else {})} for number in range(60, -1, -1)]
    ran = cli("init", write_rows(here / "some.jsonl", rows), "--model", tiny_dir, "--output", "some.yaml")
    assert ran.code == 0 and "columns" not in (here / "some.yaml").read_text(), "one of them has no label"


def classified(**others: Any) -> list[dict[str, Any]]:
    """Tickets of three classes, one of which is spelled in three ways. others: field → its values, repeated."""
    kinds = ["Billing"] * 12 + ["billing "] * 3 + ["biling", "Refund", ""] + ["Log in"] * 12 + ["log-in"] * 2
    rows = [{"id": f"T-{number}", "kind": kind, "text": f"is {number}"} for number, kind in enumerate(kinds)]
    rows[3]["text"] = rows[20]["text"] = " "
    return [
        row | {name: values[number % len(values)] for name, values in others.items()} for number, row in enumerate(rows)
    ]


def renamed(rows: list[dict[str, Any]], **names: str) -> list[dict[str, Any]]:
    return [{names.get(name, name): value for name, value in row.items()} for row in rows]


def test_class_labels_beside_texts_become_answers(cli: Cli, tiny_dir: Path, here: Path) -> None:
    """Whatever the field is called. The classes are listed, with possible misspellings."""
    write_rows(here / "tickets.jsonl", classified())
    ran = cli("init", "tickets.jsonl", "--model", tiny_dir)
    assert ran.code == 0, ran.err
    written = (here / "config.yaml").read_text()
    assert yaml.safe_load(written)["data"]["columns"] == {"instruction": "text", "output": "kind"}
    assert "`kind` has 6 different values in 32 rows" in " ".join(written.replace("#", " ").split())
    lines = [" ".join(line.split()) for line in ran.out.splitlines()]
    assert "classes 6: `Billing` 12, `Log in` 12, `billing ` 3, `log-in` 2, `Refund` 1, `biling` 1" in lines
    joined = "{'billing ': Billing, biling: Billing, log-in: Log in}"
    said = f"learned as different ones; if they are the same, set data.labels: {joined}".replace("'", '"')
    assert f"\n  # labels: {joined}\n" in written
    assert f"! classes that look alike, and are {said}" in lines
    assert "! classes of fewer than 10 rows: `Refund` 1" in lines  # those that look alike are named once
    assert "! rows with a class whose text is empty: 2 (tickets.jsonl:4, tickets.jsonl:21)" in lines
    assert "the completion is empty (tickets.jsonl:18)" in ran.out and ran.out.startswith("✓ config.yaml is written\n")


URGENT = {"urgent": ["yes", "no"]}
COLUMNS = {"instruction": "text", "output": "kind"}


@pytest.mark.parametrize(
    ("rows", "text", "columns", "said"),
    [
        (classified(), "text", COLUMNS, []),
        (classified(), "", COLUMNS, []),
        (renamed(classified(), text="ticket"), "", COLUMNS | {"instruction": "ticket"}, []),
        (renamed(classified(), text="instruction"), "", {"output": "kind"}, []),
        (classified(source=["a", "b"]), "text", COLUMNS, ["`source` has 2 "]),
        (classified(number=["1", "2"]), "text", COLUMNS, ["`number` has 2 "]),
        (classified(score=[1, 2]), "text", COLUMNS, ["`score` has 2 "]),
        (renamed(classified(**URGENT), kind="topic"), "text", COLUMNS | {"output": "topic"}, ["`urgent` has 2 "]),
        (renamed(classified(topic=["a", "b"]), id="summary"), "text", None, []),
        (classified(**URGENT), "text", None, []),
        (renamed(classified(**URGENT), text="ticket"), "", None, []),
        ([{"text": f"{one}", "of": "all"} for one in range(40)], "text", {}, []),
        ([{"text": f"{one}", "of": f"{one // 2}"} for one in range(40)], "text", {}, []),
        ([{"text": f"{one}", "lang": "ab"[one % 2]} for one in range(40)], "text", {}, ["`lang` has 2 "]),
        ([{"text": f"{one}", "stars": one % 5} for one in range(40)], "text", {}, ["`stars` has 5 "]),
        ([{"text": f"{one}", "stars": one / 5} for one in range(40)], "text", {}, []),
        ([{"text": f"{one}", "summary": f"{one}!"} for one in range(40)], "text", {"output": "summary"}, []),
        ([{"a b": f"x {one}", "c d": f"y {one}", "kind": "ab"[one % 2]} for one in range(40)], "", {}, []),
        (classified(body=[f"{one} and" for one in range(40)]), "", COLUMNS, []),
    ],
)
def test_the_field_of_class_labels_is_chosen(
    rows: list[dict[str, Any]], text: str, columns: dict[str, str] | None, said: list[str]
) -> None:
    """columns: None if the field is ambiguous and the user is asked."""
    numbered = [Row(f"rows.jsonl:{number}", row) for number, row in enumerate(rows, start=1)]
    if columns is None:
        with pytest.raises(DataError) as caught:
            fields.choose_answer(numbered, text, chat=True)
        assert meanings(caught.value) == [(Code.DATA_FORMAT, "rows.jsonl:1", "data.columns")]
        assert "--set data.format=text" in str(caught.value)
        return
    choice = fields.choose_answer(numbered, text, chat=True)
    assert choice.columns == (columns | {"instruction": "text"} if columns.keys() == {"output"} and text else columns)
    assert len(choice.remarks) == len(said) and all(map(str.startswith, choice.remarks, said))


@pytest.mark.parametrize(
    ("counts", "labels"),
    [
        ({"Billing": 1, "billing ": 9, "BILLING": 2}, dict.fromkeys(("billing ", "BILLING", "Billing"), "billing")),
        ({" yes": 5, " Yes": 1, " no": 3}, {" Yes": " yes"}),
        (
            {"billing": 40, "biling": 2, "bililng": 1, "effect": 9, "affect": 5, "import": 60, "export": 1},
            dict.fromkeys(("biling", "bililng"), "billing"),
        ),
        ({"log in": 4, "Log-In": 3, "login": 2, "log_in": 1}, dict.fromkeys(("Log-In", "login", "log_in"), "log in")),
        ({"ﬁne": 1, "fine": 2, "fine ": 1}, {"ﬁne": "fine", "fine ": "fine"}),
        (dict.fromkeys(["level 1", "level 2", "grade a", "grade b", "spam", "ham", "c", "c++", "c#"], 1), {}),
        (dict.fromkeys(["-1", "1", "0", "10", "1 0", "1.0"], 1), {}),
    ],
)
def test_class_names_that_look_alike_are_joined(counts: dict[str, int], labels: dict[str, str]) -> None:
    assert fields.Classes(counts).joined() == labels


@pytest.mark.parametrize(
    "name", ["it's", "b'c; touch x; '", "a: b", "{x}", "a, b", "x # y", "no", "1e3", "é ü", '"', "$(x)"]
)
def test_a_suggested_option_can_be_pasted_into_a_shell(name: str) -> None:
    """A suggested option is a single shell word, and is parsed back into the names that it was made of."""
    flag, word = shlex.split(keys.assignment("data.columns", {"instruction": name, name: "output"}))
    key, _, value = word.partition("=")
    assert (flag, key, yaml.safe_load(value)) == ("--set", "data.columns", {"instruction": name, name: "output"})


def test_the_user_chooses_between_possible_answer_fields(cli: Cli, tiny_dir: Path, here: Path) -> None:
    """The message contains the options to choose from, one of which is to train on the text alone."""
    write_rows(here / "rows.jsonl", renamed(classified(**URGENT), text="ticket"))
    ran = cli("init", "rows.jsonl", "--model", tiny_dir)
    check_refused(ran, 4, (Code.DATA_FORMAT, "rows.jsonl:1", "data.columns"))
    options = shlex.split(ran.err.partition("say which: ")[2].replace(", or ", " ").replace("; or the text alone:", ""))
    assert options == [
        "--set", "data.columns={instruction: ticket, output: kind}",
        "--set", "data.columns={instruction: ticket, output: urgent}",
        "--set", "data.format=text", "--set", "data.columns={text: ticket}",
    ]  # fmt: skip
    ran = cli("init", "rows.jsonl", "--model", tiny_dir, *options[4:])
    assert ran.code == 0 and config.load(here / "config.yaml").data.columns == {"text": "ticket"}


def test_rows_that_are_all_related_are_not_held_out(cli: Cli, tiny_dir: Path, here: Path) -> None:
    """Copies of a row stay in one split, so any fraction would leave no rows to train on."""
    run = written(cli, tiny_dir, write_rows(here / "rows.jsonl", [{"prompt": "1 +", "completion": " 1"}] * 60))
    assert run.data.validation is None
    assert "all of them belong together" in (here / "config.yaml").read_text()
    pairs = [{"prompt": f"{number % 30} +", "completion": f" {number}"} for number in range(60)]
    ran = cli("init", write_rows(here / "pairs.jsonl", pairs), "--model", tiny_dir, "--output", "pairs.yaml", "--json")
    assert "rows with the same prompt stay together" in " ".join(json.loads(ran.out)["notes"])
    (held_out,) = re.findall(r"# (\d+) rows are held out", (here / "pairs.yaml").read_text())
    dry = cli("train", "pairs.yaml", "--dry-run")
    assert re.search(rf"^ *validation +{held_out} ", dry.out, flags=re.MULTILINE), dry.out


def test_the_hint_for_unknown_fields_depends_on_the_chat_template(cli: Cli, tiny_dir: Path, here: Path) -> None:
    write_rows(here / "odd.jsonl", ODD)
    assert "{instruction: YOURS, output: YOURS}" in cli("init", "odd.jsonl", "--model", tiny_dir).err
