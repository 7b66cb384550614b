"""What a run is, by everything that decides its result, and whether a resumed run is the same one."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratune.codes import Code
from loratune.config import RunConfig, read_earlier
from loratune.data import TokenizedDataset
from loratune.errors import Problem, ResumeError
from loratune.system import launcher
from loratune.training import auto
from loratune.training.checkpoints.store import newest_whole, step_of
from loratune.training.curve import SECONDS, UNREPORTED, StepLosses
from loratune.training.evaluations import BEST, BestRecord

CHANGEABLE = (
    "training.learning_rate", "training.num_train_epochs", "training.max_steps", "training.max_grad_norm",
    "training.logging_steps", "training.save_steps", "training.eval_steps", "training.keep", "training.patience",
    "training.activation_checkpointing",
    "training.per_device_train_batch_size", "training.gradient_accumulation_steps",
    "lora.lora_dropout", "lora.start_from", "data.train", "data.validation", "data.test", "data.chat_template",
    "model.name_or_path", "model.attn_implementation", "model.torch_compile", "model.use_liger_kernel",
)  # fmt: skip
"""Keys that a resumed run can change: each has its effect from the next step on, and the rows stay the same.

Those that hold a path may name another place, at which there has to be the same as before; see `CONTENTS`. The number
of rows that an optimizer step takes, over all processes, has to stay the same as well.
"""
CONTENTS = {
    "data": ("data.train", "training rows have"),
    "validation": ("data.validation", "validation rows have"),
    "test": ("data.test", "test rows have"),
    "template": ("data.chat_template", "chat template has"),
    "start": ("lora.start_from", "adapter that the run started from has"),
    "base": ("model.name_or_path", "base model has"),
}
"""What a run reads, by the name of its fingerprint: the key that says where it is, and what it is called. What is at a
path and is not here, a resumed run would read unchecked."""
_ONLY_SCORED = ("data.validation", "data.test")
"""Keys of rows that are never trained on, so that other rows can be allowed."""
MAX_MINUTES = "max_minutes"
"""The key of a checkpoint's record that holds the time budget, from which `max_steps` was fixed as the run began."""
_NOT_COMPARED = ("output_dir", "training.report_to", "training.ddp_timeout")
"""Keys that may change: the checkpoints were found, so the run directory may have been moved; the others change no
step."""
_RESTART = "start afresh with --overwrite"


