"""A copy of an adapter directory in which no path of this machine is named, for others to download.

Such a path tells who trained on what, and leads nowhere on another machine. Paths stand in the card, run.yaml,
loratune.json, adapter_config.json and tokenizer_config.json, and each is replaced by the name of its file; that of the
base, by its id on the hub. Weights, vocabularies and chat templates are copied as they are.
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
"""A key of the record with prompts of the training rows. They are data, which a copy for others does not hold; nor does
it hold hashes of the rows, which tell whoever has a row whether it was among them."""
_OF_CONFIGS = ("changes", "start_from")
"""Keys of the record with values of configs: of the run before it was resumed, and of the adapter it started from."""
_PICKLES = ("adapter_model.bin", "training_args.bin")
_HOME = r"(?:/home/[^/\s\"'`]+|/Users/[^/\s\"'`]+|/root)"
_REST = r"(?:/[^\s\"'`<>|()\[\]{},;]*)?"
_START, _END = r"(?<![\w.~-])", r"(?![\w-])"  # so that /out is found in neither w/out nor /output


@dataclass(frozen=True)
class PortableCopy:
    """A copy of an adapter directory for other machines.

    Attributes:
        path: Where it is.
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


def copy(adapter: AdapterFiles, target: Path, repository: str, base: str) -> PortableCopy:
    """Copy the files of an adapter to a new directory, without paths of this machine, prompts and hashes of the rows.

    Digests in the record are those of the new files.

    Args:
        adapter: The adapter, whose files are as its record says.
        target: The directory to make.
        repository: The name by which others will load it.
        base: The id of the base on the hub.

    Raises:
        AdapterError: A file changed while it was copied; a text is not UTF-8; run.yaml is no config.
        ConfigError: A path is left in a file, written in a way that is not recognized.
    """
    names, left_out = _contents(adapter)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(adapter.path / name, target / name)
    recorded = {name: digest for name, digest in adapter.record.get("files", {}).items() if name != ROW_HASHES}
    if adapter.record and adapter_files.manifest(target) != recorded:
        what, fix = "a file changed while it was copied", "try again"
        raise AdapterError(Problem(Code.ADAPTER_FILE_CHANGED, what, str(adapter.path), fix=fix))
    run = _run(target, adapter.path)
    paths = _Paths(adapter, run, repository, base)
    before = {name: sha256(target / name) for name in names}
    _replace(target, adapter, run, paths, base)
    if (card := target / CARD).is_file():
        text = paths.without(_text(card, adapter.path))
        card.write_text(_card_for(text, adapter, run, repository, base), encoding="utf-8")
    if adapter.record:
        record = paths.values_without({key: value for key, value in adapter.record.items() if key != PROMPTS})
        record["base"] = {**record.get("base", {}), "name_or_path": base}
        write_json(target / RECORD_FILE, record | {"files": adapter_files.manifest(target)})
    paths.check_none_left(target, adapter.path)
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


def _run(directory: Path, original: Path) -> RunConfig | None:
    try:
        return config.load(directory / RUN) if (directory / RUN).is_file() else None
    except ConfigError as error:
        where = str(original / RUN)
        raise AdapterError([Problem(one.code, one.what, where, one.key, one.fix) for one in error.problems]) from None


def _text(path: Path, original: Path) -> str:
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        what = f"cannot be read as text: {error}"
        raise AdapterError(Problem(Code.ADAPTER_UNREADABLE, what, str(original / path.name))) from None


def _replace(directory: Path, adapter: AdapterFiles, run: RunConfig | None, paths: "_Paths", base: str) -> None:
    """Replace the paths in the files that the record has digests of."""
    write_json(directory / CONFIG_FILE, paths.values_without(adapter.config) | {"base_model_name_or_path": base})
    if run is not None:
        (directory / RUN).write_text(config.dump(portable(run, base)), encoding="utf-8")
    if (path := directory / TOKENIZER).is_file():
        try:
            values = json.loads(_text(path, adapter.path))
        except (ValueError, RecursionError):
            raise AdapterError(Problem(Code.ADAPTER_NOT_JSON, "not JSON", str(adapter.path / TOKENIZER))) from None
        if (without := paths.values_without(values)) != values:
            write_json(path, without)


