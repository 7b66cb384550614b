"""Which classes of layers the kernels may stand in for: those whose source was checked against them.

What a layer computes is decided by its source and by the switches that a configuration sets, and no trial on random
numbers finds every clamp, cap, scale or dropout in it. So a layer is replaced only if its class stands in
`checked_layers.json`, with the digest of its source and with these values of its switches. The file is written by
`scripts/check_layers.py`, which holds every class of every family against its replacement in float32: on inputs of
mean 0 and of another mean, of size 1 and 10, at positions beyond every limit of the configuration, in training mode.

A class that is not listed, that was patched at run time, or whose source has changed with a release keeps its own
forward.
"""

import ast
import hashlib
import inspect
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import nn

_log = logging.getLogger(__name__)

LIST = Path(__file__).with_name("checked_layers.json")
SHAPES = frozenset({
    "config", "layer_idx", "hidden_size", "intermediate_size", "head_dim", "num_heads", "num_attention_heads",
    "num_key_value_heads", "num_key_value_groups", "scaling", "variance_epsilon", "eps", "max_position_embeddings",
    "dtype", "training", "pad_token_id", "vocab_size", "num_hidden_layers", "rms_norm_eps", "_attn_implementation",
    "embed_dim", "normalized_shape", "q_size", "kv_size", "op_size", "rope_theta", "initializer_range",
})  # fmt: skip
"""Attributes whose value is read from the layer when it is replaced, or that say nothing of what is computed."""
WINDOW = "sliding_window"
"""How far a layer sees: the mask that the model makes for it tells that (`masks`), so only whether it is set counts."""


@dataclass(frozen=True)
class Layer:
    """What decides the numbers of a layer.

    name: of its class; digest: of its source; switches: names and values, as JSON.
    """

    name: str
    digest: str
    switches: str

    @classmethod
    def of(cls, module: nn.Module) -> "Layer | None":
        """None: the source is not to be had, or something else than the class computes the layer."""
        kind: Any = type(module)
        if "forward" in vars(module) or _hooked(module) or not _as_written(kind):
            return None
        try:
            digest = source_digest(kind)
            switches = _switches(module)
        except (OSError, TypeError, SyntaxError, KeyError):
            _log.debug("%s has no source to be compared", _name(kind), exc_info=True)
            return None
        return cls(_name(kind), digest, json.dumps(switches, sort_keys=True))


@cache
def checked() -> Mapping[Layer, str]:
    """Every layer of the list, and the replacement that it was held against."""
    listed = json.loads(LIST.read_text(encoding="utf-8"))["layers"]
    return {
        Layer(name, digest, json.dumps(one["switches"], sort_keys=True)): one["form"]
        for name, releases in listed.items()
        for digest, every in releases.items()
        for one in every
    }


def form_of(module: nn.Module) -> str | None:
    """The replacement that computes what a layer does; None: none is known to."""
    if _name(type(module)) not in _names_checked():
        return None  # without reading the source of all classes of a model
    layer = Layer.of(module)
    return checked().get(layer) if layer is not None else None


