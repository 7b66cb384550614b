"""The record of a checkpoint, `run.json`: everything that determines the result of a run, and its progress. This module
does not import torch.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictFloat, StrictStr, model_validator
from pydantic.dataclasses import dataclass

from loratune.training import auto

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
_EXACT = ConfigDict(allow_inf_nan=False, extra="forbid")
_Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]


@dataclass(config=_EXACT)
class StepLosses:
    """The losses of the steps since the last report, which gives their mean.

    Trainer's own mean is only of those since the run was started or resumed. A checkpoint keeps these, so that a
    resumed run reports what an uninterrupted one does.

    Attributes:
        total: Their sum, in nats per supervised token.
        steps: How many steps there were.
    """

    total: StrictFloat = 0.0
    steps: _Count = 0

    def add(self, loss: float) -> None:
        """Add the loss of a step."""
        self.total, self.steps = self.total + loss, self.steps + 1

    def take_mean(self) -> float:
        """Their mean, after which there are none. Raises ZeroDivisionError: there are none."""
        mean = self.total / self.steps
        self.total, self.steps = 0.0, 0
        return mean


@dataclass(frozen=True, config=_EXACT)
class BestRecord:
    """What is known of the evaluations of a run.

    Attributes:
        step: The step with the lowest held-out loss, the first of them if several have it.
        loss: That loss, in nats per supervised token.
        evaluations: How many evaluations there were.
        since: How many of them came after that step.
    """

    step: Annotated[int, Field(strict=True, ge=1)]
    loss: StrictFloat
    evaluations: _Count = 1
    since: _Count = 0

    def __post_init__(self) -> None:
        """Raises ValueError: more evaluations came after the best one than there were."""
        if self.since >= self.evaluations:
            raise ValueError("since is not below evaluations")

    def after(self, step: int, loss: float) -> "BestRecord":
        """The record after one more evaluation."""
        if loss < self.loss:
            return BestRecord(step, loss, self.evaluations + 1)
        return BestRecord(self.step, self.loss, self.evaluations + 1, self.since + 1)


class _TrainingValues(BaseModel):
    """What resuming computes with, of the section `training`."""

    model_config = _STRICT

    learning_rate: Annotated[float, Field(gt=0)]
    per_device_train_batch_size: _Count
    gradient_accumulation_steps: _Count
    max_steps: Annotated[int, Field(lt=1 << 31)] = -1


class _RowCounts(BaseModel):
    model_config = _STRICT | {"extra": "allow"}

    rows: _Count
    tokens: _Count


def _checked_config(config: dict[str, Any]) -> dict[str, Any]:
    _TrainingValues.model_validate(config.get("training"))
    if not auto.are_recorded(config):
        raise ValueError("a key has a value that no run decides")
    return config


def _checked_changes(changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if any({"step", "key", "was", "is"} - change.keys() for change in changes):
        raise ValueError("a change has no step, key, was or is")
    return changes


class CheckpointRecord(BaseModel):
    """What a checkpoint keeps of its run.

    Attributes:
        config: The config, with absolute paths and without `auto`.
        fingerprints: Of everything that the run reads, see `resume.CONTENTS`.
        rows: Counts of the training rows.
        conditions: The software and hardware, see `plan.conditions`; None if an earlier release wrote it.
        processes: How many processes the run has.
        sharding: How they shard the weights, see `launcher.sharding`.
        changes: What changed when the run was resumed: at which step, which key, from which value to which.
        max_minutes: The time budget from which `training.max_steps` was fixed as the run began.
        best: What the evaluations gave.
        unreported: The losses of the steps that no report has.
        seconds: How long training took.
    """

    model_config = ConfigDict(allow_inf_nan=False, frozen=True)

    config: Annotated[dict[str, Any], AfterValidator(_checked_config)]
    fingerprints: dict[str, StrictStr | None]
    rows: _RowCounts
    conditions: dict[str, str] | None = None
    processes: _Count = 1
    sharding: StrictStr = ""
    changes: Annotated[list[dict[str, Any]], AfterValidator(_checked_changes)]
    max_minutes: StrictFloat | None = None
    best: BestRecord | None = None
    unreported: StepLosses | None = None
    seconds: Annotated[float, Field(strict=True, ge=0)] = 0.0

    @model_validator(mode="after")
    def _check(self) -> "CheckpointRecord":
        if None in (self.fingerprints.get("base"), self.fingerprints.get("data")):
            raise ValueError("a fingerprint is missing")
        if self.max_minutes is not None and self.config["training"].get("max_steps", -1) <= 0:
            raise ValueError("a time budget without steps")
        return self

    def changed_conditions(self, now: Mapping[str, str], step: int) -> list[dict[str, Any]]:
        """Conditions that differ after this step, in the form of `changes`.

        The run continues all the same: its numbers are as good, but their last bits may differ.
        """
        old = self.conditions or {}
        return [
            {"step": step, "key": name, "was": old[name], "is": value}
            for name, value in now.items()
            if name in old and old[name] != value
        ]
