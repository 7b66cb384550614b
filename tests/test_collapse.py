"""An adapter that predicts the same after every prompt is not published, and passes no gate."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, Ran, check_refused, tiny_llama, write_rows
from running import MakeConfig, checkpoints
from transformers import PreTrainedTokenizerFast

from loratune.codes import Code
from loratune.data.rendering import TokenizedRow
from loratune.training import collapse
from loratune.training.collapse import PromptSensitivity
from loratune.training.gain import Gain

SAME = [row | {"completion": " yes"} for row in ROWS]
DEAD = {"learning_rate": 1e10, "max_steps": 3, "save_steps": 1}
"""A rate at which the tiny model comes to predict every token with the same probability."""


@pytest.fixture(scope="module")
def sure_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The tiny model with large logits, so that what it predicts depends on the prompt and is mostly wrong: its loss on
    `ROWS` is far above that of a uniform distribution, 5.576."""
    path, model = tmp_path_factory.mktemp("sure") / "llama", tiny_llama()
    with torch.no_grad():
        model.lm_head.weight *= 30
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def row(ids: list[int], *spans: tuple[int, int]) -> TokenizedRow:
    return TokenizedRow("", tuple(ids), spans)


def test_prompts_are_read_where_rows_first_differ() -> None:
    """In what stands before, and in what is expected there; a tenth of the rows must expect something else."""
    answers = [row([1, prompt, 7, prompt % 2, 9], (2, 5)) for prompt in range(20, 40)]
    assert collapse.prompts(answers) == [(1, prompt, 7) for prompt in range(20, 20 + collapse.PROMPTS)]
    turns = [row([1, prompt, 7, prompt, prompt % 2, 9], (2, 3), (4, 6)) for prompt in (21, 22)]
    assert collapse.prompts(turns) == [(1, 21, 7, 21), (1, 22, 7, 22)]
    texts = [row([1, first, 5, first + 1], (0, 4)) for first in (2, 3, 3)]  # which begin alike, so that 2 or 3 follows
    assert collapse.prompts(texts) == [(1, 2, 5), (1, 3, 5)]
    lengths = [row([1] * length + [length], (length, length + 1)) for length in range(30, 10, -1)]
    assert [len(ids) for ids in collapse.prompts(lengths)] == [*range(11, 11 + collapse.PROMPTS)]
    same = [row([1, prompt, 7, 9], (2, 4)) for prompt in range(20)]
    one_prompt = [row([1, 5, answer], (2, 3)) for answer in range(20)]
    assert not any(map(collapse.prompts, (same, [*same[:19], row([1, 2, 8], (2, 3))], one_prompt, answers[:1], [])))


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
def test_reasons(name: str) -> None:
    (base_distance, distance), (base, loss), unit, reason = REASONS[name]
    gain = Gain("training", 9, 9, 9, base, loss, base - loss, None, None, unit=unit)
    found = collapse.reason(PromptSensitivity(8, base_distance, distance), gain, 264)
    assert found.startswith(reason) and bool(found) == bool(reason)
    assert collapse.reason(None, gain, 264) == ("" if "the same" in reason else found)


def test_what_has_collapsed_is_never_published(
    cli: Callable[..., Ran], run_config: MakeConfig, sure_dir: Path, tmp_path: Path
) -> None:
    """Though its loss is far below that of its base, whatever the user allows."""
    config = run_config(model={"name_or_path": str(sure_dir)}, training=DEAD)
    for options in ((), ("--resume", "--allow-worse")):
        ran = cli("train", config, *options)
        check_refused(ran, 6, (Code.TRAINING_COLLAPSED, "", "training.learning_rate"))
        assert "training rows is 5.5759 (base: 9." in ran.err and "that of 264 equally likely tokens 5.5759" in ran.err
        assert "; lower it, to 0.005 for example; step 2 is kept: continue from there" in ran.err  # the highest of auto
        assert not (tmp_path / "out").exists()
        assert [path.name for path in checkpoints(tmp_path / "out.partial")] == ["checkpoint-2"]


def test_compared_answers_collapse_too(cli: Callable[..., Ran], run_config: MakeConfig, sure_dir: Path) -> None:
    pairs = [{"prompt": one["prompt"], "chosen": one["completion"], "rejected": " none"} for one in ROWS]
    config = run_config(model={"name_or_path": str(sure_dir)}, training=DEAD | {"objective": "orpo"})
    write_rows(config.with_name("rows.jsonl"), pairs)
    check_refused(cli("train", config), 6, (Code.TRAINING_COLLAPSED, "", "training.learning_rate"))


PUBLISHED: dict[str, dict[str, Any]] = {
    "one validation row": {"training": {"max_steps": 3}, "data": {"validation": 1 / 40}},
    "a random model, before and after": {"training": {"max_steps": 3}},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_right_is_published(
    name: str, cli: Callable[..., Ran], run_config: MakeConfig, sure_dir: Path, tiny_dir: Path
) -> None:
    model = tiny_dir if "random" in name else sure_dir
    ran = cli("train", run_config(model={"name_or_path": str(model)}, **PUBLISHED[name]))
    assert ran.code == 0, ran.err


def test_the_gate_says_it(cli: Callable[..., Ran], run_config: MakeConfig, sure_dir: Path, tmp_path: Path) -> None:
    """Of an adapter that always gives the one answer that its rows expect: right on these, so that it is published, and
    not on rows that expect others as well."""
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
