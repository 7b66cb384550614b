"""The chat template of a model: messages → text, and where in the text the content and the turn of each message end."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from loratune.codes import Code
from loratune.data.formats import Message
from loratune.data.rendering.encoding import Span
from loratune.data.rendering.loop_marks import CONTENT, MANY, MARK, MarkedTemplate, RenderedMessages, read_marks
from loratune.data.upstream import alias_reasoning_fields, generation_ranges
from loratune.errors import DataError, ModelError, Problem
from loratune.system.templates import TEMPLATE_ERRORS, template_error_reason

KEY = "data.chat_template"
OTHER_FILE = "set data.chat_template to another Jinja file"

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REFUSALS = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError,
)  # fmt: skip
_QUESTION = {"role": "user", "content": "loratune?"}
_ANSWER = {"role": "assistant", "content": "loratune!"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "loratune_tool",
        "description": "loratune",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}},
    },
}


@dataclass(frozen=True)
class TemplateInput:
    """What a template renders: messages, the schemas of their tools, and the place of the row for error messages."""

    messages: Sequence[Message]
    tools: Sequence[Any] = ()
    where: str = ""

    def first(self, count: int) -> "TemplateInput":
        """Returns the same with the first `count` messages only."""
        return TemplateInput(self.messages[:count], self.tools, self.where)

    def name(self, number: int) -> str:
        """Returns the name of a message for users, who count from 1."""
        return f"message {number + 1} ({self.messages[number]['role']})"

    def error(self, code: Code, what: str, needed: str, otherwise: str = "") -> DataError:
        """Returns an error about this row in this template. needed: what the template must do; otherwise: the row."""
        fix = f"set data.chat_template to a template that {needed}{f', or {otherwise}' if otherwise else ''}"
        return DataError(Problem(code, what, self.where, KEY, fix))


class ChatTemplate:
    """The chat template of one tokenizer.

    Attributes:
        end_tokens: The special tokens that end an answer, that of a last answer first; empty if there are none.
        closing: What the template writes after the content of a last answer, to the end of its turn.
    """

    def __init__(self, tokenizer: Any):
        """Compile the template, if there is one, and find out how it ends answers; it need not be one that compiles."""
        self._tokenizer = tokenizer
        self._source = str(tokenizer.chat_template or "")
        self._special_tokens = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._syntax_error = ""
        self._marked_template = self._mark_loops()
        self.end_tokens, self.closing = self._find_ends()
        choice = "|".join(map(re.escape, sorted(self.end_tokens, key=len, reverse=True)))
        self._end = re.compile(rf"\s*(?:{choice})" if self.end_tokens else r"(?!)")

    def text(self, chat: TemplateInput, *, prompt: bool = False) -> str:
        """Render messages.

        Args:
            chat: The messages.
            prompt: Whether an answer is to follow, so that the template writes its header.

        Raises:
            ModelError: The tokenizer has no template, or one that cannot be compiled.
            DataError: The template refuses the messages.
        """
        return self._render(chat, lambda messages: self._apply(messages, prompt))

    def render(self, chat: TemplateInput, *, prompt: bool = False) -> RenderedMessages:
        """Render messages, and find where in the text each content and each turn ends. Raises as `text` does.

        The messages are rendered a second time with marks: by the template whose loops are marked too, and where that
        gives another text, by the template itself.
        """
        text = self.text(chat, prompt=prompt)
        if len(chat.messages) > MANY or MARK.search(text):
            return RenderedMessages(text, marked=False)
        marked_template = self._marked_template
        renderings: list[Callable[[TemplateInput], str]] = [lambda messages: self._apply(messages, prompt)]
        if marked_template is not None:
            renderings.insert(0, lambda messages: marked_template.render(self._values(messages, prompt)))
        for rendering in renderings:
            try:
                marked = self._render(_with_marks(chat), rendering)
            except DataError:
                continue
            if MARK.sub("", marked) == text and (rendered := read_marks(marked, text)) is not None:
                return rendered
        return RenderedMessages(text, marked=False)

    def turn_end(self, rendered: RenderedMessages, number: int, start: int) -> int | None:
        """Find where the turn of a message ends, as its own iteration of the loop writes it.

        It ends with the last character that is no space, or with the end of sequence, because no text is generated
        after that.

        Args:
            rendered: The text.
            number: The number of the message.
            start: A position in the turn that lies before its end.

        Returns:
            The position, or None where it is not known.
        """
        if (limit := rendered.turn_ends.get(number)) is None:
            return None
        start = max(start, rendered.content_ends.get(number, 0))
        end = start + len(rendered.text[start:limit].rstrip())
        eos_start = rendered.text.find(eos, start, end) if (eos := self._tokenizer.eos_token) else -1
        return eos_start + len(eos) if eos_start >= 0 else end

    def end_at(self, text: str, position: int) -> int | None:
        """Returns where the end of turn at a position ends, leaving out space before it."""
        match = self._end.match(text, position)
        return match.end() if match else None

    def last_end(self, text: str, position: int) -> int:
        """Returns where the last end of turn after a position ends, or the end of the text where there is none."""
        ends = [start + len(token) for token in self.end_tokens if (start := text.rfind(token, position)) >= 0]
        return max(ends, default=len(text.rstrip()))

    def generated(self, chat: TemplateInput) -> list[Span] | None:
        """Returns the ranges of the text that the template marks as answers, or None if it never marks any."""
        if not _GENERATION.search(self._source):
            return None
        source = self._tokenizer.get_chat_template(None, list(chat.tools) or None)
        return generation_ranges(chat.messages, chat.tools, source, self._tokenizer.special_tokens_map)

    @cached_property
    def opening(self) -> str | None:
        """What is between a user's last word and the answer: the end of the turn, and the header of the next."""
        rendered = self._probe([_QUESTION], prompt=True)
        return rendered.text[rendered.content_ends[0] :] if rendered and 0 in rendered.content_ends else None

    @cached_property
    def header(self) -> str | None:
        """What the template writes after a user's turn to begin an answer; None where that is not known."""
        rendered = self._probe([_QUESTION], prompt=True)
        return rendered.text[rendered.turn_ends[0] :] if rendered is not None and 0 in rendered.turn_ends else None

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the template renders the schemas of tools."""
        rendered = self._probe([_QUESTION], tools=(_TOOL,))
        return rendered is None or "loratune_tool" in rendered.text

    @property
    def remark_on_ends(self) -> str | None:
        """A line for the user where the template does not end answers as they are trained; None where it does.

        An answer is supervised up to the end of its turn, where `generate` stops. What the template writes behind the
        turns is not, because it would teach the model to go on.
        """
        rendered, eos = self._probe([_QUESTION, _ANSWER]), str(self._tokenizer.eos_token)
        if rendered is None or 1 not in rendered.content_ends:
            return None
        end = self.turn_end(rendered, 1, 0)
        footer = rendered.text[max(rendered.turn_ends.values()) :].strip() if rendered.turn_ends else ""
        footer = "" if footer.startswith(eos) else footer
        end_token = self._special_token_at_end(rendered.text[:end].rstrip())
        has_eos = rendered.text[end:].lstrip().startswith(eos)
        lines = [] if end_token or has_eos else [f"answers end in {eos}, which the chat template does not write"]
        if footer:
            lines.append(f"what the chat template writes after the last turn is not supervised: {footer[:80]!r}")
        return "; ".join(lines) or None

    def _probe(
        self, messages: list[Message], *, tools: tuple[Any, ...] = (), prompt: bool = False
    ) -> RenderedMessages | None:
        """Render messages of our own; None where the template refuses them, or there is none."""
        if not self._tokenizer.chat_template or self._syntax_error:
            return None
        try:
            return self.render(TemplateInput(messages, tools), prompt=prompt)
        except DataError:
            return None

    def _find_ends(self) -> tuple[tuple[str, ...], str]:
        """Returns `end_tokens` and `closing`, from conversations of our own."""
        rendered = (
            self._probe([_QUESTION, _ANSWER, _QUESTION, _ANSWER])
            or self._probe([_QUESTION, _ANSWER])
            or self._probe([_ANSWER])
        )
        answers = [number for number in sorted(rendered.content_ends, reverse=True) if number % 2] if rendered else []
        if rendered is None or not answers:
            return (), ""
        text, content_ends = rendered.text, rendered.content_ends
        ends = [self.turn_end(rendered, number, 0) for number in answers]
        closing = text[content_ends[answers[0]] : ends[0] or len(text.rstrip())]
        tokens = [self._special_token_at_end(closing)]
        for number, end in zip(answers[1:], ends[1:], strict=True):
            if end is not None:
                tokens.append(self._special_token_at_end(text[content_ends[number] : end]))
        others = [token for token in tokens[1:] if token not in closing]
        return tuple(dict.fromkeys(filter(None, [tokens[0], *others]))), closing

    def _special_token_at_end(self, text: str) -> str:
        return next((token for token in self._special_tokens if text.endswith(token)), "")

    def _mark_loops(self) -> MarkedTemplate | None:
        """Returns the template with its loops marked; None where there is none, or the tokenizer has several."""
        if not isinstance(self._tokenizer.chat_template, str):
            return None
        try:
            return MarkedTemplate(self._source)
        except TEMPLATE_ERRORS as error:
            self._syntax_error = template_error_reason(error)
            return None

    def _render(self, chat: TemplateInput, rendering: Callable[[TemplateInput], str]) -> str:
        """Render messages in one way or another. Raises as `text` does."""
        name = self._tokenizer.name_or_path
        if not self._tokenizer.chat_template:
            what = "the tokenizer has no chat template"
            fix = "set data.chat_template to a Jinja file, or give prompt and completion as text"
            raise ModelError(Problem(Code.TEMPLATE_MISSING, what, name, fix=fix))
        if self._syntax_error:
            what = f"the chat template is not a Jinja template: {self._syntax_error}"
            raise ModelError(Problem(Code.TEMPLATE_INVALID, what, name, KEY, OTHER_FILE))
        try:
            return rendering(chat)
        except _REFUSALS as error:
            if isinstance(error, TypeError) and any("tool_calls" in message for message in chat.messages):
                try:  # a few templates add the arguments of a call to a string
                    return rendering(_with_arguments_as_text(chat))
                except _REFUSALS:
                    pass
            what = f"the chat template refuses these messages: {error}"
            fix = "correct the row, or set data.chat_template to a template that accepts it"
            raise DataError(Problem(Code.TEMPLATE_INVALID, what, chat.where, fix=fix)) from None

    def _values(self, chat: TemplateInput, prompt: bool) -> dict[str, Any]:
        """Returns the variables that `apply_chat_template` gives to a template."""
        return {
            "messages": alias_reasoning_fields(chat.messages),
            "tools": list(chat.tools) or None,
            "documents": None,
            "add_generation_prompt": prompt,
            **self._tokenizer.special_tokens_map,
        }

    def _apply(self, chat: TemplateInput, prompt: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(
            list(chat.messages), tools=list(chat.tools) or None, tokenize=False, add_generation_prompt=prompt
        )
        return text


def _with_marks(chat: TemplateInput) -> TemplateInput:
    """Returns the messages with a mark at the end of each content, before the space around it."""
    messages = []
    for number, message in enumerate(chat.messages):
        content = message["content"]
        end = len(content.rstrip())
        marked = content[:end] + chr(CONTENT + number) + content[end:] if end else content
        messages.append({**message, "content": marked})
    return TemplateInput(messages, chat.tools, chat.where)


def _with_arguments_as_text(chat: TemplateInput) -> TemplateInput:
    """Returns the messages with the arguments of tool calls as JSON."""

    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": arguments}}

    messages = [
        {**message, "tool_calls": [as_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in chat.messages
    ]
    return TemplateInput(messages, chat.tools, chat.where)
