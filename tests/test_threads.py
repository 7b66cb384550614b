"""Threads of one program, and what a program has set: results are those of a new process, and its states are kept."""

import io
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROWS, config_in, tree
from running import WEIGHTS

import loratune
from loratune.api import libraries
from loratune.codes import Code
from loratune.errors import LockedError
from loratune.system import turns

pytestmark = pytest.mark.usefixtures("untraced_module")

PROMPTS = ["3 and 3 make", "7 and 7 make"]
DRAWN: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("threads")


@pytest.fixture(scope="module")
def config(folder: Path, tiny_dir: Path) -> loratune.RunConfig:
    """A run that draws random numbers in each step, for dropout."""
    training = {"max_steps": 6, "learning_rate": 1e-2, "logging_steps": 2, "per_device_train_batch_size": 4}
    return loratune.load_config(config_in(folder, tiny_dir)(lora={"lora_dropout": 0.3}, training=training))


def at(config: loratune.RunConfig, output: Path) -> loratune.RunConfig:
    return config.model_copy(update={"output_dir": str(output)})


@pytest.fixture(scope="module")
def adapter(config: loratune.RunConfig) -> loratune.Adapter:
    return loratune.train(config)


@pytest.fixture(scope="module")
def weights(adapter: loratune.Adapter) -> bytes:
    return (adapter.path / WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def texts(adapter: loratune.Adapter) -> list[str]:
    return adapter.generate(PROMPTS, **DRAWN)


def test_threads_that_generate_take_turns(adapter: loratune.Adapter, texts: list[str]) -> None:
    """With one adapter, which is loaded by the first of them, and with several. Its base answers in between."""
    fresh = loratune.Adapter(adapter.path)
    alone = fresh.evaluate(ROWS[:3]).to_dict()
    uses: list[Callable[[], Any]] = [
        lambda: fresh.generate(PROMPTS, **DRAWN),
        lambda: fresh.evaluate(ROWS[:3]).to_dict(),
        lambda: adapter.generate(PROMPTS, **DRAWN),
    ]
    with ThreadPoolExecutor(6) as pool:
        found = [one.result(60) for one in [pool.submit(use) for use in uses * 4]]
    assert found == [texts, alone, texts] * 4


def test_a_process_trains_once_at_a_time(config: loratune.RunConfig, weights: bytes, folder: Path) -> None:
    """The second run is refused at once, also as a sweep, also by a function that the first one calls. The first one's
    weights are those of a run alone, although others generate between its steps."""
    begun, refused, texts = Event(), list[str](), list[list[str]]()
    other = loratune.Adapter(folder / "out")
    expected = other.generate(PROMPTS, **DRAWN)

    def generate() -> None:
        begun.wait(60)
        texts.append(other.generate(PROMPTS, **DRAWN))

    def interfere(event: loratune.Event) -> None:
        if isinstance(event, loratune.StepEvent):
            begun.set()
            sweep = loratune.sweep if event.step == 1 else None
            with pytest.raises(LockedError) as caught:
                sweep(config, {"lora.r": [2]}) if sweep else loratune.train(at(config, folder / "second"))
            refused.append(caught.value.problems[0].code)
        if isinstance(event, loratune.StepEvent) and event.step > 3:  # no thread draws numbers any more
            random.seed(event.step)
            np.random.seed(event.step)
            torch.manual_seed(event.step)
        if isinstance(event, loratune.StepEvent) and event.step == 3:
            waiting.join(60)
            assert texts == [expected]
            worker = Thread(target=lambda: texts.append(other.generate(PROMPTS, **DRAWN)))
            worker.start()
            worker.join(60)
            texts.append(other.generate(PROMPTS, **DRAWN))
        if isinstance(event, loratune.PlanEvent):
            with pytest.raises(LockedError):
                other.generate(PROMPTS, **DRAWN)
        if isinstance(event, loratune.FinishedEvent):
            texts.append(other.generate(PROMPTS, **DRAWN))

    waiting = Thread(target=generate)
    waiting.start()
    made = loratune.train(at(config, folder / "first"), on_event=interfere)
    assert refused == [Code.SYSTEM_LOCKED] * 6 and LockedError.exit_code == 9
    assert texts == [expected] * 4 and not (folder / "second").exists()
    assert (made.path / WEIGHTS).read_bytes() == weights


def test_another_thread_may_not_train_meanwhile(config: loratune.RunConfig, weights: bytes, folder: Path) -> None:
    begun = Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(loratune.train, at(config, folder / "threaded"), on_event=lambda event: begun.set())
        assert begun.wait(60)
        with pytest.raises(LockedError):
            loratune.train(at(config, folder / "late"))
        made = running.result(120)
    assert (made.path / WEIGHTS).read_bytes() == weights
    with pytest.raises(loratune.ConfigError):  # it may train again, also after an error
        loratune.train(at(config, folder / "threaded"))
    loratune.train(at(config, folder / "late"))


def test_a_callback_of_other_work_is_refused_and_does_not_wait(adapter: loratune.Adapter, folder: Path) -> None:
    """In the middle of an evaluation the adapter may be disabled."""
    caught = list[LockedError]()

    def generate(event: loratune.Event) -> None:
        try:
            adapter.generate(PROMPTS, max_new_tokens=2)
        except LockedError as error:
            caught.append(error)

    adapter.evaluate(ROWS[:3], on_event=generate)
    assert caught
    nested: list[str] = []
    adapter.generate(PROMPTS, max_new_tokens=2, on_event=lambda event: nested.extend(adapter.generate(PROMPTS[0])))
    assert nested  # between two batches it may


def states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()  # type: ignore[union-attr]


def uses(config: loratune.RunConfig, adapter: loratune.Adapter, folder: Path) -> dict[str, Callable[[], Any]]:
    """Everything that seeds or draws, as a function of what is compared."""

    def trained(output: Path) -> bytes:
        return (loratune.train(at(config, output), overwrite=True).path / WEIGHTS).read_bytes()

    def fresh() -> loratune.Adapter:
        return loratune.Adapter(adapter.path)

    return {
        "train": lambda: trained(folder / "kept"),
        "plan": lambda: loratune.plan(config, overwrite=True).count.trainable,
        "count_parameters": lambda: loratune.count_parameters(config).count.trainable,
        "init": lambda: loratune.init(config.data.train.path, model=config.model.name_or_path),  # type: ignore[union-attr]
        "generate": lambda: fresh().generate(PROMPTS, **DRAWN),
        "chat": lambda: fresh().chat(max_new_tokens=4).ask(PROMPTS[0]).text,
        "evaluate": lambda: fresh().evaluate(ROWS[:3], forgetting=[{"text": "some other text"}]).to_dict(),
        "evaluate_scales": lambda: fresh().evaluate_scales(ROWS[:3], [0.5]).to_dict(),
        "merge": lambda: tree(fresh().merge(folder / "merged", overwrite=True).directory),
        "export": lambda: tree(fresh().export("peft", folder / "plain", overwrite=True).directory),
        "report": lambda: fresh().report(folder / "page.html", overwrite=True).read_text(),
    }  # fmt: skip


@contextmanager
def inference_in_float64() -> Iterator[None]:
    """With a default device on which nothing has values, and products in bfloat16."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.inference_mode():
            yield
            assert torch.is_inference_mode_enabled() and torch.get_default_dtype() == torch.float64
            assert torch.get_default_device().type == "meta" and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@contextmanager
def without_gradients() -> Iterator[None]:
    """And in another dtype, and on another device."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        yield
        assert not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
        assert torch.get_default_device().type == "meta"


def test_random_states_are_kept_and_modes_change_nothing(
    config: loratune.RunConfig, adapter: loratune.Adapter, folder: Path
) -> None:
    """Whatever the program has set or drawn before, results are those of a program that has not."""
    expected: dict[str, Any] = {}
    for number, mode in enumerate((nullcontext, inference_in_float64, without_gradients)):
        for name, work in uses(config, adapter, folder).items():
            random.seed(number)
            np.random.seed(number)
            torch.manual_seed(number)
            before = states()
            with mode():
                found = work()
            assert expected.setdefault(name, found) == found, (name, mode)
            assert states() == before, name


def inference() -> Any:
    mode = torch.inference_mode()
    mode.__enter__()
    return mode


MODES: list[Callable[[], Any]] = [
    lambda: torch.set_grad_enabled(False),
    inference,
    lambda: torch.set_default_device("meta"),
    lambda: torch.set_default_dtype(torch.float64),
    lambda: torch.set_autocast_enabled("cpu", True),
    lambda: torch.set_float32_matmul_precision("medium"),
]


def modes() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_device(),
        torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision(),
    )  # fmt: skip


