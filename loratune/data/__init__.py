"""Rows in, `input_ids` and `labels` out: read → recognise → render → fit to length → report."""

import hashlib
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset

from loratune.config import DataSection, Source
from loratune.data import formats, sources
from loratune.data.formats import Example, Plain
from loratune.data.render import Renderer, Tokens, shorten
from loratune.errors import DataError, Problem

__all__ = ["Examples", "Prepared", "Report", "parse_file", "prepare", "read"]


@dataclass(frozen=True)
class Examples:
    """The rows of a run, checked one by one. format: the name of the one that was recognised for train."""

    train: list[Example]
    validation: list[Example]
    format: str


@dataclass
class Report:
    """What became of the rows. dropped: reason → the places of the rows."""

    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    longest: int = 0
    dropped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def losses(self) -> list[str]:
        """A line for each way in which rows were cut or left out, with the first three places."""
        cut = [f"{self.truncated:,} rows cut to max_length"] if self.truncated else []
        return cut + [f"{count:,} rows dropped: {reason}" for count, reason in self.reasons()]

    def reasons(self) -> list[tuple[int, str]]:
        """How many rows were dropped for each reason, and the reason with the first three places."""
        return [(len(places), f"{reason} ({', '.join(places[:3])})") for reason, places in self.dropped.items()]

    @property
    def dropped_rows(self) -> int:
        """How many rows were left out."""
        return sum(map(len, self.dropped.values()))


@dataclass(frozen=True)
class Prepared:
    """What the trainer learns from. dataset: `input_ids` and `labels`; rows: the same with their learnt spans."""

    dataset: Dataset
    rows: list[Tokens]
    report: Report

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every id and label in order."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(np.array([len(row.ids), *row.ids, *row.labels], dtype="<i8").tobytes())
        return digest.hexdigest()


def read(section: DataSection, seed: int) -> Examples:
    """Read and check all rows. No tokenizer is needed, and torch is not imported.

    Raises DataError: see `sources.read`, `formats.recognise`, `formats.parse`; a fraction that leaves no row.
    """
    train, form = parse_file(section.train, section)
    if section.validation is None:
        return Examples(train, [], form)
    if isinstance(section.validation, Source):
        return Examples(train, parse_file(section.validation, section)[0], form)
    held_out = max(1, round(len(train) * section.validation))
    if held_out >= len(train):
        what = f"a fraction of {section.validation} of {len(train)} rows leaves none to train on"
        raise DataError(Problem(what, key="data.validation"))
    chosen = set(random.Random(seed).sample(range(len(train)), held_out))
    kept = [example for number, example in enumerate(train) if number not in chosen]
    return Examples(kept, [train[number] for number in sorted(chosen)], form)


def parse_file(source: Source, section: DataSection) -> tuple[list[Example], str]:
    """All rows of one source as examples, and the name of their format."""
    rows = sources.read(source)
    form = formats.recognise(rows, section)
    if unused := sorted(set(section.columns) - set(form.keys)):
        what = f"`{unused[0]}` is not read from rows of the format {form.name}, which has {', '.join(form.keys)}"
        raise DataError(Problem(what, rows[0].where, "data.columns", "leave it out"))
    if section.chat_template and form.name != "messages":
        what = f"the rows are {form.name}, and only messages go through a chat template"
        raise DataError(Problem(what, rows[0].where, "data.chat_template", "leave it out"))
    return formats.parse(rows, form, section), form.name


def prepare(examples: Sequence[Example], renderer: Renderer, section: DataSection) -> Prepared:
    """Render every row, fit it to `max_length`, and count.

    Raises DataError: a row over `max_length` where `truncation` is error; no row with anything to learn.
    """
    report, rows = Report(rows=len(examples)), []
    for example in examples:
        if _silent(example):
            report.dropped["nothing to learn: the completion is empty"].append(example.where)
            continue
        whole = renderer.row(example, learn_all=section.loss_on == "all")
        report.longest = max(report.longest, len(whole.ids))
        row = _fit(whole, renderer, section)
        if row is None or not row.supervised:
            report.dropped[f"the answer does not fit in max_length {section.max_length}"].append(example.where)
            continue
        report.truncated += len(row.ids) < len(whole.ids)
        report.tokens += len(row.ids)
        report.supervised += row.supervised
        rows.append(row)
    if not rows:
        reasons = "; ".join(f"{len(places)} rows: {reason}" for reason, places in report.dropped.items())
        fix = f"data.max_length: {report.longest} would keep all" if report.longest > section.max_length else ""
        raise DataError(Problem(f"no row has anything to learn ({reasons})", examples[0].where, fix=fix))
    return Prepared(_dataset(rows), rows, report)


def _silent(example: Example) -> bool:
    if isinstance(example, Plain):
        return not example.completion
    answers = [message for message in example.messages[example.first_learnt :] if message["role"] == "assistant"]
    return not any(message["content"].strip() for message in answers)


def _fit(row: Tokens, renderer: Renderer, section: DataSection) -> Tokens | None:
    if len(row.ids) <= section.max_length:
        return row
    if section.truncation == "error":
        what = f"the row has {len(row.ids)} tokens, more than data.max_length {section.max_length}"
        raise DataError(Problem(what, row.where, fix="raise it, or set data.truncation to keep_completion or drop"))
    if section.truncation == "drop":
        return None
    return shorten(row, section.max_length, renderer.tokenizer.bos_token_id)


def _dataset(rows: Sequence[Tokens]) -> Any:
    return Dataset.from_dict({"input_ids": [row.ids for row in rows], "labels": [row.labels for row in rows]})
