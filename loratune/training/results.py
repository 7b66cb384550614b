"""The results of training: the adapter's weights, the loss curve, and the comparison of the adapter with its base.

After the last step, the losses of adapter and base are compared on held-out rows, which gives the verdict; then on
unrelated text and on rows of the earlier run. The adapter alone is scored on test rows.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np

from loratune import outputs
from loratune.adapter import card
from loratune.codes import Code
from loratune.compare import behavior, collapse, exact, reasoning, verdict
from loratune.compare.behavior import Behavior
from loratune.compare.engine import SFT
from loratune.compare.labels import Labels
from loratune.compare.losses import (
    LossComparison,
    Model,
    compare_losses,
    compare_on_unrelated_text,
    item,
    per,
    sample_rows,
    score_test_rows,
)
from loratune.compare.objectives import PreferenceMetrics
from loratune.compare.preferences import MOST_COMPARED, PreferenceObjective
from loratune.compare.reasoning import Reasoning
from loratune.compare.temperature import temperature
from loratune.compare.verdict import Answers, Name, Outcome
from loratune.config import RunConfig
from loratune.data import first_examples, unrelated_kinds
from loratune.data.sources.rows import place_in_cache
from loratune.errors import ModelError, Problem, ResourceError
from loratune.events import note
from loratune.lora import tensors
from loratune.lora.tensors import Weights
from loratune.statistics import Interval, finite
from loratune.system import launcher
from loratune.text import listed, plural
from loratune.training.callbacks import diverged_error
from loratune.training.checkpoints.store import BestRecord
from loratune.training.comparisons import SAMPLE_TOKENS, SAMPLES
from loratune.training.plan import Plan
from loratune.training.reference import base_results

_NO_ROOM = "the run is short for so large a model"
_FEW_STEPS, _MOST_PASSES, _USUAL_PASSES = 100, 8, 4
"""An adapter that is not clearly better is advised to read its rows more often, up to these numbers of steps and
passes; before anything else, if it has read them less often than `auto` reads few rows."""
MOST_LOSSES, MOST_HELD_OUT = 600, 300
"""The most reports of each kind that are kept, spread evenly over the run: a report takes about 230 or 110 bytes of
loratune.json, which then stays below 200 kB."""


class OutOfMemory(ResourceError):
    """A step, or an evaluation, needs more memory than there is."""

    def __init__(self, position: str, *, evaluating: bool):
        super().__init__(Problem(Code.SYSTEM_OUT_OF_MEMORY, f"out of memory {position}"))
        self.evaluating = evaluating


@dataclass(frozen=True)
class SampleAnswer:
    """A held-out prompt, the answers of base and adapter to it, and the expected one."""

    prompt: str
    base: str
    adapter: str
    expected: str


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter whose run has taken all its steps.

    Attributes:
        config: The config of the run, without `auto`.
        steps: Optimizer steps that were taken.
        planned_steps: Optimizer steps that the run was to take.
        evaluations: The record of the evaluations; None without validation rows.
        tokens: The tokens read in training, without padding.
        seconds: The duration of training.
        tokens_per_second: Tokens per second in steps, without evaluations and checkpoints; None if there was no step.
        curve: The trainer's logs with a loss or a held-out loss, see `thinned`.
        weights: The adapter's whole tensors; empty until they are compared with the base.
        verdict: The verdict on it; this and the following fields are None until they are measured.
        labels: The labels of the training rows, if their answers are labels.
        label_temperature: That of their probabilities, see `compare.temperature`; None for 1.
        gain: The comparison of losses by which it is judged, with its base in most cases.
        answers: How many held-out answers are right; None where answers are long, or no rows are held out.
        advice: What to try next, if it is not clearly better.
        looks: How many steps the rows of the verdict have chosen from; 1 if they chose nothing.
        judged_apart: Whether the rows of the verdict are other validation rows than those that chose the step.
        leaked: Whether some validation rows are also training rows.
        samples: Held-out prompts with the answers of base and adapter.
        earlier: The comparison with the adapter from which training started, on rows of its run; or why there is none.
            None if training did not start from an adapter.
        unrelated: The comparison with the base on unrelated text, or why there is none.
        behavior: The change of the base's answers to everyday instructions.
        reasoning: Whether it still reasons; None if its base does not, or the rows are none that could change it.
        test: The loss on the test rows; None without test rows.
        preferences: The preference metrics; None for objectives without preferences.
        computed_by: How the metrics were computed, see `Engine.computed_by`.
        not_accelerated: Kind of layers that were not accelerated → reason.
        peak_memory: The most bytes in use at once, see `memory.peak`; empty until the adapter is published.
        adapter_bytes: The size of the file of weights; 0 until the adapter is published.
    """

    config: RunConfig
    steps: int
    planned_steps: int
    evaluations: BestRecord | None
    tokens: int
    seconds: float
    tokens_per_second: float | None
    curve: list[dict[str, float]]
    weights: Weights = field(default_factory=dict)
    verdict: Name | None = None
    labels: Labels | None = None
    label_temperature: float | None = None
    gain: LossComparison | None = None
    answers: Answers | None = None
    advice: tuple[str, ...] = ()
    looks: int = 1
    judged_apart: bool = False
    leaked: bool = False
    samples: Sequence["SampleAnswer"] = ()
    earlier: LossComparison | str | None = None
    unrelated: LossComparison | str = ""
    behavior: Behavior | None = None
    reasoning: Reasoning | None = None
    test: LossComparison | None = None
    preferences: PreferenceMetrics | None = None
    computed_by: dict[str, str] = field(default_factory=dict)
    not_accelerated: Mapping[str, str] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)
    adapter_bytes: int = 0

    @property
    def kept_step(self) -> int:
        """The step whose weights become the adapter."""
        return self.evaluations.step if self.evaluations and self.config.keeps_best else self.steps

    def losses(self, key: str = "loss") -> list[float]:
        """The losses of the curve. key: `loss` for steps, `eval_loss` for held-out losses."""
        return [entry[key] for entry in self.curve if key in entry]

    @property
    def held_out_loss(self) -> float | None:
        """The loss of the weights that become the adapter on the validation rows, or on those that chose nothing; None
        without any."""
        if self.judged_apart and self.gain is not None:
            return self.gain.adapter
        best = self.evaluations.loss if self.evaluations and self.config.keeps_best else None
        last = next(reversed(self.losses("eval_loss")), None)
        return last if best is None else best

    @property
    def held_out(self) -> list[tuple[str, str]]:
        """The results on rows that the adapter was not trained on, as labels and texts."""
        return [
            *self._evaluation_lines(),
            *([("test", self.test.loss_line)] if self.test else []),
            *(self.preferences.lines() if self.preferences else ()),
        ]

    def _evaluation_lines(self) -> list[tuple[str, str]]:
        """The results of the evaluations; empty without validation rows."""
        best, loss, comparison = self.evaluations, self.held_out_loss, self.gain
        if best is None or loss is None or comparison is None:
            return []
        text = f"{loss:.4f}" if comparison.unit == "token" else f"{loss:.4f} {per(comparison.unit)}"
        if interval := self._held_out_interval():
            text += f" (95 % interval {interval.low:.4f} to {interval.high:.4f})"
        if self.judged_apart:
            text += " on rows that did not choose the step"
            if self.config.keeps_best:
                text += f"; step {self.kept_step:,} is kept, with the lowest loss of {best.evaluations:,} evaluations"
                text += f" on the others, {best.loss:.4f}"
        elif best.evaluations > 1 and self.config.keeps_best:
            text += f" at step {self.kept_step:,}, kept: the lowest of {best.evaluations:,} evaluations"
            text += "" if self.test else ", so optimistic"
            if self.kept_step != self.steps:
                text += f"; {self.losses('eval_loss')[-1]:.4f} at step {self.steps:,}, the last"
        elif best.step != self.steps:
            text += f"; the lowest of {best.evaluations:,} evaluations was {best.loss:.4f}, at step {best.step:,}"
        lines = [("held-out", text)]
        if self.steps < self.planned_steps:
            count = f"{best.since:,} evaluation{'s in a row' if best.since > 1 else ''} without a lower held-out loss"
            lines.append(("stopped early", f"at step {self.steps:,} of {self.planned_steps:,}: {count}"))
        return lines

    @property
    def headline(self) -> str:
        """The verdict as a sentence, with what it cost the rows of the earlier run, if that is significant."""
        assert self.verdict is not None and self.gain is not None
        text = verdict.headline(self.verdict, self.gain, self.answers)
        if isinstance(earlier := self.earlier, LossComparison) and earlier.is_higher:
            how, worse = verdict.change(earlier), earlier.difference.value
            text += f"; {how} on the rows of the adapter that it started from ({worse:+.2f})"
        return text

    @property
    def outcome(self) -> Outcome:
        """What the verdict means to the user."""
        is_unseen = self.gain is not None and self.gain.split != "training"
        return verdict.outcome(self.verdict, self.answers, unseen=is_unseen)

    @property
    def doubt(self) -> str:
        """What speaks against relying on the verdict; empty if nothing does."""
        assert self.gain is not None
        return verdict.doubt(self.gain, chose=self.looks > 1, leaked=self.leaked)

    def _held_out_interval(self) -> Interval | None:
        """The interval of `held_out_loss`; None if it is unknown."""
        found, loss = self.gain, self.held_out_loss
        if found is None or loss is None:
            return None
        return found.interval if self.judged_apart else found.held_out_interval(loss)

    @property
    def side_effects(self) -> dict[str, str]:
        """How much general ability was lost, and how much of what an earlier run had taught, as labels and texts."""
        lines = {"unrelated text": _change_line(self.unrelated)}
        if self.behavior is not None:
            lines["base's answers"] = str(self.behavior)
        if self.reasoning is not None:
            lines["reasons"] = str(self.reasoning)
        return lines | ({} if self.earlier is None else {"earlier rows": _change_line(self.earlier)})

    @property
    def metrics(self) -> dict[str, Any]:
        """All metrics as JSON values, for the record. held_out_interval: null if unknown."""
        best, steps, loss = self.evaluations, self.losses(), self.held_out_loss
        interval = self._held_out_interval()
        metrics: dict[str, Any] = {
            "verdict": self.verdict,
            "judged_apart": self.judged_apart,
            "looks": self.looks,
            "steps": self.steps,
            "kept_step": self.kept_step,
            "stopped_early": self.steps < self.planned_steps,
            "first_loss": steps[0],
            "last_loss": steps[-1],
            "held_out_loss": loss,
            "best_held_out_loss": best.loss if best else None,
            "last_held_out_loss": next(reversed(self.losses("eval_loss")), None),
            "evaluations": best.evaluations if best else 0,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "held_out_interval": interval.to_dict() if interval else None,
        }
        named: dict[str, Any] = {
            "gain": self.gain and self.gain.to_dict(),
            "answers": self.answers and self.answers.to_dict(),
            "forgetting": None if self.earlier is None else _change_values(self.earlier),
            "unrelated_text": _change_values(self.unrelated),
            "behavior": self.behavior and self.behavior.to_dict(),
            "reasons": self.reasoning and self.reasoning.to_dict(),
            "preferences": self.preferences and self.preferences.to_dict(),
            "test": self.test and _test_values(self.test),
        }
        metrics |= {name: values for name, values in named.items() if values is not None}
        computed = ["held_out_loss", *named, *(["kept_step"] if best else [])]
        return metrics | {"computed_by": {one: self.computed_by for one in computed if metrics.get(one) is not None}}


