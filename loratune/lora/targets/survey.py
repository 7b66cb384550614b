"""The possible targets of a model: its linear layers, the attention role of each, and whether an adapter has an effect
on it.

To support a new architecture, add a line to the table `SERVES`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile

from torch import nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loratune.lora import module_names, upstream
from loratune.lora.module_names import last, parent

ROLES = ("q", "k", "v", "o")
EXPERTS = "experts"
"""The role of all tensors that hold the experts of a layer. As a string, it is equivalent to a list of it."""

# Name of a projection within its attention module → the roles that it serves.
SERVES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",  # OPT, GPT-J, GPT-Neo, CodeGen, MPT
    "dense": "o",  # Falcon, BLOOM, GPT-NeoX, Phi
    "query_key_value": "qkv",  # Falcon, BLOOM, GPT-NeoX
    "qkv_proj": "qkv",  # Phi-3, CodeGen
    "c_attn": "qkv",  # GPT-2
    "c_proj": "o",  # GPT-2
    "Wqkv": "qkv",  # MPT, DBRX
    "Wq": "q",  # CTRL
    "Wk": "k",
    "Wv": "v",
    "Wo": "o",  # ModernBERT
    "query": "q",  # BERT and its kin
    "key": "k",
    "value": "v",
    "output.dense": "o",
    "query_key": "qk",  # Reformer
    "query_proj": "q",  # ProphetNet
    "key_proj": "k",
    "value_proj": "v",
    "q_lin": "q",  # XLM
    "k_lin": "k",
    "v_lin": "v",
    "out_lin": "o",
    "project_q": "q",  # CPM-Ant
    "project_k": "k",
    "project_v": "v",
    "attention_out": "o",
    "q_a_proj": "q",  # DeepSeek's latent attention: both halves of a factored projection
    "q_b_proj": "q",
    "q_gate_proj": "q",  # A.X K2: the second half, see SHARED_ROLES
    "kv_a_proj_with_mqa": "kv",
    "kv_b_proj": "kv",
    "kv_proj": "kv",  # DeepSeek-V4, JetMoE
    "compressor.kv_proj": "kv",  # DeepSeek-V4: the keys and values of whole blocks
    "o_b_proj": "o",  # DeepSeek-V4; its o_a_proj is not a plain linear layer
    "q_proj.linear": "q",  # Moshi, Inkling 2
    "k_proj.linear": "k",
    "v_proj.linear": "v",
    "o_proj.linear": "o",
    "qkv_proj.q_proj": "q",  # Zaya
    "qkv_proj.k_proj": "k",
    "qkv_proj.v_proj_current": "v",
    "qkv_proj.v_proj_delayed": "v",
}

# What a projection computes in addition to its roles.
SHARED_ROLES = {"q_gate_proj": "the gate of the attention's output"}

# Names that most recipes list; on a model without them they stand for the roles.
STOCK = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}


_ATTENTION = re.compile(r"(attn|attentions?)$", re.IGNORECASE)
_NOT_SELF = re.compile(r"cross|encoder_attn|vision|image|audio|patcher", re.IGNORECASE)
"""Self-attention is recognized by the name or the class of a module (`mixer` if it is a NemotronHAttention), unless it
attends to something other than the text. In a multimodal model, roles refer to its language model."""

_RECURRENT = re.compile(
    r"(Mixer|MambaLayer|DeltaNet|DeltaAttention|LightningAttention|RecurrentBlock|ShortConv|xLSTMLayer|RwkvSelfAttention)$"
)
"""Classes of mixers with a recurrent state instead of a softmax: they are not attention, whatever their name. Kimi
Linear has both kinds under the name `self_attn`."""

_NO_MATRIX = re.compile(r"bias|embed|A_log")
"""Tensors of several dimensions that are added rather than multiplied."""

CONVOLUTIONS = (
    nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
)  # fmt: skip


@dataclass(frozen=True)
class Survey:
    """The facts about a model that resolving targets needs.

    Attributes:
        model: The model.
        architecture: Its model type, or its class.
        modules: Path → module; a module that layers share counts once, as for PEFT.
        linears: Paths of linear layers, without the output embedding.
        serves: Path of a linear layer inside attention → its roles, "" when SERVES does not know it.
        layers: The layer of each attention module → those of its paths that are in `serves`.
        mixers: Path of a linear layer inside a recurrent mixer → the path of that mixer.
        parameters: Name → parameter; one that several modules share has one name.
        raw: Names of weights that act like linear layers but are other tensors, such as stacked experts.
        experts: The raw weights that hold the projections of all experts of a layer.
        raw_attention: Short names of the raw weights in attention.
        obstacles: Path of a linear layer → why an adapter on it has no effect.
        text: The beginning of the paths in the language model of a model of text and images; empty for other models.
    """

    model: nn.Module
    architecture: str
    modules: dict[str, nn.Module]
    linears: tuple[str, ...]
    serves: dict[str, str]
    layers: dict[str, list[str]]
    mixers: dict[str, str]
    parameters: dict[str, nn.Parameter]
    raw: tuple[str, ...]
    experts: tuple[str, ...]
    raw_attention: tuple[str, ...]
    obstacles: dict[str, str]
    text: str

    def reachable(self) -> list[str]:
        """The linear layers on which an adapter has an effect."""
        return [path for path in self.linears if path not in self.obstacles]

    def candidates(self) -> str:
        """The possible names: `its linear modules: attn.c_attn ×12, attn.c_proj ×12, …`."""  # noqa: RUF002
        return f"its linear modules: {module_names.join_counts(self.reachable(), 12) or 'none'}"


def take(model: nn.Module) -> Survey:
    """Survey a model, which may be on the meta device."""
    modules = {path: module for path, module in model.named_modules() if path}
    architecture, output, text = type(model).__name__, None, ""
    if isinstance(model, PreTrainedModel):
        architecture, output = model.config.model_type, model.get_output_embeddings()
        if type(model.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            decoder = model.get_decoder()
            text = next((f"{path}." for path, module in modules.items() if module is decoder), "")
    linears = tuple(p for p, part in modules.items() if isinstance(part, nn.Linear | Conv1D) and part is not output)
    serves: dict[str, str] = {}
    layers: dict[str, list[str]] = {}
    for path in linears:
        service = _service(path, modules) if path.startswith(text) else None
        if service:
            attention, serves[path] = service
            layers.setdefault(module_names.layer_of(attention), []).append(path)
    obstacles = {path: reason for path in linears if (reason := obstacle(path, modules, architecture))}
    parameters = dict(model.named_parameters())
    raw = _raw(parameters, modules)
    in_attention = [name for name in raw if any(_is_self_attention(above, modules) for above in _ancestors(name))]
    mixers = {path: above for path in linears for above in _ancestors(path) if _is_recurrent(above, modules)}
    experts = tuple(name for name in raw if _holds_experts(name, parameters[name], modules))
    return Survey(
        model, architecture, modules, linears, serves, layers, mixers,
        parameters, tuple(raw), experts, short_names(in_attention), obstacles, text,
    )  # fmt: skip


def _ancestors(path: str) -> list[str]:
    """The modules that contain a path, the innermost first."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def short_names(names: Iterable[str]) -> tuple[str, ...]:
    """Unique names of weights for messages."""
    return tuple(dict.fromkeys(module_names.short(name.removesuffix(".weight")) for name in names))


