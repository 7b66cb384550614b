"""Acceleration on a GPU: LoRA in the dtype of the base, and attention row by row.

The other layers are accelerated by `compile_layers` and by Liger's kernels, if the config asks for them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

from loratune.codes import Code
from loratune.errors import ModelError, Problem
from loratune.kernels import rowwise, upstream
from loratune.kernels.layout import PerBatch
from loratune.kernels.lora_linear import Adapted, Reader
from loratune.kernels.masks import HELD, check_known
from loratune.kernels.parity_check import ParityCheck
from loratune.kernels.replacements import twin

Layers = Iterable[tuple[str, nn.Module]]
"""Path and module of each layer that is replaced."""
VARLEN = "loratune-varlen"
"""The name under which the attention function is registered."""
LIGER = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}
"""The Liger kernels that are used; the loss is computed by `LossHead`."""


@dataclass(frozen=True)
class RowBounds:
    """The row boundaries of a batch.

    Attributes:
        cumulative: (rows + 1,), int32, from 0 to the number of tokens.
        longest: Tokens of the longest row.
    """

    cumulative: Tensor
    longest: int

    @classmethod
    def of(cls, positions: Tensor, _: None = None) -> "RowBounds":
        """positions: (tokens,), 0 where a row begins."""
        begins = torch.nonzero(positions[1:] == 0)[:, 0] + 1
        bounds = torch.cat([begins.new_zeros(1), begins, begins.new_full((1,), len(positions))])
        return cls(bounds.to(torch.int32), int(bounds.diff().max()))


class VarlenAttention:
    """An attention function of transformers for a GPU.

    Batches must have no cache, and no padding except on the right.

    Attributes:
        windowed: Whether a layer was called with a window.
    """

    def __init__(self) -> None:
        self.windowed = False
        self._bounds = PerBatch(RowBounds.of)

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """Attend within each row.

        Args:
            module: The attention layer.
            query: (rows, heads, length, size).
            key: The same, with as many heads or fewer.
            value: The same as `key`.
            attention_mask: None.
            options: Keyword arguments of an attention function of transformers.

        Returns:
            (rows, length, heads, size), and no weights.

        Raises:
            TypeError, ValueError: The layer needs something that the kernel does not support.
        """
        check_known(options, *HELD)
        unsupported = options.get("softcap"), options.get("s_aux"), options.get("dropout") or None, attention_mask
        if any(value is not None for value in unsupported):
            raise ValueError("the kernel has no caps, sinks, dropout or masks")
        window = options.get("sliding_window")
        self.windowed |= window is not None
        rows, heads, length, size = query.shape
        bounds = self._bounds.get(options["position_ids"], torch.Size((rows, length)))
        queries, keys, values = (x.transpose(1, 2).reshape(rows * length, -1, size) for x in (query, key, value))
        result: Any = varlen_attn(
            queries, keys, values, bounds.cumulative, bounds.cumulative, bounds.longest, bounds.longest,
            scale=options.get("scaling"), window_size=(-1 if window is None else window - 1, 0), enable_gqa=True,
        )  # fmt: skip
        return result.view(rows, length, heads, size), None


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
    """Replace layers on a GPU. Arguments and results as in `acceleration._replace`."""
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
    AttentionInterface.register(VARLEN, function)
    AttentionMaskInterface.register(VARLEN, rowwise.no_mask)
    base.set_attn_implementation(VARLEN)
    return ()


def _attends_by_rows(base: Any) -> bool:
    """Make the model attend row by row, if it then computes the same."""
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
    """Whether a configuration limits the attention of some layers by a window or by chunks."""
    settings = config.get_text_config().to_dict()
    return bool(settings.get("sliding_window") or settings.get("attention_chunk_size"))


def use_liger(model: Any) -> None:
    """Apply Liger's kernels to a `PeftModel`. Raises ModelError: Liger does not support its family."""
    upstream.apply_liger_kernel(model, LIGER)
    if not any("forward" in vars(module) for module in model.get_base_model().modules()):
        what, fix = f"Liger has no kernels for {model.config.model_type}", "remove the key"
        raise ModelError(Problem(Code.CONFIG_CONFLICT, what, key="model.use_liger_kernel", fix=fix))


def compile_layers(model: Any, **options: Any) -> None:
    """Compile each layer of a `PeftModel` separately, with dynamic shapes. options: for `torch.compile`.

    Raises ModelError: the layers of the model cannot be found.
    """
    layers = getattr(model.get_base_model().get_decoder(), "layers", None)
    if layers is None:
        what, fix = f"the layers of {model.config.model_type} cannot be compiled one by one", "remove the key"
        raise ModelError(Problem(Code.CONFIG_CONFLICT, what, key="model.torch_compile", fix=fix))
    for layer in layers:
        layer.compile(dynamic=True, **options)
