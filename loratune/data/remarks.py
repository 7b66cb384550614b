"""Remarks on rows and how they are rendered, from the first rows of a split."""

import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from loratune.config import DataSection
from loratune.data import formats
from loratune.data.formats import Conversation, Example, Ids, Plain, Preference, sides
from loratune.data.rendering import Renderer
from loratune.data.sources.rows import place_in_cache
from loratune.data.splits import DatasetSplit
from loratune.data.token_cache import TokenCache

_DECODED_ROWS, _DECODED = 100, 100_000
"""How many rows and characters at most are encoded and decoded to find characters that the tokenizer loses."""

_SHOWN_CHARACTERS = 40


def first_examples(split: DatasetSplit, rows: TokenCache) -> Iterator[Example]:
    """The first hundred rows of a split, without those that are not trained on. rows: the rows of the split."""
    places = {rows.row(number).where for number in range(min(_DECODED_ROWS, len(rows)))}
    return (example for example in islice(split.examples(), _DECODED_ROWS) if place_in_cache(example.where) in places)


def remark_on_lost_characters(
    split: DatasetSplit, rows: TokenCache, renderer: Renderer, section: DataSection
) -> str | None:
    """Returns a line about letters and digits of answers that are lost by encoding and decoding, or None.

    The last answers of the first rows are checked. Case, accents, compatibility forms, white space and punctuation are
    ignored, because tokenizers normalise them.
    """
    loss_on = "assistant" if section.loss_on == "assistant" else "completion"
    few, characters = list[Plain | Conversation](), 0
    for example in first_examples(split, rows):
        if isinstance(example, Plain) and example.whole:
            example = replace(example, completion=example.completion[: _DECODED // 10])
        characters += size_of(example)
        texts = [
            side for side in sides(example) if not isinstance(side, Ids) and not formats.no_loss_reason(side, loss_on)
        ]
        few += texts if characters <= _DECODED else ()
    tokenizer, count, lost, shown = renderer.tokenizer, 0, 0, ""
    special = [*zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)]
    for one, row in zip(few, renderer.rows(few, loss_on) if few else (), strict=True):
        if isinstance(one, Plain):
            answer = one.completion
        else:
            answer = one.messages[one.supervised_turns(loss_on)[-1]]["content"]
        added = {id for token, id in special if token not in answer}  # the end of sequence, the unknown token
        decoded = tokenizer.decode([id for id in row.completion if id not in added], skip_special_tokens=False)
        letters = _letters_and_digits(answer)
        missing = (letters - _letters_and_digits(decoded)).total()
        count, lost = count + letters.total(), lost + missing
        if missing and not shown:
            shown = f"{one.where}: {answer[:_SHOWN_CHARACTERS]!r} -> {decoded[:_SHOWN_CHARACTERS]!r}"
    if not lost:
        return None
    share = f"{lost / count:.0%}" if lost / count >= 0.01 else "less than 1%"
    return f"the tokenizer drops {share} of the letters and digits of answers, e.g. {shown}"


def remark_on_arguments(split: DatasetSplit, rows: TokenCache, renderer: Renderer) -> str | None:
    """Returns a line about arguments of the config, or of the first rows, that the template does not read; or None."""
    arguments = dict.fromkeys(renderer.arguments)
    for example in first_examples(split, rows):
        for side in sides(example):
            arguments |= dict.fromkeys(side.arguments if isinstance(side, Conversation) else ())
    return renderer.unread(arguments) or None


def _letters_and_digits(text: str) -> Counter[str]:
    """Returns how often a text has each letter and digit, without case, accents and compatibility forms."""
    decomposed = unicodedata.normalize("NFKD", text).casefold()
    return Counter(character for character in decomposed if character.isalnum())


def size_of(example: Example) -> int:
    """The approximate number of characters of an example."""
    if isinstance(example, Preference):
        return sum(map(size_of, sides(example)))
    if isinstance(example, Plain):
        return len(example.prompt) + len(example.completion)
    if isinstance(example, Conversation):
        return sum(len(str(message.get("content"))) for message in example.messages)
    return 4 * len(example.ids)
