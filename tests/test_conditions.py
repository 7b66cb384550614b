"""A run that is resumed in another environment reports it; checkpoints of other releases are compared key by key."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran, check_refused, config_in, is_problem
from running import WEIGHTS, checkpoints, copy_of, stopped

from loratune.codes import Code
from loratune.compare.base_results import COMPUTING_PACKAGES
from loratune.training.checkpoints.store import seal

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def stopped_run(cli: Callable[..., Ran], tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """The folder of a run that was stopped with two checkpoints."""
    folder = tmp_path_factory.mktemp("stopped")
    config = config_in(folder, tiny_dir)(training={"save_steps": 1, "max_steps": 16})
    assert stopped(cli, folder / "out.partial", "train", config).code == 130
    return folder


@pytest.fixture
def interrupted(stopped_run: Path, tmp_path: Path) -> Path:
    """The config of a copy of that run."""
    return copy_of(stopped_run, tmp_path)


def edited(partial: Path, edit: Edit) -> int:
    """Edits the records of the checkpoints. Returns the step of the newest one."""
    for path in checkpoints(partial):
        run = json.loads((path / "run.json").read_text())
        edit(run)
        (path / "manifest.json").unlink()
        (path / "run.json").write_text(json.dumps(run))
        seal(path)
    return int(checkpoints(partial)[0].name.split("-")[1])


def test_a_checkpoint_records_its_environment(interrupted: Path, tmp_path: Path) -> None:
    kept = json.loads((checkpoints(tmp_path / "out.partial")[0] / "run.json").read_text())["conditions"]
    assert {*COMPUTING_PACKAGES} <= kept.keys() and kept["torch"] == torch.__version__
    assert kept["the number of threads"] == str(torch.get_num_threads())
    assert re.fullmatch(r"in use \(build \w+\)", kept["the compiled CPU code"])
    assert kept["what PyTorch computes instead of fast code"] == "nothing"


def test_a_different_environment_is_reported_and_recorded(
    cli: Callable[..., Ran], interrupted: Path, tmp_path: Path
) -> None:
    """The checkpoint is edited to say that it was computed in another environment."""
    step = edited(
        tmp_path / "out.partial", lambda run: run["conditions"].update({"torch": "2.0", "the number of threads": "64"})
    )
    ran = cli("train", interrupted, "--resume")
    assert ran.code == 0, ran.err
    threads = torch.get_num_threads()
    lines = ran.err.splitlines()
    place = lines.index(f"torch was 2.0 up to step {step}, and is {torch.__version__} from there")
    assert lines[place + 1] == f"the number of threads was 64 up to step {step}, and is {threads} from there"
    assert lines[place + 2] == "so the result may differ in its last digits from that of an uninterrupted run"
    assert lines[place + 3] == f"resuming from step {step}"
    made = json.loads((tmp_path / "out" / "loratune.json").read_text())
    assert made["changes"][0] == {"step": step, "key": "torch", "was": "2.0", "is": torch.__version__}
    assert f"torch was 2.0 up to step {step}, then {torch.__version__}" in (tmp_path / "out" / "README.md").read_text()


def test_the_same_environment_is_not_mentioned(cli: Callable[..., Ran], interrupted: Path) -> None:
    ran = cli("train", interrupted, "--resume")
    assert ran.code == 0 and " up to step " not in ran.err and "last digits" not in ran.err


def test_resuming_without_the_compiled_kernels_is_reported(
    forked: Callable[..., Ran], interrupted: Path, tmp_path: Path
) -> None:
    """The kernels are really disabled here."""
    ran = forked("train", interrupted, "--resume", LORATUNE_NATIVE="0", OMP_NUM_THREADS=str(torch.get_num_threads()))
    assert ran.code == 0, ran.err
    lines = [re.sub(r"build \w+", "build ID", re.sub(r"step \d+", "step N", line)) for line in ran.err.splitlines()]
    assert [line for line in lines if " up to step " in line] == [
        "the compiled CPU code was in use (build ID) up to step N, and is not in use (LORATUNE_NATIVE is 0: unset it) "
        "from there",
        "what PyTorch computes instead of fast code was nothing up to step N, and is attention, feed-forward "
        "layers, norms from there",
    ]
    reason = "attention, feed-forward layers, norms: LORATUNE_NATIVE is 0: unset it\n"
    assert ran.err.count(reason) == 1
    assert (tmp_path / "out" / WEIGHTS).is_file()


def older(run: dict[str, Any]) -> None:
    """Remove the keys that an older release did not have."""
    del run["conditions"], run["config"]["lora"]["use_lorafa"], run["config"]["model"]["torch_compile"]
    del run["config"]["data"]["train"]["weight"], run["config"]["lora"]["rank_pattern"]


def test_keys_unknown_to_an_older_release_take_their_defaults(
    cli: Callable[..., Ran], interrupted: Path, tmp_path: Path
) -> None:
    edited(tmp_path / "out.partial", older)
    for key, value in (("lora.use_lorafa", "true"), ("lora.rank_pattern", "{q: 4}")):
        refused = cli("train", interrupted, "--resume", "--set", f"{key}={value}")
        check_refused(refused, 7, (Code.RESUME_CHANGED, "", key if value == "true" else f"{key}.q"))
        assert "change it back" in refused.err
    ran = cli("train", interrupted, "--resume")
    assert ran.code == 0, ran.err
    assert (
        "the checkpoint does not record what it was computed with: the result may differ in its last digits" in ran.err
    )
    assert json.loads((tmp_path / "out" / "loratune.json").read_text())["changes"] == []


def test_keys_unknown_to_this_release_are_refused_unless_null(
    cli: Callable[..., Ran], interrupted: Path, tmp_path: Path
) -> None:
    def newer(run: dict[str, Any]) -> None:
        run["config"]["lora"]["use_telepathy"] = 3
        run["config"]["telepathy"] = {"on": True}
        run["conditions"]["loratune"] = "9.9"

    edited(tmp_path / "out.partial", newer)
    refused = cli("train", interrupted, "--resume")
    assert refused.code == 7
    for key, value in (("lora.use_telepathy", "3"), ("telepathy", '{"on": true}')):
        (line,) = [line for line in refused.errors if is_problem(line, (Code.RESUME_CHANGED, "", key))]
        assert f": was {value} in the release of loratune " in line
        assert line.endswith("; finish the run with loratune 9.9, which started it, or start afresh with --overwrite")

    def empty(run: dict[str, Any]) -> None:
        run["config"]["lora"]["use_telepathy"] = None
        del run["config"]["telepathy"]

    edited(tmp_path / "out.partial", empty)
    ran = cli("train", interrupted, "--resume")
    assert ran.code == 0, ran.err
