"""Results on stdout, as people or programs read them."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from loratune.console import block, duration, marked, note, size, table
from loratune.targets import pattern

if TYPE_CHECKING:
    from loratune.data import Report
    from loratune.evaluate import Score
    from loratune.params import Params
    from loratune.train import Plan, Result


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def plan(made: "Plan") -> None:
    """What `train --dry-run` shows."""
    lines = []
    for place, roles in made.targets.places().items():
        count = sum(pattern(path) == place for path in made.targets.modules)
        along = made.targets.along().get(place)
        fused = f", fused: {', '.join(along)} comes along" if along else ", fused" if along is not None else ""
        lines.append((", ".join(roles), f"{place} x {count}{fused}"))
    block("targets", lines)
    print(made.count)
    block("train", _report_lines(made.train.report))
    if made.validation:
        block("validation", _report_lines(made.validation.report))
    for line in made.notes:
        note(line)
    print("first row, with what is learnt marked")
    marked(made.rendered())
    print(f"expected memory: about {size(made.memory.total)}; adapter file: {size(made.count.adapter_bytes)}")


def _report_lines(report: "Report") -> list[tuple[str, str]]:
    lines = [
        ("rows", f"{report.rows:,}"),
        ("tokens", f"{report.tokens:,}, the longest row {report.longest:,}"),
        ("supervised", f"{report.supervised:,} tokens"),
        ("truncated", f"{report.truncated:,} rows"),
        ("dropped", f"{report.dropped_rows:,} rows"),
    ]
    return lines + [("", f"{count:,}: {reason}") for count, reason in report.reasons()]


def result(made: "Result", program: str) -> None:
    """The block at the end of a run. program: what to type for this program."""
    outcome = made.outcome
    lines = [
        ("adapter", str(made.directory)),
        ("size", size(made.adapter_bytes)),
        ("trained", f"{outcome.tokens:,} tokens in {outcome.steps:,} steps, {duration(outcome.seconds)}"),
        ("loss", f"{outcome.first_loss:.4f} → {outcome.last_loss:.4f}"),
    ]
    if outcome.held_out_loss is not None:
        lines.append(("held-out", f"{outcome.held_out_loss:.4f}"))
    lines.append(("try it", f"{program} generate --adapter {made.shown} {made.try_it}"))
    block("done", lines)


def params(counted: "Params", as_json: bool) -> None:
    """Counts, and a table of the modules."""
    for line in counted.notes:
        note(line)
    if as_json:
        count = counted.count
        values = {
            "trainable": count.trainable,
            "total": count.total,
            "percent": count.percent,
            "adapter_bytes": count.adapter_bytes,
            "targets": counted.targets,
        }
        print(json.dumps(values, indent=2))
        return
    print(counted.count)
    rows = [
        [group.role, group.pattern, f"{group.modules}", f"{group.shape[0]} → {group.shape[1]}", f"{group.trainable:,}"]
        for group in counted.groups
    ]
    table(["role", "modules", "count", "shape", "trainable"], rows)
    for place, roles in counted.fused.items():
        print(f"  {', '.join(roles)}: {place}, fused")
    print(f"adapter file: {size(counted.count.adapter_bytes)}")


def scores(found: "Mapping[str, Score]", as_json: bool) -> None:
    """Base and adapter, one below the other."""
    if as_json:
        print(json.dumps({name: asdict(score) for name, score in found.items()}, indent=2))
        return
    rows = [
        [name, f"{one.loss:.4f}", f"{one.perplexity:.2f}", _share(one.exact_match), _share(one.label_accuracy)]
        for name, one in found.items()
    ]
    print(f"{found['base'].rows:,} rows, {found['base'].tokens:,} learnt tokens")
    table(["", "loss", "perplexity", "exact match", "label accuracy"], rows)
