"""The GPU of this process, through `torch.accelerator` where that serves: CUDA, ROCm (which torch calls CUDA) and XPU.

MPS is not used, because it has no float64, in which losses are added up. Imports torch.
"""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from loratune.text import format_size, plural

USED = ("cuda", "xpu")
"""The types of GPUs that are used."""


def device() -> torch.device:
    """The GPU of this process, or the CPU. Of several processes, each has chosen its GPU when it joined the others."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type not in USED:
        return torch.device("cpu")
    return torch.device(found.type, torch.accelerator.current_device_index())


def describe(dtype: torch.dtype, *, spread: bool = False) -> str:
    """The device of this process and the dtype that it computes in, such as `CPU, 2 threads, bfloat16`.

    spread: whether the model is spread over all GPUs.
    """
    used, computed = device(), str(dtype).removeprefix("torch.")
    if used.type == "cpu":
        return f"CPU, {plural(torch.get_num_threads(), 'thread')}, {computed}"
    size = torch.get_device_module(used).get_device_properties(used).total_memory
    others = f" and {len(names()) - 1} more" if spread and len(names()) > 1 else ""
    return f"{used} {name(used)}, {format_size(size)}{others}, {computed}"


def has_gpu() -> bool:
    """Whether there is a GPU that is used."""
    return device().type != "cpu"


def name(gpu: torch.device) -> str:
    """The name of a GPU, such as `NVIDIA H100 80GB HBM3`."""
    return str(torch.get_device_module(gpu).get_device_name(gpu))


def names() -> list[str]:
    """The names of all GPUs that this process sees."""
    own = device()
    return [name(torch.device(own.type, number)) for number in range(torch.accelerator.device_count())] * has_gpu()


def free_memory(gpu: torch.device) -> int:
    """Bytes that this process can still allocate on a GPU: what is free there, and what torch keeps for reuse."""
    free, _ = torch.accelerator.get_memory_info(gpu)
    return free + torch.accelerator.memory_reserved(gpu) - torch.accelerator.memory_allocated(gpu)


def peak_memory() -> int:
    """The most bytes that torch had allocated on all GPUs since this process started."""
    return sum(map(torch.accelerator.max_memory_allocated, range(torch.accelerator.device_count())))


def synchronize(used: torch.device) -> None:
    """Wait until a GPU has done all its work."""
    if used.type in USED:
        torch.accelerator.synchronize(used)


@contextmanager
def same_random_numbers(used: torch.device) -> Iterator[None]:
    """After this, torch draws random numbers on the CPU and on a device as if nothing had been drawn inside.

    Without the device, torch would keep the states of all GPUs, and claim memory on each of them.
    """
    with torch.random.fork_rng([used] if used.type in USED else []):
        yield


@contextmanager
def kept_random_states() -> Iterator[None]:
    """After this, Python, NumPy and torch draw random numbers as if nothing had been drawn or seeded inside.

    Of GPUs, this is so for the one of this process, if torch has used it before.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    used = device()
    gpu = (
        torch.get_device_module(used) if used.type in USED and torch.get_device_module(used).is_initialized() else None
    )
    on_gpu = gpu.get_rng_state(used) if gpu is not None else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpu is not None:
            gpu.set_rng_state(on_gpu, used)


@contextmanager
def kept_modes() -> Iterator[None]:
    """After this, torch's default dtype and device, gradient, inference and autocast mode and the precision of products
    in float32 are as before."""
    dtype, used, precision = torch.get_default_dtype(), torch.get_default_device(), torch.get_float32_matmul_precision()
    autocast = {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", *USED)}
    with torch.inference_mode(torch.is_inference_mode_enabled()), torch.set_grad_enabled(torch.is_grad_enabled()):
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(precision)
            for kind, was_enabled in autocast.items():
                torch.set_autocast_enabled(kind, was_enabled)
            if torch.get_default_device() != used:
                torch.set_default_device(None if used.type == "cpu" else used)


@contextmanager
def default_modes() -> Iterator[None]:
    """Inside, torch computes as in a new process, whatever the program has set: with gradients, outside of inference
    mode and of autocast, in float32 and on the CPU where no dtype or device is named, with all bits of float32."""
    with kept_modes(), torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        for kind in ("cpu", *USED):
            torch.set_autocast_enabled(kind, False)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def multiplies_bfloat16() -> bool:
    """Whether the GPU, or without one the processor, multiplies in bfloat16 rather than emulating it."""
    kind = device().type
    if kind in USED:
        return bool(getattr(torch, kind).is_bf16_supported(including_emulation=False))
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))
