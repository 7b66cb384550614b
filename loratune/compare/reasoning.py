"""Whether a model reasons as its base does: everyday instructions in the reasoning mode of the chat template."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from loratune.compare import behavior
from loratune.compare.base_results import BaseResults, Numbers
from loratune.compare.engine import Engine
from loratune.compare.metrics import Difference
from loratune.data.formats.reasoning import REASONING_OPENED
from loratune.data.rendering import Renderer
from loratune.errors import DataError, ModelError
from loratune.events import progress
from loratune.model.load import context_length
from loratune.statistics import finite, wilson

NEW_TOKENS = 32
"""The tokens of an answer: enough to see whether it begins with reasoning, but in most cases not where that ends."""
_MODE = {"enable_thinking": True}


@dataclass(frozen=True)
class Reasoning:
    """How many answers to everyday instructions begin with reasoning that is not empty.

    Attributes:
        asked: The number of instructions.
        base: How many answers of the base do.
        adapter: How many answers of the adapter do.
    """

    asked: int
    base: int
    adapter: int

    def __str__(self) -> str:
        return f"base {self.base} of {self.asked}, adapter {self.adapter}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the 95 % interval of the adapter's share."""
        return {**vars(self), "share": self.share.value, "interval": finite(self.share.interval)}

    @property
    def share(self) -> Difference:
        """The share of the adapter's answers, with its 95 % interval."""
        return Difference(self.adapter / self.asked, wilson(self.adapter, self.asked))


def compare(base: BaseResults, renderer: Renderer) -> Reasoning | None:
    """Ask the active adapter of a model and its base in the reasoning mode. None if the chat template writes no
    reasoning, the base never reasons, or it cannot be asked. renderer: renders the instructions."""
    opened, closed = renderer.template(_MODE).reasoning_tags
    if not closed:
        return None
    try:
        given = behavior.prompts(renderer, context_length(base.engine.model.config), _MODE)[1]
        is_opened = [REASONING_OPENED.search(renderer.tokenizer.decode([*ids])) is not None for ids in given]

        def reasoned(engine: Engine) -> Numbers:
            answers = behavior.write(engine.model, engine, given, NEW_TOKENS, end_ids=renderer.end_ids)
            pairs = zip(is_opened, answers, strict=True)
            texts = [opened * inside + renderer.tokenizer.decode(ids).strip() for inside, ids in pairs]
            return np.array([begins_with_reasoning(text, opened, closed) for text in texts], np.float64)

        with progress("asking base and adapter to reason"):
            about = ["reasons", NEW_TOKENS, opened, closed, [*renderer.end_ids], [[*ids] for ids in given]]
            before = base.once(about, lambda: reasoned(base.engine))
            after = reasoned(base.engine) if before.any() else before
    except (DataError, ModelError):
        return None
    return Reasoning(len(given), int(before.sum()), int(after.sum())) if before.any() else None


def begins_with_reasoning(text: str, opened: str, closed: str) -> bool:
    """Whether an answer opens reasoning that has text, by the tags around it. It may be cut before the end of it."""
    return text.startswith(opened) and bool(text.removeprefix(opened).partition(closed)[0].strip())
