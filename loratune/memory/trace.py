"""One training step on tensors without data: which bytes live at once."""

import copy
import weakref
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from loratune.kernels import next_token_loss
from loratune.memory.held import as_held, base_dtype

MMAPPED = 32 << 20
"""From this size on, glibc gives a freed block back to the system at once; smaller ones stay with the process. This is
DEFAULT_MMAP_THRESHOLD_MAX of mallopt(3) on 64 bit, which its dynamic threshold has reached after a step."""
LONGEST = 5_000
"""Operations of a forward from which on rows are traced shortened, where a layer goes through them token by token."""
PROBED = 16
"""Tokens of the shortened rows, and of rows twice as long."""

Bytes = tuple[int, int, int]
"""Of all tensors, of those below `MMAPPED`, of the others; each the most at a time, so they need not add up."""


@dataclass(frozen=True)
class Step:
    """What is run.

    rows: (length, learnt tokens); dtype: of the frozen base, None: as it lies; checkpointed: activations are computed
    again in the backward; accumulated: there are gradients of earlier steps.
    """

    rows: tuple[tuple[int, int], ...]
    dtype: torch.dtype | None
    device: torch.device
    checkpointed: bool = False
    accumulated: bool = False

    @property
    def length(self) -> int:
        """Of the longest row, to which the others are padded."""
        return max(length for length, _ in self.rows)

    def shortened(self, length: int) -> "Step":
        """With rows of at most `length` tokens, in proportion."""
        rows = [(-(-has * length // self.length), -(-learnt * length // self.length)) for has, learnt in self.rows]
        return replace(self, rows=tuple(rows))


@dataclass(frozen=True)
class Traced:
    """Bytes beside weights and earlier gradients.

    kept: by the forward for the backward; phases: the most of the forward, of the loss with its backward, and of the
    layers' backward.
    """

    kept: Bytes
    phases: tuple[Bytes, ...]

    def peak(self, device: torch.device) -> int:
        """The most that is held at once. Where small blocks are not given back, their most meets that of large ones."""
        if device.type != "cpu":
            return max(most for most, _, _ in self.phases)
        return max(small for _, small, _ in self.phases) + max(large for _, _, large in self.phases)

    def extended(self, less: "Traced", times: float) -> "Traced":
        """With `times` as many more layers, or tokens, as this has more than `less`.

        Each number lies on a line. A most grows no less than what is kept: where it lay in one of the first layers, it
        may lie in the last of a deeper model.
        """
        growth = [now - before for now, before in zip(self.kept, less.kept, strict=True)]
        kept = [now + times * more for now, more in zip(self.kept, growth, strict=True)]
        phases = [
            [now + times * max(more, now - before) for now, before, more in zip(*pair, growth, strict=True)]
            for pair in zip(self.phases, less.phases, strict=True)
        ]
        return Traced(_bytes(kept), tuple(map(_bytes, phases)))


def _bytes(values: Sequence[float]) -> Bytes:
    most, small, large = map(int, values)
    return most, small, large


def run(model: nn.Module, step: Step) -> Traced:
    """Forward, loss and backward of a model that `unweighted` made. Raises whatever its code raises without data.

    Where the operations grow with the rows, and beyond `LONGEST`, shorter rows tell what long ones take.
    """
    if step.length > 2 * PROBED and _operations(model, step) > LONGEST:
        less, more = (_traced(model, step.shortened(length)) for length in (PROBED, 2 * PROBED))
        return more.extended(less, step.length / PROBED - 2)
    return _traced(model, step)


def _traced(model: nn.Module, step: Step) -> Traced:
    mask, labels = _batch(step)
    watch = _Watch(model)
    with _mode(model) as mode, watch:
        logits = model(input_ids=mode.from_tensor(mask), attention_mask=mask, use_cache=False).logits
        kept = watch.without(logits)
        watch.turn()
        logits.register_hook(lambda _: watch.turn())
        loss, _ = next_token_loss(logits, labels)
        del logits
        loss.backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        if not step.accumulated:
            parameter.grad = None
    return Traced(kept, (*watch.phases, watch.most))


def _operations(model: nn.Module, step: Step) -> float:
    """How many a forward would take, if each token takes as many; 0 where the length makes no difference."""
    counts = []
    for length in (PROBED, 2 * PROBED):
        mask, _ = _batch(step.shortened(length))
        watch = _Watch(model)
        with _mode(model) as mode, watch, torch.no_grad():
            model(input_ids=mode.from_tensor(mask), attention_mask=mask, use_cache=False)
        counts.append(watch.operations)
    return (counts[1] - counts[0]) * step.length / PROBED


def _mode(model: nn.Module) -> FakeTensorMode:
    return next(tensor.fake_mode for tensor in model.parameters() if isinstance(tensor, FakeTensor))


def _batch(step: Step) -> tuple[Tensor, Tensor]:
    """Attention mask and labels with data, so that code which decides by them decides as in training."""
    mask = torch.zeros(len(step.rows), step.length, dtype=torch.long, device=step.device)
    labels = torch.full_like(mask, -100)
    for number, (length, learnt) in enumerate(step.rows):
        mask[number, :length] = 1
        labels[number, length - learnt : length] = 1
    return mask, labels


def unweighted(model: nn.Module, step: Step, saving: Set[str], dropped: Set[nn.Module]) -> Any:
    """A copy of a model whose tensors have shape and dtype and no data, ready to train.

    saving: names of the linear layers that keep their input for the backward, as those in 8 bit do; dropped: modules
    that are left out.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def empty(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=step.device)

    parameters = as_held(model, step.dtype)
    memo: dict[int, Any] = {id(module): nn.Identity() for module in dropped}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit | Linear8bitLt) or name in saving:
            with mode:
                memo[id(module)] = _dense(module, base_dtype(parameters), step.device, saves=name in saving)
    away = {part for module in dropped for part in module.modules()}
    stays = {id(one) for part in model.modules() if part not in away for one in part.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in stays:
            continue
        memo[id(parameter)] = nn.Parameter(empty(parameters[name]), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = empty(buffer)
    made: Any = copy.deepcopy(model, memo).train()
    if step.checkpointed:
        made.activation_checkpointing_enable({"use_reentrant": False})
    for parameter in made.parameters():
        parameter.grad = empty(parameter) if step.accumulated and parameter.requires_grad else None
    return made


def _dense(module: Any, dtype: torch.dtype, device: torch.device, *, saves: bool) -> nn.Linear:
    """What computes in the place of a quantized layer, or of one that would be quantized."""
    inputs, outputs = module.weight.shape if isinstance(module, Conv1D) else (module.in_features, module.out_features)
    kind = _Saving if saves else nn.Linear
    return kind(inputs, outputs, module.bias is not None, device, dtype).requires_grad_(False)


class _Kept(torch.autograd.Function):
    """A product that keeps its input, which bitsandbytes' MatMul8bitLt does though the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.kept = given, weight
        return functional.linear(given, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ ctx.kept[1], None, None


class _Saving(nn.Linear):
    """A linear layer in 8 bit, as far as its activations go."""

    def forward(self, input: Tensor) -> Tensor:
        return _Kept.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call,no-any-return]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations make, from birth to end.

    now: what lives; most: the most since the last turn; phases: those between earlier turns; operations: how many there
    were. Operations on tensors with data are carried out.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: Bytes = (0, 0, 0)
        self.most: Bytes = (0, 0, 0)
        self.phases: list[Bytes] = []
        self.operations = 0
        known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def without(self, tensor: Tensor) -> Bytes:
        """What lives beside a tensor."""
        return _changed(self.now, -tensor.untyped_storage().nbytes())

    def turn(self) -> None:
        """A phase is over."""
        self.phases.append(self.most)
        self.most = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if given and not any(isinstance(tensor, FakeTensor) for tensor in given):
            with unset_fake_temporarily():
                made = func(*args, **(kwargs or {}))
        else:
            if func is torch.ops.aten.index.Tensor:
                args = (args[0], _positions(args[1]))
            made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._add(size)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._add(-size)

    def _add(self, size: int) -> None:
        self.now = _changed(self.now, size)
        self.most = _bytes([max(pair) for pair in zip(self.most, self.now, strict=True)])


def _changed(held: Bytes, size: int) -> Bytes:
    most, small, large = held
    return (most + size, small + size, large) if abs(size) < MMAPPED else (most + size, small, large + size)


def _positions(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Masks that have data as the places that they choose: how many these are decides a shape."""
    result: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
            result.append(index)
        else:
            with unset_fake_temporarily():
                result += index.nonzero().unbind(1)
    return result
