"""What the ways of exporting an adapter share: what is wanted, what was made, and what is asked to compare."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from loratune.adapter import card
from loratune.adapter.directory import AdapterDirectory
from loratune.adapter.generation import LoadedAdapter
from loratune.console import progress
from loratune.data import DatasetSplit
from loratune.export.llama_cpp import ScoredAnswer
from loratune.export.texts import FIXED, MOST_TEXTS, Asked, prompt_ids, recorded

_ANSWER = 16
"""The longest answer that is asked for, in tokens."""
Log = Callable[[str], None]


@dataclass(frozen=True)
class ExportRequest:
    """What the user wants.

    Attributes:
        to: The client: peft, vllm, gguf or ollama.
        name: What the client is to call the adapter.
        merged: The type of the weights of a GGUF file of base and adapter; None for the adapter alone, or the default.
        llama_cpp: A checkout of llama.cpp.
        base_gguf: A GGUF file of the base.
        mix: Name → weight of the adapters whose sum is exported; empty for a single adapter.
        verify: Whether it is compared in the client, or in PEFT where that reads it.
    """

    to: str
    name: str
    merged: str | None = None
    llama_cpp: Path | None = None
    base_gguf: Path | None = None
    mix: Mapping[str, float] = field(default_factory=dict)
    verify: bool = True


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        directory: Where.
        client: The program that it is for.
        lines: What was compared and how it came out, as names and texts.
        figures: The same by name, for JSON.
        commands: What to type to use it.
    """

    directory: Path
    client: str
    lines: Sequence[tuple[str, str]]
    figures: dict[str, Any]
    commands: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """Everything by name."""
        return {
            "directory": str(self.directory), "client": self.client, "comparison": self.figures,
            "commands": list(self.commands),
        }  # fmt: skip


def in_float32(source: AdapterDirectory) -> AdapterDirectory:
    """The adapter on its base in float32, where rounding does not hide a difference."""
    return replace(source, base=source.base.model_copy(update={"dtype": "float32"}))


def questions(loaded: LoadedAdapter, source: AdapterDirectory, split: DatasetSplit | None) -> list[ScoredAnswer]:
    """Prompts of the rows, or of the training rows and fixed ones, with the adapter's likeliest answers."""
    known: list[Asked] = []
    if split:
        rows = card.recorded_prompts(split.examples(), most=MOST_TEXTS)
    else:
        known = recorded(source, loaded.renderer, loaded.model.config.get_text_config().vocab_size)
        rows = [
            {"messages": [{"role": "user", "content": text}]} if source.chat else {"prompt": text} for text in FIXED
        ]
    known += [(row, prompt_ids(row, loaded.renderer)) for row in rows]
    prompts = [prompt for _, prompt in known]
    with progress("answering prompts"):
        answers = [loaded.complete([prompt], _ANSWER)[0] for prompt in prompts]
        adapted = [_log_probabilities(loaded, *pair) for pair in zip(prompts, answers, strict=True)]
        with loaded.without_adapter():
            base = [_log_probabilities(loaded, *pair) for pair in zip(prompts, answers, strict=True)]
    return [
        ScoredAnswer({} if "input_ids" in row else row, prompt, answer, first, alone, second)
        for (row, prompt), answer, (first, second), (alone, _) in zip(known, answers, adapted, base, strict=True)
    ]


@torch.inference_mode()
def _log_probabilities(
    loaded: LoadedAdapter, prompt: Sequence[int], answer: Sequence[int]
) -> tuple[list[float], list[float]]:
    """The log-probability of each token of an answer, and that of the likeliest other token."""
    row = torch.tensor([[*prompt, *answer]], device=loaded.model.device)
    logits = loaded.model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1].double().cpu()
    chances = logits.log_softmax(-1)
    tokens = torch.tensor(answer)[:, None]
    own = chances.gather(1, tokens)[:, 0].tolist()
    return own, chances.scatter(1, tokens, -torch.inf).amax(-1).tolist()
