"""`training.max_minutes`: the number of steps of a run, fixed once, before its first step, and kept as `max_steps`.

The rates of the first steps depend on the number of all, so steps of the run itself cannot be timed: some steps are
timed and rolled back, and the run that follows has a fixed number of steps: byte for byte, it is the run of that
`max_steps`. `--resume` keeps the number, and refuses another `max_minutes`. Sharded weights are refused, because such a
model can be set up for training only once.
"""

import gc
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from loratune.codes import Code
from loratune.compare.engine import SFT
from loratune.compare.losses import sample_rows
from loratune.compare.objectives import WITH_REFERENCE
from loratune.compare.preferences import MOST_COMPARED, PreferenceObjective
from loratune.config import AUTO, TrainingSection, decided
from loratune.errors import ConfigError, Problem
from loratune.events import note
from loratune.lora import tensors
from loratune.text import format_duration, plural
from loratune.training import auto, trainer
from loratune.training.callbacks import StepTimer
from loratune.training.duration import READ, WITH_MISMATCHED, Costs, seconds_per_operation
from loratune.training.plan import Plan
from loratune.training.processes import SharedStop
from loratune.training.schedule import Seconds

KEY = "training.max_minutes"
WARM_UP = 2
"""Warm-up batches before timing begins: the first ones also allocate, compile and fill caches."""
_LEAST_TIMED, _MOST_SECONDS, _SHARE = 6, 20.0, 0.03
"""Timing ends after this number of batches at least, when it has taken this part of the budget, or these seconds."""
_MOST_STEPS = 2**31 - 1
"""The most steps that a run can have."""
_USED = 0.95
"""The part of the time left that a run is planned to take, as no estimate is exact: it may end early, but not late."""
FEWEST = 3
"""A budget without room for this number of steps is refused, unless the epochs that are asked for have fewer."""
_CLOSING = 1.0
"""Seconds at the end that are not measured beforehand: the card, the record, the tokenizer's files, and the exit."""
_WRITES = 2
"""Publishing takes about as long as two checkpoints: the adapter is written, flushed, read back and compared."""
_PASSES_OF_BEHAVIOR = 4
"""How many passes over the unrelated text take as long as the comparison of everyday answers; SmolLM2-135M on one core:
3 and 12 s."""
_TIMED_TEXTS = 8
"""How many texts are read to find out how long reading takes."""
_HARMLESS_RATE = 1e-9
"""A learning rate at which a few steps change next to nothing."""


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
    asked, group = plan.config.training, plan.group
    budget, start = 60 * (asked.max_minutes or 0.0), time.monotonic()
    left = group.broadcast(budget - (start - began))
    note(f"{KEY}: timing some steps, which are rolled back, to find out how many fit into {asked.max_minutes:g} min")

    def is_enough(batches: int) -> bool:
        enough = is_timed_enough(batches, time.monotonic() - start, left)
        return stop.is_requested() or group.total([group.main and enough])[0] > 0

    timer = StepTimer(is_enough)
    if left > 0:
        time_steps(plan, stop, timer, oom_dry_run=scarce)
        gc.collect()  # the states of the optimizer go before those of the next one come
    stop.check()
    if (count := len(timer.micro_steps)) <= WARM_UP:
        gone = format_duration(budget - left)
        raise _too_short(asked, f"{gone} have passed before the first step, and one takes longer than what is left")
    operations = list[float]()
    for epoch in _costs(plan).micro_steps(asked.seed, group.count):
        operations += epoch.tolist()
        if len(operations) >= count:
            break
    per_operation = sum(timer.micro_steps[WARM_UP:]) / sum(operations[WARM_UP:count])
    seconds = _seconds(
        plan, per_operation, optimizer=float(np.mean(timer.optimizer[WARM_UP:])), checkpoint=timer.checkpoint,
        closing=timer.setup + _WRITES * timer.checkpoint + _CLOSING,
    )  # fmt: skip
    reading = group.broadcast(_time_reading(plan) or _reading(plan, seconds))
    left = group.broadcast(budget - (time.monotonic() - began))
    steps, seconds = _fit(plan, seconds, left, reading)
    steps = group.broadcast(steps)
    _check(plan, steps, seconds, left)
    return _with_length(plan, steps, seconds, left)


