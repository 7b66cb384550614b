"""What `--overwrite` may replace: an adapter directory that holds nothing else, and that nothing else depends on.

A directory is replaced as a whole, so every file in it must belong to an adapter. `loratune.json` lists the files of an
adapter that a run made. An adapter without it, as PEFT writes them, may consist of the files that PEFT and tokenizers
are known to write; see `run_dir_files.ADAPTER_FILES`.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.codes import Code
from loratune.errors import ConfigError, Problem
from loratune.system import records
from loratune.system.directories import Contents, remove_own, scan, scan_adapter
from loratune.system.files import contains, is_file, is_incidental_file, is_sticky, read_text, sha256
from loratune.training.run_dir_files import CONFIG, RECORD

_log = logging.getLogger(__name__)

Inputs = Sequence[tuple[str, str]]
"""What a run reads: how the user names it, e.g. `data.train`, and its path."""
CONFIG_INPUT = "the config file"
"""How the config of a run is named among its inputs. It is not read again once the run has started."""
START_INPUT = "lora.start_from"
"""The same of the adapter that a run starts from. Every file in it belongs to it."""
_UNLISTED = frozenset({RECORD, "README.md"})  # of a recorded adapter; the user may edit its card
_MOST_NAMES = 3


@dataclass(frozen=True)
class OutputKind:
    """What is written to an output directory.

    Attributes:
        noun: What messages call it.
        key: The config key, or the option, by which the user names the directory.
        unfinished: The end of the name of the directory beside it in which it is put together.
    """

    noun: str
    key: str
    unfinished: str

    def is_in(self, directory: Path) -> bool:
        """Whether the directory holds one."""
        if self == ADAPTER:
            return is_file(directory / CONFIG)
        record = _record(directory)
        return isinstance(record, dict) and isinstance(record.get("kind"), str)


ADAPTER = OutputKind("adapter", "output_dir", "partial")
"""What training writes."""
EXPORT = OutputKind("exported model or adapter", "--output", "export")
"""What is made from an adapter. Its record says of which kind it is."""


def check_replaceable(
    directory: Path, display_name: str, inputs: Inputs, alternative: str = "", output: OutputKind = ADAPTER
) -> None:
    """Check that a directory may be replaced.

    Args:
        directory: The directory.
        display_name: The directory as the user named it.
        inputs: What the run reads.
        alternative: What a user can do who has moved the directory away; by default, or instead, choose another one.
        output: What is to be written there.

    Raises:
        ConfigError: The directory is in use, see `check_unused`; it holds no such output, one of a newer release, or
            other files; its files may not be removed.
        OSError: The directory cannot be read.
    """
    check_unused(directory, display_name, inputs, output)
    alternative = alternative or f"or choose another {output.key}"

    def refuse(code: Code, what: str, fix: str = f"move it away, {alternative}") -> ConfigError:
        return ConfigError(Problem(code, what, display_name, output.key, fix))

    if reason := records.newer(RECORD, _record(directory)):
        what, fix = f"{reason}, so --overwrite does not replace it", f"move it away, {alternative}"
        raise ConfigError(Problem(Code.RUN_OVERWRITE_NEWER, what, str(directory / RECORD), output.key, fix))
    contents = scan_recorded(directory)
    if not output.is_in(directory) and not all(map(is_incidental_file, (*contents.files, *contents.foreign))):
        raise refuse(Code.RUN_OVERWRITE_NO_ADAPTER, f"holds no {output.noun}, so --overwrite does not replace it")
    if contents.foreign:
        names = shortened(contents.foreign)
        what = f"also holds {names}, not part of the {output.noun}, so --overwrite does not replace it"
        raise refuse(Code.RUN_OVERWRITE_OTHER_FILES, what, f"move or delete these files, {alternative}")
    for place, _, _ in os.walk(directory):
        if not os.access(place, os.W_OK | os.X_OK):
            raise refuse(Code.RUN_OVERWRITE_READ_ONLY, f"cannot be replaced: {place} is not writable")
    if is_sticky(directory):
        what = f"cannot be replaced: only its owner may do so, as {directory.parent} is sticky"
        raise refuse(Code.RUN_OVERWRITE_STICKY, what)


def shortened(names: Sequence[str]) -> str:
    """The first of some names: `a, b, c (and 9 more)`."""
    rest = f" (and {len(names) - _MOST_NAMES} more)" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + rest


def check_unused(directory: Path, display_name: str, inputs: Inputs = (), output: OutputKind = ADAPTER) -> None:
    """Check that a directory can be moved and removed without harm to anything else.

    Raises:
        ConfigError: It is, or holds, a mount point, the working directory, or what the run reads.
    """

    def refuse(code: Code, what: str, fix: str) -> ConfigError:
        return ConfigError(Problem(code, f"{what}, so it cannot be replaced", display_name, output.key, fix))

    if (mount := next(_mount_points(directory), None)) is not None:
        if os.path.samefile(mount, directory):
            fix = "name a directory inside it that does not exist yet"
            raise refuse(Code.RUN_OVERWRITE_MOUNT, "is a mount point", fix)
        raise refuse(Code.RUN_OVERWRITE_MOUNT, f"holds the mount point {mount}", "choose another directory")
    if contains(directory, Path.cwd()):
        fix = "choose another directory, or start loratune from elsewhere"
        raise refuse(Code.RUN_OVERWRITE_WORKING_DIRECTORY, "is, or holds, the working directory", fix)
    for name, path in inputs:
        if contains(directory, Path(path)) and not (name == CONFIG_INPUT and is_recorded(directory, Path(path))):
            what, fix = f"is, or holds, what the run reads ({name}: {path})", "choose another directory, or move that"
            raise refuse(Code.RUN_OVERWRITE_INPUT, what, fix)


def is_recorded(directory: Path, path: Path) -> bool:
    """Whether a file is, unchanged, the one that the record of the adapter in this directory lists under its name."""
    try:
        name = path.resolve().relative_to(directory.resolve()).as_posix()
        return is_file(directory / name) and (_digests(directory) or {}).get(name) == sha256(directory / name)
    except (OSError, ValueError):
        _log.debug("%s counts as changed", path, exc_info=True)
        return False


def scan_recorded(directory: Path) -> Contents:
    """What is in an adapter directory, where the files that belong to it are those that its record lists.

    Without a record they are those that adapters are known to consist of.
    """
    digests = _digests(directory)
    return scan_adapter(directory) if digests is None else scan(directory, (digests.keys() | _UNLISTED).__contains__)


def move_files(directory: Path, target: Path) -> None:
    """Move an adapter file by file to a directory beside it, where the system does not move directories.

    The configuration, without which a directory is no adapter, goes first, so that there is never half of one.

    Raises:
        OSError: Something cannot be moved, or a foreign file has come to the directory.
    """
    contents = scan_recorded(directory)
    target.mkdir(exist_ok=True)
    shutil.copymode(directory, target)
    for name in sorted(contents.files, key=lambda name: name != CONFIG):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(directory / name, target / name)
    for name in (*contents.directories, "."):
        (directory / name).rmdir()


def move_files_back(source: Path, directory: Path) -> None:
    """Undo `move_files`, however far it came. The configuration goes last."""
    if not directory.exists():
        directory.mkdir()
        shutil.copymode(source, directory)
    contents = scan(source, lambda _: True, lambda _: True)
    for name in sorted(contents.files, key=lambda name: name == CONFIG):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source / name, directory / name)
    remove_own(source, contents)


def _digests(directory: Path) -> dict[str, Any] | None:
    """The files that the record of an adapter lists, with their SHA-256; None without a readable record."""
    record = _record(directory)
    files = record.get("files") if isinstance(record, dict) else None
    return files if isinstance(files, dict) else None


def _record(directory: Path) -> Any:
    """The record of an adapter; None if there is none, or it cannot be read."""
    try:
        return json.loads(read_text(directory / RECORD))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        _log.debug("the record of %s counts as absent", directory, exc_info=True)
        return None


def _mount_points(directory: Path) -> Iterator[str]:
    """The mount points that a directory is or holds."""
    real = os.path.realpath(directory)
    try:
        lines: Iterable[str] = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        lines = ()
    for line in lines:
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), line.split(" ")[4])
        if point == real or point.startswith(real.rstrip("/") + "/"):
            yield point
    if not lines and os.path.ismount(real):
        yield real
