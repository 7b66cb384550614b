"""The LoRA adapter: attach it to a base, save, load and verify it. Only this package imports PEFT.

LoRA: y = Wx + (alpha / r) B A x, W frozen, B zero at the start (Hu et al. 2021, arXiv:2106.09685).
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
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
from transformers import PreTrainedModel, set_seed

from loratune.codes import Code
from loratune.config import LoraSection
from loratune.errors import AdapterError, ModelError, NumericError, Problem
from loratune.events import progress
from loratune.kernels import Adapted
from loratune.lora import initialize, parameters, targets
from loratune.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from loratune.lora.module_names import join_first
from loratune.lora.parameters import Count, file_bytes
from loratune.lora.targets import Targets
from loratune.lora.tensors import (
    AdapterInit,
    BaseSnapshot,
    Weights,
    fill,
    not_finite,
    read_weights,
    restore,
    snapshot,
    weights,
)

_NOT_PEFT = {"init_lora_weights", "use_lorafa", "loraplus_lr_ratio", "start_from"}
"""Keys of the section that are not fields of `peft.LoraConfig`, or are passed separately."""


@progress("attaching LoRA")
def adapt(
    base: nn.Module,
    section: LoraSection,
    *,
    seed: int,
    dense: nn.Module | None = None,
    origin: tuple[str | None, str | None] = (None, None),
) -> tuple[PeftModel, Targets]:
    """Find the modules that `lora.target_modules` and its like mean, and put LoRA on them.

    Args:
        base: The model, which may be on the meta device.
        section: The settings of LoRA.
        seed: Seed of the random values of A.
        dense: The model in which modules are looked for, of the names of `base`, where its layers are packed.
        origin: Recorded as the name of the base, and as its revision.

    Returns:
        The model, and its targets with notes on all that may surprise.

    Raises:
        ModelError, ConfigError: As `targets.find` and `attach`.
    """
    matched = targets.find(base if dense is None else dense, section)
    model = attach(base, section, matched.peft(), seed=seed, base_name=origin[0], revision=origin[1])
    return model, replace(matched, notes=(*matched.notes, *parameters.notes(model)))


def attach(
    base: nn.Module,
    section: LoraSection,
    targeting: Mapping[str, Any],
    *,
    seed: int,
    base_name: str | None = None,
    revision: str | None = None,
) -> PeftModel:
    """Freeze `base` and put LoRA on its targets; the model's output does not change.

    Args:
        base: The model, which may be on the meta device.
        section: The settings of LoRA.
        targeting: Keywords for `LoraConfig`: `target_modules`, and the patterns and modules to save that go with them,
            resolved to the names of this base. See `Targets.peft`.
        seed: Seed of the random values of A.
        base_name: Recorded as the name of the base.
        revision: Recorded as its revision.

    Raises:
        ModelError: PEFT cannot adapt the model; an initialization or a setting does not fit its layers.
    """
    is_meta = next(base.parameters()).is_meta  # there are no values to initialize from
    is_later = section.init_lora_weights in ("eva", "loftq")  # they start as plain LoRA, see `initialize_adapter`
    config = LoraConfig(
        task_type="CAUSAL_LM" if isinstance(base, PreTrainedModel) else None,
        base_model_name_or_path=base_name,
        revision=revision,
        init_lora_weights=True if is_meta or is_later else section.init_lora_weights,
        **section.model_dump(exclude=_NOT_PEFT | targeting.keys()) | dict(targeting),
    )
    targets.check_tokens(base, section, targeting)
    initialize.check_layers(base, section, tuple(f".{name}" for name in targeting["target_modules"]))
    set_seed(seed)
    try:
        model = _wrap(base, config)
    except (ValueError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        what = f"PEFT cannot adapt this model: {error}"
        raise ModelError(Problem(Code.LORA_UNSUPPORTED, what, key="lora")) from None
    initialize.check_ranks(model, section)
    if initialize.becomes_plain_lora(section):
        config.init_lora_weights = True  # what is published is plain LoRA, see `AdapterInit`
    if section.bias != "none" and not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("bias")):
        what = "the model has no such biases"
        raise ModelError(Problem(Code.LORA_UNKNOWN_TARGET, what, key="lora.bias", fix="set it to none"))
    if section.use_lorafa:
        parameters.freeze_a(model)
    return model


def initialize_adapter(
    model: PeftModel,
    section: LoraSection,
    *,
    batches: Sequence[Mapping[str, torch.Tensor]] = (),
    originals: Callable[[], Callable[[str], torch.Tensor]] | None = None,
    start_from: AdapterFiles | None = None,
) -> AdapterInit:
    """Initialize a fresh adapter beyond what PEFT does while it attaches it.

    Args:
        model: The model with the fresh adapter.
        section: The settings of LoRA.
        batches: Collated training rows, for eva.
        originals: Opens the weights before quantization, for loftq: returns a function from the path of a linear layer
            to its weight.
        start_from: The adapter of `lora.start_from`.

    Returns:
        The values with which the adapter starts.

    Raises:
        ModelError: As `initialize.eva` and `initialize.loftq`.
        DataError: As `initialize.eva`.
        ConfigError, AdapterError: As `initialize.start_values`.
    """
    first: torch.Tensor = next(model.parameters())
    if not first.is_meta:
        if section.init_lora_weights == "eva":
            initialize.eva(model, batches)
        elif section.init_lora_weights == "loftq" and originals is not None:
            initialize.loftq(model, originals())
    tensors = {name: tensor.clone() for name, tensor in weights(model).items()}
    if start_from is None:
        return AdapterInit(tensors, initialize.becomes_plain_lora(section))
    values = initialize.start_values(model, section, start_from, tensors)
    if not first.is_meta:
        restore(model, values)
    return AdapterInit(values, to_plain_lora=False, base=tensors if section.bias != "none" else None)


def check_trained(state: Mapping[str, torch.Tensor], start: AdapterInit) -> None:
    """Refuse an adapter that is of no use.

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


