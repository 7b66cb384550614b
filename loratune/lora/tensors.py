"""The tensors of an adapter: their initial values, gathering from all processes, and resetting for comparisons."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
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
from loratune.lora.adapter_config import FACTOR
from loratune.lora.adapter_files import WEIGHTS_FILE, AdapterFiles
from loratune.lora.module_names import WRAPPER_PREFIX, join_first

Weights = dict[str, torch.Tensor]
"""Name in the adapter file → tensor."""


FROM_FIRST = ("peft_type", "task_type", "base_model_name_or_path", "revision", "lora_dropout")
"""Keys of a configuration that a sum of adapters takes from the first."""
PARAMETERS = "target_parameters"
"""The key of adapted parameters, such as stacked experts."""
_REASONS = {
    "use_dora": "DoRA scales each row of the merged weight, which no sum of B·A does",
    "bias": "it holds trained biases",
    "lora_bias": "it holds trained biases",
    "modules_to_save": "it holds modules that were trained whole",
    "trainable_token_indices": "it holds embeddings of tokens that were trained whole",
    PARAMETERS: "it adapts stacked parameters, such as experts, instead of linear layers",
    "layer_replication": "it repeats layers of the base",
    "ensure_weight_tying": "it ties the adapters of the embeddings and of the output layer",
}
"""Key of the configuration → why an adapter that sets it is not plain LoRA."""
_HARMLESS = {
    *FROM_FIRST, "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "auto_mapping", "inference_mode", "peft_version",
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "megatron_config", "megatron_core", "qalora_group_size",
}  # fmt: skip
"""Configuration keys that define the targets and scales of LoRA, or that have an effect in training only."""


@dataclass(frozen=True)
class AdapterInit:
    """An adapter before its first step.

    Attributes:
        tensors: Name → initial value.
        to_plain_lora: Whether the values were subtracted from the base, so that the adapter is saved as a plain LoRA of
            twice the rank.
        base: If `tensors` come from another adapter, the values, including biases, with which the model equals its
            base.
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
        """Set the ranks in an adapter_config.json to those of `published`, which may be twice the trained ranks."""
        if not self.to_plain_lora:
            return
        factor = 2**0.5 if config["use_rslora"] else 2  # so that lora_alpha / r, or / sqrt(r), does not change
        config["r"], config["lora_alpha"] = 2 * config["r"], factor * config["lora_alpha"]
        for pattern, by in (("rank_pattern", 2), ("alpha_pattern", factor)):
            config[pattern] = {name: by * value for name, value in (config[pattern] or {}).items()}

    def has_changed(self, state: Mapping[str, torch.Tensor]) -> bool:
        """Whether training changed any B by more than rounding: every update of the base goes through B."""
        least = 1e-10  # the first step of Adam has the size of the learning rate
        ours = {name: tensor for name, tensor in state.items() if "lora_B" in name or "lora_embedding_B" in name}
        steps = (tensor - self.tensors[name].to(tensor) for name, tensor in ours.items())
        return any(step.abs().max() > least for step in steps)


def weights(model: PeftModel, name: str = "default") -> Weights:
    """Name in the adapter file → tensor of an adapter. name: PEFT's name for the adapter."""
    state: Weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return state


def read_weights(path: Path, names: Iterable[str] | None = None) -> Weights:
    """The tensors of a safetensors file. names: the tensors to read; None: all."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}


def full_weights(model: PeftModel) -> Weights:
    """`weights` as whole tensors. If they are sharded, all processes must call this."""
    with _gathered(model):
        return {name: full_tensor(tensor).detach().clone() for name, tensor in weights(model).items()}


def dense(model: PeftModel, where: str, *, merged: bool) -> Any:
    """The base with the adapter merged into it, or without the adapter. The `PeftModel` cannot be used afterwards.

    Args:
        model: The base, not quantized, with the adapter.
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
    """The base without the adapter, the same object as before. The `PeftModel` cannot be used afterwards.

    Changes that the adapter made to the weights of the base remain.
    """
    return model.unload()


