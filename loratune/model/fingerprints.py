"""Fingerprints to check that two bases are the same model: same weights, and same settings that affect results.

A fingerprint is written into checkpoints and published adapters. It begins with the version of the method that computed
it. `Sampled` and `BaseState` compare a base in memory with what it was, `FileStates` its files.
"""

import dataclasses
import hashlib
import inspect
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from loratune.codes import Code
from loratune.config import ModelSection
from loratune.errors import ModelError, Problem
from loratune.events import progress
from loratune.model import upstream
from loratune.model.source import files_of
from loratune.system.cache import NOTHING_KEPT, KeptResults
from loratune.system.files import state
from loratune.system.machine_results import kept_here

_log = logging.getLogger(__name__)

VERSION, QUANTIZED_VERSION, STORED_VERSION = "2:", "3:", "4:"
"""The version of fingerprints, with which each of them begins; that of bases which bitsandbytes quantized, whose
fingerprints of version 2 did not contain the scales of the weights; and that of bases whose files are quantized so,
whose fingerprints of version 3 contained a sample of the weights only."""
_SUMMED = 64
"""Integers of 8 bytes in a block; the sum of each block is hashed."""
_PIECE = 1 << 26
"""Values that are rounded and summed at once."""
RUNS, RUN_LENGTH = 64, 16
"""Runs of neighbouring values in a sample of a tensor, spread evenly from its first value to its last."""
_IRRELEVANT = (
    {field.name for field in dataclasses.fields(PreTrainedConfig)}  # what every model has: labels, names, outputs
    | GenerationConfig().to_dict().keys()
    | {"_name_or_path", "name_or_path", "torch_dtype", "quantization_config", "auto_map", "tokenizer_class"}
    | {"task_specific_params", "initializer_range", "output_attentions"}
)
"""Keys of a configuration that do not affect what a model with its weights computes in training."""


Read = Callable[[str], torch.Tensor]
"""Reads the values of a tensor, by its name in the model."""


@progress("hashing the base")
def fingerprint(base: PreTrainedModel, read: Read | None = None) -> str:
    """SHA-256 of the settings of a model that affect its results, and of names, shapes and values of its tensors.

    All values count, as the sums of short blocks: on one core some 10 GB of bfloat16 a second, or 2 GB of float32.
    Floating-point values are rounded to bfloat16 first, so the dtype in which the model was loaded makes no difference.
    Of weights that bitsandbytes packed as it loaded the model, only a sample and the scales count, because the kernels
    of other devices may round a few of them differently; of those that are packed in the files, every byte.

    Args:
        base: The model before PEFT wraps it, on any device.
        read: Reads the values of a base that is on the meta device.
    """
    settings = _settings(base.config, _source(type(base)))
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    version, is_stored = VERSION, upstream.is_stored_quantized(base)
    for name, empty in _tensors(base):
        tensor = empty if read is None else read(name)
        if not upstream.is_packed(tensor):
            digest.update(f"{name} {tuple(tensor.shape)} ".encode() + block_sums(tensor))
            continue
        version, module = STORED_VERSION if is_stored else QUANTIZED_VERSION, _owner(base, name)
        digest.update(f"{name} ".encode() + (_bytes(module, tensor) if is_stored else _sample(module, tensor)))
    return version + digest.hexdigest()


def incomparable(recorded: str, found: str) -> tuple[str, str] | None:
    """Why a recorded fingerprint cannot be compared with that of a base: a sentence without its subject, and what to
    do; None if it can. found: the fingerprint of the base."""
    if recorded.startswith(VERSION) and found.startswith((QUANTIZED_VERSION, STORED_VERSION)):
        what = "records its base without the scales of its quantized weights, so the bases cannot be compared"
        return what, "train it again"
    if recorded.startswith(QUANTIZED_VERSION) and found.startswith(STORED_VERSION):
        what = "records only a sample of the quantized weights of its base, so the bases cannot be compared"
        return what, "train it again"
    if not recorded.startswith((VERSION, QUANTIZED_VERSION, STORED_VERSION)):
        what = "records the fingerprint of its base in a version that this release of loratune does not know"
        return what, "upgrade loratune"
    return None


