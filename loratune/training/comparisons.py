"""What is compared after the last step, decided before the first one: by tokens and settings, never by the clock.

The comparisons have a budget: a fifth of the tokens that training reads, or what a small model reads in seconds. They
are taken in the order of what decides, and those without room are named to the user.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from loratune.compare import behavior, exact, gain
from loratune.compare.gain import RowSample
from loratune.compare.verdict import SHORT, label_of
from loratune.config import RunConfig
from loratune.data import TokenizedDataset
from loratune.data.rendering.spans import TokenizedRow

Part = Literal["unrelated", "behavior", "samples"]
LEAST_TO_JUDGE = 40
"""Distinct validation rows from which on half of them choose the step and the other half judge the adapter."""
SAMPLES = 3
"""Prompts whose answers of base and adapter are shown, where answers are texts; one where they are short."""
SAMPLE_TOKENS = 48
"""The most tokens of such an answer."""
_SHARE = 5
"""All comparisons together read at most 1/`_SHARE` of the tokens of training, each of which costs a third as much."""
_SMALL = {"cpu": 1e13, "accelerator": 1e15}
"""Operations that comparisons may take even after a short run: some ten seconds."""
_TOKENS_OF_PASS = 16
"""A pass that writes one token of each of a few texts takes as long as reading so many tokens."""
_LABELLED_ROWS = 4096
"""Training rows from which the most frequent answer is taken."""


def choosing(rows: TokenizedDataset, run: RunConfig) -> frozenset[int]:
    """The numbers of the validation items that choose the step whose weights are kept; the others judge the adapter.

    Half of the distinct rows, by chance, with their copies and blocks. None if the run chooses nothing, or has fewer
    than `LEAST_TO_JUDGE`; then all rows do both.
    """
    training = run.training
    if not (run.keeps_best or training.patience is not None):
        return frozenset()
    groups, owners = rows.copies(), rows.rows.owners
    owner = {first: first if owners is None else int(owners[first]) for first in groups}
    distinct = [*dict.fromkeys(owner.values())]
    if len(distinct) < LEAST_TO_JUDGE:
        return frozenset()
    half = set(np.random.default_rng(0).permutation(distinct)[: len(distinct) // 2].tolist())
    return frozenset(number for first, copies in groups.items() if owner[first] in half for number in copies)


@dataclass(frozen=True)
class Comparisons:
    """The comparisons of a run.

    Attributes:
        rows: The rows by which the adapter is judged.
        judged_apart: Whether these are validation rows, and other ones choose the step.
        chose: Whether these rows also choose the step that is kept.
        answers: Whether their answers are short, so that right ones are counted.
        majority: The tokens of the most frequent answer of the training rows; None if answers are not labels.
        left_out: What is not compared, as there is no room for it.
    """

    rows: RowSample
    judged_apart: bool
    chose: bool
    answers: bool
    majority: tuple[int, ...] | None
    left_out: frozenset[Part]

    def answered(self) -> list[TokenizedRow]:
        """The rows whose answers are compared, in the order of `rows`."""
        return [self.rows.dataset.item(number)[0] for number in self.rows.copies]

    def notes(self) -> Iterator[str]:
        """Lines for the user."""
        if self.judged_apart:
            yield "data.validation: half of the rows choose the step that is kept, the others judge the adapter"
        if self.left_out:
            names = {"unrelated": "other text", "behavior": "everyday instructions", "samples": "sample answers"}
            left = ", ".join(name for part, name in names.items() if part in self.left_out)
            yield f"not compared after the last step, as this run is short for so large a model: {left}"


def affordable(parameters: int, *, on_accelerator: bool) -> int:
    """The tokens that comparisons may read even after a short run. parameters: those of the base."""
    return int(_SMALL["accelerator" if on_accelerator else "cpu"] / (2 * parameters))


def decide(
    splits: Mapping[str, TokenizedDataset], chooses: frozenset[int], tokens: int, costs: Mapping[Part, int], *,
    least: int, selects: bool,
) -> Comparisons:  # fmt: skip
    """Decide what is compared.

    Args:
        splits: The splits that may judge, in order of preference: `validation`, `training`.
        chooses: See `choosing`.
        tokens: Tokens that the run will read.
        costs: Part → the tokens that it reads, in the order of what decides, see `costs`.
        least: The tokens that may be read even after a short run, see `affordable`.
        selects: Whether validation rows choose among several steps.
    """
    of_rows = min(gain.LEAST_TOKENS, least // 8)
    rows = gain.sample(splits, tokens, least=of_rows, left_out=chooses if selects else ())
    judged = [rows.dataset.item(number) for number in rows.copies]
    answers = rows.split == "validation" and rows.dataset.rows.owners is None
    answers = answers and exact.comparable([row for item in judged for row in item], SHORT)
    left = max(tokens // _SHARE, least) - (4 if answers else 2) * rows.tokens
    left_out = set[Part]()
    for part, cost in costs.items():
        if cost > left:
            left_out.add(part)
        else:
            left -= cost
    return Comparisons(
        rows,
        judged_apart=selects and rows.split == "validation" and bool(chooses),
        chose=selects and rows.split == "validation" and not chooses,
        answers=answers,
        majority=_majority(splits["training"]) if answers else None,
        left_out=frozenset(left_out),
    )


def _majority(train: TokenizedDataset) -> tuple[int, ...] | None:
    count = min(train.items, _LABELLED_ROWS)
    numbers = np.random.default_rng(0).choice(train.items, count, replace=False).tolist()
    return label_of(Counter(train.item(number)[0].completion for number in numbers))


def costs(text: TokenizedDataset | None, instructions: Sequence[behavior.Ids]) -> dict[Part, int]:
    """Part → the tokens that it reads, in the order of what decides.

    Args:
        text: The unrelated text; None without any.
        instructions: The prompts of `behavior.measure`.
    """
    found: dict[Part, int] = {} if text is None else {"unrelated": 2 * int(text.rows.lengths.sum())}
    answers = 2 * sum(len(ids) + behavior.ANSWER_TOKENS for ids in instructions)
    found["behavior"] = answers + 2 * behavior.ANSWER_TOKENS * _TOKENS_OF_PASS
    return found | {"samples": 2 * SAMPLE_TOKENS * _TOKENS_OF_PASS}
