"""What the entries of `lora.target_parameters` mean on a model: tensors that belong to no linear layer.

transformers keeps the projections of all experts of a layer in one tensor of three dimensions, which no name of a
module reaches. PEFT adds to such a tensor, while its module computes, the product of an A and a B for each expert
(peft.tuners.lora.ParamWrapper): r · (inputs + outputs) trained values for each expert and projection.
"""

import difflib
import re
from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from loratune.codes import Code
from loratune.config.expressions import matching
from loratune.errors import ConfigError, Problem
from loratune.lora import module_names
from loratune.lora.targets.entries import Meaning, as_names
from loratune.lora.targets.survey import CONVOLUTIONS, EXPERTS, Survey, chooser, short_names, unused_part

KEY = "lora.target_parameters"
_NOT_WRAPPED = frozenset({"DbrxExpertGLU", "Ernie4_5_MoeStatics", "JambaMambaMixer", "ZambaMambaMixer"})
"""Classes whose parameters the model reads from outside, past an adapter, or which it calls with keywords alone, as
PEFT's wrapper cannot be called."""


def meaning(survey: Survey, wanted: Sequence[str] | str | None) -> Meaning:
    """What `lora.target_parameters` means.

    Args:
        survey: The model.
        wanted: A list of the role `experts` and of names by PEFT's rule, the whole name of a parameter or its end after
            a dot; or a regular expression for whole names.

    Raises:
        ConfigError: A name is empty; the expression does not compile, or takes too long.
    """
    if wanted is None:
        return {}, []
    if isinstance(wanted, str) and wanted != EXPERTS:
        roles, problems = _by_expression(survey, wanted)
    else:
        roles, problems = _by_list(survey, [wanted] if isinstance(wanted, str) else wanted)
    return roles, [*problems, *_unsuitable(survey, roles)]


def _by_list(survey: Survey, wanted: Sequence[str]) -> Meaning:
    if not all(wanted):
        what, fix = "an empty name adapts nothing", f"name parameters, or {EXPERTS}"
        raise ConfigError(Problem(Code.LORA_UNKNOWN_TARGET, what, key=KEY, fix=fix))
    roles: dict[str, tuple[str, ...]] = {}
    problems: list[Problem] = []
    for entry in dict.fromkeys(wanted):
        paths = tuple(name for name in survey.parameters if module_names.ends_in(name, entry))
        paths = survey.experts if entry == EXPERTS and not paths else paths
        if paths:
            roles[entry] = paths
        else:
            problems.append(_unknown(survey, entry))
    return roles, problems


def _by_expression(survey: Survey, text: str) -> Meaning:
    paths = tuple(matching(text, survey.parameters, KEY, EXPERTS))
    if paths:
        return {text: paths}, []
    what = f"the regular expression `{text}` matches no parameter's whole name in {survey.architecture}"
    fix = f"match whole names, such as {next(iter(survey.experts or survey.raw or survey.parameters))}"
    if names := as_names(text):
        fix = f"write a list to name parameters, [{names}]; or {fix}"
    return {}, [Problem(Code.LORA_UNKNOWN_TARGET, what, key=KEY, fix=fix)]


def _unknown(survey: Survey, entry: str) -> Problem:
    """An entry that names nothing, with what could have been meant."""
    if entry == EXPERTS:
        what = f"role `{EXPERTS}`: {survey.architecture} has no tensors that hold the experts of a layer"
        linear = [path for path in survey.reachable() if re.search(r"(^|\.)experts\.", path)]
        fix = "leave it out"
        if linear:
            names = module_names.join_first(list(dict.fromkeys(map(module_names.last, linear))), 4)
            fix = f"its experts are linear layers: name them in lora.target_modules ({names})"
        return Problem(Code.LORA_UNKNOWN_TARGET, what, key=KEY, fix=fix)
    depth = entry.count(".")
    candidates = [name for name in survey.parameters if not obstacle(survey, name)]
    endings = {tail for name in candidates for tail in module_names.tails(name) if tail.count(".") == depth}
    near = difflib.get_close_matches(entry, sorted(endings), n=3, cutoff=0.5)
    suggestion = f"nearest: {', '.join(near)}" if near else f"those that can be: {_few(candidates) or 'none'}"
    what = f"`{entry}` matches no parameter of {survey.architecture}; {suggestion}"
    fix = f"a list holds the role {EXPERTS} and names; a regular expression stands alone, without brackets"
    return Problem(Code.LORA_UNKNOWN_TARGET, what, key=KEY, fix=fix)


def _few(names: Sequence[str]) -> str:
    return module_names.join_first(short_names(names), 6)


def _unsuitable(survey: Survey, roles: dict[str, tuple[str, ...]]) -> list[Problem]:
    """Problems of parameters that PEFT cannot adapt, one for each entry and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for entry, names in roles.items():
        for name in names:
            if reason := obstacle(survey, name):
                found.setdefault((entry, reason), []).append(name)
    return [
        Problem(
            Code.LORA_UNSUPPORTED,
            f"`{entry}` matches {module_names.join_first(names, 2)}: {reason}",
            key=KEY,
            fix="leave it out",
        )
        for (entry, reason), names in found.items()
    ]


def obstacle(survey: Survey, name: str) -> str:
    """Why PEFT cannot adapt a parameter, or should not; empty if it can."""
    weight, owner = survey.parameters[name], survey.modules.get(module_names.parent(name))
    kind = type(owner).__name__
    if owner is None:
        return "PEFT adapts no parameter of the model itself"
    if isinstance(owner, nn.Linear | Conv1D | nn.Embedding):
        return survey.obstacles.get(module_names.parent(name)) or "a layer that lora.target_modules adapts"
    if isinstance(owner, CONVOLUTIONS):
        return f"it belongs to a {kind}"
    if weight.dim() not in (2, 3):
        return f"it has {weight.dim()} dimensions, and PEFT adapts tensors of 2 and 3"
    if not weight.is_floating_point():
        return "it is quantized"
    if weight.dim() == 3 and len(weight) == 1 and getattr(owner, "is_transposed", False):
        return "PEFT adds the update of a single expert the wrong way round"
    if kind in _NOT_WRAPPED:
        return f"a {kind} is not called as PEFT's wrapper around it could be"
    if unused := unused_part(name, survey.modules):
        return unused[1]
    return "it chooses by rank, and no gradient passes a choice" if chooser(name) else ""
