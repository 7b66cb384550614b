"""How much memory a training run will need, from shapes alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Estimate:
    """Bytes of the parts of a run at its largest batch."""

    weights: int
    adapter: int
    activations: int
    logits: int
    runtime: int

    @property
    def total(self) -> int:
        """All of them together."""
        return self.weights + self.adapter + self.activations + self.logits + self.runtime


# An allowance for the process itself, in bytes. Importing everything takes 0.47 GiB (ru_maxrss after `from loratune
# import train, show, preflight`, torch 2.13+cpu on Linux); the rest is room for the allocator and scratch space.
RUNTIME = 3 << 28


def estimate(model: PreTrainedModel, rows: Sequence[tuple[int, int]], batch: int) -> Estimate:
    """A coarse upper estimate of a training step on the `batch` longest rows; rows: (length, learnt tokens).

    Weights as they lie in memory; adapter with gradient and Adam's two moments in float32; what a decoder layer keeps
    for its backward (Korthikanti et al. 2022, arXiv:2205.05198, eq. 2: 34 bytes per token and hidden unit in 16 bit,
    plus the LoRA inputs that PEFT holds in float32); logits in the model's dtype, those of learnt tokens also twice in
    float32.
    """
    text = model.config.get_text_config()
    largest = sorted(rows)[-batch:]
    tokens = len(largest) * largest[-1][0]
    learnt = sum(supervised for _, supervised in largest)
    width = model.dtype.itemsize
    frozen = sum(part.numel() * part.element_size() for part in model.parameters() if not part.requires_grad)
    trained = sum(part.numel() for part in model.parameters() if part.requires_grad)
    activations = text.num_hidden_layers * tokens * text.hidden_size * (17 * width + 4 * 4)
    logits = text.vocab_size * (tokens * width + 2 * learnt * 4)
    return Estimate(frozen, trained * 4 * 4, activations, logits, RUNTIME)
