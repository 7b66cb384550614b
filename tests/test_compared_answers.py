"""`loratune evaluate` and `report` on preference data, against stock PEFT and formulas written out."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ran, check_refused, config_in, mainly, write_rows
from peft import PeftModel
from scipy import stats
from test_preferences import HELD_OUT, PAIRS, config
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from loratune import statistics
from loratune.cli import app
from loratune.codes import Code
from loratune.compare import comparison
from loratune.compare import text as wording
from loratune.compare.answers import ComparedAnswer, ComparedRow, ModelAnswer
from loratune.compare.metrics import ADAPTER, BASE, RANKING_ACCURACY, REWARD_ACCURACY, REWARD_MARGIN, metrics_of

pytestmark = pytest.mark.usefixtures("untraced_module")

Cli = Callable[..., Ran]

SWAPPED = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in HELD_OUT[:3]]
ASKED = [*HELD_OUT, HELD_OUT[0], *SWAPPED]
"""Pairs, one of them twice and some in reverse order, so that no fraction is 0 or 1."""
ANSWERS = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in HELD_OUT
    for side in ("chosen", "rejected")
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """A directory with adapters named after their objectives, `pairs.jsonl` and `answers.jsonl`."""
    path = tmp_path_factory.mktemp("compared")
    make = config_in(path, tiny_dir)
    for objective, steps in (("dpo", 12), ("simpo", 6), ("kto", 8)):
        changes = {"training": {"max_steps": steps}, "output_dir": str(path / objective)}
        ran = CliRunner().invoke(app, ["train", str(config(make, path, objective, **changes))])
        assert ran.exit_code == 0, ran.stderr
    write_rows(path / "pairs.jsonl", ASKED)
    write_rows(path / "answers.jsonl", ANSWERS)
    return path


def evaluate(place: Path, adapter: str, rows: str, *arguments: object) -> list[object]:
    return ["evaluate", "--adapter", place / adapter, "--data", place / rows, *arguments]


@torch.no_grad()
def by_hand(base: Path, adapter: Path | None) -> list[tuple[float, float, int, int]]:
    """Log-probabilities and tokens of the chosen and the rejected answer of each pair, without any code of loratune."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(model, str(adapter)).eval() if adapter else model
    found = []
    for row in ASKED:
        prompt = tokenizer(row["prompt"]).input_ids
        sides = [[*tokenizer(row[side]).input_ids, tokenizer.eos_token_id] for side in ("chosen", "rejected")]
        logits = [model(torch.tensor([prompt + side])).logits[0, len(prompt) - 1 : -1] for side in sides]
        sums = [
            -torch.nn.functional.cross_entropy(one, torch.tensor(side), reduction="sum").item()
            for one, side in zip(logits, sides, strict=True)
        ]
        found.append((*sums, *map(len, sides)))
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def higher(one: float, other: float) -> float:
    return 0.5 if one == other else float(one > other)


