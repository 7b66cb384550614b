"""Finds the supervised answers in the rendered text of a conversation: each from after its header to its end of turn.

A row is the prompt that `generate` would be given before the last supervised answer, and that answer. Where the
template writes the same history in both, this is the text of all messages. Where it does not (a system prompt that
moves to the last question, a prompt that opens the reasoning), the answer is taken from the text of all messages and
put after the prompt.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loratune.codes import Code
from loratune.data.formats import Message
from loratune.data.rendering.chat_template import ChatTemplate, TemplateInput
from loratune.data.rendering.encoding import Span
from loratune.data.rendering.loop_marks import RenderedMessages
from loratune.errors import DataError

_REASONING_OPENED = re.compile(r"<(think|thinking|thought|thoughts|reason|reasoning)>\s*\Z")
_REASONING_IN_CONTENT = re.compile(r"\s*<think>(.*)</think>", re.DOTALL)
_REASONING_TAGS = re.compile(r"\s*<\w+>\s*(</\w+>\s*)?")
_INCOMPLETE_TAG = re.compile(r"<[|/]?\w*\Z")
_CLOSING_TAG = re.compile(r"</\w+>|<\w+\|>|\[/\w+\]")


@dataclass(frozen=True)
class RenderedText:
    """The text of a row before it is encoded.

    Attributes:
        where: The place of the row in its file, for messages.
        text: The prompt and what follows it.
        prompt: The number of characters of the prompt.
        spans: The supervised ranges of characters.
        templated: Whether a chat template wrote the text.
        has_prompt: Whether the row answers a prompt, which may be empty.
    """

    where: str
    text: str
    prompt: int
    spans: tuple[Span, ...]
    templated: bool
    has_prompt: bool = True


def render_conversation(template: ChatTemplate, chat: TemplateInput, supervised: Sequence[int]) -> RenderedText:
    """Render the messages up to the last supervised answer, and find every supervised answer.

    Args:
        template: The chat template.
        chat: The conversation.
        supervised: The numbers of the supervised messages, in order; not empty.

    Raises:
        DataError: The template refuses the messages, leaves out what is supervised, or hides where it lies.
    """
    last = supervised[-1]
    chat = chat.first(last + 1)
    whole = template.render(chat)
    _check_tools(template, chat, whole)
    prompt = _prompt(template, chat)
    if prompt is not None and not whole.text.startswith(prompt):
        rendered = _answer_after_other_prompt(template, chat, supervised, whole)
    else:
        finder = _TurnFinder(template, chat, whole)
        start = finder.start(last)[0] if prompt is None else len(prompt)
        answer = finder.find(last, start)
        earlier = ((turn.start, turn.end) for turn in map(finder.find, supervised[:-1]))
        spans = _within_generation_marks(template, chat, [*earlier, (start, answer.end)])
        rendered = RenderedText(chat.where, whole.text[: answer.end], start, spans, templated=True)
    if (reasoning := _reasoning(chat.messages[last])) and reasoning not in rendered.text[rendered.prompt :]:
        what = f"the chat template leaves out the reasoning of {chat.name(last)}"
        raise chat.error(Code.TEMPLATE_OMITS, what, "renders it", "take it out of the rows")
    return rendered


def check_tools_are_shown(template: ChatTemplate, chat: TemplateInput) -> None:
    """Check that the template renders the tools of a row, if it has any. Raises DataError."""
    if chat.tools and not template.shows_tools:
        what, needed = "the chat template leaves out the `tools` of the row", "renders tools"
        raise chat.error(Code.TEMPLATE_OMITS, what, needed, "take `tools` out of the rows")


def _check_tools(template: ChatTemplate, chat: TemplateInput, whole: RenderedMessages) -> None:
    """Check that the tools, and the results of tool calls, are in the text. Raises DataError."""
    check_tools_are_shown(template, chat)
    for number, message in enumerate(chat.messages):
        if message["role"] == "tool" and number not in whole.content_ends:
            content = message["content"].strip()
            if content not in whole.text and json.dumps(content, ensure_ascii=False)[1:-1] not in whole.text:
                what = f"the chat template leaves out {chat.name(number)}"
                raise chat.error(Code.TEMPLATE_OMITS, what, "renders results of tool calls")


def _prompt(template: ChatTemplate, chat: TemplateInput) -> str | None:
    """Returns what `generate` is given before the last answer, or None if the template has no prompt for it."""
    if len(chat.messages) == 1:
        return None
    try:
        return template.text(chat.first(len(chat.messages) - 1), prompt=True)
    except DataError:
        return None


def _answer_after_other_prompt(
    template: ChatTemplate, chat: TemplateInput, supervised: Sequence[int], whole: RenderedMessages
) -> RenderedText:
    """Render a row whose prompt the template writes in another way before the answer than with it.

    Mistral-Nemo moves the system prompt to the last question; DeepSeek-R1 ends the prompt in `<think>`, which the
    rendered answer lacks.
    """
    last = supervised[-1]
    history = template.render(chat.first(last), prompt=True)
    finder = _TurnFinder(template, chat, whole)
    start, prompt_tail = finder.start(last, history)
    closed = bool(_CLOSING_TAG.search(prompt_tail))
    if prompt_tail.strip() and not closed and not _REASONING_OPENED.search(prompt_tail):
        ending = f"the chat template ends the prompt in {prompt_tail.strip()!r}"
        what = f"{ending}, which it does not write in the answer of {chat.name(last)}"
        raise chat.error(Code.TEMPLATE_ANSWER, what, "begins answers as it ends prompts")
    answer = finder.find(last, start, reasoning_closed=closed)
    text = _continuation(prompt_tail, chat.messages[last], whole.text, answer)
    border = len(history.text)
    ((mark_start, _),) = _within_generation_marks(template, chat, [(answer.start, answer.end)])
    has_mark = text.endswith(whole.text[mark_start : answer.end]) and not prompt_tail.strip()
    start_in_text = mark_start - answer.start if has_mark else 0
    spans: list[Span] = [(border + start_in_text, border + len(text))]
    if supervised[:-1]:
        turns = map(_TurnFinder(template, chat, history).find, supervised[:-1])
        earlier = [(turn.start, turn.end) for turn in turns]
        spans[:0] = _within_generation_marks(template, chat.first(last), earlier)
    return RenderedText(chat.where, history.text + text, border, tuple(spans), templated=True)


def _within_generation_marks(template: ChatTemplate, chat: TemplateInput, spans: Sequence[Span]) -> tuple[Span, ...]:
    """Begin each span where the template's `{% generation %}` mark in it begins; its end stays.

    Spans without a mark in them are left out.

    Raises:
        DataError: The last span has no mark in it.
    """
    ranges = template.generated(chat)
    if ranges is None:
        return tuple(spans)
    starts = [next((first for first, after in ranges if first < end and start < after), None) for start, end in spans]
    if not starts or starts[-1] is None:
        what = f"the chat template's {{% generation %}} marks leave out {chat.name(len(chat.messages) - 1)}"
        raise chat.error(Code.TEMPLATE_ANSWER, what, "marks every answer, or has no such marks")
    pairs = zip(starts, spans, strict=True)
    return tuple((max(start, first), end) for first, (start, end) in pairs if first is not None)


def _reasoning(message: Message) -> str:
    """Returns the reasoning that comes with an answer, in a field of its own or before its content."""
    in_content = _REASONING_IN_CONTENT.match(message["content"])
    text = message.get("reasoning_content") or message.get("thinking") or (in_content[1] if in_content else "")
    return str(text).strip()


@dataclass(frozen=True)
class _TurnSpan:
    """Positions of a turn in a text. content_end: None where it is not known."""

    start: int
    content_end: int | None
    end: int


def _continuation(prompt_tail: str, message: Message, text: str, answer: _TurnSpan) -> str:
    """Returns the answer as it follows a prompt whose end is not in the text of all messages.

    prompt_tail: the end that is missing there, e.g. `<think>`.
    """
    answer_text = text[answer.start : answer.end]
    # `<think>\n` of Qwen3.5 or DeepSeek-R1: the reasoning comes first, and is empty where the answer has none.
    tag = _REASONING_OPENED.search(prompt_tail)
    if tag is None:
        return answer_text
    content, closing_tag = message["content"].strip(), f"</{tag[1]}>"
    if closing_tag in content and answer.content_end is not None:
        inner: str = content.removeprefix(f"<{tag[1]}>").removeprefix("\n")
        return inner + text[answer.content_end : answer.end]
    return f"{_reasoning(message)}\n{closing_tag}\n\n{answer_text}"


def _written_forms(content: str) -> Iterator[str]:
    """Yields how a template may write a content without changing what it says: unchanged, or within JSON."""
    yield content
    for ascii_alone in (False, True):
        yield json.dumps(content, ensure_ascii=ascii_alone)[1:-1]


def _common_prefix(text: str, other: str) -> int:
    """Returns how many characters two texts have in common at their beginning."""
    pairs = zip(text, other, strict=False)
    return next((place for place, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(text), len(other)))


def _common_header(header: str, text: str) -> int:
    """Returns how much of a header a text begins with, leaving out a tag that is only begun."""
    return len(_INCOMPLETE_TAG.sub("", header[: _common_prefix(header, text)]))


class _TurnFinder:
    """Finds turns in one rendered text of a conversation."""

    def __init__(self, template: ChatTemplate, chat: TemplateInput, rendered: RenderedMessages):
        self._template, self._chat, self._rendered = template, chat, rendered

    def find(self, number: int, start: int | None = None, reasoning_closed: bool = False) -> _TurnSpan:
        """Find the turn of a message, and verify that it shows what the message says.

        Args:
            number: The number of the message.
            start: Where the turn begins, if that is known.
            reasoning_closed: Whether the prompt has closed the reasoning, so that only content may follow.

        Raises:
            DataError: The template hides the answer, or leaves out a tool call.
        """
        text, message = self._rendered.text, self._chat.messages[number]
        content = self._content_start(number)
        if start is None:
            start, prompt_tail = self.start(number)
            reasoning_closed = bool(prompt_tail)
        if reasoning_closed and content is not None:
            start = self._past_reasoning(number, start, content)
        end = self._end(number, start)
        calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
        if any(name not in text[start:end] for name in calls):
            what = f"the chat template leaves out the tool calls of {self._chat.name(number)}"
            raise self._chat.error(Code.TEMPLATE_OMITS, what, "renders tool calls")
        is_missing = content is None and bool(message["content"].strip()) and not calls
        if is_missing and (self._rendered.marked or message["content"].strip() not in text[start:end]):
            raise self._hidden(number)
        starts_inside = content is not None and content < start and not _REASONING_OPENED.fullmatch(text[content:start])
        if end < start or starts_inside:
            raise self._hidden(number)
        return _TurnSpan(start, self._rendered.content_ends.get(number), end)

    def start(self, number: int, prompt: RenderedMessages | None = None) -> tuple[int, str]:
        """Find where an answer begins, after its header.

        Args:
            number: The number of the message.
            prompt: The prompt for the answer, if it has been rendered already.

        Returns:
            The position, and the end of the prompt for the answer that this text lacks.
        """
        text, content = self._rendered.text, self._content_start(number)
        before, begin = self._rendered.content_ends.get(number - 1), self._rendered.turn_starts.get(number)
        if content is not None and begin is not None and before is not None and begin < before:
            return self._after_header(number, content)  # the template does not write turns in their order
        # The usual case is a question, its end of turn and a header: then no prompt needs to be rendered.
        if before is not None and prompt is None and (usual := self._after_question(number, before)) is not None:
            return usual
        if prompt is None and number:
            prompt = self._prompt(number)
        before_in_prompt = prompt.content_ends.get(number - 1) if prompt else None
        # The header as the prompt has it is compared with what follows the message before: Qwen3 shows `<think>` in
        # only one of the two.
        if prompt is not None and before is not None and before_in_prompt is not None:
            header = prompt.text[before_in_prompt:]
            following = text[before : before + len(header)]
            common = len(header) if following == header else _common_header(header, following)
            if common or not header:
                return before + common if content is None else min(before + common, content), header[common:]
        if prompt is not None and text.startswith(prompt.text):
            return len(prompt.text), ""
        if content is None:
            raise self._hidden(number)
        return self._after_header(number, content)

    def _after_header(self, number: int, content: int) -> tuple[int, str]:
        """`start`, by the header with which the template prompts for any answer, within the turn of this one."""
        text, header, begin = self._rendered.text, self._template.header, self._rendered.turn_starts.get(number)
        if begin is None or header is None:
            return content, ""
        if (place := text.find(header, begin, content)) >= 0:
            return place + len(header), ""
        common = _common_header(header, text[begin : begin + len(header)])
        if not common and text[begin:content].strip():
            raise self._hidden(number)
        return min(begin + common, content), header[common:] if common else ""

    def _after_question(self, number: int, before: int) -> tuple[int, str] | None:
        """`start`, where a user's turn ends at `before` and the usual header follows, but for tags of reasoning."""
        question, opening = self._chat.messages[number - 1], self._template.opening
        if question["role"] != "user" or not opening:
            return None
        text, content = self._rendered.text, self._content_start(number)
        for place in (before + len(question["content"]) - len(question["content"].rstrip()), before):
            if text.startswith(opening, place):
                return place + len(opening), ""
            common = _common_header(opening, text[place : place + len(opening)])
            if common and content is not None and _REASONING_TAGS.fullmatch(opening, common):
                return min(place + common, content), opening[common:]
        return None

    def _prompt(self, number: int) -> RenderedMessages | None:
        try:
            return self._template.render(self._chat.first(number), prompt=True)
        except DataError:
            return None

    def _content_start(self, number: int) -> int | None:
        """Returns where the visible content of a message begins; None if it has none that is known to be shown.

        A template may hide the beginning of an earlier answer, up to a tag that closes it: Qwen3 and DeepSeek-R1 leave
        out the reasoning of all answers but the last.
        """
        end = self._rendered.content_ends.get(number)
        if end is None:
            return None
        content = self._chat.messages[number]["content"].strip()
        for form in _written_forms(content):
            if self._rendered.text.startswith(form, end - len(form)):
                return end - len(form)
        written = self._rendered.text[max(0, end - len(content)) : end]
        hidden = len(content) - _common_prefix(content[::-1], written[::-1])
        tags = [tag.end() for tag in _CLOSING_TAG.finditer(content) if tag.end() >= len(content[:hidden].rstrip())]
        if not tags:
            raise self._hidden(number)
        return end - len(content[tags[0] :].lstrip())

    def _end(self, number: int, start: int) -> int:
        """Returns where a turn ends, including the token that ends it."""
        content_end = self._rendered.content_ends.get(number)
        if (end := self._template.turn_end(self._rendered, number, start)) is not None:
            return end
        if content_end is not None and "tool_calls" not in self._chat.messages[number]:
            return self._after_content(number, content_end)
        if number < len(self._chat.messages) - 1:
            raise self._hidden(number)
        return self._template.last_end(self._rendered.text, start)

    def _past_reasoning(self, number: int, start: int, content: int) -> int:
        """Returns where an answer whose reasoning the prompt has closed continues: after the reasoning in this text."""
        tags = [tag.end() for tag in _CLOSING_TAG.finditer(self._rendered.text, start, content)]
        rest = self._rendered.text[tags[-1] if tags else start : content]
        is_own_space = self._chat.messages[number]["content"].startswith(rest)
        return start if not tags and (rest.strip() or is_own_space) else content - len(rest.lstrip())

    def _after_content(self, number: int, content_end: int) -> int:
        """Returns where a turn ends whose content ends at a position, where no iteration writes this turn alone."""
        text, closing = self._rendered.text, self._template.closing
        if closing.strip() and text.startswith(closing, content_end):
            return content_end + len(closing)
        if (end := self._template.end_at(text, content_end)) is not None:
            return end
        if number == len(self._chat.messages) - 1:
            return content_end + len(text[content_end:].rstrip())
        if closing.strip():
            raise self._hidden(number)
        return content_end

    def _hidden(self, number: int) -> DataError:
        what = f"the chat template does not show where the answer in {self._chat.name(number)} begins and ends"
        return self._chat.error(Code.TEMPLATE_ANSWER, what, "shows every message, each turn after the one before")