def _service(path: str, modules: Mapping[str, nn.Module]) -> tuple[str, str] | None:
    """The attention module that a linear layer belongs to and the roles it serves there; None outside attention."""
    for name in list(module_names.tails(path))[1::-1]:  # `output.dense` before `dense`
        attention = path.removesuffix(name).rstrip(".")
        if name in SERVES and _is_self_attention(attention, modules):
            # In some layers of Gemma 4, `v_proj` is None, and the output of `k_proj` is used as values too.
            are_values = name == "k_proj" and vars(modules[attention]).get("v_proj", name) is None
            return attention, "kv" if are_values else SERVES[name]
    above = parent(path)
    return (above, "") if _is_self_attention(above, modules) else None


def _is_self_attention(path: str, modules: Mapping[str, nn.Module]) -> bool:
    if path not in modules or _is_recurrent(path, modules):
        return False
    kind = type(modules[path]).__name__
    is_attention = _ATTENTION.search(module_names.own_name(path)) or _ATTENTION.search(kind)
    return bool(is_attention) and not _NOT_SELF.search(f"{path} {kind}")


def _is_recurrent(path: str, modules: Mapping[str, nn.Module]) -> bool:
    return bool(_RECURRENT.search(type(modules[path]).__name__))


def _raw(parameters: Mapping[str, nn.Parameter], modules: Mapping[str, nn.Module]) -> list[str]:
    """Weights of more than two dimensions, or of experts, whose owner is neither linear, embedding nor convolution."""
    known = nn.Linear | Conv1D | nn.Embedding | CONVOLUTIONS
    return [
        name
        for name, weight in parameters.items()
        if not isinstance(modules.get(parent(name)), known)
        and not _NO_MATRIX.search(last(name))
        and sum(size > 1 for size in weight.shape) > (1 if re.search(r"(^|\.)experts\.", name) else 2)
    ]


