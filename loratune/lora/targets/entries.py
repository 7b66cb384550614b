"""What the entries of `lora.target_modules` and `lora.modules_to_save` mean on a model, or why they mean nothing; and
those of `rank_pattern` and `alpha_pattern`, which give some of the targets another value.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from loratune.codes import Code
from loratune.config.expressions import BadPatternError, TimeLimit, compile_pattern, matching
from loratune.errors import ConfigError, Problem
from loratune.lora import module_names
from loratune.lora.targets.survey import EXPERTS, ROLES, STOCK, Survey, unused_part

KEY = "lora.target_modules"
SAVED_KEY = "lora.modules_to_save"
_FIX = f"set {KEY} to names from this list, or to all-linear"
_CONTAINERS = nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict
"""PEFT wraps a module to save; these have no forward to wrap (peft.utils.other.ModulesToSaveWrapper)."""

Meaning = tuple[dict[str, tuple[str, ...]], list[Problem]]
"""Entry → paths of modules; problems."""


def by_list(survey: Survey, entries: Sequence[str]) -> Meaning:
    """The meaning of a list of roles and names.

    Raises:
        ConfigError: The list or a name is empty.
    """
    if not entries or not all(entries):
        what, fix = "an empty list or name adapts nothing", "name roles (q, k, v, o) or modules"
        raise ConfigError(Problem(Code.LORA_UNKNOWN_TARGET, what, key=KEY, fix=fix))
    roles: dict[str, tuple[str, ...]] = {}
    problems: list[Problem] = []
    for entry in dict.fromkeys(entries):
        suitable, others = split_adaptable(survey, named(survey, entry))
        role = as_role(survey, entry)
        if role:
            roles[role] = serving(survey, role)
        elif suitable and not others:
            roles[entry] = suitable
        else:
            problems.append(_unsuitable(survey, f"`{entry}`", others) if others else _unknown_name(survey, entry))
    return roles, problems + _role_problems(survey, {role: roles[role] for role in ROLES if role in roles})


def by_string(survey: Survey, text: str) -> Meaning:
    """The meaning of `all-linear`, or of a regular expression for whole paths.

    Raises:
        ConfigError: The expression does not compile, or takes too long.
    """
    if text.lower() == "all-linear":
        paths = tuple(path for path in survey.reachable() if not unused_part(path, survey.modules))
        what = f"all-linear: {survey.architecture} has no linear layer on which LoRA has an effect"
        return {"all-linear": paths}, [] if paths else [Problem(Code.LORA_UNKNOWN_TARGET, what, key=KEY)]
    matches = matching(text, survey.modules, KEY, "q_proj, v_proj")
    suitable, others = split_adaptable(survey, matches)
    if others:
        return {}, [_unsuitable(survey, f"the regular expression `{text}`", others)]
    if suitable:
        return {text: suitable}, []
    what = f"the regular expression `{text}` matches no module's whole path in {survey.architecture}"
    fix = f"match whole paths, such as {next(iter(survey.linears), 'none')}"
    if names := as_names(text):
        fix = f"write a list to name roles or modules, [{names}]; or {fix}"
    return {}, [Problem(Code.LORA_UNKNOWN_TARGET, what, key=KEY, fix=fix)]


def as_names(text: str) -> str:
    """An expression that looks like names, such as `q,k`, as the entries of a list; empty if it does not."""
    names = re.split(r"[\s,|]+", text.strip())
    return ", ".join(names) if all(re.fullmatch(r"[\w.]+", name) for name in names) else ""


def named(survey: Survey, entry: str) -> list[str]:
    """The modules that an entry names; a role is no name."""
    return [] if entry in ROLES else [path for path in survey.modules if module_names.ends_in(path, entry)]


def as_role(survey: Survey, entry: str) -> str | None:
    """The role that an entry means: `q`, or `q_proj` where that is no layer's name (or a container's, as in Moshi)."""
    if entry in ROLES:
        return entry
    suitable, others = split_adaptable(survey, named(survey, entry))
    return None if suitable and not others else STOCK.get(entry)


def serving(survey: Survey, role: str) -> tuple[str, ...]:
    """The modules that serve a role."""
    return tuple(path for path, served in survey.serves.items() if role in served)


def in_layers(roles: dict[str, tuple[str, ...]], layers: Sequence[int]) -> Meaning:
    """Restrict a meaning to the modules of some layers."""
    numbers = {
        path: number
        for paths in roles.values()
        for path in paths
        if (number := module_names.number_of(path)) is not None
    }
    existing = sorted(set(numbers.values()))
    fix = f"the layers with targets are {module_names.ranges(existing)}" if existing else ""
    problems = [
        Problem(Code.LORA_UNKNOWN_TARGET, f"no target in layer {layer}", key="lora.layers_to_transform", fix=fix)
        for layer in sorted(set(layers) - set(existing))
    ]
    return {
        entry: tuple(path for path in paths if numbers.get(path) in layers) for entry, paths in roles.items()
    }, problems


def without_effect(survey: Survey, modules: Iterable[str]) -> list[Problem]:
    """Problems of targets that PEFT would refuse with a traceback, train to no effect, or take for something else."""
    reasons = {module_names.short(path): survey.obstacles[path] for path in modules if path in survey.obstacles}
    return [
        Problem(Code.LORA_UNSUPPORTED, f"`{name}`: {reason}", key=KEY, fix="leave it out")
        for name, reason in reasons.items()
    ]


def split_adaptable(survey: Survey, paths: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split paths into those of a kind that LoRA adapts, and the others."""
    suits = {path: isinstance(survey.modules[path], nn.Linear | Conv1D | nn.Embedding) for path in paths}
    return tuple(path for path in suits if suits[path]), tuple(path for path in suits if not suits[path])


