"""Run pytest so that it ends whatever its tests do, and so that its last lines name what failed.

    python scripts/run_tests.py [--limit SECONDS] [--whole SECONDS] [ARGUMENTS OF PYTEST]

A test that takes longer than `--limit` ends its process, which prints all stacks; the other tests go on, and what the
process has started is killed. A run that takes longer than `--whole` is ended, and what failed so far is reported. A
test that fails is run again once, alone, in a new process: if it then passes it is called flaky, and at most two flaky
tests do not make the run fail. The exit code is pytest's. How long each test took is in `.pytest_cache/junit.xml`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

MOST_FLAKY = 2
MOST_AGAIN = 10
"""If more tests fail, something is broken, and none is run again."""
LONGEST = 300
"""Characters of an error that are shown."""


class Recorder:
    """A plugin of pytest that writes what happens to each test to a file at once, so that it is known however the run
    ends. With pytest-xdist it is in the process that distributes the tests."""

    def __init__(self, path: str):
        self._file = open(path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115  closed with the process

    def _write(self, test: str, outcome: str, error: str = "") -> None:
        self._file.write(json.dumps([test, outcome, error]) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins."""
        self._write(nodeid, "begun")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test has been set up, has run, or has been torn down."""
        if report.failed or report.when == "call" or report.skipped:
            self._write(report.nodeid, report.outcome, error_of(report) if report.failed else "")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """A test has ended."""
        self._write(nodeid, "ended")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """The tests of a file have been collected."""
        if report.failed:
            self._write(report.nodeid, report.outcome, error_of(report))

    def pytest_sessionfinish(self) -> None:
        """All tests have ended."""
        self._write("", "finished")

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """A process of pytest-xdist has ended. If it was killed, so is what it has started."""
        if error:
            end_processes(os.environ["TEST_RUN"], f"PYTEST_XDIST_WORKER={node.gateway.id}")


def error_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The error in one line: the first line of the exception's message, and the last where there are more."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = [line.strip() for line in (crash.message if crash else str(report.longrepr)).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("Use -v", "Full diff"))] or ["no message"]
    shown = [lines[-1]] if crash is None else [lines[0], *lines[1:][-1:]]
    return " ... ".join(shown)[:LONGEST]


def end_processes(*marks: str) -> None:
    """Kill the processes that were started with these variables, `NAME=VALUE`, and all that they have started (on
    Linux)."""
    wanted = {mark.encode() for mark in marks}
    for _ in range(3):  # one may just have started another
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has ended, or belongs to somebody else
                if wanted <= {*path.read_bytes().split(b"\0")}:
                    os.kill(int(path.parent.name), signal.SIGKILL)


@dataclass
class Outcomes:
    """What has happened to the tests of a run. failed: test → error."""

    passed: set[str] = field(default_factory=set)
    skipped: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    is_finished: bool = False

    @classmethod
    def read(cls, path: Path) -> "Outcomes":
        """Read what a `Recorder` has written. A test that has begun and not ended has failed."""
        found, running = cls(), dict[str, None]()
        for test, outcome, error in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if outcome == "begun":
                running[test] = None
            elif outcome == "ended":
                running.pop(test, None)
            elif outcome == "failed":
                found.failed.setdefault(test, error)
            elif outcome == "finished":
                found.is_finished = True
            else:
                (found.passed if outcome == "passed" else found.skipped).add(test)
        found.failed = dict.fromkeys(running, "it had not ended when the run ended") | found.failed
        found.passed -= found.failed.keys()
        found.skipped -= found.failed.keys()
        return found


def run(arguments: Sequence[str], seconds: float) -> tuple[int, Outcomes]:
    """Run pytest in a process of its own, at most this number of seconds. Returns its exit code and the outcomes."""
    mark = f"TEST_RUN_{uuid.uuid4().hex}=1"  # a name of its own: a run inside another has both
    names = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}
    environment = names | {"TEST_RUN": mark, mark.partition("=")[0]: "1"}
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record"
        record.touch()
        child = subprocess.Popen([sys.executable, __file__, "--record", str(record), *arguments], env=environment)
        try:
            code = child.wait(seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
            if isinstance(reason, subprocess.TimeoutExpired):
                print(f"\nThe tests take longer than {seconds:.0f} s and are ended.", flush=True)
                child.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                child.wait(30)
            code = pytest.ExitCode.INTERRUPTED
        finally:
            child.kill()
            child.wait(30)
            end_processes(mark)
        return code, Outcomes.read(record)


def run_again(outcomes: Outcomes, options: Sequence[str], end: float) -> list[str]:
    """Run each failed test again, alone. Returns those that then pass."""
    passed = []
    for test in outcomes.failed:
        if (left := end - time.monotonic()) > 0:
            print(f"\n{test} has failed and is run again, alone:", flush=True)
            passed += [test] if run([*options, test], left)[0] == pytest.ExitCode.OK else []
    return passed


def main() -> int:
    """Run the tests, and those that fail again. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, add_help=False)
    parser.add_argument("--limit", type=float, default=300)
    parser.add_argument("--whole", type=float, default=1500)
    chosen, arguments = parser.parse_known_args()
    begun = time.monotonic()
    options = ["-o", f"faulthandler_timeout={chosen.limit}", "-o", "faulthandler_exit_on_timeout=true"]
    code, outcomes = run([*options, "--junitxml=.pytest_cache/junit.xml", *arguments], chosen.whole)
    flaky: list[str] = []
    if code == pytest.ExitCode.TESTS_FAILED and len(outcomes.failed) <= MOST_AGAIN:
        flaky = run_again(outcomes, options, begun + chosen.whole)
        if outcomes.is_finished and outcomes.failed and outcomes.failed.keys() == {*flaky} and len(flaky) <= MOST_FLAKY:
            code = 0
    print()
    for test, error in sorted(outcomes.failed.items(), key=lambda item: item[0] not in flaky):
        print(f"{'FLAKY (it passed when it was run again, alone)' if test in flaky else 'FAILED'} {test}: {error}")
    if len(flaky) > MOST_FLAKY:
        print(f"More than {MOST_FLAKY} tests are flaky.")
    if not outcomes.is_finished:
        print("The run ended before its last test.")
    counts = [(len(outcomes.passed), "passed"), (len(outcomes.failed) - len(flaky), "failed")]
    counts += [(len(tests), name) for tests, name in ((flaky, "flaky"), (outcomes.skipped, "skipped")) if tests]
    closing = ", ".join(f"{number} {name}" for number, name in counts)
    print(f"{closing} in {time.monotonic() - begun:.2f}s", flush=True)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in the background of a script
    if sys.argv[1:2] == ["--record"]:
        sys.exit(pytest.main(sys.argv[3:], plugins=[Recorder(sys.argv[2])]))
    sys.exit(main())
