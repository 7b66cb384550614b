"""Code that a model's files name: `trust_remote_code` runs it, so it must come from the repository the user has read.

transformers runs a class that `auto_map` names as `module.Class` from the model's own repository, at the pinned
revision, but one named as `other/repo--module.Class` from another repository, at its newest revision
(transformers.dynamic_module_utils). The latter is refused, wherever it stands in a JSON file of the model. So are the
names of hub kernels, which transformers downloads and runs without asking (transformers.integrations.hub_kernels).
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from huggingface_hub import errors, hf_hub_download

from loratune.codes import Code
from loratune.errors import ModelError, Problem
from loratune.model import upstream

_log = logging.getLogger(__name__)


FILES = (
    "config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "feature_extractor_config.json",
    "image_processor_config.json", "chat_template.json", "special_tokens_map.json", "adapter_config.json",
)  # fmt: skip
"""Files of a repository in which transformers looks for the names of classes, or of another repository."""


_CLASS = re.compile(r"(?:\w+/)*\w+\.\w+")  # a module of the repository, in it or below, and a class


_CODE = ("auto_map", "custom_generate", "custom_pipelines")


def check_directory(directory: Path) -> None:
    """`check_files` for a model's directory, at any depth; and no link to code leads out of it."""
    check_files(path for path in sorted(directory.rglob("*.json")) if path.is_file())
    root = directory.resolve()
    if outside := [path for path in sorted(directory.rglob("*.py")) if not path.resolve().is_relative_to(root)]:
        what, fix = "this code lies outside of the model's directory", "copy it there once you have read it"
        raise ModelError([Problem(Code.MODEL_FOREIGN_CODE, what, str(path), fix=fix) for path in outside])


def check_repository(name: str, revision: str | None) -> None:
    """`check_files` for those files of a repository that may name code, downloaded if they are not in the cache."""
    check_files(_downloads(name, revision), name)


def _downloads(name: str, revision: str | None) -> Iterator[Path]:
    """Files that the repository does not have, or that cannot be downloaded now, are left out; transformers does not
    get them either."""
    offline = False
    for file in FILES:
        try:
            yield Path(hf_hub_download(name, file, revision=revision, local_files_only=offline))
        except errors.LocalEntryNotFoundError:
            offline = True  # the library has tried several times, and would again for each file
        except errors.EntryNotFoundError:
            continue


def check_files(files: Iterable[Path], own: str = "") -> None:
    """Check that these JSON files name no code of another repository. Files that are not JSON are ignored.

    Args:
        files: The files.
        own: The id of the repository that they come from; empty for a directory.

    Raises:
        ModelError: With every name of such code.
    """
    problems = []
    for file in files:
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            _log.debug("%s is not looked at for code", file, exc_info=True)
            continue
        names = _code_names(values)
        if own and file.name == "adapter_config.json" and isinstance(values, dict):
            names = chain(names, _texts(("base_model_name_or_path",), values.get("base_model_name_or_path")))
        problems += [
            Problem(Code.MODEL_FOREIGN_CODE, what, str(file), ".".join(keys), fix)
            for keys, text in names
            for what, fix in _objections(keys, text, own)
        ]
    if problems:
        raise ModelError(problems)


def check_kernels(config: Any, where: str) -> None:
    """Check that a model's configuration names no kernel of the hub.

    Raises:
        ModelError: It names one.
    """
    parts = [("", config), *((f"{name}.", vars(config).get(name)) for name in config.sub_configs)]
    for prefix, part in parts:
        kernel = upstream.attention(part) if part is not None else None
        if isinstance(kernel, str) and "/" in kernel:
            what, key = f"names a kernel of another repository, {kernel}", f"{prefix}attn_implementation"
            raise ModelError(Problem(Code.MODEL_FOREIGN_CODE, what, where, key, "take it out of config.json"))


def _code_names(values: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys and text of everything that names code, at any depth."""
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in entries:
        path = (*keys, str(key))
        yield from _texts(path, value) if key in _CODE else _code_names(value, path)


def _texts(keys: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, str):
        yield keys, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts((*keys, str(key)), inner)


def _objections(keys: tuple[str, ...], text: str, own: str) -> Iterator[tuple[str, str]]:
    """Why code of this name would not be that of the model's own repository, and what to do about it."""
    repository, separator, rest = text.rpartition("--")
    if "base_model_name_or_path" in keys:
        what = f"names another repository, {text}, whose code would be run"
        yield what, "name that one as the base"
    elif separator and repository != own:
        fix = "copy that code into the model's directory once you have read it, and name it there as module.Class"
        yield f"names code of another repository, {text}", fix
    elif "auto_map" in keys and not _CLASS.fullmatch(rest):
        yield f"names code in no module of this repository, {text}", "name it as module.Class"
