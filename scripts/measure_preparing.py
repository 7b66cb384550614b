"""How fast rows become tokens, and in how much memory: reading, checking and tokenizing short rows, in a separate
process, with the tokenizer of the quickstart.

    python scripts/measure_preparing.py 100000 1000000

prints a table with a line for each number of rows. MB/s are of JSONL input per second of processor time, so they do not
depend on how many cores share the work; seconds are wall time. "Again" is the time to take the rows from the cache.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "configs" / "quickstart" / "train.jsonl"
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"

# The measured process: it reads and tokenizes the rows as `loratune train` does before the model is loaded.
PREPARE = """
import json, re, resource, sys, time
from transformers import AutoTokenizer
from loratune import data
from loratune.config import DataSection
from loratune.data.rendering import Renderer
path, model = sys.argv[1:]

def now():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.monotonic(), usage.ru_utime + usage.ru_stime

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

section = DataSection(train={"path": path})
renderer = Renderer(AutoTokenizer.from_pretrained(model))
before, start = peak(), now()
datasets = data.read_datasets(section, 0)
read = now()
tokenized = data.prepare(datasets.train, renderer, section, 49152)
done, after = now(), peak()
data.prepare(datasets.train, renderer, section, 49152)
print(json.dumps({"tokens": tokenized.report.tokens, "read": [b - a for a, b in zip(start, read)],
    "tokenize": [b - a for a, b in zip(read, done)], "cached": [b - a for a, b in zip(done, now())],
    "before": before, "peak": after}))
"""


def rows(count: int) -> Iterator[str]:
    """Lines of JSONL: definitions of the quickstart, three to a row, numbered so that no two are the same."""
    glosses = [json.loads(line)["prompt"].split("Definition: ")[1] for line in ROWS.read_text().splitlines()]
    endless = cycle(glosses)
    for number in range(count):
        prompt = f"{number}. " + " ".join(islice(endless, 3))
        yield json.dumps({"prompt": prompt, "completion": f" {next(endless)}"}) + "\n"


def measure(count: int) -> str:
    """A line of the table."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.jsonl"
        with path.open("w") as file:
            file.writelines(rows(count))
        size = path.stat().st_size / 1e6
        command = [sys.executable, "-c", PREPARE, str(path), str(MODEL)]
        done = subprocess.run(
            command, env=os.environ | {"HF_DATASETS_CACHE": scratch}, stdout=subprocess.PIPE, text=True, check=True
        )
    result = json.loads(done.stdout.splitlines()[-1])
    (read, read_cpu), (tokenize, tokenize_cpu) = result["read"], result["tokenize"]
    cells = [
        f"{count:,}", f"{size:,.0f}", f"{result['tokens']:,}", f"{read:.0f}", f"{size / read_cpu:.0f}",
        f"{tokenize:.0f}", f"{size / tokenize_cpu:.1f}", f"{result['cached'][0]:.1f}",
        f"{result['before'] >> 20:,}", f"{result['peak'] >> 20:,}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Measure how fast rows become tokens, and in how much memory.")
    parser.add_argument("counts", nargs="*", type=int, metavar="ROWS", default=[100_000], help="how many rows")
    header = "rows|MB|tokens|reading, s|MB/s|tokenizing, s|MB/s|again, s|MiB before|peak, MiB"
    print(f"| {' | '.join(header.split('|'))} |\n|{'---|' * 10}", flush=True)
    for count in parser.parse_args().counts:
        print(measure(count), flush=True)


if __name__ == "__main__":
    main()
