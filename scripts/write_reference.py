"""Write the reference pages: configs/keys.md, every key of a config, and loratune/codes.md, every error code.

    python scripts/write_reference.py

They come from the pydantic schema and from `loratune.codes.Code`; `tests/test_packaging.py` fails where they are not
current.
"""

from pathlib import Path

from pydantic import BaseModel

from loratune.codes import Code
from loratune.config import RunConfig
from loratune.config.keys import KeyGroup, groups, kind

ROOT = Path(__file__).parent.parent
KEYS = """# Every key of a config

Written by `python scripts/write_reference.py`; [README.md](README.md) explains what they are for, and `loratune explain
KEY` says the same in the terminal. The keys of upstream objects have upstream's names and meanings: `lora` those of
`peft.LoraConfig`, `training` those of `transformers.TrainingArguments`. Upper limits that no run reaches are left out.

"""
CODES = """# Error codes

Written by `python scripts/write_reference.py`. Every problem has a stable code beside its text; the exit code says
which family it belongs to ([table](../README.md#when-something-stops-a-run)). Programs should look at codes, not at
wording.

"""


def keys_page(config: type[BaseModel] = RunConfig) -> str:
    """The page of keys: a table for each section of the run, one for its single keys, and one for each other structure.

    Args:
        config: The model of the whole run, whose fields are sections or single keys.
    """
    return KEYS + "\n".join(table(group) for group in groups(config))


def codes_page() -> str:
    """The page of error codes."""
    rows = [f"| `{code}` | {code.meaning} |" for code in sorted(Code)]
    return CODES + "\n".join(["| code | reported when |", "|---|---|", *rows]) + "\n"


def table(group: KeyGroup) -> str:
    """A heading, the description of a section, and a row for each of its keys."""
    structure = f"`{group.name}`: a mapping with these keys" if group.name else "Keys outside the sections"
    lines = [f"## {f'`{group.name}`' if group.is_section else structure}", ""]
    if group.description:
        lines += [group.description, ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in group.keys:
        default = key.default if key.required else f"`{key.default}`"
        name = key.label if group.is_section else key.name
        cells = (f"`{name}`", kind(key.schema, "`"), default, key.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


PAGES = {ROOT / "configs" / "keys.md": keys_page, ROOT / "loratune" / "codes.md": codes_page}


def main() -> None:
    """Write both pages."""
    for path, page in PAGES.items():
        path.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
