"""The environment in which chat templates are rendered before transformers renders them: what takes too long is found.

Chat templates come with models of strangers. The sandbox of Jinja bounds `range`; here, numbers that make texts, lists
and numbers longer in a single operation have the same bound. What takes long in many operations is reported once: they
can be interrupted between any two of them.
"""

import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any

from jinja2 import Environment, Template, nodes
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment

from loratune.data.upstream import chat_template_environment
from loratune.events import note

_log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds after which a rendering is reported."""
_WIDTH = re.compile(r"%(\([^)]*\))?[-+ #0]*(\*|\d{6}|\d*\.(\*|\d{6}))")
"""A conversion of `%` with a large width or precision, or with one that is an argument."""
_LENGTHENING_METHODS = {"center", "expandtabs", "ljust", "rjust", "zfill"}
_LENGTHENING_FILTERS = ("batch", "center", "indent", "round", "tojson")
_FOLDED = (nodes.Mul, nodes.Pow, nodes.Mod, nodes.Filter)
"""Bounded expressions that Jinja computes while it compiles a template, if all of their operands are constant."""


class _Rendering:
    """A rendering that is reported if it takes long. what: describes it."""

    def __init__(self, what: str):
        self.what, self.report_at = what, time.monotonic() + PATIENCE


_rendering: ContextVar[_Rendering | None] = ContextVar("rendering", default=None)


@contextmanager
def reported(what: str) -> Iterator[None]:
    """Note after `PATIENCE` seconds what is still rendered inside."""
    token = _rendering.set(_Rendering(what))
    try:
        yield
    finally:
        _rendering.reset(token)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which no single operation takes long. Raises OverflowError: one would, as for a large `range`."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a bounded operation."""
        self.tick()
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *given: Any, **named: Any) -> Any:
        """Call a function, a macro or a method."""
        self.tick()
        if isinstance(getattr(function, "__self__", None), str) and function.__name__ in _LENGTHENING_METHODS:
            _check_sizes(function.__name__, *given, *named.values())
        return super().call(context, function, *given, **named)

    def tick(self) -> None:
        """Report the rendering if it takes long. Each iteration of a loop calls it."""
        rendering = _rendering.get()
        if rendering is not None and time.monotonic() > rendering.report_at:
            rendering.report_at = math.inf
            note(f"{rendering.what} after {PATIENCE:.0f} s; data.chat_template sets another")


@cache
def _environment() -> BoundedEnvironment:
    """With the settings, filters, functions and tags of `apply_chat_template`."""
    base = chat_template_environment()
    environment = BoundedEnvironment(
        trim_blocks=base.trim_blocks,
        lstrip_blocks=base.lstrip_blocks,
        extensions=[type(extension) for extension in base.extensions.values()],
    )
    environment.globals.update(base.globals)
    environment.filters.update(base.filters)
    for name in _LENGTHENING_FILTERS:
        environment.filters[name] = _bounded(name, base.filters[name])
    environment.filters["format"] = _bounded_format(base.filters["format"])
    return environment


def parse(source: str) -> nodes.Template:
    """The syntax tree of a template. Raises TemplateSyntaxError, RecursionError, ValueError: it is not one."""
    return _environment().parse(source)


def compiled(tree: nodes.Template) -> Template:
    """Compile the syntax tree of a template, which is changed.

    Raises:
        OverflowError: An operation on constants is too large. transformers would compute it, also where no row does.
        TemplateSyntaxError, SyntaxError, RecursionError: It cannot be compiled.
    """
    environment = _environment()
    for node in tree.find_all(_FOLDED):
        if next(node.find_all((nodes.Name, nodes.Call)), None) is None:
            _compute(node, environment)
    for loop in [*tree.find_all(nodes.For)]:
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        loop.body.insert(0, nodes.ExprStmt(tick).set_lineno(loop.lineno))
    tree.set_environment(environment)  # of the nodes that were added
    return environment.from_string(tree)


def _compute(node: nodes.Expr, environment: Environment) -> None:
    """Compute a constant expression. Raises OverflowError: it is too large."""
    try:
        environment.from_string(nodes.Template([nodes.Output([node])], lineno=1)).render()
    except OverflowError:
        raise
    except Exception:
        _log.debug("a constant expression of the chat template fails", exc_info=True)  # as it does where a row needs it


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Raises OverflowError: the result of an operation is too long."""
    numbers = [operand for operand in (left, right) if isinstance(operand, int)]
    if operator == "%":
        size = math.inf if isinstance(left, str) and _WIDTH.search(left) else 0
    elif len(numbers) == 2:
        bits = [number.bit_length() for number in numbers]
        size = bits[0] * right if operator == "**" and abs(left) > 1 else sum(bits)
    elif operator == "*" and numbers:
        other = right if left is numbers[0] else left
        size = len(other) * numbers[0] if isinstance(other, str | bytes | list | tuple) else 0
    else:
        size = 0
    if size > MAX_RANGE:
        raise OverflowError(_too_large(f"the result of `{operator}`"))


def _check_sizes(name: str, *given: Any) -> None:
    """Raises OverflowError: an argument of a function is a large number."""
    if any(isinstance(value, int) and value > MAX_RANGE for value in given):
        raise OverflowError(_too_large(f"an argument of `{name}`"))


def _too_large(what: str) -> str:
    return f"{what} is too large; the sandbox blocks sizes above {MAX_RANGE:,}"


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter without large numbers as arguments; the value that it filters may be one."""

    @wraps(function)
    def check(value: Any, *given: Any, **named: Any) -> Any:
        _check_sizes(name, *given, *named.values())
        return function(value, *given, **named)

    return check


def _bounded_format(function: Callable[..., str]) -> Callable[..., str]:
    @wraps(function)
    def check(text: Any, *given: Any, **named: Any) -> str:
        _check_operands("%", text, given)
        return function(text, *given, **named)

    return check
