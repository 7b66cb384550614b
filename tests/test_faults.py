"""Failures during a run: real processes, signals and full disks."""

import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from conftest import Process, check_refused, config_in, is_problem, mainly, problem_text, run_command, tiny_llama
from fork_server import ForkServer
from running import LONG, WEIGHTS, Cli, MakeConfig, checkpoints, handles, run_record, straight, until
from transformers import PreTrainedTokenizerFast

from loratune.cli.boundary import boundary
from loratune.codes import Code
from loratune.system import signals
from loratune.system.signals import Stop
from loratune.training.checkpoints.store import Checkpoints
from loratune.training.processes import SharedStop

# Signals


ENDING = [
    (signal.SIGINT, 130, "interrupted"),
    (signal.SIGTERM, 143, "terminated"),
    (signal.SIGHUP, 143, "terminated"),
    (signal.SIGUSR1, 143, "terminated"),
    (signal.SIGUSR2, 143, "terminated"),
    (signal.SIGXCPU, 143, "terminated"),
]
SOME = [
    one if one[0] in (signal.SIGINT, signal.SIGHUP) else pytest.param(*one, marks=pytest.mark.slow) for one in ENDING
]
"""One of each kind is always run: signals whose repetition stops at once, and signals that are sent repeatedly."""


@pytest.mark.parametrize(("number", "code", "word"), SOME)
def test_a_signal_during_a_step(
    number: signal.Signals, code: int, word: str, processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    """The step is completed and saved, and one line says how to continue."""
    config = run_config(**LONG)
    child = processes.start("train", config, "--set", "training.num_train_epochs=12")
    until(lambda: "step     3/" in child.said(), child)
    child.send(number)
    assert child.wait() == code
    *lines, last = child.said().splitlines()
    insistent = number in (signal.SIGINT, signal.SIGTERM)
    assert f"stopping after this step{'; once more stops at once' if insistent else ''}" in lines
    line = f"loratune train {config} --set training.num_train_epochs=12 --resume"
    assert last == f"error: {word}; continue with: {line}"
    assert len(checkpoints(tmp_path / "out.partial")) == 1 and not (tmp_path / "out").exists()
    if number is signal.SIGINT:
        child = processes.start(*line.split()[1:])
        assert child.wait() == 0, child.said()


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A named pipe that holds 4 KiB, and its end for reading."""
    path = tmp_path / "stderr"
    os.mkfifo(path)
    end = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(end, True)
    fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 4096)
    yield path, end
    os.close(end)


@pytest.mark.parametrize("endings", [ENDING[:1], pytest.param(ENDING * 2, marks=pytest.mark.slow)], ids=["one", "all"])
def test_a_signal_while_a_line_is_written(
    endings: list[tuple[signal.Signals, int, str]],
    pipe: tuple[Path, int],
    processes: ForkServer,
    run_config: MakeConfig,
    tmp_path: Path,
) -> None:
    """The reader of stderr sends the signal as soon as it has a line, so the program is in the middle of a write."""
    config = run_config(training={"num_train_epochs": 500, "save_steps": 1000})
    for number, code, _ in endings:
        child = processes.start("train", config, "--overwrite", stderr=pipe[0])
        said = b""
        while b"step     3/" not in said:
            assert child.poll() is None, said.decode()
            said += os.read(pipe[1], 4096)
        child.send(number)
        while child.poll() is None:
            said += os.read(pipe[1], 4096) if select.select([pipe[1]], [], [], 0.05)[0] else b""
        *lines, last = (said + left(pipe[1])).decode().splitlines()
        assert child.code == code, lines
        steps = [int(line.split("/")[0].removeprefix("step ")) for line in lines if line.startswith("step ")]
        assert steps == list(range(1, len(steps) + 1))
        assert [path.name for path in checkpoints(tmp_path / "out.partial")] == [f"checkpoint-{steps[-1]}"]
        assert sum("stopping after this step" in line for line in lines) == 1 and last.startswith("error")


def left(end: int) -> bytes:
    """The remaining content of a pipe whose writers have exited."""
    parts = []
    while select.select([end], [], [], 0)[0] and (part := os.read(end, 4096)):
        parts.append(part)
    return b"".join(parts)


AFTER_LAST_STEP = """
import pathlib, shutil, signal
from loratune.training import trainer

fit = trainer.fit
def fit_and(*arguments, **keywords):
    outcome = fit(*arguments, **keywords)
    {statement}
    return outcome

trainer.fit = fit_and
"""
IN_FIRST_STEP = """
import signal
from loratune.training.trainer import RunTrainer

waiting = {numbers}
prepare = RunTrainer._prepare_inputs
def prepare_and_be_stopped(*arguments):
    for number in waiting.pop(0) if waiting else []:
        signal.raise_signal(number)
    return prepare(*arguments)

RunTrainer._prepare_inputs = prepare_and_be_stopped
"""
"""Signals that arrive at the first batch, the second and so on."""
LONG_STEP = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}


def test_a_signal_after_the_last_check_of_the_trainer(
    processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    """The trainer has taken all of its steps. The run ends as it has reported, and nothing is published."""
    child = processes.start(
        "train", run_config(), first=AFTER_LAST_STEP.format(statement="signal.raise_signal(signal.SIGTERM)")
    )
    assert child.wait() == 143, child.said()
    assert "stopping after this step" in child.said() and "error: terminated; continue with: " in child.said()
    assert len(checkpoints(tmp_path / "out.partial")) == 1 and not (tmp_path / "out").exists()


BEFORE_CALL = """
import signal
from loratune.cli import training
from loratune.system.output_dir import OutputDirectory

unchanged = {owner}.{name}
def signalled(*arguments, **named):
    signal.raise_signal(signal.SIGTERM)
    return unchanged(*arguments, **named)

{owner}.{name} = signalled
"""


@pytest.mark.parametrize("replaces", mainly([True], [False, True]), ids=["new", "replacing"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [("OutputDirectory", "_take_place"), ("OutputDirectory", "_remove_work"), ("training", "_show_adapter")],
)
def test_a_signal_while_the_adapter_takes_its_place(
    owner: str, name: str, replaces: bool, run_config: MakeConfig, tmp_path: Path, processes: ForkServer, cli: Cli
) -> None:
    """What is begun is done: a run that left half its work would say `--resume`, and then refuse it."""
    config = run_config(training={"max_steps": 2, "save_steps": 1})
    if replaces:
        assert cli("train", config, "--set", "training.max_steps=1").code == 0
    options = ["--overwrite"][: int(replaces)]
    child = processes.start("train", config, *options, first=BEFORE_CALL.format(owner=owner, name=name))
    assert child.wait() == 143
    assert f"error: terminated; {tmp_path / 'out'} is finished and whole" in child.said()
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]
    assert json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]["steps"] == 2
    assert cli("generate", "--adapter", tmp_path / "out", "--max-new-tokens", 1, "3 and 3 make").code == 0


def test_a_second_signal_stops_immediately(processes: ForkServer, run_config: MakeConfig, tmp_path: Path) -> None:
    """In a step of eight batches, which the first signal alone does not interrupt."""
    first = IN_FIRST_STEP.format(numbers=[[], [int(signal.SIGINT)], [], [int(signal.SIGINT)]])
    child = processes.start("train", run_config(training=LONG_STEP), first=first)
    assert child.wait() == 130
    assert "stopping after this step; once more stops at once" in child.said()
    assert "step     1/" not in child.said() and not (tmp_path / "out.partial").exists()
    first = IN_FIRST_STEP.format(numbers=[[], [int(signal.SIGINT)], []])
    child = processes.start("train", run_config(training=LONG_STEP), first=first)
    assert child.wait() == 130 and "step     1/" in child.said()


def test_a_signal_during_a_save(processes: ForkServer, run_config: MakeConfig, tmp_path: Path) -> None:
    """After two signals while a checkpoint is written, the previous one is intact, and no partial one remains."""
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


@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGHUP, signal.SIGHUP, signal.SIGCONT],
        [signal.SIGUSR1, signal.SIGTERM, signal.SIGCONT],
        pytest.param([signal.SIGXCPU, signal.SIGXCPU, signal.SIGXCPU], marks=pytest.mark.slow),
    ],
    ids=["SIGHUP", "SIGTERM", "SIGXCPU"],
)
def test_signals_that_are_sent_several_times(
    numbers: list[signal.Signals], processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    """SIGHUP from both shell and kernel, and SIGTERM with SIGCONT after SIGUSR1, as SLURM sends them."""
    first = IN_FIRST_STEP.format(numbers=[[], [int(number) for number in numbers]])
    child = processes.start("train", run_config(training=LONG_STEP), first=first)
    assert child.wait() == 143
    assert child.said().splitlines()[-1].startswith("error: terminated; continue with: ")
    assert [path.name for path in checkpoints(tmp_path / "out.partial")] == ["checkpoint-1"]


def test_an_ignored_signal_stays_ignored(run_config: MakeConfig, tmp_path: Path, processes: ForkServer) -> None:
    """As with nohup, which ignores SIGHUP for the program that it starts."""
    child = processes.start("train", run_config(training={"num_train_epochs": 4}), ignored=signal.SIGHUP)
    until(lambda: not handles(child, signal.SIGHUP) and handles(child, signal.SIGTERM), child)
    while not (tmp_path / "out.partial").exists():
        assert child.poll() is None
        child.send(signal.SIGHUP)
        time.sleep(0.02)
    child.send(signal.SIGHUP)
    assert child.wait() == 0 and (tmp_path / "out" / WEIGHTS).is_file(), child.said()


@pytest.mark.parametrize(("number", "code", "word"), SOME)
@pytest.mark.parametrize("pauses", [(0.0, 0.08), pytest.param((0.02, 0.05, 0.12, 0.2), marks=pytest.mark.slow)])
@pytest.mark.parametrize("arguments", [["params", "--model", "/no/such"], ["train", "no.yaml"]], ids=lambda one: one[0])
def test_a_signal_during_startup(
    pauses: tuple[float, ...], arguments: list[str], number: signal.Signals, code: int, word: str
) -> None:
    """As soon as there are handlers, while the command line is imported and parsed: exit code and message."""
    for pause in pauses:
        command = [sys.executable, "-m", "loratune", *arguments]
        child = Process(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while child.poll() is None and not handles(child, signal.SIGUSR2):
            time.sleep(0.001)
        time.sleep(pause)
        child.send_signal(number)
        said = child.communicate()[1].splitlines()[-1]
        assert (child.returncode, said) == (code, f"error: {word}") or (child.returncode in (2, 3) and pause), said


def test_a_signal_that_a_library_turns_into_another_error(capsys: pytest.CaptureFixture[str]) -> None:
    """transformers turns an exception raised during its imports into the error of a missing module."""
    with pytest.raises(typer.Exit) as caught, boundary(debug=False):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from error
    assert caught.value.exit_code == 143
    assert capsys.readouterr().err == "error: terminated\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_while_rows_are_read(run_config: MakeConfig, tmp_path: Path, processes: ForkServer) -> None:
    """No files remain if there is nothing to continue from."""
    rows = tmp_path / "many.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 50_000)
    before = {path.name for path in tmp_path.iterdir()}
    child = processes.start("train", run_config(data={"train": str(rows)}))
    until(lambda: (tmp_path / "out.partial").exists() or "rows" in child.said(), child)
    time.sleep(0.1)
    child.send(signal.SIGTERM)
    assert child.wait() == 143
    assert child.said().splitlines()[-1].startswith("error: terminated")
    assert {path.name for path in tmp_path.iterdir()} - before <= {"run.yaml", "rows.jsonl"}


WHILE_LOADING = """
import os, signal, threading
from transformers import AutoModelForCausalLM as Auto
load = Auto.from_pretrained
def interrupted(*arguments, **keywords):
    {}
    return load(*arguments, **keywords)
Auto.from_pretrained = interrupted
"""


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        ("tiny_dir", "signal.raise_signal(signal.SIGTERM)"),
        pytest.param(  # which takes seconds to load
            "smollm2", "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()",
            marks=[pytest.mark.slow, pytest.mark.real_model],
        ),
    ],
)  # fmt: skip
def test_sigterm_while_the_model_is_loaded(
    name: str,
    statement: str,
    run_config: MakeConfig,
    tmp_path: Path,
    processes: ForkServer,
    request: pytest.FixtureRequest,
) -> None:
    config = run_config(model={"name_or_path": str(request.getfixturevalue(name))})
    running = processes.start("train", config, first=WHILE_LOADING.format(statement))
    assert running.wait() == 143 and running.said().splitlines()[-1].startswith("error: terminated"), running.said()
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists(), running.said()


SIGNAL_AFTER = """
import os, signal
from loratune.training.checkpoints.run_dir import RunDirectory
original = RunDirectory.{name}
def {name}(self, *arguments, **keywords):
    original(self, *arguments, **keywords)
    {statement}
RunDirectory.{name} = {name}
"""
TO_ITSELF = "os.kill(os.getpid(), signal.SIGTERM)"
IN_DESTRUCTOR = f"type('Dropped', (), {{'__del__': lambda self: {TO_ITSELF}}})()"


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        pytest.param("_check_partial", f"if self.partial.is_dir(): {TO_ITSELF}", id="before the lock is taken"),
        pytest.param("prepare", TO_ITSELF, id="before the first step"),
        pytest.param("prepare", IN_DESTRUCTOR, id="in a destructor"),
    ],
)
def test_sigterm_before_the_first_step(
    name: str, statement: str, run_config: MakeConfig, tmp_path: Path, processes: ForkServer
) -> None:
    """No step is taken, and no files remain if there is nothing to continue from."""
    child = processes.start("train", run_config(), first=SIGNAL_AFTER.format(name=name, statement=statement))
    assert child.wait() == 143 and child.said().splitlines()[-1].startswith("error: terminated"), child.said()
    assert "step " not in child.said()
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists(), child.said()


def test_training_in_another_thread_leaves_signals_alone() -> None:
    """Python sets no signal handlers there, as in a program that trains in a separate thread."""
    before, seen = signal.getsignal(signal.SIGINT), list[object]()

    def work() -> None:
        with signals.raise_on_signals(), signals.defer_signals(print) as stop, signals.default_actions():
            seen.extend([stop.requested, signal.getsignal(signal.SIGINT)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert seen == [None, before]


def test_a_signal_whose_exception_python_discards(capfd: pytest.CaptureFixture[str]) -> None:
    """It arrives while a destructor runs; the run notices it before its first step."""

    class Dropped:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    with signals.raise_on_signals():
        Dropped()
        with signals.defer_signals(print) as stop:
            assert stop.requested is signals.Termination
        with pytest.raises(signals.Termination):
            signal.raise_signal(signal.SIGTERM)
    assert "Exception ignored" not in capfd.readouterr().err


def test_a_signal_while_processes_agree_is_not_lost() -> None:
    """It arrives after a process has told the others that it was not asked to stop."""
    stop = Stop()

    class Late:
        def total(self, values: list[float]) -> list[float]:
            stop.requested = signals.Termination
            return values

    shared = SharedStop(stop, Late())  # type: ignore[arg-type]
    assert not shared.is_requested() and stop.requested is signals.Termination
    assert shared.is_requested()
    with pytest.raises(signals.Termination):
        shared.check()


# Locks


def test_two_runs_in_one_directory(processes: ForkServer, run_config: MakeConfig, tmp_path: Path, cli: Cli) -> None:
    """The lock of a killed process is taken over."""
    config = run_config(training={"num_train_epochs": 500, "save_steps": 1})
    child = processes.start("train", config)
    until(lambda: checkpoints(tmp_path / "out.partial"), child)
    for arguments in ((), ("--overwrite",), ("--resume",), ("--dry-run",)):
        ran = cli("train", config, *arguments)
        check_refused(ran, 9, (Code.SYSTEM_LOCKED, str(tmp_path / "out"), "output_dir"))
        assert f"(process {child.pid} on {os.uname().nodename})" in ran.errors[0]
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
    done = run_command(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.decode().strip()}")
    yield place
    run_command(["umount", "--lazy", str(place)], check=True)


STEPS = 28  # in the middle of an epoch


@pytest.fixture(scope="module")
def undisturbed(processes: ForkServer, tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> bytes:
    """The adapter of an uninterrupted run of this number of steps."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return straight(processes, config_in(folder, tiny_dir)(training={"max_steps": STEPS}), folder)


def fill(disk: Path, left: int) -> None:
    """Use all of a disk except this number of bytes."""
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(bytes(max(0, free - left)))


def test_a_full_disk_at_a_checkpoint(
    disk: Path, processes: ForkServer, run_config: MakeConfig, undisturbed: bytes
) -> None:
    """The previous checkpoint is kept, and the partial one is removed. Once there is room, the run continues to the
    same result."""
    config = run_config(output_dir=str(disk / "out"), training={"max_steps": STEPS, "save_steps": 1})
    child = processes.start("train", config)
    until(lambda: len(checkpoints(disk / "out.partial")) > 1, child)
    child.send(signal.SIGSTOP)
    fill(disk, 20_000)
    child.send(signal.SIGCONT)
    assert child.wait() == 8, child.said()
    assert (
        f"error[{Code.SYSTEM_DISK_FULL}]: " in child.said()
        and "; make room, and continue with --resume" in child.said()
    )
    assert "no room for a checkpoint: it takes " in child.said()
    assert checkpoints(disk / "out.partial") and not (disk / "out.partial" / "checkpoints" / "unfinished").exists()
    (disk / "ballast").unlink()
    child = processes.start("train", config, "--resume")
    assert child.wait() == 0, child.said()
    assert (disk / "out" / WEIGHTS).read_bytes() == undisturbed


def test_a_full_disk_at_the_end(disk: Path, processes: ForkServer, run_config: MakeConfig, undisturbed: bytes) -> None:
    """The last step is saved as a checkpoint, so only publishing has to be repeated."""
    config = run_config(output_dir=str(disk / "out"), training={"max_steps": STEPS, "save_steps": 1000})
    ballast = disk / "ballast"
    statement = f"pathlib.Path('{ballast}').write_bytes(bytes(shutil.disk_usage('{disk}').free - 8_000))"
    child = processes.start("train", config, first=AFTER_LAST_STEP.format(statement=statement))
    assert child.wait() == 8, child.said()
    assert "no room for the adapter directory: it takes " in child.said()
    assert not (disk / "out").exists()
    assert [path.name for path in checkpoints(disk / "out.partial")] == [f"checkpoint-{STEPS}"]
    (disk / "ballast").unlink()
    child = processes.start("train", config, "--resume")
    assert child.wait() == 0, child.said()
    assert (disk / "out" / WEIGHTS).read_bytes() == undisturbed


def test_a_disk_that_is_too_small_is_reported_before_training(disk: Path, run_config: MakeConfig, cli: Cli) -> None:
    fill(disk, 180_000)  # three checkpoints take 150 kB, and the tokenizer about the same
    ran = cli("train", run_config(output_dir=str(disk / "out")))
    check_refused(ran, 8, (Code.SYSTEM_DISK_FULL, str(disk / "out.partial"), "output_dir"))
    assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_a_file_size_limit_is_reported_as_lack_of_room(
    processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    """A limit, as a small disk cannot be mounted everywhere."""
    child = processes.start("train", run_config(training={"save_steps": 1}), limit=30_000)
    assert child.wait() == 8, child.said()
    assert "no room for a checkpoint" in child.said()
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


# Memory


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model whose activations need much memory."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_llama(max_position_embeddings=8192, hidden_size=64, intermediate_size=16384).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_insufficient_memory_is_detected_at_the_first_step(
    run_config: MakeConfig, tmp_path: Path, wide: Path, forked: Cli
) -> None:
    """One long row among short ones needs too much memory. That is detected at the first step, wherever the row is."""
    rows = [{"prompt": "a", "completion": "b"}] * 200 + [{"prompt": "a " * 2000, "completion": "b"}]
    (tmp_path / "uneven.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = run_config(
        model={"name_or_path": str(wide)},
        data={"train": str(tmp_path / "uneven.jsonl"), "max_length": 8192, "packing": "none"},
        training={"per_device_train_batch_size": 8},
    )
    done = forked("train", config, memory=3 << 28)
    assert done.code == 8, done.err
    line = done.err.splitlines()[-1]
    assert is_problem(problem_text(line), (Code.SYSTEM_OUT_OF_MEMORY, "", "")), line
    assert problem_text(line).startswith("out of memory at step 1, on a batch of 8 x 40"), line
    assert (
        " data.max_length: 2001 (saves about " in line
        and "training.activation_checkpointing: true (saves about " in line
    )
    assert "training.per_device_train_batch_size: 4 with training.gradient_accumulation_steps: 2 (saves" in line
    assert not (tmp_path / "out.partial").exists()


def test_insufficient_memory_for_an_evaluation_is_detected(
    run_config: MakeConfig, tmp_path: Path, wide: Path, forked: Cli
) -> None:
    """Also before the first step, and it is not attributed to a training batch."""
    rows = [{"prompt": "a " * 4000, "completion": "b"}] * 8
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"validation": str(tmp_path / "long.jsonl"), "max_length": 8192, "packing": "none"}
    done = forked("train", run_config(model={"name_or_path": str(wide)}, data=data), memory=3 << 28)
    assert done.code == 8, done.err
    line = done.err.splitlines()[-1]
    assert is_problem(problem_text(line), (Code.SYSTEM_OUT_OF_MEMORY, "", "")), line
    assert problem_text(line).startswith("out of memory in the evaluation after step 0, on a batch of 1 x 80"), line
    assert "lower data.max_length" in line


