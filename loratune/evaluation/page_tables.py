"""What a run recorded, as the tiles and tables of a report's page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from loratune.console import format_duration, format_size
from loratune.evaluation.run_record import RecordedSplit, RunRecord

Tone = Literal["", "good", "bad", "absent"]
NOT_RECORDED, NONE = "not recorded", "none"

_RESULTS = {
    "first_loss": "loss of the first step",
    "last_loss": "loss of the last step",
    "held_out_loss": "held-out loss",
    "steps": "steps",
    "tokens": "tokens read",
    "seconds": "time",
    "tokens_per_second": "tokens a second",
}
_SELECTED = {
    "kept_step": "step that is kept",
    "best_held_out_loss": "lowest held-out loss",
    "last_held_out_loss": "held-out loss of the last step",
    "test distinct": "distinct test rows",
}
"""Of a run with validation or test rows."""
_ELSEWHERE = {"unrelated_text": "loss on unrelated text", "forgetting": "loss on rows of the earlier run"}
"""What was measured on rows that were not trained on, before and after."""
_FINGERPRINTS = {
    "base": "base",
    "data": "training rows",
    "validation": "validation rows",
    "test": "test rows",
    "template": "chat template",
    "start": "adapter it began with",
}
_PREFERENCES = "preferences "
"""What the names of figures of compared answers begin with."""
_CHANGES = "changed on the way"
_OF_SPLIT = {"test": "test", "validation": "validation", "held-out": "validation"}
"""A word in the name of a figure → the split without whose rows a run has none."""
_OPTIONAL = (_CHANGES, _FINGERPRINTS["template"], _FINGERPRINTS["start"])
"""Names of what not every run has."""
_MACHINE = ("processor", "device", "threads", "platform", "python")
_MEMORY = {"process": "peak memory of the process", "gpu": "peak memory of the GPU"}
_TONES: dict[str, Tone] = {"gain": "good", "worse": "bad"}


@dataclass(frozen=True)
class Tile:
    """A figure at the top of the page. tone: what it means, which the text says as well."""

    label: str
    value: str
    note: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class FactTable:
    """Facts of one kind. rows: a name, and a value for each adapter, None where that is not known."""

    title: str
    rows: list[tuple[str, list[str | None]]]


def tiles(record: RunRecord, adapter: Mapping[str, str], *, keeps_last: bool = False) -> list[Tile]:
    """The most important figures of a run. keeps_last: whether the last step was kept without a choice."""
    metrics = record.metrics
    found = [_gain(record), _held_out(record, keeps_last)]
    if "test loss" in metrics:
        note = f"{_interval(record, 'test interval')}on {metrics.get('test rows', 0):,.0f} test {_item(record)}s"
        found.append(Tile(f"test loss{_per(record)}", f"{metrics['test loss']:.4f}", note))
    if {"first_loss", "last_loss"} <= metrics.keys():
        value = f"{metrics['first_loss']:.4f} → {metrics['last_loss']:.4f}"
        found.append(Tile("training loss", value, "first and last step"))
    else:
        found.append(_absent("training loss"))
    if {"tokens", "steps", "seconds"} <= metrics.keys():
        rate = f", {metrics['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in metrics else ""
        note = f"{metrics['steps']:,.0f} steps in {format_duration(metrics['seconds'])}{rate}"
        found.append(Tile("tokens read", f"{metrics['tokens']:,.0f}", note))
    else:
        found.append(_absent("tokens read"))
    if "process" in record.peak_memory:
        note = f"{_size(record.peak_memory['gpu'])} on the GPU" if "gpu" in record.peak_memory else "of the process"
        found.append(Tile("peak memory", _size(record.peak_memory["process"]), note))
    else:
        found.append(_absent("peak memory"))
    if (accuracy := metrics.get("preferences reward_accuracy value")) is not None:
        margin = metrics.get("preferences reward_margin value")
        note = _interval(record, "preferences reward_accuracy interval")
        note += "" if margin is None else f"margin {margin:.3f}"
        found.append(Tile("reward accuracy", f"{accuracy:.3f}", note.removesuffix(", ")))
    elif "test loss" not in metrics:  # which fills the row; the table below has the size in any case
        found.append(Tile("adapter file", adapter["size"], f"rank {adapter['rank']}"))
    return found


def _gain(record: RunRecord) -> Tile:
    gain = record.gain
    if gain is None:
        return _absent("gain over the base")
    interval = "" if gain.low is None or gain.high is None else f"95 % {gain.low:.3f} to {gain.high:.3f} "
    verdict = "" if gain.verdict == "gain" else f"{gain.verdict}: "
    note = f"{verdict}{interval}on {gain.rows:,} of {gain.total:,} {gain.split} {_item(record)}s"
    return Tile(f"gain{_per(record) or ', nats a token'}", f"{gain.better_by:+.3f}", note, _TONES.get(gain.verdict, ""))


def _held_out(record: RunRecord, keeps_last: bool) -> Tile:
    """The held-out loss of the weights that became the adapter, and whether they were selected by it."""
    metrics, steps = record.metrics, record.series("eval_loss")
    if "held_out_loss" not in metrics:
        return _absent("held-out loss", _unrecorded(record, "held-out loss"))
    lowest = min(zip(steps[1], steps[0], strict=True), default=None)
    note = f"lowest {lowest[0]:.4f} at step {lowest[1]:,}" if lowest else ""
    if "kept_step" in metrics:
        note = f"kept at step {metrics['kept_step']:,.0f}"
        if metrics.get("evaluations", 0) > 1 and not keeps_last:
            note += f": lowest of {metrics['evaluations']:,.0f}, so optimistic"
    return Tile(
        f"held-out loss{_per(record)}", f"{metrics['held_out_loss']:.4f}", _interval(record, "held_out_interval") + note
    )


def _item(record: RunRecord) -> str:
    """What the rows of a run are, in the singular."""
    return "row" if record.unit == "token" else record.unit


def _per(record: RunRecord) -> str:
    """`, a pair` behind the name of a loss that is a mean over pairs; empty where it is one over tokens."""
    return "" if record.unit == "token" else f", a{'n' if record.unit == 'answer' else ''} {record.unit}"


def _interval(record: RunRecord, name: str) -> str:
    """`95 % 4.9133 to 4.9236, `; empty where there is none."""
    low, high = record.intervals.get(name, (None, None))
    return "" if low is None else f"95 % {low:.4f} to {high:.4f}, "


def _absent(label: str, value: str | None = None) -> Tile:
    return Tile(label, value or NOT_RECORDED, "", "absent")


def _unrecorded(record: RunRecord, name: str) -> str | None:
    """The value of what a record does not have: `none`, where the run had nothing of the kind; None if not known."""
    without = any(word in name and split not in record.splits for word, split in _OF_SPLIT.items())
    return NONE if record.splits and (without or name in _OPTIONAL) else None


def tables(records: Sequence[RunRecord], adapters: Sequence[Mapping[str, str]]) -> list[FactTable]:
    """Everything that is recorded, with a column for each adapter."""
    seeds = [{"seed": _number(record.seed), "processes": _number(record.processes)} for record in records]
    runs = [{name: value for name, value in one.items() if value is not None} for one in seeds]
    for one, record in zip(runs, records, strict=True):
        one |= {_CHANGES: "; ".join(record.changes)} if record.changes else {}

    def table(title: str, values: Sequence[Mapping[str, str]], expected: Sequence[str] = ()) -> FactTable:
        """A row for each name that any adapter has, and for those that are expected."""
        names = dict.fromkeys([*expected, *(name for one in values for name in one)])
        both = [*zip(records, values, strict=True)]
        return FactTable(
            title, [(name, [one.get(name, _unrecorded(record, name)) for record, one in both]) for name in names]
        )

    return [
        table("Result", [_results(record) for record in records], [*_RESULTS.values()]),
        table("Adapter", adapters),
        table("Run", runs, ["seed", "processes"]),
        table("Machine", [_machine(record) for record in records], [*_MACHINE, *_MEMORY.values()][:-1]),
        table("Versions", [record.versions for record in records], ["loratune", "torch", "transformers"]),
        table("Fingerprints", [_fingerprints(record) for record in records], ["base", "training rows"]),
    ]


def _results(record: RunRecord) -> dict[str, str]:
    """The figures of a run; further ones, which other releases may record, under their own names."""
    results = {}
    if (gain := record.gain) is not None:
        rows = f"{gain.rows:,} of {gain.total:,} {gain.split} {_item(record)}s"
        other = "base" if gain.other == "base" else "adapter it started from"
        results[f"loss of the {other}"] = f"{gain.base:.4f}, on {rows}"
        results["loss of the adapter"] = f"{gain.adapter:.4f}, on the same rows"
    for group, label in _ELSEWHERE.items():
        figures = [record.metrics.get(f"{group} {name}", math.nan) for name in ("before", "after", "change")]
        if all(map(math.isfinite, figures)):
            results[label] = "{:.4f} → {:.4f} ({:+.4f})".format(*figures)
    for name, value in record.metrics.items():
        if name.partition(" ")[0] in _ELSEWHERE:
            continue
        if name.startswith(_PREFERENCES):
            results[_preference_label(name)] = _with_interval(record, name, value)
            continue
        label = (_RESULTS | _SELECTED).get(name, name.replace("_", " "))
        results[label] = (
            format_duration(value) if name == "seconds"
            else f"{value:,.1f}" if name == "tokens_per_second"
            else _figure(value)
        )  # fmt: skip
    return results


def _preference_label(name: str) -> str:
    """`reward accuracy`; of `preferences chosen log_probability_before`, `chosen answers: log-probability before`."""
    words = name.removeprefix(_PREFERENCES).removesuffix(" value").replace("log_probability", "log-probability")
    side, of_side, figure = words.partition(" ")
    text = (f"{side} answers: {figure}" if figure != "answers" else f"{side} answers") if of_side else words
    return text.replace("_", " ")


def _with_interval(record: RunRecord, name: str, value: float) -> str:
    """A figure of compared answers, with its interval if it has one."""
    own = f"{name.removesuffix('value')}interval" if name.endswith(" value") else f"{name}_interval"
    low, high = record.intervals.get(own, (None, None))
    return _figure(value) if low is None or high is None else f"{_figure(value)} (95 % {low:.4f} to {high:.4f})"


def _machine(record: RunRecord) -> dict[str, str]:
    memory = {_MEMORY[name]: _size(size) for name, size in record.peak_memory.items() if name in _MEMORY}
    return {name: record.machine[name] for name in _MACHINE if name in record.machine} | memory


def _fingerprints(record: RunRecord) -> dict[str, str]:
    return {_FINGERPRINTS.get(name, name): value for name, value in record.fingerprints.items()}


def differing(settings: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """The keys of two configs that have different values, and these."""
    if len(settings) < 2 or not all(settings):
        return []
    keys = dict.fromkeys(key for one in settings for key in one)
    sections = {key[:end] for key in keys for end, character in enumerate(key) if character == "."}
    keys_shown = [
        key for key in keys if key not in sections and key != "output_dir"
    ]  # a section is null as its keys are
    values = {key: [one.get(key, _parent(one, key)) for one in settings] for key in keys_shown}
    return [(key, both) for key, both in values.items() if len({*both}) > 1]


def _parent(settings: Mapping[str, str], key: str) -> str:
    """The value of the section that would have a key; `-` where there is none."""
    parts = key.split(".")
    parents = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    return next((settings[parent] for parent in parents if parent in settings), "-")


def split_cells(split: RecordedSplit) -> list[tuple[str, str]]:
    """Counts over the rows of a split, by name."""
    names = ("rows", "duplicates", "dropped", "truncated", "tokens", "supervised", "longest")
    counts = (
        split.rows, split.duplicates, split.dropped, split.truncated, split.tokens, split.supervised, split.longest,
    )  # fmt: skip
    return [(name, f"{count:,}") for name, count in zip(names, counts, strict=True)]


def _number(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if abs(value) < 1e4 else f"{value:,.1f}"


def _size(count: int) -> str:
    """`3.2 GiB`, or `220.1 MB`: without the exact number of bytes."""
    return format_size(count).partition("(")[2].rstrip(")") or format_size(count)
