"""An adapter is compared with its base row by row. A missing gain is reported, and a worse adapter is not published."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from conftest import ROWS, Ran, check_refused, mainly, tiny_llama, tree, write_rows
from peft import PeftModel
from running import MakeConfig, checkpoints
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from loratune import data
from loratune.codes import Code
from loratune.compare.losses import LossComparison, _draw
from loratune.compare.metrics import RowLosses, loss_difference
from loratune.data import UNRELATED_TEXT, TokenizedDataset
from loratune.data.rendering.spans import TokenizedRow
from loratune.errors import Problem, ResourceError
from loratune.statistics import mean_ratio_interval

pytestmark = pytest.mark.usefixtures("untraced_module")


def compared(
    differences: Sequence[float], tokens: Sequence[int] = (), copies: Sequence[int] | None = None, **others: Any
) -> LossComparison:
    """A comparison of rows by their nats per token, adapter minus base, with a base loss of 2 in each."""
    counts = tokens or [1] * len(differences)
    base = RowLosses.of([2.0 * count for count in counts], counts, copies)
    tuned = RowLosses.of([(2.0 + one) * count for one, count in zip(differences, counts, strict=True)], counts, copies)
    return LossComparison.of(base, tuned, "training", **others)


def test_the_interval_is_that_of_mean_ratio_interval() -> None:
    """With rows of equal length it is no narrower than that of a paired t test."""
    found = compared([-1.0, -1.5, -2.0, -1.0, -2.0], [7] * 5)
    assert (found.base, found.adapter, found.better_by) == pytest.approx((2.0, 0.5, 1.5))
    half = 2.7764 * 0.5 / math.sqrt(5)  # the standard deviation is 0.5
    assert found.gain_interval is not None
    assert found.gain_interval.low <= 1.5 - half + 1e-4 and found.gain_interval.high >= 1.5 + half - 1e-4
    assert found.gain_interval == mean_ratio_interval([7.0, 10.5, 14.0, 7.0, 14.0], [7.0] * 5)


def test_the_loss_weights_tokens_but_the_verdict_counts_rows() -> None:
    """Nine short rows become a little worse and a long one much better, so the loss per token improves."""
    found = compared([0.1] * 9 + [-1.0], [2] * 9 + [200])
    assert found.better_by == pytest.approx((200 - 1.8) / 218)
    assert (found.base, found.adapter) == pytest.approx((2.0, 2.0 - found.better_by))
    assert found.verdict == "no gain"  # as it depends on that one row


def test_copies_of_a_row_count_as_one_row() -> None:
    three = compared([0.5], copies=[3])
    assert (three.rows, three.drawn, three.verdict) == (1, 3, "not judged")
    assert three.gain_line.startswith("not judged: 1 distinct of 3 training rows is too few, 5 are needed (base ")
    found = compared([0.1, -0.3, -0.2, -0.2, -0.3], copies=[5, 1, 1, 1, 1])
    assert found.better_by == pytest.approx((1.0 - 0.5) / 9)  # equal to the loss over all nine
    once = compared([0.1] * 5 + [-0.3, -0.2, -0.2, -0.3])
    assert found.gain_interval is not None and once.gain_interval is not None
    assert found.gain_interval.high - found.gain_interval.low > once.gain_interval.high - once.gain_interval.low


VERDICTS: dict[str, tuple[list[float], str]] = {
    "better in every row": ([-0.2, -0.3, -0.25, -0.22, -0.2], "gain"),
    "worse in every row": ([0.2, 0.3, 0.25, 0.22, 0.2], "worse"),
    "up and down": ([0.2, -0.3, 0.25, -0.22, 0.1], "no gain"),
    "better on the whole, not for sure": ([0.2, -0.4, -0.25, 0.1, -0.1], "no gain"),
    "the same": ([0.0] * 5, "no gain"),
    "too little to be shown, in every row": ([-2e-4, -3e-4, -2e-4, -3e-4, -2e-4], "no gain"),
    "too little to be a loss, in every row": ([2e-4, 3e-4, 2e-4, 3e-4, 2e-4], "no gain"),
    "four rows": ([-0.2, -0.3, -0.2, -0.3], "not judged"),
    "one row": ([0.5], "not judged"),
    "not finite": ([-0.2, math.nan, -0.3, -0.2, -0.3], "worse"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts(name: str) -> None:
    differences, verdict = VERDICTS[name]
    found = compared(differences, [3] * len(differences))
    assert found.verdict == verdict
    assert len(found.gain_line) < 140 and "-0.000" not in found.gain_line
    json.dumps(found.to_dict(), allow_nan=False)


def test_positive_differences_are_reported_as_better() -> None:
    found = compared([-0.2, -0.3, -0.25, -0.3, -0.2])
    assert found.gain_line == (
        "0.250 nats per token on 5 training rows (95 % interval 0.161 to 0.339; base 2.000, adapter 1.750)"
    )
    values = found.to_dict()
    assert 0 < values["low"] < values["better_by"] < values["high"]
    assert compared([0.2, 0.3, 0.25, 0.3, 0.2]).gain_line == (
        "worse than the base on 5 training rows: -0.250 nats per token "
        "(95 % interval -0.339 to -0.161; base 2.000, adapter 2.250)"
    )
    assert compared([1e-9, -1e-9, 1e-9, -1e-9, 0.0], total=9).gain_line == (
        "none over the base on 5 of 9 training rows: 0.000 nats per token "
        "(95 % interval 0.000 to 0.000; base 2.000, adapter 2.000)"
    )
    few = compared([0.1, 0.2], total=9)
    assert "a run this short compares only 2 of 9 training rows, 5 are needed" in few.gain_line


@dataclass
class Made:
    """Rows of given lengths. Those with the same key are copies."""

    lengths: Any
    keys: Sequence[int] | None = None
    owners = weights = None

    def __len__(self) -> int:
        return len(self.lengths)

    def side(self, number: int) -> int:
        return 0

    def row(self, number: int) -> TokenizedRow:
        key = self.keys[number] if self.keys is not None else number
        return TokenizedRow("", (key, *range(1, self.lengths[number])), ((1, int(self.lengths[number])),))


def sampled(lengths: Any, budget: int, keys: Sequence[int] | None = None) -> dict[int, int]:
    return _draw(TokenizedDataset(Made(lengths, keys)), budget, range(len(lengths)))  # type: ignore[arg-type]


def test_the_sample_is_small_and_deterministic() -> None:
    many = sampled(np.full(100_000, 10), 10**9)
    assert len(many) == 64 and many == sampled(np.full(100_000, 10), 10**9)
    assert [*many] == sorted(many) and set(many.values()) == {1}
    assert len(sampled(np.full(100, 4096), 10**9)) == 8
    assert len(sampled(np.full(100, 1000), 10**9)) == 32
    assert len(sampled(np.full(100, 1000), 125_000)) == 12


@pytest.mark.parametrize("budget", [10, 1000, 3000, 20_000, 10**6])
@pytest.mark.parametrize("length", [10, 500, 2000, 16_000])
def test_the_comparison_after_a_run_is_limited_by_its_length(length: int, budget: int) -> None:
    """It takes no more tokens than the training, and not many more than a tenth of those of a long run."""
    tokens = len(sampled(np.full(100, length), budget)) * length
    assert tokens <= max(budget, 2048)
    assert tokens <= max(budget / 10, 2048, 8 * length)


def test_the_sample_contains_distinct_rows() -> None:
    """From ten rows, one of which has a thousand copies."""
    found = sampled(np.full(1010, 10), 10**9, [0] * 1000 + [*range(10)])
    assert len(found) == 10 and sum(found.values()) == 1010
    assert max(found.values()) == 1001


def gain_line(out: Path) -> str:
    """The line about the gain in the card of an adapter."""
    (line,) = [line for line in (out / "README.md").read_text().splitlines() if line.startswith("- **Gain:** ")]
    return line.removeprefix("- **Gain:** ")


def by_hand(base_dir: Path, out: Path, texts: Sequence[str] = ()) -> list[RowLosses]:
    """The loss of each row of ROWS, or of the first 64 tokens of texts, for base and adapter, by stock PEFT in
    float32."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    whole = [tokenizer(text).input_ids[:64] for text in texts]
    rows = [(ids[:1], ids[1:]) for ids in whole] or [
        (tokenizer(row["prompt"]).input_ids, [*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id])
        for row in ROWS
    ]
    found = []
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    for wrap in (lambda base: base, lambda base: PeftModel.from_pretrained(base, str(out)).eval()):
        model = wrap(base)
        losses = []
        for asked, answer in rows:
            with torch.no_grad():
                logits = model(torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1]
            total = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
            losses.append((total, len(answer)))
        found.append(RowLosses.of(*zip(*losses, strict=True)))
    return found


