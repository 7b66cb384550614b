"""Where a base model comes from, a directory of this machine or a repository of the hub, and whose code it may run.

`trust_remote_code` runs code that a model's files name, so it must come from the repository the user has read.
transformers runs a class that `auto_map` names as `module.Class` from the model's own repository, at the pinned
revision, but one named as `other/repo--module.Class` from another repository, at its newest revision
(transformers.dynamic_module_utils). The latter is refused, wherever it stands in a JSON file of the model. So are the
names of hub kernels, which transformers downloads and runs without asking (transformers.integrations.hub_kernels).

Needs no torch.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

from loratune.codes import Code
from loratune.config import ModelSection
from loratune.errors import ModelError, Problem
from loratune.model import gguf, upstream

KEY = "model.name_or_path"


@dataclass(frozen=True)
class ModelSource:
    """A model that exists, named as transformers expects it.

    Attributes:
        name: The absolute path of a directory, or a hub id.
        gguf_file: The absolute path of a GGUF file.
        from_hub: The GGUF file was downloaded. Which other files lie beside it in the cache is chance.
    """

    name: str
    gguf_file: str | None = None
    from_hub: bool = False

    def gguf_unless(self, *files: str) -> dict[str, str]:
        """The GGUF file as a keyword for `from_pretrained`, unless the directory has one of these files."""
        if self.gguf_file is None or (not self.from_hub and any((Path(self.name) / file).is_file() for file in files)):
            return {}
        return {"gguf_file": self.gguf_file}


def locate(section: ModelSection) -> ModelSource:
    """Find the model, and download its GGUF file if it is on the hub.

    transformers gets the GGUF file by its absolute path: a relative one is first looked up in the working directory.

    Raises:
        ModelError: As `is_directory` and `check_repository`; the download fails; the GGUF file cannot be read.
    """
    name, file, revision = section.name_or_path, section.gguf_file, section.revision
    if is_directory(name, revision, file, trusted=section.trust_remote_code):
        directory = local_or_hub(name)
        return ModelSource(directory, str(Path(directory) / file) if file else None)
    if file is None:
        check_repository(name, revision)
        return ModelSource(name)
    check_repository(name, revision, file)
    try:
        path = Path(hf_hub_download(name, file, revision=revision))
    except Exception as error:  # whatever the network stack raises
        what = f"{file} cannot be downloaded: {summary(error)}"
        raise ModelError(Problem(Code.MODEL_DOWNLOAD_FAILED, what, name, gguf.KEY)) from None
    gguf.check(path)
    return ModelSource(str(path.parent), str(path), from_hub=True)


def is_directory(
    name_or_path: str, revision: str | None = None, gguf_file: str | None = None, *, trusted: bool = False
) -> bool:
    """Whether this is a model directory; False means that it may be a hub id.

    Args:
        name_or_path: A path or a hub id.
        revision: Only hub ids have one, except where code is trusted, which always needs a revision.
        gguf_file: A file in the directory, which then needs no other.
        trusted: Code of the model is trusted.

    Raises:
        ModelError: The path does not exist or is a file; the directory holds no model, or a revision is set for it;
            as `gguf.check`.
    """
    path = Path(name_or_path).expanduser()
    if gguf_file is not None:
        gguf.check_name(gguf_file)
    if path.is_dir():
        if revision is not None and not trusted:
            what, key = "a directory has no revisions", "model.revision"
            raise ModelError(Problem(Code.MODEL_LOCAL_REVISION, what, name_or_path, key, "leave it out"))
        if gguf_file is not None:
            gguf.check(path / gguf_file)
        elif not (path / "config.json").is_file():
            files = sorted(file.name for file in path.glob("*.gguf"))
            fix = f"set {gguf.KEY} to {' or '.join(files[:3])}" if files else "name the directory that has one"
            what = "no config.json in this directory, so it holds no model"
            raise ModelError(Problem(Code.MODEL_NO_CONFIG, what, name_or_path, KEY, fix))
        return True
    if path.exists():
        fix = f"name its directory, and set {gguf.KEY}: {path.name}" if path.suffix == ".gguf" else "name its directory"
        raise ModelError(Problem(Code.MODEL_IS_FILE, "is a file, not a model directory", name_or_path, KEY, fix))
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise ModelError(Problem(Code.MODEL_NO_DIRECTORY, "no such directory", name_or_path, KEY, "check the path"))
    return False


def local_or_hub(name_or_path: str) -> str:
    """The name by which a model can be found from anywhere: an absolute path for a directory, else the hub id."""
    path = Path(name_or_path).expanduser()
    return str(path.absolute()) if path.is_dir() else name_or_path


def check_repository(name: str, revision: str | None, file: str = "config.json") -> None:
    """Determine why a model cannot be downloaded from the hub; transformers reports most reasons as one OSError.

    Raises:
        ModelError: No such repository, or it is gated; no such revision or file; offline and not cached.
    """
    fix, key = "", KEY
    try:
        if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            return
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision), timeout=10)
    except errors.GatedRepoError:
        code, what = Code.MODEL_GATED, "this repository is gated"
        fix = f"accept its terms on https://huggingface.co/{name} and log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        code, what, key = Code.MODEL_NO_REVISION, f"the repository has no revision {revision}", "model.revision"
    except errors.RepositoryNotFoundError:
        code, what = Code.MODEL_NO_REPOSITORY, "no such directory, and no such repository on the hub"
        fix = "check the name; private ones need `hf auth login`"
    except errors.EntryNotFoundError:
        if file == "config.json":
            code, what = Code.MODEL_NO_CONFIG, f"the repository has no {file}, so it holds no model"
        else:
            code, what, key = Code.MODEL_GGUF_NOT_FOUND, f"the repository has no {file}", gguf.KEY
    except errors.HFValidationError:
        code, what = Code.MODEL_INVALID_ID, "no such directory, and not the id of a repository"
    except Exception as error:  # whatever the network stack raises
        code = Code.MODEL_HUB_UNREACHABLE
        what = f"no such directory; the hub cannot be reached and the model is not cached ({summary(error)})"
        fix = "check the path, or the connection"
    else:
        return
    raise ModelError(Problem(code, what, name, key, fix))


def summary(error: BaseException) -> str:
    """The first line of an error, and the next where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, KeyError):
        return f"unknown: {lines[0]}"
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text.partition(". ")[0]


