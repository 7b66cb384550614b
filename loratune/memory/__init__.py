"""How much memory a training run needs at its peak, from shapes alone."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from loratune.config import TrainingSection
from loratune.lora.linear import linear
from loratune.memory.activations import TracedStep, trace
from loratune.memory.machine import WeightFormat as WeightFormat
from loratune.memory.machine import available as available
from loratune.memory.machine import format_of, moments, quantizable, size, weights

RUNTIME = 570 << 20
"""Bytes of the process before the base is loaded: its resident set with everything imported, SmolLM2's tokenizer loaded
and rows rendered (torch 2.13+cpu on Linux). On a GPU torch counts nothing of the process itself."""
ALLOCATOR_OVERHEAD = 0.13
"""What the CPU allocator holds beyond the tensors of a step, as a fraction of them (`scripts/measure_memory.py`)."""
CODE_SIZE, TILE, CHECKED_REMAINDERS = 15 << 19, 64, 6
"""In 16 bit oneDNN compiles code for each remainder of a batch's tokens divided by TILE, and keeps it: CODE_SIZE bytes
for each. The checks before training have 6 remainders. The heap of SmolLM2-135M grew by 5.4 MiB per step over uneven
rows."""
CHECKED_LENGTH = 384
"""Tokens of the longest row that is computed to check whether a model understands packed rows."""

_DEFAULTS = TrainingSection()


@dataclass(frozen=True)
class Estimate:
    """Bytes of the parts of a run at its peak.

    Attributes:
        weights: The frozen base.
        adapter: The trained parameters, and LoRA-FA's A.
        gradients: The gradients of the trained parameters.
        optimizer: The states of the optimizer.
        activations: What the forward pass keeps for the backward pass.
        logits: What the loss and the backward pass allocate beyond that.
        runtime: The process itself, and what its libraries allocate besides tensors. On a CPU it also has what loading
            needs beyond a step, if anything.
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


def estimate(
    model: Any,
    rows: Sequence[tuple[int, int]],
    batch: int,
    training: TrainingSection = _DEFAULTS,
    *,
    packed: bool = False,
    weight_format: WeightFormat | None = None,
    device: torch.device | None = None,
    batch_tokens: Sequence[int] = (),
) -> Estimate:
    """The peak of training steps, the largest of which has the `batch` longest rows.

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
        weight_format: How linear layers would be quantized, for a model where they are not yet.
        device: Where the weights would be, for a model on the meta device.
        batch_tokens: Tokens of batches of the run, with their padding. If there are none, all batches have equally
            many.
    """
    weights_device = next(model.parameters()).device
    device = device or (weights_device if weights_device.type != "meta" else torch.device("cpu"))
    step = TracedStep(
        rows=tuple(sorted(rows)[-batch:]),
        device=device,
        packed=packed,
        checkpointed=training.activation_checkpointing,
        accumulated=training.gradient_accumulation_steps > 1,
    )
    weight_format = weight_format or format_of(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = size(trained)
    traced = trace(model, step, linear, quantizable(model) if weight_format != "none" else set(), weight_format)
    activations, peak = traced or _by_formula(model, step)
    tensors = Estimate(
        weights=weights(model, weight_format),
        adapter=gradients + size(p for name, p in model.named_parameters() if not p.requires_grad and "lora_" in name),
        gradients=gradients,
        optimizer=sum(moments(parameter, training.optim) for parameter in trained),
        activations=activations,
        logits=max(0, peak - activations - (0 if step.accumulated else gradients)),
        runtime=0,
        traced=traced is not None,
    )
    if device.type != "cpu":
        return tensors
    return replace(tensors, runtime=_runtime(model, tensors, peak, step, batch_tokens))


def _runtime(model: Any, tensors: Estimate, peak: int, step: TracedStep, batch_tokens: Sequence[int]) -> int:
    """What the process needs besides tensors, on a CPU.

    Loading can need more than the steps: weights are there twice while they are read, and one and a half times while
    layers are joined and logits compared.
    """
    vocabulary, itemsize = len(model.get_input_embeddings().weight), int(model.get_base_model().dtype.itemsize)
    remainders = CHECKED_REMAINDERS + len({tokens % TILE for tokens in batch_tokens or (0,)})
    code = CODE_SIZE * remainders if itemsize <= 2 else 0
    length = min(step.length, CHECKED_LENGTH)
    logits = vocabulary * (length * 3 // 2 * itemsize + length * (itemsize + 8))
    loading = RUNTIME + max(2 * tensors.weights, tensors.weights * 3 // 2 + logits)
    return max(RUNTIME + int(ALLOCATOR_OVERHEAD * peak) + code, loading - tensors.total)


def _by_formula(model: Any, step: TracedStep) -> tuple[int, int]:
    """Activations and peak of decoder layers that keep 34 bytes per token and hidden unit in 16 bit.

    In addition, PEFT keeps LoRA's inputs in float32, and the logits of supervised tokens are there twice in float32.
    """
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    stacks = [len(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    itemsize = model.get_base_model().dtype.itemsize
    tokens, supervised = step.tokens, sum(supervised for _, supervised in step.rows)
    layer = tokens * hidden * (17 * itemsize + 4 * 4)
    activations = max(stacks, default=1) * (tokens * hidden * itemsize if step.checkpointed else layer)
    logits = vocabulary * (tokens * itemsize + 2 * supervised * 4)
    return activations, activations + logits + (layer if step.checkpointed else 0)


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
        changed = training.model_copy(update={"activation_checkpointing": True})
        yield "training.activation_checkpointing: true", arguments | {"training": changed}
    if (size := training.per_device_train_batch_size) > 1:
        half, steps = size // 2, training.gradient_accumulation_steps * 2
        changed = training.model_copy(update={"gradient_accumulation_steps": steps})
        change = f"training.per_device_train_batch_size: {half} with training.gradient_accumulation_steps: {steps}"
        shrunk = rows if batch > 1 else [(length * half // size, labels * half // size) for length, labels in rows]
        yield change, arguments | {"rows": shrunk, "batch": max(1, batch * half // size), "training": changed}
    if batch > 1 and (longest := max(length for length, _ in rows)) > 1:
        half = longest // 2
        yield (
            f"data.max_length: {half}",
            arguments | {"rows": [(min(length, half), min(labels, half)) for length, labels in rows]},
        )
    if format_of(model) == "none":
        yield "model.quantization: 4bit", arguments | {"weight_format": "4bit"}
