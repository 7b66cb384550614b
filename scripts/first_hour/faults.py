"""Ten wrong inputs, each as a buyer makes them, and what a tool did with it.

All are done with a copy of the first four layers of the model, a few rows and a few steps, in one thread. An outcome is

    says       it ended, or warned, with a message that names what is wrong and where
    right      the result is right, where something happened to a run that could be saved
    traceback  it ended with a Python traceback, or without saying why
    silent     it reported success, and the result is wrong
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from first_hour.process import Ran, run
from first_hour.tools import Order, Tool, adapter_in

FAULTS = {
    "key": "unknown key (`learing_rate`)",
    "column": "wrong column (`label` instead of `completion`)",
    "empty": "empty answers (half of the rows)",
    "nan": "learning rate NaN",
    "long": "rows longer than the maximum (half of the rows)",
    "disk": "full disk",
    "resume": "killed, and resumed",
    "base": "merged into another base",
    "merged": "merged, and served by transformers",
    "high": "learning rate 2 instead of 2e-4",
}
"""Fault → what it is."""
ROWS, STEPS, KILLED = 24, 4, 2
"""Rows and steps of a run, and the step whose checkpoint is the last before it is killed."""
LONG, LENGTH = 600, 128
"""Words before the prompt of a row that is too long, and the most tokens that a row may have."""
DISK = "600k"
"""The size of the disk that becomes full: no adapter fits."""
EQUAL, CONTINUED, FAR = 1e-3, 0.5, 0.05
"""Adapters are equal below the first relative difference; below the second, one continues the other, where a tool draws
other weights in each run. A merged model is another one above this part of the adapter's divergence from its base."""
NAMED = {
    "key": r"learing_rate",
    "column": r"`?completion`?|`label`",
    "empty": r"(?i)empty|no supervised|zero trainable",
    "nan": r"(?i)learning.rate|nan\b|finite",
    "long": r"(?i)truncated|too long|longer|exceed|max_length|valid range",
    "disk": r"(?i)no space left|disk",
    "resume": r"(?i)resum|checkpoint",
    "base": r"(?i)\bbase\b",
    "high": r"(?i)learning.rate|collaps|diverg|worse",
}
"""What a message must have that names what is wrong."""
TELLING = r"(?i)\b(warn|note|error|dropp|skipp|filter|ignor|lost|truncated)"
"""What a line has that warns, where a run succeeds."""


@dataclass(frozen=True)
class Outcome:
    """What a tool did. verdict: see above; ran: the command that showed it; note: what was measured."""

    verdict: str
    ran: Ran
    note: str = ""

    def to_dict(self, fault: str) -> dict[str, Any]:
        """Plain values; `last` is the last line, or where a run succeeded with a warning, the warning."""
        warned = self.verdict == "says" and not self.ran.exit
        last = told(fault, self.ran) if warned else self.ran.last
        return {
            "verdict": self.verdict, "exit": self.ran.exit, "seconds": self.ran.seconds, "last": last,
            "note": self.note,
        }  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Where faults are tried. programs: of the tool; model, other: a small base, and one of its shape; rows: the
    quickstart's; judge: runs `first_hour.score` and returns its JSON."""

    tool: Tool
    programs: Path
    work: Path
    model: Path
    other: Path
    rows: Path
    limit: float
    judge: Callable[..., dict[str, float]]

    def order(self, name: str, **settings: Any) -> Order:
        """An order in an empty directory of its own, with the small base and a few rows."""
        place = self.work / name
        shutil.rmtree(place, ignore_errors=True)
        (place / "rows").mkdir(parents=True)
        rows = place / "rows" / "train.jsonl"
        rows.write_text("".join(self.rows.read_text(encoding="utf-8").splitlines(keepends=True)[:ROWS]))
        named = {self.tool.names[key]: value for key, value in settings.items()}
        return Order(place, self.model, rows, place / "adapter", named, steps=STEPS)

    def train(self, order: Order, until: Callable[[], bool] | None = None) -> Ran:
        """Train an order."""
        return self.run(self.tool.train(order), order, until)

    def run(self, commands: list[list[str]], order: Order, until: Callable[[], bool] | None = None) -> Ran:
        """Run commands until one fails. Returns the last."""
        environment = {"OMP_NUM_THREADS": "1"} | dict(self.tool.environment)
        for command in commands:
            ran = run(command, self.programs, order.place, self.limit, environment, until)
            if ran.exit:
                break
        return ran


