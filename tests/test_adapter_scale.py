"""`--adapter-scale`: an adapter's update, multiplied by a number."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import PLAIN, ROWS, check_refused, meanings, write_rows
from peft import PeftModel
from running import WEIGHTS, Cli, MakeConfig, checkpoints, stopped
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import loratune
from loratune.codes import Code
from loratune.errors import ConfigError
from loratune.training.checkpoints.store import MANIFEST, RUN, seal

PROMPTS = [f"{number} and {number} make" for number in range(3)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("scaled")
    rows = write_rows(folder / "rows.jsonl", ROWS)
    values = {
        **PLAIN, "model": {"name_or_path": str(tiny_dir), "dtype": "float32"}, "data": {"train": str(rows)},
        "training": {"learning_rate": 0.02, "max_steps": 12}, "output_dir": str(folder / "out"),
    }  # fmt: skip
    return loratune.train(loratune.load_config(values)).path


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(40, 60)[None]).logits
    return found


def test_a_merged_model_and_an_export_have_the_scaled_update(adapter: Path, tiny_dir: Path, tmp_path: Path) -> None:
    """W + s B A, against PEFT with the scaling of each layer multiplied by hand."""
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_dir), adapter)
    for module in stock.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 0.5
    expected = logits(stock)
    half = loratune.Adapter(adapter, scale=0.5)
    half.merge(tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    half.export("peft", tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "loratune.json").read_text())["adapter_scale"] == 0.5
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_dir), tmp_path / "exported")
    torch.testing.assert_close(logits(reloaded), expected)


def test_the_ends(adapter: Path, cli: Cli) -> None:
    whole = cli("generate", "--adapter", adapter, *PROMPTS, "--max-new-tokens", 4)
    one = cli("generate", "--adapter", adapter, *PROMPTS, "--max-new-tokens", 4, "--adapter-scale", 1)
    none = cli("generate", "--adapter", adapter, *PROMPTS, "--max-new-tokens", 4, "--adapter-scale", 0)
    assert whole.code == one.code == none.code == 0, none.err
    assert whole.out == one.out
    answers = [*loratune.Adapters([str(adapter)]).answers(PROMPTS, max_new_tokens=4, base=True)]
    assert loratune.Adapter(adapter, scale=0).generate(PROMPTS, max_new_tokens=4) == [one.base for one in answers]
    assert [one.base for one in answers] != [one.completion for one in answers]


def test_it_multiplies_the_weights_of_a_mixture(adapter: Path) -> None:
    mixed = loratune.Adapters({"a": adapter}, mix={"a": 0.8}, scale=0.5).answers(PROMPTS, max_new_tokens=4)
    plain = loratune.Adapter(adapter, scale=0.4).generate(PROMPTS, max_new_tokens=4)
    assert [answer.completion for answer in mixed] == plain


@pytest.mark.parametrize("value", ["-0.1", "2.1", "nan"])
def test_a_scale_out_of_range_is_refused(value: str, adapter: Path, cli: Cli) -> None:
    ran = cli("generate", "--adapter", adapter, "a", "--adapter-scale", value)
    check_refused(ran, 2, (Code.USAGE_BAD_VALUE, "", "--adapter-scale"))


def test_what_is_no_product_is_refused(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    assert cli("train", run_config(lora={"use_dora": True}, training={"max_steps": 1})).code == 0
    ran = cli("merge", "--adapter", tmp_path / "out", "--output", tmp_path / "m", "--adapter-scale", "0.5")
    assert ran.code == 5 and "use_dora" in ran.err and not (tmp_path / "m").exists()
    assert load_file(tmp_path / "out" / WEIGHTS)


def test_a_table_of_scales(adapter: Path, cli: Cli, tmp_path: Path) -> None:
    """Each row is what `evaluate` gives for that scale alone; the base is loaded once."""
    held_out = write_rows(tmp_path / "held-out.jsonl", [row | {"prompt": f"so {row['prompt']}"} for row in ROWS[:10]])
    asked = ("evaluate", "--adapter", adapter, "--data", held_out, "--forgetting", "builtin", "--adapter-scale")
    for step in ("1e-9", "1e-320", "0.02"):
        check_refused(cli(*asked, f"0:1:{step}"), 2, (Code.USAGE_BAD_VALUE, "", "--adapter-scale"))
    ran = cli(*asked, "0:1:0.5", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["scales"]
    assert [one["adapter_scale"] for one in found] == [0, 0.5, 1]
    assert found[0]["adapter"]["loss"] == pytest.approx(found[0]["base"]["loss"], rel=1e-6)
    for one in found:
        alone = json.loads(cli(*asked, one.pop("adapter_scale"), "--json").out)
        assert alone["adapter"]["loss"] == pytest.approx(one["adapter"]["loss"], rel=1e-6)
        expected = pytest.approx(one["forgetting"]["value"], rel=1e-4, abs=1e-6)
        assert alone["forgetting"]["value"] == expected
    table = cli(*asked, "0.5,1").out.splitlines()
    assert [line.split()[0] for line in table[-3:]] == ["base", "0.5", "1"]


@pytest.mark.parametrize("value", ["", "a", "0:1", "1:0:0.1", "0:2:0.001", "0,3", "0.5,,1"])
def test_scales_that_are_none_are_refused(value: str, adapter: Path, cli: Cli) -> None:
    ran = cli("evaluate", "--adapter", adapter, "--data", "rows.jsonl", "--adapter-scale", value)
    check_refused(ran, 2, (Code.USAGE_BAD_VALUE, "", "--adapter-scale"))


def test_scales_of_a_program_are_checked_as_those_of_a_command(adapter: Path) -> None:
    opened, rows = loratune.Adapter(adapter), [{"prompt": "a:", "chosen": "b", "rejected": "c"}]
    for scales in ([], [3.0], [0.5] * 51):
        with pytest.raises(ConfigError) as error:
            opened.evaluate_scales(ROWS, scales)
        assert meanings(error.value)[0][::2] == (Code.USAGE_BAD_VALUE, "scales")
    for method in (partial(opened.evaluate_scales, scales=[1]), opened.evaluate):
        with pytest.raises(ConfigError) as error:
            method(rows, metrics="contains")
        assert meanings(error.value)[0][::2] == (Code.USAGE_CONFLICT, "metrics")


# The removed key `training.adapter_scale`

KEY = "training.adapter_scale"


@pytest.mark.parametrize("value", ["0.5", "auto"])
def test_the_removed_key_is_refused(value: str, cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    config = run_config(training={"adapter_scale": value})
    line = next(number for number, text in enumerate(config.read_text().splitlines(), 1) if "adapter_scale" in text)
    ran = cli("train", config)
    check_refused(ran, 2, (Code.CONFIG_UNKNOWN_KEY, f"{config}:{line}", KEY))
    assert "`--adapter-scale` of evaluate, generate, merge and export" in ran.err and len(ran.err.splitlines()) == 1
    assert loratune.load_config(run_config(training={"adapter_scale": 1.0}), [f"{KEY}=1"]) is not None


def test_an_adapter_that_was_trained_with_it_can_be_used(adapter: Path, cli: Cli, tmp_path: Path) -> None:
    """Its B has the scale."""
    earlier = tmp_path / "earlier"
    shutil.copytree(adapter, earlier)
    run = (earlier / "run.yaml").read_text()
    (earlier / "run.yaml").write_text(run.replace("training:\n", "training:\n  adapter_scale: 0.5\n"))
    for arguments in (
        ("generate", PROMPTS[0], "--max-new-tokens", 2),
        ("evaluate", "--data", adapter.parent / "rows.jsonl"),
    ):
        command, *others = arguments
        ran = cli(command, "--adapter", earlier, *others, "--force")
        assert ran.code == 0, ran.err


def test_a_run_that_was_begun_with_it_is_not_resumed(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    config = run_config(training={"max_steps": 12, "save_steps": 1})
    assert stopped(cli, tmp_path / "out.partial", "train", config).code == 130
    for value, code in ((0.5, 7), (1.0, 0)):
        for checkpoint in checkpoints(tmp_path / "out.partial"):
            record = json.loads((checkpoint / RUN).read_text())
            record["config"]["training"]["adapter_scale"] = value
            (checkpoint / RUN).write_text(json.dumps(record))
            (checkpoint / MANIFEST).unlink()
            seal(checkpoint)
        ran = cli("train", config, "--resume")
        assert ran.code == code and (KEY in ran.err) == (code == 7), ran.err
