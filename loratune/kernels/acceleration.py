"""Which layers of a model are computed by the kernels while it is trained: those that are known to be the same.

Two locks: a layer's class must stand in the list of those that were held against their replacement (`recognition`), and
what a layer sees must be what the model's own mask says (`masks`); then the whole model must still give the same
numbers, forward and backward (`trial`).
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from loratune.kernels import gpu, masks, reference, rowwise
from loratune.kernels.attention import HeadNorms, Layout, SelfAttention
from loratune.kernels.lora_linear import Adapted, Projection
from loratune.kernels.loss import LossHead
from loratune.kernels.masks import Sight
from loratune.kernels.mlp import GatedLayer, rms_norm
from loratune.kernels.native import fused_ops
from loratune.kernels.parity_check import LONG_ROWS, ParityCheck, evaluating
from loratune.kernels.recognition import form_of
from loratune.kernels.reference import FusedOps
from loratune.kernels.replacing import PerBatch, Replacement, restore

_log = logging.getLogger(__name__)

Reader = Callable[[nn.Module], Adapted | None]
"""From a module to the linear layer and the LoRA that it is, or None: it is something else."""

ATTENTION, UNTURNED, GATED, NORM = "attention", "attention without positions", "gated", "norm"
"""The forms of replacements, as the list of checked layers has them."""
UNMASKED = "loratune"


class FastAttention(Replacement):
    """In the place of a layer of attention. Rows begin where positions are 0; what pads them stands at their end.

    window: how many tokens a token sees at most, itself among them; turned: whether queries and keys are turned by
    their positions.
    """

    def __init__(
        self, original: nn.Module, part: SelfAttention, window: int | None, layouts: "PerBatch[Layout]", *, turned: bool
    ):
        super().__init__(original)
        self._part, self._window, self._layouts, self._turned = part, window, layouts, turned

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        position_ids: Tensor,
        past_key_values: None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states: (rows, length, size). Returns the same shape, and no weights. Raises TypeError, ValueError:
        it is given something else than a batch of rows from their first token on."""
        if past_key_values is not None:
            raise TypeError("there is a cache")
        rows, length, size = hidden_states.shape
        layout = self._layouts.of(position_ids, torch.Size((rows, length)), self._window)
        cosine, sine = self._angles(hidden_states, position_embeddings if self._turned else None)
        result = self._part(hidden_states.reshape(-1, size), cosine, sine, layout, training=self.training)
        return result.view(rows, length, -1), None

    def _angles(self, states: Tensor, given: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """Cosines and sines: (tokens, size of a head) float32 each."""
        rows, length, _ = states.shape
        if given is None:
            zero = states.new_zeros(rows * length, self._part.size, dtype=torch.float32)
            return [zero + 1, zero]
        if any(one.shape[-1] != self._part.size or one.dim() != 3 for one in given):
            raise ValueError(f"angles {given[0].shape} for heads of {self._part.size}")
        return [one.float().expand(rows, length, -1).reshape(rows * length, -1) for one in given]


class FastGatedLayer(Replacement):
    """In the place of a gated feed-forward layer."""

    def __init__(self, original: nn.Module, part: GatedLayer):
        super().__init__(original)
        self._part = part

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., size)."""
        return self._part(x.reshape(-1, x.shape[-1]), training=self.training).view(*x.shape[:-1], -1)


class FastNorm(Replacement):
    """In the place of a root mean square norm."""

    def __init__(self, original: nn.Module, epsilon: float, over: FusedOps):
        super().__init__(original)
        self.epsilon, self._passes = epsilon, over

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., size). A family may keep what goes through its layers in another dtype than their weights."""
        if x.dtype != self.weight.dtype:
            result: Tensor = self._original[0](x)
            return result
        return rms_norm(x, self.weight, self.epsilon, self._passes)


