"""The variables that a chat template reads and a user can set, found in its syntax tree."""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache

from jinja2 import Environment, TemplateError, meta, nodes

from loratune.config.template_arguments import WRITTEN

_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
_FUNCTIONS = {"raise_exception", "strftime_now"}
"""Functions that templates call."""


@lru_cache(16)
def variables(source: str) -> dict[str, str]:
    """Name → default of each variable that a template reads and a user can set, in alphabetical order.

    The default is JSON, from `x | default(1)`, `x if x is defined else 1` or `set x = 1` where `x is not defined`;
    empty if there is none of these. The result is empty if the source is not a template.
    """
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    environment.filters.setdefault("from_json", json.loads)
    try:
        tree = environment.parse(_GENERATION.sub("", source))
        names = meta.find_undeclared_variables(tree) - WRITTEN - _FUNCTIONS
    except (TemplateError, SyntaxError, RecursionError, ValueError):  # a number of too many digits
        return {}
    first_set: dict[str, int] = {}
    for node in tree.find_all(nodes.Name):
        if node.ctx == "store":
            first_set[node.name] = min(node.lineno, first_set.get(node.name, node.lineno))
    found = dict[str, str]()
    for name in sorted(names):  # a template may set a variable itself, after a test whether the user has set it
        tests = [default for line, default in _tests(tree, name) if line <= first_set.get(name, line)]
        if tests or name not in first_set:
            found[name] = next(filter(None, tests), "")
    return found


def unread(sources: Iterable[str], arguments: Collection[str]) -> str:
    """A line if templates do not read some of these arguments; otherwise empty."""
    known: dict[str, str] = {}
    for source in sources:
        known |= variables(source)
    names = ", ".join(f"`{name}`" for name in arguments if name not in known)
    reads = described(known) or "no argument"
    return f"chat_template_kwargs: {names} is not read by the chat template, which reads {reads}" if names else ""


def described(known: Mapping[str, str]) -> str:
    """Variables as text: `enable_thinking (default true), reasoning_effort`."""
    return ", ".join(f"{name} (default {value})" if value else name for name, value in known.items())


def _tests(tree: nodes.Template, name: str) -> Iterator[tuple[int, str]]:
    """The line of each test whether a variable is set, and the default there; empty where it is not constant."""
    for node in tree.find_all(nodes.Filter):
        if node.name in ("default", "d") and _is_name(node.node, name):
            yield node.lineno, _constant(node.args[0] if node.args else None)
    for choice in tree.find_all(nodes.CondExpr):
        if (missing := _is_missing(choice.test, name)) is not None:
            yield choice.lineno, _constant(choice.expr1 if missing else choice.expr2)
    for branch in tree.find_all(nodes.If):
        if (missing := _is_missing(branch.test, name)) is not None:
            sets = (one for one in branch.body if isinstance(one, nodes.Assign) and _is_name(one.target, name))
            yield branch.lineno, _constant(next((one.node for one in sets), None) if missing else None)


def _constant(node: nodes.Node | None) -> str:
    return json.dumps(node.value, default=str) if isinstance(node, nodes.Const) else ""


def _is_missing(test: nodes.Node | None, name: str) -> bool | None:
    """Whether a test is true where a variable is not set; None if it tests something else."""
    if isinstance(test, nodes.Not):
        inner = _is_missing(test.node, name)
        return None if inner is None else not inner
    if isinstance(test, nodes.Test) and test.name in ("defined", "undefined") and _is_name(test.node, name):
        return test.name == "undefined"
    return None


def _is_name(node: nodes.Node | None, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name
