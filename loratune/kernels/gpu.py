"""What is fitted on a GPU: LoRA in the dtype of the base, and attention row by row. The other layers are left to
`compile_layers` and to Liger's kernels, where they are asked for."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.liger import apply_liger_kernel

from loratune.errors import ModelError, Problem
from loratune.kernels import varlen
from loratune.kernels.lora_linear import Adapted
from loratune.kernels.parity_check import ParityCheck
from loratune.kernels.replacing import Replacement


class FastLinear(Replacement):
    """In the place of a linear layer with LoRA, with the same children and its arithmetic in the dtype of the base."""

    def __init__(self, original: nn.Module, part: Adapted, down: Tensor, up: Tensor):
        super().__init__(original)
        self._part, self._down, self._up = [part], [down], [up]  # in lists: their owners are the children

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        (part,), (down,), (up,) = self._part, self._down, self._up
        y = functional.linear(x, part.layer.weight, part.layer.bias)
        inner = functional.linear(functional.dropout(x, part.dropout, self.training), down.to(x.dtype))
        return y + functional.linear(inner, (up * part.scaling).to(x.dtype))


Layers = Iterable[tuple[str, nn.Module]]
"""Path and module of each layer that goes."""


def replace(
    base: Any, reader: Callable[[nn.Module], Adapted | None], replaced: list[tuple[str, nn.Module]]
) -> tuple[list[Callable[[Any], Layers]], list[str]]:
    """Fit the layers of `base`. replaced: gets path and module of each that went. Returns what fits them again, and
    what stays, in words."""
    steps: list[Callable[[Any], Layers]] = [partial(_put_linear, reader)]
    replaced += _put_linear(reader, base)
    left = [] if replaced else ["LoRA"]
    if _attends(base):
        return [*steps, partial(_put_attention, varlen.RowAttention())], left
    return steps, [*left, "attention"]


def _put_linear(reader: Callable[[nn.Module], Adapted | None], base: Any) -> Iterator[tuple[str, nn.Module]]:
    for name, module in list(base.named_modules()):
        part = reader(module)
        if part is not None and part.down is not None and part.up is not None:
            yield name, module
            base.set_submodule(name, FastLinear(module, part, part.down, part.up).train(module.training))


def _put_attention(function: varlen.RowAttention, base: Any) -> Layers:
    AttentionInterface.register(varlen.NAME, function)
    AttentionMaskInterface.register(varlen.NAME, no_mask)
    base.set_attn_implementation(varlen.NAME)
    return ()


def _attends(base: Any) -> bool:
    """Have the model attend row by row, if that gives the same numbers."""
    if any(getattr(module, "attention_dropout", 0) for module in base.modules()):
        return False
    own, function = base.config._attn_implementation, varlen.RowAttention()
    trial = ParityCheck(base)
    _put_attention(function, base)
    if trial.agrees() and (function.windowed or not windows(base.config)):
        return True
    base.set_attn_implementation(own)
    return False


def windows(config: Any) -> bool:
    """Whether a configuration limits how far some layers see, by a window or by chunks."""
    known = config.get_text_config().to_dict()
    return bool(known.get("sliding_window") or known.get("attention_chunk_size"))


def no_mask(*_: Any, **__: Any) -> None:
    """Every layer reads the rows off the positions."""


LIGER = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}
"""The loss is `LossHead`'s."""


def use_liger(model: Any) -> None:
    """Put Liger's kernels into a `PeftModel`. Raises ModelError: there are none for its family."""
    apply_liger_kernel(model, LIGER)
    if not any("forward" in vars(module) for module in model.get_base_model().modules()):
        what = f"Liger has no kernels for {model.config.model_type}"
        raise ModelError(Problem(what, key="model.use_liger_kernel", fix="leave it out"))


def compile_layers(model: Any, **options: Any) -> None:
    """Compile each layer of a `PeftModel` by itself, for lengths that change. options: of `torch.compile`.

    Raises ModelError: it has no such layers.
    """
    layers = getattr(model.get_base_model().get_decoder(), "layers", None)
    if layers is None:
        what = f"{model.config.model_type} does not say which its layers are"
        raise ModelError(Problem(what, key="model.torch_compile", fix="leave it out"))
    for layer in layers:
        layer.compile(dynamic=True, **options)
