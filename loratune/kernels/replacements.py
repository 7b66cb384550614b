"""Modules that replace layers of a model, and checks that a layer has the structure that its replacement needs."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loratune.kernels.compiled import reference
from loratune.kernels.compiled.fused_ops import fused_ops
from loratune.kernels.compiled.reference import FusedOps
from loratune.kernels.layer_sample import StandIn
from loratune.kernels.layout import Layout, PerBatch, Scoring
from loratune.kernels.lora_linear import Projection, Reader, project
from loratune.kernels.masks import AttentionSpec, check_known
from loratune.kernels.sublayers import ExpertLayers, GatedLayer, HeadNorms, SelfAttention, rms_norm


class Replacement(StandIn):
    """Replaces a module, with the same children and weights, so that they keep their names."""

    def __init__(self, original: nn.Module):
        nn.Module.__init__(self)
        for name, child in original.named_children():
            self.add_module(name, child)
        for name, weight in original.named_parameters(recurse=False):
            self.register_parameter(name, weight)
        self._original = [original]


def with_forward(layer: nn.Module, forward: Callable[[Tensor, bool], Tensor]) -> nn.Module:
    """A copy of a PEFT layer with another forward function, and the same class and children.

    PEFT would not save the weights of layers of another class.

    Args:
        layer: The layer, which is not changed.
        forward: Function of the states, and whether the layer is in training mode.
    """
    other = copy.copy(layer)
    other.forward = lambda x: forward(x, other.training)
    return other


def restore(base: Any, replaced: Sequence[tuple[str, nn.Module]]) -> None:
    """Restore modules. replaced: path and original module of each."""
    for name, original in replaced:
        base.set_submodule(name, original)


class FastAttention(Replacement):
    """Replaces an attention layer. Rows begin where positions are 0; padding is on the right."""

    def __init__(
        self,
        original: nn.Module,
        attention: SelfAttention,
        window: int | None,
        layouts: PerBatch[Layout],
        *,
        rotary: bool,
    ):
        """A replacement.

        Args:
            original: The layer.
            attention: The computation.
            window: The most tokens that a token attends to, including itself.
            layouts: The cache of layouts, shared by all layers of a model.
            rotary: Whether rotary embeddings are applied to queries and keys.
        """
        super().__init__(original)
        self._attention, self._window, self._layouts, self._rotary = attention, window, layouts, rotary

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        position_ids: Tensor,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states: (rows, length, size). Returns the same shape, and no weights. The mask is not read.

        Raises TypeError, ValueError: the input is not a batch of rows from their first token on.
        """
        check_known(others, "attention_mask")
        rows, length, size = hidden_states.shape
        layout = self._layouts.get(position_ids, torch.Size((rows, length)), self._window)
        cosine, sine = self._angles(hidden_states, position_embeddings if self._rotary else None)
        result = self._attention(hidden_states.reshape(-1, size), cosine, sine, layout, training=self.training)
        return result.view(rows, length, -1), None

    def _angles(self, states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """Cosines and sines, (tokens, size of a head), float32 each."""
        rows, length, _ = states.shape
        if position_embeddings is None:
            zero = states.new_zeros(rows * length, self._attention.size, dtype=torch.float32)
            return [zero + 1, zero]
        if any(angles.shape[-1] != self._attention.size or angles.dim() != 3 for angles in position_embeddings):
            raise ValueError(f"angles {position_embeddings[0].shape} for heads of {self._attention.size}")
        return [angles.float().expand(rows, length, -1).reshape(rows * length, -1) for angles in position_embeddings]


class FastGatedLayer(Replacement):
    """Replaces a gated feed-forward layer."""

    def __init__(self, original: nn.Module, layer: GatedLayer):
        super().__init__(original)
        self._layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., size). Returns the same shape."""
        return self._layer(x.reshape(-1, x.shape[-1]), training=self.training).view(*x.shape[:-1], -1)


class FastExperts(Replacement):
    """Replaces the experts of a mixture."""

    def __init__(self, original: nn.Module, experts: ExpertLayers):
        super().__init__(original)
        self._experts = experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: (tokens, size); top_k_index, top_k_weights: (tokens, experts of a token)."""
        return self._experts(hidden_states, top_k_index, top_k_weights)


