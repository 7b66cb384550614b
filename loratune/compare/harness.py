"""The lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on an adapter and its base.

This is the only module that imports it. Its `simple_evaluate` runs on base and adapter, which share one loaded base;
`tasks` compares the samples that it returns. If an adapter is not applied, its metrics equal the base's metrics, which
users of the harness noticed late (its issue 511); here equal log-likelihoods are an error.
"""

import copy
import difflib
import io
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api import metrics
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from loratune.adapter.generation import LoadedAdapter
from loratune.codes import Code
from loratune.compare import requirements
from loratune.compare.metrics import ADAPTER, BASE
from loratune.compare.requirements import Requirement
from loratune.compare.tasks import MEAN, OPTION, TaskMetric, TaskResults, compare_metric, is_path
from loratune.data.upstream import uncounted
from loratune.errors import ConfigError, DataError, LoratuneError, NumericError, Problem, is_out_of_memory
from loratune.events import note
from loratune.kernels import length_limits
from loratune.model.load import context_length
from loratune.system import turns
from loratune.system.accelerator import kept_random_states
from loratune.system.environment import kept_environment
from loratune.text import plural

_BATCH = 8
"""Requests of a batch; fewer where memory runs out."""
_DRAWS = 1000
"""Bootstrap resamples for the harness's standard errors of metrics that are not means."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedTasks:
    """Tasks with their rows.

    Attributes:
        selected: The harness's objects of groups, and of tasks without a group.
        tasks: Name → each task, including the tasks of groups.
        groups: Name → each group.
    """

    selected: Sequence[Any]
    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]


def open_tasks(specs: Sequence[str], required: Sequence[Requirement] = ()) -> OpenedTasks:
    """Find tasks and load their rows, before any model is loaded.

    Args:
        specs: Names of tasks, groups and tags of the harness; YAML files of tasks; directories, for all tasks in them.
            A YAML file can refer to Python functions in its directory, which are then executed.
        required: The requirements of the user.

    Raises:
        ConfigError: A task does not exist, or has the name of another one; or see `requirements.check_tasks`.
        DataError: A task or its rows cannot be loaded.
    """
    selected: dict[str, Any] = {}
    origins: dict[str, str] = {}
    with contained(), _explained("cannot load them or their rows"):
        for spec, manager, name in [*_found(specs)]:  # find all tasks before loading rows
            if origins.get(name) == spec != name:
                continue  # in a group of this directory
            with _explained("cannot load it or its rows", spec):
                loaded = manager.load([name])
            names = {**loaded["tasks"], **loaded["groups"]}
            if taken := [one for one in names if origins.get(one, spec) != spec]:
                what, fix = f"another task is called {taken[0]!r} too", "give each its own name, or run one of them"
                raise ConfigError(Problem(Code.EVALUATE_TASK, what, spec, OPTION, fix))
            origins |= dict.fromkeys(names, spec)
            inner = {child for children in loaded["group_map"].values() for child in children}
            outer = {one: group for one, group in loaded["groups"].items() if one not in inner}
            selected = {one: kept for one, kept in selected.items() if one not in names} | (outer or loaded["tasks"])
        loaded = TaskManager(include_defaults=False).load([*selected.values()])
    requirements.check_tasks(required, [*loaded["tasks"], *loaded["groups"]])
    return OpenedTasks([*selected.values()], loaded["tasks"], loaded["groups"])


def _found(specs: Sequence[str]) -> Iterator[tuple[str, TaskManager, str]]:
    """Each task: as the user names it, its task manager, and its name there. Raises ConfigError: it does not exist."""
    known = TaskManager(include_defaults=not all(map(is_path, specs)))
    for spec in {os.path.realpath(spec) if is_path(spec) else spec: spec for spec in specs}.values():
        path, names, what, fix = Path(spec), [spec], "", ""
        manager = known
        if not is_path(spec):
            near = difflib.get_close_matches(spec, known.all_tasks, n=3, cutoff=0.6)
            what = "" if spec in known.task_index else f"the lm-evaluation-harness has no task {spec!r}"
            fix = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
        elif path.is_dir():
            manager = TaskManager(include_path=spec, include_defaults=False)
            names = [*manager.all_groups, *manager.all_subtasks]
            what = "" if names else "there is no YAML file with a key `task` in it"
        elif not path.is_file():
            what = "no such file or directory"
        if what:
            raise ConfigError(Problem(Code.EVALUATE_TASK, what, spec if is_path(spec) else "", OPTION, fix))
        yield from ((spec, manager, name) for name in names)


class _Model:
    """The model that the harness computes with. It is not a `torch.nn.Module`, whose weights the harness would tie."""

    def __init__(self, loaded: LoadedAdapter):
        self.config, self.device, self.generate = loaded.model.config, loaded.model.device, loaded.model.generate
        self._model = loaded.model

    def __call__(self, ids: Any) -> Any:
        """ids: (rows, tokens), padded on the right. Returns an output with logits, (rows, tokens, vocabulary)."""
        return self._model(input_ids=ids, use_cache=False)


def run(loaded: LoadedAdapter, opened: OpenedTasks, limit: int | None) -> TaskResults:
    """Run tasks on base and adapter.

    Args:
        loaded: The adapter. Prompts are rendered with its chat template if it was trained on conversations.
        opened: The tasks.
        limit: The maximum number of documents of each task.

    Raises:
        AdapterError: The adapter cannot be disabled, see `LoadedAdapter.without_adapter`.
        DataError: A task fails, or its requests differ between both models.
        NumericError: The adapter has no effect.
    """
    found = {}
    for name in (BASE, ADAPTER):
        with loaded.without_adapter() if name == BASE else nullcontext():
            found[name] = _evaluated(loaded, opened, limit, name)
    base, adapter = ({task: found[name]["samples"][task] for task in opened.tasks} for name in (BASE, ADAPTER))
    if _values(base, "arguments") != _values(adapter, "arguments"):
        what, fix = "base and adapter were asked different things", "make the prompts of the task the same every time"
        raise DataError(Problem(Code.EVALUATE_TASK, what, key=OPTION, fix=fix))
    written = [task for task, one in opened.tasks.items() if one.OUTPUT_TYPE == "generate_until"]
    likelihoods = [{task: of[task] for task in of if task not in written} for of in (base, adapter)]
    remarks = []
    if likelihoods[0] and _values(likelihoods[0], "resps") == _values(likelihoods[1], "resps"):
        count = sum(len(sample["resps"]) for samples in likelihoods[0].values() for sample in samples)
        what = f"the adapter had no effect: all {count:,} log-likelihoods are exactly those of the base"
        fix = "check how it was made; `loratune params --adapter` shows how far it moves each module"
        raise NumericError(Problem(Code.LORA_UNCHANGED, what, loaded.where, fix=fix))
    if not likelihoods[0] and _values(base, "resps") == _values(adapter, "resps"):
        remarks.append(f"tasks: base and adapter give the same {sum(map(len, base.values())):,} answers")
    if loaded.chat:
        remarks.append("tasks: prompts go through the chat template, as the adapter was trained on conversations")
    names = [name for name in found[BASE]["results"] if name in opened.tasks or name in found[BASE].get("groups", {})]
    compared = {name: dict(_metrics_of(name, opened, found)) for name in names}
    return TaskResults(compared, limit, loaded.chat, version("lm-eval"), remarks)


def _values(samples: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> list[Any]:
    return [[(sample["doc_id"], sample[key]) for sample in of_task] for of_task in samples.values()]


def _evaluated(loaded: LoadedAdapter, opened: OpenedTasks, limit: int | None, name: str) -> Mapping[str, Any]:
    """What `simple_evaluate` returns for the model in its current state. name: the name of the model."""
    model = loaded.model
    size = 1 if length_limits(model.config) else _BATCH  # such models compute a row by its length with padding
    note(f"running {plural(len(opened.tasks), 'task')} on the {name}")
    with contained(), _explained("cannot run them"):
        while True:
            computed_by = HFLM(
                _Model(loaded),
                backend="causal",
                tokenizer=copy.deepcopy(loaded.tokenizer),  # the harness sets its padding token
                max_length=context_length(model.config),
                softmax_dtype="float32",
                batch_size=size,
                chat_template_args=loaded.renderer.arguments,
            )
            try:
                with loaded.computing():
                    return simple_evaluate(
                        computed_by,
                        tasks=[*opened.selected],
                        task_manager=TaskManager(include_defaults=False),
                        limit=limit,
                        bootstrap_iters=_DRAWS,
                        apply_chat_template=loaded.chat,
                        fewshot_as_multiturn=loaded.chat,
                    ) or {}  # fmt: skip
            except RuntimeError as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            size //= 2


@contextmanager
def _explained(what: str, where: str = "") -> Iterator[None]:
    """Raises DataError: the harness, or code of a task, which may also end the process, fails inside."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, LoratuneError) or is_out_of_memory(error):
            raise
        fix = "--debug shows where"
        if isinstance(error, ConnectionError):
            fix = "without a network, HF_HUB_OFFLINE=1 takes rows of earlier downloads"
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        problem = Problem(Code.EVALUATE_TASK, f"the harness {what}: {reason}", where, "" if where else OPTION, fix)
        raise DataError(problem) from error


