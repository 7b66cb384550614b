"""Which layers of a model are computed the fast way while it is trained: those that it gives the same numbers for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from loratune.kernels import gpu, plain, rowwise
from loratune.kernels.attention import HeadNorms, Layout, SelfAttention
from loratune.kernels.feedforward import GatedLayer, rms_norm
from loratune.kernels.loss import LossHead
from loratune.kernels.native import passes
from loratune.kernels.plain import Passes
from loratune.kernels.projection import Adapted, Projection
from loratune.kernels.replacing import PerBatch, Replacement, restore
from loratune.kernels.trial import ROWS, alike, apart, evaluating, tried

Reader = Callable[[nn.Module], Adapted | None]
"""From a module to the linear layer and the LoRA that it is, or None: it is something else."""

TOLERANCES = {torch.bfloat16: 0.06, torch.float16: 0.06}
"""Of the spread of what comes out of a layer; rounding alone makes up to 0.02."""
TOLERANCE = 1e-4
CAPS = ("attn_logit_softcapping", "clip_qkv")  # in a configuration: limits that no trial reaches
UNMASKED = "loratune"


class FastAttention(Replacement):
    """In the place of a layer of attention, with the same children. Rows begin where positions are 0; what pads them
    stands at their end."""

    def __init__(self, original: nn.Module, part: SelfAttention, window: int | None, layouts: "PerBatch[Layout]"):
        super().__init__(original)
        self._part, self.window, self._layouts = part, window, layouts

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], position_ids: Tensor, **_: Any
    ) -> tuple[Tensor, None]:
        """hidden_states: (rows, length, size). Returns the same shape, and no weights. There must be no cache."""
        shape = hidden_states.shape
        layout = self._layouts.of(position_ids, shape[:2], self.window)
        cosine, sine = (one.expand(*shape[:2], -1).reshape(shape[0] * shape[1], -1) for one in position_embeddings)
        result = self._part(hidden_states.reshape(-1, shape[-1]), cosine, sine, layout, training=self.training)
        return result.view(*shape[:2], -1), None


class FastGatedLayer(Replacement):
    """In the place of a gated feed-forward layer, with the same children."""

    def __init__(self, original: nn.Module, part: GatedLayer):
        super().__init__(original)
        self._part = part

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., size)."""
        return self._part(x.reshape(-1, x.shape[-1]), training=self.training).view(*x.shape[:-1], -1)


class FastNorm(nn.Module):
    """In the place of a root mean square norm, with the same weight."""

    def __init__(self, weight: nn.Parameter, epsilon: float, over: Passes):
        super().__init__()
        self.weight, self.epsilon, self._passes = weight, epsilon, over

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., size)."""
        return rms_norm(x, self.weight, self.epsilon, self._passes)


SHARDED = "all layers, as the base is spread over processes"


@contextmanager
def fitted(model: Any, reader: Reader, *, sharded: bool = False) -> Iterator[list[str]]:
    """Inside, the layers of a model that are understood are computed by this room; the rest is left alone.

    model: a `PeftModel` around a causal language model of transformers. A layer is replaced if it gives the same
    numbers on random rows, so a family that computes otherwise stays as it is; on a GPU, see `gpu.replace`. Yields what
    stays, in words. Batches must be padded at the end of rows, if at all, and come without a cache.

    sharded: no process will hold whole layers while it trains, so all stay as they are.
    """
    if sharded:
        yield [SHARDED]
        return
    base = model.get_base_model()
    replaced: list[tuple[str, nn.Module]] = []
    implementation = base.config._attn_implementation
    try:
        fit = _replace if base.device.type == "cpu" else gpu.replace
        left = fit(base, reader, replaced)
        yield left if _headed(base, replaced) else [*left, "loss"]
    finally:
        if base.config._attn_implementation != implementation:
            base.set_attn_implementation(implementation)
        restore(base, replaced)


def _replace(base: Any, reader: Reader, replaced: list[tuple[str, nn.Module]]) -> list[str]:
    """Put fast modules in their places. replaced: gets path and module of each that went. Returns what stays."""
    layouts, left, before = PerBatch(Layout.of), [], tried(base)
    over = passes(base.get_input_embeddings().weight)
    kinds: dict[str, tuple[str, Callable[[Any], nn.Module | None]]] = {
        "attention": ("attn", lambda module: _attention(module, reader, layouts)),
        "feed-forward layers": ("mlp", lambda module: _gated(module, reader)),
        "norms": ("norm", _norm),
    }
    for what, (ending, build) in kinds.items():
        found = [(name, module) for name, module in base.named_modules() if name.endswith(ending)]
        if what == "attention" and over is plain:
            found = []  # torch's own is faster than the reference
        fits = [(name, module, made) for name, module in found if (made := _fast(base, what, module, build))]
        for name, module, made in fits:
            replaced.append((name, module))
            base.set_submodule(name, made.train(module.training))
        if len(fits) < len(found) or not found:
            left.append(what)
    if "attention" not in left and not _unmasked(base, before):
        left.append("attention")
        restore(base, [one for one in replaced if isinstance(base.get_submodule(one[0]), FastAttention)])
    if "attention" in left:
        rowwise.attend(base, lambda: alike(before, tried(base, backward=True)))
    return [*left, "passes in C"] if over is plain else left


def _unmasked(base: Any, before: Tensor | None) -> bool:
    """Have no masks made for layers that read rows off the positions, if the whole model then gives the same."""
    own = base.config._attn_implementation
    AttentionInterface.register(UNMASKED, _never)
    AttentionMaskInterface.register(UNMASKED, gpu.no_mask)
    base.set_attn_implementation(UNMASKED)
    if alike(before, tried(base)):
        return True
    base.set_attn_implementation(own)
    return False


def _fast(base: Any, what: str, module: nn.Module, build: Callable[[Any], nn.Module | None]) -> nn.Module | None:
    """The fast module that does what this one does, if there is one."""
    try:
        made = build(module)
        return made if made is not None and _agrees(base, what, module, made) else None
    except Exception:  # what a family lacks, or raises on what it does not know, is its own choice
        return None


def _attention(module: Any, reader: Reader, layouts: PerBatch[Layout]) -> nn.Module | None:
    children = dict(module.named_children())
    joined = _read(children, [("q_proj", "k_proj", "v_proj"), ("qkv_proj",)], reader)
    out = _read(children, [("o_proj",)], reader)
    size, norms = getattr(module, "head_dim", None), _head_norms(children)
    others = children.keys() - {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"}
    if joined is None or out is None or size is None or others or getattr(module, "attention_dropout", False):
        return None
    if (norms is None) != ("q_norm" not in children):
        return None
    known = module.config.to_dict()
    if any(known.get(cap) for cap in CAPS) or known.get("attention_chunk_size") or _own_parameters(module):
        return None
    groups = known.get("num_key_value_heads") or known["num_attention_heads"]
    heads = out.weight.shape[1] // (groups * size)
    part = SelfAttention(joined, out, groups, heads, float(module.scaling), passes(out.weight), norms)
    return FastAttention(module, part, _window(module, known), layouts)


def _window(module: Any, known: Mapping[str, Any]) -> int | None:
    """How many tokens a layer sees at most. known: its configuration."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window or None
    types = known.get("layer_types")
    if types and types[module.layer_idx] != "sliding_attention":
        return None
    return known.get("sliding_window") or None


