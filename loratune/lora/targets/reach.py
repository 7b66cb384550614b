"""Which linear layers an adapter takes effect on, and why not on the others."""

import re
from collections.abc import Mapping

from torch import nn

# PEFT reads this private table too, so it lives as long as PEFT needs it.
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

from loratune.lora.module_names import last, parent

# The kernels of a Mamba mixer read these weights directly, past an adapter. PEFT refuses the first two on some model
# types (peft.tuners.tuners_utils._check_lora_target_modules_mamba) and lets the rest train to no effect.
_BYPASSED = frozenset({"out_proj", "conv1d", "x_proj", "dt_proj"})
_BYPASSED_IN = re.compile(r"mamba|mixer", re.IGNORECASE)

# Class of the parent → what it reads past an adapter: `nn.MultiheadAttention` hands the weight to a function, and
# AltUp of Gemma 3n clamps it first while it trains.
_ALSO_BYPASSED = {"MultiheadAttention": "out_proj", "Gemma3nTextAltUp": "correction_coefs"}

# PEFT takes a target with such a last name for the experts' stacked tensors, on the model types whose checkpoints
# transformers converts like these (peft.utils.transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING). A list, a
# regular expression and a whole path all end there, so that a linear layer of that name cannot be had.
_TAKEN_FOR_EXPERTS = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}

# PEFT renames an adapter's weights on loading as transformers renames those of a checkpoint
# (convert_peft_adapter_state_dict_for_transformers), and on these model types some come out under a name that no module
# has: they would be lost without a word.
_LOST_ON_LOADING = {
    "laguna": re.compile(r"\.shared_experts\."),
    "inkling2_text": re.compile(r"\.sconv\."),
    "inkling2_loop_text": re.compile(r"\.sconv\."),
}

# Linear layers with a forward of their own that computes the same as `nn.Linear`.
_STILL_LINEAR = frozenset({"FalconLinear"})

# They choose by rank, which keys to attend to or where a patch ends: no gradient comes back.
_CHOOSER = re.compile(r"^(.*\.)?(indexer|patcher)(?=\.)")

# Parts that take in images or sound, or another model's states, or that a language model does not ask: an adapter there
# would stay at zero, as on those adapters of Zamba 2 that belong to another layer's use of a shared block.
_OFF_TEXT = re.compile(
    r"^.*?(vision|visual|image|audio|speech|multi_?modal|(?<![^.])(encoder_attn|cross_attn|crossattention|pooler)(?![^.]))"
    r"[^.]*",
    re.IGNORECASE,
)
_ONE_OF_MANY = re.compile(r"^.*?adapter_list(?=\.\d)")
_OFF_TEXT_LAYER = re.compile(r"CrossAttentionDecoderLayer$")


def _taken_for_experts(model_type: str) -> frozenset[str]:
    """The last names that PEFT rewrites into the experts' stacked tensors on this type of model."""
    converted_as = "mixtral" if model_type == "mixtral" else _MODEL_TO_CONVERSION_PATTERN.get(model_type)
    return _TAKEN_FOR_EXPERTS.get(str(converted_as), frozenset())


def obstacle(path: str, modules: Mapping[str, nn.Module], model_type: str) -> str | None:
    """Why an adapter on this linear layer would fail, get lost, or train to no effect; None where it takes effect."""
    kind, within, name = type(modules[path]), type(modules.get(parent(path))).__name__, last(path)
    if name in _taken_for_experts(model_type):
        return "PEFT takes a target of this name for the experts' stacked tensors"
    if model_type in _LOST_ON_LOADING and _LOST_ON_LOADING[model_type].search(path):
        return "PEFT loses its weights when it loads an adapter"
    if (name in _BYPASSED and _BYPASSED_IN.search(within)) or _ALSO_BYPASSED.get(within) == name:
        return f"{within} reads the weight directly, past an adapter"
    own_forward = kind.forward is not nn.Linear.forward and kind.__module__.startswith("transformers.models.")
    if issubclass(kind, nn.Linear) and own_forward and kind.__name__ not in _STILL_LINEAR:
        return f"{kind.__name__} is not a plain linear layer"
    return "it chooses by rank, and no gradient passes a choice" if chooser(path) else None


def chooser(path: str) -> str:
    """The part of the model that chooses by rank in which a module lies, "" where there is none."""
    found = _CHOOSER.match(path)
    return found.group() if found else ""


def idle(path: str, modules: Mapping[str, nn.Module]) -> tuple[str, str] | None:
    """The part in which a linear layer lies, and why text alone would not train an adapter there; None elsewhere."""
    if one := _ONE_OF_MANY.match(path):
        return one.group(), "one of many is in use"
    parts = path.split(".")
    above = (type(modules.get(".".join(parts[:end]))).__name__ for end in range(1, len(parts)))
    apart = _OFF_TEXT.match(path)
    part = next((kind for kind in above if _OFF_TEXT_LAYER.search(kind)), apart.group() if apart else "")
    return (part, "text does not pass there") if part else None
