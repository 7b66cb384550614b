"""Reads and checks a saved `adapter_config.json`, which may come from an untrusted source.

PEFT checks few of its values, and matches its expressions by `re`, which has no time limit. So the values are checked
here, and PEFT receives exact names instead of the expressions.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from loratune.codes import Code
from loratune.config.expressions import BadPatternError, TimeLimit, compile_pattern, full_matches
from loratune.errors import AdapterError, Problem

MAX_LAYERS = 1_000
"""Layers that `layer_replication` may make; each is a copy of its own."""
MAX_PARAMETERS = 1_000
"""Entries of `target_parameters`: each layer has a few tensors that it can mean."""
MIN_ALLOWED = 64
"""How many names and patterns are always allowed, even if there are fewer modules."""

_PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
_LORA_A = re.compile(r"^base_model\.model\.(?P<path>.*)\.lora_(embedding_)?A(\.weight)?$")
_ALL_LINEAR = "all-linear"
_PLAIN_NAME = re.compile(r"[\w.-]+")


def _few_layers(ranges: list[list[int]]) -> list[list[int]]:
    if sum(max(0, end - start) for start, end in ranges) > MAX_LAYERS:
        raise ValueError(f"more than {MAX_LAYERS:,} layers")
    return ranges


_Number = Annotated[float, Field(gt=0, le=1e300)]  # a larger number has no float, or is inf
_Names: TypeAlias = list[str] | str | None
_Ranges = Annotated[
    list[Annotated[list[int], Field(min_length=2, max_length=2)]],
    Field(max_length=MAX_LAYERS),
    AfterValidator(_few_layers),
]


class _SavedConfig(BaseModel):
    """The values of a saved configuration that are used here or by PEFT as it makes layers."""

    model_config = ConfigDict(strict=True, extra="ignore")

    base_model_name_or_path: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    r: _Number
    lora_alpha: _Number
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_bias: bool | None = None
    fan_in_fan_out: bool | None = None
    use_qalora: bool | None = None
    ensure_weight_tying: bool | None = None
    target_modules: _Names = None
    exclude_modules: _Names = None
    layers_pattern: _Names = None
    modules_to_save: _Names = None
    target_parameters: Annotated[list[str], Field(max_length=MAX_PARAMETERS)] | None = None
    rank_pattern: dict[str, _Number] | None = None
    alpha_pattern: dict[str, _Number] | None = None
    layers_to_transform: list[int] | int | None = None
    layer_replication: _Ranges | None = None

    @model_validator(mode="after")
    def _adapts_something(self) -> Self:
        if self.target_modules is None or not (self.target_modules or self.target_parameters):
            raise PydanticCustomError("targets", "does not say which modules it adapts")
        return self


def check_values(config: Mapping[str, Any], where: str) -> None:
    """Check the types of values that PEFT does not check. Raises AdapterError with every wrong value."""
    try:
        _SavedConfig.model_validate(config)
    except ValidationError as error:
        messages = {
            str((*details["loc"], "target_modules")[0]): details["msg"].removeprefix("Input ")
            for details in error.errors()
        }
        raise AdapterError([_invalid(f"not valid: {what}", where, key) for key, what in messages.items()]) from None


def _invalid(what: str, where: str, key: str) -> Problem:
    return Problem(Code.ADAPTER_INVALID, what, where, key)


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
        AdapterError: A pattern is not a regular expression or takes too long, or there are too many.
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
            raise AdapterError(_invalid(f"one of its patterns {error}", where, key)) from None
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


def _check_number(count: int, modules: int, where: str, key: str) -> None:
    if count > max(MIN_ALLOWED, modules):
        what = f"has {count:,} entries for {modules:,} modules"
        raise AdapterError(_invalid(what, where, key))


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
        raise AdapterError(_invalid(what, where, wrong))
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
                values[key] = set(full_matches(entry, modules))
            elif isinstance(entry, dict) and key in _PATTERNS:
                names = [*modules, *(parameters if config.get("target_parameters") else ())]
                values[key] = _exact(_first_matches(entry, names))
        except BadPatternError as error:
            raise AdapterError(_invalid(f"its expression {error}", where, key)) from None
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
            raise AdapterError(_invalid(f"`{other}` is not the name of a module", where, key))


def _exact(found: Mapping[str, float]) -> dict[str, float]:
    """Patterns that match these names and no others: one for each value, as PEFT tries all patterns on each module."""
    names: dict[float, list[str]] = {}
    for name, value in found.items():
        names.setdefault(value, []).append(re.escape(name))
    return {"|".join(alternatives): value for value, alternatives in names.items()}