class Sampled:
    """A base with a sample of each of its tensors, to check later whether a model built on it still has them."""

    def __init__(self, base: PreTrainedModel):
        owners = {
            id(tensor): (module, name)
            for module in base.modules()
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        }
        self._samples = [
            (module, name, _sample(module, tensor))
            for module, name, tensor in ((*owners[id(tensor)], tensor) for _, tensor in _tensors(base))
        ]

    def is_in(self, model: torch.nn.Module) -> bool:
        """Whether all modules with tensors are still modules of `model`, and the tensors have the same values."""
        present = {id(module) for module in model.modules()}
        return all(
            id(module) in present and _sample(module, getattr(module, name)) == sample
            for module, name, sample in self._samples
        )


def _settings(config: Any, source: str) -> dict[str, Any]:
    """The settings that decide what a model computes, and are not the defaults of the configuration's class.

    A key that the class does not declare counts if the code of the model mentions it. transformers adds keys to all
    configurations from release to release; a new one at its default must not make another model of the same files.

    Args:
        config: The configuration.
        source: The code of the model.
    """
    declared, settings = _defaults(type(config)), {"model_type": config.model_type}
    for key, value in config.to_dict().items():
        if key in _IRRELEVANT or key.endswith(("_token_id", "_token_ids", "_token_index")):
            continue
        inner = vars(config).get(key)
        if isinstance(inner, PreTrainedConfig):
            settings[key] = _settings(inner, source)
        elif key in declared:
            if value != declared[key]:
                settings[key] = value
        elif not source or re.search(rf"\b{re.escape(key)}\b", source):
            settings[key] = value
    return settings


def _defaults(kind: type) -> dict[str, Any]:
    """The keys that a class of configurations declares, with their defaults."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(kind)
    }


def _source(kind: type) -> str:
    """The source code of the module that defines a class; empty if there is none."""
    try:
        return inspect.getsource(inspect.getmodule(kind) or kind)
    except (OSError, TypeError):
        _log.debug("the source of %s is not in the fingerprint", kind, exc_info=True)
        return ""


def _tensors(base: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters, and the buffers that are saved, in which GPTQ and AWQ keep their weights."""
    yield from base.named_parameters()
    saved = base.state_dict(keep_vars=True).keys()
    yield from ((name, buffer) for name, buffer in base.named_buffers() if name in saved)


def block_sums(tensor: torch.Tensor, *, rounded: bool = True) -> bytes:
    """The sums of blocks of 512 bytes, modulo 2**64 so that they are exact and the same on every device, and the bytes
    of the last, shorter block. Values that only change places within a block are not noticed.

    rounded: whether floating-point values are rounded to bfloat16 before; otherwise all their bits count.
    """
    parts: list[torch.Tensor] = []
    for piece in torch.split(tensor.detach().flatten(), _PIECE):
        raw = (piece.to(torch.bfloat16) if rounded and piece.is_floating_point() else piece).view(torch.uint8)
        whole = raw.numel() // (8 * _SUMMED) * 8 * _SUMMED
        aligned = raw[:whole].clone() if raw.storage_offset() % 8 else raw[:whole]
        parts += [aligned.view(torch.int64).view(-1, _SUMMED).sum(1), raw[whole:]]
    return b"".join(part.cpu().numpy().tobytes() for part in parts)


def _sample(module: torch.nn.Module, tensor: torch.Tensor) -> bytes:
    """A sample of a tensor of a module; if bitsandbytes packed it, with its format and its scales."""
    flat = tensor.detach().flatten()
    if upstream.is_4bit(tensor) or not flat.is_floating_point():
        flat = flat.view(torch.uint8)  # packed values and whole numbers as bytes
    if (last := flat.numel() - RUN_LENGTH) > RUNS * RUN_LENGTH:
        starts = torch.arange(RUNS) * last // (RUNS - 1)
        flat = flat[(starts[:, None] + torch.arange(RUN_LENGTH)).flatten().to(flat.device)]
    values = flat.cpu()
    sample = bytes((values.to(torch.bfloat16).float() if values.is_floating_point() else values).numpy().tobytes())
    return sample + _scales(module, tensor) if upstream.is_packed(tensor) else sample


def _owner(base: PreTrainedModel, name: str) -> torch.nn.Module:
    """The module that has a tensor of this name."""
    return base.get_submodule(name.rpartition(".")[0])  # type: ignore[no-any-return]


def _bytes(module: torch.nn.Module, weight: torch.Tensor) -> bytes:
    """The format of a packed weight of a module, with the sums of all its bytes and of those of its scales."""
    quantized = import_module("loratune.kernels.quantized")
    tensors = (weight, *quantized.kept_scales(module, weight))
    parts = (block_sums(tensor, rounded=False) for tensor in tensors)
    return f"{quantized.format_of(weight)} ".encode() + b"".join(parts)


