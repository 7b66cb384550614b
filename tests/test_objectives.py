"""The preference objectives: their formulas, checked by hand and at their limits, and row sums with gradients."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_llama

from loratune.compare.objectives import AnswerScores, Formula, PreferenceMetrics, Side, divergence
from loratune.config import PreferenceSection
from loratune.data.batches import flatten, pad, put_rows
from loratune.data.packing import share_prefixes
from loratune.kernels import LossHead, row_counts, row_sums
from loratune.kernels.loss import Scaling


def answers(sums: list[float], tokens: list[int], reference: list[float]) -> AnswerScores:
    numbers = [torch.tensor(values, dtype=torch.float64) for values in (sums, tokens, reference)]
    return AnswerScores(*numbers)


CHOSEN = answers([-10.0, -3.0], [5, 2], [-11.0, -2.5])
REJECTED = answers([-12.0, -9.0], [4, 9], [-9.0, -9.5])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(mean: float) -> float:
    return mean - math.log(1 - math.exp(mean))


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        (Formula("dpo", 0.1), [-math.log(sigmoid(0.1 * (1 + 3))), -math.log(sigmoid(0.1 * (-0.5 - 0.5)))]),
        (
            Formula("dpo", 0.1, label_smoothing=0.2),
            [-0.8 * math.log(sigmoid(m)) - 0.2 * math.log(sigmoid(-m)) for m in (0.4, -0.1)],
        ),
        (Formula("dpo", 0.1, sft_weight=0.5), [-math.log(sigmoid(0.4)) + 1.0, -math.log(sigmoid(-0.1)) + 0.75]),
        (
            Formula("simpo", 2.0, simpo_gamma=1.0),
            [-math.log(sigmoid(2 * (-2 + 3) - 1)), -math.log(sigmoid(2 * (-1.5 + 1) - 1))],
        ),
        (
            Formula("orpo", 0.1),
            [
                2 - 0.1 * math.log(sigmoid(log_odds(-2) - log_odds(-3))),
                1.5 - 0.1 * math.log(sigmoid(log_odds(-1.5) - log_odds(-1))),
            ],
        ),
    ],
)
def test_pair_losses_match_values_computed_by_hand(formula: Formula, expected: list[float]) -> None:
    assert formula.pair_losses(CHOSEN, REJECTED).tolist() == pytest.approx(expected, rel=1e-12)


def test_answer_losses_match_values_computed_by_hand() -> None:
    formula = Formula("kto", 0.1, desirable_weight=1.5, undesirable_weight=0.5)
    found = formula.answer_losses(CHOSEN, torch.tensor([True, False]), 2.0)
    expected = [1.5 * (1 - sigmoid(0.1 - 0.2)), 0.5 * (1 - sigmoid(0.2 + 0.05))]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert divergence(CHOSEN) == pytest.approx(0.25) and divergence(REJECTED) == 0.0


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_first_loss_is_that_of_an_unchanged_model(name: str) -> None:
    """The loss of answers that are as likely as under the reference, as they are in the first step."""
    formula = Formula(name, 0.3, label_smoothing=0.1 if name == "dpo" else 0.0)
    same = answers([-10.0, -3.0], [5, 2], [-10.0, -3.0])
    if name == "dpo":
        losses = formula.pair_losses(same, same)
    else:
        losses = formula.answer_losses(same, torch.tensor([True, False]), divergence(same))
    expected = formula.first_loss()
    assert expected is not None and losses.tolist() == pytest.approx([expected] * 2)
    assert expected == pytest.approx(math.log(2) if name == "dpo" else 0.5)


def test_beta_defaults_depend_on_the_objective() -> None:
    assert [Formula.of(name, PreferenceSection()).beta for name in ("dpo", "orpo", "simpo", "kto")] == [
        0.1,
        0.1,
        2,
        0.1,
    ]
    assert Formula.of("simpo", PreferenceSection(beta=3.0)).beta == 3.0


def test_orpo_loss_is_finite_for_a_certain_answer() -> None:
    certain = answers([0.0], [3], [0.0])
    certain.log_probabilities.requires_grad_()
    loss = Formula("orpo", 0.1).pair_losses(certain, answers([-1.0], [3], [0.0])).sum()
    loss.backward()
    assert math.isfinite(loss.item()) and bool(certain.log_probabilities.grad.isfinite().all())  # type: ignore[union-attr]


# Row sums


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 250, (12,), generator=generator).tolist() for _ in range(2)]
    found = []
    for number, length in enumerate((3, 11, 5, 8)):
        prompt, ids = prompts[number // 2], torch.randint(0, 250, (length,), generator=generator).tolist()
        if number == 1:
            ids = [*found[0]["input_ids"][12:], *ids]  # the first answer is a prefix of the second
        found.append({"input_ids": prompt + ids, "labels": [-100] * 12 + ids, "side": 2 if number % 2 == 0 else -2})
    return found


@pytest.mark.parametrize("put", [flatten, share_prefixes, None], ids=["flat", "tree", "padded"])
def test_row_sums_and_their_weighted_gradients(put: Any) -> None:
    """As from the logits of each row alone, with a different weight per row. In a tree, shared labels count in each
    row."""
    head = torch.nn.Linear(16, 264, bias=False).requires_grad_(False)
    embedding = torch.nn.Embedding(264, 16)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)

    def states(ids: torch.Tensor) -> torch.Tensor:
        """A hidden state per token that depends on all tokens before it in its row, so those of a shared prefix are
        equal."""
        return embedding(ids)

    given = rows()
    alone = []
    for row in given:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        logits = head(states(ids))
        alone.append(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum").double())
    expected = torch.stack(alone)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), embedding.weight)

    batch = put_rows(put or (lambda some: pad(some, 0)), given)
    labels, lengths = batch["labels"], batch["lengths"]
    loss_head = LossHead(head, Scaling())
    loss_head.labels, loss_head.places, loss_head.lengths = labels, batch.get("places"), lengths
    for layer in (loss_head, head) if put is not share_prefixes else [loss_head]:  # Trees need the loss head.
        output = layer(states(batch["input_ids"]))
        sums = row_sums(SimpleNamespace(get_output_embeddings=lambda layer=layer: layer), output, labels, lengths)
        assert sums.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
        (found,) = torch.autograd.grad((sums * weights).sum(), embedding.weight, retain_graph=True)
        assert torch.allclose(found, gradient, atol=1e-5)
    assert row_counts(labels, lengths).tolist() == [3, 14, 5, 8]


def test_row_sums_are_zero_without_supervised_tokens() -> None:
    batch = put_rows(flatten, rows())
    labels = torch.full_like(batch["labels"], -100)
    model = tiny_llama()
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    assert row_sums(model, logits, labels, batch["lengths"]).tolist() == [0.0] * 4
    assert row_counts(labels, batch["lengths"]).tolist() == [0] * 4


def test_saturated_pairs_are_reported_of_a_training_only() -> None:
    """The advice is about the next run. Less likely chosen answers are reported of every comparison."""

    def warnings(margin: float, change: float, of_training: bool) -> list[str]:
        tokens, before = np.full(20, 5.0), np.linspace(-9.0, -8.0, 20)
        good = Side(np.arange(20), tokens, before, before + change, np.full(20, margin))
        bad = Side(np.arange(20), tokens, before, before - 40.0, np.zeros(20))
        return [*PreferenceMetrics("test", True, good, bad).warnings(of_training=of_training)]

    assert warnings(4.0, 1.0, True) == warnings(5.0, 1.0, False) == []
    (line,) = warnings(5.0, 1.0, True)
    assert line.startswith("100% of the pairs have a margin above 4.6")
    (line,) = warnings(5.0, -1.0, False)
    assert line.startswith("chosen answers became less likely, by 1.00 nats")
