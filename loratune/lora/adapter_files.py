"""An adapter directory on the disk: opened and checked without torch, and without loading weights."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from loratune.codes import Code
from loratune.errors import AdapterError, Problem
from loratune.events import progress
from loratune.lora.adapter_config import CONFIG_FILE as CONFIG_FILE
from loratune.lora.adapter_config import AdapterConfig, check_values
from loratune.system.directories import RECORD
from loratune.system.files import MAX_TEXT_BYTES, beside, is_incidental_file, newer, sha256, state
from loratune.text import shell_word

_log = logging.getLogger(__name__)

WEIGHTS_FILE = "adapter_model.safetensors"
RECORD_FILE = RECORD

_UNLISTED = ("README.md", RECORD_FILE)
"""Files without a digest: users may edit the card, and the record cannot hold its own digest."""
_BASE_KEYS = ("base_model_name_or_path", "revision")
"""Keys whose change does not count as an edit: the base may be moved; its fingerprint identifies it."""
_READ_SUFFIXES = (
    ".json", ".jinja", ".jinja2", ".j2", ".model", ".py", ".pyc", ".so", ".tiktoken", ".spm", ".bpe", ".codes",
    ".vocab", ".safetensors", ".gguf",
)  # fmt: skip
"""Suffixes of files that transformers, tokenizers or PEFT read, apart from vocabularies and merges. If there are
safetensors weights, they read no pickles."""
_IGNORED_DIRECTORIES = (".git", ".cache", ".ipynb_checkpoints")  # no library reads there
_CODE = ("auto_mapping", "megatron_config")

_CONVERT = "save it with PEFT's path_initial_model_for_weight_conversion, where it was trained"
_NOT_RECORDED = {
    "pissa_niter_": ("subtracts a part of the base, by random numbers that differ at each load", _CONVERT),
    "corda": ("subtracts a part of the base that depends on data, and does not record it", _CONVERT),
    "lora_ga": ("subtracts a part of the base that depends on gradients, and does not record it", _CONVERT),
    "loftq": ("quantizes the base, and does not record the result", "save that base too, and set this to true"),
    "": ("may change the base in a way that this release does not know", "upgrade loratune"),
}
"""Prefix of another value → why the files of such an adapter are not sufficient, and the fix."""


@dataclass(frozen=True)
class AdapterFiles(AdapterConfig):
    """An adapter directory whose files are readable.

    Attributes:
        record: Content of loratune.json; empty if there is none.
        copies: File and name → shape of tensors of the base, which PEFT saves together with LoRA on embeddings and on
            the output layer. They must equal the base's, see `tensors.check_copies`, and are otherwise ignored.
        states: Name → state of each file of the directory when it was opened, see `reading`.
    """

    record: dict[str, Any]
    copies: dict[tuple[Path, str], tuple[int, ...]] = field(default_factory=dict)
    states: "_States" = field(default_factory=dict, repr=False)

    @contextmanager
    def reading(self) -> Iterator[Path]:
        """Read files of the directory, which it yields, inside: whatever is read later than it was opened.

        Raises:
            AdapterError: A file is not the one that was opened, so what was read, or the error inside, is of another
                adapter: its directory was replaced, changed or removed since.
        """
        with _unchanged(self.path, self.states):
            yield self.path

    @property
    def base_fingerprint(self) -> str | None:
        """Fingerprint of the base that the adapter was trained on, if it is recorded."""
        fingerprints = self.record.get("fingerprints")
        value = fingerprints.get("base") if isinstance(fingerprints, Mapping) else None
        return value if isinstance(value, str) else None

    @property
    def parameters(self) -> dict[str, str]:
        """Path of A and B → the parameter that they adapt, if it is known; see `parameters_of`.

        PEFT assigns them by the order in which it wraps, which only the record knows (`target_parameters`).
        """
        recorded = self.record.get("target_parameters")
        known = recorded if isinstance(recorded, Mapping) else {}
        found = {}
        for path in self.ranks:
            names = self.parameters_of(path)
            if len(names) == 1 or known.get(path) in names:
                found[path] = names[0] if len(names) == 1 else known[path]
        return found

    @property
    def digest(self) -> str:
        """SHA-256 of the weights and of the configuration without the base's location: identifies the adapter."""
        with self.reading() as path:
            digests = [_digest(path / name) for name in (CONFIG_FILE, WEIGHTS_FILE)]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def edits(self) -> list[Problem]:
        """A problem for each file that has changed since the adapter was saved, or was added and would be read.

        Empty if there is no record of the files.
        """
        if not self.record:
            return []
        with self.reading() as path:
            digests, links = manifest(path), [one for one in _walk(path) if one.is_dir()]  # it yields no other ones
        recorded, since = self.record["files"], "since the adapter was saved"
        edits = {
            name: f"changed {since}" if name in digests else "missing"
            for name, digest in recorded.items()
            if digests.get(name) != digest
        }
        edits |= {name: f"was added {since}" for name in digests if is_read(name) and name not in recorded}
        edits |= {link.relative_to(path).as_posix(): f"a link to a directory, added {since}" for link in links}
        return [Problem(Code.ADAPTER_CHANGED, what, str(self.path / name)) for name, what in edits.items()]


