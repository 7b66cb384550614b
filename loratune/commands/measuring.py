"""What `loratune train` measures: the reference of preferences before its steps; after them the gain over the base,
what was lost on other rows, and the loss on test rows.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from loratune.codes import Code
from loratune.commands.plan import Plan
from loratune.compare import collapse, gain
from loratune.compare.engine import Objective, Scorer
from loratune.compare.gain import FinalScore, Forgetting, Gain
from loratune.compare.preferences import PreferenceMetrics
from loratune.errors import Problem
from loratune.events import note
from loratune.lora import tensors
from loratune.lora.tensors import Weights
from loratune.system.launcher import SINGLE_PROCESS
from loratune.text import plural
from loratune.training import conditions, reference
from loratune.training.callbacks import diverged_error
from loratune.training.outcome import Outcome
from loratune.training.preferences import MOST_COMPARED, PreferenceObjective
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
        computed_by: Metric → how it was computed, see `Engine.computed_by`.
    """

    outcome: Outcome
    gain: Gain
    forgetting: Forgetting | None
    unrelated: Forgetting
    test: FinalScore | None
    preferences: PreferenceMetrics | None
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
        """All of it as plain values. held_out_interval: null where it is not known."""
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


def compare_with_base(plan: Plan, outcome: Outcome, context: RunContext) -> tuple[Weights, Gain]:
    """The adapter's weights, and how they compare with the base; or with the adapter from which training continued,
    where that is the reference of preferences. Raises NumericError: a loss is NaN or inf; or see `collapse`."""
    weights, objective, group = tensors.full_weights(plan.model), plan.batches.objective, context.group
    compared, scorer = plan.datasets.compared, _scorer(plan, context, objective)
    base = partial(tensors.as_initialized, plan.model, plan.adapter_init, weights)
    if plan.earlier is not None and isinstance(objective, PreferenceObjective) and objective.formula.has_reference:
        start = tensors.as_started(plan.model, plan.adapter_init, weights)
        comparison = gain.measure(scorer, start, compared, outcome.tokens, "the one it started from", "start")
    else:
        comparison = gain.measure(scorer, base(), compared, outcome.tokens)
    problem = None
    if not math.isfinite(comparison.adapter):
        what = f"after the last step the loss of some {comparison.split} rows is NaN or inf"
        problem = Problem(Code.TRAINING_NOT_FINITE, what, key="training.learning_rate", fix="lower it")
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


def _scorer(plan: Plan, context: RunContext, objective: Objective = Objective()) -> Scorer:  # noqa: B008  no state
    return Scorer(plan.model, plan.batches.engine, objective, context.group)


def measure(plan: Plan, outcome: Outcome, comparison: Gain, weights: Weights, context: RunContext) -> Findings:
    """Measure what else is to be reported of an adapter; a line is logged where it may not be intended.

    Args:
        plan: The run, whose model has the adapter.
        outcome: What the training loop came to.
        comparison: How the adapter compares with its base.
        weights: The adapter's tensors, whole.
        context: The processes of the run.

    Raises:
        NumericError: The loss on the test rows is NaN or inf.
    """
    unrelated, text = Forgetting(None, unknown=plan.datasets.unrelated.unknown), plan.datasets.unrelated.rows
    earlier = _forgotten(plan, weights, outcome.tokens, context)
    if text is not None:
        base = tensors.as_initialized(plan.model, plan.adapter_init, weights)
        unrelated = gain.forgetting(_scorer(plan, context), base, text)
    if unrelated.remark:
        note(unrelated.remark)
    test, preferences = _score_test(plan, context), _measure_preferences(plan, context)
    measured = ("held_out_loss", "gain", "forgetting", "unrelated_text", "test", "preferences")
    names = [*measured, *(["kept_step"] if plan.batches.held_out else [])]
    computed_by = dict.fromkeys(names, plan.batches.engine.computed_by)
    return Findings(outcome, comparison, earlier, unrelated, test, preferences, computed_by)


def _forgotten(plan: Plan, weights: Weights, budget: int, context: RunContext) -> Forgetting | None:
    """How the adapter does on rows of the earlier run, compared with the adapter from which training continued."""
    if (run := plan.earlier) is None:
        return None
    if run.held_out is None:
        return Forgetting(None, unknown=run.unknown)
    before = tensors.as_started(plan.model, plan.adapter_init, weights)
    rows, name = {run.split: run.held_out}, f"the one it started from, {run.start.info.files.path},"
    comparison = gain.measure(_scorer(plan, context), before, rows, budget, name)
    return Forgetting(comparison, f"{comparison.sampled_rows()} of the earlier run")


def _score_test(plan: Plan, context: RunContext) -> FinalScore | None:
    """The loss of the adapter on the test rows, None without any. Raises NumericError: it is NaN or inf."""
    if (test := plan.datasets.test) is None:
        return None
    objective = plan.batches.objective
    note(f"scoring the adapter on {plural(test.items, f'test {gain.item(objective.unit)}')}")
    return gain.final_score(_scorer(plan, context, objective), test)


def _measure_preferences(plan: Plan, context: RunContext) -> PreferenceMetrics | None:
    """What the adapter prefers, and a line on what of it may not be intended; None for other objectives."""
    objective, batches = plan.batches.objective, plan.batches
    if not isinstance(objective, PreferenceObjective):
        return None
    split = "training" if batches.held_out is None else "validation"
    count = min(plan.datasets.train.items, MOST_COMPARED)
    rows = batches.held_out or objective.plan(batches.engine, plan.datasets.train, dict.fromkeys(range(count), 1))
    with batches.acceleration.applied(plan.model):
        objective.score(plan.model, rows, group=context.group)
    metrics = objective.metrics(split)
    assert metrics is not None
    for line in metrics.warnings():
        note(line)
    return metrics


def compute_reference(plan: Plan, objective: Objective, context: RunContext | None = None) -> None:
    """Compute what an objective compares answers with, where it does: the model before its first step, as it is now.

    Args:
        plan: The run.
        objective: That of the run, or another one that its adapter is measured by.
        context: The processes of the run, and whether it is to stop; None in one process that a signal just ends.

    Raises:
        NumericError: The model gives an answer no finite log-probability.
        KeyboardInterrupt: The run was stopped.
    """
    if not isinstance(objective, PreferenceObjective):
        return
    start = plan.earlier.start.digest if plan.earlier else ""
    starts_elsewhere = bool(start) or plan.config.lora.init_lora_weights == "loftq"
    environment = conditions.environment(plan.model, plan.batches.acceleration.fallbacks)
    known: dict[str, Any] = {"base": plan.base.fingerprint, "conditions": environment, "start": start}
    known |= {"lora": plan.config.lora.model_dump() if starts_elsewhere else {}, "seed": plan.config.training.seed}
    model = Reference(plan.model, plan.adapter_init, starts_elsewhere, plan.batches.acceleration, known)
    layouts, pad_id = plan.batches.layouts, plan.batches.pad_id
    if context is None:
        reference.compute(objective, model, layouts, pad_id, SINGLE_PROCESS)
    else:
        check = context.check_not_stopping
        reference.compute(objective, model, layouts, pad_id, context.group, lambda _: check())
