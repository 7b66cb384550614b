"""The public class `Adapters`: several adapters of one base, loaded together, or their weighted sum."""

from collections.abc import Mapping, Sequence
from os import fspath
from pathlib import Path

from loratune.adapter.options import parse_selection
from loratune.api import Overrides, StrPath
from loratune.api import export as exporting
from loratune.api import generate as writing
from loratune.api.opened import OpenedAdapters
from loratune.config.arguments import checked


class Adapters:
    """Several adapters of one base, which are loaded together; or their weighted sum.

    They are opened and verified on first use.

    Attributes:
        opened: Their content, for the verbs.
    """

    @checked
    def __init__(
        self,
        adapters: Mapping[str, StrPath] | Sequence[str],
        *,
        use: str | None = None,
        mix: Mapping[str, float] | str | None = None,
        scale: float = 1.0,
        force: bool = False,
        overrides: Overrides = (),
    ):
        """Name the adapters.

        Args:
            adapters: Name → directory; or texts: `NAME=DIR`, or a single `DIR`.
            use: The name of the adapter for prompts that name none; by default the first.
            mix: Name → weight; the weighted sum of these adapters is used instead of single ones. As a string:
                `sql:0.7,tone:0.3`.
            scale: A number from 0 to 2 that their updates are multiplied by: 0 gives the base.
            force: Accept edited files and another base.
            overrides: Overrides of their data settings, such as the arguments of the chat template.

        Raises:
            ConfigError: A name is not valid, unknown or repeated; a weight is not a finite number; the scale is out of
                range.
        """
        if isinstance(mix, Mapping):
            mix = ",".join(f"{name}:{weight}" for name, weight in mix.items())
        if isinstance(adapters, Mapping):
            adapters = [f"{name}={fspath(path)}" for name, path in adapters.items()]
        selection = parse_selection(adapters, use, mix)
        self.opened = OpenedAdapters(selection, scale=scale, force=force, overrides=overrides)

    answers = writing.answers
    chat = writing.chat
    export = exporting.export

    @property
    def paths(self) -> Mapping[str, Path]:
        """Name → directory."""
        return self.opened.selection.directories

    @property
    def scale(self) -> float:
        """What their updates are multiplied by."""
        return self.opened.scale
