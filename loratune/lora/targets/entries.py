"""Resolves the entries of a lora section on a model, with an error for entries that match nothing.

`target_modules` and `modules_to_save` name modules, `target_parameters` names tensors outside of linear layers:
transformers keeps the projections of all experts of a layer in one 3-dimensional tensor. PEFT adds the product of A and
B of each expert to such a tensor (peft.tuners.lora.ParamWrapper). `rank_pattern` and `alpha_pattern` set other values
for some of the targets.
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
_FIX = f"set {KEY} to names from this list, or to all-linear"
_LISTS = {KEY: ("roles or modules", "q_proj, v_proj"), PARAMETERS_KEY: ("parameters", EXPERTS)}
"""Key → the kind of names in its list, and an example."""

Paths = tuple[str, ...]


class Resolver:
    """Resolves entries on a model.

    Attributes:
        survey: The model.
        problems: Entries that match nothing, or something that cannot be adapted.
        notes: Lines for the user on anything unexpected.
    """

    def __init__(self, survey: Survey):
        self.survey, self.problems, self.notes = survey, list[Problem](), list[str]()

    def _refuse(self, code: Code, what: str, key: str, fix: str) -> None:
        self.problems.append(Problem(code, what, key=key, fix=fix))

    def modules(self, wanted: Sequence[str] | str) -> dict[str, Paths]:
        """Entry → paths for `lora.target_modules`: roles and names, `all-linear`, or an expression for whole paths.

        Raises:
            ConfigError: The expression does not compile, or takes too long.
        """
        survey = self.survey
        if isinstance(wanted, str) and wanted.lower() == "all-linear":
            paths = tuple(path for path in survey.reachable() if not unused_part(path, survey))
            if not paths:
                what = f"all-linear: {survey.architecture} has no linear layer on which LoRA has an effect"
                self._refuse(Code.LORA_UNSUPPORTED, what, KEY, "")
            return {"all-linear": paths}
        if isinstance(wanted, str):
            roles = self._by_expression(wanted, survey.modules, survey.linears, KEY)
        else:
            roles = self._by_names(wanted)
        for entry, paths in roles.items():
            if others := [path for path in paths if not _is_adaptable(survey.modules[path])]:
                examples = join_first([f"{path} ({type(survey.modules[path]).__name__})" for path in others], 3)
                what = f"`{entry}` matches {examples}, which LoRA does not adapt; {survey.candidates()}"
                self._refuse(Code.LORA_UNSUPPORTED, what, KEY, "match linear layers only")
        if not isinstance(wanted, str):
            self._check_roles({role: roles[role] for role in ROLES if role in roles})
        return roles

    def _by_names(self, wanted: Sequence[str]) -> dict[str, Paths]:
        """Role or name → paths."""
        roles: dict[str, Paths] = {}
        for entry in dict.fromkeys(wanted):
            if role := self._as_role(entry):
                roles[role] = self._serving(role)
            elif matches := self._named(entry):
                roles[entry] = matches
            else:
                what = f"`{entry}` matches no module of {self.survey.architecture}; {self._nearest(entry)}"
                alone = "auto, all-linear or a regular expression is written without brackets"
                fix = f"a list holds roles (q, k, v, o) and names; {alone}"
                self._refuse(Code.LORA_UNKNOWN_TARGET, what, KEY, fix)
        return roles

    def parameters(self, wanted: Sequence[str] | str) -> dict[str, Paths]:
        """Entry → names for `lora.target_parameters`: the role `experts` and names, or an expression for whole names.

        Raises:
            ConfigError: The expression does not compile, or takes too long.
        """
        survey, roles = self.survey, dict[str, Paths]()
        if isinstance(wanted, str) and wanted != EXPERTS:
            known = survey.experts or survey.raw or tuple(survey.parameters)
            roles = self._by_expression(wanted, survey.parameters, known, PARAMETERS_KEY)
            wanted = ()
        for entry in dict.fromkeys([wanted] if isinstance(wanted, str) else wanted):
            paths = tuple(name for name in survey.parameters if ends_in(name, entry))
            if paths := survey.experts if entry == EXPERTS and not paths else paths:
                roles[entry] = paths
            else:
                self._refuse_parameter(entry)
        found: dict[tuple[str, str], list[str]] = {}
        for entry, name in ((entry, name) for entry, names in roles.items() for name in names):
            if reason := parameter_obstacle(survey, name):
                found.setdefault((entry, reason), []).append(name)
        for (entry, reason), names in found.items():
            what = f"`{entry}` matches {join_first(names, 2)}: {reason}"
            self._refuse(Code.LORA_UNSUPPORTED, what, PARAMETERS_KEY, "leave it out")
        return roles

    def _by_expression(self, text: str, names: Iterable[str], known: Sequence[str], key: str) -> dict[str, Paths]:
        """The matches of a regular expression for whole paths. known: example paths for the error message."""
        nouns, example = _LISTS[key]
        if paths := tuple(matching(text, names, key, example)):
            return {text: paths}
        noun = "module's whole path" if key == KEY else "parameter's whole name"
        what = f"the regular expression `{text}` matches no {noun} in {self.survey.architecture}"
        fix = f"match whole {'paths' if key == KEY else 'names'}, such as {next(iter(known), 'none')}"
        words = re.split(r"[\s,|]+", text.strip())
        if key == KEY and {*text} <= {*ROLES}:  # such as `qkvo`
            words = [*text]
        if key == KEY and re.fullmatch(r"all[\W_]*(lin\w*|layers|modules)?", text.strip(), re.IGNORECASE):
            fix = f"did you mean `all-linear`? {fix}"
        elif all(re.fullmatch(r"[\w.]+", word) for word in words):  # such as `q,k`
            fix = f"write a list to name {nouns}, [{', '.join(words)}]; or {fix}"
        self._refuse(Code.LORA_UNKNOWN_TARGET, what, key, fix)
        return {}

    def _refuse_parameter(self, entry: str) -> None:
        """Record a problem for an entry that matches nothing, with suggestions."""
        survey = self.survey
        if entry == EXPERTS:
            what = f"role `{EXPERTS}`: {survey.architecture} has no tensors that hold the experts of a layer"
            linear = [path for path in survey.reachable() if re.search(r"(^|\.)experts\.", path)]
            names = join_first(list(dict.fromkeys(map(module_names.last, linear))), 4)
            fix = f"its experts are linear layers: name them in {KEY} ({names})" if linear else "leave it out"
        else:
            candidates = [name for name in survey.parameters if not parameter_obstacle(survey, name)]
            others = f"those that can be: {join_first(short_names(candidates), 6) or 'none'}"
            nearest = self._nearest(entry, candidates, others)
            what = f"`{entry}` matches no parameter of {survey.architecture}; {nearest}"
            fix = f"a list holds the role {EXPERTS} and names; a regular expression is written without brackets"
        self._refuse(Code.LORA_UNKNOWN_TARGET, what, PARAMETERS_KEY, fix)

    def _named(self, entry: str) -> Paths:
        """The modules that an entry names; roles name none."""
        return () if entry in ROLES else tuple(path for path in self.survey.modules if ends_in(path, entry))

    def _as_role(self, entry: str) -> str | None:
        """The role of an entry: `q`, or `q_proj` if no layer has that name (or only a container, as in Moshi)."""
        if entry in ROLES:
            return entry
        paths = self._named(entry)
        is_name = paths and all(_is_adaptable(self.survey.modules[path]) for path in paths)
        return None if is_name else STOCK.get(entry)

    def _serving(self, role: str) -> Paths:
        return tuple(path for path, served in self.survey.serves.items() if role in served)

    def _nearest(self, entry: str, paths: Iterable[str] | None = None, otherwise: str = "") -> str:
        """A suggestion such as `nearest: q_proj`; otherwise all linear modules."""
        # Compared with endings that have as many parts: `attn.q_prj` is near `attn.q_proj`, not near `q_proj`.
        depth = entry.count(".")
        known = self.survey.linears if paths is None else paths
        endings = {tail for path in known for tail in module_names.tails(path) if tail.count(".") == depth}
        near = difflib.get_close_matches(entry, sorted(endings), n=3, cutoff=0.5)
        return f"nearest: {', '.join(near)}" if near else otherwise or self.survey.candidates()

    def in_layers(self, roles: dict[str, Paths], layers: Sequence[int]) -> dict[str, Paths]:
        """Restrict matches to the modules of some layers."""
        numbers = {path: module_names.number_of(path) for paths in roles.values() for path in paths}
        existing = sorted({number for number in numbers.values() if number is not None})
        fix = f"the layers with targets are {module_names.ranges(existing)}" if existing else ""
        for layer in sorted(set(layers) - set(existing)):
            self._refuse(Code.LORA_UNKNOWN_TARGET, f"no target in layer {layer}", "lora.layers_to_transform", fix)
        return {entry: tuple(path for path in paths if numbers[path] in layers) for entry, paths in roles.items()}

    def endings(self, chosen: Sequence[str], key: str, layers: Sequence[int] | None = None) -> Paths:
        """The shortest endings by which PEFT selects exactly the chosen modules or parameters, and no others.

        layers: `layers_to_transform`, which PEFT does not apply to parameters.
        """
        every, dots = (self.survey.modules, 0) if key == KEY else (self.survey.parameters, 1)
        names, ambiguous = module_names.endings(chosen, every, layers, dots=dots)
        for path in ambiguous:
            what = f"PEFT cannot distinguish {path} from another one whose path ends in the same way"
            self._refuse(Code.LORA_UNSUPPORTED, what, key, "target both or neither")
        return names

    def check_effects(self, paths: Iterable[str]) -> None:
        """Reject targets that PEFT would reject with a traceback, train without effect, or misinterpret."""
        obstacles = self.survey.obstacles
        reasons = {module_names.short(path): obstacles[path] for path in paths if path in obstacles}
        for name, reason in reasons.items():
            self._refuse(Code.LORA_UNSUPPORTED, f"`{name}`: {reason}", KEY, "leave it out")

    def _check_roles(self, roles: dict[str, Paths]) -> None:
        survey = self.survey
        raw = f"; these weights of its attention are no linear layers: {', '.join(survey.raw_attention)}"
        known = f"{raw if survey.raw_attention else ''}; {survey.candidates()}"
        if roles and not survey.layers:
            what = f"{survey.architecture} has no attention in which roles (q, k, v, o) could be found{known}"
            self._refuse(Code.LORA_UNKNOWN_TARGET, what, KEY, _FIX)
            return
        for role, paths in roles.items():
            if paths:
                self._check_layers_without(role)
        if absent := ", ".join(f"`{role}`" for role in roles if not roles[role]):
            what = f"role {absent}: nothing in the attention of {survey.architecture} is known to serve it{known}"
            existing = [role for role in ROLES if self._serving(role)]
            fix = f"ask for [{', '.join(existing)}] alone; or {_FIX}" if existing else _FIX
            self._refuse(Code.LORA_UNKNOWN_TARGET, what, KEY, fix)

    def _check_layers_without(self, role: str) -> None:
        """A layer whose projections are all known simply lacks the role (shared keys); an unknown one may serve it."""
        survey = self.survey
        lacking = {
            layer: [path.removeprefix(f"{layer}.") for path in inside if not survey.serves[path]]
            for layer, inside in survey.layers.items()
            if not any(role in survey.serves[path] for path in inside)
        }
        if unclear := [f"{layer} (unknown there: {', '.join(names)})" for layer, names in lacking.items() if names]:
            layers = f"in {len(survey.layers) - len(lacking)} of {len(survey.layers)} attention layers"
            what = f"role `{role}`: {survey.architecture} has it {layers}, and not in {join_first(unclear, 4)}"
            self._refuse(Code.LORA_UNKNOWN_TARGET, f"{what}; {survey.candidates()}", KEY, _FIX)

    def modules_to_save(self, targets: Sequence[str], entries: Sequence[str]) -> Paths:
        """The sorted names with which PEFT copies exactly the intended modules.

        PEFT copies every module whose path has the name as a plain suffix, so `head` also matches `overhead`, and skips
        all targets within a copy (peft.utils.other._set_trainable, check_target_module_exists).

        Args:
            targets: Paths of the targets.
            entries: Roles and endings of paths.
        """
        chosen: dict[str, None] = {}
        key, modules = "lora.modules_to_save", self.survey.modules
        for entry in entries:
            role = self._as_role(entry)
            paths = self._serving(role) if role else self._named(entry)
            chosen |= dict.fromkeys(paths)
            if reason := self._saving_obstacle(targets, entry, paths):
                self._refuse(Code.LORA_UNSUPPORTED if paths else Code.LORA_UNKNOWN_TARGET, reason[0], key, reason[1])
        outer = [path for path in chosen if not any(path.startswith(f"{other}.") for other in chosen)]
        every = dict(self.survey.model.named_modules(remove_duplicate=False))
        chosen_ids, names = {id(modules[path]) for path in outer}, list[str]()
        for path in outer:
            if any(path.endswith(name) for name in names):
                continue
            wrong = {
                tail: [other for other in every if other.endswith(tail) and id(every[other]) not in chosen_ids]
                for tail in module_names.tails(path)
            }
            if name := next((tail for tail, paths in wrong.items() if not paths), None):
                names.append(name)
            else:
                what = f"PEFT cannot distinguish {path} from {join_first(wrong[path], 2)}"
                self._refuse(Code.LORA_UNSUPPORTED, what, key, "save both or neither")
        self.notes += _untied(modules, outer)
        return tuple(sorted(names))

    def _saving_obstacle(self, targets: Sequence[str], entry: str, paths: Paths) -> tuple[str, str] | None:
        """Why modules cannot be saved whole, and the fix; None if they can."""
        modules = self.survey.modules
        within = [path for path in targets if any(f"{path}.".startswith(f"{outer}.") for outer in paths)]
        inside = [path for path in paths if any(path.startswith(f"{target}.") for target in targets)]
        untrainable = [path for path in paths if not _is_trainable(modules[path])]
        if not paths:
            similar = [path for path in modules if module_names.last(entry).lower() in module_names.last(path).lower()]
            near = f"it has {join_counts(similar, 6)}" if similar and entry else self._nearest(entry)
            what = f"`{entry}` is not a module of {self.survey.architecture}; {near}"
            return what, "name a module by its path or its end"
        if within or inside:
            what = f"`{entry}` is or holds targets ({join_counts(within or inside, 3)}), which would get no adapter"
            return what, f"leave it out here or in {KEY}"
        if untrainable:
            kind = type(modules[untrainable[0]]).__name__
            return f"`{entry}` ({kind}) has no parameters that can be trained with it", "leave it out"
        return None

    def pattern(self, targets: Sequence[str], pattern: Mapping[str, int], key: str) -> dict[str, int]:
        """`rank_pattern` or `alpha_pattern` for PEFT, so that each target gets exactly its value.

        PEFT uses the first entry for which `re.match(rf"(.*\\.)?({entry})$", path)` (peft.utils.get_pattern_key).

        Args:
            targets: Paths of the targets.
            pattern: The mapping of the section.
            key: Its key.

        Raises:
            ConfigError: A regular expression does not compile, or takes too long.
        """
        values: dict[str, dict[str, int]] = {}
        limit, serves = TimeLimit(), self.survey.serves
        for entry, value in pattern.items():
            role = self._as_role(entry)
            try:
                paths = self._matched(targets, entry, role, limit)
            except BadPatternError as error:
                what, fix = f"`{entry}` {error}", "correct it"
                raise ConfigError(Problem(Code.LORA_UNSUPPORTED, what, key=key, fix=fix)) from None
            if not paths:
                what = f"`{entry}` matches none of the targets; the targets are {join_counts(targets, 12)}"
                self._refuse(Code.LORA_UNKNOWN_TARGET, what, key, f"use one of these, or add it to {KEY}")
            for module, served in {module_names.short(path): serves[path] for path in paths if role}.items():
                if others := ", ".join(other for other in served if other != role):
                    about = f"{key.removeprefix('lora.')}: {value} for {role} applies to {others} too"
                    self.notes.append(f"{about}, which {module} serves as well")
            for path in paths:
                values.setdefault(path, {})[entry] = value
        contradictions: dict[str, str] = {}
        for path, given in values.items():
            if len({*given.values()}) > 1:
                contradictions.setdefault(module_names.short(path), path)
        for name, path in contradictions.items():
            served = f", one module for {', '.join(serves[path])}," if len(serves.get(path, "")) > 1 else ""
            what = (
                f"{name}{served} is given {', '.join(f'{value} by `{entry}`' for entry, value in values[path].items())}"
            )
            self._refuse(Code.LORA_UNSUPPORTED, what, key, "give it one value")
        return _escaped(targets, {path: next(iter(given.values())) for path, given in values.items()})

    def _matched(self, targets: Sequence[str], entry: str, role: str | None, limit: TimeLimit) -> list[str]:
        """The targets that an entry of a pattern matches. Raises BadPatternError."""
        if role:
            return [path for path in targets if role in self.survey.serves.get(path, "")]
        if entry == EXPERTS and (experts := [path for path in targets if path in self.survey.experts]):
            return experts
        if self._named(entry):
            return [path for path in targets if ends_in(path, entry)]
        expression = compile_pattern(rf"(.*\.)?({entry})$")
        return [path for path in targets if limit(expression.match, path)]


def _is_adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D | nn.Embedding)


def _is_trainable(module: nn.Module) -> bool:
    """Whether PEFT can wrap a module and train its copy: it is callable, and has parameters that are not quantized."""
    weights = list(module.parameters())
    is_called = not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)
    return is_called and bool(weights) and all(weight.is_floating_point() for weight in weights)


def _untied(modules: Mapping[str, nn.Module], chosen: Sequence[str]) -> list[str]:
    """Notes on tied weights that become untied: PEFT trains a copy, and the other module keeps the base's weight."""
    notes: dict[frozenset[str], str] = {}
    for path in chosen:
        own = {id(weight) for weight in modules[path].parameters()}
        for other, module in modules.items():
            is_tied = any(id(weight) in own for weight in module.parameters(recurse=False))
            if is_tied and not f"{other}.".startswith(f"{path}."):
                effect = "they are trained separately" if other in chosen else f"{other} keeps the one of the base"
                note = f"modules_to_save: {path} and {other} share one weight in the base; {effect}"
                notes.setdefault(frozenset((path, other)), note)
    return list(notes.values())


def _escaped(targets: Sequence[str], values: Mapping[str, int]) -> dict[str, int]:
    pattern: dict[str, int] = {}
    for value in dict.fromkeys(values.values()):
        names, ambiguous = module_names.endings([path for path in values if values[path] == value], targets)
        # A whole path that is the end of another: PEFT allows anything before a dot, so the dot distinguishes them.
        pattern |= dict.fromkeys([re.escape(name) for name in names], value)
        pattern |= dict.fromkeys([rf"(?<!\.){re.escape(path)}" for path in ambiguous], value)
    return dict(sorted(pattern.items()))
