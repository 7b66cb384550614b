"""Compare loratune's rows with those of TRL's SFTTrainer, over real tokenizers and chat templates.

    python -m venv /tmp/trlvenv
    echo "$PWD/.venv/lib/python3.11/site-packages" > /tmp/trlvenv/lib/python3.11/site-packages/loratune.pth
    /tmp/trlvenv/bin/pip install --no-deps trl==1.16.0
    PYTHONPATH=.:tests OMP_NUM_THREADS=1 /tmp/trlvenv/bin/python scripts/compare_with_trl.py [ROWS]

TRL stands in a virtual environment of its own, and sees this one's packages. ROWS: of each kind (30). For every
template a real SFTTrainer prepares the rows: pairs and text with their end, pairs of message lists (the completion
learnt), and conversations with `assistant_only_loss` where TRL has a training template for the model. Where the two
differ, one of the reasons below must explain all of it, each with a check of its own; it ends with 1 if one does not.
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from test_render import fetched  # type: ignore[import-not-found]
from test_templates import CALLERS, MODELS, TOOLS, rendering  # type: ignore[import-not-found]
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]
from trl.chat_template_utils import get_training_chat_template  # type: ignore[import-not-found]

from loratune.data.formats import Conversation, Example, Message, Plain
from loratune.data.render import IGNORED, Renderer

ROOT = Path(__file__).resolve().parent.parent
Labelled = tuple[list[int], list[int]]
"""Ids and labels of one row."""

WORDS = [
    *"the a of one 42 x=1 don't Straße 日本語 café 🙂 question answer model user assistant system 3.14 (yes) *bold*".split(),
    *("two\nlines", "tab\there", "e\u0301", "<b>", "http://a.b/c?d=e", "`code`", "\n\n", "  "),
]
ENDS = ["", ".", "?", "!", " ", "\n", "\n\n", "12"]
TRAILING = "TRL learns what stands after the end of a turn, loratune cuts it off"
FIRST = "TRL keeps a label on the first token, which no position predicts"
MERGED = "characters merge over the border: loratune encodes prompt and answer apart, TRL learns the merged token"
PATCHED = "TRL swaps in a template of its own: under that one the rows are equal"
MOVED = "the prompt of `generate` is no beginning of TRL's row: loratune's row begins with it"


@dataclass(frozen=True)
class Kind:
    """Rows of one shape: for TRL, and for loratune. assistant: every turn is learnt, through TRL's training template."""

    name: str
    trl: Callable[[Any], dict[str, Any]]
    ours: Callable[[Any], Example]
    make: Callable[[random.Random], Any]
    assistant: bool = False


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


def two_lists(messages: list[Message]) -> dict[str, Any]:
    """The last turn as completion."""
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def kinds(tools: bool, training: bool) -> Iterator[Kind]:
    """What a template is tried with. training: whether TRL has a training template for it."""
    yield Kind(
        "pairs",
        lambda row: {"prompt": row[0], "completion": row[1]},
        lambda row: Plain("", *row),
        lambda rng: (text(rng), f"{rng.choice(['', ' '])}{text(rng)}"),
    )
    yield Kind("text", lambda row: {"text": row}, lambda row: Plain("", "", row), text)
    chats: dict[str, Callable[[random.Random], list[Message]]] = {
        "1 turn": lambda rng: chat(rng, 1),
        "2-5 turns": lambda rng: chat(rng, rng.randint(2, 5)),
        "system": lambda rng: chat(rng, rng.randint(1, 3), system=True),
    }
    if tools:
        chats["tools"] = lambda rng: chat(rng, 1, tools=True)
    for name, make in chats.items():
        schemas = TOOLS if name == "tools" else ()
        extra = {"tools": list(TOOLS)} if name == "tools" else {}
        yield Kind(
            f"{name}, last learnt",
            lambda row, extra=extra: two_lists(row) | extra,
            lambda row, schemas=schemas: Conversation("", tuple(row), len(row) - 1, schemas),
            make,
        )
        if training:
            yield Kind(
                f"{name}, all learnt",
                lambda row, extra=extra: {"messages": row} | extra,
                lambda row, schemas=schemas: Conversation("", tuple(row), 0, schemas),
                make,
                assistant=True,
            )


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
    """Without labels between the end of a turn and the next learnt turn, and cut after the last end."""
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


def reason(ours: Labelled, theirs: Labelled, renderer: Renderer, prompt: tuple[int, ...]) -> str | None:
    """Why two rows under one template differ; empty if they do not, None if nothing explains it."""
    if ours == theirs:
        return ""
    theirs = first_unlabelled(theirs)
    if ours == theirs:
        return FIRST
    theirs = trimmed(theirs, renderer.end_ids)
    if ours == theirs:
        return TRAILING
    decode = renderer.tokenizer.decode
    begins = tuple(ours[0][: len(prompt)]) == prompt
    if begins and tuple(theirs[0][: len(prompt)]) != prompt:
        learnt = [label for label in ours[1] if label != IGNORED]
        return MERGED if decode(ours[0]) == decode(theirs[0]) else MOVED if learnt else None
    return None


def compare(name: str, renderer: Renderer, kind: Kind, count: int) -> Counter[str]:
    """Render `count` rows of a kind with both, and count the reasons why they differ; "?" where there is none."""
    rng = random.Random(f"{name} {kind.name}")
    made = [kind.make(rng) for _ in range(count)]
    tokenizer = renderer.tokenizer
    theirs = with_trl(tokenizer, [kind.trl(row) for row in made], kind.assistant)
    examples = [kind.ours(row) for row in made]
    patched = get_training_chat_template(tokenizer) if kind.assistant else None
    found = [(list(row.ids), row.labels) for row in renderer.rows(examples)]
    asked = [renderer.prompt(*_asked(example)) for example in examples]
    reasons = [
        reason(*row, renderer, prompt) for row, prompt in zip(zip(found, theirs, strict=True), asked, strict=True)
    ]
    if patched is not None and None in reasons or MOVED in reasons and patched is not None:
        own = tokenizer.chat_template
        tokenizer.chat_template = patched
        under = Renderer(tokenizer)
        for place, (example, row) in enumerate(zip(examples, theirs, strict=True)):
            if reasons[place] in (None, MOVED):
                again = under.row(example)
                same = reason((list(again.ids), again.labels), row, under, under.prompt(*_asked(example)))
                reasons[place] = PATCHED if same in ("", FIRST, TRAILING) else same
        tokenizer.chat_template = own
    for place, why in enumerate(reasons):
        if why is None:
            show(name, kind, renderer, found[place], theirs[place])
    return Counter("?" if why is None else why for why in reasons)


def _asked(example: Example) -> tuple[Any, ...]:
    if isinstance(example, Plain):
        return (example.prompt,)
    assert isinstance(example, Conversation)
    return example.messages[:-1], "prompt", example.tools


def show(name: str, kind: Kind, renderer: Renderer, ours: Labelled, theirs: Labelled) -> None:
    """Print a difference that nothing explains, as text with the learnt parts in brackets."""
    for who, (ids, labels) in (("loratune", ours), ("TRL", theirs)):
        pieces = [
            f"⟦{renderer.tokenizer.decode([number])}⟧" if label != IGNORED else renderer.tokenizer.decode([number])
            for number, label in zip(ids, labels, strict=True)
        ]
        print(f"{name}, {kind.name}, {who}: {''.join(pieces)!r}", file=sys.stderr)


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