SHARDED = "all layers, as the base is spread over processes"
Maker = Callable[[], nn.Module | None]
"""Makes the replacement of a layer; None: there is none for it."""
Step = Callable[[Any], Iterable[tuple[str, nn.Module]]]
"""Puts kernels into a base. Yields path and module of each layer that goes, before it goes."""


@dataclass(frozen=True)
class Acceleration:
    """Which layers of a model are computed by the kernels, as `accelerate` found it.

    left: what stays as it is, in words; steps: what puts the kernels into the model, in this order.
    """

    left: list[str]
    steps: Sequence[Step] = ()

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Inside, these layers are computed by the kernels; nothing is tried again.

        model: the one that `accelerate` looked at; its adapter may be disabled. Batches must be padded at the end of
        rows, if at all, and come without a cache.
        """
        with _restored(model.get_base_model()) as (base, replaced):
            for step in self.steps:
                replaced += step(base)
            yield


def accelerate(model: Any, reader: Reader, *, sharded: bool = False) -> Acceleration:
    """Find out which layers of a model the kernels can compute. The model is run for it, and stays as it is.

    model: a `PeftModel` around a causal language model of transformers; on a GPU, see `gpu.replace`. sharded: no
    process will hold whole layers while it trains, so all stay as they are.
    """
    if sharded:
        return Acceleration([SHARDED])
    with _restored(model.get_base_model()) as (base, replaced):
        fit = _replace if base.device.type == "cpu" else gpu.replace
        steps, left = fit(base, reader, replaced)
        head = _head(base)
    return Acceleration(left, [*steps, partial(_put_head, *head)]) if head else Acceleration([*left, "loss"], steps)


@contextmanager
def accelerated(model: Any, reader: Reader, *, sharded: bool = False) -> Iterator[list[str]]:
    """`accelerate`, and inside that applied. Yields what stays as it is."""
    acceleration = accelerate(model, reader, sharded=sharded)
    with acceleration.applied(model):
        yield acceleration.left


@contextmanager
def _restored(base: Any) -> Iterator[tuple[Any, list[tuple[str, nn.Module]]]]:
    """Yields a base, and a list of path and module of those that are replaced inside; afterwards it is as it was."""
    replaced: list[tuple[str, nn.Module]] = []
    implementation = base.config._attn_implementation
    try:
        yield base, replaced
    finally:
        if base.config._attn_implementation != implementation:
            base.set_attn_implementation(implementation)
        restore(base, replaced)


def _replace(base: Any, reader: Reader, replaced: list[tuple[str, nn.Module]]) -> tuple[list[Step], list[str]]:
    """Put fast modules in their places. replaced: gets path and module of each that went. Returns what does so again,
    and what stays."""
    trial, over = ParityCheck(base), fused_ops(base.get_input_embeddings().weight)
    survey = masks.survey(base)
    kinds = (
        [kind for kind in _kinds(base, reader, survey.sights, plain=survey.plain) if kind.fits] if trial.runs else []
    )
    if over is reference:
        kinds = [kind for kind in kinds if kind.what != "attention"]  # torch's own is faster than the reference
    for kind in kinds:
        replaced += kind.put(base)
    if kinds and not trial.agrees():
        for kind in reversed(kinds):
            kind.take_back(base)
        trial.prepare()
        kinds = [kind for kind in kinds if kind.agreed(base, trial, replaced)]
    steps: list[Step] = [kind.put for kind in kinds]
    if trial.runs and survey.plain and not any(kind.what == "attention" for kind in kinds):
        steps += [_put_rowwise] if rowwise.attend(base, ParityCheck(base, LONG_ROWS).agrees) else []
    left = [what for what in KINDS if not any(kind.what == what and kind.whole for kind in kinds)]
    if over is reference:  # torch computes all that would be one pass over memory in C
        left = [*(what for what in left if what != "norms"), "norms, rotations and activations"]
    return steps, left


@dataclass
class _Kind:
    """Layers that are replaced, or left, together.

    fits: path and module of each, and what makes its replacement, of weights and adapter as they are then; whole: these
    are all there are; own: the model's attention.
    """

    what: str
    fits: list[tuple[str, nn.Module, Maker]]
    whole: bool
    own: str

    def put(self, base: Any) -> Iterator[tuple[str, nn.Module]]:
        for name, module, make in self.fits:
            replacement = make()
            assert replacement is not None, name
            yield name, module
            base.set_submodule(name, replacement.train(module.training))
        if self.what == "attention" and self.whole:
            AttentionInterface.register(UNMASKED, _never)
            AttentionMaskInterface.register(UNMASKED, gpu.no_mask)
            base.set_attn_implementation(UNMASKED)
        elif self.what == "attention":
            rowwise.register(base)  # for the other layers

    def take_back(self, base: Any) -> None:
        restore(base, [(name, module) for name, module, _ in self.fits])
        if self.what == "attention":
            base.set_attn_implementation(self.own)

    def agreed(self, base: Any, trial: ParityCheck, replaced: list[tuple[str, nn.Module]]) -> bool:
        """Put in, if the whole model then gives the same."""
        replaced += self.put(base)
        if trial.agrees():
            return True
        self.take_back(base)
        return False


KINDS = {"attention": "attn", "feed-forward layers": "mlp", "norms": "norm"}
"""What is replaced, and how the names of such layers end."""


def _kinds(base: Any, reader: Reader, sights: Mapping[nn.Module, Sight], *, plain: bool) -> list[_Kind]:
    """What could be replaced, by the classes of the layers and their masks."""
    layouts = PerBatch(Layout.of)
    fast: dict[str, list[tuple[str, nn.Module, Maker]]] = {what: [] for what in KINDS}
    rest = dict.fromkeys(KINDS, 0)
    for name, module in list(base.get_decoder().named_modules(prefix=_decoder_path(base))):
        what = next((what for what, ending in KINDS.items() if name.endswith(ending)), "")
        made_as, make = _maker(module, reader, sights.get(module), layouts)
        if make() is not None:
            fast[made_as].append((name, module, make))
        elif what or module in sights:
            rest[what or "attention"] += 1
    own = base.config._attn_implementation
    kinds = [_Kind(what, fits, not rest[what] and bool(fits), own) for what, fits in fast.items()]
    return [kind for kind in kinds if kind.whole or kind.what != "attention" or (own == "sdpa" and plain)]


def _decoder_path(base: Any) -> str:
    decoder = base.get_decoder()
    return next((name for name, module in base.named_modules() if module is decoder), "")


def _maker(module: nn.Module, reader: Reader, sight: Sight | None, layouts: PerBatch[Layout]) -> tuple[str, Maker]:
    """What kind a layer is of, and what makes that which can stand in its place."""
    form = form_of(module)
    if form == GATED:
        return "feed-forward layers", partial(gated, module, reader)
    if form == NORM:
        return "norms", partial(norm, module)
    if form in (ATTENTION, UNTURNED) and sight is not None:
        return "attention", partial(attention, module, reader, sight, layouts, turned=form == ATTENTION)
    return "", lambda: None


def attention(
    module: Any, reader: Reader, sight: Sight, layouts: PerBatch[Layout], *, turned: bool = True
) -> FastAttention | None:
    """What can stand in the place of a layer of attention, by its structure alone; None: it has another one."""
    children = dict(module.named_children())
    joined = _read(children, [("q_proj", "k_proj", "v_proj"), ("qkv_proj",)], reader)
    out, norms = _read(children, [("o_proj",)], reader), _head_norms(children)
    others = children.keys() - {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"}
    if joined is None or out is None or others or _own_parameters(module) or _drops(module):
        return None
    if (norms is None) != ("q_norm" not in children and "k_norm" not in children):
        return None
    heads, size = sight.heads // sight.groups, sight.size
    wide = (sight.heads + 2 * sight.groups) * size
    if joined.weight.shape[0] != wide or out.weight.shape[1] != sight.heads * size:
        return None
    part = SelfAttention(joined, out, sight.groups, heads, size, sight.scale, fused_ops(out.weight), norms)
    return FastAttention(module, part, sight.window, layouts, turned=turned)


def _drops(module: nn.Module) -> bool:
    """Whether a layer drops out something of its own in training."""
    return any("dropout" in name and value for name, value in vars(module).items())


def _own_parameters(module: nn.Module) -> bool:
    """Such as attention sinks."""
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _head_norms(children: Mapping[str, Any]) -> HeadNorms | None:
    query, key = (norm(children[name]) if name in children else None for name in ("q_norm", "k_norm"))
    if query is None or key is None or query.epsilon != key.epsilon:
        return None
    return HeadNorms(query.weight, key.weight, query.epsilon)


def _read(children: Mapping[str, Any], choices: Sequence[tuple[str, ...]], reader: Reader) -> Projection | None:
    """The first choice of names that are all there, as one product; None if none is, or one of them is not plain."""
    for names in choices:
        if children.keys() >= set(names):
            layers = [layer for name in names if (layer := reader(children[name])) is not None]
            return Projection(layers) if len(layers) == len(names) else None
    return None


def gated(module: nn.Module, reader: Reader) -> FastGatedLayer | None:
    """What can stand in the place of a gated feed-forward layer, by its structure alone; None: it has another one."""
    children = dict(module.named_children())
    joined = _read(children, [("gate_proj", "up_proj"), ("gate_up_proj",)], reader)
    down = _read(children, [("down_proj",)], reader)
    if joined is None or down is None or _own_parameters(module) or _drops(module):
        return None
    if joined.weight.shape[0] != 2 * down.weight.shape[1]:
        return None
    return FastGatedLayer(module, GatedLayer(joined, down, fused_ops(down.weight)))


def norm(module: Any) -> FastNorm | None:
    """What can stand in the place of a norm, by its structure alone; None: it has another one."""
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.requires_grad or not isinstance(epsilon, float):
        return None
    if weight.dim() != 1 or dict(module.named_parameters()).keys() != {"weight"}:
        return None
    return FastNorm(module, epsilon, fused_ops(weight))


def _put_rowwise(base: Any) -> list[tuple[str, nn.Module]]:
    """Have the model's own attention go row by row; no layer goes."""
    rowwise.register(base)
    return []


