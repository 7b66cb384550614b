"""Checks that a model computes the same as before its layers were replaced: the second safeguard, after `recognition`.

Two packed rows, and a row at the last positions, are passed through the decoder, forward and backward. Of layers that
compute alike the first and the last are enough (`layer_sample`); a model that does not run with these alone is compared
as a whole. An adapter that computes nothing yet has random weights meanwhile.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from loratune.errors import is_out_of_memory
from loratune.kernels.compiled.fused_ops import variant
from loratune.kernels.compiled.operations import relative_rms as relative_rms
from loratune.kernels.layer_sample import WHOLE_MODEL, LayerSample
from loratune.kernels.row_angles import has_other_hooks
from loratune.kernels.upstream import attn_implementation, is_fake
from loratune.system.accelerator import same_random_numbers
from loratune.system.cache import NOTHING_KEPT, KeptResults, source_digest
from loratune.system.machine_results import kept_here

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
SIZE_OF_B = 0.05
"""The standard deviation of weights in place of those that are zero, as in `scripts/check_layers.py`."""
DRAWS = 3
"""Draws of rows before a difference counts: rounding can change the routing of a mixture of experts."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Results:
    """What a model computes.

    Attributes:
        values: Hidden states, the outputs of the parts of its layers, and gradients.
        shares: What single layers add to the gradient of the states that go through them.
    """

    values: list[Tensor]
    shares: list[Tensor]

    def __add__(self, other: "Results") -> "Results":
        return Results(self.values + other.values, self.shares + other.shares)


@dataclass(frozen=True)
class Baseline:
    """The results of a model before the replacement.

    Attributes:
        results: The results.
        tolerances: The largest allowed relative difference of each value, then of each share.
        distant: Whether a row at the last positions is among the inputs.
    """

    results: Results
    tolerances: list[float]
    distant: bool

    def matches(self, new: Results | None) -> bool:
        """Whether other results are equal up to rounding."""
        if new is None or len(new.values) != len(self.results.values) or len(new.shares) != len(self.results.shares):
            return False
        pairs = zip(self.results.values + self.results.shares, new.values + new.shares, self.tolerances, strict=True)
        return all(relative_rms(old, now) <= tolerance for old, now, tolerance in pairs)


class ParityCheck:
    """Compares what a model computes with what it computed when the check was made.

    base: a causal language model of transformers, with or without an adapter. A model of fake tensors always passes.
    sample: the layers that are compared, if the model runs with these alone.
    """

    def __init__(self, base: Any, rows: tuple[int, ...] = ROWS, sample: LayerSample = WHOLE_MODEL):
        self._base, self._rows, self._sample = base, rows, sample
        self._has_data = not any(map(is_fake, base.parameters()))
        self._baselines = [self._baseline(0)] if self._has_data else []
        if self._has_data and sample.left_out and not self.runs:
            self._sample = WHOLE_MODEL
            self._baselines = [self._baseline(0)]

    @property
    def runs(self) -> bool:
        """Whether the model runs on packed rows at all."""
        return not self._has_data or self._baselines[0] is not None

    def prepare(self) -> None:
        """Compute the baselines of all draws, while the model is as it was."""
        self._baselines += map(self._baseline, range(len(self._baselines), DRAWS))

    def passes(self) -> bool:
        """Whether the model computes the same on at least one draw: a different computation differs on all of them."""
        if not self._has_data:
            return True
        baselines = [(seed, baseline) for seed, baseline in enumerate(self._baselines) if baseline is not None]
        with self._sample.alone():
            return any(baseline.matches(self._compute(seed, distant=baseline.distant)) for seed, baseline in baselines)

    def _baseline(self, seed: int) -> Baseline | None:
        """The results of the model, and their sensitivity to rounding; None if it does not run on such rows."""
        with self._sample.alone():
            for distant in (True, False):
                found = self._compute(seed, distant=distant)
                rounded = self._compute(seed, rounded=True, distant=distant) if found is not None else None
                if found is not None and rounded is not None:
                    return _with_tolerances(found, rounded, distant=distant)
        return None

    def _compute(self, seed: int, *, distant: bool, rounded: bool = False) -> Results | None:
        """The results for random rows; None if the model does not run on them. No gradient is left in the model.

        Args:
            seed: Which rows are drawn.
            distant: Whether to include a row at the last positions, which not every family supports.
            rounded: Whether to change the embeddings by half a unit in the last place, to measure the effect of
                rounding.
        """

        def run() -> Results:
            settings = self._base.config.get_text_config()
            limit = getattr(settings, "max_position_embeddings", None) or 1 << 11
            packed = torch.cat([torch.arange(min(length, limit)) for length in self._rows])[None].to(self._base.device)
            found = []
            # The distant row goes first, as it may change the angles of the rotary embeddings.
            if distant and limit >= 2 * DISTANT_TOKENS:
                last = torch.arange(limit - DISTANT_TOKENS, limit, device=self._base.device)[None]
                found.append(_forward_backward(self._base, _drawn(self._base, last, seed), last, self._sample, rounded))
            found.append(_forward_backward(self._base, _drawn(self._base, packed, seed), packed, self._sample, rounded))
            return sum(found[1:], found[0])

        return _attempt(self._base, run)


