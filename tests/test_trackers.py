"""Trackers do not change a run. Tested with the real TensorBoard, and with missing and failing trackers."""

import json
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import check_refused
from running import Cli, MakeConfig, before_batch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback, TrainerState, TrainingArguments

from loratune.api import libraries
from loratune.codes import Code
from loratune.events import noted
from loratune.training.callbacks import Tracker

WEIGHTS = "adapter_model.safetensors"
NAMES = {"loss": "train/loss", "grad_norm": "train/grad_norm", "learning_rate": "train/learning_rate"}
NAMES |= {"eval_loss": "eval/loss"}
TRACKED = {
    "lora": {"lora_dropout": 0.1},
    "data": {"validation": 0.2},
    "training": {"max_steps": 6, "eval_steps": 2, "report_to": ["tensorboard"]},
}


@pytest.fixture(autouse=True)
def _default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Name → steps and values as TensorBoard shows them."""
    events = EventAccumulator(str(directory)).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def recorded(adapter: Path) -> dict[str, list[tuple[int, float]]]:
    """The same values from the curve of an adapter's record."""
    curve = json.loads((adapter / "loratune.json").read_text())["curve"]
    return {
        tag: [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in curve if name in entry]
        for name, tag in NAMES.items()
    }


def test_tensorboard_shows_the_curve(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """The logs are next to the adapter, whose bytes are the same without a tracker, even with dropout."""
    ran = cli("train", run_config(**TRACKED))
    assert ran.code == 0 and Code.TRAINING_TRACKER_FAILED not in ran.err, ran.err
    (logs,) = (tmp_path / "out.logs").iterdir()
    shown = scalars(logs)
    assert {name: shown[name] for name in NAMES.values()} == recorded(tmp_path / "out")
    assert "train/train_runtime" not in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.logs", "rows.jsonl", "run.yaml"]
    plain = ["--set", "training.report_to=[]", "--set", f"output_dir={tmp_path / 'plain'}"]
    assert cli("train", tmp_path / "out" / "run.yaml", *plain).code == 0
    assert (tmp_path / "plain" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    assert not (tmp_path / "plain.logs").exists()


@pytest.mark.parametrize(
    "number, code",
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
)
def test_resumed_run_continues_the_same_log(
    number: signal.Signals, code: int, processes: Any, run_config: MakeConfig, tmp_path: Path
) -> None:
    """Stopping works as without a tracker, and repeated steps are shown once. The trackers may be changed on resume."""
    steps = {"max_steps": 30, "save_steps": 10, "eval_steps": 8}
    config = run_config(**TRACKED | {"training": TRACKED["training"] | steps})
    child = processes.start("train", config, first=before_batch(14, f"signal.raise_signal({int(number)})"))
    assert child.wait() == code
    child = processes.start("train", config, "--resume", "--set", "training.report_to=[tensorboard,tensorboard]")
    assert child.wait() == 0, child.said()
    (logs,) = (tmp_path / "out.logs").iterdir()
    assert len([*logs.iterdir()]) == 2
    shown = scalars(logs)
    assert {name: shown[name] for name in NAMES.values()} == recorded(tmp_path / "out")


def test_tracker_without_a_usable_directory_is_disabled(
    cli: Cli, run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is at the path of its directory. The run reports this once and continues."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file" / "logs"))
    ran = cli("train", run_config(**TRACKED))
    assert ran.code == 0, ran.err
    (line,) = [line for line in ran.err.splitlines() if f" [{Code.TRAINING_TRACKER_FAILED}]" in line]
    assert line.startswith("training.report_to: tensorboard ")
    assert (tmp_path / "out" / WEIGHTS).exists() and not (tmp_path / "out.logs").exists()


class Careless(TrainerCallback):
    """A tracker that draws random numbers, prints, and fails."""

    def __init__(self, events: list[str], error: type[BaseException]):
        self.events, self.error = events, error

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.events.append("begin")
        print("begun", random.random(), np.random.rand(), torch.rand(1))

    def on_log(self, *_: Any, **__: Any) -> None:
        self.events.append("log")
        raise self.error("no\nspace")


@pytest.mark.parametrize("error", [OSError, SystemExit])
def test_misbehaving_tracker_does_not_affect_the_run(
    error: type[BaseException], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It changes no random state and prints nothing on stdout. A failure is reported once, and it is not called
    again."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"), TrainerState(), None
    events: list[str] = []
    tracker = Tracker("careless", partial(Careless, events, error), "out")
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    tracker.on_train_begin(*arguments)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    with noted() as lines:
        for _ in range(2):
            tracker.on_log(*arguments, logs={"loss": 1.0})
        tracker.end()
    assert events == ["begin", "log"]
    (line,) = lines
    assert f" [{Code.TRAINING_TRACKER_FAILED}]" in line and "no\\nspace" in line
    assert capsys.readouterr().out == ""
    interrupted = Tracker("careless", partial(Careless, events, KeyboardInterrupt), "out")
    with pytest.raises(KeyboardInterrupt):
        interrupted.on_log(*arguments, logs={"loss": 1.0})


def test_library_output_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """transformers prints to stdout on import if W&B is installed in offline mode."""
    with libraries():
        print("said on import")
    assert capsys.readouterr() == ("", "said on import\n")


def test_missing_tracker_is_reported(
    cli: Cli, run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is loaded. A directory of the same name, as W&B creates, is not a package."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "trackio").mkdir()
    config = run_config(training={"report_to": ["tensorboard", "trackio"]}, model={"name_or_path": "/none"})
    check_refused(cli("train", config), 2, (Code.SYSTEM_MISSING_PACKAGE, "", "training.report_to"))
