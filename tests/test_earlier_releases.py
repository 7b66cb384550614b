"""Files written by an earlier revision can be read: adapters, configs, checkpoints and studies.

`release_0.tar.xz` was made by revision 096b964, in a directory of this name, as records contain absolute paths.
"""

import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Ran, alone
from running import WEIGHTS
from safetensors.torch import load_file

PLACE = Path("/tmp/loratune-release-0")


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with the base, rows, configs, two adapters, and an interrupted run and study."""
    with alone("release-0"):
        shutil.rmtree(PLACE, ignore_errors=True)
        with tarfile.open(Path(__file__).with_name("release_0.tar.xz")) as archive:
            archive.extractall(PLACE.parent, filter="data")
        monkeypatch.chdir(PLACE)
        yield PLACE
        shutil.rmtree(PLACE)


def test_an_earlier_checkpoint_is_resumed(cli: Callable[..., Ran], release: Path) -> None:
    """From step 4 of 6, with the same final weights as the uninterrupted run."""
    ran = cli("train", "sft.yaml", "--resume")
    assert ran.code == 0, ran.err
    found, expected = (load_file(release / name / WEIGHTS) for name in ("sft", "whole"))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.numpy() == pytest.approx(expected[name].numpy(), rel=1e-4, abs=1e-7), name
    records = [json.loads((release / name / "loratune.json").read_text()) for name in ("sft", "whole")]
    losses = [[entry["loss"] for entry in record["curve"] if "loss" in entry] for record in records]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(("name", "rows"), [("whole", "rows.jsonl"), ("dpo", "pairs.jsonl")])
def test_an_earlier_adapter_can_be_used(cli: Callable[..., Ran], release: Path, name: str, rows: str) -> None:
    ran = cli("evaluate", "--adapter", release / name, "--data", release / rows, "--json")
    assert ran.code == 0, ran.err
    found, recorded = json.loads(ran.out), json.loads((release / name / "loratune.json").read_text())
    gain = recorded["metrics"]["gain"]
    if name == "dpo":
        assert found["adapter"]["loss"] == pytest.approx(gain["adapter"], rel=1e-4)
    assert found["verdict"] == "better"
    for arguments in (
        ("generate", "--adapter", release / name, "--max-new-tokens", "4", "0 and 0 make"),
        ("report", "--adapter", release / name, "--output", release / f"{name}.html"),
        ("train", release / name / "run.yaml", "--set", f"output_dir={release}/again", "--dry-run"),
    ):
        assert cli(*arguments).code == 0, arguments


def test_an_earlier_study_is_continued(cli: Callable[..., Ran], release: Path) -> None:
    """Two of its trials are finished, and the third is pending."""
    grid = "training.learning_rate=1e-3,1e-2,3e-3"
    ran = cli("sweep", "study.yaml", "--grid", grid)
    assert ran.code == 0, ran.err
    assert (release / "best" / WEIGHTS).is_file()
    results = json.loads((release / "best.study" / "results.json").read_text())
    assert len(results["trials"]) == 3
