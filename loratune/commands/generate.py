"""The story of `loratune generate`: prompts → completions, rendered as in training."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from transformers import TextStreamer

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
    """A prompt, what base + adapter make of it, and the base alone where that was asked for. asked: its last words."""

    row: Row
    asked: str
    completion: str
    base: str | None


def generate(
    opened: AdapterInfo,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    temperature: float,
    base: bool,
    stream: bool,
    log: Callable[[str], None] = lambda _: None,
) -> Iterator[Answer]:
    """Answer every row, in order. Everything is checked before the iterator is handed out.

    stream: print the completion of a single prompt while it comes; log: takes lines about the adapter.
    rows: of any format but input_ids, and those need no answer. Text is taken as training took it: raw, or as a user's
    turn where the adapter was trained on conversations.
    Raises AdapterError, ModelError, DataError; ConfigError: a prompt that leaves no room in the model's context.
    """
    tuned = inference.load(opened, log)
    questions = _questions(tuned, rows)
    prompts = [
        tuned.renderer.prompt(asked.prompt, row.where, asked.tools) for asked, row in zip(questions, rows, strict=True)
    ]
    _check_room(tuned, rows, prompts, max_new_tokens)
    streamer = TextStreamer(tuned.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None

    def answers() -> Iterator[Answer]:
        for start in range(0, len(prompts), inference.BATCH):
            batch = prompts[start : start + inference.BATCH]
            base_texts: list[str] | list[None] = [None] * len(batch)
            if base:
                with tuned.without_adapter():
                    base_texts = [tuned.text(ids) for ids in tuned.complete(batch, max_new_tokens, temperature)]
            completions = tuned.complete(batch, max_new_tokens, temperature, streamer)
            for number, (ids, base_text) in enumerate(zip(completions, base_texts, strict=True), start):
                asked = questions[number].prompt
                words = asked if isinstance(asked, str) else asked[-1]["content"]
                yield Answer(rows[number], words, tuned.text(ids), base_text)

    return answers()


def _questions(tuned: LoadedAdapter, rows: Sequence[Row]) -> list[Question]:
    """What the rows ask; bare text is the user's turn where the adapter was trained on conversations."""
    asked = [formats.parse_question(row, tuned.data) for row in rows]
    if empty := [row.where for row, one in zip(rows, asked, strict=True) if not one.prompt]:
        raise ConfigError([Problem("the prompt is empty", where) for where in empty])
    if not tuned.chat:
        return asked
    return [
        Question([{"role": "user", "content": one.prompt}], one.tools) if isinstance(one.prompt, str) else one
        for one in asked
    ]


def _check_room(
    tuned: LoadedAdapter, rows: Sequence[Row], prompts: Sequence[tuple[int, ...]], max_new_tokens: int
) -> None:
    limit = load.context_length(tuned.model.config)
    problems = []
    for row, ids in zip(rows, prompts, strict=True):
        if limit is not None and len(ids) + max_new_tokens > limit:
            what = f"{len(ids)} prompt tokens and {max_new_tokens} new ones exceed the model's context of {limit}"
            fix = f"set --max-new-tokens to {limit - len(ids)}" if len(ids) < limit else "shorten the prompt"
            problems.append(Problem(what, row.where, fix=fix))
    if problems:
        raise ConfigError(problems)
