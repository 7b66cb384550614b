"""The public class `Adapter`: an adapter directory and its operations (generate, evaluate, merge, export, push)."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from loratune.adapter.directory import AdapterDirectory
from loratune.adapter.options import UNNAMED, Sampling, SamplingOptions
from loratune.api import MergedDtype, Overrides, Rows, StrPath, computing, libraries
from loratune.api.adapters import (
    Adapters,
    check_metrics,
    checked_scales,
    open_tasks,
    output_directory,
    read_held_out,
    scaled,
    source_of,
)
from loratune.codes import Code
from loratune.config import DataSection, RunConfig, Source
from loratune.config.arguments import checked
from loratune.errors import ConfigError, Problem
from loratune.events import FinishedEvent, Listener, emit, listening, note, noted
from loratune.system import output_file

if TYPE_CHECKING:
    from loratune.commands.evaluate import ScaleComparison, UnrelatedText
    from loratune.commands.merge import Merged
    from loratune.compare.comparison import Comparison
    from loratune.compare.tasks import TaskResults
    from loratune.export.hub import Upload

Found = TypeVar("Found", "Comparison", "TaskResults")
BUILTIN = "builtin"
"""The value of `forgetting` for the unrelated text included in loratune."""


class Adapter(Adapters):
    """An adapter directory, opened and verified. Its base is loaded on first use, and then stays in memory.

    Attributes:
        path: The directory.
    """

    @checked
    def __init__(self, path: StrPath, *, scale: float = 1.0, force: bool = False, overrides: Overrides = ()):
        """Open and verify the directory.

        Args:
            path: The directory.
            scale: A number from 0 to 2 that its update is multiplied by: 0 gives the base.
            force: Accept edited files and another base.
            overrides: Overrides of its data settings, which apply to rows that are read.

        Raises:
            AdapterError: It is not an adapter directory, or its files have changed since they were saved.
            ConfigError: A value is not valid.
        """
        super().__init__({UNNAMED: path}, scale=scale, force=force, overrides=overrides)
        self.path = Path(path)
        self.open()

    @classmethod
    def later(cls, path: StrPath) -> "Adapter":
        """The adapter of a directory that another process may still be writing. It is opened on first use."""
        adapter = cls.__new__(cls)
        Adapters.__init__(adapter, {UNNAMED: path})
        adapter.path = Path(path)
        return adapter

    @cached_property
    def _noted(self) -> tuple[AdapterDirectory, tuple[str, ...]]:
        with noted() as notes:
            opened = AdapterDirectory.open(self.path, forced=self._force, assignments=self._overrides)
        return opened, tuple(notes)

    @cached_property
    def _directory(self) -> AdapterDirectory:
        return scaled(self._noted[0], self.scale)

    @cached_property
    def _opened(self) -> Mapping[str, AdapterDirectory]:
        return {UNNAMED: self._directory}

    @property
    def notes(self) -> Sequence[str]:
        """Lines on files of the directory that could not be verified or have changed."""
        return self._noted[1]

    @property
    def record(self) -> Mapping[str, Any]:
        """The content of loratune.json: versions, fingerprints, seed, metrics, loss curve; empty for adapters made by
        other programs."""
        return self._directory.files.record

    @property
    def config(self) -> RunConfig | None:
        """The config of the run that made it; None for adapters made by other programs."""
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

    @checked
    def generate(
        self,
        prompts: str | Sequence[str | list[dict[str, Any]]],
        *,
        max_new_tokens: int = 256,
        system: str | None = None,
        on_event: Listener | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[str]:
        """Complete prompts.

        Args:
            prompts: A text, or a list of texts or conversations (lists of messages); rendered as in training.
            max_new_tokens: The maximum length of a completion, in tokens.
            system: The system message of conversations without one; empty for none; by default the one that all rows
                had which the adapter was trained on.
            on_event: Receives events.
            options: `temperature`: 0, the default, is greedy decoding; above 0, tokens are sampled. `top_p`: sample
                from the most likely tokens with this total probability. `top_k`: sample from this many of the most
                likely tokens. `seed`: random seed; the same seed and prompts give the same texts. `stop`: stop texts,
                before which completions end.

        Returns:
            The completions, in order.

        Raises:
            AdapterError, ModelError: The adapter or its base cannot be used.
            ConfigError: A setting is out of range; a prompt with its new tokens exceeds the model's context; a system
                message is given for a raw prompt.
            DataError: A prompt cannot be rendered.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        with listening(on_event):
            sampling = Sampling(**options)
            answers = self.answers(prompts, sampling=sampling, max_new_tokens=max_new_tokens, system=system)
            return [answer.completion for answer in answers]

    @checked
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
            rows: The rows, in a format supported for training.
            against: Another adapter of the same base, to compare with instead of the base.
            metrics: Metrics of greedy answers: exact_match, label, contains, rouge_l, json, regex:PATTERN.
            forgetting: Unrelated text (`builtin` for loratune's) to measure forgetting on, as on everyday instructions.
            tasks: Tasks of the lm-evaluation-harness to run as well, or task files, whose code is executed.
            limit: The maximum number of rows of each task.
            require: Requirements such as `exact_match>=0.9`, see `Comparison.require`; they are parsed first.
            allow_overlap: With `require`, accept rows that the adapter was trained on.
            whole_answers: Allow answers longer than the expected ones, for reading them in `Comparison.rows`.
            keep_fields: Keep the fields of the rows for `Comparison.every_row`.
            on_event: Receives events; the last one has the comparison, even if a requirement is not met.

        Returns:
            The metrics of each model with their intervals, the differences between models, and the verdict.

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
            unused = {"--limit": "--tasks"} if limit is not None and not tasks else {}
            _check_used(unused | ({"--allow-overlap": "--require"} if allow_overlap and not require else {}))
            parsed = known_metrics.parse(metrics)
            known = {"against": against is not None, "forgetting": forgetting is not None, "tasks": bool(tasks)}
            required = requirements.parse(require, [metric.name for metric in parsed], rows=True, **known)
            other = _opened(against)
            opened = open_tasks(tasks, limit, required) if tasks else None
            split = read_held_out(rows, self._directory.data)
            if any(not one.of_task for one in required):
                with self._directory.files.reading() as path:
                    overlap = splits.find_overlap(split, path)
                requirements.check_rows(required, split, overlap, allow_overlap=allow_overlap)
                if overlap.unknown:
                    note(overlap.unknown)
            check_metrics(parsed, split)
            unrelated = self._unrelated(forgetting) if forgetting is not None else None
            with computing():
                with libraries():
                    from loratune.commands import evaluate
                    from loratune.compare.answers import Judging

                found = evaluate.evaluate(
                    self._directory, split, against=other._directory if other is not None else None,
                    judging=Judging(parsed, whole_answers), forgetting=unrelated, tasks=opened,
                    subject=evaluate.EvaluatedAdapter(self._loaded.default) if other is None else None,
                ).judged(required)  # fmt: skip
            if keep_fields:
                found = found.with_fields(split.own_fields())
            return _finish(found)

    @checked
    def evaluate_scales(
        self,
        rows: Rows,
        scales: Sequence[float],
        *,
        metrics: str | Sequence[str] = (),
        forgetting: Rows | None = None,
        on_event: Listener | None = None,
    ) -> "ScaleComparison":
        """Compare the adapter with its base at several scales from 0 to 2; see `evaluate`, and `Adapter` for errors."""
        with listening(on_event):
            with libraries():
                from loratune.commands import evaluate
                from loratune.compare import metrics as known_metrics
                from loratune.compare.answers import Judging

            scales = checked_scales(scales)
            parsed, split = known_metrics.parse(_listed(metrics)), read_held_out(rows, self._directory.data)
            check_metrics(parsed, split)
            unrelated = self._unrelated(forgetting) if forgetting is not None else None
            options: dict[str, Any] = {"judging": Judging(parsed), "forgetting": unrelated}
            with computing():
                found = evaluate.evaluate_scales(self._directory, split, scales, self._loaded.default, **options)
            for line in next(iter(found.comparisons.values())).remarks:
                note(line)
            emit(FinishedEvent(found))
            return found

    @checked
    def run_tasks(
        self,
        tasks: str | Sequence[str],
        *,
        limit: int | None = None,
        require: str | Sequence[str] = (),
        on_event: Listener | None = None,
    ) -> "TaskResults":
        """Run tasks of the lm-evaluation-harness on base and adapter. Args and errors as for `evaluate`."""
        with listening(on_event):
            from loratune.compare import requirements

            required = requirements.parse(_listed(require), [], rows=False, tasks=True)
            opened = open_tasks(_listed(tasks), limit, required)
            with computing():
                with libraries():
                    from loratune.commands import evaluate

                found = evaluate.evaluate_tasks(self._directory, opened, required)
            return _finish(found)

    @checked
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
            dtype: The dtype of the model; by default that of the base.
            rows: Rows to compare on; by default prompts recorded in training.
            overwrite: Replace an earlier export at `output`.
            on_event: Receives events.

        Raises:
            AdapterError: The adapter cannot be merged, or the merged model is not closer to it than to its base.
            ConfigError, ModelError, DataError, ResourceError, LockedError: Output, base or rows cannot be used.
        """
        with listening(on_event):
            directory = output_directory(output, self._opened, rows, overwrite=overwrite)
            split = read_held_out(rows, self._directory.data) if rows is not None else None
            with libraries():
                from loratune.commands import merge

            with computing():
                return merge.merge(self._directory, directory, split, dtype=dtype)

    @checked
    def push(
        self,
        repository: str,
        *,
        public: bool = False,
        base: str | None = None,
        with_system: bool = False,
        on_event: Listener | None = None,
    ) -> "Upload":
        """Upload the adapter to the hub in one commit, and verify the upload.

        Args:
            repository: USER/NAME.
            public: Make the repository public.
            base: The base's name on the hub; required if the adapter names it by a local path.
            with_system: Upload the system message that all training rows had, too.
            on_event: Receives events.

        Raises:
            AdapterError: Its files have changed, or contain a local path.
            ConfigError, ModelError, ResourceError, LockedError: The hub refuses the upload or cannot be reached.
        """
        with listening(on_event):
            with libraries():
                from loratune.commands import push

            return push.push(self._noted[0].files, repository, public=public, base=base, with_system=with_system)

    @checked
    def report(
        self,
        output: StrPath,
        *,
        rows: Rows | None = None,
        against: "Adapter | StrPath | None" = None,
        scales: Sequence[float] = (),
        overwrite: bool = False,
        on_event: Listener | None = None,
    ) -> Path:
        """Write a self-contained HTML page on the adapter and its run.

        Args:
            output: The HTML file.
            rows: Held-out rows to score; without them, the base is not loaded.
            against: Another adapter, shown next to it.
            scales: With rows: scales of the adapter whose losses and forgetting are shown as curves.
            overwrite: Replace an existing file.
            on_event: Receives events.

        Returns:
            The file.

        Raises:
            ConfigError, AdapterError, ModelError, DataError: The file, an adapter, the base or the rows cannot be used.
        """
        with listening(on_event):
            _check_used({"--adapter-scale": "--data"} if rows is None and len(scales) else {})
            other = _opened(against)
            subjects = [one for one in (self, other) if one is not None]
            inputs = [path for one in subjects for path in one.inputs()]
            inputs += [Path(rows)] if isinstance(rows, str | PathLike) else []
            file = output_file.output(
                Path(output), "--output", overwrite=overwrite, inputs=inputs, begins=output_file.HTML
            )
            with libraries():
                from loratune.commands import report

            comparison = self.evaluate(rows, against=other, whole_answers=True) if rows is not None else None
            by_scale = self.evaluate_scales(rows, scales, forgetting=BUILTIN) if rows is not None and scales else None
            pages = [(one._directory, one.notes) for one in subjects]
            name = fspath(rows) if isinstance(rows, str | PathLike) else None
            with computing(), file.opened() as writable:
                writable.write(report.report(pages, comparison, name, by_scale))
            return file.path

    def _unrelated(self, rows: Rows) -> "UnrelatedText":
        """Rows in any format except preferences. Raises DataError."""
        from loratune import data
        from loratune.commands.evaluate import UnrelatedText
        from loratune.data.sources import GIVEN

        is_builtin = isinstance(rows, str) and rows == BUILTIN
        source = source_of(data.UNRELATED_TEXT if is_builtin else rows)
        longest = self._directory.data.max_length
        section = DataSection(train=Source(path=GIVEN), max_length=longest, truncation="keep_completion")
        split = data.read_source(source, section)
        split.check_kind(None)
        return UnrelatedText(split, data.unrelated_kinds() if is_builtin else {})


def _finish(found: Found) -> Found:
    """Send a result to the listener. Raises RequirementError: a requirement is not met."""
    from loratune.compare import requirements

    for line in found.remarks:
        note(line)
    emit(FinishedEvent(found))
    requirements.check_met(found.requirements)
    return found


def _check_used(unused: Mapping[str, str]) -> None:
    """Raises ConfigError: there are options without effect. unused: option → the one that it only works with."""
    if unused:
        what = "only works with {}"
        raise ConfigError([Problem(Code.USAGE_CONFLICT, what.format(one), key=key) for key, one in unused.items()])


def _listed(names: str | Sequence[str]) -> Sequence[str]:
    """One or several names as a sequence."""
    return [names] if isinstance(names, str) else names


def _opened(other: Adapter | StrPath | None) -> Adapter | None:
    return other if other is None or isinstance(other, Adapter) else Adapter(other)
