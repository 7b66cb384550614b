"""Scores models on rows: the loss of each row, greedy answers with their metrics, and rewards of preferences.

The loss and the rewards of preferences are those of the objective that the adapter was trained with, if it fits the
rows; the reference is the base. All models are scored with this objective, even adapters trained with another one.
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
"""Prompts of a generation batch."""
_TIMES, _MORE = 2, 32
"""The token limit of a whole answer is `_TIMES` the expected tokens plus `_MORE`."""
_ROWS_PER_LABEL = 4
"""Expected answers count as labels if each occurs in this many rows on average, and there are at most `MAX_LABELS`."""


@dataclass(frozen=True)
class ModelAnswer:
    """The result of one model on one row.

    Attributes:
        loss: The loss, summed over the supervised tokens of the row; for preferences, the loss of the pair or answer.
        text: The greedy answer, without the end token; None if the row has no prompt, or is a preference.
        scores: Metric → the score of the row; empty for rows with one answer that have no prompt.
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
    """One distinct row, or pair of answers, and the results of each model on it.

    Attributes:
        number: Its number among the rows that were not dropped, from 0; for copies, that of the first.
        where: Its place in its file.
        copies: The number of copies, including the row itself.
        prompt: The rendered prompt as text; None if the row has none.
        expected: The expected answer as text; None if the row has no prompt, or is a preference.
        tokens: Supervised tokens.
        answers: Model → its result; `base`, `adapter`, and `against` if there is one.
        compared: For preferences: `chosen` and `rejected`, or one of `desirable` and `undesirable` → the answer.
        elsewhere: The places of its other copies.
        fields: The row's own fields as plain values; empty unless requested.
        weight: How often the row counts in means, if rows have weights; None: as often as it has copies.
        items: The numbers of the items that the row is: of its blocks, if it was split.
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
    weight: float | None = None
    items: range = range(0)

    @property
    def times(self) -> float:
        """How often the row counts in means."""
        return self.copies if self.weight is None else self.weight

    def at_places(self, fields: Mapping[str, Mapping[str, Any]]) -> Iterator["ComparedRow"]:
        """The row and its copies, each with its own place and fields. fields: place → fields."""
        for place in (self.where, *self.elsewhere):
            yield replace(self, where=place, fields=fields[place])

    @property
    def item(self) -> str:
        """The word for the row: `row`, or `pair` or `answer` for preferences."""
        return ("row", "answer", "pair")[len(self.compared)]

    @property
    def count(self) -> int:
        """The number of tokens, pairs or answers over which the loss of the row is summed."""
        return 1 if self.compared else self.tokens

    def worsening(self, model: str, compared_with: str) -> float:
        """The loss of a model minus that of another one on the row, per token, pair or answer."""
        return (self.answers[model].loss - self.answers[compared_with].loss) / self.count

    def to_dict(self) -> dict[str, Any]:
        """Plain values, after the row's own fields: see `with_own_fields`. Numbers that are not finite are null."""
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
    """Settings for generating and scoring answers.

    Attributes:
        metrics: The requested metrics. `exact_match` and `label_accuracy` are always computed; they need only as many
            tokens as the expected answer has.
        for_readers: Whether the answers will be read, so that they may be longer than the expected ones. Other metrics
            also allow longer answers.
    """

    metrics: Sequence[Metric] = ()
    for_readers: bool = False

    def limit(self, row: TokenizedRow, context_length: int | None) -> int:
        """The maximum number of tokens of the answer to a row."""
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
    """Scores models on rows with one answer: losses, and greedy answers to the prompts.

    Attributes:
        rows: The distinct rows, without results of models.
    """

    def __init__(self, loaded: LoadedAdapter, dataset: TokenizedDataset, judging: Judging):
        """Raises as `check_expected` does. loaded: the adapter that the rows were rendered for."""
        self.rows = distinct_rows(loaded, dataset)
        self._dataset, self._judging = dataset, judging
        check_expected(self.rows, judging)

    def answers(self, name: str, model: LoadedAdapter, engine: Engine) -> list[ModelAnswer]:
        """The results of a model on each row.

        Args:
            name: The name of the model; `BASE` must come first.
            model: The adapter; while it is disabled, the base.
            engine: Computes the losses.
        """
        model.activate()
        nats = engine.losses(self._dataset, items_of(self.rows)).nats.tolist()
        found = self._answered(name, model) if any(row.prompt is not None for row in self.rows) else {}
        return [
            ModelAnswer(total, *found.get(row.items[0], (None, {}))) for row, total in zip(self.rows, nats, strict=True)
        ]

    def _answered(self, name: str, model: LoadedAdapter) -> dict[int, tuple[str, dict[str, float]]]:
        """Item of a row with a prompt → the answer and its scores."""
        context = load.context_length(model.model.config)
        expected = {row.items[0]: row for row in self.rows if row.expected is not None}
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
        """An answer as text, and its scores. completion: the expected ids. ids: the answer, possibly beyond limit."""
        right, text, beginning = row.expected or "", model.text(ids[:limit]), ids[: len(completion)]
        is_exact = tuple(beginning) == tuple(completion)
        is_label = model.text(beginning).startswith(right) if right else is_exact  # "" starts every text
        try:
            scores = self._judging.scores(right, text)
        except BadPatternError as error:
            raise _too_slow(error, row.where) from None
        return text, {EXACT_MATCH: float(is_exact), LABEL_ACCURACY: float(is_label)} | scores


