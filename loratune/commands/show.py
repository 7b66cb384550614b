"""Results on stdout, as people or programs read them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from loratune import escaping
from loratune.console import (
    align,
    err,
    format_duration,
    format_size,
    log,
    print_block,
    print_json,
    print_marked,
    print_table,
)
from loratune.lora.module_names import number_of, pattern, ranges, shortest

if TYPE_CHECKING:
    from loratune.commands.adapter_stats import Header
    from loratune.commands.evaluate import Score
    from loratune.commands.params import Params
    from loratune.commands.train import Plan, Result
    from loratune.lora.stats import Update
    from loratune.memory import Estimate
    from loratune.training.tokenization import TokenizedDatasets


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def announce(made: "Plan") -> None:
    """On stderr, what is about to be trained; above all what was cut or left out."""
    for line in _rows(made.rows):
        log(line)
    log("first row, with what is learnt marked:")
    print_marked(_shortened(made.rendered()), err)
    for place, along in made.targets.shared_roles().items():
        if along:
            log(f"{place} is one module for {', '.join(made.targets.fused[place])}: {_along(along)}")
    _notes(made)
    log(str(made.count))


def _notes(made: "Plan") -> None:
    """On stderr, what is lawful and better known."""
    training, rows = made.config.training, made.rows.train.rows
    accumulated, processes = training.gradient_accumulation_steps, made.processes
    batch = processes * training.per_device_train_batch_size * accumulated
    if processes > 1:
        items = "packs of rows" if made.config.data.packing == "full" and made.train.flat else "rows"
        log(f"{processes} processes: {processes} x {made.train.size} x {accumulated} {items} a step")
    if len(rows) < batch and made.train.size > 1:
        log(f"rows: {len(rows)}, fewer than a batch of {batch}: each epoch is one step on all of them")
    for line in made.notes:
        log(line)


def _rows(rows: "TokenizedDatasets") -> Iterator[str]:
    """The table of what became of the rows, and what else is to be said of them."""
    parts = {"train": rows.train, "validation": rows.validation}
    cells = [[name, *part.report.cells()] for name, part in parts.items() if part]
    yield from align(["", *rows.train.report.COLUMNS], cells)
    for name, part in parts.items():
        if part:
            lines = [*rows.remarks[name], *part.report.remarks(rows.max_length)]
            yield from (f"  {name}: {line}" for line in lines)
    yield from (f"  {line}" for line in rows.leaks)


def _shortened(pieces: Iterable[tuple[str, bool]], most: int = 600) -> Iterator[tuple[str, bool]]:
    """Pieces of which the long ones have lost their middle."""
    for text, learnt in pieces:
        cut = len(text) > most
        yield f"{text[: most // 2]} [...] {text[-most // 2 :]}" if cut else text, learnt


def plan(made: "Plan", rows: int) -> None:
    """What `train --dry-run` shows. rows: how many training rows."""
    lines = []
    for place, roles in made.targets.module_patterns().items():
        count = sum(pattern(path) == place for path in made.targets.modules)
        along = made.targets.shared_roles().get(place)
        fused = f", fused: {_along(along)}" if along else ", fused" if along is not None else ""
        lines.append((", ".join(roles), f"{place} x {count}{fused}"))
    print_block("targets", lines)
    print(made.count)
    for line in _rows(made.rows):
        print(escaping.line(line))
    _notes(made)
    for number in range(min(rows, len(made.rows.train.rows))):
        print(f"{escaping.line(made.rows.train.rows.row(number).where)}, with what is learnt marked")
        print_marked(made.rendered(number))
    print(f"adapter file: {format_size(made.count.adapter_bytes)}")
    print(f"memory at the longest batch: {_memory(made.memory)}")


def _along(roles: "Sequence[str]") -> str:
    """`k comes along`, `k and v come along`."""
    return f"{' and '.join(roles)} {'comes' if len(roles) == 1 else 'come'} along"


def result(made: "Result", program: str) -> None:
    """The block at the end of a run. program: what to type for this program."""
    outcome = made.outcome
    lines = [
        ("adapter", str(made.directory)),
        ("size", format_size(made.adapter_bytes)),
        ("trained", f"{outcome.tokens:,} tokens in {outcome.steps:,} steps, {format_duration(outcome.seconds)}"),
        ("loss", f"{outcome.first_loss:.4f} → {outcome.last_loss:.4f}"),
    ]
    if outcome.held_out_loss is not None:
        lines.append(("held-out", f"{outcome.held_out_loss:.4f}"))
    lines.append(("gain", str(made.gain)))
    if made.left:
        rest = "" if made.left[0].startswith("all") else " (all else by the fast code of loratune)"
        lines.append(("by PyTorch", ", ".join(made.left) + rest))
    lines.append(("try it", f"{program} generate --adapter {made.shown} {made.try_it}"))
    print_block("done", lines)


def params(counted: "Params", as_json: bool) -> None:
    """Counts, a table of the modules, and the memory that training will need."""
    for line in counted.notes:
        log(line)
    for place, roles in counted.along.items():
        log(f"{place} is one module for {', '.join(counted.fused[place])}: {_along(roles)}")
    count = counted.count
    if as_json:
        values = {
            "trainable": count.trainable,
            "total": count.total,
            "percent": count.percent,
            "adapter_bytes": count.adapter_bytes,
            "targets": counted.targets,
            "roles": counted.roles,
            "layers": counted.layers,
            "others": counted.others,
            "memory": counted.memory.parts(),
        }
        print_json(values)
        return
    print(count)
    rows = [
        [
            one.role,
            one.pattern,
            f"{one.modules}",
            f"{one.shape[0]} → {one.shape[1]}",
            f"{one.rank}",
            f"{one.trainable:,}",
        ]
        for one in counted.groups
    ]
    rows += [["", place, "", "", "", f"{size:,}"] for place, size in counted.others.items()]
    print_table(["role", "modules", "count", "shape", "rank", "trainable"], rows)
    for place, served in counted.fused.items():
        print(f"  {', '.join(served)}: {place}, fused")
    print(f"per layer: {_per_layer(counted.layers)}")
    print(f"adapter file: {format_size(count.adapter_bytes)}")
    print(f"memory to train, {counted.batch} rows of {counted.length:,} tokens: {_memory(counted.memory)}")


def _memory(estimate: "Estimate") -> str:
    """`3.2 GiB (weights 1.0, activations 2.1, runtime 0.1)`, the small parts left out."""
    parts = estimate.parts()
    total = parts.pop("total")
    told = [f"{name} {value / (1 << 30):.1f}" for name, value in parts.items() if value >= 0.05 * (1 << 30)]
    coarse = "" if estimate.traced else ", by a coarse formula"
    return f"about {format_size(total)} ({', '.join(told)}{coarse})"


def _per_layer(layers: "Mapping[int, int]") -> str:
    """`30,720 in each of layers 0-29`, or several of these."""
    alike: dict[int, list[int]] = {}
    for number, trained in layers.items():
        alike.setdefault(trained, []).append(number)
    return "; ".join(
        f"{trained:,} in {'each of layers' if len(numbers) > 1 else 'layer'} {ranges(numbers)}"
        for trained, numbers in alike.items()
    )


def header(path: str, read: "Header", as_json: bool) -> None:
    """What an adapter says of itself, and how far it moves each module."""
    if as_json:
        print_json(asdict(read))
        return
    lines = [
        ("adapter", path),
        ("base", read.base),
        ("rank", _span([one.rank for one in read.updates] or [read.r], "d") + _kind(read)),
        ("size", f"{format_size(read.adapter_bytes)}, {read.parameters:,} numbers"),
    ]
    lines += [("also", f"{name}: {count:,} numbers") for name, count in read.others.items()]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(escaping.line(f"{name:<{width}}  {value}"))
    by_place: dict[str, list[Update]] = {}
    for update in read.updates:
        by_place.setdefault(pattern(update.module), []).append(update)
    rows = [
        [
            place,
            f"{len(group)}",
            f"{group[0].shape[0]} → {group[0].shape[1]}",
            _span([one.rank for one in group], "d"),
            _span([one.norm for one in group], ".3g"),
            _span([one.effective_rank for one in group], ".1f"),
        ]
        for place, group in by_place.items()
    ]
    print_table(["modules", "count", "shape", "rank", "norm of ΔW", "effective rank"], rows)
    _by_layer(by_place)


def _kind(read: "Header") -> str:
    """`, lora_alpha 16, rsLoRA`."""
    scalings = _span([one.scaling for one in read.updates], ".4g") if read.updates else ""
    kinds = [name for name, there in (("rsLoRA", read.rslora), ("DoRA", read.dora)) if there]
    return ", ".join([f", lora_alpha {read.lora_alpha:g}", *kinds, *([f"scaling {scalings}"] if scalings else [])])


def _by_layer(by_place: "Mapping[str, list[Update]]") -> None:
    """One row per layer: norm of ΔW, and effective rank in brackets."""
    names = shortest([*by_place])
    cells = {
        (number_of(update.module), place): f"{update.norm:.3g} ({update.effective_rank:.1f})"
        for place, group in by_place.items()
        for update in group
    }
    layers = sorted({number for number, _ in cells if number is not None})
    rows = [[f"{number}", *(cells.get((number, place), "-") for place in by_place)] for number in layers]
    if rows:
        print("norm of ΔW (effective rank) by layer")
        print_table(["layer", *names], rows)


def _span(values: Sequence[float], form: str) -> str:
    """`0.31 to 0.92`, or one value where all are the same."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def scores(found: "Mapping[str, Score]", as_json: bool) -> None:
    """Base and adapter, one below the other."""
    if as_json:
        print_json({name: asdict(score) for name, score in found.items()})
        return
    rows = [
        [name, f"{one.loss:.4f}", f"{one.perplexity:.2f}", _share(one.exact_match), _share(one.label_accuracy)]
        for name, one in found.items()
    ]
    print(f"{found['base'].rows:,} rows, {found['base'].tokens:,} learnt tokens")
    print_table(["", "loss", "perplexity", "exact match", "label accuracy"], rows)
