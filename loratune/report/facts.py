"""The facts about a run that a report shows as tiles and tables, read from its loratune.json.

Invalid values, in files of earlier releases or of other programs, are left out.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from loratune.compare.behavior import Sample
from loratune.compare.losses import GainVerdict, Model, gain_verdict
from loratune.compare.verdict import GOOD, Name
from loratune.statistics import Interval
from loratune.text import format_duration, format_size

_LARGEST, _LARGEST_COUNT = 1e100, 10**15
"""Charts cannot show numbers beyond these."""
_MOST_SPLITS = 8
_DEEPEST = 4
"""Groups of metrics within groups."""

_Count = Annotated[int, Field(ge=0, le=_LARGEST_COUNT)]
_Nats = Annotated[float, Field(strict=True, ge=0, le=_LARGEST, allow_inf_nan=False)]
_Plain = str | int | float | bool | None
_Setting = _Plain | list[_Plain] | dict[str, _Plain | list[_Plain]]
NOT_RECORDED = "not recorded"
_RESULTS = {
    "first_loss": "loss of the first step",
    "last_loss": "loss of the last step",
    "held_out_loss": "held-out loss",
    "steps": "steps",
    "tokens": "tokens read",
    "seconds": "time",
    "tokens_per_second": "tokens a second",
}
_OF_SELECTION = {
    "kept_step": "step that is kept",
    "best_held_out_loss": "lowest held-out loss",
    "last_held_out_loss": "held-out loss of the last step",
    "test distinct": "distinct test rows",
}
"""Labels of the metrics of a run with validation or test rows."""
_OTHER_TEXT = {"unrelated_text": "loss on unrelated text", "forgetting": "loss on rows of the earlier run"}
"""Labels of losses on other rows than the training rows, before and after."""
_FINGERPRINTS = {
    "base": "base",
    "data": "training rows",
    "validation": "validation rows",
    "test": "test rows",
    "template": "chat template",
    "start": "adapter it started from",
}
_PREFERENCES = "preferences "
"""The start of the names of the metrics of preferences."""
_CHANGES = "changed on the way"
_SPLITS = {"test": "test", "validation": "validation", "held-out": "validation"}
"""A word in the name of a fact → the split without which a run does not have it."""
_OPTIONAL = (_CHANGES, _FINGERPRINTS["template"], _FINGERPRINTS["start"])
_MACHINE = ("processor", "device", "threads", "platform", "python")
_MEMORY = {"process": "peak memory of the process", "gpu": "peak memory of the GPU"}
_EXPECTED = {
    "Result": [*_RESULTS.values()], "Adapter": [], "Run": ["seed", "processes"],
    "Machine": [*_MACHINE, _MEMORY["process"]], "Versions": ["loratune", "torch", "transformers"],
    "Fingerprints": ["base", "training rows"],
}  # fmt: skip
"""The tables, and the names that every run should have."""


@dataclass(frozen=True)
class RecordedSplit:
    """The row counts of a split: used, dropped, truncated, and the blocks of rows that were split."""

    rows: _Count
    duplicates: _Count
    dropped: _Count
    truncated: _Count
    tokens: _Count
    supervised: _Count
    longest: _Count
    blocks: _Count = 0
    reasons: dict[str, _Count] = field(default_factory=dict)
    lengths: dict[_Count, _Count] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordedGain:
    """The losses of base and adapter on the same rows, see `outputs.Gain`."""

    split: str
    rows: int
    total: int
    base: float
    adapter: float
    better_by: float
    low: float | None
    high: float | None
    unit: str = "token"
    other: Model = "base"

    @property
    def verdict(self) -> GainVerdict:
        """The verdict by the losses alone, as releases without answers gave it."""
        interval = None if self.low is None or self.high is None else Interval(self.low, self.high)
        return gain_verdict(self.adapter, self.better_by, interval)


@dataclass(frozen=True)
class RecordedBehavior:
    """How the base's own answers have changed, see `compare.behavior`."""

    texts: Annotated[int, Field(ge=1, le=_LARGEST_COUNT)]
    divergence: _Nats
    agreement: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
    median_divergence: _Nats | None = None
    median_divergence_interval: tuple[_Nats, _Nats] | None = None
    samples: Annotated[list[Sample], Field(max_length=_MOST_SPLITS)] = field(default_factory=list)


