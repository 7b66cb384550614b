"""What a run is, by what decides its result; and whether a resumed one is the same."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from loratune.config import RunConfig
from loratune.errors import Problem, ResumeError
from loratune.system import launcher
from loratune.training.checkpoints import newest_whole, step_of

CHANGEABLE = (
    "training.learning_rate", "training.num_train_epochs", "training.max_steps", "training.max_grad_norm",
    "training.logging_steps", "training.save_steps", "training.eval_steps", "training.activation_checkpointing",
    "training.per_device_train_batch_size", "training.gradient_accumulation_steps",
    "lora.lora_dropout", "data.train", "data.validation", "model.name_or_path", "model.attn_implementation",
    "model.torch_compile", "model.use_liger_kernel",
)  # fmt: skip
"""Keys that a resumed run can take on: each has its effect from the next step on, and the rows stay as they were.

`data.train` and `model.name_or_path` may name another place; what is found there has to be the same. So has the number
of rows that an optimizer step takes, over all processes.
"""
_PLACES = ("output_dir",)  # the checkpoints were found, wherever they lie now


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on.

    skipped: checkpoints that were passed over, and why; changes: keys that were taken on, at which step, and from what
    to what; rescaled: the new learning rate over the old one; before: the identity of the run that was interrupted;
    forgotten: keys without a value that the release which wrote the checkpoint knew, and this one does not.
    """

    checkpoint: Path
    skipped: tuple[Problem, ...]
    changes: list[dict[str, Any]]
    rescaled: float
    before: Mapping[str, Any]
    forgotten: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return step_of(self.checkpoint)

    @property
    def changed(self) -> list[dict[str, Any]]:
        """Those of `changes` that are taken on now."""
        return self.changes[len(self.before["changes"]) :]

    @property
    def base_fingerprint(self) -> str:
        """That of the base of the run that was interrupted."""
        return str(self.before["fingerprints"]["base"])


def identity(
    config: Mapping[str, Any],
    fingerprints: Mapping[str, str | None],
    rows: Mapping[str, int],
    conditions: Mapping[str, str],
) -> dict[str, Any]:
    """What a checkpoint keeps of its run, as JSON. Beside what is given, how many processes there are, and what spreads
    the base over them.

    config: resolved; rows: counts of the training rows; conditions: what it is computed with, see `conditions`.
    """
    return {
        "config": dict(config), "fingerprints": dict(fingerprints), "rows": dict(rows), "conditions": dict(conditions),
        "processes": launcher.world_size(), "sharding": launcher.sharding(), "changes": [],
    }  # fmt: skip


def find(checkpoints: Path, config: Mapping[str, Any], allowed: Sequence[str]) -> Resumed:
    """Find the newest whole checkpoint, and insist that it is of a run with the same config.

    allowed: keys of `CHANGEABLE` whose values may differ. Raises ResumeError: no checkpoint is whole; the config has
    changed; a key that cannot be allowed; with the processes that there are now, steps would take other rows, or
    DeepSpeed's files cannot be read.
    """
    if problems := [
        Problem(
            "cannot take effect in a run that goes on",
            key=f"--allow-change {key}",
            fix=f"leave it out; these can: {', '.join(CHANGEABLE)}",
        )
        for key in allowed
        if key not in CHANGEABLE
    ]:
        raise ResumeError(problems)
    checkpoint, before, skipped = newest_whole(checkpoints, _fault)
    old = _completed(before["config"], config, RunConfig)
    unknown = dict(_unknown(before["config"], RunConfig))
    problems = [*_refused(old, config, allowed), *_lost(unknown, before)]
    if problems := problems or [*_reordered(before, config, launcher.world_size()), *_respread(before)]:
        raise ResumeError([*skipped, *problems])
    changed = [
        {"step": step_of(checkpoint), "key": key, "was": was, "is": now} for key, was, now in _changes(old, config)
    ]
    rescaled = config["training"]["learning_rate"] / old["training"]["learning_rate"]
    return Resumed(checkpoint, tuple(skipped), before["changes"] + changed, rescaled, before, tuple(unknown))


