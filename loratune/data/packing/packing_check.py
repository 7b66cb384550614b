"""Whether a model keeps the rows of a flat batch apart: asked of the model itself, not of a list of families."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from loratune.data.packing.flat import flatten

_log = logging.getLogger(__name__)

Row = dict[str, list[int]]

LONGEST = 384  # tokens of the longest row that is tried: past the usual small windows and chunks, and soon done
SHORT = 16  # tokens of the shortest
BRIEF = 24  # tokens of the longest where activations are kept for the backward pass
TOLERANCES = {torch.float16: 0.02, torch.bfloat16: 0.1}  # ten times what dozens of layers round, or less
TOLERANCE = 1e-4
DRAWS = 3


def why_not(model: Any, longest: int, total: int = 0) -> str | None:
    """One line of why rows of one flat batch would meet in this model, or None if they stay apart.

    model: a causal language model of transformers with its weights, in any dtype, with an adapter or without; longest:
    tokens of the longest row to be trained on; total: tokens of the largest flat batch. The model is run as `flatten`
    says, in eval mode, on random rows. Two things must hold:

    - The gradient of one row's logits with respect to the embeddings of every other row is exactly zero. A masked
      token gets weight 0 and hands back 0 in every dtype, so rounding neither hides a leak nor looks like one.
    - The logits of each row are those that it has alone, by root mean square relative to the spread of all logits.
      This finds what has no gradient: positions that count on, angles that follow the longest row of a batch, a choice
      of the best keys among those of all rows, a table too short for the batch. Rounding differs with the shape of a
      batch, and a mixture of experts may then choose another, so a row may be drawn anew; a fault is there each time.

    The modes of the modules, the random state, and all gradients are left as they are, and the model as any evaluation
    leaves it. A model that fails on flat rows gets the reason; running out of memory is raised.
    """
    name = model.config.model_type
    with _undisturbed(model):
        try:
            longest = min(longest, _positions(model, longest))
            if _leaks(model, _rows(model, min(longest, BRIEF))):
                return f"packing: {name} mixes rows: what it makes of one depends on the others in a flat batch"
            changed = _changed(model, longest, total)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what a model raises on what it does not understand is its own choice
            _log.debug("%s does not run on flat rows", name, exc_info=True)
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            return f"packing: {name} does not run on flat rows: {type(error).__name__}: {reason}"
    if not changed <= _allowed(model):
        return f"packing: {name} mixes rows: logits differ by {changed:.2g} of their spread from those of a row alone"
    return None


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Eval mode, and afterwards every module in the mode that it was in, and the random state as it was."""
    modes = [(module, module.training) for module in model.modules()]
    device = model.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _rows(model: Any, longest: int, seed: int = 0) -> list[Row]:
    """Three random rows, short and long and in between, of tokens that stand for text."""
    special = _special(model.config.to_dict())
    words = [token for token in range(model.config.get_text_config().vocab_size) if token not in special]
    drawn = torch.Generator().manual_seed(seed)
    lengths = (min(longest, SHORT), longest, longest // 2 + 1)
    chosen = [torch.randint(len(words), (length,), generator=drawn).tolist() for length in lengths]
    rows = [[words[number] for number in numbers] for numbers in chosen]
    return [{"input_ids": row, "labels": row} for row in rows]


def _special(config: Mapping[str, Any]) -> set[int]:
    """The ids that a configuration names at any depth: some of them ask for an image or a sound."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _special(value)
        elif str(key).endswith(("_token_id", "_token_index")):
            found |= {token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)}
    return found


def _positions(model: Any, otherwise: int) -> int:
    """How many positions a model has; what is past its table ends a process on a GPU."""
    text = model.config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or otherwise


def _flat_logits(model: Any, rows: list[Row], ahead: int = 0) -> tuple[Tensor, ...]:
    """Of each row of one flat batch: (tokens, vocabulary). The positions of the last row begin at `ahead`."""
    batch = flatten(rows)
    batch["position_ids"][0, -len(rows[-1]["input_ids"]) :] += ahead
    given = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids")}
    logits: Tensor = model(**given, use_cache=False).logits
    return torch.split(logits[0], [len(row["input_ids"]) for row in rows])


def _leaks(model: Any, rows: list[Row]) -> bool:
    """Whether the logits of some row have a gradient with respect to the embeddings of another."""
    leaves: list[Tensor] = []

    def cut(_module: Any, _given: Any, embedded: Tensor) -> Tensor:
        leaves.append(embedded.detach().requires_grad_())
        return leaves[-1].clone()  # some models scale their embeddings in place, which a leaf does not allow

    hook = model.get_input_embeddings().register_forward_hook(cut)
    try:
        with torch.enable_grad():
            logits = _flat_logits(model, rows)
            sums = [one.float().square().sum() for one in logits]
            gradients = [torch.autograd.grad(one, leaves[0], retain_graph=True)[0] for one in sums]
    finally:
        hook.remove()
    lengths = [len(row["input_ids"]) for row in rows]
    parts = [torch.split(gradient.flatten(0, 1), lengths) for gradient in gradients]
    return any(bool(part.any()) for own, of in enumerate(parts) for other, part in enumerate(of) if other != own)


def _changed(model: Any, longest: int, total: int) -> float:
    """How far at most the logits of a row in a flat batch are from those of the row alone, in the best draw of each."""
    best = _changes(model, _rows(model, min(longest, LONGEST)), longest, total)
    for seed in range(1, DRAWS):
        if not bool((best <= _allowed(model)).all()):
            best = best.minimum(_changes(model, _rows(model, min(longest, LONGEST), seed), longest, total))
    return float(best.max())


@torch.no_grad()
def _changes(model: Any, rows: list[Row], longest: int, total: int) -> Tensor:
    """How far the logits of each row in a flat batch are from those of the row alone: (rows,).

    The rows stand at the end of a batch of `total` tokens. After them comes the end of a row of `longest` tokens, which
    costs less than the whole row and has its positions.
    """
    rest = total - sum(len(row["input_ids"]) for row in rows) - 1
    before = [rows[1]] * (rest // len(rows[1]["input_ids"]))
    end = {name: values[:1] for name, values in rows[0].items()}
    together = _flat_logits(model, [*before, *rows, end], longest - 1)[len(before) : -1]
    spread = torch.stack([one.float().std() for one in together]).max()
    changes = []
    for row, flat in zip(rows, together, strict=True):
        ids = torch.tensor([row["input_ids"]], device=model.device)
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        changes.append((alone.float() - flat.float()).square().mean().sqrt() / spread)
    return torch.stack(changes)


def _allowed(model: Any) -> float:
    return max(TOLERANCES.get(parameter.dtype, TOLERANCE) for parameter in model.parameters())
