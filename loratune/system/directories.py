"""Directories that programs write to: which of their files are known, and which directories may be replaced.

No directory is removed together with whatever happens to be in it. Each file that a run or an adapter consists of is
known by its name and kind; everything else is foreign and stays. A symbolic link counts as a file, and an empty
directory that no run makes is foreign as well.

`loratune.json` lists the files of an adapter, a merged model or an export. Without that record, an adapter may consist
of the files that PEFT and tokenizers are known to write. `--overwrite` replaces a directory of the same kind that holds
nothing else, and that nothing else needs.
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from loratune.codes import Code
from loratune.errors import ConfigError, Problem
from loratune.system.files import (
    contains,
    is_directory,
    is_file,
    is_incidental_directory,
    is_incidental_file,
    newer,
    notebook_original,
    read_text,
    sha256,
)

_log = logging.getLogger(__name__)

RECORD, ROW_HASHES = "loratune.json", "train_rows.hashes"
"""What made an adapter, and hashes of its training rows."""
CONFIG = "adapter_config.json"
"""The file without which a directory is no adapter."""
_UNLISTED = frozenset({RECORD, "README.md"})
"""Files that the record does not list: users may edit the card, and the record cannot hold its own digest."""
_MOST_NAMES = 3

ADAPTER_FILES = frozenset({
    RECORD, ROW_HASHES, CONFIG, "adapter_model.safetensors", "adapter_model.bin",
    "README.md", "run.yaml", "training_args.bin", "chat_template.jinja", "chat_template.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model",
    "spm.model", "spm_char.model", "source.spm", "target.spm", "tiktoken.model", "bpe.codes", "dict.txt", "emoji.json",
    "normalizer.json", "byte_maps.json", "entity_vocab.json", "vocab-src.json", "vocab-tgt.json", "target_vocab.json",
    "word_shape.json", "word_pronunciation.json",
})  # fmt: skip
"""The files of which an adapter without a record may consist: those that PEFT and tokenizers are known to write."""
TEMPLATES = "additional_chat_templates"
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

    def belongs(name: str) -> bool:
        original = notebook_original(name)
        return is_own(name) or is_incidental_file(name) or (original is not None and is_own(original))

    files, directories = _entries(directory)
    own = {name for name in files if belongs(name)}
    expected = {name for name in directories if is_own_directory(name) or is_incidental_directory(name)}
    parents = {".", *expected, *(str(parent) for name in own | expected for parent in PurePosixPath(name).parents)}
    foreign = [f"{name}/" for name in directories if name not in parents and _parent(name) in parents]
    foreign += [name for name in files if name not in own and _parent(name) in parents]
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


def _is_template(name: str) -> bool:
    return _parent(name) == TEMPLATES and name.endswith(".jinja")


def shortened(names: Sequence[str]) -> str:
    """The first of some names: `a, b, c (and 9 more)`."""
    rest = f" (and {len(names) - _MOST_NAMES} more)" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + rest


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


def _digests(directory: Path) -> dict[str, Any] | None:
    """The files that the record of an adapter lists, with their SHA-256; None without a readable record."""
    record = read_record(directory)
    files = record.get("files") if isinstance(record, dict) else None
    return files if isinstance(files, dict) else None


def read_record(directory: Path) -> Any:
    """The record of an adapter; None if it is missing or cannot be read."""
    try:
        return json.loads(read_text(directory / RECORD))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        _log.debug("the record of %s counts as absent", directory, exc_info=True)
        return None


def _parent(name: str) -> str:
    return str(PurePosixPath(name).parent)


def _entries(directory: Path) -> tuple[list[str], list[str]]:
    """Everything below a directory, by paths relative to it: what is no directory, and the directories."""

    def fail(error: OSError) -> None:
        raise error

    files, directories = list[str](), list[str]()
    for place, inner, names in os.walk(directory, onerror=fail):
        for name in (*inner, *names):
            path = Path(place, name)
            (directories if is_directory(path) else files).append(path.relative_to(directory).as_posix())
    return files, directories


Inputs = Sequence[tuple[str, str]]
"""What a command reads: how the user names it, e.g. `data.train`, and its path."""
CONFIG_INPUT = "the config file"
"""How the config of a run is named among its inputs. It is not read again once the run has started."""
START_INPUT = "lora.start_from"
"""How the adapter that a run starts from is named. Every file in its directory belongs to it."""


@dataclass(frozen=True)
class OutputKind:
    """What is written to an output directory.

    Attributes:
        noun: What messages call it.
        key: The config key, or the option, by which the user names the directory.
        unfinished: The end of the name of the sibling directory in which it is put together.
    """

    noun: str
    key: str
    unfinished: str

    def is_in(self, directory: Path) -> bool:
        """Whether the directory holds one."""
        if self == ADAPTER:
            return is_file(directory / CONFIG)
        record = read_record(directory)
        return isinstance(record, dict) and isinstance(record.get("kind"), str)


ADAPTER = OutputKind("adapter", "output_dir", "partial")
"""What training writes."""
EXPORT = OutputKind("exported model or adapter", "--output", "export")
"""What is made from an adapter. Its record says of which kind it is."""


def check_replaceable(directory: Path, where: str, inputs: Inputs, output: OutputKind, proceed: str = "") -> None:
    """Check that a directory may be replaced.

    Args:
        directory: The directory.
        where: The directory as messages name it.
        inputs: What the command reads.
        output: What is to be written there.
        proceed: What to do after the directory was moved away; by default, or instead, another one may be chosen.

    Raises:
        ConfigError: It is in use, see `check_unused`; it holds no such output, one of a newer release, or other files;
            its files may not be removed.
        OSError: It cannot be read.
    """
    check_unused(directory, where, inputs, output)
    alternative = f"and {proceed}" if proceed else f"or choose another {output.key}"

    def refuse(code: Code, what: str, fix: str = f"move it away, {alternative}", where: str = where) -> ConfigError:
        return ConfigError(Problem(code, what, where, output.key, fix))

    if reason := newer(read_record(directory)):
        what = f"{reason}, so --overwrite does not replace it"
        raise refuse(Code.ADAPTER_NEWER_RECORD, what, where=str(directory / RECORD))
    contents = scan_recorded(directory)
    if not output.is_in(directory) and not all(map(is_incidental_file, (*contents.files, *contents.foreign))):
        raise refuse(Code.OUTPUT_OVERWRITE, f"holds no {output.noun}, so --overwrite does not replace it")
    if contents.foreign:
        names = shortened(contents.foreign)
        what = f"also holds {names}, not part of the {output.noun}, so --overwrite does not replace it"
        raise refuse(Code.OUTPUT_OVERWRITE, what, f"move or delete these files, {alternative}")
    for place, _, _ in os.walk(directory):
        if not os.access(place, os.W_OK | os.X_OK):
            raise refuse(Code.OUTPUT_UNUSABLE, f"cannot be replaced: {place} is not writable")


def check_unused(directory: Path, where: str, inputs: Inputs, output: OutputKind) -> None:
    """Check that a directory can be moved and removed without harm to anything else. Arguments as of the above.

    Raises:
        ConfigError: It is a mount point; it is, or holds, the working directory or what the command reads.
    """

    def refuse(code: Code, what: str, fix: str) -> ConfigError:
        return ConfigError(Problem(code, f"{what}, so it cannot be replaced", where, output.key, fix))

    if os.path.ismount(directory):
        fix = "name a directory inside it that does not exist yet"
        raise refuse(Code.OUTPUT_OVERWRITE, "is a mount point", fix)
    if contains(directory, Path.cwd()):
        fix = "choose another directory, or start loratune from elsewhere"
        raise refuse(Code.OUTPUT_OVERWRITE, "is, or holds, the working directory", fix)
    for name, path in inputs:
        if contains(directory, Path(path)) and not (name == CONFIG_INPUT and is_recorded(directory, Path(path))):
            what, fix = (
                f"is, or holds, what the command reads ({name}: {path})",
                "choose another directory, or move that",
            )
            raise refuse(Code.OUTPUT_OVERWRITE, what, fix)
