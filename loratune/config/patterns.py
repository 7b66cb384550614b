"""Regular expressions of users and of downloaded adapters, and what a saved configuration says of its modules.

An expression may take exponentially long to match: `re` has no limit, the package regex has a timeout. So expressions
are matched here by regex, and PEFT, which uses `re`, gets exact names in place of those of a saved adapter. PEFT
also checks few of the values in a configuration, which may come from anybody, so they are checked here.
"""

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import regex

from loratune.codes import Code
from loratune.errors import AdapterError, ConfigError, Problem

SECONDS = 2.0
"""Of processor time, so that a busy machine does not count: matching a thousand paths takes milliseconds."""
MAX_LAYERS = 1_000
"""Layers that `layer_replication` may make; each is a copy of its own."""
MAX_PARAMETERS = 1_000
"""Entries of `target_parameters`: each layer has a few tensors that it can mean."""
MIN_ALLOWED = 64
"""How many names and patterns are always allowed, even if there are fewer modules."""
MAX_CHARACTERS, MAX_REPEATS = 10_000, 1_000_000
"""Of an expression: its length, and the product of its counts of repetitions. regex has no limit as it compiles."""

_SWITCHES = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "ensure_weight_tying")
_NAMES = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "target_parameters")
_PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
_LORA_A = re.compile(r"^base_model\.model\.(?P<path>.*)\.lora_(embedding_)?A(\.weight)?$")
_ALL_LINEAR = "all-linear"
_PLAIN_NAME = re.compile(r"[\w.-]+")
_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
_OTHER_DIALECT = re.compile(r"\{[\d<=\s]*[ides]\b|\[\[:")
"""Approximate matches and classes of POSIX, which regex knows, and `re` takes literally."""

Pattern: TypeAlias = regex.Pattern


class BadPatternError(ValueError):
    """A text that is not a regular expression, or one that takes too long to match."""


def compile_pattern(text: str) -> Pattern:
    """Compile an expression of the syntax of `re`. Raises BadPatternError: it is not one, or is too large."""
    try:
        re.compile(text)
    except re.error as error:
        raise BadPatternError(f"is not a regular expression: {error}") from None
    except (OverflowError, RecursionError, MemoryError):
        raise BadPatternError("is too large for a regular expression") from None
    repeats = math.prod(max(1, *(int(count or 0) for count in counts)) for counts in _COUNT.findall(text))
    if len(text) > MAX_CHARACTERS or repeats > MAX_REPEATS:
        raise BadPatternError("is too large for a regular expression")
    if found := _OTHER_DIALECT.search(text):
        raise BadPatternError(f"has `{found[0]}`, which needs a backslash if it is meant literally")
    try:
        return regex.compile(text)
    except (regex.error, RecursionError) as error:
        raise BadPatternError(f"is not a regular expression: {error}") from None


class TimeLimit:
    """A limit of processor time that several matches share: `limit(pattern.fullmatch, text)`.

    Matching raises BadPatternError where it takes longer.
    """

    def __init__(self, seconds: float = SECONDS):
        self._seconds = self._left = seconds

    def __call__(self, match: Callable[..., Any], text: str) -> Any:
        """The result of a method of a pattern."""
        start = time.process_time()
        try:
            return match(text, timeout=self._left)
        except TimeoutError:
            raise BadPatternError(f"takes more than {self._seconds:g} s to match") from None
        finally:
            self._left = max(1e-3, self._left - (time.process_time() - start))


