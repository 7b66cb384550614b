"""The source of a base model, a local directory or a repository of the hub, and how the base is quantized. This module
does not import torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import transformers
from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

from loratune.codes import Code
from loratune.config import ModelSection
from loratune.errors import ConfigError, ModelError, Problem, missing_package
from loratune.model import upstream
from loratune.system.environment import cache_fix
from loratune.system.launcher import sharding

if TYPE_CHECKING:
    import torch

KEY = "model.name_or_path"
GGUF_KEY = "model.gguf_file"
QUANTIZATION_KEY = "model.quantization"


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
        raise ModelError(Problem(Code.MODEL_HUB_UNREACHABLE, what, name, GGUF_KEY, cache_fix(error))) from None
    check_gguf(path)
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
            as `check_gguf`.
    """
    path, key, fix = Path(name_or_path).expanduser(), KEY, ""
    if gguf_file is not None and (PurePath(gguf_file).is_absolute() or ".." in PurePath(gguf_file).parts):
        fix = "name the directory in model.name_or_path, and only the file here"
        raise ModelError(Problem(Code.MODEL_NOT_FOUND, "leads out of the model directory", gguf_file, GGUF_KEY, fix))
    if path.is_dir() and revision is not None and not trusted:
        what, key, fix = "a directory has no revisions", "model.revision", "leave it out"
    elif path.is_dir():
        if gguf_file is not None:
            check_gguf(path / gguf_file)
        if gguf_file is not None or (path / "config.json").is_file():
            return True
        files = sorted(file.name for file in path.glob("*.gguf"))
        what = "no config.json in this directory, so it holds no model"
        fix = f"set {GGUF_KEY} to {' or '.join(files[:3])}" if files else "name the directory that has one"
    elif path.exists():
        what = "is a file, not a model directory"
        fix = f"name its directory, and set {GGUF_KEY}: {path.name}" if path.suffix == ".gguf" else "name its directory"
    elif name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        what, fix = "no such directory", "check the path"
    else:
        return False
    raise ModelError(Problem(Code.MODEL_NOT_FOUND, what, name_or_path, key, fix))


def local_or_hub(name_or_path: str) -> str:
    """The name by which a model can be found from anywhere: an absolute path for a directory, else the hub id."""
    path = Path(name_or_path).expanduser()
    return str(path.absolute()) if path.is_dir() else name_or_path


def cached_directory(section: ModelSection) -> Path | None:
    """The directory of a model, on this machine or in the cache of the hub; None if it is not in the cache."""
    directory, file = Path(local_or_hub(section.name_or_path)), section.gguf_file
    if directory.is_dir():
        return directory
    cached = try_to_load_from_cache(section.name_or_path, file or "config.json", revision=section.revision)
    return Path(cached).parents[len(Path(file).parts) - 1 if file else 0] if isinstance(cached, str) else None


def check_repository(name: str, revision: str | None, file: str = "config.json", *, perhaps_path: bool = True) -> None:
    """Determine why a model cannot be downloaded from the hub; transformers reports most reasons as one OSError.

    Args:
        name: The repository.
        revision: A branch, tag or commit of it.
        file: One that it must have.
        perhaps_path: Whether the name might have been meant as the path of a directory.

    Raises:
        ModelError: No such repository, or it is gated; no such revision or file; offline and not cached.
    """
    code, fix, key = Code.MODEL_NOT_FOUND, "", KEY
    neither = "no such directory, and " if perhaps_path else ""
    try:
        if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            return
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision), timeout=10)
        return
    except errors.GatedRepoError:
        code, what = Code.MODEL_GATED, "this repository is gated"
        fix = f"accept its terms on https://huggingface.co/{name} and log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        what, key = f"the repository has no revision {revision}", "model.revision"
    except errors.RepositoryNotFoundError:
        what, fix = f"{neither}no such repository on the hub", "check the name; private ones need `hf auth login`"
    except errors.EntryNotFoundError:
        is_config = file == "config.json"
        what, key = (
            f"the repository has no {file}{', so it holds no model' * is_config}",
            KEY if is_config else GGUF_KEY,
        )
    except errors.HFValidationError:
        what = f"{neither}not the id of a repository"
    except Exception as error:  # whatever the network stack raises
        code = Code.MODEL_HUB_UNREACHABLE
        what = f"{neither}the hub cannot be reached and the model is not cached ({summary(error)})"
        fix = cache_fix(error) or f"check {'the path, or ' if perhaps_path else ''}the connection"
    raise ModelError(Problem(code, what, name, key, fix))


