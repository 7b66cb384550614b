"""Measure training, answers, evaluation and merging of a large base on a small machine.

    python scripts/measure_large.py [--shape 0.5B|1B|1.5B|4B|7B|8B|tiny] [--base DIR] [8bit 4bit none ...]

The base has random weights and SmolLM2's tokenizer; it is made in DIR unless it is there. Each quantization trains on
the rows of the quickstart, two rows a batch, in a process of its own. A line of the table is printed for each: the time
from the command to the first step, seconds a step, the memory that was estimated and the most that was in use at once.
The latter is the most memory of the process, sampled five times a second, and the pages of files that are mapped at its
end, those of the libraries; pages of weight files, which the kernel can drop, do not count. Needs the model of the
quickstart (scripts/fetch_smollm2.py); 7B needs 14 GB of disk, and as much again for `--commands merge`.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
QUICKSTART = ROOT / "loratune" / "data" / "quickstart"
SHAPES = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "tiny": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16, "num_attention_heads": 8},
}
VOCABULARY, POSITIONS = 49152, 4096
STEP = re.compile(r"step +\d+/\d+ +loss")


def make_base(directory: Path, shape: str, tokenizer: Path = SMOLLM2, device: str = "cpu") -> None:
    """Write the base, a file for each layer and one for the rest; only one is in memory.

    Args:
        directory: Appears once it is whole.
        shape: A key of `SHAPES`.
        tokenizer: The directory whose tokenizer it gets.
        device: Where the weights are drawn, which decides their values.
    """
    import torch  # noqa: PLC0415  only this needs it
    from safetensors.torch import save_file  # noqa: PLC0415
    from transformers import LlamaConfig  # noqa: PLC0415

    sizes = SHAPES[shape]
    width, inner, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    LlamaConfig(
        **sizes, num_key_value_heads=sizes["num_attention_heads"], vocab_size=VOCABULARY, bos_token_id=1,
        eos_token_id=2, pad_token_id=2, max_position_embeddings=POSITIONS, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(unfinished)  # fmt: skip
    for path in tokenizer.glob("*"):
        if path.name.startswith(("tokenizer", "special_tokens", "vocab", "merges", "chat_template")):
            shutil.copy(path, unfinished)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator).cpu()

    attention = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    gated = {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    names: dict[str, str] = {}
    for number in range(layers + 1):
        file = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        if number < layers:
            start = f"model.layers.{number}."
            tensors = {f"{start}{name}.weight": drawn(*size) for name, size in (attention | gated).items()}
            norms = [f"{start}{name}_layernorm.weight" for name in ("input", "post_attention")]
        else:
            tensors = {f"{name}.weight": drawn(VOCABULARY, width) for name in ("model.embed_tokens", "lm_head")}
            norms = ["model.norm.weight"]
        tensors |= {name: torch.ones(width, dtype=torch.bfloat16) for name in norms}
        save_file(tensors, unfinished / file, {"format": "pt"})
        names |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": sum(path.stat().st_size for path in unfinished.glob("*.safetensors"))}}
    (unfinished / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": names}))
    unfinished.rename(directory)


@dataclass
class Ran:
    """A command that has run.

    Attributes:
        lines: Seconds since its start, and text, of each line on stderr.
        seconds: How long it took.
        peak: The most bytes of memory, without pages of files.
        mapped: The bytes of pages of files that are in memory at the end.
        code: Its exit code.
        output: What it printed on stdout.
    """

    lines: list[tuple[float, str]] = field(default_factory=list)
    seconds: float = 0.0
    peak: int = 0
    mapped: int = 0
    code: int = 0
    output: str = ""

    @property
    def steps(self) -> list[float]:
        """The seconds at which each step was done."""
        return [at for at, line in self.lines if STEP.match(line)]

    @property
    def silence(self) -> tuple[float, str]:
        """The longest time without a line, and the line before it."""
        ends = [*(at for at, _ in self.lines), self.seconds]
        gaps = [(ends[0], "the start")] if self.lines else [(self.seconds, "the start")]
        gaps += [(ends[place + 1] - at, line) for place, (at, line) in enumerate(self.lines)]
        return max(gaps)


def run(arguments: list[str], log: Path, last: int = 0) -> Ran:
    """Run `loratune` with these arguments.

    Args:
        arguments: Of the command line.
        log: Receives its lines, each with its time.
        last: The step after which it is killed; 0: none.
    """
    ran, start = Ran(), time.monotonic()
    with log.open("a") as file, tempfile.TemporaryFile("w+") as output:
        file.write(f"$ loratune {' '.join(arguments)}\n")
        command = [sys.executable, "-m", "loratune", *arguments]
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, text=True)
        sampler = threading.Thread(target=sample, args=(child, ran), daemon=True)
        sampler.start()
        assert child.stderr is not None
        for line in child.stderr:
            ran.lines.append((time.monotonic() - start, line.rstrip("\n")))
            file.write(f"{ran.lines[-1][0]:8.1f}  {ran.peak / 1e9:5.2f} GB  {ran.mapped / 1e9:5.2f} GB  {line}")
            file.flush()
            if last and len(ran.steps) == last:
                child.kill()
        ran.code, ran.seconds = child.wait(), time.monotonic() - start
        output.seek(0)
        ran.output = output.read()
        file.write(f"{ran.seconds:8.1f}  {ran.peak / 1e9:5.2f} GB  exit code {ran.code}\n{ran.output}\n")
    return ran


def sample(child: "subprocess.Popen[str]", ran: Ran) -> None:
    """Record the most memory of a process until it ends."""
    status = Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            return
        sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith("Rss")}
        if sizes.get("RssAnon"):  # else the process has just ended
            ran.peak = max(ran.peak, sizes["RssAnon"] + sizes["RssShmem"])
            ran.mapped = sizes["RssFile"]
        time.sleep(0.2)


def train(base: Path, quantization: str, out: Path, options: argparse.Namespace) -> Ran:
    """Train on the rows of the quickstart. options: those of the command line."""
    values = {
        "model.name_or_path": base, "model.quantization": quantization, "output_dir": out,
        "data.train": QUICKSTART / "train.jsonl", "data.validation": QUICKSTART / "eval.jsonl",
        "training.per_device_train_batch_size": 2, "training.max_steps": options.steps, "training.logging_steps": 1,
        "training.warmup_steps": 0,
    }  # fmt: skip
    assignments = [f"{key}={value}" for key, value in values.items()] + options.set
    given = [part for word in assignments for part in ("--set", word)]
    last = options.steps if options.only_steps else 0
    return run(["train", str(QUICKSTART / "config.yaml"), "--overwrite", "--allow-worse", *given], options.log, last)


def estimated(base: Path, quantization: str, settings: list[str], log: Path) -> int:
    """What `params` says of the memory for the same rows, in bytes."""
    values = [f"model.name_or_path={base}", f"model.quantization={quantization}", *settings]
    values += [f"data.train={QUICKSTART / 'train.jsonl'}", "training.per_device_train_batch_size=2"]
    given = [part for word in values for part in ("--set", word)]
    ran = run(["params", str(QUICKSTART / "config.yaml"), "--json", *given], log)
    found: int = json.loads(ran.output)["rows_memory"]["total"]
    return found


def others(commands: list[str], out: Path, log: Path) -> Iterator[tuple[str, Ran]]:
    """What is done with the adapter afterwards."""
    merged = out.with_name("merged")
    given = {
        "generate": ["generate", "--adapter", str(out), "--max-new-tokens", "8", "Semantic class:"],
        "evaluate": ["evaluate", "--adapter", str(out), "--data", str(out.with_name("held-out.jsonl")), "--json"],
        "merge": ["merge", "--adapter", str(out), "--output", str(merged), "--json"],
    }
    rows = (QUICKSTART / "eval.jsonl").read_text().splitlines()[:8]
    out.with_name("held-out.jsonl").write_text("\n".join(rows) + "\n")
    for command in commands:
        yield command, run(given[command], log)
        shutil.rmtree(merged, ignore_errors=True)


def main() -> None:
    """Print a line of the table for each quantization, and what was done with its adapter."""
    parser = argparse.ArgumentParser(description="Measure a large base on a small machine.")
    parser.add_argument("quantizations", nargs="*", metavar="8bit|4bit|none", help="default: all")
    parser.add_argument("--shape", choices=SHAPES, default="7B")
    parser.add_argument("--base", type=Path, help="where the base is, or is made (default: a temporary directory)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only-steps", action="store_true", help="end each run after its steps, without an adapter")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="settings of the run")
    parser.add_argument("--commands", nargs="*", default=[], choices=("generate", "evaluate", "merge"))
    parser.add_argument("--log", type=Path, default=Path("measure_large.log"), help="lines of all commands, with times")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        base = options.base or Path(name, options.shape)
        if not base.is_dir():
            start = time.monotonic()
            make_base(base, options.shape)
            print(f"made {base} in {time.monotonic() - start:.0f} s", flush=True)
        print("| quantization | to the first step | a step | longest silence | estimated | peak | total |", flush=True)
        print("|---|---|---|---|---|---|---|", flush=True)
        for quantization in options.quantizations or ("8bit", "4bit", "none"):
            out = Path(name, f"adapter-{quantization}")
            ran = train(base, quantization, out, options)
            steps = ran.steps
            each = (steps[-1] - steps[0]) / max(1, len(steps) - 1) if steps else 0.0
            first = steps[0] - each if steps else ran.seconds
            memory = estimated(base, quantization, options.set, options.log)
            cells = [f"{first:.0f} s", f"{each:.1f} s", f"{ran.silence[0]:.0f} s after {ran.silence[1][:40]!r}"]
            cells += [f"{memory / 2**30:.1f} GiB", f"{(ran.peak + ran.mapped) / 2**30:.1f} GiB", f"{ran.seconds:.0f} s"]
            has_failed = ran.code and not options.only_steps
            code = f" exit code {ran.code}" if has_failed else ""
            print(f"| {quantization} | {' | '.join(cells)} |{code}", flush=True)
            for command, other in others(options.commands, out, options.log):
                used = (other.peak + other.mapped) / 2**30
                print(f"  {command}: {other.seconds:.0f} s, {used:.1f} GiB, exit code {other.code}", flush=True)


if __name__ == "__main__":
    main()
