"""Quantized bases: what their config.json records, and how transformers loads them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import transformers

from loratune.codes import Code
from loratune.config import ModelSection
from loratune.errors import ConfigError, ModelError, Problem
from loratune.model import upstream
from loratune.model.source import QUANTIZATION_KEY
from loratune.system.launcher import sharding

if TYPE_CHECKING:
    import torch

_DEQUANTIZED = {
    "compressed-tensors": "CompressedTensorsConfig",
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "mxfp8": "FineGrainedFP8Config",
}
"""`quant_method` → transformers' class of its settings, for bases that are dequantized as they are loaded: transformers
computes with them, but does not have a backward for them on every machine."""


def record_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a model's configuration records of its quantization; None for a plain model. Multimodal ones may nest it."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            for key in ("quantization_config", "compression_config"):
                if isinstance(part.get(key), Mapping) and part[key]:
                    return dict(part[key])
    return None


def method(record: Mapping[str, Any]) -> str:
    """The name of a recorded quantization."""
    if record.get("load_in_4bit") or record.get("load_in_8bit"):
        return "bitsandbytes"
    return str(record.get("quant_method") or "unknown")


def check_bitsandbytes(quantization: str, reason: str | None = None) -> None:
    """Check that bitsandbytes works, which is imported only if it is needed.

    Args:
        quantization: The setting.
        reason: Why it does not work; empty if it does, None to find out.

    Raises:
        ConfigError: 8bit or 4bit is set, and bitsandbytes does not work here.
    """
    if quantization != "none" and (reason := upstream.bitsandbytes_lacks() if reason is None else reason):
        what, fix = f"{quantization} does not work here: {reason}", "repair bitsandbytes, or set it to none"
        raise ConfigError(Problem(Code.MODEL_UNSUPPORTED, what, key=QUANTIZATION_KEY, fix=fix))


def loading_config(section: ModelSection, config: Any, compute_dtype: "torch.dtype") -> Any:
    """The `quantization_config` for `from_pretrained`; None leaves it to the model's own configuration.

    Args:
        section: The settings of the model.
        config: The model's configuration.
        compute_dtype: What 4-bit layers compute in.

    Raises:
        ModelError: transformers does not know how the base is quantized, or a package is missing.
    """
    if section.gguf_file is not None:
        return transformers.GgufConfig(dequantize=True)
    if (record := record_of(config.to_dict())) is not None:
        name = method(record)
        if name != "bitsandbytes" and not upstream.is_quantization_known(name):
            what = f"the base is quantized by a method that transformers does not know ({name})"
            fix = "use one that is not quantized, or by GPTQ"
            raise ModelError(Problem(Code.MODEL_UNSUPPORTED, what, section.name_or_path, fix=fix))
        try:
            return getattr(transformers, _DEQUANTIZED[name])(dequantize=True) if name in _DEQUANTIZED else None
        except ImportError as error:
            raise ModelError(Problem(Code.SYSTEM_MISSING_PACKAGE, str(error), section.name_or_path)) from None
    if section.quantization == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if section.quantization == "4bit":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_quant_storage=compute_dtype if sharding() == "fsdp" else None,  # FSDP does not shard bytes
        )  # fmt: skip
    return None


def check_trainable(model: "transformers.PreTrainedModel", name: str) -> None:
    """Check that transformers has a backward for the quantization in which this base is held.

    Raises:
        ModelError: It has none.
    """
    quantizer = upstream.quantizer(model)
    if quantizer is not None and not quantizer.is_trainable:
        what = f"a base quantized with {quantizer.quantization_config.quant_method.value} cannot be trained"
        fix = "use one that is not quantized, or by bitsandbytes or GPTQ"
        raise ModelError(Problem(Code.MODEL_UNSUPPORTED, what, name, fix=fix))
