"""`loratune params --adapter`: what the files of an adapter directory say, read without the base."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from loratune import escaping
from loratune.console import print_json, print_table
from loratune.lora.module_names import number_of, shortest
from loratune.lora.stats import TABLE_HEADER, AdapterStats, Update, by_pattern, span, table_row
from loratune.text import format_size


def print_stats(path: str, stats: AdapterStats, as_json: bool) -> None:
    """Print the statistics: the adapter as a whole, then each kind of module, then each layer."""
    if as_json:
        print_json(asdict(stats))
        return
    lines = [
        ("adapter", path),
        ("base", stats.base),
        ("rank", span([update.rank for update in stats.updates] or [stats.r], "d") + _scaling(stats)),
        ("size", f"{format_size(stats.adapter_bytes)}, {stats.parameters:,} numbers"),
    ]
    experts, unchanged = (sum(getattr(one, key) for one in stats.updates) for key in ("experts", "unchanged"))
    if any(update.experts > 1 for update in stats.updates) and unchanged:
        lines.append(("unchanged", f"{unchanged:,} of {experts:,} modules and experts have an update of zero"))
    lines += [("also", f"{name}: {count:,} numbers") for name, count in stats.others.items()]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(escaping.line(f"{name:<{width}}  {value}"))
    groups = by_pattern(stats.updates)
    print_table(TABLE_HEADER, [[kind, *table_row(group)] for kind, group in groups.items()])
    _print_layers(groups)


def _scaling(stats: AdapterStats) -> str:
    """`, lora_alpha 16, rsLoRA, scaling 2`."""
    scalings = span([update.scaling for update in stats.updates], ".4g") if stats.updates else ""
    variants = [name for name, used in (("rsLoRA", stats.rslora), ("DoRA", stats.dora)) if used]
    return ", ".join([f", lora_alpha {stats.lora_alpha:g}", *variants, *([f"scaling {scalings}"] if scalings else [])])


def _print_layers(groups: Mapping[str, Sequence[Update]]) -> None:
    """One row per layer: the norm of ΔW, and the effective rank in brackets."""
    cells = {
        (number_of(update.module), module_pattern): f"{update.norm:.3g} ({update.effective_rank:.1f})"
        for module_pattern, group in groups.items()
        for update in group
    }
    layers = sorted({number for number, _ in cells if number is not None})
    rows = [[f"{number}", *(cells.get((number, name), "-") for name in groups)] for number in layers]
    if rows:
        print("norm of ΔW (effective rank) by layer")
        print_table(["layer", *shortest([*groups])], rows)
