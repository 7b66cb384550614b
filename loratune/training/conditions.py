"""What a run is computed with: versions, processor, threads, kernels. Any of it may change the last bits of a result.

It is kept in every checkpoint. A run that goes on under other conditions is told so, and its adapter records it; see
`resuming.differences`.
"""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from loratune import kernels
from loratune.lora.attach import PeftModel

PACKAGES = ("loratune", "torch", "transformers", "peft", "accelerate", "bitsandbytes")
"""Those that compute; others only read, and what they have read is known by its fingerprint."""


def conditions(model: PeftModel, left: Sequence[str]) -> dict[str, str]:
    """Name of a condition → what it is, as both are shown to the user: "NAME was WHAT up to step 5, and is WHAT from
    there". So they are such words as make a sentence of that.

    Args:
        model: The model on the device where it is trained.
        left: What of it is not computed the fast way, see `kernels.Acceleration`.
    """
    on_gpu = model.device.type == "cuda"
    return {
        **{name: version(name) for name in PACKAGES},
        "the processor": _processor(),
        "the device": torch.cuda.get_device_name(model.device) if on_gpu else model.device.type,
        "the number of threads": str(torch.get_num_threads()),
        "the compiled CPU code": kernels.variant(model.get_input_embeddings().weight),
        "what PyTorch computes instead of fast code": ", ".join(left) or "nothing",
    }


def _processor() -> str:
    """The name of the processor, where Linux or Python knows it."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8", errors="replace").splitlines() if known.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
