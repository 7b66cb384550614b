"""The model card: the metrics in the format of the hub, and how the adapter is used in each client that supports it."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Ran, write_rows
from huggingface_hub import ModelCard, ModelCardData, metadata_eval_result
from test_preferences import config

from loratune.adapter import card as cards
from loratune.adapter import clients
from loratune.config import DataSection, LoraSection, ModelSection, RunConfig, Source

pytestmark = pytest.mark.usefixtures("untraced_module")

MakeConfig = Callable[..., Path]


def test_the_card_reports_the_metrics(
    cli: Callable[..., Ran], run_config: MakeConfig, tiny_dir: Path, tmp_path: Path
) -> None:
    """Losses with their intervals, in the text and in the metadata, which contain file names but no paths."""
    test = str(write_rows(tmp_path / "test.jsonl", [{"prompt": f"{n} or", "completion": " 7"} for n in range(9)]))
    base = shutil.copytree(tiny_dir, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: gemma\nlicense_link: https://a.b/c\nmodel-index: 7\n---\n# Base\n")
    sections: dict[str, Any] = {"data": {"validation": 0.25, "test": test}, "training": {"max_steps": 4}}
    ran = cli("train", run_config(model={"name_or_path": str(base)}, **sections))
    assert ran.code == 0, ran.err
    metrics = json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.model_name == "out" and card.data.library_name == "peft" and "loratune" in card.data.tags
    assert (card.data.license, card.data.license_link) == ("gemma", "https://a.b/c")
    assert card.data.get("widget") == [{"text": "0 and 0 make"}] and "datasets" not in card.data.to_dict()
    again = ModelCardData(**yaml.safe_load(card.data.to_yaml()))
    assert again.to_dict() == card.data.to_dict() and len(again.eval_results or ()) == 2
    of_hub = metadata_eval_result(
        model_pretty_name="out", task_pretty_name="Text generation", task_id="text-generation",
        metrics_pretty_name=card.data.eval_results[0].metric_name, metrics_id="loss",
        metrics_value=card.data.eval_results[0].metric_value, dataset_pretty_name="0.25 of rows.jsonl, held out",
        dataset_id="rows.jsonl", dataset_split="validation",
    )["model-index"][0]  # fmt: skip
    own = card.data.to_dict()["model-index"][0]
    assert of_hub["name"] == own["name"] and of_hub["results"] == [
        {**own["results"][0], "metrics": [one | {"verified": False} for one in own["results"][0]["metrics"]]}
    ]
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


def test_the_card_names_the_datasets_of_the_hub() -> None:
    """Once each, and no files; an example prompt of a conversation as messages."""
    sources = [Source(path="me/rows"), Source(path="/here/rows.jsonl"), Source(path="squad"), Source(path="me/rows")]
    data = DataSection(train=sources, test=Source(path="me/test"))
    run = RunConfig(model=ModelSection(name_or_path="/gone"), data=data, output_dir="out")
    metrics: dict[str, Any] = {"first_loss": 2.0, "last_loss": 1.0, "steps": 1, "tokens": 9, "held_out_loss": None}
    metrics |= {"held_out_interval": None, "gain": {"unit": "token"}}
    messages = [{"role": "user", "content": "Hi \u202e: - {x}"}]
    texts = dict.fromkeys(("use", "verdict", "gain"), "")
    effects = {"unrelated text": "", "base's answers": ""}
    lines = cards.CardLines(
        **texts, side_effects=effects, held_out=(), formats=["text"], example={"messages": messages}, changes=()
    )
    card = ModelCard(cards.model_card(run.resolved(), metrics, "my out", lines))
    assert card.data.datasets == ["me/rows", "squad", "me/test"] and card.data.get("widget") == [{"messages": messages}]
    assert not {"base_model", "license", "model_name", "model-index"} & {*card.data.to_dict()}


LICENCES: dict[str, tuple[str | bytes, dict[str, str]]] = {
    "known": ("---\nlicense: mit\n---\n", {"license": "mit"}),
    "other": (
        "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n# X",
        {"license": "other", "license_name": "own"},
    ),
    "a list": ("---\nlicense: [mit, gpl]\n---\n", {}),
    "a list of one": ("---\ntags: [x]\nlicense:\n- mit\nlanguage:\n- en\n---\n", {"license": "mit"}),
    "in Windows' lines": ("\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
    "other types": ("---\nlicense: {a: b}\nlicense_name: 5\n---\n", {}),
    "other keys": ("---\nlicense: mit\nlicense_foo: bar\nx:\n  license_name: own\n---\n", {"license": "mit"}),
    "a script": ("---\nlicense: mit\nlicense_link: javascript://%0aalert(1)\n---\n", {"license": "mit"}),
    "long": (f"---\nlicense: {'m' * 900}\nlicense_name: own\n---\n", {"license_name": "own"}),
    "endless": (f"---\nlicense: {'m' * 9_000_000}\nlicense_name: own\n---\n", {}),
    "several lines": ('---\nlicense: "mit\\n---\\n"\nlicense_name: |\n  a\n  b\n---\n', {}),
    "100,000 tags": (f"---\n{'- x: y' * 100_000}\nlicense: mit\n---\n", {"license": "mit"}),
    "nested": (f"---\na: {'[' * 3000}\nlicense: mit\n---\n", {"license": "mit"}),
    "nested itself": (f"---\nlicense: {'[' * 900}\n---\n", {}),
    "code": ("---\nlicense: !!python/object/apply:os.getcwd []\n---\n", {}),
    "no metadata": ("# Base\n", {}),
    "broken metadata": ("---\nlicense: [mit\n---\n", {}),
    "not a mapping": ("---\n- mit\n---\n", {}),
    "not text": (b"---\nlicense: \xff\xfe\n---\n", {}),
    "a pipe": ("", {}),
    "nothing": ("", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", LICENCES)
def test_the_licence_of_the_base_is_carried_over(name: str, tmp_path: Path) -> None:
    content, expected = LICENCES[name]
    if name == "a pipe":
        os.mkfifo(tmp_path / "README.md")
    elif content:
        (tmp_path / "README.md").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert cards.base_licence({"name_or_path": str(tmp_path), "revision": None}) == expected


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