# Numbers


def test_a_nonfinite_held_out_loss(run_config: MakeConfig, cli: Cli, tmp_path: Path) -> None:
    """The weights are finite, and only a row of the validation set causes an overflow."""
    config = run_config(data={"validation": 0.2}, training={"learning_rate": 1e30, "max_steps": 1, "eval_steps": 1})
    ran = cli("train", config)
    check_refused(ran, 6, (Code.TRAINING_NOT_FINITE, "", "data.validation"))
    assert " after step 1 is nan" in ran.err and "; lower training.learning_rate" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_leads_to_nan_is_removed(run_config: MakeConfig, cli: Cli, tmp_path: Path) -> None:
    """Its weights give NaN at the next step. The previous checkpoint is kept, and the message says how to continue from
    it."""
    config = run_config(training={"learning_rate": 1e30, "save_steps": 1, "warmup_steps": 2})
    ran = cli("train", config)
    assert ran.code == 6
    assert "; step 1 is kept: continue from there with --resume --allow-change training.learning_rate, or" in ran.err
    assert [path.name for path in checkpoints(tmp_path / "out.partial")] == ["checkpoint-1"]
    mended = ("--resume", "--allow-change", "training.learning_rate", "--set", "training.learning_rate=0.01")
    ran = cli("train", config, *mended)
    assert ran.code == 0, ran.err
    assert "**Changed on the way:** training.learning_rate was 1e+30 up to step 1" in (
        (tmp_path / "out" / "README.md").read_text()
    )


