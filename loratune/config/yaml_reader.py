"""Reads YAML text as plain values with the line of every key, refuses ambiguous YAML, and turns errors into problems.

Refused rather than guessed: duplicate keys, aliases and merges, tags, and plain scalars that YAML 1.1 and 1.2 read
differently (`no`, `010`, `12:30`). `1e-4` is a number. Errors of pydantic become problems with file, line, key, what
was expected, and what to do.
"""

import errno
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from yaml.reader import ReaderError

from loratune.codes import Code
from loratune.config.keys import KeyPath, dotted, nearest_name, suggestion
from loratune.config.section import InvalidSettingError
from loratune.errors import ConfigError, Problem

MAX_BYTES = 1 << 18
MAX_DEPTH = 32
MAX_PROBLEMS = 20
OPTION = "--set"

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"([-+]?\.inf|\.nan)", re.IGNORECASE)
_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False}
_AMBIGUOUS = re.compile(
    r"(?:y|n|yes|no|on|off)|[-+]?0[0-9_]+|[-+]?0[box][0-9a-f_]+|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+", re.I
)


@dataclass
class Document:
    """A YAML document as plain values; `where(path)` is `file:line` of a key."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overridden: set[KeyPath] = field(default_factory=set)

    def where(self, path: KeyPath) -> str:
        """`file:line` of the nearest ancestor of `path` that is in the file, or the option that set it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.overridden:
                return OPTION
            if path[:end] in self.lines:
                return f"{self.source}:{self.lines[path[:end]]}"
        return OPTION if any(key[: len(path)] == path for key in self.overridden) else self.source


def read(path: Path) -> Document:
    """Read a config file.

    Raises ConfigError: not a readable UTF-8 YAML mapping of at most 256 KiB; every duplicate and ambiguous value.
    """
    document = parse(_read_text(path), str(path))
    if not document.values:
        problem = Problem(Code.CONFIG_UNREADABLE, "the file is empty", str(path), fix="see configs/ for examples")
        raise ConfigError(problem)
    return document


def _read_text(path: Path) -> str:
    where, raw = str(path), b""
    try:
        if path.is_fifo():
            raise OSError(errno.EINVAL, "it is a pipe")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise OSError(errno.EFBIG, "it is larger than 256 KiB, so this is not a config file")
        return raw.decode("utf-8-sig")
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        where = f"{where}:{raw.count(10, 0, error.start) + 1}"
        what = f"byte {error.start} is not UTF-8"
    raise ConfigError(Problem(Code.CONFIG_UNREADABLE, what, where))


def parse(text: str, source: str) -> Document:
    """Parse YAML text whose problems are reported as `source:line`."""
    node = _compose(text, source)
    document = Document(source)
    builder = _Builder(document)
    value = builder.build(node, ()) if node is not None else {}
    if node is not None and not isinstance(value, dict) and not builder.problems:
        builder.add((), node, f"expected a mapping of sections, got {kind_of(value)}", "begin with `model:`")
    if builder.problems:
        raise ConfigError(first_problems(builder.problems))
    document.values = value
    return document


def _compose(text: str, source: str) -> yaml.Node | None:
    """The nodes of YAML text; None for an empty one. Raises ConfigError."""
    line, fix = 0, ""
    try:
        loader = _PlainLoader(text)
        node: yaml.Node | None = loader.get_single_node()
        return node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(filter(None, (error.problem, error.context)))
        fix = error.note or ("indent with spaces" if "'\\t'" in what else "")
    except ReaderError as error:
        mark, line = None, text.count("\n", 0, error.position)
        what = f"the control character U+{error.character:04X}"
    except (ValueError, OverflowError):  # of `chr`, to which PyYAML passes whatever number an escape has
        mark = loader.get_mark()
        what, fix = "an escape that names no character", "the last character is \\U0010FFFF"
    where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else f"{source}:{line + 1}"
    raise ConfigError(Problem(Code.CONFIG_SYNTAX, f"invalid or unsupported YAML: {what}", where, fix=fix))


