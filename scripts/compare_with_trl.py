"""Compare loratune's rows with those of TRL's SFTTrainer, over real tokenizers and chat templates.

    python -m venv /tmp/trlvenv
    echo "$PWD/.venv/lib/python3.11/site-packages" > /tmp/trlvenv/lib/python3.11/site-packages/loratune.pth
    /tmp/trlvenv/bin/pip install --no-deps trl==1.16.0
    PYTHONPATH=.:tests OMP_NUM_THREADS=1 /tmp/trlvenv/bin/python scripts/compare_with_trl.py [ROWS]

TRL stands in a virtual environment of its own, and sees this one's packages. ROWS: of each kind (30). For every
template a real SFTTrainer prepares the rows: pairs and text with their end, pairs of message lists (the completion
supervised), and conversations with `assistant_only_loss` where TRL has a training template for the model. Where the two
differ, one of the reasons below must explain all of it, each with a check of its own; it ends with 1 if one does not.
"""

import argparse
import copy
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from test_rendering import fetched  # type: ignore[import-not-found]
from test_templates import CALLERS, MODELS, TOOLS, rendering  # type: ignore[import-not-found]
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]
from trl.chat_template_utils import get_training_chat_template  # type: ignore[import-not-found]

from loratune.data.formats import Conversation, Example, Message, Plain
from loratune.data.rendering import IGNORED, Renderer, TokenizedRow

ROOT = Path(__file__).resolve().parent.parent
Labelled = tuple[list[int], list[int]]
"""Ids and labels of one row."""

WORDS = (
    *("the", "a", "of", "one", "42", "x=1", "don't", "Straße", "日本語", "café", "🙂", "question", "answer", "model"),
    *("user", "assistant", "system", "3.14", "(yes)", "*bold*", "two\nlines", "tab\there", "e\u0301", "<b>"),
    *("http://a.b/c?d=e", "`code`", "\n\n", "  "),
)
ENDS = ["", ".", "?", "!", " ", "\n", "\n\n", "12"]
TRAILING = "TRL learns what stands after the end of a turn, loratune cuts it off"
FIRST = "TRL keeps a label on the first token, which no position predicts"
MERGED = "characters merge over the border: loratune encodes prompt and answer apart, TRL learns the merged token"
HEADER = "TRL's training template marks the end of the header as supervised, which `generate`'s prompt holds already"
PATCHED = "TRL swaps in a template of its own: under that one one of the other lines holds"
MOVED = "the prompt of `generate` is no beginning of TRL's row: loratune's row begins with it"


Pair = tuple[dict[str, Any], Example]
"""One row: for TRL, and for loratune."""


@dataclass(frozen=True)
class Kind:
    """Rows of one shape. marks: every answer is supervised, by the marks of TRL's training template."""

    name: str
    make: Callable[[random.Random], Pair]
    marks: bool = False


def text(rng: random.Random) -> str:
    """A few words, with an odd end now and then."""
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 12))) + rng.choice(ENDS)


