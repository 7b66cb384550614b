"""Whether rows may be packed end to end: a model must not mix them, and it should not take longer than padding does.

The first is found out by running the model, not looked up in a list of model families.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loratune.data.packing import flatten

_log = logging.getLogger(__name__)

Row = dict[str, list[int]]

LONGEST = 384
"""Tokens of the longest row that the model is run on: more than the usual small windows and chunks, and soon done."""
SHORT = 16
"""Tokens of the shortest row."""
GRADIENT_LONGEST = 24
"""Tokens of the longest row where activations are kept for the backward pass."""
TOLERANCES = {torch.float16: 0.02, torch.bfloat16: 0.1}
"""The allowed relative RMS difference by dtype: at least ten times the rounding of dozens of layers."""
TOLERANCE = 1e-4
DRAWS = 3
"""How often other rows are drawn where the difference is too large."""

_MASKED_PAIR_COST = 4
"""What a multiplication of attention under a mask costs, relative to one of a linear layer.

Measured with Gemma 3 on a CPU, 8 rows of 1,024 tokens: 20.2 s end to end and 3.5 s padded, which is a cost of 8. The
smaller value favours rows end to end."""
_SAMPLED_BATCHES = 256


def packing_refusal(model: Any, longest: int, total: int = 0) -> str | None:
    """Find out whether a model computes each row of a flat batch as it computes the row alone.

    The model is run as `flatten` says, in evaluation mode, on random rows. Two things must hold:

    - The gradient of the logits of one row with respect to the embeddings of every other row is exactly zero. A masked
      token has weight 0 and a gradient of 0 in every dtype, so rounding neither hides a leak nor looks like one.
    - The logits of each row equal those of the row alone, by root mean square relative to the standard deviation of all
      logits. This finds what has no gradient: positions that count on, rotary angles that follow the longest row of a
      batch, a choice of the best keys among those of all rows, a position table too short for the batch. Rounding
      differs with the shape of a batch, and a mixture of experts may then choose another expert, so rows are drawn
      anew; a real fault shows each time.

    The modes of the modules, the random state, and all gradients stay as they are.

    Args:
        model: A causal language model of transformers with its weights, in any dtype, with an adapter or without.
        longest: Tokens of the longest row to be trained on.
        total: Tokens of the largest flat batch.

    Returns:
        One line that says why the model cannot be given flat batches, or None if it can. A model that fails on flat
        rows gets its own reason.

    Raises:
        torch.OutOfMemoryError: There is not enough memory.
    """
    name = model.config.model_type
    with _evaluating(model):
        try:
            longest = min(longest, _max_positions(model, longest))
            if _leaks(model, _random_rows(model, min(longest, GRADIENT_LONGEST))):
                return f"packing: {name} mixes rows: what it computes for one depends on the others in a flat batch"
            difference = _smallest_difference(model, longest, total)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model may raise anything on input that it does not understand
            _log.debug("%s does not run on flat rows", name, exc_info=True)
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            return f"packing: {name} does not run on flat rows: {type(error).__name__}: {reason}"
    if not difference <= _tolerance(model):
        return (
            f"packing: {name} mixes rows: logits differ by {difference:.2g} of their spread from those of a row alone"
        )
    return None


def padding_is_cheaper(lengths: NDArray[np.integer[Any]], size: int, width: int) -> bool:
    """Estimate whether batches cost less padded than end to end, in a model whose attention masks pairs of tokens.

    Padding adds tokens; end to end, the attention of every token goes over those of all other rows too. In a layer, a
    token costs about 12 * width^2 multiplications, and a pair of tokens 2 * width. The answer is the same for the same
    rows.

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


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in its own mode again, and the random state as it was."""
    modes = [(module, module.training) for module in model.modules()]
    device = model.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _random_rows(model: Any, longest: int, seed: int = 0) -> list[Row]:
    """Returns three random rows, a short one, a long one and one in between, of tokens that stand for text."""
    special = _special_ids(model.config.to_dict())
    ids = [token for token in range(model.config.get_text_config().vocab_size) if token not in special]
    generator = torch.Generator().manual_seed(seed)
    lengths = (min(longest, SHORT), longest, longest // 2 + 1)
    draws = [torch.randint(len(ids), (length,), generator=generator).tolist() for length in lengths]
    rows = [[ids[number] for number in numbers] for numbers in draws]
    return [{"input_ids": row, "labels": row} for row in rows]


def _special_ids(config: Mapping[str, Any]) -> set[int]:
    """Returns the token ids that a configuration names at any depth: some of them ask for an image or a sound."""
    special: set[int] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            special |= _special_ids(value)
        elif str(key).endswith(("_token_id", "_token_index")):
            special |= {token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)}
    return special


def _max_positions(model: Any, otherwise: int) -> int:
    """Returns how many positions a model has; on a GPU, a position past its table ends the process."""
    text_config = model.config.get_text_config()
    return getattr(text_config, "max_position_embeddings", None) or otherwise


def _flat_logits(model: Any, rows: list[Row], offset: int = 0) -> tuple[Tensor, ...]:
    """Returns the logits of each row of one flat batch, (tokens, vocabulary).

    offset: The first position of the last row.
    """
    batch = flatten(rows)
    batch["position_ids"][0, -len(rows[-1]["input_ids"]) :] += offset
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids")}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return torch.split(logits[0], [len(row["input_ids"]) for row in rows])


def _leaks(model: Any, rows: list[Row]) -> bool:
    """Whether the logits of some row have a gradient with respect to the embeddings of another."""
    leaves: list[Tensor] = []

    def make_leaf(_module: Any, _inputs: Any, embeddings: Tensor) -> Tensor:
        leaves.append(embeddings.detach().requires_grad_())
        return leaves[-1].clone()  # some models scale their embeddings in place, which a leaf does not allow

    hook = model.get_input_embeddings().register_forward_hook(make_leaf)
    try:
        with torch.enable_grad():
            sums = [logits.float().square().sum() for logits in _flat_logits(model, rows)]
            gradients = [torch.autograd.grad(total, leaves[0], retain_graph=True)[0] for total in sums]
    finally:
        hook.remove()
    lengths = [len(row["input_ids"]) for row in rows]
    by_row = [torch.split(gradient.flatten(0, 1), lengths) for gradient in gradients]
    return any(
        bool(gradient.any())
        for number, parts in enumerate(by_row)
        for other, gradient in enumerate(parts)
        if other != number
    )


def _smallest_difference(model: Any, longest: int, total: int) -> float:
    """Returns the largest of the differences of the rows, each in the best of its draws; see `_differences`."""
    best = _differences(model, _random_rows(model, min(longest, LONGEST)), longest, total)
    for seed in range(1, DRAWS):
        if not bool((best <= _tolerance(model)).all()):
            rows = _random_rows(model, min(longest, LONGEST), seed)
            best = best.minimum(_differences(model, rows, longest, total))
    return float(best.max())


@torch.no_grad()
def _differences(model: Any, rows: list[Row], longest: int, total: int) -> Tensor:
    """Compare the logits of each row in a flat batch with those of the row alone.

    The rows stand at the end of a batch of `total` tokens. After them comes the last token of a row of `longest`
    tokens, which costs less than the whole row and has its position.

    Returns:
        (rows,), the root mean square difference relative to the standard deviation of the logits.
    """
    rest = total - sum(len(row["input_ids"]) for row in rows) - 1
    before = [rows[1]] * (rest // len(rows[1]["input_ids"]))
    end = {name: values[:1] for name, values in rows[0].items()}
    flat = _flat_logits(model, [*before, *rows, end], longest - 1)[len(before) : -1]
    spread = torch.stack([logits.float().std() for logits in flat]).max()
    differences = []
    for row, logits in zip(rows, flat, strict=True):
        ids = torch.tensor([row["input_ids"]], device=model.device)
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        differences.append((alone.float() - logits.float()).square().mean().sqrt() / spread)
    return torch.stack(differences)


def _tolerance(model: Any) -> float:
    return max(TOLERANCES.get(parameter.dtype, TOLERANCE) for parameter in model.parameters())
