"""Quantized bases: what config.json records, which packages are needed, and how transformers is to load them.

Needs no torch, except where bitsandbytes itself is asked, which imports it.
"""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from loratune.codes import Code
from loratune.config import ModelSection
from loratune.errors import ConfigError, ModelError, Problem
from loratune.model import upstream
from loratune.system.launcher import sharding

if TYPE_CHECKING:
    import torch

KEY = "model.quantization"

NEEDS: dict[str, dict[str, str]] = {
    "aqlm": {"aqlm": "aqlm"},
    "auto-round": {"auto_round": "auto-round"},
    "awq": {"optimum": "optimum", "gptqmodel": "gptqmodel"},  # PEFT needs optimum
    "bitsandbytes": {"bitsandbytes": "bitsandbytes"},
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "eetq": {"kernels": "kernels"},
    "fbgemm_fp8": {"fbgemm_gpu": "fbgemm-gpu"},
    "gptq": {"optimum": "optimum", "gptqmodel": "gptqmodel"},
    "hqq": {"hqq": "hqq"},
    "quanto": {"optimum.quanto": "optimum-quanto"},
    "quark": {"quark": "amd-quark"},
    "sinq": {"sinq": "sinq"},
    "spqr": {"spqr_quant": "spqr_quant"},
    "torchao": {"torchao": "torchao"},
    "vptq": {"vptq": "vptq"},
}
"""`quant_method` → module → the package to install, as transformers.quantizers requires them."""

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


def _description(record: Mapping[str, Any]) -> str:
    """The name of a recorded quantization, with its bits where they are recorded."""
    bits = "4" if record.get("load_in_4bit") else "8" if record.get("load_in_8bit") else record.get("bits")
    return f"{method(record)}, {bits} bits" if bits else method(record)


def check_not_quantized(record: Mapping[str, Any] | None, name: str, quantization: str) -> None:
    """Check that a base that is to be quantized is not quantized already.

    Raises:
        ModelError: `model.quantization` is set, and the base has a recorded quantization.
    """
    if record is not None and quantization != "none":
        what = f"{quantization} cannot be applied: the base is quantized already ({_description(record)})"
        fix = "set it to none, or use the base that is not quantized"
        raise ModelError(Problem(Code.MODEL_UNSUPPORTED, what, name, KEY, fix))


def check_packages(record: Mapping[str, Any] | None, name: str) -> None:
    """Check that the packages are installed that read this base.

    Raises:
        ModelError: Some are not.
    """
    if record is None:
        return
    needed = NEEDS.get(method(record), {})
    if missing := [package for module, package in needed.items() if not _is_installed(module)]:
        what = f"the base is quantized ({_description(record)}), and packages are missing: {', '.join(missing)}"
        raise ModelError(Problem(Code.SYSTEM_MISSING_PACKAGE, what, name, fix=f"pip install {' '.join(missing)}"))


def check_directory(path: Path, name: str, quantization: str) -> None:
    """As `check_not_quantized` and `check_packages`, from the config.json of a directory, if it can be read."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # transformers reads it again, and reports what is wrong
    record = record_of(config) if isinstance(config, dict) else None
    check_not_quantized(record, name, quantization)
    check_packages(record, name)


def check_bitsandbytes(quantization: str) -> None:
    """Check that bitsandbytes works, which is imported only if it is needed.

    Raises:
        ConfigError: 8bit or 4bit is set, and bitsandbytes does not work here.
    """
    if quantization != "none" and (reason := upstream.bitsandbytes_lacks()):
        raise ConfigError(bitsandbytes_problem(quantization, reason))


def bitsandbytes_problem(quantization: str, reason: str) -> Problem:
    """The problem of a quantization that this machine cannot do."""
    what = f"{quantization} does not work here: {reason}"
    return Problem(Code.MODEL_UNSUPPORTED, what, key=KEY, fix="repair bitsandbytes, or set it to none")


def loading_config(section: ModelSection, config: Any, compute_dtype: "torch.dtype") -> Any:
    """The `quantization_config` for `from_pretrained`; None leaves it to the model's own configuration.

    Args:
        section: The settings of the model.
        config: The model's configuration.
        compute_dtype: What 4-bit layers compute in.

    Raises:
        ModelError: transformers does not know how the base is quantized, or packages are missing that read it.
    """
    if section.gguf_file is not None:
        return transformers.GgufConfig(dequantize=True)
    if (record := record_of(config.to_dict())) is not None:
        name = method(record)
        if name != "bitsandbytes" and not upstream.is_quantization_known(name):
            what = f"the base is quantized by a method that transformers does not know ({name})"
            fix = "use one that is not quantized, or by GPTQ"
            raise ModelError(Problem(Code.MODEL_UNSUPPORTED, what, section.name_or_path, fix=fix))
        check_packages(record, section.name_or_path)
        return getattr(transformers, _DEQUANTIZED[name])(dequantize=True) if name in _DEQUANTIZED else None
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


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False
