"""Tool calls of answers: read in the form in which the chat template writes them, and compared as JSON values.

The form is derived from the template: known calls are rendered, and what is around their names and arguments is the
form. It is one of these, here without spaces:

| a call is | templates | example |
|---|---|---|
| an object, or a list | Qwen3, Llama 3, Mistral | `<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>` |
| a name and an object | newer Mistral, GPT-OSS | `[TOOL_CALLS]f[ARGS]{"x": 1}` |
| a name and marked arguments | Qwen3.5, GLM | `<function=f><parameter=x>1</parameter></function>` |
| as for Gemma | Gemma 4 | `<|tool_call>call:f{x:1,y:<|"|>text<|"|>}<tool_call|>` |

The third does not distinguish the text 1 from the number. Text may come before the marks of a call, and after them.
Where there are no marks (Llama 3), calls are the whole answer, with `;` between them.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from loratune.compare.metrics import CALL_ERRORS, TOOL_CALL, read_json
from loratune.data.formats import Message, common_prefix
from loratune.data.formats.reasoning import EMPTY_REASONING
from loratune.data.rendering.chat_template import ChatTemplate, TemplateInput
from loratune.data.rendering.samples import QUESTION, TOOL
from loratune.errors import DataError, ModelError

INVALID, MISSING, FUNCTION, ARGUMENT, NEEDLESS = CALL_ERRORS
_NAME = re.compile(r"""[^\s<>"'()\[\]{}]+""")
_GEMMA_QUOTE, _GEMMA_END = '<|"|>', "<tool_call|>"
_GEMMA = re.compile(r"""<\|"\|>(.*?)<\|"\|>|(?<=[{,])\s*([^\s<>"{}\[\],:]+)\s*:|\bNone\b""", re.DOTALL)
"""A text, a key, or null of some versions."""
_OF_PYTHON = {"None": "null", "True": "true", "False": "false"}
_FIRST: tuple[str, dict[str, Any]] = ("loratune_first", {"loratune_a": "loratune text", "loratune_b": "loratune more"})
_SECOND: tuple[str, dict[str, Any]] = ("loratune_second", {"loratune_c": [1, {"d": True}], "loratune_e": "text, {2}"})
_PYTHON_TAG = "<|python_tag|>"
"""What Llama 3 may write before a call."""
_ID = "loratune0"
"""The id of a call, of nine letters and digits, as Mistral's must be."""


@dataclass(frozen=True)
class Call:
    """A call. arguments: name → value, such that == compares JSON values, see `read_json`."""

    name: str
    arguments: Mapping[str, Any]


class InvalidCallError(ValueError):
    """An answer begins a call that cannot be read."""


Read = tuple[list[Call], int]
"""Calls, and where they end in a text."""
_Body = tuple[int, int, Callable[[str, int], Read]]
"""Where a call begins and ends without its marks, and a function that reads such text from a place on, which raises
ValueError."""


@dataclass(frozen=True)
class CallForm:
    """How a chat template writes calls.

    Attributes:
        template: The template.
        opening: What comes before a call.
        is_marked: Whether that shows that a call follows, wherever it is.
        closing: What comes after a call.
        read: Reads what is between, see `_Body`.
    """

    template: ChatTemplate
    opening: re.Pattern[str]
    is_marked: bool
    closing: re.Pattern[str]
    read: Callable[[str, int], Read]

    @classmethod
    def of(cls, template: ChatTemplate) -> Self | None:
        """The form of a template; None if it writes no calls, or if the form is not known."""
        single, several = _rendered(template, _FIRST), _rendered(template, _FIRST, _SECOND)
        try:
            form = cls._derived(template, single, several)
            found = [form.parse(text) for text in (single, several) if text]
        except ValueError:  # also if a part of the call is not in the text
            return None
        first, second = (Call(name, read_json(json.dumps(arguments))[0]) for name, arguments in (_FIRST, _SECOND))
        return form if found in ([[first]], [[first], [first, second]]) else None

    @classmethod
    def _derived(cls, template: ChatTemplate, single: str, several: str) -> Self:
        """The form, from an answer with one call, and one with two if the template accepts that. Raises ValueError: it
        is not known."""
        place = single.rindex(_FIRST[0], 0, single.index("loratune_a"))
        is_gemma = _GEMMA_QUOTE in single
        body: _Body | None = (place, single.index(_GEMMA_END), _read_gemma) if is_gemma else None
        start, end, read = body or _objects(single, place) or _named(single, place) or _marked(single, place)
        before, after = single[:start], _without_end(template, single[end:])
        if several and single[start] != "[":  # each call has its marks
            second = several.rindex(_SECOND[0], 0, several.index("loratune_c"))
            before, after = _shared(before, several[end : second - (place - start)], single[end:])
        opening, is_marked = _pattern(before), bool(before.strip())
        if not is_marked:
            key = re.escape(single[start:place].rstrip(': "').rpartition('"')[2])
            opening = rf"(?:\A\s*(?:{re.escape(_PYTHON_TAG)})?|\s*;)\s*(?=[\[{{](?s:.*)\"{key}\"\s*:)"
        return cls(template, re.compile(opening), is_marked, re.compile(_pattern(after)), read)

    def parse(self, answer: str) -> list[Call]:
        """The calls of an answer.

        answer: Its text with special tokens.

        Raises InvalidCallError: it begins a call that cannot be read.
        """
        parts = self.template.split_reasoning(answer)
        text = answer if parts is None else parts[1]
        calls, place = list[Call](), 0
        find = self.opening.search if self.is_marked else self.opening.match
        while (found := find(text, place)) is not None:
            try:
                own, place = self.read(text, found.end())
            except ValueError as error:
                raise InvalidCallError(str(error)) from None
            calls += own
            closed = self.closing.match(text, place)
            if closed is None:
                raise InvalidCallError("a call does not end as the template ends it")
            place = closed.end()
            is_last = not _without_end(self.template, text[place:])
            if not (closed.group().strip() or is_last or self.opening.match(text, place)):
                raise InvalidCallError("a call is followed by other text")
        return calls