def _role_problems(survey: Survey, roles: dict[str, tuple[str, ...]]) -> list[Problem]:
    raw = f"; these weights of its attention are no linear layers: {', '.join(survey.raw_attention)}"
    raw = raw if survey.raw_attention else ""
    if roles and not survey.layers:
        what = f"{survey.architecture} has no attention in which roles (q, k, v, o) could be found"
        return [Problem(Code.LORA_UNKNOWN_TARGET, f"{what}{raw}; {survey.candidates()}", key=KEY, fix=_FIX)]
    problems = [problem for role in roles if roles[role] for problem in _layers_without(survey, role)]
    absent = ", ".join(f"`{role}`" for role in roles if not roles[role])
    if absent:
        what = f"role {absent}: nothing in the attention of {survey.architecture} is known to serve it"
        existing = survey.existing_roles()
        fix = f"ask for [{', '.join(existing)}] alone; or {_FIX}" if existing else _FIX
        problems.append(Problem(Code.LORA_UNKNOWN_TARGET, f"{what}{raw}; {survey.candidates()}", key=KEY, fix=fix))
    return problems


def _layers_without(survey: Survey, role: str) -> list[Problem]:
    """A layer whose projections are all known simply lacks the role (shared keys, say); an unknown one may serve it."""
    lacking = {
        layer: [path.removeprefix(f"{layer}.") for path in inside if not survey.serves[path]]
        for layer, inside in survey.layers.items()
        if not any(role in survey.serves[path] for path in inside)
    }
    unclear = [f"{layer} (unknown there: {', '.join(unknown)})" for layer, unknown in lacking.items() if unknown]
    if not unclear:
        return []
    layers = f"in {len(survey.layers) - len(lacking)} of {len(survey.layers)} attention layers"
    what = f"role `{role}`: {survey.architecture} has it {layers}, and not in {module_names.join_first(unclear, 4)}"
    return [Problem(Code.LORA_UNKNOWN_TARGET, f"{what}; {survey.candidates()}", key=KEY, fix=_FIX)]


