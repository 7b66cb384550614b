"""Several processes as one run: the same result, one writer, and all of them end when one does."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import releases
import torch
import torch.distributed as dist
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import (
    ROOT,
    Process,
    byte_tokenizer,
    config_in,
    is_problem,
    mainly,
    problem_text,
    run_command,
    tiny_llama,
    write_rows,
)
from fork_server import Child, ForkServer, free_port, launch_variables
from running import WEIGHTS, MakeConfig, checkpoints, curve, handles, until
from safetensors.torch import load_file
from torch.distributed import run as torchrun
from transformers import MixtralConfig, MixtralForCausalLM

from loratune.codes import Code
from loratune.system.launcher import SINGLE_PROCESS, Group
from loratune.training.batching import DistributedBatchSampler
from loratune.training.processes import DistributedGroup

pytestmark = pytest.mark.distributed

SOON = 60  # seconds within which all processes have ended after one has, with a margin for a busy machine
UNEVEN = [
    {"prompt": "q" * (7 * number % 29 + 1), "completion": " " + "ab" * (5 * number % 13 + 1)} for number in range(45)
]
"""The last step of an epoch has fewer rows than a batch, for every distribution over processes that is tested."""
EVALUATED: dict[str, Any] = {"validation": 0.2}


def trained(processes: ForkServer, config: Path, out: Path, count: int, *settings: str) -> dict[str, Any]:
    """The record of a run with this number of processes."""
    assignments = [part for one in (f"output_dir={out}", *settings) for part in ("--set", one)]
    children = processes.launch(count, "train", config, *assignments)
    assert [child.wait() for child in children] == [0] * count, "\n".join(child.said() for child in children)
    record: dict[str, Any] = json.loads((out / "loratune.json").read_text())
    return record


def shared(size: int, accumulated: int = 1) -> tuple[str, str]:
    return (
        f"training.per_device_train_batch_size={size}", f"training.gradient_accumulation_steps={accumulated}",
    )  # fmt: skip


Alone = Callable[[str], tuple[Path, dict[str, Any], Path]]


@pytest.fixture(scope="module")
def alone(processes: ForkServer, tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Alone:
    """Trains on rows of uneven length in one process, once for each way of packing: the config, the record and the
    weights."""

    @cache
    def trained_alone(packing: str) -> tuple[Path, dict[str, Any], Path]:
        folder = tmp_path_factory.mktemp("alone")
        rows = str(write_rows(folder / "uneven.jsonl", UNEVEN))
        data, training = {"train": rows, "packing": packing, **EVALUATED}, {"num_train_epochs": 2, "eval_steps": 4}
        config = config_in(folder, tiny_dir)(data=data, training=training)
        return config, trained(processes, config, folder / "1", 1, *shared(8)), folder / "1" / WEIGHTS

    return trained_alone


SLOW = pytest.mark.slow
LAYOUTS = ((2, shared(2, 2)), (4, shared(2)), (2, shared(4)), (4, shared(1, 2)))


@pytest.mark.parametrize(
    ("packing", "layouts"),
    [
        ("none", LAYOUTS[:1]),
        pytest.param("none", LAYOUTS[1:], marks=SLOW),
        pytest.param("batch", LAYOUTS, marks=SLOW),
    ],
    ids=["none on two", "none", "batch"],
)
def test_two_and_four_processes_equal_one(
    packing: str,
    layouts: tuple[tuple[int, tuple[str, str]], ...],
    processes: ForkServer,
    alone: Alone,
    tmp_path: Path,
) -> None:
    config, record, weights = alone(packing)
    for count, settings in layouts:
        out = tmp_path / f"{count} {settings}"
        same(trained(processes, config, out, count, *settings), record)
        tensors, expected = load_file(out / WEIGHTS), load_file(weights)
        assert all((tensors[name] - expected[name]).abs().max() < 1e-4 for name in expected)


@pytest.mark.parametrize(("count", "accumulated"), [(2, 2), pytest.param(4, 1, marks=SLOW)])
def test_packs_are_distributed_among_processes(
    count: int, accumulated: int, processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    """A process takes one pack per micro-step, so two processes take what one process accumulates."""
    data = {"train": str(write_rows(tmp_path / "uneven.jsonl", UNEVEN)), "packing": "full", "max_length": 60}
    config = run_config(data={**data, **EVALUATED}, training={"num_train_epochs": 2, "eval_steps": 4})
    alone = trained(processes, config, tmp_path / "1", 1, *shared(2, 4))
    same(trained(processes, config, tmp_path / f"{count}", count, *shared(2, accumulated)), alone)


@pytest.mark.parametrize(
    ("packing", "sizes"),
    mainly((), [("none", (shared(8), shared(4))), ("full", (shared(2, 4), shared(2, 2)))]),
)
def test_blocks_are_distributed_among_processes(
    packing: str, sizes: tuple[tuple[str, str], ...], processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    """Documents of one to six blocks: the same steps, and the same scores of whole documents, which processes share."""
    texts = [{"text": f"{number} and " * (11 * number % 29 + 1)} for number in range(24)]
    data = {"train": str(write_rows(tmp_path / "texts.jsonl", texts)), "packing": packing, **EVALUATED}
    data |= {"max_length": 40, "stride": 8, "test": str(write_rows(tmp_path / "test.jsonl", texts[5:8]))}
    config = run_config(data=data, training={"num_train_epochs": 2, "eval_steps": 4})
    alone, two = (
        trained(processes, config, tmp_path / f"{count}", count, *size)
        for count, size in zip((1, 2), sizes, strict=True)
    )
    same(two, alone)
    assert alone["splits"] == two["splits"] and alone["splits"]["train"]["blocks"] > alone["splits"]["train"]["rows"]
    for name in ("held_out_loss", "held_out_interval", "test", "gain"):
        assert approximately(two["metrics"][name]) == approximately(alone["metrics"][name])
    tensors, expected = (load_file(tmp_path / name / WEIGHTS) for name in ("2", "1"))
    assert all((tensors[name] - expected[name]).abs().max() < 1e-4 for name in expected)


def approximately(value: Any) -> Any:
    """A record with its floats rounded to four digits."""
    return json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 4))


@pytest.mark.parametrize("objective", [pytest.param("dpo", marks=SLOW), "kto"])
def test_preference_rows_are_distributed_among_processes(
    objective: str, processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    """The reference, KTO's KL estimate over a step, and the last step of an epoch, where a process may have no row."""
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " none"} for row in UNEVEN]
    judged = [row | {"label": number % 2 == 0} for number, row in enumerate(UNEVEN)]
    rows = write_rows(tmp_path / "uneven.jsonl", judged if objective == "kto" else pairs)
    training = {"num_train_epochs": 1, "eval_steps": 4, "objective": objective}
    config = run_config(data={"train": str(rows), "validation": str(rows)}, training=training)
    alone = trained(processes, config, tmp_path / "1", 1, *shared(8))
    same(trained(processes, config, tmp_path / "2", 2, *shared(4)), alone)
    tensors, expected = (load_file(tmp_path / name / WEIGHTS) for name in ("2", "1"))
    assert all((tensors[name] - expected[name]).abs().max() < 1e-4 for name in expected)


