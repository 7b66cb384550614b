"""A Modelfile for Ollama, with a template that is equivalent to the chat template of a tokenizer.

Ollama uses Go's text/template. The template is inferred from the chat template: conversations of unique words are
rendered, and the text between the words is what the template adds. The result is used only if it renders several
conversations identically. Tools and reasoning are not supported; a note is written if the chat template renders tools.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from pathlib import Path
from typing import Any

from loratune.codes import Code
from loratune.data.rendering import Renderer
from loratune.errors import AdapterError, DataError, Problem
from loratune.text import beginning, shell_word

_SYSTEM, _USER, _ANSWER, _NEXT = "QsystemQ", "QquestionQ", "QanswerQ", "QnextQ"
_WORDS = re.compile("|".join((_SYSTEM, _USER, _ANSWER, _NEXT)))
_TOOLS = [{"type": "function", "function": {"name": "tool", "description": "a tool", "parameters": {"type": "object"}}}]
_MARKERS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "[INST]", "<")
"""Strings that turns begin with."""
_ALTERNATIVE = (
    "export it `to='gguf'` `merged=...`, whose file holds the chat template itself, "
    "and run it with llama-server --jinja"
)
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Turns:
    """The text that a chat template adds around the messages of a conversation.

    Attributes:
        begin: The text before the first message.
        ask: The text after the last message, which begins the next answer.
        system: The texts before and after the system message; None if the template does not support one.
        user: The texts before and after a user message.
        assistant: The texts before and after an answer.
        default: The system message of a conversation without one; may be empty.
        joined: Whether the first user message follows the system message without `user[0]`.
    """

    begin: str
    ask: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    default: str = ""
    joined: bool = False

    def render(self, messages: Messages) -> str:
        """The text of a conversation that ends with a question."""
        if self.default and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default}, *messages]
        around = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}
        text = self.begin
        for at, message in enumerate(messages):
            before, after = around[message["role"]]
            if self.joined and at == 1 and messages[0]["role"] == "system":
                before = ""
            text += f"{before}{message['content']}{after}"
        return text + self.ask

    def template(self) -> str:
        """The equivalent Ollama template."""
        before, after = self.user
        if self.joined:
            before = f"{{{{ if not (and $.System (eq $index 1)) }}}}{before}{{{{ end }}}}"
        content = "{{ $message.Content }}"
        branches = f'{{{{ if eq $message.Role "user" }}}}{before}{content}{after}'
        for role, pair in (("system", self.system), ("assistant", self.assistant)):
            if pair is not None:
                branches += f'{{{{ else if eq $message.Role "{role}" }}}}{pair[0]}{content}{pair[1]}'
        messages = f"{{{{ range $index, $message := .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}"
        return f"{self.begin}{messages}{self.ask}"


@dataclass(frozen=True)
class Modelfile:
    """A Modelfile.

    Attributes:
        text: Its content.
        compared: The number of conversations on which its template was compared with the chat template.
        notes: Lines for the user.
    """

    text: str
    compared: int
    notes: tuple[str, ...] = ()

    def lines(self) -> list[tuple[str, str]]:
        """The results of the comparison, as names and texts."""
        rendered = f"{self.compared} conversations rendered as by the chat template" if self.compared else "raw text"
        return [("template", rendered), *(("note", note) for note in self.notes), ("Ollama", "itself was not run")]


def modelfile(renderer: Renderer, file: str, *, chat: bool, system: str = "") -> Modelfile:
    """The Modelfile of a model.

    Args:
        renderer: Renders the rows of the adapter.
        file: The GGUF file in the same directory.
        chat: Whether the adapter was trained on conversations; otherwise prompts are passed on unchanged.
        system: The system message of conversations without one; empty for that of the chat template, if it has one.

    Raises:
        AdapterError: No equivalent Ollama template was found.
    """
    lines, notes, compared = [f"FROM ./{file}"], [], 0
    if chat:
        turns, compared = find_turns(renderer)
        lines.append(f"TEMPLATE {_quoted(turns.template())}")
        if turns.system is None:
            notes.append("system messages are left out of prompts: the chat template takes none, or not in one place")
        if _rendered(renderer, [{"role": "user", "content": _USER}], _TOOLS) is not None:
            notes.append(f"tools are left out of prompts, which the chat template renders: {_ALTERNATIVE}")
        own = _system_in_file(renderer, turns, system) if system else ""
        if spelled := own or turns.default:
            lines.append(f"SYSTEM {_quoted(spelled)}")
        if system:
            what = f"the system message of the training rows, {beginning(system)}, is"
            missing = "not in the Modelfile, which cannot hold it: give it in each request"
            notes.append(f"{what} {'in the Modelfile' if own else missing}")
    else:
        lines.append(f"TEMPLATE {_quoted('{{ .Prompt }}')}")
        notes.append("the adapter was trained on raw text, so prompts are passed on unchanged")
    stops = dict.fromkeys(renderer.tokenizer.convert_ids_to_tokens(sorted(renderer.end_ids)))
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    return Modelfile("\n".join(lines) + "\n", compared, tuple(notes))


def _system_in_file(renderer: Renderer, turns: Turns, system: str) -> str:
    """A system message as a Modelfile gives it to the template, so that a prompt is rendered as by the chat template;
    empty if it cannot."""
    question = {"role": "user", "content": _USER}
    expected = _rendered(renderer, [{"role": "system", "content": system}, question])
    for text in (system, system.strip()) if turns.system is not None else ():
        if not _problem(text) and turns.render([{"role": "system", "content": text}, question]) == expected:
            return text
    return ""


def commands(name: str, file: Path) -> list[str]:
    """The commands that create a model from a Modelfile, and run it."""
    return [f"ollama create {shell_word(name)} -f {shell_word(str(file))}", f"ollama run {shell_word(name)}"]


def find_turns(renderer: Renderer) -> tuple[Turns, int]:
    """The turns of a chat template, and the number of conversations on which they were compared with it.

    Raises:
        AdapterError: No turns reproduce the chat template.
    """
    if "strftime_now" in str(renderer.tokenizer.chat_template):
        raise _refused("it writes the day's date")
    system, bare = _probe(renderer, ("system", _SYSTEM)), _probe(renderer)
    if bare is None:
        raise _refused("it renders no conversation")
    turns = _infer(bare, system)
    try:
        return turns, _check(renderer, turns)
    except AdapterError:
        if system is None or turns.default:
            raise
        alone = replace(turns, system=None, joined=False)
        return alone, _check(renderer, alone)


def _infer(bare: str, system: str | None) -> Turns:
    """Infer turns from a rendered conversation of two questions, without and with a system message."""
    first, after, between, last = _WORDS.split(bare)
    user = _common_end(first, between)
    before_system, after_system = _WORDS.split(system)[:2] if system else ("", "")
    joined = bool(user) and before_system.endswith(user) and not after_system.endswith(user)
    if system and not joined:
        user = _common_end(first, between, after_system)
    begin, default, pair = first.removesuffix(user), "", None
    if system:
        end = after_system if joined else after_system.removesuffix(user)
        inside = begin[len(before_system) : len(begin) - len(end)]
        if not joined and inside and begin == f"{before_system}{inside}{end}":
            begin, default = "", inside
        pair = (before_system.removeprefix(begin), end)
    shared = commonprefix([after, last])  # noqa: RUF071  of characters
    answer = (after.removeprefix(shared), between.removesuffix(user))
    return Turns(begin, last.removeprefix(shared), pair, (user, shared), answer, default, joined)


def _check(renderer: Renderer, turns: Turns) -> int:
    """Compare turns with the chat template. Raises AdapterError: they differ, or Ollama cannot parse the texts."""
    text = "".join((turns.begin, turns.ask, *(turns.system or ()), *turns.user, *turns.assistant))
    if any(mark in text for mark in ("{{", "}}")):
        raise _refused("it holds double braces, which have a meaning for Ollama")
    if what := _problem(f"{text}{turns.default}"):
        raise _refused(f"it holds {what}")
    conversations = [*_conversations(with_system=turns.system is not None)]
    for messages in conversations:
        expected = _rendered(renderer, messages)
        if expected is None or turns.render(messages) != expected:
            raise _refused(f"it renders {expected!r} where Ollama would render {turns.render(messages)!r}")
    return len(conversations)


def _problem(text: str) -> str:
    """What of a text a Modelfile cannot hold; empty if there is nothing."""
    if '"""' in text:
        return "triple quotes, which have a meaning for Ollama"
    is_kept = all(character.isprintable() or character in "\n\t" for character in text)
    return "" if is_kept else "characters that Ollama leaves out of a Modelfile"


