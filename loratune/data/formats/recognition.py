"""The formats of rows, and which of them the first row of a file has.

A new format is one entry in `FORMATS`: its name, the fields it is known by, the function that turns the fields of a row
into an Example, and the further fields that it reads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from loratune.codes import Code
from loratune.config import DataSection
from loratune.data.formats import chats, examples, preferences
from loratune.data.formats.examples import Example, Fields, UnpairedPreference, messages_or_text, quote
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


FORMATS = (
    Format("input_ids", ("input_ids",), examples.parse_ids, ("labels",)),
    Format("prompt_completion", ("prompt", "completion"), examples.parse_prompt_completion),
    Format("messages", ("messages",), chats.parse_messages, ("tools", "system")),
    Format("conversations", ("conversations",), chats.parse_sharegpt, ("tools", "system")),
    Format("alpaca", ("instruction", "output"), chats.parse_alpaca, ("input", "system", "history", "tools")),
    Format("text", ("text",), examples.parse_text),
    Format("preference", ("chosen", "rejected"), preferences.parse_pair, ("prompt",)),
    Format("unpaired_preference", ("prompt", "completion", "label"), partial(preferences.parse_unpaired, "label")),
)

OPTIONAL_FIELDS = frozenset(name for format in FORMATS for name in format.optional) - {
    name for format in FORMATS for name in format.keys
}
"""Fields that some format reads and none needs."""

TWO_LISTS = Format("messages", ("prompt", "completion"), chats.parse_two_lists, ("tools",))
"""Conversations in two lists of messages, of which the second is supervised."""

OF_MESSAGES = {
    "preference": Format(
        "preference_messages", ("chosen", "rejected"), preferences.parse_pair_of_messages, ("prompt", "tools", "system")
    ),
    "unpaired_preference": Format(
        "unpaired_preference_messages", ("prompt", "completion", "label"),
        partial(preferences.parse_unpaired_messages, "label"), ("tools", "system"),
    ),
}  # fmt: skip
"""Format of preference data → the same where the answers, or the prompt, are messages."""

_TO_TURNS = {
    name: Format(
        OF_MESSAGES["preference"].name, ("chosen", "rejected", name), partial(preferences.parse_pair_to_turns, name),
        ("tools", "system"),
    )
    for name in ("messages", "conversations")
}  # fmt: skip
QUESTIONED_PAIRS = {
    "instruction": Format(
        OF_MESSAGES["preference"].name, ("chosen", "rejected", "instruction"), preferences.parse_pair_to_instruction,
        ("input", "system", "history", "tools"),
    ),
    **_TO_TURNS,
}  # fmt: skip
"""Field that holds the prompt of a pair without `prompt`, as in LLaMA-Factory's rows → the format of the pair."""

_LABEL_FIELDS = ("label", preferences.KTO_TAG)
"""Fields that say whether an answer is desirable."""
UNPAIRED_PROMPTS: Mapping[str, tuple[str, Callable[[str, str, Fields], UnpairedPreference], tuple[str, ...]]] = {
    "prompt": ("completion", preferences.parse_unpaired_messages, ()),
    "instruction": ("output", preferences.parse_unpaired_output, ("input", "history")),
    **{name: (name, partial(preferences.parse_unpaired_turns, name), ()) for name in ("messages", "conversations")},
}
"""Field with the prompt of an unpaired preference → the field of its answer, how both are read, and further fields."""

CHAT_FORMATS = frozenset({"messages", "conversations", "alpaca", *(format.name for format in OF_MESSAGES.values())})
"""The formats whose rows go through the chat template."""

PAIRS, JUDGED = "preference pairs", "unpaired preferences"
COMPARED_FORMATS = {
    format: kind
    for name, kind in (("preference", PAIRS), ("unpaired_preference", JUDGED))
    for format in (name, OF_MESSAGES[name].name)
}
"""Format of preference data → what its rows are."""


