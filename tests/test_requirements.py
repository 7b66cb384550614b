"""`evaluate --require`: parsing, verdicts by the conservative end of an interval, and exit codes."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran, check_refused, config_in, meanings, write_rows
from test_cli import imported

from loratune import statistics
from loratune.codes import Code
from loratune.compare import comparison, requirements, tasks
from loratune.compare import text as wording
from loratune.compare.answers import ComparedRow, ModelAnswer
from loratune.compare.comparison import Comparison
from loratune.compare.losses import LossComparison
from loratune.compare.metrics import ADAPTER, AGAINST, BASE, Difference, RowLosses
from loratune.compare.requirements import Requirement
from loratune.compare.tasks import TaskResults
from loratune.errors import ConfigError, RequirementError
from loratune.statistics import Interval

pytestmark = pytest.mark.usefixtures("untraced_module")

ASKED = ["json", "regex:(\\d+)<=>"]


def parsed(text: str, **options: bool) -> Requirement:
    (one,) = requirements.parse_requirements([text, text], ASKED, **({"against": True, "forgetting": True} | options))
    return one


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("exact_match>=0.9", ("exact_match", ">=", 0.9, False)),
        (" label > 5e-1 ", ("label_accuracy", ">", 0.5, False)),
        ("loss<base", ("loss", "<", "base", False)),
        ("exact_match>majority", ("exact_match", ">", "majority", False)),
        ("perplexity <= against", ("perplexity", "<=", "against", False)),
        ("forgetting<0.05", ("forgetting", "<", 0.05, False)),
        ("difference.loss<-.5", ("loss", "<", -0.5, True)),
        ("difference.json>=0", ("json", ">=", 0, True)),
        ("invalid_json<=0.01", ("invalid_json", "<=", 0.01, False)),
        ("regex:(\\d+)<=>>=0.5", ("regex:(\\d+)<=>", ">=", 0.5, False)),
    ],
)
def test_requirements_are_parsed(text: str, expected: tuple[Any, ...]) -> None:
    one = parsed(text)
    assert (one.metric, one.comparison, one.bound, one.of_difference) == expected
    assert one.text == text


@pytest.mark.parametrize(
    ("text", "code"),
    [
        *((text, Code.USAGE_BAD_VALUE) for text in (
            "", "loss", "<1", "loss<", "loss==1", "loss=1", "loss<1<2", "loss<nan", "loss<inf", "loss<1e999",
            "loss<1_0", "loss<\u0661", "loss<other", "los<1",
             "x" * 999 + "<1", "difference.forgetting<1", "difference.perplexity<1",
            "difference.loss<base", "base>loss", "loss=>1", "regex:(<1", "difference.<1", "json:<1",
            "loss<majority", "perplexity<majority", "difference.label>majority",
        )),
        *((text, Code.USAGE_BAD_VALUE) for text in ("exact_match>=90", "label>-0.1", "difference.json>=1.5")),
        *((text, Code.USAGE_CONFLICT) for text in (
            "contains>0.5", "regex:x>0.5", "rouge_l>0.5", "difference.contains>0", "loss<against", "forgetting<0.1",
        )),
    ],
)  # fmt: skip
def test_invalid_requirements_are_refused(text: str, code: Code) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(text, against=False, forgetting=False)
    assert meanings(caught.value) == [(code, "", "require")]
    assert len(str(caught.value)) < 400


def test_invalid_json_requires_the_json_metric() -> None:
    with pytest.raises(ConfigError) as caught:
        requirements.parse_requirements(["invalid_json<0.1", "exact_mach>=0.9"])
    assert [code for code, _, _ in meanings(caught.value)] == [Code.USAGE_CONFLICT, Code.USAGE_BAD_VALUE]
    with pytest.raises(ConfigError):
        parsed("forgetting<base")
    assert "`metrics='json'`" in str(
        caught.value
    ) and "did you mean `exact_match`? the metrics are loss, perplexity, " in str(caught.value)


def rows(*matches: tuple[int, int, int], nats: tuple[float, float, float] = (3.0, 1.0, 2.0)) -> list[ComparedRow]:
    """Rows of one token. matches: whether base, adapter and the other adapter give the expected answer."""
    answers = [
        {
            name: ModelAnswer(loss + 0.1 * (number % 3), "", {"exact_match": float(one), "label_accuracy": float(one)})
            for name, one, loss in zip((BASE, ADAPTER, AGAINST), ones, nats, strict=True)
        }
        for number, ones in enumerate(matches)
    ]
    return [ComparedRow(number, "", 1, "p", "e", 1, one) for number, one in enumerate(answers)]


def verdict(evaluation: Comparison, text: str) -> bool:
    (one,) = evaluation.judged([parsed(text)]).requirements
    values = one.to_dict()
    assert (values["text"], values["met"]) == (text, one.met)
    assert one.met == (one.reason == "")
    return one.met


def test_low_end_of_the_interval_decides_lower_bounds() -> None:
    found = comparison.compare_rows(rows(*[(0, 1, 1)] * 187, *[(0, 0, 1)] * 13))  # 93.5 % of 200
    low, high = found.scores[ADAPTER].intervals["exact_match"].to_dict()
    assert (low, high) == pytest.approx((0.892, 0.962), abs=1e-3)
    assert not verdict(found, "exact_match>=0.9")
    assert verdict(found, "exact_match>=0.89") and verdict(found, "label>=0.89")
    assert verdict(found, f"exact_match>={low!r}") and not verdict(found, f"exact_match>{low!r}")
    assert verdict(found, f"exact_match<={high!r}") and not verdict(found, f"exact_match<{high!r}")
    assert not verdict(found, "exact_match<=0.95")
    (one,) = found.judged([parsed("exact_match>=0.9")]).requirements
    assert one.to_dict() == {"text": "exact_match>=0.9", "met": False, "value": 0.935, "low": low, "high": high}


def test_majority_answer_can_be_the_bound() -> None:
    """The majority answer is right on the first rows."""

    def met(right: int, all_rows: int, frequent: int) -> bool:
        found = rows(*[(0, 1, 0)] * right, *[(0, 0, 0)] * (all_rows - right))
        answers = [
            ModelAnswer(math.nan, "e", dict.fromkeys(("exact_match", "label_accuracy"), float(place < frequent)))
            for place in range(all_rows)
        ]
        return verdict(comparison.compare_rows(found, baselines={"majority": answers}), "exact_match>majority")

    assert met(60, 80, 40) and not met(42, 80, 40) and not met(40, 80, 40) and not met(40, 80, 60)
    one = comparison.compare_rows(rows(*[(0, 1, 0)] * 9)).judged([parsed("label>majority")]).requirements[0]
    assert not one.met and one.value is None and "not labels" in one.reason


def test_comparisons_with_a_model_are_paired() -> None:
    """The losses of the two models overlap by far more than they differ on any row."""
    spread = [replace(row, tokens=1, answers={
        BASE: ModelAnswer(10.0 * (row.number % 7) + 0.5 + 0.1 * (row.number % 3), None, {}),
        ADAPTER: ModelAnswer(10.0 * (row.number % 7), None, {}),
    }) for row in rows(*[(0, 0, 0)] * 60)]  # fmt: skip
    found = comparison.compare_rows(spread)
    assert found.scores[ADAPTER].intervals["loss"].high > found.scores[BASE].intervals["loss"].low + 5
    for text, is_met in (
        ("loss<base", True), ("perplexity<base", True), ("loss>=base", False), ("difference.loss<-0.5", True),
        ("difference.loss<-0.65", False), ("loss<100", True), ("loss<30", False), ("exact_match>=0", False),
    ):  # fmt: skip
        assert verdict(found, text) is is_met, text


def test_base_and_other_adapter_can_be_the_bound() -> None:
    """If another adapter is given, `base` still refers to the base."""
    found = comparison.compare_rows(rows(*[(0, 1, 1)] * 30, *[(0, 0, 1)] * 10))
    assert found.compared_with == AGAINST
    for text, is_met in (
        ("loss<base", True), ("loss<against", True), ("exact_match>base", True), ("exact_match>=against", False),
        ("difference.exact_match>=-0.5", True), ("difference.exact_match>=-0.3", False),
    ):  # fmt: skip
        assert verdict(found, text) is is_met, text


def test_better_than_a_model_requires_the_same_verdict() -> None:
    found = comparison.compare_rows([replace(row, answers={
        name: answer for name, answer in row.answers.items() if name != AGAINST
    }) for row in rows(*[(0, 1, 0)] * 5, *[(1, 1, 0)] * 95)])  # fmt: skip
    one = found.differences["exact_match"]
    assert one.interval is not None and one.p is not None and one.p > 0.05
    if one.interval.low > 0:
        assert not verdict(found, "exact_match>base")
    shown = replace(one, interval=Interval(0.01, 0.1))
    found = replace(found, paired={BASE: {**found.differences, "exact_match": shown}})
    assert not verdict(found, "exact_match>base") and verdict(found, "exact_match>=base")


def test_positive_difference_requires_the_verdict_better() -> None:
    """A difference required to be above 0 must pass the same test as a comparison with a model."""
    found = comparison.compare_rows(rows(*[(0, 1, 0)] * 5, *[(0, 0, 0)] * 15))
    one = found.differences["exact_match"]
    assert one.interval is not None and one.interval.low > 0.01 and one.verdict == "indistinguishable"
    assert not any(verdict(found, f"difference.exact_match{text}") for text in (">0", ">=0.01"))
    assert verdict(found, "difference.exact_match>-0.05") and verdict(found, "difference.exact_match>=0")


def test_too_few_rows_meet_no_requirement() -> None:
    found = comparison.compare_rows(rows(*[(0, 1, 0)] * (statistics.LEAST_ROWS - 1)))
    (one,) = found.judged([parsed("loss<100")]).requirements
    assert not one.met and one.interval is None and one.value is not None and "too few rows" in one.reason


@pytest.mark.parametrize(
    ("high", "interval", "is_met"),
    [(0.049, True, True), (0.05, True, False), (0.051, True, False), (0.04, False, False)],
)
def test_high_end_of_the_forgetting_interval_decides(high: float, interval: bool, is_met: bool) -> None:
    losses = RowLosses.of([1.0] * 9, [1.0] * 9)
    difference = Difference(0.03, Interval(0.01, high) if interval else None)
    forgotten = replace(LossComparison.of(losses, losses, "unrelated"), difference=difference)
    found = replace(comparison.compare_rows(rows(*[(0, 1, 0)] * 9)), forgetting=forgotten)
    assert verdict(found, "forgetting<0.05") is is_met
    assert found.forgetting is not None and ("too few rows" in wording.forgetting(found.forgetting)) is not interval


def test_base_with_a_non_finite_loss_cannot_be_beaten() -> None:
    found = comparison.compare_rows(rows(*[(0, 1, 0)] * 9, nats=(math.nan, 1.0, 2.0)))
    assert not verdict(found, "loss<base")
    assert verdict(found, "loss<2")
    (one,) = found.judged([parsed("loss<base")]).requirements
    assert json.loads(json.dumps(one.to_dict(), allow_nan=False))["value"] is None


def test_every_failed_requirement_is_reported() -> None:
    found = comparison.compare_rows(rows(*[(0, 1, 0)] * 9))
    texts = ["loss<0.5", "loss<base", "exact_match>=0.9"]
    judged = found.judged(requirements.parse_requirements(texts))
    assert [one.met for one in judged.requirements] == [False, True, False]
    with pytest.raises(RequirementError) as caught:
        requirements.check_met(judged.requirements)
    assert meanings(caught.value) == [(Code.EVALUATE_REQUIREMENT, "", "require")] * 2
    requirements.check_met(judged.requirements[1:2])
    with pytest.raises(RequirementError) as caught:
        found.require(*texts)
    assert len(meanings(caught.value)) == 2
    found.require("loss<base")
    with pytest.raises(ConfigError):
        found.require("forgetting<1")
    assert found.metrics[ADAPTER]["loss"] == found.to_dict()[ADAPTER]["loss"]


def test_equal_scores_on_few_rows_are_weak_evidence() -> None:
    """A ROUGE-L of 1 on each of five rows does not show that it is 1 in general."""
    scores = {"exact_match": 1.0, "label_accuracy": 1.0, "rouge_l": 1.0}
    found = comparison.compare_rows([replace(row, answers={
        name: replace(answer, scores=scores) for name, answer in row.answers.items()
    }) for row in rows(*[(1, 1, 1)] * 5)])  # fmt: skip
    asked = ["rouge_l"]
    for text, is_met in (("rouge_l>=1", False), ("rouge_l>=base", False), ("rouge_l>=0.56", True)):
        (one,) = found.judged(requirements.parse_requirements([text], asked)).requirements
        assert one.met is is_met, text


def task_results() -> TaskResults:
    """`t.acc`: 60 rows, of which the base gets 20 right and the adapter 50; `t.f1`: only the metric without rows."""
    acc = {BASE: [1] * 20 + [0] * 40, ADAPTER: [1] * 50 + [0] * 10}
    values = {BASE: 1 / 3, ADAPTER: 5 / 6}
    figures = {
        "acc": tasks.compare_metric(values, {}, acc, "mean", True),
        "f1": tasks.compare_metric(values, {}, acc, "f1", True),
    }
    return TaskResults({"t": figures}, None, False, "0")


@pytest.mark.parametrize(
    ("text", "is_met"),
    [
        ("t.acc>=0.7", True), ("t.acc>=0.75", False), ("t.acc>base", True), ("t.acc<base", False),
        ("difference.t.acc>0.3", True), ("difference.t.acc>0.45", False), ("t.f1>0.1", False), ("t.nothing>0", False),
    ],
)  # fmt: skip
def test_requirements_on_task_metrics(text: str, is_met: bool) -> None:
    """With and without rows, the conservative end decides. The error for an unknown metric lists the known ones."""
    required = requirements.parse_requirements([text], tasks=True, rows=False)
    (alone,) = task_results().judged(required).requirements
    found = replace(comparison.compare_rows(rows(*[(0, 1, 1)] * 9)), tasks=task_results())
    assert found.judged(required).requirements == [alone]
    assert alone.met is is_met, alone.reason
    assert ("t.acc, t.f1" in alone.reason) is ("nothing" in text)


@pytest.mark.parametrize(
    ("text", "options", "code"),
    [
        ("t.acc>0.5", {}, Code.USAGE_CONFLICT),
        ("t.acc>against", {"tasks": True, "against": True}, Code.USAGE_BAD_VALUE),
        ("difference.t.acc>base", {"tasks": True}, Code.USAGE_BAD_VALUE),
        ("t.acc>nan", {"tasks": True}, Code.USAGE_BAD_VALUE),
        ("loss<base", {"tasks": True, "rows": False}, Code.USAGE_CONFLICT),
    ],
)
def test_invalid_task_requirements_are_refused(text: str, options: dict[str, bool], code: Code) -> None:
    with pytest.raises(ConfigError) as caught:
        requirements.parse_requirements([text], **options)
    assert meanings(caught.value) == [(code, "", "require")]


# The command


WORDS = ["one", "two", "three", "four", "five", "six"]
TRAIN = [{"prompt": f"{word}:", "completion": word} for word in WORDS]
HELD_OUT = [{"prompt": f"{a} {b}:", "completion": b} for a in WORDS for b in WORDS]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, cli: Callable[..., Ran]) -> Path:
    """A folder with an adapter, unseen rows, and rows of which three are also in train."""
    folder = tmp_path_factory.mktemp("gate")
    train = write_rows(folder / "train.jsonl", TRAIN)
    write_rows(folder / "seen.jsonl", [*HELD_OUT, *TRAIN[:2], {"prompt": " three: ", "completion": "three"}])
    write_rows(folder / "new.jsonl", HELD_OUT)
    path = config_in(folder, tiny_dir)(data={"train": str(train)}, training={"max_steps": 20})
    ran = cli("train", path)
    assert ran.code == 0, ran.err
    return folder


def evaluate(place: Path, rows: str, *arguments: str) -> list[str]:
    return ["evaluate", "--adapter", str(place / "out"), "--data", str(place / rows), *arguments]


def test_met_requirements_exit_with_0(place: Path, cli: Callable[..., Ran]) -> None:
    ran = cli(*evaluate(place, "new.jsonl", "--require", "loss<base", "--require", "loss<9", "--json"))
    assert (ran.code, ran.err) == (0, "")
    values = json.loads(ran.out)
    assert values["overlap"] == {"exact": 0, "folded": 0, "rows": 36}
    first, second = values["requirements"]
    assert first == {"text": "loss<base", "met": True, **values["difference"]["loss"]}
    assert (second["met"], second["value"]) == (True, values["adapter"]["loss"])
    assert [second["low"], second["high"]] == values["adapter"]["intervals"]["loss"]


@pytest.mark.parametrize("as_json", [True, False])
def test_failed_requirements_exit_with_11(place: Path, cli: Callable[..., Ran], as_json: bool) -> None:
    """After all results have been printed."""
    required = ("--require", "exact_match>=0.9", "--require", "loss<base", "--require", "loss<0.01")
    plain = cli(*evaluate(place, "new.jsonl", *["--json"] * as_json))
    ran = cli(*evaluate(place, "new.jsonl", *required, *["--json"] * as_json))
    check_refused(ran, 11, *[(Code.EVALUATE_REQUIREMENT, "", "--require")] * 2)
    assert "`exact_match>=0.9`" in ran.errors[0] and "95 % interval" in ran.errors[0] and "`loss<0.01`" in ran.errors[1]
    if as_json:
        values = json.loads(ran.out)
        assert [one["met"] for one in values.pop("requirements")] == [False, True, False]
        assert values == json.loads(plain.out)
    else:
        lines = [line.split(maxsplit=1) for line in ran.out.splitlines()]
        assert lines[:-3] == [*(line.split(maxsplit=1) for line in plain.out.splitlines()), ["result"]]
        ends = ["exact_match>=0.9: not met", "loss<base: met", "loss<0.01: not met"]
        assert lines[-3:] == [["required", text] for text in ends]


def test_unknown_metric_lists_the_available_ones(place: Path, cli: Callable[..., Ran]) -> None:
    ran = cli(*evaluate(place, "new.jsonl", "--require", "reward_accuracy>=0.9"))
    check_refused(ran, 2, (Code.USAGE_BAD_VALUE, str(place / "new.jsonl"), "--require"))
    assert "`reward_accuracy>=0.9`" in ran.err and "loss, perplexity, exact_match, label_accuracy, or one" in ran.err


def test_requirements_on_training_rows_are_refused(place: Path, cli: Callable[..., Ran]) -> None:
    path = str(place / "seen.jsonl")
    ran = cli(*evaluate(place, "seen.jsonl", "--require", "loss<base"))
    check_refused(ran, 4, *[(Code.EVALUATE_OVERLAP, path, "--require")] * 2)
    assert ran.out == "" and f"({path}:37, {path}:38)" in ran.errors[0] and f"({path}:39)" in ran.errors[1]
    for arguments in ((), ("--require", "loss<base", "--allow-overlap")):
        ran = cli(*evaluate(place, "seen.jsonl", *arguments, "--json"))
        assert ran.code == 0 and [line.partition(" of the ")[0] for line in ran.err.splitlines()] == ["2", "1"]
        assert json.loads(ran.out)["overlap"] == {"exact": 2, "folded": 1, "rows": 39}


def test_adapter_without_row_hashes_is_evaluated_with_a_note(
    place: Path, cli: Callable[..., Ran], tmp_path: Path
) -> None:
    """Such as adapters of earlier releases and of other tools."""
    shutil.copytree(place / "out", tmp_path / "out")
    for name in ("train_rows.hashes", "loratune.json"):
        (tmp_path / "out" / name).unlink()
    shutil.copy(place / "seen.jsonl", tmp_path)
    lines = []
    for arguments in ((), ("--require", "loss<base")):
        ran = cli(*evaluate(tmp_path, "seen.jsonl", *arguments, "--json"))
        assert ran.code == 0 and json.loads(ran.out)["overlap"] is None
        lines.append([line for line in ran.err.splitlines() if "also in train" in line])
    assert lines[0] == [] and len(lines[1]) == 1 and "not known" in lines[1][0]


def test_unusable_requirements_are_refused_before_loading(place: Path, cli: Callable[..., Ran]) -> None:
    rows = write_rows(place / "text.jsonl", [{"text": word} for word in WORDS])
    command = evaluate(place, "text.jsonl")
    ran = cli(*command, "--require", "los<1", "--require", "loss<against")
    check_refused(ran, 2, (Code.USAGE_BAD_VALUE, "", "--require"), (Code.USAGE_CONFLICT, "", "--require"))
    check_refused(cli(*command, "--allow-overlap"), 2, (Code.USAGE_CONFLICT, "", "--allow-overlap"))
    (ran,), heavy = imported([*command, "--require", "label>0.5"])  # reads the rows, unlike the other cases
    check_refused(ran, 4, (Code.DATA_FIELD, str(rows), "--require"))
    assert not heavy & {"torch", "peft", "bitsandbytes"}
