"""What a model does on rows: its loss on each, and its greedy answer where the row has a prompt."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from loratune.adapter import generation
from loratune.adapter.generation import LoadedAdapter
from loratune.codes import Code
from loratune.config.patterns import BadPatternError
from loratune.data import TokenizedDataset
from loratune.data.holding_out import MAX_LABELS
from loratune.data.packing import pad
from loratune.data.rendering import TokenizedRow
from loratune.errors import ConfigError, DataError, Problem
from loratune.evaluation.metrics import OPTION, ExpectedTextError, Metric
from loratune.evaluation.results import EXACT_MATCH, LABEL_ACCURACY, EvaluatedRow, ModelAnswer
from loratune.kernels import row_losses
from loratune.model import load

_BATCH_TOKENS = 8192
"""Tokens of a batch, whose logits are in memory at once: 1.6 GB in float32 with a vocabulary of 50,000."""
_TIMES, _MORE = 2, 32
"""A whole answer may have so many times the tokens of the expected one, and so many more."""

_ROWS_PER_LABEL = 4
"""Expected answers are labels where each stands in so many rows on average, and there are not too many of them."""
_PLACES = 3
"""How many places of further rows a message names."""

Advance = Callable[[int], None]
"""Takes how many rows were done since its last call."""


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
        """Figure → score of an answer. Raises as `Metric.scores`."""
        scores: dict[str, float] = {}
        for metric in self.metrics:
            scores |= metric.scores(expected, answer) if metric.scores else {}
        return scores


class Scorer(Protocol):
    """Says what models do on some rows.

    Attributes:
        rows: The distinct rows, or pairs of answers, without what models do on them.
    """

    rows: list[EvaluatedRow]

    @property
    def passes(self) -> int:
        """How many rows a model is run on."""

    def answers(self, name: str, model: LoadedAdapter, advance: Advance = lambda _: None) -> list[ModelAnswer]:
        """What a model does on each row.

        Args:
            name: `BASE`, which comes first, or another model.
            model: The adapter; inside its `without_adapter`, the base.
            advance: Called with how many rows were done, of those that it is run on.
        """


class RowScorer:
    """Scores rows as they stand: their loss, and greedy answers to their prompts. See `Scorer`."""

    def __init__(self, loaded: LoadedAdapter, dataset: TokenizedDataset, judging: Judging):
        """Raises as `check_expected` does. loaded: the adapter, as which the rows are rendered."""
        self.rows = distinct_rows(loaded, dataset)
        self._dataset, self._judging = dataset, judging
        check_expected(self.rows, judging)

    @property
    def passes(self) -> int:
        """See `Scorer`."""
        return len(self.rows) + sum(row.prompt is not None for row in self.rows)

    def answers(self, name: str, model: LoadedAdapter, advance: Advance = lambda _: None) -> list[ModelAnswer]:
        """See `Scorer`."""
        dataset, rows, judging = self._dataset, self.rows, self._judging
        nats = losses(model, dataset, [row.number for row in rows], advance)
        found: dict[int, tuple[str, dict[str, float]]] = {}
        expected = {row.number: (row.where, row.expected) for row in rows if row.expected is not None}
        limits = {number: judging.limit(dataset.rows.row(number), _context(model)) for number in expected}
        for batch in _batches(dataset, limits, _context(model)):
            asked = [dataset.rows.row(number) for number in batch]
            completions = model.complete([row.prompt for row in asked], max(limits[number] for number in batch))
            for number, row, longer in zip(batch, asked, completions, strict=True):
                where, right = expected[number]
                text, beginning = model.text(longer[: limits[number]]), longer[: len(row.completion)]
                is_exact = tuple(beginning) == row.completion
                is_label = model.text(beginning).startswith(right) if right else is_exact  # all begin with an empty one
                scores = {EXACT_MATCH: float(is_exact), LABEL_ACCURACY: float(is_label)}
                try:
                    found[number] = text, scores | judging.scores(right, text)
                except BadPatternError as error:
                    raise _too_slow(error, where) from None
            advance(len(batch))
        return [
            ModelAnswer(float(total), *found.get(row.number, (None, {}))) for row, total in zip(rows, nats, strict=True)
        ]


def majority_answers(rows: Sequence[EvaluatedRow], judging: Judging) -> list[ModelAnswer]:
    """What always to give the most frequent of the expected answers comes to on each row; empty where these are not
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


