"""What this machine computes in: the device, the dtype, and whether it can do what is asked of it."""

from dataclasses import dataclass

import torch
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_liger_kernel_available

from loratune.config import ModelSection
from loratune.errors import ConfigError, Problem
from loratune.model import recorded_quantization


@dataclass(frozen=True)
class Machine:
    """gpu: its name, None without one; bfloat16: whether it multiplies in it natively; bitsandbytes: why not, or ""."""

    gpu: str | None
    bfloat16: bool
    bitsandbytes: str


def this_machine() -> Machine:
    """The machine of this process. Imports bitsandbytes."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return Machine(gpu, _computes_bfloat16(), recorded_quantization.without_bitsandbytes())


def check_machine(section: ModelSection, machine: Machine | None = None) -> None:
    """Insist that the machine can hold a model in the numbers that are asked for; looks at no model.

    machine: this one, if not given.
    Raises ConfigError: bfloat16 on a GPU that only emulates it; 8bit or 4bit where bitsandbytes does not work;
    flash attention without its package or a GPU.
    """
    _check_attention(section.attn_implementation)
    if section.dtype != "bfloat16" and section.quantization == "none":
        return  # bitsandbytes need not be looked at
    machine = machine or this_machine()
    problems = []
    if section.dtype == "bfloat16" and machine.gpu and not machine.bfloat16:
        what = f"{machine.gpu} does not compute in bfloat16"
        problems.append(Problem(what, key="model.dtype", fix="set it to float16 or float32"))
    if section.quantization != "none" and machine.bitsandbytes:
        problems.append(recorded_quantization.not_here(section.quantization, machine.bitsandbytes))
    if problems:
        raise ConfigError(problems)


def check_kernels(section: ModelSection, *, gpu: bool) -> None:
    """Raises ConfigError: training is to use what is not for this machine, or not installed."""
    asked = {
        "device_map": section.device_map is not None, "torch_compile": section.torch_compile,
        "use_liger_kernel": section.use_liger_kernel,
    }  # fmt: skip
    what = "is for a GPU, and there is none"
    problems = [
        Problem(what, key=f"model.{key}", fix="leave it out") for key, wanted in asked.items() if wanted and not gpu
    ]
    if section.use_liger_kernel and gpu and not is_liger_kernel_available():
        fix = "pip install liger-kernel, or leave it out"
        problems.append(Problem("needs the package liger-kernel", key="model.use_liger_kernel", fix=fix))
    if problems:
        raise ConfigError(problems)


def _check_attention(name: str | None) -> None:
    installed = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if name in installed and not installed[name]():
        package = "flash-attn" if name == "flash_attention_2" else "flash-attn-3"
        what = f"{name} needs a CUDA GPU and the package {package}, and one of them is not here"
        raise ConfigError(Problem(what, key="model.attn_implementation", fix="leave it out, or set it to sdpa"))


def notes(section: ModelSection, machine: Machine | None = None) -> list[str]:
    """What works on this machine, and not well. machine: this one, if not given."""
    if section.dtype == "float16":
        return ["model.dtype: float16 overflows above 65,504; bfloat16 and float32, one of which is auto, do not"]
    if section.dtype == "bfloat16" and not (machine.bfloat16 if machine else _computes_bfloat16()):
        return ["model.dtype: this CPU has no instructions for bfloat16 and emulates it, slowly; auto is float32 here"]
    return []


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(section: ModelSection) -> torch.dtype:
    """The dtype of the frozen weights; `auto` is bfloat16 where the machine multiplies in it, else float32."""
    if section.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[section.dtype]
    return torch.bfloat16 if _computes_bfloat16() else torch.float32


def _computes_bfloat16() -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported())
