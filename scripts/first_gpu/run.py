"""Run loratune on a card for the first time, without a network: `scripts/gpu.sh run`.

Installs the parcels that `first_gpu.pack` made into WORK, where they come before the packages of the machine, and runs
each part (`first_gpu.parts`) in a process group of its own that ends within four minutes. Each result becomes a line of
OUT/results.jsonl with the keys part, status (ok, failed, or timeout), seconds of the part, and what was measured, or
error and stderr, the last line and the last lines of the log; the logs are beside it. Ends with a table of what ran
now, and exit code 1 if anything failed.

PART is the name of a part or its beginning (`smollm2`, `7b-8bit`); without any, all run. What a part needs, such as a
base, is made by the first part that needs it, and stays in WORK. Pieces of the model's wheel that are carried one after
the other are also kept there.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from first_gpu.pack import package, parcels_in
from first_gpu.parts import PARTS, ROOT

LIMIT = 240.0
"""Seconds of a part."""
LAST = 10
"""Lines of the log of a part that failed that are among its results."""
Result = dict[str, Any]


def install(parcels: Path, work: Path) -> list[Result]:
    """Install the wheels of each parcel into `site`, unless it has them. What other parcels have brought stays there,
    as parcels may come one after the other.

    Returns a result for each parcel. One that cannot be installed stops no other; the parts that need it fail.
    """
    site, results = work / "site", list[Result]()
    stamp = site / "installed.json"
    known: dict[str, str] = json.loads(stamp.read_text(encoding="utf-8")) if stamp.is_file() else {}
    for parcel in parcels_in(parcels):
        digests = {one: hashlib.sha256(one.read_bytes()).hexdigest() for one in sorted(parcel.glob("*.whl"))}
        new = [one for one, digest in digests.items() if known.get(package(one)) != digest]
        if not new:
            continue
        for former in [old for one in new for old in site.glob(f"{one.name.split('-')[0]}-*.dist-info")]:
            shutil.rmtree(former)
        command = [
            sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps",
            "--no-compile", "--no-cache-dir", "--upgrade", f"--target={site}", *map(str, new),
        ]  # fmt: skip
        start = time.monotonic()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        head = {"part": "install", "status": "ok", "seconds": round(time.monotonic() - start, 1), "parcel": parcel.name}
        results.append(head | failure("failed", done.stderr) if done.returncode else head)
        known |= {package(one): "" if done.returncode else digests[one] for one in new}
        site.mkdir(exist_ok=True)  # where pip has failed
        stamp.write_text(json.dumps(known), encoding="utf-8")
    return results


def failure(status: str, log: str) -> Result:
    """What the result of a failure has. status: failed or timeout; log: what was printed on stderr."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return {"status": status, "error": lines[-1][:300] if lines else "it printed nothing", "stderr": lines[-LAST:]}


def keep_pieces(parcels: Path, work: Path) -> None:
    """Copy the pieces of the model's wheel, which may be gone when the next ones are here."""
    kept = work / "pieces"
    kept.mkdir(exist_ok=True)
    for piece in parcels.glob("model-*/*"):
        if not (kept / piece.name).is_file() or (kept / piece.name).stat().st_size != piece.stat().st_size:
            shutil.copy(piece, kept)


