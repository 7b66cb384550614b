"""Runs tests without the lock, and names the packages whose newer versions break them.

    .venv-latest/bin/python scripts/newest_versions.py .venv-latest/bin/pytest -m "not slow"

`make test-latest` does this in an environment of today's newest versions. What fails runs again alone: as it is, then
with each package that differs from `scripts/lock.txt` put back to the version of the lock, then with all of them. The
environment is restored at the end. The exit code is 1 if a test fails twice.
"""

import json
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib import invalidate_caches
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

LOCK = Path(__file__).with_name("lock.txt")


class Change(NamedTuple):
    """A package, its version in this environment, and that of the lock."""

    name: str
    newest: str
    locked: str


def locked_versions(text: str) -> dict[str, str]:
    """Name → version, from the text of the lock: those whose conditions hold for this Python and this system."""
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    found = [one for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate()]
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in found}


def changes(newest: Mapping[str, str], locked: Mapping[str, str]) -> list[Change]:
    """The packages of both whose versions differ. Builds, such as 2.13.0+cpu, are one version."""
    both = sorted(newest.keys() & locked.keys())
    return [Change(name, newest[name], locked[name]) for name in both if _public(newest[name]) != _public(locked[name])]


def _public(version: str) -> str:
    return Version(version).public


def installed() -> dict[str, str]:
    """Name → version, of what is in this environment now."""
    invalidate_caches()
    return {canonicalize_name(one.name): one.version for one in distributions()}


def install(*arguments: str) -> bool:
    """Install with pip, which prints why if it cannot."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=False).returncode == 0


def restore(newest: Mapping[str, str]) -> None:
    """Install these versions again where they have been replaced."""
    now = installed()
    if replaced := [f"{name}=={version}" for name, version in newest.items() if now.get(name) != version]:
        install("--no-deps", *replaced)


def failures(command: Sequence[str], tests: Collection[str] = ()) -> set[str]:
    """Run a command of pytest on these tests, or on all. Returns the names of those that fail.

    Raises:
        SystemExit: pytest could not run all tests.
    """
    with TemporaryDirectory() as folder:
        code = subprocess.run([*command, "-o", f"cache_dir={folder}", *sorted(tests)], check=False).returncode
        record = Path(folder, "v", "cache", "lastfailed")
        failed = set(json.loads(record.read_text(encoding="utf-8"))) if record.exists() else set()
    if code and not failed and not tests:
        raise SystemExit(f"pytest ended with exit code {code}, and names no test that failed")
    return failed if failed or not code else set(tests)


def culprits(command: Sequence[str], failed: Collection[str], changed: Sequence[Change]) -> dict[str, str]:
    """Test → what breaks it, for tests that fail with the newest versions.

    Each package alone is put back to the version of the lock, with what that version requires, until all tests are
    explained; and then all of them.
    """
    newest, found = installed(), dict[str, str]()
    sets = [(f"{one.name} {one.newest} breaks", [f"{one.name}=={one.locked}"]) for one in changed]
    if len(changed) > 1:
        sets.append(("only several newer versions together break", [f"{one.name}=={one.locked}" for one in changed]))
    for what, requirements in sets:
        if open_tests := set(failed) - found.keys():
            print(f"\nwith {' '.join(requirements)}", flush=True)
            if install(*requirements):
                found |= dict.fromkeys(open_tests - failures(command, open_tests), what)
            restore(newest)
    return found | dict.fromkeys(set(failed) - found.keys(), "with the versions of the lock, too, fails")


def main(command: Sequence[str]) -> int:
    """Run the command and print what breaks which test. Returns the exit code."""
    changed = changes(installed(), locked_versions(LOCK.read_text(encoding="utf-8")))
    print("\n".join(f"{one.name} {one.newest} (lock: {one.locked})" for one in changed) or "as in the lock", flush=True)
    first = failures(command)
    failed = failures(command, first) if first else set()
    found = culprits(command, failed, changed)
    print()
    for test in sorted(first - failed):
        print(f"fails once, and not again: {test}")
    for test, what in sorted(found.items(), key=lambda pair: (pair[1], pair[0])):
        print(f"{what}: {test}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
