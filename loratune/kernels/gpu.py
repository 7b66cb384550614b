"""Acceleration on a GPU: LoRA in the dtype of the base, norms without float32 copies, and attention row by row.

The other layers are accelerated by `compile_layers` and by Liger's kernels, if the config asks for them.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.utils import is_liger_kernel_available

from loratune.codes import Code
from loratune.errors import ModelError, Problem
from loratune.kernels import replacements, rowwise, upstream
from loratune.kernels.layout import PerBatch, descendants_end
from loratune.kernels.lora_linear import Adapted, Reader
from loratune.kernels.masks import HELD, check_known
from loratune.kernels.parity_check import ParityCheck
from loratune.kernels.recognition import UNKNOWN, Recognized
from loratune.kernels.replacements import restore, with_forward
from loratune.kernels.transfer import send

Layers = Iterable[tuple[str, nn.Module]]
"""Path and module of each layer that is replaced."""
VARLEN = "loratune-varlen"
"""The name under which attention row by row is registered."""
NORMS = {"norm": 0.0, "norm that adds 1": 1.0}
"""Form of a norm → what it adds to its weight."""
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
"""What lets keys have fewer heads than queries. The kernel of torch 2.11 and 2.12 can do it without being asked."""
BLOCK = 128
"""Queries and keys of a block of a `BlockMask`."""
LIGER = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}
"""The Liger kernels that are used; the loss is computed by `LossHead`."""


def row_bounds(positions: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """The boundaries of the rows of a batch, and the tokens of the longest.

    Args:
        positions: (tokens,), 0 where a row begins, on the CPU.
        device: Of the boundaries.

    Returns:
        (rows + 1,), int32, from 0 to the number of tokens; and the tokens.
    """
    begins = torch.nonzero(positions[1:] == 0)[:, 0] + 1
    bounds = torch.cat([begins.new_zeros(1), begins, begins.new_full((1,), len(positions))])
    return send(bounds.to(torch.int32), device), int(bounds.diff().max())


class RowAttention:
    """An attention function of transformers for a GPU, by torch's kernel for rows of unequal length.

    Batches must have no cache, and no padding except on the right.

    Attributes:
        windowed: Whether a layer was called with a window.
    """

    def __init__(self) -> None:
        self.windowed = False
        self._bounds = PerBatch(row_bounds)

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
        if any(one is not None for one in unsupported) or value.shape[-1] != query.shape[-1]:
            raise ValueError("the kernel has no caps, sinks, dropout, masks, or values of another size than keys")
        window = options.get("sliding_window")
        self.windowed |= window is not None
        return self.attend(query, key, value, options["position_ids"], window, options.get("scaling")), None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, window: int | None, scale: float | None
    ) -> Tensor:
        """The result. positions: (1 or rows, length); window: the most tokens that a token attends to; scale: the
        factor of the scores, None for 1 / sqrt(size). Other arguments as for a call."""
        rows, heads, length, size = query.shape
        bounds, longest = self._bounds.get(positions, torch.Size((rows, length)), query.device)
        queries, keys, values = (x.transpose(1, 2).reshape(rows * length, -1, size) for x in (query, key, value))
        result: Any = varlen_attn(
            queries, keys, values, bounds, bounds, longest, longest,
            scale=scale, window_size=(-1 if window is None else window - 1, 0), **GROUPED,
        )  # fmt: skip
        attended: Tensor = result.view(rows, length, heads, size)
        return attended


def tree_mask(positions: Tensor, key: tuple[int | None, torch.device]) -> BlockMask:
    """What each token of packed rows or of a tree of rows attends to, for FlexAttention.

    Blocks are found on the CPU, and no mask of all pairs of tokens is made.

    Args:
        positions: (tokens,) on the CPU, see `Layout.of`.
        key: The most tokens that a token attends to, None for no limit; and the device of the mask.
    """
    window, device = key
    at, ends = positions.numpy(), descendants_end(positions.numpy())
    starts = np.arange(0, len(at), BLOCK)
    lasts = np.minimum(starts + BLOCK, len(at)) - 1
    low, high = np.minimum.reduceat(at, starts), np.maximum.reduceat(at, starts)
    first, last = np.minimum.reduceat(ends, starts), np.maximum.reduceat(ends, starts)
    reach = window or len(at) + int(at.max()) + 1
    seen = np.tri(len(starts), dtype=bool) & (last > starts[:, None]) & (low[:, None] - high < reach)
    whole = np.tri(len(starts), k=-1, dtype=bool) & (first > lasts[:, None]) & (high[:, None] - low < reach)

    def sent(values: NDArray[Any]) -> Tensor:
        return send(torch.from_numpy(values.astype(np.int32)), device)

    def listed(blocks: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        """For each block of queries, the number of blocks of keys; and these, then the others."""
        return sent(blocks.sum(1)[None, None]), sent(np.argsort(~blocks, axis=1, kind="stable")[None, None])

    (some, some_blocks), (all_, all_blocks), ends_of, at_of = listed(seen & ~whole), listed(whole), sent(ends), sent(at)

    def attends(_row: Tensor, _head: Tensor, query: Tensor, token: Tensor) -> Tensor:
        visible = (token <= query) & (query < ends_of[token])
        return visible if window is None else visible & (at_of[query] - at_of[token] < window)

    lengths = len(at), len(at)
    return BlockMask.from_kv_blocks(
        some, some_blocks, all_, all_blocks, BLOCK_SIZE=BLOCK, mask_mod=attends, seq_lengths=lengths
    )


class TreeAttention(RowAttention):
    """The same by FlexAttention, also for trees of rows (`Layout.of`)."""

    def __init__(self) -> None:
        super().__init__()
        self._masks = PerBatch(tree_mask)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, window: int | None, scale: float | None
    ) -> Tensor:
        """See `RowAttention`."""
        rows, heads, length, _ = query.shape
        mask = self._masks.get(positions, torch.Size((rows, length)), (window, query.device))
        queries, keys, values = (
            x.transpose(0, 1).reshape(1, x.shape[1], rows * length, -1) for x in (query, key, value)
        )
        attend = _flex_attention() if query.device.type != "cpu" else flex_attention
        result: Any = attend(queries, keys, values, block_mask=mask, scale=scale, enable_gqa=heads != key.shape[1])
        attended: Tensor = result[0].reshape(heads, rows, length, -1).permute(1, 2, 0, 3)
        return attended


@cache
def _flex_attention() -> Any:
    """The compiled function; without compilation, all scores would be in memory."""
    return torch.compile(flex_attention, dynamic=True)


def quantized_linear(module: nn.Module, part: Adapted, down: Tensor, up: Tensor) -> nn.Module:
    """A quantized linear layer with LoRA that computes in the dtype of its input, which PEFT casts to float32."""

    def forward(x: Tensor, training: bool) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        inner = functional.linear(functional.dropout(x, part.dropout, training), down.to(x.dtype))
        y: Tensor = part.layer(x)
        return y + functional.linear(inner, (up * part.scaling).to(x.dtype)).to(y.dtype)

    return with_forward(module, forward)


def fast_norm(module: nn.Module, epsilon: float) -> nn.Module:
    """An RMS norm by torch's kernel, which keeps nothing in float32 but a number for each token."""
    weight = module.get_parameter("weight")

    def forward(x: Tensor, _training: bool) -> Tensor:
        """x: (..., size). Returns the same shape. In some families, activations have another dtype than the weights."""
        result = module(x) if x.dtype != weight.dtype else functional.rms_norm(x, weight.shape, weight, epsilon)
        return result

    return with_forward(module, forward)


