"""A copy of an adapter directory that names no path of this machine, for others to download.

Such a path tells who trained on what, and leads nowhere on another machine. The card, run.yaml, loratune.json,
adapter_config.json and tokenizer_config.json hold paths; each is replaced by the name of its file, that of the base by
its id on the hub. `config.paths` lists the paths of a config. Weights, vocabularies and chat templates are copied as
they are.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from loratune import config, escaping
from loratune.codes import Code
from loratune.config import RunConfig
from loratune.errors import AdapterError, ConfigError, Problem
from loratune.lora import adapter_files
from loratune.lora.adapter_files import CONFIG_FILE, RECORD_FILE, AdapterFiles
from loratune.system import directories
from loratune.system.files import is_incidental_file, read_text, sha256, write_json
from loratune.system.records import ROW_HASHES

_log = logging.getLogger(__name__)

CARD, RUN, TOKENIZER = "README.md", "run.yaml", "tokenizer_config.json"
_BASE = "model.name_or_path"
PROMPTS = "prompts"
"""A key of the record with prompts of the training rows. A copy for others holds neither these nor the hashes of the
rows, which tell whoever has a row whether it was trained on."""
_OF_CONFIGS = ("changes", "start_from")
"""Keys of the record with values of configs: of the run before it was resumed, and of the adapter it started from."""
_PICKLES = ("adapter_model.bin", "training_args.bin")
_HOMES = r"/home/[^/\s\"'`]+|/Users/[^/\s\"'`]+|/root"
_BELOW = r"(?:/[^\s\"'`<>|()\[\]{},;]*[^\s\"'`<>|()\[\]{},;.:!?/])?"
_START, _END = r"(?<![\w.~-])", r"(?![\w-])"  # so that /out is found in neither w/out nor /output


@dataclass(frozen=True)
class PortableCopy:
    """A copy of an adapter directory for other machines.

    Attributes:
        path: Its directory.
        base: The id of the base on the hub.
        files: Name → SHA-256 of the bytes, of all that is in it.
        changed: The files in which paths were replaced.
        left_out: What the directory holds and is no part of the adapter; directories end with `/`.
    """

    path: Path
    base: str
    files: Mapping[str, str]
    changed: tuple[str, ...]
    left_out: tuple[str, ...]


def is_local(name_or_path: str) -> bool:
    """Whether this is a path, and not the id of a repository."""
    return name_or_path.startswith(("/", "~", ".")) or Path(name_or_path).is_dir() or name_or_path.count("/") > 1


def portable(run: RunConfig, base: str) -> RunConfig:
    """A config with the names of its files in place of their paths. base: the id of the base on the hub."""

    def name(path: str) -> str:
        last = Path(path).name  # that of a directory begins with `./`, as it could be taken for a repository
        is_plain = Path(last).suffix or "*" in last
        return path if not is_local(path) else last if is_plain else f"./{last}"

    return config.with_paths(run, lambda key, path: base if key == _BASE else name(path))


def copy(adapter: AdapterFiles, target: Path, repository: str, base: str) -> PortableCopy:
    """Copy the files of an adapter to a new directory, without paths of this machine, prompts and hashes of the rows.

    Digests in the record are those of the new files.

    Args:
        adapter: The adapter, whose files are as its record says.
        target: The directory to make.
        repository: The name by which others will load it.
        base: The id of the base on the hub.

    Raises:
        AdapterError: A file changed while it was copied; a text is not UTF-8; run.yaml is not a valid config.
        ConfigError: A path remains in a file, written in a way that is not recognized.
    """
    names, left_out = _contents(adapter)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(adapter.path / name, target / name)
    recorded = {name: digest for name, digest in adapter.record.get("files", {}).items() if name != ROW_HASHES}
    if adapter.record and adapter_files.manifest(target) != recorded:
        what, fix = "a file changed while it was copied", "try again"
        raise AdapterError(Problem(Code.ADAPTER_CHANGED, what, str(adapter.path), fix=fix))
    before = {name: sha256(target / name) for name in names}
    _rewrite(adapter, target, repository, base)
    files = {name: sha256(target / name) for name in names}
    changed = tuple(name for name in names if files[name] != before[name])
    return PortableCopy(target, base, files, changed, left_out)


def _contents(adapter: AdapterFiles) -> tuple[list[str], tuple[str, ...]]:
    """The files of an adapter, and what else is in its directory."""
    directory = adapter.path
    if adapter.record:
        names = {*adapter.record["files"], RECORD_FILE, CARD}
    else:
        names = set(directories.scan_adapter(directory).files) - {*_PICKLES}
    names = {name for name in names if (directory / name).is_file() and not is_incidental_file(name)}
    left_out = directories.scan(directory, lambda name: name in names).foreign
    return sorted(names - {ROW_HASHES}), tuple(left_out)


def _rewrite(adapter: AdapterFiles, target: Path, repository: str, base: str) -> None:
    """Replace the paths in the files of a copy, the record last, as it has the digests of the others."""
    run = _run(adapter, target)
    paths = _Paths(adapter, run, repository, base)
    write_json(target / CONFIG_FILE, paths.replaced(adapter.config) | {"base_model_name_or_path": base})
    if run is not None:
        (target / RUN).write_text(config.dump(portable(run, base)), encoding="utf-8")
    if (text := _text(adapter, target, TOKENIZER)) is not None:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            raise AdapterError(Problem(Code.ADAPTER_INVALID, "not JSON", str(adapter.path / TOKENIZER))) from None
        if (replaced := paths.replaced(values)) != values:
            write_json(target / TOKENIZER, replaced)
    if (text := _text(adapter, target, CARD)) is not None:
        card = _card_for(paths.replaced_in(text), adapter, run, repository, base)
        (target / CARD).write_text(card, encoding="utf-8")
    if adapter.record:
        record = paths.replaced({key: value for key, value in adapter.record.items() if key != PROMPTS})
        record["base"] = {**record.get("base", {}), "name_or_path": base}
        write_json(target / RECORD_FILE, record | {"files": adapter_files.manifest(target)})
    paths.check_none_left(adapter, target)


def _run(adapter: AdapterFiles, target: Path) -> RunConfig | None:
    try:
        return config.load(target / RUN) if (target / RUN).is_file() else None
    except ConfigError as error:
        where = str(adapter.path / RUN)
        raise AdapterError([Problem(one.code, one.what, where, one.key, one.fix) for one in error.problems]) from None


def _text(adapter: AdapterFiles, target: Path, name: str) -> str | None:
    """The text of a file of the copy; None if it has no such file."""
    try:
        return read_text(target / name) if (target / name).is_file() else None
    except (OSError, ValueError) as error:
        what = f"cannot be read as text: {error}"
        raise AdapterError(Problem(Code.ADAPTER_INVALID, what, str(adapter.path / name))) from None


def _card_for(text: str, adapter: AdapterFiles, run: RunConfig | None, repository: str, base: str) -> str:
    """A card whose example loads the repository, and whose metadata name the base, which the hub makes a link of."""
    name = json.dumps(Path(run.output_dir).name if run else adapter.path.name)
    for call in ("from_pretrained(", "from_pretrained(base, "):
        text = text.replace(f"{call}{name}", f"{call}{json.dumps(repository)}")
    text = re.sub(rf"(--lora-modules \S+=){re.escape(json.loads(name))}$", rf"\g<1>{repository}", text, flags=re.M)
    if not is_local(adapter.base) and (run is None or not is_local(run.model.name_or_path)):
        return text
    try:
        card = ModelCard(text if text.startswith("---") else f"---\n{{}}\n---\n\n{text}")
        data: Any = card.data
        tags = data.tags if isinstance(data.tags, list) else []
    except Exception:  # metadata that are not YAML: the hub will report it
        _log.debug("the card's metadata cannot be read", exc_info=True)
        return text
    link = f"base_model:adapter:{base}"
    data.base_model, data.tags = base, [*(tag for tag in tags if tag != link), link]
    return str(card)


class _Paths:
    """The paths of this machine that an adapter is known to name, with what replaces them."""

    def __init__(self, adapter: AdapterFiles, run: RunConfig | None, repository: str, base: str):
        recorded = adapter.record.get("base")
        names = {str(adapter.path.absolute()): repository, str(adapter.path.resolve()): repository}
        for key, path in config.paths(run) if run is not None else ():
            names[path] = base if key == _BASE else Path(path).name
        names |= {text: Path(text).name for key in _OF_CONFIGS for text in _texts(adapter.record.get(key))}
        names |= {adapter.base: base}
        names |= dict.fromkeys(_texts(recorded.get("name_or_path") if isinstance(recorded, dict) else None), base)
        known = {path: name for path, name in names.items() if path.startswith(("/", "~")) and len(path) > 1}
        self._names = {spelling: name for path, name in known.items() for spelling in _spellings(path)}
        longest_first = sorted(self._names, key=len, reverse=True)
        own = f"{re.escape(str(Path.home()))}|" if Path.home() != Path("/") else ""
        self._known = re.compile("|".join(f"{_START}{re.escape(path)}{_END}" for path in longest_first) or r"(?!)")
        self._home = re.compile(f"{_START}(?:{own}{_HOMES}){_END}({_BELOW})")

    def replaced_in(self, text: str) -> str:
        """A text with names in place of paths; of one below a home directory, also where it is not known."""
        text = self._known.sub(lambda match: self._names[match[0]], text)
        return self._home.sub(lambda match: Path(match[0]).name if match[1] else "~", text)

    def replaced(self, values: Any) -> Any:
        """Values of JSON with names in place of paths; also of a path that is known from nowhere else."""
        if isinstance(values, dict):
            return {key: self.replaced(value) for key, value in values.items()}
        if isinstance(values, list):
            return [self.replaced(value) for value in values]
        if not isinstance(values, str):
            return values
        text = self.replaced_in(values)
        return Path(text).name if re.fullmatch(r"/[^\s/]+(/[^/]+)+/?", text) else text

    def check_none_left(self, adapter: AdapterFiles, target: Path) -> None:
        """Raises ConfigError: a file of the copy names a path all the same."""
        problems = []
        for name in (CARD, RUN, CONFIG_FILE, RECORD_FILE, TOKENIZER):
            text = _text(adapter, target, name) or ""
            if match := self._known.search(text) or self._home.search(text):
                what, where = f"names a path of this machine, {match[0]}", str(adapter.path / name)
                problems.append(Problem(Code.PUSH_LOCAL_PATH, what, where, fix="take it out"))
        if problems:
            raise ConfigError(problems)


def _texts(values: Any) -> Iterator[str]:
    """All text in values of JSON."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, list | dict):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _texts(value)


def _spellings(path: str) -> Iterator[str]:
    """A path as it is written in text, in JSON, in a list, and in a card."""
    quoted = (json.dumps(path), json.dumps(path, ensure_ascii=False), repr(path))
    plain = {path, escaping.line(path), escaping.text(path), *(text[1:-1] for text in quoted)}
    yield from plain | {escaping.markdown(text) for text in plain}
