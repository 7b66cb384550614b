"""Rotary angles that depend on the length of a row: each row of a batch gets those that it has alone.

LongRoPE (arXiv:2402.13753) turns rows up to the length of the pretraining by other frequencies than longer ones.
transformers chooses them for a whole batch, by its longest row or its padding, so a short row beside a long one would
be computed otherwise than alone. `use_row_angles` adds hooks that choose them row by row.

Checks before a run use short rows, so what depends on the length of a row is read from the configuration. Besides
`rope_type: longrope` (Phi-3 128k, Phi-3.5, Phi-4-mini), a row depends on the others of its batch only

- with `rope_type: dynamic`, beyond `max_position_embeddings`, which every command refuses;
- with `keep_window_size` (Doge), in longer rows, as it selects arbitrarily among equal scores: such rows need a
  `per_device_train_batch_size` of 1.

It does not with the other types of rotary embeddings, with windows (a distance in tokens, also in the cache), chunks of
attention (counted from the first token of a row, Llama 4), scales by position (Llama 4, Ministral 3) or a number of
selected keys (`index_topk`).
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from loratune.kernels.upstream import has_hooks, rotary_embeddings

SWITCHING = {"longrope": "original_max_position_embeddings"}
"""Types of rotary embeddings whose frequencies switch at a length within the context of the model → the parameter that
is this length: rows up to it have the frequencies of short rows. `dynamic` ones switch at the end of the context."""


def length_limits(config: Any) -> tuple[int, ...]:
    """The lengths up to which a model computes rows in one way, and beyond which in another, ascending.

    Args:
        config: The configuration of a model of transformers. Layers of several kinds may have parameters of their own.

    Returns:
        The limits in tokens; none if the results of a row never depend on its length.
    """
    parameters: Mapping[str, Any] = config.get_text_config().to_dict().get("rope_parameters") or {}
    several = [parameters, *(value for value in parameters.values() if isinstance(value, Mapping))]
    found = {one.get(SWITCHING[one["rope_type"]]) for one in several if one.get("rope_type") in SWITCHING}
    return tuple(sorted(int(limit) for limit in found if limit))


def crosses(limits: tuple[int, ...], length: int, new: int) -> list[int]:
    """The limits that a row passes while a model continues it by `new` tokens: what was computed of it up to there
    must then be computed again. The last token is not read. length: tokens of the row."""
    return [limit for limit in limits if length <= limit < length + new - 1]


def use_row_angles(model: Any) -> None:
    """Have a causal language model compute each row of a batch, padded or packed, with the angles that it has alone.

    Where nothing depends on the length, the model stays as it is. Rows that are padded on the right need their mask.
    """
    if limits := length_limits(model.config):
        decoder, angles = model.get_decoder(), _RowAngles(limits)
        decoder.register_forward_pre_hook(angles.read_mask, with_kwargs=True)
        for module in rotary_embeddings(decoder):
            module.register_forward_hook(angles.choose, with_kwargs=True)


def has_other_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks besides those of `use_row_angles`, which follow from the configuration."""
    return has_hooks(module, besides=_RowAngles)


class _RowAngles:
    """The hooks of one model."""

    def __init__(self, limits: tuple[int, ...]):
        self._limits = limits
        self._mask: Tensor | None = None

    def read_mask(self, _module: nn.Module, _given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before the decoder: note the mask of the batch, (rows, all tokens so far), 0 on padding."""
        mask = named.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def choose(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], angles: Any) -> Any:
        """After a rotary embedding: its angles, each token those of its row. It has computed those of the longest."""
        arguments = signature(module.forward).bind(*given, **named)
        positions = arguments.arguments["position_ids"]
        is_alone = self._mask is not None and (len(self._mask) == 1 or self._mask.shape[1] <= self._limits[0])
        if is_alone or positions.dim() != 2:
            return angles
        lengths = row_lengths(positions) if self._mask is None else self._mask.sum(-1, keepdim=True)
        for limit in reversed(self._limits):
            arguments.arguments["position_ids"] = positions.clamp(max=limit - 1)
            shorter = module.forward(*arguments.args, **arguments.kwargs)
            is_short = (lengths <= limit)[..., None]
            if isinstance(angles, Tensor):  # complex ones
                angles = torch.where(is_short, shorter, angles)
            else:  # cosines and sines
                angles = tuple(torch.where(is_short, *pair) for pair in zip(shorter, angles, strict=True))
        return angles


def row_lengths(positions: Tensor) -> Tensor:
    """The length of the row of each token, of rows without padding, also of a tree of rows (`data.packing.PrefixTree`):
    that of its longest row then, so rows on both sides of a limit must not share a prefix.

    Args:
        positions: (rows, tokens), which begin at 0 in each packed row, or go up by more than 1.

    Returns:
        The same shape.
    """
    steps = positions.diff(prepend=positions[:, :1] - 1)
    numbers = ((positions == 0) | (steps > 1)).cumsum(-1)
    longest = positions.new_zeros(len(positions), positions.shape[1] + 1)
    return longest.scatter_reduce(1, numbers, positions, "amax").gather(1, numbers) + 1
