"""Rows that go through no chat template: raw text, and token ids."""

from loratune.data.formats.checks import RowError, Values, kind, text, unpacked, whole_numbers
from loratune.data.formats.examples import IGNORED, Ids, Plain


def prompt_completion(where: str, values: Values) -> Plain:
    """`prompt` and `completion` as text. Raises RowError."""
    return Plain(where, text(values, "prompt"), text(values, "completion"))


def whole_text(where: str, values: Values) -> Plain:
    """`text`, all of it learnt. Raises RowError."""
    return Plain(where, "", text(values, "text"), whole=True)


def token_ids(where: str, values: Values) -> Ids:
    """`input_ids`, and `labels` where they are given: at each place the id itself or -100, not shifted.

    Raises RowError: they are no such lists, or nothing in them is learnt.
    """
    ids = whole_numbers(values, "input_ids")
    if min(ids) < 0:
        number = next(number for number, id in enumerate(ids, start=1) if id < 0)
        raise RowError(f"entry {number} of `input_ids` is {ids[number - 1]}, and ids are not negative")
    mask = unpacked(values, "attention_mask")
    if mask not in (None, "") and (not isinstance(mask, list) or len(mask) != len(ids)):
        found = f"{len(mask)} entries" if isinstance(mask, list) else kind(mask)
        raise RowError(f"`attention_mask` must have {len(ids)} entries, as `input_ids` has, and is {found}")
    if isinstance(mask, list) and mask.count(1) != len(mask):
        raise RowError("`attention_mask` leaves tokens out; give `input_ids` without padding")
    if values.get("labels") is None:
        return Ids(where, ids)
    labels = whole_numbers(values, "labels")
    if len(labels) != len(ids):
        raise RowError(f"`labels` has {len(labels)} entries, but `input_ids` has {len(ids)}")
    if set(labels) == {IGNORED}:
        raise RowError("nothing to learn: all `labels` are -100")
    for number, (label, id) in enumerate(zip(labels, ids, strict=True), start=1):
        if label not in (id, IGNORED):
            what = f"entry {number} of `labels` is {label}, but that of `input_ids` is {id}"
            raise RowError(f"{what}; a label is the id at its own place, or -100")
    return Ids(where, ids, labels)