def test_a_data_driven_initialization_is_the_same(
    processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    """EVA uses the first batches, which all processes have; PEFT would count them once for each process."""
    data = {"train": str(write_rows(tmp_path / "uneven.jsonl", UNEVEN))}
    config = run_config(lora={"init_lora_weights": "eva"}, data=data, training={"max_steps": 3})
    alone = trained(processes, config, tmp_path / "1", 1, *shared(4, 2))
    same(trained(processes, config, tmp_path / "2", 2, *shared(4)), alone)


def same(record: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check that the curves agree within 1e-5, and the token counts exactly."""
    for entry, known in zip(curve(record), curve(expected), strict=True):
        for name in ("loss", "eval_loss", "learning_rate"):
            assert entry.get(name) == pytest.approx(known.get(name), abs=1e-5), (entry, known)
    assert record["metrics"]["tokens"] == expected["metrics"]["tokens"]


class Member(Group):
    """One process of several, which prints nothing."""

    def __init__(self, rank: int, count: int):
        self.rank, self.count = rank, count  # type: ignore[misc]


@pytest.mark.parametrize("items", [1, 3, 7, 8, 45])
@pytest.mark.parametrize("count, size, accumulated", [(2, 4, 1), (4, 2, 1), (2, 2, 2), (4, 1, 2), (8, 1, 1)])
def test_steps_take_the_same_rows_in_the_same_order(items: int, count: int, size: int, accumulated: int) -> None:
    for epoch in range(2):
        whole, parts = (
            DistributedBatchSampler(items, 8, 7, SINGLE_PROCESS),
            [DistributedBatchSampler(items, size, 7, Member(rank, count)) for rank in range(count)],
        )
        for order in (whole, *parts):
            order.set_epoch(epoch)
        assert len({len(order) for order in parts}) == 1
        micro = [[row for share in shares for row in share] for shares in zip(*parts, strict=True)]
        steps = [
            [row for one in micro[start : start + accumulated] for row in one]
            for start in range(0, len(micro), accumulated)
        ]
        assert steps == list(whole)
        assert sorted(row for step in steps for row in step) == list(range(items))
        assert all(len(share) <= size for order in parts for share in order)


def test_each_epoch_has_its_own_order() -> None:
    order = DistributedBatchSampler(40, 8, 7, SINGLE_PROCESS)
    first = list(order)
    order.set_epoch(1)
    assert list(order) != first
    assert list(DistributedBatchSampler(40, 8, 8, SINGLE_PROCESS)) != first


def test_only_one_process_writes_and_prints(processes: ForkServer, run_config: MakeConfig, tmp_path: Path) -> None:
    """The other process has its own cache and temporary directory, and leaves nothing there."""
    config = run_config(data={"train": str(write_rows(tmp_path / "new.jsonl", UNEVEN))}, training={"save_steps": 1})
    own = {name: tmp_path / name for name in ("HF_DATASETS_CACHE", "TMPDIR")}
    for path in own.values():
        path.mkdir()
    children = processes.launch(2, "train", config, each=[{}, {name: str(path) for name, path in own.items()}])
    assert [child.wait() for child in children] == [0, 0], children[0].said()
    assert not any(any(path.iterdir()) for path in own.values())
    assert children[0].out.read_text().startswith("? better than its base: ")
    assert "step     1/" in children[0].said()
    assert children[1].out.read_text() == children[1].said() == ""


VALUES: list[Any] = [None, True, 0, 1.5e300, "", "ä\ud800\x1b", [], {"a": [1, {"b": None}]}, "x" * (9 << 20)]


def test_processes_exchange_values_as_json() -> None:
    """Values of any size; nothing is pickled."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state: Any = SimpleNamespace(process_index=0, local_process_index=0, num_processes=1, device=torch.device("cpu"))
    group = DistributedGroup(state)
    assert group.all_gather(VALUES) == [VALUES] and group.broadcast(VALUES) == VALUES
    assert math.isnan(group.all_gather(math.nan)[0]) and group.total([0.1, 2]) == [0.1, 2]
    with pytest.raises(TypeError, match="not JSON serializable"):
        group.all_gather(object())
    group.close()
    assert not dist.is_initialized()


# How runs end


RUNNING: dict[str, Any] = {
    "lora": {"lora_dropout": 0.3},
    "training": {
        "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 8, "save_steps": 4,
        "logging_steps": 1,
    },
}  # fmt: skip


def begun(processes: ForkServer, config: Path, tmp_path: Path, *arguments: str) -> list[Child]:
    """A run of two processes which has written this many more checkpoints."""
    before = checkpoints(tmp_path / "out.partial")[:1]
    children = processes.launch(2, "train", config, *arguments)
    until(lambda: checkpoints(tmp_path / "out.partial")[:1] not in ([], before), children[0])
    return children


def ended(children: list[Child]) -> list[int]:
    """Exit codes, by rank. Like a launcher, ends the other processes when one has failed."""
    begin, failed = time.monotonic(), 0.0
    while (left := [child for child in children if child.poll() is None]) and time.monotonic() - begin < SOON:
        if not failed and any(child.code for child in children):
            failed = time.monotonic()
        if failed and time.monotonic() - failed > 3:
            for child in left:
                child.send(signal.SIGTERM)
            failed += SOON
        time.sleep(0.02)
    return [child.wait(0) for child in children]


def finished(children: list[Child]) -> list[int]:
    return [child.wait() for child in children]


@pytest.mark.parametrize(
    "signals, killed",
    [
        ((((0, 1), signal.SIGTERM, 143, "terminated"), ((1,), signal.SIGINT, 130, "interrupted")), 0),
        pytest.param(
            (((0,), signal.SIGTERM, 143, "terminated"), ((0, 1, 0, 1), signal.SIGINT, 130, "interrupted")),
            1,
            marks=SLOW,
        ),
    ],
)
def test_runs_ended_by_a_signal_or_a_kill_resume(
    signals: tuple[tuple[tuple[int, ...], int, int, str], ...],
    killed: int,
    processes: ForkServer,
    run_config: MakeConfig,
    tmp_path: Path,
) -> None:
    """A signal stops all processes at the same step, however many of them receive it. When one is killed, the other one
    ends at its next collective operation and reports that. Each time the run resumes, and ends with the bytes of an
    undisturbed one."""
    config = run_config(**RUNNING)
    resume: tuple[str, ...] = ()
    for ranks, number, code, word in signals:
        children = begun(processes, config, tmp_path, *resume)
        for rank in ranks:
            children[rank].send(number)
        assert ended(children) == [code, code], children[0].said()
        line = children[0].said().splitlines()[-1]
        assert line.startswith(f"error: {word}; on 2 processes, as before, continue with: ")
        assert line.endswith(" --resume") and children[1].said() == ""
        resume = ("--resume",)
    children = begun(processes, config, tmp_path, *resume)
    newest = checkpoints(tmp_path / "out.partial")[0].name
    until(lambda: f"step {int(newest.removeprefix('checkpoint-')) + 1:5}/" in children[0].said(), children[0])
    children[killed].send(signal.SIGKILL)
    assert sorted(ended(children)) == [-signal.SIGKILL, 10]
    assert is_lost(children[1 - killed], "" if killed else f"process 1 on {os.uname().nodename}: ")
    assert finished(processes.launch(2, "train", config, "--resume")) == [0, 0]
    trained(processes, config, tmp_path / "straight", 2)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "straight" / WEIGHTS).read_bytes()


def is_lost(child: Child, who: str) -> bool:
    """Whether a process has reported that another one is lost. who: its own name, which precedes that."""
    said = child.said().splitlines()[-1]
    assert (
        problem_text(said).startswith(f"{who}another process of the run ") and f"[{Code.DISTRIBUTED_LOST}]" in said
    ), said
    return "--resume" in said


SLOW_ROWS = """
import time
from loratune import data
prepare = data.prepare
def slowly(*arguments):
    time.sleep(3)
    data.prepare = prepare
    return prepare(*arguments)
data.prepare = slowly
"""


@pytest.mark.slow
def test_a_hanging_process_ends_the_run_after_the_timeout(
    processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    """The run ends after `ddp_timeout`, without another checkpoint. Tokenizing for longer than that does not end it."""
    config = run_config(training=RUNNING["training"] | {"save_steps": 500, "num_train_epochs": 500, "ddp_timeout": 2})
    children = processes.launch(2, "train", config, each=[{"first": SLOW_ROWS}, {}])
    until(lambda: "step     2/" in children[0].said(), children[0])
    children[1].send(signal.SIGSTOP)
    try:
        assert children[0].wait(60) == 10
    finally:
        children[1].send(signal.SIGKILL)
    assert is_lost(children[0], "")
    assert checkpoints(tmp_path / "out.partial") == [] and not (tmp_path / "out").exists()


def test_an_error_in_one_process_ends_all(processes: ForkServer, run_config: MakeConfig, tmp_path: Path) -> None:
    """Process 1 has no room for its temporary files. It alone reports that, and all processes end with its exit
    code."""
    config = run_config(**RUNNING)
    children = processes.launch(2, "train", config, each=[{}, {"limit": 1000}])
    assert ended(children) == [8, 8], children[0].said()
    assert f"]: process 1 on {os.uname().nodename}: " in children[1].said()
    assert "error" not in children[0].said()


def test_an_error_in_all_processes_is_reported_once(
    processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    config = run_config(training={"learning_rate": 1e30, "max_grad_norm": 0.0})
    children = processes.launch(2, "train", config)
    assert ended(children) == [6, 6]
    assert (children[0].said() + children[1].said()).count("error[") == 1
    children = processes.launch(2, "train", tmp_path / "missing.yaml")
    assert ended(children) == [2, 2]
    assert children[0].said().count("error[") == 1 and children[1].said() == ""


def test_a_process_that_dies_before_joining_ends_the_run(
    processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    """It is killed while the other one still reads rows."""
    config = run_config(**RUNNING)
    children = processes.launch(2, "train", config)
    until(lambda: handles(children[0], signal.SIGTERM), children[0])
    children[1].send(signal.SIGKILL)
    children[0].send(signal.SIGTERM)
    assert ended(children)[0] in (10, 143, -signal.SIGTERM)
    assert not (tmp_path / "out.partial").exists()


def test_a_signal_ends_the_wait_for_a_missing_process(processes: ForkServer, run_config: MakeConfig) -> None:
    """torch waits for it in a call that runs no Python signal handlers, so the signal itself ends the process."""
    port = free_port()
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    child = processes.start("train", run_config(), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **ranks)

    def waits() -> bool:
        with socket.socket() as other:
            return other.connect_ex(("127.0.0.1", port)) == 0

    until(waits, child)
    child.send(signal.SIGINT)
    assert child.wait(SOON) == -signal.SIGINT
    assert child.said() == ""


def test_device_map_auto_requires_a_single_process(processes: ForkServer, run_config: MakeConfig) -> None:
    config = run_config(model={"device_map": "auto"})
    children = processes.launch(2, "train", config)
    assert ended(children) == [2, 2]
    assert children[0].said().splitlines()[-1] == (
        f"error[config.conflict]: {config}: model.device_map: auto spreads one model over all GPUs, and each of 2 "
        f"processes would do so; leave it out, or start one process: loratune train {config}"
    )


def test_a_wrong_command_line_is_reported_once(processes: ForkServer) -> None:
    children = processes.launch(2, "train", "--nonsense")
    assert ended(children) == [2, 2]
    assert "--nonsense" in children[0].said() and children[1].said() == ""


def test_other_commands_require_a_single_process(processes: ForkServer, run_config: MakeConfig) -> None:
    children = processes.launch(2, "params", run_config())
    assert ended(children) == [2, 2]
    assert " 2 times" in children[0].said() and "[usage.conflict]" in children[0].said()
    assert (children[0].said().count("\n"), children[1].said()) == (1, "")


def test_a_dry_run_is_printed_by_one_process(processes: ForkServer, run_config: MakeConfig) -> None:
    config = run_config()
    children = processes.launch(2, "train", config, "--dry-run")
    assert finished(children) == [0, 0]
    assert children[0].out.read_text().startswith("targets\n") and children[1].out.read_text() == ""


@pytest.mark.parametrize(
    "how, key, value",
    [
        ("FSDP", "model.quantization", "8bit"),
        ("FSDP", "training.optim", "adafactor"),
        ("DEEPSPEED", "lora.use_lorafa", "true"),
        ("DEEPSPEED", "lora.target_parameters", "experts"),
    ],
)
def test_settings_that_do_not_work_with_sharded_weights_are_refused(
    how: str, key: str, value: str, processes: ForkServer, run_config: MakeConfig
) -> None:
    environment = {f"ACCELERATE_USE_{how}": "true"}
    child = processes.start("train", run_config(), "--set", f"{key}={value}", **environment)
    assert child.wait() == 2
    (line,) = [line for line in child.said().splitlines() if line.startswith("error")]
    assert is_problem(problem_text(line), (Code.DISTRIBUTED_SETTING, "", key)), line
    assert ": does not work with weights that " in line and how.lower() in line


# Resuming on another number of processes


ACCUMULATION = "training.gradient_accumulation_steps"
WHOLE_STEP = ("--set", f"{ACCUMULATION}=4", "--allow-change", ACCUMULATION)
"""For one process instead of two that accumulate two micro-steps each."""


def test_resuming_on_another_number_of_processes(processes: ForkServer, run_config: MakeConfig, tmp_path: Path) -> None:
    """Refused if a step would take other rows, or if DeepSpeed would read the checkpoints of another number of
    processes. Otherwise the result is exact."""
    training = {"save_steps": 3, "num_train_epochs": 4}
    config = run_config(training=training, data={"train": str(write_rows(tmp_path / "uneven.jsonl", UNEVEN))})
    settings = [part for one in shared(2, 2) for part in ("--set", one)]
    children = begun(processes, config, tmp_path, *settings)
    for child in children:
        child.send(signal.SIGKILL)
    ended(children)
    for arguments, environment, key, parts in (
        ((), {}, ACCUMULATION, (" 8 (2 processes x 2 x 2) rows ", " 4 (1 process x 2 x 2); ", "; start 2 processes, ")),
        (
            WHOLE_STEP, {"ACCELERATE_USE_DEEPSPEED": "true"}, "",
            (" 2 processes with no sharding", " 1 process with deepspeed"),
        ),
    ):  # fmt: skip
        child = processes.start("train", config, *settings, "--resume", *arguments, **environment)
        assert child.wait() == 7
        line = problem_text(child.said().splitlines()[-1])
        assert is_problem(line, (Code.RESUME_CHANGED, "", key)) if key else line.code == Code.RESUME_CHANGED, line
        assert all(part in line for part in parts), line
    children = processes.launch(1, "train", config, *settings, "--resume", *WHOLE_STEP)
    assert finished(children) == [0], children[0].said()
    expected = trained(processes, config, tmp_path / "straight", 2, *shared(2, 2))
    same(json.loads((tmp_path / "out" / "loratune.json").read_text()), expected)


# The commands of the README


@pytest.mark.parametrize(
    "launcher",
    [
        ("torchrun", "--nproc-per-node", "2"),
        ("accelerate", "launch", "--config_file", str(ROOT / "configs" / "accelerate" / "cpu.yaml")),
    ],
    ids=["torchrun", "accelerate"],
)
@SLOW
def test_launchers_of_the_readme(launcher: tuple[str, ...], run_config: MakeConfig, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name(launcher[0])
    command = [program, *launcher[1:], "-m", "loratune", "train", run_config()]
    done = run_command([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("? better than its base: ")
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_torchrun_sets_the_variables_that_tests_set(tmp_path: Path) -> None:
    """The processes that it starts have the variables of `ForkServer.launch` with the same values."""
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    }
    try:
        torchrun.main(["--nproc-per-node", "2", "--no-python", "sh", "-c", "env > $0/$RANK", str(tmp_path)])
    finally:
        for number, handler in handlers.items():  # torchrun sets its own; the others are inherited
            signal.signal(number, handler)
    for rank in (0, 1):
        found = dict(line.split("=", 1) for line in (tmp_path / str(rank)).read_text().splitlines() if "=" in line)
        expected = launch_variables(rank, 2, found["MASTER_PORT"])
        assert {name: found.get(name) for name in expected} == expected | {"MASTER_ADDR": found["MASTER_ADDR"]}


# A sharded base


def spread(how: str, config: Path, out: Path, *arguments: str) -> Process:
    """Runs with the shipped config file, on two CPUs."""
    program = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--config_file"]
    started = ["-m", "loratune"] if how == "zero3" else [ROOT / "tests/fsdp_on_cpu.py"]
    command = [*program, ROOT / f"configs/accelerate/{how}.yaml", *started, "train", config]
    return Process(
        [*map(str, command), "--set", f"output_dir={out}", *arguments], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}, start_new_session=True,
    )  # fmt: skip


def sharded(processes: ForkServer, config: Path, out: Path, *arguments: str) -> list[Child]:
    """Runs with FSDP2 like `spread`, but with forked processes and the variables that accelerate's launcher sets."""
    path = ROOT / "configs" / "accelerate" / "fsdp2.yaml"
    words = launch_command_parser().parse_args(["--num_processes", "2", "--config_file", str(path), "train"])
    environment = prepare_multi_gpu_env(_validate_launch_command(words)[0])
    own = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    assert own["ACCELERATE_USE_FSDP"] == "true"
    own["first"] = (ROOT / "tests" / "fsdp_on_cpu.py").read_text()
    return processes.launch(2, "train", config, "--set", f"output_dir={out}", *arguments, each=[own, own])


def spread_to_the_end(how: str, processes: ForkServer, config: Path, out: Path, *arguments: str) -> None:
    """A run with a sharded base, which has to succeed."""
    if how == "fsdp2":
        children = sharded(processes, config, out, *arguments)
        assert finished(children) == [0, 0], children[0].said() + children[1].said()
    else:
        child = spread(how, config, out, *arguments)
        said = child.communicate()[1]
        assert child.returncode == 0, said


ZERO3 = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.mark.parametrize(
    "how, quantization",
    [
        ("fsdp2", "none"),
        *(pytest.param("fsdp2", one, marks=SLOW) for one in ("4bit", "gptq")),
        *(pytest.param("zero3", one, marks=[ZERO3, SLOW]) for one in ("none", "gptq")),
    ],
)
def test_a_sharded_base_gives_the_same_training(
    how: str, quantization: str, processes: ForkServer, alone: Alone, tmp_path: Path
) -> None:
    config, expected, _ = alone("batch")
    if quantization != "none":
        values = yaml.safe_load(config.read_text())
        values["model"] |= {"quantization": quantization, "dtype": "bfloat16"}
        if quantization == "gptq":
            releases.write(tmp_path / "release", byte_tokenizer(), "gptq")
            values["model"] = {"dtype": "float32", "name_or_path": str(tmp_path / "release")}
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump(values))
        expected = trained(processes, config, tmp_path / "1", 1, *shared(8))
    settings = [part for one in shared(4) for part in ("--set", one)]
    spread_to_the_end(how, processes, config, tmp_path / "2", *settings)
    record = json.loads((tmp_path / "2" / "loratune.json").read_text())
    if quantization == "none":
        same(record, expected)
    # Unlike the sharded run, this one computes LoRA in bfloat16 where it can.
    for entry, known in zip(curve(record), curve(expected), strict=True):
        assert entry.get("loss") == pytest.approx(known.get("loss"), abs=1e-3)


@SLOW
@pytest.mark.parametrize("how", ["spread", "copied"])
def test_experts_train_the_same_in_several_processes(
    how: str, processes: ForkServer, run_config: MakeConfig, tiny_dir: Path, tmp_path: Path
) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    MixtralForCausalLM(
        MixtralConfig(
            vocab_size=264, num_key_value_heads=2, num_local_experts=4, bos_token_id=None, eos_token_id=256, **shape
        )
    ).save_pretrained(tmp_path / "experts")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_dir / name, tmp_path / "experts")
    config = run_config(
        model={"name_or_path": str(tmp_path / "experts")}, lora={"target_parameters": ["experts"]},
        data={"train": str(write_rows(tmp_path / "uneven.jsonl", UNEVEN)), **EVALUATED},
        training={"max_steps": 4, "eval_steps": 2},
    )  # fmt: skip
    alone = trained(processes, config, tmp_path / "1", 1, *shared(8))
    if how == "copied":
        record = trained(processes, config, tmp_path / "2", 2, *shared(4))
    else:
        settings = [part for one in shared(4) for part in ("--set", one)]
        spread_to_the_end("fsdp2", processes, config, tmp_path / "2", *settings)
        record = json.loads((tmp_path / "2" / "loratune.json").read_text())
    for entry, known in zip(curve(record), curve(alone), strict=True):
        assert entry.get("loss") == pytest.approx(known.get("loss"), abs=1e-4)


@SLOW
@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_preference_training_over_a_sharded_base(
    objective: str, processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    """The reference, the losses and the preferences equal those of one process."""
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " c" * 3} for row in UNEVEN]
    judged = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    rows = write_rows(tmp_path / "compared.jsonl", judged if objective == "kto" else pairs)
    training = {"objective": objective, "learning_rate": 1e-2, "max_steps": 4, "eval_steps": 2}
    config = run_config(data={"train": str(rows), **EVALUATED}, training=training)
    alone = trained(processes, config, tmp_path / "1", 1, *shared(8))
    settings = [part for one in shared(4) for part in ("--set", one)]
    spread_to_the_end("fsdp2", processes, config, tmp_path / "2", *settings)
    record = json.loads((tmp_path / "2" / "loratune.json").read_text())
    same(record, alone)
    margins = [one["metrics"]["preferences"]["reward_margin"] for one in (record, alone)]
    assert margins[0]["value"] == pytest.approx(margins[1]["value"], abs=1e-4)
    assert margins[0]["interval"] == pytest.approx(margins[1]["interval"], abs=1e-4)


@SLOW
def test_disabling_a_sharded_adapter_restores_the_base(
    processes: ForkServer, run_config: MakeConfig, tiny_dir: Path, tmp_path: Path
) -> None:
    """With trained biases: each process restores the base's values of its shard, and then the trained ones."""
    tiny_llama(attention_bias=True).save_pretrained(tmp_path / "biased")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_dir / name, tmp_path / "biased")
    config = run_config(
        model={"name_or_path": str(tmp_path / "biased")}, lora={"bias": "all"}, training={"max_steps": 3}
    )
    alone = trained(processes, config, tmp_path / "1", 1, *shared(8))["metrics"]["gain"]
    settings = [part for one in shared(4) for part in ("--set", one)]
    spread_to_the_end("fsdp2", processes, config, tmp_path / "2", *settings)
    found = json.loads((tmp_path / "2" / "loratune.json").read_text())["metrics"]["gain"]
    for name, value in alone.items():
        assert found[name] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value), name


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp2", pytest.param("zero3", marks=ZERO3)])
def test_the_best_step_of_a_sharded_adapter_is_restored(
    how: str, processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    """The learning rate is far too high, so the best step is an early one."""
    rows = str(write_rows(tmp_path / "uneven.jsonl", UNEVEN))
    training = {"max_steps": 6, "eval_steps": 1, "learning_rate": 0.3, "lr_scheduler_type": "constant"}
    config = run_config(data={"train": rows, "validation": str(tmp_path / "rows.jsonl")}, training=training)
    spread_to_the_end(how, processes, config, tmp_path / "best")
    metrics = json.loads((tmp_path / "best" / "loratune.json").read_text())["metrics"]
    assert 0 < metrics["kept_step"] < 6
    assert metrics["gain"]["adapter"] == metrics["held_out_loss"], "of the rows that did not choose the step"
    last = ("--set", f"training.max_steps={metrics['kept_step']}", "--set", "training.keep=last")
    spread_to_the_end(how, processes, config, tmp_path / "last", *last)
    assert (tmp_path / "best" / WEIGHTS).read_bytes() == (tmp_path / "last" / WEIGHTS).read_bytes()


@SLOW
def test_the_recipe_for_a_base_larger_than_one_gpu(run_config: MakeConfig, tiny_dir: Path, tmp_path: Path) -> None:
    """QLoRA with activation checkpointing over FSDP2, on a small substitute model, with accelerate's own launcher."""
    rows = write_rows(tmp_path / "uneven.jsonl", UNEVEN)
    child = spread(
        "fsdp2", ROOT / "configs" / "llama-70b-qlora.yaml", tmp_path / "out", "--set", f"model.name_or_path={tiny_dir}",
        "--set", f"data.train={rows}", "--set", "data.validation=0.2", "--set", "data.max_length=100",
    )  # fmt: skip
    said = child.communicate()[1]
    assert child.returncode == 0, said
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert any("mlp.down_proj" in name for name in tensors) and all(one.isfinite().all() for one in tensors.values())


@SLOW
@pytest.mark.parametrize("how", ["fsdp2", pytest.param("zero3", marks=ZERO3)])
def test_a_sharded_run_resumes_to_the_same_bytes(
    how: str, processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    config = run_config(**RUNNING | {"training": RUNNING["training"] | {"num_train_epochs": 5}})
    spread_to_the_end(how, processes, config, tmp_path / "straight")
    children = (
        sharded(processes, config, tmp_path / "out") if how == "fsdp2" else [spread(how, config, tmp_path / "out")]
    )
    while not checkpoints(tmp_path / "out.partial"):
        assert children[0].poll() is None
        time.sleep(0.01)
    main = (tmp_path / "out.partial" / "lock").read_text().split()[1]  # "process 123 on host"
    os.kill(int(main), signal.SIGKILL)
    assert all(child.wait() != 0 for child in children)
    spread_to_the_end(how, processes, config, tmp_path / "out", "--resume")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "straight" / WEIGHTS).read_bytes()


# Recipes


def test_recipes_are_well_formed() -> None:
    scripts = ROOT / "scripts"
    sky = yaml.safe_load((scripts / "skypilot.yaml").read_text())
    for text in ((scripts / "slurm.sbatch").read_text(), sky["run"]):
        run_command(["bash", "-n"], input=text, text=True, check=True)
        assert "-m loratune train" in text
    assert set(sky) <= {"name", "num_nodes", "workdir", "resources", "setup", "envs", "run"}
    compile((scripts / "launch_ray.py").read_text(), "launch_ray.py", "exec")
    assert "--kill-on-bad-exit" in (scripts / "slurm.sbatch").read_text()
    for path in ("slurm.sbatch", "skypilot.yaml", "launch_ray.py"):
        assert "torchrun" in (scripts / path).read_text()
    with pytest.raises(subprocess.CalledProcessError):
        run_command(["bash", "-n"], input="if true; then", text=True, check=True, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_config_files_are_valid_for_accelerate(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_machines == 1 and config.main_process_port == 0
