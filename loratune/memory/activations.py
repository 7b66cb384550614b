"""Runs one training step on fake tensors, which have no data, to find the most bytes that are allocated at once.

The step runs on a copy of the model with the modules that training will use. `kernels.accelerated` accelerates its
layers, each compared alone; a placeholder computes for each quantized layer.
"""

import copy
import hashlib
import logging
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers.pytorch_utils import Conv1D

from loratune import kernels
from loratune.kernels import Adapted
from loratune.kernels.row_angles import has_other_hooks
from loratune.kernels.upstream import (
    FAKE_TENSOR_LOG,
    FakeTensorMode,
    TorchDispatchMode,
    attn_implementation,
    is_fake,
    storage_id,
    tree_leaves,
)

_log = logging.getLogger(__name__)

OPERATIONS_PER_MODULE, MIN_OPERATIONS = 200, 10_000
"""A step of more operations than this, for each module of the model, goes through its rows token by token, and shorter
rows are traced instead. The limit is never below MIN_OPERATIONS."""
MAX_ELEMENTS, MAX_TOKENS = 1 << 26, 1 << 22
"""Shorter rows are traced as well where a tensor with data, such as a mask, would have more elements than this, or a
batch more tokens."""
SHORT_LENGTHS = (512, 16)
"""Tokens of shorter rows: steps with one, two and three times as many are traced; for the second, without limits."""