def call_error(expected: Sequence[Call], given: Sequence[Call] | None) -> tuple[str, tuple[str, ...]]:
    """What is wrong with the calls of an answer: one of `CALL_ERRORS`, empty if they are right, and the names of the
    arguments that differ. The order of calls does not count.

    given: None for a call that cannot be read.
    """
    if not expected:
        return (NEEDLESS if given is None or given else ""), ()
    if not given:
        return (INVALID if given is None else MISSING), ()
    if Counter(call.name for call in expected) != Counter(call.name for call in given):
        return FUNCTION, ()
    left, differing = [*given], set[str]()
    for call in sorted(expected, key=lambda call: call not in given):  # equal calls first
        other = call if call in left else next(one for one in left if one.name == call.name)
        left.remove(other)
        names = call.arguments.keys() | other.arguments.keys()
        differing |= {
            name for name in names
            if (name in call.arguments) != (name in other.arguments) or call.arguments[name] != other.arguments[name]
        }  # fmt: skip
    return (ARGUMENT if differing else ""), tuple(sorted(differing))


def call_scores(error: str, *, is_expected: bool) -> dict[str, float]:
    """The scores of an answer by its error: whether its calls are right, and each error that was possible."""
    possible = CALL_ERRORS[:-1] if is_expected else CALL_ERRORS[-1:]
    return {TOOL_CALL: float(not error), **{kind: float(kind == error) for kind in possible}}


@dataclass(frozen=True)
class CallErrors:
    """How often the calls of a model are right, and what is wrong with the others, in rows with their copies.

    Attributes:
        rows: The rows that were asked.
        calls: Those that expect a call.
        right: Those with the expected calls, or none where none is expected.
        errors: Each of `CALL_ERRORS` → its rows.
        arguments: The name of an argument → the rows in which only arguments are wrong, and this one is; the most
            frequent first.
    """

    rows: int
    calls: int
    right: int
    errors: dict[str, int]
    arguments: dict[str, int]

    @classmethod
    def of(cls, answers: Iterable[tuple[int, Mapping[str, float], Sequence[str]]]) -> Self:
        """answers: copies, scores and wrong arguments of each row."""
        counts, arguments = Counter[str](), Counter[str]()
        for copies, scores, wrong in answers:
            counts.update({name: copies * int(scores.get(name, 0)) for name in (TOOL_CALL, *CALL_ERRORS)})
            counts.update(rows=copies, calls=copies * (NEEDLESS not in scores))
            arguments.update(dict.fromkeys(wrong, copies))
        errors = {kind: counts[kind] for kind in CALL_ERRORS}
        return cls(counts["rows"], counts["calls"], counts[TOOL_CALL], errors, dict(arguments.most_common()))


# Forms


def _rendered(template: ChatTemplate, *calls: tuple[str, dict[str, Any]]) -> str:
    """An answer with calls; empty if the template refuses or omits them."""
    made = [
        {"type": "function", "id": _ID, "function": {"name": name, "arguments": arguments}} for name, arguments in calls
    ]
    answer: Message = {"role": "assistant", "content": "", "tool_calls": made}
    try:
        prompt = template.text(TemplateInput([QUESTION], (TOOL,)), prompt=True)
        text = template.text(TemplateInput([QUESTION, answer], (TOOL,)))
    except (DataError, ModelError):
        return ""
    text = text[common_prefix(text, prompt) :]
    empty = EMPTY_REASONING.match(text)
    text = text[empty.end() :] if empty else text
    return text if all(name in text for name, _ in calls) else ""


def _without_end(template: ChatTemplate, text: str) -> str:
    """A text without the tokens that end an answer."""
    for token in template.end_tokens:
        text = text.rstrip().removesuffix(token)
    return text.rstrip()


