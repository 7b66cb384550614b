"""Checks that a model computes each row of a batch, packed or padded, as it computes the row alone."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loratune.data.batches import flatten, pad
from loratune.errors import is_out_of_memory
from loratune.kernels import WHOLE_MODEL, Acceleration, LayerSample
from loratune.kernels.parity_check import evaluating
from loratune.system.accelerator import same_random_numbers
from loratune.system.cache import REFUSAL

_log = logging.getLogger(__name__)

Row = dict[str, list[int]]
Layout = Callable[[list[Row], int], tuple[dict[str, Tensor], Tensor]]
"""Function of rows and the first position of the last row. Returns the inputs of the model, and the number of the row
that each token belongs to (-1 for padding), with the shape of `input_ids`."""

LONGEST = 384
"""Tokens of the longest row of the check: more than the usual small windows and chunks, but fast."""
SHORT = 16
"""Tokens of the shortest row."""
GRADIENT_LONGEST = 24
"""Tokens of the longest row of the gradient check, which keeps activations for the backward pass."""
PADDED_LONGEST = 12
"""Tokens of the longest row of the padding check, which takes a few per cent of the time of a training step."""
TOLERANCES = {torch.float16: 0.02, torch.bfloat16: 0.1}
"""The allowed relative RMS difference by dtype: at least ten times the rounding error of dozens of layers."""
TOLERANCE = 1e-4
DRAWS = 3
"""How often rows are drawn if the difference is too large."""

_MASKED_PAIR_COST = 4
"""Cost of a multiplication in masked attention, relative to one in a linear layer.