# Interference by other processes


@pytest.mark.parametrize("evaluated", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_resumed_run_that_diverges_keeps_its_checkpoint(
    evaluated: bool, processes: ForkServer, run_config: MakeConfig, cli: Cli, tmp_path: Path
) -> None:
    data = {"validation": 0.2} if evaluated else {}
    config = run_config(data=data, training={"save_steps": 3, "num_train_epochs": 500})
    child = processes.start("train", config)
    until(lambda: checkpoints(tmp_path / "out.partial"), child)
    child.send(signal.SIGKILL)
    child.wait()
    kept = checkpoints(tmp_path / "out.partial")[0]
    step = int(kept.name.split("-")[1])
    keys = ("training.num_train_epochs", "training.learning_rate", "training.max_steps")
    allowed = [part for key in keys for part in ("--allow-change", key)]
    more = ("--set", f"training.max_steps={step + 1}", "--set", "training.num_train_epochs=")
    ran = cli("train", config, "--resume", *allowed, *more, "--set", "training.learning_rate=1e30")
    assert ran.code == 6, ran.err
    assert (
        f"; step {step} is kept: continue from there with --resume --allow-change training.learning_rate, or" in ran.err
    )
    assert checkpoints(tmp_path / "out.partial")[0] == kept
    ran = cli("train", config, "--resume", *allowed, *more, "--set", "training.learning_rate=0.001")
    assert ran.code == 0, ran.err


def test_files_that_appear_at_the_output_are_not_overwritten(
    processes: ForkServer, run_config: MakeConfig, tmp_path: Path, cli: Cli, undisturbed: bytes
) -> None:
    """The last step, in the middle of an epoch, is saved, so only publishing has to be repeated."""
    config = run_config(training={"max_steps": STEPS})
    mine = tmp_path / "out" / "thesis.txt"
    statement = f"pathlib.Path('{mine.parent}').mkdir(); pathlib.Path('{mine}').write_text('mine')"
    child = processes.start("train", config, first=AFTER_LAST_STEP.format(statement=statement))
    assert child.wait() == 2
    line = child.said().splitlines()[-1]
    assert is_problem(problem_text(line), (Code.OUTPUT_UNUSABLE, str(tmp_path / "out"), "output_dir")), line
    assert line.endswith("; move it away, and continue with --resume")
    assert mine.read_text() == "mine"
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert cli("train", config, "--resume").code == 0
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == undisturbed
    assert json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]["steps"] == STEPS


