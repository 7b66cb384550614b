"""Compare loratune with other ways to train a LoRA adapter, on this machine and on the same tokens.

    python scripts/bench.py [--sets natural long short prefix] [--loss full completion] [--peers ...] [--rounds 3]

Each contestant (scripts/peers/contestants.py) is installed into a virtual environment of its own and trains in a
process of its own, one after the other: in the first round in the order given, in the second in the reverse, and so
on, each round with a seed of its own. Before the first round each trains once on a few rows, which is not counted.
Every adapter is then scored by plain transformers and PEFT in fp32 on held-out rows. Tokens are counted from the rows,
without padding. Ratios are those of runs of one round; a GEMM probe before, between and after the rounds tells how
steady the machine was.

`--busy 1` has one process compute beside each run, as on a machine that does something else too.

Writes results.json after every run, and table.md after every set; `--table` makes it anew, and `--add` lets one call
measure one set and the next call another.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from peers.common import Job, read
from peers.contestants import CONTESTANTS, Contestant
from peers.report import roof, table
from peers.sets import SETS, SHAPES, Kind, accumulate, census, rows_file

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("torch", "transformers", "peft", "accelerate", "trl", "llamafactory", "unsloth", "litgpt", "lightning")
LOST = 0.98
"""The least share of the supervised tokens that a contestant must have trained on; some mask the first of each pack."""
REHEARSED = 2500
"""Tokens of the uncounted run, about."""


class Failure(Exception):
    """A child process ended badly; the text is one line of why."""


@dataclass
class Results:
    """What is known so far. failed: contestant → why; cells: "set, loss" → runs, probes and losses."""

    machine: dict[str, str]
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """Where everything lies. rows: of each set, 0: all; limit: seconds that one run may take; busy: processes that
    compute beside each run."""

    work: Path
    out: Path
    model: Path
    device: str
    rows: int
    limit: float
    results: Results
    busy: int = 0

    def python(self, name: str) -> Path:
        """The interpreter of an environment; that of loratune is this one."""
        return self.work / "venvs" / name / "bin" / "python" if name else Path(sys.executable)

    def save(self) -> None:
        """Write down what is known."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "results.json").write_text(json.dumps(asdict(self.results), indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Child:
    """A process that ended well. rss: the most memory it held, in bytes."""

    output: str
    started: float
    seconds: float
    rss: int


