"""What a sweep tries: values of keys, or ranges of numbers, all checked before the first trial. Imports no torch."""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from loratune import config
from loratune.codes import Code
from loratune.config import RunConfig
from loratune.errors import ConfigError, Problem

OPTION = "--grid"
Settings = dict[str, str]
"""Key of the config → value, as one would write it behind `--set KEY=`."""

_EXAMPLE = "training.learning_rate=1e-4,3e-4,1e-3"
_MOST = 10_000
"""Combinations beyond which a grid is refused."""
_SHOWN = 20
"""Problems that are told at once."""
_LOG_RATIO = 10.0
"""The ratio of the ends of a range from which on its logarithm is drawn from."""
_OF_ROWS = (
    "data.max_length", "data.truncation", "data.packing", "data.loss_on", "data.invalid_rows", "data.max_dropped",
    "data.replay",
)  # fmt: skip
_NOT_VARIED = {
    "lora.start_from": "each starting point is a study of its own",
    "training.report_to": "it changes no adapter",
    "training.save_steps": "it changes no adapter",
    "training.ddp_timeout": "it changes no adapter",
    "training.logging_steps": "it changes no adapter",
}
_OBJECTIVE, _NUMBERS = "training.objective", "preferences."
"""What decides what the loss of a trial means: a key, and what keys begin with."""
_RANGE = re.compile(r"\s*([-+.\deE]+)\.\.([-+.\deE]+)\s*", re.ASCII)


@dataclass(frozen=True)
class Axis:
    """A key that is varied.

    Attributes:
        key: Of the config.
        values: What is tried; the two ends of a range.
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
        """Whether numbers of a range are drawn evenly over its orders of magnitude."""
        low, high = self.bounds
        return low > 0 and high / low >= _LOG_RATIO


@dataclass(frozen=True)
class Grid:
    """The settings of a sweep.

    Attributes:
        axes: What is varied, in the order of the command line.
        config_file: The config of which all else is taken.
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
        """Whether there are numbers to draw, so that not all combinations can be tried."""
        return any(axis.is_range for axis in self.axes)

    def combinations(self) -> list[Settings]:
        """All combinations of values, the last key varying fastest; of a range, its two ends."""
        return [
            dict(zip(self.keys, values, strict=True)) for values in itertools.product(*(a.values for a in self.axes))
        ]

    def spread_out(self) -> list[Settings]:
        """All combinations, each as far as can be from those before it: however few are tried, they span the grid."""
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
        chosen = [f"{key}={value}" for key, value in settings.items()]
        return config.load(self.config_file, [*self.assignments, *chosen])


def parse(options: Sequence[str], config_file: Path, assignments: Sequence[str]) -> Grid:
    """The grid that the options mean.

    Args:
        options: Each `section.key=VALUE,VALUE,...`, or `section.key=LOW..HIGH`.
        config_file: The config.
        assignments: Of `--set`.

    Raises:
        ConfigError: There is none, or one that is neither; a key comes twice, is also set, or cannot be varied; there
            are too many combinations.
    """
    axes, problems = [], list[Problem]()
    if not options:
        what, fix = "no key to vary was given", f"name values to try: {OPTION} {_EXAMPLE}"
        problems.append(Problem(Code.USAGE_NEEDS_OPTION, what, OPTION, fix=fix))
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
        elif reason := _not_varied(key):
            problems.append(Problem(Code.SWEEP_KEY, f"cannot be varied: {reason}", OPTION, key))
    if (count := math.prod(len(axis.values) for axis in axes)) > _MOST:
        what, fix = f"{count:,} combinations are too many", "give fewer values, or ranges such as 1e-5..1e-3"
        problems.append(Problem(Code.SWEEP_TOO_MANY, what, OPTION, fix=fix))
    if problems:
        raise ConfigError(problems)
    return Grid(tuple(axes), config_file, tuple(assignments))


def _not_varied(key: str) -> str:
    """Why a key cannot be varied; empty if it can, or if there is none of that name, which the config tells better."""
    section = key.partition(".")[0]
    if key in RunConfig.model_fields and key != "output_dir":
        return "it is a whole section; name a key of it, such as lora.r"
    if section == "model":
        return "all trials share one base"
    if section == "data" and key not in _OF_ROWS:
        return "it decides which rows are held out, by which trials are compared"
    return "the study is beside it" if key == "output_dir" else _NOT_VARIED.get(key, "")


