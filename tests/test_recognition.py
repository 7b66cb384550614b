"""Which layers the kernels may replace: those that compute the same, by comparison and by their code."""

import importlib.util
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Ran, tiny_llama
from families import FAMILIES, build, small
from peft import LoraConfig, get_peft_model
from running import Cli, MakeConfig
from torch import nn
from transformers import masking_utils
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaMLP, LlamaRMSNorm

from loratune import kernels
from loratune.kernels import acceleration, layer_source, masks, recognition, rowwise
from loratune.kernels.gpu import RowAttention
from loratune.kernels.layer_source import NotReadableError
from loratune.kernels.recognition import Recognized
from loratune.kernels.replacements import FastAttention
from loratune.lora import attach


def config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=2, **changes)


def recognized(base: Any) -> dict[str, Recognized]:
    """Path of each layer with the structure of a replacement → what is known of it."""
    base.requires_grad_(False)
    found = recognition.recognize(base, attach.adapted_linear, masks.survey(base))
    return {name: found[module] for name, module in base.named_modules() if module in found}


def of_llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config(**changes))


# Layers as they are

NORMS = ["model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"]


def test_layers_of_llama_are_recognized() -> None:
    base = of_llama()
    own = base.config._attn_implementation
    found = {name: one.form for name, one in recognized(base).items()}
    assert found["model.layers.1.self_attn"] == "attention" and found["model.layers.1.mlp"] == "gated"
    assert found["model.norm"] == "norm" and len(found) == 2 * 4 + 1
    assert base.config._attn_implementation == own


ACCELERATED = {
    "qwen3": {"attention", "gated", "norm"},
    "gemma3_text": {"attention whose norms add 1", "gated by GELU", "norm that adds 1"},
    "smollm3": {"attention", "attention without positions", "gated", "norm"},
    "qwen3_moe": {"attention", "experts", "norm"},
    "phi3": {"attention", "gated", "norm"},  # with joined projections
    "cohere2": {"attention without positions", "gated"},
}


@pytest.mark.parametrize("model_type", ACCELERATED)
def test_forms_of_families(model_type: str) -> None:
    found = recognized(small(model_type)).values()
    assert {one.form for one in found if one.form} == ACCELERATED[model_type]


@pytest.mark.slow
def test_most_families_have_accelerated_layers() -> None:
    """Counted with transformers 5.25; a release that loses many has changed something that all of them share."""
    forms = {"norm": 0, "gated": 0, "attention": 0, "experts": 0}
    for model_type in FAMILIES:
        found = {one.form.partition(" ")[0] for one in recognized(build(model_type)).values() if one.form}
        for form in found:
            forms[form] += 1
    least = {"norm": 100, "gated": 80, "attention": 50, "experts": 40}
    assert all(forms[form] >= count for form, count in least.items()), forms


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "gelu"}, {"hidden_act": "relu"}, {"hidden_act": "gelu_pytorch_tanh"}], ids=str
)
def test_activations(changes: dict[str, Any]) -> None:
    expected = "gated by GELU" if changes["hidden_act"] == "gelu_pytorch_tanh" else ""
    assert recognized(of_llama(**changes))["model.layers.0.mlp"].form == expected


def test_settings_that_shapes_and_biases_have_no_part_in() -> None:
    changes = {"num_key_value_heads": 2, "max_position_embeddings": 77, "rms_norm_eps": 0.1, "attention_bias": True}
    assert recognized(of_llama(**changes))["model.layers.1.self_attn"].form == "attention"


def test_dropout_of_a_layer_is_found() -> None:
    assert recognized(of_llama(attention_dropout=0.1)).get("model.layers.0.self_attn", Recognized()).form == ""


@pytest.mark.parametrize(
    ("norm", "form"), [(nn.RMSNorm(64, eps=1e-6), "norm"), (nn.LayerNorm(64), "")], ids=["rms", "layer"]
)
def test_norms_of_torch(norm: nn.Module, form: str) -> None:
    base = of_llama()
    base.model.norm = norm
    assert recognized(base).get("model.norm", Recognized()).form == form