class RunRecord(BaseModel):
    """A run. Values that are missing or invalid are empty or None.

    Attributes:
        curve: The reports of the trainer: their `step` and other numbers.
        metrics: Every number of the result by its name; the numbers of a group are named `group name`.
        intervals: `held_out_interval`, `test interval` → the ends of the 95 % interval.
        verdict: The verdict on the adapter.
        gain: How base and adapter compared.
        behavior: How the base's own answers have changed.
        splits: Split → its row counts.
        machine: The machine of the run.
        peak_memory: `process`, `gpu` → bytes.
        versions: Package → version.
        fingerprints: Of the base and the rows.
        seed: The seed.
        processes: The number of processes of the run.
        changes: Settings that were changed when it was resumed: `key`, `was`, `step` and `is`.
    """

    model_config = ConfigDict(frozen=True)

    curve: list[dict[str, int | float]] = []
    metrics: dict[str, int | float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    verdict: Name | None = None
    gain: RecordedGain | None = None
    behavior: RecordedBehavior | None = None
    splits: Annotated[dict[str, RecordedSplit], Field(max_length=_MOST_SPLITS)] = {}
    machine: dict[str, str] = {}
    peak_memory: dict[str, _Count] = {}
    versions: dict[str, str] = {}
    fingerprints: dict[str, str | None] = {}
    seed: _Count | None = None
    processes: _Count | None = None
    changes: list[dict[str, _Setting]] = []

    @field_validator("*", mode="wrap")
    @classmethod
    def _or_default(cls, value: Any, handler: Any, info: Any) -> Any:
        try:
            return handler(value)
        except ValidationError:
            return cls.model_fields[info.field_name].get_default()

    @property
    def unit(self) -> str:
        """What the loss is a mean over: `token`, `pair` or `answer`."""
        return self.gain.unit if self.gain is not None else "token"

    @property
    def item(self) -> str:
        """What the rows are, in the singular."""
        return "row" if self.unit == "token" else self.unit

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of one metric of the curve, in the order of the steps."""
        points = sorted((point["step"], point[name]) for point in self.curve if name in point)
        return [step for step, _ in points], [value for _, value in points]


def read(record: Mapping[str, Any]) -> RunRecord:
    """Read a record. Never raises: see `RunRecord`."""
    metrics, machine = (value if isinstance(value := record.get(key), dict) else {} for key in ("metrics", "machine"))
    curve = record.get("curve")
    leaves = dict(
        _leaves({name: value for name, value in metrics.items() if name not in ("verdict", "gain", "behavior")})
    )
    pairs = {name: value for name, value in leaves.items() if isinstance(value, list) and len(value) == 2}
    parts = {
        "curve": [point for entry in curve if (point := _point(entry))] if isinstance(curve, list) else [],
        "metrics": {name: value for name, value in leaves.items() if _is_number(value)},
        "intervals": {
            name: value for name, value in pairs.items() if name.endswith("interval") and all(map(_is_number, value))
        },
        "verdict": metrics.get("verdict"),
        "gain": metrics.get("gain"),
        "behavior": metrics.get("behavior"),
        "machine": {name: str(value) for name, value in machine.items() if isinstance(value, str | int)},
        "peak_memory": machine.get("peak_memory"),
    }
    return RunRecord.model_validate({**record, **parts})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _point(entry: Any) -> dict[str, int | float] | None:
    """The numbers of a report of the trainer; None if it has no valid step, or nothing but that."""
    numbers = {name: value for name, value in entry.items() if _is_number(value)} if isinstance(entry, dict) else {}
    step = numbers.get("step")
    return numbers if isinstance(step, int) and 0 <= step <= _LARGEST_COUNT and len(numbers) > 1 else None


def _leaves(values: Mapping[str, Any], prefix: str = "", depth: int = 1) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and depth < _DEEPEST:
            yield from _leaves(value, f"{prefix}{name} ", depth + 1)
        else:
            yield f"{prefix}{name}", value


@dataclass(frozen=True)
class Tile:
    """A number at the top of the page. tone: its meaning as a colour; the text says it too."""

    label: str
    value: str
    note: str = ""
    tone: Literal["", "good", "bad", "absent"] = ""


def tiles(record: RunRecord, adapter: Mapping[str, str], *, keeps_last: bool = False) -> list[Tile]:
    """The most important numbers of a run.

    Args:
        record: The run.
        adapter: What the adapter's files say, by name.
        keeps_last: Whether the weights of the last step were kept, whatever their held-out loss.
    """
    metrics, memory = record.metrics, record.peak_memory
    found = [_gain(record), _held_out(record, keeps_last)]
    if "test loss" in metrics:
        note = f"{_interval(record, 'test interval')}on {metrics.get('test rows', 0):,.0f} test {record.item}s"
        found.append(Tile(f"test loss{_per(record)}", f"{metrics['test loss']:.4f}", note))
    losses = [f"{metrics[name]:.4f}" for name in ("first_loss", "last_loss") if name in metrics]
    found.append(_tile("training loss", " → ".join(losses) if len(losses) == 2 else None, "first and last step"))
    tokens, note = None, ""
    if {"tokens", "steps", "seconds"} <= metrics.keys():
        rate = f", {metrics['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in metrics else ""
        tokens, note = f"{metrics['tokens']:,.0f}", f"{metrics['steps']:,.0f} steps in "
        note += f"{format_duration(metrics['seconds'])}{rate}"
    found.append(_tile("tokens read", tokens, note))
    note = f"{format_size(memory['gpu'])} on the GPU" if "gpu" in memory else "of the process"
    found.append(_tile("peak memory", format_size(memory["process"]) if "process" in memory else None, note))
    if (accuracy := metrics.get("preferences reward_accuracy value")) is not None:
        margin = metrics.get("preferences reward_margin value")
        note = _interval(record, "preferences reward_accuracy interval")
        note += "" if margin is None else f"margin {margin:.3f}"
        found.append(Tile("reward accuracy", f"{accuracy:.3f}", note.removesuffix(", ")))
    elif "test loss" not in metrics:  # that tile fills the line; the table below has the size in any case
        found.append(Tile("adapter file", adapter["size"], f"rank {adapter['rank']}"))
    return found


def _tile(label: str, value: str | None, note: str = "") -> Tile:
    return Tile(label, NOT_RECORDED, "", "absent") if value is None else Tile(label, value, note)


def _gain(record: RunRecord) -> Tile:
    gain = record.gain
    if gain is None:
        return _tile("gain over the base", None)
    interval = "" if gain.low is None or gain.high is None else f"95 % {gain.low:.3f} to {gain.high:.3f} "
    verdict = f"{record.verdict}; " if record.verdict else "" if gain.verdict == "gain" else f"{gain.verdict}: "
    note = f"{verdict}{interval}on {gain.rows:,} of {gain.total:,} {gain.split} {record.item}s"
    is_good = record.verdict in GOOD if record.verdict else gain.verdict == "gain"
    tone: Literal["", "good", "bad"] = "good" if is_good else "bad" if gain.verdict == "worse" else ""
    return Tile(f"gain{_per(record) or ', nats a token'}", f"{gain.better_by:+.3f}", note, tone)


def _held_out(record: RunRecord, keeps_last: bool) -> Tile:
    """The held-out loss of the weights that became the adapter, and whether they were selected by it."""
    metrics = record.metrics
    if "held_out_loss" not in metrics:
        return Tile("held-out loss", _missing(record, "held-out loss") or NOT_RECORDED, "", "absent")
    steps, losses = record.series("eval_loss")
    lowest = min(zip(losses, steps, strict=True), default=None)
    note = f"lowest {lowest[0]:.4f} at step {lowest[1]:,}" if lowest else ""
    if "kept_step" in metrics:
        note = f"kept at step {metrics['kept_step']:,.0f}"
        if metrics.get("evaluations", 0) > 1 and not keeps_last:
            note += f": lowest of {metrics['evaluations']:,.0f}, so optimistic"
    value, interval = f"{metrics['held_out_loss']:.4f}", _interval(record, "held_out_interval")
    return Tile(f"held-out loss{_per(record)}", value, interval + note)


def _per(record: RunRecord) -> str:
    """`, a pair` after the name of a loss that is a mean over pairs; empty for one over tokens."""
    return "" if record.unit == "token" else f", a{'n' if record.unit == 'answer' else ''} {record.unit}"


def _interval(record: RunRecord, name: str) -> str:
    """`95 % 4.9133 to 4.9236, `, or nothing."""
    ends = record.intervals.get(name)
    return f"95 % {ends[0]:.4f} to {ends[1]:.4f}, " if ends else ""


def _missing(record: RunRecord, name: str) -> str | None:
    """The text for a fact that a record lacks: `none` if the run had nothing of the kind; None if it is unknown."""
    without = any(word in name and split not in record.splits for word, split in _SPLITS.items())
    return "none" if record.splits and (without or name in _OPTIONAL) else None


def tables(
    records: Sequence[RunRecord], adapters: Sequence[Mapping[str, str]]
) -> dict[str, dict[str, list[str | None]]]:
    """Table → name → the value of each adapter, None where that is not known. Everything that is recorded."""
    facts = [_facts(*one) for one in zip(records, adapters, strict=True)]
    return {
        title: {
            name: [own[title].get(name, _missing(record, name)) for own, record in zip(facts, records, strict=True)]
            for name in dict.fromkeys([*expected, *(name for own in facts for name in own[title])])
        }
        for title, expected in _EXPECTED.items()
    }


def _facts(record: RunRecord, adapter: Mapping[str, str]) -> dict[str, Mapping[str, str]]:
    numbers = {"seed": record.seed, "processes": record.processes}
    run = {name: f"{value:,}" for name, value in numbers.items() if value is not None}
    changed = [one for one in record.changes if {"key", "was", "step", "is"} <= one.keys()]
    if changed:
        lines = [f"{one['key']} was {one['was']} up to step {one['step']}, then {one['is']}" for one in changed]
        run[_CHANGES] = "; ".join(lines)
    machine = {name: record.machine[name] for name in _MACHINE if name in record.machine}
    return {
        "Result": _results(record),
        "Adapter": adapter,
        "Run": run,
        "Machine": machine
        | {_MEMORY[name]: format_size(one) for name, one in record.peak_memory.items() if name in _MEMORY},
        "Versions": record.versions,
        "Fingerprints": {_FINGERPRINTS.get(name, name): one for name, one in record.fingerprints.items() if one},
    }


def _results(record: RunRecord) -> dict[str, str]:
    """The metrics of a run; metrics of other releases keep their own names."""
    results = {}
    if (gain := record.gain) is not None:
        rows = f"{gain.rows:,} of {gain.total:,} {gain.split} {record.item}s"
        other = "base" if gain.other == "base" else "adapter it started from"
        results[f"loss of the {other}"] = f"{gain.base:.4f}, on {rows}"
        results["loss of the adapter"] = f"{gain.adapter:.4f}, on the same rows"
    for group, label in _OTHER_TEXT.items():
        values = [record.metrics.get(f"{group} {name}", math.nan) for name in ("before", "after", "change")]
        if all(map(math.isfinite, values)):
            results[label] = "{:.4f} → {:.4f} ({:+.4f})".format(*values)
    if (changed := record.behavior) is not None:
        if (middle := changed.median_divergence) is not None:
            ends = changed.median_divergence_interval
            interval = " (95 % interval {:.4f} to {:.4f})".format(*ends) if ends else ""
            results["median KL to the base on its own answers"] = f"{middle:.4f}{interval}"
        results["mean KL to the base on its own answers"] = f"{changed.divergence:.4f}"
        results["same next token as the base"] = f"{changed.agreement:.1%}, in answers to {changed.texts} instructions"
    for name, value in record.metrics.items():
        if name.startswith(_PREFERENCES):
            results[_preference_label(name)] = _with_interval(record, name, value)
        elif name.partition(" ")[0] not in _OTHER_TEXT:
            label = (_RESULTS | _OF_SELECTION).get(name, name.replace("_", " "))
            results[label] = format_duration(value) if name == "seconds" else _number(name, value)
    return results


def _preference_label(name: str) -> str:
    """`reward accuracy`; of `preferences chosen log_probability_before`, `chosen answers: log-probability before`."""
    words = name.removeprefix(_PREFERENCES).removesuffix(" value").replace("log_probability", "log-probability")
    side, of_side, metric = words.partition(" ")
    text = (f"{side} answers: {metric}" if metric != "answers" else f"{side} answers") if of_side else words
    return text.replace("_", " ")


def _with_interval(record: RunRecord, name: str, value: float) -> str:
    own = f"{name.removesuffix('value')}interval" if name.endswith(" value") else f"{name}_interval"
    interval = _interval(record, own).removesuffix(", ")
    return _number(name, value) + (f" ({interval})" if interval else "")


def _number(name: str, value: float) -> str:
    if isinstance(value, int) and name != "tokens_per_second":
        return f"{value:,}"
    return f"{value:,.1f}" if name == "tokens_per_second" or abs(value) >= 1e4 else f"{value:,.4f}"


def differing(settings: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """The keys that have different values in two configs → these values."""
    if len(settings) < 2 or not all(settings):
        return {}
    keys = dict.fromkeys(key for one in settings for key in one)
    sections = {key[:end] for key in keys for end, character in enumerate(key) if character == "."}
    shown = [key for key in keys if key not in sections and key != "output_dir"]
    values = {key: [_setting(one, key) for one in settings] for key in shown}
    return {key: both for key, both in values.items() if len({*both}) > 1}


def _setting(settings: Mapping[str, str], key: str) -> str:
    """The value of a key, or of the nearest section that has one, as `null`; `-` without either."""
    while key and key not in settings:
        key = key.rpartition(".")[0]
    return settings.get(key, "-")
