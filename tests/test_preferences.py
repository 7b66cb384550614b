"""Preference training: rows, the reference, the first step, reports, resuming, and `init`."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from conftest import Ran, check_refused, mainly, tiny_llama, write_rows
from fork_server import ForkServer
from running import WEIGHTS, MakeConfig, before_batch, straight
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from loratune import data
from loratune.codes import Code
from loratune.compare.preferences import ComparedRows
from loratune.config import DataSection
from loratune.data.rendering import Renderer
from loratune.training import reference

Cli = Callable[..., Ran]

PAIRS = [
    {"prompt": f"{number} and {number} make", "chosen": f" {2 * number}", "rejected": f" {2 * number + 1} or so"}
    for number in range(24)
]
HELD_OUT = [
    {"prompt": f"{number} and {number} make", "chosen": f" {2 * number}", "rejected": f" {2 * number + 3} or so"}
    for number in range(40, 52)
]
UNPAIRED = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair in PAIRS
    for side in ("chosen", "rejected")
]
STEPS: dict[str, Any] = {
    "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2, "eval_steps": 3,
}  # fmt: skip


def config(run_config: MakeConfig, folder: Path, objective: str = "dpo", **sections: Any) -> Path:
    rows = UNPAIRED if objective == "kto" else PAIRS
    data: dict[str, Any] = {"train": str(write_rows(folder / "compared.jsonl", rows))}
    if objective != "kto":
        data["validation"] = str(write_rows(folder / "held-out.jsonl", HELD_OUT))
    training = STEPS | {"objective": objective} | ({"eval_steps": None} if objective == "kto" else {})
    made: dict[str, Any] = {"data": data, "training": training, "lora": {"lora_alpha": 16, "r": 4}}
    return run_config(
        **{
            name: made.get(name, {}) | value if isinstance(value, dict) else value
            for name, value in (made | sections).items()
        }
    )


def record(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "loratune.json").read_text())
    return found


def losses(directory: Path) -> list[float]:
    return [entry["loss"] for entry in record(directory)["curve"] if "loss" in entry]


# Rows


def test_dropped_rows_are_reported_with_reasons(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    bad = [
        {"prompt": "a", "chosen": " ", "rejected": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "bc"},
        {"prompt": "a", "chosen": "c" * 80, "rejected": "d"},
    ]
    path = config(run_config, tmp_path, data={"max_length": 64, "max_dropped": 0.5})
    write_rows(tmp_path / "compared.jsonl", [*PAIRS, *bad])
    ran = cli("train", path, "--dry-run")
    assert ran.code == 0, ran.err
    for reason in (
        "the chosen answer is empty (", "the chosen and the rejected answer are the same (",
        "the rejected answer begins with the chosen one (", "an answer does not fit in max_length 64 (",
    ):  # fmt: skip
        assert f"1 row dropped: {reason}{tmp_path / 'compared.jsonl'}:" in ran.out
    assert "compared.jsonl:1, chosen, supervised text marked" in ran.out
    assert "compared.jsonl:1, rejected, supervised text marked" in ran.out
    cells = next(words for line in ran.out.splitlines() if (words := line.split())[:1] == ["train"])
    assert cells[1:4] == ["28", "0", "4"]
    write_rows(tmp_path / "compared.jsonl", bad)
    check_refused(cli("train", path, "--dry-run"), 4, (Code.DATA_EMPTY, str(tmp_path / "compared.jsonl"), ""))


def test_both_sides_get_the_same_truncated_prompt(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    path = config(run_config, tmp_path, data={"max_length": 30})
    write_rows(tmp_path / "compared.jsonl", [{"prompt": "p" * 40, "chosen": "yes", "rejected": "not at all"}, *PAIRS])
    ran = cli("train", path, "--dry-run", "--rows", 1)
    assert ran.code == 0, ran.err
    shown = [line for line in ran.out.splitlines() if "ppp" in line]
    assert len(shown) == 2 and shown[0].count("p") == shown[1].count("p") == 30 - len("not at all") - 1


@pytest.mark.parametrize(
    ("objective", "rows", "fix"),
    [
        ("sft", PAIRS, "training.objective to dpo, orpo or simpo"),
        ("sft", UNPAIRED, "training.objective to kto"),
        ("sft", [{"instruction": "a", "output": "b", "kto_tag": 0}], "training.objective to kto"),
        ("sft", [{"instruction": "a", "output": "b", "label": 3, "kto_tag": "false"}], "training.objective to kto"),
        ("sft", [{"prompt": "a", "completion": "b", "label": "False"}], "training.objective to kto"),
        ("kto", PAIRS, "training.objective to dpo, orpo or simpo"),
        ("dpo", UNPAIRED, "training.objective to kto"),
        ("dpo", [{"prompt": "a", "completion": "b"}], "give rows that are preference pairs"),
        ("kto", [{"prompt": "a", "completion": "b"}], "give rows that are unpaired preferences"),
        ("kto", [{"prompt": "a", "completion": "b", "label": 1}], "set data.format to unpaired_preference"),
    ],
)
def test_rows_in_the_wrong_format_for_the_objective_are_refused(
    objective: str, rows: list[dict[str, Any]], fix: str, cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    path = config(run_config, tmp_path, objective, data={"validation": None}, training={"eval_steps": None})
    write_rows(tmp_path / "compared.jsonl", rows)
    ran = cli("train", path)
    check_refused(ran, 4, (Code.DATA_FORMAT, f"{tmp_path / 'compared.jsonl'}:1", "training.objective"))
    assert fix in ran.err


LATER: list[dict[str, Any]] = [
    {"prompt": "a", "completion": "good", "label": None}, {"prompt": "b", "completion": "bad", "label": False},
]  # fmt: skip


@pytest.mark.parametrize("first", [LATER[0], {"prompt": "a", "completion": "good"}], ids=["null", "none"])
def test_boolean_label_on_a_later_row_is_refused(
    first: dict[str, Any], cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    """Answers labeled undesirable must not be trained on, unless the format is set explicitly."""
    path = config(run_config, tmp_path, "sft", data={"validation": None}, training={"eval_steps": None})
    write_rows(tmp_path / "compared.jsonl", [first, LATER[1]])
    ran = cli("train", path)
    check_refused(ran, 4, (Code.DATA_FIELD, f"{tmp_path / 'compared.jsonl'}:2", ""))
    assert "`label` says whether the answer is desirable" in ran.err and "data.format to prompt_completion" in ran.err
    assert cli("train", path, "--dry-run", "--set", "data.format=prompt_completion").code == 0


@pytest.mark.parametrize(("label", "is_told"), [(0, True), ("1", True), (None, True), (3, False), ("noun", False)])
def test_ambiguous_label_field_is_reported(
    label: Any, is_told: bool, cli: Cli, run_config: MakeConfig, tmp_path: Path, tiny_dir: Path
) -> None:
    """0 and 1 may be classes or verdicts: `train` and `init` both report which setting to use."""
    path = config(run_config, tmp_path, "sft", data={"validation": None}, training={"eval_steps": None})
    rows = write_rows(
        tmp_path / "compared.jsonl", [{"prompt": f"{n}", "completion": "b", "label": label} for n in "ab"]
    )
    for arguments in (
        ("train", path, "--dry-run"),
        ("init", rows, "--model", tiny_dir, "--output", tmp_path / "i.yaml"),
    ):
        ran = cli(*arguments)
        assert ran.code == 0 and "fields not read: `label`" in ran.err + ran.out
        line = "if `label` says which answers are desirable, set data.format to unpaired_preference"
        told = line in ran.err + ran.out
        assert told == is_told


@pytest.mark.parametrize(
    "changes",
    [
        {"preferences": {"simpo_gamma": 0.5}},
        {"preferences": {"desirable_weight": 2.0}},
        {"data": {"loss_on": "all"}},
    ],
)
def test_settings_incompatible_with_the_objective_are_refused(
    changes: dict[str, Any], cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    ran = cli("train", config(run_config, tmp_path, **changes))
    assert ran.code == 2 and f"[{Code.CONFIG_CONFLICT}]" in ran.err


@pytest.mark.parametrize(("objective", "is_held_up"), [("dpo", True), ("orpo", False), ("kto", False)])
def test_replay_is_refused_with_preference_objectives(
    objective: str, is_held_up: bool, cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    """The message suggests an alternative if there is one."""
    changes = {"data": {"replay": 0.2}, "lora": {"start_from": str(tmp_path / "earlier")}}
    ran = cli("train", config(run_config, tmp_path, objective, **changes))
    assert ran.code == 2 and len(ran.errors) == 1
    line = f"rows of an earlier run are replayed with the loss of sft, and not with {objective}"
    assert f"{line}; leave replay out" in ran.err
    assert "data.replay and training.objective" in ran.err
    assert ("preferences.sft_weight keeps chosen answers probable" in ran.err) == is_held_up


# The first step, and learning


FIRST = {"dpo": math.log(2), "kto": 0.5}


@pytest.mark.parametrize("objective", mainly(["dpo", "kto"], ["dpo", "orpo", "simpo", "kto"]))
def test_preference_training_lowers_the_loss(objective: str, cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    ran = cli("train", config(run_config, tmp_path, objective, training={"max_steps": 12}), "--json")
    assert ran.code == 0, ran.err
    found = losses(tmp_path / "out")
    assert found[0] == pytest.approx(FIRST.get(objective, found[0]), abs=1e-6) and found[-1] < found[0]
    result = json.loads(ran.out)
    assert result["gain"]["unit"] == ("answer" if objective == "kto" else "pair")
    assert result["gain"]["better_by"] > 0
    rows = "48 training answers" if objective == "kto" else "12 validation pairs"
    assert f"comparing the adapter with its base on {rows}" in ran.err
    assert f"training.objective: {objective} with beta " in ran.err
    assert result["preferences"]["reward_margin"]["value"] > 0
    steps = [line for line in ran.err.splitlines() if line.startswith("step ")]
    assert steps and all(re.search(r"  reward accuracy [01]\.\d{3}  reward margin -?\d+\.\d{3}", one) for one in steps)
    if objective != "kto":
        assert result["held_out_loss"] == min(
            entry["eval_loss"] for entry in record(tmp_path / "out")["curve"] if "eval_loss" in entry
        )
        assert result["preferences"]["split"] == "validation"


def test_first_loss_check_passes_with_dropout(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    ran = cli("train", config(run_config, tmp_path, lora={"lora_dropout": 0.5}, training={"max_steps": 2}))
    assert ran.code == 0, ran.err
    assert losses(tmp_path / "out")[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_wrong_reference_ends_the_run(
    objective: str, cli: Cli, run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_reference = reference.set_reference
    monkeypatch.setattr(reference, "set_reference", lambda rows, values: set_reference(rows, values - 0.5))
    ran = cli("train", config(run_config, tmp_path, objective))
    check_refused(ran, 6, (Code.LORA_START, "", "training.objective"))
    assert "0.5 nats from that of the reference" in ran.err


@pytest.mark.parametrize("objective", [pytest.param("dpo", marks=pytest.mark.slow), "kto", "orpo"])
def test_base_with_nan_outputs_is_refused_as_reference(
    objective: str, cli: Cli, run_config: MakeConfig, tmp_path: Path, tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its weights are finite. The error names the base, and no values are cached."""
    model = tiny_llama()
    for layer in (model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.gate_proj):
        layer.weight.data *= 1e25
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    ran = cli("train", config(run_config, tmp_path, objective, model={"name_or_path": str(tmp_path / "base")}))
    held_out = tmp_path / "held-out.jsonl" if objective == "orpo" else tmp_path / "compared.jsonl"
    check_refused(ran, 6, (Code.LORA_START, f"{held_out}:1", "training.objective"))
    assert "log-probability nan" in ran.err and "check that the base model works by itself" in ran.err
    assert not [*(tmp_path / "cache").rglob("*.values")]


