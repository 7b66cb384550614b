"""Scores the labels of a classifier: how probable each is as the answer to a prompt, so that it always gives one.

The log-probability of a label is that of all its tokens and of the end after them, given the prompt. All labels of all
prompts are rows of one pass of the engine, which computes what they have in common once where the model allows it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from loratune.codes import Code
from loratune.compare.engine import Engine
from loratune.compare.metrics import Values
from loratune.compare.verdict import label_of
from loratune.data.formats import IGNORED
from loratune.data.holding_out import MAX_LABELS
from loratune.errors import AdapterError, Problem
from loratune.lora.adapter_files import RECORD_FILE, AdapterFiles

Ids = Sequence[int]
KEY = "labels"
"""The entry of the record of an adapter."""
_AT_ONCE = 4096
"""The most rows of a pass, so that the ids of many prompts with many labels are never all in memory."""


@dataclass(frozen=True)
class Labels:
    """The labels of a classifier.

    Attributes:
        texts: Each label as the rows have it, the most frequent first.
        ids: The ids of each label as an answer, with the end.
    """

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, answers: Iterable[tuple[str, Ids]]) -> Self | None:
        """The labels of rows, if their answers are labels by the rule of `label_of`; no more answers are read than show
        that they are not. answers: text and ids of each."""
        counts, written = Counter[str](), Counter[tuple[str, tuple[int, ...]]]()
        for text, ids in answers:
            counts[text] += 1
            written[text, tuple(ids)] += 1
            if len(counts) > MAX_LABELS:
                return None
        if len(counts) < 2 or label_of(counts) is None:
            return None
        texts = tuple(text for text, _ in counts.most_common())
        most = {text: own for (text, own), _ in reversed(written.most_common())}
        return cls(texts, tuple(most[text] for text in texts))

    @classmethod
    def of_adapter(cls, adapter: AdapterFiles, vocabulary: int) -> Self | None:
        """The labels that an adapter has recorded; None if it was not trained on labels, or by an earlier release.

        vocabulary: The number of ids that the model knows.

        Raises AdapterError: what is recorded are no labels with ids of the model.
        """
        if (record := adapter.record.get(KEY)) is None:
            return None
        is_valid = isinstance(record, dict) and 2 <= len(record) <= MAX_LABELS
        if not is_valid or not all(_are_ids(ids, vocabulary) for ids in record.values()):
            what, fix = f"`{KEY}` of {RECORD_FILE} are no labels with the ids of the base", "train the adapter again"
            raise AdapterError(Problem(Code.ADAPTER_INVALID, what, str(adapter.path), fix=fix))
        return cls(tuple(record), tuple(map(tuple, record.values())))

    def number(self, text: str) -> int:
        """The number of a label; -1 if there is none of this text."""
        return self.texts.index(text) if text in self.texts else -1

    def are_those_of(self, answers: Iterable[tuple[str, Ids]]) -> bool:
        """Whether answers are labels, at least one of them, and have the ids by which these are scored."""
        ids = dict(zip(self.texts, self.ids, strict=True))
        known = [(ids[text], tuple(own)) for text, own in answers if text in ids]
        return bool(known) and all(scored == own for scored, own in known)

    def to_dict(self) -> dict[str, list[int]]:
        """Plain values: text → ids."""
        return {text: [*ids] for text, ids in zip(self.texts, self.ids, strict=True)}

    def score(self, engine: Engine, prompts: Sequence[Ids]) -> Values:
        """The log-probability of each label as the answer to each prompt: (prompts, labels), in nats.

        engine: Computes it with the active adapter of its model; in a context that disables the adapter, with the base.
        """
        found = []
        each = max(1, _AT_ONCE // len(self.ids))
        for start in range(0, len(prompts), each):
            rows = [
                {"input_ids": [*prompt, *label], "labels": [IGNORED] * len(prompt) + [*label]}
                for prompt in prompts[start : start + each]
                for label in self.ids
            ]
            found.append(-engine.nats(rows).reshape(-1, len(self.ids)))
        return np.concatenate(found) if found else np.zeros((0, len(self.ids)))


def _are_ids(ids: Any, vocabulary: int) -> bool:
    return isinstance(ids, list) and bool(ids) and all(type(id) is int and 0 <= id < vocabulary for id in ids)


def probabilities(scores: Values, temperature: float = 1.0) -> Values:
    """The probability of each label among all: (rows, labels). scores: log-probabilities, (rows, labels)."""
    scaled = (scores - scores.max(axis=1, keepdims=True)) / temperature
    found = np.exp(scaled)
    shares: Values = found / found.sum(axis=1, keepdims=True)
    return shares