def kept_checks(model: Any, fingerprint: str) -> KeptResults:
    """What checks of this model found on this machine before. fingerprint: that of its base; empty: nothing is kept."""
    base = model.get_base_model()
    if not fingerprint or any(has_other_hooks(module) or "forward" in vars(module) for module in base.modules()):
        return NOTHING_KEPT
    tensors = [(name, str(one.dtype), [*one.shape], one.requires_grad) for name, one in model.named_parameters()]
    settings = [base.config.to_json_string(use_diff=False), attn_implementation(base)]
    settings.append(str(model.active_adapter))
    adapters = [config.to_dict() for config in model.peft_config.values()]
    code = [torch.get_num_threads(), variant(base.get_input_embeddings().weight), source_digest()]
    return kept_here(fingerprint, str(model), tensors, settings, adapters, code)


def computes_trees(base: Any, sample: LayerSample = WHOLE_MODEL) -> bool:
    """Whether a model computes the same for a tree of rows as for concatenated rows.

    base: a causal language model of transformers whose layers are replaced. It passes if its tensors are fake.
    sample: as for `ParityCheck`.
    """
    if any(map(is_fake, base.parameters())):
        return True
    with sample.alone():
        found = [_attempt(base, partial(_computes_tree, base, sample, 0))]
        found += [
            _attempt(base, partial(_computes_tree, base, sample, seed)) for seed in range(1, DRAWS) if not any(found)
        ]
    is_unknown = found[0] is None and sample.left_out
    return computes_trees(base) if is_unknown else any(found)


def _computes_tree(base: Any, sample: LayerSample, seed: int) -> bool:
    positions, path, places = list[int](), list[int](), list[int]()
    for depth, end in BRANCHES:
        path = [*path[:depth], *range(len(positions), len(positions) + end - depth)]
        positions += range(depth, end)
        places += path
    tree, order = torch.tensor([positions], device=base.device), torch.tensor(places, device=base.device)
    ids = _drawn(base, tree, seed)
    found, noisy = (
        _forward_backward(base, ids[:, order], tree[:, order], sample, rounded, shared=order)
        for rounded in (False, True)
    )
    return _with_tolerances(found, noisy).matches(_forward_backward(base, ids, tree, sample, places=order))


def _with_tolerances(found: Results, rounded: Results, *, distant: bool = False) -> Baseline:
    """Results with their tolerances. rounded: the results of rounded inputs."""
    least = MIN_TOLERANCE.get(found.values[0].dtype, 1e-3)
    noise, of_shares = (
        [max(least, ROUNDING_FACTOR * relative_rms(*pair)) for pair in zip(*both, strict=True)]
        for both in ((found.values, rounded.values), (found.shares, rounded.shares))
    )
    tolerances = [min(one, MAX_TOLERANCE) for one in noise]
    # Beside large states a share may be nothing but rounding.
    return Baseline(found, [*tolerances, *(one if one <= MAX_TOLERANCE else math.inf for one in of_shares)], distant)


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


