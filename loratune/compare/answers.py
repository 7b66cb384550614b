"""Scores models on rows: the loss of each row, greedy answers with their metrics, and rewards of preferences.

The loss and the rewards of preferences are those of the objective that the adapter was trained with, if that objective
fits the rows; the reference is the base. All models are measured in this way, including an adapter that was trained
with another objective.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loratune.adapter.generation import LoadedAdapter
from loratune.codes import Code
from loratune.compare.engine import Engine
from loratune.compare.metrics import EXACT_MATCH, LABEL_ACCURACY, OPTION, ExpectedTextError, Metric, sides
from loratune.compare.objectives import Formula, PreferenceMetrics
from loratune.compare.preferences import ComparedRows, PreferenceObjective, PreferenceScores
from loratune.config.expressions import BadPatternError
from loratune.data import TokenizedDataset
from loratune.data.holding_out import MAX_LABELS
from loratune.data.rendering.spans import TokenizedRow
from loratune.data.sources.rows import with_own_fields
from loratune.errors import ConfigError, DataError, Problem
from loratune.events import counting
from loratune.model import load
from loratune.statistics import finite

_BATCH = 32
"""Prompts that are completed at once."""
_TIMES, _MORE = 2, 32
"""A whole answer may have so many times the tokens of the expected one, and so many more."""
_ROWS_PER_LABEL = 4
"""Expected answers are labels where each is in so many rows on average, and there are not too many of them."""


@dataclass(frozen=True)
class ModelAnswer:
    """What one model does on one row.

    Attributes:
        loss: Summed over the supervised tokens of the row; of preferences, that of the pair or answer.
        text: The greedy answer, without the token that ends it; None where the row has no prompt, or is a preference.
        scores: Metric → what the row adds to it; empty where there is no prompt to answer.
    """

    loss: float
    text: str | None
    scores: Mapping[str, float]


@dataclass(frozen=True)
class ComparedAnswer:
    """An answer of a preference row: its text and its number of tokens."""

    text: str
    tokens: int


@dataclass(frozen=True)
class ComparedRow:
    """One distinct row, or pair of answers, and what each model does on it.

    Attributes:
        number: Its number among the rows that were not dropped, from 0; of copies, that of the first.
        where: Its place in its file.
        copies: How many rows are this one, itself included.
        prompt: The prompt as text, as the model reads it; None where the row has none.
        expected: The text that is expected as the answer; None where the row has no prompt, or is a preference.
        tokens: Supervised tokens.
        answers: Model → what it does; `base`, `adapter`, and `against` if there is one.
        compared: Of preferences: `chosen` and `rejected`, or one of `desirable` and `undesirable` → the answer.
        elsewhere: The places of its copies, without its own.
        fields: The row's own fields as plain values; empty where they are not asked for.
    """

    number: int
    where: str
    copies: int
    prompt: str | None
    expected: str | None
    tokens: int
    answers: Mapping[str, ModelAnswer] = field(default_factory=dict)
    compared: Mapping[str, ComparedAnswer] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)

    def at_places(self, fields: Mapping[str, Mapping[str, Any]]) -> Iterator["ComparedRow"]:
        """The row, and then its copies, each at its own place and with its own fields. fields: place → fields."""
        for place in (self.where, *self.elsewhere):
            yield replace(self, where=place, fields=fields[place])

    @property
    def item(self) -> str:
        """What it is: `row`, or `pair` or `answer` of preferences."""
        return ("row", "answer", "pair")[len(self.compared)]

    @property
    def count(self) -> int:
        """Over how many tokens, pairs or answers the loss of the row is summed."""
        return 1 if self.compared else self.tokens

    def worsening(self, model: str, compared_with: str) -> float:
        """By how much the loss of a model is higher on the row than that of another one, for each `count`."""
        return (self.answers[model].loss - self.answers[compared_with].loss) / self.count

    def as_json(self) -> dict[str, Any]:
        """Plain values, behind the row's own fields: see `with_own_fields`. A number that is not finite is null."""
        values: dict[str, Any] = {
            "number": self.number, "where": self.where, "copies": self.copies, "prompt": self.prompt,
        }  # fmt: skip
        values |= {side: one.text for side, one in self.compared.items()}
        values |= {} if self.compared else {"expected": self.expected}
        values |= {"tokens": self.tokens, **{f"{side}_tokens": one.tokens for side, one in self.compared.items()}}
        for name, answer in self.answers.items():
            scores = finite({"loss": answer.loss / self.count, **answer.scores})
            values[name] = ({} if self.compared else {"answer": answer.text}) | scores
        return with_own_fields(self.fields, values)


