"""An adapter directory: its files, verified against their record, and its settings for base, rows and prompts."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loratune import config
from loratune.codes import Code
from loratune.config import DataSection, ModelSection, RunConfig, Source
from loratune.config.yaml_files import kind_of
from loratune.errors import AdapterError, ConfigError, Problem
from loratune.events import note
from loratune.lora import adapter_files
from loratune.lora.adapter_files import CONFIG_FILE, RECORD_FILE, WEIGHTS_FILE, AdapterFiles
from loratune.system import release
from loratune.system.directories import ROW_HASHES, is_adapter_file
from loratune.system.files import versioned, write_json
from loratune.text import beginning

RUN_FILE, TOKENIZER_FILE = "run.yaml", "tokenizer_config.json"
"""The resolved config of the run that made the adapter, and the file that every tokenizer has."""
SYSTEM = "system"
"""The record's key for the system message that all training rows had."""
MOST_SYSTEM = 1 << 20
"""The most characters of a system message that is recorded and used."""

_PACKAGES = ("loratune", "torch", "transformers", "peft", "safetensors")
"""Packages whose versions are in the record of an export."""
_NOT_TOKENIZER = frozenset({
    CONFIG_FILE, WEIGHTS_FILE, "adapter_model.bin", "training_args.bin", RECORD_FILE, "README.md", RUN_FILE,
    ROW_HASHES,
})  # fmt: skip
_VOCABULARIES = (".tiktoken", ".model", ".spm", ".bpe", ".codes", ".vocab")
"""Suffixes of vocabulary files of tokenizers with custom code."""


@dataclass(frozen=True)
class AdapterDirectory:
    """An adapter directory, and the settings of its training.

    Attributes:
        files: Its files.
        base: The base, and how it was loaded.
        data: The data settings of training.
        chat: Whether the training rows were rendered with the chat template.
        run: The recorded config; None if loratune did not write the adapter.
        forced: Whether edited files and another base are accepted.
        system: The system message that all training rows had; empty if there was none.
    """

    files: AdapterFiles
    base: ModelSection
    data: DataSection
    chat: bool
    run: RunConfig | None
    forced: bool = False
    system: str = ""

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        forced: bool = False,
        assignments: Sequence[str] = (),
        fix: str = "use it all the same with `force=True`",
    ) -> "AdapterDirectory":
        """Open and verify an adapter directory. The trust_remote_code setting of its run.yaml is ignored.

        Args:
            path: The directory.
            forced: Log files that have changed since they were saved, instead of raising an error.
            assignments: Assignments to keys of its data section, as for `config.load`.
            fix: What to do about changed files, for the message.

        Raises:
            AdapterError: See `adapter_files.inspect`; files have changed; run.yaml is not a valid config; the recorded
                system message is not text.
            ConfigError: See `config.load`.
        """
        files = adapter_files.inspect(path)
        edits = files.edits()
        if not files.record.get("files"):
            note(f"{path}: keeps no record of its files and its base, so neither was verified")
        if edits and not forced:
            raise AdapterError([replace(edit, fix=fix) for edit in edits])
        for edit in edits:
            note(str(edit))
        base = _base(files)
        if RUN_FILE not in files.states:
            if assignments:
                what, fix = "the adapter has no run.yaml whose keys could be set", "leave out `overrides=...`"
                raise ConfigError(Problem(Code.USAGE_CONFLICT, what, str(path), "overrides", fix))
            base = base.model_copy(update={"gguf_file": _recorded_gguf(files)})
            return cls(files, base, DataSection(train=Source(path="unknown")), False, None, forced)
        with files.reading():
            run = _recorded_run(path / RUN_FILE, assignments)
        loading = run.model.model_dump(include={"gguf_file", "dtype", "quantization", "attn_implementation"})
        chat = files.record.get("chat") is True
        system = _recorded_system(files) if chat else ""
        return cls(files, base.model_copy(update=loading), run.data, chat, run, forced, system)

    @property
    def path(self) -> Path:
        """The directory."""
        return self.files.path

    @property
    def has_tokenizer(self) -> bool:
        """Whether it holds the tokenizer of its training."""
        return TOKENIZER_FILE in self.files.states

    def note_system(self) -> None:
        """Emit a line on the system message, for an output whose programs do not know it."""
        if self.system:
            what = f"all training rows had the system message {beginning(self.system)}"
            note(f"{what}; requests to the result need it too")

    def copy_tokenizer(self, target: Path, *others: str) -> None:
        """Copy the files of the tokenizer to another directory, and the other named files that exist.

        No other file may be copied to a model directory: a foreign `config.json` or weights would replace the model's.
        """
        with self.files.reading() as path:
            has_code = self.has_tokenizer and b"auto_map" in (path / TOKENIZER_FILE).read_bytes()
            names = [name for name in self.files.states if _is_of_tokenizer(name, has_code) or name in others]
            for name in names:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path / name, target / name)

    def write_record(self, staging: Path, kind: str, details: Mapping[str, Any]) -> None:
        """Write the `loratune.json` of an export of this adapter, with the kind of the export and its files.

        Args:
            staging: The directory of the export, complete except for this file.
            kind: The kind of the export, such as "merged model".
            details: The results of its comparison, and other fields specific to the kind.
        """
        with self.files.reading() as path:
            own = adapter_files.manifest(path)
        record = {
            "kind": kind,
            "versions": release.versions(_PACKAGES),
            "base": self.base.model_dump(include={"name_or_path", "revision", "gguf_file"}),
            "fingerprints": {"base": self.files.base_fingerprint},
            "adapter": own,
            **details,
            "files": adapter_files.manifest(staging),
        }
        write_json(staging / RECORD_FILE, versioned(record))


