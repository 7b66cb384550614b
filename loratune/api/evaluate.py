"""The verbs of adapters that measure: `evaluate`, `evaluate_scales` and `run_tasks`."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import loratune
from loratune.api import Rows, StrPath, computing, libraries
from loratune.api.opened import checked_scales
from loratune.api.rows import read_held_out, source_of
from loratune.codes import Code
from loratune.config import DataSection, Source
from loratune.config.arguments import checked
from loratune.errors import ConfigError, Problem
from loratune.events import FinishedEvent, Listener, emit, listening, note

if TYPE_CHECKING:
    from loratune.compare.comparison import Comparison
    from loratune.compare.evaluation import ScaleComparison, Tasks, UnrelatedText
    from loratune.compare.metrics import Metric
    from loratune.compare.requirements import Requirement
    from loratune.compare.tasks import TaskResults
    from loratune.data import DatasetSplit

Found = TypeVar("Found", "Comparison", "TaskResults")
BUILTIN = "builtin"
"""The value of `forgetting` for the unrelated text included in loratune."""


@checked
def evaluate(
    adapter: "loratune.Adapter",
    rows: Rows,
    *,
    against: "loratune.Adapter | StrPath | None" = None,
    metrics: str | Sequence[str] = (),
    forgetting: Rows | None = None,
    tasks: str | Sequence[str] = (),
    limit: int | None = None,
    require: str | Sequence[str] = (),
    allow_overlap: bool = False,
    whole_answers: bool = False,
    keep_fields: bool = False,
    few_shot: int | None = None,
    base_prompt: str | None = None,
    abstain_for: float | None = None,
    on_event: Listener | None = None,
) -> "Comparison":
    """Compare the adapter with its base, or with another adapter, on held-out rows.

    Args:
        rows: The rows, in a format supported for training.
        against: Another adapter of the same base, to compare with instead of the base.
        metrics: Metrics of greedy answers: exact_match, label, contains, rouge_l, json, tool_call, regex:PATTERN.
        forgetting: Unrelated text (`builtin` for loratune's) to measure forgetting on, as on everyday instructions.
        tasks: Tasks of the lm-evaluation-harness to run as well, or task files, whose code is executed.
        limit: The maximum number of rows of each task.
        require: Requirements such as `exact_match>=0.9`, see `Comparison.require`; they are parsed first.
        allow_overlap: With `require`, accept rows that the adapter was trained on.
        whole_answers: Allow answers longer than the expected ones, for reading them in `Comparison.rows`.
        few_shot: Also ask the base with this many training rows as examples before each question; 0 for none.
        base_prompt: Also ask the base with this prompt, which has `{prompt}` in the place of the question. Where
            answers are labels, the better of eight examples and a prompt that names the labels is the default.
        abstain_for: For labels: find the probability from which on at least this share of the answers is right, with
            95 % confidence; see `Comparison.abstention`. The rows may be neither training nor validation rows.
        keep_fields: Keep the fields of the rows for `Comparison.every_row`.
        on_event: Receives events; the last one has the comparison, even if a requirement is not met.

    Returns:
        The metrics of each model with their intervals, the differences between models, and the verdict.

    Raises:
        AdapterError, ModelError, DataError, ConfigError: An adapter, the base, the rows or a metric cannot be used.
        NumericError: The loss of an adapter is not finite.
        RequirementError: A requirement is not met.
    """
    with listening(on_event):
        with libraries():
            from loratune.compare import metrics as known_metrics
            from loratune.compare import requirements
            from loratune.compare.prompted import BasePrompts
            from loratune.data import splits

        metrics, tasks, require = (_listed(names) for names in (metrics, tasks, require))
        unused = {"limit": "tasks"} if limit is not None and not tasks else {}
        check_used(unused | ({"allow_overlap": "require"} if allow_overlap and not require else {}))
        if abstain_for is not None and not 0 < abstain_for < 1:
            what, fix = f"must be above 0 and below 1, got {abstain_for:g}", "write 0.95 for 95 of 100 answers"
            raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key="abstain_for", fix=fix))
        base_prompts = BasePrompts(few_shot, base_prompt)
        base_prompts.check()
        parsed = known_metrics.parse_metrics(metrics)
        known = {"against": against is not None, "forgetting": forgetting is not None, "tasks": bool(tasks)}
        required = requirements.parse_requirements(require, [metric.name for metric in parsed], rows=True, **known)
        other = against if against is None or isinstance(against, loratune.Adapter) else loratune.Adapter(against)
        opened = _open_tasks(tasks, limit, required) if tasks else None
        split = read_held_out(rows, adapter.directory.data)
        if any(not one.of_task for one in required):
            with adapter.directory.files.reading() as path:
                overlap = splits.find_overlap(split, path)
            requirements.check_rows(required, split, overlap, allow_overlap=allow_overlap)
            if overlap.unknown:
                note(overlap.unknown)
        if abstain_for is not None:
            with adapter.directory.files.reading() as path:
                splits.check_unseen(split, path)
        _check_metrics(parsed, split)
        unrelated = _unrelated(adapter, forgetting) if forgetting is not None else None
        with computing():
            with libraries():
                from loratune.compare import evaluation
                from loratune.compare.answers import Judging

            found = evaluation.evaluate(
                adapter.directory, split, against=other.directory if other is not None else None,
                judging=Judging(parsed, whole_answers, base_prompts), forgetting=unrelated, tasks=opened,
                subject=evaluation.EvaluatedAdapter(adapter.opened.loaded.default) if other is None else None,
            ).judged(required)  # fmt: skip
        if abstain_for is not None:
            found = found.with_abstention(abstain_for)
        if keep_fields:
            found = found.with_fields(split.own_fields())
        return _finish(found)


@checked
def evaluate_scales(
    adapter: "loratune.Adapter",
    rows: Rows,
    scales: Sequence[float],
    *,
    metrics: str | Sequence[str] = (),
    forgetting: Rows | None = None,
    on_event: Listener | None = None,
) -> "ScaleComparison":
    """Compare the adapter with its base at several scales from 0 to 2; see `evaluate`, and `Adapter` for errors."""
    with listening(on_event):
        with libraries():
            from loratune.compare import evaluation
            from loratune.compare import metrics as known_metrics
            from loratune.compare.answers import Judging

        scales = checked_scales(scales)
        parsed, split = known_metrics.parse_metrics(_listed(metrics)), read_held_out(rows, adapter.directory.data)
        _check_metrics(parsed, split)
        unrelated = _unrelated(adapter, forgetting) if forgetting is not None else None
        options: dict[str, Any] = {"judging": Judging(parsed), "forgetting": unrelated}
        with computing():
            found = evaluation.evaluate_scales(
                adapter.directory, split, scales, adapter.opened.loaded.default, **options
            )
        for line in next(iter(found.comparisons.values())).remarks:
            note(line)
        emit(FinishedEvent(found))
        return found


@checked
def run_tasks(
    adapter: "loratune.Adapter",
    tasks: str | Sequence[str],
    *,
    limit: int | None = None,
    require: str | Sequence[str] = (),
    on_event: Listener | None = None,
) -> "TaskResults":
    """Run tasks of the lm-evaluation-harness on base and adapter. Args and errors as for `evaluate`."""
    with listening(on_event):
        from loratune.compare import requirements

        required = requirements.parse_requirements(_listed(require), [], rows=False, tasks=True)
        opened = _open_tasks(_listed(tasks), limit, required)
        with computing():
            with libraries():
                from loratune.adapter import loading

            found = opened(loading.load(adapter.directory)).judged(required)
        return _finish(found)


def _unrelated(adapter: "loratune.Adapter", rows: Rows) -> "UnrelatedText":
    """Rows in any format except preferences. Raises DataError."""
    from loratune import data
    from loratune.compare.evaluation import UnrelatedText
    from loratune.data.sources import GIVEN

    is_builtin = isinstance(rows, str) and rows == BUILTIN
    source = source_of(data.UNRELATED_TEXT if is_builtin else rows)
    longest = adapter.directory.data.max_length
    section = DataSection(train=Source(path=GIVEN), max_length=longest, truncation="keep_completion")
    split = data.read_source(source, section)
    split.check_kind(None)
    return UnrelatedText(split, data.unrelated_kinds() if is_builtin else {})


def _finish(found: Found) -> Found:
    """Send a result to the listener. Raises RequirementError: a requirement is not met."""
    from loratune.compare import requirements

    for line in found.remarks:
        note(line)
    emit(FinishedEvent(found))
    requirements.check_met(found.requirements)
    return found


def check_used(unused: Mapping[str, str]) -> None:
    """Raises ConfigError: there are parameters without effect. unused: parameter → the one that it only works with."""
    if unused:
        what = "only works with `{}=...`"
        raise ConfigError([Problem(Code.USAGE_CONFLICT, what.format(one), key=key) for key, one in unused.items()])


def _listed(names: str | Sequence[str]) -> Sequence[str]:
    """One or several names as a sequence."""
    return [names] if isinstance(names, str) else names


def _check_metrics(metrics: "Sequence[Metric]", split: "DatasetSplit") -> None:
    """Raises ConfigError: the metrics are of written answers, and the rows are preferences."""
    if metrics and split.kind is not None:
        what, fix = f"the rows are {split.kind}, for which no model writes answers", "leave it out"
        raise ConfigError(Problem(Code.USAGE_CONFLICT, what, split.source, "metrics", fix))


def _open_tasks(tasks: Sequence[str], limit: int | None, required: "Sequence[Requirement]") -> "Tasks":
    """Open tasks with the harness, which is imported only here."""
    from loratune.compare import tasks as known_tasks
    from loratune.system.environment import kept_environment

    names = known_tasks.parse_tasks(",".join(tasks))
    if limit is not None and limit < 1:
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, f"{limit} is less than 1", key="limit"))
    with computing(), libraries(), kept_environment():
        from loratune.compare import harness

    return partial(harness.run, opened=harness.open_tasks(names, required), limit=limit)
