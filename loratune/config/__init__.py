"""The configuration of a run: read from YAML, validated once, frozen. Imports no torch.

`portability` says which clients cannot read the adapter that a config asks for; better known before the run than after.
Portable is plain LoRA of linear layers with r ≤ 16, whole lora_alpha and no biases. Sources, as of 2026:
vllm/lora/peft_helper.py: one scale, lora_alpha / r, for all modules; no DoRA, biases or saved modules; ranks above 16
need --max-lora-rank. llama.cpp's convert_lora_to_gguf.py: lora_alpha as it stands, r by the tensors' shapes; A and B
only. Ollama reads what llama.cpp converts.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loratune.config import yaml_reader
from loratune.config.data_section import DataSection, Source
from loratune.config.file_paths import OUTPUT, input_paths, path_keys, paths, with_paths
from loratune.config.lora_section import LoraSection
from loratune.config.preference_section import DEFAULT_BETA, PREFERENCE_KEYS, PreferenceSection
from loratune.config.schema import ModelSection, RunConfig, TrainingSection
from loratune.config.section import AUTO, decided
from loratune.config.yaml_reader import translate
from loratune.config.yaml_writer import Draft, dump_values
from loratune.errors import ConfigError

__all__ = [
    "AUTO",
    "DEFAULT_BETA",
    "OUTPUT",
    "PREFERENCE_KEYS",
    "DataSection",
    "Draft",
    "LoraSection",
    "ModelSection",
    "PreferenceSection",
    "RunConfig",
    "Source",
    "TrainingSection",
    "decided",
    "draft",
    "dump",
    "for_model",
    "from_draft",
    "from_values",
    "input_paths",
    "load",
    "load_with_lines",
    "parse",
    "path_keys",
    "paths",
    "portability",
    "with_paths",
]


def load(path: Path, assignments: Sequence[str] = ()) -> RunConfig:
    """Read a config file, apply `section.key=value` assignments over it, and validate the whole.

    Raises ConfigError with every problem of the file.
    """
    return load_with_lines(path, assignments)[0]


def load_with_lines(path: Path, assignments: Sequence[str] = ()) -> tuple[RunConfig, yaml_reader.Document]:
    """As `load`; also returns the values as they are written, and where each stands."""
    document = _overridden(yaml_reader.read(path), assignments)
    return _validated(document), document


def for_model(name_or_path: str, assignments: Sequence[str] = ()) -> RunConfig:
    """The default config for a model, with assignments over it, for what needs no rows. Raises ConfigError."""
    values = {"model": {"name_or_path": name_or_path}, "data": {"train": "rows"}, "output_dir": "adapter"}
    return from_values(values, "--model", assignments)


def from_values(values: dict[str, Any], source: str, assignments: Sequence[str] = ()) -> RunConfig:
    """Validate plain values as those of a file called `source`; assignments are applied to them, and change them.

    Raises ConfigError.
    """
    return _validated(draft(values, source, assignments).document)


def draft(values: dict[str, Any], source: str, assignments: Sequence[str] = ()) -> Draft:
    """A config in the making, as `from_values`, but for what is wrong with its values."""
    return Draft(_overridden(yaml_reader.Document(source, values), assignments))


def from_draft(draft: Draft) -> RunConfig:
    """Validate a config in the making. Raises ConfigError."""
    return _validated(draft.document)


def parse(text: str, source: str) -> RunConfig:
    """Validate YAML text as that of a file called `source`. Raises ConfigError."""
    return _validated(yaml_reader.parse(text, source))


def _overridden(document: yaml_reader.Document, assignments: Sequence[str]) -> yaml_reader.Document:
    for assignment in assignments:
        yaml_reader.override(document, assignment)
    return document


def _validated(document: yaml_reader.Document) -> RunConfig:
    try:
        return RunConfig.model_validate(document.values)
    except ValidationError as error:
        raise ConfigError(translate(error, document)) from None


def dump(config: RunConfig) -> str:
    """The resolved config as YAML text that `load` reads back to an equal config."""
    return dump_values(config.resolved())


VLLM_RANK = 16
"""The highest rank that vLLM reads without --max-lora-rank."""

Limit = tuple[Callable[[LoraSection], bool], str]

_NOT_PLAIN: tuple[Limit, ...] = (
    (lambda lora: lora.use_dora, "lora.use_dora: vLLM, llama.cpp and Ollama do not read DoRA"),
    (lambda lora: lora.bias != "none", "lora.bias: vLLM, llama.cpp and Ollama do not read biases"),
    (
        lambda lora: lora.target_parameters is not None,
        "lora.target_parameters: llama.cpp and Ollama do not read LoRA of experts, and vLLM of some models only; "
        "loratune merge makes a model for them",
    ),
    (
        lambda lora: lora.modules_to_save is not None,
        "lora.modules_to_save: vLLM, llama.cpp and Ollama do not read whole modules",
    ),
    (
        lambda lora: lora.trainable_token_indices is not None,
        "lora.trainable_token_indices: vLLM, llama.cpp and Ollama do not read trained tokens",
    ),
    (
        lambda lora: lora.init_lora_weights == "loftq",
        "lora.init_lora_weights: loftq compensates for what 4bit loses, so the adapter is off on an unquantized base",
    ),
)
"""What plain LoRA does not hold, or not on the base as others load it."""
_SCALES: tuple[Limit, ...] = (
    (
        lambda lora: lora.use_rslora,
        "lora.use_rslora: llama.cpp and Ollama apply such an adapter with another scale, without saying so",
    ),
    (
        lambda lora: bool(lora.rank_pattern) and not lora.alpha_pattern,
        "lora.rank_pattern: vLLM applies such an adapter with one scale for all modules, without saying so",
    ),
    (
        lambda lora: bool(lora.alpha_pattern),
        "lora.alpha_pattern: vLLM, llama.cpp and Ollama apply one scale to all modules, without saying so",
    ),
)


def is_rank_doubled(lora: LoraSection) -> bool:
    """Whether the adapter's file has twice the rank that is trained."""
    return str(lora.init_lora_weights).startswith(("pissa", "olora"))


