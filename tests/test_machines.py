"""A run on two machines, each a network namespace of its own, and the cable between them cut."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machines
import pytest
from conftest import ROOT, write_rows
from fork_server import Child, ForkServer
from machines import Machine, Machines
from running import WEIGHTS, MakeConfig, checkpoints, curve
from running import until as wait_until
from test_distributed import UNEVEN, straight

from loratune.codes import Code
from loratune.training import distributed

pytestmark = pytest.mark.distributed

LONG: dict[str, Any] = {"training": {"per_device_train_batch_size": 3, "num_train_epochs": 25, "save_steps": 25}}
PATIENT = 120  # seconds in which a run has begun, or ended, on a machine that is busy


@pytest.fixture
def two() -> Iterator[Machines]:
    if reason := machines.available():
        pytest.skip(reason)
    with machines.two_machines() as made:
        yield made


def start(machine: Machine, config: Path, said: Path, *arguments: str) -> "subprocess.Popen[str]":
    """As the README has it for several machines, but that it does not take half a minute to give up a process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{machines.ADDRESSES[0]}:29500", "--rdzv-id", "test"]
    command = [*launcher, *meeting, str(ROOT / "tests" / "impatient.py"), "train", str(config), *arguments]
    with said.open("w") as stream:
        return machine.popen(command, stdout=stream, stderr=stream)


ENTERED = """
import ctypes, os, platform
libc = ctypes.CDLL(None, use_errno=True)
for name in {names}:
    handle = os.open(f"/proc/{holder}/ns/{{name}}", os.O_RDONLY)
    assert libc.setns(handle, 0) == 0, os.strerror(ctypes.get_errno())
platform._uname_cache = None  # which the fork server has filled, with the name of this computer
from loratune.training import distributed
distributed.PATIENCE = {patience}
"""
"""Before a command: the namespaces of a machine, and how long it waits for the others."""


def launch(two: Machines, processes: ForkServer, config: Path, patience: float) -> list[Child]:
    """As `start` on both, in processes that are forked, as torchrun would start them."""
    names = [*([] if os.geteuid() == 0 else ["user"]), "net", "uts"]
    own = [
        {
            "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": machines.ADDRESSES[0], "MASTER_PORT": "29500",
            "first": ENTERED.format(names=names, holder=machine.holder, patience=patience),
        }
        for machine in (two.one, two.two)
    ]  # fmt: skip
    return processes.launch(2, "train", config, each=own)


def begun(two: Machines, config: Path, tmp_path: Path) -> list["subprocess.Popen[str]"]:
    """A run on both, with a checkpoint."""
    both = [start(machine, config, tmp_path / machine.address) for machine in (two.one, two.two)]
    until(lambda: checkpoints(tmp_path / "out.partial"), tmp_path)
    return both


def until(seen: Any, tmp_path: Path) -> None:
    end = time.monotonic() + PATIENT
    while not seen():
        assert time.monotonic() < end, "\n".join((tmp_path / name).read_text() for name in machines.ADDRESSES)
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("seconds", "patience"),
    [pytest.param(4, 12, marks=pytest.mark.slow), pytest.param(10, distributed.PATIENCE, marks=pytest.mark.slow)],
)
def test_a_cable_that_is_out_for_a_while_costs_nothing(
    seconds: float, patience: float, two: Machines, processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    """A third of the time after which the other machine is given up."""
    config = run_config(**LONG, data={"train": str(write_rows(tmp_path / "uneven.jsonl", UNEVEN))})
    expected = straight(processes, config, tmp_path)
    both = launch(two, processes, config, patience)
    wait_until(lambda: checkpoints(tmp_path / "out.partial"), both[0])
    two.cut()
    time.sleep(seconds)
    assert [child.poll() for child in both] == [None, None]
    two.mend()
    assert [child.wait(PATIENT) for child in both] == [0, 0], both[0].said()
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == expected


LOST = f"has ended, or cannot be reached any more [{Code.DISTRIBUTED_LOST}]"
LOST_BY = (
    f"error: process 1 on {machines.ADDRESSES[1]} {LOST}",
    f"error: the main process on {machines.ADDRESSES[0]} {LOST}",
)
"""What each of the two machines says of the other."""


def lose(two: Machines, processes: ForkServer, config: Path, tmp_path: Path) -> None:
    """Begin a run on both, and cut the cable until both have ended."""
    both = launch(two, processes, config, 6)
    wait_until(lambda: checkpoints(tmp_path / "out.partial"), both[0])
    two.cut()
    assert [child.wait(PATIENT) for child in both] == [10, 10]
    for line, child in zip(LOST_BY, both, strict=True):
        assert line in child.said(), child.said()


def lose_by_torchrun(two: Machines, _: ForkServer, config: Path, tmp_path: Path) -> None:
    """As `lose`, by torchrun, which ends with 1 whatever its processes end with."""
    first, _second = begun(two, config, tmp_path)
    two.cut()
    assert first.wait(PATIENT) == 1
    said = (tmp_path / machines.ADDRESSES[0]).read_text()
    assert LOST_BY[0] in said and "exitcode  : 10 " in said
    until(lambda: LOST_BY[1] in (tmp_path / machines.ADDRESSES[1]).read_text(), tmp_path)
    two.two.kill()  # torchrun itself waits there for longer than a test may take


@pytest.mark.parametrize("how", [lose, pytest.param(lose_by_torchrun, marks=pytest.mark.slow)])
def test_a_cable_that_stays_out_ends_the_run_which_goes_on_where_it_can(
    how: Callable[..., None], two: Machines, processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    """On the machine that is left, and to the result that two would have had."""
    config = run_config(**LONG, data={"train": str(write_rows(tmp_path / "uneven.jsonl", UNEVEN))})
    straight(processes, config, tmp_path)
    how(two, processes, config, tmp_path)
    assert not (tmp_path / "out").exists()
    key = "training.gradient_accumulation_steps"
    child = processes.start("train", config, "--resume", "--set", f"{key}=2", "--allow-change", key)
    assert child.wait() == 0, child.said()
    step = int(re.search(r"resuming from step (\d+)", child.said())[1])  # type: ignore[index]
    records = [json.loads((tmp_path / name / "loratune.json").read_text()) for name in ("out", "straight")]
    soon = [{one["step"]: one["loss"] for one in curve(record)[: step + 20]} for record in records]
    assert soon[0] == pytest.approx(soon[1], abs=1e-4)  # rounding grows with the steps after it
