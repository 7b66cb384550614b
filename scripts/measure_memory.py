"""Compare the memory that loratune estimates with what training then takes at its peak.

    python scripts/measure_memory.py [--device cpu|cuda] [SHAPE ...]      # without SHAPE: all of them

Each shape trains for a few steps in a process of its own, as `loratune train` does, which also makes the estimate. On a
CPU the peak is the resident set of that process (ru_maxrss, all that it maps), on a GPU torch's max_memory_allocated.
Needs the model of the quickstart (scripts/fetch_smollm2.py); the others are random models that are made here.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
QUICKSTART = ROOT / "loratune" / "data" / "quickstart"


@dataclass(frozen=True)
class Shape:
    """One run.

    Attributes:
        batch: Rows of a batch.
        length: Tokens of every row; of the longest, where they are uneven; 0: the quickstart's own rows.
        model: A directory, or a key of `RANDOM`.
        settings: Further keys of the run.
        steps: Optimizer steps, where the command line gives no other number.
        uneven: Whether rows have any number of tokens up to `length`.
        shared: Tokens that all rows begin with. Then the last ANSWER ones are supervised, and otherwise all.
    """

    batch: int
    length: int
    model: str = str(SMOLLM2)
    settings: dict[str, object] = field(default_factory=dict)
    steps: int = 3
    uneven: bool = False
    shared: int = 0


COMMON = (
    "the of and to in is was for on that with as by at from it an are which this be or had not but have one were all "
    "their has been who its her more also when there they some would other time can about out if them then two than no "
    "first new people may after work made use through way such where long small every found own under last right"
)
WORDS = [f" {word}" for word in COMMON.split()]
"""Each of them is one token."""
ANSWER = 30
ALL_LINEAR: dict[str, object] = {"lora.target_modules": "all-linear", "lora.r": 16, "lora.lora_dropout": 0.05}
CHECKPOINTING: dict[str, object] = {"training.activation_checkpointing": "true"}
FLOAT32: dict[str, object] = {"model.dtype": "float32"}
SHAPES = {
    "quickstart": Shape(8, 0),
    "quickstart, 200 steps": Shape(8, 0, steps=200),
    "quickstart, batch of 32": Shape(32, 0),
    "8 x 480, 400 shared": Shape(8, 480, shared=400),
    "32 x 480, 400 shared": Shape(32, 480, shared=400),
    "8 x up to 64, 100 steps": Shape(8, 64, steps=100, uneven=True),
    "8 x 128, float32": Shape(8, 128, settings=FLOAT32),
    "8 x 256, float32": Shape(8, 256, settings=FLOAT32),
    "8 x up to 512, padded": Shape(8, 512, settings={"data.packing": "none"}, uneven=True),
    "4 x 512": Shape(4, 512),
    "16 x 256": Shape(16, 256),
    "1 x 2,048": Shape(1, 2048),
    "1 x 4,096": Shape(1, 4096),
    "2 x 4,096, checkpointing": Shape(2, 4096, settings=CHECKPOINTING),
    "4 x 512, checkpointing": Shape(4, 512, settings=CHECKPOINTING),
    "4 x 512, 4bit": Shape(4, 512, settings={"model.quantization": "4bit"}),
    "4 x 512, 8bit": Shape(4, 512, settings={"model.quantization": "8bit"}),
    "4 x 512, all-linear, r=16, dropout": Shape(4, 512, settings=ALL_LINEAR),
    "4 x 512, r=128": Shape(4, 512, settings={"lora.r": 128}),
    "2 x 512, Llama, 128,256 tokens known": Shape(2, 512, model="Llama"),
    "2 x 512, GPT2": Shape(2, 512, model="GPT2"),
    "2 x 512, Qwen2": Shape(2, 512, model="Qwen2"),
    "2 x 1,024, Gemma3Text": Shape(2, 1024, model="Gemma3Text"),
    "2 x 512, Mixtral": Shape(2, 512, model="Mixtral"),
}  # fmt: skip
RANDOM: dict[str, dict[str, object]] = {
    "GPT2": {"vocab_size": 49152, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "Qwen2": {
        "vocab_size": 49152, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2,
    },
    "Llama": {
        "vocab_size": 128256, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
        "num_attention_heads": 16, "num_key_value_heads": 4,
    },
    "Gemma3Text": {
        "vocab_size": 49152, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
    },
    "Mixtral": {
        "vocab_size": 49152, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 2, "num_local_experts": 4,
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
TRAIN = """
import json, pathlib, sys, torch
from loratune.__main__ import main
from loratune.training import run
result = pathlib.Path(sys.argv.pop(1))
make_plan = run.make_plan
def make_and_record(*arguments):
    made = make_plan(*arguments)
    result.write_text(json.dumps(made.memory.parts()))
    return made
