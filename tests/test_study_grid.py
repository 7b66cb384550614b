"""What `loratune sweep` tries, and which mistakes are refused before the first trial."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran, check_refused, write_rows
from optuna.distributions import FloatDistribution, IntDistribution
from running import MakeConfig

from loratune.codes import Code
from loratune.errors import ConfigError
from loratune.study import grid

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
    assert (tmp_path / "out.study" / "trials").exists() is False


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
    assert "loratune[sweep]" in ran.err


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