def _holds_experts(name: str, weight: nn.Parameter, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a tensor stacks the projections of all experts: the module that holds it is named or called so."""
    owner = parent(name)
    kind = type(modules.get(owner)).__name__
    return weight.dim() == 3 and (module_names.own_name(owner) == EXPERTS or kind.endswith("Experts"))


# --- Linear layers on which an adapter has no effect, with reasons

_BYPASSED = frozenset({"out_proj", "conv1d", "x_proj", "dt_proj"})
_BYPASSED_IN = re.compile(r"mamba|mixer", re.IGNORECASE)
"""The kernels of a Mamba mixer read these weights directly, past an adapter. PEFT refuses the first two on some model
types (peft.tuners.tuners_utils._check_lora_target_modules_mamba) and trains the others to no effect."""

_ALSO_BYPASSED = {"MultiheadAttention": "out_proj", "Gemma3nTextAltUp": "correction_coefs"}
"""Class of the parent → the layer whose weight it reads past an adapter: `nn.MultiheadAttention` passes the weight to a
function, and AltUp of Gemma 3n clamps it in training."""

_TAKEN_FOR_EXPERTS = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
"""Last names that PEFT rewrites into the stacked tensors of experts, on the model types whose checkpoints transformers
converts like these (peft.utils.transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING). A list, a regular expression
and a whole path all end in the name, so a linear layer with it cannot be a target."""

_LOST_ON_LOADING = {
    "laguna": re.compile(r"\.shared_experts\."),
    "inkling2_text": re.compile(r"\.sconv\."),
    "inkling2_loop_text": re.compile(r"\.sconv\."),
}
"""PEFT renames an adapter's weights on loading as transformers renames those of a checkpoint
(convert_peft_adapter_state_dict_for_transformers). On these model types it renames some to names that no module has,
and drops them silently."""

_STILL_LINEAR = frozenset({"FalconLinear"})
"""Classes of linear layers with a forward of their own that computes the same as that of `nn.Linear`."""

_CHOOSER = re.compile(r"^(.*\.)?(indexer|patcher)(?=\.)")
"""Parts that select keys or patch boundaries by ranking; such a selection passes no gradient."""

_OFF_TEXT = re.compile(
    r"^.*?(vision|visual|image|audio|speech|multi_?modal|(?<![^.])(encoder_attn|cross_attn|crossattention|pooler)(?![^.]))"
    r"[^.]*",
    re.IGNORECASE,
)
_ONE_OF_MANY = re.compile(r"^.*?adapter_list(?=\.\d)")
_OFF_TEXT_LAYER = re.compile(r"CrossAttentionDecoderLayer$")
"""Parts for images, sound or the states of another model, or that a language model does not use: an adapter there would
stay zero. The same holds for Zamba 2's adapters that belong to another use of a shared block."""


def obstacle(path: str, modules: Mapping[str, nn.Module], model_type: str) -> str | None:
    """Why an adapter on this linear layer would fail, get lost, or train without effect; None if it has an effect."""
    kind, within, name = type(modules[path]), type(modules.get(parent(path))).__name__, last(path)
    converted_as = "mixtral" if model_type == "mixtral" else upstream.conversion_of(model_type)
    if name in _TAKEN_FOR_EXPERTS.get(str(converted_as), ()):
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
    """The enclosing part that selects by ranking; "" if there is none."""
    match = _CHOOSER.match(path)
    return match.group() if match else ""


def unused_part(path: str, survey: Survey) -> tuple[str, str] | None:
    """The enclosing part of a linear layer, and why text would not train an adapter there; None if it would."""
    if match := _ONE_OF_MANY.match(path):
        return match.group(), "one of many is in use"
    parts = path.split(".")
    ancestors = (type(survey.modules.get(".".join(parts[:end]))).__name__ for end in range(1, len(parts)))
    match = _OFF_TEXT.match(path)
    part = next((kind for kind in ancestors if _OFF_TEXT_LAYER.search(kind)), match.group() if match else "")
    if not part and not path.startswith(survey.text):
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(parts, survey.text.split("."), strict=False))
        part = ".".join(parts[: len([*shared]) + 1])
    return (part, "text does not pass there") if part else None


_NOT_WRAPPED = frozenset({"DbrxExpertGLU", "Ernie4_5_MoeStatics", "JambaMambaMixer", "ZambaMambaMixer"})
"""Classes whose parameters the model reads directly, bypassing an adapter, or which it calls with keyword arguments
only, which PEFT's wrapper does not support."""


def parameter_obstacle(survey: Survey, name: str) -> str:
    """Why PEFT cannot adapt a parameter, or should not; empty if it can."""
    weight, owner = survey.parameters[name], survey.modules.get(parent(name))
    kind = type(owner).__name__
    if owner is None:
        return "PEFT adapts no parameter of the model itself"
    if isinstance(owner, nn.Linear | Conv1D | nn.Embedding):
        return survey.obstacles.get(parent(name)) or "a layer that lora.target_modules adapts"
    if isinstance(owner, CONVOLUTIONS):
        return f"it belongs to a {kind}"
    if weight.dim() not in (2, 3):
        return f"it has {weight.dim()} dimensions, and PEFT adapts tensors of 2 and 3"
    if not weight.is_floating_point():
        return "it is quantized"
    if weight.dim() == 3 and len(weight) == 1 and getattr(owner, "is_transposed", False):
        return "PEFT adds the update of a single expert the wrong way round"
    if kind in _NOT_WRAPPED:
        return f"a {kind} is not called as PEFT's wrapper around it could be"
    if unused := unused_part(name, survey):
        return unused[1]
    return "it chooses by rank, and no gradient passes a choice" if chooser(name) else ""
