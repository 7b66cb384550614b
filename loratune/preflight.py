"""What can be known before torch is imported: is the output free, are the rows sound, is the adapter readable."""

from dataclasses import dataclass
from pathlib import Path

from loratune import config, data, places, saved
from loratune.config import DataSection, ModelSection, RunConfig, Source
from loratune.data import Examples
from loratune.errors import AdapterError, ConfigError
from loratune.saved import Saved
from loratune.workspace import Workspace


@dataclass(frozen=True)
class Ready:
    """A run that may begin."""

    config: RunConfig
    space: Workspace
    examples: Examples


@dataclass(frozen=True)
class Opened:
    """An adapter directory and what it says of its training.

    base: how the base was held; data: how rows were read; run: the recorded config, None if loratune did not write it.
    """

    saved: Saved
    base: ModelSection
    data: DataSection
    run: RunConfig | None


def check(run: RunConfig, space: Workspace) -> Ready:
    """Look for the model, and read and check the rows, of a run whose output directory is free; nothing is written.

    Raises ModelError: see `places.is_directory`. Raises DataError: see `data.read`.
    """
    places.is_directory(run.model.name_or_path, run.model.revision, trusted=run.model.trust_remote_code)
    return Ready(run, space, data.read(run.data, run.training.seed))


def open_adapter(directory: Path) -> Opened:
    """Open an adapter directory. What its run.yaml says of code to trust is not believed.

    Raises AdapterError: see `saved.inspect`; a run.yaml that is not valid.
    """
    found = saved.inspect(directory)
    base = ModelSection(name_or_path=found.base, revision=found.config.get("revision"))
    if not (directory / "run.yaml").is_file():
        return Opened(found, base, DataSection(train=Source(path="unknown")), None)
    try:
        run = config.load(directory / "run.yaml")
    except ConfigError as error:
        raise AdapterError(error.problems) from None
    held = run.model.model_dump(include={"dtype", "quantization", "attn_implementation"})
    return Opened(found, base.model_copy(update=held), run.data, run)