def distinct_rows(loaded: LoadedAdapter, dataset: TokenizedDataset) -> list[EvaluatedRow]:
    """The rows that differ in their ids or labels, without answers, in the order in which they first occur."""
    rows: list[EvaluatedRow] = []
    for number, copies in dataset.copies().items():
        row = dataset.rows.row(number)
        if row.supervised:
            has_prompt = row.prompt not in ((), (loaded.tokenizer.bos_token_id,))  # more than what begins every row
            prompt = loaded.tokenizer.decode(row.prompt) if has_prompt else None
            expected = loaded.text(row.completion) if has_prompt else None
            places = tuple(dataset.rows.row(copy).where for copy in copies[1:])
            rows.append(
                EvaluatedRow(number, row.where, len(copies), prompt, expected, row.supervised, elsewhere=places)
            )
    return rows


def check_expected(rows: Sequence[EvaluatedRow], judging: Judging) -> None:
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
        raise DataError(Problem(Code.EVALUATE_NO_PROMPT, what, key=OPTION, fix=fix))
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
    """The problem of all rows of whose expected texts a metric says the same: that of the first, and how many more."""
    first, *others = wrong
    more = ""
    if others:
        named = ", ".join(others[:_PLACES]) + (", ..." if len(others) > _PLACES else "")
        more = f", as in {len(others):,} more of {total:,} rows: {named}"
    fix = "correct the rows, or leave this metric out"
    return Problem(Code.EVALUATE_EXPECTED_TEXT, f"{what}{reason}{more}", first, OPTION, fix)


def _too_slow(error: BadPatternError, where: str) -> ConfigError:
    return ConfigError(Problem(Code.USAGE_BAD_METRIC, f"an expression {error}", where, OPTION, "write it otherwise"))


def losses(
    model: LoadedAdapter, dataset: TokenizedDataset, numbers: Sequence[int], advance: Advance = lambda _: None
) -> NDArray[np.float64]:
    """The loss of a model on rows of a dataset; see `losses_of`. numbers: which of them."""
    lengths = dataset.rows.lengths[list(numbers)]
    return losses_of(model, lambda place: dataset.rows[numbers[place]], lengths, advance)


@torch.inference_mode()
def losses_of(
    model: LoadedAdapter,
    row: Callable[[int], dict[str, Any]],
    lengths: NDArray[np.integer[Any]],
    advance: Advance = lambda _: None,
) -> NDArray[np.float64]:
    """The loss of a model on rows, computed by PEFT's own layers: in float32 where those of answers round.

    Args:
        model: The adapter; inside its `without_adapter`, the base.
        row: From its place to the `input_ids` and `labels` of a row.
        lengths: (rows,), how many ids each has.
        advance: Called with how many rows were done.

    Returns:
        (rows,), in nats, summed over the supervised tokens of each row.
    """
    model.activate()
    model.model.eval()
    found = np.empty(len(lengths))
    for places in _by_length(lengths, 1 if model.prompts.mixes_padding else generation.BATCH):
        rows = [row(place) for place in places]
        first = min(_first_supervised(one["labels"]) for one in rows)
        inputs = model.prompts.batch([one["input_ids"] for one in rows], "right", first=max(0, first - 1))
        labels = pad(rows, model.prompts.padding)["labels"][:, -inputs["input_ids"].shape[1] :]
        inputs["use_cache"] = "cache" in inputs
        found[places] = row_losses(model.model, inputs, labels.to(model.model.device)).numpy()
        advance(len(places))
    return found


def _first_supervised(labels: Sequence[int]) -> int:
    return next((place for place, label in enumerate(labels) if label >= 0), len(labels))


def _by_length(lengths: NDArray[np.integer[Any]], size: int) -> Iterator[list[int]]:
    """Batches of rows of similar length, so that little is padded, and of so many at most. Yields their places."""
    batch: list[int] = []
    for place in np.argsort(lengths, kind="stable").tolist():
        if batch and (len(batch) == size or (len(batch) + 1) * int(lengths[place]) > _BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _context(model: LoadedAdapter) -> int | None:
    return load.context_length(model.model.config)


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
        if batch and (is_too_long or len(batch) == generation.BATCH):
            yield batch
            batch, longest_prompt = [], 0
        batch.append(number)
        longest_prompt = max(longest_prompt, prompt)
    if batch:
        yield batch
