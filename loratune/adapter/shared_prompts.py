"""Prefixes that all prompts of a batch share are computed once: their keys and values are copied for each row.

In a causal model the states of a prefix do not depend on what follows it. Rows that are shorter than others are padded
between the prefix and the rest, where masks and positions have to be right; whether a model gets that right is tried
before the first batch.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from loratune.data.packing import pad
from loratune.data.packing_check import padding_refusal
from loratune.lora.attach import PeftModel

_WORTHWHILE, _FEWEST = 0.05, 64
"""The share of a batch's tokens that must be saved, and the number: the prefix costs a pass of its own."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""How much logits may differ from those of the rows alone, relative to the largest."""

_log = logging.getLogger(__name__)

Ids = Sequence[int]
Side = Literal["left", "right"]


class SharedPrompts:
    """Batches of one adapter whose rows may share a prefix.

    Attributes:
        padding: The id of the token for padding.
    """

    def __init__(self, model: PeftModel, padding: int):
        """Arguments as the attributes."""
        self._model, self.padding = model, padding
        self._is_right: dict[str, bool] = {}  # by the side on which rows are padded

    @cached_property
    def mixes_padding(self) -> bool:
        """Whether padding changes what the model computes for a row; tried once."""
        return padding_refusal(self._model, self.padding) is not None

    def batch(self, rows: Sequence[Ids], side: Side, *, first: int | None = None, more: int = 0) -> dict[str, Any]:
        """The keywords with which the model is called for a batch. The adapter must be active.

        Args:
            rows: The ids of each row.
            side: Where rows are padded, "left" or "right".
            first: The first position in all rows whose output is needed; by default the last one of each.
            more: How many tokens will be generated.

        Returns:
            input_ids, attention_mask, and, where a prefix is shared, `cache` of it. Then input_ids are with it
            where rows are padded on the left, as `generate` expects them, and else without it.
        """
        length = self._shared(rows, first)
        saved = length * (len(rows) - 1)
        is_worthwhile = saved >= _FEWEST and saved > _WORTHWHILE * sum(map(len, rows))
        if is_worthwhile and self._supported(max(map(len, rows)) + more) and self._tried(rows, length, side):
            return self._with_cache(rows, length, side)
        return self.plain(rows, side)

    @staticmethod
    def _shared(rows: Sequence[Ids], first: int | None) -> int:
        """The length of the prefix that all rows share, before the positions whose output is needed."""
        limit = min(map(len, rows)) - 1 if first is None else first
        lowest, highest = min(map(tuple, rows)), max(map(tuple, rows))
        return next((at for at in range(limit) if lowest[at] != highest[at]), limit)

    def plain(self, rows: Sequence[Ids], side: Side) -> dict[str, Any]:
        """Like `batch`, without a shared prefix."""
        batch = pad([{"input_ids": ids} for ids in rows], self.padding, side)
        return {name: tensor.to(self._model.device) for name, tensor in batch.items()}

    def _with_cache(self, rows: Sequence[Ids], length: int, side: Side) -> dict[str, Any]:
        prefix = torch.tensor([list(rows[0][:length])], device=self._model.device)
        cache = self._cache()
        self._model(input_ids=prefix, cache=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(rows))
        batch = self.plain([row[length:] for row in rows], side)
        prefixes = prefix.expand(len(rows), -1)
        batch["attention_mask"] = torch.cat([torch.ones_like(prefixes), batch["attention_mask"]], dim=1)
        if side == "left":
            batch["input_ids"] = torch.cat([prefixes, batch["input_ids"]], dim=1)
        return {**batch, "cache": cache}

    def _cache(self) -> DynamicCache:
        return DynamicCache(config=self._model.get_base_model().config)

    def _supported(self, longest: int) -> bool:
        """Whether the cache holds the keys and values of all positions of rows of this length, and nothing else."""
        try:
            layers = self._cache().layers
        except (AttributeError, KeyError, TypeError, ValueError):
            return False
        return all(
            type(layer) is DynamicLayer
            or (type(layer) is DynamicSlidingWindowLayer and longest <= layer.sliding_window)
            for layer in layers
        )

    def _tried(self, rows: Sequence[Ids], length: int, side: Side) -> bool:
        """Whether the model computes the same with the prefix in its cache; tried once."""
        if side not in self._is_right:
            longest = max(rows, key=len)
            short, padded_to = longest[: length + 1], [*longest, longest[-1]]
            try:
                found = [self._last_logits(self._with_cache([short, padded_to], length, side), side, len(short))]
                found += [self._last_logits(self.plain([short], side), side, len(short))]
            except (AssertionError, LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
                _log.debug("prefixes are not shared", exc_info=error)
                found = [torch.zeros(1), torch.ones(1)]
            difference = float((found[0] - found[1]).abs().max() / found[1].abs().max())
            self._is_right[side] = difference <= _TOLERANCE.get(self._model.dtype, 0.0)
            _log.debug("shared prefixes: logits differ by %.1e", difference)
        return self._is_right[side]

    def _last_logits(self, batch: Mapping[str, Any], side: Side, length: int) -> Tensor:
        """The logits that follow the first row, which has this many tokens."""
        if side == "left":
            settings = GenerationConfig(
                max_new_tokens=1, output_logits=True, return_dict_in_generate=True, pad_token_id=self.padding
            )
            found: Any = self._model.generate(**batch, generation_config=settings)
            return found.logits[0][0].float()  # type: ignore[no-any-return]
        logits: Tensor = self._model(**batch).logits
        cached = batch["attention_mask"].shape[1] - batch["input_ids"].shape[1]
        return logits[0, length - cached - 1].float()
