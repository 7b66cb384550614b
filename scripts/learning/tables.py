"""The tables of the experiments: every figure is a loss on held-out rows, in float32, beside the rows it rests on."""

import base64
import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from learning.experiments import FORMULA
from loratune.statistics import mean_ratio_interval

Result = dict[str, Any]
RATE = "training.learning_rate"
MISSING = "missing"


def unpacked(text: str) -> Any:
    """The numbers of `learn.packed`."""
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), np.float32).astype(np.float64)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read(path: Path) -> list[Result]:
    """The results of a file, if it is there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def runs(results: Sequence[Result]) -> list[Result]:
    """The runs, without the scores of bases."""
    return [result for result in results if "settings" in result]


def matching(results: Sequence[Result], *keys: str) -> list[Result]:
    """The runs whose settings are of just these keys."""
    return [result for result in runs(results) if set(result["settings"]) == set(keys)]


def first_seed(results: Sequence[Result]) -> list[Result]:
    """Those with seed 1."""
    return [one for one in results if one["seed"] == 1]


def rates(results: Sequence[Result]) -> str:
    """Loss by task and rate of the first seed: the best in bold, with the regret of each against it in brackets.

    The rate of `training.auto` is 2.6e-3 for 135M, and 5e-3 for the further shapes.
    """
    by_task: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    for one in first_seed(matching(results, RATE)):
        by_task[one["model"], f"{one['task']} ({one['rows']})"][one["settings"][RATE]] = one["rows_loss"]
    bases = {result["name"]: result["rows_loss"] for result in results if result["name"].startswith("base ")}
    columns = sorted({rate for found in by_task.values() for rate in found})
    lines = []
    for (model, task), found in sorted(by_task.items()):
        best = min(found.values())
        cells = [
            f"**{best:.4f}**" if found.get(rate) == best
            else f"{found[rate]:.4f} (+{found[rate] / best - 1:.1%})" if rate in found else MISSING
            for rate in columns
        ]  # fmt: skip
        base = bases.get(f"base {model} {task.split(' ')[0]}")
        lines.append([model, task, f"{base:.4f}" if base is not None else "", *cells])
    return markdown(["model", "task (rows)", "base", *(f"{rate:g}" for rate in columns)], lines)


def seeds(results: Sequence[Result]) -> str:
    """Loss by task and rate of several seeds: the mean, and the lowest and highest; and how often each rate is best."""
    found: dict[tuple[str, str], dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for one in matching(results, RATE):
        place = one["model"], f"{one['task']} ({one['rows']})"
        found[place][one["settings"][RATE]][one["seed"]] = one["rows_loss"]
    lines = []
    for place, by_rate in sorted(found.items()):
        several = {rate: losses for rate, losses in sorted(by_rate.items()) if len(losses) > 2}
        best = [min(several, key=lambda rate: several[rate][seed]) for seed in (1, 2, 3)] if several else []
        for rate, losses in several.items():
            mean, low, high = np.mean([*losses.values()]), min(losses.values()), max(losses.values())
            lines.append([*place, f"{rate:g}", f"{mean:.4f}", f"{low:.4f} to {high:.4f}", f"{best.count(rate)} of 3"])
    return markdown(["model", "task (rows)", "rate", "mean of three seeds", "range", "best of these rates"], lines)


def forgetting(results: Sequence[Result]) -> str:
    """Loss on unrelated text less that of the base, by model, task and rate of the first seed."""
    found: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    bases = {result["name"]: result["text_loss"] for result in results if result["name"].startswith("base ")}
    for one in first_seed(matching(results, RATE)):
        change = one["text_loss"] - bases[f"base {one['model']} {one['task']}"]
        found[one["model"], f"{one['task']} ({one['rows']})"][one["settings"][RATE]] = change
    columns = sorted({rate for one in found.values() for rate in one})
    lines = [
        [*place, *(f"{one[rate]:+.3f}" if rate in one else MISSING for rate in columns)]
        for place, one in sorted(found.items())
    ]
    return markdown(["model", "task (rows)", *(f"{rate:g}" for rate in columns)], lines)


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
    """By task, the best rate's loss of each combination of settings, and its difference to the reference's.

    What a run does not name of the settings is as in the reference, which counts only at the rates of the others. Only
    the first seed counts.
    """
    usual = dict(zip(varied, reference, strict=True))

    def values(one: Result) -> list[str]:
        return [str((usual | one["settings"])[key]) for key in varied]

    chosen = [result for result in runs(results) if set(result["settings"]) <= {*varied, RATE} and result["seed"] == 1]
    rates_of: dict[tuple[Any, ...], set[float]] = defaultdict(set)
    for one in chosen:
        if values(one) != [str(value) for value in reference]:
            rates_of[one["model"], one["task"], one["rows"]].add(one["settings"][RATE])
    chosen = [one for one in chosen if one["settings"][RATE] in rates_of[one["model"], one["task"], one["rows"]]]
    best = best_by(chosen, lambda one: (one["model"], one["task"], one["rows"], *values(one)))
    lines = []
    for (model, task, rows, *settings), result in sorted(best.items()):
        other = best.get((model, task, rows, *map(str, reference)))
        difference = "reference" if other is result else paired(other, result) if other else MISSING
        loss, rate = f"{result['rows_loss']:.4f}", f"{result['settings'][RATE]:g}"
        lines.append([model, f"{task} ({rows})", *settings, rate, loss, difference, f"{result['text_loss']:.3f}"])
    header = [
        "model",
        "task (rows)",
        *(key.partition(".")[2] for key in varied),
        "best rate",
        "loss",
        "difference",
        "other text",
    ]
    return markdown(header, lines)


def lengths(results: Sequence[Result]) -> str:
    """Loss by task, rows, rate and epochs, and where validation rows chose the step of the longest run."""
    plain = matching(results, RATE, "training.num_train_epochs")
    chosen = [one for one in runs(results) if one["settings"].get("training.keep") == "best"]
    columns = sorted({1.0, *(one["settings"]["training.num_train_epochs"] for one in plain)})
    cells: dict[tuple[str, int, float], dict[Any, Result]] = defaultdict(dict)
    for one in plain:
        cells[_run_of(one)][one["settings"]["training.num_train_epochs"]] = one
    for one in chosen:
        cells[_run_of(one)]["best"] = one
    for one in matching(results, RATE):  # of one epoch
        if _run_of(one) in cells and (one["model"], one["seed"]) == ("135M", 1):
            cells[_run_of(one)].setdefault(1.0, one)
    lines = []
    for (task, rows, rate), found in sorted(cells.items()):
        last = max((key for key in found if key != "best"), default=None)
        losses = [f"{found[one]['rows_loss']:.4f}" if one in found else MISSING for one in [*columns, "best"]]
        difference = paired(found[last], found["best"]) if last and "best" in found else MISSING
        text = f"{found[last]['text_loss']:.3f}" if last else MISSING
        lines.append([f"{task} ({rows})", f"{rate:g}", *losses, difference, text])
    names = [f"{one:g} epochs" for one in columns]
    return markdown(["task (rows)", "rate", *names, "keep: best", "best less longest", "other text, longest"], lines)


def _run_of(one: Result) -> tuple[str, int, float]:
    return one["task"], one["rows"], one["settings"][RATE]


def peers(results: Sequence[Result], others: Sequence[Result], ours: str = "loratune") -> str:
    """What each contestant of an equal wall-clock time reached, the difference to loratune's defaults on the same rows
    (above 0: these are ahead), and how often each variant of loratune is ahead or behind.

    others: results of `learn.py`, for the loss of the bases on unrelated text.
    """
    bases = {one["name"]: one["text_loss"] for one in others if one["name"].startswith("base ")}
    own = {(_place(one), one["variant"]): one for one in results if one["contestant"] == ours}
    lines: list[list[str]] = []
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for one in sorted(results, key=lambda one: (_place(one), one["variant"] == "own", one["rows_loss"])):
        name, other = f"{one['contestant']}, {one['variant']}", own.get((_place(one), "scaled"))
        for (place, variant), rival in own.items():
            if place == _place(one) and one["contestant"] != ours:
                nats = unpacked(one["rows_nats"]) - unpacked(rival["rows_nats"])
                if (interval := mean_ratio_interval(nats, unpacked(one["rows_tokens"]))) is not None:
                    verdict = 0 if interval.low > 0 else 1 if interval.high < 0 else 2
                    counts[f"{ours}, {variant}", name][verdict] += 1
        base = bases.get(f"base {one['model']} {one['task']}")
        lines.append(
            [
                f"{one['task']} ({one['rows']}), {one['model']}, seed {one['seed']}, {one['minutes']:g} min",
                f"**{name}**" if one["contestant"] == ours else name,
                f"{one['seconds']:.0f}",
                str(one["steps"]),
                f"{one['rows_loss']:.4f}",
                "" if other is one else paired(other, one) if other is not None else MISSING,
                f"{one['text_loss'] - base:+.3f}" if base is not None else MISSING,
                f"{one['divergence']:.3f}" if "divergence" in one else MISSING,
                f"{one['agreement']:.0%}" if "agreement" in one else MISSING,
            ]
        )
    header = ["task (rows)", "contestant", "s", "steps", "loss", "less loratune's (95 %)", "other text"]
    header += ["KL to the base", "same token"]
    verdicts = [[*names, *map(str, found)] for names, found in sorted(counts.items())]
    second = markdown(["loratune", "against", "ahead", "behind", "not told apart"], verdicts)
    return f"{markdown(header, lines)}\n\n{second}"


def _place(result: Result) -> tuple[Any, ...]:
    return result["model"], result["task"], result["rows"], result["minutes"], result["seed"]


def front(results: Sequence[Result]) -> str:
    """What tasks gain and the base loses, by rate and `retention.kl_weight`: means over seeds."""
    bases = {one["name"]: one for one in results if "settings" not in one}
    groups: dict[tuple[str, float, float], list[Result]] = defaultdict(list)
    for one in matching(results, RATE, "lora.r", "lora.target_modules", "retention.kl_weight"):
        if "divergence" in one:
            groups[one["task"], one["settings"][RATE], one["settings"]["retention.kl_weight"]].append(one)
    rows = []
    for (task, rate, weight), own in sorted(groups.items()):
        losses, unrelated = (np.array([one[name] for one in own]) for name in ("rows_loss", "text_loss"))
        base = bases[f"base 135M {task}"]["text_loss"]
        spread = f" ({losses.min():.4f} to {losses.max():.4f})" if len(own) > 1 else ""
        rows.append(
            [task, f"{rate:g}", f"{weight:g}", str(len(own)), f"{losses.mean():.4f}{spread}",
             f"{unrelated.mean() - base:+.3f}", f"{np.mean([one['divergence'] for one in own]):.3f}",
             f"{np.mean([one['agreement'] for one in own]):.0%}"]
        )  # fmt: skip
    header = ["task", "rate", "kl_weight", "seeds", "held-out loss", "unrelated text", "KL to the base", "same token"]
    return markdown(header, rows)


def few(results: Sequence[Result]) -> str:
    """Few rows by passes and rate: the mean loss over seeds, the worst seed's share of right answers where there is
    one, the rise of the loss on unrelated text, and the seeds. The last lines are the mean and the largest regret
    against the best of each line of q, k, v and o, over the lines that have the column."""
    bases = {one["name"]: one for one in results if "settings" not in one}
    groups: dict[tuple[str, int, str], dict[tuple[float, float], list[Result]]]
    groups = defaultdict(lambda: defaultdict(list))
    for one in (one for one in runs(results) if "held_out" in one):
        is_linear = one["settings"].get("lora.target_modules") == "all-linear"
        share = round(8 * one["settings"][RATE] / (FORMULA * (0.77 if is_linear else 1))) / 8
        column = one["settings"]["training.num_train_epochs"], -share
        groups[one["task"], one["rows"], "all-linear" if is_linear else "q, k, v, o"][column].append(one)
    columns = sorted({column for found in groups.values() for column in found})
    lines, regrets = [], defaultdict[tuple[float, float], list[float]](list)
    for (task, rows, modules), found in sorted(groups.items()):
        means = {column: float(np.mean([one["rows_loss"] for one in own])) for column, own in found.items()}
        least, cells = min(means.values()), list[str]()
        for column in columns:
            if column not in found:
                cells.append(MISSING)
                continue
            own = found[column]
            if modules != "all-linear":
                regrets[column].append(means[column] / least - 1)
            base = bases[f"base 135M {task} {own[0]['held_out']}"]["text_loss"]
            right = [float(unpacked(one["right"]).mean()) for one in own if "right" in one]
            loss = f"**{means[column]:.3f}**" if means[column] == least else f"{means[column]:.3f}"
            cells.append(
                f"{loss}{f', {min(right):.0%}' if right else ''}, "
                f"{np.mean([one['text_loss'] for one in own]) - base:+.2f} ({len(own)})"
            )
        lines.append([task, str(rows), modules, *cells])
    for name, of in (("mean regret", np.mean), ("largest", np.max)):
        lines.append([name, "", "", *(f"{of(regrets[one]):.1%}" if regrets[one] else MISSING for one in columns)])
    shown = {1.0: "", 0.5: ", 1/2 rate", 0.25: ", 1/4 rate", 0.125: ", 1/8 rate"}
    return markdown(["task", "rows", "targets", *(f"{passes:g}{shown[-rate]}" for passes, rate in columns)], lines)


def starts(results: Sequence[Result]) -> str:
    """Runs that start from an adapter: held-out losses of both tasks, and how much that on unrelated text rises."""
    before = {one["task"]: one for one in results if one["name"].startswith("start ")}
    groups: dict[tuple[str, str, float, float], list[Result]] = defaultdict(list)
    for one in (one for one in runs(results) if "start" in one):
        replay, rate = one["settings"].get("data.replay", 0.0), one["settings"][RATE]
        groups[one["start"]["task"], one["task"], replay, -rate].append(one)
    rows = []
    for (earlier, task, replay, rate), own in sorted(groups.items()):
        old, means = before[earlier], {key: np.mean([one[key] for one in own]) for key in own[0] if key[-5:] == "_loss"}
        rows.append(
            [f"{earlier} → {task}", f"{replay:g}", f"{-rate:.2g}", str(len(own)), f"{means['rows_loss']:.3f}",
             f"{old['rows_loss']:.3f} → {means['earlier_loss']:.3f}", f"{means['text_loss'] - old['text_loss']:+.3f}"]
        )  # fmt: skip
    return markdown(["tasks", "replay", "rate", "seeds", "loss", "earlier task", "unrelated text"], rows)


def document(results: Sequence[Result]) -> str:
    """Markdown tables of all experiments that have results."""
    parts = {
        "Learning rate": rates(results),
        "Three seeds": seeds(results),
        "Forgetting by learning rate": forgetting(results),
        "Targets and rank": compared(results, ["lora.target_modules", "lora.r"], [["q", "k", "v", "o"], 8]),
        "Batch": compared(results, ["training.per_device_train_batch_size"], [8]),
        "Schedule and warmup": compared(
            results, ["training.lr_scheduler_type", "training.warmup_steps"], ["linear", 0.0]
        ),
        "Epochs and rows": lengths(results),
        "Few rows": few(results),
        "Starting from an adapter": starts(results),
        "Passes with all linear layers": compared(
            [one for one in runs(results) if one["settings"].get("lora.target_modules") == "all-linear"],
            ["lora.target_modules", "lora.r", "training.num_train_epochs"],
            ["all-linear", 8, 1.0],
        ),
        "Task and base: retention": front(results),
    }
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in parts.items())
