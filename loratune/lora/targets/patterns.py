"""`rank_pattern` and `alpha_pattern`: role, name or regular expression → a value for some of the targets."""

import re
from collections.abc import Iterable, Mapping, Sequence

from loratune.config.patterns import BadPatternError, compile_pattern, match_time_limit, shorten
from loratune.errors import ConfigError, Problem
from loratune.lora import module_names
from loratune.lora.targets import entries
from loratune.lora.targets.names import ROLES
from loratune.lora.targets.survey import Survey


def values(
    survey: Survey, modules: Sequence[str], asked: Mapping[str, int], key: str
) -> tuple[dict[str, int], list[Problem], list[str]]:
    """The patterns for PEFT that give each module exactly its value; problems; notes.

    modules: the targets. asked: the section's mapping. key: the section's key, for messages.
    PEFT takes the first pattern for which `re.match(rf"(.*\\.)?({pattern})$", path)` (peft.utils.get_pattern_key).

    Raises ConfigError: a regular expression does not compile.
    """
    problems: list[Problem] = []
    given: dict[str, dict[str, int]] = {}
    notes: list[str] = []
    for entry, found in _all_meant(survey, modules, asked, key).items():
        role, value = entries.as_role(survey, entry), asked[entry]
        for path in found:
            given.setdefault(path, {})[entry] = value
        if not found:
            problems.append(_no_target(survey, modules, entry, key))
        elif role:
            notes += _along(survey, found, role, value, key)
    problems += _contradictions(survey, given, key)
    return (_escaped(modules, {path: next(iter(of.values())) for path, of in given.items()}), problems, notes)


def _all_meant(survey: Survey, modules: Sequence[str], asked: Iterable[str], key: str) -> dict[str, list[str]]:
    """Entry → the targets that it means. Raises ConfigError: an expression that is none, or takes too long."""
    found: dict[str, list[str]] = {}
    entry = ""
    try:
        with match_time_limit():
            for entry in asked:
                found[entry] = _meant(survey, modules, entry, entries.as_role(survey, entry))
    except BadPatternError as error:
        raise ConfigError(Problem(f"`{shorten(entry)}` {error}", key=key, fix="mend it")) from None
    return found


def _meant(survey: Survey, modules: Sequence[str], entry: str, role: str | None) -> list[str]:
    """The targets that an entry means. Raises BadPatternError."""
    if role:
        return [path for path in modules if role in survey.serves.get(path, "")]
    if entries.named(survey, entry):
        return [path for path in modules if module_names.ends_in(path, entry)]
    expression = compile_pattern(rf"(.*\.)?({entry})$")
    return [path for path in modules if expression.match(path)]


def _no_target(survey: Survey, modules: Sequence[str], entry: str, key: str) -> Problem:
    there = f"the targets are {module_names.counted(modules, 12)}"
    if entry in ROLES:
        what = f"role `{entry}` is served by none of the targets"
    elif entries.named(survey, entry):
        what = f"`{entry}` is no target"
    else:
        what = f"`{entry}` matches none of the targets"
    return Problem(f"{what}; {there}", key=key, fix=f"use one of these, or add it to {entries.KEY}")


def _contradictions(survey: Survey, given: Mapping[str, Mapping[str, int]], key: str) -> list[Problem]:
    problems: dict[str, Problem] = {}
    for path, of in given.items():
        if len(set(of.values())) > 1:
            name = module_names.short(path)
            served = survey.serves.get(path, "")
            one = f", one module for {', '.join(served)}," if len(served) > 1 else ""
            said = ", ".join(f"{value} by `{entry}`" for entry, value in of.items())
            problems.setdefault(name, Problem(f"{name}{one} is given {said}", key=key, fix="give it one value"))
    return list(problems.values())


def _along(survey: Survey, found: Sequence[str], role: str, value: int, key: str) -> list[str]:
    """What else a value reaches, because a module serves several roles."""
    name = key.removeprefix("lora.")
    fused = {module_names.short(path): survey.serves[path] for path in found if len(survey.serves[path]) > 1}
    return [
        f"{name}: {value} for {role} holds for {', '.join(other for other in served if other != role)} too, "
        f"which {place} serves as well"
        for place, served in fused.items()
    ]


def _escaped(modules: Sequence[str], given: Mapping[str, int]) -> dict[str, int]:
    result: dict[str, int] = {}
    for value in dict.fromkeys(given.values()):
        names, alike = module_names.endings([path for path in given if given[path] == value], modules)
        # A whole path that ends another one: PEFT allows anything before a dot, so the dot is what tells them apart.
        result |= dict.fromkeys([re.escape(name) for name in names], value)
        result |= dict.fromkeys([rf"(?<!\.){re.escape(path)}" for path in alike], value)
    return dict(sorted(result.items()))