@dataclass(frozen=True)
class Judging:
    """How answers are asked for and judged.

    Attributes:
        metrics: Those that were asked for. `exact_match` and `label_accuracy` are always computed, and need no more of
            an answer than there are tokens in the expected one.
        for_readers: Whether somebody reads the answers, so that they may be longer than that. They also may where
            another metric is asked for.
    """

    metrics: Sequence[Metric] = ()
    for_readers: bool = False

    def limit(self, row: TokenizedRow, context_length: int | None) -> int:
        """How many tokens the answer to a row may have."""
        expected = len(row.completion)
        if not self.for_readers and not any(metric.scores for metric in self.metrics):
            return expected
        longest = _TIMES * expected + _MORE
        room = context_length - len(row.prompt) if context_length is not None else longest
        return max(expected, min(longest, room))

    def scores(self, expected: str, answer: str) -> dict[str, float]:
        """Metric → score of an answer. Raises as `Metric.scores`."""
        return {
            name: one
            for metric in self.metrics
            if metric.scores
            for name, one in metric.scores(expected, answer).items()
        }


class RowAnswers:
    """What models do on rows with one answer: their loss, and greedy answers to their prompts.

    Attributes:
        rows: The distinct rows, without what models do on them.
    """

    def __init__(self, loaded: LoadedAdapter, dataset: TokenizedDataset, judging: Judging):
        """Raises as `check_expected` does. loaded: the adapter, as which the rows are rendered."""
        self.rows = distinct_rows(loaded, dataset)
        self._dataset, self._judging = dataset, judging
        check_expected(self.rows, judging)

    def answers(self, name: str, model: LoadedAdapter, engine: Engine) -> list[ModelAnswer]:
        """What a model does on each row.

        Args:
            name: `BASE`, which comes first, or another model.
            model: The adapter; while it is off, the base.
            engine: Computes its losses.
        """
        model.activate()
        nats = engine.losses(self._dataset, {row.number: row.copies for row in self.rows}).nats.tolist()
        found = self._answered(name, model) if any(row.prompt is not None for row in self.rows) else {}
        return [
            ModelAnswer(total, *found.get(row.number, (None, {}))) for row, total in zip(self.rows, nats, strict=True)
        ]

    def _answered(self, name: str, model: LoadedAdapter) -> dict[int, tuple[str, dict[str, float]]]:
        """Number of a row with a prompt → the answer and its scores."""
        context = load.context_length(model.model.config)
        expected = {row.number: row for row in self.rows if row.expected is not None}
        limits = {number: self._judging.limit(self._dataset.rows.row(number), context) for number in expected}
        found: dict[int, tuple[str, dict[str, float]]] = {}
        with counting(f"scoring {name}", len(expected)) as advance:
            for batch in _batches(self._dataset, limits, context):
                asked = [self._dataset.rows.row(number) for number in batch]
                completions = model.complete([row.prompt for row in asked], max(limits[number] for number in batch))
                for number, row, ids in zip(batch, asked, completions, strict=True):
                    found[number] = self._judged(model, expected[number], row.completion, ids, limits[number])
                advance(len(batch))
        return found

    def _judged(
        self, model: LoadedAdapter, row: ComparedRow, completion: Sequence[int], ids: list[int], limit: int
    ) -> tuple[str, dict[str, float]]:
        """An answer as text, and its scores. completion: what is expected. ids: of the answer, perhaps beyond limit."""
        right, text, beginning = row.expected or "", model.text(ids[:limit]), ids[: len(completion)]
        is_exact = tuple(beginning) == tuple(completion)
        is_label = model.text(beginning).startswith(right) if right else is_exact  # "" starts every text
        try:
            scores = self._judging.scores(right, text)
        except BadPatternError as error:
            raise _too_slow(error, row.where) from None
        return text, {EXACT_MATCH: float(is_exact), LABEL_ACCURACY: float(is_label)} | scores


