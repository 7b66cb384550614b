"""The lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on an adapter and its base.

This is the only module that imports it. Both models share one loaded base, and get the same requests. If an adapter is
not applied, its metrics equal those of the base, which users of the harness noticed late (its issue 511); here equal
log-likelihoods are an error.

Output of the harness goes to the debug log; random states and environment variables are restored.
"""

import copy
import difflib
import io
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import evaluator
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
from loratune.errors import ConfigError, DataError, LoratuneError, NumericError, Problem, is_out_of_memory
from loratune.events import counting
from loratune.kernels import crosses, length_limits
from loratune.model.load import context_length
from loratune.system import turns
from loratune.system.accelerator import kept_random_states
from loratune.system.environment import kept_environment

_BATCH = 32
"""The maximum requests of a batch."""
_BATCH_TOKENS = 8192
"""The maximum tokens of a batch. Its logits and log-probabilities take 3.3 GB with a vocabulary of 50,000."""
_BATCHES = 4
"""Batches between progress updates."""
_DRAWS = 1000
"""Bootstrap resamples for the harness's standard errors of metrics that are not means."""
_KINDS = {
    "loglikelihood": "log-likelihoods",
    "loglikelihood_rolling": "log-likelihoods of texts",
    "generate_until": "answers",
}
"""Name of the harness's request method → its name in messages."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedTasks:
    """Tasks with their rows. tasks, groups: name → the harness's object."""

    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]


def open_tasks(specs: Sequence[str], required: Sequence[Requirement] = ()) -> OpenedTasks:
    """Find tasks and load their rows, before any model is loaded.

    Args:
        specs: Names of tasks, groups and tags of the harness; YAML files of tasks; directories, for all tasks in them.
            A YAML file can refer to Python functions in its directory, which are then executed.
        required: The requirements of the user.

    Raises:
        ConfigError: A task does not exist, executes code written by the model, or needs images or sound; or see
            `requirements.check_tasks`.
        DataError: A task or its rows cannot be loaded.
    """
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    with contained():
        for spec, manager, name in [*_found(specs)]:  # find all tasks before loading rows
            if spec != name and (name in tasks or name in groups):
                continue  # already loaded with a group of its directory
            try:
                loaded = manager.load([name])
            except (Exception, SystemExit) as error:  # code of a task may call sys.exit
                fix = "without a network, HF_HUB_OFFLINE=1 takes rows of earlier downloads"
                fix = fix if isinstance(error, ConnectionError) else ""
                what = f"the harness cannot load it or its rows: {_reason(error)}"
                raise DataError(Problem(Code.EVALUATE_TASK, what, spec, fix=fix)) from error
            for same in tasks.keys() & loaded["tasks"].keys():
                if repr(tasks[same].dump_config()) != repr(loaded["tasks"][same].dump_config()):
                    what, fix = f"another task is called {same!r} too", "give each its own name, or run one of them"
                    raise ConfigError(Problem(Code.EVALUATE_TASK, what, spec, OPTION, fix))
            tasks |= loaded["tasks"]
            groups |= loaded["groups"]
    for attribute, what in (
        ("UNSAFE_CODE", "runs code that the model writes"),
        ("MULTIMODAL", "needs images or sound"),
    ):
        if refused := [name for name, task in tasks.items() if getattr(task, attribute, False)]:
            raise ConfigError(Problem(Code.EVALUATE_TASK, f"{what}, which is not supported", refused[0], OPTION))
    requirements.check_tasks(required, [*tasks, *groups])
    return OpenedTasks(tasks, groups)


def _found(specs: Sequence[str]) -> Iterator[tuple[str, TaskManager, str]]:
    """Each task: as the user names it, its task manager, and its name there. Raises ConfigError: it does not exist."""
    names = [spec for spec in specs if not is_path(spec)]
    known = TaskManager() if names else TaskManager(include_defaults=False)
    for spec in specs:
        path, what, fix = Path(spec), "", ""
        if not is_path(spec):
            near = difflib.get_close_matches(spec, known.all_tasks, n=3, cutoff=0.6)
            what = "" if spec in known.task_index else f"the lm-evaluation-harness has no task {spec!r}"
            fix = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
        elif path.is_dir():
            local = TaskManager(include_path=spec, include_defaults=False)
            yield from ((f"{spec}: {name}", local, name) for name in (*local.all_groups, *local.all_subtasks))
            what = "" if local.all_tasks else "there is no YAML file with a key `task` in it"
        elif not path.is_file():
            what = "no such file or directory"
        if what:
            raise ConfigError(Problem(Code.EVALUATE_TASK, what, spec if is_path(spec) else "", OPTION, fix))
        if not path.is_dir() or not is_path(spec):
            yield spec, known, spec


