"""What computing shared prefixes once brings, and what looking for them costs where there are none.

    python scripts/measure_prefixes.py [--model models/SmolLM2-135M-Instruct] [--steps 12] [--size 8 --size 32]
    python scripts/measure_prefixes.py --search         # what `auto` costs before a run, over 5,000 and 100,000 rows
    python scripts/measure_prefixes.py --packs          # packs of `packing: full` that are filled up in two ways

Sets of rows: those of the quickstart; calls of tools, with one schema of 400 tokens before all of them; the natural set
of scripts/bench.py, whose rows begin differently; and definitions of some words, which do so too. For each batch, two
variants take the same rows, one after the other, the first one now first and now last. The table has medians and
quartiles of the ratios of their times: of whole steps, without the optimizer, with shared prefixes and without; and as
`auto` decides it for the set, and without. Times are those of the processor in this process, so other processes on the
machine matter little.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune import kernels
from loratune.config import DataSection, LoraSection, Source
from loratune.data.packing import BatchLayout, best_fit, flatten, share_prefixes
from loratune.data.prefix_tree import PrefixTree
from loratune.lora import attach, targets
from loratune.training.batching import sharing
from peers.common import read
from peers.sets import rows_file

ROOT = Path(__file__).resolve().parent.parent
AUTO = DataSection(train=Source(path="rows"))
WORK = Path.home() / ".cache" / "loratune-bench" / "data"
SCHEMA_TOKENS = 400
Row = dict[str, list[int]]


def main(
    model: Path = ROOT / "models" / "SmolLM2-135M-Instruct",
    steps: int = 12,
    size: Annotated[list[int], typer.Option(help="Rows of a batch.")] = [8, 32],  # noqa: B006
    only: Annotated[str, typer.Option(help="One of the sets.")] = "",
    work: Annotated[Path, typer.Option(help="Where the rows of scripts/bench.py are put.")] = WORK,
    search: Annotated[bool, typer.Option(help="Time what is done before a run instead.")] = False,
    packs: Annotated[bool, typer.Option(help="Compare ways to fill up packs instead.")] = False,
) -> None:
    """Measure all sets, or one."""
    kernels.keep_pages()
    tokenizer = AutoTokenizer.from_pretrained(model)
    makers: dict[str, Callable[[], Iterator[Row]]] = {
        "quickstart": lambda: _quickstart(tokenizer), "tools": lambda: _tools(tokenizer),
        "natural": lambda: _benchmark(model, work), "definitions": lambda: _definitions(tokenizer),
    }  # fmt: skip
    sets = {name: [*make()] for name, make in makers.items() if only in ("", name)}
    if packs:
        _compare_packs(sets)
        return
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    section = LoraSection(r=8, lora_alpha=16)
    adapted = attach.attach(base, section, targets.find(base, section).peft(), seed=0).train()
    with kernels.accelerated(adapted, attach.adapted_linear):
        if search:
            _search(adapted, sets["natural"], size)
            return
        print("| rows | batch | tokens saved | auto | shared / not | auto / not |\n|---|---|---|---|---|---|")
        for name, rows in sets.items():
            for count in size:
                print(f"| {name} | {count} | {_measured(adapted, rows, count, steps)} |", flush=True)


def _row(tokenizer: Any, prompt: str, completion: str) -> Row:
    first, then = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion))
    return {"input_ids": [*first, *then], "labels": [-100] * len(first) + then}


def _quickstart(tokenizer: Any) -> Iterator[Row]:
    for line in (ROOT / "configs" / "quickstart" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield _row(tokenizer, row["prompt"], row["completion"] + tokenizer.eos_token)


def _tools(tokenizer: Any) -> Iterator[Row]:
    """The quickstart's definitions behind a schema, answered by a call."""
    properties = {
        f"argument_{number}": {"type": "string", "description": f"what it is {number}"} for number in range(40)
    }
    schema = tokenizer(json.dumps({"name": "classify", "parameters": {"properties": properties}}))["input_ids"]
    start = tokenizer.decode(schema[:SCHEMA_TOKENS])
    for line in (ROOT / "configs" / "quickstart" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question = row["prompt"].split("Definition:")[1]
        call = json.dumps({"name": "classify", "arguments": {"argument_0": row["completion"].strip()}})
        yield _row(tokenizer, f"{start}\nUser:{question}\nCall:", f" {call}{tokenizer.eos_token}")


def _benchmark(model: Path, work: Path) -> Iterator[Row]:
    """The natural set of scripts/bench.py."""
    file = rows_file(work, "natural", "completion", "train", 0)
    if not file.exists():
        command = [sys.executable, "-P", "-m", "peers.data", str(work), str(model), "0"]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "scripts")}
        subprocess.run(command, env=environment, check=True, stdin=subprocess.DEVNULL)
    for row in read(file):
        yield {"input_ids": row["input_ids"], "labels": row["labels"]}


