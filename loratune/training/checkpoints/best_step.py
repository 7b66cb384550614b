"""The best step of a run, by its held-out loss, and the weights of that step.

Each checkpoint holds both as of its own step: the record in `run.json`, and the weights in a file of their own unless
they are those of the checkpoint itself. So a resumed run needs only the checkpoint. Evaluations after the checkpoint do
not count; the resumed run repeats them.
"""

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file

from loratune.lora.adapter_files import WEIGHTS_FILE
from loratune.lora.tensors import Weights, read_weights
from loratune.training.checkpoints.record import BestRecord
from loratune.training.checkpoints.store import BEST_WEIGHTS


class BestStep:
    """The best step so far.

    Attributes:
        record: What the evaluations gave; None before the first.
        keep: Whether the weights of that step become the adapter.
        patience: After how many evaluations in a row without a lower loss the run ends; None for never.
    """

    def __init__(self, *, keep: bool, patience: int | None, record: BestRecord | None = None) -> None:
        self.record, self.keep, self.patience = record, keep, patience
        self._weights: Weights | None = None

    @property
    def is_exhausted(self) -> bool:
        """Whether patience is at its end."""
        return self.record is not None and self.patience is not None and self.record.since >= self.patience

    def add(self, step: int, loss: float, weights: Callable[[], Weights]) -> None:
        """Add an evaluation.

        Args:
            step: After which step it was.
            loss: The held-out loss.
            weights: Returns the trained weights as whole tensors, see `tensors.full_weights`; called in all processes
                or in none.
        """
        self.record = self.record.after(step, loss) if self.record else BestRecord(step, loss)
        if self.keep and self.record.step == step:
            self._weights = {name: tensor.cpu() for name, tensor in weights().items()}

    def kept_weights(self, step: int) -> Weights | None:
        """The weights that become the adapter; None if they are those of the last step, which is given."""
        if not self.keep or self.record is None or self.record.step == step:
            return None
        assert self._weights is not None
        return self._weights

    def save(self, checkpoint: Path, step: int) -> None:
        """Write the weights to a checkpoint of a step, unless they are its own."""
        if (weights := self.kept_weights(step)) is not None:
            save_file(weights, checkpoint / BEST_WEIGHTS)

    def load(self, checkpoint: Path, step: int) -> None:
        """Read the weights back from a checkpoint of a step."""
        if self.keep and self.record is not None:
            self._weights = read_weights(checkpoint / (WEIGHTS_FILE if self.record.step == step else BEST_WEIGHTS))
