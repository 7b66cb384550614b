"""`loratune explain`: what a key means and costs, and with a config the value in force and where it comes from."""

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loratune.codes import Code
from loratune.config import RunConfig, load_with_lines
from loratune.config.keys import Key, KeyGroup, KeyPath, dotted, find, groups, suggestion, yaml_flow
from loratune.config.preference_section import DEFAULT_BETA, PREFERENCE_KEYS
from loratune.config.yaml_reader import Document
from loratune.console import print_block, print_json
from loratune.errors import ConfigError, Problem

DEFAULT = "the default"
UNUSED = "not used, as another key sets the length of the run"
DECIDED = "the run decides"


@dataclass(frozen=True)
class Setting:
    """A value in force.

    Attributes:
        key: Where it stands, with the numbers of a list's entries.
        value: As it is written, or the default.
        source: `file:line`, `--set`, or that it is the default.
        decided_by_run: Whether a run chooses the value that it works with.
        used: Whether it has an effect.
        remark: What the run works with instead, or why it has no effect; empty if it is used as it stands.
    """

    key: str
    value: Any
    source: str
    decided_by_run: bool
    used: bool
    remark: str

    def __str__(self) -> str:
        return "; ".join([f"{yaml_flow(self.value)} ({self.source})", *([self.remark] if self.remark else [])])


@dataclass(frozen=True)
class Config:
    """A config whose values are explained.

    Attributes:
        path: Its file.
        run: What it says, validated.
        document: What is written, and where.
    """

    path: Path
    run: RunConfig
    document: Document

    def settings(self, key: Key) -> list[Setting]:
        """The value of a key in each of its places that the config has; none for entries that it does not have."""
        given = dict(_at_places(self.run.model_dump(exclude_unset=True), key))
        written = dict(_at_places(self.document.values, key))
        used = dict(_at_places(self.run.resolved(), key))
        return [
            self._setting(key, path, written.get(path, value), is_given=path in given, is_resolved=path in used)
            for path, value in _at_places(self.run.model_dump(), key)
        ]

    def _setting(self, key: Key, path: KeyPath, value: Any, *, is_given: bool, is_resolved: bool) -> Setting:
        objective = self.run.training.objective
        is_read = path[0] != "preferences" or objective in PREFERENCE_KEYS[str(path[1])]
        is_used = is_resolved and is_read
        is_decided = is_used and key.is_decided_by_run(value)
        remark = "" if is_used else UNUSED if is_read else f"not read by {objective}"
        if is_decided:
            beta = f"{DEFAULT_BETA[objective]:g} with {objective}" if objective in DEFAULT_BETA else DECIDED
            remark = beta if key.label == "preferences.beta" else DECIDED
        source = self.document.where(path) if is_given else DEFAULT
        return Setting(dotted(path), value, source, is_decided, is_used, remark)


def read_config(path: Path, assignments: Sequence[str]) -> Config:
    """Read a config. Raises ConfigError, as `config.load`."""
    return Config(path, *load_with_lines(path, assignments))


def _at_places(values: Mapping[str, Any], key: Key) -> Iterator[tuple[KeyPath, Any]]:
    """The paths and values of a key."""
    for place in key.places:
        yield from _at(values, place.split("."), ())


def _at(values: Any, names: list[str], path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if not names:
        yield path, values
    elif isinstance(values, list):
        for number, item in enumerate(values):
            yield from _at(item, names, (*path, number))
    elif isinstance(values, Mapping) and names[0] in values:
        yield from _at(values[names[0]], names[1:], (*path, names[0]))


def explain(words: str | None, config: Config | None, as_json: bool) -> None:
    """Print what is known of a key or section, of several that may be meant, or of all in a line each.

    Args:
        words: What to look for, see `keys.find`; None for everything.
        config: Says which values are in force.
        as_json: Print one object: by the place of each key.

    Raises:
        ConfigError: There is no such key.
    """
    found: list[KeyGroup | Key] = [*groups()] if words is None else find(words)
    if not found:
        fix = suggestion(tuple(str(words).strip().split(".")))
        fix = fix if fix.startswith("did") else "loratune explain lists all keys"
        raise ConfigError(Problem(Code.CONFIG_UNKNOWN_KEY, "unknown key", key=str(words), fix=fix))
    if as_json:
        keys = [key for item in found for key in (item.keys if isinstance(item, KeyGroup) else (item,))]
        described = {place: _as_json(key, place, config) for key in keys for place in key.places}
        print_json({"config": str(config.path) if config else None, "keys": described})
        return
    for number, item in enumerate(found):
        if number:
            print()
        if isinstance(item, KeyGroup):
            _print_group(item, config)
        else:
            print_block(", ".join(item.places), _lines(item, config))


def _lines(key: Key, config: Config | None) -> Iterator[tuple[str, str]]:
    """All that is known of a key."""
    yield "meaning", key.meaning
    yield "type", key.kind
    yield "default", key.default
    yield "memory and time", key.costs
    if key.other_names:
        yield "elsewhere called", ", ".join(key.other_names)
    settings = config.settings(key) if config else []
    for setting in settings:
        place = "" if setting.key in key.places and len(settings) == 1 else f"{setting.key}: "
        yield "in force", f"{place}{setting}"
    if config and not settings:
        yield "in force", "nothing, as the config has no such entry"


def _print_group(group: KeyGroup, config: Config | None) -> None:
    """A line for each key: its meaning, or the value in force."""
    title = group.name or "Outside the sections"
    lines = []
    for key in group.keys:
        label = key.label if group.is_section else key.name
        if config is None:
            lines.append((label, key.meaning))
        else:
            lines += [(setting.key, str(setting)) for setting in config.settings(key)]
    if lines:
        room = _columns() - max(len(label) for label, _ in lines) - 4
        shown = [(label, text if len(text) <= room else f"{text[: room - 1]}…") for label, text in lines]
        print_block(f"{title}: {group.description}" if group.description else title, shown)


def _columns() -> int:
    """How wide a line may be: as the terminal, or as long as it is where nobody looks at one."""
    return max(60, shutil.get_terminal_size().columns) if sys.stdout.isatty() else sys.maxsize


def _as_json(key: Key, place: str, config: Config | None) -> dict[str, Any]:
    """What is known of a key in one of its places."""
    settings = config.settings(replace(key, places=(place,))) if config else []
    return {
        "meaning": key.meaning,
        "type": key.kind,
        "required": key.required,
        "default": key.schema.get("default"),
        "memory_and_time": key.costs,
        "other_names": list(key.other_names),
        "in_force": [asdict(setting) for setting in settings],
    }
