"""What rows and prompts weigh: `data.columns: {weight: FIELD}` and `data.prompt_loss_weight` equal plain torch."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, Ran, check_refused, mainly, write_rows
from fork_server import ForkServer
from peft import PeftModel
from running import WEIGHTS, Cli, MakeConfig
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import loratune
from loratune.codes import Code
from loratune.config import from_values
from loratune.errors import LoratuneError
from loratune.lora import tensors

FACTORS = (0.0, 0.5, 1.0, 3.0, 0.1)
WEIGHTED = [{**row, "prompt": f"the same beginning {row['prompt']}", "importance": FACTORS[number % 5], "weight": 9}
            for number, row in enumerate(ROWS)]  # fmt: skip
"""The field `weight` itself means nothing."""
COLUMNS = {"weight": "importance"}
STEPS = {"max_steps": 3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "seed": 3,
         "per_device_train_batch_size": 4}  # fmt: skip


def record_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "loratune.json").read_text())
    return found


def by_hand(
    config: Path, out: Path, size: int, prompt_weight: float
) -> tuple[list[float], dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The losses of three steps in stock PEFT, row by row; and the weights before and after, by name."""
    plan = loratune.plan(loratune.load_config(config, {"output_dir": out.parent / "plan"}))
    start, base = tensors.weights(plan.model), plan.config.model.name_or_path
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out, is_trainable=True)
    names = {name: name.replace(".default", "").replace("modules_to_save.", "")
             for name, p in model.named_parameters() if p.requires_grad}  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.copy_(start[names[name]])
    before_steps = {name: start[key].clone() for name, key in names.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    tokenizer, losses = AutoTokenizer.from_pretrained(base), []
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3)).tolist()
    for step in range(3):
        total, count = torch.zeros(()), 0.0
        for row in (WEIGHTED[number] for number in order[step * size : (step + 1) * size]):
            before = tokenizer(row["prompt"]).input_ids
            ids = torch.tensor([*before, *tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id])
            nats = functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
            factors = torch.full((len(nats),), prompt_weight)
            factors[len(before) - 1 :] = 1.0
            factors = factors * row["importance"]
            total, count = total + (factors * nats).sum(), count + float(factors.sum())
        loss = total / count
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    parameters = dict(model.named_parameters())
    return losses, {key: (before_steps[name], parameters[name].detach()) for name, key in names.items()}


LAYOUTS: dict[str, dict[str, Any]] = {
    "packed": {"share_prefixes": False},
    "padded": {"packing": "none"},
    "full packs": {"packing": "full", "share_prefixes": False, "max_length": 64},
    "shared prefixes": {"share_prefixes": True},
}