def check_values(config: Mapping[str, Any], where: str) -> None:
    """Check the types of values that PEFT does not check. Raises AdapterError with every wrong value."""
    reasons = {key: "not a positive number" for key in ("r", "lora_alpha") if not _is_positive(config.get(key))}
    reasons |= {key: "neither true nor false" for key in _SWITCHES if not isinstance(config.get(key), bool | None)}
    reasons |= {key: "not a list of names" for key in _NAMES if not _is_names(config.get(key))}
    if not isinstance(config.get("target_parameters"), list | None):
        reasons["target_parameters"] = "not a list of names"
    elif len(config.get("target_parameters") or []) > MAX_PARAMETERS:
        reasons["target_parameters"] = f"not a list of at most {MAX_PARAMETERS:,} names"
    for key in _PATTERNS:
        values = config.get(key)
        if values is not None and not (isinstance(values, dict) and all(map(_is_positive, values.values()))):
            reasons[key] = "not a mapping of patterns to positive numbers"
    layers = config.get("layers_to_transform")
    if not (layers is None or _is_whole(layers) or (isinstance(layers, list) and all(map(_is_whole, layers)))):
        reasons["layers_to_transform"] = "not a list of numbers"
    if not _is_replication(config.get("layer_replication")):
        reasons["layer_replication"] = f"not a list of ranges with at most {MAX_LAYERS:,} layers"
    if reasons:
        raise AdapterError([Problem(Code.ADAPTER_INVALID, what, where, key) for key, what in reasons.items()])


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1e300  # a larger number has no float, or is inf


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_names(value: Any) -> bool:
    return isinstance(value, str | None) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_replication(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, list) or len(value) > MAX_LAYERS:
        return False
    pairs = all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_whole, pair)) for pair in value)
    return pairs and sum(max(0, end - start) for start, end in value) <= MAX_LAYERS


