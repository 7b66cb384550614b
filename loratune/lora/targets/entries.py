"""Resolves the entries of a lora section on a model, with an error for entries that match nothing.

`target_modules` and `modules_to_save` name modules, `target_parameters` names tensors that belong to no linear layer:
transformers keeps the projections of all experts of a layer in one tensor of three dimensions. PEFT adds to such a
tensor the product of an A and a B for each expert (peft.tuners.lora.ParamWrapper). `rank_pattern` and `alpha_pattern`
give some of the targets another value.
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
from loratune.lora.module_names import ends_in, join_counts, join_first
from loratune.lora.targets.survey import EXPERTS, ROLES, STOCK, Survey, parameter_obstacle, short_names, unused_part

KEY = "lora.target_modules"
PARAMETERS_KEY = "lora.target_parameters"
SAVED_KEY = "lora.modules_to_save"
_FIX = f"set {KEY} to names from this list, or to all-linear"
_LISTS = {KEY: ("roles or modules", "q_proj, v_proj"), PARAMETERS_KEY: ("parameters", EXPERTS)}
"""Key → what a list of it names, and an example."""

Meaning = tuple[dict[str, tuple[str, ...]], list[Problem]]
"""Entry → paths; problems."""


def modules(survey: Survey, wanted: Sequence[str] | str) -> Meaning:
    """What `lora.target_modules` means: roles and names, `all-linear`, or a regular expression for whole paths.

    Raises:
        ConfigError: The list or a name is empty; the expression does not compile, or takes too long.
    """
    roles: dict[str, tuple[str, ...]] = {}
    problems: list[Problem] = []
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        roles["all-linear"] = tuple(path for path in survey.reachable() if not unused_part(path, survey.modules))
        what = f"all-linear: {survey.architecture} has no linear layer on which LoRA has an effect"
        return roles, [] if roles["all-linear"] else [Problem(Code.LORA_UNSUPPORTED, what, key=KEY)]
    if isinstance(wanted, str):
        roles, problems = _by_expression(survey, wanted, survey.modules, survey.linears, KEY)
    else:
        _check_not_empty(wanted, KEY)
    for entry in dict.fromkeys(() if isinstance(wanted, str) else wanted):
        if role := as_role(survey, entry):
            roles[role] = _serving(survey, role)
        elif matches := named(survey, entry):
            roles[entry] = tuple(matches)
        else:
            what = f"`{entry}` matches no module of {survey.architecture}; {_nearest(survey, entry)}"
            alone = "auto, all-linear or a regular expression is written without brackets"
            fix = f"a list holds roles (q, k, v, o) and names; {alone}"
            problems.append(Problem(Code.LORA_UNKNOWN_TARGET, what, key=KEY, fix=fix))
    for entry, paths in roles.items():
        if others := [path for path in paths if not _is_adaptable(survey, path)]:
            examples = join_first([f"{path} ({type(survey.modules[path]).__name__})" for path in others], 3)
            what = f"`{entry}` matches {examples}, which LoRA does not adapt; {survey.candidates()}"
            problems.append(Problem(Code.LORA_UNSUPPORTED, what, key=KEY, fix="match linear layers only"))
    asked = {role: roles[role] for role in ROLES if role in roles and not isinstance(wanted, str)}
    return roles, problems + _role_problems(survey, asked)


def parameters(survey: Survey, wanted: Sequence[str] | str) -> Meaning:
    """What `lora.target_parameters` means: the role `experts` and names, or a regular expression for whole names.

    Raises:
        ConfigError: A name is empty; the expression does not compile, or takes too long.
    """
    roles: dict[str, tuple[str, ...]] = {}
    problems: list[Problem] = []
    if isinstance(wanted, str) and wanted != EXPERTS:
        known = survey.experts or survey.raw or tuple(survey.parameters)
        roles, problems = _by_expression(survey, wanted, survey.parameters, known, PARAMETERS_KEY)
        wanted = ()
    wanted = [wanted] if isinstance(wanted, str) else wanted
    if wanted:
        _check_not_empty(wanted, PARAMETERS_KEY)
    for entry in dict.fromkeys(wanted):
        paths = tuple(name for name in survey.parameters if ends_in(name, entry))
        if paths := survey.experts if entry == EXPERTS and not paths else paths:
            roles[entry] = paths
        else:
            problems.append(_unknown_parameter(survey, entry))
    found: dict[tuple[str, str], list[str]] = {}
    for entry, name in ((entry, name) for entry, names in roles.items() for name in names):
        if reason := parameter_obstacle(survey, name):
            found.setdefault((entry, reason), []).append(name)
    for (entry, reason), names in found.items():
        what = f"`{entry}` matches {join_first(names, 2)}: {reason}"
        problems.append(Problem(Code.LORA_UNSUPPORTED, what, key=PARAMETERS_KEY, fix="leave it out"))
    return roles, problems


def _check_not_empty(entries: Sequence[str], key: str) -> None:
    if not entries or not all(entries):
        what, fix = "an empty list or name adapts nothing", f"name {_LISTS[key][0]}"
        raise ConfigError(Problem(Code.LORA_UNKNOWN_TARGET, what, key=key, fix=fix))


def _by_expression(survey: Survey, text: str, names: Iterable[str], known: Sequence[str], key: str) -> Meaning:
    """The meaning of a regular expression for whole paths. known: paths to show where it matches none."""
    nouns, example = _LISTS[key]
    if paths := tuple(matching(text, names, key, example)):
        return {text: paths}, []
    noun = "module's whole path" if key == KEY else "parameter's whole name"
    what = f"the regular expression `{text}` matches no {noun} in {survey.architecture}"
    fix = f"match whole {'paths' if key == KEY else 'names'}, such as {next(iter(known), 'none')}"
    words = re.split(r"[\s,|]+", text.strip())
    if all(re.fullmatch(r"[\w.]+", word) for word in words):  # such as `q,k`
        fix = f"write a list to name {nouns}, [{', '.join(words)}]; or {fix}"
    return {}, [Problem(Code.LORA_UNKNOWN_TARGET, what, key=key, fix=fix)]


def _unknown_parameter(survey: Survey, entry: str) -> Problem:
    """An entry that names nothing, with what could have been meant."""
    if entry == EXPERTS:
        what = f"role `{EXPERTS}`: {survey.architecture} has no tensors that hold the experts of a layer"
        linear = [path for path in survey.reachable() if re.search(r"(^|\.)experts\.", path)]
        names = join_first(list(dict.fromkeys(map(module_names.last, linear))), 4)
        fix = f"its experts are linear layers: name them in {KEY} ({names})" if linear else "leave it out"
        return Problem(Code.LORA_UNKNOWN_TARGET, what, key=PARAMETERS_KEY, fix=fix)
    candidates = [name for name in survey.parameters if not parameter_obstacle(survey, name)]
    others = f"those that can be: {join_first(short_names(candidates), 6) or 'none'}"
    suggestion = _nearest(survey, entry, candidates, others)
    what = f"`{entry}` matches no parameter of {survey.architecture}; {suggestion}"
    fix = f"a list holds the role {EXPERTS} and names; a regular expression is written without brackets"
    return Problem(Code.LORA_UNKNOWN_TARGET, what, key=PARAMETERS_KEY, fix=fix)


def named(survey: Survey, entry: str) -> list[str]:
    """The modules that an entry names; roles name none."""
    return [] if entry in ROLES or not entry else [path for path in survey.modules if ends_in(path, entry)]


def as_role(survey: Survey, entry: str) -> str | None:
    """The role that an entry means: `q`, or `q_proj` where no layer has that name (or a container's, as in Moshi)."""
    if entry in ROLES:
        return entry
    paths = named(survey, entry)
    return None if paths and all(_is_adaptable(survey, path) for path in paths) else STOCK.get(entry)


def _serving(survey: Survey, role: str) -> tuple[str, ...]:
    return tuple(path for path, served in survey.serves.items() if role in served)


def _is_adaptable(survey: Survey, path: str) -> bool:
    return isinstance(survey.modules[path], nn.Linear | Conv1D | nn.Embedding)


def _nearest(survey: Survey, entry: str, paths: Iterable[str] | None = None, otherwise: str = "") -> str:
    """What could have been meant, such as `nearest: q_proj`; else all linear modules."""
    # Compared with endings that have as many parts: `attn.q_prj` is near `attn.q_proj`, not near `q_proj`.
    depth = entry.count(".")
    known = survey.linears if paths is None else paths
    endings = {tail for path in known for tail in module_names.tails(path) if tail.count(".") == depth}
    near = difflib.get_close_matches(entry, sorted(endings), n=3, cutoff=0.5)
    return f"nearest: {', '.join(near)}" if near else otherwise or survey.candidates()


def in_layers(roles: dict[str, tuple[str, ...]], layers: Sequence[int]) -> Meaning:
    """Restrict a meaning to the modules of some layers."""
    numbers = {path: module_names.number_of(path) for paths in roles.values() for path in paths}
    existing = sorted({number for number in numbers.values() if number is not None})
    fix = f"the layers with targets are {module_names.ranges(existing)}" if existing else ""
    problems = [
        Problem(Code.LORA_UNKNOWN_TARGET, f"no target in layer {layer}", key="lora.layers_to_transform", fix=fix)
        for layer in sorted(set(layers) - set(existing))
    ]
    kept = {entry: tuple(path for path in paths if numbers[path] in layers) for entry, paths in roles.items()}
    return kept, problems


def without_effect(survey: Survey, paths: Iterable[str]) -> list[Problem]:
    """Problems of targets that PEFT would refuse with a traceback, train to no effect, or take for something else."""
    reasons = {module_names.short(path): survey.obstacles[path] for path in paths if path in survey.obstacles}
    return [
        Problem(Code.LORA_UNSUPPORTED, f"`{name}`: {reason}", key=KEY, fix="leave it out")
        for name, reason in reasons.items()
    ]


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
        existing = [role for role in ROLES if _serving(survey, role)]
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
    what = f"role `{role}`: {survey.architecture} has it {layers}, and not in {join_first(unclear, 4)}"
    return [Problem(Code.LORA_UNKNOWN_TARGET, f"{what}; {survey.candidates()}", key=KEY, fix=_FIX)]


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
        paths = list(_serving(survey, role)) if role else named(survey, entry)
        chosen |= dict.fromkeys(paths)
        problems += _saving_problems(survey, targets, entry, paths)
    outer = [path for path in chosen if not any(path.startswith(f"{other}.") for other in chosen)]
    every = dict(survey.model.named_modules(remove_duplicate=False))
    chosen_ids = {id(survey.modules[path]) for path in outer}
    names: list[str] = []
    for path in outer:
        if any(path.endswith(name) for name in names):
            continue
        matches = {tail: [other for other in every if other.endswith(tail)] for tail in module_names.tails(path)}
        wrong = {tail: [p for p in paths if id(every[p]) not in chosen_ids] for tail, paths in matches.items()}
        if name := next((tail for tail, paths in wrong.items() if not paths), None):
            names.append(name)
        else:
            what, fix = f"PEFT cannot distinguish {path} from {join_first(wrong[path], 2)}", "save both or neither"
            problems.append(Problem(Code.LORA_UNSUPPORTED, what, key=SAVED_KEY, fix=fix))
    return sorted(names), problems, _untied(survey, outer)


def _saving_problems(survey: Survey, targets: Sequence[str], entry: str, paths: Sequence[str]) -> list[Problem]:
    code = Code.LORA_UNSUPPORTED
    within = [path for path in targets if any(f"{path}.".startswith(f"{outer}.") for outer in paths)]
    inside = [path for path in paths if any(path.startswith(f"{target}.") for target in targets)]
    untrainable = [path for path in paths if not _is_trainable(survey.modules[path])]
    if not paths:
        similar = [
            path for path in survey.modules if module_names.last(entry).lower() in module_names.last(path).lower()
        ]
        near = f"it has {join_counts(similar, 6)}" if similar and entry else _nearest(survey, entry)
        what, fix = (
            f"`{entry}` is not a module of {survey.architecture}; {near}",
            "name a module by its path or its end",
        )
        code = Code.LORA_UNKNOWN_TARGET
    elif within or inside:
        what = f"`{entry}` is or holds targets ({join_counts(within or inside, 3)}), which would get no adapter"
        fix = f"leave it out here or in {KEY}"
    elif untrainable:
        kind = type(survey.modules[untrainable[0]]).__name__
        what, fix = f"`{entry}` ({kind}) has no parameters that can be trained with it", "leave it out"
    else:
        return []
    return [Problem(code, what, key=SAVED_KEY, fix=fix)]


def _is_trainable(module: nn.Module) -> bool:
    """Whether PEFT can wrap a module and train its copy: it is called, and has numbers that are not quantized."""
    weights = list(module.parameters())
    is_called = not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)
    return is_called and bool(weights) and all(weight.is_floating_point() for weight in weights)


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


