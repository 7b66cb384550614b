"""Linear layers with LoRA while nothing is trained: two thin products beside the base's own, all in its dtype."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from loratune.kernels.projection import Adapted


class LeanLinear(nn.Module):
    """y = W x + b + scaling * up (down x), without dropout and without gradients. part: with an adapter."""

    def __init__(self, part: Adapted, down: Tensor, up: Tensor):
        super().__init__()
        self.layer, dtype = part.layer, part.layer.weight.dtype
        self._down = down.detach().to(dtype).t()
        self._up = (up.detach() * part.scaling).to(dtype).t()

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        y: Tensor = self.layer(x)
        y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ self._down, self._up)
        return y


@contextmanager
def lean(model: Any, reader: Callable[[nn.Module], Adapted | None]) -> Iterator[None]:
    """Inside, and under `torch.inference_mode`, layers that `reader` knows cost little more than the base's own.

    model: a `PeftModel`. The rest, as quantized layers and DoRA, stays PEFT's.
    """
    base = model.get_base_model()
    parts = [(name, module, reader(module)) for name, module in base.named_modules() if not _plain(module)]
    replaced = []
    try:
        for name, module, part in parts:
            if part is None:
                continue
            lean = part.layer if part.down is None or part.up is None else LeanLinear(part, part.down, part.up)
            base.set_submodule(name, lean)
            replaced.append((name, module))
        yield
    finally:
        for name, module in replaced:
            base.set_submodule(name, module)


def _plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear
