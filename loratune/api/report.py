"""The verb `report` of an adapter."""

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path

import loratune
from loratune.api import Rows, StrPath, computing, libraries
from loratune.api.evaluate import BUILTIN, check_used
from loratune.config.arguments import checked
from loratune.events import Listener, listening
from loratune.system import output_file


@checked
def report(
    adapter: "loratune.Adapter",
    output: StrPath,
    *,
    rows: Rows | None = None,
    against: "loratune.Adapter | StrPath | None" = None,
    scales: Sequence[float] = (),
    overwrite: bool = False,
    on_event: Listener | None = None,
) -> Path:
    """Write a self-contained HTML page on the adapter, its run and its sweep.

    Args:
        output: The HTML file.
        rows: Held-out rows to score; without them, the base is not loaded.
        against: Another adapter, shown next to it.
        scales: With rows: scales of the adapter whose losses and forgetting are shown as curves.
        overwrite: Replace an existing file.
        on_event: Receives events.

    Returns:
        The file.

    Raises:
        ConfigError, AdapterError, ModelError, DataError: The file, an adapter, the base or the rows cannot be used.
    """
    with listening(on_event):
        check_used({"scales": "rows"} if rows is None and len(scales) else {})
        other = against if against is None or isinstance(against, loratune.Adapter) else loratune.Adapter(against)
        subjects = [one for one in (adapter, other) if one is not None]
        inputs = [path for one in subjects for path in one.opened.inputs()]
        inputs += [Path(rows)] if isinstance(rows, str | PathLike) else []
        file = output_file.output(Path(output), "output", overwrite=overwrite, inputs=inputs, begins=output_file.HTML)
        with libraries():
            from loratune.report import adapter as pages

        comparison = adapter.evaluate(rows, against=other, whole_answers=True) if rows is not None else None
        by_scale = adapter.evaluate_scales(rows, scales, forgetting=BUILTIN) if rows is not None and scales else None
        shown = [(one.directory, one.notes) for one in subjects]
        name = fspath(rows) if isinstance(rows, str | PathLike) else None
        with computing(), file.opened() as writable:
            writable.write(pages.report(shown, comparison, name, by_scale))
        return file.path
