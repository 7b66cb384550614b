"""Threads on a machine that does something else too, and in a container: decided before torch is loaded."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loratune import memory
from loratune.system import containers, waiting

ASK = """
import json, os, pathlib, sys
from loratune.system import containers, waiting
statistics, containers._ROOT, containers._OWN = map(pathlib.Path, sys.argv[1:])
waiting._STATISTICS = statistics
lines = waiting.adapt_threads()
names = "GOMP_SPINCOUNT", "OMP_NUM_THREADS"
print(json.dumps([lines, *map(os.environ.get, names), "torch" in sys.modules]))
"""
BUSY = "while True: pass"
STATISTICS, ABSENT = Path("/proc/stat"), Path("/absent")
several = pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="threads need two processors")


def ask(
    statistics: Path = STATISTICS, groups: Path = ABSENT, own: Path = ABSENT, **environment: str
) -> tuple[list[str], str | None, str | None]:
    """The lines, the spins, and the threads, in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in (*waiting._CHOSEN, waiting._THREADS)}
    command = [sys.executable, "-c", ASK, *map(str, (statistics, groups, own))]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True)
    lines, spins, threads, loaded = json.loads(done.stdout)
    assert not loaded
    return lines, spins, threads


@several
def test_beside_busy_processes_threads_spin_briefly() -> None:
    children = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in os.sched_getaffinity(0)]
    try:
        (line,), spins, threads = ask()
        others = re.search(r"other processes use ([0-9.]+) of", line)
        assert others and 0.4 <= float(others[1]) <= len(os.sched_getaffinity(0))
        assert (spins, threads) == ("100", None)
        for chosen in ({"OMP_WAIT_POLICY": "active"}, {"OMP_NUM_THREADS": "1"}, {"RANK": "0", "WORLD_SIZE": "2"}):
            assert ask(**chosen)[:2] == ([], None), chosen
        assert ask(GOMP_SPINCOUNT="7")[:2] == ([], "7")
    finally:
        for child in children:
            child.kill()
            child.wait()


ODD = {
    "too few numbers": "cpu{own} 1 2 3\n",
    "no numbers": "cpu{own} a b c d e f g h\n",
    "no processors": "intr 1 2\n",
    "an empty line": "\ncpu{own} 1 2 3 4 5 6 7 8\n",
    "nothing": "",
    "no text": "\udcff\udcfe",
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_not_understood_is_no_load(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "stat"
    odd.write_text(ODD[name].format(own=min(os.sched_getaffinity(0))), errors="surrogateescape")
    monkeypatch.setattr(waiting, "_STATISTICS", odd)
    before = waiting._others_seconds()
    assert not waiting._others_seconds() - before > 0


def test_on_an_idle_machine_the_runtime_decides(tmp_path: Path) -> None:
    """No process but this one uses a processor; nor is there anything to decide where nobody counts."""
    still = tmp_path / "stat"
    still.write_text(Path("/proc/stat").read_text())
    assert ask(still) == ask(tmp_path / "absent") == ask(tmp_path) == ([], None, None)


def test_only_the_processors_of_this_process_count() -> None:
    hundredth = 1 / os.sysconf("SC_CLK_TCK")
    own = min(os.sched_getaffinity(0))
    lines = [
        "cpu  9 9 9 9 9 9 9 9 0 0",
        f"cpu{own} 1 2 4 800 1600 8 16 32 64 128",  # idle and waiting for disks do not count, guests are in user time
        f"cpu{max(os.sched_getaffinity(0)) + 1} 1000 0 0 0 0 0 0 0 0 0",
        "intr 5 6 7",
    ]
    assert waiting._busy_seconds("\n".join(lines)) == pytest.approx(63 * hundredth)


# Containers

GROUPS: dict[str, tuple[str, dict[str, str]]] = {
    "the second version": ("0::/", {"cpu.max": "100000 100000"}),
    "a group of its own": ("0::/jobs/7", {"jobs/cpu.max": "50000 100000", "jobs/7/cpu.max": "max 100000"}),
    "the first version": (
        "4:cpu,cpuacct:/docker/0f3", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"},
    ),
}  # fmt: skip
UNLIMITED: dict[str, tuple[str, dict[str, str]]] = {
    "no limit": ("0::/", {"cpu.max": "max 100000"}),
    "no limit, the first version": ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}),
    "one file is missing": ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "100000"}),
    "odd": ("neither", {"cpu.max": "1 0", "cpu/cpu.cfs_quota_us": "", "cpu/cpu.cfs_period_us": "x"}),
    "more than there is": ("0::/", {"cpu.max": f"{(os.cpu_count() or 1) * 200000} 100000"}),
    "outside of what is seen": ("0::/../..", {}),
    "more than a number can be": ("0::/", {"cpu.max": f"{'9' * 400} 1"}),
    "a period below 0": ("0::/", {"cpu.max": "100000 -100000"}),
}


