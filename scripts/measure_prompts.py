"""Losses and answers of rows that begin alike: how much faster they are where the beginning is computed once.

    python scripts/measure_prompts.py ADAPTER --rows configs/quickstart/eval.jsonl

Each round computes each batch in both ways, in turn; the medians of their ratios are printed, and their quartiles.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import typer

from loratune import data
from loratune.adapter import generation, loading
from loratune.adapter.directory import AdapterDirectory
from loratune.adapter.shared_prompts import SharedPrompts
from loratune.config import Source
from loratune.evaluation import scoring


def main(
    directory: Annotated[Path, typer.Argument(metavar="ADAPTER")],
    rows: Annotated[Path, typer.Option(help="Rows with prompts.")],
    new_tokens: int = 6,
    batches: int = 4,
) -> None:
    """Compare, and print a line for losses and one for answers."""
    tuned = loading.load(AdapterDirectory.open(directory, print))
    split = data.read_source(Source(path=str(rows)), tuned.data)
    vocabulary = tuned.model.config.get_text_config().vocab_size
    dataset = data.prepare(split, tuned.renderer, tuned.data, vocabulary)
    prompts = [row.prompt for row in dataset.rows.rows()]
    groups = [range(at, at + generation.BATCH) for at in range(0, len(prompts), generation.BATCH)][:batches]
    tuned.complete([prompts[0], prompts[1]], 1)  # The trial of shared prompts comes before the first of them.
    ways: dict[str, Callable[[range], Any]] = {
        "losses": lambda group: scoring.losses(tuned, dataset, group),
        "answers": lambda group: tuned.complete([prompts[number] for number in group], new_tokens),
    }
    for name, way in ways.items():
        way(groups[0])
        ratios = [alone(way, group) / seconds(way, group) for group in groups for _ in range(2)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name}: {middle:.2f} ({low:.2f} to {high:.2f}) times, {len(ratios)} pairs of {generation.BATCH} rows")


def alone(way: Callable[[range], Any], group: range) -> float:
    """Seconds of a batch whose rows share nothing."""
    with patch.object(SharedPrompts, "_shared", staticmethod(lambda rows, first: 0)):
        return seconds(way, group)


def seconds(way: Callable[[range], Any], group: range) -> float:
    """Seconds of a batch."""
    start = time.perf_counter()
    way(group)
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
