"""What loratune/lora/upstream.py uses of other libraries still exists and behaves as expected."""

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from loratune.lora import upstream


def test_linear4bit_and_dequantize_module_weight(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("base")
    plain = tiny_llama(hidden_size=64)
    plain.save_pretrained(path)
    config = BitsAndBytesConfig(load_in_4bit=True)
    base = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, device_map={"": "cpu"})
    layer = get_peft_model(base, LoraConfig(target_modules=["up_proj"])).base_model.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, upstream.Linear4bit)
    original = plain.model.layers[0].mlp.up_proj.weight
    weight = upstream.dequantize_module_weight(layer.get_base_layer())
    assert weight.shape == original.shape
    assert 0 < (weight.float() - original).norm() < 0.2 * original.norm()


def test_conversion_of() -> None:
    assert upstream.conversion_of("qwen3_moe") == "qwen2_moe"
    assert upstream.conversion_of("llama") is None


def test_is_target() -> None:
    config = LoraConfig(target_modules=["q_proj"], exclude_modules=["layers.1.self_attn.q_proj"])
    assert upstream.is_target(config, "model.layers.0.self_attn.q_proj")
    assert not upstream.is_target(config, "model.layers.1.self_attn.q_proj")
    assert not upstream.is_target(config, "model.layers.0.self_attn.k_proj")


def test_is_partitioned() -> None:
    """DeepSpeed marks partitioned parameters. test_distributed.py tests this if DeepSpeed is installed."""
    weight = torch.nn.Parameter(torch.ones(2))
    assert not upstream.is_partitioned(weight)
    weight.ds_id = 3  # type: ignore[attr-defined]
    assert upstream.is_partitioned(weight)
