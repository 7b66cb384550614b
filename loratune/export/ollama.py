"""A Modelfile for Ollama, whose template renders what the chat template of a tokenizer renders.

Ollama has templates of its own, in Go's text/template. This one is read off the chat template: conversations of words
that occur nowhere else are rendered, and what stands between the words is what the template puts there. It is used only
if it gives the text of the chat template for each of several conversations. Tools and reasoning are no part of it; a
note says so of tools that the chat template renders.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loratune.codes import Code
from loratune.data.rendering import Renderer
from loratune.errors import AdapterError, DataError, Problem

_SYSTEM, _USER, _ANSWER, _NEXT = "QsystemQ", "QquestionQ", "QanswerQ", "QnextQ"
_RAW = "{{ .Prompt }}"
_TOOLS = (
    {"type": "function", "function": {"name": "tool", "description": "a tool", "parameters": {"type": "object"}}},
)
_TEMPLATE_ITSELF = (
    "export it --to gguf --merged, whose file holds the chat template itself, and run it with llama-server --jinja"
)
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Turns:
    """What a chat template puts around the messages of a conversation.

    Attributes:
        begin: What stands before the first message.
        ask: What stands after the last one, and begins the next answer.
        system: The texts before and after the system message; None if the template takes none.
        user: Before and after the user's.
        assistant: Before and after an answer.
        default: The system message of a conversation without one; empty if there is none.
        joined: Whether the first message of the user follows the system message without `user[0]`.
    """

    begin: str
    ask: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    default: str
    joined: bool

    def render(self, messages: Messages) -> str:
        """The text of a conversation that ends with a question."""
        if self.default and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default}, *messages]
        around = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}
        parts = [self.begin]
        for at, message in enumerate(messages):
            before, after = around[message["role"]]
            if self.joined and at == 1 and messages[0]["role"] == "system":
                before = ""
            parts.append(f"{before}{message['content']}{after}")
        return "".join([*parts, self.ask])

    def template(self) -> str:
        """The same as a template of Ollama."""
        before, after = self.user
        if self.joined:
            before = f"{{{{ if not (and $.System (eq $index 1)) }}}}{before}{{{{ end }}}}"
        content = "{{ $message.Content }}"
        branches = f'{{{{ if eq $message.Role "user" }}}}{before}{content}{after}'
        for role, pair in (("system", self.system), ("assistant", self.assistant)):
            if pair is not None:
                branches += f'{{{{ else if eq $message.Role "{role}" }}}}{pair[0]}{content}{pair[1]}'
        return (
            f"{self.begin}{{{{ range $index, $message := .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}{self.ask}"
        )


@dataclass(frozen=True)
class Modelfile:
    """A Modelfile.

    Attributes:
        text: Its text.
        compared: On how many conversations its template was compared with the chat template.
        notes: What a user should know of it.
    """

    text: str
    compared: int
    notes: tuple[str, ...] = ()


def modelfile(renderer: Renderer, file: str, *, chat: bool) -> Modelfile:
    """The Modelfile of a model.

    Args:
        renderer: What renders the rows of the adapter.
        file: The GGUF file beside it.
        chat: Whether the adapter was trained on conversations; otherwise prompts are passed on as they are.

    Raises:
        AdapterError: The chat template renders something that no such template can.
    """
    tokenizer, notes, compared, turns = renderer.tokenizer, [], 0, None
    lines = [f"FROM ./{file}"]
    if chat:
        turns, compared = find_turns(renderer)
        lines.append(f"TEMPLATE {_quoted(turns.template())}")
        if turns.system is None:
            notes.append("system messages are left out of prompts: the chat template takes none, or not in one place")
        if _rendered(renderer, [{"role": "user", "content": _USER}], _TOOLS) is not None:
            notes.append(f"tools are left out of prompts, which the chat template renders: {_TEMPLATE_ITSELF}")
        if turns.default:
            lines.append(f"SYSTEM {_quoted(turns.default)}")
    else:
        lines.append(f"TEMPLATE {_quoted(_RAW)}")
        notes.append("the adapter was trained on raw text, so prompts are passed on as they are")
    stops = dict.fromkeys(tokenizer.convert_ids_to_tokens(sorted(renderer.end_ids)))
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    return Modelfile("\n".join(lines) + "\n", compared, tuple(notes))


def find_turns(renderer: Renderer) -> tuple[Turns, int]:
    """What a chat template puts around messages, and on how many conversations that was compared with it.

    Raises:
        AdapterError: The pieces do not give what the template renders.
    """
    where = "the chat template"
    if "strftime_now" in str(renderer.tokenizer.chat_template):
        raise _refused(where, "it writes the day's date")
    system = _text(renderer, _SYSTEM)
    bare = _text(renderer)
    if bare is None:
        raise _refused(where, "renders no conversation")
    first, after, between, last = _between(bare, _USER, _ANSWER, _NEXT)
    user = _common_end(first, between)
    before_system, after_system = _between(system, _SYSTEM, _USER)[:2] if system else ("", "")
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
    shared = _common_start(after, last)
    answer = (after.removeprefix(shared), between.removesuffix(user))
    turns = Turns(begin, last.removeprefix(shared), pair, (user, shared), answer, default, joined)
    try:
        return turns, _check(renderer, turns, where)
    except AdapterError:
        if system is None or default:
            raise
        alone = replace(turns, system=None, joined=False)
        return alone, _check(renderer, alone, where)


def _check(renderer: Renderer, turns: Turns, where: str) -> int:
    """Compare with the chat template. Raises AdapterError: they differ, or Ollama cannot read the pieces."""
    text = "".join((turns.begin, turns.ask, *(turns.system or ()), *turns.user, *turns.assistant))
    if any(mark in text for mark in ("{{", "}}")) or '"""' in f"{text}{turns.default}":
        raise _refused(where, "holds double braces or triple quotes, which Ollama reads otherwise")
    if any(not character.isprintable() and character not in "\n\t" for character in f"{text}{turns.default}"):
        raise _refused(where, "holds characters that Ollama leaves out of a Modelfile")
    compared = 0
    for system in [None] if turns.system is None else [None, "Answer in verse.", "a\n\nb {x}"]:
        for pairs in range(3):
            messages = [{"role": "system", "content": system}] if system else []
            for number in range(pairs):
                messages += [{"role": "user", "content": f"Why {number}?\nSay."}]
                messages += [{"role": "assistant", "content": f"So, {number}: <b>"}]
            messages.append({"role": "user", "content": 'And "then"?'})
            expected = _rendered(renderer, messages)
            if expected is None or turns.render(messages) != expected:
                what = f"renders {expected!r} where a template of Ollama would give {turns.render(messages)!r}"
                raise _refused(where, what)
            compared += 1
    return compared


