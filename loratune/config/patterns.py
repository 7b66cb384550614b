"""Regular expressions of users and of downloaded adapters: limits for them, and what they say of an adapter's modules.

`re` tries every way in which an expression may match, and `(a+)+b` has exponentially many. It handles signals while it
matches, so a timer of the process ends a match that takes too long. PEFT uses `re` too, so an expression that was tried
here does not take too long there.

An adapter's configuration may come from anybody. PEFT checks little of it, and matches expressions and makes tensors
without a limit, so it is checked here by PEFT's rules before PEFT reads it.
"""

import math
import re
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, MappingProxyType
from typing import Any

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

_SWITCHES = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "ensure_weight_tying")
_NAMES = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "target_parameters")
_PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
_LORA_A = re.compile(r"^base_model\.model\.(?P<path>.*)\.lora_(embedding_)?A(\.weight)?$")

_EXPRESSIONS = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\..*",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
}
"""The expressions that PEFT makes of these entries (peft.tuners.tuners_utils.check_target_module_exists)."""
_LIST_OF_EXPRESSIONS = ("layers_pattern", "modules_to_save")
"""Where PEFT takes each entry of a list for an expression."""


class BadPatternError(ValueError):
    """A text that is no regular expression, or one that takes too long to match."""


class _OutOfTime(BaseException):
    """Raised by the timer."""


def compile_pattern(text: str) -> re.Pattern[str]:
    """Compile an expression. Raises BadPatternError: it is no expression, or too large to be compiled."""
    try:
        with match_time_limit():
            return re.compile(text)
    except re.error as error:
        raise BadPatternError(f"is not a regular expression: {error}") from None
    except (OverflowError, RecursionError, MemoryError):
        raise BadPatternError("is too large for a regular expression") from None


@contextmanager
def match_time_limit(seconds: float = SECONDS) -> Iterator[None]:
    """Limit the processor time of the expressions that are matched inside.

    Only the main thread receives signals, so in another thread there is no limit. Within another limit, that one holds.

    Raises:
        BadPatternError: Matching takes longer.
    """
    nested = signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 0
    if nested or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise _OutOfTime

    previous = signal.signal(signal.SIGVTALRM, end)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    except _OutOfTime:
        raise BadPatternError(f"takes more than {seconds:g} s to match") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


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
        raise AdapterError([Problem(Code.CONFIG_ADAPTER_VALUE, what, where, key) for key, what in reasons.items()])


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
            with match_time_limit():  # PEFT takes the first that matches (peft.utils.other.get_pattern_key)
                patterns = [(compile_pattern(rf"(.*\.)?({text})$"), float(value)) for text, value in entries.items()]
                for path in modules:
                    name = parameters.get(path, path)
                    matching = (value for pattern, value in patterns if pattern.match(name))
                    values.setdefault(path, {})[key] = next(matching, float(config[default]))
        except BadPatternError as error:
            raise AdapterError(_bad_pattern(f"one of its patterns {error}", where, key)) from None
    settings: dict[str, ModuleSettings] = {}
    for path, by_key in values.items():  # PEFT multiplies B·A by lora_alpha over the rank, or over its root
        rank, alpha = by_key["rank_pattern"], by_key["alpha_pattern"]
        settings[path] = ModuleSettings(rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return settings


def _bad_pattern(what: str, where: str, key: str) -> Problem:
    return Problem(Code.CONFIG_ADAPTER_PATTERN, what, where, key)


def _check_number(count: int, modules: int, where: str, key: str) -> None:
    if count > max(MIN_ALLOWED, modules):
        what = f"has {count:,} entries for {modules:,} modules"
        raise AdapterError(Problem(Code.CONFIG_ADAPTER_TOO_MANY, what, where, key))


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
        raise AdapterError(Problem(Code.CONFIG_ADAPTER_RANK, what, where, wrong))
    return settings


def check_patterns(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], paths: Iterable[str], where: str
) -> None:
    """Try what PEFT will do as it attaches an adapter: match its expressions with a model's paths, and compare ranks.

    Args:
        config: The adapter's configuration.
        tensors: Name → shape of each of its tensors.
        paths: Those of the modules of the model.
        where: The configuration's file.

    Raises:
        AdapterError: An expression is none or takes too long, there are more entries than modules, or a rank is not
            that of the tensor, which PEFT would notice only after it has made a tensor of that rank.
    """
    modules = adapted_modules(tensors)
    checked_settings(config, tensors, where)
    layers = sum(end - start for start, end in config.get("layer_replication") or [] if end > start)
    _check_number(layers, len(modules), where, "layer_replication")
    names = list(paths)
    for key, form in _EXPRESSIONS.items():
        value = config.get(key) or []
        if isinstance(value, list):
            _check_number(len(value), len(names), where, key)
        entries = [value] if isinstance(value, str) else value if key in _LIST_OF_EXPRESSIONS else []
        try:
            with match_time_limit():
                for expression in [compile_pattern(form.format(entry)) for entry in entries]:
                    for name in names:
                        expression.fullmatch(name)
        except BadPatternError as error:
            raise AdapterError(_bad_pattern(f"its expression {error}", where, key)) from None


def bounded_ranks(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> tuple[int, dict[str, int]]:
    """`r` and `rank_pattern`, no larger than one more than the largest rank of the tensors.

    The modules of the tensors have their own rank, see `check_patterns`. Any other module that PEFT matches is an
    error, whatever its rank, and should not cost the memory of a rank of 10⁹ before that shows.
    """
    most = max(adapted_modules(tensors).values(), default=0) + 1
    patterns = config.get("rank_pattern") or {}
    return min(int(config["r"]), most), {pattern: min(int(rank), most) for pattern, rank in patterns.items()}


def matching(text: str, names: Iterable[str], key: str, example: str) -> list[str]:
    """The names that a regular expression matches as a whole.

    Args:
        text: The expression.
        names: Of modules or parameters.
        key: Where the expression stands in the config.
        example: What a list of names would hold.

    Raises:
        ConfigError: The expression does not compile, or takes too long.
    """
    try:
        expression = compile_pattern(text)
        with match_time_limit():
            return [name for name in names if expression.fullmatch(name)]
    except BadPatternError as error:
        fix = f"correct it, or write names as a list: [{example}]"
        raise ConfigError(Problem(Code.LORA_EXPRESSION, f"`{text}` {error}", key=key, fix=fix)) from None
