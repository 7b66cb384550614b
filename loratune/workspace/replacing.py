"""What `--overwrite` may replace: an adapter directory that holds nothing else, and that nothing else depends on.

A directory is replaced as a whole, so every file in it must be one that an adapter consists of. `loratune.json` lists
the files of an adapter that a run made. An adapter without it, as PEFT makes them, may consist of the files that PEFT,
the Trainer and tokenizers are known to write, see `KNOWN`.
"""

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from loratune.errors import ConfigError, Problem
from loratune.workspace.plain import is_directory, read_text

Inputs = Sequence[tuple[str, str]]
"""What a run reads: how the user names it, e.g. `data.train`, and its path."""
RECORD = "loratune.json"
CONFIG = "adapter_config.json"
_ALWAYS = frozenset({RECORD, "README.md"})
KNOWN = _ALWAYS | {
    CONFIG, "adapter_model.safetensors", "adapter_model.bin", "run.yaml", "training_args.bin", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
}  # fmt: skip
"""The files of which an adapter without a record may consist."""
_TEMPLATES = re.compile(r"additional_chat_templates/[^/]+\.jinja")
_SHOWN = 3


def check(directory: Path, where: str, inputs: Inputs, fix: str = "move it away, or choose another") -> None:
    """Insist that a directory may be replaced. where: as the user named it; fix: what to do if not.

    Raises ConfigError: it is needed, see `check_unneeded`; it holds no adapter, or other files than an adapter's; its
    files may not be removed. Raises OSError: it cannot be read.
    """
    check_unneeded(directory, where, inputs)
    if any(directory.iterdir()) and not (directory / CONFIG).is_file():
        raise ConfigError(Problem("holds no adapter, so --overwrite leaves it alone", where, "output_dir", fix))
    if others := list(islice(strangers(directory), _SHOWN + 1)):
        more = " and others" if len(others) > _SHOWN else ""
        named = "its record does not list" if _listed(directory) is not None else "no adapter consists of"
        what = f"holds files that {named} ({', '.join(others[:_SHOWN])}{more}), so --overwrite leaves it alone"
        raise ConfigError(Problem(what, where, "output_dir", fix))
    for place, _, _ in os.walk(directory):
        if not os.access(place, os.W_OK | os.X_OK):
            raise ConfigError(Problem(f"cannot be replaced: {place} may not be written", where, "output_dir", fix))
    around, owner = directory.parent.stat(), directory.stat().st_uid
    if around.st_mode & stat.S_ISVTX and os.geteuid() not in (0, around.st_uid, owner):
        what = f"cannot be replaced: only its owner may do so in {directory.parent}, which is sticky"
        raise ConfigError(Problem(what, where, "output_dir", fix))


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
        if holds(directory, Path(path)):
            raise refuse(f"is, or holds, what the run reads ({name}: {path})", "choose another, or move that elsewhere")


def strangers(directory: Path) -> Iterator[str]:
    """The files in an adapter directory, by their paths in it, that do not belong to the adapter; links are files."""
    listed = _listed(directory)
    known = KNOWN if listed is None else listed | _ALWAYS
    for name in _files(directory):
        if name not in known and not (listed is None and _TEMPLATES.fullmatch(name)):
            yield name


def remove(directory: Path) -> bool:
    """Remove an adapter directory, but for what does not belong to the adapter. Returns whether all has gone."""
    foreign = set(strangers(directory))
    for name in set(_files(directory)) - foreign:
        (directory / name).unlink(missing_ok=True)
    for place, _, _ in os.walk(directory, topdown=False):
        with suppress(OSError):
            os.rmdir(place)
    return not directory.exists()


def holds(directory: Path, path: Path) -> bool:
    """Whether a path is a directory or lies in it, by whatever names: links, bind mounts, other cases of letters."""
    own = directory.stat()
    for start in (Path(os.path.abspath(path)), Path(os.path.realpath(path))):
        for one in (start, *start.parents):
            with suppress(OSError):
                if os.path.samestat(own, one.stat()):
                    return True
    return False


def _files(directory: Path) -> Iterator[str]:
    """All that is not a directory, by its path in this one. Raises OSError: a directory cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    for place, directories, files in os.walk(directory, onerror=fail):
        directories.sort()
        for name in sorted([*files, *(one for one in directories if not is_directory(Path(place, one)))]):
            yield Path(place, name).relative_to(directory).as_posix()


def _listed(directory: Path) -> set[str] | None:
    """The files that the record of an adapter lists; None without a record, or with one that cannot be read."""
    try:
        files = json.loads(read_text(directory / RECORD))["files"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return set(files) if isinstance(files, dict) else None


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
