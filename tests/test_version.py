"""`loratune --version`, and what is imported before a command does its work."""

import json
import os
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Ran, run_command
from running import Cli, MakeConfig

from loratune import __version__
from loratune.system import environment, release

VARIANTS = {"best": ["fma", "nothing_has_this"], "good": ["fma"], "any": []}


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The record of a wheel; the package is not in a checkout."""
    monkeypatch.setattr(release, "RECORD", tmp_path / "release.json")
    monkeypatch.setattr(release, "__file__", str(tmp_path / "loratune" / "system" / "release.py"))
    monkeypatch.delenv("LORATUNE_NATIVE", raising=False)
    return tmp_path / "release.json"


def test_version_names_commit_and_compiled_code(cli: Cli) -> None:
    ran = cli("--version")
    assert ran.code == 0 and ran.out == f"loratune {release.describe()}\n"
    done = run_command(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert release.commit() == done.stdout[:12]  # empty if this is not a checkout


@pytest.mark.parametrize(
    ("has", "expected"), [({"fma", "sse"}, "compiled code for good"), (set(), "compiled code for any")]
)
def test_wheels_record_commit_and_variants(
    has: set[str], expected: str, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record.write_text(json.dumps({"commit": "0123456789ab", "variants": VARIANTS}))
    monkeypatch.setattr(environment, "features", lambda: frozenset(has))
    assert release.describe() == f"{__version__} (commit 0123456789ab, {expected})"


def test_without_record_git_or_compiler(record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged repository, and one of something that loratune was installed in, count as none."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert release.describe() == f"{__version__} (no compiled code, as there is no C compiler)"
    (tmp_path / ".git").mkdir()
    monkeypatch.undo()
    monkeypatch.setattr(release, "__file__", str(tmp_path / "loratune" / "system" / "release.py"))
    assert release.commit() == ""
    monkeypatch.setenv("LORATUNE_NATIVE", "0")
    assert "LORATUNE_NATIVE is 0" in release.compiled_code()
    monkeypatch.setattr(release.platform, "system", lambda: "Darwin")
    monkeypatch.delenv("LORATUNE_NATIVE")
    assert release.compiled_code() == "no compiled code, as none is for Darwin"


DAMAGED = {
    "empty": b"",
    "cut off": b'{"commit": "0123456789ab", "var',
    "not UTF-8": b"\xff\xfe",
    "nested": b"[" * 200_000,
    "a list": b"[]",
    "null": b"null",
    "of something else": b'{"version": "3.1"}',
    "a commit as number": b'{"commit": 12, "variants": {}}',
    "a commit as false": b'{"commit": false, "variants": {}}',
    "a commit as 0": b'{"commit": 0, "variants": {}}',
    "a commit as an empty list": b'{"commit": [], "variants": {}}',
    "a commit as list": b'{"commit": ["a"], "variants": {}}',
    "a commit with an escape": b'{"commit": "\\u001b[31m012345", "variants": {}}',
    "variants as list": b'{"commit": "", "variants": ["x86-64-v3"]}',
    "features as number": b'{"commit": "", "variants": {"x86-64-v3": 3}}',
    "features in lists": b'{"commit": "", "variants": {"x86-64-v3": [["fma"]]}}',
    "a name of two lines": b'{"commit": "", "variants": {"x86\\n": []}}',
    "a directory": None,
    "a pipe": None,
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_record_is_named(case: str, record: Path, cli: Cli) -> None:
    content, make = DAMAGED[case], os.mkfifo if case == "a pipe" else os.mkdir
    make(record) if content is None else record.write_bytes(content)
    ran = cli("--version")
    expected = f"loratune {__version__} (unknown compiled code, as release.json is damaged; install loratune again)\n"
    assert (ran.code, ran.out) == (0, expected), ran.err
    assert release.commit() == ""


def test_a_record_may_be_a_link(record: Path, tmp_path: Path) -> None:
    """As installers make them to the files of their cache."""
    (tmp_path / "cached").write_text('{"commit": "0123456789ab-dirty", "variants": {}}')
    record.symlink_to("cached")
    assert release.commit() == "0123456789ab-dirty"


SAYS = {
    "a commit": (b"0123456789ab\n", "0123456789ab"),
    "not UTF-8": (b"\xff\xfe", ""),
    "an escape": (b"\x1b[31m0123456789ab", ""),
    "lines": (b"0123456789ab\n0123456789ab\n", ""),
    "too much": (b"0" * 3_000_000, ""),
}


@pytest.mark.parametrize("case", SAYS)
def test_only_a_commit_of_our_own_repository_is_shown(
    case: str, record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, expected = SAYS[case]
    (tmp_path / "said").write_bytes(said)
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text(f"#!/bin/sh\nexec /bin/cat {tmp_path / 'said'}\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(git.parent))
    (tmp_path / ".git").mkdir()
    for project, shown in (("other", ""), ("loratune", expected)):
        (tmp_path / "pyproject.toml").write_text(f'[project]\nname = "{project}"\n')
        assert release.commit() == shown


def test_a_damaged_repository_is_not_one_above_it(
    record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the one that a hook of git names."""
    git = ["git", "-c", "user.name=x", "-c", "user.email=x", "-C", str(tmp_path)]
    run_command([*git, "init", "--quiet"], check=True)
    run_command([*git, "commit", "--quiet", "--allow-empty", "--message=x"], check=True)
    inner = tmp_path / "inner"
    (inner / ".git").mkdir(parents=True)
    (inner / "pyproject.toml").write_text('[project]\nname = "loratune"\n')
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    monkeypatch.setattr(release, "__file__", str(inner / "loratune" / "system" / "release.py"))
    assert release.commit() == ""
    (inner / ".git").rmdir()
    (tmp_path / ".git").rename(inner / ".git")
    assert len(release.commit()) == 12


WITHOUT = """
import os, sys

class Finder:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in {names}:
            os.write(2, f"\\nimports {{name}}\\n".encode())
            os._exit(77)

sys.meta_path.insert(0, Finder())
from loratune.__main__ import main
main()
"""


def without(names: set[str], *arguments: object) -> Ran:
    """Runs a command in a new process, which ends with 77 as soon as one of the modules is imported."""
    command = [sys.executable, "-c", WITHOUT.format(names=names), *map(str, arguments)]
    done = run_command(command, capture_output=True, text=True, env=os.environ, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)


def test_help_imports_neither_numpy_nor_pydantic_models() -> None:
    ran = without({"numpy", "yaml", "uniplot", "psutil", "datasets", "loratune.config", "loratune.api.train"}, "--help")
    assert ran.code == 0, ran.err


def test_train_prints_its_first_line_before_the_libraries_are_imported(run_config: MakeConfig) -> None:
    ran = without({"numpy", "torch", "transformers", "datasets"}, "train", run_config())
    assert ran.code == 77 and ran.err.startswith(f"loratune {__version__}: base "), ran.err


def test_the_changelog_has_this_version() -> None:
    assert f"\n## {__version__} (" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
