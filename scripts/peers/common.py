"""What a contestant is told, and what it answers.

A contestant is run as `python -P -m peers.NAME JOB`, by the interpreter of its own virtual environment and with
PYTHONPATH=scripts (without -P, a file of this folder would stand before the package that it is named after). JOB is a
JSON file, see `Job`. It writes an adapter that PEFT reads to `Job.adapter`, and `Answer` to `Job.answer`.
"""

import json
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypedDict

IGNORED = -100
"""The label of a token that is not supervised."""


class Row(TypedDict):
    """One tokenised row. labels: as many as input_ids."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Job:
    """One run. model, converted, train, held_out, adapter, answer: paths; train and held_out hold rows as JSON lines.

    converted: the model as the contestant's own converter made it, for those that have one (`contestants`).
    max_length: tokens that no row exceeds; pack_length: tokens of a pack, packs: how many of them make an update;
    padded_batch, accumulate: rows of a micro-step and micro-steps of an update, where rows are padded instead.
    quantization: none, 8bit or 4bit, of the base.
    """

    model: str
    converted: str
    train: str
    held_out: str
    adapter: str
    answer: str
    device: str
    seed: int
    max_length: int
    pack_length: int
    packs: int
    padded_batch: int
    accumulate: int
    learning_rate: float = 2e-4
    r: int = 8
    lora_alpha: int = 16
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    quantization: str = "none"

    @property
    def rows(self) -> list[Row]:
        """The rows to learn from."""
        return read(Path(self.train))


@dataclass(frozen=True)
class Answer:
    """What a run took. seconds: of the training loop; first_step: when the first update was made, as time.time();
    updates: how many there were; gpu_bytes: the most that torch had allocated, 0 without a GPU; supervised: the
    tokens with a label, None where it is not known; rest: seconds of the updates after the first; steps: seconds from
    the end of each update to that of the next, on the device; losses: of each update, where each was logged."""

    seconds: float
    first_step: float
    updates: int
    gpu_bytes: int = 0
    supervised: int | None = None
    rest: float = 0.0
    steps: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class Clock:
    """Takes the times of an `Answer`."""

    def __init__(self) -> None:
        self.begun = self.first = self.ended = 0.0
        self.updates = 0
        self.supervised: int | None = None

    def begin(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """Before the first update. rows: what will be trained on, as the contestant made it."""
        with suppress(KeyError, TypeError):
            self.supervised = sum(int(label) != IGNORED for row in rows for label in row["labels"]) or None
        self.begun = time.time()

    def step(self) -> None:
        """After an update."""
        self.updates += 1
        self.first = self.first or time.time()

    def end(self) -> None:
        """After the last update."""
        self.ended = time.time()

    def answer(self, gpu_bytes: int = 0) -> Answer:
        """What was measured."""
        return Answer(
            self.ended - self.begun, self.first, self.updates, gpu_bytes, self.supervised, self.ended - self.first
        )


def read(path: Path) -> list[Row]:
    """Rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def job() -> Job:
    """The job that this process was started for."""
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return Job(**given | {"target_modules": tuple(given["target_modules"])})


class Replying(Protocol):
    """What says where the answer goes."""

    @property
    def answer(self) -> str:
        """The path."""


def reply(task: Replying, answer: Answer) -> None:
    """Hand in what was measured."""
    Path(task.answer).write_text(json.dumps(asdict(answer)), encoding="utf-8")
