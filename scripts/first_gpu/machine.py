"""What a machine is: `python -m first_gpu.machine` prints a line of JSON. Needs nothing but torch."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = (
    "loratune", "torch", "triton", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers",
    "safetensors", "huggingface_hub", "numpy", "scipy", "pandas", "pyarrow", "liger-kernel", "flash-attn",
)  # fmt: skip


def installed(name: str) -> str:
    """The version of a package, empty if there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """loratune's version and commit, or why it cannot be imported."""
    try:
        from loratune.system import release  # noqa: PLC0415

        return release.describe()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def facts() -> dict[str, Any]:
    """The machine as plain values."""
    found: dict[str, Any] = {
        "loratune": commit(), "python": platform.python_version(), "system": platform.platform(),
        "cuda": torch.version.cuda or "", "gpu": "", "packages": {name: installed(name) for name in PACKAGES},
    }  # fmt: skip
    if torch.cuda.is_available():
        known = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": known.name, "capability": f"{known.major}.{known.minor}", "gpu_bytes": known.total_memory,
            "multiprocessors": known.multi_processor_count,
        }  # fmt: skip
    return found


if __name__ == "__main__":
    print(json.dumps(facts()))
