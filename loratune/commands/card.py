"""What an adapter directory says about itself: the model card (README.md) and the provenance (loratune.json)."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import yaml

from loratune import escaping
from loratune.system import records

PACKAGES = ("loratune", "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "safetensors")

_QUANTIZATION = {
    "8bit": "load_in_8bit=True",
    "4bit": 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True',
}


def provenance(
    settings: Mapping[str, Any],
    metrics: Mapping[str, Any],
    curve: Sequence[Mapping[str, float]],
    fingerprints: Mapping[str, str | None],
) -> dict[str, Any]:
    """What made an adapter. settings: the resolved config."""
    return {
        records.KEY: records.VERSIONS[records.ADAPTER],
        "versions": {name: version(name) for name in PACKAGES},
        "machine": {"python": platform.python_version(), "platform": platform.platform()},
        "base": {key: settings["model"][key] for key in ("name_or_path", "revision", "gguf_file")},
        "fingerprints": dict(fingerprints),
        "seed": settings["training"]["seed"],
        "metrics": dict(metrics),
        "curve": [dict(entry) for entry in curve],
    }


def model_card(
    settings: Mapping[str, Any],
    metrics: Mapping[str, Any],
    name: str,
    prompt: str,
    *,
    gain: str,
    formats: Sequence[str],
    changes: Sequence[Mapping[str, Any]],
    processes: int = 1,
) -> str:
    """A model card as the hub reads it: metadata, then base, data, settings, result and use.

    gain: over the base, in a line.
    https://huggingface.co/docs/hub/model-cards
    """
    base = settings["model"]["name_or_path"]
    on_hub = not base.startswith("/")
    metadata = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "loratune"]}
    if on_hub:
        metadata |= {"base_model": base, "tags": ["lora", "loratune", f"base_model:adapter:{base}"]}
    held_out = f", held-out {metrics['held_out_loss']:.4f}" if metrics["held_out_loss"] is not None else ""
    together = f", on {processes} processes" if processes > 1 else ""
    shown = escaping.line(name)
    text = f"""---
{yaml.safe_dump(metadata, sort_keys=False)}---

# {shown}

A LoRA adapter for `{_named(settings["model"])}`{_held(settings["model"])}, trained with loratune {version("loratune")}.

- **Data:** {_sources(settings["data"]["train"])} ({", ".join(formats)})
- **Result:** loss {metrics["first_loss"]:.4f} → {metrics["last_loss"]:.4f}{held_out}
  over {metrics["steps"]:,} steps and {metrics["tokens"]:,} tokens
- **Gain:** {gain}
{_changed(changes)}- **Repeat it:** `loratune train run.yaml --set output_dir=NEW`{together}

## Use

```python
{_loading(settings["model"], name)}
```

or `loratune generate --adapter {escaping.shell(name)} {prompt}`

## Settings

```yaml
{yaml.safe_dump({"lora": settings["lora"], "training": settings["training"]}, sort_keys=False)}```
"""
    return escaping.text(text)


def _changed(changes: Sequence[Mapping[str, Any]]) -> str:
    """What was taken on while the run lasted, so that run.yaml does not tell all of it."""
    lines = (f"{one['key']} was {one['was']} up to step {one['step']}, then {one['is']}" for one in changes)
    return "".join(f"- **Changed on the way:** {line}\n" for line in lines)


def _loading(base: Mapping[str, Any], name: str) -> str:
    """The Python that loads base, adapter and tokenizer. Only a base that loads by its name alone needs no mention."""
    name = _quoted(name)
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({name})"
    if base["quantization"] != "none":
        return f"""from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, BitsAndBytesConfig

quantization = BitsAndBytesConfig({_QUANTIZATION[base["quantization"]]})
model = AutoPeftModelForCausalLM.from_pretrained({name}, quantization_config=quantization)
{tokenizer}"""
    if base["gguf_file"] is None:
        return f"""from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained({name})
{tokenizer}"""
    return f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

base = AutoModelForCausalLM.from_pretrained(
    {_quoted(base["name_or_path"])},
    gguf_file={_quoted(base["gguf_file"])},
    quantization_config=GgufConfig(dequantize=True),
)
model = PeftModel.from_pretrained(base, {name})
{tokenizer}"""


def _quoted(text: str) -> str:
    """Text as Python, and JSON, write it."""
    return escaping.line(json.dumps(text, ensure_ascii=not escaping.is_plain(text)))


def _sources(train: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    """One source, or several with their weights."""
    given = [train] if isinstance(train, Mapping) else train
    names = [f"`{escaping.line(one['path'])}`" + (f" [{one['split']}]" if one["split"] else "") for one in given]
    weights = [f" (weight {one['weight']:g})" if one["weight"] is not None else "" for one in given]
    return ", ".join(name + weight for name, weight in zip(names, weights, strict=True))


def _held(base: Mapping[str, Any]) -> str:
    return "" if base["quantization"] == "none" else f" in {base['quantization']}"


def _named(base: Mapping[str, Any]) -> str:
    return escaping.line("/".join(base[key] for key in ("name_or_path", "gguf_file") if base[key]))
