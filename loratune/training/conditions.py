"""The software and hardware that a run is computed with, as recorded in its checkpoints."""

import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel

from loratune import kernels

COMPUTING_PACKAGES = ("loratune", "torch", "transformers", "peft", "accelerate", "bitsandbytes")
"""The packages that compute. Others only read, and what they have read has a fingerprint."""


def environment(model: PreTrainedModel, fallbacks: Iterable[str]) -> dict[str, str]:
    """What a run is computed with. Any of it may change the last bits of a result.

    Args:
        model: The model on the device on which it is trained.
        fallbacks: What of it PyTorch computes as no kernel accelerates it, see `kernels.Acceleration`.

    Returns:
        Names and values. Both are shown to the user: "NAME was VALUE up to step 5, and is VALUE from there".
    """
    path, on_gpu = Path("/proc/cpuinfo"), model.device.type == "cuda"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    processors = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        **{name: version(name) for name in COMPUTING_PACKAGES},
        "the processor": next(processors, platform.processor() or platform.machine()),
        "the device": torch.cuda.get_device_name(model.device) if on_gpu else model.device.type,
        "the number of threads": str(torch.get_num_threads()),
        "the compiled CPU code": kernels.variant(model.get_input_embeddings().weight),
        "what PyTorch computes instead of fast code": ", ".join(fallbacks) or "nothing",
    }
