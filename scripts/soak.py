"""A run that is killed, stopped, starved of disk and damaged at random moments, and resumed until it is done.

    python scripts/soak.py --kills 200          # needs models/SmolLM2-135M-Instruct, for its tokenizer

A small random Llama learns the quickstart's rows, with dropout, accumulation and a checkpoint every few steps. In the
meantime it is ended by `kill -9` at random moments, by Ctrl-C and SIGTERM; at random moments files of 2 to 60 kB
become the longest that may be written, so that whatever is written next fails; and a bit of a random file of the run,
or of the tokenised rows in the cache, is turned over while it lies dead, though never in both of the checkpoints that
are kept. In the end its adapter has to be, byte for byte, that of the same run to which nothing happened; and no
checkpoint that was seen whole may vanish before there is a newer one. Prints the counts, and ends with 1 if something
was lost.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from fork_server import Child, ForkServer, fork_server
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "loratune" / "data" / "quickstart" / "train.jsonl"
TOKENIZER = ROOT / "models" / "SmolLM2-135M-Instruct"
WEIGHTS = "adapter_model.safetensors"


def prepare(scratch: Path, steps: int) -> Path:
    """A model and the config of a run with a number of steps."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **shape))
    model.save_pretrained(scratch / "model")
    tokenizer.save_pretrained(scratch / "model")
    config = {
        "model": {"name_or_path": str(scratch / "model"), "dtype": "float32"},
        "lora": {"lora_dropout": 0.1},
        "data": {"train": str(ROWS), "max_length": 128},
        "training": {
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": steps, "save_steps": 5,
            "learning_rate": 1e-3,
        },
        "output_dir": str(scratch / "out"),
    }  # fmt: skip
    path = scratch / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass
class Soak:
    """One run and all that is done to it. counts: of events by name; flipped: a checkpoint with a wrong bit;
    reached: the step of the newest whole one that was ever seen."""

    config: Path
    commands: ForkServer
    dice: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    flipped: str | None = None
    reached: int = 0

    @property
    def directory(self) -> Path:
        """Of the run's checkpoints."""
        return self.config.with_name("out.partial") / "checkpoints"

    def whole(self) -> list[int]:
        """Steps of the checkpoints that nobody has damaged, the newest first."""
        names = {path.name for path in self.directory.glob("checkpoint-*")} - {self.flipped}
        return sorted((int(name.partition("-")[2]) for name in names), reverse=True)

    def round(self) -> bool:
        """Start or resume, and end it somehow; whether it came to its own end."""
        expected = self.whole()
        if max(expected, default=0) < self.reached:
            self.lost.append(f"the checkpoint of step {self.reached} is gone; there are {expected}")
        resume = ["--resume"] if expected else ["--overwrite"]
        starved = self.dice.random() < 0.2
        child = self.commands.start("train", self.config, *resume)
        self.counts["resumed" if expected else "started"] += 1
        how = self.dice.choices(ENDS, WEIGHT)[0]
        self.wait(child, self.dice.uniform(0.3, 4))
        if starved and child.poll() is None:
            limit = len(child.said()) + self.dice.randrange(2_000, 60_000)  # stderr is a file too
            with suppress(ProcessLookupError):
                resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (limit, limit))
            self.wait(child, 3)
        child.send(how)
        code = child.wait()
        self.judge(child, code, expected)
        self.reached = 0 if code == 0 else max(self.reached, *self.whole(), 0)
        return code == 0

    @staticmethod
    def wait(child: Child, seconds: float) -> None:
        """Let it run, for at most so long."""
        deadline = time.monotonic() + seconds
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)

    def judge(self, child: Child, code: int, expected: list[int]) -> None:
        """Count how it ended, and hold it against what was to be expected."""
        names = {0: "ended by itself", 8: "disk full", 130: "Ctrl-C", 143: "SIGTERM", -9: "kill -9"}
        names |= {-signal.SIGTERM: "SIGTERM"}  # before the fork is the program
        names |= {-signal.SIGABRT: "aborted"}  # by C++, where a signal's exception reaches it; nothing is lost by it
        self.counts[names.get(code, f"exit {code}")] += 1
        if code not in names:
            self.lost.append(f"exit {code}: {child.said()}")
        if "Traceback" in child.said():
            self.lost.append(child.said())
        if expected and "resuming from step" in child.said():
            step = int(child.said().split("resuming from step ")[1].split()[0])
            if step < expected[0]:
                self.lost.append(f"resumed from step {step}, though {expected[0]} was whole")

    def damage(self) -> None:
        """Turn over a bit of one file, so that a whole checkpoint is left."""
        there = [path.name for path in self.directory.glob("checkpoint-*")]
        self.flipped = self.flipped if self.flipped in there else None
        place = Path(os.environ["HF_DATASETS_CACHE"])
        if len(there) > 1 and self.flipped is None and self.dice.random() < 0.7:
            self.flipped = self.dice.choice(there)
            self.reached = max(self.whole())
            place = self.directory / self.flipped
        if files := sorted(path for path in place.rglob("*") if path.is_file() and path.stat().st_size):
            path = self.dice.choice(files)
            raw = bytearray(path.read_bytes())
            raw[self.dice.randrange(len(raw))] ^= 1 << self.dice.randrange(8)
            path.write_bytes(raw)
            self.counts["bits turned over"] += 1

    def compare(self, expected: bytes) -> None:
        """Hold the adapter against that of the undisturbed run, and clear it away."""
        output = self.config.with_name("out")
        if (output / WEIGHTS).read_bytes() == expected:
            self.counts["adapters equal"] += 1
        else:
            self.lost.append("another adapter than that of the undisturbed run")
        shutil.rmtree(output)


ENDS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
WEIGHT = (0.7, 0.15, 0.15)


def main() -> None:
    """Soak one run, and tell."""
    parser = argparse.ArgumentParser(description="End a run at random moments, and see that nothing is lost.")
    parser.add_argument("--kills", type=int, default=200, help="how often the run is ended before it may finish")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps of the run")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(scratch / "cache")
        config = prepare(scratch, given.steps)
        with fork_server(scratch) as commands:
            sys.exit(run(Soak(config, commands, random.Random(given.seed)), given.kills))


def run(soak: Soak, kills: int) -> int:
    """End runs so often, let the last one come to its end, and tell; the exit code."""
    began = time.monotonic()
    output = soak.config.with_name("straight")
    straight = soak.commands.start("train", soak.config, "--set", f"output_dir={output}")
    if straight.wait(3600):
        sys.exit(straight.said())
    expected, alone = (output / WEIGHTS).read_bytes(), time.monotonic() - began
    while (ended := sum(soak.counts[name] for name in ("kill -9", "Ctrl-C", "SIGTERM", "disk full"))) < kills:
        if soak.round():
            soak.compare(expected)
        elif soak.dice.random() < 0.3:
            soak.damage()
        if sys.stderr.isatty():
            print(f"\r{ended} of {kills}, at step {max(soak.whole(), default=0)} ", end="", file=sys.stderr)
    last = soak.commands.start("train", soak.config, *(["--resume"] if soak.whole() else ["--overwrite"]))
    if last.wait(3600):
        soak.lost.append(last.said())
    else:
        soak.compare(expected)
    print(f"the run alone took {alone:.0f} s, all of this {time.monotonic() - began:.0f} s")
    for name, count in sorted(soak.counts.items()):
        print(f"{name:18}{count:>6}")
    print(f"{'lost':18}{len(soak.lost):>6}")
    for what in soak.lost:
        print(what, file=sys.stderr)
    return 1 if soak.lost else 0


if __name__ == "__main__":
    main()
