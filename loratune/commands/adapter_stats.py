"""`loratune params --adapter`: what the files of an adapter directory say, read without the base."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from loratune import escaping
from loratune.console import format_size, print_json, print_table
from loratune.lora.adapter_files import WEIGHTS_FILE, AdapterFiles
from loratune.lora.module_names import number_of, pattern, shape_text, shortest, without_wrappers
from loratune.lora.stats import Update, updates


@dataclass(frozen=True)
class AdapterStats:
    """An adapter as its own files describe it.

    Attributes:
        base: The name or path of the base.
        r: The rank in its configuration.
        lora_alpha: The scaling in its configuration.
        dora: Whether the adapter also changes magnitudes, beyond ΔW.
        rslora: Whether B·A is scaled by lora_alpha over the square root of r.
        parameters: Numbers in the file of weights.
        adapter_bytes: The size of that file.
        targets: The last part of a module's name → patterns of the adapted modules of that name.
        updates: ΔW of each adapted module.
        others: Pattern → numbers in all further tensors: biases, whole modules, trained tokens.
    """

    base: str
    r: int
    lora_alpha: float
    dora: bool
    rslora: bool
    parameters: int
    adapter_bytes: int
    targets: dict[str, list[str]]
    updates: list[Update]
    others: dict[str, int]


def adapter_stats(files: AdapterFiles) -> AdapterStats:
    """Compute the statistics of an adapter. Raises AdapterError: see `lora.stats.updates`."""
    module_updates = updates(files)
    targets: dict[str, list[str]] = {}
    for module_pattern in dict.fromkeys(pattern(update.module) for update in module_updates):
        targets.setdefault(module_pattern.rpartition(".")[2], []).append(module_pattern)
    others: dict[str, int] = {}
    copies = {name: shape for (_, name), shape in files.copies.items()}
    for name, shape in (files.tensors | copies).items():
        if ".lora_" not in name:
            module_pattern = pattern(without_wrappers(name.removeprefix("base_model.model.")))
            others[module_pattern] = others.get(module_pattern, 0) + math.prod(shape)
    return AdapterStats(
        base=files.base,
        r=files.config["r"],
        lora_alpha=files.config["lora_alpha"],
        dora=bool(files.config.get("use_dora")),
        rslora=bool(files.config.get("use_rslora")),
        parameters=sum(math.prod(shape) for shape in (files.tensors | copies).values()),
        adapter_bytes=(files.path / WEIGHTS_FILE).stat().st_size,
        targets=targets,
        updates=module_updates,
        others=others,
    )


def print_stats(path: str, stats: AdapterStats, as_json: bool) -> None:
    """Print the statistics: the adapter as a whole, then each kind of module, then each layer."""
    if as_json:
        print_json(asdict(stats))
        return
    lines = [
        ("adapter", path),
        ("base", stats.base),
        ("rank", _span([update.rank for update in stats.updates] or [stats.r], "d") + _scaling(stats)),
        ("size", f"{format_size(stats.adapter_bytes)}, {stats.parameters:,} numbers"),
    ]
    experts, unchanged = (sum(getattr(one, key) for one in stats.updates) for key in ("experts", "unchanged"))
    if any(update.experts > 1 for update in stats.updates) and unchanged:
        lines.append(("unchanged", f"{unchanged:,} of {experts:,} modules and experts have an update of zero"))
    lines += [("also", f"{name}: {count:,} numbers") for name, count in stats.others.items()]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(escaping.line(f"{name:<{width}}  {value}"))
    by_pattern: dict[str, list[Update]] = {}
    for update in stats.updates:
        by_pattern.setdefault(pattern(update.module), []).append(update)
    rows = [
        [
            module_pattern,
            f"{len(group)}",
            shape_text(*group[0].shape, group[0].experts),
            _span([update.rank for update in group], "d"),
            _span([update.norm for update in group], ".3g"),
            _span([update.effective_rank for update in group], ".1f"),
        ]
        for module_pattern, group in by_pattern.items()
    ]
    print_table(["modules", "count", "shape", "rank", "norm of ΔW", "effective rank"], rows)
    _print_layers(by_pattern)


def _scaling(stats: AdapterStats) -> str:
    """`, lora_alpha 16, rsLoRA, scaling 2`."""
    scalings = _span([update.scaling for update in stats.updates], ".4g") if stats.updates else ""
    variants = [name for name, used in (("rsLoRA", stats.rslora), ("DoRA", stats.dora)) if used]
    return ", ".join([f", lora_alpha {stats.lora_alpha:g}", *variants, *([f"scaling {scalings}"] if scalings else [])])


def _print_layers(by_pattern: Mapping[str, Sequence[Update]]) -> None:
    """One row per layer: the norm of ΔW, and the effective rank in brackets."""
    cells = {
        (number_of(update.module), module_pattern): f"{update.norm:.3g} ({update.effective_rank:.1f})"
        for module_pattern, group in by_pattern.items()
        for update in group
    }
    layers = sorted({number for number, _ in cells if number is not None})
    rows = [[f"{number}", *(cells.get((number, name), "-") for name in by_pattern)] for number in layers]
    if rows:
        print("norm of ΔW (effective rank) by layer")
        print_table(["layer", *shortest([*by_pattern])], rows)


def _span(values: Sequence[float], form: str) -> str:
    """`0.31 to 0.92`, or one value where all are the same."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"