def estimate_length(plan: Plan, began: float) -> Plan:
    """The plan with the estimated number of steps that fit into its time budget, if any. No step is taken."""
    training = plan.config.training
    if training.max_minutes is None:
        return plan
    costs = _costs(plan)
    per_operation = seconds_per_operation(plan.model, plan.config.model, costs, costs.of_pass()[1])
    seconds = _seconds(plan, per_operation * (WITH_MISMATCHED if training.objective == "kto" else 1))
    reading = _reading(plan, seconds)
    left = 60 * training.max_minutes - (time.monotonic() - began) - reading * _tokens_before(plan)
    steps, seconds = _fit(plan, seconds, left, reading)
    return _with_length(plan, max(1, steps), seconds, left, "about ")


def expected(plan: Plan) -> tuple[float, float]:
    """About how many seconds the steps of a run take on this machine, and everything else. No step is taken."""
    costs, schedule = _costs(plan), plan.schedule
    per_operation = seconds_per_operation(plan.model, plan.config.model, costs, costs.of_pass()[1] * schedule.passes)
    per_operation *= 1 + (plan.retention.share if plan.retention else 0.0)
    seconds = _seconds(plan, per_operation * (WITH_MISMATCHED if plan.config.training.objective == "kto" else 1))
    read = _tokens_at_the_end(plan) + _tokens_before(plan)
    return seconds.of_steps(schedule.steps), _besides(plan, seconds, schedule.steps) + _reading(plan, seconds) * read


def _tokens_before(plan: Plan) -> int:
    """The tokens that a run reads before its first step."""
    text, splits = plan.datasets.unrelated.rows, plan.datasets.splits.values()
    count = 0 if text is None else int(text.rows.lengths.sum())
    if plan.config.training.objective in WITH_REFERENCE:
        count += sum(int(split.rows.lengths.sum()) for split in splits)
    return count


def is_timed_enough(batches: int, elapsed: float, left: float) -> bool:
    """Whether enough batches were timed.

    Args:
        batches: How many, those of the warm-up included.
        elapsed: Seconds since the first one began.
        left: Seconds of the budget when it began.
    """
    return elapsed >= left or (batches >= WARM_UP + _LEAST_TIMED and elapsed >= min(_SHARE * left, _MOST_SECONDS))


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


def _seconds(
    plan: Plan, per_operation: float, *, optimizer: float = 0.0, checkpoint: float = 0.0, closing: float = _CLOSING
) -> Seconds:
    """How long the parts of a run take, but for the comparisons at its end.

    Args:
        plan: The run.
        per_operation: Seconds of a floating-point operation in training.
        optimizer: Seconds of the optimizer in a step.
        checkpoint: Seconds that a checkpoint takes.
        closing: Seconds of setting up the trainer and publishing.
    """
    micro_steps = per_operation * next(_costs(plan).micro_steps(plan.config.training.seed, plan.group.count))
    starts = np.arange(0, len(micro_steps), plan.config.training.gradient_accumulation_steps)
    found = Seconds(np.add.reduceat(micro_steps, starts) + optimizer, 0.0, checkpoint, closing)
    held_out = evaluations.held_out if (evaluations := plan.evaluations) is not None else 0
    return replace(found, evaluation=held_out * _reading(plan, found, shared=True))


