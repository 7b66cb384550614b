"""The public class `Adapter`: an adapter directory and its operations (generate, evaluate, merge, export, push)."""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, get_args

from loratune.adapter.directory import AdapterDirectory
from loratune.adapter.options import UNNAMED, Sampling, SamplingOptions
from loratune.api import MergedDtype, Overrides, Rows, StrPath, assignments, libraries
from loratune.api.adapters import Adapters, output_directory, source_of
from loratune.api.functions import push
from loratune.codes import Code
from loratune.config import DataSection, RunConfig, Source
from loratune.errors import ConfigError, Problem
from loratune.events import FinishedEvent, Listener, emit, listening, note, noted
from loratune.system import output_file

if TYPE_CHECKING:
    from loratune.commands.evaluate import Tasks
    from loratune.commands.merge import Merged
    from loratune.compare.comparison import Comparison
    from loratune.compare.requirements import Requirement
    from loratune.compare.tasks import TaskResults
    from loratune.data import DatasetSplit
    from loratune.data.formats import Message
    from loratune.export.hub import Upload

Found = TypeVar("Found", "Comparison", "TaskResults")
BUILTIN = "builtin"
"""The text about other things that comes with loratune."""


class Adapter(Adapters):
    """An adapter directory, opened and verified. Its base is loaded when it is needed, and then stays in memory.

    Attributes:
        path: The directory.
    """

    def __init__(self, path: StrPath, *, force: bool = False, overrides: Overrides = ()):
        """Open and verify the directory.

        Args:
            path: The directory.
            force: Also use it with edited files, or on another base.
            overrides: Values for keys of its data section, by which rows are read.

        Raises:
            AdapterError: It is not an adapter directory, or its files have changed since they were saved.
            ConfigError: A value is not valid.
        """
        super().__init__({UNNAMED: path}, force=force)
        self.path, self._overrides = Path(path), assignments(overrides)
        self.open()

    @classmethod
    def later(cls, path: StrPath) -> "Adapter":
        """The adapter of a directory that another process may still be writing. It is opened when it is first used."""
        adapter = cls.__new__(cls)
        Adapters.__init__(adapter, {UNNAMED: path})
        adapter.path, adapter._overrides = Path(path), []
        return adapter

    @cached_property
    def _noted(self) -> tuple[AdapterDirectory, tuple[str, ...]]:
        with noted() as notes:
            opened = AdapterDirectory.open(self.path, forced=self._force, assignments=self._overrides)
        return opened, tuple(notes)

    @property
    def _directory(self) -> AdapterDirectory:
        return self._noted[0]

    @cached_property
    def _opened(self) -> Mapping[str, AdapterDirectory]:
        return {UNNAMED: self._directory}

    @property
    def notes(self) -> Sequence[str]:
        """Lines about the directory: what could not be verified, or has changed."""
        return self._noted[1]

    @property
    def record(self) -> Mapping[str, Any]:
        """What loratune.json says: versions, fingerprints, seeds, metrics, loss curve; empty for adapters of other
        programs."""
        return self._directory.files.record

    @property
    def config(self) -> RunConfig | None:
        """The config of the run that made it; None for adapters of other programs."""
        return self._directory.run

    def __repr__(self) -> str:
        return f"Adapter({fspath(self.path)!r})"

    @property
    def base(self) -> str:
        """The directory or the hub id of its base."""
        return self._directory.base.name_or_path

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The metrics that training recorded: losses in nats per supervised token, intervals, gain over the base."""
        found: Mapping[str, Any] = self.record.get("metrics", {})
        return found

    def generate(
        self,
        prompts: "str | Sequence[str | list[Message]]",
        *,
        max_new_tokens: int = 256,
        on_event: Listener | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[str]:
        """Complete prompts.

        Args:
            prompts: Texts, or conversations as lists of messages, or one text; rendered as the rows of training were.
            max_new_tokens: The longest completion, in tokens.
            on_event: Receives events.
            options: `temperature`: 0, the default, for the likeliest token; above it, tokens are sampled. `top_p`,
                `top_k`: sample among the likeliest tokens of this total probability, among this many of them. `seed`:
                the same seed gives the same texts for the same prompts. `stop`: completions end before these texts.

        Returns:
            The completions, in order.

        Raises:
            AdapterError, ModelError: The adapter or its base cannot be used.
            ConfigError: A setting is out of range, or a prompt leaves too little of the model's context.
            DataError: A prompt cannot be rendered.
        """
        if max_new_tokens < 1:
            raise ConfigError(Problem(Code.USAGE_BAD_VALUE, f"{max_new_tokens} is less than 1", key="max_new_tokens"))
        prompts = [prompts] if isinstance(prompts, str) else prompts
        with listening(on_event):
            sampling = Sampling(**options)
            answers = self.answers(prompts, sampling=sampling, max_new_tokens=max_new_tokens)
            return [answer.completion for answer in answers]

    def evaluate(
        self,
        rows: Rows,
        *,
        against: "Adapter | StrPath | None" = None,
        metrics: str | Sequence[str] = (),
        forgetting: Rows | None = None,
        tasks: str | Sequence[str] = (),
        limit: int | None = None,
        require: str | Sequence[str] = (),
        allow_overlap: bool = False,
        whole_answers: bool = False,
        keep_fields: bool = False,
        on_event: Listener | None = None,
    ) -> "Comparison":
        """Compare the adapter with its base, or with another adapter, on held-out rows.

        Args:
            rows: The rows, in a format of training.
            against: Another adapter of the same base, which takes the base's place in the comparison.
            metrics: Metrics of greedy answers: exact_match, label, contains, rouge_l, json, regex:PATTERN.
            forgetting: Unrelated text that should not get worse; `builtin` for the text that comes with loratune.
            tasks: Tasks of the lm-evaluation-harness that are run as well, or files of them, whose code is run.
            limit: How many rows of each task are taken at most.
            require: Requirements such as `exact_match>=0.9`, see `Comparison.require`; they are parsed first.
            allow_overlap: Accept rows that the adapter was trained on where something is required.
            whole_answers: Let answers be longer than the expected ones, for readers of `Comparison.rows`.
            keep_fields: Keep the fields of the rows for `Comparison.every_row`.
            on_event: Receives events; the last one has the comparison, also where a requirement is not met.

        Returns:
            The metrics of each model with intervals, their differences, and the verdict.

        Raises:
            AdapterError, ModelError, DataError, ConfigError: An adapter, the base, the rows or a metric cannot be used.
            NumericError: The loss of an adapter is not finite.
            RequirementError: A requirement is not met.
        """
        with listening(on_event):
            with libraries():
                from loratune.compare import metrics as known_metrics
                from loratune.compare import requirements
                from loratune.data import splits

            metrics, tasks, require = (_listed(names) for names in (metrics, tasks, require))
            parsed = known_metrics.parse(metrics)
            known = {"against": against is not None, "forgetting": forgetting is not None, "tasks": bool(tasks)}
            required = requirements.parse(require, [metric.name for metric in parsed], rows=True, **known)
            other = _opened(against)
            opened = _open_tasks(tasks, limit, required) if tasks else None
            split = self._read(rows)
            if any(not one.of_task for one in required):
                overlap = splits.find_overlap(split, self.path)
                requirements.check_rows(required, split, overlap, allow_overlap=allow_overlap)
                if overlap.unknown:
                    note(overlap.unknown)
            if parsed and split.kind is not None:
                what, fix = f"the rows are {split.kind}, of which none is written by a model", "leave it out"
                raise ConfigError(Problem(Code.USAGE_CONFLICT, what, split.source, known_metrics.OPTION, fix))
            unrelated = self._unrelated(forgetting) if forgetting is not None else None
            with libraries():
                from loratune.commands import evaluate
                from loratune.compare.answers import Judging

            found = evaluate.evaluate(
                self._directory, split, against=other._directory if other is not None else None,
                judging=Judging(parsed, whole_answers), forgetting=unrelated, tasks=opened,
                loaded=self._loaded.default if other is None else None,
            ).judged(required)  # fmt: skip
            if keep_fields:
                found = found.with_fields(split.own_fields())
            return _finish(found)

    def run_tasks(
        self,
        tasks: str | Sequence[str],
        *,
        limit: int | None = None,
        require: str | Sequence[str] = (),
        on_event: Listener | None = None,
    ) -> "TaskResults":
        """Run tasks of the lm-evaluation-harness on base and adapter. Arguments and errors are those of `evaluate`."""
        with listening(on_event):
            from loratune.compare import requirements

            required = requirements.parse(_listed(require), [], rows=False, tasks=True)
            opened = _open_tasks(_listed(tasks), limit, required)
            with libraries():
                from loratune.commands import evaluate

            return _finish(evaluate.evaluate_tasks(self._directory, opened, required))

    def merge(
        self,
        output: StrPath,
        *,
        dtype: MergedDtype | None = None,
        rows: Rows | None = None,
        overwrite: bool = False,
        on_event: Listener | None = None,
    ) -> "Merged":
        """Write base and adapter as one model, read it back, and compare it with both.

        Args:
            output: The directory of the model.
            dtype: Of the model; by default that of the base.
            rows: Rows to compare on; by default prompts of the training.
            overwrite: Replace an earlier export at `output`.
            on_event: Receives events.

        Raises:
            AdapterError: The adapter cannot be merged, or the model is not nearer to it than to its base.
            ConfigError, ModelError, DataError, ResourceError, LockedError: Output, base or rows cannot be used.
        """
        if dtype is not None and dtype not in get_args(MergedDtype):
            what, fix = f"{dtype} is not a dtype of a model", f"use {', '.join(get_args(MergedDtype))}"
            raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key="dtype", fix=fix))
        with listening(on_event):
            directory = output_directory(output, self._opened, rows, overwrite=overwrite)
            split = self._read(rows) if rows is not None else None
            with libraries():
                from loratune.commands import merge

            return merge.merge(self._directory, directory, split, dtype=dtype)

    def push(
        self, repository: str, *, public: bool = False, base: str | None = None, on_event: Listener | None = None
    ) -> "Upload":
        """Upload the adapter to the hub in one commit, and verify what is there.

        Args:
            repository: USER/NAME.
            public: Let everyone see it.
            base: What a base that was a local path is called on the hub.
            on_event: Receives events.

        Raises:
            AdapterError: Its files have changed, or name a path of this machine.
            ConfigError, ModelError, ResourceError, LockedError: The hub refuses it or cannot be reached.
        """
        return push(self.path, repository, public=public, base=base, on_event=on_event)

    def report(
        self,
        output: StrPath,
        *,
        rows: Rows | None = None,
        against: "Adapter | StrPath | None" = None,
        overwrite: bool = False,
        on_event: Listener | None = None,
    ) -> Path:
        """Write an HTML page on the adapter and its run; it loads nothing.

        Args:
            output: The file.
            rows: Held-out rows to score; without them, no base is loaded.
            against: Another adapter, shown beside it.
            overwrite: Replace an existing file.
            on_event: Receives events.

        Returns:
            The file.

        Raises:
            ConfigError, AdapterError, ModelError, DataError: The file, an adapter, the base or the rows cannot be used.
        """
        with listening(on_event):
            other = _opened(against)
            subjects = [one for one in (self, other) if one is not None]
            inputs = [one.path for one in subjects] + ([Path(rows)] if isinstance(rows, str | PathLike) else [])
            inputs += [Path(self.base)] if rows is not None else []
            file = output_file.output(Path(output), "--output", overwrite=overwrite, inputs=inputs)
            with libraries():
                from loratune.commands import report

            comparison = self.evaluate(rows, against=other, whole_answers=True) if rows is not None else None
            pages = [(one._directory, one.notes) for one in subjects]
            name = fspath(rows) if isinstance(rows, str | PathLike) else None
            with file.opened() as writable:
                writable.write(report.report(pages, comparison, name))
            return file.path

    def _read(self, rows: Rows) -> "DatasetSplit":
        with libraries():
            from loratune import data

        return data.read_source(source_of(rows), self._directory.data)

    def _unrelated(self, rows: Rows) -> "DatasetSplit":
        """Rows in whatever format, but no preferences. Raises DataError."""
        from loratune import data
        from loratune.data.sources import GIVEN

        source = source_of(data.UNRELATED_TEXT if isinstance(rows, str) and rows == BUILTIN else rows)
        section = DataSection(train=Source(path=GIVEN), max_length=self._directory.data.max_length)
        split = data.read_source(source, section)
        split.check_kind(None)
        return split


def _finish(found: Found) -> Found:
    """Hand a result to the listener. Raises RequirementError: it does not meet its requirements."""
    from loratune.compare import requirements

    for line in found.remarks:
        note(line)
    emit(FinishedEvent(found))
    requirements.check_met(found.requirements)
    return found


def _listed(names: str | Sequence[str]) -> Sequence[str]:
    """One name, or several."""
    return [names] if isinstance(names, str) else names


def _opened(other: Adapter | StrPath | None) -> Adapter | None:
    return other if other is None or isinstance(other, Adapter) else Adapter(other)


def _open_tasks(tasks: Sequence[str], limit: int | None, required: "Sequence[Requirement]") -> "Tasks":
    """Find tasks, with the harness, which is imported for them only."""
    from loratune.compare import tasks as known_tasks
    from loratune.system.environment import kept_environment

    names = known_tasks.parse(",".join(tasks))
    with libraries(), kept_environment():
        from loratune.compare import harness

    return partial(harness.run, opened=harness.open_tasks(names, required), limit=limit)