def _own_parameters(module: nn.Module) -> bool:
    """Such as attention sinks."""
    return any(True for _ in module.parameters(recurse=False))


def _head_norms(children: Mapping[str, Any]) -> HeadNorms | None:
    query, key = (_norm(children[name]) if name in children else None for name in ("q_norm", "k_norm"))
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


def _gated(module: nn.Module, reader: Reader) -> nn.Module | None:
    children = dict(module.named_children())
    joined = _read(children, [("gate_proj", "up_proj"), ("gate_up_proj",)], reader)
    down = _read(children, [("down_proj",)], reader)
    if joined is None or down is None:
        return None
    return FastGatedLayer(module, GatedLayer(joined, down, passes(down.weight)))


def _norm(module: Any) -> FastNorm | None:
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.requires_grad or not isinstance(epsilon, float):
        return None
    if weight.dim() != 1 or dict(module.named_parameters()).keys() != {"weight"}:
        return None
    return FastNorm(weight, epsilon, passes(weight))


def _headed(base: Any, replaced: list[tuple[str, nn.Module]]) -> bool:
    """Let the output layer make the loss, if it can."""
    if (head := _head(base)) is None:
        return False
    replaced.append(head)
    base.set_submodule(head[0], LossHead(head[1]))
    return True


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
        return False


@torch.no_grad()
def _agrees(base: PreTrainedModel, what: str, module: nn.Module, made: nn.Module) -> bool:
    """Whether two modules make the same of random numbers, but for rounding."""
    size, dtype = base.get_input_embeddings().weight.shape[1], base.get_input_embeddings().weight.dtype
    weight = next(module.parameters())
    if weight.dtype != dtype:
        return False  # such as norms that are kept in float32
    if what == "norms":
        size = weight.shape[0]
    x = torch.randn(1, sum(ROWS), size, generator=torch.Generator().manual_seed(0)).to(dtype)
    given = _surroundings(base, x, made.window) if isinstance(made, FastAttention) else {}
    with evaluating(module), evaluating(made):
        old, new = module(x, **given), made(x, **given)
    old, new = (one[0] if isinstance(one, tuple) else one for one in (old, new))
    return apart(old, new) <= TOLERANCES.get(x.dtype, TOLERANCE)


def _surroundings(base: PreTrainedModel, x: Tensor, window: int | None) -> dict[str, Any]:
    """What a layer of attention is given beside its input."""
    positions = torch.cat([torch.arange(length) for length in ROWS])[None]
    starts = Layout.of(positions[0], window).starts
    places = torch.arange(len(starts))
    seen = (places >= starts[:, None]) & (places <= places[:, None])
    mask = torch.zeros(len(starts), len(starts), dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
    rotary: Any = base.get_decoder().rotary_emb
    return {
        "position_embeddings": rotary(x, positions), "position_ids": positions, "attention_mask": mask[None, None],
    }  # fmt: skip


def _never(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a layer of attention was left out")


def expect(model: Any, labels: Tensor) -> None:
    """Have the next forward pass give the summed loss of these labels in place of logits, where that can be had."""
    head = model.get_output_embeddings()
    if isinstance(head, LossHead):
        head.labels = labels