@pytest.fixture
def biased_dir(tmp_path: Path, tiny_dir: Path) -> Path:
    """The tiny Llama with biases, which a run can train."""
    tiny_llama(attention_bias=True).save_pretrained(tmp_path / "biased")
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(tmp_path / "biased")
    return tmp_path / "biased"


KINDS: dict[str, dict[str, Any]] = {"plain": {}, "biases": {"bias": "all"}, "pissa": {"init_lora_weights": "pissa"}}


@pytest.mark.parametrize("kind", mainly(["plain", "pissa"], KINDS))
def test_the_metrics_equal_those_of_stock_peft(
    kind: str, cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path, biased_dir: Path
) -> None:
    config = run_config(
        model={"name_or_path": str(biased_dir)}, lora=KINDS[kind], training={"learning_rate": 0.02, "max_steps": 20}
    )
    ran = cli("train", config)
    assert ran.code == 0, ran.err
    expected = LossComparison.of(*by_hand(biased_dir, tmp_path / "out"), "training").to_dict()
    metrics = json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]
    found, way = metrics["gain"], metrics["computed_by"]["gain"]
    assert metrics["computed_by"].keys() == {"gain", "unrelated_text", "behavior"}  # what was measured
    assert metrics["verdict"] == "better than its base"
    assert ran.out.startswith("? better than its base: each expected token became ")
    assert (way["dtype"], way["layers"] in ("accelerated", "stock"), way["batches"][:6]) == ("float32", True, "packed")
    assert (found["rows"], found["total"], found["split"]) == (40, 40, "training")
    for name, value in found.items():
        assert value == (pytest.approx(expected[name], abs=2e-5) if isinstance(value, float) else expected[name]), name
    line = gain_line(tmp_path / "out")
    assert line.startswith(f"{expected['better_by']:.3f} nats per token on 40 training rows (95 % interval ")
    assert "\ncomparing the adapter with its base on 40 training rows\n" in ran.err
    card = (tmp_path / "out" / "README.md").read_text()
    passages = [*map(json.loads, UNRELATED_TEXT.read_text(encoding="utf-8").splitlines())]
    texts = [passage["text"] for passage in passages]
    losses, found = by_hand(biased_dir, tmp_path / "out", texts), metrics["unrelated_text"]
    lost = LossComparison.of(*losses, "unrelated")
    expected = dict(zip(("before", "after", "change"), (lost.base, lost.adapter, -lost.better_by), strict=True))
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=2e-5)
    assert found["low"] < found["change"] < found["high"] and found["rows"] == 38
    for kind, change in found["kinds"].items():
        numbers = [number for number, passage in enumerate(passages) if passage["kind"] == kind]
        assert change == pytest.approx(loss_difference(*(one.take(numbers) for one in losses)).value, abs=2e-5)
    assert [*found["kinds"]] == ["prose", "dialogue", "code", "french", "german"]
    what = "38 passages of general text, 64 tokens at most"
    line = f"base {found['before']:.4f} → {found['after']:.4f} on {what} ({found['change']:+.4f}, "
    warned = f" ({found['change']:+.2f}; a warning from 0.10)"  # said where the text became less likely
    assert (warned in ran.out) == (found["change"] > 0) and f"- **Unrelated text:** {line}" in card
    assert (f"by {found['change']:.2f} nats per token on unrelated text; " in ran.err) == (found["low"] >= 0.1)


