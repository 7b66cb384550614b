"""What can be known before torch is imported: is the output free, are the rows sound, is the adapter readable."""

import json
from dataclasses import dataclass
from pathlib import Path

from loratune import config, data, places, saved
from loratune.config import DataSection, ModelSection, RunConfig, Source
from loratune.data import Rows, Watch
from loratune.errors import AdapterError, ConfigError, Problem
from loratune.places import quantized
from loratune.saved import Saved
from loratune.workspace import Workspace


@dataclass(frozen=True)
class Ready:
    """A run that may begin."""

    config: RunConfig
    space: Workspace
    rows: Rows


@dataclass(frozen=True)
class Opened:
    """An adapter directory and what it says of its training.

    base: how the base was held; data: how rows were read; run: the recorded config, None if loratune did not write it.
    """

    saved: Saved
    base: ModelSection
    data: DataSection
    run: RunConfig | None


def check(run: RunConfig, space: Workspace, watch: Watch) -> Ready:
    """Look for the model, and read and check the rows, of a run whose output directory is free; nothing is written.

    Raises ConfigError: see `quantized.check_bitsandbytes`. Raises ModelError: see `places.is_directory`,
    `quantized.check_directory`. Raises DataError: see `data.check`.
    """
    base = run.model
    quantized.check_bitsandbytes(base.quantization)
    if places.is_directory(base.name_or_path, base.revision, base.gguf_file, trusted=base.trust_remote_code):
        quantized.check_directory(Path(places.local_or_hub(base.name_or_path)), base.name_or_path, base.quantization)
    return Ready(run, space, data.check(run.data, run.training.seed, watch))


def open_adapter(directory: Path) -> Opened:
    """Open an adapter directory. What its run.yaml says of code to trust is not believed.

    Raises AdapterError: see `saved.inspect`; a run.yaml that is not valid.
    """
    found = saved.inspect(directory)
    base = ModelSection(name_or_path=found.base, revision=found.config.get("revision"))
    if not (directory / "run.yaml").is_file():
        recorded = base.model_copy(update={"gguf_file": _recorded_gguf(directory / "loratune.json")})
        return Opened(found, recorded, DataSection(train=Source(path="unknown")), None)
    try:
        run = config.load(directory / "run.yaml")
    except ConfigError as error:
        raise AdapterError(error.problems) from None
    held = run.model.model_dump(include={"gguf_file", "dtype", "quantization", "attn_implementation"})
    return Opened(found, base.model_copy(update=held), run.data, run)


def _recorded_gguf(record: Path) -> str | None:
    """Which GGUF file the provenance of an adapter names within its base; None without a record, or a GGUF file."""
    if not record.is_file():
        return None
    try:
        file = json.loads(record.read_text(encoding="utf-8"))["base"].get("gguf_file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise AdapterError(Problem("does not say what the base is", str(record), "base")) from None
    if file is not None and not isinstance(file, str):
        raise AdapterError(Problem(f"not the name of a file: {file!r}", str(record), "base.gguf_file"))
    return file
