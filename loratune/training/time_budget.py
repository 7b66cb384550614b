"""`training.max_minutes`: the number of steps of a run, fixed once, before its first step, and kept as `max_steps`.

The rates of the first steps depend on the number of all, so steps of the run itself cannot be timed: some steps are
timed and rolled back, and the run that follows has a fixed number of steps.
"""

import gc
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratune.codes import Code
from loratune.compare import collapse, gain
from loratune.compare.engine import SFT, Objective, ScoringPass
from loratune.compare.objectives import WITH_REFERENCE
from loratune.compare.preferences import MOST_COMPARED, PreferenceObjective
from loratune.config import AUTO, TrainingSection, decided
from loratune.data import TokenizedDataset
from loratune.data.packing import BatchLayout
from loratune.errors import ConfigError, Problem
from loratune.events import note
from loratune.lora import tensors
from loratune.text import format_duration, plural
from loratune.training import auto, trainer
from loratune.training.callbacks import StepTimer
from loratune.training.duration import READ, WITH_MISMATCHED, Costs, Speed, seconds_per_operation, step_seconds
from loratune.training.plan import Plan
from loratune.training.processes import SharedStop

KEY = "training.max_minutes"
WARM_UP = 2
"""Warm-up batches before timing begins: the first ones also allocate, compile and fill caches."""
_LEAST_TIMED, _MOST_SECONDS, _SHARE = 6, 20.0, 0.03
"""Batches are timed until there are so many of them and until timing has taken this part of the budget, or so long."""
_MOST_EPOCHS, _MOST_STEPS = 100, 2**31 - 1
"""The steps of so many epochs are predicted one by one, and further epochs are taken to repeat them; and the most steps
that a run can have."""
FEWEST = 3
"""A budget without room for so many steps is refused, unless the epochs that are asked for have fewer."""
_CLOSING = 1.0
"""Seconds at the end that are not measured beforehand: the card, the record, the tokenizer's files, and the exit."""
_WRITES = 2
"""Publishing takes about as long as so many checkpoints: the adapter is written, flushed, read back and compared."""
_HARMLESS_RATE = 1e-9
"""A learning rate at which a few steps change next to nothing."""


def is_timed_enough(batches: int, elapsed: float, left: float) -> bool:
    """Whether enough batches were timed.

    Args:
        batches: How many, those of the warm-up included.
        elapsed: Seconds since the first one began.
        left: Seconds of the budget when it began.
    """
    return elapsed >= left or (batches >= WARM_UP + _LEAST_TIMED and elapsed >= min(_SHARE * left, _MOST_SECONDS))


@dataclass(frozen=True)
class StepBudget:
    """The steps that fit into a time budget.

    Attributes:
        steps: The number of optimizer steps.
        taken: The seconds of these steps.
        others: The seconds of evaluations, checkpoints, and everything after the last step.
        fewest: The seconds, from the first step on, of the shortest run that is accepted.
        limited: Whether there would be time for more steps than the epochs have.
    """

    steps: int
    taken: float
    others: float
    fewest: float
    limited: bool


def step_budget(
    left: float, steps: Iterator[NDArray[np.float64]], others: Callable[[int], float], most: int
) -> StepBudget:
    """Compute how many steps fit into the time.

    Args:
        left: Seconds that are left.
        steps: For each epoch, the seconds of its steps.
        others: Function of the number of steps that returns the seconds of everything else, roughly increasing.
        most: The maximum number of steps.
    """
    least, bound = min(FEWEST, most), min(most, _MOST_STEPS)
    parts: list[NDArray[np.float64]] = []
    known, total = 0, 0.0
    while known < least or (total <= left and known <= bound and len(parts) < _MOST_EPOCHS):
        parts.append(next(steps))
        known, total = known + len(parts[-1]), total + float(parts[-1].sum())
    ends = np.cumsum(np.concatenate(([0.0], *parts)))

    def taken(number: int) -> float:
        rounds, rest = divmod(number, known)
        return rounds * float(ends[-1]) + float(ends[rest])

    def until(number: int) -> float:
        return taken(number) + others(number) if number else 0.0

    found = bisect_right(range(1, bound + 1), left, key=until)
    return StepBudget(found, taken(found), others(found) if found else 0.0, until(least), found == most)


