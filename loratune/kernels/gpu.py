"""What is accelerated on a GPU: LoRA in the dtype of the base, and attention row by row.

The other layers are accelerated by `compile_layers` and by Liger's kernels, if the config asks for them.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from loratune.codes import Code
from loratune.errors import ModelError, Problem
from loratune.kernels import attention, rowwise, upstream
from loratune.kernels.attention import VarlenAttention
from loratune.kernels.lora_linear import Adapted
from loratune.kernels.parity_check import ParityCheck
from loratune.kernels.replacements import Reader, twin

Layers = Iterable[tuple[str, nn.Module]]
"""Path and module of each layer that is replaced."""
LIGER = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}
"""Which of Liger's kernels are used; the loss is that of `LossHead`."""


def fast_linear(module: nn.Module, part: Adapted, down: Tensor, up: Tensor) -> nn.Module:
    """A linear layer with LoRA that computes in the dtype of the base."""

    def forward(x: Tensor, training: bool) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        y = functional.linear(x, part.layer.weight, part.layer.bias)
        inner = functional.linear(functional.dropout(x, part.dropout, training), down.to(x.dtype))
        return y + functional.linear(inner, (up * part.scaling).to(x.dtype))

    return twin(module, forward)


def replace(
    base: Any, reader: Reader, replaced: list[tuple[str, nn.Module]]
) -> tuple[list[Callable[[Any], Layers]], dict[str, str]]:
    """Replace layers on a GPU. Arguments and results are those of `acceleration._replace`."""
    steps: list[Callable[[Any], Layers]] = [partial(_replace_linear, reader)]
    replaced += _replace_linear(reader, base)
    fallbacks = {} if replaced else {"LoRA": "no adapted layer is a linear one with LoRA alone"}
    if _attends_by_rows(base):
        return [*steps, partial(_register_attention, VarlenAttention())], fallbacks
    return steps, fallbacks | {"attention": "by rows the model does not compute the same, or drops out weights"}


def _replace_linear(reader: Reader, base: Any) -> Iterator[tuple[str, nn.Module]]:
    for name, module in list(base.named_modules()):
        part = reader(module)
        if part is not None and part.down is not None and part.up is not None:
            yield name, module
            base.set_submodule(name, fast_linear(module, part, part.down, part.up))


def _register_attention(function: VarlenAttention, base: Any) -> Layers:
    AttentionInterface.register(attention.VARLEN, function)
    AttentionMaskInterface.register(attention.VARLEN, rowwise.no_mask)
    base.set_attn_implementation(attention.VARLEN)
    return ()


def _attends_by_rows(base: Any) -> bool:
    """Have the model attend row by row, if it then computes the same."""
    if any(getattr(module, "attention_dropout", 0) for module in base.modules()):
        return False
    own, function = upstream.attn_implementation(base), VarlenAttention()
    check = ParityCheck(base)
    _register_attention(function, base)
    if check.passes() and (function.windowed or not has_windows(base.config)):
        return True
    base.set_attn_implementation(own)
    return False


def has_windows(config: Any) -> bool:
    """Whether a configuration limits what some layers attend to, by a window or by chunks."""
    settings = config.get_text_config().to_dict()
    return bool(settings.get("sliding_window") or settings.get("attention_chunk_size"))


def use_liger(model: Any) -> None:
    """Put Liger's kernels into a `PeftModel`. Raises ModelError: there are none for its family."""
    upstream.apply_liger_kernel(model, LIGER)
    if not any("forward" in vars(module) for module in model.get_base_model().modules()):
        what, fix = f"Liger has no kernels for {model.config.model_type}", "remove the key"
        raise ModelError(Problem(Code.CONFIG_CONFLICT, what, key="model.use_liger_kernel", fix=fix))


def compile_layers(model: Any, **options: Any) -> None:
    """Compile each layer of a `PeftModel` by itself, for lengths that change. options: of `torch.compile`.

    Raises ModelError: the model does not name its layers.
    """
    layers = getattr(model.get_base_model().get_decoder(), "layers", None)
    if layers is None:
        what, fix = f"the layers of {model.config.model_type} cannot be compiled one by one", "remove the key"
        raise ModelError(Problem(Code.CONFIG_CONFLICT, what, key="model.torch_compile", fix=fix))
    for layer in layers:
        layer.compile(dynamic=True, **options)
