"""Run loratune on a card for the first time, without a network: `scripts/gpu.sh run`.

Installs the parcels that `first_gpu.pack` made into WORK, where they come before the packages of the machine, and runs
each part (`first_gpu.parts`) in a process group of its own that ends within four minutes. Each result becomes a line of
OUT/results.jsonl with the keys part, status (ok, failed, or timeout), seconds of the part, and what was measured; the
logs are beside it. Ends with a table of what ran now, and exit code 1 if anything failed.

PART is the name of a part or its beginning (`smollm2`, `7b-8bit`); without any, all run. What a part needs, such as a
base, is made by the first part that needs it, and stays in WORK. Pieces of the model's wheel that are carried one after
the other are also kept there.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from first_gpu.pack import parcels_in
from first_gpu.parts import PARTS, ROOT

LIMIT = 240.0
"""Seconds of a part."""
Result = dict[str, Any]


def install(parcels: Path, work: Path) -> Path:
    """Install the wheels of the parcels. Returns the directory. Nothing is done if the same wheels were the last ones,
    or if there are none. Ends the program if pip fails."""
    site, stamp = work / "site", work / "installed.json"
    wheels = [one for parcel in parcels_in(parcels) for one in sorted(parcel.glob("*.whl"))]
    named = json.dumps([[one.name, one.stat().st_size, one.stat().st_mtime] for one in wheels])
    if not wheels or (stamp.is_file() and stamp.read_text(encoding="utf-8") == named):
        return site
    shutil.rmtree(site, ignore_errors=True)
    stamp.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps",
        "--no-compile", "--no-cache-dir", f"--target={site}", *map(str, wheels),
    ]  # fmt: skip
    if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode:
        sys.exit("error: pip could not install the parcels; were they made for this version of Python?")
    stamp.write_text(named, encoding="utf-8")
    return site


def keep_pieces(parcels: Path, work: Path) -> None:
    """Copy the pieces of the model's wheel, which may be gone when the next ones are here."""
    kept = work / "pieces"
    kept.mkdir(exist_ok=True)
    for piece in parcels.glob("model-*/*"):
        if not (kept / piece.name).is_file() or (kept / piece.name).stat().st_size != piece.stat().st_size:
            shutil.copy(piece, kept)


def environment(site: Path, work: Path, *, dry: bool) -> dict[str, str]:
    """The environment of the parts. dry: without a card."""
    paths = os.pathsep.join([str(site), str(ROOT / "scripts")])
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
    if status == "ok" and found:
        return [head | one for one in found]
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    why = lines[-1][:300] if lines else "it printed nothing"
    return [*(head | one for one in found), head | {"status": "failed" if status == "ok" else status, "error": why}]


def run(commands: Mapping[str, Sequence[str]], out: Path, variables: Mapping[str, str], limit: float = LIMIT) -> int:
    """Run parts one after the other, whether or not those before succeeded, and append their results to
    `results.jsonl`. Prints a line for each. Returns how many failed.

    Args:
        commands: Name of a part → its command.
        out: Of the results; logs are in `logs` there.
        variables: The environment of the parts.
        limit: Seconds of a part.
    """
    (out / "logs").mkdir(parents=True, exist_ok=True)
    failed = 0
    for name, command in commands.items():
        results = run_part(name, command, out / "logs", variables, limit)
        with (out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(one) + "\n" for one in results)
        failed += results[-1]["status"] != "ok"
        for one in results:
            print(line(one), flush=True)
    return failed


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
    parser.add_argument("--dry", action="store_true", help="on a CPU, with tiny models and two steps")
    parser.add_argument(
        "--parcels", type=Path, default=ROOT / "gpu-parcels", metavar="DIR", help="default: gpu-parcels"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "gpu-work", help="what is installed and made stays here")
    parser.add_argument("--out", type=Path, help="of results.jsonl and logs (default: WORK/results)")
    options = parser.parse_args()
    chosen = [name for name in PARTS if not options.parts or name.startswith(tuple(options.parts))]
    if unknown := [one for one in options.parts if not any(name.startswith(one) for name in PARTS)]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    out = (options.out or work / "results").absolute()
    keep_pieces(options.parcels, work)
    site = install(options.parcels, work)
    dry = ["--dry"] if options.dry else []
    commands = {name: [sys.executable, "-m", "first_gpu.parts", name, str(work), *dry] for name in chosen}
    failed = run(commands, out, environment(site, work, dry=options.dry))
    results = [json.loads(text) for text in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    print(f"\n{table(results)}\n{failed} of {len(chosen)} parts failed; results are in {out}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
