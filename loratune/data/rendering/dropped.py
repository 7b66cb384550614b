"""What a tokenizer drops: letters and digits of answers that their ids do not give back."""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Any

_SHOWN = 40


def dropped(tokenizer: Any, answers: Iterable[tuple[str, str, list[int]]]) -> str | None:
    """A line about the letters and digits that are lost between texts and their ids; None where all are there.

    What a tokenizer normalises is no loss: upper case, accents, forms of compatibility, white space, punctuation.
    answers: places of rows, texts, and the ids of these.
    """
    special = [*zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)]
    count = lost = 0
    example = ""
    for where, text, ids in answers:
        beside = {id for token, id in special if token not in text}  # the end of sequence, the sign of the unknown
        decoded = tokenizer.decode([id for id in ids if id not in beside], skip_special_tokens=False)
        given = _signs(text)
        missing = (given - _signs(decoded)).total()
        count, lost = count + given.total(), lost + missing
        if missing and not example:
            example = f"{where}: {text[:_SHOWN]!r} -> {decoded[:_SHOWN]!r}"
    if not lost:
        return None
    return f"the tokenizer drops {_percent(lost / count)} of the letters and digits of answers, e.g. {example}"


def _signs(text: str) -> Counter[str]:
    """The letters and digits of a text."""
    return Counter(sign for sign in unicodedata.normalize("NFKD", text).casefold() if sign.isalnum())


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "less than 1%"