class _ModelOfHarness:
    """The model for the harness: the base with or without its adapter, computed with the layers that `generate` uses.

    It is not a `torch.nn.Module`, so that the harness does not tie or move weights.
    """

    def __init__(self, loaded: LoadedAdapter):
        self.config, self.device, self._loaded = loaded.model.config, loaded.model.device, loaded

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor) -> Any:
        """ids: (rows, tokens), padded on the right. Returns an output with logits, (rows, tokens, vocabulary)."""
        with self._loaded.computing():
            return self._loaded.model(input_ids=ids, use_cache=False)

    @torch.inference_mode()
    def generate(self, **keywords: Any) -> torch.Tensor:
        """As the model's `generate`, without a cache where a row passes a limit of `length_limits`."""
        length = keywords["input_ids"].shape[1]
        if crosses(length_limits(self.config), length, keywords["max_length"] - length):
            keywords["use_cache"] = False
        with self._loaded.computing():
            ids: torch.Tensor = self._loaded.model.generate(**keywords)
        return ids


class _HarnessedModel(HFLM):
    """The harness's `HFLM`, which computes requests in batches of bounded size and records requests and responses.

    Attributes:
        requests: Kind of request → the arguments of each, in the harness's order.
        responses: Kind of request → the response to each.
    """

    def __init__(self, loaded: LoadedAdapter, name: str, stderr: Any):
        """name: the model's name in progress events. stderr: the stream for progress."""
        super().__init__(
            _ModelOfHarness(loaded),
            backend="causal",
            tokenizer=copy.deepcopy(loaded.tokenizer),  # the harness sets its padding token
            max_length=context_length(loaded.model.config),
            softmax_dtype="float32",
            chat_template_args=loaded.renderer.arguments,
        )
        self._name, self._stderr = name, stderr
        self.requests: dict[str, list[Any]] = {}
        self.responses: dict[str, list[Any]] = {}

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations of contexts, each with whether it is the greedy continuation."""
        lengths = [self._tokens("".join(request.args)) for request in requests]
        return self._in_batches("loglikelihood", super().loglikelihood, requests, lengths)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihoods of whole texts."""
        lengths = [self._tokens(request.args[0]) for request in requests]
        return self._in_batches("loglikelihood_rolling", super().loglikelihood_rolling, requests, lengths)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Completions of contexts, up to a stop text."""
        pairs = [request.args for request in requests]
        lengths = [self._tokens(text) + (asked.get("max_gen_toks") or self.max_gen_toks) for text, asked in pairs]
        return self._in_batches("generate_until", super().generate_until, requests, lengths)

    def _tokens(self, text: str) -> int:
        """The number of tokens of a text, at most the model's context."""
        return max(1, min(len(self.tok_encode(text)), int(self.max_length)))

    def _in_batches(
        self, kind: str, compute: Callable[..., list[Any]], requests: Sequence[Any], lengths: Sequence[int]
    ) -> list[Any]:
        """Compute requests from the longest to the shortest, in batches of at most `_BATCH_TOKENS` tokens."""
        order = sorted(range(len(requests)), key=lambda number: -lengths[number])
        responses: list[Any] = [None] * len(requests)
        start, printed = 0, sys.stderr
        with redirect_stderr(self._stderr), counting(f"{self._name}: {_KINDS[kind]}", len(order)) as advance:
            while start < len(order):
                self.batch_size_per_gpu = max(1, min(_BATCH, _BATCH_TOKENS // lengths[order[start]]))
                if any(lengths[order[start]] > limit for limit in length_limits(self.model.config)):
                    self.batch_size_per_gpu = 1  # the harness pads without a mask
                numbers = order[start : start + _BATCHES * self.batch_size_per_gpu]
                with redirect_stderr(printed):  # one of the harness's progress bars cannot be disabled
                    found = compute([requests[number] for number in numbers], disable_tqdm=True)
                for number, response in zip(numbers, found, strict=True):
                    responses[number] = response
                start += len(numbers)
                advance(len(numbers))
        self.requests[kind], self.responses[kind] = [request.args for request in requests], responses
        return responses


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
    models, found = {}, {}
    for name in (BASE, ADAPTER):
        with loaded.without_adapter() if name == BASE else nullcontext():
            models[name], found[name] = _run_one(loaded, opened, limit, name)
    if models[BASE].requests != models[ADAPTER].requests:
        what, fix = "base and adapter were asked different things", "make the prompts of the task the same every time"
        raise DataError(Problem(Code.EVALUATE_TASK, what, key=OPTION, fix=fix))
    remarks = [_effect(models[BASE].responses, models[ADAPTER].responses, loaded.where)]
    if loaded.chat:
        remarks.append("tasks: prompts go through the chat template, as the adapter was trained on conversations")
    return TaskResults(
        _metrics(opened, found), limit, loaded.chat, version("lm-eval"), [line for line in remarks if line]
    )


def _run_one(
    loaded: LoadedAdapter, opened: OpenedTasks, limit: int | None, name: str
) -> tuple[_HarnessedModel, dict[str, Any]]:
    """Run tasks on the model in its current state. Returns the model with its requests, and the harness's results."""
    stderr = sys.stderr
    with contained():
        model = _HarnessedModel(loaded, name, stderr)
        for task in opened.tasks.values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        try:
            found = evaluator.evaluate(
                model,
                {"tasks": dict(opened.tasks), "groups": dict(opened.groups)},
                limit=limit,
                bootstrap_iters=_DRAWS,
                apply_chat_template=loaded.chat,
                fewshot_as_multiturn=loaded.chat,
            )
        except (Exception, SystemExit) as error:
            if isinstance(error, LoratuneError) or is_out_of_memory(error):
                raise
            what, fix = f"the harness cannot run them: {_reason(error)}", "--debug shows where"
            raise DataError(Problem(Code.EVALUATE_TASK, what, key=OPTION, fix=fix)) from error
    return model, found


def _effect(base: Mapping[str, Sequence[Any]], adapter: Mapping[str, Sequence[Any]], where: str) -> str:
    """A remark if all answers equal those of the base; else empty. Raises NumericError: all log-likelihoods do."""
    likelihoods = [kind for kind in base if kind != "generate_until"]
    if likelihoods and all(base[kind] == adapter[kind] for kind in likelihoods):
        count = sum(len(base[kind]) for kind in likelihoods)
        what = f"the adapter had no effect: all {count:,} log-likelihoods are exactly those of the base"
        fix = "check how it was made; `loratune params --adapter` shows how far it moves each module"
        raise NumericError(Problem(Code.LORA_UNCHANGED, what, where, fix=fix))
    if not likelihoods and base == adapter:
        return f"tasks: base and adapter give the same {len(base['generate_until']):,} answers"
    return ""


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _metrics(opened: OpenedTasks, found: Mapping[str, Any]) -> dict[str, dict[str, TaskMetric]]:
    """Task, or group with its own metrics → name of a metric → metric."""
    names = [name for name in found[BASE]["results"] if name in opened.tasks or name in found[BASE].get("groups", {})]
    return {name: dict(_metrics_of(name, opened, found)) for name in names}


def _metrics_of(name: str, opened: OpenedTasks, found: Mapping[str, Any]) -> Iterator[tuple[str, TaskMetric]]:
    """The metrics of one task or group."""
    results = {model: found[model]["results"][name] for model in (BASE, ADAPTER)}
    leaves = [name] if name in opened.tasks else [task.task_name for task in opened.groups[name].get_all_tasks()]
    for key, base_value in results[BASE].items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(base_value, int | float | np.number):
            continue
        values = {model: float(result[key]) for model, result in results.items()}
        errors = {model: _number(result.get(f"{metric}_stderr,{filter_name}")) for model, result in results.items()}
        samples = {model: _samples(found[model], leaves, metric, filter_name) for model in (BASE, ADAPTER)}
        aggregations = {_aggregation(opened.tasks[leaf], metric) for leaf in leaves}
        aggregation = aggregations.pop() if len(aggregations) == 1 else ""
        if name not in opened.tasks and not (aggregation == MEAN and _are_means(values, samples)):
            aggregation = ""
        better = found[BASE]["higher_is_better"].get(name, {}).get(metric)
        compared = compare_metric(values, errors, samples, aggregation, better)
        yield (metric if filter_name == "none" else f"{metric},{filter_name}"), compared


def _aggregation(task: Any, metric: str) -> str:
    """The name of the harness's function with which a task aggregates a metric, by default the mean; empty if it is not
    a function of the harness."""
    function = task.aggregation().get(metric, metrics.mean)
    name: str = getattr(function, "__name__", "")
    return name if getattr(metrics, name, None) is function else ""


def _samples(found: Mapping[str, Any], leaves: Sequence[str], metric: str, filter_name: str) -> list[Any]:
    """The values of a metric for the documents that have it."""
    samples = [sample for leaf in leaves for sample in found["samples"][leaf] if sample["filter"] == filter_name]
    return [sample[metric] for sample in samples if metric in sample["metrics"]]


def _are_means(values: Mapping[str, float], samples: Mapping[str, Sequence[Any]]) -> bool:
    """Whether the metrics of a group are means over all documents of its tasks, rather than over its tasks."""
    return all(np.isclose(np.mean(samples[model]), value, rtol=1e-9) for model, value in values.items())


def _number(value: Any) -> float | None:
    """A standard error; None for the harness's `N/A`."""
    return float(value) if isinstance(value, int | float | np.number) and np.isfinite(value) else None


@contextmanager
def contained() -> Iterator[None]:
    """Isolate the harness inside: output goes to the debug log, random seeds are the harness's, and it starts no
    processes; afterwards random states and environment variables are restored."""
    printed = io.StringIO()
    try:
        with kept_environment(), kept_random_states(), turns.stdout_to(printed), redirect_stderr(printed):
            os.environ["DISABLE_MULTIPROC"] = "1"  # the harness's resampling
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
            torch.manual_seed(DEFAULT_OTHER_SEED)
            yield
    finally:
        for line in printed.getvalue().splitlines():
            _logger.debug(line)
