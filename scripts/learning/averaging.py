"""The average of an adapter's weights over the last steps of a run: of A and of B, each by itself, as is usual.

The product of the averages is not the average of the products; near the end of a run, where A hardly moves, they are
close. What is measured is what somebody gets who averages adapter files.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_post_hook


class Averages:
    """Sums of the weights over the last steps. parts: of all steps; steps: of the run."""

    def __init__(self, parts: Sequence[float], steps: int):
        self.parts, self._steps, self._done = tuple(parts), steps, 0
        self._sums: dict[float, list[torch.Tensor]] = {}
        self._counts = dict.fromkeys(self.parts, 0)
        self._last: list[torch.Tensor] = []

    def add(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step of an optimizer."""
        self._done += 1
        self._last = [one.detach() for group in optimizer.param_groups for one in group["params"]]
        for part in self.parts:
            if self._done > self._steps - max(1, round(part * self._steps)):
                sums = self._sums.setdefault(part, [torch.zeros_like(one) for one in self._last])
                torch._foreach_add_(sums, self._last)
                self._counts[part] += 1

    def write(self, part: float, adapter: Path, place: Path) -> None:
        """Write an adapter with the averages. The tensors of the file are found by the values after the last step."""
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        shutil.copy(adapter / "adapter_config.json", place)
        known = {
            _key(tensor): mean / self._counts[part] for tensor, mean in zip(self._last, self._sums[part], strict=True)
        }
        tensors = load_file(adapter / "adapter_model.safetensors")
        save_file({name: known[_key(tensor)] for name, tensor in tensors.items()}, place / "adapter_model.safetensors")


def _key(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.float().contiguous().numpy().tobytes()


@contextmanager
def observed(parts: Sequence[float], steps: int) -> Iterator[Averages]:
    """Average the weights of what is trained inside. parts, steps: see `Averages`; without parts nothing is done."""
    averages = Averages(parts, steps)
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: averages.add(optimizer)) if parts else None
    try:
        yield averages
    finally:
        if hook is not None:
            hook.remove()
