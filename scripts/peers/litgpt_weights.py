"""Convert a model to LitGPT's own format: `python -P -m peers.litgpt_weights MODEL DIRECTORY`."""

import shutil
import sys
from pathlib import Path

from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

source, place = Path(sys.argv[1]), Path(sys.argv[2]).absolute()
if not (place / "lit_model.pth").exists():
    shutil.copytree(source, place, dirs_exist_ok=True)
    convert_hf_checkpoint(place, dtype="bfloat16")
