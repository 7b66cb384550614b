"""A chat template with marks that show which part of its text each iteration of its message loop writes.

Nearly every chat template is a loop over the messages, with something before and after it. What an iteration writes is
the turn of its message: the header, the content, and whatever closes it, be that text, special tokens or both. What
comes after the loop (a header for the next answer, an end of the conversation) belongs to no turn.

So marks are put into the syntax tree of the template: one at the beginning of each iteration of every outermost loop,
and one behind the loop. Loops inside macros, and inside blocks whose text is stored first, are left alone.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jinja2 import nodes

from loratune.data.upstream import chat_template_environment

CONTENT, LOOP = 0xF0000, 0x100000
"""First code points of two private-use planes: marks of contents, and marks of loops."""

MANY = 0xFFFE
"""The number of marks of either kind."""

MARK = re.compile(f"[{chr(CONTENT)}-{chr(CONTENT + MANY - 1)}{chr(LOOP)}-{chr(LOOP + MANY - 1)}]")


@dataclass
class _Iteration:
    """What one iteration of a loop has written. contents: the numbers of the messages whose content it shows."""

    loop: int
    start: int
    end: int = -1
    contents: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class RenderedMessages:
    """A rendered text, with positions in it by the number of a message; a message is missing where they are not known.

    Attributes:
        text: The text.
        marked: Whether any positions are known. They are not where the template renders messages with marks in another
            way than without.
        content_ends: Where the content of a message ends, without the space around it. Messages without content, and
            those that the template leaves out, are missing.
        turn_starts: Where the iteration of the message begins.
        turn_ends: Where the iteration of the message ends.
    """

    text: str
    marked: bool = True
    content_ends: dict[int, int] = field(default_factory=dict)
    turn_starts: dict[int, int] = field(default_factory=dict)
    turn_ends: dict[int, int] = field(default_factory=dict)


class MarkedTemplate:
    """A template with marks around the iterations of its loops."""

    def __init__(self, source: str):
        """Parse a template and mark its loops.

        Raises:
            One of `TEMPLATE_ERRORS`: The source is not a template.
        """
        environment = chat_template_environment(source)
        tree = environment.parse(source)
        _mark_loops(tree, iter(range(0, MANY - 1, 2)))
        tree.set_environment(environment)  # of the nodes that were added
        self._template = environment.from_string(tree)

    def render(self, values: Mapping[str, Any]) -> str:
        """Render the text with its marks. Raises whatever the template raises."""
        return str(self._template.render(**values))


def read_marks(marked: str, text: str) -> RenderedMessages | None:
    """Read the marks in a text as positions in the same text without marks; None if a content is shown twice."""
    content_ends: dict[int, int] = {}
    iterations: list[_Iteration] = []
    current: _Iteration | None = None
    for count, mark in enumerate(MARK.finditer(marked)):
        position, code = mark.start() - count, ord(mark.group())
        if code < LOOP:
            if code - CONTENT in content_ends:
                return None
            content_ends[code - CONTENT] = position
            if current is not None:
                current.contents.append(code - CONTENT)
            continue
        if current is not None:
            current.end, current = position, None
        if (code - LOOP) % 2 == 0:  # the odd marks come after loops
            current = _Iteration(code - LOOP, position)
            iterations.append(current)
    positions = RenderedMessages(text, content_ends=content_ends)
    for loop in {iteration.loop for iteration in iterations}:
        _assign([iteration for iteration in iterations if iteration.loop == loop], positions)
    return positions


def _assign(iterations: list[_Iteration], positions: RenderedMessages) -> None:
    """Note the iterations of one loop as the turns of the messages that they show.

    An iteration that shows no content (of a message that has none, or whose content the template writes in another way)
    belongs to the message between those of its neighbours, if there is an iteration for each message.
    """
    shifts = {
        iteration.contents[0] - number for number, iteration in enumerate(iterations) if iteration.contents
    }  # all equal if iteration and message count alike
    if len(shifts) == 1 and all(len(iteration.contents) < 2 for iteration in iterations):
        shift = shifts.pop()
        for number, iteration in enumerate(iterations, start=shift):
            positions.turn_starts[number], positions.turn_ends[number] = iteration.start, iteration.end
        return
    for iteration in iterations:
        if iteration.contents:
            positions.turn_ends[iteration.contents[-1]] = iteration.end
        if len(iteration.contents) == 1:
            positions.turn_starts[iteration.contents[0]] = iteration.start


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
                child.body.insert(0, _output(chr(LOOP + number), child))
                marked.append(_output(chr(LOOP + number + 1), child))
            elif isinstance(child, nodes.If | nodes.With | nodes.Scope):
                _mark_loops(child, numbers)
        setattr(node, name, marked)


def _output(text: str, origin: nodes.Node) -> nodes.Node:
    """Returns a node that writes a text, on the line of another node."""
    return nodes.Output([nodes.TemplateData(text)]).set_lineno(origin.lineno)