@pytest.mark.parametrize("objective", ["dpo", "simpo"])
def test_metrics_equal_an_independent_computation(objective: str, place: Path, tiny_dir: Path, cli: Cli) -> None:
    """DPO with the base as the reference; SimPO without one, with beta 2 and a margin of 1."""
    ran = cli(*evaluate(place, objective, "pairs.jsonl", "--json"))
    assert ran.code == 0, ran.err
    values = json.loads(ran.out)
    before, after = by_hand(tiny_dir, None), by_hand(tiny_dir, place / objective)
    for model, answers in ((BASE, before), (ADAPTER, after)):
        if objective == "dpo":
            rewards = [
                (0.1 * (own[0] - ref[0]), 0.1 * (own[1] - ref[1])) for own, ref in zip(answers, before, strict=True)
            ]
        else:
            rewards = [(2 * own[0] / own[2], 2 * own[1] / own[3]) for own in answers]
        gamma = 1 if objective == "simpo" else 0
        expected = {
            "loss": mean([math.log1p(math.exp(gamma - (good - bad))) for good, bad in rewards]),
            REWARD_ACCURACY: mean([higher(*own) for own in rewards]),
            REWARD_MARGIN: mean([good - bad for good, bad in rewards]),
            RANKING_ACCURACY: mean([higher(own[0], own[1]) for own in answers]),
            "chosen_log_probability": mean([own[0] for own in answers]),
            "rejected_log_probability": mean([own[1] for own in answers]),
            "preferred_length": mean([own[2] if own[0] >= own[1] else own[3] for own in answers]),
        }
        assert values[model].keys() == {*expected, "rows", "tokens", "intervals"}
        assert [*values[model]][:7] == ["loss", *metrics_of(paired=True)]
        for name, value in expected.items():
            assert values[model][name] == pytest.approx(value, abs=1e-4), name
            low, high = values[model]["intervals"][name]
            assert low - 1e-9 <= values[model][name] <= high + 1e-9, name
        assert values[model]["rows"] == 16 and 0 < expected[RANKING_ACCURACY] < 1
    for name, difference in values["difference"].items():
        assert difference["value"] == pytest.approx(values[ADAPTER][name] - values[BASE][name], abs=1e-9)
    numbers = {"dpo": {"beta": 0.1, "sft_weight": 0.0}, "simpo": {"beta": 2.0, "simpo_gamma": 1.0, "sft_weight": 0.0}}
    assert values["objective"] == {"name": objective, "label_smoothing": 0.0, **numbers[objective]}
    assert values["metric"] == "loss" and values["overlap"] == {"exact": 0, "folded": 0, "rows": 16}


def test_metrics_equal_those_at_the_end_of_the_run(tmp_path: Path, tiny_dir: Path, cli: Cli) -> None:
    """For KTO too, whose KL estimate and loss depend on mismatched prompts and answers."""
    make = config_in(tmp_path, tiny_dir)
    judged = {"data": {"validation": str(write_rows(tmp_path / "answers.jsonl", ANSWERS))}}
    for objective, rows, more in (("dpo", "held-out.jsonl", {}), ("kto", "answers.jsonl", judged)):
        path = config(make, tmp_path, objective, output_dir=str(tmp_path / objective), **more)
        run = json.loads(cli("train", path, "--json").out)
        found = json.loads(cli(*evaluate(tmp_path, objective, rows, "--json")).out)[ADAPTER]
        expected = run["preferences"]
        assert found["loss"] == pytest.approx(run["held_out_loss"], abs=1e-5)
        for name in (REWARD_ACCURACY, REWARD_MARGIN):
            assert found[name] == pytest.approx(expected[name]["value"], abs=1e-4), name
        low, high = expected[REWARD_MARGIN]["interval"]
        assert low < found[REWARD_MARGIN] < high
        sides = ("chosen", "rejected") if objective == "dpo" else ("desirable", "undesirable")
        for side in sides:
            assert found[f"{side}_log_probability"] == pytest.approx(expected[side]["log_probability"], abs=1e-3)
    assert found["reward_margin"] != 0 and "ranking_accuracy" not in found


def test_printed_tables_of_preference_pairs(place: Path, cli: Cli) -> None:
    ran = cli(*evaluate(place, "dpo", "pairs.jsonl", "--worst", 1))
    assert ran.code == 0, ran.err
    verdict, *lines = ran.out.splitlines()
    assert "better than its base: the loss per pair went from 0.693 to 0." in verdict
    assert lines[0] == "loss and rewards of dpo with beta 0.1, the base as the reference"
    assert lines[1].startswith("16 pairs (mean tokens: chosen ") and "rejected" in lines[1]
    assert any(line.split()[:3] == ["reward", "accuracy", "50.0%"] for line in lines)
    assert any(line.startswith("  chosen  ") and "log-probability base -" in line for line in lines)
    assert "held-out pairs would tell" in ran.out
    tables = lines[:18]
    assert tables[-1].startswith("  preferred length") and max(map(len, tables)) <= 120
    assert "the base as the reference" not in cli(*evaluate(place, "simpo", "pairs.jsonl")).out


