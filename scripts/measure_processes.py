"""Measure what several processes bring on this machine, and what they send each other.

    python scripts/measure_processes.py [--rounds 3]

Speed: rows of the quickstart with one process of all threads, one of a single thread, and as many processes of one
thread as there are cores, at equal rows per optimizer step; tokens/s of the training loop, in rounds that are run
forwards and backwards in turn. Bytes: what the loopback device of a network namespace carries for each further
optimizer step of two processes, for SmolLM2 and for four layers with the attention of a 7B Llama (hidden size 4,096,
random).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
ROWS = ROOT / "configs" / "quickstart" / "train.jsonl"
CORES = len(os.sched_getaffinity(0))
STEP = 16
"""Rows of an optimizer step."""


def config(place: Path, model: Path, steps: int, processes: int) -> Path:
    """A run that writes beside its config."""
    values = {
        "model": {"name_or_path": str(model)},
        "data": {"train": str(ROWS)},
        "training": {"max_steps": steps, "per_device_train_batch_size": STEP // processes, "save_steps": 10_000},
        "output_dir": str(place / "out"),
    }
    path = place / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def command(path: Path, processes: int) -> list[str]:
    """Train, as the README has it."""
    program = ["-m", "loratune", "train", str(path), "--overwrite"]
    if processes == 1:
        return [sys.executable, *program]
    return [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", str(processes), *program]


def run(line: list[str], threads: int) -> str:
    """Run it and give what it printed last. Raises CalledProcessError."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.run(line, env=environment, check=True, capture_output=True, text=True).stdout


def speed(place: Path, steps: int, processes: int, threads: int) -> float:
    """Tokens/s of the training loop."""
    run(command(config(place, MODEL, steps, processes), processes), threads)
    found = json.loads((place / "out" / "loratune.json").read_text())["metrics"]
    return float(found["tokens"]) / float(found["seconds"])


def sent(place: Path, model: Path, steps: int) -> int:
    """Bytes that two processes sent over a loopback device of their own, in a whole run."""
    line = " ".join(command(config(place, model, steps, 2), 2))
    inside = f"ip link set lo up && {line} >&2 && cat /proc/net/dev"
    table = run(["unshare", "--net", "sh", "-c", inside], 1)
    return int(next(row for row in table.splitlines() if row.strip().startswith("lo:")).split()[9])


def bytes_per_step(place: Path, model: Path) -> float:
    """By the difference of a longer and a shorter run, as starting sends something too."""
    short, long = (sent(place, model, steps) for steps in (5, 25))
    return (long - short) / 20


def layers_of_7b(place: Path) -> Path:
    """Four layers of the attention of a 7B Llama, and next to nothing else; random."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=4096, num_attention_heads=32, num_hidden_layers=4, intermediate_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    made = place / "layers"
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


def main() -> None:
    """Do all of it."""
    parser = argparse.ArgumentParser(description="Measure what several processes bring, and what they send.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bytes", action="store_true", help="only those")
    parser.add_argument("--steps", type=int, default=20, help="of each run that is timed")
    given = parser.parse_args()
    ways = {f"1 process, {CORES} threads": (1, CORES), "1 process, 1 thread": (1, 1)}
    ways[f"{CORES} processes, 1 thread each"] = (CORES, 1)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for number in range(0 if given.bytes else given.rounds):
            for name in list(ways)[:: -1 if number % 2 else 1]:
                speeds[name].append(speed(place, given.steps, *ways[name]))
        first = next(iter(ways))
        for name, values in () if given.bytes else speeds.items():
            ratios = sorted(value / base for value, base in zip(values, speeds[first], strict=True))
            print(f"{name}: {median(values):,.0f} tokens/s, {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        for name, model in (("SmolLM2-135M", MODEL), ("4 layers of 7B", layers_of_7b(place))):
            each = bytes_per_step(place, model)
            size = sum(path.stat().st_size for path in (place / "out").glob("adapter_model.safetensors"))
            print(f"{name}: {each / 1e6:.2f} MB per step in both directions together; adapter file {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
