"""Models of many like layers: two shallow ones tell what a deep one takes."""

import logging
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

from torch import nn

from loratune.memory.trace import Step, Traced, run, unweighted

_log = logging.getLogger(__name__)

SHALLOW = 16
"""Models of up to so many layers are traced whole."""
LONGEST_PERIOD = 8
"""Layers that differ may repeat after so many, as where one in six attends to everything."""


def traced(model: Any, step: Step, saving: Set[str]) -> Traced | None:
    """A step of `model`, or None if its code cannot run without data.

    saving: see `unweighted`. Layers that repeat in a deep model are traced at two depths; the rest lies on a line.
    """
    text = model.config.get_text_config()
    layers = layer_count(model)
    stack = next((part for part in model.modules() if _is_stack(part, layers)), None)
    repeat = _repeat(stack, text.to_dict().get("layer_types")) if stack is not None else None
    with _quiet():
        try:
            if stack is None or repeat is None:
                return run(unweighted(model, step, saving, set()), step)
            start, period = repeat
            deep = start + (len(stack) - start) % period + 2 * period
            less, more = (_at_depth(model, stack, kept, step, saving) for kept in (deep - period, deep))
            return more.extended(less, (len(stack) - deep) // period)
        except Exception:  # code that reads numbers fails without them, in as many ways as there are models
            _log.debug("activations are estimated by a formula: the model does not run without data", exc_info=True)
            return None


def layer_count(model: Any) -> int:
    """The number of layers. Where the configuration has none (BLT has several stacks), that of the longest stack."""
    text = model.config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    stacks = (len(part) for part in model.modules() if isinstance(part, nn.ModuleList))
    return layers if isinstance(layers, int) else max(stacks, default=1)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs an operation that fails without data as an error of its own."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _is_stack(module: nn.Module, layers: int) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == layers > SHALLOW


def _at_depth(model: Any, stack: nn.ModuleList, kept: int, step: Step, saving: Set[str]) -> Traced:
    made = unweighted(model, step, saving, set(stack[kept:]))
    copied = next(part for part in made.modules() if _is_stack(part, len(stack)))
    made.config.get_text_config().num_hidden_layers = kept
    del copied[kept:]
    return run(made, step)


def _repeat(stack: nn.ModuleList, types: Sequence[str] | None) -> tuple[int, int] | None:
    """The first layer from which on layers repeat, and after how many; None where they do not, or not for long.

    types: what the configuration calls each layer, such as full_attention; some list more layers than there are.
    """
    called = types if types and len(types) == len(stack) else [""] * len(stack)
    kinds = [(kind, _parts(layer)) for kind, layer in zip(called, stack, strict=True)]
    for period in range(1, LONGEST_PERIOD + 1):
        start = len(kinds) - period
        while start > 0 and kinds[start - 1] == kinds[start - 1 + period]:
            start -= 1
        if len(kinds) - start >= 4 * period:
            return start, period
    return None


def _parts(layer: nn.Module) -> tuple[object, ...]:
    """What makes layers differ in memory: their modules, the shapes of their weights, and what is trained."""
    classes = tuple(type(module) for module in layer.modules())
    return classes, tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
