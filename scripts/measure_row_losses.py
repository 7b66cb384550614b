"""Write `row_losses.csv`, what `interval_coverage.py` draws rows from: losses and matches of a base and two adapters.

    python scripts/measure_row_losses.py models/SmolLM2-135M-Instruct WORK

WORK is a directory for rows and adapters. The rows are those conversations of PyPI chatterbot-corpus 1.3.3 (BSD) that
share neither prompt nor completion with another, see `peers.data`, and WordNet definitions of the quickstart. 150 and
250 of them train two adapters with the quickstart's settings, for 30 steps and for 50; the others of the corpus and 600
further definitions are scored one by one. A line is a row: its kind, its supervised tokens, the nats of each model over
them, and whether greedy decoding gives all of them, which is so where each is the most probable after the ones before.
It takes ten minutes on one thread.

    OMP_NUM_THREADS=1 python scripts/measure_row_losses.py MODEL WORK --batches DTYPE [--definitions 1] [--rounds 2] \\
        [--without-padded]

instead measures the batches in which `loratune train` scores rows, beside the same rows one by one and padded: 64 rows
of so many definitions each. The ways take turns after a few rows that do not count; given are the CPU seconds of one
thread (`time.process_time`), the least of each, and by how much the loss differs at most from that of a row alone, in
one row and in the mean over all.
"""

import argparse
import csv
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from loratune import config, data
from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.commands.plan import Plan, make_plan
from loratune.config import Source
from loratune.console import show_progress
from loratune.system.launcher import SINGLE_PROCESS
from loratune.training import preflight
from loratune.training.losses import Loss, ScoringLayout
from loratune.training.run_dir import RunDirectory
from peers.data import Text, distinct, pairs

ROOT = Path(__file__).resolve().parent.parent
LOSSES = Path(__file__).with_name("row_losses.csv")
COLUMNS = ("kind", "tokens", *(f"{model}_{what}" for what in ("nats", "match") for model in ("base", "short", "long")))
STEPS = (30, 50)
ROWS, WARM_UP = 64, 4
"""Rows that are scored in several ways, and how many of them before that."""


