"""Adapters made by stock PEFT: they load to what PEFT trained, or are refused with a reason."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, Ran, check_refused, meanings, tiny_llama, write_rows
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.errors import AdapterError
from loratune.lora import attach, tensors
from loratune.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, inspect

IDS = torch.tensor([[(7 * place) % 250 for place in range(30)]])


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits


def loss(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def fresh() -> nn.Module:
    """The base as loaded in another process, with another random state."""
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
    """A PEFT model before its first step. Adapters with eva start as their configuration alone makes them."""
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
    config.base_model_name_or_path = "base"  # PEFT has set it to the name of a base that has no file
    return model


@pytest.mark.parametrize("init", INITS)
def test_loaded_adapter_equals_what_peft_trained(init: bool | str, tmp_path: Path) -> None:
    """After one step, saved directly and, where PEFT supports it, converted to plain LoRA. PEFT is the reference for
    both."""
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
    """A PEFT adapter whose config says that it was initialized by lora_ga."""
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
    "export a mixture": (
        "export",
        "--adapter",
        "a={other}",
        "--adapter",
        "b={raw}",
        "--mix",
        "a:1,b:1",
        "--to",
        "peft",
        "--output",
        "{out}",
    ),
    "push": ("push", "--adapter", "{raw}", "me/it"),
    "report": ("report", "--adapter", "{raw}", "--output", "{out}.html"),
    "params": ("params", "--adapter", "{raw}"),
    "start from": ("train", "{config}"),
    "start from, a plan": ("train", "{config}", "--dry-run"),
    "start from, params": ("params", "{config}"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_lora_ga_adapters(
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
def test_unknown_initialization_is_refused(value: Any, raw: Path, tmp_path: Path) -> None:
    for file in (raw / "other").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"init_lora_weights": value}))
    with pytest.raises(AdapterError) as caught:
        inspect(tmp_path)
    assert meanings(caught.value) == [(REFUSED, str(tmp_path / CONFIG_FILE), "init_lora_weights")]


# Base tensors in the adapter's file


def saved(path: Path, base: Path, *targets: str, **save: Any) -> Path:
    """An adapter that looks trained, saved as PEFT does by default: with the base weights of adapted embeddings."""
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=[*targets])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(path, **save)
    return path


def edit(path: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """Change the tensors of an adapter's file that are not LoRA's."""
    tensors = load_file(path / WEIGHTS_FILE)
    save_file(
        {name: tensor if ".lora_" in name else change(name, tensor) for name, tensor in tensors.items()},
        path / WEIGHTS_FILE, {"format": "pt"},
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def tied_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    path = tmp_path_factory.mktemp("tied")
    tiny_llama(tie_word_embeddings=True).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
@pytest.mark.parametrize(
    ("targets", "save", "copies"),
    [
        (["embed_tokens"], {}, ["model.embed_tokens.base_layer.weight"]),
        (["q_proj", "lm_head"], {}, ["lm_head.base_layer.weight"]),
        (["embed_tokens", "lm_head"], {}, ["lm_head.base_layer.weight", "model.embed_tokens.base_layer.weight"]),
        (["q_proj"], {"save_embedding_layers": True}, ["lm_head.weight", "model.embed_tokens.weight"]),
    ],
    ids=["embedding", "output layer", "both", "neither"],
)
def test_base_tensors_in_the_adapter_do_not_change_the_result(
    targets: list[str],
    save: dict[str, Any],
    copies: list[str],
    tied: bool,
    tiny_dir: Path,
    tied_dir: Path,
    tmp_path: Path,
) -> None:
    base = tied_dir if tied else tiny_dir
    path = saved(tmp_path / "adapter", base, *targets, **save)
    files = inspect(path)
    assert [name for _, name in files.copies] == [f"base_model.model.{name}" for name in copies]
    found = AdapterDirectory.open(path)
    loaded = loading.load(replace(found, base=found.base.model_copy(update={"dtype": "float32"})))
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
    assert torch.equal(logits(loaded.model), logits(stock))


@pytest.mark.parametrize(
    ("held", "loaded", "change", "is_taken"),
    [
        (torch.float32, torch.float32, 0.0, True),
        (torch.float32, torch.float32, 1e-6, False),
        (torch.bfloat16, torch.float32, 0.0, True),
        (torch.float16, torch.float32, 0.1, False),
        (torch.float32, torch.bfloat16, 0.0, True),
        (torch.float32, torch.bfloat16, 0.1, False),
        (torch.int8, torch.float32, 0, False),
        (torch.bool, torch.float32, 0, False),
    ],
)
def test_base_tensors_are_compared_in_the_lower_precision(
    held: torch.dtype, loaded: torch.dtype, change: float, is_taken: bool, tiny_dir: Path, tmp_path: Path
) -> None:
    path = edit(saved(tmp_path, tiny_dir, "embed_tokens"), lambda _, tensor: (tensor * (1 + change)).to(held))
    with nullcontext() if is_taken else pytest.raises(AdapterError):
        tensors.check_copies(inspect(path), tiny_llama().to(loaded))


WITH_THE_BASE = (
    "generate", "one of several", "a mixture", "evaluate", "evaluate against", "merge", "export to peft",
    "export a mixture",    "start from", "start from, a plan",
)  # fmt: skip


@pytest.mark.parametrize("command", WITH_THE_BASE)
def test_base_tensors_with_different_values_are_refused(
    command: str, tiny_dir: Path, raw: Path, tmp_path: Path, cli: Callable[..., Ran], run_config: Callable[..., Path]
) -> None:
    adapter = edit(saved(tmp_path / "adapter", tiny_dir, "q_proj", "lm_head"), lambda _, tensor: tensor * 1.01)
    places = {
        "raw": adapter, "other": raw / "other", "rows": raw / "rows.jsonl", "out": tmp_path / "new",
        "config": run_config(lora={"r": 4, "target_modules": ["q", "lm_head"], "start_from": str(adapter)}),
    }  # fmt: skip
    ran = cli(*(word.format_map(places) for word in COMMANDS[command]))
    check_refused(ran, 5, (Code.ADAPTER_MISMATCH, str(adapter), ""))
    assert "lm_head.base_layer.weight" in ran.err
    assert not [*tmp_path.glob("new*"), *tmp_path.glob("out")]


@pytest.mark.parametrize("shape", ["another", "none"])
def test_base_tensor_that_does_not_fit_the_base_is_refused(shape: str, tiny_dir: Path, tmp_path: Path) -> None:
    """As after `resize_token_embeddings`, which changes the shape of the base."""
    path = saved(tmp_path, tiny_dir, "q_proj", save_embedding_layers=True)
    edit(
        path, lambda name, tensor: torch.cat([tensor, tensor[:1]]) if "embed" in name and shape == "another" else tensor
    )
    base = tiny_llama() if shape == "another" else tiny_llama().model
    with pytest.raises(AdapterError) as caught:
        tensors.check_copies(inspect(path), base)
    assert meanings(caught.value) == [(Code.ADAPTER_MISMATCH, str(path), "")]


def test_run_starts_from_an_adapter_with_base_tensors(
    tiny_dir: Path, tmp_path: Path, cli: Callable[..., Ran], run_config: Callable[..., Path]
) -> None:
    adapter = saved(tmp_path / "adapter", tiny_dir, "q_proj", "lm_head")
    config = run_config(lora={"r": 4, "target_modules": ["q", "lm_head"], "start_from": str(adapter)})
    ran = cli("train", config, "--dry-run")
    assert ran.code == 0, ran.err
