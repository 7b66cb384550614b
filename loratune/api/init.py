"""The public function `loratune.init`: chooses a config for rows and a model."""

from os import fspath
from pathlib import Path

from loratune.api import Overrides, StrPath, assignments, computing, libraries
from loratune.config import RunConfig
from loratune.config.arguments import checked
from loratune.events import FinishedEvent, Listener, emit, listening
from loratune.system import output_file


@checked
def init(
    rows: StrPath,
    *,
    model: StrPath,
    output: StrPath | None = None,
    overrides: Overrides = (),
    on_event: Listener | None = None,
) -> RunConfig:
    """Choose a config for rows and a model. No weights are loaded or downloaded.

    Args:
        rows: The path of the rows, or a hub id.
        model: The directory of the model, or a hub id.
        output: A new file to write the config to, with the reason for each choice.
        overrides: Dotted key → value, for keys with a fixed value.
        on_event: Receives events; the last one has the config as text, and estimates for its run.

    Raises:
        ConfigError, ModelError, DataError: A value, the model or the rows cannot be used.
    """
    with listening(on_event):
        file = output_file.output(Path(output), "output", overwrite=None) if output is not None else None
        with libraries():
            from loratune.training import init_start

        draft, run = init_start.start(fspath(rows), fspath(model), assignments(overrides), file)
        with computing():
            with libraries():
                from loratune.training import init as choices

            started = choices.init(run, draft)
        if file is not None:
            with file.opened() as writable:
                writable.write(started.text)
        emit(FinishedEvent(started))
        return started.run