@dataclass(frozen=True)
class ResumePoint:
    """Where a resumed run continues.

    Attributes:
        checkpoint: The directory of the checkpoint.
        skipped: A problem for each newer checkpoint that is not whole.
        changes: The keys that were changed with --allow-change, now and in earlier resumptions: at which step, and
            from which value to which.
        learning_rate_factor: The new learning rate divided by the old one.
        identity: The identity of the interrupted run, as its checkpoint holds it; see `identity`.
        dropped_keys: Keys without a value that the release which wrote the checkpoint knew, and this one does not.
        kept: Keys that are `auto`, with what they were when the run was interrupted.
    """

    checkpoint: Path
    skipped: tuple[Problem, ...]
    changes: list[dict[str, Any]]
    learning_rate_factor: float
    identity: Mapping[str, Any]
    dropped_keys: tuple[str, ...] = ()
    kept: Mapping[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """How many optimizer steps were taken."""
        return step_of(self.checkpoint)

    @property
    def unreported(self) -> StepLosses:
        """The losses of the steps before it that no report has."""
        return StepLosses.from_json(self.identity.get(UNREPORTED))

    @property
    def seconds(self) -> float:
        """How long training took up to it; 0 if an earlier release wrote it."""
        return float(self.identity.get(SECONDS, 0.0))

    @property
    def new_changes(self) -> list[dict[str, Any]]:
        """Those of `changes` that this resumption makes."""
        return self.changes[len(self.identity["changes"]) :]

    @property
    def base_fingerprint(self) -> str:
        """The fingerprint of the base of the interrupted run."""
        return str(self.identity["fingerprints"]["base"])


def identity(
    config: RunConfig,
    fingerprints: Mapping[str, str | None],
    rows: TokenizedDataset,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """What a checkpoint keeps of its run, as JSON.

    Args:
        config: The config, with absolute paths.
        fingerprints: Of all that the run reads, see `CONTENTS`.
        rows: The training rows, whose counts are kept.
        environment: What the run is computed with; see `conditions.environment`.

    Returns:
        All of these, with the number of processes and how they shard the weights. The time budget is added as soon as
        it is known how many steps it comes to.
    """
    return {
        "config": config.resolved(),
        "fingerprints": dict(fingerprints),
        "rows": rows.report.counts(),
        "conditions": dict(environment),
        "processes": launcher.world_size(),
        "sharding": launcher.sharding(),
        "changes": [],
        MAX_MINUTES: None,
    }


def notes(resume_point: ResumePoint, identity: Mapping[str, Any], *, dropout: bool) -> Iterator[str]:
    """Lines about the checkpoint that the run continues from, and what has changed since.

    Args:
        resume_point: The checkpoint.
        identity: That of the run as it continues, see `identity`.
        dropout: Whether the run uses dropout.
    """
    yield from map(str, resume_point.skipped)
    for key in resume_point.dropped_keys:
        yield f"{key}: was empty in the release of loratune that began the run; this release has no such key"
    if kept := [f"{key} {auto.shown(value)}" for key, value in resume_point.kept.items()]:
        yield f"auto: as when the run was interrupted, {', '.join(kept)}"
    for change in identity["changes"]:
        yield f"{change['key']} was {change['was']} up to step {change['step']}, and is {change['is']} from there"
    if environment_changes(resume_point, identity):
        yield "so the result may differ in its last digits from that of an uninterrupted run"
    elif "conditions" not in resume_point.identity:
        yield "the checkpoint does not record what it was computed with: the result may differ in its last digits"
    yield f"resuming from step {resume_point.step}"
    before, now = resume_point.identity.get("processes", 1), identity["processes"]
    if before != now and dropout:
        yield f"dropout is drawn differently from here on: {now} processes instead of {before}"


def find_resume_point(checkpoints: Path, run: RunConfig, allowed: Sequence[str]) -> ResumePoint:
    """Find the newest whole checkpoint, and check that it is of a run with the same config.

    Args:
        checkpoints: The directory of all checkpoints.
        run: The config of this run, in which `auto` stands for what was decided before the interruption.
        allowed: Keys of `CHANGEABLE` whose values may differ.

    Raises:
        ResumeError: No checkpoint is whole; the config has changed; a key cannot be changed; with the processes that
            there are now, a step would take other rows, or DeepSpeed's files cannot be read.
        ConfigError: As `auto.keep`.
    """
    if problems := [
        Problem(
            Code.RESUME_CHANGED,
            "a resumed run cannot change this key",
            key=f"--allow-change {key}",
            fix=f"leave it out; these keys can be changed: {', '.join(CHANGEABLE)}",
        )
        for key in allowed
        if key not in CHANGEABLE
    ]:
        raise ResumeError(problems)
    checkpoint, before, skipped = newest_whole(checkpoints, _fault)
    if other_budget := [*_changed_budget(before, run)]:
        raise ResumeError([*skipped, *other_budget])
    config = auto.keep(run, before["config"]).resolved()
    old, unknown = read_earlier(before["config"])
    problems = [*_changed_keys(old, config, allowed), *_lost_values(unknown, before)]
    if problems := problems or [
        *_changed_step_sizes(before, config, launcher.world_size()),
        *_changed_processes(before),
    ]:
        raise ResumeError([*skipped, *problems])
    changes = [
        {"step": step_of(checkpoint), "key": key, "was": was, "is": now} for key, was, now in _differences(old, config)
    ]
    factor = config["training"]["learning_rate"] / old["training"]["learning_rate"]
    all_changes, kept = before["changes"] + changes, auto.kept(run, before["config"])
    return ResumePoint(checkpoint, tuple(skipped), all_changes, factor, before, tuple(unknown), kept)


def _changed_budget(before: Mapping[str, Any], run: RunConfig) -> Iterator[Problem]:
    """A time budget that is not the one from which the steps of the run were fixed."""
    old, new = before.get(MAX_MINUTES), run.training.max_minutes
    if new is not None and old != new:
        what = f"was {'not set' if old is None else f'{old:g}'} when the run began, and its length is fixed since then"
        fix = "change it back; or for another length: --set training.max_minutes= --set training.max_steps=N"
        fix += " --allow-change training.max_steps"
        yield Problem(Code.RESUME_CHANGED, what, key="training.max_minutes", fix=fix)


def _fault(run: Any) -> str:
    """What is wrong with an identity that was read from a checkpoint; empty if the run can be resumed by it."""
    try:
        training = run["config"]["training"]
        rate = training["learning_rate"]
        numbers = [training[key] for key in ("per_device_train_batch_size", "gradient_accumulation_steps")]
        numbers += [run["rows"]["rows"], run["rows"]["tokens"], run.get("processes", 1)]
        texts = [run["fingerprints"][key] for key in ("base", "data")] + [run.get("sharding", "")]
        numbers += [max(training["max_steps"], 0)] if run.get(MAX_MINUTES) is not None else []
        changes = [change[key] for change in run["changes"] for key in ("step", "key", "was", "is")]
        if run.get(BEST) is not None:
            BestRecord.from_json(run[BEST])
        StepLosses.from_json(run.get(UNREPORTED))
    except KeyError as error:
        return f"{error} is missing"
    except (TypeError, AttributeError, ValueError):
        return "it is not the record of a run"
    checks = (
        all(type(number) is int and 0 <= number < 1 << 63 for number in numbers),
        all(isinstance(text, str) for text in texts),
        isinstance(run["fingerprints"].get("validation"), str | None),
        isinstance(run.get("conditions", {}), dict),
        isinstance(run.get(MAX_MINUTES), int | float | None),
        run.get(MAX_MINUTES) is None or 0 < training["max_steps"] < 1 << 31,
        len(changes) == 4 * len(run["changes"]) and isinstance(run["changes"], list),
        type(rate) in (int, float) and 0 < rate < math.inf,
        type(seconds := run.get(SECONDS, 0.0)) in (int, float) and 0 <= seconds < math.inf,
        auto.are_recorded(run["config"]),
    )
    return "" if all(checks) else "it is not the record of a run"


def check_same(point: ResumePoint, current: Mapping[str, Any], allowed: Sequence[str], *, base: str) -> None:
    """Check that rows and base are the same as before the interruption.

    Args:
        point: Where the run is resumed.
        current: The identity of this run.
        allowed: Keys that may differ.
        base: The fingerprint of the base, in the version of the one that the checkpoint holds.

    Raises:
        ResumeError: Rows or base have changed.
    """
    comparable = {**current, "fingerprints": current["fingerprints"] | {"base": base}}
    if problems := list(_changed_contents(point.identity, comparable, allowed)):
        raise ResumeError(problems)


def environment_changes(point: ResumePoint, current: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a resumed run is computed with that it was not computed with before, in the form of `ResumePoint.changes`.

    The run continues all the same: its numbers are as good, but their last bits may differ. Nothing is known of a
    checkpoint whose release did not record the environment. current: the identity of this run.
    """
    old, new = point.identity.get("conditions", {}), current["conditions"]
    return [
        {"step": point.step, "key": name, "was": old[name], "is": new[name]}
        for name in new
        if name in old and old[name] != new[name]
    ]


def _lost_values(unknown: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[Problem]:
    """Unknown keys whose values had an effect that would end here. Empty ones are `ResumePoint.dropped_keys`."""
    release = before.get("conditions", {}).get("loratune")
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
        fix = "change it back" + (f", or allow the change with --allow-change {option}" if option else "")
        yield Problem(Code.RESUME_CHANGED, what, key=key, fix=fix)


def _changed_step_sizes(before: Mapping[str, Any], now: Mapping[str, Any], processes: int) -> Iterator[Problem]:
    """Settings with which an optimizer step would take other rows: more, fewer, or packed in another way."""
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    old, new = (
        (count, *(config["training"][key] for key in keys))
        for count, config in ((before.get("processes", 1), before["config"]), (processes, now))
    )
    rows = [f"{math.prod(sizes)} ({_processes(sizes[0])} x {sizes[1]} x {sizes[2]})" for sizes in (old, new)]
    if math.prod(old) != math.prod(new):
        what = f"a step took {rows[0]} rows when the run was interrupted, and would now take {rows[1]}"
        fix = f"start {_processes(old[0])}, or change this key so that the product stays the same, with --allow-change"
        if old[0] == new[0]:
            fix = "change it back, or change the other factor as well, so that the product stays the same"
        key = f"training.{keys[0] if old[1] != new[1] else keys[1]}"
        yield Problem(Code.RESUME_CHANGED, what, key=key, fix=fix)
    elif old[1] != new[1] and now["data"]["packing"] == "full":
        what, fix = f"was {old[1]} when the run was interrupted, and packs are made for it", "change it back"
        yield Problem(Code.RESUME_CHANGED, what, key=f"training.{keys[0]}", fix=fix)


def _changed_processes(before: Mapping[str, Any]) -> Iterator[Problem]:
    """Processes that DeepSpeed's files do not fit: it writes a file with a part of the optimizer for each process."""
    old = (before.get("sharding", ""), before.get("processes", 1))
    new = (launcher.sharding(), launcher.world_size())
    if old != new and "deepspeed" in (old[0], new[0]):
        was, now = (f"{_processes(count)} with {sharding or 'no sharding'}" for sharding, count in (old, new))
        what = f"the run had {was}, and now has {now}; a checkpoint of DeepSpeed needs the same processes"
        yield Problem(Code.RESUME_CHANGED, what, fix="start it as before")


def _changed_contents(before: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str]) -> Iterator[Problem]:
    """What is read and has another content than in the interrupted run, as far as its checkpoint records it."""
    old, new = before["fingerprints"], now["fingerprints"]
    for name, (key, _) in CONTENTS.items():
        if name not in old or old[name] == new.get(name) or (key in _ONLY_SCORED and key in allowed):
            continue
        counts = [f"{run['rows']['rows']:,} rows with {run['rows']['tokens']:,} tokens" for run in (before, now)]
        is_counted = name == "data" and counts[0] != counts[1]
        yield content_problem(name, f" ({counts[0]}, now {counts[1]})" if is_counted else "")


def content_problem(name: str, details: str = "") -> Problem:
    """The problem that something of `CONTENTS` is not what it was when the run was interrupted."""
    key, what = CONTENTS[name]
    allow = f"allow the change with --allow-change {key}" if key in _ONLY_SCORED else _RESTART
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


def _processes(number: int) -> str:
    return f"{number} process" if number == 1 else f"{number} processes"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
