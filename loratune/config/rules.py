"""What the configuration of an adapter says of modules, by PEFT's rules, checked before PEFT reads it.

It may come from anybody. PEFT checks little of it, and matches expressions, and makes tensors, without a limit.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

from loratune.config.expressions import BadExpressionError, compiled, limited
from loratune.errors import AdapterError, Problem

MOST_LAYERS = 1_000
"""Layers that `layer_replication` may make; each is a copy of its own."""
FEW = 64
"""So many names and patterns are fine, whatever the number of modules."""

_SWITCHES = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "ensure_weight_tying")
_NAMES = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "target_parameters")
_PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
_OF_MODULE = re.compile(r"^base_model\.model\.(?P<path>.*)\.lora_(embedding_)?A(\.weight)?$")


def check_values(config: Mapping[str, Any], where: str) -> None:
    """Look at the types of values that PEFT takes as they are. Raises AdapterError, with each that is wrong."""
    bad = {key: "not a positive number" for key in ("r", "lora_alpha") if not _is_positive(config.get(key))}
    bad |= {key: "neither true nor false" for key in _SWITCHES if not isinstance(config.get(key), bool | None)}
    bad |= {key: "not a list of names" for key in _NAMES if not _is_names(config.get(key))}
    for key in _PATTERNS:
        given = config.get(key)
        if given is not None and not (isinstance(given, dict) and all(map(_is_positive, given.values()))):
            bad[key] = "not a mapping of patterns to positive numbers"
    layers = config.get("layers_to_transform")
    if not (layers is None or _is_whole(layers) or (isinstance(layers, list) and all(map(_is_whole, layers)))):
        bad["layers_to_transform"] = "not a list of numbers"
    if not _is_replication(config.get("layer_replication")):
        bad["layer_replication"] = f"not a list of ranges with at most {MOST_LAYERS:,} layers"
    if bad:
        raise AdapterError([Problem(what, where, key) for key, what in bad.items()])


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1e300  # what is beyond has no float, or is inf


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_names(value: Any) -> bool:
    return isinstance(value, str | None) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _is_replication(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, list) or len(value) > MOST_LAYERS:
        return False
    pairs = all(isinstance(one, list) and len(one) == 2 and all(map(_is_whole, one)) for one in value)
    return pairs and sum(max(0, end - start) for start, end in value) <= MOST_LAYERS


def adapted(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Path → rank of each module, by the shapes of an adapter's tensors."""
    found = {name: _OF_MODULE.match(name) for name in tensors}
    return {match["path"]: tensors[name][0] for name, match in found.items() if match and tensors[name]}


@dataclass(frozen=True)
class Stated:
    """What a configuration says of a module. rank: r, which is whole unless it is wrong; scaling: of B·A."""

    rank: float
    scaling: float


def stated(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Stated]:
    """Path → what is said of each module that an adapter's tensors belong to.

    where: the configuration's file. Raises AdapterError: patterns that are none, too many, or take too long.
    """
    modules = adapted(tensors)
    found: dict[str, dict[str, float]] = {}
    for key, default in _PATTERNS.items():
        given = config.get(key) or {}
        _check_number(given, len(modules), where, key)
        try:
            with limited():  # PEFT takes the first that matches (peft.utils.other.get_pattern_key)
                patterns = [(compiled(rf"(.*\.)?({pattern})$"), float(value)) for pattern, value in given.items()]
                for path in modules:
                    own = (value for pattern, value in patterns if pattern.match(path))
                    found.setdefault(path, {})[key] = next(own, float(config[default]))
        except BadExpressionError as error:
            raise AdapterError(Problem(f"one of its patterns {error}", where, key)) from None
    return {path: _stated(values["rank_pattern"], values["alpha_pattern"], config) for path, values in found.items()}


def _stated(rank: float, alpha: float, config: Mapping[str, Any]) -> Stated:
    """PEFT multiplies B·A by lora_alpha over the rank, or over its root."""
    return Stated(rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _check_number(given: Sized, modules: int, where: str, key: str) -> None:
    if (count := len(given)) > max(FEW, modules):
        raise AdapterError(Problem(f"has {count:,} entries for {modules:,} modules", where, key))


def check(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], paths: Iterable[str], where: str) -> None:
    """Try what PEFT will do as it attaches an adapter: its expressions on the paths of a model, and its ranks.

    where: the configuration's file. Raises AdapterError: an expression that is none or takes too long, more entries
    than modules, ranks that are not those of the tensors, which PEFT would make first and compare later.
    """
    modules = adapted(tensors)
    ranks = {path: of.rank for path, of in stated(config, tensors, where).items()}
    stacked = config.get("target_parameters")  # whose A holds the rows of all experts
    if not stacked and (wrong := next((path for path, rank in modules.items() if ranks[path] != rank), None)):
        what = f"has rank {modules[wrong]} where the configuration says {ranks[wrong]:g}"
        raise AdapterError(Problem(what, where, wrong))
    layers = sum(end - start for start, end in config.get("layer_replication") or [] if end > start)
    _check_number(range(layers), len(modules), where, "layer_replication")
    names = list(paths)
    for key, form in _FORMS.items():
        given = config.get(key) or []
        if isinstance(given, list):
            _check_number(given, len(names), where, key)
        entries = [given] if isinstance(given, str) else given if key in _IN_LISTS else []
        try:
            with limited():
                for expression in [compiled(form.format(entry)) for entry in entries]:
                    for name in names:
                        expression.fullmatch(name)
        except BadExpressionError as error:
            raise AdapterError(Problem(f"its expression {error}", where, key)) from None


_FORMS = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\..*",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
}
"""The expressions that PEFT makes of these entries (peft.tuners.tuners_utils.check_target_module_exists)."""
_IN_LISTS = ("layers_pattern", "modules_to_save")
"""Where PEFT takes each entry of a list for an expression."""


def bounded(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> tuple[int, dict[str, int]]:
    """`r` and `rank_pattern`, no larger than one more than the largest rank of the tensors.

    Modules of the tensors have their own rank, see `check`. Any other that PEFT finds is an error, whatever its rank,
    and should not cost the memory of a rank of 10⁹ before that shows.
    """
    most = max(adapted(tensors).values(), default=0) + 1
    given = config.get("rank_pattern") or {}
    return min(int(config["r"]), most), {pattern: min(int(rank), most) for pattern, rank in given.items()}