def changed(order: Order, change: Callable[[int, dict[str, str]], dict[str, str]]) -> Order:
    """An order whose rows were changed, by number and row."""
    lines = order.rows.read_text(encoding="utf-8").splitlines()
    rows = [json.dumps(change(number, json.loads(line))) for number, line in enumerate(lines)]
    order.rows.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return order


def told(fault: str, ran: Ran) -> str:
    """The line that names what is wrong: one that warns and is no progress bar, where a run succeeded."""
    lines = ran.said.splitlines()
    lines = lines[-12:] if ran.exit else [line for line in lines if re.search(TELLING, line) and "%|" not in line]
    return next((line.strip() for line in reversed(lines) if re.search(NAMED[fault], line)), "")


def verdict(fault: str, ran: Ran) -> str:
    """What the messages of a run are worth. Nothing right can come of these inputs, so a success without a warning is
    wrong."""
    if ran.traceback:
        return "traceback"
    if told(fault, ran):
        return "says"
    return "traceback" if ran.exit else "silent"


def _key(bench: Bench) -> Outcome:
    order = bench.order("key")
    rate = bench.tool.names["rate"]
    ran = bench.train(replace(order, settings={rate.replace("learning", "learing"): 1e-5}))
    return Outcome(verdict("key", ran), ran)


def _column(bench: Bench) -> Outcome:
    order = bench.order("column")
    ran = bench.train(changed(order, lambda _, row: {"prompt": row["prompt"], "label": row["completion"]}))
    return Outcome(verdict("column", ran), ran)


def _empty(bench: Bench) -> Outcome:
    order = bench.order("empty")
    ran = bench.train(changed(order, lambda number, row: row | {"completion": ""} if number % 2 else row))
    return Outcome(verdict("empty", ran), ran)


def _nan(bench: Bench) -> Outcome:
    order = bench.order("nan", rate=math.nan)
    ran = bench.train(order)
    return Outcome(verdict("nan", ran), ran, _weights(order))


def _weights(order: Order) -> str:
    """Whether an adapter was written, and is finite."""
    if not (adapter := adapter_in(order.output)):
        return "no adapter"
    tensors = load_file(adapter / "adapter_model.safetensors").values()
    return "" if all(torch.isfinite(tensor).all() for tensor in tensors) else "the adapter is NaN"


