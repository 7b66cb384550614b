"""`loratune generate`: completes prompts, rendered as in training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from loratune.adapter import generation
from loratune.adapter.generation import LoadedAdapter, Request, TextPieces
from loratune.adapter.loading import LoadedAdapters
from loratune.adapter.options import UNNAMED, Sampling, Selection
from loratune.codes import Code
from loratune.data.formats.questions import Question, parse_question
from loratune.data.sources.rows import Row, reported, with_own_fields
from loratune.errors import ConfigError, DataError, Problem
from loratune.events import counting, no_advance, note
from loratune.model import load
from loratune.system import turns
from loratune.system.accelerator import default_modes


@dataclass(frozen=True)
class Answer:
    """The completion of one prompt.

    Attributes:
        adapter: The name of the adapter that answers.
        row: The row with the prompt.
        prompt: The prompt as text; for a conversation, its last message.
        completion: The completion of the adapter.
        base: The completion of the base; None if not requested.
    """

    adapter: str
    row: Row
    prompt: str
    completion: str
    base: str | None

    def to_dict(self) -> dict[str, Any]:
        """The fields of the row, with the completions as `completion` and `base`."""
        found = {"completion": self.completion} | ({"base": self.base} if self.base is not None else {})
        return with_own_fields(self.row.values, found)


def answers(
    loaded: LoadedAdapters,
    names: Sequence[str],
    rows: Sequence[Row],
    sampling: Sampling,
    max_new_tokens: int,
    *,
    system: str | None = None,
    base: bool = False,
    on_text: Callable[[str], None] | None = None,
    shows_progress: bool = True,
) -> Iterator[Answer]:
    """Answer every row, in order. Everything is checked before the iterator is returned.

    Args:
        loaded: The adapters.
        names: The name of the adapter that answers each row, see `names`.
        rows: Rows of any format except input_ids; completions are optional. Text is rendered as in training: raw, or as
            a user turn if the adapter was trained on conversations.
        sampling: The sampling settings.
        max_new_tokens: The maximum length of a completion, in tokens.
        system: The system message of prompts without one; empty for none; None for the one of all training rows.
        base: Also answer with the base alone.
        on_text: Receives the completion of a single prompt piece by piece.
        shows_progress: Emit progress events.

    Raises:
        DataError: A row cannot be used or rendered.
        ConfigError: A prompt is empty, or with its new tokens exceeds the model's context; a raw prompt gets a system
            message.
        LockedError: See `turns.turn`.
    """
    questions, requests = render(loaded, names, rows, max_new_tokens, system)
    streamer = TextPieces(requests[0][0].tokenizer, on_text) if on_text else None

    def answered() -> Iterator[Answer]:
        progress = counting("answering", len(requests)) if shows_progress else nullcontext(no_advance)
        with progress as advance:
            for start in range(0, len(requests), generation.BATCH):
                batch, drawn = requests[start : start + generation.BATCH], sampling.for_batch(start)
                base_texts: list[str] | list[None] = [None] * len(batch)
                with turns.turn(), default_modes():
                    if base:
                        with loaded.default.without_adapter():
                            base_texts = generation.complete_as_text(batch, max_new_tokens, drawn)
                    texts = generation.complete_as_text(batch, max_new_tokens, drawn, streamer)
                for number, (text, base_text) in enumerate(zip(texts, base_texts, strict=True), start):
                    prompt = questions[number].prompt
                    shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
                    yield Answer(names[number] or loaded.label, rows[number], shown, text, base_text)
                advance(len(batch))

    return answered()


def render(
    loaded: LoadedAdapters, names: Sequence[str], rows: Sequence[Row], max_new_tokens: int, system: str | None
) -> tuple[list[Question], list[Request]]:
    """The questions of rows, and the adapter and the ids that ask each. Args and errors as for `answers`."""
    answering = [loaded.by_name.get(name, loaded.default) for name in names]
    questions = _questions(answering, rows, system)
    requests: list[Request] = [
        (adapter, adapter.renderer.prompt(question.prompt, row.where, question.tools, question.arguments))
        for adapter, question, row in zip(answering, questions, rows, strict=True)
    ]
    _check_lengths(requests, rows, max_new_tokens)
    unread = (one.renderer.unread(question.arguments) for one, question in zip(answering, questions, strict=True))
    for line in filter(None, dict.fromkeys(unread)):
        note(line)
    return questions, requests


def names(selection: Selection, rows: Sequence[Row]) -> list[str]:
    """The name of the adapter for each row: its field `adapter`, or the default adapter.

    The field is ignored if the only adapter has no name.

    Raises:
        DataError: A row names an unknown adapter, or with a mixture, any adapter.
    """
    known = {} if selection.mix else selection.directories
    if UNNAMED in known:
        return [UNNAMED] * len(rows)
    found, problems = [], []
    for row in rows:
        name = row.values.get("adapter")
        if name is not None and not (isinstance(name, str) and name in known):
            what, fix = f"there is no adapter {name!r}", "with `mix=...`, all rows are answered by the mixture"
            fix = f"the adapters are {', '.join(known)}" if known else fix
            problems.append(Problem(Code.USAGE_BAD_VALUE, what, row.where, "adapter", fix))
        found.append(UNNAMED if selection.mix else name or selection.default)
    if problems:
        raise DataError(reported(problems))
    return found


def _questions(answering: Sequence[LoadedAdapter], rows: Sequence[Row], system: str | None) -> list[Question]:
    """The prompts of the rows, see `LoadedAdapter.turns`; a line tells which system messages of training are used."""
    questions = [parse_question(row, adapter.data) for adapter, row in zip(answering, rows, strict=True)]
    if empty := [row.where for row, question in zip(rows, questions, strict=True) if not question.prompt]:
        raise ConfigError([Problem(Code.USAGE_NO_PROMPT, "the prompt is empty", where) for where in empty])
    found, notes = list[Question](), dict[str, None]()
    for adapter, question, row in zip(answering, questions, rows, strict=True):
        prompt = adapter.turns(question.prompt, adapter.system if system is None else system)
        if system and isinstance(prompt, str):
            what = f"{adapter.where} was trained on raw prompts, which have no system message"
            raise ConfigError(Problem(Code.USAGE_CONFLICT, what, row.where, "system", "leave it out"))
        if system is None and len(prompt) > len(adapter.turns(question.prompt, "")):
            notes[adapter.system_note] = None
        found.append(replace(question, prompt=prompt))
    for line in notes:
        note(line)
    return found


def _check_lengths(requests: Sequence[Request], rows: Sequence[Row], max_new_tokens: int) -> None:
    """Raises ConfigError: prompts with their new tokens exceed the model's context."""
    problems = []
    for row, (adapter, ids) in zip(rows, requests, strict=True):
        limit = load.context_length(adapter.model.config)
        if limit is not None and len(ids) + max_new_tokens > limit:
            what = f"{len(ids)} prompt tokens and {max_new_tokens} new ones exceed the model's context of {limit}"
            fix = f"set `max_new_tokens=...` to {limit - len(ids)}" if len(ids) < limit else "shorten the prompt"
            problems.append(Problem(Code.DATA_TOO_LONG, what, row.where, fix=fix))
    if problems:
        raise ConfigError(problems)
