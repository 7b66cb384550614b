"""What `loratune train` measures around its steps: the reference of compared answers before them; after them what the
adapter is worth on rows, beside its base and beside what it started from.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from loratune.codes import Code
from loratune.commands.plan import Plan
from loratune.console import plural
from loratune.errors import Problem
from loratune.lora import tensors
from loratune.lora.tensors import Weights
from loratune.system.launcher import SINGLE_PROCESS
from loratune.training import collapse, conditions, final_score, forgetting, gain, reference
from loratune.training.callbacks import diverged_error
from loratune.training.final_score import FinalScore
from loratune.training.forgetting import Forgetting
from loratune.training.gain import Gain
from loratune.training.losses import Layers, Objective, computed_by
from loratune.training.outcome import Outcome
from loratune.training.preference_figures import PreferenceFigures
from loratune.training.preferences import MOST_COMPARED, Comparing
from loratune.training.reference import Reference
from loratune.training.run_context import RunContext


@dataclass(frozen=True)
class Findings:
    """What was found out about an adapter.

    Attributes:
        outcome: Losses, tokens and time of the training.
        gain: How much better than its base the adapter does.
        forgetting: What it does on the rows of the run before; None where it started from no adapter.
        unrelated: What it does on text that no rows are about.
        test: Its loss on the test rows; None without any.
        preferences: What it prefers; None where answers were not compared.
        computed_by: Metric → how it was computed, see `losses.computed_by`.
    """

    outcome: Outcome
    gain: Gain
    forgetting: Forgetting | None
    unrelated: Forgetting
    test: FinalScore | None
    preferences: PreferenceFigures | None
    computed_by: dict[str, dict[str, str]]

    @property
    def held_out(self) -> list[tuple[str, str]]:
        """How the adapter does on the rows that it was not trained on, as labels and texts."""
        return [
            *self.outcome.lines(self.gain, tested=self.test is not None),
            *([("test", str(self.test))] if self.test else []),
            *(self.preferences.lines() if self.preferences else ()),
        ]

    @property
    def beside(self) -> list[tuple[str, str]]:
        """What it has cost elsewhere, as labels and texts."""
        named = {"unrelated text": self.unrelated, "earlier rows": self.forgetting}
        return [(label, str(found)) for label, found in named.items() if found]

    @property
    def metrics(self) -> dict[str, Any]:
        """All of it as figures. held_out_interval: null where it is not known."""
        loss = self.outcome.held_out_loss
        interval = self.gain.held_out_interval(loss) if loss is not None else None
        metrics = self.outcome.metrics | {"held_out_interval": interval.as_json() if interval else None}
        named = {
            "gain": self.gain, "forgetting": self.forgetting, "unrelated_text": self.unrelated,
            "preferences": self.preferences, "test": self.test,
        }  # fmt: skip
        metrics |= {name: found.as_json() for name, found in named.items() if found is not None}
        ways = {name: way for name, way in self.computed_by.items() if metrics.get(name) is not None}
        return metrics | {"computed_by": ways}


def compare_with_base(
    plan: Plan, outcome: Outcome, context: RunContext, log: Callable[[str], None]
) -> tuple[Weights, Gain]:
    """The adapter's weights, and how much better than its base they do, or than the adapter that it started from, where
    answers are compared with what that says. Raises NumericError: a loss is NaN or inf; or see `collapse`."""
    weights, objective, group = tensors.full_weights(plan.model), plan.batches.objective, context.group
    compared = plan.datasets.compared
    sample = compared, plan.batches.scoring, outcome.tokens, plan.batches.acceleration, group, log
    base = partial(tensors.as_initialized, plan.model, plan.adapter_init, weights)
    if plan.earlier is not None and isinstance(objective, Comparing) and objective.formula.has_reference:
        start = tensors.as_started(plan.model, plan.adapter_init, weights)
        comparison = gain.measure(plan.model, start, *sample, "the one it started from", "start", objective)
    else:
        comparison = gain.measure(plan.model, base(), *sample, objective=objective)
    problem = None
    if not math.isfinite(comparison.adapter):
        what = f"after the last step the loss of some {comparison.split} rows is NaN or inf"
        problem = Problem(Code.TRAIN_LOSS_NOT_FINITE, what, key="training.learning_rate", fix="lower it")
    else:
        numbers = gain.sample(compared, outcome.tokens)[1]
        rows = [row for number in numbers for row in compared[comparison.split].item(number)]
        sensitivity = collapse.measure(plan.model, base(), rows)
        vocabulary = plan.model.config.get_text_config().vocab_size
        loss = comparison.adapter if comparison.unit == "token" else math.nan
        why = collapse.reason(sensitivity, comparison.sampled_rows(), loss, comparison.base, vocabulary)
        if why := group.all_gather(why)[0]:
            what, fix = f"the adapter {why}", f"lower it, to {plan.lower_rate:g} for example"
            problem = Problem(Code.TRAINING_COLLAPSED, what, key="training.learning_rate", fix=fix)
    if problem is not None:
        raise diverged_error(problem, context.checkpoints, outcome.steps)
    return weights, comparison


def measure(
    plan: Plan, outcome: Outcome, comparison: Gain, weights: Weights, context: RunContext, log: Callable[[str], None]
) -> Findings:
    """Measure what else is to be said of an adapter; a line is logged where it may not be intended.

    Args:
        plan: The run, whose model has the adapter.
        outcome: What the training loop came to.
        comparison: How the adapter compares with its base.
        weights: The adapter's tensors, whole.
        context: The processes of the run.
        log: Takes lines.

    Raises:
        NumericError: The loss on the test rows is NaN or inf.
    """
    adapter = plan.model, plan.adapter_init, weights, plan.batches.scoring
    acceleration, group = plan.batches.acceleration, context.group
    earlier = None
    if plan.earlier is not None:
        earlier = forgetting.of_earlier_run(plan.earlier, *adapter, outcome.tokens, acceleration, group, log)
    unrelated = forgetting.of_unrelated_text(plan.datasets.unrelated, *adapter, acceleration, group)
    if unrelated.remark:
        log(unrelated.remark)
    test, preferences = _score_test(plan, context, log), _compare_answers(plan, context, log)
    return Findings(outcome, comparison, earlier, unrelated, test, preferences, _computed_by(plan))


def _computed_by(plan: Plan) -> dict[str, dict[str, str]]:
    """How each metric is computed: those of the training loop in its batches, and the others in those of `scoring`."""
    scoring = plan.batches.scoring
    in_loop = plan.batches.validation or plan.batches.train
    layers: Layers = "accelerated" if plan.batches.acceleration.steps else "stock"
    looped, scored = (
        computed_by(plan.model, layers, flat=batches.flat, shares=batches.saved is not None)
        for batches in (in_loop, scoring)
    )
    loop = ("held_out_loss", *(["kept_step"] if plan.batches.validation else []), "preferences")
    return dict.fromkeys(loop, looped) | dict.fromkeys(("gain", "forgetting", "unrelated_text", "test"), scored)


def _score_test(plan: Plan, context: RunContext, log: Callable[[str], None]) -> FinalScore | None:
    """The loss of the adapter on the test rows, None without any. Raises NumericError: it is NaN or inf."""
    if (test := plan.datasets.test) is None:
        return None
    batches = plan.batches
    log(f"scoring the adapter on {plural(test.items, f'test {gain.item(batches.objective.unit)}')}")
    return final_score.score(plan.model, test, batches.scoring, batches.acceleration, context.group, batches.objective)


def _compare_answers(plan: Plan, context: RunContext, log: Callable[[str], None]) -> PreferenceFigures | None:
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
