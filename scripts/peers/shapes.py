"""A model with random weights, whose speed is that of a trained one: `python -P -m peers.shapes NAME MODEL DIRECTORY`.

The tokenizer is that of MODEL; so are the words of the rows, whatever the size of the vocabulary.
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from peers.sets import SHAPES


def main() -> None:
    """Make the directory, unless it stands."""
    name, model, directory = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if (directory / "config.json").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    for path in [*model.glob("tokenizer*"), *model.glob("*.jinja"), *model.glob("special_tokens*")]:
        shutil.copy(path, directory)
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)


if __name__ == "__main__":
    main()
