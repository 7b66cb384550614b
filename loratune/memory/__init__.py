"""Estimates the peak memory of a training run from shapes alone, and determines the free memory of the machine."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loratune.config import TrainingSection
from loratune.events import progress
from loratune.kernels.upstream import get_keys_to_not_convert
from loratune.lora import parameters
from loratune.lora.attach import adapted_linear
from loratune.memory.activations import TracedStep, linear_shape, trace
from loratune.system import accelerator, environment, platforms

WeightFormat = Literal["none", "8bit", "4bit"]
"""How the linear layers of the base are quantized."""


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def format_of(model: nn.Module) -> WeightFormat:
    """How a loaded model is quantized."""
    formats: dict[WeightFormat, type] = {"4bit": Linear4bit, "8bit": Linear8bitLt}
    kinds = {type(module) for module in model.modules()}
    return next((name for name, kind in formats.items() if any(issubclass(one, kind) for one in kinds)), "none")


def quantizable(model: Any) -> set[str]:
    """Names of the modules of a `PeftModel` that bitsandbytes quantizes: linear layers, except the output layer.

    transformers' `get_keys_to_not_convert` says which are left out; LoRA's own layers are no part of the base.
    """
    base = model.get_base_model()
    prefix = next(name for name, module in model.named_modules() if module is base)
    unquantized = get_keys_to_not_convert(base)
    return {
        f"{prefix}.{name}"
        for name, module in base.named_modules()
        if (type(module) in (nn.Linear, Conv1D) or isinstance(module, Linear4bit | Linear8bitLt))
        and name.removesuffix(".base_layer") not in unquantized
        and not module.weight.requires_grad
        and "lora_" not in name
    }


def weights(model: nn.Module, weight_format: WeightFormat) -> int:
    """Bytes of the frozen base, with the scales of quantized weights.

    weight_format: how the linear layers are quantized, or would be if they are not yet.
    """
    frozen = {
        id(tensor): tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not tensor.requires_grad and "lora_" not in name and not name.endswith(_NO_WEIGHTS)
    }
    total = size(frozen.values())
    if weight_format == format_of(model):
        return total
    for name in quantizable(model):
        module: Any = model.get_submodule(name)
        total += _quantized_size(module, weight_format) - size([module.weight])
    return total


_NO_WEIGHTS = ("weight_format", "bitsandbytes__nf4", "bitsandbytes__fp4")
"""Suffixes of state dict entries with which bitsandbytes describes a layer; they are not weights."""


def _quantized_size(module: Any, weight_format: WeightFormat) -> int:
    """Bytes of the weight of a linear layer with its scales.

    8bit: one byte per element, and a float32 per output. 4bit: nf4 in blocks of 64 elements, which have a scale of one
    byte each; the scales are in blocks of 256 with a float32 each; and each layer has two tables (QLoRA,
    arXiv:2305.14314).
    """
    count: int = module.weight.numel()
    if weight_format == "8bit":
        outputs: int = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
        return count + 4 * outputs
    blocks = -(-count // 64)
    return -(-count // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256)


def moments(parameter: Tensor, optim: str) -> int:
    """Bytes of the optimizer state of a parameter.

    AdamW has two tensors like the parameter. In 8 bit (arXiv:2110.02861) it has, from 4,096 elements on, two bytes per
    element and two float32 scales per block of 256. Adafactor (arXiv:1804.04235) has a float32 per row and per column,
    SGD nothing.
    """
    count = parameter.numel()
    if optim == "sgd":
        return 0
    if optim == "adafactor":
        factors = [count // parameter.shape[-1], count // parameter.shape[-2]] if parameter.dim() > 1 else [count]
        return 4 * sum(factors)
    if optim in ("adamw_bnb_8bit", "paged_adamw_8bit"):
        return 2 * (count + 4 * -(-count // 256)) if count >= 4096 else 8 * count
    return 2 * count * parameter.element_size()


def available(device: torch.device) -> int:
    """Bytes that are free on a GPU; on a CPU, in the machine and within the limits of process and container."""
    if device.type != "cpu":
        return accelerator.free_memory(device)
    bounds = [int(psutil.virtual_memory().available)]
    if (limit := platforms.memory_limit()) is not None:
        bounds.append(limit - int(psutil.Process().memory_info().vms))
    return int(max(0, min(*bounds, environment.free_memory())))


def peak() -> dict[str, int]:
    """The most bytes that were in use at once since this process started.

    Returns:
        `process`: its resident memory (VmHWM of proc(5)); on Linux, `platforms.peak_memory` would include the parent
        process. `gpu`, if there is one: the memory allocated by torch on its GPUs.
    """
    lines = list[str]()
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    high = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
    used = psutil.Process().memory_info()
    process = int(high) << 10 if high else platforms.peak_memory() or getattr(used, "peak_wset", used.rss)
    return {"process": process} | ({"gpu": accelerator.peak_memory()} if accelerator.has_gpu() else {})


RUNTIME = 570 << 20
"""Bytes of the process before the base is loaded: its resident set with everything imported, SmolLM2's tokenizer loaded
and rows rendered (torch 2.13+cpu on Linux). On a GPU torch counts nothing of the process itself."""
ALLOCATOR_OVERHEAD = 0.13
"""What the CPU allocator holds beyond the tensors of a step, as a fraction of them (`scripts/measure_memory.py`)."""
PRIMITIVE_SIZE, PRIMITIVES_PER_SIZE, CHECKED_SIZES, CACHED_PRIMITIVES = 9 << 16, 22, 4, 1024
"""In 16 bit oneDNN compiles a primitive for each matrix product of other shapes, and keeps CACHED_PRIMITIVES of them.
For SmolLM2-135M it makes PRIMITIVES_PER_SIZE for each number of tokens of a batch (`ONEDNN_VERBOSE=profile_create`):
12.3 MiB of the heap (mallinfo2), and 574 MiB when the cache is full. The checks before training make about as many as
CHECKED_SIZES such numbers."""
HOLES = 256 << 20
"""Bytes of holes in the heap, at most, where primitives made room for others; until then, half of what these took.
After 110 steps over uneven rows there were 237 MiB of them."""
QUANTIZING = 24
"""Bytes that bitsandbytes takes on a CPU for each element of the largest matrix that it quantizes, with the holes that
remain between quantized weights: 23 in 8 bit, 25 in 4 bit (four layers of a Llama of 7 billion parameters)."""
CHECKED_LENGTH = 384
"""Tokens of the longest row with which a model is checked for packing."""

_DEFAULTS = TrainingSection()


@dataclass(frozen=True)
class Estimate:
    """Bytes of the parts of a run at its peak.

    Attributes:
        weights: The frozen base.
        adapter: The trained parameters, and LoRA-FA's A.
        gradients: The gradients of the trained parameters.
        optimizer: The states of the optimizer.
        activations: Memory that the forward pass keeps for the backward pass.
        logits: Additional memory of the loss and the backward pass.
        runtime: The process itself and non-tensor memory of its libraries; on a CPU, also the memory that loading needs
            beyond a step.
        traced: Whether activations are counted tensor by tensor, rather than by a formula.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    runtime: int
    traced: bool

    @property
    def total(self) -> int:
        """All of them together."""
        return self.parts()["total"]

    def parts(self) -> dict[str, int]:
        """Name → bytes of every part, and of all as `total`."""
        parts = {name: value for name, value in asdict(self).items() if name != "traced"}
        return parts | {"total": sum(parts.values())}