def _unsuitable(survey: Survey, entry: str, others: tuple[str, ...]) -> Problem:
    examples = module_names.join_first([f"{path} ({type(survey.modules[path]).__name__})" for path in others], 3)
    what = f"{entry} matches {examples}, which LoRA does not adapt; {survey.candidates()}"
    return Problem(Code.LORA_UNSUPPORTED, what, key=KEY, fix="match linear layers only")


def _unknown_name(survey: Survey, entry: str) -> Problem:
    what = f"`{entry}` matches no module of {survey.architecture}; {nearest(survey, entry)}"
    alone = "auto, all-linear or a regular expression stands alone, without brackets"
    fix = f"a list holds roles (q, k, v, o) and names; {alone}"
    return Problem(Code.LORA_UNKNOWN_TARGET, what, key=KEY, fix=fix)


def nearest(survey: Survey, entry: str) -> str:
    """What could have been meant: `nearest: q_proj`, or all that there is."""
    # Compared with endings that have as many parts: `attn.q_prj` is near `attn.q_proj`, not near `q_proj`.
    depth = entry.count(".")
    endings = {tail for path in survey.linears for tail in module_names.tails(path) if tail.count(".") == depth}
    near = difflib.get_close_matches(entry, sorted(endings), n=3, cutoff=0.5)
    return f"nearest: {', '.join(near)}" if near else survey.candidates()


# --- modules_to_save


def modules_to_save(
    survey: Survey, targets: Sequence[str], entries: Sequence[str]
) -> tuple[list[str], list[Problem], list[str]]:
    """The names that make PEFT copy exactly the modules meant.

    PEFT copies every module whose path ends in the name, letter by letter, so that `head` is `overhead` too, and leaves
    out all targets within a copy (peft.utils.other._set_trainable, check_target_module_exists).

    Args:
        survey: The model.
        targets: Paths of the targets.
        entries: Roles and endings of paths.

    Returns:
        The names; problems; notes for the user.
    """
    chosen: dict[str, None] = {}
    problems: list[Problem] = []
    for entry in entries:
        role = as_role(survey, entry)
        paths = serving(survey, role) if role else tuple(named(survey, entry) if entry else ())
        chosen |= dict.fromkeys(paths)
        problems += _saving_problems(survey, targets, entry, paths)
    outer = [path for path in chosen if not any(path.startswith(f"{other}.") for other in chosen)]
    names, ambiguous = _saved_names(survey, outer)
    if not problems:
        problems = [_excluded_problem(path, name) for path in targets for name in names if _excludes(name, path)]
    return names, problems + ambiguous, _untied(survey, outer)


def _excludes(name: str, path: str) -> bool:
    """Whether PEFT gives a target no adapter because of a name in modules_to_save, in which a dot matches any letter.

    Its rule: check_target_module_exists.
    """
    return re.match(rf"(^|.*\.){name}($|\..*)", path) is not None


def _excluded_problem(path: str, name: str) -> Problem:
    what = f"PEFT takes the target {path} for `{name}`"
    return Problem(Code.LORA_UNSUPPORTED, what, key=SAVED_KEY, fix="save both or neither")


def _saving_problems(survey: Survey, targets: Sequence[str], entry: str, paths: Sequence[str]) -> list[Problem]:
    if not paths:
        end = entry.rpartition(".")[2].lower()
        similar = [path for path in survey.modules if end and end in path.rpartition(".")[2].lower()]
        near = f"it has {module_names.join_counts(similar, 6)}" if similar else nearest(survey, entry)
        what = f"`{entry}` is no module of {survey.architecture}; {near}"
        fix = "name a module by its path or the end of it"
        return [Problem(Code.LORA_UNKNOWN_TARGET, what, key=SAVED_KEY, fix=fix)]
    within = [path for path in targets if any(f"{path}.".startswith(f"{outer}.") for outer in paths)]
    inside = [path for path in paths if any(path.startswith(f"{target}.") for target in targets)]
    if within or inside:
        examples = module_names.join_counts(within or inside, 3)
        what = f"`{entry}` is or holds targets ({examples}), which would get no adapter"
        return [Problem(Code.LORA_UNSUPPORTED, what, key=SAVED_KEY, fix=f"leave it out here or in {KEY}")]
    return [problem for path in paths for problem in _untrainable(survey, entry, path)][:1]