def _definitions(tokenizer: Any) -> Iterator[Row]:
    """Definitions alone, several at a time, so that they have from some 15 to some 150 tokens."""
    lines = (ROOT / "configs" / "quickstart" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"].split("Definition:")[1].removesuffix("Semantic class:") for line in lines]
    first, count = 0, 1
    while first < len(texts):
        yield _row(tokenizer, texts[first], "".join(texts[first + 1 : first + count]) + tokenizer.eos_token)
        first, count = first + count, count % 8 + 1


def _layout(rows: Sequence[Row], size: int) -> BatchLayout:
    lengths = np.array([len(row["input_ids"]) for row in rows])
    return BatchLayout(rows, lengths, "batch", size, int(lengths.max()), pad_id=0)


def _measured(model: Any, rows: Sequence[Row], size: int, steps: int) -> str:
    """The share of the tokens that is saved; what `auto` decides; and the ratios of times."""
    layout = _layout(rows, size)
    saved, _ = sharing(model, layout, AUTO)
    auto = flatten if saved is None else share_prefixes
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    forced, chosen = list[float](), list[float]()
    for number in range(min(steps + 1, max(2, len(rows) // size))):
        batch = [rows[place] for place in order[number * size : (number + 1) * size]]
        variants = [("not", flatten), ("shared", share_prefixes), ("auto", auto)][:: -1 if number % 2 else 1]
        seconds = {name: _step(model, batch, collate) for name, collate in variants}
        if number:  # the first ones also compile
            forced.append(seconds["not"] / seconds["shared"])
            chosen.append(seconds["not"] / seconds["auto"])
    decided = "off" if saved is None else "on"
    return f"{layout.saving():.0%} | {decided} | {_spread(forced)} | {_spread(chosen)}"


def _spread(ratios: Sequence[float]) -> str:
    low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else [*ratios] * 3
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _compare_packs(sets: Mapping[str, Sequence[Row]]) -> None:
    """Steps of an epoch and tokens that it computes, where packs are filled up with the rows' own tokens, as they are,
    and with computed ones, in an order of chance."""
    print("| rows | own tokens | of a pack | by own tokens | by computed tokens |\n|---|---|---|---|---|")
    for name, of_set in sets.items():
        rows = [row["input_ids"] for row in of_set]
        lengths = np.array([len(row) for row in rows])
        for budget in (1024, 2048, 4096):
            found = best_fit(lengths, budget)
            own = [[rows[number] for number in found[place]] for place in range(len(found))]
            computed: list[list[list[int]]] = [[]]
            for number in np.random.default_rng(0).permutation(len(rows)).tolist():
                if len(PrefixTree.of([*computed[-1], rows[number]]).ids) > budget:
                    computed.append([])
                computed[-1].append(rows[number])
            cells = [
                f"{len(way)} steps, {sum(len(PrefixTree.of(pack).ids) for pack in way):,}" for way in (own, computed)
            ]
            print(f"| {name} | {lengths.sum():,} | {budget:,} | {' | '.join(cells)} |", flush=True)


def _search(model: Any, rows: Sequence[Row], size: Sequence[int]) -> None:
    """The time of what `auto` does before a run, beside that of a step: over rows of the set's lengths and tokens."""
    tokens, lengths = [token for row in rows for token in row["input_ids"]], [len(row["input_ids"]) for row in rows]
    steps = {count: min(_step(model, rows[:count], flatten) for _ in range(2)) for count in size}
    print("| rows | batch | seconds before the run | seconds of a step |\n|---|---|---|---|")
    for count in (5_000, 100_000):
        draw = random.Random(0)
        starts = ((draw.randrange(len(tokens) - max(lengths)), draw.choice(lengths)) for _ in range(count))
        many: list[Row] = [{"input_ids": (ids := tokens[at : at + n]), "labels": ids} for at, n in starts]
        for of_batch in size:
            layout = _layout(many, of_batch)
            start = time.process_time()
            saved, _ = sharing(model, layout, AUTO)
            seconds = time.process_time() - start
            assert saved is None
            print(f"| {count:,} | {of_batch} | {seconds:.3f} | {steps[of_batch]:.1f} |", flush=True)


def _step(model: Any, rows: Sequence[Row], collate: Callable[[Sequence[Row]], dict[str, torch.Tensor]]) -> float:
    """Seconds of a step, with those of making the batch."""
    start = time.process_time()
    inputs = collate(rows)
    labels, places = inputs.pop("labels"), inputs.pop("places", None)
    kernels.expect(model, labels, places)
    total, count = kernels.next_token_loss(model, model(**inputs, use_cache=False).logits, labels)
    (total / count).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    return time.process_time() - start


if __name__ == "__main__":
    typer.run(main)