class FastNorm(Replacement):
    """Replaces an RMS norm. epsilon, added: see `reference.rms_norm`."""

    def __init__(self, original: nn.Module, epsilon: float, added: float, ops: FusedOps):
        super().__init__(original)
        self.epsilon, self.added, self._ops = epsilon, added, ops

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., size). Returns the same shape."""
        # In some families, activations have another dtype than the weights.
        if x.dtype != self.weight.dtype:
            result: Tensor = self._original[0](x)
            return result
        return rms_norm(x, self.weight, self.epsilon, self._ops, self.added)


def replace_attention(
    module: Any,
    reader: Reader,
    spec: AttentionSpec,
    layouts: PerBatch[Layout],
    *,
    rotary: bool = True,
    added: float = 0.0,
    ops: FusedOps | None = None,
) -> FastAttention | None:
    """The replacement of an attention layer, judged by its structure alone; None if the structure does not match.

    rotary: whether rotary embeddings are applied; added: what the norms of heads add to their weights; ops: None for
    those of the weights' dtype.
    """
    children = dict(module.named_children())
    joined = _projection(children, [("q_proj", "k_proj", "v_proj"), ("qkv_proj",)], reader)
    out, norms = _projection(children, [("o_proj",)], reader), _head_norms(children, added)
    others = children.keys() - {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"}
    if joined is None or out is None or others or _has_own_tensors(module) or _has_dropout(module):
        return None
    if not spec.is_plain or (norms is None) != ("q_norm" not in children and "k_norm" not in children):
        return None
    heads, size = spec.heads // spec.groups, spec.size
    width = (spec.heads + 2 * spec.groups) * size
    if joined.weight.shape[0] != width or out.weight.shape[1] != spec.heads * size:
        return None
    ops = ops or fused_ops(out.weight)
    scoring = Scoring(spec.scale, spec.cap)
    attention = SelfAttention(joined, out, spec.groups, heads, size, scoring, ops, norms)
    return FastAttention(module, attention, spec.window, layouts, rotary=rotary)


def replace_gated(
    module: nn.Module,
    reader: Reader,
    activation: tuple[float, float] = reference.SILU,
    ops: FusedOps | None = None,
) -> FastGatedLayer | None:
    """The replacement of a gated feed-forward layer, judged by its structure alone; None if it does not match."""
    children = dict(module.named_children())
    others = (child for name, child in children.items() if name not in _OF_GATED)
    if any(True for child in others for _ in (*child.parameters(), *child.buffers())):
        return None
    joined = _projection(children, [("gate_proj", "up_proj"), ("gate_up_proj",)], reader)
    down = _projection(children, [("down_proj",)], reader)
    if joined is None or down is None or _has_own_tensors(module) or _has_dropout(module):
        return None
    if joined.weight.shape[0] != 2 * down.weight.shape[1]:
        return None
    return FastGatedLayer(module, GatedLayer(joined, down, ops or fused_ops(down.weight), activation))


_OF_GATED = frozenset({"gate_proj", "up_proj", "gate_up_proj", "down_proj"})
"""The parts of gated layers that have weights."""


def replace_experts(
    module: nn.Module, activation: tuple[float, float] = reference.SILU, ops: FusedOps | None = None
) -> FastExperts | None:
    """The replacement of the experts of a mixture, judged by their structure alone; None if it does not match."""
    weights = dict(module.named_parameters())
    if weights.keys() != {"gate_up_proj", "down_proj"} or any(weight.requires_grad for weight in weights.values()):
        return None
    gate_up, down = weights["gate_up_proj"], weights["down_proj"]
    if gate_up.dim() != 3 or gate_up.shape != (len(down), 2 * down.shape[2], down.shape[1]):
        return None
    return FastExperts(module, ExpertLayers(gate_up.detach(), down.detach(), ops or fused_ops(down), activation))


def replace_linear(module: nn.Module, reader: Reader) -> nn.Module | None:
    """The replacement of a linear layer with or without LoRA; None for other modules."""
    part = reader(module)
    if part is None:
        return None
    layer = Projection([part])
    return with_forward(module, lambda x, training: project(x, layer, training=training))


def replace_norm(module: Any, added: float = 0.0, ops: FusedOps | None = None) -> FastNorm | None:
    """The replacement of a norm, judged by its structure alone; None if it does not match.

    added: what is added to its weight.
    """
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.requires_grad or not isinstance(epsilon, float):
        return None
    if weight.dim() != 1 or dict(module.named_parameters()).keys() != {"weight"} or [*module.buffers()]:
        return None
    return FastNorm(module, epsilon, added, ops or fused_ops(weight))


def _has_dropout(module: nn.Module) -> bool:
    """Whether a layer has its own dropout."""
    return any("dropout" in name and value for name, value in vars(module).items())


def _has_own_tensors(module: nn.Module) -> bool:
    """Whether a layer has parameters or buffers besides those of its children, such as attention sinks."""
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _head_norms(children: Mapping[str, Any], added: float) -> HeadNorms | None:
    query, key = (replace_norm(children[name], added) if name in children else None for name in ("q_norm", "k_norm"))
    if query is None or key is None or query.epsilon != key.epsilon:
        return None
    return HeadNorms(query.weight, key.weight, query.epsilon, added)


def _projection(children: Mapping[str, Any], choices: Sequence[tuple[str, ...]], reader: Reader) -> Projection | None:
    """The projection of the first group of names that all exist; None if there is none, or a layer is not linear."""
    for names in choices:
        if children.keys() >= set(names):
            layers = [layer for name in names if (layer := reader(children[name])) is not None]
            return Projection(layers) if len(layers) == len(names) else None
    return None
