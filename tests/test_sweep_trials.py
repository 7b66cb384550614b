"""Complete runs of `loratune sweep`: trials are trained, compared, interrupted, shared, and the best is published."""

import json
import math
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ATTENTION, Ran, check_refused, config_in, tiny_llama, tree, write_rows
from fork_server import ForkServer
from running import WEIGHTS, MakeConfig, until
from test_preferences import config as preference_config
from test_study import HELD_OUT, RATES, study_config
from transformers import PreTrainedTokenizerFast

from loratune.codes import Code
from loratune.config import LoraSection
from loratune.errors import ConfigError
from loratune.lora import creation, tensors
from loratune.model.fingerprints import BaseState
from loratune.report.study import BEST, WORSE, StudyResults
from loratune.study.trials import Budget

Cli = Callable[..., Ran]
RANKS = ("--grid", "lora.r=2,4")
SHORT: dict[str, Any] = {"training": {"max_steps": 3}}
NO_TIME = "from loratune.study.trials import Budget\nBudget.left = property(lambda self: 0.0 if self.ratios else 1e9)"
"""No time is left after the first trial. The clock is set, so the speed of the machine does not matter."""


@pytest.fixture
def config(tmp_path: Path, run_config: MakeConfig) -> Callable[..., Path]:
    """Writes a sweep config into the folder of a test."""
    return lambda **sections: study_config(tmp_path, run_config, **sections)


def results(folder: Path) -> StudyResults:
    found = StudyResults.read(folder / "out.study")
    assert found is not None
    return found


def states(folder: Path) -> list[str]:
    return [trial.state for trial in results(folder).trials]


