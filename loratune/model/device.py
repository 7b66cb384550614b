"""The machine: its device, the dtype it computes in, and whether it can do what a configuration asks for."""

from dataclasses import dataclass

import torch
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_liger_kernel_available

from loratune.codes import Code
from loratune.config import ModelSection
from loratune.errors import ConfigError, Problem
from loratune.model import quantization, upstream


@dataclass(frozen=True)
class Machine:
    """What matters of a machine.

    Attributes:
        gpu: Name of its GPU, None without one.
        bfloat16: Whether it multiplies in bfloat16 natively.
        bitsandbytes: Why bitsandbytes does not work; empty if it does.
    """

    gpu: str | None
    bfloat16: bool
    bitsandbytes: str


def this_machine() -> Machine:
    """The machine of this process. Imports bitsandbytes."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return Machine(gpu, _computes_bfloat16(), upstream.bitsandbytes_lacks())


def check_machine(section: ModelSection, machine: Machine | None = None) -> None:
    """Check that the machine can hold a model in the dtype or quantization that is set, without looking at the model.

    Args:
        section: The settings of the model.
        machine: The machine; by default that of this process.

    Raises:
        ConfigError: bfloat16 on a GPU that only emulates it; 8bit or 4bit where bitsandbytes does not work; flash
            attention without its package or a GPU.
    """
    _check_attention(section.attn_implementation)
    if section.dtype != "bfloat16" and section.quantization == "none":
        return  # without importing bitsandbytes
    machine = machine or this_machine()
    problems = []
    if section.dtype == "bfloat16" and machine.gpu and not machine.bfloat16:
        what, fix = f"{machine.gpu} does not compute in bfloat16", "set it to float16 or float32"
        problems.append(Problem(Code.MODEL_NO_BFLOAT16, what, key="model.dtype", fix=fix))
    if section.quantization != "none" and machine.bitsandbytes:
        problems.append(quantization.bitsandbytes_problem(section.quantization, machine.bitsandbytes))
    if problems:
        raise ConfigError(problems)


def check_kernels(section: ModelSection, *, gpu: bool) -> None:
    """Check that this machine has what training is to use.

    Raises:
        ConfigError: A setting needs a GPU, or a package that is not installed.
    """
    settings = {
        "device_map": section.device_map is not None, "torch_compile": section.torch_compile,
        "use_liger_kernel": section.use_liger_kernel,
    }  # fmt: skip
    what, fix = "needs a GPU, and there is none", "leave it out"
    problems = [
        Problem(Code.MODEL_NEEDS_GPU, what, key=f"model.{name}", fix=fix)
        for name, is_set in settings.items()
        if is_set and not gpu
    ]
    if section.use_liger_kernel and gpu and not is_liger_kernel_available():
        what, fix = "needs the package liger-kernel", "leave it out, or: pip install liger-kernel"
        problems.append(Problem(Code.MODEL_MISSING_PACKAGE, what, key="model.use_liger_kernel", fix=fix))
    if problems:
        raise ConfigError(problems)


def _check_attention(name: str | None) -> None:
    checks = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if name in checks and not checks[name]():
        package = "flash-attn" if name == "flash_attention_2" else "flash-attn-3"
        what = f"{name} needs a CUDA GPU and the package {package}, and at least one of them is missing"
        fix = "leave it out, or set it to sdpa"
        raise ConfigError(Problem(Code.MODEL_FLASH_ATTENTION, what, key="model.attn_implementation", fix=fix))


def notes(section: ModelSection, machine: Machine | None = None) -> list[str]:
    """What works on this machine, but not well. Arguments as in `check_machine`."""
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
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))
