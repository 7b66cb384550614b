"""User options: the adapters (`adapters`, `use`, `mix`), and the sampling settings."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, get_type_hints

from loratune.codes import Code
from loratune.config.arguments import check
from loratune.config.yaml_files import number
from loratune.errors import ConfigError, Problem
from loratune.system.files import path_problem

UNNAMED = ""
"""The name of a single adapter without a name."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_RESERVED = ("base", "mix")
"""Names that adapters cannot have; `base` is the base without an adapter."""
_NAME_RULE = "take letters, digits, - and _, and another name than " + " and ".join(_RESERVED)


@dataclass(frozen=True)
class Selection:
    """The adapters of a command.

    Attributes:
        directories: Name → directory, at least one.
        default: The name of the adapter for prompts that name none.
        mix: Name → weight in the weighted sum that is used instead of single adapters; empty without one.
    """

    directories: Mapping[str, Path]
    default: str
    mix: Mapping[str, float]


def _refused(what: str, key: str, fix: str = "", where: str = "") -> ConfigError:
    return ConfigError(Problem(Code.USAGE_BAD_VALUE, what, where, key, fix))


def parse_selection(values: Sequence[str], use: str | None = None, mix: str | None = None) -> Selection:
    """Parse the options.

    Args:
        values: The adapters: NAME=DIR, or a single DIR. An existing directory is a DIR, even with a `=`.
        use: The name of the adapter for prompts that name none; by default the first.
        mix: NAME:WEIGHT, separated by commas.

    Raises:
        ConfigError: No adapter is given; a name is invalid, reserved or unknown; a name or directory is repeated; one
            of several adapters has no name; a weight is not a finite number; `use` and `mix` are both given.
    """
    if not values:
        raise _refused("no adapter is given", "adapters", "name one or more")
    named = [_split(value) for value in values]
    if len(named) > 1 and any(name == UNNAMED for name, _ in named):
        bare = next(str(path) for name, path in named if name == UNNAMED)
        raise _refused("several adapters need names", "adapters", "give each as `adapters=['NAME=DIR']`", bare)
    directories: dict[str, Path] = {}
    places: dict[Path, str] = {}
    for name, path in named:
        place = Path(os.path.realpath(path))  # which takes a link to itself, too
        if name in directories or place in places:
            clash = f"the name {name}" if name in directories else f"the directory of {places[place]}"
            fix = "give each adapter once, with a name of its own"
            raise _refused(f"{clash} is given twice", "adapters", fix, str(path))
        directories[name], places[place] = path, name
    if use is not None and mix is not None:
        raise ConfigError(Problem(Code.USAGE_CONFLICT, "give `use=...` or `mix=...`, not both"))
    if use is not None:
        _check_known(use, directories, "use")
    return Selection(directories, next(iter(directories)) if use is None else use, _weights(mix, directories))


def _split(value: str) -> tuple[str, Path]:
    """The name and the directory of one of the adapters."""
    name, separator, directory = value.partition("=")
    if not separator or Path(value).is_dir():
        name, directory = UNNAMED, value
    elif not _NAME.fullmatch(name) or name in _RESERVED:
        what = f"{name!r} cannot be the name of an adapter" if name else "the name before = is empty"
        raise _refused(what, "adapters", _NAME_RULE)
    if reason := path_problem(directory) or ("" if directory else "is empty"):
        raise _refused(f"the path {reason}", "adapters", "check the path")
    return name, Path(directory)


def _check_known(name: str, directories: Mapping[str, Path], key: str) -> None:
    if name not in directories or name == UNNAMED:
        names = ", ".join(filter(None, directories))
        fix = f"the adapters are {names}" if names else "give it as `adapters=['NAME=DIR']`"
        raise _refused(f"there is no adapter {name!r}", key, fix)


def _weights(mix: str | None, directories: Mapping[str, Path]) -> dict[str, float]:
    """Name → weight in the text of a mixture."""
    weights: dict[str, float] = {}
    for entry in [] if mix is None else mix.split(","):
        name, _, text = entry.strip().rpartition(":")
        weight = number(text)
        if not name or weight is None or not math.isfinite(weight):
            raise _refused(f"{entry!r} is not NAME:WEIGHT", "mix", "write it like sql:0.7,tone:0.3")
        _check_known(name, directories, "mix")
        if name in weights:
            raise _refused(f"{name} has two weights", "mix", "give it one")
        weights[name] = weight
    return weights


_RANGES = {"temperature": (1e-3, 1000), "top_p": (1e-6, 1), "top_k": (1, 1 << 31), "seed": (0, (1 << 63) - 1)}
"""Setting → minimum and maximum; logits divided by a lower temperature would be inf."""


class SamplingOptions(TypedDict, total=False):
    """The settings of `Sampling` as keyword arguments."""

    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: Sequence[str]


@dataclass(frozen=True)
class Sampling:
    """Sampling settings, and stop texts.

    Attributes:
        temperature: 0 for greedy decoding; above 0, tokens are sampled.
        top_p: Sample from the most likely tokens with this total probability; None for the value in the base's
            generation_config.json.
        top_k: Sample from this many of the most likely tokens; None as for `top_p`.
        seed: Random seed: the same prompts get the same completions. None uses torch's current random state.
        stop: Texts at which a completion ends; they are not part of it.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Sequence[str] = ()

    def check(self) -> None:
        """Raises ConfigError: a setting is of another type or out of range, or has no effect."""
        for name, expected in get_type_hints(SamplingOptions).items():
            check(name, getattr(self, name), expected)
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most and not (name == "temperature" and value == 0):
                fix = "0 takes the likeliest token" if name == "temperature" else ""
                shown = f"{value:g}" if isinstance(value, float) else f"{value:,}"[:30]
                raise _refused(f"{shown} is not between {least:g} and {most:,}", name, fix)
        for name in ("top_p", "top_k"):
            if not self.temperature and getattr(self, name) is not None:
                raise _refused("only works with a temperature above 0", name)
        if "" in self.stop:
            raise _refused("is empty", "stop")

    def cut(self, text: str) -> str:
        """The completion up to the first stop text."""
        ends = [text.index(stop) for stop in self.stop if stop in text]
        return text[: min(ends)] if ends else text

    def for_batch(self, number: int) -> "Sampling":
        """The same settings, with a different seed for each batch."""
        return self if self.seed is None else replace(self, seed=(self.seed + number) % (1 << 63))


GREEDY = Sampling()
"""Greedy decoding."""