@pytest.mark.parametrize(
    ("layout", "prompt_weight"),
    mainly([("packed", 0.1), ("padded", 0.0)], product([*LAYOUTS, "accumulated", "stock layers"], (0.0, 0.1))),
)
def test_three_steps_are_those_of_plain_torch(
    layout: str, prompt_weight: float, cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    data = {"train": str(write_rows(tmp_path / "weighted.jsonl", WEIGHTED)), "columns": COLUMNS}
    data |= {"prompt_loss_weight": prompt_weight} | LAYOUTS.get(layout, {})
    accumulation = 2 if layout == "accumulated" else 1
    training = STEPS | {"gradient_accumulation_steps": accumulation}
    changes: dict[str, Any] = {"data": data, "training": training}
    if layout == "stock layers":  # the trained output layer computes logits
        changes["lora"] = {"target_modules": ["q", "v"], "modules_to_save": ["lm_head"]}
    path = run_config(**changes)
    ran = cli("train", path, "--allow-worse")
    assert ran.code == 0, ran.err
    assert "rows have weights from 0 to 3, 0.92 on average; 8 rows have the weight 0" in ran.out + ran.err
    if layout == "full packs":  # whose rows are others
        assert record_of(tmp_path / "out")["curve"][0]["loss"] > 0
        return
    losses, expected = by_hand(path, tmp_path / "out", 4 * accumulation, prompt_weight)
    logged = [step["loss"] for step in record_of(tmp_path / "out")["curve"] if "loss" in step]
    assert logged == pytest.approx(losses, rel=2e-4)
    ours = load_file(tmp_path / "out" / WEIGHTS)
    for key, (before, after) in expected.items():
        assert float((after - ours[key]).norm()) < 5e-3 * float((after - before).norm()), key


def test_two_processes_equal_one(processes: ForkServer, run_config: MakeConfig, tmp_path: Path) -> None:
    """Also with texts of retention beside the rows."""
    data = {"train": str(write_rows(tmp_path / "weighted.jsonl", WEIGHTED)), "columns": COLUMNS}
    data |= {"prompt_loss_weight": 0.1, "packing": "none"}
    path, found = run_config(data=data, training={"max_steps": 4}, retention={"kl_weight": 1.0, "num_samples": 8}), {}
    for count, size in ((1, 4), (2, 2)):
        out = tmp_path / str(count)
        words = ("--set", f"output_dir={out}", "--set", f"training.per_device_train_batch_size={size}", "--allow-worse")
        children = processes.launch(count, "train", path, *words)
        assert [child.wait() for child in children] == [0] * count, "\n".join(child.said() for child in children)
        found[count] = [step["loss"] for step in record_of(out)["curve"] if "loss" in step]
        assert max(step.get("divergence", 0.0) for step in record_of(out)["curve"]) > 0
    assert found[2][0] == pytest.approx(found[1][0], rel=1e-5)


def test_metrics_of_rows_are_weighted(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """On validation rows during training, and in evaluate; rows of weight 0 do not count."""
    rows = str(write_rows(tmp_path / "weighted.jsonl", WEIGHTED))
    data = {"train": rows, "validation": rows, "columns": COLUMNS, "prompt_loss_weight": 0.1}
    ran = cli("train", run_config(data=data, training={"max_steps": 3, "eval_steps": 3}), "--allow-worse")
    assert ran.code == 0, ran.err
    held_out = record_of(tmp_path / "out")["metrics"]["held_out_loss"]
    ran = cli(
        "evaluate", "--adapter", tmp_path / "out", "--data", rows, "--json", "--output", tmp_path / "details.jsonl"
    )
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["adapter"]
    details = [json.loads(line) for line in (tmp_path / "details.jsonl").read_text().splitlines()]
    by_place = {f"{rows}:{number}": row["importance"] for number, row in enumerate(WEIGHTED, 1)}
    weights = [by_place[row["where"]] for row in details]
    nats = math.fsum(w * row["adapter"]["loss"] * row["tokens"] for w, row in zip(weights, details, strict=True))
    expected = nats / math.fsum(w * row["tokens"] for w, row in zip(weights, details, strict=True))
    assert found["loss"] == pytest.approx(expected, rel=1e-5) == pytest.approx(held_out, rel=1e-2)
    assert len(details) == 32 and min(weights) > 0


BAD: dict[str, tuple[Any, str]] = {
    "negative": (-1, "`importance` is -1, not a weight from 0 to 1,000,000"),
    "NaN": (math.nan, "`importance` is nan, not a weight from 0 to 1,000,000"),
    "text": ("high", "`importance` is 'high', not a weight from 0 to 1,000,000"),
    "missing": (None, "`importance` is None, not a weight from 0 to 1,000,000"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_weight_is_refused(kind: str, cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    value, text = BAD[kind]
    rows = [WEIGHTED[0], {**WEIGHTED[1], "importance": value}, *WEIGHTED[2:]]
    train = write_rows(tmp_path / "bad.jsonl", rows)
    ran: Ran = cli("train", run_config(data={"train": str(train), "columns": COLUMNS}))
    check_refused(ran, 4, (Code.DATA_FIELD, f"{train}:2", ""))
    assert text in ran.err


def test_the_unit_of_weights_does_not_matter(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """Also of weights that are 0 in float32, and of cells of CSV, which are text."""
    found = {}
    for name, unit in (("one", 1.0), ("tiny", 1e-50), ("csv", 1.0)):
        rows = [{**row, "importance": row["importance"] * unit} for row in WEIGHTED]
        train = write_rows(tmp_path / f"{name}.jsonl", rows)
        if name == "csv":
            train = tmp_path / "rows.csv"
            lines = [f'"{row["prompt"]}","{row["completion"]}",{row["importance"]}' for row in rows]
            train.write_text("\n".join(["prompt,completion,importance", *lines]))
        path = run_config(data={"train": str(train), "columns": COLUMNS}, training=STEPS)
        ran = cli("train", path, "--set", f"output_dir={tmp_path / name}", "--allow-worse")
        assert ran.code == 0, ran.err
        found[name] = [step["loss"] for step in record_of(tmp_path / name)["curve"]]
    assert found["tiny"] == pytest.approx(found["one"], rel=1e-5)
    assert found["csv"] == pytest.approx(found["one"], rel=1e-5)


def test_steps_without_weight_learn_nothing(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """Retention alone does not make an adapter of rounding errors."""
    rows = [{**row, "importance": 0} for row in WEIGHTED] + [{**WEIGHTED[0], "importance": 1}]
    train = write_rows(tmp_path / "one.jsonl", rows)
    order = torch.randperm(41, generator=torch.Generator().manual_seed(3)).tolist()
    assert order.index(40) >= 8  # the row that counts is in a later step
    training = STEPS | {"max_steps": 2}
    path = run_config(data={"train": str(train), "columns": COLUMNS}, training=training, retention={"kl_weight": 1.0})
    ran = cli("train", path)
    check_refused(ran, 6, (Code.LORA_UNCHANGED, "", ""))
    assert not (tmp_path / "out").exists()


def test_steps_without_weight_have_no_loss(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3)).tolist()
    weightless = order[4:8]  # the rows of the second step
    rows = [{**row, "importance": float(number not in weightless)} for number, row in enumerate(WEIGHTED)]
    train = write_rows(tmp_path / "some.jsonl", rows)
    path = run_config(data={"train": str(train), "columns": COLUMNS, "share_prefixes": False}, training=STEPS)
    ran = cli("train", path, "--allow-worse")
    assert ran.code == 0, ran.err
    losses = {step["step"]: step["loss"] for step in record_of(tmp_path / "out")["curve"] if "loss" in step}
    assert [*losses] == [1, 3] and min(losses.values()) > 1


def test_rows_without_weights_are_scored(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "weighted.jsonl", WEIGHTED)
    ran = cli("train", run_config(data={"train": str(train), "columns": COLUMNS}, training=STEPS), "--allow-worse")
    assert ran.code == 0, ran.err
    ran = cli("evaluate", "--adapter", tmp_path / "out", "--data", write_rows(tmp_path / "plain.jsonl", ROWS))
    assert ran.code == 0 and "the rows have no `importance`, so each counts once" in ran.err


def test_weights_that_are_all_zero_are_refused(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "bad.jsonl", [{**row, "importance": 0} for row in WEIGHTED])
    ran = cli("train", run_config(data={"train": str(train), "columns": COLUMNS}))
    check_refused(ran, 4, (Code.DATA_EMPTY, str(train), "data.columns"))
    assert "all rows have the weight 0" in ran.err


@pytest.mark.parametrize(
    ("data", "training", "key"),
    [
        ({"prompt_loss_weight": -0.1}, {}, "data.prompt_loss_weight"),
        ({"prompt_loss_weight": math.nan}, {}, "data.prompt_loss_weight"),
        ({"prompt_loss_weight": 0.1, "loss_on": "all"}, {}, "data.prompt_loss_weight"),
        ({"prompt_loss_weight": 0.1, "reasoning": "mask"}, {}, "data.reasoning"),
        ({"prompt_loss_weight": 0.1}, {"objective": "dpo"}, "data.prompt_loss_weight"),
        ({"columns": COLUMNS}, {"objective": "dpo"}, "data.columns"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    data: dict[str, Any], training: dict[str, Any], key: str
) -> None:
    values = {"model": {"name_or_path": "a"}, "data": {"train": "rows", **data}, "training": training}
    with pytest.raises(LoratuneError) as caught:
        from_values({**values, "output_dir": "out"}, "config")
    assert key in str(caught.value)


def test_a_turn_of_weight_0_and_a_weight_of_prompts_exclude_each_other(
    cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},
             {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]  # fmt: skip
    train = write_rows(tmp_path / "chat.jsonl", [{"messages": turns}] * 9)
    assert cli("train", run_config(data={"train": str(train)}, training={"max_steps": 2}), "--allow-worse").code == 0
    changed = {"train": str(train), "prompt_loss_weight": 0.1}
    ran = cli("train", run_config(data=changed), "--set", f"output_dir={tmp_path / 'other'}")
    assert (
        ran.code == 4 and "a turn has the weight 0, but with data.prompt_loss_weight: 0.1 every token counts" in ran.err
    )
