"""A merge of a base that has to be loaded: quantized ones, GGUF files, weights in other files than safetensors."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loratune import memory
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.console import format_size
from loratune.data import ProgressFactory
from loratune.errors import AdapterError, Problem
from loratune.export.merging import MOST_BYTES, Changes, Kept, StreamedMerge, Written
from loratune.lora import merging, tensors
from loratune.model import fingerprints, load, quantization, stored


def prepare(source: AdapterDirectory, dtype: torch.dtype | None) -> "StreamedMerge | LoadedMerge":
    """Find out what will be merged, and how: without loading the base wherever that is possible.

    Args:
        source: The adapter.
        dtype: The dtype of the merged model; None keeps that of the base.

    Raises:
        ModelError: The base cannot be had, or cannot be loaded.
        AdapterError: See `lora.merging.changes`; the base has to be loaded and does not fit in memory.
    """
    config = load.load_config(source.base)
    model = load.build_meta(_dense(config))
    try:
        return StreamedMerge(source, config, model, stored.open_stored(source.base, config, model), dtype)
    except stored.NotStreamableError as reason:
        return LoadedMerge(source, config, str(reason), dtype)


def _dense(config: Any) -> Any:
    """The configuration without a record of quantization."""
    plain = copy.deepcopy(config)
    for part in (plain, plain.get_text_config()):
        vars(part).pop("quantization_config", None)
    return plain


class LoadedMerge:
    """A merge in memory, module by module."""

    def __init__(self, source: AdapterDirectory, config: Any, reason: str, dtype: torch.dtype | None):
        """Load the base.

        Args:
            source: The adapter.
            config: The configuration of the base.
            reason: Why the base has to be loaded.
            dtype: The dtype of the merged model; None is that which the base records, else that in which it was
                loaded.

        Raises:
            ModelError: The base cannot be loaded.
            AdapterError: As `prepare`.
        """
        self._source = source
        self.config = _dense(config)
        self._model = load.build_meta(self.config)
        computed = load.compute_dtype(source.base)
        recorded = config.dtype if isinstance(config.dtype, torch.dtype) and not source.base.gguf_file else computed
        self._dtype: torch.dtype = dtype or recorded
        self.parameters = sum(tensor.numel() for tensor in self._model.parameters())
        needed, free = (
            self.parameters * (computed.itemsize + self._dtype.itemsize),
            memory.available(torch.device("cpu")),
        )
        if needed > free:
            what = f"cannot be merged here: the base has to be loaded ({reason}), which takes about "
            what += f"{format_size(needed)} of memory, and {format_size(free)} are free"
            raise AdapterError(Problem(Code.MERGE_TOO_LARGE, what, str(source.files.path), fix="use a larger machine"))
        self._changes: Changes = merging.changes(load.build_meta(self.config), source.files)
        self._base = load.load_base(source.base)
        tensors.check_copies(source.files, self._base)
        self.size = self.parameters * self._dtype.itemsize
        record = quantization.record_of(config.to_dict())
        is_quantized = source.base.gguf_file or record is not None or source.base.quantization != "none"
        self.note = f"the base was loaded: {reason}"
        if is_quantized:
            name = str(self._dtype).removeprefix("torch.")
            self.note = f"the base is merged in its dequantized form, as {name}, and not quantized again: {reason}"

    def fingerprint(self) -> str:
        """The fingerprint of the base."""
        return fingerprints.fingerprint(self._base, self._source.files.base_fingerprint)

    def write(self, staging: Path, watch: ProgressFactory, most: int = MOST_BYTES) -> Written:
        """Write the model with transformers, and let go of the base. Arguments and errors as of `StreamedMerge`."""
        kept: list[Kept] = []
        state: dict[str, Tensor] = {}
        dense = load.build_meta(self.config)
        with watch("merging", self.size) as advance:
            for name in dense.state_dict():
                state[name] = self._merged(name, kept)
                advance(state[name].nbytes)
        untied = self._untie(dense)
        dense.load_state_dict(state, assign=True)
        if not untied:
            dense.tie_weights()
        del self._base
        dense.save_pretrained(staging, max_shard_size=most)
        files = list(staging.glob("*.safetensors"))
        dtypes = tuple(sorted({str(p.dtype).removeprefix("torch.") for p in dense.parameters()}))
        return Written(tuple(kept), sum(path.stat().st_size for path in files), len(files), untied, dtypes)

    def _merged(self, name: str, kept: list[Kept]) -> Tensor:
        """A tensor of the model with its changes, as it is stored. Raises AdapterError: it is not finite."""
        path, _, attribute = name.rpartition(".")
        weight, made = merging.dense(self._base.get_submodule(path), attribute).cpu(), self._changes.get(name, ())
        if not weight.is_floating_point():
            return weight
        base = weight.float()
        target = merging.apply(made, base)
        rounded = target.to(self._dtype)
        if not rounded.isfinite().all():
            what = f"{name} is not finite as {str(self._dtype).removeprefix('torch.')}"
            where, fix = str(self._source.files.path), "use --dtype float32"
            raise AdapterError(Problem(Code.MERGE_NOT_FINITE, what, where, fix=fix))
        if made:
            kept.append(Kept(name))
            kept[-1].add(base, target, rounded)
        return rounded.clone() if rounded.data_ptr() == weight.data_ptr() else rounded

    def _untie(self, dense: nn.Module) -> bool:
        """Give tensors that the base ties a place each, if the adapter makes them differ."""
        if not any(self._differ(names) for names in _tied(dense)):
            return False
        self.config.tie_word_embeddings = False
        config: Any = dense.config
        config.tie_word_embeddings = False
        for names in _tied(dense):
            for name in names:
                path, _, attribute = name.rpartition(".")
                module = dense.get_submodule(path)
                setattr(module, attribute, nn.Parameter(torch.empty_like(getattr(module, attribute))))
        return True

    def _differ(self, names: list[str]) -> bool:
        first = self._changes.get(names[0], ())
        return any(not merging.are_same(self._changes.get(name, ()), first) for name in names)


def _tied(model: nn.Module) -> Iterator[list[str]]:
    """Names of each tensor that a model holds under several."""
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_tensor.setdefault(id(tensor), []).append(name)
    yield from (names for names in by_tensor.values() if len(names) > 1)
