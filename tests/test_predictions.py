"""The divergence from a teacher's most probable tokens, against the whole vocabulary in plain torch."""

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional

from loratune import kernels
from loratune.kernels.loss import Scaling
from loratune.kernels.predictions import divergence, most_probable


def whole(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ model) over the whole vocabulary, of each token, in float64."""
    return functional.kl_div(
        logits.double().log_softmax(-1), teacher.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)


def drawn(seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(7, 50, generator=generator) * scale for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_with_all_tokens_it_is_the_whole_divergence(scale: float) -> None:
    logits, teacher = drawn(0, scale)
    ours, plain = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found, expected = divergence(ours, *most_probable(teacher, 50)), whole(plain, teacher)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.arange(1.0, 8.0)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad.double(), plain.grad, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("count", [1, 5, 20])
def test_all_others_are_one_outcome(count: int) -> None:
    """As if the vocabulary had `count` tokens, and one for all others."""
    logits, teacher = drawn(1)
    ids, log_probabilities = most_probable(teacher, count)
    ours, plain = logits.clone().requires_grad_(), logits.double().requires_grad_()

    def merged(scores: Tensor) -> Tensor:
        probabilities = scores.double().softmax(-1)
        top = probabilities.gather(1, ids)
        return torch.cat([top, 1 - top.sum(1, keepdim=True)], 1)

    of_teacher = merged(teacher)
    expected = (of_teacher * (of_teacher.log() - merged(plain).log())).sum(1)
    found = divergence(ours, ids, log_probabilities)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert bool((found.double() <= whole(logits, teacher) + 1e-5).all())  # outcomes that are merged hide differences
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad.double(), plain.grad, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]


def test_a_model_does_not_diverge_from_itself() -> None:
    logits, _ = drawn(2)
    logits.requires_grad_()
    found = divergence(logits, *most_probable(logits.detach(), 20))
    found.sum().backward()
    assert float(found.detach().abs().max()) < 1e-6 and float(logits.grad.abs().max()) < 1e-6  # type: ignore[union-attr]


@pytest.mark.parametrize("is_tree", [False, True])
@pytest.mark.parametrize("changes", [{}, {"final_logit_softcapping": 5.0, "logits_scaling": 2.0}])
def test_the_output_layer_gives_it_beside_the_loss(is_tree: bool, changes: dict[str, float]) -> None:
    """In one forward pass, with the gradients of two passes in plain torch; also where rows share a prefix."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 256, (1, 24), generator=generator)
    positions = torch.tensor([[*range(8), *range(4, 12), *range(8)]])
    places = torch.tensor([[*range(8), *range(4), *range(8, 16), *range(16, 24)]])
    if not is_tree:
        positions, places = torch.tensor([[*range(8), *range(8), *range(8)]]), None
    tokens = 28 if is_tree else 24
    labels = torch.full((1, tokens), -100)
    labels[0, 2:6] = ids[0, 2:6]
    at = torch.arange(tokens - 8, tokens - 1)
    model = get_peft_model(tiny_llama(), LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    top = most_probable(torch.randn(7, 264, generator=generator) * 2, 20)
    teacher = kernels.TeacherTargets(at, *top)
    divisor, cap = changes.get("logits_scaling", 1.0), changes.get("final_logit_softcapping", 0.0)
    head = kernels.LossHead(model.get_output_embeddings(), Scaling(divisor=divisor, cap=cap))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    hidden = model.get_base_model().model(ids, position_ids=positions, use_cache=False).last_hidden_state
    head.labels, head.places, head.teacher = labels, places, teacher
    head(hidden)
    assert head.losses is not None and head.divergence is not None
    found = torch.autograd.grad(head.losses + 3 * head.divergence, weights, retain_graph=True)
    logits = model.get_output_embeddings()(hidden) / divisor
    logits = cap * (logits / cap).tanh() if cap else logits
    of_labels = logits[0] if places is None else logits[0, places[0]]
    loss = functional.cross_entropy(of_labels[:-1], labels[0, 1:], ignore_index=-100, reduction="sum")
    expected = loss + 3 * divergence(of_labels[at], *top).sum()
    torch.testing.assert_close(head.losses + 3 * head.divergence, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
