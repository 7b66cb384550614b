"""Rows as text and as tokens, with their supervised spans: each answer from the end of its header to its end of turn.

A row is the prompt that `generate` would see before the last supervised answer, followed by that answer. If the
template renders the same history with and without the answer, this is the text of all messages. If it does not (a
system prompt that moves to the last question, a prompt that opens the reasoning), the answer is cut from the text of
all messages and appended to the prompt.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from loratune.codes import Code
from loratune.data.formats import IGNORED, Message, Span, common_prefix
from loratune.data.formats.reasoning import CLOSING_TAG, REASONING_OPENED, end_of_reasoning, reasoning_of
from loratune.data.rendering.chat_template import ChatTemplate, RenderedMessages, TemplateInput
from loratune.errors import DataError

_INCOMPLETE_TAG = re.compile(r"<[|/]?\w*\Z")


_WITHOUT_REASONING = "set data.chat_template_kwargs so that it does, or data.reasoning to drop"

CHOSEN, REJECTED, DESIRABLE, UNDESIRABLE = 2, -2, 1, -1
"""The role of a row in preference data: an answer of a pair (the chosen one comes first), or an unpaired answer.
Positive values mark answers that are to become more likely."""


@dataclass(frozen=True)
class TokenizedRow:
    """A row of token ids, and which of them are supervised.

    Attributes:
        where: The place of the row in its file, for messages.
        ids: Token ids.
        spans: The supervised ranges of positions, in order, none of them empty.
        answer: The position at which the last answer begins; None in a row without a prompt.
        side: The role of the row in preference data, see `CHOSEN`; 0 for other data.
        weight: The factor of the row in the loss.
        block: The number of the block in the row that it is a part of, from 0; 0 for a whole row.
    """

    where: str
    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    answer: int | None = field(default=None, compare=False)
    side: int = 0
    weight: float = 1.0
    block: int = field(default=0, compare=False)

    @classmethod
    def from_ids(cls, where: str, ids: Sequence[int], labels: Sequence[int] | None) -> "TokenizedRow":
        """Returns the row of given ids. labels: the id or -100 at each position; None: all are supervised."""
        if labels is None:
            return cls(where, tuple(ids), ((0, len(ids)),) if ids else ())
        supervised = [False, *(label != IGNORED for label in labels), False]
        borders = [place for place in range(len(labels) + 1) if supervised[place] != supervised[place + 1]]
        spans = tuple(zip(borders[::2], borders[1::2], strict=True))
        return cls(where, tuple(ids), spans, spans[-1][0] if spans and spans[0][0] else None)

    @property
    def labels(self) -> list[int]:
        """One label per token: its id if it is supervised, otherwise -100.

        The first token is never supervised, as there is no token before it to predict it from.
        """
        labels = [IGNORED] * len(self.ids)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        if labels:
            labels[0] = IGNORED
        return labels

    @property
    def supervised(self) -> int:
        """The number of supervised tokens."""
        return sum(end - max(start, 1) for start, end in self.spans)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids before the last span: the prompt of `generate`."""
        return self.ids[: self.spans[-1][0]]

    @property
    def completion(self) -> tuple[int, ...]:
        """The ids of the last span, including its end token: what `generate` should return."""
        return self.ids[self.spans[-1][0] : self.spans[-1][1]]


@dataclass(frozen=True)
class RenderedText:
    """The text of a row before it is encoded.

    Attributes:
        where: The place of the row in its file, for messages.
        text: The prompt and the text after it.
        prompt: The number of characters of the prompt.
        spans: The supervised ranges of characters.
        templated: Whether a chat template wrote the text.
        has_prompt: Whether the row has a prompt, which may be empty.
        turns: The numbers of the messages that the spans belong to; empty for text.
    """

    where: str
    text: str
    prompt: int
    spans: tuple[Span, ...]
    templated: bool
    has_prompt: bool = True
    turns: tuple[int, ...] = ()


def without_reasoning(rendered: RenderedText, messages: Sequence[Message]) -> RenderedText:
    """Returns the text with the reasoning of its answers, also an empty block of it, taken out of the spans."""
    spans = [
        (start + end_of_reasoning(rendered.text[start:end], reasoning_of(messages[number])), end)
        for number, (start, end) in zip(rendered.turns, rendered.spans, strict=True)
    ]
    return replace(rendered, spans=tuple(spans)) if spans else rendered


