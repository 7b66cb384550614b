"""`loratune evaluate` on the tiny model, against stock PEFT computed a row at a time in float32."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Ran, check_refused, tree, write_rows
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from loratune import data
from loratune.cli import app
from loratune.codes import Code
from loratune.config import Source
from loratune.data.packing import BatchLayout
from loratune.inference import loading
from loratune.training import gain, preflight

ENDS = ["<|endoftext|>", "<|end|>"]
PROMPTS = ["go " * (number % 7) + "ab"[number % 2] + ":" for number in range(45)]
ANSWERS = ["ox" if number % 2 else "yes" for number in range(45)]


def chat_row(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}


def rendered(row: dict[str, Any]) -> list[tuple[str, bool]]:
    """A row as pieces of text and whether they are supervised, written out by hand."""
    pieces: list[tuple[str, bool]] = []
    for message in row["messages"]:
        if message["role"] == "user":
            pieces.append((("\n" if pieces else "") + f"<|user|>{message['content']}<|end|>\n<|assistant|>", False))
        else:
            pieces.append((f"{message['content']}<|end|>", True))
    return pieces


TRAIN = [chat_row(prompt, answer) for prompt, answer in zip(PROMPTS[:28], ANSWERS, strict=False)]
HELD_OUT = [
    *(chat_row(prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)),
    *(chat_row(prompt, wrong) for prompt, wrong in zip(PROMPTS, ["y", "oxen", "a much longer answer"], strict=False)),
    *(chat_row(prompt, "ye") for prompt in PROMPTS[::2]),
    *(chat_row("a:", "yes", prompt, answer) for prompt, answer in zip(PROMPTS[:9], ANSWERS, strict=False)),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """A directory with `adapter`, trained with `held-out.jsonl` as its validation rows."""
    path = tmp_path_factory.mktemp("evaluate")
    config = {
        "model": {"name_or_path": str(tiny_dir), "dtype": "float32"},
        "data": {
            "train": str(write_rows(path / "train.jsonl", TRAIN)),
            "validation": str(write_rows(path / "held-out.jsonl", HELD_OUT)),
        },
        "training": {"learning_rate": 1e-2, "max_steps": 200, "per_device_train_batch_size": 14},
        "output_dir": str(path / "adapter"),
    }
    (path / "run.yaml").write_text(yaml.safe_dump(config))
    ran = CliRunner().invoke(app, ["train", str(path / "run.yaml")])
    assert ran.exit_code == 0, ran.stderr
    return path


@pytest.fixture(scope="module")
def scores(place: Path) -> dict[str, dict[str, Any]]:
    before = tree(place)
    ran = CliRunner().invoke(
        app, ["evaluate", "--adapter", f"{place}/adapter", "--data", f"{place}/held-out.jsonl", "--json"]
    )
    seen = [HELD_OUT.index(row) + 1 for row in HELD_OUT if row in TRAIN]
    places = ", ".join(f"{place}/held-out.jsonl:{line}" for line in seen[:3])
    assert (ran.exit_code, ran.stderr) == (0, f"{len(seen)} of the evaluation rows are also in train ({places}, ...)\n")
    assert tree(place) == before
    return json.loads(ran.stdout)


@torch.no_grad()
def by_hand(place: Path, base: Path, which: str) -> dict[str, float]:
    """Loss, exact match and so on, a row at a time, without padding, cache, or any code of loratune."""
    tokenizer = AutoTokenizer.from_pretrained(place / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if which == "adapter":
        model = PeftModel.from_pretrained(model, str(place / "adapter")).eval()
    ends = tokenizer.convert_tokens_to_ids(ENDS)
    total, tokens, exact, right = 0.0, 0, 0, 0
    for row in HELD_OUT:
        ids: list[int] = []
        for text, supervised in rendered(row):
            piece = tokenizer(text).input_ids
            if supervised:
                logits = model(torch.tensor([ids + piece])).logits[0, len(ids) - 1 : -1]
                total += torch.nn.functional.cross_entropy(logits, torch.tensor(piece), reduction="sum").item()
                tokens += len(piece)
                answer: list[int] = []
                while len(answer) < 30 and not (answer and answer[-1] in ends):
                    answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
            ids += piece
        exact += answer == piece
        right += tokenizer.decode(answer).startswith(row["messages"][-1]["content"])
    loss = total / tokens
    matches = {"exact_match": exact / len(HELD_OUT), "label_accuracy": right / len(HELD_OUT)}
    return {"loss": loss, "perplexity": math.exp(loss), "rows": len(HELD_OUT), "tokens": tokens} | matches


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_scores_equal_a_computation_by_hand(scores: dict[str, Any], place: Path, tiny_dir: Path, which: str) -> None:
    expected = by_hand(place, tiny_dir, which)
    assert scores[which].keys() == {*expected, "intervals"}
    for name in ("rows", "tokens", "exact_match", "label_accuracy"):
        assert scores[which][name] == expected[name], name
    assert scores[which]["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert scores[which]["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)


def test_the_scores_say_something(scores: dict[str, Any]) -> None:
    assert set(scores) == {"base", "adapter", "difference", "metric", "verdict", "overlap"}
    assert scores["adapter"]["loss"] < scores["base"]["loss"] - 0.1
    assert scores["base"]["exact_match"] == 0
    assert 0 < scores["adapter"]["exact_match"] < scores["adapter"]["label_accuracy"] < 1


def test_held_out_loss_of_training_is_the_adapters(scores: dict[str, Any], place: Path) -> None:
    metrics = json.loads((place / "adapter" / "loratune.json").read_text())["metrics"]
    assert metrics["held_out_loss"] == pytest.approx(scores["adapter"]["loss"], abs=1e-6)


def test_batch_size_changes_nothing(scores: dict[str, Any], place: Path) -> None:
    loaded = loading.load(preflight.open_adapter(place / "adapter"))
    split = data.read_source(Source(path=str(place / "held-out.jsonl")), loaded.data)
    rows = data.prepare(split, loaded.renderer, loaded.data, 264).rows
    prompts = [row.prompt for row in rows.rows()]
    alone = [loaded.complete([prompt], 6)[0] for prompt in prompts]
    for size in (1, 7, 64):
        loss = gain.held_out_loss(loaded.model, BatchLayout(rows, rows.lengths, "none", size, 1024, 0))
        assert loss.tokens == scores["adapter"]["tokens"]
        assert loss.mean == pytest.approx(scores["adapter"]["loss"], abs=1e-6)
        batches = [loaded.complete(prompts[at : at + size], 6) for at in range(0, len(prompts), size)]
        assert [ids for batch in batches for ids in batch] == alone


def test_the_table(cli: Callable[..., Ran], scores: dict[str, Any], place: Path) -> None:
    ran = cli("evaluate", "--adapter", place / "adapter", "--data", place / "held-out.jsonl")
    lines = [line.split() for line in ran.out.splitlines()]
    assert lines[0][:5] == [f"{len(HELD_OUT)}", "rows,", f"{scores['base']['tokens']}", "supervised", "tokens,"]
    expected = []
    for name, kind in (("loss", ".4f"), ("perplexity", ".2f"), ("exact_match", ".1%"), ("label_accuracy", ".1%")):
        cells = name.split("_")
        for model in ("base", "adapter"):
            low, high = (f"{end:{kind}}".rstrip("%") for end in scores[model]["intervals"][name])
            cells += [f"{scores[model][name]:{kind}}", f"[{low},", f"{high}]"]
        expected.append(cells)
    assert lines[1:6] == [["base", "adapter"], *expected]
    assert max(map(len, ran.out.splitlines())) <= 120


def test_rows_without_a_prompt_have_no_match(
    cli: Callable[..., Ran], run_config: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "text.jsonl", [{"text": "some text"}] * 3)
    assert cli("train", run_config(data={"train": str(path)})).code == 0
    ran = cli("evaluate", "--adapter", tmp_path / "out", "--data", path, "--json")
    score = json.loads(ran.out)["adapter"]
    assert (score["exact_match"], score["label_accuracy"], score["rows"], score["tokens"]) == (None, None, 3, 27)


@pytest.mark.parametrize(
    ("rows", "code", "detail"),
    [
        (None, Code.DATA_FILE_NOT_FOUND, ""),
        ([], Code.DATA_NO_ROWS, ""),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], Code.DATA_FIELD_MISSING, ""),
        (
            [chat_row("a", " ")],
            Code.DATA_NOTHING_TO_LEARN,
            "(1 row dropped: nothing to learn: the completion is empty (",
        ),
        ([chat_row("a", "b" * 2000)], Code.DATA_NOTHING_TO_LEARN, "the answer does not fit in max_length 1024"),
    ],
)
def test_refused(cli: Callable[..., Ran], place: Path, tmp_path: Path, rows: Any, code: Code, detail: str) -> None:
    path = tmp_path / "rows.jsonl"
    if rows is not None:
        write_rows(path, rows)
    ran = cli("evaluate", "--adapter", place / "adapter", "--data", path)
    assert (ran.code, ran.out) == (4, "")
    (line,) = ran.errors
    assert line.startswith(str(path)) and f" [{code}]" in line and detail in line


def test_rows_may_be_read_otherwise_than_in_training(place: Path, cli: Callable[..., Ran], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"q": "a:", "r": "yes"}])
    refused = cli("evaluate", "--adapter", place / "adapter", "--data", rows)
    assert refused.code == 4
    columns = ("--set", "data.columns={prompt: q, completion: r}")
    ran = cli("evaluate", "--adapter", place / "adapter", "--data", rows, *columns)
    assert ran.code == 0, ran.err
    ran = cli("evaluate", "--adapter", place / "adapter", "--data", rows, "--set", "lora.r=4")
    check_refused(ran, 2, (Code.ADAPTER_SET_NOT_DATA, "", "--set"))
    assert "`lora.r=4`" in ran.err and ran.err.count("\n") == 1


GPT2: dict[str, Any] = {"vocab_size": 264, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}


def test_rows_beyond_the_positions_of_the_model(
    place: Path, cli: Callable[..., Ran], run_config: Callable[..., Path], tmp_path: Path, tiny_dir: Path
) -> None:
    """A Llama computes something for them, and a GPT-2 has nothing to look up."""
    GPT2LMHeadModel(GPT2Config(**GPT2, bos_token_id=256, eos_token_id=256)).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(tmp_path / "gpt2")
    assert cli("train", run_config(model={"name_or_path": str(tmp_path / "gpt2")}, training={"max_steps": 1})).code == 0
    for adapter, positions in ((place / "adapter", 512), (tmp_path / "out", 64)):
        rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a" * (positions + 8), "completion": "b"}])
        ran = cli("evaluate", "--adapter", adapter, "--data", rows)
        check_refused(ran, 2, (Code.TRAINING_CONTEXT_LENGTH, "", "data.max_length"))
        assert ran.out == "" and ran.err.startswith("error: data.max_length: is 1024, and the longest row has ")
        assert f" {positions} positions [" in ran.err and ran.err.endswith(f"; set it to {positions}\n")
        ran = cli("evaluate", "--adapter", adapter, "--data", rows, "--set", f"data.max_length={positions}")
        assert ran.code == 0, ran.err
    mixed = [{"prompt": "a" * 60, "completion": "b"}, {"prompt": "a", "completion": "b" * 50}]  # 110 if taken together
    ran = cli("evaluate", "--adapter", tmp_path / "out", "--data", write_rows(tmp_path / "mixed.jsonl", mixed))
    assert ran.code == 0, ran.err
