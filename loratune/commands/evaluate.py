"""`loratune evaluate`: how well an adapter does on held-out rows, compared with its base or with another adapter."""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from loratune import data
from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.adapter.generation import LoadedAdapter, Log
from loratune.codes import Code
from loratune.console import plural
from loratune.data import DatasetSplit, ProgressFactory, TokenizedDataset, no_progress
from loratune.data.row_hashes import Overlap
from loratune.errors import AdapterError
from loratune.evaluation import comparison, requirements, scoring
from loratune.evaluation.preference_scoring import ComparedScorer
from loratune.evaluation.requirements import Requirement
from loratune.evaluation.results import (
    ADAPTER,
    AGAINST,
    BASE,
    LOSS,
    Difference,
    EvaluatedRow,
    Evaluation,
    ModelAnswer,
    TaskResults,
)
from loratune.evaluation.scoring import Judging, RowScorer
from loratune.model import load
from loratune.training import collapse
from loratune.training.batching import check_positions
from loratune.training.collapse import PromptSensitivity
from loratune.training.losses import computed_by

_MOST_ROWS = 64
"""Rows among which prompts are chosen that expect different answers."""


def evaluate(
    adapter: AdapterDirectory,
    split: DatasetSplit,
    *,
    against: AdapterDirectory | None = None,
    judging: Judging = Judging(),  # noqa: B008  it is frozen
    forgetting: DatasetSplit | None = None,
    tasks: Callable[[LoadedAdapter], TaskResults] | None = None,
    overlap: Overlap | None = None,
    required: Sequence[Requirement] = (),
    watch: ProgressFactory = no_progress,
    count: ProgressFactory = no_progress,
    log: Log = lambda _: None,
) -> Evaluation:
    """Score base, adapter and perhaps another adapter on the same rows, rendered as the first adapter was trained.

    Rows may be pairs of answers, or judged ones, of which rewards and the loss of the adapter's objective are computed.

    Args:
        adapter: The adapter.
        split: The rows.
        against: Another adapter of the same base, which the adapter is compared with instead of the base.
        judging: Which metrics there are, of rows that compare no answers. The verdict is about the first; without any,
            about the loss.
        forgetting: Unrelated text, on which adapter and base are compared as well.
        tasks: Runs tasks on the adapter and its base as well.
        overlap: What of the rows is also in train.
        required: What the user requires of the adapter.
        watch: Shows passes over data, in bytes.
        count: Shows passes over rows.
        log: Takes lines about the adapters.

    Raises:
        AdapterError, ModelError, DataError: An adapter, the base or the rows cannot be used.
        ConfigError: Rows are longer than the model's context; an expression takes too long.
        NumericError: The loss of an adapter is not finite.
    """
    split.check_kind(split.kind)
    loaded = _load(adapter, against, log)
    first, context = loaded[0], load.context_length(loaded[0].model.config)
    dataset = data.prepare(split, first.renderer, first.data, _vocabulary_size(first), watch)
    check_positions(dataset, first.data, context)
    compared = ComparedScorer(adapter, first, dataset) if split.kind is not None else None
    scorer = compared or RowScorer(first, dataset, judging)
    known = _known(first)
    remarks = [*split.remarks(), *dataset.report.losses(), *(overlap.remarks() if overlap else ())]

    def answers(name: str, model: LoadedAdapter) -> list[ModelAnswer]:
        with count(f"scoring {name}", scorer.passes) as advance:
            return scorer.answers(name, model, advance)

    with first.without_adapter():
        found = {BASE: answers(BASE, first)}
    found[ADAPTER] = answers(ADAPTER, first)
    sensitivity, vocabulary = _sensitivity(first, dataset, scorer.rows), _vocabulary_size(first)
    known |= {"sensitivity": sensitivity, "objective": compared and compared.formula}
    forgotten = _forgetting(first, forgetting, context, watch, count, remarks) if forgetting else None
    task_results = tasks(first) if tasks else None
    remarks += task_results.remarks if task_results else ()
    if against is not None:
        asked: dict[str, Any] = {"tokenizer": first.tokenizer, "renderer": first.renderer}
        if len(loaded) == 1:
            del first
            loaded.clear()
            gc.collect()  # else there would be two bases in memory
            loaded = loading.load_all([against], log, adapter.base)
        other = loaded[-1]
        remarks += _rendering_remarks(adapter, against, same_tokens=asked["renderer"].digest == other.renderer.digest)
        found[AGAINST] = answers(AGAINST, replace(other, **asked))
    rows = [
        replace(row, answers={name: by_row[place] for name, by_row in found.items()})
        for place, row in enumerate(scorer.rows)
    ]
    metric = judging.metrics[0].figure if judging.metrics else LOSS
    remarks += compared.remarks(adapter, against) if compared else ()
    evaluation = comparison.compare(rows, metric, forgotten, remarks, scoring.majority_answers(rows, judging))
    loss, of_base = (evaluation.scores[name].figures[LOSS] or math.nan for name in (ADAPTER, BASE))
    loss = loss if evaluation.unit == "token" else math.nan
    scored = f"these {plural(len(rows), evaluation.item)}"
    known |= {"collapsed": collapse.reason(sensitivity, scored, loss, of_base, vocabulary)}
    known |= {"tasks": task_results, "overlap": overlap.as_json() if overlap else None}
    return requirements.judged(replace(evaluation, **known), required)