def test_tensors_without_data_are_enough() -> None:
    """As for an estimate of memory: the compared layers have random weights of the same shapes."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415

    with FakeTensorMode(allow_non_fake_inputs=True):
        base = of_llama()
    assert {name: one.form for name, one in recognized(base).items()} == {
        name: one.form for name, one in recognized(of_llama()).items()
    }


# Layers that something was done to


def own_forward(norm: nn.Module) -> None:
    norm.forward = lambda x: 2 * x


def hooked(norm: nn.Module) -> None:
    norm.register_forward_hook(lambda module, inputs, output: 2 * output)


def gated_before(norm: nn.Module) -> None:
    norm.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def with_a_buffer(norm: nn.Module) -> None:
    norm.register_buffer("scale", torch.ones(1))


def with_a_child(norm: nn.Module) -> None:
    norm.add_module("dropout", nn.Linear(1, 1))


def of_a_subclass(norm: nn.Module) -> None:
    norm.__class__ = Doubled


class Doubled(LlamaRMSNorm):
    """A class in another file."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden_states)


@pytest.mark.parametrize("change", [own_forward, hooked, gated_before, with_a_buffer, with_a_child, of_a_subclass])
def test_changed_norm_is_not_recognized(change: Callable[[nn.Module], None]) -> None:
    base = of_llama()
    change(base.model.layers[0].input_layernorm)
    found = recognized(base)
    assert found.get(NORMS[0], Recognized()).form == "" and found[NORMS[1]].form == "norm"


def test_changed_class_is_not_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other libraries patch classes to use their own kernels."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, hidden_states: 2 * hidden_states)
    assert recognized(of_llama())[NORMS[0]] == Recognized(reason="was changed by another library")


# Releases of transformers


def edited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *changes: tuple[str, str]) -> types.ModuleType:
    """Llama of another release, whose file has these changes; transformers loads models of it from now on."""
    source, name = Path(str(modeling_llama.__file__)).read_text(encoding="utf-8"), modeling_llama.__name__
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    path = tmp_path / "modeling_llama.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    for package in (transformers, transformers.models.llama):  # These take it from the module when it is first used.
        monkeypatch.setattr(package, "LlamaForCausalLM", modeling_llama.LlamaForCausalLM)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    for package in (transformers, transformers.models.llama):
        monkeypatch.setattr(package, "LlamaForCausalLM", module.LlamaForCausalLM)
    return module


