"""What a sweep tries, which mistakes are refused before the first trial, and how its study and results are kept."""

import itertools
import os
import resource
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import Ran, check_refused, meanings, tree, write_rows
from optuna.distributions import FloatDistribution, IntDistribution
from running import MakeConfig

from loratune.codes import Code
from loratune.compare.metrics import RowLosses
from loratune.errors import ConfigError, LockedError, ResourceError, ResumeError, install
from loratune.report.study import BEST, DONE, LIKE_BEST, WORSE, StudyResults, TrialResult, rank
from loratune.study import grid
from loratune.study.sweep import Study

Cli = Callable[..., Ran]
RATES = ("--grid", "training.learning_rate=1e-3,1e-2")
HELD_OUT = [{"prompt": f"{number} and {number} make", "completion": f" {number + number}"} for number in range(40, 60)]


def study_config(folder: Path, make: MakeConfig, **sections: Any) -> Path:
    """The config of the tiny run with a file of validation rows."""
    validation = str(write_rows(folder / "held-out.jsonl", HELD_OUT))
    data = {"train": str(folder / "rows.jsonl"), "validation": validation} | sections.pop("data", {})
    return make(data=data, **sections)


@pytest.fixture
def config(tmp_path: Path, run_config: MakeConfig) -> Callable[..., Path]:
    """Writes such a config into the folder of a test."""
    return lambda **sections: study_config(tmp_path, run_config, **sections)


# The grid


def parsed(*options: str) -> grid.Grid:
    return grid.parse(options, Path("c.yaml"), [])


def test_commas_in_brackets_and_quotes_are_part_of_a_value() -> None:
    found = parsed("lora.target_modules=[q,v],all-linear", "lora.r= 8, 16")
    assert [axis.values for axis in found.axes] == [("[q,v]", "all-linear"), ("8", "16")]
    assert [grid.label(one) for one in found.combinations()] == [
        "lora.target_modules=[q,v] lora.r=8",
        "lora.target_modules=[q,v] lora.r=16",
        "lora.target_modules=all-linear lora.r=8",
        "lora.target_modules=all-linear lora.r=16",
    ]


def test_first_combinations_cover_the_ends_of_the_grid() -> None:
    """A sweep that ends early has tried low and high values of each key."""
    order = parsed("training.learning_rate=1e-4,3e-4,1e-3", "lora.r=4,8,16", "lora.lora_alpha=16").spread_out()
    shown = [(one["training.learning_rate"], one["lora.r"]) for one in order]
    assert shown[:5] == [("1e-4", "4"), ("1e-3", "16"), ("1e-4", "16"), ("3e-4", "8"), ("1e-3", "4")]
    assert sorted(shown) == sorted(itertools.product(("1e-4", "3e-4", "1e-3"), ("4", "8", "16")))


