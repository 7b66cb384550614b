"""Targets: every role and name selects exactly the right modules of real transformers classes, or is refused."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import meanings, resolve
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations import replace_with_bnb_linear

from loratune.codes import Code
from loratune.errors import ConfigError, LoratuneError, ModelError
from loratune.lora.targets import ROLES, STOCK, Targets

# Two layers of the real class, small enough to build and adapt on the CPU.
LLAMA_LIKE: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
)
NEOX_LIKE: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
GPT2_LIKE: dict[str, Any] = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
FALCON: dict[str, Any] = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
OPT: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
)
PHI3: dict[str, Any] = {key: value for key, value in LLAMA_LIKE.items() if key != "head_dim"}
MOE: dict[str, Any] = LLAMA_LIKE | dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA_LIKE),
    "mistral": ("mistral", LLAMA_LIKE),
    "qwen2": ("qwen2", LLAMA_LIKE),
    "qwen3": ("qwen3", LLAMA_LIKE),
    "gemma": ("gemma", LLAMA_LIKE),
    "gemma2": ("gemma2", LLAMA_LIKE),
    "gemma3_text": ("gemma3_text", LLAMA_LIKE),
    "gptj": ("gptj", GPT2_LIKE | dict(rotary_dim=4)),
    "opt": ("opt", OPT),
    "phi": ("phi", NEOX_LIKE),
    "phi3": ("phi3", PHI3),
    "gpt2": ("gpt2", GPT2_LIKE),
    "gpt2 with cross-attention": ("gpt2", GPT2_LIKE | dict(add_cross_attention=True)),
    "gpt_neox": ("gpt_neox", NEOX_LIKE),
    "falcon": ("falcon", FALCON | dict(new_decoder_architecture=True, num_kv_heads=2)),
    "falcon, old, multi-query": ("falcon", FALCON | dict(new_decoder_architecture=False, multi_query=True)),
    "falcon, old, multi-head": ("falcon", FALCON | dict(new_decoder_architecture=False, multi_query=False)),
    "bloom": ("bloom", dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    "mpt": ("mpt", dict(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=32)),
}

SEPARATE = "q_proj k_proj v_proj o_proj"
FUSED = "query_key_value query_key_value query_key_value dense"

# Taken by hand from the modeling files of transformers 5.24: the path of attention, the modules of q, k, v, o, and the
# names that PEFT needs.
GOLDEN: dict[str, tuple[str, str, str]] = {
    "llama": ("model.layers.*.self_attn", SEPARATE, "k_proj o_proj q_proj v_proj"),
    "mistral": ("model.layers.*.self_attn", SEPARATE, "k_proj o_proj q_proj v_proj"),
    "qwen2": ("model.layers.*.self_attn", SEPARATE, "k_proj o_proj q_proj v_proj"),
    "qwen3": ("model.layers.*.self_attn", SEPARATE, "k_proj o_proj q_proj v_proj"),
    "gemma": ("model.layers.*.self_attn", SEPARATE, "k_proj o_proj q_proj v_proj"),
    "gemma2": ("model.layers.*.self_attn", SEPARATE, "k_proj o_proj q_proj v_proj"),
    "gemma3_text": ("model.layers.*.self_attn", SEPARATE, "k_proj o_proj q_proj v_proj"),
    "gptj": ("transformer.h.*.attn", "q_proj k_proj v_proj out_proj", "k_proj out_proj q_proj v_proj"),
    "opt": ("model.decoder.layers.*.self_attn", "q_proj k_proj v_proj out_proj", "k_proj out_proj q_proj v_proj"),
    "phi": ("model.layers.*.self_attn", "q_proj k_proj v_proj dense", "dense k_proj q_proj v_proj"),
    "phi3": ("model.layers.*.self_attn", "qkv_proj qkv_proj qkv_proj o_proj", "o_proj qkv_proj"),
    "gpt2": ("transformer.h.*.attn", "c_attn c_attn c_attn c_proj", "attn.c_proj c_attn"),
    "gpt2 with cross-attention": (
        "transformer.h.*.attn",
        "c_attn c_attn c_attn c_proj",
        "attn.c_attn attn.c_proj",
    ),
    "gpt_neox": ("gpt_neox.layers.*.attention", FUSED, "dense query_key_value"),
    "falcon": ("transformer.h.*.self_attention", FUSED, "dense query_key_value"),
    "falcon, old, multi-query": ("transformer.h.*.self_attention", FUSED, "dense query_key_value"),
    "falcon, old, multi-head": ("transformer.h.*.self_attention", FUSED, "dense query_key_value"),
    "bloom": ("transformer.h.*.self_attention", FUSED, "dense query_key_value"),
    "mpt": ("transformer.blocks.*.attn", "Wqkv Wqkv Wqkv out_proj", "Wqkv out_proj"),
}

# Other kinds of attention, from default configurations with four layers: roles → modules below the prefix.
FURTHER: dict[str, tuple[str, dict[str, str]]] = {
    "bert": (
        "bert.encoder.layer.*.attention",
        {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"},
    ),
    "bart": (
        "model.decoder.layers.*.self_attn",
        {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"},
    ),
    "xlm": ("transformer.attentions.*", {"q": "q_lin", "k": "k_lin", "v": "v_lin", "o": "out_lin"}),
    "moshi": (
        "model.layers.*.self_attn",
        {"q": "q_proj.linear", "k": "k_proj.linear", "v": "v_proj.linear", "o": "o_proj.linear"},
    ),
    "deepseek_v3": (
        "model.layers.*.self_attn",
        {
            "q": "q_a_proj q_b_proj",
            "k": "kv_a_proj_with_mqa kv_b_proj",
            "v": "kv_a_proj_with_mqa kv_b_proj",
            "o": "o_proj",
        },
    ),
    "longcat_flash": (
        "model.layers.*.self_attn.*",
        {
            "q": "q_a_proj q_b_proj",
            "k": "kv_a_proj_with_mqa kv_b_proj",
            "v": "kv_a_proj_with_mqa kv_b_proj",
            "o": "o_proj",
        },
    ),
    "qwen3_next": ("model.layers.*.self_attn", {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}),
    "nemotron_h": ("model.layers.*.mixer", {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}),
    "gemma3": (
        "model.language_model.layers.*.self_attn",
        {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
    ),
}


def build(model_type: str, device: str = "meta", **config: Any) -> PreTrainedModel:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**config))


def small(name: str, device: str = "meta") -> PreTrainedModel:
    model_type, config = SMALL[name]
    return build(model_type, device, **config)


def adapted(model: nn.Module) -> Iterator[str]:
    return (path for path, module in model.named_modules() if isinstance(module, LoraLayer))


def attach(model: PreTrainedModel, targets: Targets, r: int = 4, **config: Any) -> tuple[list[str], int]:
    """The modules that stock PEFT adapts, and the number of trainable parameters."""
    wrapped = get_peft_model(model, LoraConfig(r=r, target_modules=list(targets.names), **config))
    return list(adapted(wrapped.base_model.model)), wrapped.get_nb_trainable_parameters()[0]


def failure(kind: type[LoratuneError], model: PreTrainedModel, target_modules: list[str] | str, *codes: Code) -> str:
    """The message of an error whose problems have exactly these codes, in this order."""
    with pytest.raises(kind) as caught:
        resolve(model, target_modules)
    assert type(caught.value) is kind
    assert meanings(caught.value) == [(code, "", "lora.target_modules") for code in codes]
    assert all(problem.fix for problem in caught.value.problems)
    return str(caught.value)


# --- roles


@pytest.mark.parametrize("name", GOLDEN)
def test_roles_are_found_by_architecture(name: str) -> None:
    prefix, leaves, names = GOLDEN[name]
    targets = resolve(small(name), list(ROLES))
    expected = {role: [f"{prefix}.{leaf}"] for role, leaf in zip(ROLES, leaves.split(), strict=True)}
    assert targets.entry_patterns() == expected
    assert targets.names == tuple(names.split())
    assert {role: len(paths) for role, paths in targets.roles.items()} == dict.fromkeys(ROLES, 2)
    assert targets.roles["o"] == tuple(f"{prefix}.{leaves.split()[3]}".replace("*", str(layer)) for layer in (0, 1))


@pytest.mark.parametrize("name", GOLDEN)
def test_peft_adapts_exactly_these_modules(name: str) -> None:
    model = small(name, "cpu")
    targets = resolve(model, list(ROLES))
    # A Linear weight is (out, in), a Conv1D weight (in, out): r * (in + out) in both cases.
    formula = sum(4 * sum(model.get_submodule(path).weight.shape) for path in targets.modules)
    touched, trainable = attach(model, targets)
    assert touched == list(targets.modules)
    assert trainable == formula > 0


@pytest.mark.parametrize("name", FURTHER)
def test_roles_in_other_kinds_of_attention(name: str) -> None:
    prefix, leaves = FURTHER[name]
    model = build(name, **({} if name == "gemma3" else {"num_hidden_layers": 4}))
    targets = resolve(model, list(ROLES))
    # Compared as sets, as the layers of hybrid models may be in any order.
    expected = {role: {f"{prefix}.{leaf}" for leaf in names.split()} for role, names in leaves.items()}
    assert {role: set(patterns) for role, patterns in targets.entry_patterns().items()} == expected
    assert attach(model, targets)[0] == list(targets.modules)


@pytest.mark.parametrize("name", GOLDEN)
def test_stock_names_are_roles_if_the_model_lacks_the_names(name: str) -> None:
    model = small(name)
    by_role = resolve(model, list(ROLES))
    targets = resolve(model, list(STOCK))
    if name != "gpt2 with cross-attention":
        assert (targets.modules, targets.names) == (by_role.modules, by_role.names)
    present = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    assert set(targets.roles) == {stock if stock in present else role for stock, role in STOCK.items()}


@pytest.mark.parametrize(("name", "asked", "names"), [("falcon", "q_proj", "query_key_value"), ("gpt2", "v", "c_attn")])
def test_fused_projections_report_the_roles_they_include(name: str, asked: str, names: str) -> None:
    targets = resolve(small(name), [asked])
    assert targets.names == (names,)
    [(pattern, roles)] = targets.fused.items()
    assert pattern.endswith(names) and roles == ("q", "k", "v")


def test_projection_serving_two_roles_is_reported_as_fused() -> None:
    targets = resolve(build("deepseek_v3", num_hidden_layers=1), ["k"])
    assert targets.fused == {
        f"model.layers.*.self_attn.{name}": ("k", "v") for name in ("kv_a_proj_with_mqa", "kv_b_proj")
    }


def test_keys_that_also_serve_as_values_are_targeted_for_v() -> None:
    model = build("gemma4_text", num_hidden_layers=6, attention_k_eq_v=True)
    targets = resolve(model, ["v"])
    assert targets.entry_patterns() == {"v": ["model.layers.*.self_attn.v_proj", "model.layers.*.self_attn.k_proj"]}
    assert targets.names == ("5.self_attn.k_proj", "v_proj")  # the only layer with full attention
    assert targets.fused == {"model.layers.*.self_attn.k_proj": ("k", "v")}


def test_nothing_is_fused_if_each_role_has_its_own_module() -> None:
    assert resolve(small("llama"), list(ROLES)).fused == {}


def test_only_the_requested_roles_are_targeted() -> None:
    targets = resolve(small("llama"), ["v", "q"])
    assert targets.names == ("q_proj", "v_proj")
    assert list(targets.roles) == ["v", "q"]
    assert targets.modules == tuple(
        f"model.layers.{layer}.self_attn.{leaf}" for layer in (0, 1) for leaf in ("q_proj", "v_proj")
    )


def test_layers_that_reuse_keys_and_values_have_no_k_and_v_targets() -> None:
    config = dict(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["full_attention"] * 4, laurel_rank=4)
    tiny = LLAMA_LIKE | dict(
        intermediate_size=[48] * 4, activation_sparsity_pattern=[0.0] * 4, vocab_size_per_layer_input=64
    )
    targets = resolve(build("gemma3n_text", **(tiny | config)), list(ROLES))
    assert {role: len(paths) for role, paths in targets.roles.items()} == {"q": 4, "k": 2, "v": 2, "o": 4}


@pytest.mark.parametrize("bits", [dict(load_in_8bit=True), dict(load_in_4bit=True)])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_quantized_layers_are_found(name: str, bits: dict[str, bool]) -> None:
    plain = resolve(small(name), list(ROLES))
    with torch.device("meta"):
        model = replace_with_bnb_linear(
            small(name), modules_to_not_convert=["lm_head"], quantization_config=BitsAndBytesConfig(**bits)
        )
    assert type(model.get_submodule(plain.modules[0])) is not nn.Linear
    assert resolve(model, list(ROLES)) == plain


# --- names, regular expressions, all-linear


def test_names_and_path_endings_can_be_mixed_with_roles() -> None:
    targets = resolve(small("opt"), ["fc1", "self_attn.q_proj", "o"])
    assert targets.entry_patterns() == {
        "fc1": ["model.decoder.layers.*.fc1"],
        "self_attn.q_proj": ["model.decoder.layers.*.self_attn.q_proj"],
        "o": ["model.decoder.layers.*.self_attn.out_proj"],
    }
    assert targets.names == ("fc1", "out_proj", "q_proj")


def test_name_matches_every_module_that_ends_in_it() -> None:
    targets = resolve(small("gpt2"), ["c_proj"])
    assert targets.entry_patterns() == {"c_proj": ["transformer.h.*.attn.c_proj", "transformer.h.*.mlp.c_proj"]}
    assert targets.names == ("c_proj",)


def test_head_and_embedding_can_be_named() -> None:
    model = small("gpt_neox", "cpu")
    targets = resolve(model, ["lm_head", "embed_in"])
    assert targets.modules == ("gpt_neox.embed_in", "lm_head")
    assert attach(model, targets)[0] == list(targets.modules)


def test_regular_expression_matches_whole_paths() -> None:
    model = small("gpt2", "cpu")
    expression = r".*\.1\.(attn\.c_attn|mlp\.c_\w+)"
    targets = resolve(model, expression)
    assert targets.modules == tuple(f"transformer.h.1.{end}" for end in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj"))
    assert targets.roles == {expression: targets.modules}
    assert targets.names == ("1.attn.c_attn", "1.mlp.c_fc", "1.mlp.c_proj")
    assert targets.fused == {"transformer.h.*.attn.c_attn": ("q", "k", "v")}
    assert attach(model, targets)[0] == list(targets.modules)


@pytest.mark.parametrize(("text", "names"), [("q,k", "[q, k]"), ("q_proj | v_proj", "[q_proj, v_proj]"), ("q", "[q]")])
def test_error_for_names_without_brackets_suggests_a_list(text: str, names: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(small("llama"), text)
    assert meanings(caught.value) == [(Code.LORA_UNKNOWN_TARGET, "", "lora.target_modules")]
    assert f"write a list to name roles or modules, {names}; or match" in caught.value.problems[0].fix


def test_many_names_are_kept_although_peft_condenses_them() -> None:
    config = LLAMA_LIKE | dict(num_hidden_layers=24)
    targets = resolve(build("llama", **config), r".*\.\d*[02468]\.self_attn\.[qk]_proj")
    assert len(targets.names) == 24  # PEFT condenses lists of 20 or more names
    assert attach(build("llama", **config), targets)[0] == list(targets.modules)


def test_regular_expression_keeps_to_its_layer_in_moe_models() -> None:
    expression = r".*layers\.0\.self_attn\.q_proj"
    targets = resolve(build("qwen3_moe", **MOE), expression)
    assert attach(build("qwen3_moe", **MOE), targets)[0] == ["model.layers.0.self_attn.q_proj"]
    # The control, and the reason why `names` is never a string: PEFT reduces the expression to `q_proj`.
    stock = get_peft_model(build("qwen3_moe", **MOE), LoraConfig(target_modules=expression))
    assert len(list(adapted(stock.base_model.model))) == 2


def test_layers_to_transform_limits_names() -> None:
    targets = resolve(small("gpt2"), list(ROLES))
    touched, _ = attach(small("gpt2", "cpu"), targets, layers_to_transform=[1])
    assert touched == ["transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj"]


@pytest.mark.parametrize("name", [name for name in SMALL if "cross" not in name])
def test_all_linear_matches_peft(name: str) -> None:
    model = small(name)
    targets = resolve(model, "all-linear")
    assert targets.notes == ()
    config = _maybe_include_all_linear_layers(LoraConfig(target_modules="all-linear"), model)
    assert set(targets.modules) == set(config.target_modules)
    assert targets.roles == {"all-linear": targets.modules}
    assert model.get_output_embeddings() not in [model.get_submodule(path) for path in targets.modules]
    assert attach(small(name), targets)[0] == list(targets.modules)


def test_all_linear_ignores_case() -> None:
    assert resolve(small("llama"), "All-Linear") == resolve(small("llama"), "all-linear")


# --- errors


def test_recurrent_state_is_not_attention() -> None:
    model = build("rwkv", vocab_size=64, hidden_size=32, num_hidden_layers=2)
    message = failure(ModelError, model, list(ROLES), Code.LORA_UNKNOWN_TARGET)
    assert "rwkv has no attention" in message
    assert "attention.receptance ×2, attention.output ×2, feed_forward.key ×2" in message  # noqa: RUF001
    assert message.endswith("set lora.target_modules to names from this list, or to all-linear")


def test_missing_roles_are_reported_with_the_remaining_ones() -> None:
    model = build("jetmoe", vocab_size=64, hidden_size=32, num_hidden_layers=2)
    message = failure(ModelError, model, list(ROLES), Code.LORA_UNKNOWN_TARGET)
    assert "role `q`, `o`: nothing in the attention of jetmoe is known to serve it" in message
    assert "these weights of its attention are no linear layers: experts.input_linear, experts.output_linear" in message
    assert "ask for [k, v] alone" in message
    assert resolve(model, ["k", "v"]).names == ("kv_proj",)


def test_role_missing_in_some_layers_is_refused() -> None:
    model = small("llama")
    attention = model.get_submodule("model.layers.1.self_attn")
    attention.odd_proj = attention.o_proj
    del attention.o_proj
    message = failure(ModelError, model, list(ROLES), Code.LORA_UNKNOWN_TARGET)
    assert "role `o`: llama has it in 1 of 2 attention layers" in message
    assert "not in model.layers.1 (unknown there: self_attn.odd_proj)" in message
    assert len(message.splitlines()) == 1
    assert resolve(model, ["q", "k", "v"]).names == ("k_proj", "q_proj", "v_proj")


def test_unknown_attention_lists_the_linear_modules() -> None:
    model = small("gpt2")
    for block in model.transformer.h:
        block.attn.inward, block.attn.outward = block.attn.c_attn, block.attn.c_proj
        del block.attn.c_attn, block.attn.c_proj
    message = failure(ModelError, model, ["q_proj", "o_proj"], Code.LORA_UNKNOWN_TARGET)
    assert "role `q`, `o`: nothing in the attention of gpt2 is known" in message
    assert "its linear modules: attn.inward ×2, attn.outward ×2, mlp.c_fc ×2, mlp.c_proj ×2" in message  # noqa: RUF001
    assert resolve(model, ["inward", "attn.outward"]).names == ("inward", "outward")


def test_all_unknown_names_are_reported_with_the_nearest_matches() -> None:
    unknown = [Code.LORA_UNKNOWN_TARGET] * 3
    message = failure(ModelError, small("llama"), ["q_prj", "self_attn.o_prj", "v", "zzz"], *unknown)
    assert "`q_prj` matches no module of llama; nearest: q_proj" in message
    assert "`self_attn.o_prj` matches no module of llama; nearest: self_attn.o_proj" in message
    assert "`zzz` matches no module of llama; its linear modules: self_attn.q_proj ×2" in message  # noqa: RUF001
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize("entry", ["all-linear", "auto", r".*q_proj"])
def test_keyword_or_expression_inside_a_list_is_refused(entry: str) -> None:
    message = failure(ModelError, small("llama"), [entry], Code.LORA_UNKNOWN_TARGET)
    assert "auto, all-linear or a regular expression is written without brackets" in message


def test_name_of_a_non_linear_module_is_refused() -> None:
    message = failure(ModelError, small("llama"), ["self_attn"], Code.LORA_UNSUPPORTED)
    assert "`self_attn` matches model.layers.0.self_attn (LlamaAttention), model.layers.1.self_attn" in message
    message = failure(ModelError, small("qwen3"), r".*self_attn\..*", Code.LORA_UNSUPPORTED)
    assert "(Qwen3RMSNorm)" in message and "match linear layers only" in message


@pytest.mark.parametrize("text", ["q", "q_proj", "self_attn.q_proj"])
def test_name_as_a_string_is_not_treated_as_a_list(text: str) -> None:
    message = failure(ModelError, small("llama"), text, Code.LORA_UNKNOWN_TARGET)
    assert f"the regular expression `{text}` matches no module's whole path in llama" in message
    assert f"[{text}]; or match whole paths" in message
    assert "model.layers.0.self_attn.q_proj" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [("all_linear", "did you mean `all-linear`?"), ("All Linear", "did you mean `all-linear`?"),
     ("all", "did you mean `all-linear`?"), ("qkvo", "[q, k, v, o]")],
)  # fmt: skip
def test_what_is_nearly_a_keyword_or_a_list_is_suggested(text: str, said: str) -> None:
    assert said in failure(ModelError, small("llama"), text, Code.LORA_UNKNOWN_TARGET)


def test_unmatched_regular_expression_is_refused() -> None:
    message = failure(ModelError, small("llama"), r"layers\.\d+\.q_proj", Code.LORA_UNKNOWN_TARGET)
    assert message.endswith("match whole paths, such as model.layers.0.self_attn.q_proj")


def test_invalid_regular_expression_is_refused() -> None:
    message = failure(ConfigError, small("llama"), "*_proj", Code.LORA_UNSUPPORTED)
    assert "`*_proj` is not a regular expression: nothing to repeat at position 0" in message


@pytest.mark.parametrize("entries", [[""], ["q", ""]])
def test_empty_name_is_refused(entries: list[str]) -> None:
    failure(ModelError, small("llama"), entries, Code.LORA_UNKNOWN_TARGET)


def mamba() -> PreTrainedModel:
    return build("mamba", vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)


@pytest.mark.parametrize("entries", [list(ROLES), list(STOCK)])
def test_roles_are_refused_for_a_model_without_attention(entries: list[str]) -> None:
    message = failure(ModelError, mamba(), entries, Code.LORA_UNKNOWN_TARGET)
    assert "mamba has no attention" in message
    assert "its linear modules: mixer.in_proj ×2 " in message  # noqa: RUF001
    assert "set lora.target_modules to names from this list" in message
    assert len(message.splitlines()) == 1
    assert resolve(mamba(), ["in_proj"]).names == ("in_proj",)


def test_all_linear_is_suggested_without_attention_if_it_works() -> None:
    model = build("xlnet", vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48)
    assert failure(ModelError, model, list(ROLES), Code.LORA_UNKNOWN_TARGET).endswith("or to all-linear")
    assert len(resolve(model, "all-linear").modules) == 4


def test_mamba_weights_read_directly_by_kernels_are_refused() -> None:
    message = failure(ModelError, mamba(), ["in_proj", "dt_proj", "out_proj"], *[Code.LORA_UNSUPPORTED] * 2)
    assert "`mixer.dt_proj`: MambaMixer reads the weight directly, past an adapter" in message
    assert "`mixer.out_proj`" in message and "in_proj`" not in message
    with pytest.raises(ValueError, match="Mamba"):  # PEFT's own error
        get_peft_model(mamba(), LoraConfig(target_modules="all-linear"))
    targets = resolve(mamba(), "all-linear")
    assert targets.names == ("in_proj",)
    [note] = targets.notes
    assert note.startswith("all-linear leaves out mixer.x_proj, mixer.dt_proj, mixer.out_proj: MambaMixer reads")
    assert attach(mamba(), targets)[0] == list(targets.modules)


def test_names_that_peft_applies_to_stacked_experts_are_refused() -> None:
    model = build("qwen3_moe", **(MOE | dict(mlp_only_layers=[0])))
    message = failure(ModelError, model, ["q", "down_proj"], Code.LORA_UNSUPPORTED)
    assert "`mlp.down_proj`: PEFT takes a target of this name for the experts' stacked tensors" in message
    # The control: PEFT silently skips the dense layer, which has a down_proj module.
    stock = get_peft_model(model, LoraConfig(target_modules=["down_proj"]))
    assert "model.layers.0.mlp.down_proj" not in list(adapted(stock.base_model.model))


def test_all_linear_omits_names_that_peft_applies_to_experts() -> None:
    config = MOE | dict(mlp_only_layers=[0])
    targets = resolve(build("qwen3_moe", **config), "all-linear")
    assert targets.names == ("k_proj", "o_proj", "q_proj", "v_proj")
    assert targets.notes == (
        "all-linear leaves out mlp.gate_proj, mlp.up_proj, mlp.down_proj: "
        "PEFT takes a target of this name for the experts' stacked tensors",
        "all-linear leaves out experts.gate_up_proj, experts.down_proj: "
        "no linear layers, but experts in one tensor; lora.target_parameters: [experts] adapts them",
    )
    assert attach(build("qwen3_moe", **config), targets)[0] == list(targets.modules)


def test_all_linear_includes_dense_layers_next_to_experts_if_peft_can() -> None:
    config = MOE | dict(shared_expert_intermediate_size=16)
    targets = resolve(build("qwen2_moe", **config), "all-linear")
    assert "down_proj" in targets.names
    assert attach(build("qwen2_moe", **config), targets)[0] == list(targets.modules)


def test_all_linear_omits_modules_that_text_does_not_use() -> None:
    targets = resolve(small("gpt2 with cross-attention"), "all-linear")
    assert not [path for path in targets.modules if "cross" in path]
    assert targets.notes == ("all-linear leaves out transformer.h.*.crossattention: text does not pass there",)
    assert resolve(small("gpt2 with cross-attention"), ["crossattention.c_attn"]).modules  # requested by name


def test_other_linear_classes_are_refused() -> None:
    config = LLAMA_LIKE | dict(intermediate_size_mlp=48, num_local_experts=2, layer_types=["full_attention"] * 2)
    model = build("llama4_text", **config)
    assert "Llama4Router is not a plain linear layer" in failure(ModelError, model, ["router"], Code.LORA_UNSUPPORTED)
    assert "router" not in resolve(model, "all-linear").names


def test_indexers_are_refused_as_they_get_no_gradient() -> None:
    model = build("deepseek_v32", num_hidden_layers=1)
    assert "no gradient passes a choice" in failure(ModelError, model, ["wq_b"], Code.LORA_UNSUPPORTED)
    assert not [path for path in resolve(model, list(ROLES)).modules if "indexer" in path]


def test_module_whose_path_ends_another_path_is_refused() -> None:
    model = small("llama")
    model.model.lm_head = nn.Linear(32, 64, device="meta")
    message = failure(ModelError, model, "lm_head", Code.LORA_UNSUPPORTED)
    assert "PEFT cannot distinguish lm_head from" in message
    assert resolve(model, r"model\.lm_head").names == ("model.lm_head",)
