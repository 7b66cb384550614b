"""rank_pattern, alpha_pattern, modules_to_save and layers_to_transform: PEFT applies them as intended."""

from typing import Any

import pytest
import torch
from conftest import meanings, resolve
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from test_targets import GPT2_LIKE, LLAMA_LIKE, NEOX_LIKE, build
from torch import nn

from loratune.codes import Code
from loratune.errors import ConfigError, LoratuneError, ModelError
from loratune.lora.targets import ROLES, Targets

LLAMA = LLAMA_LIKE | {"num_hidden_layers": 3}
GPT2, NEOX = GPT2_LIKE, NEOX_LIKE


def attach(model: nn.Module, targets: Targets, **config: Any) -> PeftModel:
    return get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 8} | config), **targets.peft()))


def values(adapted: PeftModel) -> dict[str, tuple[int, float]]:
    """Path of each adapted module → its r and lora_alpha in the PEFT model."""
    layers = adapted.base_model.model.named_modules()
    found = {path: layer for path, layer in layers if isinstance(layer, LoraLayer)}
    return {path: (layer.r["default"], layer.lora_alpha["default"]) for path, layer in found.items()}


def saved(adapted: PeftModel) -> list[str]:
    modules = adapted.base_model.model.named_modules()
    return [path for path, module in modules if isinstance(module, ModulesToSaveWrapper)]


def failure(model: nn.Module, *problems: tuple[Code, str], kind: type[LoratuneError] = ModelError, **asked: Any) -> str:
    """The message of an error with exactly these codes and keys, in this order."""
    with pytest.raises(kind) as caught:
        resolve(model, **({"target_modules": list(ROLES)} | asked))
    assert type(caught.value) is kind
    assert meanings(caught.value) == [(code, "", f"lora.{key}") for code, key in problems]
    return str(caught.value)


# --- rank_pattern and alpha_pattern


def test_pattern_keys_may_be_roles_names_and_expressions() -> None:
    targets = resolve(
        build("llama", **LLAMA),
        ["q", "v", "o", "down_proj"],
        rank_pattern={"q": 16, r"layers\.1\..*\.v_proj": 2, "mlp.down_proj": 6},
        alpha_pattern={"o_proj": 5, r".*\.[02]\.self_attn\.q_proj": 7},
    )
    assert targets.rank_pattern == {"q_proj": 16, r"1\.self_attn\.v_proj": 2, "down_proj": 6}
    assert targets.alpha_pattern == {"o_proj": 5, r"0\.self_attn\.q_proj": 7, r"2\.self_attn\.q_proj": 7}
    expected = {}
    for layer in range(3):
        at = f"model.layers.{layer}"
        expected |= {
            f"{at}.self_attn.q_proj": (16, 8 if layer == 1 else 7),
            f"{at}.self_attn.v_proj": (2 if layer == 1 else 4, 8),
            f"{at}.self_attn.o_proj": (4, 5),
            f"{at}.mlp.down_proj": (6, 8),
        }
    assert values(attach(build("llama", **LLAMA), targets)) == expected


@pytest.mark.parametrize("entry", ["q", "q_proj"])
def test_pattern_role_or_stock_name_on_another_architecture(entry: str) -> None:
    model = build("gpt_neox", **NEOX)
    targets = resolve(model, list(ROLES), rank_pattern={entry: 16})
    assert targets.rank_pattern == {"query_key_value": 16}
    assert targets.notes == (
        "rank_pattern: 16 for q applies to k, v too, which attention.query_key_value serves as well",
    )
    assert {path.rpartition(".")[2]: value for path, value in values(attach(model, targets)).items()} == {
        "query_key_value": (16, 8),
        "dense": (4, 8),
    }


def test_pattern_name_applies_to_targets_only() -> None:
    model = build("gpt2", **GPT2)
    targets = resolve(model, ["o"], rank_pattern={"c_proj": 16})
    assert targets.rank_pattern == {"c_proj": 16}
    assert set(values(attach(model, targets))) == {f"transformer.h.{layer}.attn.c_proj" for layer in (0, 1)}


def test_pattern_names_with_the_same_ending_are_distinguished() -> None:
    # PEFT would give r=16 to both for the name `c_proj`, and also for an unescaped `attn.c_proj`.
    model = build("gpt2", **GPT2)
    targets = resolve(model, ["c_proj"], rank_pattern={"attn.c_proj": 16, "mlp.c_proj": 2})
    assert targets.rank_pattern == {r"attn\.c_proj": 16, r"mlp\.c_proj": 2}
    assert sorted(value for value, _ in values(attach(model, targets)).values()) == [2, 2, 16, 16]


def test_pattern_path_that_ends_another_path_is_distinguished() -> None:
    model = build("llama", **LLAMA)
    model.model.lm_head = nn.Linear(32, 64, device="meta")
    targets = resolve(model, ["lm_head"], rank_pattern={r"(?<!\.)lm_head": 2, "model.lm_head": 16})
    assert values(attach(model, targets)) == {"model.lm_head": (16, 8), "lm_head": (2, 8)}


