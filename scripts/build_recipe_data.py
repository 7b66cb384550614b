"""Build the rows of configs/recipes, from what the checkout and Python have: nothing is downloaded.

    python scripts/build_recipe_data.py [DEST]    # default: recipes

definitions.csv    text and label: WordNet definitions and their categories, of the rows of configs/quickstart
tools.jsonl        conversations with tools, put together by chance; those of tools-unseen.jsonl have other arguments
summaries.jsonl    functions of Python's standard library, and the first lines of their docstrings
manual/            pages of Python's language reference, as pydoc has them
answers.jsonl      conversations: the questions and the chosen answers of configs/preferences
skills.jsonl       questions for three adapters

`*-unseen` are rows that no training reads. The same Python gives the same rows;
summaries and pages depend on its version.
"""

import argparse
import csv
import hashlib
import itertools
import json
import pydoc_data.topics
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

try:
    from learning.tasks import docstrings
except ModuleNotFoundError as missing:
    sys.exit(
        f"error: {sys.executable} does not have {missing.name}; run `pip install '.[quickstart]'` in the checkout, or "
        "after `make quickstart` `. .venv/bin/activate`"
    )

Row = dict[str, Any]
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
LABELS, TOOLS, SUMMARIES, UNSEEN = 800, 240, 200, 100
"""Numbers of training rows, and of rows for scoring (of labels: all of the quickstart's)."""
PAGES, PAGE_CHARACTERS = 0.8, (800, 13_000)
"""The fraction of pages to train on, and the lengths of pages; the other pages are for scoring."""


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _chat(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def labelled(name: str, count: int) -> list[Row]:
    """Rows of the quickstart as text and label."""
    found = []
    for row in _read(CONFIGS / "quickstart" / name)[:count]:
        text = row["prompt"].split("Definition: ")[1].removesuffix(". Semantic class:")
        found.append({"text": text, "label": row["completion"].strip()})
    return found


_FUNCTIONS: Sequence[tuple[str, str, Sequence[str], Sequence[str]]] = (
    ("get_weather", "Get the weather of a city.", ("city",), ("What is the weather in {}?", "Do I need a coat in {}?")),
    ("set_timer", "Start a timer.", ("minutes",), ("Remind me in {} minutes.", "Set a timer for {} minutes, please.")),
    ("search_mail", "Find mails of a person.", ("sender",), ("Show me what {} has written.", "Any mail from {}?")),
    ("book_table", "Book a table.", ("city", "people"), ("Find a restaurant in {} for {}.", "A table in {} for {}.")),
    ("send_message", "Send a message to a person.", ("to",), ("Tell {} that I am late.", "Write {} that I am here.")),
    ("play_music", "Play music of an artist.", ("artist",), ("I want to hear {}.", "Put on something by {}.")),
)
"""Name, description, parameters and questions of a function."""
_WORDS = {
    "city": "Oslo Lima Cairo Quito Perth Delhi Sofia Turin Tunis Kyoto Leeds Porto Accra Dakar Basel Ghent",
    "sender": "Ada Ben Carla Dmitri Elif Femi Greta Hugo Ines Jonas Kenji Lena Marco Nadia Omar Paula",
    "to": "Uma Viktor Wanda Xenia Yusuf Zoe Anouk Boris Chiara Daniel Emeka Fatima Goran Hanna Ivan Julia",
    "artist": "Abba Bach Bowie Coltrane Dylan Elgar Fauré Gershwin Holst Joplin Liszt Mozart Prince Ravel Sade Verdi",
}
_VALUES: dict[str, Sequence[str | int]] = {
    **{name: words.split() for name, words in _WORDS.items()}, "minutes": range(3, 35, 2), "people": range(2, 18),
}  # fmt: skip
"""Sixteen values of each parameter; the last four are for rows that no training reads."""
_NO_FUNCTION = "I have no function for that."


def _schema(name: str, description: str, parameters: Sequence[str]) -> Row:
    kinds = {one: {"type": "integer" if isinstance(_VALUES[one][0], int) else "string"} for one in parameters}
    described = {"type": "object", "properties": kinds, "required": [*parameters]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": described}}


def tool_row(chance: random.Random, *, unseen: bool) -> Row:
    """A question with two functions; in one row of eight, neither answers it. unseen: with the last values."""
    (name, description, parameters, questions), *others = chance.sample(_FUNCTIONS, 4)
    values = {one: chance.choice(_VALUES[one][12:] if unseen else _VALUES[one][:12]) for one in parameters}
    question = {"role": "user", "content": chance.choice(questions).format(*values.values())}
    answer: Row = {"role": "assistant", "content": _NO_FUNCTION}
    offered = others[:2]
    if chance.random() >= 1 / 8:
        call = {"type": "function", "function": {"name": name, "arguments": json.dumps(values, ensure_ascii=False)}}
        answer = {"role": "assistant", "tool_calls": [call]}
        offered = [(name, description, parameters, questions), others[0]]
    chance.shuffle(offered)
    return {"tools": [_schema(*one[:3]) for one in offered], "messages": [question, answer]}


def tool_rows(count: int, *, unseen: bool) -> list[Row]:
    """Rows with tools, each once."""
    chance, found = random.Random(int(unseen)), dict[str, Row]()
    while len(found) < count:
        row = tool_row(chance, unseen=unseen)
        found[json.dumps(row)] = row
    return [*found.values()]


def summarized() -> Iterator[Row]:
    """Functions of the standard library, each with the first line of its docstring; none is there twice."""
    seen = set[str]()
    for row in docstrings(Path()):
        source, summary = row["prompt"].removesuffix("\n\n# Summary:"), row["completion"].strip()
        if not {source, summary} & seen:
            yield _chat(f"Write a docstring for this function.\n\n{source}", summary)
        seen |= {source, summary}


def skills(labels: Sequence[Row], summaries: Sequence[Row], answers: Sequence[Row]) -> Iterator[Row]:
    """Two questions for each adapter."""
    for row in labels[:2]:
        yield {"adapter": "labels", "messages": [{"role": "user", "content": row["text"]}]}
    for row in summaries[:2]:
        yield {"adapter": "style", "messages": row["messages"][:1]}
    for row in answers[:2]:
        yield {"adapter": "answers", "messages": row["prompt"]}


def pages() -> list[tuple[str, str]]:
    """Names and texts of the pages of the language reference, in an order of chance."""
    least, most = PAGE_CHARACTERS
    found = [(name, text) for name, text in pydoc_data.topics.topics.items() if least <= len(text) <= most]
    return sorted(found, key=lambda page: hashlib.sha256(page[0].encode()).digest())


def write(dest: Path) -> None:
    """Write all files."""
    dest.mkdir(parents=True, exist_ok=True)
    labels = labelled("eval.jsonl", 200)
    for name, rows in (("definitions", labelled("train.jsonl", LABELS)), ("definitions-unseen", labels)):
        with (dest / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, ["text", "label"], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    summaries = [*itertools.islice(summarized(), SUMMARIES + UNSEEN)]
    random.Random(0).shuffle(summaries)
    pairs = _read(CONFIGS / "preferences" / "train.jsonl")
    _write(dest / "tools.jsonl", tool_rows(TOOLS, unseen=False))
    _write(dest / "tools-unseen.jsonl", tool_rows(UNSEEN, unseen=True))
    _write(dest / "summaries.jsonl", summaries[:SUMMARIES])
    _write(dest / "summaries-unseen.jsonl", summaries[SUMMARIES:])
    _write(dest / "answers.jsonl", (_chat(row["prompt"][0]["content"], row["chosen"]) for row in pairs))
    _write(dest / "skills.jsonl", skills(labels, summaries[SUMMARIES:], _read(CONFIGS / "preferences" / "eval.jsonl")))
    manual = pages()
    for number, (name, text) in enumerate(manual):
        folder = dest / ("manual" if number < int(PAGES * len(manual)) else "manual-unseen")
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def main() -> None:
    """Write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dest", type=Path, nargs="?", default=Path("recipes"), help="directory (default: %(default)s)")
    write(parser.parse_args().dest)


if __name__ == "__main__":
    main()
