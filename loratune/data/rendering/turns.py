"""Finds the turn of a message in a rendered text: from the end of its header to its end of turn."""

import json
import re
from collections.abc import Iterator

from loratune.codes import Code
from loratune.data.formats import Span, common_prefix
from loratune.data.formats.reasoning import CLOSING_TAG, REASONING_OPENED, reasoning_of, without
from loratune.data.rendering.chat_template import ChatTemplate, RenderedMessages, TemplateInput
from loratune.errors import DataError

_INCOMPLETE_TAG = re.compile(r"<[|/]?\w*\Z")


def written_forms(content: str) -> Iterator[str]:
    """Yields the forms in which a template may write a content: unchanged, or escaped in JSON."""
    yield content
    for ascii_alone in (False, True):
        yield json.dumps(content, ensure_ascii=ascii_alone)[1:-1]


class TurnFinder:
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
        message = self._chat.messages[number]
        content = message["content"].strip()
        for form in written_forms(content):
            if self._rendered.text.startswith(form, end - len(form)):
                return end - len(form)
        written = self._rendered.text[max(0, end - len(content)) : end]
        hidden = len(content) - common_prefix(content[::-1], written[::-1])
        tags = [tag.end() for tag in CLOSING_TAG.finditer(content) if tag.end() >= len(content[:hidden].rstrip())]
        left = content[tags[0] :].lstrip() if tags else ""
        if not tags or (reasoning_of(message) and len(left) < len(without(message)["content"].strip())):
            raise self._hidden(number)  # also if a part of what follows the reasoning is hidden
        return end - len(left)

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
