"""The tensors of an adapter: their initial values, gathering from all processes, and resetting for comparisons."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from loratune.codes import Code
from loratune.errors import AdapterError, Problem
from loratune.kernels import full_tensor
from loratune.lora import upstream
from loratune.lora.adapter_files import WEIGHTS_FILE, AdapterFiles
from loratune.lora.module_names import WRAPPER_PREFIX, join_first

Weights = dict[str, torch.Tensor]
"""Name in the adapter file → tensor."""


KEPT = ("peft_type", "task_type", "base_model_name_or_path", "revision", "lora_dropout")
"""Keys of a configuration that a sum of adapters takes from the first."""
_HARMLESS = {
    *KEPT, "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "auto_mapping", "inference_mode", "peft_version",
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "megatron_config", "megatron_core", "qalora_group_size",
}  # fmt: skip
"""Keys of a configuration that say where LoRA is and how it is scaled, or that have an effect in training only."""


@dataclass(frozen=True)
class AdapterInit:
    """An adapter before its first step.

    Attributes:
        tensors: Name → initial value.
        to_plain_lora: The values were taken out of the base, so that the adapter is saved as a plain LoRA of twice the
            rank.
        base: The values, its biases among them, with which the model computes what its base computes, where those of
            `tensors` are of another adapter.
    """

    tensors: dict[str, torch.Tensor]
    to_plain_lora: bool
    base: dict[str, torch.Tensor] | None = None

    def published(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a file that fits the unchanged base; `state` holds those that were trained."""
        if not self.to_plain_lora:
            return state
        tensors = dict(state)
        for name, tensor in state.items():
            if "lora_A" in name:
                tensors[name] = torch.cat([tensor, self.tensors[name].to(tensor)], dim=0)
            elif "lora_B" in name:
                tensors[name] = torch.cat([tensor, -self.tensors[name].to(tensor)], dim=1)
        return tensors

    def publish_config(self, config: dict[str, Any]) -> None:
        """Change the content of an adapter_config.json to the ranks of `published`, which may be twice the trained."""
        if not self.to_plain_lora:
            return
        factor = 2**0.5 if config["use_rslora"] else 2  # so that lora_alpha / r, or / sqrt(r), does not change
        config["r"], config["lora_alpha"] = 2 * config["r"], factor * config["lora_alpha"]
        for pattern, by in (("rank_pattern", 2), ("alpha_pattern", factor)):
            config[pattern] = {name: by * value for name, value in (config[pattern] or {}).items()}

    def has_changed(self, state: Mapping[str, torch.Tensor]) -> bool:
        """Whether training changed any B, by more than rounding: every update of the base goes through B."""
        least = 1e-10  # the first step of Adam is as long as its learning rate
        steps = (
            tensor - self.tensors[name].to(tensor)
            for name, tensor in state.items()
            if "lora_B" in name or "lora_embedding_B" in name
        )
        return any(step.abs().max() > least for step in steps)


def weights(model: PeftModel, name: str = "default") -> Weights:
    """The tensors of an adapter under their names in the adapter file. name: PEFT's for the adapter."""
    state: Weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return state


def read_weights(path: Path, names: Iterable[str] | None = None) -> Weights:
    """The tensors of a safetensors file, or those of some names."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}


def full_weights(model: PeftModel) -> Weights:
    """The same as whole tensors. Where processes hold parts of them, all of these must call this."""
    with _gathered(model):
        return {name: full_tensor(tensor).detach().clone() for name, tensor in weights(model).items()}


def dense(model: PeftModel, where: str, *, merged: bool) -> Any:
    """The base with the adapter merged into it, or without the adapter, which uses up the model.

    Args:
        model: The base, with its weights as they are, and the adapter.
        where: The adapter, for messages.
        merged: Whether the adapter is merged.

    Raises:
        AdapterError: The base is quantized.
    """
    if getattr(model.get_base_model(), "is_quantized", False):
        what, fix = "its base is quantized, and this writes whole weights", "train or merge on the base as it is"
        raise AdapterError(Problem(Code.EXPORT_UNSUPPORTED, what, where, fix=fix))
    return model.merge_and_unload(safe_merge=True) if merged else model.unload()


def detached(model: PeftModel) -> Any:
    """The base without the adapter, which uses up the model: the same object as before, quantized or not.

    What the adapter changed in the weights of the base stays changed.
    """
    return model.unload()


def distribute_like(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A whole tensor, distributed over the processes in the same way as `target`."""
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


