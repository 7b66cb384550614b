"""`loratune explain`: what a key means and costs, and with a config the value in force and where it comes from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loratune.codes import Code
from loratune.config import RunConfig, load_with_lines
from loratune.config.keys import Key, KeyGroup, KeyPath, dotted, find, groups, suggestion, yaml_flow
from loratune.config.schema import DEFAULT_BETA, PREFERENCE_KEYS
from loratune.config.yaml_reader import Document
from loratune.errors import ConfigError, Problem

_DEFAULT = "the default"
_UNUSED = "not used, as another key sets the length of the run"
_DECIDED = "the run decides"


@dataclass(frozen=True)
class Setting:
    """A value in force.

    Attributes:
        key: Its place, with the numbers of a list's entries.
        value: As it is written, or the default.
        source: `file:line`, `--set`, or that it is the default.
        decided_by_run: Whether a run chooses the value that it works with.
        used: Whether it has an effect.
        remark: What the run works with instead, or why it has no effect; empty if it is used unchanged.
    """

    key: str
    value: Any
    source: str
    decided_by_run: bool
    used: bool
    remark: str

    def __str__(self) -> str:
        return "; ".join(filter(None, (f"{yaml_flow(self.value)} ({self.source})", self.remark)))


@dataclass(frozen=True)
class ExplainedConfig:
    """A config whose values are explained.

    Attributes:
        path: Its file.
        run: The config, validated.
        document: What is written, and where.
    """

    path: Path
    run: RunConfig
    document: Document

    @classmethod
    def read(cls, path: Path, assignments: Sequence[str]) -> "ExplainedConfig":
        """Read a config. Raises ConfigError, as `config.load`."""
        return cls(path, *load_with_lines(path, assignments))

    def settings(self, key: Key) -> list[Setting]:
        """The value of a key in each of its places that the config has."""
        given, written, used, known = (
            {path: value for place in key.places for path, value in _at(values, place.split("."))}
            for values in (
                self.run.model_dump(exclude_unset=True), self.document.values, self.run.resolved(),
                self.run.model_dump(),
            )
        )  # fmt: skip
        objective, found = self.run.training.objective, []
        for path, default in known.items():
            value = written.get(path, default)
            is_read = path[0] != "preferences" or objective in PREFERENCE_KEYS[str(path[1])]
            is_used = path in used and is_read
            is_decided = is_used and key.is_decided_by_run(value)
            remark = "" if is_used else _UNUSED if is_read else f"not read by {objective}"
            if is_decided:
                has_beta = key.label == "preferences.beta" and objective in DEFAULT_BETA
                remark = f"{DEFAULT_BETA[objective]:g} with {objective}" if has_beta else _DECIDED
            source = self.document.where(path) if path in given else _DEFAULT
            found.append(Setting(dotted(path), value, source, is_decided, is_used, remark))
        return found


def _at(values: Any, names: list[str], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """The paths and values at a place, of which lists have several."""
    if not names:
        yield path, values
    elif isinstance(values, list):
        for number, item in enumerate(values):
            yield from _at(item, names, (*path, number))
    elif isinstance(values, Mapping) and names[0] in values:
        yield from _at(values[names[0]], names[1:], (*path, names[0]))


def find_keys(words: str | None) -> list[KeyGroup | Key]:
    """The keys and sections that some words may mean, see `keys.find`; all sections without any.

    Raises:
        ConfigError: There is no such key.
    """
    found: list[KeyGroup | Key] = [*groups()] if words is None else find(words)
    if not found:
        fix = suggestion(tuple(str(words).strip().split(".")))
        fix = fix if fix.startswith("did") else "loratune explain lists all keys"
        raise ConfigError(Problem(Code.CONFIG_UNKNOWN_KEY, "unknown key", key=str(words), fix=fix))
    return found


def as_json(found: Sequence[KeyGroup | Key], config: ExplainedConfig | None) -> dict[str, Any]:
    """What is known of some keys, by the places of each."""
    keys = [key for item in found for key in (item.keys if isinstance(item, KeyGroup) else (item,))]
    described = {
        place: {
            "meaning": key.meaning,
            "type": key.kind,
            "required": key.required,
            "default": key.schema.get("default"),
            "memory_and_time": key.costs,
            "other_names": list(key.other_names),
            "in_force": [asdict(one) for one in config.settings(replace(key, places=(place,)))] if config else [],
        }
        for key in keys
        for place in key.places
    }
    return {"config": str(config.path) if config else None, "keys": described}
