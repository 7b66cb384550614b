"""`loratune sweep`: what is tried, told before the first trial, shared, interrupted, compared, and published."""

import itertools
import json
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Ran, check_refused, config_in, tiny_llama, tree, write_rows
from fork_server import Child, ForkServer
from running import WEIGHTS, MakeConfig, until
from transformers import PreTrainedTokenizerFast

from loratune.codes import Code
from loratune.commands.sweep import budget, grid
from loratune.commands.sweep.study import Study
from loratune.config import LoraSection
from loratune.errors import ConfigError, ResourceError
from loratune.evaluation.study_results import BEST, LIKE_BEST, WORSE, RowLosses, StudyResults, TrialResult, rank
from loratune.lora import attach, tensors
from loratune.model.fingerprints import BaseState

Cli = Callable[..., Ran]
RATES = ("--grid", "training.learning_rate=1e-3,1e-2")
RANKS = ("--grid", "lora.r=2,4")
HELD_OUT = [{"prompt": f"{number} and {number} make", "completion": f" {number + number}"} for number in range(40, 60)]


def study_config(folder: Path, make: MakeConfig, **sections: Any) -> Path:
    """The config of the tests' tiny run with a file of validation rows."""
    validation = str(write_rows(folder / "held-out.jsonl", HELD_OUT))
    data = {"train": str(folder / "rows.jsonl"), "validation": validation} | sections.pop("data", {})
    return make(data=data, **sections)


@pytest.fixture
def config(tmp_path: Path, run_config: MakeConfig) -> Callable[..., Path]:
    """Writes such a config into the folder of a test."""
    return lambda **sections: study_config(tmp_path, run_config, **sections)


def results(folder: Path) -> StudyResults:
    return StudyResults.read(folder / "out.study")


def states(folder: Path) -> list[str]:
    return [trial.state for trial in results(folder).trials]


