"""What to change in a run that asks for more memory than there is, and what each change would save."""

from collections.abc import Iterator, Sequence
from typing import Any

from loratune.config import TrainingSection
from loratune.memory.held import Held, base_dtype, quantization


def variants(
    model: Any, rows: Sequence[tuple[int, int]], batch: int, training: TrainingSection
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes of a run, as `key: value`, and the arguments that tell `estimate` of them. Arguments as there."""
    now = {"rows": rows, "batch": batch, "training": training, "held": None}
    if not training.activation_checkpointing:
        changed = training.model_copy(update={"activation_checkpointing": True})
        yield "training.activation_checkpointing: true", now | {"training": changed}
    if (size := training.per_device_train_batch_size) > 1:
        half, steps = size // 2, training.gradient_accumulation_steps * 2
        changed = training.model_copy(update={"gradient_accumulation_steps": steps})
        kept = max(1, batch * half // size)
        what = f"training.per_device_train_batch_size: {half} with training.gradient_accumulation_steps: {steps}"
        shrunk = rows if batch > 1 else [(length * half // size, learnt * half // size) for length, learnt in rows]
        yield what, now | {"rows": shrunk, "batch": kept, "training": changed}
    if batch > 1 and (longest := max(length for length, _ in rows)) > 1:
        half = longest // 2
        yield f"data.max_length: {half}", now | {"rows": [(min(one, half), min(two, half)) for one, two in rows]}
    if quantization(model) == "none":
        held = Held(base_dtype(dict(model.named_parameters())), "4bit")
        yield "model.quantization: 4bit", now | {"held": held}
