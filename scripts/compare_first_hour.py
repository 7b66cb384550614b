"""What a buyer sees of six tools in the first hour: installation, a first adapter, and ten wrong inputs.

    python scripts/compare_first_hour.py install --work DIRECTORY --wheel dist/loratune-*-manylinux*.whl
    python scripts/compare_first_hour.py train --work DIRECTORY [--minutes 5] [--tools trl axolotl] [--steps 5]
    python scripts/compare_first_hour.py score --work DIRECTORY
    python scripts/compare_first_hour.py faults --work DIRECTORY [--tools ...] [--faults disk resume]
    python scripts/compare_first_hour.py table

`install` makes an empty environment for each tool and installs it with pip and no cache of its own. `train` follows the
documentation of each (`first_hour/tools.py`) on 400 of the quickstart's rows, on a machine that does nothing else; a
run that takes longer than the minutes is stopped, and leaves its last checkpoint. `score` scores what `train` has left,
in stock transformers and PEFT. `faults` makes ten mistakes (`first_hour/faults.py`); it must be root, to mount a small
disk. `table` prints the tables, and puts them into README and `first_hour/README.md`. Each result is a line of
`scripts/first_hour/results.jsonl`; what is there is not run again.
"""

import argparse
import datetime
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from first_hour import faults, table
from first_hour.process import Ran, run
from first_hour.tools import TOOLS, Order, adapter_in, typed

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "first_hour" / "results.jsonl"
PAGES = (ROOT / "README.md", RESULTS.with_name("README.md"))
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
ROWS = ROOT / "loratune" / "data" / "quickstart"
TORCH = ("torch", "torch-*", "torchgen", "functorch", "nvidia", "nvidia_*", "triton", "triton-*")
"""What torch itself puts into an environment."""
SHOWN = ("torch", "transformers", "peft", "trl")
LEARNED = 400
"""Rows that are learned: so few that most tools end by their own recipe."""
SAVED = 10
"""Steps after which a run keeps a checkpoint, so that something is left where the minutes end it."""


@dataclass(frozen=True)
class Hour:
    """What is fixed. work: for environments and runs; results: the file; limit: seconds that a command may take."""

    work: Path
    results: Path
    limit: float

    def programs(self, name: str) -> Path:
        """The programs of a tool."""
        return self.work / "venvs" / name / "bin"

    def keep(self, part: str, name: str, values: dict[str, Any]) -> None:
        """Write a result down."""
        known = {"part": part, "tool": name, "date": datetime.date.today().isoformat()}
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(known | values) + "\n")
        print(f"{part}, {name}: {values}", file=sys.stderr, flush=True)

    def missing(self, part: str, names: Iterable[str], **known: Any) -> list[str]:
        """The tools that have no such result yet."""
        done = {one["tool"] for one in table.read(self.results) if one["part"] == part and known.items() <= one.items()}
        return [name for name in names if name not in done]


def disk(places: Iterable[Path]) -> int:
    """Bytes on the disk."""
    return sum(path.lstat().st_blocks * 512 for place in places for path in (place, *place.rglob("*")))


def install(hour: Hour, name: str, wheel: str) -> None:
    """Make the environment of a tool."""
    venv = hour.work / "venvs" / name
    shutil.rmtree(venv, ignore_errors=True)
    requirements = [wheel] if name == "loratune" else TOOLS[name].requirements
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    command = ["python", "-m", "pip", "install", "--no-cache-dir", *requirements]
    ran = run(command, hour.programs(name), venv, hour.limit)
    seconds = time.monotonic() - start
    site = next(venv.glob("lib/python*/site-packages"))
    torch = [place for pattern in TORCH for place in site.glob(pattern)]
    hour.keep("install", name, {
        "exit": ran.exit, "seconds": round(seconds, 1), "last": ran.last[:300], "bytes": disk([venv]),
        "torch_bytes": disk(torch), "packages": len(list(site.glob("*.dist-info"))), "versions": versions(hour, name),
        "typed": lines_typed(hour, name),
    })  # fmt: skip


def versions(hour: Hour, name: str) -> dict[str, str]:
    """The versions of a tool and of the libraries below it."""
    command = [str(hour.programs(name) / "python"), "-m", "pip", "list", "--format", "json"]
    listed = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return {one["name"]: one["version"] for one in listed if one["name"] in (*SHOWN, name)}


