"""`training.max_minutes`: how many steps a run takes, decided once, before its first step, and kept as `max_steps`.

The rates of the first steps depend on the number of all, so steps that belong to the run cannot be the ones that are
timed: some are taken and undone, and the run that follows is one of so many steps, and no other.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from loratune.codes import Code
from loratune.commands import measuring
from loratune.commands.plan import Plan
from loratune.config import AUTO, TrainingSection, decided
from loratune.console import format_duration, plural
from loratune.data import TokenizedDataset
from loratune.data.packing import BatchLayout
from loratune.errors import ConfigError, Problem
from loratune.training import auto, budget, collapse, forgetting, gain, trainer
from loratune.training.budget import FEWEST, WARM_UP, Speed, StepBudget, is_timed_enough
from loratune.training.callbacks import StepTimer
from loratune.training.duration import READ, WITH_MISMATCHED, Costs, seconds_per_operation
from loratune.training.evaluations import EvaluationSteps, optimizer_steps
from loratune.training.losses import NextToken, Objective
from loratune.training.preferences import Comparing
from loratune.training.run_context import RunContext

KEY = "training.max_minutes"
_FORWARD_SHARE, _LEAST_FORWARD, _MOST_FORWARD = 0.01, 3, 8
"""Forward passes of each kind are timed until that takes this part of the budget; so many at least, and at most."""
_CLOSING = 1.0
"""Seconds at the end that are not measured beforehand: the card, the record, the tokenizer's files, and the exit."""
_WRITES = 2
"""Publishing takes about as long as so many checkpoints: the adapter is written, flushed, read back and compared."""


@dataclass(frozen=True)
class _Times:
    """What was measured.

    Attributes:
        train: The speed of micro-steps.
        scored: The speed of batches of rows that are scored, as at the end.
        evaluation: The speed of validation batches; of those rows without any.
        optimizer: Seconds of the optimizer in a step.
        checkpoint: Seconds that a checkpoint takes.
        closing: Seconds of all else: setting up the trainer, looking at the base's files again, publishing.
    """

    train: Speed
    scored: Speed
    evaluation: Speed
    optimizer: float
    checkpoint: float
    closing: float


def fix_length(
    plan: Plan, asked: TrainingSection, context: RunContext, began: float, log: Callable[[str], None], *, scarce: bool
) -> Plan:
    """The plan with as many steps as its minutes have room for, which all processes agree on.

    Args:
        plan: The plan, whose model is ready to train and stays as it is.
        asked: The section as the user wrote it: epochs that stand there are an upper bound.
        context: Checkpoints and processes.
        began: When the command began, by `time.monotonic`.
        log: Takes a line on what is being done.
        scarce: Whether the largest batch is tried first.

    Raises:
        ConfigError: There is no time for a few steps, or not for those of the warm-up.
        NumericError, OutOfMemory, ResourceError: See `trainer.time_steps`.
        KeyboardInterrupt: The run was stopped.
    """
    group, seconds = context.group, 60 * (asked.max_minutes or 0.0)
    start = time.monotonic()
    left = group.broadcast(seconds - (start - began))
    log(f"{KEY}: timing some steps, which are undone, to find out how many fit into {asked.max_minutes:g} min")

    def is_enough(batches: int) -> bool:
        enough = is_timed_enough(batches, time.monotonic() - start, left)
        return context.stopping() or group.total([group.main and enough])[0] > 0

    timer, costs = StepTimer(is_enough), _costs(plan)
    if left > 0:
        trainer.time_steps(plan.job, context, timer, oom_dry_run=scarce)
        gc.collect()  # the states of the optimizer go before those of the next one come
    context.check_not_stopping()
    if len(timer.micro_steps) <= WARM_UP:
        gone = format_duration(seconds - left)
        raise _too_short(asked, f"{gone} have passed before the first step, and one takes longer than what is left")
    times = _times(plan, context, timer, costs, left)
    left = group.broadcast(seconds - (time.monotonic() - began))
    found = StepBudget(**group.broadcast(asdict(_room(plan, asked, times, left)) if group.main else {}))
    _check(plan, asked, found, left)
    return _fixed(plan, asked, found, left)


