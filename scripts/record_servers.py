"""Records which module names LoRA keys may address in the models of vLLM and SGLang, from their source.

    python scripts/record_servers.py FOLDER

FOLDER holds a wheel of the newest release of each (`pip download --no-deps vllm sglang -d FOLDER`). Their source is
read, not run: `loratune/lora/served_modules.json` lists, for each class that transformers builds and the server serves,
which names apply, and how vLLM renames keys; without LoRA the entry is empty. Modules of vision and sound are left out,
since text does not pass there.
"""

import argparse
import ast
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from transformers.models.auto import modeling_auto

TABLE = Path(__file__).resolve().parents[1] / "loratune" / "lora" / "served_modules.json"
KNOWN = {
    *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
    *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
}
LINEAR, EXPERTS, VOCABULARY = "LinearBase", ("FusedMoE", "MoERunner"), ("VocabParallelEmbedding",)
OTHER = re.compile(r"visual|vision|vit|audio|sound|speech|image|projector|merger|resampler|aligner|(^|\.)mtp")
DEPTH = 14
USED = (
    ast.ImportFrom,
    ast.Assign,
    ast.AnnAssign,
    ast.NamedExpr,
    ast.FunctionDef,
    ast.Call,
    ast.Return,
    ast.keyword,
    ast.Not,
)


@cache
def walked(node: ast.AST) -> tuple[ast.AST, ...]:
    """The statements, calls and names inside a node; other nodes are of no use here."""
    return tuple(one for one in ast.walk(node) if isinstance(one, USED))


@dataclass(frozen=True)
class Class:
    """A class in a source file."""

    module: str
    node: ast.ClassDef = field(compare=False)
    name: str = ""


Classes = frozenset[Class]


@dataclass
class Scope:
    """What names mean inside a function: its module, the classes bound to its parameters, and its own body."""

    module: str
    bound: dict[str, Classes]
    functions: list[ast.AST]
    owner: Class | None = None
    start: Class | None = None


