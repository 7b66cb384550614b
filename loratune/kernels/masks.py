"""Determines the attention pattern and the arguments of each attention layer from the model's own masks.

In transformers, every layer gets a mask, computed by a function of query and key positions, and passes its queries,
keys and values to an attention function that is looked up by name. A probe is registered for both: it calls the mask
function with positions far beyond any window, without computing a whole mask.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from loratune.kernels.layer_sample import WHOLE_MODEL, LayerSample, described, watched
from loratune.kernels.parity_check import evaluating
from loratune.kernels.upstream import attn_implementation, has_hooks

_log = logging.getLogger(__name__)

NAME = "loratune-probe"
"""The name under which the probe is registered."""
REACH = 1 << 18
"""The number of tokens before a query that are examined. A window of at least this size counts as none."""
QUERIES = (1 << 22, (1 << 20) + 977, 40961, 977, 3)
"""Tested query positions: masks that depend on more than the distance, such as chunks, are detected at one of them."""
INERT = frozenset({
    "position_ids", "cache_position", "output_attentions", "output_hidden_states", "output_router_logits", "use_cache",
    "return_dict", "position_embeddings", "logits_to_keep", "labels", "num_items_in_batch", "input_ids",
    "inputs_embeds",
})  # fmt: skip
"""Arguments that do not affect attention, or that the kernels read themselves."""
HELD = ("scaling", "dropout", "sliding_window", "softcap", "s_aux")
"""Arguments of attention functions that `AttentionSpec` covers."""


@dataclass(frozen=True)
class AttentionSpec:
    """How a layer attends: causally, within rows, and within a window.

    Attributes:
        window: The most tokens that a token attends to, including itself; None: no limit.
        heads: The number of query heads.
        groups: The number of key and value heads.
        size: The size of query and key heads.
        scale: The factor of the scores.
        cap: The bound of soft-capped scores; 0 for none.
        value_size: The size of value heads.
        sinks: Whether there are attention sinks.
        placed: Whether the attention function receives the positions of the tokens.
    """

    window: int | None
    heads: int
    groups: int
    size: int
    scale: float
    cap: float = 0.0
    value_size: int = 0
    sinks: bool = False
    placed: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether all heads have the same size and no sinks."""
        return self.value_size == self.size and not self.sinks


class _Probe:
    """A mask function and an attention function that record their arguments.

    Attributes:
        specs: The specification of each layer.
        refused: Layers that `AttentionSpec` cannot describe.
        fitting: Layers that the kernel supports apart from the mask, which `AttentionSpec` may not describe.
        altered: Whether a layer got another mask than the one made by transformers, as in families that select keys.
        calls: What each layer was called with, apart from values: which mask, and the other arguments.
    """

    def __init__(self) -> None:
        self.calls: dict[nn.Module, list[Any]] = {}
        self.specs: dict[nn.Module, AttentionSpec] = {}
        self.refused: set[nn.Module] = set()
        self.fitting: set[nn.Module] = set()
        self.altered = False
        self._windows: dict[int, int | None] = {}
        self._functions: list[Any] = []

    def mask(self, *_: Any, mask_function: Callable[..., Tensor], attention_mask: Any = None, **__: Any) -> Any:
        """Returns the function that would compute the mask, instead of the mask."""
        self._functions.append(mask_function)  # It stays alive, so that no other function gets its id.
        return _Mask(mask_function, padded=attention_mask is not None)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
    ) -> tuple[Tensor, None]:
        """Records how a layer attends, and returns zeros. query: (rows, heads, length, size)."""
        rows, heads, length, _ = query.shape
        self.altered |= not isinstance(attention_mask, _Mask)
        mask = (id(attention_mask.function), attention_mask.padded) if isinstance(attention_mask, _Mask) else None
        call = mask, [one.shape for one in (query, key, value)], described(arguments)
        self.calls.setdefault(module, []).append(call)
        spec = None
        if _fits(query, key, value) and _is_known(arguments):
            self.fitting.add(module)
            window = self._window(attention_mask)
            if window != 0:
                spec = _spec(query, key, value, window, arguments)
        if spec is None or self.specs.setdefault(module, spec) != spec:
            self.refused.add(module)
        return query.new_zeros(rows, length, heads, value.shape[-1]), None

    def _window(self, mask: Any) -> int | None:
        """The window of a mask; None: no window; 0: another kind of mask."""
        if not isinstance(mask, _Mask) or mask.padded:
            return 0
        if id(mask.function) not in self._windows:
            try:
                self._windows[id(mask.function)] = window_of(mask.function)
            except Exception:  # A family's own function may need something that does not exist here.
                _log.debug("a mask is not understood", exc_info=True)
                self._windows[id(mask.function)] = 0
        return self._windows[id(mask.function)]