def _metrics_of(name: str, opened: OpenedTasks, found: Mapping[str, Any]) -> Iterator[tuple[str, TaskMetric]]:
    """Name → each metric of one task, or of a group with metrics of its own."""
    results = {model: found[model]["results"][name] for model in (BASE, ADAPTER)}
    leaves = [name] if name in opened.tasks else [task.task_name for task in opened.groups[name].get_all_tasks()]
    for key, base_value in results[BASE].items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(base_value, int | float | np.number):
            continue
        values = {model: float(result[key]) for model, result in results.items()}
        errors = {model: _number(result.get(f"{metric}_stderr,{filter_name}")) for model, result in results.items()}
        samples = {
            model: [
                sample[metric]
                for leaf in leaves
                for sample in found[model]["samples"][leaf]
                if sample["filter"] == filter_name and metric in sample["metrics"]
            ]
            for model in (BASE, ADAPTER)
        }
        aggregations = {_aggregation(opened.tasks[leaf], metric) for leaf in leaves}
        aggregation = aggregations.pop() if len(aggregations) == 1 else ""
        if name not in opened.tasks:  # a group may have means over tasks, rather than over all of their documents
            is_mean = all(np.isclose(np.mean(samples[model]), values[model], rtol=1e-9) for model in values)
            aggregation = MEAN if aggregation == MEAN and is_mean else ""
        better = found[BASE]["higher_is_better"].get(name, {}).get(metric)
        compared = compare_metric(values, errors, samples, aggregation, better)
        yield (metric if filter_name == "none" else f"{metric},{filter_name}"), compared


def _aggregation(task: Any, metric: str) -> str:
    """The name of the harness's function with which a task aggregates a metric, by default the mean; empty if it is not
    a function of the harness."""
    function = task.aggregation().get(metric, metrics.mean)
    name: str = getattr(function, "__name__", "")
    return name if getattr(metrics, name, None) is function else ""


def _number(value: Any) -> float | None:
    """A standard error; None for the harness's `N/A`."""
    return float(value) if isinstance(value, int | float | np.number) and np.isfinite(value) else None


@contextmanager
def contained() -> Iterator[None]:
    """Isolate the harness inside: what it prints goes to the debug log, it starts no processes, and tasks draw the same
    rows every time, and no server counts them; random states and environment variables are restored afterwards."""
    printed = io.StringIO()
    try:
        with kept_environment(), kept_random_states(), uncounted(), turns.stdout_to(printed), redirect_stderr(printed):
            os.environ["DISABLE_MULTIPROC"] = "1"  # the harness's resampling
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
            torch.manual_seed(DEFAULT_OTHER_SEED)
            yield
    finally:
        for line in printed.getvalue().splitlines():
            _logger.debug(line)
