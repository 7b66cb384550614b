"""The chat template of a model: messages → text, with the positions where content and turn of each message end.

Nearly every chat template is a loop over the messages, with text before and after it. The output of an iteration is the
turn of its message: header, content, and the text or special tokens that close it. Output after the loop (a header for
the next answer, an end of the conversation) belongs to no turn.

Messages are therefore rendered a second time with marks: one at the end of each content and, in the syntax tree of the
template, one at the beginning of each iteration of every outermost loop and one after the loop. Loops inside macros,
and inside blocks whose output is stored in a variable, get no marks.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

from jinja2 import Template, TemplateSyntaxError, nodes

from loratune.codes import Code
from loratune.config.template_variables import variables
from loratune.data.formats import Message, Span
from loratune.data.formats.reasoning import EMPTY_REASONING, REASONING_OPENED
from loratune.data.rendering import sandbox
from loratune.data.rendering.samples import ANSWER, CALL, QUESTION, TOOL
from loratune.data.upstream import alias_reasoning_fields, generation_ranges
from loratune.errors import DataError, ModelError, Problem, template_error_reason

_log = logging.getLogger(__name__)

KEY = "data.chat_template"
OTHER_FILE = "set data.chat_template to another Jinja file"
CONTENT, LOOP = 0xF0000, 0x100000
"""First code points of two private-use planes: marks of contents, and marks of loops."""
MANY = 0xFFFE
"""The number of marks of either kind."""
MARK = re.compile(f"[{chr(CONTENT)}-{chr(CONTENT + MANY - 1)}{chr(LOOP)}-{chr(LOOP + MANY - 1)}]")

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class TemplateInput:
    """The input of a template: messages, tool schemas, and the place of the row for error messages."""

    messages: Sequence[Message]
    tools: Sequence[Any] = ()
    where: str = ""

    def first(self, count: int) -> "TemplateInput":
        """Returns the input with the first `count` messages only."""
        return TemplateInput(self.messages[:count], self.tools, self.where)

    def name(self, number: int) -> str:
        """Returns the name of a message for users, who count from 1."""
        return f"message {number + 1} ({self.messages[number]['role']})"

    def error(self, code: Code, what: str, needed: str, otherwise: str = "") -> DataError:
        """Returns an error about this row. needed: what the template must do; otherwise: another fix, in the row."""
        fix = f"set data.chat_template to a template that {needed}{f', or {otherwise}' if otherwise else ''}"
        return DataError(Problem(code, what, self.where, KEY, fix))


@dataclass(frozen=True)
class RenderedMessages:
    """A rendered text, with positions by message number; messages whose position is unknown are missing.

    Attributes:
        text: The text.
        marked: Whether positions are known. They are unknown if the template renders messages with marks differently.
        content_ends: Message number → end of its content, without surrounding white space. Messages without content,
            and messages that the template omits, are missing.
        turn_starts: Message number → start of its iteration.
        turn_ends: Message number → end of its iteration.
    """

    text: str
    marked: bool = True
    content_ends: dict[int, int] = field(default_factory=dict)
    turn_starts: dict[int, int] = field(default_factory=dict)
    turn_ends: dict[int, int] = field(default_factory=dict)


class ChatTemplate:
    """The chat template of one tokenizer.

    Attributes:
        end_tokens: The special tokens that end an answer, the one after a last answer first; empty if there are none.
        sources: The templates; a tokenizer may have a separate one for tools.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any] = MappingProxyType({})):
        """Compile the template, if there is one, and find the tokens that end answers. Raises no syntax errors yet.

        arguments: further variables of the template.
        """
        self._tokenizer, self._arguments = tokenizer, dict(arguments)
        source = tokenizer.chat_template or ""
        self.sources: list[str] = [*source.values()] if isinstance(source, dict) else [source]
        self._special_tokens = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._syntax_error, self._plain, self._marked = "", dict[str, Template](), dict[str, Template]()
        try:
            self._plain = {source: _compiled(source) for source in self.sources}
            self._marked = {source: _compiled(source, marked=True) for source in self.sources}
        except (TemplateSyntaxError, SyntaxError, RecursionError, ValueError, OverflowError) as error:
            self._syntax_error = template_error_reason(error)
        self.end_tokens = self._find_end_tokens()

    def text(self, chat: TemplateInput, *, prompt: bool = False) -> str:
        """Render messages.

        Args:
            chat: The messages.
            prompt: Whether to add the generation prompt, the header of an answer.

        Raises:
            ModelError: The tokenizer has no template, or one that cannot be compiled.
            DataError: The template refuses the messages, or an operation of it is too large.
        """
        name = self._tokenizer.name_or_path
        if not self._tokenizer.chat_template:
            what = "the tokenizer has no chat template"
            fix = "set data.chat_template to a Jinja file, or give prompt and completion as text"
            raise ModelError(Problem(Code.TEMPLATE_MISSING, what, name, fix=fix))
        if self._syntax_error:
            what = f"the chat template is not a Jinja template: {self._syntax_error}"
            raise ModelError(Problem(Code.TEMPLATE_INVALID, what, name, KEY, OTHER_FILE))
        try:
            return self._render_bounded(self._plain, chat, chat.messages, prompt)
        except Exception as error:  # a template may fail in any way
            what = f"the chat template refuses these messages: {template_error_reason(error)}"
            fix = "correct the row, or set data.chat_template to a template that accepts it"
            raise DataError(Problem(Code.TEMPLATE_INVALID, what, chat.where, fix=fix)) from None

    def render(self, chat: TemplateInput, *, prompt: bool = False) -> RenderedMessages:
        """Render messages, and find where in the text each content and each turn ends. Raises as `text` does."""
        text = self.text(chat, prompt=prompt)
        if len(chat.messages) <= MANY and not MARK.search(text):
            try:
                marked = self._render_bounded(self._marked, chat, _with_marks(chat.messages), prompt)
            except Exception:  # a template may fail on marks alone
                _log.debug("the chat template fails on messages with marks", exc_info=True)
                return RenderedMessages(text, marked=False)
            if MARK.sub("", marked) == text and (rendered := read_marks(marked, text)) is not None:
                return rendered
        return RenderedMessages(text, marked=False)

    def turn_end(self, rendered: RenderedMessages, number: int, start: int) -> int | None:
        """Find where the turn of a message ends within its iteration of the loop.

        It ends after the last non-space character, or after the end-of-sequence token, as generation stops there.

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

    def last_end(self, text: str, position: int) -> int:
        """Returns the end of the last end-of-turn token after a position, or the end of the text if there is none."""
        ends = [start + len(token) for token in self.end_tokens if (start := text.rfind(token, position)) >= 0]
        return max(ends, default=len(text.rstrip()))

    def generated(self, chat: TemplateInput) -> list[Span] | None:
        """Returns the text ranges within `{% generation %}`, or None if the template has no such block."""
        if not any(map(_GENERATION.search, self.sources)):
            return None
        values = self._tokenizer.special_tokens_map | self._arguments
        return generation_ranges(chat.messages, chat.tools, self._source(chat), values)

    def user_header(self) -> str:
        """What the template writes before the content of a first turn of a user; empty without a template."""
        if not self._tokenizer.chat_template:
            return ""
        marker = "\u241fquestion\u241f"
        return self.text(TemplateInput([{"role": "user", "content": marker}])).partition(marker)[0]

    @cached_property
    def header(self) -> str:
        """The generation prompt after a user's turn; empty if it is not known."""
        rendered = self._probe([QUESTION], prompt=True)
        return rendered.text[rendered.turn_ends[0] :] if rendered is not None and 0 in rendered.turn_ends else ""

    @cached_property
    def unprompted_header(self) -> str:
        """What the template writes before an answer, but not in its prompt, as it ignores `add_generation_prompt`;
        empty if the prompt has it, or if it is white space."""
        rendered = None if self.header.strip() else self._probe([QUESTION, ANSWER])
        if rendered is None or 1 not in rendered.turn_starts or 1 not in rendered.content_ends:
            return ""
        return rendered.text[rendered.turn_starts[1] : rendered.content_ends[1] - len(ANSWER["content"])].strip()

    @cached_property
    def empties_reasoning(self) -> bool:
        """Whether an answer without reasoning begins with an empty block of it, or closes one that its prompt opens."""
        rendered, prompt = self._probe([QUESTION, ANSWER]), self._probe([QUESTION], prompt=True)
        if rendered is None or prompt is None or REASONING_OPENED.search(prompt.text):
            return rendered is not None and prompt is not None
        return bool(EMPTY_REASONING.match(rendered.text.removeprefix(prompt.text)))

    def split_reasoning(self, answer: str) -> tuple[str, str] | None:
        """The reasoning, which may be empty, and the rest of an answer as it was generated, with its special tokens;
        None if the answer closes no reasoning."""
        opened, closed = self.reasoning_tags
        if not closed or closed not in answer:
            return None
        reasoning, _, content = answer.partition(closed)
        return reasoning.strip().removeprefix(opened).strip(), content.lstrip()

    @cached_property
    def reasoning_tags(self) -> tuple[str, str]:
        """What the template writes before and after the reasoning of an answer, stripped; empty if not known."""
        reasoning = "loratune reasons."
        rendered = self._probe([QUESTION, {**ANSWER, "reasoning_content": reasoning}])
        prompt = self._probe([QUESTION], prompt=True)
        if rendered is None or prompt is None:
            return "", ""
        if (opened := REASONING_OPENED.search(prompt.text)) is not None:
            return f"<{opened[1]}>", f"</{opened[1]}>"
        before, found, after = rendered.text.removeprefix(prompt.text).partition(reasoning)
        closed = after.partition(ANSWER["content"])[0].strip()
        return (before.strip(), closed) if found and rendered.text.startswith(prompt.text) else ("", "")

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the template renders the schemas of tools."""
        rendered = self._probe([QUESTION], tools=(TOOL,))
        return rendered is None or "loratune_tool" in rendered.text

    def _render_bounded(
        self, templates: Mapping[str, Template], chat: TemplateInput, messages: Sequence[Message], prompt: bool
    ) -> str:
        """Render messages in the bounded sandbox, and note if that takes long.

        Args:
            templates: The compiled template for each of the sources.
            chat: The messages, their tools and their place.
            messages: The messages, with or without marks.
            prompt: Whether to add the generation prompt.

        Raises:
            OverflowError: An operation of the template is too large.
            Exception: The template fails in another way.
        """
        values = {
            "messages": alias_reasoning_fields(messages),
            "tools": list(chat.tools) or None,
            "documents": None,
            "add_generation_prompt": prompt,
            **self._tokenizer.special_tokens_map,
            **self._arguments,
        }
        of = f"the chat template of {name}" if (name := self._tokenizer.name_or_path) else "the chat template"
        with sandbox.reported(f"{chat.where or 'messages that test the template'}: {of} is still rendering"):
            return templates[self._source(chat)].render(**values)

    def _source(self, chat: TemplateInput) -> str:
        """The template that applies; a tokenizer may have a separate one for tools."""
        return str(self._tokenizer.get_chat_template(None, list(chat.tools) or None))

    def _probe(
        self, messages: list[Message], *, tools: tuple[Any, ...] = (), prompt: bool = False
    ) -> RenderedMessages | None:
        """Render test messages; None if the template refuses them, or is missing."""
        try:
            return self.render(TemplateInput(messages, tools), prompt=prompt)
        except (DataError, ModelError):
            return None

    def _find_end_tokens(self) -> tuple[str, ...]:
        """Returns `end_tokens`, from test conversations."""
        chats = ([QUESTION, ANSWER] * 2, [QUESTION, ANSWER], [ANSWER])
        rendered = next(filter(None, map(self._probe, chats)), None)
        answers = [number for number in sorted(rendered.content_ends, reverse=True) if number % 2] if rendered else []
        if rendered is None or not answers:
            return ()
        text, content_ends = rendered.text, rendered.content_ends
        ends = [self.turn_end(rendered, number, 0) for number in answers]
        closing = text[content_ends[answers[0]] : ends[0] or len(text.rstrip())]
        tokens = [self._special_token_at_end(closing)]
        for number, end in zip(answers[1:], ends[1:], strict=True):
            token = self._special_token_at_end(text[content_ends[number] : end]) if end is not None else ""
            tokens += [token] if token not in closing else []
        if (calls := self._probe([QUESTION, CALL], tools=(TOOL,))) is not None:
            tokens.append(self._special_token_at_end(calls.text.rstrip()))  # Gemma 4 ends calls with another token
        return tuple(dict.fromkeys(filter(None, tokens)))

    def _special_token_at_end(self, text: str) -> str:
        return next((token for token in self._special_tokens if text.endswith(token)), "")


def with_closed_reasoning(source: str, block: str) -> str:
    """The source of a template that writes an empty block of reasoning at the end of its prompts, unless
    `enable_thinking` is given; if it does not read that, unless it is true.

    The first line tests it before the template can set a default. The block is an expression, since white space around
    statements is removed.
    """
    is_switch = "enable_thinking" in variables(source)
    default = "enable_thinking is not defined" + ("" if is_switch else " or not enable_thinking")
    written = f"{json.dumps(block)} if add_generation_prompt and closes_reasoning else ''"
    return f"{{% set closes_reasoning = {default} %}}\n{source.removesuffix(chr(10))}{{{{ {written} }}}}"


# Marks


@dataclass
class _Iteration:
    """The output of one iteration of a loop. contents: the numbers of the messages whose content it contains."""

    loop: int
    start: int
    end: int = -1
    contents: list[int] = field(default_factory=list)


def _with_marks(messages: Sequence[Message]) -> list[Message]:
    """Returns the messages with a mark at the end of each content, before trailing white space."""
    marked = []
    for number, message in enumerate(messages):
        content = message["content"]
        end = len(content.rstrip())
        mark = chr(CONTENT + number) if end else ""
        marked.append({**message, "content": content[:end] + mark + content[end:]})
    return marked


@lru_cache(16)
def _compiled(source: str, *, marked: bool = False) -> Template:
    """Returns a template with bounded operations. marked: whether it has marks around the iterations of its loops.

    Raises:
        TemplateSyntaxError, SyntaxError, RecursionError, ValueError: The source is not a template, or has a number of
            too many digits.
        OverflowError: It has an operation on constants that is too large.
    """
    tree = sandbox.parse(source)
    if marked:
        _mark_loops_in(tree, iter(range(0, MANY - 1, 2)))
    return sandbox.compiled(tree)


def read_marks(marked: str, text: str) -> RenderedMessages | None:
    """Convert the marks in a text to positions in the text without marks; None if a content occurs twice."""
    content_ends: dict[int, int] = {}
    iterations: list[_Iteration] = []
    current: _Iteration | None = None
    for count, mark in enumerate(MARK.finditer(marked)):
        position, code = mark.start() - count, ord(mark.group())
        if code < LOOP:
            if code - CONTENT in content_ends:
                return None
            content_ends[code - CONTENT] = position
            if current is not None:
                current.contents.append(code - CONTENT)
            continue
        if current is not None:
            current.end, current = position, None
        if (code - LOOP) % 2 == 0:  # the odd marks come after loops
            current = _Iteration(code - LOOP, position)
            iterations.append(current)
    positions = RenderedMessages(text, content_ends=content_ends)
    for loop in {iteration.loop for iteration in iterations}:
        _assign([iteration for iteration in iterations if iteration.loop == loop], positions)
    return positions


def _assign(iterations: list[_Iteration], positions: RenderedMessages) -> None:
    """Assign the iterations of one loop to the messages that they contain, as their turns.

    An iteration without content marks (the message is empty, or the template rewrites its content) is assigned to the
    message between those of its neighbours, if there is one iteration per message.
    """
    shifts = {
        iteration.contents[-1] - number for number, iteration in enumerate(iterations) if iteration.contents
    }  # all equal if there is one iteration per message
    if len(shifts) == 1:
        for number, iteration in enumerate(iterations, start=shifts.pop()):
            positions.turn_starts[number], positions.turn_ends[number] = iteration.start, iteration.end
        return
    for iteration in iterations:
        if iteration.contents:
            positions.turn_ends[iteration.contents[-1]] = iteration.end
        if len(iteration.contents) == 1:
            positions.turn_starts[iteration.contents[0]] = iteration.start


def _mark_loops_in(node: nodes.Node, numbers: Iterator[int]) -> None:
    """Mark the loops whose output goes directly into the output of the template."""
    for name in ("body", "else_", "elif_"):
        children = getattr(node, name, None)
        if not isinstance(children, list):
            continue
        marked: list[nodes.Node] = []
        for child in children:
            marked.append(child)
            if isinstance(child, nodes.For) and (number := next(numbers, None)) is not None:
                child.body.insert(0, _output(chr(LOOP + number), child))
                marked.append(_output(chr(LOOP + number + 1), child))
            elif isinstance(child, nodes.If | nodes.With | nodes.Scope):
                _mark_loops_in(child, numbers)
        setattr(node, name, marked)


def _output(text: str, origin: nodes.Node) -> nodes.Node:
    """Returns a node that outputs a text, with the line number of another node."""
    return nodes.Output([nodes.TemplateData(text)]).set_lineno(origin.lineno)
