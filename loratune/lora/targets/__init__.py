"""The modules that get an adapter: attention roles (q, k, v, o) and names → modules of this architecture.

PEFT raises an error only when no target matches at all, so a name that this model does not have is ignored silently.
Here every entry of `lora.target_modules` means some modules or is an error, and the names that PEFT gets select exactly
the modules that were meant. A model with another name for a projection needs one line in `names.SERVES`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from loratune.codes import Code
from loratune.config import LoraSection
from loratune.errors import ModelError, Problem
from loratune.lora import module_names
from loratune.lora.targets import entries
from loratune.lora.targets.names import ROLES as ROLES
from loratune.lora.targets.names import SERVES as SERVES
from loratune.lora.targets.names import STOCK as STOCK
from loratune.lora.targets.notes import notes
from loratune.lora.targets.patterns import resolve_pattern
from loratune.lora.targets.survey import take


@dataclass(frozen=True)
class Targets:
    """The modules that get an adapter.

    Attributes:
        roles: Each role or entry → full module paths, in model order.
        modules: All of these paths, once each, in model order.
        names: For `LoraConfig.target_modules`: sorted suffixes that select exactly `modules`, together with the
            `layers_to_transform` that `resolve` was given.
        fused: Path with layer numbers as `*` → the roles that one module serves, where it serves several; all of them
            are adapted together.
        notes: Notes for the user, one line each, on what may surprise.
        rank_pattern: For `LoraConfig`, regular expressions that give each module exactly its value.
        alpha_pattern: The same for lora_alpha.
        modules_to_save: For `LoraConfig`, sorted names that select exactly the modules meant, or None.
    """

    roles: dict[str, tuple[str, ...]]
    modules: tuple[str, ...]
    names: tuple[str, ...]
    fused: dict[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] | None = None

    def entry_patterns(self) -> dict[str, list[str]]:
        """Each role or entry → its module paths with layer numbers as `*`, once each."""
        return {entry: list(dict.fromkeys(map(module_names.pattern, paths))) for entry, paths in self.roles.items()}

    def module_patterns(self) -> dict[str, list[str]]:
        """Each module path with layer numbers as `*` → the roles or entries that led there."""
        led: dict[str, list[str]] = {}
        for entry, patterns in self.entry_patterns().items():
            for pattern in patterns:
                led.setdefault(pattern, []).append(entry)
        return led

    def shared_roles(self) -> dict[str, list[str]]:
        """Each fused pattern that roles led to → the other roles that are adapted with them."""
        led = self.module_patterns()
        return {
            pattern: [role for role in roles if role not in led[pattern]] if {*roles} & {*led[pattern]} else []
            for pattern, roles in self.fused.items()
        }

    def peft(self) -> dict[str, Any]:
        """Keyword arguments for `LoraConfig`, which gets `layers_to_transform` from the section."""
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
    """Find the modules that a lora section means on this model.

    Source: https://huggingface.co/docs/peft/package_reference/lora (target_modules).

    Args:
        model: The model, which may be on the meta device.
        target_modules: A list of roles and names (PEFT's rule: the whole path, or its end after a dot), where `q_proj`,
            `k_proj`, `v_proj`, `o_proj` stand for the roles if the model has no such name. Or a string: `all-linear`
            (every linear layer except the output embedding on which an adapter has an effect, with a note on what it
            leaves out) or a regular expression for whole paths.
        layers: `lora.layers_to_transform`, the numbers of the layers to adapt.
        rank_pattern: Role, name or regular expression → r of the targets that it matches.
        alpha_pattern: The same for lora_alpha.
        modules_to_save: Roles and names of modules that are trained whole.

    Raises:
        ModelError: With every entry that means nothing, or means modules only in some layers, or modules that LoRA
            cannot adapt, or contradicts another entry.
        ConfigError: A regular expression does not compile or takes too long; a list is empty.
    """
    survey = take(model)
    if isinstance(target_modules, str):
        roles, problems = entries.by_string(survey, target_modules)
    else:
        roles, problems = entries.by_list(survey, target_modules)
    if layers is not None:
        roles, missing = entries.in_layers(roles, layers)
        problems = [*problems, *missing]
    chosen = {path for paths in roles.values() for path in paths}
    modules = tuple(path for path in survey.modules if path in chosen)
    names, ambiguous = module_names.endings(modules, survey.modules, layers)
    problems += [_ambiguous(path) for path in ambiguous] + entries.without_effect(survey, modules)
    ranks, rank_problems, rank_notes = resolve_pattern(survey, modules, rank_pattern or {}, "lora.rank_pattern")
    alphas, alpha_problems, alpha_notes = resolve_pattern(survey, modules, alpha_pattern or {}, "lora.alpha_pattern")
    saved, saved_problems, saved_notes = entries.modules_to_save(survey, modules, modules_to_save or ())
    if problems := [*problems, *rank_problems, *alpha_problems, *saved_problems]:
        raise ModelError(problems)
    fused = {
        module_names.pattern(path): tuple(survey.serves[path])
        for path in modules
        if len(survey.serves.get(path, "")) > 1
    }
    remarks = [*notes(survey, list(roles), modules), *rank_notes, *alpha_notes, *saved_notes]
    to_save = tuple(saved) if modules_to_save is not None else None
    return Targets(roles, modules, names, fused, tuple(dict.fromkeys(remarks)), ranks, alphas, to_save)


def _ambiguous(path: str) -> Problem:
    what = f"PEFT cannot tell {path} from a module whose path ends in the same way"
    return Problem(Code.LORA_AMBIGUOUS_TARGET, what, key=entries.KEY, fix="target both or neither")
