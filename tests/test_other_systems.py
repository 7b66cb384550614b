"""The reference path without what only Linux has, as on macOS and Windows; see `other_system.py`."""

import fcntl
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import Ran, run_command
from running import WEIGHTS, MakeConfig

from loratune.codes import Code


def on(system: str, *commands: Sequence[object]) -> tuple[list[int], str, str]:
    """The exit codes of commands, and what they printed in all."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    command = [sys.executable, str(Path(__file__).with_name("other_system.py")), system, words]
    done = run_command(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    lines = done.stdout.splitlines()
    codes = [json.loads(line)["code"] for line in lines if line.startswith('{"code"')]
    assert len(codes) == len(commands), done.stderr
    return codes, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_the_reference_path_trains_without_what_only_linux_has(
    system: str, cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same bytes as the reference path on Linux. A directory that another run uses is refused."""
    config = run_config(training={"max_steps": 2}, data={"validation": 0.2})
    held = tmp_path / "held.partial" / "lock"
    held.parent.mkdir()
    with held.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        codes, out, err = on(
            system,
            ["--version"],
            ["train", config],
            ["train", config, "--set", f"output_dir={tmp_path / 'held'}"],
            ["generate", "--adapter", tmp_path / "out", "--max-new-tokens", 2, "1 and 1 make"],
            [
                "evaluate",
                "--adapter",
                tmp_path / "out",
                "--data",
                tmp_path / "rows.jsonl",
                "--output",
                tmp_path / "scores.jsonl",
            ],
        )
    assert codes == [0, 0, 9, 0, 0], err
    assert f"no compiled code, as none is for {system}" in out and err.count(f"no compiled code is for {system}") == 1
    assert f"[{Code.SYSTEM_LOCKED}]" in err
    record = json.loads((tmp_path / "out" / "loratune.json").read_text())
    assert record["machine"]["compiled_code"] == f"not in use (no compiled code is for {system})"
    assert record["machine"]["peak_memory"]["process"] > 100 << 20
    monkeypatch.setenv("LORATUNE_NATIVE", "0")
    ran = cli("train", config, "--set", f"output_dir={tmp_path / 'linux'}")
    assert ran.code == 0, ran.err
    assert (tmp_path / "linux" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
