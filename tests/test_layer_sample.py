"""A model is checked with the layers that stand for all: the first and the last of each kind."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, mainly, tiny_llama
from torch import nn

from loratune import kernels
from loratune.config import LoraSection, ModelSection
from loratune.data.batch_check import packing_refusal, padding_refusal
from loratune.kernels import acceleration, masks, parity_check
from loratune.kernels.layer_sample import stack_of
from loratune.lora import attach, creation, targets
from loratune.model.load import load_base
from loratune.system import cache, machine_results

sys.path.append(str(ROOT / "scripts"))
import families

SLIDING, FULL = "sliding_attention", "full_attention"
EXPERTS = {"num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "layers that are alike": ("llama", {"num_hidden_layers": 6}, ["a"] * 6),
    "alternating windows": (
        "gemma2", {"num_hidden_layers": 6, "layer_types": [SLIDING, FULL] * 3}, ["a", "b"] * 3,
    ),
    "a window in one layer of three": (
        "olmo3", {"num_hidden_layers": 6, "layer_types": [SLIDING, SLIDING, FULL] * 2}, ["a", "a", "b"] * 2,
    ),
    "layers without positions": (
        "smollm3", {"num_hidden_layers": 6, "no_rope_layers": [1, 1, 0] * 2, "layer_types": [FULL] * 6},
        ["a", "a", "b"] * 2,
    ),
    "dense layers, then experts": (
        "deepseek_v3", {"num_hidden_layers": 5, "first_k_dense_replace": 2}, [*"aabbb"],
    ),
    "dense layers among experts": (
        "qwen3_moe", {"num_hidden_layers": 6, "mlp_only_layers": [2, 3, 4]}, [*"aabbba"],
    ),
    "a hybrid": (
        "granitemoehybrid", {"num_hidden_layers": 6, "layer_types": ["linear_attention", "linear_attention", FULL] * 2},
        ["a", "a", "b"] * 2,
    ),
}  # fmt: skip


def built(name: str) -> Any:
    """A model with LoRA, which has moved, on all of its linear layers."""
    kind, changes, _ = MODELS[name]
    changes = {key: value for key, value in changes.items()}
    config = families.small_config(kind)
    text = config.get_text_config()
    for key, value in changes.items():
        setattr(text, key, value)
    torch.manual_seed(0)
    base = families.AutoModelForCausalLM.from_config(config)
    section = LoraSection(r=2, lora_alpha=4, target_modules="all-linear")
    model = creation.attach(base, section, targets.find(base, section).peft(), seed=0)
    for weight_name, weight in model.named_parameters():
        if "lora_B" in weight_name:
            nn.init.normal_(weight, std=0.1)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_first_and_the_last_layer_of_each_kind_are_kept(name: str) -> None:
    model, kinds = built(name), MODELS[name][2]
    sample = masks.survey(model.get_base_model()).sample
    ends = {number for kind in {*kinds} for number in (kinds.index(kind), len(kinds) - 1 - kinds[::-1].index(kind))}
    assert {*range(len(kinds))} - sample.left_out.keys() == ends
    stack = stack_of(model.get_base_model())
    before = [*stack]
    with sample.alone():
        calls = [layer for layer in stack if layer in before]
        assert len(calls) == len(ends)
        output = model(input_ids=torch.arange(9, 20)[None], use_cache=False).logits
    assert [*stack] == before and not torch.equal(
        output, model(input_ids=torch.arange(9, 20)[None], use_cache=False).logits
    )


def broken(monkeypatch: pytest.MonkeyPatch, model: Any, kind_of_layers: str, numbers: set[int]) -> None:
    """Replacements of one kind compute something else in layers with these numbers."""
    original = acceleration._factory
    within = {module for number in numbers for module in stack_of(model.get_base_model())[number].modules()}

    def factory(module: nn.Module, *others: Any) -> Any:
        name, make = original(module, *others)

        def make_wrong() -> Any:
            made = make()
            if made is not None and name == kind_of_layers and module in within:
                right = made.forward
                made.forward = lambda *given, **named: wrong(right(*given, **named))
            return made

        return name, make_wrong

    monkeypatch.setattr(acceleration, "_factory", factory)


def wrong(result: Any) -> Any:
    return (result[0] * 1.1, *result[1:]) if isinstance(result, tuple) else result * 1.1


def replaced(found: kernels.Acceleration) -> dict[str, list[str]]:
    """The kinds of layers that are replaced, and the paths of these layers."""
    kinds = [getattr(step, "__self__", None) for step in found.steps]
    return {kind.name: [path for path, _, _ in kind.layers] for kind in kinds if isinstance(kind, acceleration._Kind)}


@pytest.mark.parametrize("name", mainly([*MODELS][:2], MODELS))
def test_a_kernel_that_is_wrong_in_one_kind_of_layers_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, letters = built(name), MODELS[name][2]
    right, tried = kernels.accelerate(model, attach.adapted_linear), set[str]()
    assert right.sample.left_out
    for letter in sorted({*letters}):
        numbers = {number for number, one in enumerate(letters) if one == letter}
        for kind, paths in replaced(right).items():
            if kind != acceleration.LORA and any(f".{number}." in path for number in numbers for path in paths):
                with monkeypatch.context() as patch:
                    broken(patch, model, kind, numbers)
                    found = kernels.accelerate(model, attach.adapted_linear)
                assert replaced(found).keys() == replaced(right).keys() - {kind}, letter
                tried.add(letter)
    assert tried == {*letters}


def test_a_model_that_does_not_run_with_some_layers_alone_is_checked_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = built("layers that are alike")
    rest = stack_of(model.get_base_model())[2]
    ran: list[int] = []

    def compute(self: Any, *given: Any, **named: Any) -> Any:
        if not isinstance(stack_of(model.get_base_model())[2], type(rest)):
            raise ValueError("the third layer is needed")
        ran.append(1)
        return original(self, *given, **named)

    kind = type(model.get_base_model().get_decoder())
    original = kind.forward
    monkeypatch.setattr(kind, "forward", compute)
    acceleration_ = kernels.accelerate(model, attach.adapted_linear)
    assert acceleration_.fallbacks == {} and acceleration_.sample.left_out and ran
    broken(monkeypatch, model, "norms", {2})  # which only the whole model shows
    assert [*kernels.accelerate(model, attach.adapted_linear).fallbacks] == ["norms"]


def test_a_layer_that_something_was_done_to_is_a_kind_of_its_own() -> None:
    model = built("layers that are alike")
    base: Any = model.get_base_model()
    changes: list[Callable[[Any], Any]] = [
        lambda layer: layer.mlp.register_forward_hook(lambda *of: of[-1] * 2),
        lambda layer: setattr(layer.self_attn, "scaling", 1.0),
        lambda layer: setattr(layer.mlp, "act_fn", nn.GELU()),
        lambda layer: layer.self_attn.q_proj.scaling.update(default=9.0),
        lambda layer: setattr(layer.input_layernorm, "weight", nn.Parameter(torch.ones(64, dtype=torch.float64))),
        lambda layer: vars(layer).update(forward=layer.forward),
    ]
    for change in changes:
        model = built("layers that are alike")
        base = model.get_base_model()
        change(stack_of(base)[3])
        sample = masks.survey(base).sample
        assert 3 not in sample.left_out, change


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantized_layers_are_of_one_kind(quantization: Any, tmp_path: Path) -> None:
    """Whatever a layer keeps of the activations of a pass, which in 8 bit is which of them are outliers."""
    base = tiny_llama(num_hidden_layers=5, hidden_size=64, intermediate_size=128)
    for number, layer in enumerate(base.model.layers):
        layer.input_layernorm.weight.data[: number + 1] = 100.0
    base.save_pretrained(tmp_path)
    loaded = load_base(ModelSection(name_or_path=str(tmp_path), quantization=quantization, dtype="float32"))
    section = LoraSection(r=2, lora_alpha=4, target_modules=["q", "v"])
    model = creation.attach(loaded, section, targets.find(loaded, section).peft(), seed=0)
    assert [*masks.survey(model.get_base_model()).sample.left_out] == [1, 2, 3]


class Mixing(nn.Module):
    """Adds the mean over all tokens, of whatever row."""

    def forward(self, states: torch.Tensor, **_: Any) -> torch.Tensor:
        return states + states.mean(1, keepdim=True)


def test_rows_that_one_kind_of_layers_mixes_are_found() -> None:
    model = built("a window in one layer of three")
    for number in (2, 5):
        layer: Any = stack_of(model.get_base_model())[number]
        layer.mlp = nn.Sequential(layer.mlp, Mixing())
    sample = masks.survey(model.get_base_model()).sample
    assert sample.left_out
    assert "mixes rows" in str(packing_refusal(model, 40, sample=sample))
    assert "padded" in str(padding_refusal(model, 0, sample))


# Results that are kept


def checked(model: Any, monkeypatch: pytest.MonkeyPatch, fingerprint: str = "2:a") -> tuple[Any, int]:
    """The acceleration of a model, and how often it was compared."""
    calls = list[int]()
    with monkeypatch.context() as patch:

        class Counted(parity_check.ParityCheck):
            def __init__(self, *given: Any):
                calls.append(1)
                super().__init__(*given)

        patch.setattr(acceleration, "ParityCheck", Counted)
        found = kernels.accelerate(model, attach.adapted_linear, fingerprint=fingerprint)
        with found.applied(model):
            assert found.tree_refusal(model) is None
    return found, len(calls)


def adapted(**changes: Any) -> Any:
    base = tiny_llama(num_hidden_layers=4)
    section = LoraSection(**({"r": 2, "lora_alpha": 4, "target_modules": ["q", "v"]} | changes))
    return creation.attach(base, section, targets.find(base, section).peft(), seed=0)


def without_metadata() -> str:
    raise PackageNotFoundError("peft")


def test_a_check_is_not_repeated_while_nothing_has_changed(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, count = checked(adapted(), monkeypatch)
    again, none = checked(adapted(), monkeypatch)
    assert count == 1 and none == 0
    assert again.fallbacks == first.fallbacks and len(again.steps) == len(first.steps)
    others: dict[str, tuple[Any, str]] = {
        "another base": (adapted(), "2:b"),
        "another rank": (adapted(r=3), "2:a"),
        "another scale": (adapted(lora_alpha=8), "2:a"),
        "other targets": (adapted(target_modules=["q"]), "2:a"),
        "not known": (adapted(), ""),
    }
    for name, (model, fingerprint) in others.items():
        assert checked(model, monkeypatch, fingerprint)[1] == 1, name
    hooked = adapted()
    hooked.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: None)
    assert checked(hooked, monkeypatch)[1] == 1
    with monkeypatch.context() as patch:
        patch.setattr(parity_check, "source_digest", lambda: "other sources")
        assert checked(adapted(), monkeypatch)[1] == 1
    with monkeypatch.context() as patch:
        patch.setattr(machine_results, "_machine", lambda: "another machine")
        assert checked(adapted(), monkeypatch)[1] == 1
        patch.setattr(machine_results, "_machine", without_metadata)
        assert [checked(adapted(), monkeypatch)[1] for _ in range(2)] == [1, 1]


def test_the_order_of_a_set_of_targets_makes_no_other_check(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It differs from process to process, as hashes of strings do."""

    class Backwards(set[str]):
        def __repr__(self) -> str:
            return f"{{{', '.join(sorted(map(repr, self), reverse=True))}}}"

    model, names = built("layers that are alike"), []
    for kind in (set, Backwards):
        model.peft_config["default"].target_modules = kind(["q_proj", "v_proj"])
        names.append(parity_check.kept_checks(model, "base").key)
    assert names[0] == names[1] != ""


