"""Quantized bases: what config.json says of them, and whether the packages are there that read or make them.

Known without torch, but for bitsandbytes, which imports it.
"""

import importlib
import json
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loratune.errors import ConfigError, ModelError, Problem

_log = logging.getLogger(__name__)

KEY = "model.quantization"

NEEDS: dict[str, dict[str, str]] = {
    "aqlm": {"aqlm": "aqlm"},
    "auto-round": {"auto_round": "auto-round"},
    "awq": {"optimum": "optimum", "gptqmodel": "gptqmodel"},  # optimum: PEFT asks for it
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
"""`quant_method` → module → the package to install, as transformers.quantizers asks for them."""


def found_in(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a model's configuration says of its quantization; None for a plain one. Multimodal ones may nest it."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            for key in ("quantization_config", "compression_config"):
                if isinstance(part.get(key), Mapping) and part[key]:
                    return dict(part[key])
    return None


def method(found: Mapping[str, Any]) -> str:
    """The name of a quantization."""
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return "bitsandbytes"
    return str(found.get("quant_method") or "unknown")


def described(found: Mapping[str, Any]) -> str:
    """The name of a quantization, with its bits where it says them."""
    bits = "4" if found.get("load_in_4bit") else "8" if found.get("load_in_8bit") else found.get("bits")
    return f"{method(found)}, {bits} bits" if bits else method(found)


def check_asked(found: Mapping[str, Any] | None, name: str, quantization: str) -> None:
    """Raises ModelError: `model.quantization` is set, and the base is quantized as it is."""
    if found is not None and quantization != "none":
        what = f"{quantization} is asked for, and the base is quantized already ({described(found)})"
        raise ModelError(Problem(what, name, KEY, "set it to none, or take the base that is not quantized"))


def check_packages(found: Mapping[str, Any] | None, name: str) -> None:
    """Raises ModelError: the packages that read this base are missing."""
    needed = NEEDS.get(method(found), {}) if found is not None else {}
    if found is not None and (missing := [package for module, package in needed.items() if not _installed(module)]):
        what = f"the base is quantized ({described(found)}), and what reads it is missing: {', '.join(missing)}"
        raise ModelError(Problem(what, name, fix=f"pip install {' '.join(missing)}"))


def check_directory(path: Path, name: str, quantization: str) -> None:
    """As `check_asked` and `check_packages`, from the config.json of a directory, if it can be read."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        _log.debug("%s is not looked at for its quantization", path, exc_info=True)
        return  # transformers reads it again, and says what is wrong
    found = found_in(config) if isinstance(config, dict) else None
    check_asked(found, name, quantization)
    check_packages(found, name)


def check_bitsandbytes(quantization: str) -> None:
    """Raises ConfigError: 8bit or 4bit is asked for, and bitsandbytes does not work here. Imports it only then."""
    if quantization != "none" and (reason := without_bitsandbytes()):
        raise ConfigError(not_here(quantization, reason))


def not_here(quantization: str, reason: str) -> Problem:
    """A quantization is asked for that this machine cannot do."""
    what = f"{quantization} is not possible here: {reason}"
    return Problem(what, key=KEY, fix="mend bitsandbytes, or set it to none")


def without_bitsandbytes() -> str:
    """Why bitsandbytes cannot be used; empty if it can. Its import succeeds without the library that does the work."""
    try:
        extension = importlib.import_module("bitsandbytes.cextension")
    except Exception as error:  # a library that does not load, a version that does not fit torch
        _log.debug("bitsandbytes cannot be imported", exc_info=True)
        return f"bitsandbytes cannot be imported ({error})"
    if isinstance(extension.lib, extension.ErrorHandlerMockBNBNativeLibrary):
        return "bitsandbytes has no native library for this machine"
    return ""


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False