def _replace_norms(recognized: Mapping[nn.Module, Recognized], base: Any) -> Iterator[tuple[str, nn.Module]]:
    for name, module in list(base.named_modules()):
        added = NORMS.get(recognized.get(module, UNKNOWN).form)
        fast = None if added is None else replacements.replace_norm(module, added)
        if fast is not None:
            yield name, module
            base.set_submodule(name, fast if added else fast_norm(module, fast.epsilon))


def replace(
    base: Any,
    reader: Reader,
    replaced: list[tuple[str, nn.Module]],
    recognized: Mapping[nn.Module, Recognized],
    *,
    trees: bool = False,
) -> tuple[list[Callable[[Any], Layers]], dict[str, str]]:
    """Replace layers on a GPU. Arguments and results as in `acceleration._replace`. trees: see `accelerate`."""
    check, fallbacks = ParityCheck(base), dict[str, str]()
    steps: list[Callable[[Any], Layers]] = []
    for kind, step in (("LoRA", partial(_replace_linear, reader)), ("norms", partial(_replace_norms, recognized))):
        found = [*step(base)]
        if found and (check.passes() or (kind == "LoRA" and not check.runs)):
            steps.append(step)
            replaced += found
        elif found or kind == "LoRA":
            restore(base, found)
            fallbacks[kind] = "the model does not compute the same" if found else "no layer is a linear one with LoRA"
    if (own := upstream.attn_implementation(base)) not in rowwise.STOCK:
        return steps, fallbacks | {"attention": f"model.attn_implementation is {own}"}
    name, function = (rowwise.UNMASKED, TreeAttention()) if trees else (VARLEN, RowAttention())
    if _attends_by_rows(base, name, function):
        return [*steps, partial(_register_attention, name, function)], fallbacks
    return steps, fallbacks | {"attention": "by rows the model does not compute the same, or drops out weights"}


