"""`loratune evaluate --tasks`: runs tasks of the lm-evaluation-harness on an adapter and its base.

It imports the harness, so that it is imported only where there are tasks to run.
"""

from collections.abc import Callable, Sequence
from functools import partial

from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.adapter.generation import LoadedAdapter, Log
from loratune.data import ProgressFactory
from loratune.evaluation import harness, requirements
from loratune.evaluation.requirements import Requirement
from loratune.evaluation.results import TaskResults

Tasks = Callable[[LoadedAdapter], TaskResults]
"""Runs tasks on a loaded adapter and its base, see `harness.run`."""


def open_tasks(
    specs: Sequence[str], limit: int | None, required: Sequence[Requirement], count: ProgressFactory
) -> Tasks:
    """Find tasks and load their rows. Raises as `harness.open_tasks` and `requirements.check_tasks` do."""
    opened = harness.open_tasks(specs)
    requirements.check_tasks(required, [*opened.tasks, *opened.groups])
    return partial(harness.run, opened=opened, limit=limit, count=count)


def evaluate_tasks(adapter: AdapterDirectory, tasks: Tasks, required: Sequence[Requirement], log: Log) -> TaskResults:
    """Run tasks on an adapter, which is loaded for them alone. Raises as `loading.load` and `harness.run` do."""
    return requirements.judged_tasks(tasks(loading.load(adapter, log)), required)