def _conversations(*, with_system: bool) -> Iterator[list[dict[str, str]]]:
    """Test conversations of up to three questions, without a system message and with two different ones."""
    for system in [None, "Answer in verse.", "a\n\nb {x}"] if with_system else [None]:
        messages = [{"role": "system", "content": system}] if system else []
        for number in range(3):
            yield [*messages, {"role": "user", "content": 'And "then"?'}]
            messages.append({"role": "user", "content": f"Why {number}?\nSay."})
            messages.append({"role": "assistant", "content": f"So, {number}: <b>"})


def _probe(renderer: Renderer, *first: tuple[str, str]) -> str | None:
    """A rendered conversation of two questions; None if the chat template refuses it or omits a message."""
    words = [*first, ("user", _USER), ("assistant", _ANSWER), ("user", _NEXT)]
    text = _rendered(renderer, [{"role": role, "content": content} for role, content in words])
    return text if text is not None and all(text.count(word) == 1 for _, word in words) else None


def _rendered(renderer: Renderer, messages: Messages, tools: Sequence[Any] = ()) -> str | None:
    """A conversation as text, without the BOS that the tokenizer adds; None if the chat template refuses it or omits
    the tools."""
    try:
        text = renderer.prompt_text([dict(message) for message in messages], tools)
    except DataError:
        return None
    return text.removeprefix(renderer.tokenizer.bos_token) if renderer.starts_with_bos else text


def _common_end(*texts: str) -> str:
    """The common suffix of some texts, starting at a marker: `<|im_start|>user` without the `>` before it."""
    end = commonprefix([text[::-1] for text in texts])[::-1]  # noqa: RUF071  of characters
    return next((end[end.rfind(marker) :] for marker in _MARKERS if marker in end), end)


def _quoted(text: str) -> str:
    return f'"""{text}"""'


def _refused(what: str) -> AdapterError:
    what = f"Ollama cannot render it: {what}"
    return AdapterError(Problem(Code.EXPORT_UNSUPPORTED, what, "the chat template", fix=_ALTERNATIVE))
