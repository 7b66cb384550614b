"""How much memory a training run needs at its peak, from shapes alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from loratune.config import TrainingSection
from loratune.memory.depth import layer_count, traced
from loratune.memory.free import available as available
from loratune.memory.held import Held as Held
from loratune.memory.held import as_held, base_dtype, moments, quantizable, quantization, size, weights
from loratune.memory.savings import variants
from loratune.memory.trace import Step

RUNTIME = 570 << 20
"""Bytes of the process before the base is loaded: its resident set with everything imported, SmolLM2's tokenizer loaded
and rows rendered (torch 2.13+cpu on Linux). On a GPU the process itself takes nothing that torch counts."""
SLACK = 0.06
"""What the CPU allocator held beyond the tensors of a step: 3 to 13 % of them in eight runs of SmolLM2-135M."""

_DEFAULTS = TrainingSection()


@dataclass(frozen=True)
class Estimate:
    """Bytes of the parts of a run at its peak.

    weights: the frozen base; adapter: what is trained, and LoRA-FA's A; activations: what the forward keeps for the
    backward; logits: what the loss and the backward hold for a while beyond that; runtime: the process itself, and what
    its allocator holds beside tensors. traced: activations are counted tensor by tensor, not by a formula.
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
    held: Held | None = None,
    device: torch.device | None = None,
) -> Estimate:
    """The peak of training steps, the largest of which has the `batch` longest rows.

    model: a PeftModel, with its weights or on the meta device; it stays as it is. rows: (length, learnt tokens).
    held, device: how and where the weights would lie, for a model on the meta device; a loaded model tells it itself.
    On a CPU the bytes are those of the process: its peak resident set, without pages of the weight files that the
    kernel may drop. On a GPU they are those that torch has allocated.

    Forward and backward run once on tensors without data, so architecture, attention kernel, PEFT's casts and
    activation checkpointing count as they are. Where a model cannot run like that, a formula stands in (Korthikanti et
    al. 2022, arXiv:2205.05198, eq. 2).
    """
    place = device or _place(model)
    step = Step(
        rows=tuple(sorted(rows)[-batch:]),
        dtype=held.dtype if held else None,
        device=place,
        checkpointed=training.activation_checkpointing,
        accumulated=training.gradient_accumulation_steps > 1,
    )
    kind = held.quantization if held else quantization(model)
    names = quantizable(model) if kind != "none" else set()
    parameters = as_held(model, step.dtype)
    trained = [parameters[name] for name, parameter in model.named_parameters() if parameter.requires_grad]
    gradients = size(trained)
    found = traced(model, step, names if kind == "8bit" else set())
    activations, peak = (found.kept[0], found.peak(place)) if found else _by_formula(model, step)
    return Estimate(
        weights=weights(model, held, names),
        adapter=gradients + size(p for name, p in model.named_parameters() if not p.requires_grad and "lora_" in name),
        gradients=gradients,
        optimizer=sum(moments(parameter, training.optim) for parameter in trained),
        activations=activations,
        logits=max(0, peak - activations - (0 if step.accumulated else gradients)),
        runtime=RUNTIME + int(SLACK * peak) if place.type == "cpu" else 0,
        traced=found is not None,
    )


def _place(model: Any) -> torch.device:
    place: torch.device = next(model.parameters()).device
    return place if place.type != "meta" else torch.device("cpu")


def _by_formula(model: Any, step: Step) -> tuple[int, int]:
    """Activations and peak of decoder layers that keep 34 bytes per token and hidden unit in 16 bit.

    Besides, PEFT keeps LoRA's inputs in float32, and the learnt tokens' logits are held twice in float32.
    """
    hidden, words = _sizes(model)
    width = base_dtype(as_held(model, step.dtype)).itemsize
    tokens, learnt = len(step.rows) * step.length, sum(learnt for _, learnt in step.rows)
    layer = tokens * hidden * (17 * width + 4 * 4)
    kept = tokens * hidden * width if step.checkpointed else layer
    activations = int(layer_count(model) * kept)
    logits = words * (tokens * width + 2 * learnt * 4)
    return activations, activations + int(logits) + (int(layer) if step.checkpointed else 0)


def _sizes(model: Any) -> tuple[int, int]:
    """Hidden units and words, by the configuration, or by the embedding where a model has several configurations."""
    text, (rows, columns) = model.config.get_text_config(), model.get_input_embeddings().weight.shape
    return int(getattr(text, "hidden_size", columns)), int(getattr(text, "vocab_size", rows))


def savings(
    model: Any, rows: Sequence[tuple[int, int]], batch: int, training: TrainingSection = _DEFAULTS
) -> list[tuple[str, int]]:
    """Changes of a run, as `key: value`, and the bytes that each saves of the peak, the most first.

    Arguments as of `estimate`; the model is loaded.
    """
    now = estimate(model, rows, batch, training).total
    found = [(what, now - estimate(model, **changed).total) for what, changed in variants(model, rows, batch, training)]
    return sorted((one for one in found if one[1] > 0), key=lambda one: -one[1])