@pytest.mark.parametrize("objective", [pytest.param("dpo", marks=pytest.mark.slow), "kto"])
def test_accumulation_does_not_change_the_result(
    objective: str, cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    """8 x 1 = 4 x 2 = 2 x 4, KTO's divergence included."""
    found = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 3}
        output = tmp_path / f"out-{size}"
        path = config(run_config, tmp_path, objective, training=shape, output_dir=str(output))
        ran = cli("train", path)
        assert ran.code == 0, ran.err
        found.append((losses(output), load_file(output / WEIGHTS)))
    for other, weights in found[1:]:
        assert other == pytest.approx(found[0][0], abs=1e-6)
        for name, tensor in weights.items():
            assert (tensor - found[0][1][name]).abs().max() < 1e-4


def test_packing_does_not_change_the_loss(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """A batch of all rows has the same loss in every layout."""
    whole = {"per_device_train_batch_size": 24, "max_steps": 2, "eval_steps": None}
    layouts: list[dict[str, Any]] = [{}, {"packing": "none"}, {"packing": "full"}, {"share_prefixes": False}]
    found = []
    for number, layout in enumerate(layouts):
        path = config(run_config, tmp_path, output_dir=str(tmp_path / f"{number}"), training=whole, data=layout)
        ran = cli("train", path)
        assert ran.code == 0, ran.err
        found.append(losses(tmp_path / f"{number}"))
    assert found[1:] == [pytest.approx(found[0], abs=1e-5)] * 3


# The reference


def test_kl_rows_pair_prompts_with_answers_to_other_prompts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Each row has a partner with another prompt, the same in every process. An overlong prompt is truncated."""
    path = write_rows(tmp_path / "compared.jsonl", UNPAIRED)
    section = DataSection.model_validate({"train": str(path)})
    split = data.read_datasets(section, 0).train
    dataset = data.prepare(split, Renderer(tokenizer), section, 264)
    for limit in (1024, 20):
        rows, again = ComparedRows(dataset, limit, seed=1), ComparedRows(dataset, limit, seed=1)
        assert rows.partners_digest() == again.partners_digest()
        assert rows.partners_digest() != ComparedRows(dataset, limit, seed=2).partners_digest()
        used = set()
        for number in range(len(rows)):
            row, mixed = dataset.rows.row(number), rows[number]["mismatched"]
            start = len(mixed["labels"]) - sum(label >= 0 for label in mixed["labels"])
            prompt, answer = tuple(mixed["input_ids"][:start]), tuple(mixed["input_ids"][start:])
            assert row.prompt[len(row.prompt) - len(prompt) :] == prompt
            assert len(mixed["input_ids"]) <= limit and mixed["labels"][start:] == [*answer]
            others = [one for one in dataset.rows.rows() if one.completion == answer and one.prompt != row.prompt]
            assert others
            used |= {one.where for one in others}
        assert len(used) >= len(rows) - 2


SHORT: dict[str, Any] = {"max_steps": 2, "eval_steps": None}


def test_reference_is_computed_once_and_cached(
    cli: Cli, run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs write the same bytes with and without a cached reference. Other rows have their own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    said = []
    for name, more in (("one", {}), ("two", {}), ("three", {"per_device_train_batch_size": 3})):
        path = config(run_config, tmp_path, output_dir=str(tmp_path / name), training=SHORT | more)
        ran = cli("train", path)
        assert ran.code == 0, ran.err
        said.append(ran.err.count("computing the reference of"))
    assert said == [2, 0, 0]
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()
    shutil.rmtree(tmp_path / "cache")
    assert cli("train", config(run_config, tmp_path, output_dir=str(tmp_path / "four"), training=SHORT)).code == 0
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "four" / WEIGHTS).read_bytes()


def test_continued_adapter_is_the_reference(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    first = cli("train", config(run_config, tmp_path, "orpo", output_dir=str(tmp_path / "first")))
    assert first.code == 0, first.err
    more = {"lora": {"start_from": str(tmp_path / "first")}}
    ran = cli("train", config(run_config, tmp_path, **more))
    assert ran.code == 0, ran.err
    assert losses(tmp_path / "out")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert "the earlier run compared answers (orpo)" in ran.err
    found = json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]["gain"]
    assert (found["other"], found["low"] > 0) == ("start", True)
    assert found["base"] == pytest.approx(math.log(2), abs=1e-6) and "comparing the adapter with the one it " in ran.err
    assert "the loss per pair went from 0.693 to 0." in ran.out


def test_desirable_and_undesirable_answers_are_counted(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    path = config(run_config, tmp_path, "kto", data={"validation": None}, training={"eval_steps": None})
    ran = cli("train", path, "--dry-run")
    assert ran.code == 0 and "24 of the answers are desirable, 24 undesirable\n" in ran.err + ran.out
    write_rows(tmp_path / "compared.jsonl", UNPAIRED[::2])
    ran = cli("train", path, "--dry-run")
    told = "24 of the answers are desirable, 0 undesirable: undesirable answers are missing\n"
    assert ran.code == 0 and told in ran.err + ran.out


@pytest.mark.parametrize("init", mainly(["pissa", "eva"], ["pissa", "olora", "orthogonal", "eva"]))
def test_first_loss_of_lora_variants_is_that_of_the_base(
    init: str, cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    ran = cli("train", config(run_config, tmp_path, lora={"init_lora_weights": init}))
    assert ran.code == 0, ran.err
    assert losses(tmp_path / "out")[0] == pytest.approx(math.log(2), abs=1e-4)


# Resuming


@pytest.mark.parametrize("objective", [pytest.param("dpo", marks=pytest.mark.slow), "kto"])
def test_resumed_run_writes_the_same_bytes(
    objective: str, run_config: MakeConfig, tmp_path: Path, processes: ForkServer, cli: Cli
) -> None:
    training = {"num_train_epochs": 1, "max_steps": -1, "save_steps": 2, "per_device_train_batch_size": 3}
    path = config(run_config, tmp_path, objective, training=training, lora={"lora_dropout": 0.3})
    child = processes.start("train", path, first=before_batch(5, "signal.raise_signal(signal.SIGINT)"))
    assert child.wait() == 130, child.said()
    resumed = cli("train", path, "--resume")
    assert resumed.code == 0, resumed.err
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == straight(processes, path, tmp_path)


# `init`


def test_init_proposes_the_objective(cli: Cli, tmp_path: Path, tiny_dir: Path) -> None:
    for rows, objective in ((PAIRS * 4, "dpo"), (UNPAIRED * 2, "kto")):
        output = tmp_path / f"{objective}.yaml"
        ran = cli("init", write_rows(tmp_path / "compared.jsonl", rows), "--model", tiny_dir, "--output", output)
        assert ran.code == 0, ran.err
        assert yaml.safe_load(output.read_text())["training"]["objective"] == objective
