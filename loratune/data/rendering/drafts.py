"""Texts on their way to rows: what a chat template makes of messages, worked out in a process of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loratune.data.formats import Conversation, Plain
from loratune.data.rendering.template import Chat, Template
from loratune.data.rendering.tokens import Span
from loratune.data.rendering.turns import Turns, locate
from loratune.data.sources import MAX_PROBLEMS
from loratune.errors import DataError, Problem
from loratune.system.sandbox import Beat


@dataclass(frozen=True)
class Draft:
    """Text on its way to a row. text: the prompt and what follows it; spans: ranges of characters that are learnt;
    asked: there is a prompt, be it an empty one."""

    where: str
    text: str
    prompt: int
    spans: tuple[Span, ...]
    templated: bool
    asked: bool = True


def plain(example: Plain) -> Draft:
    """The draft of a prompt and its completion."""
    text, border = example.prompt + example.completion, len(example.prompt)
    return Draft(example.where, text, border, ((border, len(text)),), False, not example.whole)


class Drafting:
    """Renders messages with the chat template of one tokenizer. Each method tells the number of the chat it is at."""

    def __init__(self, tokenizer: Any, beat: Beat):
        self._template, self._beat = Template(tokenizer), beat

    def ends(self, chats: Sequence[Chat]) -> tuple[str, ...]:
        """The special tokens that end an answer, of whatever chat."""
        return self._template.ends

    def remark(self, chats: Sequence[Chat]) -> str | None:
        """What is odd about the end of answers, of whatever chat; see `Template.remark`."""
        return self._template.remark

    def asked(self, chats: Sequence[Chat]) -> str:
        """The text of the first chat as a prompt. Raises DataError: the template refuses it, or leaves its tools
        out."""
        chat = chats[0]
        self._beat(0)
        if chat.tools and not self._template.shows_tools:
            raise chat.problem("the chat template leaves out the `tools` of the row")
        return self._template.text(chat, prompt=True)

    def drafts(self, chats: Sequence[Conversation], loss_on: str) -> list[Draft]:
        """The texts of rows. Raises DataError, with the first 10 rows that cannot be rendered."""
        made: list[Draft] = []
        problems: list[Problem] = []
        for number, example in enumerate(chats):
            self._beat(number)
            try:
                made.append(self._draft(example, loss_on))
            except DataError as error:
                problems += error.problems
                if len(problems) >= MAX_PROBLEMS:
                    break
        if problems:
            raise DataError(problems[:MAX_PROBLEMS])
        return made

    def _draft(self, example: Conversation, loss_on: str) -> Draft:
        learnt: Sequence[int] = example.supervised_turns(loss_on)
        if loss_on == "all":
            learnt = [number for number, message in enumerate(example.messages) if message["role"] == "assistant"][-1:]
        if not learnt:
            raise DataError(Problem("no assistant turn is learnt", example.where))
        turns: Turns = locate(self._template, Chat(example.messages, example.tools, example.where), learnt)
        return Draft(example.where, turns.text, turns.prompt, turns.spans, True)