def _drawn(base: Any, positions: Tensor, seed: int) -> Tensor:
    """Token ids of the shape of positions, (1, tokens)."""
    ids: Tensor = torch.arange(positions.numel(), device=positions.device) * (2 * seed + 1) + 8
    vocabulary: int = base.config.get_text_config().vocab_size
    return ids.view(1, -1) % vocabulary


def _forward_backward(
    base: Any,
    ids: Tensor,
    positions: Tensor,
    sample: LayerSample,
    rounded: bool = False,
    places: Tensor | None = None,
    shared: Tensor | None = None,
) -> Results:
    """The results of one batch.

    Args:
        base: The model.
        ids: (1, tokens).
        positions: The same shape.
        sample: The layers of which details are compared.
        rounded: See `ParityCheck`.
        places: The tokens whose states are used, possibly repeated; None: all.
        shared: For each token, the token to which its gradient is added; None: itself.
    """
    embeddings: list[Tensor] = []

    def replace_embeddings(_module: Any, _inputs: Any, embedded: Tensor) -> Tensor:
        embeddings.append(embedded.detach().requires_grad_())
        if not rounded:
            return embeddings[-1].clone()  # Some models scale embeddings in place, which a leaf does not allow.
        signs = 2 * torch.randint(2, embedded.shape, generator=torch.Generator().manual_seed(1)) - 1
        half_unit = torch.finfo(embedded.dtype).eps / 2
        return (embeddings[-1].float() * (1 + half_unit * signs.to(embedded.device))).to(embedded.dtype)

    hook, groups = base.get_input_embeddings().register_forward_hook(replace_embeddings), _trained_weights(base, sample)
    try:
        with evaluating(base), torch.enable_grad(), sample.recorded() as record, _nonzero([*chain(*groups)]):
            output = base.get_decoder()(ids, position_ids=positions, use_cache=False)
            states = output.logits if "logits" in output else output.last_hidden_state
            states = states if places is None else states[:, places]
            weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states.device)
            inputs = [*embeddings, *chain(*record.passed), *chain(*groups)]
            gradients = torch.autograd.grad((states.float() * weights).sum(), inputs, allow_unused=True)
    finally:
        hook.remove()
    filled = iter([torch.zeros_like(x) if dx is None else dx.detach() for x, dx in zip(inputs, gradients, strict=True)])
    of_embeddings = [_added(next(filled), shared) for _ in embeddings]
    shares = [_added(next(filled).float() - next(filled).float(), shared) for _ in record.passed]
    adapter = [torch.cat([next(filled).float().flatten() for _ in group]) for group in groups]
    outputs = [one if places is None or one.shape[:2] != ids.shape else one[:, places] for one in record.outputs]
    return Results([states.detach(), *outputs, *of_embeddings, *adapter], shares)


def _trained_weights(base: Any, sample: LayerSample) -> list[list[Tensor]]:
    """The trained weights of each layer in a sample, and all others; those that are too large are left out."""
    owners = {id(weight): number for number, layer in enumerate(sample.kept) for weight in layer.parameters()}
    groups: dict[int, list[Tensor]] = {}
    for weight in base.parameters():
        if weight.requires_grad and weight.numel() <= MAX_SIZE:
            groups.setdefault(owners.get(id(weight), -1), []).append(weight)
    return [*groups.values()]


@contextmanager
def _nonzero(weights: Sequence[Tensor]) -> Iterator[None]:
    """Inside, weights that are zero have random values. B is zero at first: then LoRA computes nothing, and A has no
    gradient. Afterwards they are the tensors of before, which are not written to."""
    zeros = [(weight, weight.data) for weight in weights if not weight.any()]
    drawn = torch.Generator().manual_seed(2)
    try:
        for weight, values in zeros:
            weight.data = (SIZE_OF_B * torch.randn(values.shape, generator=drawn)).to(values)
        yield
    finally:
        for weight, values in zeros:
            weight.data = values


def _added(gradient: Tensor, shared: Tensor | None) -> Tensor:
    """A gradient of states, (1, tokens, ...). shared: see `_forward_backward`."""
    if shared is None:
        return gradient
    empty = gradient.new_zeros(1, int(shared.max()) + 1, *gradient.shape[2:], dtype=torch.float32)
    return empty.index_add_(1, shared, gradient.float())


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
