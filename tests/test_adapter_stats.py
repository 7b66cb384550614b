"""`loratune params --adapter`: statistics of an adapter computed from its own files, without its base."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import check_refused, process, run_command, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from running import Cli, MakeConfig
from safetensors.torch import load_file, save_file

from loratune.codes import Code
from loratune.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, inspect
from loratune.lora.stats import adapter_stats

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True, "r": 5},
    "patterns": {"rank_pattern": {"q_proj": 3, r"layers\.1\.self_attn\.o_proj": 12}, "alpha_pattern": {"v_proj": 40}},
    "DoRA": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "whole modules": {"modules_to_save": ["lm_head"], "bias": "lora_only"},
}


def save_adapter(path: Path, **fields: Any) -> PeftModel:
    """An adapter of stock PEFT with random factors, saved at `path`."""
    config = LoraConfig(**({"target_modules": ["q_proj", "v_proj", "o_proj"], "task_type": "CAUSAL_LM"} | fields))
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.peft_config["default"].base_model_name_or_path = "/gone/base"
    model.save_pretrained(str(path), save_embedding_layers=False)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_norm_and_effective_rank_equal_those_of_the_full_update(variant: str, tmp_path: Path) -> None:
    model = save_adapter(tmp_path, **VARIANTS[variant])
    layers = {
        name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, LoraLayer)
    }
    stats = adapter_stats(inspect(tmp_path))
    assert {update.module for update in stats.updates} == layers.keys()
    for update in stats.updates:
        layer = layers[update.module]
        full = layer.get_delta_weight("default").detach().double()
        singular = torch.linalg.svdvals(full)[: update.rank]
        shares = singular / singular.sum()
        assert update.norm == pytest.approx(full.norm().item(), rel=1e-5)
        assert update.effective_rank == pytest.approx((-shares * shares.log()).sum().exp().item(), rel=1e-5)
        assert (update.rank, update.scaling) == (layer.r["default"], layer.scaling["default"])
        assert sorted(update.shape) == sorted(full.shape)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert stats.parameters == trained
    assert stats.adapter_bytes == (tmp_path / WEIGHTS_FILE).stat().st_size


def test_norm_and_effective_rank_of_known_updates(tmp_path: Path) -> None:
    """Rank 4 with two equal directions has effective rank 2; an untrained B has no effective rank."""
    save_adapter(tmp_path, r=4, lora_alpha=8)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    prefix = "base_model.model.model.layers.0.self_attn.{}.lora_{}.weight"
    a, b = tensors[prefix.format("q_proj", "A")], tensors[prefix.format("q_proj", "B")]
    a.copy_(torch.eye(4, a.shape[1]))
    b.copy_(torch.eye(b.shape[0], 4) * torch.tensor([3.0, 3.0, 0.0, 0.0]))
    tensors[prefix.format("o_proj", "B")].zero_()
    save_file(tensors, tmp_path / WEIGHTS_FILE, {"format": "pt"})
    updates = {update.module: update for update in adapter_stats(inspect(tmp_path)).updates}
    q, o = updates["model.layers.0.self_attn.q_proj"], updates["model.layers.0.self_attn.o_proj"]
    assert (q.norm, q.effective_rank) == (pytest.approx(2 * (9 + 9) ** 0.5), pytest.approx(2.0))
    assert (o.norm, o.effective_rank) == (0.0, 0.0)


def test_layers_are_sorted_by_number(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(num_hidden_layers=12), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path))
    settings = json.loads((tmp_path / CONFIG_FILE).read_text()) | {"base_model_name_or_path": "base"}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(settings | {"auto_mapping": None}))
    order = [int(update.module.split(".")[2]) for update in adapter_stats(inspect(tmp_path)).updates]
    assert order == [*range(12)]


def test_the_command_needs_neither_the_base_nor_peft(tmp_path: Path, cli: Cli, forked: Cli) -> None:
    save_adapter(tmp_path / "adapter")
    block = "import sys; sys.modules['peft'] = sys.modules['transformers'] = None"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(block)
    settings = {"PYTHONPATH": str(tmp_path / "site")}
    ran = process("params", "--adapter", tmp_path / "adapter", **settings)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[1].split() == ["base", "/gone/base"]
    assert lines[2] == "rank     8, lora_alpha 8, scaling 1"
    assert lines[5].split()[:6] == ["model.layers.*.self_attn.o_proj", "2", "32", "→", "32", "8"]
    assert run_command([sys.executable, "-c", "import peft"], env=os.environ | settings, check=False).returncode == 1
    values = json.loads(cli("params", "--adapter", tmp_path / "adapter", "--json").out)
    assert (values["base"], values["r"], values["parameters"]) == ("/gone/base", 8, 2 * 8 * (64 + 48 + 64))
    assert values["targets"]["q_proj"] == ["model.layers.*.self_attn.q_proj"]
    assert len(values["updates"]) == 6


def test_an_adapter_trained_by_loratune(cli: Cli, run_config: MakeConfig, tmp_path: Path, tiny_dir: Path) -> None:
    config = run_config(training={"max_steps": 1})
    assert cli("train", config).code == 0
    estimated = json.loads(cli("params", config, "--json").out)
    stats = json.loads(cli("params", "--adapter", tmp_path / "out", "--json").out)
    assert (stats["parameters"], stats["adapter_bytes"]) == (estimated["trainable"], estimated["adapter_bytes"])
    assert stats["base"] == str(tiny_dir)
    assert all(update["norm"] > 0 for update in stats["updates"])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda tensors: tensors.pop(next(name for name in tensors if "lora_B" in name)), Code.ADAPTER_INVALID),
        (
            lambda tensors: next(t for n, t in tensors.items() if "lora_B" in n).fill_(float("nan")),
            Code.ADAPTER_NOT_FINITE,
        ),
        (
            lambda tensors: next(t for n, t in tensors.items() if "lora_A" in n).fill_(float("inf")),
            Code.ADAPTER_NOT_FINITE,
        ),
    ],
)
def test_adapters_that_cannot_be_measured_are_refused(change: Any, code: Code, tmp_path: Path, cli: Cli) -> None:
    save_adapter(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, tmp_path / "bad" / WEIGHTS_FILE, {"format": "pt"})
    ran = cli("params", "--adapter", tmp_path / "bad")
    key = ran.errors[0].split(": ")[1]
    check_refused(ran, 5, (code, str(tmp_path / "bad" / WEIGHTS_FILE), key))
    assert ran.out == "" and key.startswith("model.layers.")


def test_a_rank_that_contradicts_the_config_is_refused(tmp_path: Path, cli: Cli) -> None:
    save_adapter(tmp_path)
    settings = json.loads((tmp_path / CONFIG_FILE).read_text()) | {"r": 4}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(settings))
    ran = cli("params", "--adapter", tmp_path)
    check_refused(ran, 5, (Code.ADAPTER_INVALID, str(tmp_path / WEIGHTS_FILE), "model.layers.0.self_attn.o_proj"))
    assert "has rank 8 where adapter_config.json says 4" in ran.err


@pytest.mark.parametrize(("key", "value"), [("r", 0), ("r", "8"), ("lora_alpha", None), ("lora_alpha", True)])
def test_numbers_in_the_config_are_validated(key: str, value: Any, tmp_path: Path, cli: Cli) -> None:
    save_adapter(tmp_path)
    settings = json.loads((tmp_path / CONFIG_FILE).read_text()) | {key: value}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(settings))
    ran = cli("params", "--adapter", tmp_path)
    assert ran.code == 5
    assert f"{key}: not valid: should be " in ran.err