def _untrainable(survey: Survey, entry: str, path: str) -> list[Problem]:
    module = survey.modules[path]
    weights = list(module.parameters())
    if isinstance(module, _CONTAINERS):
        code, what, fix = Code.LORA_UNSUPPORTED, f"`{entry}` is a list of modules", "name one of them"
    elif not weights:
        what, fix = f"`{entry}` ({type(module).__name__}) has no parameters to train", "leave it out"
        code = Code.LORA_UNSUPPORTED
    elif not all(weight.is_floating_point() for weight in weights):
        what, fix = f"`{entry}` is quantized, and cannot be trained whole", "leave it out"
        code = Code.LORA_UNSUPPORTED
    else:
        return []
    return [Problem(code, what, key=SAVED_KEY, fix=fix)]


def _saved_names(survey: Survey, chosen: Sequence[str]) -> tuple[list[str], list[Problem]]:
    every = [path for path, _ in survey.model.named_modules(remove_duplicate=False) if path]
    names: list[str] = []
    problems: list[Problem] = []
    chosen_ids = {id(survey.modules[path]) for path in chosen}
    wanted = {path for path, module in survey.model.named_modules(remove_duplicate=False) if id(module) in chosen_ids}
    for path in chosen:
        if any(path.endswith(name) for name in names):
            continue
        matches = {tail: [other for other in every if other.endswith(tail)] for tail in module_names.tails(path)}
        name = next((tail for tail, paths in matches.items() if wanted.issuperset(paths)), None)
        if name:
            names.append(name)
        else:
            others = module_names.join_first([other for other in matches[path] if other not in wanted], 2)
            what, fix = f"PEFT cannot tell {path} from {others}", "save both or neither"
            problems.append(Problem(Code.LORA_UNSUPPORTED, what, key=SAVED_KEY, fix=fix))
    return sorted(names), problems


def _untied(survey: Survey, chosen: Sequence[str]) -> list[str]:
    """Notes on tied weights that become separate: PEFT trains a copy, and the other module keeps the base's weight."""
    notes: dict[frozenset[str], str] = {}
    for path in chosen:
        own = {id(weight) for weight in survey.modules[path].parameters()}
        for other, module in survey.modules.items():
            is_tied = any(id(weight) in own for weight in module.parameters(recurse=False))
            if is_tied and not f"{other}.".startswith(f"{path}."):
                effect = "they are trained separately" if other in chosen else f"{other} keeps the one of the base"
                note = f"modules_to_save: {path} and {other} share one weight in the base; {effect}"
                notes.setdefault(frozenset((path, other)), note)
    return list(notes.values())


def resolve_pattern(
    survey: Survey, targets: Sequence[str], pattern: Mapping[str, int], key: str
) -> tuple[dict[str, int], list[Problem], list[str]]:
    """The pattern for PEFT that gives each target exactly its value.

    PEFT takes the first entry for which `re.match(rf"(.*\\.)?({entry})$", path)` (peft.utils.get_pattern_key).

    Args:
        survey: The model.
        targets: Paths of the targets.
        pattern: The mapping of the section.
        key: Its key, for messages.

    Returns:
        The pattern; problems; notes for the user.

    Raises:
        ConfigError: A regular expression does not compile, or takes too long.
    """
    problems: list[Problem] = []
    values: dict[str, dict[str, int]] = {}
    notes: list[str] = []
    for entry, paths in _meanings(survey, targets, pattern, key).items():
        role, value = as_role(survey, entry), pattern[entry]
        for path in paths:
            values.setdefault(path, {})[entry] = value
        if not paths:
            problems.append(_no_target(survey, targets, entry, key))
        elif role:
            notes += _shared_roles(survey, paths, role, value, key)
    problems += _contradictions(survey, values, key)
    return _escaped(targets, {path: next(iter(of.values())) for path, of in values.items()}), problems, notes


