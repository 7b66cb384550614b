"""The verdict on an adapter, by one table for `train` and `evaluate`, and its words.

Where answers are labels, or short, the share of right ones decides, else the loss. Each comparison is paired, row by
row, at 95 %:

| verdict | when |
|---|---|
| beats base and majority | more right answers than the base, and than always giving the most frequent one |
| better than its base | more right answers, or less loss; the most frequent answer is not beaten, or there is none |
| cannot tell | neither, and a gain that matters is possible |
| learned nothing | the weights are as before, or the whole interval of the gain is below `WORTH` |
| worse | fewer right answers, or more loss without more right answers |
| collapsed | the predictions no longer depend on the prompt, see `collapse` |

`scripts/verdicts.py` simulates how often the first two are wrong.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar, get_args

from loratune.compare import metrics
from loratune.compare.losses import LossComparison, item
from loratune.compare.metrics import Difference, Values, share_difference
from loratune.data.holding_out import MAX_LABELS
from loratune.statistics import Interval, effective_rows, finite, widened, wilson
from loratune.text import plural

Label = TypeVar("Label")
Constant = tuple[str, Values]
"""An answer, and for each row 1 if it is right, else 0; (rows,)."""
Name = Literal[
    "beats base and majority", "better than its base", "cannot tell", "learned nothing", "worse", "collapsed"
]
NAMES: tuple[Name, ...] = get_args(Name)
GOOD: tuple[Name, ...] = ("beats base and majority", "better than its base")
REFUSED: tuple[Name, ...] = ("learned nothing", "worse", "collapsed")
"""Verdicts with which no adapter is published, unless that is asked for."""
WORTH = 0.01
"""Nats per token below which a gain does not matter: a token becomes 1 % more likely."""
_VISIBLE = 5e-4
"""The same for pairs and answers of preferences, whose loss has the scale of `preferences.beta`."""
SHORT = 32
"""The most tokens of an answer, without its end, that is compared as a whole: longer ones are hardly ever equal."""
_ROWS_PER_LABEL = 4
"""Expected answers count as labels if each occurs in this many rows on average, and there are at most `MAX_LABELS`."""
_FEW = 100
"""With fewer rows, a share of right answers is known to within 10 points at best."""
SLIGHTLY, _CLEARLY = 0.1, 0.5
"""Nats per token from which on a higher loss on other text is clear, and much: perplexities 10 % and 65 % higher.
With the default settings SmolLM2-135M loses 0.05 to 0.15 (scripts/learning/README.md)."""


@dataclass(frozen=True)
class Answers:
    """How many answers are right, of base and adapter on the same rows.

    Attributes:
        rows: The number of rows, with copies.
        right: The share of the adapter's right answers, or another metric by which answers are judged.
        interval: Its 95 % interval.
        of_base: The same share of the base.
        over_base: The paired difference, adapter minus base.
        majority: The most frequent answer of the training rows; None if answers are not labels.
        of_majority: The share of rows for which it is right.
        over_majority: The paired difference, adapter minus always giving it.
        metric: What makes an answer right.
        looks: How many adapters these rows have chosen from; 1 if they chose nothing.
        of_prompted: The share of right answers of the base with a prompt that tells it the task, if it was asked.
    """

    rows: int
    right: float
    interval: Interval | None
    of_base: float
    over_base: Difference
    majority: str | None = None
    of_majority: float | None = None
    over_majority: Difference | None = None
    metric: str = metrics.EXACT_MATCH
    looks: int = 1
    of_prompted: float | None = None

    @classmethod
    def of(
        cls, base: Values, adapter: Values, copies: Values, constant: Constant | None = None, looks: int = 1
    ) -> "Answers":
        """Create it from scores of 0 or 1, (rows,) each. constant: the most frequent answer and its scores."""

        def share(scores: Values) -> float:
            return float((copies * scores).sum() / copies.sum())

        def over(other: Values) -> Difference:
            return share_difference(other, adapter, copies, lower_is_better=False)

        count, right = effective_rows(copies), share(adapter)
        interval = wilson(right * count, count)
        found = cls(round(copies.sum()), right, interval, share(base), over(base), looks=looks)
        if constant is None:
            return found
        label, scores = constant
        return replace(found, majority=label, of_majority=share(scores), over_majority=over(scores))

    def to_dict(self) -> dict[str, Any]:
        """Plain values: shares from 0 to 1."""
        left_out = ("over_base", "over_majority", "looks", "of_prompted")
        values = {name: value for name, value in asdict(self).items() if name not in left_out}
        values["interval"] = finite(self.interval)
        values["over_base"] = self.over_base.to_dict()
        return values | {"over_majority": self.over_majority and self.over_majority.to_dict()}

    @property
    def beats_base(self) -> bool:
        """Whether more answers are right than of the base."""
        return _better(self.over_base, self.looks)

    @property
    def beats_majority(self) -> bool | None:
        """Whether more answers are right than by always giving the most frequent one; None if they are no labels."""
        return None if self.over_majority is None else _better(self.over_majority, self.looks)


def label_of(answers: Counter[Label]) -> Label | None:
    """The most frequent of some expected answers; None if they are not labels. answers: answer → its rows."""
    if not 1 <= len(answers) <= MAX_LABELS or answers.total() < _ROWS_PER_LABEL * len(answers):
        return None
    return answers.most_common(1)[0][0]


def decide_verdict(
    losses: LossComparison, answers: Answers | None = None, *, collapsed: bool = False, looks: int = 1
) -> Name:
    """The verdict by the table of this module.

    Args:
        losses: The paired losses.
        answers: The paired answers, where there are short ones.
        collapsed: Whether the adapter has collapsed.
        looks: How many adapters these rows have chosen from; 1 if they chose nothing. What is found better must hold
            for the best of that many adapters, by Bonferroni's correction; `answers` have their own number.
    """
    if collapsed:
        return "collapsed"
    if answers is not None and answers.over_base.verdict == "worse":
        return "worse"
    if answers is not None and answers.beats_base:
        return "beats base and majority" if answers.beats_majority else "better than its base"
    if losses.verdict == "worse":
        return "worse"
    interval = losses.gain_interval
    if interval is not None and interval.high < (WORTH if losses.unit == "token" else _VISIBLE):
        return "learned nothing"
    if losses.verdict != "gain" or interval is None:
        return "cannot tell"
    return "better than its base" if widened(interval, losses.better_by, looks).low > 0 else "cannot tell"


def _better(difference: Difference, looks: int) -> bool:
    if difference.verdict != "better" or difference.interval is None:
        return False
    low = widened(difference.interval, difference.value, looks).low
    return low > 0 and looks * (difference.p or 0.0) < metrics.SIGNIFICANT


Outcome = Literal["good", "bad", "open", ""]
"""Whether an adapter is what it should be; `open` if that is not known, empty if it was not judged."""


def outcome(verdict: str | None, answers: Answers | None, *, unseen: bool) -> Outcome:
    """What a verdict, on the base or on another adapter, means to the user. unseen: whether rows judge that the adapter
    was not trained on."""
    if verdict in (None, "cannot tell", "indistinguishable"):
        return "open"
    if verdict not in (*GOOD, "better"):
        return "bad"
    if answers is not None and answers.beats_majority is False and answers.right <= (answers.of_majority or 0):
        return "bad"
    none_is_right = answers is not None and answers.majority is None and not answers.right
    beaten = answers is None or answers.beats_majority is not False
    return "good" if beaten and unseen and not none_is_right else "open"


# Words


def headline(name: Name, losses: LossComparison, answers: Answers | None = None) -> str:
    """The verdict as a sentence for people who do not know the field."""
    if not math.isfinite(losses.better_by):
        return f"{name}: not all losses on {losses.sampled_rows()} are finite"
    by_loss = f"{_loss_in_words(losses)}, on {_rows(losses)}"
    other = "its base" if losses.other == "base" else "the adapter that it started from"
    if answers is None or (name == "worse" and answers.over_base.verdict != "worse"):
        found = by_loss
    elif name == "better than its base" and not answers.beats_base and answers.beats_majority is not False:
        found = f"{by_loss}, but {_answers_in_words(answers, losses)}"
    else:
        found = _answers_in_words(answers, losses)
    match name:
        case "beats base and majority":
            return f"beats its base and always {_quoted(answers)}: {found}"
        case "better than its base":
            if answers is None or answers.of_majority is None or answers.beats_majority is not False:
                return f"better than {other}: {found}"
            is_open = answers.right > answers.of_majority
            start = "too few rows to tell whether it beats" if is_open else "not better than"
            by_guess = f"always {_quoted(answers)} would get {answers.of_majority * answers.rows:,.0f} right"
            return f"{start} always {_quoted(answers)}: {found}; {by_guess}"
        case "cannot tell":
            return f"cannot tell whether it is better than {other}: {found}{_more_rows(losses, answers)}"
        case "learned nothing":
            is_small = losses.gain_interval is not None and losses.gain_interval.high < WORTH
            return f"learned nothing: {by_loss if is_small else 'the weights are as before'}"
        case "worse":
            return f"worse than {other}: {found}"
    return name


def _answers_in_words(answers: Answers, losses: LossComparison) -> str:
    """`30 of 30 held-out answers right (95 %: 89 to 100; base 0 %, majority 35 %)`."""
    count, ends = round(answers.right * answers.rows), ""
    if (interval := answers.interval) is not None:
        ends = f"95 %: {100 * interval.low:.0f} to {100 * interval.high:.0f}; "
    others = f"base {100 * answers.of_base:.0f} %"
    others += "" if answers.of_majority is None else f", majority {100 * answers.of_majority:.0f} %"
    others += "" if answers.of_prompted is None else f", prompted base {100 * answers.of_prompted:.0f} %"
    if answers.metric in metrics.MEANS:
        return f"{answers.metric} {100 * answers.right:.0f} % on {_rows(losses)} ({ends}{others})"
    by = "" if answers.metric == metrics.EXACT_MATCH else f" by {answers.metric}"
    return f"{count:,} of {answers.rows:,} {_kind(losses)} answers right{by} ({ends}{others})"


def _loss_in_words(losses: LossComparison) -> str:
    """A difference of losses in words: `each expected token became 1.7 times as likely`."""
    if losses.unit != "token":
        return f"the loss per {losses.unit} went from {losses.base:.3f} to {losses.adapter:.3f}"
    times = math.exp(min(abs(losses.better_by), 700.0))
    text = f"{times:.2f}" if times < 1.1 else f"{times:.1f}" if times < 10 else f"{times:,.0f}"
    how = "likely" if losses.better_by >= 0 else "unlikely"
    return f"each expected token became {text if times < 1e6 else 'over a million'} times as {how}"


def _more_rows(losses: LossComparison, answers: Answers | None) -> str:
    """How many rows would tell, as the end of a sentence; empty if that is unknown."""
    if losses.difference.interval is None:
        return "; too few rows for more"
    rows = (losses.difference if answers is None else answers.over_base).rows_needed
    if rows is None:
        return ""
    return f"; {about(rows)} held-out {item(losses.unit)}s would tell"


def about(rows: int) -> str:
    """`about 130`: an estimate, rounded up to two significant digits."""
    step: int = 10 ** max(0, len(str(rows)) - 2)
    return f"about {math.ceil(rows / step) * step:,}"


def change(losses: LossComparison) -> str:
    """A higher loss on other text in words; one scale for all commands."""
    nats = losses.difference.value
    if not losses.is_higher:
        return "as before" if nats < SLIGHTLY else "perhaps worse"
    return "slightly worse" if nats < SLIGHTLY else "clearly worse" if nats < _CLEARLY else "much worse"


def doubt(losses: LossComparison, *, chose: bool, leaked: bool = False) -> str:
    """What speaks against relying on a verdict; empty if nothing does. chose: whether its rows chose the step. leaked:
    whether some of them are also training rows."""
    if losses.split == "training":
        few = "hold some out, as by data.validation=0.2"
        if losses.validation_rows is not None:
            few = f"the held-out {item(losses.unit)}s are too few that differ ({losses.validation_rows}); collect more"
        return f"only by rows that it was trained on, which says little: {few}"
    if leaked:
        return "no: held-out rows are also training rows, see above"
    if losses.rows < _FEW or chose:
        also = ", which also chose the step, so optimistic" if chose else ""
        return f"only {plural(losses.rows, item(losses.unit))}{also}; test on unseen ones (below)"
    return ""


def _rows(losses: LossComparison) -> str:
    found = plural(losses.total, f"{_kind(losses)} {item(losses.unit)}")
    distinct = f", {losses.rows:,} of them distinct" if losses.rows < losses.drawn else ""
    return f"{'' if losses.drawn == losses.total else f'{losses.drawn:,} of '}{found}{distinct}"


def _kind(losses: LossComparison) -> str:
    return "training" if losses.split == "training" else "held-out"


def _quoted(answers: Answers | None) -> str:
    text = " ".join((answers.majority or "" if answers is not None else "").split())
    return f'"{text if len(text) <= 24 else text[:21] + "..."}"'
