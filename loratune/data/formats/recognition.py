"""The formats of rows, and which of them the first row of a file has.

A new format is one entry in `FORMATS`: its name, the fields it is known by, the function that turns the fields of a row
into an Example, and the further fields that it reads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from loratune.codes import Code
from loratune.config import DataSection
from loratune.data.formats import parsers
from loratune.data.formats.examples import Example
from loratune.data.formats.values import Fields, messages_or_text, quote
from loratune.errors import DataError, Problem


@dataclass(frozen=True)
class Format:
    """A format of rows.

    Attributes:
        name: As `data.format` names it.
        keys: Fields that a row must have, and by which the format is recognised.
        parse: Takes the place and the fields of a row. Raises RowError.
        optional: Further fields that are read.
    """

    name: str
    keys: tuple[str, ...]
    parse: Callable[[str, Fields], Example]
    optional: tuple[str, ...] = ()


_CHAT, _ALPACA = ("tools", "system"), ("input", "system", "history", "tools")
_LABELS = ("label", "kto_tag")
"""Fields that say whether an answer is desirable; LLaMA-Factory's `kto_tag` has no other use."""
_UNPAIRED_ANSWERS = {
    "prompt": "completion", "instruction": "output", "messages": "messages", "conversations": "conversations",
}  # fmt: skip
"""Field with the prompt of an unpaired preference → the field of its answer."""
_QUESTION_NAMES = ("question", "query", "instruction", "input", "problem", "user_prompt")
"""Names of fields, in lower case, that say that they hold a prompt."""


def _pair_of_messages(prompt: str, optional: tuple[str, ...] = _CHAT) -> Format:
    keys = ("chosen", "rejected") if prompt == "prompt" else ("chosen", "rejected", prompt)
    return Format("preference_messages", keys, partial(parsers.parse_pair_of_messages, prompt), optional)


def _unpaired_messages(prompt: str, label: str = "label") -> Format:
    answer, name = _UNPAIRED_ANSWERS[prompt], "unpaired_preference_messages"
    parse = partial(parsers.parse_unpaired_messages, prompt, answer, label)
    more = ("input", "history") if prompt == "instruction" else ()
    return Format(name, tuple(dict.fromkeys((prompt, answer, label))), parse, (*_CHAT, *more))


def _unpaired_texts(label: str = "label") -> Format:
    return Format("unpaired_preference", ("prompt", "completion", label), partial(parsers.parse_unpaired, label))


FORMATS = (
    Format("input_ids", ("input_ids",), parsers.parse_ids, ("labels",)),
    Format("prompt_completion", ("prompt", "completion"), parsers.parse_prompt_completion),
    Format("messages", ("messages",), partial(parsers.parse_conversation, "messages"), _CHAT),
    Format("conversations", ("conversations",), partial(parsers.parse_conversation, "conversations"), _CHAT),
    Format("alpaca", ("instruction", "output"), parsers.parse_alpaca, _ALPACA),
    Format("text", ("text",), parsers.parse_text),
    Format("preference", ("chosen", "rejected"), parsers.parse_pair, ("prompt",)),
    _unpaired_texts(),
)
_BY_NAME = {format.name: format for format in FORMATS}

OPTIONAL_FIELDS = frozenset(name for format in FORMATS for name in format.optional) - {
    name for format in FORMATS for name in format.keys
}
"""Fields that some format reads and none needs."""

_TWO_LISTS = Format("messages", ("prompt", "completion"), parsers.parse_two_lists, ("tools",))
"""Conversations in two lists of messages, of which the second is supervised."""

CHAT_FORMATS = frozenset({"messages", "conversations", "alpaca", "preference_messages", "unpaired_preference_messages"})
"""The formats whose rows go through the chat template."""

PAIRS, UNPAIRED = "preference pairs", "unpaired preferences"
KINDS = {"sft": None, "dpo": PAIRS, "orpo": PAIRS, "simpo": PAIRS, "kto": UNPAIRED}
"""Objective → the kind of rows that it trains on; None for rows with one answer."""
PREFERENCE_FORMATS = {
    f"{name}{suffix}": kind
    for name, kind in (("preference", PAIRS), ("unpaired_preference", UNPAIRED))
    for suffix in ("", "_messages")
}
"""Format of preference data → what its rows are."""


