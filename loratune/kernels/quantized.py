"""Linear layers of bitsandbytes on a CPU: faster quantization, and products with dequantized weights, in training and
in evaluation alike.

In evaluation, bitsandbytes rounds activations of 8-bit layers to 8 bits but for columns with outliers, which all rows
of a batch decide; on a CPU that takes longer, and what a row gives depends on the others. In training it dequantizes as
well, in several passes over memory, and keeps the inputs, which nothing needs. On processors with AVX512-BF16, it
repacks 4-bit layers at their first evaluation, for which there is no backward pass.
"""

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from bitsandbytes.functional import dequantize_blockwise, get_4bit_type
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from loratune.kernels import upstream
from loratune.kernels.compiled.fused_ops import FEW_TOKENS_QUANTIZED, fused_ops

_LARGEST = 127
"""The 8-bit number that stands for the largest weight of an output."""
_KEPT = threading.local()
"""Has the `tensor` of `_scratch`."""
_AT_ONCE = 1 << 22
"""As many weights are quantized at once, so that their copies in float32 stay small."""


class Dequantized8bit(Linear8bitLt):
    """The layer of bitsandbytes, computed in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        if self.weight.CB is not None:
            self.init_8bit_state()
        weight, scales = self.state.CB, self.state.SCB * (1 / _LARGEST)
        if _needs_dense_weight(x, weight.shape[1]):
            return _product(x, self.bias, lambda like: _of_8bit(like, weight, scales))
        y: Tensor = fused_ops(x).linear_8bit(x.reshape(-1, x.shape[-1]), weight, scales)
        return _with_bias(y.view(*x.shape[:-1], y.shape[-1]), self.bias)


class Dequantized4bit(Linear4bit):
    """The layer of bitsandbytes, computed in the dtype of its input, whatever the compute dtype of a saved base is."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        weight = self.weight.data
        state = getattr(self.weight, "quant_state", None) or self.quant_state  # FSDP's weight has none
        if _needs_dense_weight(x, state.shape[1]) or x.shape[-1] % state.blocksize:
            return _product(x, self.bias, lambda like: _of_4bit(like, weight, state))
        packed, scales = weight.view(torch.uint8).view(-1, x.shape[-1] // 2), _scales_of_4bit(state)
        y: Tensor = fused_ops(x).linear_4bit(x.reshape(-1, x.shape[-1]), packed, scales, state.code)
        return _with_bias(y.view(*x.shape[:-1], y.shape[-1]), self.bias)


def _needs_dense_weight(x: Tensor, width: int) -> bool:
    """Whether a weight is dequantized for an input: for many tokens, a backward pass, or another width than that of
    the weight, which is an error of torch."""
    return torch.is_grad_enabled() or x.shape[-1:] != (width,) or x.numel() > FEW_TOKENS_QUANTIZED * width


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, dequantized: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.dequantized = dequantized
        return functional.linear(x, dequantized(x), bias)

    @staticmethod
    @once_differentiable  # the scratch has another weight by then
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0].contiguous()
        dx = dy @ ctx.dequantized(dy) if ctx.needs_input_grad[0] else None
        return dx, dy.sum_to_size(dy.shape[-1]) if ctx.needs_input_grad[1] else None, None


def _product(x: Tensor, bias: Tensor | None, dequantized: Callable[[Tensor], Tensor]) -> Tensor:
    """dequantized: gives the weight in the dtype of a tensor."""
    y: Tensor = _Product.apply(x, None if bias is None else bias.to(x.dtype), dequantized)  # type: ignore[no-untyped-call]
    return y


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y.add_(bias.to(y.dtype))


def _scratch(like: Tensor, count: int) -> Tensor:
    """A tensor of this thread, (count,), with the dtype of another one, until the next call.

    To get the pages of a new one from the kernel takes as long as to fill them.
    """
    if upstream.is_fake(like):
        return like.new_empty(count)
    kept: Tensor | None = getattr(_KEPT, "tensor", None)
    if kept is None or (kept.dtype, kept.device) != (like.dtype, like.device) or len(kept) < count:
        with torch.inference_mode(False):  # also written to outside of it
            kept = _KEPT.tensor = like.new_empty(count)
    return kept[:count]


