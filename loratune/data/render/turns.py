"""Where in the rendered text of a conversation each learnt answer lies: from after its header to the end of its turn.

A row is the prompt that `generate` would be given before the last learnt answer, and that answer. Where the template
writes the same history in both, this is the text of all messages; where it does not (a system prompt that moves to the
last question, a prompt that opens the reasoning), the answer is taken from the one and put after the other.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from loratune.data.formats import Message
from loratune.data.render.template import Chat, Shown, Template
from loratune.data.render.tokens import Span
from loratune.errors import DataError

_OPENED = re.compile(r"<(\w+)>\s*\Z")
_THOUGHT = re.compile(r"\s*<think>(.*)</think>", re.DOTALL)
_REASONING = re.compile(r"\s*<\w+>\s*(</\w+>\s*)?")
_BEGUN = re.compile(r"<\w*\Z")
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
    answer = finder.turn(last, start, closed=bool(_CLOSING.search(unshown)))
    text = _continued(unshown, chat.messages[last], whole.text, answer)
    border = len(history.text)
    earlier = map(_Finder(template, chat, history).turn, learnt[:-1])
    spans = [*((turn.start, turn.end) for turn in earlier), (border, border + len(text))]
    return Turns(history.text + text, border, tuple(spans))


def _as_marked(template: Template, chat: Chat, spans: Sequence[Span]) -> tuple[Span, ...]:
    """The spans as far as the template's own marks go; the end of a turn is learnt in any case."""
    ranges = template.generated(chat)
    if ranges is None:
        return tuple(spans)
    kept = []
    for start, end in spans:
        begun = [first for first, after in ranges if first < end and start < after]
        if begun:
            kept.append((max(start, begun[0]), end))
    if not kept or kept[-1][1] != spans[-1][1]:
        raise chat.problem("the chat template's {% generation %} marks leave out", len(chat.messages) - 1)
    return tuple(kept)


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
        start = content if closed and content is not None else start
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
        before = self._shown.ends.get(number - 1)
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
        return content, ""

    def _after_question(self, number: int, before: int) -> tuple[int, str] | None:
        """`opened`, where a user's turn ends at `before` and the usual header follows, but for a tag of reasoning."""
        asked, opening = self._chat.messages[number - 1], self._template.opening
        if asked["role"] != "user" or not opening:
            return None
        text, content = self._shown.text, self._content(number)
        for place in (before, before + len(asked["content"]) - len(asked["content"].rstrip())):
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
        if self._shown.text.startswith(content, end - len(content)):
            return end - len(content)
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
        if said is not None and not calls:
            return self._template.end_at(text, said) or said
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

    def _hidden(self, number: int) -> DataError:
        return self._chat.problem("the chat template does not show where the answer begins and ends of", number)