def inspect(path: Path) -> AdapterFiles:
    """Open an adapter directory without loading weights. Never accesses the hub, never reads a pickle.

    Raises:
        AdapterError: The directory, its config or its weights are missing; files are unreadable or not LoRA; a link
            leads out of the directory; the configuration names code, or a base by a path that leads out of the
            directory, or an initialization that PEFT cannot reproduce; the record is of a newer version.
    """
    if what := _missing(path):
        fix = beside(path, lambda one: (one / CONFIG_FILE).is_file()) or "name a directory that `train` wrote"
        raise AdapterError(Problem(Code.ADAPTER_NOT_FOUND, what, str(path), fix=fix))
    with _unchanged(path, states := _states(path)):
        _check_links(path)
        config = _read_config(path / CONFIG_FILE)
        shapes, file = _read_shapes(path / WEIGHTS_FILE), path / WEIGHTS_FILE
        record = _read_record(path / RECORD_FILE)
    copies = {(file, name): shapes.pop(name) for name in [*shapes] if _is_copy(name, config)}
    files = AdapterFiles(path, config, shapes, record, copies, states)
    if not files.is_reproducible:
        init = str(files.init)
        reason, fix = next(found for start, found in _NOT_RECORDED.items() if init.startswith(start))
        what = f"what was trained cannot be computed from its files: with {init}, PEFT {reason}"
        raise AdapterError(Problem(Code.ADAPTER_NOT_REPRODUCIBLE, what, files.where, "init_lora_weights", fix))
    return files


_States = Mapping[str, tuple[int, ...] | None]
"""Name → state of a file, see `files.state`."""


def _states(directory: Path) -> _States:
    """The present states of the files below a directory, except of those that are no part of an adapter, and of its
    card; empty if it is gone."""
    try:
        names = {path.relative_to(directory).as_posix(): path for path in _walk(directory)}
    except OSError:
        return {}
    listed = ((name, path) for name, path in names.items() if name != "README.md" and not is_incidental_file(name))
    return {name: state(path) for name, path in listed if path.is_file()}


@contextmanager
def _unchanged(directory: Path, states: _States) -> Iterator[None]:
    """Raises AdapterError: the files do not have these states, before or after what is done inside. It replaces an
    error inside."""
    _check_states(directory, states)  # not all that may be in a file's place can be read, such as a FIFO
    try:
        yield
    except Exception:
        _check_states(directory, states)
        raise
    _check_states(directory, states)


def _check_states(directory: Path, before: _States) -> None:
    now = _states(directory)
    changed = [name for name, known in before.items() if known != now.get(name)]
    changed += [name for name in now if name not in before and is_read(name)]
    if changed:
        what = "has changed since the adapter was opened" if now else "is gone since the adapter was opened"
        where = directory / changed[0] if now else directory
        raise AdapterError(Problem(Code.ADAPTER_CHANGED, what, str(where), fix="open it again"))


def _missing(path: Path) -> str:
    """What is missing for an adapter directory; empty if nothing is."""
    if not path.is_dir():
        return "is a file, not an adapter directory" if path.exists() else "no such directory"
    missing = next((name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (path / name).is_file()), "")
    has_pickle = missing == WEIGHTS_FILE and any(path.glob("*.bin"))
    pickle = " (adapter_model.bin is a pickle, and pickles are not opened)" if has_pickle else ""
    return f"no {missing} in this directory, so it holds no adapter{pickle}" if missing else ""


