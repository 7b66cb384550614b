"""Trains some steps of the quickstart with several releases of transformers, and prints a row for each.

    python scripts/compare_transformers.py 5.20.0 5.24.0 5.25.0     # the releases; --steps N, --threads N

Each release is installed without its requirements into a folder of its own, which comes before the installed packages,
so that everything else is the same. A row has the layers that are replaced, the loss of the last step, tokens per
second in steps, and the seconds in which layers were recognized, for the first time and with what was kept.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RUN = """
import json, sys, time
import loratune
from loratune.kernels import acceleration
seconds, forms = [], []
recognize = acceleration.recognize
def timed(*given):
    begin = time.perf_counter()
    found = recognize(*given)
    seconds.append(time.perf_counter() - begin)
    forms.append(sorted({one.form for one in found.values() if one.form}))
    return found
acceleration.recognize = timed
adapter = loratune.train(loratune.load_config(sys.argv[1]), overwrite=True)
record = json.loads((adapter.path / "loratune.json").read_text())
curve = [step for step in record["curve"] if "loss" in step]
print(json.dumps({
    "release": record["versions"]["transformers"], "replaced": forms[0],
    "loss": curve[-1]["loss"], "tokens/s": record["metrics"]["tokens_per_second"], "seconds": seconds[0],
}))
"""


def train(release: str, model: Path, cache: Path, steps: int, threads: int) -> dict[str, Any]:
    """What a run prints with a release, in a process of its own. cache: where results of checks are kept."""
    rows = ROOT / "loratune" / "data" / "quickstart" / "train.jsonl"
    config = {
        "model": {"name_or_path": str(model)}, "data": {"train": str(rows)},
        "lora": {"r": 8, "lora_alpha": 16}, "output_dir": str(cache / "adapter"),
        "training": {"max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1},
    }  # fmt: skip
    place = install(release)
    environment = os.environ | {
        "PYTHONPATH": str(place),
        "XDG_CACHE_HOME": str(cache / "kept"),
        "OMP_NUM_THREADS": str(threads),
    }
    path = cache / "config.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML.
    command = [sys.executable, "-c", RUN, str(path)]
    done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        return {"release": release, "error": done.stderr.strip().splitlines()[-1]}
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


def install(release: str) -> Path:
    """The folder of a release."""
    place = Path(tempfile.gettempdir()) / "loratune-transformers" / release
    if not place.is_dir():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(place),
            f"transformers=={release}",
        ]
        subprocess.run(command, timeout=600, check=True)
    return place


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="+", metavar="RELEASE")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    print("| release | replaced | loss | tokens/s | recognized in s, first | again |\n|---|---|---|---|---|---|")
    for release in given.releases:
        with tempfile.TemporaryDirectory() as cache:
            first, again = (train(release, given.model, Path(cache), given.steps, given.threads) for _ in range(2))
        if failed := first.get("error") or again.get("error"):
            print(f"| {release} | {failed} | | | | |", flush=True)
            continue
        parts = ", ".join(first["replaced"]) or "nothing"
        speed = max(first["tokens/s"], again["tokens/s"])
        print(
            f"| {first['release']} | {parts} | {first['loss']:.6f} | {speed:.0f} | {first['seconds']:.2f} |"
            f" {again['seconds']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