def run(
    bench: Bench, command: list[str], log: Path, extra: dict[str, str] | None = None, *, ours: bool = True
) -> Child:
    """Run a module of `peers` and wait. ours: it may import this checkout's loratune. Raises Failure."""
    paths = [str(ROOT / "scripts"), *([str(ROOT)] if ours else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(log.parent / "datasets"), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if bench.device == "cpu" else {}
    with log.open("w", encoding="utf-8") as errors, log.with_suffix(".out").open("w+", encoding="utf-8") as output:
        started = time.time()
        child = subprocess.Popen(
            command, cwd=log.parent, env=environment | (extra or {}), stdin=subprocess.DEVNULL, stdout=output,
            stderr=errors,
        )  # fmt: skip
        timer = threading.Timer(bench.limit, child.kill)
        timer.start()
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        finally:
            timer.cancel()
        seconds = time.time() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        if child.returncode:
            raise Failure(why(log, child.returncode, seconds >= bench.limit))
        return Child(output.read(), started, seconds, usage.ru_maxrss * 1024)


def why(log: Path, code: int, late: bool) -> str:
    """The exit code, and the last line of a log, if possible one with an error."""
    if late:
        return "took too long"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    error_lines = [line for line in lines if "Error" in line.split(" ")[0] or line.startswith("error:")]
    return f"exit code {code}: {(error_lines or lines or ['no output'])[-1][:200]} (see {log})"


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Inside, this number of processes do nothing but work."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def module(bench: Bench, venv: str, name: str, *arguments: object) -> list[str]:
    """The command that runs a module of `peers`."""
    # -P: a file that is named after a package must not stand before it.
    return [str(bench.python(venv)), "-P", "-m", f"peers.{name}", *map(str, arguments)]


def install(bench: Bench, contestant: Contestant) -> None:
    """Make the contestant's environment, unless it stands. Raises Failure."""
    if contestant.venv and not (stamp := bench.work / "venvs" / contestant.venv / "installed").exists():
        say(f"installing {' '.join(contestant.requirements)}")
        shutil.rmtree(stamp.parent, ignore_errors=True)
        for command in (
            [sys.executable, "-m", "venv", str(stamp.parent)],
            [str(bench.python(contestant.venv)), "-m", "pip", "install", "--quiet", *contestant.requirements],
        ):
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise Failure(f"could not be installed: {(done.stderr.strip().splitlines() or [''])[-1][:200]}")
        stamp.touch()


def versions(bench: Bench, venv: str) -> dict[str, str]:
    """What is installed."""
    command = [str(bench.python(venv)), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return {one["name"]: one["version"] for one in listed if one["name"] in SHOWN}


def machine(bench_device: str) -> dict[str, str]:
    """What this is measured on."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    found = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if ":" in line}
    flags = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in found.get("flags", "").split()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "processor": f"{found.get('model name', platform.processor())} ({', '.join(flags)})",
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory:.0f} GiB",
        **({"gpu": torch.cuda.get_device_name()} if bench_device == "cuda" else {}),
        "device": bench_device,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


def probe(bench: Bench) -> dict[str, Any]:
    """How fast bf16 GEMMs of the model's shapes are just now; see `peers.probe`."""
    child = run(bench, module(bench, "", "probe", bench.model, bench.device), bench.work / "probe.log")
    found: dict[str, Any] = json.loads(child.output.splitlines()[-1])
    say(f"GEMM probe: {found['flops'] / 1e12:.3f} TFLOP/s, {found['threads']} threads {found['gpu']}")
    return found


def job(bench: Bench, kind: Kind, loss: str, contestant: Contestant, place: Path, seed: int) -> Job:
    """A run over the whole set."""
    data = bench.work / "data"
    train = rows_file(data, kind.name, loss, "train", bench.rows)
    batch = {"padded": kind.padded_batch, "whole": kind.whole_batch, "single": 1}[contestant.batch]
    return Job(
        model=str(bench.model),
        converted=str(bench.work / "converted" / contestant.venv / bench.model.name),
        train=str(train),
        held_out=str(rows_file(data, kind.name, loss, "held-out", bench.rows)),
        adapter=str(place / "adapter"),
        answer=str(place / "answer.json"),
        device=bench.device,
        seed=seed,
        max_length=kind.max_length,
        pack_length=kind.pack_length,
        packs=kind.packs,
        padded_batch=batch,
        accumulate=accumulate(kind, census(read(train)).mean, batch),
    )


def train(bench: Bench, name: str, given: Job) -> dict[str, Any]:
    """Run a contestant; what it took. Raises Failure."""
    contestant, place = CONTESTANTS[name], Path(given.answer).parent
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "job.json").write_text(json.dumps(asdict(given)), encoding="utf-8")
    command = module(bench, contestant.venv, contestant.module, place / "job.json")
    child = run(bench, command, place / "log", contestant.environment, ours=not contestant.venv)
    answer: dict[str, Any] = json.loads(Path(given.answer).read_text(encoding="utf-8"))
    if not answer["updates"]:
        raise Failure("too few rows for one update")
    rows = census(read(Path(given.train)))
    if answer["supervised"] is not None and answer["supervised"] < LOST * rows.supervised:
        raise Failure(f"supervised {answer['supervised']:,} tokens of {rows.supervised:,}: it dropped or cut rows")
    answer["first_step"] -= child.started
    return answer | {"process": child.seconds, "rss": child.rss, "adapter": given.adapter}


def rehearse(bench: Bench, names: list[str], kind: Kind, loss: str) -> list[str]:
    """Install the contestants and let each train a few rows. Returns those that can."""
    able = []
    for name in names:
        contestant = CONTESTANTS[name]
        try:
            install(bench, contestant)
            given = job(bench, kind, loss, contestant, bench.work / "runs" / "rehearsal" / name, seed=0)
            few = bench.work / "data" / f"{kind.name}-{loss}-few.jsonl"
            count = max(2, int(REHEARSED / census(read(Path(given.train))).mean))
            few.write_text("".join(Path(given.train).read_text().splitlines(keepends=True)[:count]))
            if contestant.converter:
                command = module(bench, contestant.venv, contestant.converter, given.model, given.converted)
                run(bench, command, bench.work / "converting.log", ours=False)
            found = train(bench, name, Job(**asdict(given) | {"train": str(few), "accumulate": 1}))
        except Failure as failure:
            bench.results.failed[name] = str(failure)
            say(f"{name} is left out: {failure}")
            continue
        bench.results.versions[contestant.venv or "loratune"] = versions(bench, contestant.venv)
        say(f"{name} runs: {found['process']:.0f} s, {found['rss'] / 2**30:.1f} GiB")
        able.append(name)
    bench.save()
    return able


def compare(bench: Bench, names: list[str], kind: Kind, loss: str, rounds: int) -> None:
    """All rounds over one set with one loss, and the scores of what came out."""
    runs: list[dict[str, Any]] = []
    probes = [probe(bench)]
    cell = {"runs": runs, "probes": probes, "base_loss": None}
    bench.results.cells[f"{kind.name}, {loss}"] = cell
    for number in range(rounds):
        for name in names[:: -1 if number % 2 else 1]:
            place = bench.work / "runs" / f"{kind.name}-{loss}" / f"{number}-{name}"
            given = job(bench, kind, loss, CONTESTANTS[name], place, seed=number + 1)
            try:
                with busy(bench.busy):
                    found = train(bench, name, given)
            except Failure as failure:
                bench.results.failed[f"{name} ({kind.name}, {loss})"] = str(failure)
                say(f"{name} failed: {failure}")
                continue
            runs.append({"contestant": name, "pass": number, **found, "loss": None})
            say(f"{kind.name}, {loss}, round {number + 1}: {name} {found['seconds']:.1f} s")
            bench.save()
        probes.append(probe(bench))
    judge(bench, cell, rows_file(bench.work / "data", kind.name, loss, "held-out", bench.rows))
    bench.save()


def judge(bench: Bench, cell: dict[str, Any], held_out: Path) -> None:
    """Score the adapters of a cell, all of them by one evaluator."""
    adapters = [one["adapter"] for one in cell["runs"]]
    command = module(bench, "", "evaluate", bench.model, held_out, bench.device, *adapters)
    try:
        child = run(bench, command, bench.work / "judge.log")
    except Failure as failure:
        bench.results.failed[f"held-out loss ({held_out.stem})"] = str(failure)
        return
    cell["base_loss"], *losses = json.loads(child.output.splitlines()[-1])
    for one, loss in zip(cell["runs"], losses, strict=True):
        one["loss"] = loss


def publish(bench: Bench) -> None:
    """Write the table."""
    known = bench.results
    where = ", ".join(f"{name}: {value}" for name, value in known.machine.items())
    lines = [where, ""]
    for title, cell in known.cells.items():
        name, loss = title.split(", ")
        counted = census(read(rows_file(bench.work / "data", name, loss, "train", bench.rows)))
        limit = median(roof(counted, one) for one in cell["probes"])
        speeds = [one["flops"] / 1e12 for one in cell["probes"]]
        base = f"{cell['base_loss']:.4f}" if cell["base_loss"] else "unknown"
        lines += [
            f"## {title} loss", "",
            f"{counted.rows} rows, {counted.tokens:,} tokens ({counted.supervised:,} supervised), "
            f"mean {counted.mean:.0f}, "
            f"longest {counted.longest}. GEMM probes: {', '.join(f'{one:.3f}' for one in speeds)} TFLOP/s in bf16, a "
            f"roof of {limit:,.0f} tokens/s. Held-out loss of the base: {base}.", "",
            *table(cell["runs"], list(CONTESTANTS), counted, limit), "",
        ]  # fmt: skip
    lines += ["## Contestants", "", *(f"- {name}: {one.note}" for name, one in CONTESTANTS.items())]
    lines += [f"- left out: {name}: {reason}" for name, reason in known.failed.items()] + ["", "## Versions", ""]
    for venv, found in known.versions.items():
        lines.append(f"- {venv}: {', '.join(f'{package} {version}' for package, version in found.items())}")
    (bench.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def say(text: str) -> None:
    """A line about what is going on."""
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", flush=True)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare loratune with other ways to train a LoRA adapter.")
    work = Path.home() / ".cache" / "loratune-bench"
    kinds = [kind.name for kind in SETS]
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    usual = [name for name in kinds if name != "full"]  # with it a CPU would take hours
    parser.add_argument("--sets", nargs="+", choices=kinds, default=usual, help="default: all but full")
    parser.add_argument("--loss", nargs="+", choices=("full", "completion"), default=["full", "completion"])
    parser.add_argument("--peers", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS), metavar="NAME")
    parser.add_argument(
        "--shape", choices=list(SHAPES), help="random weights of this shape in place of the model's own"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=0, help="rows of each set, to try it out (default: all)")
    parser.add_argument("--limit", type=float, default=3600, help="seconds that one run may take (default: 3600)")
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside each run (default: 0)")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--work", type=Path, default=work, help=f"environments, data, adapters (default: {work})")
    parser.add_argument("--out", type=Path, help="of the results (default: in the work directory)")
    parser.add_argument("--add", action="store_true", help="keep what results.json holds of other sets and losses")
    parser.add_argument("--table", action="store_true", help="only make the table anew from results.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here")
    return options