def test_against_an_adapter_of_another_objective(place: Path, cli: Cli) -> None:
    """It is measured by the objective of the first adapter, which is reported. The reference is still the base."""
    ran = cli(*evaluate(place, "dpo", "pairs.jsonl", "--against", place / "simpo", "--json"))
    assert ran.code == 0, ran.err
    values = json.loads(ran.out)
    alone = json.loads(cli(*evaluate(place, "dpo", "pairs.jsonl", "--json")).out)
    assert values["base"] == alone["base"] and values["adapter"] == alone["adapter"]
    assert values["difference_from_base"] == alone["difference"]
    for name, difference in values["difference"].items():
        assert difference["value"] == pytest.approx(values["adapter"][name] - values["against"][name], abs=1e-9)
    assert "rows_needed" in values["difference"][RANKING_ACCURACY]
    said = "simpo: was trained with simpo with beta 2, simpo_gamma 1, and is measured by dpo with beta 0.1"
    assert f"{place / said}" in ran.err


def test_rows_of_the_other_kind_of_preferences(place: Path, cli: Cli) -> None:
    """KTO's adapter is measured on pairs by DPO, and DPO's on unpaired preferences by KTO, with the beta of their
    training."""
    for adapter, rows, measured in (("kto", "pairs.jsonl", "dpo"), ("dpo", "answers.jsonl", "kto")):
        ran = cli(*evaluate(place, adapter, rows, "--json"))
        assert ran.code == 0 and f"and is measured by {measured} with beta 0.1" in ran.err
        assert json.loads(ran.out)["objective"]["name"] == measured


def test_each_pair_is_written_to_the_output(place: Path, cli: Cli, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    ran = cli(*evaluate(place, "dpo", "pairs.jsonl", "--output", output, "--json"))
    assert ran.code == 0, ran.err
    lines, values = [json.loads(line) for line in output.read_text().splitlines()], json.loads(ran.out)
    assert lines[0]["copies"] == lines[1]["copies"] == 2 and lines[0]["where"] != lines[1]["where"]
    rows = [lines[0], *lines[2:]]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in rows] == [
        (row["prompt"], row["chosen"], row["rejected"]) for row in [*HELD_OUT, *SWAPPED]
    ]
    assert [row["copies"] for row in rows] == [2, *[1] * 14] and rows[1]["where"] == f"{place / 'pairs.jsonl'}:2"
    for row in rows:
        assert row["tokens"] == row["chosen_tokens"] + row["rejected_tokens"] and "expected" not in row
        assert row["base"].keys() == {"loss", *metrics_of(paired=True)}
    for name in ("loss", REWARD_MARGIN):
        weighted = mean([row["adapter"][name] for row in rows for _ in range(row["copies"])])
        assert weighted == pytest.approx(values["adapter"][name], abs=1e-9)
    judged = cli(*evaluate(place, "kto", "answers.jsonl", "--output", tmp_path / "answers.jsonl"))
    assert judged.code == 0, judged.err
    first, second = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()][:2]
    assert first["desirable"] == HELD_OUT[0]["chosen"] and second["undesirable"] == HELD_OUT[0]["rejected"]
    assert "undesirable" not in first and "undesirable_log_probability" not in first["adapter"]


