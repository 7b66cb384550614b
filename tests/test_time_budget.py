"""`training.max_minutes`: the number of steps that fit into a budget, and that runs take exactly these steps.

The arithmetic is tested with made-up times. Tests of complete runs assert nothing that depends on the clock.
"""

import json
import re
import signal
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import check_refused, config_in, tree, write_rows
from fork_server import Child, ForkServer
from running import WEIGHTS, Cli, MakeConfig, before_batch, checkpoints, until
from test_preferences import config as compared_config

from loratune.codes import Code
from loratune.config import TrainingSection
from loratune.data.packing import BatchLayout
from loratune.system.launcher import Group
from loratune.training.batching import DistributedBatchSampler
from loratune.training.duration import Costs
from loratune.training.schedule import Seconds
from loratune.training.time_budget import FEWEST, WARM_UP, is_timed_enough, steps_within

# The speed of batches


@pytest.mark.parametrize(
    ("batches", "elapsed", "left", "expected"),
    [
        (WARM_UP + 6, 3.0, 100.0, True),
        (WARM_UP + 6, 2.9, 100.0, False),  # less than 3 % of the remaining time
        (WARM_UP + 5, 3.0, 100.0, False),
        (WARM_UP + 5, 20.0, 36_000.0, False),
        (WARM_UP + 6, 20.0, 36_000.0, True),  # long enough for ten hours
        (1, 100.0, 100.0, True),  # the time is up
    ],
)
def test_timing_stops_after_enough_batches(batches: int, elapsed: float, left: float, expected: bool) -> None:
    assert is_timed_enough(batches, elapsed, left) is expected


# The operations of batches

LENGTHS = np.array([5, 9, 3, 7, 2, 8, 4, 6, 5, 3, 9], np.int64)
SUPERVISED = np.array([2, 3, 1, 2, 1, 4, 2, 3, 2, 1, 5], np.int64)
WEIGHTING = (10.0, 100.0, 0.5)


