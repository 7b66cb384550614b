"""Build the rows of configs/recipes, from what the checkout and Python have: nothing is downloaded.

    python scripts/build_recipe_data.py [DEST]    # default: recipes

definitions.csv    text and label: WordNet definitions and their categories, of the rows of the quickstart
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
import io
import itertools
import json
import os
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
        f"error: {sys.executable} does not have {missing.name}; run `pip install .` in the checkout, or "
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


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _table(rows: Iterable[Row]) -> str:
    table = csv.DictWriter(file := io.StringIO(), ["text", "label"], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return file.getvalue()


def _chat(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def labelled(name: str, count: int) -> list[Row]:
    """Rows of the quickstart as text and label."""
    found = []
    for row in _read(CONFIGS.parent / "loratune" / "data" / "quickstart" / name)[:count]:
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


def contents() -> dict[str, str]:
    """The text of each file, by its path."""
    labels = labelled("eval.jsonl", 200)
    summaries = [*itertools.islice(summarized(), SUMMARIES + UNSEEN)]
    random.Random(0).shuffle(summaries)
    pairs = _read(CONFIGS / "preferences" / "train.jsonl")
    questions = skills(labels, summaries[SUMMARIES:], _read(CONFIGS / "preferences" / "eval.jsonl"))
    manual = pages()
    folders = (("manual" if number < int(PAGES * len(manual)) else "manual-unseen") for number in range(len(manual)))
    return {
        "definitions.csv": _table(labelled("train.jsonl", LABELS)),
        "definitions-unseen.csv": _table(labels),
        "tools.jsonl": _lines(tool_rows(TOOLS, unseen=False)),
        "tools-unseen.jsonl": _lines(tool_rows(UNSEEN, unseen=True)),
        "summaries.jsonl": _lines(summaries[:SUMMARIES]),
        "summaries-unseen.jsonl": _lines(summaries[SUMMARIES:]),
        "answers.jsonl": _lines(_chat(row["prompt"][0]["content"], row["chosen"]) for row in pairs),
        "skills.jsonl": _lines(questions),
        **{f"{folder}/{name}.txt": text for folder, (name, text) in zip(folders, manual, strict=True)},
    }


def write(dest: Path) -> None:
    """Write all files, unless one of them is there with other content: it may be the user's."""
    files = {dest / name: text.encode() for name, text in contents().items()}
    for path, content in files.items():
        if os.path.lexists(path) and not (path.is_file() and path.read_bytes() == content):
            sys.exit(f"{path} is there, with other content: move it, or name another directory; nothing was written")
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def main() -> None:
    """Write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dest", type=Path, nargs="?", default=Path("recipes"), help="directory (default: %(default)s)")
    write(parser.parse_args().dest)


if __name__ == "__main__":
    main()
