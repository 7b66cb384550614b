"""Notes for the user on targets that may surprise: layers that roles do not adapt, and what all-linear leaves out."""

from collections import Counter
from collections.abc import Sequence

from torch import nn

from loratune.lora import module_names
from loratune.lora.targets.names import ROLES, SHARED_ROLES
from loratune.lora.targets.survey import Survey, chooser, unused_part


def notes(survey: Survey, entries: Sequence[str], targets: Sequence[str]) -> list[str]:
    """All notes on the targets of a model.

    Args:
        survey: The model.
        entries: The roles, names or `all-linear` that led to the targets.
        targets: Paths of the targets.
    """
    coverage = _left_out(survey) if "all-linear" in entries else _hybrid(survey, entries, targets)
    return [*coverage, *_shared(entries, targets), *_tied(survey, targets)]


def _hybrid(survey: Survey, entries: Sequence[str], targets: Sequence[str]) -> list[str]:
    """On a hybrid model: where attention is, and which mixers are not adapted."""
    adapted = set(targets)
    free = [path for path in survey.mixers if path not in survey.obstacles and path not in adapted]
    if not free or not any(entry in ROLES for entry in entries):
        return []
    kinds = ", ".join(dict.fromkeys(_kind(survey, survey.mixers[path]) for path in free))
    others = "other " if any(path in adapted for path in survey.mixers) else ""
    attending, every = _attention_layers(survey)
    where = (
        f"attention is in {attending} of {every} layers" if attending < every else f"all {every} layers have attention"
    )
    names = module_names.few(list(dict.fromkeys(map(module_names.short, free))), 6)
    return [f"{where}; the {others}{kinds} modules are not adapted: name them ({names}) to adapt them"]


def _kind(survey: Survey, mixer: str) -> str:
    """What a mixer is called: its class, where attention has the same name."""
    name = module_names.own_name(mixer)
    is_taken = any(f".{name}." in f".{module_names.parent(path)}." for path in survey.serves)
    return type(survey.modules[mixer]).__name__ if is_taken else name


def _attention_layers(survey: Survey) -> tuple[int, int]:
    """How many layers attend, and how many there are, in the stacks that have attention."""
    attending = {id(survey.modules[path]) for path in survey.serves}
    modules = survey.model.named_modules(remove_duplicate=False)
    layers = {module_names.layer_of(module_names.parent(path)) for path, module in modules if id(module) in attending}
    stacks = {module_names.parent(layer) for layer in layers}
    sizes = [len(stack) for name in stacks if isinstance(stack := survey.modules.get(name), nn.ModuleList)]
    return len(layers), sum(sizes)


def _shared(entries: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Targets that compute something besides their roles, which is adapted with them."""
    names = dict.fromkeys(map(module_names.last, targets)) if any(entry in ROLES for entry in entries) else {}
    return [
        f"{name} computes {SHARED_ROLES[name]} as well, which is adapted with it"
        for name in names
        if name in SHARED_ROLES
    ]


def _tied(survey: Survey, targets: Sequence[str]) -> list[str]:
    """Targets that share their weight with another module, such as `lm_head` with the embedding, or whole blocks."""
    owners = [(path, id(weight)) for path, module in survey.modules.items() for weight in module.parameters(False)]
    count = Counter(weight for _, weight in owners)
    adapted = set(targets)
    tied = {module_names.short(path): None for path, weight in owners if path in adapted and count[weight] > 1}
    if not tied:
        return []
    what = f"{module_names.few(list(tied), 6)}: the weight is shared with other modules"
    return [f"{what}; each module has its own adapter, which therefore cannot be merged into the base"]


def _left_out(survey: Survey) -> list[str]:
    """What all-linear leaves out, by reason."""
    parts: dict[str, list[str]] = {}
    for path in survey.linears:
        if unused := unused_part(path, survey.modules):
            parts.setdefault(unused[1], []).append(module_names.pattern(unused[0]))
        elif path in survey.obstacles:
            part = module_names.pattern(chooser(path)) or module_names.short(path)
            parts.setdefault(survey.obstacles[path], []).append(part)
    if survey.raw:
        parts["no linear layers, but tensors of another form"] = list(survey.raw)
    return [
        f"all-linear leaves out {module_names.few(list(dict.fromkeys(names)), 6)}: {reason}"
        for reason, names in parts.items()
    ]
