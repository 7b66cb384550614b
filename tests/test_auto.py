"""Settings that are `auto`: properties of the chosen values, and whole runs that record, repeat and resume them."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ATTENTION, Ran, check_refused, config_in, meanings
from fork_server import ForkServer
from running import WEIGHTS, Cli, MakeConfig, checkpoints, copy_of, interrupt, straight
from transformers import BltConfig, Gemma3nConfig, GPT2Config, OPTConfig, PretrainedConfig

from loratune.codes import Code
from loratune.config import AUTO, LoraSection, ModelSection, RunConfig
from loratune.errors import ConfigError
from loratune.lora import initialize
from loratune.lora.adapter_files import AdapterFiles
from loratune.model import load
from loratune.training import auto
from loratune.training.auto import Facts
from loratune.training.checkpoints.store import MANIFEST, RUN, seal
from loratune.training.plan import unit_parameters

FACTS = Facts(2048, 32, 1_600, 10_000, 1, lambda _: 1_000, {})
UNDECIDED = {"learning_rate": AUTO, "num_train_epochs": AUTO}
SHAPE = {"r": AUTO, "lora_alpha": AUTO, "target_modules": AUTO}
SAVED: dict[str, Any] = {
    "learning_rate": AUTO, "num_train_epochs": AUTO, "per_device_train_batch_size": 3, "save_steps": 2,
}  # fmt: skip


def config_of(**sections: Any) -> RunConfig:
    values = {"model": {"name_or_path": "a"}, "data": {"train": "b"}, "output_dir": "c"} | sections
    return RunConfig.model_validate(values)


def decided(facts: Facts = FACTS, **sections: Any) -> RunConfig:
    return auto.decide(config_of(**sections), facts)[0]


def rate(width: int = 2048, rows: int = 8, layers: int | None = 32, **lora: Any) -> float:
    return auto.learning_rate(LoraSection(**lora), width, layers, rows)[0]


def test_the_learning_rate_depends_on_width_depth_and_lora_settings() -> None:
    assert rate(1024) > rate(2048) > rate(8192)
    assert rate(rows=1) < rate(rows=8) < rate(rows=32) == rate(rows=512)
    assert rate(lora_alpha=8) > rate(lora_alpha=16) > rate(lora_alpha=64)
    assert rate(r=8) == rate(r=64) and rate(use_rslora=True, r=8) > rate(use_rslora=True, r=64)
    assert rate(loraplus_lr_ratio=16) < rate()
    assert rate(layers=8) > rate(layers=16) > rate(layers=30) == rate(layers=80) == rate(layers=None)
    assert rate(layers=32, layers_to_transform=[*range(8)]) == rate(layers=8)
    assert all(found == float(f"{found:.1e}") for found in (rate(width) for width in range(64, 9_000, 333)))
    assert rate(1, lora_alpha=1) == rate(2, lora_alpha=1), "there is a highest rate"


def test_the_learning_rate_counts_the_rows_of_all_processes() -> None:
    one = decided(training={"per_device_train_batch_size": 4}).training
    assert decided(replace(FACTS, processes=2), training={"per_device_train_batch_size": 2}).training.learning_rate == (
        one.learning_rate
    )


def test_small_datasets_are_trained_for_more_epochs() -> None:
    few_to_many = [replace(FACTS, items=rows) for rows in (40, 200, 201, 2000, 2001, 10**6)]
    batch = {"per_device_train_batch_size": 8}
    epochs = [decided(facts, lora=ATTENTION, training=batch).training.num_train_epochs for facts in few_to_many]
    assert epochs == [4, 4, 2, 2, 1, 1]
    limited = decided(training={"max_steps": 5})
    assert limited.training.num_train_epochs == AUTO and "num_train_epochs" not in limited.resolved()["training"]


@pytest.mark.parametrize(
    ("lora", "passes"),
    [
        ({}, 2), (ATTENTION, 2), ({"target_modules": ["q", "v_proj"]}, 2), ({"target_modules": "all-linear"}, 1),
        ({"target_modules": AUTO}, 1), ({"target_modules": ["q", "gate"]}, 1), ({"target_modules": ".*q_proj"}, 1),
        (ATTENTION | {"target_parameters": ["experts"]}, 1),
    ],
)  # fmt: skip
def test_small_datasets_get_one_epoch_with_more_than_attention(lora: dict[str, Any], passes: int) -> None:
    few = replace(FACTS, items=80)
    once = decided(few, lora=lora, training={"num_train_epochs": 1}).training.learning_rate
    assert decided(replace(FACTS, items=8), lora=lora).training.num_train_epochs == 4
    some = replace(FACTS, items=400)
    assert decided(some, lora=lora).training.num_train_epochs == passes
    assert decided(some, lora=lora, training={"max_minutes": 1}).training.num_train_epochs == passes
    twice = decided(few, lora=lora, training={"num_train_epochs": 2}).training.learning_rate
    assert twice == pytest.approx(once * passes / 2, rel=0.05)


def test_more_epochs_lower_the_learning_rate() -> None:
    def rate_of(**training: Any) -> Any:
        return decided(replace(FACTS, items=80), lora=ATTENTION, training=training).training.learning_rate

    once = rate_of(num_train_epochs=1)
    assert [rate_of(num_train_epochs=epochs) for epochs in (0.5, 2, 4, 10)] == pytest.approx(
        [once, once, once / 2, once / 5], 0.05
    )
    assert once > rate_of(num_train_epochs=3) > rate_of(num_train_epochs=4)
    assert [rate_of(max_steps=steps) for steps in (3, 20, 40)] == [once, once, rate_of(num_train_epochs=4)]
    assert rate_of(max_minutes=1, num_train_epochs=4) == once, "how many of them there is time for is not known yet"


@pytest.mark.parametrize(("objective", "share"), [("sft", 1 / 2), ("dpo", 1), ("orpo", 1)])
def test_a_run_that_starts_from_an_adapter_has_a_lower_learning_rate(objective: str, share: float) -> None:
    """Also over many passes, and where it is suggested in place of a rate that was too high. Objectives that compare
    answers have a lower one already."""
    few = replace(FACTS, items=80)
    for training in ({}, {"num_train_epochs": 6}, {"max_steps": 50}, {"max_minutes": 1}):
        new, continued = (
            auto.decide_training(
                config_of(lora=ATTENTION | {"start_from": start}, training={"objective": objective} | training), few
            )[1]
            for start in (None, "a")
        )
        rate, why = continued["training.learning_rate"]
        assert rate == pytest.approx(share * new["training.learning_rate"][0], rel=0.05)
        assert ("the one it continues from" in why) == (share < 1)
    high = decided(few, lora=ATTENTION | {"start_from": "a"}, training={"objective": objective, "learning_rate": 0.1})
    expected = decided(few, lora=ATTENTION | {"start_from": "a"}, training={"objective": objective}).training
    assert auto.lower_rate(high, few) == expected.learning_rate


def test_the_rank_grows_with_the_number_of_tokens() -> None:
    ranks = [decided(replace(FACTS, supervised=tokens), lora=SHAPE).lora.r for tokens in (1, 20_000, 10**9)]
    assert ranks == sorted(set(ranks))
    assert decided(lora=SHAPE).lora.target_modules == "all-linear"
    earlier = replace(FACTS, start={"r": 5, "lora_alpha": 7})
    assert (lambda lora: (lora.r, lora.lora_alpha))(decided(earlier, lora=SHAPE).lora) == (5, 7)


def test_explicit_values_are_kept() -> None:
    training = {"learning_rate": 0.5, "num_train_epochs": 7, "warmup_steps": 3, "lr_scheduler_type": "cosine"}
    run = decided(lora={"r": 3}, training=training)
    assert run.lora.r == 3 and run.training.model_dump().items() >= training.items()
    constant = decided(training={"lr_scheduler_type": "constant"}).training
    assert (constant.lr_scheduler_type, constant.warmup_steps) == ("constant", 0)


def test_auto_is_refused_where_it_cannot_be_resolved(cli: Cli, run_config: MakeConfig) -> None:
    ran = cli("train", run_config(training=UNDECIDED | {"optim": "sgd"}), "--dry-run")
    assert ran.code == 2 and Code.CONFIG_CONFLICT in ran.err, ran.err
    ran = cli("params", run_config(lora={"r": AUTO}))
    assert ran.code == 2 and Code.CONFIG_CONFLICT in ran.err, ran.err


def test_run_yaml_records_numbers_and_repeats_the_run(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    ran = cli("train", run_config(lora=SHAPE, training=UNDECIDED), "--allow-worse")
    assert ran.code == 0, ran.err
    for key in ("lora.r", "lora.lora_alpha", "training.learning_rate", "training.num_train_epochs"):
        assert f"auto: {key} is " in ran.err
    values = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert AUTO not in [*values["lora"].values(), *values["training"].values()]
    again = cli("train", tmp_path / "out" / "run.yaml", "--set", f"output_dir={tmp_path / 'again'}", "--allow-worse")
    assert again.code == 0 and "auto: " not in again.err
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_full_packs_are_counted_as_training_items(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """There are fewer packs than rows, so an epoch has fewer steps, and there are at least as many epochs. The rows of
    a step are those of its packs."""
    epochs, rows = [], []
    for name, packing in (("rows", "none"), ("packs", "full")):
        data, out = {"packing": packing, "max_length": 128}, tmp_path / name
        training = UNDECIDED | {"per_device_train_batch_size": 1}
        ran: Ran = cli("train", run_config(data=data, training=training), "--dry-run", "--set", f"output_dir={out}")
        line = next((line for line in ran.err.splitlines() + ran.out.splitlines() if "num_train_epochs is" in line), "")
        assert line, ran.err
        epochs.append(int(line.split(" (")[1].split()[0].replace(",", "")))
        line = next(line for line in ran.err.splitlines() if "learning_rate is" in line)
        rows.append(int(line.rpartition(" and ")[2].split()[0]))
    assert epochs[0] == 40 and epochs[1] == 6, "best fit puts 7 rows of 17 or 18 tokens into 128"
    assert rows == [1, 7]


Copied = Callable[[Path, Callable[[dict[str, Any]], object]], Path]


def test_a_resumed_run_keeps_the_chosen_values(
    processes: ForkServer, interrupted: Copied, cli: Cli, tmp_path: Path
) -> None:
    config = interrupted(tmp_path, lambda _: None)
    expected = straight(processes, config, tmp_path)
    ran = cli("train", config, "--resume")
    assert ran.code == 0, ran.err
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == expected
    values = [yaml.safe_load((tmp_path / name / "run.yaml").read_text())["training"] for name in ("out", "straight")]
    assert values[0] == values[1] and math.isfinite(values[0]["learning_rate"])


def test_the_learning_rate_may_be_changed_on_resuming(interrupted: Copied, cli: Cli, tmp_path: Path) -> None:
    key = "training.learning_rate"
    config = interrupted(tmp_path, lambda _: None)
    ran = cli("train", config, "--resume", "--set", f"{key}=1e-3", "--allow-change", key)
    assert ran.code == 0, ran.err
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["training"]["learning_rate"] == 1e-3


def test_chosen_values_are_reported_on_resuming(
    processes: ForkServer, run_config: MakeConfig, cli: Cli, tmp_path: Path
) -> None:
    """A number that has become `auto` keeps its value; settings that contradict it are refused."""
    config = run_config(training=SAVED | {"learning_rate": 0.002, "warmup_steps": 3})
    interrupt(processes, config, tmp_path / "out.partial")
    now_auto = ("--set", "training.learning_rate=auto", "--set", "training.warmup_steps=auto")
    ran = cli("train", config, "--resume", *now_auto, "--set", "training.lr_scheduler_type=constant")
    assert ran.code == 2 and Code.CONFIG_CONFLICT in ran.err, ran.err
    ran = cli("train", config, "--resume", *now_auto)
    assert ran.code == 0, ran.err
    line = next(line for line in ran.err.splitlines() if line.startswith("auto: "))
    assert "training.learning_rate 0.002" in line and "training.warmup_steps 3" in line and "lora.r" not in line
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["training"]["learning_rate"] == 0.002


@pytest.fixture(scope="module")
def interrupted(processes: ForkServer, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Copied:
    """Copies an interrupted run to a folder and edits its recorded config with a function, by which alone it is known
    what was decided. Returns its config."""
    folder = tmp_path_factory.mktemp("interrupted")
    interrupt(processes, config_in(folder, tiny_dir)(lora=SHAPE, training=SAVED), folder / "out.partial")

    def copied(to: Path, forge: Callable[[dict[str, Any]], object]) -> Path:
        config = copy_of(folder, to)
        for checkpoint in checkpoints(to / "out.partial"):
            record = json.loads((checkpoint / RUN).read_text())
            forge(record["config"])
            record.pop("decided")  # as in the records of earlier releases
            (checkpoint / RUN).write_text(json.dumps(record))
            (checkpoint / MANIFEST).unlink()
            seal(checkpoint)
        return config

    return copied


FORGED = [
    ("lora", "r", math.nan), ("lora", "r", -4), ("lora", "r", "8"), ("lora", "r", [8]),
    ("lora", "lora_alpha", 1e9), ("lora", "target_modules", []),
    ("training", "learning_rate", math.inf), ("training", "warmup_steps", -1.0),
    ("training", "warmup_steps", 2.5), ("training", "num_train_epochs", "5"), ("training", "lr_scheduler_type", "wsd"),
    ("retention", "kl_weight", -1.0), ("retention", "num_samples", 0),
]  # fmt: skip


@pytest.mark.parametrize(("section", "key", "value"), FORGED)
def test_invalid_recorded_values_are_rejected(section: str, key: str, value: Any) -> None:
    run = config_of(lora=SHAPE, training=dict.fromkeys(("learning_rate", "warmup_steps", "lr_scheduler_type"), AUTO))
    recorded = auto.decided_values(decided(lora=SHAPE, retention={"kl_weight": 1.0, "num_samples": 48}))
    with pytest.raises(ConfigError):
        auto.with_decided(run, recorded | {f"{section}.{key}": value})


@pytest.mark.parametrize("lora", [None, [8], "r"])
def test_an_invalid_recorded_section_is_rejected(cli: Cli, interrupted: Copied, tmp_path: Path, lora: Any) -> None:
    ran = cli("train", interrupted(tmp_path, lambda config: config.update(lora=lora)), "--resume")
    assert ran.code == 7 and f"lora: was {json.dumps(lora)} when the run was interrupted" in ran.err, ran.err


@pytest.mark.parametrize("forged", [{"r": 4}, {"r": 16}, {"target_modules": ["q", "v"]}])
def test_a_record_with_other_lora_shapes_is_refused(
    cli: Cli, interrupted: Copied, tmp_path: Path, forged: dict[str, Any]
) -> None:
    """PEFT would load the tensors that fit, and train the others from their initial values."""
    config = interrupted(tmp_path, lambda recorded: recorded["lora"].update(forged))
    place = tmp_path / "out.partial" / "checkpoints" / checkpoints(tmp_path / "out.partial")[0].name
    check_refused(cli("train", config, "--resume"), 7, (Code.RESUME_CHANGED, str(place), ""))


@pytest.mark.parametrize(
    "variant",
    [
        {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]},
        {"init_lora_weights": "orthogonal"},
    ],
)  # fmt: skip
def test_only_parameters_that_grow_with_the_rank_are_counted(tiny_dir: Path, variant: dict[str, Any]) -> None:
    model = ModelSection(name_or_path=str(tiny_dir))
    count = lambda **lora: unit_parameters(model, load.load_config(model), LoraSection(r=10, **ATTENTION, **lora))  # noqa: E731
    assert count(**variant) == count() == 2 * 2 * (32 + 32 + 32 + 16)  # q and o, k and v, of two layers
    assert count(rank_pattern={"q": 4}) == count() - 2 * (32 + 32)
    chosen = decided(replace(FACTS, unit_parameters=lambda _: 0), lora=SHAPE | {"rank_pattern": {"q": 4}})
    assert chosen.lora.r == 8, "where r counts for no module"


@pytest.mark.parametrize(("epochs", "accepted"), [(AUTO, 20), (3, 15)])
def test_a_warmup_longer_than_the_run_is_refused(cli: Cli, run_config: MakeConfig, epochs: Any, accepted: int) -> None:
    training = UNDECIDED | {"num_train_epochs": epochs}
    config = run_config(training=training | {"warmup_steps": accepted})
    assert cli("train", config, "--dry-run").code == 0
    config = run_config(training=training | {"warmup_steps": 1_000})
    check_refused(cli("train", config, "--dry-run"), 2, (Code.CONFIG_CONFLICT, "", "training.warmup_steps"))


def test_the_shape_is_taken_from_the_adapter_to_start_from(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    first = {"r": 4, "lora_alpha": 7, "target_modules": ["q", "v"], "rank_pattern": {"q": 6}}
    assert cli("train", run_config(lora=first, training={"max_steps": 1}), "--allow-worse").code == 0
    config = run_config(lora=SHAPE | {"start_from": str(tmp_path / "out")}, output_dir=str(tmp_path / "second"))
    counted = json.loads(cli("params", config, "--json").out)
    assert counted["targets"] == {name: [f"model.layers.*.self_attn.{name}"] for name in ("q_proj", "v_proj")}
    ran = cli("train", config, "--allow-worse")
    assert ran.code == 0, ran.err
    lora = yaml.safe_load((tmp_path / "second" / "run.yaml").read_text())["lora"]
    assert (lora["r"], lora["lora_alpha"], lora["target_modules"]) == (6, 7, ["q_proj", "v_proj"])
    assert f"trainable params: {counted['trainable']:,}" in ran.err


def test_settings_of_a_foreign_adapter() -> None:
    """Invalid values are left out, and the rank is taken from the tensors."""
    tensors = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (6, 32)}
    config = {"r": 10**9, "lora_alpha": 22.6, "target_modules": "(unclosed"}
    assert initialize.start_settings(AdapterFiles(Path(), config, tensors, {})) == {"r": 6}
    config = {"r": 4, "lora_alpha": 16.0, "target_modules": AUTO}
    assert initialize.start_settings(AdapterFiles(Path(), config, tensors, {})) == {"r": 6, "lora_alpha": 16}


@pytest.mark.parametrize(
    ("config", "width", "layers"),
    [
        (GPT2Config(n_embd=48, n_layer=3), 48, 3),
        (OPTConfig(hidden_size=1024, word_embed_proj_dim=512), 1024, 12),
        (Gemma3nConfig(text_config={"hidden_size": 640, "num_hidden_layers": 20}), 640, 20),
        (BltConfig(), 2048, 25),
        (PretrainedConfig(), None, None),
    ],
)
def test_width_and_depth_of_a_model_config(config: Any, width: int | None, layers: int | None) -> None:
    assert (load.hidden_size(config), load.layers(config)) == (width, layers)


def test_a_model_of_unknown_width_needs_an_explicit_learning_rate() -> None:
    unknown = replace(FACTS, hidden_size=None)
    assert decided(unknown, training={"learning_rate": 1e-3}).training.learning_rate == 1e-3
    with pytest.raises(ConfigError) as caught:
        decided(unknown)
    assert meanings(caught.value) == [(Code.CONFIG_CONFLICT, "", "training.learning_rate")]


def test_chosen_values_are_reported_with_reasons() -> None:
    _, choices = auto.decide(
        RunConfig.model_validate(
            {"model": {"name_or_path": "a"}, "data": {"train": "b"}, "output_dir": "c", "lora": SHAPE}
        ),
        replace(FACTS, items=16_000, start={"target_modules": ["q_proj", "v_proj"]}, hidden_size=8),
    )
    *lines, how = auto.lines(choices)
    assert "auto: lora.target_modules is [q_proj, v_proj] (that of the adapter it starts from)" in lines
    assert any(line.startswith("auto: training.learning_rate is 0.005 (the highest that auto takes") for line in lines)
    assert any(line.startswith("auto: training.warmup_steps is 0 (") for line in lines) and "--set" in how
    assert not [*auto.lines({})]