def _base(files: AdapterFiles) -> ModelSection:
    """The base named in adapter_config.json."""
    try:
        return ModelSection(name_or_path=files.base, revision=files.config.get("revision"))
    except ValidationError:
        where, key = str(files.path / CONFIG_FILE), "base_model_name_or_path"
        raise AdapterError(Problem(Code.ADAPTER_INVALID, "is not the name of a base model", where, key)) from None


def _recorded_run(path: Path, assignments: Sequence[str]) -> RunConfig:
    """The config of the run that made an adapter, with assignments to keys of its data section applied."""
    try:
        run = config.load(path, finished=True)
    except ConfigError as error:
        raise AdapterError(error.problems) from None
    if other := [assignment for assignment in assignments if not assignment.startswith("data.")]:
        what, fix = f"`{other[0]}` was decided by training", "set keys of data.* only"
        raise ConfigError(Problem(Code.USAGE_CONFLICT, what, key="overrides", fix=fix))
    return config.load(path, assignments, finished=True) if assignments else run


def _recorded_gguf(files: AdapterFiles) -> str | None:
    """The GGUF file of the base that the record of an adapter names; None without a record or a GGUF file."""
    if not files.record:
        return None
    where = str(files.path / RECORD_FILE)
    if not isinstance(base := files.record.get("base"), dict):
        raise AdapterError(Problem(Code.ADAPTER_INVALID, "does not say what the base model is", where, "base"))
    gguf = base.get("gguf_file")
    if gguf is not None and (not isinstance(gguf, str) or Path(gguf).is_absolute() or ".." in Path(gguf).parts):
        what = f"is not the name of a file: {gguf!r}"
        raise AdapterError(Problem(Code.ADAPTER_INVALID, what, where, "base.gguf_file"))
    return gguf


def _recorded_system(files: AdapterFiles) -> str:
    """The recorded system message; empty if there is none. Raises AdapterError: it is not text, or too long."""
    system = files.record.get(SYSTEM)
    if system is None:
        return ""
    what = ""
    if not isinstance(system, str):
        what = f"must be text, got {kind_of(system)}"
    elif len(system) > MOST_SYSTEM:
        what = f"has {len(system):,} characters, and at most {MOST_SYSTEM:,} are used"
    elif any("\ud800" <= character <= "\udfff" for character in system):
        what = "holds a lone surrogate, which is not a character"
    if what:
        fix = "correct it, or remove it"
        raise AdapterError(Problem(Code.ADAPTER_INVALID, what, str(files.path / RECORD_FILE), SYSTEM, fix))
    return str(system)


def _is_of_tokenizer(name: str, has_code: bool) -> bool:
    """Whether a file of this name belongs to a tokenizer. has_code: whether the tokenizer has custom code."""
    if name in _NOT_TOKENIZER:
        return False
    is_vocabulary = "/" not in name and name.endswith((*_VOCABULARIES, *((".py",) if has_code else ())))
    return is_vocabulary or is_adapter_file(name)
