"""The entries of `lora.target_modules` → the modules that they mean, or why there are none."""

import difflib
import re
from collections.abc import Iterable, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from loratune.config.patterns import BadPatternError, compile_pattern, match_time_limit, shorten
from loratune.errors import ConfigError, Problem
from loratune.lora import module_names
from loratune.lora.targets import reach
from loratune.lora.targets.names import ROLES, STOCK
from loratune.lora.targets.survey import Survey

KEY = "lora.target_modules"
_FIX = f"set {KEY} to names from this list, or to all-linear"

Found = tuple[dict[str, tuple[str, ...]], list[Problem]]


def by_list(survey: Survey, entries: Sequence[str]) -> Found:
    """Roles and names. Raises ConfigError for an empty list or name."""
    if not entries or not all(entries):
        fix = "name roles (q, k, v, o) or modules"
        raise ConfigError(Problem("an empty list or name adapts nothing", key=KEY, fix=fix))
    roles: dict[str, tuple[str, ...]] = {}
    problems: list[Problem] = []
    for entry in dict.fromkeys(entries):
        suited, others = adaptable(survey, named(survey, entry))
        role = as_role(survey, entry)
        if role:
            roles[role] = serving(survey, role)
        elif suited and not others:
            roles[entry] = suited
        else:
            problems.append(_unsuitable(survey, f"`{entry}`", others) if others else _unknown_name(survey, entry))
    return roles, problems + _role_problems(survey, {role: roles[role] for role in ROLES if role in roles})


def named(survey: Survey, entry: str) -> list[str]:
    """The modules that an entry names; a role is no name."""
    return [] if entry in ROLES else [path for path in survey.modules if module_names.ends_in(path, entry)]


def as_role(survey: Survey, entry: str) -> str | None:
    """The role that an entry means: `q`, or `q_proj` where that is no layer's name (or a container's, as in Moshi)."""
    if entry in ROLES:
        return entry
    suited, others = adaptable(survey, named(survey, entry))
    return None if suited and not others else STOCK.get(entry)


def serving(survey: Survey, role: str) -> tuple[str, ...]:
    """The modules that serve a role."""
    return tuple(path for path, served in survey.serves.items() if role in served)


def by_string(survey: Survey, text: str) -> Found:
    """`all-linear`, or a regular expression for whole paths. Raises ConfigError where it does not compile."""
    if text.lower() == "all-linear":
        chosen = tuple(path for path in survey.reachable() if not reach.idle(path, survey.modules))
        what = f"all-linear: {survey.architecture} has no linear layer that LoRA takes effect on"
        return {"all-linear": chosen}, [] if chosen else [Problem(what, key=KEY)]
    try:
        expression = compile_pattern(text)
        with match_time_limit():
            matched = [path for path in survey.modules if expression.fullmatch(path)]
    except BadPatternError as error:
        fix = "mend it, or write names as a list: [q_proj, v_proj]"
        raise ConfigError(Problem(f"`{shorten(text)}` {error}", key=KEY, fix=fix)) from None
    suited, others = adaptable(survey, matched)
    if others:
        return {}, [_unsuitable(survey, f"the regular expression `{text}`", others)]
    if suited:
        return {text: suited}, []
    what = f"the regular expression `{text}` matches no module's whole path in {survey.architecture}"
    fix = f"match whole paths, such as {next(iter(survey.linears), 'none')}"
    if re.fullmatch(r"[\w.]+", text):
        fix = f"write a list to go by roles or names, [{text}]; or {fix}"
    return {}, [Problem(what, key=KEY, fix=fix)]


def within(roles: dict[str, tuple[str, ...]], layers: Sequence[int]) -> Found:
    """Keep to the modules of some layers."""
    numbers = {
        path: number for many in roles.values() for path in many if (number := module_names.number_of(path)) is not None
    }
    absent = sorted(set(layers) - set(numbers.values()))
    there = sorted(set(numbers.values()))
    fix = f"the layers with targets are {module_names.ranges(there)}" if there else ""
    problems = [Problem(f"no target in layer {layer}", key="lora.layers_to_transform", fix=fix) for layer in absent]
    return {
        entry: tuple(path for path in many if numbers.get(path) in layers) for entry, many in roles.items()
    }, problems


