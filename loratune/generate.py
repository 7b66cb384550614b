"""The story of `loratune generate`: prompts → completions, rendered as in training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import TextStreamer

from loratune import inference, model
from loratune.data import formats
from loratune.data.sources import Row
from loratune.errors import ConfigError, Problem
from loratune.inference import Tuned


@dataclass(frozen=True)
class Answer:
    """A prompt, what base + adapter make of it, and the base alone where that was asked for."""

    row: Row
    completion: str
    base: str | None


def generate(
    directory: Path,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    temperature: float,
    base: bool,
    stream: bool,
) -> Iterator[Answer]:
    """Answer every row, in order. stream: print the completion of a single prompt while it comes.

    rows: each with `prompt` (text, or messages) or `messages`. Text is taken as training took it: raw, or as a user's
    turn where the adapter was trained on conversations.
    Raises AdapterError, ModelError, DataError; ConfigError: a prompt that leaves no room in the model's context.
    """
    tuned = inference.open_adapter(directory)
    prompts = [_render(tuned, row) for row in rows]
    _check_room(tuned, rows, prompts, max_new_tokens)
    streamer = TextStreamer(tuned.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    for start in range(0, len(prompts), inference.BATCH):
        batch = prompts[start : start + inference.BATCH]
        answers: list[list[int]] | list[None] = [None] * len(batch)
        if base:
            with tuned.without_adapter():
                answers = tuned.complete(batch, max_new_tokens, temperature)
        completions = tuned.complete(batch, max_new_tokens, temperature, streamer)
        for offset, (ids, base_ids) in enumerate(zip(completions, answers, strict=True)):
            yield Answer(rows[start + offset], tuned.text(ids), None if base_ids is None else tuned.text(base_ids))


def _render(tuned: Tuned, row: Row) -> tuple[int, ...]:
    """The ids of a prompt; bare text is the user's turn where the adapter was trained on conversations."""
    prompt = formats.question(row, tuned.data.columns)
    if isinstance(prompt, str) and tuned.data.format == "messages":
        prompt = [{"role": "user", "content": prompt}]
    return tuned.renderer.prompt(prompt, row.where)


def _check_room(tuned: Tuned, rows: Sequence[Row], prompts: Sequence[tuple[int, ...]], max_new_tokens: int) -> None:
    limit = model.context_length(tuned.model.config)
    problems = []
    for row, ids in zip(rows, prompts, strict=True):
        if not ids:
            problems.append(Problem("the prompt is empty", row.where))
        elif limit is not None and len(ids) + max_new_tokens > limit:
            what = f"{len(ids)} prompt tokens and {max_new_tokens} new ones exceed the model's context of {limit}"
            problems.append(Problem(what, row.where))
    if problems:
        raise ConfigError(problems)