Measured with Gemma 3 on a CPU, 8 rows of 1,024 tokens: 20.2 s end to end and 3.5 s padded, which is a cost of 8. The
smaller value favours rows end to end."""
_SAMPLED_BATCHES = 256


@dataclass(frozen=True)
class BatchCheck:
    """The check of what batches a model computes as it computes their rows alone, before it is trained or scored.

    It runs the model; there is no list of families. It also holds where no layer is accelerated; those that are have
    been compared with the model's own before, see `kernels.accelerate`. What it finds is kept for a base on a machine.

    Attributes:
        model: A causal language model of transformers, in any dtype, with or without an adapter; with its layers
            accelerated, if they are.
        acceleration: Which layers stand for all, and what earlier checks have found.
    """

    model: Any
    acceleration: Acceleration

    def packing(self, longest: int, total: int = 0) -> str | None:
        """Why packed rows are refused, see `packing_refusal`; None if they are not."""
        refusal = partial(packing_refusal, self.model, longest, total, self.acceleration.sample)
        return self.acceleration.checks.once(f"packing {(longest, total)}", REFUSAL, refusal)

    def padding(self, pad_id: int) -> str | None:
        """Why padded rows are refused, see `padding_refusal`; None if they are not."""
        refusal = partial(padding_refusal, self.model, pad_id, self.acceleration.sample)
        return self.acceleration.checks.once(f"padding {pad_id}", REFUSAL, refusal)


def packing_refusal(model: Any, longest: int, total: int = 0, sample: LayerSample = WHOLE_MODEL) -> str | None:
    """Check whether a model computes each row of a flat batch as it computes the row alone.

    The model is run as described in `flatten`, in evaluation mode, on random rows. Two things must hold:

    - The gradient of the logits of one row with respect to the embeddings of every other row, and of padding, is
      exactly zero. A masked token has weight 0 and gradient 0 in every dtype, so rounding causes neither false
      negatives nor false positives.
    - The logits of each row equal those of the row alone, by root mean square relative to the standard deviation of all
      logits. This finds what has no gradient: positions that continue across rows, rotary angles that depend on the
      longest row of a batch, top-k selection over the keys of all rows, a position table too short for the batch.
      Rounding depends on the shape of a batch and can change the routing of a mixture of experts, so rows are redrawn;
      a real fault shows each time.

    The modes of the modules, the random state and all gradients are left unchanged.

    Args:
        model: A causal language model of transformers, in any dtype, with or without an adapter.
        longest: Tokens of the longest row to be trained on.
        total: Tokens of the largest flat batch.
        sample: The layers that compute, if the model runs with these alone; others that compute alike add nothing.

    Returns:
        One line on why the model does not support flat batches, or None if it does. A model that raises an error on
        flat rows gets its own reason.

    Raises:
        Exception: There is not enough memory, see `errors.is_out_of_memory`.
    """
    name = model.config.model_type
    try:
        with sample.alone():
            mixing = _mixing(model, _flat, longest, total)
    except Exception as error:  # a model may raise anything on input that it does not understand
        if is_out_of_memory(error):
            raise
        if sample.left_out:
            return packing_refusal(model, longest, total)
        _log.debug("%s does not run on flat rows", name, exc_info=True)
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        return f"packing: {name} does not run on flat rows: {type(error).__name__}: {reason}"
    return f"packing: {name} mixes rows: {mixing}" if mixing else None


def padding_refusal(model: Any, pad_id: int, sample: LayerSample = WHOLE_MODEL) -> str | None:
    """Check whether a model computes each row of a padded batch as it computes the row alone; see `packing_refusal`.

    Args:
        model: As in `packing_refusal`.
        pad_id: The token for padding.
        sample: As in `packing_refusal`.

    Returns:
        Why not, as a sentence; None if it does, or if the model raises an error, which training will report.

    Raises:
        Exception: There is not enough memory, see `errors.is_out_of_memory`.
    """
    name = model.config.model_type
    try:
        with sample.alone():
            mixing = _mixing(model, partial(_padded, pad_id), PADDED_LONGEST)
    except Exception as error:  # as above
        if is_out_of_memory(error):
            raise
        if sample.left_out:
            return padding_refusal(model, pad_id)
        _log.debug("%s does not run on padded rows", name, exc_info=True)
        return None
    return f"{name} computes something else for rows that are padded: {mixing}" if mixing else None


def _mixing(model: Any, layout: Layout, longest: int, total: int = 0) -> str:
    """Evidence that a model mixes rows of a batch; empty if it does not, or if logits of a row alone are not finite.

    longest, total: as in `packing_refusal`.
    """
    with same_random_numbers(model.device), torch.inference_mode(False), evaluating(model):
        text_config = model.config.get_text_config()  # on a GPU, a position past its table ends the process
        longest = min(longest, getattr(text_config, "max_position_embeddings", None) or longest)
        rows = random_rows(model, min(longest, GRADIENT_LONGEST))
        if not _is_finite(model, rows[:1]):
            return ""
        if _leaks(model, layout, rows):
            return "what it computes for one depends on what else is in a batch"
        difference = _smallest_difference(model, layout, longest, total)
        if difference <= _tolerance(model):
            return ""
        if difference < float("inf"):
            return f"logits differ by {difference:.2g} of their spread from those of a row alone"
        drawn = (row for seed in range(DRAWS) for row in random_rows(model, min(longest, LONGEST), seed))
        return "logits do not differ by a finite number from those of a row alone" if _is_finite(model, drawn) else ""


def _is_finite(model: Any, rows: Iterable[Row]) -> bool:
    """Whether all logits of rows alone are finite."""
    return all(bool(_alone(model, row).isfinite().all()) for row in rows)


@torch.no_grad()
def _alone(model: Any, row: Row) -> Tensor:
    """The logits of a row that is a batch by itself, (tokens, vocabulary)."""
    ids = torch.tensor([row["input_ids"]], device=model.device)
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    return logits


def padding_is_cheaper(lengths: NDArray[np.integer[Any]], size: int, width: int) -> bool:
    """Estimate whether padded batches cost less than flat ones, in a model with masked attention.

    Padding adds tokens; in a flat batch, attention is computed (and masked) between the tokens of all rows. In a layer,
    a token costs about 12 * width^2 multiplications, and a pair of tokens 2 * width. The result is deterministic.

    Args:
        lengths: (rows,), the tokens of each row.
        size: Rows of a batch.
        width: The hidden size of the model.
    """
    size = min(size, len(lengths))
    order = np.random.default_rng(0).permutation(len(lengths))
    sample = order[: len(lengths) // size * size][: _SAMPLED_BATCHES * size]
    batches = lengths[sample].reshape(-1, size).astype(np.float64)
    flat_tokens, padded_tokens = batches.sum(1), batches.max(1) * size
    flat_cost = 6 * width * flat_tokens + _MASKED_PAIR_COST * flat_tokens**2
    padded_cost = 6 * width * padded_tokens + _MASKED_PAIR_COST * padded_tokens**2 / size
    return bool(padded_cost.sum() < flat_cost.sum())


def random_rows(model: Any, longest: int, seed: int = 0) -> list[Row]:
    """Returns three random rows, a short one, a long one and one in between, of text tokens."""
    special = _special_ids(model.config.to_dict())
    ids = [token for token in range(model.config.get_text_config().vocab_size) if token not in special]
    generator = torch.Generator().manual_seed(seed)
    lengths = (min(longest, SHORT), longest, longest // 2 + 1)
    draws = [torch.randint(len(ids), (length,), generator=generator).tolist() for length in lengths]
    rows = [[ids[number] for number in numbers] for numbers in draws]
    return [{"input_ids": row, "labels": row} for row in rows]


def _special_ids(config: Mapping[str, Any]) -> set[int]:
    """Returns the token ids that a configuration names at any depth: some of them are image or audio placeholders."""
    special: set[int] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            special |= _special_ids(value)
        elif str(key).endswith(("_token_id", "_token_index")):
            special |= {token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)}
    return special


def _flat(rows: list[Row], offset: int) -> tuple[dict[str, Tensor], Tensor]:
    """Flat rows, as a `Layout`."""
    batch, last = flatten(rows), len(rows[-1]["input_ids"])
    batch["position_ids"][0, -last:] += offset
    numbers = [[number for number, row in enumerate(rows) for _ in row["input_ids"]]]
    return {name: batch[name] for name in ("input_ids", "position_ids")}, torch.tensor(numbers)


def _padded(pad_id: int, rows: list[Row], _: int) -> tuple[dict[str, Tensor], Tensor]:
    """Padded rows, as a `Layout`. The offset is ignored."""
    batch = pad(rows, pad_id)
    del batch["labels"]
    numbers = torch.arange(len(rows))[:, None]
    return batch, torch.where(batch["attention_mask"] > 0, numbers, -1)


def _run(model: Any, layout: Layout, rows: list[Row], offset: int = 0) -> tuple[list[Tensor], Tensor]:
    """Returns the logits of each row of one batch, (tokens, vocabulary); and the number of the row of each token."""
    inputs, numbers = layout(rows, offset)
    logits = model(**{name: value.to(model.device) for name, value in inputs.items()}, use_cache=False).logits
    numbers = numbers.to(logits.device)
    return [logits[numbers == number] for number in range(len(rows))], numbers


def _leaks(model: Any, layout: Layout, rows: list[Row]) -> bool:
    """Whether the logits of some row have a gradient with respect to the embeddings of another, or of padding."""
    leaves: list[Tensor] = []

    def make_leaf(_module: Any, _inputs: Any, embeddings: Tensor) -> Tensor:
        leaves.append(embeddings.detach().requires_grad_())
        return leaves[-1].clone()  # some models scale their embeddings in place, which a leaf does not allow

    hook = model.get_input_embeddings().register_forward_hook(make_leaf)
    try:
        with torch.enable_grad():
            of_rows, numbers = _run(model, layout, rows)
            sums = [logits.float().square().sum() for logits in of_rows]
            gradients = [torch.autograd.grad(total, leaves[0], retain_graph=True)[0] for total in sums]
    finally:
        hook.remove()
    length = numbers.shape[1]  # some models put tokens of their own before each row
    others = (gradient[:, -length:][numbers != number] for number, gradient in enumerate(gradients))
    return any(bool((one.abs() > 0).any()) for one in others)  # NaN, as 0 times infinity, tells nothing


def _smallest_difference(model: Any, layout: Layout, longest: int, total: int) -> float:
    """Returns the largest difference over the rows, each row by its smallest over the draws (`_differences`)."""
    best = _differences(model, layout, random_rows(model, min(longest, LONGEST)), longest, total)
    for seed in range(1, DRAWS):
        if not bool((best <= _tolerance(model)).all()):
            rows = random_rows(model, min(longest, LONGEST), seed)
            best = best.minimum(_differences(model, layout, rows, longest, total))
    return float(best.max())


@torch.no_grad()
def _differences(model: Any, layout: Layout, rows: list[Row], longest: int, total: int) -> Tensor:
    """Compare the logits of each row in a batch with those of the row alone.

    The rows are at the end of a batch of `total` tokens. They are followed by one token at position `longest` - 1,
    which tests that position at a lower cost than a whole row of `longest` tokens.

    Returns:
        (rows,), the root mean square difference relative to the standard deviation of the logits.
    """
    rest = total - sum(len(row["input_ids"]) for row in rows) - 1
    before = [rows[1]] * (rest // len(rows[1]["input_ids"]))
    end = {name: values[:1] for name, values in rows[0].items()}
    batch = _run(model, layout, [*before, *rows, end], longest - 1)[0][len(before) : -1]
    spread = torch.stack([logits.float().std() for logits in batch]).max()
    pairs = ((_alone(model, row), logits) for row, logits in zip(rows, batch, strict=True))
    differences = torch.stack([(alone.float() - logits.float()).square().mean().sqrt() for alone, logits in pairs])
    return differences.where(differences == 0, differences / spread)  # all logits of a broken base may be 0


def _tolerance(model: Any) -> float:
    return max(TOLERANCES.get(parameter.dtype, TOLERANCE) for parameter in model.parameters())
