"""The public `Adapter`: an adapter directory, and all that can be done with it."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, TypeAlias, Unpack

from loratune import data
from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.adapter.generation import LoadedAdapter
from loratune.adapter.sampling import SamplingOptions
from loratune.commands import evaluate as evaluation
from loratune.commands import export as exports
from loratune.commands import merge as merges
from loratune.commands import push as uploads
from loratune.commands import report as pages
from loratune.commands.export import Exported
from loratune.commands.merge import Merged
from loratune.compare import metrics as known_metrics
from loratune.compare.answers import Judging
from loratune.compare.comparison import Comparison
from loratune.config import DataSection, Source
from loratune.data import DatasetSplit
from loratune.data.formats import Message
from loratune.data.sources import GIVEN, GivenRows, given_rows
from loratune.events import Listener, listening
from loratune.export import output as outputs
from loratune.export.clients import ExportOptions
from loratune.export.hub import Upload
from loratune.model.source import local_or_hub
from loratune.system import output_file

StrPath: TypeAlias = str | PathLike[str]
Rows: TypeAlias = Any
"""The path of a file, a directory or a glob, or a hub id; or rows: a list of dicts, a `datasets.Dataset` or a pandas
frame."""


class Adapter:
    """An adapter directory, opened and verified. Its base is loaded when it is needed, and then stays in memory.

    Attributes:
        path: The directory.
        record: What loratune.json says: versions, fingerprints, seeds, metrics, loss curve; empty for adapters of other
            programs.
        config: The config of the run that made it; None for adapters of other programs.
    """

    def __init__(self, path: StrPath, *, force: bool = False):
        """Open and verify the directory.

        Args:
            path: The directory.
            force: Also use it with edited files, or on another base.

        Raises:
            AdapterError: It is not an adapter directory, or its files have changed since they were saved.
        """
        self.path, self._force = Path(path), force
        self._directory = AdapterDirectory.open(self.path, forced=force)
        self.record: Mapping[str, Any] = self._directory.files.record
        self.config = self._directory.run

    def __repr__(self) -> str:
        return f"Adapter({fspath(self.path)!r})"

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The metrics that training recorded: losses in nats per supervised token, intervals, gain over the base."""
        found: Mapping[str, Any] = self.record.get("metrics", {})
        return found

    @cached_property
    def _loaded(self) -> LoadedAdapter:
        return loading.load(self._directory)

    def generate(
        self,
        prompts: Sequence[str | list[Message]],
        *,
        max_new_tokens: int = 256,
        on_event: Listener | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[str]:
        """Complete prompts.

        Args:
            prompts: Texts, or conversations as lists of messages; rendered as the rows of training were.
            max_new_tokens: The longest completion, in tokens.
            on_event: Receives events.
            options: `temperature`: 0, the default, for the likeliest token; above it, tokens are sampled. `top_p`,
                `top_k`: sample among the likeliest tokens of this total probability, among this many of them. `seed`:
                the same seed gives the same texts for the same prompts. `stop`: completions end before these texts.

        Returns:
            The completions, in order.

        Raises:
            AdapterError, ModelError: The adapter or its base cannot be used.
            ConfigError, DataError: A setting is out of range; a prompt cannot be rendered.
        """
        with listening(on_event):
            return self._loaded.generate(prompts, max_new_tokens, **options)

    def evaluate(
        self,
        rows: Rows,
        *,
        against: "Adapter | StrPath | None" = None,
        metrics: Sequence[str] = (),
        forgetting: Rows | None = None,
        on_event: Listener | None = None,
    ) -> Comparison:
        """Compare the adapter with its base, or with another adapter, on held-out rows.

        Args:
            rows: The rows, in a format of training.
            against: Another adapter of the same base, which takes the base's place in the comparison.
            metrics: Metrics of greedy answers: exact_match, label, contains, rouge_l, json, regex:PATTERN.
            forgetting: Unrelated text that should not get worse; `builtin` for the text that comes with loratune.
            on_event: Receives events.

        Returns:
            The metrics of each model with intervals, their differences, and the verdict.

        Raises:
            AdapterError, ModelError, DataError, ConfigError: An adapter, the base, the rows or a metric cannot be used.
            NumericError: The loss of an adapter is not finite.
        """
        with listening(on_event):
            other = None if against is None else against if isinstance(against, Adapter) else Adapter(against)
            split = self._read(rows)
            return evaluation.evaluate(
                self._directory,
                split,
                against=other._directory if other is not None else None,
                judging=Judging(known_metrics.parse(metrics)),
                forgetting=self._unrelated(forgetting) if forgetting is not None else None,
                loaded=self._loaded if other is None else None,
            )

    def merge(
        self,
        output: StrPath,
        *,
        dtype: Literal["float32", "float16", "bfloat16"] | None = None,
        rows: Rows | None = None,
        overwrite: bool = False,
        on_event: Listener | None = None,
    ) -> Merged:
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
        with listening(on_event):
            directory = self._output(output, rows, overwrite=overwrite)
            split = self._read(rows) if rows is not None else None
            return merges.merge(self._directory, directory, split, dtype=dtype)

    def export(
        self,
        to: Literal["peft", "vllm", "gguf", "ollama"],
        output: StrPath,
        *,
        merged: Literal["f32", "f16", "bf16", "q8_0"] | None = None,
        verify: bool | None = None,
        rows: Rows | None = None,
        overwrite: bool = False,
        on_event: Listener | None = None,
    ) -> Exported:
        """Write the adapter for another program, read it back, and compare.

        Args:
            to: The program.
            output: The directory.
            merged: For gguf and ollama: one file of base and adapter in this type, instead of the adapter alone.
            verify: Run it in its program and compare; by default where that is installed.
            rows: Rows to compare on; by default prompts of the training.
            overwrite: Replace an earlier export at `output`.
            on_event: Receives events.

        Raises:
            AdapterError: The program cannot read the adapter, or computes something else.
            ConfigError, ModelError, DataError, ResourceError: Output, base or rows cannot be used.
        """
        with listening(on_event):
            directory = self._output(output, rows, overwrite=overwrite)
            split = self._read(rows) if rows is not None else None
            options = ExportOptions(to, merged, None, None, verify)
            return exports.export(self._directory, directory, options, split=split)

    def push(
        self, repository: str, *, public: bool = False, base: str | None = None, on_event: Listener | None = None
    ) -> Upload:
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
        with listening(on_event):
            return uploads.push(self.path, repository, public=public, base=base)

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
            file = output_file.output(Path(output), "output", overwrite=overwrite, inputs=[self.path])
            other = None if against is None else against if isinstance(against, Adapter) else Adapter(against)
            comparison = self.evaluate(rows, against=other) if rows is not None else None
            subjects = [(one._directory, list[str]()) for one in (self, other) if one is not None]
            text = pages.report(subjects, comparison, rows if isinstance(rows, str) else None)
            with file.opened() as writable:
                writable.write(text)
            return file.path

    def _read(self, rows: Rows) -> DatasetSplit:
        return data.read_source(_source(rows), self._directory.data)

    def _unrelated(self, rows: Rows) -> DatasetSplit:
        source = Source(path=str(data.UNRELATED_TEXT)) if rows == "builtin" else _source(rows)
        section = DataSection(train=Source(path=GIVEN), max_length=self._directory.data.max_length)
        split = data.read_source(source, section)
        split.check_kind(None)
        return split

    def _output(self, output: StrPath, rows: Rows | None, *, overwrite: bool) -> Any:
        inputs = {"adapter": self.path, "the base": Path(local_or_hub(self._directory.base.name_or_path))}
        inputs |= {"rows": Path(rows)} if isinstance(rows, str | PathLike) else {}
        return outputs.check(Path(output), overwrite=overwrite, inputs=inputs)


def _source(rows: Rows) -> Source | GivenRows:
    return Source(path=fspath(rows)) if isinstance(rows, str | PathLike) else given_rows(rows, "rows")