def portable(run: RunConfig, base: str) -> RunConfig:
    """A config with the names of its files in place of their paths."""
    return config.with_paths(run, lambda key, path: base if key == _BASE else _name(path))


def _name(path: str) -> str:
    """The last part of a path; that of a directory begins with `./`, as it could be taken for a repository."""
    if not is_local(path):
        return path
    name = Path(path).name
    return name if Path(name).suffix or "*" in name else f"./{name}"


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
    except Exception:  # metadata that are no YAML: the hub will say so
        _log.debug("the card's metadata cannot be read", exc_info=True)
        return text
    link = f"base_model:adapter:{base}"
    data.base_model, data.tags = base, [*(tag for tag in tags if tag != link), link]
    return str(card)


class _Paths:
    """The paths of this machine that an adapter is known to name, and what stands in their place."""

    def __init__(self, adapter: AdapterFiles, run: RunConfig | None, repository: str, base: str):
        recorded = adapter.record.get("base")
        bases = [adapter.base, recorded.get("name_or_path") if isinstance(recorded, dict) else None]
        names = {str(adapter.path.absolute()): repository, str(adapter.path.resolve()): repository}
        if run is not None:
            bases += [path for key, path in config.paths(run) if key == _BASE]
            names |= {path: Path(path).name for key, path in config.paths(run) if key != _BASE}
        names |= {text: Path(text).name for key in _OF_CONFIGS for text in _texts(adapter.record.get(key))}
        names |= {path: base for path in bases if isinstance(path, str)}
        known = {path: name for path, name in names.items() if path.startswith(("/", "~")) and len(path) > 1}
        spelled = {spelling: name for path, name in known.items() for spelling in _spellings(path)}
        self._names = dict(sorted(spelled.items(), key=lambda item: -len(item[0])))
        own_home = re.escape(str(Path.home()))
        self._pattern = re.compile("|".join(f"{_START}{re.escape(path)}{_END}" for path in self._names) or r"(?!)")
        self._home = re.compile(rf"{_START}(?:{own_home}|{_HOME}){_END}{_REST}" if own_home != "/" else _HOME)

    def without(self, text: str) -> str:
        """A text with names in place of paths."""
        text = self._pattern.sub(lambda match: self._names[match[0]], text)
        return self._home.sub(lambda match: _last_part(match[0]), text)

    def values_without(self, values: Any) -> Any:
        """Values of JSON with names in place of paths; also of a path that is known from nowhere else."""
        if isinstance(values, dict):
            return {key: self.values_without(value) for key, value in values.items()}
        if isinstance(values, list):
            return [self.values_without(value) for value in values]
        if not isinstance(values, str):
            return values
        text = self.without(values)
        return Path(text).name if re.fullmatch(r"/[^\s/]+(/[^/]+)+/?", text) else text

    def check_none_left(self, directory: Path, original: Path) -> None:
        """Raises ConfigError: a file that was written names a path all the same."""
        problems = []
        for name in (CARD, RUN, CONFIG_FILE, RECORD_FILE, TOKENIZER):
            if not (directory / name).is_file():
                continue
            text = (directory / name).read_text(encoding="utf-8")
            if match := self._pattern.search(text) or self._home.search(text):
                what, where = f"names a path of this machine, {match[0]}", str(original / name)
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
    """A path as it stands in text, in JSON, in a list, and in a card."""
    quoted = (json.dumps(path), json.dumps(path, ensure_ascii=False), repr(path))
    plain = {path, escaping.line(path), escaping.text(path), *(text[1:-1] for text in quoted)}
    yield from plain | {escaping.markdown(text) for text in plain}


def _last_part(path: str) -> str:
    """The last part of a path below a home directory, and what ends a sentence; `~` for the home directory itself."""
    bare = path.rstrip(".:!?")
    end = path[len(bare) :]
    is_home = re.fullmatch(rf"{_HOME}/?", bare) is not None or Path(bare) == Path.home()
    return ("~" if is_home else Path(bare).name) + end
