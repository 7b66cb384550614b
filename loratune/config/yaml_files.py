"""Reads YAML as plain values with the line of every key, rejects ambiguous YAML, and writes YAML that it can read.

Rejected are duplicate keys, aliases and merges, tags, and plain scalars that YAML 1.1 and 1.2 read differently (`no`,
`010`, `12:30`). `1e-4` is a number.
"""

import errno
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from yaml.reader import ReaderError

from loratune.codes import Code
from loratune.config.keys import KeyPath, dotted
from loratune.config.schema import RunConfig
from loratune.errors import ConfigError, Problem
from loratune.system.files import beside
from loratune.text import one_line, shell_word

MAX_BYTES = 1 << 18
MAX_DEPTH = 32
MAX_PROBLEMS = 20
OVERRIDES = "`overrides=...`"
"""The place of a value that an assignment has set."""

_OF_ROWS = (".csv", ".tsv", ".jsonl", ".parquet", ".arrow", ".xlsx")
"""Endings of files that hold rows, never a config."""
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
        """`file:line` of `path` or its nearest ancestor in the file, or the option that set it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.overridden:
                return OVERRIDES
            if path[:end] in self.lines:
                return f"{self.source}:{self.lines[path[:end]]}"
        return OVERRIDES if any(key[: len(path)] == path for key in self.overridden) else self.source


def read(path: Path) -> Document:
    """Read a config file.

    Raises ConfigError: not a readable UTF-8 YAML mapping of at most 256 KiB, or it has duplicate or ambiguous values.
    """
    if path.suffix in _OF_ROWS:
        fix = f"`loratune init {shell_word(str(path))} --model MODEL` writes a config for it"
        raise ConfigError(Problem(Code.CONFIG_UNREADABLE, "is a file of rows, not a config", str(path), fix=fix))
    document = parse(_read_text(path), str(path))
    if not document.values:
        problem = Problem(Code.CONFIG_UNREADABLE, "the file is empty", str(path), fix="`loratune init` writes a config")
        raise ConfigError(problem)
    return document


def _read_text(path: Path) -> str:
    where, raw, fix = str(path), b"", "name a config, a YAML file in UTF-8"
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
        fix = "" if path.exists() else beside(path, lambda one: one.suffix in (".yaml", ".yml"))
        fix = fix or "name a config, a YAML file in UTF-8; `loratune init ROWS --model MODEL` writes one"
    except UnicodeDecodeError as error:
        where = f"{where}:{raw.count(10, 0, error.start) + 1}"
        what = f"byte {error.start} is not UTF-8"
    raise ConfigError(Problem(Code.CONFIG_UNREADABLE, what, where, fix=fix))


def parse(text: str, source: str) -> Document:
    """Parse YAML text. source: the file name in messages. Raises ConfigError."""
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
    """The root node of YAML text; None if it is empty. Raises ConfigError."""
    line, fix = 0, ""
    try:
        loader = _PlainLoader(text)
        node: yaml.Node | None = loader.get_single_node()
        return node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(filter(None, (error.problem, error.context)))
        fix = error.note or ("indent with spaces" if "'\\t'" in what else "")
        is_of_blocks = what.startswith(
            ("mapping values are not allowed here", "expected <block end>", "could not find expected ':'")
        )
        if mark is not None and is_of_blocks and (found := _layout_problem(text, mark.line)) is not None:
            number, what, fix = found
            raise ConfigError(Problem(Code.CONFIG_SYNTAX, what, f"{source}:{number}", fix=fix)) from None
    except ReaderError as error:
        mark, line = None, text.count("\n", 0, error.position)
        what = f"the control character U+{error.character:04X}"
    except (ValueError, OverflowError):  # from `chr`, to which PyYAML passes the unchecked number of an escape
        mark = loader.get_mark()
        what, fix = "an escape that names no character", "the last character is \\U0010FFFF"
    where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else f"{source}:{line + 1}"
    raise ConfigError(Problem(Code.CONFIG_SYNTAX, f"invalid or unsupported YAML: {what}", where, fix=fix))


def _layout_problem(text: str, number: int) -> tuple[int, str, str] | None:
    """The line that is written wrongly, what is wrong with it, and what to do; None if that is not known.

    number: the line at which the parser stopped, counted from 0, which is often the one after it.
    """
    lines = text.splitlines()
    for place in range(min(number, len(lines) - 1), max(-1, number - 3), -1):
        if (joined := re.fullmatch(r"\s*([a-z_]+):(?=[^\s:/\\])(.*)", lines[place])) is not None:
            return place + 1, "there is no space after the colon", f"write `{joined[1]}: {joined[2]}`"
    if number >= len(lines) or not (content := lines[number].lstrip(" ")) or content[0] in "\t#" or ":" not in content:
        return None
    depth = len(lines[number]) - len(content)
    above = [(place, line) for place, line in enumerate(lines[:number], 1) if line.strip() and line.strip()[0] != "#"]
    depths = [(place, len(line) - len(line.lstrip(" "))) for place, line in above]
    if not above:
        return None
    place, last = depths[-1]
    has_value = re.fullmatch(r"[^:#]+:\s+[^\s#|>].*", above[-1][1].strip()) is not None
    if depth > last and has_value:
        empty = re.fullmatch(r"([a-z_]+):\s*(#.*)?", above[-2][1]) if last == 0 and len(above) > 1 else None
        if empty is not None:
            what = f"line {place} is not indented, but line {number + 1} after it is"
            return place, what, f"indent it under `{empty[1]}:`, like line {number + 1}"
        what = f"line {number + 1} is indented deeper than line {place}, which has a value already"
        return number + 1, what, "align keys of one section"
    if depth < last and depth not in (one for _, one in depths):
        what = f"line {number + 1} is indented less than line {place}, and not as any line above it"
        return number + 1, what, "align keys of one section"
    return None


def override(document: Document, assignments: Sequence[str]) -> None:
    """Apply each `section.key=value`. Values are parsed as in a file; an empty value removes the key.

    Raises:
        ConfigError: There is no `=`, a key is empty, or a key is below something that is not a mapping.
    """
    for assignment in assignments:
        _assign(document, assignment)


def _assign(document: Document, assignment: str) -> None:
    def refuse(what: str, key: str = "") -> ConfigError:
        return ConfigError(Problem(Code.CONFIG_SYNTAX, what, OVERRIDES, key))

    name, equals, text = assignment.partition("=")
    name = name.strip()
    path = tuple(name.split("."))
    if not equals or not all(path):
        raise refuse(f"`{assignment}` is not of the form section.key=value")
    try:
        parsed = parse(f"value: {text}", OVERRIDES).values
    except ConfigError as error:
        keys = [problem.key.replace("value", name, 1) or name for problem in error.problems]
        problems = zip(error.problems, keys, strict=True)
        raise ConfigError([replace(problem, where=OVERRIDES, key=key) for problem, key in problems]) from None
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
    """Composes nodes without aliases and tags, to a bounded depth: nine lines of aliases could expand to a billion
    nodes."""

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
    """Converts a node graph to values, and collects lines and problems."""

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
    """The number in a text by the rules of a config, in ASCII digits; None for other text. Also used for options."""
    return float(text) if _FLOAT.fullmatch(text.strip()) else None


def first_problems(problems: Sequence[Problem], total: int | None = None) -> list[Problem]:
    """The first of `total` problems, and the number of the others: an invalid file may have tens of thousands."""
    more = (len(problems) if total is None else total) - MAX_PROBLEMS
    rest = [Problem(Code.MORE_PROBLEMS, f"and {more:,} more problems")] if more > 0 else []
    return [*problems[:MAX_PROBLEMS], *rest]


def reads_as_text(text: str) -> bool:
    """Whether the text without quotes is read as the same text."""
    patterns = (_AMBIGUOUS, _INT, _FLOAT, _SPECIAL_FLOAT)
    return text.lower() not in _CONSTANTS and not any(pattern.fullmatch(text) for pattern in patterns)


def kind_of(value: object) -> str:
    """A value described for the user: `text 'eight'`, `a number 8.5`, `a list`."""
    kinds = {
        dict: "a section", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number",
        NoneType: "nothing",
    }  # fmt: skip
    shown = f" {value!r}" if type(value) in (str, bool, int, float) else ""
    return kinds.get(type(value), f"an object of type {type(value).__name__}") + shown


# Writing

_WIDTH = 110
"""The maximum characters of a line with its comment; longer comments are above the key. Values are never wrapped."""


class _Dumper(yaml.SafeDumper):
    """Quotes all text that this module would not read as text."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = text.isprintable() and reads_as_text(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, None if plain else '"')