def _meanings(survey: Survey, targets: Sequence[str], pattern: Iterable[str], key: str) -> dict[str, list[str]]:
    """Entry → the targets that it means. Raises ConfigError: an expression that is none, or takes too long."""
    meanings: dict[str, list[str]] = {}
    entry, limit = "", TimeLimit()
    try:
        for entry in pattern:
            meanings[entry] = _meaning(survey, targets, entry, as_role(survey, entry), limit)
    except BadPatternError as error:
        what = f"`{entry}` {error}"
        raise ConfigError(Problem(Code.LORA_UNSUPPORTED, what, key=key, fix="correct it")) from None
    return meanings


def _meaning(survey: Survey, targets: Sequence[str], entry: str, role: str | None, limit: TimeLimit) -> list[str]:
    """The targets that an entry means. Raises BadPatternError."""
    if role:
        return [path for path in targets if role in survey.serves.get(path, "")]
    if entry == EXPERTS and (experts := [path for path in targets if path in survey.experts]):
        return experts
    if named(survey, entry):
        return [path for path in targets if module_names.ends_in(path, entry)]
    expression = compile_pattern(rf"(.*\.)?({entry})$")
    return [path for path in targets if limit(expression.match, path)]


def _no_target(survey: Survey, targets: Sequence[str], entry: str, key: str) -> Problem:
    what = f"`{entry}` is no target" if named(survey, entry) else f"`{entry}` matches none of the targets"
    if entry in ROLES:
        what = f"role `{entry}` is served by none of the targets"
    what += f"; the targets are {module_names.join_counts(targets, 12)}"
    return Problem(Code.LORA_UNKNOWN_TARGET, what, key=key, fix=f"use one of these, or add it to {KEY}")


def _contradictions(survey: Survey, values: Mapping[str, Mapping[str, int]], key: str) -> list[Problem]:
    problems: dict[str, Problem] = {}
    for path, of in values.items():
        if len(set(of.values())) > 1:
            name = module_names.short(path)
            served = survey.serves.get(path, "")
            fused = f", one module for {', '.join(served)}," if len(served) > 1 else ""
            sources = ", ".join(f"{value} by `{entry}`" for entry, value in of.items())
            what = f"{name}{fused} is given {sources}"
            problems.setdefault(name, Problem(Code.LORA_UNSUPPORTED, what, key=key, fix="give it one value"))
    return list(problems.values())


def _shared_roles(survey: Survey, paths: Sequence[str], role: str, value: int, key: str) -> list[str]:
    """Notes on other roles that a value applies to, because a module serves several."""
    name = key.removeprefix("lora.")
    fused = {module_names.short(path): survey.serves[path] for path in paths if len(survey.serves[path]) > 1}
    return [
        f"{name}: {value} for {role} applies to {', '.join(other for other in served if other != role)} too, "
        f"which {module} serves as well"
        for module, served in fused.items()
    ]


def _escaped(targets: Sequence[str], values: Mapping[str, int]) -> dict[str, int]:
    pattern: dict[str, int] = {}
    for value in dict.fromkeys(values.values()):
        names, ambiguous = module_names.endings([path for path in values if values[path] == value], targets)
        # A whole path that is the end of another: PEFT allows anything before a dot, so the dot distinguishes them.
        pattern |= dict.fromkeys([re.escape(name) for name in names], value)
        pattern |= dict.fromkeys([rf"(?<!\.){re.escape(path)}" for path in ambiguous], value)
    return dict(sorted(pattern.items()))
