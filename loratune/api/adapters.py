"""The public class `Adapters`: one or several adapters of one base, loaded together, or their weighted sum."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from os import PathLike, fspath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, BinaryIO

from loratune.adapter import options
from loratune.adapter.directory import AdapterDirectory
from loratune.adapter.options import UNNAMED, Sampling, Selection
from loratune.api import Client, MergedType, Overrides, Rows, StrPath, assignments, computing, libraries
from loratune.codes import Code
from loratune.config import DataSection, Source, files_read
from loratune.config.arguments import checked
from loratune.config.sections import WEIGHT
from loratune.config.yaml_files import number
from loratune.errors import ConfigError, DataError, LoratuneError, Problem
from loratune.events import Listener, listening, note
from loratune.system.files import path_problem
from loratune.system.output_dir import OutputDirectory

if TYPE_CHECKING:
    from loratune.adapter.loading import LoadedAdapters
    from loratune.commands.chat import Chat
    from loratune.commands.evaluate import Tasks
    from loratune.commands.export import Exported
    from loratune.commands.generate import Answer
    from loratune.compare.metrics import Metric
    from loratune.compare.requirements import Requirement
    from loratune.data import DatasetSplit
    from loratune.data.sources import GivenRows
    from loratune.data.sources.rows import Row

_MOST_SCALES = 50
"""Scales that one command compares."""


class Adapters:
    """Several adapters of one base, which are loaded together; or their weighted sum.

    They are opened and verified on first use.

    Attributes:
        paths: Name → directory.
        scale: What their updates are multiplied by.
    """

    @checked
    def __init__(
        self,
        adapters: Mapping[str, StrPath] | Sequence[str],
        *,
        use: str | None = None,
        mix: Mapping[str, float] | str | None = None,
        scale: float = 1.0,
        force: bool = False,
        overrides: Overrides = (),
    ):
        """Name the adapters.

        Args:
            adapters: Name → directory; or values of --adapter: `NAME=DIR`, or a single `DIR`.
            use: The name of the adapter for prompts that name none; by default the first.
            mix: Name → weight; the weighted sum of these adapters is used instead of single ones. As a string:
                `sql:0.7,tone:0.3`.
            scale: A number from 0 to 2 that their updates are multiplied by: 0 gives the base.
            force: Accept edited files and another base.
            overrides: Overrides of their data settings, such as the arguments of the chat template.

        Raises:
            ConfigError: A name is not valid, unknown or repeated; a weight is not a finite number; the scale is out of
                range.
        """
        if isinstance(mix, Mapping):
            mix = ",".join(f"{name}:{weight}" for name, weight in mix.items())
        if isinstance(adapters, Mapping) and [*adapters] == [UNNAMED]:  # its path may contain a `=`
            self._selection = Selection({UNNAMED: Path(adapters[UNNAMED])}, UNNAMED, {})
        else:
            if isinstance(adapters, Mapping):
                adapters = [f"{name}={fspath(path)}" for name, path in adapters.items()]
            self._selection = options.parse_selection(adapters, use, mix)
        self._force, self.scale, self._overrides = force, checked_scale(scale), assignments(overrides)
        self.paths: Mapping[str, Path] = self._selection.directories

    @cached_property
    def _opened(self) -> Mapping[str, AdapterDirectory]:
        found = {
            name: AdapterDirectory.open(path, forced=self._force, assignments=self._overrides)
            for name, path in self.paths.items()
        }
        return {name: scaled(one, self.scale) for name, one in found.items()}

    def inputs(self) -> list[Path]:
        """What no output may replace: their directories and bases, and the files that the runs have read which made
        them. Raises AdapterError."""
        return [Path(path) for _, path in _inputs(self._opened)]

    def open(self) -> None:
        """Open and verify them now. Raises AdapterError."""
        _ = self._opened

    @cached_property
    def _loaded(self) -> "LoadedAdapters":
        with libraries():
            from loratune.adapter import loading

        return loading.load_selection(self._opened, self._selection)

    @checked
    def answers(
        self,
        rows: Rows | BinaryIO,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008  it is frozen
        system: str | None = None,
        base: bool = False,
        on_text: Callable[[str], None] | None = None,
        progress: bool = True,
    ) -> "Iterator[Answer]":
        """Complete the prompts of rows. Everything is checked before the first completion.

        Args:
            rows: Rows, texts or conversations, or a binary file of JSON lines. The field `adapter` of a row names the
                adapter that answers it.
            max_new_tokens: The maximum length of a completion, in tokens.
            sampling: The sampling settings.
            system: The system message of conversations without one; empty for none; by default the one that all rows
                had which the adapter was trained on.
            base: Also complete with the base alone.
            on_text: Receives the completion of a single prompt piece by piece.
            progress: Emit progress events.

        Raises:
            AdapterError, ModelError, DataError: An adapter, the base or the rows cannot be used.
            ConfigError: As `Adapter.generate`.
        """
        sampling.check()
        _check_new_tokens(max_new_tokens)
        read = _read_prompts(rows)
        self.open()
        with libraries():
            from loratune.commands import generate

        names = generate.names(self._selection, read)
        with computing():
            return generate.answers(
                self._loaded, names, read, sampling, max_new_tokens, system=system, base=base, on_text=on_text,
                shows_progress=progress,
            )  # fmt: skip

    @checked
    def chat(self, *, system: str | None = None, max_new_tokens: int = 256, temperature: float = 0.0) -> "Chat":
        """Begin a conversation; its method `ask` answers a turn.

        Args:
            system: The system message; empty for none; by default the one that all rows had which the adapter was
                trained on.
            max_new_tokens: The maximum length of an answer, in tokens.
            temperature: 0 for greedy decoding; above 0, tokens are sampled.

        Raises:
            AdapterError, ModelError: An adapter or the base cannot be used.
            ConfigError: The temperature is out of range; a system message is given to an adapter that was trained on
                raw prompts.
        """
        sampling = Sampling(temperature)
        sampling.check()
        _check_new_tokens(max_new_tokens)
        self.open()
        with libraries():
            from loratune.commands.chat import Chat

        with computing():
            return Chat(self._loaded, system=system, max_new_tokens=max_new_tokens, sampling=sampling)

    @checked
    def export(
        self,
        to: Client,
        output: StrPath,
        *,
        merged: MergedType | None = None,
        llama_cpp: StrPath | None = None,
        base_gguf: StrPath | None = None,
        verify: bool | None = None,
        vllm_python: StrPath | None = None,
        rows: Rows | None = None,
        overwrite: bool = False,
        on_event: Listener | None = None,
    ) -> "Exported":
        """Write the adapter, or the weighted sum, for another program, read it back, and compare.

        Args:
            to: The target program.
            output: The directory.
            merged: For gguf and ollama: write the merged model in this type, instead of the adapter alone.
            llama_cpp: A checkout of llama.cpp, for its converters.
            base_gguf: A GGUF file of the base, whose tokenizer is used.
            verify: Run the export in the target program and compare; by default if the program is installed.
            vllm_python: The Python of an environment with vLLM; by default this one, if it has vLLM.
            rows: Rows to compare on; by default prompts recorded in training.
            overwrite: Replace an earlier export at `output`.
            on_event: Receives events.

        Raises:
            AdapterError: The program cannot read the adapter, or its results differ.
            ConfigError, ModelError, DataError, ResourceError: Output, base or rows cannot be used.
        """
        from loratune.export.clients import ExportOptions

        with listening(on_event), TemporaryDirectory() as place:
            named = (Path(path) if path else None for path in (llama_cpp, base_gguf, vllm_python))
            converters, tokenizer, python = named
            options = ExportOptions(to, merged, converters, tokenizer, verify, python)
            weights = self._selection.mix
            if len(self.paths) > 1 and not weights:
                what, fix = "several adapters are exported as one, their sum", "give weights: --mix sql:0.7,tone:0.3"
                raise ConfigError(Problem(Code.USAGE_CONFLICT, what, key="--mix", fix=fix))
            files = {"--llama-cpp": converters, "--base-gguf": tokenizer}
            directory = output_directory(output, self._opened, rows, overwrite=overwrite, **files)
            with libraries():
                from loratune import data
                from loratune.adapter import loading
                from loratune.commands import export

            source = next(iter(self._opened.values()))
            split = data.read_source(source_of(rows), source.data) if rows is not None else None
            made_of = {"mix": dict(weights), "adapter_scale": self.scale}
            with computing():
                if not weights:
                    return export.export(source, directory, options, made_of, split=split)
                weighted = [(self._opened[name], weight) for name, weight in weights.items()]
                try:
                    mixture = loading.write_mixture(Path(place), weighted)
                    return export.export(mixture, directory, options, made_of, split=split)
                except LoratuneError as error:
                    mix = f"--mix {','.join(f'{name}:{weight:g}' for name, weight in weights.items())}"
                    problems = [_of_mixture(problem, place, mix, source.path) for problem in error.problems]
                    raise type(error)(problems) from None


def _check_new_tokens(most: int) -> None:
    if most < 1:
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, f"{most} is less than 1", key="max_new_tokens"))


def _of_mixture(problem: Problem, place: str, named: str, first: Path) -> Problem:
    """A problem of the sum of adapters, which is in the directory `place`, in terms of what the user has named."""
    where = named if problem.where.startswith(place) else problem.where
    what, fix = problem.what.replace(place, named), problem.fix.replace(place, str(first))
    return replace(problem, where=where, what=what, fix=fix)


def parse_scales(text: str) -> tuple[float, ...]:
    """The values of --adapter-scale: `0.5,0.7,1`, or from, to and step as `0:1:0.1`. Each is from 0 to 2.

    Raises ConfigError: a value is not a number, or out of range; there are too many.
    """
    parts = [number(part) for part in re.split("[,:]", text)]
    found = [part for part in parts if part is not None and 0 <= part <= 2]
    is_range = ":" in text
    if len(found) < len(parts) or (is_range and (len(found) != 3 or "," in text or found[2] == 0)):
        what, fix = f"`{text}` is not a list of numbers from 0 to 2", "write it like 0.5,0.7,1 or 0:1:0.1"
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key="--adapter-scale", fix=fix))
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
    return ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key="--adapter-scale", fix=fix))


def checked_scales(scales: Sequence[float]) -> tuple[float, ...]:
    """Scales without duplicates. Raises ConfigError: one is not a number from 0 to 2; there are none, or too many."""
    if not 0 < len(scales) <= _MOST_SCALES:
        raise _number_of_scales(f"{len(scales)}")
    return tuple(dict.fromkeys(map(checked_scale, scales)))


def checked_scale(scale: float) -> float:
    """A scale of adapters. Raises ConfigError: it is not a number from 0 to 2."""
    if not 0 <= scale <= 2:
        what, fix = f"{scale} is not a number from 0 to 2", "0 is the base, 1 the adapter as it was trained"
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key="--adapter-scale", fix=fix))
    return scale


def scaled(adapter: AdapterDirectory, scale: float) -> AdapterDirectory:
    """An adapter with its update multiplied by a number. Raises AdapterError: see `tensors.scaled`."""
    if scale == 1:
        return adapter
    with libraries():
        from loratune.lora import tensors

    return replace(adapter, files=tensors.scaled(adapter.files, scale))


def read_held_out(rows: Rows, section: DataSection) -> "DatasetSplit":
    """Rows to score, read as those of training. If they have no weights, each counts once. Raises DataError."""
    with libraries():
        from loratune import data

    try:
        return data.read_source(source_of(rows), section)
    except DataError as error:
        if WEIGHT not in section.columns or error.problems[0].key != "data.columns":
            raise
        columns = {ours: theirs for ours, theirs in section.columns.items() if ours != WEIGHT}
        split = data.read_source(source_of(rows), section.model_copy(update={"columns": columns}))
        note(f"the rows have no `{section.columns[WEIGHT]}`, so each counts once")
        return split


def source_of(rows: Rows) -> "Source | GivenRows":
    """Rows as an argument of `read_source`. Raises DataError: an unsupported type."""
    if isinstance(rows, str | PathLike):
        if what := path_problem(fspath(rows)) or ("" if fspath(rows) else "is empty"):
            raise DataError(Problem(Code.USAGE_BAD_VALUE, f"the path {what}", key="rows", fix="check the path"))
        return Source(path=fspath(rows))
    from loratune.data.sources import given_rows

    return given_rows(rows, "rows")


def _read_prompts(rows: Rows | BinaryIO) -> "list[Row]":
    """The rows to answer. Raises DataError: they cannot be read."""
    from loratune.data import sources
    from loratune.data.sources.rows import Row

    if hasattr(rows, "readline"):
        return sources.read_rows(Source(path="stdin"), rows)
    if isinstance(rows, Sequence) and not isinstance(rows, str) and all(isinstance(row, str | list) for row in rows):
        named = [{"prompt" if isinstance(row, str) else "messages": row} for row in rows]
        return [Row(f"prompt {number}", row) for number, row in enumerate(named, start=1)]
    source = source_of(rows)
    if line := sources.left_out(source):
        note(line)
    return sources.read_rows(source)


def output_directory(
    output: StrPath,
    adapters: Mapping[str, AdapterDirectory],
    rows: Rows | None,
    *,
    overwrite: bool,
    **files: StrPath | None,
) -> OutputDirectory:
    """The output directory, checked to be writable. files: option → input file. Raises as
    `OutputDirectory.check`."""
    inputs = [(option, fspath(path)) for option, path in files.items() if path is not None]
    inputs += [("--data", fspath(rows))] if isinstance(rows, str | PathLike) else []
    return OutputDirectory.at(fspath(output), overwrite=overwrite, inputs=[*inputs, *_inputs(adapters)]).check()


def _inputs(adapters: Mapping[str, AdapterDirectory]) -> Iterator[tuple[str, str]]:
    """The name for the user, and the path, of all that adapters consist of and were made of."""
    from loratune.model.source import local_or_hub

    for name, one in adapters.items():
        yield f"--adapter {name}".strip(), str(one.path)
        yield f"the base of {name}" if name else "the base", local_or_hub(one.base.name_or_path)
        for key, path in files_read(one.run) if one.run is not None else ():
            yield f"{key} of the run that made it", path


def check_metrics(metrics: "Sequence[Metric]", split: "DatasetSplit") -> None:
    """Raises ConfigError: the metrics are of written answers, and the rows are preferences."""
    if metrics and split.kind is not None:
        what, fix = f"the rows are {split.kind}, of which none is written by a model", "leave it out"
        raise ConfigError(Problem(Code.USAGE_CONFLICT, what, split.source, "--metric", fix))


def open_tasks(tasks: Sequence[str], limit: int | None, required: "Sequence[Requirement]") -> "Tasks":
    """Open tasks with the harness, which is imported only here."""
    from loratune.compare import tasks as known_tasks
    from loratune.system.environment import kept_environment

    names = known_tasks.parse(",".join(tasks))
    if limit is not None and limit < 1:
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, f"{limit} is less than 1", key="--limit"))
    with computing(), libraries(), kept_environment():
        from loratune.compare import harness

    return partial(harness.run, opened=harness.open_tasks(names, required), limit=limit)
