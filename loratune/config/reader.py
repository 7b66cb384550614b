"""YAML text → plain values, with the line of every key and the traps of YAML 1.1 closed.

What is refused rather than guessed: duplicate keys, aliases and merges, tags, and plain scalars which YAML 1.1 and
1.2 read differently (`no`, `010`, `12:30`). What is read as people mean it: `1e-4` is a number.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loratune.errors import ConfigError, Problem

KeyPath = tuple[str | int, ...]

MAX_BYTES = 1 << 20
MAX_DEPTH = 32

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
    overridden: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """`file:line` of the nearest ancestor of `path` that stands in the file, or the option that set it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.overridden:
                return self.overridden[path[:end]]
            if path[:end] in self.lines:
                return f"{self.source}:{self.lines[path[:end]]}"
        return self.source


def read(path: Path) -> Document:
    """Read a config file.

    Raises ConfigError: not a readable UTF-8 YAML mapping of at most 1 MiB; every duplicate and ambiguous value.
    """
    document = parse(_read_text(path), str(path))
    if not document.values:
        raise ConfigError(Problem("the file is empty", str(path), fix="see configs/ for examples"))
    return document


def parse(text: str, source: str) -> Document:
    """Parse YAML text whose problems are reported as `source:line`."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_problem(error, source)) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(Problem(f"not readable as YAML: {str(error).splitlines()[0]}", source)) from None
    finally:
        loader.dispose()
    document = Document(source)
    builder = _Builder(document)
    value = builder.build(node, ()) if node is not None else {}
    if node is not None and not isinstance(value, dict) and not builder.problems:
        builder.add((), node, f"expected a mapping of sections, got {kind_of(value)}", "begin with `model:`")
    if builder.problems:
        raise ConfigError(builder.problems)
    document.values = value
    return document


def override(document: Document, assignment: str) -> None:
    """Apply one `section.key=value`; the value is read by the rules of the file.

    Raises ConfigError: no `=`, an empty key, a key below something that is no mapping.
    """
    name, equals, text = assignment.partition("=")
    path = tuple(name.strip().split("."))
    option = f"--set {name.strip()}"
    if not equals or not all(path):
        raise ConfigError(Problem(f"--set {assignment}: not of the form section.key=value"))
    value = parse(f"value: {text}" if text.strip() else "value:", option).values["value"]
    target = document.values
    for part in path[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise ConfigError(Problem(f"`{part}` is {kind_of(target)}, not a section", option))
    target[path[-1]] = value
    document.overridden[path] = option


def _read_text(path: Path) -> str:
    where = str(path)
    try:
        if path.is_dir():
            raise ConfigError(Problem("this is a directory, not a config file", where))
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(Problem(f"cannot be read: {error.strerror}", where)) from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(Problem("larger than 1 MiB, so this is not a config file", where))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(Problem(f"byte {error.start} is not UTF-8", f"{where}:{line}")) from None


def _syntax_problem(error: yaml.MarkedYAMLError, source: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
    parts = [part for part in (error.problem, error.context) if part]
    fix = "indent with spaces" if "'\\t'" in str(error.problem) else ""
    return Problem(f"not valid YAML: {', '.join(parts)}", where, fix=fix)


class _Builder:
    """Turns a node graph into values, collecting lines and problems on the way."""

    def __init__(self, document: Document):
        self.document = document
        self.problems: list[Problem] = []
        self.seen: set[int] = set()

    def add(self, path: KeyPath, node: yaml.Node, what: str, fix: str = "") -> None:
        where = f"{self.document.source}:{node.start_mark.line + 1}"
        self.problems.append(Problem(what, where, dotted(path), fix))

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        if (
            id(node) in self.seen
        ):  # an alias gives the same node again; following it would let nine lines mean a billion
            self.add(path, node, "YAML aliases are not supported", "write the value out")
            return None
        self.seen.add(id(node))
        if len(path) > MAX_DEPTH:
            self.add(path[:3], node, f"nested more than {MAX_DEPTH} levels deep")
            return None
        if isinstance(node, yaml.MappingNode):
            return dict(self._items(node, path))
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, index)) for index, child in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, path)

    def _items(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[str, Any]]:
        self._check_tag(node, path)
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                self.add(path, key_node, "keys must be plain words; merges are not supported")
                continue
            if key in first:
                self.add((*path, key), key_node, f"written twice, in line {first[key]} and in line {line}", "keep one")
                continue
            first[key] = line
            self.document.lines[(*path, key)] = line
            yield key, self.build(value_node, (*path, key))

    def _check_tag(self, node: yaml.Node, path: KeyPath) -> None:
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
            self.add(path, node, f"the YAML tag `{node.tag.replace('tag:yaml.org,2002:', '!!')}` is not supported")

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text: str = node.value
        self._check_tag(node, path)
        if node.style in ("'", '"', "|", ">"):
            return text
        if text.lower() in _CONSTANTS:
            return _CONSTANTS[text.lower()]
        if _AMBIGUOUS.fullmatch(text):
            fix = "quote it if text is meant, else write true, false or a decimal number"
            self.add(path, node, f"`{text}` means different things to different YAML readers", fix)
            return None
        if _INT.fullmatch(text) and len(text) < 100:
            return int(text)
        if _FLOAT.fullmatch(text) or _SPECIAL_FLOAT.fullmatch(text):
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        return text


def dotted(path: KeyPath) -> str:
    """`("data", "train", 0)` → `data.train[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def kind_of(value: object) -> str:
    """A value in a user's words: `text 'eight'`, `a number 8.5`, `a list`."""
    kinds = {dict: "a section", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return kinds.get(type(value), "nothing") + (f" {value!r}" if isinstance(value, str | int | float) else "")
