"""The environment in which chat templates are rendered before transformers renders them: what takes too long is found.

Chat templates come with models of strangers. The sandbox of Jinja bounds `range`; here, products and powers have the
same bound. What takes long in many operations is reported once: they can be interrupted between any two of them.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

from jinja2 import Environment, Template, nodes
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment

from loratune.data.upstream import chat_template_environment
from loratune.events import note

_log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds after which a rendering is reported."""
_FOLDED = (nodes.Mul, nodes.Pow)
"""Bounded expressions, which Jinja computes while it compiles a template if all of their operands are constant."""


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
    """A sandbox with bounded products and powers. Raises OverflowError: one is too large, as for a large `range`."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a bounded operation."""
        self.tick()
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *given: Any, **named: Any) -> Any:
        """Call a function, a macro or a method."""
        self.tick()
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
    if len(numbers) == 2:
        bits = [number.bit_length() for number in numbers]
        size = bits[0] * right if operator == "**" and abs(left) > 1 else sum(bits)
    elif operator == "*" and numbers:
        other = right if left is numbers[0] else left
        size = len(other) * numbers[0] if isinstance(other, str | bytes | list | tuple) else 0
    else:
        size = 0
    if size > MAX_RANGE:
        what = f"the result of `{operator}` is too large; the sandbox blocks sizes above {MAX_RANGE:,}"
        raise OverflowError(what)
