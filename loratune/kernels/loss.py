"""The loss over supervised positions, without keeping their logits, and norms of gradients."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from loratune.kernels.compiled.fused_ops import fused_ops
from loratune.kernels.loss_targets import LossTargets
from loratune.kernels.parity_check import MIN_TOLERANCE, evaluating, relative_rms
from loratune.kernels.predictions import HeadDivergence, TeacherTargets, divergence
from loratune.kernels.transfer import send
from loratune.kernels.upstream import is_fake

_log = logging.getLogger(__name__)

CHUNK = 512
"""Positions whose logits are in memory at once."""
_TRIED = 4
"""Labels of the check of the loss: the time of their products is that of reading the weights."""
_LARGEST = 200.0
"""The largest test value for the output of the output layer."""


def next_token_loss(model: Any, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every supervised token given the tokens before it.

    Position t is scored against label t + 1. Only supervised positions are converted to float32, so the cost depends on
    their number and not on the size of the padded batch.

    Args:
        model: A `PeftModel`, or a model of transformers.
        logits: Its logits, (rows, length, vocabulary), any float dtype. They are ignored if a `LossHead` computed the
            loss.
        labels: (rows, length), int64, -100 at positions without supervision.
        weights: (rows, length), the weight of each label; None: 1. A `LossHead` has been given the same.

    Returns:
        The weighted sum in nats, a float32 scalar; and the sum of the weights of the supervised tokens, on the CPU.
    """
    wanted = LossTargets.of(labels, None, None, weights)
    count = torch.tensor(len(wanted.targets)) if wanted.counts is None else wanted.counts.sum()
    if (losses := _taken(model)) is not None:
        return losses.view(()), count
    if wanted.counts is None:
        return _of_logits(logits, labels, wanted, "sum"), count
    return _of_logits(logits, labels, wanted) @ send(wanted.counts, logits.device), count


def _of_logits(logits: Tensor, labels: Tensor, wanted: LossTargets, reduction: str = "none") -> Tensor:
    """The loss of each supervised label, (labels,) float32, or their sum. Raises ValueError: the shapes differ."""
    if logits.shape[:2] != labels.shape:
        raise ValueError(f"{tuple(labels.shape)} labels for {tuple(logits.shape[:2])} states")
    scores = logits.flatten(0, 1).index_select(0, send(wanted.numbers, logits.device)).float()
    return functional.cross_entropy(scores, send(wanted.targets, logits.device), reduction=reduction)