def test_equal_pattern_values_for_one_module_are_accepted() -> None:
    assert resolve(build("gpt2", **GPT2), list(ROLES), rank_pattern={"q": 16, "k": 16}).rank_pattern == {"c_attn": 16}


def test_different_pattern_values_for_one_module_are_refused() -> None:
    code = Code.LORA_UNSUPPORTED
    both = (code, "rank_pattern"), (code, "alpha_pattern")
    message = failure(build("gpt2", **GPT2), *both, rank_pattern={"q": 16, "k": 8}, alpha_pattern={"v": 1, "c_attn": 2})
    ranks, alphas = message.splitlines()
    assert "attn.c_attn, one module for q, k, v, is given 16 by `q`, 8 by `k`" in ranks
    assert "attn.c_attn, one module for q, k, v, is given 1 by `v`, 2 by `c_attn`" in alphas
    message = failure(build("llama", **LLAMA), both[0], rank_pattern={"q": 16, r".*\.0\..*": 8})
    assert "self_attn.q_proj is given 16 by `q`, 8 by `.*\\.0\\..*`" in message


@pytest.mark.parametrize("entry", ["k", "k_proj", "zzz", r"layers\.7\..*"])
def test_pattern_key_that_matches_no_target_is_refused(entry: str) -> None:
    unused = (Code.LORA_UNKNOWN_TARGET, "rank_pattern")
    message = failure(build("llama", **LLAMA), unused, target_modules=["q", "v"], rank_pattern={entry: 16})
    targets = "the targets are self_attn.q_proj ×3, self_attn.v_proj ×3"  # noqa: RUF001
    assert message.startswith(f"lora.rank_pattern: `{entry}` matches none of the targets; {targets} ")
    assert message.endswith("add it to lora.target_modules")


def test_invalid_pattern_expression_is_refused() -> None:
    invalid = (Code.LORA_UNSUPPORTED, "alpha_pattern")
    message = failure(build("llama", **LLAMA), invalid, kind=ConfigError, alpha_pattern={"*_proj": 16})
    assert "`*_proj` is not a regular expression" in message


# --- layers_to_transform


def test_layers_combined_with_names_and_patterns_are_exact() -> None:
    config = LLAMA | {"num_hidden_layers": 24}
    layers = [0, 5, 22]
    targets = resolve(build("llama", **config), list(ROLES), layers, rank_pattern={"q": 16, r".*\.5\..*v_proj": 2})
    assert targets.names == ("k_proj", "o_proj", "q_proj", "v_proj")
    assert targets.rank_pattern == {"q_proj": 16, r"5\.self_attn\.v_proj": 2}
    found = values(attach(build("llama", **config), targets, layers_to_transform=layers))
    assert list(found) == list(targets.modules) and len(found) == 12
    assert [value for path, (value, _) in found.items() if "v_proj" in path] == [4, 2, 4]


def test_layers_apply_even_if_a_name_is_a_whole_path() -> None:
    model = build("llama", **LLAMA)
    model.q_proj = nn.Linear(32, 64, device="meta")  # PEFT accepts a whole path regardless of its layer
    targets = resolve(model, ["self_attn.q_proj"], [1])
    assert targets.names == ("self_attn.q_proj",)
    assert list(values(attach(model, targets, layers_to_transform=[1]))) == ["model.layers.1.self_attn.q_proj"]


def test_layer_without_targets_is_reported_with_other_problems() -> None:
    problems = (Code.LORA_UNKNOWN_TARGET, "layers_to_transform"), (Code.LORA_UNKNOWN_TARGET, "rank_pattern")
    message = failure(build("llama", **LLAMA), *problems, layers=[1, 9], rank_pattern={"zzz": 1})
    assert "layer 9 " in message and "the layers with targets are 0-2" in message
    assert "lora.rank_pattern: `zzz`" in message


# --- modules_to_save


@pytest.mark.parametrize(
    ("asked", "names", "paths"),
    [
        (["lm_head"], ["lm_head"], ["lm_head"]),
        (["norm"], ["model.norm"], ["model.norm"]),  # the name `norm` alone would also match every input_layernorm
        (["embed_tokens", "model.norm"], ["embed_tokens", "model.norm"], ["model.embed_tokens", "model.norm"]),
        (["o"], ["o_proj"], [f"model.layers.{layer}.self_attn.o_proj" for layer in range(3)]),
        (["layers.1.mlp"], ["1.mlp"], ["model.layers.1.mlp"]),
        (["mlp", "down_proj"], ["mlp"], [f"model.layers.{layer}.mlp" for layer in range(3)]),
    ],
)
def test_modules_to_save_are_exactly_the_requested_ones(asked: list[str], names: list[str], paths: list[str]) -> None:
    targets = resolve(build("llama", **LLAMA), ["q", "v"], modules_to_save=asked)
    assert targets.peft()["modules_to_save"] == names
    adapted = attach(build("llama", **LLAMA), targets)
    assert saved(adapted) == paths
    assert list(values(adapted)) == list(targets.modules)


