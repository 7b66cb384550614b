"""Which settings learn best: the experiments behind loratune's defaults, resumable, on two cores.

    python scripts/learn.py run --work DIRECTORY [--only rate,targets] [--hours 3]
    python scripts/learn.py tables

`run` trains what is not yet in `scripts/learning/results.jsonl`, a line for each run, in the order of
`learning/experiments.py`, and scores each adapter in float32 on the same 200 held-out rows of its task and on unrelated
text. DIRECTORY keeps the downloads, the rows (see `learning/tasks.py`) and the smaller model. Several processes can
work side by side: each takes the next run that none has. `tables` prints the tables of the pages in scripts/learning
from the file of results.
"""

import argparse
import base64
import fcntl
import hashlib
import json
import pydoc_data.topics
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from learning import models, tables, tasks
from learning.experiments import EXPERIMENTS, Spec
from loratune import config, data
from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.adapter.generation import LoadedAdapter
from loratune.compare import behavior
from loratune.compare.evaluation import engine_of
from loratune.config import Source
from loratune.training import preflight
from loratune.training.checkpoints import run_dir
from loratune.training.results import TrainedAdapter
from loratune.training.run import train as train_run

RESULTS = Path(__file__).parent / "learning" / "results.jsonl"
MODELS = {"135M": "models/SmolLM2-135M-Instruct", "57M": "", "narrow": ""}
"""Where a model lies; those without a place are made in the work directory, see `learning/models.py`."""
ANSWERED = {"quickstart": 8, "spelling": 16}
"""Tasks whose rows have one right answer, and the most tokens that are generated for it."""
TEXT_BLOCKS, TEXT_CHARACTERS = 40, 400
"""How much unrelated text forgetting is measured on."""
TRAINING: dict[str, Any] = {
    "learning_rate": 2e-4,
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0.0,
    "lr_scheduler_type": "linear",
    "save_steps": 10**6,
}
_ANSWERS = dict[str, Any]()
"""Base → its answers to everyday instructions, with the prompts."""
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q", "k", "v", "o"]}
"""What holds where a run does not say otherwise."""


def model_directory(name: str, work: Path) -> Path:
    """Where a model lies; it is made if it is one of those that are made."""
    if MODELS[name]:
        return Path(__file__).resolve().parent.parent / MODELS[name]
    return models.made(name, work, Path(__file__).resolve().parent.parent / MODELS["135M"])


def name_of(one: Spec) -> str:
    """A short name that no other run has."""
    return hashlib.sha256(json.dumps(one, sort_keys=True).encode()).hexdigest()[:12]


def packed(values: Sequence[float]) -> str:
    """Numbers as text, in float32."""
    return base64.b85encode(zlib.compress(np.asarray(values, np.float32).tobytes(), 9)).decode()


def config_of(one: Spec, paths: Mapping[str, Path], work: Path, output: Path) -> dict[str, Any]:
    """The config of a run, as YAML has it. It leaves nothing to defaults that may change."""
    values: dict[str, Any] = {
        "model": {"name_or_path": str(model_directory(one["model"], work))},
        "data": {"train": str(paths["train"])},
        "training": {**TRAINING, "seed": one["seed"]},
        "lora": dict(LORA),
        "retention": {"kl_weight": 0.0},
        "output_dir": str(output),
    }
    for key, value in one["settings"].items():
        section, _, field = key.partition(".")
        values[section][field] = str(paths["validation"]) if key == "data.validation" else value
    if "max_steps" in values["training"]:
        del values["training"]["num_train_epochs"]
    return values


def train(one: Spec, paths: Mapping[str, Path], work: Path) -> tuple[Path, TrainedAdapter]:
    """Train as the command does. Returns the adapter directory and the result."""
    output = work / "adapters" / name_of(one)
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.with_suffix(".json")
    values = config_of(one, paths, work, output)
    if "start" in one:
        values["lora"]["start_from"] = str(_start(one["start"], work))
    file.write_text(json.dumps(values))
    run = config.load(file)
    ready = preflight.check(run, run_dir.check(run.output_dir, overwrite=True))
    result = train_run(ready, allow_worse=True)
    assert result is not None
    return output, result


