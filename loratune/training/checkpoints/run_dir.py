"""The run directory `<output_dir>.partial/`, which holds the checkpoints until the adapter is published."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from loratune.codes import Code
from loratune.errors import Problem, ResumeError
from loratune.system.directories import CONFIG, TEMPLATES, Contents, is_adapter_file, scan
from loratune.system.files import is_directory, is_file, sync
from loratune.system.output_dir import Inputs, OutputDirectory

CHECKPOINT = "checkpoint-"
"""Prefix of the name of a checkpoint, followed by the step."""
MANIFEST = "manifest.json"
"""The file that is written last to a checkpoint. It lists the others."""
PUBLISH_WORSE = "publish it with `resume=True` `allow_worse=True`"
"""What can be done with an adapter that does worse than its base."""
_TEMPORARY = r"(.*/)?\.tmp\w{6}"  # safetensors writes under such a name before it renames the file
_STEP = rf"(?:unfinished/)?{CHECKPOINT}\d+"
_CHECKPOINT_DIRECTORIES = re.compile(rf"unfinished|{_STEP}")
_TRAINER_FILES = re.compile(
    r"(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth|trainer_state\.json|run\.json|best\.safetensors|latest|"
    rf"{re.escape(MANIFEST)}|zero_to_fp32\.py|(global_step\d+|pytorch_model_fsdp_\d+|optimizer_\d+)/[^/]+|{_TEMPORARY}"
)
_TRAINER_DIRECTORIES = re.compile(r"global_step\d+|pytorch_model_fsdp_\d+|optimizer_\d+")
_STAGED = re.compile(rf"{_TEMPORARY}|[^/]+\.py")
"""Beside the files of an adapter: the code of a tokenizer that the user trusts is saved with it."""


def scan_staging(directory: Path) -> Contents:
    """What is in a directory in which an adapter is being put together."""
    return scan(
        directory,
        lambda name: is_adapter_file(name) or _STAGED.fullmatch(name) is not None,
        lambda name: name == TEMPLATES,
    )


def scan_checkpoints(directory: Path) -> Contents:
    """What is in a checkpoint, or in a directory of checkpoints: what the trainer is known to write."""
    in_checkpoint = re.compile("(.+)" if directory.name.startswith(CHECKPOINT) else rf"{_STEP}/(.+)")

    def is_own(name: str) -> bool:
        match = in_checkpoint.fullmatch(name)
        return match is not None and (is_adapter_file(match[1]) or _TRAINER_FILES.fullmatch(match[1]) is not None)

    def is_own_directory(name: str) -> bool:
        match = in_checkpoint.fullmatch(name)
        pattern, inner = (_TRAINER_DIRECTORIES, match[1]) if match else (_CHECKPOINT_DIRECTORIES, name)
        return pattern.fullmatch(inner) is not None

    return scan(directory, is_own, is_own_directory)


def check(
    output_dir: str, *, overwrite: bool, resume: bool = False, inputs: Inputs = (), dry_run: bool = False
) -> "RunDirectory":
    """Check that a run may write to `output_dir`, see `OutputDirectory.check`."""
    return RunDirectory.at(output_dir, overwrite=overwrite, inputs=inputs).check(resume=resume, dry_run=dry_run)


@dataclass(frozen=True)
class RunDirectory(OutputDirectory):
    """Where a run works and where its adapter goes. For the attributes see `OutputDirectory`."""

    noun: ClassVar = "adapter"
    key: ClassVar = "output_dir"
    suffix: ClassVar = "partial"

    @property
    def checkpoints(self) -> Path:
        """The directory of the trainer's checkpoints."""
        return self.partial / "checkpoints"

    @property
    def overwrite_mark(self) -> Path:
        """A file that exists if the run was started with `overwrite`: then `resume` alone may replace the adapter."""
        return self.partial / "may_replace"

    @property
    def rejection(self) -> Path:
        """The record of a run that took all its steps, and whose adapter does worse than its base."""
        return self.partial / "ended"

    @property
    def _scanners(self) -> dict[Path, Callable[[Path], Contents]]:
        return super()._scanners | {self.staging: scan_staging, self.checkpoints: scan_checkpoints}

    @property
    def _files(self) -> tuple[Path, ...]:
        return self.overwrite_mark, self.rejection, self.lock

    @property
    def _may_replace(self) -> bool:
        return is_file(self.overwrite_mark)

    @property
    def _proceed(self) -> str:
        return "continue with `resume=True`" if self.is_resumable() else "start again"

    def _holds_output(self, directory: Path) -> bool:
        return is_file(directory / CONFIG)

    def _is_whole(self, name: str) -> bool:
        return name == "lora.start_from"

    def is_kept(self) -> bool:
        """Whether `checkpoints` holds anything that a user may need: checkpoints, even damaged, or foreign files."""
        unfinished = self.checkpoints / "unfinished"
        return is_directory(self.checkpoints) and any(
            path != unfinished or not is_directory(path) for path in self.checkpoints.iterdir()
        )

    def is_resumable(self) -> bool:
        """Whether there is a checkpoint that was written to its end, so that `resume` may be suggested."""
        return any(is_file(path / MANIFEST) for path in self.checkpoints.glob(f"{CHECKPOINT}*") if is_directory(path))

    def _check_places(self, *, resume: bool) -> None:
        super()._check_places(resume=resume)
        if resume and not self.partial.is_dir():
            what, fix = "there is no interrupted run to resume", "start one without `resume=True`"
            raise ResumeError(Problem(Code.RESUME_CHECKPOINT, what, self.display_name, fix=fix))

    def _check_state(self, *, resume: bool) -> None:
        super()._check_state(resume=resume)
        if not self.is_kept() or resume or self.overwrite:
            return
        partial, restart = self.partial.name, "start afresh with `overwrite=True`"
        code, what = Code.RUN_INTERRUPTED, f"{partial} holds an interrupted run"
        fix = f"continue it with `resume=True`, or {restart}"
        if not self.is_resumable():
            what, fix = f"{partial} holds files of an interrupted run, but no whole checkpoint", restart
        elif is_file(self.rejection):
            code = Code.TRAINING_WORSE_THAN_BASE
            what = f"{partial} holds a finished run whose adapter does worse than its base, or learned nothing"
            fix = f"{PUBLISH_WORSE}, or {restart} and another training.learning_rate"
        raise self._refuse(code, what, fix)

    def prepare(self, *, resume: bool = False) -> None:
        """Make room for the work of a run. What an interrupted run left is removed, unless it is resumed.

        Raises:
            ConfigError: Something has come to the output directory, or the old adapter cannot be replaced.
        """
        if not resume:
            self.remove_checkpoints()
            self.overwrite_mark.unlink(missing_ok=True)
        self.rejection.unlink(missing_ok=True)
        if self.overwrite:
            self.overwrite_mark.touch()
        super().prepare()
        self.checkpoints.mkdir(exist_ok=True)
        sync(self.partial)

    def remove_checkpoints(self) -> None:
        """Remove the checkpoints, so that the run cannot be resumed."""
        self._remove(self.checkpoints)
