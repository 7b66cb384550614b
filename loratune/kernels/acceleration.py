"""Which layers of a model are replaced by kernels while it is trained: those that are known to compute the same.

There are two safeguards. The class of a layer must be in the list of those that were compared with their replacement
(`recognition`), and what a layer attends to must be what the model's own mask says (`masks`). Then the whole model must
still compute the same, forward and backward (`parity_check`).
"""

import ctypes
import logging
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from loratune.kernels import gpu, masks, reference, replacements, rowwise
from loratune.kernels.attention import Layout, PerBatch
from loratune.kernels.fused_ops import fused_ops
from loratune.kernels.loss import LossHead
from loratune.kernels.masks import Sight
from loratune.kernels.parity_check import LONG_ROWS, ParityCheck, computes_trees, evaluating
from loratune.kernels.recognition import form_of
from loratune.kernels.replacements import Reader, restore
from loratune.kernels.upstream import attn_implementation, is_fake

_log = logging.getLogger(__name__)

ATTENTION, ATTENTION_WITHOUT_ROTARY, GATED, NORM = "attention", "attention without positions", "gated", "norm"
"""The forms of replacements, as the list of checked layers names them."""
UNMASKED = "loratune"
"""The attention implementation of a model all of whose layers of attention are replaced."""
SHARDED = "all layers, as the base is spread over processes"
KINDS = {"attention": "attn", "feed-forward layers": "mlp", "norms": "norm"}
"""The kinds of layers that are replaced, and how the names of such layers end."""

Factory = Callable[[], nn.Module | None]
"""Makes the replacement of a layer; None: it has none."""
Step = Callable[[Any], Iterable[tuple[str, nn.Module]]]
"""Puts kernels into a base. Yields path and module of each layer, just before it is replaced."""
Replaced = list[tuple[str, nn.Module]]
"""Path and module of layers that are replaced."""


@dataclass(frozen=True)
class Acceleration:
    """Which layers of a model are accelerated, as `accelerate` determined.

    Attributes:
        fallbacks: Kinds of layers that are not accelerated.
        steps: What puts the kernels into the model, in this order.
    """

    fallbacks: list[str]
    steps: Sequence[Step] = ()

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Inside, the layers are accelerated; they are not checked again.

        model: the one that `accelerate` examined; its adapter may be disabled. Batches come without a cache, and padded
        at the end of rows, if at all.
        """
        with _restored(model.get_base_model()) as (base, replaced):
            for step in self.steps:
                replaced += step(base)
            yield


def accelerate(model: Any, reader: Reader, *, sharded: bool = False) -> Acceleration:
    """Determine which layers of a model can be accelerated. The model is run for this, and stays as it is.

    Args:
        model: A `PeftModel` around a causal language model of transformers; on a GPU, see `gpu.replace`.
        reader: Takes a module to its linear layer and LoRA.
        sharded: No process will hold whole layers during training, so none can be replaced.
    """
    if sharded:
        return Acceleration([SHARDED])
    with _restored(model.get_base_model()) as (base, replaced):
        replace = _replace if base.device.type == "cpu" else gpu.replace
        steps, fallbacks = replace(base, reader, replaced)
        head = _head(base)
    if head is None:
        return Acceleration([*fallbacks, "loss"], steps)
    return Acceleration(fallbacks, [*steps, partial(_replace_head, *head)])


@contextmanager
def accelerated(model: Any, reader: Reader, *, sharded: bool = False) -> Iterator[list[str]]:
    """Inside, the layers that `accelerate` finds are accelerated. Yields the kinds of layers that are not."""
    acceleration = accelerate(model, reader, sharded=sharded)
    with acceleration.applied(model):
        yield acceleration.fallbacks


def expect(model: Any, labels: Tensor, places: Tensor | None = None, lengths: Tensor | None = None) -> None:
    """Have the next forward pass return the summed loss of these labels instead of logits, if the model can do it.

    places, lengths: see `LossHead`.
    """
    head = model.get_output_embeddings()
    if isinstance(head, LossHead):
        head.labels, head.places, head.lengths = labels, places, lengths


def tree_refusal(model: Any) -> str | None:
    """Find out whether a batch may be a tree of rows that share prefixes.

    All layers of attention must be replaced by ours, which read from positions what each token attends to, and so must
    the output layer, whose loss can count a token several times. Nothing may be dropped out, as a shared token would
    have one mask. Then the model must compute the same for a tree as for its rows, forward and backward.

    Args:
        model: A `PeftModel`, while it is accelerated.

    Returns:
        Why it may not, as the rest of a sentence on the model; None if it may.
    """
    base = model.get_base_model()
    if attn_implementation(base) != UNMASKED:
        return "has attention that is not accelerated"
    if not isinstance(model.get_output_embeddings(), LossHead):
        return "has a loss that is not accelerated"
    if any(map(_drops_out, model.modules())):
        return "drops out values in training (as with lora_dropout above 0), and rows would share the mask of a prefix"
    return None if computes_trees(base) else "computes something else for rows that share a prefix"


def _drops_out(module: nn.Module) -> bool:
    numbers = {name: value for name, value in vars(module).items() if isinstance(value, float) and value > 0}
    return any("dropout" in name for name in numbers) or (isinstance(module, nn.Dropout) and "p" in numbers)


def keep_pages() -> None:
    """Keep freed memory in the process, where the C library is glibc.

    By default each large tensor gets fresh pages from the kernel, and each of them costs a page fault: 0.35 s of system
    time per GB.
    """
    trim_threshold, mmap_max = -1, -4  # Options of mallopt(3).
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(mmap_max, 0)
        library.mallopt(trim_threshold, 2**31 - 1)


def give_back_pages() -> None:
    """Return free memory to the kernel, such as what loading left in pieces that are too small to be used again."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def _restored(base: Any) -> Iterator[tuple[Any, Replaced]]:
    """Yields the base, and a list of the layers that are replaced inside; they are put back afterwards."""
    replaced: Replaced = []
    implementation = attn_implementation(base)
    try:
        yield base, replaced
    finally:
        if attn_implementation(base) != implementation:
            base.set_attn_implementation(implementation)
        restore(base, replaced)


