"""The source of a base model: a local directory or a repository of the hub. This module does not import torch."""

import mmap
import struct
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

from loratune.codes import Code
from loratune.config import ModelSection
from loratune.errors import ModelError, Problem, missing_package
from loratune.system.environment import cache_fix

KEY = "model.name_or_path"
GGUF_KEY = "model.gguf_file"


@dataclass(frozen=True)
class ModelSource:
    """A model that exists, named as transformers expects it.

    Attributes:
        name: The absolute path of a directory, or a hub id.
        gguf_file: The absolute path of a GGUF file.
        from_hub: The GGUF file was downloaded. Which other files lie beside it in the cache is chance.
    """

    name: str
    gguf_file: str | None = None
    from_hub: bool = False

    def gguf_unless(self, *files: str) -> dict[str, str]:
        """The GGUF file as a keyword for `from_pretrained`, unless the directory has one of these files."""
        if self.gguf_file is None or (not self.from_hub and any((Path(self.name) / file).is_file() for file in files)):
            return {}
        return {"gguf_file": self.gguf_file}


def locate(section: ModelSection) -> ModelSource:
    """Find the model, and download its GGUF file if it is on the hub.

    transformers gets the GGUF file by its absolute path: a relative one is first looked up in the working directory.

    Raises:
        ModelError: As `is_directory` and `check_repository`; the download fails; the GGUF file cannot be read.
    """
    name, file, revision = section.name_or_path, section.gguf_file, section.revision
    if is_directory(name, revision, file, trusted=section.trust_remote_code):
        directory = local_or_hub(name)
        return ModelSource(directory, str(Path(directory) / file) if file else None)
    if file is None:
        check_repository(name, revision)
        return ModelSource(name)
    check_repository(name, revision, file)
    try:
        path = Path(hf_hub_download(name, file, revision=revision))
    except Exception as error:  # whatever the network stack raises
        what = f"{file} cannot be downloaded: {summary(error)}"
        raise ModelError(Problem(Code.MODEL_HUB_UNREACHABLE, what, name, GGUF_KEY, cache_fix(error))) from None
    check_gguf(path)
    return ModelSource(str(path.parent), str(path), from_hub=True)


def is_directory(
    name_or_path: str, revision: str | None = None, gguf_file: str | None = None, *, trusted: bool = False
) -> bool:
    """Whether this is a model directory; False means that it may be a hub id.

    Args:
        name_or_path: A path or a hub id.
        revision: Only hub ids have one, except where code is trusted, which always needs a revision.
        gguf_file: A file in the directory, which then needs no other.
        trusted: Code of the model is trusted.

    Raises:
        ModelError: The path does not exist or is a file; the directory holds no model, or a revision is set for it;
            as `check_gguf`.
    """
    path, key, fix = Path(name_or_path).expanduser(), KEY, ""
    if gguf_file is not None:
        check_gguf_name(gguf_file)
    if path.is_dir() and revision is not None and not trusted:
        what, key, fix = "a directory has no revisions", "model.revision", "leave it out"
    elif path.is_dir():
        if gguf_file is not None:
            check_gguf(path / gguf_file)
        if gguf_file is not None or (path / "config.json").is_file():
            return True
        files = sorted(file.name for file in path.glob("*.gguf"))
        what = "no config.json in this directory, so it holds no model"
        fix = f"set {GGUF_KEY} to {' or '.join(files[:3])}" if files else "name the directory that has one"
    elif path.exists():
        what = "is a file, not a model directory"
        fix = f"name its directory, and set {GGUF_KEY}: {path.name}" if path.suffix == ".gguf" else "name its directory"
    elif name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        what, fix = "no such directory", "check the path"
    else:
        return False
    raise ModelError(Problem(Code.MODEL_NOT_FOUND, what, name_or_path, key, fix))


def local_or_hub(name_or_path: str) -> str:
    """The name by which a model can be found from anywhere: an absolute path for a directory, else the hub id."""
    path = Path(name_or_path).expanduser()
    return str(path.absolute()) if path.is_dir() else name_or_path


def cached_directory(section: ModelSection) -> Path | None:
    """The directory of a model, on this machine or in the cache of the hub; None if it is not in the cache."""
    directory, file = Path(local_or_hub(section.name_or_path)), section.gguf_file
    if directory.is_dir():
        return directory
    cached = try_to_load_from_cache(section.name_or_path, file or "config.json", revision=section.revision)
    return Path(cached).parents[len(Path(file).parts) - 1 if file else 0] if isinstance(cached, str) else None


def check_repository(name: str, revision: str | None, file: str = "config.json", *, perhaps_path: bool = True) -> None:
    """Determine why a model cannot be downloaded from the hub; transformers reports most reasons as one OSError.

    Args:
        name: The repository.
        revision: A branch, tag or commit of it.
        file: One that it must have.
        perhaps_path: Whether the name might have been meant as the path of a directory.

    Raises:
        ModelError: No such repository, or it is gated; no such revision or file; offline and not cached.
    """
    code, fix, key = Code.MODEL_NOT_FOUND, "", KEY
    neither = "no such directory, and " if perhaps_path else ""
    try:
        if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            return
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision), timeout=10)
        return
    except errors.GatedRepoError:
        code, what = Code.MODEL_GATED, "this repository is gated"
        fix = f"accept its terms on https://huggingface.co/{name} and log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        what, key = f"the repository has no revision {revision}", "model.revision"
    except errors.RepositoryNotFoundError:
        what, fix = f"{neither}no such repository on the hub", "check the name; private ones need `hf auth login`"
    except errors.EntryNotFoundError:
        is_config = file == "config.json"
        what, key = (
            f"the repository has no {file}{', so it holds no model' * is_config}",
            KEY if is_config else GGUF_KEY,
        )
    except errors.HFValidationError:
        what = f"{neither}not the id of a repository"
    except Exception as error:  # whatever the network stack raises
        code = Code.MODEL_HUB_UNREACHABLE
        what = f"{neither}the hub cannot be reached and the model is not cached ({summary(error)})"
        fix = cache_fix(error) or f"check {'the path, or ' if perhaps_path else ''}the connection"
    raise ModelError(Problem(code, what, name, key, fix))


