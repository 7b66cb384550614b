"""What loratune.json says of a run, read as far as it can be read: it may be of an earlier release, or a stranger's."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

_LARGEST = 1e100
"""A figure beyond it is none, and charts cannot show it."""
_MOST_SPLITS = 8
_DEEPEST = 4
"""Groups within groups of figures."""

Count = Annotated[int, Field(ge=0, le=10**15)]
Figure = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST, allow_inf_nan=False)]


@dataclass(frozen=True)
class CurvePoint:
    """One report of the trainer: its step, and its numbers by their names."""

    step: Count
    values: dict[str, float]

    @classmethod
    def read(cls, entry: Any) -> "CurvePoint | None":
        """A report as it is recorded; None if it is none, or has no number but its step."""
        own = _part(entry, dict[str, Any], {})
        step, values = _part(own.pop("step", None), Count), dict(_numbers(own))
        return cls(step, values) if step is not None and values else None


@dataclass(frozen=True)
class RecordedGain:
    """How base and adapter compared at the end of the run; see `training.gain.Gain`."""

    split: str
    rows: Count
    total: Count
    base: Figure
    adapter: Figure
    better_by: Figure
    low: Figure | None
    high: Figure | None
    verdict: Literal["gain", "no gain", "worse", "not judged"]
    unit: Literal["token", "pair", "answer"] = "token"
    other: Literal["base", "start"] = "base"


@dataclass(frozen=True)
class RecordedSplit:
    """What became of the rows of a split; see `data.report.Report.record`."""

    rows: Count
    duplicates: Count
    dropped: Count
    truncated: Count
    tokens: Count
    supervised: Count
    longest: Count
    reasons: dict[str, Count] = field(default_factory=dict)
    lengths: dict[Count, Count] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """A run as its record has it. What is not recorded, or is not what it should be, is empty or None.

    Attributes:
        curve: The reports of the trainer.
        metrics: Every number of the result by its name; those of a group within it as `group name`.
        intervals: `held_out_interval`, `test interval` → low and high end of the 95 % interval.
        gain: How base and adapter compared.
        splits: Split → what became of its rows.
        machine: What the run was computed on.
        peak_memory: `process`, `gpu` → bytes.
        versions: Package → version.
        fingerprints: Of the base and the rows.
        seed: The seed.
        processes: How many processes the run had.
        changes: Settings that were changed when it was resumed, a line each.
    """

    curve: list[CurvePoint]
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    gain: RecordedGain | None
    splits: dict[str, RecordedSplit]
    machine: dict[str, str]
    peak_memory: dict[str, int]
    versions: dict[str, str]
    fingerprints: dict[str, str]
    seed: int | None
    processes: int | None
    changes: list[str]

    @property
    def unit(self) -> str:
        """What the loss is a mean over: `token`, `pair` or `answer`."""
        return self.gain.unit if self.gain is not None else "token"

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one figure of the curve, in the order of the steps."""
        points = sorted(
            (point.step, point.values[name]) for point in self.curve if name in point.values
        )  # fmt: skip
        return [step for step, _ in points], [value for _, value in points]


_Plain = str | int | float | bool | None
_Setting = _Plain | list[_Plain] | dict[str, _Plain | list[_Plain]]
_Splits = Annotated[dict[str, RecordedSplit], Field(max_length=_MOST_SPLITS)]


def read(record: Mapping[str, Any]) -> RunRecord:
    """Read a record. Never raises: of what is wrong, nothing is known."""
    metrics = _part(record.get("metrics"), dict[str, Any], {})
    machine = _part(record.get("machine"), dict[str, Any], {})
    changes = _part(record.get("changes"), list[dict[str, _Setting]], [])
    texts = {name: str(value) for name, value in machine.items() if isinstance(value, str | int)}
    fingerprints = _part(record.get("fingerprints"), dict[str, str | None], {})
    own = {name: value for name, value in metrics.items() if name != "gain"}
    return RunRecord(
        curve=[point for entry in _part(record.get("curve"), list[Any], []) if (point := CurvePoint.read(entry))],
        metrics=dict(_numbers(own)),
        intervals=dict(_intervals(own)),
        gain=_part(metrics.get("gain"), RecordedGain),
        splits=_part(record.get("splits"), _Splits, {}),
        machine=texts,
        peak_memory=_part(machine.get("peak_memory"), dict[str, Count], {}),
        versions=_part(record.get("versions"), dict[str, str], {}),
        fingerprints={name: value for name, value in fingerprints.items() if value},
        seed=_part(record.get("seed"), Count),
        processes=_part(record.get("processes"), Count),
        changes=[
            f"{change['key']} was {change['was']} up to step {change['step']}, then {change['is']}"
            for change in changes
            if {"key", "was", "step", "is"} <= change.keys()
        ],
    )


def _part(value: Any, kind: Any, default: Any = None) -> Any:
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError:
        return default


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)  # which takes longer than to validate a value


def _numbers(values: Mapping[str, Any], prefix: str = "", depth: int = 1) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and depth < _DEEPEST:
            yield from _numbers(value, f"{prefix}{name} ", depth + 1)
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST:
            yield f"{prefix}{name}", value


def _intervals(
    values: Mapping[str, Any], prefix: str = "", depth: int = 1
) -> Iterator[tuple[str, tuple[float, float]]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and depth < _DEEPEST:
            yield from _intervals(value, f"{prefix}{name} ", depth + 1)
        elif name.endswith("interval") and (ends := _part(value, tuple[Figure, Figure])):
            yield f"{prefix}{name}", ends