@pytest.fixture(scope="module")
def swept(processes: ForkServer, tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """A folder with a sweep over two rates and two ranks, and what it printed in `said`."""
    folder = tmp_path_factory.mktemp("swept")
    child = processes.start("sweep", study_config(folder, config_in(folder, tiny_dir)), *RATES, *RANKS)
    assert child.wait() == 0, child.said()
    (folder / "said").write_text(child.out.read_text())
    (folder / "told").write_text(child.said())
    return folder


# What is tried


def test_values_stand_between_commas_outside_of_brackets_and_quotes() -> None:
    parsed = grid.parse(["lora.target_modules=[q,v],all-linear", "lora.r= 8, 16"], Path("c.yaml"), [])
    assert [axis.values for axis in parsed.axes] == [("[q,v]", "all-linear"), ("8", "16")]
    assert [grid.label(one) for one in parsed.combinations()] == [
        "lora.target_modules=[q,v] lora.r=8",
        "lora.target_modules=[q,v] lora.r=16",
        "lora.target_modules=all-linear lora.r=8",
        "lora.target_modules=all-linear lora.r=16",
    ]


def test_the_first_combinations_span_the_grid() -> None:
    """A sweep that is cut short has tried high and low values of each key."""
    options = ["training.learning_rate=1e-4,3e-4,1e-3", "lora.r=4,8,16", "lora.lora_alpha=16"]
    order = grid.parse(options, Path("c.yaml"), []).spread_out()
    shown = [(one["training.learning_rate"], one["lora.r"]) for one in order]
    assert shown[:5] == [("1e-4", "4"), ("1e-3", "16"), ("1e-4", "16"), ("3e-4", "8"), ("1e-3", "4")]
    assert sorted(shown) == sorted(itertools.product(("1e-4", "3e-4", "1e-3"), ("4", "8", "16")))


def test_ranges_are_whole_or_logarithmic_by_their_ends() -> None:
    rate, rank_, dropout = grid.parse(
        ["training.learning_rate=1e-5..1e-3", "lora.r=4..8", "lora.lora_dropout=0..0.2"], Path("c.yaml"), []
    ).axes
    assert rate.is_range and rate.is_logarithmic and not rate.is_whole
    assert rank_.is_whole and not rank_.is_logarithmic and not dropout.is_logarithmic


@pytest.mark.parametrize(
    ("option", "code", "key"),
    [
        ("lora.r", Code.SWEEP_BAD_GRID, ""),
        ("lora.r=8,,16", Code.SWEEP_BAD_GRID, "lora.r"),
        ("training.learning_rate=1e-3..1e-5", Code.SWEEP_BAD_GRID, "training.learning_rate"),
        ("model.dtype=float32,bfloat16", Code.SWEEP_KEY, "model.dtype"),
        ("data.validation=0.1,0.2", Code.SWEEP_KEY, "data.validation"),
        ("output_dir=a,b", Code.SWEEP_KEY, "output_dir"),
    ],
)
def test_what_is_no_grid_is_refused(option: str, code: Code, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        grid.parse([option], Path("c.yaml"), [])
    assert [(one.code, one.key) for one in refused.value.problems] == [(code, key)]


@pytest.mark.parametrize(
    ("text", "seconds"), [("30m", 1800), ("1h", 3600), ("1h30m", 5400), ("2", 120), ("0.5", 30), ("45s", 45)]
)
def test_a_budget_is_a_time_or_minutes(text: str, seconds: float) -> None:
    assert budget.parse(text) == seconds


@pytest.mark.parametrize("text", ["0", "", "soon", "-5", "30 monkeys", "1e99h", "\u0661m", "\u0663", "1_0"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        budget.parse(text)


# Told before the first trial


def test_an_unknown_key_is_told_with_what_was_meant(cli: Cli, config: MakeConfig, tmp_path: Path) -> None:
    ran = cli("sweep", config(), "--grid", "training.lerning_rate=1e-3,1e-2")
    check_refused(ran, 2, (Code.CONFIG_UNKNOWN_KEY, "--grid", "training.lerning_rate"))
    assert "learning_rate" in ran.errors[0]
    assert not (tmp_path / "out.study").exists()


def test_each_value_and_each_combination_is_checked(cli: Cli, config: MakeConfig, tmp_path: Path) -> None:
    ran = cli("sweep", config(), "--grid", "lora.r=4,0,7", "--grid", "lora.init_lora_weights=true,orthogonal")
    assert ran.code == 2 and len(ran.errors) == 2, ran.err
    assert f"[{Code.CONFIG_OUT_OF_RANGE}]" in ran.err  # 0, whatever else is set
    assert f"[{Code.CONFIG_ODD_RANK}]" in ran.err and "lora.r=7 lora.init_lora_weights=orthogonal" in ran.err
    assert not (tmp_path / "out.study").exists()


def test_adapters_are_tried_without_weights_first(cli: Cli, config: MakeConfig, tmp_path: Path) -> None:
    ran = cli("sweep", config(), "--grid", "lora.target_modules=[q],[no_such_module]")
    assert ran.code == 3 and "lora.target_modules=[no_such_module]" in ran.err, ran.err
    assert not (tmp_path / "out.study").exists()


def test_validation_rows_are_needed(cli: Cli, run_config: MakeConfig) -> None:
    ran = cli("sweep", run_config(), *RATES)
    assert ran.code == 2 and f"[{Code.SWEEP_NO_VALIDATION}]" in ran.err


def test_seeds_need_a_file_of_validation_rows(cli: Cli, config: MakeConfig) -> None:
    ran = cli("sweep", config(data={"validation": 0.2}), "--grid", "training.seed=1,2")
    check_refused(ran, 2, (Code.SWEEP_KEY, "--grid", "training.seed"))


def test_something_has_to_vary(cli: Cli, config: MakeConfig) -> None:
    ran = cli("sweep", config())
    check_refused(ran, 2, (Code.USAGE_NEEDS_OPTION, "", "--grid"))
    assert "--grid training.learning_rate=" in ran.err


def test_a_range_needs_an_end(cli: Cli, config: MakeConfig) -> None:
    ran = cli("sweep", config(), "--grid", "training.learning_rate=1e-4..1e-2")
    check_refused(ran, 2, (Code.SWEEP_NO_END, "", "--grid"))


def test_a_budget_shorter_than_one_trial(cli: Cli, config: MakeConfig, tmp_path: Path) -> None:
    ran = cli("sweep", config(training={"num_train_epochs": 100_000}), *RATES, "--budget", "2s")
    check_refused(ran, 2, (Code.SWEEP_BUDGET, "", "--budget"))
    assert not (tmp_path / "out").exists()


def test_the_budget_ends_a_sweep_with_what_is_known(processes: ForkServer, config: MakeConfig, tmp_path: Path) -> None:
    """After the first trial no time is left; the clock is set, so that the machine's speed does not matter."""
    first = "from loratune.commands.sweep.budget import Budget\n"
    first += "Budget.left = property(lambda self: 0.0 if self.ratios else 1e9)"
    file = config()
    child = processes.start("sweep", file, *RATES, "--budget", "1h", first=first)
    assert child.wait() == 0, child.said()
    assert sorted(states(tmp_path)) == ["done", "waiting"] and (tmp_path / "out" / WEIGHTS).exists()
    assert "of the budget are left" in child.out.read_text()
    child = processes.start("sweep", file, *RATES, "--overwrite")
    assert child.wait() == 0 and states(tmp_path) == ["done", "done"], child.said()


def test_a_better_one_replaces_what_the_study_published(
    processes: ForkServer, config: MakeConfig, tmp_path: Path
) -> None:
    """One process ends at its budget, and publishes; another, which was between two trials, finds a better adapter."""
    gate, file = tmp_path / "gate", config()
    arguments = ("sweep", file, "--grid", "training.learning_rate=1e-5,1e-2,1e-3")
    waits = "from loratune.commands.sweep.study import Study\nimport os, time\nclaim, calls = Study.claim, []\n"
    waits += "def later(self, *arguments):\n    calls.append(1)\n"
    waits += f"    while len(calls) > 1 and not os.path.exists({str(gate)!r}): time.sleep(0.01)\n"
    waits += "    return claim(self, *arguments)\nStudy.claim = later"
    ends = "from loratune.commands.sweep.budget import Budget\n"
    ends += "Budget.left = property(lambda self: 0.0 if self.ratios else 1e9)"
    slow = processes.start(*arguments, first=waits)
    until(lambda: (tmp_path / "out.study" / "results.json").exists(), slow)
    quick = processes.start(*arguments, "--budget", "1h", first=ends)
    assert quick.wait() == 0 and "learning_rate: 0.001" in (tmp_path / "out" / "run.yaml").read_text(), quick.said()
    gate.touch()
    assert slow.wait() == 0 and "learning_rate: 0.01" in (tmp_path / "out" / "run.yaml").read_text(), slow.said()
    assert states(tmp_path) == ["done"] * 3 and not (tmp_path / "out.partial").exists()


def test_a_trial_fits_by_the_slowest_so_far() -> None:
    left = budget.Budget(100.0, started=time.monotonic())
    assert left.fits(90) and left.fits(190)  # an estimate without a trial may be off by two
    left.add(estimate=10, seconds=30)
    left.add(estimate=10, seconds=20)
    assert left.expected(20) == 60 and left.fits(20) and not left.fits(40)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """The limit of a file's size is that of a disk which is full; it leaves half a line, which is removed later."""
    study, journal = Study(tmp_path, "out", None, halving=False, seed=0), tmp_path / "journal.log"
    study.check({}, record=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.stat().st_size + 20, hard))
    try:
        with pytest.raises(ResourceError) as full:
            study.enqueue([{"lora.r": "8"}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(one.code, one.where) for one in full.value.problems] == [(Code.SYSTEM_DISK_FULL, str(journal))]
    assert not journal.read_bytes().endswith(b"\n")
    again = Study(tmp_path, "out", None, halving=False, seed=0)
    again.enqueue([{"lora.r": "8"}])
    assert [(one.settings, one.state) for one in again.records()] == [({"lora.r": "8"}, "waiting")]


def test_a_missing_optuna_is_told_with_its_extra(cli: Cli, config: MakeConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "optuna", None)
        ran = cli("sweep", config(), *RATES)
    check_refused(ran, 2, (Code.SWEEP_NO_OPTUNA, "", ""))
    assert "loratune[sweep]" in ran.err


@pytest.mark.parametrize(
    "url",
    ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite+pysqlite://", "sqlite:///file:a?mode=memory&uri=true"],
)
def test_a_study_in_memory_is_refused(cli: Cli, config: MakeConfig, tmp_path: Path, url: str) -> None:
    ran = cli("sweep", config(), *RATES, "--storage", url)
    check_refused(ran, 2, (Code.SWEEP_STORAGE, url, "--storage"))
    assert "sqlite:///study.db" in ran.err and not (tmp_path / "out.study").exists()


def test_an_error_of_the_config_is_told_once(cli: Cli, config: MakeConfig) -> None:
    file = config(lora={"rank": 8})
    ran = cli("sweep", file, *RATES, *RANKS)
    assert ran.code == 2 and len(ran.errors) == 1 and ran.errors[0].startswith(f"{file}:"), ran.err


# A whole sweep


def test_the_table_has_all_trials_the_best_first(swept: Path) -> None:
    found = results(swept)
    losses = [trial.loss for trial in found.trials]
    assert len(losses) == 4 and losses == sorted(losses, key=float)
    assert [trial.verdict for trial in found.trials].count(BEST) == 1 and found.trials[0].verdict == BEST
    told = re.findall(r"^trial (\d): (.*)$", (swept / "told").read_text(), flags=re.MULTILINE)
    assert [settings for _, settings in told] == [
        f"training.learning_rate={rate} lora.r={r}" for rate, r in (("1e-3", 2), ("1e-2", 4), ("1e-3", 4), ("1e-2", 2))
    ]
    said = (swept / "said").read_text()
    for trial in found.trials:
        assert f"{trial.loss:.4f}" in said
    assert f"trial {found.trials[0].number}, training.learning_rate=1e-2" in said
    assert "training.learning_rate: the best value is the highest that was tried; higher ones may be better" in said


def test_the_winner_is_what_train_writes(swept: Path, forked: Cli, tmp_path: Path) -> None:
    best = results(swept).trials[0]
    assignments = [word for key, value in best.settings.items() for word in ("--set", f"{key}={value}")]
    other = tmp_path / "out"
    ran = forked("train", swept / "run.yaml", *assignments, "--set", f"output_dir={other}")
    assert ran.code == 0, ran.err
    mine, theirs = tree(swept / "out"), tree(other)
    assert mine.keys() == theirs.keys()
    same = {name for name in mine if mine[name] == theirs[name]}
    assert mine.keys() - same <= {"loratune.json", "run.yaml", "README.md"}
    run, its = (yaml.safe_load(one["run.yaml"]) for one in (mine, theirs))
    assert run.pop("output_dir") == str(swept / "out") and its.pop("output_dir") == str(other) and run == its
    record, its = (json.loads(one["loratune.json"]) for one in (mine, theirs))
    for key in ("held_out_loss", "first_loss", "last_loss", "gain", "held_out_interval"):
        assert record["metrics"][key] == its["metrics"][key]
    assert best.loss == pytest.approx(record["metrics"]["held_out_loss"], rel=1e-6)


def test_later_trials_find_the_base_as_the_first_did(swept: Path, forked: Cli, tmp_path: Path) -> None:
    """The winner came after others; its bytes are those of a run on a base that no adapter was ever on."""
    assert results(swept).trials[0].number > 0
    assert "changed the base" not in (swept / "told").read_text()


def test_the_table_has_what_each_trial_costs_elsewhere(swept: Path) -> None:
    found = results(swept)
    kept = [trial for trial in found.trials if trial.adapter is not None]
    assert kept and all(trial.unrelated is not None for trial in found.trials)
    for trial in kept:
        assert trial.adapter is not None
        change = json.loads((Path(trial.adapter) / "loratune.json").read_text())["metrics"]["unrelated_text"]["change"]
        assert trial.unrelated == change and f"{change:+.3f}" in (swept / "said").read_text()


def test_only_adapters_that_could_be_chosen_are_kept(swept: Path) -> None:
    for trial in results(swept).trials:
        kept = (swept / "out.study" / "trials" / f"{trial.number:04}" / "out").exists()
        assert kept == (trial.verdict != WORSE)


def test_the_same_command_is_refused_and_overwrites_without_training(swept: Path, forked: Cli, tmp_path: Path) -> None:
    before = tree(swept / "out")
    arguments = ("sweep", swept / "run.yaml", *RATES, *RANKS)
    check_refused(forked(*arguments), 2, (Code.RUN_OUTPUT_EXISTS, str(swept / "out"), "output_dir"))
    ran = forked(*arguments, "--overwrite", "--json")
    assert ran.code == 0 and "trial 0:" not in ran.err, ran.err
    assert json.loads(ran.out)["published"] == str(swept / "out")
    assert tree(swept / "out") == before


def test_more_values_go_on_with_the_study(swept: Path, forked: Cli, tmp_path: Path) -> None:
    for name in ("out.study", "rows.jsonl", "held-out.jsonl"):
        copy = shutil.copytree if (swept / name).is_dir() else shutil.copy
        copy(swept / name, tmp_path / name)
    values = yaml.safe_load((swept / "run.yaml").read_text()) | {"output_dir": str(tmp_path / "out")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    ran = forked("sweep", tmp_path / "run.yaml", "--grid", "training.learning_rate=1e-3,1e-2,2e-2", *RANKS)
    assert ran.code == 0, ran.err
    assert re.findall(r"^trial \d+: (.*)$", ran.err, flags=re.MULTILINE) == [
        f"training.learning_rate=2e-2 lora.r={r}" for r in (4, 2)
    ]
    assert len(results(tmp_path).trials) == 6


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"training": {"weight_decay": 0.1}}, "training.weight_decay"),
        ({"validation": HELD_OUT[:10]}, "the validation rows"),
    ],
)
def test_a_study_of_something_else_is_refused(
    swept: Path, forked: Cli, tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    shutil.copytree(swept / "out.study", tmp_path / "out.study")
    values = yaml.safe_load((swept / "run.yaml").read_text()) | {"output_dir": str(tmp_path / "out")}
    if rows := changed.pop("validation", None):
        values["data"]["validation"] = str(write_rows(tmp_path / "other.jsonl", rows))
    for section, keys in changed.items():
        values[section] |= keys
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    ran = forked("sweep", tmp_path / "run.yaml", *RATES, *RANKS)
    check_refused(ran, 2, (Code.SWEEP_OTHER_STUDY, str(tmp_path / "out.study"), ""))
    assert named in ran.errors[0] and not (tmp_path / "out").exists()


def test_the_report_shows_the_trials(swept: Path, cli: Cli, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert cli("report", "--study", swept / "out.study", "--output", page).code == 0
    text = page.read_text()
    for trial in results(swept).trials:
        assert f"{trial.loss:.4f}" in text
    assert text.count('<svg class="chart"') == 2 and "<script" not in text and "http" not in text.split("</style>")[1]
    check_refused(cli("report", "--study", tmp_path), 2, (Code.SWEEP_NO_STUDY, str(tmp_path), "--study"))
    check_refused(cli("report"), 2, (Code.USAGE_CONFLICT, "", ""))


# Trials without an adapter


def test_a_trial_with_a_time_budget_tells_its_steps(forked: Cli, config: MakeConfig, tmp_path: Path) -> None:
    """Those of the epoch, for which there is time in any case."""
    ran = forked("sweep", config(), "--grid", "training.max_minutes=2,3", "--trials", 1)
    (trial,) = results(tmp_path).trials
    assert ran.code == 0 and trial.state == "done", ran.err
    assert "1 combination of the grid not tried, as --trials is 1" in ran.out
    training = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["training"]
    assert "max_minutes" not in training and training["max_steps"] == trial.steps == 5
    assert trial.settings == {"training.max_minutes": "2"} and trial.values == {"training.max_steps": "5"}
    assert "2 → 5 steps" in ran.out


def test_a_trial_that_diverges_is_a_result(forked: Cli, config: MakeConfig, tmp_path: Path) -> None:
    ran = forked("sweep", config(training={"max_grad_norm": 0.0}), "--grid", "training.learning_rate=1e30,1e-2")
    assert ran.code == 0, ran.err
    assert states(tmp_path) == ["done", "diverged"] and results(tmp_path).trials[1].note
    assert (tmp_path / "out" / WEIGHTS).exists()
    assert [path.name for path in (tmp_path / "out.study" / "trials").iterdir()] == ["0001"]


def test_a_trial_that_is_worse_than_its_base_is_told_as_such(
    forked: Cli, config: MakeConfig, cli: Cli, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """On rows that the base has written itself, of which it is sure, no other adapter can be better."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight *= 50
    model.save_pretrained(tmp_path / "sure")
    tokenizer.save_pretrained(tmp_path / "sure")
    rows = []
    for number in range(20):
        prompt = torch.tensor([tokenizer(f"{number} and {number} make")["input_ids"]])
        ids = model.generate(prompt, max_new_tokens=6, do_sample=False)[0].tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt.shape[1] + ids[prompt.shape[1] :]})
    held_out = {"validation": str(write_rows(tmp_path / "own.jsonl", rows))}
    path = config(data=held_out, model={"name_or_path": str(tmp_path / "sure")})
    ran = forked("sweep", path, "--grid", "training.learning_rate=1e-9,2e-3")
    assert ran.code == 0, ran.err
    assert states(tmp_path) == ["done", "worse than base"]
    assert "1 worse than base" in ran.out and "diverged" not in ran.out + ran.err
    assert cli("report", "--study", tmp_path / "out.study", "--output", tmp_path / "page.html").code == 0
    page = (tmp_path / "page.html").read_text()
    assert "worse than base" in page and "diverged" not in page


def test_all_that_diverge_are_exit_code_6(forked: Cli, config: MakeConfig, tmp_path: Path) -> None:
    ran = forked("sweep", config(), "--grid", "training.learning_rate=1e30,1e29")
    assert ran.code == 6 and f"[{Code.SWEEP_ALL_FAILED}]" in ran.err, ran.err
    assert states(tmp_path) == ["diverged", "diverged"] and not (tmp_path / "out").exists()


# Interrupted, and shared

LONG: dict[str, Any] = {"training": {"num_train_epochs": 6, "save_steps": 4}}


def partial_of(folder: Path) -> list[Path]:
    return [*(folder / "out.study").glob("trials/*/out.partial/checkpoints/checkpoint-*/manifest.json")]


def begun(processes: ForkServer, config: Path, folder: Path) -> Child:
    """A sweep whose first trial has written a checkpoint."""
    child = processes.start("sweep", config, *RATES)
    until(lambda: partial_of(folder), child)
    return child


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_the_same_command_goes_on(
    processes: ForkServer, forked: Cli, config: MakeConfig, tmp_path: Path, number: int
) -> None:
    file = config(**LONG)
    child = begun(processes, file, tmp_path)
    child.send(number)
    code = child.wait()
    assert code == (-9 if number == signal.SIGKILL else 130) and not (tmp_path / "out").exists(), child.said()
    if number == signal.SIGINT:
        assert "the same command goes on" in child.said() and states(tmp_path) == ["waiting", "waiting"]
        assert "0 with an adapter" in child.out.read_text()
    ran = forked("sweep", file, *RATES)
    assert ran.code == 0, ran.err
    assert states(tmp_path) == ["done", "done"]
    assert "continuing" in ran.err or "resum" in ran.err, ran.err
    best = results(tmp_path).trials[0].settings["training.learning_rate"]
    straight = tmp_path / "straight"
    again = forked("train", file, "--set", f"training.learning_rate={best}", "--set", f"output_dir={straight}")
    assert again.code == 0 and (straight / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_two_processes_share_one_study(processes: ForkServer, config: MakeConfig, tmp_path: Path) -> None:
    file = config(training={"num_train_epochs": 10})
    arguments = ("sweep", file, *RATES, "--grid", "lora.r=2,3,4", "--json")
    children = [processes.start(*arguments), processes.start(*arguments)]
    assert [child.wait() for child in children] == [0, 0], children[0].said() + children[1].said()
    tried = [re.findall(r"^trial (\d+):", child.said(), flags=re.MULTILINE) for child in children]
    assert all(tried) and sorted(tried[0] + tried[1]) == [str(number) for number in range(6)]
    published = [json.loads(child.out.read_text())["published"] for child in children]
    assert str(tmp_path / "out") in published
    assert states(tmp_path) == ["done"] * 6 and (tmp_path / "out" / WEIGHTS).exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_database_keeps_the_study(forked: Cli, config: MakeConfig, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    ran = forked("sweep", config(), *RATES, "--storage", url)
    assert ran.code == 0 and states(tmp_path) == ["done", "done"], ran.err
    ran = forked("sweep", config(), *RATES, "--storage", "sqlite:////no/such/directory/study.db", "--overwrite")
    check_refused(ran, 2, (Code.SWEEP_STORAGE, "sqlite:////no/such/directory/study.db", "--storage"))


@pytest.mark.slow
def test_machines_share_a_database_and_keep_their_adapters(
    processes: ForkServer, tmp_path: Path, tiny_dir: Path
) -> None:
    """Two folders that are called alike stand for two machines, which have other names."""
    children, arguments = [], (*RATES, *RANKS, "--storage", f"sqlite:///{tmp_path / 'study.db'}", "--json")
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        first = f"from loratune.commands.sweep import running, study\nrunning.host = study.host = lambda: {name!r}"
        file = study_config(folder, config_in(folder, tiny_dir))
        children.append(processes.start("sweep", file, *arguments, first=first))
    assert [child.wait() for child in children] == [0, 0], children[0].said() + children[1].said()
    tried = [re.findall(r"^trial (\d+):", child.said(), flags=re.MULTILINE) for child in children]
    assert len(tried[0] + tried[1]) == len({*tried[0], *tried[1]}) == 4  # whichever of them put it into the queue
    last = max((json.loads(child.out.read_text()) for child in children), key=lambda one: str(one).count("'done'"))
    owner = 0 if str(last["winner"]) in tried[0] else 1
    published = [(tmp_path / name / "out").exists() for name in ("one", "two")]
    assert not published[1 - owner] and (
        published[owner] or "the same command publishes it there" in str(last["notes"])
    )


@pytest.mark.slow
def test_a_journal_that_was_cut_off_is_read(forked: Cli, config: MakeConfig, tmp_path: Path) -> None:
    file = config()
    assert forked("sweep", file, *RATES).code == 0
    with (tmp_path / "out.study" / "journal.log").open("a") as journal:
        journal.write('{"op_code": 5, "worker_id"')
    ran = forked("sweep", file, "--grid", "training.learning_rate=1e-3,1e-2,2e-2", "--overwrite")
    assert ran.code == 0 and states(tmp_path) == ["done"] * 3, ran.err


def test_numbers_are_drawn_from_a_range(forked: Cli, config: MakeConfig, tmp_path: Path) -> None:
    ran = forked("sweep", config(), "--grid", "training.learning_rate=1e-3..2e-2", *RANKS, "--trials", "3")
    assert ran.code == 0, ran.err
    rates = [float(trial.settings["training.learning_rate"]) for trial in results(tmp_path).trials]
    assert len({*rates}) == 3 and all(1e-3 <= rate <= 2e-2 for rate in rates)


def test_successive_halving_stops_the_worse_ones(forked: Cli, config: MakeConfig, tmp_path: Path) -> None:
    training = {"num_train_epochs": 4, "eval_steps": 1}
    rates = "training.learning_rate=1e-2,1e-7,1e-8,1e-6"  # tried in the order first, last, second, third
    ran = forked("sweep", config(training=training), "--grid", rates, "--halving")
    assert ran.code == 0, ran.err
    assert "stopped early" in states(tmp_path)
    assert results(tmp_path).trials[0].settings["training.learning_rate"] == "1e-2"


@pytest.mark.slow
def test_keys_of_rows_are_tokenized_again_and_compared_on_the_same_rows(
    forked: Cli, config: MakeConfig, tmp_path: Path
) -> None:
    file = config()
    ran = forked("sweep", file, "--grid", "data.max_length=16,64")
    assert ran.code == 0, ran.err
    found = results(tmp_path)
    assert states(tmp_path) == ["done", "done"] and found.trials[0].difference is None
    best = found.trials[0].settings["data.max_length"]
    other = forked("train", file, "--set", f"data.max_length={best}", "--set", f"output_dir={tmp_path / 'other'}")
    assert other.code == 0
    assert (tmp_path / "other" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_initializations_that_change_the_base_are_followed_by_the_same_base(
    forked: Cli, config: MakeConfig, tmp_path: Path
) -> None:
    file = config(training={"num_train_epochs": 3})
    ran = forked("sweep", file, "--grid", "lora.init_lora_weights=pissa,olora,true")
    assert ran.code == 0 and ran.err.count("the adapter has changed the base") == 2, ran.err
    for trial in results(tmp_path).trials:
        init, output = trial.settings["lora.init_lora_weights"], tmp_path / f"alone-{trial.number}"
        if trial.adapter is not None and Path(trial.adapter).exists():
            alone = forked("train", file, "--set", f"lora.init_lora_weights={init}", "--set", f"output_dir={output}")
            assert alone.code == 0
            assert (output / WEIGHTS).read_bytes() == (Path(trial.adapter) / WEIGHTS).read_bytes()


# The base, and the comparison


@pytest.mark.parametrize(
    ("lora", "is_same"),
    [
        ({}, True),
        ({"use_dora": True}, True),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"trainable_token_indices": [5, 6]}, True),
        ({"init_lora_weights": "pissa"}, False),
        ({"bias": "all"}, False),
    ],
    ids=lambda value: str(value),
)
def test_a_base_is_the_same_again_or_said_not_to_be(lora: dict[str, Any], is_same: bool) -> None:
    base = tiny_llama(attention_bias="bias" in lora).eval()
    before, state = {name: tensor.clone() for name, tensor in base.state_dict().items()}, BaseState(base)
    model, _ = attach.adapt(base, LoraSection(**lora), seed=0)
    model.train()
    model.get_base_model().activation_checkpointing_enable()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    assert tensors.detached(model) is base
    same = state.restore(base)
    after = base.state_dict()
    assert same == (before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before))
    assert same == is_same
    assert not base.training and not base.is_activation_checkpointing
    assert all(parameter.requires_grad and parameter.grad is None for parameter in base.parameters())


def test_one_bit_of_a_base_is_seen() -> None:
    base = tiny_llama().eval()
    state = BaseState(base)
    weight = base.model.layers[1].mlp.up_proj.weight.data
    weight.view(torch.int32)[3, 5] ^= 1
    assert not state.restore(base)
    weight.view(torch.int32)[3, 5] ^= 1
    assert state.restore(base)


def test_ranking_compares_row_by_row() -> None:
    generator = torch.Generator().manual_seed(0)
    nats = torch.rand(50, generator=generator).double().numpy() * 20
    tokens, copies = nats * 0 + 10, nats * 0 + 1
    noise = torch.randn(50, generator=generator).double().numpy()
    losses = {
        0: RowLosses(nats + 0.5, tokens, copies),  # worse by half a nat on each row, far less than rows differ
        1: RowLosses(nats, tokens, copies),
        2: RowLosses(nats + 0.3 * (noise - noise.mean()) + 1e-3, tokens, copies),
    }
    trials = [TrialResult(number, {}, {}, "done") for number in (*losses, 3)]
    ranked = rank(trials, {number: RowLosses.unpacked(one.packed()) for number, one in losses.items()})
    assert [(one.number, one.verdict) for one in ranked] == [(1, BEST), (2, LIKE_BEST), (0, WORSE), (3, "")]
    assert ranked[2].difference == pytest.approx(0.05, rel=1e-5)
    assert ranked[0].interval is not None and ranked[0].interval[1] - ranked[0].interval[0] > 0.05


def test_what_a_comparison_leaves_open_is_said() -> None:
    """Where the best values lie at the end of those tried, diverged trials included, and which losses are compared."""

    def remarks(*trials: tuple[dict[str, str], str]) -> list[str]:
        found = [TrialResult(number, values, {}, state) for number, (values, state) in enumerate(trials)]
        first = replace(found[0], verdict=BEST)
        return StudyResults("out", "base", [*trials[0][0]], 9, 9, [first, *found[1:]]).remarks()

    rate, r = "training.learning_rate", "lora.r"
    best = {rate: "1e-3", r: "8"}
    lower, waiting, diverged = ({rate: text, r: "8"} for text in ("1e-4", "1e-2", "2e-3"))
    said = [f"{rate}: the best value is the highest that was tried; higher ones may be better"]
    assert remarks((best, "done"), (lower, "done"), (waiting, "waiting")) == said
    assert remarks((best, "done"), (lower, "done"), (diverged, "diverged")) == []
    assert remarks((best, "done"), (diverged, "done")) == [
        said[0].replace("highest", "lowest").replace("higher", "lower")
    ]
    assert (
        remarks((best, "done")) == remarks(({"data.packing": "full"}, "done"), ({"data.packing": "none"}, "done")) == []
    )
    assert remarks(({"training.seed": "1"}, "done"), ({"training.seed": "2"}, "done")) == []
    (one,) = remarks(({"training.objective": "dpo"}, "done"), ({"training.objective": "simpo"}, "done"))
    assert "favours those that were trained to lower it" in one