def lost(survey: Survey, modules: Iterable[str]) -> list[Problem]:
    """Targets that PEFT would refuse with a traceback, train to no effect, or take for something else."""
    blocked = {module_names.short(path): survey.obstacles[path] for path in modules if path in survey.obstacles}
    return [Problem(f"`{name}`: {reason}", key=KEY, fix="leave it out") for name, reason in blocked.items()]


def adaptable(survey: Survey, found: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split paths into those of a kind that LoRA adapts, and the others."""
    suits = {path: isinstance(survey.modules[path], nn.Linear | Conv1D | nn.Embedding) for path in found}
    return tuple(path for path in suits if suits[path]), tuple(path for path in suits if not suits[path])


def _role_problems(survey: Survey, roles: dict[str, tuple[str, ...]]) -> list[Problem]:
    raw = f"; these weights of its attention are no linear layers: {', '.join(survey.raw_attention)}"
    raw = raw if survey.raw_attention else ""
    if roles and not survey.layers:
        what = f"{survey.architecture} has no attention in which roles (q, k, v, o) could be found"
        return [Problem(f"{what}{raw}; {survey.has()}", key=KEY, fix=_FIX)]
    problems = [problem for role in roles if roles[role] for problem in _layers_without(survey, role)]
    absent = ", ".join(f"`{role}`" for role in roles if not roles[role])
    if absent:
        what = f"role {absent}: nothing in the attention of {survey.architecture} is known to serve it"
        there = survey.roles_there()
        fix = f"ask for [{', '.join(there)}] alone; or {_FIX}" if there else _FIX
        problems.append(Problem(f"{what}{raw}; {survey.has()}", key=KEY, fix=fix))
    return problems


def _layers_without(survey: Survey, role: str) -> list[Problem]:
    """A layer whose projections are all known simply has no such role (shared keys, say); an unknown one may be it."""
    lacking = {
        layer: [path.removeprefix(f"{layer}.") for path in inside if not survey.serves[path]]
        for layer, inside in survey.layers.items()
        if not any(role in survey.serves[path] for path in inside)
    }
    strange = [f"{layer} (unknown there: {', '.join(unknown)})" for layer, unknown in lacking.items() if unknown]
    if not strange:
        return []
    found = f"in {len(survey.layers) - len(lacking)} of {len(survey.layers)} attention layers"
    what = f"role `{role}`: {survey.architecture} has it {found}, and not in {module_names.few(strange, 4)}"
    return [Problem(f"{what}; {survey.has()}", key=KEY, fix=_FIX)]


def _unsuitable(survey: Survey, entry: str, others: tuple[str, ...]) -> Problem:
    listed = module_names.few([f"{path} ({type(survey.modules[path]).__name__})" for path in others], 3)
    what = f"{entry} matches {listed}, which LoRA does not adapt"
    return Problem(f"{what}; {survey.has()}", key=KEY, fix="match linear layers only")


def _unknown_name(survey: Survey, entry: str) -> Problem:
    fix = "a list holds roles (q, k, v, o) and names; all-linear or a regular expression stands alone, without brackets"
    return Problem(f"`{entry}` matches no module of {survey.architecture}; {nearest(survey, entry)}", key=KEY, fix=fix)


def nearest(survey: Survey, entry: str) -> str:
    """What could have been meant: `nearest: q_proj`, or all that there is."""
    # Compared with endings that have as many parts: `attn.q_prj` is near `attn.q_proj`, not near `q_proj`.
    depth = entry.count(".")
    there = {tail for path in survey.linears for tail in module_names.tails(path) if tail.count(".") == depth}
    near = difflib.get_close_matches(entry, sorted(there), n=3, cutoff=0.5)
    return f"nearest: {', '.join(near)}" if near else survey.has()
