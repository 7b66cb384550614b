"""Adapters that PEFT made without loratune: they compute what PEFT trained, or they are refused, with the reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, Ran, check_refused, meanings, tiny_llama, write_rows
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn

from loratune.codes import Code
from loratune.errors import AdapterError
from loratune.lora import attach
from loratune.lora.adapter_files import CONFIG_FILE, inspect

IDS = torch.tensor([[(7 * place) % 250 for place in range(30)]])


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits


def loss(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def fresh() -> nn.Module:
    """The base in another process, where random numbers are others."""
    base = tiny_llama()
    torch.manual_seed(7)
    return base


# Initializations

INITS = {
    **dict.fromkeys([True, False, "gaussian", "orthogonal", "eva", "mica"], "the base is as it was"),
    **dict.fromkeys(["pissa", "olora"], "PEFT subtracts the same again"),
    **dict.fromkeys(["pissa_niter_4", "corda", "lora_ga"], "PEFT subtracts another part, or none"),
}
REFUSED = Code.ADAPTER_NOT_REPRODUCIBLE


def initialized(init: bool | str) -> PeftModel:
    """A model of PEFT before its first step. Adapters of eva start as its configuration alone does."""
    base = tiny_llama()
    data = {"corda": {"corda_config": CordaConfig()}, "lora_ga": {"lora_ga_config": LoraGAConfig()}}
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=init,
        **data.get(str(init), {}),
    )  # fmt: skip
    if init == "corda":
        preprocess_corda(base, config, run_model=lambda: logits(base))
    elif init == "lora_ga":
        preprocess_loraga(base, config, lambda: loss(base).backward())
    model = get_peft_model(base, config)
    config.base_model_name_or_path = "base"  # PEFT has set it to the name of a base without a file
    return model


@pytest.mark.parametrize("init", INITS)
def test_what_peft_trained_is_what_is_loaded(init: bool | str, tmp_path: Path) -> None:
    """One step, saved as it is, and converted to plain LoRA where PEFT does that; PEFT itself is the judge of both."""
    before, model = logits(tiny_llama()), initialized(init)
    config = model.peft_config["default"]
    config.init_lora_weights = True
    model.save_pretrained(tmp_path / "start", save_embedding_layers=False)
    config.init_lora_weights = init
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    loss(model).backward()
    optimizer.step()
    trained = logits(model)
    assert (trained - before).abs().max() > 0.05
    model.save_pretrained(tmp_path / "raw", save_embedding_layers=False)
    if is_lost := INITS[init] == "PEFT subtracts another part, or none":
        with pytest.raises(AdapterError) as caught:
            inspect(tmp_path / "raw")
        assert meanings(caught.value) == [(REFUSED, str(tmp_path / "raw" / CONFIG_FILE), "init_lora_weights")]
    else:
        assert torch.equal(logits(attach.load(fresh(), inspect(tmp_path / "raw"))), trained)
    try:
        found = logits(PeftModel.from_pretrained(fresh(), tmp_path / "raw"))
    except ValueError as error:
        assert init == "corda" and "eigens" in str(error)
    else:
        assert torch.allclose(found, trained, rtol=0, atol=1e-3) != is_lost
    if INITS[init] != "the base is as it was":
        start = {"path_initial_model_for_weight_conversion": str(tmp_path / "start")}
        model.save_pretrained(tmp_path / "plain", save_embedding_layers=False, **start)
        found = logits(attach.load(fresh(), inspect(tmp_path / "plain")))
        assert torch.allclose(found, trained, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """An adapter of PEFT that says of itself that it was initialized by lora_ga."""
    path = tmp_path_factory.mktemp("raw")
    model = initialized(True)
    model.peft_config["default"].base_model_name_or_path = str(tiny_dir)
    model.save_pretrained(path / "other")
    model.peft_config["default"].init_lora_weights = "lora_ga"
    model.save_pretrained(path / "adapter")
    write_rows(path / "rows.jsonl", ROWS)
    return path


COMMANDS: dict[str, tuple[str, ...]] = {
    "generate": ("generate", "--adapter", "{raw}", "a"),
    "one of several": ("generate", "--adapter", "a={other}", "--adapter", "b={raw}", "--use", "a", "a"),
    "a mixture": ("generate", "--adapter", "a={other}", "--adapter", "b={raw}", "--mix", "a:1,b:0", "a"),
    "chat": ("chat", "--adapter", "{raw}"),
    "evaluate": ("evaluate", "--adapter", "{raw}", "--data", "{rows}"),
    "evaluate against": ("evaluate", "--adapter", "{other}", "--against", "{raw}", "--data", "{rows}"),
    "merge": ("merge", "--adapter", "{raw}", "--output", "{out}"),
    **{
        f"export to {to}": ("export", "--adapter", "{raw}", "--to", to, "--output", "{out}")
        for to in ("peft", "vllm", "gguf", "ollama")
    },
    "push": ("push", "--adapter", "{raw}", "me/it"),
    "report": ("report", "--adapter", "{raw}", "--output", "{out}.html"),
    "params": ("params", "--adapter", "{raw}"),
    "start from": ("train", "{config}"),
    "start from, a plan": ("train", "{config}", "--dry-run"),
    "start from, params": ("params", "{config}"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_uses_what_its_files_do_not_hold(
    command: str, raw: Path, tmp_path: Path, cli: Callable[..., Ran], run_config: Callable[..., Path]
) -> None:
    adapter = raw / "adapter"
    places = {
        "raw": adapter, "other": raw / "other", "rows": raw / "rows.jsonl", "out": tmp_path / "new",
        "config": run_config(lora={"r": 4, "target_modules": ["q", "up_proj"], "start_from": str(adapter)}),
    }  # fmt: skip
    ran = cli(*(word.format_map(places) for word in COMMANDS[command]))
    check_refused(ran, 5, (REFUSED, str(adapter / CONFIG_FILE), "init_lora_weights"))
    assert "with lora_ga, PEFT subtracts a part of the base that depends on gradients" in ran.err
    assert not [*tmp_path.glob("new*"), *tmp_path.glob("out*")]


@pytest.mark.parametrize("value", ["loftq", "PiSSA_niter_16", "of_tomorrow", {"a": 1}, 0.5])
def test_an_initialization_that_is_not_known_is_refused(value: Any, raw: Path, tmp_path: Path) -> None:
    for file in (raw / "other").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"init_lora_weights": value}))
    with pytest.raises(AdapterError) as caught:
        inspect(tmp_path)
    assert meanings(caught.value) == [(REFUSED, str(tmp_path / CONFIG_FILE), "init_lora_weights")]
