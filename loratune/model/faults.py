"""What is wrong with a model, in words that name the file and the way out."""

from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from loratune.config import ModelSection
from loratune.errors import ModelError, Problem
from loratune.model import source
from loratune.model.gguf import LFS

LOADING = (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, SafetensorError, UnpicklingError)
"""What transformers, torch and safetensors raise for a model that cannot be loaded."""


def unreadable(part: str, section: ModelSection, error: BaseException) -> ModelError:
    """The error for a part of a model (configuration, tokenizer, model) that a library failed to load."""
    if isinstance(error, ModelError):
        return error
    if "trust_remote_code" in str(error):
        fix = "read that code, then set model.trust_remote_code: true and model.revision to the commit you read"
        return ModelError(Problem("the model needs code from its repository", section.name_or_path, fix=fix))
    return ModelError(Problem(f"the {part} cannot be loaded: {summary(error)}", section.name_or_path))


def summary(error: BaseException) -> str:
    """The first line of an error, and the next where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, KeyError):
        return f"unknown: {lines[0]}"
    announced = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return announced.partition(". ")[0]


def damaged_weights(section: ModelSection) -> Iterator[Problem]:
    """The weight files that are no such thing: what the libraries report does not name the file."""
    place = Path(source.local_or_hub(section.name_or_path))
    if not place.is_dir():
        cached = try_to_load_from_cache(section.name_or_path, "config.json", revision=section.revision)
        place = Path(str(cached)).parent
    for file in sorted([*place.glob("*.safetensors"), *place.glob("*.bin")]):
        with file.open("rb") as opened:
            pointer = opened.read(len(LFS)) == LFS
        if pointer:
            yield Problem("a Git LFS pointer, not the weights", str(file), fix="fetch them with `git lfs pull`")
        elif file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                yield Problem(f"damaged or cut off: {summary(error)}", str(file), fix="fetch it again")
