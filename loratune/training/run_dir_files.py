"""The files in the directories of a run: which of them a run made, and the record of an adapter that was rejected.

No directory is removed together with whatever happens to be in it. Each file that a run or an adapter consists of is
known by its name and kind; everything else is foreign and stays. A symbolic link counts as a file, and an empty
directory that no run makes is foreign as well.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from loratune.codes import Code
from loratune.errors import Problem, ResumeError
from loratune.system import records
from loratune.system.files import (
    is_directory,
    is_incidental_directory,
    is_incidental_file,
    notebook_original,
    read_text,
)

_log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint-"
"""How the name of a checkpoint begins; the step follows."""
MANIFEST = records.MANIFEST
"""The file that is written last to a checkpoint. It lists the others."""
RECORD, CONFIG = records.ADAPTER, "adapter_config.json"
ADAPTER_FILES = frozenset({
    RECORD, CONFIG, "README.md", "adapter_model.safetensors", "adapter_model.bin", "run.yaml", "training_args.bin",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model",
    "spm.model", "spm_char.model", "source.spm", "target.spm", "tiktoken.model", "bpe.codes", "dict.txt", "emoji.json",
    "normalizer.json", "byte_maps.json", "entity_vocab.json", "vocab-src.json", "vocab-tgt.json", "target_vocab.json",
    "word_shape.json", "word_pronunciation.json", "chat_template.jinja", "chat_template.json", records.ROW_HASHES,
})  # fmt: skip
"""The files of which an adapter without a record may consist: those that PEFT and tokenizers are known to write."""
_TEMPLATES = "additional_chat_templates"
_TEMPORARY = r"(.*/)?\.tmp\w{6}"  # safetensors writes under such a name before it renames the file
_STEP = rf"{CHECKPOINT}\d+"
_TRAINER_FILES = re.compile(
    r"(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth|trainer_state\.json|run\.json|best\.safetensors|latest|"
    rf"{re.escape(MANIFEST)}|zero_to_fp32\.py|(global_step\d+|pytorch_model_fsdp_\d+|optimizer_\d+)/[^/]+|{_TEMPORARY}"
)
_TRAINER_DIRECTORIES = re.compile(r"global_step\d+|pytorch_model_fsdp_\d+|optimizer_\d+")
_IN_CHECKPOINT = re.compile(rf"(?P<checkpoint>(unfinished/)?{_STEP})/(?P<name>.+)")
_CHECKPOINT_DIRECTORY = re.compile(rf"unfinished|(unfinished/)?{_STEP}")

IsOwn = Callable[[str], bool]
"""Whether an entry of a directory belongs to it, by its path relative to the directory, with `/`."""


@dataclass(frozen=True)
class Contents:
    """What is in a directory, by paths relative to it.

    Attributes:
        files: The files that belong to it, sorted.
        directories: The directories that belong to it, the deepest first.
        foreign: What does not belong to it, sorted. A directory in which nothing belongs to it appears as one name
            that ends with `/`.
    """

    files: list[str]
    directories: list[str]
    foreign: list[str]


def scan(directory: Path, is_own: IsOwn, is_own_directory: IsOwn = lambda _: False) -> Contents:
    """Look at everything below a directory, without following links.

    Files that systems drop anywhere, such as .DS_Store, belong to the directory; see `is_incidental_file`.

    Args:
        directory: The directory.
        is_own: Whether a file belongs to it.
        is_own_directory: Whether a directory belongs to it even when it is empty.

    Raises:
        OSError: Something cannot be read.
    """
    files, directories = list(_files(directory)), list(_directories(directory))
    own = {name for name in files if is_own(name) or is_incidental_file(name) or _is_notebook_copy(name, is_own)}
    parents = {str(parent) for name in own for parent in PurePosixPath(name).parents}
    expected = {name for name in directories if is_own_directory(name) or is_incidental_directory(name)}
    parents |= {str(parent) for name in expected for parent in (PurePosixPath(name), *PurePosixPath(name).parents)}
    foreign = [f"{name}/" for name in directories if name not in parents and _parent(name) in parents | {"."}]
    foreign += [name for name in files if name not in own and _parent(name) in parents | {"."}]
    return Contents(sorted(own), sorted(parents - {"."}, reverse=True), sorted(foreign))


def remove_own(directory: Path, contents: Contents) -> bool:
    """Remove a directory except for foreign files. Returns whether nothing of it is left."""
    for name in contents.files:
        (directory / name).unlink(missing_ok=True)
    for name in (*contents.directories, "."):
        with suppress(OSError):
            (directory / name).rmdir()
    return not os.path.lexists(directory)


def is_adapter_file(name: str) -> bool:
    """Whether an adapter may have a file of this name, by its path relative to the directory, with `/`."""
    return name in ADAPTER_FILES or _is_template(name)


def scan_adapter(directory: Path) -> Contents:
    """What is in an adapter directory that has no record of its files."""
    return scan(directory, is_adapter_file)


def scan_all(directory: Path) -> Contents:
    """What is in a directory to which only one program writes: all of it belongs to it."""
    return scan(directory, lambda _: True, lambda _: True)


def scan_staging(directory: Path) -> Contents:
    """What is in a directory in which an adapter is being put together."""
    temporary = re.compile(rf"{_TEMPORARY}|[^/]+\.py")  # the code of a tokenizer that the user trusts is saved with it
    return scan(
        directory,
        lambda name: is_adapter_file(name) or temporary.fullmatch(name) is not None,
        lambda name: name == _TEMPLATES,
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
            return _CHECKPOINT_DIRECTORY.fullmatch(name) is not None  # see `RunDirectory.check_kinds`
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


def _is_template(name: str) -> bool:
    return _parent(name) == _TEMPLATES and name.endswith(".jinja")


def _listed_files(checkpoint: Path) -> set[str]:
    """The files that the manifest of a checkpoint lists; none if it cannot be read."""
    try:
        return set(json.loads(read_text(checkpoint / MANIFEST))) - {records.KEY}
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, TypeError, RecursionError):
        _log.debug("the manifest of %s counts as absent", checkpoint, exc_info=True)
        return set()


def _is_notebook_copy(name: str, is_own: IsOwn) -> bool:
    return (original := notebook_original(name)) is not None and is_own(original)


def _parent(name: str) -> str:
    return str(PurePosixPath(name).parent)


def _walk(directory: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    def fail(error: OSError) -> None:
        raise error

    for place, directories, files in os.walk(directory, onerror=fail):
        directories.sort()
        yield Path(place), directories, files


def _files(directory: Path) -> Iterator[str]:
    """Everything that is not a directory, by its path relative to this one."""
    for place, directories, files in _walk(directory):
        for name in sorted([*files, *(name for name in directories if not is_directory(place / name))]):
            yield (place / name).relative_to(directory).as_posix()


def _directories(directory: Path) -> Iterator[str]:
    for place, directories, _ in _walk(directory):
        for name in directories:
            if is_directory(place / name):
                yield (place / name).relative_to(directory).as_posix()


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
    return ResumeError(Problem(Code.RESUME_NEWER_RECORD, reason, str(path), fix=fix))
