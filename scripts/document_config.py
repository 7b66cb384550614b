"""Write every key of a run's configuration, with its type, default and meaning, into configs/README.md.

    python scripts/document_config.py

The tables come from the pydantic schema and stand between two markers; everything else in the file stays as it is.
`tests/test_packaging.py` fails where they are not current.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from loratune.config import RunConfig

README = Path(__file__).parent.parent / "configs" / "README.md"
BEGIN, END = "<!-- keys: written by scripts/document_config.py -->\n", "<!-- /keys -->\n"
TECHNICAL_LIMIT = 1e6  # upper bounds from here on only keep numbers within what torch can count
BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
Schema = dict[str, Any]


def document(text: str, config: type[BaseModel] = RunConfig) -> str:
    """Put the tables of a configuration between the markers of a text.

    Args:
        text: Markdown that holds both markers, each once.
        config: The model of the whole run, whose fields are sections or single keys.

    Raises:
        ValueError: A marker is missing or occurs twice.
    """
    return between(text, BEGIN, tables(config), END)


def between(text: str, begin: str, content: str, end: str) -> str:
    """Put content between two markers of a text. Raises ValueError: a marker is missing or occurs twice."""
    if (text.count(begin), text.count(end)) != (1, 1):
        raise ValueError(f"{begin.strip()} and {end.strip()} must each stand in the text once")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def tables(config: type[BaseModel]) -> str:
    """One Markdown table for each section of the run, one for its single keys, and one for each other structure."""
    schema = config.model_json_schema()
    definitions: dict[str, Schema] = schema["$defs"]
    top = dict(schema["properties"])
    sections = {name: top.pop(name) for name in list(top) if "$ref" in top[name]}
    parts = []
    for name, reference in sections.items():
        section = definitions.pop(reference["$ref"].rsplit("/", 1)[1])
        parts.append(table(f"`{name}`", section, f"{name}."))
    parts += [table(f"`{name}`: a mapping with these keys", section) for name, section in definitions.items()]
    parts.append(table("Keys outside the sections", {"properties": top, "required": schema.get("required", [])}))
    return "\n".join(parts)


def table(title: str, section: Schema, prefix: str = "") -> str:
    """A heading, the description of a section, and a row for each of its keys."""
    required = section.get("required", [])
    lines = [f"### {title}", ""]
    if "description" in section:
        lines += [" ".join(section["description"].split()), ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, key in section["properties"].items():
        default = "required" if name in required else f"`{yaml_flow(key['default'])}`"
        cells = (f"`{prefix}{name}`", kind(key), default, key.get("description", ""))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def kind(key: Schema) -> str:
    """The type of a key in words, e.g. "integer ≥ 1 or null"; the values of a choice stand in code, with commas."""
    if "anyOf" in key:
        return " or ".join(dict.fromkeys(kind(choice) for choice in key["anyOf"]))
    if "$ref" in key:
        return f"`{key['$ref'].rsplit('/', 1)[1]}`"
    if "enum" in key or "const" in key:
        return ", ".join(f"`{value}`" for value in key.get("enum", [key.get("const")]))
    if key["type"] == "array":
        return f"list of {kind(key['items'])}"
    if key["type"] == "object":
        return f"mapping of text to {kind(key['additionalProperties'])}"
    name = {"string": "text"}.get(key["type"], key["type"])
    limits = [
        f"{sign} {key[bound]:g}" for bound, sign in BOUNDS.items() if abs(key.get(bound, 1e300)) < TECHNICAL_LIMIT
    ]
    return f"{name} {', '.join(limits)}".strip()


def yaml_flow(value: Any) -> str:
    """A default as one would write it in YAML."""
    if isinstance(value, list):
        return f"[{', '.join(yaml_flow(item) for item in value)}]"
    return value if isinstance(value, str) else json.dumps(value)


def main() -> None:
    """Bring configs/README.md up to date."""
    text = README.read_text(encoding="utf-8")
    README.write_text(document(text), encoding="utf-8")


if __name__ == "__main__":
    main()