Scoring = tuple[TokenizedDataset, Sequence[int], Objective]
"""Rows that are scored, their numbers, and the objective that they are scored by."""


def time_steps(plan: Plan, stop: SharedStop, timer: StepTimer, *, oom_dry_run: bool) -> None:
    """Time the first micro-steps of a run and one checkpoint, then restore everything.

    The learning rate is negligible, so no step can diverge. Trained weights are restored, optimizer and checkpoint are
    discarded, and the next trainer seeds the random generators again.

    Args:
        plan: What is trained; of the validation batches only the largest is computed, in the dry run.
        stop: Whether the run was asked to stop.
        timer: Takes the times, and ends the steps.
        oom_dry_run: As of `trainer.fit`.

    Raises:
        NumericError, OutOfMemory, ResourceError: As `trainer.fit`, because of the base or the batches.
    """
    changes = {
        "learning_rate": _HARMLESS_RATE, "eval_steps": None, "patience": None, "save_steps": _MOST_STEPS,
        "logging_steps": _MOST_STEPS, "max_steps": _MOST_STEPS, "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "constant", "warmup_steps": 0.0,
    }  # fmt: skip
    before, start = tensors.full_weights(plan.model), time.monotonic()
    made = trainer.build(plan, stop, plan.training.model_copy(update=changes), [timer], oom_dry_run=oom_dry_run)
    timer.setup = time.monotonic() - start
    with made.out_of_memory_placed():
        made.train()
    if not stop.is_requested():
        timer.checkpoint = made.checkpoint_seconds()
    made.accelerator.free_memory()
    tensors.restore(plan.model, before)


