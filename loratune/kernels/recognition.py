"""Identifies the layer classes that kernels may replace: those whose source was compared with the kernels.

The results of a layer depend on its source and on the switches that a configuration sets, and a comparison on random
numbers cannot find every clamp, cap, scale or dropout. So a layer is replaced only if its class is in
`checked_layers.json`, with the digest of its source and the values of its switches. `scripts/check_layers.py` writes
that file. It compares every class of every family with its replacement in float32: on inputs with zero and nonzero
mean, of scale 1 and 10, at positions beyond every limit of the configuration, in training mode.

A class that is not in the list, that was patched at run time, or whose source has changed in a release is not replaced.
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

from loratune.kernels.upstream import has_hooks

_log = logging.getLogger(__name__)

LIST = Path(__file__).with_name("checked_layers.json")
SHAPES = frozenset({
    "config", "layer_idx", "hidden_size", "intermediate_size", "head_dim", "num_heads", "num_attention_heads",
    "num_key_value_heads", "num_key_value_groups", "scaling", "variance_epsilon", "eps", "max_position_embeddings",
    "dtype", "training", "pad_token_id", "vocab_size", "num_hidden_layers", "rms_norm_eps", "_attn_implementation",
    "embed_dim", "normalized_shape", "q_size", "kv_size", "op_size", "rope_theta", "initializer_range", "num_experts",
    "num_local_experts", "hidden_dim", "intermediate_dim",
})  # fmt: skip
"""Attributes that a replacement reads from the layer, or that do not affect the results."""
WINDOW = "sliding_window"
"""The window of a layer. Its length is read from the model's mask (`masks`), so only its presence matters here."""


@dataclass(frozen=True)
class Layer:
    """What determines the results of a layer.

    Attributes:
        name: The name of its class, with its module.
        digest: The digest of the source of the class.
        switches: Names and values of the switches, as JSON.
    """

    name: str
    digest: str
    switches: str

    @classmethod
    def of(cls, module: nn.Module) -> "Layer | None":
        """The `Layer` of a module; None if its source cannot be read, or the module is patched or has hooks."""
        kind: Any = type(module)
        if "forward" in vars(module) or has_hooks(module) or not _is_unpatched(kind):
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
    """Layer of the list → form of the replacement that computes the same."""
    digests_by_name = json.loads(LIST.read_text(encoding="utf-8"))["layers"]
    return {
        Layer(name, digest, json.dumps(entry["switches"], sort_keys=True)): entry["form"]
        for name, entries_by_digest in digests_by_name.items()
        for digest, entries in entries_by_digest.items()
        for entry in entries
    }


def form_of(module: nn.Module) -> str | None:
    """The form of the replacement that computes the same as a layer; None if none is known."""
    if _name(type(module)) not in _checked_names():
        return None  # This avoids reading the source of all classes of a model.
    layer = Layer.of(module)
    return checked().get(layer) if layer is not None else None


@cache
def _checked_names() -> frozenset[str]:
    return frozenset(layer.name for layer in checked())


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_unpatched(kind: type) -> bool:
    """Whether the `forward` of a class is the one in its file, not patched by another library."""
    owner = next((base for base in kind.__mro__ if "forward" in vars(base)), None)
    if owner is None or _is_torch(kind) or _is_torch(owner) or owner.__module__ not in sys.modules:
        return False
    code = getattr(inspect.unwrap(vars(owner)["forward"]), "__code__", None)
    return code is not None and code.co_filename == sys.modules[owner.__module__].__file__


def _switches(module: nn.Module) -> dict[str, Any]:
    """The settings of a layer apart from shapes: its children, its own attributes, and the configuration values that
    its methods read at run time."""
    switches: dict[str, Any] = {"children": {name: _child_class(child) for name, child in module.named_children()}}
    switches["own"] = sorted(
        name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    )
    for name, value in vars(module).items():
        if not name.startswith("_") and name not in SHAPES:
            switches[name] = _switch_value(module, name, value)
    kind: Any = type(module)
    settings = getattr(module, "config", None)
    for name in _config_reads(kind) - SHAPES if settings is not None else ():
        switches[f"config.{name}"] = _switch_value(module, name, getattr(settings, name, None))
    return switches