def _files(one: Spec, work: Path) -> dict[str, Path]:
    """The files of the rows of a run."""
    return tasks.write(one["task"], work, one["rows"], one.get("held_out", tasks.HELD_OUT), one.get("skip", 0))


def _start(one: Spec, work: Path) -> Path:
    """The adapter that runs continue from, trained and scored when the first of them needs it."""
    place, name = work / "adapters" / name_of(one), f"start {name_of(one)}"
    with _taken(work / "taken" / name_of(one), wait=True):
        paths = _files(one, work)
        if not place.is_dir():
            train(one, paths, work)
        if name not in {entry["name"] for entry in recorded()}:
            scores = score(place, paths["held_out"], unrelated_text(work), base=False, dtype="bfloat16")
            _append({"name": name, "task": one["task"]} | scores)
    return place


def score(
    adapter: Path,
    held_out: Path,
    text: Path,
    *,
    base: bool,
    dtype: str = "float32",
    limit: int = 0,
    earlier: Path | None = None,
) -> dict[str, Any]:
    """Nats and tokens of each held-out row and of each block of unrelated text, and of the base's own answers.

    Args:
        adapter: The adapter.
        held_out: The file of the held-out rows.
        text: The file of the unrelated text.
        base: Without the adapter.
        dtype: The dtype of the base.
        limit: The most tokens of an answer that is generated for each row; 0 for none.
        earlier: The file of the held-out rows of the run that the adapter started from, if it did.
    """
    info = AdapterDirectory.open(adapter)
    loaded = loading.load(replace(info, base=info.base.model_copy(update={"dtype": dtype})))
    vocabulary = loaded.model.config.get_text_config().vocab_size
    found: dict[str, Any] = {} if base else _behavior(loaded)
    for name, path, section in (
        ("rows", held_out, loaded.data),
        *([("earlier", earlier, loaded.data)] if earlier else []),
        ("text", text, loaded.data.model_copy(update={"format": "text", "columns": {}})),
    ):
        split = data.read_source(Source(path=str(path)), section)
        dataset = data.prepare(split, loaded.renderer, section, vocabulary)
        with loaded.without_adapter() if base else nullcontext():
            nats = engine_of(loaded).losses(dataset, dict.fromkeys(range(len(dataset.rows)), 1)).nats
        tokens = dataset.rows.supervised.tolist()
        if limit and name == "rows":
            found["right"] = _right(loaded, dataset, limit)
        found |= {
            f"{name}_nats": packed(nats.tolist()),
            f"{name}_tokens": packed(tokens),
            f"{name}_loss": float(nats.sum() / sum(tokens)),
        }
    return found


def _right(loaded: LoadedAdapter, dataset: data.TokenizedDataset, limit: int) -> str:
    """For each row 1 if the most probable answer is the expected one to its end, else 0."""
    rows = [dataset.rows.row(number) for number in range(len(dataset.rows))]
    found = list[float]()
    for start in range(0, len(rows), 50):
        asked = rows[start : start + 50]
        answers = loaded.complete([row.prompt for row in asked], limit)
        found += [
            float([*answer[: len(row.completion)]] == [*row.completion])
            for row, answer in zip(asked, answers, strict=True)
        ]
    return packed(found)


def _behavior(loaded: LoadedAdapter) -> dict[str, Any]:
    """How far an adapter moves its base on the base's own answers to everyday instructions."""
    base = str(loaded.model.get_base_model().config.name_or_path)
    if base not in _ANSWERS:
        _, given = behavior.prompts(loaded.renderer, None)
        with loaded.without_adapter():
            _ANSWERS[base] = list(zip(given, loaded.complete(given, behavior.ANSWER_TOKENS), strict=True))
    nats, equal, tokens = behavior.compare_tokens(
        loaded.model, engine_of(loaded), loaded.without_adapter, _ANSWERS[base]
    )
    found = behavior.Behavior.of(nats, equal, tokens)
    return {
        "behavior_nats": packed(nats.tolist()), "behavior_tokens": tokens.astype(int).tolist(),
        "divergence": found.divergence, "agreement": found.agreement,
    }  # fmt: skip


