"""The loss functions of preference objectives, as functions of the summed log-probabilities of answers.

y is an answer to the prompt x, y_w the chosen one of a pair and y_l the rejected one, |y| the tokens of an answer,
p(y|x) the probability that what is trained gives it, and ref(y|x) that of what it is compared with. Each objective
gives a loss for every pair, or every answer, and its mean over all of an optimizer step is lowered.

- `dpo` (Rafailov et al. 2023, arXiv:2305.18290): -log sigmoid(r(y_w) - r(y_l)), r(y) = beta log(p(y|x) / ref(y|x)).
  With label smoothing e: -(1 - e) log sigmoid(m) - e log sigmoid(-m), the conservative DPO of Mitchell 2023
  (ericmitchell.ai/cdpo.pdf), of the margin m = r(y_w) - r(y_l).
- `simpo` (Meng et al. 2024, arXiv:2405.14734): the same with r(y) = beta log p(y|x) / |y|, and m less simpo_gamma;
  there is no reference.
- `orpo` (Hong et al. 2024, arXiv:2403.07691): -a(y_w) - beta log sigmoid(log odds(y_w) - log odds(y_l)), where a(y) =
  log p(y|x) / |y| and odds = q / (1 - q) of q = exp a(y); there is no reference. The first part is the mean over the
  tokens of each answer; TRL takes the prompt's as well, and the mean over all tokens of a batch.
- `kto` (Ethayarajh et al. 2024, arXiv:2402.01306): desirable_weight (1 - sigmoid(r(y) - z)) of a desirable answer, and
  undesirable_weight (1 - sigmoid(z - r(y))) of an undesirable one, with DPO's r. z is beta times the divergence of p
  from ref, which is estimated as the mean of log(p(y'|x) / ref(y'|x)) over prompts with answers to others, and is at
  least 0; no gradient flows through it.

With `sft_weight`, `dpo` and `simpo` also lower -sft_weight a(y_w), which holds up the probability of chosen answers
(Pang et al. 2024, arXiv:2404.19733).
"""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from loratune.config import DEFAULT_BETA, PREFERENCE_KEYS, PreferenceSection, RunConfig
from loratune.data import TokenizedDataset
from loratune.data.formats import KINDS, PAIRS
from loratune.data.rendering import TokenizedRow

Values = NDArray[np.float64]

WITH_REFERENCE = ("dpo", "kto")
"""The objectives that compare what is trained with a reference."""
_WITHOUT_EFFECT = {
    "beta": None, "label_smoothing": 0, "simpo_gamma": 0, "sft_weight": 0, "desirable_weight": 1,
    "undesirable_weight": 1,
}  # fmt: skip
"""Key of `PreferenceSection` → the value with which an objective is the one without it."""


_PARTNERS_TRIED = 64
"""Rows among which one with another prompt is looked for."""


@dataclass(frozen=True)
class AnswerScores:
    """What a model gives to answers.

    Attributes:
        log_probabilities: (answers,), float64, summed over their tokens.
        tokens: (answers,), how many tokens that is.
        reference: (answers,), float64, log-probabilities of the reference; zeros where the objective has none.
    """

    log_probabilities: Tensor
    tokens: Tensor
    reference: Tensor

    @property
    def per_token(self) -> Tensor:
        """(answers,), the mean log-probability of their tokens; 0 of an answer without any."""
        return self.log_probabilities / self.tokens.clamp(min=1)

    def take(self, which: Tensor) -> "AnswerScores":
        """Some of the answers."""
        return AnswerScores(self.log_probabilities[which], self.tokens[which], self.reference[which])


