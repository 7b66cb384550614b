"""Linear layers with LoRA in the dtype of the base: fewer matrix products, fewer saved tensors, and no float32 copy of
the activations.

`Projection` is used in training, `inference_lora` afterwards.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loratune.kernels import upstream
from loratune.kernels.compiled.fused_ops import fused_ops
from loratune.kernels.layer_sample import StandIn
from loratune.system import environment

_LARGE = 64 << 20
"""Bytes of a joined weight after which the pages of its parts are given back: they are too small for the next one."""


@dataclass(frozen=True)
class Adapted:
    """A frozen linear layer and its LoRA: y = W x + b + scaling * up (down (dropout x)). Hu et al. 2021.

    Attributes:
        layer: The frozen layer.
        down: A of the adapter, (r, in); None where the layer has no adapter.
        up: B of the adapter, (out, r); None where the layer has no adapter.
        scaling: The factor of the adapter's output.
        dropout: The probability of dropout before the adapter.
    """

    layer: nn.Linear
    down: nn.Parameter | None = None
    up: nn.Parameter | None = None
    scaling: float = 1.0
    dropout: float = 0.0


@dataclass
class SavedLora:
    """Tensors for the backward pass of a projection.

    Attributes:
        inner: The output of `down`, (tokens, ranks).
        down: A of all adapters, (parts * ranks, in), see `_parts`.
        ups: B of each adapter, (out, parts * its ranks), multiplied by the scaling.
        masks: The dropout mask of each adapter, (tokens, in), bool, True for kept values; empty without dropout.
    """

    inner: Tensor
    down: Tensor
    ups: Sequence[Tensor]
    masks: Sequence[Tensor]

    def tensors(self) -> list[Tensor]:
        """All tensors, to be saved for the backward pass."""
        return [self.inner, self.down, *self.ups, *self.masks]


class Projection:
    """Layers with the same input as one matrix product.

    Their weights become views of one tensor, so nothing is stored twice. The LoRA output is computed first and the base
    product added to it, so that the larger term is rounded once instead of twice.
    """

    def __init__(self, layers: Sequence[Adapted]):
        parts = [part.layer for part in layers]
        self.weight = parts[0].weight.detach()
        if len(parts) > 1 and (joined := _joined_weight([part.weight.detach() for part in parts])) is not None:
            self.weight = joined
        elif len(parts) > 1:
            self.weight = torch.cat([part.weight.detach() for part in parts])
            for part, rows in zip(parts, torch.split(self.weight, [part.out_features for part in parts]), strict=True):
                part.weight = nn.Parameter(rows, requires_grad=False)
            if self.weight.nbytes >= _LARGE:
                environment.give_back_pages()
        self.bias: Tensor | None = None
        if any(part.bias is not None for part in parts):
            zeros = self.weight.new_zeros
            biases = [zeros(part.out_features) if part.bias is None else part.bias.detach() for part in parts]
            self.bias = torch.cat(biases)
        ends = list(accumulate((part.out_features for part in parts), initial=0))
        self._adapted = [
            (part, slice(*span)) for part, span in zip(layers, pairwise(ends), strict=True) if part.down is not None
        ]
        ranks = accumulate((len(part.down) for part, _ in self._adapted if part.down is not None), initial=0)
        self._ranks = [slice(*span) for span in pairwise(ranks)]

    def parameters(self) -> list[Tensor]:
        """`down` and `up` of each adapter in turn."""
        return [tensor for part, _ in self._adapted for tensor in (part.down, part.up) if tensor is not None]

    def forward(self, x: Tensor, training: bool, parameters: Sequence[Tensor]) -> tuple[Tensor, SavedLora | None]:
        """x: (tokens, in). Returns (tokens, out), and the tensors for `backward`, if there is an adapter."""
        if not self._adapted:
            return functional.linear(x, self.weight, self.bias), None
        saved = self._lora(x, training, parameters)
        bare = x.new_empty if sum(map(len, saved.ups)) == len(self.weight) else x.new_zeros
        y = bare(len(x), len(self.weight)) if self.bias is None else self.bias.repeat(len(x), 1)
        for (_, columns), ranks, up in zip(self._adapted, self._ranks, saved.ups, strict=True):
            inner = _repeated(saved.inner[:, ranks], up.shape[1])
            y[:, columns].addmm_(inner, up.t(), beta=int(self.bias is not None))
        return y.addmm_(x, self.weight.t()), saved

    def saved(self, tensors: Sequence[Tensor]) -> SavedLora | None:
        """The `SavedLora` that `forward` returned, from its tensors."""
        count = len(self._adapted)
        return SavedLora(tensors[0], tensors[1], tensors[2 : 2 + count], tensors[2 + count :]) if count else None

    def _lora(self, x: Tensor, training: bool, parameters: Sequence[Tensor]) -> SavedLora:
        whole = torch.cat(list(parameters[::2]))
        down, count = _parts(whole, x.dtype, 0), len(whole)
        scaled = zip(parameters[1::2], self._adapted, strict=True)
        ups = [_parts(tensor * part.scaling, x.dtype, 1) for tensor, (part, _) in scaled]
        if not (training and any(part.dropout for part, _ in self._adapted)):
            return SavedLora(_summed(x @ down.t(), count), down, ups, [])
        inner, masks = [], []
        for (part, _), ranks in zip(self._adapted, self._ranks, strict=True):
            dropped, mask = upstream.dropout(x, part.dropout)
            inner.append(_summed(dropped @ _of_ranks(down, ranks, count).t(), ranks.stop - ranks.start))
            masks.append(mask)
        return SavedLora(torch.cat(inner, 1), down, ups, masks)

    def backward(
        self, dy: Tensor, x: Tensor | None, saved: SavedLora | None, *, needs_dx: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradients of the input and of the parameters.

        Args:
            dy: The gradient of the output, (tokens, out).
            x: The input, (tokens, in); may be None without an adapter.
            saved: The second result of `forward`.
            needs_dx: Whether the gradient of the input is needed; otherwise it is None.
        """
        if saved is None or x is None:
            return dy @ self.weight if needs_dx else None, []
        parts = zip(self._adapted, self._ranks, saved.ups, strict=True)
        dinners = [_summed(dy[:, columns] @ up, ranks.stop - ranks.start) for (_, columns), ranks, up in parts]
        dinner, dup = torch.cat(dinners, 1), dy.t() @ saved.inner
        ddown = self._down_gradient(dinner, x, saved)
        dx = self._input_gradient(dy, dinner, saved) if needs_dx else None
        gradients = []
        for (part, columns), ranks in zip(self._adapted, self._ranks, strict=True):
            gradients += [ddown[ranks].float(), dup[columns, ranks].float() * part.scaling]
        return dx, gradients

    def _input_gradient(self, dy: Tensor, dinner: Tensor, saved: SavedLora) -> Tensor:
        """The gradient of the input. dinner: the gradient of the output of `down`, (tokens, ranks)."""
        if not saved.masks:
            return (_repeated(dinner, len(saved.down)) @ saved.down).addmm_(dy, self.weight)
        dx = dy.new_zeros(len(dy), saved.down.shape[1])
        for apply_mask, ranks in self._dropouts(saved):
            down = _of_ranks(saved.down, ranks, dinner.shape[1])
            dx += apply_mask(_repeated(dinner[:, ranks], len(down)) @ down)
        return dx.addmm_(dy, self.weight)

    def _down_gradient(self, dinner: Tensor, x: Tensor, saved: SavedLora) -> Tensor:
        """The gradient of every `down`: (ranks, in)."""
        if not saved.masks:
            return dinner.t() @ x
        return torch.cat([dinner[:, ranks].t() @ apply_mask(x) for apply_mask, ranks in self._dropouts(saved)])

    def _dropouts(self, saved: SavedLora) -> Iterator[tuple[Callable[[Tensor], Tensor], slice]]:
        """For each adapter, the dropout that was applied to its input, and its ranks."""
        for (part, _), ranks, mask in zip(self._adapted, self._ranks, saved.masks, strict=True):
            yield partial(_apply_mask, mask, 1 / (1 - part.dropout)), ranks