def override(document: Document, assignments: Sequence[str]) -> None:
    """Apply each `section.key=value`. Values are read by the rules of the file; an empty one removes the key.

    Raises:
        ConfigError: There is no `=`, a key is empty, or a key is below something that is not a mapping.
    """
    for assignment in assignments:
        _assign(document, assignment)


def _assign(document: Document, assignment: str) -> None:
    def refuse(what: str, key: str = "") -> ConfigError:
        return ConfigError(Problem(Code.CONFIG_SYNTAX, what, OPTION, key))

    name, equals, text = assignment.partition("=")
    name = name.strip()
    path = tuple(name.split("."))
    if not equals or not all(path):
        raise refuse(f"`{assignment}` is not of the form section.key=value")
    try:
        parsed = parse(f"value: {text}", OPTION).values
    except ConfigError as error:
        keys = [problem.key.replace("value", name, 1) or name for problem in error.problems]
        problems = [replace(problem, where=OPTION, key=key) for problem, key in zip(error.problems, keys, strict=True)]
        raise ConfigError(problems) from None
    if len(parsed) > 1:
        raise refuse("expected one value, not several lines", name)
    target = document.values
    for part in path[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise refuse(f"`{part}` is {kind_of(target)}, not a section", name)
    if text.strip():
        target[path[-1]] = parsed["value"]
    elif target.pop(path[-1], None) is None:
        raise refuse("is not in the file, so there is nothing to remove", name)
    document.lines = {key: line for key, line in document.lines.items() if key[: len(path)] != path}
    document.overridden.add(path)


class _PlainLoader(yaml.SafeLoader):
    """Composes plain nodes only, each once and to a bounded depth: nine lines of aliases could mean a billion nodes."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        what = fix = None
        if isinstance(event, yaml.AliasEvent):
            what, fix = "YAML aliases are not supported", "write the value out"
        elif event.tag is not None:
            what = f"the YAML tag `{event.tag.replace('tag:yaml.org,2002:', '!!')}` is not supported"
        elif self.depth > MAX_DEPTH:
            what = f"nested more than {MAX_DEPTH} levels deep"
        if what is not None:
            raise yaml.MarkedYAMLError(problem=what, problem_mark=event.start_mark, note=fix)
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Builder:
    """Turns a node graph into values, collecting lines and problems on the way."""

    def __init__(self, document: Document):
        self.document = document
        self.problems: list[Problem] = []

    def add(self, path: KeyPath, node: yaml.Node, what: str, fix: str = "") -> None:
        where = f"{self.document.source}:{node.start_mark.line + 1}"
        self.problems.append(Problem(Code.CONFIG_SYNTAX, what, where, dotted(path), fix))

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        if isinstance(node, yaml.MappingNode):
            return dict(self._items(node, path))
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, index)) for index, child in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, path)

    def _items(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[str, Any]]:
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                self.add(path, key_node, "keys must be plain words; merges are not supported")
                continue
            if key in first:
                what = f"written twice, in line {first[key]} and in line {line}"
                self.add((*path, key), key_node, what, "keep one")
                continue
            first[key] = line
            self.document.lines[(*path, key)] = line
            yield key, self.build(value_node, (*path, key))

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text: str = node.value
        if node.style in ("'", '"', "|", ">"):
            return text
        if text.lower() in _CONSTANTS:
            return _CONSTANTS[text.lower()]
        if _AMBIGUOUS.fullmatch(text):
            fix = "quote it if text is meant, else write true, false or a decimal number"
            what = f"`{text}` means different things to different YAML readers"
            self.add(path, node, what, fix)
            return None
        if _INT.fullmatch(text) and len(text) < 100:
            return int(text)
        if _FLOAT.fullmatch(text) or _SPECIAL_FLOAT.fullmatch(text):
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        return text


def number(text: str) -> float | None:
    """The number that a text is by the rules of a config, also for options: in ASCII digits; None for other text."""
    return float(text) if _FLOAT.fullmatch(text.strip()) else None


def first_problems(problems: Sequence[Problem], total: int | None = None) -> list[Problem]:
    """The first of `total` problems, and how many more there are: a wrong file may have tens of thousands."""
    more = (len(problems) if total is None else total) - MAX_PROBLEMS
    rest = [Problem(Code.MORE_PROBLEMS, f"and {more:,} more problems")] if more > 0 else []
    return [*problems[:MAX_PROBLEMS], *rest]


def reads_as_text(text: str) -> bool:
    """Whether text without quotes comes back as the same text."""
    patterns = (_AMBIGUOUS, _INT, _FLOAT, _SPECIAL_FLOAT)
    return text.lower() not in _CONSTANTS and not any(pattern.fullmatch(text) for pattern in patterns)


def kind_of(value: object) -> str:
    """A value in a user's words: `text 'eight'`, `a number 8.5`, `a list`."""
    kinds = {dict: "a section", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    shown = f" {value!r}" if isinstance(value, str | int | float) else ""
    return kinds.get(type(value), "nothing") + shown


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section",
    "model_attributes_type": "a section",
}


def translate(error: ValidationError, document: Document) -> list[Problem]:
    """One problem for each error of pydantic, in the order of the keys; alternatives of a union count once."""
    groups: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors():
        groups.setdefault(key_path(details), []).append(details)
    groups = _without_alternatives(groups)
    problems = [_problem(path, group, document) for path, group in [*groups.items()][:MAX_PROBLEMS]]
    return first_problems(problems, len(groups))


def key_path(details: ErrorDetails) -> KeyPath:
    """The keys of a location, without the names that pydantic gives to the alternatives of a union."""
    alternatives = {"str", "int", "float", "bool", "constrained-int", "constrained-float", "Source"}
    location = details["loc"]
    own = location[-1:] if details["type"] == "extra_forbidden" else ()  # the user's word, whatever it is
    above = location[: len(location) - len(own)]
    return (*(part for part in above if isinstance(part, int) or not (part in alternatives or "[" in part)), *own)


def _without_alternatives(groups: dict[KeyPath, list[ErrorDetails]]) -> dict[KeyPath, list[ErrorDetails]]:
    """Drop `a: not a number` where `a.b: unknown key` says what is wrong with the alternative that was meant."""
    parents = {path[:end] for path in groups for end in range(1, len(path))}
    return {
        path: group
        for path, group in groups.items()
        if path not in parents or not all(details["type"] in _EXPECTED for details in group)
    }


def _problem(path: KeyPath, group: list[ErrorDetails], document: Document) -> Problem:
    details = next((details for details in group if details["type"] not in _EXPECTED), group[0])
    where, key, value = document.where(path), dotted(path), f"got {kind_of(details['input'])}"
    kind, error = details["type"], details.get("ctx", {}).get("error")
    if group[0]["type"] == "extra_forbidden":
        return Problem(Code.CONFIG_UNKNOWN_KEY, "unknown key", where, key, suggestion(path))
    if group[0]["type"] == "missing":
        return Problem(Code.CONFIG_MISSING_KEY, "missing", where, key, "this key has no default")
    if isinstance(error, InvalidSettingError) and error.keys:
        paths = [(*path, *name.split(".")) for name in error.keys]
        return Problem(error.code, str(error), document.where(paths[0]), " and ".join(map(dotted, paths)), error.fix)
    fix = ""
    if kind in _EXPECTED or kind == "literal_error":
        what, fix = _expectation(group)
    elif kind.endswith("too_short"):
        return Problem(Code.CONFIG_BAD_VALUE, "must not be empty", where, key)
    else:
        what = details["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("should be", "must be")
    return Problem(Code.CONFIG_BAD_VALUE, f"{what}, {value}", where, key, fix)


def _expectation(group: list[ErrorDetails]) -> tuple[str, str]:
    """Which types or choices a value may have, and the choice that it is most like, as a question."""
    literals = [each for each in group if each["type"] == "literal_error"]
    named = literals if any(each["ctx"]["expected"] != "'auto'" for each in literals) else group
    expected = [_EXPECTED.get(each["type"]) or each["ctx"]["expected"] for each in named]
    choices = [part.strip("'") for text in expected for part in text.replace(" or ", ", ").split(", ")]
    given = group[0]["input"]
    near = nearest_name(str(given).strip().lower(), choices) if literals and given not in (None, "") else ""
    return f"expected {' or '.join(dict.fromkeys(expected))}", f"did you mean `{near}`?" if near else ""