@pytest.mark.parametrize(
    ("adapter", "rows", "required", "met"),
    [
        ("dpo", "pairs.jsonl", "accuracy>=0.9", False),
        ("dpo", "held-out.jsonl", "margin>0", True),
        ("dpo", "held-out.jsonl", "loss<base", True),
        ("dpo", "pairs.jsonl", "ranking_accuracy>base", False),
        ("dpo", "pairs.jsonl", "difference.rejected_log_probability<0", True),
        ("kto", "answers.jsonl", "difference.undesirable_log_probability<=0", True),
        *mainly(
            [],
            [
                ("dpo", "pairs.jsonl", "accuracy>=0.5", True),
                ("dpo", "pairs.jsonl", "margin>0", False),
                ("dpo", "pairs.jsonl", "reward_margin>5", False),
                ("dpo", "pairs.jsonl", "difference.chosen_log_probability>-0.1", False),
                ("kto", "answers.jsonl", "margin>0", True),
            ],
        ),
    ],
)
def test_requirements_on_preferences(adapter: str, rows: str, required: str, met: bool, place: Path, cli: Cli) -> None:
    ran = cli(*evaluate(place, adapter, rows, "--require", required, "--json"))
    (judgement,) = json.loads(ran.out)["requirements"]
    assert (ran.code, judgement["met"]) == ((0, True) if met else (11, False)), ran.err
    if required.startswith(("accuracy", "margin")):
        values = json.loads(ran.out)["adapter"]
        name = {"accuracy": REWARD_ACCURACY, "margin": REWARD_MARGIN}[required.split(">")[0]]
        assert [judgement["low"], judgement["high"]] == values["intervals"][name]


@pytest.mark.parametrize(
    ("rows", "arguments", "code", "expected", "said"),
    [
        ("pairs.jsonl", ["--metric", "contains"], 2, (Code.USAGE_CONFLICT, "pairs.jsonl", "--metric"), "no model"),
        ("pairs.jsonl", ["--require", "exact_match>0.5"], 2, (Code.USAGE_BAD_VALUE, "pairs.jsonl", "--require"),
         "take one of loss, reward_accuracy, reward_margin, ranking_accuracy"),
        ("pairs.jsonl", ["--require", "perplexity<9"], 2, (Code.USAGE_BAD_VALUE, "pairs.jsonl", "--require"), "loss"),
        ("answers.jsonl", ["--require", "ranking_accuracy>0"], 2,
         (Code.USAGE_BAD_VALUE, "answers.jsonl", "--require"), "desirable_log_probability"),
        ("text.jsonl", ["--require", "margin>0"], 2, (Code.USAGE_BAD_VALUE, "text.jsonl", "--require"), "one of loss"),
        ("pairs.jsonl", ["--require", "accuracy>=90"], 2, (Code.USAGE_BAD_VALUE, "", "--require"), "0.9"),
        ("compared.jsonl", ["--require", "margin>0"], 4,
         (Code.EVALUATE_OVERLAP, "compared.jsonl", "--require"), "in train"),
        ("*s.jsonl", [], 4, (Code.DATA_FORMAT, "pairs.jsonl:1", ""), "only files of that kind"),
        ("text.jsonl", ["--forgetting", "pairs.jsonl"], 4, (Code.DATA_FORMAT, "pairs.jsonl:1", ""), "without"),
    ],
)  # fmt: skip
def test_invalid_rows_and_options_are_refused(
    rows: str, arguments: list[str], code: int, expected: tuple[Code, str, str], said: str, place: Path, cli: Cli
) -> None:
    write_rows(place / "compared.jsonl", PAIRS)
    write_rows(place / "text.jsonl", [{"prompt": "a", "completion": "b"}])
    given = [str(place / one) if one.endswith(".jsonl") else one for one in arguments]
    ran = cli(*evaluate(place, "dpo", rows, *given))
    what, where, key = expected
    check_refused(ran, code, (what, f"{place / where}" if where else "", key))
    assert said in ran.err


def test_forgetting_is_measured_beside_pairs(place: Path, cli: Cli) -> None:
    write_rows(place / "text.jsonl", [{"text": f"some text {number}"} for number in range(6)])
    command = evaluate(place, "dpo", "pairs.jsonl", "--forgetting", place / "text.jsonl", "--require", "forgetting<9")
    ran = cli(*command, "--json")
    assert ran.code == 0 and json.loads(ran.out)["forgetting"]["value"] != 0


