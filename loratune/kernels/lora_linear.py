"""Linear layers with LoRA in the dtype of the base: fewer products, and no float32 copy of what goes through them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Adapted:
    """A frozen linear layer and its LoRA, y = W x + b + scaling * up (down (dropout x)). Hu et al. 2021.

    down: (r, in); up: (out, r); both None where the layer has no adapter.
    """

    layer: nn.Linear
    down: nn.Parameter | None = None
    up: nn.Parameter | None = None
    scaling: float = 1.0
    dropout: float = 0.0


@dataclass
class Passed:
    """What the way back through a projection needs. inner: (tokens, ranks); down: (ranks, in); up: (out, ranks), with
    the scaling in it; masks: (tokens, in) of each adapter, bool, where there is dropout."""

    inner: Tensor
    down: Tensor
    up: Tensor
    masks: list[Tensor]

    def tensors(self) -> list[Tensor]:
        """To be saved for backward."""
        return [self.inner, self.down, self.up, *self.masks]

    @classmethod
    def of(cls, saved: Sequence[Tensor]) -> "Passed":
        """From what `tensors` gave."""
        inner, down, up, *masks = saved
        return cls(inner, down, up, masks)


class Projection:
    """Layers with the same input as one product. Their weights become views of one tensor: nothing is held twice."""

    def __init__(self, layers: Sequence[Adapted]):
        parts = [part.layer for part in layers]
        self.weight = parts[0].weight.detach()
        if len(parts) > 1 and (joined := _joined([part.weight.detach() for part in parts])) is not None:
            self.weight = joined
        elif len(parts) > 1:
            self.weight = torch.cat([part.weight.detach() for part in parts])
            for part, rows in zip(parts, torch.split(self.weight, [part.out_features for part in parts]), strict=True):
                part.weight = nn.Parameter(rows, requires_grad=False)
        self.bias: Tensor | None = None
        if any(part.bias is not None for part in parts):
            empty = self.weight.new_zeros
            every = [empty(part.out_features) if part.bias is None else part.bias.detach() for part in parts]
            self.bias = torch.cat(every)
        ends = list(accumulate((part.out_features for part in parts), initial=0))
        self._adapted = [
            (part, slice(*span)) for part, span in zip(layers, pairwise(ends), strict=True) if part.down is not None
        ]
        ranks = accumulate((len(part.down) for part, _ in self._adapted if part.down is not None), initial=0)
        self._ranks = [slice(*span) for span in pairwise(ranks)]

    def parameters(self) -> list[Tensor]:
        """Every `down` and `up` in turn."""
        return [tensor for part, _ in self._adapted for tensor in (part.down, part.up) if tensor is not None]

    def forward(self, x: Tensor, training: bool, parameters: Sequence[Tensor]) -> tuple[Tensor, Passed | None]:
        """x: (tokens, in). Returns (tokens, out), and what `backward` needs if there is an adapter."""
        y = functional.linear(x, self.weight, self.bias)
        if not self._adapted:
            return y, None
        passed = self._lowered(x, training, parameters)
        return y.addmm_(passed.inner, passed.up.t()), passed

    def _lowered(self, x: Tensor, training: bool, parameters: Sequence[Tensor]) -> Passed:
        down = torch.cat(list(parameters[::2])).to(x.dtype)
        up = x.new_zeros(len(self.weight), len(down))
        for (part, columns), ranks, tensor in zip(self._adapted, self._ranks, parameters[1::2], strict=True):
            up[columns, ranks] = (tensor * part.scaling).to(x.dtype)
        if not (training and any(part.dropout for part, _ in self._adapted)):
            return Passed(x @ down.t(), down, up, [])
        inner, masks = [], []
        for (part, _), ranks in zip(self._adapted, self._ranks, strict=True):
            dropped, mask = torch.native_dropout(x, part.dropout, True)
            inner.append(dropped @ down[ranks].t())
            masks.append(mask)
        return Passed(torch.cat(inner, 1), down, up, masks)

    def backward(
        self, dy: Tensor, x: Tensor | None, passed: Passed | None, *, wanted: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """dy: (tokens, out). Returns the gradient of x, or None if it is not wanted, and those of the parameters.

        x: may be None where there is no adapter.
        """
        dx = dy @ self.weight if wanted else None
        if passed is None or x is None:
            return dx, []
        dinner, dup = dy @ passed.up, dy.t() @ passed.inner
        ddown = self._lower(dinner, x, passed)
        if dx is not None and not passed.masks:
            dx.addmm_(dinner, passed.down)
        elif dx is not None:
            for keep, ranks in self._kept(passed):
                dx += keep(dinner[:, ranks] @ passed.down[ranks])
        gradients = []
        for (part, columns), ranks in zip(self._adapted, self._ranks, strict=True):
            gradients += [ddown[ranks].float(), dup[columns, ranks].float() * part.scaling]
        return dx, gradients

    def _lower(self, dinner: Tensor, x: Tensor, passed: Passed) -> Tensor:
        """The gradient of every `down`: (ranks, in)."""
        if not passed.masks:
            return dinner.t() @ x
        return torch.cat([dinner[:, ranks].t() @ keep(x) for keep, ranks in self._kept(passed)])

    def _kept(self, passed: Passed) -> Iterator[tuple[Callable[[Tensor], Tensor], slice]]:
        """For each adapter, what dropout did to its input, and its ranks."""
        for (part, _), ranks, mask in zip(self._adapted, self._ranks, passed.masks, strict=True):
            yield partial(_keep, mask, 1 / (1 - part.dropout)), ranks


def _joined(weights: Sequence[Tensor]) -> Tensor | None:
    """The one tensor of which these are views, one below the other, as an earlier projection left them; None: there is
    none. weights: (out, in) each."""
    first = weights[0]
    ends = accumulate((weight.numel() for weight in weights), initial=first.storage_offset())
    if not all(
        weight.is_contiguous()
        and weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and (weight.shape[1:], weight.dtype, weight.storage_offset()) == (first.shape[1:], first.dtype, start)
        for weight, start in zip(weights, ends, strict=False)
    ):
        return None
    return first.as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


def _keep(mask: Tensor, scale: float, x: Tensor) -> Tensor:
    return (x * mask).mul_(scale)
