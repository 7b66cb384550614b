"""Runs of `scripts/run_tests.py`, which end and name what failed last, whatever the tests do."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_command

ONCE = """
def once(name):
    if not Path(name).exists():
        Path(name).touch()
        return True
"""
HANGS = """
def test_hangs():
    Path("child").write_text(str(subprocess.Popen(["sleep", "300"]).pid))
    time.sleep(300)
"""
FAILS = """
def test_fails():
    assert 1 == 2, "the first line"
"""
KILLED_ONCE = """
def test_killed():
    if once("killed"):
        os.kill(os.getpid(), 9)
"""
PASSES = """
def test_passes():
    pass
"""


def flaky(number: int) -> str:
    return f"def test_flaky_{number}():\n    assert not once('{number}')\n"


def outcome_of(folder: Path, *tests: str, options: tuple[str, ...] = ()) -> tuple[int, str, list[str]]:
    """Run these tests in a folder. Returns the exit code, what was printed, and the lines that follow the last output
    of pytest."""
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -q -p no:cacheprovider\n")
    head = "import os, subprocess, time\nfrom pathlib import Path\n"
    (folder / "test_it.py").write_text("\n".join([head, ONCE, *tests]))
    command = [sys.executable, ROOT / "scripts" / "run_tests.py", *options]
    done = run_command(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout, done.stdout.rpartition("\n\n")[2].splitlines()


def has_ended(pid: int) -> bool:
    """Whether a process ends within ten seconds; one that nobody has waited for (Z) has ended."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        path = Path(f"/proc/{pid}/stat")
        if not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.01)
    return False


def test_a_test_that_hangs_ends_alone_and_all_that_failed_are_named(tmp_path: Path) -> None:
    options = ("--limit", "2", "--numprocesses", "2", "--dist", "worksteal")
    code, printed, (first, *named, closing) = outcome_of(tmp_path, HANGS, FAILS, KILLED_ONCE, PASSES, options=options)
    assert code == 1, printed
    assert first.startswith("FLAKY") and "test_it.py::test_killed: " in first, printed
    errors = dict(line.removeprefix("FAILED test_it.py::").split(": ", 1) for line in named)
    assert errors.keys() == {"test_hangs", "test_fails"}
    assert "the first line" in errors["test_fails"] and errors["test_fails"].endswith("assert 1 == 2")
    assert closing.startswith("1 passed, 2 failed, 1 flaky in ")
    assert 'test_it.py", line' in printed and " in test_hangs\n" in printed  # where it stood
    assert has_ended(int((tmp_path / "child").read_text()))
    assert (tmp_path / ".pytest_cache" / "junit.xml").is_file()


@pytest.mark.parametrize("count, code", [(2, 0), (3, 1)])
def test_at_most_two_flaky_tests_are_listed_and_do_not_fail_the_run(tmp_path: Path, count: int, code: int) -> None:
    found, printed, lines = outcome_of(tmp_path, *map(flaky, range(count)), PASSES)
    assert found == code, printed
    named = [line.removeprefix("FLAKY").partition(" test_it.py::")[2].split(": ")[0] for line in lines[:count]]
    assert named == [f"test_flaky_{number}" for number in range(count)]
    assert lines[-1].startswith(f"1 passed, 0 failed, {count} flaky in ")


def test_a_run_that_takes_too_long_is_ended_and_says_what_had_failed(tmp_path: Path) -> None:
    code, printed, lines = outcome_of(tmp_path, FAILS, HANGS, options=("--whole", "3"))
    assert code == 2, printed
    assert {line.split(": ")[0] for line in lines} >= {f"FAILED test_it.py::test_{name}" for name in ("fails", "hangs")}
    assert lines[-1].startswith("0 passed, 2 failed in ")
    assert has_ended(int((tmp_path / "child").read_text()))


def test_a_run_that_ends_before_its_last_test_has_failed(tmp_path: Path) -> None:
    """The test that ended it passes when it is run again, but nobody has run the others."""
    code, printed, lines = outcome_of(
        tmp_path, "def test_ends():\n    if once('ended'):\n        os._exit(1)\n", PASSES
    )
    assert code == 1 and "test_it.py::test_ends: " in lines[0], printed


def test_files_that_cannot_be_imported_are_named(tmp_path: Path) -> None:
    code, printed, lines = outcome_of(tmp_path, "import no_such_module\n")
    assert code == 2 and lines[0].startswith("FAILED test_it.py: ") and "no_such_module" in lines[0], printed


def test_a_command_that_takes_too_long_is_killed_with_all_it_has_started(tmp_path: Path) -> None:
    command = ["bash", "-c", "sleep 300 & echo $! > child; wait"]
    with pytest.raises(subprocess.TimeoutExpired):
        run_command(command, cwd=tmp_path, timeout=1)
    assert has_ended(int((tmp_path / "child").read_text()))


def test_what_a_fork_server_runs_ends_with_it(tmp_path: Path) -> None:
    order = {"argv": [], "env": {}, "out": "out", "err": "err", "ignored": None, "limit": None, "memory": None}
    waits = "import time; open('begun', 'w').close(); time.sleep(300)"
    code = (
        f"import os, time, fork_server\nprint(fork_server.born({order | {'first': waits}}), flush=True)\n"
        "while not os.path.exists('begun'):\n    time.sleep(0.01)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "scripts")}
    done = run_command([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and has_ended(int(done.stdout)), done.stderr