def _text(renderer: Renderer, system: str | None = None) -> str | None:
    """A conversation of two questions as the chat template renders it; None if it refuses it, or loses a message."""
    words = [("user", _USER), ("assistant", _ANSWER), ("user", _NEXT)]
    if system is not None:
        words.insert(0, ("system", system))
    text = _rendered(renderer, [{"role": role, "content": content} for role, content in words])
    return text if text is not None and all(text.count(word) == 1 for _, word in words) else None


def _rendered(renderer: Renderer, messages: Messages, tools: Sequence[Any] = ()) -> str | None:
    """A conversation as text, without the token that the tokenizer puts before every text itself; None if the chat
    template refuses it, or omits the tools."""
    try:
        text = renderer.prompt_text([dict(message) for message in messages], tools)
    except DataError:
        return None
    return text.removeprefix(renderer.tokenizer.bos_token) if renderer.starts_with_bos else text


def _between(text: str, *words: str) -> list[str]:
    """What stands before, between and after some words."""
    parts = []
    for word in words:
        before, _, text = text.partition(word)
        parts.append(before)
    return [*parts, text]


def _common_start(one: str, two: str) -> str:
    return next((one[:at] for at, pair in enumerate(zip(one, two, strict=False)) if len({*pair}) == 2), min(one, two))


def _common_end(*texts: str) -> str:
    """The end that some texts have in common, from where a marker begins: `<|im_start|>user`, and no `>` before it."""
    length = 0
    while length < min(map(len, texts)) and len({text[-length - 1] for text in texts}) == 1:
        length += 1
    end = texts[0][len(texts[0]) - length :]
    places = [at for marker in ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "[INST]", "<")
              if (at := end.rfind(marker)) >= 0]  # fmt: skip
    return end[places[0] :] if places else end


def _quoted(text: str) -> str:
    return f'"""{text}"""'


def _refused(where: str, what: str) -> AdapterError:
    what = f"Ollama cannot render it: {what}"
    return AdapterError(Problem(Code.EXPORT_TEMPLATE, what, where, fix=_TEMPLATE_ITSELF))
