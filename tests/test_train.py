"""`loratune train` as a user runs it, on the tiny model."""

import json
import os
import shlex
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import ROOT, ROWS, Ran, check_refused, config_in, meanings, tiny_llama, tree, write_rows
from fork_server import ForkServer, fork_server
from running import before_batch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from loratune.codes import Code
from loratune.errors import NumericError
from loratune.training.callbacks import check_finite

Cli = Callable[..., Ran]
MakeConfig = Callable[..., Path]

WEIGHTS = "adapter_model.safetensors"
# Everything with a random state or a position: dropout, shuffling, accumulation, several epochs.
RESTLESS = {
    "lora": {"lora_dropout": 0.3},
    "training": {
        "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 3, "save_steps": 4,
    },
}  # fmt: skip


def losses(directory: Path) -> list[float]:
    curve = json.loads((directory / "loratune.json").read_text())["curve"]
    return [entry["loss"] for entry in curve if "loss" in entry]


@pytest.fixture(scope="module")
def published(cli: Cli, tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> tuple[Path, Ran]:
    """The folder of a finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("published")
    return folder, cli("train", config_in(folder, tiny_dir)(training={"save_steps": 2}))


@pytest.fixture(scope="module")
def evaluated(cli: Cli, tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> tuple[Path, Ran]:
    """The same for a run with an evaluation every two steps."""
    folder = tmp_path_factory.mktemp("evaluated")
    config = config_in(folder, tiny_dir)(data={"validation": 0.25}, training={"eval_steps": 2})
    return folder, cli("train", config)


def test_losses_match_the_golden_values(published: tuple[Path, Ran]) -> None:
    folder, ran = published
    assert ran.code == 0, ran.err
    assert losses(folder / "out") == pytest.approx(GOLDEN, abs=2e-4)
    assert sorted(path.name for path in folder.iterdir()) == ["out", "rows.jsonl", "run.yaml"]


GOLDEN = [5.5430, 5.4044, 5.3686, 5.3123, 5.3130]


def test_final_summary_describes_the_result(evaluated: tuple[Path, Ran]) -> None:
    folder, ran = evaluated
    assert ran.code == 0, ran.err
    size = (folder / "out" / WEIGHTS).stat().st_size
    for part in (str(folder / "out"), f"{size / 1e3:.1f} kB", "held-out", "loratune generate --adapter"):
        assert part in ran.out
    trained = json.loads((folder / "out" / "loratune.json").read_text())["rows"]["tokens"]
    assert f"{trained:,} tokens in 4 steps" in ran.out
    assert "tokens/s" in ran.err and "left" in ran.err


def test_suggested_command_works(cli: Cli, published: tuple[Path, Ran]) -> None:
    _, ran = published
    line = next(line for line in ran.out.splitlines() if "loratune generate" in line)
    words = shlex.split(line[line.index("loratune generate") :])
    assert cli(*words[1:], "--max-new-tokens", 4).code == 0


def test_batch_sizes_8_4_and_2_give_the_same_result(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    weights = []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        name = f"out{batch}"
        training = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        assert cli("train", run_config(training=training | {"optim": "sgd"}, output_dir=str(tmp_path / name))).code == 0
        weights.append(load_file(tmp_path / name / WEIGHTS))
    for other in weights[1:]:
        for key, tensor in weights[0].items():
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=1e-6)
    assert losses(tmp_path / "out2") == pytest.approx(losses(tmp_path / "out8"), abs=1e-5)


def test_loss_is_the_mean_of_supervised_tokens(
    cli: Cli, run_config: MakeConfig, tmp_path: Path, tiny_dir: Path
) -> None:
    """The first loss is that of the unchanged base, computed row by row."""
    rows = ROWS[:8]
    write_rows(tmp_path / "eight.jsonl", rows)
    assert cli("train", run_config(data={"train": str(tmp_path / "eight.jsonl")})).code == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    total, count = 0.0, 0
    for row in rows:
        total, count = total + _reference_loss(base, row, tiny_dir), count + len(row["completion"]) + 1
    assert losses(tmp_path / "out")[0] == pytest.approx(total / count, abs=1e-5)


def _reference_loss(base: torch.nn.Module, row: dict[str, str], directory: Path) -> float:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    prompt, answer = tokenizer(row["prompt"]).input_ids, tokenizer(row["completion"]).input_ids
    ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
    with torch.no_grad():
        scores = base(ids).logits[0].log_softmax(-1)
    return -sum(scores[place - 1, ids[0, place]].item() for place in range(len(prompt), ids.shape[1]))


NO_NETWORK = """
import os, sys
def refuse(event, args):
    if event in ('socket.connect', 'socket.getaddrinfo'):
        os.write(2, f'reached out: {event} {args}'.encode())
        os._exit(99)
sys.addaudithook(refuse)
"""
"""Ends a process that tries to connect to a host."""


def test_same_config_writes_the_same_bytes(run_config: MakeConfig, tmp_path: Path, forked: Cli, cli: Cli) -> None:
    """In two processes with different hash seeds: 2 in the fork server, random in this process."""
    config = run_config(**RESTLESS)
    assert "PYTHONHASHSEED" not in os.environ or os.environ["PYTHONHASHSEED"] not in ("2", "0")
    one = cli("train", config, "--set", f"output_dir={tmp_path / 'one'}")
    two = forked("train", config, "--set", f"output_dir={tmp_path / 'two'}")
    assert [one.code, two.code] == [0, 0], one.err + two.err
    for file in (WEIGHTS, "adapter_config.json", "train_rows.hashes"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_last_loss_is_that_of_the_last_step(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    assert cli("train", run_config(training={"logging_steps": 2})).code == 0
    metrics = json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]
    assert metrics["last_loss"] == pytest.approx(GOLDEN[-1], abs=2e-4)


def test_another_seed_gives_another_adapter(
    cli: Cli, run_config: MakeConfig, published: tuple[Path, Ran], tmp_path: Path
) -> None:
    assert cli("train", run_config(training={"seed": 1})).code == 0
    assert (tmp_path / "out" / WEIGHTS).read_bytes() != (published[0] / "out" / WEIGHTS).read_bytes()


def test_run_yaml_repeats_the_run(cli: Cli, published: tuple[Path, Ran], tmp_path: Path) -> None:
    folder, _ = published
    assert cli("train", folder / "out" / "run.yaml", "--set", f"output_dir={tmp_path / 'again'}").code == 0
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / "out" / WEIGHTS).read_bytes()


def test_flat_batches_have_the_losses_of_padded_ones(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    assert cli("train", run_config(data={"packing": "batch"})).code == 0
    assert losses(tmp_path / "out") == pytest.approx(GOLDEN, abs=2e-4)


def test_packed_run_resumes_to_the_same_bytes(
    cli: Cli, run_config: MakeConfig, tmp_path: Path, processes: ForkServer
) -> None:
    """30 rows of 18 tokens, three per pack of at most 3 x 20, two packs per step."""
    config = run_config(**RESTLESS, data={"packing": "full", "max_length": 20, "validation": 10 / 40})
    assert cli("train", config, "--set", f"output_dir={tmp_path / 'straight'}").code == 0
    child = processes.start("train", config, first=before_batch(13, "os.kill(os.getpid(), signal.SIGKILL)"))
    assert child.wait() == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert cli("train", config, "--resume").code == 0
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "straight" / WEIGHTS).read_bytes()
    record = json.loads((tmp_path / "out" / "loratune.json").read_text())
    assert record["metrics"]["steps"] == 3 * 10 / 2
    assert record["metrics"]["tokens"] == 3 * record["rows"]["tokens"]


def test_packing_falls_back_to_padding_if_rows_would_mix(
    cli: Cli, run_config: MakeConfig, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """BLOOM's bias counts positions across the whole batch."""
    shape = {"vocab_size": 264, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 256, "eos_token_id": 256}
    BloomForCausalLM(BloomConfig(**shape)).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    model = {"name_or_path": str(tmp_path / "bloom"), "dtype": "float32"}
    ran = cli("train", run_config(model=model, data={"packing": "full"}, training={"max_steps": 1}), "--allow-worse")
    assert ran.code == 0, ran.err
    assert "data.packing: bloom mixes rows: " in ran.err and "; rows are padded instead" in ran.err


def test_several_sources_are_mixed_by_weight(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """The card names them, and run.yaml reproduces the mixture."""
    (tmp_path / "b.csv").write_text("prompt,completion\n" + "".join(f"{n},{n}\n" for n in range(30)))
    write_rows(tmp_path / "a.jsonl", ROWS)
    train = [{"path": str(tmp_path / "a.jsonl"), "weight": 3}, {"path": str(tmp_path / "b.csv"), "weight": 1}]
    ran = cli("train", run_config(data={"train": train}))
    assert ran.code == 0, ran.err
    assert f"train: mixed: {tmp_path / 'b.csv'}: 13 of 30 rows" in ran.err
    assert f"`{tmp_path / 'b.csv'}` (weight 1)" in (tmp_path / "out" / "README.md").read_text()
    again = cli("train", tmp_path / "out" / "run.yaml", "--set", f"output_dir={tmp_path / 'again'}")
    assert again.code == 0, again.err
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_resume_without_an_interrupted_run_is_refused(cli: Cli, run_config: MakeConfig) -> None:
    ran = cli("train", run_config(), "--resume")
    assert ran.code == 7 and f"[{Code.RESUME_CHECKPOINT}]" in ran.err


def test_diverging_run_writes_no_files(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    config = run_config(training={"learning_rate": 1e30, "save_steps": 1})
    before = tree(tmp_path)
    ran = cli("train", config)
    assert ran.code == 6
    assert f"[{Code.TRAINING_NOT_FINITE}]" in ran.err
    assert "of step 2 is" in ran.err and "training.learning_rate" in ran.err
    assert tree(tmp_path) == before


def test_divergence_in_the_last_step_is_detected(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    ran = cli("train", run_config(training={"learning_rate": 1e30, "max_steps": 1}))
    check_refused(ran, 6, (Code.TRAINING_NOT_FINITE, "", "training.learning_rate"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(value: float) -> None:
    """Large finite weights are allowed: their squares, which would overflow, are not computed."""
    weight = torch.full((3,), 1e30)
    check_finite([weight], 7)
    weight[1] = value
    with pytest.raises(NumericError, match="step 7 ") as caught:
        check_finite([weight], 7)
    assert meanings(caught.value) == [(Code.TRAINING_NOT_FINITE, "", "training.learning_rate")]


def test_base_with_nan_weights_is_refused(
    cli: Cli, run_config: MakeConfig, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    sick = tiny_llama()
    sick.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    sick.save_pretrained(tmp_path / "sick")
    tokenizer.save_pretrained(tmp_path / "sick")
    ran = cli("train", run_config(model={"name_or_path": str(tmp_path / "sick")}))
    check_refused(ran, 3, (Code.MODEL_DAMAGED, str(tmp_path / "sick"), ""))
    assert ran.err.count("\n") == 1
    assert "1 of its tensors hold NaN or inf, among them model.layers.1.mlp.down_proj.weight" in ran.err


def test_run_that_changes_no_weights_is_refused(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    config = run_config(training={"learning_rate": 1e-60})
    ran = cli("train", config)
    check_refused(ran, 6, (Code.LORA_UNCHANGED, "", ""))
    assert not (tmp_path / "out").exists()
    ran = cli("train", config, "--resume", "--allow-worse")
    assert ran.code == 0 and ran.out.startswith("✗ learned nothing: "), ran.err


@pytest.mark.parametrize(
    "with_imports", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["commands", "commands and their imports"]
)
def test_commands_work_without_a_network(
    with_imports: bool, run_config: MakeConfig, tmp_path: Path, processes: ForkServer
) -> None:
    accounts = {"WANDB_API_KEY": "x", "COMET_API_KEY": "x"}
    config, first = run_config(), "" if with_imports else NO_NETWORK
    with ExitStack() as stack:
        if with_imports:
            (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
            processes = stack.enter_context(fork_server(tmp_path, PYTHONPATH=str(tmp_path), **accounts))
        control = processes.start("params", first=f"{first}\nimport socket; socket.create_connection(('127.0.0.1', 9))")
        assert control.wait() == 99 and "reached out" in control.said()
        for arguments in (
            ("train", config),
            ("generate", "--adapter", tmp_path / "out", "1 and 1 make", "--max-new-tokens", 3),
            ("params", config),
        ):
            child = processes.start(*arguments, first=first, **accounts)
            assert child.wait() == 0, child.said()


def test_dry_run_shows_the_plan_and_leaves_no_files(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    config = run_config(data={"max_length": 18, "validation": 0.25})
    before = tree(tmp_path)
    ran = cli("train", config, "--dry-run")
    assert ran.code == 0, ran.err
    assert tree(tmp_path) == before
    for part in (
        "q  model.layers.*.self_attn.q_proj x 2", "trainable params: 3,584 || all params:", "train         30 ",
        "truncated", "dropped", "⟦ ", "<|endoftext|>⟧", "memory at the longest batch: about",
        "\ndevice: ", ", float32\nmemory",
    ):  # fmt: skip
        assert part in ran.out, ran.out


def test_activation_checkpointing_does_not_change_the_weights(
    cli: Cli, run_config: MakeConfig, published: tuple[Path, Ran], tmp_path: Path
) -> None:
    assert cli("train", run_config(training={"activation_checkpointing": True})).code == 0
    kept, recomputed = (load_file(folder / "out" / WEIGHTS) for folder in (published[0], tmp_path))
    for key, tensor in kept.items():
        torch.testing.assert_close(recomputed[key], tensor, rtol=0, atol=1e-6)


def test_held_out_loss_is_evaluated_during_the_run(evaluated: tuple[Path, Ran]) -> None:
    folder, ran = evaluated
    curve = json.loads((folder / "out" / "loratune.json").read_text())["curve"]
    assert [entry["step"] for entry in curve if "eval_loss" in entry] == [2, 4]
    assert ran.err.count("held-out loss") == 2


def test_suggested_command_works_for_a_prompt_that_looks_like_an_option(
    run_config: Callable[..., Path], tmp_path: Path, cli: Callable[..., Ran]
) -> None:
    """The command in the final summary is used unchanged."""
    rows = write_rows(tmp_path / "dashes.jsonl", [{"prompt": "-5 and 5 make", "completion": " 0"}] * 8)
    ran = cli("train", run_config(data={"train": str(rows)}))
    assert ran.code == 0, ran.err
    line = next(line for line in ran.out.splitlines() if "try it" in line)
    again = cli(*shlex.split(line.split("loratune ")[-1]))
    assert again.code == 0, again.err


def test_rows_with_tools_are_tried_in_a_chat(
    run_config: Callable[..., Path], tmp_path: Path, cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt on the command line has no tools. The card names the same command, and it runs as it is."""
    function = {"name": "f", "description": "Do it.", "parameters": {"type": "object", "properties": {}}}
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
    row = {"tools": [{"type": "function", "function": function}], "messages": [{"role": "user", "content": "Go"}, call]}
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "calls.jsonl", [row] * 8)
    template = str(ROOT / "configs" / "recipes" / "tools.jinja")
    ran = cli("train", run_config(data={"train": str(rows), "chat_template": template}, training={"max_steps": 2}))
    assert ran.code == 0, ran.err
    (command,) = (line.partition("loratune ")[2] for line in ran.out.splitlines() if "try it" in line)
    assert command == f"chat --adapter {tmp_path / 'out'}"
    assert "`loratune chat --adapter out`" in (tmp_path / "out" / "README.md").read_text()
    again = cli(*shlex.split(command), "--max-new-tokens", 2, stdin="Go\n")
    assert again.code == 0, again.err
