"""What each layer of attention sees, and with which arguments: asked of the model itself, not of its configuration.

transformers hands every layer a mask, which a function makes of positions of queries and keys, and every layer hands
its queries, keys and values to a function that is looked up by name. Under a name of ours both are caught: the mask's
function is called with positions far beyond any window, at no cost but these calls.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from loratune.kernels.parity_check import evaluating

_log = logging.getLogger(__name__)

NAME = "loratune-probe"
REACH = 1 << 18
"""Tokens back from which keys are looked at; a window of as many or more is none."""
QUERIES = (1 << 22, (1 << 20) + 977, 40961, 977, 3)
"""Positions of queries that are tried: what depends on more than the distance, as chunks do, shows at one of them."""
HARMLESS = frozenset({
    "scaling", "dropout", "sliding_window", "position_ids", "cache_position", "is_causal", "output_attentions",
    "output_hidden_states", "use_cache", "return_dict", "position_embeddings", "logits_to_keep", "labels",
    "num_items_in_batch", "input_ids", "inputs_embeds",
})  # fmt: skip
"""Arguments of attention that change no number, or that `Sight` holds."""


@dataclass(frozen=True)
class Sight:
    """How a layer attends: causally, within rows, and to at most `window` tokens, itself among them.

    heads: of queries, which share `groups` heads of keys and values, all of them of one `size`; scale: of the scores.
    """

    window: int | None
    heads: int
    groups: int
    size: int
    scale: float


class _Probe:
    """The attention function and the mask function that take note of what they are given."""

    def __init__(self) -> None:
        self.sights: dict[nn.Module, Sight] = {}
        self.refused: set[nn.Module] = set()
        self.altered = False
        """Whether a layer was given another mask than transformers made, as where its family chooses among keys."""
        self._windows: dict[int, int | None] = {}
        self._kept: list[Any] = []

    def mask(self, *_: Any, mask_function: Callable[..., Tensor], attention_mask: Any = None, **__: Any) -> Any:
        """In place of a mask: what makes it."""
        self._kept.append(mask_function)  # so that no other gets its id
        return _Mask(mask_function, padded=attention_mask is not None)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
    ) -> tuple[Tensor, None]:
        """Takes note of a layer, and gives zeros. query: (rows, heads, length, size)."""
        rows, heads, length, size = query.shape
        self.altered |= not isinstance(attention_mask, _Mask)
        sight = None
        if key.shape == value.shape and key.shape[-1] == size and heads % key.shape[1] == 0 and _harmless(given):
            window = self._window(attention_mask)
            if window != 0:
                scale = given.get("scaling")
                sight = Sight(window, heads, key.shape[1], size, float(size**-0.5 if scale is None else scale))
        if sight is None or self.sights.setdefault(module, sight) != sight:
            self.refused.add(module)
        return query.new_zeros(rows, length, heads, value.shape[-1]), None

    def _window(self, mask: Any) -> int | None:
        """None: there is none; 0: the mask is of another kind."""
        if not isinstance(mask, _Mask) or mask.padded:
            return 0
        if id(mask.function) not in self._windows:
            try:
                self._windows[id(mask.function)] = window_of(mask.function)
            except Exception:  # a function of a family's own may look at what there is not here
                _log.debug("a mask is not understood", exc_info=True)
                self._windows[id(mask.function)] = 0
        return self._windows[id(mask.function)]


@dataclass(frozen=True)
class _Mask:
    function: Callable[..., Tensor]
    padded: bool


def _harmless(given: dict[str, Any]) -> bool:
    if given.get("dropout") or given.get("is_causal") is False:
        return False
    return not any(name not in HARMLESS and value is not None and value is not False for name, value in given.items())


def window_of(function: Callable[..., Tensor]) -> int | None:
    """How many tokens a causal mask shows a query, itself among them; None if all before it; 0 if it is no such mask.

    function: of transformers' `masking_utils`, from the numbers of row, head, query and key to whether it is seen.
    """
    counts: list[tuple[int, int]] = []  # of keys that are seen, of keys that there are
    none = torch.zeros((), dtype=torch.long)
    for query in QUERIES:
        later = torch.arange(query + 64, query, -1)
        back = torch.arange(query, max(query - REACH, -1), -1)
        ahead, seen = (
            torch.as_tensor(function(none, none, torch.full_like(keys, query), keys)).expand(keys.shape)
            for keys in (later, back)
        )
        count = int(seen.int().cumprod(0).sum())
        if bool(ahead.any()) or count != int(seen.sum()):
            return 0
        counts.append((count, len(back)))
    window = max(count for count, _ in counts)
    if any(count != min(window, there) for count, there in counts):
        return 0
    return window if window < REACH else None


@dataclass(frozen=True)
class Survey:
    """How the layers of a model attend that go through transformers' interface.

    sights: of the layers whose mask is understood; plain: whether all layers get masks as transformers makes them,
    understood or not.
    """

    sights: dict[nn.Module, Sight]
    plain: bool


def survey(base: Any) -> Survey:
    """Look at a causal language model of transformers; nothing is found where it does not run on a bare row."""
    probe = _Probe()
    ids = (torch.arange(8) + 8).view(1, -1).to(base.device) % base.config.get_text_config().vocab_size
    try:
        with probing(base, probe), evaluating(base), torch.no_grad():
            base.get_decoder()(ids, use_cache=False)
    except Exception:  # what a family lacks, or raises on what it does not know, is its own choice
        _log.debug("attention is not understood: the model does not run on a bare row", exc_info=True)
        return Survey({}, plain=False)
    found = {module: sight for module, sight in probe.sights.items() if module not in probe.refused}
    return Survey(found, plain=not probe.altered)


@contextmanager
def probing(base: Any, probe: _Probe) -> Iterator[None]:
    """Inside, attention goes to the probe."""
    own = base.config._attn_implementation
    AttentionInterface.register(NAME, probe.attend)
    AttentionMaskInterface.register(NAME, probe.mask)
    base.set_attn_implementation(NAME)
    try:
        yield
    finally:
        base.set_attn_implementation(own)
