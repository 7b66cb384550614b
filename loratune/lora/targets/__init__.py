"""Maps targets to a model: attention roles (q, k, v, o) and names to modules, experts to parameters.

PEFT raises an error only if no target matches at all, so a name that the model lacks is silently ignored. Here, every
entry of `lora.target_modules` must match modules, and the names passed to PEFT select exactly these modules. A model
with another name for a projection needs one line in `survey.SERVES`. Notes report layers that roles do not adapt, and
layers that all-linear leaves out.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from loratune.codes import Code
from loratune.config import LoraSection
from loratune.errors import ModelError, Problem
from loratune.lora import module_names
from loratune.lora.targets.entries import KEY, PARAMETERS_KEY, Resolver
from loratune.lora.targets.survey import (
    EXPERTS,
    SHARED_ROLES,
    Survey,
    chooser,
    parameter_obstacle,
    short_names,
    take,
    unused_part,
)
from loratune.lora.targets.survey import ROLES as ROLES
from loratune.lora.targets.survey import SERVES as SERVES
from loratune.lora.targets.survey import STOCK as STOCK


@dataclass(frozen=True)
class Targets:
    """The modules and parameters that get an adapter.

    Attributes:
        roles: Each role or entry → full paths, in model order.
        modules: All of these paths that are modules, once each, in model order.
        names: For `LoraConfig.target_modules`: sorted suffixes that select exactly `modules`, together with the
            `layers_to_transform` of the section.
        fused: Path with layer numbers as `*` → the roles of a module that serves several; they are adapted together.
        notes: Lines for the user on anything unexpected.
        rank_pattern: For `LoraConfig`, regular expressions that assign each module exactly its value.
        alpha_pattern: The same for lora_alpha.
        modules_to_save: For `LoraConfig`, sorted names that select exactly the modules meant, or None.
        parameters: The paths in `roles` that are parameters, once each, in model order.
        parameter_names: For `LoraConfig.target_parameters`: sorted suffixes that select exactly these. PEFT does not
            apply `layers_to_transform` to them.
    """

    roles: dict[str, tuple[str, ...]]
    modules: tuple[str, ...]
    names: tuple[str, ...]
    fused: dict[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] | None = None
    parameters: tuple[str, ...] = ()
    parameter_names: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """All targets."""
        return (*self.modules, *self.parameters)

    def entry_patterns(self) -> dict[str, list[str]]:
        """Each role or entry → its paths with layer numbers as `*`, once each."""
        return {entry: list(dict.fromkeys(map(module_names.pattern, paths))) for entry, paths in self.roles.items()}

    def module_patterns(self) -> dict[str, list[str]]:
        """Path with layer numbers as `*` → the roles or entries that match it."""
        entries_by_pattern: dict[str, list[str]] = {}
        for entry, patterns in self.entry_patterns().items():
            for pattern in patterns:
                entries_by_pattern.setdefault(pattern, []).append(entry)
        return entries_by_pattern

    def shared_roles(self) -> dict[str, list[str]]:
        """Each fused pattern → its roles that were not requested, but are adapted with the requested ones.

        The list is empty if the module is a target by its name or by an expression.
        """
        entries_by_pattern = self.module_patterns()
        return {
            pattern: [role for role in roles if role not in entries] if {*roles} & {*entries} else []
            for pattern, roles in self.fused.items()
            for entries in [entries_by_pattern[pattern]]
        }

    def shared_lines(self) -> list[str]:
        """Lines such as `*.qkv_proj is one module for q, k, v: k and v are adapted as well`."""
        return [
            f"{place} is one module for {', '.join(self.fused[place])}: {module_names.adapted_too(roles)}"
            for place, roles in self.shared_roles().items()
            if roles
        ]

    def peft(self) -> dict[str, Any]:
        """Keyword arguments for `LoraConfig`, which gets `layers_to_transform` from the section."""
        return {
            "target_modules": list(self.names),
            "target_parameters": list(self.parameter_names) or None,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "modules_to_save": None if self.modules_to_save is None else list(self.modules_to_save),
        }


def find(model: nn.Module, section: LoraSection) -> Targets:
    """Find what a lora section adapts on this model.

    Source: https://huggingface.co/docs/peft/package_reference/lora (target_modules, target_parameters).

    Args:
        model: The model, which may be on the meta device.
        section: The section. `target_modules` is a list of roles and names (PEFT's rule: the whole path, or its end
            after a dot), where `q_proj`, `k_proj`, `v_proj`, `o_proj` stand for the roles if the model has no such
            name. Or a string: `all-linear` (every linear layer except the output embedding on which an adapter has an
            effect, with a note on what it leaves out) or a regular expression for whole paths.

    Raises:
        ModelError: Entries match nothing, match modules only in some layers, match modules that LoRA cannot adapt, or
            contradict another entry.
        ConfigError: A regular expression does not compile or takes too long.
    """
    survey = take(model)
    resolver, layers = Resolver(survey), section.layers_to_transform
    by_module = resolver.modules(section.target_modules) if section.target_modules else {}
    by_parameter = resolver.parameters(section.target_parameters or ())
    roles = {entry: (*by_module.get(entry, ()), *by_parameter.get(entry, ())) for entry in [*by_module, *by_parameter]}
    if layers is not None:
        roles = resolver.in_layers(roles, layers)
    chosen = {path for paths in roles.values() for path in paths}
    modules = tuple(path for path in survey.modules if path in chosen)
    parameters = tuple(name for name in survey.parameters if name in chosen)
    targets, saved = (*modules, *parameters), section.modules_to_save
    fused = {module_names.pattern(path): tuple(survey.serves.get(path, "")) for path in modules}
    names, parameter_names = resolver.endings(modules, KEY, layers), resolver.endings(parameters, PARAMETERS_KEY)
    resolver.check_effects(modules)
    found = Targets(
        roles=roles,
        modules=modules,
        names=names,
        fused={place: served for place, served in fused.items() if len(served) > 1},
        rank_pattern=resolver.pattern(targets, section.rank_pattern, "lora.rank_pattern"),
        alpha_pattern=resolver.pattern(targets, section.alpha_pattern, "lora.alpha_pattern"),
        modules_to_save=None if saved is None else resolver.modules_to_save(targets, saved),
        parameters=parameters,
        parameter_names=parameter_names,
    )
    if resolver.problems:
        raise ModelError(resolver.problems)
    return replace(found, notes=tuple(dict.fromkeys([*notes(survey, list(roles), targets), *resolver.notes])))


def notes(survey: Survey, asked: Sequence[str], targets: Sequence[str]) -> list[str]:
    """All notes on the targets of a model.

    Args:
        survey: The model.
        asked: The requested roles, names or `all-linear`.
        targets: Paths of the targets.
    """
    found = _left_out(survey, targets) if "all-linear" in asked else []
    if any(entry in ROLES for entry in asked):
        names = dict.fromkeys(map(module_names.last, targets))
        shared = {name: SHARED_ROLES[name] for name in names if name in SHARED_ROLES}
        found += _hybrid(survey, {*targets})
        found += [f"{name} computes {other} as well, which is adapted with it" for name, other in shared.items()]
    return found + _tied(survey, {*targets})


def _hybrid(survey: Survey, targets: Collection[str]) -> list[str]:
    """A note for hybrid models: which layers have attention, and which mixers are not adapted."""
    free = [path for path in survey.mixers if path not in survey.obstacles and path not in targets]
    if not free:
        return []
    kinds = ", ".join(dict.fromkeys(_kind(survey, survey.mixers[path]) for path in free))
    others = "other " if any(path in targets for path in survey.mixers) else ""
    projections = {id(survey.modules[path]) for path in survey.serves}
    modules = survey.model.named_modules(remove_duplicate=False)
    with_attention = {
        module_names.layer_of(module_names.parent(path)) for path, module in modules if id(module) in projections
    }
    stacks = [survey.modules.get(name) for name in {module_names.parent(layer) for layer in with_attention}]
    layers = sum(len(stack) for stack in stacks if isinstance(stack, nn.ModuleList))
    where = f"all {layers} layers have attention"
    if len(with_attention) < layers:
        where = f"attention is in {len(with_attention)} of {layers} layers"
    names = module_names.join_first(list(dict.fromkeys(map(module_names.short, free))), 6)
    return [f"{where}; the {others}{kinds} modules are not adapted: name them ({names}) to adapt them"]


def _kind(survey: Survey, mixer: str) -> str:
    """The display name of a mixer: its class, if attention has the same module name."""
    name = module_names.own_name(mixer)
    is_attention_name = any(f".{name}." in f".{module_names.parent(path)}." for path in survey.serves)
    return type(survey.modules[mixer]).__name__ if is_attention_name else name


def _tied(survey: Survey, targets: Collection[str]) -> list[str]:
    """Targets that share their weight with another module, such as `lm_head` with the embedding, or whole blocks."""
    owners = [(path, id(weight)) for path, module in survey.modules.items() for weight in module.parameters(False)]
    count = Counter(weight for _, weight in owners)
    tied = {module_names.short(path): None for path, weight in owners if path in targets and count[weight] > 1}
    what = f"{module_names.join_first(list(tied), 6)}: the weight is shared with other modules"
    return [f"{what}; each module has its own adapter, which therefore cannot be merged into the base"] if tied else []


def _left_out(survey: Survey, targets: Sequence[str]) -> list[str]:
    """Notes on the layers that all-linear leaves out, by reason."""
    parts: dict[str, list[str]] = {}
    for path in survey.linears:
        if unused := unused_part(path, survey):
            parts.setdefault(unused[1], []).append(module_names.pattern(unused[0]))
        elif path in survey.obstacles:
            part = module_names.pattern(chooser(path)) or module_names.short(path)
            parts.setdefault(survey.obstacles[path], []).append(part)
    left_out = [name for name in survey.raw if name not in {*targets}]
    experts = [name for name in left_out if name in survey.experts and not parameter_obstacle(survey, name)]
    others = [name for name in left_out if name not in experts]
    hint = f"no linear layers, but experts in one tensor; {PARAMETERS_KEY}: [{EXPERTS}] adapts them"
    parts |= {
        hint: list(short_names(experts)),
        "no linear layers, but tensors of another form": list(short_names(others)),
    }
    return [
        f"all-linear leaves out {module_names.join_first(list(dict.fromkeys(names)), 6)}: {reason}"
        for reason, names in parts.items()
        if names
    ]


def check_tokens(base: nn.Module, section: LoraSection, targeting: Mapping[str, Any]) -> None:
    """Check that the tokens to train exist, and that no other setting adapts their embedding.

    Args:
        base: The model.
        section: The settings of LoRA.
        targeting: As `Targets.peft` gives it.

    Raises:
        ModelError: A token does not exist, or another setting adapts the embedding.
    """
    if section.trainable_token_indices is None or not isinstance(base, PreTrainedModel):
        return
    embedding = base.get_input_embeddings()
    key = "lora.trainable_token_indices"
    for path in (path for path, module in base.named_modules() if getattr(module, "weight", 0) is embedding.weight):
        for other in ("target_modules", "modules_to_save"):
            if any(module_names.ends_in(path, name) for name in targeting.get(other) or ()):
                what, keys = f"both adapt {path}, which holds the embeddings", f"lora.{other} and {key}"
                raise ModelError(Problem(Code.LORA_UNSUPPORTED, what, key=keys, fix="keep one of them"))
    size = embedding.num_embeddings
    if unknown := [token for token in section.trainable_token_indices if token >= size]:
        what, fix = f"the model has no token {', '.join(map(str, unknown[:3]))}", f"ids go from 0 to {size - 1}"
        raise ModelError(Problem(Code.LORA_UNKNOWN_TARGET, what, key=key, fix=fix))
