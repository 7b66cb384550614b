"""When updates end on the device, which is not waited for: a GPU computes while the next update is prepared."""

import time
from itertools import pairwise
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class Steps:
    """Notes the end of each update of any optimizer in this process."""

    def __init__(self) -> None:
        self._ends: list[Any] = []
        register_optimizer_step_post_hook(self._note)

    def _note(self, *_: Any) -> None:
        if torch.cuda.is_available():
            event: Any = torch.cuda.Event(enable_timing=True)
            event.record()
            self._ends.append(event)
        else:
            self._ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """From the end of each update to that of the next; one fewer than updates."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return [first.elapsed_time(second) / 1000 for first, second in pairwise(self._ends)]
        return [second - first for first, second in pairwise(self._ends)]
