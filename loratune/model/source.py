"""The source of a base model, a local directory or a repository of the hub. This module imports neither torch nor
transformers."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

from loratune.codes import Code
from loratune.config import ModelSection
from loratune.errors import ModelError, Problem
from loratune.system.directories import TEMPLATES
from loratune.system.environment import cache_fix
from loratune.system.files import beside

KEY = "model.name_or_path"
GGUF_KEY = "model.gguf_file"
QUANTIZATION_KEY = "model.quantization"


@dataclass(frozen=True)
class ModelSource:
    """A model that exists, named as transformers expects it.

    Attributes:
        name: The absolute path of a directory, or a hub id.
        gguf_file: The absolute path of a GGUF file.
        from_hub: Whether the GGUF file was downloaded; other files next to it in the cache are then ignored.
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
    if gguf_file is not None and (PurePath(gguf_file).is_absolute() or ".." in PurePath(gguf_file).parts):
        fix = "name the directory in model.name_or_path, and only the file here"
        raise ModelError(Problem(Code.MODEL_NOT_FOUND, "leads out of the model directory", gguf_file, GGUF_KEY, fix))
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
        if base := json_object(path / "adapter_config.json").get("base_model_name_or_path"):
            what, fix = "is an adapter, not a model", f"name its base: {base}; lora.start_from continues an adapter"
    elif path.exists():
        what = "is a file, not a model directory"
        fix = f"name its directory, and set {GGUF_KEY}: {path.name}" if path.suffix == ".gguf" else "name its directory"
    elif name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        what, fix = "no such directory", beside(path, holds_model) or "check the path"
    else:
        return False
    raise ModelError(Problem(Code.MODEL_NOT_FOUND, what, name_or_path, key, fix))


def holds_model(path: Path) -> bool:
    """Whether a directory holds a model, by its config.json."""
    return (path / "config.json").is_file()


def local_or_hub(name_or_path: str) -> str:
    """The name by which a model can be found from anywhere: an absolute path for a directory, else the hub id."""
    path = Path(name_or_path).expanduser()
    return str(path.absolute()) if path.is_dir() else name_or_path


def cached_directory(section: ModelSection) -> Path | None:
    """The directory of a model, on this machine or in the cache of the hub; None if it is not in the cache."""
    directory, file = Path(local_or_hub(section.name_or_path)), section.gguf_file
    if directory.is_dir():
        return directory
    try:
        cached = try_to_load_from_cache(section.name_or_path, file or "config.json", revision=section.revision)
    except errors.HFValidationError:  # a path that does not exist
        return None
    return Path(cached).parents[len(Path(file).parts) - 1 if file else 0] if isinstance(cached, str) else None


def files_of(section: ModelSection) -> list[Path]:
    """The files on this machine from which a base is loaded: of its weights, and those that decide what it computes.

    Files of weights may have any names and be in any directory: an index names them, and `transformers_weights` in
    config.json may name the index, or a single file.
    """
    directory = cached_directory(section)
    if directory is None:
        return []
    chosen = section.gguf_file or str(json_object(directory / "config.json").get("transformers_weights"))
    names = ["config.json", "adapter_config.json", chosen]
    if section.gguf_file is None:
        names += [str(path) for end in ("safetensors", "bin", "index.json") for path in directory.glob(f"*.{end}")]
        for index in [name for name in names if name.endswith(".index.json")]:
            names += shards(directory / index)
    return sorted(path for path in {directory / name for name in names} if os.path.isfile(path))


def shards(index: Path) -> list[str]:
    """The files that an index names, relative to the directory of the model; none if it cannot be read."""
    names = json_object(index).get("weight_map")
    return sorted(set(map(str, names.values()))) if isinstance(names, dict) else []


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if it cannot be read, or holds something else."""
    with suppress(OSError, ValueError, RecursionError):
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    return {}


def chat_templates(section: ModelSection) -> list[str]:
    """The chat templates of a model's tokenizer, as far as its files are on this machine; not those in a GGUF file."""
    if (directory := cached_directory(section)) is None:
        return []
    files = [directory / "chat_template.jinja", *sorted((directory / TEMPLATES).glob("*.jinja"))]
    try:
        if found := [file.read_text(encoding="utf-8") for file in files if file.is_file()]:
            return found
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        listed = settings.get("chat_template") or []
        return [listed] if isinstance(listed, str) else [str(one["template"]) for one in listed]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # which loading the tokenizer reports
        return []


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
    fix = (perhaps_path and beside(Path(name), holds_model)) or fix
    raise ModelError(Problem(code, what, name, key, fix))


def summary(error: BaseException) -> str:
    """The first line of an error, and the next where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, KeyError):
        return f"unknown: {lines[0]}"
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text.partition(". ")[0]


# --- GGUF files: whether a file is one, and whether it is complete

LFS_START = b"version https://git-lfs"
"""The beginning of a Git LFS pointer file."""

_checked: set[tuple[int, ...]] = set()
"""Device, inode, size and time of change of the files that this process has found to be whole."""


def check_gguf(path: Path) -> None:
    """Check that transformers will be able to read this file, which is read once as long as it does not change.

    Raises:
        ModelError: The file does not exist, is a Git LFS pointer, is not GGUF or of a version that transformers does
            not read, is one part of several, or is cut off.
    """
    where = str(path)
    if not path.is_file():
        files = sorted(file.name for file in path.parent.glob("*.gguf"))
        fix = f"there is {', '.join(files[:3])}" if files else "no GGUF file is in that directory"
        raise ModelError(Problem(Code.MODEL_NOT_FOUND, "no such file", where, GGUF_KEY, fix))
    now = path.stat()
    version = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns)
    if version in _checked:
        return
    with path.open("rb") as file:
        if file.read(len(LFS_START)) == LFS_START:
            raise ModelError(lfs_pointer(path))
    try:
        split = import_module("gguf").GGUFReader(path).get_field("split.count")
        parts = 1 if split is None else int(split.parts[-1][0])
    except (ValueError, KeyError, IndexError, OverflowError, RecursionError) as error:
        what, fix = f"damaged, cut off or of another format: {summary(error)}", "download it again"
        raise ModelError(Problem(Code.MODEL_DAMAGED, what, where, GGUF_KEY, fix)) from None
    if parts > 1:
        what, fix = f"one of {parts} parts, which transformers does not join", "join them: llama-gguf-split --merge"
        raise ModelError(Problem(Code.MODEL_DAMAGED, what, where, GGUF_KEY, fix))
    _checked.add(version)


def lfs_pointer(path: Path) -> Problem:
    """The problem of a file of weights that is only a pointer of Git LFS."""
    what, fix = "a Git LFS pointer, not the weights", "fetch them with `git lfs pull`"
    return Problem(Code.MODEL_DAMAGED, what, str(path), fix=fix)