class PreferenceAnswers:
    """What models do on preferences: the loss and the rewards of pairs or answers; see `RowAnswers`.

    Attributes:
        rows: The distinct pairs, or answers, without what models do on them.
        formula: What the loss and the rewards are.
        metrics: Model → its metrics.
    """

    def __init__(self, formula: Formula, loaded: LoadedAdapter, dataset: TokenizedDataset, seed: int):
        """dataset: all pairs or all answers. seed: of the training, see `ComparedRows`."""
        self.formula, self.rows, self._dataset = formula, distinct_rows(loaded, dataset), dataset
        compared = ComparedRows(dataset, loaded.data.max_length, seed)
        self._objective = PreferenceObjective(formula, {"held-out": compared})
        self._reference: PreferenceScores | None = None
        self.metrics: dict[str, PreferenceMetrics] = {}

    def answers(self, name: str, model: LoadedAdapter, engine: Engine) -> list[ModelAnswer]:
        """See `RowAnswers.answers`; the base, which is the reference, comes first."""
        model.activate()
        engine.losses(self._dataset, self._objective.copies(self._dataset), self._objective)
        assert self._objective.last is not None
        self._reference = self._reference or self._objective.last
        found = self._objective.last.compared_with(self._reference)
        self.metrics[name] = metrics = self._objective.metrics("held-out", found)
        scores: list[dict[str, float]] = [{} for _ in range(self._dataset.items)]
        for metric, (items, values) in metrics.by_item().items():
            for item, value in zip(items.tolist(), values.tolist(), strict=True):
                scores[item][metric] = value
        losses = self._objective.item_losses(found)
        return [ModelAnswer(losses[row.number], None, scores[row.number]) for row in self.rows]


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


def distinct_rows(loaded: LoadedAdapter, dataset: TokenizedDataset) -> list[ComparedRow]:
    """The rows, pairs or answers that differ and have supervised tokens, without what models do on them, in the order
    in which they first occur."""
    names, rows = sides(paired=not dataset.is_unpaired), list[ComparedRow]()
    for number, copies in dataset.copies().items():
        item = dataset.item(number)
        prompt, tokens = item[0].prompt, sum(row.supervised for row in item)
        compared = {
            names[row.side < 0]: ComparedAnswer(loaded.text(row.completion), row.supervised) for row in item if row.side
        }
        has_prompt = bool(compared) or prompt not in ((), (loaded.tokenizer.bos_token_id,))  # which begins every row
        text = loaded.tokenizer.decode(prompt) if has_prompt else None
        expected = loaded.text(item[0].completion) if has_prompt and not compared else None
        where, *elsewhere = (dataset.item(copy)[0].where for copy in copies)
        if tokens:
            row = ComparedRow(number, where, len(copies), text, expected, tokens, compared=compared)
            rows.append(replace(row, elsewhere=tuple(elsewhere)))
    return rows


def check_expected(rows: Sequence[ComparedRow], judging: Judging) -> None:
    """Check that the metrics can be computed for the rows.

    Raises:
        DataError: No row has a prompt, or a metric says nothing about an expected text.
        ConfigError: An expression takes too long.
    """
    texts = [(row.where, row.expected) for row in rows if row.expected is not None]
    if judging.metrics and not texts:
        what, fix = "no row has a prompt, so there is no answer to score", "leave it out, or give rows with prompts"
        raise DataError(Problem(Code.DATA_FIELD, what, key=OPTION, fix=fix))
    places: dict[str, list[str]] = {}
    for where, expected in texts:
        try:
            judging.scores(expected, "")
        except ExpectedTextError as error:
            places.setdefault(str(error), []).append(where)
        except BadPatternError as error:
            raise _too_slow(error, where) from None
    if places:
        raise DataError([_bad_texts(what, *wrong, total=len(texts)) for what, wrong in places.items()])


def _bad_texts(what: str, first: str, *others: str, total: int) -> Problem:
    """One problem for all rows whose expected texts a metric refuses for the same reason: the first row, and a
    count."""
    more = f", as in {len(others):,} more of {total:,} rows" if others else ""
    return Problem(Code.DATA_FIELD, f"{what}{more}", first, OPTION, "correct the rows, or leave this metric out")


def _too_slow(error: BadPatternError, where: str) -> ConfigError:
    return ConfigError(Problem(Code.USAGE_BAD_VALUE, f"an expression {error}", where, OPTION, "write it otherwise"))


def _batches(dataset: TokenizedDataset, limits: Mapping[int, int], context_length: int | None) -> Iterator[list[int]]:
    """Batches of rows with answers of similar length.

    The prompts of a batch are all completed to its longest limit. So a batch takes another row only if its longest
    prompt and its longest limit fit in the context together.

    limits: number of a row → how many tokens its answer may have.
    """
    batch: list[int] = []
    longest_prompt = 0
    for number in sorted(limits, key=lambda number: limits[number]):
        longest_prompt = max(longest_prompt, prompt := len(dataset.rows.row(number).prompt))
        is_too_long = context_length is not None and longest_prompt + limits[number] > context_length
        if batch and (is_too_long or len(batch) == _BATCH):
            yield batch
            batch, longest_prompt = [], prompt
        batch.append(number)
    if batch:
        yield batch
