"""Reads the code of a layer for what a comparison on samples may miss: a clamp that no sample reaches, a branch on the
length of rows, a state that is kept between calls.

Code is read as it is now, as the functions that would run, wherever a release has moved them: the `forward` of a layer
and of its children, and the functions of transformers that it calls. A branch that the settings of the layer decide is
read only if it is taken. Most layers have nothing that a sample could miss; one that has is computed by transformers.
"""

import ast
import builtins
import hashlib
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

LARGEST = 8
"""Numbers in the code of a layer that are larger may be limits that no sample reaches: these have 16 tokens."""
PASSED = frozenset({"self", "hidden_states", "position_embeddings", "attention_mask", "position_ids"})
"""Parameters of a layer that training passes; others with a default, such as a cache, have that default."""
RISKY = frozenset({
    "clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_max", "clamp_min_", "clamp_max_", "minimum", "maximum",
    "fmin", "fmax", "max", "min", "masked_fill", "masked_fill_", "masked_scatter", "masked_scatter_", "threshold",
    "threshold_", "hardtanh", "relu", "relu_", "relu6", "hardsigmoid", "hardswish", "hardshrink", "softshrink",
    "nan_to_num", "heaviside", "sign", "sgn", "round", "floor", "ceil", "trunc", "fix", "fmod", "remainder", "frac",
    "bucketize", "searchsorted", "topk", "sort", "argsort", "argmax", "argmin", "kthvalue", "quantile", "median",
    "any", "all", "item", "tolist", "numpy", "gt", "ge", "lt", "le", "ne", "eq", "less", "less_equal",
    "greater_equal", "not_equal", "isclose", "allclose", "logical_and", "logical_or", "logical_not", "logical_xor",
    "isnan", "isinf", "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "bernoulli", "bernoulli_",
    "multinomial", "normal", "normal_", "uniform_", "random_", "exponential_", "cond", "setattr", "delattr", "eval",
    "exec", "open", "globals", "locals", "vars", "__import__", "id", "hash", "input", "compile",
})  # fmt: skip
"""Functions and methods whose result may be another one for values that no sample has, or for each call."""
OF_SHAPE = frozenset({"shape", "size", "numel", "nelement", "ndim", "dim", "__len__"})
"""Attributes of tensors from which the length of rows can be read."""
_MODELS = "transformers.models."
_SHARED = ("transformers.", "kernels.")
"""Modules of families; and of what they share, with the package that transformers 5.25 requires: its wrappers choose
between functions or rename arguments, which a comparison shows, so what they call is read, and they are not."""
_UNUSUAL = (
    ast.While, ast.Try, ast.Match, ast.Global, ast.Nonlocal, ast.Delete, ast.Import, ast.ImportFrom, ast.FunctionDef,
    ast.AsyncFunctionDef, ast.ClassDef, ast.Yield, ast.YieldFrom, ast.Await, ast.NamedExpr,
)  # fmt: skip
"""Statements and expressions that layers do not need."""
_UNKNOWN, _PLAIN = object(), bool | int | float | str | None


class NotReadableError(Exception):
    """The code of a layer may do what a comparison cannot see; the message says why, as the rest of a sentence."""


@dataclass
class _Reading:
    """What was read so far. texts: the code of all functions, for a digest; visited: their codes."""

    texts: list[str] = field(default_factory=list)
    visited: set[Any] = field(default_factory=set)


