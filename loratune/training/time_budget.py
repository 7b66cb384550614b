"""`training.max_minutes`: the number of steps of a run, fixed once, before its first step, and kept as `max_steps`.

The rates of the first steps depend on the number of all, so steps of the run itself cannot be timed: some steps are
timed and rolled back, and the run that follows has a fixed number of steps.
"""

import gc
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loratune.codes import Code
from loratune.compare import collapse, gain
from loratune.compare.engine import NextToken, Objective
from loratune.config import AUTO, TrainingSection, decided
from loratune.data import TokenizedDataset
from loratune.data.packing import BatchLayout
from loratune.errors import ConfigError, Problem
from loratune.events import note
from loratune.text import format_duration, plural
from loratune.training import auto, duration, trainer
from loratune.training.callbacks import StepTimer
from loratune.training.duration import FEWEST, READ, WARM_UP, WITH_MISMATCHED, Costs, Speed, StepBudget
from loratune.training.evaluations import EvaluationSteps, optimizer_steps
from loratune.training.preferences import MOST_COMPARED, PreferenceObjective
from loratune.training.run_context import RunContext

if TYPE_CHECKING:
    from loratune.commands.plan import Plan

KEY = "training.max_minutes"
_FORWARD_SHARE, _LEAST_FORWARD, _MOST_FORWARD = 0.01, 3, 8
"""Forward passes of each kind are timed until that takes this part of the budget; so many at least, and at most."""
_CLOSING = 1.0
"""Seconds at the end that are not measured beforehand: the card, the record, the tokenizer's files, and the exit."""
_WRITES = 2
"""Publishing takes about as long as so many checkpoints: the adapter is written, flushed, read back and compared."""
Pass = tuple[TokenizedDataset, Sequence[int], Objective]
"""Rows that are scored, their numbers, and the objective that they are scored by."""