def _time_reading(plan: Plan) -> float | None:
    """Seconds of reading a token of the unrelated text, most of what is read at the end; None without such a text."""
    if (text := plan.datasets.unrelated.rows) is None:
        return None
    few, seconds = dict.fromkeys(range(min(_TIMED_TEXTS, text.items)), 1.0), math.inf
    planned = plan.batches.engine.plan(text, few)
    for _ in range(3):  # the first time also allocates, and another program may disturb one
        start = time.monotonic()
        SFT.score(plan.model, planned, group=plan.group)
        seconds = min(seconds, time.monotonic() - start)
    return seconds / int(text.rows.lengths[: len(few)].sum())


def _reading(plan: Plan, seconds: Seconds, *, shared: bool = False) -> float:
    """Seconds of reading a token. For KTO, each row is read twice. shared: a mean over tokens of rows whose shared
    prefixes are computed once."""
    share = READ * (2 / WITH_MISMATCHED if plan.config.training.objective == "kto" else 1.0)
    computed = 1.0 if shared else 1 - (plan.batches.train.saved or 0.0)
    return share * float(seconds.steps.sum()) / (computed * int(plan.datasets.train.rows.lengths.sum()))


def _costs(plan: Plan) -> Costs:
    """The operations of the training batches."""
    rows, checkpointed = plan.datasets.train.rows, plan.config.training.activation_checkpointing
    supervised = rows.lengths if plan.batches.counts_prompts else rows.supervised
    return Costs.of_layout(plan.model, plan.batches.train, rows.lengths, supervised, checkpointed=checkpointed)


def _tokens_at_the_end(plan: Plan) -> int:
    """The tokens that are read after the last step; the results of the base are known by then."""
    datasets, objective, left_out = plan.datasets, plan.batches.objective, plan.comparisons.left_out
    count = plan.comparisons.tokens
    if (text := datasets.unrelated.rows) is not None:
        of_behavior = _PASSES_OF_BEHAVIOR * (1 + datasets.can_reason)  # reasoning takes no longer than answers
        passes = ("unrelated" not in left_out) + of_behavior * ("behavior" not in left_out)
        count += passes * int(text.rows.lengths.sum())
    if datasets.earlier is not None and (earlier := datasets.earlier.rows) is not None:
        count += 2 * sample_rows({"earlier": earlier}, plan.tokens).tokens
    if isinstance(objective, PreferenceObjective):
        count += int((datasets.validation or datasets.train).rows.lengths[:MOST_COMPARED].sum())
    return count + (int(datasets.test.rows.lengths.sum()) if datasets.test is not None else 0)


def steps_within(left: float, total: Callable[[int], float], most: int) -> int:
    """The number of steps that fit into the seconds left, but for a margin.

    Args:
        left: The seconds left.
        total: Function of the number of steps that returns the seconds of such a run, roughly increasing.
        most: The maximum number of steps.
    """
    return bisect_right(range(1, min(most, _MOST_STEPS) + 1), _USED * left, key=total)


def _fit(plan: Plan, seconds: Seconds, left: float, reading: float) -> tuple[int, Seconds]:
    """The number of steps that fit into the seconds left, at most those of the epochs; and the parts of that run.
    reading: seconds of reading a token at its end."""
    most = plan.schedule.steps
    fewer = max(1, steps_within(left, partial(_total, plan, seconds), most))
    short = plan.with_values({"training.max_steps": fewer, KEY: None})  # a shorter run also compares less at its end
    seconds = replace(seconds, end=seconds.end + reading * _tokens_at_the_end(short))
    return steps_within(left, partial(_total, plan, seconds), most), seconds


def _besides(plan: Plan, seconds: Seconds, steps: int) -> float:
    """The seconds of everything but the steps of a run."""
    evaluations = plan.evaluations_of(replace(plan.schedule, steps=steps))
    return seconds.besides(steps, evaluations.count if evaluations else 0, plan.config.training.save_steps)


def _total(plan: Plan, seconds: Seconds, steps: int) -> float:
    return seconds.of_steps(steps) + _besides(plan, seconds, steps)


