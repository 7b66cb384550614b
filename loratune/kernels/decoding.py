"""Linear layers with LoRA while nothing is trained: two thin products beside the base's own, in its dtype."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from loratune.kernels.lora_linear import Adapted
from loratune.kernels.native import fused_ops
from loratune.kernels.replacing import restore


class InferenceLinear(nn.Module):
    """y = W x + b + scaling * up (down x), without dropout and without gradients."""

    def __init__(self, layer: nn.Linear, down: Tensor, up: Tensor, scaling: float):
        super().__init__()
        self._weight, self._bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        self._down = down.detach().to(layer.weight.dtype)
        self._up = (up.detach() * scaling).to(layer.weight.dtype).t().contiguous()
        self._passes = fused_ops(self._weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        y = functional.linear(x, self._weight, self._bias)
        self._passes.add_lora(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), self._down, self._up)
        return y


def _lean(part: Adapted) -> nn.Module:
    if part.down is None or part.up is None:
        return part.layer
    return InferenceLinear(part.layer, part.down, part.up, part.scaling)


@contextmanager
def inference_lora(model: Any, reader: Callable[[nn.Module], Adapted | None]) -> Iterator[None]:
    """Inside, and under `torch.inference_mode`, layers that `reader` knows cost little more than the base's own.

    model: a `PeftModel`. The rest, as quantized layers and DoRA, stays PEFT's.
    """
    base = model.get_base_model()
    parts = [(name, module, reader(module)) for name, module in base.named_modules()]
    replaced = [(name, module, part) for name, module, part in parts if part is not None and part.layer is not module]
    try:
        for name, _, part in replaced:
            base.set_submodule(name, _lean(part))
        yield
    finally:
        restore(base, [(name, module) for name, module, _ in replaced])
