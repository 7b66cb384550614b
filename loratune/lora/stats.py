"""Statistics of an adapter file, module by module: rank, scaling, and norm and effective rank of each update.

All are computed from the small factors: with B = Qb·Rb and Aᵀ = Qa·Ra, the singular values of s·B·A are those of
s·Rb·Raᵀ, a matrix of rank x rank. The full update is never formed, and neither the base nor PEFT is needed.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from safetensors import safe_open

from loratune.codes import Code
from loratune.errors import AdapterError, Problem
from loratune.lora.adapter_config import ModuleSettings
from loratune.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from loratune.lora.module_names import WRAPPER_PREFIX, natural_sort_key, pattern, shape_text, without_wrappers


@dataclass(frozen=True)
class Update:
    """ΔW = scaling·B·A of one module, or of a parameter that holds several experts, each with an A and a B.

    Attributes:
        module: Path of the module or parameter in the base. For a parameter whose name is not recorded, the path of A
            and B.
        rank: Rank of A and B.
        shape: Inputs and outputs of the module, or of an expert.
        scaling: The factor of B·A.
        norm: Frobenius norm of ΔW, of all experts together.
        effective_rank: exp of the entropy of the shares of its singular values, between 1 and rank (Roy & Vetterli
            2007, "The effective rank"); 0 where ΔW is zero. Of experts, the mean of those whose ΔW is not zero.
        parameters: Number of values in A and B.
        experts: How many experts the parameter holds; 1 for a module.
        unchanged: The number of experts with a zero update, for example because no token was routed to them.
    """

    module: str
    rank: int
    shape: tuple[int, int]
    scaling: float
    norm: float
    effective_rank: float
    parameters: int
    experts: int = 1
    unchanged: int = 0


def measure(files: AdapterFiles) -> list[Update]:
    """Measure the update of each module of an adapter directory, in the order of its layers.

    Raises:
        AdapterError: A or B is missing, a rank differs from the configuration, or values are NaN or inf.
    """
    module_updates, settings, parameters = [], _settings(files), files.parameters
    with files.reading() as directory, safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
        for path, names in files.factors.items():
            down, up = (files.tensors.get(names.get(kind, ""), ()) for kind in "AB")
            if min(len(down), len(up)) < 2 or up[1] != down[0]:
                what, where = "lacks A or B, or they have different ranks", str(files.path / WEIGHTS_FILE)
                raise AdapterError(Problem(Code.ADAPTER_INVALID, what, where, path))
            factors = file.get_tensor(names["A"]), file.get_tensor(names["B"])
            is_stacked = bool(files.parameters_of(path))
            module_updates.append(
                _update(files, settings[path], parameters.get(path, path), *factors, is_stacked=is_stacked)
            )
    return sorted(module_updates, key=lambda update: natural_sort_key(update.module))


def _settings(files: AdapterFiles) -> dict[str, ModuleSettings]:
    """The settings of each path. Raises AdapterError: the settings of a parameter are ambiguous."""
    has_patterns, names = bool(files.config.get("rank_pattern") or files.config.get("alpha_pattern")), files.parameters
    for path in files.ranks:
        if has_patterns and path not in names and files.parameters_of(path):
            what = "has ranks or scales of its own for some modules, and the files do not say whose tensors these are"
            raise AdapterError(Problem(Code.ADAPTER_UNSUPPORTED, what, files.where, path))
    return files.settings(names)


def _update(
    files: AdapterFiles, settings: ModuleSettings, path: str, a: torch.Tensor, b: torch.Tensor, *, is_stacked: bool
) -> Update:
    a, b, where = a.double().flatten(1), b.double().flatten(1), str(files.path / WEIGHTS_FILE)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise AdapterError(Problem(Code.ADAPTER_NOT_FINITE, "holds NaN or inf", where, path))
    experts = round(len(a) / settings.rank) if is_stacked else 1
    if experts * settings.rank != len(a):
        what = f"has rank {len(a)} where {CONFIG_FILE} says {settings.rank:g}"
        raise AdapterError(Problem(Code.ADAPTER_INVALID, what, where, path))
    rank = len(a) // experts
    # PEFT orders the rows of A by expert, and the columns of B by rank.
    downs, ups = a.reshape(experts, rank, -1), b.reshape(len(b), rank, experts).permute(2, 0, 1)
    singular = settings.scaling * torch.linalg.svdvals(torch.linalg.qr(ups).R @ torch.linalg.qr(downs.mT).R.mT)
    totals = singular.sum(-1)
    if not totals.isfinite().all():
        what = f"its update, scaled by {settings.scaling:g}, is not finite"
        raise AdapterError(Problem(Code.ADAPTER_NOT_FINITE, what, str(files.path / CONFIG_FILE), path))
    moved = totals > 0
    effective_ranks = torch.special.entr(singular[moved] / totals[moved, None]).sum(-1).exp()
    effective_rank = effective_ranks.mean().item() if moved.any() else 0.0
    shape, size = (a.shape[1], b.shape[0]), a.numel() + b.numel()
    unchanged = experts - int(moved.sum())
    norm = singular.norm().item()
    return Update(path, rank, shape, settings.scaling, norm, effective_rank, size, experts, unchanged)


@dataclass(frozen=True)
class AdapterStats:
    """An adapter, described by its files.

    Attributes:
        base: The name or path of the base.
        r: The rank in its configuration.
        lora_alpha: The scaling in its configuration.
        dora: Whether the adapter also changes magnitudes, beyond ΔW.
        rslora: Whether B·A is scaled by lora_alpha over the square root of r.
        parameters: The number of values in the weights file.
        adapter_bytes: The size of the weights file.
        targets: The last part of a module's name → patterns of the adapted modules of that name.
        updates: ΔW of each adapted module.
        others: Pattern → number of values in all other tensors: biases, whole modules, trained tokens.
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
    """Compute the statistics of an adapter. Raises AdapterError: see `measure`."""
    module_updates = measure(files)
    with files.reading() as path:
        size = (path / WEIGHTS_FILE).stat().st_size
    targets: dict[str, list[str]] = {}
    for module_pattern in by_pattern(module_updates):
        targets.setdefault(module_pattern.rpartition(".")[2], []).append(module_pattern)
    others: dict[str, int] = {}
    copies = {name: shape for (_, name), shape in files.copies.items()}
    for name, shape in (files.tensors | copies).items():
        if ".lora_" not in name:
            module_pattern = pattern(without_wrappers(name.removeprefix(WRAPPER_PREFIX)))
            others[module_pattern] = others.get(module_pattern, 0) + math.prod(shape)
    return AdapterStats(
        base=files.base,
        r=files.config["r"],
        lora_alpha=files.config["lora_alpha"],
        dora=bool(files.config.get("use_dora")),
        rslora=bool(files.config.get("use_rslora")),
        parameters=sum(math.prod(shape) for shape in (files.tensors | copies).values()),
        adapter_bytes=size,
        targets=targets,
        updates=module_updates,
        others=others,
    )


TABLE_HEADER = ["modules", "count", "shape", "rank", "norm of ΔW", "effective rank"]
"""The columns of a table with a row for each kind of module: its name, and `table_row`."""


def by_pattern(module_updates: Iterable[Update]) -> dict[str, list[Update]]:
    """Pattern of a module's path → the updates of the modules of that kind."""
    groups: dict[str, list[Update]] = {}
    for update in module_updates:
        groups.setdefault(pattern(update.module), []).append(update)
    return groups


def table_row(group: Sequence[Update]) -> list[str]:
    """The updates of one kind of module as the cells of a table, without its name."""
    return [
        f"{len(group):,}",
        " or ".join(dict.fromkeys(shape_text(*update.shape, update.experts) for update in group)),
        span([update.rank for update in group], "d"),
        span([update.norm for update in group], ".3g"),
        span([update.effective_rank for update in group], ".1f"),
    ]


def span(values: Sequence[float], form: str) -> str:
    """`0.31 to 0.92`, or one value if all are the same."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"
