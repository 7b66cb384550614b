"""A collapsed adapter, which predicts the same after every prompt, is not published, and fails every requirement."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, Ran, check_refused, tiny_llama, write_rows
from running import WEIGHTS, MakeConfig, checkpoints
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from loratune.codes import Code
from loratune.compare import collapse
from loratune.compare.collapse import PromptSensitivity
from loratune.compare.losses import LossComparison
from loratune.compare.verdict import GOOD
from loratune.data.rendering.spans import TokenizedRow

pytestmark = pytest.mark.usefixtures("untraced_module")

ALL_LAYERS = {"r": 8, "target_modules": "all-linear"}
SAME = [row | {"completion": " yes"} for row in ROWS]
DEAD = {"learning_rate": 1e10, "max_steps": 3, "save_steps": 1}
"""A learning rate that makes the tiny model predict every token with the same probability."""


@pytest.fixture(scope="module")
def sure_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The tiny model with large logits, so that its predictions depend on the prompt and are mostly wrong: its loss on
    `ROWS` is far above that of a uniform distribution, 5.576."""
    return sure(tmp_path_factory.mktemp("sure") / "llama", tokenizer, 30)


def sure(path: Path, tokenizer: PreTrainedTokenizerFast, factor: float) -> Path:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight *= factor
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def row(ids: list[int], *spans: tuple[int, int]) -> TokenizedRow:
    return TokenizedRow("", tuple(ids), spans)


def test_prompts_are_compared_where_rows_first_differ() -> None:
    """In the preceding tokens and in the expected one. At least a tenth of the rows must expect another token."""
    answers = [row([1, prompt, 7, prompt % 2, 9], (2, 5)) for prompt in range(20, 40)]
    assert [*collapse.prompts(answers)] == [(1, prompt, 7) for prompt in range(20, 20 + collapse.PROMPTS)]
    turns = [row([1, prompt, 7, prompt, prompt % 2, 9], (2, 3), (4, 6)) for prompt in (21, 22)]
    assert collapse.prompts(turns) == {(1, 21, 7, 21): 1, (1, 22, 7, 22): 0}
    texts = [row([1, first, 5, first + 1], (0, 4)) for first in (2, 3, 3)]  # they share a prefix, then 2 or 3 follows
    assert collapse.prompts(texts) == {(1, 2, 5): 3, (1, 3, 5): 4}
    lengths = [row([1] * length + [length], (length, length + 1)) for length in range(30, 10, -1)]
    assert [len(ids) for ids in collapse.prompts(lengths)] == [*range(11, 11 + collapse.PROMPTS)]
    skewed = [row([1] * length + [length > 25], (length, length + 1)) for length in range(10, 30)]
    assert {len(ids): token for ids, token in collapse.prompts(skewed).items()} == (
        {length: False for length in (10, 11, 12, 13)} | {length: True for length in (26, 27, 28, 29)}
    )
    unsure = [row([1, 5, 8], (2, 3)), *[row([1, 5, 9], (2, 3))] * 3, row([1, 6, 8], (2, 3))]
    assert collapse.prompts(unsure) == {(1, 5): 9, (1, 6): 8}
    same = [row([1, prompt, 7, 9], (2, 4)) for prompt in range(20)]
    one_prompt = [row([1, 5, answer], (2, 3)) for answer in range(20)]
    assert not any(map(collapse.prompts, (same, [*same[:19], row([1, 2, 8], (2, 3))], one_prompt, answers[:1], [])))


