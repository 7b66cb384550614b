"""The weights of a base as they lie on the disk, before they are quantized."""

from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import PreTrainedModel

from loratune.config import ModelSection
from loratune.errors import ModelError, Problem
from loratune.model import source


def original_weights(section: ModelSection, base: PreTrainedModel) -> Callable[[str], torch.Tensor]:
    """A reader of single weights: path of a linear layer → its weight, (out, in), as it was saved.

    The reader raises ModelError: no safetensors file has a tensor of this name.
    """
    directory = Path(source.local_or_hub(section.name_or_path))
    if not directory.is_dir():
        directory = Path(snapshot_download(section.name_or_path, revision=section.revision, local_files_only=True))
    holders: dict[str, Path] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            holders |= dict.fromkeys(opened.keys(), file)
    prefix = f"{base.base_model_prefix}."

    def read(path: str) -> torch.Tensor:
        for name in (f"{path}.weight", f"{path}.weight".removeprefix(prefix)):
            if name in holders:
                with safe_open(holders[name], framework="pt") as opened:
                    tensor: torch.Tensor = opened.get_tensor(name)
                    return tensor
        what = f"no safetensors file here has {path}.weight as it was before quantization, which loftq starts from"
        raise ModelError(Problem(what, section.name_or_path, "lora.init_lora_weights", "take another start"))

    return read
