"""What may go wrong while a run lasts (rows 46 to 64 of the fault matrix): real processes, signals and full disks."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran, tiny_llama, tree
from nursery import Child, Nursery, nursery
from transformers import PreTrainedTokenizerFast

from loratune import interrupts
from loratune.checkpoints import Checkpoints

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


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery(tmp_path_factory.mktemp("processes")) as made:
        yield made


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


# Resuming


VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "packed in batches": {"data": {"packing": "batch"}},
    "packed in full": {"data": {"packing": "full", "max_length": 20}},
    "evaluated on the way": {"data": {"validation": 0.2}, "training": {"eval_steps": 3}},
    "adafactor": {"training": {"optim": "adafactor"}},
    "cosine": {"training": {"lr_scheduler_type": "cosine", "warmup_steps": 3}},
    "checkpointed": {"training": {"activation_checkpointing": True}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_killed_and_resumed_is_as_if_nothing_had_been(
    name: str, processes: Nursery, run_config: MakeConfig, tmp_path: Path, tiny_dir: Path
) -> None:
    """Killed twice, somewhere behind the first checkpoint and somewhere behind the next, in mid-epoch."""
    sections = {key: RESTLESS.get(key, {}) | VARIANTS[name].get(key, {}) for key in {**RESTLESS, **VARIANTS[name]}}
    config = run_config(**sections)
    expected = straight(processes, config, tmp_path)
    last: list[str] = []
    for arguments in ((), ("--resume",)):
        child = processes.start("train", config, *arguments)
        until(lambda last=last: any(path.name not in last for path in checkpoints(tmp_path / "out.partial")), child)
        child.send(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        last = [path.name for path in checkpoints(tmp_path / "out.partial")]
    child = processes.start("train", config, "--resume")
    assert child.wait() == 0, child.said()
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == expected
    records = [json.loads((tmp_path / name / "loratune.json").read_text()) for name in ("out", "straight")]
    assert curve(records[0]) == curve(records[1])
    assert not (tmp_path / "out.partial").exists()


def test_killed_at_random_moments(processes: Nursery, run_config: MakeConfig, tmp_path: Path) -> None:
    """Row 49: fifty kills, many of them while a checkpoint is being written. A checkpoint a step."""
    training = RESTLESS["training"] | {"num_train_epochs": 30, "save_steps": 1}
    config = run_config(lora=RESTLESS["lora"], training=training)
    expected = straight(processes, config, tmp_path)
    dice, kills, resume = random.Random(0), 0, False
    while kills < 50:
        child = processes.start("train", config, *(["--resume"] if resume else []))
        before = len(checkpoints(tmp_path / "out.partial")) and checkpoints(tmp_path / "out.partial")[0]
        writing = tmp_path / "out.partial" / "checkpoints" / "unfinished"
        until(lambda before=before: checkpoints(tmp_path / "out.partial")[:1] not in ([], [before]), child)
        moment = dice.choice(["any", "writing", "rotating"])  # the last one is row 58
        if moment == "writing":
            until(writing.exists, child, 0)
        elif moment == "rotating":
            until(lambda: len(checkpoints(tmp_path / "out.partial")) > 2, child, 0)
        time.sleep(dice.random() * 0.02)
        if child.poll() is not None:
            break
        child.send(signal.SIGKILL)
        child.wait()
        kills, resume = kills + 1, True
    assert kills > 25
    if not (tmp_path / "out").exists():
        child = processes.start("train", config, "--resume")
        assert child.wait() == 0, child.said()
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == expected


@pytest.fixture
def interrupted(processes: Nursery, run_config: MakeConfig, tmp_path: Path) -> Path:
    """The config of a run that was stopped with two checkpoints."""
    config = run_config(training={"save_steps": 1, "num_train_epochs": 20})
    child = processes.start("train", config)
    until(lambda: len(checkpoints(tmp_path / "out.partial")) > 1, child)
    child.send(signal.SIGINT)
    assert child.wait() == 130
    assert len(checkpoints(tmp_path / "out.partial")) == 2
    return config


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: [file.unlink() for file in path.iterdir()], "it was not written to its end"),
    "partial": (lambda path: (path / "manifest.json").unlink(), "it was not written to its end"),
    "a file less": (lambda path: (path / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "cut": (lambda path: os.truncate(path / "optimizer.pt", 1000), "optimizer.pt is damaged"),
    "a bit": (lambda path: flip(path / WEIGHTS), f"{WEIGHTS} is damaged"),
    "manifest": (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json does not name"),
    "no JSON": (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is damaged"),
}


def flip(path: Path, place: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(name: str, interrupted: Path, cli: Cli, tmp_path: Path) -> None:
    """Row 50; the older one gives the same adapter."""
    damage, reason = DAMAGES[name]
    newest, older = checkpoints(tmp_path / "out.partial")
    damage(newest)
    ran = cli("train", interrupted, "--resume")
    assert ran.code == 0, ran.err
    assert f"{newest}: passed over: {reason}" in ran.err
    assert f"resuming from step {older.name.split('-')[1]}\n" in ran.err


def test_the_older_checkpoint_gives_the_same_adapter(
    interrupted: Path, cli: Cli, tmp_path: Path, processes: Nursery
) -> None:
    expected = straight(processes, interrupted, tmp_path)
    flip(checkpoints(tmp_path / "out.partial")[0] / WEIGHTS)
    assert cli("train", interrupted, "--resume").code == 0
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == expected


def test_without_a_whole_checkpoint(interrupted: Path, cli: Cli, tmp_path: Path) -> None:
    """Rows 51 and 52: never a silent restart."""
    newest, older = checkpoints(tmp_path / "out.partial")
    (newest / "optimizer.pt").unlink()
    flip(older / "trainer_state.json")
    before = tree(tmp_path / "out.partial")
    ran = cli("train", interrupted, "--resume")
    assert ran.code == 7
    first, second, third = ran.err.splitlines()[-3:]
    assert first == f"error: {newest}: passed over: optimizer.pt is missing"
    assert second == f"error: {older}: passed over: trainer_state.json is damaged"
    assert third.endswith("no whole checkpoint to resume from; start afresh with --overwrite")
    assert tree(tmp_path / "out.partial").items() >= {k: v for k, v in before.items() if k != "lock"}.items()


def test_what_has_changed_since_is_refused(interrupted: Path, cli: Cli, tmp_path: Path, tiny_dir: Path) -> None:
    """Rows 28 and 60."""
    ran = cli("train", interrupted, "--resume", "--set", "lora.r=4", "--set", "training.learning_rate=0.5")
    assert ran.code == 7
    rank, rate = ran.err.splitlines()[-2:]
    assert rank == "error: lora.r: was 8 when the run was interrupted, and is now 4; change it back"
    assert rate.endswith("change it back, or take it on with --allow-change training.learning_rate")
    rows = tmp_path / "rows.jsonl"
    kept = rows.read_text()
    rows.write_text(kept.replace("0 and 0 make", "9 and 9 make"))
    ran = cli("train", interrupted, "--resume")
    assert ran.code == 7 and "data.train: the training rows have changed since the run was interrupted;" in ran.err
    rows.write_text(kept + kept.splitlines()[0] + "\n")
    ran = cli("train", interrupted, "--resume")
    assert ran.code == 7 and "interrupted (40 rows with 695 tokens, now 41 rows with 710 tokens); put" in ran.err
    rows.write_text(kept)
    other = shutil.copytree(tiny_dir, tmp_path / "other")
    ran = cli("train", interrupted, "--resume", "--set", f"model.name_or_path={other}")
    assert ran.code == 7 and "--allow-change model.name_or_path" in ran.err
    sick = tiny_llama()
    sick.model.embed_tokens.weight.data[0, 0] += 1
    sick.save_pretrained(other)
    moved = ("--set", f"model.name_or_path={other}", "--allow-change", "model.name_or_path")
    ran = cli("train", interrupted, "--resume", *moved)
    assert ran.code == 7 and "model.name_or_path: the base model has changed since the run was interrupted" in ran.err
    shutil.rmtree(other)
    shutil.copytree(tiny_dir, other)
    ran = cli("train", interrupted, "--resume", *moved)
    assert ran.code == 0, ran.err


def test_a_changed_validation_set_is_refused(
    processes: Nursery, run_config: MakeConfig, cli: Cli, tmp_path: Path
) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text('{"prompt": "1 and 2 make", "completion": " 3"}\n')
    config = run_config(data={"validation": str(held)}, training=LONG["training"])
    child = processes.start("train", config)
    until(lambda: "step     1/" in child.said(), child)
    child.send(signal.SIGINT)
    assert child.wait() == 130
    held.write_text('{"prompt": "1 and 2 make", "completion": " 4"}\n')
    ran = cli("train", config, "--resume")
    assert ran.code == 7
    assert "data.validation: the validation rows have changed since" in ran.err
    ran = cli("train", config, "--resume", "--allow-change", "data.validation", "--set", "training.num_train_epochs=1")
    assert ran.code == 7 and "training.num_train_epochs: was 500.0" in ran.err


def test_a_change_that_is_allowed_takes_effect(interrupted: Path, cli: Cli, tmp_path: Path) -> None:
    """The next step is taken at the new rate, which the schedule goes on from."""
    step = int(checkpoints(tmp_path / "out.partial")[0].name.split("-")[1])
    arguments = ("--set", "training.learning_rate=0.001", "--allow-change", "training.learning_rate")
    ran = cli("train", interrupted, "--resume", *arguments)
    assert ran.code == 0, ran.err
    assert f"training.learning_rate was 0.01 up to step {step}, and is 0.001 from there" in ran.err
    record = json.loads((tmp_path / "out" / "loratune.json").read_text())
    rates = {entry["step"]: entry["learning_rate"] for entry in record["curve"] if "learning_rate" in entry}
    assert rates[step] == pytest.approx(0.01 * (100 - step + 1) / 100)
    assert rates[step + 1] == pytest.approx(0.001 * (100 - step) / 100)
    assert rates[step + 2] == pytest.approx(0.001 * (100 - step - 1) / 100)
    assert record["changes"] == [{"step": step, "key": "training.learning_rate", "was": 0.01, "is": 0.001}]


EFFECTS: dict[str, tuple[str, Any]] = {
    "training.num_train_epochs": ("21", lambda record: record["metrics"]["steps"] == 21 * 5),
    "training.logging_steps": ("5", lambda record: 7 not in {entry["step"] for entry in record["curve"]}),
    "training.max_grad_norm": ("0.001", None),
    "lora.lora_dropout": ("0.5", None),
}


@pytest.mark.parametrize("key", EFFECTS)
def test_other_changes_take_effect(key: str, interrupted: Path, cli: Cli, tmp_path: Path, processes: Nursery) -> None:
    expected = straight(processes, interrupted, tmp_path)
    value, seen = EFFECTS[key]
    for path in checkpoints(tmp_path / "out.partial"):
        assert int(path.name.split("-")[1]) < 7
    ran = cli("train", interrupted, "--resume", "--set", f"{key}={value}", "--allow-change", key)
    assert ran.code == 0, ran.err
    if seen:
        assert seen(json.loads((tmp_path / "out" / "loratune.json").read_text()))
    else:
        assert (tmp_path / "out" / WEIGHTS).read_bytes() != expected


def test_changes_that_cannot_take_effect(interrupted: Path, cli: Cli, run_config: MakeConfig) -> None:
    ran = cli("train", interrupted, "--resume", "--set", "lora.r=4", "--allow-change", "lora.r")
    assert ran.code == 7
    assert (
        "error: --allow-change lora.r: cannot take effect in a run that goes on; leave it out; these can: " in ran.err
    )
    ran = cli("train", run_config(output_dir="new"), "--allow-change", "training.learning_rate")
    assert (ran.code, ran.err) == (2, "error: --allow-change: a run that starts takes every value as it is\n")


# Signals


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_in_a_step(
    number: signal.Signals, code: int, word: str, processes: Nursery, run_config: MakeConfig, tmp_path: Path
) -> None:
    """Rows 46 and 48: the step is finished and kept, and the way to go on is one line."""
    config = run_config(**LONG)
    child = processes.start("train", config, "--set", "training.num_train_epochs=30")
    until(lambda: "step     3/" in child.said(), child)
    child.send(number)
    assert child.wait() == code
    *told, last = child.said().splitlines()
    assert "stopping after this step; once more stops at once" in told
    line = f"loratune train {config} --set training.num_train_epochs=30 --resume"
    assert last == f"error: {word}; continue with: {line}"
    assert len(checkpoints(tmp_path / "out.partial")) == 1 and not (tmp_path / "out").exists()
    child = processes.start(*line.split()[1:])
    assert child.wait() == 0, child.said()


def test_a_signal_in_an_evaluation(processes: Nursery, run_config: MakeConfig, tmp_path: Path) -> None:
    """It is left at the next batch, and the step before it is kept."""
    held = tmp_path / "held.jsonl"
    held.write_text('{"prompt": "1 and 2 make", "completion": " 3"}\n' * 30_000)
    training = {"eval_steps": 1, "save_steps": 1000}
    child = processes.start("train", run_config(data={"validation": str(held)}, training=training))
    until(lambda: "step     1/" in child.said(), child)
    time.sleep(0.3)
    child.send(signal.SIGINT)
    assert child.wait() == 130
    assert "held-out loss" not in child.said()
    assert [path.name for path in checkpoints(tmp_path / "out.partial")] == ["checkpoint-1"]


def test_a_second_signal_stops_at_once(processes: Nursery, run_config: MakeConfig, tmp_path: Path) -> None:
    """Row 47: in a step of 4,000 batches, which lasts for many seconds; the first signal alone does not end it."""
    rows = tmp_path / "many.jsonl"
    rows.write_text('{"prompt": "1 and 2 make", "completion": " 3"}\n' * 4_000)
    training = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4_000}
    child = processes.start("train", run_config(data={"train": str(rows)}, training=training))
    until(lambda: "trainable params" in child.said(), child)
    time.sleep(1)
    child.send(signal.SIGINT)
    until(lambda: "stopping after this step; once more stops at once" in child.said(), child)
    time.sleep(1)
    assert child.poll() is None and "step     1/" not in child.said()
    child.send(signal.SIGINT)
    assert child.wait() == 130
    assert "step     1/" not in child.said() and not (tmp_path / "out.partial").exists()


def test_a_signal_during_a_save(processes: Nursery, run_config: MakeConfig, tmp_path: Path) -> None:
    """Row 47: two signals while a checkpoint is written leave the last one whole, and nothing half written."""
    config = run_config(training={"num_train_epochs": 500, "save_steps": 1})
    child = processes.start("train", config)
    unfinished = tmp_path / "out.partial" / "checkpoints" / "unfinished"
    until(lambda: checkpoints(tmp_path / "out.partial"), child)
    until(unfinished.exists, child, 0)
    child.send(signal.SIGINT)
    child.send(signal.SIGINT)
    assert child.wait() == 130, child.said()
    assert not unfinished.exists()
    assert all((path / "manifest.json").exists() for path in checkpoints(tmp_path / "out.partial"))


def heeds(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def test_sigterm_while_rows_are_read(run_config: MakeConfig, tmp_path: Path, processes: Nursery) -> None:
    """Row 48: nothing is left where there is nothing to go on from."""
    rows = tmp_path / "many.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 2_000_000)
    before = {path.name for path in tmp_path.iterdir()}
    child = processes.start("train", run_config(data={"train": str(rows)}))
    until(lambda: heeds(child.pid, signal.SIGTERM), child)
    time.sleep(0.3)
    child.send(signal.SIGTERM)
    assert child.wait() == 143
    assert child.said().splitlines()[-1].startswith("error: terminated")
    assert {path.name for path in tmp_path.iterdir()} - before <= {"run.yaml", "rows.jsonl"}


def test_sigterm_while_the_model_is_loaded(run_config: MakeConfig, tmp_path: Path, smollm2: Path) -> None:
    """Row 48, in a process of its own: importing and loading take seconds."""
    config = run_config(model={"name_or_path": str(smollm2)})
    running = subprocess.Popen([sys.executable, "-m", "loratune", "train", config], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out.partial").exists():
        assert running.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    running.terminate()
    said = running.communicate()[1]
    assert running.returncode == 143 and said.splitlines()[-1].startswith("error: terminated"), said
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists()


def test_a_signal_whose_exception_python_drops(capfd: pytest.CaptureFixture[str]) -> None:
    """It comes while a destructor runs; the run hears of it before its first step."""

    class Dropped:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    with interrupts.terminable():
        Dropped()
        with interrupts.deferred(print) as stop:
            assert stop.asked is interrupts.Termination
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "Exception ignored" not in capfd.readouterr().err


# Locks


def test_two_runs_on_one_directory(processes: Nursery, run_config: MakeConfig, tmp_path: Path, cli: Cli) -> None:
    """Row 57; the lock of a process that was killed is taken over."""
    config = run_config(training={"num_train_epochs": 500, "save_steps": 1})
    child = processes.start("train", config)
    until(lambda: checkpoints(tmp_path / "out.partial"), child)
    for arguments in ((), ("--overwrite",), ("--resume",), ("--dry-run",)):
        ran = cli("train", config, *arguments)
        assert ran.code == 9
        assert ran.err.endswith(
            f"working there (process {child.pid} on {os.uname().nodename}); wait for it, or choose another\n"
        )
    child.send(signal.SIGKILL)
    child.wait()
    assert (tmp_path / "out.partial" / "lock").exists()
    ran = cli("train", config, "--overwrite", "--set", "training.num_train_epochs=1")
    assert ran.code == 0, ran.err


# Disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, left: int) -> None:
    """Take all of a disk but so many bytes."""
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(bytes(max(0, free - left)))


def test_a_disk_that_is_full_at_a_checkpoint(
    disk: Path, processes: Nursery, run_config: MakeConfig, tmp_path: Path
) -> None:
    """Row 53: the checkpoint before it stays, what was half written goes; with room the run goes on to the same end."""
    config = run_config(output_dir=str(disk / "out"), training={"num_train_epochs": 20, "save_steps": 1})
    expected = straight(processes, config, tmp_path)
    child = processes.start("train", config)
    until(lambda: len(checkpoints(disk / "out.partial")) > 1, child)
    child.send(signal.SIGSTOP)
    fill(disk, 20_000)
    child.send(signal.SIGCONT)
    assert child.wait() == 8, child.said()
    assert (
        "no room for a checkpoint: it takes " in child.said() and "make room, and go on with --resume" in child.said()
    )
    assert checkpoints(disk / "out.partial") and not (disk / "out.partial" / "checkpoints" / "unfinished").exists()
    (disk / "ballast").unlink()
    child = processes.start("train", config, "--resume")
    assert child.wait() == 0, child.said()
    assert (disk / "out" / WEIGHTS).read_bytes() == expected


def test_a_disk_that_is_full_at_the_end(disk: Path, processes: Nursery, run_config: MakeConfig, tmp_path: Path) -> None:
    """Row 54: the last step is kept as a checkpoint, so that only the publishing has to be done again."""
    config = run_config(output_dir=str(disk / "out"), training={"num_train_epochs": 20, "save_steps": 1000})
    expected = straight(processes, config, tmp_path)
    child = processes.start("train", config)
    until(lambda: checkpoints(disk / "out.partial"), child, 0)
    child.send(signal.SIGSTOP)
    fill(disk, 8_000)
    child.send(signal.SIGCONT)
    assert child.wait() == 8, child.said()
    assert "no room for the adapter: it takes " in child.said()
    assert not (disk / "out").exists()
    assert [path.name for path in checkpoints(disk / "out.partial")] == ["checkpoint-100"]
    (disk / "ballast").unlink()
    child = processes.start("train", config, "--resume")
    assert child.wait() == 0, child.said()
    assert (disk / "out" / WEIGHTS).read_bytes() == expected


def test_a_disk_that_is_too_small_from_the_start(disk: Path, run_config: MakeConfig, cli: Cli) -> None:
    fill(disk, 50_000)
    ran = cli("train", run_config(output_dir=str(disk / "out")))
    assert ran.code == 8
    assert "checkpoints and adapter take " in ran.err and "make room, or choose another disk" in ran.err
    assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_files_that_may_not_grow(processes: Nursery, run_config: MakeConfig, tmp_path: Path) -> None:
    """A quota, in place of a disk that cannot be mounted."""
    child = processes.start("train", run_config(training={"save_steps": 1}), limit=30_000)
    assert child.wait() == 8, child.said()
    assert "no room for a checkpoint" in child.said()
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


# Memory


def test_memory_that_is_short_shows_at_once(
    run_config: MakeConfig, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Row 63: one long row among short ones asks for more than there is, at the first step, whenever its turn is."""
    tiny_llama(max_position_embeddings=8192, hidden_size=256, intermediate_size=1024).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    rows = [{"prompt": "a", "completion": "b"}] * 200 + [{"prompt": "a " * 4000, "completion": "b"}]
    (tmp_path / "uneven.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = run_config(
        model={"name_or_path": str(tmp_path / "wide")},
        data={"train": str(tmp_path / "uneven.jsonl"), "max_length": 8192},
        training={"per_device_train_batch_size": 8},
    )
    done = starved(config)
    assert done.returncode == 8, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: out of memory at step 1, on a batch of 8 x 80"), line
    assert (
        "; set data.max_length: 4001 (saves about " in line
        and "training.activation_checkpointing: true (saves about " in line
    )
    assert "training.per_device_train_batch_size: 4 with training.gradient_accumulation_steps: 2 (saves" in line
    assert not (tmp_path / "out.partial").exists()


