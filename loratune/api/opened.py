"""The adapters that a verb works on: named, opened and verified on first use, and loaded on first use."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.adapter.directory import AdapterDirectory
from loratune.adapter.options import Selection
from loratune.api import Overrides, Rows, StrPath, assignments, libraries
from loratune.codes import Code
from loratune.config import files_read
from loratune.config.yaml_files import number
from loratune.errors import ConfigError, Problem
from loratune.events import noted
from loratune.system.output_dir import OutputDirectory

if TYPE_CHECKING:
    from loratune.adapter.loading import LoadedAdapters


_MOST_SCALES = 50
"""Scales that one command compares."""


class OpenedAdapters:
    """Adapters of one base: their directories, and their weights on the base once they are needed.

    Attributes:
        selection: Their directories, which of them answers, and the weights of their sum.
        scale: What their updates are multiplied by.
    """

    def __init__(self, selection: Selection, *, scale: float, force: bool, overrides: Overrides):
        """Name them. Raises ConfigError: the scale is out of range; an override is not valid."""
        self.selection, self.scale = selection, checked_scale(scale)
        self._force, self._assignments = force, assignments(overrides)

    @cached_property
    def verified(self) -> Mapping[str, tuple[AdapterDirectory, Sequence[str]]]:
        """Name → the directory as it was trained, and lines on files that were not verified. Raises AdapterError."""
        found = {}
        for name, path in self.selection.directories.items():
            with noted() as notes:
                one = AdapterDirectory.open(path, forced=self._force, assignments=self._assignments)
            found[name] = (one, tuple(notes))
        return found

    @cached_property
    def directories(self) -> Mapping[str, AdapterDirectory]:
        """Name → the directory, with its update multiplied by the scale. Raises AdapterError."""
        return {name: scaled(one, self.scale) for name, (one, _) in self.verified.items()}

    @property
    def first(self) -> AdapterDirectory:
        """The directory of the first one. Raises AdapterError."""
        return next(iter(self.directories.values()))

    @cached_property
    def loaded(self) -> "LoadedAdapters":
        """All of them on their base. Raises AdapterError, ModelError."""
        with libraries():
            from loratune.adapter import loading

        return loading.load_selection(self.directories, self.selection)

    def files(self) -> Iterator[tuple[str, str]]:
        """The name for the user, and the path, of all that the adapters consist of and were made of.

        No output may replace them. Raises AdapterError.
        """
        from loratune.model.source import local_or_hub

        for name, one in self.directories.items():
            yield f"the adapter {name}".strip(), str(one.path)
            yield f"the base of {name}" if name else "the base", local_or_hub(one.base.name_or_path)
            for key, path in files_read(one.run) if one.run is not None else ():
                yield f"{key} of the run that made it", path

    def inputs(self) -> list[Path]:
        """The paths of `files`. Raises AdapterError."""
        return [Path(path) for _, path in self.files()]

    def output_directory(
        self, output: StrPath, rows: Rows | None, *, overwrite: bool, **files: StrPath | None
    ) -> OutputDirectory:
        """An output directory of these adapters, checked to be writable.

        Args:
            output: The directory.
            rows: Rows that are read.
            overwrite: Whether an earlier output is replaced.
            files: Parameter → input file.

        Raises as `OutputDirectory.check`.
        """
        read = files | {"rows": rows if isinstance(rows, str | PathLike) else None}
        inputs = [(f"`{name}=...`", fspath(path)) for name, path in read.items() if path is not None]
        return OutputDirectory.at(fspath(output), overwrite=overwrite, inputs=[*inputs, *self.files()]).check()


def parse_scales(text: str) -> tuple[float, ...]:
    """Scales as text: `0.5,0.7,1`, or from, to and step as `0:1:0.1`. Each is from 0 to 2.

    Raises ConfigError: a value is not a number, or out of range; there are too many.
    """
    parts = [number(part) for part in re.split("[,:]", text)]
    found = [part for part in parts if part is not None and 0 <= part <= 2]
    is_range = ":" in text
    if len(found) < len(parts) or (is_range and (len(found) != 3 or "," in text or found[2] == 0)):
        what, fix = f"`{text}` is not a list of numbers from 0 to 2", "write it like 0.5,0.7,1 or 0:1:0.1"
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key="scales", fix=fix))
    if is_range:
        first, last, step = found
        count = (last - first) / step + 1e-9
        if count >= _MOST_SCALES:
            raise _number_of_scales(f"{count + 1:,.0f}" if math.isfinite(count) else "too many")
        found = [round(first + step * number, 9) for number in range(int(count) + 1)]
    return checked_scales(found)


def _number_of_scales(number: str) -> ConfigError:
    what = f"holds {number} scales; give from 1 to {_MOST_SCALES}"
    fix = "write it like 0.5,0.7,1, or as first:last:step, 0:1:0.1"
    return ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key="scales", fix=fix))


def checked_scales(scales: Sequence[float]) -> tuple[float, ...]:
    """Scales without duplicates. Raises ConfigError: one is not a number from 0 to 2; there are none, or too many."""
    if not 0 < len(scales) <= _MOST_SCALES:
        raise _number_of_scales(f"{len(scales)}")
    return tuple(dict.fromkeys(checked_scale(scale, "scales") for scale in scales))


def checked_scale(scale: float, key: str = "scale") -> float:
    """A scale of adapters. key: the parameter that sets it. Raises ConfigError: it is not a number from 0 to 2."""
    if not 0 <= scale <= 2:
        what, fix = f"{scale} is not a number from 0 to 2", "0 is the base, 1 the adapter as it was trained"
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key=key, fix=fix))
    return scale


def scaled(adapter: AdapterDirectory, scale: float) -> AdapterDirectory:
    """An adapter with its update multiplied by a number. Raises AdapterError: see `tensors.scaled`."""
    if scale == 1:
        return adapter
    with libraries():
        from loratune.lora import tensors

    return replace(adapter, files=tensors.scaled(adapter.files, scale))
