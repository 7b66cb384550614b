"""Attention roles (q, k, v, o) → the module names of this architecture.

PEFT raises only when no target matches at all, so a name that this model does not have is lost in silence. Here every
entry of `lora.target_modules` finds its modules or is an error, and the names that come out select exactly the modules
that were meant. A model with a new word for a projection needs one line in `names.SERVES`.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loratune.errors import ConfigError, ModelError, Problem
from loratune.targets.names import ROLES, SERVES, STOCK

KEY = "lora.target_modules"

_NUMBER = re.compile(r"\.(\d+)\.")

# An attention module is known by its own name or its class (`mixer` is one when it is a NemotronHAttention), unless it
# looks elsewhere than at the text itself. Multimodal towers are left alone: roles mean the language model.
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_NOT_SELF = re.compile(r"cross|encoder_attn|vision|image|audio|patcher", re.IGNORECASE)

# The kernels of a Mamba mixer read these weights directly, past an adapter. PEFT refuses the first two on some model
# types (peft.tuners.tuners_utils._check_lora_target_modules_mamba) and lets the rest train to no effect.
_BYPASSED = frozenset({"out_proj", "conv1d", "x_proj", "dt_proj"})
_BYPASSED_IN = re.compile(r"mamba|mixer", re.IGNORECASE)

# On many mixture-of-experts models PEFT rewrites a target with such a last name into the experts' stacked tensors
# (peft.utils.transformers_weight_conversion), and then the module of that name goes without an adapter.
_EXPERT_NAMES = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


@dataclass(frozen=True)
class Targets:
    """The modules that get an adapter.

    roles: each role or entry that was asked for → full module paths, in model order.
    modules: all of these paths, once each, in model order.
    names: for `LoraConfig.target_modules`: sorted suffixes that select exactly `modules`.
    fused: path with layer numbers as `*` → the roles that one module serves, where it serves several;
        a role that was not asked for comes along.
    """

    roles: dict[str, tuple[str, ...]]
    modules: tuple[str, ...]
    names: tuple[str, ...]
    fused: dict[str, tuple[str, ...]]

    def patterns(self) -> dict[str, list[str]]:
        """Each role or entry → its module paths with layer numbers as `*`, once each."""
        return {entry: list(dict.fromkeys(map(pattern, paths))) for entry, paths in self.roles.items()}

    def places(self) -> dict[str, list[str]]:
        """Each path with `*` for its layer numbers → the roles or entries that led there."""
        found: dict[str, list[str]] = {}
        for entry, patterns in self.patterns().items():
            for place in patterns:
                found.setdefault(place, []).append(entry)
        return found

    def along(self) -> dict[str, list[str]]:
        """Each fused place → the roles that it serves without being asked for."""
        asked = self.places()
        return {place: [role for role in roles if role not in asked[place]] for place, roles in self.fused.items()}


def resolve(model: nn.Module, target_modules: Sequence[str] | str, layers: Sequence[int] | None = None) -> Targets:
    """Find the modules that `lora.target_modules` means on this model, which may be on the meta device.

    target_modules: a list of roles and names (PEFT's rule: the whole path, or its end after a dot), where `q_proj`,
    `k_proj`, `v_proj`, `o_proj` stand for the roles if the model has no such name; or a string: `all-linear` (every
    linear layer but the output embedding, as PEFT reads it) or a regular expression for whole paths.
    layers: `lora.layers_to_transform`, the numbers of the layers to keep to.

    Raises ModelError with every entry that finds nothing, finds only some layers, or names what LoRA cannot adapt;
    ConfigError for a regular expression that does not compile and for an empty list.
    Source: https://huggingface.co/docs/peft/package_reference/lora (target_modules).
    """
    survey = _survey(model)
    if isinstance(target_modules, str):
        roles, problems = _by_string(survey, target_modules)
    else:
        roles, problems = _by_list(survey, target_modules)
    if layers is not None:
        roles, missing = _within(roles, layers)
        problems = [*problems, *missing]
    chosen = {path for paths in roles.values() for path in paths}
    modules = tuple(path for path in survey.modules if path in chosen)
    names, ambiguous = _names(modules, survey.modules)
    problems = [*problems, *ambiguous, *_lost(survey, modules)]
    if problems:
        raise ModelError(problems)
    fused = {pattern(path): tuple(survey.serves[path]) for path in modules if len(survey.serves.get(path, "")) > 1}
    return Targets(roles, modules, names, fused)


@dataclass(frozen=True)
class _Survey:
    """What resolve needs to know about a model, read once.

    modules: path → module; linears: paths of linear layers, without the output embedding.
    serves: path of a linear layer inside attention → its roles, "" when SERVES does not know it.
    layers: the layer of each attention module → those of its paths that are in `serves`.
    stacked: names of expert weights that are one tensor for all experts, so not linear layers.
    """

    architecture: str
    modules: dict[str, nn.Module]
    linears: tuple[str, ...]
    serves: dict[str, str]
    layers: dict[str, list[str]]
    stacked: tuple[str, ...]


def _survey(model: nn.Module) -> _Survey:
    # As PEFT: a module that is shared between layers counts once, under its first path.
    modules = {path: module for path, module in model.named_modules() if path}
    architecture, output = type(model).__name__, None
    if isinstance(model, PreTrainedModel):
        architecture, output = model.config.model_type, model.get_output_embeddings()
    linears = tuple(p for p, part in modules.items() if isinstance(part, nn.Linear | Conv1D) and part is not output)
    serves: dict[str, str] = {}
    layers: dict[str, list[str]] = {}
    for path in linears:
        found = _place(path, modules)
        if found:
            attention, serves[path] = found
            layers.setdefault(_layer(attention), []).append(path)
    experts = (pattern(name) for name, weight in model.named_parameters() if "experts." in name and weight.ndim > 2)
    stacked = tuple(dict.fromkeys(name.rsplit("*.", 1)[-1] for name in experts))
    return _Survey(architecture, modules, linears, serves, layers, stacked)


def _place(path: str, modules: dict[str, nn.Module]) -> tuple[str, str] | None:
    """The attention module that a linear layer belongs to and the roles it serves there; None outside attention."""
    for name in list(_tails(path))[1::-1]:  # `output.dense` before `dense`
        attention = path.removesuffix(name).rstrip(".")
        if name in SERVES and _is_self_attention(attention, modules):
            return attention, SERVES[name]
    parent = path.rpartition(".")[0]
    return (parent, "") if _is_self_attention(parent, modules) else None


def _is_self_attention(path: str, modules: dict[str, nn.Module]) -> bool:
    if path not in modules:
        return False
    kind = type(modules[path]).__name__
    own_name = re.sub(r"(\.\d+)+$", "", path).rpartition(".")[2]
    return bool(_ATTENTION.search(f"{own_name} {kind}")) and not _NOT_SELF.search(f"{path} {kind}")


def _by_list(survey: _Survey, entries: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], list[Problem]]:
    if not entries or not all(entries):
        fix = "name roles (q, k, v, o) or modules"
        raise ConfigError(Problem("an empty list or name adapts nothing", key=KEY, fix=fix))
    roles: dict[str, tuple[str, ...]] = {}
    problems: list[Problem] = []
    for entry in dict.fromkeys(entries):
        matches = [] if entry in ROLES else [path for path in survey.modules if f".{path}".endswith(f".{entry}")]
        suited, others = _adaptable(survey, matches)
        role = entry if entry in ROLES else STOCK.get(entry)
        if suited and not others:
            roles[entry] = suited
        elif role:  # also where `q_proj` is only a container, as in Moshi
            roles[role] = tuple(path for path, served in survey.serves.items() if role in served)
        else:
            problems.append(_unsuitable(survey, f"`{entry}`", others) if others else _unknown_name(survey, entry))
    return roles, problems + _role_problems(survey, {role: roles[role] for role in ROLES if role in roles})


def _within(
    roles: dict[str, tuple[str, ...]], layers: Sequence[int]
) -> tuple[dict[str, tuple[str, ...]], list[Problem]]:
    """The modules of some layers, by PEFT's rule: a module's layer is the first number in its path."""
    numbers = {path: int(found[1]) for paths in roles.values() for path in paths if (found := _NUMBER.search(path))}
    absent = sorted(set(layers) - set(numbers.values()))
    problems = [
        Problem(f"no target in layer {layer}", key="lora.layers_to_transform", fix=_layers_there(numbers.values()))
        for layer in absent
    ]
    return {
        entry: tuple(path for path in paths if numbers.get(path) in layers) for entry, paths in roles.items()
    }, problems


def _layers_there(numbers: Iterable[int]) -> str:
    there = sorted(set(numbers))
    return f"its layers go from {there[0]} to {there[-1]}" if there else ""


def _by_string(survey: _Survey, text: str) -> tuple[dict[str, tuple[str, ...]], list[Problem]]:
    if text.lower() == "all-linear":
        missed = _all_linear_misses(survey)
        what = f"all-linear: LoRA does not reach all linear weights of {survey.architecture}, namely not {missed}"
        problem = Problem(f"{what}; {_has(survey)}", key=KEY, fix=f"set {KEY} to names from this list")
        return ({}, [problem]) if missed else ({"all-linear": survey.linears}, [])
    try:
        expression = re.compile(text)
    except re.error as error:
        fix = "mend it, or write names as a list: [q_proj, v_proj]"
        raise ConfigError(Problem(f"`{text}` is not a regular expression: {error}", key=KEY, fix=fix)) from None
    suited, others = _adaptable(survey, [path for path in survey.modules if expression.fullmatch(path)])
    if others:
        return {}, [_unsuitable(survey, f"the regular expression `{text}`", others)]
    if suited:
        return {text: suited}, []
    what = f"the regular expression `{text}` matches no module's whole path in {survey.architecture}"
    fix = f"match whole paths, such as {next(iter(survey.linears), 'none')}"
    if re.fullmatch(r"[\w.]+", text):
        fix = f"write a list to go by roles or names, [{text}]; or {fix}"
    return {}, [Problem(what, key=KEY, fix=fix)]


def _adaptable(survey: _Survey, paths: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split paths into those that LoRA adapts and those that it does not."""
    suits = {path: isinstance(survey.modules[path], nn.Linear | Conv1D | nn.Embedding) for path in paths}
    return tuple(path for path in suits if suits[path]), tuple(path for path in suits if not suits[path])


def _names(chosen: Sequence[str], every: Iterable[str]) -> tuple[tuple[str, ...], list[Problem]]:
    """The shortest endings that, by PEFT's rule (`key == name or key.endswith("." + name)`), select `chosen` exactly.

    A list of endings is what PEFT treats best: `layers_to_transform` ignores a whole path and refuses a string, and
    on mixture-of-experts models a regular expression is reduced to last names, so that it hits every layer.
    """
    total = Counter(tail for path in every for tail in _tails(path))
    wanted = Counter(tail for path in chosen for tail in _tails(path))
    names: set[str] = set()
    problems: list[Problem] = []
    for path in chosen:
        name = next((tail for tail in _tails(path) if wanted[tail] == total[tail]), None)
        if name:
            names.add(name)
        else:
            what = f"PEFT cannot tell {path} from a module whose path ends in the same way"
            problems.append(Problem(what, key=KEY, fix="target both or neither"))
    return tuple(sorted(names)), problems


def _role_problems(survey: _Survey, roles: dict[str, tuple[str, ...]]) -> list[Problem]:
    if roles and not survey.layers:
        what = f"{survey.architecture} has no attention in which roles (q, k, v, o) could be found"
        return [Problem(f"{what}; {_has(survey)}", key=KEY, fix=_fix(survey))]
    problems = [problem for role in roles if roles[role] for problem in _layers_without(survey, role)]
    absent = ", ".join(f"`{role}`" for role in roles if not roles[role])
    if absent:
        what = f"role {absent}: nothing in the attention of {survey.architecture} is known to serve it"
        problems.append(Problem(f"{what}; {_has(survey)}", key=KEY, fix=_fix(survey)))
    return problems


def _layers_without(survey: _Survey, role: str) -> list[Problem]:
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
    what = f"role `{role}`: {survey.architecture} has it {found}, and not in {_few(strange, 4)}"
    return [Problem(f"{what}; {_has(survey)}", key=KEY, fix=_fix(survey))]


def _unsuitable(survey: _Survey, entry: str, others: tuple[str, ...]) -> Problem:
    listed = _few([f"{path} ({type(survey.modules[path]).__name__})" for path in others], 3)
    what = f"{entry} matches {listed}, which LoRA does not adapt"
    return Problem(f"{what}; {_has(survey)}", key=KEY, fix="match linear layers only")


def _unknown_name(survey: _Survey, entry: str) -> Problem:
    # Compared with endings that have as many parts: `attn.q_prj` is near `attn.q_proj`, not near `q_proj`.
    depth = entry.count(".")
    endings = {tail for path in survey.linears for tail in _tails(path) if tail.count(".") == depth}
    near = difflib.get_close_matches(entry, sorted(endings), n=3, cutoff=0.5)
    hint = f"nearest: {', '.join(near)}" if near else _has(survey)
    fix = "a list holds roles (q, k, v, o) and names; all-linear or a regular expression stands alone, without brackets"
    return Problem(f"`{entry}` matches no module of {survey.architecture}; {hint}", key=KEY, fix=fix)


def _lost(survey: _Survey, modules: Iterable[str]) -> list[Problem]:
    """Targets that PEFT would refuse with a traceback, train to no effect, or take for something else."""
    problems = {}
    for path in modules:
        name, last = _short(path), path.rpartition(".")[2]
        if _bypassed(survey, path):
            what = f"`{name}`: kernels of {survey.architecture} read the weight of {last} directly, past an adapter"
            problems[name] = Problem(what, key=KEY, fix="leave it out")
        elif survey.stacked and last in _EXPERT_NAMES:
            what = f"`{name}`: PEFT can take {last} for the experts' stacked tensors ({', '.join(survey.stacked)})"
            problems[name] = Problem(what, key=KEY, fix="leave it out")
    return list(problems.values())


def _bypassed(survey: _Survey, path: str) -> bool:
    parent, _, last = path.rpartition(".")
    return last in _BYPASSED and bool(_BYPASSED_IN.search(type(survey.modules.get(parent)).__name__))


def _all_linear_misses(survey: _Survey) -> str:
    """The linear weights of the model that all-linear cannot adapt; empty if there are none."""
    bypassed = dict.fromkeys(_short(path) for path in survey.linears if _bypassed(survey, path))
    return ", ".join([*survey.stacked, *bypassed])


def _fix(survey: _Survey) -> str:
    return f"set {KEY} to names from this list" + ("" if _all_linear_misses(survey) else ", or to all-linear")


def _has(survey: _Survey) -> str:
    """What can be named instead: `its linear modules: attn.c_attn ×12, attn.c_proj ×12, …`."""  # noqa: RUF002
    counts = Counter(_short(path) for path in survey.linears if not _bypassed(survey, path))
    return f"its linear modules: {_few([f'{name} ×{count}' for name, count in counts.items()], 12)}"  # noqa: RUF001


def _few(items: Sequence[str], most: int) -> str:
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")


def pattern(path: str) -> str:
    """`model.layers.7.self_attn.q_proj` → `model.layers.*.self_attn.q_proj`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _short(path: str) -> str:
    """`model.layers.7.self_attn.q_proj` → `self_attn.q_proj`; a number says nothing, so `attentions.*.q_lin`."""
    parts = pattern(path).split(".")
    return ".".join(parts[-3:] if parts[-2:-1] == ["*"] else parts[-2:])


def _layer(attention: str) -> str:
    """The path up to its last number: one attention per layer, even where q and o have different parents (BERT)."""
    numbered = re.match(r"(.*\.)?\d+(?![^.])", attention)
    return numbered.group() if numbered else attention


def _tails(path: str) -> Iterator[str]:
    """`a.b.c` → `c`, `b.c`, `a.b.c`: the endings that PEFT compares with a name."""
    parts = path.split(".")
    return (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