@pytest.fixture(scope="module")
def swept(processes: ForkServer, tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """A folder with a sweep over two rates and two ranks. Its stdout is in `said`, its stderr in `log`."""
    folder = tmp_path_factory.mktemp("swept")
    child = processes.start("sweep", study_config(folder, config_in(folder, tiny_dir)), *RATES, *RANKS)
    assert child.wait() == 0, child.said()
    (folder / "said").write_text(child.out.read_text())
    (folder / "log").write_text(child.said())
    return folder


@pytest.fixture
def copied(swept: Path, tmp_path: Path) -> Path:
    """A copy of the sweep without the published adapter, which a test may modify."""
    for name in ("rows.jsonl", "held-out.jsonl"):
        shutil.copy(swept / name, tmp_path / name)
    shutil.copytree(swept / "out.study", tmp_path / "out.study")
    values = yaml.safe_load((swept / "run.yaml").read_text()) | {"output_dir": str(tmp_path / "out")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def adapter(folder: Path, number: int | None = None) -> Path:
    """The adapter of a trial, by default of the best one."""
    number = results(folder).trials[0].number if number is None else number
    return folder / "out.study" / "trials" / f"{number:04}" / "out"


# A complete sweep


def test_table_lists_all_trials_best_first(swept: Path) -> None:
    found = results(swept)
    losses = [trial.loss for trial in found.trials]
    assert len(losses) == 4 and losses == sorted(losses, key=float)
    assert [trial.verdict for trial in found.trials].count(BEST) == 1 and found.trials[0].verdict == BEST
    log = re.findall(r"^trial (\d): (.*)$", (swept / "log").read_text(), flags=re.MULTILINE)
    assert [settings for _, settings in log] == [
        f"training.learning_rate={rate} lora.r={r}" for rate, r in (("1e-3", 2), ("1e-2", 4), ("1e-3", 4), ("1e-2", 2))
    ]
    said = (swept / "said").read_text()
    for trial in found.trials:
        assert f"{trial.loss:.4f}" in said
    assert f"trial {found.trials[0].number}, training.learning_rate=1e-2" in said
    assert "training.learning_rate: the best value is the highest that was tried; higher ones may be better" in said
    assert f"generate --adapter {swept / 'out'} '0 and 0 make'" in said


def test_winner_equals_the_adapter_of_a_train_run(swept: Path, forked: Cli, tmp_path: Path) -> None:
    """Although other trials came before it, and the base was not reloaded."""
    best = results(swept).trials[0]
    assert best.number > 0 and "changed the base" not in (swept / "log").read_text()
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


def test_candidate_adapters_are_kept_with_their_change_on_unrelated_text(swept: Path) -> None:
    for trial in results(swept).trials:
        path = swept / "out.study" / "trials" / f"{trial.number:04}" / "out"
        assert path.exists() == (trial.verdict != WORSE) and trial.unrelated is not None
        if path.exists():
            assert trial.adapter == str(path)
            change = json.loads((path / "loratune.json").read_text())["metrics"]["unrelated_text"]["change"]
            assert trial.unrelated == change and f"{change:+.3f}" in (swept / "said").read_text()


def test_rerun_is_refused_and_overwrites_without_training(swept: Path, forked: Cli) -> None:
    before = tree(swept / "out")
    arguments = ("sweep", swept / "run.yaml", *RATES, *RANKS)
    ran = forked(*arguments)
    check_refused(ran, 2, (Code.OUTPUT_EXISTS, str(swept / "out"), "output_dir"))
    assert "--overwrite" in ran.err
    ran = forked(*arguments, "--overwrite", "--json")
    assert ran.code == 0 and "trial 0:" not in ran.err, ran.err
    assert json.loads(ran.out)["published"] == str(swept / "out")
    assert tree(swept / "out") == before


def test_additional_values_continue_the_study(copied: Path, forked: Cli) -> None:
    ran = forked("sweep", copied / "run.yaml", "--grid", "training.learning_rate=1e-3,2e-2", "--grid", "lora.r=2")
    assert ran.code == 0, ran.err
    found = re.findall(r"^trial \d+: (.*)$", ran.err, flags=re.MULTILINE)
    assert found == ["training.learning_rate=2e-2 lora.r=2"] and len(results(copied).trials) == 5


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"training": {"weight_decay": 0.1}}, "training.weight_decay"),
        ({"validation": HELD_OUT[:10]}, "the validation rows"),
    ],
)
def test_study_with_another_config_is_refused(copied: Path, forked: Cli, changed: dict[str, Any], named: str) -> None:
    values = yaml.safe_load((copied / "run.yaml").read_text())
    if rows := changed.get("validation"):
        values["data"]["validation"] = str(write_rows(copied / "other.jsonl", rows))
    values["training"] |= changed.get("training", {})
    (copied / "run.yaml").write_text(yaml.safe_dump(values))
    ran = forked("sweep", copied / "run.yaml", *RATES, *RANKS)
    check_refused(ran, 2, (Code.SWEEP_STUDY, str(copied / "out.study"), ""))
    assert named in ran.errors[0] and not (copied / "out").exists()


def test_report_on_the_published_adapter_shows_the_trials(swept: Path, cli: Cli, tmp_path: Path) -> None:
    """Not that on an adapter which is another than that of the study beside it."""
    page = tmp_path / "page.html"
    assert cli("report", "--adapter", swept / "out", "--output", page).code == 0
    text, found = page.read_text(), results(swept)
    assert "Held-out loss of the trials" in text and found.summary() in text and found.conclusion() in text
    for name in ("out", "out.study"):
        shutil.copytree(swept / name, tmp_path / name)
    record = tmp_path / "out" / "loratune.json"
    record.write_text(record.read_text() + "\n")
    assert cli("report", "--adapter", tmp_path / "out", "--output", page, "--overwrite").code == 0
    assert "Held-out loss of the trials" not in page.read_text()


# Trials without an adapter