_Dumper.add_representer(str, _text)


def dump_values(values: Mapping[str, Any]) -> str:
    """A config of plain values as YAML text."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _in_a_line(value: Any) -> str:
    """A value as YAML on one line, even if it contains line breaks."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=sys.maxsize, default_flow_style=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


@dataclass
class Draft:
    """A config that is being built.

    Attributes:
        document: The values set so far, and where they were set.
        reasons: `section.key` → the reason for its value.
        proposals: `section.key` → a value that is written as a comment.
    """

    document: Document
    reasons: dict[str, str] = field(default_factory=dict)
    proposals: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        """The values set so far, by section and key."""
        return self.document.values

    def has(self, key: str) -> bool:
        """Whether `section.key`, or a key outside the sections, is set."""
        section, _, name = key.rpartition(".")
        return name in (self.values.get(section, {}) if section else self.values)

    def choose(self, key: str, value: Any, reason: str) -> None:
        """Set `section.key`, or a key outside the sections, unless it is already set."""
        if self.has(key):
            return
        section, _, name = key.rpartition(".")
        (self.values.setdefault(section, {}) if section else self.values)[name] = value
        self.reasons[key] = reason

    def propose(self, key: str, value: Any, reason: str) -> None:
        """Write `section.key` as a comment, to be uncommented, unless it is set."""
        if not self.has(key):
            self.proposals[key], self.reasons[key] = value, reason

    def text(self, title: str) -> str:
        """The config as YAML, in the order of the schema, each value with its reason. title: a comment at the top."""
        return "\n".join([*_comment(title, ""), "", *self._lines()]) + "\n"

    def _lines(self) -> Iterator[str]:
        for name, information in RunConfig.model_fields.items():
            value = self.values.get(name)
            if isinstance(value, dict):
                section: Any = information.annotation
                yield f"{name}:"
                for key in section.model_fields:
                    full = f"{name}.{key}"
                    if key in value:
                        yield from _line(f"  {key}: {_in_a_line(value[key])}", self.reasons.get(full, ""))
                    elif full in self.proposals:
                        yield from _line(f"  # {key}: {_in_a_line(self.proposals[full])}", self.reasons[full])
                yield ""
            elif name in self.values:
                yield from _line(f"{name}: {_in_a_line(value)}", self.reasons.get(name, ""))


def _line(text: str, reason: str) -> Iterator[str]:
    """A line with its reason as a comment after it, or above it if the line would be too long."""
    if not reason:
        yield text
    elif len(text) + len(reason) + 4 <= _WIDTH:
        yield f"{text}  # {_printable(reason)}"
    else:
        yield from _comment(reason, text[: len(text) - len(text.lstrip())])
        yield text


def _comment(text: str, indent: str) -> list[str]:
    prefix = f"{indent}# "
    return textwrap.wrap(
        _printable(text), _WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False
    )


def _printable(text: str) -> str:
    """The text with characters escaped that YAML does not allow in comments, such as line breaks in file names."""
    return "".join(letter if letter.isprintable() else f"\\u{ord(letter):04x}" for letter in one_line(text))