def summary(error: BaseException) -> str:
    """The first line of an error, and the next where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, KeyError):
        return f"unknown: {lines[0]}"
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text.partition(". ")[0]


# --- GGUF files: whether a file is one, and whether it is complete

LFS_START = b"version https://git-lfs"
"""How a file begins that Git LFS left as a pointer to the real one."""

_checked: set[tuple[int, ...]] = set()
"""Device, inode, size and time of change of the files that this process has found to be whole."""


def check_gguf(path: Path) -> None:
    """Check that transformers will be able to read this file, which is read once as long as it does not change.

    Raises:
        ModelError: The file does not exist, is a Git LFS pointer, is not GGUF or of a version that transformers does
            not read, is one part of several, or is cut off; the package gguf is missing.
    """
    where = str(path)
    if not path.is_file():
        files = sorted(file.name for file in path.parent.glob("*.gguf"))
        fix = f"there is {', '.join(files[:3])}" if files else "no GGUF file is in that directory"
        raise ModelError(Problem(Code.MODEL_NOT_FOUND, "no such file", where, GGUF_KEY, fix))
    if find_spec("gguf") is None:
        code = Code.SYSTEM_MISSING_PACKAGE
        raise ModelError(missing_package(code, "gguf", "reads GGUF files", "gguf", where, GGUF_KEY))
    now = path.stat()
    version = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns)
    if version in _checked:
        return
    with path.open("rb") as file:
        if file.read(len(LFS_START)) == LFS_START:
            raise ModelError(lfs_pointer(path))
    try:
        split = import_module("gguf").GGUFReader(path).get_field("split.count")
        parts = 1 if split is None else int(split.parts[-1][0])
    except (ValueError, KeyError, IndexError, OverflowError, RecursionError) as error:
        what, fix = f"damaged, cut off or of another format: {summary(error)}", "download it again"
        raise ModelError(Problem(Code.MODEL_DAMAGED, what, where, GGUF_KEY, fix)) from None
    if parts > 1:
        what, fix = f"one of {parts} parts, which transformers does not join", "join them: llama-gguf-split --merge"
        raise ModelError(Problem(Code.MODEL_DAMAGED, what, where, GGUF_KEY, fix))
    _checked.add(version)


def lfs_pointer(path: Path) -> Problem:
    """The problem of a file of weights that is only a pointer of Git LFS."""
    what, fix = "a Git LFS pointer, not the weights", "fetch them with `git lfs pull`"
    return Problem(Code.MODEL_DAMAGED, what, str(path), fix=fix)


# --- Quantized bases: what their config.json records, and how transformers loads them

_DEQUANTIZED = {
    "compressed-tensors": "CompressedTensorsConfig",
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "mxfp8": "FineGrainedFP8Config",
}
"""`quant_method` → transformers' class of its settings, for bases that are dequantized as they are loaded: transformers
computes with them, but does not have a backward for them on every machine."""


def record_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a model's configuration records of its quantization; None for a plain model. Multimodal ones may nest it."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            for key in ("quantization_config", "compression_config"):
                if isinstance(part.get(key), Mapping) and part[key]:
                    return dict(part[key])
    return None


def method(record: Mapping[str, Any]) -> str:
    """The name of a recorded quantization."""
    if record.get("load_in_4bit") or record.get("load_in_8bit"):
        return "bitsandbytes"
    return str(record.get("quant_method") or "unknown")


def check_bitsandbytes(quantization: str, reason: str | None = None) -> None:
    """Check that bitsandbytes works, which is imported only if it is needed.

    Args:
        quantization: The setting.
        reason: Why it does not work; empty if it does, None to find out.

    Raises:
        ConfigError: 8bit or 4bit is set, and bitsandbytes does not work here.
    """
    if quantization != "none" and (reason := upstream.bitsandbytes_lacks() if reason is None else reason):
        what, fix = f"{quantization} does not work here: {reason}", "repair bitsandbytes, or set it to none"
        raise ConfigError(Problem(Code.MODEL_UNSUPPORTED, what, key=QUANTIZATION_KEY, fix=fix))


def loading_config(section: ModelSection, config: Any, compute_dtype: "torch.dtype") -> Any:
    """The `quantization_config` for `from_pretrained`; None leaves it to the model's own configuration.

    Args:
        section: The settings of the model.
        config: The model's configuration.
        compute_dtype: What 4-bit layers compute in.

    Raises:
        ModelError: transformers does not know how the base is quantized, or a package is missing.
    """
    if section.gguf_file is not None:
        return transformers.GgufConfig(dequantize=True)
    if (record := record_of(config.to_dict())) is not None:
        name = method(record)
        if name != "bitsandbytes" and not upstream.is_quantization_known(name):
            what = f"the base is quantized by a method that transformers does not know ({name})"
            fix = "use one that is not quantized, or by GPTQ"
            raise ModelError(Problem(Code.MODEL_UNSUPPORTED, what, section.name_or_path, fix=fix))
        try:
            return getattr(transformers, _DEQUANTIZED[name])(dequantize=True) if name in _DEQUANTIZED else None
        except ImportError as error:
            raise ModelError(Problem(Code.SYSTEM_MISSING_PACKAGE, str(error), section.name_or_path)) from None
    if section.quantization == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if section.quantization == "4bit":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_quant_storage=compute_dtype if sharding() == "fsdp" else None,  # FSDP does not shard bytes
        )  # fmt: skip
    return None


def check_trainable(model: "transformers.PreTrainedModel", name: str) -> None:
    """Check that transformers has a backward for the quantization in which this base is held.

    Raises:
        ModelError: It has none.
    """
    quantizer = upstream.quantizer(model)
    if quantizer is not None and not quantizer.is_trainable:
        what = f"a base quantized with {quantizer.quantization_config.quant_method.value} cannot be trained"
        fix = "use one that is not quantized, or by bitsandbytes or GPTQ"
        raise ModelError(Problem(Code.MODEL_UNSUPPORTED, what, name, fix=fix))
