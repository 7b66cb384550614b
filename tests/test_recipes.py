"""The shipped configs: they parse, and the classic recipe plans as documented on a small stand-in model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Ran, write_rows
from transformers import FalconConfig, FalconForCausalLM, PreTrainedTokenizerFast

from loratune import config

CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "accelerate")


def test_list_of_shipped_configs() -> None:
    assert [str(path.relative_to(ROOT / "configs")) for path in CONFIGS] == [
        "falcon-7b-yelp.yaml",
        "llama-70b-qlora.yaml",
        "preferences/config.yaml",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_parse(path: Path) -> None:
    run = config.load(path)
    assert config.load(path, [f"output_dir={run.output_dir}"]) == run


def test_config_in_the_guide_parses(tmp_path: Path) -> None:
    blocks = (ROOT / "configs" / "guide" / "settings.md").read_text(encoding="utf-8").split("```yaml\n")[1:]
    (block,) = [block.split("```")[0] for block in blocks if block.startswith("model:")]
    (tmp_path / "readme.yaml").write_text(block, encoding="utf-8")
    assert config.load(tmp_path / "readme.yaml").lora.r == 8


def test_sources_example_in_the_readme_parses(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "guide" / "data.md").read_text(encoding="utf-8")
    (block,) = [block.split("```")[0] for block in text.split("```yaml\n")[1:] if block.startswith("data:")]
    rest = "model: {name_or_path: model}\noutput_dir: adapter\n"
    (tmp_path / "readme.yaml").write_text(block + rest, encoding="utf-8")
    assert [source.weight for source in config.load(tmp_path / "readme.yaml").data.train_sources] == [3, 1]


def test_classic_recipe_has_the_textbook_values() -> None:
    run = config.load(ROOT / "configs" / "falcon-7b-yelp.yaml")
    assert (run.model.name_or_path, run.model.quantization) == ("tiiuae/falcon-7b-instruct", "8bit")
    assert (run.data.train.path, run.data.train.split, run.data.max_length) == ("yelp_review_full", "train[:2000]", 128)
    lora, training = run.lora, run.training
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.bias) == (8, 16, 0.05, "none")
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (4, 4)
    assert (training.warmup_steps, training.max_steps, training.learning_rate, training.logging_steps) == (
        50,
        200,
        2e-4,
        10,
    )


@pytest.fixture
def stand_ins(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """`--set` options that replace the hub's model and data by a 2-layer Falcon and 2,100 rows shaped like Yelp's."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 264,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "eos_token_id": 256,
    }
    FalconForCausalLM(FalconConfig(**shape, new_decoder_architecture=False, multi_query=True)).save_pretrained(
        tmp_path / "falcon"
    )
    tokenizer.save_pretrained(tmp_path / "falcon")
    rows = (
        {"label": number % 5, "text": f"Review {number}: " + "good food. " * (number % 20)} for number in range(2100)
    )
    settings = {
        "model.name_or_path": tmp_path / "falcon",
        "data.train.path": write_rows(tmp_path / "yelp.jsonl", rows),
        "output_dir": tmp_path / "adapter",
    }
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def test_classic_recipe_dry_run_shows_the_plan(cli: Callable[..., Ran], stand_ins: list[str]) -> None:
    ran = cli("train", ROOT / "configs" / "falcon-7b-yelp.yaml", "--dry-run", *stand_ins)
    assert ran.code == 0, ran.err
    for part in (
        "q, k, v  transformer.h.*.self_attention.query_key_value x 2, fused",
        "o        transformer.h.*.self_attention.dense x 2",
        "train  2,000 ", "  128\n", "900 rows split into 1,800 blocks", "supervised",
    ):  # fmt: skip
        assert part in ran.out, ran.out
    per_layer = 8 * (64 + 64 + 2 * 16) + 8 * (64 + 64)  # fused q, k, v with one key and one value head; and o
    assert f"trainable params: {2 * per_layer:,} ||" in ran.out


def test_classic_recipe_trains(cli: Callable[..., Ran], stand_ins: list[str], tmp_path: Path) -> None:
    ran = cli("train", ROOT / "configs" / "falcon-7b-yelp.yaml", "--set", "training.max_steps=2", "--set",
              "training.warmup_steps=0", "--allow-worse", *stand_ins)  # fmt: skip
    assert ran.code == 0, ran.err
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