def render_conversation(template: ChatTemplate, chat: TemplateInput, supervised: Sequence[int]) -> RenderedText:
    """Render the messages up to the last supervised answer, and find every supervised answer.

    Args:
        template: The chat template.
        chat: The conversation.
        supervised: The numbers of the supervised messages, in order; not empty.

    Raises:
        DataError: The template refuses the messages, omits a supervised answer, or does not show where it begins and
            ends.
    """
    last = supervised[-1]
    chat = chat.first(last + 1)
    whole = template.render(chat)
    _check_tools(template, chat, whole)
    prompt = None
    with suppress(DataError):  # the template may have no prompt for this answer
        prompt = template.text(chat.first(last), prompt=True) if last else None
    if prompt is not None and not whole.text.startswith(prompt):
        rendered = _answer_after_other_prompt(template, chat, supervised, whole)
    else:
        finder = _TurnFinder(template, chat, whole)
        start = finder.start(last)[0] if prompt is None else len(prompt)
        found = [finder.find(number) for number in supervised[:-1]] + [finder.find(last, start)]
        turns, spans = _within_generation_marks(template, chat, supervised, found)
        text = whole.text[: spans[-1][1]]
        rendered = RenderedText(chat.where, text, start, spans, templated=True, turns=turns)
    if (reasoning := reasoning_of(chat.messages[last])) and reasoning not in rendered.text[rendered.prompt :]:
        what = f"the chat template leaves out the reasoning of {chat.name(last)}"
        raise chat.error(Code.TEMPLATE_OMITS, what, "renders it", _WITHOUT_REASONING)
    return rendered


def check_tools_are_shown(template: ChatTemplate, chat: TemplateInput) -> None:
    """Check that the template renders the tools of a row, if it has any. Raises DataError."""
    if chat.tools and not template.shows_tools:
        what, needed = "the chat template leaves out the `tools` of the row", "renders tools"
        raise chat.error(Code.TEMPLATE_OMITS, what, needed, "take `tools` out of the rows")


def _check_tools(template: ChatTemplate, chat: TemplateInput, whole: RenderedMessages) -> None:
    """Check that the tools and the results of tool calls are in the text. Raises DataError."""
    check_tools_are_shown(template, chat)
    for number, message in enumerate(chat.messages):
        forms = _written_forms(message["content"].strip())
        if message["role"] == "tool" and not any(form in whole.text for form in forms):
            what = f"the chat template leaves out {chat.name(number)}"
            raise chat.error(Code.TEMPLATE_OMITS, what, "renders results of tool calls")


def _answer_after_other_prompt(
    template: ChatTemplate, chat: TemplateInput, supervised: Sequence[int], whole: RenderedMessages
) -> RenderedText:
    """Render a row whose prompt the template renders differently with and without the answer.

    Mistral-Nemo moves the system prompt to the last question; DeepSeek-R1 ends the prompt in `<think>`, which the
    rendered answer lacks.
    """
    last = supervised[-1]
    history = template.render(chat.first(last), prompt=True)
    finder = _TurnFinder(template, chat, whole)
    start, prompt_tail = finder.start(last, history)
    closed = bool(CLOSING_TAG.search(prompt_tail))
    if prompt_tail.strip() and not closed and not REASONING_OPENED.search(prompt_tail):
        ending = f"the chat template ends the prompt in {prompt_tail.strip()!r}"
        what = f"{ending}, which it does not write in the answer of {chat.name(last)}"
        raise chat.error(Code.TEMPLATE_ANSWER, what, "begins answers as it ends prompts")
    if closed and reasoning_of(chat.messages[last]):
        what = f"the chat template closes the reasoning before the answer of {chat.name(last)}, which has its own"
        raise chat.error(Code.TEMPLATE_OMITS, what, "opens it", _WITHOUT_REASONING)
    answer = finder.find(last, start, reasoning_closed=closed)
    text = _continuation(prompt_tail, chat.messages[last], whole, answer, last)
    border = len(history.text)
    _, ((mark_start, _),) = _within_generation_marks(template, chat, [last], [answer])
    start_in_text = mark_start - answer[0] if text == whole.text[slice(*answer)] else 0
    turns: tuple[int, ...] = ()
    spans: tuple[Span, ...] = ()
    if supervised[:-1]:
        earlier = [*map(_TurnFinder(template, chat, history).find, supervised[:-1])]
        turns, spans = _within_generation_marks(template, chat.first(last), supervised[:-1], earlier)
    spans = (*spans, (border + start_in_text, border + len(text)))
    return RenderedText(chat.where, history.text + text, border, spans, templated=True, turns=(*turns, last))


