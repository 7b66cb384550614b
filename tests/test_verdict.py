"""The verdict on an adapter: its table, its words, and the rows that give it."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Ran, write_rows
from running import MakeConfig

from loratune import load_config
from loratune.compare import verdict
from loratune.compare.losses import LossComparison
from loratune.compare.metrics import RowLosses
from loratune.compare.text import shorten_apart
from loratune.compare.verdict import Answers, Name
from loratune.statistics import Interval, widened
from loratune.training import comparisons


def gain_of(differences: Any, **others: Any) -> LossComparison:
    """Losses of rows of one token: 2 of the base, and this much more of the adapter."""
    base = RowLosses.of([2.0] * len(differences), [1.0] * len(differences))
    return LossComparison.of(
        base, RowLosses.of([2.0 + one for one in differences], [1.0] * len(differences)), "validation", **others
    )


def answers_of(base: int, adapter: int, rows: int, majority: int | None = None, looks: int = 1) -> Answers:
    """So many right answers of each; the first rows are those that are right."""

    def right(count: int) -> Any:
        return (np.arange(rows) < count).astype(float)

    constant = None if majority is None else ("shipping", right(majority))
    return Answers.of(right(base), right(adapter), np.ones(rows), constant, looks)


CLEAR, NONE, SMALL, WORSE = [-1.0, -1.1] * 20, [0.3, -0.3] * 20, [-0.004, -0.006] * 20, [1.0, 1.1] * 20
TABLE: dict[str, tuple[LossComparison, Answers | None, Name]] = {
    "labels, all right": (gain_of(CLEAR), answers_of(0, 40, 40, 14), "beats base and majority"),
    "labels, the majority": (gain_of(CLEAR), answers_of(0, 16, 40, 14), "better than its base"),
    "labels, none right": (gain_of(CLEAR), answers_of(0, 0, 40, 14), "better than its base"),
    "fewer right than the base": (gain_of(CLEAR), answers_of(20, 4, 40, 14), "worse"),
    "short texts": (gain_of(CLEAR), answers_of(0, 20, 40), "better than its base"),
    "texts": (gain_of(CLEAR), None, "better than its base"),
    "up and down": (gain_of(NONE), None, "cannot tell"),
    "up and down, a few more right": (gain_of(NONE), answers_of(10, 13, 40, 10), "cannot tell"),
    "more right in spite of the loss": (gain_of(WORSE), answers_of(10, 30, 40), "better than its base"),
    "too small a gain": (gain_of(SMALL), None, "learned nothing"),
    "too small a gain, but more right": (gain_of(SMALL), answers_of(0, 20, 40), "better than its base"),
    "no difference": (gain_of([0.0] * 40), None, "learned nothing"),
    "worse": (gain_of(WORSE), None, "worse"),
    "four rows": (gain_of([-1.0] * 4), None, "cannot tell"),
    "not finite": (gain_of([-1.0, math.nan] * 5), None, "worse"),
}


@pytest.mark.parametrize("case", TABLE)
def test_the_table(case: str) -> None:
    gain, answers, name = TABLE[case]
    assert verdict.decide_verdict(gain, answers) == name
    assert verdict.decide_verdict(gain, answers, collapsed=True) == "collapsed"
    assert len(verdict.headline(name, gain, answers)) < 220


def test_rows_that_chose_among_many_need_more_evidence() -> None:
    """A difference that is significant once is not, if it is the best of twenty."""
    just = gain_of([-0.7, 0.34] * 20)
    assert just.gain_interval is not None and 0 < just.gain_interval.low < 0.02
    assert verdict.decide_verdict(just) == "better than its base"
    assert verdict.decide_verdict(just, looks=20) == "cannot tell"
    few = [answers_of(0, 6, 40, 0, looks) for looks in (1, 2)]  # p is 0.031
    assert verdict.decide_verdict(gain_of(NONE), few[0]) == "beats base and majority"
    assert verdict.decide_verdict(gain_of(NONE), few[1], looks=2) == "cannot tell"


def test_the_words_need_the_evidence_that_the_verdict_needs() -> None:
    """Seven more right answers than always the same one: significant once, not for the best of four."""
    words = [verdict.headline("better than its base", gain_of(CLEAR), answers_of(0, 12, 22, 5, n)) for n in (1, 4)]
    assert words[0].startswith("better than its base: 12 of 22")
    assert words[1].startswith('too few rows to tell whether it beats always "shipping": 12 of 22')
    assert verdict.outcome("better than its base", answers_of(0, 12, 22, 5, 4), unseen=True) == "open"
    assert verdict.outcome("better than its base", answers_of(0, 4, 22, 5), unseen=True) == "bad"
    assert verdict.outcome("better than its base", None, unseen=False) == "open"
    assert verdict.outcome("better than its base", None, unseen=True) == "good"


def test_the_reach_of_an_interval_grows_as_the_quantile_does() -> None:
    wide = widened(Interval(1.0, 4.0), 2.0, 5)
    assert (wide.low, wide.high) == pytest.approx((2 - 2.5758 / 1.95996, 2 + 2 * 2.5758 / 1.95996), abs=1e-4)
    assert widened(Interval(1.0, 4.0), 2.0, 1) == Interval(pytest.approx(1.0), pytest.approx(4.0))


WORDS: dict[str, str] = {
    "labels, all right": 'beats its base and always "shipping": 40 of 40 held-out answers right (95 %: 91 to 100; base '
    "0 %, majority 35 %)",
    "labels, the majority": 'too few rows to tell whether it beats always "shipping": 16 of 40 held-out answers right '
    '(95 %: 26 to 55; base 0 %, majority 35 %); always "shipping" would get 14 right',
    "labels, none right": 'not better than always "shipping": 0 of 40 held-out answers right (95 %: 0 to 9; base '
    '0 %, majority 35 %); always "shipping" would get 14 right',
    "texts": "better than its base: each expected token became 2.9 times as likely, on 40 held-out rows",
    "too small a gain": "learned nothing: each expected token became 1.01 times as likely, on 40 held-out rows",
    "worse": "worse than its base: each expected token became 2.9 times as unlikely, on 40 held-out rows",
    "four rows": "cannot tell whether it is better than its base: each expected token became 2.7 times as likely, on 4 "
    "held-out rows; too few rows for more",
}


@pytest.mark.parametrize("case", WORDS)
def test_the_words(case: str) -> None:
    gain, answers, name = TABLE[case]
    assert verdict.headline(name, gain, answers) == WORDS[case]


def test_how_many_rows_would_tell() -> None:
    """Rounded up to two digits: 80 % power for a difference of 0.1 with a deviation of 0.4 between rows."""
    gain = gain_of([0.3, -0.5] * 20)
    assert gain.difference.rows_needed is not None and 120 < gain.difference.rows_needed <= 130
    assert verdict.headline("cannot tell", gain).endswith("; about 130 held-out rows would tell")


@dataclass
class Rows:
    """So many rows, none of which is a copy or was split."""

    items: int
    owners = None

    @property
    def rows(self) -> "Rows":
        return self

    def copies(self) -> dict[int, list[int]]:
        return {number: [number] for number in range(self.items)}


def test_labels_are_judged_by_their_answers(cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path) -> None:
    """Half of the validation rows choose the step. The others judge: with the shares that `evaluate` finds on them."""
    label = ("yes", "no!")
    rows = [{"prompt": f"{number} {number % 2}:", "completion": label[number % 2]} for number in range(160)]
    train, held_out = write_rows(tmp_path / "train.jsonl", rows[:80]), write_rows(tmp_path / "held.jsonl", rows[80:])
    training = {"learning_rate": 0.03, "max_steps": 150, "eval_steps": 50}
    config = run_config(data={"train": str(train), "validation": str(held_out)}, training=training)
    ran = cli("train", config, "--json", "--allow-worse")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    answers, choose = found["answers"], "half of the rows choose the step that is kept"
    assert choose in ran.err and (answers["rows"], found["gain"]["total"]) == (40, 40)
    assert found["held_out_loss"] == found["gain"]["adapter"] and answers["majority"] in label
    chosen = comparisons.choosing(Rows(80), load_config(config))  # type: ignore[arg-type]
    judging = [row for number, row in enumerate(rows[80:]) if number not in chosen]
    judges = write_rows(tmp_path / "judges.jsonl", judging)
    scored = json.loads(cli("evaluate", "--adapter", tmp_path / "out", "--data", judges, "--json").out)
    assert scored["verdict"] == found["verdict"]
    assert scored["adapter"]["loss"] == pytest.approx(found["gain"]["adapter"], abs=1e-5)
    for model, share in (("base", answers["of_base"]), ("adapter", answers["right"])):
        assert scored[model]["exact_match"] == share
    assert answers["right"] > 0.4, answers
    assert (found["judged_apart"], found["looks"]) == (True, 1)


@pytest.mark.parametrize("held_out", [39, 40])
def test_rows_that_end_the_run_do_not_judge_it_alone(
    cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path, held_out: int
) -> None:
    """With `keep: last`, too: half of 40 rows stop the run, and the others judge; fewer do both, which is said."""
    rows = [
        {"prompt": f"{number} and", "completion": f" {number} words that are more than a label" * 9}
        for number in range(60)
    ]
    data = {
        "train": str(write_rows(tmp_path / "train.jsonl", rows[:20])),
        "validation": str(write_rows(tmp_path / "held.jsonl", rows[20 : 20 + held_out])),
    }
    training = {"max_steps": 4, "eval_steps": 1, "keep": "last", "patience": 3}
    ran = cli("train", run_config(data=data, training=training), "--json", "--allow-worse")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert (found["judged_apart"], found["looks"]) == ((True, 1) if held_out == 40 else (False, 4))


def test_a_sample_shows_where_the_answer_differs() -> None:
    start, end = "Thanks for writing to Brightbox. " * 3, " Kind regards, the whole Brightbox team in Leeds"
    shown = shorten_apart(f"{start}Your ink is on its way.{end}", f"{start}Your refund is on its way.{end}", 60)
    assert "ink" in shown[0] and "refund" in shown[1] and all(line.startswith("[...] ") for line in shown)
    assert shorten_apart("yes", "no", 60) == ("yes", "no")
    assert shorten_apart("", "a " * 50, 10) == ("", "a a a a a  [...]")
