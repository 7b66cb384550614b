"""Tokenising and masking: an Example → `input_ids` and `labels`. Train, evaluate and generate share it.

The prompt that `generate` feeds is rendered by the same function as the prompt inside a training row, and its ids
are verified to be the beginning of the row's ids. Where the tokenizer merges characters across that border, prompt
and answer are encoded apart.
"""

from loratune.data.rendering.renderer import Renderer
from loratune.data.rendering.tokens import IGNORED, Span, Tokens, shorten

__all__ = ["IGNORED", "Renderer", "Span", "Tokens", "shorten"]
