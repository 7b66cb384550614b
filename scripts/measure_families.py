"""What acceleration brings each family on this CPU: loratune, packed and padded, beside stock PEFT, padded and packed.

    python scripts/measure_families.py [NAME ...] [--rows 8] [--longest 512] [--steps 3]

Four layers of each family, 512 wide, with random weights in bfloat16 (`peers.sets.FAMILIES`), LoRA on all linear layers
in one thread. Rows have lengths from 1/16 of the longest up to it. The ways take turns, step by step; given are tokens
of rows per second of CPU time of loratune, packed, and medians of the ratios of the other ways to it within a round,
with the smallest and the largest. bench.py trains the same shapes with other programs: `--shape NAME --peers
loratune llamafactory`.
"""

import time
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from statistics import median
from typing import Annotated, Any

import torch
import transformers
import typer
from transformers import AutoModelForCausalLM

from loratune import kernels
from loratune.config import LoraSection
from loratune.data.packing import flatten, pad
from loratune.kernels.acceleration import KINDS
from loratune.lora import attach, targets
from peers.sets import FAMILIES
from peers.shapes import config

VOCABULARY = 8192
"""Fewer tokens than a real one has: what differs from family to family is in the layers."""
Batch = dict[str, torch.Tensor]
WAYS = ("loratune, packed", "loratune, padded", "stock, padded", "stock, packed")


def main(
    names: Annotated[list[str] | None, typer.Argument()] = None,
    rows: int = 8,
    longest: int = 512,
    steps: int = 3,
    targeted: Annotated[str, typer.Option(help="The layers with LoRA.")] = "all-linear",
) -> None:
    """Measure families, or all of them."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    kernels.keep_pages()
    print("| family | fast parts | tokens/s |" + "".join(f" against {way} |" for way in WAYS[1:]))
    print("|---|---|---|" + "---|" * len(WAYS[1:]))
    for name in names or FAMILIES:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config(name, vocab_size=VOCABULARY), dtype=torch.bfloat16)
        section = LoraSection(r=8, lora_alpha=16, target_modules=targeted)
        model = attach.attach(base, section, targets.find(base, section).peft(), seed=0).train()
        print(f"| {name} | {_measured(model, _rows(rows, longest), steps)} |", flush=True)


def _rows(count: int, longest: int) -> list[dict[str, list[int]]]:
    drawn = torch.Generator().manual_seed(0)
    lengths = torch.linspace(longest // 16, longest, count).int()[torch.randperm(count, generator=drawn)].tolist()
    ids = [torch.randint(3, VOCABULARY, (length,), generator=drawn).tolist() for length in lengths]
    return [{"input_ids": one, "labels": one} for one in ids]


def _measured(model: Any, rows: list[dict[str, list[int]]], steps: int) -> str:
    acceleration = kernels.accelerate(model, attach.adapted_linear)
    batches: dict[str, Batch] = {"packed": flatten(rows), "padded": pad(rows, 2)}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(steps + 1):
        for way in WAYS[:: -1 if number % 2 else 1]:
            with acceleration.applied(model) if way.startswith("loratune") else nullcontext():
                seconds[way].append(_step(model, batches[way.rpartition(" ")[2]]))
    parts = [name for name in (*KINDS, "loss") if name not in acceleration.fallbacks]
    own = seconds[WAYS[0]][1:]  # The first round warms up.
    cells = [", ".join(parts) or "none", f"{sum(len(row['labels']) for row in rows) / median(own):,.0f}"]
    for way in WAYS[1:]:
        ratios = sorted(other / mine for other, mine in zip(seconds[way][1:], own, strict=True))
        cells.append(f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return " | ".join(cells)


def _step(model: Any, batch: Mapping[str, torch.Tensor]) -> float:
    """CPU seconds of a forward and backward pass."""
    inputs = dict(batch)
    labels = inputs.pop("labels")
    start = time.process_time()
    kernels.expect(model, labels)
    total, count = kernels.next_token_loss(model, model(**inputs, use_cache=False).logits, labels)
    torch.autograd.backward(total / count)
    model.zero_grad()
    return time.process_time() - start


if __name__ == "__main__":
    typer.run(main)
