"""What is in a directory that this program is about to remove: its own, and what is not, which stays.

Nothing is removed with all that happens to be in it. What a directory consists of is known by names, and by kinds: a
link is a file, and an empty directory that is not expected belongs to someone as well.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

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
KNOWN = frozenset({
    RECORD, CONFIG, "README.md", "adapter_model.safetensors", "adapter_model.bin", "run.yaml", "training_args.bin",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model",
    "spm.model", "spm_char.model", "source.spm", "target.spm", "tiktoken.model", "bpe.codes", "dict.txt", "emoji.json",
    "normalizer.json", "byte_maps.json", "entity_vocab.json", "vocab-src.json", "vocab-tgt.json", "target_vocab.json",
    "word_shape.json", "word_pronunciation.json", "chat_template.jinja", "chat_template.json",
})  # fmt: skip
"""The files of which an adapter without a record may consist: those that PEFT and tokenizers are known to write."""
_TEMPLATES = "additional_chat_templates"
_HALF = r"(.*/)?\.tmp\w{6}"  # of safetensors, before it has its name
_STEP = rf"{CHECKPOINT}\d+"
_STATES = re.compile(
    r"(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth|trainer_state\.json|run\.json|latest|"
    rf"{re.escape(MANIFEST)}|zero_to_fp32\.py|(global_step\d+|pytorch_model_fsdp_\d+|optimizer_\d+)/[^/]+|{_HALF}"
)
_STATE_DIRECTORY = re.compile(r"global_step\d+|pytorch_model_fsdp_\d+|optimizer_\d+")
_IN_CHECKPOINTS = re.compile(rf"(?P<checkpoint>(unfinished/)?{_STEP})/(?P<name>.+)")
_OF_CHECKPOINTS = re.compile(rf"unfinished|(unfinished/)?{_STEP}")

Known = Callable[[str], bool]
"""Whether something belongs to a directory, by its path in it, with `/`."""


@dataclass(frozen=True)
class Belongings:
    """What is in a directory, by paths in it. own: its files; directories: its directories, the deepest first;
    strangers: what does not belong to it, of a directory without anything that does only the name, with a `/`."""

    own: list[str]
    directories: list[str]
    strangers: list[str]


def survey(directory: Path, is_own: Known, is_own_directory: Known = lambda _: False) -> Belongings:
    """Look at all that is below a directory, through no link. Droppings belong to it, see `droppings`.

    is_own: of files; is_own_directory: of directories that may be empty. Raises OSError: something cannot be read.
    """
    files, directories = list(_files(directory)), list(_directories(directory))
    own = {name for name in files if is_own(name) or is_incidental_file(name) or _is_copy(name, is_own)}
    around = {str(parent) for name in own for parent in PurePosixPath(name).parents}
    expected = {one for one in directories if is_own_directory(one) or is_incidental_directory(one)}
    around |= {str(parent) for name in expected for parent in (PurePosixPath(name), *PurePosixPath(name).parents)}
    foreign = [f"{one}/" for one in directories if one not in around and _parent(one) in around | {"."}]
    foreign += [name for name in files if name not in own and _parent(name) in around | {"."}]
    return Belongings(sorted(own), sorted(around - {"."}, reverse=True), sorted(foreign))


def remove(directory: Path, found: Belongings) -> bool:
    """Remove a directory, but for what does not belong to it. Returns whether all has gone."""
    for name in found.own:
        (directory / name).unlink(missing_ok=True)
    for name in (*found.directories, "."):
        with suppress(OSError):
            (directory / name).rmdir()
    return not os.path.lexists(directory)


def of_adapter(directory: Path, is_own: Known) -> Belongings:
    """What is in an adapter directory, while it is put together, or without a record."""
    return survey(directory, lambda name: is_own(name) or _is_template(name))


def of_staging(directory: Path) -> Belongings:
    """What is in a directory in which an adapter is put together."""
    half = re.compile(rf"{_HALF}|[^/]+\.py")  # code of a tokenizer that the user has trusted comes along
    return survey(
        directory,
        lambda name: name in KNOWN or _is_template(name) or half.fullmatch(name) is not None,
        lambda name: name == _TEMPLATES,
    )


def of_checkpoint(directory: Path) -> Belongings:
    """What is in a checkpoint: what its manifest lists, and what the trainer is known to write."""
    listed = _manifest(directory)
    return survey(
        directory, lambda name: _is_state(name, listed), lambda name: _STATE_DIRECTORY.fullmatch(name) is not None
    )


def of_checkpoints(directory: Path) -> Belongings:
    """What is in the directory of all checkpoints."""
    listed: dict[str, set[str]] = {}

    def is_own(name: str) -> bool:
        if (found := _IN_CHECKPOINTS.fullmatch(name)) is None:
            return _OF_CHECKPOINTS.fullmatch(name) is not None  # of another kind than it should be, see `oddities`
        if found["checkpoint"] not in listed:
            listed[found["checkpoint"]] = _manifest(directory / found["checkpoint"])
        return _is_state(found["name"], listed[found["checkpoint"]])

    def is_own_directory(name: str) -> bool:
        found = _IN_CHECKPOINTS.fullmatch(name)
        return (_STATE_DIRECTORY.fullmatch(found["name"]) if found else _OF_CHECKPOINTS.fullmatch(name)) is not None

    return survey(directory, is_own, is_own_directory)


def _is_state(name: str, listed: set[str]) -> bool:
    return name in listed or name in KNOWN or _is_template(name) or _STATES.fullmatch(name) is not None


def _is_template(name: str) -> bool:
    return _parent(name) == _TEMPLATES and name.endswith(".jinja")


def _manifest(checkpoint: Path) -> set[str]:
    """The files that the manifest of a checkpoint lists; none if it cannot be read."""
    try:
        return set(json.loads(read_text(checkpoint / MANIFEST))) - {records.KEY}
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, TypeError, RecursionError):
        _log.debug("the manifest of %s counts as absent", checkpoint, exc_info=True)
        return set()


def _is_copy(name: str, is_own: Known) -> bool:
    return (first := notebook_original(name)) is not None and is_own(first)


def _parent(name: str) -> str:
    return str(PurePosixPath(name).parent)


def _walk(directory: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    def fail(error: OSError) -> None:
        raise error

    for place, directories, files in os.walk(directory, onerror=fail):
        directories.sort()
        yield Path(place), directories, files


def _files(directory: Path) -> Iterator[str]:
    """All that is not a directory, by its path in this one."""
    for place, directories, files in _walk(directory):
        for name in sorted([*files, *(one for one in directories if not is_directory(place / one))]):
            yield (place / name).relative_to(directory).as_posix()


def _directories(directory: Path) -> Iterator[str]:
    for place, directories, _ in _walk(directory):
        for name in directories:
            if is_directory(place / name):
                yield (place / name).relative_to(directory).as_posix()
