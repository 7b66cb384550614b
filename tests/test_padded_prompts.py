"""Prompts of a batch are padded on the left only if the model then writes the same as for each prompt alone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import mainly
from families import small
from peft import LoraConfig, get_peft_model

from loratune import kernels
from loratune.adapter.generation import LoadedAdapter, SharedPrompts, reader
from loratune.adapter.padding import pad_left, writes_padded
from loratune.compare import behavior
from loratune.compare.engine import Engine
from loratune.config import DataSection
from loratune.lora import attach

LINEAR, FULL = "linear_attention", "full_attention"
WRITES_PADDED: dict[str, dict[str, Any]] = {"llama": {}, "gemma2": {}, "qwen3_next": {}, "mixtral": {}}
OTHERS: dict[str, dict[str, Any]] = {  # Padding has an embedding that is not zero, as in a trained model.
    "recurrent_gemma": {"pad_token_id": None},
    "rwkv": {"attention_hidden_size": 64},
    "minimax": {"layer_types": [LINEAR, FULL] * 2},  # It masks the wrong keys if its first layer has none.
    "bart": {"pad_token_id": None},
}
FAMILIES = WRITES_PADDED | OTHERS
NEW = 8


def adapted(family: str) -> Any:
    """A tiny model with an adapter, whose answers depend on the prompt."""
    base = small(family, **FAMILIES[family])
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
        elif weight.dim() > 1:
            weight.data.mul_(3)
    return model.eval()


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 250, (length,), generator=generator).tolist() for length in (24, 6, 13, 3)]


def by_hand(model: Any, rows: list[list[int]]) -> list[list[int]]:
    """The answers to rows in one batch, by transformers alone."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        found: list[list[int]] = model.generate(**pad_left(model, rows, 0), **settings)[:, -NEW:].tolist()
    return found


@pytest.mark.parametrize("family", mainly([*FAMILIES][:3], FAMILIES))
def test_answers_to_a_batch_equal_those_to_each_prompt(family: str) -> None:
    """Those of `generate`, and what `train` has the base write."""
    model, rows = adapted(family), prompts()
    alone = [by_hand(model, [row])[0] for row in rows]
    assert (by_hand(model, rows) == alone) == (family in WRITES_PADDED)
    layers, ends = kernels.InferenceLayers(model, reader("default")), SimpleNamespace(end_ids=())
    given: Any = (model, None, ends, None, False, None, "", "default", layers, False, True, SharedPrompts(model, 0))
    adapter = LoadedAdapter(*given)
    assert adapter.complete(rows, NEW) == alone
    engine = Engine(model, DataSection(train="none"), 0, kernels.accelerate(model, attach.adapted_linear))
    assert [*behavior.write(model, engine, rows, NEW, end_ids=())] == alone
    assert adapter.prompts.mixes_padding is not engine.writes_padded is (family in WRITES_PADDED)


@pytest.mark.parametrize("family", ["llama", "minimax"])
def test_the_check_leaves_the_model_unchanged(family: str) -> None:
    model = adapted(family).train()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    writes_padded(model, 0, kernels.sample_layers(model))
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)


def test_lack_of_memory_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other errors are."""
    model, raised = adapted("llama"), list[Exception]([torch.OutOfMemoryError("out of memory"), KeyError("cache")])

    def fail(*_: Any, **__: Any) -> None:
        raise raised[0]

    monkeypatch.setattr(model.base_model.model, "generate", fail)
    with pytest.raises(torch.OutOfMemoryError):
        writes_padded(model, 0)
    del raised[0]
    assert not writes_padded(model, 0)


def test_a_model_that_does_not_write_with_some_layers_alone_is_checked_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For example as its cache counts the layers."""
    model = adapted("llama")
    sample = kernels.sample_layers(model)
    whole, stack = [*sample.stack], sample.stack
    generate = model.base_model.model.generate

    def counting(*given: Any, **named: Any) -> Any:
        assert [*stack] == whole
        return generate(*given, **named)

    monkeypatch.setattr(model.base_model.model, "generate", counting)
    assert sample.left_out and writes_padded(model, 0, sample)