@dataclass(frozen=True)
class Formula:
    """One of the objectives, with its numbers.

    Attributes:
        name: `dpo`, `orpo`, `simpo` or `kto`.
        beta: As in `PreferenceSection`, but never null.
        label_smoothing: As in `PreferenceSection`.
        simpo_gamma: As in `PreferenceSection`.
        sft_weight: As in `PreferenceSection`.
        desirable_weight: As in `PreferenceSection`.
        undesirable_weight: As in `PreferenceSection`.
    """

    name: str
    beta: float
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.0
    sft_weight: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @classmethod
    def of(cls, name: str, section: PreferenceSection) -> "Formula":
        """That of an objective with the numbers of a section."""
        numbers = section.model_dump()
        return cls(name, **numbers | {"beta": DEFAULT_BETA[name] if section.beta is None else section.beta})

    @property
    def has_reference(self) -> bool:
        """Whether it compares with a reference."""
        return self.name in WITH_REFERENCE

    def numbers(self) -> dict[str, Any]:
        """Its name, and the numbers that it reads."""
        return {key: value for key, value in asdict(self).items() if self.name in PREFERENCE_KEYS.get(key, self.name)}

    def __str__(self) -> str:
        """`dpo with beta 0.1`; numbers that change nothing are left out."""
        numbers = self.numbers()
        own = [f"{key} {numbers[key]:g}" for key in numbers if key != "name" and numbers[key] != _WITHOUT_EFFECT[key]]
        return f"{self.name} with {', '.join(own)}"

    def compared_with(self, reference: str) -> str:
        """`dpo with beta 0.1, the base as the reference`. reference: what it would be."""
        return f"{self}, {f'{reference} as the reference' if self.has_reference else 'without a reference'}"

    def item_losses(self, answers: AnswerScores, sides: Tensor, estimate: float) -> Tensor:
        """(items,), the loss of each pair, or of each answer.

        Args:
            answers: The answers; of pairs, the chosen ones and the rejected ones in the same order.
            sides: (answers,), see `TokenizedRow.side`.
            estimate: See `answer_losses`; of objectives that compare pairs not read.
        """
        if self.name == "kto":
            return self.answer_losses(answers, sides > 0, estimate)
        return self.pair_losses(answers.take(sides > 0), answers.take(sides < 0))

    def rewards(self, answers: AnswerScores) -> Tensor:
        """(answers,), r of each; for ORPO, beta times the mean log-probability of its tokens, as TRL reports it."""
        if self.has_reference:
            return self.beta * (answers.log_probabilities - answers.reference)
        return self.beta * answers.per_token

    def pair_losses(self, chosen: AnswerScores, rejected: AnswerScores) -> Tensor:
        """(pairs,), the loss of each pair."""
        if self.name == "orpo":
            odds = _log_odds(chosen.per_token) - _log_odds(rejected.per_token)
            return -chosen.per_token - self.beta * logsigmoid(odds)
        margin = self.rewards(chosen) - self.rewards(rejected)
        if self.name == "simpo":
            margin = margin - self.simpo_gamma
        losses = -(1 - self.label_smoothing) * logsigmoid(margin) - self.label_smoothing * logsigmoid(-margin)
        return losses - self.sft_weight * chosen.per_token if self.sft_weight else losses

    def answer_losses(self, answers: AnswerScores, desirable: Tensor, divergence: float) -> Tensor:
        """(answers,), the loss of each answer alone.

        Args:
            answers: The answers.
            desirable: (answers,), bool, which of them are good.
            divergence: The estimate that z is beta times of, at least 0.
        """
        difference = self.rewards(answers) - self.beta * divergence
        good, bad = 1 - torch.sigmoid(difference), 1 - torch.sigmoid(-difference)
        return torch.where(desirable, self.desirable_weight * good, self.undesirable_weight * bad)

    def first_loss(self) -> float | None:
        """The loss of answers that are as likely as in the reference; None where it depends on the answers."""
        if self.name == "dpo" and not self.sft_weight:
            return float(-logsigmoid(torch.zeros((), dtype=torch.float64)))
        both = self.desirable_weight == self.undesirable_weight
        return 0.5 * self.desirable_weight if self.name == "kto" and both else None


def formula_for(run: RunConfig | None, kind: str) -> Formula:
    """The objective by which rows of preferences are measured: that of a run; if it is not known, or does not fit the
    rows, DPO or KTO. kind: `PAIRS` or `UNPAIRED`."""
    trained = formula_of(run)
    if trained is not None and KINDS[trained.name] == kind:
        return trained
    name = "dpo" if kind == PAIRS else "kto"
    return Formula(name, trained.beta if trained is not None and trained.has_reference else DEFAULT_BETA[name])


