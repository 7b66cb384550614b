"""What each piece of the fast layers brings: tokens per second of training steps with all of them, and without each.

    python scripts/ablate.py ROWS.jsonl [--model models/SmolLM2-135M-Instruct] [--rounds 3]

ROWS: lines with `input_ids` and `labels`, as scripts/bench.py lays them out in its work directory. Each variant goes
over the same rows in a process of its own, one after the other and back again; given are the medians of the rounds'
ratios, and their range. A last process takes the profile of a step.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiled
from transformers import AutoModelForCausalLM

from loratune import kernels
from loratune.config import LoraSection
from loratune.data.batches import flatten, pad
from loratune.lora import attach, creation, targets
from loratune.system import environment

ROOT = Path(__file__).resolve().parent.parent
WITHOUT = {
    "nothing": "all pieces are there",
    "loss": "all logits, and PyTorch's cross-entropy at supervised positions",
    "attention": "the model's own with a mask between rows, and PEFT's own LoRA",
    "feed-forward layers": "the model's own",
    "norms": "the model's own",
    "C": "the same operations in PyTorch",
    "allocator": "glibc with its default settings",
    "packing": "rows padded to the longest of eight, in the order they come",
    "everything": "all of these at once: PEFT, not accelerated, in bf16",
}
PIECES = {
    "loss": "acceleration._head", "attention": "replacements.replace_attention",
    "feed-forward layers": "replacements.replace_gated", "norms": "replacements.replace_norm",
}  # fmt: skip
PACKED, PADDED = 2048, 8  # tokens of a packed batch, at most; rows of a padded one


def main(
    rows: Path,
    model: Path = ROOT / "models" / "SmolLM2-135M-Instruct",
    rounds: int = 3,
    only: Annotated[str, typer.Option(help="One variant, in this process; prints its rate as JSON.")] = "",
    profile: Annotated[bool, typer.Option(help="With --only: where the time of a step goes.")] = False,
) -> None:
    """Measure all variants, or one."""
    if only:
        print(json.dumps(_measured(only, _batches(rows, only), model, profile=profile)))
        return
    rates_by_name: dict[str, list[float]] = {name: [] for name in WITHOUT}
    for number in range(rounds):
        for name in [*WITHOUT][:: -1 if number % 2 else 1]:
            rates_by_name[name].append(_child(rows, model, name)["rate"])
            print(
                f"round {number + 1}: without {name}: {rates_by_name[name][-1]:.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
    print("| without | tokens/s | of all pieces (range) | in its place |\n|---|---|---|---|")
    for name, rates in rates_by_name.items():
        ratios = [rate / whole for rate, whole in zip(rates, rates_by_name["nothing"], strict=True)]
        share = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {median(rates):.0f} | {share} | {WITHOUT[name]} |")
    print("\n" + _child(rows, model, "nothing", "--profile")["profile"])


def _child(rows: Path, model: Path, name: str, *more: str) -> dict[str, Any]:
    command = [sys.executable, __file__, str(rows), "--model", str(model), "--only", name, *more]
    environment = os.environ | ({"LORATUNE_NATIVE": "0"} if name == "C" else {})
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _batches(path: Path, without: str) -> list[Mapping[str, Any]]:
    """All rows, in their order."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if without in ("packing", "everything"):
        return [pad(rows[first : first + PADDED], 0) for first in range(0, len(rows), PADDED)]
    ends, held = [0], 0
    for number, row in enumerate(rows):
        if held and held + len(row["input_ids"]) > PACKED:
            ends.append(number)
            held = 0
        held += len(row["input_ids"])
    return [flatten(rows[first:end]) for first, end in pairwise([*ends, len(rows)])]


def _measured(without: str, batches: Sequence[Mapping[str, Any]], path: Path, *, profile: bool) -> dict[str, Any]:
    """Tokens per second, without padding, over all batches; the first one is taken once before."""
    if without not in ("allocator", "everything"):
        environment.keep_pages()
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    section = LoraSection(r=8, lora_alpha=16)
    model = creation.attach(base, section, targets.find(base, section).peft(), seed=0).train()
    tokens = sum(int(batch.get("attention_mask", torch.ones_like(batch["labels"])).sum()) for batch in batches)
    off = [*PIECES] if without == "everything" else [piece for piece in PIECES if piece == without]
    with ExitStack() as stack:
        for piece in off:  # patched, because nobody but this script wants a piece to be missing
            stack.enter_context(patch(f"loratune.kernels.{PIECES[piece]}", lambda *_, **__: None))
        stack.enter_context(kernels.accelerated(model, attach.adapted_linear))
        _step(model, batches[0])
        start = time.monotonic()
        for batch in batches:
            _step(model, batch)
        rate = tokens / (time.monotonic() - start)
        return {"rate": rate, "profile": _profile(lambda: _step(model, batches[0])) if profile else ""}


def _step(model: Any, batch: Mapping[str, Any]) -> None:
    inputs = dict(batch)
    labels = inputs.pop("labels")
    kernels.set_loss_targets(model, labels)
    total, count = kernels.next_token_loss(model, model(**inputs, use_cache=False).logits, labels)
    (total / count).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()


def _profile(step: Callable[[], None]) -> str:
    """The ten operations that take most of a step's time by themselves."""
    with profiled(activities=[ProfilerActivity.CPU]) as taken:
        step()
    own = sorted(taken.key_averages(), key=lambda one: -one.self_cpu_time_total)
    whole = sum(one.self_cpu_time_total for one in own)
    lines = [f"| {one.key} | {one.self_cpu_time_total / whole:.1%} | {one.count} |" for one in own[:10]]
    return "\n".join(["| operation | of the step | calls |", "|---|---|---|", *lines])


if __name__ == "__main__":
    typer.run(main)