class Planned(NamedTuple):
    """How a model would be loaded.

    Attributes:
        weight_format: The quantization of its linear layers; None: unchanged.
        device: The device of its weights; None: their current device, or the CPU.
    """

    weight_format: WeightFormat | None = None
    device: torch.device | None = None


@progress("estimating the memory")
def estimate(
    model: Any,
    rows: Sequence[tuple[int, int]],
    batch: int,
    training: TrainingSection = _DEFAULTS,
    *,
    packed: bool = False,
    planned: Planned | None = None,
    batch_tokens: Sequence[int] = (),
) -> Estimate:
    """Estimate the peak memory of training; the largest step has the `batch` longest rows.

    On a CPU the bytes are those of the process: its peak resident set, without pages of the weight files, which the
    kernel can drop. On a GPU they are those that torch has allocated.

    One step runs on tensors without data, by the modules that will run: accelerated layers where the kernels know the
    layer, the model's own otherwise. For a model that does not run without data, there is a formula (Korthikanti et al.
    2022, arXiv:2205.05198, eq. 2).

    Args:
        model: A `PeftModel`, with its weights or on the meta device; it stays as it is.
        rows: (length, supervised tokens) of each row.
        batch: Rows of a batch.
        training: The section of the configuration; optimizer, accumulation and checkpointing matter.
        packed: Whether the rows of a batch are packed, or padded.
        planned: How the model would be loaded, if it is not loaded in this way.
        batch_tokens: Tokens of batches of the run, with their padding. If there are none, all batches have equally
            many.
    """
    planned, weights_device = planned or Planned(), next(model.parameters()).device
    device = planned.device or (weights_device if weights_device.type != "meta" else torch.device("cpu"))
    weight_format = planned.weight_format or format_of(model)
    step = TracedStep(
        rows=tuple(sorted(rows)[-batch:]),
        device=device,
        packed=packed,
        checkpointed=training.activation_checkpointing,
        accumulated=training.gradient_accumulation_steps > 1,
        quantized=tuple(sorted(quantizable(model))) if weight_format != "none" else (),
        keeps_input=weight_format == "8bit" and device.type != "cpu",
    )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = size(trainable)
    traced = trace(model, step, adapted_linear)
    activations, peak = traced or _by_formula(model, step)
    tensors = Estimate(
        weights=weights(model, weight_format),
        adapter=gradients + size(p for name, p in model.named_parameters() if not p.requires_grad and "lora_" in name),
        gradients=gradients,
        optimizer=sum(moments(parameter, training.optim) for parameter in trainable),
        activations=activations,
        logits=max(0, peak - activations - (0 if step.accumulated else gradients)),
        runtime=0,
        traced=traced is not None,
    )
    if device.type != "cpu":
        return tensors
    overhead = int(peak * ALLOCATOR_OVERHEAD)
    return replace(tensors, runtime=_runtime(model, tensors, overhead, step, batch_tokens))


