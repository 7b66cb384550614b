"""Retention: training also holds the model to what it predicted before, on texts that it wrote itself (`retention`).

Before the first step the model writes texts: a chat model from the header of a user's turn on, so that it writes the
question and the answer; another one from its first token on; or answers to the prompts of a file. Its predictions at
each token that it wrote are kept, as its most probable tokens. The loss of an optimizer step then has the term
`kl_weight` times the mean divergence KL(before ‖ model) over the tokens of a few of these texts, which are computed in
the batches of its rows. arXiv:2605.26097 compares this with other means against forgetting.

Which texts go with a step, and their weight, depends on the number of the step and of its rows, and not on how these
are divided into micro-steps and processes. Their tokens are about a fifth of those of the rows. Where the rows of a
step are so short that one text has more, every second step has one, or its beginning, with twice the weight, so that
two steps together have twice `kl_weight`; a last step that is left over has one with the weight itself.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loratune import kernels
from loratune.codes import Code
from loratune.compare import behavior
from loratune.compare.base_results import BaseResults, Numbers
from loratune.compare.engine import Engine
from loratune.config import RetentionSection, RunConfig, decided
from loratune.data.formats.questions import Question, read_questions
from loratune.data.packing import BatchLayout, Items, PackedRows
from loratune.data.rendering import Renderer
from loratune.data.sources.rows import Row
from loratune.errors import ConfigError, DataError, ModelError, Problem
from loratune.events import progress
from loratune.system.launcher import Group
from loratune.text import plural
from loratune.training.checkpoints.store import StepLosses

TOP = 20
"""Tokens whose probabilities are kept at each token of a text; all others count as one."""
SHARE = 0.2
"""The tokens of the texts of a step, as a share of those of its rows, at most, where one text is not more."""
_WEIGHT = 1.0
"""`kl_weight` of sft. Preferences were not measured, and DPO has a reference of its own."""
_MOST_SAMPLES, _SHARE_OF_RUN = 48, 0.1
"""The most texts that `auto` has written, and the most of their tokens as a share of those of the run. They take longer
than that share of its time: 2,304 tokens 18 s in the quickstart, which trains on 485 tokens a second."""
_HEADER = 32
"""About the tokens of the header of a user's turn, with the system prompt that some templates add."""
_SHARE_OF_ONE = 0.25
"""The same where every second step has a text: a longer one is cut to this. It is more than `SHARE`, since the ends of
texts are where a model answers the questions that it wrote: in the quickstart, whole texts (25 % more tokens) instead
of 34 of 48 tokens (20 %) had a divergence of 0.092 instead of 0.132 on everyday instructions."""
_LEAST_COMPARED = 16
"""Tokens of a text that are compared at least, however short rows are."""

Ids = Sequence[int]
KEY = "retention"


@dataclass(frozen=True)
class RetentionText:
    """A text of the model as it was before training.

    Attributes:
        ids: Its tokens, with those that it continues.
        begin: How many tokens it continues.
        top_ids: (tokens, K), the most probable tokens at each token that the model wrote.
        log_probabilities: (tokens, K), float32, theirs in nats.
    """

    ids: tuple[int, ...]
    begin: int
    top_ids: NDArray[np.int64]
    log_probabilities: NDArray[np.float32]

    def row(self) -> dict[str, Any]:
        """The text as a row of a batch, in which no token is supervised."""
        teacher = self.begin - 1, self.top_ids, self.log_probabilities
        return {"input_ids": [*self.ids], "labels": [-100] * len(self.ids), "teacher": teacher}


@dataclass(frozen=True)
class TextsOfStep:
    """How many texts go with an optimizer step.

    Attributes:
        number: The texts of a step that has some.
        every: 1 if each step has texts, 2 if every second one has.
        tokens: The tokens that the model writes in each text, at most.
    """

    number: int
    every: int
    tokens: int

    @classmethod
    def of(cls, tokens: float, context: int, longest: int) -> "TextsOfStep":
        """From the tokens of the rows of a step, those that a text continues, and the new ones that it has."""
        if (number := int(SHARE * tokens / (context + longest))) > 0:
            return cls(number, 1, longest)
        return cls(1, 2, min(longest, max(_LEAST_COMPARED, int(2 * _SHARE_OF_ONE * tokens) - context)))