class Rows:
    """Rows of the lengths in LENGTHS."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, number: int, /) -> int:
        return number


def costs(packing: Any, size: int = 2) -> Costs:
    return Costs(BatchLayout(Rows(), LENGTHS, packing, size, 10, pad_id=0), LENGTHS, SUPERVISED, WEIGHTING)


def row(number: int, length: int | None = None) -> float:
    length = length or int(LENGTHS[number])
    return 10 * length + 100 * int(SUPERVISED[number]) + 0.5 * length**2


def test_costs_of_flat_and_padded_batches() -> None:
    numbers = np.array([[0, 1], [2, 3]])
    assert costs("batch").of_batches(numbers).tolist() == [row(0) + row(1), row(2) + row(3)]
    assert costs("none").of_batches(numbers).tolist() == [row(0, 9) + row(1, 9), row(2, 7) + row(3, 7)]


def test_costs_of_packs() -> None:
    found = costs("full")
    packs = found.layout.items.packs  # type: ignore[attr-defined]
    batches, operations = found.of_pass()
    assert batches == len(packs) < len(LENGTHS)
    assert operations == pytest.approx(sum(map(row, range(len(LENGTHS)))))
    assert found.of_batches(np.array([[1]])).tolist() == pytest.approx([sum(row(int(number)) for number in packs[1])])


@pytest.mark.parametrize("packing", ["batch", "none"])
def test_costs_of_preference_pairs(packing: Any) -> None:
    """Both answers of a pair count. If padded, each is as long as the longest row of the batch."""
    lengths, supervised = LENGTHS[:10], SUPERVISED[:10]
    layout = BatchLayout(Rows(), lengths, packing, 2, 10, pad_id=0, rows_per_example=2)
    found = Costs(layout, lengths, supervised, WEIGHTING)
    longest = [9, 8] if packing == "none" else [None, None]
    batches = [(0, 1, 2, 3), (4, 5, 8, 9)]
    expected = [sum(row(number, most) for number in batch) for batch, most in zip(batches, longest, strict=True)]
    assert found.of_batches(np.array([[0, 1], [2, 4]])).tolist() == pytest.approx(expected)
    assert found.of_pass()[0] == 3


def test_reference_pass_counts_as_work() -> None:
    """A reference needs another pass over all rows. KTO also reads each prompt with another answer."""
    found = costs("batch")
    work = {
        objective: found.work(TrainingSection(num_train_epochs=2, objective=objective), held_out=0)[1]
        for objective in ("sft", "orpo", "dpo", "kto")
    }
    once = sum(map(row, range(len(LENGTHS))))
    assert work["sft"] == work["orpo"] == pytest.approx(2 * once)
    assert work["dpo"] == pytest.approx(2.5 * once) and work["kto"] == pytest.approx(1.5 * 2.5 * once)


class Process(Group):
    """A stand-in for one of several processes."""

    def __init__(self, rank: int, number: int):
        self.rank, self.count = rank, number  # type: ignore[misc]


@pytest.mark.parametrize("packing", ["batch", "none"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_micro_step_costs_follow_the_sampler_of_the_run(packing: str, processes: int) -> None:
    """The slowest process determines the cost, in the order of each epoch."""
    found = costs(packing)
    samplers = [DistributedBatchSampler(11, 2, 7, Process(rank, processes)) for rank in range(processes)]
    for epoch, operations in enumerate(islice(found.micro_steps(7, processes), 3)):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        expected = [
            max(float(found.of_batches(np.array(share))) for share in shares if share)
            for shares in zip(*samplers, strict=True)
        ]
        assert operations.tolist() == pytest.approx(expected)


# The seconds of a run


def test_further_passes_take_as_long_as_the_first() -> None:
    """Steps take 1, 3 and 2 s; an evaluation 3 s, a checkpoint half a second, the end five."""
    seconds = Seconds(np.array([1.0, 3.0, 2.0]), evaluation=3.0, checkpoint=0.5, end=5.0)
    ends = np.cumsum([1, 3, 2] * 4)
    assert [seconds.of_steps(steps) for steps in range(13)] == [0, *ends]
    assert seconds.besides(11, evaluations=2, save_steps=5) == 5 + 2 * 3 + 3 * 0.5
    assert steps_within(100.0, seconds.of_steps, 10**6) == 47  # 47 steps take 94 s, and 48 take 96
    assert steps_within(100.0, seconds.of_steps, 30) == 30 and steps_within(0.5, seconds.of_steps, 30) == 0


# Runs

MANY = [{"prompt": f"{number} and {number} make", "completion": f" {number + number}"} for number in range(80)]
SECTIONS: dict[str, Any] = {
    "lora": {"lora_dropout": 0.1},
    "training": {
        "max_minutes": 0.2, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "save_steps": 8,
        "logging_steps": 50,
    },
}  # fmt: skip


def budgeted(folder: Path, run_config: MakeConfig, **training: Any) -> Path:
    data = {"train": str(write_rows(folder / "many.jsonl", MANY)), "validation": 0.1}
    return run_config(**SECTIONS | {"data": data, "training": SECTIONS["training"] | training})


def steps_of(directory: Path) -> int:
    """The number of steps taken, which must be in run.yaml in place of the budget."""
    training = yaml.safe_load((directory / "run.yaml").read_text())["training"]
    assert not {"max_minutes", "num_train_epochs"} & training.keys()
    assert json.loads((directory / "loratune.json").read_text())["metrics"]["steps"] == training["max_steps"]
    return int(training["max_steps"])


def check_repeats(processes: ForkServer, folder: Path) -> None:
    """`train run.yaml` must give the same bytes."""
    child = processes.start("train", folder / "out" / "run.yaml", "--set", f"output_dir={folder / 'again'}")
    assert child.wait() == 0, child.said()
    assert steps_of(folder / "again") == steps_of(folder / "out")
    assert (folder / "again" / WEIGHTS).read_bytes() == (folder / "out" / WEIGHTS).read_bytes()


def with_room(
    start: Callable[[Path], list[Child]], folder: Path, run_config: MakeConfig, steps: int = 0
) -> tuple[Child, float]:
    """A run and its budget, which is raised if a busy machine made the run refuse a shorter one, or take fewer
    steps."""
    for minutes in (0.05, 0.2, 0.8, 3.2):
        children = start(budgeted(folder, run_config, max_minutes=minutes))
        child, codes = children[0], {one.wait() for one in children}
        if codes != {2} and (codes != {0} or not steps or steps_of(folder / "out") >= steps):
            break
        if codes == {0}:
            continue
        assert any(f"[{Code.CONFIG_BUDGET}]" in one.said() for one in children)  # the first that fails reports it
    assert codes == {0}, child.said()
    return child, minutes


def test_budgeted_run_can_be_repeated_from_run_yaml(
    processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    child, minutes = with_room(
        lambda config: [processes.start("train", config, "--overwrite")], tmp_path, run_config, steps=4 * FEWEST
    )
    steps = steps_of(tmp_path / "out")
    assert steps >= FEWEST
    assert f"training.max_steps is {steps} (as many as fit in {minutes:g} min: " in child.said()
    assert json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]["evaluations"] > 1
    check_repeats(processes, tmp_path)


@pytest.mark.parametrize("objective", [pytest.param("dpo", marks=pytest.mark.slow), "kto"])
def test_budgeted_preference_run_can_be_repeated_from_run_yaml(
    objective: str, processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    """With pairs and with unpaired answers."""

    def start(path: Path) -> list[Child]:
        minutes = yaml.safe_load(path.read_text())["training"]["max_minutes"]
        training = {"max_minutes": minutes, "max_steps": -1, "per_device_train_batch_size": 3, "eval_steps": None}
        return [processes.start("train", compared_config(run_config, tmp_path, objective, training=training))]

    child, minutes = with_room(start, tmp_path, run_config)
    steps = steps_of(tmp_path / "out")
    assert steps >= FEWEST and f"training.max_steps is {steps} (as many as fit in {minutes:g} min: " in child.said()
    check_repeats(processes, tmp_path)


@pytest.fixture(scope="module")
def interrupted(processes: ForkServer, tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """A folder with a killed run. Its epochs end long before its budget, so the number of steps is known."""
    folder = tmp_path_factory.mktemp("interrupted")
    config = budgeted(folder, config_in(folder, tiny_dir), max_minutes=0.5, num_train_epochs=3, save_steps=4)
    child = processes.start("train", config)
    until(lambda: len(checkpoints(folder / "out.partial")) > 1, child)
    child.send(signal.SIGKILL)
    child.wait()
    assert "training.max_minutes: has no effect, as there is time for the 3 epochs" in child.said()
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "key"),
    [
        (["--set", "training.max_minutes=20"], Code.RESUME_CHANGED, "training.max_minutes"),
        (
            ["--allow-change", "training.max_minutes"],
            Code.RESUME_CHANGED,
            "--allow-change training.max_minutes",
        ),
        (
            ["--set", "training.max_minutes=", "--set", "training.num_train_epochs="],
            Code.RESUME_CHANGED,
            "training.max_steps",
        ),
    ],
)
def test_changed_budget_is_refused_on_resume(
    interrupted: Path, cli: Cli, arguments: list[str], code: Code, key: str
) -> None:
    before = tree(interrupted)
    check_refused(cli("train", interrupted / "run.yaml", "--resume", *arguments), 7, (code, "", key))
    assert tree(interrupted) == before


def test_resumed_run_takes_the_same_steps(interrupted: Path, processes: ForkServer) -> None:
    child = processes.start("train", interrupted / "run.yaml", "--resume")
    assert child.wait() == 0, child.said()
    assert "timing" not in child.said()
    assert steps_of(interrupted / "out") == 3 * 12
    check_repeats(processes, interrupted)


def test_budget_cannot_be_added_on_resume(processes: ForkServer, run_config: MakeConfig, cli: Cli) -> None:
    config = run_config(training={"max_steps": 9, "save_steps": 5})
    assert processes.start("train", config, first=before_batch(3, "signal.raise_signal(signal.SIGINT)")).wait() == 130
    arguments = ["--set", "training.max_steps=", "--set", "training.max_minutes=3"]
    ran = cli("train", config, "--resume", *arguments)
    assert ran.code == 7 and "training.max_minutes: was not set" in ran.err


@pytest.mark.slow
def test_processes_agree_on_the_number_of_steps(processes: ForkServer, run_config: MakeConfig, tmp_path: Path) -> None:
    with_room(lambda config: processes.launch(2, "train", config), tmp_path, run_config)
    assert steps_of(tmp_path / "out") >= FEWEST


def test_ctrl_c_while_timing_steps_leaves_no_files(
    processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    child = processes.start("train", budgeted(tmp_path, run_config, max_minutes=60))
    until(lambda: "timing some steps" in child.said(), child)
    child.send(signal.SIGINT)
    assert child.wait() == 130
    assert not (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out").exists()


def test_dry_run_estimates_the_number_of_steps(run_config: MakeConfig, tmp_path: Path, cli: Cli) -> None:
    ran = cli("train", budgeted(tmp_path, run_config, max_minutes=5), "--dry-run")
    assert ran.code == 0, ran.err
    assert "(about as many as fit in 5 min: " in ran.err
    assert " passes over the rows" in ran.err


def test_dry_run_estimates_the_steps_of_preference_objectives(run_config: MakeConfig, tmp_path: Path, cli: Cli) -> None:
    """Including the time before the first step. ORPO has none, except for evaluating the held-out rows."""
    for objective in ("dpo", "orpo", "kto"):
        training = {"max_minutes": 5, "max_steps": -1, "eval_steps": None}
        ran = cli("train", compared_config(run_config, tmp_path, objective, training=training), "--dry-run")
        assert ran.code == 0, ran.err
        assert re.search(r"training.max_steps is \d+ \(about as many as fit in 5 min: ", ran.err)


def test_automatic_learning_rate_is_lower_for_more_epochs(run_config: MakeConfig, tmp_path: Path, cli: Cli) -> None:
    rates = []
    for epochs in (1, 6):
        changes = {"max_minutes": 5, "learning_rate": "auto", "num_train_epochs": epochs}
        ran = cli("train", budgeted(tmp_path, run_config, **changes), "--dry-run")
        assert ran.code == 0, ran.err
        assert epochs == 1 or "has no effect, as there is time for the 6 epochs" in ran.err
        (rate,) = re.findall(r"^auto: training.learning_rate is (\S+) ", ran.err, re.MULTILINE)
        rates.append(float(rate))
    once, lower = rates
    assert lower == pytest.approx(once / 3, rel=0.05)


def test_run_that_needs_less_than_the_budget_says_so(run_config: MakeConfig, tmp_path: Path, cli: Cli) -> None:
    ran = cli("train", budgeted(tmp_path, run_config, max_minutes=5, learning_rate="auto"), "--dry-run")
    assert ran.code == 0, ran.err
    assert "training.max_minutes: not all of the time is used: training ends after 4 passes over the rows" in ran.err
    path = budgeted(tmp_path, run_config, max_minutes=5, learning_rate="auto")
    ran = cli("train", path, "--dry-run", "--set", "lora.target_modules=all-linear")
    assert ran.code == 0 and "training ends after 4 passes over the rows" in ran.err, ran.err


# Invalid input


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"max_steps": 5}, (Code.CONFIG_CONFLICT, "training.max_steps and training.max_minutes")),
        ({"max_minutes": 0}, (Code.CONFIG_BAD_VALUE, "training.max_minutes")),
        ({"max_minutes": -1}, (Code.CONFIG_BAD_VALUE, "training.max_minutes")),
        ({"max_minutes": "20m"}, (Code.CONFIG_BAD_VALUE, "training.max_minutes")),
    ],
)
def test_invalid_budgets_are_refused_before_loading(
    run_config: MakeConfig, tmp_path: Path, cli: Cli, training: dict[str, Any], expected: tuple[Code, str]
) -> None:
    ran = cli("train", budgeted(tmp_path, run_config, **training))
    assert ran.code == 2
    assert f"[{expected[0]}]" in ran.err
    assert expected[1] in ran.err


@pytest.mark.parametrize(
    ("training", "code", "key"),
    [
        ({"max_minutes": 1e-4}, Code.CONFIG_BUDGET, "training.max_minutes"),
        ({"max_minutes": 0.5, "warmup_steps": 1_000_000}, Code.CONFIG_CONFLICT, "training.warmup_steps"),
    ],
)
def test_invalid_budgets_are_refused_before_the_first_step(
    run_config: MakeConfig, tmp_path: Path, cli: Cli, training: dict[str, Any], code: Code, key: str
) -> None:
    config = budgeted(tmp_path, run_config, **training)
    before = tree(tmp_path)
    check_refused(cli("train", config), 2, (code, "", key))
    assert tree(tmp_path) == before


def test_warmup_longer_than_the_epochs_is_not_blamed_on_the_budget(run_config: MakeConfig, cli: Cli) -> None:
    """The budget allows more steps than one epoch has."""
    ran = cli("train", run_config(training={"max_minutes": 0.5, "num_train_epochs": 1.0, "warmup_steps": 1000}))
    check_refused(ran, 2, (Code.CONFIG_CONFLICT, "", "training.warmup_steps"))
    assert "the passes over the rows have 5 steps" in ran.err and "raise training.num_train_epochs" in ran.err
