"""`modules_to_save`: modules that are trained and saved whole, beside the adapter."""

import re
from collections.abc import Sequence

from torch import nn

from loratune.errors import Problem
from loratune.lora import module_names
from loratune.lora.targets import entries
from loratune.lora.targets.survey import Survey

KEY = "lora.modules_to_save"

# PEFT wraps a module to copy it; a container has no forward to wrap (peft.utils.other.ModulesToSaveWrapper).
_CONTAINERS = nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict


def names(survey: Survey, modules: Sequence[str], asked: Sequence[str]) -> tuple[list[str], list[Problem], list[str]]:
    """The names that make PEFT copy exactly the modules meant; problems; notes.

    modules: the targets. asked: roles and path endings.
    PEFT copies every module whose path ends in the name, letter by letter, so that `head` is `overhead` too, and
    leaves all targets out that a copy holds (peft.utils.other._set_trainable, check_target_module_exists).
    """
    chosen: dict[str, None] = {}
    problems: list[Problem] = []
    for entry in asked:
        role = entries.as_role(survey, entry)
        found = entries.serving(survey, role) if role else tuple(entries.named(survey, entry) if entry else ())
        chosen |= dict.fromkeys(found)
        problems += _problems(survey, modules, entry, found)
    outer = [path for path in chosen if not any(path.startswith(f"{other}.") for other in chosen)]
    result, accidental = _names(survey, outer)
    if not problems:
        problems = [_hidden(path, name) for path in modules for name in result if _excludes(name, path)]
    return result, problems + accidental, _notes(survey, outer)


def _excludes(name: str, path: str) -> bool:
    """PEFT's rule (check_target_module_exists), in which a dot stands for any letter."""
    return re.match(rf"(^|.*\.){name}($|\..*)", path) is not None


def _hidden(path: str, name: str) -> Problem:
    return Problem(f"PEFT takes the target {path} for `{name}`", key=KEY, fix="save both or neither")


def _problems(survey: Survey, modules: Sequence[str], entry: str, found: Sequence[str]) -> list[Problem]:
    if not found:
        what = f"`{entry}` is no module of {survey.architecture}; {_near(survey, entry)}"
        return [Problem(what, key=KEY, fix="name a module by its path or the end of it")]
    clash = [path for path in modules if any(f"{path}.".startswith(f"{whole}.") for whole in found)]
    inside = [path for path in found if any(path.startswith(f"{target}.") for target in modules)]
    if clash or inside:
        what = f"`{entry}` is or holds targets ({module_names.counted(clash or inside, 3)}), which would get no adapter"
        return [Problem(what, key=KEY, fix=f"leave it out here or in {entries.KEY}")]
    return [problem for path in found for problem in _untrainable(survey, entry, path)][:1]


def _untrainable(survey: Survey, entry: str, path: str) -> list[Problem]:
    module = survey.modules[path]
    if isinstance(module, _CONTAINERS):
        return [Problem(f"`{entry}` is a list of modules", key=KEY, fix="name one of them")]
    weights = list(module.parameters())
    if not weights:
        return [Problem(f"`{entry}` ({type(module).__name__}) has no parameters to train", key=KEY, fix="leave it out")]
    if not all(weight.is_floating_point() for weight in weights):
        return [Problem(f"`{entry}` is quantized, and cannot be trained whole", key=KEY, fix="leave it out")]
    return []


def _near(survey: Survey, entry: str) -> str:
    end = entry.rpartition(".")[2].lower()
    like = [path for path in survey.modules if end and end in path.rpartition(".")[2].lower()]
    return f"it has {module_names.counted(like, 6)}" if like else entries.nearest(survey, entry)


def _names(survey: Survey, chosen: Sequence[str]) -> tuple[list[str], list[Problem]]:
    every = [path for path, _ in survey.model.named_modules(remove_duplicate=False) if path]
    result: list[str] = []
    problems: list[Problem] = []
    same = {id(survey.modules[path]) for path in chosen}
    wanted = {path for path, module in survey.model.named_modules(remove_duplicate=False) if id(module) in same}
    for path in chosen:
        if any(path.endswith(name) for name in result):
            continue
        hits = {tail: [other for other in every if other.endswith(tail)] for tail in module_names.tails(path)}
        name = next((tail for tail, hit in hits.items() if wanted.issuperset(hit)), None)
        if name:
            result.append(name)
        else:
            what = f"PEFT cannot tell {path} from {module_names.few([p for p in hits[path] if p not in wanted], 2)}"
            problems.append(Problem(what, key=KEY, fix="save both or neither"))
    return sorted(result), problems


def _notes(survey: Survey, chosen: Sequence[str]) -> list[str]:
    """Tied weights come apart: PEFT trains a copy, and the other module keeps the weight of the base."""
    notes: dict[frozenset[str], str] = {}
    for path in chosen:
        mine = {id(weight) for weight in survey.modules[path].parameters()}
        for other, module in survey.modules.items():
            shares = any(id(weight) in mine for weight in module.parameters(recurse=False))
            if shares and not f"{other}.".startswith(f"{path}."):
                apart = "they are trained apart" if other in chosen else f"{other} keeps the one of the base"
                notes.setdefault(
                    frozenset((path, other)),
                    f"modules_to_save: {path} and {other} share one weight in the base; {apart}",
                )
    return list(notes.values())
