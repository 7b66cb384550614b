"""What can become a GGUF file, and whether the file holds what it should. The conversion itself is llama.cpp's."""

from collections.abc import Collection, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loratune.codes import Code
from loratune.console import progress
from loratune.errors import AdapterError, ConfigError, Problem, missing_package
from loratune.export.plain import CLOSENESS, PlainAdapter

TEMPLATE = "chat_template.jinja"
_MOST_OF_IT = 0.9
"""The share of a model's values that its file must have."""


def check_package() -> None:
    """Raises ConfigError: the package gguf, by which files are read back, is not installed."""
    if find_spec("gguf") is None:
        raise ConfigError(missing_package(Code.MODEL_MISSING_PACKAGE, "gguf", "reads GGUF files back", "gguf"))


def check_layers(base: Any, modules: Collection[str], where: str) -> None:
    """Check that llama.cpp can put an adapter on these modules.

    Args:
        base: The base, on the meta device.
        modules: The adapted modules.
        where: The adapter, for messages.

    Raises:
        AdapterError: One of them is the output layer of a model with tied weights, or a Conv1D, as in GPT-2.
    """
    reason = ""
    for path, module in base.named_modules():
        if path in modules and isinstance(module, Conv1D):
            reason = f"{path} is a Conv1D, whose A and B llama.cpp's converter exchanges"
    tied, output = base.config.get_text_config().tie_word_embeddings, base.get_output_embeddings()
    if tied and any(module is output and path in modules for path, module in base.named_modules()):
        reason = "it adapts the output layer, whose weight is that of the embeddings, and llama.cpp does not load that"
    if reason:
        fix = "give --merged, which writes base and adapter as one model"
        raise AdapterError(
            Problem(Code.EXPORT_NOT_PLAIN, f"cannot be an adapter of llama.cpp: {reason}", where, fix=fix)
        )


@progress("reading the GGUF file")
def check_adapter(file: Path, adapter: PlainAdapter) -> int:
    """Read an adapter file back, and compare it with the plain adapter that it was made from.

    llama.cpp orders the rows of some tensors otherwise, and may join or split modules, so norms are compared.

    Returns:
        The number of modules.

    Raises:
        AdapterError: alpha is not the rank, or tensors differ.
    """
    try:
        reader = import_module("gguf").GGUFReader(file)
        alpha = float(reader.fields["adapter.lora.alpha"].contents())
        found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    except Exception as error:  # whatever the reader meets in bytes that are no such file
        raise _unreadable(file, "an adapter", error) from None
    ups = [tensor for name, tensor in found.items() if name.endswith(".lora_b")]
    expected = _norm({name: t for name, t in adapter.tensors.items() if name.endswith(".lora_B.weight")})
    other = float(torch.stack([tensor.double().square().sum() for tensor in ups]).sum().sqrt()) if ups else 0.0
    wrong = ""
    if alpha != adapter.rank or any(tensor.shape[-1] != adapter.rank for tensor in ups):
        wrong = f"its alpha is {alpha:g}, and its rank should be {adapter.rank}"
    elif not abs(other - expected) <= CLOSENESS * expected:
        wrong = f"its B have the norm {other:.6g} where the adapter's have {expected:.6g}"
    if wrong:
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, f"the GGUF file is not the adapter: {wrong}", str(file)))
    return len(ups)


@progress("reading the GGUF file")
def check_model(file: Path, parameters: int) -> int:
    """Read a model file back. Whether it computes what it should, only llama.cpp can tell.

    Args:
        file: The file.
        parameters: How many values the model has. llama.cpp may store a few more, or leave a few out.

    Returns:
        The number of tensors.

    Raises:
        AdapterError: The file cannot be read, has no tokenizer, or lacks weights.
    """
    try:
        reader = import_module("gguf").GGUFReader(file)
        tokens = len(reader.fields["tokenizer.ggml.tokens"].data)
        stored = sum(int(tensor.n_elements) for tensor in reader.tensors)
    except Exception as error:  # as above
        raise _unreadable(file, "a model", error) from None
    if not tokens or stored < _MOST_OF_IT * parameters:
        what = f"the GGUF file is not the model: it has {tokens:,} tokens, and {stored:,} of {parameters:,} values"
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, what, str(file)))
    return len(reader.tensors)


def _unreadable(file: Path, what: str, error: Exception) -> AdapterError:
    reason = f"the converter's file cannot be read as the GGUF file of {what}: {type(error).__name__}: {error}"
    return AdapterError(Problem(Code.EXPORT_DIFFERS, reason, str(file)))


def check_tokenizer(file: Path, vocabulary_size: int) -> None:
    """Check that the tokenizer of a GGUF file is one for this model.

    Raises:
        AdapterError: It has another number of tokens than the model has embeddings, or the file cannot be read.
    """
    try:
        tokens = len(import_module("gguf").GGUFReader(file).fields["tokenizer.ggml.tokens"].data)
    except Exception as error:  # as above
        what = f"cannot be read as a GGUF file with a tokenizer: {error}"
        raise AdapterError(Problem(Code.EXPORT_TOKENIZER, what, str(file), "--base-gguf")) from None
    if tokens != vocabulary_size:
        what = f"its tokenizer has {tokens:,} tokens, and the model embeds {vocabulary_size:,}"
        raise AdapterError(Problem(Code.EXPORT_TOKENIZER, what, str(file), "--base-gguf"))


def _norm(tensors: Mapping[str, nn.Parameter | torch.Tensor]) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors.values()]).sum().sqrt())
