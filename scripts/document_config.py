"""Write every key of a run's configuration, with its type, default and meaning, into configs/README.md.

    python scripts/document_config.py

The tables come from the pydantic schema and stand between two markers; everything else in the file stays as it is.
`tests/test_packaging.py` fails where they are not current.
"""

from pathlib import Path

from pydantic import BaseModel

from loratune.config import RunConfig
from loratune.config.keys import KeyGroup, groups, kind

README = Path(__file__).parent.parent / "configs" / "README.md"
BEGIN, END = "<!-- keys: written by scripts/document_config.py -->\n", "<!-- /keys -->\n"


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
    return "\n".join(table(group) for group in groups(config))


def table(group: KeyGroup) -> str:
    """A heading, the description of a section, and a row for each of its keys."""
    structure = f"`{group.name}`: a mapping with these keys" if group.name else "Keys outside the sections"
    lines = [f"### {f'`{group.name}`' if group.is_section else structure}", ""]
    if group.description:
        lines += [group.description, ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in group.keys:
        default = key.default if key.required else f"`{key.default}`"
        name = key.label if group.is_section else key.name
        cells = (f"`{name}`", kind(key.schema, "`"), default, key.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Bring configs/README.md up to date."""
    text = README.read_text(encoding="utf-8")
    README.write_text(document(text), encoding="utf-8")


if __name__ == "__main__":
    main()