def test_diverged_trial_is_a_result(forked: Cli, config: MakeConfig, tmp_path: Path) -> None:
    """It is not retried, and foreign files stay. If all trials diverge, the exit code is 6."""
    file = config(training={"max_grad_norm": 0.0, "max_steps": 3})
    notes = tmp_path / "out.study" / "trials" / "0000" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    ran = forked("sweep", file, "--grid", "training.learning_rate=1e30")
    assert ran.code == 6 and f"[{Code.SWEEP_ALL_FAILED}]" in ran.err, ran.err
    assert states(tmp_path) == ["diverged"] and not (tmp_path / "out").exists()
    ran = forked("sweep", file, "--grid", "training.learning_rate=1e30,1e-2")
    assert ran.code == 0 and "trial 0: training" not in ran.err, ran.err
    assert states(tmp_path) == ["done", "diverged"] and results(tmp_path).trials[1].note
    assert (tmp_path / "out" / WEIGHTS).exists() and [*notes.parent.iterdir()] == [notes]


def test_foreign_files_at_the_path_of_a_trial_end_the_sweep(forked: Cli, config: MakeConfig, tmp_path: Path) -> None:
    place = tmp_path / "out.study" / "trials" / "0000" / "out"
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    ran = forked("sweep", config(**SHORT), *RATES)
    check_refused(ran, 2, (Code.OUTPUT_OVERWRITE, str(place), "output_dir"))
    assert (place / "notes.txt").read_text() == "mine" and states(tmp_path) == ["interrupted"]


@pytest.mark.slow
def test_time_budgets_can_be_tried(forked: Cli, config: MakeConfig, tmp_path: Path) -> None:
    """No step fits into 6 ms, which counts as a failed trial. Two minutes suffice for all steps of the epoch."""
    ran = forked("sweep", config(), "--grid", "training.max_minutes=2,3,0.0001", "--trials", 2)
    assert ran.code == 0 and "1 combination of the grid not tried, as --trials is 2" in ran.out, ran.err
    done, failed = results(tmp_path).trials
    assert (done.state, failed.state) == ("done", "failed") and "too short" in failed.note and failed.note in ran.out
    training = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["training"]
    assert "max_minutes" not in training and training["max_steps"] == done.steps == 5
    assert done.settings == {"training.max_minutes": "2"} and done.values == {"training.max_steps": "5"}
    assert "2 → 5 steps" in ran.out