def _parts(weight: Tensor, dtype: torch.dtype, dim: int) -> Tensor:
    """A float32 weight in a lower dtype: the rounded weight, concatenated along `dim` with the rounding error. With
    rounded A and B alone, gradients would be less accurate than PEFT's; twice the few ranks cost hardly any time."""
    rounded = weight.to(dtype)
    is_whole = dtype.itemsize >= weight.dtype.itemsize
    return rounded if is_whole else torch.cat([rounded, (weight - rounded.to(weight.dtype)).to(dtype)], dim)


def _summed(product: Tensor, ranks: int) -> Tensor:
    """The product with a weight, from the product with its parts, (tokens, parts * ranks)."""
    return product if product.shape[1] == ranks else product[:, :ranks] + product[:, ranks:]


def _repeated(inner: Tensor, columns: int) -> Tensor:
    """`inner` repeated for each part of a weight. inner: (tokens, ranks). Returns (tokens, columns)."""
    return inner if inner.shape[1] == columns else torch.cat([inner, inner], 1)


def _of_ranks(down: Tensor, ranks: slice, count: int) -> Tensor:
    """The parts of one adapter's A. down: (parts * count, in)."""
    return down.view(-1, count, down.shape[1])[:, ranks].flatten(0, 1)


def _joined_weight(weights: Sequence[Tensor]) -> Tensor | None:
    """The tensor of which these weights, (out, in) each, are consecutive views, made by an earlier projection; None if
    they are not."""
    first = weights[0]
    ends = accumulate((weight.numel() for weight in weights), initial=first.storage_offset())
    if not all(
        weight.is_contiguous()
        and upstream.storage_id(weight.untyped_storage()) == upstream.storage_id(first.untyped_storage())
        and (weight.shape[1:], weight.dtype, weight.storage_offset()) == (first.shape[1:], first.dtype, start)
        for weight, start in zip(weights, ends, strict=False)
    ):
        return None
    return first.as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


