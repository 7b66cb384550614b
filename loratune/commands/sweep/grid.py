"""What a sweep tries: values of config keys, or ranges of numbers, checked before the first trial. Imports no torch."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from loratune import config
from loratune.codes import Code
from loratune.config import RunConfig
from loratune.config.yaml_reader import number
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
_OF_ROWS = (
    "data.max_length", "data.truncation", "data.packing", "data.loss_on", "data.invalid_rows", "data.max_dropped",
    "data.replay",
)  # fmt: skip
_FIXED = {
    "lora.start_from": "each starting point is a study of its own",
    "training.report_to": "it changes no adapter",
    "training.save_steps": "it changes no adapter",
    "training.ddp_timeout": "it changes no adapter",
    "training.logging_steps": "it changes no adapter",
    "output_dir": "the study is kept next to it",
}
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
    def is_whole(self) -> bool:
        """Whether a range is one of whole numbers."""
        return all(re.fullmatch(r"[+-]?\d+", value) for value in self.values)

    @property
    def bounds(self) -> tuple[float, float]:
        """The ends of a range."""
        return float(self.values[0]), float(self.values[1])

    @property
    def is_logarithmic(self) -> bool:
        """Whether numbers of a range are drawn on a logarithmic scale."""
        low, high = self.bounds
        return low > 0 and high / low >= _LOG_RATIO


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

    def check(self, *, halving: bool) -> dict[str, RunConfig]:
        """Check the config and every combination.

        Args:
            halving: Whether trials may be stopped early.

        Returns:
            `label` of each combination → its config.

        Raises:
            ConfigError: Of the config; or each problem of a combination, with the first that has it.
        """
        self._check_comparable(self.run({}), halving=halving)
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
                    found.setdefault((problem.key, problem.what), self._located(problem, name))
        if found:
            raise ConfigError([*found.values()][:_MAX_PROBLEMS])
        return runs

    def _located(self, problem: Problem, name: str) -> Problem:
        """A problem of a combination, with its place on the command line."""
        if problem.where.startswith("--set") and problem.key in self.keys:
            return replace(problem, where=OPTION)
        if not problem.where:
            return replace(problem, where=f"{OPTION} {name}")
        return replace(problem, what=f"{problem.what} (with {name})")

    def _check_comparable(self, run: RunConfig, *, halving: bool) -> None:
        """Raises ConfigError: trials could not be compared, as their rows or losses would differ in meaning."""
        if run.data.validation is None:
            what, fix = (
                "trials are compared on validation rows, but there are none",
                "set data.validation=0.1, or a file",
            )
            raise ConfigError(Problem(Code.CONFIG_MISSING_KEY, what, str(self.config_file), "data.validation", fix))
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
        elif reason := _why_fixed(key):
            problems += _refused(f"cannot be varied: {reason}", key).problems
    if (count := math.prod(len(axis.values) for axis in axes)) > _MAX_COMBINATIONS:
        what, fix = f"{count:,} combinations are too many", "give fewer values, or ranges such as 1e-5..1e-3"
        problems += _refused(what, fix=fix).problems
    if problems:
        raise ConfigError(problems)
    return Grid(tuple(axes), config_file, tuple(assignments))


def _refused(what: str, key: str = "", fix: str = "") -> ConfigError:
    return ConfigError(Problem(Code.USAGE_BAD_VALUE, what, OPTION, key, fix))


def _why_fixed(key: str) -> str:
    """Why a key cannot be varied; empty if it can, or if the config has no such key."""
    section = key.partition(".")[0]
    if key in RunConfig.model_fields and key not in _FIXED:
        return "it is a whole section; name a key of it, such as lora.r"
    if section == "model":
        return "all trials share one base"
    if section == "data" and key not in _OF_ROWS:
        return "it decides which rows are held out, by which trials are compared"
    return _FIXED.get(key, "")


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
    values = [value.strip() for value in _split(text)]
    if not all(values):
        raise _refused("has an empty value", key, "give values with commas between them")
    return Axis(key, tuple(dict.fromkeys(values)))


def _split(text: str) -> Iterator[str]:
    """The parts between the commas outside of brackets and quotes."""
    depth, quote, start = 0, "", 0
    for position, character in enumerate(text):
        if quote or character in "'\"":
            quote = "" if character == quote else quote or character
        elif character in "[{]}":
            depth += 1 if character in "[{" else -1
        elif character == "," and depth == 0:
            yield text[start:position]
            start = position + 1
    yield text[start:]


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
