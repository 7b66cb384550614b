"""Names parameters of the public API as options of the running command.

Errors and notes of the library name parameters: `Problem.key` is one, and texts hold them as code, such as
`overwrite=True`, `base_gguf=FILE`, or `rows=...` for whatever its value is. Parameters of the functions of commands are
called as those of the API that they are passed to.
"""

import re
import sys
from ast import literal_eval
from collections.abc import Iterable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from loratune.errors import Problem
from loratune.text import shell_word

_CODE = re.compile(r"`(\w+)=([^`]*)`")
_ITEMS = {"resume": "changes"}
"""Parameter that may also be a list → the parameter of the command that takes its items."""
_FILES = ("config.json", "loratune.json")
"""The ends of names of files with keys of their own."""
_options: ContextVar[dict[str, str]] = ContextVar("options", default={})  # noqa: B039  it is replaced as a whole
"""Parameter of the running command → its option, or the name of its argument; with `no_` in front what turns it off."""


def use_options(parameters: Iterable[Any]) -> None:
    """Translate into the options of a command from now on. parameters: those of the command, as Typer holds them."""
    found = {"overwrite": "--overwrite"}  # which `/save` in a chat has, too
    for one in parameters:
        found[one.name] = max(one.opts, key=len) if one.param_type_name == "option" else one.metavar or one.name
        if one.secondary_opts:
            found[f"no_{one.name}"] = one.secondary_opts[0]
    _options.set(found)


def as_options(text: str) -> str:
    """A text of the library with options instead of parameters. What the command has no option for is unchanged, and so
    is what the user has written on the command line."""

    def translated(match: re.Match[str]) -> str:
        is_of_user = any(f"{match[1]}={match[2]}" in argument for argument in sys.argv[1:])
        return match[0] if is_of_user else _option(match[1], match[2]) or match[0]

    return _CODE.sub(translated, text)


def problem_as_options(problem: Problem) -> Problem:
    """A problem that names options instead of parameters. Keys of a config and of `_FILES` stay, although a
    parameter may have the same name."""
    key = problem.key
    if not (problem.code.startswith("config.") or problem.where.endswith(_FILES)):
        name, _, item = key.partition(": ")
        key = _option(name, f"[..., {item!r}]" if item else "...") or key
    where, what, fix = map(as_options, (problem.where, problem.what, problem.fix))
    return replace(problem, where=where, key=key, what=what, fix=fix)


def _option(name: str, code: str) -> str | None:
    """A parameter with its value as on the command line; None if the command has no option for it."""
    options = _options.get()
    if name not in options:
        return None
    value: Any = code
    with suppress(ValueError, SyntaxError, RecursionError, MemoryError):  # a word like FILE stands for itself
        value = literal_eval(code)
    if value is ... or value is True:
        return options[name]
    if value is False or value == "":
        return options.get(f"no_{name}")
    items, before = (value, options[name]) if isinstance(value, list) else ([value], "")
    flag = options[_ITEMS.get(name, name)]
    words = [f"{flag} {shell_word(str(item))}" for item in items if item is not ...]
    return " ".join([before, *words] if name in _ITEMS and ... not in items else words)