def _replace_linear(reader: Reader, base: Any) -> Iterator[tuple[str, nn.Module]]:
    for name, module in list(base.named_modules()):
        part = reader(module, quantized=True)
        if part is not None and part.down is not None and part.up is not None:
            fast = replacements.replace_linear(module, reader)
            yield name, module
            base.set_submodule(name, fast or quantized_linear(module, part, part.down, part.up))


def _register_attention(name: str, function: RowAttention, base: Any) -> Layers:
    """Without a mask function of this name, transformers makes no masks; it would wait for the GPU for each."""
    AttentionInterface.register(name, function)
    base.set_attn_implementation(name)
    return ()


def _attends_by_rows(base: Any, name: str, function: RowAttention) -> bool:
    """Make the model attend row by row, if it then computes the same."""
    if any(getattr(module, "attention_dropout", 0) for module in base.modules()):
        return False
    own, check = upstream.attn_implementation(base), ParityCheck(base)
    _register_attention(name, function, base)
    if check.passes() and (function.windowed or not has_windows(base.config)):
        return True
    base.set_attn_implementation(own)
    return False


def has_windows(config: Any) -> bool:
    """Whether a configuration limits the attention of some layers by a window or by chunks."""
    settings = config.get_text_config().to_dict()
    return bool(settings.get("sliding_window") or settings.get("attention_chunk_size"))


def uses_liger(setting: bool | str, model: Any) -> tuple[bool, list[str]]:
    """Whether Liger's kernels are used in training: if the model computes the same with them, forward and backward.

    Their speed is not measured: on the few tokens of the check it would be that of launching kernels, and whole batches
    would delay the first step. With `auto`, that their package is installed is taken as the wish to use them.

    Args:
        setting: `model.use_liger_kernel`.
        model: A `PeftModel`, which is not changed.

    Returns:
        Whether they are used, and a line for the user where the check decides.

    Raises:
        ModelError: They are required, but Liger does not support the family.
    """
    base, is_auto = model.get_base_model(), setting == "auto"
    if setting is False or (is_auto and not (base.device.type != "cpu" and is_liger_kernel_available())):
        return False, []
    check = ParityCheck(base)
    try:
        with _undone(base):
            use_liger(model)
            passes = check.passes() if check.runs else not is_auto
    except ModelError:
        if not is_auto:
            raise
        return False, []
    if not passes:
        return False, ["model.use_liger_kernel: off, as with Liger's kernels the model does not compute the same"]
    lines = ["auto: model.use_liger_kernel is true (liger-kernel is installed, and the model computes the same)"]
    return True, lines if is_auto else []


@contextmanager
def _undone(base: Any) -> Iterator[None]:
    """Afterwards, the attributes of all modules, and the functions in the files of their classes, are those of before:
    Liger changes both."""
    files = {type(module).__module__: sys.modules[type(module).__module__] for module in base.modules()}
    before = [(owner, dict(vars(owner))) for owner in (*base.modules(), *files.values())]
    try:
        yield
    finally:
        for owner, values in before:
            for name in vars(owner).keys() - values.keys():
                delattr(owner, name)
            vars(owner).update(values)


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
