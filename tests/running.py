"""What the tests of faults share: runs in separate processes, watched and stopped at a chosen moment."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from conftest import Process, Ran
from fork_server import Child, ForkServer

from loratune.training.checkpoints.store import CheckpointRecord

Cli = Callable[..., Ran]
MakeConfig = Callable[..., Path]

WEIGHTS = "adapter_model.safetensors"
# Everything that has a random state or a position: dropout, shuffling, accumulation, more than one epoch.
RESTLESS: dict[str, Any] = {
    "lora": {"lora_dropout": 0.3},
    "training": {
        "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 3, "save_steps": 2,
    },
}  # fmt: skip
LONG: dict[str, Any] = {"training": {"num_train_epochs": 500, "save_steps": 1000}}


def until(seen: Callable[[], Any], child: Child, pause: float = 0.002, seconds: float = 120) -> None:
    """Wait until something is seen, while a process runs; it is killed if it is not seen within these seconds."""
    end = time.monotonic() + seconds
    while not seen():
        assert child.poll() is None, child.said()
        if time.monotonic() > end:
            child.send(signal.SIGKILL)
            raise TimeoutError(child.said())
        time.sleep(pause)


def handles(child: Child | Process, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal. Every command has one from its start on."""
    status = Path(f"/proc/{child.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1]
    return bool(int(caught, 16) >> (number - 1) & 1)


def checkpoints(partial: Path) -> list[Path]:
    """The checkpoints of an unfinished run, the newest first."""
    found = (partial / "checkpoints").glob("checkpoint-*")
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def before_batch(number: int, statement: str) -> str:
    """Python code for `ForkServer.start` that runs a statement before the training batch of this number, counted from
    1."""
    return f"""
import os, signal
from loratune.training.trainer import RunTrainer

prepare, count = RunTrainer._prepare_inputs, 0
def prepare_after(*arguments):
    global count
    count += 1
    if count == {number}:
        {statement}
    return prepare(*arguments)

RunTrainer._prepare_inputs = prepare_after
"""


def interrupt(processes: ForkServer, config: Path, partial: Path) -> None:
    """Start a run that saves every step, and stop it in its third step, with two checkpoints."""
    child = processes.start("train", config, first=before_batch(3, "signal.raise_signal(signal.SIGINT)"))
    assert child.wait() == 130, child.said()
    assert [path.name for path in checkpoints(partial)] == ["checkpoint-3", "checkpoint-2"]


def copy_of(run: Path, folder: Path) -> Path:
    """Copy an interrupted run with its config and rows to another folder. Returns the config there."""
    shutil.copytree(run / "out.partial", folder / "out.partial")
    shutil.copy(run / "rows.jsonl", folder / "rows.jsonl")
    values = yaml.safe_load((run / "run.yaml").read_text()) | {"output_dir": str(folder / "out")}
    (folder / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder / "run.yaml"


def straight(processes: ForkServer, config: Path, tmp_path: Path) -> bytes:
    """The adapter of the same run when it is not interrupted."""
    child = processes.start("train", config, "--set", f"output_dir={tmp_path / 'straight'}")
    assert child.wait() == 0, child.said()
    return (tmp_path / "straight" / WEIGHTS).read_bytes()


def curve(record: dict[str, Any]) -> list[dict[str, float]]:
    """Steps, losses and learning rates, without anything that depends on the clock."""
    names = ("step", "loss", "learning_rate", "grad_norm", "eval_loss")
    return [{name: entry[name] for name in names if name in entry} for entry in record["curve"]]


def flip(path: Path, place: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def stopped(cli: Cli, partial: Path, *arguments: object, number: int = 2) -> Ran:
    """Runs a command in this process, and sends it a Ctrl-C as soon as it has written this many checkpoints."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            if len(checkpoints(partial)) >= number:
                os.kill(os.getpid(), signal.SIGINT)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return cli(*arguments)
    finally:
        over.set()
        watcher.join(60)


def run_record() -> CheckpointRecord:
    """A minimal record of a run."""
    training = {"learning_rate": 1.0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    counts = {"rows": 1, "tokens": 1}
    return CheckpointRecord.model_validate(
        {
            "config": {"model": {}, "lora": {}, "data": {}, "training": training},
            "fingerprints": {"base": "a", "data": "b"}, "rows": counts, "changes": [],
        }
    )  # fmt: skip
