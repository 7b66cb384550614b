"""How the cost of training grows: with the number of rows, and with their length.

    python scripts/measure_scaling.py [--rows 1000 10000 100000] [--lengths 256 512 1024 2048 4096]

Each line is a `loratune train` in a process of its own, with the model and the text of the quickstart: 8 steps of
short rows out of so many, and 4 steps of 4,096 tokens in rows of one length. Seconds to the first step are those of
loading, checking and tokenizing all rows; memory is the most that the process held.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
TEXT = ROOT / "configs" / "quickstart" / "train.jsonl"
BATCH = 4096
"""Tokens of a step where the length is what grows."""


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", type=int, default=[1_000, 10_000, 100_000])
    parser.add_argument("--lengths", nargs="*", type=int, default=[256, 512, 1024, 2048, 4096])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "rows.jsonl"
        print("| rows | tokens/s | peak RSS, GiB | to the first step, s |\n|---|---|---|---|")
        for count in given.rows:
            data.write_text("".join(_short(count)), encoding="utf-8")
            print(f"| {count:,} | {_trained(data, 8, 48, 256)} |", flush=True)
        print("\n| tokens of a row | tokens/s | peak RSS, GiB | to the first step, s |\n|---|---|---|---|")
        for length in given.lengths:
            data.write_text("".join(_long(length, 4 * BATCH // length)), encoding="utf-8")
            print(f"| {length:,} | {_trained(data, 4, BATCH // length, length)} |", flush=True)


def _short(count: int) -> Iterator[str]:
    """Rows of the quickstart, no two the same."""
    for number, line in enumerate(islice(cycle(TEXT.read_text(encoding="utf-8").splitlines()), count)):
        row = json.loads(line)
        yield json.dumps({"prompt": f"{number}. {row['prompt']}", "completion": row["completion"]}) + "\n"


def _long(length: int, count: int) -> Iterator[str]:
    """Rows of so many tokens, cut from one text."""
    ids = AutoTokenizer.from_pretrained(MODEL)(TEXT.read_text(encoding="utf-8"))["input_ids"]
    for number in range(count):
        part = list(islice(cycle(ids), number * length, (number + 1) * length))
        yield json.dumps({"input_ids": part, "labels": part}) + "\n"


def _trained(data: Path, steps: int, rows: int, length: int) -> str:
    """The cells of a line."""
    settings = {
        "model.name_or_path": MODEL, "data.train": data, "data.max_length": length, "output_dir": data.parent / "out",
        "training.per_device_train_batch_size": rows, "training.max_steps": steps, "training.logging_steps": steps,
        "training.save_steps": 10 * steps,
    }  # fmt: skip
    config = data.with_name("config.yaml")
    config.write_text("".join(f"{key}: {{}}\n" for key in ("model", "data", "training")), encoding="utf-8")
    command = [sys.executable, "-m", "loratune", "train", str(config), "--overwrite"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    start, first, rate = time.monotonic(), 0.0, ""
    fresh = os.environ | {"HF_DATASETS_CACHE": str(data.parent / f"{rows}-{length}-{data.stat().st_size}")}
    child = subprocess.Popen(command, env=fresh, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.stdout is not None
    lines: list[str] = []
    for line in child.stdout:
        lines.append(line)
        if found := re.match(rf"step +(\d+)/{steps} .*?([\d,]+) tokens/s", line):
            first, rate = first or time.monotonic() - start, found[2]
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit("".join(lines[-20:]))
    return f"{rate} | {usage.ru_maxrss / 2**20:.2f} | {first:.1f}"


if __name__ == "__main__":
    main()