@dataclass(frozen=True)
class _Estimator:
    """Estimates the duration of the parts of a run.

    Attributes:
        plan: The run.
        train: The speed of micro-steps.
        optimizer: Seconds of the optimizer in a step.
        checkpoint: Seconds that a checkpoint takes.
        closing: Seconds of setting up the trainer and publishing.
    """

    plan: Plan
    train: Speed
    optimizer: float = 0.0
    checkpoint: float = 0.0
    closing: float = _CLOSING

    def room(self, left: float) -> StepBudget:
        """The number of steps for which there is time, with evaluations, checkpoints and the end."""
        plan, costs, (most, per_epoch) = self.plan, _costs(self.plan), _steps_of_epochs(self.plan)
        evaluation = self._evaluation_seconds()

        def room(closing: float) -> StepBudget:
            def others(steps: int) -> float:
                found = plan.evaluation_steps(plan.config.training.model_copy(update={"max_steps": steps}))
                checkpoints = -(-steps // plan.training.save_steps) * self.checkpoint
                return closing + checkpoints + (found.count * evaluation if found else 0.0)

            micro_steps = costs.micro_steps(plan.training.seed, plan.group.count)
            accumulation = plan.training.gradient_accumulation_steps
            return step_budget(left, step_seconds(micro_steps, self.train, self.optimizer, accumulation), others, most)

        tokens = round(room(self.closing).steps * float(costs.lengths.sum()) / per_epoch)
        return room(self.closing + sum(map(self.scoring_seconds, _passes_at_the_end(plan, tokens))))

    def _evaluation_seconds(self) -> float:
        """One evaluation."""
        held_out, rows = self.plan.batches.held_out, self.plan.datasets.validation
        return self._pass_seconds(held_out, rows) if held_out is not None and rows is not None else 0.0

    def scoring_seconds(self, one: Scoring) -> float:
        """Scoring rows."""
        rows, numbers, objective = one
        return self._pass_seconds(self.plan.batches.engine.plan(rows, dict.fromkeys(numbers, 1), objective), rows)

    def _pass_seconds(self, scored: ScoringPass, rows: TokenizedDataset) -> float:
        """A forward pass over batches that the processes share. For KTO, each row is read twice."""
        costs, count = _costs(self.plan, scored.layout, rows), len(scored.batches)
        share = READ * (2 / WITH_MISMATCHED if self.plan.training.objective == "kto" else 1.0)
        rounds = -(-count // self.plan.group.count)
        operations = sum(float(costs.of_batches(np.asarray(items))) for items in scored.batches)
        return share * self.train.seconds(rounds, operations * rounds / max(1, count))


def fix_length(plan: Plan, stop: SharedStop, began: float, *, scarce: bool) -> Plan:
    """The plan with the number of steps that fit into its time budget, the same in all processes.

    Args:
        plan: The plan, whose model is ready to train and does not change. Epochs that its run sets are an upper bound.
        stop: Whether the run was asked to stop.
        began: When the command began, by `time.monotonic`.
        scarce: Whether the largest batch is tried first.

    Raises:
        ConfigError: There is no time for a few steps, or not for those of the warm-up.
        NumericError, OutOfMemory, ResourceError: See `time_steps`.
        KeyboardInterrupt: The run was stopped.
    """
    asked, group = plan.run.config.training, plan.group
    seconds, start = 60 * (asked.max_minutes or 0.0), time.monotonic()
    left = group.broadcast(seconds - (start - began))
    note(f"{KEY}: timing some steps, which are rolled back, to find out how many fit into {asked.max_minutes:g} min")

    def is_enough(batches: int) -> bool:
        enough = is_timed_enough(batches, time.monotonic() - start, left)
        return stop.is_requested() or group.total([group.main and enough])[0] > 0

    timer = StepTimer(is_enough)
    if left > 0:
        time_steps(plan, stop, timer, oom_dry_run=scarce)
        gc.collect()  # the states of the optimizer go before those of the next one come
    stop.check()
    if len(timer.micro_steps) <= WARM_UP:
        gone = format_duration(seconds - left)
        raise _too_short(asked, f"{gone} have passed before the first step, and one takes longer than what is left")
    estimator = _estimator(plan, timer)
    left = group.broadcast(seconds - (time.monotonic() - began))
    found = StepBudget(**group.broadcast(asdict(estimator.room(left)) if group.main else {}))
    _check(plan, found, left)
    return _fixed(plan, found, left)


def estimate_length(plan: Plan, began: float) -> Plan:
    """The plan with the estimated number of steps that fit into its time budget, if any. No step is taken."""
    minutes = plan.run.config.training.max_minutes
    if minutes is None:
        return plan
    costs, left = _costs(plan), 60 * minutes - (time.monotonic() - began)
    per_operation = seconds_per_operation(plan.model, plan.config.model, costs, costs.of_pass()[1])
    mismatched = plan.config.training.objective == "kto"
    estimator = _Estimator(plan, Speed(0.0, per_operation * (WITH_MISMATCHED if mismatched else 1)))
    if plan.config.training.objective in WITH_REFERENCE:  # in a run that has passed when steps are timed
        splits = plan.datasets.splits.values()
        left -= sum(estimator.scoring_seconds((rows, range(rows.items), plan.batches.objective)) for rows in splits)
    if (text := plan.datasets.unrelated.rows) is not None:
        left -= estimator.scoring_seconds((text, range(text.items), SFT))
    return _fixed(plan, estimator.room(left), left, "about ")


_PASSES_OF_BEHAVIOR = 4
"""How many passes over the unrelated text take as long as `behavior.measure`, whose answers of the base are known;
SmolLM2-135M on one core: 3 and 12 s."""


def _estimator(plan: Plan, timer: StepTimer) -> _Estimator:
    """An estimator fitted to the timed steps."""
    count, operations = len(timer.micro_steps), list[float]()
    for epoch in _costs(plan).micro_steps(plan.training.seed, plan.group.count):
        operations += epoch.tolist()
        if len(operations) >= count:
            break
    train = Speed.fitted(operations[WARM_UP:count], timer.micro_steps[WARM_UP:])
    closing = timer.setup + _WRITES * timer.checkpoint + _CLOSING
    return _Estimator(plan, train, float(np.mean(timer.optimizer[WARM_UP:])), timer.checkpoint, closing)


def _costs(plan: Plan, layout: BatchLayout | None = None, rows: TokenizedDataset | None = None) -> Costs:
    """The operations of rows in batches; of those of training, if none are given."""
    rows = rows or plan.datasets.train
    checkpointed = plan.training.activation_checkpointing
    lengths = rows.rows.lengths
    supervised = lengths if plan.batches.counts_prompts and rows is plan.datasets.train else rows.rows.supervised
    return Costs.of_layout(plan.model, layout or plan.batches.train, lengths, supervised, checkpointed=checkpointed)


def _passes_at_the_end(plan: Plan, tokens: int) -> Iterator[Scoring]:
    """The scoring passes after the last step of a run that reads `tokens` tokens; some by both base and adapter."""
    objective, datasets = plan.batches.objective, plan.datasets
    compared = plan.comparisons
    rows, sample = compared.rows.dataset, [*compared.rows.copies]
    passes: list[Scoring] = [(rows, sample, objective), (rows, sample[: collapse.PROMPTS], objective)]
    passes += [(rows, sample, SFT)] if compared.answers else []
    if datasets.earlier is not None and (earlier := datasets.earlier.rows) is not None:
        passes.append((earlier, [*gain.sample({"earlier": earlier}, tokens).copies], SFT))
    yield from passes * 2
    if (text := datasets.unrelated.rows) is not None:  # the base's losses are known, see `reference.compute_base`
        count = ("unrelated" not in compared.left_out) + _PASSES_OF_BEHAVIOR * ("behavior" not in compared.left_out)
        yield from [(text, range(text.items), SFT)] * count
    if isinstance(objective, PreferenceObjective):
        rows = datasets.validation or datasets.train
        yield rows, range(rows.items if datasets.validation else min(rows.items, MOST_COMPARED)), objective
    if datasets.test is not None:
        yield datasets.test, [*datasets.test.copies()], objective


def _steps_of_epochs(plan: Plan) -> tuple[int, int]:
    """The optimizer steps of the epochs, and those of one pass over the rows."""
    batches = plan.batches.train
    return auto.optimizer_steps(plan.config.training, len(batches.items), batches.size, plan.group.count)


def _check(plan: Plan, found: StepBudget, left: float) -> None:
    """Raises ConfigError: there is no time for a few steps, or not for those of the warm-up."""
    least, asked = min(FEWEST, _steps_of_epochs(plan)[0]), plan.run.config.training
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


def _fixed(plan: Plan, found: StepBudget, left: float, about: str = "") -> Plan:
    """The plan of a run with the steps that were found. about: how exact they are."""
    steps, minutes = max(1, found.steps), plan.run.config.training.max_minutes
    changed: dict[str, Any] = {"max_steps": steps, "max_minutes": None}
    lines = [*_lines(plan, replace(found, steps=steps), left, about)]
    passes, once = steps / _steps_of_epochs(plan)[1], decided(plan.config.training.learning_rate)
    rate, why = auto.over_passes(once, "rows that are read often are overfitted", passes, plan.config.lora)
    if plan.run.config.training.learning_rate == AUTO and rate != once:
        changed["learning_rate"] = rate
        lines.append(auto.line("training.learning_rate", rate, why))
    config = plan.config.model_copy(update={"training": plan.config.training.model_copy(update=changed)})
    return replace(plan.with_config(config, max_minutes=minutes), notes=[*plan.notes, *lines])


def _lines(plan: Plan, found: StepBudget, left: float, about: str) -> Iterator[str]:
    """The budget in words."""
    asked = plan.run.config.training
    minutes, passes = asked.max_minutes or 0.0, found.steps / _steps_of_epochs(plan)[1]
    gone, taken, others = (format_duration(part) for part in (60 * minutes - left, found.taken, found.others))
    parts = f"{gone} have passed, steps take about {taken}, evaluations, checkpoints and the end about {others}"
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