def test_memory_that_is_short_for_an_evaluation(
    run_config: MakeConfig, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """It shows before the first step too, and is not blamed on a batch of training."""
    tiny_llama(max_position_embeddings=8192, hidden_size=256, intermediate_size=1024).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    rows = [{"prompt": "a " * 4000, "completion": "b"}] * 8
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"validation": str(tmp_path / "long.jsonl"), "max_length": 8192}
    done = starved(run_config(model={"name_or_path": str(tmp_path / "wide")}, data=data))
    assert done.returncode == 8, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: out of memory in the evaluation after step 0, on a batch of 8 x 80"), line
    assert "lower training.per_device_train_batch_size, which evaluations use too" in line


def starved(config: Path) -> "subprocess.CompletedProcess[str]":
    """A run that may take 1 GiB beyond what its imports take."""
    code = (
        "import resource, sys, loratune.train, loratune.show\n"
        "from loratune.cli import main\n"
        "held = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 30), resource.RLIM_INFINITY))\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, "train", str(config)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# Numbers


def test_a_held_out_loss_that_is_not_finite(run_config: MakeConfig, cli: Cli, tmp_path: Path) -> None:
    """Weights that are finite, and overflow where only a row of the validation set leads."""
    config = run_config(data={"validation": 0.2}, training={"learning_rate": 1e30, "max_steps": 1, "eval_steps": 1})
    ran = cli("train", config)
    assert ran.code == 6
    assert "error: data.validation: the held-out loss after step 1 is nan; lower training.learning_rate" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_poisoned_checkpoint_goes(run_config: MakeConfig, cli: Cli, tmp_path: Path) -> None:
    """Its weights give NaN at the next step; the one before it stays, and the message leads on from it."""
    config = run_config(training={"learning_rate": 1e30, "save_steps": 1, "warmup_steps": 2})
    ran = cli("train", config)
    assert ran.code == 6
    assert "; step 1 is kept: --resume with --allow-change training.learning_rate, or --overwrite" in ran.err
    assert [path.name for path in checkpoints(tmp_path / "out.partial")] == ["checkpoint-1"]
    mended = ("--resume", "--allow-change", "training.learning_rate", "--set", "training.learning_rate=0.01")
    ran = cli("train", config, *mended)
    assert ran.code == 0, ran.err
    assert "**Changed on the way:** training.learning_rate was 1e+30 up to step 1" in (
        (tmp_path / "out" / "README.md").read_text()
    )
    config = run_config(training={"learning_rate": 1e30, "save_steps": 1}, output_dir=str(tmp_path / "other"))
    assert cli("train", config).code == 6
    assert not (tmp_path / "other.partial").exists()


# What others do meanwhile


def test_what_appears_at_the_output_is_left_alone(
    processes: Nursery, run_config: MakeConfig, tmp_path: Path, cli: Cli
) -> None:
    """The last step, in the middle of an epoch, is kept, so that only the publishing is done again."""
    config = run_config(training={"max_steps": 203})
    expected = straight(processes, config, tmp_path)
    child = processes.start("train", config)
    until(lambda: "step     1/" in child.said(), child)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert child.wait() == 2
    assert "has appeared since the run began, and is left alone; move it away, and go on with --resume" in child.said()
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert cli("train", config, "--resume").code == 0
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == expected
    assert json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]["steps"] == 203