def test_a_finished_run_whose_cleanup_was_interrupted(run_config: MakeConfig, cli: Cli, tmp_path: Path) -> None:
    """Killed between the last two steps of publishing."""
    config = run_config()
    assert cli("train", config).code == 0
    (tmp_path / "out.partial" / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    for arguments in ((), ("--resume",)):
        ran = cli("train", config, *arguments)
        check_refused(ran, 2, (Code.OUTPUT_EXISTS, str(tmp_path / "out"), "output_dir"))
        assert "; if it is the adapter you want, remove out.partial; " in ran.err
    assert cli("train", config, "--overwrite").code == 0


# Durability: the power cannot be cut here, so the order of system calls is checked, which the kernel respects


def test_a_checkpoint_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    kept = Checkpoints(tmp_path, run_record(), 0)
    with kept.writing(3):
        written = kept.unfinished / "checkpoint-3"
        written.mkdir(parents=True)
        (written / "optimizer.pt").write_bytes(b"x")
    names = ["optimizer.pt", "run.json", "manifest.json"]
    moved = f"{written} -> {tmp_path / 'checkpoint-3'}"
    assert calls == [*(str(written / name) for name in names), str(written), moved, str(tmp_path)]


def test_damaged_checkpoints_do_not_count_when_old_ones_are_deleted(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, run_record(), 0)
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


# Output streams


@pytest.mark.parametrize("reader", ["gone", "full"])
def test_a_run_continues_when_stderr_cannot_be_written(
    reader: str, run_config: MakeConfig, tmp_path: Path, processes: ForkServer
) -> None:
    """Stderr is a pipe that nobody reads, or a file on a full disk."""
    reading_end, writing_end = os.pipe()
    os.close(reading_end)
    gone = f"/proc/{os.getpid()}/fd/{writing_end}"
    child = processes.start("train", run_config(), stderr=gone if reader == "gone" else "/dev/full")
    code = child.wait()
    os.close(writing_end)
    assert code == 0
    assert (tmp_path / "out" / WEIGHTS).is_file() and "steps" in child.out.read_text()


def test_no_space_for_the_output_is_reported(run_config: MakeConfig, tmp_path: Path, processes: ForkServer) -> None:
    child = processes.start("train", run_config(), stdout="/dev/full")
    assert child.wait() == 8
    last = problem_text(child.said().splitlines()[-1])
    assert is_problem(last, (Code.OUTPUT_FAILED, "standard output", ""))
    assert (tmp_path / "out" / WEIGHTS).is_file()


@pytest.mark.parametrize("pause", [0.01, *(pytest.param(one, marks=pytest.mark.slow) for one in (0.0, 0.05))])
def test_successive_signals_end_without_a_traceback(pause: float, run_config: MakeConfig, tmp_path: Path) -> None:
    """Whenever the second one arrives: while the first is reported, or as the program exits."""
    command = [sys.executable, "-m", "loratune", "train", str(run_config())]
    child = Process(command, stderr=subprocess.PIPE, text=True)
    while not handles(child, signal.SIGTERM):
        time.sleep(0.01)
    time.sleep(1)
    for _ in range(2):
        child.send_signal(signal.SIGTERM)
        time.sleep(pause)
    said = child.communicate()[1]
    assert child.returncode == 143 and "Traceback" not in said, said
