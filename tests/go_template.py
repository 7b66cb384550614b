"""As much of Go's text/template, and of Ollama's Modelfile, as `loratune export` writes: to see what Ollama would do.

Written after the documentation of text/template (https://pkg.go.dev/text/template) and of the Modelfile
(https://docs.ollama.com/modelfile), and not after the code that writes them.
"""

import re
from dataclasses import dataclass, field
from typing import Any


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """Instructions with their values. A value in triple quotes ends with them; any other, with its line."""
    commands, at = [], 0
    while at < len(text):
        match = re.compile(r"\s*([A-Z]+)[ \t]+").match(text, at)
        if match is None:
            assert not text[at:].strip(), text[at:]
            break
        name, at = match[1], match.end()
        if name == "PARAMETER":
            match = re.compile(r"(\w+)[ \t]+").match(text, at)
            assert match
            name, at = match[1], match.end()
        if text.startswith('"""', at):
            end = text.index('"""\n', at + 3)
            commands.append((name, text[at + 3 : end]))
            at = end + 4
        else:
            end = text.index("\n", at)
            commands.append((name, text[at:end].strip()))
            at = end + 1
    return commands


@dataclass
class Block:
    """The content of a `range` or of one branch of an `if`."""

    nodes: list[Any] = field(default_factory=list)


def parse(template: str) -> Block:
    """A template as nested lists: texts, ("value", e), ("if", [(e, block)]), ("range", variables, e, block)."""
    root = Block()
    stack: list[tuple[str, Any, Block]] = [("root", None, root)]
    for number, piece in enumerate(re.split(r"\{\{(.*?)\}\}", template, flags=re.DOTALL)):
        block = stack[-1][2]
        if number % 2 == 0:
            block.nodes.append(piece)
            continue
        action = piece.strip()
        if match := re.fullmatch(r"range (\$\w+), (\$\w+) := (.+)", action):
            inner = Block()
            block.nodes.append(("range", (match[1], match[2]), match[3], inner))
            stack.append(("range", None, inner))
        elif action.startswith("if "):
            inner = Block()
            branches = [(action[3:], inner)]
            block.nodes.append(("if", branches))
            stack.append(("if", branches, inner))
        elif action.startswith("else if "):
            kind, branches, _ = stack.pop()
            assert kind == "if"
            inner = Block()
            branches.append((action[8:], inner))
            stack.append(("if", branches, inner))
        elif action == "end":
            assert stack.pop()[0] != "root"
        else:
            block.nodes.append(("value", action))
    assert len(stack) == 1, "a block without its end"
    return root


def evaluate(expression: str, scope: dict[str, Any]) -> Any:
    """The value of `eq a b`, `and a b`, `not a`, `"text"`, a number, `.Field`, `$.Field` or `$variable.Field`."""
    words = re.findall(r'"[^"]*"|[()]|[^\s()]+', expression)

    def operand() -> Any:
        word = words.pop(0)
        if word == "(":
            value = call()
            assert words.pop(0) == ")"
            return value
        if word.startswith('"'):
            return word[1:-1]
        if word.isdecimal():
            return int(word)
        name, _, fields = word.partition(".")
        value = scope[name or "."]
        for part in filter(None, fields.split(".")):
            value = value[part]
        return value

    def call() -> Any:
        if words[0] not in ("eq", "and", "not"):
            return operand()
        name = words.pop(0)
        first = operand()
        if name == "not":
            return not first
        second = operand()
        return first == second if name == "eq" else (second if first else first)

    value = call()
    assert not words, words
    return value


def execute(block: Block, scope: dict[str, Any]) -> str:
    """The text of a parsed template."""
    out = []
    for node in block.nodes:
        if isinstance(node, str):
            out.append(node)
        elif node[0] == "value":
            out.append(str(evaluate(node[1], scope)))
        elif node[0] == "if":
            chosen = next((inner for condition, inner in node[1] if evaluate(condition, scope)), Block())
            out.append(execute(chosen, scope))
        else:
            _, (index, item), expression, inner = node
            for number, value in enumerate(evaluate(expression, scope)):
                out.append(execute(inner, scope | {index: number, item: value, ".": value}))
    return "".join(out)


def ollama_prompt(modelfile: str, messages: list[dict[str, str]]) -> str:
    """What Ollama makes of messages: its SYSTEM stands before them unless they begin with one of their own."""
    commands = dict(parse_modelfile(modelfile))
    if "SYSTEM" in commands and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": commands["SYSTEM"]}, *messages]
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    values = {
        "System": system, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages],
        "Prompt": messages[-1]["content"],
    }  # fmt: skip
    return execute(parse(commands["TEMPLATE"]), {".": values, "$": values})
