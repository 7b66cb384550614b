"""The adapters of a command: `--adapter DIR`, or several as `--adapter NAME=DIR`, with `--use` and `--mix`."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratune.codes import Code
from loratune.config.yaml_reader import number
from loratune.errors import ConfigError, Problem
from loratune.system.files import path_problem

UNNAMED = ""
"""The name of a single adapter that the user did not name."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_RESERVED = ("base", "mix")
"""`base` is the base without any adapter."""
_NAME_RULE = "take letters, digits, - and _, and another name than " + " and ".join(_RESERVED)


@dataclass(frozen=True)
class Selection:
    """The adapters of a command.

    Attributes:
        directories: Name → directory, at least one.
        default: The name of the adapter for prompts that name none.
        mix: Name → weight of the mixture that answers instead of single adapters; empty without --mix.
    """

    directories: Mapping[str, Path]
    default: str
    mix: Mapping[str, float]


def parse(values: Sequence[str], use: str | None = None, mix: str | None = None) -> Selection:
    """Read the options.

    Args:
        values: The values of --adapter: NAME=DIR, or a single DIR. An existing directory is a DIR, even with a `=`.
        use: The name of the adapter for prompts that name none; by default the first.
        mix: NAME:WEIGHT, separated by commas.

    Raises:
        ConfigError: A name is not valid, reserved or unknown; a name or directory is repeated; several adapters have
            no names; a weight is not a finite number; --use and --mix are both given.
    """
    named = [_split(value) for value in values]
    if len(named) > 1 and any(name == UNNAMED for name, _ in named):
        bare = next(str(path) for name, path in named if name == UNNAMED)
        what, fix = "several adapters need names", "give each as --adapter NAME=DIR"
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, bare, "--adapter", fix))
    directories: dict[str, Path] = {}
    places: dict[Path, str] = {}
    for name, path in named:
        place = path.resolve()
        if name in directories or place in places:
            clash = f"the name {name}" if name in directories else f"the directory of {places[place]}"
            what, fix = f"{clash} is given twice", "give each adapter once, with a name of its own"
            raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, str(path), "--adapter", fix))
        directories[name], places[place] = path, name
    if use is not None and mix is not None:
        raise ConfigError(Problem(Code.USAGE_CONFLICT, "give --use or --mix, not both"))
    if use is not None:
        _check_known(use, directories, "--use")
    return Selection(directories, next(iter(directories)) if use is None else use, _weights(mix, directories))


def _split(value: str) -> tuple[str, Path]:
    """The name and the directory of a value of --adapter."""
    name, separator, directory = value.partition("=")
    if not separator or Path(value).is_dir():
        name, directory = UNNAMED, value
    elif not _NAME.fullmatch(name) or name in _RESERVED:
        what = f"{name!r} cannot be the name of an adapter" if name else "the name before = is empty"
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key="--adapter", fix=_NAME_RULE))
    if reason := path_problem(directory) or ("" if directory else "is empty"):
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, f"the path {reason}", key="--adapter"))
    return name, Path(directory)


def _check_known(name: str, directories: Mapping[str, Path], key: str) -> None:
    if name not in directories or name == UNNAMED:
        names = ", ".join(filter(None, directories))
        fix = f"the adapters are {names}" if names else "give it as --adapter NAME=DIR"
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, f"there is no adapter {name!r}", key=key, fix=fix))


def _weights(mix: str | None, directories: Mapping[str, Path]) -> dict[str, float]:
    """Name → weight in a value of --mix."""
    weights: dict[str, float] = {}
    for entry in [] if mix is None else mix.split(","):
        name, _, text = entry.strip().rpartition(":")
        weight = number(text)
        if not name or weight is None or not math.isfinite(weight):
            what, fix = f"{entry!r} is not NAME:WEIGHT", "write it like sql:0.7,tone:0.3"
            raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key="--mix", fix=fix))
        _check_known(name, directories, "--mix")
        if name in weights:
            what = f"{name} has two weights"
            raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key="--mix", fix="give it one"))
        weights[name] = weight
    return weights
