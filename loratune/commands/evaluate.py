"""`loratune evaluate`: how well an adapter does on held-out rows, compared with its base or with another adapter."""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from loratune import data, kernels
from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.adapter.generation import LoadedAdapter
from loratune.codes import Code
from loratune.compare import collapse, requirements
from loratune.compare.answers import (
    Judging,
    PreferenceAnswers,
    RowAnswers,
    check_positions,
    distinct_rows,
    majority_answers,
)
from loratune.compare.collapse import PromptSensitivity
from loratune.compare.comparison import Comparison, compare_rows, not_finite
from loratune.compare.engine import Engine, Scorer
from loratune.compare.losses import Difference, compare
from loratune.compare.objectives import Formula, formula_for, formula_of
from loratune.compare.requirements import Requirement
from loratune.compare.results import ADAPTER, AGAINST, BASE, LOSS, ComparedRow, ModelAnswer
from loratune.compare.tasks import TaskResults
from loratune.data import DatasetSplit, TokenizedDataset
from loratune.data.formats import PAIRS, UNPAIRED
from loratune.data.row_hashes import Overlap
from loratune.errors import AdapterError
from loratune.events import counting, no_advance
from loratune.lora import attach
from loratune.model import load
from loratune.text import plural

Tasks = Callable[[LoadedAdapter], TaskResults]
"""Runs tasks on a loaded adapter and its base, see `harness.run`."""
_MOST_ROWS = 64
"""Rows among which prompts are chosen that expect different answers."""


def evaluate(
    adapter: AdapterDirectory,
    split: DatasetSplit,
    *,
    against: AdapterDirectory | None = None,
    judging: Judging = Judging(),  # noqa: B008  it is frozen
    forgetting: DatasetSplit | None = None,
    tasks: Tasks | None = None,
    overlap: Overlap | None = None,
    required: Sequence[Requirement] = (),
) -> Comparison:
    """Score base, adapter and perhaps another adapter on the same rows, rendered as the first adapter was trained.

    Of preference pairs and unpaired preferences, rewards and the loss of the adapter's objective are computed.

    Args:
        adapter: The adapter.
        split: The rows.
        against: Another adapter of the same base, which the adapter is compared with instead of the base.
        judging: The metrics of rows with one answer. The verdict is about the first; without any, about the loss.
        forgetting: Unrelated text, on which adapter and base are compared as well.
        tasks: Runs tasks on the adapter and its base as well.
        overlap: What of the rows is also in train.
        required: What the user requires of the adapter.

    Raises:
        AdapterError, ModelError, DataError: An adapter, the base or the rows cannot be used.
        ConfigError: Rows are longer than the model's context; an expression takes too long.
        NumericError: The loss of an adapter is not finite.
    """
    split.check_kind(split.kind)
    loaded = _load(adapter, against)
    first, context = loaded[0], load.context_length(loaded[0].model.config)
    dataset = data.prepare(split, first.renderer, first.data, _vocabulary_size(first))
    check_positions(dataset, first.data, context)
    rows = _rows(adapter, first, dataset, judging)
    remarks = [*split.remarks(), *dataset.report.losses(), *(overlap.remarks() if overlap else ())]
    scorer = scorer_of(first)
    with first.without_adapter():
        found = {BASE: _answers(rows, BASE, first, scorer)}
    found[ADAPTER] = _answers(rows, ADAPTER, first, scorer)
    known: dict[str, Any] = {"computed_by": scorer.engine.computed_by}
    known |= {"special_tokens": tuple(first.tokenizer.all_special_tokens)}
    sensitivity, vocabulary = _sensitivity(first, dataset, rows.rows), _vocabulary_size(first)
    forgotten = _forgetting(first, scorer, forgetting, remarks) if forgetting else None
    task_results = tasks(first) if tasks else None
    remarks += task_results.remarks if task_results else ()
    if against is not None:
        asked: dict[str, Any] = {"tokenizer": first.tokenizer, "renderer": first.renderer}
        if len(loaded) == 1:
            del first, scorer
            loaded.clear()
            gc.collect()  # else there would be two bases in memory
            loaded = loading.load_all([against], adapter.base)
        other = loaded[-1]
        remarks += _rendering_remarks(adapter, against, same_tokens=asked["renderer"].digest == other.renderer.digest)
        other = replace(other, **asked, data=adapter.data)
        found[AGAINST] = _answers(rows, AGAINST, other, scorer_of(other))
    answered = [
        replace(row, answers={name: by_row[place] for name, by_row in found.items()})
        for place, row in enumerate(rows.rows)
    ]
    metric = judging.metrics[0].name if judging.metrics else LOSS
    if isinstance(rows, PreferenceAnswers):
        remarks += [*_objective_remarks(rows.formula, adapter, against), *rows.metrics[ADAPTER].warnings()]
        known["objective"] = rows.formula
    comparison = compare_rows(answered, metric, forgotten, remarks, majority_answers(answered, judging))
    known |= {"sensitivity": sensitivity, "tasks": task_results, "overlap": overlap.as_json() if overlap else None}
    known |= {"collapsed": _collapsed(comparison, sensitivity, vocabulary)}
    return replace(comparison, **known).judged(required)


