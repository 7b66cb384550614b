"""The prompts of rows, for generation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loratune.codes import Code
from loratune.config import DataSection, Source
from loratune.data import formats
from loratune.data.formats import Message, RowError, parsers, reasoning
from loratune.data.formats.recognition import FORMATS, PREFERENCE_FORMATS, rename
from loratune.data.formats.tools import parse_arguments, parse_tools
from loratune.data.sources import header_fix, read_rows
from loratune.data.sources.rows import Row, reported
from loratune.errors import DataError, Problem


@dataclass(frozen=True)
class Question:
    """The prompt of a row.

    Attributes:
        prompt: Plain text, or messages for the chat template.
        tools: Schemas for the chat template.
        arguments: Arguments of the chat template that the row sets.
    """

    prompt: str | list[Message]
    tools: tuple[Any, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)


_QUESTIONS = ("prompt", "messages", "conversations", "instruction", "text")
"""Fields that may hold the prompt of a row."""


def read_questions(path: str, section: DataSection) -> list[tuple[Row, Question]]:
    """The rows of a source, each with its prompt. Raises DataError: as `read_rows` and `parse_question`; or a prompt
    is empty."""
    found = [(row, parse_question(row, section)) for row in read_rows(Source(path=path))]
    if empty := [row.where for row, question in found if not question.prompt]:
        fix = "write a prompt, or remove the row"
        problems = [Problem(Code.DATA_FIELD, "the prompt is empty", where, fix=fix) for where in empty]
        raise DataError(reported(problems, path))
    return found


def parse_question(row: Row, section: DataSection) -> Question:
    """The prompt of a row: its `prompt`, `messages` or `conversations` up to the last answer, `instruction` with input,
    system and history, or `text`.

    If a row has several of these, the format that training would detect decides; without one, the first is used.

    Raises:
        DataError: The row has none of these fields, or they hold something else.
    """
    fields = rename(row.values, {ours: theirs for ours, theirs in section.columns.items() if theirs in row.values})
    names = [
        format.keys[0]
        for format in FORMATS
        if fields.keys() >= set(format.keys)
        and section.format in ("auto", format.name)
        and format.name not in PREFERENCE_FORMATS
    ]
    is_recognised = len(names) == 1 and names[0] in _QUESTIONS and (section.format != "auto" or names[0] != "text")
    name = names[0] if is_recognised else next((name for name in _QUESTIONS if name in fields), "")
    try:
        return _question(fields, name, row, drops_reasoning=section.reasoning == "drop")
    except RowError as error:
        fix = f"give a prompt, messages, conversations, an instruction or text{'' if name else header_fix(row.where)}"
        raise DataError(Problem(Code.DATA_FIELD, str(error), row.where, fix=fix)) from None


def _question(fields: Mapping[str, Any], name: str, row: Row, *, drops_reasoning: bool) -> Question:
    if not name:
        raise RowError(f"the row has no prompt; its fields are {formats.quote(row.values)}")
    tools, arguments = parse_tools(fields), parse_arguments(fields)
    if name == "text" or (name == "prompt" and not isinstance(formats.messages_or_text(fields, name), list)):
        return Question(formats.text(fields, name), tools, arguments)
    turns = parsers.parse_turns(fields, name) if name == "prompt" else parsers.prompt_turns(fields, name)
    if name in ("messages", "conversations") and turns[-1].message["role"] == "assistant":
        turns = turns[:-1]
    if not turns:
        raise RowError("no message comes before the answer")
    messages = [turn.message for turn in turns]
    return Question([*map(reasoning.without, messages)] if drops_reasoning else messages, tools, arguments)
