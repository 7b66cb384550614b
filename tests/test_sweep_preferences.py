"""`loratune sweep` with preference objectives: trials are compared by the loss of the config's own objective."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Ran, check_refused, config_in
from fork_server import ForkServer
from running import MakeConfig
from test_preferences import config

from loratune.codes import Code
from loratune.report.study import BEST, StudyResults

Cli = Callable[..., Ran]
BETAS = ("--grid", "preferences.beta=0.1,0.5")
SHORT = {"max_steps": 6, "eval_steps": 3}


def results(folder: Path) -> StudyResults:
    return StudyResults.read(folder / "out.study")


def adapter(folder: Path, number: int) -> Path:
    return folder / "out.study" / "trials" / f"{number:04}" / "out"


@pytest.fixture(scope="module")
def swept(processes: ForkServer, tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """A folder with a sweep over two betas. Its output is in `said`."""
    folder = tmp_path_factory.mktemp("swept")
    child = processes.start("sweep", config(config_in(folder, tiny_dir), folder, training=SHORT), *BETAS)
    assert child.wait() == 0, child.said()
    (folder / "said").write_text(child.out.read_text())
    return folder


def test_all_trials_are_measured_by_the_same_loss(swept: Path, cli: Cli, tmp_path: Path) -> None:
    """By the DPO loss with the config's beta, from log-probabilities of stock layers, regardless of their own beta."""
    found = results(swept)
    assert (found.unit, found.rows, found.total) == ("pair", 12, 12)
    assert [trial.state for trial in found.trials] == ["done"] * 2
    for trial in found.trials:
        if not adapter(swept, trial.number).exists():  # worse than the best trial, so it was removed
            continue
        rows = tmp_path / f"{trial.number}.jsonl"
        command = ("evaluate", "--adapter", adapter(swept, trial.number), "--data", swept / "held-out.jsonl")
        assert cli(*command, "--output", rows).code == 0
        losses = []
        for row in map(json.loads, rows.read_text().splitlines()):
            changes = [
                row["adapter"][f"{side}_log_probability"] - row["base"][f"{side}_log_probability"]
                for side in ("chosen", "rejected")
            ]
            losses.append(math.log1p(math.exp(-0.1 * (changes[0] - changes[1]))))
        assert trial.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        assert trial.interval is not None and trial.interval[0] < trial.loss < trial.interval[1]


def test_table_reports_the_unit_of_the_loss(swept: Path) -> None:
    said = (swept / "said").read_text()
    first, *_ = said.splitlines()
    assert first.endswith(
        "compared on 12 held-out pairs, by the loss per pair of dpo with beta 0.1, the base as the reference"
    )
    header = next(line for line in said.splitlines() if line.split()[:1] == ["trial"])
    assert header.split()[:5] == ["trial", "beta", "loss", "per", "pair"]
    assert "on these pairs" in said or "not significantly different from trial" in said


def test_page_reports_the_unit_of_the_loss(swept: Path, cli: Cli, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert cli("report", "--study", swept / "out.study", "--output", page).code == 0
    text = page.read_text()
    for part in (
        "Losses are means over pairs", "held-out pairs", "by the loss per pair of dpo with beta 0.1",
        "loss per pair</th>",
    ):  # fmt: skip
        assert part in text, part
    assert "per supervised token" not in text


def test_published_loss_matches_that_of_the_run(forked: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """The reference is the adapter the run started from, although it is no longer attached during measurement."""
    first = forked("train", config(run_config, tmp_path, output_dir=str(tmp_path / "first")))
    assert first.code == 0, first.err
    file = config(run_config, tmp_path, lora={"start_from": str(tmp_path / "first")}, training=SHORT)
    ran = forked("sweep", file, "--grid", "training.learning_rate=1e-3,1e-2", "--budget", "30m", "--json")
    assert ran.code == 0, ran.err
    values = json.loads(ran.out)
    best = results(tmp_path).trials[0]
    metrics = json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]
    assert best.verdict == BEST and values["winner"] == best.number and values["unit"] == "pair"
    assert best.loss == pytest.approx(metrics["held_out_loss"], abs=1e-5)
    evaluated = forked("evaluate", "--adapter", tmp_path / "out", "--data", tmp_path / "held-out.jsonl")
    assert "was trained with the adapter that it started from as the reference, not the base" in evaluated.err
    assert values["measured_by"] == "dpo with beta 0.1, the adapter that it started from as the reference"


def test_unpaired_preferences_are_measured_per_answer(forked: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    file = config(run_config, tmp_path, "kto", data={"validation": 0.25}, training={"max_steps": 4, "eval_steps": 2})
    ran = forked("sweep", file, "--grid", "training.learning_rate=1e-3,1e-2", "--budget", "30m")
    assert ran.code == 0, ran.err
    found = results(tmp_path)
    assert found.unit == "answer" and "held-out answers, by the loss per answer of kto with beta 0.1" in ran.out
    metrics = json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]
    assert found.trials[0].loss == pytest.approx(metrics["held_out_loss"], abs=1e-5)


def test_changing_the_measuring_beta_requires_a_new_study(swept: Path, forked: Cli) -> None:
    """All trials are measured with the config's beta, although each has its own."""
    other = swept / "other.yaml"
    values = yaml.safe_load((swept / "run.yaml").read_text())
    other.write_text(yaml.safe_dump(values | {"preferences": {"beta": 0.2}}))
    ran = forked("sweep", other, *BETAS, "--overwrite")
    check_refused(ran, 2, (Code.SWEEP_STUDY, str(swept / "out.study"), ""))
    assert "what trials are compared by" in ran.errors[0]


@pytest.mark.parametrize(
    "grid", ["preferences.beta=0.1,0.5", "training.objective=dpo,simpo", "preferences.sft_weight=0,1"]
)
def test_halving_is_refused_if_losses_are_not_comparable(
    grid: str, cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    ran = cli("sweep", config(run_config, tmp_path), "--grid", grid, "--halving")
    check_refused(ran, 2, (Code.USAGE_CONFLICT, "--grid", grid.partition("=")[0]))


def test_objectives_can_be_compared_in_one_sweep(forked: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """ORPO, which has no reference, is also measured by the config's DPO loss."""
    ran = forked("sweep", config(run_config, tmp_path, training=SHORT), "--grid", "training.objective=dpo,orpo")
    assert ran.code == 0, ran.err
    found: dict[str, Any] = {trial.settings["training.objective"]: trial for trial in results(tmp_path).trials}
    assert found.keys() == {"dpo", "orpo"}
    assert {name: trial.state for name, trial in found.items()} == {"dpo": "done", "orpo": "done"}
    assert found["dpo"].verdict == BEST and found["dpo"].loss < math.log(2) < found["orpo"].loss


@pytest.mark.parametrize("other", ["kto", "sft"])
def test_objective_for_another_row_format_is_refused(
    other: str, cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    ran = cli("sweep", config(run_config, tmp_path), "--grid", f"training.objective=dpo,{other}")
    check_refused(ran, 2, (Code.USAGE_BAD_VALUE, "--grid", "training.objective"))
    assert f"cannot be {other}, as the rows are preference pairs" in ran.err and not (tmp_path / "out.study").exists()


@pytest.mark.slow
def test_halving_uses_the_loss_of_the_objective(forked: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    file = config(run_config, tmp_path, training={"max_steps": 8, "eval_steps": 1})
    ran = forked("sweep", file, "--grid", "training.learning_rate=1e-2,1e-7,1e-8,1e-6", "--halving")
    assert ran.code == 0, ran.err
    assert "stopped early" in [trial.state for trial in results(tmp_path).trials]
