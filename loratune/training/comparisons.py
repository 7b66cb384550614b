"""What is compared after the last step, decided before the first one: by tokens and settings, never by the clock.

The comparisons have a budget: a fifth of the tokens that training reads, or what a small model reads in seconds. They
are taken in the order of what decides, and those without room are named to the user.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from loratune.compare import behavior, collapse, exact
from loratune.compare.losses import LEAST_TOKENS, RowSample, sample_rows
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
"""All comparisons together read at most 1/`_SHARE` of the tokens of training; a token costs a third as much here."""
_SMALL = {"cpu": 1e13, "accelerator": 1e15}
"""Operations that comparisons may take even after a short run: some ten seconds."""
_TOKENS_OF_PASS = 16
"""A pass that writes one token of each of a few texts takes as long as reading this number of tokens."""
_LABELLED_ROWS = 4096
"""Training rows from which the most frequent answer is taken."""


def choosing(rows: TokenizedDataset, config: RunConfig) -> frozenset[int]:
    """The numbers of the validation items that choose the step whose weights are kept; the others judge the adapter.

    Half of the distinct rows, by chance, with their copies and blocks. None if the run chooses nothing, or has fewer
    than `LEAST_TO_JUDGE`; then all rows do both.
    """
    training = config.training
    if not (config.keeps_best or training.patience is not None):
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
        judging: The rows by which the adapter is judged.
        judged_apart: Whether these are validation rows, and other ones choose the step.
        chose: Whether these rows also choose the step that is kept.
        answers: Whether their answers are short, so that right ones are counted.
        majority: The tokens of the most frequent answer of the training rows; None if answers are not labels.
        left_out: What is not compared, as there is no room for it.
        tokens: The tokens of the judging rows that are read, by base and adapter, with those of `collapse`.
        left: The tokens of the budget that remain.
    """

    judging: RowSample
    judged_apart: bool
    chose: bool
    answers: bool
    majority: tuple[int, ...] | None
    left_out: frozenset[Part]
    tokens: int
    left: int

    def answered(self) -> list[TokenizedRow]:
        """The rows whose answers are compared, in the order of `judging`."""
        return [self.judging.dataset.item(number)[0] for number in self.judging.copies]

    def notes(self) -> Iterator[str]:
        """Lines for the user."""
        if self.judged_apart:
            yield "data.validation: half of the rows choose the step that is kept, the others judge the adapter"
        if self.left_out:
            names = {"unrelated": "other text", "behavior": "everyday instructions", "samples": "sample answers"}
            left = ", ".join(name for part, name in names.items() if part in self.left_out)
            yield f"not compared after the last step, as this run is short for so large a model: {left}"


def affordable(parameters: int, *, on_accelerator: bool) -> int:
    """The tokens that comparisons may read even after a short run. parameters: the number of parameters of the base."""
    return int(_SMALL["accelerator" if on_accelerator else "cpu"] / (2 * parameters))


def choose_comparisons(
    splits: Mapping[str, TokenizedDataset], chooses: frozenset[int], tokens: int, costs: Mapping[Part, int], *,
    least: int, selects: bool,
) -> Comparisons:  # fmt: skip
    """Choose what is compared within the budget.

    Args:
        splits: The splits that may judge, in order of preference: `validation`, `training`.
        chooses: See `choosing`.
        tokens: Tokens that the run will read.
        costs: Part → the tokens that it reads, in the order of what decides, see `costs`.
        least: The tokens that may be read even after a short run, see `affordable`.
        selects: Whether validation rows choose among several steps.
    """
    of_rows = min(LEAST_TOKENS, least // 8)
    rows = sample_rows(splits, tokens, least=of_rows, left_out=chooses if selects else ())
    items = [rows.dataset.item(number) for number in rows.copies]
    answers = rows.split == "validation" and rows.dataset.rows.owners is None
    answers = answers and exact.comparable([row for item in items for row in item], SHORT)
    majority = None
    if answers:
        train = splits["training"]
        numbers = np.random.default_rng(0).choice(train.items, min(train.items, _LABELLED_ROWS), replace=False).tolist()
        majority = label_of(Counter(train.item(number)[0].completion for number in numbers))
    read = (4 if answers else 2) * rows.tokens
    left, left_out = max(tokens // _SHARE, least) - read, set[Part]()
    read += 4 * rows.tokens * min(collapse.PROMPTS, len(items)) // len(items)
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
        majority=majority,
        left_out=frozenset(left_out),
        tokens=read,
        left=left,
    )


def costs(
    text: TokenizedDataset | None, instructions: Sequence[behavior.Ids], *, reasons: bool = False
) -> dict[Part, int]:
    """Part → the tokens that it reads, in the order of what decides.

    Args:
        text: The unrelated text; None without any.
        instructions: The prompts of `behavior.compare_on_base_answers`.
        reasons: Whether they are also asked in the reasoning mode.
    """
    found: dict[Part, int] = {} if text is None else {"unrelated": 2 * int(text.rows.lengths.sum())}
    answers = 2 * sum(len(ids) + behavior.ANSWER_TOKENS for ids in instructions)
    found["behavior"] = (answers + 2 * behavior.ANSWER_TOKENS * _TOKENS_OF_PASS) * (1 + reasons)
    return found | {"samples": 2 * SAMPLE_TOKENS * _TOKENS_OF_PASS}
