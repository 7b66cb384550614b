"""The public class `Adapter`: an adapter directory, and the verbs that work on it."""

from collections.abc import Mapping, Sequence
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.adapter.directory import AdapterDirectory
from loratune.adapter.options import UNNAMED, Selection
from loratune.api import Overrides, StrPath, computing
from loratune.api import classify as classifying
from loratune.api import evaluate as measuring
from loratune.api import export as exporting
from loratune.api import generate as writing
from loratune.api import merge as merging
from loratune.api import push as pushing
from loratune.api import report as reporting
from loratune.api.opened import OpenedAdapters
from loratune.config import RunConfig
from loratune.config.arguments import checked

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


class Adapter:
    """An adapter directory, opened and verified. Its base is loaded on first use, and then stays in memory.

    Attributes:
        path: The directory.
        opened: Its content, for the verbs.
    """

    @checked
    def __init__(
        self,
        path: StrPath,
        *,
        scale: float = 1.0,
        force: bool = False,
        overrides: Overrides = (),
        verify: bool = True,
    ):
        """As `open`.

        Args:
            path: The directory.
            scale: A number from 0 to 2 that its update is multiplied by: 0 gives the base.
            force: Accept edited files and another base.
            overrides: Overrides of its data settings, which apply to rows that are read.
            verify: Open and verify it now, and not on first use.
        """
        self.path = Path(path)
        selection = Selection({UNNAMED: self.path}, UNNAMED, {})
        self.opened = OpenedAdapters(selection, scale=scale, force=force, overrides=overrides)
        if verify:
            _ = self.opened.directories

    @classmethod
    def open(cls, path: StrPath, *, scale: float = 1.0, force: bool = False, overrides: Overrides = ()) -> "Adapter":
        """Open and verify an adapter directory.

        Args:
            path: The directory.
            scale: A number from 0 to 2 that its update is multiplied by: 0 gives the base.
            force: Accept edited files and another base.
            overrides: Overrides of its data settings, which apply to rows that are read.

        Raises:
            AdapterError: It is not an adapter directory, or its files have changed since they were saved.
            ConfigError: A value is not valid.
        """
        return cls(path, scale=scale, force=force, overrides=overrides)

    classify = classifying.classify
    generate = writing.generate
    answers = writing.answers
    stream = writing.stream
    chat = writing.chat
    evaluate = measuring.evaluate
    evaluate_scales = measuring.evaluate_scales
    run_tasks = measuring.run_tasks
    merge = merging.merge
    export = exporting.export
    push = pushing.push
    report = reporting.report

    @property
    def directory(self) -> AdapterDirectory:
        """The content of the directory, with its update multiplied by the scale."""
        return self.opened.first

    @property
    def scale(self) -> float:
        """What its update is multiplied by."""
        return self.opened.scale

    @property
    def notes(self) -> Sequence[str]:
        """Lines on files of the directory that could not be verified or have changed."""
        return self.opened.verified[UNNAMED][1]

    @property
    def record(self) -> Mapping[str, Any]:
        """The content of loratune.json: versions, fingerprints, seed, metrics, loss curve; empty for adapters made by
        other programs."""
        return self.directory.files.record

    @property
    def config(self) -> RunConfig | None:
        """The config of the run that made it; None for adapters made by other programs."""
        return self.directory.run

    @property
    def base(self) -> str:
        """The directory or the hub id of its base."""
        return self.directory.base.name_or_path

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The metrics that training recorded: losses in nats per supervised token, intervals, gain over the base."""
        found: Mapping[str, Any] = self.record.get("metrics", {})
        return found

    @property
    def model(self) -> "PeftModel":
        """The base with this adapter, loaded: PEFT's model. What is changed in it, the verbs see too."""
        with computing():
            return self.opened.loaded.default.model

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, with the chat template of training. It is loaded with the base."""
        with computing():
            found: PreTrainedTokenizerBase = self.opened.loaded.default.tokenizer
            return found

    def __repr__(self) -> str:
        return f"Adapter({fspath(self.path)!r})"