@dataclass(frozen=True)
class _Estimator:
    """How long the parts of a run take.

    Attributes:
        plan: The run.
        train: The speed of micro-steps.
        scored: The speed of batches of rows that are scored at the end.
        evaluation: The speed of validation batches; without any, that of the rows scored at the end.
        optimizer: Seconds of the optimizer in a step.
        checkpoint: Seconds that a checkpoint takes.
        closing: Seconds of setting up the trainer and publishing.
    """

    plan: "Plan"
    train: Speed
    scored: Speed
    evaluation: Speed
    optimizer: float = 0.0
    checkpoint: float = 0.0
    closing: float = _CLOSING

    def room(self, left: float) -> StepBudget:
        """The number of steps for which there is time, with evaluations, checkpoints and the end."""
        plan, costs, (most, per_epoch) = self.plan, _costs(self.plan), _steps_of_epochs(self.plan)
        evaluation = self.evaluation_seconds()

        def room(closing: float) -> StepBudget:
            def beside(steps: int) -> float:
                found = _evaluation_steps(plan, plan.config.training.model_copy(update={"max_steps": steps}))
                checkpoints = -(-steps // plan.training.save_steps) * self.checkpoint
                return closing + checkpoints + (found.count * evaluation if found else 0.0)

            micro_steps = costs.micro_steps(plan.training.seed, plan.processes)
            accumulation = plan.training.gradient_accumulation_steps
            steps = duration.step_seconds(micro_steps, self.train, self.optimizer, accumulation)
            return duration.step_budget(left, steps, beside, most)

        tokens = round(room(self.closing).steps * float(costs.lengths.sum()) / per_epoch)
        return room(self.closing + self.end_seconds(tokens))

    def evaluation_seconds(self) -> float:
        """One evaluation."""
        plan = self.plan
        rows = plan.batches.held_out
        if rows is None or plan.datasets.validation is None:
            return 0.0
        return self._seconds(self.evaluation, _costs_of(plan, rows.layout, plan.datasets.validation), rows.batches)

    def reference_seconds(self) -> float:
        """The pass before the first step that scores preferences by the reference."""
        plan, objective = self.plan, self.plan.batches.objective
        if not isinstance(objective, PreferenceObjective):
            return 0.0
        rows = {name: plan.datasets.splits[name] for name in objective.splits}
        if not objective.formula.has_reference and plan.batches.validation is not None:
            rows.pop("train", None)
        return sum(self.scoring_seconds((one, range(one.items), objective)) for one in rows.values())

    def end_seconds(self, tokens: int) -> float:
        """The passes after the last step, in a run that reads so many tokens."""
        seconds = sum(map(self.scoring_seconds, _passes_at_the_end(self.plan, tokens)))
        if isinstance(self.plan.batches.objective, PreferenceObjective):
            seconds += self.evaluation_seconds() or self.pass_seconds(MOST_COMPARED)
        return seconds + self.pass_seconds(self.plan.batches.train.size)  # see `check_final_loss`

    def scoring_seconds(self, one: Pass) -> float:
        """Scoring rows."""
        return self._seconds(self.scored, *_scored(self.plan, one))

    def pass_seconds(self, most: int) -> float:
        """Reading the first training items, so many at most, in the batches of training."""
        layout = self.plan.batches.train
        return self._seconds(self.evaluation, _costs(self.plan), _slices(min(most, len(layout.items)), layout.size))

    def _seconds(self, speed: Speed, costs: Costs, batches: Sequence[Sequence[int]]) -> float:
        """Batches that the processes share."""
        rounds = -(-len(batches) // self.plan.processes)
        operations = sum(float(costs.of_batches(np.asarray(items))) for items in batches)
        return speed.seconds(rounds, operations * rounds / max(1, len(batches)))


def fix_length(plan: "Plan", asked: TrainingSection, context: RunContext, began: float, *, scarce: bool) -> "Plan":
    """The plan with as many steps as its minutes have room for, on which all processes agree.

    Args:
        plan: The plan, whose model is ready to train and does not change.
        asked: The section as the user wrote it; epochs that it sets are an upper bound.
        context: Checkpoints and processes.
        began: When the command began, by `time.monotonic`.
        scarce: Whether the largest batch is tried first.

    Raises:
        ConfigError: There is no time for a few steps, or not for those of the warm-up.
        NumericError, OutOfMemory, ResourceError: See `trainer.time_steps`.
        KeyboardInterrupt: The run was stopped.
    """
    group, seconds = context.group, 60 * (asked.max_minutes or 0.0)
    start = time.monotonic()
    left = group.broadcast(seconds - (start - began))
    note(f"{KEY}: timing some steps, which are rolled back, to find out how many fit into {asked.max_minutes:g} min")

    def is_enough(batches: int) -> bool:
        enough = duration.is_timed_enough(batches, time.monotonic() - start, left)
        return context.stopping() or group.total([group.main and enough])[0] > 0

    timer = StepTimer(is_enough)
    if left > 0:
        trainer.time_steps(plan.job, context, timer, oom_dry_run=scarce)
        gc.collect()  # the states of the optimizer go before those of the next one come
    context.check_not_stopping()
    if len(timer.micro_steps) <= WARM_UP:
        gone = format_duration(seconds - left)
        raise _too_short(asked, f"{gone} have passed before the first step, and one takes longer than what is left")
    estimator = _timed(plan, context, timer, left)
    left = group.broadcast(seconds - (time.monotonic() - began))
    found = StepBudget(**group.broadcast(asdict(estimator.room(left)) if group.main else {}))
    _check(plan, asked, found, left)
    return _fixed(plan, asked, found, left)


def estimate_length(plan: "Plan", asked: TrainingSection, began: float) -> "Plan":
    """The plan with about as many steps as its minutes have room for, if it has a budget. No step is taken."""
    if asked.max_minutes is None:
        return plan
    costs, left = _costs(plan), 60 * asked.max_minutes - (time.monotonic() - began)
    per_operation = duration.seconds_per_operation(plan.model, plan.config.model, costs, costs.of_pass()[1])
    mismatched = asked.objective == "kto"
    train = Speed(0.0, per_operation * (WITH_MISMATCHED if mismatched else 1))
    forward = Speed(0.0, per_operation * READ * (2 if mismatched else 1))
    estimator = _Estimator(plan, train, forward, forward)
    left -= estimator.reference_seconds()  # in a run that has passed when steps are timed
    return _fixed(plan, asked, estimator.room(left), left, "about ")


def _costs(plan: "Plan") -> Costs:
    """The operations of the training batches."""
    return _costs_of(plan, plan.batches.train, plan.datasets.train)


def _costs_of(plan: "Plan", layout: BatchLayout, rows: TokenizedDataset) -> Costs:
    checkpointed = plan.training.activation_checkpointing
    return Costs.of_layout(plan.model, layout, rows.rows.lengths, rows.rows.supervised, checkpointed=checkpointed)


def _scored(plan: "Plan", one: Pass) -> tuple[Costs, list[list[int]]]:
    """The operations of rows that are scored, and their batches."""
    rows, numbers, objective = one
    scored = objective.plan(plan.batches.engine, rows, dict.fromkeys(numbers, 1))
    return _costs_of(plan, scored.layout, rows), [[*batch] for batch in scored.batches]


def _slices(items: int, size: int) -> list[list[int]]:
    return [[*range(start, min(start + size, items))] for start in range(0, items, size)]


def _passes_at_the_end(plan: "Plan", tokens: int) -> Iterator[Pass]:
    """What is scored after the last step: each but the test rows by the base and by the adapter."""
    objective = plan.batches.objective
    split, sample, _ = gain.sample(plan.datasets.compared, tokens)
    rows = plan.datasets.compared[split]
    passes: list[Pass] = [(rows, [*sample], objective), (rows, [*sample][: collapse.PROMPTS], objective)]
    if plan.earlier is not None and (earlier := plan.earlier.held_out) is not None:
        passes.append((earlier, [*gain.sample({"earlier": earlier}, tokens)[1]], NextToken()))
    if (text := plan.datasets.unrelated.rows) is not None:
        passes.append((text, gain.passages(text), NextToken()))
    yield from passes * 2
    if plan.datasets.test is not None:
        yield plan.datasets.test, [*plan.datasets.test.copies()], objective


def _timed(plan: "Plan", context: RunContext, timer: StepTimer, left: float) -> _Estimator:
    """An estimator fitted to the timed steps, and to forward passes that are timed here."""
    group, count, operations = context.group, len(timer.micro_steps), list[float]()
    for epoch in _costs(plan).micro_steps(plan.training.seed, group.count):
        operations += epoch.tolist()
        if len(operations) >= count:
            break
    train = Speed.fitted(operations[WARM_UP:count], timer.micro_steps[WARM_UP:])
    split, sample, _ = gain.sample(plan.datasets.compared, 0)
    kinds = [_scored(plan, (plan.datasets.compared[split], [*sample], plan.batches.objective))]
    if (validation := plan.batches.held_out) is not None and plan.datasets.validation is not None:
        batches = [[*batch] for batch in validation.batches]
        kinds.append((_costs_of(plan, validation.layout, plan.datasets.validation), batches))
    forward = []
    for costs, batches in kinds:
        timed = [*_forward(plan, context, costs, batches, left)]
        forward.append(Speed.fitted(*zip(*(timed[1:] or timed), strict=True)))  # the first is slower than the others
    closing = timer.setup + _WRITES * timer.checkpoint + _CLOSING
    optimizer = float(np.mean(timer.optimizer[WARM_UP:]))
    return _Estimator(plan, train, forward[0], forward[-1], optimizer, timer.checkpoint, closing)


def _forward(
    plan: "Plan", context: RunContext, costs: Costs, batches: list[list[int]], left: float
) -> Iterator[tuple[float, float]]:
    """Operations and seconds of some forward passes."""
    begin = time.monotonic()
    for number, items in enumerate(batches[:_MOST_FORWARD], 1):
        start = time.monotonic()
        plan.batches.objective.losses(plan.model, costs.layout, [items], group=context.group)
        yield float(costs.of_batches(np.asarray(items))), time.monotonic() - start
        late = number >= _LEAST_FORWARD and time.monotonic() - begin > _FORWARD_SHARE * left
        if context.stopping() or context.group.total([context.group.main and late])[0]:
            return


def _evaluation_steps(plan: "Plan", training: TrainingSection) -> EvaluationSteps | None:
    return plan.batches.evaluation_steps(plan.datasets.validation, training, plan.processes)


def _steps_of_epochs(plan: "Plan") -> tuple[int, int]:
    """The optimizer steps of the epochs, and those of one pass over the rows."""
    batches = plan.batches.train
    return optimizer_steps(plan.config.training, len(batches.items), batches.size, plan.processes)


def _check(plan: "Plan", asked: TrainingSection, found: StepBudget, left: float) -> None:
    """Raises ConfigError: there is no time for a few steps, or not for those of the warm-up."""
    least = min(FEWEST, _steps_of_epochs(plan)[0])
    if found.steps < least:
        gone = 60 * (asked.max_minutes or 0.0) - left
        what = f"{format_duration(gone)} have passed before the first step, and a run of {plural(least, 'step')}"
        raise _too_short(asked, f"{what} takes about {format_duration(found.fewest)} more", gone + found.fewest)
    if decided(plan.config.training.warmup_steps) > found.steps:
        room = "the passes over the rows have" if found.limited else f"{asked.max_minutes:g} min has room for"
        what = f"{room} {plural(found.steps, 'step')}, fewer than the warmup has"
        further = "training.num_train_epochs" if found.limited else KEY
        fix = f"lower it, set a fraction of the steps, or raise {further}"
        raise ConfigError(Problem(Code.CONFIG_CONFLICT, what, key="training.warmup_steps", fix=fix))


def _too_short(asked: TrainingSection, why: str, least: float = 0.0) -> ConfigError:
    """The error of a budget without room for a few steps. least: seconds that would suffice."""
    fix = f"set at least {math.ceil(least / 6) / 10:g}" if least else "set more"
    return ConfigError(Problem(Code.CONFIG_BUDGET, f"{asked.max_minutes:g} min is too short: {why}", key=KEY, fix=fix))


def _fixed(plan: "Plan", asked: TrainingSection, found: StepBudget, left: float, about: str = "") -> "Plan":
    """The plan of a run with the steps that were found. about: how exact they are."""
    steps = max(1, found.steps)
    changed: dict[str, Any] = {"max_steps": steps, "max_minutes": None}
    lines = [*_lines(plan, asked, replace(found, steps=steps), left, about)]
    passes, once = steps / _steps_of_epochs(plan)[1], decided(plan.config.training.learning_rate)
    rate, why = auto.over_passes(once, "rows that are read often are overfitted", passes, plan.config.lora)
    if asked.learning_rate == AUTO and rate != once:
        changed["learning_rate"] = rate
        lines.append(auto.line("training.learning_rate", rate, why))
    training = plan.config.training.model_copy(update=changed)
    config = plan.config.model_copy(update={"training": training})
    return replace(plan, config=config, evaluations=_evaluation_steps(plan, training), notes=[*plan.notes, *lines])


def _lines(plan: "Plan", asked: TrainingSection, found: StepBudget, left: float, about: str) -> Iterator[str]:
    """The budget in words."""
    minutes, passes = asked.max_minutes or 0.0, found.steps / _steps_of_epochs(plan)[1]
    gone, taken, beside = (format_duration(part) for part in (60 * minutes - left, found.taken, found.beside))
    parts = f"{gone} have passed, steps take about {taken}, evaluations, checkpoints and the end about {beside}"
    yield f"{KEY}: {about}{plural(found.steps, 'step')} in {minutes:g} min: {parts}"
    if found.limited and asked.num_train_epochs == AUTO:
        why = "as more passes overfit them; training.num_train_epochs can ask for more"
        ends = "one pass" if passes == 1 else f"{passes:g} passes"
        yield f"{KEY}: not all of the time is used: training ends after {ends} over the rows, {why}"
    elif found.limited:
        epochs = plan.config.training.num_train_epochs
        yield f"{KEY}: has no effect, as there is time for the {epochs:g} epochs of training.num_train_epochs"
    elif passes < 1:
        yield f"{KEY}: too short for one pass over the rows: {about}{int(100 * passes)} % of them are trained on"
    else:
        yield f"{KEY}: {about}{passes:,.2f} passes over the rows"
