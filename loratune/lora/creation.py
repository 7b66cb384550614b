"""Creates a LoRA adapter on a base: finds its targets, attaches and initializes it, and counts its parameters."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, set_seed

from loratune.codes import Code
from loratune.config import LoraSection
from loratune.errors import ModelError, Problem, is_out_of_memory
from loratune.events import progress
from loratune.lora import initialize, parameters, targets
from loratune.lora.adapter_files import AdapterFiles
from loratune.lora.attach import wrap
from loratune.lora.parameters import Count, file_bytes
from loratune.lora.targets import Targets
from loratune.lora.tensors import AdapterInit, restore, weights

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
    """Resolve `lora.target_modules` and similar keys to modules, and attach LoRA to them.

    Args:
        base: The model, which may be on the meta device.
        section: The settings of LoRA.
        seed: Seed of the random values of A.
        dense: The model in which modules are looked up, with the names of `base`, if the layers of `base` are packed.
        origin: Recorded as the name and the revision of the base.

    Returns:
        The model, and its targets with notes on anything unexpected.

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
    """Freeze `base` and attach LoRA to its targets; the model's output does not change.

    Args:
        base: The model, which may be on the meta device.
        section: The settings of LoRA.
        targeting: Keyword arguments of `LoraConfig`: `target_modules`, patterns and modules to save, resolved to the
            names of this base. See `Targets.peft`.
        seed: Seed of the random values of A.
        base_name: Recorded as the name of the base.
        revision: Recorded as its revision.

    Raises:
        ModelError: PEFT cannot adapt the model, or an initialization or a setting does not fit its layers.
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
        with torch.device("meta") if is_meta else nullcontext():  # else PEFT makes the tensors on the CPU first
            model = wrap(base, config)
    except (ValueError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        what = f"PEFT cannot adapt this model: {error}"
        raise ModelError(Problem(Code.LORA_UNSUPPORTED, what, key="lora")) from None
    initialize.check_ranks(model, section)
    if initialize.becomes_plain_lora(section):
        config.init_lora_weights = True  # what is published is plain LoRA, see `AdapterInit`
    if section.bias != "none" and not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("bias")):
        what = "the model has no such biases"
        raise ModelError(Problem(Code.LORA_UNKNOWN_TARGET, what, key="lora.bias", fix="set it to none"))
    for name, parameter in model.named_parameters() if section.use_lorafa else ():
        if "lora_A" in name:  # PEFT's optimizer does so too, but counts and checks come before it
            parameter.requires_grad_(False)
    return model


def initialize_adapter(
    model: PeftModel,
    section: LoraSection,
    *,
    batches: Sequence[Mapping[str, torch.Tensor]] = (),
    originals: Callable[[], Callable[[str], torch.Tensor]] | None = None,
    start_from: AdapterFiles | None = None,
) -> AdapterInit:
    """Complete the initialization of a fresh adapter, beyond what PEFT does on attaching.

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


def count(model: PeftModel, start: AdapterInit) -> Count:
    """Count parameters exactly, on any device including the meta device."""
    trainable, total = model.get_nb_trainable_parameters()
    return Count(trainable, total, file_bytes(start.published(weights(model))))
