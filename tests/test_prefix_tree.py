"""Prefix trees: every row gets the same results as alone, and every gradient is the sum over the rows."""

import pickle
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from conftest import mainly
from test_fused_ops import OVER, attended
from test_kernels import FAMILIES, ROLES, TARGETS, adapted, normal, seen
from torch import Tensor

from loratune import kernels
from loratune.data.batches import flatten
from loratune.data.packing import LEAST_SHARED, PrefixTree, share_prefixes
from loratune.kernels.layout import Layout
from loratune.lora import attach

Row = dict[str, list[int]]


def drawn(length: int, seed: int) -> list[int]:
    return torch.randint(1, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


A, B, C, D = (drawn(length, seed) for seed, length in enumerate((30, 20, 40, 15)))
LONG = drawn(150, 9)
ENDS = [drawn(length, 20 + length) for length in range(1, 12)]
TREES: dict[str, list[list[int]]] = {
    "nothing shared": [A, B, C, D],
    "one level": [A + end for end in ENDS],
    "two levels": [*[A + B + end for end in ENDS[:4]], *[A + C + end for end in ENDS[4:]]],
    "three levels": [A + B + C + ENDS[4], A + B + C + ENDS[6], A + B + D, A + D + B, D + A, D + B],
    "four levels": [A + B + C + D + end for end in ENDS[6:9]] + [A + B + C + B, A + B + D, A + C, B],
    "nothing follows": [A, A + B, A + B + C, A + B + C + D, A + B + D],
    "the same rows": [A + B, C, A + B, A + D, C, A + B],
    "one row": [A],
    "of one token": [[5], [5], [6], [5, 6]],
    "longer than a tile": [LONG + end for end in ENDS] + [LONG[:140] + C + LONG, LONG[:3] + B, LONG[:129]],
    "a few tokens alike": [A[:LEAST_SHARED] + B, A[:LEAST_SHARED] + C, A[:3] + D, B[:3] + A, A],
}


def as_rows(lists: list[list[int]], unsupervised: int = 0) -> list[Row]:
    """Rows with all tokens supervised except the first ones. A row may occur twice with different labels."""
    return [
        {"input_ids": ids, "labels": [-100] * min(unsupervised, len(ids) - 1) + ids[min(unsupervised, len(ids) - 1) :]}
        for ids in lists
    ]


# The tree


@pytest.mark.parametrize("name", TREES)
def test_tree_contains_every_row(name: str) -> None:
    rows = TREES[name]
    tree = PrefixTree.of(rows)
    for ids, places in zip(rows, tree.places, strict=True):
        assert tree.ids[places].tolist() == ids
        assert tree.positions[places].tolist() == list(range(len(ids)))
    used = set(np.concatenate(tree.places).tolist())
    assert used == set(range(len(tree.ids)))


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("tile", [4, 48, 128])
@pytest.mark.parametrize("window", [None, 1, 7, 33])
def test_positions_determine_what_a_token_attends_to(name: str, tile: int, window: int | None) -> None:
    """The preceding tokens of its row, the same for every row that contains the token."""
    tree = PrefixTree.of(TREES[name])
    keys = seen(Layout.of(torch.from_numpy(tree.positions), window, tile))
    for places in tree.places:
        for position, place in enumerate(places.tolist()):
            begin = 0 if window is None else max(0, position - window + 1)
            assert keys[place] == places[begin : position + 1].tolist()


def test_shared_prefix_is_stored_once() -> None:
    assert len(PrefixTree.of(TREES["one level"]).ids) == 30 + sum(map(len, ENDS))
    assert len(PrefixTree.of(TREES["nothing shared"]).ids) == sum(map(len, (A, B, C, D)))
    assert len(PrefixTree.of(TREES["nothing follows"]).ids) == len(A + B + C + D) + len(D)
    assert len(PrefixTree.of(TREES["the same rows"]).ids) == len(A + B + C + D)


def test_short_prefixes_are_not_shared() -> None:
    few, enough = A[: LEAST_SHARED - 1], A[:LEAST_SHARED]
    assert len(PrefixTree.of([few + B, few + C]).ids) == len(few + B + few + C)
    assert len(PrefixTree.of([enough + B, enough + C]).ids) == len(enough + B + C)


def test_tree_does_not_depend_on_the_order_of_rows() -> None:
    rows = TREES["four levels"]
    one, other = PrefixTree.of(rows), PrefixTree.of(rows[::-1])
    assert one.ids.tolist() == other.ids.tolist() and one.positions.tolist() == other.positions.tolist()
    for places, others in zip(one.places, other.places[::-1], strict=True):
        assert places.tolist() == others.tolist()


def test_batch_keeps_the_labels_of_its_rows() -> None:
    rows = as_rows(TREES["two levels"], 33)
    batch, flat = pickle.loads(pickle.dumps(share_prefixes))(rows), flatten(rows)
    assert torch.equal(batch["labels"], flat["labels"])
    assert torch.equal(batch["input_ids"][0][batch["places"][0]], flat["input_ids"][0])
    assert torch.equal(batch["position_ids"][0][batch["places"][0]], flat["position_ids"][0])


# Attention


def spread(tensor: Tensor, axis: int, places: Tensor) -> Tensor:
    """Values per tree token, gathered at the tokens of the rows."""
    return tensor.index_select(axis, places)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("name", TREES)
def test_tree_attention_matches_attention_over_its_rows(name: str, over: str) -> None:
    """Results, and gradients, which are summed at shared tokens."""
    choose, dtype = OVER[over]
    tree = PrefixTree.of(TREES[name])
    count, places = len(tree.ids), torch.from_numpy(np.concatenate(tree.places))
    positions = torch.from_numpy(tree.positions)
    for size, heads, window, tile in ((16, 3, None, 48), (72, 1, 20, 48), (8, 2, None, 128), (64, 3, 9, 128)):
        shapes = [(2, count, heads, size), (2, count, size), (2, count, size)]
        arguments = [normal(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]
        alone = [spread(one, 1, places) for one in arguments]
        gradient = normal(len(places), 2 * heads * size, seed=3).to(dtype)
        # The tree has one gradient for a shared token: the sum of those of its rows.
        added = torch.zeros(count, gradient.shape[1]).index_add_(0, places, gradient.float()).to(dtype)
        ops = choose(arguments[0])
        one = attended(ops, positions, [*arguments, added], window, tile)
        rows = attended(ops, positions[places], [*alone, gradient], window, tile)
        assert float((one[0][places].float() - rows[0].float()).abs().max()) <= (1e-5 if dtype.itemsize == 4 else 0.02)
        for whole, parts in zip(one[1:], rows[1:], strict=True):
            summed = torch.zeros(whole.shape).index_add_(0, places, parts.float())
            loose = 1e-5 if dtype.itemsize == 4 else 0.03
            assert float((whole.float() - summed).norm()) <= loose * float(summed.norm()) + 1e-5


@pytest.mark.parametrize("over", OVER)
def test_non_finite_values_reach_only_the_rows_that_contain_them(over: str) -> None:
    choose, dtype = OVER[over]
    rows = TREES["two levels"]
    tree = PrefixTree.of(rows)
    count = len(tree.ids)
    shapes = [(1, count, 2, 16), (1, count, 16), (1, count, 16), (count, 32)]
    arguments = [normal(*shape, seed=n).to(dtype) for n, shape in enumerate(shapes)]
    positions = torch.from_numpy(tree.positions)
    whole = attended(choose(arguments[0]), positions, arguments, None)[0]
    for position in (3, 35):  # a token that all rows share, and one that the first four share
        place = int(tree.places[0][position])
        arguments[2] = normal(*shapes[2], seed=2).to(dtype)
        arguments[2][0, place, 3] = float("nan")
        result = attended(choose(arguments[0]), positions, arguments, None)[0]
        reached = {
            int(after) for places in tree.places if place in places for after in places[places.tolist().index(place) :]
        }
        assert {token for token in range(count) if result[token].isnan().any()} == reached
        others = torch.tensor([token for token in range(count) if token not in reached])
        assert torch.equal(result[others], whole[others])


# Models


def step(model: Any, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of a batch."""
    inputs = dict(batch)
    labels, places = inputs.pop("labels"), inputs.pop("places", None)
    kernels.set_loss_targets(model, labels, places)
    total, count = kernels.next_token_loss(model, model(**inputs, use_cache=False).logits, labels)
    (total / count).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float((total / count).detach()), gradients


def rows_alone(model: Any, rows: list[Row]) -> tuple[float, dict[str, Tensor]]:
    """The same by stock layers, with a separate pass for each row."""
    supervised = [sum(label >= 0 for label in row["labels"][1:]) for row in rows]
    total, summed = 0.0, dict[str, Tensor]()
    for row, count in zip(rows, supervised, strict=True):
        if count:
            batch = {name: torch.tensor([values]) for name, values in row.items()}
            loss, gradients = step(model, batch)
            total += loss * count
            summed = {name: summed.get(name, 0) + gradient * count for name, gradient in gradients.items()}
    return total / sum(supervised), {name: gradient / sum(supervised) for name, gradient in summed.items()}


def check_same(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]]) -> None:
    """The promised bounds: the loss within 1e-6, every gradient within 1e-5 of the largest."""
    assert one[0] == pytest.approx(other[0], abs=1e-6)
    assert one[1].keys() == other[1].keys() and one[1]
    largest = max(float(gradient.abs().max()) for gradient in one[1].values())
    for name, gradient in one[1].items():
        assert float((gradient - other[1][name]).abs().max()) <= 1e-5 * largest, name


@pytest.mark.parametrize("unsupervised", mainly([33], [0, 33]))
@pytest.mark.parametrize("name", TREES)
def test_tree_loss_and_gradients_match_those_of_its_rows(name: str, unsupervised: int) -> None:
    """Compared with single rows in stock PEFT, and with packed rows; with and without supervised prefixes."""
    model, rows = adapted(), as_rows(TREES[name], unsupervised)
    if not any(label >= 0 for row in rows for label in row["labels"][1:]):
        rows[0]["labels"] = rows[0]["input_ids"]
    stock = rows_alone(model, rows)
    with kernels.accelerated(model, attach.adapted_linear) as fallbacks:
        assert fallbacks == []
        check_same(step(model, flatten(rows)), step(model, share_prefixes(rows)))
        check_same(stock, step(model, share_prefixes(rows)))


def test_rows_with_equal_tokens_keep_their_own_labels() -> None:
    """Some rows supervise tokens that other rows do not."""
    rows = [*as_rows(TREES["two levels"], 33), *as_rows(TREES["two levels"][:3], 0), *as_rows([A + B], 10)]
    model = adapted()
    stock = rows_alone(model, rows)
    with kernels.accelerated(model, attach.adapted_linear):
        check_same(stock, step(model, share_prefixes(rows)))


@pytest.mark.parametrize(
    "family",
    [
        "llama with biases", "mistral with a window", "phi3", "gemma3", "gemma2, which caps scores and logits",
        "cohere2, which scales logits", "mixtral", "deepseek_v3, whose values are small",
        *mainly([], ["qwen2", "qwen3", "mistral", "phi", "glm4"]),
    ],
)  # fmt: skip
def test_model_families_compute_the_same_with_trees(family: str) -> None:
    kind, changes, not_accelerated = FAMILIES[family]
    model = adapted(kind, targets=TARGETS.get(kind, ROLES), changes=changes)
    rows = as_rows(TREES["four levels"] + TREES["longer than a tile"], 12)
    stock = rows_alone(model, rows)
    with kernels.accelerated(model, attach.adapted_linear) as fallbacks:
        assert fallbacks == not_accelerated and kernels.tree_refusal(model) is None
        check_same(stock, step(model, share_prefixes(rows)))


def test_fifty_steps_have_the_same_loss_curve() -> None:
    """With AdamW, over batches with prefixes shared on several levels."""
    lists = [one for name in ("two levels", "three levels", "four levels", "the same rows") for one in TREES[name]]
    rows = as_rows(lists, 25)
    curves = []
    for collate in (flatten, share_prefixes):
        model = adapted()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        order, curve = np.random.default_rng(0), []
        with kernels.accelerated(model, attach.adapted_linear):
            for _ in range(50):
                batch = collate([rows[number] for number in order.permutation(len(rows))[:8]])
                labels, places = batch.pop("labels"), batch.pop("places", None)
                kernels.set_loss_targets(model, labels, places)
                total, count = kernels.next_token_loss(model, model(**batch, use_cache=False).logits, labels)
                (total / count).backward()
                optimizer.step()
                optimizer.zero_grad()
                curve.append(float((total / count).detach()))
        curves.append(curve)
    assert curves[0][-1] < curves[0][0] - 0.1
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)


def test_places_are_in_the_order_of_rows() -> None:
    rows = as_rows(TREES["three levels"])
    ends = [0, *accumulate(len(row["input_ids"]) for row in rows)]
    batch = share_prefixes(rows)
    for row, span in zip(rows, pairwise(ends), strict=True):
        assert batch["input_ids"][0][batch["places"][0][slice(*span)]].tolist() == row["input_ids"]
