"""Scores models on rows: the loss of each row, greedy answers with their metrics, and rewards of preferences.

The loss and the rewards of preferences are computed by the objective that the adapter was trained with, if it fits the
rows; the reference is the base. All models are scored with this objective, even adapters trained with another one.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from loratune.adapter.generation import LoadedAdapter
from loratune.codes import Code
from loratune.compare.classification import Classification
from loratune.compare.engine import Engine
from loratune.compare.labels import Labels, probabilities
from loratune.compare.metrics import (
    ACCURACY,
    BRIER,
    EXACT_MATCH,
    LABEL_ACCURACY,
    LOG_LOSS,
    OPTION,
    TOOL_CALL,
    ExpectedTextError,
    Metric,
    Values,
    sides,
)
from loratune.compare.objectives import Formula, PreferenceMetrics
from loratune.compare.preferences import ComparedRows, PreferenceObjective, PreferenceScores
from loratune.compare.prompted import BasePrompts
from loratune.compare.tool_calls import Call, CallForm, InvalidCallError, call_error, call_scores
from loratune.compare.verdict import label_of
from loratune.config.expressions import BadPatternError
from loratune.data import TokenizedDataset
from loratune.data.rendering.spans import TokenizedRow
from loratune.data.sources.rows import with_own_fields
from loratune.errors import ConfigError, DataError, Problem
from loratune.events import counting
from loratune.model import load
from loratune.statistics import finite
from loratune.text import plural

_OF_LABELS = (ACCURACY, LOG_LOSS, BRIER)
_BATCH = 32
"""Prompts of a generation batch."""
_TIMES, _MORE = 2, 32
"""The token limit of a whole answer is `_TIMES` the expected tokens plus `_MORE`."""


@dataclass(frozen=True)
class ModelAnswer:
    """The result of one model on one row.

    Attributes:
        loss: The loss, summed over the supervised tokens of the row; for preferences, the loss of the pair or answer.
        text: The greedy answer, without the end token; None if the row has no prompt, or is a preference.
        scores: Metric → the score of the row; empty for rows with one answer that have no prompt.
        probabilities: (labels,) of each label among all, if answers are labels.
        wrong_arguments: The names of arguments that differ, if only arguments of its calls do.
    """

    loss: float
    text: str | None
    scores: Mapping[str, float]
    probabilities: Values | None = None
    wrong_arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class ComparedAnswer:
    """An answer of a preference row: its text and its number of tokens."""

    text: str
    tokens: int


@dataclass(frozen=True)
class ComparedRow:
    """One distinct row, or pair of answers, and the results of each model on it.

    Attributes:
        number: Its number among the rows that were not dropped, from 0; for copies, the number of the first one.
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
        calls: The calls of the expected answer, if calls are compared.
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
    calls: Sequence[Call] = ()

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
        """The loss of a model minus the loss of another one on the row, per token, pair or answer."""
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
            values[name] |= {"wrong_arguments": [*answer.wrong_arguments]} if answer.wrong_arguments else {}
        return with_own_fields(self.fields, values)