def _objects(text: str, place: int) -> _Body | None:
    """The object around a name, or the list around it."""
    name, arguments = _FIRST[0], read_json(json.dumps(_FIRST[1]))[0]
    for bracket in re.finditer(r"[\[{]", text[:place]):
        try:
            value, end = read_json(text, bracket.start())
        except ValueError:
            continue
        one = value[0] if isinstance(value, list) and value else value
        known = one if isinstance(one, dict) else {}
        keys = [key for part in (name, arguments) for key, own in known.items() if own == part]
        if len(keys) == 2:
            return bracket.start(), end, partial(_read_objects, *keys)
    return None


def _read_objects(name: str, arguments: str, text: str, place: int) -> Read:
    value, end = read_json(text, place)
    calls = []
    for one in value if isinstance(value, list) else [value]:
        if not (isinstance(one, dict) and isinstance(one.get(name), str) and isinstance(one.get(arguments), dict)):
            raise ValueError(f"a call is an object with `{name}` and `{arguments}`")
        calls.append(Call(one[name], one[arguments]))
    return calls, end


def _named(text: str, place: int) -> _Body | None:
    """The object of arguments after a name."""
    after = place + len(_FIRST[0])
    start = text.find("{", after)
    try:
        _, end = read_json(text, start) if start >= 0 else (None, 0)
    except ValueError:
        return None
    middle = _pattern(text[after:start]).replace(_ID, r"[\w-]*")
    return (place, end, partial(_read_named, re.compile(middle))) if end else None


def _read_named(middle: re.Pattern[str], text: str, place: int) -> Read:
    name, place = _matched(_NAME, text, place)
    arguments, end = read_json(text, _matched(middle, text, place)[1])
    if not isinstance(arguments, dict):
        raise ValueError("the arguments of a call are an object")
    return [Call(name, arguments)], end


def _marked(text: str, place: int) -> _Body:
    """The marked arguments after a name. Raises ValueError: they are not in the text."""
    parts = [_FIRST[0], *(part for pair in _FIRST[1].items() for part in pair)]
    starts = [place]
    for part in parts[1:]:
        starts.append(text.index(part, starts[-1]))
    ends = [start + len(part) for start, part in zip(starts, parts, strict=True)]
    head, middle, between, _ = (text[end:start] for end, start in zip(ends[:-1], starts[1:], strict=True))
    opening, closing = _shared(head, between, text[ends[-1] :])
    if not all(mark.strip() for mark in (opening, middle, closing)):
        raise ValueError("arguments have no marks")
    marks = [re.compile(_pattern(mark)) for mark in (head.removesuffix(opening), opening, middle, closing)]
    return place, ends[-1] + len(closing), partial(_read_marked, marks)


def _read_marked(marks: Sequence[re.Pattern[str]], text: str, place: int) -> Read:
    head, opening, middle, closing = marks
    name, place = _matched(_NAME, text, place)
    place, arguments = _matched(head, text, place)[1], dict[str, Any]()
    while (found := opening.match(text, place)) is not None:
        after = middle.search(text, found.end())
        if after is None or (end := closing.search(text, after.end())) is None:
            raise ValueError("an argument is not complete")
        key, value = text[found.end() : after.start()], text[after.end() : end.start()]
        try:
            arguments[key] = read_json(_OF_PYTHON.get(value, value))[0]
        except ValueError:  # text has no quotation marks
            arguments[key] = value
        place = end.end()
    return [Call(name, arguments)], place


def _read_gemma(text: str, place: int) -> Read:
    """Reads `f{x:1,y:<|"|>text<|"|>}`."""
    name, place = _matched(_NAME, text, place)
    if (end := text.find(_GEMMA_END, place)) < 0:
        raise ValueError("a call is not complete")

    def in_json(found: re.Match[str]) -> str:
        value, key = found.groups()
        return json.dumps(value) if value is not None else f"{json.dumps(key)}:" if key is not None else "null"

    arguments, _ = read_json(_GEMMA.sub(in_json, text[place:end]))
    if not isinstance(arguments, dict):
        raise ValueError("the arguments of a call are an object")
    return [Call(name, arguments)], end


def _shared(before: str, between: str, after: str) -> tuple[str, str]:
    """The whole marks with which `before` and `between` end, and those with which `between` and `after` begin."""
    opening = before[len(before) - common_prefix(before[::-1], between[::-1]) :]
    closing = re.match(r".*[>\]]", after[: common_prefix(after, between)], re.DOTALL)
    whole = re.search(r"[<\[].*", opening, re.DOTALL)
    return whole.group() if whole else opening, closing.group() if closing else ""


def _matched(pattern: re.Pattern[str], text: str, place: int) -> tuple[str, int]:
    """What a pattern matches at a place, and where that ends. Raises ValueError: it does not."""
    if (found := pattern.match(text, place)) is None:
        raise ValueError("a call has no name, or not what the template writes after it")
    return found.group(), found.end()


def _pattern(mark: str) -> str:
    """A mark, with any white space around it and in the places of its own."""
    return r"\s*".join(["", *map(re.escape, mark.split()), ""])