def _replace(base: Any, reader: Reader, replaced: Replaced) -> tuple[list[Step], list[str]]:
    """Replace layers on a CPU.

    Args:
        base: A causal language model of transformers.
        reader: Takes a module to its linear layer and LoRA.
        replaced: Receives path and module of each layer that is replaced.

    Returns:
        The steps that replace them again, and the kinds of layers that are not accelerated.
    """
    check, ops = ParityCheck(base), fused_ops(base.get_input_embeddings().weight)
    survey = masks.survey(base)
    kinds: list[_Kind] = []
    if check.runs:
        kinds = _kinds(base, reader, survey.sights, stock_masks=survey.stock_masks)
        kinds = [kind for kind in kinds if kind.layers]
    if ops is reference:
        kinds = [kind for kind in kinds if kind.name != "attention"]  # torch's own is faster than the reference.
    for kind in kinds:
        replaced += kind.replace(base)
    if kinds and not check.passes():
        for kind in reversed(kinds):
            kind.undo(base)
        check.prepare()
        kinds = [kind for kind in kinds if kind.replace_if_equal(base, check, replaced)]
    steps: list[Step] = [kind.replace for kind in kinds]
    own_attention = check.runs and survey.stock_masks and not any(kind.name == "attention" for kind in kinds)
    if own_attention and rowwise.attend_by_rows(base, ParityCheck(base, LONG_ROWS).passes):
        steps.append(_register_rowwise)
    fallbacks = [name for name in KINDS if not any(kind.name == name and kind.complete for kind in kinds)]
    if ops is reference:  # torch computes what would be fused operations.
        fallbacks = [*(name for name in fallbacks if name != "norms"), "norms, rotations and activations"]
    return steps, fallbacks


@dataclass
class _Kind:
    """Layers that are replaced together, or not at all.

    Attributes:
        name: One of `KINDS`.
        layers: Path and module of each, and what makes its replacement, of its weights and adapter at that time.
        complete: Whether these are all layers of their kind.
        implementation: The model's own attention implementation.
    """

    name: str
    layers: list[tuple[str, nn.Module, Factory]]
    complete: bool
    implementation: str

    def replace(self, base: Any) -> Iterator[tuple[str, nn.Module]]:
        for name, module, factory in self.layers:
            replacement = factory()
            assert replacement is not None, name
            yield name, module
            base.set_submodule(name, replacement.train(module.training))
        if self.name == "attention" and self.complete:
            AttentionInterface.register(UNMASKED, _unreachable)
            AttentionMaskInterface.register(UNMASKED, gpu.no_mask)
            base.set_attn_implementation(UNMASKED)
        elif self.name == "attention":
            rowwise.register(base)  # For the other layers of attention.

    def undo(self, base: Any) -> None:
        restore(base, [(name, module) for name, module, _ in self.layers])
        if self.name == "attention":
            base.set_attn_implementation(self.implementation)

    def replace_if_equal(self, base: Any, check: ParityCheck, replaced: Replaced) -> bool:
        """Replace the layers, and undo it unless the whole model then computes the same."""
        replaced += self.replace(base)
        if check.passes():
            return True
        self.undo(base)
        return False