def unrelated_text(work: Path) -> Path:
    """Blocks of English prose that no task is about: Python's own help on its statements."""
    path = work / "tasks" / "text.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    paragraphs = [
        " ".join(block.split())
        for _, topic in sorted(pydoc_data.topics.topics.items())
        for block in topic.split("\n\n")
        if not block.startswith(("   ", ">"))
    ]
    kept = [text[:TEXT_CHARACTERS] for text in dict.fromkeys(paragraphs) if len(text) >= TEXT_CHARACTERS]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in kept[::7][:TEXT_BLOCKS]), encoding="utf-8")
    return path


def recorded() -> list[dict[str, Any]]:
    """All results so far."""
    return tables.read(RESULTS)


def run(work: Path, only: Sequence[str], hours: float) -> None:
    """Train and score what is missing, until the hours are over."""
    end, done = time.monotonic() + hours * 3600, {result["name"] for result in recorded()}
    wanted = {name_of(one): one for name in only for one in EXPERIMENTS[name]()}
    missing = {name: one for name, one in wanted.items() if name not in done}
    print(f"{len(missing)} runs are missing of {len(wanted)}", file=sys.stderr)
    text = unrelated_text(work)
    for name, one in missing.items():
        if time.monotonic() > end:
            break
        with _taken(work / "taken" / name) as free:
            if free and name not in {result["name"] for result in recorded()}:
                _measure(one, work, text)


@contextmanager
def _taken(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Inside, no other process has this run. Yields whether it was free. wait: until it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def _measure(one: Spec, work: Path, text: Path) -> None:
    """Train a run, score it, and write the result down."""
    held_out = one.get("held_out", tasks.HELD_OUT)
    paths, start = _files(one, work), time.monotonic()
    adapter, result = train(one, paths, work)
    middle = time.monotonic()
    base_name = f"base {one['model']} {one['task']}{f' {held_out}' if 'held_out' in one else ''}"
    if base_name not in {entry["name"] for entry in recorded()}:
        _append({"name": base_name} | score(adapter, paths["held_out"], text, base=True))
    dtype = "bfloat16" if "retention.kl_weight" in one["settings"] else "float32"
    limit = ANSWERED.get(one["task"], 0) if "held_out" in one else 0
    earlier = _files(one["start"], work)["held_out"] if "start" in one else None
    scores = score(adapter, paths["held_out"], text, base=False, dtype=dtype, limit=limit, earlier=earlier)
    figures: dict[str, Any] = {
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": round(middle - start, 1),
    }
    if "start" in one:
        figures["side_effects"] = result.side_effects
    _append({"name": name_of(one)} | one | figures | scores)
    shutil.rmtree(adapter)
    adapter.with_suffix(".json").unlink()
    used = f"{middle - start:.0f} s + {time.monotonic() - middle:.0f} s"
    said = f"{one['model']}, {one['task']} {one['rows']}, seed {one['seed']}, {one['settings']}"
    print(f"{said}: {scores['rows_loss']:.4f} ({used})", file=sys.stderr)


def _append(result: Mapping[str, Any]) -> None:
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def main() -> None:
    """Run experiments, or print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--work", type=Path, required=True)
    runner.add_argument("--only", type=lambda text: text.split(","), default=list(EXPERIMENTS))
    runner.add_argument("--hours", type=float, default=12.0)
    commands.add_parser("tables")
    arguments = parser.parse_args()
    if arguments.command == "tables":
        wanted = {name_of(one) for experiment in EXPERIMENTS.values() for one in experiment()}
        kept = [one for one in recorded() if one["name"] in wanted or "settings" not in one]
        print(tables.document(kept))
    else:
        run(arguments.work, arguments.only, arguments.hours)


if __name__ == "__main__":
    main()
