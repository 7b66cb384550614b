"""The base and the rows of a sweep, loaded once, and the trials on them: plan, errors and time of each.

One adapter after the other is attached, trained by `train`, scored and removed. Afterwards every bit of the base is
compared with the loaded values. If it differs, as after initializations that remove a part of it, the base is loaded
again. So an adapter has the bytes that `loratune train` would write.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from loratune import data
from loratune.codes import Code
from loratune.compare import exact, preferences
from loratune.compare.metrics import RowLosses
from loratune.compare.verdict import SHORT
from loratune.config import RunConfig
from loratune.data import RawDatasets
from loratune.data.packing import BatchLayout
from loratune.errors import (
    ConfigError,
    DataError,
    LoratuneError,
    ModelError,
    NumericError,
    Problem,
    ResumeError,
    is_out_of_memory,
)
from loratune.events import note
from loratune.lora import creation, tensors
from loratune.model import load
from loratune.model.fingerprints import BaseState
from loratune.system.files import is_directory, is_file
from loratune.system.launcher import SINGLE_PROCESS
from loratune.text import format_duration
from loratune.training import auto, batching, preflight, reference
from loratune.training.checkpoints.resume import find_resume_point
from loratune.training.checkpoints.run_dir import RunDirectory
from loratune.training.duration import Costs, seconds_per_operation
from loratune.training.plan import Plan, facts, load_base, load_rows, make_plan, template_fingerprint
from loratune.training.preflight import Run
from loratune.training.rows import TokenizedDatasets, tokenize

_MAX_ROWS = 2048
"""Distinct held-out rows on which trials are compared, at most."""
_FINITE = {
    Code.TRAINING_WORSE_THAN_BASE: "worse than base",
    Code.TRAINING_LEARNED_NOTHING: "learned nothing",
    Code.LORA_UNCHANGED: "learned nothing",
}
"""Numeric errors other than divergence → the state of the trial."""
_ESTIMATE_ERROR = 2.0
"""The factor by which an estimate without any trial may be off, see `training.duration`."""


def failure(error: Exception) -> tuple[str, str] | None:
    """The state of a trial that ended with an error, and the reason; None for an error that ends the sweep.

    Errors caused by the settings of a trial are results. Problems of the disk, the storage or the base would end the
    next trial too, and an unexpected error must not look like a result.
    """
    why = next(iter(str(error).splitlines()), "")
    if not isinstance(error, LoratuneError):
        return ("out of memory", why) if is_out_of_memory(error) else None
    why, code = error.problems[0].what, error.problems[0].code
    if code is Code.SYSTEM_OUT_OF_MEMORY:
        return "out of memory", why
    if isinstance(error, NumericError):
        return _FINITE.get(code, "diverged"), why
    # the base has changed, or other files are in the way
    is_of_all = code == Code.MODEL_CHANGED or code.startswith(("run.", "output."))
    return ("failed", why) if isinstance(error, ConfigError | ModelError | DataError) and not is_of_all else None


@dataclass
class Budget:
    """The time that is left, and how long trials take.

    Attributes:
        seconds: The budget; None without one.
        started: When it began, by `time.monotonic`.
        ratios: The seconds of each trial that ended here, over its estimate.
        begun: Trials that were begun here.
    """

    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)
    ratios: list[float] = field(default_factory=list)
    begun: int = 0

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return float("inf") if self.seconds is None else self.seconds - (time.monotonic() - self.started)

    def expected(self, estimate: float) -> float:
        """Expected seconds of a trial: the estimate times the largest ratio of trials that ended here."""
        return estimate * max(self.ratios, default=1.0)

    def fits(self, estimate: float) -> bool:
        """Whether there is time for a trial. Raises ConfigError: not even the first one fits."""
        if self.begun or self.ratios or self.seconds is None:
            return self.expected(estimate) <= self.left
        if estimate > _ESTIMATE_ERROR * max(self.left, 0.0):
            gone = format_duration(self.seconds - self.left)
            what = f"{format_duration(self.seconds)} is shorter than one trial: {gone} have passed before it, and it "
            what += f"takes about {format_duration(estimate)} on this machine"
            fix = "raise it, or shorten the trials: training.max_steps, training.num_train_epochs"
            raise ConfigError(Problem(Code.CONFIG_BUDGET, what, "`budget=...`", fix=fix))
        return True


class TrialRunner:
    """Trains adapters on one base and one set of rows.

    Attributes:
        datasets: The rows of the config itself.
        base: Its base.
        objective: What trials are compared by: the objective of the config itself, whatever theirs is.
        described: That objective in words where answers are compared; else empty.
        rows: The number of distinct held-out rows on which trials are compared.
        total: The number of all held-out rows.
    """

    def __init__(self, run: Run):
        """Load everything. Raises as `plan.load_rows` and `plan.load_base`."""
        self._run = run
        self.datasets, self.base = load_rows(run), load_base(run)
        self._state = BaseState(self.base.model)
        self._plan: Plan | None = None
        self._rows = {_rows_key(run.config): self.datasets}
        self._raw: dict[tuple[int, int] | None, RawDatasets | None] = {_sample_key(run.config): run.rows}
        held_out = self.datasets.validation
        assert held_out is not None
        self._held_out, copies = held_out, held_out.copies()
        numbers = np.array([*copies])
        if len(numbers) > _MAX_ROWS:
            numbers = np.sort(np.random.default_rng(0).choice(numbers, _MAX_ROWS, replace=False))
        self._copies = held_out.weighted({int(number): len(copies[int(number)]) for number in numbers})
        self.rows, self.total = (held_out.count_rows(items) for items in (self._copies, range(held_out.items)))
        self._seconds_per_operation: float | None = None
        self.objective = batching.objective_of({"validation": held_out}, run.config)
        self.described = preferences.described(run.config)

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprints of everything that the config reads."""
        datasets = self.datasets
        found = {
            "the base": self.base.fingerprint,
            "the training rows": datasets.train.fingerprint,
            "the validation rows": self._held_out.fingerprint,
            "the test rows": datasets.test.fingerprint if datasets.test else "",
            "the chat template": template_fingerprint(self._run.config, datasets.tokenizer),
            "what trials are compared by": self.described,
            "the start": self._run.start.digest if self._run.start else "",
        }
        return {name: fingerprint for name, fingerprint in found.items() if fingerprint}

    def prepare_rows(self, config: RunConfig) -> TokenizedDatasets:
        """The rows of a trial, tokenized once for all trials with the same settings of rows. Raises DataError,
        ConfigError."""
        if (key := _rows_key(config)) not in self._rows:
            self._rows[key] = tokenize(self._with_config(config), self.datasets.tokenizer)
        return self._rows[key]

    def _with_config(self, config: RunConfig) -> Run:
        config = preflight.with_absolute_paths(config)
        if (key := _sample_key(config)) not in self._raw:
            self._raw[key] = data.read_datasets(config.data, config.training.seed)
        return replace(self._run, config=config, rows=self._raw[key], resume_point=None)

    def estimate(self, config: RunConfig) -> float:
        """The approximate seconds of a trial on this machine, see `duration`; the first call measures its speed."""
        if config.training.max_minutes is not None:
            return 60 * config.training.max_minutes
        rows = self.prepare_rows(config)
        config, _ = auto.decide(config, facts(self._with_config(config), rows))
        held_out = int(rows.validation.rows.lengths.sum()) if rows.validation else 0
        model, _ = creation.adapt(load.build_meta(load.load_config(config.model), config.model), config.lora, seed=0)
        train, rows_per_example = rows.train.rows, rows.train.rows_per_example
        size, longest = config.training.per_device_train_batch_size, config.data.max_length
        layout = BatchLayout(
            train, train.lengths, config.data.packing, size, longest, pad_id=0, rows_per_example=rows_per_example
        )
        lengths, supervised = (
            column.reshape(-1, rows_per_example).sum(1) for column in (train.lengths, train.supervised)
        )
        costs = Costs.of_run(model, config, lengths, supervised, layout.saving(), rows_per_example)
        operations = costs.work(config.training, held_out)[1]
        if self._seconds_per_operation is None:
            self._seconds_per_operation = seconds_per_operation(model, config.model, costs, operations)
        return operations * self._seconds_per_operation

    @contextmanager
    def planned(self, config: RunConfig, output: Path) -> Iterator[Plan]:
        """The plan of a trial, with the lock of its directory; an interrupted one continues from its checkpoint.

        The adapter stays on the base until `remove_adapter`, which has to follow whatever happens.

        Args:
            config: The config of the trial.
            output: Where its adapter goes; an adapter that is there is replaced.

        Raises:
            LoratuneError: As `make_plan`.
        """
        output.parent.mkdir(parents=True, exist_ok=True)
        partial, inputs = output.with_name(f"{output.name}.partial"), self._run.directory.inputs
        directory = RunDirectory(output, partial, str(output), overwrite=True, inputs=inputs)
        trial = self._resumed(replace(self._with_config(config), directory=directory))
        with directory.locked():
            self._plan = make_plan(trial, datasets=self.prepare_rows(trial.config), base=self.base)
            reference.set_preference_references(self._plan, self.objective)
            yield self._plan

    def _resumed(self, trial: Run) -> Run:
        """The run with the checkpoint that it continues from, if there is one that fits."""
        directory = trial.directory
        if not is_directory(directory.partial) or not directory.is_resumable() or is_file(directory.rejection):
            return trial
        try:
            point = find_resume_point(directory.checkpoints, trial.config, ())
        except (ConfigError, ResumeError) as error:
            note(f"the trial starts again: {error.problems[0].what}")
            return trial
        config, _ = auto.with_decided(trial.config, point.record.decided)
        return replace(trial, config=config, resume_point=point)

    def score(self, plan: Plan) -> RowLosses:
        """The losses of the adapter on the held-out rows of the config itself, which are the same for all trials."""
        losses = plan.batches.engine.losses(self._held_out, self._copies, self.objective)
        if not losses.is_finite:
            what, fix = f"the loss on the validation rows is {losses.loss}", "lower training.learning_rate"
            raise NumericError(Problem(Code.TRAINING_NOT_FINITE, what, key="data.validation", fix=fix))
        return losses

    def right_answers(self, plan: Plan) -> str:
        """For each distinct held-out row 1 if the greedy answer of the adapter is the expected one, else 0; empty if
        their answers are not short, see `exact.comparable`."""
        held_out = self._held_out
        rows = [row for number in self._copies for row in held_out.item(number)]
        if held_out.rows.owners is not None or not exact.comparable(rows, SHORT):
            return ""
        found = exact.exact_matches(plan.model, plan.batches.engine, rows, nullcontext())
        return "".join("1" if is_right else "0" for is_right in found)

    def remove_adapter(self) -> None:
        """Remove the adapter from the base, and reload the base if it has changed.

        An error of the trial must have been handled before, as its traceback would keep the old base in memory.
        """
        plan, self._plan = self._plan, None
        is_patched = self._run.config.model.torch_compile
        if plan is not None:
            is_patched |= plan.config.model.use_liger_kernel is True
            tensors.detached(plan.model)
        del plan
        gc.collect()
        section, base = self._run.config.model, self.base
        if not is_patched and self._state.restore(base.model):
            return
        note("the adapter has changed the base, which is loaded again")
        fingerprint = base.fingerprint
        del base
        del self.base  # Two would take twice the memory.
        gc.collect()
        fresh = load.load_for_run(section, SINGLE_PROCESS)
        if fresh.fingerprint != fingerprint:
            what, fix = "has changed since the sweep began", "restore it, then rerun the same command to resume"
            raise ModelError(Problem(Code.MODEL_CHANGED, what, section.name_or_path, "model.name_or_path", fix))
        self.base = fresh
        self._state = BaseState(fresh.model)


def _rows_key(config: RunConfig) -> str:
    """The settings of rows that trials can differ in."""
    fixed = {"train", "validation", "test", "chat_template", "packing"}
    section: dict[str, Any] = config.data.model_dump(mode="json", exclude=fixed)
    is_drawn = config.data.replay is not None or config.data.max_train_samples is not None
    return f"{section} {config.training.seed if is_drawn else ''}"


def _sample_key(config: RunConfig) -> tuple[int, int] | None:
    """What decides which of the training rows are used; None if all are."""
    return None if (count := config.data.max_train_samples) is None else (count, config.training.seed)
