"""Which layers the kernels may replace, by class source, switches, and the masks of the model."""

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from check_layers import Findings
from families import FAMILIES, build, small
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import masking_utils
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaMLP, LlamaRMSNorm

from loratune import kernels
from loratune.kernels import masks, recognition, rowwise
from loratune.kernels.gpu import RowAttention
from loratune.kernels.recognition import LIST, Layer, form_of, source_digest
from loratune.kernels.replacements import FastAttention
from loratune.lora import attach


def config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=2, **changes)


# Classes


def test_llama_layers_are_recognized() -> None:
    assert form_of(LlamaAttention(config(), 0)) == "attention"
    assert form_of(LlamaMLP(config())) == "gated"
    assert form_of(LlamaRMSNorm(64)) == "norm"


# Releases of transformers

ADD = f"run `python scripts/check_layers.py --add` with transformers {transformers.__version__}"
NOT_BUILT = {"CpmAntLayerNorm", "xLSTMRMSNorm", "Zamba2Attention"}
"""Classes that no family has by default with the switches of the list."""
CHANGED: dict[str, str] = {"transformers.models.zamba2.modeling_zamba2.Zamba2Attention": "5.25.0"}
"""Name of a class of the list → the release that changed it so that no kernel computes the same, or that has it no
more."""


def listed() -> dict[str, Any]:
    return {
        name: entries
        for name, entries in json.loads(LIST.read_text(encoding="utf-8"))["layers"].items()
        if name not in CHANGED
    }


def digest_of(name: str) -> str:
    """The digest of a class in the installed release; empty if there is no such class."""
    place, _, kind = name.rpartition(".")
    try:
        return source_digest(getattr(importlib.import_module(place), kind))
    except (ImportError, AttributeError):
        return ""


def is_known(name: str, entries: dict[str, Any]) -> bool:
    """Whether a class and the classes of its children are in the installed release as they are in the list."""
    classes = [
        [child.split() for child in entry["switches"]["children"].values() if " " in child]
        for entry in entries.get(digest_of(name), [])
    ]
    return any(all(digest_of(child) == digest for child, digest in children) for children in classes)


def test_acceleration_covers_the_installed_transformers() -> None:
    """A class that a release changes keeps its own forward, until it was compared with the kernels again."""
    unknown = [f"{name} ({form_in(entries)})" for name, entries in listed().items() if not is_known(name, entries)]
    assert unknown == [], f"not accelerated any more; {ADD}"


def form_in(entries: dict[str, Any]) -> str:
    return str(next(iter(entries.values()))[0]["form"])


@pytest.mark.slow
def test_all_families_have_the_layers_that_are_accelerated() -> None:
    """A release may also change what a configuration sets, or move a family to other classes."""
    recognized = set()
    for model_type in FAMILIES:
        kinds = {type(module): module for module in build(model_type).modules() if form_of(module) is not None}
        recognized |= {f"{kind.__module__}.{kind.__qualname__}" for kind in kinds}
    lost = [name for name in listed() if name not in recognized and name.rpartition(".")[2] not in NOT_BUILT]
    assert lost == [], f"not accelerated any more; {ADD}"


def test_a_class_or_child_that_has_changed_is_detected() -> None:
    name, known = "transformers.models.llama.modeling_llama.LlamaMLP", listed()
    assert is_known(name, known[name]) and not is_known(name, {"0" * 16: known[name][digest_of(name)]})
    other = json.loads(json.dumps(known[name]).replace("SiLUActivation ", "SiLUActivation 0"))
    assert not is_known(name, other) and not is_known(f"{name}OfAnotherName", known[name])


def test_another_release_is_added_to_the_list() -> None:
    """What is known of other releases stays, but for a layer that was compared again with another result."""
    known = dict(recognition.checked())
    digests = {layer.name: {one.digest for one in known if one.name == layer.name} for layer in known}
    mlp, norm, attention = (
        next(layer for layer in known if layer.name.endswith(f".Llama{kind}"))
        for kind in ("MLP", "RMSNorm", "Attention")
    )
    changed, wrong = replace(mlp, digest="0" * 16), replace(norm, digest="0" * 16)
    verdicts = {changed: {"gated": True}, wrong: {"norm": False}, attention: {"attention": False}}
    findings = Findings(verdicts)
    added = findings.listed(known, ["5.100.0", "5.24.0"])
    assert added["checked_with"] == {"transformers": ["5.24.0", "5.100.0"]}
    assert {*added["layers"][mlp.name]} == {*digests[mlp.name], changed.digest}
    assert {*added["layers"][norm.name]} == digests[norm.name]
    assert {*added["layers"].get(attention.name, [])} == digests[attention.name] - {attention.digest}
    assert {one.name for one in known} - {*added["layers"]} <= {attention.name}
    assert findings.lost(known) == sorted([norm.name, attention.name])


