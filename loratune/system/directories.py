"""Directories that programs write to: which of their files are known.

No directory is removed together with whatever happens to be in it. Each file that a run or an adapter consists of is
known by its name and kind; everything else is foreign and stays. A symbolic link counts as a file, and an empty
directory that no run makes is foreign as well.

`loratune.json` lists the files of an adapter, a merged model or an export. Without that record, an adapter may consist
of the files that PEFT and tokenizers are known to write.
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from loratune.system import files

_log = logging.getLogger(__name__)

RECORD, ROW_HASHES = "loratune.json", "train_rows.hashes"
"""The record of an adapter, and hashes of its training rows."""
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
"""The files that an adapter without a record may have: those that PEFT and tokenizers are known to write."""
TEMPLATES = "additional_chat_templates"
IsOwn = Callable[[str], bool]
"""Whether an entry of a directory belongs to it, by its path relative to the directory, with `/`."""


@dataclass(frozen=True)
class Contents:
    """The contents of a directory, as paths relative to it.

    Attributes:
        files: The files that belong to it, sorted.
        directories: The directories that belong to it, the deepest first.
        foreign: Entries that do not belong to it, sorted. A directory of only foreign entries is listed as one name
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
    names, directories = _entries(directory)
    own = {name for name in names if is_own(name) or files.is_incidental_file(name)}
    expected = {name for name in directories if is_own_directory(name) or files.is_incidental_directory(name)}
    parents = {".", *expected, *(str(parent) for name in own | expected for parent in PurePosixPath(name).parents)}
    foreign = [f"{name}/" for name in directories if name not in parents and _parent(name) in parents]
    foreign += [name for name in names if name not in own and _parent(name) in parents]
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
    return name in ADAPTER_FILES or (_parent(name) == TEMPLATES and name.endswith(".jinja"))


def scan_adapter(directory: Path) -> Contents:
    """What is in an adapter directory that has no record of its files."""
    return scan(directory, is_adapter_file)


def shortened(names: Sequence[str]) -> str:
    """The first of some names: `a, b, c (and 9 more)`."""
    rest = f" (and {len(names) - _MOST_NAMES} more)" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + rest


def is_recorded(directory: Path, path: Path) -> bool:
    """Whether a file is, unchanged, the one that the record of the adapter in this directory lists under its name."""
    try:
        name = path.resolve().relative_to(directory.resolve()).as_posix()
        recorded = (_digests(directory) or {}).get(name)
        return files.is_file(directory / name) and recorded == files.sha256(directory / name)
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
    listed = record.get("files") if isinstance(record, dict) else None
    return listed if isinstance(listed, dict) else None


def read_record(directory: Path) -> Any:
    """The record of an adapter; None if it is missing or cannot be read."""
    try:
        return json.loads(files.read_text(directory / RECORD))
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

    others, directories = list[str](), list[str]()
    for place, inner, names in os.walk(directory, onerror=fail):
        for name in (*inner, *names):
            path = Path(place, name)
            (directories if files.is_directory(path) else others).append(path.relative_to(directory).as_posix())
    return others, directories
