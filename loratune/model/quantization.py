"""Quantized bases: what their config.json records, and how transformers loads them."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import transformers

from loratune.codes import Code
from loratune.config import ModelSection
from loratune.errors import ConfigError, ModelError, Problem
from loratune.model import upstream
from loratune.model.source import QUANTIZATION_KEY
from loratune.system.launcher import sharding

if TYPE_CHECKING:
    import torch

_KEYS = "quantization_config", "compression_config"
_FIX = "use the release that is not quantized, or one that the user guide lists under Bases"


def record_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a model's configuration records of its quantization; None for a plain model. Multimodal ones may nest it."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            for key in _KEYS:
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


def held_as(section: ModelSection, config: Any) -> Literal["none", "8bit", "4bit"]:
    """How bitsandbytes holds a base in memory: as the setting says, or as its files do."""
    record = record_of(config.to_dict()) or {}
    saved: Literal["none", "8bit", "4bit"] = "4bit" if record.get("load_in_4bit") else "8bit"
    return saved if record.get("load_in_4bit") or record.get("load_in_8bit") else section.quantization


def remove_record(config: dict[str, Any]) -> bool:
    """Remove the record of quantization from the values of a config.json. Returns whether there was one."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    return any([part.pop(key, None) for part in parts for key in _KEYS])


def dense_config(config: Any) -> Any:
    """A copy of a model's configuration without the record of its quantization."""
    dense = copy.deepcopy(config)
    for part in (dense, dense.get_text_config()):
        remove_record(vars(part))
    return dense


def check_known(record: Mapping[str, Any], name: str) -> None:
    """Check that transformers knows how a base is quantized.

    Raises:
        ModelError: It does not.
    """
    if (known := method(record)) != "bitsandbytes" and not upstream.is_quantization_known(known):
        what = f"the base is quantized by a method that is not known ({known})"
        raise ModelError(Problem(Code.MODEL_UNSUPPORTED, what, name, "quantization_config", _FIX))


def check_trainable(record: Mapping[str, Any], where: str) -> None:
    """Raises ModelError: transformers has no backward for the quantization of a base. where: the base."""
    if not upstream.is_trainable(record):
        what = f"a base quantized with {method(record)} cannot be trained"
        raise ModelError(Problem(Code.MODEL_UNSUPPORTED, what, where, fix=_FIX))


def loading_config(section: ModelSection, config: Any, compute_dtype: "torch.dtype") -> Any:
    """The `quantization_config` for `from_pretrained`; None leaves it to the model's own configuration.

    Args:
        section: The settings of the model.
        config: The model's configuration, without a record of quantization if the weights are dequantized.
        compute_dtype: What 4-bit layers compute in.

    Raises:
        ModelError: transformers has no backward for the quantization of the base.
    """
    if section.gguf_file is not None:
        return transformers.GgufConfig(dequantize=True)
    if (record := record_of(config.to_dict())) is not None:
        check_trainable(record, section.name_or_path)
        return None
    if section.quantization == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if section.quantization == "4bit":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_quant_storage=compute_dtype if sharding() == "fsdp" else None,  # FSDP does not shard bytes
        )  # fmt: skip
    return None