@dataclass(frozen=True)
class Judging:
    """Settings for generating and scoring answers.

    Attributes:
        metrics: The requested metrics. `exact_match` and `label_accuracy` are always computed; they need only as many
            tokens as the expected answer has.
        for_readers: Whether the answers will be read, so that they may be longer than the expected ones. Other metrics
            also allow longer answers.
        base_prompts: How the base is told the task, to compare with its answers too.
    """

    metrics: Sequence[Metric] = ()
    for_readers: bool = False
    base_prompts: BasePrompts = BasePrompts()  # noqa: RUF009  it is frozen

    def limit(self, row: TokenizedRow, context_length: int | None) -> int:
        """The maximum number of tokens of the answer to a row."""
        expected = len(row.completion)
        if not self.for_readers and all(metric.name in (EXACT_MATCH, LABEL_ACCURACY) for metric in self.metrics):
            return expected
        longest = _TIMES * expected + _MORE
        room = context_length - len(row.prompt) if context_length is not None else longest
        return max(expected, min(longest, room))

    @property
    def compares_calls(self) -> bool:
        """Whether the calls of answers are compared."""
        return any(metric.name == TOOL_CALL for metric in self.metrics)

    def scores(self, expected: str, answer: str) -> dict[str, float]:
        """Metric → score of an answer, without those of its calls. Raises as `Metric.scores`."""
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

    def __init__(
        self, loaded: LoadedAdapter, dataset: TokenizedDataset, judging: Judging, labels: Labels | None = None
    ):
        """Raises as `check_expected` and `_call_form` do.

        Args:
            loaded: The adapter that the rows were rendered for.
            dataset: The rows.
            judging: How their answers are judged.
            labels: The labels that the adapter was trained on; by default those of the rows, if they are labels.
        """
        self.rows = distinct_rows(loaded, dataset)
        self._dataset, self._judging, self.base_prompts = dataset, judging, judging.base_prompts
        check_expected(self.rows, judging)
        self._form = _call_form(loaded) if judging.compares_calls else None
        if self._form is not None:
            self.rows = self._with_calls(loaded, self._form)
        items = [dataset.rows.row(row.items[0]) for row in self.rows if row.expected is not None]
        texts = [row.expected or "" for row in self.rows if row.expected is not None]
        own = [(text, row.completion) for text, row in zip(texts, items, strict=True)]
        self.labels = labels or Labels.of(own)
        if self.labels is not None and (len(texts) < len(self.rows) or not self.labels.are_those_of(own)):
            self.labels = None
        self.expected = [*map(self.labels.number, texts)] if self.labels is not None else []
        self.prompts = [row.prompt for row in items]

    def answers(self, name: str, model: LoadedAdapter, engine: Engine, temperature: float = 1.0) -> list[ModelAnswer]:
        """The results of a model on each row.

        Args:
            name: The name of the model; `BASE` must come first.
            model: The adapter; while it is disabled, the base.
            engine: Computes the losses.
            temperature: That of the probabilities of its labels.
        """
        model.activate()
        nats = engine.losses(self._dataset, items_of(self.rows)).nats.tolist()
        found = self._answered(name, model) if any(row.prompt is not None for row in self.rows) else {}
        none = ModelAnswer(math.nan, None, {})
        answers = [
            replace(found.get(row.items[0], none), loss=total) for row, total in zip(self.rows, nats, strict=True)
        ]
        if self.labels is None:
            return answers
        chosen = self.chosen(engine, self.prompts, temperature)
        return [
            replace(own, scores={**own.scores, **scores}, probabilities=of_labels)
            for own, (scores, of_labels) in zip(answers, chosen, strict=True)
        ]

    def chosen(
        self, engine: Engine, prompts: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> Iterator[tuple[dict[str, float], Values]]:
        """For a prompt of each row, the scores of choosing the most probable label, and the probabilities of all."""
        assert self.labels is not None
        found = probabilities(self.labels.score(engine, prompts), temperature)
        known = Classification(self.labels.texts, np.array(self.expected), found, np.ones(len(found)), [])
        for right, loss, brier, own in zip(known.right, known.log_losses, known.briers, found, strict=True):
            yield {ACCURACY: float(right), LOG_LOSS: float(loss), BRIER: float(brier)}, own

    def as_baseline(self, answers: Sequence[ModelAnswer]) -> list[ModelAnswer]:
        """The labels that a model has chosen, as the answers of a baseline. answers: its results, with labels."""
        assert self.labels is not None
        return [self._choice({name: one.scores[name] for name in _OF_LABELS}, one.probabilities) for one in answers]

    def _choice(self, scores: Mapping[str, float], of_labels: Values | None) -> ModelAnswer:
        """A label that was chosen, as if it had been written: it has its end."""
        assert self.labels is not None and of_labels is not None
        written = {EXACT_MATCH: scores[ACCURACY], LABEL_ACCURACY: scores[ACCURACY]}
        return ModelAnswer(math.nan, self.labels.texts[int(of_labels.argmax())], {**written, **scores}, of_labels)

    def to_prompts(self, engine: Engine, model: LoadedAdapter, prompts: Sequence[Sequence[int]]) -> list[ModelAnswer]:
        """The answers of the base to a prompt of each row, as those of a baseline: labels that are chosen, or what is
        written. Its loss is NaN."""
        if self.labels is not None:
            return [self._choice(scores, own) for scores, own in self.chosen(engine, prompts)]
        found: list[ModelAnswer] = []
        with counting("scoring the prompted base", len(prompts)) as advance:
            for row, ids in zip(self.rows, prompts, strict=True):
                expected = self._dataset.rows.row(row.items[0]).completion
                (answer,) = model.complete([ids], len(expected))
                found.append(self._judged(model, row, expected, answer, len(expected)))
                advance(1)
        return found

    def _with_calls(self, loaded: LoadedAdapter, form: CallForm) -> list[ComparedRow]:
        """The rows with the calls that they expect. Raises DataError: some cannot be read."""
        rows, invalid = list[ComparedRow](), list[str]()
        for row in self.rows:
            completion = self._dataset.rows.row(row.items[0]).completion
            try:
                calls = form.parse(_whole_text(loaded, completion)) if row.expected is not None else ()
                rows.append(replace(row, calls=calls))
            except InvalidCallError:
                invalid.append(row.where)
        if invalid:
            what = f"the calls of {plural(len(invalid), 'expected answer')} cannot be read"
            raise DataError(Problem(Code.DATA_FIELD, what, invalid[0], OPTION, "correct the rows, or leave it out"))
        return rows

    def _answered(self, name: str, model: LoadedAdapter) -> dict[int, ModelAnswer]:
        """Item of a row with a prompt → the answer and its scores, without its loss."""
        context = load.context_length(model.model.config)
        expected = {row.items[0]: row for row in self.rows if row.expected is not None}
        limits = {number: self._judging.limit(self._dataset.rows.row(number), context) for number in expected}
        found: dict[int, ModelAnswer] = {}
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
    ) -> ModelAnswer:
        """An answer and its scores, its loss being NaN. completion: the expected ids. ids: the answer, possibly beyond
        limit."""
        right, text, beginning = row.expected or "", model.text(ids[:limit]), ids[: len(completion)]
        is_exact = tuple(beginning) == tuple(completion)
        is_label = model.text(beginning).startswith(right) if right else is_exact  # "" starts every text
        try:
            scores = self._judging.scores(right, text)
        except BadPatternError as error:
            raise _too_slow(error, row.where) from None
        scores = {EXACT_MATCH: float(is_exact), LABEL_ACCURACY: float(is_label)} | scores
        if self._form is None:
            return ModelAnswer(math.nan, text, scores)
        try:
            calls: Sequence[Call] | None = self._form.parse(_whole_text(model, ids[:limit]))
        except InvalidCallError:
            calls = None
        what, wrong = call_error(row.calls, calls)
        scores |= call_scores(what, is_expected=bool(row.calls))
        return ModelAnswer(math.nan, text, scores, wrong_arguments=wrong)


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
    if (text := label_of(copies)) is None:
        return []
    chooses = any(ACCURACY in one.scores for row in rows for one in row.answers.values())  # also among labels

    def answer(expected: str) -> ModelAnswer:
        is_label = text.startswith(expected) if expected else not text
        is_right = float(text == expected)
        scores = {EXACT_MATCH: is_right, LABEL_ACCURACY: float(is_label)} | ({ACCURACY: is_right} if chooses else {})
        return ModelAnswer(math.nan, text, scores | judging.scores(expected, text))

    found = [ModelAnswer(math.nan, None, {}) if row.expected is None else answer(row.expected) for row in rows]
    if not judging.compares_calls:
        return found
    calls = next(row.calls for row in rows if row.expected == text)
    return [
        one if row.expected is None else replace(one, scores={
            **one.scores, **call_scores(call_error(row.calls, calls)[0], is_expected=bool(row.calls)),
        })
        for row, one in zip(rows, found, strict=True)
    ]  # fmt: skip


def _call_form(loaded: LoadedAdapter) -> CallForm:
    """How the answers of an adapter have calls. Raises ConfigError: they have none, or in a form that is not known."""
    if loaded.chat and (form := CallForm.of(loaded.renderer.template())) is not None:
        return form
    what = "the chat template writes no tool calls, or in a form that is not known"
    what = what if loaded.chat else "the adapter was trained on text without a chat template, which has no tool calls"
    fix = "leave `tool_call` out; `json` and `regex:PATTERN` compare text"
    raise ConfigError(Problem(Code.USAGE_CONFLICT, what, loaded.where, OPTION, fix))


def _whole_text(loaded: LoadedAdapter, ids: Sequence[int]) -> str:
    """An answer with its special tokens, without the end of sequence."""
    has_end = bool(ids) and ids[-1] == loaded.renderer.eos
    text: str = loaded.tokenizer.decode(ids[:-1] if has_end else ids)
    return text


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
    problems = []
    for what, (first, *others) in places.items():
        more = f", as in {len(others):,} more of {len(texts):,} rows" if others else ""
        fix = "correct the rows, or leave this metric out"
        problems.append(Problem(Code.DATA_FIELD, f"{what}{more}", first, OPTION, fix))
    if problems:
        raise DataError(problems)


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
