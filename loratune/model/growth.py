"""Tokenizers that make of a text one of any length: told from their parts, before any text is given to them.

The library works in memory of its own, which no limit of ours can bound without ending the process.
"""

import base64
import json
import logging
from collections.abc import Iterator
from math import prod
from typing import Any

from loratune.errors import ModelError, Problem

_log = logging.getLogger(__name__)

MOST, BESIDE = 64, 1024
"""Characters that may become of one, and that may be put beside a text. Real tokenizers make at most 18 (of U+FDFA)."""

_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_DOUBLING = ("ByteLevel", "BertNormalizer")


def check_growth(tokenizer: Any, where: str) -> None:
    """Raises ModelError: a part of a fast tokenizer makes more than `MOST` characters of one, by one of its steps or by
    all of them one after another, or puts more than `BESIDE` characters beside a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
    if backend is None:
        return
    for part in _PARTS:
        found = getattr(backend, part)
        try:
            steps = list(_steps(json.loads(found.__getstate__()))) if found is not None else []
        except Exception:  # one that is written in Python has no state to be read
            _log.debug("the %s of the tokenizer is not checked", part, exc_info=True)
            continue
        _check(part.replace("_", "-"), [(step["type"], _factor(step), _added(step)) for step in steps], where)
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        _check("model", [(name, 1, len(getattr(backend.model, name, None) or ""))], where)


def _check(part: str, steps: list[tuple[str, int, int]], where: str) -> None:
    """steps: names, characters that become of one, and characters that are put beside a text."""
    fix = "take the tokenizer that belongs to the model"
    for name, factor, added in steps:
        if factor > MOST or added > BESIDE:
            what = f"{factor:,} characters for one" if factor > MOST else f"{added:,} characters beside a text"
            what = f"the {part} {name} of the tokenizer writes up to {what}"
            raise ModelError(Problem(what, where, fix=fix))
    if (all_of_them := prod(factor for _, factor, _ in steps)) > MOST:
        names = ", ".join(dict.fromkeys(name for name, factor, _ in steps if factor > 1))
        what = f"the {part}s of the tokenizer ({names}) together write up to {float(min(all_of_them, 10**300)):.0e}"
        raise ModelError(Problem(f"{what} characters for one", where, fix=fix))


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """A part, or those that it is made of."""
    inner = next((part[key] for key in ("normalizers", "pretokenizers", "processors", "decoders") if key in part), None)
    if inner is None:
        yield part
        return
    for one in inner:
        yield from _steps(one)


def _factor(step: dict[str, Any]) -> int:
    """How many characters one step makes of one, at the most."""
    kind = step["type"]
    if kind == "Replace":
        replaced = step["pattern"].get("String")
        # an expression may match nothing, beside every character
        return -(-len(step["content"]) // max(len(replaced), 1)) or 1 if replaced else len(step["content"]) + 1
    if kind == "Precompiled":
        known = base64.b64decode(step["precompiled_charsmap"] or "")
        start = 4 + int.from_bytes(known[:4], "little")
        return max((len(text.decode(errors="replace")) for text in known[start:].split(b"\0")), default=1)
    return 2 if kind in _DOUBLING else 1


def _added(step: dict[str, Any]) -> int:
    """How many characters, or tokens, one step puts beside a text."""
    if step["type"] == "TemplateProcessing":
        pieces = [len(piece["ids"]) for piece in step["special_tokens"].values()]
        return len(step["single"]) * max(pieces, default=1)
    if step["type"] == "Replace":
        return 0
    texts = [step[name] for name in ("prepend", "prefix", "suffix", "content", "replacement") if name in step]
    return max((len(text) for text in texts if isinstance(text, str)), default=0)