class Patched(LlamaRMSNorm):
    """An unchanged subclass."""


class Doubled(LlamaAttention):
    """A subclass in another file with a changed forward."""

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        states, weights = super().forward(*inputs, **keywords)
        return 2 * states, weights


def own_forward(norm: nn.Module) -> None:
    norm.forward = lambda x: 2 * x


def hooked(norm: nn.Module) -> None:
    norm.register_forward_hook(lambda module, inputs, output: 2 * output)


def gated_before(norm: nn.Module) -> None:
    norm.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def with_a_buffer(norm: nn.Module) -> None:
    norm.register_buffer("scale", torch.ones(1))


def with_a_child(norm: nn.Module) -> None:
    norm.add_module("dropout", nn.Dropout(0.1))


def with_a_switch(norm: nn.Module) -> None:
    norm.clip = 3.0  # type: ignore[assignment]


@pytest.mark.parametrize("change", [own_forward, hooked, gated_before, with_a_buffer, with_a_child, with_a_switch])
def test_changed_norm_is_not_recognized(change: Callable[[nn.Module], None]) -> None:
    norm = LlamaRMSNorm(64)
    change(norm)
    assert form_of(norm) is None


def test_changed_class_is_not_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other libraries patch classes to use their own kernels."""
    assert form_of(Patched(64)) is None and form_of(Doubled(config(), 0)) is None
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: 2 * x)
    assert form_of(LlamaRMSNorm(64)) is None


@pytest.mark.parametrize("changes", [{"attention_dropout": 0.1}, {"is_causal": False}, {"clip": 3.0}], ids=str)
def test_changed_switch_is_not_recognized(changes: dict[str, Any]) -> None:
    layer = LlamaAttention(config(), 0)
    for name, value in changes.items():
        setattr(layer, name, value)
    assert form_of(layer) is None


def test_shapes_and_biases_do_not_affect_recognition() -> None:
    changes = {"num_key_value_heads": 2, "max_position_embeddings": 77, "rms_norm_eps": 0.1, "attention_bias": True}
    assert form_of(LlamaAttention(config(**changes), 1)) == "attention"


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_pytorch_tanh"])
def test_other_activations_are_not_recognized(activation: str) -> None:
    assert form_of(LlamaMLP(config(hidden_act=activation))) is None


def test_torch_norms_are_not_recognized() -> None:
    assert Layer.of(nn.LayerNorm(8)) is None and Layer.of(nn.RMSNorm(8)) is None


# Sources

SOURCE = '''
import torch
from torch import nn
LIMIT = 3.0
def helper(x):
    return x.clamp(max=2)
class Base(nn.Module):
    def shifted(self, x):
        return x + 1
class Layer(Base):
    """Text."""
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # a comment
        return self.shifted(helper(x)) * LIMIT
'''
SAME = {
    "a comment": ("# a comment", "# another"),
    "a docstring": ('"""Text."""', '"""Other text."""'),
    "annotations": ("x: torch.Tensor) -> torch.Tensor", "x)"),
    "layout": ("x.clamp(max=2)", "x.clamp(\n        max=2,\n    )"),
    "what it does not call": ("class Base", "def other():\n    return 1\nclass Base"),
}
OTHER = {
    "a method": ("helper(x)) * LIMIT", "helper(x)) / LIMIT"),
    "a base": ("x + 1", "x + 2"),
    "a helper": ("max=2", "max=4"),
    "a constant": ("LIMIT = 3.0", "LIMIT = 3.5"),
    "a decorator": ("    def forward", "    @torch.no_grad()\n    def forward"),
    "a default": ("self, x: torch.Tensor)", "self, x: torch.Tensor = None)"),
}


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], type]:
    monkeypatch.syspath_prepend(tmp_path)

    def loaded(text: str) -> type:
        name = f"{tmp_path.name}_{len(list(tmp_path.glob('*.py')))}"
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        module: ModuleType = importlib.import_module(name)
        kind: type = module.Layer
        return kind

    return loaded


@pytest.mark.parametrize("name", SAME)
def test_digest_ignores_changes_without_numerical_effect(name: str, load: Callable[[str], type]) -> None:
    assert source_digest(load(SOURCE.replace(*SAME[name]))) == source_digest(load(SOURCE))


@pytest.mark.parametrize("name", OTHER)
def test_digest_reflects_changes_with_numerical_effect(name: str, load: Callable[[str], type]) -> None:
    assert SOURCE.replace(*OTHER[name]) != SOURCE
    assert source_digest(load(SOURCE.replace(*OTHER[name]))) != source_digest(load(SOURCE))


def test_digest_includes_helper_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotations are functions outside the class, but part of the digest of Llama's attention."""
    tree = modeling_llama.__file__
    assert tree and "rotate_half" in Path(tree).read_text(encoding="utf-8")
    names = {node.name for node in recognition._trees(LlamaAttention) if hasattr(node, "name")}
    assert {"LlamaAttention", "apply_rotary_pos_emb", "rotate_half"} <= names