def test_what_a_listener_sets_does_not_reach_the_run(config: loratune.RunConfig, weights: bytes, folder: Path) -> None:
    """A listener runs in the thread of the run, and may set what the program itself may set, at any event. The thread
    ends with the test, as a mode that was entered and never left comes back when its object is collected."""
    entered, steps = [], 0

    def change(event: loratune.Event) -> None:
        nonlocal steps
        if steps < 6:  # what is set when the run is over, as its adapter is opened, stays, as it does in the program
            entered.extend(mode() for mode in MODES)
        steps += isinstance(event, loratune.StepEvent)

    def run() -> tuple[loratune.Adapter, bool]:
        before = modes()
        made = loratune.train(at(config, folder / "changed"), on_event=change)
        same = modes() == before
        entered.clear()
        return made, same

    with ThreadPoolExecutor(1) as pool:
        made, same = pool.submit(run).result(60)
    assert (made.path / WEIGHTS).read_bytes() == weights and same
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_threads_redirect_stdout_one_at_a_time() -> None:
    """Each would restore what it has found: the last one the stream of the other, for good."""
    inside, leave, before = Event(), Event(), sys.stdout

    def first_call() -> None:
        with libraries():
            inside.set()
            leave.wait(60)

    other = Thread(target=first_call)
    with turns.stdout_to(io.StringIO()):
        other.start()
        assert not inside.wait(1)
    assert inside.wait(60) and sys.stdout is sys.stderr
    leave.set()
    other.join(60)
    assert sys.stdout is before


def test_an_adapter_loaded_in_inference_mode_can_be_used_outside(adapter: loratune.Adapter, texts: list[str]) -> None:
    fresh = loratune.Adapter(adapter.path)
    with torch.inference_mode():
        assert fresh.generate(PROMPTS, **DRAWN) == texts
    assert fresh.evaluate_scales(ROWS[:3], [0.0, 1.0]).comparisons


def test_sampling_without_a_seed_draws_from_torch(adapter: loratune.Adapter) -> None:
    torch.manual_seed(1)
    drawn = [adapter.generate(PROMPTS, temperature=1.5, max_new_tokens=12) for _ in range(2)]
    torch.manual_seed(1)
    again = [adapter.generate(PROMPTS, temperature=1.5, max_new_tokens=12) for _ in range(2)]
    assert drawn[0] != drawn[1] and drawn == again


def test_a_forked_process_does_not_wait_for_threads_of_its_parent() -> None:
    began, over = Event(), Event()

    def compute() -> None:
        with turns.turn():
            began.set()
            over.wait(60)

    other = Thread(target=compute)
    other.start()
    assert began.wait(60)
    child = os.fork()
    if not child:
        signal.alarm(10)
        with turns.training():
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    over.set()
    other.join(60)
    assert status == 0
