"""Runs on rows that share prefixes: results are the same as without sharing, and the run reports whether it shares."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Ran, check_refused, write_rows
from fork_server import ForkServer
from running import WEIGHTS, MakeConfig, before_batch, curve, straight
from safetensors.torch import load_file
from test_kernels import SHAPE, adapted
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from loratune import kernels
from loratune.codes import Code
from loratune.data.packing import BatchLayout
from loratune.kernels.parity_check import computes_trees
from loratune.lora import attach
from loratune.training import batching

Cli = Callable[..., Ran]
SYSTEM = "Say what the numbers are together, and nothing else. "
ROWS = [
    {
        "prompt": SYSTEM + ("And be polite. " if number % 2 else "") + f"{number} and {number % 7}:",
        "completion": f" {number + number % 7}",
    }
    for number in range(40)
]
ON, OFF = "data.share_prefixes: shared prefixes are computed once", "data.share_prefixes: off"


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return str(write_rows(tmp_path / "alike.jsonl", ROWS))


def record(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((path / "loratune.json").read_text())
    return result


@pytest.mark.parametrize(
    ("packing", "loss_on"),
    [
        ("batch", "completion"),
        pytest.param("full", "all", marks=pytest.mark.slow),
        pytest.param("batch", "all", marks=pytest.mark.slow),
        pytest.param("full", "completion", marks=pytest.mark.slow),
    ],
)
def test_prefix_sharing_does_not_change_the_results(
    packing: str, loss_on: str, run_config: MakeConfig, cli: Cli, tmp_path: Path, rows: str
) -> None:
    """Losses, held-out losses, token counts and weights; with supervised prefixes, and with accumulation."""
    data = {"train": rows, "validation": 0.2, "packing": packing, "loss_on": loss_on, "max_length": 100}
    training = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 3}
    if packing == "full":
        training |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1}
    config = run_config(data=data, training=training | {"eval_steps": 3, "learning_rate": 1e-3})
    for share in ("auto", "false"):
        ran = cli("train", config, "--set", f"data.share_prefixes={share}", "--set", f"output_dir={tmp_path / share}")
        assert ran.code == 0, ran.err
        assert (ON in ran.err) == (share == "auto") and OFF not in ran.err
    shared, alone = record(tmp_path / "auto"), record(tmp_path / "false")
    assert len(curve(shared)) > 4 and shared["metrics"]["tokens"] == alone["metrics"]["tokens"]
    for one, other in zip(curve(shared), curve(alone), strict=True):
        for name in ("loss", "eval_loss", "grad_norm"):
            assert one.get(name) == pytest.approx(other.get(name), abs=2e-5), one
    weights, expected = (load_file(tmp_path / name / WEIGHTS) for name in ("auto", "false"))
    assert any(bool(tensor.any()) for tensor in expected.values())
    assert all(float((weights[name] - expected[name]).abs().max()) < 1e-4 for name in expected)


def test_killed_and_resumed_run_writes_the_same_bytes(
    processes: ForkServer, run_config: MakeConfig, cli: Cli, tmp_path: Path, rows: str
) -> None:
    training = {"save_steps": 2, "per_device_train_batch_size": 4, "num_train_epochs": 2}
    config = run_config(data={"train": rows, "share_prefixes": True}, training=training)
    child = processes.start("train", config, first=before_batch(8, "os.kill(os.getpid(), signal.SIGKILL)"))
    assert child.wait() == -signal.SIGKILL
    ran = cli("train", config, "--resume")
    assert ran.code == 0, ran.err
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == straight(processes, config, tmp_path)


@pytest.mark.distributed
def test_two_processes_get_the_losses_of_one(
    processes: ForkServer, run_config: MakeConfig, tmp_path: Path, rows: str
) -> None:
    """Each process shares prefixes within its own part of a step."""
    config = run_config(data={"train": rows, "validation": 0.2}, training={"num_train_epochs": 1, "eval_steps": 2})
    records = []
    for count in (1, 2):
        size = f"training.per_device_train_batch_size={8 // count}"
        out = f"output_dir={tmp_path / str(count)}"
        children = processes.launch(count, "train", config, "--set", size, "--set", out)
        assert [child.wait() for child in children] == [0] * count, "\n".join(child.said() for child in children)
        assert ON in "".join(child.said() for child in children)
        records.append(record(tmp_path / str(count)))
    for one, other in zip(curve(records[0]), curve(records[1]), strict=True):
        for name in ("loss", "eval_loss"):
            assert one.get(name) == pytest.approx(other.get(name), abs=1e-5), (one, other)
    assert records[0]["metrics"]["tokens"] == records[1]["metrics"]["tokens"]


def test_dropout_disables_prefix_sharing_and_reports_the_cost(run_config: MakeConfig, cli: Cli, rows: str) -> None:
    config = run_config(data={"train": rows}, lora={"lora_dropout": 0.1}, training={"max_steps": 1})
    ran = cli("train", config)
    assert ran.code == 0 and ON not in ran.err
    (line,) = [line for line in ran.err.splitlines() if line.startswith(OFF)]
    assert "drops out values in training" in line and "save 7" in line
    check_refused(
        cli("train", config, "--overwrite", "--set", "data.share_prefixes=true"), 2,
        (Code.CONFIG_CONFLICT, "--set", "data.share_prefixes and lora.lora_dropout"),
    )  # fmt: skip


def test_padding_disables_prefix_sharing(run_config: MakeConfig, cli: Cli, rows: str) -> None:
    config = run_config(data={"train": rows, "packing": "none"}, training={"max_steps": 1})
    ran = cli("train", config)
    assert ran.code == 0 and "share_prefixes" not in ran.err
    check_refused(
        cli("train", config, "--overwrite", "--set", "data.share_prefixes=true"), 2,
        (Code.CONFIG_CONFLICT, "--set", "data.share_prefixes and data.packing"),
    )  # fmt: skip


def test_prefix_sharing_is_off_if_it_saves_little(run_config: MakeConfig, cli: Cli) -> None:
    """`share_prefixes: true` forces it."""
    config = run_config(training={"max_steps": 1})
    assert "share_prefixes" not in cli("train", config).err
    ran = cli("train", config, "--overwrite", "--set", "data.share_prefixes=true")
    assert ran.code == 0 and ON in ran.err


def test_models_with_unsupported_attention_do_not_share_prefixes(
    run_config: MakeConfig, cli: Cli, tmp_path: Path, tokenizer: Any, rows: str
) -> None:
    """BLOOM adds biases to the attention scores."""
    bloom = CONFIG_MAPPING["bloom"](**SHAPE | {"n_layer": 2, "n_head": 4})
    AutoModelForCausalLM.from_config(bloom).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = {"name_or_path": str(tmp_path / "base")}
    config = run_config(model=model, data={"train": rows}, training={"max_steps": 1, "per_device_train_batch_size": 2})
    ran = cli("train", config, "--allow-worse")
    assert ran.code == 0, ran.err
    assert ON not in ran.err
    ran = cli("train", config, "--overwrite", "--set", "data.share_prefixes=true")
    check_refused(ran, 2, (Code.MODEL_UNSUPPORTED, "", "data.share_prefixes"))


def test_models_that_support_prefix_trees_are_recognized() -> None:
    """Stock attention misinterprets positions that go back."""
    model = adapted()
    assert not computes_trees(model.get_base_model())
    assert kernels.tree_refusal(model) == "has attention that is not accelerated"
    with kernels.accelerated(model, attach.adapted_linear):
        assert kernels.tree_refusal(model) is None
        mixed = model.get_base_model().model.layers[1].mlp
        for changed in (lambda *of: of[-1] + of[-1].mean(1, keepdim=True), lambda *of: of[-1].view(7, -1)):
            hook = mixed.register_forward_hook(changed)
            assert kernels.tree_refusal(model) == "computes something else for rows that share a prefix"
            hook.remove()
    for changes, reason in (
        ({"lora_dropout": 0.1}, "drops out values"),
        ({"modules_to_save": ["lm_head"]}, "has a loss that is not accelerated"),
    ):
        model = adapted(**changes)
        with kernels.accelerated(model, attach.adapted_linear):
            assert str(kernels.tree_refusal(model)).startswith(reason)


def layout_of(lists: list[list[int]], size: int) -> BatchLayout:
    several = [{"input_ids": ids, "labels": ids} for ids in lists]
    return BatchLayout(several, np.array([len(ids) for ids in lists]), "batch", size, 100, 0)


def test_heaviest_batch_is_chosen_by_computed_tokens() -> None:
    """Not by length: the longest rows here share most of their tokens."""
    long = [*range(60)]
    lists = [*([*long, 100 + number] for number in range(6)), *([200 + number] * (50 - number) for number in range(3))]
    layout = layout_of(lists, 4)
    assert sorted(layout.heaviest()) == [0, 1, 2, 3]
    shared = layout.sharing(layout.saving())
    assert sorted(shared.heaviest()) == [0, 6, 7, 8]
    assert 0.3 < layout.saving() < 0.7
    assert layout.saved is None and shared.saved == layout.saving()


def test_heaviest_batch_search_goes_beyond_the_longest_rows() -> None:
    """They may all share a prefix."""
    long = [*range(60)]
    lists = [*([*long, 100 + number] for number in range(300)), *([1000 + number] * 30 for number in range(300))]
    shared = layout_of(lists, 4).sharing(0.5)
    chosen = shared.heaviest()
    assert len(set(chosen)) == 4
    assert sorted(len(lists[number]) for number in chosen) == [30, 30, 30, 61]
    alike = layout_of([long] * 1000, 8).sharing(0.8)
    assert len(set(alike.heaviest())) == 8
    assert layout_of([], 8).sharing(0.5).heaviest() == []


def test_tree_sizes_count_shared_prefixes_once() -> None:
    lists = [[*range(50), 100 + number, 101 + number] for number in range(8)]
    rows = [{"input_ids": ids, "labels": [-100] * 49 + ids[49:]} for ids in lists]
    sizes, count = batching.tree_sizes(rows)
    assert sum(length for length, _ in sizes) == 50 + 8 * 2 and sum(labels for _, labels in sizes) == 1 + 8 * 2
    assert count == len(sizes) == 8
