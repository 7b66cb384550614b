"""What a model is made of, as far as targets are concerned; read once."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loratune.lora import module_names
from loratune.lora.targets import reach
from loratune.lora.targets.names import SERVES

# An attention module is known by its own name or its class (`mixer` is one when it is a NemotronHAttention), unless it
# looks elsewhere than at the text itself. Multimodal towers are left alone: roles mean the language model.
_ATTENTION = re.compile(r"(attn|attentions?)$", re.IGNORECASE)
_NOT_SELF = re.compile(r"cross|encoder_attn|vision|image|audio|patcher", re.IGNORECASE)

# Mixers that carry a state along instead of attending with a softmax: they are no attention, whatever they are called.
# Known by their class, because Kimi Linear has both kinds under the name `self_attn`.
_RECURRENT = re.compile(
    r"(Mixer|MambaLayer|DeltaNet|DeltaAttention|LightningAttention|RecurrentBlock|ShortConv|xLSTMLayer|RwkvSelfAttention)$"
)

# Tensors of many dimensions that are added, not multiplied with.
_NO_MATRIX = re.compile(r"bias|embed|A_log")


@dataclass(frozen=True)
class Survey:
    """What `resolve` needs to know about a model.

    modules: path → module; a module that is shared between layers counts once, as PEFT counts it.
    linears: paths of linear layers, without the output embedding.
    serves: path of a linear layer inside attention → its roles, "" when SERVES does not know it.
    layers: the layer of each attention module → those of its paths that are in `serves`.
    mixers: path of a linear layer inside a recurrent mixer → that mixer's path.
    raw: names of weights that multiply like a linear layer's and are tensors of another form, such as stacked experts.
    raw_attention: those of them that are in attention.
    obstacles: path of a linear layer → why an adapter on it takes no effect.
    """

    model: nn.Module
    architecture: str
    modules: dict[str, nn.Module]
    linears: tuple[str, ...]
    serves: dict[str, str]
    layers: dict[str, list[str]]
    mixers: dict[str, str]
    raw: tuple[str, ...]
    raw_attention: tuple[str, ...]
    obstacles: dict[str, str]

    def reachable(self) -> list[str]:
        """The linear layers that an adapter takes effect on."""
        return [path for path in self.linears if path not in self.obstacles]

    def has(self) -> str:
        """What can be named instead: `its linear modules: attn.c_attn ×12, attn.c_proj ×12, …`."""  # noqa: RUF002
        return f"its linear modules: {module_names.counted(self.reachable(), 12)}"

    def roles_there(self) -> str:
        """The roles that some module serves, in the order q, k, v, o."""
        return "".join(role for role in "qkvo" if any(role in served for served in self.serves.values()))


def take(model: nn.Module) -> Survey:
    """Read a model, which may be on the meta device."""
    modules = {path: module for path, module in model.named_modules() if path}
    architecture, output = type(model).__name__, None
    if isinstance(model, PreTrainedModel):
        architecture, output = model.config.model_type, model.get_output_embeddings()
    linears = tuple(p for p, part in modules.items() if isinstance(part, nn.Linear | Conv1D) and part is not output)
    serves: dict[str, str] = {}
    layers: dict[str, list[str]] = {}
    for path in linears:
        found = _place(path, modules)
        if found:
            attention, serves[path] = found
            layers.setdefault(module_names.layer_of(attention), []).append(path)
    blocked = {path: reason for path in linears if (reason := reach.obstacle(path, modules, architecture))}
    raw = _raw(model, modules)
    in_attention = [name for name in raw if any(_is_self_attention(above, modules) for above in _above(name))]
    mixers = {path: above for path in linears for above in _above(path) if _is_recurrent(above, modules)}
    return Survey(
        model, architecture, modules, linears, serves, layers, mixers, _shown(raw), _shown(in_attention), blocked
    )


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _shown(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(module_names.short(name.removesuffix(".weight")) for name in names))


def _place(path: str, modules: Mapping[str, nn.Module]) -> tuple[str, str] | None:
    """The attention module that a linear layer belongs to and the roles it serves there; None outside attention."""
    for name in list(module_names.tails(path))[1::-1]:  # `output.dense` before `dense`
        attention = path.removesuffix(name).rstrip(".")
        if name in SERVES and _is_self_attention(attention, modules):
            return attention, "kv" if _values_are_keys(modules[attention], name) else SERVES[name]
    above = module_names.parent(path)
    return (above, "") if _is_self_attention(above, modules) else None


def _values_are_keys(attention: nn.Module, name: str) -> bool:
    """Gemma 4 on some layers: `v_proj` is None there, and what `k_proj` gives is used as values too."""
    return name == "k_proj" and vars(attention).get("v_proj", name) is None


def _is_self_attention(path: str, modules: Mapping[str, nn.Module]) -> bool:
    if path not in modules or _is_recurrent(path, modules):
        return False
    kind = type(modules[path]).__name__
    known = _ATTENTION.search(module_names.own_name(path)) or _ATTENTION.search(kind)
    return bool(known) and not _NOT_SELF.search(f"{path} {kind}")


def _is_recurrent(path: str, modules: Mapping[str, nn.Module]) -> bool:
    return bool(_RECURRENT.search(type(modules[path]).__name__))


def _raw(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Weights of more than two dimensions, or of experts, whose owner is neither linear, embedding nor convolution."""
    plain = nn.Linear | Conv1D | nn.Embedding | nn.modules.conv._ConvNd
    return [
        name
        for name, weight in model.named_parameters()
        if not isinstance(modules.get(module_names.parent(name)), plain)
        and not _NO_MATRIX.search(module_names.last(name))
        and sum(size > 1 for size in weight.shape) > (1 if re.search(r"(^|\.)experts\.", name) else 2)
    ]