def _change_line(found: LossComparison | str) -> str:
    """The line on a change of the loss. found: the comparison, or why there is none."""
    return f"not measured: {found}" if isinstance(found, str) else found.change_line


def _change_values(found: LossComparison | str) -> dict[str, Any]:
    """A change of the loss for the record, see `outputs.Forgetting`. found: the comparison, or why there is none."""
    if isinstance(found, str):
        return {"not_measured": found}
    low, high = found.difference.interval.to_dict() if found.difference.interval else (None, None)
    return {
        **{name: getattr(found, name) for name in ("split", "rows", "drawn", "total")},
        **finite({"before": found.base, "after": found.adapter, "change": found.difference.value}),
        "low": low,
        "high": high,
        **({"kinds": finite({kind: own.value for kind, own in found.kinds.items()})} if found.kinds else {}),
    }


def _test_values(found: LossComparison) -> outputs.Test:
    """The loss on the test rows for the record."""
    return {
        "loss": found.adapter, "tokens": found.tokens, "rows": found.drawn, "distinct": found.rows,
        "interval": finite(found.loss_interval),
    }  # fmt: skip


def thinned(history: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The reports of a trainer with a loss or a held-out loss, evenly thinned if there are many.

    The first and the last of each kind are always kept, and so is the lowest held-out loss.
    """
    steps, held_out = (
        [number for number, entry in enumerate(history) if key in entry] for key in ("loss", "eval_loss")
    )
    lowest = sorted(held_out, key=lambda number: history[number]["eval_loss"])[:1]
    kept = {*_spread(steps, MOST_LOSSES), *_spread(held_out, MOST_HELD_OUT - 1), *lowest}
    return [history[number] for number in sorted(kept)]


def _spread(numbers: Sequence[int], most: int) -> list[int]:
    if len(numbers) <= most:
        return [*numbers]
    return [numbers[place] for place in np.linspace(0, len(numbers) - 1, most).round().astype(int).tolist()]


def compare_with_base(plan: Plan, trained: TrainedAdapter) -> TrainedAdapter:
    """The adapter with its weights, and how it compares with the base, or with the adapter from which training
    continued, where that is the reference of preferences; and the verdict.

    Raises:
        NumericError: A loss is NaN or inf; or the adapter has collapsed, see `collapse`.
    """
    weights, objective, compared = tensors.full_weights(plan.model), plan.batches.objective, plan.comparisons
    base = partial(tensors.as_initialized, plan.model, plan.adapter_init, weights)
    other = base()
    name: Model = "base"
    if plan.run.start is not None and isinstance(objective, PreferenceObjective) and objective.formula.has_reference:
        other, name = tensors.as_started(plan.model, plan.adapter_init, weights), "start"
    comparison = compare_losses(plan.batches.engine, objective, other, compared.judging, name)
    problem = None
    if not math.isfinite(comparison.adapter):
        what = f"after the last step the loss of some {comparison.split} rows is NaN or inf"
        problem = Problem(Code.TRAINING_NOT_FINITE, what, key="training.learning_rate", fix="lower it")
    else:
        rows = [row for number in compared.judging.copies for row in compared.judging.dataset.item(number)]
        sensitivity = collapse.prompt_sensitivity(plan.model, base(), rows)
        vocabulary = plan.model.config.get_text_config().vocab_size
        why = collapse.reason(sensitivity, comparison, comparison.sampled_rows(), vocabulary)
        if why := plan.group.all_gather(why)[0]:
            what, fix = f"the adapter {why}", f"lower it, to {plan.lower_rate:g} for example"
            problem = Problem(Code.TRAINING_COLLAPSED, what, key="training.learning_rate", fix=fix)
    if problem is not None:
        raise diverged_error(problem, plan.checkpoints, trained.steps)
    looks = 1
    if compared.chose:
        looks = max(1, trained.evaluations.evaluations if trained.evaluations else 1)
    answers = _compare_answers(plan, base, looks) if compared.answers else None
    decided = verdict.decide_verdict(comparison, answers, looks=looks)
    if not plan.adapter_init.has_changed(weights):
        decided = "learned nothing"
    labels = _labels(plan)
    return replace(
        trained,
        labels=labels,
        label_temperature=_label_temperature(plan, labels),
        weights=weights,
        verdict=decided,
        gain=comparison,
        answers=answers,
        advice=tuple(_advice(plan, trained, decided, answers)),
        looks=looks,
        judged_apart=compared.judged_apart,
        leaked="validation" in plan.datasets.leaks,
    )


def _labels(plan: Plan) -> Labels | None:
    """The labels of the training rows, if their answers are labels."""
    train = plan.datasets.train
    if train.rows_per_example > 1 or train.is_unpaired or float(np.median(train.rows.supervised)) > verdict.SHORT:
        return None
    text = cache(partial(_text, plan))
    answers = (train.item(number)[0].completion for number in range(train.items))
    return Labels.of((text(ids), ids) for ids in answers)


def _label_temperature(plan: Plan, labels: Labels | None) -> float | None:
    """The temperature of labels on the judging rows, if these are validation rows that did not choose the step, and
    there is room for scoring their labels."""
    compared, engine = plan.comparisons, plan.batches.engine
    if labels is None or not compared.answers or compared.chose:
        return None
    rows = compared.answered()
    own = [(_text(plan, row.completion), row.completion) for row in rows]
    passes = 1 if engine.shares_prefixes else len(labels.ids)
    if not labels.are_those_of(own) or passes * compared.judging.tokens > compared.left:
        return None
    expected = np.array([labels.number(text) for text, _ in own])
    known, copies = expected >= 0, np.array([*compared.judging.copies.values()])
    scores = labels.score(engine, [row.prompt for row in rows])
    return temperature(scores[known], expected[known], copies[known])


def _text(plan: Plan, ids: Sequence[int]) -> str:
    return str(plan.datasets.tokenizer.decode(ids, skip_special_tokens=True))


def _compare_answers(plan: Plan, base: Callable[[], AbstractContextManager[None]], looks: int) -> Answers:
    """How many answers of base and adapter are right, as the main process computes it, or all for sharded weights."""
    compared, found = plan.comparisons, list[list[float]]()
    rows = compared.answered()
    if plan.group.main or launcher.sharding():
        contexts = base(), nullcontext()
        found = [exact.exact_matches(plan.model, plan.batches.engine, rows, inside).tolist() for inside in contexts]
    of_base, of_adapter = map(np.array, plan.group.broadcast(found))
    constant = None
    if compared.majority is not None:
        label = plan.datasets.tokenizer.decode(compared.majority, skip_special_tokens=True).strip()
        constant = label, np.array([float(row.completion == compared.majority) for row in rows])
    return Answers.of(of_base, of_adapter, np.array([*compared.judging.copies.values()]), constant, looks)


def _advice(plan: Plan, trained: TrainedAdapter, decided: Name, answers: Answers | None) -> Iterator[str]:
    """What to try next, if the adapter is not clearly better, or still became better at its last step."""
    best, passes = trained.evaluations, plan.tokens / int(plan.datasets.train.rows.lengths.sum())
    more = f"--set training.num_train_epochs={max(4, math.ceil(2 * passes))}"
    if plan.run.config.training.max_steps > 0:
        more = f"--set training.max_steps={2 * trained.steps}"
    more += " --overwrite"
    if trained.steps >= _FEW_STEPS or passes >= _MOST_PASSES:
        more = ""
    if decided in verdict.GOOD and (answers is None or answers.beats_majority is not False):
        if more and answers is None and best and best.evaluations > 1 and best.step == trained.steps:
            yield f"{more} (it still became better at the last step)"
        return
    if plan.datasets.alike:
        yield f"labels that look alike: {listed([f'{one} → {other}' for one, other in plan.datasets.alike.items()], 3)}"
    if decided == "cannot tell" and plan.comparisons.judging.rows == plan.comparisons.judging.total:
        yield "more held-out rows"
    hints = ["more rows, whose prompts contain what decides the answer"]
    if more:  # the passes of `auto` are enough for most rows
        steps = f"({plural(trained.steps, 'step')} {'was' if trained.steps == 1 else 'were'} taken)"
        hints.insert(0 if passes < _USUAL_PASSES else 1, f"{more} {steps}")
    yield from hints


def measure_remaining(plan: Plan, trained: TrainedAdapter) -> TrainedAdapter:
    """Measure what remains after `compare_with_base`: side effects, test loss, preference metrics and sample answers.

    Unexpected results are logged.

    Args:
        plan: The run, whose model has the adapter.
        trained: The adapter, compared with its base.

    Raises:
        NumericError: The loss on the test rows is NaN or inf.
    """
    earlier = _compare_earlier(plan, trained)
    base, left_out = base_results(plan, trained.weights), plan.comparisons.left_out
    unrelated: LossComparison | str = plan.datasets.unrelated.unknown
    if "unrelated" in left_out:
        unrelated = _NO_ROOM
    elif (text := plan.datasets.unrelated.rows) is not None:
        unrelated = compare_on_unrelated_text(base, text, unrelated_kinds())
    reasons = None
    if "behavior" in left_out:
        changed = Behavior(unknown=_NO_ROOM)
    elif plan.group.main or launcher.sharding():  # sharded weights need all processes in each forward pass
        changed = behavior.compare_on_base_answers(base, plan.datasets.renderer)
        if plan.datasets.can_reason:
            reasons = reasoning.compare(base, plan.datasets.renderer)
    else:
        changed = Behavior(unknown="measured by the main process")
    test = None
    if (rows := plan.datasets.test) is not None:
        objective = plan.batches.objective
        note(f"scoring the adapter on {plural(rows.items, f'test {item(objective.unit)}')}")
        test = score_test_rows(plan.batches.engine, objective, rows)
    return replace(
        trained,
        earlier=earlier,
        unrelated=unrelated,
        behavior=changed,
        reasoning=reasons,
        test=test,
        preferences=_preference_metrics(plan),
        samples=_sample_answers(plan, trained),
        computed_by=plan.batches.engine.computed_by,
        not_accelerated=plan.batches.engine.acceleration.fallbacks,
    )


def _sample_answers(plan: Plan, trained: TrainedAdapter) -> list[SampleAnswer]:
    """Some held-out prompts with the answers of base and adapter, in the main process; none where weights are sharded,
    or without held-out rows that have a prompt and an answer."""
    compared, rows = plan.comparisons, plan.run.rows
    if "samples" in compared.left_out or compared.judging.split != "validation" or not plan.group.main:
        return []
    if launcher.sharding() or rows is None or rows.validation is None or plan.batches.objective.unit != "token":
        return []
    examples, system = first_examples(rows.validation, compared.judging.dataset.rows), plan.run.system
    prompts = {place_in_cache(one.where): card.prompt_text(one, system) for one in examples}
    shown = [row for row in compared.answered() if prompts.get(row.where)]
    shown = shown[: 1 if compared.answers else SAMPLES]
    engine, renderer = plan.batches.engine, plan.datasets.renderer
    given, limit = [row.prompt for row in shown], max((len(row.completion) for row in shown), default=0)
    write = partial(
        behavior.write, plan.model, engine, given, min(limit, SAMPLE_TOKENS), end_ids=renderer.end_ids
    )  # fmt: skip
    try:
        of_adapter = [*write()] if shown else []
        with tensors.as_initialized(plan.model, plan.adapter_init, trained.weights):
            of_base = [*write()] if shown else []
    except ModelError:  # it cannot write, which `behavior` has said
        return []
    return [
        SampleAnswer(prompts[row.where], *(behavior.text_of(renderer, ids) for ids in (before, after, row.completion)))
        for row, before, after in zip(shown, of_base, of_adapter, strict=True)
    ]


def _compare_earlier(plan: Plan, trained: TrainedAdapter) -> LossComparison | str | None:
    """See `TrainedAdapter.earlier`."""
    earlier, start = plan.datasets.earlier, plan.run.start
    if earlier is None or start is None:
        return None
    if earlier.rows is None:
        return earlier.unknown
    before = tensors.as_started(plan.model, plan.adapter_init, trained.weights)
    rows = sample_rows({earlier.split: earlier.rows}, plan.tokens)
    found = compare_losses(plan.batches.engine, SFT, before, rows, "start")
    return replace(found, description=f"{found.sampled_rows()} of the earlier run")


def _preference_metrics(plan: Plan) -> PreferenceMetrics | None:
    """The preference metrics of the adapter; unexpected ones are logged. None for other objectives."""
    objective = plan.batches.objective
    if not isinstance(objective, PreferenceObjective):
        return None
    split, rows = "validation", plan.datasets.validation
    if rows is None:
        split, rows = "training", plan.datasets.train
    count = rows.items if split == "validation" else min(rows.items, MOST_COMPARED)
    plan.batches.engine.losses(rows, dict.fromkeys(range(count), 1), objective)
    assert objective.last is not None
    metrics = objective.metrics(split, objective.last)
    for line in metrics.warnings(of_training=True):
        note(line)
    return metrics