def test_an_overwrite_that_fails_keeps_the_interrupted_run(interrupted: Path, cli: Cli, tmp_path: Path) -> None:
    before = [path.name for path in checkpoints(tmp_path / "out.partial")]
    ran = cli("train", interrupted, "--overwrite", "--set", "lora.target_modules=[bogus]")
    assert ran.code == 3
    assert [path.name for path in checkpoints(tmp_path / "out.partial")] == before
    assert cli("train", interrupted, "--resume").code == 0


def test_fewer_steps_than_were_taken_are_refused(interrupted: Path, cli: Cli) -> None:
    allowed = ("--resume", "--allow-change", "training.num_train_epochs", "--set", "training.num_train_epochs=0.2")
    ran = cli("train", interrupted, *allowed)
    assert ran.code == 7
    assert "error: training: the run has taken " in ran.err and " steps, and is to take 1; ask for more" in ran.err


def test_a_finished_run_that_was_not_cleared_away(run_config: MakeConfig, cli: Cli, tmp_path: Path) -> None:
    """Killed between the last two steps of publishing."""
    config = run_config()
    assert cli("train", config).code == 0
    (tmp_path / "out.partial" / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    for arguments in ((), ("--resume",)):
        ran = cli("train", config, *arguments)
        assert ran.code == 2
        assert "already exists; if it is what you want, the run had ended: remove out.partial;" in ran.err
    assert cli("train", config, "--overwrite").code == 0


# Durability: no power can be cut here, so the calls are looked at, which the kernel keeps to


def test_everything_is_flushed_before_a_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    flush, move = os.fsync, Path.rename

    def fsync(handle: int) -> None:
        calls.append(os.readlink(f"/proc/self/fd/{handle}"))
        flush(handle)

    def rename(path: Path, target: Path) -> Path:
        calls.append(f"{path} -> {target}")
        return move(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    kept = Checkpoints(tmp_path, {"x": 1}, 0)
    with kept.writing(3):
        written = kept.unfinished / "checkpoint-3"
        written.mkdir(parents=True)
        (written / "optimizer.pt").write_bytes(b"x")
    names = ["optimizer.pt", "run.json", "manifest.json"]
    moved = f"{written} -> {tmp_path / 'checkpoint-3'}"
    assert calls == [*(str(written / name) for name in names), str(written), moved, str(tmp_path)]


def test_a_damaged_checkpoint_does_not_count_when_old_ones_go(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, {}, 0)
    for step in (1, 2, 9):
        with kept.writing(step):
            for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
                (kept.unfinished / f"checkpoint-{step}").mkdir(parents=True, exist_ok=True)
                (kept.unfinished / f"checkpoint-{step}" / name).write_bytes(b"x")
            (kept.unfinished / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        if step == 9:
            (tmp_path / "checkpoint-9" / "optimizer.pt").write_bytes(b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-9"]
    with kept.writing(3):
        (kept.unfinished / "checkpoint-3").mkdir(parents=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
