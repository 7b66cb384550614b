"""What is lawful and may surprise: layers that roles leave alone, and what all-linear cannot reach."""

from collections import Counter
from collections.abc import Sequence

from torch import nn

from loratune.lora import module_names
from loratune.lora.targets import reach
from loratune.lora.targets.names import ROLES, SHARED_ROLES
from loratune.lora.targets.survey import Survey


def of_roles(survey: Survey, roles: Sequence[str], modules: Sequence[str]) -> list[str]:
    """On a hybrid model: where attention is, and which mixers stay as they are.

    roles: the entries that were asked for; modules: all targets.
    """
    adapted = set(modules)
    free = [path for path in survey.mixers if path not in survey.obstacles and path not in adapted]
    if not free or not any(role in ROLES for role in roles):
        return []
    kinds = ", ".join(dict.fromkeys(_kind(survey, survey.mixers[path]) for path in free))
    others = "other " if any(path in adapted for path in survey.mixers) else ""
    there, every = _attention_layers(survey)
    where = f"attention is in {there} of {every} layers" if there < every else f"all {every} layers have attention"
    names = module_names.few(list(dict.fromkeys(map(module_names.short, free))), 6)
    return [f"{where}; the {others}{kinds} modules stay as they are: name them ({names}) to adapt them"]


def of_fused(roles: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Targets that compute something besides their roles, which is adapted along with them. Arguments as above."""
    names = dict.fromkeys(module_names.last(path) for path in modules) if any(role in ROLES for role in roles) else {}
    shared = [name for name in names if name in SHARED_ROLES]
    return [f"{name} computes {SHARED_ROLES[name]} as well, which comes along" for name in shared]


def _kind(survey: Survey, mixer: str) -> str:
    """What a mixer is called: by its class, where attention has the same name."""
    name = module_names.own_name(mixer)
    taken = any(f".{name}." in f".{module_names.parent(path)}." for path in survey.serves)
    return type(survey.modules[mixer]).__name__ if taken else name


def of_tied(survey: Survey, modules: Sequence[str]) -> list[str]:
    """Targets that share their weight with another module, such as `lm_head` with the embedding, or whole blocks."""
    owners = [(path, id(weight)) for path, module in survey.modules.items() for weight in module.parameters(False)]
    total = Counter(weight for _, weight in owners)
    adapted = set(modules)
    tied = {module_names.short(path): None for path, weight in owners if path in adapted and total[weight] > 1}
    if not tied:
        return []
    what = f"{module_names.few(list(tied), 6)}: the weight belongs to further modules"
    return [f"{what}; each module has its own adapter, which therefore cannot be merged into the base"]


def _attention_layers(survey: Survey) -> tuple[int, int]:
    """How many layers attend, and how many there are, in the stacks where attention is."""
    attending = {id(survey.modules[path]) for path in survey.serves}
    everywhere = survey.model.named_modules(remove_duplicate=False)
    layers = {
        module_names.layer_of(module_names.parent(path)) for path, module in everywhere if id(module) in attending
    }
    stacks = {module_names.parent(layer) for layer in layers}
    sizes = [len(stack) for name in stacks if isinstance(stack := survey.modules.get(name), nn.ModuleList)]
    return len(layers), sum(sizes)


def of_all_linear(survey: Survey) -> list[str]:
    """What all-linear leaves out, by reason."""
    left: dict[str, list[str]] = {}
    for path in survey.linears:
        if apart := reach.idle(path, survey.modules):
            left.setdefault(apart[1], []).append(module_names.pattern(apart[0]))
        elif path in survey.obstacles:
            where = module_names.pattern(reach.chooser(path)) or module_names.short(path)
            left.setdefault(survey.obstacles[path], []).append(where)
    if survey.raw:
        left["no linear layers, but tensors of another form"] = list(survey.raw)
    return [
        f"all-linear leaves out {module_names.few(list(dict.fromkeys(where)), 6)}: {reason}"
        for reason, where in left.items()
    ]