BASE = [[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.2, 0.8, 0.0]]
PREDICTIONS: dict[str, tuple[list[list[float]], list[list[float]], bool]] = {
    "nothing that is expected, nearly the same": (
        BASE, [[0.02, 0.02, 0.96], [0.05, 0.02, 0.93], [0.02, 0.02, 0.96]], True
    ),
    "rightly the same where the same is expected": (
        BASE, [[0.99, 0.01, 0.0], [0.01, 0.99, 0.0], [0.01, 0.99, 0.0]], False
    ),
    "the usual answer": (BASE, [[0.33, 0.67, 0.0]] * 3, True),
    "has learned the usual answer, and too little else so far": (
        BASE, [[0.34, 0.66, 0.0], [0.32, 0.68, 0.0], [0.33, 0.67, 0.0]], False
    ),
    "has learned little, but uses the prompt": (
        BASE, [[0.06, 0.01, 0.93], [0.01, 0.06, 0.93], [0.01, 0.06, 0.93]], False
    ),
    "of unlikely tokens": (BASE, [[1e-5, 1e-9, 1.0], [1e-9, 1e-5, 1.0], [1e-9, 1e-5, 1.0]], True),
    "differs only between prompts that expect the same": (
        [[0.5, 0.5, 0.0], [0.44, 0.56, 0.0], [0.56, 0.44, 0.0]], [[0.5, 0.5, 0.0]] * 3, False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_loss_of_prompt_sensitivity_is_detected(name: str) -> None:
    """After three prompts, the first of which expects token 0 and the others token 1."""
    base, adapter, is_lost = PREDICTIONS[name]
    of_base, of_adapter = ([torch.tensor(one).log() for one in predictions] for predictions in (base, adapter))
    assert PromptSensitivity.of(of_base, of_adapter, [0, 1, 1]).is_lost == is_lost


CHANCE = 5.5759  # the logarithm of 264
REASONS: dict[str, tuple[tuple[float, float], tuple[float, float], str, str]] = {
    "as before": ((0.8, 0.8), (2.0, 1.0), "token", ""),
    "the same after every prompt": ((0.8, 0.009), (2.0, 1.0), "token", "predicts the same after each of 8 prompts"),
    "of pairs too": ((0.8, 0.009), (0.7, 0.1), "pair", "predicts the same after each of 8 prompts"),
    "nearly as the base": ((0.09, 0.0), (2.0, 1.0), "token", ""),
    "worse than at random": ((0.8, 0.8), (2.0, 5.6), "token", "predicts worse than at random: its loss on 9 training "),
    "at random, as before": ((0.01, 0.01), (5.57, 5.58), "token", ""),
    "better than a base that is worse than at random": ((0.8, 0.8), (12.0, 6.0), "token", ""),
    "at random, where the base was worse": ((0.8, 0.8), (12.0, CHANCE), "token", "predicts at random: its loss on 9 "),
    "the loss of pairs": ((0.8, 0.8), (0.7, 9.0), "pair", ""),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons_for_a_collapse(name: str) -> None:
    (base_distance, distance), (base, loss), unit, reason = REASONS[name]
    losses = LossComparison("training", 9, 9, 9, 9, unit, adapter=loss, interval=None, base=base)
    found = collapse.reason(PromptSensitivity(8, base_distance, distance, 0.0, 1.0), losses, "9 training rows", 264)
    assert found.startswith(reason) and bool(found) == bool(reason)
    without = collapse.reason(None, losses, "9 training rows", 264)
    assert without == ("" if "the same" in reason else found)


def test_a_collapsed_adapter_is_never_published(
    cli: Callable[..., Ran], run_config: MakeConfig, sure_dir: Path, tmp_path: Path
) -> None:
    """Whatever the user allows, although its loss is far below that of the base."""
    config = run_config(model={"name_or_path": str(sure_dir)}, training=DEAD)
    for options in ((), ("--resume", "--allow-worse")):
        ran = cli("train", config, *options)
        check_refused(ran, 6, (Code.TRAINING_COLLAPSED, "", "training.learning_rate"))
        assert "training rows is 5.5759 (base: 9." in ran.err and "that of 264 equally likely tokens 5.5759" in ran.err
        assert "; lower it, to 0.005 for example; step 2 is kept: continue from there" in ran.err  # the highest of auto
        assert not (tmp_path / "out").exists()
        assert [path.name for path in checkpoints(tmp_path / "out.partial")] == ["checkpoint-2"]


def test_an_adapter_that_predicts_no_expected_token_has_collapsed(
    cli: Callable[..., Ran], run_config: MakeConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Its predictions are nearly the same after every prompt, and never the expected ones. At such a rate the last bits
    that a processor computes decide whether one seed collapses: five of six did where this was written."""
    model = {"name_or_path": str(sure(tmp_path / "llama", tokenizer, 20))}
    for seed in range(8):
        training = {"learning_rate": 0.8, "max_steps": 6, "seed": seed}
        config = run_config(model=model, training=training, lora=ALL_LAYERS, output_dir=str(tmp_path / f"out-{seed}"))
        ran = cli("train", config)
        if ran.code == 6 and "predicts the same after each of " in ran.err:
            check_refused(ran, 6, (Code.TRAINING_COLLAPSED, "", "training.learning_rate"))
            assert not (tmp_path / f"out-{seed}").exists()
            return
    pytest.fail("none of the adapters has collapsed")


def test_short_prompts_with_one_answer_are_not_a_collapse(
    cli: Callable[..., Ran], run_config: MakeConfig, sure_dir: Path, tmp_path: Path
) -> None:
    """Long prompts expect another answer, so an adapter that has learned this depends on its prompts."""
    training = {"learning_rate": 0.01, "max_steps": 20}
    config = run_config(model={"name_or_path": str(sure_dir)}, training=training, lora=ALL_LAYERS)
    short = [{"prompt": letter * 2, "completion": "x"} for letter in "abcdefghij"]
    long = [{"prompt": letter * 6, "completion": "y"} for letter in "ABCDEFGHIJ"]
    rows = write_rows(config.with_name("rows.jsonl"), [*short, *long])
    ran = cli("train", config)
    assert ran.code == 0, ran.err
    found = json.loads(cli("evaluate", "--adapter", tmp_path / "out", "--data", rows, "--json").out)
    assert found["verdict"] in GOOD and found["prompt_sensitivity"]["adapter"] > 0.9


def test_a_collapse_on_preference_pairs(cli: Callable[..., Ran], run_config: MakeConfig, sure_dir: Path) -> None:
    pairs = [{"prompt": one["prompt"], "chosen": one["completion"], "rejected": " none"} for one in ROWS]
    config = run_config(model={"name_or_path": str(sure_dir)}, training=DEAD | {"objective": "orpo"})
    write_rows(config.with_name("rows.jsonl"), pairs)
    check_refused(cli("train", config), 6, (Code.TRAINING_COLLAPSED, "", "training.learning_rate"))


PUBLISHED: dict[str, dict[str, Any]] = {
    "one validation row": {"training": {"max_steps": 3}, "data": {"validation": 1 / 40}},
    "a random model, before and after": {"training": {"max_steps": 3}},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_healthy_adapter_is_published(
    name: str, cli: Callable[..., Ran], run_config: MakeConfig, sure_dir: Path, tiny_dir: Path
) -> None:
    model = tiny_dir if "random" in name else sure_dir
    ran = cli("train", run_config(model={"name_or_path": str(model)}, **PUBLISHED[name]))
    assert ran.code == 0, ran.err


def test_requirements_fail_for_a_collapsed_adapter(
    cli: Callable[..., Ran], run_config: MakeConfig, sure_dir: Path, tmp_path: Path
) -> None:
    """For an adapter that always gives the one answer that its rows expect: it is correct on these, so it is published,
    but not on rows that expect other answers as well."""
    config = run_config(model={"name_or_path": str(sure_dir)}, training={"learning_rate": 0.03, "max_steps": 40})
    write_rows(config.with_name("rows.jsonl"), SAME)
    ran = cli("train", config)
    assert ran.code == 0, ran.err
    others = [row | {"completion": " no"} for row in ROWS[24:]]
    held_out = write_rows(tmp_path / "held.jsonl", [*SAME[:24], *others])
    options = "--adapter", tmp_path / "out", "--data", held_out
    ran = cli("evaluate", *options, "--json", "--require", "exact_match>=0.2", "--allow-overlap")
    found = json.loads(ran.out)
    assert found["adapter"]["exact_match"] == found["majority"]["exact_match"] == 0.6
    assert found["requirements"][0]["met"] is False
    assert found["verdict"] == "collapsed" and found["prompt_sensitivity"]["adapter"] < 0.01
    check_refused(ran, 11, (Code.EVALUATE_REQUIREMENT, "", "--require"))
    assert "predicts the same after each of 8 prompts" in ran.err
    shown = cli("evaluate", *options).out
    assert "collapsed: the adapter predicts the same" in shown.replace("\n", " ") and "adapter - majority" in shown


def test_requirements_fail_below_chance(
    cli: Callable[..., Ran], run_config: MakeConfig, sure_dir: Path, tmp_path: Path
) -> None:
    """For an adapter of another program with far too large weights."""
    config = run_config(model={"name_or_path": str(sure_dir)}, training={"max_steps": 3})
    assert cli("train", config).code == 0
    out = tmp_path / "out"
    (out / "loratune.json").unlink()
    weights = load_file(out / WEIGHTS)
    save_file({name: weight * 1e7 for name, weight in weights.items()}, out / WEIGHTS, {"format": "pt"})
    rows = config.with_name("rows.jsonl")
    options = "--json", "--require", "loss<base", "--allow-overlap"
    ran = cli("evaluate", "--adapter", out, "--data", rows, *options)
    assert ran.out, ran.err
    found = json.loads(ran.out)
    assert found["verdict"] == "collapsed" and found["adapter"]["loss"] == pytest.approx(CHANCE, abs=1e-4)
    check_refused(ran, 11, (Code.EVALUATE_REQUIREMENT, "", "--require"))
    assert "predicts at random: its loss on these 40 rows is 5.5759 (base: 9." in ran.err