def _runtime(model: Any, tensors: Estimate, overhead: int, step: TracedStep, batch_tokens: Sequence[int]) -> int:
    """Non-tensor memory of the process on a CPU.

    Loading can need more than the steps: a matrix is quantized in QUANTIZING bytes for each of its elements, and
    logits are compared.
    """
    vocabulary, itemsize = len(model.get_input_embeddings().weight), int(model.get_base_model().dtype.itemsize)
    code = _primitives(len(set(batch_tokens)) or 1) if itemsize <= 2 else 0
    length = min(step.length, CHECKED_LENGTH)
    logits = vocabulary * (length * 3 // 2 * itemsize + length * (itemsize + 8))
    largest = max((prod(linear_shape(model.get_submodule(name))) for name in step.quantized), default=0)
    loading = RUNTIME + tensors.weights + max(QUANTIZING * largest, logits)
    return max(RUNTIME + overhead + code, loading - tensors.total)


def _primitives(sizes: int) -> int:
    """What oneDNN keeps of its primitives, and the holes that others left.

    sizes: how many numbers of tokens the batches of the run have.
    """
    value = os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")
    capacity = int(value) if value.isdecimal() else CACHED_PRIMITIVES
    primitives = PRIMITIVES_PER_SIZE * (CHECKED_SIZES + sizes)
    cached = min(primitives, capacity)
    return PRIMITIVE_SIZE * cached + min(HOLES, PRIMITIVE_SIZE * (primitives - cached) // 2)


def _by_formula(model: Any, step: TracedStep) -> tuple[int, int]:
    """Activations and peak of decoder layers that keep 34 bytes per token and hidden unit in 16 bit.

    In addition, PEFT keeps LoRA's inputs in float32, and the logits of supervised tokens are there twice in float32.
    Adapted parameters, such as fused experts, are made anew and kept until the backward pass has come to them, where
    the gradient of each is there as a whole (compared with what Mixtral allocates in tests/test_experts.py).
    """
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    stacks = [len(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    itemsize = model.get_base_model().dtype.itemsize
    tokens, supervised = step.tokens, sum(supervised for _, supervised in step.rows)
    layer = tokens * hidden * (17 * itemsize + 4 * 4)
    activations = max(stacks, default=1) * (tokens * hidden * itemsize if step.checkpointed else layer)
    logits = vocabulary * (tokens * itemsize + 2 * supervised * 4)
    recomputed = layer if step.checkpointed else 0
    remade = parameters.remade_sizes(model).values()
    if step.checkpointed:
        recomputed += max(map(sum, remade), default=0)
    else:
        activations += sum(map(sum, remade))
    freed_before = ((size, sum(sizes[:place])) for sizes in remade for place, size in enumerate(sizes))
    gradient = max((size - freed for size, freed in freed_before), default=0)
    return activations, activations + max(logits, gradient) + recomputed


def savings(
    model: Any,
    rows: Sequence[tuple[int, int]],
    batch: int,
    training: TrainingSection = _DEFAULTS,
    *,
    packed: bool = False,
) -> list[tuple[str, int]]:
    """Changes of the config that would save memory.

    The arguments are those of `estimate`, for a model with its weights.

    Returns:
        Changes as `key: value`, and the bytes that each saves of the peak, the largest saving first.
    """
    total = estimate(model, rows, batch, training, packed=packed).total
    pairs = [
        (change, total - estimate(model, packed=packed, **arguments).total)
        for change, arguments in _changes(model, rows, batch, training)
    ]
    return sorted(((change, saving) for change, saving in pairs if saving > 0), key=lambda pair: -pair[1])


def _changes(
    model: Any, rows: Sequence[tuple[int, int]], batch: int, training: TrainingSection
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes of the config as `key: value`, and the arguments of `estimate` with each of them."""
    arguments = {"rows": rows, "batch": batch, "training": training}
    if not training.activation_checkpointing:
        new_section = training.model_copy(update={"activation_checkpointing": True})
        yield "training.activation_checkpointing: true", arguments | {"training": new_section}
    if (size := training.per_device_train_batch_size) > 1:
        half, steps = size // 2, training.gradient_accumulation_steps * 2
        new_section = training.model_copy(update={"gradient_accumulation_steps": steps})
        change = f"training.per_device_train_batch_size: {half} with training.gradient_accumulation_steps: {steps}"
        shrunk = rows if batch > 1 else [(length * half // size, labels * half // size) for length, labels in rows]
        yield change, arguments | {"rows": shrunk, "batch": max(1, batch * half // size), "training": new_section}
    if batch > 1 and (longest := max(length for length, _ in rows)) > 1:
        half = longest // 2
        yield (
            f"data.max_length: {half}",
            arguments | {"rows": [(min(length, half), min(labels, half)) for length, labels in rows]},
        )
    if format_of(model) == "none":
        yield "model.quantization: 4bit", arguments | {"planned": Planned("4bit")}
