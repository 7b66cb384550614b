"""The values that a sweep tries: values of config keys, or ranges of numbers, checked before the first trial.

This module does not import torch.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from loratune import config
from loratune.codes import Code
from loratune.config import RunConfig
from loratune.config.keys import suggestion
from loratune.config.yaml_files import OVERRIDES, number
from loratune.errors import ConfigError, Problem
from loratune.text import plural

GRID = "`grid=...`"
"""The place of problems of the grid."""
TRAIN_ROWS = "data.max_train_samples"
"""The key that is varied where parts of the training rows are tried."""
Settings = dict[str, str]
"""Key of the config → value, as written in `KEY=VALUE`."""

_EXAMPLE = "training.learning_rate=1e-4,3e-4,1e-3"
_MAX_COMBINATIONS = 10_000
_MAX_PROBLEMS = 20
"""Problems that are reported at once."""
_LOG_RATIO = 10.0
"""Ranges whose ends have at least this ratio are drawn from on a logarithmic scale."""
_SECTIONS = ("lora", "training", "preferences")
_OF_ROWS = (
    "data.max_length", "data.truncation", "data.packing", "data.loss_on", "data.invalid_rows", "data.max_dropped",
    "data.replay", TRAIN_ROWS,
)  # fmt: skip
"""Keys of the data section that do not change which rows are held out."""
_FIXED = (
    "lora.start_from", "training.report_to", "training.save_steps", "training.ddp_timeout", "training.logging_steps",
)  # fmt: skip
"""Keys that do not change the adapter; and `lora.start_from`, for which each value would be a separate study."""
_COMMA = re.compile(r",(?![^\[{]*[\]}])")
"""A comma outside of brackets."""
_RANGE = re.compile(r"\s*([-+.\deE]+)\.\.([-+.\deE]+)\s*", re.ASCII)
_PART = re.compile(r"\d{1,9}/[1-9]\d{0,8}|\d(\.\d{1,9})?", re.ASCII)
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
        by_rows: Whether parts of the training rows are tried, all of them first, whose trial decides what is `auto` for
            the others.
    """

    axes: tuple[Axis, ...]
    config_file: Path
    assignments: tuple[str, ...]
    by_rows: bool = False

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
        """All combinations, each as far as possible from those before it, so that the first few span the grid; parts of
        the rows in their order."""
        combinations = self.combinations()
        if self.by_rows:
            return combinations
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

    def with_parts(self, parts: Sequence[Fraction], rows: int, *, are_texts: bool) -> "Grid":
        """The grid that tries parts of the training rows.

        Args:
            parts: See `parse_parts`.
            rows: The number of training rows.
            are_texts: Whether they are texts, each of which may become several blocks.

        Raises:
            ConfigError: A part has fewer rows than an optimizer step takes, unless they are texts; or as many as
                another part.
        """
        training, counts = self.run({}).training, [int(part * rows) for part in parts]
        least = training.per_device_train_batch_size * training.gradient_accumulation_steps
        least = 1 if are_texts else least
        few = f"fewer than the {least:,} of an optimizer step"
        for part, count in zip(parts, counts, strict=True):
            if count < least or counts.count(count) > 1:
                why = few if count < least else "as many as another part has"
                what = f"{part} of the {plural(rows, 'training row')} is {count:,}, {why}"
                raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key="rows", fix="name other parts, or add rows"))
        return replace(self, axes=(Axis(TRAIN_ROWS, tuple(map(str, counts))),), by_rows=True)

    def check(self, *, is_bounded: bool) -> dict[str, RunConfig]:
        """Check the config and every combination.

        Args:
            is_bounded: Whether the number of trials, or their time, is limited.

        Returns:
            `label` of each combination → its config.

        Raises:
            ConfigError: Of the config; or each problem of a combination, with the first that has it.
        """
        self._check_comparable(self.run({}))
        if any(axis.is_range for axis in self.axes) and not is_bounded:
            what, fix = "a range has no end of values to try", "give `trials=...` or `budget=...`"
            raise ConfigError(Problem(Code.USAGE_CONFLICT, what, key="grid", fix=fix))
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
                    is_of_set = problem.where.startswith(OVERRIDES) and problem.key in self.keys
                    where = GRID if is_of_set else problem.where or f"{GRID} {name}"
                    what = problem.what if is_of_set or not problem.where else f"{problem.what} (with {name})"
                    found.setdefault((problem.key, problem.what), replace(problem, what=what, where=where))
        if found:
            raise ConfigError([*found.values()][:_MAX_PROBLEMS])
        return runs

    def _check_comparable(self, config: RunConfig) -> None:
        """Raises ConfigError: trials could not be compared, as their rows or losses would differ in meaning."""
        if config.data.validation is None:
            what = "trials are compared on validation rows, but there are none"
            where, fix = str(self.config_file), "set data.validation=0.1, or a file"
            raise ConfigError(Problem(Code.CONFIG_MISSING_KEY, what, where, "data.validation", fix))
        is_weighted = any(source.weight is not None for source in config.data.train_sources)
        if "training.seed" in self.keys and (isinstance(config.data.validation, float) or is_weighted):
            what = "cannot be varied: it decides which rows are held out, or drawn from weighted sources"
            raise _refused(what, "training.seed", "name a file of validation rows in data.validation")


