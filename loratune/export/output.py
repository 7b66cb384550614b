"""The directory that a command makes from an adapter: put together beside its place, published whole or not at all."""

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

PACKAGES = ("loratune", "torch", "transformers", "peft", "safetensors")


def check(named: Path, *, overwrite: bool, inputs: Mapping[str, Path]) -> RunDirectory:
    """Check that a directory may be written. Nothing is changed.

    Args:
        named: The directory as the user named it.
        overwrite: Whether an earlier export there may be replaced.
        inputs: What the command reads, by option. None of it is ever replaced.

    Raises:
        ConfigError, LockedError, ResourceError: See `output_dir.check`.
    """
    for name, path in inputs.items():
        if path.is_dir() and contains(path, named):
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
        check_free_space(directory.partial, size)
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
    """The files of an adapter directory that its tokenizer consists of."""
    other = {adapter_files.CONFIG_FILE, adapter_files.WEIGHTS_FILE, records.ADAPTER, "README.md", "run.yaml"}
    names = adapter_files.manifest(source.files.path)
    return [source.files.path / name for name in names if name not in other]
