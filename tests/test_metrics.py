"""The metrics of `evaluate --metric`, and what is derived from scores: differences, weights of copies, verdicts."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import meanings

from loratune import statistics
from loratune.codes import Code
from loratune.compare import comparison, metrics, tasks
from loratune.compare import text as wording
from loratune.compare.answers import ComparedRow, Judging, ModelAnswer, majority_answers
from loratune.compare.metrics import ADAPTER, BASE, ExpectedTextError
from loratune.compare.tasks import TaskResults
from loratune.errors import ConfigError, NumericError


@pytest.mark.parametrize(
    ("metric", "expected", "answer", "scores"),
    [
        ("contains", " Paris ", "It is Paris.", [1]),
        ("contains", "Paris", "It is paris.", [0]),
        ("json", '{"a": [1, true], "b": null}', ' {"b": null,\n"a": [1.0, true]}', [1, 0]),
        ("json", '{"a": [1, true]}', '{"a": [1, 1]}', [0, 0]),
        ("json", "[1]", "[1", [0, 1]),
        ("json", "[1]", "```json\n[1]\n```", [0, 1]),
        ("json", "[1]", "[NaN]", [0, 1]),
        ("json", "9" * 5000, "9" * 5000, [1, 0]),
        ("json", "1e400", "1e500", [0, 0]),
        ("json", "1", "1e9999999999999999999", [0, 1]),
        ("json", "[1]", "[" * 100_000, [0, 1]),
        ("regex:#### (-?[0-9]+)", "so 2 + 2\n#### 4", "2 and 2 is four: #### 4 or #### 5", [1]),
        ("regex:#### (-?[0-9]+)", "#### 4", "4", [0]),
        ("regex:(yes)|(no)", "surely no", "no, yes", [1]),
        ("regex:[A-D]", "B.", "B or C", [1]),
        ("rouge_l", "the cat sat on the mat", "The cat lay on a mat!", [2 * 4 / 12]),
        ("rouge_l", "größer als Wärme", "Wärme", [2 * 1 / 4]),
        ("rouge_l", "a", "", [0]),
    ],
)
def test_metrics_compute_the_expected_scores(metric: str, expected: str, answer: str, scores: Sequence[float]) -> None:
    (parsed,) = metrics.parse_metrics([metric, metric])
    assert parsed.scores is not None
    found = parsed.scores(expected, answer)
    assert [*found] == [metric, "invalid_json"][: len(scores)]
    assert [*found.values()] == pytest.approx(scores)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("json", "{'a': 1}"), ("regex:[0-9]", "none"), ("regex:[0-9]*", "none"), ("contains", " "), ("rouge_l", "+!"),
    ],
)  # fmt: skip
def test_unusable_expected_text_is_refused(metric: str, expected: str) -> None:
    (parsed,) = metrics.parse_metrics([metric])
    assert parsed.scores is not None
    with pytest.raises(ExpectedTextError):
        parsed.scores(expected, "1")


@pytest.mark.parametrize("value", ["exact", "regex:", "regex:(", "regex:" + "(a|" * 10_000, "label "])
def test_invalid_metrics_are_refused(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        metrics.parse_metrics([value])
    assert meanings(caught.value) == [(Code.USAGE_BAD_VALUE, "", "metrics")]


def test_missing_metric_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        metrics.parse_metrics(["label", "rouge_l"])
    assert meanings(error.value) == [(Code.SYSTEM_MISSING_PACKAGE, "", "metrics")]


def row(number: int, base: Any, adapter: Any, copies: int = 1, tokens: int = 2) -> ComparedRow:
    """A row defined by the results of both models: nats, and whether the answer matches."""
    answers = {
        name: ModelAnswer(nats, "text", {"exact_match": match, "label_accuracy": match, "rouge_l": match / 2})
        for name, (nats, match) in (("base", base), ("adapter", adapter))
    }
    return ComparedRow(number, f"rows.jsonl:{number}", copies, "prompt", "expected", tokens, answers)


WON, LOST, SAME = ((3.0, 0.0), (1.0, 1.0)), ((1.0, 1.0), (2.0, 0.0)), ((2.0, 1.0), (2.0, 1.0))


def rows(*kinds: tuple[int, Any]) -> list[ComparedRow]:
    flat = [kind for count, kind in kinds for _ in range(count)]
    return [row(number, *kind, tokens=2 + number % 3) for number, kind in enumerate(flat)]


@pytest.mark.parametrize(
    ("kinds", "verdict", "match"),
    [
        (((15, WON), (5, SAME)), "better than its base", "better"),
        (((15, LOST), (5, SAME)), "worse", "worse"),
        (((2, WON), (2, LOST), (16, SAME)), "cannot tell", "indistinguishable"),
        (((20, SAME),), "learned nothing", "indistinguishable"),
        (((4, WON),), "cannot tell", "indistinguishable"),
    ],
)
def test_verdicts_follow_the_statistics(kinds: Any, verdict: str, match: str) -> None:
    """Reported numbers match the statistics functions. Fewer than five rows tell nothing."""
    found = comparison.compare_rows(rows(*kinds))
    assert (found.verdict, found.metric, found.differences["exact_match"].verdict) == (verdict, "loss", match)
    won, lost = (sum(count for count, kind in kinds if kind is one) for one in (WON, LOST))
    count = len(found.rows)
    one = found.differences["exact_match"]
    assert one.p == statistics.mcnemar(lost, won) and one.value == (won - lost) / count
    assert one.interval == statistics.share_difference_interval(lost, won, count)
    assert found.scores["base"].intervals["exact_match"] == statistics.wilson(count - won, count)
    assert (
        (found.differences["rouge_l"].interval is None)
        == (len(found.rows) < 5)
        == any("too few" in line for line in found.remarks)
    )
    assert wording.verdict(found) and json.loads(json.dumps(found.to_dict(), allow_nan=False))["verdict"] == verdict
    assert comparison.compare_rows(found.rows, "exact_match").verdict == verdict


def labelled(*labels: tuple[str | None, int]) -> list[ComparedRow]:
    """Rows with the expected answers repeated as given. The base answers none correctly; the adapter always answers
    `a`."""
    found = []
    for label in [label for label, count in labels for _ in range(count)]:
        right = dict.fromkeys(("exact_match", "label_accuracy"), float(label == "a"))
        losses = {"base": 3.0, "adapter": 1 + 0.01 * (len(found) % 3)}
        answers = {
            name: ModelAnswer(nats, "", right if name == "adapter" else dict.fromkeys(right, 0.0))
            for name, nats in losses.items()
        }
        found.append(ComparedRow(len(found), "", 1, label and "prompt", label, 2, answers))
    return found


@pytest.mark.parametrize(
    ("labels", "copies", "text", "share"),
    [
        ([("a", 12), ("b", 8)], 1, "a", 0.6),
        ([("a", 12), ("b", 8)], 9, "b", 16 / 28),  # the last row has 9 copies
        ([("a", 12), ("b", 8), (None, 5)], 1, "a", 0.6),
        ([("a", 8)], 1, "a", 1.0),
        ([("a", 4), ("b", 3)], 1, None, None),
        ([(f"{number}", 4) for number in range(101)], 1, None, None),
        ([(None, 9)], 1, None, None),
    ],
)
def test_majority_answer_and_its_scores(labels: Any, copies: int, text: str | None, share: float | None) -> None:
    found = labelled(*labels)
    found[-1] = replace(found[-1], copies=copies)
    answers = majority_answers(found, Judging(metrics.parse_metrics(["contains"])))
    assert [one.text for one in answers] == ([text if one.expected else None for one in found] if text else [])
    if share is not None:
        for figure in ("exact_match", "label_accuracy", "contains"):
            right = [
                one.copies * answer.scores[figure] for one, answer in zip(found, answers, strict=True) if answer.text
            ]
            assert sum(right) / sum(one.copies for one in found if one.expected) == pytest.approx(share)


def test_majority_answer_counts_for_labels_that_are_its_prefixes() -> None:
    """Label accuracy counts answers that begin with the label; exact match does not."""
    answers = majority_answers(labelled(("ab", 6), ("a", 3), ("", 3)), Judging())
    assert [sum(one.scores[figure] for one in answers) for figure in ("exact_match", "label_accuracy")] == [6, 9]


@pytest.mark.parametrize(
    ("labels", "metric", "is_told"),
    [
        ([("a", 30), ("b", 20)], "loss", True),  # always `a`, like the adapter
        ([("a", 30), ("b", 20)], "exact_match", True),
        ([("a", 20), ("b", 30)], "loss", True),  # and worse than always answering `b`
        ([("a", 50)], "loss", True),
    ],
)
def test_adapter_no_better_than_the_majority_answer_is_reported(labels: Any, metric: str, is_told: bool) -> None:
    """Even though its loss and its matches are better than those of the base."""
    found = labelled(*labels)
    evaluation = comparison.compare_rows(found, metric, baselines={"majority": majority_answers(found, Judging())})
    assert evaluation.verdict == "better than its base"
    constant = max(labels, key=lambda one: one[1])
    told = f'not better than always "{constant[0]}": '
    assert wording.verdict(evaluation).startswith(told) == is_told
    assert wording.verdict(evaluation).endswith(f'; always "{constant[0]}" would get {constant[1]} right') == is_told
    table = wording.scores_table(evaluation)[1]
    assert table[0][3] == "-" and table[1][3].startswith(f"{max(n for _, n in labels) / 0.5:.0f}")
    values = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    assert values["majority"]["exact_match"] == max(count for _, count in labels) / 50
    assert [*values["difference_from_majority"]] == ["exact_match", "label_accuracy"]
    assert not any("majority" in one.answers for one in evaluation.rows)


def test_adapter_better_than_the_majority_answer() -> None:
    found = labelled(("a", 30), ("b", 20))
    all_right = {"exact_match": 1.0, "label_accuracy": 1.0}
    found = [replace(one, answers=one.answers | {"adapter": ModelAnswer(1.0, "", all_right)}) for one in found]
    evaluation = comparison.compare_rows(found, baselines={"majority": majority_answers(found, Judging())})
    assert evaluation.verdict == "beats base and majority"
    assert wording.verdict(evaluation) == (
        'beats its base and always "a": 50 of 50 held-out answers right (95 %: 93 to 100; base 0 %, majority 60 %)'
    )


def test_rows_needed_is_given_for_inconclusive_differences() -> None:
    found = comparison.compare_rows(rows((3, WON), (2, LOST), (45, SAME))).differences
    assert found["exact_match"].rows_needed > 50 and found["loss"].rows_needed is not None
    assert comparison.compare_rows(rows((20, SAME))).differences["loss"].rows_needed is None
    assert comparison.compare_rows(rows((20, WON))).differences["loss"].rows_needed is None


def test_rows_needed_is_the_same_in_text_and_json() -> None:
    """If the difference is exactly 0, both report that no number of rows would help."""
    same, near, won = (comparison.compare_rows(rows(*kinds)).differences["rouge_l"] for kinds in (
        ((20, SAME),), ((3, WON), (2, LOST), (45, SAME)), ((20, WON),),
    ))  # fmt: skip
    assert same.to_dict()["rows_needed"] is None and "do not differ" in wording.outlook(same)
    assert near.to_dict()["rows_needed"] == near.rows_needed and "rows would tell" in wording.outlook(near)
    assert "rows_needed" not in won.to_dict() and wording.outlook(won) == ""


def test_copies_count_for_means_but_not_as_evidence() -> None:
    """200 copies of a row count 200 times in the mean and once in the intervals."""
    few = [row(number, *WON, tokens=2 + number) for number in range(6)]
    once = comparison.compare_rows(few)
    copied = comparison.compare_rows([row(0, *WON, copies=200), *few[1:]])
    score = copied.scores["adapter"]
    assert (score.rows, score.tokens) == (205, 2 * 200 + 3 + 4 + 5 + 6 + 7)
    assert score.metrics["loss"] == pytest.approx(205 / score.tokens)
    one, other = (found.scores["adapter"].intervals["exact_match"] for found in (once, copied))
    assert one and other and other.low < one.low
    assert copied.differences["exact_match"].p == once.differences["exact_match"].p
    assert comparison.compare_rows([row(0, *WON, copies=200)]).differences["loss"].interval is None


def test_no_verdict_if_copies_contradict_the_distinct_rows() -> None:
    """More rows were won, but p shows that significantly more distinct rows were lost."""
    won = [row(number, *WON, copies=10) for number in range(10)]
    found = comparison.compare_rows([*won, *(row(number, *LOST) for number in range(10, 40))]).differences[
        "exact_match"
    ]
    assert found.p is not None and found.p < 0.01 and found.value > 0.5 and found.interval and found.interval.low > 0
    assert found.verdict == "indistinguishable"


def test_metrics_lie_within_their_intervals() -> None:
    """Also if all rows differ, or if all are the same up to rounding."""
    for copies in ((30, 5, 1), (5, 1, 30, 1, 7)):
        lost = copies[0]
        kinds = [row(number, *(LOST if one == lost else WON), copies=one) for number, one in enumerate(copies)]
        found = comparison.compare_rows(kinds).differences["exact_match"]
        assert found.interval and found.interval.low <= found.value <= found.interval.high
    same = [row(number, (6.0, 0.0), (5.999, 0.0), copies=3**number, tokens=3) for number in range(7)]
    for one in (same, same[::-1]):
        score = comparison.compare_rows(one).scores["adapter"]
        for name in ("loss", "perplexity"):
            interval, value = score.intervals[name], score.metrics[name]
            assert interval and value is not None and interval.low <= value <= interval.high


def test_non_finite_losses() -> None:
    """For the base, they are reported and null in the JSON. For the adapter, they are an error."""
    good = rows((10, WON))
    found = comparison.compare_rows([*good, row(10, (math.inf, 0.0), (1.0, 1.0))])
    assert (found.verdict, found.differences["exact_match"].verdict) == ("better than its base", "better")
    assert any("rows.jsonl:10" in line for line in found.remarks)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["base"]["loss"] is None and values["difference"]["loss"]["value"] is None
    assert wording.verdict(found)
    with pytest.raises(NumericError) as error:
        comparison.compare_rows([*good, row(10, (1.0, 1.0), (math.nan, 0.0))])
    assert meanings(error.value) == [(Code.TRAINING_NOT_FINITE, "", "")]


def test_infinite_perplexity_is_null_in_json() -> None:
    found = comparison.compare_rows([row(number, (5000.0, 0.0), (1.0, 1.0)) for number in range(9)])
    assert found.scores["base"].metrics["perplexity"] == math.inf and found.verdict == "better than its base"
    assert found.to_dict()["base"]["perplexity"] is None
    json.dumps(found.to_dict(), allow_nan=False)


def test_task_metric_differences_and_their_intervals() -> None:
    """A mean's interval is that of the paired differences; a perplexity's is the interval in nats, rescaled."""
    dice = np.random.default_rng(0)
    base = dice.gamma(4, 2, 200)
    adapter = base - dice.gamma(2, 0.01, 200)

    def difference(samples: dict[str, list[Any]], aggregation: str) -> Any:
        found = tasks.compare_metric({BASE: 1.0, ADAPTER: 2.0}, {BASE: 0.1, ADAPTER: None}, samples, aggregation, False)
        return found.difference

    plain = difference({BASE: base.tolist(), ADAPTER: adapter.tolist()}, "mean")
    interval = statistics.mean_ratio_interval(adapter - base, np.ones(200))
    assert interval and plain.interval.to_dict() == pytest.approx(interval.to_dict())
    likelihoods = {BASE: (-base).tolist(), ADAPTER: (-adapter).tolist()}
    found = difference(likelihoods, "perplexity")
    perplexity = math.exp(base.mean())
    assert (found.value, found.verdict) == (pytest.approx(math.exp(adapter.mean()) - perplexity), "better")
    assert found.interval.to_dict() == pytest.approx([perplexity * math.expm1(end) for end in interval.to_dict()])
    counted = {model: [(value, 2) for value in values] for model, values in likelihoods.items()}
    assert difference(counted, "weighted_perplexity").value == pytest.approx(
        math.exp(adapter.mean() / 2) - math.exp(base.mean() / 2)
    )
    huge = {model: [value * 1000 for value in values] for model, values in likelihoods.items()}
    assert difference(huge, "perplexity").interval is None
    assert difference({BASE: ["a", "b"], ADAPTER: ["a", "c"]}, "").verdict is None


def test_unknown_task_metric_is_shown_as_a_dash() -> None:
    nan = [math.nan] * 9
    figure = tasks.compare_metric({"base": math.nan, "adapter": 1.0}, {}, {"base": nan, "adapter": nan}, "mean", True)
    (cells,) = wording.tasks_table(TaskResults({"task": {"figure": figure}}, None, False, "1"))[1]
    assert cells[2] == "-" and cells[3] == "1.0000" and "nan" not in " ".join(cells)
