"""Finds the checkpoint from which an interrupted run continues, and checks that it is the same run."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratune.codes import Code
from loratune.config import AUTO, RunConfig, read_earlier
from loratune.errors import Problem, ResumeError
from loratune.system import launcher
from loratune.training import auto
from loratune.training.checkpoints.store import BEST_WEIGHTS, BestRecord, CheckpointRecord, newest_whole, step_of

CHANGEABLE = (
    "training.learning_rate", "training.num_train_epochs", "training.max_steps", "training.max_grad_norm",
    "training.logging_steps", "training.save_steps", "training.eval_steps", "training.keep", "training.patience",
    "training.activation_checkpointing",
    "training.per_device_train_batch_size", "training.gradient_accumulation_steps",
    "lora.lora_dropout", "lora.start_from", "data.train", "data.validation", "data.test", "data.chat_template",
    "model.name_or_path", "model.attn_implementation", "model.torch_compile", "model.use_liger_kernel",
    "retention.prompts",
)  # fmt: skip
"""Keys that a resumed run can change: they take effect from the next step on, and the rows stay the same.

Paths may change, but the content must be the same as before; see `CONTENTS`. The number of rows of an optimizer step,
over all processes, must also stay the same.
"""
CONTENTS = {
    "data": ("data.train", "training rows have"),
    "validation": ("data.validation", "validation rows have"),
    "test": ("data.test", "test rows have"),
    "template": ("data.chat_template", "chat template has"),
    "start": ("lora.start_from", "adapter that the run started from has"),
    "retention": ("retention.prompts", "prompts of retention have"),
    "base": ("model.name_or_path", "base model has"),
}
"""Name of a fingerprint → the key of the content's path, and its description in messages. Any path that a run reads
must be listed, or a resumed run would read it unchecked."""
_ONLY_SCORED = ("data.validation", "data.test")
"""Keys of rows that are never trained on, so that other rows can be allowed."""
_NOT_COMPARED = ("output_dir", "training.report_to", "training.ddp_timeout")
"""Keys that may change: the checkpoints were found, so the run directory may have been moved; the others change no
step."""
_RESTART = "start afresh with `overwrite=True`"


@dataclass(frozen=True)
class ResumePoint:
    """Where a resumed run continues.

    Attributes:
        checkpoint: The directory of the checkpoint.
        record: The record of the interrupted run, as its checkpoint holds it.
        allowed: The keys that may have other values than before the interruption.
        skipped: A problem for each newer checkpoint that is not whole.
        changes: The keys that this resumption changes, in the form of `CheckpointRecord.changes`.
        learning_rate_factor: The new learning rate divided by the old one.
        decided: Keys that are `auto` → their values when the run was interrupted.
    """

    checkpoint: Path
    record: CheckpointRecord
    allowed: tuple[str, ...] = ()
    skipped: tuple[Problem, ...] = ()
    changes: list[dict[str, Any]] = field(default_factory=list)
    learning_rate_factor: float = 1.0
    decided: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """How many optimizer steps were taken."""
        return step_of(self.checkpoint)

    def check_same(self, current: CheckpointRecord, base: str) -> None:
        """Check that rows and base are the same as before the interruption.

        Args:
            current: The record of this run.
            base: The fingerprint of the base.

        Raises:
            ResumeError: Rows or base have changed.
        """
        old, new = self.record.fingerprints, current.fingerprints | {"base": base}
        problems = []
        for name, (key, _) in CONTENTS.items():
            if name not in old or old[name] == new.get(name) or (key in _ONLY_SCORED and key in self.allowed):
                continue
            counts = [f"{one.rows['rows']:,} rows with {one.rows['tokens']:,} tokens" for one in (self.record, current)]
            is_counted = name == "data" and counts[0] != counts[1]
            problems.append(content_problem(name, f" ({counts[0]}, now {counts[1]})" if is_counted else ""))
        if problems:
            raise ResumeError(problems)

    def evaluations(self, current: CheckpointRecord, *, keep: bool) -> tuple[BestRecord | None, str]:
        """The evaluations that still count in the resumed run; and if they do not count, a line on the reason.

        Args:
            current: The record of this run.
            keep: Whether the weights of the best step become the adapter.
        """
        best, reason = self.record.best, ""
        if best is not None and self.has_other_validation(current):
            reason = "they were on other rows"
        elif best is not None and keep and best.step != self.step and not (self.checkpoint / BEST_WEIGHTS).is_file():
            reason = f"the weights of step {best.step}, the best of them, were not kept"
        return (None, f"evaluations up to step {self.step} do not count: {reason}") if reason else (best, "")

    def has_other_validation(self, current: CheckpointRecord) -> bool:
        """Whether the resumed run is evaluated on other rows than before."""
        return self.record.fingerprints.get("validation") != current.fingerprints.get("validation")

    def notes(self, current: CheckpointRecord, *, keep: bool, dropout: bool) -> Iterator[str]:
        """Lines about the checkpoint that the run continues from, and what has changed since.

        Args:
            current: The record of the run as it continues.
            keep: As in `evaluations`.
            dropout: Whether the run uses dropout.
        """
        yield from map(str, self.skipped)
        if decided := [f"{key} {auto.shown(value)}" for key, value in self.decided.items() if value is not False]:
            yield f"auto: as when the run was interrupted, {', '.join(decided)}"
        for change in current.changes:
            yield f"{change['key']} was {change['was']} up to step {change['step']}, and is {change['is']} from there"
        if self.record.changed_conditions(current.conditions or {}, self.step):
            yield "so the result may differ in its last digits from that of an uninterrupted run"
        elif self.record.conditions is None:
            yield "the checkpoint does not record what it was computed with: the result may differ in its last digits"
        yield f"resuming from step {self.step}"
        before, now = self.record.processes, current.processes
        if before != now and dropout:
            yield f"dropout is drawn differently from here on: {now} processes instead of {before}"
        if remark := self.evaluations(current, keep=keep)[1]:
            yield remark


def find_resume_point(checkpoints: Path, run: RunConfig, allowed: Sequence[str]) -> ResumePoint:
    """Find the newest whole checkpoint, and check that it is of a run with the same config.

    Args:
        checkpoints: The directory of all checkpoints.
        run: The config of this run, in which `auto` stands for what was decided before the interruption.
        allowed: Keys of `CHANGEABLE` whose values may differ.

    Raises:
        ResumeError: No checkpoint is whole; the config has changed; a key cannot be changed; with the processes that
            there are now, a step would take other rows, or DeepSpeed's files cannot be read.
        ConfigError: As `auto.with_decided`.
    """
    if wrong := [key for key in allowed if key not in CHANGEABLE]:
        fix = f"leave it out; these keys can be changed: {', '.join(CHANGEABLE)}"
        what = "a resumed run cannot change this key"
        raise ResumeError([Problem(Code.RESUME_CHANGED, what, key=f"resume: {key}", fix=fix) for key in wrong])
    checkpoint, before, skipped = newest_whole(checkpoints)
    if other_budget := [*_changed_budget(before, run)]:
        raise ResumeError([*skipped, *other_budget])
    run, decided = auto.with_decided(run, before.decided)
    config = run.resolved()
    old, unknown = read_earlier({"retention": {"kl_weight": 0.0}, **before.config})  # a section of later releases
    if "num_train_epochs" in config["training"]:  # which is left out where max_steps sets the length
        old = old | {"training": {"num_train_epochs": AUTO} | old["training"]}
    problems = [*_changed_keys(old, config, allowed), *_lost_values(unknown, before)]
    if problems := problems or [*_changed_step_sizes(before, config), *_changed_processes(before)]:
        raise ResumeError([*skipped, *problems])
    step = step_of(checkpoint)
    return ResumePoint(
        checkpoint,
        before,
        tuple(allowed),
        skipped=tuple(skipped),
        changes=[{"step": step, "key": key, "was": was, "is": now} for key, was, now in _differences(old, config)],
        learning_rate_factor=config["training"]["learning_rate"] / old["training"]["learning_rate"],
        decided=decided,
    )


def _changed_budget(before: CheckpointRecord, config: RunConfig) -> Iterator[Problem]:
    """A time budget that is not the one from which the steps of the run were fixed."""
    old, new = before.max_minutes, config.training.max_minutes
    if new is not None and old != new:
        what = f"was {'not set' if old is None else f'{old:g}'} when the run began, and its length is fixed since then"
        fix = "change it back; or for another length: --set training.max_minutes= --set training.max_steps=N"
        fix += " `resume=[..., 'training.max_steps']`"
        yield Problem(Code.RESUME_CHANGED, what, key="training.max_minutes", fix=fix)


def _lost_values(unknown: Mapping[str, Any], before: CheckpointRecord) -> Iterator[Problem]:
    """Unknown keys whose values had an effect that would end here."""
    release = (before.conditions or {}).get("loratune")
    fix = f"finish the run with loratune {release}, which started it" if release else "finish the run with that release"
    for key, value in unknown.items():
        if value not in (None, False, "", "none", [], {}):
            what = f"was {_json(value)} in the release of loratune that started the run; this release has no such key"
            yield Problem(Code.RESUME_CHANGED, what, key=key, fix=f"{fix}, or {_RESTART}")


def _changed_keys(before: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str]) -> Iterator[Problem]:
    for key, old, new in _differences(before, now):
        if any(key == name or key.startswith(f"{name}.") for name in allowed):
            continue
        option = next((name for name in CHANGEABLE if key == name or key.startswith(f"{name}.")), None)
        what = f"was {_json(old)} when the run was interrupted, and is now {_json(new)}"
        fix = "change it back" + (f", or allow the change with `resume=[..., {option!r}]`" if option else "")
        yield Problem(Code.RESUME_CHANGED, what, key=key, fix=fix)


def _changed_step_sizes(before: CheckpointRecord, now: Mapping[str, Any]) -> Iterator[Problem]:
    """Settings with which an optimizer step would take other rows: more, fewer, or packed in another way."""
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    old, new = (
        (count, *(config["training"][key] for key in keys))
        for count, config in ((before.processes, before.config), (launcher.world_size(), now))
    )
    rows = [f"{math.prod(sizes)} ({_processes(sizes[0])} x {sizes[1]} x {sizes[2]})" for sizes in (old, new)]
    if math.prod(old) != math.prod(new):
        what = f"a step took {rows[0]} rows when the run was interrupted, and would now take {rows[1]}"
        fix = f"start {_processes(old[0])}, or change keys so that the product stays the same"
        fix += ", with `resume=[..., 'KEY']`"
        key = f"training.{keys[0] if old[1] != new[1] else keys[1]}"
        yield Problem(Code.RESUME_CHANGED, what, key=key, fix=fix)
    elif old[1] != new[1] and now["data"]["packing"] == "full":
        what, fix = f"was {old[1]} when the run was interrupted, and packs are made for it", "change it back"
        yield Problem(Code.RESUME_CHANGED, what, key=f"training.{keys[0]}", fix=fix)


def _changed_processes(before: CheckpointRecord) -> Iterator[Problem]:
    """Processes that DeepSpeed's files do not fit: it writes a file with a part of the optimizer for each process."""
    old, new = (before.sharding, before.processes), (launcher.sharding(), launcher.world_size())
    if old != new and "deepspeed" in (old[0], new[0]):
        was, now = (f"{_processes(count)} with {sharding or 'no sharding'}" for sharding, count in (old, new))
        what = f"the run had {was}, and now has {now}; a checkpoint of DeepSpeed needs the same processes"
        yield Problem(Code.RESUME_CHANGED, what, fix="start it as before")


def _processes(number: int) -> str:
    return f"{number} process{'es' if number > 1 else ''}"


def content_problem(name: str, details: str = "") -> Problem:
    """The problem that something of `CONTENTS` is not what it was when the run was interrupted."""
    key, what = CONTENTS[name]
    allow = f"allow the change with `resume=[..., {key!r}]`" if key in _ONLY_SCORED else _RESTART
    what = f"the {what} changed since the run was interrupted{details}"
    return Problem(Code.RESUME_CHANGED, what, key=key, fix=f"put back what was there, or {allow}")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key, old value and new value of everything that differs."""
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new and f"{prefix}{key}" not in _NOT_COMPARED:
            yield f"{prefix}{key}", old, new


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