def recognise(where: str, fields: Fields, section: DataSection) -> Format:
    """The format of a row, by its fields or as the section names it. Raises DataError: none fits, or more than one."""
    keys = set(fields)
    pair = keys.issuperset(TWO_LISTS.keys)
    if section.format == "messages" and pair and "messages" not in keys:
        return TWO_LISTS
    if section.format == "prompt_completion" and pair and isinstance(fields["prompt"], list):
        return TWO_LISTS
    if (name := _compared_format(fields, section)) is not None:
        if (
            name == "preference"
            and keys >= {"chosen", "rejected"}
            and (pair_format := _pair_format(where, fields, section))
        ):
            return pair_format
        if name == "unpaired_preference" and (judged := unpaired_format(fields)) is not None:
            return judged
        plain = next(format for format in FORMATS if format.name == name)
        return OF_MESSAGES[name] if preferences.holds_messages(fields) else plain
    if section.format != "auto":
        return next(format for format in FORMATS if format.name == section.format)
    candidates = [format for format in FORMATS if keys.issuperset(format.keys) and format.name not in COMPARED_FORMATS]
    if len(candidates) == 1:
        lists = candidates[0].keys == TWO_LISTS.keys and isinstance(messages_or_text(fields, "prompt"), list)
        return TWO_LISTS if lists else candidates[0]
    names = ", ".join(format.name for format in candidates or FORMATS)
    if candidates:
        what, fix = f"the fields {quote(keys)} fit more than one format", f"set data.format to one of {names}"
        raise DataError(Problem(Code.DATA_FORMAT_AMBIGUOUS, what, where, fix=fix))
    what = f"the fields {quote(keys)} fit no format"
    fix = f"set data.format to one of {names}, and data.columns to map its fields to yours"
    raise DataError(Problem(Code.DATA_FORMAT_UNKNOWN, what, where, fix=fix))


def _compared_format(fields: Fields, section: DataSection) -> str | None:
    """The format of a row of preference data; None for other rows.

    Further fields next to `chosen` and `rejected` are copies: UltraFeedback's `messages` are those of `chosen`.
    A label that is neither true nor false may be a class.
    """
    if section.format != "auto":
        return section.format if section.format in OF_MESSAGES else None
    if fields.keys() >= {"chosen", "rejected"}:
        return "preference"
    return "unpaired_preference" if verdict(fields) and unpaired_format(fields) is not None else None


def verdict(fields: Fields) -> str:
    """The field that can only mean whether an answer is desirable; empty where there is none."""
    return next((name for name in _LABEL_FIELDS if preferences.is_verdict(name, fields.get(name))), "")


def unpaired_format(fields: Fields) -> Format | None:
    """The format of an answer with a label, whose field is the last of its keys; None where there is no such answer."""
    label = verdict(fields) or next((name for name in _LABEL_FIELDS if name in fields), None)
    prompt = next((name for name, (answer, *_) in UNPAIRED_PROMPTS.items() if {name, answer} <= fields.keys()), None)
    if label is None or prompt is None:
        return None
    answer, parse, optional = UNPAIRED_PROMPTS[prompt]
    keys = tuple(dict.fromkeys((prompt, answer, label)))
    if prompt == "prompt" and not preferences.holds_messages(fields):
        return Format("unpaired_preference", keys, partial(preferences.parse_unpaired, label))
    return Format(OF_MESSAGES["unpaired_preference"].name, keys, partial(parse, label), ("tools", "system", *optional))


def _pair_format(where: str, fields: Fields, section: DataSection) -> Format | None:
    """The format of a pair whose prompt is in another field than `prompt`; None where it is there, or in the answers.

    Raises:
        DataError: The name of a field that is not read says that the prompt is there.
    """
    if fields.get("prompt") is not None or not preferences.are_answers_alone(fields):
        return None
    if (name := next((name for name in QUESTIONED_PAIRS if fields.get(name)), None)) is not None:
        return QUESTIONED_PAIRS[name]
    if section.format == "auto" and (name := preferences.unread_question(fields)) is not None:
        what = f"`chosen` and `rejected` have no `prompt` beside them, and {quote([name])} is not read"
        fix = f"set data.columns to {{instruction: {name}}} for the chat template, or {{prompt: {name}}} to join texts"
        fix += "; or data.format to preference, if the answers begin with what they answer"
        raise DataError(Problem(Code.DATA_NO_QUESTION, what, where, "data.columns", fix))
    return None


def chosen_columns(fields: Fields) -> str:
    """What `data.columns` has to be so that the chosen answers of pairs are trained on alone; empty if nothing does."""
    chosen = messages_or_text(fields, "chosen")
    lists, is_text = isinstance(chosen, list), isinstance(chosen, str)
    if (
        fields.get("prompt") is None
        and preferences.are_answers_alone(fields)
        and not fields.keys().isdisjoint(_TO_TURNS)
    ):
        return ""
    if fields.get("prompt") is None and is_text and "instruction" in fields:
        return "{output: chosen}"
    has_prompt = isinstance(messages_or_text(fields, "prompt"), list) if lists else "prompt" in fields
    name = "completion" if has_prompt else "messages" if lists else "text"
    return f"{{{name}: chosen}}"
