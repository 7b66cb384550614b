"""scripts/newest_versions.py: which package's newer version breaks a test."""

import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import newest_versions
import pytest
from conftest import ROOT, run_command
from newest_versions import Change

LOCK = """\
# The lock
bitsandbytes==0.50.2
huggingface-hub==2.4.0
torch==2.15.0+cpu
transformers==5.25.0
types-PyYAML==6.0.12.20261101
tomli==2.5.0 ; python_full_version < '3.11'
"""


def test_changes_are_other_releases_and_not_builds_spellings_or_conditions() -> None:
    newest = {"torch": "2.15.0", "transformers": "5.26.0", "types-pyyaml": "6.0.12.20261101", "tomli": "2.5.1"}
    found = newest_versions.changes(newest, newest_versions.locked_versions(LOCK))
    assert found == [Change("transformers", "5.26.0", "5.25.0")]
    locked = newest_versions.locked_versions((ROOT / "scripts" / "lock.txt").read_text(encoding="utf-8"))
    differing = newest_versions.changes(newest_versions.installed(), locked)
    assert {"torch", "types-pyyaml"} <= locked.keys() and "tzdata" not in locked and len(differing) < len(locked)


TESTS = """
import left_part, right_part
from pathlib import Path

def test_left():
    assert left_part.VERSION == 1

def test_right():
    assert right_part.VERSION == 1

def test_either():
    assert 1 in (left_part.VERSION, right_part.VERSION)

def test_both():
    assert left_part.VERSION == right_part.VERSION == 1

def test_always():
    assert left_part.VERSION == 3

def test_once():
    seen = Path("seen")
    assert seen.exists() or seen.touch()

def test_never():
    pass
"""
FOUND = """
fails once, and not again: test_parts.py::test_once
left-part 2 breaks: test_parts.py::test_either
left-part 2 breaks: test_parts.py::test_left
only several newer versions together break: test_parts.py::test_both
right-part 2 breaks: test_parts.py::test_right
with the versions of the lock, too, fails: test_parts.py::test_always
"""


def write_wheel(folder: Path, name: str, version: int) -> None:
    """A package of one line."""
    package, about = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    with ZipFile(folder / f"{package}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{package}.py", f"VERSION = {version}\n")
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", "")


@pytest.mark.slow
def test_each_failed_test_is_named_with_the_package_that_breaks_it(tmp_path: Path) -> None:
    """In an environment of its own, with pip and pytest of this one."""
    run_command([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "these.pth").write_text(sysconfig.get_path("purelib"))
    for name in ("left-part", "right-part"):
        for version in (1, 2):
            write_wheel(tmp_path, name, version)
    pip = [python, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", tmp_path]
    run_command([*pip, "left-part", "right-part"], check=True)
    (tmp_path / "lock.txt").write_text("left-part==1\nright-part==1\n")
    (tmp_path / "test_parts.py").write_text(TESTS)
    script = tmp_path / "newest_versions.py"
    script.write_text((ROOT / "scripts" / "newest_versions.py").read_text(encoding="utf-8"))
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [python, script, python, "-m", "pytest", "-q", "-p", "no:xdist", "--tb=no"]
    done = run_command(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith("left-part 2 (lock: 1)\nright-part 2 (lock: 1)\n")
    assert done.stdout.endswith(FOUND), done.stdout + done.stderr
    left = [path.name for path in site.glob("*.dist-info")]
    assert sorted(left) == ["left_part-2.dist-info", "right_part-2.dist-info"]
