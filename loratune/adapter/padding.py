"""Prompts in batches: whether a model writes the same for them as for each alone, and rows that outgrow what is cached.

Generation pads on the left, and keeps a state between tokens. Some families ignore the mask in either, such as in a
recurrence or in positions, though rows that are padded on the right, as in training, get correct logits. The check runs
the model; there is no list of model families.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation import BaseStreamer

from loratune import kernels
from loratune.data.batch_check import DRAWS, random_rows
from loratune.data.batches import pad
from loratune.errors import is_out_of_memory
from loratune.kernels import WHOLE_MODEL, LayerSample
from loratune.kernels.parity_check import evaluating
from loratune.system.accelerator import same_random_numbers

NO_STOP = 2**31 - 1
"""An end token that no vocabulary has."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""The largest accepted difference of logits, relative to the largest logit."""
_LONGEST, _NEW = 9, 3
"""The tokens of the longer prompt of the check, and the new ones: the states of the first come from the prompt, those
of the others from the cache."""

_log = logging.getLogger(__name__)


def pad_left(model: Any, prompts: Sequence[Sequence[int]], padding: int) -> dict[str, Tensor]:
    """The arguments of `generate` for a batch of prompts. padding: the id of the padding token."""
    batch = pad([{"input_ids": ids} for ids in prompts], padding, "left")
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def write(
    model: Any, batch: Mapping[str, Any], settings: GenerationConfig, criterion: StoppingCriteria, streamer: Any = None
) -> Tensor:
    """As the model's `generate`, but where a row passes a limit of `kernels.length_limits`, the keys and values of its
    tokens are computed again, as for a row of its length.

    Args:
        model: A `PeftModel`.
        batch: Its inputs, see `pad_left`; a row that passes a limit must be alone, see `kernels.crosses`.
        settings: With `max_new_tokens`.
        criterion: What ends rows besides the end tokens of the settings.
        streamer: A streamer of transformers.

    Returns:
        int64, (rows, tokens): the prompts and what follows them.
    """
    ids: Tensor = batch["input_ids"]
    length, new = int(batch["attention_mask"].sum(-1).max()), int(settings.max_new_tokens)
    passed = kernels.crosses(kernels.length_limits(model.config), length, new)
    if not passed:
        ids = model.generate(**batch, generation_config=settings, stopping_criteria=[criterion], streamer=streamer)
        return ids
    stop, part = _Noted(criterion, settings.eos_token_id), copy.copy(settings)
    written = streamer and _Continued(streamer)
    for end in [*(limit + 1 for limit in passed), length + new]:
        part.max_new_tokens = end - ids.shape[1]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ids = model.generate(**inputs, generation_config=part, stopping_criteria=[stop], streamer=written)
        if stop.has_ended:
            break
    if streamer:
        streamer.end()
    return ids


class _Noted(StoppingCriteria):
    """A criterion, and whether it or an end token has ended the row."""

    def __init__(self, criterion: StoppingCriteria, end_ids: Sequence[int]):
        self._criterion, self._end_ids, self.has_ended = criterion, end_ids, False

    def __call__(self, input_ids: Tensor, scores: Any, **named: Any) -> Tensor:
        ended: Tensor = self._criterion(input_ids, scores, **named)
        self.has_ended = bool(ended.all()) or int(input_ids[0, -1]) in self._end_ids
        return ended


class _Continued(BaseStreamer):
    """Passes on the first prompt and all new tokens of several calls of `generate`, but not their ends."""

    def __init__(self, streamer: Any):
        self._streamer, self._has_begun = streamer, False

    def put(self, value: Tensor) -> None:
        """value: the ids of prompts, (rows, tokens), or new ones, (rows,)."""
        if value.dim() == 1 or not self._has_begun:
            self._streamer.put(value)
        self._has_begun = True

    def end(self) -> None:
        """A call has ended."""


def writes_padded(model: Any, padding: int, sample: LayerSample = WHOLE_MODEL) -> bool:
    """Whether a model writes the same for a prompt that is padded in a batch as for this prompt alone.

    Rounding can change the routing of a mixture of experts, so prompts are drawn again; a real fault shows each time.
    The modes of the modules and the random state are left unchanged.

    Args:
        model: A `PeftModel`.
        padding: The id of the padding token.
        sample: The layers that compute; if the model does not write the same with these alone, all do.

    Returns:
        Whether it does; False if it raises an error.

    Raises:
        Exception: There is not enough memory, see `errors.is_out_of_memory`.
    """
    try:
        with sample.alone(), same_random_numbers(model.device), torch.inference_mode(False), evaluating(model):
            found = any(_writes_padded(model, padding, seed) for seed in range(DRAWS))
    except Exception as error:  # Families raise all kinds of errors where their cache does not fit padded prompts.
        if is_out_of_memory(error):
            raise
        _log.debug("the model does not write for padded prompts", exc_info=error)
        found = False
    return found or (bool(sample.left_out) and writes_padded(model, padding))


def _writes_padded(model: Any, padding: int, seed: int) -> bool:
    long, short = (row["input_ids"] for row in random_rows(model, _LONGEST, seed)[1:])
    batch, alone = (pad_left(model, prompts, padding) for prompts in ([short, long], [short]))
    return same_logits(model, batch, alone, padding, _NEW)


def same_logits(model: Any, one: Mapping[str, Any], other: Mapping[str, Any], padding: int, new: int) -> bool:
    """Whether the first rows of two batches get the same logits, up to rounding, for a number of new tokens. It stops
    where rounding makes them continue with different tokens."""
    settings = GenerationConfig(
        max_new_tokens=new, do_sample=False, use_cache=True, eos_token_id=NO_STOP, pad_token_id=padding,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    found = (model.generate(**batch, generation_config=settings).logits for batch in (one, other))
    for logits in zip(*found, strict=True):
        ours, its = (tensor[0].float() for tensor in logits)
        difference = float((ours - its).abs().max() / its.abs().max())
        _log.debug("logits of the next token differ by %.1e", difference)
        if not difference <= _TOLERANCE.get(model.dtype, 0.0):
            return False
        if ours.argmax() != its.argmax():
            break
    return True
