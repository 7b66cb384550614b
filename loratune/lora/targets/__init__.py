"""Attention roles (q, k, v, o) → the module names of this architecture.

PEFT raises only when no target matches at all, so a name that this model does not have is lost in silence. Here every
entry of `lora.target_modules` finds its modules or is an error, and the names that come out select exactly the modules
that were meant. A model with a new word for a projection needs one line in `names.SERVES`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from loratune.config import LoraSection
from loratune.errors import ModelError, Problem
from loratune.lora import module_names
from loratune.lora.targets import entries, notes, patterns, whole
from loratune.lora.targets.names import ROLES as ROLES
from loratune.lora.targets.names import SERVES as SERVES
from loratune.lora.targets.names import STOCK as STOCK
from loratune.lora.targets.survey import take


@dataclass(frozen=True)
class Targets:
    """The modules that get an adapter.

    roles: each role or entry that was asked for → full module paths, in model order.
    modules: all of these paths, once each, in model order.
    names: for `LoraConfig.target_modules`: sorted suffixes that select exactly `modules`, together with the
        `layers_to_transform` that `resolve` was given.
    fused: path with layer numbers as `*` → the roles that one module serves, where it serves several;
        a role that was not asked for comes along.
    notes: one line each, for the user: what is lawful and may surprise.
    rank_pattern, alpha_pattern: for `LoraConfig`, regular expressions that give each module exactly its value.
    modules_to_save: for `LoraConfig`, sorted names that select exactly the modules meant, or None.
    """

    roles: dict[str, tuple[str, ...]]
    modules: tuple[str, ...]
    names: tuple[str, ...]
    fused: dict[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] | None = None

    def patterns(self) -> dict[str, list[str]]:
        """Each role or entry → its module paths with layer numbers as `*`, once each."""
        return {entry: list(dict.fromkeys(map(module_names.pattern, found))) for entry, found in self.roles.items()}

    def places(self) -> dict[str, list[str]]:
        """Each path with `*` for its layer numbers → the roles or entries that led there."""
        found: dict[str, list[str]] = {}
        for entry, shown in self.patterns().items():
            for place in shown:
                found.setdefault(place, []).append(entry)
        return found

    def along(self) -> dict[str, list[str]]:
        """Each fused place that roles led to → those that it serves without being asked for."""
        asked = self.places()
        return {
            place: [role for role in roles if role not in asked[place]] if {*roles} & {*asked[place]} else []
            for place, roles in self.fused.items()
        }

    def peft(self) -> dict[str, Any]:
        """Keyword arguments for `LoraConfig`; `layers_to_transform` goes there beside them, as the section has it."""
        return {
            "target_modules": list(self.names),
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "modules_to_save": None if self.modules_to_save is None else list(self.modules_to_save),
        }


def find(model: nn.Module, section: LoraSection) -> Targets:
    """`resolve` for a whole section."""
    return resolve(
        model,
        section.target_modules,
        section.layers_to_transform,
        rank_pattern=section.rank_pattern,
        alpha_pattern=section.alpha_pattern,
        modules_to_save=section.modules_to_save,
    )


def resolve(
    model: nn.Module,
    target_modules: Sequence[str] | str,
    layers: Sequence[int] | None = None,
    *,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, int] | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> Targets:
    """Find the modules that a lora section means on this model, which may be on the meta device.

    target_modules: a list of roles and names (PEFT's rule: the whole path, or its end after a dot), where `q_proj`,
    `k_proj`, `v_proj`, `o_proj` stand for the roles if the model has no such name; or a string: `all-linear` (every
    linear layer but the output embedding that an adapter takes effect on, with a note of what it leaves out) or a
    regular expression for whole paths.
    layers: `lora.layers_to_transform`, the numbers of the layers to keep to.
    rank_pattern, alpha_pattern: role, name or regular expression → r or lora_alpha of the targets that it hits.
    modules_to_save: roles and names of modules that are trained whole.

    Raises ModelError with every entry that finds nothing, finds only some layers, names what LoRA cannot adapt, or
    contradicts another; ConfigError for a regular expression that does not compile and for an empty list.
    Source: https://huggingface.co/docs/peft/package_reference/lora (target_modules).
    """
    read = take(model)
    if isinstance(target_modules, str):
        roles, problems = entries.by_string(read, target_modules)
    else:
        roles, problems = entries.by_list(read, target_modules)
    if layers is not None:
        roles, missing = entries.within(roles, layers)
        problems = [*problems, *missing]
    chosen = {path for found in roles.values() for path in found}
    modules = tuple(path for path in read.modules if path in chosen)
    names, alike = module_names.endings(modules, read.modules, layers)
    problems += [_alike(path) for path in alike] + entries.lost(read, modules)
    ranks, rank_problems, rank_notes = patterns.values(read, modules, rank_pattern or {}, "lora.rank_pattern")
    alphas, alpha_problems, alpha_notes = patterns.values(read, modules, alpha_pattern or {}, "lora.alpha_pattern")
    saved, saved_problems, saved_notes = whole.names(read, modules, modules_to_save or ())
    if problems := [*problems, *rank_problems, *alpha_problems, *saved_problems]:
        raise ModelError(problems)
    fused = {
        module_names.pattern(path): tuple(read.serves[path]) for path in modules if len(read.serves.get(path, "")) > 1
    }
    every = notes.of_all_linear(read) if "all-linear" in roles else notes.of_roles(read, list(roles), modules)
    lawful = [*every, *notes.of_fused(list(roles), modules), *notes.of_tied(read, modules)]
    said = tuple(dict.fromkeys([*lawful, *rank_notes, *alpha_notes, *saved_notes]))
    kept = tuple(saved) if modules_to_save is not None else None
    return Targets(roles, modules, names, fused, said, ranks, alphas, kept)


def _alike(path: str) -> Problem:
    what = f"PEFT cannot tell {path} from a module whose path ends in the same way"
    return Problem(what, key=entries.KEY, fix="target both or neither")
