"""Copies an adapter directory without local paths, for others to download.

Local paths reveal names, and do not exist on other machines. The card, run.yaml, loratune.json, adapter_config.json and
tokenizer_config.json contain paths; each is replaced by its file name, the path of the base by its hub id.
`config.with_paths` rewrites run.yaml; in the other files, every absolute path that is a value in one of them is
replaced wherever it occurs. Weights, vocabularies and chat templates are copied unchanged.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from loratune import config
from loratune.adapter.directory import SYSTEM
from loratune.codes import Code
from loratune.config import RunConfig
from loratune.errors import AdapterError, ConfigError, Problem
from loratune.lora import adapter_files
from loratune.lora.adapter_files import CONFIG_FILE, RECORD_FILE, AdapterFiles
from loratune.system import directories
from loratune.system.directories import ROW_HASHES
from loratune.system.files import is_incidental_file, read_text, sha256, write_json
from loratune.text import markdown, one_line, printable

_log = logging.getLogger(__name__)

CARD, RUN, TOKENIZER = "README.md", "run.yaml", "tokenizer_config.json"
_BASE = "model.name_or_path"
PROMPTS = "prompts"
"""The record's key for prompts of training rows. A published copy contains neither these nor the row hashes, which
would reveal whether a given row was trained on."""
_PICKLES = ("adapter_model.bin", "training_args.bin")
_HOMES = r"/home/[^/\s\"'`]+|/Users/[^/\s\"'`]+|/root"
_BELOW = r"(?:/[^\s\"'`<>|()\[\]{},;]*[^\s\"'`<>|()\[\]{},;.:!?/])?"
_PATH = re.compile(r"(?:~|/[^\s/]+)(?:/[^/]+)+/?")
_START, _END = r"(?<![\w.~-])", r"(?![\w-])"  # so that /out is found in neither w/out nor /output


@dataclass(frozen=True)
class PortableCopy:
    """A copy of an adapter directory for other machines.

    Attributes:
        path: Its directory.
        base: The id of the base on the hub.
        files: Name → SHA-256 of each of its files.
        changed: The files in which paths were replaced.
        left_out: Entries of the original directory that do not belong to the adapter; directories end with `/`.
    """

    path: Path
    base: str
    files: Mapping[str, str]
    changed: tuple[str, ...]
    left_out: tuple[str, ...]


def is_local(name_or_path: str) -> bool:
    """Whether this is a path rather than a repository id."""
    return name_or_path.startswith(("/", "~", ".")) or Path(name_or_path).is_dir() or name_or_path.count("/") > 1


def portable(run: RunConfig, base: str) -> RunConfig:
    """A config with file names instead of paths. base: the hub id of the base."""

    def name(path: str) -> str:
        last = Path(path).name  # a directory name gets the prefix `./`, as it could be mistaken for a repository
        is_plain = Path(last).suffix or "*" in last
        return path if not is_local(path) else last if is_plain else f"./{last}"

    return config.with_paths(run, lambda key, path: base if key == _BASE else name(path))


def copy(adapter: AdapterFiles, target: Path, repository: str, base: str, *, with_system: bool = False) -> PortableCopy:
    """Copy the files of an adapter to a new directory, without local paths, prompts and row hashes.

    Digests in the record are those of the new files.

    Args:
        adapter: The adapter, whose files match its record.
        target: The directory to create.
        repository: The name by which others will load it.
        base: The id of the base on the hub.
        with_system: Whether the copy contains the system message of the training rows, which may be confidential.

    Raises:
        AdapterError: See `AdapterFiles.reading`; a file is not valid.
        ConfigError: A file still contains a path, in a form that is not recognized.
    """
    with adapter.reading() as path:
        names, left_out = _contents(adapter)
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path / name, target / name)
    before = {name: sha256(target / name) for name in names}
    left_out_keys = {PROMPTS} if with_system else {PROMPTS, SYSTEM}
    record = {key: value for key, value in adapter.record.items() if key not in left_out_keys}
    _rewrite(replace(adapter, record=record), target, repository, base)
    files = {name: sha256(target / name) for name in names}
    changed = tuple(name for name in names if files[name] != before[name])
    return PortableCopy(target, base, files, changed, left_out)


def _contents(adapter: AdapterFiles) -> tuple[list[str], tuple[str, ...]]:
    """The files of an adapter, and the other entries of its directory."""
    directory = adapter.path
    if adapter.record:
        names = {*adapter.record["files"], RECORD_FILE, CARD}
    else:
        names = set(directories.scan_adapter(directory).files) - {*_PICKLES}
    names = {name for name in names if (directory / name).is_file() and not is_incidental_file(name)}
    left_out = directories.scan(directory, lambda name: name in names).foreign
    return sorted(names - {ROW_HASHES}), tuple(left_out)


def _rewrite(adapter: AdapterFiles, target: Path, repository: str, base: str) -> None:
    """Replace the paths in the files of a copy; the record is last, as it contains the digests of the others.

    adapter: The adapter, with the record that is to be published.
    """
    run: RunConfig | None = _read(adapter, target, RUN, lambda text: config.parse(text, RUN))
    tokenizer, card = _read(adapter, target, TOKENIZER, json.loads), _read(adapter, target, CARD, str)
    record = adapter.record
    paths = _Paths(adapter, run, [record, adapter.config, tokenizer], repository, base)
    write_json(target / CONFIG_FILE, paths.replaced(adapter.config) | {"base_model_name_or_path": base})
    if run is not None:
        (target / RUN).write_text(config.dump(portable(run, base)), encoding="utf-8")
    if (replaced := paths.replaced(tokenizer)) != tokenizer:
        write_json(target / TOKENIZER, replaced)
    if card is not None:
        name = Path(run.output_dir).name if run else adapter.path.name
        card = _with_repository(paths.replaced_in(card), name, repository)
        was_local = is_local(adapter.base) or (run is not None and is_local(run.model.name_or_path))
        (target / CARD).write_text(_with_base(card, base) if was_local else card, encoding="utf-8")
    if record:
        record = paths.replaced(record)
        record["base"] = {**record.get("base", {}), "name_or_path": base}
        write_json(target / RECORD_FILE, record | {"files": adapter_files.manifest(target)})
    paths.check_none_left(adapter, target)


def _read(adapter: AdapterFiles, target: Path, name: str, parse: Callable[[str], Any]) -> Any:
    """The parsed content of a file of the copy; None if it does not exist. Raises AdapterError: it is not valid."""
    try:
        return parse(read_text(target / name)) if (target / name).is_file() else None
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        what = error.problems[0].what if isinstance(error, ConfigError) else f"cannot be read: {error}"
        raise AdapterError(Problem(Code.ADAPTER_INVALID, what, str(adapter.path / name))) from None


def _with_repository(card: str, name: str, repository: str) -> str:
    """A card whose examples load the repository instead of the directory of this name."""
    for call in ("from_pretrained(", "from_pretrained(base, "):
        card = card.replace(f"{call}{json.dumps(name)}", f"{call}{json.dumps(repository)}")
    return re.sub(rf"(--lora-modules \S+=){re.escape(name)}$", rf"\g<1>{repository}", card, flags=re.M)


def _with_base(card: str, base: str) -> str:
    """A card whose metadata name the base, which the hub shows as a link; unchanged if the metadata are not YAML."""
    try:
        made = ModelCard(card if card.startswith("---") else f"---\n{{}}\n---\n\n{card}")
        data: Any = made.data
        link, tags = f"base_model:adapter:{base}", data.tags if isinstance(data.tags, list) else []
        data.base_model, data.tags = base, [*(tag for tag in tags if tag != link), link]
        return str(made)
    except Exception:  # the hub will report it
        _log.debug("the metadata of the card cannot be changed", exc_info=True)
        return card


class _Paths:
    """The local paths in an adapter's files, and their replacements.

    Args:
        adapter: The adapter.
        run: Its config.
        values: The JSON values of its other files.
        repository: The replacement of the adapter's path.
        base: The replacement of the base's path.
    """

    def __init__(self, adapter: AdapterFiles, run: RunConfig | None, values: Any, repository: str, base: str):
        named = dict(config.paths(run)) if run is not None else {}
        found = {path: Path(path).name for path in (*_texts(values), *named.values())}
        bases = (named.get(_BASE), adapter.base, *_texts(adapter.record.get("base")))
        found |= {path: base for path in bases if path in found}
        found |= {str(path): repository for path in (adapter.path.absolute(), adapter.path.resolve())}
        is_path = {path: path.startswith(("/", "~")) and len(path) > 1 for path in named.values()}
        known = {path: name for path, name in found.items() if is_path.get(path) or _PATH.fullmatch(path)}
        self._names = {spelling: name for path, name in known.items() for spelling in _spellings(path)}
        longest_first = sorted(self._names, key=len, reverse=True)
        own = f"{re.escape(str(Path.home()))}|" if Path.home() != Path("/") else ""
        self._known = re.compile("|".join(f"{_START}{re.escape(path)}{_END}" for path in longest_first) or r"(?!)")
        self._home = re.compile(f"{_START}(?:{own}{_HOMES}){_END}({_BELOW})")

    def replaced_in(self, text: str) -> str:
        """A text with known paths, and all paths below home directories, replaced by names."""
        text = self._known.sub(lambda match: self._names[match[0]], text)
        return self._home.sub(lambda match: Path(match[0]).name if match[1] else "~", text)

    def replaced(self, values: Any) -> Any:
        """JSON values with paths replaced by names."""
        if isinstance(values, dict):
            return {key: self.replaced(value) for key, value in values.items()}
        if isinstance(values, list):
            return [self.replaced(value) for value in values]
        return self.replaced_in(values) if isinstance(values, str) else values

    def check_none_left(self, adapter: AdapterFiles, target: Path) -> None:
        """Raises ConfigError: a file of the copy still contains a path."""
        problems = []
        for name in (CARD, RUN, CONFIG_FILE, RECORD_FILE, TOKENIZER):
            text = _read(adapter, target, name, str) or ""
            if match := self._known.search(text) or self._home.search(text):
                what, where = f"names a path of this machine, {match[0]}", str(adapter.path / name)
                problems.append(Problem(Code.PUSH_LOCAL_PATH, what, where, fix="take it out"))
        if problems:
            raise ConfigError(problems)


def _texts(values: Any) -> Iterator[str]:
    """All strings in JSON values."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, list | dict):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _texts(value)


def _spellings(path: str) -> Iterator[str]:
    """The spellings of a path in plain text, in JSON, in a list, and in a card."""
    quoted = (json.dumps(path), json.dumps(path, ensure_ascii=False), repr(path))
    plain = {path, one_line(path), printable(path), *(text[1:-1] for text in quoted)}
    yield from plain | {markdown(text) for text in plain}