def test_trial_worse_than_the_base_is_reported(
    forked: Cli, config: MakeConfig, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The rows are generated by the base, which is certain of them, so no adapter can be better."""
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
    assert ran.code == 6, ran.err
    assert states(tmp_path) == ["learned nothing", "worse than base"]
    assert "diverged" not in ran.out + ran.err


# The budget


def test_sweep_publishes_the_best_so_far_when_the_budget_ends(
    processes: ForkServer, config: MakeConfig, tmp_path: Path
) -> None:
    """The study is stored in a database."""
    file = config(**SHORT)
    arguments = ("sweep", file, *RATES, "--storage", f"sqlite:///{tmp_path / 'study.db'}")
    child = processes.start(*arguments, "--budget", "1h", first=NO_TIME)
    assert child.wait() == 0, child.said()
    assert states(tmp_path) == ["done"] and (tmp_path / "out" / WEIGHTS).exists()
    said = child.out.read_text()
    assert (
        "of the budget are left" in said and "1 combination left; the same command with --overwrite continues" in said
    )
    child = processes.start(*arguments, "--overwrite")
    assert child.wait() == 0 and states(tmp_path) == ["done", "done"], child.said()


def test_budget_is_checked_against_the_slowest_trial_so_far() -> None:
    left = Budget(100.0, started=time.monotonic())
    assert left.fits(90) and left.fits(190)  # before any trial, the estimate may be off by a factor of two
    left.ratios += [3.0, 2.0]
    assert left.expected(20) == 60 and left.fits(20) and not left.fits(40)


def test_budget_used_up_by_trials_is_not_reported_as_too_short() -> None:
    assert not Budget(100.0, started=-1e9, begun=1).fits(90)
    with pytest.raises(ConfigError):
        Budget(100.0, started=-1e9).fits(90)


def test_budget_exceeded_while_loading_leaves_no_study(forked: Cli, config: MakeConfig, tmp_path: Path) -> None:
    """A study would block a sweep over other keys. The second sweep samples values from a range."""
    file = config(**SHORT)
    ran = forked("sweep", file, *RATES, "--budget", "0.001s")
    check_refused(ran, 2, (Code.CONFIG_BUDGET, "", "--budget"))
    assert "have passed before it" in ran.err
    ran = forked("sweep", file, "--grid", "training.learning_rate=1e-3..2e-2", "--grid", "lora.r=2", "--trials", "2")
    assert ran.code == 0, ran.err
    rates = [float(trial.settings["training.learning_rate"]) for trial in results(tmp_path).trials]
    assert len({*rates}) == 2 and all(1e-3 <= rate <= 2e-2 for rate in rates)


# Interrupted and shared sweeps


def test_rerun_resumes_an_interrupted_trial(
    processes: ForkServer, forked: Cli, config: MakeConfig, tmp_path: Path
) -> None:
    """After SIGINT and after SIGKILL. The trial continues from its checkpoint and writes the same bytes."""
    file = config(training={"num_train_epochs": 4, "save_steps": 3})
    sweep = ("sweep", file, "--grid", "training.learning_rate=1e-2,1e-3")  # the first value is the better one
    checkpoints = tmp_path / "out.study" / "trials" / "0000" / "out.partial" / "checkpoints"
    for number, least in ((signal.SIGINT, 3), (signal.SIGKILL, 9)):
        child = processes.start(*sweep)
        written = (checkpoints / f"checkpoint-{n}" / "manifest.json" for n in range(least, 21, 3))
        until(lambda paths=[*written]: any(path.exists() for path in paths), child)
        child.send(number)
        assert child.wait() == (-9 if number == signal.SIGKILL else 130), child.said()
        assert not (tmp_path / "out").exists()
        if number == signal.SIGINT:
            assert "rerun the same command to resume" in child.said() and states(tmp_path) == ["interrupted"]
            assert "0 with an adapter" in child.out.read_text()
        else:
            assert "continuing" in child.said() or "resum" in child.said()
    # Killed again, between asking for the trial anew and giving up the one that was cut off.
    first = "import os, optuna\noptuna.Study.tell = lambda *arguments, **keywords: os.kill(os.getpid(), 9)"
    assert processes.start(*sweep, first=first).wait() == -9
    ran = forked(*sweep)
    assert ran.code == 0 and ("continuing" in ran.err or "resum" in ran.err), ran.err
    assert states(tmp_path) == ["done", "done"] and results(tmp_path).trials[0].number == 0
    assert len([*(tmp_path / "out.study" / "trials").iterdir()]) <= 2
    straight = tmp_path / "straight"
    again = forked("train", file, "--set", "training.learning_rate=1e-2", "--set", f"output_dir={straight}")
    assert again.code == 0 and (straight / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)], ids=["interrupted", "killed"]
)
def test_signal_between_two_trials_loses_no_result(
    processes: ForkServer, forked: Cli, config: MakeConfig, tmp_path: Path, number: signal.Signals
) -> None:
    first = "import os, signal, optuna\ntell, calls = optuna.Study.tell, []\n" + (
        "def later(self, *arguments, **keywords):\n"
        "    result = tell(self, *arguments, **keywords)\n"
        "    calls.append(1)\n"
        f"    if len(calls) == 1: os.kill(os.getpid(), signal.{number.name})\n"
        "    return result\n"
        "optuna.Study.tell = later"
    )
    file = config(**SHORT)
    child = processes.start("sweep", file, *RATES, first=first)
    assert child.wait() == (130 if number == signal.SIGINT else -9)
    if number == signal.SIGINT:
        trials = results(tmp_path).trials
        assert [(one.number, one.state) for one in trials] == [(0, "done")]
    ran = forked("sweep", file, *RATES)
    assert ran.code == 0 and "trial 0:" not in ran.err, ran.err
    assert states(tmp_path) == ["done", "done"]


def test_two_processes_share_one_study(processes: ForkServer, config: MakeConfig, tmp_path: Path) -> None:
    file = config(training={"num_train_epochs": 2})
    arguments = ("sweep", file, *RATES, *RANKS, "--json")
    children = [processes.start(*arguments), processes.start(*arguments)]
    assert [child.wait() for child in children] == [0, 0], children[0].said() + children[1].said()
    tried = [re.findall(r"^trial (\d+):", child.said(), flags=re.MULTILINE) for child in children]
    assert sorted(tried[0] + tried[1]) == ["0", "1", "2", "3"]
    published = [json.loads(child.out.read_text())["published"] for child in children]
    assert str(tmp_path / "out") in published
    found = results(tmp_path).trials
    assert states(tmp_path) == ["done"] * 4 and len({json.dumps(one.settings) for one in found}) == 4
    assert (tmp_path / "out" / WEIGHTS).exists() and not (tmp_path / "out.partial").exists()


def test_better_adapter_replaces_the_published_one(processes: ForkServer, config: MakeConfig, tmp_path: Path) -> None:
    """One process publishes when its budget ends; another one, paused between two trials, then finds a better
    adapter."""
    gate, file = tmp_path / "gate", config(training={"max_steps": 4})
    arguments = ("sweep", file, "--grid", "training.learning_rate=1e-9,1e-2,1e-3")
    waits = "from loratune.study.sweep import Sweep\nimport os, time\nwork, calls = Sweep._next_trial, []\n"
    waits += "def later(self):\n    calls.append(1)\n"
    waits += f"    while len(calls) > 1 and not os.path.exists({str(gate)!r}): time.sleep(0.01)\n"
    waits += "    return work(self)\nSweep._next_trial = later"
    slow = processes.start(*arguments, first=waits)
    until(lambda: (tmp_path / "out.study" / "results.json").exists(), slow)
    quick = processes.start(*arguments, "--budget", "1h", first=NO_TIME)
    assert quick.wait() == 0 and "learning_rate: 0.001" in (tmp_path / "out" / "run.yaml").read_text(), quick.said()
    gate.touch()
    assert slow.wait() == 0 and "learning_rate: 0.01" in (tmp_path / "out" / "run.yaml").read_text(), slow.said()
    assert states(tmp_path)[:2] == ["done"] * 2 and not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_machines_share_a_database_and_keep_their_adapters(
    processes: ForkServer, tmp_path: Path, tiny_dir: Path
) -> None:
    """Two folders stand for two machines. The best adapter is published where it is."""
    arguments, children = (*RATES, *RANKS, "--storage", f"sqlite:///{tmp_path / 'study.db'}", "--json"), []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        file = study_config(folder, config_in(folder, tiny_dir))
        children.append(processes.start("sweep", file, *arguments))
        until(lambda: (tmp_path / "one" / "out.study" / "trials" / "0000").exists(), children[0])
    assert [child.wait() for child in children] == [0, 0], children[0].said() + children[1].said()
    tried = [re.findall(r"^trial (\d+):", child.said(), flags=re.MULTILINE) for child in children]
    assert all(tried) and len({*tried[0], *tried[1]}) == len(tried[0] + tried[1]) >= 4
    last = max((json.loads(child.out.read_text()) for child in children), key=lambda one: str(one).count("'done'"))
    owner, other = ("one", "two") if str(last["winner"]) in tried[0] else ("two", "one")
    ran = [processes.start("sweep", tmp_path / name / "run.yaml", *arguments, "--overwrite") for name in (owner, other)]
    assert [child.wait() for child in ran] == [0, 0]
    assert (tmp_path / owner / "out" / WEIGHTS).exists()
    assert "the same command publishes it there" in ran[1].out.read_text()


@pytest.mark.slow
def test_data_keys_cause_retokenizing_and_use_the_same_validation_rows(
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
def test_base_is_restored_after_initializations_that_change_it(forked: Cli, config: MakeConfig, tmp_path: Path) -> None:
    file = config(training={"num_train_epochs": 3})
    ran = forked("sweep", file, "--grid", "lora.init_lora_weights=pissa,olora,true")
    assert ran.code == 0 and ran.err.count("the adapter has changed the base") == 2, ran.err
    for trial in results(tmp_path).trials:
        init, output = trial.settings["lora.init_lora_weights"], tmp_path / f"alone-{trial.number}"
        if trial.adapter is not None and Path(trial.adapter).exists():
            alone = forked("train", file, "--set", f"lora.init_lora_weights={init}", "--set", f"output_dir={output}")
            assert alone.code == 0
            assert (output / WEIGHTS).read_bytes() == (Path(trial.adapter) / WEIGHTS).read_bytes()


# Files of the winner


def test_missing_or_replaced_adapter_is_not_published(forked: Cli, copied: Path) -> None:
    other = copied / "other"
    ran = forked("train", copied / "run.yaml", "--set", f"output_dir={other}", "--set", "training.learning_rate=5e-3")
    assert ran.code == 0, ran.err
    missing = (Code.SWEEP_STUDY, str(adapter(copied)), "")
    shutil.rmtree(adapter(copied))
    check_refused(forked("sweep", copied / "run.yaml", *RATES, *RANKS), 5, missing)
    shutil.copytree(other, adapter(copied))
    check_refused(forked("sweep", copied / "run.yaml", *RATES, *RANKS), 5, missing)
    assert not (copied / "out").exists()


def test_directory_that_appears_at_output_dir_is_kept(processes: ForkServer, copied: Path) -> None:
    first = "from loratune.study.sweep import Sweep\nimport os\nend = Sweep._finish\n"
    first += f"def later(self, stop):\n    os.mkdir({str(copied / 'out')!r})\n    return end(self, stop)\n"
    first += "Sweep._finish = later"
    child = processes.start("sweep", copied / "run.yaml", *RATES, *RANKS, first=first)
    assert child.wait() == 2 and f"[{Code.OUTPUT_UNUSABLE}]" in child.said()
    assert [*(copied / "out").iterdir()] == []


# The base


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
def test_base_is_restored_or_reported_as_changed(lora: dict[str, Any], is_same: bool) -> None:
    base = tiny_llama(attention_bias="bias" in lora).eval()
    before, state = {name: tensor.clone() for name, tensor in base.state_dict().items()}, BaseState(base)
    model, _ = creation.adapt(base, LoraSection(**ATTENTION, **lora), seed=0)
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


def test_single_bit_change_of_the_base_is_detected() -> None:
    base = tiny_llama().eval()
    state = BaseState(base)
    weight = base.model.layers[1].mlp.up_proj.weight.data
    weight.view(torch.int32)[3, 5] ^= 1
    assert not state.restore(base)
    weight.view(torch.int32)[3, 5] ^= 1
    assert state.restore(base)


# Preference objectives: trials are compared by the loss of the config's own objective

BETAS = ("--grid", "preferences.beta=0.1,0.5")
SIX_STEPS = {"max_steps": 6, "eval_steps": 3}


@pytest.fixture(scope="module")
def preferred(processes: ForkServer, tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """A folder with a sweep over two betas. Its output is in `said`."""
    folder = tmp_path_factory.mktemp("preferred")
    child = processes.start("sweep", preference_config(config_in(folder, tiny_dir), folder, training=SIX_STEPS), *BETAS)
    assert child.wait() == 0, child.said()
    (folder / "said").write_text(child.out.read_text())
    return folder


def test_all_trials_are_measured_by_the_same_loss(preferred: Path, cli: Cli, tmp_path: Path) -> None:
    """By the DPO loss with the config's beta, from log-probabilities of stock layers, regardless of their own beta."""
    found = results(preferred)
    assert (found.unit, found.rows, found.total) == ("pair", 12, 12)
    assert [trial.state for trial in found.trials] == ["done"] * 2
    for trial in found.trials:
        if not adapter(preferred, trial.number).exists():  # worse than the best trial, so it was removed
            continue
        rows = tmp_path / f"{trial.number}.jsonl"
        command = ("evaluate", "--adapter", adapter(preferred, trial.number), "--data", preferred / "held-out.jsonl")
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


def test_table_reports_the_unit_of_the_loss(preferred: Path) -> None:
    said = (preferred / "said").read_text()
    assert said.startswith("✓ better than its base: the loss per pair went from 0.693 to ")
    assert ", by the loss per pair of dpo with beta 0.1, the base as the reference\n" in said
    header = next(line for line in said.splitlines() if line.split()[:1] == ["trial"])
    assert header.split()[:5] == ["trial", "beta", "loss", "per", "pair"]
    assert "on these pairs" in said or "not significantly different from trial" in said


def test_published_loss_matches_that_of_the_run(forked: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """The reference is the adapter the run started from, although it is no longer attached during measurement."""
    first = forked("train", preference_config(run_config, tmp_path, output_dir=str(tmp_path / "first")))
    assert first.code == 0, first.err
    file = preference_config(run_config, tmp_path, lora={"start_from": str(tmp_path / "first")}, training=SIX_STEPS)
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
    file = preference_config(
        run_config, tmp_path, "kto", data={"validation": 0.25}, training={"max_steps": 4, "eval_steps": 2}
    )
    ran = forked("sweep", file, "--grid", "training.learning_rate=1e-3,1e-2", "--budget", "30m")
    assert ran.code == 0, ran.err
    found = results(tmp_path)
    assert found.unit == "answer" and "held-out answers, by the loss per answer of kto with beta 0.1" in ran.out
    metrics = json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]
    assert found.trials[0].loss == pytest.approx(metrics["held_out_loss"], abs=1e-5)


def test_changing_the_measuring_beta_requires_a_new_study(preferred: Path, forked: Cli) -> None:
    """All trials are measured with the config's beta, although each has its own."""
    other = preferred / "other.yaml"
    values = yaml.safe_load((preferred / "run.yaml").read_text())
    other.write_text(yaml.safe_dump(values | {"preferences": {"beta": 0.2}}))
    ran = forked("sweep", other, *BETAS, "--overwrite")
    check_refused(ran, 2, (Code.SWEEP_STUDY, str(preferred / "out.study"), ""))
    assert "what trials are compared by" in ran.errors[0]


def test_objectives_can_be_compared_in_one_sweep(forked: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """ORPO, which has no reference, is also measured by the config's DPO loss."""
    ran = forked(
        "sweep", preference_config(run_config, tmp_path, training=SIX_STEPS), "--grid", "training.objective=dpo,orpo"
    )
    assert ran.code == 0, ran.err
    found: dict[str, Any] = {trial.settings["training.objective"]: trial for trial in results(tmp_path).trials}
    assert found.keys() == {"dpo", "orpo"}
    assert {name: trial.state for name, trial in found.items()} == {"dpo": "done", "orpo": "done"}
    assert found["dpo"].verdict == BEST and found["dpo"].loss < math.log(2) < found["orpo"].loss


@pytest.mark.parametrize("other", ["kto", "sft"])
def test_objective_for_another_row_format_is_refused(
    other: str, cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    ran = cli("sweep", preference_config(run_config, tmp_path), "--grid", f"training.objective=dpo,{other}")
    check_refused(ran, 2, (Code.USAGE_BAD_VALUE, "--grid", "training.objective"))
    assert f"cannot be {other}, as the rows are preference pairs" in ran.err and not (tmp_path / "out.study").exists()
