"""A chat template that tells which part of its text each round of its loop over the messages writes.

Nearly every chat template is a loop over the messages with something before and after it. What a round writes is the
turn of its message: the header, the content, and whatever closes it, be that text, special tokens or both. What comes
after the loop (a header for the next answer, an end of the conversation) belongs to no turn. So the syntax tree of the
template is given marks: one at the beginning of each round of every outermost loop, and one behind the loop. Loops
within macros and within blocks whose text is stored first are left alone.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import nodes

# What `apply_chat_template` renders with: the environment with its sandbox, filters and extensions, and the names under
# which reasoning is handed over. test_templates.py::test_marks_of_rounds_change_no_text tells when either has changed.
from transformers.utils.chat_template_utils import _alias_reasoning_fields, _compile_jinja_template

from loratune.data.formats import Message

CONTENT, LOOP = 0xF0000, 0x100000
"""First characters of two planes that have no meaning but a private one: marks of contents, and of loops."""

MANY = 0xFFFE
"""How many marks there are of either kind."""

MARK = re.compile(f"[{chr(CONTENT)}-{chr(CONTENT + MANY - 1)}{chr(LOOP)}-{chr(LOOP + MANY - 1)}]")


@dataclass
class _Round:
    """What one round of a loop has written. contents: the numbers of the messages whose content it shows."""

    loop: int
    start: int
    end: int = -1
    contents: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Places:
    """Places in a rendered text, by the number of a message.

    said: where its content ends, without the space around it; opens, closes: where its round begins and ends. Each is
    missing where it is not known.
    """

    said: dict[int, int] = field(default_factory=dict)
    opens: dict[int, int] = field(default_factory=dict)
    closes: dict[int, int] = field(default_factory=dict)


class Rounds:
    """A template with marks around the rounds of its loops."""

    def __init__(self, source: str):
        """Raises one of `TEMPLATE_ERRORS`: it is none."""
        environment = _compile_jinja_template(source).environment
        tree = environment.parse(source)
        _mark_loops(tree, iter(range(0, MANY - 1, 2)))
        self._template = environment.from_string(tree.set_environment(environment))

    def render(self, values: Mapping[str, Any]) -> str:
        """The text with its marks. Raises whatever the template raises."""
        return str(self._template.render(**values))


def with_reasoning(messages: Sequence[Message]) -> list[Message]:
    """The messages with their reasoning under every name that upstream gives it."""
    return list(_alias_reasoning_fields(list(messages)))


def places(marked: str) -> Places | None:
    """What the marks in a text say, as places in the text without them; None if a content is shown more than once."""
    said: dict[int, int] = {}
    rounds: list[_Round] = []
    current: _Round | None = None
    for count, mark in enumerate(MARK.finditer(marked)):
        place, code = mark.start() - count, ord(mark.group())
        if code < LOOP:
            if code - CONTENT in said:
                return None
            said[code - CONTENT] = place
            if current is not None:
                current.contents.append(code - CONTENT)
            continue
        if current is not None:
            current.end, current = place, None
        if (code - LOOP) % 2 == 0:
            current = _Round(code - LOOP, place)
            rounds.append(current)
    found = Places(said)
    for loop in {round.loop for round in rounds}:
        _assign([round for round in rounds if round.loop == loop], found)
    return found


def _assign(rounds: list[_Round], found: Places) -> None:
    """Note the rounds of one loop with the messages that they show.

    A round that shows no content (of a message that has none, or whose content the template writes in another way) is
    that of the message between its neighbours', if there is a round for each message.
    """
    shifts = {round.contents[0] - number for number, round in enumerate(rounds) if round.contents}
    if len(shifts) == 1 and all(len(round.contents) < 2 for round in rounds):
        shift = shifts.pop()
        for number, round in enumerate(rounds, start=shift):
            found.opens[number], found.closes[number] = round.start, round.end
        return
    for round in rounds:
        if round.contents:
            found.closes[round.contents[-1]] = round.end
        if len(round.contents) == 1:
            found.opens[round.contents[0]] = round.start


def _mark_loops(node: nodes.Node, numbers: Iterator[int]) -> None:
    """Mark the loops whose text goes straight into that of the template."""
    for name in ("body", "else_", "elif_"):
        children = getattr(node, name, None)
        if not isinstance(children, list):
            continue
        marked: list[nodes.Node] = []
        for child in children:
            marked.append(child)
            if isinstance(child, nodes.For) and (number := next(numbers, None)) is not None:
                child.body.insert(0, _written(chr(LOOP + number), child))
                marked.append(_written(chr(LOOP + number + 1), child))
            elif isinstance(child, nodes.If | nodes.With | nodes.Scope):
                _mark_loops(child, numbers)
        setattr(node, name, marked)


def _written(text: str, beside: nodes.Node) -> nodes.Node:
    return nodes.Output([nodes.TemplateData(text)]).set_lineno(beside.lineno)
