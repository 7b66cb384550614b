"""How threads wait on a machine that does something else too: decided before torch is loaded, by what others use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loratune.system import waiting

ASK = """
import os, pathlib, sys
from loratune.system import waiting
statistics = sys.argv[1:]
if statistics:
    waiting._STATISTICS = pathlib.Path(statistics[0])
others = waiting.adapt_to_load()
print(others or 0, os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""
BUSY = "while True: pass"


def ask(*arguments: str, **environment: str) -> tuple[float, str, str]:
    """What others use, the spins, and whether torch was loaded, in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in (*waiting._CHOSEN, "OMP_NUM_THREADS")}
    command = [sys.executable, "-c", ASK, *arguments]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True)
    others, spins, loaded = done.stdout.split()
    return float(others), spins, loaded


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="threads need two processors")
def test_beside_busy_processes_threads_spin_briefly() -> None:
    children = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in os.sched_getaffinity(0)]
    try:
        others, spins, loaded = ask()
        assert 0.4 <= others <= len(os.sched_getaffinity(0)) and (spins, loaded) == ("100", "False")
        for chosen in ({"OMP_WAIT_POLICY": "active"}, {"OMP_NUM_THREADS": "1"}, {"RANK": "0", "WORLD_SIZE": "2"}):
            assert ask(**chosen) == (0, "None", "False"), chosen
        assert ask(GOMP_SPINCOUNT="7") == (0, "7", "False")
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_on_an_idle_machine_the_runtime_decides(tmp_path: Path) -> None:
    """No process but this one uses a processor; nor is there anything to decide where nobody counts."""
    still = tmp_path / "stat"
    still.write_text(Path("/proc/stat").read_text())
    assert ask(str(still)) == (0, "None", "False")
    assert ask(str(tmp_path / "absent")) == (0, "None", "False")
    still.write_text(f"cpu{min(os.sched_getaffinity(0))} 1 2 3\n")
    assert ask(str(still)) == ask(str(tmp_path)) == (0, "None", "False")


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