# --- rank_pattern and alpha_pattern


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
    problems: dict[str, Problem] = {}
    values: dict[str, dict[str, int]] = {}
    notes: list[str] = []
    limit = TimeLimit()
    for entry, value in pattern.items():
        role = as_role(survey, entry)
        try:
            paths = _matched(survey, targets, entry, role, limit)
        except BadPatternError as error:
            what, fix = f"`{entry}` {error}", "correct it"
            raise ConfigError(Problem(Code.LORA_UNSUPPORTED, what, key=key, fix=fix)) from None
        if not paths:
            what = f"`{entry}` matches none of the targets; the targets are {join_counts(targets, 12)}"
            fix = f"use one of these, or add it to {KEY}"
            problems[entry] = Problem(Code.LORA_UNKNOWN_TARGET, what, key=key, fix=fix)
        fused = {module_names.short(path): survey.serves[path] for path in paths if role}
        notes += [
            f"{key.removeprefix('lora.')}: {value} for {role} applies to "
            f"{', '.join(other for other in served if other != role)} too, which {module} serves as well"
            for module, served in fused.items()
            if len(served) > 1
        ]
        for path in paths:
            values.setdefault(path, {})[entry] = value
    for path, given in values.items():
        if len({*given.values()}) > 1:
            served, name = survey.serves.get(path, ""), module_names.short(path)
            fused_text = f", one module for {', '.join(served)}," if len(served) > 1 else ""
            what = f"{name}{fused_text} is given {', '.join(f'{value} by `{entry}`' for entry, value in given.items())}"
            problems.setdefault(name, Problem(Code.LORA_UNSUPPORTED, what, key=key, fix="give it one value"))
    exact = _escaped(targets, {path: next(iter(given.values())) for path, given in values.items()})
    return exact, list(problems.values()), notes


def _matched(survey: Survey, targets: Sequence[str], entry: str, role: str | None, limit: TimeLimit) -> list[str]:
    """The targets that an entry of a pattern means. Raises BadPatternError."""
    if role:
        return [path for path in targets if role in survey.serves.get(path, "")]
    if entry == EXPERTS and (experts := [path for path in targets if path in survey.experts]):
        return experts
    if named(survey, entry):
        return [path for path in targets if ends_in(path, entry)]
    expression = compile_pattern(rf"(.*\.)?({entry})$")
    return [path for path in targets if limit(expression.match, path)]


def _escaped(targets: Sequence[str], values: Mapping[str, int]) -> dict[str, int]:
    pattern: dict[str, int] = {}
    for value in dict.fromkeys(values.values()):
        names, ambiguous = module_names.endings([path for path in values if values[path] == value], targets)
        # A whole path that is the end of another: PEFT allows anything before a dot, so the dot distinguishes them.
        pattern |= dict.fromkeys([re.escape(name) for name in names], value)
        pattern |= dict.fromkeys([rf"(?<!\.){re.escape(path)}" for path in ambiguous], value)
    return dict(sorted(pattern.items()))