@progress("hashing the files")
def manifest(directory: Path) -> dict[str, str]:
    """Name → SHA-256 of every file at any depth, except the model card. The base's location is not hashed.

    Names are relative to the directory, with `/`. Records of older releases list only files directly in the directory.
    """
    files = {path.relative_to(directory).as_posix(): path for path in _walk(directory) if path.is_file()}
    return {
        name: _digest(path) for name, path in files.items() if name not in _UNLISTED and not is_incidental_file(name)
    }


def _walk(directory: Path) -> Iterator[Path]:
    """Files and links below a directory, without following links, and without those of git and the hub's client."""
    for path in sorted(directory.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if path.name not in _IGNORED_DIRECTORIES:
                yield from _walk(path)
        else:
            yield path


def _digest(path: Path) -> str:
    if path.name != CONFIG_FILE:
        return sha256(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        values = {key: value for key, value in config.items() if key not in _BASE_KEYS}
    except (ValueError, AttributeError):
        _log.debug("%s has no digest", path, exc_info=True)
        return ""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def is_read(name: str) -> bool:
    """Whether transformers, tokenizers or PEFT would read a file of this name in an adapter directory."""
    name = name.lower()  # some file systems ignore case
    return name.endswith((*_READ_SUFFIXES, "merges.txt", "vocab.txt", "dict.txt"))


def _check_links(directory: Path) -> None:
    root, copy = directory.resolve(), f"cp -rL -- {shell_word(str(directory))} NEW"
    for path in directory.rglob("*"):
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(root):
            what, fix = "leads out of the adapter directory", f"if it is yours, copy the files: {copy}"
        elif not (target.is_file() or target.is_dir()):
            what, fix = "a broken link, a pipe, a socket or a device, not a file", "remove it"
        else:
            continue
        raise AdapterError(Problem(Code.ADAPTER_UNSAFE, what, str(path), fix=fix))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if (size := path.stat().st_size) > MAX_TEXT_BYTES:
            raise ValueError(f"it has {size:,} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(Problem(Code.ADAPTER_INVALID, f"not readable as JSON: {error}", str(path))) from None
    return values if isinstance(values, dict) else {}


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    record = _read_json(path)
    if reason := newer(record):
        raise AdapterError(Problem(Code.ADAPTER_NEWER_RECORD, reason, str(path), fix="upgrade loratune"))
    fingerprints, files = record.get("fingerprints"), record.get("files")
    lists_files = isinstance(files, dict) and {CONFIG_FILE, WEIGHTS_FILE} <= files.keys()
    if not lists_files or not isinstance(fingerprints, dict) or not isinstance(fingerprints.get("base"), str):
        fix = "restore the file; or remove it, and the adapter is used without verification"
        raise AdapterError(Problem(Code.ADAPTER_INVALID, "not the record of a run", str(path), fix=fix))
    return record


def _read_config(path: Path) -> dict[str, Any]:
    where, key, config = str(path), "base_model_name_or_path", _read_json(path)
    if config.get("peft_type") != "LORA":
        raise AdapterError(Problem(Code.ADAPTER_INVALID, "not the configuration of a LoRA adapter", where))
    check_values(config, where)
    if keys := [key for key in _CODE if config.get(key)]:
        what = "names code, and code of an adapter is not run"
        raise AdapterError(Problem(Code.ADAPTER_UNSAFE, what, where, keys[0], "set it to null"))
    if ".." in Path(config[key]).parts:
        what = f"{config[key]} leads out of the directory that it starts from"
        raise AdapterError(Problem(Code.ADAPTER_UNSAFE, what, where, key, "write the whole path"))
    return config


def _is_copy(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is a copy from the base: neither a LoRA factor nor fully trained."""
    path, _, kind = name.rpartition(".")
    if ".lora_" in name or kind not in ("weight", "bias"):
        return False
    is_trained = kind == "bias" and config.get("bias") not in (None, "none")
    return not is_trained and (path.endswith(".base_layer") or not config.get("modules_to_save"))


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    what = "holds no tensors"
    try:
        path.open("rb").close()  # safetensors reports a file that may not be read as absent
        with safe_open(path, framework="np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        shapes, what = {}, f"damaged, or cannot be read: {error}"
    if not shapes:
        raise AdapterError(Problem(Code.ADAPTER_INVALID, what, str(path)))
    return shapes
