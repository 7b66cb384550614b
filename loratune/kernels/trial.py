"""Whether a model gives the same numbers as before its layers were replaced: the second lock, after `recognition`.

Two rows end to end and a row far from the first position go through the whole decoder, forward and backward.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loratune.errors import is_out_of_memory

ROWS = (29, 19)
"""Tokens of the rows that stand end to end."""
FAR = 17
"""Tokens of the row that stands at the last positions of the model."""
TOLERANCES = {torch.bfloat16: 0.15, torch.float16: 0.15}
"""Of the spread of the states that come out; rounding alone makes 0.014 in SmolLM2-135M, in bfloat16."""
GRADIENTS = {torch.bfloat16: 0.3, torch.float16: 0.3}
"""Of the spread of the gradients; rounding alone makes 0.07 in SmolLM2-135M, in bfloat16."""
TOLERANCE = 1e-3
DRAWS = 3
"""Rows that are drawn before a difference counts: rounding can make a mixture of experts choose another one."""

Outcome = tuple[list[Tensor], list[Tensor]]
"""States, and gradients."""


class Trial:
    """What a model gave before its layers were replaced, and whether it still does.

    base: a causal language model of transformers, with an adapter or without; as it is now, it is the standard.
    """

    def __init__(self, base: Any):
        self._base = base
        self.outcomes = [outcome(base, 0)]
        """Of each draw that was needed so far; None where the model does not run."""

    @property
    def runs(self) -> bool:
        """Whether the model runs on such rows as it was."""
        return self.outcomes[0] is not None

    def prepare(self) -> None:
        """Draw all rows, while the model is as it was."""
        self.outcomes += [outcome(self._base, seed) for seed in range(len(self.outcomes), DRAWS)]

    def agrees(self, draws: int | None = None) -> bool:
        """Whether the model gives the same for some rows drawn; what is computed otherwise differs for all of them."""
        return any(alike(old, outcome(self._base, seed)) for seed, old in enumerate(self.outcomes[:draws]))


def outcome(base: Any, seed: int = 0) -> Outcome | None:
    """States and gradients of random rows, or None if the model cannot do it. Leaves no gradient behind."""
    with torch.random.fork_rng(_devices(base)):
        try:
            return _passed(base, seed)
        except Exception as error:  # what a family lacks, or raises on what it does not know, is its own choice
            if is_out_of_memory(error):
                raise
            return None


def _passed(base: Any, seed: int) -> Outcome:
    known = base.config.get_text_config().to_dict()
    vocabulary, ends = known["vocab_size"], known.get("max_position_embeddings") or 1 << 11
    flat, far = torch.cat([torch.arange(length) for length in ROWS])[None], torch.arange(ends - FAR, ends)[None]
    states: list[Tensor] = []
    gradients: list[Tensor] = []
    for positions in ([far] if ends >= 2 * FAR else []) + [
        flat
    ]:  # in this order: far rows may change angles that are kept
        ids = (torch.arange(positions.numel()) * (2 * seed + 1) + 8).view(1, -1) % vocabulary
        state, gradient = _through(base, ids.to(base.device), positions.to(base.device))
        states.append(state)
        gradients += gradient
    return states, gradients


def _through(base: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Forward and backward of one batch: last hidden states, and gradients of embeddings and of what is trained."""
    leaves: list[Tensor] = []

    def cut(_module: Any, _given: Any, embedded: Tensor) -> Tensor:
        leaves.append(embedded.detach().requires_grad_())
        return leaves[-1].clone()  # some models scale their embeddings in place, which a leaf does not allow

    hook = base.get_input_embeddings().register_forward_hook(cut)
    try:
        with evaluating(base), torch.enable_grad():
            made = base.get_decoder()(ids, position_ids=positions, use_cache=False)
            states = made.logits if "logits" in made else made.last_hidden_state
            drawn = torch.Generator().manual_seed(0)
            weights = torch.randn(states.shape, generator=drawn).to(states.device)
            trained = [one for one in base.parameters() if one.requires_grad]
            inputs = [*leaves, *trained]
            made = torch.autograd.grad((states.float() * weights).sum(), inputs, allow_unused=True)
    finally:
        hook.remove()
    parts = [torch.zeros_like(one) if part is None else part for one, part in zip(inputs, made, strict=True)]
    count = len(leaves)
    adapter = [torch.cat([part.detach().float().flatten() for part in parts[count:]])] if trained else []
    return states.detach(), [*(part.detach() for part in parts[:count]), *adapter]


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


def alike(old: Outcome | None, new: Outcome | None) -> bool:
    """Whether two outcomes are the same, but for rounding."""
    if old is None or new is None:
        return False
    dtype = old[0][0].dtype
    allowed = (TOLERANCES.get(dtype, TOLERANCE), GRADIENTS.get(dtype, TOLERANCE))
    return all(_close(before, after, most) for before, after, most in zip(old, new, allowed, strict=True))


def _close(old: Sequence[Tensor], new: Sequence[Tensor], most: float) -> bool:
    return len(old) == len(new) and all(distance(*pair) <= most for pair in zip(old, new, strict=True))


def distance(old: Tensor, new: Tensor) -> float:
    """The root mean square of the difference, as a share of that of the first tensor; NaN if either is not finite."""
    size = float(old.float().square().mean().sqrt())
    difference = float((old.float() - new.float()).square().mean().sqrt())
    return difference / size if size else difference
