"""Whether a model gives the same numbers as before its layers were replaced: the second lock, after `recognition`.

Two rows end to end and a row far from the first position go through the whole decoder, forward and backward.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loratune.errors import is_out_of_memory

_log = logging.getLogger(__name__)

ROWS = (29, 19)
"""Tokens of the rows that stand end to end."""
LONG_ROWS = (150, 70)
"""The same where attention is another function: some families choose blocks of keys once a row has several."""
FAR = 17
"""Tokens of the row that stands at the last positions of the model."""
MOST = 1 << 24
"""Numbers of a trained tensor whose gradient is looked at; embeddings that are trained have more."""
LEAST = {torch.bfloat16: 0.1, torch.float16: 0.1}
"""Of the size of states and gradients: a difference that is always allowed, 1e-3 in float32."""
NOISE = 2.0
"""So many times what the rounding of the inputs alone makes is allowed, where that is more. In bfloat16 it can make as
much as half of a gradient, in the real SmolLM2-135M too, and no replacement is told from it there."""
UTMOST = 0.7
"""More is never allowed: gradients that are lost altogether are 1 away from what they were."""
DRAWS = 3
"""Rows that are drawn before a difference counts: rounding can make a mixture of experts choose another one."""

Outcome = list[Tensor]
"""States, then gradients."""


@dataclass(frozen=True)
class Standard:
    """What a model gave.

    allowed: for each tensor, the largest difference that is none, as a share of its size; distant: see `outcome`.
    """

    values: Outcome
    allowed: list[float]
    distant: bool

    def holds(self, new: Outcome | None) -> bool:
        """Whether another outcome is the same, but for rounding."""
        if new is None or len(new) != len(self.values):
            return False
        pairs = zip(self.values, new, self.allowed, strict=True)
        return all(distance(old, now) <= most for old, now, most in pairs)


class ParityCheck:
    """What a model gave before its layers were replaced, and whether it still does.

    base: a causal language model of transformers, with an adapter or without; as it is now, it is the standard.
    """

    def __init__(self, base: Any, rows: tuple[int, ...] = ROWS):
        self._base, self._rows = base, rows
        self._standards = [_standard(base, 0, rows)]

    @property
    def runs(self) -> bool:
        """Whether the model runs on such rows as it was."""
        return self._standards[0] is not None

    def prepare(self) -> None:
        """Draw all rows, while the model is as it was."""
        self._standards += [_standard(self._base, seed, self._rows) for seed in range(len(self._standards), DRAWS)]

    def agrees(self) -> bool:
        """Whether the model gives the same for some rows drawn; what is computed otherwise differs for all of them."""
        known = [(seed, old) for seed, old in enumerate(self._standards) if old is not None]
        return any(old.holds(outcome(self._base, seed, distant=old.distant, rows=self._rows)) for seed, old in known)


def _standard(base: Any, seed: int, rows: tuple[int, ...]) -> Standard | None:
    """What a model gives, and how far rounding moves that."""
    for distant in (True, False):
        values = outcome(base, seed, distant=distant, rows=rows)
        moved = outcome(base, seed, rounded=True, distant=distant, rows=rows) if values is not None else None
        if values is not None and moved is not None:
            least = LEAST.get(values[0].dtype, 1e-3)
            noise = [NOISE * distance(*pair) for pair in zip(values, moved, strict=True)]
            allowed = [min(max(least, one), UTMOST) for one in noise]
            return Standard(values, allowed, distant)
    return None


def outcome(
    base: Any, seed: int = 0, *, rounded: bool = False, distant: bool = True, rows: tuple[int, ...] = ROWS
) -> Outcome | None:
    """States and gradients of random rows, or None if the model cannot do it. Leaves no gradient behind.

    rounded: with embeddings that are rounded to another number beside the right one; distant: with a row at the last
    positions, which not every family takes.
    """
    with torch.random.fork_rng(_devices(base)):
        try:
            return _passed(base, seed, rounded, distant, rows)
        except Exception as error:  # what a family lacks, or raises on what it does not know, is its own choice
            if is_out_of_memory(error):
                raise
            _log.debug("the model does not run on rows end to end, distant: %s", distant, exc_info=True)
            return None


def _passed(base: Any, seed: int, rounded: bool, distant: bool, rows: tuple[int, ...]) -> Outcome:
    text = base.config.get_text_config()
    vocabulary, ends = text.vocab_size, getattr(text, "max_position_embeddings", None) or 1 << 11
    flat, far = (
        torch.cat([torch.arange(min(length, ends)) for length in rows])[None],
        torch.arange(ends - FAR, ends)[None],
    )
    states: Outcome = []
    gradients: Outcome = []
    for positions in (
        [far, flat] if distant and ends >= 2 * FAR else [flat]
    ):  # far rows may change angles: they go first
        ids = (torch.arange(positions.numel()) * (2 * seed + 1) + 8).view(1, -1) % vocabulary
        state, gradient = _through(base, ids.to(base.device), positions.to(base.device), rounded)
        states.append(state)
        gradients += gradient
    return [*states, *gradients]


def _through(base: Any, ids: Tensor, positions: Tensor, rounded: bool) -> tuple[Tensor, list[Tensor]]:
    """Forward and backward of one batch: what comes out, and gradients of embeddings and of what is trained."""
    leaves: list[Tensor] = []

    def cut(_module: Any, _given: Any, embedded: Tensor) -> Tensor:
        leaves.append(embedded.detach().requires_grad_())
        if not rounded:
            return leaves[-1].clone()  # some models scale their embeddings in place, which a leaf does not allow
        signs = 2 * torch.randint(2, embedded.shape, generator=torch.Generator().manual_seed(1)) - 1
        half = torch.finfo(embedded.dtype).eps / 2
        return (leaves[-1].float() * (1 + half * signs.to(embedded.device))).to(embedded.dtype)

    hook = base.get_input_embeddings().register_forward_hook(cut)
    try:
        with evaluating(base), torch.enable_grad():
            made = base.get_decoder()(ids, position_ids=positions, use_cache=False)
            states = made.logits if "logits" in made else made.last_hidden_state
            weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states.device)
            trained = [one for one in base.parameters() if one.requires_grad and one.numel() <= MOST]
            inputs = [*leaves, *trained]
            parts = torch.autograd.grad((states.float() * weights).sum(), inputs, allow_unused=True)
    finally:
        hook.remove()
    filled = [torch.zeros_like(one) if part is None else part for one, part in zip(inputs, parts, strict=True)]
    count = len(leaves)
    adapter = [torch.cat([part.detach().float().flatten() for part in filled[count:]])] if trained else []
    return states.detach(), [*(part.detach() for part in filled[:count]), *adapter]


def _devices(base: Any) -> list[Any]:
    return [base.device] if base.device.type == "cuda" else []


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, nothing is dropped out; afterwards each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def distance(old: Tensor, new: Tensor) -> float:
    """The root mean square of the difference, as a share of that of the first tensor; NaN if either is not finite."""
    size = float(old.float().square().mean().sqrt())
    difference = float((old.float() - new.float()).square().mean().sqrt())
    return difference / size if size else difference
