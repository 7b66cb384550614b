"""The model card: the metrics in the format of the hub, and how the adapter is used in each client that supports it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran, write_rows
from huggingface_hub import ModelCard
from test_preferences import config

from loratune.config import DataSection, LoraSection, ModelSection, RunConfig, Source
from loratune.export import clients

pytestmark = pytest.mark.usefixtures("untraced_module")

MakeConfig = Callable[..., Path]


def test_the_card_reports_the_metrics(cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path) -> None:
    """Losses with their intervals, in the text and in the metadata, which contain file names but no paths."""
    test = str(write_rows(tmp_path / "test.jsonl", [{"prompt": f"{n} or", "completion": " 7"} for n in range(9)]))
    ran = cli("train", run_config(data={"validation": 0.25, "test": test}, training={"max_steps": 4}))
    assert ran.code == 0, ran.err
    metrics = json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.model_name == "out"
    losses = [(metrics["held_out_loss"], metrics["held_out_interval"])]
    losses.append((metrics["test"]["loss"], metrics["test"]["interval"]))
    names = [("validation", "0.25 of rows.jsonl, held out", "rows.jsonl"), ("test", "test.jsonl", "test.jsonl")]
    for found, (loss, (low, high)), named in zip(card.data.eval_results, losses, names, strict=True):
        assert low < loss < high
        assert (found.task_type, found.metric_type, found.metric_value) == ("text-generation", "loss", round(loss, 4))
        assert (found.dataset_split, found.dataset_name, found.dataset_type) == named
        assert f"{low:.4f} to {high:.4f}" in found.metric_name
        assert f"{loss:.4f}" in card.text and f"(95 % interval {low:.4f} to {high:.4f})" in card.text + ran.out
    assert str(tmp_path) not in card.data.to_yaml().replace(str(tmp_path / "out"), "")


def test_without_held_out_rows_the_card_has_no_model_index(
    cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path
) -> None:
    assert cli("train", run_config(lora={"use_dora": True}, training={"max_steps": 1})).code == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.eval_results is None and "vllm" not in card.text and "llama-server" not in card.text
    assert json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]["held_out_interval"] is None


def test_the_card_of_a_preference_adapter(cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path) -> None:
    """The objective with its settings and its reference; accuracy, margin and length, before and after; the model
    index."""
    reference = {"dpo": ", the base as the reference", "orpo": ", without a reference"}
    test = [{"prompt": f"{number} or", "chosen": " 7", "rejected": " seven"} for number in range(8)]
    for objective in ("dpo", "orpo"):
        changes: dict[str, Any] = {"preferences": {"beta": 0.25}, "output_dir": str(tmp_path / objective)}
        changes["data"] = {"test": str(write_rows(tmp_path / "test.jsonl", test))}
        ran = cli("train", config(run_config, tmp_path, objective, **changes))
        assert ran.code == 0, ran.err
        card = ModelCard.load(tmp_path / objective / "README.md")
        metrics = json.loads((tmp_path / objective / "loratune.json").read_text())["metrics"]
        figures = metrics["preferences"]
        lines = dict(re.findall(r"- \*\*(.+?):\*\* (.+)", card.text))
        assert lines["Objective"] == f"{objective} with beta 0.25{reference[objective]}"
        low, high = figures["reward_accuracy"]["interval"]
        margin = figures["reward_margin"]["value"]
        accuracy = f"{figures['reward_accuracy']['value']:.3f} (95 % interval {low:.3f} to {high:.3f})"
        assert lines["Reward accuracy"].startswith(f"{accuracy} on 12 validation pairs, margin {margin:.3f} (95 %")
        before, after = (figures[f"ranking_accuracy_{when}"]["value"] for when in ("before", "after"))
        assert lines["Ranking accuracy"].startswith(f"{before:.3f} → {after:.3f} (95 % interval")
        assert lines["Length"].endswith("of the more probable answers (chosen 4.2, rejected 10.2)")
        assert lines["Held-out"].startswith(f"{metrics['held_out_loss']:.4f} per pair (95 % interval")
        assert "preferences:\n  beta: 0.25\n" in card.text
        assert objective in card.data.tags
        loss, share, tested = card.data.eval_results
        assert (loss.metric_type, share.metric_type, tested.metric_type) == ("loss", "accuracy", "loss")
        assert loss.metric_name.startswith("per pair (") and tested.dataset_split == "test"
        assert lines["Test"].startswith(f"{metrics['test']['loss']:.4f} per pair on 8 test pairs (95 % interval")
        assert "per pair on 12 validation pairs (95 %" in lines["Gain"]
        assert share.metric_value == round(figures["reward_accuracy"]["value"], 4)
        assert share.metric_name == f"reward accuracy (95 % interval {low:.4f} to {high:.4f})"
        assert "desirable_weight" not in card.text and ("label_smoothing" in card.text) == (objective == "dpo")
    assert cli("train", run_config(training={"max_steps": 1}, output_dir=str(tmp_path / "sft"))).code == 0
    assert "Objective" not in (tmp_path / "sft" / "README.md").read_text()


VLLM = "vllm serve me/base --enable-lora --max-lora-rank {} --lora-modules 'my-out=my out'"
GGUF = [
    "loratune export --adapter 'my out' --to gguf --output 'my out-gguf'",
    "llama-server -m BASE.gguf --lora 'my out-gguf/my-out-gguf.gguf'",
]
FOLDED = ["loratune export --adapter 'my out' --to vllm --output 'my out-vllm'", VLLM.format(8)[:-1] + "-vllm'"]
COMMANDS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "plain": ({}, {}, [VLLM.format(8), *GGUF]),
    "rank": ({"r": 20}, {}, [VLLM.format(32), *GGUF]),
    "a doubled rank": ({"init_lora_weights": "pissa", "r": 16}, {}, [VLLM.format(32), *GGUF]),
    "several scales": ({"alpha_pattern": {"q": 4}}, {}, [*FOLDED, *GGUF]),
    "a GGUF base": ({}, {"gguf_file": "q.gguf"}, [GGUF[0], GGUF[1].replace("BASE.gguf", "me/base/q.gguf")]),
    "dora": ({"use_dora": True}, {}, []),
    "biases": ({"bias": "all"}, {}, []),
    "loftq": ({"init_lora_weights": "loftq"}, {"quantization": "4bit"}, []),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_card_lists_only_clients_that_can_use_the_adapter(name: str) -> None:
    """Each with what it needs; PEFT is always listed."""
    lora, model, expected = COMMANDS[name]
    base, rows = ModelSection(name_or_path="me/base", **model), DataSection(train=Source(path="rows.jsonl"))
    run = RunConfig(model=base, lora=LoraSection(**lora), data=rows, output_dir="my out")

    def commands(are_layers_known: bool) -> list[str]:
        text = clients.sections(run, "my out", "hi", are_layers_known=are_layers_known)
        assert '.from_pretrained("my out"' in text or 'from_pretrained(base, "my out")' in text
        return [line for block in re.findall("```sh\n(.*?)\n```", text, re.DOTALL) for line in block.splitlines()]

    assert commands(True) == expected
    assert commands(False) == []
