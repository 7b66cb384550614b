"""`loratune generate`: completes prompts, which are rendered as in training."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from transformers import TextStreamer

from loratune.adapter import generation, loading
from loratune.adapter.directory import AdapterDirectory
from loratune.adapter.generation import LoadedAdapter, Request
from loratune.adapter.sampling import Sampling
from loratune.adapter.selection import UNNAMED, Selection
from loratune.codes import Code
from loratune.data.formats.recognition import Question, parse_question
from loratune.data.sources.rows import Row, reported
from loratune.errors import ConfigError, DataError, Problem
from loratune.events import counting, no_advance
from loratune.model import load


@dataclass(frozen=True)
class Answer:
    """The completion of one prompt.

    Attributes:
        adapter: The name of the adapter that answers.
        row: The row that holds the prompt.
        prompt: The prompt as text; of a conversation, its last message.
        completion: What base and adapter give.
        base: What the base alone gives; None where that is not wanted.
    """

    adapter: str
    row: Row
    prompt: str
    completion: str
    base: str | None


def generate(
    adapters: Mapping[str, AdapterDirectory],
    selection: Selection,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    base: bool,
    stream: bool,
    shows_progress: bool = True,
) -> Iterator[Answer]:
    """Answer every row, in order. Everything is checked before the iterator is returned.

    Args:
        adapters: Name → adapter directory, as the user has selected them.
        selection: Which of them answers what.
        rows: Rows of any format but input_ids; they need no completion. Text is used as in training: raw, or as the
            user's turn if the adapter was trained on conversations. Where adapters have names, a field `adapter` of a
            row says which one answers it.
        max_new_tokens: The longest completion.
        sampling: How tokens are chosen, and where completions end.
        base: Also answer with the base alone.
        stream: Print the completion of a single prompt while it is computed.
        shows_progress: Emit how many rows are answered.

    Raises:
        AdapterError, ModelError, DataError: An adapter, the base or the rows cannot be used.
        ConfigError: A prompt is empty, or leaves too little of the model's context for new tokens.
    """
    names = _names(selection, rows)
    loaded = loading.load_selection(adapters, selection)
    answering = [loaded.by_name.get(name, loaded.default) for name in names]
    questions = _questions(answering, rows)
    requests = [
        (adapter, adapter.renderer.prompt(question.prompt, row.where, question.tools))
        for adapter, question, row in zip(answering, questions, rows, strict=True)
    ]
    _check_lengths(requests, rows, max_new_tokens)
    streamer = TextStreamer(answering[0].tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None

    def answers() -> Iterator[Answer]:
        progress = counting("answering", len(requests)) if shows_progress else nullcontext(no_advance)
        with progress as advance:
            for start in range(0, len(requests), generation.BATCH):
                batch, drawn = requests[start : start + generation.BATCH], sampling.for_batch(start)
                base_texts: list[str] | list[None] = [None] * len(batch)
                if base:
                    with loaded.default.without_adapter():
                        base_texts = generation.complete_as_text(batch, max_new_tokens, drawn)
                texts = generation.complete_as_text(batch, max_new_tokens, drawn, streamer)
                for number, (text, base_text) in enumerate(zip(texts, base_texts, strict=True), start):
                    prompt = questions[number].prompt
                    shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
                    yield Answer(names[number] or loaded.label, rows[number], shown, text, base_text)
                advance(len(batch))

    return answers()


def _names(selection: Selection, rows: Sequence[Row]) -> list[str]:
    """The name of the adapter that each row asks for, the default's where it asks for none.

    A field `adapter` of a row means nothing where the only adapter has no name.

    Raises:
        DataError: A row names an adapter that the command does not have; with a mixture, it names any.
    """
    known = {} if selection.mix else selection.directories
    if UNNAMED in known:
        return [UNNAMED] * len(rows)
    names, problems = [], []
    for row in rows:
        name = row.values.get("adapter")
        if name is not None and not (isinstance(name, str) and name in known):
            what = f"there is no adapter {name!r}"
            fix = (
                f"the adapters are {', '.join(known)}" if known else "with --mix, all rows are answered by the mixture"
            )
            problems.append(Problem(Code.USAGE_BAD_VALUE, what, row.where, "adapter", fix))
        names.append(UNNAMED if selection.mix else name or selection.default)
    if problems:
        raise DataError(reported(problems))
    return names


def _questions(answering: Sequence[LoadedAdapter], rows: Sequence[Row]) -> list[Question]:
    """The prompts of the rows; text is the user's turn if the row's adapter was trained on conversations."""
    questions = [parse_question(row, adapter.data) for adapter, row in zip(answering, rows, strict=True)]
    if empty := [row.where for row, question in zip(rows, questions, strict=True) if not question.prompt]:
        raise ConfigError([Problem(Code.USAGE_NO_PROMPT, "the prompt is empty", where) for where in empty])
    return [
        Question(adapter.turns(question.prompt), question.tools)
        for adapter, question in zip(answering, questions, strict=True)
    ]


def _check_lengths(requests: Sequence[Request], rows: Sequence[Row], max_new_tokens: int) -> None:
    """Raises ConfigError: prompts with their new tokens exceed the model's context."""
    problems = []
    for row, (adapter, ids) in zip(rows, requests, strict=True):
        limit = load.context_length(adapter.model.config)
        if limit is not None and len(ids) + max_new_tokens > limit:
            what = f"{len(ids)} prompt tokens and {max_new_tokens} new ones exceed the model's context of {limit}"
            fix = f"set --max-new-tokens to {limit - len(ids)}" if len(ids) < limit else "shorten the prompt"
            problems.append(Problem(Code.DATA_TOO_LONG, what, row.where, fix=fix))
    if problems:
        raise ConfigError(problems)