def formula_of(run: RunConfig | None) -> Formula | None:
    """The objective of a run; None where it was not trained on preferences, or is not known."""
    if run is None or run.training.objective == "sft":
        return None
    return Formula.of(run.training.objective, run.preferences)


def described(run: RunConfig) -> str:
    """The objective of a run with its numbers and its reference; empty for `sft`."""
    if run.training.objective == "sft":
        return ""
    reference = "the base"
    if run.lora.start_from is not None:
        reference = "the adapter that it started from"
    elif run.lora.init_lora_weights == "loftq":
        reference = "base and adapter before the first step"
    return Formula.of(run.training.objective, run.preferences).compared_with(reference)


def divergence(answers: AnswerScores) -> float:
    """KTO's estimate of the divergence from the reference, by prompts with answers to others; 0 without any."""
    if not len(answers.log_probabilities):
        return 0.0
    return max(0.0, float((answers.log_probabilities - answers.reference).mean()))


def _log_odds(log_probabilities: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(x); p is taken to be 1 - 1e-12 at most."""
    x = log_probabilities.clamp(max=-1e-12)
    return x - torch.where(x < -0.6931471805599453, torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


class ComparedRows:
    """The rows of a split of preferences, with the fields that their batches need.

    Attributes:
        dataset: The rows.
        reference: (rows,), the log-probability of each in the reference; None where it was not computed.
        mismatched: (rows,), the same of the prompt of each with the answer to another one; None as above.
    """

    def __init__(self, dataset: TokenizedDataset, max_length: int, seed: int):
        """max_length: The most tokens of a row. seed: decides which answers are put behind other prompts."""
        self.dataset, self._max_length = dataset, max_length
        self.reference: Values | None = None
        self.mismatched: Values | None = None
        self._partners = _partners(dataset, seed) if dataset.is_unpaired else None

    def __len__(self) -> int:
        return len(self.dataset.rows)

    def __getitem__(self, number: int, /) -> dict[str, Any]:
        row = self.dataset.rows.row(number)
        found: dict[str, Any] = {"input_ids": list(row.ids), "labels": row.labels, "side": row.side}
        if self.reference is not None:
            found["reference"] = float(self.reference[number])
        if self._partners is not None:
            found["mismatched"] = self._mismatched(row, self.dataset.rows.row(int(self._partners[number])))
            if self.mismatched is not None:
                found["mismatched"]["reference"] = float(self.mismatched[number])
        return found

    def _mismatched(self, row: TokenizedRow, partner: TokenizedRow) -> dict[str, Any]:
        """The prompt of a row, cut at its left if need be, with the answer of another one."""
        start, answer = partner.spans[0][0], partner.ids[partner.spans[0][0] :]
        prompt = row.ids[: row.spans[0][0]]
        prompt = prompt[max(0, len(prompt) + len(answer) - self._max_length) :]
        spans = tuple((one - start + len(prompt), other - start + len(prompt)) for one, other in partner.spans)
        mixed = TokenizedRow(row.where, prompt + answer, spans)
        return {"input_ids": list(mixed.ids), "labels": mixed.labels}

    def partners_digest(self) -> str:
        """SHA-256 of which answers stand behind other prompts; empty where none do."""
        return hashlib.sha256(self._partners.tobytes()).hexdigest() if self._partners is not None else ""


def _partners(dataset: TokenizedDataset, seed: int) -> NDArray[np.int64]:
    """(rows,), for each row one with another prompt, if there is any near it in an order that is drawn; each row is one
    for about one other."""
    count = len(dataset.rows)
    order = np.random.default_rng([seed, 3]).permutation(count)
    prompts = [hash(row.ids[: row.spans[0][0]]) for row in dataset.rows.rows()]
    partners = np.empty(count, np.int64)
    for place, number in enumerate(order.tolist()):
        others = (int(order[(place + step) % count]) for step in range(1, min(count, _PARTNERS_TRIED) + 1))
        nearest = int(order[(place + 1) % count])
        partners[number] = next((other for other in others if prompts[other] != prompts[number]), nearest)
    return partners
