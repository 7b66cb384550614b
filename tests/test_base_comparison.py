"""Metrics and answers of the base, computed with the adapter disabled, equal those of the base on disk, or are
refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ATTENTION, ROWS, Ran, check_refused, meanings, tiny_llama, write_rows
from peft import LoraConfig, PeftModel, get_peft_model
from running import MakeConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from loratune.adapter import generation, loading
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.config import LoraSection
from loratune.errors import AdapterError
from loratune.lora import creation, targets, tensors

pytestmark = pytest.mark.usefixtures("untraced_module")

IDS = torch.tensor([[1, 2, 3, 5, 8, 13, 21, 34]])
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases, all": {"bias": "all"},
    "biases, of adapted layers": {"bias": "lora_only"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa and biases": {"init_lora_weights": "pissa", "bias": "all"},
    "dora": {"use_dora": True},
    "a whole module": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "biases of its own": {"lora_bias": True},
}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A base with biases, all nonzero."""
    path = tmp_path_factory.mktemp("biased") / "base"
    base = tiny_llama(attention_bias=True, mlp_bias=True)
    for name, parameter in base.named_parameters():
        if "bias" in name:
            parameter.data.normal_()
    base.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def made_by_peft(base_dir: Path, out: Path, **settings: Any) -> None:
    """An adapter as PEFT saves it, with every trained value changed."""
    config = LoraConfig(**({"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "up_proj"]} | settings))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(out)


def opened(path: Path) -> generation.LoadedAdapter:
    found = AdapterDirectory.open(path)
    return loading.load(replace(found, base=found.base.model_copy(update={"dtype": "float32"})))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_disabling_the_adapter_restores_the_base(kind: str, base_dir: Path, tmp_path: Path) -> None:
    made_by_peft(base_dir, tmp_path / "made", **KINDS[kind])
    fresh = AutoModelForCausalLM.from_pretrained(base_dir)
    alone, expected = logits(fresh), logits(PeftModel.from_pretrained(fresh, str(tmp_path / "made")))
    assert not torch.allclose(alone, expected, rtol=0, atol=1e-3)
    tuned = opened(tmp_path / "made")
    for _ in range(2):
        assert torch.equal(logits(tuned.model), expected)
        with tuned.without_adapter():
            assert torch.equal(logits(tuned.model), alone)


def test_an_adapter_that_cannot_be_disabled_is_refused(base_dir: Path, tmp_path: Path, cli: Callable[..., Ran]) -> None:
    made_by_peft(base_dir, tmp_path / "made", layer_replication=[(0, 2), (1, 2)])
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    for arguments in (("evaluate", "--data", rows), ("generate", "1 and 1 make", "--base", "--max-new-tokens", 1)):
        ran = cli(*arguments, "--adapter", tmp_path / "made")
        check_refused(ran, 5, (Code.ADAPTER_NOT_REPRODUCIBLE, str(tmp_path / "made"), ""))
        assert "lora.layer_replication" in ran.err
    assert cli("generate", "1 and 1 make", "--adapter", tmp_path / "made", "--max-new-tokens", 1).code == 0


def test_an_unexpected_change_of_the_base_is_refused(base_dir: Path, tmp_path: Path) -> None:
    made_by_peft(base_dir, tmp_path / "made")
    tuned = opened(tmp_path / "made")
    tuned.model.get_base_model().model.layers[1].mlp.down_proj.weight.data[-1, -1] += 1
    with pytest.raises(AdapterError) as error, tuned.without_adapter():
        pass
    assert meanings(error.value) == [(Code.ADAPTER_NOT_REPRODUCIBLE, str(tmp_path / "made"), "")]


def test_evaluate_and_generate_use_the_original_base(
    cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path, base_dir: Path
) -> None:
    """With an adapter that loratune trained with biases, compared with one without."""
    found, rows = [], write_rows(tmp_path / "few.jsonl", ROWS[:4])
    for name, kind in (("plain", "none"), ("biased", "all")):
        config = run_config(
            model={"name_or_path": str(base_dir)},
            lora={"bias": kind},
            training={"learning_rate": 0.1, "max_steps": 2},
            output_dir=str(tmp_path / name),
        )
        assert cli("train", config).code == 0
        scores = cli("evaluate", "--adapter", tmp_path / name, "--data", rows, "--json")
        asked = ("--base", "--max-new-tokens", 4, "--input", rows, "--output")
        assert cli("generate", "--adapter", tmp_path / name, *asked, tmp_path / f"{name}.jsonl").code == 0
        answers = [json.loads(line)["base"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        found.append((json.loads(scores.out)["base"], answers))
    assert found[0] == found[1]


STARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"bias": "all"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora", "bias": "lora_only"},
    "whole": {"modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("kind", STARTS)
def test_the_base_is_restored_after_training(kind: str, base_dir: Path) -> None:
    """In the trained model, before the adapter is saved."""
    base, section = AutoModelForCausalLM.from_pretrained(base_dir), LoraSection(**ATTENTION | STARTS[kind])
    alone = logits(base)
    model = creation.attach(base, section, targets.find(base, section).peft(), seed=0)
    start = creation.initialize_adapter(model, section)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    trained, expected = tensors.full_weights(model), logits(model)
    with tensors.as_initialized(model, start, trained):
        assert torch.allclose(logits(model), alone, rtol=0, atol=1e-4 if start.to_plain_lora else 0)
    assert torch.equal(logits(model), expected)
