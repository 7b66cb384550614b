"""The base and the rows of a sweep, loaded once; adapters are put on the base in turn, trained, scored, and taken off.

A trial is `train` itself, with the base and the rows that are there, in a directory of its own: what it publishes is
what `loratune train` would, byte for byte but for times. Afterwards every bit of the base is compared with what was
loaded; where it differs, as after initializations that take a part out of it, the base is loaded again.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from loratune.adapter import card
from loratune.codes import Code
from loratune.commands import measuring
from loratune.commands import train as training
from loratune.commands.plan import LoadedRun, Plan, adapted, facts, load_rows, load_run, template_fingerprint
from loratune.commands.train import Reporter, Result
from loratune.config import RunConfig
from loratune.data import ProgressFactory
from loratune.data.packing import BatchLayout
from loratune.errors import ConfigError, ModelError, NumericError, Problem, ResumeError
from loratune.evaluation.study_results import RowLosses
from loratune.lora import attach, tensors
from loratune.model import load
from loratune.model.fingerprints import BaseState
from loratune.system.files import is_directory
from loratune.system.launcher import SINGLE_PROCESS, Group
from loratune.training import auto, batching, final_score, objectives, preflight
from loratune.training.batching import TokenizedDatasets
from loratune.training.continuing import EarlierRun
from loratune.training.duration import Costs, seconds_per_operation
from loratune.training.preflight import ValidatedRun
from loratune.training.resume import find_resume_point
from loratune.training.run_dir import RunDirectory

_MOST_ROWS = 2048
"""Distinct held-out rows on which trials are compared, at most."""


@dataclass(frozen=True)
class TrialOutcome:
    """What a trial came to.

    Attributes:
        result: The adapter that was published.
        losses: Its losses on the held-out rows.
        seconds: How long it took, with everything; of what an interruption undid, nothing counts.
        is_resumed: Whether it went on from a checkpoint, so that this is not the time of a whole trial.
    """

    result: Result
    losses: RowLosses
    seconds: float
    is_resumed: bool


class Bench:
    """What is loaded once.

    Attributes:
        loaded: Tokenizer, rows and base of the config itself.
        measure: What trials are compared by: the objective of the config itself, whatever theirs is.
    """

    def __init__(self, run: ValidatedRun, watch: ProgressFactory, log: Callable[[str], None]):
        """Load everything. Raises as `plan.load_run`."""
        self._run, self._watch, self._log = run, watch, log
        self.loaded: LoadedRun = load_run(run, watch)
        self._state = BaseState(self.loaded.base.model)
        self._plan: Plan | None = None
        self._rows: dict[str, tuple[TokenizedDatasets, EarlierRun | None]] = {
            _rows_key(run.config): (self.loaded.datasets, self.loaded.earlier)
        }
        held_out = self.loaded.datasets.validation
        assert held_out is not None
        self._held_out, copies = held_out, held_out.copies()
        numbers = np.array([*copies])
        if len(numbers) > _MOST_ROWS:
            numbers = np.sort(np.random.default_rng(0).choice(numbers, _MOST_ROWS, replace=False))
        self._copies = {int(number): len(copies[int(number)]) for number in numbers}
        self._per_operation: float | None = None
        sections = run.config.data, run.config.training, run.config.preferences
        self.measure = batching.objective_of({"validation": held_out}, *sections)

    @property
    def example_prompt(self) -> str:
        """A prompt to try an adapter with, quoted for a shell."""
        return card.example_prompt(self._run.rows.train) if self._run.rows is not None else "PROMPT"

    @property
    def compared_rows(self) -> tuple[int, int]:
        """Distinct held-out rows on which trials are compared, and all held-out rows."""
        return len(self._copies), self._held_out.items

    @property
    def measured_by(self) -> str:
        """The objective that trials are compared by, where answers are compared; else empty."""
        return objectives.described(self._run.config)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of all that the config itself reads."""
        datasets = self.loaded.datasets
        found = {"the base": self.loaded.base.fingerprint, "the training rows": datasets.train.fingerprint}
        found |= {"the validation rows": self._held_out.fingerprint}
        found |= {"the test rows": datasets.test.fingerprint} if datasets.test else {}
        if template := template_fingerprint(self._run.config, self.loaded.tokenizer):
            found["the chat template"] = template
        if described := self.measured_by:
            found["what trials are compared by"] = described
        return found | ({"the start": self._run.start.digest} if self._run.start else {})

    def prepare_rows(self, run: RunConfig) -> TokenizedDatasets:
        """The rows as a trial has them, from the token cache where they are known. Raises DataError, ConfigError."""
        key = _rows_key(run)
        if key not in self._rows:
            self._rows[key] = load_rows(self._as_validated(run), self.loaded.tokenizer, self._watch)
        return self._rows[key][0]

    def _as_validated(self, run: RunConfig) -> ValidatedRun:
        return replace(self._run, config=preflight.with_absolute_paths(run), resume_point=None)

    def estimate(self, run: RunConfig) -> float:
        """About how many seconds a trial takes here, see `duration`; the speed is measured the first time."""
        if run.training.max_minutes is not None:
            return 60 * run.training.max_minutes
        rows = self.prepare_rows(run)
        run, _ = auto.decide(run, facts(self._as_validated(run), rows))
        held_out = int(rows.validation.rows.lengths.sum()) if rows.validation else 0
        model, _ = attach.adapt(load.build_meta(load.load_config(run.model), run.model), run.lora, seed=0)
        train, together = rows.train.rows, rows.train.together
        size, longest = run.training.per_device_train_batch_size, run.data.max_length
        layout = BatchLayout(train, train.lengths, run.data.packing, size, longest, pad_id=0, together=together)
        lengths, supervised = (column.reshape(-1, together).sum(1) for column in (train.lengths, train.supervised))
        costs = Costs.of_run(model, run, lengths, supervised, layout.saving(), together)
        operations = costs.work(run.training, held_out).operations
        if self._per_operation is None:
            self._per_operation = seconds_per_operation(model, run.model, costs, operations)
        return operations * self._per_operation

    def train(self, run: RunConfig, output: Path, reporter: Reporter) -> TrialOutcome:
        """Train the adapter of a trial, and score it. An interrupted one goes on from its checkpoint.

        The adapter stays on the base until `take_off`, which has to follow whatever happens.

        Args:
            run: The config of the trial.
            output: Where its adapter goes; an adapter that is there is replaced.
            reporter: Receives what the run reports.

        Raises:
            LoratuneError, KeyboardInterrupt: As `train.train`.
        """
        start = time.monotonic()
        output.parent.mkdir(parents=True, exist_ok=True)
        partial, inputs = output.with_name(f"{output.name}.partial"), self._run.directory.inputs
        directory = RunDirectory(output, partial, str(output), overwrite=True, inputs=inputs)
        validated = self._resumed(replace(self._as_validated(run), directory=directory))
        result = training.train(validated, reporter, planner=self._make_plan)
        assert result is not None and self._plan is not None
        losses, point = self._score(self._plan), validated.resume_point
        before = point.seconds if point else 0.0
        return TrialOutcome(result, losses, before + time.monotonic() - start, point is not None)

    def _resumed(self, validated: ValidatedRun) -> ValidatedRun:
        """The run with the checkpoint that it goes on from, if there is one that fits."""
        directory = validated.directory
        if not is_directory(directory.partial) or not directory.is_resumable() or directory.rejected_adapter():
            return validated
        try:
            point = find_resume_point(directory.checkpoints, validated.config, ())
        except (ConfigError, ResumeError) as error:
            self._log(f"the trial starts again: {error.problems[0].what}")
            return validated
        config = auto.keep(validated.config, point.identity["config"])
        return replace(validated, config=config, resume_point=point)

    def _make_plan(self, run: ValidatedRun, watch: ProgressFactory, group: Group = SINGLE_PROCESS) -> Plan:
        self.prepare_rows(run.config)
        datasets, earlier = self._rows[_rows_key(run.config)]
        self._plan = adapted(run, replace(self.loaded, datasets=datasets, earlier=earlier), group)
        measuring.compute_reference(self._plan, self.measure, self._log)
        return self._plan

    def _score(self, plan: Plan) -> RowLosses:
        """The losses of the adapter on the held-out rows of the config itself, which are the same for all trials."""
        scoring, acceleration = plan.batches.scoring, plan.batches.acceleration
        found = final_score.row_losses(
            plan.model, self._held_out, [*self._copies], scoring, acceleration, SINGLE_PROCESS, self.measure
        )
        scored = RowLosses(
            np.array([loss.total for loss in found]),
            np.array([loss.tokens for loss in found], dtype=np.float64),
            np.array([*self._copies.values()], dtype=np.float64),
        )
        if not scored.is_finite:
            what, fix = f"the loss on the validation rows is {scored.loss}", "lower training.learning_rate"
            raise NumericError(Problem(Code.TRAINING_HELD_OUT_NOT_FINITE, what, key="data.validation", fix=fix))
        return scored

    def take_off(self) -> None:
        """Take the adapter off the base, and load the base again where it is not what it was.

        An error of the trial must have been dealt with before, as its traceback would keep the old base.
        """
        plan, self._plan = self._plan, None
        if plan is not None:
            tensors.detached(plan.model)
        del plan
        gc.unfreeze()  # a run freezes what it has; the next one would find what this one left
        gc.collect()
        section, base = self._run.config.model, self.loaded.base
        if not (section.torch_compile or section.use_liger_kernel) and self._state.restore(base.model):
            return
        self._log("the adapter has changed the base, which is loaded again")
        fingerprint = base.fingerprint
        del base
        self.loaded = replace(self.loaded, base=None)  # type: ignore[arg-type]  # two would take twice the memory
        gc.collect()
        fresh = load.load_for_run(section, SINGLE_PROCESS)
        if fresh.fingerprint != fingerprint:
            what, fix = "has changed since the sweep began", "restore it, and the same command goes on"
            raise ModelError(Problem(Code.TRAIN_BASE_CHANGED, what, section.name_or_path, "model.name_or_path", fix))
        self.loaded = replace(self.loaded, base=fresh)
        self._state = BaseState(fresh.model)


def _rows_key(run: RunConfig) -> str:
    """What decides the rows of a trial, among what trials differ in."""
    fixed = {"packing", "train", "validation", "test", "chat_template"}
    section: dict[str, Any] = run.data.model_dump(mode="json", exclude=fixed)
    return f"{section} {run.training.seed if run.data.replay is not None else ''}"
