"""Who learns most in the same wall-clock time: loratune with its defaults, or other tools with what they recommend.

    python scripts/compare_learning.py --work DIRECTORY [--minutes 3] [--tasks classes mail] [--variants scaled own]
    python scripts/compare_learning.py --table

The tasks are those of `learning/tasks.py`, the recipes those of `peers/recipes.py`. Each contestant is installed into
an environment of its own and trains in a process of its own, with all cores, one after the other, task by task. The
time is that of the whole process, from its start to its end with the adapter saved. loratune is told the minutes
(`training.max_minutes`) and nothing else but the model, the rows and the seed; `--variants init` trains the config that
`loratune init` writes as well, whose own seconds are not counted, and `--variants plain` without retention. The other
tools count steps, so each first trains a few, which are not counted, and is then given as many as fit; its schedule
ends at its last step. A run that takes 5 % more or less than the time, because the machine's speed changed, is made
again, with its steps corrected, twice at most, and the nearest is scored. loratune may end early, as it does after two
passes over the rows.
Where its recipe would end before that by itself, `--variants own` trains that as well.

All learn from the same rows, tokenised once by loratune: only completions and answers are supervised, but for those
that learn the whole conversation by default (`Recipe.whole`); tokenising is no part of the others' time. Once all are
trained, with nothing beside them, their adapters are scored in float32 by `learn.score` on 200 held-out rows and on
unrelated text. Each result is a line of `scripts/learning/peers.jsonl`; what stands there is not run again.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bench
import learn
from transformers import AutoConfig

from learning import tables, tasks
from learning.experiments import ROWS
from loratune import config, data
from loratune.config import ModelSection, Source
from loratune.data.rendering import Renderer
from loratune.model.load import load_tokenizer
from peers.contestants import CONTESTANTS, STOCK, Contestant
from peers.recipes import RECIPES, Order

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "learning" / "peers.jsonl"
OURS = "loratune"
INIT = "init"
"""The variant of loratune that trains the config of `loratune init`."""
PLAIN = "plain"
"""The variant of loratune that trains without retention."""
TRIED = 10
"""Steps of the run that is not counted."""
ROOM = 0.02
"""The part of the time that is left free when steps are counted, as steps vary."""
OFF = 0.05
"""The part of the time by which a run may end early or late."""
ATTEMPTS = 3
"""How often a run is made until it ends on time."""


@dataclass(frozen=True)
class Race:
    """What is fixed. checkout: whose loratune is measured; minutes: for each contestant; limit: seconds
    that a process may take at most; results: the file."""

    work: Path
    checkout: Path
    model: str
    minutes: float
    seed: int
    limit: float
    results: Path

    @property
    def trained(self) -> Path:
        """Where adapters lie that are not scored yet."""
        return self.work / "trained"


@dataclass(frozen=True)
class Finished:
    """A run that ended. seconds: of the whole process; rest: of the steps after the first, 0 if it is not known."""

    adapter: Path
    seconds: float
    steps: int
    rest: float = 0.0

    def fitting(self, seconds: float) -> int:
        """How many steps fit into the time, 0 if none does, by those of this run."""
        outside, step = self.seconds - self.rest, self.rest / (self.steps - 1)
        return int((seconds * (1 - ROOM) - outside) / step) + 1


def spawn(race: Race, command: list[str], place: Path, paths: list[Path]) -> float:
    """Run a process and wait. Returns its seconds. Raises bench.Failure."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(race.work / "datasets"),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    log = place / "log"
    with log.open("w", encoding="utf-8") as output:
        start = time.monotonic()
        try:
            done = subprocess.run(
                command, cwd=place, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                timeout=race.limit, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise bench.Failure(f"took longer than {race.limit:.0f} s (see {log})") from None
        seconds = time.monotonic() - start
    if done.returncode:
        raise bench.Failure(bench.why(log, done.returncode, late=False))
    return seconds


def emptied(place: Path) -> Path:
    """The directory, without what it held."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return place


def python(race: Race, venv: str) -> Path:
    """The interpreter of an environment, which is made if it is not there. Raises bench.Failure."""
    interpreter = race.work / "venvs" / venv / "bin" / "python"
    contestant = next((one for one in CONTESTANTS.values() if one.venv == venv), Contestant("", venv, STOCK, ""))
    place = bench.Bench(race.work, race.work, Path(), "cpu", 0, race.limit, bench.Results({}))
    bench.install(place, contestant)
    return interpreter


def tokenised(race: Race, rows: Path, *, whole: bool) -> Path:
    """The rows as ids and labels. whole: every token of a conversation is supervised."""
    path = rows.with_name(f"{rows.stem}-{race.model}-{'whole' if whole else 'answers'}.ids")
    if path.is_file():
        return path
    model = learn.model_directory(race.model, race.work)
    source = Source(path=str(rows))
    section = config.DataSection(train=source)
    renderer = Renderer(load_tokenizer(ModelSection(name_or_path=str(model))))
    vocabulary = AutoConfig.from_pretrained(model).vocab_size
    dataset = data.prepare(data.read_source(source, section), renderer, section, vocabulary)
    conversations = "messages" in json.loads(rows.read_text(encoding="utf-8").splitlines()[0])
    lines = []
    for number in range(len(dataset.rows)):
        row = dataset.rows[number]
        labels = list(row["input_ids"]) if whole and conversations else row["labels"]
        lines.append(json.dumps({"input_ids": row["input_ids"], "labels": labels}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def train_other(race: Race, name: str, rows: Path, steps: int) -> Finished:
    """Train a number of steps of a recipe. Raises bench.Failure."""
    recipe, place = RECIPES[name], emptied(race.work / "race" / name.replace(" ", "-").replace("'", ""))
    order = Order(
        recipe,
        str(learn.model_directory(race.model, race.work)),
        str(tokenised(race, rows, whole=recipe.whole)),
        str(place / "adapter"),
        str(place / "answer.json"),
        steps,
        race.seed,
    )
    (place / "order.json").write_text(json.dumps(asdict(order)), encoding="utf-8")
    command = [str(python(race, recipe.venv)), "-P", "-m", f"peers.{recipe.driver}", str(place / "order.json")]
    seconds = spawn(race, command, place, [ROOT / "scripts"])
    answer = json.loads(Path(order.answer).read_text(encoding="utf-8"))
    return Finished(Path(order.adapter), seconds, answer["updates"], answer["rest"])


def steps_in_time(race: Race, name: str, rows: Path) -> int:
    """How many steps of a recipe fit into the minutes, by a short run."""
    tried = train_other(race, name, rows, TRIED)
    said = f"{tried.seconds:.1f} s for {tried.steps} steps, {tried.rest:.1f} of them for all but the first"
    if (fits := tried.fitting(race.minutes * 60)) < 2:
        raise bench.Failure(f"{race.minutes:g} minutes are too short: {said}")
    print(f"{name}: {said}", file=sys.stderr, flush=True)
    return fits


def race_against_time(
    race: Race, known: Mapping[str, Any], train: Callable[[int], Finished], steps: int, attempts: int = ATTEMPTS
) -> None:
    """Train a number of steps, and again where that was not the time of the race; the run nearest to it is kept.

    What counts its steps itself may end early: then it has decided not to use all of the time.

    Raises:
        bench.Failure: A process ended badly.
    """
    nearest = math.inf
    for _ in range(attempts):
        run = train(steps)
        off = run.seconds / (race.minutes * 60) - 1
        if abs(off) < nearest:
            nearest = abs(off)
            keep(race, known, run)
        if nearest <= OFF or (off < 0 and not run.rest):
            break
        print(f"{run.seconds:.0f} s for {run.steps} steps: {off:+.0%}", file=sys.stderr, flush=True)
        steps = run.fitting(race.minutes * 60) if run.rest else steps


def train_ours(race: Race, rows: Path, variant: str, _: int) -> Finished:
    """Train for the minutes with loratune's defaults, or with the config that `loratune init` writes; it counts steps
    itself.

    Raises:
        bench.Failure: A process ended badly.
    """
    place = emptied(race.work / "race" / OURS)
    config_path, model = place / "config.yaml", str(learn.model_directory(race.model, race.work))
    program = [sys.executable, "-P", "-m", "loratune"]
    training = {"training.max_minutes": race.minutes, "training.seed": race.seed, "output_dir": str(place / "adapter")}
    if variant == INIT:
        command = [*program, "init", str(rows), "--model", model, "--output", str(config_path)]
        spawn(race, command, place, [race.checkout])
    else:
        settings = {"model": {"name_or_path": model}, "data": {"train": str(rows)}, "output_dir": "adapter"}
        settings |= {"retention": {"kl_weight": 0}} if variant == PLAIN else {}
        config_path.write_text(json.dumps(settings), encoding="utf-8")
    options = [option for key, value in training.items() for option in ("--set", f"{key}={value}")]
    seconds = spawn(race, [*program, "train", str(config_path), *options], place, [race.checkout])
    record = json.loads((place / "adapter" / "loratune.json").read_text(encoding="utf-8"))
    return Finished(place / "adapter", seconds, record["metrics"]["steps"])


def identity(race: Race, task: str, rows: int, name: str, variant: str) -> dict[str, Any]:
    """What a result is known by."""
    return {
        "model": race.model, "task": task, "rows": rows, "contestant": name, "variant": variant,
        "minutes": race.minutes, "seed": race.seed,
    }  # fmt: skip


def keep(race: Race, known: Mapping[str, Any], run: Finished) -> None:
    """Keep an adapter until it is scored: PEFT's two files and the base of this race, so that all adapters are opened
    and rendered alike."""
    place = emptied(race.trained / hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12])
    shutil.copy(run.adapter / "adapter_model.safetensors", place)
    settings = json.loads((run.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = str(learn.model_directory(race.model, race.work))
    (place / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    line = dict(known) | {"seconds": round(run.seconds, 1), "steps": run.steps}
    (place / "run.json").write_text(json.dumps(line), encoding="utf-8")
    print(f"{known['task']}, {known['contestant']}, {known['variant']}: {run.steps} steps", file=sys.stderr, flush=True)


def score(race: Race) -> None:
    """Score the adapters that are kept, and write the results down."""
    for run in sorted(race.trained.glob("*/run.json")):
        line = json.loads(run.read_text(encoding="utf-8"))
        held_out = tasks.write(line["task"], race.work, line["rows"])["held_out"]
        scores = learn.score(run.parent, held_out, learn.unrelated_text(race.work), base=False)
        with race.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | scores) + "\n")
        said = f"{line['task']}, {line['contestant']}, {line['variant']}: {scores['rows_loss']:.4f}"
        print(f"{said} after {line['steps']} steps, {line['seconds']:.0f} s", file=sys.stderr, flush=True)
        shutil.rmtree(run.parent)


def compete(race: Race, task: str, rows: int, names: list[str], variants: list[str]) -> None:
    """Train what is missing of a task."""
    train_rows = tasks.write(task, race.work, rows)["train"]
    kept = [json.loads(run.read_text(encoding="utf-8")) for run in race.trained.glob("*/run.json")]
    done = [*tables.read(race.results), *kept]

    def missing(name: str, variant: str) -> dict[str, Any] | None:
        wanted = identity(race, task, rows, name, variant)
        return None if any(wanted.items() <= one.items() for one in done) else wanted

    for name in names:
        known_variants = ("scaled", PLAIN, INIT) if name == OURS else ("scaled", "own")
        chosen = [variant for variant in known_variants if variant in variants]
        wanted = {variant: known for variant in chosen if (known := missing(name, variant))}
        try:
            if name == OURS:
                for variant, known in wanted.items():
                    race_against_time(race, known, partial(train_ours, race, train_rows, variant), 0)
            elif wanted:
                compete_as_peer(race, name, train_rows, rows, wanted)
        except bench.Failure as failure:
            print(f"{task}, {name}: {failure}", file=sys.stderr, flush=True)


def compete_as_peer(race: Race, name: str, train_rows: Path, rows: int, wanted: Mapping[str, dict[str, Any]]) -> None:
    """Train another tool. wanted: variant → what identifies its run."""
    fits, own = steps_in_time(race, name, train_rows), RECIPES[name].own_steps(rows)
    train = partial(train_other, race, name, train_rows)
    for variant, known in wanted.items():
        if variant == "scaled":
            race_against_time(race, known, train, fits)
        elif own < fits:
            race_against_time(race, known, train, own, attempts=1)


def main() -> None:
    """Compare, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "loratune-learning")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--tasks", nargs="+", default=list(tasks.TASKS), choices=list(ROWS))
    parser.add_argument("--contestants", nargs="+", default=[*RECIPES, OURS], choices=[*RECIPES, OURS])
    parser.add_argument("--variants", nargs="+", default=["scaled"], choices=["scaled", "own", PLAIN, INIT])
    parser.add_argument("--model", default="135M", choices=list(learn.MODELS))
    parser.add_argument("--rows", type=int, default=0, help="training rows (default: those of learning/experiments.py)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--loratune", type=Path, default=ROOT, help="the checkout to measure (default: this one)")
    parser.add_argument("--results", type=Path, help="the file of results (default: scripts/learning/peers.jsonl)")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    given = parser.parse_args()
    results = (given.results or RESULTS).absolute()
    if not given.table:
        work = given.work.absolute()
        work.mkdir(parents=True, exist_ok=True)
        limit = 600 + given.minutes * 120
        race = Race(work, given.loratune.absolute(), given.model, given.minutes, given.seed, limit, results)
        for task in given.tasks:
            compete(race, task, given.rows or ROWS[task], given.contestants, given.variants)
        score(race)
    print(tables.peers(tables.read(results), learn.recorded()))


if __name__ == "__main__":
    main()
