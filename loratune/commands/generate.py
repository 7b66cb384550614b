"""`loratune generate`: completes prompts, which are rendered as in training."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from transformers import TextStreamer

from loratune.codes import Code
from loratune.commands import inference
from loratune.commands.inference import LoadedAdapter
from loratune.data import formats
from loratune.data.formats import Question
from loratune.data.sources import Row
from loratune.errors import ConfigError, Problem
from loratune.model import load
from loratune.training.preflight import AdapterInfo


@dataclass(frozen=True)
class Answer:
    """The completion of one prompt.

    Attributes:
        row: The row that holds the prompt.
        prompt: The prompt as text; of a conversation, its last message.
        completion: What base and adapter give.
        base: What the base alone gives; None where that is not wanted.
    """

    row: Row
    prompt: str
    completion: str
    base: str | None


def generate(
    adapter: AdapterInfo,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    temperature: float,
    base: bool,
    stream: bool,
    log: Callable[[str], None] = lambda _: None,
) -> Iterator[Answer]:
    """Answer every row, in order. Everything is checked before the iterator is returned.

    Args:
        adapter: The adapter directory.
        rows: Rows of any format but input_ids; they need no completion. Text is used as in training: raw, or as the
            user's turn if the adapter was trained on conversations.
        max_new_tokens: The longest completion.
        temperature: 0 for the likeliest token; above it, tokens are sampled.
        base: Also answer with the base alone.
        stream: Print the completion of a single prompt while it is computed.
        log: Takes lines about the adapter.

    Raises:
        AdapterError, ModelError, DataError: The adapter, its base or the rows cannot be used.
        ConfigError: A prompt is empty, or leaves too little of the model's context for new tokens.
    """
    loaded = inference.load(adapter, log)
    questions = _questions(loaded, rows)
    prompts = [
        loaded.renderer.prompt(question.prompt, row.where, question.tools)
        for question, row in zip(questions, rows, strict=True)
    ]
    _check_lengths(loaded, rows, prompts, max_new_tokens)
    streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None

    def answers() -> Iterator[Answer]:
        for start in range(0, len(prompts), inference.BATCH):
            batch = prompts[start : start + inference.BATCH]
            base_texts: list[str] | list[None] = [None] * len(batch)
            if base:
                with loaded.without_adapter():
                    base_texts = [loaded.text(ids) for ids in loaded.complete(batch, max_new_tokens, temperature)]
            completions = loaded.complete(batch, max_new_tokens, temperature, streamer)
            for number, (ids, base_text) in enumerate(zip(completions, base_texts, strict=True), start):
                prompt = questions[number].prompt
                text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
                yield Answer(rows[number], text, loaded.text(ids), base_text)

    return answers()


def _questions(loaded: LoadedAdapter, rows: Sequence[Row]) -> list[Question]:
    """The prompts of the rows; text is the user's turn if the adapter was trained on conversations."""
    questions = [formats.parse_question(row, loaded.data) for row in rows]
    if empty := [row.where for row, question in zip(rows, questions, strict=True) if not question.prompt]:
        raise ConfigError([Problem(Code.GENERATE_EMPTY_PROMPT, "the prompt is empty", where) for where in empty])
    if not loaded.chat:
        return questions
    return [
        Question([{"role": "user", "content": question.prompt}], question.tools)
        if isinstance(question.prompt, str)
        else question
        for question in questions
    ]


def _check_lengths(
    loaded: LoadedAdapter, rows: Sequence[Row], prompts: Sequence[tuple[int, ...]], max_new_tokens: int
) -> None:
    """Raises ConfigError: prompts with their new tokens exceed the model's context."""
    limit = load.context_length(loaded.model.config)
    problems = []
    for row, ids in zip(rows, prompts, strict=True):
        if limit is not None and len(ids) + max_new_tokens > limit:
            what = f"{len(ids)} prompt tokens and {max_new_tokens} new ones exceed the model's context of {limit}"
            fix = f"set --max-new-tokens to {limit - len(ids)}" if len(ids) < limit else "shorten the prompt"
            problems.append(Problem(Code.GENERATE_TOO_LONG, what, row.where, fix=fix))
    if problems:
        raise ConfigError(problems)
