"""Whether a model gives the same numbers as before, for two rows end to end."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loratune.errors import is_out_of_memory

ROWS = (29, 19)
"""Tokens of the rows."""
TOLERANCES = {torch.bfloat16: 0.15, torch.float16: 0.15}
"""Of the spread of what comes out; rounding alone makes 0.014 in SmolLM2-135M, in bfloat16."""
TOLERANCE = 1e-3


def tried(base: Any, *, backward: bool = False) -> Tensor | None:
    """The last hidden states of a model, or None if it cannot do it. backward: nor the way back."""
    positions = torch.cat([torch.arange(length) for length in ROWS])[None].to(base.device)
    ids = (torch.arange(positions.numel()) + 8).view(1, -1).to(base.device) % base.config.get_text_config().vocab_size
    decoder = base.get_decoder()
    try:
        with torch.no_grad():
            embedded = decoder.get_input_embeddings()(ids)
        given = embedded.detach().requires_grad_(backward)
        with evaluating(base), torch.set_grad_enabled(backward):
            states: Tensor = decoder(inputs_embeds=given, position_ids=positions, use_cache=False).last_hidden_state
            if backward:
                torch.autograd.grad(states.float().sum(), given)
        return states.detach()
    except Exception as error:  # what a family lacks, or raises on what it does not know, is its own choice
        if is_out_of_memory(error):
            raise
        return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, nothing is dropped out; afterwards each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def alike(old: Tensor | None, new: Tensor | None) -> bool:
    """Whether two outcomes of `tried` are the same, but for rounding."""
    if old is None or new is None:
        return False
    return apart(old, new) <= TOLERANCES.get(old.dtype, TOLERANCE)


def apart(old: Tensor, new: Tensor) -> float:
    """The root mean square of the difference, as a share of the spread of the first."""
    return float((old.float() - new.float()).square().mean().sqrt() / old.float().std())