def made(tmp_path: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    """The directory of groups, and the file that names those of the process."""
    root, listing = tmp_path / "groups", tmp_path / "own"
    root.mkdir()
    listing.write_text(f"12:pids:/\n{own}\n")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root, listing


@several
@pytest.mark.parametrize("name", GROUPS)
def test_a_container_has_as_many_threads_as_processors(name: str, tmp_path: Path) -> None:
    """Those that it may use, although it sees more; where the user says nothing else."""
    groups = made(tmp_path, *GROUPS[name])
    (line,), _, threads = ask(STATISTICS, *groups, GOMP_SPINCOUNT="7")
    assert threads == "1" and "may use" in line and "OMP_NUM_THREADS=1" in line
    assert ask(STATISTICS, *groups, GOMP_SPINCOUNT="7", OMP_NUM_THREADS="2") == ([], "7", "2")


@pytest.mark.parametrize("name", UNLIMITED)
def test_without_a_limit_the_runtime_decides(name: str, tmp_path: Path) -> None:
    assert ask(STATISTICS, *made(tmp_path, *UNLIMITED[name]), GOMP_SPINCOUNT="7") == ([], "7", None)


MEMORY: dict[str, tuple[str, dict[str, str], float]] = {
    "no files": ("0::/", {}, float("inf")),
    "the second version": (
        "0::/a", {"a/memory.max": "1000\n", "a/memory.current": "700\n", "a/memory.stat": "anon 500\n"
        "inactive_file 150\nactive_file 40\nshmem 10\n"}, 490,
    ),
    "without statistics": ("0::/", {"memory.max": "1000", "memory.current": "700"}, 300),
    "odd statistics": ("0::/", {"memory.max": "1000", "memory.current": "700", "memory.stat": "a\n"}, 300),
    "no limit": ("0::/", {"memory.max": "max", "memory.current": "700"}, float("inf")),
    "the outer limit": (
        "0::/a/b", {"a/memory.max": "1000", "a/memory.current": "900", "a/b/memory.max": "500",
        "a/b/memory.current": "100"}, 100,
    ),
    "the first version": (
        "9:memory:/docker/7", {"memory/memory.limit_in_bytes": "1000", "memory/memory.usage_in_bytes": "600",
        "memory/memory.stat": "inactive_file 5\ntotal_inactive_file 50\ntotal_active_file 7\n"}, 457,
    ),
    "no limit, the first version": (
        "9:memory:/", {"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "4096"},
        2**63 - 8192,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEMORY)
def test_the_memory_that_a_container_has_left(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel keeps of files can be taken."""
    own, files, free = MEMORY[name]
    groups, listing = made(tmp_path, own, files)
    monkeypatch.setattr(containers, "_ROOT", groups)
    monkeypatch.setattr(containers, "_OWN", listing)
    assert containers.free_memory() == free
    before = memory.available(torch.device("cpu"))
    assert before <= free and (before == free) == (free < 10_000)
