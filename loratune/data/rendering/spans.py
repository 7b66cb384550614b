"""Rows as text and as tokens, with their supervised spans: each answer from the end of its header to its end of turn.

A row is the prompt that `generate` would see before the last supervised answer, followed by that answer. If the
template renders the same history with and without the answer, this is the text of all messages. If it does not (a
system prompt that moves to the last question, a prompt that opens the reasoning), the answer is cut from the text of
all messages and appended to the prompt.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from loratune.codes import Code
from loratune.data.formats import IGNORED, Message, Span
from loratune.data.formats.reasoning import CLOSING_TAG, REASONING_OPENED, end_of_reasoning, reasoning_of, with_mark
from loratune.data.rendering.chat_template import ChatTemplate, RenderedMessages, TemplateInput
from loratune.data.rendering.turns import TurnFinder, written_forms
from loratune.errors import DataError

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
        bare_starts: Where what follows the reasoning begins, of each span; empty for text.
    """

    where: str
    text: str
    prompt: int
    spans: tuple[Span, ...]
    templated: bool
    has_prompt: bool = True
    bare_starts: tuple[int, ...] = ()


def without_reasoning(rendered: RenderedText) -> RenderedText:
    """Returns the text with the reasoning of its answers, also an empty block of it, taken out of the spans."""
    pairs = zip(rendered.bare_starts, rendered.spans, strict=True)
    return replace(rendered, spans=tuple((start, end) for start, (_, end) in pairs))


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
        return _answer_after_other_prompt(template, chat, supervised, whole)
    finder = TurnFinder(template, chat, whole)
    start = finder.start(last)[0] if prompt is None else len(prompt)
    found = [finder.find(number) for number in supervised[:-1]] + [finder.find(last, start)]
    ends = _reasoning_ends(template, chat, supervised, start)
    turns, spans = _within_generation_marks(template, chat, supervised, found)
    text = whole.text[: spans[-1][1]]
    bare = _bare_starts(text, turns, spans, ends)
    return RenderedText(chat.where, text, start, spans, templated=True, bare_starts=bare)


def _bare_starts(text: str, turns: Sequence[int], spans: Sequence[Span], ends: Mapping[int, int]) -> tuple[int, ...]:
    """Returns `RenderedText.bare_starts`. ends: the result of `_reasoning_ends`."""
    return tuple(end_of_reasoning(text, span[0], ends.get(turn)) for turn, span in zip(turns, spans, strict=True))


def _reasoning_ends(
    template: ChatTemplate, chat: TemplateInput, numbers: Sequence[int], start: int | None
) -> dict[int, int]:
    """Returns the number of each of these messages whose reasoning is in the text → where it ends: they are rendered
    with a mark there.

    start: where the last of them begins; None: the text is that of a prompt.

    Raises:
        DataError: As `ChatTemplate.text`; the reasoning of the last message is not in the text after its start.
    """
    marks = {number: f" loratune reasoning {number}." for number in numbers if reasoning_of(chat.messages[number])}
    if not marks:
        return {}
    messages = [with_mark(one, marks[at]) if at in marks else one for at, one in enumerate(chat.messages)]
    text = template.text(TemplateInput(messages, chat.tools, chat.where), prompt=start is None)
    ends, shift = dict[int, int](), 0
    for number, mark in marks.items():
        if (place := text.find(mark)) >= 0:
            ends[number], shift = place - shift, shift + len(mark)
    if start is not None and (last := numbers[-1]) in marks and ends.get(last, -1) < start:
        what = f"the chat template leaves out the reasoning of {chat.name(last)}"
        raise chat.error(Code.TEMPLATE_OMITS, what, "renders it", _WITHOUT_REASONING)
    return ends


def check_tools_are_shown(template: ChatTemplate, chat: TemplateInput) -> None:
    """Check that the template renders the tools of a row, if it has any. Raises DataError."""
    if chat.tools and not template.shows_tools:
        what, needed = "the chat template leaves out the `tools` of the row", "renders tools"
        raise chat.error(Code.TEMPLATE_OMITS, what, needed, "take `tools` out of the rows")


def _check_tools(template: ChatTemplate, chat: TemplateInput, whole: RenderedMessages) -> None:
    """Check that the tools and the results of tool calls are in the text. Raises DataError."""
    check_tools_are_shown(template, chat)
    for number, message in enumerate(chat.messages):
        forms = written_forms(message["content"].strip())
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
    finder = TurnFinder(template, chat, whole)
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
    text, opened = _continuation(prompt_tail, chat.messages[last], whole, answer, last)
    border = len(history.text)
    in_whole = {last: opened + answer[0]} if opened is not None else _reasoning_ends(template, chat, [last], answer[0])
    _, ((mark_start, _),) = _within_generation_marks(template, chat, [last], [answer])
    start_in_text = mark_start - answer[0] if text == whole.text[slice(*answer)] else 0
    turns: tuple[int, ...] = ()
    spans: tuple[Span, ...] = ()
    ends = {number: border + place - answer[0] for number, place in in_whole.items()}
    if supervised[:-1]:
        earlier = [*map(TurnFinder(template, chat, history).find, supervised[:-1])]
        turns, spans = _within_generation_marks(template, chat.first(last), supervised[:-1], earlier)
        ends |= _reasoning_ends(template, chat.first(last), turns, None)
    turns, spans = (*turns, last), (*spans, (border + start_in_text, border + len(text)))
    bare = _bare_starts(history.text + text, turns, spans, ends)
    return RenderedText(chat.where, history.text + text, border, spans, templated=True, bare_starts=bare)


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


def _continuation(
    prompt_tail: str, message: Message, whole: RenderedMessages, answer: Span, number: int
) -> tuple[str, int | None]:
    """Returns an answer that continues a prompt whose end, e.g. `<think>`, is not in the text of all messages; and
    where it closes the reasoning that the prompt opens, None if the prompt does not."""
    answer_text = whole.text[slice(*answer)]
    # `<think>\n` of Qwen3.5 or DeepSeek-R1: the reasoning comes first, and is empty if the answer has none.
    tag = REASONING_OPENED.search(prompt_tail)
    if tag is None:
        return answer_text, None
    content, reasoning, closing_tag = message["content"].strip(), reasoning_of(message), f"</{tag[1]}>"
    if closing_tag in content and number in whole.content_ends and not reasoning_of({**message, "content": ""}):
        inner: str = content.removeprefix(f"<{tag[1]}>").removeprefix("\n")
        text = inner + whole.text[whole.content_ends[number] : answer[1]]
    elif answer_text.lstrip().startswith(closing_tag):  # DeepSeek-V3.1 writes it before each answer
        text = reasoning + answer_text
    else:
        text = f"{reasoning}\n{closing_tag}\n\n{answer_text}"
    return text, text.index(closing_tag, len(reasoning))
