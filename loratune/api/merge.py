"""The verb `merge` of an adapter."""

from typing import TYPE_CHECKING

import loratune
from loratune.api import MergedDtype, Rows, StrPath, computing, libraries
from loratune.api.rows import read_held_out
from loratune.config.arguments import checked
from loratune.events import Listener, listening

if TYPE_CHECKING:
    from loratune.export.merge import Merged


@checked
def merge(
    adapter: "loratune.Adapter",
    output: StrPath,
    *,
    dtype: MergedDtype | None = None,
    rows: Rows | None = None,
    overwrite: bool = False,
    on_event: Listener | None = None,
) -> "Merged":
    """Write base and adapter as one model, read it back, and compare it with both.

    Args:
        output: The directory of the model.
        dtype: The dtype of the model; by default that of the base.
        rows: Rows to compare on; by default prompts recorded in training.
        overwrite: Replace an earlier export at `output`.
        on_event: Receives events.

    Raises:
        AdapterError: The adapter cannot be merged, or the merged model is not closer to it than to its base.
        ConfigError, ModelError, DataError, ResourceError, LockedError: Output, base or rows cannot be used.
    """
    with listening(on_event):
        directory = adapter.opened.output_directory(output, rows, overwrite=overwrite)
        split = read_held_out(rows, adapter.directory.data) if rows is not None else None
        with libraries():
            from loratune.export import merge as merging

        with computing():
            return merging.merge(adapter.directory, directory, split, dtype=dtype)
