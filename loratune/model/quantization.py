"""Quantized bases: those that are quantized while they are loaded, and those that come so."""

from typing import Any

from transformers import (
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    GgufConfig,
    Mxfp4Config,
    PreTrainedModel,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from loratune.config import ModelSection
from loratune.errors import ModelError, Problem
from loratune.model import recorded_quantization
from loratune.model.device import compute_dtype
from loratune.system.launcher import sharding

# transformers computes with these, and has no backward for them on every machine. They are held unpacked.
_UNPACKED = {
    "compressed-tensors": CompressedTensorsConfig,
    "fp8": FineGrainedFP8Config,
    "mxfp4": Mxfp4Config,
    "mxfp8": FineGrainedFP8Config,
}


def settings(section: ModelSection, config: Any) -> Any:
    """The `quantization_config` for `from_pretrained`; None leaves it to the model's own configuration.

    Raises ModelError: transformers does not know how the base is quantized; the packages are missing that read it.
    """
    if section.gguf_file is not None:
        return GgufConfig(dequantize=True)
    if (found := recorded_quantization.found_in(config.to_dict())) is not None:
        method = recorded_quantization.method(found)
        if method != "bitsandbytes" and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # which would ignore it
            what = f"the base is quantized ({method}), in a way that transformers does not know"
            raise ModelError(Problem(what, section.name_or_path, fix="take one that is not quantized, or by GPTQ"))
        recorded_quantization.check_packages(found, section.name_or_path)
        return _UNPACKED[method](dequantize=True) if method in _UNPACKED else None
    if section.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if section.quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype(section),
            bnb_4bit_quant_storage=compute_dtype(section) if sharding() == "fsdp" else None,  # which spreads no bytes
        )  # fmt: skip
    return None


def check_trainable(model: PreTrainedModel, name: str) -> None:
    """Raises ModelError: transformers has no backward for the quantization in which this base is held."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        what = f"a base quantized with {quantizer.quantization_config.quant_method.value} cannot be trained"
        raise ModelError(Problem(what, name, fix="take one that is not quantized, or by bitsandbytes or GPTQ"))


def keep_backward(model: PreTrainedModel) -> None:
    """Stop 4-bit layers from repacking their weights for AVX512-BF16 at the first evaluation: no backward after it."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
