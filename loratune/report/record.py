"""A run as its loratune.json records it. Of a file of an earlier release, or a stranger's, whatever is invalid is left
out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

_LARGEST, _LARGEST_COUNT = 1e100, 10**15
"""Charts cannot show numbers beyond these."""
_MOST_SPLITS = 8
_DEEPEST = 4
"""Groups of metrics within groups."""

_Count = Annotated[int, Field(ge=0, le=_LARGEST_COUNT)]
_Metric = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST, allow_inf_nan=False)]
_Plain = str | int | float | bool | None
_Setting = _Plain | list[_Plain] | dict[str, _Plain | list[_Plain]]


@dataclass(frozen=True)
class RecordedGain:
    """How base and adapter compared at the end of the run."""

    split: str
    rows: _Count
    total: _Count
    base: _Metric
    adapter: _Metric
    better_by: _Metric
    low: _Metric | None
    high: _Metric | None
    verdict: Literal["gain", "no gain", "worse", "not judged"]
    unit: Literal["token", "pair", "answer"] = "token"
    other: Literal["base", "start"] = "base"


@dataclass(frozen=True)
class RecordedSplit:
    """What became of the rows of a split."""

    rows: _Count
    duplicates: _Count
    dropped: _Count
    truncated: _Count
    tokens: _Count
    supervised: _Count
    longest: _Count
    reasons: dict[str, _Count] = field(default_factory=dict)
    lengths: dict[_Count, _Count] = field(default_factory=dict)


class RunRecord(BaseModel):
    """A run. What is not recorded, or invalid, is empty or None.

    Attributes:
        curve: The reports of the trainer: their `step` and other numbers.
        metrics: Every number of the result by its name; those of a group within it as `group name`.
        intervals: `held_out_interval`, `test interval` → the ends of the 95 % interval.
        gain: How base and adapter compared.
        splits: Split → what became of its rows.
        machine: What the run was computed on.
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
    gain: RecordedGain | None = None
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
    leaves = dict(_leaves({name: value for name, value in metrics.items() if name != "gain"}))
    pairs = {name: value for name, value in leaves.items() if isinstance(value, list) and len(value) == 2}
    parts = {
        "curve": [point for entry in curve if (point := _point(entry))] if isinstance(curve, list) else [],
        "metrics": {name: value for name, value in leaves.items() if _is_number(value)},
        "intervals": {
            name: value for name, value in pairs.items() if name.endswith("interval") and all(map(_is_number, value))
        },
        "gain": metrics.get("gain"),
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
