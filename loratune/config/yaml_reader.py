"""YAML text → plain values, with the line of every key and the traps of YAML 1.1 closed; errors → problems.

Refused rather than guessed: duplicate keys, aliases and merges, tags, and plain scalars that YAML 1.1 and 1.2 read
differently (`no`, `010`, `12:30`). `1e-4` is a number, as people mean it. Errors of pydantic become problems with file,
line, key, what was expected, and what to do.
"""

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


def parse(text: str, source: str) -> Document:
    """Parse YAML text whose problems are reported as `source:line`."""
    try:
        loader = _PlainLoader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_problem(error, source)) from None
    except ReaderError as error:
        where = f"{source}:{text.count(chr(10), 0, error.position) + 1}"
        what = f"not valid YAML: the control character U+{error.character:04X}"
        raise ConfigError(Problem(Code.CONFIG_SYNTAX, what, where)) from None
    except (ValueError, OverflowError):  # of `chr`, to which PyYAML passes whatever number an escape has
        mark = loader.get_mark()
        where = f"{source}:{mark.line + 1}:{mark.column + 1}"
        what, fix = "not valid YAML: an escape that names no character", "the last character is \\U0010FFFF"
        raise ConfigError(Problem(Code.CONFIG_SYNTAX, what, where, fix=fix)) from None
    document = Document(source)
    builder = _Builder(document)
    value = builder.build(node, ()) if node is not None else {}
    if node is not None and not isinstance(value, dict) and not builder.problems:
        what = f"expected a mapping of sections, got {kind_of(value)}"
        builder.add(Code.CONFIG_SYNTAX, (), node, what, "begin with `model:`")
    if builder.problems:
        raise ConfigError(first_problems(builder.problems))
    document.values = value
    return document


def override(document: Document, assignment: str) -> None:
    """Apply one `section.key=value`. The value is read by the rules of the file; an empty one removes the key.

    Raises:
        ConfigError: There is no `=`, a key is empty, or a key stands below something that is not a mapping.
    """
    code = Code.CONFIG_SYNTAX
    name, equals, text = assignment.partition("=")
    name = name.strip()
    path = tuple(name.split("."))
    if not equals or not all(path):
        raise ConfigError(Problem(code, f"`{assignment}` is not of the form section.key=value", OPTION))
    try:
        parsed = parse(f"value: {text}", OPTION).values
    except ConfigError as error:
        keys = [problem.key.replace("value", name, 1) or name for problem in error.problems]
        problems = [replace(problem, where=OPTION, key=key) for problem, key in zip(error.problems, keys, strict=True)]
        raise ConfigError(problems) from None
    if len(parsed) > 1:
        raise ConfigError(Problem(code, "expected one value, not several lines", OPTION, name))
    target = document.values
    for part in path[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise ConfigError(Problem(code, f"`{part}` is {kind_of(target)}, not a section", OPTION, name))
    if text.strip():
        target[path[-1]] = parsed["value"]
    elif target.pop(path[-1], None) is None:
        what = "is not in the file, so there is nothing to remove"
        raise ConfigError(Problem(Code.CONFIG_SYNTAX, what, OPTION, name))
    document.lines = {key: line for key, line in document.lines.items() if key[: len(path)] != path}
    document.overridden.add(path)


def _read_text(path: Path) -> str:
    where = str(path)
    try:
        if path.is_dir() or path.is_fifo():
            kind = "a directory" if path.is_dir() else "a pipe"
            raise ConfigError(Problem(Code.CONFIG_UNREADABLE, f"this is {kind}, not a config file", where))
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(Problem(Code.CONFIG_UNREADABLE, f"cannot be read: {error.strerror}", where)) from None
    if len(raw) > MAX_BYTES:
        what = "larger than 256 KiB, so this is not a config file"
        raise ConfigError(Problem(Code.CONFIG_UNREADABLE, what, where))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            Problem(Code.CONFIG_UNREADABLE, f"byte {error.start} is not UTF-8", f"{where}:{line}")
        ) from None


