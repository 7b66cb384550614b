"""The story of `loratune params --adapter`: what an adapter directory says of itself, read without its base."""

import math
from dataclasses import dataclass

from loratune.lora.adapter_files import WEIGHTS_FILE, AdapterFiles
from loratune.lora.module_names import pattern
from loratune.lora.stats import Update, updates


@dataclass(frozen=True)
class Header:
    """An adapter by its own files.

    parameters: numbers in the file; adapter_bytes: its size; targets: last name → patterns of the adapted paths;
    updates: ΔW of each adapted module; others: pattern → numbers in all further tensors (biases, whole modules,
    trained tokens); dora: the adapter changes more than ΔW; rslora: B·A is scaled by lora_alpha over the root of r.
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


def _others(saved: AdapterFiles) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, shape in saved.tensors.items():
        if ".lora_" not in name:
            place = pattern(name.removeprefix("base_model.model.").replace(".base_layer.", "."))
            found[place] = found.get(place, 0) + math.prod(shape)
    return found


def header(saved: AdapterFiles) -> Header:
    """Read it. Raises AdapterError: see `spectrum.updates`."""
    measured = updates(saved)
    targets: dict[str, list[str]] = {}
    for place in dict.fromkeys(pattern(update.module) for update in measured):
        targets.setdefault(place.rpartition(".")[2], []).append(place)
    return Header(
        base=saved.base,
        r=saved.config["r"],
        lora_alpha=saved.config["lora_alpha"],
        dora=bool(saved.config.get("use_dora")),
        rslora=bool(saved.config.get("use_rslora")),
        parameters=sum(math.prod(shape) for shape in saved.tensors.values()),
        adapter_bytes=(saved.path / WEIGHTS_FILE).stat().st_size,
        targets=targets,
        updates=measured,
        others=_others(saved),
    )
