"""Checks that a model computes the same as before its layers were replaced: the second safeguard, after `recognition`.

Two packed rows, and a row at the last positions, are passed through the whole decoder, forward and backward.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from loratune.errors import is_out_of_memory
from loratune.kernels.upstream import is_fake
from loratune.system.accelerator import same_random_numbers

_log = logging.getLogger(__name__)

ROWS = (29, 19)
"""Tokens of the packed rows."""
LONG_ROWS = (150, 70)
"""The same if the attention function changes: some families select blocks of keys in longer rows."""
DISTANT_TOKENS = 17
"""Tokens of the row at the last positions of the model."""
MAX_SIZE = 1 << 24
"""Gradients of larger tensors, such as trained embeddings, are not compared."""
MIN_TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.1}
"""The relative difference that is always allowed; 1e-3 in other dtypes."""
ROUNDING_FACTOR = 2.0
"""The difference caused by rounding the inputs, times this factor, is allowed if it is larger. In bfloat16 it can reach
half of a gradient, also in the real SmolLM2-135M; smaller differences cannot be distinguished from rounding."""
MAX_TOLERANCE = 0.7
"""The upper limit of the tolerance: a lost gradient differs by 1."""
BRANCHES = ((0, 24), (16, 40), (40, 45), (16, 21), (0, 12))
"""For each row of a tree, the number of tokens shared with the row before, and the total number."""
DRAWS = 3
"""Draws of rows before a difference counts: rounding can change the routing of a mixture of experts."""

Results = list[Tensor]
"""Hidden states, then gradients."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class Baseline:
    """The results of a model before the replacement.

    Attributes:
        values: The results.
        tolerances: The largest allowed relative difference of each result.
        distant: Whether a row at the last positions is among the inputs.
    """

    values: Results
    tolerances: list[float]
    distant: bool

    def matches(self, new: Results | None) -> bool:
        """Whether other results are equal up to rounding."""
        if new is None or len(new) != len(self.values):
            return False
        pairs = zip(self.values, new, self.tolerances, strict=True)
        return all(relative_rms(old, now) <= tolerance for old, now, tolerance in pairs)


class ParityCheck:
    """Compares what a model computes with what it computed when the check was made.

    base: a causal language model of transformers, with or without an adapter. A model of fake tensors always passes.
    """

    def __init__(self, base: Any, rows: tuple[int, ...] = ROWS):
        self._base, self._rows = base, rows
        self._has_data = not any(map(is_fake, base.parameters()))
        self._baselines = [_baseline(base, 0, rows)] if self._has_data else []

    @property
    def runs(self) -> bool:
        """Whether the model runs on packed rows at all."""
        return not self._has_data or self._baselines[0] is not None

    def prepare(self) -> None:
        """Compute the baselines of all draws, while the model is as it was."""
        seeds = range(len(self._baselines), DRAWS)
        self._baselines += [_baseline(self._base, seed, self._rows) for seed in seeds]

    def passes(self) -> bool:
        """Whether the model computes the same on at least one draw: a different computation differs on all of them."""
        if not self._has_data:
            return True
        baselines = [(seed, baseline) for seed, baseline in enumerate(self._baselines) if baseline is not None]
        return any(
            baseline.matches(compute(self._base, seed, distant=baseline.distant, rows=self._rows))
            for seed, baseline in baselines
        )


def computes_trees(base: Any) -> bool:
    """Whether a model computes the same for a tree of rows as for concatenated rows.

    base: a causal language model of transformers whose layers are replaced. It passes if its tensors are fake.
    """
    if any(map(is_fake, base.parameters())):
        return True
    return any(_attempt(base, partial(_computes_tree, base, seed)) for seed in range(DRAWS))


def _computes_tree(base: Any, seed: int) -> bool:
    positions, path, places = list[int](), list[int](), list[int]()
    for depth, end in BRANCHES:
        path = [*path[:depth], *range(len(positions), len(positions) + end - depth)]
        positions += range(depth, end)
        places += path
    tree, order = torch.tensor([positions], device=base.device), torch.tensor(places, device=base.device)
    ids = _drawn(base, tree, seed)
    state, gradients = _forward_backward(base, ids[:, order], tree[:, order], rounded=False)
    noisy_state, noisy_gradients = _forward_backward(base, ids[:, order], tree[:, order], rounded=True)
    for flat in (gradients, noisy_gradients):  # Embedding gradients of shared tokens are summed.
        embeddings = flat[0]
        flat[0] = embeddings.new_zeros(1, len(positions), embeddings.shape[-1], dtype=torch.float32)
        flat[0].index_add_(1, order, embeddings.float())
    baseline = _with_tolerances([state, *gradients], [noisy_state, *noisy_gradients], distant=False)
    of_tree, tree_gradients = _forward_backward(base, ids, tree, rounded=False, places=order)
    return baseline.matches([of_tree, *tree_gradients])