def _apply_mask(mask: Tensor, scale: float, x: Tensor) -> Tensor:
    return (x * mask).mul_(scale)


def project(x: Tensor, layer: Projection, *, training: bool) -> Tensor:
    """Apply a projection as a differentiable function. x: (..., in). Returns (..., out)."""
    apply: Any = _ProjectionFunction.apply
    result: Tensor = apply(x.reshape(-1, x.shape[-1]), layer, training, *layer.parameters())
    return result.view(*x.shape[:-1], -1)


class _ProjectionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Projection, training: bool, *parameters: Tensor) -> Tensor:
        y, lora = layer.forward(x, training, parameters)
        ctx.layer = layer
        ctx.save_for_backward(*([x, *lora.tensors()] if lora else []))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, *lora = ctx.saved_tensors or (None,)
        dx, gradients = ctx.layer.backward(dy, x, ctx.layer.saved(lora), needs_dx=ctx.needs_input_grad[0])
        return dx, None, None, *gradients


class RowsMixedError(ValueError):
    """A layer does not receive the rows of a batch separately, such as an expert that gets tokens from a router."""


class InferenceLinear(StandIn):
    """y = W x + b + scaling * up (down x), without dropout and gradients: two thin products in the dtype of W.

    Several adapters are concatenated in `down` and `up`. Between the two products, each row of a batch keeps the values
    of its own adapter, and the others are set to zero: with few adapters, this is faster than separate products.

    Other attributes are those of the layer, as in PEFT: Jamba multiplies by `dt_proj.weight` itself.
    """

    def __init__(self, layer: nn.Linear, adapters: Sequence[Adapted], rows: Sequence[int] = (0,)):
        """rows: the index of the adapter of each row of a batch, if there are several adapters."""
        super().__init__(layer)
        self._weight, self._bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        present = [(number, part.down, part.up, part) for number, part in enumerate(adapters)]
        ranks, downs, ups = [], [], []
        for number, down, up, part in present:
            if down is not None and up is not None:
                downs.append(down.detach())
                ups.append(up.detach() * part.scaling)
                ranks += [number] * len(down)
        self._down = torch.cat(downs).to(layer.weight.dtype)
        self._up = torch.cat(ups, 1).to(layer.weight.dtype).t().contiguous()
        self._ops = fused_ops(self._weight)
        self._foreign: Tensor | None = None
        if len(adapters) > 1:
            of_row, of_rank = (torch.tensor(numbers, device=self._down.device) for numbers in (rows, ranks))
            self._foreign = of_row[:, None, None] != of_rank

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in), with several adapters (rows, tokens, in). Returns (..., out).

        Raises:
            RowsMixedError: With several adapters: x has another shape.
        """
        y = functional.linear(x, self._weight, self._bias)
        if self._foreign is None:
            self._ops.add_lora(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), self._down, self._up)
            return y
        if x.dim() != 3 or len(x) != len(self._foreign):
            raise RowsMixedError(f"{tuple(x.shape)} does not begin with the {len(self._foreign)} rows of the batch")
        inner = (x @ self._down.t()).masked_fill_(self._foreign, 0)
        y.view(-1, y.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), self._up)
        return y


Reader = Callable[..., Adapted | None]
"""Function that returns the linear layer and LoRA of a module, or None: DoRA is left to PEFT, and so are quantized
layers without `quantized=True`."""


@dataclass(frozen=True)
class _Replaced:
    """A layer with LoRA, its parent and name, and its replacements with enabled and with disabled adapters."""

    parent: nn.Module
    name: str
    layer: nn.Module
    fast: nn.Module
    bare: nn.Module


class InferenceLayers:
    """Fast inference layers that cost little more than those of the base; made once and used for many answers."""

    def __init__(self, model: Any, *readers: Reader, rows: Sequence[int] = (0,)):
        """Make the layers from the current adapters.

        Args:
            model: A `PeftModel`.
            readers: One for each adapter. Only a single reader may return None for a layer with LoRA.
            rows: The index of the reader for each row of a batch, if there are several.
        """
        self._reader, self._replaced = readers[0], list[_Replaced]()
        base: nn.Module = model.get_base_model()
        for path, module in base.named_modules():
            parts = [part for reader in readers if (part := reader(module)) is not None]
            if len(parts) < len(readers) or parts[0].layer is module:
                continue
            bare = parts[0].layer
            fast = InferenceLinear(bare, parts, rows) if any(part.down is not None for part in parts) else bare
            parent, _, name = path.rpartition(".")
            self._replaced.append(_Replaced(base.get_submodule(parent), name, module, fast, bare))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the layers are in the model, which must run under `torch.inference_mode`. If its adapters are
        disabled, the layers of the base are used."""
        adapted = next((one.layer for one in self._replaced if one.fast is not one.bare), None)
        read = None if adapted is None else self._reader(adapted)
        try:
            for one in self._replaced:
                setattr(one.parent, one.name, one.bare if read is not None and read.down is None else one.fast)
            yield
        finally:
            for one in self._replaced:
                setattr(one.parent, one.name, one.layer)


@contextmanager
def inference_lora(model: Any, *readers: Reader, rows: Sequence[int] = (0,)) -> Iterator[None]:
    """Inside, `InferenceLayers` are in the model."""
    with InferenceLayers(model, *readers, rows=rows).applied():
        yield
