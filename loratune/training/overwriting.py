"""What `--overwrite` may replace: an adapter directory that holds nothing else, and that nothing else depends on.

A directory is replaced as a whole, so every file in it must be one that an adapter consists of. `loratune.json` lists
the files of an adapter that a run made. An adapter without it, as PEFT makes them, may consist of the files that PEFT
and tokenizers are known to write, see `belongings.KNOWN`.
"""

import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from loratune.errors import ConfigError, Problem
from loratune.system import records
from loratune.system.files import is_file, is_incidental_file, read_text, sha256
from loratune.training.belongings import CONFIG, KNOWN, RECORD, Belongings, of_adapter, survey
from loratune.training.belongings import remove as clear

_log = logging.getLogger(__name__)

Inputs = Sequence[tuple[str, str]]
"""What a run reads: how the user names it, e.g. `data.train`, and its path."""
CONFIG_FILE = "the config file"
"""How the config of a run is named among its inputs. It has been read for good when the run begins."""
_ALWAYS = frozenset({RECORD, "README.md"})
_SHOWN = 3


def check(directory: Path, where: str, inputs: Inputs, otherwise: str = "choose another output_dir") -> None:
    """Insist that a directory may be replaced.

    where: as the user named it; otherwise: what to do where that is refused, besides moving the directory away.

    Raises ConfigError: it is needed, see `check_unneeded`; it holds no adapter, or one of a newer release, or other
    files than an adapter's; its files may not be removed. Raises OSError: it cannot be read.
    """
    check_unneeded(directory, where, inputs)
    fix = f"move it away, {_joined(otherwise)}"
    if reason := records.newer(RECORD, _record(directory)):
        what = f"{reason}, so --overwrite leaves it alone"
        raise ConfigError(Problem(what, str(directory / RECORD), "output_dir", fix))
    found = belongings(directory)
    if not is_file(directory / CONFIG) and not all(map(is_incidental_file, (*found.own, *found.strangers))):
        raise ConfigError(Problem("holds no adapter, so --overwrite leaves it alone", where, "output_dir", fix))
    if found.strangers:
        what = f"also holds {shown(found.strangers)}, which no adapter record lists, so --overwrite leaves it alone"
        raise ConfigError(Problem(what, where, "output_dir", f"move or delete them, {_joined(otherwise)}"))
    for place, _, _ in os.walk(directory):
        if not os.access(place, os.W_OK | os.X_OK):
            raise ConfigError(Problem(f"cannot be replaced: {place} may not be written", where, "output_dir", fix))
    if is_stuck(directory):
        what = f"cannot be replaced: only its owner may do so in {directory.parent}, which is sticky"
        raise ConfigError(Problem(what, where, "output_dir", fix))


def is_stuck(path: Path) -> bool:
    """Whether another user's file or directory may not be moved, as the directory around it is sticky."""
    around, owner = path.parent.stat(), path.lstat().st_uid
    return bool(around.st_mode & stat.S_ISVTX) and os.geteuid() not in (0, around.st_uid, owner)


def shown(names: Sequence[str]) -> str:
    """The first of some names: `a, b, c (and 9 more)`."""
    more = f" (and {len(names) - _SHOWN} more)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _joined(otherwise: str) -> str:
    """`or ...`, where the user has a choice, and else `and ...`."""
    return f"or {otherwise}" if otherwise.startswith("choose") else f"and {otherwise}"


def check_unneeded(directory: Path, where: str, inputs: Inputs = ()) -> None:
    """Insist that a directory can be moved and removed without harm to what is around it.

    Raises ConfigError: it is a mount point, or holds one; it is the working directory, or holds it; it holds what the
    run reads.
    """

    def refuse(what: str, fix: str) -> ConfigError:
        return ConfigError(Problem(f"{what}, so it cannot be replaced", where, "output_dir", fix))

    if (mounted := next(_mounts(directory), None)) is not None:
        if os.path.samefile(mounted, directory):
            raise refuse("is a mount point", "name a directory in it that does not exist yet")
        raise refuse(f"holds the mount point {mounted}", "choose another")
    if holds(directory, Path.cwd()):
        raise refuse("is, or holds, the working directory", "choose another, or start from elsewhere")
    for name, path in inputs:
        if holds(directory, Path(path)) and not (name == CONFIG_FILE and is_recorded(directory, Path(path))):
            raise refuse(f"is, or holds, what the run reads ({name}: {path})", "choose another, or move that elsewhere")


def is_recorded(directory: Path, path: Path) -> bool:
    """Whether a file is, unchanged, the one that the record of the adapter in this directory lists under its name."""
    try:
        name = path.resolve().relative_to(directory.resolve()).as_posix()
        return is_file(directory / name) and (_listed(directory) or {}).get(name) == sha256(directory / name)
    except (OSError, ValueError):
        _log.debug("%s counts as changed", path, exc_info=True)
        return False


def belongings(directory: Path) -> Belongings:
    """What is in an adapter directory: what its record lists, or else what is known of adapters, and what is not."""
    listed = _listed(directory)
    if listed is None:
        return of_adapter(directory, KNOWN.__contains__)
    return survey(directory, (listed.keys() | _ALWAYS).__contains__)


def remove(directory: Path) -> bool:
    """Remove an adapter directory, but for what does not belong to the adapter. Returns whether all has gone."""
    return clear(directory, belongings(directory))


def move(directory: Path, target: Path) -> None:
    """Move an adapter file by file to a directory beside it, where the system moves it in no other way.

    What makes it an adapter, its configuration, goes first, so that there is never half of one. Raises OSError:
    something cannot be moved, or something that does not belong to the adapter has come there.
    """
    found = belongings(directory)
    target.mkdir(exist_ok=True)
    shutil.copymode(directory, target)
    for name in sorted(found.own, key=lambda name: name != CONFIG):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(directory / name, target / name)
    for name in (*found.directories, "."):
        (directory / name).rmdir()


def move_back(source: Path, directory: Path) -> None:
    """Undo `move`, wherever it ended. The configuration comes last."""
    if not directory.exists():
        directory.mkdir()
        shutil.copymode(source, directory)
    found = survey(source, lambda _: True, lambda _: True)
    for name in sorted(found.own, key=lambda name: name == CONFIG):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source / name, directory / name)
    clear(source, found)


def holds(directory: Path, path: Path) -> bool:
    """Whether a path is a directory or lies in it, by whatever names: links, bind mounts, other cases of letters."""
    own = directory.stat()
    for start in (Path(os.path.abspath(path)), Path(os.path.realpath(path))):
        for one in (start, *start.parents):
            with suppress(OSError):
                if os.path.samestat(own, one.stat()):
                    return True
    return False


def _listed(directory: Path) -> dict[str, Any] | None:
    """The files that the record of an adapter lists, with their digests; None if there is no record, or none that can
    be read."""
    record = _record(directory)
    files = record.get("files") if isinstance(record, dict) else None
    return files if isinstance(files, dict) else None


def _record(directory: Path) -> Any:
    """The record of an adapter; None if there is none, or none that can be read."""
    try:
        return json.loads(read_text(directory / RECORD))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        _log.debug("the record of %s counts as absent", directory, exc_info=True)
        return None


def _mounts(directory: Path) -> Iterator[str]:
    """The mount points that a directory is or holds."""
    where = os.path.realpath(directory)
    try:
        lines: Iterable[str] = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        lines = ()
    for line in lines:
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), line.split(" ")[4])
        if point == where or point.startswith(where.rstrip("/") + "/"):
            yield point
    if not lines and os.path.ismount(where):
        yield where
