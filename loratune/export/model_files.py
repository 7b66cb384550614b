"""The files of a merged model beside its weights: configurations, tokenizer, card."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from loratune import escaping
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.errors import ModelError, Problem
from loratune.model import stored
from loratune.model.source import local_or_hub
from loratune.system.files import write_json

CONFIG, GENERATION = "config.json", "generation_config.json"


def write_configs(
    staging: Path, source: AdapterDirectory, config: Any, *, dtype: str | None, untied: bool, end_ids: Sequence[int]
) -> None:
    """Write the configuration, as the base has it, and that of generation.

    Args:
        staging: The directory of the model.
        source: The adapter.
        config: The base's configuration, which is written where the base has no file of it that says the same.
        dtype: The dtype of the merged model; None is that of the base.
        untied: Whether embeddings that the base ties are stored apart.
        end_ids: The tokens that end an answer in the format of training.
    """
    if not (staging / CONFIG).is_file():
        file = stored.file(source.base, CONFIG)
        values = json.loads(file.read_text(encoding="utf-8")) if file else config.to_dict()
        _change(values, dtype, untied)
        write_json(staging / CONFIG, values)
    generation = _generation(source, config)
    eos = generation.get("eos_token_id")
    known = [token for token in (eos if isinstance(eos, list) else [eos]) if type(token) is int]
    ids = [*known, *(token for token in end_ids if token not in known)]
    generation["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    write_json(staging / GENERATION, generation)


def _generation(source: AdapterDirectory, config: Any) -> dict[str, Any]:
    """How the base generates. Raises ModelError: the file that says it cannot be read."""
    file = stored.file(source.base, GENERATION)
    if file is None:
        made: dict[str, Any] = GenerationConfig.from_model_config(config).to_diff_dict()
        return made
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        reason = "" if isinstance(values, dict) else "it holds no object"
    except (ValueError, RecursionError) as error:
        values, reason = {}, str(error)
    if reason:
        what, fix = f"not readable as JSON: {reason}", "restore the file, or remove it"
        raise ModelError(Problem(Code.MODEL_CONFIG_UNREADABLE, what, str(file), fix=fix))
    return dict(values)


def _change(values: dict[str, Any], dtype: str | None, untied: bool) -> None:
    """Change what the configuration says of dtype and tied embeddings, in its parts too."""
    nested = [part for part in values.values() if isinstance(part, dict)]
    if dtype is not None:
        values.pop("torch_dtype", None)
        values["dtype"] = dtype
        for part in nested:
            part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part})
    if untied:
        values["tie_word_embeddings"] = False
        for part in nested:
            part.update({key: False for key in ("tie_word_embeddings",) if key in part})


def write_tokenizer(staging: Path, source: AdapterDirectory, tokenizer: Any) -> None:
    """Write the tokenizer with its chat template: that of the adapter, byte for byte, if the adapter has one."""
    if not (source.files.path / "tokenizer_config.json").is_file():
        tokenizer.save_pretrained(staging)
        return
    source.copy_tokenizer(staging)


def write_card(staging: Path, source: AdapterDirectory, lines: Sequence[str]) -> None:
    """Write the model card. lines: how the model came about, and how it was compared."""
    name = source.base.name_or_path
    is_hub_id = local_or_hub(name) == name and not Path(name).exists()
    base = [f"base_model: {name}", "base_model_relation: finetune"] if is_hub_id else []
    head = "\n".join(["---", "library_name: transformers", "pipeline_tag: text-generation", *base, "---"])
    listed = "\n".join(f"- {escaping.markdown(line)}" for line in lines)
    title = escaping.markdown(f"{Path(source.files.path).resolve().name}, merged")
    text = f"{head}\n\n# {title}\n\n{listed}\n"
    (staging / "README.md").write_text(text, encoding="utf-8")