run.make_plan = make_and_record
try:
    main()
finally:
    if torch.cuda.is_available():
        result.write_text(json.dumps(json.loads(result.read_text()) | {"peak": torch.cuda.max_memory_allocated()}))
"""


def settings(shape: Shape, work: Path, steps: int) -> list[str]:
    """The run as arguments of `loratune train`. Makes its rows, and its model where that is a random one."""
    model = Path(shape.model)
    if shape.model in RANDOM:
        model = work / shape.model
        python(MAKE, shape.model, json.dumps(RANDOM[shape.model]), str(SMOLLM2), str(model))
    values: dict[str, object] = {
        "model.name_or_path": model,
        "training.per_device_train_batch_size": shape.batch,
        "training.max_steps": steps,
        "training.warmup_steps": 0,
        "output_dir": work / "adapter",
    }
    if shape.length:
        rows = work / "rows.jsonl"
        lines = (json.dumps(row) for row in made_rows(shape, shape.batch * steps))
        rows.write_text("".join(f"{line}\n" for line in lines))
        values |= {"data.train": rows, "data.validation": "null", "data.max_length": shape.length}
    else:
        values |= {"data.train": QUICKSTART / "train.jsonl", "data.validation": QUICKSTART / "eval.jsonl"}
    return [f"{key}={value}" for key, value in (values | shape.settings).items()]


def made_rows(shape: Shape, count: int) -> Iterator[dict[str, str]]:
    """Rows of words that are drawn at random."""
    draw = random.Random(0)
    start = draw.choices(WORDS, k=shape.shared)
    for _ in range(count):
        least = shape.shared + ANSWER + 1 if shape.shared else 8
        length = draw.randint(least, shape.length) if shape.uneven else shape.length
        words = [*start, *draw.choices(WORDS, k=length - shape.shared)]
        if shape.shared:
            yield {"prompt": "".join(words[:-ANSWER]), "completion": "".join(words[-ANSWER:])}
        else:
            yield {"text": "".join(words)}


def python(code: str, *arguments: str) -> int:
    """Run code in a process of its own. Returns its largest resident set in bytes."""
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, "-c", code, *arguments]
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        _, status, usage = os.wait4(child.pid, 0)
        output.seek(0)
        if status:
            sys.exit(f"{output.read()}error: the run with {' '.join(arguments)} failed")
        return usage.ru_maxrss * 1024


def measure(shape: Shape, steps: int) -> tuple[dict[str, int], int]:
    """The parts of the estimate, and the peak, in bytes."""
    with tempfile.TemporaryDirectory() as name:
        result, words = Path(name, "parts.json"), settings(shape, Path(name), steps)
        assignments = [part for word in words for part in ("--set", word)]
        options = ["train", str(QUICKSTART / "config.yaml"), "--allow-worse", *assignments]
        resident = python(TRAIN, str(result), *options)
        parts: dict[str, int] = json.loads(result.read_text())
    return parts, parts.pop("peak", resident)


def main() -> None:
    """Print a row of the table for each shape."""
    parser = argparse.ArgumentParser(description="Compare the memory that loratune estimates with what training takes.")
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"one of: {'; '.join(SHAPES)} (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run (default: 3; more in long ones)")
    parser.add_argument("--parts", action="store_true", help="print the parts of each estimate, too")
    options = parser.parse_args()
    if unknown := set(options.shapes) - set(SHAPES):
        parser.error(f"no such shape: {', '.join(sorted(unknown))}")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not import_module("torch").cuda.is_available():
        parser.error("torch finds no GPU here")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    print("| rows x tokens | estimated, MiB | measured, MiB | measured / estimated |\n|---|---|---|---|", flush=True)
    for name in options.shapes or SHAPES:
        parts, peak = measure(SHAPES[name], options.steps or SHAPES[name].steps)
        print(f"| {name} | {parts['total'] >> 20:,} | {peak >> 20:,} | {peak / parts['total']:.2f} |", flush=True)
        if options.parts:
            print({part: value >> 20 for part, value in parts.items()}, flush=True)


if __name__ == "__main__":
    main()
