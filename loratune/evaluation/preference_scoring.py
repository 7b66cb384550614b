"""What models do on answers that are compared: how probable they find them, and the loss and the rewards that follow.

The loss and the rewards are those of the objective that the adapter was trained with, if it goes with the rows, and the
reference is the base. All models are measured by them, an adapter that was trained with another objective too. The
figures beside the loss are those of `preference_figures`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loratune.adapter.directory import AdapterDirectory
from loratune.adapter.generation import LoadedAdapter
from loratune.config import DEFAULT_BETA
from loratune.data import TokenizedDataset
from loratune.data.formats import JUDGED, PAIRS
from loratune.evaluation.results import ADAPTER, BASE, ComparedAnswer, EvaluatedRow, ModelAnswer
from loratune.evaluation.scoring import Advance, losses, losses_of
from loratune.training.objectives import AnswerScores, Formula, divergence
from loratune.training.preference_figures import PreferenceFigures, Side, names_of_sides
from loratune.training.preferences import ComparedRows
from loratune.training.preflight import KINDS

Values = NDArray[np.float64]


def formula_of(adapter: AdapterDirectory, kind: str) -> Formula:
    """The objective that an adapter was trained with; if that does not go with the rows, DPO's or KTO's.

    kind: `PAIRS` or `JUDGED`.
    """
    trained = _objective_of(adapter)
    if trained is not None and KINDS[trained.name] == kind:
        return trained
    name = "dpo" if kind == PAIRS else "kto"
    return Formula(name, trained.beta if trained is not None and trained.has_reference else DEFAULT_BETA[name])


def _objective_of(adapter: AdapterDirectory) -> Formula | None:
    """None for an adapter that was not trained on compared answers, or of which that is not known."""
    run = adapter.run
    if run is None or run.training.objective == "sft":
        return None
    return Formula.of(run.training.objective, run.preferences)


def _distinct(loaded: LoadedAdapter, dataset: TokenizedDataset) -> Iterator[EvaluatedRow]:
    """The distinct pairs, or judged answers, without what models do on them, in the order in which they first occur."""
    names = names_of_sides(paired=not dataset.judged)
    for number, copies in dataset.copies().items():
        item = dataset.item(number)
        compared = {names[row.side < 0]: ComparedAnswer(loaded.text(row.completion), row.supervised) for row in item}
        prompt, tokens = loaded.tokenizer.decode(item[0].prompt), sum(row.supervised for row in item)
        first, *others = (dataset.item(copy)[0].where for copy in copies)
        yield EvaluatedRow(number, first, len(copies), prompt, None, tokens, compared=compared, elsewhere=tuple(others))


class ComparedScorer:
    """Scores answers that are compared; see `scoring.Scorer`.

    Attributes:
        rows: The distinct pairs, or judged answers, without what models do on them.
        formula: What the loss and the rewards are.
    """

    def __init__(self, adapter: AdapterDirectory, loaded: LoadedAdapter, dataset: TokenizedDataset):
        """adapter: that which `loaded` is. dataset: its rows, all pairs or all judged."""
        self.formula = formula_of(adapter, JUDGED if dataset.judged else PAIRS)
        self.rows = [*_distinct(loaded, dataset)]
        together = dataset.together
        self._dataset = dataset
        self._numbers = [row.number * together + place for row in self.rows for place in range(together)]
        self._sides = np.asarray(dataset.rows.sides)[self._numbers].astype(np.int64)
        self._tokens = dataset.rows.supervised[self._numbers].astype(np.float64)
        self._mismatched: list[dict[str, Any]] = []
        if dataset.judged:
            seed = adapter.run.training.seed if adapter.run is not None else 0
            compared = ComparedRows(dataset, loaded.data.max_length, seed)
            self._mismatched = [compared[number]["mismatched"] for number in range(len(compared))]
        self._reference: tuple[Values, Values] | None = None
        self._figures: dict[str, PreferenceFigures] = {}

    @property
    def passes(self) -> int:
        """See `scoring.Scorer`."""
        return len(self._numbers) + len(self._mismatched)

    def answers(self, name: str, model: LoadedAdapter, advance: Advance = lambda _: None) -> list[ModelAnswer]:
        """See `scoring.Scorer`; the base, which is the reference, comes first."""
        lengths = np.array([len(row["input_ids"]) for row in self._mismatched])
        rows = losses(model, self._dataset, self._numbers, advance)
        mismatched = losses_of(model, self._mismatched.__getitem__, lengths, advance)
        if name == BASE:
            self._reference = -rows, -mismatched
        assert self._reference is not None
        columns = -rows, self._tokens, self._reference[0]
        answers = AnswerScores(*map(torch.from_numpy, columns))
        others = -mismatched, np.ones(len(mismatched)), self._reference[1]
        estimate = divergence(AnswerScores(*map(torch.from_numpy, others)))
        found = self.formula.item_losses(answers, torch.from_numpy(self._sides), estimate)
        rewards = self.formula.rewards(answers).numpy()
        good, bad = (
            Side(self._tokens[which], self._reference[0][which], -rows[which], rewards[which])
            for which in (self._sides > 0, self._sides < 0)
        )
        figures = PreferenceFigures("held-out", not self._mismatched, good, bad, self.formula.beta * estimate)
        self._figures[name] = figures
        return [ModelAnswer(loss, None, own) for loss, own in zip(found.tolist(), self._scores(figures), strict=True)]

    def _scores(self, figures: PreferenceFigures) -> list[dict[str, float]]:
        """Figure → what each row adds to it."""
        scores: list[dict[str, float]] = [{} for _ in self.rows]
        columns = figures.by_item()
        # Judged answers are good ones, then bad ones there; pairs have the order of the rows.
        order = np.argsort(self._sides < 0, kind="stable") if self._mismatched else np.arange(len(self.rows))
        for name, (places, values) in columns.items():
            for place, value in zip(order[places].tolist(), values.tolist(), strict=True):
                scores[place][name] = value
        return scores

    def remarks(self, adapter: AdapterDirectory, against: AdapterDirectory | None) -> Iterator[str]:
        """What may not be intended, a line each: adapters that were not trained with the objective, or the reference,
        that they are measured by, and what `PreferenceFigures` warns of."""
        for one in (adapter, against):
            if one is None:
                continue
            trained = _objective_of(one)
            if trained is None or trained.numbers() != self.formula.numbers():
                what = trained or "no objective that compares answers"
                yield f"{one.files.path}: was trained with {what}, and is measured by {self.formula}"
            elif trained.has_reference and one.run is not None and one.run.lora.start_from is not None:
                what = "was trained with the adapter that it started from as the reference, not the base"
                yield f"{one.files.path}: {what}"
        yield from self._figures[ADAPTER].warnings()
