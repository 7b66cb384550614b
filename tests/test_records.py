"""Schema versions of records: the current version, no version, and the version of a newer release."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran, check_refused, meanings, tree
from running import run_record

from loratune.codes import Code
from loratune.errors import ResumeError
from loratune.system import files
from loratune.training.checkpoints import run_dir
from loratune.training.checkpoints.store import Checkpoints, newest_whole

pytestmark = pytest.mark.usefixtures("untraced_module")

Cli = Callable[..., Ran]
MakeConfig = Callable[..., Path]
NEWER = "has schema_version 2, and this release of loratune reads versions up to 1"
WRONG = (2, 0, -1, True, "1", None, 1.0)


def edit(path: Path, **changes: Any) -> None:
    """Change a key of a record. None removes the key."""
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in record.items() if value is not None}))


def test_only_integers_up_to_the_current_version_are_accepted() -> None:
    assert files.newer({}) == files.newer(files.versioned({})) == ""
    for other in (*WRONG, files.VERSION + 1):
        assert (files.newer({files.VERSION_KEY: other}) != "") == (type(other) is not int or other != files.VERSION)


def test_adapter_record_of_a_newer_release_is_refused(run_config: MakeConfig, cli: Cli, tmp_path: Path) -> None:
    config = run_config(training={"max_steps": 1})
    assert cli("train", config, "--allow-worse").code == 0
    path = tmp_path / "out" / "loratune.json"
    assert json.loads(path.read_text())["schema_version"] == 1
    commands = [
        ("params", "--adapter", tmp_path / "out"),
        ("generate", "--adapter", tmp_path / "out", "--max-new-tokens", 1, "3 and 3 make"),
        ("evaluate", "--adapter", tmp_path / "out", "--data", tmp_path / "rows.jsonl"),
    ]
    for version in (None, 2):
        edit(path, schema_version=version)
        for command in commands:
            ran = cli(*command)
            if version != 2:
                assert ran.code == 0, ran.err
                continue
            check_refused(ran, 5, (Code.ADAPTER_NEWER_RECORD, str(path), ""))
            assert NEWER in ran.err and ran.err.count("\n") == 1
    before = tree(tmp_path / "out")
    ran = cli("train", config, "--overwrite")
    check_refused(ran, 2, (Code.ADAPTER_NEWER_RECORD, str(path), "output_dir"))
    assert f"{path}: output_dir: {NEWER}" in ran.err
    assert tree(tmp_path / "out") == before
    edit(path, schema_version=None)
    ran = cli("train", config, "--overwrite", "--allow-worse")
    assert ran.code == 0, ran.err
    assert json.loads(path.read_text())["schema_version"] == 1


NEEDED = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The records of two checkpoints of a run."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", run_record(), 0)
    for step in (1, 2):
        with checkpoints.writing(step):
            directory = checkpoints.unfinished / f"checkpoint-{step}"
            directory.mkdir(parents=True)
            for name in NEEDED:
                (directory / name).write_text(name)
    return checkpoints.directory


@pytest.mark.parametrize("name", ["run.json", "manifest.json"])
def test_checkpoint_records_of_a_newer_release_are_refused(name: str, kept: Path) -> None:
    """The run does not continue from an older checkpoint if the newest is from a newer release."""
    newest = kept / "checkpoint-2"
    path, manifest = newest / name, newest / "manifest.json"
    assert json.loads(path.read_text())["schema_version"] == 1
    for version in (1, None, 2):
        edit(path, schema_version=version)
        if name == "run.json":
            content = path.read_bytes()
            edit(manifest, **{name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}})
        if version != 2:
            found, run, skipped = newest_whole(kept)
            assert (found, run, skipped) == (newest, run_record(), [])
            continue
        with pytest.raises(ResumeError) as caught:
            newest_whole(kept)
        assert meanings(caught.value) == [(Code.ADAPTER_NEWER_RECORD, str(path), "")]
        assert f"{path}: {NEWER}" in str(caught.value)


def test_resume_refuses_a_checkpoint_of_a_newer_release(
    kept: Path, run_config: MakeConfig, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    kept.rename(tmp_path / "out.partial" / "checkpoints")
    path = tmp_path / "out.partial" / "checkpoints" / "checkpoint-2" / "manifest.json"
    edit(path, schema_version=2)
    before = tree(tmp_path / "out.partial")
    ran = cli("train", run_config(), "--resume")
    check_refused(ran, 7, (Code.ADAPTER_NEWER_RECORD, str(path), ""))
    assert f"]: {path}: {NEWER}" in ran.err
    assert tree(tmp_path / "out.partial") == before


def test_file_named_like_the_version_key_is_not_the_version(kept: Path) -> None:
    (kept / "checkpoint-1" / "schema_version").write_text("a stranger")
    assert run_dir.scan_checkpoints(kept / "checkpoint-1").foreign == ["schema_version"]