def _within_generation_marks(
    template: ChatTemplate, chat: TemplateInput, turns: Sequence[int], spans: Sequence[Span]
) -> tuple[tuple[int, ...], tuple[Span, ...]]:
    """Move the start of each span to the start of the `{% generation %}` block in it; the end is unchanged.

    Spans without such a block are dropped. turns: the message of each span.

    Returns:
        The messages and spans that are left.

    Raises:
        DataError: The last span has no such block.
    """
    ranges = template.generated(chat)
    if ranges is None:
        return tuple(turns), tuple(spans)
    starts = [next((first for first, after in ranges if first < end and start < after), None) for start, end in spans]
    if not starts or starts[-1] is None:
        what = f"the chat template's {{% generation %}} marks leave out {chat.name(len(chat.messages) - 1)}"
        raise chat.error(Code.TEMPLATE_ANSWER, what, "marks every answer, or has no such marks")
    found = zip(turns, starts, spans, strict=True)
    left = [(turn, (max(start, first), end)) for turn, first, (start, end) in found if first is not None]
    return tuple(turn for turn, _ in left), tuple(span for _, span in left)


def _continuation(prompt_tail: str, message: Message, whole: RenderedMessages, answer: Span, number: int) -> str:
    """Returns an answer that continues a prompt whose end, e.g. `<think>`, is not in the text of all messages."""
    answer_text = whole.text[slice(*answer)]
    # `<think>\n` of Qwen3.5 or DeepSeek-R1: the reasoning comes first, and is empty if the answer has none.
    tag = REASONING_OPENED.search(prompt_tail)
    if tag is None:
        return answer_text
    content, closing_tag = message["content"].strip(), f"</{tag[1]}>"
    if closing_tag in content and number in whole.content_ends:
        inner: str = content.removeprefix(f"<{tag[1]}>").removeprefix("\n")
        return inner + whole.text[whole.content_ends[number] : answer[1]]
    if answer_text.lstrip().startswith(closing_tag):  # DeepSeek-V3.1 writes it before each answer
        return reasoning_of(message) + answer_text
    return f"{reasoning_of(message)}\n{closing_tag}\n\n{answer_text}"


def _written_forms(content: str) -> Iterator[str]:
    """Yields the forms in which a template may write a content: unchanged, or escaped in JSON."""
    yield content
    for ascii_alone in (False, True):
        yield json.dumps(content, ensure_ascii=ascii_alone)[1:-1]