def _collapsed(comparison: Comparison, sensitivity: PromptSensitivity | None, vocabulary: int) -> str:
    """Why the adapter is not a result of training; see `collapse.reason`."""
    loss, of_base = (comparison.scores[name].metrics[LOSS] or math.nan for name in (ADAPTER, BASE))
    loss = loss if comparison.unit == "token" else math.nan
    scored = f"these {plural(len(comparison.rows), comparison.item)}"
    return collapse.reason(sensitivity, scored, loss, of_base, vocabulary)


def evaluate_tasks(adapter: AdapterDirectory, tasks: Tasks, required: Sequence[Requirement]) -> TaskResults:
    """Run tasks on an adapter, which is loaded for them alone. Raises as `loading.load` and `harness.run` do."""
    return requirements.judged_tasks(tasks(loading.load(adapter)), required)


def _rows(
    adapter: AdapterDirectory, loaded: LoadedAdapter, dataset: TokenizedDataset, judging: Judging
) -> RowAnswers | PreferenceAnswers:
    if dataset.rows_per_example == 1 and not dataset.is_unpaired:
        return RowAnswers(loaded, dataset, judging)
    formula = formula_for(adapter.run, UNPAIRED if dataset.is_unpaired else PAIRS)
    return PreferenceAnswers(formula, loaded, dataset, adapter.run.training.seed if adapter.run is not None else 0)


def scorer_of(loaded: LoadedAdapter) -> Scorer:
    """What computes the losses of an adapter, and, while it is off, of its base."""
    loaded.activate()
    acceleration = kernels.accelerate(loaded.model, partial(attach.adapted_linear, name=loaded.key))
    return Scorer(loaded.model, Engine(loaded.model, loaded.data, loaded.prompts.padding, acceleration))


def _answers(
    rows: RowAnswers | PreferenceAnswers, name: str, model: LoadedAdapter, scorer: Scorer
) -> list[ModelAnswer]:
    model.activate()
    with counting(f"scoring {name}", rows.prompts) if rows.prompts else nullcontext(no_advance) as advance:
        return rows.answers(name, model, scorer, advance)


def _sensitivity(
    loaded: LoadedAdapter, dataset: TokenizedDataset, rows: Sequence[ComparedRow]
) -> PromptSensitivity | None:
    """Whether the predictions of the adapter depend on its prompts, on some of the rows, evenly spread."""
    loaded.activate()
    some = rows[:: -(-len(rows) // _MOST_ROWS)]
    found = [row for one in some for row in dataset.item(one.number)]
    return collapse.measure(loaded.model, loaded.without_adapter(), found)


def _objective_remarks(formula: Formula, adapter: AdapterDirectory, against: AdapterDirectory | None) -> Iterator[str]:
    """A line for each adapter that was not trained with the objective, or the reference, that it is measured by."""
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
    """The adapters on one base; the first alone, where they cannot share one."""
    if against is not None:
        try:
            return loading.load_all([adapter, against])
        except AdapterError as error:
            if any(problem.code != Code.ADAPTER_UNSUPPORTED for problem in error.problems):
                raise
    return loading.load_all([adapter])


def _rendering_remarks(adapter: AdapterDirectory, against: AdapterDirectory, *, same_tokens: bool) -> Iterator[str]:
    """Why the rows may not be what the other adapter was trained on, a line."""
    keys = [f"data.{key}" for key in ("loss_on", "max_length", "truncation") if _differ(adapter, against, key)]
    differences = [*([] if same_tokens else ["tokenizer or chat template"]), *keys]
    differences += ["prompts that go through the chat template"] if adapter.chat != against.chat else []
    if differences:
        yield (
            f"{against.files.path}: was trained with another {', '.join(differences)}; its rows are those of "
            f"{adapter.files.path}"
        )


def _differ(adapter: AdapterDirectory, against: AdapterDirectory, key: str) -> bool:
    return bool(adapter.data.model_dump()[key] != against.data.model_dump()[key])


def _forgetting(loaded: LoadedAdapter, scorer: Scorer, split: DatasetSplit, remarks: list[str]) -> Difference:
    """The loss of the adapter less that of its base on unrelated text, of which no row is longer than the context.

    remarks: lines about its rows are added to it.

    Raises:
        NumericError: The loss of the adapter is not finite there.
    """
    context = load.context_length(loaded.model.config)
    longest = min(split.section.max_length, context or split.section.max_length)
    section = split.section.model_copy(update={"max_length": longest})
    dataset = data.prepare(split, loaded.renderer, section, _vocabulary_size(loaded))
    remarks += [f"unrelated text: {line}" for line in dataset.report.losses()]
    rows = distinct_rows(loaded, dataset)
    copies = {row.number: row.copies for row in rows}
    loaded.activate()
    with loaded.without_adapter():
        before = scorer.losses(dataset, copies)
    after = scorer.losses(dataset, copies)
    not_finite(rows, after.nats, ADAPTER)
    if what := not_finite(rows, before.nats, BASE):
        remarks.append(f"unrelated text: {what}, so it is not known what is forgotten")
    return compare(before, after)