def _syntax_problem(error: yaml.MarkedYAMLError, source: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
    if isinstance(error, _UnsupportedYAMLError):
        return Problem(error.code, str(error.problem), where, fix=error.fix)
    parts = [part for part in (error.problem, error.context) if part]
    fix = "indent with spaces" if "'\\t'" in str(error.problem) else ""
    return Problem(Code.CONFIG_SYNTAX, f"not valid YAML: {', '.join(parts)}", where, fix=fix)


class _UnsupportedYAMLError(yaml.MarkedYAMLError):
    """Valid YAML that a config has no use for."""

    def __init__(self, code: Code, event: yaml.Event, what: str, fix: str = ""):
        super().__init__(problem=what, problem_mark=event.start_mark)  # type: ignore[arg-type]
        self.code, self.fix = code, fix


class _PlainLoader(yaml.SafeLoader):
    """Composes plain nodes only, each once and to a bounded depth: nine lines of aliases could mean a billion nodes."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            fix = "write the value out"
            raise _UnsupportedYAMLError(Code.CONFIG_SYNTAX, event, "YAML aliases are not supported", fix)
        if event.tag is not None:
            what = f"the YAML tag `{event.tag.replace('tag:yaml.org,2002:', '!!')}` is not supported"
            raise _UnsupportedYAMLError(Code.CONFIG_SYNTAX, event, what)
        if self.depth > MAX_DEPTH:
            raise _UnsupportedYAMLError(Code.CONFIG_SYNTAX, event, f"nested more than {MAX_DEPTH} levels deep")
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Builder:
    """Turns a node graph into values, collecting lines and problems on the way."""

    def __init__(self, document: Document):
        self.document = document
        self.problems: list[Problem] = []

    def add(self, code: Code, path: KeyPath, node: yaml.Node, what: str, fix: str = "") -> None:
        where = f"{self.document.source}:{node.start_mark.line + 1}"
        self.problems.append(Problem(code, what, where, dotted(path), fix))

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
                self.add(Code.CONFIG_SYNTAX, path, key_node, "keys must be plain words; merges are not supported")
                continue
            if key in first:
                what = f"written twice, in line {first[key]} and in line {line}"
                self.add(Code.CONFIG_SYNTAX, (*path, key), key_node, what, "keep one")
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
            self.add(Code.CONFIG_SYNTAX, path, node, what, fix)
            return None
        if _INT.fullmatch(text) and len(text) < 100:
            return int(text)
        if _FLOAT.fullmatch(text) or _SPECIAL_FLOAT.fullmatch(text):
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        return text


def number(text: str) -> float | None:
    """The number that text is by the rules of a config, for options too: in the digits 0 to 9; None if it is none."""
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
        groups.setdefault(_key_path(details), []).append(details)
    groups = _without_alternatives(groups)
    problems = [_problem(path, group, document) for path, group in [*groups.items()][:MAX_PROBLEMS]]
    return first_problems(problems, len(groups))


def _key_path(details: ErrorDetails) -> KeyPath:
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
    kind, context = details["type"], details.get("ctx", {})
    if group[0]["type"] == "extra_forbidden":
        return Problem(Code.CONFIG_UNKNOWN_KEY, "unknown key", where, key, suggestion(path))
    if group[0]["type"] == "missing":
        return Problem(Code.CONFIG_MISSING_KEY, "missing", where, key, "this key has no default")
    if isinstance(error := context.get("error"), InvalidSettingError):
        if not error.keys:
            return Problem(error.code, f"{error}, {value}", where, key, error.fix)
        where = document.where((*path, *error.keys[0].split(".")))
        keys = " and ".join(dotted((*path, *name.split("."))) for name in error.keys)
        return Problem(error.code, str(error), where, keys, error.fix)
    if kind in _EXPECTED or kind == "literal_error":
        has_choices = any(each["type"] == "literal_error" and each["ctx"]["expected"] != "'auto'" for each in group)
        named = [each for each in group if each["type"] == "literal_error" or not has_choices]
        expected = [_EXPECTED.get(each["type"]) or each["ctx"]["expected"] for each in named]
        choices = [part.strip("'") for text in expected for part in text.replace(" or ", ", ").split(", ")]
        meant = "" if details["input"] is None else str(details["input"]).strip().lower()
        near = nearest_name(meant, choices) if kind == "literal_error" and meant else None
        what = f"expected {' or '.join(dict.fromkeys(expected))}, {value}"
        return Problem(Code.CONFIG_BAD_VALUE, what, where, key, f"did you mean `{near}`?" if near else "")
    if kind.endswith("too_short"):
        return Problem(Code.CONFIG_BAD_VALUE, "must not be empty", where, key)
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("should be", "must be")
    return Problem(Code.CONFIG_BAD_VALUE, f"{message}, {value}", where, key)
