"""How fast a training step is where something is missing on a CPU, as a ratio to stock PEFT under transformers.Trainer.

    python scripts/measure_fallbacks.py [--machines full avx2 ...] [--rounds 3] [--layers 4] [--attention]

Each machine is a process of its own, of one thread, in which the ways of a cell take turns; given is the CPU time of a
forward and backward pass, the least of the rounds, as other processes can only add to it. Stock is Trainer's own
`training_step`, of the base in bfloat16 with autocast or of the base in float32, on rows padded in one batch, two by
two of like length, and one by one: what is fastest counts. Both have the allocator's settings of loratune. The model
has the shape of SmolLM2-135M, with a few of its 30 layers and as small a part of its vocabulary, so that the parts of a
step keep their proportion.

On a processor with more, AVX2 alone is what torch, oneDNN and MKL are told to use; for bfloat16 oneDNN is off, as torch
does not ask it on such a processor; and the compiled operations are built for x86-64-v3.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from loratune import kernels
from loratune.config import LoraSection
from loratune.data.packing import flatten, pad
from loratune.kernels import build, library, whole_rows
from loratune.kernels.attention import Layout
from loratune.kernels.fused_ops import fused_ops
from loratune.lora import attach

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
NO_COMPILER = {"LORATUNE_NATIVE": "0"}
MACHINES: dict[str, tuple[str, dict[str, str]]] = {
    "full": ("compiler, all instructions", {}),
    "avx2": ("compiler, AVX2", AVX2),
    "bare": ("no compiler, all instructions", NO_COMPILER),
    "bare-avx2": ("no compiler, AVX2", AVX2 | NO_COMPILER),
}
"""What they have, and the environment that takes the rest from them."""
SHAPES = {
    "short rows": [44, 61, 33, 90, 52, 71, 48, 38, 105, 57, 41, 66, 29, 83, 50, 74],
    "natural rows": [312, 74, 498, 158, 241, 96],
    "1 x 1,024": [1024],
    "1 x 4,096": [4096],
}
"""Tokens of the rows of a step."""
HEADS = ((3, 3, 64), (2, 4, 128), (4, 1, 64), (1, 4, 256))
"""Heads of keys, heads of queries that share each of them, and their size."""
ROW_LENGTHS = (256, 512, 1024, 2048, 4096)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYERS, VOCABULARY = 30, 49152
LORA = LoraSection(r=8, lora_alpha=16)
MODULES = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}

Batch = dict[str, torch.Tensor]
Step = Callable[[], None]


def rows(lengths: Sequence[int]) -> list[dict[str, list[int]]]:
    """Rows of random tokens, all of them supervised."""
    drawn = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 5_000, (length,), generator=drawn).tolist() for length in lengths]
    return [{"input_ids": one, "labels": one} for one in ids]


def adapted(dtype: torch.dtype, layers: int) -> Any:
    """The model with an adapter."""
    config = LlamaConfig(
        vocab_size=max(VOCABULARY * layers // LAYERS, 5_000), hidden_size=576, intermediate_size=1536,
        num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return attach.attach(AutoModelForCausalLM.from_config(config, dtype=dtype), LORA, MODULES, seed=0).train()


class Stock:
    """Trainer's step on batches."""

    def __init__(self, dtype: torch.dtype, layers: int):
        model, half = adapted(dtype, layers), dtype == torch.bfloat16
        with tempfile.TemporaryDirectory() as directory:
            options = TrainingArguments(directory, bf16=half, use_cpu=True, report_to="none", disable_tqdm=True)
        self._trainer = Trainer(model, options)
        self._model = self._trainer.accelerator.prepare_model(model)

    def step(self, batches: Sequence[Batch]) -> None:
        """Forward and backward over all batches, whose losses make one mean."""
        count = sum((batch["labels"][:, 1:] >= 0).sum() for batch in batches)
        for batch in batches:
            self._trainer.training_step(self._model, dict(batch), num_items_in_batch=torch.as_tensor(count))
        self._model.zero_grad()