def parse(options: Sequence[str], config_file: Path, assignments: Sequence[str]) -> Grid:
    """The grid that the options describe.

    Args:
        options: Each `section.key=VALUE,VALUE,...`, or `section.key=LOW..HIGH`.
        config_file: The config.
        assignments: Overrides, as `KEY=VALUE`.

    Raises:
        ConfigError: An option is missing or malformed; a key is given twice, is also set, or cannot be varied; there
            are too many combinations.
    """
    axes, problems = list[Axis](), list[Problem]()
    if not options:
        what, fix = "no key to vary was given", f"name values to try: `grid=['{_EXAMPLE}']`, or `rows=1/4,1/2,1`"
        problems.append(Problem(Code.USAGE_CONFLICT, what, GRID, fix=fix))
    for option in options:
        try:
            axes.append(_axis(option))
        except ConfigError as error:
            problems += error.problems
    keys, fixed = [axis.key for axis in axes], {name.partition("=")[0].strip() for name in assignments}
    for key in dict.fromkeys(keys):
        if keys.count(key) > 1 or key in fixed:
            what = "is given twice" if keys.count(key) > 1 else f"is also set by {OVERRIDES}"
            problems.append(Problem(Code.USAGE_CONFLICT, what, GRID, key, "name it once"))
        elif key not in _OF_ROWS and (key in _FIXED or "." not in key or key.partition(".")[0] not in _SECTIONS):
            what = "cannot be varied: trials are compared on the same rows and base, and each has an adapter"
            fix = f"name keys of {', '.join(_SECTIONS)} that change the adapter, or of {', '.join(_OF_ROWS)}"
            if "." not in key and (near := suggestion((key,))).startswith("did you mean"):
                what, fix = "unknown key", near
            problems += _refused(what, key, fix).problems
    if (count := math.prod(len(axis.values) for axis in axes)) > _MAX_COMBINATIONS:
        what, fix = f"{count:,} combinations are too many", "give fewer values, or ranges such as 1e-5..1e-3"
        problems += _refused(what, fix=fix).problems
    if problems:
        raise ConfigError(problems)
    return Grid(tuple(axes), config_file, tuple(assignments))


def parse_parts(text: str) -> list[Fraction]:
    """The parts of the training rows in `1/4,1/2,1`, the largest first. Raises ConfigError: they are none, or without
    all rows and a smaller part to compare."""
    texts = [one.strip() for one in text.split(",")]
    parts = {Fraction(one) for one in texts if _PART.fullmatch(one)}
    if not all(map(_PART.fullmatch, texts)) or len(parts) < 2 or min(parts) <= 0 or max(parts) != 1:
        what, fix = f"{text!r} are no parts of the training rows", "name 1, which is all of them, and smaller ones: "
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key="rows", fix=f"{fix}1/4,1/2,1"))
    return sorted(parts, reverse=True)


def _refused(what: str, key: str = "", fix: str = "") -> ConfigError:
    return ConfigError(Problem(Code.USAGE_BAD_VALUE, what, GRID, key, fix))


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
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key="budget", fix=fix))
    return seconds
