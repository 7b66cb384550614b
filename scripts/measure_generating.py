"""Tokens per second of answers: a batch against a plain loop over its prompts, base + adapter against merged weights.

    python scripts/measure_generating.py ADAPTER --prompts configs/quickstart/eval.jsonl

Each round runs them one after the other and back again; the medians of the rounds' ratios are printed, and their range.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import GenerationConfig

from loratune import kernels
from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.config import Source
from loratune.data import sources
from loratune.data.packing import pad
from loratune.lora import attach

LOOPED = 8
"""Prompts of the loop; a rate needs no more."""


def main(
    directory: Annotated[Path, typer.Argument(metavar="ADAPTER")],
    prompts: Annotated[Path, typer.Option(help="Rows with prompts.")],
    batch: int = 64,
    new_tokens: int = 48,
    rounds: int = 3,
) -> None:
    """Compare, and print a line per round."""
    tuned = loading.load(AdapterDirectory.open(directory, print))
    merged: Any = copy.deepcopy(tuned.model).merge_and_unload()
    rows = sources.read_rows(Source(path=str(prompts)))[:batch]
    ids = [tuned.tokenizer(row.values["prompt"])["input_ids"] for row in rows]
    settings = GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)

    def answer(model: Any, prompts: Sequence[list[int]]) -> None:
        model.generate(**pad([{"input_ids": one} for one in prompts], 0, "left"), generation_config=settings)

    def with_inference_lora(prompts: Sequence[list[int]]) -> None:
        with kernels.inference_lora(tuned.model, attach.adapted_linear):
            answer(tuned.model, prompts)

    def one_by_one(way: Callable[[Sequence[list[int]]], None]) -> None:
        for one in ids[:LOOPED]:
            way([one])

    runs: dict[str, tuple[Callable[[], None], int]] = {
        "batch": (lambda: with_inference_lora(ids), len(ids)),
        "batch, merged": (lambda: answer(merged, ids), len(ids)),
        "loop": (lambda: one_by_one(with_inference_lora), LOOPED),
        "loop, merged": (lambda: one_by_one(partial(answer, merged)), LOOPED),
        "loop, PEFT as it is": (lambda: one_by_one(partial(answer, tuned.model)), LOOPED),
    }
    ratios: dict[str, list[float]] = {}
    for number in range(rounds):
        rates = _round(runs, new_tokens)
        print(f"round {number + 1}: " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()) + " tokens/s")
        for over, under in (
            ("batch", "loop, PEFT as it is"), ("batch", "batch, merged"), ("loop", "loop, merged"),
        ):  # fmt: skip
            ratios.setdefault(f"{over} / {under}", []).append(rates[over] / rates[under])
    for name, values in ratios.items():
        print(f"{name}: {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")


@torch.inference_mode()
def _round(runs: dict[str, tuple[Callable[[], None], int]], new_tokens: int) -> dict[str, float]:
    """Tokens per second of each, there and back."""
    seconds = dict.fromkeys(runs, 0.0)
    for name in [*runs, *reversed(runs)]:
        start = time.monotonic()
        runs[name][0]()
        seconds[name] += time.monotonic() - start
    return {name: 2 * count * new_tokens / seconds[name] for name, (_, count) in runs.items()}


if __name__ == "__main__":
    typer.run(main)
