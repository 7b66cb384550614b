"""Reads and checks a saved `adapter_config.json`, which may come from an untrusted source.

PEFT checks few of its values, and matches its expressions by `re`, which has no time limit. So the values are checked
here, and PEFT receives exact names instead of the expressions.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from loratune.codes import Code
from loratune.config.expressions import BadPatternError, TimeLimit, compile_pattern, full_matches
from loratune.errors import AdapterError, Problem
from loratune.lora.module_names import ends_in, last, without_wrappers

CONFIG_FILE = "adapter_config.json"
MAX_ENTRIES = 1_000
"""The most layers that `layer_replication` may create, each a copy, and the most entries of `target_parameters`."""
MIN_ALLOWED = 64
"""How many names and patterns are always allowed, even if there are fewer modules."""

_PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
FACTOR = re.compile(
    r"^base_model\.model\.(?P<path>.*)\.lora_(?P<embedding>embedding_)?(?P<kind>A|B|magnitude_vector)(\.weight)?$"
)
"""Names of LoRA tensors in an adapter file; the groups are the path of the module and the kind of tensor."""
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` with which PEFT does not change the base."""
_FROM_BASE = ("pissa", "olora")
"""Values with which PEFT subtracts a part from the base, reproducibly each time it loads the adapter."""
_ALL_LINEAR = "all-linear"
_PLAIN_NAME = re.compile(r"[\w.-]+")


def _few_layers(ranges: list[list[int]]) -> list[list[int]]:
    if sum(max(0, end - start) for start, end in ranges) > MAX_ENTRIES:
        raise ValueError(f"more than {MAX_ENTRIES:,} layers")
    return ranges


_Number = Annotated[float, Field(gt=0, le=1e300)]  # a larger number has no float, or is inf
_Names: TypeAlias = list[str] | str | None
_Ranges = Annotated[list[Annotated[list[int], Field(min_length=2, max_length=2)]], AfterValidator(_few_layers)]


class _SavedConfig(BaseModel):
    """The values of a saved configuration that are used here, or by PEFT to create layers."""

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
    target_parameters: Annotated[list[str], Field(max_length=MAX_ENTRIES)] | None = None
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
        problems = [Problem(Code.ADAPTER_INVALID, f"not valid: {what}", where, key) for key, what in messages.items()]
        raise AdapterError(problems) from None


@dataclass(frozen=True)
class ModuleSettings:
    """The settings of a module. rank: r, a whole number unless it is invalid; scaling: the factor of B·A."""

    rank: float
    scaling: float