def recognise(where: str, fields: Fields, section: DataSection) -> Format:
    """The format of a row, by its fields or as the section names it. Raises DataError: none fits, or more than one."""
    name, keys = section.format, fields.keys()
    if name == "preference" or (name == "auto" and keys >= set(parsers.SIDES)):
        return _pair_format(where, fields, section)
    if name == "unpaired_preference" or (name == "auto" and label_field(fields)):
        if found := _unpaired_format(fields):
            return found
        if name != "auto":
            return _unpaired_messages("prompt") if parsers.holds_messages(fields) else _BY_NAME[name]
    if keys >= set(_TWO_LISTS.keys) and (
        (name == "messages" and "messages" not in keys)
        or (name == "prompt_completion" and isinstance(fields["prompt"], list))
    ):
        return _TWO_LISTS
    if name != "auto":
        return _BY_NAME[name]
    candidates = [format for format in FORMATS if keys >= set(format.keys) and format.name not in PREFERENCE_FORMATS]
    if len(candidates) == 1:
        lists = candidates[0].keys == _TWO_LISTS.keys and isinstance(messages_or_text(fields, "prompt"), list)
        return _TWO_LISTS if lists else candidates[0]
    names = ", ".join(format.name for format in candidates or FORMATS)
    if candidates:
        what, fix = f"the fields {quote(keys)} fit more than one format", f"set data.format to one of {names}"
        raise DataError(Problem(Code.DATA_FORMAT, what, where, "data.format", fix))
    what = f"the fields {quote(keys)} fit no format"
    fix = f"set data.format to one of {names}, and data.columns to map its fields to yours"
    raise DataError(Problem(Code.DATA_FORMAT, what, where, fix=fix))


def label_field(fields: Fields) -> str:
    """The field that can only mean whether an answer is desirable; empty if there is no answer with such a field.

    0 and 1 in `label`, and words other than true and false, may be classes.
    """

    def is_verdict(name: str, value: Any) -> bool:
        is_word = isinstance(value, bool) or str(value).strip().lower() in ("true", "false")
        return parsers.read_label(value) is not None and (is_word or name == "kto_tag")

    return next((name for name in _LABELS if is_verdict(name, fields.get(name))), "") if _prompt_of(fields) else ""


def unread_label(fields: Fields) -> str:
    """The field beside an answer that may say whether it is desirable, or be a class; empty if there is none."""
    found = (name for name in _LABELS if name in fields)
    may_be = (name for name in found if fields[name] is None or parsers.read_label(fields[name]) is not None)
    return next(may_be, "") if _prompt_of(fields) else ""


def _prompt_of(fields: Fields) -> str:
    """The field with the prompt of an answer that may have a label; empty if there is none."""
    return next((name for name, answer in _UNPAIRED_ANSWERS.items() if {name, answer} <= fields.keys()), "")


def _unpaired_format(fields: Fields) -> Format | None:
    """The format of an answer with a label; None where there is no such answer."""
    label = label_field(fields) or next((name for name in _LABELS if name in fields), "")
    prompt = _prompt_of(fields)
    if not (label and prompt):
        return None
    is_text = prompt == "prompt" and not parsers.holds_messages(fields)
    return _unpaired_texts(label) if is_text else _unpaired_messages(prompt, label)


def _pair_format(where: str, fields: Fields, section: DataSection) -> Format:
    """The format of a pair, whose prompt may be in another field than `prompt`, as in LLaMA-Factory's rows.

    Further fields next to two whole conversations are copies: UltraFeedback's `messages` are those of `chosen`.

    Raises:
        DataError: The name of a field that is not read says that the prompt is there.
    """
    answers = [messages_or_text(fields, name) for name in parsers.SIDES]
    if fields.get("prompt") is None and all(map(parsers.is_answer_alone, answers)):
        for name, optional in (("instruction", _ALPACA), ("messages", _CHAT), ("conversations", _CHAT)):
            if fields.get(name):
                return _pair_of_messages(name, optional)
        unread = (name for name, value in fields.items() if _is_question(name, value, answers[0]))
        if section.format == "auto" and (name := next(unread, "")):
            what = f"`chosen` and `rejected` have no `prompt` beside them, and {quote([name])} is not read"
            fix = f"set data.columns to {{instruction: {name}}} for the chat template, or {{prompt: {name}}}"
            fix += " to join texts; or data.format to preference, if the answers begin with what they answer"
            raise DataError(Problem(Code.DATA_FORMAT, what, where, "data.columns", fix))
    return _pair_of_messages("prompt", ("prompt", *_CHAT)) if parsers.holds_messages(fields) else _BY_NAME["preference"]


def _is_question(name: str, value: Any, chosen: Any) -> bool:
    """Whether a field holds the prompt by its name, and the chosen answer does not hold it too."""
    if name.lower() not in _QUESTION_NAMES or not isinstance(value, str) or not value.strip():
        return False
    return not (isinstance(chosen, str) and value.strip() in chosen)