@dataclass
class Retention:
    """The retention of a run.

    Attributes:
        section: Its settings.
        given: What each text continues.
        of_step: How many texts go with a whole step.
        items: The items of a whole step, which are rows, pairs of rows, or packs.
        of_batch: How many texts a batch has at most.
        share: The tokens of the texts, as a share of those of the rows.
        texts: The texts; none until they are written.
    """

    section: RetentionSection
    given: Sequence[Ids]
    of_step: TextsOfStep
    items: int
    of_batch: int
    share: float
    texts: Sequence[RetentionText] = ()

    @property
    def size(self) -> tuple[int, int]:
        """The tokens of the longest text, and those of which predictions are compared."""
        return max(map(len, self.given)) + self.of_step.tokens, self.of_step.tokens

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the texts continue."""
        return hashlib.sha256(json.dumps([[*ids] for ids in self.given]).encode()).hexdigest()

    def __str__(self) -> str:
        """A line for the plan."""
        one = self.of_step
        steps = f"{one.number} beside the rows of each step"
        if one.every > 1:
            steps = "one beside the rows of every second step, with twice the weight"
        texts = f"{plural(len(self.given), 'text')} of {one.tokens} tokens"
        return f"retention: the model writes {texts} before the first step; {steps}, {self.share:.0%} more tokens"

    @classmethod
    def of(
        cls, section: RetentionSection, given: Sequence[Ids], tokens: float, items: int, batches: int
    ) -> "Retention":
        """From the settings, what the texts continue, and a whole step: the tokens and the number of its items, and
        the batches that it has in all micro-steps of all processes."""
        found = TextsOfStep.of(tokens, max(map(len, given)), section.max_new_tokens)
        found = replace(found, number=min(len(given), found.number))
        each = sum(map(len, given)) / len(given) + found.tokens
        share = found.number * each / (found.every * tokens)
        return cls(section, given, found, items, -(-found.number // batches), share)

    def numbers(self, step: int, items: int, *, is_last: bool = False) -> list[int]:
        """The numbers of the texts of an optimizer step, in turn.

        Args:
            step: The optimizer steps before it.
            items: Its items; the last step of an epoch may have fewer than others, and has fewer texts then.
            is_last: Whether it is the last step of the run.
        """
        one = self.of_step
        has_texts = one.every == 1 or step % 2 == 1 or is_last
        if not (has_texts and self.texts):
            return []
        start, count = step // one.every * one.number, max(1, one.number * items // self.items)
        return [(start + number) % len(self.texts) for number in range(count)]

    def weight(self, step: int) -> float:
        """That of the term in an optimizer step: `kl_weight`, or twice that if only every second step has texts."""
        return decided(self.section.kl_weight) * (self.of_step.every if step % 2 else 1)

    def rows(self) -> list[dict[str, Any]]:
        """The texts as rows of batches."""
        return [text.row() for text in self.texts]

    def write(self, before: BaseResults, renderer: Renderer, seed: int) -> None:
        """Have the model write the texts, and read what it predicts in them; or take both from the cache.

        Args:
            before: The results of the model as before its first step.
            renderer: Of its tokenizer.
            seed: The seed of the texts.

        Raises:
            ModelError: The model writes nothing but its end token.
        """
        longest, engine = self.of_step.tokens, before.engine
        settings = self.section.model_dump(exclude={"kl_weight"}) | {"max_new_tokens": longest}
        ends = renderer.end_ids if self.section.prompts else ()

        def compute() -> Numbers:
            with progress("writing texts of the base"):
                new = behavior.write(engine.model, engine, self.given, longest, end_ids=ends, seed=seed)
                pairs = zip(self.given, new, strict=True)
                written = [(ids, tokens) for ids, tokens in pairs if not {*tokens} <= {*renderer.end_ids}]
                if not written:
                    what, fix = "the model writes nothing but its end token", "set prompts, or kl_weight to 0"
                    raise ModelError(Problem(Code.MODEL_UNSUPPORTED, what, key=KEY, fix=fix))
                return _as_numbers(read_predictions(engine.model, engine, written))

        about = ["retention", settings, seed, [*renderer.end_ids], TOP, [[*ids] for ids in self.given]]
        self.texts = _from_numbers(before.once(about, compute))

    def as_numbers(self) -> list[float]:
        """The texts as plain numbers, for other processes."""
        numbers: list[float] = _as_numbers(self.texts).tolist()
        return numbers

    def set_numbers(self, numbers: Sequence[float]) -> None:
        """Take the texts from `as_numbers`."""
        self.texts = _from_numbers(np.array(numbers))


class RetentionTerm:
    """The term of `retention` in the loss.

    Attributes:
        steps: The divergence of the steps since the last report, of those that had texts.
    """

    def __init__(self, group: Group, steps: StepLosses):
        self._group, self.steps = group, steps
        self._teacher: kernels.TeacherTargets | None = None
        self._sum: torch.Tensor | None = None
        self._tokens, self._weight = 0, 0.0

    @classmethod
    def of(cls, retention: Retention | None, group: Group, steps: StepLosses | None) -> "RetentionTerm | None":
        """The term of a run, None without retention. steps: those of a checkpoint that no report has yet."""
        return None if retention is None else cls(group, replace(steps) if steps else StepLosses())

    def begin_step(self, batches: Sequence[Mapping[str, Any]], weight: float) -> None:
        """Count the tokens whose predictions are compared in an optimizer step, over all processes.

        weight: the weight of their mean divergence in the loss; 0: it has no gradient. So it is in the first step, in
        which the model still is what it is held to: an optimizer that divides by the size of gradients would make a
        step of their rounding errors.
        """
        self._weight = weight
        own = sum(len(batch["teacher"][0]) for batch in batches if "teacher" in batch)
        self._tokens, self._sum = int(self._group.total([own])[0]), None

    def set_teacher(self, model: Any, batch: dict[str, Any]) -> int:
        """Take the predictions to compare with out of a batch, once the objective has taken its labels.

        Returns how many tokens of the batch belong to texts.
        """
        if "teacher" not in batch:
            self._teacher = None
            return 0
        *targets, tokens = batch.pop("teacher")
        self._teacher = kernels.TeacherTargets(*targets)
        kernels.set_teacher(model, self._teacher)
        return int(tokens)

    def of_batch(self, model: Any, logits: torch.Tensor) -> torch.Tensor | float:
        """The term of a micro-step, a scalar. logits: what the model returned."""
        if self._teacher is None:
            return 0.0
        divergence = kernels.teacher_divergence(model, logits, self._teacher)
        divergence = divergence / self._tokens
        own = divergence.detach().clone()
        self._sum = own if self._sum is None else self._sum + own
        return self._weight * divergence if self._weight else 0.0

    def taken(self) -> list[torch.Tensor]:
        """The divergence of the optimizer step in this process, nats per token, a scalar; none without texts."""
        own, self._sum = self._sum, None
        return [] if own is None else [own]

    def end_step(self, divergence: float) -> None:
        """Note the divergence of the optimizer step over all processes."""
        if self._tokens:
            self.steps.add(divergence)

    def logged(self) -> dict[str, float]:
        """The mean divergence of the steps since the last report, as a metric; none if no step had texts."""
        return {"divergence": self.steps.take_mean()} if self.steps.steps else {}


def is_text(item: Any) -> bool:
    """Whether an item of a batch is a text, and not rows of the run."""
    return "teacher" in (item[0] if isinstance(item, list) else item)


class ItemsWithTexts:
    """The items of the training rows, and after them the texts, as items of the same kind."""

    def __init__(self, items: Items, texts: Sequence[dict[str, Any]]):
        """items: rows, or packs of rows. texts: see `Retention.rows`."""
        self._items, self._texts = items, texts

    def __len__(self) -> int:
        return len(self._items) + len(self._texts)

    def __getitem__(self, number: int, /) -> Any:
        if number < len(self._items):
            return self._items[number]
        row = self._texts[number - len(self._items)]
        return [row] if isinstance(self._items, PackedRows) else row


# Writing the texts


def auto_weight(config: RunConfig) -> tuple[float, str]:
    """`retention.kl_weight`, and why."""
    if config.training.objective == "sft":
        return _WEIGHT, "the base keeps what it can do otherwise; its texts add about a fifth to the tokens"
    return 0.0, f"retention was measured for sft, and not for {config.training.objective}"


def typical_texts(config: RunConfig, tokens: float) -> list[tuple[int, int]]:
    """The sizes of the texts in a batch of one process, before their prompts are known: (length, tokens compared) of
    each; none without retention. tokens: those of the rows of an optimizer step."""
    if not config.has_retention:
        return []
    found = TextsOfStep.of(tokens, _HEADER, config.retention.max_new_tokens)
    of_batch = -(-found.number // config.training.gradient_accumulation_steps)
    return [(_HEADER + found.tokens, found.tokens)] * of_batch


def step_tokens(lengths: NDArray[np.integer[Any]], layout: BatchLayout, items: int, saved: float) -> float:
    """The mean number of tokens of some items, without padding.

    Args:
        lengths: (rows,), those of each row.
        layout: Its batches.
        items: How many items.
        saved: The share of tokens that shared prefixes save.
    """
    return float(lengths.sum()) / len(layout.items) * items * (1 - saved)


def sample_count(tokens: int | None, longest: int) -> tuple[int, str]:
    """`retention.num_samples`, and why. tokens: those of the run, None if they are not known yet. longest: those of a
    text."""
    if tokens is None:
        return _MOST_SAMPLES, "the most that auto takes"
    count = max(1, min(_MOST_SAMPLES, int(_SHARE_OF_RUN * tokens / longest)))
    return count, f"at most a tenth of the {tokens:,} tokens of the run" if count < _MOST_SAMPLES else "enough"


def prompts(renderer: Renderer, config: RunConfig, chat: bool, context: int | None) -> list[tuple[int, ...]]:
    """What the texts continue: prompts of the file; or the header of a user's turn, or the first token.

    Args:
        renderer: Renders prompts.
        config: The config.
        chat: Whether the rows of the run are conversations; then text is a user's turn.
        context: The positions of the model, if they are known.

    Raises:
        DataError: The file has no prompts, or they cannot be read or rendered.
        ConfigError: A text would be longer than the context of the model.
    """
    section = config.retention
    given = [("", renderer.user_header())] * decided(section.num_samples)
    if section.prompts is not None:
        rows = read_questions(section.prompts, config.data)
        chosen = np.random.default_rng(config.training.seed).permutation(len(rows))[: decided(section.num_samples)]
        given = [_prompt(renderer, rows[number], chat) for number in sorted(chosen.tolist())]
    where, longest = max(given, key=lambda one: len(one[1]))
    tokens = len(longest) + section.max_new_tokens
    if context is not None and tokens > context:
        what, room = f"a text would have {tokens} tokens, but the model has {context} positions", context - len(longest)
        lower = [f"lower retention.max_new_tokens to {room}"] if room > 0 else []
        fixes = ["shorten the prompt", "remove the row", *lower] if where else lower or ["set retention.kl_weight to 0"]
        key = "retention.prompts" if where else "retention.max_new_tokens"
        raise ConfigError(Problem(Code.DATA_TOO_LONG, what, where, key, ", or ".join(fixes)))
    return [ids for _, ids in given]


def _prompt(renderer: Renderer, asked: tuple[Row, Question], chat: bool) -> tuple[str, tuple[int, ...]]:
    """The place of a row, and the ids of its prompt. Raises DataError: it has none."""
    row, question = asked
    turns = [{"role": "user", "content": question.prompt}] if chat and isinstance(question.prompt, str) else None
    ids = renderer.prompt(turns or question.prompt, row.where, question.tools, question.arguments)
    if not ids:
        what, fix = "the tokenizer makes no token of the prompt", "write a prompt, or remove the row"
        raise DataError(Problem(Code.DATA_FIELD, what, row.where, "retention.prompts", fix))
    return row.where, ids


def read_predictions(model: Any, engine: Engine, written: Sequence[tuple[Ids, Ids]]) -> list[RetentionText]:
    """What a model predicts at each token of texts. written: what each continues, and its tokens after that."""
    found = dict[int, RetentionText]()
    was_training = model.training
    model.eval()
    with engine.acceleration.applied(model), torch.no_grad():
        for numbers, batch, at in behavior.batches(engine, written):
            logits = kernels.logits_at(model, batch, at)
            counts = [len(written[number][1]) for number in numbers]
            parts = (torch.split(part.cpu(), counts) for part in kernels.most_probable(logits, TOP))
            for number, ids, values in zip(numbers, *parts, strict=True):
                before, new = written[number]
                found[number] = RetentionText((*before, *new), len(before), ids.numpy(), values.numpy())
    model.train(was_training)
    return [found[number] for number in range(len(written))]


def _as_numbers(texts: Sequence[RetentionText]) -> NDArray[np.float64]:
    """Texts as one array: of each its tokens, those that it continues, K, its ids, and what is kept of predictions."""
    parts: list[Any] = [[]]
    for text in texts:
        parts += [[len(text.ids), text.begin, text.top_ids.shape[1]], text.ids]
        parts += [text.top_ids.ravel(), text.log_probabilities.ravel()]
    return np.concatenate(parts).astype(np.float64)


def _from_numbers(values: NDArray[np.float64]) -> list[RetentionText]:
    texts = list[RetentionText]()
    while len(values):
        length, begin, top = values[:3].astype(int).tolist()
        count = (length - begin) * top
        ids, top_ids, logs, values = np.split(values[3:], np.cumsum([length, count, count]))
        shape = length - begin, top
        texts.append(
            RetentionText(
                tuple(ids.astype(int).tolist()),
                begin,
                top_ids.astype(np.int64).reshape(shape),
                logs.astype(np.float32).reshape(shape),
            )
        )
    return texts