@torch.no_grad()
def restore(model: PeftModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy whole tensors into a model that may hold only a part of them; then all processes must call this.

    Raises:
        KeyError: They belong to another adapter.
    """
    with _gathered(model, write=True):
        for name, target in weights(model).items():
            target.copy_(distribute_like(tensors[name].to(target.device), target))


@contextmanager
def _gathered(model: Any, *, write: bool = False) -> Iterator[None]:
    """Inside, parameters of the adapter that ZeRO-3 has partitioned are whole (deepspeed.readthedocs.io,
    GatheredParameters). With `write`, their values in the main process are distributed at the end."""
    partitioned = [p for p in model.parameters() if p.requires_grad and upstream.is_partitioned(p)]
    if not partitioned:
        yield
        return
    with import_module("deepspeed").zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


def fill(model: PeftModel, files: AdapterFiles, name: str = "default") -> None:
    """Load the tensors of a saved adapter that is attached under a name.

    Raises:
        AdapterError: As `read_adapter`; or PEFT loses some.
    """
    result = set_peft_model_state_dict(model, read_adapter(files), name)
    if lost := list(result.unexpected_keys):  # PEFT renames some modules as it loads, and does not report what it loses
        what = f"PEFT finds no module for {len(lost)} tensors, among them {join_first(lost, 3)}"
        raise AdapterError(Problem(Code.ADAPTER_MISMATCH, what, str(files.path)))


@dataclass(frozen=True)
class BaseSnapshot:
    """Parameters of a base that PEFT may change with an adapter, with their values before that.

    Attributes:
        values: Module, name of its parameter, and value.
        refusal: Why the base's output cannot be computed beside the adapter; empty if it can.
    """

    values: tuple[tuple[nn.Module, str, torch.Tensor], ...]
    refusal: str = ""

    @contextmanager
    def alone(self, model: PeftModel, where: str) -> Iterator[None]:
        """Inside, the model computes what its base computes.

        Args:
            model: The base with the adapter.
            where: The path of the adapter.

        Raises:
            AdapterError: That is not possible.
        """
        if self.refusal:
            what = f"the base cannot be compared with this adapter: {self.refusal}"
            raise AdapterError(Problem(Code.ADAPTER_NOT_REPRODUCIBLE, what, where))
        changed = [getattr(module, name) for module, name, _ in self.values]
        try:
            for module, name, value in self.values:
                setattr(module, name, nn.Parameter(value, requires_grad=False))
            with model.disable_adapter():
                yield
        finally:
            for (module, name, _), parameter in zip(self.values, changed, strict=True):
                setattr(module, name, parameter)


def snapshot(base: nn.Module, config: LoraConfig, changes_base: bool) -> BaseSnapshot:
    """Copy what PEFT may change in a base as it attaches a saved adapter of this configuration, and loads its tensors.

    Biases are small; the weights of adapted layers are copied only where it `changes_base`.
    """
    if config.layer_replication:
        return BaseSnapshot((), "lora.layer_replication repeats its layers")
    values = []
    for path, module in base.named_modules():
        is_changed = changes_base and upstream.is_target(config, path)
        for name, parameter in module.named_parameters(recurse=False):
            if (is_changed and parameter.dim() > 1) or (config.bias != "none" and "bias" in name):
                values.append((module, name, parameter.detach().clone()))
    return BaseSnapshot(tuple(values))


def read_adapter(files: AdapterFiles) -> Weights:
    """The tensors of an adapter directory. Raises AdapterError: some hold NaN or inf, or no floating-point numbers."""
    tensors = read_weights(files.path / WEIGHTS_FILE, files.tensors)
    integers = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    for code, bad, what in (
        (Code.ADAPTER_INVALID, integers, "no floating-point numbers"),
        (Code.ADAPTER_NOT_FINITE, not_finite(tensors), "NaN or inf"),
    ):
        if bad:
            what = f"{len(bad)} tensors hold {what}, among them {join_first(bad, 3)}"
            raise AdapterError(Problem(code, what, str(files.path)))
    return tensors


def effective_keys(files: AdapterFiles) -> list[str]:
    """The keys of an adapter's configuration by which it computes something else than plain LoRA does."""
    defaults = {field.name: field.default for field in fields(LoraConfig)}
    harmless = _HARMLESS
    if all(".lora_A." in name or ".lora_B." in name for name in files.tensors):
        harmless = _HARMLESS | {"ensure_weight_tying"}  # no embeddings are adapted, or trained whole
    return [k for k, value in files.config.items() if k not in harmless and value and value != defaults.get(k)]


def check_copies(files: AdapterFiles, base: nn.Module, read: Callable[[str], torch.Tensor] | None = None) -> None:
    """Check that the tensors of the base in an adapter's file are the base's own: then nothing is lost without them.

    Where dtypes differ, they have to be equal in one of the two.

    Args:
        files: The adapter.
        base: The base without adapters.
        read: Reads the values of a parameter of a base that is on the meta device; without it nothing but shapes is
            compared there.

    Raises:
        AdapterError: The base has no such parameters, or other values.
    """
    own, others = dict(base.named_parameters(remove_duplicate=False)), []
    for path, name in files.copies:
        parameter = name.removeprefix(WRAPPER_PREFIX).replace(".base_layer.", ".")
        if parameter not in own or own[parameter].shape != files.copies[path, name]:
            others.append((path, name))
        elif read is not None or not own[parameter].is_meta:
            values = (own[parameter] if read is None else read(parameter)).detach().cpu()
            copy = read_weights(path, [name])[name]
            equal = torch.equal(copy, values.to(copy.dtype)) or torch.equal(copy.to(values.dtype), values)
            if not (equal and copy.is_floating_point()):  # integers may all be 0 after rounding
                others.append((path, name))
    if others:
        what = f"{len(others)} tensors beside its LoRA are not those of the base, among them {others[0][1]}"
        fix = f"is {files.base} the base it was trained on?"
        raise AdapterError(Problem(Code.ADAPTER_MISMATCH, what, str(others[0][0].parent), fix=fix))


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of tensors that hold NaN or inf."""
    wide = ((name, tensor.float() if tensor.element_size() == 1 else tensor) for name, tensor in tensors.items())
    return [name for name, tensor in wide if not tensor.isfinite().all()]  # which float8 has no function for


@contextmanager
def as_initialized(model: PeftModel, start: AdapterInit, trained_weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, a trained model computes what its base computes.

    An initialization that took a part out of the base (PiSSA, OLoRA) equals the base up to rounding, so the initial
    adapter replaces the trained one; otherwise the adapter is disabled, and only trained biases are set back. Where
    processes share the weights, all must call this.

    Args:
        model: The trained model.
        start: The adapter as it was initialized.
        trained_weights: The trained tensors, see `full_weights`; the model has them again afterwards.
    """
    is_replaced = start.to_plain_lora or model.peft_config["default"].bias != "none"
    if is_replaced:
        restore(model, start.tensors if start.base is None else start.base)
    try:
        if start.to_plain_lora:
            yield
        else:
            with model.disable_adapter():
                yield
    finally:
        if is_replaced:
            restore(model, trained_weights)


@contextmanager
def as_started(model: PeftModel, start: AdapterInit, trained_weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, a trained model computes what it did before its first step. Arguments as in `as_initialized`."""
    restore(model, start.tensors)
    try:
        yield
    finally:
        restore(model, trained_weights)
