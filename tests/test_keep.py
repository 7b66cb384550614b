"""Which step of a run becomes the adapter, when patience ends the run, and test rows, which influence no choice."""

import json
import math
import re
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import check_refused, config_in, tiny_llama, write_rows
from fork_server import ForkServer
from running import WEIGHTS, Cli, MakeConfig, checkpoints, copy_of, curve
from transformers import PreTrainedTokenizerFast

from loratune.codes import Code
from loratune.config import TrainingSection
from loratune.training.checkpoints.store import BEST_WEIGHTS, RUN, BestRecord, StepLosses, seal
from loratune.training.schedule import Schedule

LEARNT = [{"prompt": f"{number} and {number} make", "completion": f" {number + number}"} for number in range(8)]
HELD_OUT = [
    {"prompt": f"{number} and {number} make", "completion": f" {2 * (number % 5) + 1}"} for number in range(8, 20)
]
"""Of the same form, which is learned first, but with odd digits: memorizing the even ones later harms."""
OVERFITTED: dict[str, Any] = {
    "max_steps": 24, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "eval_steps": 3, "save_steps": 2,
    "per_device_train_batch_size": 4, "logging_steps": 5,
}  # fmt: skip


def overfitting(folder: Path, run_config: MakeConfig, **sections: Any) -> Path:
    """The config of a run whose held-out loss is lowest in the middle."""
    data = {
        "train": str(write_rows(folder / "learnt.jsonl", LEARNT)),
        "validation": str(write_rows(folder / "held-out.jsonl", HELD_OUT)),
    }
    made = {"data": data, "training": OVERFITTED, "lora": {"lora_dropout": 0.1}}
    return run_config(**{name: made.get(name, {}) | sections.get(name, {}) for name in {**made, **sections}})


def record(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "loratune.json").read_text())
    return found


def held_out_steps(directory: Path) -> list[float]:
    return [entry["step"] for entry in record(directory)["curve"] if "eval_loss" in entry]


BEST, LAST = 15, 24
"""The step of the lowest held-out loss of that run, and its last step."""


def until_step(step: int) -> list[str]:
    """Settings with which the run ends at a step, and keeps it. The learning rate is constant."""
    return [part for value in (f"max_steps={step}", "keep=last") for part in ("--set", f"training.{value}")]


