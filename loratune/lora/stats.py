"""What an adapter file holds, module by module: rank, scaling, and size and effective rank of each update.

Everything comes from the small factors: with B = Qb·Rb and Aᵀ = Qa·Ra, the singular values of s·B·A are those of
s·Rb·Raᵀ, a matrix of rank x rank. The full update is never formed, and neither base nor PEFT is needed.
"""

import re
from dataclasses import dataclass

import torch
from safetensors import safe_open

from loratune.config.patterns import ModuleSettings, module_settings
from loratune.errors import AdapterError, Problem
from loratune.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from loratune.lora.module_names import natural

_PREFIX = "base_model.model."
_A = re.compile(rf"^{re.escape(_PREFIX)}(?P<path>.*)\.lora_(?P<kind>embedding_)?A(?P<end>\.weight)?$")


@dataclass(frozen=True)
class Update:
    """ΔW of one module. shape: inputs and outputs; scaling: what B·A is multiplied by; parameters: in A and B.

    norm: Frobenius norm of ΔW = scaling·B·A. effective_rank: exp of the entropy of its singular values' shares, between
    1 and rank (Roy & Vetterli 2007, "The effective rank"); 0 where ΔW is zero.
    """

    module: str
    rank: int
    shape: tuple[int, int]
    scaling: float
    norm: float
    effective_rank: float
    parameters: int


def updates(saved: AdapterFiles) -> list[Update]:
    """Measure the update of each module of an adapter directory, in the order of its layers.

    Raises AdapterError: an A without its B, or of another rank than the configuration says; NaN or inf.
    """
    found, said = [], module_settings(saved.config, saved.tensors, str(saved.path / CONFIG_FILE))
    with safe_open(saved.path / WEIGHTS_FILE, framework="pt") as file:
        for name in saved.tensors:
            if match := _A.match(name):
                path, partner = (
                    match["path"],
                    f"{_PREFIX}{match['path']}.lora_{match['kind'] or ''}B{match['end'] or ''}",
                )
                shapes = saved.tensors[name], saved.tensors.get(partner, ())
                if min(map(len, shapes)) < 2 or shapes[1][1] != shapes[0][0]:
                    raise AdapterError(Problem("has no lora_B of its rank", str(saved.path / WEIGHTS_FILE), path))
                found.append(_update(saved, said[path], path, file.get_tensor(name), file.get_tensor(partner)))
    return sorted(found, key=lambda update: natural(update.module))


def _update(saved: AdapterFiles, said: ModuleSettings, path: str, a: torch.Tensor, b: torch.Tensor) -> Update:
    a, b = a.double().flatten(1), b.double().flatten(1)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise AdapterError(Problem("holds NaN or inf", str(saved.path / WEIGHTS_FILE), path))
    if said.rank != len(a):
        what = f"has rank {len(a)} where {CONFIG_FILE} says {said.rank:g}"
        raise AdapterError(Problem(what, str(saved.path / WEIGHTS_FILE), path))
    singular = said.scaling * torch.linalg.svdvals(torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T)
    total = singular.sum()
    if not total.isfinite():
        what = f"its update, scaled by {said.scaling:g}, is not finite"
        raise AdapterError(Problem(what, str(saved.path / CONFIG_FILE), path))
    effective = torch.special.entr(singular / total).sum().exp().item() if total > 0 else 0.0
    return Update(
        path, len(a), (a.shape[1], b.shape[0]), said.scaling, singular.norm().item(), effective, a.numel() + b.numel()
    )
