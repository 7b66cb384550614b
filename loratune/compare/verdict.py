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
from loratune.compare.gain import Gain, item
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
"""Rows with fewer of which a share of right answers is known to within 10 points at best."""
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
        left_out = ("over_base", "over_majority", "looks")
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


def decide(gain: Gain, answers: Answers | None = None, *, collapsed: bool = False, looks: int = 1) -> Name:
    """The verdict by the table of this module.

    Args:
        gain: The paired losses.
        answers: The paired answers, where there are short ones.
        collapsed: Whether the adapter has collapsed.
        looks: How many adapters these rows have chosen from; 1 if they chose nothing. What is found better must hold
            for the chosen one of so many, by Bonferroni's correction; answers know theirs.
    """
    if collapsed:
        return "collapsed"
    if answers is not None and answers.over_base.verdict == "worse":
        return "worse"
    if answers is not None and answers.beats_base:
        return "beats base and majority" if answers.beats_majority else "better than its base"
    if gain.verdict == "worse":
        return "worse"
    if gain.high is not None and gain.high < (WORTH if gain.unit == "token" else _VISIBLE):
        return "learned nothing"
    low = None if gain.low is None else widened(Interval(gain.low, math.inf), gain.better_by, looks).low
    return "better than its base" if gain.verdict == "gain" and low is not None and low > 0 else "cannot tell"


def _better(difference: Difference, looks: int) -> bool:
    if difference.verdict != "better" or difference.interval is None:
        return False
    low = widened(difference.interval, difference.value, looks).low
    return low > 0 and looks * (difference.p or 0.0) < metrics.SIGNIFICANT


# Words


def headline(name: Name, gain: Gain, answers: Answers | None = None) -> str:
    """The verdict as a sentence for people who do not know the field."""
    if not math.isfinite(gain.better_by):
        return f"{name}: not all losses on {gain.sampled_rows()} are finite"
    by_loss = f"{likelier(gain)}, on {_rows(gain)}"
    other = "its base" if gain.other == "base" else "the adapter that it started from"
    if answers is None or (name == "worse" and answers.over_base.verdict != "worse"):
        found = by_loss
    elif name == "better than its base" and not answers.beats_base and answers.beats_majority is not False:
        found = f"{by_loss}, but {right(answers, gain)}"
    else:
        found = right(answers, gain)
    match name:
        case "beats base and majority":
            return f"beats its base and always {_quoted(answers)}: {found}"
        case "better than its base":
            if answers is not None and answers.beats_majority is False and answers.of_majority is not None:
                by_guess = round(answers.of_majority * answers.rows)
                found += f", {by_guess:,} would be by guessing so"
                found += "; too few rows to tell" if answers.right > answers.of_majority else ""
                return f"not better than always {_quoted(answers)}: {found}"
            return f"better than {other}: {found}"
        case "cannot tell":
            return f"cannot tell whether it is better than {other}: {found}{needed(gain, answers)}"
        case "learned nothing":
            is_small = gain.high is not None and gain.high < WORTH
            return f"learned nothing: {by_loss if is_small else 'the weights are as before'}"
        case "worse":
            return f"worse than {other}: {found}"
    return name


def right(answers: Answers, gain: Gain) -> str:
    """`30 of 30 held-out answers right (95 %: 89 to 100; base 0 %, majority 35 %)`."""
    count, ends = round(answers.right * answers.rows), ""
    if (interval := answers.interval) is not None:
        ends = f"95 %: {100 * interval.low:.0f} to {100 * interval.high:.0f}; "
    others = f"base {100 * answers.of_base:.0f} %"
    others += "" if answers.of_majority is None else f", majority {100 * answers.of_majority:.0f} %"
    if answers.metric in metrics.MEANS:
        return f"{answers.metric} {100 * answers.right:.0f} % on {_rows(gain)} ({ends}{others})"
    by = "" if answers.metric == metrics.EXACT_MATCH else f" by {answers.metric}"
    return f"{count:,} of {answers.rows:,} {_kind(gain)} answers right{by} ({ends}{others})"


def likelier(gain: Gain) -> str:
    """A difference of losses in words: `each expected token became 1.7 times as likely`."""
    if gain.unit != "token":
        return f"the loss per {gain.unit} went from {gain.base:.3f} to {gain.adapter:.3f}"
    times = math.exp(min(abs(gain.better_by), 700.0))
    text = f"{times:.2f}" if times < 1.1 else f"{times:.1f}" if times < 10 else f"{times:,.0f}"
    how = "likely" if gain.better_by >= 0 else "unlikely"
    return f"each expected token became {text if times < 1e6 else 'over a million'} times as {how}"


def needed(gain: Gain, answers: Answers | None) -> str:
    """How many rows would tell, as the end of a sentence; empty if that is unknown."""
    if gain.low is None:
        return "; too few rows for more"
    rows = answers.over_base.rows_needed if answers is not None else gain.rows_needed
    if rows is None:
        return ""
    step: int = 10 ** max(0, len(str(rows)) - 2)
    return f"; about {math.ceil(rows / step) * step:,} held-out {item(gain.unit)}s would tell"


def change(nats: float, *, significant: bool) -> str:
    """A higher loss on other text in words; one scale for all commands. significant: its interval is above 0."""
    if not significant:
        return "as before" if nats < SLIGHTLY else "perhaps worse"
    return "slightly worse" if nats < SLIGHTLY else "clearly worse" if nats < _CLEARLY else "much worse"


def doubt(gain: Gain, *, chose: bool, leaked: bool = False) -> str:
    """What speaks against relying on a verdict; empty if nothing does. chose: whether its rows chose the step. leaked:
    whether some of them are also training rows."""
    if gain.split == "training":
        few = "hold some out, as by data.validation=0.2"
        if gain.validation_rows is not None:
            few = f"the held-out {item(gain.unit)}s are too few that differ ({gain.validation_rows}); collect more"
        return f"only by rows that it was trained on, which says little: {few}"
    if leaked:
        return "no: held-out rows are also training rows, see above"
    if gain.rows < _FEW or chose:
        also = ", which also chose the step, so optimistic" if chose else ""
        return f"only {plural(gain.rows, item(gain.unit))}{also}; test on unseen ones (below)"
    return ""


def _rows(gain: Gain) -> str:
    found = plural(gain.total, f"{_kind(gain)} {item(gain.unit)}")
    distinct = f", of which {gain.rows:,} differ" if gain.rows < gain.drawn else ""
    return f"{'' if gain.drawn == gain.total else f'{gain.drawn:,} of '}{found}{distinct}"


def _kind(gain: Gain) -> str:
    return "training" if gain.split == "training" else "held-out"


def _quoted(answers: Answers | None) -> str:
    text = " ".join((answers.majority or "" if answers is not None else "").split())
    return f'"{text if len(text) <= 24 else text[:21] + "..."}"'