def test_the_report_shows_pairs(place: Path, cli: Cli, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    ran = cli(
        "report", "--adapter", place / "dpo", "--against", place / "simpo", "--data", place / "pairs.jsonl",
        "--output", page,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    text = page.read_text()
    for part in (
        "16 pairs (mean tokens: chosen", "The loss and rewards of dpo with beta 0.1, the base as the reference.",
        "<th scope=\"row\">ranking accuracy</th>", "All 15 distinct pairs", "chosen, 4 tokens, log-probability base -",
        "neither better nor worse",
    ):  # fmt: skip
        assert part in text, part
    judged = cli(
        "report", "--adapter", place / "kto", "--data", place / "answers.jsonl", "--output", page, "--overwrite"
    )
    assert judged.code == 0 and "24 answers (mean tokens: desirable" in page.read_text()


# Intervals of metrics on preferences


def judged_row(number: int, side: str, before: float, after: float) -> ComparedRow:
    sign = 1 if side == "desirable" else -1
    answers = {
        name: ModelAnswer(1.0, None, {REWARD_ACCURACY: higher(sign * reward, 0), REWARD_MARGIN: sign * reward})
        for name, reward in ((BASE, before), (ADAPTER, after))
    }
    return ComparedRow(number, "", 1, "p", None, 3, answers, {side: ComparedAnswer("a", 3)})


def test_the_margin_of_unpaired_preferences_has_welchs_interval() -> None:
    """It is the difference between the means of two groups, which may differ in size and variance."""
    dice = torch.Generator().manual_seed(0)
    good, bad = torch.randn(9, generator=dice) + 1, 3 * torch.randn(14, generator=dice)
    rows = [judged_row(number, "desirable", 0.0, float(one)) for number, one in enumerate(good)]
    rows += [judged_row(number, "undesirable", 0.0, float(one)) for number, one in enumerate(bad, len(rows))]
    found = comparison.compare_rows(rows)
    expected = stats.ttest_ind(good.numpy().astype(float), bad.numpy().astype(float), equal_var=False)
    interval = expected.confidence_interval(0.95)
    own, difference = found.scores[ADAPTER].intervals[REWARD_MARGIN], found.differences[REWARD_MARGIN]
    assert own is not None and difference.interval is not None
    assert [own.low, own.high] == pytest.approx([interval.low, interval.high], rel=1e-6)
    assert [difference.interval.low, difference.interval.high] == pytest.approx([own.low, own.high], rel=1e-9)
    assert found.scores[ADAPTER].metrics[REWARD_MARGIN] == pytest.approx(float(good.mean() - bad.mean()), rel=1e-6)
    few = comparison.compare_rows([*rows[:9], *rows[9:12]])
    assert few.scores[ADAPTER].intervals[REWARD_MARGIN] is None and few.differences[REWARD_MARGIN].verdict is None


def test_a_reference_without_rewards_adds_no_uncertainty() -> None:
    """All its rewards are 0 on any rows, so the difference from it is as uncertain as the accuracy alone."""
    rows = [judged_row(number, "desirable", 0.0, 1.0 if number < 8 else -1.0) for number in range(10)]
    found = comparison.compare_rows(rows)
    base, own = (found.scores[model].intervals[REWARD_ACCURACY] for model in (BASE, ADAPTER))
    difference = found.differences[REWARD_ACCURACY]
    assert base == statistics.Interval(0.5, 0.5) and own == statistics.wilson(8, 10)
    assert difference.interval == statistics.Interval(own.low - 0.5, own.high - 0.5)
    assert difference.value == pytest.approx(0.3) and difference.verdict == "indistinguishable"
    assert wording.outlook(difference, "answer") == "about 16 answers would tell"


def test_one_sample_has_the_jackknife_interval() -> None:
    values, ones = [1.0, 2.0, 4.0, 8.0, 9.5, 3.0], [1.0] * 6
    assert statistics.sum_of_ratios_interval([(values, ones)]) == pytest.approx(
        statistics.jackknife_interval(values, ones)
    )
    assert statistics.sum_of_ratios_interval([(values, ones), (values[:4], ones[:4])]) is None
    assert statistics.sum_of_ratios_interval([(ones, ones), (ones, ones)]) == statistics.Interval(2.0, 2.0)