def summary(error: BaseException) -> str:
    """The first line of an error, and the next where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, KeyError):
        return f"unknown: {lines[0]}"
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text.partition(". ")[0]


# --- GGUF files: whether a file is one, and whether it is complete. The format:
# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

LFS_START = b"version https://git-lfs"
"""How a file begins that Git LFS left as a pointer to the real one."""

# Value types of metadata → their code in struct. 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_checked: set[tuple[int, ...]] = set()
"""Device, inode, size and time of change of the files that this process has found to be whole."""


def check_gguf_name(gguf_file: str) -> None:
    """Check that the file is within its directory.

    Raises:
        ModelError: An absolute path, or one that leads out of the directory.
    """
    if PurePath(gguf_file).is_absolute() or ".." in PurePath(gguf_file).parts:
        fix = "name the directory in model.name_or_path, and only the file here"
        raise ModelError(Problem(Code.MODEL_NOT_FOUND, "leads out of the model directory", gguf_file, GGUF_KEY, fix))


def check_gguf(path: Path) -> None:
    """Check that transformers will be able to read this file, which is read once as long as it does not change.

    Raises:
        ModelError: The file does not exist, is a Git LFS pointer, is not GGUF or of a version that transformers does
            not read, is one part of several, or is cut off; the package gguf is missing.
    """
    where = str(path)
    if not path.is_file():
        files = sorted(file.name for file in path.parent.glob("*.gguf"))
        fix = f"there is {', '.join(files[:3])}" if files else "no GGUF file is in that directory"
        raise ModelError(Problem(Code.MODEL_NOT_FOUND, "no such file", where, GGUF_KEY, fix))
    if find_spec("gguf") is None:
        code = Code.SYSTEM_MISSING_PACKAGE
        raise ModelError(missing_package(code, "gguf", "reads GGUF files", "gguf", where, GGUF_KEY))
    now = path.stat()
    version = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns)
    if version in _checked:
        return
    with path.open("rb") as file:
        start = file.read(len(LFS_START))
        if start == LFS_START:
            raise ModelError(lfs_pointer(path))
        if start[:4] != b"GGUF":
            raise _damaged(path, "not a GGUF file", "")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check_complete(_Reader(data), path)
    _checked.add(version)


def lfs_pointer(path: Path) -> Problem:
    """The problem of a file of weights that is only a pointer of Git LFS."""
    what, fix = "a Git LFS pointer, not the weights", "fetch them with `git lfs pull`"
    return Problem(Code.MODEL_DAMAGED, what, str(path), fix=fix)


class _Reader:
    """Reads values one after another. Raises struct.error at the end of the file."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 4

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self.data, self.at)
        self.skip(struct.calcsize(f"<{form}"))
        return values

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise struct.error("past the end")

    def text(self) -> bytes:
        (length,) = self.take("Q")
        start = self.at
        self.skip(length)
        return self.data[start : self.at]

    def value(self, kind: int) -> Any:
        """A value of metadata; None for an array, which is skipped."""
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"metadata of the unknown type {kind}")
        inner, length = self.take("IQ")
        if inner in _SCALARS:
            self.skip(length * struct.calcsize(f"<{_SCALARS[inner]}"))
        else:
            for _ in range(length):
                self.value(inner)
        return None


def _check_complete(reader: _Reader, path: Path) -> None:
    """Read the metadata and the table of tensors, and check that the last tensor ends within the file."""
    try:
        version, tensors, entries = reader.take("IQQ")
        if version not in (2, 3):
            raise _damaged(path, f"GGUF version {version}; only versions 2 and 3 can be read", "")
        metadata = {}
        for _ in range(entries):
            key = reader.text()
            metadata[key] = reader.value(*reader.take("I"))
        end = _end_of_tensors(reader, tensors, int(metadata.get(b"general.alignment") or 32))
    except struct.error:
        raise _damaged(path, "cut off within its header") from None
    except (ValueError, OverflowError) as error:
        raise _damaged(path, f"damaged: {error}") from None
    if (parts := metadata.get(b"split.count") or 1) > 1:
        what = f"one of {parts} parts, which transformers does not join"
        raise _damaged(path, what, "join them: llama-gguf-split --merge")
    if end > (size := path.stat().st_size):
        raise _damaged(path, f"cut off: it has {size:,} bytes of at least {end:,}")


def _damaged(path: Path, what: str, fix: str = "download it again") -> ModelError:
    return ModelError(Problem(Code.MODEL_DAMAGED, what, str(path), GGUF_KEY, fix))


def _end_of_tensors(reader: _Reader, tensors: int, alignment: int) -> int:
    """How many bytes the file needs for all of its tensors; a tensor of an unknown type counts as empty. The package
    gguf says how many numbers and how many bytes a block of each type has."""
    end, sizes = 0, import_module("gguf").GGML_QUANT_SIZES
    for _ in range(tensors):
        reader.text()
        (rank,) = reader.take("I")
        shape = reader.take(f"{rank}Q")
        kind, offset = reader.take("IQ")
        numbers, width = sizes.get(kind, (1, 0))
        end = max(end, offset + prod(shape) // numbers * width)
    return -(-reader.at // alignment) * alignment + end
