"""Whether two bases are the same model, told from their numbers and from what of their configurations decides results.

A fingerprint is written into checkpoints and published adapters. Its first characters name how it was computed, so that
records of older releases stay comparable: `fingerprint(base, like=record)` computes what that record holds.
"""

import dataclasses
import hashlib
import inspect
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

_log = logging.getLogger(__name__)

VERSION = "2:"
"""How the fingerprints of this release begin. The first version had no such mark: 64 hexadecimal digits."""
_LANES = 64
"""Numbers of 8 bytes in a block, of which the sum is hashed."""
_PIECE = 1 << 26
"""Values that are rounded and added up at once."""
PLACES = 64
"""Places within a tensor at which a sample of its values is read, spread evenly from its first value to its last."""
RUN = 16
"""Neighbouring values that are read at each place."""
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "quantization_config")
"""Keys of a configuration that the first version left out."""
_IDLE = (
    {field.name for field in dataclasses.fields(PreTrainedConfig)}  # what every model has: labels, names, outputs
    | GenerationConfig().to_dict().keys()
    | {"_name_or_path", "name_or_path", "torch_dtype", "quantization_config", "auto_map", "tokenizer_class"}
    | {"task_specific_params", "initializer_range", "output_attentions"}
)
"""Keys of a configuration that decide nothing of what a model with its weights computes in training."""


def fingerprint(base: PreTrainedModel, like: str | None = None) -> str:
    """SHA-256 of the settings of a model that decide what it computes, and of names, shapes and values of its tensors.

    All values enter, as the sums of short blocks: on one core some 10 GB of bfloat16 a second, or 2 GB of float32.
    Floating-point values are rounded to bfloat16 first, so the dtype that the model was loaded in makes no difference.
    Only a sample enters of what bitsandbytes packed as it loaded the model, since kernels of other devices may round a
    few numbers otherwise.

    Args:
        base: The model before PEFT wraps it, on any device.
        like: The fingerprint that this one is to be compared with; it is computed in the same way. None, or a version
            that this release does not know: the present version.
    """
    if like is not None and ":" not in like:
        return _first_version(base)
    digest = hashlib.sha256(_as_json(_settings(base.config, _source(type(base)))))
    for name, tensor in _tensors(base):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(_sample(tensor) if _is_packed(tensor) else _sums(tensor))
    return VERSION + digest.hexdigest()


def is_comparable(recorded: str) -> bool:
    """Whether this release can compute a fingerprint in the version of `recorded`."""
    return ":" not in recorded or recorded.startswith(VERSION)


def is_present(recorded: str) -> bool:
    """Whether `recorded` is in the version of this release."""
    return recorded.startswith(VERSION)


class Sampled:
    """A base with a sample of each of its tensors, to see later whether a model that was built on it still has them."""

    def __init__(self, base: PreTrainedModel):
        self._samples = [(tensor, _sample(tensor)) for _, tensor in _tensors(base)]

    def is_in(self, model: torch.nn.Module) -> bool:
        """Whether all tensors are still parameters or buffers of `model`, with the same values."""
        found = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        return all(id(tensor) in found and _sample(tensor) == sample for tensor, sample in self._samples)


def _settings(config: Any, source: str) -> dict[str, Any]:
    """The settings that decide what a model computes, and are not the defaults of the configuration's class.

    A key that the class does not declare counts if the code of the model names it. Upstream adds keys to all
    configurations from release to release; a new one at its default must not make another model of the same files.

    source: the code of the model.
    """
    declared, found = _defaults(type(config)), {"model_type": config.model_type}
    for key, value in config.to_dict().items():
        if key in _IDLE or key.endswith(("_token_id", "_token_ids", "_token_index")):
            continue
        inner = vars(config).get(key)
        if isinstance(inner, PreTrainedConfig):
            found[key] = _settings(inner, source)
        elif key in declared:
            if value != declared[key]:
                found[key] = value
        elif not source or re.search(rf"\b{re.escape(key)}\b", source):
            found[key] = value
    return found


def _defaults(kind: type) -> dict[str, Any]:
    """Keys that a class of configurations declares, with their defaults."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(kind)
    }


def _source(kind: type) -> str:
    """The text of the module that a class is from; empty if there is none."""
    try:
        return inspect.getsource(inspect.getmodule(kind) or kind)
    except (OSError, TypeError):
        _log.debug("the source of %s is not in the fingerprint", kind, exc_info=True)
        return ""


def _tensors(base: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters, and the buffers that are saved: GPTQ and AWQ keep their weights in those."""
    yield from base.named_parameters()
    saved = base.state_dict(keep_vars=True).keys()
    yield from ((name, buffer) for name, buffer in base.named_buffers() if name in saved)


def _is_packed(tensor: torch.Tensor) -> bool:
    """Whether bitsandbytes made the values, in 4 or 8 bits."""
    return any(hasattr(tensor, name) for name in ("quant_state", "SCB"))


def _sums(tensor: torch.Tensor) -> bytes:
    """The sums of blocks of 512 bytes, without carry, so that they are exact and the same on every device; and the
    bytes of the last, shorter block. Values that only change places in a block are not seen."""
    parts: list[torch.Tensor] = []
    for piece in torch.split(tensor.detach().flatten(), _PIECE):
        raw = (piece.to(torch.bfloat16) if piece.is_floating_point() else piece).view(torch.uint8)
        whole = raw.numel() // (8 * _LANES) * 8 * _LANES
        aligned = raw[:whole].clone() if raw.storage_offset() % 8 else raw[:whole]
        parts += [aligned.view(torch.int64).view(-1, _LANES).sum(1), raw[whole:]]
    return b"".join(part.cpu().numpy().tobytes() for part in parts)


def _sample(tensor: torch.Tensor) -> bytes:
    flat = _flat(tensor)
    if (last := flat.numel() - RUN) > PLACES * RUN:
        starts = torch.arange(PLACES) * last // (PLACES - 1)
        flat = flat[(starts[:, None] + torch.arange(RUN)).flatten().to(flat.device)]
    values = flat.cpu()
    return bytes((values.to(torch.bfloat16).float() if values.is_floating_point() else values).numpy().tobytes())


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The values in one dimension; those that are packed, or whole numbers, as bytes."""
    flat = tensor.detach().flatten()
    packed = hasattr(tensor, "quant_state")  # the bits of 4-bit numbers, in whatever type they are kept
    return flat.view(torch.uint8) if packed or not flat.is_floating_point() else flat


def _first_version(base: PreTrainedModel) -> str:
    """The fingerprint as first computed: the first 64 values of every n-th tensor, about 16 in all."""
    config = {key: value for key, value in base.config.to_dict().items() if key not in _VOLATILE}
    digest = hashlib.sha256(_as_json(config))
    tensors = list(base.named_parameters())
    for name, tensor in tensors[:: max(1, len(tensors) // 16)]:
        flat = tensor.detach().flatten()
        flat = flat.view(torch.uint8) if hasattr(tensor, "quant_state") else flat
        digest.update(name.encode() + flat[:64].cpu().to(torch.bfloat16).float().numpy().tobytes())
    return digest.hexdigest()


def _as_json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, default=str).encode()
