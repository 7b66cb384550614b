"""What the tests of faults share: runs in processes of their own, watched and stopped at a chosen moment."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import Ran
from nursery import Child, Nursery

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


def until(seen: Callable[[], Any], child: Child, pause: float = 0.002) -> None:
    while not seen():
        assert child.poll() is None, child.said()
        time.sleep(pause)


def checkpoints(partial: Path) -> list[Path]:
    """The newest first."""
    found = (partial / "checkpoints").glob("checkpoint-*")
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def straight(processes: Nursery, config: Path, tmp_path: Path) -> bytes:
    """The adapter of the same run when nothing happens to it."""
    child = processes.start("train", config, "--set", f"output_dir={tmp_path / 'straight'}")
    assert child.wait() == 0, child.said()
    return (tmp_path / "straight" / WEIGHTS).read_bytes()


def curve(record: dict[str, Any]) -> list[dict[str, float]]:
    """Steps, losses and rates, without what the clock says."""
    names = ("step", "loss", "learning_rate", "grad_norm", "eval_loss")
    return [{name: entry[name] for name in names if name in entry} for entry in record["curve"]]


def flip(path: Path, place: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def stopped(cli: Cli, partial: Path, *arguments: object, number: int = 2) -> Ran:
    """Runs a command in this process, and sends it a Ctrl-C as soon as it has written so many checkpoints."""
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
        watcher.join()