# Masks


@pytest.mark.parametrize(
    "function, window",
    [
        (masking_utils.causal_mask_function, None),
        (masking_utils.sliding_window_causal_mask_function(1), 1),
        (masking_utils.sliding_window_causal_mask_function(24), 24),
        (masking_utils.sliding_window_causal_mask_function(4096), 4096),
        (masking_utils.sliding_window_causal_mask_function(131072), 131072),
        (masking_utils.bidirectional_mask_function, 0),
        (masking_utils.sliding_window_bidirectional_mask_function(24), 0),
        (masking_utils.chunked_causal_mask_function(24, torch.zeros(1, dtype=torch.long)), 0),
        (masking_utils.chunked_causal_mask_function(8192, torch.zeros(1, dtype=torch.long)), 0),
        (lambda b, h, q, k: (k <= q) & (k != q - 5), 0),
        (lambda b, h, q, k: (k <= q) & ((k > q - 8) | (k == 0)), 0),
        (lambda b, h, q, k: k < q, 0),
    ],
)
def test_window_is_read_from_the_mask_function(function: Any, window: int | None) -> None:
    assert masks.window_of(function) == window


@pytest.mark.parametrize(
    "model_type, changes, windows",
    [
        ("llama", {}, {None}),
        ("mistral", {"sliding_window": 24}, {24}),
        ("minimax", {"sliding_window": 40}, {40}),  # which no layer type declares
        ("gemma3_text", {}, {24, None}),
        ("gemma2", {}, {24, None}),
        ("gpt_oss", {}, {24, None}),
        ("bloom", {}, set()),  # has biases
        ("llama4_text", {}, {None}),  # its other layers use chunked attention
    ],
)
def test_windows_of_layers_match_the_masks_of_the_model(
    model_type: str, changes: dict[str, Any], windows: set[int | None]
) -> None:
    model = small(model_type, **changes).requires_grad_(False)
    own = model.config._attn_implementation
    assert {spec.window for spec in masks.survey(model).specs.values()} == windows
    assert model.config._attn_implementation == own


# Arguments


CACHE = transformers.DynamicCache()


def replaced_layer(**arguments: Any) -> Any:
    base = small("llama").eval().requires_grad_(False)
    lora: Any = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    with kernels.accelerated(lora, attach.adapted_linear):
        assert isinstance(base.model.layers[0].self_attn, FastAttention)
        return lora(input_ids=torch.arange(8)[None], use_cache=False, **arguments).logits


def attend_by_rows(**arguments: Any) -> Any:
    positions = torch.arange(8)
    heads = torch.zeros(1, 2, 8, 4)
    return rowwise.attention(nn.Module(), heads, heads, heads, rowwise.RowMask(positions), **arguments)


def attend_on_a_gpu(**arguments: Any) -> Any:
    heads, positions = torch.zeros(1, 2, 8, 4), torch.arange(8)[None]
    return RowAttention()(nn.Module(), heads, heads, heads, None, position_ids=positions, **arguments)


@pytest.mark.parametrize("attend", [replaced_layer, attend_by_rows, attend_on_a_gpu])
@pytest.mark.parametrize(
    "arguments",
    [{"cache": CACHE}, {"is_causal": False}, {"position_bias": torch.ones(1)}, {"gate": 0}],
    ids=str,
)
def test_unknown_attention_arguments_are_refused(attend: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """They must not be ignored: with a cache, for example, keys would be missing."""
    with pytest.raises(TypeError, match=next(iter(arguments))):
        attend(**arguments)


@pytest.mark.parametrize("attend", [replaced_layer, attend_by_rows])
def test_inert_attention_arguments_are_accepted(attend: Callable[..., Any]) -> None:
    """Arguments that transformers 5.24 passes to attention layers but that have no effect."""
    inert = {"cache": None, "is_causal": True, "output_router_logits": True, "encoder_hidden_states": None}
    found, plain = (next(iter(attend(**given))) for given in (inert, {}))
    assert torch.equal(found, plain)