def distribute_like(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A whole tensor, distributed over the processes in the same way as `target`."""
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


@torch.no_grad()
def restore(model: PeftModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy whole tensors into a model. If it is sharded, all processes must call this.

    Raises:
        KeyError: The tensors belong to another adapter.
    """
    with _gathered(model, write=True):
        for name, target in weights(model).items():
            target.copy_(distribute_like(tensors[name].to(target.device), target))


@contextmanager
def _gathered(model: Any, *, write: bool = False) -> Iterator[None]:
    """Inside, adapter parameters partitioned by ZeRO-3 are gathered (deepspeed.readthedocs.io, GatheredParameters).
    With `write`, their values in the main process are distributed at the end."""
    partitioned = [p for p in model.parameters() if p.requires_grad and upstream.is_partitioned(p)]
    if not partitioned:
        yield
        return
    with import_module("deepspeed").zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


def fill(model: PeftModel, files: AdapterFiles, name: str = "default") -> None:
    """Load the tensors of a saved adapter that is attached under a name.

    Raises:
        AdapterError: As `read_adapter`; or PEFT does not load some of them.
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
        refusal: Why the base's output cannot be computed while the adapter is attached; empty if it can.
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
    """Copy the parameters that PEFT may change in a base when it loads a saved adapter with this configuration.

    Biases are small; the weights of adapted layers are copied only if it `changes_base`.
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
    """The tensors of an adapter directory.

    Raises AdapterError: see `AdapterFiles.reading`; some hold NaN or inf, or no floating-point numbers.
    """
    with files.reading() as path:  # copied, as they are mapped into memory, and the file may change afterwards
        tensors = {name: one.clone() for name, one in read_weights(path / WEIGHTS_FILE, files.tensors).items()}
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
    """The configuration keys of an adapter that make it differ from plain LoRA."""
    defaults = {field.name: field.default for field in fields(LoraConfig)}
    harmless = _HARMLESS
    if all(".lora_A." in name or ".lora_B." in name for name in files.tensors):
        harmless = _HARMLESS | {"ensure_weight_tying"}  # no embeddings are adapted, or trained whole
    return [k for k, value in files.config.items() if k not in harmless and value and value != defaults.get(k)]


def obstacles(files: AdapterFiles) -> dict[str, str]:
    """Why an adapter is not plain LoRA of layers: key of its configuration → reason; empty if it is.

    A reason that no key gives has the key "". No weights are read.
    """
    keys = effective_keys(files)
    found = {key: _REASONS.get(key, f"{key} is set, which belongs to a variant of LoRA") for key in keys}
    if files.changes_base:
        found["init_lora_weights"] = f"PEFT changes the base's own weights as it loads it ({files.init})"
    others = [name for name, shape in files.tensors.items() if not FACTOR.match(name) or len(shape) != 2]
    if others and not found:
        found[""] = f"it holds {join_first(others, 2)}, which are not A or B of a linear layer"
    return found


def check_scalable(files: AdapterFiles) -> None:
    """Raises AdapterError: an adapter changes more than products B·A, which no scaling reaches."""
    if problems := [
        Problem(Code.ADAPTER_UNSUPPORTED, f"cannot be scaled: {reason}", files.where, key)
        for key, reason in obstacles(files).items()
        if key not in _SCALABLE
    ]:
        raise AdapterError(problems)


def scaled(files: AdapterFiles, scale: float) -> AdapterFiles:
    """An adapter whose update is multiplied by a number: 0 gives the base, 1 the adapter as it was trained.

    Raises AdapterError: see `check_scalable`.
    """
    check_scalable(files)
    pattern = {name: scale * alpha for name, alpha in (files.config.get("alpha_pattern") or {}).items()}
    changes = {"lora_alpha": scale * files.config["lora_alpha"], "alpha_pattern": pattern}
    return replace(files, config=files.config | changes)


_SCALABLE = (PARAMETERS, "ensure_weight_tying")
"""Keys with which all that an adapter changes are products B·A all the same."""


def check_copies(files: AdapterFiles, base: nn.Module, read: Callable[[str], torch.Tensor] | None = None) -> None:
    """Check that copies of base tensors in an adapter's file equal those of the base, so that they can be ignored.

    If dtypes differ, they must be equal in one of the two.

    Args:
        files: The adapter.
        base: The base without adapters.
        read: Reads the values of a parameter of a base on the meta device; without it, only shapes are compared.

    Raises:
        AdapterError: The base has no such parameters, or other values.
    """
    own, others = dict(base.named_parameters(remove_duplicate=False)), []
    with files.reading():
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
    return [name for name, tensor in wide if not tensor.isfinite().all()]  # float8 has no isfinite


@contextmanager
def as_initialized(model: PeftModel, start: AdapterInit, trained_weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, a trained model computes what its base computes.

    If the initialization subtracted a part from the base (PiSSA, OLoRA), the initial adapter equals the base up to
    rounding and replaces the trained one; otherwise the adapter is disabled, and only trained biases are reset. If
    weights are sharded, all processes must call this.

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