def _fault(run: Any) -> str:
    """What is wrong with what a checkpoint keeps of its run, see `identity`; empty if it can be gone on from."""
    try:
        training = run["config"]["training"]
        rate = training["learning_rate"]
        numbers = [training[key] for key in ("per_device_train_batch_size", "gradient_accumulation_steps")]
        numbers += [run["rows"]["rows"], run["rows"]["tokens"], run.get("processes", 1)]
        texts = [run["fingerprints"][key] for key in ("base", "data")] + [run.get("sharding", "")]
        changes = [change[key] for change in run["changes"] for key in ("step", "key", "was", "is")]
    except KeyError as error:
        return f"{error} is missing"
    except (TypeError, AttributeError):
        return "it is not the record of a run"
    sound = (
        all(type(number) is int and 0 <= number < 1 << 63 for number in numbers),
        all(isinstance(text, str) for text in texts),
        isinstance(run["fingerprints"].get("validation"), str | None),
        isinstance(run.get("conditions", {}), dict),
        len(changes) == 4 * len(run["changes"]) and isinstance(run["changes"], list),
        type(rate) in (int, float) and 0 < rate < math.inf,
    )
    return "" if all(sound) else "it is not the record of a run"


def check_same(resumed: Resumed, now: Mapping[str, Any], allowed: Sequence[str], *, base: str) -> None:
    """Insist that rows and base are the same.

    now: see `identity`; base: the fingerprint of the base, in the version of the one that the checkpoint holds. Raises
    ResumeError: they have changed.
    """
    comparable = {**now, "fingerprints": now["fingerprints"] | {"base": base}}
    if problems := list(_moved(resumed.before, comparable, allowed)):
        raise ResumeError(problems)


