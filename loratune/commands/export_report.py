"""What the commands print that make something of an adapter for other programs."""

from typing import TYPE_CHECKING

from loratune.console import print_block, print_json

if TYPE_CHECKING:
    from loratune.commands.export_order import Exported


def print_exported(exported: "Exported", as_json: bool) -> None:
    """What was written and compared, and what to type."""
    if as_json:
        print_json(exported.as_json())
        return
    lines = [("written", str(exported.directory)), *exported.lines]
    print_block(f"exported for {exported.client}", [*lines, *(("type", command) for command in exported.commands)])