def _kinds(base: Any, reader: Reader, sights: Mapping[nn.Module, Sight], *, stock_masks: bool) -> list[_Kind]:
    """The layers that could be replaced, by their classes and masks."""
    layouts = PerBatch(Layout.of)
    layers: dict[str, list[tuple[str, nn.Module, Factory]]] = {kind: [] for kind in KINDS}
    others = dict.fromkeys(KINDS, 0)
    for name, module in list(base.get_decoder().named_modules(prefix=_decoder_path(base))):
        kind_by_name = next((kind for kind, ending in KINDS.items() if name.endswith(ending)), "")
        kind, factory = _factory(module, reader, sights.get(module), layouts)
        if factory() is not None:
            layers[kind].append((name, module, factory))
        elif kind_by_name or module in sights:
            others[kind_by_name or "attention"] += 1
    implementation = attn_implementation(base)
    kinds = [
        _Kind(name, members, complete=bool(members) and not others[name], implementation=implementation)
        for name, members in layers.items()
    ]
    rest_by_rows = implementation == "sdpa" and stock_masks  # Attention that is not replaced can go row by row.
    return [kind for kind in kinds if kind.complete or kind.name != "attention" or rest_by_rows]


def _decoder_path(base: Any) -> str:
    decoder = base.get_decoder()
    return next((name for name, module in base.named_modules() if module is decoder), "")


def _factory(module: nn.Module, reader: Reader, sight: Sight | None, layouts: PerBatch[Layout]) -> tuple[str, Factory]:
    """The kind of a layer, and what makes its replacement."""
    form = form_of(module)
    if form == GATED:
        return "feed-forward layers", partial(replacements.replace_gated, module, reader)
    if form == NORM:
        return "norms", partial(replacements.replace_norm, module)
    if form in (ATTENTION, ATTENTION_WITHOUT_ROTARY) and sight is not None:
        rotary = form == ATTENTION
        return "attention", partial(replacements.replace_attention, module, reader, sight, layouts, rotary=rotary)
    return "", lambda: None


def _register_rowwise(base: Any) -> Replaced:
    """Have the model's own attention go row by row; no layer is replaced."""
    rowwise.register(base)
    return []


def _replace_head(name: str, head: nn.Linear, base: Any) -> Replaced:
    """Have the output layer compute the loss."""
    base.set_submodule(name, LossHead(head))
    return [(name, head)]


def _head(base: PreTrainedModel) -> tuple[str, nn.Linear] | None:
    """The output layer, if it is a frozen linear one and its output is what the model returns."""
    head = base.get_output_embeddings()
    names = [name for name, module in base.named_modules() if module is head]
    if type(head) is not nn.Linear or not names or any(weight.requires_grad for weight in head.parameters()):
        return None
    return (names[0], head) if _returns_output_of(base, head) else None


@torch.no_grad()
def _returns_output_of(base: PreTrainedModel, head: nn.Linear) -> bool:
    """Whether logits are the output of this layer and nothing else; not if the model does not run on bare ids."""
    ids = torch.arange(8, device=base.device).view(1, -1) % base.config.get_text_config().vocab_size
    outputs: list[Tensor] = []
    hook = head.register_forward_hook(lambda _head, _inputs, output: outputs.append(output))
    try:
        with evaluating(base):
            hidden = base.get_decoder()(ids, use_cache=False).last_hidden_state
            logits = base(ids, use_cache=False).logits
            return logits is outputs[0] if is_fake(logits) else torch.equal(logits, head(hidden))
    except Exception:
        _log.debug("the loss is left to the model, which does not run on bare ids", exc_info=True)
        return False
    finally:
        hook.remove()


def _unreachable(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a layer of attention is not replaced")
