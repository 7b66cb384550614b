"""What loratune/model/upstream.py uses of other libraries still exists and behaves as expected."""

import jinja2
import pytest
import torch
import transformers
from bitsandbytes import cextension
from conftest import tiny_llama
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
)

from loratune.model import upstream


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedModel]:
    """A model in 4 bits and one in 8 bits."""
    path = tmp_path_factory.mktemp("packed")
    tiny_llama(hidden_size=64).save_pretrained(path)
    ways = {"4bit": BitsAndBytesConfig(load_in_4bit=True), "8bit": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        name: AutoModelForCausalLM.from_pretrained(path, quantization_config=way, device_map={"": "cpu"})
        for name, way in ways.items()
    }


def test_attention() -> None:
    assert upstream.attention(LlamaConfig(attn_implementation="who/kernel")) == "who/kernel"
    assert upstream.attention(LlamaConfig()) is None


def test_experts() -> None:
    assert upstream.experts(LlamaConfig(experts_implementation="sonicmoe")) == "sonicmoe"
    assert upstream.experts(LlamaConfig()) is None


def test_compile_chat_template() -> None:
    """It knows what chat templates use beyond plain Jinja, and computes no constants."""
    source = (
        "{% generation %}{{ strftime_now('')|tojson }}{% endgeneration %}{% for m in messages %}{% break %}{% endfor %}"
    )
    upstream.compile_chat_template(source + "{{ 'x' * 10 ** 99999999 }}{{ 'x'|center(10 ** 99999999) }}")
    for wrong in ("{{ 'x'|no_filter }}", "{% no_tag %}", "{{"):
        with pytest.raises(jinja2.TemplateSyntaxError):
            upstream.compile_chat_template(wrong)


def test_hooks() -> None:
    module = torch.nn.Linear(1, 1)
    assert upstream.hooks(module) == 0
    handles = [
        module.register_forward_hook(lambda *_: None),
        module.register_forward_pre_hook(lambda *_: None),
        module.register_full_backward_hook(lambda *_: None),
        module.register_full_backward_pre_hook(lambda *_: None),
    ]
    assert upstream.hooks(module) == 4
    for handle in handles:
        handle.remove()
    assert upstream.hooks(module) == 0


def test_is_trainable(packed: dict[str, PreTrainedModel]) -> None:
    for model in packed.values():
        assert upstream.is_trainable(model.config.quantization_config.to_dict())
    assert not upstream.is_trainable({"quant_method": "bitnet"})
    assert upstream.is_trainable({"quant_method": "quanto", "weights": "int8"})  # its package is missing


def test_is_quantization_known() -> None:
    known = ("gptq", "awq", "fp8", "compressed-tensors")
    assert all(map(upstream.is_quantization_known, known)) and not upstream.is_quantization_known("unheard-of")


def test_is_4bit_and_is_packed(packed: dict[str, PreTrainedModel]) -> None:
    weights = {name: model.model.layers[0].mlp.up_proj.weight for name, model in packed.items()}
    assert {name: upstream.is_4bit(weight) for name, weight in weights.items()} == {"4bit": True, "8bit": False}
    assert {name: upstream.is_packed(weight) for name, weight in weights.items()} == {"4bit": True, "8bit": True}
    assert not upstream.is_packed(packed["4bit"].model.norm.weight)


def test_is_quant_state(packed: dict[str, PreTrainedModel]) -> None:
    weight = packed["4bit"].model.layers[0].mlp.up_proj.weight
    assert upstream.is_quant_state(weight.quant_state)
    assert isinstance(weight.quant_state.absmax, torch.Tensor)
    assert not upstream.is_quant_state(weight)


def test_bitsandbytes_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert upstream.bitsandbytes_lacks() == ""
    monkeypatch.setattr(cextension, "lib", cextension.ErrorHandlerMockBNBNativeLibrary("no such library"))
    assert "native library" in upstream.bitsandbytes_lacks()


@pytest.mark.parametrize(("bars", "hub_bars"), [(True, True), (True, False), (False, False)])
def test_quiet_transformers(bars: bool, hub_bars: bool) -> None:
    """The settings are restored afterwards. The test resets the defaults at its end."""
    settings = transformers.logging
    try:
        settings.set_verbosity_info()
        (settings.enable_progress_bar if bars else settings.disable_progress_bar)()
        if not hub_bars:
            disable_progress_bars()
        with pytest.raises(ValueError, match="inside"), upstream.quiet_transformers():
            assert settings.get_verbosity() == settings.ERROR and not settings.is_progress_bar_enabled()
            assert are_progress_bars_disabled()
            raise ValueError("inside")
        assert settings.get_verbosity() == settings.INFO
        assert (settings.is_progress_bar_enabled(), not are_progress_bars_disabled()) == (bars, hub_bars)
    finally:
        settings.set_verbosity_warning()
        settings.enable_progress_bar()


def test_layout_of_a_checkpoint() -> None:
    """Expert tensors are stacked on loading, and split again on saving."""
    config = MixtralConfig(
        hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_local_experts=2, vocab_size=9,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    with torch.device("meta"):
        layout = upstream.CheckpointLayout(AutoModelForCausalLM.from_config(config))
    experts = "model.layers.0.block_sparse_moe.experts"
    stored = {f"{experts}.{number}.{part}.weight": torch.randn(6, 8) for number in (1, 0) for part in ("w3", "w1")}
    names = layout.in_order(stored)
    assert [name[len(experts) :] for name in names][::2] == [".0.w1.weight", ".1.w1.weight"]
    targets = {name: layout.target(name) for name in names}
    (first,) = {name for name, _ in targets.values()}
    made = layout.convert(first, {name: (str(targets[name][1]), stored[name]) for name in names})
    assert first == "model.layers.0.mlp.experts.gate_up_proj" and made[first].shape == (2, 12, 8)
    back = layout.revert(made)
    assert back.keys() == stored.keys() and all(torch.equal(back[name], stored[name]) for name in names)
    assert layout.target("lm_head.weight") == ("lm_head.weight", None)