@cache
def _names_checked() -> frozenset[str]:
    return frozenset(layer.name for layer in checked())


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _hooked(module: nn.Module) -> bool:
    """Hooks see the layer's own forward, and may change what it takes and gives."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names)


def _as_written(kind: type) -> bool:
    """Whether the forward of a class is the one that stands in its file, and was not patched by another library."""
    owner = next((base for base in kind.__mro__ if "forward" in vars(base)), None)
    if owner is None or _is_torch(kind) or _is_torch(owner) or owner.__module__ not in sys.modules:
        return False
    code = getattr(inspect.unwrap(vars(owner)["forward"]), "__code__", None)
    return code is not None and code.co_filename == sys.modules[owner.__module__].__file__


def _switches(module: nn.Module) -> dict[str, Any]:
    """What a layer was built with, besides shapes: its children, its own plain attributes, and what its methods read
    from the configuration as they run."""
    found: dict[str, Any] = {"children": {name: _described(child) for name, child in module.named_children()}}
    found["own"] = sorted(
        name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    )
    for name, value in vars(module).items():
        if not name.startswith("_") and name not in SHAPES:
            found[name] = _plain(module, name, value)
    kind: Any = type(module)
    settings = getattr(module, "config", None)
    for name in _config_reads(kind) - SHAPES if settings is not None else ():
        found[f"config.{name}"] = _plain(module, name, getattr(settings, name, None))
    return found


def _described(child: nn.Module) -> str:
    """The class of a child, and the digest of its source. Linear layers are all one: what is read of them is checked
    where they are read, with LoRA or without."""
    kind: Any = type(child)
    if all(hasattr(child, name) for name in ("in_features", "out_features", "weight")):
        return "linear"
    return _name(kind) if _is_torch(kind) else f"{_name(kind)} {source_digest(kind)}"


def _plain(module: nn.Module, name: str, value: Any) -> Any:
    """A switch as JSON that layers of one kind share."""
    if name == WINDOW:
        return value is not None
    layer: Any = getattr(module, "layer_idx", None)
    if name == "layer_types" and isinstance(value, list | tuple) and isinstance(layer, int):
        return value[layer]
    if isinstance(value, FunctionType | type):
        return value.__qualname__
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


@cache
def source_digest(kind: type) -> str:
    """Sixteen digits of the SHA-256 of the syntax tree of a class, of its bases, and of what they call at module level.

    Comments, docstrings, annotations and layout leave no trace. Raises OSError, KeyError: there is no source.
    """
    parts = [_text(tree) for tree in _trees(kind)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _trees(kind: type) -> Iterator[ast.AST]:
    """A class, its bases but torch's, and the functions and constants of transformers that they refer to."""
    waiting = [(base.__module__, base.__qualname__) for base in kind.__mro__ if not _is_torch(base)]
    seen: set[tuple[str, str]] = set()
    while waiting:
        place = waiting.pop(0)
        if place in seen:
            continue
        seen.add(place)
        module = sys.modules[place[0]]
        local = _definitions(str(module.__file__))
        yield local[place[1]]
        for name in sorted(_names(local[place[1]])):
            other = getattr(module, name, None)
            if isinstance(local.get(name), ast.FunctionDef):
                waiting.append((place[0], name))
            elif isinstance(other, FunctionType) and other.__module__.startswith("transformers."):
                original = inspect.unwrap(other)
                waiting.append((original.__module__, original.__qualname__))
            elif isinstance(other, type) and issubclass(other, torch.autograd.Function) and not _is_torch(other):
                waiting.append((other.__module__, other.__qualname__))
            elif isinstance(other, bool | int | float | str):
                yield ast.Constant(f"{name} = {other!r}")


def _is_torch(kind: type) -> bool:
    return kind is object or kind.__module__.partition(".")[0] in ("torch", "typing", "abc")


@cache
def _definitions(file: str) -> dict[str, Any]:
    """Classes and functions at the top of a file, by name."""
    waiting: list[Any] = list(ast.parse(Path(file).read_text(encoding="utf-8")).body)
    found = {}
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.If | ast.Try):
            waiting += [*node.body, *node.orelse]
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
    return found


UNREAD = ("annotation", "returns", "type_params", "type_comment", "kind", "ctx")
"""Fields of a syntax tree that decide no number."""


def _names(node: Any) -> set[str]:
    """What a piece of source refers to as it runs, annotations left out."""
    if isinstance(node, ast.Name):
        return {node.id}
    fields = [value for name, value in ast.iter_fields(node) if name not in UNREAD]
    children = [one for value in fields for one in (value if isinstance(value, list) else [value])]
    return {name for child in children if isinstance(child, ast.AST) for name in _names(child)}


def _text(node: Any) -> str:
    """A syntax tree as text that is the same in every release of Python: nothing empty, no positions."""
    if isinstance(node, list):
        return "[" + ",".join(map(_text, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(value, list) and value and _is_docstring(value[0]):
            value = value[1:]
        if name not in UNREAD and value is not None and value != []:
            fields.append(f"{name}={_text(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def _config_reads(kind: type) -> frozenset[str]:
    """Attributes of the configuration that the methods of a class read as they run, not only in `__init__`."""
    methods = [
        node
        for base in kind.__mro__
        if not _is_torch(base)
        for node in _definitions(str(sys.modules[base.__module__].__file__))[base.__qualname__].body
        if isinstance(node, ast.FunctionDef) and node.name != "__init__"
    ]
    return frozenset(name for method in methods for name in _reads(method))


def _reads(method: ast.AST) -> Iterator[str]:
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self.config", "config"):
            yield node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            of, name = ast.unparse(node.args[0]), node.args[1]
            if of in ("self.config", "config") and isinstance(name, ast.Constant):
                yield str(name.value)
