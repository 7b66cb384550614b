"""`training.adapter_scale`: after the last step, the update is multiplied by a number.

The number is given, or chosen on validation rows. It becomes part of B, so that everything measured afterwards is of
the adapter that is published. The checkpoints keep the update as it was trained.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loratune.codes import Code
from loratune.compare import gain
from loratune.compare.engine import Objective
from loratune.compare.metrics import RowLosses, compare
from loratune.config import AUTO
from loratune.data import TokenizedDataset
from loratune.errors import NumericError, Problem
from loratune.events import note
from loratune.lora import attach, tensors
from loratune.statistics import LEAST_ROWS, finite
from loratune.text import plural
from loratune.training.plan import Plan

KEY = "training.adapter_scale"
SCALES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""The scales that `auto` tries, in this order, up to the first that loses too much."""
SHARE = 0.01
"""The part of the gain over the base that a smaller scale may lose."""
MOST_ROWS = 100
"""The most distinct validation rows on which the scale is chosen."""


@dataclass(frozen=True)
class AdapterScale:
    """The number that the update of a trained adapter was multiplied by.

    Attributes:
        value: The number; 1 leaves the adapter as it was trained.
        why: How it was found; empty if nothing was asked for.
        evidence: What it was chosen by, as JSON values; empty if it was given.
        before: The loss on all validation rows before; None without any, or if the number is 1.
        held_out: This loss afterwards.
    """

    value: float = 1.0
    why: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    before: float | None = None
    held_out: float | None = None

    def __str__(self) -> str:
        return f"{self.value:g}: {self.why}"

    @property
    def tried(self) -> int:
        """How many scales rows have chosen from, besides 1."""
        return len(self.evidence.get("tried", ()))

    @property
    def lines(self) -> list[tuple[str, str]]:
        """The choice as label and text; empty if nothing was asked for."""
        return [("adapter scale", str(self))] if self.why else []

    @property
    def remark(self) -> str:
        """What to say after the held-out loss of the scaled adapter."""
        return "" if self.before is None else f" at adapter scale {self.value:g}; before scaling {self.before:.4f}"

    def to_dict(self) -> dict[str, Any]:
        """`adapter_scale`, and what it was chosen by as `adapter_scale_choice`; empty if nothing was asked for."""
        found: dict[str, Any] = {"adapter_scale": self.value} if self.why else {}
        return found | ({"adapter_scale_choice": self.evidence} if self.evidence else {})


def choose(losses: Callable[[float], RowLosses], unit: str = "token") -> AdapterScale:
    """Choose the smallest scale for which the upper end of the 95 % interval of the paired difference to the loss at 1
    is at most `SHARE` of the gain over the base; 1 if there is none, or no gain.

    Args:
        losses: Function of a scale that returns the losses of the same rows, at least `LEAST_ROWS`.
        unit: The unit over which losses are averaged, see `Objective`.
    """
    trained, base = losses(1.0), losses(0.0)
    rows, gained = plural(len(trained), f"validation {gain.item(unit)}"), base.loss - trained.loss
    evidence = {"rows": len(trained), **finite({"loss": trained.loss, "gain": gained})}
    if not 0 < gained < math.inf:
        losses_told = f"{base.loss:.4f} of the base, {trained.loss:.4f} of the adapter"
        return AdapterScale(1.0, f"there is no gain on {rows} that could be kept (loss {losses_told})", evidence)
    limit, found, tried, told = SHARE * gained, AdapterScale(), list[dict[str, Any]](), ""
    for scale in SCALES:
        scaled = losses(scale)
        interval = compare(trained, scaled).interval
        high = math.inf if interval is None else interval.high
        tried.append(finite({"scale": scale, "loss": scaled.loss, "high": high}))
        told = (
            f"the loss on {rows} is {scaled.loss:.4f} instead of {trained.loss:.4f} (upper bound of the difference "
            f"{high:+.4f}, {100 * SHARE:g} % of the gain is {limit:.4f})"
        )
        if high > limit:
            break
        found = AdapterScale(scale, told)
    return replace(found, why=found.why or f"at {tried[0]['scale']:g} {told}", evidence=evidence | {"tried": tried})


def apply(plan: Plan, held_out: float | None) -> AdapterScale:
    """Multiply the update of the trained model as the config asks. All processes must call this.

    Args:
        plan: The run, whose model has the trained adapter.
        held_out: The loss of that adapter on all validation rows; None without any.

    Raises:
        NumericError: Training changed nothing; or the loss of the scaled adapter is NaN or inf.
    """
    wanted, batches = plan.config.training.adapter_scale, plan.batches
    if wanted == 1:
        return AdapterScale()
    found = _chosen(plan) if wanted == AUTO else AdapterScale(wanted, f"as {KEY} sets it")
    note(f"adapter scale: {found}")
    if found.value == 1:
        return found
    state = tensors.full_weights(plan.model)
    attach.check_trained(state, plan.adapter_init)
    tensors.restore(plan.model, tensors.with_scale(state, found.value))
    if plan.datasets.validation is None or batches.held_out is None:
        return found
    loss = batches.engine.losses(plan.datasets.validation, batches.held_out.copies, batches.objective).loss
    if not math.isfinite(loss):
        what = f"the loss on the validation rows is {loss} at {found.value:g}"
        raise NumericError(Problem(Code.TRAINING_NOT_FINITE, what, key=KEY, fix="lower it"))
    return replace(found, before=held_out, held_out=loss)


def passes(plan: Plan) -> Iterator[tuple[TokenizedDataset, Sequence[int], Objective]]:
    """The most scoring passes of `apply`: rows, their numbers, and the objective that they are scored by."""
    wanted, rows, objective = plan.config.training.adapter_scale, plan.datasets.validation, plan.batches.objective
    if wanted == 1 or rows is None:
        return
    if wanted == AUTO:
        yield from [(rows, [*gain.draw(rows, MOST_ROWS, _choosing(plan, rows))], objective)] * (2 + len(SCALES))
    yield rows, [*objective.copies(rows)], objective


def _choosing(plan: Plan, rows: TokenizedDataset) -> Sequence[int]:
    """The validation items by which a scale may be chosen."""
    return sorted(plan.batches.chooses) or range(rows.items)


def _chosen(plan: Plan) -> AdapterScale:
    """The scale by the losses of a sample of the validation rows."""
    engine, objective, rows = plan.batches.engine, plan.batches.objective, plan.datasets.validation
    assert rows is not None, "the config requires validation rows"
    drawn = gain.draw(rows, MOST_ROWS, _choosing(plan, rows))
    count = rows.count_rows(drawn)
    what = plural(count, f"distinct validation {gain.item(objective.unit)}")
    if count < LEAST_ROWS:
        return AdapterScale(1.0, f"{what} {'is' if count == 1 else 'are'} too few, {LEAST_ROWS} are needed")
    note(f"choosing the adapter scale on {what}")

    def losses(scale: float) -> RowLosses:
        with attach.scaled(plan.model, "default", scale):
            return engine.losses(rows, drawn, objective)

    return choose(losses, objective.unit)