def _child_class(child: nn.Module) -> str:
    """The class of a child, and the digest of its source. All linear layers, with or without LoRA, count as one class:
    the replacements check them."""
    kind: Any = type(child)
    if all(hasattr(child, name) for name in ("in_features", "out_features", "weight")):
        return "linear"
    return _name(kind) if _is_torch(kind) else f"{_name(kind)} {source_digest(kind)}"


def _switch_value(module: nn.Module, name: str, value: Any) -> Any:
    """The value of a switch as JSON, the same for all layers of one kind."""
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

    Comments, docstrings, annotations and layout do not count. Raises OSError, KeyError: there is no source.
    """
    parts = [_text(tree) for tree in _trees(kind)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _trees(kind: type) -> Iterator[ast.AST]:
    """A class, its bases except torch's, and the functions and constants of transformers that they refer to."""
    queue = [(base.__module__, base.__qualname__) for base in kind.__mro__ if not _is_torch(base)]
    visited: set[tuple[str, str]] = set()
    while queue:
        definition = queue.pop(0)
        if definition in visited:
            continue
        visited.add(definition)
        module_name, qualified_name = definition
        module = sys.modules[module_name]
        local = _definitions(str(module.__file__))
        yield local[qualified_name]
        for name in sorted(_names(local[qualified_name])):
            other = getattr(module, name, None)
            if isinstance(local.get(name), ast.FunctionDef):
                queue.append((module_name, name))
            elif isinstance(other, FunctionType) and other.__module__.startswith("transformers."):
                original = inspect.unwrap(other)
                queue.append((original.__module__, original.__qualname__))
            elif isinstance(other, type) and issubclass(other, torch.autograd.Function) and not _is_torch(other):
                queue.append((other.__module__, other.__qualname__))
            elif isinstance(other, bool | int | float | str):
                yield ast.Constant(f"{name} = {other!r}")


def _is_torch(kind: type) -> bool:
    return kind is object or kind.__module__.partition(".")[0] in ("torch", "typing", "abc")


@cache
def _definitions(file: str) -> dict[str, Any]:
    """Name → top-level class or function of a file."""
    queue: list[Any] = list(ast.parse(Path(file).read_text(encoding="utf-8")).body)
    definitions = {}
    while queue:
        node = queue.pop(0)
        if isinstance(node, ast.If | ast.Try):
            queue += [*node.body, *node.orelse]
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            definitions[node.name] = node
    return definitions


IGNORED_FIELDS = ("annotation", "returns", "type_params", "type_comment", "kind", "ctx")
"""Fields of a syntax tree that do not affect what is computed."""


def _names(node: Any) -> set[str]:
    """The names that a piece of source refers to at run time, without annotations."""
    if isinstance(node, ast.Name):
        return {node.id}
    fields = [value for name, value in ast.iter_fields(node) if name not in IGNORED_FIELDS]
    children = [child for value in fields for child in (value if isinstance(value, list) else [value])]
    return {name for child in children if isinstance(child, ast.AST) for name in _names(child)}


def _text(node: Any) -> str:
    """A syntax tree as text that does not depend on the Python release: without empty fields and positions."""
    if isinstance(node, list):
        return "[" + ",".join(map(_text, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(value, list) and value and _is_docstring(value[0]):
            value = value[1:]
        if name not in IGNORED_FIELDS and value is not None and value != []:
            fields.append(f"{name}={_text(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def _config_reads(kind: type) -> frozenset[str]:
    """Attributes of the configuration that the methods of a class read, other than in `__init__`."""
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
            owner, name = ast.unparse(node.args[0]), node.args[1]
            if owner in ("self.config", "config") and isinstance(name, ast.Constant):
                yield str(name.value)