def read(module: nn.Module) -> str:
    """Read the code of a layer and of its children. Returns a digest of it.

    Raises:
        NotReadableError: The code has something that a comparison on samples may miss.
    """
    reading = _Reading()
    for part in module.modules():
        if not (_is_torch(type(part)) or is_linear(part)):
            _check_unchanged(part)
            if any(isinstance(value, torch.Tensor) for value in vars(part).values()):
                raise NotReadableError("keeps a tensor that is no weight")
            _read_method(part, "forward", reading)
    return hashlib.sha256("\n".join(reading.texts).encode()).hexdigest()[:16]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, with or without LoRA, whose replacement checks it itself."""
    return all(hasattr(module, name) for name in ("in_features", "out_features", "weight"))


def _check_unchanged(module: nn.Module) -> None:
    """Check that a class is one of transformers, with the `forward` of its file. Raises NotReadableError."""
    kind: Any = type(module)
    if not kind.__module__.startswith("transformers."):
        raise NotReadableError("is not a class of transformers")
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    function = vars(owner)["forward"]
    while wrapped := getattr(function, "__wrapped__", None):
        if not _home(function).startswith(_SHARED):
            raise NotReadableError("was changed by another library")
        function = wrapped
    has_call = any("__call__" in vars(base) for base in kind.__mro__ if not _is_torch(base))
    if has_call or owner is nn.Module or _home(function) != owner.__module__:
        raise NotReadableError("was changed by another library")


def _is_torch(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def _home(function: Any) -> str:
    """The name of the module in whose file a function is, also if it pretends to be the one that it wraps."""
    return str(getattr(function, "__globals__", {}).get("__name__", ""))


def _read_method(module: nn.Module, name: str, reading: _Reading) -> None:
    """Read a method of a module, and those of its bases that it may call."""
    for base in type(module).__mro__:
        if not _is_torch(base) and isinstance(function := vars(base).get(name), FunctionType):
            _read_function(function, module, reading)
            if "super" not in inspect.unwrap(function).__code__.co_names:
                return


def _read_function(function: Any, module: nn.Module, reading: _Reading) -> None:
    """Read a function, those that it wraps, and those that it calls. module: the layer, if it is a method of it."""
    while isinstance(function, FunctionType):
        if function.__code__ in reading.visited:
            return
        reading.visited.add(function.__code__)
        if not _is_wrapper(function):
            _FunctionReader(function, module, reading).run()
            return
        for cell in function.__closure__ or ():
            if isinstance(cell.cell_contents, FunctionType) and cell.cell_contents is not inspect.unwrap(function):
                _read_function(cell.cell_contents, module, reading)
        function = getattr(function, "__wrapped__", None)


def _is_wrapper(function: FunctionType) -> bool:
    """Whether a function belongs to what all families share, and calls another one."""
    is_shared = _home(function).startswith(_SHARED) and not _home(function).startswith(_MODELS)
    return is_shared and (hasattr(function, "__wrapped__") or _home(function).startswith(_SHARED[1]))


class _FunctionReader(ast.NodeVisitor):
    """Reads one function. Raises NotReadableError at what a comparison may miss."""

    def __init__(self, function: FunctionType, module: nn.Module, reading: _Reading):
        self._function, self._module, self._reading = function, module, reading
        self._node = _definition(function)
        self._parameters = inspect.signature(function, follow_wrapped=False).parameters
        closure = inspect.getclosurevars(function) if function.__closure__ else None
        self._closure: Mapping[str, Any] = closure.nonlocals if closure else {}
        self._local = {one.id for one in ast.walk(self._node) if isinstance(one, ast.Name) and _is_stored(one)}
        self._of_shape = self._names_of_shapes()
        self._reading.texts.append(ast.dump(_bare(self._node)))

    def run(self) -> None:
        """Read the function's body."""
        for statement in self._node.body:
            self.visit(statement)

    # Branches

    def visit_If(self, node: ast.If) -> None:
        """Only the branch that the settings decide, or both. What only raises an error computes nothing."""
        if not node.orelse and all(isinstance(one, ast.Raise) for one in node.body):
            return
        known = self._value(node.test)
        if known is _UNKNOWN:
            self.visit(node.test)
        for statement in (*(node.body if known else ()), *(node.orelse if known is _UNKNOWN or not known else ())):
            self.visit(statement)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        """The same."""
        known = self._value(node.test)
        if known is _UNKNOWN:
            self.visit(node.test)
        for part in (*([node.body] if known else ()), *([node.orelse] if known is _UNKNOWN or not known else ())):
            self.visit(part)

    def visit_Raise(self, node: ast.Raise) -> None:
        """An error is no other result."""

    def visit_Assert(self, node: ast.Assert) -> None:
        """The same."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Annotations compute nothing."""
        self.visit(node.target)
        if node.value is not None:
            self.visit(node.value)

    def generic_visit(self, node: ast.AST) -> None:
        """Refuse statements that layers do not need, and read all others."""
        if isinstance(node, _UNUSUAL):
            raise NotReadableError(f"has code that a comparison may miss: `{_text(node)}`")
        super().generic_visit(node)

    # Expressions

    def visit_Compare(self, node: ast.Compare) -> None:
        """A comparison of values or lengths decides something that samples may never reach."""
        if self._value(node) is _UNKNOWN and not self._is_harmless(node):
            raise NotReadableError(f"compares `{_text(node)}`, which may be otherwise for rows that no check has tried")
        self.generic_visit(node)

    def _is_harmless(self, node: ast.Compare) -> bool:
        operands = [node.left, *node.comparators]
        if all(isinstance(one, ast.Is | ast.IsNot | ast.In | ast.NotIn) for one in node.ops):
            return all(isinstance(one, ast.Constant | ast.Name | ast.Attribute | ast.Tuple) for one in operands)
        if not all(isinstance(one, ast.Eq | ast.NotEq) for one in node.ops) or any(map(self._has_shape, operands)):
            return False
        values = [self._value(one) for one in operands]
        return any(isinstance(one, str | int) and (isinstance(one, str) or one in (0, 1)) for one in values) or any(
            isinstance(one, ast.Attribute) and ast.unparse(one).startswith("self.num_") for one in operands
        )

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """A remainder, or a quotient of whole numbers other than a half, may be zero for all samples. A number may be
        written as a product."""
        is_half = isinstance(node.op, ast.FloorDiv) and self._value(node.right) == 2
        if isinstance(node.op, ast.FloorDiv | ast.Mod) and not is_half and self._value(node) is _UNKNOWN:
            raise NotReadableError(f"has code that a comparison may miss: `{_text(node)}`")
        if not any(isinstance(one, ast.Name) for one in ast.walk(node)):
            self.visit_Constant(ast.Constant(self._value(node)))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Large numbers may be limits."""
        if isinstance(node.value, int | float) and abs(node.value) > LARGEST:
            raise NotReadableError(f"has a number that no check may have reached: {node.value}")

    def visit_Call(self, node: ast.Call) -> None:
        """Refuse what is `RISKY`, and read other functions."""
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        is_of_zero = name == "greater" and len(node.args) == 2 and self._value(node.args[1]) == 0
        is_of_other = name == "getattr" and ast.unparse(node.args[0]) not in ("self", "self.config")
        if (name == "greater" and not is_of_zero) or (name == "where" and len(node.args) > 1) or is_of_other:
            raise NotReadableError(f"has code that a comparison may miss: `{_text(node)}`")
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """An attribute of the layer: a method is read; the number of the layer, or a new value, is refused."""
        if isinstance(node.ctx, ast.Store | ast.Del):
            raise NotReadableError(f"keeps a state: `{ast.unparse(node)}`")
        if node.attr in RISKY and ast.unparse(node.value) != "self":
            raise NotReadableError(f"has code that a comparison may miss: `{_text(node)}`")
        if node.attr in ("layer_idx", "layer_id", "layer_index", "layer_number"):
            raise NotReadableError("computes something else in some layers, by their number")
        if ast.unparse(node.value) == "self":
            found = getattr(self._module, node.attr, None)
            if isinstance(found, MethodType):
                _read_method(self._module, node.attr, self._reading)
            else:
                self._follow(node.attr, found)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """A part of something; what does not belong to the call may not be changed."""
        inner: ast.expr = node
        while isinstance(inner, ast.Subscript):
            inner = inner.value
        is_local = isinstance(inner, ast.Name) and (inner.id in self._local or inner.id in self._parameters)
        if isinstance(node.ctx, ast.Store | ast.Del) and not is_local:
            raise NotReadableError(f"keeps a state: `{_text(node)}`")
        parts = node.slice.elts[:-1] if isinstance(node.slice, ast.Tuple) else [node.slice]
        if any("self." in ast.unparse(part) for part in parts if isinstance(part, ast.Slice)):
            raise NotReadableError(f"takes a part of long rows: `{_text(node)}`")
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        """A name of the function, or a global one, whose value is read."""
        if node.id in self._local or node.id in self._parameters or not isinstance(node.ctx, ast.Load):
            return
        self._follow(node.id, self._global(node.id))

    def _follow(self, name: str, found: Any) -> None:
        """Read what a name stands for."""
        found = found.func if isinstance(found, partial) else found
        if getattr(found, "__name__", "") in RISKY and callable(found) and not isinstance(found, nn.Module):
            raise NotReadableError(f"has code that a comparison may miss: `{name}`")
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        if is_number and name in self._function.__globals__ and abs(found) > LARGEST:
            raise NotReadableError(f"has a number that no check may have reached: {name} = {found}")
        if isinstance(found, ModuleType) and found.__name__.partition(".")[0] not in ("torch", "math", "transformers"):
            raise NotReadableError(f"uses the module {found.__name__}")
        if isinstance(found, nn.Module) and not any(found is part for part in self._module.modules()):
            _read_method(found, "forward", self._reading)
        if isinstance(found, FunctionType) and _home(found).partition(".")[0] not in ("torch", "math"):
            if not _home(found).startswith(_SHARED):
                raise NotReadableError(f"calls {_home(found)}.{found.__qualname__}")
            _read_function(found, self._module, self._reading)
        if isinstance(found, type) and issubclass(found, torch.autograd.Function) and not _is_torch(found):
            for one in ("forward", "backward"):
                _read_function(getattr(found, one), self._module, self._reading)

    def _global(self, name: str) -> Any:
        if name in self._closure:
            return self._closure[name]
        return self._function.__globals__.get(name, getattr(builtins, name, None))

    # Values that the settings decide

    def _value(self, node: ast.expr) -> Any:
        """The value of an expression of settings, or `_UNKNOWN`. The mode is none: both are compared."""
        if isinstance(node, ast.BoolOp):
            return self._of_several(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            value = self._value(node.operand)
            return value if value is _UNKNOWN else not value
        names = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
        known = {name: value for name in names if (value := self._setting(name)) is not _UNKNOWN}
        calls = any(isinstance(one, ast.Call | ast.Await | ast.Lambda | ast.comprehension) for one in ast.walk(node))
        if calls or known.keys() != names or "self.training" in ast.unparse(node):
            return _UNKNOWN
        try:
            value = eval(compile(ast.Expression(node), "<setting>", "eval"), {"__builtins__": {}}, known)
        except (ArithmeticError, AttributeError, LookupError, NameError, TypeError, ValueError):
            return _UNKNOWN
        return _UNKNOWN if isinstance(value, torch.Tensor | nn.Module) and not _is_none_test(node) else value

    def _of_several(self, node: ast.BoolOp) -> Any:
        values = [self._value(one) for one in node.values]
        decisive = isinstance(node.op, ast.Or)
        if any(one is not _UNKNOWN and bool(one) is decisive for one in values):
            return decisive
        return _UNKNOWN if _UNKNOWN in values else not decisive

    def _setting(self, name: str) -> Any:
        """The value of a name if it is a setting: the layer, a parameter that training does not pass, or a constant."""
        if name == "self" and isinstance(self._module, nn.Module) and "self" in self._parameters:
            return self._module
        if name in self._parameters and name not in self._local:
            default = self._parameters[name].default
            is_given = self._function.__name__ != "forward" or name in PASSED
            return default if not is_given and isinstance(default, _PLAIN) else _UNKNOWN
        found = self._global(name) if name not in self._local else _UNKNOWN
        return found if isinstance(found, _PLAIN) else _UNKNOWN

    # Lengths of rows

    def _names_of_shapes(self) -> set[str]:
        """Names that may hold the length of rows."""
        names: set[str] = set()
        for _ in range(3):  # Names that are made from other names.
            for one in ast.walk(self._node):
                if isinstance(one, ast.Assign) and _reads_shape(one.value, names):
                    names |= {
                        name.id for target in one.targets for name in ast.walk(target) if isinstance(name, ast.Name)
                    }
        return names

    def _has_shape(self, node: ast.expr) -> bool:
        return _reads_shape(node, self._of_shape)


def _reads_shape(node: ast.AST, names: set[str]) -> bool:
    """Whether an expression is computed from the length of rows."""
    return any(
        (isinstance(one, ast.Attribute) and one.attr in OF_SHAPE)
        or (isinstance(one, ast.Name) and (one.id in names or one.id == "len"))
        for one in ast.walk(node)
    )


def _is_stored(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


def _is_none_test(node: ast.expr) -> bool:
    return isinstance(node, ast.Compare) and all(isinstance(one, ast.Is | ast.IsNot) for one in node.ops)


@cache
def _definition(function: FunctionType) -> ast.FunctionDef:
    """The definition of a function. Raises NotReadableError: there is no source, or it is a lambda."""
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(function.__code__))).body
    except (OSError, TypeError, SyntaxError, ValueError) as error:
        raise NotReadableError("has no source that can be read") from error
    if not isinstance(node, ast.FunctionDef):
        raise NotReadableError("has no source that can be read")
    return node


def _bare(node: ast.FunctionDef) -> ast.Module:
    """The body of a function and its parameters, without annotations, decorators and docstring."""
    names = ast.Constant([one.arg for one in ast.walk(node.args) if isinstance(one, ast.arg)])  # type: ignore[arg-type]
    body = node.body
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return ast.Module([ast.Expr(names), *body], [])


def _text(node: ast.AST) -> str:
    """Code on one line, as an example."""
    line = ast.unparse(node).splitlines()[0]
    return line if len(line) <= 60 else f"{line[:57]}..."
