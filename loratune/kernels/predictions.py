"""What models predict: logits at some tokens of a batch, and the divergence between two models, KL(teacher ‖ model).

Of a teacher, only the most probable tokens are kept.
A teacher's distribution over a vocabulary takes 200 kB a token; its 20 most probable tokens, with all others as one
outcome, take 160 bytes. With all tokens kept, this is the whole divergence.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CHUNK = 256
"""Tokens whose logits are in memory at once."""


class TeacherTargets(NamedTuple):
    """What a teacher predicts after some tokens.

    Attributes:
        places: (tokens,), int64: where these tokens are among those of the batch, row after row.
        ids: (tokens, K), int64: the most probable next tokens.
        log_probabilities: (tokens, K), float32, in nats.
    """

    places: Tensor
    ids: Tensor
    log_probabilities: Tensor

    def to(self, device: torch.device) -> "TeacherTargets":
        """The same on a device."""
        return TeacherTargets(*(tensor.to(device) for tensor in self))


@torch.no_grad()
def next_token_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """(vocabulary,), float32 on the CPU: what a model without labels predicts after some ids."""
    inputs = torch.tensor([ids])
    batch = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    return logits_at(model, batch, torch.tensor([len(ids) - 1]))[0].float().cpu()


def logits_at(model: Any, batch: Mapping[str, Any], places: Tensor) -> Tensor:
    """The logits of some tokens of a batch; those of the others are not computed.

    Args:
        model: A model of transformers, or a `PeftModel`, with a `LossHead` that has no labels or without one.
        batch: Inputs; `places` among them are where in the hidden states the tokens of rows are, if these share some.
        places: (tokens,), int64, the numbers of the tokens in the batch, row after row.

    Returns:
        (tokens, vocabulary), in the dtype of the model.
    """
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "places"}
    places = places if batch.get("places") is None else batch["places"].flatten()[places]
    places, shape = places.to(model.device), inputs["input_ids"].shape

    selected = []

    def select(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = given
        if hidden.shape[:2] != shape:
            return given
        selected.append(True)
        return (hidden.flatten(0, 1)[None, places], *others)

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    return logits[0] if selected else logits.flatten(0, 1)[places]


@contextmanager
def dense_states(model: Any) -> Iterator[None]:
    """Inside, the output layer of a model gets hidden states without gaps. `generate` gives it those of the last token
    of each prompt, and for each row of such a batch torch would copy all weights of the layer on a CPU."""
    head = model.get_output_embeddings()
    hook = head and head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def most_probable(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` most probable tokens, and their log-probabilities. logits: (tokens, vocabulary), any float dtype.

    Returns (tokens, count), int64 and float32.
    """
    scores = logits.float().log_softmax(-1)
    values, ids = scores.topk(min(count, scores.shape[-1]), dim=-1)
    return ids, values


def divergence(logits: Tensor, ids: Tensor, log_probabilities: Tensor) -> Tensor:
    """KL(teacher ‖ model) of each token in nats: (tokens,), float32. Gradients flow to the logits.

    Args:
        logits: Of the model, (tokens, vocabulary), any float dtype.
        ids: See `TeacherTargets`.
        log_probabilities: See `TeacherTargets`.
    """
    result: Tensor = _Divergence.apply(logits.float(), ids, log_probabilities)  # type: ignore[no-untyped-call]
    return result


def _divergence(scores: Tensor, ids: Tensor, log_probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of each token, and its gradient, which overwrites the scores: (tokens, vocabulary), float32."""
    log_total = scores.logsumexp(-1, keepdim=True)
    top = scores.gather(1, ids) - log_total
    teacher = log_probabilities.exp()
    rest_of_teacher = (1 - teacher.sum(1)).clamp(min=0)
    probabilities = scores.sub_(log_total).exp_()
    probabilities.scatter_(1, ids, 0)
    rest = probabilities.sum(1)  # not 1 less the sum of the others, which would lose all digits of a small rest
    has_rest = rest > 0
    share = torch.where(has_rest, rest_of_teacher / rest, 1)
    of_rest = torch.where(has_rest & (rest_of_teacher > 0), rest_of_teacher * share.log(), 0)
    gradient = probabilities.mul_((1 - share)[:, None])
    gradient.scatter_(1, ids, top.exp() - teacher)
    return (teacher * (log_probabilities - top)).sum(1) + of_rest, gradient


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, ids: Tensor, log_probabilities: Tensor) -> Tensor:
        values, gradient = _divergence(scores.clone(), ids, log_probabilities)
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, dvalues: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * dvalues[:, None], None, None


class HeadDivergence(torch.autograd.Function):
    """The summed divergence of the logits that an output layer gives to hidden states, which are not kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Linear, scaling: Any, ids: Tensor, log_probabilities: Tensor
    ) -> Tensor:
        """Returns a scalar, float32.

        Args:
            hidden: (tokens, size).
            head: The output layer.
            scaling: What the model does with its output, see `loss.Scaling`.
            ids: See `TeacherTargets`.
            log_probabilities: See `TeacherTargets`.
        """
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        ctx.unit = 1 / max(1, len(hidden))  # the gradient of the mean, which is not rounded again when it is divided
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logits, bounded = scaling.forward(head(hidden[part]))
            values, dlogits = _divergence(logits.to(torch.float32, copy=True), ids[part], log_probabilities[part])
            total += values.sum()
            if gradient is not None:
                dlogits = scaling.backward(dlogits.mul_(ctx.unit).to(logits.dtype), bounded)
                torch.mm(dlogits, head.weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Any, ...]:
        """The gradient of the hidden states."""
        (gradient,) = ctx.saved_tensors
        return gradient * (dtotal / ctx.unit), None, None, None, None