_log = logging.getLogger(__name__)

CODE_FILES = (
    "config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "feature_extractor_config.json",
    "image_processor_config.json", "chat_template.json", "special_tokens_map.json", "adapter_config.json",
)  # fmt: skip
"""Files of a repository in which transformers looks for the names of classes, or of another repository."""

_CLASS = re.compile(r"(?:\w+/)*\w+\.\w+")  # a module of the repository, in it or below, and a class
_CODE = ("auto_map", "custom_generate", "custom_pipelines")


def check_directory_code(directory: Path) -> None:
    """`check_code` for a model's directory, at any depth; and no link to code leads out of it."""
    check_code(path for path in sorted(directory.rglob("*.json")) if path.is_file())
    root = directory.resolve()
    if outside := [path for path in sorted(directory.rglob("*.py")) if not path.resolve().is_relative_to(root)]:
        what, fix = "this code lies outside of the model's directory", "copy it there once you have read it"
        raise ModelError([Problem(Code.MODEL_CODE_OUTSIDE, what, str(path), fix=fix) for path in outside])


def check_repository_code(name: str, revision: str | None) -> None:
    """`check_code` for those files of a repository that may name code, downloaded if they are not in the cache."""
    check_code(_downloads(name, revision), name)


def _downloads(name: str, revision: str | None) -> Iterator[Path]:
    """Files that the repository does not have, or that cannot be downloaded now, are left out; transformers does not
    get them either."""
    offline = False
    for file in CODE_FILES:
        try:
            yield Path(hf_hub_download(name, file, revision=revision, local_files_only=offline))
        except errors.LocalEntryNotFoundError:
            offline = True  # the library has tried several times, and would again for each file
        except errors.EntryNotFoundError:
            continue


def check_code(files: Iterable[Path], own: str = "") -> None:
    """Check that these JSON files name no code of another repository. Files that are not JSON are passed over.

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
            Problem(code, what, str(file), ".".join(keys), fix)
            for keys, text in names
            for code, what, fix in _objections(keys, text, own)
        ]
    if problems:
        raise ModelError(problems)


def check_hub_kernels(config: Any, where: str) -> None:
    """Check that a model's configuration names no kernel of the hub.

    Raises:
        ModelError: It names one.
    """
    parts = [("", config), *((f"{name}.", vars(config).get(name)) for name in config.sub_configs)]
    for prefix, part in parts:
        kernel = upstream.attention(part) if part is not None else None
        if isinstance(kernel, str) and "/" in kernel:
            what, key = f"names a kernel of another repository, {kernel}", f"{prefix}attn_implementation"
            raise ModelError(Problem(Code.MODEL_FOREIGN_KERNEL, what, where, key, "take it out of config.json"))


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


def _objections(keys: tuple[str, ...], text: str, own: str) -> Iterator[tuple[Code, str, str]]:
    """Why code of this name would not be that of the model's own repository, and what to do about it."""
    repository, separator, rest = text.rpartition("--")
    if "base_model_name_or_path" in keys:
        what = f"names another repository, {text}, whose code would be run"
        yield Code.MODEL_FOREIGN_CODE, what, "name that one as the base"
    elif separator and repository != own:
        fix = "copy that code into the model's directory once you have read it, and name it there as module.Class"
        yield Code.MODEL_FOREIGN_CODE, f"names code of another repository, {text}", fix
    elif "auto_map" in keys and not _CLASS.fullmatch(rest):
        yield Code.MODEL_CODE_NAME, f"names code in no module of this repository, {text}", "name it as module.Class"