def definitions() -> list[Text]:
    """The quickstart's rows, those for training first."""
    files = (ROOT / "configs" / "quickstart" / name for name in ("train.jsonl", "eval.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [(row["prompt"], row["completion"]) for row in rows]


def write(path: Path, texts: list[Text]) -> Path:
    """Rows for loratune."""
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def train(model: str, work: Path, steps: int) -> Path:
    """Train an adapter on `train.jsonl`, unless it is there."""
    adapter = work / f"adapter-{steps}"
    if not adapter.is_dir():
        settings = (
            f"model.name_or_path={model}", f"data.train={work / 'train.jsonl'}", "data.validation=null",
            f"training.max_steps={steps}", f"output_dir={adapter}",
        )  # fmt: skip
        command = [sys.executable, "-m", "loratune", "train", str(ROOT / "configs" / "quickstart" / "config.yaml")]
        subprocess.run([*command, *(f"--set={one}" for one in settings)], cwd=ROOT, check=True)
    return adapter


def scored(model: Any, rows: Any) -> Iterator[tuple[int, float, bool]]:
    """Supervised tokens, their nats, and whether greedy decoding gives them, of each row."""
    for row in rows:
        ids, labels = (torch.tensor([list(one)], device=model.device) for one in (row.ids, row.labels))
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        wanted = labels[0, 1:]
        supervised = wanted >= 0
        logits, wanted = logits[supervised], wanted[supervised]
        nats = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
        yield len(wanted), nats, bool((logits.argmax(-1) == wanted).all())


def measured(adapter: Path, file: Path, *, base: bool) -> list[tuple[int, float, bool]]:
    """The rows of a file, scored with an adapter or on its base."""
    info = AdapterDirectory.open(adapter, print)
    loaded = loading.load(info, print)
    split = data.read_source(Source(path=str(file)), info.data, data.no_progress)
    rows = data.prepare(split, loaded.renderer, loaded.data, loaded.model.config.get_text_config().vocab_size).rows
    with loaded.without_adapter() if base else nullcontext():
        return [*scored(loaded.model, rows.rows())]


def planned(model: str, dtype: str, work: Path, texts: list[Text]) -> Plan:
    """A run with the quickstart's settings on some rows."""
    values = {
        "model": {"name_or_path": model, "dtype": dtype},
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": ["q", "k", "v", "o"]},
        "data": {"train": str(write(work / "scored.jsonl", texts))},
        "training": {"per_device_train_batch_size": 8},
        "output_dir": str(work / "unused"),
    }
    directory = RunDirectory(work / "unused", work / "unused.partial", str(work / "unused"))
    return make_plan(preflight.check(config.from_values(values, "measured"), directory, show_progress), show_progress)


def taking_turns(plan: Plan, rounds: int, *, padded: bool) -> None:
    """Score the rows in each way, and print a line for each."""
    batches, rows = plan.batches, plan.datasets.train
    ways = {
        "one by one": ScoringLayout(False, None, batches.pad_id, 1),
        "as trained": batches.scoring,
    }
    if padded:
        ways["padded"] = ScoringLayout(False, None, batches.pad_id, batches.scoring.tokens)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, list[Loss]] = {}
    with batches.acceleration.applied(plan.model):
        for number in range(rounds + 1):
            for way in [*ways][:: -1 if number % 2 else 1]:
                start = time.process_time()
                numbers = range(rows.items if number else WARM_UP)
                found[way] = batches.objective.item_losses(plan.model, rows, numbers, ways[way], SINGLE_PROCESS)
                seconds[way].append(time.process_time() - start)
    alone, base = [loss.total for loss in found["one by one"]], min(seconds["one by one"][1:])
    for way, scoring in ways.items():
        batches_of_way = scoring.batches(scoring.layout(rows), range(rows.items))
        best, totals = min(seconds[way][1:]), [loss.total for loss in found[way]]
        most = max(abs(one / other - 1) for one, other in zip(totals, alone, strict=True))
        print(f"  {way}: {len(batches_of_way)} batches, {best:.2f} s, {base / best:.2f} times as fast", end="")
        print(f"; differs by {most:.1e} at most, by {abs(sum(totals) / sum(alone) - 1):.1e} in the mean")


def measure_batches(model: str, dtype: str, together: int, rounds: int, work: Path, *, padded: bool) -> None:
    """Print the speed of each way. together: definitions in a row."""
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    texts = definitions()
    joined = [texts[start : start + together] for start in range(0, ROWS * together, together)]
    plan = planned(model, dtype, work, [("\n".join(prompt for prompt, _ in some), some[-1][1]) for some in joined])
    lengths = plan.datasets.train.rows.lengths
    print(f"{dtype}, {len(lengths)} rows of {lengths.min()} to {lengths.max()} tokens", end="")
    print(f", {plan.batches.scoring.tokens} tokens in a batch at most:")
    taking_turns(plan, rounds, padded=padded)


def main() -> None:
    """Train, score, and write the table."""
    parser = argparse.ArgumentParser(description="Measure the losses of rows on a base and two adapters.")
    parser.add_argument("model")
    parser.add_argument("work", type=Path)
    parser.add_argument("--batches", metavar="DTYPE", help="measure the batches of rows instead")
    parser.add_argument("--definitions", type=int, default=1, help="in each of these rows")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--without-padded", action="store_true")
    options = parser.parse_args()
    work = options.work.resolve()
    if options.batches:
        how, padded = (options.batches, options.definitions, options.rounds), not options.without_padded
        measure_batches(options.model, *how, work, padded=padded)
        return
    conversations, wordnet = distinct(pairs(work)), definitions()
    training = conversations[:150] + wordnet[:250]
    random.Random(0).shuffle(training)
    write(work / "train.jsonl", training)
    short, long = (train(str(Path(options.model).resolve()), work, steps) for steps in STEPS)
    lines: list[Sequence[object]] = [COLUMNS]
    for kind, texts in {"conversation": conversations[150:], "definition": wordnet[-600:]}.items():
        file = write(work / f"{kind}.jsonl", texts)
        models = [
            measured(adapter, file, base=base) for adapter, base in ((short, True), (short, False), (long, False))
        ]
        for row in zip(*models, strict=True):
            nats, matches = [f"{nats:.3f}" for _, nats, _ in row], [int(match) for _, _, match in row]
            lines.append((kind, row[0][0], *nats, *matches))
    with LOSSES.open("w", encoding="utf-8", newline="") as table:
        csv.writer(table, lineterminator="\n").writerows(lines)


if __name__ == "__main__":
    main()