def _axis(option: str) -> Axis:
    key, equals, text = option.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        what = f"`{option}` is not of the form section.key=VALUE,VALUE"
        raise ConfigError(Problem(Code.SWEEP_BAD_GRID, what, OPTION, fix=f"such as {_EXAMPLE}"))
    if match := _RANGE.fullmatch(text):
        return _range(key, match[1], match[2])
    values = [value.strip() for value in _split(text)]
    if not all(values):
        what, fix = "has an empty value", "give values with commas between them"
        raise ConfigError(Problem(Code.SWEEP_BAD_GRID, what, OPTION, key, fix))
    return Axis(key, tuple(dict.fromkeys(values)))


def _range(key: str, low: str, high: str) -> Axis:
    try:
        is_rising = float(low) < float(high) < math.inf
    except ValueError:
        is_rising = False
    if not is_rising:
        what, fix = f"{low}..{high} is no range", "write the lower number first, such as 1e-5..1e-3"
        raise ConfigError(Problem(Code.SWEEP_BAD_GRID, what, OPTION, key, fix))
    return Axis(key, (low, high), is_range=True)


def _split(text: str) -> Iterator[str]:
    """The parts between the commas that stand outside of brackets and quotes."""
    depth, quote, start = 0, "", 0
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            yield text[start:position]
            start = position + 1
    yield text[start:]


def check(grid: Grid, check_run: Callable[[RunConfig], None] = lambda _: None) -> dict[str, RunConfig]:
    """Check every combination, before the first trial.

    Args:
        grid: What is to be tried.
        check_run: A further check; it raises an error.

    Returns:
        `label` of each combination → its config.

    Raises:
        ConfigError: Of each problem, the first combination that has it.
    """
    runs, found = dict[str, RunConfig](), dict[tuple[str, str], Problem]()
    resolved = dict[str, str]()
    for settings in grid.combinations():
        try:
            run = grid.run(settings)
            check_run(run)
            runs[label(settings)] = run
            if (same := resolved.setdefault(run.model_dump_json(), label(settings))) != label(settings):
                fix = "name each value once, or a trial would be trained twice"
                raise ConfigError(Problem(Code.SWEEP_BAD_GRID, f"{label(settings)} is {same}", OPTION, fix=fix))
        except ConfigError as error:
            for problem in error.problems:
                own = problem.where.startswith("--set") and problem.key in grid.keys
                where = OPTION if own else problem.where or f"{OPTION} {label(settings)}"
                if not own and problem.where and len(grid.axes) and _is_new(problem, grid):
                    problem = replace(problem, what=f"{problem.what} (with {label(settings)})")
                found.setdefault((problem.key, problem.what), replace(problem, where=where))
    if found:
        raise ConfigError([*found.values()][:_SHOWN])
    return runs


def _is_new(problem: Problem, grid: Grid) -> bool:
    """Whether the config alone does not have a problem."""
    try:
        grid.run({})
    except ConfigError as error:
        return all((one.key, one.what) != (problem.key, problem.what) for one in error.problems)
    return True


def check_seed(grid: Grid, run: RunConfig) -> None:
    """Raises ConfigError: other seeds would train on other rows, and the held-out ones among them."""
    drawn = isinstance(run.data.validation, float) or any(
        source.weight is not None for source in run.data.train_sources
    )
    if "training.seed" in grid.keys and drawn:
        what = "cannot be varied: it decides which rows are held out, or drawn from weighted sources"
        fix = "name a file of validation rows in data.validation"
        raise ConfigError(Problem(Code.SWEEP_KEY, what, OPTION, "training.seed", fix))


def check_halving(grid: Grid, *, halving: bool) -> None:
    """Raises ConfigError: the losses by which trials are to be stopped early mean something else in each of them."""
    varied = [key for key in grid.keys if key == _OBJECTIVE or key.startswith(_NUMBERS)]
    if halving and varied:
        what = "trials that lower other losses cannot be stopped early by them"
        raise ConfigError(Problem(Code.USAGE_CONFLICT, what, OPTION, varied[0], "leave --halving out"))


def label(settings: Mapping[str, object]) -> str:
    """`training.learning_rate=1e-4 lora.r=8`."""
    return " ".join(f"{key}={value}" for key, value in settings.items())
