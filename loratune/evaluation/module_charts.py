"""How far an adapter moves each module, layer by layer: heat maps, and the same as a table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from loratune.evaluation.charts import heat_map
from loratune.evaluation.page_text import label
from loratune.lora.module_names import number_of, pattern, shape_text, shortest
from loratune.lora.stats import Update

Quantity = Literal["norm", "effective_rank"]
_MOST_LAYERS = 1_000
"""Layers from the first to the last up to which those without a module are shown as gaps."""
_TITLES: dict[Quantity, str] = {"norm": "Norm of ΔW", "effective_rank": "Effective rank of ΔW"}


@dataclass(frozen=True)
class HeatMap:
    """A quantity of all modules, twice: layers across a desktop page, and down a phone's."""

    title: str
    wide: str
    narrow: str


@dataclass(frozen=True)
class ModuleCharts:
    """What the page shows of the modules of an adapter.

    Attributes:
        maps: A heat map of each quantity; none where no module belongs to a layer.
        header: The names of the columns of the table.
        rows: The table, a row for each kind of module.
        several: Whether a cell of a heat map stands for several modules, as with experts.
    """

    maps: list[HeatMap]
    header: list[str]
    rows: list[list[str]]
    several: bool


def module_charts(number: int, name: str, updates: Sequence[Update]) -> ModuleCharts:
    """The heat maps and the table of an adapter.

    The scale of each map is the adapter's own: on one that several shared, all cells of an adapter that moves its
    modules less than another would have the darkest colour.

    Args:
        number: Which adapter of the page it is.
        name: Its name.
        updates: ΔW of each of its modules.
    """
    patterns = list(dict.fromkeys(pattern(update.module) for update in updates))
    names = dict(zip(patterns, map(label, shortest(patterns)), strict=True))
    header = ["modules", "count", "shape", "rank", "norm of ΔW", "effective rank"]
    rows, several = [], False
    for module_pattern, short_name in names.items():
        group = [update for update in updates if pattern(update.module) == module_pattern]
        several |= len({number_of(update.module) for update in group}) < len(group)
        rows.append(
            [
                short_name,
                f"{len(group):,}",
                " or ".join(dict.fromkeys(shape_text(*update.shape, update.experts) for update in group)),
                _span([update.rank for update in group], "d"),
                _span([update.norm for update in group], ".3g"),
                _span([update.effective_rank for update in group], ".1f"),
            ]
        )
    maps = [made for quantity in _TITLES if (made := _map(number, name, updates, names, quantity))]
    return ModuleCharts(maps, header, rows, several)


def _cells(updates: Sequence[Update], quantity: Quantity) -> list[tuple[int, str, float]]:
    """Layer, pattern and value of each cell: the norm of all its updates together, or their mean effective rank."""
    groups: dict[tuple[int, str], list[Update]] = {}
    for update in updates:
        if (layer := number_of(update.module)) is not None:
            groups.setdefault((layer, pattern(update.module)), []).append(update)
    if quantity == "norm":
        return [(*key, math.hypot(*(one.norm for one in group))) for key, group in groups.items()]
    return [(*key, math.fsum(one.effective_rank for one in group) / len(group)) for key, group in groups.items()]


def _map(
    number: int,
    name: str,
    updates: Sequence[Update],
    names: Mapping[str, str],
    quantity: Quantity,
) -> HeatMap | None:
    values = {(layer, module_pattern): value for layer, module_pattern, value in _cells(updates, quantity)}
    if not values:
        return None
    scale = (0.0 if quantity == "norm" else min(values.values())), max(values.values())
    numbers = sorted({layer for layer, _ in values})
    is_dense = numbers[-1] - numbers[0] < _MOST_LAYERS  # else no model has all the layers between them
    layers = range(numbers[0], numbers[-1] + 1) if is_dense else numbers
    patterns = [module_pattern for module_pattern in names if any(key[1] == module_pattern for key in values)]
    table = [[values.get((layer, module_pattern)) for layer in layers] for module_pattern in patterns]
    title, rows, columns = _TITLES[quantity], [names[one] for one in patterns], [str(layer) for layer in layers]
    unit, what = title.removesuffix(" of ΔW").lower(), f"{title} of {name}, by layer and module"
    turned = [*map(list, zip(*table, strict=True))]
    wide = heat_map(f"{quantity}-{number}", what, table, rows, columns, scale, ("layer", unit))
    narrow = heat_map(f"{quantity}-{number}-n", what, turned, columns, rows, scale, ("", unit))
    return HeatMap(title, wide, narrow)


def _span(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"