class PreferenceAnswers:
    """Scores models on preferences: losses and rewards of pairs or answers; see `RowAnswers`.

    Attributes:
        rows: The distinct pairs, or answers, without results of models.
        formula: The objective that defines the loss and the rewards.
        metrics: Model → its metrics.
    """

    def __init__(self, formula: Formula, loaded: LoadedAdapter, dataset: TokenizedDataset, seed: int):
        """dataset: preference pairs, or unpaired preferences. seed: the seed of training, see `ComparedRows`."""
        self.formula, self.rows, self._dataset = formula, distinct_rows(loaded, dataset), dataset
        compared = ComparedRows(dataset, loaded.data.max_length, seed)
        self._objective = PreferenceObjective(formula, {"held-out": compared})
        self._reference: PreferenceScores | None = None
        self.metrics: dict[str, PreferenceMetrics] = {}

    def answers(self, name: str, model: LoadedAdapter, engine: Engine) -> list[ModelAnswer]:
        """See `RowAnswers.answers`; the base must come first, as it is the reference."""
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
        return [ModelAnswer(losses[row.items[0]], None, scores[row.items[0]]) for row in self.rows]


def majority_answers(rows: Sequence[ComparedRow], judging: Judging) -> list[ModelAnswer]:
    """The scores on each row of a baseline that always gives the most frequent expected answer; empty unless answers
    are labels. Its loss is NaN, as it has no probabilities. Raises as `Judging.scores`."""
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


def items_of(rows: Sequence[ComparedRow]) -> dict[int, float]:
    """The items to score for some rows, and how often each counts."""
    return {number: row.times for row in rows for number in row.items}


def distinct_rows(loaded: LoadedAdapter, dataset: TokenizedDataset) -> list[ComparedRow]:
    """The distinct rows, pairs or answers with supervised tokens, in the order of their first occurrence, without
    results of models. Rows that were split are whole."""
    names, rows = sides(paired=not dataset.is_unpaired), list[ComparedRow]()
    groups, owners = dataset.copies(), dataset.rows.owners
    weights = dataset.weighted({number: len(copies) for number, copies in groups.items()})
    for number, weight in weights.items():
        item, copies = dataset.item(number), groups[number]
        prompt, tokens = item[0].prompt, sum(row.supervised for row in item)
        if item[0].block:
            tokens, items = rows[-1].tokens + tokens, range(rows[-1].items[0], number + 1)
            rows[-1] = replace(rows[-1], prompt=None, expected=None, tokens=tokens, items=items)
            continue
        compared = {
            names[row.side < 0]: ComparedAnswer(loaded.text(row.completion), row.supervised) for row in item if row.side
        }
        has_prompt = bool(compared) or prompt not in ((), (loaded.tokenizer.bos_token_id,))  # BOS begins every row
        text = loaded.tokenizer.decode(prompt) if has_prompt else None
        expected = loaded.text(item[0].completion) if has_prompt and not compared else None
        where, *elsewhere = (dataset.item(copy)[0].where for copy in copies)
        if tokens:
            of_row = number if owners is None else int(owners[number])
            row = ComparedRow(of_row, where, len(copies), text, expected, tokens, compared=compared)
            rows.append(replace(row, elsewhere=tuple(elsewhere), weight=weight, items=range(number, number + 1)))
    return rows


def check_expected(rows: Sequence[ComparedRow], judging: Judging) -> None:
    """Check that the metrics can be computed for the rows.

    Raises:
        DataError: No row has a prompt, or a metric is undefined for an expected text.
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
    """One problem for all rows whose expected texts a metric rejects for the same reason: the first row and a count."""
    more = f", as in {len(others):,} more of {total:,} rows" if others else ""
    return Problem(Code.DATA_FIELD, f"{what}{more}", first, OPTION, "correct the rows, or leave this metric out")


def _too_slow(error: BadPatternError, where: str) -> ConfigError:
    return ConfigError(Problem(Code.USAGE_BAD_VALUE, f"an expression {error}", where, OPTION, "write it otherwise"))


def _batches(dataset: TokenizedDataset, limits: Mapping[int, int], context_length: int | None) -> Iterator[list[int]]:
    """Batches of rows with answers of similar length.

    All prompts of a batch are completed up to its largest limit. So a row joins a batch only if the longest prompt and
    the largest limit together fit into the context.

    limits: number of a row → the maximum number of tokens of its answer.
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