def _long(bench: Bench) -> Outcome:
    order = bench.order("long", length=LENGTH)
    prefix = "once upon a time " * (LONG // 4)
    ran = bench.train(
        changed(order, lambda number, row: row | {"prompt": prefix + row["prompt"]} if number % 2 else row)
    )
    return Outcome(verdict("long", ran), ran)


@contextmanager
def _small_disk(place: Path) -> Iterator[None]:
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def _disk(bench: Bench) -> Outcome:
    order = bench.order("disk")
    with _small_disk(order.place / "disk"):
        ran = bench.train(replace(order, output=order.place / "disk" / "adapter"))
    return Outcome(verdict("disk", ran), ran)


def _high(bench: Bench) -> Outcome:
    order = bench.order("high", rate=2.0)
    ran = bench.train(order)
    found = verdict("high", ran)
    adapter, broken = adapter_in(order.output), _weights(order)
    if ran.exit or broken or not adapter:
        return Outcome(found, ran, broken)
    nats = bench.judge(order.model, adapter, order.rows, format=bench.tool.format)["nats"]
    return Outcome(found, ran, f"loss of an answer {nats:.1f} nats")


def _difference(one: Path, other: Path) -> float:
    """The relative difference of two adapters; 0 for the same bytes."""
    a, b = (load_file(place / "adapter_model.safetensors") for place in (one, other))
    if a.keys() != b.keys():
        return math.inf
    squares = [((a[name].float() - b[name].float()).square().sum(), a[name].float().square().sum()) for name in a]
    return float((sum(pair[0] for pair in squares) / sum(pair[1] for pair in squares)) ** 0.5)


def _checkpoint(place: Path) -> Path | None:
    """The checkpoint of the step after which a run is killed, once it is whole."""
    for path in place.rglob(f"checkpoint-{KILLED}"):
        last = "manifest.json" if path.parent.name == "checkpoints" else "trainer_state.json"
        if path.parent.name != "unfinished" and (path / last).is_file():
            return path
    return None


def _resume(bench: Bench) -> Outcome:
    whole, killed = bench.order("whole", rate=5e-3), bench.order("resume", rate=5e-3)
    whole, killed = (replace(order, save=KILLED) for order in (whole, killed))
    straight = bench.train(whole)
    if straight.exit:
        return Outcome("traceback", straight, "the undisturbed run failed")
    bench.train(killed, until=lambda: _checkpoint(killed.place) is not None)
    if not (checkpoint := _checkpoint(killed.place)):
        return Outcome("traceback", straight, "no checkpoint was written")
    ran = bench.train(replace(killed, resume=checkpoint))
    if ran.exit:
        return Outcome(verdict("resume", ran), ran)
    expected, found = adapter_in(whole.output), adapter_in(killed.output)
    if not expected or not found:
        return Outcome("silent", ran, "no adapter")
    off = _difference(expected, found)
    if off < EQUAL:
        return Outcome("right", ran, "the same bytes" if off == 0 else f"weights differ by {off:.2g}")
    moved = _difference(checkpoint, found)
    note = f"weights differ by {off:.2g} from an undisturbed run, and by {moved:.2g} from the checkpoint"
    return Outcome("right" if moved < CONTINUED else "silent", ran, note)


def _merge(bench: Bench) -> Iterator[tuple[str, Outcome]]:
    """Both cases that merge: with the right base, and with another one in its place."""
    order = bench.order("merge", rate=5e-3)
    order = replace(order, model=order.place / bench.model.name)
    shutil.copytree(bench.model, order.model)
    trained = bench.train(order)
    if trained.exit:
        yield "merged", Outcome("traceback", trained, "the run failed")
        return
    adapter = adapter_in(order.output)
    ran = bench.run(bench.tool.merge(order, order.place / "merged"), order)
    places = [path.parent for path in order.place.rglob("model*.safetensors") if path.parent != order.model]
    if ran.exit or not places:
        yield "merged", Outcome("traceback" if ran.exit else "silent", ran, "no model")
    else:
        found = bench.judge(order.model, adapter, order.rows, format=bench.tool.format, merged=places[0])
        part = found["merged"] / found["base"]
        note = f"KL to the adapter {found['merged']:.2g} nats, of the adapter to its base {found['base']:.2g}"
        yield "merged", Outcome("right" if part < FAR else "silent", ran, note)
    for place in places:
        shutil.rmtree(place)
    shutil.rmtree(order.model)
    shutil.copytree(bench.other, order.model)
    ran = bench.run(bench.tool.merge(order, order.place / "wrong"), order)
    yield "base", Outcome(verdict("base", ran), ran)


SINGLE: Mapping[str, Callable[[Bench], Outcome]] = {
    "key": _key, "column": _column, "empty": _empty, "nan": _nan, "long": _long, "disk": _disk, "resume": _resume,
    "high": _high,
}  # fmt: skip


def attempts(bench: Bench, wanted: list[str]) -> Iterator[tuple[str, Outcome]]:
    """Try the faults that are wanted, one after the other."""
    for name in wanted:
        if name in SINGLE:
            yield name, SINGLE[name](bench)
    if {"base", "merged"} & set(wanted):
        yield from _merge(bench)


def small_models(model: Path, work: Path) -> tuple[Path, Path]:
    """The first four layers of a model, under its name, and the same layers in the reverse order."""
    made = []
    for name in ("small", "other"):
        place = work / name / model.name
        made.append(place)
        if place.is_dir():
            continue
        shutil.copytree(model, place)
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        (place / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}), encoding="utf-8")
        kept = {}
        for key, tensor in load_file(place / "model.safetensors").items():
            found = re.match(r"(model\.layers\.)(\d+)(.*)", key)
            if found and int(found[2]) >= 4:
                continue
            layer = int(found[2]) if found else 0
            renamed = f"{found[1]}{3 - layer if name == 'other' else layer}{found[3]}" if found else key
            kept[renamed] = tensor
        save_file(kept, place / "model.safetensors", metadata={"format": "pt"})
    return made[0], made[1]


def judge_with(python: str, scripts: Path) -> Callable[..., dict[str, float]]:
    """A function that runs `first_hour.score` in a process of its own, and returns what it prints."""

    def judge(model: Path, adapter: Path, rows: Path, **options: Any) -> dict[str, float]:
        command = [python, "-P", "-m", "first_hour.score", str(model), str(adapter), str(rows)]
        command += ["--format", options["format"]]
        command += ["--merged", str(options["merged"])] if "merged" in options else []
        command += [] if options.get("whole") else ["--brief"]
        done = subprocess.run(
            command,
            cwd=scripts,
            env=os.environ | {"PYTHONPATH": str(scripts), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(done.stderr)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    return judge
