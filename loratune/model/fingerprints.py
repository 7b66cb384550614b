"""Whether two bases are the same model, told from a sample of their numbers.

A fingerprint is written into checkpoints and published adapters. Its first characters name how it was computed, so that
records of older releases stay comparable: `fingerprint(base, like=record)` computes what that record holds.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

VERSION = "2:"
"""How the fingerprints of this release begin. The first version had no such mark: 64 hexadecimal digits."""
PLACES = 64
"""Places within each tensor at which values are read, spread evenly from its first value to its last."""
RUN = 16
"""Neighbouring values that are read at each place."""
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "quantization_config")
"""Keys of a configuration that may change while the model stays the same."""


def fingerprint(base: PreTrainedModel, like: str | None = None) -> str:
    """SHA-256 of the configuration of a model, and of the names, shapes and a sample of the values of all its tensors.

    The whole of a tensor is never read: a 70B model takes some 12,000 short reads. Floating-point values are rounded to
    bfloat16 first, so the dtype that the model was loaded in makes no difference.

    Args:
        base: The model before PEFT wraps it, on any device.
        like: The fingerprint that this one is to be compared with; it is computed in the same way. None, or a version
            that this release does not know: the present version.
    """
    if like is not None and ":" not in like:
        return _first_version(base)
    digest = hashlib.sha256(_as_json(_settings(base.config)))
    for name, tensor in _tensors(base):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + _sample(tensor))
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


def _settings(config: Any) -> dict[str, Any]:
    """The settings that are not the defaults of the configuration's class. Upstream adds keys to all configurations
    from release to release; a new key at its default must not make another model of the same files."""
    try:
        values: dict[str, Any] = config.to_diff_dict()
    except Exception:  # the configuration of remote code need not build without arguments, which this method tries
        values = config.to_dict()
    return {key: value for key, value in values.items() if key not in _VOLATILE}


def _tensors(base: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters, and the buffers that are saved: GPTQ and AWQ keep their weights in those."""
    yield from base.named_parameters()
    saved = base.state_dict(keep_vars=True).keys()
    yield from ((name, buffer) for name, buffer in base.named_buffers() if name in saved)


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