GATE = "down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
RETURN = "return self.weight * hidden_states.to(input_dtype)"
UPCAST = "hidden_states = hidden_states.to(torch.float32)"
OUT = "attn_output = self.o_proj(attn_output)"
SCORES = "attn_weights = torch.matmul(query, key_states.transpose(2, 3)) * scaling"
MLP, ATTENTION, NORM = "feed-forward layers", "attention", "norms"
REFUSED: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "a clamp": (MLP, [(GATE, GATE + ".clamp(-40, 40)")]),
    "a clamp of values": (ATTENTION, [(OUT, "attn_output = attn_output.clip(-40.0, 40.0)\n        " + OUT)]),
    "a clamp by a helper": (
        MLP, [("class LlamaMLP", "def limited(x):\n    return torch.clamp(x, max=1e4)\n\n\nclass LlamaMLP"),
              (GATE, GATE + "\n        down_proj = limited(down_proj)")],
    ),
    "a scale": (MLP, [(GATE, GATE + " * 1.02")]),
    "a scale of a norm": (NORM, [(RETURN, RETURN + " * 1.02")]),
    "dropout in training": (MLP, [(GATE, GATE.replace("self.down_proj(", "nn.functional.dropout(", 1)[:-1]
                                   + ", 0.1, self.training)\n        down_proj = self.down_proj(down_proj)")]),
    "a soft cap": (ATTENTION, [(SCORES, SCORES + "\n    attn_weights = 50 * torch.tanh(attn_weights / 50)")]),
    "a soft cap of an output": (MLP, [(GATE, GATE + "\n        down_proj = 30 * torch.tanh(down_proj / 30)")]),
    "another epsilon": (NORM, [("variance + self.variance_epsilon", "variance + 1e-3")]),
    "a branch on the length": (
        MLP, [(GATE, GATE + "\n        if x.shape[1] > 4096:\n            down_proj = 2 * down_proj")],
    ),
    "a branch on a length with a name": (
        ATTENTION,
        [(OUT, OUT + "\n        length = input_shape[-1]\n        attn_output = attn_output * (1 + (length == 9))")],
    ),
    "a branch on the number of the layer": (
        ATTENTION, [(OUT, OUT + "\n        if self.layer_idx == 1:\n            attn_output = 2 * attn_output")],
    ),
    "float32 left out in a norm": (NORM, [(UPCAST, "pass")]),
    "an extra term that is zero at first": (
        MLP,
        [("self.act_fn = ACT2FN", "self.extra = nn.Linear(config.hidden_size, 1)\n        self.act_fn = ACT2FN"),
         (GATE, GATE + " + torch.tanh(self.extra(x)) * 0.0 * self.extra.weight.abs().sum()")],
    ),
    "a weight that is zero at first": (
        NORM, [("self.variance_epsilon = eps", "self.variance_epsilon = eps\n"
                "        self.shift = nn.Parameter(torch.zeros(hidden_size))"),
               (RETURN, RETURN + " + self.shift")],
    ),
    "distant positions": (
        ATTENTION,
        [(OUT, OUT + "\n        attn_output = attn_output * (1 + (kwargs['position_ids'].float().max() // 5000))")],
    ),
    "a part of long rows": (MLP, [(GATE, GATE + "\n        down_proj = down_proj[:, :4096]")]),
    "a state": (MLP, [(GATE, GATE + "\n        self.calls = getattr(self, 'calls', 0) + 1")]),
    "chance": (MLP, [(GATE, GATE + " * (1 + 1e-3 * torch.rand(1).item())")]),
    "the clock": (MLP, [("import torch\n", "import time\n\nimport torch\n"), (GATE, GATE + " * (time.time() > 0)")]),
    "a wrapper": (
        NORM,
        [("import torch\n", "from functools import wraps\n\nimport torch\n\n\n"
          "def limited(forward):\n    @wraps(forward)\n"
          "    def wrapper(self, x):\n        return forward(self, x) * (1 + (x.shape[1] > 5000))\n\n"
          "    return wrapper\n\n\n"),
         ("    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:\n        input_dtype",
          "    @limited\n    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:\n        input_dtype")],
    ),
    "a limit in a constant": (
        MLP, [("class LlamaMLP", "LIMIT = 5000.0\n\n\nclass LlamaMLP"),
              (GATE, GATE + "\n        down_proj = down_proj * torch.sigmoid(LIMIT - x.sum(-1, keepdim=True))")],
    ),
}  # fmt: skip
"""Kind of layers → changes of the file of Llama after which they compute something else."""