def lines_typed(hour: Hour, name: str) -> int:
    """The lines that a user types for the first adapter."""
    place = emptied(hour.work / "typed")
    return typed(TOOLS[name], Order(place, MODEL, ROWS / "train.jsonl", place / "adapter"))


def train(hour: Hour, name: str, minutes: float, steps: int) -> None:
    """Train by a tool's own recipe, for a number of minutes at most, and keep how it went. steps: to end earlier."""
    tool, place = TOOLS[name], hour.work / ("trial" if steps else "train") / name
    shutil.rmtree(place, ignore_errors=True)
    order = Order(place, MODEL, place / "rows" / "train.jsonl", place / "adapter", steps=steps, save=SAVED)
    order.rows.parent.mkdir(parents=True)
    lines = (ROWS / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    order.rows.write_text("".join(lines[:LEARNED]), encoding="utf-8")
    seconds, said = 0.0, ""
    for command in tool.train(order):
        ran = run(command, hour.programs(name), place, minutes * 60 - seconds, tool.environment)
        seconds, said = seconds + ran.seconds, said + ran.said + "\n"
        if ran.exit:
            break
    done, whole = steps_of(place)
    hour.keep("trial" if steps else "train", name, {
        "minutes": minutes, "exit": ran.exit, "seconds": round(seconds, 1), "steps": done, "of": whole,
        "last": Ran(0, 0, said).last[:300],
    })  # fmt: skip


def steps_of(place: Path) -> tuple[int, int]:
    """The steps of the adapter that is there, and those of the whole run; 0 if there is none."""
    for path in place.rglob("loratune.json"):
        steps = json.loads(path.read_text(encoding="utf-8"))["metrics"]["steps"]
        return steps, steps
    states = [json.loads(path.read_text(encoding="utf-8")) for path in place.rglob("checkpoint-*/trainer_state.json")]
    return max(((state["global_step"], state["max_steps"]) for state in states), default=(0, 0))


def score(hour: Hour, name: str) -> None:
    """Score the adapter that `train` has left."""
    tool, place = TOOLS[name], hour.work / "train" / name
    if adapter := adapter_in(place):
        judge = faults.judge_with(sys.executable, ROOT / "scripts")
        hour.keep("score", name, judge(MODEL, adapter, ROWS / "eval.jsonl", format=tool.format, whole=True))


def attempt(hour: Hour, name: str, wanted: list[str]) -> None:
    """Make the mistakes that are wanted with a tool."""
    model, other = faults.small_models(MODEL, hour.work)
    judge = faults.judge_with(sys.executable, ROOT / "scripts")
    work = hour.work / "faults" / name
    bench = faults.Bench(TOOLS[name], hour.programs(name), work, model, other, ROWS / "train.jsonl", hour.limit, judge)
    for fault, outcome in faults.attempts(bench, wanted):
        values = outcome.to_dict(fault)
        values["last"] = values["last"].replace(f"{work}/", "").replace(f"{hour.work}/", "")[:240]
        hour.keep("fault", name, {"fault": fault} | values)


def emptied(place: Path) -> Path:
    """The directory, without what it held."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return place


def main() -> None:
    """Measure, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["install", "train", "score", "faults", "table"])
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "loratune-first-hour")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--faults", nargs="+", default=list(faults.FAULTS), choices=list(faults.FAULTS))
    parser.add_argument("--wheel", default="loratune", help="what is installed as loratune")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=0, help="end after this number of steps, for a trial")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds that any other command may take")
    given = parser.parse_args()
    if given.part == "table":
        results = table.read(given.results)
        print(table.document(results))
        for page in PAGES if given.results == RESULTS else ():
            page.write_text(table.filled(page.read_text(encoding="utf-8"), results), encoding="utf-8")
        return
    hour = Hour(given.work.absolute(), given.results.absolute(), given.limit)
    hour.work.mkdir(parents=True, exist_ok=True)
    for name in (
        hour.missing("trial" if given.steps else given.part, given.tools) if given.part != "faults" else given.tools
    ):
        if given.part == "install":
            install(hour, name, given.wheel)
        elif given.part == "train":
            train(hour, name, given.minutes, given.steps)
        elif given.part == "score":
            score(hour, name)
        elif wanted := [one for one in given.faults if hour.missing("fault", [name], fault=one)]:
            attempt(hour, name, wanted)


if __name__ == "__main__":
    main()