class Source:
    """The parsed source of a release. files: module name → text."""

    def __init__(self, files: dict[str, str]):
        self.trees = {name: ast.parse(text) for name, text in files.items()}
        self.names: dict[str, dict[str, ast.AST]] = {}
        self._orders: dict[Class, list[Class]] = {}
        self._active: set[tuple[int, str]] = set()
        for module, tree in self.trees.items():
            self.names[module] = dict(self._definitions(module, tree))

    def _definitions(self, module: str, tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
        for node in walked(tree):
            if isinstance(node, ast.ImportFrom):
                parts = module.split(".")[: -node.level] if node.level else []
                origin = ".".join([*parts, *(node.module or "").split(".")]).strip(".")
                for alias in node.names:
                    yield alias.asname or alias.name, ast.Constant(f"{origin}\0{alias.name}")
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                yield node.name, node
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        yield target.id, node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                yield node.target.id, node.value

    def find(self, module: str, name: str, depth: int = 0) -> tuple[str, ast.AST | str] | None:
        """The definition of a name with its module; the name itself if its origin is not in the source."""
        found = self.names.get(module, {}).get(name)
        if isinstance(found, ast.Constant) and isinstance(found.value, str) and "\0" in found.value:
            origin, original = found.value.split("\0")
            if depth < DEPTH and (there := self.find(origin, original, depth + 1)):
                return there
            package = f"{origin}.__init__"
            return (
                self.find(package, original, depth + 1)
                if package in self.names and depth < DEPTH
                else (origin, original)
            )
        return (module, found) if found is not None else None

    def classes(self, expression: ast.AST | None, scope: Scope, depth: int = 0) -> Classes:
        """The classes that an expression may be."""
        if expression is None or depth > DEPTH:
            return frozenset()
        if isinstance(expression, ast.Name):
            return self._named(expression.id, scope, depth)
        parts: list[ast.AST] = []
        if isinstance(expression, ast.IfExp):
            parts = [expression.body, expression.orelse]
        elif isinstance(expression, ast.BoolOp | ast.Dict):
            parts = [*expression.values]
        elif isinstance(expression, ast.Subscript):
            parts = [expression.value]
        elif isinstance(expression, ast.Call) and (returned := self._returned(expression, scope)):
            function, scope = returned  # a function that returns classes, as SGLang's `get_moe_impl_class`
            parts = [node.value for node in walked(function) if isinstance(node, ast.Return) and node.value]
        elif isinstance(expression, ast.Call) and isinstance(expression.func, ast.Attribute):
            parts = [expression.func.value] if expression.func.attr == "get" else []
            parts += expression.args[1:] if expression.func.attr == "get" else []
        elif (
            isinstance(expression, ast.Call)
            and isinstance(expression.func, ast.Name)
            and expression.func.id == "partial"
        ):
            parts = [*expression.args[:1]]
        elif isinstance(expression, ast.Attribute) and isinstance(expression.value, ast.Name):
            return self._member(expression.value.id, expression.attr, scope, depth)
        return frozenset().union(*(self.classes(part, scope, depth + 1) for part in parts))

    def _member(self, name: str, attribute: str, scope: Scope, depth: int) -> Classes:
        """The classes that `name.attribute` may be: of an imported module, or of the class itself."""
        found = self.names.get(scope.module, {}).get(name)
        module = str(found.value).replace("\0", ".") if isinstance(found, ast.Constant) else ""
        if module in self.names:
            return self.classes(ast.Name(attribute), Scope(module, {}, []), depth + 1)
        value = self.attribute(scope.owner, attribute) if scope.owner and name in ("self", "cls") else None
        return self.classes(value[1], Scope(value[0].module, {}, []), depth + 1) if value else frozenset()

    def _returned(self, call: ast.Call, scope: Scope) -> tuple[ast.FunctionDef, Scope] | None:
        """The function that a call calls, and the scope of its results; None for methods and classes."""
        found = self.find(scope.module, call.func.id) if isinstance(call.func, ast.Name) else None
        if found and isinstance(found[1], ast.FunctionDef):
            return found[1], Scope(found[0], {}, [found[1]])
        return None

    def _named(self, name: str, scope: Scope, depth: int) -> Classes:
        if scope.bound.get(name):
            return scope.bound[name]
        key = id(scope.functions[-1]) if scope.functions else 0, name
        if (values := list(_assigned(name, scope.functions))) and key not in self._active:
            self._active.add(key)  # `x = x or y` is one of x and y
            found = frozenset().union(*(self.classes(value, scope, depth + 1) for value in values))
            self._active.discard(key)
            if found:
                return found
        defined = self.find(scope.module, name)
        if defined is None:
            return frozenset()
        module, node = defined
        if isinstance(node, str):
            return frozenset({Class(module, ast.ClassDef(node, [], [], [], []), node)})
        if isinstance(node, ast.ClassDef):
            return frozenset({Class(module, node, node.name)})
        if isinstance(node, ast.FunctionDef):
            return frozenset()
        return self.classes(node, Scope(module, {}, []), depth + 1)

    def mro(self, one: Class) -> list[Class]:
        """A class and its bases, depth first, each once (close enough to Python's order)."""
        if one not in self._orders:
            found = self._orders[one] = [one]
            for base in one.node.bases:
                for kind in self.classes(base, Scope(one.module, {}, [])):
                    found += [other for other in self.mro(kind) if other not in found]
        return self._orders[one]

    def is_a(self, one: Class, names: Iterable[str]) -> bool:
        """Whether it is one of these classes, or a subclass."""
        return any(kind.name in names for kind in self.mro(one))

    def attribute(self, one: Class, name: str) -> tuple[Class, ast.AST] | None:
        """The value of a class attribute, with the class that defines it."""
        for kind in self.mro(one):
            for node in kind.node.body:
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                is_it = any(isinstance(target, ast.Name) and target.id == name for target in targets)
                if isinstance(node, ast.Assign | ast.AnnAssign) and is_it and node.value is not None:
                    return kind, node.value
        return None

    def method(self, one: Class, name: str, after: Class | None = None) -> tuple[Class, ast.FunctionDef] | None:
        """A method of a class, or the next one in its order after a base."""
        order = self.mro(one)
        for kind in order[order.index(after) + 1 :] if after in order else order:
            for node in kind.node.body:
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    return kind, node
        return None


def _assigned(name: str, functions: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The values that functions assign to a local variable."""
    for function in functions:
        yield from _assignments(function).get(name, [])


@cache
def _assignments(function: ast.AST) -> dict[str, list[ast.AST]]:
    """Local variable → the values that a function assigns to it."""
    found: dict[str, list[ast.AST]] = {}
    for node in walked(function):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, []).append(node.value)
    return found


def _given(name: str, functions: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The functions of this name inside others, and what is appended to a list of this name."""
    for node in (node for function in functions for node in walked(function) if node is not function):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            yield node
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "append":
            yield from node.args if getattr(getattr(node.func, "value", None), "id", "") == name else ()


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


@dataclass
class Instance:
    """A module that a class may hold: of a class, with classes bound to its arguments; repeated in a list or not."""

    kind: Class
    bound: dict[str, Classes]
    repeated: bool = False


TEXT = Instance(Class("", ast.ClassDef("*text*", [], [], [], []), "*text*"), {})
"""A language model whose class follows from the configuration."""


def texts(modules: Iterable[tuple[str, Class]]) -> dict[str, str]:
    """The path of a language model whose class follows from the configuration, for an entry; empty without one."""
    paths = sorted(path for path, child in modules if child.name == "*text*")
    return {"text": paths[0]} if paths else {}


class Reader:
    """Lists the modules of the classes of a release. registry: architecture → class."""

    def __init__(self, source: Source, registry: dict[str, Class]):
        self.source, self.registry = source, registry
        self._known: dict[Any, list[tuple[str, Class]]] = {}

    def instances(self, expression: ast.AST | None, scope: Scope, depth: int = 0) -> Iterator[Instance]:
        """The modules that an expression may be."""
        if expression is None or depth > DEPTH:
            return
        parts: list[ast.AST] = []
        if isinstance(expression, ast.Call):
            yield from self._made(expression, scope, depth)
        elif isinstance(expression, ast.IfExp | ast.BoolOp):
            parts = [*ast.iter_child_nodes(expression)]
        elif isinstance(expression, ast.Lambda):
            parts = [expression.body]
        elif isinstance(expression, ast.List | ast.Tuple):
            parts = [*expression.elts]
        elif isinstance(expression, ast.ListComp | ast.GeneratorExp):
            parts = [expression.elt]
        elif isinstance(expression, ast.Name):
            parts = [*_assigned(expression.id, scope.functions), *_given(expression.id, scope.functions)]
        elif isinstance(expression, ast.FunctionDef):
            parts = [node.value for node in walked(expression) if isinstance(node, ast.Return) and node.value]
            scope = Scope(scope.module, scope.bound, [*scope.functions, expression], scope.owner, scope.start)
        for part in parts:
            yield from self.instances(part, scope, depth + 1)

    def _made(self, call: ast.Call, scope: Scope, depth: int) -> Iterator[Instance]:
        name = _called(call)
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if re.match(r"make_\w*layers", name) or name in ("ModuleList", "Sequential"):
            values = [keywords.get("layer_fn"), *call.args[:3]] if name.startswith("make") else call.args
            for value in values:
                for made in self.instances(value, scope, depth + 1):
                    yield Instance(made.kind, made.bound, repeated=True)
        elif name in ("init_vllm_registered_model", "initialize_model"):
            given = self._architectures(call)
            for one in given:
                yield Instance(self.registry[one], {})
            if not given:
                yield TEXT
        elif (
            isinstance(call.func, ast.Attribute)
            and isinstance(call.func.value, ast.Name)
            and call.func.value.id == "self"
        ):
            yield from self._method(call, scope, depth)
        else:
            yield from self._constructed(call, scope, depth)

    def _architectures(self, call: ast.Call) -> list[str]:
        for node in walked(call):
            if isinstance(node, ast.keyword) and node.arg == "architectures" and isinstance(node.value, ast.List):
                names = [getattr(one, "value", "") for one in node.value.elts]
                return [name for name in names if name in self.registry]
        return []

    def _method(self, call: ast.Call, scope: Scope, depth: int) -> Iterator[Instance]:
        name = _called(call)
        found = self.source.method(scope.start or scope.owner, name) if scope.owner else None
        if found:
            owner, function = found
            inner = Scope(owner.module, self._bound(function, call, scope), [function], owner, scope.start)
            yield from self.instances(function, inner, depth + 1)
        elif scope.owner:  # an attribute that holds a class
            kinds = self.source.classes(call.func, scope) | self._attribute_classes(name, scope)
            for kind in kinds:
                yield Instance(kind, self._arguments(kind, call, scope))

    def _attribute_classes(self, name: str, scope: Scope) -> Classes:
        values = [
            node.value for function in scope.functions for node in walked(function)
            if isinstance(node, ast.Assign) and any(getattr(one, "attr", "") == name for one in node.targets)
        ]  # fmt: skip
        return frozenset().union(*(self.source.classes(value, scope) for value in values))

    def _constructed(self, call: ast.Call, scope: Scope, depth: int) -> Iterator[Instance]:
        for value in _assigned(call.func.id, scope.functions) if isinstance(call.func, ast.Name) else ():
            is_registered = isinstance(value, ast.Call) and _called(value) == "_get_sgl_model_cls"
            if is_registered and "text_config" in ast.dump(value):
                yield TEXT
        for kind in self.source.classes(call.func, scope):
            yield Instance(kind, self._arguments(kind, call, scope))
        if isinstance(call.func, ast.Name):
            found = self.source.find(scope.module, call.func.id)
            inside = [
                node for function in scope.functions for node in walked(function)
                if isinstance(node, ast.FunctionDef) and node.name == call.func.id
            ]  # fmt: skip
            for function in inside:
                yield from self.instances(function, scope, depth + 1)
            if found and isinstance(found[1], ast.FunctionDef) and not inside:
                if call.func.id == "FusedMoEFactory":
                    yield Instance(Class("", ast.ClassDef("FusedMoE", [], [], [], []), "FusedMoE"), {})
                    return
                function = found[1]
                bound = self._bound(function, call, scope)
                yield from self.instances(function, Scope(found[0], bound, [function]), depth + 1)

    def _arguments(self, kind: Class, call: ast.Call, scope: Scope) -> dict[str, Classes]:
        found = self.source.method(kind, "__init__")
        return self._bound(found[1], call, scope, self_too=True) if found else {}

    def _bound(
        self, function: ast.FunctionDef, call: ast.Call, scope: Scope, *, self_too: bool = False
    ) -> dict[str, Classes]:
        """Parameter → the classes that a call passes, for those that are classes."""
        names = [one.arg for one in function.args.args]
        names = names[1:] if names[:1] in (["self"], ["cls"]) or self_too else names
        given = dict(zip(names, call.args, strict=False)) | {one.arg: one.value for one in call.keywords if one.arg}
        bound = {name: self.source.classes(value, scope) for name, value in given.items()}
        return {name: kinds for name, kinds in bound.items() if kinds}

    def modules(self, instance: Instance, depth: int = 0) -> Iterator[tuple[str, Class]]:
        """Path, with `*` for numbers, → class of each module inside one."""
        key = instance.kind, tuple(sorted(instance.bound.items(), key=lambda item: item[0]))
        if key not in self._known:
            self._known[key] = []  # what a module holds of its own class
            self._known[key] = list(dict.fromkeys(self._modules(instance, depth)))
        yield from self._known[key]

    def _modules(self, instance: Instance, depth: int) -> Iterator[tuple[str, Class]]:
        if depth > DEPTH:
            return
        for kind, function, bound in self.initializers(instance):
            defaults = self._defaults(function, kind.module)
            functions: list[ast.AST] = [function]
            scope = Scope(kind.module, defaults | bound, functions, kind, instance.kind)
            for name, value in _attributes(function):
                for made in self.instances(value, scope):
                    path = f"{name}.*" if made.repeated else name
                    yield path, made.kind
                    if not self.is_leaf(made.kind) and made.kind.name != "*text*":
                        for below, other in self.modules(Instance(made.kind, made.bound), depth + 1):
                            yield f"{path}.{below}", other

    def is_leaf(self, kind: Class) -> bool:
        return self.source.is_a(kind, (LINEAR, *EXPERTS, *VOCABULARY))

    def _defaults(self, function: ast.FunctionDef, module: str) -> dict[str, Classes]:
        arguments = function.args
        pairs = [
            *zip(arguments.args[len(arguments.args) - len(arguments.defaults) :], arguments.defaults, strict=True),
            *((one, value) for one, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if value),
        ]
        found = {one.arg: self.source.classes(value, Scope(module, {}, [])) for one, value in pairs}
        return {name: kinds for name, kinds in found.items() if kinds}

    def initializers(self, instance: Instance) -> Iterator[tuple[Class, ast.FunctionDef, dict[str, Classes]]]:
        """The `__init__` of a class, and those of bases that it calls, with the classes bound to their parameters."""
        found, bound = self.source.method(instance.kind, "__init__"), instance.bound
        while found:
            kind, function = found
            yield kind, function, bound
            found = None
            for node in walked(function):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "__init__":
                    inner = getattr(node.func, "value", None)
                    after = kind
                    if isinstance(inner, ast.Call) and inner.args and isinstance(inner.args[0], ast.Name):
                        after = next(iter(self.source.classes(inner.args[0], Scope(kind.module, {}, []))), kind)
                    elif isinstance(inner, ast.Name):  # Base.__init__(self, ...)
                        there = next(iter(self.source.classes(inner, Scope(kind.module, {}, []))), None)
                        found = self.source.method(there, "__init__") if there else None
                        break
                    found = self.source.method(instance.kind, "__init__", after)
                    if found:
                        scope = Scope(kind.module, self._defaults(function, kind.module) | bound, [function], kind)
                        bound = self._bound(found[1], node, scope)
                    break


def _attributes(function: ast.FunctionDef) -> Iterator[tuple[str, ast.AST]]:
    """The attributes of `self` that a function sets, with their values."""
    for node in walked(function):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for one in target.elts if isinstance(target, ast.Tuple) else [target]:
                    name = one.attr if isinstance(one, ast.Attribute) else "_start_"
                    is_own = getattr(getattr(one, "value", None), "id", "") == "self"
                    if is_own and not re.match(r"_?(start|end)_", name):  # make_layers gives both as well
                        yield name, node.value


class Literals:
    """Reads class attributes that are dicts of texts, also where they are composed of others."""

    def __init__(self, source: Source):
        self.source = source

    def of(self, kind: Class, name: str) -> Any:
        found = self.source.attribute(kind, name)
        return self.value(found[1], found[0]) if found else None

    def value(self, node: ast.AST, kind: Class) -> Any:
        """The value of an expression; None if it cannot be read."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.List | ast.Tuple):
            return [self.value(one, kind) for one in node.elts]
        if isinstance(node, ast.Dict):
            return self._dict(node, kind)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr | ast.Add):
            return self._joined(self.value(node.left, kind), self.value(node.right, kind))
        if isinstance(node, ast.Call):
            return self._call(node, kind)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            other = next(iter(self.source.classes(node.value, Scope(kind.module, {}, []))), None)
            return self.of(other, node.attr) if other else None
        if isinstance(node, ast.Name):
            found = self.source.find(kind.module, node.id)
            return self.value(found[1], kind) if found and isinstance(found[1], ast.AST) else None
        return None

    def _dict(self, node: ast.Dict, kind: Class) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                made |= self.value(value, kind) or {}
            else:
                made[self.value(key, kind)] = self.value(value, kind)
        return made

    def _call(self, node: ast.Call, kind: Class) -> Any:
        name = _called(node)
        if name == "compile":
            return self.value(node.args[0], kind)
        if name in ("dict", "WeightsMapper"):
            return {one.arg: self.value(one.value, kind) for one in node.keywords if one.arg}
        return None

    def _joined(self, one: Any, other: Any) -> Any:
        if isinstance(one, dict) and isinstance(other, dict):
            keys = [*one, *(key for key in other if key not in one)]
            nested = {key: self._joined(one.get(key), other.get(key)) for key in keys}
            return nested
        return other if one is None else one if other is None else one + other if isinstance(one, list) else other


def language(names: Iterable[str]) -> list[str]:
    """The sorted names that belong to the language model."""
    return sorted({name for name in names if not OTHER.search(name)})


def of_vllm(source: Source, registry: dict[str, Class]) -> dict[str, Any]:
    """Architecture → what LoRA keys may address in vLLM: empty without LoRA, `own` for the class of transformers."""
    reader, literals, found = Reader(source, registry), Literals(source), {}
    for architecture, kind in sorted(registry.items()):
        if architecture not in KNOWN:
            continue
        if kind.module.startswith("vllm.model_executor.models.transformers"):
            if kind.name == "TransformersForCausalLM":
                found[architecture] = {"own": True}
        elif source.is_a(kind, ("SupportsLoRA",)):
            entry = _vllm_entry(reader, literals, kind)
            if entry["modules"] or "text" in entry:  # otherwise it is written in a way that is not understood here
                found[architecture] = entry
        else:
            found[architecture] = {}
    return found


def _vllm_entry(reader: Reader, literals: Literals, kind: Class) -> dict[str, Any]:
    """What LoRA keys may address in a class of vLLM."""
    modules = list(reader.modules(Instance(kind, {})))
    packed = dict(literals.of(kind, "packed_modules_mapping") or {})
    embeddings = {*(literals.of(kind, "embedding_modules") or {})}
    for path, child in modules:
        if "." not in path:
            packed = (literals.of(child, "packed_modules_mapping") or {}) | packed
        embeddings |= {*(literals.of(child, "embedding_modules") or {})}
    for _, function, _ in reader.initializers(Instance(kind, {})):
        packed |= _set_later(function, literals, kind)
    entry: dict[str, Any] = {"modules": language(_addressed(reader.source, modules, packed, embeddings))}
    entry |= texts(modules)
    renames = {
        name.removeprefix("orig_to_new_"): {key: value for key, value in mapping.items() if value is not None}
        for name, mapping in (literals.of(kind, "hf_to_vllm_mapper") or {}).items()
        if name != "orig_to_new_stacked" and isinstance(mapping, dict)
    }
    if renames := {name: mapping for name, mapping in renames.items() if mapping}:
        entry["rename"] = renames
    if literals.of(kind, "is_3d_moe_weight"):
        entry["experts"] = "3d"
    return entry


def _set_later(function: ast.FunctionDef, literals: Literals, kind: Class) -> dict[str, Any]:
    """Entries that `__init__` adds to the packed modules."""
    made = {}
    for node in walked(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            target = node.targets[0]
            if getattr(target.value, "attr", "") == "packed_modules_mapping":
                made[literals.value(target.slice, kind)] = literals.value(node.value, kind)
    return made


def _addressed(
    source: Source, modules: list[tuple[str, Class]], packed: dict[str, Any], embeddings: set[str]
) -> Iterator[str]:
    """The names that keys may have: parts of packed layers instead of these."""
    for path, kind in modules:
        above, _, last = path.rpartition(".")
        if source.is_a(kind, VOCABULARY):
            if last in embeddings:
                yield path
        elif source.is_a(kind, EXPERTS):
            yield path
        elif source.is_a(kind, (LINEAR,)):
            for name in packed.get(last) or [last]:
                yield f"{above}.{name}".lstrip(".")


NORMALIZED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj", "q_a_proj": "fused_qkv_a_proj_with_mqa",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj_with_mqa",
}  # fmt: skip


def of_sglang(source: Source, registry: dict[str, Class]) -> dict[str, Any]:
    """Architecture → what LoRA keys may address in SGLang, which compares only the last part of a name."""
    reader, literals, found = Reader(source, registry), Literals(source), {}
    targets = source.names["sglang.srt.lora.utils"]["_KNOWN_LORA_TARGET_MODULES"]
    known = {node.value for node in ast.walk(targets) if isinstance(node, ast.Constant)}
    for architecture, kind in sorted(registry.items()):
        if architecture not in KNOWN:
            continue
        modules = list(reader.modules(Instance(kind, {})))
        leaves = {path for path, child in modules if source.is_a(child, (LINEAR, *VOCABULARY))}
        leaves = {path for path in leaves if path.rpartition(".")[2] in known and applies(source, literals, kind, path)}
        experts = {
            path for path, child in modules if source.is_a(child, EXPERTS) and {"gate_up_proj", "down_proj"} <= known
        }
        names = {
            f"{path}.*.{name}": None
            for path in experts
            if applies(source, literals, kind, path)
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        for path in leaves:
            above, _, last = path.rpartition(".")
            for name in [one for one, packed in NORMALIZED.items() if packed == last] or [last]:
                names[f"{above}.{name}".lstrip(".")] = None
            if last in ("qkv_proj", "gate_up_proj"):
                names[path] = None
        wanted, text = language(name for name in names if "layers." in name or name.endswith("lm_head")), texts(modules)
        parts = {f"*{'.experts' if '.experts.' in name else ''}.{name.rpartition('.')[2]}" for name in wanted}
        if wanted or (text and applies(source, literals, kind, f"{text['text']}.model.layers.*.self_attn.qkv_proj")):
            found[architecture] = {"modules": sorted(parts)} | text
    return found


def applies(source: Source, literals: Literals, kind: Class, path: str) -> bool:
    """Whether the model's own `should_apply_lora` takes a module; True if it has none."""
    found = source.method(kind, "should_apply_lora")
    if not found or path.endswith("lm_head"):
        return True
    owner, function = found
    name = path.replace("*", "0")
    for node in walked(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "match":
                attribute = getattr(node.func.value, "attr", "")
                return bool(re.match(literals.of(kind, attribute) or literals.of(owner, attribute) or "", name))
            if node.func.attr == "startswith":
                prefix = literals.value(node.args[0], owner)
                is_not = any(isinstance(one, ast.Not) for one in walked(function))
                return name.startswith(tuple(prefix) if isinstance(prefix, list) else prefix) != is_not
    return True


@dataclass
class Release:
    """A wheel."""

    path: Path

    @cached_property
    def server(self) -> str:
        return "sglang" if self.path.name.startswith("sglang") else "vllm"

    @cached_property
    def version(self) -> str:
        return re.sub(r"\.post\d+", "", self.path.name.split("-")[1])

    def read(self) -> dict[str, Any]:
        """Architecture → its entry."""
        wanted = re.compile(
            r"vllm/(model_executor/(models|layers)|models|lora)/.*\.py" if self.server == "vllm"
            else r"sglang/srt/(models|layers|lora)/.*\.py"
        )  # fmt: skip
        with zipfile.ZipFile(self.path) as wheel:
            files = {
                name.removesuffix(".py").replace("/", "."): wheel.read(name).decode("utf-8-sig")
                for name in wheel.namelist()
                if wanted.fullmatch(name)
            }
        source = Source(files)
        return of_vllm(source, _vllm_registry(source)) if self.server == "vllm" else of_sglang(source, _entries(source))


def _vllm_registry(source: Source) -> dict[str, Class]:
    package, registry = "vllm.model_executor.models", {}
    for node in ast.walk(source.trees[f"{package}.registry"]):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple) and len(value.elts) == 2:
                    module, name = (str(getattr(one, "value", None)) for one in value.elts)
                    module = module if module.startswith("vllm.") else f"{package}.{module}"
                    found = source.find(module, name) or source.find(f"{module}.__init__", name)
                    if found and isinstance(found[1], ast.ClassDef):
                        registry[str(key.value)] = Class(found[0], found[1], name)
    return registry


def _entries(source: Source) -> dict[str, Class]:
    registry = {}
    for module, names in source.names.items():
        if module.startswith("sglang.srt.models.") and "EntryClass" in names:
            entry = names["EntryClass"]
            for one in [entry] if isinstance(entry, ast.Name) else getattr(entry, "elts", []):
                for kind in source.classes(one, Scope(module, {}, [])):
                    registry[kind.name] = kind
    return registry


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=TABLE)
    given = parser.parse_args()
    table: dict[str, Any] = {}
    for path in sorted(given.folder.glob("*.whl")):
        release = Release(path)
        table[release.server] = {"release": release.version, "classes": release.read()}
        print(release.server, release.version, len(table[release.server]["classes"]))
    given.output.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
