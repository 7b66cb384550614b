"""The directory that a command makes from an adapter: put together beside its place, published whole or not at all."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loratune.codes import Code
from loratune.errors import ConfigError, Problem
from loratune.lora import adapter_files
from loratune.system import records
from loratune.system.files import check_free_space, explain_full_disk, write_json
from loratune.training import output_dir, run_dir
from loratune.training.overwrite import EXPORT, contains
from loratune.training.preflight import AdapterInfo
from loratune.training.run_dir import RunDirectory
from loratune.training.run_dir_files import is_adapter_file

PACKAGES = ("loratune", "torch", "transformers", "peft", "safetensors")
_OTHER_FILES = frozenset({
    adapter_files.CONFIG_FILE, adapter_files.WEIGHTS_FILE, "adapter_model.bin", "training_args.bin", records.ADAPTER,
    "README.md", "run.yaml", records.ROW_HASHES,
})  # fmt: skip
"""Files of an adapter that are none of its tokenizer's."""
_VOCABULARIES = (".tiktoken", ".model", ".spm", ".bpe", ".codes", ".vocab")
"""Suffixes of vocabularies that tokenizers with code of their own read."""


def check(named: Path, *, overwrite: bool, inputs: Mapping[str, Path]) -> RunDirectory:
    """Check that a directory may be written. Nothing is changed.

    Args:
        named: The directory as the user named it.
        overwrite: Whether an earlier export there may be replaced.
        inputs: What the command reads, by option. None of it is ever replaced.

    Raises:
        ConfigError, LockedError, ResourceError: See `output_dir.check`.
    """
    place = named.expanduser()
    for name, path in inputs.items():
        if path.is_dir() and contains(path, place):
            what, fix = f"is, or lies in, what the command reads ({name}: {path})", "choose another directory"
            raise ConfigError(Problem(Code.EXPORT_INSIDE_INPUT, what, str(named), EXPORT.key, fix))
    read = [(name, str(path)) for name, path in inputs.items()]
    return output_dir.check(str(named), overwrite=overwrite, inputs=read, kind=EXPORT)


@contextmanager
def staged(directory: RunDirectory, size: int, what: str) -> Iterator[Path]:
    """A new directory beside the output. It takes the output's place at the end, unless there is an error.

    Whatever it holds is removed on an error. A killed process leaves it, and the next one removes it.

    Args:
        directory: The output, see `check`.
        size: About how many bytes will be written.
        what: What is written, for a message about a full disk.

    Raises:
        ConfigError, LockedError: Something has come to the output in the meantime; another process writes there.
        ResourceError: The disk is too small, or full.
    """
    fix = "make room, and start again"
    with run_dir.locked(directory), explain_full_disk(what, size, directory.partial, fix):
        directory.prepare(resume=False)
        check_free_space(directory.partial, size, what, directory.kind.key)
        directory.create_staging()
        yield directory.staging
        directory.publish()


def write_record(staging: Path, kind: str, source: AdapterInfo, details: Mapping[str, Any]) -> None:
    """Write `loratune.json`, which says what the directory is and lists its files.

    Args:
        staging: The directory, complete except for this file.
        kind: What it is, such as "merged model".
        source: The adapter that it was made from.
        details: What was compared, and how it came out; and whatever else belongs to the kind.
    """
    base = source.base.model_dump(include={"name_or_path", "revision", "gguf_file"})
    record = {
        records.KEY: records.VERSIONS[records.ADAPTER],
        "kind": kind,
        "versions": {name: version(name) for name in PACKAGES},
        "base": base,
        "fingerprints": {"base": source.files.base_fingerprint},
        "adapter": adapter_files.manifest(source.files.path),
        **details,
    }
    write_json(staging / records.ADAPTER, record | {"files": adapter_files.manifest(staging)})


def tokenizer_files(source: AdapterInfo) -> Sequence[Path]:
    """The files of an adapter directory that its tokenizer consists of.

    Whatever else is there stays there: a stranger's `config.json` or weights would take the place of the model's own.
    """
    path = source.files.path
    settings = path / "tokenizer_config.json"
    has_code = settings.is_file() and b"auto_map" in settings.read_bytes()
    return [path / name for name in adapter_files.manifest(path) if _is_of_tokenizer(name, has_code)]


def copy_tokenizer(source: AdapterInfo, target: Path, *others: str) -> None:
    """Copy the files of an adapter's tokenizer to another directory. others: further files, where there are any."""
    path = source.files.path
    for file in (*tokenizer_files(source), *(path / name for name in others if (path / name).is_file())):
        place = target / file.relative_to(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


def _is_of_tokenizer(name: str, has_code: bool) -> bool:
    """Whether a file of this name belongs to a tokenizer. has_code: whether that comes with code of its own."""
    if name in _OTHER_FILES:
        return False
    is_vocabulary = "/" not in name and name.endswith((*_VOCABULARIES, *((".py",) if has_code else ())))
    return is_vocabulary or is_adapter_file(name)
