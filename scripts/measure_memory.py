"""Compare the memory that loratune foretells with what training then takes at its peak.

    python scripts/measure_memory.py [--device cpu|cuda] [SHAPE ...]      # without SHAPE: all of them

Each shape trains for a few steps in a process of its own, as `loratune train` does. On a CPU the peak is the resident
set of that process (ru_maxrss, which also counts pages of the weight files), on a GPU torch's max_memory_allocated.
Needs the model of the quickstart (scripts/fetch_smollm2.py); the others are random models that are made here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
QUICKSTART = ROOT / "configs" / "quickstart"


@dataclass(frozen=True)
class Shape:
    """One run. model: a directory, or a class of `RANDOM`; length: of every row, 0: the quickstart's own rows."""

    batch: int
    length: int
    model: str = str(SMOLLM2)
    settings: dict[str, object] = field(default_factory=dict)


ALL_LINEAR = {"lora.target_modules": "all-linear", "lora.r": 16, "lora.lora_dropout": 0.05}
SHAPES = {
    "quickstart": Shape(8, 0),
    "8x128-float32": Shape(8, 128, settings={"model.dtype": "float32"}),
    "8x256-float32": Shape(8, 256, settings={"model.dtype": "float32"}),
    "4x512": Shape(4, 512),
    "1x2048": Shape(1, 2048),
    "4x512-checkpointing": Shape(4, 512, settings={"training.activation_checkpointing": "true"}),
    "4x512-4bit": Shape(4, 512, settings={"model.quantization": "4bit"}),
    "4x512-8bit": Shape(4, 512, settings={"model.quantization": "8bit"}),
    "4x512-all-linear": Shape(4, 512, settings=ALL_LINEAR),
    "2x512-gpt2": Shape(2, 512, model="GPT2"),
    "2x512-qwen2": Shape(2, 512, model="Qwen2"),
}
RANDOM: dict[str, dict[str, object]] = {
    "GPT2": {"vocab_size": 49152, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "Qwen2": {
        "vocab_size": 49152, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2,
    },
}  # fmt: skip

# Children; this process stays small, because a child's ru_maxrss starts with that of its parent.
MAKE = """
import json, sys, torch, transformers
kind, settings, tokenizer, directory = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
config = getattr(transformers, kind + "Config")(**settings, bos_token_id=1, eos_token_id=2)
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.save_pretrained(directory)
transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)
"""
FORETELL = """
import pathlib, sys
from loratune import config
from loratune.commands import train
from loratune.training import output_dir, preflight
from loratune.data import no_progress
run = config.load(pathlib.Path(sys.argv[1]), sys.argv[2:])
directory = output_dir.check(run.output_dir, resume=False, overwrite=False)
print(train.make_plan(preflight.check(run, directory, no_progress), no_progress).memory.total)
"""
TRAIN = """
import sys, torch
from loratune.__main__ import main
try:
    main()
finally:
    print(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
"""


def settings(shape: Shape, work: Path, steps: int) -> list[str]:
    """The run as arguments of `loratune train`. Makes its rows, and its model where that is a random one."""
    model = Path(shape.model)
    if shape.model in RANDOM:
        model = work / shape.model
        if not model.exists():
            python(MAKE, shape.model, json.dumps(RANDOM[shape.model]), str(SMOLLM2), str(model))
    values: dict[str, object] = {
        "model.name_or_path": model,
        "training.per_device_train_batch_size": shape.batch,
        "training.max_steps": steps,
        "training.warmup_steps": 0,
        "output_dir": work / "adapter",
    }
    if shape.length:
        rows = work / f"{shape.length}.jsonl"
        rows.write_text(f"{json.dumps({'text': ' the' * shape.length})}\n" * (shape.batch * 4))
        values |= {"data.train": rows, "data.validation": "null", "data.max_length": shape.length}
    else:
        values |= {"data.train": QUICKSTART / "train.jsonl", "data.validation": QUICKSTART / "eval.jsonl"}
    words = [f"{key}={value}" for key, value in (values | shape.settings).items()]
    return [str(QUICKSTART / "config.yaml"), *words]


def python(code: str, *arguments: str) -> tuple[str, int]:
    """Run code in a process of its own. Returns its output, and its largest resident set in bytes."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-c", code, *arguments]
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        _, status, usage = os.wait4(child.pid, 0)
        output.seek(0)
        errors.seek(0)
        if status:
            sys.exit(f"{errors.read()}error: the run with {' '.join(arguments)} failed")
        return output.read(), usage.ru_maxrss * 1024


def measure(shape: Shape, steps: int) -> tuple[int, int]:
    """Bytes foretold and bytes taken."""
    with tempfile.TemporaryDirectory() as name:
        config, *words = settings(shape, Path(name), steps)
        foretold, _ = python(FORETELL, config, *words)
        output, resident = python(TRAIN, "train", config, *(part for word in words for part in ("--set", word)))
    return int(foretold.split()[-1]), int(output.split()[-1]) or resident


def main() -> None:
    """Print a row of the table for each shape."""
    parser = argparse.ArgumentParser(description="Compare the memory that loratune foretells with what training takes.")
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each run (default: 3)")
    given = parser.parse_args()
    if unknown := set(given.shapes) - set(SHAPES):
        parser.error(f"no such shape: {', '.join(sorted(unknown))}")
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    print("| shape | foretold, MiB | measured, MiB | foretold / measured |\n|---|---|---|---|", flush=True)
    for name in given.shapes or SHAPES:
        foretold, taken = measure(SHAPES[name], given.steps)
        print(f"| {name} | {foretold >> 20:,} | {taken >> 20:,} | {foretold / taken:.2f} |", flush=True)


if __name__ == "__main__":
    main()
