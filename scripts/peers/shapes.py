"""A model with random weights, whose speed is that of a trained one: `python -P -m peers.shapes NAME MODEL DIRECTORY`.

The tokenizer is that of MODEL; so are the words of the rows, whatever the size of the vocabulary.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from peers.sets import SHAPES


def config(name: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a shape. changes: of its sizes."""
    sizes = {"model_type": "llama", **SHAPES[name], **changes}
    kind = CONFIG_MAPPING[sizes.pop("model_type")]
    return kind(**sizes, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=2)


def main() -> None:
    """Make the directory, unless it stands."""
    name, model, directory = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if (directory / "config.json").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    for path in [*model.glob("tokenizer*"), *model.glob("*.jinja"), *model.glob("special_tokens*")]:
        shutil.copy(path, directory)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config(name), dtype=torch.bfloat16).save_pretrained(directory)


if __name__ == "__main__":
    main()