@dataclass(frozen=True)
class TracedStep:
    """The step that is traced.

    Attributes:
        rows: (length, supervised tokens) of each row of the batch.
        device: Where it will run.
        packed: Whether the rows are packed; otherwise all are padded to the longest.
        checkpointed: Whether activations are recomputed in the backward pass.
        accumulated: Whether gradients of earlier steps are held.
        quantized: Sorted names of the modules that are quantized, or would be.
        keeps_input: Whether these keep their inputs for the backward pass.
    """

    rows: tuple[tuple[int, int], ...]
    device: torch.device
    packed: bool = False
    checkpointed: bool = False
    accumulated: bool = False
    quantized: tuple[str, ...] = ()
    keeps_input: bool = False

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(length for length, _ in self.rows)

    @property
    def tokens(self) -> int:
        """Tokens of the batch, with its padding."""
        return sum(length for length, _ in self.rows) if self.packed else len(self.rows) * self.length

    def batch(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Labels, and the inputs of the model. Both have data, so code that depends on it runs as in training."""
        positions = [torch.arange(length, device=self.device) for length, _ in self.rows]
        labels = [
            torch.where(row >= len(row) - count, 1, -100) for row, (_, count) in zip(positions, self.rows, strict=True)
        ]
        if self.packed:
            flat = torch.cat(positions)[None]
            return torch.cat(labels)[None], {"input_ids": torch.ones_like(flat), "position_ids": flat}
        mask = pad_sequence([torch.ones_like(row) for row in positions], batch_first=True)
        return pad_sequence(labels, batch_first=True, padding_value=-100), {"input_ids": mask, "attention_mask": mask}

    def shortened(self, length: int) -> "TracedStep":
        """The same step with shorter rows, the longest of `length` tokens and the others in proportion."""
        rows = [(-(-row * length // self.length), -(-labels * length // self.length)) for row, labels in self.rows]
        return replace(self, rows=tuple(rows))


class _TooLong(Exception):
    """Tracing the rows in their full length would take too long, or too much memory."""


def trace(model: Any, step: TracedStep, reader: Callable[[nn.Module], Adapted | None]) -> tuple[int, int] | None:
    """Trace one training step.

    Args:
        model: A `PeftModel` on any device; it stays as it is.
        step: The step. Where its rows are too long, shorter ones are traced, and the result is extrapolated.
        reader: Function that returns the linear layer and LoRA of a module; see `kernels.accelerate`.

    Returns:
        Bytes that the forward pass keeps for the backward pass, and the most that is allocated at once, gradients
        included; None if the code of the model does not run without data. A step is traced once per process: the
        trials of a sweep that differ in their learning rate only take the result of the first.
    """
    key = _key(model, step)
    if any(map(has_other_hooks, model.modules())) or key not in _TRACED:  # a hook may do anything
        was_disabled, FAKE_TENSOR_LOG.disabled = FAKE_TENSOR_LOG.disabled, True  # of operations that fail without data
        try:
            _TRACED[key] = _trace_or_extrapolate(model, step, reader)
        except Exception:  # Code that reads data fails without it, in as many ways as there are models.
            _log.debug("activations are estimated by a formula: the model does not run without data", exc_info=True)
            _TRACED[key] = None
        finally:
            FAKE_TENSOR_LOG.disabled = was_disabled
    return _TRACED[key]


_TRACED: dict[str, tuple[int, int] | None] = {}
"""The results of `trace` in this process."""


def _key(model: Any, step: TracedStep) -> str:
    """SHA-256 of what determines the allocations of a step: modules, tensors, configuration, compiled code, step."""
    base = model.get_base_model()
    tensors = [(name, one.shape, one.dtype, one.requires_grad) for name, one in model.named_parameters()]
    hooks = [name for name, module in model.named_modules() if has_other_hooks(module)]
    code = kernels.variant(base.get_input_embeddings().weight), attn_implementation(base)
    parts = (model, base.config.to_json_string(use_diff=False), tensors, hooks, code, step)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _trace_or_extrapolate(
    model: Any, step: TracedStep, reader: Callable[[nn.Module], Adapted | None]
) -> tuple[int, int]:
    """See `trace`. Raises whatever the model raises without data."""
    fake = _fake_copy(model, step)
    with kernels.accelerated(fake, reader):
        with suppress(_TooLong):
            return _trace(fake, step)
        with suppress(_TooLong):
            return _extrapolate(fake, step, SHORT_LENGTHS[0])
        return _extrapolate(fake, step, SHORT_LENGTHS[1], limited=False)


def _extrapolate(fake: Any, step: TracedStep, unit: int, *, limited: bool = True) -> tuple[int, int]:
    """The parabola through steps of three shorter lengths, at the length of the rows. Raises _TooLong."""
    if step.length <= 3 * unit and limited:
        raise _TooLong
    x = step.length / unit
    weights = ((x - 2) * (x - 3) / 2, -(x - 1) * (x - 3), (x - 1) * (x - 2) / 2)
    points = [_trace(fake, step.shortened(times * unit), limited=limited) for times in (1, 2, 3)]
    activations, peak = (
        round(sum(map(float.__mul__, weights, map(float, values)))) for values in zip(*points, strict=True)
    )
    return activations, max(activations, peak)


def _trace(fake: Any, step: TracedStep, *, limited: bool = True) -> tuple[int, int]:
    """Forward pass, loss and backward pass. Raises _TooLong, and whatever the model raises without data."""
    if step.tokens > MAX_TOKENS:
        raise _TooLong
    labels, batch = step.batch()
    for parameter in fake.parameters():
        has_gradient = step.accumulated and parameter.requires_grad
        parameter.grad = parameter.detach().clone() if has_gradient else None
    tracker = AllocationTracker(fake, limited=limited)
    with tracker:
        kernels.set_loss_targets(fake, labels)
        logits = fake(**batch, use_cache=False).logits
        activations = tracker.current - logits.untyped_storage().nbytes()
        loss, _ = kernels.next_token_loss(fake, logits, labels)
        del logits
        loss.backward()  # type: ignore[no-untyped-call]
    return activations, tracker.peak


def _fake_copy(model: Any, step: TracedStep) -> Any:
    """A copy of a model that is ready to train, and whose tensors are fake."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def empty(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=step.device)

    memo: dict[int, Any] = {}
    dtype = model.get_base_model().dtype
    for name in step.quantized:
        module = model.get_submodule(name)
        with mode:
            memo[id(module)] = _Quantized(module, dtype, step.device, keeps_input=step.keeps_input)
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(empty(parameter), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = empty(buffer)
    fake = copy.deepcopy(model, memo).train()
    if step.checkpointed:
        fake.activation_checkpointing_enable({"use_reentrant": False})
    return fake


def linear_shape(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, quantized or not."""
    return tuple(module.weight.shape) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


class _Quantized(nn.Linear):
    """Computes in place of a linear layer in 8 or 4 bit, with the same activations."""

    def __init__(self, module: Any, dtype: torch.dtype, device: torch.device, *, keeps_input: bool):
        inputs, outputs = linear_shape(module)
        super().__init__(inputs, outputs, module.bias is not None, device, dtype)
        self.requires_grad_(False)
        self.keeps_input = keeps_input

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in). Returns (..., out)."""
        return _QuantizedProduct.apply(input, self.weight, self.bias, self.keeps_input)  # type: ignore[no-untyped-call,no-any-return]


class _QuantizedProduct(torch.autograd.Function):
    """The product with a quantized weight, which is dequantized each time.

    On a GPU, bitsandbytes' MatMul8bitLt keeps its input, although the weight is frozen.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keeps_input: bool) -> Tensor:
        ctx.activations = x if keeps_input else None, weight
        return functional.linear(x, weight.clone(), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0] @ ctx.activations[1].clone(), None, None, None


class AllocationTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations allocate, until these are freed.

    Attributes:
        current: What is allocated now.
        peak: The most that was allocated at once.
    """

    def __init__(self, model: nn.Module, *, limited: bool) -> None:
        """limited: raise _TooLong where tracing takes too much time or memory."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = self._operations = 0
        modules = sum(1 for _ in model.modules())
        self._limited, self._limit = limited, max(MIN_OPERATIONS, OPERATIONS_PER_MODULE * modules)
        tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        self._known = {storage_id(tensor.untyped_storage()) for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._operations += 1
        if self._limited and (self._operations > self._limit or self._is_large(func, args, kwargs or {})):
            raise _TooLong
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _is_large(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether the result of an operation on tensors with data would be too large, which is found without data."""
        if any(isinstance(one, Tensor) and is_fake(one) for one in tree_leaves((args, kwargs))):
            return False
        results: Any = ()
        with suppress(RuntimeError), FakeTensorMode(allow_non_fake_inputs=True):  # some depend on the data
            results = func(*args, **kwargs)
        return any(isinstance(one, Tensor) and one.numel() > MAX_ELEMENTS for one in tree_leaves(results))

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage_id(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.current += size
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size