def row_sums(model: Any, logits: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    """The sums of `next_token_loss` per row, differentiable.

    Args:
        model, logits: As in `next_token_loss`.
        labels: As in `row_numbers`, -100 at positions without supervision and at the first of each row.
        lengths: As in `row_numbers`.

    Returns:
        (rows,), float64, in nats.
    """
    if (losses := _taken(model)) is not None:
        return losses.view(len(lengths))
    wanted = LossTargets.of(labels, None, lengths, None)
    losses = _of_logits(logits, labels, wanted)
    assert wanted.rows is not None
    rows = send(wanted.rows, logits.device)
    return losses.new_zeros(len(lengths), dtype=torch.float64).index_add(0, rows, losses.double())


def teacher_divergence(model: Any, logits: Tensor, teacher: TeacherTargets) -> Tensor:
    """The summed divergence of a batch from a teacher, in nats, a scalar. It is to be read once for each forward pass.

    model, logits: As of `next_token_loss`. teacher: As given to `set_loss_targets`.
    """
    head = model.get_output_embeddings()
    if isinstance(head, LossHead):
        found, head.divergence = head.divergence, None
        assert found is not None
        return found
    teacher = teacher.to(logits.device)
    return divergence(logits.flatten(0, 1)[teacher.places], teacher.ids, teacher.log_probabilities).sum()


def _taken(model: Any) -> Tensor | None:
    """Returns and clears the losses that the `LossHead` of a model computed in its last forward pass; None if it
    returned logits."""
    head = model.get_output_embeddings()
    if not isinstance(head, LossHead):
        return None
    losses, head.losses = head.losses, None
    return losses


@dataclass(frozen=True)
class Scaling:
    """What a model does with the output of its output layer. Values are rounded as in the model.

    Attributes:
        scale: The factor of the output.
        divisor: The divisor applied next; it rounds differently than a product with the reciprocal.
        cap: The bound of the tanh soft-capping applied last; 0 for none.
    """

    scale: float = 1.0
    divisor: float = 1.0
    cap: float = 0.0

    @classmethod
    def of(cls, settings: Any) -> "Scaling":
        """The scaling in the configuration of a decoder, by the keys of Cohere, Granite and Gemma."""
        names = ("logit_scale", 1.0), ("logits_scaling", 1.0), ("final_logit_softcapping", 0.0)
        return cls(*(getattr(settings, name, None) or default for name, default in names))

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the scaled logits (in place unless there is a cap), and the tensor for `backward`."""
        logits = logits.mul_(self.scale) if self.scale != 1 else logits
        logits = logits.div_(self.divisor) if self.divisor != 1 else logits
        if not self.cap:
            return logits, None
        bounded = logits.div_(self.cap).tanh_()
        return bounded * self.cap, bounded

    def backward(self, gradient: Tensor, bounded: Tensor | None) -> Tensor:
        """The gradient of the output of the output layer."""
        if bounded is not None:
            gradient = torch.ops.aten.tanh_backward(gradient, bounded)
        gradient = gradient.div_(self.divisor) if self.divisor != 1 else gradient
        return gradient.mul_(self.scale) if self.scale != 1 else gradient


class LossHead(nn.Module):
    """Replaces a frozen output layer, and computes the loss when labels are set.

    Logits are computed at supervised positions only, a few hundred at a time, together with their gradient, so they are
    not kept. Hsu et al. 2024 (Liger) do this for trained heads too. Positions of several rows with the same hidden
    state and label are computed once and weighted by their number.

    Attributes:
        head: The output layer.
        scaling: What the model does with its output.
        labels: Of the next batch, (rows, length), -100 where nothing is supervised.
        places: Where in its hidden states, row after row, the tokens are that the labels belong to: of the shape of
            the labels. None: in that order.
        lengths: (rows,), the tokens of each row, where each is to have a sum of its own; else None.
        weights: The weight of each label in the sum, of the shape of the labels, float32; None: 1. Not with `lengths`.
        teacher: What a teacher predicts after some tokens of the next batch; None: nothing.
        divergence: The summed divergence from it, a scalar; None: there was no teacher.
        losses: What was computed in place of logits: the summed loss, a scalar, or that of each row, (rows,).
    """

    def __init__(self, head: nn.Linear, scaling: Scaling):
        super().__init__()
        self.head, self.scaling = head, scaling
        self.labels: Tensor | None = None
        self.places: Tensor | None = None
        self.lengths: Tensor | None = None
        self.weights: Tensor | None = None
        self.teacher: TeacherTargets | None = None
        self.divergence: Tensor | None = None
        self.losses: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The weight of the output layer, for code that reads it."""
        return self.head.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (rows, length, size). Returns logits; or, once after labels were set, NaN, (1, 1, vocabulary): the
        loss goes past the model, which may scale or cap what it takes for logits."""
        labels, places, lengths, teacher = self.labels, self.places, self.lengths, self.teacher
        weights, self.weights = self.weights, None
        self.labels = self.places = self.lengths = self.teacher = self.divergence = self.losses = None
        if labels is None:
            logits: Tensor = self.head(hidden)
            return logits
        if teacher is not None:
            self.divergence = self._divergence(hidden, teacher.to(hidden.device), places)
        if places is None and hidden.shape[:2] != labels.shape:
            raise ValueError(f"{tuple(labels.shape)} labels for {tuple(hidden.shape[:2])} states")
        wanted = LossTargets.of(labels, places, lengths, weights)
        numbers, targets, counts, rows, entries = (
            None if part is None else send(part, hidden.device) for part in wanted
        )
        assert numbers is not None and targets is not None
        states = hidden.flatten(0, 1).index_select(0, numbers)  # Its gradient is added up in a fixed order.
        if lengths is not None and rows is not None:
            of_labels = rows, len(lengths), entries
            losses: Tensor = _RowSums.apply(states, self.head, targets, self.scaling, of_labels)  # type: ignore[no-untyped-call]
        else:
            losses = _HeadLoss.apply(states, self.head, targets, self.scaling, counts)  # type: ignore[no-untyped-call]
        self.losses = losses
        # DDP may go back from what a model returns to the weights that were used.
        used = losses.sum() if self.divergence is None else losses.sum() + self.divergence
        return (used * math.nan).repeat(1, 1, len(self.weight))

    def _divergence(self, hidden: Tensor, teacher: TeacherTargets, places: Tensor | None) -> Tensor:
        """The summed divergence from a teacher. places: as of the labels."""
        numbers = teacher.places if places is None else places.to(hidden.device).flatten()[teacher.places]
        states = hidden.flatten(0, 1).index_select(0, numbers)
        result: Tensor = HeadDivergence.apply(states, self.head, self.scaling, teacher.ids, teacher.log_probabilities)  # type: ignore[no-untyped-call]
        return result


def _chunk_losses(
    hidden: Tensor,
    head: nn.Linear,
    targets: Tensor,
    scaling: Scaling,
    gradient: Tensor | None,
    shares: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Yields the losses of `CHUNK` states at a time, and writes their gradient to `gradient`, unless it is None.

    shares: factors of the gradient of each state, (states,), float32.
    """
    ops = fused_ops(hidden)
    for start in range(0, len(hidden), CHUNK):
        rows = slice(start, start + CHUNK)
        logits, bounded = scaling.forward(head(hidden[rows]))
        losses = ops.cross_entropy(logits, targets[rows], None if shares is None else shares[rows])
        yield rows, losses
        if gradient is not None:
            torch.mm(scaling.backward(logits, bounded), head.weight, out=gradient[rows])


class _HeadLoss(torch.autograd.Function):
    """The summed loss of all labels. counts: (states,), the labels of each state, or their total weight; None: 1."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Linear, targets: Tensor, scaling: Scaling, counts: Tensor | None
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        ctx.unit, shares = 1.0, None
        if hidden.dtype == torch.bfloat16:  # The gradient of the mean, to avoid another rounding by the division.
            shares = torch.ones(len(hidden), device=hidden.device) if counts is None else counts.float()
            ctx.unit = 1 / shares.sum().clamp(min=1e-30)
            shares = shares * ctx.unit  # a new tensor, as it may be `counts`
        for rows, losses in _chunk_losses(hidden, head, targets, scaling, gradient, shares):
            total += losses.sum() if counts is None else losses @ counts[rows].float()
        if gradient is not None and counts is not None and shares is None:
            gradient *= counts[:, None]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * (doutput / ctx.unit), None, None, None, None


def output_layer(base: Any) -> tuple[str, nn.Linear, Scaling] | None:
    """Name, module and `Scaling` of the output layer; None if it is not a frozen linear layer."""
    head = base.get_output_embeddings()
    names = [name for name, module in base.named_modules() if module is head]
    if type(head) is not nn.Linear or not names or any(weight.requires_grad for weight in head.parameters()):
        return None
    scaling = _scaling(base, head)
    return (names[0], head, scaling) if scaling is not None else None


@torch.no_grad()
def _scaling(base: Any, head: nn.Linear) -> Scaling | None:
    """The `Scaling` of a model's output; None if it does something else, or does not run on bare ids.

    It is verified by replacing the output with test values that exceed every cap.
    """
    config = base.config.get_text_config()
    named = Scaling.of(config)
    ids = torch.arange(8, device=base.device).view(1, -1) % config.vocab_size
    outputs: list[Tensor] = []

    def replace(_head: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if is_fake(output):
            outputs.append(output)
            return output
        wide = torch.linspace(-_LARGEST, _LARGEST, output.numel(), device=output.device).view_as(output).to(output)
        outputs.extend([output, wide.clone()])
        return wide

    hook = head.register_forward_hook(replace)
    try:
        with evaluating(base):
            hidden = base.get_decoder()(ids, use_cache=False).last_hidden_state
            logits = base(ids, use_cache=False).logits
        hook.remove()
        if is_fake(logits):
            return named if logits is outputs[0] or named != Scaling() else None
        output, wide = outputs
        choices = (Scaling(), named) if torch.equal(output, head(hidden)) else ()
        return next((one for one in choices if torch.equal(one.forward(wide.clone())[0], logits)), None)
    except Exception:
        _log.debug("the loss is left to the model, which does not run on bare ids", exc_info=True)
        return None
    finally:
        hook.remove()


def computes_loss(head: nn.Linear, scaling: Scaling) -> bool:
    """Whether `LossHead` computes the loss of a few random states, and its gradient, as stock torch does; with one sum
    and with one for each row. The result of a fake layer is True."""
    if is_fake(head.weight):
        return True
    drawn = torch.randn(1, _TRIED + 1, head.in_features, generator=torch.Generator().manual_seed(0))
    states = drawn.to(head.weight).requires_grad_()
    labels = (torch.arange(_TRIED + 1)[None] * 7 + 1) % len(head.weight)
    lengths = torch.tensor([_TRIED + 1])

    def computed(loss: Tensor) -> list[Tensor]:
        return [loss.detach().view(1), *torch.autograd.grad(loss.sum(), states)]

    def with_head(lengths: Tensor | None) -> list[Tensor]:
        fast = LossHead(head, scaling)
        fast.labels, fast.lengths = send(labels, states.device), lengths
        fast(states)
        assert fast.losses is not None
        return computed(fast.losses)

    with torch.enable_grad():
        scores = scaling.forward(head(states))[0][0, :-1].float()
        stock = computed(functional.cross_entropy(scores, send(labels[0, 1:], states.device), reduction="sum"))
        found = [with_head(None), with_head(lengths)]
    allowed = MIN_TOLERANCE.get(states.dtype, 1e-3)
    return all(relative_rms(*pair) <= allowed for one in found for pair in zip(stock, one, strict=True))


class _RowSums(torch.autograd.Function):
    """The sum of the losses of each row, differentiable per row."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Linear, targets: Tensor, scaling: Scaling,
        labels: tuple[Tensor, int, Tensor | None],
    ) -> Tensor:  # fmt: skip
        """labels: the row of each label, the number of rows, and the state of each label, None for the same order."""
        rows, number, entries = labels
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
        for chunk, own in _chunk_losses(hidden, head, targets, scaling, gradient):
            losses[chunk] = own
        ctx.save_for_backward(gradient, entries, rows)
        return losses.new_zeros(number).index_add_(0, rows, losses if entries is None else losses[entries])

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> tuple[Any, ...]:
        gradient, entries, rows = ctx.saved_tensors
        weights = doutput[rows]
        if entries is not None:
            weights = weights.new_zeros(len(gradient)).index_add_(0, entries, weights)
        return (gradient * weights[:, None].float()).to(gradient.dtype), None, None, None, None


def global_norm(tensors: list[Tensor], order: float = 2.0) -> Tensor:
    """The norm over all elements of all tensors, a scalar; NaN or inf if any element is.

    order: inf for the largest absolute value, which cannot overflow.
    """
    norm: Tensor = torch.nn.utils.get_total_norm(tensors, norm_type=order)
    return full_tensor(norm)


def full_tensor(value: Tensor) -> Tensor:
    """The whole tensor. A sharded one is gathered; then all processes must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value
