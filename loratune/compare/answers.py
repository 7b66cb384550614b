"""Scores of models on rows: the loss of each row, greedy answers with their metrics, and rewards of preferences.

The loss and the rewards of preferences are those of the objective that the adapter was trained with, if that fits the
rows, and the reference is the base. All models are measured by them, also an adapter that was trained with another
objective.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from loratune.codes import Code
from loratune.compare.engine import Scorer
from loratune.compare.metrics import OPTION, ExpectedTextError, Metric
from loratune.compare.objectives import AnswerScores, ComparedRows, Formula, divergence
from loratune.compare.preferences import PreferenceMetrics, Side, names_of_sides
from loratune.compare.results import BASE, EXACT_MATCH, LABEL_ACCURACY, ComparedAnswer, ComparedRow, ModelAnswer
from loratune.config import DataSection
from loratune.config.expressions import BadPatternError
from loratune.data import TokenizedDataset
from loratune.data.holding_out import MAX_LABELS
from loratune.data.rendering import TokenizedRow
from loratune.errors import ConfigError, DataError, Problem
from loratune.events import Advance, no_advance
from loratune.model import load

Values = NDArray[np.float64]

_BATCH = 32
"""Prompts that are completed at once."""
_TIMES, _MORE = 2, 32
"""A whole answer may have so many times the tokens of the expected one, and so many more."""
_ROWS_PER_LABEL = 4
"""Expected answers are labels where each is in so many rows on average, and there are not too many of them."""
_PLACES = 3
"""How many places of further rows a message names."""


class AnsweringModel(Protocol):
    """A loaded adapter as this module needs it; with the adapter switched off it is the base.

    Attributes:
        model: The `PeftModel`.
        tokenizer: Its tokenizer.
        data: How the rows of training were read.
        chat: Whether the adapter was trained on conversations.
        where: Its path, for messages.
    """

    @property
    def model(self) -> Any:
        """See the attributes."""

    @property
    def tokenizer(self) -> Any:
        """See the attributes."""

    @property
    def data(self) -> DataSection:
        """See the attributes."""

    @property
    def chat(self) -> bool:
        """See the attributes."""

    @property
    def where(self) -> str:
        """See the attributes."""

    def computing(self) -> AbstractContextManager[None]:
        """Inside, the model computes with this adapter."""

    def without_adapter(self) -> AbstractContextManager[None]:
        """Inside, the model is the base alone."""

    def complete(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """The new ids that follow each prompt, by the likeliest token."""

    def text(self, ids: Sequence[int]) -> str:
        """A completion as text, without the token that ends it."""


@dataclass(frozen=True)
class Judging:
    """How answers are asked for and judged.

    Attributes:
        metrics: Those that were asked for. `exact_match` and `label_accuracy` are always computed, and need no more of
            an answer than there are tokens in the expected one.
        for_readers: Whether somebody reads the answers, so that they may go on beyond that. They also may where another
            metric is asked for.
    """

    metrics: Sequence[Metric] = ()
    for_readers: bool = False

    @property
    def whole(self) -> bool:
        """Whether answers may be longer than the expected ones."""
        return self.for_readers or any(metric.scores for metric in self.metrics)

    def limit(self, row: TokenizedRow, context_length: int | None) -> int:
        """How many tokens the answer to a row may have."""
        expected = len(row.completion)
        if not self.whole:
            return expected
        longest = _TIMES * expected + _MORE
        room = context_length - len(row.prompt) if context_length is not None else longest
        return max(expected, min(longest, room))

    def scores(self, expected: str, answer: str) -> dict[str, float]:
        """Metric → score of an answer. Raises as `Metric.scores`."""
        scores: dict[str, float] = {}
        for metric in self.metrics:
            scores |= metric.scores(expected, answer) if metric.scores else {}
        return scores


class RowAnswers:
    """What models do on rows with one answer: their loss, and greedy answers to their prompts.

    Attributes:
        rows: The distinct rows, without what models do on them.
    """

    def __init__(self, loaded: AnsweringModel, dataset: TokenizedDataset, judging: Judging):
        """Raises as `check_expected` does. loaded: the adapter, as which the rows are rendered."""
        self.rows = distinct_rows(loaded, dataset)
        self._dataset, self._judging = dataset, judging
        check_expected(self.rows, judging)

    @property
    def prompts(self) -> int:
        """How many prompts there are to answer."""
        return sum(row.prompt is not None for row in self.rows)

    def answers(
        self, name: str, model: AnsweringModel, scorer: Scorer, advance: Advance = no_advance
    ) -> list[ModelAnswer]:
        """What a model does on each row.

        Args:
            name: `BASE`, which comes first, or another model.
            model: The adapter; while it is off, the base.
            scorer: Computes its losses.
            advance: Called with how many prompts were answered.
        """
        copies = {row.number: row.copies for row in self.rows}
        nats = scorer.losses(self._dataset, copies).nats
        found = self._answered(model, advance)
        return [
            ModelAnswer(float(total), *found.get(row.number, (None, {})))
            for row, total in zip(self.rows, nats, strict=True)
        ]

    def _answered(self, model: AnsweringModel, advance: Advance) -> dict[int, tuple[str, dict[str, float]]]:
        """Number of a row with a prompt → the answer and its scores."""
        dataset, judging, context = self._dataset, self._judging, load.context_length(model.model.config)
        found: dict[int, tuple[str, dict[str, float]]] = {}
        expected = {row.number: (row.where, row.expected) for row in self.rows if row.expected is not None}
        limits = {number: judging.limit(dataset.rows.row(number), context) for number in expected}
        for batch in _batches(dataset, limits, context):
            asked = [dataset.rows.row(number) for number in batch]
            completions = model.complete([row.prompt for row in asked], max(limits[number] for number in batch))
            for number, row, longer in zip(batch, asked, completions, strict=True):
                where, right = expected[number]
                text, beginning = model.text(longer[: limits[number]]), longer[: len(row.completion)]
                is_exact = tuple(beginning) == row.completion
                is_label = model.text(beginning).startswith(right) if right else is_exact  # "" starts every text
                scores = {EXACT_MATCH: float(is_exact), LABEL_ACCURACY: float(is_label)}
                try:
                    found[number] = text, scores | judging.scores(right, text)
                except BadPatternError as error:
                    raise _too_slow(error, where) from None
            advance(len(batch))
        return found


class PreferenceAnswers:
    """What models do on preferences: the loss and the rewards of pairs or answers; see `RowAnswers`.

    Attributes:
        rows: The distinct pairs, or answers, without what models do on them.
        formula: What the loss and the rewards are.
        prompts: How many prompts there are to answer, which is none.
    """

    prompts = 0

    def __init__(self, formula: Formula, loaded: AnsweringModel, dataset: TokenizedDataset, seed: int):
        """dataset: all pairs or all answers. seed: of the training, see `ComparedRows`."""
        self.formula = formula
        self.rows = [*_distinct_preferences(loaded, dataset)]
        rows_per_example = dataset.rows_per_example
        self._dataset = dataset
        self._numbers = [
            row.number * rows_per_example + place for row in self.rows for place in range(rows_per_example)
        ]
        self._sides = np.asarray(dataset.rows.sides)[self._numbers].astype(np.int64)
        self._tokens = dataset.rows.supervised[self._numbers].astype(np.float64)
        self._mismatched: list[dict[str, Any]] = []
        if dataset.is_unpaired:
            compared = ComparedRows(dataset, loaded.data.max_length, seed)
            self._mismatched = [compared[number]["mismatched"] for number in range(len(compared))]
        self._reference: tuple[Values, Values] | None = None
        self.metrics: dict[str, PreferenceMetrics] = {}

    def answers(
        self, name: str, model: AnsweringModel, scorer: Scorer, advance: Advance = no_advance
    ) -> list[ModelAnswer]:
        """See `RowAnswers.answers`; the base, which is the reference, comes first."""
        rows = scorer.losses(self._dataset, dict.fromkeys(self._numbers, 1)).nats
        mismatched = np.empty(0)
        if self._mismatched:
            lengths = np.array([len(row["input_ids"]) for row in self._mismatched])
            mismatched = scorer.losses_of(self._mismatched, lengths, dict.fromkeys(range(len(lengths)), 1)).nats
        if name == BASE:
            self._reference = -rows, -mismatched
        assert self._reference is not None
        answers = AnswerScores(*map(torch.from_numpy, (-rows, self._tokens, self._reference[0])))
        others = -mismatched, np.ones(len(mismatched)), self._reference[1]
        estimate = divergence(AnswerScores(*map(torch.from_numpy, others)))
        found = self.formula.item_losses(answers, torch.from_numpy(self._sides), estimate)
        rewards = self.formula.rewards(answers).numpy()
        good, bad = (
            Side(self._tokens[which], self._reference[0][which], -rows[which], rewards[which])
            for which in (self._sides > 0, self._sides < 0)
        )
        metrics = PreferenceMetrics("held-out", not self._mismatched, good, bad, self.formula.beta * estimate)
        self.metrics[name] = metrics
        return [ModelAnswer(loss, None, own) for loss, own in zip(found.tolist(), self._scores(metrics), strict=True)]

    def _scores(self, metrics: PreferenceMetrics) -> list[dict[str, float]]:
        """Metric → what each row adds to it."""
        scores: list[dict[str, float]] = [{} for _ in self.rows]
        columns = metrics.by_item()
        # Answers are desirable ones, then undesirable ones there; pairs have the order of the rows.
        order = np.argsort(self._sides < 0, kind="stable") if self._mismatched else np.arange(len(self.rows))
        for name, (places, values) in columns.items():
            for place, value in zip(order[places].tolist(), values.tolist(), strict=True):
                scores[place][name] = value
        return scores


def majority_answers(rows: Sequence[ComparedRow], judging: Judging) -> list[ModelAnswer]:
    """Scores of the baseline that always gives the most frequent expected answer, row by row; empty unless answers are
    labels. Its loss is NaN, as it has no probabilities. Raises as `Judging.scores`."""
    copies = Counter[str]()
    for row in rows:
        if row.expected is not None:
            copies[row.expected] += row.copies
    if not copies or len(copies) > MAX_LABELS or copies.total() < _ROWS_PER_LABEL * len(copies):
        return []
    ((text, _),) = copies.most_common(1)

    def answer(expected: str) -> ModelAnswer:
        is_label = text.startswith(expected) if expected else not text
        scores = {EXACT_MATCH: float(text == expected), LABEL_ACCURACY: float(is_label)}
        return ModelAnswer(math.nan, text, scores | judging.scores(expected, text))

    return [ModelAnswer(math.nan, None, {}) if row.expected is None else answer(row.expected) for row in rows]


def distinct_rows(loaded: AnsweringModel, dataset: TokenizedDataset) -> list[ComparedRow]:
    """The rows that differ in their ids or labels, without answers, in the order in which they first occur."""
    rows: list[ComparedRow] = []
    for number, copies in dataset.copies().items():
        row = dataset.rows.row(number)
        if row.supervised:
            has_prompt = row.prompt not in ((), (loaded.tokenizer.bos_token_id,))  # more than what begins every row
            prompt = loaded.tokenizer.decode(row.prompt) if has_prompt else None
            expected = loaded.text(row.completion) if has_prompt else None
            places = tuple(dataset.rows.row(copy).where for copy in copies[1:])
            rows.append(ComparedRow(number, row.where, len(copies), prompt, expected, row.supervised, elsewhere=places))
    return rows


def check_expected(rows: Sequence[ComparedRow], judging: Judging) -> None:
    """Check that the metrics can be computed for the rows.

    Raises:
        DataError: No row has a prompt, or a metric says nothing about an expected text.
        ConfigError: An expression takes too long.
    """
    texts = [(row.where, row.expected) for row in rows if row.expected is not None]
    if judging.metrics and not texts:
        what, fix = (
            "no row has a prompt, so there is no answer to score",
            "leave --metric out, or give rows with prompts",
        )
        raise DataError(Problem(Code.DATA_FIELD, what, key=OPTION, fix=fix))
    places: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for where, expected in texts:
        try:
            judging.scores(expected, "")
        except ExpectedTextError as error:
            places.setdefault(str(error), []).append(where)
            reasons.setdefault(str(error), f" ({error.__cause__})" if error.__cause__ else "")
        except BadPatternError as error:
            raise _too_slow(error, where) from None
    if places:
        raise DataError([_expected_texts(what, reasons[what], wrong, len(texts)) for what, wrong in places.items()])


def _expected_texts(what: str, reason: str, wrong: Sequence[str], total: int) -> Problem:
    """One problem for all rows whose expected texts a metric refuses for the same reason: the first row, and a
    count."""
    first, *others = wrong
    more = ""
    if others:
        named = ", ".join(others[:_PLACES]) + (", ..." if len(others) > _PLACES else "")
        more = f", as in {len(others):,} more of {total:,} rows: {named}"
    fix = "correct the rows, or leave this metric out"
    return Problem(Code.DATA_FIELD, f"{what}{reason}{more}", first, OPTION, fix)


def _too_slow(error: BadPatternError, where: str) -> ConfigError:
    return ConfigError(Problem(Code.USAGE_BAD_VALUE, f"an expression {error}", where, OPTION, "write it otherwise"))


def _distinct_preferences(loaded: AnsweringModel, dataset: TokenizedDataset) -> Iterator[ComparedRow]:
    """The distinct pairs, or answers, without what models do on them, in the order in which they first occur."""
    names = names_of_sides(paired=not dataset.is_unpaired)
    for number, copies in dataset.copies().items():
        item = dataset.item(number)
        compared = {names[row.side < 0]: ComparedAnswer(loaded.text(row.completion), row.supervised) for row in item}
        prompt, tokens = loaded.tokenizer.decode(item[0].prompt), sum(row.supervised for row in item)
        first, *others = (dataset.item(copy)[0].where for copy in copies)
        yield ComparedRow(number, first, len(copies), prompt, None, tokens, compared=compared, elsewhere=tuple(others))


def check_positions(rows: TokenizedDataset, section: DataSection, limit: int | None) -> None:
    """Check that rows fit into the context of the model. limit: see `model.load.context_length`.

    Raises:
        ConfigError: A row is longer.
    """
    longest = int(rows.rows.lengths.max())
    if limit is not None and longest > limit:
        what = f"is {section.max_length}, and the longest row has {longest} tokens, but the model has {limit} positions"
        raise ConfigError(Problem(Code.DATA_TOO_LONG, what, key="data.max_length", fix=f"set it to {limit}"))


def _batches(dataset: TokenizedDataset, limits: Mapping[int, int], context_length: int | None) -> Iterator[list[int]]:
    """Batches of rows with answers of similar length.

    The prompts of a batch are all completed to its longest limit. So a batch takes another row only if its longest
    prompt and its longest limit fit in the context together.

    limits: number of a row → how many tokens its answer may have.
    """
    batch: list[int] = []
    longest_prompt = 0
    for number in sorted(limits, key=lambda number: limits[number]):
        prompt = len(dataset.rows.row(number).prompt)
        is_too_long = context_length is not None and max(longest_prompt, prompt) + limits[number] > context_length
        if batch and (is_too_long or len(batch) == _BATCH):
            yield batch
            batch, longest_prompt = [], 0
        batch.append(number)
        longest_prompt = max(longest_prompt, prompt)
    if batch:
        yield batch