def main() -> None:
    """Do all of it."""
    given = options()
    work, out = given.work.absolute(), (given.out or given.work / "results").absolute()
    known_machine = machine(given.device) | ({"busy processes": str(given.busy)} if given.busy else {})
    bench = Bench(
        work, out, given.model.absolute(), given.device, given.rows, given.limit, Results(known_machine), given.busy
    )
    work.mkdir(parents=True, exist_ok=True)
    if given.add or given.table:
        known = json.loads((out / "results.json").read_text(encoding="utf-8"))
        bench = replace(bench, results=Results(**known))
    if given.table:
        publish(bench)
        return
    names = [name for name in given.peers if CONTESTANTS[name].device in ("", bench.device)]
    fetch = [sys.executable, str(ROOT / "scripts" / "fetch_smollm2.py"), str(bench.model)]
    subprocess.run(fetch, check=True, stdin=subprocess.DEVNULL)
    if bench.device == "cuda":  # the figures mean nothing where it computes something else
        subprocess.run([sys.executable, "-m", "loratune", "env", "--self-test"], cwd=ROOT, check=True)
    run(bench, module(bench, "", "data", work / "data", bench.model, given.rows), work / "data.log")
    if given.shape:
        made = work / "shapes" / given.shape
        run(bench, module(bench, "", "shapes", given.shape, bench.model, made), work / "shape.log")
        bench = replace(bench, model=made)
    kinds = [kind for kind in SETS if kind.name in given.sets]
    names = rehearse(bench, names, kinds[0], given.loss[0])
    for kind in kinds:
        for loss in given.loss:
            compare(bench, names, kind, loss, given.rounds)
            publish(bench)
    print((out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