def adapted_modules(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Path → rank of each module, by the shapes of an adapter's tensors."""
    matches = {name: _LORA_A.match(name) for name in tensors}
    return {match["path"]: tensors[name][0] for name, match in matches.items() if match and tensors[name]}


def parameters_of(config: Mapping[str, Any], path: str) -> list[str]:
    """The names of the parameters that the A and B at a path may belong to, none where they are those of a module.

    With `target_parameters` PEFT wraps the module that holds a parameter, once for each that it adapts, so that the
    paths of A and B are `experts` and `experts.base_layer`, and no name of a parameter is in the file.
    """
    owner = re.sub(r"\.base_layer(?=\.|$)", "", path)
    names = {entry: f"{owner}.{entry.rpartition('.')[2]}" for entry in config.get("target_parameters") or []}
    return [name for entry, name in names.items() if name == entry or name.endswith(f".{entry}")]


@dataclass(frozen=True)
class ModuleSettings:
    """What a configuration says of a module. rank: r, a whole number unless it is wrong; scaling: of B·A."""

    rank: float
    scaling: float


def module_settings(
    config: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]],
    where: str,
    parameters: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, ModuleSettings]:
    """Path → what the configuration says of each module that an adapter's tensors belong to.

    Args:
        config: The adapter's configuration.
        tensors: Name → shape of each of its tensors.
        where: The configuration's file.
        parameters: Path → name of the parameter, where A and B do not belong to a module; see `parameters_of`.

    Raises:
        AdapterError: A pattern is no regular expression or takes too long, or there are too many.
    """
    modules = adapted_modules(tensors)
    values: dict[str, dict[str, float]] = {}
    for key, default in _PATTERNS.items():
        entries = config.get(key) or {}
        _check_number(len(entries), len(modules), where, key)
        try:
            found = _first_matches(entries, [parameters.get(path, path) for path in modules])
            for path in modules:
                value = found.get(parameters.get(path, path), config[default])
                values.setdefault(path, {})[key] = float(value)
        except BadPatternError as error:
            raise AdapterError(_bad_pattern(f"one of its patterns {error}", where, key)) from None
    settings: dict[str, ModuleSettings] = {}
    for path, by_key in values.items():  # PEFT multiplies B·A by lora_alpha over the rank, or over its root
        rank, alpha = by_key["rank_pattern"], by_key["alpha_pattern"]
        settings[path] = ModuleSettings(rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return settings


def _first_matches(entries: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Name → value of the first pattern that matches it, as PEFT reads them (peft.utils.other.get_pattern_key).

    Raises:
        BadPatternError: A pattern is not a regular expression, or they take too long.
    """
    patterns = [(compile_pattern(rf"(.*\.)?({text})$"), value) for text, value in entries.items()]
    limit, found = TimeLimit(), {}
    for name in names if patterns else ():
        for pattern, value in patterns:
            if limit(pattern.match, name):
                found[name] = value
                break
    return found


def _bad_pattern(what: str, where: str, key: str) -> Problem:
    return Problem(Code.ADAPTER_INVALID, what, where, key)


def _check_number(count: int, modules: int, where: str, key: str) -> None:
    if count > max(MIN_ALLOWED, modules):
        what = f"has {count:,} entries for {modules:,} modules"
        raise AdapterError(Problem(Code.ADAPTER_INVALID, what, where, key))


def checked_settings(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, ModuleSettings]:
    """`module_settings`, with the same arguments and errors.

    Raises:
        AdapterError: Also if a rank is not that of the tensor.
    """
    modules, settings = adapted_modules(tensors), module_settings(config, tensors, where)
    wrongs = (path for path, rank in modules.items() if settings[path].rank != rank and not parameters_of(config, path))
    if wrong := next(wrongs, None):  # the A of a parameter holds the rows of all experts
        what = f"has rank {modules[wrong]} where the configuration says {settings[wrong].rank:g}"
        raise AdapterError(Problem(Code.ADAPTER_INVALID, what, where, wrong))
    return settings


def peft_values(
    config: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]],
    modules: Sequence[str],
    parameters: Sequence[str],
    where: str,
) -> dict[str, Any]:
    """Values for fields of `peft.LoraConfig` that replace those of a saved adapter: exact names for its expressions.

    Ranks are at most one more than the largest of the tensors. The modules of the tensors have their own rank; any
    other module that PEFT matches is an error, whatever its rank, and should not cost the memory of a rank of 10⁹.

    Args:
        config: The adapter's configuration.
        tensors: Name → shape of each of its tensors.
        modules: The paths of the modules of the model.
        parameters: The names of its parameters.
        where: The configuration's file.

    Raises:
        AdapterError: An expression is not one or takes too long, there are more entries than modules, or a rank is not
            that of the tensor, which PEFT would notice only after it has made a tensor of that rank.
    """
    checked_settings(config, tensors, where)
    _check_lists(config, tensors, modules, where)
    most = max(adapted_modules(tensors).values(), default=0) + 1
    values: dict[str, Any] = {"r": min(int(config["r"]), most)}
    for key in ("target_modules", "exclude_modules", *_PATTERNS):
        entry = config.get(key)
        try:
            if isinstance(entry, str) and entry != _ALL_LINEAR:
                values[key] = set(_fullmatches(entry, modules))
            elif isinstance(entry, dict) and key in _PATTERNS:
                names = [*modules, *(parameters if config.get("target_parameters") else ())]
                values[key] = _exact(_first_matches(entry, names))
        except BadPatternError as error:
            raise AdapterError(_bad_pattern(f"its expression {error}", where, key)) from None
    if "rank_pattern" in values:
        values["rank_pattern"] = {name: min(int(rank), most) for name, rank in values["rank_pattern"].items()}
    return values


def _check_lists(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], modules: Sequence[str], where: str
) -> None:
    """Check the lists in a configuration. Arguments and errors as of `peft_values`."""
    layers = sum(end - start for start, end in config.get("layer_replication") or [] if end > start)
    _check_number(layers, len(adapted_modules(tensors)), where, "layer_replication")
    for key in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        if isinstance(value := config.get(key), list):
            _check_number(len(value), len(modules), where, key)
    for key in ("layers_pattern", "modules_to_save"):  # PEFT makes expressions of them
        entries = [value] if isinstance(value := config.get(key) or [], str) else value
        if other := next((entry for entry in entries if not _PLAIN_NAME.fullmatch(entry)), None):
            raise AdapterError(_bad_pattern(f"`{other}` is not the name of a module", where, key))


def _exact(found: Mapping[str, float]) -> dict[str, float]:
    """Patterns that match these names and no others: one for each value, as PEFT tries all patterns on each module."""
    names: dict[float, list[str]] = {}
    for name, value in found.items():
        names.setdefault(value, []).append(re.escape(name))
    return {"|".join(alternatives): value for value, alternatives in names.items()}


def _fullmatches(text: str, names: Iterable[str]) -> list[str]:
    """The names that an expression matches as a whole. Raises BadPatternError."""
    expression, limit = compile_pattern(text), TimeLimit()
    return [name for name in names if limit(expression.fullmatch, name)]


def matching(text: str, names: Iterable[str], key: str, example: str) -> list[str]:
    """The names that a regular expression matches as a whole.

    Args:
        text: The expression.
        names: Of modules or parameters.
        key: Where the expression is in the config.
        example: What a list of names would hold.

    Raises:
        ConfigError: The expression does not compile, or takes too long.
    """
    try:
        return _fullmatches(text, names)
    except BadPatternError as error:
        fix = f"correct it, or write names as a list: [{example}]"
        raise ConfigError(Problem(Code.LORA_UNSUPPORTED, f"`{text}` {error}", key=key, fix=fix)) from None
