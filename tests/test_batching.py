"""Rows are packed where that is possible and cheaper, and padded elsewhere, which is reported. Rows that are scored are
batched too, and each has the same loss as alone."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ran, mainly, write_rows
from test_kernels import SHAPE, adapted
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from loratune import kernels
from loratune.compare.engine import SFT, Objective, ScoringLayout
from loratune.compare.metrics import RowLosses
from loratune.compare.objectives import Formula
from loratune.compare.preferences import ComparedRows, PreferenceObjective
from loratune.config import PreferenceSection
from loratune.data import TokenizedDataset
from loratune.data.batch_check import padding_is_cheaper
from loratune.data.packing import LEAST_SHARED, PrefixTree
from loratune.data.rendering.spans import CHOSEN, DESIRABLE, UNDESIRABLE, TokenizedRow
from loratune.lora import attach
from loratune.system.launcher import SINGLE_PROCESS, Group


@pytest.mark.parametrize(
    "lengths, size, width, padded",
    [
        ([1024] * 64, 8, 640, True),  # Gemma 3: 3.5 s padded, 20.2 s packed
        ([1024] * 64, 1, 640, False),  # a single row costs the same either way
        ([20, 400] * 64, 8, 2048, False),  # half of the padded batch would be padding
        ([20, 30, 25, 24] * 64, 8, 4096, False),
        ([4000, 16] * 64, 16, 640, True),  # still padded: packed, 32,000 tokens would attend to each other
        ([1000, 1000, 1000], 8, 640, True),  # fewer rows than a batch
    ],
)
def test_padding_is_chosen_where_it_is_cheaper(lengths: list[int], size: int, width: int, padded: bool) -> None:
    found = [padding_is_cheaper(np.array(order), size, width) for order in (lengths, sorted(lengths))]
    assert found == [padded, padded]


@pytest.mark.parametrize("kind, padded", [("bloom", True), ("gemma2", False), ("gemma3_text", False)])
def test_rows_are_packed_only_where_that_is_cheaper(
    kind: str, padded: bool, run_config: Callable[..., Path], cli: Callable[..., Ran], tmp_path: Path, tokenizer: Any
) -> None:
    """BLOOM adds biases to its attention scores, so its own attention is kept, which runs on padded batches."""
    config = CONFIG_MAPPING[kind](**SHAPE | {"sliding_window": 16, "n_layer": 2, "n_head": 4})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = write_rows(tmp_path / "long.jsonl", [{"text": f"{number} " * 25} for number in range(10, 26)])
    config_path = run_config(
        model={"name_or_path": str(tmp_path / "base")}, data={"train": str(rows)}, training={"max_steps": 2}
    )
    ran = cli("train", config_path)
    assert ran.code == 0, ran.err
    note = "data.packing: bloom attends to all rows of a batch at once, which costs more than padding"
    assert (note in ran.err) == padded and ("data.packing" in ran.err) == padded


# Rows that are scored


@dataclass
class Rows:
    """Rows in memory."""

    several: Sequence[TokenizedRow]

    @property
    def lengths(self) -> Any:
        return np.array([len(row.ids) for row in self.several])

    def __len__(self) -> int:
        return len(self.several)

    def __getitem__(self, number: int, /) -> dict[str, Any]:
        return {"input_ids": list(self.row(number).ids), "labels": self.row(number).labels}

    def row(self, number: int) -> TokenizedRow:
        return self.several[number]

    def rows(self) -> Sequence[TokenizedRow]:
        return self.several

    def side(self, number: int) -> int:
        return self.several[number].side


def made(sides: Sequence[int] = (0,), count: int = 24) -> TokenizedDataset:
    """Rows of prompts, three of which share a prefix, each with as many answers as there are sides."""
    dice = np.random.default_rng(0)
    starts = dice.integers(1, SHAPE["vocab_size"], (count // 3, 20)).tolist()
    several = []
    for number in range(count):
        prompt = starts[number % len(starts)] + dice.integers(1, SHAPE["vocab_size"], number % 7).tolist()
        for side in sides:
            answer = dice.integers(1, SHAPE["vocab_size"], 1 + int(dice.integers(12))).tolist()
            span = ((len(prompt), len(prompt) + len(answer)),)
            several.append(TokenizedRow("", (*prompt, *answer), span, side=side))
    return TokenizedDataset(Rows(several))  # type: ignore[arg-type]


WAYS = {
    "padded": ScoringLayout(False, None, 0, 150),
    "flat": ScoringLayout(True, None, 0, 150),
    "tree": ScoringLayout(True, 0.3, 0, 150),
}
ALONE = ScoringLayout(False, None, 0, 1)


@pytest.mark.parametrize("way", WAYS)
def test_batches_contain_every_item_once_within_the_token_limit(way: str) -> None:
    scoring, dataset = WAYS[way], made()
    layout, numbers = scoring.layout(dataset.rows, dataset.rows.lengths), [*range(1, 24, 2), 0]
    batches = scoring.batches(layout, numbers)
    assert sorted(number for batch in batches for number in batch) == sorted(numbers)
    assert batches == scoring.batches(layout, numbers) and len(batches) < 6
    for batch in batches:
        tokens = layout.collate([layout.items[number] for number in batch])["input_ids"].numel()
        assert tokens <= 150 + (LEAST_SHARED * len(batch) if way == "tree" else 0)
    few = ScoringLayout(scoring.flat, scoring.saved, 0, 1)
    assert sorted(few.batches(layout, numbers)) == [[number] for number in sorted(numbers)]
    assert scoring.batches(layout, []) == []


def test_rows_that_share_a_prefix_are_scored_together() -> None:
    """A prefix tree of them is smaller than one of rows of similar length."""
    dataset = made()
    computed = {}
    for way in ("flat", "tree"):
        layout = WAYS[way].layout(dataset.rows, dataset.rows.lengths)
        trees = [
            PrefixTree.of([row["input_ids"] for row in layout.rows(batch)])
            for batch in WAYS[way].batches(layout, range(24))
        ]
        computed[way] = sum(len(tree.ids) for tree in trees)
    assert computed["tree"] < 0.8 * computed["flat"]


def comparing(name: str, dataset: TokenizedDataset) -> PreferenceObjective:
    return PreferenceObjective(Formula.of(name, PreferenceSection()), {"train": ComparedRows(dataset, 64, seed=0)})


def scored(
    objective: Objective, model: Any, dataset: TokenizedDataset, numbers: Sequence[int], way: ScoringLayout, group: Any
) -> RowLosses:
    items, together = objective.items(dataset)
    planned = way.plan(way.layout(items, dataset.rows.lengths, together), dict.fromkeys(numbers, 1))
    return objective.score(model, planned, group=group)


OBJECTIVES: dict[str, tuple[Sequence[int], Callable[[TokenizedDataset], Objective]]] = {
    "sft": ((0,), lambda _: SFT),
    "dpo": ((CHOSEN, -CHOSEN), lambda dataset: comparing("dpo", dataset)),
    "simpo": ((CHOSEN, -CHOSEN), lambda dataset: comparing("simpo", dataset)),
    "kto": ((DESIRABLE, UNDESIRABLE), lambda dataset: comparing("kto", dataset)),
}


LAYOUTS = (("padded", False), ("padded", True), ("flat", True), ("tree", True))


@pytest.mark.parametrize(
    ("name", "way", "fast"),
    mainly(
        [*(("sft", *way) for way in LAYOUTS), ("dpo", "flat", True), ("dpo", "tree", True), ("kto", "padded", True)],
        ((name, *way) for name in OBJECTIVES for way in LAYOUTS),
    ),
)
def test_batching_does_not_change_the_loss_of_an_item(name: str, way: str, fast: bool) -> None:
    sides, objective_of = OBJECTIVES[name]
    dataset = made(sides)
    model, objective = adapted().eval(), objective_of(dataset)
    numbers = [*range(dataset.items)][::-1]
    alone = scored(objective, model, dataset, numbers, ALONE, SINGLE_PROCESS)
    if name == "sft":
        for number, (nats, tokens) in zip(numbers, zip(alone.nats, alone.tokens, strict=True), strict=True):
            row = dataset.rows.row(number)
            (start, end), ids = row.spans[0], torch.tensor(row.ids)
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, start - 1 : end - 1]
            expected = torch.nn.functional.cross_entropy(logits, ids[start:], reduction="sum").item()
            assert (nats, tokens) == (pytest.approx(expected, rel=1e-5), end - start)
    with kernels.accelerated(model, attach.adapted_linear) if fast else nullcontext():
        found = scored(objective, model, dataset, numbers, WAYS[way], SINGLE_PROCESS)
    assert found.tokens.tolist() == alone.tokens.tolist()
    assert found.nats.tolist() == pytest.approx(alone.nats.tolist(), rel=1e-5)
    assert len(set(found.nats.tolist())) > len(found) // 2


class OneOf(Group):
    """One of several processes, which run one after the other; this one runs last."""

    def __init__(self, rank: int, gathered: list[list[Any]]):
        self.rank, self.count, self._gathered = rank, 3, gathered

    def all_gather(self, value: Any) -> list[Any]:
        self._gathered.append(value)
        return self._gathered


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_bit_identical_for_any_number_of_processes(name: str) -> None:
    sides, objective_of = OBJECTIVES[name]
    dataset = made(sides)
    model, objective = adapted().eval(), objective_of(dataset)
    with kernels.accelerated(model, attach.adapted_linear):
        one = scored(objective, model, dataset, range(dataset.items), WAYS["tree"], SINGLE_PROCESS)
        own: list[list[Any]] = []
        for rank in (2, 1):
            with pytest.raises((ValueError, IndexError)):  # as the losses of the other processes are still missing
                scored(objective, model, dataset, range(dataset.items), WAYS["tree"], OneOf(rank, own))
        several = scored(objective, model, dataset, range(dataset.items), WAYS["tree"], OneOf(0, own))
    assert (several.nats == one.nats).all() and (several.tokens == one.tokens).all()