class _TurnFinder:
    """Finds turns in one rendered text of a conversation."""

    def __init__(self, template: ChatTemplate, chat: TemplateInput, rendered: RenderedMessages):
        self._template, self._chat, self._rendered = template, chat, rendered

    def find(self, number: int, start: int | None = None, reasoning_closed: bool = False) -> Span:
        """Find the turn of a message, and check that it contains the content of the message.

        Args:
            number: The number of the message.
            start: Where the turn begins, if that is known.
            reasoning_closed: Whether the prompt has closed the reasoning, so only content may follow.

        Raises:
            DataError: The answer cannot be located, or the template omits a tool call.
        """
        text, message = self._rendered.text, self._chat.messages[number]
        content = self._content_start(number)
        if start is None:
            start, prompt_tail = self.start(number)
            reasoning_closed = bool(prompt_tail)
        if reasoning_closed and content is not None:
            start = self._pastreasoning_of(number, start, content)
        end = self._end(number, start)
        calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
        if any(name not in text[start:end] for name in calls):
            what = f"the chat template leaves out the tool calls of {self._chat.name(number)}"
            raise self._chat.error(Code.TEMPLATE_OMITS, what, "renders tool calls")
        is_missing = content is None and bool(message["content"].strip()) and not calls
        is_missing &= self._rendered.marked or message["content"].strip() not in text[start:end]
        starts_inside = content is not None and content < start and not REASONING_OPENED.fullmatch(text[content:start])
        if is_missing or end < start or starts_inside:
            raise self._hidden(number)
        return start, end

    def start(self, number: int, prompt: RenderedMessages | None = None) -> tuple[int, str]:
        """Find where an answer begins, after its header.

        The header is the part of the answer's prompt after the preceding message. In the turn of the answer, the
        template may write only its beginning, or nothing: Qwen3 writes `<think>` in only one of the two.

        Args:
            number: The number of the message.
            prompt: The prompt for the answer, if it has been rendered already.

        Returns:
            The position, and the end of the header that is missing in this text.
        """
        text, content = self._rendered.text, self._content_start(number)
        begin, before = self._rendered.turn_starts.get(number), self._rendered.content_ends.get(number - 1, 0)
        if begin is None or begin < before:  # the loop writes several messages at once
            prompt_text = self._template.text(self._chat.first(number), prompt=True)
            if not text.startswith(prompt_text):
                raise self._hidden(number)
            return len(prompt_text), ""
        header = self._template.header
        if prompt is not None and number - 1 in prompt.turn_ends:
            header = prompt.text[prompt.turn_ends[number - 1] :]
        stop = self._rendered.turn_ends[number] if content is None else content
        place = text.find(header, begin, stop) if header.strip() else -1
        if place >= 0:  # a system prompt of the template may come before it
            return place + len(header), ""
        common = len(_INCOMPLETE_TAG.sub("", header[: common_prefix(header, text[begin:])]))
        return min(begin + common, stop), header[common:] if text[begin:stop].strip() else ""

    def _content_start(self, number: int) -> int | None:
        """Returns where the rendered content of a message begins; None if its position is not known.

        A template may omit the beginning of an earlier answer, up to a closing tag: Qwen3 and DeepSeek-R1 omit the
        reasoning of all answers but the last.
        """
        end = self._rendered.content_ends.get(number)
        if end is None:
            return None
        content = self._chat.messages[number]["content"].strip()
        for form in _written_forms(content):
            if self._rendered.text.startswith(form, end - len(form)):
                return end - len(form)
        written = self._rendered.text[max(0, end - len(content)) : end]
        hidden = len(content) - common_prefix(content[::-1], written[::-1])
        tags = [tag.end() for tag in CLOSING_TAG.finditer(content) if tag.end() >= len(content[:hidden].rstrip())]
        if not tags:
            raise self._hidden(number)
        return end - len(content[tags[0] :].lstrip())

    def _end(self, number: int, start: int) -> int:
        """Returns where a turn ends, including the token that ends it."""
        if (end := self._template.turn_end(self._rendered, number, start)) is not None:
            return end
        if number < len(self._chat.messages) - 1:
            # Gemma 4 writes calls and their results as one turn: what the model writes ends as the calls alone do.
            alone = self._template.text(self._chat.first(number + 1)).rstrip()
            if self._chat.messages[number].get("tool_calls") and self._rendered.text.startswith(alone):
                return len(alone)
            raise self._hidden(number)
        return self._template.last_end(self._rendered.text, start)

    def _pastreasoning_of(self, number: int, start: int, content: int) -> int:
        """Returns the end of the reasoning in this text: the start of an answer whose prompt closes the reasoning."""
        tags = [tag.end() for tag in CLOSING_TAG.finditer(self._rendered.text, start, content)]
        rest = self._rendered.text[tags[-1] if tags else start : content]
        is_own_space = self._chat.messages[number]["content"].startswith(rest)
        return start if not tags and (rest.strip() or is_own_space) else content - len(rest.lstrip())

    def _hidden(self, number: int) -> DataError:
        what = f"the chat template does not show where the answer in {self._chat.name(number)} begins and ends"
        return self._chat.error(Code.TEMPLATE_ANSWER, what, "shows every message, each turn after the one before")