def chat(rng: random.Random, turns: int, system: bool = False, tools: bool = False) -> list[Message]:
    """A conversation of turns, each a question and its answer; tools: each asks a tool first."""
    messages: list[Message] = [{"role": "system", "content": f"Be {text(rng)}"}] if system else []
    for _ in range(turns):
        messages.append({"role": "user", "content": f"Q {text(rng)}"})
        if tools:
            arguments = {"city": text(rng)}
            call = {"id": "abc123XYZ", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            result = {"role": "tool", "name": "get_weather", "tool_call_id": "abc123XYZ", "content": f"r {text(rng)}"}
            messages.append(result)
        messages.append({"role": "assistant", "content": f"A {text(rng)}"})
    return messages


def pair(rng: random.Random) -> Pair:
    """A prompt and its completion."""
    prompt, completion = text(rng), f"{rng.choice(['', ' '])}{text(rng)}"
    return {"prompt": prompt, "completion": completion}, Plain("", prompt, completion)


def whole_text(rng: random.Random) -> Pair:
    """Text without a prompt."""
    words = text(rng)
    return {"text": words}, Plain("", "", words)


def conversation(rng: random.Random, longest: int, system: bool, tools: bool, marks: bool) -> Pair:
    """1 to `longest` turns; marks: every answer is supervised, else the last one, as the completion of the others."""
    messages = chat(rng, rng.randint(1, longest), system, tools)
    schemas = TOOLS if tools else ()
    extra = {"tools": list(TOOLS)} if tools else {}
    row = {"messages": messages} if marks else {"prompt": messages[:-1], "completion": messages[-1:]}
    return row | extra, Conversation("", tuple(messages), 0 if marks else len(messages) - 1, schemas)


def kinds(tools: bool, training: bool) -> Iterator[Kind]:
    """What a template is tried with. training: whether TRL has a training template for it."""
    yield Kind("pairs", pair)
    yield Kind("text", whole_text)
    shapes = {"1 turn": (1, False, False), "1-5 turns": (5, False, False), "system": (3, True, False)}
    if tools:
        shapes["tools"] = (1, False, True)
    for name, shape in shapes.items():
        for marks in (False, True) if training else (False,):
            make = partial(_shaped, shape=shape, marks=marks)
            yield Kind(f"{name}, {'all' if marks else 'last'} supervised", make, marks)


def _shaped(rng: random.Random, shape: tuple[int, bool, bool], marks: bool) -> Pair:
    return conversation(rng, *shape, marks=marks)


def with_trl(tokenizer: Any, rows: list[dict[str, Any]], assistant: bool) -> list[Labelled]:
    """What SFTTrainer makes of rows, with a tiny model."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    with tempfile.TemporaryDirectory() as place:
        args = SFTConfig(
            output_dir=place,
            max_length=None,
            assistant_only_loss=assistant,
            use_cpu=True,
            bf16=False,
            report_to="none",
            shuffle_dataset=False,
        )
        trainer = SFTTrainer(model, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
        return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def trimmed(row: Labelled, ends: tuple[int, ...]) -> Labelled:
    """Without labels between the end of a turn and the next supervised turn, and cut after the last end."""
    ids, labels = row[0], list(row[1])
    over, last = False, len(ids)
    for place, label in enumerate(labels):
        over = over and label != IGNORED
        if over:
            labels[place] = IGNORED
        elif label in ends:
            over, last = True, place + 1
    return ids[:last], labels[:last]


def first_unlabelled(row: Labelled) -> Labelled:
    """Without a label on the first token."""
    return row[0], [IGNORED, *row[1][1:]]


def reason(renderer: Renderer, example: Example, theirs: Labelled) -> str | None:
    """Why loratune's row differs from TRL's; empty if it does not, None if nothing explains it."""
    made = renderer.row(example)
    ours, prompt = (list(made.ids), made.labels), asked(renderer, example)
    if ours == theirs:
        return ""
    theirs = first_unlabelled(theirs)
    if ours == theirs:
        return FIRST
    theirs = trimmed(theirs, renderer.end_ids)
    if ours == theirs:
        return TRAILING
    if ours[0] == theirs[0] and ours == without_header(theirs, ours[1]):
        return HEADER
    if tuple(ours[0][: len(prompt)]) != prompt or tuple(theirs[0][: len(prompt)]) == prompt:
        return None
    if text_of(renderer, ours[0]) == text_of(renderer, theirs[0]):
        return MERGED
    if isinstance(example, Conversation) and last_answer(renderer, theirs).endswith(said(example)):
        return MOVED if last_answer(renderer, ours) in (said(example), f"</think>\n\n{said(example)}") else None
    return None


def text_of(renderer: Renderer, ids: Sequence[int]) -> str:
    """The ids as text."""
    return str(renderer.tokenizer.decode(ids))


def said(example: Conversation) -> str:
    """What the last message says, without the space around it."""
    return str(example.messages[-1]["content"]).strip()


def last_answer(renderer: Renderer, row: Labelled) -> str:
    """The last range that a row teaches, as text without special tokens and the space around it."""
    ids = list(row[1])
    while ids and ids[-1] == IGNORED:
        ids.pop()
    start = max((place + 1 for place, label in enumerate(ids) if label == IGNORED), default=0)
    return str(renderer.tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()


def without_header(row: Labelled, supervised: list[int]) -> Labelled:
    """Without labels on the tokens that stand right before a range of `supervised`, one after the other."""
    labels = list(row[1])
    before = False
    for place in reversed(range(len(labels))):
        before = supervised[place] != IGNORED or (before and labels[place] != IGNORED)
        if before and supervised[place] == IGNORED:
            labels[place] = IGNORED
    return row[0], labels


def asked(renderer: Renderer, example: Example) -> tuple[int, ...]:
    """The ids that `generate` would be given."""
    if isinstance(example, Conversation):
        return renderer.prompt(example.messages[:-1], tools=example.tools)
    assert isinstance(example, Plain)
    return renderer.prompt(example.prompt)


def with_template(tokenizer: Any, template: str) -> Any:
    """A copy of the tokenizer, with another chat template."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def compare(name: str, renderer: Renderer, kind: Kind, count: int) -> Counter[str]:
    """Render `count` rows of a kind with both, and count the reasons why they differ; "?" where there is none."""
    rng = random.Random(f"{name} {kind.name}")
    made = [kind.make(rng) for _ in range(count)]
    theirs = with_trl(renderer.tokenizer, [row for row, _ in made], kind.marks)
    patched = get_training_chat_template(renderer.tokenizer) if kind.marks else None
    under = renderer if patched is None else Renderer(with_template(renderer.tokenizer, patched))
    reasons: Counter[str] = Counter()
    for (_, example), row in zip(made, theirs, strict=True):
        why = reason(renderer, example, row)
        if why is None and under is not renderer and reason(under, example, row) is not None:
            why = PATCHED
        if why is None:
            show(f"{name}, {kind.name}", renderer, renderer.row(example), row)
        reasons["?" if why is None else why] += 1
    return reasons


def show(name: str, renderer: Renderer, ours: TokenizedRow, theirs: Labelled) -> None:
    """Print a difference that nothing explains, as text with the supervised parts in brackets."""
    for who, (ids, labels) in (("loratune", (ours.ids, ours.labels)), ("TRL", theirs)):
        pieces = [
            f"⟦{text_of(renderer, [number])}⟧" if label != IGNORED else text_of(renderer, [number])
            for number, label in zip(ids, labels, strict=True)
        ]
        print(f"{name}, {who}: {''.join(pieces)!r}", file=sys.stderr)


def main() -> None:
    """Compare under every template, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=int, nargs="?", default=30)
    rows = parser.parse_args().rows
    datasets.disable_progress_bars()
    total: Counter[str] = Counter()
    print("| template | rows | equal | explained | unexplained |\n|---|---|---|---|---|")
    for name, model in MODELS.items():
        place = ROOT / "models" / "SmolLM2-135M-Instruct" if name == "SmolLM2" else fetched(model.tokenizer)
        renderer: Renderer = rendering(name, place)
        try:
            training = get_training_chat_template(renderer.tokenizer) is not None or "marked" in name
        except ValueError:
            training = False
        found: Counter[str] = Counter()
        for kind in kinds(name in CALLERS, training):
            found += compare(name, renderer, kind, rows)
        explained = found.total() - found[""] - found["?"]
        print(f"| {name} | {found.total()} | {found['']} | {explained} | {found['?']} |", flush=True)
        total += found
    print(f"\n{total.total()} rows under {len(MODELS)} templates: {total['']} equal ids and labels, and")
    for why, count in total.most_common():
        if why:
            print(f"- {count}: {'unexplained' if why == '?' else why}")
    sys.exit(1 if total["?"] else 0)


if __name__ == "__main__":
    main()
