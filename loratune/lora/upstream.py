"""Undocumented names of other libraries that this package uses.

Each name is used only here, with the reason why no documented one is sufficient. tests/test_upstream_lora.py fails if a
release removes one.
"""

from typing import Any

from peft import LoraConfig as LoraConfig
from peft.tuners.lora.bnb import Linear4bit as Linear4bit  # PEFT exports the class of no quantized layer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.integrations import dequantize_module_weight as dequantize_module_weight
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

# `dequantize_module_weight` knows how each quantization is packed; bitsandbytes documents only parts of that for its
# own. PEFT uses it for DoRA and for merging.


def conversion_of(model_type: str) -> str | None:
    """The model type whose pattern transformers uses to convert a checkpoint; None if it has no pattern of its own.

    PEFT renames the targets and the weights of an adapter by the same table, which is not public there either.
    """
    pattern = _MODEL_TO_CONVERSION_PATTERN.get(model_type)
    return None if pattern is None else str(pattern)


def is_target(config: LoraConfig, path: str) -> bool:
    """Whether PEFT puts an adapter on the module at this path.

    The rule combines six keys of the configuration; `model.targeted_module_names` is known only after the adapter is
    attached, when the base has been changed already.
    """
    return bool(check_target_module_exists(config, path))


def is_partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed's ZeRO-3 has distributed this parameter over the processes.

    DeepSpeed documents how to gather such parameters, but not how to recognize them.
    """
    return hasattr(parameter, "ds_id")
