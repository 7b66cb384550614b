"""The public function `loratune.explain`: the meaning and cost of config keys and, with a config file, their values and
where they are set."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import loratune
from loratune import outputs
from loratune.api import Overrides, StrPath, assignments, computing
from loratune.codes import Code
from loratune.config import AUTO, RunConfig, load_with_lines
from loratune.config.arguments import checked
from loratune.config.keys import Key, KeyGroup, KeyPath, dotted, find, groups, suggestion, yaml_flow
from loratune.config.schema import DEFAULT_BETA, PREFERENCE_KEYS
from loratune.config.template_variables import described, variables
from loratune.config.yaml_files import Document
from loratune.errors import ConfigError, Problem
from loratune.model.source import chat_templates

ARGUMENTS_KEY = "data.chat_template_kwargs"
SERVED_KEYS = ("model.name_or_path", "lora.target_modules", "lora.target_parameters")
"""The keys that decide which servers apply the adapter."""


@dataclass(frozen=True)
class Setting:
    """The effective value of a key.

    Attributes:
        key: The dotted key, with indices for list entries.
        value: The value as written, or the default.
        source: `file:line`, `the default`, or the name of the overrides, `--set` on the command line.
        decided_by_run: Whether the run chooses the value, as for `auto`.
        used: Whether the value has an effect.
        remark: The value that the run uses instead, or why the key has no effect; empty if it is used unchanged.
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
class Explanation:
    """Keys and sections of the config, and their effective values.

    Attributes:
        found: The keys and sections.
        path: The config file, if any.
        config: The validated config and the content of its file, if any.
        template: Name → default of each argument that the chat template of the config reads; None if it is not known.
        servers: Server → what it does with the adapter of the config; None if the keys do not decide that.
        code: The code of an error, which may also be the name of a key; None if only keys are explained.
        choices: Key → value and reason of what a run of the config would decide; None if keys are explained.
    """

    found: Sequence[KeyGroup | Key]
    path: Path | None
    config: tuple[RunConfig, Document] | None
    template: Mapping[str, str] | None = None
    servers: Mapping[str, str] | None = None
    code: Code | None = None
    choices: Mapping[str, tuple[Any, str]] | None = None

    @property
    def decides_servers(self) -> bool:
        """Whether a key that decides which servers apply the adapter is explained for a config."""
        keys = (item.label for item in self.found if isinstance(item, Key))
        return self.config is not None and any(key in SERVED_KEYS for key in keys)

    def settings(self, key: Key) -> list[Setting]:
        """The effective value at each place of a key in the config; empty without a config."""
        if self.config is None:
            return []
        run, document = self.config
        given, written, used, known = (
            {path: value for place in key.places for path, value in _at(values, place.split("."))}
            for values in (run.model_dump(exclude_unset=True), document.values, run.resolved(), run.model_dump())
        )
        objective, settings = run.training.objective, []
        for path, default in known.items():
            value = written.get(path, default)
            is_read = path[0] != "preferences" or objective in PREFERENCE_KEYS[str(path[1])]
            is_used, unread = path in used and is_read, run.without_effect().get(dotted(path), "")
            is_decided, remark = is_used and key.is_decided_by_run(value), f"not used, {unread}" if unread else ""
            if is_decided:
                has_beta = key.label == "preferences.beta" and objective in DEFAULT_BETA
                remark = f"{DEFAULT_BETA[objective]:g} with {objective}" if has_beta else "the run decides"
            elif not is_used:
                remark = "not used, as another key sets the length of the run"
                remark = remark if is_read else f"not read by {objective}"
            source = document.where(path) if path in given else "the default"
            settings.append(Setting(dotted(path), value, source, is_decided, is_used and not unread, remark))
        return settings

    def blocks(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """A block for each key, and for each section with a line per key: its title, and names and texts."""
        if self.code is not None:
            yield f"error[{self.code}]", [("reported when", self.code.meaning)]
        for name, (value, why) in (self.choices or {}).items():
            yield name, [("value", yaml_flow(value)), ("reason", why)]
        for item in self.found:
            if isinstance(item, Key):
                yield ", ".join(item.places), [*self._lines_of_key(item)]
            elif lines := [line for key in item.keys for line in self._lines_in_group(item, key)]:
                title = item.name or "Outside the sections"
                yield f"{title}: {item.description}" if item.description else title, lines

    def _lines_of_key(self, key: Key) -> Iterator[tuple[str, str]]:
        yield "meaning", key.meaning
        yield "type", key.kind
        yield "default", key.default
        yield "memory and time", key.costs
        if key.other_names:
            yield "elsewhere called", ", ".join(key.other_names)
        if key.label == ARGUMENTS_KEY and self.config:
            unknown = "unknown, as the template is not on this machine"
            yield "template reads", unknown if self.template is None else described(self.template) or "none"
        if key.label in SERVED_KEYS:
            yield from ((f"in {name}", text) for name, text in (self.servers or {}).items())
        settings = self.settings(key)
        for setting in settings:
            place = "" if setting.key in key.places and len(settings) == 1 else f"{setting.key}: "
            yield "in force", f"{place}{setting}"
        if self.config and not settings:
            yield "in force", "nothing, as the config has no such entry"

    def _lines_in_group(self, group: KeyGroup, key: Key) -> list[tuple[str, str]]:
        if self.config is None:
            return [(key.label if group.is_section else key.name, key.meaning)]
        return [(setting.key, str(setting)) for setting in self.settings(key)]

    def to_dict(self) -> outputs.Explain:
        """Plain values: the explanation of each key, by its places."""
        if self.choices is not None:
            choices = {name: {"value": value, "reason": why} for name, (value, why) in self.choices.items()}
            return {"config": str(self.path), "keys": {}, "choices": choices}
        keys = [key for item in self.found for key in (item.keys if isinstance(item, KeyGroup) else (item,))]
        described_keys: dict[str, outputs.ExplainedKey] = {
            place: {
                "meaning": key.meaning,
                "type": key.kind,
                "required": key.required,
                "default": key.schema.get("default"),
                "memory_and_time": key.costs,
                "other_names": list(key.other_names),
                "in_force": [asdict(one) for one in self.settings(replace(key, places=(place,)))],
            }
            for key in keys
            for place in key.places
        }
        if self.template is not None:
            described_keys[ARGUMENTS_KEY]["template_reads"] = dict(self.template)
        if self.servers is not None:
            for key in described_keys.keys() & {*SERVED_KEYS}:
                described_keys[key]["servers"] = dict(self.servers)
        explained: outputs.Explain = {"config": str(self.path) if self.path else None, "keys": described_keys}
        if self.code is not None:
            explained["codes"] = {str(self.code): self.code.meaning}
        return explained


def _at(values: Any, names: list[str], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """The paths and values at a place; several for list entries."""
    if not names:
        yield path, values
    elif isinstance(values, list):
        for number, item in enumerate(values):
            yield from _at(item, names, (*path, number))
    elif isinstance(values, Mapping) and names[0] in values:
        yield from _at(values[names[0]], names[1:], (*path, names[0]))


@checked
def explain(key: str | None = None, path: StrPath | None = None, overrides: Overrides = ()) -> Explanation:
    """Explain keys of a config: meaning, cost, and with a config file the effective values. Or the code of an error.

    Args:
        key: A key, its beginning, or another tool's name for it; or a code; by default all keys. `auto`: what a run
            of the config would decide itself, which reads its rows and loads its base.
        path: The config file.
        overrides: As for `load_config`.

    Raises:
        ConfigError: The key is unknown, or the config is not valid; overrides are given without one.
        ModelError, DataError, ResourceError: As `train`, for `auto`.
    """
    if path is None and overrides:
        raise ConfigError(Problem(Code.USAGE_CONFLICT, "only works with a config", key="overrides"))
    document = None if path is None else load_with_lines(Path(path), assignments(overrides))
    if key == AUTO:
        return _choices(path, document)
    named: list[KeyGroup | Key] = [*groups()] if key is None else find(key)
    code = next((one for one in Code if one == str(key).removeprefix("error").strip(" []")), None)
    if not named and code is None:
        fix = suggestion(tuple(str(key).strip().split(".")))
        fix = fix if fix.startswith("did") else "loratune explain lists all keys"
        raise ConfigError(Problem(Code.CONFIG_UNKNOWN_KEY, "unknown key", key=str(key), fix=fix))
    keys = [one.label for item in named for one in (item.keys if isinstance(item, KeyGroup) else (item,))]
    sources = _templates(document[0]) if document and ARGUMENTS_KEY in keys else []
    template = {name: default for one in sources for name, default in variables(one).items()}
    found = Explanation(named, None if path is None else Path(path), document, template if sources else None, code=code)
    if document is None or not found.decides_servers:
        return found
    with computing():
        from loratune.training import params

        return replace(found, servers=params.servers(document[0]))


def _choices(path: StrPath | None, document: tuple[RunConfig, Document] | None) -> Explanation:
    """What a run of the config would decide."""
    if path is None or document is None:
        raise ConfigError(Problem(Code.USAGE_CONFLICT, "only works with a config", key=AUTO))
    plan = loratune.plan(document[0], overwrite=True, config_file=path)
    return Explanation((), Path(path), None, choices=plan.choices)


def _templates(config: RunConfig) -> list[str]:
    """The chat templates of a run, as far as they can be read."""
    try:
        own = config.data.chat_template
        return [Path(own).read_text(encoding="utf-8")] if own else chat_templates(config.model)
    except (OSError, ValueError):
        return []
