"""Detects collapse: with a far too high learning rate, predictions may no longer depend on the prompt.

Such an adapter predicts the same next token after every prompt. Its loss can still be lower than the loss of the base,
if the base is bad at rows of this form. So the predictions of both are compared after different prompts.

A run ends with exit code 6 if the adapter's predictions agree and the base's do not, or if the adapter's loss is that
of a uniform distribution or above and the base's is not, see `reason`. No option publishes such an adapter.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import permutations
from typing import Any

import torch

from loratune import kernels
from loratune.compare.losses import LossComparison
from loratune.data.rendering.spans import TokenizedRow
from loratune.events import Advance, counting
from loratune.lora.attach import PeftModel

PROMPTS = 8
"""The maximum number of prompts: the shortest ones of each expected token in turn."""
_EQUAL, _SHARE_OF_BASE, _DIFFERENT = 0.01, 1 / 8, 0.1
"""Total variation distances: predictions up to `_EQUAL` apart count as equal, from `_DIFFERENT` on as different. Up to
`_SHARE_OF_BASE` times the base's distance they are nearly equal. That alone is no collapse: it also holds for adapters
that have only learned the frequencies of the answers.

SmolLM2-135M on 160 definitions of 8 classes, 30 steps of 5 rows with adapters on q, k, v and o: 0.80 for the base, 0.99
at a learning rate of 0.01, 0.003 at 0.03. At 50, with adapters on all linear layers, it is 0 after 3 steps. A tiny
random Llama that had unlearned to answer: 0.001 to 0.03, and 0.29 for its base."""
_ADVANTAGE = 0.05
"""Nats from which on an adapter uses its prompts, however similar its predictions are."""
_LEAST = math.log(0.001)
"""The logarithm of a probability so small that changes of it are meaningless."""
_GUESS = 0.5
"""Up to this multiple of the probability of a guess, an adapter has not learned the expected tokens."""
_LARGEST_SHARE = 0.9
"""The largest fraction of rows that may expect the same token: above it, always predicting that token is right."""
_ROUNDING, _CLEAR = 1e-4, 0.5
"""Nats per token: a loss within `_ROUNDING` of the loss of a uniform distribution counts as uniform; from `_CLEAR` on,
it is clearly different."""


@dataclass(frozen=True)
class PromptSensitivity:
    """How much next-token predictions differ between prompts with different expected tokens.

    Attributes:
        prompts: The number of prompts.
        base: The largest total variation distance between two predictions of the base that should differ, from 0 to 1.
        adapter: The same distance with the adapter.
        advantage: The mean log-probability of a token with the adapter after a prompt that expects it, minus its mean
            log-probability after a prompt that expects another token, in nats.
        likelihood: The mean probability of the expected token with the adapter, as a multiple of the probability of a
            random guess among all expected tokens.
    """

    prompts: int
    base: float
    adapter: float
    advantage: float
    likelihood: float

    @classmethod
    def of(
        cls, base: Sequence[torch.Tensor], adapter: Sequence[torch.Tensor], expected: Sequence[int]
    ) -> "PromptSensitivity":
        """Create it from the log-probabilities of all tokens after each prompt, and the tokens expected there, at least
        two different ones."""
        numbers = range(len(expected))
        pairs = [(one, other) for one, other in permutations(numbers, 2) if expected[one] != expected[other]]
        of_base, of_adapter = (
            max(float((found[one].exp() - found[other].exp()).abs().sum()) / 2 for one, other in pairs)
            for found in (base, adapter)
        )
        logs = torch.stack([*adapter])[:, [*expected]].clamp(min=_LEAST)
        advantage = sum(float(logs[one, one] - logs[other, one]) for one, other in pairs) / len(pairs)
        likelihood = float(logs.diagonal().exp().mean()) * len(set(expected))
        return cls(len(expected), of_base, of_adapter, advantage, likelihood)

    @property
    def is_lost(self) -> bool:
        """Whether predictions depend on the prompt without the adapter, but not with it."""
        largest = max(_EQUAL, self.base * _SHARE_OF_BASE) if self.likelihood <= _GUESS else _EQUAL
        return self.adapter <= largest and self.base >= _DIFFERENT and self.advantage < _ADVANTAGE

    def __str__(self) -> str:
        """A line for a collapsed adapter."""
        return (
            f"predicts the same after each of {self.prompts} prompts that expect different answers: probabilities "
            f"differ by {self.adapter:.2g} at most, by up to {self.base:.2g} on the base"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def prompt_sensitivity(
    model: PeftModel, without_adapter: AbstractContextManager[None], rows: Sequence[TokenizedRow]
) -> PromptSensitivity | None:
    """Compare the predictions of adapter and base after different prompts.

    Args:
        model: The base with the adapter.
        without_adapter: A context in which the adapter is disabled.
        rows: Rows to take the prompts from.

    Returns:
        The sensitivity; None if nearly all rows expect the same token, or all have the same prompt.
    """
    if not (found := prompts(rows)):
        return None
    with counting("checking that prompts make a difference", 2 * len(found)) as advance:
        adapter = _predictions(model, found, advance)
        with without_adapter:
            base = _predictions(model, found, advance)
    return PromptSensitivity.of(base, adapter, [*found.values()])


def prompts(rows: Sequence[TokenizedRow]) -> dict[tuple[int, ...], int]:
    """Prompt → expected next token, for at most `PROMPTS` prompts, cut before the first supervised token in which rows
    differ."""
    supervised = [[place for start, end in row.spans for place in range(max(start, 1), end)] for row in rows]
    for number in range(max(map(len, supervised), default=0)):
        reaching = [(row, places[number]) for row, places in zip(rows, supervised, strict=True) if number < len(places)]
        counts = Counter(row.ids[place] for row, place in reaching)
        if max(counts.values()) > _LARGEST_SHARE * len(reaching):
            continue
        seen = Counter((row.ids[:place], row.ids[place]) for row, place in reaching)
        usual = dict(pair for pair, _ in reversed(seen.most_common()))
        turns, of_token = [], Counter[int]()
        for ids, token in sorted(usual.items(), key=lambda pair: (len(pair[0]), pair)):
            turns.append((of_token[token], len(ids), ids, token))
            of_token[token] += 1
        if len(of_token) > 1:
            return {ids: token for _, _, ids, token in sorted(turns)[:PROMPTS]}
    return {}


def _predictions(model: PeftModel, found: Iterable[Sequence[int]], advance: Advance) -> list[torch.Tensor]:
    was_training, predictions = model.training, list[torch.Tensor]()
    model.eval()
    for ids in found:
        predictions.append(kernels.next_token_logits(model, ids).log_softmax(-1))
        advance(1)
    model.train(was_training)
    return predictions


def reason(sensitivity: PromptSensitivity | None, losses: LossComparison, rows: str, vocabulary: int) -> str:
    """Why an adapter counts as collapsed, as the predicate of a sentence; empty if it does not.

    Args:
        sensitivity: The result of `prompt_sensitivity`.
        losses: The losses of the adapter and its base.
        rows: Their rows in words.
        vocabulary: The vocabulary size.
    """
    loss, base, chance = losses.adapter, losses.base, math.log(vocabulary)
    is_uniform = abs(loss - chance) < _ROUNDING and abs(base - chance) > _CLEAR
    if losses.unit == "token" and (is_uniform or loss >= chance > base + _CLEAR):
        how = "at random" if is_uniform else "worse than at random"
        return (
            f"predicts {how}: its loss on {rows} is {loss:.4f} (base: {base:.4f}), and that of {vocabulary:,} "
            f"equally likely tokens {chance:.4f}"
        )
    return str(sensitivity) if sensitivity is not None and sensitivity.is_lost else ""
