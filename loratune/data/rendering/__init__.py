"""Tokenizing and masking: an Example → `input_ids` and `labels`. Train, evaluate and generate share it.

The prompt that `generate` feeds is rendered by the same function as the prompt inside a training row, and its ids are
verified to be the beginning of the ids of the row. Where the tokenizer merges characters across that border, prompt and
answer are encoded separately.
"""

from loratune.data.rendering.encoding import (
    CHOSEN,
    DESIRABLE,
    IGNORED,
    REJECTED,
    UNDESIRABLE,
    Span,
    TokenizedRow,
    truncate,
    truncate_sides,
)
from loratune.data.rendering.renderer import Renderer

__all__ = [
    "CHOSEN",
    "DESIRABLE",
    "IGNORED",
    "REJECTED",
    "UNDESIRABLE",
    "Renderer",
    "Span",
    "TokenizedRow",
    "truncate",
    "truncate_sides",
]
