"""An adapter directory as it lies on the disk: opened and checked without torch, without loading weights."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from loratune.config import patterns
from loratune.errors import AdapterError, Problem
from loratune.system import records
from loratune.system.files import is_incidental_file, notebook_original, sha256

_log = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
RECORD_FILE = records.ADAPTER

_FREE = ("README.md", RECORD_FILE)  # the card is the user's to edit, and the record cannot name itself
_PLACES = ("base_model_name_or_path", "revision")  # the base may have moved: what it is, its fingerprint tells
_LARGEST_CONFIG = 16 << 20
_MOST_TENSORS, _LONGEST_NAME = 300_000, 1_000  # the largest mixtures of experts have 140,000 in all of their layers
_READ_TOO = (
    ".json", ".jinja", ".jinja2", ".j2", ".model", ".py", ".pyc", ".so", ".tiktoken", ".spm", ".bpe", ".codes",
    ".vocab", ".safetensors", ".gguf",
)  # fmt: skip
"""Endings of files that transformers, tokenizers or PEFT read, besides words and merges. Beside weights in safetensors
they read no pickle."""
_NOT_OURS = (".git", ".cache")  # what git and the hub's client keep beside the files; no library reads there
_CODE = ("auto_mapping", "megatron_config")


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter directory whose files are readable. tensors: name → shape; record: its loratune.json, or empty."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]
    record: dict[str, Any]

    @property
    def base(self) -> str:
        """The directory or hub id of the base model."""
        return str(self.config["base_model_name_or_path"])

    @property
    def base_fingerprint(self) -> str | None:
        """That of the base it was trained on, if it says so."""
        return _entry(self.record.get("fingerprints"), "base")

    def edits(self) -> list[Problem]:
        """Files that are not what they were when the adapter was published, or that were not there and would be read;
        none if it keeps no list of them."""
        if not self.record:
            return []
        listed, now = self.record["files"], manifest(self.path)
        changed = {
            name: "missing" if name not in now else "changed since the adapter was saved"
            for name, digest in listed.items()
            if now.get(name) != digest
        }
        added = {name: "was added since the adapter was saved" for name in now if _is_read(name) and name not in listed}
        added |= {name: "a link to a directory, added since the adapter was saved" for name in _links(self.path)}
        return [Problem(what, str(self.path / name)) for name, what in {**changed, **added}.items()]


def inspect(path: Path) -> AdapterFiles:
    """Open an adapter directory without loading weights. Never looks on the hub, never reads a pickle.

    Raises AdapterError: no directory, a file, no config, no weights, unreadable or not of LoRA; a link out of the
    directory, a configuration that names code, or a base by a path that leaves it; a record of a newer version.
    """
    where = str(path)
    if not path.exists():
        raise AdapterError(Problem("no such directory", where))
    if not path.is_dir():
        raise AdapterError(Problem("is a file, not an adapter directory", where))
    if not (path / CONFIG_FILE).is_file():
        raise AdapterError(Problem(f"no {CONFIG_FILE} in this directory, so it holds no adapter", where))
    if not (path / WEIGHTS_FILE).is_file():
        pickled = " (adapter_model.bin is a pickle, and pickles are not opened)" if list(path.glob("*.bin")) else ""
        raise AdapterError(Problem(f"no {WEIGHTS_FILE} in this directory{pickled}", where))
    _check_links(path)
    config = _read_config(path / CONFIG_FILE)
    return AdapterFiles(path, config, _read_shapes(path / WEIGHTS_FILE), _read_record(path / RECORD_FILE))


def manifest(directory: Path) -> dict[str, str]:
    """Name → SHA-256 of every file at any depth, but for the model card, and for where the base lies.

    Names are relative to the directory, with `/`. Records of older releases list no files below the directory itself.
    """
    found = ((path.relative_to(directory).as_posix(), path) for path in _within(directory) if path.is_file())
    return {name: _digest(path) for name, path in found if name not in _FREE and not _is_dropping(name)}


def _within(directory: Path) -> Iterator[Path]:
    """Everything below a directory, not through links, and without what git and the hub's client keep there."""
    for path in sorted(directory.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if path.name not in _NOT_OURS:
                yield from _within(path)
        else:
            yield path


def _is_dropping(name: str) -> bool:
    """Whether a file was left by an operating system or by Jupyter. No library reads it."""
    return is_incidental_file(name) or notebook_original(name) is not None


def _links(directory: Path) -> Iterator[str]:
    """Links to directories: what lies there would be read by another name than the one in the record."""
    return (path.relative_to(directory).as_posix() for path in _within(directory) if path.is_dir())


def _digest(path: Path) -> str:
    if path.name != CONFIG_FILE:
        return sha256(path)
    try:
        kept = {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key not in _PLACES}
    except (ValueError, AttributeError):
        _log.debug("%s has no digest", path, exc_info=True)
        return ""
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _check_links(directory: Path) -> None:
    inside = directory.resolve()
    for path in directory.rglob("*"):
        try:
            leads_out = not path.resolve(strict=True).is_relative_to(inside)
        except (OSError, RuntimeError):
            raise AdapterError(Problem("a link that leads nowhere", str(path), fix="take it away")) from None
        if not (path.is_file() or path.is_dir()):
            raise AdapterError(Problem("a pipe, socket or device, not a file", str(path), fix="take it away"))
        if leads_out:
            fix = f"if it is yours, copy the files: cp -rL {directory} NEW"
            raise AdapterError(Problem("leads out of the adapter directory, and is not followed", str(path), fix=fix))


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(Problem(f"not readable as JSON: {error}", str(path))) from None
    if reason := records.newer(RECORD_FILE, record):
        raise AdapterError(Problem(reason, str(path), fix="upgrade loratune"))
    fingerprints, files = (record.get(key) if isinstance(record, dict) else None for key in ("fingerprints", "files"))
    whole = isinstance(files, dict) and {CONFIG_FILE, WEIGHTS_FILE} <= files.keys()
    if not whole or not isinstance(fingerprints, dict) or not isinstance(fingerprints.get("base"), str):
        what, fix = "not the record of a run", "put back what it was; or remove it, and nothing is held against it"
        raise AdapterError(Problem(what, str(path), fix=fix))
    return dict(record)


def _is_read(name: str) -> bool:
    name = name.lower()  # as file systems may that tell no capitals apart
    return name.endswith((*_READ_TOO, "merges.txt", "vocab.txt", "dict.txt"))


def _entry(values: Any, key: str) -> str | None:
    value = values.get(key) if isinstance(values, Mapping) else None
    return value if isinstance(value, str) else None


def _read_config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _LARGEST_CONFIG:
        raise AdapterError(Problem("larger than 16 MiB, so this is not a configuration", str(path)))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(Problem(f"not readable as JSON: {error}", str(path))) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(Problem("not the configuration of a LoRA adapter", str(path)))
    if not isinstance(config.get("base_model_name_or_path"), str) or not config["base_model_name_or_path"]:
        raise AdapterError(Problem("does not name its base", str(path), "base_model_name_or_path"))
    if not isinstance(config.get("revision"), str | None):
        raise AdapterError(Problem("not the name of a revision", str(path), "revision"))
    patterns.check_values(config, str(path))
    if not config.get("target_modules") or not isinstance(config["target_modules"], list | str):
        raise AdapterError(Problem("does not say which modules it adapts", str(path), "target_modules"))
    if named := [key for key in _CODE if config.get(key)]:
        raise AdapterError(Problem("names code, and none is run from here", str(path), named[0], "set it to null"))
    base = config["base_model_name_or_path"]
    if ".." in Path(base).parts:
        what = f"{base} leads out of the directory that it starts from"
        raise AdapterError(Problem(what, str(path), "base_model_name_or_path", "write the whole path"))
    return config


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        path.open("rb").close()  # safetensors calls a file absent that it may not read
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            if len(names) > _MOST_TENSORS or any(len(name) > _LONGEST_NAME for name in names):
                raise AdapterError(Problem("has more tensors, or longer names, than any model has modules", str(path)))
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except PermissionError as error:
        raise AdapterError(Problem(f"cannot be read: {error.strerror}", str(path))) from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(Problem(f"damaged: {error}", str(path))) from None