def _of_8bit(like: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """A weight in the dtype of a tensor. weight: (out, in), int8; scales: (out,), float32."""
    result = _scratch(like, weight.numel()).view(weight.shape)
    fused_ops(like).dequantize(result, weight, scales)
    return result


def _of_4bit(like: Tensor, weight: Tensor, state: Any) -> Tensor:
    """A weight in the dtype of a tensor. weight: its bytes; state: the `QuantState` of bitsandbytes."""
    scales = _scales_of_4bit(state)
    padded = _scratch(like, len(scales) * state.blocksize)
    _fill_from_4bit(padded, weight, scales, state.code)
    return padded[: state.shape.numel()].view(state.shape)


def _fill_from_4bit(y: Tensor, weight: Tensor, scales: Tensor, code: Tensor) -> None:
    """y: (blocks * size,); the last block may have fewer numbers than that. code: the values of the numbers, (16,)."""
    packed = weight.view(torch.uint8).view(-1)
    if missing := len(y) // 2 - len(packed):
        packed = functional.pad(packed, (0, missing))
    blocks = (tensor.view(len(scales), -1) if len(scales) else tensor[None] for tensor in (y, packed))
    fused_ops(y).dequantize_4bit(*blocks, scales, code)


def format_of(weight: Tensor) -> str:
    """The format of a weight in 8 or 4 bit, with its shape: `nf4 64 (576, 1536)`."""
    state: Any = getattr(weight, "quant_state", None)
    if state is not None:
        return f"{state.quant_type} {state.blocksize} {tuple(state.shape)}"
    return f"int8 {tuple(weight.shape)}"


def scales(layer: nn.Module, weight: Tensor) -> tuple[Tensor, bool]:
    """The scales of a quantized weight, on any device.

    Args:
        layer: The layer of bitsandbytes that has the weight.
        weight: The weight, in 8 or 4 bit.

    Returns:
        The scales, one for each row or block, float32; and whether they are the largest magnitudes, which are the same
        on every device, and not packed themselves.
    """
    state: Any = getattr(weight, "quant_state", None)
    if state is not None:
        return _scales_of_4bit(state), not state.nested
    return _scales_of_8bit(layer, weight).float(), True


def kept_scales(layer: nn.Module, weight: Tensor) -> list[Tensor]:
    """The tensors in which the scales of a quantized weight are kept, with the values of its numbers. Arguments as in
    `scales`."""
    state: Any = getattr(weight, "quant_state", None)
    if state is None:
        return [_scales_of_8bit(layer, weight)]
    packed = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    return [torch.as_tensor(values) for values in (state.absmax, state.code, *packed)]


def _scales_of_8bit(layer: nn.Module, weight: Tensor) -> Tensor:
    """The largest magnitude of each row, (out,). The first forward pass moves them from the weight to the layer."""
    owner: Any = weight if getattr(weight, "SCB", None) is not None else vars(layer)["state"]
    return torch.as_tensor(owner.SCB)


def _scales_of_4bit(state: Any) -> Tensor:
    """The largest magnitude of each block, (blocks,), float32. state: see `_of_4bit`."""
    if not state.nested:
        return torch.as_tensor(state.absmax).float()
    return torch.as_tensor(dequantize_blockwise(state.absmax, state.state2)).add_(state.offset)


def _dequantized_4bit(
    weight: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """bitsandbytes' `dequantize_4bit`: a weight of this shape and dtype."""
    y = torch.empty(len(absmax) * blocksize, dtype=torch.float32 if dtype == torch.float16 else dtype)
    _fill_from_4bit(y, weight, absmax.float(), get_4bit_type(quant_type, device="cpu"))
    return y[: math.prod(shape)].view(*shape).to(dtype)


def _quantized_8bit(weight: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """bitsandbytes' `int8_vectorwise_quant`: the numbers, the largest magnitude of each row, and columns of outliers.

    weight: (rows, in), any dtype. A column with a magnitude of the threshold or more becomes 0, and such magnitudes are
    not counted; 0: there is none.
    """
    columns = None
    if threshold:
        outliers = weight.abs() >= threshold
        columns, weight = outliers.any(0).nonzero().view(-1), weight.masked_fill(outliers, 0)
    parts = torch.split(weight, max(1, _AT_ONCE // max(1, weight.shape[1])))
    numbers, most = _joined(fused_ops(part).quantize_8bit(part) for part in map(Tensor.float, parts))
    if columns is not None and len(weight) > 1:
        numbers[:, columns] = 0
    return numbers, most, columns


def _quantized_4bit(
    weight: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    """bitsandbytes' `quantize_4bit`: two numbers a byte, (bytes, 1), and the largest magnitude of each block."""
    code = get_4bit_type(quant_type, device="cpu")
    values, order = code.sort()
    count = weight.numel()
    whole = functional.pad(weight.reshape(-1), (0, -count % blocksize)) if count % blocksize else weight
    blocks = whole.reshape(-1, blocksize)
    bounds = (values[:-1] + values[1:]) / 2
    parts, numbered = torch.split(blocks, _AT_ONCE // blocksize), order.to(torch.uint8)
    numbers, most = _joined(fused_ops(part).quantize_4bit(part, bounds, numbered) for part in map(Tensor.float, parts))
    return numbers[: (count + 1) // 2].view(quant_storage)[:, None], most


def _joined(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    numbers, most = zip(*parts, strict=True)
    return torch.cat(numbers), torch.cat(most)


@cache
def use_operations() -> Any:
    """Let bitsandbytes, and so transformers and PEFT, quantize and dequantize on the CPU by compiled operations.

    The results are the same, but for the last block of a weight where it is incomplete, which may be rounded otherwise;
    and bitsandbytes dequantizes 4-bit rows that end within a block with wrong scales.
    What is returned holds the operations.
    """
    kernels = {
        "int8_vectorwise_quant": _quantized_8bit, "quantize_4bit": _quantized_4bit, "dequantize_4bit": _dequantized_4bit
    }  # fmt: skip
    operations: Any = torch.library.Library("bitsandbytes", "IMPL")  # type: ignore[no-untyped-call]
    for name, kernel in kernels.items():
        operations.impl(name, kernel, "CPU", allow_override=True)
    return operations


def cast_dense_weights(model: Any, dtype: torch.dtype) -> None:
    """Give the weights of a model that are not quantized a dtype, but for those that transformers keeps in float32:
    where files hold a quantized base, it leaves all of them in the dtype of the files."""
    kept = upstream.kept_dtypes(model, dtype)
    for name, weight in model.named_parameters():
        if type(weight) is nn.Parameter and weight.is_floating_point():
            weight.data = weight.data.to(next((kept[part] for part in kept if part in name), dtype))


def dequantize_in_use(model: nn.Module) -> None:
    """Give the quantized layers of a model that are on a CPU the classes of this module. Their weights stay as they
    are."""
    layers: list[Any] = [one for one in model.modules() if type(one) in (Linear8bitLt, Linear4bit)]
    for layer in layers:
        if layer.weight.device.type == "cpu" and getattr(layer.weight, "bnb_quantized", False):
            layer.__class__ = Dequantized4bit
        elif layer.weight.device.type == "cpu" and isinstance(layer, Linear8bitLt) and not layer.state.has_fp16_weights:
            layer.__class__ = Dequantized8bit
