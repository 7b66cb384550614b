"""Code that a model's files name: with `trust_remote_code` it is run, so it has to lie where the user has read it.

transformers runs a class that `auto_map` names as `module.Class` from the model's own repository, at the pinned
revision, and one named as `other/repo--module.Class` from another repository, at whatever revision is the newest
(transformers.dynamic_module_utils). The latter is refused, wherever in a JSON file of the model it stands. So are the
names of kernels of the hub, which transformers would fetch and run without being trusted to (integrations.hub_kernels).
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from loratune.errors import ModelError, Problem

_log = logging.getLogger(__name__)

FILES = (
    "config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "feature_extractor_config.json",
    "image_processor_config.json", "chat_template.json", "special_tokens_map.json", "adapter_config.json",
)  # fmt: skip
"""Files of a repository in which transformers looks for the names of classes, or of another repository."""

_CLASS = re.compile(r"(?:\w+/)*\w+\.\w+")  # a module of the repository, in it or below, and a class
_CODE = ("auto_map", "custom_generate", "custom_pipelines")


def check_files(files: Iterable[Path], own: str = "") -> None:
    """Insist that these JSON files name no code of another repository. What is no JSON is left to whoever reads it.

    own: the id of the repository that they are from; nothing for a directory.
    Raises ModelError with all that they name.
    """
    problems = []
    for file in files:
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            _log.debug("%s is not looked at for code", file, exc_info=True)
            continue
        named = _named(values)
        if own and file.name == "adapter_config.json" and isinstance(values, dict):
            named = chain(named, _texts(("base_model_name_or_path",), values.get("base_model_name_or_path")))
        problems += [
            Problem(what, str(file), ".".join(keys), fix)
            for keys, text in named
            for what, fix in _refused(keys, text, own)
        ]
    if problems:
        raise ModelError(problems)


def check_kernels(config: Any, where: str) -> None:
    """Insist that a model's configuration asks for no kernel of the hub. Raises ModelError."""
    parts = [("", config), *((f"{name}.", vars(config).get(name)) for name in config.sub_configs)]
    for prefix, part in parts:
        asked = part._attn_implementation if part is not None else None
        if isinstance(asked, str) and "/" in asked:
            what, key = f"names a kernel of another repository, {asked}", f"{prefix}attn_implementation"
            raise ModelError(Problem(what, where, key, "take it out of config.json"))


def check_directory(directory: Path) -> None:
    """`check_files` of a model's directory, at any depth; and no link to code leads out of it."""
    check_files(path for path in sorted(directory.rglob("*.json")) if path.is_file())
    inside = directory.resolve()
    if outside := [path for path in sorted(directory.rglob("*.py")) if not path.resolve().is_relative_to(inside)]:
        what = "code that lies outside of the model's directory"
        raise ModelError([Problem(what, str(path), fix="copy it there once you have read it") for path in outside])


def _named(values: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys and text of everything that names code, at any depth."""
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in entries:
        inner = (*keys, str(key))
        yield from _texts(inner, value) if key in _CODE else _named(value, inner)


def _texts(keys: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, str):
        yield keys, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts((*keys, str(key)), inner)


def _refused(keys: tuple[str, ...], text: str, own: str) -> Iterator[tuple[str, str]]:
    """Why code of this name would not be that of the model's own repository, and what to do about it."""
    repository, separator, rest = text.rpartition("--")
    if "base_model_name_or_path" in keys:
        yield f"names another repository, {text}, whose code would be run", "name that one as the base"
    elif separator and repository != own:
        fix = "copy that code into the model's directory once you have read it, and name it there as module.Class"
        yield f"names code of another repository, {text}", fix
    elif "auto_map" in keys and not _CLASS.fullmatch(rest):
        yield f"names code in no module of this repository, {text}", "name it as module.Class"
