"""What is fitted on a GPU: LoRA in the dtype of the base, and attention row by row. The other layers are left to
`compile_layers` and to Liger's kernels, where they are asked for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from loratune.kernels import varlen
from loratune.kernels.projection import Adapted


class FastLinear(nn.Module):
    """In the place of a linear layer with LoRA, with the same children and its arithmetic in the dtype of the base."""

    def __init__(self, original: nn.Module, part: Adapted, down: Tensor, up: Tensor):
        super().__init__()
        self._part, self._down, self._up = [part], [down], [up]  # in lists: their owners are the children
        for name, child in original.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        (part,), (down,), (up,) = self._part, self._down, self._up
        y = functional.linear(x, part.layer.weight, part.layer.bias)
        inner = functional.linear(functional.dropout(x, part.dropout, self.training), down.to(x.dtype))
        return y + functional.linear(inner, (up * part.scaling).to(x.dtype))


def replace(
    base: Any, reader: Callable[[nn.Module], Adapted | None], replaced: list[tuple[str, nn.Module]], tolerance: float
) -> list[str]:
    """Fit the layers of `base`. replaced: gets path and module of each that went. Returns what stays, in words.

    tolerance: how far apart the outcomes may be with the model's own attention and with this one, as a share of their
    spread.
    """
    for name, module in list(base.named_modules()):
        part = reader(module)
        if part is not None and part.down is not None and part.up is not None:
            replaced.append((name, module))
            base.set_submodule(name, FastLinear(module, part, part.down, part.up).train(module.training))
    left = [] if any(type(base.get_submodule(name)) is FastLinear for name, _ in replaced) else ["LoRA"]
    return left if _attends(base, tolerance) else [*left, "attention"]


@torch.no_grad()
def _attends(base: Any, tolerance: float) -> bool:
    """Have the model attend row by row, if that gives the same numbers for two rows end to end."""
    own = base.config._attn_implementation
    positions = torch.cat([torch.arange(length) for length in (29, 19)])[None].to(base.device)
    ids = (torch.arange(positions.numel()) + 8).view(1, -1).to(base.device) % base.config.get_text_config().vocab_size
    decoder, training = base.get_decoder(), base.training
    base.eval()
    try:
        old = decoder(ids, position_ids=positions, use_cache=False).last_hidden_state.float()
        AttentionInterface.register(varlen.NAME, varlen.RowAttention())
        AttentionMaskInterface.register(varlen.NAME, no_mask)
        base.set_attn_implementation(varlen.NAME)
        new = decoder(ids, position_ids=positions, use_cache=False).last_hidden_state.float()
        fits = bool((old - new).square().mean().sqrt() <= tolerance * old.std())
    except Exception:  # what a family lacks, or raises on what it does not know, is its own choice
        fits = False
    finally:
        base.train(training)
    if not fits:
        base.set_attn_implementation(own)
    return fits


def no_mask(*_: Any, **__: Any) -> None:
    """Every layer reads the rows off the positions."""


def compile_layers(model: Any, **options: Any) -> None:
    """Compile each layer of a `PeftModel` by itself, for lengths that change. options: of `torch.compile`."""
    for layer in model.get_base_model().get_decoder().layers:
        layer.compile(dynamic=True, **options)
