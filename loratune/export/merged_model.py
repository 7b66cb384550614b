"""The configurations, tokenizer and card of a merged model, and its comparison with the adapter."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GenerationConfig

from loratune import memory
from loratune.adapter import loading
from loratune.adapter.card import base_licence
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.errors import ModelError, Problem
from loratune.events import counting, progress
from loratune.export.comparison import Texts, agreement, answered, logits, shortened
from loratune.export.merging import Merge, name_of
from loratune.model import checks, load, tensor_files
from loratune.model.quantization import remove_record
from loratune.model.source import local_or_hub
from loratune.model.upstream import quiet_transformers
from loratune.system import hub_kernels
from loratune.system.files import write_json
from loratune.text import markdown

CONFIG, GENERATION = "config.json", "generation_config.json"
_NEW_TOKENS = 32
"""The number of answer tokens that are appended to a prompt."""
_MOST_TOKENS = 1024
"""The maximum number of tokens of a text that are compared."""
_LOGITS = 1 << 30
"""The maximum size in bytes of the logits of two models that are in memory."""


def write_configs(staging: Path, source: AdapterDirectory, merge: Merge, end_ids: Sequence[int]) -> None:
    """Write config.json, based on the base's file, and generation_config.json.

    Args:
        staging: The directory of the model.
        source: The adapter.
        merge: The merge that wrote the weights.
        end_ids: The tokens that end an answer in the format of training.

    Raises:
        ModelError: The generation configuration of the base cannot be read.
    """
    file = None if merge.is_loaded else tensor_files.file(source.base, CONFIG)
    values = json.loads(file.read_text(encoding="utf-8")) if file else merge.config.to_diff_dict()
    if remove_record(values) and "torch_dtype" not in values:
        values.setdefault("dtype", name_of(tensor_files.dense_dtype(merge.config)))
    changes: dict[str, Any] = {"tie_word_embeddings": False} if merge.untied else {}
    if merge.dtype is not None:
        values.pop("torch_dtype", None)
        changes["dtype"] = name_of(merge.dtype)
    values |= changes
    nested = changes | ({"torch_dtype": changes["dtype"]} if merge.dtype is not None else {})
    for part in (part for part in values.values() if isinstance(part, dict)):
        part |= {key: value for key, value in nested.items() if key in part}
    write_json(staging / CONFIG, values)
    generation = _generation(source, merge.config)
    eos = generation.get("eos_token_id")
    known = [token for token in (eos if isinstance(eos, list) else [eos]) if type(token) is int]
    ids = [*known, *(token for token in end_ids if token not in known)]
    generation["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    write_json(staging / GENERATION, generation)


def _generation(source: AdapterDirectory, config: Any) -> dict[str, Any]:
    """The generation configuration of the base. Raises ModelError: its file cannot be read."""
    file = tensor_files.file(source.base, GENERATION)
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
        raise ModelError(Problem(Code.MODEL_UNREADABLE, what, str(file), fix=fix))
    return dict(values)


def write_tokenizer(staging: Path, source: AdapterDirectory, tokenizer: Any) -> None:
    """Write the tokenizer with its chat template; if the adapter has a tokenizer, its files are copied unchanged."""
    if source.has_tokenizer:
        source.copy_tokenizer(staging)
    else:
        tokenizer.save_pretrained(staging)


def write_card(staging: Path, source: AdapterDirectory, lines: Sequence[str]) -> None:
    """Write the model card. lines: how the model was made and compared."""
    name = source.base.name_or_path
    is_hub_id = local_or_hub(name) == name and not Path(name).exists()
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["loratune"]}
    head |= {"base_model": name, "base_model_relation": "finetune"} if is_hub_id else {}
    head |= base_licence({"name_or_path": name, "revision": source.base.revision})
    if arguments := source.data.chat_template_kwargs:
        lines = [*lines, f"prompts are rendered with these arguments of the chat template: {json.dumps(arguments)}"]
    listed = "\n".join(f"- {markdown(line)}" for line in lines)
    title = markdown(f"{Path(source.files.path).resolve().name}, merged")
    text = f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {title}\n\n{listed}\n"
    (staging / "README.md").write_text(text, encoding="utf-8")


def dtype_that_fits(parameters: int, stored_dtypes: Sequence[str]) -> str | None:
    """The dtype in which base and merged model are compared, one after the other: float32 if memory allows.

    Args:
        parameters: The number of parameters of the model.
        stored_dtypes: The dtypes of the merged model.

    Returns:
        The name of the dtype; None if the model does not fit in any.
    """
    free = memory.available(load.device()) - 2 * _LOGITS
    widths = {"float32": 4, **{name: 2 for name in stored_dtypes if name in ("bfloat16", "float16")}}
    return next((name for name, width in widths.items() if parameters * width < free), None)


@progress("comparing the merged model")
@torch.inference_mode()
@quiet_transformers()
def compare(source: AdapterDirectory, staging: Path, texts: Texts, dtype: str) -> dict[str, Any]:
    """Compare the logits of the merged model, loaded by stock transformers, with those of the adapter and the base.

    Args:
        source: The adapter.
        staging: The merged model.
        texts: The texts to compare on; prompts are extended by the beginning of the adapter's answers.
        dtype: The dtype in which all models are computed.

    Returns:
        `adapter` and `base`: the `Agreement` of the merged model with each; `dtype`; `texts`: the number of texts.
    """
    loaded = loading.load_computing_in(dtype, source)
    device, context = loaded.model.device, load.context_length(loaded.model.config) or _MOST_TOKENS
    ids = [list(text)[: min(_MOST_TOKENS, context)] for text in texts.ids]
    if not texts.complete:
        prompts = [text[: max(1, context - _NEW_TOKENS)] for text in ids]
        with progress("answering prompts"):
            answers = answered(loaded, prompts, _NEW_TOKENS)
        ids = [text + answer for text, answer in zip(prompts, answers, strict=True)]
    ids = list(shortened(ids, max(1, _LOGITS // (8 * loaded.model.config.get_text_config().vocab_size))))
    adapter = _logits(loaded.model, ids, "base and adapter")
    with loaded.without_adapter():
        base = _logits(loaded.model, ids, "the base")
    loader, attention = checks.auto_class(loaded.model.config), source.base.attn_implementation
    del loaded
    with progress("loading the merged model"):
        settings = {"dtype": getattr(torch, dtype), "attn_implementation": attention, "use_kernels": False}
        with hub_kernels.hidden():
            merged = loader.from_pretrained(staging, **settings)
        merged = merged.eval().to(device)
    found = _logits(merged, ids, "the merged model")
    return {
        "adapter": agreement(zip(adapter, found, strict=True)).to_dict(),
        "base": agreement(zip(base, found, strict=True)).to_dict(),
        "dtype": dtype,
        "texts": len(ids),
    }


def _logits(model: Any, ids: Sequence[Sequence[int]], what: str) -> list[torch.Tensor]:
    """The logits of texts, see `logits`. what: the model in words, for the progress."""
    found = []
    with counting(f"computing the predictions of {what}, in texts", len(ids)) as advance:
        for text in ids:
            found.append(logits(model, text))
            advance(1)
    return found
