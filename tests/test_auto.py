"""What `auto` comes to: properties of the choices, and whole runs that record, repeat and resume them."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from conftest import Ran
from fork_server import ForkServer
from running import WEIGHTS, Cli, MakeConfig, interrupt, straight

from loratune.codes import Code
from loratune.config import AUTO, LoraSection, RunConfig
from loratune.training import auto
from loratune.training.auto import Facts

FACTS = Facts(2048, 1_600, 10_000, 1, lambda _: 1_000, {})
UNDECIDED = {"learning_rate": AUTO, "num_train_epochs": AUTO}
SAVED: dict[str, Any] = {
    "learning_rate": AUTO, "num_train_epochs": AUTO, "per_device_train_batch_size": 3, "save_steps": 2,
}  # fmt: skip


def decided(facts: Facts = FACTS, **sections: Any) -> RunConfig:
    values = {"model": {"name_or_path": "a"}, "data": {"train": "b"}, "output_dir": "c"} | sections
    return auto.decide(RunConfig.model_validate(values), facts)[0]


def rate(width: int = 2048, rows: int = 8, **lora: Any) -> float:
    return auto.learning_rate(LoraSection(**lora), width, rows)[0]


def test_the_rate() -> None:
    assert rate(1024) > rate(2048) > rate(8192)
    assert rate(rows=1) < rate(rows=8) < rate(rows=32) == rate(rows=512)
    assert rate(lora_alpha=8) > rate(lora_alpha=16) > rate(lora_alpha=64)
    assert rate(r=8) == rate(r=64) and rate(use_rslora=True, r=8) > rate(use_rslora=True, r=64)
    assert rate(loraplus_lr_ratio=16) < rate()
    assert all(found == float(f"{found:.1e}") for found in (rate(width) for width in range(64, 9_000, 333)))
    assert rate(1, lora_alpha=1) == rate(2, lora_alpha=1), "there is a highest rate"


def test_the_rows_of_a_step_are_those_of_all_processes() -> None:
    one = decided(training={"per_device_train_batch_size": 4}).training
    assert decided(replace(FACTS, processes=2), training={"per_device_train_batch_size": 2}).training.learning_rate == (
        one.learning_rate
    )


def test_few_rows_are_repeated() -> None:
    epochs = [decided(replace(FACTS, rows=rows)).training.num_train_epochs for rows in (40, 800, 10**6)]
    assert epochs == sorted(epochs, reverse=True) and epochs[0] > epochs[-1] == 1
    watched = decided(replace(FACTS, rows=40), data={"train": "b", "validation": 0.2}).training.num_train_epochs
    assert watched >= epochs[0], "held-out rows tell when more passes harm"
    limited = decided(training={"max_steps": 5})
    assert limited.training.num_train_epochs == AUTO and "num_train_epochs" not in limited.resolved()["training"]


def test_the_rank_grows_with_the_tokens() -> None:
    shape = {"r": AUTO, "lora_alpha": AUTO, "target_modules": AUTO}
    ranks = [decided(replace(FACTS, supervised=tokens), lora=shape).lora.r for tokens in (1, 20_000, 10**9)]
    assert ranks == sorted(set(ranks))
    assert decided(lora=shape).lora.target_modules == "all-linear"
    earlier = replace(FACTS, start={"r": 5, "lora_alpha": 7})
    assert (lambda lora: (lora.r, lora.lora_alpha))(decided(earlier, lora=shape).lora) == (5, 7)


def test_explicit_values_win() -> None:
    training = {"learning_rate": 0.5, "num_train_epochs": 7, "warmup_steps": 3, "lr_scheduler_type": "cosine"}
    run = decided(lora={"r": 3}, training=training)
    assert run.lora.r == 3 and run.training.model_dump().items() >= training.items()
    constant = decided(training={"lr_scheduler_type": "constant"}).training
    assert (constant.lr_scheduler_type, constant.warmup_steps) == ("constant", 0)


def test_refused(cli: Cli, run_config: MakeConfig) -> None:
    ran = cli("train", run_config(training=UNDECIDED | {"optim": "sgd"}), "--dry-run")
    assert ran.code == 2 and Code.CONFIG_AUTO_RATE in ran.err, ran.err
    ran = cli("params", run_config(lora={"r": AUTO}))
    assert ran.code == 2 and Code.CONFIG_AUTO_RANK in ran.err, ran.err


def test_run_yaml_has_numbers_and_repeats_the_run(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    shape = {"r": AUTO, "lora_alpha": AUTO, "target_modules": AUTO}
    ran = cli("train", run_config(lora=shape, training=UNDECIDED), "--allow-worse")
    assert ran.code == 0, ran.err
    for key in ("lora.r", "lora.lora_alpha", "training.learning_rate", "training.num_train_epochs"):
        assert f"auto: {key} is " in ran.err
    values = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert AUTO not in [*values["lora"].values(), *values["training"].values()]
    again = cli("train", tmp_path / "out" / "run.yaml", "--set", f"output_dir={tmp_path / 'again'}", "--allow-worse")
    assert again.code == 0 and "auto: " not in again.err
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_full_packs_are_counted(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """Fewer packs than rows make fewer steps a pass, so that there are at least as many passes."""
    epochs = []
    for name, packing in (("rows", "none"), ("packs", "full")):
        data, out = {"packing": packing, "max_length": 128}, tmp_path / name
        training = UNDECIDED | {"per_device_train_batch_size": 1}
        ran: Ran = cli("train", run_config(data=data, training=training), "--dry-run", "--set", f"output_dir={out}")
        line = next((line for line in ran.err.splitlines() + ran.out.splitlines() if "num_train_epochs is" in line), "")
        assert line, ran.err
        epochs.append(int(line.split(" (")[1].split()[0].replace(",", "")))
    assert epochs[0] == 40 and 1 <= epochs[1] < 40


def test_a_resumed_run_keeps_what_was_decided(processes: ForkServer, run_config: MakeConfig, tmp_path: Path) -> None:
    config = run_config(training=SAVED)
    expected = straight(processes, config, tmp_path)
    interrupt(processes, config, tmp_path / "out.partial")
    child = processes.start("train", config, "--resume")
    assert child.wait() == 0, child.said()
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == expected
    values = [yaml.safe_load((tmp_path / name / "run.yaml").read_text())["training"] for name in ("out", "straight")]
    assert values[0] == values[1] and math.isfinite(values[0]["learning_rate"])


def test_a_rate_may_be_changed_on_resuming(processes: ForkServer, run_config: MakeConfig, tmp_path: Path) -> None:
    config = run_config(training=SAVED)
    interrupt(processes, config, tmp_path / "out.partial")
    key = "training.learning_rate"
    child = processes.start("train", config, "--resume", "--set", f"{key}=1e-3", "--allow-change", key)
    assert child.wait() == 0, child.said()
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["training"]["learning_rate"] == 1e-3
