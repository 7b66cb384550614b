"""An adapter directory as it lies on the disk: opened and checked without torch, without loading weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from loratune.errors import AdapterError, Problem

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Saved:
    """An adapter directory whose files are readable. tensors: name → shape."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]

    @property
    def base(self) -> str:
        """The directory or hub id of the base model."""
        return str(self.config["base_model_name_or_path"])


def inspect(path: Path) -> Saved:
    """Open an adapter directory without loading weights. Never looks on the hub, never reads a pickle.

    Raises AdapterError: no directory, a file, no config, no weights, unreadable or not of LoRA.
    """
    where = str(path)
    if not path.exists():
        raise AdapterError(Problem("no such directory", where))
    if not path.is_dir():
        raise AdapterError(Problem("is a file, not an adapter directory", where))
    if not (path / CONFIG_FILE).is_file():
        raise AdapterError(Problem(f"no {CONFIG_FILE} in this directory, so it holds no adapter", where))
    if not (path / WEIGHTS_FILE).is_file():
        pickled = " (adapter_model.bin is a pickle, and pickles are not opened)" if list(path.glob("*.bin")) else ""
        raise AdapterError(Problem(f"no {WEIGHTS_FILE} in this directory{pickled}", where))
    return Saved(path, _read_config(path / CONFIG_FILE), _read_shapes(path / WEIGHTS_FILE))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(Problem(f"not readable as JSON: {error}", str(path))) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(Problem("not the configuration of a LoRA adapter", str(path)))
    if not isinstance(config.get("base_model_name_or_path"), str) or not config["base_model_name_or_path"]:
        raise AdapterError(Problem("does not name its base", str(path), "base_model_name_or_path"))
    for key in ("r", "lora_alpha"):
        if isinstance(config.get(key), bool) or not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise AdapterError(Problem("not a positive number", str(path), key))
    if not config.get("target_modules") or not isinstance(config["target_modules"], list | str):
        raise AdapterError(Problem("does not say which modules it adapts", str(path), "target_modules"))
    return config


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(Problem(f"damaged: {error}", str(path))) from None