def _known(loaded: LoadedAdapter) -> dict[str, Any]:
    """What an evaluation records of the model that it runs."""
    how = computed_by(loaded.model, "stock, fast LoRA", flat=False, shares=False)
    return {"special_tokens": tuple(loaded.tokenizer.all_special_tokens), "computed_by": how}


def _sensitivity(
    loaded: LoadedAdapter, dataset: TokenizedDataset, rows: Sequence[EvaluatedRow]
) -> PromptSensitivity | None:
    """Whether the predictions of the adapter depend on its prompts, on some of the rows, evenly spread."""
    loaded.activate()
    some = rows[:: -(-len(rows) // _MOST_ROWS)]
    found = [row for one in some for row in dataset.item(one.number)]
    return collapse.measure(loaded.model, loaded.without_adapter(), found)


def _vocabulary_size(loaded: LoadedAdapter) -> int:
    return int(loaded.model.config.get_text_config().vocab_size)


def _load(adapter: AdapterDirectory, against: AdapterDirectory | None, log: Log) -> list[LoadedAdapter]:
    """The adapters on one base; the first alone, where they cannot share one."""
    if against is not None:
        try:
            return loading.load_all([adapter, against], log)
        except AdapterError as error:
            if any(problem.code != Code.ADAPTER_CANNOT_SHARE for problem in error.problems):
                raise
    return loading.load_all([adapter], log)


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


def _forgetting(
    loaded: LoadedAdapter,
    split: DatasetSplit,
    context: int | None,
    watch: ProgressFactory,
    count: ProgressFactory,
    remarks: list[str],
) -> Difference:
    """The loss of the adapter less that of its base on unrelated text, of which no row is longer than the context.

    remarks: lines about its rows are added to it.

    Raises:
        NumericError: The loss of the adapter is not finite there.
    """
    longest = min(split.section.max_length, context or split.section.max_length)
    section = split.section.model_copy(update={"max_length": longest})
    dataset = data.prepare(split, loaded.renderer, section, _vocabulary_size(loaded), watch)
    remarks += [f"unrelated text: {line}" for line in dataset.report.losses()]
    rows = scoring.distinct_rows(loaded, dataset)
    with count("measuring what is forgotten", 2 * len(rows)) as advance:
        with loaded.without_adapter():
            before = scoring.losses(loaded, dataset, [row.number for row in rows], advance)
        after = scoring.losses(loaded, dataset, [row.number for row in rows], advance)
    comparison.not_finite(rows, after, ADAPTER)
    if what := comparison.not_finite(rows, before, BASE):
        remarks.append(f"unrelated text: {what}, so it is not known what is forgotten")
    return comparison.loss_difference(rows, before, after)