def save(model: PeftModel, directory: Path, start: AdapterInit, state: Weights | None = None) -> int:
    """Write the two files that PEFT reads, and read them back.

    Args:
        model: The model with the trained adapter.
        directory: Where to.
        start: The adapter as it was initialized.
        state: The trained tensors, if the model holds only a part of them, see `tensors.full_weights`.

    Returns:
        The size of the file of weights in bytes.

    Raises:
        NumericError: As `check_trained`.
        AdapterError: The file does not hold what is in memory.
    """
    state = weights(model) if state is None else state
    check_trained(state, start)
    memory = {name: tensor.cpu().contiguous() for name, tensor in start.published(state).items()}
    write(model, directory, memory)
    path = directory / CONFIG_FILE
    config = json.loads(path.read_text())
    start.publish_config(config)
    for key, value in config.items():
        if isinstance(value, list) and key != "trainable_token_indices":  # whose order is that of the tensor's rows
            config[key] = sorted(value)  # PEFT writes its sets in hash order
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    disk = read_weights(directory / WEIGHTS_FILE)
    if memory.keys() != disk.keys() or not all(torch.equal(memory[name], disk[name]) for name in memory):
        what = "the file differs from the weights in memory"
        raise AdapterError(Problem(Code.SYSTEM_CALL_FAILED, what, str(directory / WEIGHTS_FILE)))
    return (directory / WEIGHTS_FILE).stat().st_size


def unknown_keys(files: AdapterFiles) -> list[str]:
    """A note on the keys of the configuration that this version of PEFT does not know, and that have no value.

    Raises:
        AdapterError: Such a key has a value, which PEFT would ignore.
    """
    where, known = files.where, {field.name for field in fields(LoraConfig)}
    unknown = {key: value for key, value in files.config.items() if key not in known}
    if effective := sorted(key for key, value in unknown.items() if value not in (None, False, {}, [])):
        what, fix = "this version of PEFT does not know it", "upgrade peft, or remove it"
        raise AdapterError([Problem(Code.ADAPTER_INVALID, what, where, key, fix) for key in effective])
    return [f"{where}: this version of PEFT does not know {', '.join(sorted(unknown))}"] if unknown else []