def differences(resumed: Resumed, now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the run is computed with that it was not computed with before, as `Resumed.changes`. now: see `identity`.

    The run goes on all the same: the numbers are as good, but their last bits may be others. A checkpoint of a release
    that kept no conditions differs in nothing that is known.
    """
    old, new = resumed.before.get("conditions", {}), now["conditions"]
    return [
        {"step": resumed.step, "key": name, "was": old[name], "is": new[name]}
        for name in new
        if name in old and old[name] != new[name]
    ]


def _completed(before: Any, now: Any, section: type[BaseModel] | None) -> Any:
    """A configuration as this release would have written it: a key that came with a later release has its default, and
    one that has gone is left out, see `_unknown`.

    before: resolved values, as a checkpoint holds them; now: those of this run; section: what they are values of.
    """
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [_completed(old, new, section) for old, new in zip(before, now, strict=True)]
    if not isinstance(before, dict) or not isinstance(now, dict) or section is None:
        return before
    made = {
        key: _completed(old, now.get(key), _section_of(section, key))
        for key, old in before.items()
        if key in section.model_fields
    }
    for key in now.keys() - before.keys():
        if key in section.model_fields and not section.model_fields[key].is_required():
            default = section.model_fields[key].get_default(call_default_factory=True)
            made[key] = default.model_dump() if isinstance(default, BaseModel) else default
    return made


def _section_of(section: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The class that the values of a key have, alone or in a list, if they are not plain."""
    open_: list[Any] = [section.model_fields[key].annotation] if key in section.model_fields else []
    for kind in open_:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        open_.extend(get_args(kind))
    return None


def _unknown(before: Mapping[str, Any], section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys, with values, that this release does not know."""
    for key, value in before.items():
        if key not in section.model_fields:
            yield f"{prefix}{key}", value
        elif (inner := _section_of(section, key)) is not None:
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, dict):
                    yield from _unknown(one, inner, f"{prefix}{key}.")


def _lost(unknown: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[Problem]:
    """Unknown keys whose values had an effect that would end here. Empty ones are told, see `Resumed.forgotten`."""
    release = before.get("conditions", {}).get("loratune")
    fix = f"finish the run with loratune {release}, which began it" if release else "finish the run with that release"
    for key, value in unknown.items():
        if value not in (None, False, "", "none", [], {}):
            what = f"was {_shown(value)} in the release of loratune that began the run; this release has no such key"
            yield Problem(what, key=key, fix=f"{fix}, or start afresh with --overwrite")


def _refused(before: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str]) -> Iterator[Problem]:
    for key, old, new in _changes(before, now):
        if any(key == name or key.startswith(f"{name}.") for name in allowed):
            continue
        may = next((name for name in CHANGEABLE if key == name or key.startswith(f"{name}.")), None)
        fix = "change it back" + (f", or take it on with --allow-change {may}" if may else "")
        yield Problem(f"was {_shown(old)} when the run was interrupted, and is now {_shown(new)}", key=key, fix=fix)


def _reordered(before: Mapping[str, Any], now: Mapping[str, Any], processes: int) -> Iterator[Problem]:
    """The rows of a step would be others, as there are more or fewer of them, or other packs."""
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    old, new = (
        (count, *(config["training"][key] for key in keys))
        for count, config in ((before.get("processes", 1), before["config"]), (processes, now))
    )
    taken = [f"{math.prod(one)} ({_processes(one[0])} x {one[1]} x {one[2]})" for one in (old, new)]
    if math.prod(old) != math.prod(new):
        what = f"a step took {taken[0]} rows when the run was interrupted, and would now take {taken[1]}"
        fix = f"start {_processes(old[0])}, or change it with --allow-change so that the product stays"
        if old[0] == new[0]:
            fix = "change it back, or the other one as well, so that the product stays"
        yield Problem(what, key=f"training.{keys[0] if old[1] != new[1] else keys[1]}", fix=fix)
    elif old[1] != new[1] and now["data"]["packing"] == "full":
        what, fix = f"was {old[1]} when the run was interrupted, and packs are made for it", "change it back"
        yield Problem(what, key=f"training.{keys[0]}", fix=fix)


def _respread(before: Mapping[str, Any]) -> Iterator[Problem]:
    """DeepSpeed keeps the optimizer in a file for each process; all else is kept whole."""
    old = (before.get("sharding", ""), before.get("processes", 1))
    new = (launcher.sharding(), launcher.world_size())
    if old != new and "deepspeed" in (old[0], new[0]):
        told = [f"{_processes(count)} with {how or 'no sharding'}" for how, count in (old, new)]
        what = f"the run was one of {told[0]}, and is now one of {told[1]}"
        yield Problem(what, fix="start it as it was; checkpoints of DeepSpeed are read by as many processes only")


def _moved(before: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str]) -> Iterator[Problem]:
    """What the config names, and is no longer what it was."""
    old, new = before["fingerprints"], now["fingerprints"]
    since, fix = "since the run was interrupted", "put them back, or start afresh with --overwrite"
    if old["data"] != new["data"]:
        counts = [f"{run['rows']['rows']:,} rows with {run['rows']['tokens']:,} tokens" for run in (before, now)]
        told = f" ({counts[0]}, now {counts[1]})" if counts[0] != counts[1] else ""
        yield Problem(f"the training rows have changed {since}{told}", key="data.train", fix=fix)
    if old["validation"] != new["validation"] and "data.validation" not in allowed:
        fix = "put them back, or take them on with --allow-change data.validation"
        yield Problem(f"the validation rows have changed {since}", key="data.validation", fix=fix)
    if old["base"] != new["base"]:
        fix = "put it back, or start afresh with --overwrite"
        yield Problem(f"the base model has changed {since}", key="model.name_or_path", fix=fix)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key, old and new value of all that differs."""
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{prefix}{key}.")
        elif old != new and f"{prefix}{key}" not in _PLACES:
            yield f"{prefix}{key}", old, new


def _processes(number: int) -> str:
    return f"{number} process" if number == 1 else f"{number} processes"


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