def estimate_length(plan: Plan, asked: TrainingSection, began: float) -> Plan:
    """The plan with about as many steps as its minutes have room for. None is taken; see `duration`."""
    costs, left = _costs(plan), 60 * (asked.max_minutes or 0.0) - (time.monotonic() - began)
    per_operation = seconds_per_operation(plan.model, plan.config.model, costs, costs.of_pass()[1])
    mismatched = asked.objective == "kto"
    train = Speed(0.0, per_operation * (WITH_MISMATCHED if mismatched else 1))
    forward = Speed(0.0, per_operation * READ * (2 if mismatched else 1))
    times = _Times(train, forward, forward, 0.0, 0.0, _CLOSING)
    left -= _reference_seconds(plan, times)
    return _fixed(plan, asked, _room(plan, asked, times, left), left, "about ")


def _reference_seconds(plan: Plan, times: _Times) -> float:
    """About how long the pass before the first step takes that compared answers have a reference by. In a run it is
    over when steps are timed, and its time is among that which has passed."""
    if not isinstance(objective := plan.batches.objective, Comparing):
        return 0.0
    rows = {name: plan.datasets.splits[name] for name in objective.splits}
    if not objective.formula.has_reference and plan.batches.validation is not None:
        rows.pop("train", None)
    return sum(_scored_seconds(plan, times, one, range(one.items), objective) for one in rows.values())


def _costs(plan: Plan) -> Costs:
    """The operations of the training batches."""
    return _costs_of(plan, plan.batches.train, plan.datasets.train)


def _costs_of(plan: Plan, layout: BatchLayout, rows: TokenizedDataset) -> Costs:
    checkpointed = plan.training.activation_checkpointing
    return Costs.of_layout(plan.model, layout, rows.rows.lengths, rows.rows.supervised, checkpointed=checkpointed)


def _scored(
    plan: Plan, rows: TokenizedDataset, numbers: Sequence[int], objective: Objective
) -> tuple[Costs, list[list[int]]]:
    """The batches of rows that are compared and scored at the end, by an objective, and their operations."""
    scoring = plan.batches.scoring
    layout = scoring.layout(rows, *objective.items(rows))
    return _costs_of(plan, layout, rows), scoring.batches(layout, numbers)


