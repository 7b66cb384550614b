"""What computing shared prefixes once brings: rows' own tokens per second with it and without, step by step in turn.

    python scripts/measure_prefixes.py [--model models/SmolLM2-135M-Instruct] [--steps 12] [--size 8 --size 32]

Sets of rows: those of the quickstart; calls of tools, with one schema of 400 tokens before all of them; and text of
natural lengths that begins differently. Both variants take the same batch, one after the other, the first one now first
and now last; given are medians and quartiles of the ratios of their times, with the share of tokens that is saved.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune import kernels
from loratune.config import LoraSection
from loratune.data.packing import flatten, share_prefixes
from loratune.lora import attach, targets

ROOT = Path(__file__).resolve().parent.parent
SCHEMA_TOKENS = 400
Row = dict[str, list[int]]


def main(
    model: Path = ROOT / "models" / "SmolLM2-135M-Instruct",
    steps: int = 12,
    size: Annotated[list[int], typer.Option(help="Rows of a batch.")] = [8, 32],  # noqa: B006
    only: Annotated[str, typer.Option(help="One of the sets.")] = "",
) -> None:
    """Measure all sets, or one."""
    kernels.keep_pages()
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    section = LoraSection(r=8, lora_alpha=16)
    adapted = attach.attach(base, section, targets.find(base, section).peft(), seed=0).train()
    print("| rows | batch | tokens saved | ratio of tokens/s (quartiles) |\n|---|---|---|---|")
    with kernels.accelerated(adapted, attach.adapted_linear):
        for name, make in SETS.items():
            rows = [*make(tokenizer)] if only in ("", name) else []
            for count in size if rows else ():
                print(f"| {name} | {count} | {_measured(adapted, rows, count, steps)} |", flush=True)


def _row(tokenizer: Any, prompt: str, completion: str) -> Row:
    first, then = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion))
    return {"input_ids": [*first, *then], "labels": [-100] * len(first) + then}


def _quickstart(tokenizer: Any) -> Iterator[Row]:
    for line in (ROOT / "configs" / "quickstart" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield _row(tokenizer, row["prompt"], row["completion"] + tokenizer.eos_token)


def _tools(tokenizer: Any) -> Iterator[Row]:
    """The quickstart's definitions behind a schema, answered by a call."""
    properties = {
        f"argument_{number}": {"type": "string", "description": f"what it is {number}"} for number in range(40)
    }
    schema = tokenizer(json.dumps({"name": "classify", "parameters": {"properties": properties}}))["input_ids"]
    start = tokenizer.decode(schema[:SCHEMA_TOKENS])
    for line in (ROOT / "configs" / "quickstart" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question = row["prompt"].split("Definition:")[1]
        call = json.dumps({"name": "classify", "arguments": {"argument_0": row["completion"].strip()}})
        yield _row(tokenizer, f"{start}\nUser:{question}\nCall:", f" {call}{tokenizer.eos_token}")


def _natural(tokenizer: Any) -> Iterator[Row]:
    """Definitions alone, several at a time, so that they have from some 15 to some 150 tokens."""
    lines = (ROOT / "configs" / "quickstart" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"].split("Definition:")[1].removesuffix("Semantic class:") for line in lines]
    first, count = 0, 1
    while first < len(texts):
        yield _row(tokenizer, texts[first], "".join(texts[first + 1 : first + count]) + tokenizer.eos_token)
        first, count = first + count, count % 8 + 1


SETS: dict[str, Callable[[Any], Iterator[Row]]] = {"quickstart": _quickstart, "tools": _tools, "natural": _natural}


def _measured(model: Any, rows: Sequence[Row], size: int, steps: int) -> str:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    ratios, own, computed = [], 0, 0
    for number in range(steps + 1):
        batch = [rows[place] for place in order[number * size : (number + 1) * size]]
        variants = [flatten, share_prefixes][:: -1 if number % 2 else 1]
        seconds = {collate: _step(model, batch, collate) for collate in variants}
        if number:  # the first ones also compile
            ratios.append(seconds[flatten] / seconds[share_prefixes])
            own += sum(len(row["input_ids"]) for row in batch)
            computed += share_prefixes(batch)["input_ids"].numel()
    low, _, high = quantiles(ratios, n=4)
    return f"{1 - computed / own:.0%} | {median(ratios):.2f} ({low:.2f} to {high:.2f})"


def _step(model: Any, rows: Sequence[Row], collate: Callable[[Sequence[Row]], dict[str, torch.Tensor]]) -> float:
    """Seconds of a step, with those of making the batch."""
    start = time.perf_counter()
    inputs = collate(rows)
    labels, places = inputs.pop("labels"), inputs.pop("places", None)
    kernels.expect(model, labels, places)
    total, count = kernels.next_token_loss(model(**inputs, use_cache=False).logits, labels)
    (total / count).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