def _baseline(base: Any, seed: int, rows: tuple[int, ...]) -> Baseline | None:
    """The results of a model, and their sensitivity to rounding; None if it does not run on such rows."""
    for distant in (True, False):
        values = compute(base, seed, distant=distant, rows=rows)
        rounded = compute(base, seed, rounded=True, distant=distant, rows=rows) if values is not None else None
        if values is not None and rounded is not None:
            return _with_tolerances(values, rounded, distant=distant)
    return None


def _with_tolerances(values: Results, rounded: Results, *, distant: bool) -> Baseline:
    """Results with their tolerances. rounded: the results of rounded inputs."""
    least = MIN_TOLERANCE.get(values[0].dtype, 1e-3)
    noise = [ROUNDING_FACTOR * relative_rms(*pair) for pair in zip(values, rounded, strict=True)]
    tolerances = [min(max(least, difference), MAX_TOLERANCE) for difference in noise]
    return Baseline(values, tolerances, distant)


def compute(
    base: Any, seed: int = 0, *, rounded: bool = False, distant: bool = True, rows: tuple[int, ...] = ROWS
) -> Results | None:
    """Hidden states and gradients of random rows. No gradient is left in the model.

    Args:
        base: A causal language model of transformers.
        seed: Which rows are drawn.
        rounded: Whether to change the embeddings by half a unit in the last place, to measure the effect of rounding.
        distant: Whether to include a row at the last positions, which not every family supports.
        rows: Tokens of the packed rows.

    Returns:
        The results; None if the model does not run on packed rows.
    """
    return _attempt(base, partial(_compute, base, seed, rounded, distant, rows))


def _attempt(base: Any, run: Callable[[], Value]) -> Value | None:
    """The result of a pass through a model; None if it fails."""
    with same_random_numbers(base.device):
        try:
            return run()
        except Exception as error:  # Families raise all kinds of errors where they need other inputs.
            if is_out_of_memory(error):
                raise
            _log.debug("the model does not run on packed rows", exc_info=True)
            return None


def _compute(base: Any, seed: int, rounded: bool, distant: bool, rows: tuple[int, ...]) -> Results:
    text_config = base.config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None) or 1 << 11
    packed = torch.cat([torch.arange(min(length, limit)) for length in rows])[None]
    last = torch.arange(limit - DISTANT_TOKENS, limit)[None]
    states: Results = []
    gradients: Results = []
    # The distant row goes first, as it may change the angles of the rotary embeddings.
    for positions in [last, packed] if distant and limit >= 2 * DISTANT_TOKENS else [packed]:
        placed = positions.to(base.device)
        state, gradient = _forward_backward(base, _drawn(base, placed, seed), placed, rounded)
        states.append(state)
        gradients += gradient
    return [*states, *gradients]


def _drawn(base: Any, positions: Tensor, seed: int) -> Tensor:
    """Token ids of the shape of positions, (1, tokens)."""
    ids: Tensor = torch.arange(positions.numel(), device=positions.device) * (2 * seed + 1) + 8
    vocabulary: int = base.config.get_text_config().vocab_size
    return ids.view(1, -1) % vocabulary


def _forward_backward(
    base: Any, ids: Tensor, positions: Tensor, rounded: bool, places: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The hidden states of one batch, and the gradients of its embeddings and of the trained weights.

    places: indices of the tokens whose states are used, possibly repeated; None: all.
    """
    embeddings: list[Tensor] = []

    def replace_embeddings(_module: Any, _inputs: Any, embedded: Tensor) -> Tensor:
        embeddings.append(embedded.detach().requires_grad_())
        if not rounded:
            return embeddings[-1].clone()  # Some models scale embeddings in place, which a leaf does not allow.
        signs = 2 * torch.randint(2, embedded.shape, generator=torch.Generator().manual_seed(1)) - 1
        half_unit = torch.finfo(embedded.dtype).eps / 2
        return (embeddings[-1].float() * (1 + half_unit * signs.to(embedded.device))).to(embedded.dtype)

    hook = base.get_input_embeddings().register_forward_hook(replace_embeddings)
    try:
        with evaluating(base), torch.enable_grad():
            output = base.get_decoder()(ids, position_ids=positions, use_cache=False)
            states = output.logits if "logits" in output else output.last_hidden_state
            states = states if places is None else states[:, places]
            weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states.device)
            trainable = [weight for weight in base.parameters() if weight.requires_grad and weight.numel() <= MAX_SIZE]
            inputs = [*embeddings, *trainable]
            gradients = torch.autograd.grad((states.float() * weights).sum(), inputs, allow_unused=True)
    finally:
        hook.remove()
    filled = [torch.zeros_like(x) if dx is None else dx for x, dx in zip(inputs, gradients, strict=True)]
    count = len(embeddings)
    adapter = [torch.cat([dx.detach().float().flatten() for dx in filled[count:]])] if trainable else []
    return states.detach(), [*(dx.detach() for dx in filled[:count]), *adapter]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without dropout; the mode of every module is restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def relative_rms(old: Tensor, new: Tensor) -> float:
    """The root mean square of the difference relative to that of `old`; NaN if a tensor is not finite."""
    size = float(old.float().square().mean().sqrt())
    difference = float((old.float() - new.float()).square().mean().sqrt())
    return difference / size if size else difference
