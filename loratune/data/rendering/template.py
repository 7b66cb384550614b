"""The model's own chat template: messages → text, with marks that show where in it the content of a message ends."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from loratune.data.formats import Message
from loratune.data.rendering.rounds import CONTENT, MANY, MARK, Rounds, places, with_reasoning
from loratune.data.rendering.tokens import Span
from loratune.errors import DataError, ModelError, Problem
from loratune.system.sandbox import TEMPLATE_ERRORS, template_error_reason

KEY = "data.chat_template"

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_ASKED = {"role": "user", "content": "loratune?"}
_SAID = {"role": "assistant", "content": "loratune!"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "loratune_tool",
        "description": "loratune",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}},
    },
}


@dataclass(frozen=True)
class Shown:
    """A rendered text. ends: number of a message → where its content, without the space around it, ends in the text.

    The ends are missing of messages without content and of those that the template leaves out. marked: whether they are
    known at all; they are not where the template renders messages with marks in another way than without. opens,
    closes: number of a message → where its turn begins and ends, as far as that is known; see `Rounds`.
    """

    text: str
    ends: dict[int, int]
    marked: bool = True
    opens: dict[int, int] = field(default_factory=dict)
    closes: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Chat:
    """What a template renders: messages, the schemas of their tools, and the place of the row for errors."""

    messages: Sequence[Message]
    tools: Sequence[Any] = ()
    where: str = ""

    def until(self, number: int) -> "Chat":
        """The first `number` messages."""
        return Chat(self.messages[:number], self.tools, self.where)

    def problem(self, what: str, number: int | None = None) -> DataError:
        """An error about the template and this row; number: of the message that is meant."""
        named = what if number is None else f"{what} message {number + 1} ({self.messages[number]['role']})"
        fix = "give a template that shows every message and appends turns"
        return DataError(Problem(named, self.where, KEY, fix))


class Template:
    """The chat template of one tokenizer.

    ends: the special tokens that end an answer, the one of a last answer first; empty if the template puts none.
    closing: what the template writes after the content of a last answer, to the end of its turn.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._source = str(tokenizer.chat_template or "")
        self._special = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._fault = ""
        self._marked_loops = self._rounds()
        self.ends, self.closing = self._ends()
        choice = "|".join(map(re.escape, sorted(self.ends, key=len, reverse=True)))
        self._end = re.compile(rf"\s*(?:{choice})" if self.ends else r"(?!)")

    def text(self, chat: Chat, *, prompt: bool = False) -> str:
        """The rendered messages; prompt: with what an answer follows, as `generate` needs it.

        Raises ModelError: the tokenizer has no template, or none that can be compiled. Raises DataError: the template
        refuses the messages.
        """
        return self._rendered(chat, lambda one: self._apply(one, prompt))

    def show(self, chat: Chat, *, prompt: bool = False) -> Shown:
        """The rendered messages, and where in them each content and each turn ends; errors as in `text`.

        The messages are rendered once more, with marks: by the template whose loops are marked too, and where that
        gives another text, by the template as it is.
        """
        text = self.text(chat, prompt=prompt)
        if len(chat.messages) > MANY or MARK.search(text):
            return Shown(text, {}, marked=False)
        rounds = self._marked_loops
        ways: list[Callable[[Chat], str]] = [lambda one: self._apply(one, prompt)]
        if rounds is not None:
            ways.insert(0, lambda one: rounds.render(self._values(one, prompt)))
        for way in ways:
            try:
                marked = self._rendered(_marked(chat), way)
            except DataError:
                continue
            if MARK.sub("", marked) == text and (found := places(marked)) is not None:
                return Shown(text, found.said, True, found.opens, found.closes)
        return Shown(text, {}, marked=False)

    def closed(self, shown: Shown, number: int, start: int) -> int | None:
        """Where the turn of a message ends, as its own round writes it; None where that is not known.

        It ends with the last character that is no space, or with the end of sequence, since no text is generated after
        it. start: a place in the turn that lies before its end.
        """
        if (close := shown.closes.get(number)) is None:
            return None
        start = max(start, shown.ends.get(number, 0))
        end = start + len(shown.text[start:close].rstrip())
        over = shown.text.find(eos, start, end) if (eos := self._tokenizer.eos_token) else -1
        return over + len(eos) if over >= 0 else end

    def end_at(self, text: str, place: int) -> int | None:
        """Where the end of turn ends that stands at a place of the text, space before it aside."""
        match = self._end.match(text, place)
        return match.end() if match else None

    def end_after(self, text: str, place: int) -> int | None:
        """Where the first end of turn after a place ends."""
        match = self._end.search(text, place)
        return match.end() if match else None

    def last_end(self, text: str, place: int) -> int:
        """Where the last end of turn after a place ends; the end of the text where there is none."""
        found = [start + len(end) for end in self.ends if (start := text.rfind(end, place)) >= 0]
        return max(found, default=len(text.rstrip()))

    def generated(self, chat: Chat) -> list[Span] | None:
        """The ranges of the rendered text that the template itself marks as answers; None if it marks none ever."""
        if not _GENERATION.search(self._source):
            return None
        _, ranges = render_jinja_template(
            conversations=[list(chat.messages)],
            tools=list(chat.tools) or None,
            chat_template=self._tokenizer.get_chat_template(None, list(chat.tools) or None),
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return [(start, end) for start, end in ranges[0]]

    @cached_property
    def opening(self) -> str | None:
        """What stands between a user's last word and the answer: the end of the turn, and the header of the next."""
        shown = self._probe([_ASKED], prompt=True)
        return shown.text[shown.ends[0] :] if shown and 0 in shown.ends else None

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the template renders the schemas of tools."""
        shown = self._probe([_ASKED], tools=(_TOOL,))
        return shown is None or "loratune_tool" in shown.text

    def _probe(self, messages: list[Message], *, tools: tuple[Any, ...] = (), prompt: bool = False) -> Shown | None:
        if not self._tokenizer.chat_template or self._fault:
            return None
        try:
            return self.show(Chat(messages, tools), prompt=prompt)
        except DataError:
            return None

    @property
    def remark(self) -> str | None:
        """A line about the end of answers where the template does not write it as it is learnt; None where it does.

        An answer is learnt to the end of its turn, and then `generate` must stop: what the template writes behind the
        turns would teach it to go on.
        """
        shown, eos = self._probe([_ASKED, _SAID]), str(self._tokenizer.eos_token)
        if shown is None or 1 not in shown.ends:
            return None
        close = self.closed(shown, 1, 0)
        footer = shown.text[max(shown.closes.values()) :].strip() if shown.closes else ""
        footer = "" if footer.startswith(eos) else footer
        written = self._special_at_end(shown.text[:close].rstrip()) or shown.text[close:].lstrip().startswith(eos)
        lines = [] if written else [f"answers end in {eos}, which the chat template does not write"]
        if footer:
            lines.append(f"what the chat template writes after the last turn is not learnt: {footer[:80]!r}")
        return "; ".join(lines) or None

    @cached_property
    def header(self) -> str | None:
        """What the template writes behind a user's turn where an answer is to follow; None where that is not known."""
        asked = self._probe([_ASKED], prompt=True)
        return asked.text[asked.closes[0] :] if asked is not None and 0 in asked.closes else None

    def _ends(self) -> tuple[tuple[str, ...], str]:
        """See the class. Where turns are not known, what follows the last answer belongs to no later turn."""
        shown = self._probe([_ASKED, _SAID, _ASKED, _SAID]) or self._probe([_ASKED, _SAID]) or self._probe([_SAID])
        answers = [number for number in sorted(shown.ends, reverse=True) if number % 2] if shown else []
        if shown is None or not answers:
            return (), ""
        closes = [self.closed(shown, number, 0) for number in answers]
        closing = shown.text[shown.ends[answers[0]] : closes[0] or len(shown.text.rstrip())]
        found = [self._special_at_end(closing)]
        for number, close in zip(answers[1:], closes[1:], strict=True):
            if close is not None:
                found.append(self._special_at_end(shown.text[shown.ends[number] : close]))
            elif found[0] and closes[0] is None:
                tail = shown.text[shown.ends[number] :].lstrip()
                found.append(next((token for token in self._special if tail.startswith(token)), ""))
        others = [token for token in found[1:] if token not in closing]
        return tuple(dict.fromkeys(filter(None, [found[0], *others]))), closing

    def _special_at_end(self, text: str) -> str:
        return next((token for token in self._special if text.endswith(token)), "")

    def _rounds(self) -> Rounds | None:
        """The template with its loops marked; None where it is none, or one of several that a tokenizer has."""
        if not isinstance(self._tokenizer.chat_template, str):
            return None
        try:
            return Rounds(self._source)
        except TEMPLATE_ERRORS as error:
            self._fault = f"is not a Jinja template: {template_error_reason(error)}"
            return None

    def _rendered(self, chat: Chat, render: Callable[[Chat], str]) -> str:
        """See `text`."""
        if not self._tokenizer.chat_template:
            fix = "set data.chat_template to a Jinja file, or use prompt and completion as text"
            raise ModelError(Problem("the tokenizer has no chat template", self._tokenizer.name_or_path, fix=fix))
        if self._fault:
            fix = "set data.chat_template to another Jinja file"
            raise ModelError(Problem(f"the chat template {self._fault}", self._tokenizer.name_or_path, KEY, fix))
        try:
            return render(chat)
        except _REFUSALS as error:
            if isinstance(error, TypeError) and any("tool_calls" in message for message in chat.messages):
                try:  # a few templates join the arguments of a call to text
                    return render(_with_arguments_as_text(chat))
                except _REFUSALS:
                    pass
            fix = "mend the row, or set data.chat_template to a template that takes it"
            raise DataError(
                Problem(f"the chat template refuses these messages: {error}", chat.where, fix=fix)
            ) from None

    def _values(self, chat: Chat, prompt: bool) -> dict[str, Any]:
        """What `apply_chat_template` gives to a template."""
        return {
            "messages": with_reasoning(chat.messages),
            "tools": list(chat.tools) or None,
            "documents": None,
            "add_generation_prompt": prompt,
            **self._tokenizer.special_tokens_map,
        }

    def _apply(self, chat: Chat, prompt: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(
            list(chat.messages), tools=list(chat.tools) or None, tokenize=False, add_generation_prompt=prompt
        )
        return text


def _marked(chat: Chat) -> Chat:
    messages = []
    for number, message in enumerate(chat.messages):
        content = message["content"]
        end = len(content.rstrip())
        marked = content[:end] + chr(CONTENT + number) + content[end:] if end else content
        messages.append({**message, "content": marked})
    return Chat(messages, chat.tools, chat.where)


def _with_arguments_as_text(chat: Chat) -> Chat:
    def text(call: dict[str, Any]) -> dict[str, Any]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": arguments}}

    messages = [
        {**message, "tool_calls": [text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in chat.messages
    ]
    return Chat(messages, chat.tools, chat.where)
