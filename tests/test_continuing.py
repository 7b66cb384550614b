"""Training that continues from another adapter: the same function at step 0, replayed rows, measured forgetting."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import (
    ATTENTION,
    CHAT_TEMPLATE,
    ROWS,
    Ran,
    check_refused,
    config_in,
    is_problem,
    meanings,
    tiny_llama,
    tree,
    write_rows,
)
from peft import PeftModel
from running import WEIGHTS, MakeConfig, flip, stopped
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from loratune import config, data
from loratune.codes import Code
from loratune.config import LoraSection
from loratune.data import splits
from loratune.data.splits import RowHashes
from loratune.errors import AdapterError, ConfigError, LoratuneError, NumericError
from loratune.lora import attach, creation, targets, tensors
from loratune.lora.adapter_files import CONFIG_FILE, inspect, manifest
from loratune.lora.tensors import AdapterInit
from loratune.training import preflight
from loratune.training.checkpoints import run_dir
from loratune.training.plan import Plan, make_plan

IDS = torch.arange(24).reshape(2, 12) * 7 % 250


def base_model() -> LlamaForCausalLM:
    return tiny_llama(attention_bias=True).eval()


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(input_ids=IDS).logits
    return logits


def saved(path: Path, **settings: Any) -> Path:
    """An adapter of the base model with random nonzero weights, as after long training."""
    model, start = begun(LoraSection(**ATTENTION | settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    attach.save(model, path, start)
    return path


def begun(section: LoraSection) -> tuple[PeftModel, AdapterInit]:
    base = base_model()
    model = creation.attach(base, section, targets.find(base, section).peft(), seed=3, base_name="base")
    files = inspect(Path(section.start_from)) if section.start_from else None
    return model, creation.initialize_adapter(model, section, start_from=files)


FITTING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the same": ({}, {}),
    "a larger r": ({}, {"r": 12}),
    "another alpha": ({}, {"lora_alpha": 5}),
    "rsLoRA from plain": ({}, {"use_rslora": True, "r": 11, "lora_alpha": 3}),
    "plain from rsLoRA": ({"use_rslora": True}, {"r": 9}),
    "patterns before": ({"rank_pattern": {"q": 4}, "alpha_pattern": {"v": 3, "q": 7}}, {}),
    "patterns after": ({}, {"rank_pattern": {"q": 16}, "alpha_pattern": {"v": 3}}),
    "patterns on both": (
        {"rank_pattern": {"q": 12, "v": 2}, "alpha_pattern": {"k": 1}},
        {"rank_pattern": {"q": 13, "o": 9}, "alpha_pattern": {"o": 40}, "use_rslora": True},
    ),
    "more targets": ({"target_modules": ["q", "v"]}, {"target_modules": "all-linear", "r": 9}),
    "more layers": ({"layers_to_transform": [1]}, {}),
    "embeddings": ({"target_modules": ["q", "embed_tokens"]}, {"target_modules": ["q", "embed_tokens"], "r": 10}),
    "DoRA": ({"use_dora": True}, {"use_dora": True, "r": 10, "lora_alpha": 3}),
    "DoRA on more": ({"use_dora": True, "target_modules": ["o", "v"]}, {"use_dora": True}),
    "biases": ({"bias": "lora_only"}, {"bias": "lora_only", "r": 10}),
    "all biases": ({"bias": "all"}, {"bias": "all", "r": 10}),
    "biases of more": ({"bias": "lora_only", "target_modules": ["o", "v"]}, {"bias": "lora_only"}),
    "a whole module": ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"], "lora_alpha": 2}),
    "tokens": ({"trainable_token_indices": [9, 7]}, {"trainable_token_indices": [9, 7], "r": 10}),
    "from PiSSA": ({"init_lora_weights": "pissa", "r": 4, "use_rslora": True}, {}),
    "only B trained": ({}, {"use_lorafa": True, "r": 12}),
}


@pytest.mark.parametrize("name", FITTING)
def test_training_starts_with_the_function_of_the_adapter(name: str, tmp_path: Path) -> None:
    """With the adapter disabled, the base is unchanged; the end of a run compares with it."""
    old, new = FITTING[name]
    adapter = saved(tmp_path / "old", **old)
    expected = outputs(attach.load(base_model(), inspect(adapter)))
    alone = outputs(base_model())
    assert (expected - alone).abs().max() > 0.01
    model, start = begun(LoraSection(**ATTENTION | new, start_from=str(adapter)))
    assert torch.allclose(outputs(model), expected, rtol=0, atol=1e-6)
    trained = {key: tensor + 0.05 for key, tensor in tensors.weights(model).items()}
    tensors.restore(model, trained)
    assert (outputs(model) - expected).abs().max() > 1e-3
    with tensors.as_initialized(model, start, trained):
        assert torch.equal(outputs(model), alone)
    with tensors.as_started(model, start, trained):
        assert torch.allclose(outputs(model), expected, rtol=0, atol=1e-6)
    moved = outputs(model)
    attach.save(model, tmp_path / "new", start)
    assert torch.equal(outputs(attach.load(base_model(), inspect(tmp_path / "new"))), moved)


def test_added_ranks_are_trained_and_equal_ranks_keep_their_bytes(tmp_path: Path) -> None:
    adapter = saved(tmp_path / "old")
    old = load_file(adapter / WEIGHTS)
    same, _ = begun(LoraSection(**ATTENTION, start_from=str(adapter)))
    assert all(torch.equal(tensor, old[name]) for name, tensor in tensors.weights(same).items())
    model, _ = begun(LoraSection(**ATTENTION, r=12, lora_alpha=24, start_from=str(adapter)))  # the scale is still 2
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        file_name = name.replace(".default", "")
        if ".lora_A." in name:
            assert torch.equal(parameter[:8], old[file_name])
            assert (parameter[8:].std(dim=1) > 0.01).all()
        if ".lora_B." in name:
            assert torch.equal(parameter[:, :8], old[file_name])
            assert torch.count_nonzero(parameter[:, 8:]) == 0
            assert parameter.grad is not None
            assert (parameter.grad[:, 8:].abs().amax(dim=0) > 0).all()


def test_unchanged_weights_are_measured_from_the_starting_adapter(tmp_path: Path) -> None:
    model, start = begun(LoraSection(**ATTENTION, start_from=str(saved(tmp_path / "old"))))
    state = tensors.full_weights(model)
    with pytest.raises(NumericError) as caught:
        attach.check_trained(state, start)
    assert meanings(caught.value) == [(Code.LORA_UNCHANGED, "", "")]
    next(tensor for name, tensor in state.items() if "lora_B" in name).add_(1e-3)
    attach.check_trained(state, start)


SETTING, KIND = Code.LORA_START, Code.LORA_START
CONTRADICTING: dict[str, tuple[dict[str, Any], dict[str, Any], list[Code]]] = {
    "a smaller r": ({}, {"r": 4}, [SETTING]),
    "a smaller r by a pattern": ({}, {"rank_pattern": {"v": 4}}, [SETTING]),
    "r below an old pattern": ({"rank_pattern": {"v": 9}}, {}, [SETTING]),
    "fewer targets": ({}, {"target_modules": ["q"]}, [SETTING]),
    "fewer layers": ({}, {"layers_to_transform": [0]}, [SETTING]),
    "DoRA from plain": ({}, {"use_dora": True}, [SETTING]),
    "plain from DoRA": ({"use_dora": True}, {}, [SETTING]),
    "biases": ({}, {"bias": "lora_only"}, [SETTING]),
    "no biases": ({"bias": "all"}, {}, [SETTING]),
    "a whole module": ({}, {"modules_to_save": ["lm_head"]}, [SETTING]),
    "another whole module": ({"modules_to_save": ["up_proj"]}, {"modules_to_save": ["lm_head"]}, [SETTING]),
    "tokens": ({}, {"trainable_token_indices": [1]}, [SETTING]),
    "tokens in another order": ({"trainable_token_indices": [1, 2]}, {"trainable_token_indices": [2, 1]}, [SETTING]),
    "two at once": ({"use_dora": True}, {"use_dora": True, "target_modules": ["q"], "bias": "all"}, [SETTING, SETTING]),
}


@pytest.mark.parametrize("name", CONTRADICTING)
def test_settings_that_would_change_the_starting_function_are_refused(name: str, tmp_path: Path) -> None:
    old, new, codes = CONTRADICTING[name]
    adapter = saved(tmp_path / "old", **old)
    with pytest.raises(ConfigError) as caught:
        begun(LoraSection(**ATTENTION | new, start_from=str(adapter)))
    assert meanings(caught.value) == [(code, str(adapter), "lora.start_from") for code in codes]


def spoil(adapter: Path, **changes: Any) -> None:
    """Edits the tensors of an adapter: each tensor of this name is replaced by the result of the function."""
    old = load_file(adapter / WEIGHTS)
    save_file(
        {name: changes.get(name.split(".")[-2], torch.clone)(tensor) for name, tensor in old.items()}, adapter / WEIGHTS
    )


def configure(adapter: Path, **values: Any) -> None:
    path = adapter / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without_first_column(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, 1:].clone()


UNFIT: dict[str, tuple[Callable[[Path], None], Code]] = {
    "NaN": (lambda path: spoil(path, lora_B=lambda tensor: tensor * float("nan")), Code.ADAPTER_NOT_FINITE),
    "whole numbers": (lambda path: spoil(path, lora_A=lambda tensor: tensor.int()), Code.ADAPTER_INVALID),
    "another width": (lambda path: spoil(path, lora_A=without_first_column), Code.ADAPTER_MISMATCH),
    "B of another rank": (lambda path: spoil(path, lora_B=without_first_column), Code.ADAPTER_MISMATCH),
    "another rank than configured": (lambda path: configure(path, r=7), Code.ADAPTER_INVALID),
    "layers repeated": (lambda path: configure(path, layer_replication=[[0, 2], [1, 2]]), KIND),
    "biases in B": (lambda path: configure(path, lora_bias=True), KIND),
    "a part of the base": (lambda path: configure(path, init_lora_weights="pissa"), KIND),
    "an unknown method": (lambda path: configure(path, use_tomorrows_lora=True), KIND),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_an_adapter_that_does_not_fit_the_run_is_refused(name: str, tmp_path: Path) -> None:
    change, code = UNFIT[name]
    adapter = saved(tmp_path / "old")
    change(adapter)
    with pytest.raises(AdapterError) as caught:
        begun(LoraSection(**ATTENTION, start_from=str(adapter)))
    assert [problem.code for problem in caught.value.problems] == [code]


# Whole runs

OLD_ROWS = ROWS
NEW_ROWS = [{"prompt": f"say {number}", "completion": f" {number * 3}!"} for number in range(38)]
HELD_OUT = [{"prompt": f"{number} and {number} make", "completion": f" {number + number}"} for number in range(50, 59)]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, cli: Callable[..., Ran]) -> Path:
    """A folder with the adapter `first` of a run with validation rows. Tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("earlier")
    held_out = write_rows(folder / "held_out.jsonl", HELD_OUT)
    make = config_in(folder, tiny_dir)
    path = make(
        data={"train": str(write_rows(folder / "old.jsonl", OLD_ROWS)), "validation": str(held_out)},
        training={"max_steps": 8}, output_dir=str(folder / "first"),
    )  # fmt: skip
    ran = cli("train", path)
    assert ran.code == 0, ran.err
    return folder