def environment(site: Path, work: Path, *, dry: bool) -> dict[str, str]:
    """The environment of the parts. dry: without a card."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = os.pathsep.join([str(site), str(ROOT / "scripts"), *filter(None, given)])
    variables = {
        "PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "cache" / "huggingface"),
        "XDG_CACHE_HOME": str(work / "cache"), **({"CUDA_VISIBLE_DEVICES": ""} if dry else {}),
    }  # fmt: skip
    return os.environ | variables


def run_part(name: str, command: Sequence[str], logs: Path, variables: Mapping[str, str], limit: float) -> list[Result]:
    """Run a part and everything that it starts. Returns its results: one at least, the last of which tells why it
    failed if it did.

    Args:
        name: Of the part.
        command: Prints results as lines of JSON on stdout.
        logs: Receives a log, whose last line is the reason of a failure.
        variables: Its environment.
        limit: Seconds after which it is killed.
    """
    start, log, status = time.monotonic(), logs / f"{name}.log", "ok"
    with log.open("w", encoding="utf-8") as errors, log.with_suffix(".out").open("w+", encoding="utf-8") as output:
        child = subprocess.Popen(
            command, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
        )
        try:
            status = "failed" if child.wait(limit) else "ok"
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # also what it has left running
            child.wait()
        output.seek(0)
        found = [json.loads(line) for line in output if line.startswith("{") and line.endswith("}\n")]
    head = {"part": name, "status": "ok", "seconds": round(time.monotonic() - start, 1)}
    results = [head | one for one in found]
    if status == "ok" and found:
        return results
    text = log.read_text(encoding="utf-8", errors="replace")
    return [*results, head | failure("failed" if status == "ok" else status, text)]


def run(
    commands: Mapping[str, Sequence[str]], out: Path, variables: Mapping[str, str], limit: float
) -> Iterator[list[Result]]:
    """Run parts one after the other, whether or not those before succeeded. Yields the results of each.

    Args:
        commands: Name of a part → its command.
        out: Receives a directory `logs`.
        variables: The environment of the parts.
        limit: Seconds of a part.
    """
    (out / "logs").mkdir(parents=True, exist_ok=True)
    for name, command in commands.items():
        yield run_part(name, command, out / "logs", variables, limit)


def line(result: Result) -> str:
    """A result in words, without what is too long for a line."""
    values = {key: value for key, value in result.items() if key not in ("part", "status", "seconds")}
    shown = [f"{key} {value}" for key, value in values.items() if not isinstance(value, list | dict)]
    return f"{result['part']:<24} {result['status']:<7} {result['seconds']:>6} s  {', '.join(shown)}"


def table(results: Iterable[Result]) -> str:
    """loratune and plain Trainer + PEFT side by side, in Markdown; the last result of each. Empty without any."""
    trained = {(one["base"], one["quantization"], one["with"]): one for one in results if "tokens_per_second" in one}
    lines = [
        "| base | quantization | with | seconds a step | tokens/s | peak GPU memory, GiB | peak RSS, GiB | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (base, quantization, tool), one in trained.items():
        memory = [f"{one[name] / 2**30:.2f}" for name in ("gpu_bytes", "rss_bytes")]
        speeds = [f"{one['step_seconds']:.4f}", f"{one['tokens_per_second']:,.0f}"]
        cells = [base, quantization, tool, *speeds, *memory, f"{one['first_loss']:.4f} to {one['last_loss']:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if trained else ""


def main() -> None:
    """Install, run the parts, and print the table."""
    parser = argparse.ArgumentParser(
        prog="gpu.sh run", description=f"Parts: {', '.join(PARTS)}", epilog="A PART is a name or the beginning of one."
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all")
    parser.add_argument("--dry", action="store_true", help="on a CPU, with tiny models and few steps")
    parser.add_argument(
        "--parcels", type=Path, default=ROOT / "gpu-parcels", metavar="DIR", help="default: gpu-parcels"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "gpu-work", help="what is installed and made stays here")
    parser.add_argument(
        "--out", type=Path, help="of results.jsonl and logs (default: WORK/results, with --dry WORK/results-dry)"
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT, metavar="SECONDS", help=f"of a part (default: {LIMIT:.0f})"
    )
    options = parser.parse_args()
    chosen = [name for name in PARTS if not options.parts or name.startswith(tuple(options.parts))]
    if unknown := [one for one in options.parts if not any(name.startswith(one) for name in PARTS)]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    out = (options.out or work / f"results{'-dry' if options.dry else ''}").absolute()
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends what a part has started, too
    keep_pieces(options.parcels, work)
    dry = ["--dry"] if options.dry else []
    commands = {name: [sys.executable, "-m", "first_gpu.parts", name, str(work), *dry] for name in chosen}
    variables = environment(work / "site", work, dry=options.dry)
    all_results = list[Result]()
    for results in chain([install(options.parcels, work)], run(commands, out, variables, options.limit)):
        with (out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(one) + "\n" for one in results)
        for one in results:
            print(line(one), flush=True)
        all_results += results
    failed = sorted({one["part"] for one in all_results if one["status"] != "ok"})
    told = f"failed: {', '.join(failed)}" if failed else "nothing failed"
    print(f"\n{table(all_results)}\n{told}; results are in {out}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