def test_ranges_are_integer_linear_or_logarithmic() -> None:
    axes = parsed("training.learning_rate=1e-5..1e-3", "lora.r=4..8", "lora.lora_dropout=0..0.2").axes
    assert [axis.distribution for axis in axes] == [
        FloatDistribution(1e-5, 1e-3, log=True), IntDistribution(4, 8), FloatDistribution(0, 0.2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("lora.r", ""),
        ("lora.r=8,,16", "lora.r"),
        ("training.learning_rate=1e-3..1e-5", "training.learning_rate"),
        ("model.dtype=float32,bfloat16", "model.dtype"),
        ("data.validation=0.1,0.2", "data.validation"),
        ("output_dir=a,b", "output_dir"),
        ("lora={r: 2},{r: 4}", "lora"),
        (f"lora.r={','.join(map(str, range(10_001)))}", ""),
    ],
)
def test_malformed_grids_are_refused(option: str, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parsed(option)
    assert [(one.code, one.key) for one in refused.value.problems] == [(Code.USAGE_BAD_VALUE, key)]


@pytest.mark.parametrize(
    ("text", "seconds"), [("30m", 1800), ("1h", 3600), ("1h30m", 5400), ("2", 120), ("0.5", 30), ("45s", 45)]
)
def test_budgets_are_parsed_with_and_without_units(text: str, seconds: float) -> None:
    assert grid.parse_time(text) == seconds


@pytest.mark.parametrize("text", ["0", "", "soon", "-5", "30 monkeys", "1e99h", "\u0661m", "\u0663", "1_0"])
def test_malformed_budgets_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        grid.parse_time(text)


# Refused before the first trial

REFUSED: dict[str, tuple[dict[str, Any], tuple[object, ...], int, tuple[Code, str, str], str]] = {
    "an unknown key": (
        {}, ("--grid", "training.lerning_rate=1e-3,1e-2"), 2,
        (Code.CONFIG_UNKNOWN_KEY, "--grid", "training.lerning_rate"), "learning_rate",
    ),
    "one value in two spellings": (
        {}, ("--grid", "training.learning_rate=1e-3,0.001"), 2, (Code.USAGE_BAD_VALUE, "--grid", ""), "once",
    ),
    "seeds without a file of validation rows": (
        {"data": {"validation": 0.2}}, ("--grid", "training.seed=1,2"), 2,
        (Code.USAGE_BAD_VALUE, "--grid", "training.seed"), "",
    ),
    "no grid": ({}, (), 2, (Code.USAGE_CONFLICT, "", "--grid"), "--grid training.learning_rate="),
    "a range without an end": (
        {}, ("--grid", "training.learning_rate=1e-4..1e-2"), 2, (Code.USAGE_CONFLICT, "", "--grid"), "--trials",
    ),
    "a budget shorter than one trial": (
        {"training": {"num_train_epochs": 100_000}}, (*RATES, "--budget", "2s"), 2,
        (Code.CONFIG_BUDGET, "", "--budget"), "is shorter than one trial",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_reported_before_the_first_trial(name: str, cli: Cli, config: MakeConfig, tmp_path: Path) -> None:
    sections, arguments, exit_code, problem, words = REFUSED[name]
    ran = cli("sweep", config(**sections), *arguments)
    check_refused(ran, exit_code, problem)
    assert words in ran.errors[0] and not (tmp_path / "out").exists()
    assert [*tmp_path.glob("out.study/trials/*")] == []


def test_each_value_and_each_combination_is_checked(cli: Cli, config: MakeConfig, tmp_path: Path) -> None:
    ran = cli("sweep", config(), "--grid", "lora.r=4,0,7", "--grid", "lora.init_lora_weights=true,orthogonal")
    assert ran.code == 2 and len(ran.errors) == 2, ran.err
    assert f"[{Code.CONFIG_BAD_VALUE}]" in ran.err  # 0 is invalid whatever else is set
    assert f"[{Code.CONFIG_BAD_VALUE}]" in ran.err and "lora.r=7 lora.init_lora_weights=orthogonal" in ran.err
    assert not (tmp_path / "out.study").exists()


def test_targets_are_checked_before_loading_weights(cli: Cli, config: MakeConfig, tmp_path: Path) -> None:
    ran = cli("sweep", config(), "--grid", "lora.target_modules=[q],[no_such_module]")
    assert ran.code == 3 and "lora.target_modules=[no_such_module]" in ran.err, ran.err
    assert not (tmp_path / "out.study").exists()


def test_validation_rows_are_required(cli: Cli, run_config: MakeConfig) -> None:
    path = run_config()
    check_refused(cli("sweep", path, *RATES), 2, (Code.CONFIG_MISSING_KEY, str(path), "data.validation"))


def test_config_error_is_reported_once(cli: Cli, config: MakeConfig) -> None:
    file = config(lora={"rank": 8})
    ran = cli("sweep", file, *RATES, "--grid", "lora.r=2,4")
    assert ran.code == 2 and len(ran.errors) == 1 and ran.errors[0].startswith(f"{file}:"), ran.err


def test_missing_optuna_is_reported_with_the_extra_to_install(cli: Cli, config: MakeConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "optuna", None)
        ran = cli("sweep", config(), *RATES)
    check_refused(ran, 2, (Code.SYSTEM_MISSING_PACKAGE, "", ""))
    assert install("sweep") in ran.err


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite+pysqlite://", "sqlite:///file:a?mode=memory&uri=true",
        "sqlite:////no/such/directory/study.db", "sqlite:///a\0b", "study.db", "", "nosuch://x", "oracle://host/x",
        "mysql://h:a/db", "mysql:joe:hunter2@host",
    ],
)  # fmt: skip
def test_invalid_storage_url_is_a_usage_error(cli: Cli, config: MakeConfig, tmp_path: Path, url: str) -> None:
    ran = cli("sweep", config(), *RATES, "--storage", url)
    assert ran.code == 2 and f"[{Code.SWEEP_STUDY}]" in ran.err and "--storage" in ran.err, ran.err
    assert "sqlite:///study.db" in ran.err and "hunter2" not in ran.err + ran.out
    assert not (tmp_path / "out.study").exists()


# The study


RANGE, VALUES = parsed("lora.r=2..8").axes, parsed("lora.r=2,4,8").axes
_ANY = ".*"  # messages of numpy, zlib and base64


def opened(folder: Path, url: str | None = None) -> Study:
    study = Study(folder, "out", url, seed=0)
    study.check({}, record=True)  # as a sweep does before its first trial
    return study


def rank_of(r: str) -> dict[str, str]:
    return {"lora.r": r}


def states(study: Study) -> list[tuple[int, str]]:
    return [(one.number, one.state) for one in study.records()]


NOT_OURS: dict[str, Callable[[Path], object]] = {
    "a directory of something else": lambda study: (study / "notes.txt").write_text("mine"),
    "a file in place of the study": lambda study: (study.rmdir(), study.write_text("mine")),
    "an unfinished line": lambda study: (study / "journal.log").write_text("mine"),
    "lines of text": lambda study: (study / "journal.log").write_text("a\nb\nand half a lin"),
    "other JSON": lambda study: (study / "journal.log").write_text('{"level": 3}\n{"level"'),
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_foreign_files_are_refused_and_left_unchanged(name: str, tmp_path: Path) -> None:
    study = tmp_path / "out.study"
    study.mkdir()
    NOT_OURS[name](study)
    before = tree(tmp_path)
    with pytest.raises((ConfigError, ResumeError)) as refused:
        opened(study)
    assert refused.value.problems[0].code == Code.SWEEP_STUDY and tree(tmp_path) == before


def test_optuna_study_of_another_program_is_refused(tmp_path: Path) -> None:
    """Its trials would be mistaken for those of the sweep."""
    url = f"sqlite:///{tmp_path / 'theirs.db'}"
    theirs = optuna.create_study(study_name="out", storage=url)
    theirs.ask()
    theirs.enqueue_trial({"x": 0.9})
    optuna.create_study(study_name="out", storage=f"{url}2", direction="maximize")
    for one in (url, f"{url}2"):
        with pytest.raises(ConfigError) as refused:
            opened(tmp_path / "study", one)
        assert meanings(refused.value) == [(Code.SWEEP_STUDY, one, "")]
    theirs = optuna.load_study(study_name="out", storage=url)
    assert [trial.state.name for trial in theirs.trials] == ["RUNNING", "WAITING"] and not theirs.user_attrs


def test_directory_of_a_study_with_another_name_is_refused(tmp_path: Path) -> None:
    opened(tmp_path)
    with pytest.raises(ConfigError) as refused:
        Study(tmp_path, "new", None, seed=0)
    assert refused.value.problems[0].code == Code.SWEEP_STUDY and "'out'" in refused.value.problems[0].what


@pytest.mark.parametrize(
    "attributes",
    [
        {"settings": {"model.trust_remote_code": "true"}},  # a valid key of the config, but not of the grid
        {"settings": {"lora.r": "8", "data.train": "/etc/passwd"}},
        {"settings": ["lora.r"]},
        {"settings": {"lora.r": "8"}, "first": "../../x"},
        {"settings": {"lora.r": "8"}, "result": "x"},
    ],
    ids=str,
)
def test_forged_trial_is_not_run(tmp_path: Path, attributes: dict[str, Any]) -> None:
    study = opened(tmp_path)
    study._study.enqueue_trial({}, user_attrs=attributes)
    with pytest.raises(ResumeError) as lost, study.next_trial(None, RANGE, None):
        raise AssertionError
    assert "no sweep has written" in lost.value.problems[0].what


def test_incomplete_last_line_of_a_journal_is_removed(tmp_path: Path) -> None:
    """Optuna would append to it, which would make the journal unreadable. Simulated by a limit of the file size."""
    study, path = opened(tmp_path), tmp_path / "journal.log"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    try:
        with pytest.raises(ResourceError) as full, study.next_trial([rank_of("8")], VALUES, None):
            raise AssertionError
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert meanings(full.value) == [(Code.SYSTEM_DISK_FULL, str(path), "")]
    assert not path.read_bytes().endswith(b"\n")
    again = opened(tmp_path)
    with again.next_trial([rank_of("8")], VALUES, None):
        assert states(again) == [(0, "running")]
    assert states(opened(tmp_path)) == [(0, "running")]
    path.write_bytes(path.read_bytes() + b"mine\n")
    with pytest.raises(ResumeError):
        opened(tmp_path).records()


def test_locked_database_is_distinguished_from_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    url = f"sqlite:///{path}?timeout=0.01"
    study = opened(tmp_path / "study", url)
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for use in (study.records, lambda: opened(tmp_path / "study", url)):
            with pytest.raises(LockedError) as locked:
                use()
            assert meanings(locked.value) == [(Code.SYSTEM_LOCKED, f"sqlite:///{path}", "storage")]
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 4000)
    with pytest.raises(ConfigError) as damaged:
        opened(tmp_path / "study", url)
    assert meanings(damaged.value) == [(Code.SWEEP_STUDY, f"sqlite:///{path}", "storage")]


@pytest.mark.parametrize("url", ["nosuch://joe:hunter2@host/db", "nosuch://host/db?user=joe&password=hunter2"])
def test_passwords_in_storage_urls_are_not_printed(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        opened(tmp_path, url)
    assert "hunter2" not in str(refused.value) and "nosuch://host/db" in str(refused.value)


@pytest.mark.parametrize("url", [None, "sqlite:///{}/study.db"], ids=["journal", "database"])
def test_trial_that_was_cut_off_is_tried_again_under_its_number(tmp_path: Path, url: str | None) -> None:
    """Its lock is free although the storage calls it running. A trial of another process is left to it."""
    wanted = [rank_of("2"), rank_of("4")]
    one, two = (opened(tmp_path / "study", url and url.format(tmp_path)) for _ in range(2))
    with one.next_trial(wanted, VALUES, None) as record:
        assert record is not None and record.number == 0
        with two.next_trial(wanted, VALUES, None) as other:
            assert other is not None and other.settings == rank_of("4") and other.number == 1
            two.finish({"seconds": 1.0}, 0.5)
        with two.next_trial(wanted, VALUES, None) as nothing:
            assert nothing is None
    assert [two.is_cut_off(one) for one in two.records()] == [True, False]
    with two.next_trial(wanted, VALUES, None) as again:
        assert again is not None and again.number == 0 and again.optuna_number > 1
        one.finish({}, 2.0)  # of the process that is believed to have ended: too late
        two.finish({}, 1.0)
    assert states(two) == [(0, DONE), (1, DONE)] and two.records()[0].optuna_number == again.optuna_number


def test_trials_of_other_machines_are_left_alone(tmp_path: Path) -> None:
    """Two directories with a common database stand for two machines."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    one, two = (opened(tmp_path / name, url) for name in ("one", "two"))
    with one.next_trial([rank_of("2")], VALUES, None) as record:
        assert record is not None
    with two.next_trial([rank_of("2")], VALUES, None) as nothing:
        assert nothing is None and states(two) == [(0, "running")]
    with one.next_trial([rank_of("2")], VALUES, None) as again:
        assert again is not None and again.number == 0


def test_drawn_values_are_not_repeated_and_kept_when_cut_off(tmp_path: Path) -> None:
    study, drawn, axes = opened(tmp_path), list[str](), parsed("lora.r=2..4").axes
    with study.next_trial(None, axes, 5) as cut_off:
        assert cut_off is not None
    for number in range(9):
        with study.next_trial(None, axes, 5) as record:
            if record is not None:
                assert number > 0 or record.settings == cut_off.settings
                drawn.append(record.settings["lora.r"])
                study.finish({}, float(len(drawn)))
    assert sorted(drawn) == ["2", "3", "4"]


# Results


def test_results_are_read_as_written_or_not_at_all(tmp_path: Path) -> None:
    losses = {
        number: RowLosses(np.full(6, 5.0 + extra), np.ones(6), np.ones(6)) for number, extra in ((0, 0.1), (1, 0))
    }
    trials = [TrialResult(number, {"lora.r": f"{number}"}, {}, DONE, seconds=1.5) for number in range(2)]
    results = StudyResults("out", "base", ["lora.r"], 6, 6, rank(trials, losses))
    results.write(tmp_path)
    assert StudyResults.read(tmp_path) == results and [*os.listdir(tmp_path)] == ["results.json"]
    text = (tmp_path / "results.json").read_text()
    for spoiled in (
        "[" * 100_000,
        "[]",
        "\0",
        text.replace('"version": 1', '"version": 2'),
        text.replace("1.5", "1e300"),
    ):
        (tmp_path / "results.json").write_text(spoiled)
        assert StudyResults.read(tmp_path) is None
    (tmp_path / "results.json").unlink()
    (tmp_path / "results.json").mkdir()
    with pytest.raises(ResumeError):
        results.write(tmp_path)
    assert [*os.listdir(tmp_path)] == ["results.json"]


def test_invalid_row_losses_are_refused() -> None:
    ones = np.ones(6)
    good = RowLosses(ones, ones, ones)
    assert RowLosses.unpacked(good.packed()).has_rows_of(good)
    assert not good.has_rows_of(RowLosses(ones, ones * 2, ones)) and not RowLosses(ones * 1e39, ones, ones).is_finite
    bomb = RowLosses(*[np.ones(1 << 22)] * 3).packed()
    bad = [RowLosses(ones * np.nan, ones, ones).packed(), RowLosses(ones, ones * 0, ones).packed()]
    for text in ("", "AAAA", "\0", good.packed()[:-7], *bad, bomb):  # the last one would decompress to a huge size
        with pytest.raises(ValueError, match=_ANY):
            RowLosses.unpacked(text)


def test_trial_result_values_are_validated() -> None:
    assert rank([TrialResult(0, {}, {}, "waiting")], {})[0].verdict == ""
    with pytest.raises(ValueError, match="seconds"):
        TrialResult(number=0, settings={}, values={}, state="done", seconds="soon")  # type: ignore[arg-type]


def test_ranking_compares_row_by_row() -> None:
    generator = np.random.default_rng(0)
    nats, noise = generator.random(50) * 20, generator.standard_normal(50)
    tokens, copies = nats * 0 + 10, nats * 0 + 1
    losses = {
        0: RowLosses(nats + 0.5, tokens, copies),  # worse by half a nat on each row, far less than the spread of rows
        1: RowLosses(nats, tokens, copies),
        2: RowLosses(nats + 0.3 * (noise - noise.mean()) + 1e-3, tokens, copies),
    }
    trials = [TrialResult(number, {}, {}, "done") for number in (*losses, 3)]
    ranked = rank(trials, {number: RowLosses.unpacked(one.packed()) for number, one in losses.items()})
    assert [(one.number, one.verdict) for one in ranked] == [(1, BEST), (2, LIKE_BEST), (0, WORSE), (3, "")]
    assert ranked[2].difference == pytest.approx(0.05, rel=1e-5)
    assert ranked[0].interval is not None and ranked[0].interval[1] - ranked[0].interval[0] > 0.05


def test_remarks_name_the_limits_of_a_comparison() -> None:
    """Whether the best value is at the edge of those tried (including diverged trials), and which losses are
    compared."""

    def remarks(*trials: tuple[dict[str, str], str]) -> list[str]:
        found = [TrialResult(number, values, {}, state) for number, (values, state) in enumerate(trials)]
        first = replace(found[0], verdict=BEST)
        return StudyResults("out", "base", [*trials[0][0]], 9, 9, [first, *found[1:]]).remarks()

    rate, r = "training.learning_rate", "lora.r"
    best = {rate: "1e-3", r: "8"}
    lower, waiting, diverged = ({rate: text, r: "8"} for text in ("1e-4", "1e-2", "2e-3"))
    said = [f"{rate}: the best value is the highest that was tried; higher ones may be better"]
    lowest = [said[0].replace("highest", "lowest").replace("higher", "lower")]
    assert remarks((best, "done"), (lower, "done"), (waiting, "waiting")) == said
    assert remarks((best, "done"), (lower, "done"), (diverged, "diverged")) == []
    assert remarks((best, "done"), (diverged, "done")) == lowest
    packing = [({"data.packing": one}, "done") for one in ("full", "none")]
    seeds = [({"training.seed": one}, "done") for one in ("1", "2")]
    assert remarks((best, "done")) == remarks(*packing) == remarks(*seeds) == []
    (one,) = remarks(({"training.objective": "dpo"}, "done"), ({"training.objective": "simpo"}, "done"))
    assert "favours those that were trained to lower it" in one