def _check(plan: Plan, steps: int, seconds: Seconds, left: float) -> None:
    """Raises ConfigError: there is no time for a few steps, or not for those of the warm-up."""
    most, asked = plan.schedule.steps, plan.config.training
    if steps < (least := min(FEWEST, most)):
        gone, fewest = 60 * (asked.max_minutes or 0.0) - left, _total(plan, seconds, least) / _USED
        what = f"{format_duration(gone)} have passed before the first step, and a run of {plural(least, 'step')}"
        raise _too_short(asked, f"{what} takes about {format_duration(fewest)} more", gone + fewest)
    if decided(asked.warmup_steps) > steps:
        is_limited = steps == most
        room = "the passes over the rows have" if is_limited else f"{asked.max_minutes:g} min has room for"
        what = f"{room} {plural(steps, 'step')}, fewer than the warmup has"
        further = "training.num_train_epochs" if is_limited else KEY
        fix = f"lower it, set a fraction of the steps, or raise {further}"
        raise ConfigError(Problem(Code.CONFIG_CONFLICT, what, key="training.warmup_steps", fix=fix))


def _too_short(asked: TrainingSection, why: str, least: float = 0.0) -> ConfigError:
    """The error of a budget without room for a few steps. least: seconds that would suffice."""
    fix = f"set at least {math.ceil(least / 6) / 10:g}" if least else "set more"
    return ConfigError(Problem(Code.CONFIG_BUDGET, f"{asked.max_minutes:g} min is too short: {why}", key=KEY, fix=fix))


def _with_length(plan: Plan, steps: int, seconds: Seconds, left: float, about: str = "") -> Plan:
    """The plan of a run with these steps. about: how exact they are."""
    values: dict[str, Any] = {"training.max_steps": steps, KEY: None}
    passes, once = steps / plan.schedule.steps_of_pass, decided(plan.config.training.learning_rate)
    choices: auto.Choices = {"training.max_steps": (steps, _shares(plan, steps, seconds, left, about))}
    rate, why = auto.over_passes(once, "rows that are read often are overfitted", passes, plan.config.lora)
    if plan.run.config.training.learning_rate == AUTO and rate != once:
        values["training.learning_rate"] = rate
        choices["training.learning_rate"] = rate, why
    return plan.with_values(values, choices, [*_passes(plan, steps, about)])


def _shares(plan: Plan, steps: int, seconds: Seconds, left: float, about: str) -> str:
    """What the time of the budget is for, in words."""
    minutes = plan.run.config.training.max_minutes or 0.0
    parts = 60 * minutes - left, seconds.of_steps(steps), _besides(plan, seconds, steps)
    gone, taken, others = map(format_duration, parts)
    shares = f"{gone} have passed, steps take about {taken}, evaluations, checkpoints and the end about {others}"
    return f"{about}as many as fit in {minutes:g} min: {shares}"


def _passes(plan: Plan, steps: int, about: str) -> Iterator[str]:
    """How often the rows are read, and whether that ends the run before the budget does."""
    asked, schedule = plan.run.config.training, plan.schedule
    passes = steps / schedule.steps_of_pass
    is_limited = steps == schedule.steps
    if is_limited and asked.num_train_epochs == AUTO:
        why = "as more passes overfit them; training.num_train_epochs can ask for more"
        ends = "one pass" if passes == 1 else f"{passes:g} passes"
        yield f"{KEY}: not all of the time is used: training ends after {ends} over the rows, {why}"
    elif is_limited:
        epochs = plan.config.training.num_train_epochs
        yield f"{KEY}: has no effect, as there is time for the {epochs:g} epochs of training.num_train_epochs"
    elif passes < 1:
        yield f"{KEY}: too short for one pass over the rows: {about}{int(100 * passes)} % of them are trained on"
    else:
        yield f"{KEY}: {about}{passes:,.2f} passes over the rows"
