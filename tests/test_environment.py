"""The resources that a container grants to a process: threads, which are limited before torch is loaded, and memory."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_command

from loratune import memory
from loratune.system import environment

ASK = """
import json, os, pathlib, sys
from loratune.system import environment
environment._ROOT, environment._OWN = map(pathlib.Path, sys.argv[1:])
print(json.dumps([environment.limit_threads(), os.environ.get("OMP_NUM_THREADS"), "torch" in sys.modules]))
"""
several = pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="there is nothing to limit")


def ask(groups: Path, own: Path, **environment: str) -> tuple[str, str | None]:
    """The message for the user and the number of threads, in a separate process."""
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", ASK, str(groups), str(own)]
    done = run_command(command, env=kept | environment, capture_output=True, text=True, check=True)
    line, threads, loaded = json.loads(done.stdout)
    assert not loaded
    return line, threads


GROUPS: dict[str, tuple[str, dict[str, str]]] = {
    "a container": ("0::/", {"cpu.max": "100000 100000"}),
    "a group of its own": ("0::/jobs/7", {"jobs/cpu.max": "50000 100000", "jobs/7/cpu.max": "max 100000"}),
}
UNLIMITED: dict[str, tuple[str, dict[str, str]]] = {
    "no limit": ("0::/", {"cpu.max": "max 100000"}),
    "the first version": ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}),
    "odd": ("neither", {"cpu.max": "1 0"}),
    "more than there is": ("0::/", {"cpu.max": f"{(os.cpu_count() or 1) * 200000} 100000"}),
    "outside of what is seen": ("0::/../..", {}),
    "more than a number can be": ("0::/", {"cpu.max": f"{'9' * 400} 1"}),
    "a period below 0": ("0::/", {"cpu.max": "100000 -100000"}),
}


def made(tmp_path: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    """The cgroup directory, and the file that names the cgroups of the process."""
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
    """The processors that it may use, although it sees more, unless the user has set the number."""
    groups = made(tmp_path, *GROUPS[name])
    line, threads = ask(*groups)
    assert threads == "1" and "may use" in line and "OMP_NUM_THREADS=1" in line
    assert ask(*groups, OMP_NUM_THREADS="2") == ("", "2")


@pytest.mark.parametrize("name", UNLIMITED)
def test_without_a_limit_the_runtime_chooses_the_threads(name: str, tmp_path: Path) -> None:
    assert ask(*made(tmp_path, *UNLIMITED[name])) == ("", None)


MEMORY: dict[str, tuple[str, dict[str, str], float]] = {
    "no files": ("0::/", {}, float("inf")),
    "a limit": (
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
}  # fmt: skip


@pytest.mark.parametrize("name", MEMORY)
def test_available_memory_in_a_container(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory used for the kernel's page cache counts as available."""
    own, files, free = MEMORY[name]
    groups, listing = made(tmp_path, own, files)
    monkeypatch.setattr(environment, "_ROOT", groups)
    monkeypatch.setattr(environment, "_OWN", listing)
    assert environment.free_memory() == free
    before = memory.available(torch.device("cpu"))
    assert before <= free and (before == free) == (free < 10_000)
