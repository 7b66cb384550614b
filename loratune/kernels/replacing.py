"""What fast modules have in common: whose place they take, and what they make once for all layers of a batch."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Made = TypeVar("Made")


class Replacement(nn.Module):
    """In the place of a module, with the same children and weights, so that they keep their names. Whatever else is
    asked of it is asked of the module: some families read a layer's attributes beside calling it."""

    def __init__(self, original: nn.Module):
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        for name, weight in original.named_parameters(recurse=False):
            self.register_parameter(name, weight)
        self._original = [original]  # in a list: it is no child

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_original" not in self.__dict__:
                raise
            return getattr(self.__dict__["_original"][0], name)


class PerBatch(Generic[Made]):
    """What is made of the positions of the batch that is being computed. make: takes positions (tokens,) and a key."""

    def __init__(self, make: Callable[[Tensor, Any], Made]):
        self._make = make
        self._made: dict[Hashable, Made] = {}
        self._of: tuple[Tensor, torch.Size] | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def of(self, positions: Tensor, shape: torch.Size, key: Hashable = None) -> Made:
        """positions: (1 or rows, length) of a batch of this shape."""
        if self._of is None or self._of[0] is not positions or self._of[1] != shape:
            self._of, self._made = (positions, shape), {}
        if key not in self._made:
            self._made[key] = self._make(positions.expand(shape).reshape(-1), key)
        return self._made[key]


def restore(base: Any, replaced: Sequence[tuple[str, nn.Module]]) -> None:
    """Put modules back where they were. replaced: path and module of each."""
    for name, original in replaced:
        base.set_submodule(name, original)
