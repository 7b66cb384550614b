"""What belongs to the base alone is computed once for each base and machine, and `train` and `evaluate` share it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import Ran, tiny_llama, write_rows
from peft import LoraConfig, get_peft_model
from running import MakeConfig

from loratune import kernels
from loratune.compare import base_results, behavior
from loratune.compare.base_results import BaseResults
from loratune.compare.engine import Engine
from loratune.config import DataSection
from loratune.lora import attach, tensors
from loratune.lora.tensors import BaseSnapshot
from loratune.system.launcher import Group

pytestmark = pytest.mark.usefixtures("all_instructions")

BASE_SCORES, BASE_WRITES = "base's losses", "base writes"
OTHERS = [{"prompt": f"{n} minus one is", "completion": f" {n - 1}"} for n in range(5, 45)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "loratune"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Receives what the base computes on passages and instructions; what the adapter computes is not counted."""
    found, inside = list[str](), list[None]()
    losses, write = Engine.losses, behavior.write

    def counted(context: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def entered(*args: Any, **more: Any) -> Iterator[None]:
            with context(*args, **more):
                inside.append(None)
                yield
                inside.pop()

        return entered

    def scored(engine: Engine, rows: Any, *args: Any, **more: Any) -> Any:
        found.extend([BASE_SCORES] if inside and rows.items == 38 else [])
        return losses(engine, rows, *args, **more)

    def wrote(model: Any, engine: Engine, given: Any, *args: Any, **more: Any) -> Any:
        found.extend([f"{BASE_WRITES} {len(given)}"] if inside else [])
        return write(model, engine, given, *args, **more)

    monkeypatch.setattr(tensors, "as_initialized", counted(tensors.as_initialized))
    monkeypatch.setattr(BaseSnapshot, "alone", counted(BaseSnapshot.alone))
    monkeypatch.setattr(Engine, "losses", scored)
    monkeypatch.setattr(behavior, "write", wrote)
    return found


def test_a_second_run_and_an_evaluation_compute_nothing_of_the_base_again(
    cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path, cache: Path, computed: list[str]
) -> None:
    """Whatever the rows are. What the evaluation reports equals what the run has recorded."""
    settings: dict[str, Any] = {
        "model": {"dtype": "bfloat16"}, "training": {"max_steps": 4}, "retention": {"kl_weight": 1.0, "num_samples": 3}
    }  # fmt: skip
    ran = cli("train", run_config(**settings), "--allow-worse")
    assert ran.code == 0, ran.err
    assert sorted(computed) == [f"{BASE_WRITES} 24", f"{BASE_WRITES} 3", BASE_SCORES]
    computed.clear()
    data = {"train": str(write_rows(tmp_path / "others.jsonl", OTHERS))}
    ran = cli("train", run_config(**settings, data=data, output_dir=str(tmp_path / "other")), "--allow-worse")
    assert ran.code == 0 and not computed, ran.err
    rows = write_rows(tmp_path / "few.jsonl", OTHERS[:2])
    ran = cli("evaluate", "--adapter", tmp_path / "other", "--data", rows, "--forgetting", "builtin", "--json")
    assert ran.code == 0 and not computed, ran.err
    found, metrics = json.loads(ran.out), json.loads((tmp_path / "other" / "loratune.json").read_text())["metrics"]
    assert found["behavior"] == metrics["behavior"] and found["behavior"]["median_divergence"] > 0
    unrelated = metrics["unrelated_text"]
    assert found["forgetting"]["value"] == unrelated["change"] != 0
    assert {kind: one["value"] for kind, one in found["forgetting"]["kinds"].items()} == unrelated["kinds"]


@pytest.mark.parametrize("init", ["pissa", "gaussian"])
def test_a_base_up_to_rounding_is_another_one(
    init: str, cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path, cache: Path, computed: list[str]
) -> None:
    """PiSSA changes the base's own weights, and its adapter restores them but for rounding."""
    for number, chosen in enumerate((True, init)):
        computed.clear()
        settings: dict[str, Any] = {"lora": {"init_lora_weights": chosen}, "training": {"max_steps": 2}}
        ran = cli("train", run_config(**settings, output_dir=str(tmp_path / f"{number}")), "--allow-worse")
        assert ran.code == 0, ran.err
    assert computed == ([BASE_SCORES, f"{BASE_WRITES} 24"] if init == "pissa" else [])


def results(
    dtype: torch.dtype = torch.float32, fingerprint: str = "2:a", *, dora: bool = False, **changes: Any
) -> BaseResults:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=dora)
    model = get_peft_model(tiny_llama(**changes).to(dtype), lora)
    engine = Engine(model, DataSection(train="none"), 0, kernels.accelerate(model, attach.adapted_linear))
    return BaseResults.of(engine, nullcontext, fingerprint)


def test_results_are_those_of_one_base_on_one_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything that may change their bits, or a damaged file, has them computed again."""
    calls = list[int]()

    def asked(base: BaseResults, about: Any = "x") -> bool:
        """Whether they are computed."""
        calls.clear()
        found = base.once(about, lambda: (calls.append(1), np.array([0.1, -3.0]))[1])
        assert found.tolist() == [0.1, -3.0]
        return bool(calls)

    assert asked(results()) and not asked(results())
    assert asked(results(), "y")
    assert asked(results(torch.bfloat16)) and asked(results(fingerprint="3:a"))
    assert asked(results(attn_implementation="eager"))
    assert asked(results(dora=True))  # no kernel computes its layers of attention
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 7)
        assert asked(results()) and not asked(results())
    with monkeypatch.context() as patch:
        patch.setattr(base_results, "source_digest", lambda: "another source")
        assert asked(results())
    assert all(asked(results(fingerprint="")) for _ in range(2))
    for path in cache.glob("*.values"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert asked(results()) and not asked(results())


class Second(Group):
    """The second of two processes, whose first one has some numbers or none."""

    rank, count, main, leads_machine = 1, 2, False, False

    def __init__(self, known: Any):
        self.known = known

    def broadcast(self, value: Any) -> Any:
        return self.known


def test_only_the_main_process_reads_and_writes(cache: Path) -> None:
    """Otherwise one process would wait for the forward passes of another that has found the results."""
    own = np.array([1.0])
    assert base_results.kept("x", lambda: own).tolist() == [1.0]
    assert base_results.kept("x", lambda: own + 1, Second(None)).tolist() == [2.0]
    assert base_results.kept("x", lambda: own + 1, Second([3.0])).tolist() == [3.0]
    assert len([*cache.glob("*.values")]) == 1
    assert base_results.kept("y", lambda: own * np.nan).size == 1 and len([*cache.glob("*.values")]) == 1
