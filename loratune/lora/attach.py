"""Saves, loads and verifies the LoRA adapter on a base; `creation` makes new ones. Only this package imports PEFT.

LoRA: y = Wx + (alpha / r) B A x, W frozen, B zero at the start (Hu et al. 2021, arXiv:2106.09685).
"""

import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft import PeftModel as PeftModel
from peft.tuners.lora import Linear, LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from loratune.codes import Code
from loratune.errors import AdapterError, NumericError, Problem
from loratune.kernels import Adapted
from loratune.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from loratune.lora.module_names import WRAPPER_PREFIX, join_first
from loratune.lora.parameters import experts_of, lora_layers
from loratune.lora.tensors import (
    PARAMETERS,
    AdapterInit,
    BaseSnapshot,
    Weights,
    fill,
    not_finite,
    read_weights,
    snapshot,
    weights,
)
from loratune.system import turns

_EARLY_PEFT = re.compile(r"0\.(18\.|19\.0$)")


def check_trained(state: Mapping[str, torch.Tensor], start: AdapterInit) -> None:
    """Reject an unusable adapter.

    Raises:
        NumericError: A tensor holds NaN or inf, or every B is still as it was initialized.
    """
    if bad := not_finite(state):
        what = f"{len(bad)} adapter tensors hold NaN or inf, among them {join_first(bad, 3)}"
        raise NumericError(Problem(Code.TRAINING_NOT_FINITE, what))
    if not start.has_changed(state):
        what = "training changed nothing: every lora_B still has its initial values"
        fix = "check that the learning rate is not too small and that the loss depends on the data"
        raise NumericError(Problem(Code.LORA_UNCHANGED, what, fix=fix))


