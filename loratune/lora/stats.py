"""Statistics of an adapter file, module by module: rank, scaling, and norm and effective rank of each update.

All are computed from the small factors: with B = Qb·Rb and Aᵀ = Qa·Ra, the singular values of s·B·A are those of
s·Rb·Raᵀ, a matrix of rank x rank. The full update is never formed, and neither the base nor PEFT is needed.
"""

import re
from dataclasses import dataclass

import torch
from safetensors import safe_open

from loratune.codes import Code
from loratune.config.patterns import ModuleSettings, module_settings
from loratune.errors import AdapterError, Problem
from loratune.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from loratune.lora.module_names import natural_sort_key

_PREFIX = "base_model.model."
_A = re.compile(rf"^{re.escape(_PREFIX)}(?P<path>.*)\.lora_(?P<kind>embedding_)?A(?P<end>\.weight)?$")


@dataclass(frozen=True)
class Update:
    """ΔW = scaling·B·A of one module.

    Attributes:
        module: Path of the module in the base.
        rank: Rank of A and B.
        shape: Inputs and outputs of the module.
        scaling: The factor of B·A.
        norm: Frobenius norm of ΔW.
        effective_rank: exp of the entropy of the shares of its singular values, between 1 and rank (Roy & Vetterli
            2007, "The effective rank"); 0 where ΔW is zero.
        parameters: Number of values in A and B.
    """

    module: str
    rank: int
    shape: tuple[int, int]
    scaling: float
    norm: float
    effective_rank: float
    parameters: int


def updates(files: AdapterFiles) -> list[Update]:
    """Measure the update of each module of an adapter directory, in the order of its layers.

    Raises:
        AdapterError: An A without its B, or of another rank than the configuration says; NaN or inf.
    """
    module_updates, settings = [], module_settings(files.config, files.tensors, str(files.path / CONFIG_FILE))
    with safe_open(files.path / WEIGHTS_FILE, framework="pt") as file:
        for name in files.tensors:
            if match := _A.match(name):
                path = match["path"]
                partner = f"{_PREFIX}{path}.lora_{match['kind'] or ''}B{match['end'] or ''}"
                shapes = files.tensors[name], files.tensors.get(partner, ())
                if min(map(len, shapes)) < 2 or shapes[1][1] != shapes[0][0]:
                    what, where = "has no lora_B of its rank", str(files.path / WEIGHTS_FILE)
                    raise AdapterError(Problem(Code.ADAPTER_NO_FACTOR, what, where, path))
                module_updates.append(
                    _update(files, settings[path], path, file.get_tensor(name), file.get_tensor(partner))
                )
    return sorted(module_updates, key=lambda update: natural_sort_key(update.module))


def _update(files: AdapterFiles, settings: ModuleSettings, path: str, a: torch.Tensor, b: torch.Tensor) -> Update:
    a, b, where = a.double().flatten(1), b.double().flatten(1), str(files.path / WEIGHTS_FILE)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise AdapterError(Problem(Code.ADAPTER_NOT_FINITE, "holds NaN or inf", where, path))
    if settings.rank != len(a):
        what = f"has rank {len(a)} where {CONFIG_FILE} says {settings.rank:g}"
        raise AdapterError(Problem(Code.ADAPTER_RANK, what, where, path))
    singular = settings.scaling * torch.linalg.svdvals(torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T)
    total = singular.sum()
    if not total.isfinite():
        what = f"its update, scaled by {settings.scaling:g}, is not finite"
        raise AdapterError(Problem(Code.ADAPTER_SCALING, what, str(files.path / CONFIG_FILE), path))
    effective_rank = torch.special.entr(singular / total).sum().exp().item() if total > 0 else 0.0
    shape, size = (a.shape[1], b.shape[0]), a.numel() + b.numel()
    return Update(path, len(a), shape, settings.scaling, singular.norm().item(), effective_rank, size)
