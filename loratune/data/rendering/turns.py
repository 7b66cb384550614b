"""Where in the rendered text of a conversation each learnt answer lies: from after its header to the end of its turn.

A row is the prompt that `generate` would be given before the last learnt answer, and that answer. Where the template
writes the same history in both, this is the text of all messages; where it does not (a system prompt that moves to the
last question, a prompt that opens the reasoning), the answer is taken from the one and put after the other.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loratune.data.formats import Message
from loratune.data.rendering.template import Chat, Shown, Template
from loratune.data.rendering.tokens import Span
from loratune.errors import DataError

_OPENED = re.compile(r"<(think|thinking|thought|thoughts|reason|reasoning)>\s*\Z")
_THOUGHT = re.compile(r"\s*<think>(.*)</think>", re.DOTALL)
_REASONING = re.compile(r"\s*<\w+>\s*(</\w+>\s*)?")
_BEGUN = re.compile(r"<[|/]?\w*\Z")
_CLOSING = re.compile(r"</\w+>|<\w+\|>|\[/\w+\]")


@dataclass(frozen=True)
class Turns:
    """A rendered row. prompt: how many characters of it `generate` is given; spans: the learnt ranges of characters."""

    text: str
    prompt: int
    spans: tuple[Span, ...]


def locate(template: Template, chat: Chat, learnt: Sequence[int]) -> Turns:
    """Render the messages up to the last learnt turn, and find every learnt turn. learnt: their numbers, not empty.

    Raises DataError: the template refuses the messages, leaves out what is to be learnt, or hides where it lies.
    """
    last = learnt[-1]
    chat = chat.until(last + 1)
    whole = template.show(chat)
    _check_tools(template, chat, whole)
    prompt = _prompt(template, chat)
    if prompt is not None and not whole.text.startswith(prompt):
        turns = _moved(template, chat, learnt, whole)
    else:
        finder = _Finder(template, chat, whole)
        start = finder.opened(last)[0] if prompt is None else len(prompt)
        answer = finder.turn(last, start)
        spans = [*((turn.start, turn.end) for turn in map(finder.turn, learnt[:-1])), (start, answer.end)]
        turns = Turns(whole.text[: answer.end], start, _as_marked(template, chat, spans))
    if (reasoning := _reasoning(chat.messages[last])) and reasoning not in turns.text[turns.prompt :]:
        raise chat.problem("the chat template leaves out the reasoning of", last)
    return turns


def _prompt(template: Template, chat: Chat) -> str | None:
    """What `generate` is given before the last answer; None if the template has no prompt for it."""
    if len(chat.messages) == 1:
        return None
    try:
        return template.text(chat.until(len(chat.messages) - 1), prompt=True)
    except DataError:
        return None


def _moved(template: Template, chat: Chat, learnt: Sequence[int], whole: Shown) -> Turns:
    """The turns of a row whose prompt the template renders in another way before the answer than with it.

    Mistral-Nemo moves the system prompt to the last question; DeepSeek-R1 ends the prompt in `<think>`, which the
    rendered answer lacks.
    """
    last = learnt[-1]
    history = template.show(chat.until(last), prompt=True)
    finder = _Finder(template, chat, whole)
    start, unshown = finder.opened(last, history)
    closed = bool(_CLOSING.search(unshown))
    if unshown.strip() and not closed and not _OPENED.search(unshown):
        what = f"the chat template ends the prompt in {unshown.strip()!r}, which it does not write in the answer of"
        raise chat.problem(what, last)
    answer = finder.turn(last, start, closed=closed)
    text = _continued(unshown, chat.messages[last], whole.text, answer)
    border = len(history.text)
    ((marked, _),) = _as_marked(template, chat, [(answer.start, answer.end)])
    unmarked = marked - answer.start if text.endswith(whole.text[marked : answer.end]) and not unshown.strip() else 0
    spans: list[Span] = [(border + unmarked, border + len(text))]
    if learnt[:-1]:
        earlier = map(_Finder(template, chat, history).turn, learnt[:-1])
        spans[:0] = _as_marked(template, chat.until(last), [(turn.start, turn.end) for turn in earlier])
    return Turns(history.text + text, border, tuple(spans))


def _as_marked(template: Template, chat: Chat, spans: Sequence[Span]) -> tuple[Span, ...]:
    """The spans as far as the template's own marks go; the end of a turn is learnt in any case.

    Spans that hold nothing of what is marked are left out. Raises DataError: that is so for the last one.
    """
    ranges = template.generated(chat)
    if ranges is None:
        return tuple(spans)
    begun = [next((first for first, after in ranges if first < end and start < after), None) for start, end in spans]
    if not begun or begun[-1] is None:
        raise chat.problem("the chat template's {% generation %} marks leave out", len(chat.messages) - 1)
    pairs = zip(begun, spans, strict=True)
    return tuple((max(start, first), end) for first, (start, end) in pairs if first is not None)


def _check_tools(template: Template, chat: Chat, whole: Shown) -> None:
    if chat.tools and not template.shows_tools:
        raise chat.problem("the chat template leaves out the `tools` of the row")
    for number, message in enumerate(chat.messages):
        if message["role"] == "tool" and number not in whole.ends:
            content = message["content"].strip()
            if content not in whole.text and json.dumps(content, ensure_ascii=False)[1:-1] not in whole.text:
                raise chat.problem("the chat template leaves out", number)


def _reasoning(message: Message) -> str:
    """The reasoning that comes with an answer, in a field of its own or before its content."""
    thought = _THOUGHT.match(message["content"])
    given = message.get("reasoning_content") or message.get("thinking") or (thought[1] if thought else "")
    return str(given).strip()


@dataclass(frozen=True)
class _Turn:
    """Places in a text. said: where the content ends, if that is known."""

    start: int
    said: int | None
    end: int


def _continued(unshown: str, message: Message, text: str, answer: _Turn) -> str:
    """The answer as it goes on after a prompt that ends in something the text does not show, e.g. `<think>`."""
    shown = text[answer.start : answer.end]
    # `<think>\n` of Qwen3.5 or DeepSeek-R1: the reasoning comes first, empty where the answer has none
    tag = _OPENED.search(unshown)
    if tag is None:
        return shown
    content, close = message["content"].strip(), f"</{tag[1]}>"
    if close in content and answer.said is not None:
        inner: str = content.removeprefix(f"<{tag[1]}>").removeprefix("\n")
        return inner + text[answer.said : answer.end]
    return f"{_reasoning(message)}\n{close}\n\n{shown}"


def _forms(content: str) -> Iterator[str]:
    """How a template may write a content without changing what it says: as it is, or within JSON."""
    yield content
    for ascii_alone in (False, True):
        yield json.dumps(content, ensure_ascii=ascii_alone)[1:-1]


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((place for place, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(one), len(other)))


class _Finder:
    """Finds turns in one rendered text of a conversation."""

    def __init__(self, template: Template, chat: Chat, shown: Shown):
        self._template, self._chat, self._shown = template, chat, shown

    def turn(self, number: int, start: int | None = None, closed: bool = False) -> _Turn:
        """The turn of a message, verified to show what the message says.

        start: where it is known to begin; closed: whether its prompt has closed the reasoning, so that only content
        may follow.
        """
        text, message = self._shown.text, self._chat.messages[number]
        content = self._content(number)
        if start is None:
            start, unshown = self.opened(number)
            closed = bool(unshown)
        start = self._past_reasoning(number, start, content) if closed and content is not None else start
        end = self._end(number, start)
        calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
        if any(name not in text[start:end] for name in calls):
            raise self._chat.problem("the chat template leaves out the tool calls of", number)
        unseen = content is None and bool(message["content"].strip()) and not calls
        if unseen and (self._shown.marked or message["content"].strip() not in text[start:end]):
            raise self._hidden(number)
        early = content is not None and content < start and not _OPENED.fullmatch(text[content:start])
        if end < start or early:
            raise self._hidden(number)
        return _Turn(start, self._shown.ends.get(number), end)

    def opened(self, number: int, asked: Shown | None = None) -> tuple[int, str]:
        """Where a turn begins, and what the prompt for it ends in beyond that. asked: the prompt, if at hand."""
        text, content = self._shown.text, self._content(number)
        before, begun = self._shown.ends.get(number - 1), self._shown.opens.get(number)
        if content is not None and begun is not None and before is not None and begun < before:
            return self._after_header(number, content)  # the template does not write turns in their order
        # the usual case: question, end of turn, header; then one rendering of the whole conversation is enough
        if before is not None and asked is None and (usual := self._after_question(number, before)) is not None:
            return usual
        if asked is None and number:
            asked = self._asked(number)
        said = asked.ends.get(number - 1) if asked else None
        # the header as the prompt has it, held against what follows the message before: Qwen3 shows `<think>` in one
        if asked is not None and before is not None and said is not None:
            opening = asked.text[said:]
            common = _common(opening, text[before : before + len(opening)])
            common = common if common == len(opening) else len(_BEGUN.sub("", opening[:common]))
            if common or not opening:
                return before + common if content is None else min(before + common, content), opening[common:]
        if asked is not None and text.startswith(asked.text):
            return len(asked.text), ""
        if content is None:
            raise self._hidden(number)
        return self._after_header(number, content)

    def _after_header(self, number: int, content: int) -> tuple[int, str]:
        """`opened`, by the header with which the template prompts for any answer, within the turn of this one."""
        text, header, begun = self._shown.text, self._template.header, self._shown.opens.get(number)
        if begun is None or header is None:
            return content, ""
        if (place := text.find(header, begun, content)) >= 0:
            return place + len(header), ""
        common = len(_BEGUN.sub("", header[: _common(header, text[begun : begun + len(header)])]))
        if not common and text[begun:content].strip():
            raise self._hidden(number)
        return min(begun + common, content), header[common:] if common else ""

    def _after_question(self, number: int, before: int) -> tuple[int, str] | None:
        """`opened`, where a user's turn ends at `before` and the usual header follows, but for a tag of reasoning."""
        asked, opening = self._chat.messages[number - 1], self._template.opening
        if asked["role"] != "user" or not opening:
            return None
        text, content = self._shown.text, self._content(number)
        for place in (before + len(asked["content"]) - len(asked["content"].rstrip()), before):
            if text.startswith(opening, place):
                return place + len(opening), ""
            common = len(_BEGUN.sub("", opening[: _common(opening, text[place : place + len(opening)])]))
            if common and content is not None and _REASONING.fullmatch(opening, common):
                return min(place + common, content), opening[common:]
        return None

    def _asked(self, number: int) -> Shown | None:
        try:
            return self._template.show(self._chat.until(number), prompt=True)
        except DataError:
            return None

    def _content(self, number: int) -> int | None:
        """Where the visible content of a message begins; None if it has none, or none that is known to be shown.

        A template may hide the beginning of an earlier answer, up to a tag that closes it: Qwen3 and DeepSeek-R1 leave
        out the reasoning of all answers but the last.
        """
        end = self._shown.ends.get(number)
        if end is None:
            return None
        content = self._chat.messages[number]["content"].strip()
        for form in _forms(content):
            if self._shown.text.startswith(form, end - len(form)):
                return end - len(form)
        written = self._shown.text[max(0, end - len(content)) : end]
        hidden = len(content) - _common(content[::-1], written[::-1])
        closed = [tag.end() for tag in _CLOSING.finditer(content) if tag.end() >= len(content[:hidden].rstrip())]
        if not closed:
            raise self._hidden(number)
        return end - len(content[closed[0] :].lstrip())

    def _end(self, number: int, start: int) -> int:
        """Where a turn ends, the token that ends it included."""
        text, message, said = self._shown.text, self._chat.messages[number], self._shown.ends.get(number)
        calls = "tool_calls" in message
        if (closed := self._template.closed(self._shown, number, start)) is not None:
            return closed
        if said is not None and not calls:
            return self._after_content(number, said)
        if not message["content"].strip() and not calls:
            return self._template.end_after(text, start) or start
        following = self._chat.messages[number + 1 : number + 2]
        if not following:
            return self._template.last_end(text, start)
        if (limit := self._shown.ends.get(number + 1)) is not None and self._template.ends:
            turn: str = text[:limit].removesuffix(following[0]["content"].strip())
            return self._template.last_end(turn, start)
        # no mark after it tells where it ends, as behind calls of tools: the rendering that stops here does
        alone = self._template.text(self._chat.until(number + 1))
        end = self._template.last_end(alone, start)
        if not text.startswith(alone[:end]):
            raise self._hidden(number)
        return end

    def _past_reasoning(self, number: int, start: int, content: int) -> int:
        """Where an answer goes on whose reasoning the prompt has closed: behind what is shown of any."""
        shown = [tag.end() for tag in _CLOSING.finditer(self._shown.text, start, content)]
        rest = self._shown.text[shown[-1] if shown else start : content]
        own = self._chat.messages[number]["content"].startswith(rest)  # its own space, if it is any
        return start if not shown and (rest.strip() or own) else content - len(rest.lstrip())

    def _after_content(self, number: int, said: int) -> int:
        """Where a turn ends whose content ends at a place, and which no round of the template writes alone."""
        text, closing = self._shown.text, self._template.closing
        if closing.strip() and text.startswith(closing, said):
            return said + len(closing)
        if (end := self._template.end_at(text, said)) is not None:
            return end
        if number == len(self._chat.messages) - 1:
            return said + len(text[said:].rstrip())
        if closing.strip():
            raise self._hidden(number)
        return said

    def _hidden(self, number: int) -> DataError:
        return self._chat.problem("the chat template does not show where the answer begins and ends of", number)
