"""The directory of a run: `<output_dir>.partial/`, with its checkpoints, until the adapter is published."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loratune.codes import Code
from loratune.errors import Problem, ResumeError
from loratune.system.directories import Contents, Inputs
from loratune.system.files import is_directory, is_file, sync
from loratune.system.output_dir import OutputDirectory
from loratune.training.checkpoints.contents import (
    CHECKPOINT,
    MANIFEST,
    PUBLISH_WORSE,
    RejectedAdapter,
    scan_checkpoints,
    scan_staging,
)


def check(
    output_dir: str,
    *,
    overwrite: bool,
    resume: bool = False,
    inputs: Inputs = (),
    dry_run: bool = False,
) -> "RunDirectory":
    """Check that a run may write to `output_dir`, see `OutputDirectory.check`."""
    return RunDirectory.at(output_dir, overwrite=overwrite, inputs=inputs).check(resume=resume, dry_run=dry_run)


@dataclass(frozen=True)
class RunDirectory(OutputDirectory):
    """Where a run works and where its adapter goes. For the attributes see `OutputDirectory`."""

    @property
    def checkpoints(self) -> Path:
        """The directory of the trainer's checkpoints."""
        return self.partial / "checkpoints"

    @property
    def overwrite_mark(self) -> Path:
        """A file that exists if the run was started with --overwrite: then --resume alone may replace the adapter."""
        return self.partial / "may_replace"

    @property
    def rejection(self) -> Path:
        """The record of an adapter that was not published; see `RejectedAdapter`."""
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
        return "continue with --resume" if self.is_resumable() else "start again"

    def is_kept(self) -> bool:
        """Whether `checkpoints` holds anything that a user may need: checkpoints, even damaged, or foreign files."""
        unfinished = self.checkpoints / "unfinished"
        return is_directory(self.checkpoints) and any(
            path != unfinished or not is_directory(path) for path in self.checkpoints.iterdir()
        )

    def is_resumable(self) -> bool:
        """Whether there is a checkpoint that was written to its end, so that `--resume` may be suggested."""
        return any(is_file(path / MANIFEST) for path in self.checkpoints.glob(f"{CHECKPOINT}*") if is_directory(path))

    def rejected_adapter(self) -> RejectedAdapter | None:
        """The adapter that the last run did not publish; None if that run was interrupted."""
        return RejectedAdapter.read(self.rejection)

    def _check_places(self, *, resume: bool) -> None:
        super()._check_places(resume=resume)
        if resume and not self.partial.is_dir():
            what, fix = "there is no interrupted run to resume", "start one without --resume"
            raise ResumeError(Problem(Code.RESUME_CHECKPOINT, what, self.display_name, fix=fix))

    def _check_state(self, *, resume: bool) -> None:
        super()._check_state(resume=resume)
        if not self.is_kept() or resume or self.overwrite:
            return
        partial, fix = self.partial.name, "start afresh with --overwrite"
        if not self.is_resumable():
            what = f"{partial} holds files of an interrupted run, but no whole checkpoint"
            raise self._refuse(Code.RUN_INTERRUPTED, what, fix)
        if self.rejected_adapter() is not None:
            what = f"{partial} holds a finished run whose adapter does worse than its base"
            fix = f"{PUBLISH_WORSE}, or {fix} and a lower training.learning_rate"
            raise self._refuse(Code.TRAINING_WORSE_THAN_BASE, what, fix)
        what = f"{partial} holds an interrupted run"
        raise self._refuse(Code.RUN_INTERRUPTED, what, f"continue it with --resume, or {fix}")

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
        super().prepare(resume=resume)
        self.checkpoints.mkdir(exist_ok=True)
        sync(self.partial)

    def remove_checkpoints(self) -> None:
        """Remove the checkpoints, so that the run cannot be resumed."""
        self._remove(self.checkpoints)
