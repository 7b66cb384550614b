"""`rank_pattern` and `alpha_pattern`: role, name or regular expression → a value for some of the targets."""

import re
from collections.abc import Iterable, Mapping, Sequence

from loratune.codes import Code
from loratune.config.patterns import BadPatternError, compile_pattern, match_time_limit, shorten
from loratune.errors import ConfigError, Problem
from loratune.lora import module_names
from loratune.lora.targets import entries
from loratune.lora.targets.names import ROLES
from loratune.lora.targets.survey import Survey


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
        role, value = entries.as_role(survey, entry), pattern[entry]
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
    entry = ""
    try:
        with match_time_limit():
            for entry in pattern:
                meanings[entry] = _meaning(survey, targets, entry, entries.as_role(survey, entry))
    except BadPatternError as error:
        what = f"`{shorten(entry)}` {error}"
        raise ConfigError(Problem(Code.LORA_EXPRESSION, what, key=key, fix="correct it")) from None
    return meanings


def _meaning(survey: Survey, targets: Sequence[str], entry: str, role: str | None) -> list[str]:
    """The targets that an entry means. Raises BadPatternError."""
    if role:
        return [path for path in targets if role in survey.serves.get(path, "")]
    if entries.named(survey, entry):
        return [path for path in targets if module_names.ends_in(path, entry)]
    expression = compile_pattern(rf"(.*\.)?({entry})$")
    return [path for path in targets if expression.match(path)]


def _no_target(survey: Survey, targets: Sequence[str], entry: str, key: str) -> Problem:
    if entry in ROLES:
        what = f"role `{entry}` is served by none of the targets"
    elif entries.named(survey, entry):
        what = f"`{entry}` is no target"
    else:
        what = f"`{entry}` matches none of the targets"
    what += f"; the targets are {module_names.counted(targets, 12)}"
    return Problem(Code.LORA_PATTERN_UNUSED, what, key=key, fix=f"use one of these, or add it to {entries.KEY}")


def _contradictions(survey: Survey, values: Mapping[str, Mapping[str, int]], key: str) -> list[Problem]:
    problems: dict[str, Problem] = {}
    for path, of in values.items():
        if len(set(of.values())) > 1:
            name = module_names.short(path)
            served = survey.serves.get(path, "")
            fused = f", one module for {', '.join(served)}," if len(served) > 1 else ""
            sources = ", ".join(f"{value} by `{entry}`" for entry, value in of.items())
            what = f"{name}{fused} is given {sources}"
            problems.setdefault(name, Problem(Code.LORA_PATTERN_CONFLICT, what, key=key, fix="give it one value"))
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
        # A whole path that is the end of another: PEFT allows anything before a dot, so the dot tells them apart.
        pattern |= dict.fromkeys([re.escape(name) for name in names], value)
        pattern |= dict.fromkeys([rf"(?<!\.){re.escape(path)}" for path in ambiguous], value)
    return dict(sorted(pattern.items()))
