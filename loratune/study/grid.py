"""The values that a sweep tries: values of config keys, or ranges of numbers, checked before the first trial.

This module does not import torch.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from loratune import config
from loratune.codes import Code
from loratune.config import RunConfig
from loratune.config.yaml_files import number
from loratune.errors import ConfigError, Problem

OPTION, BUDGET = "--grid", "--budget"
Settings = dict[str, str]
"""Key of the config → value, as written after `--set KEY=`."""

_EXAMPLE = "training.learning_rate=1e-4,3e-4,1e-3"
_MAX_COMBINATIONS = 10_000
_MAX_PROBLEMS = 20
"""Problems that are reported at once."""
_LOG_RATIO = 10.0
"""Ranges whose ends have at least this ratio are drawn from on a logarithmic scale."""
_SECTIONS = ("lora", "training", "preferences")
_OF_ROWS = (
    "data.max_length", "data.truncation", "data.packing", "data.loss_on", "data.invalid_rows", "data.max_dropped",
    "data.replay",
)  # fmt: skip
"""Keys of the data section that do not change which rows are held out."""
_FIXED = (
    "lora.start_from", "training.report_to", "training.save_steps", "training.ddp_timeout", "training.logging_steps",
)  # fmt: skip
"""Keys that do not change the adapter; and `lora.start_from`, for which each value would be a separate study."""
_COMMA = re.compile(r",(?![^\[{]*[\]}])")
"""A comma outside of brackets."""
_RANGE = re.compile(r"\s*([-+.\deE]+)\.\.([-+.\deE]+)\s*", re.ASCII)
_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s)?", re.ASCII)


@dataclass(frozen=True)
class Axis:
    """A key that is varied.

    Attributes:
        key: The key of the config.
        values: The values to try, or the two ends of a range.
        is_range: Whether numbers between the two are tried.
    """

    key: str
    values: tuple[str, ...]
    is_range: bool = False

    @property
    def distribution(self) -> BaseDistribution:
        """The distribution of values. If the ends of a range are whole numbers, so are the values."""
        if not self.is_range:
            return CategoricalDistribution(self.values)
        low, high = map(float, self.values)
        is_logarithmic = low > 0 and high / low >= _LOG_RATIO
        if all(re.fullmatch(r"[+-]?\d+", value) for value in self.values):
            return IntDistribution(int(low), int(high), log=is_logarithmic)
        return FloatDistribution(low, high, log=is_logarithmic)


@dataclass(frozen=True)
class Grid:
    """The settings of a sweep.

    Attributes:
        axes: What is varied, in the order of the command line.
        config_file: The config that everything else is taken from.
        assignments: What is set in it for all trials.
    """

    axes: tuple[Axis, ...]
    config_file: Path
    assignments: tuple[str, ...]

    @property
    def keys(self) -> list[str]:
        """The keys that are varied."""
        return [axis.key for axis in self.axes]

    @property
    def has_ranges(self) -> bool:
        """Whether numbers are drawn from ranges, so that the combinations have no end."""
        return any(axis.is_range for axis in self.axes)

    def combinations(self) -> list[Settings]:
        """All combinations of values, the last key varying fastest; of a range, its two ends."""
        values = itertools.product(*(axis.values for axis in self.axes))
        return [dict(zip(self.keys, one, strict=True)) for one in values]

    def spread_out(self) -> list[Settings]:
        """All combinations, each as far as possible from those before it, so that the first few span the grid."""
        combinations = self.combinations()
        ends = [max(1, len(axis.values) - 1) for axis in self.axes]
        places = np.array([*itertools.product(*(range(len(axis.values)) for axis in self.axes))]) / ends
        nearest, order = np.full(len(places), np.inf), [0]
        while len(order) < len(places):
            nearest = np.minimum(nearest, np.abs(places - places[order[-1]]).sum(1))
            nearest[order[-1]] = -1
            order.append(int(nearest.argmax()))
        return [combinations[number] for number in order]

    def run(self, settings: Mapping[str, str]) -> RunConfig:
        """The config of a trial. Raises ConfigError."""
        return config.load(self.config_file, [*self.assignments, *(f"{key}={text}" for key, text in settings.items())])

    def check(self, *, halving: bool, is_bounded: bool) -> dict[str, RunConfig]:
        """Check the config and every combination.

        Args:
            halving: Whether trials may be stopped early.
            is_bounded: Whether the number of trials, or their time, is limited.

        Returns:
            `label` of each combination → its config.

        Raises:
            ConfigError: Of the config; or each problem of a combination, with the first that has it.
        """
        self._check_comparable(self.run({}), halving=halving)
        if any(axis.is_range for axis in self.axes) and not is_bounded:
            what, fix = "a range has no end of values to try", "give --trials or --budget"
            raise ConfigError(Problem(Code.USAGE_CONFLICT, what, key=OPTION, fix=fix))
        runs, resolved, found = dict[str, RunConfig](), dict[str, str](), dict[tuple[str, str], Problem]()
        for settings in self.combinations():
            name = label(settings)
            try:
                run = self.run(settings)
                if (same := resolved.setdefault(run.model_dump_json(), name)) != name:
                    raise _refused(f"{name} is {same}", fix="name each value once, or a trial would be trained twice")
                runs[name] = run
            except ConfigError as error:
                for problem in error.problems:
                    is_of_set = problem.where.startswith("--set") and problem.key in self.keys
                    where = OPTION if is_of_set else problem.where or f"{OPTION} {name}"
                    what = problem.what if is_of_set or not problem.where else f"{problem.what} (with {name})"
                    found.setdefault((problem.key, problem.what), replace(problem, what=what, where=where))
        if found:
            raise ConfigError([*found.values()][:_MAX_PROBLEMS])
        return runs

    def _check_comparable(self, run: RunConfig, *, halving: bool) -> None:
        """Raises ConfigError: trials could not be compared, as their rows or losses would differ in meaning."""
        if run.data.validation is None:
            what = "trials are compared on validation rows, but there are none"
            where, fix = str(self.config_file), "set data.validation=0.1, or a file"
            raise ConfigError(Problem(Code.CONFIG_MISSING_KEY, what, where, "data.validation", fix))
        is_weighted = any(source.weight is not None for source in run.data.train_sources)
        if "training.seed" in self.keys and (isinstance(run.data.validation, float) or is_weighted):
            what = "cannot be varied: it decides which rows are held out, or drawn from weighted sources"
            raise _refused(what, "training.seed", "name a file of validation rows in data.validation")
        losses = [key for key in self.keys if key == "training.objective" or key.startswith("preferences.")]
        if halving and losses:
            what = "trials with different objectives cannot be stopped early by their losses"
            raise ConfigError(Problem(Code.USAGE_CONFLICT, what, OPTION, losses[0], "leave --halving out"))


def parse(options: Sequence[str], config_file: Path, assignments: Sequence[str]) -> Grid:
    """The grid that the options describe.

    Args:
        options: Each `section.key=VALUE,VALUE,...`, or `section.key=LOW..HIGH`.
        config_file: The config.
        assignments: The values of `--set`.

    Raises:
        ConfigError: An option is missing or malformed; a key is given twice, is also set, or cannot be varied; there
            are too many combinations.
    """
    axes, problems = list[Axis](), list[Problem]()
    if not options:
        what, fix = "no key to vary was given", f"name values to try: {OPTION} {_EXAMPLE}"
        problems.append(Problem(Code.USAGE_CONFLICT, what, OPTION, fix=fix))
    for option in options:
        try:
            axes.append(_axis(option))
        except ConfigError as error:
            problems += error.problems
    keys, fixed = [axis.key for axis in axes], {name.partition("=")[0].strip() for name in assignments}
    for key in dict.fromkeys(keys):
        if keys.count(key) > 1 or key in fixed:
            what = "is given twice" if keys.count(key) > 1 else "is also set by --set"
            problems.append(Problem(Code.USAGE_CONFLICT, what, OPTION, key, "name it once"))
        elif key not in _OF_ROWS and (key in _FIXED or "." not in key or key.partition(".")[0] not in _SECTIONS):
            what = "cannot be varied: trials are compared on the same rows and base, and each has an adapter"
            fix = f"name keys of {', '.join(_SECTIONS)} that change the adapter, or of {', '.join(_OF_ROWS)}"
            problems += _refused(what, key, fix).problems
    if (count := math.prod(len(axis.values) for axis in axes)) > _MAX_COMBINATIONS:
        what, fix = f"{count:,} combinations are too many", "give fewer values, or ranges such as 1e-5..1e-3"
        problems += _refused(what, fix=fix).problems
    if problems:
        raise ConfigError(problems)
    return Grid(tuple(axes), config_file, tuple(assignments))


def _refused(what: str, key: str = "", fix: str = "") -> ConfigError:
    return ConfigError(Problem(Code.USAGE_BAD_VALUE, what, OPTION, key, fix))


def _axis(option: str) -> Axis:
    key, equals, text = option.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise _refused(f"`{option}` is not of the form section.key=VALUE,VALUE", fix=f"such as {_EXAMPLE}")
    if match := _RANGE.fullmatch(text):
        low, high = number(match[1]), number(match[2])
        if low is None or high is None or not low < high < math.inf:
            what, fix = f"{text.strip()} is not a range", "write the lower number first, such as 1e-5..1e-3"
            raise _refused(what, key, fix)
        return Axis(key, (match[1], match[2]), is_range=True)
    values = [value.strip() for value in (_COMMA.split(text) if re.search(r"[\[{]", text) else text.split(","))]
    if not all(values):
        raise _refused("has an empty value", key, "give values with commas between them")
    return Axis(key, tuple(dict.fromkeys(values)))


def label(settings: Mapping[str, object]) -> str:
    """`training.learning_rate=1e-4 lora.r=8`."""
    return " ".join(f"{key}={value}" for key, value in settings.items())


def parse_time(text: str) -> float:
    """Seconds of `30m`, `1h`, `1h30m`, `45s`, or of a number of minutes. Raises ConfigError: it is not a time."""
    compact, seconds = text.replace(" ", "").lower(), 0.0
    if (minutes := number(compact)) is not None:
        seconds = 60 * minutes
    elif (match := _TIME.fullmatch(compact)) is not None:
        seconds = sum(unit * float(part or 0) for unit, part in zip((3600, 60, 1), match.groups(), strict=True))
    if not 0 < seconds < 1e9:
        what, fix = f"{text!r} is not a time above 0", "write 30m, 1h, 1h30m, or minutes as a number"
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key=BUDGET, fix=fix))
    return seconds