@pytest.fixture(scope="module")
def overfitted(processes: ForkServer, tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """A folder with that run: `out` is the adapter of the whole run, `early` that of a run up to the best step."""
    folder = tmp_path_factory.mktemp("overfitted")
    config = overfitting(folder, config_in(folder, tiny_dir))
    early = processes.start("train", config, *until_step(BEST), "--set", f"output_dir={folder / 'early'}")
    child = processes.start("train", config)
    assert (child.wait(), early.wait()) == (0, 0), child.said() + early.said()
    (folder / "said").write_text(child.out.read_text() + child.said())
    return folder


# Evaluation steps


@pytest.mark.parametrize(
    ("steps", "trained", "held_out", "expected"),
    [
        (200, 60_000, 600, 20),
        (201, 60_000, 600, 21),
        (200, 60_000, 3_600, 40),  # of which 5 cost as much as 6,000 training tokens
        (200, 60_000, 3_601, 50),
        (200, 60_000, 60_000, 200),
        (5, 60_000, 10, 1),
        (1, 10, 10_000, 1),
    ],
)
def test_the_evaluation_interval_is_chosen(steps: int, trained: int, held_out: int, expected: int) -> None:
    assert Schedule(steps, steps, 1).evaluations(None, trained, held_out).interval == expected


def test_there_are_about_ten_evaluations_that_cost_a_tenth() -> None:
    for steps in (1, 7, 19, 20, 200, 12_345):
        for trained in (10, 9_999, 10**9):
            for held_out in (1, 200, 10**6):
                chosen = Schedule(steps, 1, 1).evaluations(None, -(-trained // steps), held_out)
                assert 1 <= chosen.count <= 10
                assert chosen.count == 1 or chosen.share <= 0.1
                if chosen.held_out * 10 <= 0.3 * chosen.trained:
                    assert chosen.count > min(5, steps - 1)


def test_a_set_evaluation_interval_is_kept(overfitted: Path) -> None:
    assert Schedule(40, 9, 1).evaluations(3, 9, 10**6).interval == 3
    assert held_out_steps(overfitted / "out") == [*range(3, LAST + 1, 3)]


def test_the_planned_steps_equal_those_taken(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """Ending within an epoch, with an accumulation that does not divide it. The steps are the same on two processes."""
    training: dict[str, Any] = {
        "num_train_epochs": 2.6, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4
    }  # fmt: skip
    ran = cli("train", run_config(data={"validation": 0.1}, training=training))
    assert ran.code == 0, ran.err
    found = record(tmp_path / "out")
    steps = found["metrics"]["steps"]
    assert Schedule.of(TrainingSection(**training), 36, 3) == Schedule(steps, 3, 12)
    halved = TrainingSection(**training | {"gradient_accumulation_steps": 2})
    assert Schedule.of(halved, 36, 3, processes=2) == Schedule(steps, 3, 12)
    assert f"evaluating every 2 of {steps} steps: 4 times, " in ran.err
    assert [entry["step"] for entry in found["curve"] if "eval_loss" in entry] == [*range(2, steps + 1, 2)]


# The step that is kept


def test_the_best_step_becomes_the_adapter(overfitted: Path) -> None:
    found = record(overfitted / "out")
    metrics, losses = found["metrics"], {e["step"]: e["eval_loss"] for e in found["curve"] if "eval_loss" in e}
    assert min(losses, key=lambda step: losses[step]) == BEST
    assert (overfitted / "out" / WEIGHTS).read_bytes() == (overfitted / "early" / WEIGHTS).read_bytes()
    assert (metrics["steps"], metrics["kept_step"], metrics["stopped_early"]) == (LAST, BEST, False)
    assert metrics["held_out_loss"] == metrics["best_held_out_loss"] == losses[BEST]
    assert metrics["last_held_out_loss"] == losses[LAST]
    assert metrics["gain"]["adapter"] == pytest.approx(losses[BEST], abs=1e-5)  # of the same rows, one at a time
    text, said = (overfitted / "out" / "README.md").read_text(), (overfitted / "said").read_text()
    kept = rf"{losses[BEST]:.4f} \(95 % interval [0-9. to]+\) at step {BEST}, kept: [^;]*, so optimistic;"
    assert re.search(kept, text), text
    assert f"{losses[LAST]:.4f} at step {LAST}, the last" in text and "which also chose the step, so optimistic" in said


def test_the_last_step_becomes_the_adapter(overfitted: Path) -> None:
    """The lowest held-out loss is still reported, but was not used to select the step."""
    run = record(overfitted / "early")
    assert (run["metrics"]["kept_step"], run["metrics"]["steps"]) == (BEST, BEST)
    assert run["metrics"]["held_out_loss"] == record(overfitted / "out")["metrics"]["held_out_loss"]
    assert "optimistic" not in (overfitted / "early" / "README.md").read_text()


def test_the_earlier_step_wins_if_losses_are_equal() -> None:
    seen = BestRecord(5, 2.0).after(10, 2.0)
    assert seen == BestRecord(5, 2.0, 2, 1)
    assert seen.after(15, 1.5) == BestRecord(15, 1.5, 3, 0)
    assert BestRecord(**json.loads(json.dumps(asdict(seen)))) == seen


@pytest.mark.parametrize(
    "read, values",
    [
        (BestRecord, {"step": 5, "loss": math.nan, "evaluations": 1, "since": 0}),
        (BestRecord, {"step": 0, "loss": 2.0, "evaluations": 1, "since": 0}),
        (BestRecord, {"step": 5, "loss": 2.0, "evaluations": 1, "since": 1}),
        (StepLosses, {"total": math.inf, "steps": 1}),
        (StepLosses, {"total": 2.0, "steps": -1}),
        (StepLosses, {"total": 2.0, "steps": 1, "more": 1}),
    ],
)
def test_invalid_records_are_refused(read: Callable[[Any], object], values: Any) -> None:
    with pytest.raises(ValueError):
        read(**values)


VARIANTS: dict[str, dict[str, Any]] = {
    "DoRA, whole modules, biases": {"lora": {"use_dora": True, "modules_to_save": ["lm_head"], "bias": "lora_only"}},
    "PiSSA, trained tokens": {"lora": {"init_lora_weights": "pissa", "trainable_token_indices": [49, 50, 51]}},
    "OLoRA": {"lora": {"init_lora_weights": "olora"}},
    "LoRA-FA": {"lora": {"use_lorafa": True}},
    "LoRA+ and all biases": {
        "lora": {"loraplus_lr_ratio": 4.0, "bias": "all"}, "training": {"learning_rate": 0.3}
    },
    "4 bits": {"model": {"quantization": "4bit", "dtype": "bfloat16"}, "training": {"max_steps": 15}},
    "bfloat16, in packs": {
        "model": {"dtype": "bfloat16"}, "data": {"packing": "full", "max_length": 40}, "training": {"max_steps": 15}
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if number < 2 else pytest.mark.slow) for number, name in enumerate(VARIANTS)]
)
def test_every_kind_of_weight_is_restored(
    name: str, cli: Cli, run_config: MakeConfig, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The learning rate is far too high, so the best step is an early one."""
    sections = dict(VARIANTS[name])
    if "bias" in sections.get("lora", {}):
        tiny_llama(attention_bias=True).save_pretrained(tmp_path / "biased")
        tokenizer.save_pretrained(tmp_path / "biased")
        sections["model"] = {"name_or_path": str(tmp_path / "biased")}
    training = {"eval_steps": 1, "max_steps": 6, "learning_rate": 0.1} | sections.pop("training", {})
    config = overfitting(tmp_path, run_config, **sections, training=training)
    ran = cli("train", config)
    assert ran.code == 0, ran.err
    kept, steps = (record(tmp_path / "out")["metrics"][name] for name in ("kept_step", "steps"))
    assert 0 < kept < steps, ran.out
    ran = cli("train", config, *until_step(kept), "--set", f"output_dir={tmp_path / 'early'}")
    assert ran.code == 0, ran.err
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "early" / WEIGHTS).read_bytes()


# Killed


KILLS = """
import os, signal
from loratune.training import publishing
from loratune.training import trainer
from loratune.training import callbacks

def kill(owner, name, is_time, *, after=False):
    inner = getattr(owner, name)
    def outer(first, *arguments, **keywords):
        if not after and is_time(first):
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(first, *arguments, **keywords)
        if after and is_time(first):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, outer)

def at(step):
    return lambda trainer: trainer.state.global_step == step

def has_best(best):
    return best.record is not None and best.record.step == BEST_STEP

""".replace("BEST_STEP", str(BEST))
MOMENTS = {
    "before it": "kill(trainer.RunTrainer, 'model_inputs', at(11))",
    "in its evaluation": f"kill(trainer.RunTrainer, '_before_batch', at({BEST}))",
    "after its evaluation": f"kill(trainer.RunTrainer, 'evaluate', at({BEST}), after=True)",
    "while it is written": "kill(callbacks.BestStep, 'save', has_best, after=True)",
    "after it": "kill(trainer.RunTrainer, 'model_inputs', at(17))",
    "after the last step": "kill(publishing, 'publish', lambda run: True)",
}
"""When a run is killed, in an order in which one run can be killed at all of these moments."""


def killed(processes: ForkServer, moment: str, *arguments: object) -> None:
    child = processes.start("train", *arguments, first=KILLS + moment)
    assert child.wait() == -signal.SIGKILL, child.said()


def check_as_if_undisturbed(folder: Path, overfitted: Path) -> None:
    assert (folder / "out" / WEIGHTS).read_bytes() == (overfitted / "out" / WEIGHTS).read_bytes()
    found, expected = record(folder / "out"), record(overfitted / "out")
    assert curve(found) == curve(expected)
    for name in ("kept_step", "held_out_loss", "best_held_out_loss", "last_held_out_loss", "gain"):
        assert found["metrics"][name] == expected["metrics"][name]
    assert not (folder / "out.partial").exists()


def test_a_run_killed_several_times_resumes_to_the_same_result(
    overfitted: Path, processes: ForkServer, run_config: MakeConfig, cli: Cli, tmp_path: Path
) -> None:
    config = overfitting(tmp_path, run_config)
    for number, moment in enumerate(MOMENTS.values()):
        killed(processes, moment, config, *(["--resume"] if number else []))
    newest = checkpoints(tmp_path / "out.partial")[0]
    best = json.loads((newest / "run.json").read_text())["best"]
    assert (newest.name, best["step"], best["since"]) == (f"checkpoint-{LAST}", BEST, (LAST - BEST) // 3)
    ran = cli("train", config, "--resume")
    assert ran.code == 0 and "held-out loss" not in ran.err, ran.err
    check_as_if_undisturbed(tmp_path, overfitted)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_once_resumes_to_the_same_result(
    moment: str, overfitted: Path, processes: ForkServer, run_config: MakeConfig, cli: Cli, tmp_path: Path
) -> None:
    config = overfitting(tmp_path, run_config)
    killed(processes, MOMENTS[moment], config)
    ran = cli("train", config, "--resume")
    assert ran.code == 0, ran.err
    check_as_if_undisturbed(tmp_path, overfitted)


STOP = f"""
import signal
from loratune.training import trainer

before_batch = trainer.RunTrainer._before_batch
def stopped(trainer, batch):
    if trainer.state.global_step == {BEST}:
        signal.raise_signal(signal.SIGINT)
    before_batch(trainer, batch)
trainer.RunTrainer._before_batch = stopped
"""


def test_a_run_stopped_during_its_evaluation(
    overfitted: Path, processes: ForkServer, run_config: MakeConfig, cli: Cli, tmp_path: Path
) -> None:
    """It is stopped again while it repeats the evaluation: no further step is taken before that is done."""
    config = overfitting(tmp_path, run_config)
    for resume in ([], ["--resume"]):
        child = processes.start("train", config, *resume, first=STOP)
        assert child.wait() == 130, child.said()
        assert child.said().count("held-out loss") == (0 if resume else 4)
        assert checkpoints(tmp_path / "out.partial")[0].name == f"checkpoint-{BEST}"
    ran = cli("train", config, "--resume")
    assert ran.code == 0, ran.err
    check_as_if_undisturbed(tmp_path, overfitted)


@pytest.fixture(scope="module")
def after_best(overfitted: Path, processes: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run, killed a few steps after the best one."""
    folder = tmp_path_factory.mktemp("after-best")
    values = yaml.safe_load((overfitted / "run.yaml").read_text()) | {"output_dir": str(folder / "out")}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    (folder / "rows.jsonl").touch()
    killed(processes, MOMENTS["after it"], folder / "run.yaml")
    return folder


def changed(*settings: str) -> list[str]:
    """Arguments with which a run is resumed under other settings."""
    allowed = [part for setting in settings for part in ("--allow-change", setting.partition("=")[0])]
    return ["--resume", *allowed, *(part for setting in settings if "=" in setting for part in ("--set", setting))]


CHANGES: dict[str, tuple[list[str], int]] = {
    "keep": (["training.keep=last"], LAST),
    "patience": (["training.patience=1"], BEST),
    "learning rate": (["training.learning_rate=1e-9"], BEST),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_settings_after_the_best_step(name: str, after_best: Path, cli: Cli, tmp_path: Path) -> None:
    settings, kept = CHANGES[name]
    ran = cli("train", copy_of(after_best, tmp_path), *changed(*settings))
    assert ran.code == 0, ran.err
    metrics = record(tmp_path / "out")["metrics"]
    assert (metrics["kept_step"], metrics["best_held_out_loss"] == metrics["held_out_loss"]) == (kept, kept == BEST)
    assert metrics["stopped_early"] == (name == "patience")


def test_evaluations_on_other_rows_are_discarded(after_best: Path, cli: Cli, tmp_path: Path) -> None:
    """And so are those whose weights were not kept."""
    config = copy_of(after_best, tmp_path)
    other = write_rows(tmp_path / "other.jsonl", LEARNT)
    ran = cli("train", config, *changed(f"data.validation={other}"))
    assert ran.code == 0, ran.err
    metrics = record(tmp_path / "out")["metrics"]
    assert "evaluations up to step 16 do not count: " in ran.err
    assert metrics["kept_step"] == LAST and metrics["evaluations"] == 3
    assert held_out_steps(tmp_path / "out") == [18, 21, 24]


def test_evaluations_on_removed_validation_rows_are_discarded(after_best: Path, cli: Cli, tmp_path: Path) -> None:
    """The adapter has no held-out loss from them, and neither has its card."""
    ran = cli("train", copy_of(after_best, tmp_path), *changed("data.validation=null", "training.eval_steps=null"))
    assert ran.code == 0, ran.err
    metrics = record(tmp_path / "out")["metrics"]
    assert (metrics["kept_step"], metrics["held_out_loss"], held_out_steps(tmp_path / "out")) == (LAST, None, [])


@pytest.mark.parametrize("is_earlier_release, counted", [(True, 4), (False, 8)])
def test_a_checkpoint_at_the_best_step(
    overfitted: Path, processes: ForkServer, run_config: MakeConfig, cli: Cli, tmp_path: Path,
    is_earlier_release: bool, counted: int,
) -> None:  # fmt: skip
    """A checkpoint of an earlier release, without a record of the best step, is evaluated again. Only its own files are
    read."""
    config = overfitting(tmp_path, run_config, training={"save_steps": 5, "logging_steps": 3})
    killed(processes, f"kill(trainer.RunTrainer, 'model_inputs', at({BEST}))", config)
    checkpoint = checkpoints(tmp_path / "out.partial")[0]
    if is_earlier_release:
        values = json.loads((checkpoint / RUN).read_text())
        assert values.pop("best")["step"] == BEST and values.pop("unreported")["steps"] == 0
        (checkpoint / RUN).write_text(json.dumps(values))
        (checkpoint / "manifest.json").unlink()
        seal(checkpoint)
    (checkpoint / BEST_WEIGHTS).write_text("planted")
    ran = cli("train", config, "--resume")
    assert ran.code == 0, ran.err
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (overfitted / "out" / WEIGHTS).read_bytes()
    assert record(tmp_path / "out")["metrics"]["evaluations"] == counted
    assert held_out_steps(tmp_path / "out") == [*range(3, LAST + 1, 3)]


def test_a_best_step_whose_weights_were_not_kept_is_discarded(
    overfitted: Path, processes: ForkServer, run_config: MakeConfig, cli: Cli, tmp_path: Path
) -> None:
    config = overfitting(tmp_path, run_config, training={"keep": "last"})
    killed(processes, MOMENTS["after it"], config)
    ran = cli("train", config, *changed("training.keep=best"))
    assert ran.code == 0, ran.err
    assert f"evaluations up to step 16 do not count: the weights of step {BEST}" in ran.err
    assert record(tmp_path / "out")["metrics"]["kept_step"] > BEST


# Patience


def test_patience_ends_the_run(
    overfitted: Path, processes: ForkServer, run_config: MakeConfig, cli: Cli, tmp_path: Path
) -> None:
    """The run ends two evaluations after the best one. If it is killed then, it resumes to publish without further
    steps."""
    config = overfitting(tmp_path, run_config, training={"patience": 2, "logging_steps": 5})
    ran = cli("train", config, "--set", f"output_dir={tmp_path / 'straight'}")
    assert ran.code == 0, ran.err
    assert f"at step 21 of {LAST}: 2 evaluations in a row without a lower held-out loss" in ran.out
    straight = record(tmp_path / "straight")
    metrics = straight["metrics"]
    assert (metrics["steps"], metrics["kept_step"], metrics["stopped_early"]) == (21, BEST, True)
    assert [entry["step"] for entry in straight["curve"]][-2:] == [21, 21]  # the loss of the last step
    assert (tmp_path / "straight" / WEIGHTS).read_bytes() == (overfitted / "out" / WEIGHTS).read_bytes()
    killed(processes, MOMENTS["after the last step"], config)
    ran = cli("train", config, *changed("training.learning_rate=1e-3"))
    check_refused(ran, 7, (Code.RESUME_CHANGED, "", "training.learning_rate"))
    ran = cli("train", config, "--resume")
    assert ran.code == 0 and "held-out loss" not in ran.err, ran.err
    assert curve(record(tmp_path / "out")) == curve(straight)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "straight" / WEIGHTS).read_bytes()


def test_patience_while_keeping_the_last_step(
    overfitted: Path, cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    ran = cli("train", overfitting(tmp_path, run_config, training={"patience": 1, "keep": "last"}))
    assert ran.code == 0, ran.err
    metrics = record(tmp_path / "out")["metrics"]
    assert (metrics["steps"], metrics["kept_step"], metrics["stopped_early"]) == (18, 18, True)
    assert metrics["held_out_loss"] == metrics["last_held_out_loss"] > metrics["best_held_out_loss"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "optimistic" not in card and f"at step {BEST}" in card


# Test rows


def test_test_rows_are_scored_once(
    overfitted: Path, processes: ForkServer, cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    """As `evaluate` scores them, without any influence. One of them is in train, one in validation, and one occurs
    twice."""
    new = [{"prompt": f"{number} and {number} make", "completion": f" {number}"} for number in range(30, 35)]
    path = write_rows(tmp_path / "test.jsonl", [*new, new[0], LEARNT[3], HELD_OUT[1]])
    config = overfitting(tmp_path, run_config, data={"test": str(path)})
    killed(processes, MOMENTS["after it"], config)
    write_rows(path, new)
    check_refused(cli("train", config, "--resume"), 7, (Code.RESUME_CHANGED, "", "data.test"))
    write_rows(path, [*new, new[0], LEARNT[3], HELD_OUT[1]])
    ran = cli("train", config, "--resume")
    assert ran.code == 0, ran.err
    for split in ("train", "validation"):
        assert f"1 of the test rows is also in {split} (" in ran.err
    found = record(tmp_path / "out")
    score = found["metrics"]["test"]
    low, high = score["interval"]
    assert (score["rows"], score["distinct"]) == (8, 7) and low < score["loss"] < high
    assert f"{score['loss']:.4f} on 8 test rows" in ran.out
    assert found["fingerprints"]["test"] and str(path) in (tmp_path / "out" / "run.yaml").read_text()
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (overfitted / "out" / WEIGHTS).read_bytes()
    scored = json.loads(cli("evaluate", "--adapter", tmp_path / "out", "--data", path, "--json").out)
    assert score["loss"] == pytest.approx(scored["adapter"]["loss"], abs=1e-5)


def test_few_test_rows_have_no_interval(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """Test rows do not require validation rows."""
    ran = cli("train", run_config(data={"test": str(write_rows(tmp_path / "test.jsonl", HELD_OUT[:4]))}))
    assert ran.code == 0, ran.err
    assert record(tmp_path / "out")["metrics"]["test"]["interval"] is None
    assert "on 4 test rows (no interval: " in ran.out and "held-out" not in ran.out


# Several processes


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_keep_the_same_step(processes: ForkServer, run_config: MakeConfig, tmp_path: Path) -> None:
    """Both are killed after the best step, and both resume with it."""
    test = str(write_rows(tmp_path / "test.jsonl", HELD_OUT))
    training = {"per_device_train_batch_size": 2, "patience": 2}
    config = overfitting(tmp_path, run_config, data={"test": test}, training=training, lora={"lora_dropout": 0.0})
    straight = processes.launch(2, "train", config, "--set", f"output_dir={tmp_path / 'straight'}")
    assert [child.wait() for child in straight] == [0, 0], straight[0].said()
    each: list[dict[str, Any]] = [{"first": KILLS + MOMENTS["after it"]}] * 2
    assert all(child.wait() != 0 for child in processes.launch(2, "train", config, each=each))
    children = processes.launch(2, "train", config, "--resume")
    assert [child.wait() for child in children] == [0, 0], children[0].said()
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "straight" / WEIGHTS).read_bytes()
    metrics = record(tmp_path / "out")["metrics"]
    assert (metrics["steps"], metrics["kept_step"]) == (18, 12)
    assert metrics["test"]["loss"] == pytest.approx(metrics["held_out_loss"], abs=1e-5)
