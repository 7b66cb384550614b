"""A run continues where it was stopped, or reports why it does not."""

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT_TEMPLATE, check_refused, config_in, is_problem, problem_text, tiny_llama, tree
from fork_server import ForkServer
from running import (
    LONG,
    RESTLESS,
    WEIGHTS,
    Cli,
    MakeConfig,
    before_batch,
    checkpoints,
    copy_of,
    curve,
    flip,
    interrupt,
    straight,
    until,
)

from loratune.codes import Code
from loratune.system.files import kind as kind_of_file
from loratune.training.checkpoints import resume as resume_module
from loratune.training.checkpoints import run_dir
from loratune.training.checkpoints.store import newest_whole

SKIPPED = Code.RESUME_CHECKPOINT
VARIANTS: dict[str, dict[str, Any]] = {
    "bfloat16, evaluated on the way": {
        "model": {"dtype": "bfloat16"}, "data": {"validation": 0.2}, "training": {"eval_steps": 3}
    },
    "float32": {},
    "packed in batches": {"data": {"packing": "batch"}},
    "packed in full": {"data": {"packing": "full", "max_length": 20}},
    "adafactor": {"training": {"optim": "adafactor"}},
    "cosine": {"training": {"lr_scheduler_type": "cosine", "warmup_steps": 3}},
    "checkpointed": {"training": {"activation_checkpointing": True}},
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=() if one == "float32" else pytest.mark.slow) for one in VARIANTS]
)
def test_killed_and_resumed_run_matches_an_uninterrupted_one(
    name: str, processes: ForkServer, run_config: MakeConfig, tmp_path: Path, tiny_dir: Path
) -> None:
    """Killed twice in mid-epoch, at some point after the first checkpoint and after the next one."""
    sections = {key: RESTLESS.get(key, {}) | VARIANTS[name].get(key, {}) for key in {**RESTLESS, **VARIANTS[name]}}
    config = run_config(**sections)
    expected = straight(processes, config, tmp_path)
    last: list[str] = []
    for arguments in ((), ("--resume",)):
        child = processes.start("train", config, *arguments)
        until(lambda last=last: any(path.name not in last for path in checkpoints(tmp_path / "out.partial")), child)
        child.send(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        last = [path.name for path in checkpoints(tmp_path / "out.partial")]
    child = processes.start("train", config, "--resume")
    assert child.wait() == 0, child.said()
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == expected
    records = [json.loads((tmp_path / name / "loratune.json").read_text()) for name in ("out", "straight")]
    assert curve(records[0]) == curve(records[1])
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("asked", [3, *(pytest.param(kills, marks=pytest.mark.slow) for kills in (10, 50))])
def test_run_killed_at_random_times_matches_an_uninterrupted_one(
    asked: int, processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    """Many kills, some of them during the write of a checkpoint. There is a checkpoint at each step."""
    training = RESTLESS["training"] | {"num_train_epochs": 6 if asked < 50 else 30, "save_steps": 1}
    config = run_config(lora=RESTLESS["lora"], training=training)
    expected = straight(processes, config, tmp_path)
    dice, kills, resume = random.Random(0), 0, False
    while kills < asked:
        child = processes.start("train", config, *(["--resume"] if resume else []))
        before = len(checkpoints(tmp_path / "out.partial")) and checkpoints(tmp_path / "out.partial")[0]
        writing = tmp_path / "out.partial" / "checkpoints" / "unfinished"
        until(lambda before=before: checkpoints(tmp_path / "out.partial")[:1] not in ([], [before]), child)
        moment = dice.choice(["any", "writing", "rotating"])
        if moment == "writing":
            until(writing.exists, child, 0)
        elif moment == "rotating":
            until(lambda: len(checkpoints(tmp_path / "out.partial")) > 2, child, 0)
        time.sleep(dice.random() * 0.02)
        if child.poll() is not None:
            break
        child.send(signal.SIGKILL)
        child.wait()
        kills, resume = kills + 1, True
    assert kills > asked // 2
    if not (tmp_path / "out").exists():
        child = processes.start("train", config, "--resume")
        assert child.wait() == 0, child.said()
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == expected


STEPS = 20
STOPPED: dict[str, Any] = {"training": {"save_steps": 1, "num_train_epochs": STEPS // 5}}


@pytest.fixture(scope="module")
def stopped_run(processes: ForkServer, tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """The folder of a run that was stopped with two checkpoints."""
    folder = tmp_path_factory.mktemp("stopped")
    interrupt(processes, config_in(folder, tiny_dir)(**STOPPED), folder / "out.partial")
    return folder


@pytest.fixture(scope="module")
def undisturbed(processes: ForkServer, stopped_run: Path) -> bytes:
    """The adapter of the same run without an interruption."""
    return straight(processes, stopped_run / "run.yaml", stopped_run)


@pytest.fixture
def interrupted(stopped_run: Path, tmp_path: Path) -> Path:
    """The config of a copy of that run, which uses the rows of the original."""
    return copy_of(stopped_run, tmp_path)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: [file.unlink() for file in path.iterdir()], "it was not written to its end"),
    "partial": (lambda path: (path / "manifest.json").unlink(), "it was not written to its end"),
    "a file less": (lambda path: (path / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "cut": (lambda path: os.truncate(path / "optimizer.pt", 1000), "optimizer.pt is damaged"),
    "a bit": (lambda path: flip(path / WEIGHTS), f"{WEIGHTS} is damaged"),
    "manifest": (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json does not name"),
    "no JSON": (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint_is_detected(name: str, interrupted: Path, tmp_path: Path) -> None:
    damage, reason = DAMAGES[name]
    newest, older = checkpoints(tmp_path / "out.partial")
    damage(newest)
    checkpoint, _, (problem,) = newest_whole(newest.parent)
    assert checkpoint == older and (problem.code, problem.where) == (SKIPPED, str(newest))
    assert f"checkpoint skipped: {reason}" in problem.what


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=() if one == "a bit" else pytest.mark.slow) for one in DAMAGES]
)
def test_damaged_checkpoint_is_skipped(
    name: str, interrupted: Path, cli: Cli, tmp_path: Path, undisturbed: bytes, stopped_run: Path
) -> None:
    """The older checkpoint leads to the same adapter."""
    damage, reason = DAMAGES[name]
    newest, older = checkpoints(tmp_path / "out.partial")
    damage(newest)
    ran = cli("train", interrupted, "--resume")
    assert ran.code == 0, ran.err
    (skipped,) = [line for line in ran.err.splitlines() if is_problem(line, (SKIPPED, str(newest), ""))]
    assert f": checkpoint skipped: {reason}" in skipped
    assert f"resuming from step {older.name.split('-')[1]}\n" in ran.err
    hashes = [folder / "train_rows.hashes" for folder in (tmp_path / "out", stopped_run / "straight")]
    assert hashes[0].read_bytes() == hashes[1].read_bytes()


def test_resume_without_an_intact_checkpoint_is_refused(interrupted: Path, cli: Cli, tmp_path: Path) -> None:
    """A run must not restart silently."""
    newest, older = checkpoints(tmp_path / "out.partial")
    (newest / "optimizer.pt").unlink()
    flip(older / "trainer_state.json")
    before = tree(tmp_path / "out.partial")
    ran = cli("train", interrupted, "--resume")
    problems = (
        (SKIPPED, str(newest), ""),
        (SKIPPED, str(older), ""),
        (Code.RESUME_CHECKPOINT, str(newest.parent), ""),
    )
    check_refused(ran, 7, *problems)
    first, second, third = ran.errors
    assert ": optimizer.pt is missing" in first and ": trainer_state.json is damaged" in second
    assert third.endswith("; start afresh with --overwrite")
    assert tree(tmp_path / "out.partial").items() >= {k: v for k, v in before.items() if k != "lock"}.items()


def reseal(checkpoint: Path, content: str) -> None:
    """Replace the record of a run, and update the manifest to match."""
    raw = content.encode(errors="surrogateescape")
    (checkpoint / "run.json").write_bytes(raw)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["run.json"] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def without(run: dict[str, Any], *path: str) -> dict[str, Any]:
    """A copy of a record without a key."""
    first, *rest = path
    return {key: without(value, *rest) if key == first else value for key, value in run.items() if rest or key != first}


RECORDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda run: [run],
    "a number": lambda run: 7,
    "null": lambda run: None,
    "no config": lambda run: without(run, "config"),
    "no learning rate": lambda run: without(run, "config", "training", "learning_rate"),
    "no batch size": lambda run: without(run, "config", "training", "per_device_train_batch_size"),
    "no fingerprint": lambda run: without(run, "fingerprints", "base"),
    "no rows": lambda run: without(run, "rows"),
    "no changes": lambda run: without(run, "changes"),
    "config of another type": lambda run: run | {"config": "training"},
    "training of another type": lambda run: run | {"config": run["config"] | {"training": [1]}},
    "a rate as text": lambda run: run | {"config": {"training": run["config"]["training"] | {"learning_rate": "1"}}},
    "a rate of 0": lambda run: run | {"config": {"training": run["config"]["training"] | {"learning_rate": 0}}},
    "a rate that is none": lambda run: (
        run | {"config": {"training": {**run["config"]["training"], "learning_rate": float("nan")}}}
    ),
    "processes as text": lambda run: run | {"processes": "2"},
    "sharding as a number": lambda run: run | {"sharding": 2},
    "fingerprints as numbers": lambda run: run | {"fingerprints": {"base": 1, "data": 2, "validation": None}},
    "conditions of another type": lambda run: run | {"conditions": ["torch"]},
    "a budget without steps": lambda run: (
        run | {"max_minutes": 3, "config": {"training": run["config"]["training"] | {"max_steps": -1}}}
    ),
    "a budget of too many steps": lambda run: (
        run | {"max_minutes": 3, "config": {"training": run["config"]["training"] | {"max_steps": 2**31}}}
    ),
    "changes of another kind": lambda run: run | {"changes": [1]},
    "changes without keys": lambda run: run | {"changes": [{"step": 1}]},
    "changes that are one": lambda run: run | {"changes": {}},
    "seconds as text": lambda run: run | {"seconds": "3"},
    "seconds without end": lambda run: run | {"seconds": float("inf")},
    "a best step that is a number": lambda run: run | {"best": 7},
    "a best step without a loss": lambda run: run | {"best": {"step": 1, "evaluations": 1, "since": 0}},
    "a best step as text": lambda run: run | {"best": {"step": "1", "loss": 2.0, "evaluations": 1, "since": 0}},
}
TEXTS = {
    "nothing": "",
    "no JSON": "{",
    "not UTF-8": "\udcff",
    "nested": "[" * 200_000,
    "a huge number": "9" * 10_000,
    "huge": " " * (65 << 20),
}


def test_damaged_run_record_is_skipped_or_refused(interrupted: Path, cli: Cli, tmp_path: Path) -> None:
    """With a matching manifest. The older checkpoint is used; without one, the exit code is 7."""
    newest, older = checkpoints(tmp_path / "out.partial")
    run = json.loads((newest / "run.json").read_text())
    for name, content in {**TEXTS, **{name: json.dumps(make(run)) for name, make in RECORDS.items()}}.items():
        reseal(newest, content)
        checkpoint, before, skipped = newest_whole(tmp_path / "out.partial" / "checkpoints")
        assert (checkpoint, before.config, before.fingerprints) == (older, run["config"], run["fingerprints"]), name
        assert [(problem.code, problem.where) for problem in skipped] == [(SKIPPED, str(newest))]
        assert ": run.json is damaged: " in skipped[0].what
    for damaged in (newest, older):
        reseal(damaged, "[]")
    before = tree(tmp_path / "out.partial")
    ran = cli("train", interrupted, "--resume")
    problems = [(SKIPPED, str(path), "") for path in (newest, older)]
    check_refused(ran, 7, *problems, (Code.RESUME_CHECKPOINT, str(newest.parent), ""))
    assert ran.err.count("\n") == 3 and ran.err.endswith("; start afresh with --overwrite\n")
    assert all(": run.json is damaged: it is not the record of a run" in line for line in ran.errors[:2])
    assert tree(tmp_path / "out.partial") == before
    reseal(older, json.dumps(run | {"seconds": 1000.0}))
    ran = cli("train", interrupted, "--resume")
    assert ran.code == 0, ran.err
    metrics = json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]
    assert metrics["seconds"] > 1000, "the time of all steps, as the tokens are those of all"
    assert metrics["tokens_per_second"] > metrics["tokens"] / 1000, "those since it was resumed"
    (skipped_line,) = [line for line in ran.err.splitlines() if is_problem(line, (SKIPPED, str(newest), ""))]
    assert ": run.json is damaged: it is not the record of a run [" in skipped_line


ODD_FILES = ("optimizer.pt", "run.json", "manifest.json", "trainer_state.json", "added")


def test_links_and_pipes_in_a_checkpoint_are_not_followed(interrupted: Path, cli: Cli, tmp_path: Path) -> None:
    """Links are refused even if their targets have the same bytes, and named pipes do not block."""
    newest, older = checkpoints(tmp_path / "out.partial")
    kept = newest.parent
    for name in ODD_FILES:
        path, aside = newest / name, tmp_path / "aside"
        if path.exists():
            path.rename(aside)
        for kind, make in {
            "a link": lambda path, aside=aside: path.symlink_to(aside),
            "a named pipe": os.mkfifo,
        }.items():
            make(path)
            checkpoint, _, skipped = newest_whole(kept)
            assert checkpoint == older
            assert [(problem.code, problem.where) for problem in skipped] == [(SKIPPED, str(newest))]
            assert skipped[0].what.endswith(f": {name} is {kind}")
            path.unlink()
        if aside.exists():
            path.mkdir()
            assert newest_whole(kept)[0] == older
            path.rmdir()
            aside.rename(path)
    assert newest_whole(kept)[0] == newest
    manifest = json.loads((newest / "manifest.json").read_text())
    for name in ("../../../rows.jsonl", str(tmp_path / "rows.jsonl")):
        entry = {"bytes": 0, "sha256": ""}
        (newest / "manifest.json").write_text(json.dumps(manifest | {name: entry}))
        (fault,) = newest_whole(kept)[2]
        assert fault.code is SKIPPED and "manifest.json names files outside" in fault.what


def test_changed_inputs_are_refused_on_resume(
    processes: ForkServer, run_config: MakeConfig, cli: Cli, tmp_path: Path, tiny_dir: Path
) -> None:
    """Not shared with other tests, because the rows are changed."""
    rows, interrupted = tmp_path / "rows.jsonl", run_config(**STOPPED)
    interrupt(processes, interrupted, tmp_path / "out.partial")
    ran = cli("train", interrupted, "--resume", "--set", "lora.r=4", "--set", "training.learning_rate=0.5")
    changed = Code.RESUME_CHANGED
    check_refused(ran, 7, (changed, "", "lora.r"), (changed, "", "training.learning_rate"))
    rank, rate = ran.errors
    assert "was 8 when the run was interrupted, and is now 4;" in rank and rank.endswith("; change it back")
    assert rate.endswith("; change it back, or allow the change with --allow-change training.learning_rate")
    kept = rows.read_text()
    rows.write_text(kept.replace("0 and 0 make", "9 and 9 make"))
    ran = cli("train", interrupted, "--resume")
    check_refused(ran, 7, (Code.RESUME_CHANGED, "", "data.train"))
    assert "the training rows have changed since the run was interrupted;" in ran.err  # as many rows and tokens
    rows.write_text(kept + kept.splitlines()[0] + "\n")
    ran = cli("train", interrupted, "--resume")
    check_refused(ran, 7, (Code.RESUME_CHANGED, "", "data.train"))
    assert "interrupted (40 rows with 695 tokens, now 41 rows with 710 tokens);" in ran.err
    rows.write_text(kept)
    other = shutil.copytree(tiny_dir, tmp_path / "other")
    ran = cli("train", interrupted, "--resume", "--set", f"model.name_or_path={other}")
    check_refused(ran, 7, (changed, "", "model.name_or_path"))
    assert ran.err.endswith(" with --allow-change model.name_or_path\n")
    sick = tiny_llama()
    sick.model.embed_tokens.weight.data[0, 0] += 1
    sick.save_pretrained(other)
    moved = ("--set", f"model.name_or_path={other}", "--allow-change", "model.name_or_path")
    ran = cli("train", interrupted, "--resume", *moved)
    check_refused(ran, 7, (Code.RESUME_CHANGED, "", "model.name_or_path"))
    shutil.rmtree(other)
    shutil.copytree(tiny_dir, other)
    ran = cli("train", interrupted, "--resume", *moved)
    assert ran.code == 0, ran.err


def test_changed_validation_set_or_template_is_refused_on_resume(
    processes: ForkServer, run_config: MakeConfig, cli: Cli, tmp_path: Path
) -> None:
    """Also a changed template that renders these rows identically."""
    held, template = tmp_path / "held.jsonl", tmp_path / "chat.jinja"
    turns = '{"messages": [{"role": "user", "content": "1 and"}, {"role": "assistant", "content": "3"}]}\n'
    held.write_text(turns)
    (tmp_path / "turns.jsonl").write_text(turns.replace("1 and", "2 and") * 40)
    template.write_text(CHAT_TEMPLATE)
    rows = {"train": str(tmp_path / "turns.jsonl"), "validation": str(held), "chat_template": str(template)}
    config = run_config(data=rows, training=LONG["training"])
    child = processes.start("train", config)
    until(lambda: "step     1/" in child.said(), child)
    child.send(signal.SIGINT)
    assert child.wait() == 130
    template.write_text(CHAT_TEMPLATE + "{# a remark #}")
    ran = cli("train", config, "--resume")
    check_refused(ran, 7, (Code.RESUME_CHANGED, "", "data.chat_template"))
    template.write_text(CHAT_TEMPLATE)
    held.write_text(turns.replace("3", "4"))
    ran = cli("train", config, "--resume")
    check_refused(ran, 7, (Code.RESUME_CHANGED, "", "data.validation"))
    ran = cli("train", config, "--resume", "--allow-change", "data.validation", "--set", "training.num_train_epochs=1")
    check_refused(ran, 7, (Code.RESUME_CHANGED, "", "training.num_train_epochs"))
    assert "training.num_train_epochs: was 500.0" in ran.err


def test_allowed_learning_rate_change_takes_effect(interrupted: Path, cli: Cli, tmp_path: Path) -> None:
    """The next step uses the new rate, from which the schedule continues."""
    step = int(checkpoints(tmp_path / "out.partial")[0].name.split("-")[1])
    arguments = ("--set", "training.learning_rate=0.001", "--allow-change", "training.learning_rate")
    ran = cli("train", interrupted, "--resume", *arguments)
    assert ran.code == 0, ran.err
    assert f"training.learning_rate was 0.01 up to step {step}, and is 0.001 from there" in ran.err
    record = json.loads((tmp_path / "out" / "loratune.json").read_text())
    rates = {entry["step"]: entry["learning_rate"] for entry in record["curve"] if "learning_rate" in entry}
    assert rates[step] == pytest.approx(0.01 * (STEPS - step + 1) / STEPS)
    assert rates[step + 1] == pytest.approx(0.001 * (STEPS - step) / STEPS)
    assert rates[step + 2] == pytest.approx(0.001 * (STEPS - step - 1) / STEPS)
    assert record["changes"] == [{"step": step, "key": "training.learning_rate", "was": 0.01, "is": 0.001}]


@pytest.mark.parametrize(
    "settings",
    [
        {"training.num_train_epochs": "6", "training.logging_steps": "5"},
        {"training.max_grad_norm": "0.001"},
        {"lora.lora_dropout": "0.5"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_allowed_changes_take_effect(
    settings: dict[str, str], interrupted: Path, cli: Cli, tmp_path: Path, undisturbed: bytes
) -> None:
    changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}", "--allow-change", key)]
    ran = cli("train", interrupted, "--resume", *changes)
    assert ran.code == 0, ran.err
    assert (tmp_path / "out" / WEIGHTS).read_bytes() != undisturbed
    if "training.logging_steps" in settings:
        record = json.loads((tmp_path / "out" / "loratune.json").read_text())
        assert record["metrics"]["steps"] == 6 * 5 and 7 not in {entry["step"] for entry in record["curve"]}


def test_changes_that_cannot_take_effect_are_refused(interrupted: Path, cli: Cli, run_config: MakeConfig) -> None:
    ran = cli("train", interrupted, "--resume", "--set", "lora.r=4", "--allow-change", "lora.r")
    check_refused(ran, 7, (Code.RESUME_CHANGED, "", "--allow-change lora.r"))
    assert f"; leave it out; these keys can be changed: {', '.join(resume_module.CHANGEABLE)}\n" in ran.err
    ran = cli("train", run_config(output_dir="new"), "--allow-change", "training.learning_rate")
    check_refused(ran, 2, (Code.USAGE_CONFLICT, "", "--allow-change"))
    assert "--resume" in ran.err and ran.err.count("\n") == 1


def test_failed_overwrite_keeps_the_interrupted_run(interrupted: Path, cli: Cli, tmp_path: Path) -> None:
    before = [path.name for path in checkpoints(tmp_path / "out.partial")]
    ran = cli("train", interrupted, "--overwrite", "--set", "lora.target_modules=[bogus]")
    assert ran.code == 3
    assert [path.name for path in checkpoints(tmp_path / "out.partial")] == before
    assert cli("train", interrupted, "--resume").code == 0


def test_resume_with_fewer_steps_than_taken_is_refused(interrupted: Path, cli: Cli) -> None:
    allowed = ("--resume", "--allow-change", "training.num_train_epochs", "--set", "training.num_train_epochs=0.2")
    ran = cli("train", interrupted, *allowed)
    check_refused(ran, 7, (Code.RESUME_CHANGED, "", "training"))
    assert " steps, but only 1 are set;" in ran.err


@pytest.mark.parametrize(
    "kind", ["a link", *(pytest.param(one, marks=pytest.mark.slow) for one in ("a file", "a named pipe"))]
)
def test_obstructed_checkpoint_path_is_reported(
    kind: str, processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    """A file, link or directory that appears at the checkpoint's path during the run is left alone."""
    (tmp_path / "outside").mkdir()
    make = {
        "a file": "open('{place}', 'w').close()",
        "a link": f"os.symlink('{tmp_path / 'outside'}', '{{place}}')",
        "a named pipe": "os.mkfifo('{place}')",
    }[kind]
    config = run_config(training={"save_steps": 2})
    for name in ("unfinished", "checkpoint-2"):
        place = tmp_path / "out.partial" / "checkpoints" / name
        child = processes.start("train", config, first=before_batch(1, make.format(place=place)))
        assert child.wait() == 8, child.said()
        line = problem_text(child.said().splitlines()[-1])
        assert is_problem(line, (Code.OUTPUT_UNUSABLE, str(place), "")), line
        assert f": is {kind} " in line and line.endswith("; move it away, and start again")
        assert [*(tmp_path / "outside").iterdir()] == []
        assert kind_of_file(place) == kind
        shutil.rmtree(tmp_path / "out.partial")


def test_resume_is_suggested_only_if_a_checkpoint_was_kept(
    processes: ForkServer, run_config: MakeConfig, cli: Cli, tmp_path: Path
) -> None:
    """The cases: a run killed during its first save, and a full disk at the first save."""
    config = run_config(training={"save_steps": 1})
    (tmp_path / "out.partial" / "checkpoints" / "unfinished" / "checkpoint-1").mkdir(parents=True)
    assert not run_dir.check(str(tmp_path / "out"), resume=False, overwrite=False).is_resumable()
    child = processes.start("train", config, limit=30_000)
    assert child.wait() == 8
    last = child.said().splitlines()[-1]
    assert f"[{Code.SYSTEM_DISK_FULL}]" in last and last.endswith("; make room, and start again"), last
    assert "no room for a checkpoint" in last
    damaged = tmp_path / "out.partial" / "checkpoints" / "checkpoint-3"
    damaged.mkdir(parents=True)
    ran = cli("train", config)
    check_refused(ran, 2, (Code.RUN_INTERRUPTED, str(tmp_path / "out"), "output_dir"))
    assert ran.out == "" and ran.err.endswith("; start afresh with --overwrite\n") and ran.err.count("\n") == 1
    child = processes.start("train", config, "--overwrite")
    until(lambda: "trainable params" in child.said(), child)
    child.send(signal.SIGINT)
    child.send(signal.SIGINT)
    child.wait()
    assert ("--resume" in child.said()) == bool(checkpoints(tmp_path / "out.partial"))