def _scales(module: torch.nn.Module, weight: torch.Tensor) -> bytes:
    """The format and the scales of a weight of a module that was packed as it was loaded.

    Where the scales are packed as well, only their mean and that of their squares count, to 4 %: the last bit of the
    offset that all of them share depends on the device, and moves some of them to another number.
    """
    quantized = import_module("loratune.kernels.quantized")
    scales, is_exact = quantized.scales(module, weight)
    if not is_exact:
        means = (values.mean(dtype=torch.float64) for values in (scales, scales.square()))
        scales = (16 * torch.stack([*means]).log2()).round()
    return f"{quantized.format_of(weight)} ".encode() + block_sums(scales)


class BaseState:
    """A base as it was loaded, to check that it is the same again after an adapter was removed.

    Adapters have side effects: some initializations subtract a part of the weights, biases are trained in place,
    checkpointing and hooks stay enabled. Settings are restored; other changes are detected by comparing all bits.
    """

    def __init__(self, base: PreTrainedModel):
        self._trainable = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
        self._modules, self._values = _modules(base), _bits(base)

    def restore(self, base: PreTrainedModel) -> bool:
        """Restore the settings that training changes. Returns whether the base is the same again.

        base: the same object; its modules, their hooks and every bit of its tensors are compared.
        """
        if getattr(base, "is_activation_checkpointing", False):
            base.activation_checkpointing_disable()
            base.disable_input_require_grads()
        base.eval()
        if [name for name, _ in base.named_parameters()] != [*self._trainable]:
            return False
        for name, parameter in base.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(self._trainable[name])
        return _modules(base) == self._modules and _bits(base) == self._values


def _modules(base: PreTrainedModel) -> list[tuple[Any, ...]]:
    flags = ("forward", "gradient_checkpointing")
    return [
        (name, id(module), module.training, upstream.hooks(module), *(bool(vars(module).get(flag)) for flag in flags))
        for name, module in base.named_modules()
    ]


@torch.no_grad()
def _bits(base: PreTrainedModel) -> str:
    """SHA-256 of names, types and values of all tensors, those that are not saved among them."""
    digest = hashlib.sha256()
    for name, tensor in (*base.named_parameters(), *base.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device} ".encode())
        is_packed = upstream.is_packed(tensor)
        digest.update(_bytes(_owner(base, name), tensor) if is_packed else block_sums(tensor, rounded=False))
    return digest.hexdigest()


_OLD = 2_000_000_000
"""Nanoseconds after which a file that is changed again has other times; file systems count in steps of up to 2 s."""


class FileStates:
    """Size, times and place on the disk of the files that a base is loaded from."""

    def __init__(self, section: ModelSection):
        """Record the present state. A base on the hub that is not in the cache has no files yet."""
        self._section, self._taken = section, time.time_ns()
        self._states = {path: state(path) for path in files_of(section)}

    def kept_results(self, device: torch.device) -> KeptResults:
        """What is known of a base that was loaded from these files, on this machine.

        Nothing is kept where its code can change as well, and of files that were changed or downloaded just before.

        Raises:
            ModelError: A file has changed since.
        """
        self.check_unchanged()
        states = [(str(path), before) for path, before in self._states.items()]
        newest = max((max(before[1:3]) if before else self._taken for _, before in states), default=self._taken)
        is_complete = [*self._states] == files_of(self._section)
        if newest > self._taken - _OLD or self._section.trust_remote_code or not is_complete:
            return NOTHING_KEPT
        return kept_here(VERSION, QUANTIZED_VERSION, STORED_VERSION, self._section.model_dump(), states, str(device))

    def check_unchanged(self, since: str = "while it was being read", fix: str = "start again") -> None:
        """Raises ModelError: a file has changed, or is gone."""
        if changed := [path for path, before in self._states.items() if state(path) != before]:
            what = f"has changed {since}"
            raise ModelError([Problem(Code.MODEL_CHANGED, what, str(path), fix=fix) for path in changed])

    def check_unchanged_in_run(self) -> None:
        """The same check during a run. The run has its own copy, but its adapter would not fit the new files."""
        fix = "restore it, then continue with `resume=True`, which compares weights"
        self.check_unchanged("since the run began", fix)