def write(model: PeftModel, directory: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write the two files that PEFT reads.

    Args:
        model: The model with the adapter.
        directory: Where to; created if it does not exist.
        state: The adapter's tensors, see `weights`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = copy(model.peft_config[model.active_adapter])
    config.inference_mode = True
    config.save_pretrained(str(directory))
    tensors = {name: tensor.cpu().clone() for name, tensor in state.items()}
    save_file(tensors, directory / WEIGHTS_FILE, {"format": "pt"})


def save(
    model: PeftModel, directory: Path, start: AdapterInit, state: Weights | None = None, *, unchanged: bool = False
) -> int:
    """Write the two files that PEFT reads, and read them back.

    Args:
        model: The model with the trained adapter.
        directory: Where to.
        start: The adapter as it was initialized.
        state: The trained tensors, if the model holds only a part of them, see `tensors.full_weights`.
        unchanged: Whether they may be as they were initialized, or 0.

    Returns:
        The size of the weights file in bytes.

    Raises:
        NumericError: As `check_trained`.
        AdapterError: The file differs from the weights in memory.
    """
    state = weights(model) if state is None else state
    if not unchanged:
        check_trained(state, start)
    memory = {name: tensor.cpu().contiguous() for name, tensor in start.published(state).items()}
    write(model, directory, memory)
    path = directory / CONFIG_FILE
    config = json.loads(path.read_text())
    start.publish_config(config)
    for key, value in config.items():
        if isinstance(value, list) and key != "trainable_token_indices":  # in the order of the tensor's rows
            config[key] = sorted(value)  # PEFT writes its sets in hash order
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    disk = read_weights(directory / WEIGHTS_FILE)
    if memory.keys() != disk.keys() or not all(torch.equal(memory[name], disk[name]) for name in memory):
        what = "the file differs from the weights in memory"
        raise AdapterError(Problem(Code.SYSTEM_CALL_FAILED, what, str(directory / WEIGHTS_FILE)))
    return (directory / WEIGHTS_FILE).stat().st_size


def unknown_keys(files: AdapterFiles) -> list[str]:
    """Notes on configuration keys without a value that this version of PEFT does not know.

    Raises:
        AdapterError: An unknown key has a value, which PEFT would ignore.
    """
    where, known = files.where, {field.name for field in fields(LoraConfig)}
    unknown = {key: value for key, value in files.config.items() if key not in known}
    if effective := sorted(key for key, value in unknown.items() if value not in (None, False, {}, [])):
        what, fix = "this version of PEFT does not know it", "upgrade peft, or remove it"
        raise AdapterError([Problem(Code.ADAPTER_INVALID, what, where, key, fix) for key in effective])
    return [f"{where}: this version of PEFT does not know {', '.join(sorted(unknown))}"] if unknown else []


def attach_saved(base: nn.Module, files: AdapterFiles, name: str = "default") -> PeftModel:
    """Attach LoRA to `base` by a saved configuration, without loading the weights.

    Args:
        base: The base, which may be on the meta device, or a model with other adapters.
        files: The adapter.
        name: PEFT's name for it.

    Raises:
        AdapterError: As `AdapterConfig.peft_values`; the configuration does not fit the base; tensors in the file are
            missing, unexpected, or of other shapes than this base needs.
    """
    config = _saved_config(base, files)
    with _as_mismatch(files):
        config.inference_mode = False  # so that its parameters are trainable
        if next(base.parameters()).is_meta or not files.changes_base:
            config.init_lora_weights = True  # there are no values to initialize from, or those of the file are enough
        model = wrap(base, config, name)
    expected = {key: tuple(tensor.shape) for key, tensor in weights(model, name).items()}
    if problems := _exchanged(model, expected, files) or _differences(expected, files):
        raise AdapterError(problems)
    return model


def _exchanged(model: PeftModel, expected: Mapping[str, tuple[int, ...]], files: AdapterFiles) -> list[Problem]:
    """A problem if the inputs and outputs of stacked parameters are, or may be, exchanged.

    PEFT 0.18 took the second dimension of a parameter for its inputs, 0.19.0 that of some, and 0.19.1 none any more.
    """
    if not _EARLY_PEFT.match(str(files.config.get("peft_version"))):
        return []
    layers = {
        f"{WRAPPER_PREFIX}{path}.lora_A.weight": layer for path, layer in lora_layers(model) if experts_of(layer) > 1
    }
    is_square = any(layer.in_features == layer.out_features for layer in layers.values())
    if not is_square and all(files.tensors.get(key) == expected.get(key) for key in layers):
        return []
    what = (
        f"PEFT {files.config['peft_version']}, which saved it, had inputs and outputs of stacked parameters exchanged"
    )
    return [Problem(Code.ADAPTER_UNSUPPORTED, what, str(files.path), PARAMETERS, "merge it with that release")]


def before_load(base: PreTrainedModel, files: AdapterFiles) -> BaseSnapshot:
    """The parameters that `load` may change in the base, with their present values.

    Raises:
        AdapterError: The configuration does not fit the base.
    """
    config = _saved_config(base, files)
    with _as_mismatch(files):
        return snapshot(base, config, files.changes_base)


def _saved_config(base: nn.Module, files: AdapterFiles) -> LoraConfig:
    """A saved configuration for PEFT, with exact names. Raises as `AdapterConfig.peft_values`."""
    plain: nn.Module = base.get_base_model() if isinstance(base, PeftModel) else base
    modules = [path for path, _ in plain.named_modules() if path]
    parameters = [name for name, _ in plain.named_parameters()]
    values = files.peft_values(modules, parameters)
    with files.reading() as path, _as_mismatch(files):
        return replace(LoraConfig.from_pretrained(str(path)), **values)


@contextmanager
def _as_mismatch(files: AdapterFiles) -> Iterator[None]:
    """Translates any error of PEFT inside to a mismatch of adapter and base: values that PEFT does not check fail
    wherever they are first used."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        what = f"does not fit its base {files.base}: {reason}"
        raise AdapterError(Problem(Code.ADAPTER_MISMATCH, what, str(files.path))) from None


def load(base: PreTrainedModel | PeftModel, files: AdapterFiles, name: str = "default") -> PeftModel:
    """Load a saved adapter onto its base, in evaluation mode. Arguments as in `attach_saved`.

    Raises:
        AdapterError: As `attach_saved` and `fill`.
    """
    model = attach_saved(base, files, name)
    fill(model, files, name)
    return model.eval()


def wrap(base: nn.Module, config: LoraConfig, name: str = "default") -> PeftModel:
    """The base with LoRA by a configuration of PEFT, without PEFT's warnings."""
    with warnings.catch_warnings(), turns.stdout_to(sys.stderr):  # packages of quantized bases print on import
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # PEFT corrects it for Conv1D, and warns
        warnings.filterwarnings("ignore", message=".*was renamed from.*")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated.*")  # PEFT reads it
        # PEFT looks for the targets of these patterns among modules alone, although they give parameters a rank too.
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match any targeted module.*")
        base_name = config.base_model_name_or_path
        if isinstance(base, PeftModel):
            base.add_adapter(name, config)
            return base
        model = get_peft_model(base, config, name)
    config.base_model_name_or_path = base_name  # PEFT has replaced it by the name that the base records
    return model


def _differences(expected: Mapping[str, tuple[int, ...]], files: AdapterFiles) -> list[Problem]:
    """A problem for each kind of difference between the tensors of a file and those that the base needs."""
    found = {
        "are missing": sorted(expected.keys() - files.tensors.keys()),
        "belong to no module": sorted(files.tensors.keys() - expected.keys()),
        "have another shape": [
            f"{name} {files.tensors[name]} where the base needs {shape}"
            for name, shape in expected.items()
            if files.tensors.get(name, shape) != shape
        ],
    }
    where, fix = str(files.path), f"is {files.base} the base it was trained on?"
    return [
        Problem(
            Code.ADAPTER_MISMATCH, f"{len(names)} tensors {kind}, among them {join_first(names, 3)}", where, fix=fix
        )
        for kind, names in found.items()
        if names
    ]


def adapted_linear(module: Any, name: str | None = None, *, quantized: bool = False) -> Adapted | None:
    """The linear layer and LoRA of a module: a frozen linear layer with plain LoRA, or without (disabled adapters).

    Args:
        module: Any module of a model.
        name: PEFT's name of the adapter; None for the only adapter of the module, which must be active.
        quantized: Whether layers of bitsandbytes are read as well, whose weights are packed.

    Returns:
        The frozen layer, A and B, scaling and dropout; None for every other kind of module, such as DoRA and quantized
        layers.
    """
    if type(module) is nn.Linear:
        return None if _is_trained(module) else Adapted(module)
    own = module.base_layer if isinstance(module, LoraLayer) else None
    is_plain = type(module) is Linear and type(own) is nn.Linear
    if not (is_plain or (quantized and isinstance(own, nn.Linear))) or _is_trained(module.base_layer):
        return None
    if module.disable_adapters:
        return Adapted(module.base_layer)
    if module.merged or (name is None and (len(module.lora_A) != 1 or [*module.active_adapters] != [*module.lora_A])):
        return None
    name = next(iter(module.lora_A)) if name is None else name
    if name not in module.lora_A:
        return Adapted(module.base_layer)
    if name in module.lora_variant or module.fan_in_fan_out or module.lora_bias[name]:
        return None
    dropout = module.lora_dropout[name]
    probability = float(dropout.p) if isinstance(dropout, nn.Dropout) else 0.0
    down, up = module.lora_A[name].weight, module.lora_B[name].weight
    return Adapted(module.base_layer, down, up, float(module.scaling[name]), probability)


@contextmanager
def scaled(model: PeftModel, name: str, factor: float) -> Iterator[None]:
    """Inside, the update of an adapter is multiplied by a factor. name: PEFT's name of the adapter."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and name in layer.scaling]
    before = [layer.scaling[name] for layer in layers]
    try:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling[name] = scaling * factor
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling[name] = scaling


def _is_trained(layer: nn.Linear) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())


def is_plain(model: PeftModel, name: str) -> bool:
    """Whether an adapter consists only of LoRA on layers that `adapted_linear` supports. name: PEFT's name for it."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    own = [layer for layer in layers if name in layer.lora_A or name in layer.lora_embedding_A]
    are_read = all((part := adapted_linear(layer, name)) is not None and part.down is not None for layer in own)
    return are_read and len(weights(model, name)) == 2 * len(own)  # A and B, and no whole modules