@pytest.mark.parametrize(
    ("why", "text"),
    [
        ("short rows", "rows of 15 tokens are too short for it"),
        ("full disk", "the tokenized rows cannot be written: "),
        ("unknown letters", "the tokenizer does not know all characters of the passages"),
    ],
)
def test_a_run_reports_why_unrelated_text_was_not_measured(
    why: str, text: str, cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path, tiny_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The run succeeds as usual, and reports the reason."""
    changes: dict[str, Any] = {"data": {"max_length": 15}} if why == "short rows" else {}
    if why == "full disk":

        def fail(*arguments: Any) -> NoReturn:
            problem = Problem(Code.DATA_UNREADABLE, f"{text}No space left on device")
            raise ResourceError(problem)

        monkeypatch.setattr(data, "prepare_unrelated_text", fail)
    if why == "unknown letters":
        words = {"[UNK]": 0, "[EOS]": 1, **{str(number): number + 2 for number in range(100)}}
        words |= {word: len(words) + place for place, word in enumerate(("and", "make", "is"))}
        backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]")
        shutil.copytree(tiny_dir, tmp_path / "words")
        tokenizer.save_pretrained(tmp_path / "words")
        changes = {"model": {"name_or_path": str(tmp_path / "words")}}
    ran = cli("train", run_config(**changes, training={"learning_rate": 0.02, "max_steps": 5}))
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]["unrelated_text"]
    assert [*found] == ["not_measured"] and found["not_measured"].startswith(text)
    assert f"  kept     not measured: {text}" in ran.out


def test_nonfinite_forgetting_is_reported() -> None:
    found = compared([math.nan] * 12)
    assert found.has_suffered
    assert compared([0.2] * 12).has_suffered and not compared([0.05] * 12).has_suffered


def test_a_run_without_gain_reports_it(cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path) -> None:
    config = run_config(training={"learning_rate": 1e-9, "max_steps": 5})
    ran = cli("train", config)
    check_refused(ran, 6, (Code.TRAINING_LEARNED_NOTHING, "", ""))
    assert (
        "the adapter learned nothing: each expected token became 1.00 times as likely, on 40 training rows" in ran.err
    )
    assert not (tmp_path / "out").exists()
    ran = cli("train", config, "--resume", "--allow-worse")
    assert ran.code == 0, ran.err
    assert ran.out.startswith("✗ learned nothing: each expected token became 1.00 times as likely")
    assert gain_line(tmp_path / "out").startswith("none over the base on 40 training rows: 0.000 nats per token (95 % ")


def test_a_worse_adapter_is_not_published(cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path) -> None:
    """Nothing else is published either. The checkpoints are kept, and the user can publish the adapter anyway."""
    config = run_config(training={"learning_rate": 1e9, "max_steps": 5, "save_steps": 2})
    ran = cli("train", config)
    check_refused(ran, 6, (Code.TRAINING_WORSE_THAN_BASE, "", ""))
    assert ran.out == "" and "]: the adapter is worse than its base: each expected token became " in ran.err
    assert ran.err.endswith("or publish it with --resume --allow-worse\n")
    assert not (tmp_path / "out").exists()
    assert checkpoints(tmp_path / "out.partial")[0].name == "checkpoint-5"
    kept = tree(tmp_path / "out.partial")
    assert json.loads(kept["ended"]).keys() == {"schema_version", "step", "verdict", "headline"}
    publish = (
        "publish it with --resume --allow-worse, or start afresh with --overwrite and another training.learning_rate"
    )
    again = cli("train", config)
    check_refused(again, 2, (Code.TRAINING_WORSE_THAN_BASE, str(tmp_path / "out"), "output_dir"))
    assert again.err.count("\n") == 1 and "out.partial" in again.err and again.err.endswith(f"; {publish}\n")
    lower = ("--resume", "--set", "training.learning_rate=1e-3", "--allow-change", "training.learning_rate")
    for more in ((), ("--allow-worse",)):
        ran = cli("train", config, *lower, *more)
        check_refused(ran, 7, (Code.RESUME_CHANGED, "", "training.learning_rate"))
        assert " all its 5 steps" in ran.err
    assert checkpoints(tmp_path / "out.partial")[0].name == "checkpoint-5"
    ran = cli("train", config, "--resume")  # it is compared again
    check_refused(ran, 6, (Code.TRAINING_WORSE_THAN_BASE, "", ""))
    assert tree(tmp_path / "out.partial") == kept
    ran = cli("train", config, "--resume", "--allow-worse")
    assert ran.code == 0, ran.err
    assert gain_line(tmp_path / "out").startswith("worse than the base on 40 training rows: -")
    assert json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]["verdict"] == "worse"


def test_held_out_rows_decide_if_there_are_any(cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path) -> None:
    """Training improves the loss on its own rows, but not on rows of another kind. A run that is worse on those can
    continue with more steps, or be compared on other rows; its record is deleted by then."""
    away = [{"prompt": f"{number} and {number} make", "completion": "ZQXJ" * 3} for number in range(12)]
    held_out = str(write_rows(tmp_path / "held.jsonl", away))
    hard = {"lora": {"modules_to_save": ["lm_head"]}, "training": {"learning_rate": 0.03, "max_steps": 60}}
    config = run_config(data={"validation": held_out}, **hard)
    ran = cli("train", config)
    assert ran.code == 6 and "the adapter is worse than its base: each expected token became " in ran.err
    assert (tmp_path / "out.partial" / "ended").is_file()
    other = ("--set", f"data.validation={tmp_path / 'rows.jsonl'}", "--allow-change", "data.validation")
    more = ("--set", "training.max_steps=62", "--allow-change", "training.max_steps")
    ran = cli("train", config, "--resume", *more, *other)
    assert ran.code == 0, ran.err
    assert " nats per token on 20 validation rows" in gain_line(tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    few = str(write_rows(tmp_path / "few.jsonl", [*away[:4], *away[:4]]))
    config = run_config(data={"validation": few}, **hard, output_dir=str(tmp_path / "other"))
    ran = cli("train", config)
    assert ran.code == 0, ran.err
    line = gain_line(tmp_path / "other")
    assert " nats per token on 40 training rows (95 % interval " in line
    assert line.endswith("; validation gave 4 distinct rows, too few)")
    metrics = json.loads((tmp_path / "other" / "loratune.json").read_text())["metrics"]
    found, change = metrics["gain"], metrics["unrelated_text"]["change"]
    assert (found["split"], metrics["verdict"], found["validation_rows"]) == ("training", "better than its base", 4)
    assert (
        change > 0.1 and f"(+{change:.2f}; a warning from 0.10)" in ran.out and "raise retention.kl_weight" in ran.out
    )


def test_the_losses_equal_those_of_evaluate(cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path) -> None:
    """If all validation rows are compared: rows of uneven length, with copies among them."""
    held_out = [{"prompt": "Say", "completion": f"{number} " * number} for number in (1, 1, 1, 2, 3, 5, 9, 20, 40)]
    path = str(write_rows(tmp_path / "held.jsonl", held_out))
    ran = cli("train", run_config(data={"validation": path}, training={"max_steps": 20}))
    assert ran.code == 0, ran.err
    metrics = json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]
    scored = json.loads(cli("evaluate", "--adapter", tmp_path / "out", "--data", path, "--json").out)
    assert metrics["gain"]["adapter"] == pytest.approx(metrics["held_out_loss"], abs=1e-5)
    for side in ("base", "adapter"):
        assert metrics["gain"][side] == pytest.approx(scored[side]["loss"], abs=1e-5)
    assert (metrics["gain"]["rows"], metrics["gain"]["drawn"], metrics["gain"]["total"]) == (7, 9, 9)
    assert " on 7 distinct of 9 validation rows" in gain_line(tmp_path / "out")


def test_the_interval_of_the_held_out_loss() -> None:
    """From all validation rows it is the interval of their losses; from a quarter of them it is at most twice as
    wide."""
    dice = np.random.default_rng(0)
    losses = RowLosses.of(dice.exponential(6, 40).tolist(), [3] * 40)
    found = LossComparison.of(losses, losses, "validation")
    expected = mean_ratio_interval(losses.nats, losses.tokens)
    all_rows = found.held_out_interval(found.adapter)
    assert expected is not None and all_rows is not None and all_rows.to_dict() == pytest.approx(expected.to_dict())
    quarter = LossComparison.of(losses, losses, "validation", total=160).held_out_interval(5.0)
    assert quarter is not None
    assert quarter.high - 5.0 == pytest.approx((expected.high - found.adapter) / 2)
    assert 5.0 - quarter.low == pytest.approx((found.adapter - expected.low) / 2)
    assert LossComparison.of(losses, losses, "training").held_out_interval(5.0) is None
    assert LossComparison.of(losses.take(range(4)), losses.take(range(4)), "validation").held_out_interval(5.0) is None