def tried(
    cli: Cli, run_config: MakeConfig, base: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> tuple[Ran, set[str]]:
    """A run that ends before its first step, and the kinds of layers that it would accelerate in all of its layers."""
    found = list[kernels.Acceleration]()
    accelerate = kernels.accelerate

    def watched(*given: Any, **named: Any) -> kernels.Acceleration:
        found.append(accelerate(*given, **named))
        return found[-1]

    monkeypatch.setattr(kernels, "accelerate", watched)
    path = run_config(model={"name_or_path": str(base), "dtype": dtype}, data={"max_length": 64})
    ran = cli("train", path, "--dry-run")
    assert ran.code == 0, ran.err
    steps = (getattr(step, "__self__", None) for step in found[0].steps)
    return ran, {step.name for step in steps if isinstance(step, acceleration._Kind) and step.layers}


def saved(module: types.ModuleType, tokenizer: Any, path: Path) -> Path:
    """A base of this release of Llama."""
    base = module.LlamaForCausalLM(tiny_llama().config)
    base.load_state_dict(tiny_llama().state_dict(), strict=False)
    base.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_computes_something_else_is_computed_by_transformers(
    name: str, cli: Cli, run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Any,
    untraced: None,
) -> None:  # fmt: skip
    kind, changes = REFUSED[name]
    base = saved(edited(monkeypatch, tmp_path, *changes), tokenizer, tmp_path / "base")
    ran, replaced = tried(cli, run_config, base, monkeypatch, "bfloat16" if "float32" in name else "float32")
    assert kind not in replaced
    if kind != ATTENTION:  # whose layers call the attention function of the kernels all the same, row by row
        assert re.search(rf"not accelerated, but computed by PyTorch: .*{kind}.*: Llama", ran.out + ran.err)


SAME: dict[str, list[tuple[str, str]]] = {
    "as it is": [],
    "a comment and other names": [
        (GATE, "# as before\n        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)\n"
         "        down_proj = self.down_proj(inner)"),
    ],
    "a helper that moved": [
        ("class LlamaMLP", "def scores_of(query, key):\n    return torch.matmul(query, key.transpose(2, 3))\n\n\n"
         "class LlamaMLP"),
        (SCORES, "attn_weights = scores_of(query, key_states) * scaling"),
    ],
    "an argument with a default": [
        ("def forward(self, x):", "def forward(self, x, chunk_size=None):"),
        (GATE, GATE + "\n        if chunk_size is not None:\n            down_proj = down_proj[:chunk_size]"),
    ],
    "another decorator": [
        ("import torch\n", "from functools import wraps\n\nimport torch\n\n\n"
         "def renamed(forward):\n    @wraps(forward)\n"
         "    def wrapper(self, *args, **kwargs):\n        return forward(self, *args, **kwargs)\n\n"
         "    return wrapper\n\n\n"),
        ("    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:\n        input_dtype",
         "    @renamed\n    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:\n        input_dtype"),
    ],
    "an option that is off": [
        ("self.act_fn = ACT2FN", "self.limit = getattr(config, 'limit', None)\n        self.act_fn = ACT2FN"),
        (GATE, GATE + "\n        if self.limit is not None:\n            down_proj = down_proj.clamp(max=self.limit)"),
    ],
}  # fmt: skip
"""Changes of the file of Llama after which it computes the same."""


@pytest.mark.parametrize("name", SAME)
def test_a_layer_that_computes_the_same_is_accelerated(
    name: str, cli: Cli, run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Any,
    untraced: None,
) -> None:  # fmt: skip
    base = saved(edited(monkeypatch, tmp_path, *SAME[name]), tokenizer, tmp_path / "base")
    ran, replaced = tried(cli, run_config, base, monkeypatch, "float32")
    assert {MLP, ATTENTION, NORM} <= replaced, ran
    assert "not accelerated" not in ran.out + ran.err


# Code


def test_the_code_of_helpers_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotations are functions outside the class."""
    texts = list[str]()
    dumped = layer_source._bare
    monkeypatch.setattr(layer_source, "_bare", lambda node: texts.append(node.name) or dumped(node))
    layer_source.read(LlamaAttention(config(), 0))
    assert {"forward", "apply_rotary_pos_emb", "rotate_half", "repeat_kv", "eager_attention_forward"} <= {*texts}


def test_a_result_is_kept_for_the_code_and_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = list[str]()
    compare = recognition._compare

    def counted(subject: Any, reader: Any) -> Any:
        compared.append(type(subject.module).__name__)
        return compare(subject, reader)

    monkeypatch.setattr(recognition, "_compare", counted)
    kinds = recognition.cache.LAYERS
    monkeypatch.setattr("loratune.system.cache.LAYERS", recognition.replace(kinds, place=lambda: tmp_path / "layers"))
    recognized(of_llama())
    assert sorted(compared) == ["LlamaAttention", "LlamaMLP", "LlamaRMSNorm"]
    recognized(of_llama())
    assert len(compared) == 3
    recognized(of_llama(mlp_bias=True))
    assert len(compared) == 6  # The settings of a model are part of what is known.
    edited(monkeypatch, tmp_path, (GATE, GATE + " * 1.02"))
    base = sys.modules[modeling_llama.__name__].LlamaForCausalLM(config())
    assert recognized(base)["model.layers.0.mlp"].reason == "computes something else than its kernel"


def test_code_without_a_source_is_refused() -> None:
    space: dict[str, Any] = {"LlamaMLP": LlamaMLP}
    exec("class Made(LlamaMLP):\n    def forward(self, x):\n        return x", space)
    kind = space["Made"]
    kind.__module__ = LlamaMLP.__module__
    with pytest.raises(NotReadableError, match="changed by another library"):
        layer_source.read(kind(config()))


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
