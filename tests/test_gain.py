"""Row 82: an adapter is compared with its base, pair by pair; no gain is said, and worse is not published."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROWS, Ran, tiny_llama, tree, write_rows
from peft import PeftModel
from running import MakeConfig, checkpoints
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune import gain


def test_the_interval_is_students() -> None:
    """Against tables of the 0.975 quantile."""
    for degrees, expected in ((2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423), (127, 1.9788)):
        assert gain._quantile(degrees) == pytest.approx(expected, rel=0.01)
    found = gain.compare([(2.0, 1.0), (3.0, 1.5), (4.0, 2.0)], "training")  # differences -1, -1.5, -2
    assert (found.base, found.adapter, found.difference) == (3.0, 1.5, -1.5)
    half = 4.3027 * 0.5 / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(-1.5 - half, abs=0.02), pytest.approx(-1.5 + half, abs=0.02))


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Of samples around a known mean; 95 % of 2,000, give or take three deviations."""
    dice = np.random.default_rng(0)
    for rows in (3, 10, 100):
        inside = 0
        for sample in dice.normal(0.3, 2.0, (2000, rows)):
            found = gain.compare([(0.0, one) for one in sample.tolist()], "training")
            inside += found.low <= 0.3 <= found.high
        assert abs(inside / 2000 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 2000)


VERDICTS: dict[str, tuple[list[float], str]] = {
    "better in every row": ([-0.2, -0.3, -0.25, -0.22], "gain"),
    "worse in every row": ([0.2, 0.3, 0.25, 0.22], "worse"),
    "up and down": ([0.2, -0.3, 0.25, -0.22], "no gain"),
    "better on the whole, not for sure": ([0.2, -0.4, -0.25, 0.1], "no gain"),
    "the same": ([0.0] * 5, "no gain"),
    "too little to be shown, in every row": ([-2e-6, -3e-6, -2e-6, -3e-6], "no gain"),
    "too little to be a loss, in every row": ([2e-6, 3e-6, 2e-6, 3e-6], "no gain"),
    "two rows": ([-0.2, -0.3], "not judged"),
    "one row": ([0.5], "not judged"),
    "not finite": ([-0.2, math.nan, -0.3, -0.2], "worse"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts(name: str) -> None:
    differences, verdict = VERDICTS[name]
    found = gain.compare([(2.0 + number, 2.0 + number + one) for number, one in enumerate(differences)], "validation")
    assert found.verdict == verdict
    assert str(found)


def test_the_sample_is_small_and_always_the_same() -> None:
    assert gain._sample(np.full(5, 50_000), 0) == [0, 1, 2, 3, 4]
    many = gain._sample(np.full(100_000, 10), 10**9)
    assert len(many) == 64 and many == gain._sample(np.full(100_000, 10), 10**9)
    assert len(gain._sample(np.full(1000, 4096), 10**9)) == 8
    assert len(gain._sample(np.full(1000, 1000), 10**9)) == 32
    assert len(gain._sample(np.full(1000, 1000), 400_000)) == 12


def told(ran: Ran) -> str:
    """The line on the gain in the block at the end."""
    (line,) = [line for line in ran.out.splitlines() if line.startswith("  gain ")]
    return line.removeprefix("  gain ").strip()


def by_hand(base_dir: Path, out: Path) -> list[tuple[float, float]]:
    """Mean loss of each row of ROWS on base and adapter, by stock PEFT in float32."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    found = []
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    for wrap in (lambda base: base, lambda base: PeftModel.from_pretrained(base, str(out)).eval()):
        model = wrap(base)
        losses = []
        for row in ROWS:
            asked = tokenizer(row["prompt"]).input_ids
            answer = [*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).item())
        found.append(losses)
    return list(zip(*found, strict=True))


@pytest.fixture
def biased_dir(tmp_path: Path, tiny_dir: Path) -> Path:
    """The tiny Llama with biases, which a run may train."""
    tiny_llama(attention_bias=True).save_pretrained(tmp_path / "biased")
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(tmp_path / "biased")
    return tmp_path / "biased"


KINDS: dict[str, dict[str, Any]] = {"plain": {}, "biases": {"bias": "all"}, "pissa": {"init_lora_weights": "pissa"}}


@pytest.mark.parametrize("kind", KINDS)
def test_the_figures_are_those_of_stock_peft(
    kind: str, cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path, biased_dir: Path
) -> None:
    config = run_config(
        model={"name_or_path": str(biased_dir)}, lora=KINDS[kind], training={"learning_rate": 0.02, "max_steps": 20}
    )
    ran = cli("train", config)
    assert ran.code == 0, ran.err
    expected = gain.compare(by_hand(biased_dir, tmp_path / "out"), "training")
    found = json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]["gain"]
    assert (found.pop("verdict"), found.pop("rows"), found.pop("split")) == ("gain", 40, "training")
    for name, value in found.items():
        assert value == pytest.approx(getattr(expected, name), abs=2e-5), name
    assert told(ran).startswith(f"{-expected.difference:.4f} over the base on 40 training rows (loss ")
    assert f"- **Gain:** {told(ran)}\n" in (tmp_path / "out" / "README.md").read_text()


def test_no_gain_is_said(cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path) -> None:
    ran = cli("train", run_config(training={"learning_rate": 1e-9, "max_steps": 5}))
    assert ran.code == 0, ran.err
    assert told(ran).startswith("no gain over the base on 40 training rows (loss ")
    assert "- **Gain:** no gain over the base" in (tmp_path / "out" / "README.md").read_text()


def test_worse_is_not_published(cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path) -> None:
    """Nor anything else; the checkpoints stay, and the user may have it all the same."""
    config = run_config(training={"learning_rate": 1e9, "max_steps": 5, "save_steps": 2})
    ran = cli("train", config)
    assert (ran.code, ran.out) == (6, "")
    assert ran.err.splitlines()[-1].startswith("error: the adapter is worse than the base on 40 training rows (loss ")
    assert ran.err.endswith("or publish it with --resume --allow-worse\n")
    assert not (tmp_path / "out").exists()
    assert checkpoints(tmp_path / "out.partial")[0].name == "checkpoint-5"
    kept = tree(tmp_path / "out.partial")
    assert cli("train", config, "--resume").code == 6
    assert tree(tmp_path / "out.partial") == kept
    ran = cli("train", config, "--resume", "--allow-worse")
    assert ran.code == 0, ran.err
    assert told(ran).startswith("worse than the base on 40 training rows (loss ")
    assert json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]["gain"]["verdict"] == "worse"


def test_held_out_rows_decide_where_there_are_any(
    cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path
) -> None:
    """What helps on the rows of training, and on others of another kind does not."""
    away = [{"prompt": f"{number} and {number} make", "completion": "ZQXJ" * 3} for number in range(12)]
    held_out = str(write_rows(tmp_path / "held.jsonl", away))
    hard = {"lora": {"modules_to_save": ["lm_head"]}, "training": {"learning_rate": 0.1, "max_steps": 60}}
    ran = cli("train", run_config(data={"validation": held_out}, **hard))
    assert ran.code == 6 and "the adapter is worse than the base on 12 validation rows" in ran.err
    few = str(write_rows(tmp_path / "few.jsonl", away[:2]))
    config = run_config(data={"validation": few}, **hard, output_dir=str(tmp_path / "other"))
    ran = cli("train", config)
    assert ran.code == 0, ran.err
    assert told(ran).startswith("not judged: 2 validation rows are too few to compare it with its base (loss ")
