"""Which of the kernels a model is computed with."""

from pathlib import Path

from transformers import PreTrainedModel

from loratune.kernels.native import Native, passes


def variant(base: PreTrainedModel) -> str:
    """The name of the library that was built from C for this model's tensors, which tells sources, compiler and
    processor apart; `none` where the passes are in torch."""
    over = passes(base.get_input_embeddings().weight)
    return Path(over._library._name).stem if isinstance(over, Native) else "none"