def highest_rank(lora: LoraSection) -> int:
    """The largest rank in the adapter's file."""
    return max([decided(lora.r), *lora.rank_pattern.values()]) * (2 if is_rank_doubled(lora) else 1)


def is_plain(lora: LoraSection) -> bool:
    """Whether the adapter is plain LoRA, so that `loratune export` can make it readable for vLLM and llama.cpp."""
    return not any(applies(lora) for applies, _ in _NOT_PLAIN)


def has_one_scale(lora: LoraSection) -> bool:
    """Whether all modules have one scale, so that vLLM reads the adapter as it is."""
    return not lora.rank_pattern and not lora.alpha_pattern


def portability(lora: LoraSection) -> Iterator[str]:
    """One line for each choice that is not portable, with the clients that cannot read the adapter.

    A rank that is still `auto` counts as portable.
    """
    yield from (line for applies, line in (*_NOT_PLAIN, *_SCALES) if applies(lora))
    if lora.r == AUTO:
        return
    init, rank = lora.init_lora_weights, highest_rank(lora)
    if is_rank_doubled(lora):
        yield f"lora.init_lora_weights: {init} is saved as plain LoRA of twice the rank, {rank}"
    if is_rank_doubled(lora) and lora.use_rslora:
        yield f"lora.use_rslora: with {init}, lora_alpha is saved times √2; llama.cpp and Ollama need a whole number"
    if rank > VLLM_RANK:
        key = "lora.r" if lora.r == max([lora.r, *lora.rank_pattern.values()]) else "lora.rank_pattern"
        yield f"{key}: the file's rank is {rank}; vLLM reads it with --max-lora-rank {rank} only"
