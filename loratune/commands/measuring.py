"""What `loratune train` measures around its steps: the reference of compared answers before them; after them what the
adapter is worth on rows, beside its base and beside what it started from.
"""

import math
from collections.abc import Callable
from typing import Any

from loratune.codes import Code
from loratune.commands.plan import Plan
from loratune.console import plural
from loratune.errors import Problem
from loratune.lora import tensors
from loratune.lora.tensors import Weights
from loratune.system.launcher import SINGLE_PROCESS
from loratune.training import conditions, continuing, final_score, gain, reference
from loratune.training.callbacks import diverged_error
from loratune.training.continuing import Forgetting
from loratune.training.final_score import FinalScore
from loratune.training.gain import Gain
from loratune.training.losses import Objective
from loratune.training.outcome import Outcome
from loratune.training.preference_figures import PreferenceFigures
from loratune.training.preferences import Comparing
from loratune.training.reference import Reference
from loratune.training.run_context import RunContext

MOST_COMPARED = 256
"""Training items on which is said what the adapter prefers, where there are no validation rows."""


def compare_with_base(
    plan: Plan, outcome: Outcome, context: RunContext, log: Callable[[str], None]
) -> tuple[Weights, Gain]:
    """The adapter's weights, and how much better than its base they do. Raises NumericError: a loss is NaN or inf."""
    weights = tensors.full_weights(plan.model)
    base = tensors.as_initialized(plan.model, plan.adapter_init, weights)
    sample = plan.model, base, plan.datasets.compared, plan.batches.scoring, outcome.tokens
    how = plan.batches.acceleration, context.group, log
    comparison = gain.measure(*sample, *how, objective=plan.batches.objective)
    if not math.isfinite(comparison.adapter):
        what = f"after the last step the loss of some {comparison.split} rows is NaN or inf"
        problem = Problem(Code.TRAIN_LOSS_NOT_FINITE, what, key="training.learning_rate", fix="lower it")
        raise diverged_error(problem, context.checkpoints, outcome.steps)
    return weights, comparison


def measure_forgetting(
    plan: Plan, weights: Weights, outcome: Outcome, context: RunContext, log: Callable[[str], None]
) -> Forgetting | None:
    """What the adapter does on the rows of the run before; None where it started from no adapter."""
    if plan.earlier is None:
        return None
    adapter = plan.earlier, plan.model, plan.adapter_init, weights
    sample = plan.batches.scoring, outcome.tokens, plan.batches.acceleration
    return continuing.measure_forgetting(*adapter, *sample, context.group, log)


def score_test(plan: Plan, context: RunContext, log: Callable[[str], None]) -> FinalScore | None:
    """The loss of the adapter on the test rows, None without any. Raises NumericError: it is NaN or inf."""
    if (test := plan.datasets.test) is None:
        return None
    batches = plan.batches
    log(f"scoring the adapter on {plural(test.items, f'test {gain.item(batches.objective.unit)}')}")
    return final_score.score(plan.model, test, batches.scoring, batches.acceleration, context.group, batches.objective)


def compute_reference(
    plan: Plan, objective: Objective, log: Callable[[str], None], context: RunContext | None = None
) -> None:
    """Compute what an objective compares answers with, where it does: the model before its first step, as it is now.

    Args:
        plan: The run.
        objective: That of the run, or another one that its adapter is measured by.
        log: Takes lines, see `reference.compute`.
        context: The processes of the run, and whether it is to stop; None in one process that a signal just ends.

    Raises:
        NumericError: The model gives an answer no finite log-probability.
        KeyboardInterrupt: The run was stopped.
    """
    if not isinstance(objective, Comparing):
        return
    start = plan.earlier.start.digest if plan.earlier else ""
    starts_elsewhere = bool(start) or plan.config.lora.init_lora_weights == "loftq"
    environment = conditions.environment(plan.model, plan.batches.acceleration.fallbacks)
    known: dict[str, Any] = {"base": plan.base.fingerprint, "conditions": environment, "start": start}
    known |= {"lora": plan.config.lora.model_dump() if starts_elsewhere else {}, "seed": plan.config.training.seed}
    model = Reference(plan.model, plan.adapter_init, starts_elsewhere, plan.batches.acceleration, known)
    layouts, pad_id = plan.batches.layouts, plan.batches.pad_id
    if context is None:
        reference.compute(objective, model, layouts, pad_id, SINGLE_PROCESS, log)
    else:
        check = context.check_not_stopping
        reference.compute(objective, model, layouts, pad_id, context.group, log, lambda _: check())


def compare_answers(plan: Plan, context: RunContext, log: Callable[[str], None]) -> PreferenceFigures | None:
    """What the adapter prefers, and a line on what of it may not be intended; None where answers are not compared."""
    objective, batches = plan.batches.objective, plan.batches
    if not isinstance(objective, Comparing):
        return None
    split = "training" if batches.validation is None else "validation"
    layout = batches.validation or batches.train
    numbers = range(len(layout.items) if batches.validation else min(len(layout.items), MOST_COMPARED))
    with batches.acceleration.applied(plan.model):
        objective.held_out_loss(plan.model, layout, numbers, group=context.group)
    figures = objective.figures(split)
    assert figures is not None
    for line in figures.warnings():
        log(line)
    return figures