def _scored_seconds(
    plan: Plan, times: _Times, rows: TokenizedDataset, numbers: Sequence[int], objective: Objective
) -> float:
    """How long it takes to score rows. Arguments as of `_scored`."""
    costs, batches = _scored(plan, rows, numbers, objective)
    rounds = -(-len(batches) // plan.processes)
    operations = sum(float(costs.of_batches(np.asarray(batch))) for batch in batches)
    return times.scored.seconds(rounds, operations * rounds / max(1, len(batches)))


def _times(plan: Plan, context: RunContext, timer: StepTimer, costs: Costs, left: float) -> _Times:
    """What follows from the steps that were timed, and from forward passes and files that are timed here."""
    group, count = context.group, len(timer.micro_steps)
    operations: list[float] = []
    for epoch in costs.micro_steps(plan.training.seed, group.count):
        operations += epoch.tolist()
        if len(operations) >= count:
            break
    train = Speed.fitted(operations[WARM_UP:count], timer.micro_steps[WARM_UP:])
    split, sample, _ = gain.sample(plan.datasets.compared, 0)
    kinds = [_scored(plan, plan.datasets.compared[split], [*sample], plan.batches.objective)]
    if (validation := plan.batches.validation) is not None and plan.datasets.validation is not None:
        numbers, size = range(len(validation.items)), validation.size
        batches = [[*numbers[start : start + size]] for start in range(0, len(numbers), size)]
        kinds.append((_costs_of(plan, validation, plan.datasets.validation), batches))
    forward = []
    for kind, batches in kinds:
        timed = [*_forward(plan, context, kind, batches, left)]
        forward.append(Speed.fitted(*zip(*(timed[1:] or timed), strict=True)))
    closing = timer.setup + _WRITES * timer.checkpoint + _CLOSING
    optimizer = float(np.mean(timer.optimizer[WARM_UP:]))
    return _Times(train, forward[0], forward[-1], optimizer, timer.checkpoint, closing)


def _forward(
    plan: Plan, context: RunContext, costs: Costs, batches: list[list[int]], left: float
) -> Iterator[tuple[float, float]]:
    """Operations and seconds of some forward passes; the first is slower than the others."""
    begin = time.monotonic()
    for number, items in enumerate(batches[:_MOST_FORWARD], 1):
        start = time.monotonic()
        plan.batches.objective.losses(plan.model, costs.layout, [items], group=context.group)
        yield float(costs.of_batches(np.asarray(items))), time.monotonic() - start
        late = number >= _LEAST_FORWARD and time.monotonic() - begin > _FORWARD_SHARE * left
        if context.stopping() or context.group.total([context.group.main and late])[0]:
            return


def _room(plan: Plan, asked: TrainingSection, times: _Times, left: float) -> StepBudget:
    """How many steps there is time for, with all that comes beside them."""
    training, costs = plan.training, _costs(plan)
    steps_of_epochs, per_epoch = _steps_of_epochs(plan)
    evaluation = _evaluation_seconds(plan, times)

    def room(closing: float) -> StepBudget:
        def beside(steps: int) -> float:
            checkpoints = -(-steps // training.save_steps)
            return closing + _evaluations(plan, steps) * evaluation + checkpoints * times.checkpoint

        micro_steps = costs.micro_steps(training.seed, plan.processes)
        steps = budget.step_seconds(micro_steps, times.train, times.optimizer, training.gradient_accumulation_steps)
        return budget.step_budget(left, steps, beside, steps_of_epochs)

    tokens = round(room(times.closing).steps * float(costs.lengths.sum()) / per_epoch)
    return room(times.closing + _end_seconds(plan, times, tokens))


def _evaluations(plan: Plan, steps: int) -> int:
    """How many evaluations a run of so many steps has."""
    found = _evaluation_steps(plan, plan.config.training.model_copy(update={"max_steps": steps}))
    return found.count if found else 0


def _evaluation_steps(plan: Plan, training: TrainingSection) -> EvaluationSteps | None:
    return plan.batches.evaluation_steps(plan.datasets.validation, training, plan.processes)


def _evaluation_seconds(plan: Plan, times: _Times) -> float:
    """How long one evaluation takes."""
    if plan.batches.validation is None or plan.datasets.validation is None:
        return 0.0
    batches, operations = _costs_of(plan, plan.batches.validation, plan.datasets.validation).of_pass()
    rounds = -(-batches // plan.processes)
    return times.evaluation.seconds(rounds, operations * rounds / batches)


def _end_seconds(plan: Plan, times: _Times, tokens: int) -> float:
    """How long the passes after the last step take, in a run that reads so many tokens."""
    objective = plan.batches.objective
    split, sample, _ = gain.sample(plan.datasets.compared, tokens)
    passes: list[tuple[TokenizedDataset, Sequence[int], Objective]]
    passes = [(plan.datasets.compared[split], [*sample], objective)] * 2
    passes += [(plan.datasets.compared[split], [*sample][: collapse.PROMPTS], objective)] * 2
    if plan.earlier is not None and plan.earlier.held_out is not None:
        earlier = plan.earlier.held_out
        passes += [(earlier, [*gain.sample({"earlier": earlier}, tokens)[1]], NextToken())] * 2
    if (text := plan.datasets.unrelated.rows) is not None:
        passes += [(text, forgetting.passages(text), NextToken())] * 2
    if plan.datasets.test is not None:
        passes.append((plan.datasets.test, [*plan.datasets.test.copies()], objective))
    seconds = sum(_scored_seconds(plan, times, *one) for one in passes)
    if isinstance(objective, Comparing):
        seconds += _evaluation_seconds(plan, times) or _pass_seconds(plan, times, measuring.MOST_COMPARED)
    return seconds + _pass_seconds(plan, times, plan.batches.train.size)  # see `check_final_loss`


def _pass_seconds(plan: Plan, times: _Times, most: int) -> float:
    """How long it takes to read the first training items, so many at most, in the batches of training."""
    costs, size, numbers = _costs(plan), plan.batches.train.size, np.arange(min(most, len(plan.batches.train.items)))
    batches = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    operations = sum(float(costs.of_batches(batch)) for batch in batches)
    rounds = -(-len(batches) // plan.processes)
    return times.evaluation.seconds(rounds, operations * rounds / len(batches))


def _steps_of_epochs(plan: Plan) -> tuple[int, int]:
    """The optimizer steps of the epochs, and those of one pass over the rows."""
    batches = plan.batches.train
    return optimizer_steps(plan.config.training, len(batches.items), batches.size, plan.processes)


def _check(plan: Plan, asked: TrainingSection, found: StepBudget, left: float) -> None:
    """Raises ConfigError: there is no time for a few steps, or not for those of the warm-up."""
    most = _steps_of_epochs(plan)[0]
    if found.steps < min(FEWEST, most):
        gone, run = 60 * (asked.max_minutes or 0.0) - left, plural(min(FEWEST, most), "step")
        what = f"{format_duration(gone)} have passed before the first step, and a run of {run}"
        raise _too_short(asked, f"{what} takes about {format_duration(found.fewest)} more", gone + found.fewest)
    if decided(plan.config.training.warmup_steps) > found.steps:
        room = "the passes over the rows have" if found.limited else f"{asked.max_minutes:g} min has room for"
        what = f"{room} {plural(found.steps, 'step')}, fewer than the warmup has"
        further = "training.num_train_epochs" if found.limited else "training.max_minutes"
        fix = f"lower it, set a fraction of the steps, or raise {further}"
        raise ConfigError(Problem(Code.CONFIG_WARMUP_TOO_LONG, what, key="training.warmup_steps", fix=fix))


def _too_short(asked: TrainingSection, why: str, least: float = 0.0) -> ConfigError:
    """The error of a budget without room for a few steps. least: seconds with which there would be."""
    what = f"{asked.max_minutes:g} min is too short: {why}"
    fix = f"set at least {math.ceil(least / 6) / 10:g}" if least else "set more"
    return ConfigError(Problem(Code.CONFIG_BUDGET_TOO_SHORT, what, key=KEY, fix=fix))


def _fixed(plan: Plan, asked: TrainingSection, found: StepBudget, left: float, about: str = "") -> Plan:
    """The plan of a run with the steps that were found. about: how exact they are."""
    steps = max(1, found.steps)
    changed: dict[str, Any] = {"max_steps": steps, "max_minutes": None}
    lines = [*_lines(plan, asked, replace(found, steps=steps), left, about)]
    passes = steps / _steps_of_epochs(plan)[1]
    once = decided(plan.config.training.learning_rate)
    rate, why = auto.over_passes(once, "rows that are read often are learned by heart", passes, plan.config.lora)
    if asked.learning_rate == AUTO and rate != once:
        changed["learning_rate"] = rate
        lines.append(auto.line("training.learning_rate", rate, why))
    training = plan.config.training.model_copy(update=changed)
    config = plan.config.model_copy(update={"training": training})
    return replace(plan, config=config, evaluations=_evaluation_steps(plan, training), notes=[*plan.notes, *lines])


def _lines(plan: Plan, asked: TrainingSection, found: StepBudget, left: float, about: str) -> Iterator[str]:
    """What the budget comes to."""
    minutes, passes = asked.max_minutes or 0.0, found.steps / _steps_of_epochs(plan)[1]
    gone, taken, beside = (format_duration(part) for part in (60 * minutes - left, found.taken, found.beside))
    parts = f"{gone} have passed, steps take about {taken}, evaluations, checkpoints and the end about {beside}"
    yield f"{KEY}: {about}{plural(found.steps, 'step')} in {minutes:g} min: {parts}"
    if found.limited and asked.num_train_epochs == AUTO:
        why = "as more passes learn them by heart; training.num_train_epochs can ask for more"
        ends = "one pass" if passes == 1 else f"{passes:g} passes"
        yield f"{KEY}: not all of the time is used: training ends after {ends} over the rows, {why}"
    elif found.limited:
        epochs = plan.config.training.num_train_epochs
        yield f"{KEY}: has no effect, as there is time for the {epochs:g} epochs of training.num_train_epochs"
    elif passes < 1:
        yield f"{KEY}: too short for one pass over the rows: {about}{int(100 * passes)} % of them are trained on"
    else:
        yield f"{KEY}: {about}{passes:,.2f} passes over the rows"
