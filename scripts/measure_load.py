"""How fast training is on a machine that does something else too: tokens per second beside busy processes.

    python scripts/measure_load.py [--model models/SmolLM2-135M-Instruct] [--steps 12] [--rounds 3] [--loads 0 1 2]

Each setting of OpenMP has a process of its own, which waits until it is asked for some steps over short rows. In each
round, for each number of busy processes, all settings are measured one after the other, in the next round in the
reverse order. Given are medians over the rounds, and the ratio to the best of a row. Whole runs beside busy processes,
of loratune and of other tools, are made by `bench.py --busy`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench import busy
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune import kernels
from loratune.config import LoraSection
from loratune.data.packing import flatten
from loratune.lora import attach, targets

ROOT = Path(__file__).resolve().parent.parent
ROWS = 8
SETTINGS: dict[str, dict[str, str]] = {
    "the runtime's own": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "100 spins": {"GOMP_SPINCOUNT": "100"},
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
    "10,000 spins": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
"""What is set in the environment before torch is loaded."""


class Trainer:
    """A process that trains when it is asked to."""

    def __init__(self, model: Path, environment: Mapping[str, str]) -> None:
        command = [sys.executable, __file__, "--child", "--model", str(model)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, env=os.environ | dict(environment), stdin=pipe, stdout=pipe, text=True
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()  # It is ready.

    def measure(self, steps: int) -> float:
        """Tokens per second of so many steps."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate("")


def serve(model: Path) -> None:
    """Take steps over batches of short rows, as many as each line of stdin says, and print tokens per second."""
    kernels.keep_pages()
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    section = LoraSection(r=8, lora_alpha=16)
    adapted = attach.attach(base, section, targets.find(base, section).peft(), seed=0).train()
    lines = (ROOT / "configs" / "quickstart" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    batches = []
    for start in range(0, 64, ROWS):
        ids = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines[start : start + ROWS]]
        batches.append(flatten([{"input_ids": one, "labels": [-100] * (len(one) - 2) + one[-2:]} for one in ids]))
    with kernels.accelerated(adapted, attach.adapted_linear):
        _steps(adapted, batches, 2)
        print("ready", flush=True)
        for line in sys.stdin:
            print(_steps(adapted, batches, int(line)), flush=True)


def _steps(model: Any, batches: Sequence[Mapping[str, Any]], count: int) -> float:
    tokens, start = 0, time.monotonic()
    for number in range(count):
        inputs = dict(batches[number % len(batches)])
        labels = inputs.pop("labels")
        tokens += labels.numel()
        kernels.expect(model, labels)
        total, supervised = kernels.next_token_loss(model, model(**inputs, use_cache=False).logits, labels)
        (total / supervised).backward()  # type: ignore[no-untyped-call]
        model.zero_grad()
    return tokens / (time.monotonic() - start)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        serve(given.model)
        return
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    with ExitStack() as stack:
        trainers = {name: Trainer(given.model, SETTINGS[name]) for name in given.settings}
        for trainer in trainers.values():
            stack.callback(trainer.close)
        for number in range(given.rounds):
            for load in given.loads:
                with busy(load):
                    for name in list(trainers)[:: 1 if number % 2 == 0 else -1]:
                        found[load, name].append(trainers[name].measure(given.steps))
    print(f"| busy processes | {' | '.join(given.settings)} |\n|{'---|' * (len(given.settings) + 1)}")
    for load in given.loads:
        rates = {name: median(found[load, name]) for name in given.settings}
        best = max(rates.values())
        print(f"| {load} | {' | '.join(f'{rate:.0f} ({rate / best:.2f})' for rate in rates.values())} |")


if __name__ == "__main__":
    main()