@dataclass(frozen=True)
class AdapterConfig:
    """A saved configuration, and its settings for the modules of the adapter's tensors.

    Attributes:
        path: The adapter directory.
        config: Content of adapter_config.json.
        tensors: Name → shape of the adapter's tensors.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]

    @property
    def where(self) -> str:
        """The file of the configuration."""
        return str(self.path / CONFIG_FILE)

    @property
    def base(self) -> str:
        """The directory or hub id of the base model."""
        return str(self.config["base_model_name_or_path"])

    @property
    def init(self) -> Any:
        """How the adapter was initialized: `init_lora_weights`, in lower case as PEFT compares it."""
        value = self.config.get("init_lora_weights", True)
        return value.lower() if isinstance(value, str) else value

    @property
    def changes_base(self) -> bool:
        """Whether PEFT subtracts a part from the base when it loads the adapter."""
        return self.init in _FROM_BASE

    @property
    def is_reproducible(self) -> bool:
        """Whether the files are sufficient: PEFT does not change the base, or subtracts the same part again."""
        return self.init in (*_KEEPS_BASE, *_FROM_BASE)

    @property
    def ranks(self) -> dict[str, int]:
        """Path → rank of each module, by the shapes of the tensors."""
        return ranks_of(self.tensors)

    @property
    def factors(self) -> dict[str, dict[str, str]]:
        """Path of each adapted layer → `A` and `B`, as far as there are such tensors → the name of the tensor."""
        return factors_in(self.tensors)

    def parameters_of(self, path: str) -> list[str]:
        """The names of the parameters that the A and B at a path may belong to; empty if they belong to a module.

        With `target_parameters`, PEFT wraps the module that holds a parameter, once per adapted parameter. The paths of
        A and B are then `experts` and `experts.base_layer`, and the file does not contain the parameter's name.
        """
        owner = without_wrappers(path)
        names = {entry: f"{owner}.{last(entry)}" for entry in self.config.get("target_parameters") or []}
        return [name for entry, name in names.items() if ends_in(name, entry)]

    def settings(self, parameters: Mapping[str, str] | None = None) -> dict[str, ModuleSettings]:
        """Path → settings of each module that the tensors belong to.

        Args:
            parameters: Path → name of the parameter, if A and B do not belong to a module; see `parameters_of`.

        Raises:
            AdapterError: A pattern is not a regular expression or takes too long, or there are too many.
        """
        names = {path: (parameters or {}).get(path, path) for path in self.ranks}
        values: list[dict[str, Any]] = []
        for key, default in _PATTERNS.items():
            entries = self.config.get(key) or {}
            self._check_number(len(entries), len(names), key)
            try:
                values.append(_first_matches(entries, names.values()) | {"": self.config[default]})
            except BadPatternError as error:
                raise self._invalid(f"one of its patterns {error}", key) from None
        ranks, alphas = values
        settings: dict[str, ModuleSettings] = {}
        for path, name in names.items():  # PEFT multiplies B·A by lora_alpha over the rank, or over its root
            rank, alpha = float(ranks.get(name, ranks[""])), float(alphas.get(name, alphas[""]))
            settings[path] = ModuleSettings(rank, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))
        return settings

    def checked_settings(self, parameters: Mapping[str, str] | None = None) -> dict[str, ModuleSettings]:
        """`settings`. Also raises AdapterError if a rank differs from the rank of the tensor."""
        settings = self.settings(parameters)
        for path, rank in self.ranks.items():  # the A of a parameter holds the rows of all experts
            if settings[path].rank != rank and not self.parameters_of(path):
                raise self._invalid(f"has rank {rank} where the configuration says {settings[path].rank:g}", path)
        return settings

    def peft_values(self, modules: Sequence[str], parameters: Sequence[str]) -> dict[str, Any]:
        """Values that replace saved fields of `peft.LoraConfig`: exact names instead of expressions.

        Ranks are limited to one more than the largest rank of the tensors. Modules without tensors that PEFT matches
        are an error anyway, and should not allocate memory for a rank of 10⁹.

        Args:
            modules: The paths of the modules of the model.
            parameters: The names of its parameters.

        Raises:
            AdapterError: An expression is not valid or takes too long, there are more entries than modules, or a rank
                differs from the rank of the tensor, which PEFT would notice only after allocating a tensor.
        """
        self.checked_settings()
        self._check_lists(modules)
        most = max(self.ranks.values(), default=0) + 1
        values: dict[str, Any] = {"r": min(int(self.config["r"]), most), "lora_alpha": self.config["lora_alpha"]}
        for key in ("target_modules", "exclude_modules", *_PATTERNS):
            entry = self.config.get(key)
            try:
                if isinstance(entry, str) and entry != _ALL_LINEAR:
                    values[key] = set(full_matches(entry, modules))
                elif isinstance(entry, dict) and key in _PATTERNS:
                    names = [*modules, *(parameters if self.config.get("target_parameters") else ())]
                    values[key] = _exact(_first_matches(entry, names))
            except BadPatternError as error:
                raise self._invalid(f"its expression {error}", key) from None
        if "rank_pattern" in values:
            values["rank_pattern"] = {name: min(int(rank), most) for name, rank in values["rank_pattern"].items()}
        return values

    def _check_lists(self, modules: Sequence[str]) -> None:
        """Check the lists in a configuration. Arguments and errors as in `peft_values`."""
        layers = sum(end - start for start, end in self.config.get("layer_replication") or [] if end > start)
        self._check_number(layers, len(self.ranks), "layer_replication")
        for key in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            entries = [value] if isinstance(value := self.config.get(key) or [], str) else value
            self._check_number(len(entries), len(modules), key)
            others = [entry for entry in entries if not _PLAIN_NAME.fullmatch(entry)]
            if others and key in ("layers_pattern", "modules_to_save"):  # PEFT makes expressions of them
                raise self._invalid(f"`{others[0]}` is not the name of a module", key)

    def _check_number(self, count: int, modules: int, key: str) -> None:
        if count > max(MIN_ALLOWED, modules):
            raise self._invalid(f"has {count:,} entries for {modules:,} modules", key)

    def _invalid(self, what: str, key: str) -> AdapterError:
        return AdapterError(Problem(Code.ADAPTER_INVALID, what, self.where, key))


def ranks_of(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Path → rank of each module, by the shapes of an adapter's tensors."""
    shapes = {name: shape for name, shape in tensors.items() if shape}
    return {path: shapes[names["A"]][0] for path, names in factors_in(shapes).items() if "A" in names}


def factors_in(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Path of each adapted layer → `A` and `B`, as far as there are such tensors → the name of the tensor."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if (match := FACTOR.match(name)) and match["kind"] in "AB":
            found.setdefault(match["path"], {})[match["kind"]] = name
    return found


def _first_matches(entries: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Name → value of the first matching pattern, by PEFT's rule (peft.utils.other.get_pattern_key).

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


def _exact(found: Mapping[str, float]) -> dict[str, float]:
    """Patterns that match exactly these names, one per value, because PEFT tries all patterns on each module."""
    names: dict[float, list[str]] = {}
    for name, value in found.items():
        names.setdefault(value, []).append(re.escape(name))
    return {"|".join(alternatives): value for value, alternatives in names.items()}
