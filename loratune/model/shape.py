"""The width and depth of a model, as its configuration says."""

from typing import Any


def hidden_size(config: Any) -> int | None:
    """The width of the model: values of each token between two layers; None where its configuration does not say."""
    return _largest(config, "hidden_size")


def layers(config: Any) -> int | None:
    """How many layers a token passes through; None where its configuration does not say."""
    return _largest(config, "num_hidden_layers")


def _largest(config: Any, name: str) -> int | None:
    """A number of the decoder's configuration; of one that has it in parts, the largest."""
    text = config.get_text_config(decoder=True)
    parts = [text] if hasattr(text, name) else [getattr(text, part) for part in text.sub_configs]
    values = (getattr(part, name, None) for part in parts)
    return max((value for value in values if type(value) is int), default=None)