def attach_saved(base: nn.Module, files: AdapterFiles, name: str = "default") -> PeftModel:
    """Put LoRA on `base`, which may be on the meta device, as a saved configuration says, without its weights.

    Args:
        base: The base, or a model that has other adapters already.
        files: The adapter.
        name: PEFT's name for it.

    Raises:
        AdapterError: As `AdapterConfig.peft_values`; the configuration does not fit the base; tensors are missing from
            the file, or it has others, or of other shapes, than this base needs.
    """
    config = _saved_config(base, files)
    with _as_mismatch(files):
        config.inference_mode = False  # so that its parameters count as trained
        if next(base.parameters()).is_meta or not files.changes_base:
            config.init_lora_weights = True  # there are no values to initialize from, or those of the file are enough
        model = _wrap(base, config, name)
    expected = {key: tuple(tensor.shape) for key, tensor in weights(model, name).items()}
    if problems := _differences(expected, files):
        raise AdapterError(problems)
    return model


def before_load(base: PreTrainedModel, files: AdapterFiles) -> BaseSnapshot:
    """The parameters that `load` may change in the base, with their present values.

    Raises:
        AdapterError: The configuration does not fit the base.
    """
    config = _saved_config(base, files)
    with _as_mismatch(files):
        return snapshot(base, config, files.changes_base)


def _saved_config(base: nn.Module, files: AdapterFiles) -> LoraConfig:
    """A saved configuration as PEFT is given it, with exact names. Raises as `AdapterConfig.peft_values`."""
    plain: nn.Module = base.get_base_model() if isinstance(base, PeftModel) else base
    modules = [path for path, _ in plain.named_modules() if path]
    parameters = [name for name, _ in plain.named_parameters()]
    values = files.peft_values(modules, parameters)
    with _as_mismatch(files):
        return replace(LoraConfig.from_pretrained(str(files.path)), **values)


@contextmanager
def _as_mismatch(files: AdapterFiles) -> Iterator[None]:
    """Whatever PEFT raises inside means that the adapter does not fit its base: values that PEFT does not check fail
    wherever it first uses them."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        what = f"does not fit its base {files.base}: {reason}"
        raise AdapterError(Problem(Code.ADAPTER_MISMATCH, what, str(files.path))) from None


def load(base: PreTrainedModel | PeftModel, files: AdapterFiles, name: str = "default") -> PeftModel:
    """Put a saved adapter on its base, in evaluation mode. Arguments as in `attach_saved`.

    Raises:
        AdapterError: As `attach_saved` and `fill`.
    """
    model = attach_saved(base, files, name)
    fill(model, files, name)
    return model.eval()


def count(model: PeftModel, start: AdapterInit) -> Count:
    """Count parameters exactly, on any device, the meta device too."""
    trainable, total = model.get_nb_trainable_parameters()
    return Count(trainable, total, file_bytes(start.published(weights(model))))


def _wrap(base: nn.Module, config: LoraConfig, name: str = "default") -> PeftModel:
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):  # packages of quantized bases print on import
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # PEFT corrects it for Conv1D, and warns
        warnings.filterwarnings("ignore", message=".*was renamed from.*")
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
    """Each way in which the tensors of a file differ from those that the base needs."""
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


def adapted_linear(module: Any, name: str | None = None) -> Adapted | None:
    """A frozen linear layer, with plain LoRA, or without any, as where adapters are disabled.

    Args:
        module: Any module of a model.
        name: PEFT's name of the adapter; None for the only one that the module has, which must be active.

    Returns:
        Its frozen layer, A and B, scaling and dropout; None for every other kind of module, such as DoRA and quantized
        layers.
    """
    if type(module) is nn.Linear:
        return None if _is_trained(module) else Adapted(module)
    if type(module) is not Linear or type(module.base_layer) is not nn.Linear or _is_trained(module.base_layer):
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


def _is_trained(layer: nn.Linear) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())


def is_plain(model: PeftModel, name: str) -> bool:
    """Whether an adapter consists of nothing but LoRA of layers that `adapted_linear` reads. name: PEFT's for it."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    own = [layer for layer in layers if name in layer.lora_A or name in layer.lora_embedding_A]
    are_read = all((part := adapted_linear(layer, name)) is not None and part.down is not None for layer in own)
    return are_read and len(weights(model, name)) == 2 * len(own)  # A and B, and no whole modules
