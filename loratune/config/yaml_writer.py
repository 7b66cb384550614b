"""Writes plain values as YAML text that our reader reads back as the same values, with or without comments."""

import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from loratune import escaping
from loratune.config import yaml_reader
from loratune.config.schema import RunConfig
from loratune.config.yaml_reader import Document

_WIDTH = 110
"""Characters of a line with its comment; a longer comment is above its key. Values are never broken."""


class _Dumper(yaml.SafeDumper):
    """Quotes all text that our reader would not read as text."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = text.isprintable() and yaml_reader.reads_as_text(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, None if plain else '"')


_Dumper.add_representer(str, _text)


def dump_values(values: Mapping[str, Any]) -> str:
    """A config of plain values as YAML text."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _in_a_line(value: Any) -> str:
    """A value as YAML in one line, whatever is in it."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=sys.maxsize, default_flow_style=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


@dataclass
class Draft:
    """A config in the making.

    Attributes:
        document: What is set, and where.
        reasons: `section.key` → why it has its value.
    """

    document: Document
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        """What is set, by section and key."""
        return self.document.values

    def has(self, key: str) -> bool:
        """Whether `section.key`, or a key outside the sections, is set."""
        section, _, name = key.rpartition(".")
        return name in (self.values.get(section, {}) if section else self.values)

    def choose(self, key: str, value: Any, reason: str) -> None:
        """Set `section.key`, or a key outside the sections, unless it is set already."""
        if self.has(key):
            return
        section, _, name = key.rpartition(".")
        (self.values.setdefault(section, {}) if section else self.values)[name] = value
        self.reasons[key] = reason

    def text(self, title: str) -> str:
        """The config as YAML, in the order of the schema, each value with its reason; `title` is a comment on top."""
        return "\n".join([*_comment(title, ""), "", *self._lines()]) + "\n"

    def _lines(self) -> Iterator[str]:
        for name, information in RunConfig.model_fields.items():
            value = self.values.get(name)
            if isinstance(value, dict):
                section: Any = information.annotation
                yield f"{name}:"
                for key in sorted(value, key=[*section.model_fields].index):
                    yield from _line(f"  {key}: {_in_a_line(value[key])}", self.reasons.get(f"{name}.{key}", ""))
                yield ""
            elif name in self.values:
                yield from _line(f"{name}: {_in_a_line(value)}", self.reasons.get(name, ""))


def _line(text: str, reason: str) -> Iterator[str]:
    """A line with its reason behind it, or above it where there is no room."""
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
    """The text without what YAML allows in no comment, such as line breaks in the names of files."""
    return "".join(letter if letter.isprintable() else f"\\u{ord(letter):04x}" for letter in escaping.line(text))