@dataclass(frozen=True)
class _Mask:
    function: Callable[..., Tensor]
    padded: bool


def check_known(arguments: Mapping[str, Any], *known: str) -> None:
    """Check the arguments of an attention call. known: names that the caller handles, besides `INERT`.

    Raises:
        TypeError: An argument that may affect the result, such as a cache, is not supported by the kernels.
    """
    if unknown := [*_unknown(arguments, known)]:
        raise TypeError(f"no kernel of attention knows {', '.join(unknown)}")


def _unknown(arguments: Mapping[str, Any], known: Sequence[str]) -> Iterator[str]:
    for name, value in arguments.items():
        is_given = value is not None and (value is False) == (name == "is_causal")
        if is_given and name not in {*INERT, *known}:
            yield name


def _is_known(arguments: dict[str, Any]) -> bool:
    """Whether `AttentionSpec` covers all arguments of a layer."""
    if arguments.get("dropout") or any(_unknown(arguments, HELD)):
        return False
    cap, sinks = arguments.get("softcap"), arguments.get("s_aux")
    if not (cap is None or (isinstance(cap, float) and cap > 0)):
        return False
    return sinks is None or (isinstance(sinks, Tensor) and not sinks.requires_grad)


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel supports the sizes and numbers of heads."""
    size, heads, groups = query.shape[-1], query.shape[1], key.shape[1]
    same_tokens = key.shape[:-1] == value.shape[:-1] and key.shape[2] == query.shape[2]
    return same_tokens and key.shape[-1] == size >= value.shape[-1] and size % 2 == 0 and heads % groups == 0


def _spec(query: Tensor, key: Tensor, value: Tensor, window: int | None, arguments: dict[str, Any]) -> AttentionSpec:
    """The specification of a layer that was called with these arguments on a row from its first token on."""
    _, heads, length, size = query.shape
    scale, cap, positions = (arguments.get(name) for name in ("scaling", "softcap", "position_ids"))
    return AttentionSpec(
        window, heads, key.shape[1], size, float(size**-0.5 if scale is None else scale), float(cap or 0),
        value.shape[-1], sinks=arguments.get("s_aux") is not None,
        placed=isinstance(positions, Tensor) and positions.shape[-1] == length and positions.dim() == 2,
    )  # fmt: skip


def window_of(function: Callable[..., Tensor]) -> int | None:
    """The window of a causal mask.

    Args:
        function: A mask function of transformers' `masking_utils`: returns for the indices of row, head, query and key
            whether the query attends to the key.

    Returns:
        The most tokens that a query attends to, including itself; None if there is no limit; 0 if the mask is not
        causal, has holes, or depends on more than the distance.
    """
    counts: list[tuple[int, int]] = []  # Visible keys, and all keys up to the query.
    zero = torch.zeros((), dtype=torch.long)
    for query in QUERIES:
        later = torch.arange(query + 64, query, -1)
        earlier = torch.arange(query, max(query - REACH, -1), -1)
        visible_later, visible = (
            torch.as_tensor(function(zero, zero, torch.full_like(keys, query), keys)).expand(keys.shape)
            for keys in (later, earlier)
        )
        count = int(visible.int().cumprod(0).sum())
        if bool(visible_later.any()) or count != int(visible.sum()):
            return 0
        counts.append((count, len(earlier)))
    window = max(count for count, _ in counts)
    if any(count != min(window, available) for count, available in counts):
        return 0
    return window if window < REACH else None


@dataclass(frozen=True)
class AttentionSurvey:
    """The attention layers of a model that use transformers' attention interface.

    Attributes:
        specs: The specifications of the layers that `AttentionSpec` can describe.
        modules: All layers that use the interface.
        fitting: Layers that the kernel supports apart from the mask, which `AttentionSpec` may not describe.
        stock_masks: Whether all layers get the masks made by transformers, of whatever kind.
        sample: Layers that stand for all layers of the model.
        angles: Layer that receives positions → the size of its rotary angles; 0 if it receives none.
        arguments: Module → how many arguments it is called with.
    """

    specs: dict[nn.Module, AttentionSpec] = field(default_factory=dict)
    modules: set[nn.Module] = field(default_factory=set)
    fitting: set[nn.Module] = field(default_factory=set)
    stock_masks: bool = False
    sample: LayerSample = WHOLE_MODEL
    angles: Mapping[nn.Module, int] = field(default_factory=dict)
    arguments: Mapping[nn.Module, int] = field(default_factory=dict)


def survey(base: Any) -> AttentionSurvey:
    """Examine a causal language model of transformers.

    The result is empty if it does not run on a row of ids, or if attention layers have hooks, which may read masks.
    """
    probe = _Probe()
    ids = (torch.arange(8) + 8).view(1, -1).to(base.device) % base.config.get_text_config().vocab_size
    try:
        with (
            probing(base, probe),
            evaluating(base),
            torch.no_grad(),
            watched(base) as returned,
            _called(base) as calls,
        ):
            base.get_decoder()(ids, use_cache=False)
    except Exception:  # Families raise all kinds of errors where they need other inputs.
        _log.debug("attention is not understood: the model does not run on a bare row", exc_info=True)
        return AttentionSurvey()
    modules = {*probe.specs, *probe.refused}
    if any(map(has_hooks, modules)):
        return AttentionSurvey(modules=modules)
    specs = {module: spec for module, spec in probe.specs.items() if module not in probe.refused}
    sample = WHOLE_MODEL if probe.altered else LayerSample.of(base, returned, probe.calls)
    return AttentionSurvey(specs, modules, probe.fitting, not probe.altered, sample, *calls)


@contextmanager
def _called(base: Any) -> Iterator[tuple[dict[nn.Module, int], dict[nn.Module, int]]]:
    """Inside, records `AttentionSurvey.angles` and `AttentionSurvey.arguments`."""
    angles: dict[nn.Module, int] = {}
    arguments: dict[nn.Module, int] = {}

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = kwargs.get("position_embeddings")
        if isinstance(kwargs.get("position_ids"), Tensor):
            has_angles = isinstance(given, tuple | list) and given and isinstance(given[0], Tensor)
            angles[module] = given[0].shape[-1] if has_angles else 0
        arguments[module] = sum(one is not None for one in (*args, *kwargs.values()))

    handles = [part.register_forward_pre_hook(record, with_kwargs=True) for part in base.get_decoder().modules()]
    try:
        yield angles, arguments
    finally:
        for handle in handles:
            handle.remove()


def sample_layers(model: Any) -> LayerSample:
    """Layers that stand for all layers of a `PeftModel`, which is run on a few tokens."""
    return survey(model.get_base_model()).sample


@contextmanager
def probing(base: Any, probe: _Probe) -> Iterator[None]:
    """Inside, the model's masks and attention go to the probe."""
    own = attn_implementation(base)
    AttentionInterface.register(NAME, probe.attend)
    AttentionMaskInterface.register(NAME, probe.mask)
    base.set_attn_implementation(NAME)
    try:
        yield
    finally:
        base.set_attn_implementation(own)


def drops_out_within(attention: nn.Module) -> bool:
    """Whether an attention layer has dropout."""
    return any(map(drops_out, (attention, *attention.children())))


def drops_out(module: nn.Module) -> bool:
    """Whether a module drops out values in training."""
    numbers = {name: value for name, value in vars(module).items() if isinstance(value, float) and value > 0}
    return any("dropout" in name for name in numbers) or (isinstance(module, nn.Dropout) and "p" in numbers)
