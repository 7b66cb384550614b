"""Checks of what a program passes to the public functions, by the annotations of their parameters."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from os import PathLike, fspath
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from loratune.codes import Code
from loratune.config.yaml_files import MAX_DEPTH, kind_of
from loratune.errors import ConfigError, Problem
from loratune.system.files import path_problem

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
_WORDS = {
    bool: "true or false", list: "a list", int: "a whole number", float: "a number", str: "text", Mapping: "a mapping",
    Sequence: "a list", PathLike: "a path", Callable: "a function", NoneType: "None",
}  # fmt: skip
"""Type → its name in messages; a text is also a path, and a whole number a number."""


def checked(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Check the arguments of a public function before it is called.

    Where a number or a list is expected, those of NumPy, pandas and torch are taken too, as Python's.

    Raises ConfigError: an argument has another type than its parameter is annotated with, or is a path that cannot be
    one. The parameter is named.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*arguments: _Parameters.args, **options: _Parameters.kwargs) -> _Result:
        bound, problems = signature.bind(*arguments, **options), list[Problem]()
        for name, value in bound.arguments.items():
            kind = signature.parameters[name].kind
            if name != "self" and kind is not inspect.Parameter.VAR_KEYWORD:
                expected = _expected(function, name)
                expected = Sequence[expected] if kind is inspect.Parameter.VAR_POSITIONAL else expected  # type: ignore[valid-type]
                bound.arguments[name] = as_python(value) if expected is Any else _taken(value)
                problems += _problems(name, bound.arguments[name], expected)
            elif name != "self":
                bound.arguments[name] = _taken(value)  # checked where it is used
        if problems:
            raise ConfigError(problems)
        return function(*bound.args, **bound.kwargs)

    return call


@cache
def _expected(function: Callable[..., Any], name: str) -> Any:
    """The annotation of a parameter; that of a class which is defined later is a text."""
    annotation = inspect.signature(function).parameters[name].annotation
    return eval(annotation, function.__globals__) if isinstance(annotation, str) else annotation


def check(name: str, value: Any, expected: Any) -> None:
    """Raises ConfigError: a value, that of a parameter of this name, has another type than expected."""
    if problems := _problems(name, value, expected):
        raise ConfigError(problems)


def _problems(name: str, value: Any, expected: Any) -> list[Problem]:
    if not _fits(value, expected):
        of_values = next((one for one in (expected, *get_args(expected)) if get_origin(one) is Mapping), None)
        if isinstance(value, Mapping) and of_values is not None:
            keys, inner = get_args(of_values)
            if wrong := [key for key in value if not _fits(key, keys)]:
                what = f"its names must be {' or '.join(_words(keys))}, got {kind_of(wrong[0])}"
                return [Problem(Code.USAGE_BAD_VALUE, what, key=name)]
            bad = next(key for key, one in value.items() if not _fits(one, inner))
            return _problems(f"{name}: {bad}", value[bad], inner)
        what = f"must be {' or '.join(dict.fromkeys(_words(expected)))}, got {kind_of(value)}"
        return [Problem(Code.USAGE_BAD_VALUE, what, key=name)]
    is_path = _takes_paths(expected) and isinstance(value, str | PathLike)
    if is_path and (what := path_problem(fspath(value)) or ("" if fspath(value) else "is empty")):
        return [Problem(Code.USAGE_BAD_VALUE, f"the path {what}", key=name, fix="check the path")]
    return []


def _fits(value: Any, expected: Any) -> bool:
    """Whether a value has the type of an annotation."""
    kind, inner = get_origin(expected) or expected, get_args(expected)
    if kind is Any:
        return True
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is Literal:
        return isinstance(value, str) and value in inner
    if kind is Sequence:
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)
        return is_list and all(_fits(one, inner[0]) for one in value)
    if kind is Mapping:
        return isinstance(value, Mapping) and all(_fits(key, inner[0]) and _fits(value[key], inner[1]) for key in value)
    if kind is PathLike:
        return isinstance(value, PathLike) and isinstance(fspath(value), str)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return value is None if kind in (None, NoneType) else isinstance(value, kind)


def _takes_paths(expected: Any) -> bool:
    return any(get_origin(one) is PathLike for one in get_args(expected))


def _words(expected: Any) -> list[str]:
    """The type of an annotation in words, its alternatives one by one."""
    kind, inner = get_origin(expected) or expected, get_args(expected)
    if kind in (Union, UnionType):
        is_path = _takes_paths(expected)
        return [word for one in inner if one is not NoneType and not (is_path and one is str) for word in _words(one)]
    if kind is Literal:
        return [f"one of {', '.join(inner)}"]
    word = _WORDS.get(kind) or f"of type {kind.__name__}"
    return [f"{word} ({' or '.join(_words(inner[0]))} each)" if kind is Sequence and inner[0] is not Any else word]


def _taken(value: Any) -> Any:
    """An argument with Python's numbers and lists instead of those of NumPy, pandas and torch."""
    if isinstance(value, Mapping):
        return {key: as_python(one) for key, one in value.items()}
    return [*map(as_python, value)] if isinstance(value, list | tuple) else as_python(value)


def as_python(value: Any) -> Any:
    """A number or a list of Python instead of one of NumPy, pandas and torch; other values are unchanged."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, type) else value


def plain(value: Any, key: str = "", levels: int = MAX_DEPTH) -> Any:
    """A value of a config as a config file could hold it: paths as text, numbers and lists of Python.

    Args:
        value: The value.
        key: Its key, for the message.
        levels: The levels of lists and mappings that it may have.

    Raises ConfigError: it has more levels, or contains itself.
    """
    if levels < 0:
        what = f"nested more than {MAX_DEPTH} levels deep, or contains itself"
        raise ConfigError(Problem(Code.CONFIG_BAD_VALUE, what, key=key))
    value = fspath(value) if isinstance(value, PathLike) else as_python(value)
    if isinstance(value, Mapping):
        return {name: plain(one, f"{key}.{name}".lstrip("."), levels - 1) for name, one in value.items()}
    return [plain(one, key, levels - 1) for one in value] if isinstance(value, list | tuple) else value
