"""How exactly `training.max_minutes` is kept: the time of whole commands beside their budget, on an idle machine.

    .venv/bin/python scripts/measure_budget.py [MINUTES ...]

trains the quickstart (`make quickstart` fetches its model) with each budget, 1, 3 and 10 minutes if none is given, for
as many epochs as there is time for, as a process of its own, and prints how long it took from its start to its exit.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Print a line for each budget."""
    print(f"{'minutes':>8} {'steps':>6} {'seconds':>8} {'of the budget':>13}")
    for minutes in [float(argument) for argument in sys.argv[1:]] or [1.0, 3.0, 10.0]:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "adapter"
            settings = [f"training.max_minutes={minutes:g}", "training.num_train_epochs=1000", f"output_dir={output}"]
            options = [part for setting in settings for part in ("--set", setting)]
            command = [sys.executable, "-m", "loratune", "train", "configs/quickstart/config.yaml", *options]
            start = time.monotonic()
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds = time.monotonic() - start
            steps = yaml.safe_load((output / "run.yaml").read_text(encoding="utf-8"))["training"]["max_steps"]
        print(f"{minutes:8g} {steps:6,} {seconds:8.1f} {seconds / (60 * minutes):13.1%}", flush=True)


if __name__ == "__main__":
    main()
