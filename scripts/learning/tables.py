"""The tables of the experiments: every figure is a loss on held-out rows, in float32, beside the rows it rests on."""

import base64
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from loratune.statistics import mean_ratio_interval

Result = dict[str, Any]
RATE = "training.learning_rate"


def unpacked(text: str) -> Any:
    """The numbers of `learn.packed`."""
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), np.float32).astype(np.float64)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def runs(results: Sequence[Result]) -> list[Result]:
    """The runs, without the scores of bases."""
    return [result for result in results if "settings" in result]


def matching(results: Sequence[Result], *keys: str) -> list[Result]:
    """The runs whose settings are of just these keys."""
    return [result for result in runs(results) if set(result["settings"]) == set(keys)]


def rates(results: Sequence[Result]) -> str:
    """Loss by task and rate, over all seeds; the best in bold, with the regret of each rate against it in brackets."""
    by_task: dict[tuple[str, str], dict[float, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in matching(results, RATE):
        by_task[result["model"], f"{result['task']} ({result['rows']})"][result["settings"][RATE]].append(result)
    bases = {result["name"]: result["rows_loss"] for result in results if result["name"].startswith("base ")}
    columns = sorted({rate for found in by_task.values() for rate in found})
    lines = []
    for (model, task), found in sorted(by_task.items()):
        means = {rate: float(np.mean([one["rows_loss"] for one in several])) for rate, several in found.items()}
        best = min(means.values())
        cells = [
            f"**{means[rate]:.4f}**" if means.get(rate) == best
            else f"{means[rate]:.4f} (+{means[rate] / best - 1:.1%})" if rate in means else ""
            for rate in columns
        ]  # fmt: skip
        seeds = str(min(len(several) for several in found.values()))
        base = bases.get(f"base {model} {task.split(' ')[0]}")
        lines.append([model, task, seeds, f"{base:.4f}" if base is not None else "", *cells])
    return markdown(["model", "task (rows)", "seeds", "base", *(f"{rate:g}" for rate in columns)], lines)


def forgetting(results: Sequence[Result]) -> str:
    """Loss on unrelated text less that of the base, by task and rate, over all seeds."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    bases = {result["name"]: result["text_loss"] for result in results if result["name"].startswith("base ")}
    for result in matching(results, RATE):
        change = result["text_loss"] - bases[f"base {result['model']} {result['task']}"]
        found[result["task"]][result["settings"][RATE]].append(change)
    columns = sorted({rate for one in found.values() for rate in one})
    lines = [
        [task, *(f"{np.mean(one[rate]):+.3f}" if rate in one else "" for rate in columns)]
        for task, one in found.items()
    ]
    return markdown(["task", *(f"{rate:g}" for rate in columns)], lines)


def paired(first: Result, second: Result) -> str:
    """The loss of the second run less that of the first on the same rows, with its interval."""
    nats = unpacked(second["rows_nats"]) - unpacked(first["rows_nats"])
    tokens = unpacked(first["rows_tokens"])
    interval = mean_ratio_interval(nats, tokens)
    value = float(nats.sum() / tokens.sum())
    return f"{value:+.4f}" + (f" ({interval.low:+.4f} to {interval.high:+.4f})" if interval else "")


def best_by(results: Sequence[Result], key: Callable[[Result], Any]) -> dict[Any, Result]:
    """For each value of a key the run with the least loss."""
    found: dict[Any, Result] = {}
    for result in results:
        name = key(result)
        if name not in found or result["rows_loss"] < found[name]["rows_loss"]:
            found[name] = result
    return found


def compared(results: Sequence[Result], varied: Sequence[str], reference: Sequence[Any]) -> str:
    """By task, the best rate's loss of each combination of settings, and its difference to the reference's."""
    chosen = [result for result in runs(results) if set(result["settings"]) == {*varied, RATE}]
    best = best_by(chosen, lambda one: (one["task"], one["rows"], *(str(one["settings"][key]) for key in varied)))
    lines = []
    for (task, rows, *values), result in best.items():
        other = best.get((task, rows, *map(str, reference)))
        difference = "reference" if other is result else paired(other, result) if other else ""
        loss, rate = f"{result['rows_loss']:.4f}", f"{result['settings'][RATE]:g}"
        lines.append([f"{task} ({rows})", *values, rate, loss, difference, f"{result['text_loss']:.3f}"])
    header = [
        "task (rows)",
        *(key.partition(".")[2] for key in varied),
        "best rate",
        "loss",
        "difference",
        "other text",
    ]
    return markdown(header, lines)


def ranks(results: Sequence[Result]) -> str:
    """Spearman's correlation, over rates, of the losses after a tenth of the steps and after all of them."""
    full = {
        (one["task"], one["settings"][RATE]): one["rows_loss"] for one in matching(results, RATE) if one["seed"] == 1
    }
    short = matching(results, RATE, "training.max_steps")
    lines = []
    for task in sorted({one["task"] for one in short}):
        pairs = [
            (one["rows_loss"], full[task, one["settings"][RATE]])
            for one in short
            if one["task"] == task and (task, one["settings"][RATE]) in full
        ]
        if len(pairs) > 2:
            short_losses, full_losses = np.array(pairs).T
            lines.append([task, str(len(pairs)), f"{float(spearmanr(short_losses, full_losses).statistic):.2f}"])
    return markdown(["task", "rates", "rank correlation"], lines)


def document(results: Sequence[Result]) -> str:
    """Markdown tables of all experiments that have results."""
    parts = {
        "Learning rate": rates(results),
        "Forgetting by learning rate": forgetting(results),
        "Targets and rank": compared(results, ["lora.target_modules", "lora.r"], [["q", "k", "v", "o"], 8]),
        "Batch": compared(results, ["training.per_device_train_batch_size"], [8]),
        "Schedule and warmup": compared(
            results, ["training.lr_scheduler_type", "training.warmup_steps"], ["linear", 0.0]
        ),
        "Epochs and rows": compared(results, ["training.num_train_epochs"], [1.0]),
        "A tenth of the steps": ranks(results),
    }
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in parts.items())