def _put_head(name: str, head: nn.Linear, base: Any) -> list[tuple[str, nn.Module]]:
    """Let the output layer make the loss."""
    base.set_submodule(name, LossHead(head))
    return [(name, head)]


def _head(base: PreTrainedModel) -> tuple[str, nn.Linear] | None:
    """The output layer, if it is a plain one and its product is what the model returns."""
    head = base.get_output_embeddings()
    names = [name for name, module in base.named_modules() if module is head]
    if type(head) is not nn.Linear or not names or any(one.requires_grad for one in head.parameters()):
        return None
    return (names[0], head) if _is_all(base, head) else None


@torch.no_grad()
def _is_all(base: PreTrainedModel, head: nn.Linear) -> bool:
    """Whether logits are the product of this layer and nothing else; a model that fails on bare ids has other needs."""
    ids = torch.arange(8, device=base.device).view(1, -1) % base.config.get_text_config().vocab_size
    try:
        with evaluating(base):
            hidden = base.get_decoder()(ids, use_cache=False).last_hidden_state
            return torch.equal(base(ids, use_cache=False).logits, head(hidden))
    except Exception:
        _log.debug("the loss is left to the model, which does not run on bare ids", exc_info=True)
        return False


def _never(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a layer of attention was left out")


def expect(model: Any, labels: Tensor) -> None:
    """Have the next forward pass give the summed loss of these labels in place of logits, where that can be had."""
    head = model.get_output_embeddings()
    if isinstance(head, LossHead):
        head.labels = labels