class Ours:
    """The step of `loratune train`, on packed rows."""

    def __init__(self, dtype: torch.dtype, layers: int):
        self._model = adapted(dtype, layers)
        self._acceleration = kernels.accelerate(self._model, attach.adapted_linear)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, layers are accelerated."""
        with self._acceleration.applied(self._model):
            yield

    def step(self, batch: Batch) -> None:
        """Forward and backward over a batch."""
        inputs = dict(batch)
        labels = inputs.pop("labels")
        kernels.expect(self._model, labels)
        total, count = kernels.next_token_loss(self._model, self._model(**inputs, use_cache=False).logits, labels)
        torch.autograd.backward(total / count)
        self._model.zero_grad()


def layouts(lengths: Sequence[int]) -> dict[str, list[Batch]]:
    """How stock can lay out the rows of a step."""
    made = rows(lengths)
    by_length = sorted(made, key=lambda row: len(row["input_ids"]))
    found = {"one by one": [dict(pad([row], 0)) for row in made]}
    if len(made) > 1:
        found["pairs of like length"] = [dict(pad(by_length[n : n + 2], 0)) for n in range(0, len(made), 2)]
        found["one batch"] = [dict(pad(made, 0))]
    return found


def measured(dtype: torch.dtype, shapes: Sequence[str], rounds: int, layers: int) -> dict[str, dict[str, list[float]]]:
    """CPU seconds of each way, by shape."""
    stock, ours = Stock(dtype, layers), Ours(dtype, layers)
    found: dict[str, dict[str, list[float]]] = {}
    with ours.applied():
        for shape in shapes:
            batch = flatten(rows(SHAPES[shape]))
            ways: dict[str, Step] = {"loratune": partial(ours.step, batch)}
            for name, batches in layouts(SHAPES[shape]).items():
                ways[name] = partial(stock.step, batches)
            found[shape] = taking_turns(ways, rounds)
    return found


def taking_turns(ways: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each way in each round. One more goes before that does not count; after two, layouts of stock
    that take half as long again as the fastest are left out."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        best = min(times[-1] for way, times in seconds.items() if way != "loratune") if number else 0
        for way, step in [*ways.items()][:: -1 if number % 2 else 1]:
            if number and way != "loratune" and seconds[way][-1] > 1.5 * best:
                continue
            start = time.process_time()
            step()
            seconds[way].append(time.process_time() - start)
    return {way: times[1:] or times for way, times in seconds.items()}


class Row:
    """Attention of one row."""

    def __init__(self, tokens: int, heads: tuple[int, int, int], dtype: torch.dtype, *, whole: bool):
        """whole: whether torch's kernel computes it; heads: see `HEADS`."""
        groups, shared, size = heads
        shapes = ((groups, tokens, shared, size), (groups, tokens, size), (groups, tokens, size))
        query, key, value = (torch.randn(shape).to(dtype) for shape in shapes)
        self._states = query, key, value
        self._gradient = torch.randn(tokens, groups * shared * size).to(dtype)
        self._layout = Layout.of(torch.arange(tokens), whole=1 if whole else None)
        self._ops, self._scale = fused_ops(self._gradient), size**-0.5

    def step(self) -> None:
        """Forward and backward."""
        layout, states, scale = self._layout, self._states, self._scale
        around = (layout.spans, layout.keys, layout.tiles, scale)
        result, total = self._ops.attend(*states, *around)
        whole_rows.attend(layout.rows, (result, total), *states, scale)
        gradients = self._ops.attend_backward(self._gradient, result, total, *states, *around)
        whole_rows.attend_backward(layout.rows, gradients, self._gradient, result, total, *states, scale)


def attention(dtype: torch.dtype, rounds: int) -> dict[str, dict[str, list[float]]]:
    """CPU seconds of attention on one row, forward and backward, by heads and tokens of the row."""
    found: dict[str, dict[str, list[float]]] = {}
    for heads, tokens in product(HEADS, ROW_LENGTHS):
        groups, shared, size = heads
        ways = {"loratune": Row(tokens, heads, dtype, whole=False).step}
        ways["torch's kernel"] = Row(tokens, heads, dtype, whole=True).step
        found[f"{groups * shared} heads of {size}, {groups} of keys, {tokens} tokens"] = taking_turns(ways, rounds)
    return found


def child(options: argparse.Namespace) -> None:
    """Measure the cells of one machine in this process, whose environment is that machine's. Prints them as JSON."""
    torch.set_num_threads(1)
    kernels.keep_pages()
    name = options.child
    with ExitStack() as stack:
        if name.endswith("avx2"):
            variant = build.Variant("x86-64-v3", ("-march=x86-64-v3", "-fopenmp"))
            stack.enter_context(patch.object(library, "load", partial(library.compiled, variant=variant)))
        for dtype in options.dtypes:
            torch.backends.mkldnn.set_flags(not (name.endswith("avx2") and dtype == "bf16"))  # type: ignore[no-untyped-call]
            if options.attention:
                cells = attention(DTYPES[dtype], options.rounds)
            else:
                cells = measured(DTYPES[dtype], options.shapes, options.rounds, options.layers)
            print(json.dumps({"dtype": dtype, "cells": cells}), flush=True)


def processor() -> str:
    """The name of the processor, and what it has of what matters here."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    of = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    known = ("amx_bf16", "amx_tile", "avx512_bf16", "avx512f", "avx2", "asimd", "bf16")
    has = of.get("flags", of.get("Features", "")).split()
    named = ", ".join(flag for flag in known if flag in has)
    return f"{of.get('model name', platform.machine())} (family {of.get('cpu family')}, {of.get('model')}; {named})"


def report(name: str, options: argparse.Namespace) -> None:
    """The lines of one machine."""
    command = [sys.executable, __file__, "--child", name, "--rounds", str(options.rounds)]
    command += ["--layers", str(options.layers), "--dtypes", *options.dtypes, "--shapes", *options.shapes]
    command += ["--attention"] if options.attention else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | MACHINES[name][1]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("{"):
                continue
            known = json.loads(line)
            for shape, seconds in known["cells"].items():
                own, stock = min(seconds.pop("loratune")), {way: min(one) for way, one in seconds.items()}
                way, best = min(stock.items(), key=lambda one: one[1])
                cells = (MACHINES[name][0], known["dtype"], shape, f"{best / own:.2f}", f"{best:.3g} s, {way}")
                print(f"| {' | '.join(cells)} |", flush=True)
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}")


def main() -> None:
    """The table of all machines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", nargs="+", choices=list(MACHINES), default=list(MACHINES))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--attention", action="store_true", help="attention alone, by our kernel and by torch's")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    print(f"{processor()}; torch {torch.__version__}; {options.layers} of {LAYERS} layers\n")
    print("| machine | dtype | rows | times as fast as stock | stock |\n|---|---|---|---|---|")
    for name in options.machines:
        if options.attention and name.startswith("bare"):
            continue
        report(name, options)


if __name__ == "__main__":
    main()