def test_what_a_check_found_is_kept_as_well(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    with monkeypatch.context() as patch:
        broken(patch, model, "norms", {0, 1, 2, 3})
        assert [*checked(model, monkeypatch)[0].fallbacks] == ["norms"]
    assert [*checked(adapted(), monkeypatch)[0].fallbacks] == ["norms"]  # until a source changes


@pytest.mark.parametrize("content", ["", "[]", "nonsense", '"text"', "\x00"])
def test_results_that_are_damaged_are_none(content: str, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked(adapted(), monkeypatch)
    (path,) = kept.iterdir()
    path.write_text(content)
    assert checked(adapted(), monkeypatch)[1] == 1
    assert checked(adapted(), monkeypatch)[1] == 0


def test_results_that_others_can_write_are_none(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked(adapted(), monkeypatch)
    (path,) = kept.iterdir()
    path.chmod(0o666)
    assert checked(adapted(), monkeypatch)[1] == 1
    path.unlink(missing_ok=True)
    kept.chmod(0o777)
    assert checked(adapted(), monkeypatch)[1] == 1 and [*kept.iterdir()] == []


def test_without_a_cache_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cache, "RESULTS", replace(cache.RESULTS, place=lambda: tmp_path / "file" / "kept"))
    assert [checked(adapted(), monkeypatch)[1] for _ in range(2)] == [1, 1]


def test_results_that_are_not_used_are_removed(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.KeptResults("old").store({"a": 1})
    (path,) = kept.iterdir()
    os.utime(path, (0, 0))
    cache.KeptResults("new").store({"a": 1})
    assert not path.exists() and cache.KeptResults("new").load() == {"a": 1}