Make = Callable[..., Path]


@pytest.fixture
def going_on(run_config: MakeConfig, tmp_path: Path, earlier: Path) -> Make:
    """Writes the config of a run on other rows that starts from a copy of the earlier adapter, `tmp_path / first`."""
    shutil.copytree(earlier / "first", tmp_path / "first")
    rows = str(write_rows(tmp_path / "new.jsonl", NEW_ROWS))

    def make(**sections: Any) -> Path:
        lora = {"start_from": str(tmp_path / "first"), "r": 10} | sections.pop("lora", {})
        training = {"max_steps": 3} | sections.pop("training", {})
        return run_config(lora=lora, training=training, data={"train": rows} | sections.pop("data", {}), **sections)

    return make


def plan_of(path: Path, *assignments: str) -> Plan:
    run = config.load(path, assignments)
    directory = run_dir.check(run.output_dir, resume=False, overwrite=False)
    return make_plan(preflight.check(run, directory))


def record_of(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((path / "loratune.json").read_text())
    return record


def independent_loss(tiny: Path, adapter: Path, rows: list[dict[str, str]]) -> float:
    """Nats per supervised token by stock PEFT, one row at a time, with tokens counted independently."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), adapter).eval()
    total = count = 0.0
    for row in rows:
        prompt, completion = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        answer = [*completion, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
        chosen = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])
        total, count = total - float(chosen.sum()), count + len(answer)
    return total / count


def test_forgetting_is_the_loss_on_the_old_validation_rows(
    going_on: Make, cli: Callable[..., Ran], tmp_path: Path, tiny_dir: Path
) -> None:
    """The new adapter is also self-contained: stock PEFT loads it after the first one was deleted."""
    ran = cli("train", going_on())
    assert ran.code == 0, ran.err
    record = record_of(tmp_path / "out")
    forgetting = record["metrics"]["forgetting"]
    assert (forgetting["split"], forgetting["rows"], forgetting["total"]) == ("validation", 9, 9)
    before = independent_loss(tiny_dir, tmp_path / "first", HELD_OUT)
    (tmp_path / "first").rename(tmp_path / "away")
    after = independent_loss(tiny_dir, tmp_path / "out", HELD_OUT)
    assert (forgetting["before"], forgetting["after"]) == pytest.approx((before, after), abs=1e-5)
    assert abs(after - before) > 1e-3
    assert forgetting["change"] == pytest.approx(after - before, abs=2e-5)
    assert forgetting["low"] < forgetting["change"] < forgetting["high"]
    assert record["start_from"] == {
        "adapter": str(tmp_path / "first"), "digest": inspect(tmp_path / "away").digest, "replay": None,
    }  # fmt: skip
    assert record["fingerprints"]["start"] == record["start_from"]["digest"]
    hashes = splits.read_row_hashes(tmp_path / "out")
    assert isinstance(hashes, RowHashes) and hashes.complete
    assert len(hashes.exact) == len({str(row) for row in [*OLD_ROWS, *NEW_ROWS]})  # none of them was replayed
    line = f"loss {before:.4f} → {after:.4f} on 9 validation rows of the earlier run"
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"**Earlier rows:** {line}" in card
    assert f"**Started from:** the adapter `{tmp_path / 'first'}`" in card
    assert "without the other" in card
    assert "; it holds the adapter that it started from" in ran.out


def test_without_validation_rows_forgetting_is_measured_on_training_rows(
    run_config: MakeConfig, cli: Callable[..., Ran], tmp_path: Path, tiny_dir: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli("train", run_config("one.yaml", training={"max_steps": 2}, output_dir=str(first))).code == 0
    rows = write_rows(tmp_path / "new.jsonl", NEW_ROWS)
    settings = {"data": {"train": str(rows)}, "lora": {"start_from": str(first)}, "training": {"max_steps": 2}}
    assert cli("train", run_config("two.yaml", output_dir=str(second), **settings)).code == 0
    forgetting = record_of(second)["metrics"]["forgetting"]
    assert (forgetting["split"], forgetting["rows"]) == ("training", 40)
    expected = [independent_loss(tiny_dir, adapter, OLD_ROWS) for adapter in (first, second)]
    assert [forgetting["before"], forgetting["after"]] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "own, old, share", [(95, 500, 0.05), (38, 40, 0.05), (7, 3, 0.9), (1000, 10, 0.5), (3, 9, 0.01)]
)
def test_the_fraction_of_replayed_rows_is_exact(own: int, old: int, share: float) -> None:
    """No other number of rows is closer to the fraction, except that at least one is replayed. Rows are used equally
    often."""
    numbers = data.replay_numbers(own, old, share, seed=1)
    assert abs(len(numbers) - own * share / (1 - share)) <= 0.5 or len(numbers) == 1
    assert abs(len(numbers) / (own + len(numbers)) - share) <= 1 / (own + len(numbers)) or len(numbers) == 1
    counts = [numbers.count(number) for number in range(old)]
    assert sum(counts) == len(numbers)
    assert max(counts) - min(counts) <= 1
    assert numbers == data.replay_numbers(own, old, share, seed=1)
    if len(numbers) % old:
        assert any(numbers != data.replay_numbers(own, old, share, seed=seed) for seed in range(2, 9))


def test_replayed_rows_are_training_rows_of_the_old_run(going_on: Make, earlier: Path, tmp_path: Path) -> None:
    plan = plan_of(going_on(data={"replay": 0.25}))
    rows = [*plan.datasets.train.rows.rows()]
    own, replayed = rows[:38], rows[38:]
    assert len(replayed) == 13  # 13 / 51 is 0.2549; 12 / 50 is 0.24
    assert [row.where for row in own] == [f"{tmp_path / 'new.jsonl'}:{line}" for line in range(1, 39)]
    old = [*plan_of(earlier / "run.yaml", f"output_dir={tmp_path / 'again'}").datasets.train.rows.rows()]
    assert all(row in old for row in replayed)
    assert len({row.where for row in replayed}) == 13
    report = plan.datasets.train.report
    assert (report.rows, report.tokens) == (51, sum(len(row.ids) for row in rows))
    assert plan.datasets.leaks == {}
    leaking = plan_of(going_on(data={"replay": 0.6, "validation": str(earlier / "old.jsonl")}))
    assert leaking.datasets.leaks == {"validation": ["40 of the validation rows are also replayed"]}
    assert plan.datasets.train.fingerprint == plan_of(going_on(data={"replay": 0.25})).datasets.train.fingerprint
    others = plan_of(going_on(data={"replay": 0.25}), "training.seed=7").datasets.train.fingerprint
    assert plan.datasets.train.fingerprint != others


def test_a_third_run_replays_only_the_rows_of_the_second(
    going_on: Make, cli: Callable[..., Ran], tmp_path: Path
) -> None:
    """They are identified by the fingerprint of the rows before any others were mixed in."""
    path = going_on(data={"replay": 0.5})
    assert cli("train", path, "--set", f"output_dir={tmp_path / 'second'}").code == 0
    replay = record_of(tmp_path / "second")["start_from"]["replay"]
    assert (replay["share"], replay["rows"]) == (0.5, 38)
    again = config_in(tmp_path, tmp_path)  # the base is named in the record of the run
    values = yaml.safe_load((tmp_path / "second" / "run.yaml").read_text())
    values["lora"]["start_from"] = str(tmp_path / "second")
    values["data"] |= {"train": str(write_rows(tmp_path / "third.jsonl", OLD_ROWS[:10]))}
    third = again("third.yaml", **values)
    rows = [*plan_of(third, f"output_dir={tmp_path / 'out3'}").datasets.train.rows.rows()]
    assert {row.where.rpartition(":")[0] for row in rows[10:]} == {str(tmp_path / "new.jsonl")}
    assert len(rows) == 20


def check_refuses(path: Path, code: type[LoratuneError], *expected: tuple[Code, str, str]) -> None:
    with pytest.raises(code) as caught:
        plan_of(path)
    assert meanings(caught.value) == [*expected]


def test_changed_rows_of_the_old_run_are_not_replayed(
    going_on: Make, run_config: MakeConfig, cli: Callable[..., Ran], tmp_path: Path, tiny_dir: Path
) -> None:
    """Without replay the run continues, and reports what it could not measure."""
    old = write_rows(tmp_path / "old.jsonl", OLD_ROWS)
    first = tmp_path / "one"
    settings = {"data": {"train": str(old)}, "training": {"max_steps": 2}, "output_dir": str(first)}
    assert cli("train", run_config("one.yaml", **settings)).code == 0
    path = going_on(lora={"start_from": str(first)}, data={"replay": 0.1}, output_dir=str(tmp_path / "two"))
    changed = (Code.DATA_REPLAY, str(first), "data.replay")
    write_rows(old, [*OLD_ROWS[:-1], OLD_ROWS[0]])
    check_refused(cli("train", path), 4, changed)
    old.unlink()
    check_refused(cli("train", path), 4, changed)
    ran = cli("train", path, "--set", "data.replay=null")
    assert ran.code == 0, ran.err
    reason = record_of(tmp_path / "two")["metrics"]["forgetting"]["not_measured"]
    assert f": {old.name}: " in reason
    assert f"not measured: {reason}" in (tmp_path / "two" / "README.md").read_text()
    (first / "loratune.json").unlink()
    (first / "run.yaml").unlink()
    ran = cli("train", path, "--overwrite")
    check_refused(ran, 5, (Code.DATA_REPLAY, str(first), "data.replay"))


def test_an_exported_adapter_has_no_rows_to_replay(
    going_on: Make, run_config: MakeConfig, cli: Callable[..., Ran], tmp_path: Path
) -> None:
    """It has the run.yaml of the run that made its adapter, but not the run's record of its rows."""
    first, exported = tmp_path / "one", tmp_path / "exported"
    old = write_rows(tmp_path / "old.jsonl", OLD_ROWS)
    settings = {"data": {"train": str(old)}, "training": {"max_steps": 2}, "output_dir": str(first)}
    assert cli("train", run_config("one.yaml", **settings)).code == 0
    assert cli("export", "--adapter", first, "--to", "peft", "--output", exported).code == 0
    path = going_on(lora={"start_from": str(exported)}, data={"replay": 0.1}, output_dir=str(tmp_path / "two"))
    check_refused(cli("train", path), 5, (Code.DATA_REPLAY, str(exported), "data.replay"))
    ran = cli("train", path, "--set", "data.replay=null")
    assert ran.code == 0, ran.err
    card = (tmp_path / "two" / "README.md").read_text()
    assert "not measured: the adapter does not record the rows that it was trained on" in card


def test_overlong_replayed_rows_are_refused(going_on: Make, cli: Callable[..., Ran], tmp_path: Path) -> None:
    ran = cli("train", going_on(data={"replay": 0.5, "max_length": 12}))
    check_refused(ran, 2, (Code.DATA_TOO_LONG, "", "data.max_length"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "sections, code, key",
    [
        ({"lora": {"start_from": None}, "data": {"replay": 0.5}}, Code.CONFIG_CONFLICT, "data.replay"),
        ({"data": {"replay": 0.0}}, Code.CONFIG_BAD_VALUE, "data.replay"),
        ({"data": {"replay": 1.0}}, Code.CONFIG_BAD_VALUE, "data.replay"),
        ({"lora": {"init_lora_weights": "pissa"}}, Code.CONFIG_CONFLICT, "lora.start_from"),
    ],
    ids=lambda value: value.value if isinstance(value, Code) else None,
)
def test_contradictory_settings_are_refused(
    going_on: Make, cli: Callable[..., Ran], sections: dict[str, Any], code: Code, key: str
) -> None:
    ran = cli("train", going_on(**sections))
    assert ran.code == 2
    (problem,) = ran.errors
    assert problem.code == code
    assert key in problem


def test_train_and_params_exit_with_2_on_contradictions(
    going_on: Make, cli: Callable[..., Ran], tmp_path: Path
) -> None:
    path = going_on(lora={"r": 4})
    before = tree(tmp_path)
    expected = (Code.LORA_START, str(tmp_path / "first"), "lora.start_from")
    for command in (("params", path), ("train", path, "--dry-run"), ("train", path)):
        check_refused(cli(*command), 2, expected)
    assert tree(tmp_path) == before
    counted = json.loads(cli("params", going_on(lora={"r": 12}), "--json").out)
    assert counted["trainable"] == 2 * 12 * (64 + 48 + 48 + 64)


def other_base(path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] += 1
    model.save_pretrained(path)


BROKEN: dict[str, tuple[Callable[[Path], object], Code, str]] = {
    "none": (shutil.rmtree, Code.ADAPTER_NOT_FOUND, ""),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), Code.ADAPTER_NOT_FOUND, ""),
    "weights changed": (lambda path: flip(path / WEIGHTS), Code.ADAPTER_CHANGED, WEIGHTS),
    "weights cut off": (lambda path: os.truncate(path / WEIGHTS, 999), Code.ADAPTER_INVALID, WEIGHTS),
    "no JSON": (lambda path: (path / CONFIG_FILE).write_text("{"), Code.ADAPTER_INVALID, CONFIG_FILE),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_invalid_starting_adapter_ends_with_exit_code_5(
    going_on: Make, cli: Callable[..., Ran], tmp_path: Path, name: str
) -> None:
    change, code, file = BROKEN[name]
    change(tmp_path / "first")
    ran = cli("train", going_on())
    assert ran.code == 5
    assert is_problem(ran.errors[0], (code, str(tmp_path / "first" / file), "lora.start_from"))
    assert not (tmp_path / "out").exists()


def test_a_different_base_ends_with_exit_code_5(
    going_on: Make, cli: Callable[..., Ran], tmp_path: Path, tiny_dir: Path
) -> None:
    """A base of the same shape with one value changed."""
    shutil.copytree(tiny_dir, tmp_path / "base")
    path = going_on(model={"name_or_path": str(tmp_path / "base")})
    shown = cli("train", path, "--dry-run")
    assert shown.code == 0
    assert f"lora.start_from: starts as {tmp_path / 'first'}" in shown.err
    other_base(tmp_path / "base")
    check_refused(cli("train", path), 5, (Code.LORA_START, str(tmp_path / "first"), "lora.start_from"))


def test_a_different_template_is_reported(going_on: Make, cli: Callable[..., Ran], tmp_path: Path) -> None:
    """Another chat template, none, or one where there was none. The same template is not mentioned."""
    answer = {"role": "assistant", "content": "b"}
    turns = [[{"role": "user", "content": row["prompt"]}, answer] for row in NEW_ROWS]
    rows = {"train": str(write_rows(tmp_path / "chat.jsonl", [{"messages": one} for one in turns]))}
    chat, text = tmp_path / "chat", tmp_path / "first"
    first = going_on(data=rows, lora={"start_from": None}, training={"max_steps": 1}, output_dir=str(chat))
    assert cli("train", first).code == 0
    (tmp_path / "other.jinja").write_text(CHAT_TEMPLATE.replace("<|end|>", "<|endoftext|>"))
    other = {"chat_template": str(tmp_path / "other.jinja")}
    for start, section, said in (
        (chat, rows, ""),
        (chat, rows | other, f"another chat template than these rows are rendered by; data.chat_template: {chat}/"),
        (chat, {}, "on conversations, through a chat template; these rows are plain text"),
        (text, rows, "on plain text, without a chat template; these rows are conversations"),
    ):
        ran = cli("train", going_on(data=section, lora={"start_from": str(start)}), "--dry-run")
        assert ran.code == 0, ran.err
        assert (f"lora.start_from: {start} was trained " in ran.err) == bool(said) and said in ran.err


def test_the_starting_adapter_is_not_overwritten(going_on: Make, cli: Callable[..., Ran], tmp_path: Path) -> None:
    before = tree(tmp_path / "first")
    ran = cli("train", going_on(output_dir=str(tmp_path / "first")), "--overwrite")
    check_refused(ran, 2, (Code.OUTPUT_OVERWRITE, str(tmp_path / "first"), "output_dir"))
    ran = cli("train", going_on(output_dir=str(tmp_path / "first" / "second")))
    check_refused(ran, 2, (Code.OUTPUT_OVERWRITE, str(tmp_path / "first" / "second"), "output_dir"))
    assert tree(tmp_path / "first") == before


def test_a_relative_path_is_recorded_as_absolute(
    going_on: Make, cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So run.yaml repeats the run from any directory, with the same bytes."""
    monkeypatch.chdir(tmp_path)
    assert cli("train", going_on(lora={"start_from": "first"}, data={"replay": 0.2})).code == 0
    recorded = tmp_path / "out" / "run.yaml"
    assert yaml.safe_load(recorded.read_text())["lora"]["start_from"] == str(tmp_path / "first")
    monkeypatch.chdir("/")
    assert cli("train", recorded, "--set", f"output_dir={tmp_path / 'again'}").code == 0
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_an_interrupted_run_resumes_to_the_same_bytes(going_on: Make, cli: Callable[..., Ran], tmp_path: Path) -> None:
    """It is refused if the starting adapter has changed, by one byte or entirely."""
    path = going_on(
        lora={"lora_dropout": 0.3, "lora_alpha": 9}, data={"replay": 0.2},
        training={"max_steps": 12, "save_steps": 3, "per_device_train_batch_size": 3},
    )  # fmt: skip
    assert stopped(cli, tmp_path / "out.partial", "train", path).code == 130
    assert not (tmp_path / "out").exists()
    changed = (Code.RESUME_CHANGED, "", "lora.start_from")
    flip(tmp_path / "first" / WEIGHTS)
    check_refused(cli("train", path, "--resume"), 7, changed)
    flip(tmp_path / "first" / WEIGHTS)
    shutil.copytree(tmp_path / "first", tmp_path / "kept")
    spoil(tmp_path / "first", lora_B=lambda tensor: 2 * tensor)
    whole = record_of(tmp_path / "first") | {"files": manifest(tmp_path / "first")}
    (tmp_path / "first" / "loratune.json").write_text(json.dumps(whole))
    check_refused(cli("train", path, "--resume"), 7, changed)
    shutil.rmtree(tmp_path / "first")
    (tmp_path / "kept").rename(tmp_path / "first")
    ran = cli("train", path, "--resume")
    assert ran.code == 0, ran.err
    assert cli("train", path, "--set", f"output_dir={tmp_path / 'straight'}").code == 0
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "straight" / WEIGHTS).read_bytes()
    resumed, straight = (record_of(tmp_path / name)["metrics"]["forgetting"] for name in ("out", "straight"))
    assert resumed == straight
