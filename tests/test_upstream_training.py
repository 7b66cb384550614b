"""What loratune/training/upstream.py uses of other libraries still exists and behaves as expected."""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_llama
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments, get_linear_schedule_with_warmup

from loratune.system.launcher import SINGLE_PROCESS
from loratune.training import upstream
from loratune.training.upstream import CheckpointTrainer


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group with only this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_store_and_timeout_of_the_default_group(process_group: None) -> None:
    assert upstream.default_store().add("a", 2) == 2
    upstream.set_collective_timeout(timedelta(seconds=7))
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    assert backend.options._timeout == timedelta(seconds=7)


def test_exclude_from_ddp(process_group: None) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    upstream.exclude_from_ddp(model, ["0.bias", "1.running_mean"])
    wrapped = DistributedDataParallel(model)
    assert wrapped.parameters_to_ignore == {"0.bias", "1.running_mean"}
    model(torch.ones(3, 2)).sum().backward()
    assert model[0].bias.grad is not None  # it is still trained, by this process alone


def test_use_one_gpu(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments._n_gpu = 4
    assert arguments.n_gpu == 4
    upstream.use_one_gpu(arguments)
    assert arguments.n_gpu == 1
    arguments._n_gpu = 0
    upstream.use_one_gpu(arguments)
    assert arguments.n_gpu == 0


def test_scale_learning_rates() -> None:
    """From then on, all rates are multiplied, including those that the scheduler has not computed yet."""
    rates: dict[float, list[float]] = {}
    for factor in (1.0, 0.1):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
        scheduler = get_linear_schedule_with_warmup(optimizer, 1, 6)
        for _ in range(2):
            optimizer.step()
            scheduler.step()
        upstream.scale_learning_rates(optimizer, scheduler, factor)
        assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]
        rates[factor] = [optimizer.param_groups[0]["lr"]]
        for _ in range(3):
            optimizer.step()
            scheduler.step()
            rates[factor].append(optimizer.param_groups[0]["lr"])
    assert rates[0.1] == pytest.approx([0.1 * rate for rate in rates[1.0]]) and len({*rates[1.0]}) == 4


def test_deepspeed_counts_micro_steps() -> None:
    engine = pytest.importorskip("deepspeed").DeepSpeedEngine
    assert "self.micro_steps += 1" in inspect.getsource(engine)
    assert "self.optimizer" in inspect.getsource(engine)


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files go to the given directory, unless the environment names another one."""
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")
    tracker = upstream.TensorBoard(tmp_path / "logs")
    for first, last in ((0, 3), (2, 3)):  # the second run continues from step 2
        for step in range(first, last):
            state = TrainerState(global_step=step)
            if step == first:
                tracker.on_train_begin(arguments, state, None)
            state.global_step += 1
            tracker.on_log(arguments, state, None, {"loss": float(first)})
        tracker.on_train_end(arguments, None, None)
    events = EventAccumulator(str(tmp_path / "logs")).Reload().Scalars("train/loss")
    shown = [(event.step, event.value) for event in events]
    assert shown == [(1, 0.0), (2, 0.0), (3, 2.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "mine"))
    assert upstream.TensorBoard(tmp_path / "logs").logging_dir == str(tmp_path / "mine")


HOOKS = (
    "_prepare_inputs", "_get_output_dir", "_save_checkpoint", "_save_optimizer_and_scheduler",
    "_load_optimizer_and_scheduler", "_save_rng_state", "_load_rng_state", "_load_from_checkpoint",
)  # fmt: skip
"""Private steps of Trainer that loratune overrides."""


class Recorder(CheckpointTrainer):
    """Records the private steps in the order of their calls."""

    group, rate_factor = SINGLE_PROCESS, 1.0

    def model_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        return Trainer._prepare_inputs(self, batch)  # type: ignore[no-any-return]

    @property
    def checkpoint_directory(self) -> Path:
        return Path(str(self.args.output_dir))

    def writing_checkpoint(self) -> AbstractContextManager[None]:
        return nullcontext()

    def restore_weights(self, checkpoint: Path) -> None:
        Trainer._load_from_checkpoint(self, str(checkpoint))

    def __init__(self, **arguments: Any):
        self.calls: list[str] = []
        super().__init__(**arguments)

    def __getattribute__(self, name: str) -> Any:
        if name in HOOKS:
            self.calls.append(name)
        return super().__getattribute__(name)

    def evaluate(self, *_: Any, **__: Any) -> Any:
        self.callback_handler.on_evaluate(self.args, self.state, self.control, {"eval_loss": 1.5})


class Evaluations(TrainerCallback):
    """Records the metrics of each evaluation."""

    def __init__(self) -> None:
        self.metrics: list[Any] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.metrics.append(kwargs["metrics"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorder, Recorder, Evaluations]:
    """A run of one step with a checkpoint, the run resumed from it, and their evaluations."""
    evaluations, path = Evaluations(), tmp_path_factory.mktemp("runs")
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8

    def trainer(max_steps: int) -> Recorder:
        arguments = TrainingArguments(
            output_dir=str(path), max_steps=max_steps, save_steps=1, eval_strategy="steps", eval_steps=1, use_cpu=True,
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        return Recorder(
            model=tiny_llama(), args=arguments, train_dataset=rows, eval_dataset=rows, callbacks=[evaluations]
        )

    first, second = trainer(1), trainer(2)
    first.train()
    second.train(resume_from_checkpoint=str(path / "checkpoint-1"))
    return first, second, evaluations


@pytest.mark.parametrize("name", HOOKS)
def test_trainer_calls_its_private_step(name: str, runs: tuple[Recorder, Recorder, Evaluations]) -> None:
    first, second, _ = runs
    assert callable(getattr(Trainer, name))
    assert name in second.calls and "_load_from_checkpoint" not in first.calls


def test_callbacks_receive_evaluation_metrics(runs: tuple[Recorder, Recorder, Evaluations]) -> None:
    assert runs[2].metrics == [{"eval_loss": 1.5}] * 2
