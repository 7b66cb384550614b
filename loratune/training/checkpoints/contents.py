"""The files in the work in progress of a run: which of them a run made, and the record of a rejected adapter."""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from loratune.codes import Code
from loratune.errors import Problem, ResumeError
from loratune.system import records
from loratune.system.directories import TEMPLATES, Contents, is_adapter_file, scan
from loratune.system.files import read_text

_log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint-"
"""How the name of a checkpoint begins; the step follows."""
MANIFEST = records.MANIFEST
"""The file that is written last to a checkpoint. It lists the others."""
_TEMPORARY = r"(.*/)?\.tmp\w{6}"  # safetensors writes under such a name before it renames the file
_STEP = rf"{CHECKPOINT}\d+"
_TRAINER_FILES = re.compile(
    r"(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth|trainer_state\.json|run\.json|best\.safetensors|latest|"
    rf"{re.escape(MANIFEST)}|zero_to_fp32\.py|(global_step\d+|pytorch_model_fsdp_\d+|optimizer_\d+)/[^/]+|{_TEMPORARY}"
)
_TRAINER_DIRECTORIES = re.compile(r"global_step\d+|pytorch_model_fsdp_\d+|optimizer_\d+")
_IN_CHECKPOINT = re.compile(rf"(?P<checkpoint>(unfinished/)?{_STEP})/(?P<name>.+)")
_CHECKPOINT_DIRECTORY = re.compile(rf"unfinished|(unfinished/)?{_STEP}")


def scan_staging(directory: Path) -> Contents:
    """What is in a directory in which an adapter is being put together."""
    temporary = re.compile(rf"{_TEMPORARY}|[^/]+\.py")  # the code of a tokenizer that the user trusts is saved with it
    return scan(
        directory,
        lambda name: is_adapter_file(name) or temporary.fullmatch(name) is not None,
        lambda name: name == TEMPLATES,
    )


def scan_checkpoint(directory: Path) -> Contents:
    """What is in a checkpoint: what its manifest lists, and what the trainer is known to write."""
    manifest = _listed_files(directory)
    return scan(
        directory,
        lambda name: _is_checkpoint_file(name, manifest),
        lambda name: _TRAINER_DIRECTORIES.fullmatch(name) is not None,
    )


def scan_checkpoints(directory: Path) -> Contents:
    """What is in the directory of all checkpoints."""
    manifests: dict[str, set[str]] = {}

    def is_own(name: str) -> bool:
        if (match := _IN_CHECKPOINT.fullmatch(name)) is None:
            return False
        if match["checkpoint"] not in manifests:
            manifests[match["checkpoint"]] = _listed_files(directory / match["checkpoint"])
        return _is_checkpoint_file(match["name"], manifests[match["checkpoint"]])

    def is_own_directory(name: str) -> bool:
        match = _IN_CHECKPOINT.fullmatch(name)
        pattern, name = (_TRAINER_DIRECTORIES, match["name"]) if match else (_CHECKPOINT_DIRECTORY, name)
        return pattern.fullmatch(name) is not None

    return scan(directory, is_own, is_own_directory)


def _is_checkpoint_file(name: str, manifest: set[str]) -> bool:
    return name in manifest or is_adapter_file(name) or _TRAINER_FILES.fullmatch(name) is not None


def _listed_files(checkpoint: Path) -> set[str]:
    """The files that the manifest of a checkpoint lists; none if it cannot be read."""
    try:
        return set(json.loads(read_text(checkpoint / MANIFEST))) - {records.KEY}
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, TypeError, RecursionError):
        _log.debug("the manifest of %s counts as absent", checkpoint, exc_info=True)
        return set()


PUBLISH_WORSE = "publish it with --resume --allow-worse"
"""What can be done with an adapter that does worse than its base."""


@dataclass(frozen=True)
class RejectedAdapter:
    """The record of a run that took all its steps, and whose adapter was not published as it does worse than its base.

    Without it the checkpoints of such a run would look like those of an interrupted one. They are not: a run that
    continues from them takes no step and is rejected again.

    Attributes:
        step: The last optimizer step.
        comparison: How the adapter compares with its base, in one line.
    """

    step: int
    comparison: str

    def write(self, path: Path) -> None:
        """Write the record. If the disk has no room for it, later messages are only less exact."""
        values = {"step": self.step, "told": self.comparison}
        try:
            path.write_text(json.dumps(records.versioned(records.ENDED, values)) + "\n", encoding="utf-8")
        except OSError:
            _log.debug("%s cannot be written", path, exc_info=True)

    @classmethod
    def read(cls, path: Path) -> "RejectedAdapter | None":
        """The record at a path; None if there is none, or it is damaged.

        Raises:
            ResumeError: The record was written by a newer release.
        """
        try:
            values = json.loads(read_text(path))
            if reason := records.newer(records.ENDED, values):
                raise newer_record_error(path, reason)
            record = cls(values["step"], values["told"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            _log.debug("%s counts as absent", path, exc_info=True)
            return None
        return record if type(record.step) is int and isinstance(record.comparison, str) else None


def newer_record_error(path: Path, reason: str) -> ResumeError:
    """The error of a record that a newer release wrote. reason: see `records.newer`."""
    fix = "upgrade loratune, or start afresh with --overwrite"
    return ResumeError(Problem(Code.ADAPTER_NEWER_RECORD, reason, str(path), fix=fix))
