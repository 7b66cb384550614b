"""`loratune evaluate --tasks`: runs tasks of the lm-evaluation-harness on an adapter and its base.

It imports the harness, so that it is imported only where there are tasks to run.
"""

from collections.abc import Callable, Sequence
from functools import partial

from loratune.data import ProgressFactory
from loratune.evaluation import harness
from loratune.evaluation.results import TaskResults
from loratune.inference import loading
from loratune.inference.completion import LoadedAdapter, Log
from loratune.training.preflight import AdapterInfo

Tasks = Callable[[LoadedAdapter], TaskResults]
"""Runs tasks on a loaded adapter and its base, see `harness.run`."""


def open_tasks(specs: Sequence[str], limit: int | None, count: ProgressFactory) -> Tasks:
    """Find tasks and load their rows. Raises as `harness.open_tasks` does."""
    return partial(harness.run, opened=harness.open_tasks(specs), limit=limit, count=count)


def evaluate_tasks(adapter: AdapterInfo, tasks: Tasks, log: Log) -> TaskResults:
    """Run tasks on an adapter, which is loaded for them alone. Raises as `loading.load` and `harness.run` do."""
    return tasks(loading.load(adapter, log))
