"""The model card (README.md) and the provenance record (loratune.json) of an adapter directory."""

import json
import logging
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download

from loratune import __version__
from loratune.config import DEFAULT_BETA, PREFERENCE_KEYS
from loratune.config.template_arguments import FIELD
from loratune.data import DatasetSplit
from loratune.data.formats import IGNORED, Conversation, Example, Plain, Single, sides
from loratune.data.sources import GIVEN
from loratune.system import release
from loratune.system.files import versioned
from loratune.text import code_block, code_span, is_printable_line, markdown, one_line, printable, shell_word

_log = logging.getLogger(__name__)
_README_CHARACTERS = 1 << 20
_METADATA = re.compile(r"\s*---\n(.*?)\n---(?:\n|\Z)", re.DOTALL)
_VALUES = {"license": r"\S.{0,199}", "license_name": r"\S.{0,199}", "license_link": r"https?://\S{1,500}"}
"""What a card takes over from that of its base, and the values that it may have."""
_SYSTEM = """
All training rows had the same system message, which this card does not show. loratune reads it in `loratune.json`
(`system`) and uses it by default; other programs need it in each request. Uploads are without it, unless they were made
with `loratune push --with-system`.
"""
_LICENCE = re.compile(rf"^(?:{'|'.join(_VALUES)}):.*(?:\n[ -].*)*", re.MULTILINE)
"""One of these entries. The others are not read: it can take seconds to parse thousands of tags as YAML."""
PACKAGES = ("loratune", "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "safetensors")


def provenance(
    settings: Mapping[str, Any],
    metrics: Mapping[str, Any],
    curve: Sequence[Mapping[str, float]],
    fingerprints: Mapping[str, str | None],
    quantized: str | None,
) -> dict[str, Any]:
    """The provenance record of an adapter.

    Args:
        settings: The resolved config.
        metrics: The metrics of the run.
        curve: Losses by step.
        fingerprints: Fingerprints of the base and the rows.
        quantized: The method by which the base is quantized in its files; None if it is not.
    """
    return versioned(
        {
            "versions": release.versions(PACKAGES),
            "machine": {"python": platform.python_version(), "platform": platform.platform()},
            "base": {key: settings["model"][key] for key in ("name_or_path", "revision", "gguf_file")}
            | {"quantized": quantized},
            "fingerprints": dict(fingerprints),
            "seed": settings["training"]["seed"],
            "metrics": dict(metrics),
            "curve": [dict(entry) for entry in curve],
        }
    )


@dataclass(frozen=True)
class CardLines:
    """The parts of a model card that a run supplies.

    Attributes:
        use: The section on using the adapter, see `clients.sections`.
        verdict: The verdict on the adapter as a sentence.
        gain: A line comparing its loss with that of its base.
        side_effects: Lines on `unrelated text`, on the `base's answers` to everyday instructions and, if the adapter
            started from another one, on `earlier rows`.
        held_out: Results on held-out rows, as labels and lines.
        formats: The formats of the rows.
        example: A prompt, see `example`.
        changes: Settings that were changed when the run was resumed.
        objective: A line on the training objective, for preferences.
        processes: The number of processes of the run.
        has_system: Whether all training rows had the same system message.
    """

    use: str
    verdict: str
    gain: str
    side_effects: Mapping[str, str]
    held_out: Sequence[tuple[str, str]]
    formats: Sequence[str]
    example: Mapping[str, Any]
    changes: Sequence[Mapping[str, Any]]
    objective: str = ""
    processes: int = 1
    has_system: bool = False


def model_card(settings: Mapping[str, Any], metrics: Mapping[str, Any], name: str, lines: CardLines) -> str:
    """A model card for the hub: metadata, then base, data, settings, result and use.

    https://huggingface.co/docs/hub/model-cards

    Args:
        settings: The resolved config.
        metrics: The metrics of the run.
        name: The name of the adapter directory.
        lines: The parts of the card that the run supplies.
    """
    model = settings["model"]
    base = model["name_or_path"]
    base_name = code_span("/".join(model[key] for key in ("name_or_path", "gguf_file") if model[key]))
    base_name += "" if model["quantization"] == "none" else f" in {model['quantization']}"
    metadata = _metadata(settings, metrics, name, lines, on_hub=not base.startswith("/"))
    held_out_lines = "".join(f"- **{label.capitalize()}:** {text}\n" for label, text in lines.held_out)
    process_note = f", on {lines.processes} processes" if lines.processes > 1 else ""
    objective_line = f"- **Objective:** {lines.objective}\n" if lines.objective else ""
    reasons = f"- **Reasons:** {found}\n" if (found := lines.side_effects.get("reasons")) else ""
    history = _start_lines(settings, lines.side_effects) + _change_lines(lines.changes)
    # Not huggingface_hub's ModelCardData.to_yaml, which leaves directional marks and invisible characters unescaped.
    text = f"""---
{yaml.safe_dump(metadata, sort_keys=False)}---

# {markdown(name)}

A LoRA adapter for {base_name}, trained with loratune {__version__}.

- **Data:** {_sources(settings["data"]["train"])} ({", ".join(lines.formats)})
{objective_line}- **Result:** loss {metrics["first_loss"]:.4f} → {metrics["last_loss"]:.4f}
  over {metrics["steps"]:,} steps and {metrics["tokens"]:,} tokens
{held_out_lines}- **Verdict:** {markdown(lines.verdict)}
- **Gain:** {lines.gain}
- **Unrelated text:** {lines.side_effects["unrelated text"]}
- **Base's answers:** {lines.side_effects["base's answers"]}
{reasons}{history}- **Repeat it:** `loratune train run.yaml --set output_dir=NEW`{process_note}

## Use

{lines.use}
{_SYSTEM if lines.has_system else ""}
## Settings

{code_block(yaml.safe_dump(_shown_settings(settings), sort_keys=False), "yaml")}
"""
    return printable(text)


def _shown_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The config sections shown on the card: lora, training, and the keys of preferences that the objective uses."""
    objective, preferences = settings["training"]["objective"], settings["preferences"]
    read = {key: value for key, value in preferences.items() if objective in PREFERENCE_KEYS[key]}
    if read and read["beta"] is None:
        read["beta"] = DEFAULT_BETA[objective]
    return {name: settings[name] for name in ("lora", "training")} | ({"preferences": read} if read else {})


def example(rows: DatasetSplit, system: str = "", max_length: int = 200) -> dict[str, Any]:
    """The shortest prompt of the first rows, as in `recorded_prompts`; empty if none is suitable.

    Args:
        rows: The training rows.
        system: The system message that is recorded, which the prompt is shown without.
        max_length: The maximum length of the prompt, in characters.
    """
    prompts = (_without(system, _recorded_prompt(one)) for one in islice(rows.examples(), 100))
    typed = [(text, prompt) for prompt in prompts if 0 < len(text := _typed(prompt)) <= max_length]
    return min(typed, key=lambda one: (not is_printable_line(one[0]), len(one[0])))[1] if typed else {}


def example_command(adapter: str, rows: DatasetSplit | None, system: str) -> str:
    """The command that tries an adapter, after `loratune`, quoted for a shell: it completes the example; or begins a
    chat if there is none, as for conversations with tools or several messages; or takes a raw prompt on stdin.

    adapter: The directory. Others as for `example`; without rows there is no example.
    """
    prompt = _typed(example(rows, system)) if rows is not None else ""
    verb = "generate" if prompt or rows is None or not rows.chat else "chat"
    ends_options = "-- " if prompt.startswith("-") else ""
    return f"{verb} --adapter {shell_word(adapter)} {ends_options}{shell_word(prompt) if prompt else ''}".rstrip(" ")


def _without(system: str, prompt: dict[str, Any]) -> dict[str, Any]:
    """A prompt without this system message at its beginning."""
    first, *others = prompt.get("messages") or [{}]
    return prompt | {"messages": others} if system and first == {"role": "system", "content": system} else prompt


def prompt_text(example: Example, system: str) -> str:
    """The prompt of a row as text: a raw prompt or a single user turn; empty for others. system: see `example`."""
    return _typed(_without(system, _recorded_prompt(example)))


def _typed(prompt: Mapping[str, Any]) -> str:
    """A prompt as text for a command line: a raw prompt or a single user turn; empty for other prompts."""
    messages = prompt.get("messages", ())
    if len(messages) == 1 and messages[0]["role"] == "user" and "tools" not in prompt:
        return str(messages[0]["content"])
    return str(prompt.get("prompt", ""))


def recorded_prompts(rows: Iterable[Example], most: int = 8, max_length: int = 2000) -> list[dict[str, Any]]:
    """A few prompts of the rows, on which exports of the adapter can later be compared with it.

    Args:
        rows: The training rows; the first hundred are considered.
        most: The maximum number of prompts.
        max_length: The maximum length of a prompt, in characters of its JSON.

    Returns:
        Rows with one of the keys `prompt`, `messages` (with `tools` and `chat_template_kwargs`, if there are any) and
        `input_ids`.
    """
    prompts = (_recorded_prompt(example) for example in islice(rows, 100))
    texts = {text: prompt for prompt in prompts if prompt and len(text := json.dumps(prompt)) <= max_length}
    return list(islice(texts.values(), most))


def _recorded_prompt(of: Example) -> dict[str, Any]:
    example: Single = sides(of)[0]  # The sides of a pair have the same prompt.
    if isinstance(example, Plain):
        prompt = " ".join(example.completion.split(None, 8)[:8]) if example.whole else example.prompt
        return {"prompt": prompt} if prompt else {}
    if isinstance(example, Conversation):
        turns = example.supervised_turns("assistant")
        messages = [*example.messages[: turns[0]]] if turns else []
        others = {"tools": [*example.tools], FIELD: dict(example.arguments)}
        return {"messages": messages} | {key: value for key, value in others.items() if value} if messages else {}
    supervised = (number for number, label in enumerate(example.labels or ()) if label != IGNORED)
    return {"input_ids": [*example.ids[: max(next(supervised, 8), 1)]]}


def _start_lines(settings: Mapping[str, Any], side_effects: Mapping[str, str]) -> str:
    """The lines on the adapter that this one started from, and on its rows."""
    start, replay = settings["lora"]["start_from"], settings["data"]["replay"]
    if start is None:
        return ""
    replayed = f"; {replay:.1%} of the rows are replayed from its run" if replay is not None else ""
    return f"""- **Started from:** the adapter {code_span(start)}{replayed}.
  It is part of this one: use this one on the base without the other
- **Earlier rows:** {side_effects.get("earlier rows", "")}
"""


def _change_lines(changes: Sequence[Mapping[str, Any]]) -> str:
    """The lines on settings changed during the run: run.yaml has only their last values."""
    lines = (
        f"{change['key']} was {markdown(str(change['was']))} up to step {change['step']}, "
        f"then {markdown(str(change['is']))}"
        for change in changes
    )
    return "".join(f"- **Changed on the way:** {line}\n" for line in lines)


def _metadata(
    settings: Mapping[str, Any], metrics: Mapping[str, Any], name: str, lines: CardLines, on_hub: bool
) -> dict[str, Any]:
    """The metadata of the card, which the hub shows and searches: those of `ModelCardData`, and an example prompt."""
    base, data, names = settings["model"]["name_or_path"], settings["data"], {"messages": "messages", "prompt": "text"}
    tags = ["lora", "loratune", *([settings["training"]["objective"]] if lines.objective else [])]
    paths = dict.fromkeys(path for split in ("train", "validation", "test") for path in _paths(data[split]))
    results = _results(settings, metrics) or None
    metadata = ModelCardData(
        library_name="peft", pipeline_tag="text-generation", base_model=base if on_hub else None,
        tags=[*tags, *([f"base_model:adapter:{base}"] if on_hub else [])],
        datasets=[path for path in paths if not path.startswith(("/", GIVEN))] or None,
        widget=[{names[key]: value} for key, value in lines.example.items() if key in names] or None,
        model_name=one_line(name) if results else None, eval_results=results, **base_licence(settings["model"]),
    )  # fmt: skip
    return dict(metadata.to_dict())  # type: ignore[no-untyped-call]


def base_licence(model: Mapping[str, Any]) -> dict[str, Any]:
    """The licence in the card of the base, as metadata; empty if it is unknown. model: the section of the config."""
    name = model["name_or_path"]
    try:
        path = Path(name, "README.md")
        if not Path(name).is_dir():
            path = Path(hf_hub_download(name, path.name, revision=model["revision"]))
        if path.is_file():
            with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
                metadata = _METADATA.match(file.read(_README_CHARACTERS))
            if entries := [one[0] for one in _LICENCE.finditer(metadata[1] if metadata else "") if len(one[0]) <= 1000]:
                data = ModelCard("\n".join(["---", *entries, "---"])).data
                return {key: text for key, one in _VALUES.items() if re.fullmatch(one, text := _only(data.get(key)))}
    except Exception:  # whatever the network or somebody's card raises
        _log.debug("the licence of the base is unknown", exc_info=True)
    return {}


def _only(value: Any) -> str:
    """A text of one line, also as the only entry of a list; else an empty text."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return value if isinstance(value, str) and is_printable_line(value) else ""


def _results(settings: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[EvalResult]:
    """The losses on validation and test rows, and the reward accuracy. The hub has no field for an interval, which is
    therefore part of the name of a metric."""
    data, test, preferences = settings["data"], metrics.get("test"), metrics.get("preferences")
    unit = "nats per token" if metrics["gain"]["unit"] == "token" else f"per {metrics['gain']['unit']}"
    found = [("validation", "loss", unit, metrics["held_out_loss"], metrics["held_out_interval"])]
    if preferences and preferences["split"] == "validation":
        accuracy = preferences["reward_accuracy"]
        found.append(("validation", "accuracy", "reward accuracy", accuracy["value"], accuracy["interval"]))
    found += [("test", "loss", unit, test["loss"], test["interval"])] if test else []
    results = []
    for split, kind, label, value, ends in found:
        if value is not None:
            label += f" (95 % interval {ends[0]:.4f} to {ends[1]:.4f})" if ends else ""
            results.append(EvalResult(
                "text-generation", *_dataset(data[split], data["train"]), kind, round(value, 4), "Text generation",
                dataset_split=split, metric_name=label,
            ))  # fmt: skip
    return results


def _paths(sources: Any) -> list[str]:
    """The paths or hub ids of one or several sources; none for a fraction of the training rows."""
    listed = [sources] if isinstance(sources, Mapping) else sources if isinstance(sources, list | tuple) else ()
    return [one["path"] for one in listed]


def _dataset(source: Any, train: Any) -> tuple[str, str]:
    """Type and name of a dataset: its hub id, or its file names without local paths.

    source: one or several sources, or the fraction of the training rows that was held out.
    """
    paths = _paths(train if isinstance(source, float) else source)
    names = ", ".join(one_line(Path(path).name if path.startswith("/") else path) for path in paths)
    return names, f"{source:g} of {names}, held out" if isinstance(source, float) else names


def _sources(train: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    """The sources of training rows as Markdown, with their splits and weights."""
    sources = [train] if isinstance(train, Mapping) else train
    names = [code_span(source["path"]) for source in sources]
    splits = [f" {markdown('[' + source['split'] + ']')}" if source["split"] else "" for source in sources]
    weights = [f" (weight {source['weight']:g})" if source["weight"] is not None else "" for source in sources]
    return ", ".join(map("".join, zip(names, splits, weights, strict=True)))
