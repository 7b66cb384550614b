"""`loratune evaluate`: compares an adapter with its base, or with another adapter, on held-out rows."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from loratune import data, kernels, outputs
from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.adapter.generation import LoadedAdapter
from loratune.codes import Code
from loratune.compare import behavior, collapse, prompted, reasoning
from loratune.compare.answers import (
    Judging,
    ModelAnswer,
    PreferenceAnswers,
    RowAnswers,
    distinct_rows,
    items_of,
    majority_answers,
)
from loratune.compare.base_results import BaseResults
from loratune.compare.classification import Classification
from loratune.compare.comparison import Comparison, compare_rows, not_finite
from loratune.compare.engine import Engine
from loratune.compare.labels import Labels
from loratune.compare.losses import LossComparison
from loratune.compare.metrics import ADAPTER, AGAINST, BASE, EXACT_MATCH, LOSS, MAJORITY, PROMPTED
from loratune.compare.objectives import Formula
from loratune.compare.preferences import formula_for, formula_of
from loratune.compare.tasks import TaskResults
from loratune.compare.temperature import temperature_of
from loratune.data import DatasetSplit, TokenizedDataset, splits
from loratune.data.formats import PAIRS, UNPAIRED
from loratune.data.report import remarks_on_weights
from loratune.data.splits import Overlap
from loratune.errors import AdapterError, DataError, ModelError
from loratune.events import note
from loratune.lora import attach, tensors
from loratune.model import load
from loratune.text import beginning, plural

Tasks = Callable[[LoadedAdapter], TaskResults]
"""Runs tasks on a loaded adapter and its base, see `harness.run`."""
_MOST_ROWS = 64
"""The most rows from which prompts with different expected answers are chosen; they are evenly spaced."""


@dataclass
class EvaluatedAdapter:
    """A loaded adapter, and what its base gives on the rows of an evaluation, which is the same at every scale.

    Attributes:
        loaded: The adapter on its base.
        known: Name → a result of the base.
    """

    loaded: LoadedAdapter
    known: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """A result of the base by its name, computed if it is not known yet."""
        if name not in self.known:
            self.known[name] = compute()
        return self.known[name]


@dataclass(frozen=True)
class UnrelatedText:
    """Text that no training row is about. kinds: kind → the numbers of its rows; empty without kinds."""

    split: DatasetSplit
    kinds: Mapping[str, Sequence[int]]


def evaluate(
    adapter: AdapterDirectory,
    split: DatasetSplit,
    *,
    against: AdapterDirectory | None = None,
    judging: Judging = Judging(),  # noqa: B008  it is frozen
    forgetting: UnrelatedText | None = None,
    tasks: Tasks | None = None,
    subject: EvaluatedAdapter | None = None,
) -> Comparison:
    """Score base, adapter and optionally another adapter on the same rows, rendered with the first adapter's settings.

    For preference pairs and unpaired preferences, rewards and the loss of the adapter's objective are computed.

    Args:
        adapter: The adapter.
        split: The rows.
        against: Another adapter of the same base, to compare with instead of the base.
        judging: The metrics for rows with one answer. Beside another adapter the first judges, or the loss if empty.
        forgetting: Unrelated text, on which adapter and base are also compared, as well as on everyday instructions.
        tasks: Runs tasks on the adapter and its base.
        subject: The adapter on its base, if already loaded, with what is known of the base on the same rows.

    Raises:
        AdapterError, ModelError, DataError: An adapter, the base or the rows cannot be used.
        ConfigError: Rows are longer than the model's context; an expression takes too long.
        NumericError: The loss of an adapter is not finite.
    """
    split.check_kind(split.kind)
    models = [subject.loaded] if subject is not None else _load(adapter, against)
    subject = subject or EvaluatedAdapter(models[0])
    first, vocabulary = models[0], _vocabulary_size(models[0])
    dataset = data.prepare(split, first.renderer, first.data, vocabulary)
    data.check_positions(dataset, first.data, load.context_length(first.model.config))
    rows = subject.once("rows", lambda: _rows(adapter, first, dataset, judging))
    with adapter.files.reading() as path:
        overlap: Overlap = subject.once("overlap", lambda: splits.find_overlap(split, path))
    remarks = [*split.remarks(), *dataset.report.splits(), *dataset.report.losses(), *overlap.remarks()]
    remarks += remarks_on_weights(dataset.rows.weights)
    if adapter.system and (bare := split.rows_without_system):
        what = f"{bare:,} of {len(split):,} rows have no system message, and are scored without one"
        all_had = f"all training rows had {beginning(adapter.system)}, which generate and chat add"
        remarks.append(f"{what}; {all_had}: add it to these rows to measure what they give")
    engine = engine_of(first)
    with first.without_adapter():
        found = {BASE: subject.once(BASE, lambda: rows.answers(BASE, first, engine))}
    found[ADAPTER] = _answers(rows, ADAPTER, adapter, first, engine)
    told = None
    if against is None and isinstance(rows, RowAnswers):
        alone = rows.as_baseline(found[BASE]) if rows.labels is not None else None
        prompt = partial(_prompted, adapter, first, engine, rows, split, alone, remarks)
        told = subject.once(PROMPTED, prompt)
    spaced = [one for row in rows.rows[:: -(-len(rows.rows) // _MOST_ROWS)] for one in dataset.item(row.items[0])]
    facts: dict[str, Any] = _forgetting(first, engine, forgetting, remarks) if forgetting else {}
    facts |= {
        "computed_by": engine.computed_by,
        "special_tokens": tuple(first.tokenizer.all_special_tokens),
        "sensitivity": collapse.prompt_sensitivity(first.model, first.without_adapter(), spaced),
        "tasks": tasks(first) if tasks else None,
        "overlap": overlap.to_dict(),
    }
    remarks += facts["tasks"].remarks if tasks else ()
    if against is not None:
        asked: dict[str, Any] = {"tokenizer": first.tokenizer, "renderer": first.renderer, "data": adapter.data}
        if len(models) == 1:
            del first, engine, subject
            models.clear()
            gc.collect()  # otherwise two bases would be in memory
            models = loading.load_all([against], adapter.base)
        same_tokens = asked["renderer"].digest == models[-1].renderer.digest
        remarks += _rendering_remarks(adapter, against, is_text=split.formats == ["text"], same_tokens=same_tokens)
        other = replace(models[-1], **asked)
        found[AGAINST] = _answers(rows, AGAINST, against, other, engine_of(other))
    if isinstance(rows, PreferenceAnswers):
        remarks += _objective_remarks(rows.formula, adapter, against)
        remarks += rows.metrics[ADAPTER].warnings(of_training=False)
        facts["objective"] = rows.formula
    answered = [
        replace(row, answers={name: by_row[place] for name, by_row in found.items()})
        for place, row in enumerate(rows.rows)
    ]
    metric = judging.metrics[0].name if judging.metrics else LOSS
    baselines = {MAJORITY: majority_answers(answered, judging)}
    if told is not None:
        facts["prompt"], baselines[PROMPTED] = told
    if isinstance(rows, RowAnswers) and rows.labels is not None:
        facts["classification"] = _classification(rows, found[ADAPTER])
    comparison = replace(compare_rows(answered, metric, remarks, baselines), **facts)
    count = plural(len(comparison.rows), comparison.item)
    why = collapse.reason(comparison.sensitivity, comparison.gain, f"these {count}", vocabulary)
    return replace(comparison, collapsed=why)


@dataclass(frozen=True)
class ScaleComparison:
    """An adapter at several scales, each compared with the base. comparisons: scale → comparison."""

    comparisons: Mapping[float, Comparison]

    def to_dict(self) -> outputs.Scales:
        """Plain values, without the rows."""
        return {"scales": [{"adapter_scale": scale, **found.to_dict()} for scale, found in self.comparisons.items()]}


def evaluate_scales(
    adapter: AdapterDirectory, split: DatasetSplit, scales: Sequence[float], loaded: LoadedAdapter, **options: Any
) -> ScaleComparison:
    """Compare an adapter, its update multiplied by each of some numbers, with its base.

    Args:
        adapter: The adapter.
        split: The rows.
        scales: The numbers.
        loaded: The adapter on its base.
        options: `judging` and `forgetting`, see `evaluate`.

    Raises:
        AdapterError: The adapter changes more than products B·A.
    """
    tensors.check_scalable(adapter.files)
    found, known = {}, dict[str, Any]()
    for scale in scales:
        note(f"adapter scale {scale:g}")
        with loaded.scaled(scale) as at_scale:
            found[scale] = evaluate(adapter, split, subject=EvaluatedAdapter(at_scale, known), **options)
    return ScaleComparison(found)


def _rows(
    adapter: AdapterDirectory, loaded: LoadedAdapter, dataset: TokenizedDataset, judging: Judging
) -> RowAnswers | PreferenceAnswers:
    if dataset.rows_per_example == 1 and not dataset.is_unpaired:
        return RowAnswers(loaded, dataset, judging, Labels.of_adapter(adapter.files, _vocabulary_size(loaded)))
    formula = formula_for(adapter.run, UNPAIRED if dataset.is_unpaired else PAIRS)
    return PreferenceAnswers(formula, loaded, dataset, adapter.run.training.seed if adapter.run is not None else 0)


def _answers(
    rows: RowAnswers | PreferenceAnswers, name: str, adapter: AdapterDirectory, loaded: LoadedAdapter, engine: Engine
) -> list[ModelAnswer]:
    """The results of an adapter on each row; the probabilities of labels have its own temperature."""
    if isinstance(rows, PreferenceAnswers):
        return rows.answers(name, loaded, engine)
    return rows.answers(name, loaded, engine, temperature_of(adapter.files))


def _classification(rows: RowAnswers, answers: Sequence[ModelAnswer]) -> Classification:
    """The labels that the adapter gives. answers: its results, with probabilities."""
    assert rows.labels is not None
    given = np.stack([one.probabilities for one in answers if one.probabilities is not None])
    copies = np.array([row.times for row in rows.rows], np.float64)
    prompts = [row.prompt or "" for row in rows.rows]
    return Classification(rows.labels.texts, np.array(rows.expected), given, copies, prompts)


def _prompted(
    adapter: AdapterDirectory,
    loaded: LoadedAdapter,
    engine: Engine,
    rows: RowAnswers,
    split: DatasetSplit,
    alone: list[ModelAnswer] | None,
    remarks: list[str],
) -> tuple[str, list[ModelAnswer]] | None:
    """What the best prompt tells the base, and the answers of the base to it; None if it is not prompted. alone: the
    labels that it chooses without being told anything."""
    told = rows.base_prompts
    if rows.labels is None and not told.is_asked:
        return None
    if (examples := prompted.questions(split, [row.where for row in rows.rows])) is None:
        if told.is_asked:
            remarks.append("the base was not prompted, as not every row is a question with one answer at its end")
        return None
    texts = rows.labels.texts if rows.labels is not None else ()
    best = (prompted.ALONE, alone) if alone is not None and not told.is_asked else None
    context = load.context_length(loaded.model.config)
    for name, (count, words) in told.variants(texts).items():
        try:
            shown = prompted.training_examples(adapter, examples, count) if count else []
            told.check_shown(len(shown))
            if count and not shown:  # then it is the base alone
                continue
            given = [*prompted.prompts(loaded.renderer, examples, shown, words, adapter.system)]
        except (DataError, ModelError) as error:
            if told.is_asked:
                raise
            remarks.append(f"the base could not be told the task by {name}: {error.problems[0].text}")
            continue
        longest = max(len(ids) + row.tokens for ids, row in zip(given, rows.rows, strict=True))
        if context is not None and longest > context:
            remarks.append(f"the base could not be told the task by {name}: {longest:,} tokens exceed its context")
            continue
        with loaded.without_adapter():
            answers = rows.to_prompts(engine, loaded, given)
        if best is None or _right(answers) > _right(best[1]):
            best = name.replace(plural(count, "example"), plural(len(shown), "example")), answers
    return best


def _right(answers: Sequence[ModelAnswer]) -> float:
    return sum(one.scores.get(EXACT_MATCH, 0.0) for one in answers)


def engine_of(loaded: LoadedAdapter) -> Engine:
    """The engine that computes the losses of an adapter, and of its base while the adapter is disabled."""
    loaded.activate()
    reader = partial(attach.adapted_linear, name=loaded.key)
    acceleration = kernels.accelerate(loaded.model, reader, fingerprint=loaded.fingerprint)
    return Engine(loaded.model, loaded.data, loaded.prompts.padding, acceleration)


def _objective_remarks(formula: Formula, adapter: AdapterDirectory, against: AdapterDirectory | None) -> Iterator[str]:
    """A line for each adapter that was trained with another objective or reference than it is evaluated with."""
    for one in (adapter, against):
        if one is None:
            continue
        trained = formula_of(one.run)
        if trained is None or trained.numbers() != formula.numbers():
            what = trained or "no objective that compares answers"
            yield f"{one.files.path}: was trained with {what}, and is measured by {formula}"
        elif trained.has_reference and one.run is not None and one.run.lora.start_from is not None:
            what = "was trained with the adapter that it started from as the reference, not the base"
            yield f"{one.files.path}: {what}"


def _vocabulary_size(loaded: LoadedAdapter) -> int:
    return int(loaded.model.config.get_text_config().vocab_size)


def _load(adapter: AdapterDirectory, against: AdapterDirectory | None) -> list[LoadedAdapter]:
    """Both adapters on one base; only the first if they cannot share one."""
    if against is not None:
        try:
            return loading.load_all([adapter, against])
        except AdapterError as error:
            if any(problem.code != Code.ADAPTER_UNSUPPORTED for problem in error.problems):
                raise
    return loading.load_all([adapter])


def _rendering_remarks(
    adapter: AdapterDirectory, against: AdapterDirectory, *, is_text: bool, same_tokens: bool
) -> Iterator[str]:
    """A line on how the rows may be rendered differently than in the training of the other adapter."""
    own, its = (
        one.data.model_dump() | {"truncation": one.data.truncation_of(is_text=is_text)} for one in (adapter, against)
    )
    compared = ("loss_on", "max_length", "truncation", "stride", "reasoning")
    keys = [f"data.{key}" for key in compared if own[key] != its[key]]
    differences = [*([] if same_tokens else ["tokenizer or chat template"]), *keys]
    differences += ["prompts that go through the chat template"] if adapter.chat != against.chat else []
    if differences:
        yield (
            f"{against.files.path}: was trained with another {', '.join(differences)}; its rows are those of "
            f"{adapter.files.path}"
        )


def _forgetting(loaded: LoadedAdapter, engine: Engine, text: UnrelatedText, remarks: list[str]) -> dict[str, Any]:
    """The attributes of `Comparison` on what the adapter has forgotten: `forgetting`, `behavior` and `reasoning`.

    Args:
        loaded: The adapter on its base.
        engine: Computes its losses.
        text: The text, which is cut to the model's context.
        remarks: Receives lines about the rows.

    Raises:
        NumericError: The loss of the adapter is not finite.
    """
    split = text.split
    context = load.context_length(loaded.model.config)
    most = min(split.section.max_length, data.UNRELATED_TOKENS if text.kinds else split.section.max_length)
    longest = min(most, context or most)
    section = split.section.model_copy(update={"max_length": longest})
    dataset = data.prepare(split, loaded.renderer, section, _vocabulary_size(loaded))
    lines = dataset.report.losses()
    if text.kinds:  # the passages of loratune may be cut: nothing is lost
        lines = [f"the passages are cut to {longest} tokens"] if longest < data.UNRELATED_TOKENS else []
    remarks += [f"unrelated text: {line}" for line in lines]
    rows = distinct_rows(loaded, dataset)
    copies = items_of(rows)
    loaded.activate()
    base = BaseResults.of(engine, loaded.without_adapter, loaded.fingerprint)
    before, after = base.losses(dataset, copies), engine.losses(dataset, copies)
    not_finite(rows, after.nats, ADAPTER)
    if what := not_finite(rows, before.nats, BASE):
        remarks.append(f"unrelated text: {what}, so it is not known what is forgotten")
    places = {row.number: place for place, row in enumerate(rows)}
    by_kind = {kind: [places[number] for number in own if number in places] for kind, own in text.kinds.items()}
    kinds = {kind: own for kind, own in by_kind.items() if own}
    return {
        "forgetting": LossComparison.of(before, after, "unrelated", kinds=kinds),
        "behavior": behavior.compare_on_base_answers(base, loaded.renderer),
        "reasoning": reasoning.compare(base, loaded.renderer),
    }