def test_peft_matches_modules_to_save_by_string_ending() -> None:
    """The control, and the reason why names are extended."""
    stock = get_peft_model(build("llama", **LLAMA), LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    assert len(saved(stock)) == 7
    model = build("llama", **LLAMA)
    model.overlm_head = nn.Linear(32, 64, device="meta")
    message = failure(model, (Code.LORA_UNSUPPORTED, "modules_to_save"), modules_to_save=["lm_head"])
    assert "PEFT cannot distinguish lm_head from overlm_head" in message


def test_modules_to_save_is_none_by_default() -> None:
    assert resolve(build("llama", **LLAMA), ["q"]).peft() == {
        "target_modules": ["q_proj"],
        "target_parameters": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }


@pytest.mark.parametrize(
    ("asked", "code", "what"),
    [
        ("self_attn", Code.LORA_UNSUPPORTED,
         "`self_attn` is or holds targets (self_attn.q_proj ×3, self_attn.v_proj ×3)"),  # noqa: RUF001
        ("q", Code.LORA_UNSUPPORTED, "`q` is or holds targets (self_attn.q_proj ×3)"),  # noqa: RUF001
        ("layers", Code.LORA_UNSUPPORTED, "`layers` is or holds targets"),
        ("head", Code.LORA_UNKNOWN_TARGET, "`head` is not a module of llama; it has lm_head ×1 "),  # noqa: RUF001
        ("zzz", Code.LORA_UNKNOWN_TARGET, "`zzz` is not a module of llama; its linear modules: self_attn.q_proj ×3"),  # noqa: RUF001
        ("act_fn", Code.LORA_UNSUPPORTED, "`act_fn` (SiLUActivation) has no parameters that can be trained"),
    ],
)  # fmt: skip
def test_invalid_modules_to_save_are_refused(asked: str, code: Code, what: str) -> None:
    problem = (code, "modules_to_save")
    message = failure(build("llama", **LLAMA), problem, target_modules=["q", "v"], modules_to_save=[asked])
    assert message.startswith(f"lora.modules_to_save: {what}")


def test_module_list_is_refused_as_a_module_to_save() -> None:
    model = build("opt", vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
    problem = (Code.LORA_UNSUPPORTED, "modules_to_save")
    assert "`layers`" in failure(model, problem, target_modules=["embed_tokens"], modules_to_save=["layers"])


def test_quantized_module_to_save_is_refused() -> None:
    model = build("llama", **LLAMA)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight = nn.Parameter(layer.mlp.down_proj.weight.to(torch.int8), requires_grad=False)
    problem = (Code.LORA_UNSUPPORTED, "modules_to_save")
    assert "`down_proj`" in failure(model, problem, target_modules=["q", "v"], modules_to_save=["down_proj"])
    assert resolve(model, ["q", "v"], modules_to_save=["up_proj"]).modules_to_save == ("up_proj",)


def test_untied_weights_are_reported() -> None:
    model = build("gpt2", "cpu", **GPT2)
    head, embedding = "lm_head", "transformer.wte"
    share = f"{head} and {embedding} share one weight in the base"
    targets = resolve(model, ["q"], modules_to_save=[head])
    assert targets.notes == (f"modules_to_save: {share}; {embedding} keeps the one of the base",)
    both = resolve(model, ["q"], modules_to_save=[head, embedding])
    assert both.notes == (f"modules_to_save: {share}; they are trained separately",)
    assert resolve(build("gpt2", **GPT2, tie_word_embeddings=False), ["q"], modules_to_save=[head]).notes == ()

    adapted = attach(model, targets)
    trained = adapted.base_model.model.lm_head.modules_to_save["default"].weight
    before = adapted.base_model.model.transformer.wte.weight.detach().clone()
    with torch.no_grad():
        trained += 1
    assert torch.equal(adapted.base_model.model.transformer.wte.weight, before)


def test_target_with_a_tied_weight_is_noted() -> None:
    [note] = resolve(build("gpt2", **GPT2), ["q", "lm_head"]).notes
    assert note.startswith("lm_head: the weight is shared with other modules; each module has its own adapter")
    assert resolve(build("gpt2", **GPT2, tie_word_embeddings=False), ["q", "lm_head"]).notes == ()


# --- notes of roles


HYBRID: dict[str, Any] = dict(vocab_size=64, num_hidden_layers=8)


def test_note_for_hybrid_models_says_which_layers_have_attention() -> None:
    model = build("qwen3_next", **HYBRID)
    targets = resolve(model, list(ROLES))
    assert targets.notes == (
        "attention is in 2 of 8 layers; the linear_attn modules are not adapted: "
        "name them (linear_attn.in_proj_qkvz, linear_attn.in_proj_ba, linear_attn.out_proj) to adapt them",
    )
    named = resolve(model, ["o", "linear_attn.in_proj_qkvz", "in_proj_ba", "linear_attn.out_proj"])
    assert named.notes == () and len(named.modules) == 2 + 3 * 6
    assert resolve(model, ["o_proj"]).notes == ()  # a name, which is unambiguous


def test_mixers_named_like_attention_are_identified_by_class() -> None:
    [note] = resolve(build("kimi_linear", num_hidden_layers=5), list(ROLES)).notes
    assert note.startswith("attention is in 1 of 5 layers; the KimiLinearDeltaAttention modules are not adapted")
